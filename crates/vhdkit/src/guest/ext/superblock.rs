//! The superblock of ext2, ext3 and ext4: what it says of the whole, and everything that speaks against trusting it.

use zerocopy::IntoBytes;

use super::raw::{
    GROUP_BYTES_SMALL, MAGIC, RawExtent, RawExtentHead, RawInode, RawJournal, RawMultiMount, RawSuper, SUPER_OFFSET,
};
use crate::guest::sums;
use crate::guest::window::{Checked, Window, parse, reason, require};

/// Bits of the compatible features.
mod compatible {
    pub(super) const HAS_JOURNAL: u32 = 0x4;
    pub(super) const SPARSE_SUPER2: u32 = 0x200;
    /// Preallocation, imagic, journal, attributes, resize inode, directory index, second kind of sparse superblocks, fast
    /// commits, stable inodes, orphan file.
    pub(super) const UNDERSTOOD: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x200 | 0x400 | 0x800 | 0x1000;
}

/// Bits of the incompatible features.
mod incompatible {
    pub(super) const RECOVER: u32 = 0x4;
    pub(super) const JOURNAL_DEVICE: u32 = 0x8;
    pub(super) const META_BG: u32 = 0x10;
    pub(super) const EXTENTS: u32 = 0x40;
    pub(super) const BITS64: u32 = 0x80;
    pub(super) const MULTI_MOUNT: u32 = 0x100;
    pub(super) const FLEX_BG: u32 = 0x200;
    pub(super) const CHECKSUM_SEED: u32 = 0x2000;
    /// File types, meta_bg, extents, 64bit, mmp, flex_bg, large attributes, checksum seed, large directories, inline data,
    /// encryption, case folding. None of the last moves a block out of sight of the bitmaps.
    pub(super) const UNDERSTOOD: u32 =
        0x2 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;
}

/// Bits of the features that a reader may ignore.
mod read_only_compatible {
    pub(super) const SPARSE_SUPER: u32 = 0x1;
    pub(super) const GROUP_SUMS: u32 = 0x10;
    pub(super) const BIGALLOC: u32 = 0x200;
    pub(super) const METADATA_SUMS: u32 = 0x400;
    pub(super) const ORPHANS: u32 = 0x1_0000;
    /// Sparse superblocks, large files, huge files, group checksums, many links, large inodes, quotas, bigalloc, metadata
    /// checksums, read-only, project quotas, verity.
    pub(super) const UNDERSTOOD: u32 =
        0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x8000;
}

/// `state`: unmounted in order, and nothing else.
const STATE_CLEAN: u16 = 1;
/// The sequence number of the multiple mount protection when nobody has the file system mounted.
const MULTI_MOUNT_CLEAN: u32 = 0xff4d_4d50;
/// The only kind of metadata checksum.
const CHECKSUM_CRC32C: u8 = 1;
/// Blocks of 64 KiB are the largest.
const LOG_BLOCK_SIZE_MAX: u32 = 6;
/// Clusters larger than this many blocks are not made by anybody.
const LOG_CLUSTER_RATIO_MAX: u32 = 16;
/// Fewest blocks of a group: mke2fs makes no fewer.
const GROUP_BLOCKS_MIN: u32 = 256;
/// Most groups that are kept in memory: 24 bytes each, 128 TiB in blocks of 4 KiB.
const GROUPS_MAX: u64 = 1 << 20;
/// An inode whose blocks are in an extent tree.
const INODE_EXTENTS: u32 = 0x8_0000;
/// The magic number of a node of an extent tree.
const EXTENT_MAGIC: u16 = 0xf30a;
/// Deepest extent tree.
const EXTENT_DEPTH_MAX: u16 = 5;
/// The magic number of the journal.
const JOURNAL_MAGIC: u32 = 0xc03b_3998;

/// How descriptors and bitmaps are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sums {
    /// Not at all.
    None,
    /// CRC-16 of the descriptors, over the identity.
    Groups { start: u16 },
    /// CRC-32C of everything, beginning with this.
    All { seed: u32 },
}

/// Which generation of the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Generation {
    Two,
    Three,
    Four,
}

/// What the superblock says, in numbers that fit together.
#[derive(Clone, Debug)]
pub(super) struct Super {
    pub(super) generation: Generation,
    pub(super) block_size: u64,
    pub(super) blocks: u64,
    pub(super) first_block: u64,
    pub(super) free_blocks: u64,
    pub(super) blocks_per_group: u64,
    /// Blocks of a cluster: 1 without bigalloc.
    pub(super) cluster_blocks: u64,
    pub(super) groups: u64,
    pub(super) descriptor_size: u64,
    /// Blocks of all descriptors.
    pub(super) descriptor_blocks: u64,
    pub(super) reserved_gdt_blocks: u64,
    /// Blocks of an inode table.
    pub(super) inode_table_blocks: u64,
    pub(super) sums: Sums,
    pub(super) flex: bool,
    /// Descriptor blocks from this one on lie in their groups; `None` without `meta_bg`.
    pub(super) first_meta_bg: Option<u64>,
    backups: Backups,
    journal_inode: Option<u32>,
    inode_size: u64,
}

#[derive(Clone, Copy, Debug)]
enum Backups {
    Everywhere,
    Powers,
    Named([u64; 2]),
}

impl Super {
    /// Reads and judges the superblock of a volume.
    pub(super) fn read(window: &Window<'_>) -> Checked<Self> {
        let raw: RawSuper = window.read_struct(SUPER_OFFSET)?;
        require(raw.magic.get() == MAGIC, "the superblock has no magic number")?;
        require(raw.revision.get() == 1, "its revision is not 1")?;
        features(&raw)?;
        check_sum(&raw)?;
        clean(&raw)?;
        let this = numbers(&raw)?;
        let bytes = this.blocks.checked_mul(this.block_size);
        require(bytes.is_some_and(|bytes| bytes <= window.length()), "it is larger than what it lies in")?;
        this.multi_mount(&raw, window)?;
        Ok(this)
    }

    /// Bytes that the file system covers.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks * self.block_size // checked when it was read
    }

    /// The first block of a group.
    pub(super) fn group_start(&self, group: u64) -> u64 {
        self.first_block + group * self.blocks_per_group // below `blocks`, as groups are counted from it
    }

    /// The blocks of a group.
    pub(super) fn group_blocks(&self, group: u64) -> std::ops::Range<u64> {
        let start = self.group_start(group);
        start..(start + self.blocks_per_group).min(self.blocks) // below 2^33 groups' worth
    }

    /// Whether a group begins with a copy of the superblock.
    pub(super) fn has_super(&self, group: u64) -> bool {
        let power = |base: u64| {
            let mut value = base;
            while value < group {
                value *= base; // at most 7 times GROUPS_MAX
            }
            value == group
        };
        match self.backups {
            _ if group == 0 => true,
            Backups::Everywhere => true,
            Backups::Powers => group == 1 || power(3) || power(5) || power(7),
            Backups::Named(named) => named.contains(&group),
        }
    }

    /// Descriptors in a block.
    pub(super) fn descriptors_per_block(&self) -> u64 {
        self.block_size / self.descriptor_size
    }

    /// The block that a descriptor block lies in.
    pub(super) fn descriptor_block(&self, number: u64) -> u64 {
        let super_block = SUPER_OFFSET / self.block_size;
        match self.first_meta_bg {
            Some(first) if number >= first => {
                let group = number * self.descriptors_per_block();
                let small = self.block_size == SUPER_OFFSET && number == 0 && self.first_block == 0;
                self.group_start(group) + u64::from(self.has_super(group)) + u64::from(small)
            }
            _ => super_block + 1 + number,
        }
    }

    /// How many blocks at the beginning of a group hold a superblock, descriptors, and room for more of them.
    pub(super) fn head_blocks(&self, group: u64) -> u64 {
        let boot = u64::from(group == 0 && self.block_size == SUPER_OFFSET && self.first_block == 0);
        let copy = u64::from(self.has_super(group));
        let meta_group = group / self.descriptors_per_block();
        let descriptors = match self.first_meta_bg {
            Some(first) if meta_group >= first => {
                let place = group % self.descriptors_per_block();
                u64::from(place < 2 || place + 1 == self.descriptors_per_block())
            }
            Some(first) => copy * (first + self.reserved_gdt_blocks),
            None => copy * (self.descriptor_blocks + self.reserved_gdt_blocks),
        };
        boot + copy + descriptors
    }

    fn multi_mount(&self, raw: &RawSuper, window: &Window<'_>) -> Checked<()> {
        if raw.incompatible.get() & incompatible::MULTI_MOUNT == 0 || raw.mmp_block.get() == 0 {
            return Ok(());
        }
        let block = raw.mmp_block.get();
        require(block < self.blocks, "the block of its multiple mount protection lies outside of it")?;
        let state: RawMultiMount = window.read_struct(block * self.block_size)?; // below the size
        require(
            state.magic.get() == 0x004d_4d50 && state.sequence.get() == MULTI_MOUNT_CLEAN,
            "its multiple mount protection says that it is mounted or being checked",
        )
    }

    /// Judges the journal's own superblock, which may say that there is something to replay.
    pub(super) fn journal_is_empty(&self, window: &Window<'_>, first_inode_table: u64) -> Checked<()> {
        let Some(inode) = self.journal_inode else { return Ok(()) };
        let table = first_inode_table.saturating_mul(self.block_size);
        let place = u64::from(inode - 1).saturating_mul(self.inode_size); // not 0: checked when it was read
        require(
            place < self.inode_table_blocks * self.block_size,
            "the inode of its journal lies outside of the table",
        )?;
        let raw: RawInode = window.read_struct(table.saturating_add(place))?;
        let block = if raw.flags.get() & INODE_EXTENTS == 0 {
            u64::from(parse::<zerocopy::little_endian::U32>(&raw.blocks, 0)?.get())
        } else {
            self.first_extent(&raw.blocks, window)?
        };
        require(block != 0 && block < self.blocks, "its journal lies outside of it")?;
        let journal: RawJournal = window.read_struct(block * self.block_size)?; // below the size
        require(journal.magic.get() == JOURNAL_MAGIC, "its journal has no magic number")?;
        require(journal.start.get() == 0, "its journal holds changes that are not in place yet")
    }

    /// The place of the first block of an extent tree.
    fn first_extent(&self, root: &[u8], window: &Window<'_>) -> Checked<u64> {
        let mut node = root.to_vec();
        for _ in 0..=EXTENT_DEPTH_MAX {
            let head: RawExtentHead = parse(&node, 0)?;
            let valid = head.magic.get() == EXTENT_MAGIC && head.entries.get() > 0;
            require(valid, "the extent tree of its journal is damaged")?;
            let entry: RawExtent = parse(&node, size_of::<RawExtentHead>())?;
            require(entry.block.get() == 0, "the extent tree of its journal is damaged")?;
            let ([m0, m1, m2, m3], [l0, l1, l2, l3]) = (entry.middle, entry.last);
            if head.depth.get() == 0 {
                return Ok(u64::from_le_bytes([l0, l1, l2, l3, m2, m3, 0, 0]));
            }
            let child = u64::from_le_bytes([m0, m1, m2, m3, l0, l1, 0, 0]);
            require(child < self.blocks, "the extent tree of its journal is damaged")?;
            node = window.read(child * self.block_size, self.block_size)?; // below the size
        }
        reason("the extent tree of its journal is too deep")
    }
}

/// Refuses what is not on the lists.
fn features(raw: &RawSuper) -> Checked<()> {
    let incompatible = raw.incompatible.get();
    require(incompatible & incompatible::JOURNAL_DEVICE == 0, "it is the journal of another file system")?;
    require(incompatible & incompatible::RECOVER == 0, "its journal has to be replayed: it was not unmounted")?;
    let ignorable = raw.read_only_compatible.get();
    require(ignorable & read_only_compatible::ORPHANS == 0, "it holds orphans: it was not unmounted in order")?;
    for (kind, unknown) in [
        ("compatible", raw.compatible.get() & !compatible::UNDERSTOOD),
        ("incompatible", incompatible & !incompatible::UNDERSTOOD),
        ("read-only compatible", ignorable & !read_only_compatible::UNDERSTOOD),
    ] {
        if unknown != 0 {
            return reason(format!("it has {kind} features that are not understood ({unknown:#x})"));
        }
    }
    let both = read_only_compatible::GROUP_SUMS | read_only_compatible::METADATA_SUMS;
    require(ignorable & both != both, "it claims two kinds of checksums at once")?;
    let both = incompatible & incompatible::CHECKSUM_SEED != 0 && ignorable & read_only_compatible::METADATA_SUMS == 0;
    require(!both, "it has a seed for checksums, but no checksums")
}

fn check_sum(raw: &RawSuper) -> Checked<()> {
    if raw.read_only_compatible.get() & read_only_compatible::METADATA_SUMS == 0 {
        return Ok(());
    }
    require(raw.checksum_type == CHECKSUM_CRC32C, "its kind of checksum is not understood")?;
    let covered = raw.as_bytes().get(..size_of::<RawSuper>() - size_of::<u32>()).unwrap_or_default();
    require(sums::same(raw.checksum.get(), sums::crc32c_raw(!0, covered)), "the checksum of its superblock is wrong")
}

/// Refuses a file system that was in use, or that has errors.
fn clean(raw: &RawSuper) -> Checked<()> {
    let state = raw.state.get();
    require(state & 2 == 0 && raw.error_count.get() == 0, "it has recorded errors: it needs e2fsck")?;
    require(state == STATE_CLEAN, "it was not unmounted in order")?;
    require(raw.last_orphan.get() == 0, "it holds orphans: it was not unmounted in order")
}

/// Bytes of a block, and blocks of a cluster.
fn sizes(raw: &RawSuper, bigalloc: bool) -> Checked<(u64, u64)> {
    let log_size = raw.log_block_size.get();
    require(log_size <= LOG_BLOCK_SIZE_MAX, "its block size is not one")?;
    let block_size = SUPER_OFFSET << log_size; // at most 64 KiB
    match raw.log_cluster_size.get().checked_sub(log_size) {
        Some(0) => Ok((block_size, 1)),
        Some(ratio) if bigalloc && ratio <= LOG_CLUSTER_RATIO_MAX => Ok((block_size, 1 << ratio)),
        _ => reason("its cluster size is not one"),
    }
}

/// The numbers, checked against each other.
fn numbers(raw: &RawSuper) -> Checked<Super> {
    let (incompatible, ignorable) = (raw.incompatible.get(), raw.read_only_compatible.get());
    let bigalloc = ignorable & read_only_compatible::BIGALLOC != 0;
    let (block_size, cluster_blocks) = sizes(raw, bigalloc)?;
    let wide = incompatible & incompatible::BITS64 != 0;
    let join = |low: u32, high: u32| u64::from(low) | if wide { u64::from(high) << 32 } else { 0 };
    let blocks = join(raw.blocks_count_low.get(), raw.blocks_count_high.get());
    let free_blocks = join(raw.free_blocks_low.get(), raw.free_blocks_high.get());
    let first_block = u64::from(raw.first_data_block.get());
    require(first_block == u64::from(block_size == SUPER_OFFSET && !bigalloc), "its first block is not where it is")?;
    require(
        blocks > first_block && blocks < 1 << 48 && free_blocks <= blocks + cluster_blocks,
        "its number of blocks is not one",
    )?;

    let (per_group, clusters) = (raw.blocks_per_group.get(), u64::from(raw.clusters_per_group.get()));
    let blocks_per_group = u64::from(per_group);
    let shape = per_group >= GROUP_BLOCKS_MIN
        && clusters.is_multiple_of(8)
        && clusters <= block_size * 8
        && clusters * cluster_blocks == blocks_per_group;
    require(shape, "the size of its groups is not one")?;
    let groups = (blocks - first_block).div_ceil(blocks_per_group);
    require(groups <= GROUPS_MAX, "it has more groups than are supported")?;

    let inode_size = u64::from(raw.inode_size.get());
    require(inode_size.is_power_of_two() && (128..=block_size).contains(&inode_size), "its inode size is not one")?;
    let inodes = u64::from(raw.inodes_per_group.get());
    require(inodes > 0 && inodes <= block_size * 8, "the number of its inodes is not one")?;
    let descriptor_size = if wide { u64::from(raw.descriptor_size.get()) } else { GROUP_BYTES_SMALL as u64 };
    let fits = descriptor_size.is_power_of_two() && (if wide { 64..=1024 } else { 32..=32 }).contains(&descriptor_size);
    require(fits, "the size of its group descriptors is not one")?;
    let descriptor_blocks = groups.div_ceil(block_size / descriptor_size);
    let first_meta_bg = u64::from(raw.first_meta_bg.get());
    let meta = incompatible & incompatible::META_BG != 0;
    require(!meta || first_meta_bg <= descriptor_blocks, "its first meta group is not one")?;

    let compatible = raw.compatible.get();
    let has_journal = compatible & compatible::HAS_JOURNAL != 0;
    let journal = raw.journal_inode.get();
    require(!has_journal || journal != 0, "its journal is on another device")?;
    let backups = if compatible & compatible::SPARSE_SUPER2 != 0 {
        Backups::Named(raw.backup_groups.map(|group| u64::from(group.get())))
    } else if ignorable & read_only_compatible::SPARSE_SUPER != 0 {
        Backups::Powers
    } else {
        Backups::Everywhere
    };
    Ok(Super {
        generation: generation(compatible, incompatible, ignorable),
        block_size,
        blocks,
        first_block,
        free_blocks,
        blocks_per_group,
        cluster_blocks,
        groups,
        descriptor_size,
        descriptor_blocks,
        reserved_gdt_blocks: u64::from(raw.reserved_gdt_blocks.get()),
        inode_table_blocks: (inodes * inode_size).div_ceil(block_size),
        sums: sums_of(raw),
        flex: incompatible & incompatible::FLEX_BG != 0,
        first_meta_bg: meta.then_some(first_meta_bg),
        backups,
        journal_inode: has_journal.then_some(journal),
        inode_size,
    })
}

fn sums_of(raw: &RawSuper) -> Sums {
    let ignorable = raw.read_only_compatible.get();
    if ignorable & read_only_compatible::METADATA_SUMS != 0 {
        let given = raw.incompatible.get() & incompatible::CHECKSUM_SEED != 0;
        let seed = if given { raw.checksum_seed.get() } else { sums::crc32c_raw(!0, &raw.uuid) };
        Sums::All { seed }
    } else if ignorable & read_only_compatible::GROUP_SUMS != 0 {
        Sums::Groups { start: sums::crc16(!0, &raw.uuid) }
    } else {
        Sums::None
    }
}

/// The generation of a file system that may not be in order.
pub(super) fn generation_of(window: &Window<'_>) -> Checked<Generation> {
    let raw: RawSuper = window.read_struct(SUPER_OFFSET)?;
    // Whether the journal has to be replayed says nothing of the generation.
    let incompatible = raw.incompatible.get() & !incompatible::RECOVER;
    Ok(generation(raw.compatible.get(), incompatible, raw.read_only_compatible.get()))
}

/// The name that the features stand for, as blkid gives it: ext4 has what ext3 does not know.
fn generation(compatible: u32, incompatible: u32, ignorable: u32) -> Generation {
    const INCOMPATIBLE_OF_THREE: u32 = 0x2 | incompatible::META_BG;
    const IGNORABLE_OF_THREE: u32 = 0x1 | 0x2;
    if incompatible & !INCOMPATIBLE_OF_THREE != 0
        || ignorable & !IGNORABLE_OF_THREE != 0
        || incompatible & incompatible::EXTENTS != 0
    {
        Generation::Four
    } else if compatible & compatible::HAS_JOURNAL != 0 {
        Generation::Three
    } else {
        Generation::Two
    }
}
