//! Moving blocks, sector bitmaps and regions from the end of the file into holes below.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::super::edit::{place_metadata, rebuilt_metadata, set_region, top};
use super::super::{Progress, advance};
use super::unit_bytes;
use crate::error::Result;
use crate::format::bat::{BITMAP_PRESENT, BatEntry, PayloadState};
use crate::format::geometry::BatSlot;
use crate::format::region::BAT_GUID;
use crate::image::extents::LayerCursor;
use crate::image::structure::{Edit, Transaction};
use crate::image::{Image, Layer};
use crate::units::{BatIndex, BlockIndex, ChunkIndex};

/// Units looked at in one pass over the BAT: bounds the memory to a few MiB.
const PASS_UNITS: usize = 1 << 17;
/// Freed space is given back after so many bytes were moved.
const SETTLE_BYTES: u64 = 64 << 20;

/// A block or sector bitmap in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Unit {
    file_offset: u64,
    number: u64,
    is_bitmap: bool,
}

/// The units that lie highest in the file below an offset, the highest first.
fn highest(layer: &Layer, below: u64) -> Result<Vec<Unit>> {
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
            BatSlot::Payload(block) if block.0 < geometry.payload_blocks() => {
                let present =
                    matches!(entry.payload_state(), Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent));
                present.then(|| Unit { file_offset: entry.file_offset().0, number: block.0, is_bitmap: false })
            }
            BatSlot::Bitmap(chunk) if geometry.is_differencing() && entry.state_number() == BITMAP_PRESENT => {
                Some(Unit { file_offset: entry.file_offset().0, number: chunk.0, is_bitmap: true })
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
    let units = highest(layer, u64::MAX)?;
    for is_bitmap in [false, true] {
        // What lies lower has even less below it.
        let unit = units.iter().find(|unit| unit.is_bitmap == is_bitmap);
        if unit.is_some_and(|unit| fits(unit_bytes(is_bitmap, block_size), unit.file_offset)) {
            return Ok(true);
        }
    }
    let table = layer.region_table();
    let header = &layer.headers().current;
    let log = (u64::from(header.log_length), header.log_offset);
    let regions = [(table.bat.length, table.bat.file_offset), (table.metadata.length, table.metadata.file_offset), log];
    let end = image.used_end().unwrap_or(0);
    let at_end = |&(length, offset): &(u64, u64)| offset + length == end && fits(length, offset);
    Ok(regions.iter().any(at_end) || end < layer.view().physical_size())
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

/// Moves units down, the highest first, each to the lowest hole that has room for it, until none is below it.
pub(super) fn move_down(edit: &Edit<'_>, progress: &dyn Progress) -> Result<u64> {
    let block_size = edit.layer().geometry().block_size();
    let (mut moved, mut below, mut unsettled) = (0, u64::MAX, 0);
    // Whether there may still be a hole for a block, and for a bitmap.
    let mut open = [true, edit.layer().geometry().is_differencing()];
    while open.contains(&true) {
        let units = highest(edit.layer(), below)?;
        let Some(last) = units.last() else { break };
        below = last.file_offset;
        for unit in &units {
            let Some(kind) = open.get_mut(usize::from(unit.is_bitmap)).filter(|open| **open) else { continue };
            let bytes = unit_bytes(unit.is_bitmap, block_size);
            // The file system may have no more room than for one block: then each gives its old place back first.
            if !edit.with_room(|| move_unit(edit, *unit, bytes))? {
                *kind = false; // what lies lower has even less below it
                continue;
            }
            moved += 1;
            unsettled += bytes;
            if unsettled >= SETTLE_BYTES {
                edit.settle()?;
                unsettled = 0;
            }
            advance(progress, moved * block_size, None)?;
        }
    }
    edit.settle()?;
    Ok(moved)
}

/// Moves a unit to the lowest hole below it; false when there is none.
fn move_unit(edit: &Edit<'_>, unit: Unit, bytes: u64) -> Result<bool> {
    let Some(given) = edit.take_below(bytes, unit.file_offset) else { return Ok(false) };
    if unit.is_bitmap {
        edit.move_bitmap(ChunkIndex(unit.number), unit.file_offset, &given)?;
    } else {
        edit.move_block(BlockIndex(unit.number), unit.file_offset, &given)?;
    }
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
            let Some(given) = edit.take_below(region.length, region.file_offset) else { break };
            edit.copy(region.file_offset..region.file_offset + region.length, &given)?;
            set_region(&mut regions, BAT_GUID, given.range.start, region.length);
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
