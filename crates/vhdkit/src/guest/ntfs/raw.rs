//! Structures of NTFS as they lie on the disk (Linux-NTFS documentation; libfsntfs' description of the format).

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// The boot sector.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawBoot {
    pub(super) jump: [u8; 3],
    pub(super) name: [u8; 8],
    pub(super) bytes_per_sector: U16,
    pub(super) sectors_per_cluster: u8,
    pub(super) of_fat: [u8; 26],
    pub(super) sectors: U64,
    pub(super) table_cluster: U64,
    pub(super) mirror_cluster: U64,
    pub(super) clusters_per_record: u8,
    pub(super) reserved: [u8; 3],
    pub(super) clusters_per_index: u8,
    pub(super) code: [u8; 441],
    pub(super) signature: [u8; 2],
}

const _: () = assert!(
    size_of::<RawBoot>() == 512
        && offset_of!(RawBoot, bytes_per_sector) == 0x0b
        && offset_of!(RawBoot, sectors) == 0x28
        && offset_of!(RawBoot, table_cluster) == 0x30
        && offset_of!(RawBoot, clusters_per_record) == 0x40
        && offset_of!(RawBoot, clusters_per_index) == 0x44
        && offset_of!(RawBoot, signature) == 510
);

impl RawBoot {
    /// The numbers that a copy has to have, too.
    pub(super) const fn numbers(&self) -> (U16, u8, U64, U64, U64, [u8; 5]) {
        let [a, b, c] = self.reserved;
        let rest = [self.clusters_per_record, a, b, c, self.clusters_per_index];
        (self.bytes_per_sector, self.sectors_per_cluster, self.sectors, self.table_cluster, self.mirror_cluster, rest)
    }
}

/// What begins every structure whose sectors are stamped.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawStamped {
    pub(super) magic: [u8; 4],
    pub(super) stamps_offset: U16,
    pub(super) stamps_count: U16,
}

/// The head of a record of the master file table.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawRecord {
    pub(super) stamped: RawStamped,
    pub(super) log_sequence: U64,
    pub(super) sequence: U16,
    pub(super) links: U16,
    pub(super) attributes_offset: U16,
    pub(super) flags: U16,
    pub(super) bytes_used: U32,
    pub(super) bytes_allocated: U32,
    pub(super) base: U64,
}

/// The head of an attribute.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawAttribute {
    pub(super) kind: U32,
    pub(super) length: U32,
    pub(super) elsewhere: u8,
    pub(super) name_length: u8,
    pub(super) name_offset: U16,
    pub(super) flags: U16,
    pub(super) identifier: U16,
}

/// What follows the head when the value is in the record.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawResident {
    pub(super) head: RawAttribute,
    pub(super) value_length: U32,
    pub(super) value_offset: U16,
}

/// What follows the head when the value lies in clusters.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawElsewhere {
    pub(super) head: RawAttribute,
    pub(super) first_cluster: U64,
    pub(super) last_cluster: U64,
    pub(super) runs_offset: U16,
    pub(super) compression_unit: u8,
    pub(super) reserved: [u8; 5],
    pub(super) allocated_bytes: U64,
    pub(super) data_bytes: U64,
    pub(super) initialized_bytes: U64,
}

const _: () = assert!(
    size_of::<RawRecord>() == 40
        && offset_of!(RawRecord, attributes_offset) == 0x14
        && offset_of!(RawRecord, flags) == 0x16
        && offset_of!(RawRecord, base) == 0x20
        && size_of::<RawAttribute>() == 16
        && offset_of!(RawResident, value_offset) == 0x14
        && offset_of!(RawElsewhere, runs_offset) == 0x20
        && offset_of!(RawElsewhere, data_bytes) == 0x30
        && size_of::<RawElsewhere>() == 64
);

/// The value of `$VOLUME_INFORMATION`.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawVolumeInformation {
    pub(super) reserved: U64,
    pub(super) major: u8,
    pub(super) minor: u8,
    pub(super) flags: U16,
}

/// A restart page of `$LogFile`.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawRestartPage {
    pub(super) stamped: RawStamped,
    pub(super) check_disk_sequence: U64,
    pub(super) system_page_bytes: U32,
    pub(super) log_page_bytes: U32,
    pub(super) area_offset: U16,
    pub(super) minor: U16,
    pub(super) major: U16,
}

/// The restart area in a restart page.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawRestartArea {
    pub(super) sequence: U64,
    pub(super) clients: U16,
    pub(super) free_clients: U16,
    pub(super) clients_in_use: U16,
    pub(super) flags: U16,
}

const _: () = assert!(
    offset_of!(RawVolumeInformation, flags) == 10
        && offset_of!(RawRestartPage, system_page_bytes) == 0x10
        && offset_of!(RawRestartPage, area_offset) == 0x18
        && offset_of!(RawRestartPage, major) == 0x1c
        && offset_of!(RawRestartArea, clients_in_use) == 0x0c
        && size_of::<RawRestartArea>() == 16
);

/// The head of an index: its offsets count from here.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawIndexHead {
    pub(super) entries_offset: U32,
    pub(super) entries_bytes: U32,
    pub(super) allocated_bytes: U32,
    pub(super) flags: U32,
}

/// What comes before the head of an index in the value of `$INDEX_ROOT`.
pub(super) const INDEX_ROOT_HEAD_OFFSET: usize = 16;
/// The same in a block of `$INDEX_ALLOCATION`.
pub(super) const INDEX_BLOCK_HEAD_OFFSET: usize = 24;

/// An entry of a directory, with the beginning of its file name.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawIndexEntry {
    pub(super) file: U64,
    pub(super) length: U16,
    pub(super) key_length: U16,
    pub(super) flags: U32,
}

/// The beginning of the key of a directory entry, up to the name.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawFileName {
    pub(super) before: [u8; 64],
    pub(super) characters: u8,
    pub(super) name_space: u8,
}

/// Where the volume header of shadow copies lies (libvshadow's description of the format).
pub(super) const SHADOW_OFFSET: u64 = 0x1e00;
/// What it begins with: 3808876b-c176-4e48-b7ae-04046e6cc752.
pub(super) const SHADOW_GUID: u128 = 0x3808_876b_c176_4e48_b7ae_0404_6e6c_c752;

/// The volume header of shadow copies.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawShadow {
    pub(super) guid: crate::format::guid::Guid,
    pub(super) version: U32,
    pub(super) record_type: U32,
    pub(super) offsets: [u8; 24],
    /// Where the catalogue of shadow copies lies; 0 when there are none.
    pub(super) catalog: U64,
}

const _: () = assert!(
    size_of::<RawIndexHead>() == 16
        && size_of::<RawIndexEntry>() == 16
        && size_of::<RawFileName>() == 66
        && offset_of!(RawShadow, catalog) == 48
);
