//! Free space of ext2, ext3 and ext4: the block bitmaps of the groups, and the layout of those without one.
//!
//! ```text
//! | boot | superblock | descriptors | room | bitmaps, inode tables of a flex group | data ... | next group ...
//! ```
//!
//! A bit that is clear is free; a group that was never used (`BLOCK_UNINIT`) has no bitmap, and is free but for metadata,
//! whose places are known. Free space that overlaps metadata, and counts that do not agree, are reasons to trust nothing.
//! Sources: Linux kernel, Documentation/filesystems/ext4; the numbers behind each field are in `raw`.

mod raw;
mod superblock;

use std::ops::Range;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use self::raw::{GROUP_BYTES_SMALL, GROUP_SUM_OFFSET, RawGroup};
use self::superblock::{Generation, Sums, Super};
use super::VolumeKind;
use super::sums;
use super::window::{Checked, FreeSink, READ_BYTES_MAX, Tick, Window, clear_runs, parse, reason, require};

/// `flags`: the group has no inode bitmap, no block bitmap, a zeroed inode table.
const FLAGS_KNOWN: u16 = 7;
/// `flags`: the group has no block bitmap.
const BLOCK_UNINIT: u16 = 2;

/// What is kept of a group.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// Where its bitmap lies; `None` where there is none.
    bitmap: Option<u64>,
    /// Its free clusters, as its descriptor says.
    free: u32,
    /// The checksum of its bitmap.
    sum: u32,
}

/// A file system whose superblock and descriptors are in order.
#[derive(Clone, Debug)]
pub(super) struct Ext {
    superblock: Super,
    groups: Vec<Group>,
    /// Blocks of metadata with a fixed place, in order, joined.
    taken: Vec<Range<u64>>,
}

impl Ext {
    /// Reads superblock and descriptors.
    pub(super) fn open(window: &Window<'_>) -> Checked<Self> {
        let superblock = Super::read(window)?;
        let mut this = Self { groups: Vec::new(), taken: Vec::new(), superblock };
        this.load_groups(window)?;
        Ok(this)
    }

    /// The kind that the features stand for.
    pub(super) const fn kind(&self) -> VolumeKind {
        self.superblock.generation.kind()
    }

    /// Bytes that the file system covers.
    pub(super) fn bytes(&self) -> u64 {
        self.superblock.bytes()
    }

    /// Bytes of what is allocated at once.
    pub(super) const fn cluster_bytes(&self) -> u64 {
        self.superblock.block_size * self.superblock.cluster_blocks // at most 4 GiB
    }

    fn load_groups(&mut self, window: &Window<'_>) -> Checked<()> {
        let sb = self.superblock.clone();
        let (per_block, size) = (sb.descriptors_per_block(), sb.descriptor_size);
        let mut taken = Vec::new();
        let mut blocks = Blocks::default();
        for number in 0..sb.descriptor_blocks {
            let place = sb.descriptor_block(number);
            require(place < sb.blocks, "a block of its group descriptors lies outside of it")?;
            // Without meta_bg they lie side by side.
            let count = if sb.first_meta_bg.is_none() { sb.descriptor_blocks - number } else { 1 };
            let block = blocks.get(window, sb.block_size, place, count.min(sb.blocks - place))?;
            let first = number * per_block;
            let descriptors = block.chunks_exact(usize::try_from(size).unwrap_or(usize::MAX));
            for (group, bytes) in (first..sb.groups).zip(descriptors) {
                self.load_group(group, bytes, &mut taken)?;
            }
            if number == 0 {
                let table = taken.get(3).map_or(0, |table: &Range<u64>| table.start);
                sb.journal_is_empty(window, table)?;
            }
        }
        taken.retain(|range| !range.is_empty());
        taken.sort_unstable_by_key(|range| range.start);
        for range in taken {
            match self.taken.last_mut() {
                Some(last) if range.start < last.end => {
                    return reason(format!("metadata overlaps other metadata at block {}", range.start));
                }
                Some(last) if range.start == last.end => last.end = range.end,
                _ => self.taken.push(range),
            }
        }
        Ok(())
    }

    /// Judges a descriptor; adds to `taken`, in this order: head, block bitmap, inode bitmap, inode table.
    fn load_group(&mut self, number: u64, bytes: &[u8], taken: &mut Vec<Range<u64>>) -> Checked<()> {
        let sb = &self.superblock;
        let wide = bytes.len() >= size_of::<RawGroup>();
        let mut whole = [0; size_of::<RawGroup>()];
        whole.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let raw: RawGroup = parse(&whole, 0)?;
        if !sums::same(u32::from(raw.checksum.get()), u32::from(descriptor_sum(sb, number, bytes))) {
            return reason(format!("the checksum of group {number} is wrong"));
        }
        let flags = if sb.sums == Sums::None { 0 } else { raw.flags.get() };
        require(flags & !FLAGS_KNOWN == 0, "a group has flags that are not understood")?;

        let join = |low: U32, high: U32| u64::from(low.get()) | u64::from(high.get()) << 32;
        let bitmap = join(raw.block_bitmap_low, raw.block_bitmap_high);
        let inode_bitmap = join(raw.inode_bitmap_low, raw.inode_bitmap_high);
        let table = join(raw.inode_table_low, raw.inode_table_high);
        let limits = if sb.flex { sb.first_block + 1..sb.blocks } else { sb.group_blocks(number) };
        for (start, length) in [(bitmap, 1), (inode_bitmap, 1), (table, sb.inode_table_blocks)] {
            let end = start.checked_add(length);
            if start < limits.start || end.is_none_or(|end| end > limits.end) {
                return reason(format!("metadata of group {number} lies where it cannot be"));
            }
        }
        let start = sb.group_start(number);
        let head = start..start + sb.head_blocks(number);
        require(head.end <= sb.blocks, "copies of its descriptors reach past its end")?;
        taken.extend([head, bitmap..bitmap + 1, inode_bitmap..inode_bitmap + 1, table..table + sb.inode_table_blocks]);

        let high = if wide { u32::from(raw.free_blocks_high.get()) << 16 } else { 0 };
        let sum_high = u32::from(raw.block_bitmap_sum_high.get()) << 16; // 0 in short descriptors
        self.groups.push(Group {
            bitmap: (flags & BLOCK_UNINIT == 0).then_some(bitmap),
            free: u32::from(raw.free_blocks_low.get()) | high,
            sum: u32::from(raw.block_bitmap_sum_low.get()) | sum_high,
        });
        Ok(())
    }

    /// Gives every free range to the sink, and checks everything on the way.
    pub(super) fn walk(&self, window: &Window<'_>, sink: &mut FreeSink<'_>, tick: &Tick<'_>) -> Checked<()> {
        let sb = &self.superblock;
        let mut bitmaps = Blocks::default();
        let mut total = 0;
        for (number, group) in (0..).zip(&self.groups) {
            let blocks = sb.group_blocks(number);
            let clusters = match group.bitmap {
                Some(place) => {
                    let side_by_side = self.bitmaps_from(number, place);
                    let bitmap = bitmaps.get(window, sb.block_size, place, side_by_side)?;
                    self.check_bitmap(number, group, bitmap)?;
                    self.used_group(&blocks, bitmap, sink)?
                }
                None => self.unused_group(&blocks, sink)?,
            };
            if clusters != u64::from(group.free) {
                let said = group.free;
                return reason(format!("group {number} has {clusters} free clusters, but its descriptor says {said}"));
            }
            total += clusters; // at most the clusters of the file system
            if sink.is_stopped() {
                return Ok(());
            }
            if number.is_multiple_of(64) {
                tick(blocks.end * sb.block_size)?; // below the size
            }
        }
        let blocks = total * sb.cluster_blocks;
        if blocks != sb.free_blocks {
            return reason(format!("{blocks} blocks are free, but its superblock says {}", sb.free_blocks));
        }
        Ok(())
    }

    /// How many block bitmaps lie side by side, from that of a group on. Groups without one have a place for it, which is
    /// read along when more follow.
    fn bitmaps_from(&self, group: u64, place: u64) -> u64 {
        let most = READ_BYTES_MAX / self.superblock.block_size;
        let behind = usize::try_from(group).unwrap_or(usize::MAX).saturating_add(1);
        let mut count = 1;
        for (step, next) in (1..most).zip(self.groups.iter().skip(behind)) {
            match next.bitmap {
                Some(next) if next == place.saturating_add(step) => count = step + 1,
                Some(_) => break,
                None => {}
            }
        }
        count
    }

    fn check_bitmap(&self, number: u64, group: &Group, bitmap: &[u8]) -> Checked<()> {
        let Sums::All { seed } = self.superblock.sums else { return Ok(()) };
        let covered = self.superblock.blocks_per_group / self.superblock.cluster_blocks / 8;
        let covered = bitmap.get(..usize::try_from(covered).unwrap_or(usize::MAX)).unwrap_or_default();
        let sum = sums::crc32c_raw(seed, covered);
        let sum = if self.superblock.descriptor_size > GROUP_BYTES_SMALL as u64 { sum } else { sum & 0xffff };
        if sums::same(group.sum, sum) {
            return Ok(());
        }
        reason(format!("the checksum of the block bitmap of group {number} is wrong"))
    }

    /// The free clusters of a group with a bitmap.
    fn used_group(&self, blocks: &Range<u64>, bitmap: &[u8], sink: &mut FreeSink<'_>) -> Checked<u64> {
        let ratio = self.superblock.cluster_blocks;
        let clusters = (blocks.end - blocks.start).div_ceil(ratio); // a group is not empty
        let mut free = 0;
        clear_runs(bitmap, clusters, &mut |run| {
            free += run.end - run.start;
            let start = blocks.start + run.start * ratio;
            let end = (blocks.start + run.end * ratio).min(blocks.end);
            if self.is_taken(start, end) {
                return reason(format!("metadata is marked as free near block {start}"));
            }
            self.give(start..end, sink)
        })?;
        Ok(free)
    }

    /// The free clusters of a group that was never used: all without metadata in them.
    fn unused_group(&self, blocks: &Range<u64>, sink: &mut FreeSink<'_>) -> Checked<u64> {
        let ratio = self.superblock.cluster_blocks;
        let first = self.taken.partition_point(|range| range.end <= blocks.start);
        let mut free = 0;
        let mut position = blocks.start;
        let inside = self.taken.iter().skip(first).take_while(|range| range.start < blocks.end);
        let behind = blocks.end..blocks.end;
        for range in inside.chain(std::iter::once(&behind)) {
            // Whole clusters before and behind what is taken, counted from where the group begins.
            let until = range.start.max(blocks.start) - blocks.start;
            let last = range.start >= blocks.end;
            let end = if last { blocks.end } else { blocks.start + until / ratio * ratio };
            if position < end {
                free += (end - position).div_ceil(ratio);
                self.give(position..end, sink)?;
            }
            let resumed = range.end.min(blocks.end) - blocks.start;
            position = position.max(blocks.start + resumed.div_ceil(ratio) * ratio);
        }
        Ok(free)
    }

    /// Whether metadata lies in a range of blocks.
    fn is_taken(&self, start: u64, end: u64) -> bool {
        let next = self.taken.partition_point(|range| range.end <= start);
        self.taken.get(next).is_some_and(|range| range.start < end)
    }

    fn give(&self, blocks: Range<u64>, sink: &mut FreeSink<'_>) -> Checked<()> {
        let size = self.superblock.block_size;
        sink.add(blocks.start * size..blocks.end * size) // below the size of the file system
    }
}

/// The kind that the features stand for, in order or not.
pub(super) fn kind_of(window: &Window<'_>) -> Checked<VolumeKind> {
    superblock::generation_of(window).map(Generation::kind)
}

impl Generation {
    const fn kind(self) -> VolumeKind {
        match self {
            Self::Two => VolumeKind::Ext2,
            Self::Three => VolumeKind::Ext3,
            Self::Four => VolumeKind::Ext4,
        }
    }
}

/// The checksum that a descriptor should have.
fn descriptor_sum(sb: &Super, number: u64, bytes: &[u8]) -> u16 {
    let group = U32::new(u32::try_from(number).unwrap_or_default()); // groups are fewer than 2^20
    let (before, rest) = bytes.split_at_checked(GROUP_SUM_OFFSET).unwrap_or_default();
    let (_, after) = rest.split_at_checked(size_of::<u16>()).unwrap_or_default();
    match sb.sums {
        Sums::None => before_sum(rest),
        Sums::Groups { start } => {
            let sum = sums::crc16(sums::crc16(start, group.as_bytes()), before);
            sums::crc16(sum, after)
        }
        Sums::All { seed } => {
            let sum = sums::crc32c_raw(sums::crc32c_raw(seed, group.as_bytes()), before);
            let sum = sums::crc32c_raw(sums::crc32c_raw(sum, &[0, 0]), after);
            let [low, high, ..] = sum.to_le_bytes();
            u16::from_le_bytes([low, high])
        }
    }
}

/// The field of the checksum itself: without checksums it may hold anything.
fn before_sum(rest: &[u8]) -> u16 {
    match rest {
        [low, high, ..] => u16::from_le_bytes([*low, *high]),
        _ => 0,
    }
}

/// Blocks, read many at a time where they lie side by side.
#[derive(Default)]
struct Blocks {
    /// The block that `bytes` begins with.
    first: u64,
    bytes: Vec<u8>,
}

impl Blocks {
    /// The block at `place`; when it is not there yet, `count` blocks are read from it on, as far as one read goes.
    fn get(&mut self, window: &Window<'_>, size: u64, place: u64, count: u64) -> Checked<&[u8]> {
        let loaded = self.bytes.len() as u64 / size;
        if place < self.first || place - self.first >= loaded {
            let count = count.clamp(1, READ_BYTES_MAX / size);
            self.bytes = window.read(place.saturating_mul(size), count * size)?;
            self.first = place;
        }
        let offset = usize::try_from((place - self.first) * size).unwrap_or(usize::MAX);
        let length = usize::try_from(size).unwrap_or_default();
        match self.bytes.get(offset..).and_then(|rest| rest.get(..length)) {
            Some(block) => Ok(block),
            None => reason("a block is cut off"),
        }
    }
}
