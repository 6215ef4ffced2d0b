//! GUIDs in the mixed-endian layout that Windows stores.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID as stored: Data1, Data2 and Data3 little-endian, Data4 as written.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Guid([u8; 16]);

const _: () = assert!(size_of::<Guid>() == 16);

impl Guid {
    /// The all-zero GUID.
    pub const NIL: Self = Self([0; 16]);

    /// From the 16 bytes as they stand in the file.
    #[must_use]
    pub const fn from_stored(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes as they stand in the file.
    #[must_use]
    pub const fn stored(self) -> [u8; 16] {
        self.0
    }

    /// From the number that the printed form denotes.
    #[must_use]
    pub const fn from_printed(value: u128) -> Self {
        Self(Uuid::from_u128(value).to_bytes_le())
    }

    /// A new random GUID (version 4).
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4().to_bytes_le())
    }

    /// True for the all-zero GUID.
    #[must_use]
    pub fn is_nil(self) -> bool {
        self == Self::NIL
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes_le(self.0).as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a GUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAGuid;

impl fmt::Display for NotAGuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a GUID of the form 01234567-89ab-cdef-0123-456789abcdef")
    }
}

impl std::error::Error for NotAGuid {}

impl FromStr for Guid {
    type Err = NotAGuid;

    /// Reads the hyphenated form, with or without braces, in either case.
    fn from_str(text: &str) -> Result<Self, NotAGuid> {
        let inner = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}').ok_or(NotAGuid)?,
            None => text,
        };
        if inner.len() != 36 {
            return Err(NotAGuid);
        }
        Uuid::try_parse(inner).map(|uuid| Self(uuid.to_bytes_le())).map_err(|_| NotAGuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_endian_as_in_the_specification() {
        let bat = Guid::from_printed(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
        assert_eq!(
            bat.stored(),
            [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 8]
        );
        assert_eq!(bat.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
    }

    #[test]
    fn text_with_and_without_braces_in_either_case() {
        let plain: Guid = "2dc27766-f623-4200-9d64-115e9bfd4a08".parse().unwrap();
        assert_eq!("{2DC27766-F623-4200-9D64-115E9BFD4A08}".parse(), Ok(plain));
        for bad in [
            "",
            "{",
            "{2dc27766-f623-4200-9d64-115e9bfd4a08",
            "2dc27766f62342009d64115e9bfd4a08",
            "2dc27766-f623-4200-9d64-115e9bfd4a0g",
        ] {
            assert_eq!(bad.parse::<Guid>(), Err(NotAGuid), "{bad}");
        }
    }
}
