//! Structures of XFS as they lie on the disk: big-endian but for the checksums (XFS Algorithms & Data Structures).

use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::little_endian::U32 as Little32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// The superblock.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawSuper {
    pub(super) magic: [u8; 4],
    pub(super) block_size: U32,
    pub(super) blocks: U64,
    pub(super) realtime_blocks: U64,
    pub(super) realtime_extents: U64,
    pub(super) uuid: [u8; 16],
    pub(super) log_start: U64,
    pub(super) root_inode: U64,
    pub(super) realtime_inodes: [U64; 2],
    pub(super) realtime_extent_size: U32,
    pub(super) group_blocks: U32,
    pub(super) groups: U32,
    pub(super) realtime_bitmap_blocks: U32,
    pub(super) log_blocks: U32,
    pub(super) version: U16,
    pub(super) sector_size: U16,
    pub(super) inode_size: U16,
    pub(super) inodes_per_block: U16,
    pub(super) name: [u8; 12],
    pub(super) block_log: u8,
    pub(super) sector_log: u8,
    pub(super) inode_log: u8,
    pub(super) inodes_per_block_log: u8,
    pub(super) group_blocks_log: u8,
    pub(super) realtime_extents_log: u8,
    pub(super) being_made: u8,
    pub(super) inode_percent_max: u8,
    pub(super) inode_count: U64,
    pub(super) inodes_free: U64,
    pub(super) free_blocks: U64,
    pub(super) realtime_free: U64,
    pub(super) quota_inodes: [U64; 2],
    pub(super) quota_flags: U16,
    pub(super) flags: u8,
    pub(super) shared_version: u8,
    pub(super) alignments: [U32; 3],
    pub(super) directory_block_log: u8,
    pub(super) log_sector_log: u8,
    pub(super) log_sector_size: U16,
    pub(super) log_stripe: U32,
    pub(super) features2: U32,
    pub(super) bad_features2: U32,
    pub(super) compatible: U32,
    pub(super) read_only_compatible: U32,
    pub(super) incompatible: U32,
    pub(super) log_incompatible: U32,
    pub(super) checksum: Little32,
    pub(super) sparse_alignment: U32,
    pub(super) project_quota_inode: U64,
    pub(super) log_sequence: U64,
    pub(super) metadata_uuid: [u8; 16],
}

const _: () = assert!(
    offset_of!(RawSuper, log_start) == 48
        && offset_of!(RawSuper, group_blocks) == 84
        && offset_of!(RawSuper, version) == 100
        && offset_of!(RawSuper, block_log) == 120
        && offset_of!(RawSuper, group_blocks_log) == 124
        && offset_of!(RawSuper, being_made) == 126
        && offset_of!(RawSuper, free_blocks) == 144
        && offset_of!(RawSuper, shared_version) == 179
        && offset_of!(RawSuper, log_sector_size) == 194
        && offset_of!(RawSuper, features2) == 200
        && offset_of!(RawSuper, incompatible) == 216
        && offset_of!(RawSuper, checksum) == 224
        && offset_of!(RawSuper, metadata_uuid) == 248
        && size_of::<RawSuper>() == 264
);

/// The header of the free space of an allocation group.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawGroup {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) number: U32,
    pub(super) length: U32,
    /// By block, by count, reverse mappings.
    pub(super) roots: [U32; 3],
    pub(super) levels: [U32; 3],
    pub(super) list_first: U32,
    pub(super) list_last: U32,
    pub(super) list_count: U32,
    pub(super) free_blocks: U32,
    pub(super) longest: U32,
    pub(super) tree_blocks: U32,
    pub(super) uuid: [u8; 16],
    pub(super) reverse_blocks: U32,
    pub(super) reference_blocks: U32,
    pub(super) reference_root: U32,
    pub(super) reference_level: U32,
    pub(super) spare: [u8; 112],
    pub(super) log_sequence: U64,
    pub(super) checksum: Little32,
}

const _: () = assert!(
    offset_of!(RawGroup, roots) == 16
        && offset_of!(RawGroup, levels) == 28
        && offset_of!(RawGroup, list_first) == 40
        && offset_of!(RawGroup, free_blocks) == 52
        && offset_of!(RawGroup, uuid) == 64
        && offset_of!(RawGroup, reference_root) == 88
        && offset_of!(RawGroup, checksum) == 216
);

/// The head of the list of blocks kept for the free space trees, version 5.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawList {
    pub(super) magic: [u8; 4],
    pub(super) number: U32,
    pub(super) uuid: [u8; 16],
    pub(super) log_sequence: U64,
    pub(super) checksum: Little32,
}

/// The head of a block of a tree inside an allocation group, version 4.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawNode {
    pub(super) magic: [u8; 4],
    pub(super) level: U16,
    pub(super) records: U16,
    pub(super) left: U32,
    pub(super) right: U32,
}

/// What follows it in version 5.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawNodeTail {
    /// Where the block lies, in units of 512 bytes.
    pub(super) place: U64,
    pub(super) log_sequence: U64,
    pub(super) uuid: [u8; 16],
    pub(super) owner: U32,
    pub(super) checksum: Little32,
}

/// A free extent.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawFree {
    pub(super) start: U32,
    pub(super) count: U32,
}

/// The head of a log record.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawLogRecord {
    pub(super) magic: U32,
    pub(super) cycle: U32,
    pub(super) version: U32,
    pub(super) length: U32,
    pub(super) sequence: U64,
    pub(super) tail_sequence: U64,
    pub(super) checksum: Little32,
    pub(super) previous: U32,
    pub(super) operations: U32,
    pub(super) cycles: [u8; 256],
    pub(super) format: U32,
    pub(super) uuid: [u8; 16],
    /// Bytes of the buffer that wrote it.
    pub(super) size: U32,
}

/// The head of an operation in a log record.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawLogOperation {
    pub(super) transaction: U32,
    pub(super) length: U32,
    pub(super) client: u8,
    pub(super) flags: u8,
    pub(super) reserved: U16,
}

const _: () = assert!(
    offset_of!(RawList, checksum) == 32
        && size_of::<RawList>() == 36
        && size_of::<RawNode>() == 16
        && size_of::<RawNode>() + size_of::<RawNodeTail>() == 56
        && size_of::<RawNode>() + offset_of!(RawNodeTail, checksum) == 52
        && offset_of!(RawLogRecord, operations) == 40
        && offset_of!(RawLogRecord, uuid) == 304
        && offset_of!(RawLogRecord, size) == 320
        && size_of::<RawLogOperation>() == 12
);

/// Where the checksums lie in what they cover.
pub(super) mod sum {
    use super::{RawGroup, RawList, RawNode, RawNodeTail, RawSuper, offset_of};

    pub(in crate::guest::xfs) const SUPER: usize = offset_of!(RawSuper, checksum);
    pub(in crate::guest::xfs) const GROUP: usize = offset_of!(RawGroup, checksum);
    pub(in crate::guest::xfs) const LIST: usize = offset_of!(RawList, checksum);
    pub(in crate::guest::xfs) const NODE: usize = size_of::<RawNode>() + offset_of!(RawNodeTail, checksum);
}
