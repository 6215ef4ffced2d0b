//! Typed offsets and indices, so that a guest offset is never used as a file offset.
//!
//! Arithmetic on numbers that come from an image is checked: the methods return `Option`.

use std::fmt;

/// One kibibyte in bytes.
pub const KIB: u64 = 1 << 10;
/// One mebibyte in bytes, the alignment of every object in a VHDX file ([MS-VHDX] 2.1).
pub const MIB: u64 = 1 << 20;
/// One gibibyte in bytes.
pub const GIB: u64 = 1 << 30;
/// One tebibyte in bytes.
pub const TIB: u64 = 1 << 40;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $hex:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// Adds a length; `None` on overflow.
            #[must_use]
            pub const fn checked_add(self, length: u64) -> Option<Self> {
                match self.0.checked_add(length) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if $hex { write!(f, "{:#x}", self.0) } else { write!(f, "{}", self.0) }
            }
        }
    };
}

unit!(
    /// A byte offset on the virtual disk, as the guest sees it.
    GuestOffset,
    true
);
unit!(
    /// A byte offset in the image file.
    FileOffset,
    true
);
unit!(
    /// The number of a payload block: guest offset divided by the block size.
    BlockIndex,
    false
);
unit!(
    /// The number of a chunk: 2^23 logical sectors, described by one sector bitmap block.
    ChunkIndex,
    false
);
unit!(
    /// The index of an entry in the block allocation table, sector bitmap entries included.
    BatIndex,
    false
);

/// Rounds up to a multiple of `unit` (a power of two); `None` on overflow.
#[must_use]
pub const fn round_up(value: u64, unit: u64) -> Option<u64> {
    debug_assert!(unit.is_power_of_two());
    match value.checked_add(unit - 1) {
        Some(sum) => Some(sum & !(unit - 1)),
        None => None,
    }
}

/// True when `value` is a multiple of `unit` (a power of two).
#[must_use]
pub const fn is_aligned(value: u64, unit: u64) -> bool {
    value & (unit - 1) == 0
}
