//! The record of what stood in a file before `repair` changed it: our own format, not part of a VHDX.
//!
//! ```text
//! | header | piece | sums of what is written | old bytes | piece | ...
//! ```
//!
//! A piece is a range that is changed, at most 1 MiB. Its sums are CRC-32C of each 512 bytes of what is written there, one
//! row for each time that it is: so a file that was changed as a whole, in part, or torn by a crash is known from one that
//! somebody else has changed since.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::append;
use super::guid::Guid;

/// The first eight bytes of a record.
pub const SIGNATURE: [u8; 8] = *b"vhdkundo";
/// The only version there is.
pub const VERSION: u32 = 1;
/// Bytes that a sum covers; what a medium writes as a whole.
pub const SUM_BYTES: usize = 512;
/// Longest piece, so that a reader needs little memory.
pub const PIECE_BYTES_MAX: u32 = 1 << 20;
/// How often a piece may be written in one repair.
pub const VERSIONS_MAX: u16 = 4;

/// The header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawUndoHeader {
    /// `vhdkundo`.
    pub signature: [u8; 8],
    /// 1.
    pub version: U32,
    /// CRC-32C over the header with this field zero.
    pub checksum: U32,
    /// The file's length before.
    pub old_length: U64,
    /// The file's length afterwards.
    pub new_length: U64,
    /// The file's identity before, for people.
    pub file_write_guid: Guid,
    /// Pieces that follow.
    pub pieces: U64,
    /// Bytes that follow.
    pub body_length: U64,
    /// CRC-32C over the bytes that follow.
    pub body_checksum: U32,
    /// Zero.
    pub reserved: U32,
}

/// The header of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawPiece {
    /// Where it stands in the file.
    pub offset: U64,
    /// Its bytes.
    pub length: U32,
    /// 1 when the old bytes follow, 0 when they are zero throughout.
    pub has_old: u8,
    /// Zero.
    pub reserved: u8,
    /// Rows of sums.
    pub versions: U16,
}

const _: () = assert!(
    size_of::<RawUndoHeader>() == 72
        && offset_of!(RawUndoHeader, checksum) == 12
        && offset_of!(RawUndoHeader, old_length) == 16
        && offset_of!(RawUndoHeader, file_write_guid) == 32
        && offset_of!(RawUndoHeader, pieces) == 48
        && offset_of!(RawUndoHeader, body_checksum) == 64
        && size_of::<RawPiece>() == 16
        && offset_of!(RawPiece, length) == 8
        && offset_of!(RawPiece, versions) == 14
);

/// A record's header that was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoHeader {
    /// The file's length before.
    pub old_length: u64,
    /// The file's length afterwards.
    pub new_length: u64,
    /// The file's identity before, for people.
    pub file_write_guid: Guid,
    /// Pieces that follow.
    pub pieces: u64,
    /// Bytes that follow.
    pub body_length: u64,
    /// CRC-32C over the bytes that follow.
    pub body_checksum: u32,
}

impl UndoHeader {
    /// The bytes of the header, checksum included.
    #[must_use]
    pub fn encode(&self) -> [u8; size_of::<RawUndoHeader>()] {
        let mut raw = RawUndoHeader {
            signature: SIGNATURE,
            version: VERSION.into(),
            checksum: U32::ZERO,
            old_length: self.old_length.into(),
            new_length: self.new_length.into(),
            file_write_guid: self.file_write_guid,
            pieces: self.pieces.into(),
            body_length: self.body_length.into(),
            body_checksum: self.body_checksum.into(),
            reserved: U32::ZERO,
        };
        raw.checksum = append(0, raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a header; `None` for anything that is not a whole header of this version.
    #[must_use]
    pub fn decode(bytes: [u8; size_of::<RawUndoHeader>()]) -> Option<Self> {
        let raw: RawUndoHeader = zerocopy::transmute!(bytes);
        let plain = RawUndoHeader { checksum: U32::ZERO, ..raw };
        if raw.signature != SIGNATURE
            || raw.version.get() != VERSION
            || raw.checksum.get() != append(0, plain.as_bytes())
            || raw.reserved.get() != 0
        {
            return None;
        }
        Some(Self {
            old_length: raw.old_length.get(),
            new_length: raw.new_length.get(),
            file_write_guid: raw.file_write_guid,
            pieces: raw.pieces.get(),
            body_length: raw.body_length.get(),
            body_checksum: raw.body_checksum.get(),
        })
    }
}

/// One piece, without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoPiece {
    /// Where it stands in the file.
    pub offset: u64,
    /// Its bytes, from 1 to [`PIECE_BYTES_MAX`].
    pub length: u32,
    /// Whether its old bytes follow; else they are zero throughout.
    pub has_old: bool,
    /// How often it is written.
    pub versions: u16,
}

impl UndoPiece {
    /// The bytes of the header of the piece.
    #[must_use]
    pub fn encode(&self) -> [u8; size_of::<RawPiece>()] {
        let raw = RawPiece {
            offset: self.offset.into(),
            length: self.length.into(),
            has_old: u8::from(self.has_old),
            reserved: 0,
            versions: self.versions.into(),
        };
        zerocopy::transmute!(raw)
    }

    /// Reads the header of a piece that lies in a file of `file_length` bytes; `None` when nothing of that kind can be.
    #[must_use]
    pub fn decode(bytes: [u8; size_of::<RawPiece>()], file_length: u64) -> Option<Self> {
        let raw: RawPiece = zerocopy::transmute!(bytes);
        let (offset, length, versions) = (raw.offset.get(), raw.length.get(), raw.versions.get());
        let inside = offset.checked_add(u64::from(length)).is_some_and(|end| end <= file_length);
        if !inside || length == 0 || length > PIECE_BYTES_MAX || raw.has_old > 1 || raw.reserved != 0 {
            return None;
        }
        if versions == 0 || versions > VERSIONS_MAX {
            return None;
        }
        Some(Self { offset, length, has_old: raw.has_old == 1, versions })
    }

    /// Sums in a row.
    #[must_use]
    pub const fn sums_per_version(&self) -> usize {
        (self.length as usize).div_ceil(SUM_BYTES)
    }

    /// Bytes that follow the header of the piece.
    #[must_use]
    pub const fn body_length(&self) -> u64 {
        let sums = self.sums_per_version() as u64 * 4 * self.versions as u64; // at most 2048 * 4 * 4
        if self.has_old { sums + self.length as u64 } else { sums }
    }
}

/// The sums of some bytes, one for each 512 of them.
#[must_use]
pub fn sums(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(SUM_BYTES).map(|part| append(0, part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_and_a_flipped_bit_does_not() {
        let header = UndoHeader {
            old_length: 1 << 40,
            new_length: 3,
            file_write_guid: Guid::random(),
            pieces: 9,
            body_length: 99,
            body_checksum: 0xdead_beef,
        };
        let bytes = header.encode();
        assert_eq!(UndoHeader::decode(bytes), Some(header));
        for position in 0..bytes.len() {
            let mut broken = bytes;
            broken[position] ^= 4;
            assert_eq!(UndoHeader::decode(broken), None, "{position}");
        }
    }

    #[test]
    fn a_piece_lies_inside_of_the_file() {
        let piece = UndoPiece { offset: 4096, length: 513, has_old: true, versions: 2 };
        assert_eq!(UndoPiece::decode(piece.encode(), 4096 + 513), Some(piece));
        assert_eq!(UndoPiece::decode(piece.encode(), 4096 + 512), None);
        assert_eq!((piece.sums_per_version(), piece.body_length()), (2, 2 * 2 * 4 + 513));
        for wrong in [
            UndoPiece { length: 0, ..piece },
            UndoPiece { length: PIECE_BYTES_MAX + 1, ..piece },
            UndoPiece { offset: u64::MAX, ..piece },
            UndoPiece { versions: 0, ..piece },
            UndoPiece { versions: VERSIONS_MAX + 1, ..piece },
        ] {
            assert_eq!(UndoPiece::decode(wrong.encode(), 1 << 62), None, "{wrong:?}");
        }
    }
}
