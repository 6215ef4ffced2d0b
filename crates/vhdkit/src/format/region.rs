//! The two copies of the region table ([MS-VHDX] 2.2.3).

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::checksum;
use super::finding::{Code, Findings, Location};
use super::guid::Guid;
use super::space::TakenSpace;
use super::{HEADER_SECTION_BYTES, SLOT_BYTES};
use crate::error::Result;
use crate::units::{MIB, is_aligned};

/// Bytes of a region table.
pub const TABLE_BYTES: usize = 65536;
/// The first four bytes of a region table.
pub const SIGNATURE: [u8; 4] = *b"regi";
/// File offsets of the two copies.
pub const OFFSETS: [u64; 2] = [3 * SLOT_BYTES, 4 * SLOT_BYTES];
/// Most entries a table has room for.
pub const ENTRIES_MAX: u32 = 2047;
/// The region of the block allocation table.
pub const BAT_GUID: Guid = Guid::from_printed(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
/// The region of the metadata.
pub const METADATA_GUID: Guid = Guid::from_printed(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

/// The header of a region table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawTableHeader {
    /// `regi`.
    pub signature: [u8; 4],
    /// CRC-32C over the 64 KiB.
    pub checksum: U32,
    /// Entries that follow.
    pub entry_count: U32,
    /// Zero, and ignored.
    pub reserved: U32,
}

/// One entry of a region table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawEntry {
    /// What the region is.
    pub guid: Guid,
    /// Where it begins.
    pub file_offset: U64,
    /// Its bytes.
    pub length: U32,
    /// Bit 0: refuse the file when the region is unknown.
    pub required: U32,
}

const _: () = assert!(
    size_of::<RawTableHeader>() == 16
        && offset_of!(RawTableHeader, entry_count) == 8
        && size_of::<RawEntry>() == 32
        && offset_of!(RawEntry, file_offset) == 16
        && offset_of!(RawEntry, length) == 24
        && offset_of!(RawEntry, required) == 28
        && 16 + 32 * ENTRIES_MAX as usize <= TABLE_BYTES
);

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What the region is.
    pub guid: Guid,
    /// Where it begins.
    pub file_offset: u64,
    /// Its bytes.
    pub length: u64,
    /// The Required field as it stands in the file.
    pub required: u32,
}

impl Region {
    /// A name for people.
    #[must_use]
    pub fn name(&self) -> String {
        match self.guid {
            BAT_GUID => "BAT region".to_owned(),
            METADATA_GUID => "metadata region".to_owned(),
            other => format!("region {other}"),
        }
    }
}

/// The region table that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionTable {
    /// Where the block allocation table is.
    pub bat: Region,
    /// Where the metadata is.
    pub metadata: Region,
    /// All regions, in the order of the table.
    pub regions: Vec<Region>,
    /// Which copy was used: 0 or 1.
    pub copy: usize,
    /// Which copies have a valid signature and checksum.
    pub valid: [bool; 2],
}

/// Encodes a table of at most [`ENTRIES_MAX`] regions, checksum included.
#[must_use]
pub fn encode(regions: &[Region]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    debug_assert!(count <= ENTRIES_MAX, "a region table has room for 2047 entries");
    let mut header =
        RawTableHeader { signature: SIGNATURE, checksum: U32::ZERO, entry_count: count.into(), reserved: U32::ZERO };
    let mut bytes = header.as_bytes().to_vec();
    for region in regions {
        let length = u32::try_from(region.length).unwrap_or(u32::MAX); // regions are at most 4095 MiB long
        let entry = RawEntry {
            guid: region.guid,
            file_offset: region.file_offset.into(),
            length: length.into(),
            required: region.required.into(),
        };
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes.resize(TABLE_BYTES, 0);
    header.checksum = checksum(&bytes).into();
    for (to, from) in bytes.iter_mut().zip(header.as_bytes()) {
        *to = *from;
    }
    bytes
}

/// True when a copy's signature and checksum are right (V-060).
fn is_valid(bytes: &[u8]) -> bool {
    RawTableHeader::ref_from_prefix(bytes)
        .is_ok_and(|(raw, _)| raw.signature == SIGNATURE && raw.checksum.get() == checksum(bytes))
}

/// The location of an entry, for findings.
fn place(copy: usize, entry: usize) -> Location {
    let table = OFFSETS.get(copy).copied().unwrap_or_default();
    let offset = size_of::<RawTableHeader>() + entry * size_of::<RawEntry>();
    Location::at(format!("region table copy {}, entry {entry}", copy + 1), table + offset as u64)
}

/// Reads both copies and uses the first valid one (V-060 to V-074). Regions are added to `space`, which holds the
/// header section and the log already.
///
/// # Errors
/// When no copy is valid, the BAT or metadata region is missing, or the collector stops at a finding.
pub fn decode_tables(
    copies: [&[u8]; 2],
    file_size: u64,
    space: &mut TakenSpace,
    findings: &mut dyn Findings,
) -> Result<RegionTable> {
    let valid = copies.map(is_valid);
    let whole = |copy: usize| {
        Location::at(format!("region table copy {}", copy + 1), OFFSETS.get(copy).copied().unwrap_or_default())
    };
    let (copy, bytes) = match (valid, copies) {
        ([false, false], _) => {
            let detail = "neither region table copy has a valid signature and checksum".to_owned();
            return Err(findings.fatal(Code::RegionTablesDamaged, whole(0), detail));
        }
        ([true, second], [bytes, other]) => {
            if !second {
                let detail = "signature or checksum is wrong; copy 1 is used".to_owned();
                findings.report(Code::RegionCopyDamaged, whole(1), detail)?;
            } else if bytes != other {
                let detail = "differs from copy 1, which is used".to_owned();
                findings.report(Code::RegionCopiesDiffer, whole(1), detail)?;
            }
            (0, bytes)
        }
        ([false, true], [_, bytes]) => {
            let detail = "signature or checksum is wrong; copy 2 is used".to_owned();
            findings.report(Code::RegionCopyDamaged, whole(0), detail)?;
            (1, bytes)
        }
    };
    let regions = decode_entries(bytes, copy, file_size, space, findings)?;
    let find = |guid| regions.iter().copied().find(|region: &Region| region.guid == guid);
    let missing = |what: &str, findings: &mut dyn Findings| {
        findings.fatal(Code::RegionMissing, whole(copy), format!("there is no usable {what} region"))
    };
    let Some(bat) = find(BAT_GUID) else { return Err(missing("BAT", findings)) };
    let Some(metadata) = find(METADATA_GUID) else { return Err(missing("metadata", findings)) };
    Ok(RegionTable { bat, metadata, regions, copy, valid })
}

/// Reads the entries of one valid copy. Entries that an error was reported for are left out.
fn decode_entries(
    bytes: &[u8],
    copy: usize,
    file_size: u64,
    space: &mut TakenSpace,
    findings: &mut dyn Findings,
) -> Result<Vec<Region>> {
    let table = Location::of(format!("region table copy {}", copy + 1));
    let Ok((header, rest)) = RawTableHeader::ref_from_prefix(bytes) else {
        return Err(findings.fatal(Code::RegionTablesDamaged, table, "the table is cut short".to_owned()));
    };
    let count = header.entry_count.get();
    if count > ENTRIES_MAX {
        let detail = format!("claims {count} entries; {ENTRIES_MAX} fit");
        return Err(findings.fatal(Code::RegionCount, table, detail));
    }
    if header.reserved.get() != 0 {
        let detail = format!("reserved field is {:#x}", header.reserved.get());
        findings.report(Code::RegionReserved, table, detail)?;
    }
    let mut regions: Vec<Region> = Vec::new();
    let mut rest = rest;
    for index in 0..count as usize {
        let Ok((raw, tail)) = RawEntry::ref_from_prefix(rest) else { break };
        rest = tail;
        let region = Region {
            guid: raw.guid,
            file_offset: raw.file_offset.get(),
            length: u64::from(raw.length.get()),
            required: raw.required.get(),
        };
        if regions.iter().any(|other| other.guid == region.guid) {
            let detail = format!("{} is listed twice", region.name());
            findings.report(Code::RegionDuplicate, place(copy, index), detail)?;
            continue;
        }
        if check_entry(&region, &place(copy, index), file_size, space, findings)? {
            regions.push(region);
        }
    }
    Ok(regions)
}

/// Checks one entry and takes its space. False when the region cannot be used.
fn check_entry(
    region: &Region,
    place: &Location,
    file_size: u64,
    space: &mut TakenSpace,
    findings: &mut dyn Findings,
) -> Result<bool> {
    let known = region.guid == BAT_GUID || region.guid == METADATA_GUID;
    let name = region.name();
    let Region { file_offset: offset, length, required, .. } = *region;
    if !known && required & 1 == 1 {
        let detail = format!("{name} is unknown and must be understood to read this file");
        findings.report(Code::RegionUnknownRequired, place.clone(), detail)?;
    } else if !known {
        let detail = format!("{name} of {length:#x} bytes at {offset:#x} is unknown; it is kept as it is");
        findings.report(Code::RegionUnknown, place.clone(), detail)?;
    }
    if required > 1 || (known && required == 0) {
        let detail = format!("the Required field of the {name} is {required:#x}");
        findings.report(Code::RegionRequiredFlag, place.clone(), detail)?;
    }
    if !is_aligned(offset, MIB) || offset < HEADER_SECTION_BYTES {
        let detail = format!("offset {offset:#x} of the {name} is not a multiple of 1 MiB behind the header section");
        findings.report(Code::RegionOffset, place.clone(), detail)?;
        return Ok(false);
    }
    if !is_aligned(length, MIB) {
        let detail = format!("length {length:#x} of the {name} is not a multiple of 1 MiB");
        findings.report(Code::RegionLength, place.clone(), detail)?;
        return Ok(false);
    }
    if length == 0 {
        if known {
            findings.report(Code::RegionEmpty, place.clone(), format!("the {name} has no length"))?;
        }
        return Ok(!known);
    }
    let end = offset.checked_add(length).filter(|end| *end <= file_size);
    let Some(end) = end else {
        let code = if known || required & 1 == 1 { Code::RegionOutsideFile } else { Code::RegionOptionalOutsideFile };
        let detail =
            format!("{name} of {length:#x} bytes at {offset:#x} reaches past the end of the file ({file_size:#x})");
        findings.report(code, place.clone(), detail)?;
        if let (false, Some(end)) = (known, offset.checked_add(length)) {
            let _ = space.add(offset..end, &name); // its space stays reserved where nothing else is
        }
        return Ok(!known);
    };
    if let Some(other) = space.add(offset..end, &name) {
        let detail = format!("{name} at {offset:#x} overlaps the {} at {:#x}", other.name, other.range.start);
        findings.report(Code::RegionOverlap, place.clone(), detail)?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guid: Guid, mib: u64, required: u32) -> Region {
        Region { guid, file_offset: mib << 20, length: 1 << 20, required }
    }

    #[test]
    fn checksum_vectors() {
        let crc = |bytes: &[u8]| RawTableHeader::ref_from_prefix(bytes).unwrap().0.checksum.get();
        let windows = encode(&[region(BAT_GUID, 3, 1), region(METADATA_GUID, 2, 1)]);
        assert_eq!(crc(&windows), 0xc66b_8cae);
        let qemu = encode(&[region(BAT_GUID, 2, 0), region(METADATA_GUID, 3, 0)]);
        assert_eq!(crc(&qemu), 0x2c6f_ce83);
    }
}
