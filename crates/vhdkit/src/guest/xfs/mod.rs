//! Free space of XFS: the trees of free extents by block, one in each allocation group.
//!
//! ```text
//! group 0: | superblock | AGF | AGI | AGFL | trees, inodes, log, data ...   group 1: | its copy | AGF | ...
//!            AGF -> root -> nodes -> leaves: (start, count), (start, count), ...
//! ```
//!
//! Blocks of the AGFL are kept for the trees themselves, and are not in them; so they count as used. The sums of free blocks
//! have to agree with what AGF and superblock say. Source: XFS Algorithms & Data Structures, 3rd edition.

mod group;
mod log;
mod raw;

use self::raw::RawSuper;
use super::sums;
use super::window::{Checked, FreeSink, Tick, Window, parse, reason, require};

/// Bits of `version`.
mod version {
    pub(super) const NUMBER: u16 = 0xf;
    pub(super) const SHARED: u16 = 0x200;
    pub(super) const MORE_BITS: u16 = 0x8000;
    /// Number, attributes, links, quota, alignments, second log version, sectors, unwritten extents, second directory
    /// version, case folding, more bits.
    pub(super) const UNDERSTOOD: u16 =
        0xf | 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x400 | 0x800 | 0x1000 | 0x2000 | 0x4000 | 0x8000;
}

/// Bits of `features2`: lazy counters, second attributes, project identifiers, checksums, file types.
mod features2 {
    pub(super) const LAZY_COUNTERS: u32 = 0x2;
    pub(super) const UNDERSTOOD: u32 = 0x2 | 0x8 | 0x80 | 0x100 | 0x200;
}

/// Bits of the features of version 5.
mod features {
    /// Free inode tree, reverse mappings, reference counts, counts of inode trees.
    pub(super) const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x4 | 0x8;
    pub(super) const METADATA_UUID: u32 = 0x4;
    pub(super) const NEEDS_REPAIR: u32 = 0x10;
    /// File types, sparse inodes, metadata UUID, big times, large extent counts, exchange of ranges, parent pointers.
    pub(super) const INCOMPATIBLE: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
}

/// Smallest allocation group: mkfs makes none below 16 MiB.
const GROUP_BYTES_MIN: u64 = 16 << 20;
/// Largest allocation group: 1 TiB.
const GROUP_BYTES_MAX: u64 = 1 << 40;

/// A file system whose superblock is in order, and whose log is empty.
#[derive(Clone, Debug)]
pub(super) struct Xfs {
    block: u64,
    blocks: u64,
    sector: u64,
    group_blocks: u64,
    groups: u64,
    free_blocks: u64,
    /// Version 5: with checksums.
    summed: bool,
    lazy_counters: bool,
    uuid: [u8; 16],
    /// The log: its group, and its blocks there.
    log_group: u64,
    log_blocks: std::ops::Range<u64>,
    /// Bytes of a sector of the log.
    log_offset: u64,
}

impl Xfs {
    /// Reads the superblock and the ends of the log.
    pub(super) fn open(window: &Window<'_>) -> Checked<Self> {
        let raw: RawSuper = window.read_struct(0)?;
        let this = Self::numbers(&raw)?;
        require(this.bytes() <= window.length(), "it is larger than what it lies in")?;
        if this.summed {
            let sector = window.read(0, this.sector)?;
            require(sum_is_right(&sector, sum_offset::SUPER), "the checksum of its superblock is wrong")?;
        }
        log::is_clean(&this, window)?;
        Ok(this)
    }

    fn numbers(raw: &RawSuper) -> Checked<Self> {
        let summed = features(raw)?;
        let (block, sector) = (u64::from(raw.block_size.get()), u64::from(raw.sector_size.get()));
        let log = |shift: u8| 1_u64.checked_shl(u32::from(shift)).unwrap_or(0);
        require(block == log(raw.block_log) && (512..=65536).contains(&block), "its block size is not one")?;
        let fits = sector == log(raw.sector_log) && (512..=32768).contains(&sector) && sector <= block;
        require(fits, "its sector size is not one")?;
        let (group_blocks, groups) = (u64::from(raw.group_blocks.get()), u64::from(raw.groups.get()));
        let blocks = raw.blocks.get();
        let size = group_blocks * block;
        let fits = (GROUP_BYTES_MIN..=GROUP_BYTES_MAX).contains(&size)
            && groups > 0
            && blocks <= groups * group_blocks
            && blocks > (groups - 1) * group_blocks;
        require(fits, "its allocation groups do not make up its blocks")?;
        require(log(raw.group_blocks_log) == group_blocks.next_power_of_two(), "its numbers do not agree")?;
        require(blocks < 1 << 48 && raw.free_blocks.get() <= blocks, "its numbers do not agree")?;

        let (start, log_length) = (raw.log_start.get(), u64::from(raw.log_blocks.get()));
        require(start != 0, "its log is on another device")?;
        let (log_group, first) = (start >> raw.group_blocks_log, start & (log(raw.group_blocks_log) - 1));
        let length = group_length(blocks, groups, group_blocks, log_group);
        let inside = log_group < groups && log_length > 0 && first + log_length <= length;
        require(inside, "its log lies outside of a group")?;
        Ok(Self {
            block,
            blocks,
            sector,
            group_blocks,
            groups,
            free_blocks: raw.free_blocks.get(),
            summed,
            lazy_counters: summed || raw.features2.get() & features2::LAZY_COUNTERS != 0,
            uuid: if summed && raw.incompatible.get() & features::METADATA_UUID != 0 {
                raw.metadata_uuid
            } else {
                raw.uuid
            },
            log_group,
            log_blocks: first..first + log_length,
            log_offset: (log_group * group_blocks + first) * block,
        })
    }

    /// Bytes that the file system covers.
    pub(super) const fn bytes(&self) -> u64 {
        self.blocks * self.block // below 2^64: 2^48 blocks of 2^16 bytes
    }

    /// Bytes of a block.
    pub(super) const fn cluster_bytes(&self) -> u64 {
        self.block
    }

    /// Blocks of a group.
    fn group_length(&self, group: u64) -> u64 {
        group_length(self.blocks, self.groups, self.group_blocks, group)
    }

    /// Gives every free range to the sink, and checks everything on the way.
    pub(super) fn walk(&self, window: &Window<'_>, sink: &mut FreeSink<'_>, tick: &Tick<'_>) -> Checked<()> {
        let mut total = 0;
        for number in 0..self.groups {
            total += group::walk(self, window, number, sink)?; // below the number of blocks
            if sink.is_stopped() {
                return Ok(());
            }
            tick(((number + 1) * self.group_blocks).min(self.blocks) * self.block)?;
        }
        if total == self.free_blocks {
            return Ok(());
        }
        reason(format!("{total} blocks are free, but its superblock says {}", self.free_blocks))
    }
}

use self::raw::sum as sum_offset;

/// Blocks of a group: the last one may be shorter.
const fn group_length(blocks: u64, groups: u64, group_blocks: u64, group: u64) -> u64 {
    if group + 1 == groups { blocks - (groups - 1) * group_blocks } else { group_blocks }
}

/// Refuses what is not on the lists; whether it is version 5.
fn features(raw: &RawSuper) -> Checked<bool> {
    let bits = raw.version.get();
    let number = bits & version::NUMBER;
    require(matches!(number, 4 | 5), "its version is neither 4 nor 5")?;
    require(raw.being_made == 0, "it has not been made to its end")?;
    require(raw.realtime_blocks.get() == 0, "it has a real-time device")?;
    require(bits & version::SHARED == 0, "it has features that are not understood (shared)")?;
    let mut unknown = vec![("version", u32::from(bits & !version::UNDERSTOOD))];
    if bits & version::MORE_BITS != 0 {
        unknown.push(("second", raw.features2.get() & !features2::UNDERSTOOD));
    }
    if number == 5 {
        require(raw.incompatible.get() & features::NEEDS_REPAIR == 0, "it says that it needs xfs_repair")?;
        unknown.push(("compatible", raw.compatible.get()));
        unknown.push(("read-only compatible", raw.read_only_compatible.get() & !features::READ_ONLY_COMPATIBLE));
        unknown.push(("incompatible", raw.incompatible.get() & !features::INCOMPATIBLE));
        unknown.push(("log", raw.log_incompatible.get()));
    }
    match unknown.into_iter().find(|(_, bits)| *bits != 0) {
        Some((kind, bits)) => reason(format!("it has {kind} features that are not understood ({bits:#x})")),
        None => Ok(number == 5),
    }
}

/// Whether a structure has the checksum that stands in it at `offset`: CRC-32C with the field itself as zero.
fn sum_is_right(bytes: &[u8], offset: usize) -> bool {
    let field = size_of::<u32>();
    let Some((before, rest)) = bytes.split_at_checked(offset) else { return false };
    let Some((stored, after)) = rest.split_at_checked(field) else { return false };
    let Ok(stored) = parse::<zerocopy::little_endian::U32>(stored, 0) else { return false };
    let sum = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    sums::same(stored.get(), crc32c::crc32c_append(sum, after))
}
