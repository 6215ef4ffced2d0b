//! What is left of the structures around the data: headers, log, region tables, metadata.
//!
//! Each is taken from where the format has it when it is whole, from what is left of it when that makes sense, and
//! searched for at every MiB when nothing leads to it.

use std::ops::Range;
use std::sync::Arc;

use zerocopy::FromBytes as _;

use super::FILE_BYTES_MAX;
use super::report::{Certainty, Notes};
use super::table;
use crate::error::{Error, Result};
use crate::format::HEADER_SECTION_BYTES;
use crate::format::checksum::checksum;
use crate::format::finding::{Code, CollectAll, Location};
use crate::format::geometry::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN};
use crate::format::guid::Guid;
use crate::format::header::{HEADER_BYTES, Header, LOG_BYTES_MAX, OFFSETS};
use crate::format::log::{ENTRY_SIGNATURE, RawEntryHeader, ReplayLimits};
use crate::format::metadata::{self, FLAG_USER};
use crate::format::region::{self, BAT_GUID, METADATA_GUID};
use crate::format::{DISK_SIZE_MAX, locator::ParentLocator};
use crate::image::replay::{ReplayReport, replay_into_memory};
use crate::image::view::View;
use crate::ops::extended::Extended;
use crate::ops::{Progress, advance};
use crate::storage::Storage;
use crate::units::{MIB, is_aligned};

/// Longest BAT that any disk has.
const BAT_BYTES_MAX: u64 = 513 * MIB;
/// Where items begin in a metadata region, as every known writer places them.
const ITEMS_START: u64 = metadata::TABLE_BYTES as u64;

/// What the metadata says, as far as anything of it is left.
#[derive(Clone, Debug, Default)]
pub(super) struct Parameters {
    pub(super) block_size: Option<u32>,
    pub(super) has_parent: Option<bool>,
    pub(super) fixed: bool,
    pub(super) disk_size: Option<u64>,
    pub(super) logical_sector_size: Option<u32>,
    pub(super) physical_sector_size: Option<u32>,
    pub(super) disk_id: Option<Guid>,
    pub(super) locator: Option<ParentLocator>,
}

/// What was found around the data.
#[derive(Debug)]
pub(super) struct Structures {
    /// The file with its log replayed, where that was possible.
    pub(super) view: View,
    /// Where the log is, where that is known.
    pub(super) log: Option<Range<u64>>,
    /// Where the BAT is, where a region table says so.
    pub(super) bat: Option<Range<u64>>,
    /// Where a region table has it, in the file or behind its end.
    pub(super) bat_start: Option<u64>,
    /// Where the metadata region is.
    pub(super) metadata: Option<Range<u64>>,
    /// Other regions.
    pub(super) regions: Vec<Range<u64>>,
    pub(super) parameters: Parameters,
}

/// Reads a part of a view; zeros behind its end.
pub(super) fn bytes(view: &View, offset: u64, length: usize) -> Result<Vec<u8>> {
    view.read_vec(offset..offset.saturating_add(length as u64))
}

/// Finds everything that is left.
pub(super) fn find(storage: &Arc<dyn Storage>, notes: &mut Notes, progress: &dyn Progress) -> Result<Structures> {
    let size = storage.len().map_err(|error| Error::io("cannot tell the length of the file", error))?;
    if let Some(header) = header(storage, size, notes)? {
        let (view, log) = log(storage, size, &header, true, notes)?;
        return find_in(view, log, notes, progress);
    }
    let mut plain_notes = Notes::default();
    let searched = search_log(storage, size)?;
    let place = searched.map(|header| header.log_offset..header.log_offset + u64::from(header.log_length)); // found in the file
    let plain = find_in(View::plain(Arc::clone(storage), size), place, &mut plain_notes, progress)?;
    let Some(header) = searched else {
        notes.parts.append(&mut plain_notes.parts);
        return Ok(plain);
    };
    // Nothing says whether the log is in use. It is replayed where that leads to more than the file does by itself.
    let mut other_notes = Notes::default();
    let (view, log) = log(storage, size, &header, false, &mut other_notes)?;
    let replayed = find_in(view, log, &mut other_notes, progress)?;
    if replayed.weight(progress)? > plain.weight(progress)? {
        notes.parts.append(&mut other_notes.parts);
        return Ok(replayed);
    }
    notes.part("log", Certainty::Guessed, "not replayed, as nothing more is found with it");
    notes.parts.append(&mut plain_notes.parts);
    Ok(plain)
}

impl Structures {
    /// How much was found: metadata, and blocks with data.
    fn weight(&self, progress: &dyn Progress) -> Result<(bool, u64)> {
        let blocks = match &self.bat {
            Some(bat) => table::present(&self.view, bat.start)?,
            None => table::search(self, progress)?.map_or(0, |found| found.present),
        };
        Ok((self.metadata.is_some() && self.parameters.disk_size.is_some(), blocks))
    }
}

/// Finds what a file with or without its log leads to.
fn find_in(view: View, log: Option<Range<u64>>, notes: &mut Notes, progress: &dyn Progress) -> Result<Structures> {
    let regions = region_table(&view, notes)?;
    let in_file = |range: &Range<u64>| range.start < view.size();
    let known = |guid: Guid| regions.iter().find(|(other, _)| *other == guid).map(|(_, range)| range.clone());
    let mut metadata = known(METADATA_GUID).filter(in_file);
    let mut parameters = match &metadata {
        Some(region) => read_metadata(&view, region)?,
        None => None,
    };
    if parameters.is_none()
        && let Some((region, found)) = search_metadata(&view, progress)?
    {
        let certainty = if metadata.is_none() { Certainty::Guessed } else { Certainty::Certain };
        notes.part("metadata", certainty, format!("found by its signature at {:#x}", region.start));
        metadata = Some(region);
        parameters = Some(found);
    } else if parameters.is_some() {
        notes.part("metadata", Certainty::Certain, "in order");
    }
    if parameters.is_none()
        && let Some(region) = &metadata
        && let Some(found) = items_without_table(&view, region)?
    {
        notes.part("metadata", Certainty::Guessed, "its table is gone; the items were found where writers place them");
        parameters = Some(found);
    }
    if parameters.is_none() {
        notes.part("metadata", Certainty::Lost, "nothing of it was found; sizes are inferred");
    }
    let others = regions.iter().filter(|(guid, _)| *guid != BAT_GUID && *guid != METADATA_GUID);
    Ok(Structures {
        bat: known(BAT_GUID).filter(in_file),
        bat_start: known(BAT_GUID).map(|range| range.start),
        regions: others.map(|(_, range)| range.clone()).filter(in_file).collect(),
        parameters: parameters.unwrap_or_default(),
        view,
        log,
        metadata,
    })
}

/// The header that counts, or the only one that is left.
fn header(storage: &Arc<dyn Storage>, size: u64, notes: &mut Notes) -> Result<Option<Header>> {
    let mut copies = [None, None];
    for (copy, offset) in copies.iter_mut().zip(OFFSETS) {
        let mut raw = [0; HEADER_BYTES];
        if offset + HEADER_BYTES as u64 <= size {
            let read = storage.read_at(&mut raw, offset);
            read.map_err(|error| Error::io(format!("cannot read the header at {offset:#x}"), error))?;
            *copy = Header::decode(&raw);
        }
    }
    let (found, certainty, detail) = match copies {
        [Some(first), Some(second)] if first.sequence_number >= second.sequence_number => {
            (Some(first), Certainty::Certain, "both are there")
        }
        [Some(_), Some(second)] => (Some(second), Certainty::Certain, "both are there"),
        [Some(only), None] | [None, Some(only)] => (Some(only), Certainty::Certain, "one of the two is there"),
        [None, None] => {
            (None, Certainty::Lost, "both are gone: identities are new, and the log is judged by what is in it")
        }
    };
    notes.part("headers", certainty, detail);
    Ok(found)
}

/// The file with its log over it.
fn log(
    storage: &Arc<dyn Storage>,
    size: u64,
    header: &Header,
    certain: bool,
    notes: &mut Notes,
) -> Result<(View, Option<Range<u64>>)> {
    let plain = || View::plain(Arc::clone(storage), size);
    let (start, length) = (header.log_offset, u64::from(header.log_length));
    let end = start.checked_add(length).filter(|end| *end <= size);
    let sane = start >= HEADER_SECTION_BYTES && length > 0 && length <= LOG_BYTES_MAX;
    let aligned = is_aligned(start, MIB) && is_aligned(length, MIB);
    let Some(end) = end.filter(|_| sane && aligned) else {
        let certainty = if header.is_dirty() { Certainty::Lost } else { Certainty::Certain };
        notes.part("log", certainty, "its place makes no sense; what was only in it is lost");
        return Ok((plain(), None));
    };
    if !header.is_dirty() {
        notes.part("log", Certainty::Certain, "clean");
        return Ok((plain(), Some(start..end)));
    }
    let replayed = match replay(storage, header, size) {
        // The file was cut off; what the log holds is as good as before.
        Err(error) if error.code() == Some(Code::LogFileTruncated) => {
            let longer: Arc<dyn Storage> = Arc::new(Extended::new(storage, size, FILE_BYTES_MAX));
            replay(&longer, header, FILE_BYTES_MAX).inspect(|(view, _)| view.set_size(size))
        }
        other => other,
    };
    match replayed {
        Ok((view, report)) => {
            let certainty = if certain { Certainty::Certain } else { Certainty::Guessed };
            notes.part(
                "log",
                certainty,
                format!("replayed in memory: {} entries, {} pages", report.entries, report.pages),
            );
            Ok((view, Some(start..end)))
        }
        Err(error) if error.code().is_none() => Err(error),
        Err(_) => {
            let certainty = if certain { Certainty::Lost } else { Certainty::Guessed };
            notes.part("log", certainty, "it cannot be replayed; what was only in it is lost");
            Ok((plain(), Some(start..end)))
        }
    }
}

fn replay(storage: &Arc<dyn Storage>, header: &Header, file_size: u64) -> Result<(View, ReplayReport)> {
    let limits = ReplayLimits { file_size, growth_max: FILE_BYTES_MAX };
    replay_into_memory(storage, header, limits, &mut CollectAll::default())
}

/// Looks for a log where nothing says where it is. The entry at its very beginning is of the last session, and what a
/// session that ended well left there stands in the file already, so that replaying it changes nothing.
fn search_log(storage: &Arc<dyn Storage>, size: u64) -> Result<Option<Header>> {
    let mut offset = HEADER_SECTION_BYTES;
    while offset + MIB <= size.min(SEARCHED_FOR_LOG) {
        let mut raw = [0; size_of::<RawEntryHeader>()];
        let read = storage.read_at(&mut raw, offset);
        read.map_err(|error| Error::io(format!("cannot read the file at {offset:#x}"), error))?;
        if let Ok(entry) = RawEntryHeader::read_from_bytes(&raw)
            && entry.signature == ENTRY_SIGNATURE
            && !entry.log_guid.is_nil()
        {
            return Ok(Some(Header {
                sequence_number: 1,
                file_write_guid: Guid::NIL,
                data_write_guid: Guid::NIL,
                log_guid: entry.log_guid,
                log_version: 0,
                version: 1,
                log_length: u32::try_from(MIB).unwrap_or_default(),
                log_offset: offset,
            }));
        }
        offset += MIB;
    }
    Ok(None)
}

/// Every known writer puts the log right behind the header section.
const SEARCHED_FOR_LOG: u64 = 16 * MIB;

/// The regions of the first copy that is whole; else those of a damaged copy that make sense.
fn region_table(view: &View, notes: &mut Notes) -> Result<Vec<(Guid, Range<u64>)>> {
    let copies =
        [bytes(view, region::OFFSETS[0], region::TABLE_BYTES)?, bytes(view, region::OFFSETS[1], region::TABLE_BYTES)?];
    let whole = |copy: &&Vec<u8>| {
        let header = region::RawTableHeader::ref_from_prefix(copy);
        header.is_ok_and(|(raw, _)| raw.signature == region::SIGNATURE && raw.checksum.get() == checksum(copy))
    };
    let mut found = Vec::new();
    for copy in copies.iter().filter(whole) {
        found = entries(copy);
        if has_both(&found) && leads_to_metadata(view, &found)? {
            notes.part("region table", Certainty::Certain, "a whole copy is there");
            return Ok(found);
        }
    }
    for copy in &copies {
        let entries = entries(copy);
        if has_both(&entries) && leads_to_metadata(view, &entries)? {
            notes.part("region table", Certainty::Guessed, "damaged, but it leads to metadata");
            return Ok(entries);
        }
    }
    if has_both(&found) {
        notes.part("region table", Certainty::Certain, "a whole copy is there");
        return Ok(found);
    }
    notes.part("region table", Certainty::Lost, "both copies are gone; what they lead to is searched for");
    Ok(Vec::new())
}

fn has_both(entries: &[(Guid, Range<u64>)]) -> bool {
    [BAT_GUID, METADATA_GUID].iter().all(|guid| entries.iter().any(|(other, _)| other == guid))
}

fn leads_to_metadata(view: &View, entries: &[(Guid, Range<u64>)]) -> Result<bool> {
    let Some((_, region)) = entries.iter().find(|(guid, _)| *guid == METADATA_GUID) else { return Ok(false) };
    Ok(bytes(view, region.start, metadata::SIGNATURE.len())? == metadata::SIGNATURE)
}

/// The entries of a region table that can be.
fn entries(table: &[u8]) -> Vec<(Guid, Range<u64>)> {
    let Ok((header, mut rest)) = region::RawTableHeader::ref_from_prefix(table) else { return Vec::new() };
    let mut found: Vec<(Guid, Range<u64>)> = Vec::new();
    for _ in 0..header.entry_count.get().min(region::ENTRIES_MAX) {
        let Ok((entry, tail)) = region::RawEntry::ref_from_prefix(rest) else { break };
        rest = tail;
        let (offset, length) = (entry.file_offset.get(), u64::from(entry.length.get()));
        let sane = is_aligned(offset, MIB) && offset >= HEADER_SECTION_BYTES && length > 0;
        let is_new = found.iter().all(|(guid, _)| *guid != entry.guid);
        if let Some(end) = offset.checked_add(length).filter(|_| sane && is_new) {
            found.push((entry.guid, offset..end));
        }
    }
    found
}

/// What a metadata region says; `None` without a table that names any item of the format.
fn read_metadata(view: &View, region: &Range<u64>) -> Result<Option<Parameters>> {
    let table = bytes(view, region.start, metadata::TABLE_BYTES)?;
    let Ok((header, mut rest)) = metadata::RawTableHeader::ref_from_prefix(&table) else { return Ok(None) };
    if header.signature != metadata::SIGNATURE {
        return Ok(None);
    }
    let mut found = Parameters::default();
    for _ in 0..header.entry_count.get().min(metadata::ENTRIES_MAX) {
        let Ok((entry, tail)) = metadata::RawEntry::ref_from_prefix(rest) else { break };
        rest = tail;
        let length = entry.length.get();
        if entry.flags.get() & FLAG_USER != 0 || length == 0 || length > metadata::ITEM_BYTES_MAX {
            continue;
        }
        if entry.item_id == metadata::PARENT_LOCATOR || length <= 16 {
            let item = bytes(view, region.start.saturating_add(u64::from(entry.offset.get())), length as usize)?;
            found.take(entry.item_id, &item);
        }
    }
    let any = found.block_size.is_some() || found.disk_size.is_some();
    Ok(any.then_some(found))
}

impl Parameters {
    /// Takes the value of an item, if it can be.
    fn take(&mut self, id: Guid, item: &[u8]) {
        let number = |item: &[u8]| item.try_into().ok().map(u32::from_le_bytes);
        match id {
            metadata::FILE_PARAMETERS => {
                let (Some(block_size), Some(flags)) = (item.get(..4).and_then(number), item.get(4..8).and_then(number))
                else {
                    return;
                };
                self.block_size = Some(block_size).filter(|size| is_block_size(*size));
                if self.block_size.is_some() {
                    self.has_parent = Some(flags & metadata::HAS_PARENT != 0);
                    self.fixed = flags & metadata::LEAVE_BLOCKS_ALLOCATED != 0;
                }
            }
            metadata::VIRTUAL_DISK_SIZE => {
                let size = item.try_into().ok().map(u64::from_le_bytes);
                self.disk_size = size.filter(|size| (1..=DISK_SIZE_MAX).contains(size) && size.is_multiple_of(512));
            }
            metadata::LOGICAL_SECTOR_SIZE => {
                self.logical_sector_size = number(item).filter(|size| is_sector_size(*size))
            }
            metadata::PHYSICAL_SECTOR_SIZE => {
                self.physical_sector_size = number(item).filter(|size| is_sector_size(*size))
            }
            metadata::VIRTUAL_DISK_ID => self.disk_id = item.try_into().ok().map(Guid::from_stored),
            metadata::PARENT_LOCATOR => {
                let place = Location::of("parent locator");
                self.locator = ParentLocator::decode(item, &place, &mut CollectAll::default()).ok();
            }
            _ => {}
        }
    }
}

pub(super) fn is_block_size(size: u32) -> bool {
    size.is_power_of_two() && (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&size)
}

pub(super) const fn is_sector_size(size: u32) -> bool {
    size == 512 || size == 4096
}

/// Looks for a metadata table at every MiB. Holes are passed over.
fn search_metadata(view: &View, progress: &dyn Progress) -> Result<Option<(Range<u64>, Parameters)>> {
    let size = view.size();
    let mut offset = HEADER_SECTION_BYTES;
    while offset + ITEMS_START <= size {
        advance(progress, offset, Some(size))?;
        let Some(data) = view.next_data(offset..size)? else { break };
        let next = data.start - data.start % MIB; // the MiB that the data lies in
        if next > offset {
            offset = next;
            continue;
        }
        if bytes(view, offset, metadata::SIGNATURE.len())? == metadata::SIGNATURE {
            let region = offset..(offset + MIB).min(size);
            if let Some(found) = read_metadata(view, &region)? {
                return Ok(Some((region, found)));
            }
        }
        offset += MIB;
    }
    Ok(None)
}

/// The items as writers place them, where the table that leads to them is gone. `None` unless they make sense.
fn items_without_table(view: &View, region: &Range<u64>) -> Result<Option<Parameters>> {
    let items = bytes(view, region.start.saturating_add(ITEMS_START), 40)?;
    // Windows, OpenVMM, vhdkit: sectors before the identity. QEMU, DiscUtils, mkimg: behind it.
    let orders: [[(Guid, Range<usize>); 5]; 2] = [
        [
            (metadata::FILE_PARAMETERS, 0..8),
            (metadata::VIRTUAL_DISK_SIZE, 8..16),
            (metadata::LOGICAL_SECTOR_SIZE, 16..20),
            (metadata::PHYSICAL_SECTOR_SIZE, 20..24),
            (metadata::VIRTUAL_DISK_ID, 24..40),
        ],
        [
            (metadata::FILE_PARAMETERS, 0..8),
            (metadata::VIRTUAL_DISK_SIZE, 8..16),
            (metadata::VIRTUAL_DISK_ID, 16..32),
            (metadata::LOGICAL_SECTOR_SIZE, 32..36),
            (metadata::PHYSICAL_SECTOR_SIZE, 36..40),
        ],
    ];
    for order in orders {
        let mut found = Parameters::default();
        for (id, range) in order {
            found.take(id, items.get(range).unwrap_or_default());
        }
        let sectors = found.logical_sector_size.is_some() && found.physical_sector_size.is_some();
        if found.block_size.is_some() && found.disk_size.is_some() && sectors {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Longest stretch of the file that a BAT may take from its beginning.
pub(super) fn bat_limit(view: &View, start: u64) -> u64 {
    view.size().saturating_sub(start).min(BAT_BYTES_MAX)
}
