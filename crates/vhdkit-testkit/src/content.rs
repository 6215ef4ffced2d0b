//! What payload blocks hold: patterns that any sector can be recomputed from.

use std::fmt;
use std::sync::Arc;

use crate::rng::{Rng, mix};

/// Patterns are made in units of this many bytes, whatever the disk's sector size.
pub const UNIT: u64 = 512;

/// What is xored to a seed for bytes that no guest may see.
const STALE: u64 = 0x5354_414C_4521_2121;

/// Fills `buffer` with the pattern of `seed` from the 512-byte unit `first_unit` on.
///
/// Every unit differs from every other one and is never all zero. `buffer` is a multiple of 512 bytes long.
pub fn pattern(seed: u64, first_unit: u64, buffer: &mut [u8]) {
    for (unit, piece) in (first_unit..).zip(buffer.chunks_mut(UNIT as usize)) {
        Rng::new(mix(seed).wrapping_add(mix(unit.wrapping_mul(0xD134_2543_DE82_EF95)))).fill(piece);
    }
}

/// The bytes of a payload block, as a function of the guest's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    #[default]
    Zero,
    /// Every byte this one.
    Fill(u8),
    /// Every unit the pattern of this seed.
    Pattern {
        /// The seed of the pattern.
        seed: u64,
    },
    /// The pattern in every `stride`th unit of the disk, zeros in the others; cheap in large blocks.
    Sparse {
        /// The seed of the pattern.
        seed: u64,
        /// The distance in units between two that hold data.
        stride: u64,
    },
    /// These bytes from the start of the block, then zeros.
    Bytes(Arc<Vec<u8>>),
}

impl Content {
    /// The pattern of `seed` in every unit.
    #[must_use]
    pub fn pattern(seed: u64) -> Self {
        Self::Pattern { seed }
    }

    /// These bytes from the start of the block, then zeros.
    #[must_use]
    pub fn bytes(bytes: &[u8]) -> Self {
        Self::Bytes(Arc::new(bytes.to_vec()))
    }

    /// Whether every byte is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        matches!(self, Self::Zero | Self::Fill(0))
    }

    /// The same kind of content with other bytes, for places that no guest may see.
    #[must_use]
    pub fn stale(&self) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Fill(byte) => Self::Fill(!byte),
            Self::Pattern { seed } => Self::Pattern { seed: seed ^ STALE },
            Self::Sparse { seed, stride } => Self::Sparse { seed: seed ^ STALE, stride: *stride },
            Self::Bytes(bytes) => Self::bytes(&bytes.iter().map(|byte| !byte).collect::<Vec<u8>>()),
        }
    }

    /// Fills `buffer` for the block that starts at guest address `block_start`, from `within` bytes into it.
    ///
    /// `within` and the length of `buffer` are multiples of 512.
    pub fn fill(&self, block_start: u64, within: u64, buffer: &mut [u8]) {
        let first_unit = (block_start + within) / UNIT;
        match self {
            Self::Zero => buffer.fill(0),
            Self::Fill(byte) => buffer.fill(*byte),
            Self::Pattern { seed } => pattern(*seed, first_unit, buffer),
            Self::Sparse { seed, stride } => {
                buffer.fill(0);
                let mut unit = first_unit.next_multiple_of(*stride);
                while let Some(piece) =
                    buffer.get_mut(((unit - first_unit) * UNIT) as usize..).filter(|rest| !rest.is_empty())
                {
                    pattern(*seed, unit, &mut piece[..UNIT as usize]);
                    unit += stride;
                }
            }
            Self::Bytes(bytes) => {
                buffer.fill(0);
                let behind = bytes.get(within as usize..).unwrap_or_default();
                let count = behind.len().min(buffer.len());
                buffer[..count].copy_from_slice(&behind[..count]);
            }
        }
    }
}

/// Which sectors of a block its bitmap claims for this file; the argument counts logical sectors from the block's start.
#[derive(Clone)]
pub struct SectorMask(Arc<dyn Fn(u64) -> bool + Send + Sync>);

impl SectorMask {
    /// A mask by a function.
    pub fn new(function: impl Fn(u64) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(function))
    }

    /// Every sector.
    #[must_use]
    pub fn all() -> Self {
        Self::new(|_| true)
    }

    /// No sector.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|_| false)
    }

    /// These bits, then none.
    #[must_use]
    pub fn bits(bits: Vec<bool>) -> Self {
        Self::new(move |sector| bits.get(sector as usize).copied().unwrap_or(false))
    }

    /// Runs of about `run` sectors, of which about `percent` of a hundred are claimed.
    #[must_use]
    pub fn random(seed: u64, run: u64, percent: u64) -> Self {
        Self::new(move |sector| mix(seed ^ mix(sector / run.max(1) + 1)) % 100 < percent)
    }

    /// Whether the bitmap claims this sector.
    #[must_use]
    pub fn contains(&self, sector: u64) -> bool {
        (self.0)(sector)
    }
}

impl fmt::Debug for SectorMask {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SectorMask(..)")
    }
}
