//! One layer of a chain by itself, or with what lies beneath it: the disk as it was before the layers above were made.

use std::ops::Range;
use std::sync::Arc;

use super::device::{AtOnce, BlockDevice, Extent, VisitExtent, check_range};
use super::layer::Layer;
use super::{Beneath, Image, extents};
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::storage::Storage;

/// A layer of an image as a disk of its own, for reading: what it leaves to its parent is a hole and reads as zero, or, with
/// [`LayerDisk::with_parents`], is the parent's. For incremental backups, and for looking at what a checkpoint changed.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::image::{BlockDevice, LayerDisk, OpenOptions};
/// use vhdkit::ops::create::{CreateOptions, create};
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// # fn main() -> vhdkit::Result<()> {
/// let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// create(&file, &CreateOptions::new(64 << 20), &())?;
/// let image = Arc::new(OpenOptions::new().open(file, None)?);
/// let layer = LayerDisk::new(image, 0)?;
/// assert_eq!(layer.size(), 64 << 20);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LayerDisk {
    image: Arc<Image>,
    depth: usize,
    beneath: Beneath,
}

impl LayerDisk {
    /// Layer `depth` of an image: 0 is the image itself, 1 its parent, and so on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the chain has no such layer.
    pub fn new(image: Arc<Image>, depth: usize) -> Result<Self> {
        Self::open(image, depth, Beneath::No)
    }

    /// Layer `depth` of an image with everything beneath it: what the disk was when the layers above it were empty.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when the chain has no such layer.
    pub fn with_parents(image: Arc<Image>, depth: usize) -> Result<Self> {
        Self::open(image, depth, Beneath::Yes)
    }

    fn open(image: Arc<Image>, depth: usize, beneath: Beneath) -> Result<Self> {
        let disk = Self { image, depth, beneath };
        disk.layer().map(|_| ())?;
        Ok(disk)
    }

    /// The file that the disk is, without its parents.
    ///
    /// # Errors
    /// Never for a disk that could be made.
    pub fn layer(&self) -> Result<&Layer> {
        let depth = self.depth;
        let missing = || Error::new(ErrorKind::InvalidArgument, format!("the chain has no layer {depth}"));
        self.image.layers().get(depth).ok_or_else(missing)
    }
}

impl BlockDevice for LayerDisk {
    fn size(&self) -> u64 {
        self.layer().map_or(0, |layer| layer.geometry().disk_size())
    }

    fn logical_sector_size(&self) -> u32 {
        self.layer().map_or(512, |layer| layer.metadata().logical_sector_size)
    }

    fn physical_sector_size(&self) -> u32 {
        self.layer().map_or(4096, |layer| layer.metadata().physical_sector_size)
    }

    fn allocation_unit(&self) -> u64 {
        self.layer().map_or(4096, |layer| layer.geometry().block_size())
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        self.layer().ok().map(|layer| layer.metadata().disk_id)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        let _inside = self.image.shared.gate.enter();
        self.image.shared.read_layer(self.depth, self.beneath, buf, offset)
    }

    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        check_range(offset, buf.len() as u64, self.size())?;
        let _inside = self.image.shared.gate.enter();
        self.image.shared.read_at_once(self.depth, self.beneath, buf, offset)
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        check_range(range.start, range.end.saturating_sub(range.start), self.size())?;
        let layers = self.image.layers();
        let (layers, parents_missing) = match self.beneath {
            Beneath::No => (layers.get(self.depth..=self.depth), false),
            Beneath::Yes => (layers.get(self.depth..), self.image.parents_missing()),
        };
        let layers = layers.unwrap_or_default();
        extents::visit_chain(layers, parents_missing, range, &mut |extent: &Extent| visit(extent))
    }

    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        if layer > 0 && self.beneath == Beneath::No {
            return None;
        }
        let layers = self.image.layers();
        layers.get(self.depth.checked_add(layer)?).map(|layer| Arc::clone(layer.storage()))
    }
}
