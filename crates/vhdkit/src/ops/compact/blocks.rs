//! Sets of blocks, and which blocks of an image hold nothing that anybody needs.

use std::ops::Range;

use super::super::segments::is_zero;
use super::super::{Progress, advance};
use crate::error::Result;
use crate::format::bat::{BatEntry, PayloadState};
use crate::image::extents::LayerCursor;
use crate::image::{BlockDevice as _, Image, Layer};
use crate::units::BlockIndex;

/// Bytes read at once.
const READ_BYTES: u64 = 1 << 20;

/// One bit for each block of a disk: at most 8 MiB.
#[derive(Clone, Debug, Default)]
pub(super) struct BlockSet {
    words: Vec<u64>,
    count: u64,
}

impl BlockSet {
    pub(super) fn new(blocks: u64) -> Self {
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(usize::MAX); // at most 2^20
        Self { words: vec![0; words], count: 0 }
    }

    pub(super) fn insert(&mut self, block: u64) {
        if let Some(word) = usize::try_from(block / 64).ok().and_then(|word| self.words.get_mut(word)) {
            let mask = 1 << (block % 64);
            self.count += u64::from(*word & mask == 0);
            *word |= mask;
        }
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// How many there are.
    pub(super) fn len(&self) -> u64 {
        self.count
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.words).flat_map(|(index, word)| {
            let (base, mut left): (u64, u64) = (index * 64, *word);
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
                left &= left - 1; // takes off the lowest bit: there is one
                Some(base + bit)
            })
        })
    }
}

/// Collects free ranges of a disk, in their order, into the blocks that lie wholly inside.
#[derive(Debug)]
pub(super) struct FreeBlocks {
    pub(super) blocks: BlockSet,
    block_size: u64,
    disk_size: u64,
    pending: Range<u64>,
}

impl FreeBlocks {
    pub(super) fn new(disk_size: u64, block_size: u64) -> Self {
        Self { blocks: BlockSet::new(disk_size.div_ceil(block_size)), block_size, disk_size, pending: 0..0 }
    }

    /// Adds a range; those that touch the one before continue it.
    pub(super) fn add(&mut self, range: &Range<u64>) {
        if range.start == self.pending.end && !self.pending.is_empty() {
            self.pending.end = range.end;
        } else {
            self.end_run();
            self.pending = range.clone();
        }
    }

    /// Nothing continues the last range: a file system ends, and what comes behind is another's.
    pub(super) fn end_run(&mut self) {
        let run = std::mem::replace(&mut self.pending, 0..0);
        if run.is_empty() {
            return;
        }
        let first = run.start.div_ceil(self.block_size);
        // A last block that the disk cuts off is whole when all of it that there is is free.
        let end = if run.end >= self.disk_size {
            self.disk_size.div_ceil(self.block_size)
        } else {
            run.end / self.block_size
        };
        for block in first..end {
            self.blocks.insert(block);
        }
    }
}

/// What is to be dropped, and what there is.
#[derive(Debug, Default)]
pub(super) struct Unneeded {
    /// Blocks that read as zero.
    pub(super) zero: BlockSet,
    /// Blocks that are free inside a file system of the guest.
    pub(super) free: BlockSet,
    /// Blocks that keep space, but hold nothing: undefined and unmapped ones.
    pub(super) anchored: BlockSet,
    /// Blocks with space.
    pub(super) present: u64,
    /// Bytes that were read to look for zeros.
    pub(super) bytes_read: u64,
}

/// Looks at every block that has space. `free` are the guest's free blocks.
pub(super) fn find_unneeded(
    image: &Image,
    layer: &Layer,
    free: &BlockSet,
    zero_scan: bool,
    progress: &dyn Progress,
) -> Result<Unneeded> {
    let geometry = *layer.geometry();
    let blocks = geometry.payload_blocks();
    let mut found = Unneeded {
        zero: BlockSet::new(blocks),
        free: BlockSet::new(blocks),
        anchored: BlockSet::new(blocks),
        ..Unneeded::default()
    };
    let mut cursor = LayerCursor::new(layer);
    let mut scan = ZeroScan { image, layer, buffer: Vec::new(), read: 0 };
    let mut block = 0;
    while block < blocks {
        let index = geometry.payload_index(BlockIndex(block));
        let entry = cursor.entry(index)?;
        let in_chunk = geometry.chunk_ratio() - block % geometry.chunk_ratio();
        if entry.file_offset().0 == 0 {
            block += cursor.count_equal(index, in_chunk.min(blocks - block), entry)?.max(1);
            continue;
        }
        match entry.payload_state() {
            Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) => {
                found.present += 1;
                if free.contains(block) {
                    found.free.insert(block);
                } else if zero_scan && scan.is_zero(BlockIndex(block), entry)? {
                    found.zero.insert(block);
                }
            }
            Some(PayloadState::Undefined | PayloadState::Unmapped) => {
                found.present += 1;
                found.anchored.insert(block);
            }
            _ => {}
        }
        block += 1;
        advance(progress, (block * geometry.block_size()).min(geometry.disk_size()), Some(geometry.disk_size()))?;
    }
    found.bytes_read = scan.read;
    Ok(found)
}

struct ZeroScan<'a> {
    image: &'a Image,
    layer: &'a Layer,
    buffer: Vec<u8>,
    read: u64,
}

impl ZeroScan<'_> {
    /// Whether a block with data reads as zero, as far as the disk reaches. Holes of the file are not read.
    fn is_zero(&mut self, block: BlockIndex, entry: BatEntry) -> Result<bool> {
        let range = self.layer.geometry().block_range(block);
        if entry.payload_state() == Some(PayloadState::PartiallyPresent) {
            // Sectors of parents count too.
            return self.all_zero(&range, |scan, part, offset| scan.image.read_at(part, offset));
        }
        let start = entry.file_offset().0;
        let data = start..start + (range.end - range.start); // the block lies inside the file
        let mut position = data.start;
        while position < data.end {
            let next = self.layer.view().next_data(position..data.end)?;
            let Some(next) = next else { return Ok(true) };
            if !self.all_zero(&next, |scan, part, offset| scan.layer.view().read_at(part, offset))? {
                return Ok(false);
            }
            position = next.end.max(position + 1);
        }
        Ok(true)
    }

    fn all_zero(&mut self, range: &Range<u64>, read: impl Fn(&Self, &mut [u8], u64) -> Result<()>) -> Result<bool> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(usize::try_from(READ_BYTES).unwrap_or(0), 0);
        let mut position = range.start;
        // Most blocks with data show it in their first sectors.
        let mut step = 4096;
        let mut zero = true;
        while zero && position < range.end {
            let length = (range.end - position).min(step);
            let part = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
            let result = read(self, part, position);
            if let Err(error) = result {
                self.buffer = buffer;
                return Err(error);
            }
            zero = is_zero(part);
            self.read += length;
            position += length;
            step = READ_BYTES;
        }
        self.buffer = buffer;
        Ok(zero)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ranges_become_whole_blocks() {
        let mut free = FreeBlocks::new(100, 16);
        for range in [3..20, 20..40, 48..64, 80..100] {
            free.add(&range);
        }
        free.end_run();
        assert_eq!(free.blocks.iter().collect::<Vec<_>>(), [1, 3, 5, 6]);
        assert_eq!(free.blocks.len(), 4);
        let mut apart = FreeBlocks::new(100, 16);
        apart.add(&(0..8));
        apart.end_run();
        apart.add(&(8..16));
        apart.end_run();
        assert_eq!(apart.blocks.len(), 0, "two file systems share the block");
    }
}
