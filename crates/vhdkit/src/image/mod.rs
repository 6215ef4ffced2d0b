//! Disks: VHDX images, alone or in a chain of parents, and raw ones.

mod admission;
mod bat;
mod bitmap;
mod device;
pub(crate) mod extents;
mod file_resolver;
pub(crate) mod layer;
mod open;
mod parents;
mod raw;
pub(crate) mod replay;
pub(crate) mod scan;
mod view;

use std::ops::Range;
use std::sync::Arc;

pub use device::{BlockDevice, Extent, ExtentKind, VisitExtent};
pub use file_resolver::FileResolver;
pub use layer::Layer;
pub use open::{CHAIN_DEPTH_MAX, OpenOptions};
pub use parents::{DenyParents, ParentCandidate, ParentRequest, ParentResolver};
pub use raw::RawDisk;
pub use replay::ReplayReport;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::geometry::Geometry;
use crate::format::guid::Guid;
use crate::format::metadata::DiskType;
use crate::storage::Storage;
use crate::units::{BlockIndex, GuestOffset};
use device::check_range;

/// An open VHDX image with its chain of parents.
///
/// Reading takes `&self` and works from many threads. A dirty log was replayed into memory; the files are never
/// changed.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Layer>,
    parents_missing: bool,
}

impl Image {
    /// The files of the chain: the image itself, its parent, and so on. Never empty.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// True when the image has a parent and was opened without it.
    #[must_use]
    pub fn parents_missing(&self) -> bool {
        self.parents_missing
    }

    /// What kind of disk it is.
    #[must_use]
    pub fn disk_type(&self) -> DiskType {
        self.top().metadata().disk_type()
    }

    /// The numbers that place every byte of the disk.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.top().geometry()
    }

    /// Visits what one layer alone says about a range of its disk: what it leaves to its parent is a hole.
    ///
    /// # Errors
    /// When the layer does not exist, the range is not on its disk, or an entry cannot be used.
    pub fn visit_layer_extents(&self, layer: usize, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        let Some(layers) = self.layers.get(layer..=layer) else {
            return Err(Error::new(ErrorKind::InvalidArgument, format!("the chain has no layer {layer}")));
        };
        let size = layers.first().map_or(0, |layer| layer.geometry().disk_size());
        check_range(range.start, range.end.saturating_sub(range.start), size)?;
        extents::visit_chain(layers, false, range, &mut |extent| visit(&Extent { layer, ..*extent }))
    }

    fn top(&self) -> &Layer {
        #[expect(clippy::indexing_slicing, reason = "opening pushes the image itself first, and nothing removes it")]
        &self.layers[0]
    }

    /// Reads from a layer and what lies beneath it.
    fn read_layer(&self, depth: usize, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(layer) = self.layers.get(depth) else {
            buf.fill(0);
            return Ok(());
        };
        let geometry = layer.geometry();
        let there = usize::try_from(geometry.disk_size().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        // Behind a shorter parent's end everything reads as zero.
        let (mut rest, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        let mut offset = offset;
        while !rest.is_empty() {
            let in_block = geometry.offset_in_block(GuestOffset(offset));
            let left = usize::try_from(geometry.block_size() - in_block).unwrap_or(usize::MAX);
            let (part, tail) = rest.split_at_mut(left.min(rest.len()));
            let length = part.len() as u64;
            self.read_block(depth, layer, part, offset).map_err(|error| layer.name_error(error))?;
            offset += length; // does not pass the end of the disk
            rest = tail;
        }
        Ok(())
    }

    /// Reads inside one block.
    #[inline]
    fn read_block(&self, depth: usize, layer: &Layer, buf: &mut [u8], offset: u64) -> Result<()> {
        let geometry = layer.geometry();
        let block = geometry.block_of(GuestOffset(offset));
        let entry = layer.bat().payload(block, layer.rules(), layer.view())?;
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => {
                // The block lies inside the file, as far as the disk reaches: judged when its page was loaded.
                layer.view().read_at(buf, entry.file_offset().0 + geometry.offset_in_block(GuestOffset(offset)))
            }
            Some(PayloadState::PartiallyPresent) => self.read_partial(depth, layer, entry, buf, offset),
            Some(PayloadState::NotPresent) if geometry.is_differencing() => self.read_parent(depth, layer, buf, offset),
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    fn read_parent(&self, depth: usize, layer: &Layer, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.parents_missing && depth + 1 == self.layers.len() {
            return Err(layer.parent_missing(offset));
        }
        self.read_layer(depth + 1, buf, offset)
    }

    /// Reads inside a partially present block: runs of sectors from here, runs from the parent.
    fn read_partial(&self, depth: usize, layer: &Layer, entry: BatEntry, buf: &mut [u8], offset: u64) -> Result<()> {
        let geometry = layer.geometry();
        let block = geometry.block_of(GuestOffset(offset));
        let bitmap = layer.bat().bitmap(geometry.chunk_of(block), layer.rules(), layer.view())?;
        if bitmap.0 == 0 {
            return Err(Error::from_finding(&layer.rules().bitmap_missing(BlockIndex(block.0))));
        }
        let sector = geometry.logical_sector_size();
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let bit = geometry.bitmap_bit(GuestOffset(offset));
            let page_offset = bat::bitmap_page_offset(bitmap, bit / bitmap::PAGE_BITS);
            let page = layer.bitmaps().page(page_offset, layer.view())?;
            let in_sector = offset % sector;
            let sectors = (in_sector + rest.len() as u64).div_ceil(sector);
            let (here, count) = bitmap::bit_run(&page, bit % bitmap::PAGE_BITS, sectors);
            let length = usize::try_from(count * sector - in_sector).unwrap_or(usize::MAX).min(rest.len());
            let (part, tail) = rest.split_at_mut(length);
            if here {
                let at = entry.file_offset().0 + geometry.offset_in_block(GuestOffset(offset));
                layer.view().read_at(part, at)?;
            } else {
                self.read_parent(depth, layer, part, offset)?;
            }
            offset += length as u64; // stays inside the block
            rest = tail;
        }
        Ok(())
    }
}

impl BlockDevice for Image {
    fn size(&self) -> u64 {
        self.geometry().disk_size()
    }

    fn logical_sector_size(&self) -> u32 {
        self.top().metadata().logical_sector_size
    }

    fn physical_sector_size(&self) -> u32 {
        self.top().metadata().physical_sector_size
    }

    fn allocation_unit(&self) -> u64 {
        self.geometry().block_size()
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        Some(self.top().metadata().disk_id)
    }

    #[inline]
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let layer = self.top();
        let geometry = layer.geometry();
        check_range(offset, buf.len() as u64, geometry.disk_size())?;
        // Most reads lie inside one block; the disk reaches as far as the range was checked to.
        let left = geometry.block_size() - geometry.offset_in_block(GuestOffset(offset));
        if buf.len() as u64 <= left && !buf.is_empty() {
            return self.read_block(0, layer, buf, offset).map_err(|error| layer.name_error(error));
        }
        self.read_layer(0, buf, offset)
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        check_range(range.start, range.end.saturating_sub(range.start), self.size())?;
        extents::visit_chain(&self.layers, self.parents_missing, range, visit)
    }

    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        self.layers.get(layer).map(|layer| Arc::clone(layer.storage()))
    }
}
