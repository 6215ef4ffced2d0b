//! Blocks whose entries are gone: where in the file their data may be.
//!
//! In this order, the surest first: what an entry names that is damaged elsewhere; structures of file systems that say where
//! on the disk they are; the neighbours, as every writer puts blocks one behind the other as they are first written; the order
//! of the file.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use super::signatures::{self, Says, Sign};
use super::table::{Placed, Table};
use crate::error::Result;
use crate::format::geometry::Geometry;
use crate::image::scan::Marks;
use crate::image::view::View;
use crate::ops::{Progress, advance};
use crate::units::{BlockIndex, GuestOffset, MIB};

/// Ranges of the file that are named in a report.
const NAMED_MAX: usize = 100;

/// Where everything is, as far as it was found.
#[derive(Debug, Default)]
pub(super) struct Placing {
    /// In the order of the disk.
    pub(super) placed: Vec<Placed>,
    /// Sector bitmaps that were found without their entries, in MiB.
    pub(super) bitmaps: BTreeMap<u64, u32>,
    /// Blocks that are missing for certain.
    pub(super) lost: Vec<u64>,
    /// Bytes with data that belong nowhere.
    pub(super) bytes_unplaced: u64,
    /// The first of them.
    pub(super) unplaced: Vec<Range<u64>>,
    /// What was recognised on the disk.
    pub(super) recognised: BTreeSet<String>,
}

/// A place of the file that belongs to an offset of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Anchor {
    file: u64,
    guest: u64,
    checked: bool,
}

/// The state of placing.
struct Work<'a> {
    view: &'a View,
    geometry: &'a Geometry,
    table: &'a Table,
    marks: Marks,
    /// What the table says, in the order of the disk.
    base: Vec<Placed>,
    /// What was placed here, by block.
    added: BTreeMap<u32, Placed>,
    /// Places of the table's blocks with their numbers, in the order of the file.
    places: Vec<(u32, u32)>,
    /// What was placed here, by place.
    by_place: BTreeMap<u32, u32>,
    recognised: BTreeSet<String>,
}

/// Places what the table leaves open. `taken` is what structures take; without a table everything else is looked at as data.
pub(super) fn place(
    view: &View,
    geometry: &Geometry,
    table: &Table,
    taken: &[Range<u64>],
    has_table: bool,
    progress: &dyn Progress,
) -> Result<Placing> {
    let mut marks = Marks::new(view.size())?;
    for range in taken {
        marks.mark(range.start, range.end.min(view.size()));
    }
    let block = geometry.block_size();
    let mut base = table.placed.clone();
    let mut more_lost = Vec::new();
    let mut shared_bytes = 0_u64;
    base.retain_mut(|placed| {
        let start = u64::from(placed.mib) * MIB;
        // Two blocks at one place: which one is right cannot be known, and both are read as they were. But a new image that
        // is several times as large as the file is nobody's.
        let shared = marks.mark(start, start + block);
        placed.guessed |= shared;
        shared_bytes += if shared { block } else { 0 };
        if shared && shared_bytes > view.size() {
            more_lost.push(u64::from(placed.block));
        }
        !shared || shared_bytes <= view.size()
    });
    for mib in &table.kept {
        marks.mark(mib * MIB, (mib * MIB + block).min(view.size()));
    }
    for mib in table.bitmaps.values() {
        marks.mark(u64::from(*mib) * MIB, (u64::from(*mib) + 1) * MIB);
    }
    let (added, by_place, recognised) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    let mut work = Work { view, geometry, table, marks, base, added, places: Vec::new(), by_place, recognised };
    let stretches = work.stretches(progress)?;
    if stretches.is_empty() && table.broken.is_empty() {
        return Ok(work.finish(more_lost, &[], BTreeMap::new()));
    }
    work.places = work.base.iter().map(|placed| (placed.mib, placed.block)).collect();
    work.places.sort_unstable();
    work.by_own_entry(&table.broken);
    let anchors = work.anchors(&stretches, progress)?;
    work.by_anchors(&anchors);
    if has_table {
        work.between_neighbours();
        work.by_neighbours(&table.broken, &table.blank);
        work.by_order(&table.broken);
    } else if !geometry.is_differencing() {
        // Over a parent, what is put to a wrong place would hide what is right.
        work.in_file_order(&stretches);
    }
    let broken = table.broken.iter().map(|(block, _)| *block).chain(more_lost);
    let lost: Vec<u64> = broken.filter(|block| !work.has(*block)).collect();
    let mut rest = work.stretches(progress)?;
    let bitmaps = work.bitmaps(&mut rest);
    Ok(work.finish(lost, &rest, bitmaps))
}

impl Work<'_> {
    fn get(&self, block: u64) -> Option<Placed> {
        let block = u32::try_from(block).ok()?;
        let found = self.base.binary_search_by_key(&block, |placed| placed.block);
        let in_base = found.ok().and_then(|index| self.base.get(index));
        in_base.or_else(|| self.added.get(&block)).copied()
    }

    fn has(&self, block: u64) -> bool {
        self.get(block).is_some()
    }

    fn finish(self, lost: Vec<u64>, rest: &[Range<u64>], bitmaps: BTreeMap<u64, u32>) -> Placing {
        let mut placed = self.base;
        placed.extend(self.added.into_values());
        placed.sort_unstable_by_key(|placed| placed.block);
        Placing {
            placed,
            bitmaps,
            lost,
            bytes_unplaced: rest.iter().map(|range| range.end - range.start).sum(),
            unplaced: rest.iter().take(NAMED_MAX).cloned().collect(),
            recognised: self.recognised,
        }
    }

    /// Every stretch of whole MiB that nobody owns, from the first one that holds data to the last one that does.
    fn stretches(&self, progress: &dyn Progress) -> Result<Vec<Range<u64>>> {
        let size = self.view.size();
        let end = size.div_ceil(MIB);
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut position = 0;
        while let Some(start) = self.marks.find_free(position, end, 1) {
            advance(progress, start * MIB, Some(size))?;
            position = start + 1;
            if self.is_zero(start * MIB..((start + 1) * MIB).min(size))? {
                continue;
            }
            match found.last_mut() {
                // What lies between two MiB with data may be a part of a block that was never written.
                Some(last) if self.is_free(last.end..start * MIB) => last.end = (start + 1) * MIB,
                _ => found.push(start * MIB..(start + 1) * MIB),
            }
        }
        Ok(found)
    }

    fn is_free(&self, range: Range<u64>) -> bool {
        let (start, end) = (range.start / MIB, range.end.div_ceil(MIB));
        end <= start || self.marks.find_free(start, end, end - start) == Some(start)
    }

    fn is_zero(&self, range: Range<u64>) -> Result<bool> {
        let mut position = range.start;
        while position < range.end {
            let Some(data) = self.view.next_data(position..range.end)? else { return Ok(true) };
            let end = data.end.min(data.start + (64 << 10));
            if self.view.read_vec(data.start..end)?.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            position = end;
        }
        Ok(true)
    }

    /// Puts a block to a place, if both are free.
    fn put(&mut self, block: u64, start: u64, guessed: bool) -> bool {
        let end = start.saturating_add(self.geometry.block_size());
        let inside = start < self.view.size() && block < self.geometry.payload_blocks();
        let (Ok(number), Ok(mib)) = (u32::try_from(block), u32::try_from(start / MIB)) else { return false };
        // The last block of the disk may be cut short by the end of the file.
        let room = self.is_free(start..end.min(self.view.size().next_multiple_of(MIB)));
        if !inside || !start.is_multiple_of(MIB) || !room || self.has(block) {
            return false;
        }
        self.marks.mark(start, end);
        let partial = self.is_partial(block);
        self.added.insert(number, Placed { block: number, mib, partial, guessed });
        self.by_place.insert(mib, number);
        true
    }

    /// True when the sector bitmap has bits set for a block. Those of blocks that never were partially present are zero.
    fn is_partial(&self, block: u64) -> bool {
        let geometry = self.geometry;
        let chunk = geometry.chunk_of(BlockIndex(block));
        let Some(mib) = self.table.bitmaps.get(&chunk.0) else { return false };
        let range = geometry.block_range(BlockIndex(block));
        let first = geometry.bitmap_bit(GuestOffset(range.start)) / 8;
        let length = geometry.bitmap_bytes_per_block();
        let start = u64::from(*mib) * MIB + first;
        let bits = self.view.read_vec(start..start + length).unwrap_or_default();
        bits.iter().any(|byte| *byte != 0)
    }

    /// Sector bitmaps that are missing, where exactly as many MiB are left over.
    fn bitmaps(&self, rest: &mut Vec<Range<u64>>) -> BTreeMap<u64, u32> {
        let placed = self.base.iter().chain(self.added.values()).filter(|placed| placed.partial);
        let chunks: BTreeSet<u64> =
            placed.map(|placed| self.geometry.chunk_of(BlockIndex(placed.block.into())).0).collect();
        let missing: Vec<u64> = chunks.into_iter().filter(|chunk| !self.table.bitmaps.contains_key(chunk)).collect();
        let fits = rest.iter().all(|range| range.end - range.start == MIB);
        if missing.is_empty() || missing.len() != rest.len() || !fits {
            return BTreeMap::new();
        }
        let places = rest.drain(..).filter_map(|range| u32::try_from(range.start / MIB).ok());
        missing.into_iter().zip(places).collect()
    }

    /// A stretch between two blocks of which exactly so many are not there: writers put blocks one behind the other.
    fn between_neighbours(&mut self) {
        let size = self.geometry.block_size();
        let mut places = self.places.clone();
        places.extend(self.by_place.iter().map(|(mib, block)| (*mib, *block)));
        places.sort_unstable();
        for pair in places.windows(2) {
            let [(left, first), (right, last)] = pair else { continue };
            let start = u64::from(*left) * MIB + size;
            let space = (u64::from(*right) * MIB).checked_sub(start);
            let missing = u64::from(last.saturating_sub(*first)).saturating_sub(1);
            let fits = missing > 0 && space == missing.checked_mul(size);
            let hidden = |block: u64| {
                let at = self.table.zero.partition_point(|range| range.end <= block);
                self.table.zero.get(at).is_some_and(|range| range.start <= block)
            };
            if !fits || (u64::from(*first) + 1..u64::from(*last)).any(|block| self.has(block) || hidden(block)) {
                continue;
            }
            for (number, block) in (0_u64..).zip(u64::from(*first) + 1..u64::from(*last)) {
                self.put(block, start + number * size, true); // inside the file
            }
        }
    }

    /// The place that a damaged entry names, if it is one that nobody else has.
    fn by_own_entry(&mut self, broken: &[(u64, u64)]) {
        let mut claims: HashMap<u64, u64> = HashMap::new();
        for (_, mib) in broken {
            *claims.entry(*mib).or_default() += 1;
        }
        for (block, mib) in broken {
            let alone = claims.get(mib) == Some(&1);
            // The file may end inside the last block.
            let inside = mib.saturating_mul(MIB) < self.view.size();
            if alone && *mib > 0 && inside {
                self.put(*block, mib * MIB, true);
            }
        }
    }

    /// Structures that say where on the disk they are.
    fn anchors(&mut self, stretches: &[Range<u64>], progress: &dyn Progress) -> Result<Vec<Anchor>> {
        let mut signs = Vec::new();
        for stretch in stretches {
            signs.extend(signatures::scan(self.view, stretch.clone(), &|_| false, progress)?);
            signs.truncate(signatures::SIGNS_MAX);
        }
        let disk_size = self.geometry.disk_size();
        let begin = signatures::disk_start(&signs, disk_size);
        let of_table = begin.map_or(Some(disk_size), |begin| begin.is_table.then_some(begin.disk_size));
        let (mut anchors, mut doubtful) = (Vec::new(), Vec::new());
        for (start, sign) in &signs {
            let file = start + sign.at;
            match &sign.says {
                // One of another disk than this is that of an image in a file of the guest, or was left behind.
                Says::OnDisk { guest, what, disk_size } => {
                    self.recognised.insert((*what).to_owned());
                    let is_own = of_table == Some(*disk_size);
                    let list = if is_own { &mut anchors } else { &mut doubtful };
                    let checked = sign.checked && is_own;
                    list.push(Anchor { file, guest: *guest, checked });
                }
                Says::PartitionStart { guest, what, .. } => {
                    self.recognised.insert((*what).to_owned());
                    doubtful.push(Anchor { file, guest: *guest, checked: false });
                }
                Says::InFileSystem { .. } => {}
            }
        }
        self.by_anchors(&anchors);
        let partitions = self.partitions(begin.filter(|begin| begin.is_table).map(|begin| begin.file))?;
        let mut within: Vec<&(u64, Sign)> =
            signs.iter().filter(|(_, sign)| matches!(sign.says, Says::InFileSystem { .. })).collect();
        // The larger one first, as above.
        within.sort_by_key(|(_, sign)| match sign.says {
            Says::InFileSystem { size, .. } => Reverse(size),
            _ => Reverse(0),
        });
        for (start, sign) in within {
            let Says::InFileSystem { identity, offset, size, what } = &sign.says else { continue };
            self.recognised.insert((*what).to_owned());
            let first = signs.iter().find_map(|(start, other)| match &other.says {
                Says::InFileSystem { identity: same, offset, .. } if same == identity && *offset <= 1024 => {
                    self.guest_of(start + other.at).and_then(|guest| guest.checked_sub(*offset))
                }
                _ => None,
            });
            let fits = partitions.iter().filter(|(begin, end)| end.saturating_sub(*begin) >= *size);
            let best = fits.min_by_key(|(begin, end)| end - begin - size).map(|(begin, _)| *begin);
            let begin = first.or(best).or(partitions.is_empty().then_some(0));
            if let Some(guest) = begin.and_then(|begin| begin.checked_add(*offset)) {
                anchors.push(Anchor { file: start + sign.at, guest, checked: sign.checked && first.is_some() });
            }
        }
        anchors.append(&mut doubtful);
        Ok(anchors)
    }

    /// Partitions of the disk, from its beginning, where that is placed or said.
    fn partitions(&self, said: Option<u64>) -> Result<Vec<(u64, u64)>> {
        let placed = self.get(0).map(|placed| u64::from(placed.mib) * MIB);
        let Some(start) = placed.or(said) else { return Ok(Vec::new()) };
        let begin = self.view.read_vec(start..start.saturating_add(64 << 10).min(self.view.size()))?;
        Ok(signatures::partitions(&begin))
    }

    /// Where on the disk a place of the file is, if that is known.
    fn guest_of(&self, file: u64) -> Option<u64> {
        let placed = self.placed_at(file)?;
        Some(u64::from(placed.block) * self.geometry.block_size() + (file - u64::from(placed.mib) * MIB))
    }

    fn by_anchors(&mut self, anchors: &[Anchor]) {
        let block = self.geometry.block_size();
        let place =
            |anchor: &Anchor| anchor.file.checked_sub(anchor.guest % block).map(|start| (anchor.guest / block, start));
        let mut claims: HashMap<u64, BTreeSet<u64>> = HashMap::new();
        for (number, start) in anchors.iter().filter_map(place) {
            claims.entry(number).or_default().insert(start);
        }
        for anchor in anchors {
            if let Some((number, start)) = place(anchor) {
                // A copy of a structure says the same as what it was copied from.
                let alone = claims.get(&number).is_some_and(|starts| starts.len() == 1);
                self.put(number, start, !anchor.checked || !alone);
            }
        }
    }

    /// Runs of missing blocks between two that are placed, where exactly so much space is free between those two in the file;
    /// damaged entries also where only one side fits.
    fn by_neighbours(&mut self, broken: &[(u64, u64)], blank: &[Range<u64>]) {
        let size = self.geometry.block_size();
        let mut runs: Vec<(Range<u64>, bool)> = blank.iter().map(|run| (run.clone(), false)).collect();
        for (block, _) in broken.iter().filter(|(block, _)| !self.has(*block)) {
            match runs.last_mut() {
                Some((last, true)) if last.end == *block => last.end += 1,
                _ => runs.push((*block..block + 1, true)),
            }
        }
        for (run, is_broken) in runs {
            let place = |block: u64| self.get(block);
            // The sector of zeros may begin or end in the middle of what is missing: what follows without data is part of it.
            let before = run.start.checked_sub(1).and_then(place).map(|placed| u64::from(placed.mib) * MIB + size);
            let after = place(run.end).map(|placed| u64::from(placed.mib) * MIB);
            let count = run.end - run.start;
            let start = match (before, after) {
                (Some(before), Some(after)) if after.checked_sub(before) == count.checked_mul(size) => Some(before),
                (Some(before), _) if is_broken => Some(before),
                (None, Some(after)) if is_broken => count.checked_mul(size).and_then(|bytes| after.checked_sub(bytes)),
                (Some(before), None) if self.fills(before, count) => Some(before),
                _ => None,
            };
            let Some(start) = start else { continue };
            for (number, block) in (0_u64..).zip(run) {
                let Some(at) = number.checked_mul(size).and_then(|bytes| start.checked_add(bytes)) else { break };
                if !self.put(block, at, true) {
                    break;
                }
            }
        }
    }

    /// True when what is free from a place on is at most so many whole blocks, and ends with something owned or the file.
    fn fills(&self, start: u64, blocks: u64) -> bool {
        let size = self.geometry.block_size();
        let end = self.view.size().div_ceil(MIB);
        let mut position = start / MIB;
        while position < end && self.is_free(position * MIB..(position + 1) * MIB) {
            position += 1;
        }
        let length = (position * MIB).saturating_sub(start);
        length > 0 && length.is_multiple_of(size) && length / size <= blocks
    }

    /// As many places as damaged entries: then they belong together, in order.
    fn by_order(&mut self, broken: &[(u64, u64)]) {
        let missing: Vec<u64> = broken.iter().map(|(block, _)| *block).filter(|block| !self.has(*block)).collect();
        let size = self.geometry.block_size() / MIB;
        let end = self.view.size() / MIB;
        let (mut places, mut position) = (Vec::new(), 1);
        while places.len() <= missing.len()
            && let Some(start) = self.marks.find_free(position, end, size)
        {
            places.push(start * MIB);
            position = start + size;
        }
        // The file may end inside the last block.
        if places.len() + 1 == missing.len() {
            let end = self.view.size().div_ceil(MIB);
            let tail = self.marks.find_free(position, end + size - 1, size).filter(|start| *start < end);
            places.extend(tail.map(|start| start * MIB));
        }
        if places.len() == missing.len() {
            for (block, place) in missing.into_iter().zip(places) {
                self.put(block, place, true);
            }
        }
    }

    /// No table is left: blocks in the order of the file, counted from what is placed already.
    fn in_file_order(&mut self, stretches: &[Range<u64>]) {
        let size = self.geometry.block_size();
        let mut next = 0;
        for stretch in stretches {
            let mut start = stretch.start;
            while start < stretch.end {
                // A block that says where it is sets the count.
                if let Some(placed) = self.placed_at(start) {
                    next = u64::from(placed.block) + 1;
                    start = u64::from(placed.mib) * MIB + size;
                    continue;
                }
                if !self.put(next, start, true) {
                    start += MIB;
                    continue;
                }
                next += 1;
                start += size;
            }
        }
    }

    /// The block that a place of the file belongs to.
    fn placed_at(&self, file: u64) -> Option<Placed> {
        let mib = u32::try_from(file / MIB).ok()?;
        let added = self.by_place.range(..=mib).next_back().map(|(start, block)| (*start, *block));
        let at = self.places.partition_point(|(start, _)| *start <= mib);
        let known = at.checked_sub(1).and_then(|at| self.places.get(at)).copied();
        let (start, block) = added.into_iter().chain(known).max()?;
        let inside = file - u64::from(start) * MIB < self.geometry.block_size();
        if inside { self.get(u64::from(block)) } else { None }
    }
}
