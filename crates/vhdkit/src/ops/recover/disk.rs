//! The disk as it was put together, for a conversion to read.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::table::Placed;
use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::Geometry;
use crate::format::guid::Guid;
use crate::image::view::View;
use crate::image::{BlockDevice, Extent, ExtentKind, VisitExtent};
use crate::storage::Storage;
use crate::units::{BlockIndex, GuestOffset, MIB};

/// Where a piece of the disk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// The file, at this offset.
    File(u64),
    /// Sector by sector the file or the parent.
    Mixed {
        file: u64,
        block: u64,
    },
    Parent,
    Zero,
}

/// A disk read from what was found of an image.
#[derive(Debug)]
pub(super) struct RecoveredDisk<'a> {
    pub(super) storage: &'a Arc<dyn Storage>,
    pub(super) view: &'a View,
    pub(super) geometry: Geometry,
    pub(super) physical_sector_size: u32,
    pub(super) disk_id: Guid,
    /// In the order of the disk.
    pub(super) placed: Vec<Placed>,
    /// Where sector bitmaps are, in MiB.
    pub(super) bitmaps: BTreeMap<u64, u32>,
    /// Blocks that hide the parent, in order.
    pub(super) zero: Vec<Range<u64>>,
    pub(super) parent: Option<&'a dyn BlockDevice>,
}

impl RecoveredDisk<'_> {
    fn from(&self, block: u64) -> From {
        let number = u32::try_from(block).unwrap_or(u32::MAX); // a disk has at most 2^26 blocks
        let found = self.placed.binary_search_by_key(&number, |placed| placed.block);
        match found.ok().and_then(|index| self.placed.get(index)) {
            Some(placed) if placed.partial => From::Mixed { file: u64::from(placed.mib) * MIB, block },
            Some(placed) => From::File(u64::from(placed.mib) * MIB),
            None => {
                let at = self.zero.partition_point(|range| range.end <= block);
                let hidden = self.zero.get(at).is_some_and(|range| range.start <= block);
                if hidden || !self.geometry.is_differencing() { From::Zero } else { From::Parent }
            }
        }
    }

    /// The last of the blocks from one on that are not placed and come from the same place; a placed one by itself.
    fn alike_until(&self, block: u64) -> u64 {
        let blocks = self.geometry.payload_blocks();
        if matches!(self.from(block), From::File(_) | From::Mixed { .. }) {
            return block;
        }
        let next = self.placed.partition_point(|placed| u64::from(placed.block) <= block);
        let placed = self.placed.get(next).map_or(blocks, |placed| u64::from(placed.block));
        let at = self.zero.partition_point(|range| range.end <= block);
        let border = match self.zero.get(at) {
            Some(range) if range.start <= block => range.end,
            Some(range) => range.start,
            None => blocks,
        };
        placed.min(border).min(blocks).saturating_sub(1).max(block)
    }

    fn read_parent(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let Some(parent) = self.parent else { return Ok(()) };
        let there = parent.size().saturating_sub(offset).min(buf.len() as u64);
        let part = usize::try_from(there).ok().and_then(|there| buf.get_mut(..there));
        part.map_or(Ok(()), |part| if part.is_empty() { Ok(()) } else { parent.read_at(part, offset) })
    }

    /// Where the first data of a part of a block begins and ends on the disk; where the part ends when it has none.
    fn data_in_block(&self, file: u64, block: BlockIndex, part: Range<u64>) -> Result<(u64, u64)> {
        let start = self.geometry.block_range(block).start;
        let in_file = file + (part.start - start)..file + (part.end - start); // places of a file below 1 PiB
        let found = self.view.next_data(in_file.clone())?;
        let to_disk = |place: u64| part.start + (place - in_file.start);
        Ok(found.map_or((part.end, part.end), |data| (to_disk(data.start), to_disk(data.end))))
    }

    /// A block of which some sectors are the parent's. Without its bitmap, a sector that is all zero counts as the parent's.
    fn read_mixed(&self, buf: &mut [u8], offset: u64, file: u64, block: u64) -> Result<()> {
        let start = self.geometry.block_range(BlockIndex(block)).start;
        let mut own = vec![0; buf.len()];
        self.view.read_at(&mut own, file + (offset - start))?;
        self.read_parent(buf, offset)?;
        let sector = usize::try_from(self.geometry.logical_sector_size()).unwrap_or(512);
        let chunk = self.geometry.chunk_of(BlockIndex(block));
        let first = self.geometry.bitmap_bit(GuestOffset(offset));
        let last = self.geometry.bitmap_bit(GuestOffset(offset + (buf.len() as u64).saturating_sub(1))); // of one block
        let bits = match self.bitmaps.get(&chunk.0) {
            Some(mib) => {
                let bitmap = u64::from(*mib) * MIB;
                Some(self.view.read_vec(bitmap + first / 8..bitmap + last / 8 + 1)?)
            }
            None => None,
        };
        let mut position = 0;
        while position < buf.len() {
            let at = offset + position as u64; // on the disk
            let within = usize::try_from(at % sector as u64).unwrap_or_default();
            let end = buf.len().min(position + (sector - within));
            let (Some(to), Some(own)) = (buf.get_mut(position..end), own.get(position..end)) else { break };
            let is_own = match &bits {
                Some(bits) => {
                    let bit = self.geometry.bitmap_bit(GuestOffset(at));
                    let byte = usize::try_from(bit / 8 - first / 8).ok().and_then(|index| bits.get(index));
                    byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
                }
                None => own.iter().any(|byte| *byte != 0),
            };
            if is_own {
                to.copy_from_slice(own);
            }
            position = end;
        }
        Ok(())
    }
}

impl BlockDevice for RecoveredDisk<'_> {
    fn size(&self) -> u64 {
        self.geometry.disk_size()
    }

    fn logical_sector_size(&self) -> u32 {
        u32::try_from(self.geometry.logical_sector_size()).unwrap_or(512)
    }

    fn physical_sector_size(&self) -> u32 {
        self.physical_sector_size
    }

    fn allocation_unit(&self) -> u64 {
        self.geometry.block_size()
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        Some(self.disk_id)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size());
        let Some(end) = end else {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("the range at {offset:#x} does not lie on the disk"),
            ));
        };
        let mut position = offset;
        let mut rest = buf;
        while position < end {
            let block = self.geometry.block_of(GuestOffset(position));
            let range = self.geometry.block_range(block);
            let length = usize::try_from(range.end.min(end) - position).unwrap_or(usize::MAX);
            let (part, behind) = rest.split_at_mut(length.min(rest.len()));
            match self.from(block.0) {
                From::File(file) => self.view.read_at(part, file + (position - range.start))?,
                From::Mixed { file, block } => self.read_mixed(part, position, file, block)?,
                From::Parent => self.read_parent(part, position)?,
                From::Zero => part.fill(0),
            }
            position += length as u64; // at most end
            rest = behind;
        }
        Ok(())
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        let mut position = range.start;
        while position < range.end.min(self.size()) {
            let block = self.geometry.block_of(GuestOffset(position));
            let mut end = self.geometry.block_range(block).end.min(range.end);
            if let From::File(file) = self.from(block.0) {
                // One block by itself, so that its holes are passed over.
                let (start, stop) = self.data_in_block(file, block, position..end)?;
                let is_hole = start > position;
                let until = if is_hole { start } else { stop };
                let kind = if is_hole { ExtentKind::Zero } else { ExtentKind::Data { file_offset: None } };
                let extent = Extent { start: position, length: until - position, kind, layer: 0 };
                if visit(&extent) == ControlFlow::Break(()) {
                    return Ok(());
                }
                position = until;
                continue;
            }
            let is_data = |from: From| match from {
                From::File(_) => None,
                From::Mixed { .. } => Some(true),
                From::Parent => Some(self.parent.is_some()),
                From::Zero => Some(false),
            };
            let data = is_data(self.from(block.0)) == Some(true);
            let last = self.alike_until(block.0); // on the disk
            end = self.geometry.block_range(BlockIndex(last)).end.min(range.end).max(end);
            let kind = if data { ExtentKind::Data { file_offset: None } } else { ExtentKind::Zero };
            let extent = Extent { start: position, length: end - position, kind, layer: 0 };
            if visit(&extent) == ControlFlow::Break(()) {
                return Ok(());
            }
            position = end;
        }
        Ok(())
    }

    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        match (layer, self.parent) {
            (0, _) => Some(Arc::clone(self.storage)),
            (_, Some(parent)) => parent.layer_storage(layer - 1),
            _ => None,
        }
    }
}
