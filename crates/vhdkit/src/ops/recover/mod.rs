//! Makes a new image of what can be found in a file that cannot be opened any more.
//!
//! ```text
//! file --> headers, log, region tables, metadata --> sizes --> BAT --> blocks --> disk --> new image (as `convert`)
//!          taken where they are whole,               given, read,      placed by entries, by what
//!          searched for where they are not           or inferred       says where it is, by order
//! ```
//!
//! The file is only read. Every part says how sure it is. What the entries of a whole BAT say is certain; where entries are
//! gone, blocks are placed by structures of the file systems inside that know their own place, by their neighbours, and by
//! the order of the file, since writers put blocks one behind the other as they are first written.

mod disk;
mod inference;
mod placing;
mod report;
mod signatures;
mod structures;
mod table;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::Progress;
use super::check::{CheckOptions, check};
use super::convert::{ConvertOptions, Destination, Source, convert};
use super::create::CreateOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::Code;
use crate::format::geometry::Geometry;
use crate::format::guid::Guid;
use crate::format::{DISK_SIZE_MAX, HEADER_SECTION_BYTES};
use crate::image::BlockDevice;
use crate::storage::Storage;
use crate::units::{MIB, round_up};

use disk::RecoveredDisk;
use placing::Placing;
use report::Notes;
use structures::{Structures, is_block_size, is_sector_size};
use table::Table;

pub use report::{Certainty, Part, RecoverReport};

/// Blocks that are named in a report.
const LOST_NAMED_MAX: usize = 100;
/// Longest file that is recovered: places in it are kept as numbers of MiB with 32 bits, and nobody has a longer one.
const FILE_BYTES_MAX: u64 = 1 << 50;

/// How to recover, and what is known that the file does not say any more.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecoverOptions<'a> {
    /// Bytes of a block: a power of two from 1 MiB to 256 MiB.
    pub block_size: Option<u32>,
    /// Bytes of the disk.
    pub disk_size: Option<u64>,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector_size: Option<u32>,
    /// The parent of a differencing disk. Without it what only the parent has reads as zeros.
    pub parent: Option<&'a dyn BlockDevice>,
    /// The data write GUID of that parent, by which it is known whether it is the one that the image was made from.
    pub parent_guid: Option<Guid>,
    /// Only find out what there is: the target stays as it is, and the report's file size is 0.
    pub dry_run: bool,
}

/// What was found of an image, before anything is written.
#[derive(Debug)]
pub struct Found {
    notes: Notes,
    structures: Structures,
    geometry: Geometry,
    physical_sector_size: u32,
    table: Table,
    placing: Placing,
    /// Blocks that are partially present and have no bitmap for certain.
    without_bitmap: u64,
}

/// Looks for everything that is left in a file. Nothing is written.
///
/// # Errors
/// [`NotVhdx`](ErrorKind::NotVhdx) when nothing in it is of a VHDX, [`Truncated`](ErrorKind::Truncated) when nothing of the
/// disk is left, [`InvalidArgument`](ErrorKind::InvalidArgument) for options that are not possible,
/// [`Cancelled`](ErrorKind::Cancelled), and when reading fails.
pub fn find(
    storage: &Arc<dyn Storage>,
    name: Option<&Path>,
    options: &RecoverOptions<'_>,
    progress: &dyn Progress,
) -> Result<Found> {
    let mut notes = Notes::default();
    let size = storage.len().map_err(|error| Error::io("cannot tell the length of the file", error))?;
    if size > FILE_BYTES_MAX {
        return Err(Error::new(ErrorKind::Limit, "files of more than 1 PiB are not recovered"));
    }
    if size < HEADER_SECTION_BYTES {
        return Err(nothing_left(storage, name, false, progress)?);
    }
    let mut structures = structures::find(storage, &mut notes, progress)?;
    let searched = if structures.bat.is_none() { table::search(&structures, progress)? } else { None };
    let is_vhdx = notes.parts.iter().any(|part| part.name == "headers" && part.certainty == Certainty::Certain);
    let has_table = structures.bat.is_some() || searched.is_some();
    // Who knows how large blocks are or the disk was knows that this was a VHDX.
    let is_said = options.block_size.is_some() || options.disk_size.is_some();
    let any = has_table || structures.metadata.is_some() || is_vhdx || is_said;
    let known_block = structures.parameters.block_size.or(options.block_size).is_some();
    let known_size = structures.parameters.disk_size.or(options.disk_size).is_some();
    let contents = if has_table || known_block && known_size {
        inference::ByContents::default()
    } else {
        inference::by_contents(&structures.view, &taken(&structures), progress)?
    };
    if !any {
        return Err(nothing_left(storage, name, contents.any, progress)?);
    }
    let bat_start = structures.bat.as_ref().map(|bat| bat.start).or(searched.as_ref().map(|found| found.start));
    let inferred = match (bat_start, &searched) {
        (_, Some(found)) => found.inferred,
        (Some(start), None) => table::infer(&structures.view, start)?,
        (None, None) => table::Inferred { block_size: contents.block_size, ..table::Inferred::default() },
    };
    let used = match (&structures.bat, &searched) {
        (Some(bat), _) => table::used_entries(&structures.view, bat)?,
        (None, Some(found)) => found.entries,
        (None, None) => 0,
    };
    let (geometry, physical_sector_size) =
        sizes(&structures, options, (inferred, contents), (bat_start, used), &mut notes)?;
    if let (None, Some(found)) = (&structures.bat, &searched) {
        let length = round_up(geometry.bat_entries() * 8, MIB).unwrap_or(MIB); // at most 513 MiB
        structures.bat = Some(found.start..found.start.saturating_add(length));
        notes.part("BAT", Certainty::Guessed, format!("found by its shape at {:#x}", found.start));
    }
    let taken = taken(&structures);
    let is_taken = |range: &Range<u64>| taken.iter().any(|other| other.start < range.end && range.start < other.end);
    let mut table = match &structures.bat {
        Some(bat) => table::read(&structures.view, bat.start, &geometry, &is_taken)?,
        None => Table::default(),
    };
    if searched.is_some() {
        // What a table says that was guessed is no surer than that.
        table.placed.iter_mut().for_each(|placed| placed.guessed = true);
    }
    let needed = geometry.bat_entries().saturating_mul(crate::format::geometry::BAT_ENTRY_BYTES);
    if structures.bat_start.is_some_and(|start| start.saturating_add(needed) > size) {
        notes.part("BAT", Certainty::Lost, "the file ends before it does: what its entries were for cannot be known");
    }
    describe_parent(&mut notes, &structures, options, geometry.is_differencing());
    let has_table = !table.placed.is_empty() || used > 0;
    let placing = placing::place(&structures.view, &geometry, &table, &taken, has_table, progress)?;
    describe_table(&mut notes, &structures, &table, &placing, has_table, searched.is_some());
    let is_without = |placed: &&table::Placed| {
        let chunk = geometry.chunk_of(crate::units::BlockIndex(u64::from(placed.block)));
        let is_sure = table.bitmaps.contains_key(&chunk.0) && !table.doubtful_bitmaps.contains(&chunk.0);
        placed.partial && !placed.guessed && !is_sure
    };
    let without_bitmap = placing.placed.iter().filter(is_without).count() as u64;
    Ok(Found { notes, structures, geometry, physical_sector_size, table, placing, without_bitmap })
}

/// Makes a new image of what is left in a file. `target` is empty storage, or a block device, all of which is overwritten;
/// nothing is synced. The new image is dynamic, or fixed when the old one was and every block was found, and has no parent.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::image::{BlockDevice, OpenOptions};
/// use vhdkit::ops::create::{CreateOptions, create};
/// use vhdkit::ops::recover::{RecoverOptions, recover};
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// # fn main() -> vhdkit::Result<()> {
/// let broken: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// create(&broken, &CreateOptions::new(64 << 20), &())?;
/// let image = OpenOptions::new().write(true).open(Arc::clone(&broken), None)?;
/// image.write_at(b"precious", 40 << 20)?;
/// image.close()?;
/// broken.write_at(&[0; 1 << 20], 0).unwrap(); // headers and region tables are gone
///
/// let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// let report = recover(&broken, None, &target, &RecoverOptions::default(), &())?;
/// let mut bytes = [0; 8];
/// OpenOptions::new().open(target, None)?.read_at(&mut bytes, 40 << 20)?;
/// assert_eq!(&bytes, b"precious");
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`find`] and [`convert`].
pub fn recover(
    storage: &Arc<dyn Storage>,
    name: Option<&Path>,
    target: &Arc<dyn Storage>,
    options: &RecoverOptions<'_>,
    progress: &dyn Progress,
) -> Result<RecoverReport> {
    let found = find(storage, name, options, progress)?;
    write(found, storage, target, options, progress)
}

fn write(
    found: Found,
    storage: &Arc<dyn Storage>,
    target: &Arc<dyn Storage>,
    options: &RecoverOptions<'_>,
    progress: &dyn Progress,
) -> Result<RecoverReport> {
    let Found { mut notes, structures, geometry, physical_sector_size, table, placing, without_bitmap } = found;
    let parameters = &structures.parameters;
    let disk_id = parameters.disk_id.unwrap_or_else(Guid::random);
    if parameters.disk_id.is_none() {
        notes.part("disk identity", Certainty::Lost, "a new one was drawn");
    }
    let without_parent = geometry.is_differencing() && options.parent.is_none();
    let (lost, named): (u64, Vec<u64>) =
        (placing.lost.len() as u64 + table.broken_more, placing.lost.iter().take(LOST_NAMED_MAX).copied().collect());
    let guessed = placing.placed.iter().filter(|placed| placed.guessed).count() as u64 + without_bitmap;
    let all = placing.placed.len() as u64;
    let fixed = parameters.fixed && !geometry.is_differencing() && all == geometry.payload_blocks();
    let mut bitmaps = table.bitmaps;
    bitmaps.extend(placing.bitmaps);
    let disk = RecoveredDisk {
        storage,
        view: &structures.view,
        geometry,
        physical_sector_size,
        disk_id,
        placed: placing.placed,
        bitmaps,
        zero: table.zero,
        parent: options.parent,
    };
    let layout = CreateOptions {
        disk_type: if fixed { super::create::NewDiskType::Fixed } else { super::create::NewDiskType::Dynamic },
        block_size: u32::try_from(geometry.block_size()).ok(),
        disk_id: Some(disk_id),
        ..CreateOptions::default()
    };
    let destination = Destination::Vhdx { storage: target, layout: &layout, spill: None };
    let file_size = if options.dry_run {
        0
    } else {
        convert(Source::Disk(&disk), destination, &ConvertOptions::default(), progress)?.file_size
    };
    Ok(RecoverReport {
        parts: notes.parts,
        disk_size: geometry.disk_size(),
        block_size: geometry.block_size(),
        logical_sector_size: u32::try_from(geometry.logical_sector_size()).unwrap_or_default(),
        blocks_certain: all.saturating_sub(guessed),
        blocks_guessed: guessed,
        blocks_lost: lost,
        bytes_unplaced: placing.bytes_unplaced,
        unplaced: placing.unplaced,
        lost: named,
        without_parent,
        recognised: placing.recognised.into_iter().collect(),
        file_size,
    })
}

/// The error for a file in which nothing is found: as `check` says it, where it is no VHDX.
fn nothing_left(
    storage: &Arc<dyn Storage>,
    name: Option<&Path>,
    has_disk: bool,
    progress: &dyn Progress,
) -> Result<Error> {
    let report = check(storage, name, &CheckOptions::default(), progress)?;
    let foreign = report.findings.iter().find(|finding| finding.code() == Code::FileSignature);
    Ok(match foreign {
        Some(finding) if has_disk => Error::from_finding(finding).with_hint(
            "there are partitions or file systems in it: if you know that it was a VHDX, say how large its blocks are with \
             --block-size (Windows makes them 32M unless told otherwise, WSL 1M, QEMU 8M to 64M by the size of the disk)",
        ),
        Some(finding) => Error::from_finding(finding),
        None => Error::new(ErrorKind::Truncated, "nothing of the disk is left in this file")
            .with_hint("get another copy of it"),
    })
}

/// The ranges that structures take.
fn taken(found: &Structures) -> Vec<Range<u64>> {
    let mut taken: Vec<Range<u64>> = std::iter::once(0..HEADER_SECTION_BYTES).collect();
    taken.extend([&found.log, &found.metadata, &found.bat].into_iter().flatten().cloned());
    taken.extend(found.regions.iter().cloned());
    taken
}

/// Sizes as they are given, as the metadata says, or as they can be inferred.
fn sizes(
    found: &Structures,
    options: &RecoverOptions<'_>,
    (inferred, contents): (table::Inferred, inference::ByContents),
    (bat_start, used_entries): (Option<u64>, u64),
    notes: &mut Notes,
) -> Result<(Geometry, u32)> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidArgument, what);
    let parameters = &found.parameters;
    if let Some(size) = options.block_size.filter(|size| !is_block_size(*size)) {
        return Err(invalid(format!("a block size of {size} bytes is not possible")));
    }
    if let Some(size) = options.logical_sector_size.filter(|size| !is_sector_size(*size)) {
        return Err(invalid(format!("a sector size of {size} bytes is not possible")));
    }
    let logical = options.logical_sector_size.or(parameters.logical_sector_size).unwrap_or(512);
    if let Some(size) = options.disk_size.filter(|size| *size == 0 || !size.is_multiple_of(u64::from(logical))) {
        return Err(invalid(format!("a disk of {size} bytes does not end with a whole sector of {logical} bytes")));
    }
    contradictions(parameters, options, notes);
    if options.logical_sector_size.or(parameters.logical_sector_size).is_none() {
        notes.part("sector size", Certainty::Guessed, "512 bytes, as nearly every disk has");
    }
    let physical = parameters.physical_sector_size.unwrap_or(4096).max(logical);
    // Blocks that lie closer together than they are long are none: then the item is what is damaged.
    let too_long = |size: &u32| {
        let shown = inferred.block_size.filter(|_| inferred.is_common && !inferred.has_parent);
        parameters.has_parent != Some(true) && shown.is_some_and(|shown| shown < *size)
    };
    let in_metadata = parameters.block_size.filter(|size| !too_long(size));
    let block_size = match (options.block_size.or(in_metadata), inferred.block_size) {
        (Some(known), _) => known,
        (None, Some(inferred)) => {
            notes.part("block size", Certainty::Guessed, format!("{inferred} bytes: blocks lie that far apart"));
            inferred
        }
        (None, None) => {
            notes.part(
                "block size",
                Certainty::Guessed,
                "1 MiB: with no table its blocks are taken in the order of the file",
            );
            1 << 20
        }
    };
    let has_parent = parameters.has_parent.unwrap_or(options.parent.is_some() || inferred.has_parent);
    let entries_size = entries_to_bytes(used_entries, block_size, logical);
    // A disk whose table could not lie in the region of the table is none: then the item is what is damaged.
    let region = found.bat.as_ref().map_or(u64::MAX, |bat| bat.end - bat.start);
    let fits = |size: &u64| {
        let geometry = Geometry::new(*size, block_size, logical, has_parent);
        geometry.is_some_and(|geometry| geometry.bat_entries() * crate::format::geometry::BAT_ENTRY_BYTES <= region)
    };
    let in_metadata = parameters.disk_size.filter(fits);
    if let (Some(size), None) = (parameters.disk_size, in_metadata) {
        notes.doubt("metadata", &format!("a disk of {size} bytes has more blocks than the table has room for"));
    }
    let known = options.disk_size.or(in_metadata);
    let disk_size = match known {
        Some(size) => size,
        None => inferred_disk_size(found, options, contents, (block_size, entries_size, bat_start), notes)?,
    };
    let disk_size = round_up(disk_size, u64::from(logical)).unwrap_or(disk_size).min(DISK_SIZE_MAX);
    let geometry = Geometry::new(disk_size, block_size, logical, has_parent);
    let geometry = geometry.ok_or_else(|| {
        let what = format!("a disk of {disk_size} bytes in blocks of {block_size} is not possible");
        if disk_size == 0 {
            return Error::new(ErrorKind::Truncated, "nothing of the disk is left in this file")
                .with_hint("give its size with --size if you know it");
        }
        invalid(what)
    })?;
    if let (Some(bat), None) = (&found.bat, options.disk_size)
        && let Some(end) = table::behind(&found.view, bat, &geometry)?
    {
        let what = format!(
            "{disk_size} bytes, and the BAT has blocks with data up to {end}: if the disk was larger, say how large with --size"
        );
        notes.part("disk size", Certainty::Guessed, what);
    }
    Ok((geometry, physical))
}

/// Says where the caller knows better than the metadata.
fn contradictions(parameters: &structures::Parameters, options: &RecoverOptions<'_>, notes: &mut Notes) {
    let pairs = [
        ("block size", options.block_size.map(u64::from), parameters.block_size.map(u64::from)),
        ("disk size", options.disk_size, parameters.disk_size),
        ("sector size", options.logical_sector_size.map(u64::from), parameters.logical_sector_size.map(u64::from)),
    ];
    for (name, given, read) in pairs {
        if let (Some(given), Some(read)) = (given, read)
            && given != read
        {
            notes.part(name, Certainty::Guessed, format!("{given} bytes, as it was given; the metadata says {read}"));
        }
    }
}

/// The disk that so many entries make.
fn entries_to_bytes(entries: u64, block_size: u32, logical: u32) -> u64 {
    let Some(any) = Geometry::new(DISK_SIZE_MAX, block_size, logical, false) else { return 0 };
    let bitmaps = entries / (any.chunk_ratio() + 1);
    (entries - bitmaps).saturating_mul(u64::from(block_size))
}

/// The size of the disk by what is on it, by its parent, by its entries, or by the file.
fn inferred_disk_size(
    found: &Structures,
    options: &RecoverOptions<'_>,
    contents: inference::ByContents,
    (block_size, entries_size, bat_start): (u32, u64, Option<u64>),
    notes: &mut Notes,
) -> Result<u64> {
    let by_beginning = if contents.disk_size.is_none() { size_by_contents(found, bat_start)? } else { None };
    let by_contents = contents.disk_size.or(by_beginning).filter(|(size, ..)| *size <= DISK_SIZE_MAX);
    if let Some((size, certainty, what)) = by_contents {
        // The last block may reach over the end of the disk.
        if entries_size < size.saturating_add(u64::from(block_size)) {
            notes.part("disk size", certainty, format!("{size} bytes, by the {what} on it"));
            return Ok(size);
        }
        let text = format!("{entries_size} bytes: up to the last block with an entry; the {what} on it says {size}");
        notes.part("disk size", Certainty::Guessed, text);
        return Ok(entries_size);
    }
    if let Some(parent) = options.parent {
        notes.part("disk size", Certainty::Guessed, "the parent's");
        return Ok(parent.size().max(entries_size));
    }
    let is_block_size_known = found.parameters.block_size.or(options.block_size).is_some();
    if entries_size == 0 && !is_block_size_known && bat_start.is_none() {
        let error = Error::new(ErrorKind::Truncated, "nothing in this file tells where on a disk its data belongs");
        return Err(error.with_hint("get another copy of it; if you know the size of the disk, give it with --size"));
    }
    if entries_size > 0 {
        notes.part(
            "disk size",
            Certainty::Guessed,
            format!("{entries_size} bytes: up to the last block with an entry"),
        );
        return Ok(entries_size);
    }
    let taken: u64 =
        taken(found).iter().map(|range| range.end.min(found.view.size()).saturating_sub(range.start)).sum();
    let rest = found.view.size().saturating_sub(taken);
    notes.part(
        "disk size",
        Certainty::Guessed,
        format!("{rest} bytes: all of the file that is not known to be something else"),
    );
    Ok(rest)
}

/// What the beginning of the disk says about its size.
fn size_by_contents(found: &Structures, bat_start: Option<u64>) -> Result<Option<(u64, Certainty, &'static str)>> {
    let view = &found.view;
    let start = match bat_start {
        Some(bat) => {
            let raw: [u8; 8] = structures::bytes(view, bat, 8)?.try_into().unwrap_or_default();
            let entry = crate::format::bat::BatEntry(u64::from_le_bytes(raw));
            Some(entry.file_offset().0).filter(|start| *start != 0 && entry.state_number() >= 6)
        }
        None => {
            let behind = taken(found).iter().map(|range| range.end).max().unwrap_or(HEADER_SECTION_BYTES);
            view.next_data(behind..view.size().max(behind))?.map(|data| data.start - data.start % MIB)
        }
    };
    let Some(start) = start.filter(|start| *start < view.size()) else { return Ok(None) };
    let head = structures::bytes(view, start, 64 << 10)?;
    let signs = signatures::find(head.get(..signatures::HEAD_BYTES).unwrap_or_default(), &[], MIB);
    let gpt = signs.iter().find_map(|sign| match sign.says {
        signatures::Says::OnDisk { disk_size, what, .. } => Some((disk_size, Certainty::Certain, what)),
        _ => None,
    });
    let whole = signs.iter().find_map(|sign| match sign.says {
        signatures::Says::InFileSystem { size, what, offset: 0..=1024, .. } => Some((size, Certainty::Guessed, what)),
        signatures::Says::PartitionStart { size, what, guest: 0 } => Some((size, Certainty::Guessed, what)),
        _ => None,
    });
    let end = signatures::partitions(&head).into_iter().map(|(_, end)| end).max();
    let partitioned = end.and_then(|end| round_up(end, MIB)).map(|end| (end, Certainty::Guessed, "partition table"));
    Ok(gpt.or(whole).or(partitioned))
}

/// Says what is known about a parent, and whether the one that was given is the right one.
fn describe_parent(notes: &mut Notes, found: &Structures, options: &RecoverOptions<'_>, is_differencing: bool) {
    let parameters = &found.parameters;
    if parameters.has_parent.is_none() {
        let what = if is_differencing { "that there is one" } else { "that there is none" };
        notes.part("parent", Certainty::Guessed, format!("{what} is not known from the metadata"));
    }
    if !is_differencing || options.parent.is_none() {
        return;
    }
    match (&parameters.locator, options.parent_guid) {
        (Some(locator), Some(guid)) if locator.accepts(guid) => {
            notes.part("parent", Certainty::Certain, "the one that the image was made from");
        }
        (Some(_), Some(guid)) => {
            let what =
                format!("the one that was given has the data write GUID {guid}, and is not what the image names");
            notes.part("parent", Certainty::Guessed, what);
        }
        _ => notes.part("parent", Certainty::Guessed, "whether it is the right one cannot be known"),
    }
}

/// Says what became of the BAT.
fn describe_table(
    notes: &mut Notes,
    found: &Structures,
    table: &Table,
    placing: &Placing,
    has_table: bool,
    searched: bool,
) {
    if notes.parts.iter().any(|part| part.name == "BAT" && part.certainty == Certainty::Lost) {
        return; // said already
    }
    if found.bat.is_none() || !has_table {
        if placing.placed.is_empty() && placing.bytes_unplaced == 0 {
            notes.part("BAT", Certainty::Certain, "no block has data");
        } else {
            notes.part("BAT", Certainty::Lost, "blocks are placed in the order of the file");
        }
        return;
    }
    if searched {
        return; // said already
    }
    let broken = table.broken.len() as u64 + table.broken_more;
    let added = placing.placed.len().saturating_sub(table.placed.len());
    if broken == 0 && added == 0 {
        notes.part("BAT", Certainty::Certain, format!("{} blocks with data", table.placed.len()));
    } else {
        let what = format!("{broken} damaged entries, {added} blocks placed without theirs");
        notes.part("BAT", Certainty::Guessed, what);
    }
}
