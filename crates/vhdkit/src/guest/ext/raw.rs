//! The superblock, the group descriptor and what else is read of ext2, ext3 and ext4, as they lie on the disk
//! (Linux kernel, Documentation/filesystems/ext4).

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where the superblock lies.
pub(super) const SUPER_OFFSET: u64 = 1024;
/// The magic number of the superblock.
pub(super) const MAGIC: u16 = 0xef53;

/// The superblock.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawSuper {
    pub(super) inodes_count: U32,
    pub(super) blocks_count_low: U32,
    pub(super) reserved_blocks_low: U32,
    pub(super) free_blocks_low: U32,
    pub(super) free_inodes: U32,
    pub(super) first_data_block: U32,
    pub(super) log_block_size: U32,
    pub(super) log_cluster_size: U32,
    pub(super) blocks_per_group: U32,
    pub(super) clusters_per_group: U32,
    pub(super) inodes_per_group: U32,
    pub(super) times: [u8; 12],
    pub(super) magic: U16,
    pub(super) state: U16,
    pub(super) errors_behaviour: [u8; 16],
    pub(super) revision: U32,
    pub(super) reserved_owner: [u8; 4],
    pub(super) first_inode: U32,
    pub(super) inode_size: U16,
    pub(super) group_number: U16,
    pub(super) compatible: U32,
    pub(super) incompatible: U32,
    pub(super) read_only_compatible: U32,
    pub(super) uuid: [u8; 16],
    pub(super) names: [u8; 84],
    pub(super) preallocated: [u8; 2],
    pub(super) reserved_gdt_blocks: U16,
    pub(super) journal_uuid: [u8; 16],
    pub(super) journal_inode: U32,
    pub(super) journal_device: U32,
    pub(super) last_orphan: U32,
    pub(super) hash_seed: [u8; 18],
    pub(super) descriptor_size: U16,
    pub(super) mount_options: U32,
    pub(super) first_meta_bg: U32,
    pub(super) made_time: U32,
    pub(super) journal_backup: [u8; 68],
    pub(super) blocks_count_high: U32,
    pub(super) reserved_blocks_high: U32,
    pub(super) free_blocks_high: U32,
    pub(super) extra_inode_sizes: [u8; 4],
    pub(super) flags: U32,
    pub(super) raid_stride: [u8; 4],
    pub(super) mmp_block: U64,
    pub(super) raid_stripe_width: U32,
    pub(super) log_groups_per_flex: u8,
    pub(super) checksum_type: u8,
    pub(super) reserved: [u8; 30],
    pub(super) error_count: U32,
    pub(super) error_details: [u8; 180],
    pub(super) backup_groups: [U32; 2],
    pub(super) encryption: [u8; 28],
    pub(super) checksum_seed: U32,
    pub(super) rest: [u8; 392],
    pub(super) checksum: U32,
}

const _: () = assert!(
    size_of::<RawSuper>() == 1024
        && offset_of!(RawSuper, magic) == 0x38
        && offset_of!(RawSuper, revision) == 0x4c
        && offset_of!(RawSuper, compatible) == 0x5c
        && offset_of!(RawSuper, reserved_gdt_blocks) == 0xce
        && offset_of!(RawSuper, journal_inode) == 0xe0
        && offset_of!(RawSuper, descriptor_size) == 0xfe
        && offset_of!(RawSuper, first_meta_bg) == 0x104
        && offset_of!(RawSuper, blocks_count_high) == 0x150
        && offset_of!(RawSuper, mmp_block) == 0x168
        && offset_of!(RawSuper, log_groups_per_flex) == 0x174
        && offset_of!(RawSuper, error_count) == 0x194
        && offset_of!(RawSuper, backup_groups) == 0x24c
        && offset_of!(RawSuper, checksum_seed) == 0x270
        && offset_of!(RawSuper, checksum) == 0x3fc
);

/// A group descriptor of 64 bytes; one of 32 is its first half.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawGroup {
    pub(super) block_bitmap_low: U32,
    pub(super) inode_bitmap_low: U32,
    pub(super) inode_table_low: U32,
    pub(super) free_blocks_low: U16,
    pub(super) free_inodes_low: U16,
    pub(super) directories_low: U16,
    pub(super) flags: U16,
    pub(super) exclude_bitmap_low: U32,
    pub(super) block_bitmap_sum_low: U16,
    pub(super) inode_bitmap_sum_low: U16,
    pub(super) unused_inodes_low: U16,
    pub(super) checksum: U16,
    pub(super) block_bitmap_high: U32,
    pub(super) inode_bitmap_high: U32,
    pub(super) inode_table_high: U32,
    pub(super) free_blocks_high: U16,
    pub(super) counts_high: [u8; 6],
    pub(super) exclude_bitmap_high: U32,
    pub(super) block_bitmap_sum_high: U16,
    pub(super) inode_bitmap_sum_high: U16,
    pub(super) reserved: U32,
}

/// Where the checksum of a descriptor lies.
pub(super) const GROUP_SUM_OFFSET: usize = offset_of!(RawGroup, checksum);
/// Bytes of a descriptor without the feature `64bit`.
pub(super) const GROUP_BYTES_SMALL: usize = 32;

const _: () = assert!(
    size_of::<RawGroup>() == 64
        && offset_of!(RawGroup, flags) == 0x12
        && GROUP_SUM_OFFSET == 0x1e
        && offset_of!(RawGroup, block_bitmap_high) == 0x20
        && offset_of!(RawGroup, free_blocks_high) == 0x2c
        && offset_of!(RawGroup, block_bitmap_sum_high) == 0x38
);

/// The defined beginning of an inode.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawInode {
    pub(super) before: [u8; 32],
    pub(super) flags: U32,
    pub(super) version: U32,
    pub(super) blocks: [u8; 60],
}

/// The head of a node of an extent tree.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawExtentHead {
    pub(super) magic: U16,
    pub(super) entries: U16,
    pub(super) entries_max: U16,
    pub(super) depth: U16,
    pub(super) generation: U32,
}

/// An entry of an extent tree: of a leaf, or of a node above.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawExtent {
    /// First block of the file.
    pub(super) block: U32,
    /// Leaf: length, then the high 16 bits of the place. Node: low 32 bits of the place.
    pub(super) middle: [u8; 4],
    /// Leaf: the low 32 bits of the place. Node: the high 16 bits, then nothing.
    pub(super) last: [u8; 4],
}

/// The beginning of the journal's superblock; big-endian.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawJournal {
    pub(super) magic: zerocopy::big_endian::U32,
    pub(super) kind: zerocopy::big_endian::U32,
    pub(super) before: [u8; 20],
    /// The block where the log begins; 0 when it holds nothing.
    pub(super) start: zerocopy::big_endian::U32,
}

/// The beginning of the block of the multiple mount protection.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawMultiMount {
    pub(super) magic: U32,
    pub(super) sequence: U32,
}

const _: () = assert!(
    offset_of!(RawInode, flags) == 0x20
        && offset_of!(RawInode, blocks) == 0x28
        && size_of::<RawInode>() == 100
        && size_of::<RawExtentHead>() == 12
        && size_of::<RawExtent>() == 12
        && offset_of!(RawJournal, start) == 28
);
