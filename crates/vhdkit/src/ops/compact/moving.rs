//! Moving blocks, sector bitmaps and regions from the end of the file into holes below.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::super::edit::{place_metadata, rebuilt_metadata, set_region, top};
use super::super::resize::bat_bytes;
use super::super::{Progress, advance};
use crate::error::Result;
use crate::format::bat::{BITMAP_PRESENT, BatEntry, PayloadState};
use crate::format::geometry::{BITMAP_BLOCK_BYTES, BatSlot};
use crate::format::region::BAT_GUID;
use crate::image::data_map::DataMap;
use crate::image::extents::LayerCursor;
use crate::image::structure::{Edit, Transaction};
use crate::image::{Image, Layer};
use crate::units::{BatIndex, BlockIndex, ChunkIndex};

/// Units looked at in one pass over the BAT: bounds the memory to a few MiB.
const PASS_UNITS: usize = 1 << 17;
/// Freed space is given back after so many bytes were moved.
const SETTLE_BYTES: u64 = 64 << 20;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Payload,
    Bitmap,
}

impl Kind {
    /// Bytes of one, in whole MiB.
    const fn bytes(self, block_size: u64) -> u64 {
        match self {
            Self::Payload => block_size,
            Self::Bitmap => BITMAP_BLOCK_BYTES,
        }
    }
}

/// A block or sector bitmap in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Unit {
    file_offset: u64,
    number: u64,
}

/// The units of a kind that lie highest in the file below an offset, the highest first.
fn highest(layer: &Layer, kind: Kind, below: u64) -> Result<Vec<Unit>> {
    let geometry = *layer.geometry();
    let mut cursor = LayerCursor::new(layer);
    let mut heap: BinaryHeap<Reverse<Unit>> = BinaryHeap::new();
    let mut index = 0;
    while index < geometry.bat_entries() {
        let entry = cursor.entry(BatIndex(index))?;
        if entry.0 == 0 {
            index += cursor.count_equal(BatIndex(index), geometry.bat_entries() - index, entry)?.max(1);
            continue;
        }
        let unit = match geometry.slot(BatIndex(index)) {
            BatSlot::Payload(block) if kind == Kind::Payload && block.0 < geometry.payload_blocks() => {
                let present =
                    matches!(entry.payload_state(), Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent));
                present.then(|| Unit { file_offset: entry.file_offset().0, number: block.0 })
            }
            BatSlot::Bitmap(chunk)
                if kind == Kind::Bitmap && geometry.is_differencing() && entry.state_number() == BITMAP_PRESENT =>
            {
                Some(Unit { file_offset: entry.file_offset().0, number: chunk.0 })
            }
            _ => None,
        };
        if let Some(unit) = unit.filter(|unit| unit.file_offset < below) {
            heap.push(Reverse(unit));
            if heap.len() > PASS_UNITS {
                heap.pop();
            }
        }
        index += 1;
    }
    Ok(heap.into_sorted_vec().into_iter().map(|Reverse(unit)| unit).collect())
}

/// Whether anything would move: there is free space below something.
pub(super) fn can_move(image: &Image) -> Result<bool> {
    let layer = top(image)?;
    let block_size = layer.geometry().block_size();
    let fits = |bytes: u64, end: u64| image.has_hole_below(bytes, end);
    for kind in [Kind::Payload, Kind::Bitmap] {
        // What lies lower has even less below it.
        let unit = highest(layer, kind, u64::MAX)?.first().copied();
        if unit.is_some_and(|unit| fits(kind.bytes(block_size), unit.file_offset)) {
            return Ok(true);
        }
    }
    let table = layer.region_table();
    let header = &layer.headers().current;
    let log = (u64::from(header.log_length), header.log_offset);
    let (bat, metadata) = (table.bat, table.metadata);
    let regions = [
        (bat_length(layer), bat.file_offset, bat.file_offset + bat.length),
        (metadata.length, metadata.file_offset, metadata.file_offset + metadata.length),
        (log.0, log.1, log.1 + log.0),
    ];
    let end = image.used_end().unwrap_or(0);
    let at_end = |&(length, offset, its_end): &(u64, u64, u64)| its_end == end && fits(length, offset);
    Ok(regions.iter().any(at_end) || end < layer.view().physical_size())
}

/// Bytes of the BAT's region that are needed: a disk that was made smaller keeps a longer one.
fn bat_length(layer: &Layer) -> u64 {
    bat_bytes(layer.geometry()).min(layer.region_table().bat.length)
}

/// Frees sector bitmaps of chunks without a partially present block.
pub(super) fn drop_bitmaps(edit: &Edit<'_>) -> Result<u64> {
    let layer = edit.layer();
    let geometry = *layer.geometry();
    if !geometry.is_differencing() {
        return Ok(0);
    }
    let mut cursor = LayerCursor::new(layer);
    let mut dropped = 0;
    for chunk in 0..geometry.chunks() {
        let index = geometry.bitmap_index(ChunkIndex(chunk));
        let bitmap = cursor.entry(index)?;
        if bitmap.state_number() != BITMAP_PRESENT {
            continue;
        }
        let first = chunk * geometry.chunk_ratio(); // below the number of blocks
        let end = (first + geometry.chunk_ratio()).min(geometry.payload_blocks());
        let mut is_needed = false;
        let mut block = first;
        while block < end && !is_needed {
            let index = geometry.payload_index(BlockIndex(block));
            let entry = cursor.entry(index)?;
            is_needed = entry.payload_state() == Some(PayloadState::PartiallyPresent);
            block += if entry.0 == 0 { cursor.count_equal(index, end - block, entry)?.max(1) } else { 1 };
        }
        if !is_needed {
            let frees = layer.rules().owned_range(BatSlot::Bitmap(ChunkIndex(chunk)), bitmap).into_iter().collect();
            edit.apply(Transaction { entries: vec![(index, BatEntry(0))], frees, ..Transaction::default() })?;
            dropped += 1;
        }
    }
    Ok(dropped)
}

/// Moves what lies high into holes below. Blocks first, so that bitmaps take what is too small for blocks; and once more,
/// where bitmaps were in the way.
pub(super) fn move_down(edit: &Edit<'_>, progress: &dyn Progress) -> Result<u64> {
    let mut moved = move_kind(edit, Kind::Payload, progress)?;
    if edit.layer().geometry().is_differencing() {
        moved += move_kind(edit, Kind::Bitmap, progress)?;
        moved += move_kind(edit, Kind::Payload, progress)?;
    }
    Ok(moved)
}

/// Moves units of a kind, the highest first, each to the lowest hole that has room for it, until none is below it.
fn move_kind(edit: &Edit<'_>, kind: Kind, progress: &dyn Progress) -> Result<u64> {
    let bytes = kind.bytes(edit.layer().geometry().block_size());
    let (mut moved, mut below, mut unsettled) = (0, u64::MAX, 0);
    let data = DataMap::default();
    'passes: loop {
        let units = highest(edit.layer(), kind, below)?;
        let Some(last) = units.last() else { break };
        below = last.file_offset;
        for unit in &units {
            // The file system may have no more room than for one block: then each gives its old place back first.
            if !edit.with_room(|| move_unit(edit, kind, *unit, bytes, &data))? {
                break 'passes; // what lies lower has even less below it
            }
            moved += 1;
            unsettled += bytes;
            if unsettled >= SETTLE_BYTES {
                edit.settle()?;
                unsettled = 0;
            }
            advance(progress, moved * bytes, None)?;
        }
    }
    edit.settle()?;
    Ok(moved)
}

/// Moves a unit to the lowest hole below it; false when there is none.
fn move_unit(edit: &Edit<'_>, kind: Kind, unit: Unit, bytes: u64, data: &DataMap) -> Result<bool> {
    let Some(given) = edit.take_below(bytes, unit.file_offset) else { return Ok(false) };
    match kind {
        Kind::Payload => edit.move_block(BlockIndex(unit.number), unit.file_offset, &given, data)?,
        Kind::Bitmap => edit.move_bitmap(ChunkIndex(unit.number), unit.file_offset, &given, data)?,
    };
    Ok(true)
}

/// Moves the BAT and the metadata region down when they are what keeps the file long. Nothing may be done with the image
/// afterwards but closing it.
pub(super) fn move_regions(edit: &Edit<'_>) -> Result<Vec<String>> {
    let mut moved = Vec::new();
    let table = edit.layer().region_table();
    let mut regions = table.regions.clone();
    let mut transaction = Transaction::default();
    let (bat, metadata) = (table.bat, table.metadata);
    let mut order = [bat, metadata];
    order.sort_by_key(|region| Reverse(region.file_offset));
    let mut end = edit.used_end();
    for region in order {
        if region.file_offset + region.length != end {
            break;
        }
        if region.guid == BAT_GUID {
            let length = bat_length(edit.layer());
            let Some(given) = edit.take_below(length, region.file_offset) else { break };
            edit.copy(region.file_offset..region.file_offset + length, &given)?;
            set_region(&mut regions, BAT_GUID, given.range.start, length);
            transaction.frees.push(region.file_offset..region.file_offset + region.length);
            moved.push("BAT".to_owned());
        } else {
            let bytes = rebuilt_metadata(edit)?;
            if !place_metadata(edit, &mut regions, &bytes, Some(region.file_offset), &mut transaction)? {
                break;
            }
            moved.push("metadata".to_owned());
        }
        end = edit.used_end_below(region.file_offset);
    }
    if !moved.is_empty() {
        edit.add_region_tables(&mut transaction, &regions)?;
        edit.apply(transaction)?;
        edit.commit()?;
    }
    Ok(moved)
}
