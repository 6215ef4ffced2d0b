//! Walking what a range of a disk is made of, without filling any cache.
//!
//! A cursor streams one layer's BAT through a window, skips what the file has as a hole, and gives runs: as many
//! blocks as are alike. A chain walks its layers' cursors together; a cursor remembers its last run, so that a long run
//! in a child over short ones in the parent is found once.

use std::ops::{ControlFlow, Range};

use super::bat::{bitmap_page_offset, judge, present_bitmap};
use super::bitmap::{BitmapKey, BitmapPage, PAGE_BITS, PAGE_BYTES, bit_run};
use super::device::{Extent, ExtentKind, VisitExtent};
use super::layer::Layer;
use crate::error::{Error, Result};
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::geometry::{BAT_ENTRY_BYTES, BITMAP_BLOCK_BYTES};
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset, GuestOffset};

/// What one layer says about a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunKind {
    /// In this layer's file, from this offset on.
    Data(u64),
    /// In this layer, but not at one place of its file.
    ScatteredData,
    /// Zero, whatever a parent says.
    Zero,
    /// Nothing: the parent's, or zero.
    Absent,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    range: Range<u64>,
    kind: RunKind,
}

/// Entries in a window: 64 KiB of BAT.
const WINDOW_ENTRIES: u64 = 8192;

/// Streams one layer.
pub(crate) struct LayerCursor<'a> {
    layer: &'a Layer,
    window: Vec<u64>,
    window_start: u64,
    /// Entries known to be zero because the file has a hole there.
    hole: Range<u64>,
    /// Entries that the file may hold data for. Asked for once per stretch, since some file systems walk all of a
    /// stretch to find its end.
    data: Range<u64>,
    run: Option<Run>,
    bitmap: Option<(u64, Box<BitmapPage>)>,
}

impl<'a> LayerCursor<'a> {
    pub(crate) fn new(layer: &'a Layer) -> Self {
        Self { layer, window: Vec::new(), window_start: 0, hole: 0..0, data: 0..0, run: None, bitmap: None }
    }

    /// Makes sure that an entry is in the window or in the hole.
    fn load(&mut self, index: u64) -> Result<()> {
        if self.hole.contains(&index)
            || (index >= self.window_start && index - self.window_start < self.window.len() as u64)
        {
            return Ok(());
        }
        let rules = self.layer.rules();
        let entries = rules.geometry.bat_entries();
        // What a writer changed is taken from memory; the file may be behind.
        let changed = self.layer.bat().next_changed(index).unwrap_or(entries..entries);
        if changed.contains(&index) {
            return self.load_changed(index..changed.end.min(entries));
        }
        let bat = rules.bat_offset.0; // the BAT region lies inside the file, so sums below do not overflow
        let from = bat + index * BAT_ENTRY_BYTES;
        let until = bat + entries * BAT_ENTRY_BYTES;
        if !self.data.contains(&index) {
            let data = self.layer.view().next_data(from..until)?.unwrap_or(until..until);
            self.data = (data.start - bat) / BAT_ENTRY_BYTES..(data.end - bat).div_ceil(BAT_ENTRY_BYTES);
            if self.data.start > index {
                self.hole = index..self.data.start.min(changed.start);
                return Ok(());
            }
        }
        let count = WINDOW_ENTRIES.min(self.data.end - index).min(changed.start - index);
        self.window.clear();
        self.window.resize(usize::try_from(count).unwrap_or_default(), 0);
        self.window_start = index;
        let read = self.layer.view().read_at(zerocopy::IntoBytes::as_mut_bytes(self.window.as_mut_slice()), from);
        if read.is_err() {
            self.window.clear();
        }
        read?;
        for entry in &mut self.window {
            *entry = u64::from_le(*entry);
        }
        Ok(())
    }

    /// Fills the window from a page in memory.
    fn load_changed(&mut self, range: Range<u64>) -> Result<()> {
        self.hole = 0..0;
        self.window_start = range.start;
        self.window.clear();
        for index in range {
            self.window.push(self.layer.bat().entry(BatIndex(index), self.layer.rules(), self.layer.view())?.0);
        }
        Ok(())
    }

    /// The entry at an index.
    pub(crate) fn entry(&mut self, index: BatIndex) -> Result<BatEntry> {
        self.load(index.0)?;
        let position = usize::try_from(index.0.wrapping_sub(self.window_start)).unwrap_or(usize::MAX);
        if self.hole.contains(&index.0) {
            return Ok(BatEntry(0));
        }
        Ok(BatEntry(self.window.get(position).copied().unwrap_or_default()))
    }

    /// How many entries from `index` on, up to `limit`, are equal to `entry`.
    pub(crate) fn count_equal(&mut self, index: BatIndex, limit: u64, entry: BatEntry) -> Result<u64> {
        let mut counted = 0;
        while counted < limit {
            let at = index.0 + counted; // limit ends inside the BAT
            self.load(at)?;
            if self.hole.contains(&at) {
                if entry.0 != 0 {
                    break;
                }
                counted += (self.hole.end - at).min(limit - counted);
                continue;
            }
            let skip = usize::try_from(at - self.window_start).unwrap_or(usize::MAX);
            let take = usize::try_from(limit - counted).unwrap_or(usize::MAX);
            let there = self.window.get(skip..).unwrap_or_default();
            let there = there.get(..take.min(there.len())).unwrap_or_default();
            let equal = equal_prefix(there, entry.0);
            counted += equal as u64;
            if equal < there.len() {
                break;
            }
        }
        Ok(counted)
    }

    /// The entry of a block, judged.
    fn payload(&mut self, block: BlockIndex) -> Result<BatEntry> {
        let index = self.layer.rules().geometry.payload_index(block);
        let entry = self.entry(index)?;
        judge(index, entry, self.layer.rules()).map_err(|finding| Error::from_finding(&finding))?;
        Ok(entry)
    }

    /// What the layer says from `position` on, not beyond `end`. Both lie on the layer's disk.
    fn run_at(&mut self, position: u64, end: u64) -> Result<Run> {
        if let Some(run) = self.run.as_ref().filter(|run| run.range.contains(&position)) {
            return Ok(clip(run, position, end));
        }
        let run = self.find_run(position, end)?;
        let clipped = clip(&run, position, end);
        self.run = Some(run);
        Ok(clipped)
    }

    fn find_run(&mut self, position: u64, end: u64) -> Result<Run> {
        let geometry = self.layer.rules().geometry;
        let block = geometry.block_of(GuestOffset(position));
        let entry = self.payload(block)?;
        let offset = entry.file_offset().0;
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => self.present_run(block, offset, end),
            Some(PayloadState::PartiallyPresent) => self.partial_run(block, entry, position),
            Some(PayloadState::NotPresent) => self.like_run(block, entry, end, RunKind::Absent),
            _ => self.like_run(block, entry, end, RunKind::Zero),
        }
    }

    /// Blocks that all have the same entry, which has no data.
    fn like_run(&mut self, first: BlockIndex, entry: BatEntry, end: u64, kind: RunKind) -> Result<Run> {
        let geometry = self.layer.rules().geometry;
        let blocks_end = end.div_ceil(geometry.block_size()).min(geometry.payload_blocks());
        let mut block = first.0;
        // An entry with an offset owns space, which differs from block to block: one at a time.
        while block < blocks_end {
            let chunk_end = (geometry.chunk_of(BlockIndex(block)).0 + 1) * geometry.chunk_ratio();
            let limit = chunk_end.min(blocks_end) - block;
            let equal = self.count_equal(geometry.payload_index(BlockIndex(block)), limit, entry)?;
            block += equal;
            if equal < limit {
                break;
            }
        }
        let end = geometry.block_range(BlockIndex(block.max(first.0 + 1) - 1)).end;
        Ok(Run { range: geometry.block_range(first).start..end, kind })
    }

    /// Fully present blocks that follow each other in the file.
    fn present_run(&mut self, first: BlockIndex, offset: u64, end: u64) -> Result<Run> {
        let geometry = self.layer.rules().geometry;
        let start = geometry.block_range(first).start;
        let first_end = geometry.block_range(first).end;
        if !self.layer.view().is_in_file(&(offset..offset + (first_end - start))) {
            return Ok(Run { range: start..first_end, kind: RunKind::ScatteredData });
        }
        let mut block = first.0;
        loop {
            let range = geometry.block_range(BlockIndex(block));
            let next = BlockIndex(block + 1);
            if range.end >= end || next.0 >= geometry.payload_blocks() {
                return Ok(Run { range: start..range.end, kind: RunKind::Data(offset) });
            }
            let expected = offset + (range.end - start); // blocks before the disk's end lie inside the file
            let entry = self.entry(geometry.payload_index(next))?;
            let follows = entry == BatEntry::new(PayloadState::FullyPresent.number(), FileOffset(expected));
            let length = geometry.block_range(next).end - range.end;
            let usable = follows
                && judge(geometry.payload_index(next), entry, self.layer.rules()).is_ok()
                && self.layer.view().is_in_file(&(expected..expected + length));
            if !usable {
                return Ok(Run { range: start..range.end, kind: RunKind::Data(offset) });
            }
            block = next.0;
        }
    }

    /// Sectors of a partially present block that all come from the same side.
    fn partial_run(&mut self, block: BlockIndex, entry: BatEntry, position: u64) -> Result<Run> {
        let rules = self.layer.rules();
        let geometry = rules.geometry;
        let chunk = geometry.chunk_of(block);
        let bitmap = self.bitmap_entry(chunk)?;
        if bitmap.0 == 0 {
            return Err(Error::from_finding(&rules.bitmap_missing(block)));
        }
        let sector = geometry.logical_sector_size();
        let range = geometry.block_range(block);
        let position = position - position % sector;
        let first = geometry.bitmap_bit(GuestOffset(position));
        let page_number = first / PAGE_BITS;
        let sectors_left = (range.end - position).div_ceil(sector);
        let held = self.layer.bitmaps().held(BitmapKey { chunk, page: page_number });
        let page = match &held {
            Some(page) => page,
            None => self.bitmap_page(bitmap, page_number)?,
        };
        let (here, count) = bit_run(page, first % PAGE_BITS, sectors_left);
        let end = (position + count * sector).min(range.end);
        let kind = if here {
            let offset = entry.file_offset().0 + (position - range.start);
            let in_file = self.layer.view().is_in_file(&(offset..offset + (end - position)));
            if in_file { RunKind::Data(offset) } else { RunKind::ScatteredData }
        } else {
            RunKind::Absent
        };
        Ok(Run { range: position..end, kind })
    }

    fn bitmap_entry(&mut self, chunk: ChunkIndex) -> Result<BatEntry> {
        let rules = self.layer.rules();
        let index = rules.geometry.bitmap_index(chunk);
        if self.layer.bat().next_changed(index.0).is_some_and(|changed| changed.contains(&index.0)) {
            return self.layer.bat().bitmap(chunk, rules, self.layer.view());
        }
        // Read by itself: going through the window would throw it away for one entry.
        let mut raw = [0; 8];
        self.layer.view().read_at(&mut raw, rules.bat_offset.0 + index.0 * BAT_ENTRY_BYTES)?;
        let entry = BatEntry(u64::from_le_bytes(raw));
        judge(index, entry, rules).map_err(|finding| Error::from_finding(&finding))?;
        Ok(present_bitmap(entry))
    }

    fn bitmap_page(&mut self, bitmap: BatEntry, page_number: u64) -> Result<&BitmapPage> {
        let offset = bitmap_page_offset(bitmap, page_number).0;
        debug_assert!(page_number * PAGE_BYTES < BITMAP_BLOCK_BYTES);
        let loaded = self.bitmap.as_ref().is_some_and(|(at, _)| *at == offset);
        if !loaded {
            let mut page: Box<BitmapPage> = Box::new([0; 4096]);
            self.layer.view().read_at(page.as_mut_slice(), offset)?;
            self.bitmap = Some((offset, page));
        }
        match &self.bitmap {
            Some((_, page)) => Ok(page),
            None => Err(Error::new(crate::ErrorKind::Io, "bitmap page vanished")),
        }
    }

    /// Adds up the space of present blocks and bitmaps.
    pub(crate) fn allocated_bytes(&mut self) -> Result<u64> {
        let geometry = self.layer.rules().geometry;
        let entries = geometry.bat_entries();
        let mut bytes = 0;
        let mut index = 0;
        while index < entries {
            let entry = self.entry(BatIndex(index))?;
            if entry.0 & 6 == 6 {
                let slot = geometry.slot(BatIndex(index));
                let owned = self.layer.rules().owned_range(slot, entry);
                bytes += owned.map_or(0, |range| range.end - range.start); // at most 2^27 blocks of 2^28 bytes
                index += 1;
            } else {
                index += self.count_equal(BatIndex(index), entries - index, entry)?;
            }
        }
        Ok(bytes)
    }
}

/// How many elements at the start are equal to `value`; written so that the processor compares many at once.
fn equal_prefix(values: &[u64], value: u64) -> usize {
    let (chunks, _) = values.as_chunks::<64>();
    let whole = chunks.iter().take_while(|chunk| chunk.iter().fold(0, |all, other| all | (other ^ value)) == 0).count();
    let rest = values.get(whole * 64..).unwrap_or_default();
    whole * 64 + rest.iter().take_while(|other| **other == value).count()
}

fn clip(run: &Run, position: u64, end: u64) -> Run {
    let kind = match run.kind {
        RunKind::Data(offset) => RunKind::Data(offset + (position - run.range.start)),
        other => other,
    };
    Run { range: position..run.range.end.min(end), kind }
}

/// Walks a chain. `layers` must not be empty and `range` must lie on the first layer's disk.
pub(crate) fn visit_chain(
    layers: &[Layer],
    parents_missing: bool,
    range: Range<u64>,
    visit: &mut VisitExtent<'_>,
) -> Result<()> {
    let mut cursors: Vec<LayerCursor<'_>> = layers.iter().map(LayerCursor::new).collect();
    let mut pending: Option<Extent> = None;
    let mut position = range.start;
    while position < range.end {
        let extent = resolve(&mut cursors, parents_missing, position, range.end)?;
        position = extent.end();
        pending = match pending {
            Some(before) if before.continues_with(&extent) => {
                Some(Extent { length: before.length + extent.length, ..before })
            }
            Some(before) => {
                if visit(&before).is_break() {
                    return Ok(());
                }
                Some(extent)
            }
            None => Some(extent),
        };
    }
    if let Some(last) = pending {
        let _: ControlFlow<()> = visit(&last); // nothing is left to break off
    }
    Ok(())
}

/// What the chain says from `position` on.
fn resolve(cursors: &mut [LayerCursor<'_>], parents_missing: bool, position: u64, end: u64) -> Result<Extent> {
    let deepest = cursors.len().saturating_sub(1);
    let mut end = end;
    let extent = |end: u64, kind, layer| Extent { start: position, length: end - position, kind, layer };
    for (depth, cursor) in cursors.iter_mut().enumerate() {
        let layer = cursor.layer;
        let size = layer.geometry().disk_size();
        if position >= size {
            return Ok(extent(end, ExtentKind::Hole, deepest));
        }
        // Behind a shorter parent's end everything reads as zero; that is the next run.
        let run = cursor.run_at(position, end.min(size)).map_err(|error| layer.name_error(error))?;
        end = run.range.end;
        match run.kind {
            RunKind::Data(offset) => return Ok(extent(end, ExtentKind::Data { file_offset: Some(offset) }, depth)),
            RunKind::ScatteredData => return Ok(extent(end, ExtentKind::Data { file_offset: None }, depth)),
            RunKind::Zero => return Ok(extent(end, ExtentKind::Zero, depth)),
            RunKind::Absent if layer.geometry().is_differencing() => {
                if depth == deepest && parents_missing {
                    return Err(layer.parent_missing(position));
                }
            }
            RunKind::Absent => return Ok(extent(end, ExtentKind::Hole, deepest)),
        }
    }
    Ok(extent(end, ExtentKind::Hole, deepest))
}

#[cfg(test)]
mod tests {
    use super::equal_prefix;

    #[test]
    fn equal_prefix_counts_exactly() {
        for length in [0, 1, 63, 64, 65, 128, 200] {
            for different in 0..=length {
                let mut values = vec![7_u64; length];
                if let Some(value) = values.get_mut(different) {
                    *value = 8;
                }
                assert_eq!(equal_prefix(&values, 7), different, "{length} {different}");
            }
        }
    }
}
