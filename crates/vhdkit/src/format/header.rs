//! The two header copies ([MS-VHDX] 2.2.2).

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::checksum;
use super::finding::{Code, Findings, Location};
use super::guid::Guid;
use super::{HEADER_SECTION_BYTES, SLOT_BYTES};
use crate::error::Result;
use crate::units::{MIB, is_aligned};

/// Bytes of a header that the checksum covers.
pub const HEADER_BYTES: usize = 4096;
/// The first four bytes of a header.
pub const SIGNATURE: [u8; 4] = *b"head";
/// File offsets of the two copies.
pub const OFFSETS: [u64; 2] = [SLOT_BYTES, 2 * SLOT_BYTES];
/// The only version of the format.
pub const VERSION: u16 = 1;
/// Longest log that is accepted. The format allows nearly 4 GiB; no writer is known to make more than 256 MiB, and
/// a scan must end in sensible time.
pub const LOG_BYTES_MAX: u64 = 1 << 30;

/// The defined part of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// `head`.
    pub signature: [u8; 4],
    /// CRC-32C over the 4096 bytes.
    pub checksum: U32,
    /// The copy with the larger one is current.
    pub sequence_number: U64,
    /// Identity of the file's contents.
    pub file_write_guid: Guid,
    /// Identity of what the guest sees.
    pub data_write_guid: Guid,
    /// Not zero while the log is in use.
    pub log_guid: Guid,
    /// 0.
    pub log_version: U16,
    /// 1.
    pub version: U16,
    /// Bytes of the log.
    pub log_length: U32,
    /// Where the log begins.
    pub log_offset: U64,
}

const _: () = assert!(
    size_of::<RawHeader>() == 80
        && offset_of!(RawHeader, sequence_number) == 8
        && offset_of!(RawHeader, file_write_guid) == 16
        && offset_of!(RawHeader, data_write_guid) == 32
        && offset_of!(RawHeader, log_guid) == 48
        && offset_of!(RawHeader, log_version) == 64
        && offset_of!(RawHeader, version) == 66
        && offset_of!(RawHeader, log_length) == 68
        && offset_of!(RawHeader, log_offset) == 72
);

/// A header whose signature and checksum are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The copy with the larger one is current.
    pub sequence_number: u64,
    /// Identity of the file's contents.
    pub file_write_guid: Guid,
    /// Identity of what the guest sees; children name it.
    pub data_write_guid: Guid,
    /// Not zero while the log is in use.
    pub log_guid: Guid,
    /// Version of the log format.
    pub log_version: u16,
    /// Version of the file format.
    pub version: u16,
    /// Bytes of the log.
    pub log_length: u32,
    /// Where the log begins.
    pub log_offset: u64,
}

impl Header {
    /// True while the log may hold changes that are not in place yet.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.log_guid.is_nil()
    }

    /// The 4096 bytes of this header, checksum included.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            signature: SIGNATURE,
            checksum: U32::ZERO,
            sequence_number: self.sequence_number.into(),
            file_write_guid: self.file_write_guid,
            data_write_guid: self.data_write_guid,
            log_guid: self.log_guid,
            log_version: self.log_version.into(),
            version: self.version.into(),
            log_length: self.log_length.into(),
            log_offset: self.log_offset.into(),
        };
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, &raw);
        raw.checksum = checksum(&bytes).into();
        put(&mut bytes, &raw);
        bytes
    }

    /// Reads one copy; `None` when its signature or checksum is wrong (V-004, V-005). Nothing else takes part in
    /// validity: a header of a future version must not yield to an older copy.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (raw, _) = RawHeader::ref_from_prefix(bytes).ok()?;
        if raw.signature != SIGNATURE || raw.checksum.get() != checksum(bytes) {
            return None;
        }
        Some(Self {
            sequence_number: raw.sequence_number.get(),
            file_write_guid: raw.file_write_guid,
            data_write_guid: raw.data_write_guid,
            log_guid: raw.log_guid,
            log_version: raw.log_version.get(),
            version: raw.version.get(),
            log_length: raw.log_length.get(),
            log_offset: raw.log_offset.get(),
        })
    }
}

fn put(bytes: &mut [u8; HEADER_BYTES], raw: &RawHeader) {
    for (to, from) in bytes.iter_mut().zip(raw.as_bytes()) {
        *to = *from;
    }
}

/// Both copies, with the current one chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The header that counts.
    pub current: Header,
    /// Which copy it is: 0 or 1.
    pub current_copy: usize,
    /// Each copy, where it is valid.
    pub copies: [Option<Header>; 2],
}

/// The location of a header copy, for findings.
fn place(copy: usize) -> Location {
    Location::at(format!("header copy {}", copy + 1), OFFSETS.get(copy).copied().unwrap_or_default())
}

/// Reads both copies and chooses the current one (V-004 to V-009), then checks it (V-010 to V-019).
///
/// # Errors
/// When no copy is valid, both claim to be current, or the collector stops at a finding.
pub fn decode_headers(
    copies: [&[u8; HEADER_BYTES]; 2],
    file_size: u64,
    findings: &mut dyn Findings,
) -> Result<Headers> {
    let decoded = copies.map(Header::decode);
    let (current, current_copy) = match decoded {
        [None, None] => {
            return Err(findings.fatal(
                Code::HeadersDamaged,
                place(0),
                "neither header copy has a valid signature and checksum".to_owned(),
            ));
        }
        [Some(only), None] => {
            damaged(1, findings)?;
            (only, 0)
        }
        [None, Some(only)] => {
            damaged(0, findings)?;
            (only, 1)
        }
        [Some(first), Some(second)] if first.sequence_number > second.sequence_number => (first, 0),
        [Some(first), Some(second)] if first.sequence_number < second.sequence_number => (second, 1),
        [Some(first), Some(_)] if copies[0] == copies[1] => {
            let detail = format!("both copies are identical, with sequence number {}", first.sequence_number);
            findings.report(Code::HeaderSequenceTie, place(0), detail)?;
            (first, 0)
        }
        [Some(first), Some(_)] => {
            let detail = format!("both copies have sequence number {} and differ", first.sequence_number);
            return Err(findings.fatal(Code::HeaderConflict, place(0), detail));
        }
    };
    check_current(&current, current_copy, file_size, findings)?;
    for (copy, bytes) in copies.iter().enumerate() {
        // What a damaged copy holds means nothing.
        let valid = decoded.get(copy).is_some_and(Option::is_some);
        if valid && bytes.iter().skip(size_of::<RawHeader>()).any(|byte| *byte != 0) {
            findings.report(Code::HeaderReserved, place(copy), "reserved bytes are not zero".to_owned())?;
        }
    }
    Ok(Headers { current, current_copy, copies: decoded })
}

fn damaged(copy: usize, findings: &mut dyn Findings) -> Result<()> {
    let detail = "signature or checksum is wrong; the other copy is used".to_owned();
    findings.report(Code::HeaderCopyDamaged, place(copy), detail)
}

/// Checks the fields of the current header. What makes everything behind it meaningless is fatal.
fn check_current(header: &Header, copy: usize, file_size: u64, findings: &mut dyn Findings) -> Result<()> {
    if header.version != VERSION {
        let detail = format!("format version is {}; only version 1 is known", header.version);
        return Err(findings.fatal(Code::HeaderVersion, place(copy), detail));
    }
    if header.is_dirty() && header.log_version != 0 {
        let detail = format!("log version is {}; only version 0 is known", header.log_version);
        return Err(findings.fatal(Code::LogVersion, place(copy), detail));
    }
    let (offset, length) = (header.log_offset, u64::from(header.log_length));
    if length == 0 {
        if header.is_dirty() {
            let detail = "a log GUID is set, but the log has no length".to_owned();
            return Err(findings.fatal(Code::LogGuidWithoutLog, place(copy), detail));
        }
        return Ok(());
    }
    if !is_aligned(length, MIB) {
        let detail = format!("log length {length:#x} is not a multiple of 1 MiB");
        return Err(findings.fatal(Code::LogLengthUnaligned, place(copy), detail));
    }
    if !is_aligned(offset, MIB) {
        let detail = format!("log offset {offset:#x} is not a multiple of 1 MiB");
        return Err(findings.fatal(Code::LogOffsetUnaligned, place(copy), detail));
    }
    if offset < HEADER_SECTION_BYTES {
        let detail = format!("log offset {offset:#x} lies inside the header section");
        return Err(findings.fatal(Code::LogOffsetLow, place(copy), detail));
    }
    if length > LOG_BYTES_MAX {
        let detail = format!("log length {length:#x} is more than the 1 GiB that is supported");
        return Err(findings.fatal(Code::LogTooLong, place(copy), detail));
    }
    match offset.checked_add(length) {
        Some(end) if end <= file_size => Ok(()),
        _ => {
            let detail =
                format!("log of {length:#x} bytes at {offset:#x} reaches past the end of the file ({file_size:#x})");
            Err(findings.fatal(Code::LogOutsideFile, place(copy), detail))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            sequence_number: 1,
            file_write_guid: Guid::NIL,
            data_write_guid: Guid::NIL,
            log_guid: Guid::NIL,
            log_version: 0,
            version: 1,
            log_length: 1 << 20,
            log_offset: 1 << 20,
        }
    }

    #[test]
    fn checksum_vectors() {
        let raw = sample().encode();
        assert_eq!(RawHeader::ref_from_prefix(&raw).unwrap().0.checksum.get(), 0xf1fd_4713);
        let raw = Header { sequence_number: 0, ..sample() }.encode();
        assert_eq!(RawHeader::ref_from_prefix(&raw).unwrap().0.checksum.get(), 0x7305_db64);
    }

    #[test]
    fn round_trip_and_any_flipped_bit_is_noticed() {
        let header = Header { file_write_guid: Guid::random(), sequence_number: 77, ..sample() };
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Some(header));
        for position in [0, 4, 8, 79, 80, 4095] {
            bytes[position] ^= 0x10;
            assert_eq!(Header::decode(&bytes), None, "{position}");
            bytes[position] ^= 0x10;
        }
    }
}
