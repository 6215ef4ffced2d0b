//! The metadata table and its items ([MS-VHDX] 2.6).

use std::collections::HashSet;
use std::mem::offset_of;
use std::ops::Range;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::DISK_SIZE_MAX;
use super::finding::{Code, Findings, Location};
use super::geometry::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, Geometry};
use super::guid::Guid;
use super::locator::ParentLocator;
use super::region::Region;
use crate::error::Result;
use crate::units::{MIB, is_aligned};

/// Bytes of the metadata table.
pub const TABLE_BYTES: usize = 65536;
/// The first eight bytes of the metadata table.
pub const SIGNATURE: [u8; 8] = *b"metadata";
/// Most entries a table has room for.
pub const ENTRIES_MAX: u16 = 2047;
/// Most entries that may be user items.
pub const USER_ENTRIES_MAX: usize = 1024;
/// Longest item.
pub const ITEM_BYTES_MAX: u32 = 1 << 20;
/// Largest metadata region that is accepted: room for every item at its longest would be 2 GiB, and no writer is known
/// to make more than a few MiB.
pub const REGION_BYTES_MAX: u64 = 128 << 20;

/// File parameters: block size and type.
pub const FILE_PARAMETERS: Guid = Guid::from_printed(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
/// Virtual disk size.
pub const VIRTUAL_DISK_SIZE: Guid = Guid::from_printed(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
/// Virtual disk ID, for SCSI page 83.
pub const VIRTUAL_DISK_ID: Guid = Guid::from_printed(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
/// Logical sector size.
pub const LOGICAL_SECTOR_SIZE: Guid = Guid::from_printed(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
/// Physical sector size.
pub const PHYSICAL_SECTOR_SIZE: Guid = Guid::from_printed(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
/// Parent locator.
pub const PARENT_LOCATOR: Guid = Guid::from_printed(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
/// Present while the program that makes the file has not finished; not in the specification.
pub const INCOMPLETE_FILE: Guid = Guid::from_printed(0x71cc_85f0_1b69_4e28_9558_c3bf_83ae_75d3);
/// Cylinders, heads and sectors; not in the specification.
pub const CHS_PARAMETERS: Guid = Guid::from_printed(0xda02_d7bc_3d3a_423c_ac88_2a36_ab21_479b);
/// Label storage of a persistent memory disk; not in the specification.
pub const PMEM_LABELS: Guid = Guid::from_printed(0x10e1_ae8a_4b7e_4169_a40f_cd70_de92_8393);

/// Flag of a table entry: the item belongs to a user of the disk, not to the format.
pub const FLAG_USER: u32 = 1;
/// Flag of a table entry: the item describes the virtual disk, not the file.
pub const FLAG_VIRTUAL_DISK: u32 = 2;
/// Flag of a table entry: refuse the file when the item is unknown.
pub const FLAG_REQUIRED: u32 = 4;

/// File parameters flag: keep blocks allocated (a fixed disk).
pub const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
/// File parameters flag: the disk has a parent.
pub const HAS_PARENT: u32 = 2;

/// The header of the metadata table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawTableHeader {
    /// `metadata`.
    pub signature: [u8; 8],
    /// Zero.
    pub reserved: U16,
    /// Entries that follow.
    pub entry_count: U16,
    /// Zero.
    pub reserved2: [u8; 20],
}

/// One entry of the metadata table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawEntry {
    /// What the item is.
    pub item_id: Guid,
    /// From the start of the region.
    pub offset: U32,
    /// Its bytes.
    pub length: U32,
    /// User, virtual disk, required.
    pub flags: U32,
    /// Zero.
    pub reserved2: U32,
}

/// The file parameters item.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawFileParameters {
    /// Bytes of a payload block.
    pub block_size: U32,
    /// Leave blocks allocated, has parent.
    pub flags: U32,
}

const _: () = assert!(
    size_of::<RawTableHeader>() == 32
        && offset_of!(RawTableHeader, entry_count) == 10
        && size_of::<RawEntry>() == 32
        && offset_of!(RawEntry, offset) == 16
        && offset_of!(RawEntry, length) == 20
        && offset_of!(RawEntry, flags) == 24
        && offset_of!(RawEntry, reserved2) == 28
        && 32 + 32 * ENTRIES_MAX as usize == TABLE_BYTES
        && size_of::<RawFileParameters>() == 8
        && offset_of!(RawFileParameters, flags) == 4
);

/// One item of the metadata table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// What the item is.
    pub id: Guid,
    /// From the start of the region; 0 for an empty item.
    pub offset: u32,
    /// Its bytes.
    pub length: u32,
    /// [`FLAG_USER`], [`FLAG_VIRTUAL_DISK`], [`FLAG_REQUIRED`].
    pub flags: u32,
}

impl Item {
    /// True for an item of a user of the disk; user items and the format's own are told apart by this.
    #[must_use]
    pub const fn is_user(&self) -> bool {
        self.flags & FLAG_USER != 0
    }

    /// A name for people.
    #[must_use]
    pub fn name(&self) -> String {
        match (self.is_user(), known_item(self.id)) {
            (false, Some((name, _))) => name.to_owned(),
            (true, _) => format!("user item {}", self.id),
            (false, None) => format!("item {}", self.id),
        }
    }
}

/// Name and flags of an item that the format defines or Microsoft's code names.
const fn known_item(id: Guid) -> Option<(&'static str, Option<u32>)> {
    const KNOWN: [(Guid, &str, Option<u32>); 9] = [
        (FILE_PARAMETERS, "file parameters", Some(FLAG_REQUIRED)),
        (VIRTUAL_DISK_SIZE, "virtual disk size", Some(FLAG_REQUIRED | FLAG_VIRTUAL_DISK)),
        (VIRTUAL_DISK_ID, "virtual disk ID", Some(FLAG_REQUIRED | FLAG_VIRTUAL_DISK)),
        (LOGICAL_SECTOR_SIZE, "logical sector size", Some(FLAG_REQUIRED | FLAG_VIRTUAL_DISK)),
        (PHYSICAL_SECTOR_SIZE, "physical sector size", Some(FLAG_REQUIRED | FLAG_VIRTUAL_DISK)),
        (PARENT_LOCATOR, "parent locator", Some(FLAG_REQUIRED)),
        (INCOMPLETE_FILE, "incomplete file mark", None),
        (CHS_PARAMETERS, "CHS parameters", None),
        (PMEM_LABELS, "persistent memory labels", None),
    ];
    let mut rest: &[(Guid, &str, Option<u32>)] = &KNOWN;
    while let [(guid, name, flags), tail @ ..] = rest {
        if u128::from_le_bytes(guid.stored()) == u128::from_le_bytes(id.stored()) {
            return Some((name, *flags));
        }
        rest = tail;
    }
    None
}

/// The flags that the format gives an item of its own.
pub(crate) const fn flags_of(id: Guid) -> Option<u32> {
    match known_item(id) {
        Some((_, flags)) => flags,
        None => None,
    }
}

/// What kind of disk an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskType {
    /// Every block is allocated.
    Fixed,
    /// Blocks are allocated when they are first written.
    Dynamic,
    /// As dynamic; what is not there is in the parent.
    Differencing,
}

impl DiskType {
    /// The usual name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

/// Everything the metadata region says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a payload block.
    pub block_size: u32,
    /// The file parameters flag that makes a disk without parent fixed.
    pub leave_blocks_allocated: bool,
    /// The disk is differencing.
    pub has_parent: bool,
    /// Bytes of the virtual disk.
    pub disk_size: u64,
    /// 512 or 4096.
    pub logical_sector_size: u32,
    /// 512 or 4096.
    pub physical_sector_size: u32,
    /// The virtual disk's identity for the guest.
    pub disk_id: Guid,
    /// What names the parent.
    pub parent_locator: Option<ParentLocator>,
    /// All items, in the order of the table.
    pub items: Vec<Item>,
    /// The numbers that place every byte.
    pub geometry: Geometry,
}

impl Metadata {
    /// The kind of disk.
    #[must_use]
    pub const fn disk_type(&self) -> DiskType {
        match (self.has_parent, self.leave_blocks_allocated) {
            (true, _) => DiskType::Differencing,
            (false, true) => DiskType::Fixed,
            (false, false) => DiskType::Dynamic,
        }
    }
}

/// Gives bytes of the metadata region, by offset from its start.
pub type ReadItem<'a> = dyn FnMut(Range<u64>) -> Result<Vec<u8>> + 'a;

/// Reads the table (V-080 to V-092) and the items (V-093 to V-106, V-140 to V-149) of a metadata region.
///
/// # Errors
/// When a needed item cannot be understood, reading fails, or the collector stops at a finding.
pub fn decode(region: &Region, read: &mut ReadItem<'_>, findings: &mut dyn Findings) -> Result<Metadata> {
    let place = Location::at("metadata table", region.file_offset);
    // A region has a length of at least 1 MiB here: the region table was checked.
    if region.length > REGION_BYTES_MAX || region.length < TABLE_BYTES as u64 {
        let detail = format!("metadata region of {:#x} bytes is outside of 64 KiB to 128 MiB", region.length);
        return Err(findings.fatal(Code::MetadataRegionSize, place, detail));
    }
    let table = read(0..TABLE_BYTES as u64)?;
    let items = decode_table(&table, region, findings)?;
    decode_items(&items, region, read, findings)
}

fn decode_table(table: &[u8], region: &Region, findings: &mut dyn Findings) -> Result<Vec<Item>> {
    let place = Location::at("metadata table", region.file_offset);
    let Some((header, mut rest)) =
        RawTableHeader::ref_from_prefix(table).ok().filter(|(header, _)| header.signature == SIGNATURE)
    else {
        let detail = "does not begin with \"metadata\"".to_owned();
        return Err(findings.fatal(Code::MetadataSignature, place, detail));
    };
    let count = header.entry_count.get();
    if count > ENTRIES_MAX {
        let detail = format!("claims {count} entries; {ENTRIES_MAX} fit");
        return Err(findings.fatal(Code::MetadataCount, place, detail));
    }
    if header.reserved.get() != 0 || header.reserved2 != [0; 20] {
        findings.report(Code::MetadataReserved, place.clone(), "reserved fields are not zero".to_owned())?;
    }
    let mut items: Vec<Item> = Vec::new();
    let mut seen = HashSet::new();
    for index in 0..u64::from(count) {
        let Ok((raw, tail)) = RawEntry::ref_from_prefix(rest) else { break };
        rest = tail;
        let offset = region.file_offset + 32 * (index + 1); // the region lies inside the file
        let place = Location::at(format!("metadata table entry {index}"), offset);
        if let Some(item) = decode_entry(raw, region, &place, findings)? {
            if !seen.insert((item.id, item.is_user())) {
                let detail = format!("{} is listed twice", item.name());
                findings.report(Code::MetadataDuplicate, place, detail)?;
                continue;
            }
            items.push(item);
        }
    }
    let users = items.iter().filter(|item| item.is_user()).count();
    if users > USER_ENTRIES_MAX {
        let detail = format!("has {users} user items; {USER_ENTRIES_MAX} are allowed");
        findings.report(Code::MetadataUserCount, place, detail)?;
    }
    check_overlaps(&items, region, findings)?;
    Ok(items)
}

/// Reads one entry; `None` when its item cannot be used.
fn decode_entry(
    raw: &RawEntry,
    region: &Region,
    place: &Location,
    findings: &mut dyn Findings,
) -> Result<Option<Item>> {
    let item = Item { id: raw.item_id, offset: raw.offset.get(), length: raw.length.get(), flags: raw.flags.get() };
    let name = item.name();
    if item.flags > 7 || raw.reserved2.get() != 0 {
        let detail = format!("reserved bits of the {name} are not zero");
        findings.report(Code::MetadataEntryReserved, place.clone(), detail)?;
    }
    if item.length > ITEM_BYTES_MAX {
        let detail = format!("{name} has {:#x} bytes; 1 MiB is allowed", item.length);
        findings.report(Code::MetadataItemLength, place.clone(), detail)?;
        return Ok(None);
    }
    if item.length == 0 && item.offset != 0 {
        let detail = format!("{name} is empty, but has offset {:#x}", item.offset);
        findings.report(Code::MetadataEmptyOffset, place.clone(), detail)?;
        return Ok(None);
    }
    let end = u64::from(item.offset) + u64::from(item.length);
    if item.length > 0 && ((item.offset as usize) < TABLE_BYTES || end > region.length) {
        let detail = format!("{name} of {:#x} bytes at {:#x} lies outside the region", item.length, item.offset);
        findings.report(Code::MetadataItemOutside, place.clone(), detail)?;
        return Ok(None);
    }
    check_known(&item, place, findings)?;
    Ok(Some(item))
}

/// Checks what an item is and whether it may be passed over (V-090 to V-092, V-104).
fn check_known(item: &Item, place: &Location, findings: &mut dyn Findings) -> Result<()> {
    let required = item.flags & FLAG_REQUIRED != 0;
    if !item.is_user() && item.id == INCOMPLETE_FILE {
        let detail = "the program that made this file never finished it".to_owned();
        return findings.report(Code::IncompleteFile, place.clone(), detail);
    }
    match known_item(item.id).filter(|_| !item.is_user()) {
        Some((name, Some(flags))) if item.flags & 7 != flags => {
            let detail = format!("flags of the {name} are {:#x}, not {flags:#x}", item.flags & 7);
            findings.report(Code::MetadataFlags, place.clone(), detail)
        }
        Some((_, Some(_))) => Ok(()),
        _ if required => {
            let detail = format!("{} must be understood to read this file, and is not", item.name());
            findings.report(Code::MetadataUnknownRequired, place.clone(), detail)
        }
        _ => {
            let detail = format!("{} of {} bytes is not used; it is kept as it is", item.name(), item.length);
            findings.report(Code::MetadataUnknown, place.clone(), detail)
        }
    }
}

fn check_overlaps(items: &[Item], region: &Region, findings: &mut dyn Findings) -> Result<()> {
    let mut sorted: Vec<&Item> = items.iter().filter(|item| item.length > 0).collect();
    sorted.sort_by_key(|item| item.offset);
    for pair in sorted.windows(2) {
        let [first, second] = pair else { continue };
        // Both were checked to lie inside the region, so the sum does not overflow.
        if first.offset + first.length > second.offset {
            let place = Location::at(second.name(), region.file_offset + u64::from(second.offset));
            let detail = format!("overlaps the {}", first.name());
            findings.report(Code::MetadataOverlap, place, detail)?;
        }
    }
    Ok(())
}

/// What reads the items that the format defines.
struct Items<'a, 'r> {
    items: &'a [Item],
    region: &'a Region,
    read: &'a mut ReadItem<'r>,
}

impl Items<'_, '_> {
    fn find(&self, id: Guid) -> Option<Item> {
        self.items.iter().copied().find(|item| item.id == id && !item.is_user())
    }

    fn place(&self, item: &Item) -> Location {
        Location::at(item.name(), self.region.file_offset + u64::from(item.offset))
    }

    /// The bytes of an item that must exist and have exactly `N` bytes.
    fn exact<const N: usize>(&mut self, id: Guid, wrong: Code, findings: &mut dyn Findings) -> Result<[u8; N]> {
        let Some(item) = self.find(id) else {
            let name = known_item(id).map_or("item", |(name, _)| name);
            let place = Location::at("metadata table", self.region.file_offset);
            return Err(findings.fatal(Code::MetadataMissing, place, format!("there is no usable {name}")));
        };
        if item.length as usize != N {
            let detail = format!("has {} bytes, not {N}", item.length);
            return Err(findings.fatal(wrong, self.place(&item), detail));
        }
        let bytes = (self.read)(u64::from(item.offset)..u64::from(item.offset) + u64::from(item.length))?;
        bytes.try_into().map_err(|_| {
            crate::Error::new(crate::ErrorKind::Io, "storage gave fewer bytes of a metadata item than it was asked for")
        })
    }

    fn place_of(&self, id: Guid) -> Location {
        self.find(id).map_or_else(|| Location::of("metadata"), |item| self.place(&item))
    }

    fn sector_size(&mut self, id: Guid, wrong: Code, findings: &mut dyn Findings) -> Result<u32> {
        let size = u32::from_le_bytes(self.exact(id, wrong, findings)?);
        if size != 512 && size != 4096 {
            let detail = format!("is {size}; only 512 and 4096 are allowed");
            return Err(findings.fatal(wrong, self.place_of(id), detail));
        }
        Ok(size)
    }

    fn file_parameters(&mut self, findings: &mut dyn Findings) -> Result<(u32, u32)> {
        let bytes: [u8; 8] = self.exact(FILE_PARAMETERS, Code::FileParametersLength, findings)?;
        let raw: RawFileParameters = zerocopy::transmute!(bytes);
        let (block_size, flags) = (raw.block_size.get(), raw.flags.get());
        let place = self.place_of(FILE_PARAMETERS);
        if !block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size) {
            let detail = format!("block size {block_size:#x} is not a power of two from 1 to 256 MiB");
            return Err(findings.fatal(Code::BlockSize, place, detail));
        }
        if flags & !(LEAVE_BLOCKS_ALLOCATED | HAS_PARENT) != 0 {
            let detail = format!("reserved bits are not zero: flags are {flags:#x}");
            findings.report(Code::FileParametersReserved, place, detail)?;
        }
        Ok((block_size, flags))
    }

    fn disk_size(&mut self, sector: u32, findings: &mut dyn Findings) -> Result<u64> {
        let size = u64::from_le_bytes(self.exact(VIRTUAL_DISK_SIZE, Code::DiskSize, findings)?);
        let place = self.place_of(VIRTUAL_DISK_SIZE);
        if size > DISK_SIZE_MAX {
            let detail = format!("is {size:#x}; at most 64 TiB are allowed");
            return Err(findings.fatal(Code::DiskSize, place, detail));
        }
        if size == 0 {
            return Err(findings.fatal(Code::DiskSizeZero, place, "is zero".to_owned()));
        }
        if !is_aligned(size, u64::from(sector)) {
            let detail = format!("{size} is not a multiple of the logical sector size {sector}");
            return Err(findings.fatal(Code::DiskSizeUnaligned, place, detail));
        }
        Ok(size)
    }

    fn parent_locator(&mut self, has_parent: bool, findings: &mut dyn Findings) -> Result<Option<ParentLocator>> {
        let Some(item) = self.find(PARENT_LOCATOR) else {
            if has_parent {
                let place = Location::at("metadata table", self.region.file_offset);
                let detail = "the disk is differencing, but there is no parent locator".to_owned();
                return Err(findings.fatal(Code::ParentLocatorMissing, place, detail));
            }
            return Ok(None);
        };
        let place = self.place(&item);
        if !has_parent {
            let detail = "there is a parent locator, but the disk is not differencing; it is ignored".to_owned();
            findings.report(Code::ParentLocatorUnexpected, place, detail)?;
            return Ok(None);
        }
        let bytes = (self.read)(u64::from(item.offset)..u64::from(item.offset) + u64::from(item.length))?;
        ParentLocator::decode(&bytes, &place, findings).map(Some)
    }
}

fn decode_items(
    items: &[Item],
    region: &Region,
    read: &mut ReadItem<'_>,
    findings: &mut dyn Findings,
) -> Result<Metadata> {
    let mut reader = Items { items, region, read };
    let (block_size, flags) = reader.file_parameters(findings)?;
    let logical_sector_size = reader.sector_size(LOGICAL_SECTOR_SIZE, Code::LogicalSectorSize, findings)?;
    let physical_sector_size = reader.sector_size(PHYSICAL_SECTOR_SIZE, Code::PhysicalSectorSize, findings)?;
    if physical_sector_size < logical_sector_size {
        let detail = format!("is {physical_sector_size}, less than the logical sector size {logical_sector_size}");
        findings.report(Code::SectorSizes, reader.place_of(PHYSICAL_SECTOR_SIZE), detail)?;
    }
    let disk_size = reader.disk_size(logical_sector_size, findings)?;
    let disk_id = Guid::from_stored(reader.exact(VIRTUAL_DISK_ID, Code::DiskIdLength, findings)?);
    let has_parent = flags & HAS_PARENT != 0;
    let parent_locator = reader.parent_locator(has_parent, findings)?;
    let Some(geometry) = Geometry::new(disk_size, block_size, logical_sector_size, has_parent) else {
        // Every condition of a geometry was checked above, with a better message.
        return Err(findings.fatal(Code::DiskSize, reader.place_of(VIRTUAL_DISK_SIZE), "is not usable".to_owned()));
    };
    Ok(Metadata {
        block_size,
        leave_blocks_allocated: flags & LEAVE_BLOCKS_ALLOCATED != 0,
        has_parent,
        disk_size,
        logical_sector_size,
        physical_sector_size,
        disk_id,
        parent_locator,
        items: items.to_vec(),
        geometry,
    })
}

/// What a new image's metadata region says.
#[derive(Clone, Debug)]
pub struct NewMetadata<'a> {
    /// Bytes of a payload block.
    pub block_size: u32,
    /// [`LEAVE_BLOCKS_ALLOCATED`], [`HAS_PARENT`].
    pub file_flags: u32,
    /// Bytes of the virtual disk.
    pub disk_size: u64,
    /// 512 or 4096.
    pub logical_sector_size: u32,
    /// 512 or 4096.
    pub physical_sector_size: u32,
    /// The virtual disk's identity for the guest.
    pub disk_id: Guid,
    /// The bytes of the parent locator item.
    pub parent_locator: Option<&'a [u8]>,
}

/// The used part of a new metadata region: table and items, placed as Windows places them.
#[must_use]
pub fn encode(new: &NewMetadata<'_>) -> Vec<u8> {
    let parameters = RawFileParameters { block_size: new.block_size.into(), flags: new.file_flags.into() };
    let disk_size: U64 = new.disk_size.into();
    let sectors: [U32; 2] = [new.logical_sector_size.into(), new.physical_sector_size.into()];
    let [logical, physical] = &sectors;
    let mut items: Vec<(Guid, &[u8])> = vec![
        (FILE_PARAMETERS, parameters.as_bytes()),
        (VIRTUAL_DISK_SIZE, disk_size.as_bytes()),
        (LOGICAL_SECTOR_SIZE, logical.as_bytes()),
        (PHYSICAL_SECTOR_SIZE, physical.as_bytes()),
        (VIRTUAL_DISK_ID, new.disk_id.as_bytes()),
    ];
    if let Some(locator) = new.parent_locator {
        items.push((PARENT_LOCATOR, locator));
    }
    let count = u16::try_from(items.len()).unwrap_or(u16::MAX); // six at most
    let header =
        RawTableHeader { signature: SIGNATURE, reserved: U16::ZERO, entry_count: count.into(), reserved2: [0; 20] };
    let mut table = header.as_bytes().to_vec();
    let mut data: Vec<u8> = Vec::new();
    for (id, bytes) in items {
        let offset = u32::try_from(TABLE_BYTES + data.len()).unwrap_or(u32::MAX); // items are below 1 MiB each
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let flags = known_item(id).and_then(|(_, flags)| flags).unwrap_or_default();
        let entry = RawEntry {
            item_id: id,
            offset: offset.into(),
            length: length.into(),
            flags: flags.into(),
            reserved2: U32::ZERO,
        };
        table.extend_from_slice(entry.as_bytes());
        data.extend_from_slice(bytes);
    }
    table.resize(TABLE_BYTES, 0);
    table.extend_from_slice(&data);
    table
}

/// Bytes of a new metadata region that holds `used` bytes.
#[must_use]
pub const fn region_bytes(used: u64) -> u64 {
    (used + (MIB - 1)) & !(MIB - 1) // items are a few MiB at most
}
