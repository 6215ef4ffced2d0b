//! Every structure of an image as it stands in the file, both copies where there are two, for people to read.
//!
//! A dump shows fields without judging them, and goes as far into a damaged image as it makes sense: the headers and both
//! region tables always, what lies behind them when it can be found.

use std::path::Path;
use std::sync::Arc;

use zerocopy::FromBytes;

use crate::error::{Error, Result};
use crate::format::bat::BatEntry;
use crate::format::checksum::checksum;
use crate::format::finding::CollectAll;
use crate::format::geometry::BatSlot;
use crate::format::header::{self, HEADER_BYTES, Header, RawHeader};
use crate::format::ident::RawFileIdentifier;
use crate::format::log::{GROWTH_MAX, find_active_sequence};
use crate::format::metadata::{FLAG_REQUIRED, FLAG_USER, FLAG_VIRTUAL_DISK};
use crate::format::region::{self, RawEntry, RawTableHeader, Region};
use crate::image::extents::LayerCursor;
use crate::image::layer::{Layer, load};
use crate::image::replay::FileRing;
use crate::storage::Storage;
use crate::text::escape;
use crate::units::BatIndex;

/// One structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpSection {
    /// What it is: `header copy 1`.
    pub title: String,
    /// Where it stands in the file.
    pub offset: Option<u64>,
    /// Names and values of its fields, in order. Safe to print.
    pub fields: Vec<(String, String)>,
}

/// Runs of BAT entries listed at most; `map` shows all of a large disk.
const BAT_RUNS_MAX: usize = 4096;

impl DumpSection {
    fn new(title: impl Into<String>, offset: u64) -> Self {
        Self { title: title.into(), offset: Some(offset), fields: Vec::new() }
    }

    fn field(&mut self, name: impl Into<String>, value: impl ToString) -> &mut Self {
        self.fields.push((name.into(), value.to_string()));
        self
    }
}

/// Lists every structure of the image in a storage. The name is for messages.
///
/// # Errors
/// When reading fails; a damaged image is shown as far as it can be.
pub fn dump(storage: &Arc<dyn Storage>, name: Option<&Path>) -> Result<Vec<DumpSection>> {
    let mut sections = vec![identifier(storage.as_ref())?];
    for (copy, offset) in (1..).zip(header::OFFSETS) {
        sections.push(header_copy(storage.as_ref(), copy, offset)?);
    }
    let mut findings = CollectAll::default();
    let loaded = match load(storage, name, GROWTH_MAX, &mut findings) {
        Ok(loaded) => Some(loaded),
        Err(error) if error.code().is_some() => None,
        Err(error) => return Err(error),
    };
    for (copy, offset) in (1..).zip(region::OFFSETS) {
        let bytes = match &loaded {
            Some(loaded) => loaded.view.read_vec(offset..offset + region::TABLE_BYTES as u64)?,
            None => read_up_to(storage.as_ref(), offset, region::TABLE_BYTES)?,
        };
        sections.push(region_table(&bytes, copy, offset));
    }
    let Some(loaded) = loaded else { return Ok(sections) };
    let layer = Layer::from_loaded(loaded);
    sections.extend(log(storage.as_ref(), &layer)?);
    sections.push(metadata(&layer));
    sections.extend(locator(&layer));
    sections.push(bat(&layer)?);
    Ok(sections)
}

/// Reads what the file has of a range; zeros for the rest.
fn read_up_to(storage: &dyn Storage, offset: u64, length: usize) -> Result<Vec<u8>> {
    let size = storage.len().map_err(|error| Error::io("cannot tell the length of the file", error))?;
    let there = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(length);
    let mut bytes = vec![0; length];
    if let Some(part) = bytes.get_mut(..there).filter(|part| !part.is_empty()) {
        storage.read_at(part, offset).map_err(|error| Error::io(format!("cannot read at {offset:#x}"), error))?;
    }
    Ok(bytes)
}

/// Bytes as text where they are printable ASCII.
fn ascii(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn identifier(storage: &dyn Storage) -> Result<DumpSection> {
    let bytes = read_up_to(storage, 0, size_of::<RawFileIdentifier>())?;
    let mut section = DumpSection::new("file identifier", 0);
    if let Ok(raw) = RawFileIdentifier::read_from_bytes(&bytes) {
        section.field("signature", ascii(&raw.signature)).field("creator", raw.creator_text());
    }
    Ok(section)
}

fn header_copy(storage: &dyn Storage, copy: u32, offset: u64) -> Result<DumpSection> {
    let bytes = read_up_to(storage, offset, HEADER_BYTES)?;
    let mut section = DumpSection::new(format!("header copy {copy}"), offset);
    let valid = bytes.first_chunk().and_then(Header::decode).is_some();
    if let Ok((raw, rest)) = RawHeader::ref_from_prefix(&bytes) {
        section
            .field("valid", yes_no(valid))
            .field("signature", ascii(&raw.signature))
            .field("checksum", checksum_text(raw.checksum.get(), &bytes))
            .field("sequence number", raw.sequence_number.get())
            .field("file write GUID", raw.file_write_guid)
            .field("data write GUID", raw.data_write_guid)
            .field("log GUID", raw.log_guid)
            .field("log version", raw.log_version.get())
            .field("version", raw.version.get())
            .field("log length", format!("{:#x}", raw.log_length.get()))
            .field("log offset", format!("{:#x}", raw.log_offset.get()))
            .field("reserved bytes", if rest.iter().all(|byte| *byte == 0) { "zero" } else { "not zero" });
    }
    Ok(section)
}

fn checksum_text(stored: u32, bytes: &[u8]) -> String {
    let computed = checksum(bytes);
    if stored == computed { format!("{stored:#010x}") } else { format!("{stored:#010x}, computed {computed:#010x}") }
}

fn region_table(bytes: &[u8], copy: u32, offset: u64) -> DumpSection {
    let mut section = DumpSection::new(format!("region table copy {copy}"), offset);
    let Ok((raw, mut rest)) = RawTableHeader::ref_from_prefix(bytes) else { return section };
    let valid = raw.signature == region::SIGNATURE && raw.checksum.get() == checksum(bytes);
    section
        .field("valid", yes_no(valid))
        .field("signature", ascii(&raw.signature))
        .field("checksum", checksum_text(raw.checksum.get(), bytes))
        .field("entries", raw.entry_count.get())
        .field("reserved", format!("{:#x}", raw.reserved.get()));
    for index in 0..raw.entry_count.get().min(region::ENTRIES_MAX) {
        let Ok((entry, tail)) = RawEntry::ref_from_prefix(rest) else { break };
        rest = tail;
        let length = u64::from(entry.length.get());
        let region =
            Region { guid: entry.guid, file_offset: entry.file_offset.get(), length, required: entry.required.get() };
        let Region { file_offset, required, .. } = region;
        let value = format!(
            "{} ({}), offset {file_offset:#x}, length {length:#x}, required {required:#x}",
            region.name(),
            region.guid
        );
        section.field(format!("entry {index}"), value);
    }
    section
}

/// The log: its state, and the entries that replay would use.
fn log(storage: &dyn Storage, layer: &Layer) -> Result<Option<DumpSection>> {
    let header = &layer.headers().current;
    if header.log_length == 0 {
        return Ok(None);
    }
    let mut section = DumpSection::new("log", header.log_offset);
    section.field("length", format!("{:#x}", header.log_length)).field("dirty", yes_no(header.is_dirty()));
    let Some(replay) = layer.replay() else { return Ok(Some(section)) };
    section
        .field("changed pages", replay.pages)
        .field("zeroed bytes", replay.zeroed_bytes)
        .field("file size after replay", format!("{:#x}", replay.file_size_after));
    for (name, pages) in &replay.touched {
        section.field(format!("pages in {}", escape(name)), pages);
    }
    let sequence = find_active_sequence(&mut FileRing::new(storage, header), header.log_guid)?;
    for entry in sequence.iter().flat_map(|sequence| &sequence.entries) {
        let value = format!(
            "ring offset {:#x}, length {:#x}, tail {:#x}, {} descriptors, flushed file offset {:#x}, last file offset {:#x}",
            entry.start * 4096,
            entry.sectors * 4096,
            entry.tail,
            entry.descriptors,
            entry.flushed_file_offset,
            entry.last_file_offset
        );
        section.field(format!("entry {}", entry.sequence_number), value);
    }
    Ok(Some(section))
}

fn metadata(layer: &Layer) -> DumpSection {
    let metadata = layer.metadata();
    let mut section = DumpSection::new("metadata table", layer.region_table().metadata.file_offset);
    for (index, item) in metadata.items.iter().enumerate() {
        let mut flags = Vec::new();
        for (flag, name) in [(FLAG_USER, "user"), (FLAG_VIRTUAL_DISK, "virtual disk"), (FLAG_REQUIRED, "required")] {
            if item.flags & flag != 0 {
                flags.push(name);
            }
        }
        let value = format!(
            "{} ({}), offset {:#x}, length {:#x}, flags {:#x} ({})",
            item.name(),
            item.id,
            item.offset,
            item.length,
            item.flags,
            flags.join(", ")
        );
        section.field(format!("entry {index}"), value);
    }
    section
        .field("block size", format!("{:#x}", metadata.block_size))
        .field("leave blocks allocated", yes_no(metadata.leave_blocks_allocated))
        .field("has parent", yes_no(metadata.has_parent))
        .field("virtual disk size", metadata.disk_size)
        .field("logical sector size", metadata.logical_sector_size)
        .field("physical sector size", metadata.physical_sector_size)
        .field("virtual disk ID", metadata.disk_id);
    section
}

fn locator(layer: &Layer) -> Option<DumpSection> {
    let locator = layer.metadata().parent_locator.as_ref()?;
    let mut section = DumpSection { title: "parent locator".to_owned(), offset: None, fields: Vec::new() };
    for (key, value) in locator.pairs() {
        section.field(escape(key), escape(value));
    }
    Some(section)
}

/// The BAT as runs of entries that are equal, or lie one behind the other in the file.
fn bat(layer: &Layer) -> Result<DumpSection> {
    let geometry = layer.geometry();
    let mut section = DumpSection::new("BAT", layer.region_table().bat.file_offset);
    section.field("entries", geometry.bat_entries());
    let mut cursor = LayerCursor::new(layer);
    let mut index = 0;
    while index < geometry.bat_entries() {
        if section.fields.len() > BAT_RUNS_MAX {
            section.field("more", format!("entries from {index} on are not listed; `vhdkit map` shows all blocks"));
            break;
        }
        let entry = cursor.entry(BatIndex(index))?;
        let end = run_end(&mut cursor, layer, index, entry)?;
        let what = match geometry.slot(BatIndex(index)) {
            BatSlot::Payload(_) => entry.payload_state().map_or("unknown state", |state| state.as_str()),
            BatSlot::Bitmap(_) => "sector bitmap",
        };
        let range = if end == index + 1 { format!("entry {index}") } else { format!("entries {index} to {}", end - 1) };
        let value = format!("{what}, state {}, offset {:#x}", entry.state_number(), entry.file_offset().0);
        let reserved =
            if entry.reserved() == 0 { String::new() } else { format!(", reserved bits {:#x}", entry.reserved()) };
        section.field(range, value + &reserved);
        index = end;
    }
    Ok(section)
}

/// Where the run that begins at an entry ends.
fn run_end(cursor: &mut LayerCursor<'_>, layer: &Layer, index: u64, entry: BatEntry) -> Result<u64> {
    let geometry = layer.geometry();
    let group = geometry.chunk_ratio() + 1;
    // A run does not pass a bitmap entry, nor begin with more than one.
    let group_end = (index / group * group + group - 1).max(index + 1).min(geometry.bat_entries());
    if entry.file_offset().0 == 0 {
        return Ok(index + cursor.count_equal(BatIndex(index), group_end - index, entry)?.max(1));
    }
    let mut end = index + 1;
    let mut expected = entry.0;
    while end < group_end {
        expected = expected.wrapping_add(geometry.block_size());
        if cursor.entry(BatIndex(end))?.0 != expected {
            break;
        }
        end += 1;
    }
    Ok(end)
}
