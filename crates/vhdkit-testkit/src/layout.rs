//! Where the structures of a built image lie, and the arithmetic of blocks and chunks, written from the specification.

use std::collections::BTreeMap;

use crate::guid::Guid;

/// Blocks, chunks and BAT indices of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a payload block.
    pub block_size: u64,
    /// Bytes of a logical sector.
    pub sector_size: u64,
    /// Payload blocks that share a bitmap block.
    pub chunk_ratio: u64,
    /// Payload blocks of the disk.
    pub block_count: u64,
    /// Chunks of the disk.
    pub chunk_count: u64,
    /// BAT entries that must exist.
    pub entries_required: u64,
}

impl Geometry {
    /// The geometry of a disk; nonsense sizes give some geometry instead of a panic.
    #[must_use]
    pub fn new(virtual_size: u64, block_size: u32, sector_size: u32, has_parent: bool) -> Self {
        let block_size = u64::from(block_size).max(4096);
        let sector_size = u64::from(sector_size).max(1);
        let chunk_ratio = ((sector_size << 23) / block_size).max(1);
        let block_count = virtual_size.div_ceil(block_size);
        let chunk_count = block_count.div_ceil(chunk_ratio);
        let entries_required = if has_parent {
            chunk_count * (chunk_ratio + 1)
        } else {
            block_count + block_count.saturating_sub(1) / chunk_ratio
        };
        Self { block_size, sector_size, chunk_ratio, block_count, chunk_count, entries_required }
    }

    /// The BAT index of a payload block.
    #[must_use]
    pub fn payload_index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// The BAT index of a chunk's bitmap block.
    #[must_use]
    pub fn bitmap_index(&self, chunk: u64) -> u64 {
        (chunk + 1) * self.chunk_ratio + chunk
    }

    /// Where the bits of a payload block start in its bitmap block, in bytes; a block of less than eight sectors does not exist.
    #[must_use]
    pub fn bits_start(&self, block: u64) -> u64 {
        block % self.chunk_ratio * (self.block_size / self.sector_size / 8)
    }

    /// The length of a BAT region that holds every entry even of a differencing disk, in whole mebibytes.
    #[must_use]
    pub fn bat_length(&self) -> u64 {
        (self.chunk_count * (self.chunk_ratio + 1) * 8).next_multiple_of(1 << 20).clamp(1 << 20, 1 << 31)
    }
}

/// The file offset of every structure of a built image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Blocks, chunks and BAT indices.
    pub geometry: Geometry,
    /// File offset of the log.
    pub log: u64,
    /// Bytes of the log.
    pub log_length: u32,
    /// File offset of the metadata region, which starts with its table.
    pub metadata: u64,
    /// Bytes of the metadata region.
    pub metadata_length: u32,
    /// File offset of the BAT.
    pub bat: u64,
    /// Bytes of the BAT region.
    pub bat_length: u32,
    /// File offset of every metadata item's data and of its table entry.
    pub items: BTreeMap<Guid, (u64, u64)>,
    /// File offset of every allocated payload block, soft anchors included.
    pub payload: BTreeMap<u64, u64>,
    /// File offset of every allocated bitmap block by chunk.
    pub bitmaps: BTreeMap<u64, u64>,
    /// End of the last allocated object.
    pub end: u64,
}

impl Layout {
    /// File offset of header 0 or 1.
    #[must_use]
    pub fn header(&self, slot: u64) -> u64 {
        (slot + 1) << 16
    }

    /// File offset of region table 0 or 1.
    #[must_use]
    pub fn region_table(&self, copy: u64) -> u64 {
        (copy + 3) << 16
    }

    /// File offset of an entry of a region table.
    #[must_use]
    pub fn region_entry(&self, copy: u64, entry: u64) -> u64 {
        self.region_table(copy) + 16 + 32 * entry
    }

    /// File offset of an entry of the metadata table by its number.
    #[must_use]
    pub fn metadata_entry(&self, entry: u64) -> u64 {
        self.metadata + 32 + 32 * entry
    }

    /// File offset of a metadata item's data; panics if the image has no such item.
    #[must_use]
    pub fn item(&self, guid: Guid) -> u64 {
        self.items.get(&guid).expect("the image has this item").0
    }

    /// File offset of a metadata item's table entry; panics if the image has no such item.
    #[must_use]
    pub fn item_entry(&self, guid: Guid) -> u64 {
        self.items.get(&guid).expect("the image has this item").1
    }

    /// File offset of a BAT entry by its index.
    #[must_use]
    pub fn bat_entry(&self, index: u64) -> u64 {
        self.bat + 8 * index
    }

    /// File offset of a payload block's BAT entry.
    #[must_use]
    pub fn payload_entry(&self, block: u64) -> u64 {
        self.bat_entry(self.geometry.payload_index(block))
    }

    /// File offset of the BAT entry of a chunk's bitmap block.
    #[must_use]
    pub fn bitmap_entry(&self, chunk: u64) -> u64 {
        self.bat_entry(self.geometry.bitmap_index(chunk))
    }

    /// File offset of a payload block; panics if it has none.
    #[must_use]
    pub fn payload_block(&self, block: u64) -> u64 {
        *self.payload.get(&block).expect("the payload block is allocated")
    }

    /// File offset of a chunk's bitmap block; panics if it has none.
    #[must_use]
    pub fn bitmap_block(&self, chunk: u64) -> u64 {
        *self.bitmaps.get(&chunk).expect("the bitmap block is allocated")
    }

    /// File offset of the bits of a payload block; panics if its chunk has no bitmap block.
    #[must_use]
    pub fn block_bits(&self, block: u64) -> u64 {
        self.bitmap_block(block / self.geometry.chunk_ratio) + self.geometry.bits_start(block)
    }
}

#[cfg(test)]
mod tests {
    use super::Geometry;

    #[test]
    fn the_worked_values_of_the_specification_come_out() {
        let table = [
            (512, 1, 4096, 67_108_864, 67_125_247, 67_125_248, 513),
            (512, 2, 2048, 33_554_432, 33_570_815, 33_570_816, 257),
            (512, 16, 256, 4_194_304, 4_210_687, 4_210_688, 33),
            (512, 32, 128, 2_097_152, 2_113_535, 2_113_536, 17),
            (512, 256, 16, 262_144, 278_527, 278_528, 3),
            (4096, 1, 32_768, 67_108_864, 67_110_911, 67_110_912, 513),
            (4096, 32, 1024, 2_097_152, 2_099_199, 2_099_200, 17),
            (4096, 256, 128, 262_144, 264_191, 264_192, 3),
        ];
        for (sector_size, block_mib, chunk_ratio, count, dynamic, differencing, bat_mib) in table {
            let geometry = |has_parent| Geometry::new(64 << 40, block_mib << 20, sector_size, has_parent);
            assert_eq!(geometry(false).chunk_ratio, chunk_ratio);
            assert_eq!(geometry(false).block_count, count);
            assert_eq!(geometry(false).entries_required, dynamic);
            assert_eq!(geometry(true).entries_required, differencing);
            assert_eq!(geometry(true).bat_length(), bat_mib << 20);
        }
        let windows = Geometry::new(10 << 30, 32 << 20, 512, false);
        assert_eq!(windows.block_count, 320);
        assert_eq!(windows.payload_index(319), 321);
        assert_eq!(windows.bitmap_index(0), 128);
        assert_eq!(windows.bits_start(129), 8192);
    }
}
