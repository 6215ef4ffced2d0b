//! The only place with block, chunk, BAT and bitmap arithmetic ([MS-VHDX] 2.4, 2.5).
//!
//! ```text
//! BAT:   | block 0 | block 1 | ... | block CR-1 | bitmap of chunk 0 | block CR | ...
//! chunk: 2^23 logical sectors;  CR = chunk size / block size
//! ```
//!
//! The layout is the same for fixed, dynamic and differencing images: also where no bitmap is ever used, its entry is
//! there. Readers that forget this return wrong bytes beyond the first chunk.

use std::ops::Range;

use super::DISK_SIZE_MAX;
use crate::units::{BatIndex, BlockIndex, ChunkIndex, GuestOffset};

/// Logical sectors described by one sector bitmap block.
pub const SECTORS_PER_CHUNK: u64 = 1 << 23;
/// Smallest block size.
pub const BLOCK_SIZE_MIN: u32 = 1 << 20;
/// Largest block size.
pub const BLOCK_SIZE_MAX: u32 = 256 << 20;
/// Bytes of a sector bitmap block.
pub const BITMAP_BLOCK_BYTES: u64 = 1 << 20;
/// Bytes of a BAT entry.
pub const BAT_ENTRY_BYTES: u64 = 8;

/// The numbers that place every byte of a disk. Copy it freely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    disk_size: u64,
    block_shift: u32,
    sector_shift: u32,
    chunk_ratio_shift: u32,
    differencing: bool,
}

/// What a BAT entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatSlot {
    /// A payload block.
    Payload(BlockIndex),
    /// The sector bitmap block of a chunk.
    Bitmap(ChunkIndex),
}

impl Geometry {
    /// The geometry of a disk; `None` unless the block size is a power of two from 1 to 256 MiB, the sector size 512
    /// or 4096, and the disk size a multiple of the sector from one sector to 64 TiB.
    #[must_use]
    pub fn new(disk_size: u64, block_size: u32, logical_sector_size: u32, differencing: bool) -> Option<Self> {
        let block_ok = block_size.is_power_of_two() && (BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size);
        let sector_ok = logical_sector_size == 512 || logical_sector_size == 4096;
        if !block_ok || !sector_ok {
            return None;
        }
        if disk_size == 0 || disk_size > DISK_SIZE_MAX || !disk_size.is_multiple_of(u64::from(logical_sector_size)) {
            return None;
        }
        let block_shift = block_size.trailing_zeros();
        let sector_shift = logical_sector_size.trailing_zeros();
        // A chunk is at least 4 GiB (2^(23+9)) and a block at most 256 MiB (2^28): the difference is positive.
        let chunk_ratio_shift = 23 + sector_shift - block_shift;
        Some(Self { disk_size, block_shift, sector_shift, chunk_ratio_shift, differencing })
    }

    /// Bytes of the virtual disk.
    #[must_use]
    pub const fn disk_size(&self) -> u64 {
        self.disk_size
    }

    /// Bytes of a payload block.
    #[must_use]
    pub const fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Bytes of a logical sector.
    #[must_use]
    pub const fn logical_sector_size(&self) -> u64 {
        1 << self.sector_shift
    }

    /// Whether unallocated sectors come from a parent.
    #[must_use]
    pub const fn is_differencing(&self) -> bool {
        self.differencing
    }

    /// Payload blocks per chunk.
    #[must_use]
    pub const fn chunk_ratio(&self) -> u64 {
        1 << self.chunk_ratio_shift
    }

    /// Payload blocks of the disk; at least 1.
    #[must_use]
    pub const fn payload_blocks(&self) -> u64 {
        self.disk_size.div_ceil(1 << self.block_shift)
    }

    /// Chunks of the disk; at least 1.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.payload_blocks().div_ceil(self.chunk_ratio())
    }

    /// BAT entries that the image must have: up to the last payload block, or, when differencing, up to the bitmap
    /// entry of the last chunk.
    #[must_use]
    pub const fn bat_entries(&self) -> u64 {
        if self.differencing {
            self.chunks() * (self.chunk_ratio() + 1)
        } else {
            let blocks = self.payload_blocks();
            blocks + ((blocks - 1) >> self.chunk_ratio_shift)
        }
    }

    /// Bytes of the BAT region for a new image: room for whole chunks, so that a conversion between types needs no
    /// new layout, rounded up to 1 MiB.
    #[must_use]
    pub const fn bat_region_bytes(&self) -> u64 {
        let bytes = self.chunks() * (self.chunk_ratio() + 1) * BAT_ENTRY_BYTES;
        (bytes + 0xf_ffff) & !0xf_ffff // at most 513 MiB: cannot overflow
    }

    /// The block that holds a guest offset.
    #[must_use]
    pub const fn block_of(&self, offset: GuestOffset) -> BlockIndex {
        BlockIndex(offset.0 >> self.block_shift)
    }

    /// The offset inside its block.
    #[must_use]
    pub const fn offset_in_block(&self, offset: GuestOffset) -> u64 {
        offset.0 & (self.block_size() - 1)
    }

    /// The guest range of a block, cut off at the end of the disk. `block` must be one of the disk's.
    #[must_use]
    pub const fn block_range(&self, block: BlockIndex) -> Range<u64> {
        let start = block.0 << self.block_shift; // below 2^46, as the disk is
        let end = start + self.block_size();
        start..if end < self.disk_size { end } else { self.disk_size }
    }

    /// Where the entry of a payload block stands in the BAT.
    #[must_use]
    pub const fn payload_index(&self, block: BlockIndex) -> BatIndex {
        BatIndex(block.0 + (block.0 >> self.chunk_ratio_shift))
    }

    /// Where the sector bitmap entry of a chunk stands in the BAT.
    #[must_use]
    pub const fn bitmap_index(&self, chunk: ChunkIndex) -> BatIndex {
        BatIndex(((chunk.0 + 1) << self.chunk_ratio_shift) + chunk.0)
    }

    /// What the entry at an index is for; also answers for indices behind the disk's last.
    #[must_use]
    pub const fn slot(&self, index: BatIndex) -> BatSlot {
        let group = index.0 / (self.chunk_ratio() + 1);
        let position = index.0 % (self.chunk_ratio() + 1);
        if position == self.chunk_ratio() {
            BatSlot::Bitmap(ChunkIndex(group))
        } else {
            BatSlot::Payload(BlockIndex((group << self.chunk_ratio_shift) + position))
        }
    }

    /// The chunk of a block.
    #[must_use]
    pub const fn chunk_of(&self, block: BlockIndex) -> ChunkIndex {
        ChunkIndex(block.0 >> self.chunk_ratio_shift)
    }

    /// Bytes of sector bitmap per payload block.
    #[must_use]
    pub const fn bitmap_bytes_per_block(&self) -> u64 {
        1 << (self.block_shift - self.sector_shift - 3)
    }

    /// The number of the bit, counted from the start of the chunk's bitmap block, for the sector at a guest offset.
    /// Bit n is bit n % 8, counted from the least significant, of byte n / 8.
    #[must_use]
    pub const fn bitmap_bit(&self, offset: GuestOffset) -> u64 {
        (offset.0 >> self.sector_shift) & (SECTORS_PER_CHUNK - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{MIB, TIB};

    /// Walks the BAT as the specification's prose does, entry by entry.
    fn brute_force(payload_blocks: u64, chunk_ratio: u64) -> (Vec<BatSlot>, Vec<u64>) {
        let mut slots = Vec::new();
        let mut index_of_block = Vec::new();
        let mut chunk = 0;
        for block in 0..payload_blocks.next_multiple_of(chunk_ratio) {
            index_of_block.push(slots.len() as u64);
            slots.push(BatSlot::Payload(BlockIndex(block)));
            if (block + 1) % chunk_ratio == 0 {
                slots.push(BatSlot::Bitmap(ChunkIndex(chunk)));
                chunk += 1;
            }
        }
        (slots, index_of_block)
    }

    #[test]
    fn agrees_with_a_walk_for_every_block_and_sector_size() {
        for block_shift in 20..=28 {
            for sector in [512_u32, 4096] {
                let block_size = 1_u32 << block_shift;
                let ratio = (SECTORS_PER_CHUNK * u64::from(sector)) >> block_shift;
                for blocks in [1, 2, ratio - 1, ratio, ratio + 1, 2 * ratio, 3 * ratio + 7] {
                    for tail in [0, u64::from(sector)] {
                        let size = blocks * u64::from(block_size) - tail;
                        let dynamic = Geometry::new(size, block_size, sector, false).unwrap();
                        let differencing = Geometry::new(size, block_size, sector, true).unwrap();
                        let (slots, index_of_block) = brute_force(blocks, ratio);
                        assert_eq!(dynamic.payload_blocks(), blocks);
                        assert_eq!(dynamic.chunk_ratio(), ratio);
                        assert_eq!(dynamic.bat_entries(), index_of_block[usize::try_from(blocks).unwrap() - 1] + 1);
                        assert_eq!(differencing.bat_entries(), slots.len() as u64);
                        for (index, slot) in slots.iter().enumerate() {
                            assert_eq!(dynamic.slot(BatIndex(index as u64)), *slot);
                            match *slot {
                                BatSlot::Payload(block) => assert_eq!(dynamic.payload_index(block).0, index as u64),
                                BatSlot::Bitmap(chunk) => assert_eq!(dynamic.bitmap_index(chunk).0, index as u64),
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn worked_values_at_64_tib() {
        let values: [(u32, u32, [u64; 6]); 4] = [
            (512, 1 << 20, [4096, 256, 67_108_864, 67_125_247, 67_125_248, 513]),
            (512, 32 << 20, [128, 8192, 2_097_152, 2_113_535, 2_113_536, 17]),
            (4096, 1 << 20, [32768, 32, 67_108_864, 67_110_911, 67_110_912, 513]),
            (4096, 256 << 20, [128, 8192, 262_144, 264_191, 264_192, 3]),
        ];
        for (sector, block, [ratio, bitmap, blocks, entries, entries_diff, region]) in values {
            let dynamic = Geometry::new(64 * TIB, block, sector, false).unwrap();
            let differencing = Geometry::new(64 * TIB, block, sector, true).unwrap();
            assert_eq!(dynamic.chunk_ratio(), ratio);
            assert_eq!(dynamic.bitmap_bytes_per_block(), bitmap);
            assert_eq!(dynamic.payload_blocks(), blocks);
            assert_eq!(dynamic.bat_entries(), entries);
            assert_eq!(differencing.bat_entries(), entries_diff);
            assert_eq!(dynamic.bat_region_bytes(), region * MIB);
        }
    }

    #[test]
    fn bitmap_bits_count_from_the_start_of_the_chunk() {
        let geometry = Geometry::new(64 * TIB, 1 << 20, 512, true).unwrap();
        assert_eq!(geometry.bitmap_bit(GuestOffset(512 * 5)), 5);
        assert_eq!(geometry.bitmap_bit(GuestOffset(512 * SECTORS_PER_CHUNK)), 0);
        assert_eq!(geometry.bitmap_bit(GuestOffset(512 * SECTORS_PER_CHUNK - 512)), SECTORS_PER_CHUNK - 1);
    }

    #[test]
    fn refuses_what_the_format_does_not_allow() {
        for (size, block, sector) in [
            (0, 1 << 20, 512),
            (512, 1 << 19, 512),
            (512, 3 << 20, 512),
            (512, 512 << 20, 512),
            (512, 1 << 20, 520),
            (512, 1 << 20, 4096),
            (513, 1 << 20, 512),
            (64 * TIB + 512, 1 << 20, 512),
        ] {
            assert_eq!(Geometry::new(size, block, sector, false), None, "{size} {block} {sector}");
        }
    }
}
