//! The free space of one allocation group.

use std::ops::Range;

use zerocopy::big_endian::U32;

use super::raw::{RawFree, RawGroup, RawList, RawNode, RawNodeTail, sum};
use super::{Xfs, sum_is_right};
use crate::guest::window::{Checked, FreeSink, Window, parse, reason, require};

/// Highest tree: with blocks of 512 bytes and half full nodes, 2^31 records need no more.
const LEVELS_MAX: u32 = 9;
/// Sectors at the beginning of each group: superblock, AGF, AGI, AGFL.
const HEAD_SECTORS: u64 = 4;

/// Gives the free ranges of a group; how many blocks it adds to the count in the superblock.
pub(super) fn walk(xfs: &Xfs, window: &Window<'_>, number: u64, sink: &mut FreeSink<'_>) -> Checked<u64> {
    let start = number * xfs.group_blocks * xfs.block; // below the size of the file system
    let sector = window.read(start + xfs.sector, xfs.sector)?;
    let raw: RawGroup = parse(&sector, 0)?;
    let length = xfs.group_length(number);
    let known = raw.magic == *b"XAGF" && raw.version.get() == 1 && u64::from(raw.number.get()) == number;
    let right = !xfs.summed || (raw.uuid == xfs.uuid && sum_is_right(&sector, sum::GROUP));
    if !known || !right || u64::from(raw.length.get()) != length {
        return reason(format!("the header of allocation group {number} is damaged"));
    }
    let list = kept_blocks(xfs, window, number, &raw)?;
    let mut taken = Vec::new();
    taken.push(0..(HEAD_SECTORS * xfs.sector).div_ceil(xfs.block));
    if xfs.log_group == number {
        taken.push(xfs.log_blocks.clone());
    }
    taken.extend(list.iter().map(|block| *block..*block + 1));
    let roots = raw.roots.iter().zip(&raw.levels).filter(|(_, levels)| levels.get() > 0).map(|(root, _)| root);
    taken.extend(roots.map(|root| u64::from(root.get())..u64::from(root.get()) + 1));
    taken.sort_unstable_by_key(|range| range.start);

    let levels = raw.levels.first().map_or(0, |levels| levels.get());
    let root = raw.roots.first().map_or(0, |root| root.get());
    require((1..=LEVELS_MAX).contains(&levels), "the height of a tree of free space is not one")?;
    let mut tree =
        Tree { xfs, window, number, length, taken, sink, path: Vec::new(), position: 0, free: 0, longest: 0 };
    tree.descend(root, levels - 1)?;
    let (free, longest) = (tree.free, tree.longest);
    if free != u64::from(raw.free_blocks.get()) || longest != u64::from(raw.longest.get()) {
        return reason(format!("the free extents of allocation group {number} do not add up to what its header says"));
    }
    let lazy = if xfs.lazy_counters { u64::from(raw.tree_blocks.get()) } else { 0 };
    Ok(free + list.len() as u64 + lazy)
}

/// The blocks that are kept for the trees.
fn kept_blocks(xfs: &Xfs, window: &Window<'_>, number: u64, raw: &RawGroup) -> Checked<Vec<u64>> {
    let start = number * xfs.group_blocks * xfs.block; // below the size of the file system
    let sector = window.read(start + (HEAD_SECTORS - 1) * xfs.sector, xfs.sector)?;
    let head: RawList = parse(&sector, 0)?;
    let right = !xfs.summed
        || (head.magic == *b"XAFL"
            && u64::from(head.number.get()) == number
            && head.uuid == xfs.uuid
            && sum_is_right(&sector, sum::LIST));
    if !right {
        return reason(format!("the list of kept blocks of allocation group {number} is damaged"));
    }
    let places = sector.get(if xfs.summed { size_of::<RawList>() } else { 0 }..).unwrap_or_default();
    let room = places.len() / size_of::<U32>();
    let [first, last, count] =
        [raw.list_first, raw.list_last, raw.list_count].map(|value| usize::try_from(value.get()).unwrap_or(usize::MAX));
    if count == 0 {
        return Ok(Vec::new());
    }
    let fits = first < room && last < room && count <= room && (first + count - 1) % room == last;
    require(fits, "the list of kept blocks does not fit its header")?;
    let mut list = Vec::new();
    for step in 0..count {
        let block: U32 = parse(places, (first + step) % room * size_of::<U32>())?;
        let block = u64::from(block.get());
        require(block < xfs.group_length(number), "a kept block lies outside of its group")?;
        list.push(block);
    }
    Ok(list)
}

/// A walk through the tree of free extents by block.
struct Tree<'a, 'b> {
    xfs: &'a Xfs,
    window: &'a Window<'a>,
    number: u64,
    /// Blocks of the group.
    length: u64,
    /// Blocks of the group that must not be free, in order.
    taken: Vec<Range<u64>>,
    sink: &'a mut FreeSink<'b>,
    /// The blocks of the nodes above, which must not be free either.
    path: Vec<u64>,
    /// Everything before this block of the group is done: each record has to lie behind the one before, so that the walk ends.
    position: u64,
    free: u64,
    longest: u64,
}

impl Tree<'_, '_> {
    fn damaged<T>(&self) -> Checked<T> {
        reason(format!("the tree of free space of allocation group {} is damaged", self.number))
    }

    /// Reads a node, and everything below it.
    fn descend(&mut self, block: u32, level: u32) -> Checked<()> {
        let block = u64::from(block);
        if block >= self.length {
            return self.damaged();
        }
        let xfs = self.xfs;
        let place = (self.number * xfs.group_blocks + block) * xfs.block; // below the size of the file system
        let bytes = self.window.read(place, xfs.block)?;
        let node: RawNode = parse(&bytes, 0)?;
        let magic = if xfs.summed { *b"AB3B" } else { *b"ABTB" };
        if node.magic != magic || u32::from(node.level.get()) != level || !self.is_right(&bytes, place)? {
            return self.damaged();
        }
        let head = size_of::<RawNode>() + if xfs.summed { size_of::<RawNodeTail>() } else { 0 };
        let body = bytes.get(head..).unwrap_or_default();
        let count = usize::from(node.records.get());
        if level == 0 {
            self.path.push(block);
            self.leaf(body, count)?;
            self.path.pop();
            return Ok(());
        }
        let room = body.len() / (size_of::<RawFree>() + size_of::<U32>());
        if count == 0 || count > room {
            return self.damaged();
        }
        self.path.push(block);
        for index in 0..count {
            let key: RawFree = parse(body, index * size_of::<RawFree>())?;
            if u64::from(key.start.get()) < self.position {
                return self.damaged(); // also a tree that leads back into itself
            }
            let child: U32 = parse(body, room * size_of::<RawFree>() + index * size_of::<U32>())?;
            let before = self.position;
            self.descend(child.get(), level - 1)?;
            if self.position == before {
                return self.damaged(); // a child without records
            }
            if self.sink.is_stopped() {
                return Ok(());
            }
        }
        self.path.pop();
        Ok(())
    }

    /// Whether a node of version 5 is the one that belongs here.
    fn is_right(&self, bytes: &[u8], place: u64) -> Checked<bool> {
        if !self.xfs.summed {
            return Ok(true);
        }
        let tail: RawNodeTail = parse(bytes, size_of::<RawNode>())?;
        Ok(tail.uuid == self.xfs.uuid
            && u64::from(tail.owner.get()) == self.number
            && tail.place.get() == place / 512
            && sum_is_right(bytes, sum::NODE))
    }

    fn leaf(&mut self, body: &[u8], count: usize) -> Checked<()> {
        if count > body.len() / size_of::<RawFree>() {
            return self.damaged();
        }
        for index in 0..count {
            let raw: RawFree = parse(body, index * size_of::<RawFree>())?;
            let start = u64::from(raw.start.get());
            let end = start + u64::from(raw.count.get());
            // Neighbours would have been joined, so that there is a used block between two records.
            let behind = start > self.position || (start == 0 && self.position == 0);
            if !behind || end == start || end > self.length {
                return self.damaged();
            }
            let next = self.taken.partition_point(|range| range.end <= start);
            let of_tree = self.path.iter().any(|block| (start..end).contains(block));
            if of_tree || self.taken.get(next).is_some_and(|range| range.start < end) {
                return reason(format!("metadata of allocation group {} is among its free space", self.number));
            }
            self.position = end;
            self.free += end - start; // below the length of the group
            self.longest = self.longest.max(end - start);
            let first = self.number * self.xfs.group_blocks;
            self.sink.add((first + start) * self.xfs.block..(first + end) * self.xfs.block)?; // below the size
        }
        Ok(())
    }
}
