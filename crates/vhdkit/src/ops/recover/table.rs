//! The BAT: read from where it is, or found by its shape.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::structures::{Structures, bat_limit};
use crate::error::Result;
use crate::format::bat::{BITMAP_PRESENT, BatEntry, PayloadState};
use crate::format::geometry::{BAT_ENTRY_BYTES, BITMAP_BLOCK_BYTES, BatSlot, Geometry};
use crate::format::{DISK_SIZE_MAX, HEADER_SECTION_BYTES};
use crate::image::view::View;
use crate::ops::{Progress, advance};
use crate::units::{BatIndex, MIB};

/// Bytes read at once.
const WINDOW_BYTES: u64 = 64 << 10;
/// Entries of a sector: what a medium loses at once.
const SECTOR_ENTRIES: u64 = 64;
/// Damaged entries that are kept; with more of them nobody places blocks one by one.
const BROKEN_MAX: usize = 1 << 20;
/// Blocks from which on distances between them weigh more than what the metadata says.
const COMMON_MIN: usize = 8;
/// Entries with data that a stretch must have to be taken for a BAT by its shape alone.
const PRESENT_MIN: u64 = 2;

/// A block that an entry places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// Its number.
    pub(super) block: u32,
    /// Where it is in the file, in MiB.
    pub(super) mib: u32,
    pub(super) partial: bool,
    /// It was not placed by an entry in which nothing is wrong.
    pub(super) guessed: bool,
}

/// Everything that entries say.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// In the order of the disk.
    pub(super) placed: Vec<Placed>,
    /// Where the sector bitmap of a chunk is, in MiB.
    pub(super) bitmaps: BTreeMap<u64, u32>,
    /// Chunks whose bitmap was not found by an entry in which nothing is wrong.
    pub(super) doubtful_bitmaps: BTreeSet<u64>,
    /// Blocks that read as zeros whatever a parent has, joined.
    pub(super) zero: Vec<Range<u64>>,
    /// Blocks whose entries cannot be, each with the place that its entry names, in MiB, right or wrong.
    pub(super) broken: Vec<(u64, u64)>,
    /// More of them, which are not kept.
    pub(super) broken_more: u64,
    /// Space that blocks without data keep, in MiB: nobody else's.
    pub(super) kept: Vec<u64>,
    /// Blocks without data whose entries lie in a sector of the BAT that is zero as a whole, joined.
    pub(super) blank: Vec<Range<u64>>,
}

/// Calls `visit` with every entry that is not zero, in order; what the file has as a hole is passed over.
fn walk(view: &View, start: u64, entries: u64, visit: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let end = start.saturating_add(entries.saturating_mul(BAT_ENTRY_BYTES));
    let mut position = start;
    while position < end {
        let Some(data) = view.next_data(position..end)? else { break };
        let from = data.start - (data.start - start) % BAT_ENTRY_BYTES;
        let until = end.min(from + WINDOW_BYTES);
        let raw = view.read_vec(from..until)?;
        for (number, raw) in (0_u64..).zip(raw.as_chunks::<8>().0) {
            let raw = u64::from_le_bytes(*raw);
            if raw != 0 {
                visit((from - start) / BAT_ENTRY_BYTES + number, raw);
            }
        }
        position = until;
    }
    Ok(())
}

/// Reads every entry of a disk of known geometry.
pub(super) fn read(view: &View, start: u64, geometry: &Geometry, taken: &dyn Fn(&Range<u64>) -> bool) -> Result<Table> {
    let mut table = Table::default();
    let size = view.size();
    let mut last_used = None;
    let mut blank = |from: u64, until: u64| {
        // Only whole sectors of zeros count.
        let (first, end) = (from.next_multiple_of(SECTOR_ENTRIES), until / SECTOR_ENTRIES * SECTOR_ENTRIES);
        push_blocks(&mut table.blank, geometry, first..end.max(first));
    };
    walk(view, start, geometry.bat_entries(), &mut |index, _| {
        blank(last_used.map_or(0, |last: u64| last + 1), index);
        last_used = Some(index);
    })?;
    blank(last_used.map_or(0, |last: u64| last + 1), geometry.bat_entries());
    walk(view, start, geometry.bat_entries(), &mut |index, raw| {
        let entry = BatEntry(raw);
        match geometry.slot(BatIndex(index)) {
            BatSlot::Bitmap(chunk) => {
                let range = entry.file_offset().0..entry.file_offset().0.saturating_add(BITMAP_BLOCK_BYTES);
                let usable = entry.state_number() == BITMAP_PRESENT && range.end <= size && range.start > 0;
                if let Ok(mib) = u32::try_from(range.start / MIB)
                    && usable
                    && geometry.is_differencing()
                    && !taken(&range)
                {
                    table.bitmaps.insert(chunk.0, mib);
                    if entry.reserved() != 0 {
                        table.doubtful_bitmaps.insert(chunk.0);
                    }
                }
            }
            BatSlot::Payload(block) if block.0 < geometry.payload_blocks() => {
                table.payload(geometry, block.0, entry, size, taken);
            }
            BatSlot::Payload(_) => {}
        }
    })?;
    Ok(table)
}

/// Adds the blocks of a range of entries to a list of ranges. Entries of sector bitmaps stand between those of blocks, which
/// are numbered without gaps.
fn push_blocks(list: &mut Vec<Range<u64>>, geometry: &Geometry, entries: Range<u64>) {
    let before = |index: u64| (index - index / (geometry.chunk_ratio() + 1)).min(geometry.payload_blocks());
    let blocks = before(entries.start)..before(entries.end);
    if blocks.start >= blocks.end {
        return;
    }
    match list.last_mut() {
        Some(last) if last.end == blocks.start => last.end = blocks.end,
        _ => list.push(blocks),
    }
}

fn push(list: &mut Vec<Range<u64>>, block: u64) {
    match list.last_mut() {
        Some(last) if last.end == block => last.end += 1,
        _ => list.push(block..block + 1),
    }
}

impl Table {
    fn break_block(&mut self, block: u64, mib: u64) {
        if self.broken.len() < BROKEN_MAX { self.broken.push((block, mib)) } else { self.broken_more += 1 }
    }

    fn payload(
        &mut self,
        geometry: &Geometry,
        block: u64,
        entry: BatEntry,
        size: u64,
        taken: &dyn Fn(&Range<u64>) -> bool,
    ) {
        let offset = entry.file_offset().0;
        let state = entry.payload_state().filter(|_| entry.reserved() == 0 && entry.state_number() != 5);
        let length = geometry.block_range(crate::units::BlockIndex(block));
        let range = offset..offset.saturating_add(length.end - length.start);
        match state {
            // Without data, and with a place: the state may be what is damaged.
            Some(PayloadState::NotPresent | PayloadState::Zero) if offset != 0 => self.break_block(block, offset / MIB),
            Some(PayloadState::NotPresent) => {}
            Some(PayloadState::Zero | PayloadState::Unmapped | PayloadState::Undefined) => {
                push(&mut self.zero, block);
                if offset != 0 {
                    self.kept.push(offset / MIB);
                }
            }
            Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) => {
                let partial = state == Some(PayloadState::PartiallyPresent);
                let lies_well = offset >= HEADER_SECTION_BYTES && offset < size && !taken(&range);
                match (u32::try_from(block), u32::try_from(offset / MIB)) {
                    (Ok(block), Ok(mib)) if lies_well => {
                        let strange = partial && !geometry.is_differencing();
                        let is_cut = range.end > size;
                        self.placed.push(Placed {
                            block,
                            mib,
                            partial: partial && !strange,
                            guessed: strange || is_cut,
                        });
                    }
                    _ => self.break_block(block, offset / MIB),
                }
            }
            None => self.break_block(block, offset / MIB),
        }
    }
}

/// What a stretch of the file looks like as a BAT.
#[derive(Clone, Debug, Default)]
struct Shape {
    /// A block is partially present, which only differencing disks have.
    has_partial: bool,
    /// The last entry that is used.
    last: u64,
    /// Entries that are not zero.
    used: u64,
    /// Where blocks are, in MiB.
    mibs: Vec<u64>,
}

/// Most entries that are looked at to judge a shape.
const SHAPE_ENTRIES_MAX: u64 = 1 << 20;

fn shape(view: &View, start: u64) -> Result<Shape> {
    let size = view.size();
    let mut shape = Shape::default();
    let limit = bat_limit(view, start).min(SHAPE_ENTRIES_MAX * BAT_ENTRY_BYTES);
    let mut done = 0;
    // A table is whole MiB long: one in which something cannot be an entry is not part of it.
    while done < limit {
        let (base, entries) = (done / BAT_ENTRY_BYTES, (limit - done).min(MIB) / BAT_ENTRY_BYTES);
        let (mut wrong, mut present, mut last, mut used, mut partial) = (false, Vec::new(), None, 0, false);
        walk(view, start + done, entries, &mut |index, raw| {
            let entry = BatEntry(raw);
            let offset = entry.file_offset().0;
            let fits = offset >= HEADER_SECTION_BYTES && offset < size;
            let is_present = matches!(entry.state_number(), 6 | 7);
            let possible = is_present && fits || entry.state_number() < 4 && (offset == 0 || fits);
            wrong |= entry.reserved() != 0 || !possible;
            last = Some(base + index);
            used += 1;
            if is_present {
                present.push(offset / MIB);
                partial |= entry.state_number() == PayloadState::PartiallyPresent.number();
            }
        })?;
        // It begins where its first entry is: zeros before it are no part of it.
        if wrong || done == 0 && last.is_none() {
            break;
        }
        shape.last = last.unwrap_or(shape.last);
        shape.used += used;
        shape.mibs.extend(present);
        shape.has_partial |= partial;
        done += MIB;
    }
    Ok(shape)
}

/// A BAT that was found by its shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundTable {
    pub(super) start: u64,
    /// Entries up to the last one that is used.
    pub(super) entries: u64,
    pub(super) inferred: Inferred,
    /// Blocks with data.
    pub(super) present: u64,
}

/// What a BAT shows of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Inferred {
    /// The block size that the distances between blocks show.
    pub(super) block_size: Option<u32>,
    /// A block is partially present.
    pub(super) has_parent: bool,
    /// Half of the blocks or more lie closer together than any of twice this size could.
    pub(super) is_common: bool,
}

/// Looks for a BAT at every MiB that nothing else is known to take. A table in which blocks share places is none.
pub(super) fn search(found: &Structures, progress: &dyn Progress) -> Result<Option<FoundTable>> {
    let view = &found.view;
    let size = view.size();
    let mut offset = HEADER_SECTION_BYTES;
    let geometry = known_geometry(found);
    let mut best: Option<((bool, u64), FoundTable)> = None;
    while offset < size {
        advance(progress, offset, Some(size))?;
        let Some(data) = view.next_data(offset..size)? else { break };
        let next = data.start - data.start % MIB;
        if next > offset {
            offset = next;
            continue;
        }
        let known = [&found.log, &found.metadata];
        let is_known = known.into_iter().flatten().any(|range| range.contains(&offset));
        if !is_known && looks_like_a_table(view, offset)? {
            let mut shape = shape(view, offset)?;
            let own = offset / MIB;
            shape.mibs.sort_unstable();
            let distinct = shape.mibs.windows(2).all(|pair| pair.first() != pair.last());
            let elsewhere = shape.mibs.binary_search(&own).is_err();
            let present = shape.mibs.len() as u64;
            let fits = geometry.is_none_or(|geometry| shape.last < geometry.bat_entries());
            let better = best.as_ref().is_none_or(|(other, _)| (fits, present) > *other);
            let enough = present >= PRESENT_MIN || present == 1 && is_table_of_one(found, &shape, offset);
            if distinct && elsewhere && enough && better {
                let inferred = shape.inferred(size);
                let table = FoundTable { start: offset, entries: shape.last + 1, inferred, present };
                best = Some(((fits, present), table));
                if fits && present >= 64 {
                    break; // no chance makes so many
                }
            }
        }
        offset += MIB;
    }
    Ok(best.map(|(_, table)| table))
}

/// True for a stretch with one entry and nothing else, where the metadata says how many entries there are: it is one of them,
/// and its block lies behind the table, as every writer puts it, and is in the file as a whole.
fn is_table_of_one(found: &Structures, shape: &Shape, offset: u64) -> bool {
    let Some(geometry) = known_geometry(found) else { return false };
    let place = shape.mibs.first().map_or(0, |mib| mib.saturating_mul(MIB));
    let is_in_file = place.saturating_add(geometry.block_size()) <= found.view.size();
    shape.used == 1 && shape.last < geometry.bat_entries() && place > offset && is_in_file
}

/// What the metadata says about the disk, if it says enough.
fn known_geometry(found: &Structures) -> Option<Geometry> {
    let parameters = &found.parameters;
    let (block, size) = (parameters.block_size?, parameters.disk_size?);
    let (logical, has_parent) = (parameters.logical_sector_size.unwrap_or(512), parameters.has_parent.unwrap_or(false));
    Geometry::new(size, block, logical, has_parent)
}

/// A first look, cheap: the first page holds nothing that cannot be an entry.
fn looks_like_a_table(view: &View, offset: u64) -> Result<bool> {
    let size = view.size();
    let page = view.read_vec(offset..size.min(offset + 4096))?;
    Ok(page.as_chunks::<8>().0.iter().all(|raw| {
        let entry = BatEntry(u64::from_le_bytes(*raw));
        let there = entry.file_offset().0;
        entry.reserved() == 0 && !matches!(entry.state_number(), 4 | 5) && (there == 0 || there < size)
    }))
}

impl Shape {
    /// The block size that distances between blocks show: none is smaller, and blocks that lie side by side are one block
    /// apart. Sector bitmaps, which only differencing disks have, are 1 MiB; there the commonest distance counts.
    fn inferred(&self, size: u64) -> Inferred {
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        let mut least = None;
        for pair in self.mibs.windows(2) {
            if let [first, second] = pair {
                let gap = second - first; // sorted
                least = least.into_iter().chain(std::iter::once(gap)).min();
                if gap.is_power_of_two() {
                    *counts.entry(gap).or_default() += 1;
                }
            }
        }
        let commonest = counts.into_iter().max_by_key(|(gap, count)| (*count, *gap)).map(|(gap, _)| gap);
        let behind_last = self.mibs.last().map(|last| (size / MIB).saturating_sub(*last));
        let close = self.mibs.windows(2).filter(|pair| pair.last().zip(pair.first()).map(|(b, a)| b - a) == least);
        let is_common = self.mibs.len() >= COMMON_MIN && close.count() * 2 >= self.mibs.len().saturating_sub(1);
        let mib = if self.has_partial { commonest } else { least.or(behind_last) };
        // The largest power of two that is not larger.
        let mib = mib.filter(|mib| *mib > 0).map(|mib| 1 << (63 - mib.leading_zeros()).min(8));
        Inferred {
            block_size: mib.and_then(|mib: u64| u32::try_from(mib * MIB).ok()),
            has_parent: self.has_partial,
            is_common,
        }
    }
}

/// Blocks with data that a BAT at a known place has.
pub(super) fn present(view: &View, start: u64) -> Result<u64> {
    Ok(shape(view, start)?.mibs.len() as u64)
}

/// What a BAT at a known place shows.
pub(super) fn infer(view: &View, start: u64) -> Result<Inferred> {
    let mut shape = shape(view, start)?;
    shape.mibs.sort_unstable();
    shape.mibs.dedup();
    Ok(shape.inferred(view.size()))
}

/// Entries up to the last one that is used, of a BAT at a known place.
pub(super) fn used_entries(view: &View, range: &Range<u64>) -> Result<u64> {
    let mut used = 0;
    let length = range.end.saturating_sub(range.start).min(bat_limit(view, range.start));
    walk(view, range.start, length / BAT_ENTRY_BYTES, &mut |index, _| used = index + 1)?;
    Ok(used)
}

/// Where the last block with data ends, in bytes of the disk, that has an entry behind those of the disk.
pub(super) fn behind(view: &View, range: &Range<u64>, geometry: &Geometry) -> Result<Option<u64>> {
    let (block_size, logical) = (geometry.block_size(), geometry.logical_sector_size());
    let sizes = (u32::try_from(block_size), u32::try_from(logical));
    let (Ok(block), Ok(sector)) = sizes else { return Ok(None) };
    let Some(largest) = Geometry::new(DISK_SIZE_MAX, block, sector, geometry.is_differencing()) else {
        return Ok(None);
    };
    let mut last = None;
    let length = range.end.saturating_sub(range.start).min(bat_limit(view, range.start));
    walk(view, range.start, length / BAT_ENTRY_BYTES, &mut |index, raw| {
        let entry = BatEntry(raw);
        let BatSlot::Payload(block) = largest.slot(BatIndex(index)) else { return };
        let is_present = matches!(entry.state_number(), 6 | 7) && entry.reserved() == 0;
        let offset = entry.file_offset().0;
        if block.0 >= geometry.payload_blocks() && is_present && (HEADER_SECTION_BYTES..view.size()).contains(&offset) {
            last = Some(block.0);
        }
    })?;
    Ok(last.map(|block| block.saturating_add(1).saturating_mul(block_size).min(DISK_SIZE_MAX)))
}
