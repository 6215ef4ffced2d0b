//! What a guest must see, computed from the description of an image instead of from its bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use crate::content::{Content, SectorMask, UNIT};
use crate::sparse::is_zero;

/// Payload state: the parent's data, or zero without a parent.
pub const NOT_PRESENT: u8 = 0;
/// Payload state: no promise about the data; read as zero.
pub const UNDEFINED: u8 = 1;
/// Payload state: zero.
pub const ZERO: u8 = 2;
/// Payload state: trimmed; read as zero.
pub const UNMAPPED: u8 = 3;
/// Payload state, and state of a bitmap block: the file holds all of it.
pub const FULLY_PRESENT: u8 = 6;
/// Payload state: the bitmap says per sector whether this file or the parent holds it.
pub const PARTIALLY_PRESENT: u8 = 7;

/// One block of the model.
#[derive(Clone, Debug)]
pub struct ModelBlock {
    /// The payload state, one of the seven.
    pub state: u8,
    /// What the block holds where it is present.
    pub content: Content,
    /// The sectors that are present in a partially present block.
    pub mask: SectorMask,
}

/// A later change that lies over the blocks.
#[derive(Clone, Debug)]
struct Overlay {
    start: u64,
    end: u64,
    /// Nothing stands for zeros.
    bytes: Option<Vec<u8>>,
}

/// A virtual disk as its guest must see it.
#[derive(Clone, Debug)]
pub struct ModelDisk {
    /// The size in bytes.
    pub virtual_size: u64,
    /// The logical sector size in bytes.
    pub sector_size: u32,
    /// The block size in bytes.
    pub block_size: u32,
    /// The blocks that differ from `default_state`.
    pub blocks: BTreeMap<u64, ModelBlock>,
    /// The payload state of all other blocks.
    pub default_state: u8,
    /// The disk below, if this one is differencing.
    pub parent: Option<Arc<ModelDisk>>,
    overlays: Vec<Overlay>,
}

impl ModelDisk {
    /// A disk without data.
    #[must_use]
    pub fn new(virtual_size: u64, sector_size: u32, block_size: u32) -> Self {
        Self {
            virtual_size,
            sector_size,
            block_size,
            blocks: BTreeMap::new(),
            default_state: NOT_PRESENT,
            parent: None,
            overlays: Vec::new(),
        }
    }

    /// The bytes that a guest reads; panics beyond the end of the disk.
    #[must_use]
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let end = offset.checked_add(length as u64).expect("the range does not overflow");
        assert!(end <= self.virtual_size, "read of {offset:#x}..{end:#x} beyond the end {:#x}", self.virtual_size);
        self.read_clipped(offset, length)
    }

    /// The bytes that a child of this disk sees: zero beyond the end.
    #[must_use]
    pub fn read_clipped(&self, offset: u64, length: usize) -> Vec<u8> {
        let start = offset / UNIT * UNIT;
        let end = (offset + length as u64).next_multiple_of(UNIT);
        let mut wide = vec![0; (end - start) as usize];
        let mut position = start;
        while position < end.min(self.virtual_size) {
            let within = position % u64::from(self.block_size);
            let count = (u64::from(self.block_size) - within).min(end.min(self.virtual_size) - position);
            let from = (position - start) as usize;
            self.read_block(position, &mut wide[from..from + count as usize]);
            position += count;
        }
        self.apply_overlays(start, &mut wide);
        let skip = (offset - start) as usize;
        wide[skip..skip + length].to_vec()
    }

    /// Reads within one block; `buffer` is all zero.
    fn read_block(&self, position: u64, buffer: &mut [u8]) {
        let block_size = u64::from(self.block_size);
        let (index, within) = (position / block_size, position % block_size);
        let block = self.blocks.get(&index);
        match block.map_or(self.default_state, |block| block.state) {
            NOT_PRESENT => self.read_parent(position, buffer),
            FULLY_PRESENT => {
                if let Some(block) = block {
                    block.content.fill(index * block_size, within, buffer);
                }
            }
            PARTIALLY_PRESENT => {
                self.read_parent(position, buffer);
                if let Some(block) = block {
                    self.read_partial(block, index * block_size, within, buffer);
                }
            }
            _ => {}
        }
    }

    fn read_partial(&self, block: &ModelBlock, block_start: u64, within: u64, buffer: &mut [u8]) {
        let sector_size = u64::from(self.sector_size);
        for (unit, piece) in (within / UNIT..).zip(buffer.chunks_mut(UNIT as usize)) {
            if block.mask.contains(unit * UNIT / sector_size) {
                block.content.fill(block_start, unit * UNIT, piece);
            }
        }
    }

    fn read_parent(&self, position: u64, buffer: &mut [u8]) {
        if let Some(parent) = &self.parent {
            buffer.copy_from_slice(&parent.read_clipped(position, buffer.len()));
        }
    }

    fn apply_overlays(&self, start: u64, buffer: &mut [u8]) {
        let end = start + buffer.len() as u64;
        for overlay in &self.overlays {
            let (from, to) = (overlay.start.max(start), overlay.end.min(end));
            if from >= to {
                continue;
            }
            let target = &mut buffer[(from - start) as usize..(to - start) as usize];
            match &overlay.bytes {
                Some(bytes) => {
                    let skip = (from - overlay.start) as usize;
                    target.copy_from_slice(&bytes[skip..skip + target.len()]);
                }
                None => target.fill(0),
            }
        }
    }

    /// What a write by the guest changes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        assert!(end <= self.virtual_size, "write of {offset:#x}..{end:#x} beyond the end");
        self.overlays.push(Overlay { start: offset, end, bytes: Some(bytes.to_vec()) });
    }

    /// What zeroing by the guest changes.
    pub fn write_zeroes(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        assert!(end <= self.virtual_size, "zeroing of {offset:#x}..{end:#x} beyond the end");
        self.overlays.push(Overlay { start: offset, end, bytes: None });
    }

    /// Whether the range certainly reads as zero, found without making its bytes.
    #[must_use]
    pub fn is_surely_zero(&self, offset: u64, length: u64) -> bool {
        let end = (offset + length).min(self.virtual_size);
        if offset >= end {
            return true;
        }
        if self.overlays.iter().any(|overlay| overlay.start < end && overlay.end > offset && overlay.bytes.is_some()) {
            return false;
        }
        let block_size = u64::from(self.block_size);
        let (first, last) = (offset / block_size, (end - 1) / block_size);
        let covered = self.blocks.range(first..=last);
        let parent_zero = || self.parent.as_ref().is_none_or(|parent| parent.is_surely_zero(offset, end - offset));
        let mut own = 0;
        for (_, block) in covered {
            own += 1;
            let zero = match block.state {
                NOT_PRESENT => parent_zero(),
                FULLY_PRESENT => block.content.is_zero(),
                PARTIALLY_PRESENT => block.content.is_zero() && parent_zero(),
                _ => true,
            };
            if !zero {
                return false;
            }
        }
        own == last - first + 1 || self.default_state != NOT_PRESENT || parent_zero()
    }

    /// The parts of at most `piece` bytes that may hold data, in ascending order.
    pub fn data_pieces(&self, piece: u64) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        (0..self.virtual_size.div_ceil(piece)).filter_map(move |index| {
            let offset = index * piece;
            let length = piece.min(self.virtual_size - offset);
            let bytes = (!self.is_surely_zero(offset, length)).then(|| self.read(offset, length as usize))?;
            (!is_zero(&bytes)).then_some((offset, bytes))
        })
    }

    /// Writes the disk as a raw file, sparse where it is zero.
    pub fn write_raw(&self, path: &Path) -> io::Result<()> {
        let target = File::create(path)?;
        for (offset, bytes) in self.data_pieces(1 << 16) {
            target.write_all_at(&bytes, offset)?;
        }
        target.set_len(self.virtual_size)
    }

    /// Compares the disk with a raw file; the error says where they differ first.
    pub fn compare_raw(&self, path: &Path) -> Result<(), String> {
        let source = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let length = source.metadata().map_err(|error| error.to_string())?.len();
        if length != self.virtual_size {
            return Err(format!("length is {length:#x} instead of {:#x}", self.virtual_size));
        }
        let mut data_from = next_data(&source, 0);
        self.compare_pieces(|offset, buffer| {
            if data_from < offset {
                data_from = next_data(&source, offset);
            }
            let is_hole = data_from >= offset + buffer.len() as u64;
            if !is_hole {
                source.read_exact_at(buffer, offset)?;
            }
            Ok(is_hole)
        })
    }

    /// Compares the disk with what `read_at` gives; the error says where they differ first.
    pub fn compare_with(&self, mut read_at: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> Result<(), String> {
        self.compare_pieces(|offset, buffer| read_at(offset, buffer).map(|()| false))
    }

    /// Compares with what `read_at` gives; where it gives true, all is zero and the buffer was left alone.
    fn compare_pieces(&self, mut read_at: impl FnMut(u64, &mut [u8]) -> io::Result<bool>) -> Result<(), String> {
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < self.virtual_size {
            let count = (self.virtual_size - offset).min(buffer.len() as u64) as usize;
            let actual = &mut buffer[..count];
            let is_hole = read_at(offset, actual).map_err(|error| format!("read at {offset:#x}: {error}"))?;
            let surely_zero = self.is_surely_zero(offset, count as u64);
            if is_hole && !surely_zero {
                actual.fill(0);
            }
            let same = match (surely_zero, is_hole) {
                (true, true) => true,
                (true, false) => is_zero(actual),
                (false, _) => *actual == self.read(offset, count),
            };
            if !same {
                let expected = self.read(offset, count);
                let at = actual.iter().zip(&expected).position(|(left, right)| left != right).unwrap_or_default();
                return Err(format!(
                    "byte {:#x} (block {}) is {:#04x} instead of {:#04x}",
                    offset + at as u64,
                    (offset + at as u64) / u64::from(self.block_size),
                    actual[at],
                    expected[at]
                ));
            }
            offset += count as u64;
        }
        Ok(())
    }
}

/// Where the next data of a file starts at or behind `offset`; the file system may not tell, then right there.
fn next_data(file: &File, offset: u64) -> u64 {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => u64::MAX,
        Err(_) => offset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn block(state: u8, seed: u64) -> ModelBlock {
        ModelBlock { state, content: Content::pattern(seed), mask: SectorMask::new(|sector| sector % 3 == 0) }
    }

    fn unit(seed: u64, offset: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        crate::content::pattern(seed, offset / 512, &mut bytes);
        bytes
    }

    #[test]
    fn every_state_reads_as_the_table_says() {
        let mut parent = ModelDisk::new(5 * MIB + 512, 512, 1 << 20);
        for index in 0..6 {
            parent.blocks.insert(index, block(FULLY_PRESENT, 100));
        }
        let mut child = ModelDisk::new(8 * MIB, 512, 1 << 20);
        for (index, state) in [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT].into_iter().enumerate() {
            child.blocks.insert(index as u64, block(state, 7));
        }
        child.blocks.insert(5, block(PARTIALLY_PRESENT, 7));
        child.parent = Some(Arc::new(parent));
        assert_eq!(child.read(0, 512), unit(100, 0));
        for zero in 1..4 {
            assert_eq!(child.read(zero * MIB, MIB as usize), vec![0; MIB as usize]);
        }
        assert_eq!(child.read(4 * MIB, 512), unit(7, 4 * MIB));
        assert_eq!(child.read(5 * MIB, 512), unit(7, 5 * MIB), "a set bit shows the child");
        assert_eq!(child.read(5 * MIB + 512, 512), [0; 512], "the parent ended one sector before");
        assert_eq!(child.read(6 * MIB, 512), [0; 512]);
        assert_eq!(child.read(1, 600)[511..], unit(100, 512)[..89]);
        child.default_state = ZERO;
        child.blocks.remove(&0);
        assert_eq!(child.read(0, 512), [0; 512]);
        assert!(child.is_surely_zero(0, 4 * MIB));
        assert!(!child.is_surely_zero(0, 4 * MIB + 512));
    }

    #[test]
    fn later_writes_lie_over_blocks() {
        let mut disk = ModelDisk::new(4 * MIB, 512, 1 << 20);
        disk.blocks.insert(0, block(FULLY_PRESENT, 1));
        disk.write_zeroes(0, 1024);
        disk.write(512, &[9; 1024]);
        assert_eq!(disk.read(0, 512), [0; 512]);
        assert_eq!(disk.read(512, 1024), [9; 1024]);
        assert_eq!(disk.read(1536, 512), unit(1, 1536));
    }
}
