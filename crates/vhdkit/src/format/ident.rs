//! The file type identifier ([MS-VHDX] 2.2.1), and what a file is by its first bytes.

use std::mem::offset_of;

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first eight bytes of every VHDX file.
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";
/// The first eight bytes of the footer of a VHD, which a dynamic VHD repeats at its beginning.
pub const VHD_SIGNATURE: [u8; 8] = *b"conectix";
/// How many UTF-16 units the creator may have.
pub const CREATOR_UNITS_MAX: usize = 256;

/// The defined part of the first 64 KiB.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawFileIdentifier {
    /// `vhdxfile`.
    pub signature: [u8; 8],
    /// Who made the file: UTF-16, for people only.
    pub creator: [U16; CREATOR_UNITS_MAX],
}

const _: () = assert!(size_of::<RawFileIdentifier>() == 520 && offset_of!(RawFileIdentifier, creator) == 8);

impl RawFileIdentifier {
    /// An identifier with the given creator; units past the 256th are left out.
    #[must_use]
    pub fn new(creator: &str) -> Self {
        let mut raw = Self { signature: SIGNATURE, creator: [U16::ZERO; CREATOR_UNITS_MAX] };
        for (unit, value) in raw.creator.iter_mut().zip(creator.encode_utf16()) {
            unit.set(value);
        }
        raw
    }

    /// The creator, safe to print. It is never interpreted (V-003).
    #[must_use]
    pub fn creator_text(&self) -> String {
        let units: Vec<u16> = self.creator.iter().map(|unit| unit.get()).take_while(|unit| *unit != 0).collect();
        crate::text::escape_utf16(&units)
    }
}

/// What a file is by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Probe {
    /// A VHDX file.
    Vhdx,
    /// A VHD (the older format, `conectix`), which this library does not read.
    Vhd,
    /// Neither.
    Unknown,
}

/// Tells what a file is from its first bytes (eight are enough).
///
/// A fixed VHD has its signature only in the last 512 bytes of the file, which this cannot see.
///
/// ```
/// use vhdkit::{Probe, probe};
/// assert_eq!(probe(b"vhdxfile..."), Probe::Vhdx);
/// assert_eq!(probe(b"conectix..."), Probe::Vhd);
/// assert_eq!(probe(b""), Probe::Unknown);
/// ```
#[must_use]
pub fn probe(start: &[u8]) -> Probe {
    match start.first_chunk::<8>() {
        Some(&SIGNATURE) => Probe::Vhdx,
        Some(&VHD_SIGNATURE) => Probe::Vhd,
        _ => Probe::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn creator_ends_at_nul_or_after_256_units() {
        assert_eq!(RawFileIdentifier::new("vhdkit").creator_text(), "vhdkit");
        let long = "x".repeat(300);
        assert_eq!(RawFileIdentifier::new(&long).creator_text(), "x".repeat(256));
    }
}
