//! Disks: VHDX images, alone or in a chain of parents, and raw ones.

mod admission;
mod at_once;
pub(crate) mod bat;
mod bitmap;
mod change;
mod commit;
pub(crate) mod data_map;
mod device;
pub(crate) mod extents;
pub(crate) mod file_resolver;
mod flushes;
mod gate;
mod headers;
pub(crate) mod layer;
mod layer_disk;
mod open;
mod parents;
mod plan;
mod raw;
pub(crate) mod replay;
mod ring;
pub(crate) mod scan;
pub(crate) mod session;
#[cfg(feature = "simulation")]
pub mod simulation;
#[cfg(not(feature = "simulation"))]
mod simulation;
pub(crate) mod space;
pub(crate) mod structure;
mod tokens;
pub(crate) mod view;
mod write;
mod writer;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub use device::{AtOnce, BlockDevice, Extent, ExtentKind, VisitExtent};
pub use file_resolver::FileResolver;
pub use layer::Layer;
pub use layer_disk::LayerDisk;
pub use open::{CHAIN_DEPTH_MAX, OpenOptions};
pub use parents::{DenyParents, ParentCandidate, ParentRequest, ParentResolver};
pub use plan::{ReadPlan, ReadStep, WritePlan};
pub use raw::RawDisk;
pub use replay::ReplayReport;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::geometry::Geometry;
use crate::format::guid::Guid;
use crate::format::metadata::DiskType;
use crate::storage::Storage;
use crate::sync::{AtomicUsize, Mutex, OnceLock};
use crate::units::{BlockIndex, GuestOffset};
use admission::Admission;
use bitmap::BitmapKey;
use device::check_range;
use gate::Gate;
use tokens::Wait;
use writer::{Mode, Writer};

/// An open VHDX image with its chain of parents.
///
/// Everything takes `&self` and works from many threads. Opened for reading, a dirty log is replayed into memory and no file
/// is ever changed. Opened for writing ([`OpenOptions::write`]), the first change starts a session: new identities in the
/// headers, then every change of metadata through the log. What [`flush`](BlockDevice::flush) said is durable survives any
/// crash; see `docs/durability.md`. [`Image::close`] ends the session and says whether that worked; dropping the image does
/// the same without a word. Parents are never written.
#[derive(Debug)]
pub struct Image {
    shared: Arc<Shared>,
}

/// An image, as its plans share it.
#[derive(Debug)]
struct Shared {
    layers: Vec<Layer>,
    parents_missing: bool,
    admission: Admission,
    /// There once the image was opened for writing.
    writer: OnceLock<Writer>,
    gate: Gate,
    /// Held by who closes or reopens: how the file is open and what the image takes go together.
    turning: Mutex<()>,
    /// Plans that were made before there was a writer.
    loose_plans: AtomicUsize,
}

/// Whether what a layer leaves to its parent is looked for there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beneath {
    Yes,
    /// It reads as zero: the layer by itself.
    No,
}

impl Image {
    fn new(layers: Vec<Layer>, parents_missing: bool, admission: Admission) -> Self {
        Self {
            shared: Arc::new(Shared {
                layers,
                parents_missing,
                admission,
                writer: OnceLock::new(),
                gate: Gate::default(),
                turning: Mutex::default(),
                loose_plans: AtomicUsize::new(0),
            }),
        }
    }

    /// The files of the chain: the image itself, its parent, and so on. Never empty. What they say about headers is as it
    /// was when the image was opened.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.shared.layers
    }

    /// True when the image has a parent and was opened without it.
    #[must_use]
    pub fn parents_missing(&self) -> bool {
        self.shared.parents_missing
    }

    /// What kind of disk it is.
    #[must_use]
    pub fn disk_type(&self) -> DiskType {
        self.shared.top().metadata().disk_type()
    }

    /// The numbers that place every byte of the disk.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.shared.top().geometry()
    }

    /// Visits what one layer alone says about a range of its disk: what it leaves to its parent is a hole.
    ///
    /// # Errors
    /// When the layer does not exist, the range is not on its disk, or an entry cannot be used.
    pub fn visit_layer_extents(&self, layer: usize, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        let Some(layers) = self.shared.layers.get(layer..=layer) else {
            return Err(Error::new(ErrorKind::InvalidArgument, format!("the chain has no layer {layer}")));
        };
        let size = layers.first().map_or(0, |layer| layer.geometry().disk_size());
        check_range(range.start, range.end.saturating_sub(range.start), size)?;
        extents::visit_chain(layers, false, range, &mut |extent| visit(&Extent { layer, ..*extent }))
    }

    /// Visits what the first `depth` layers say about a range: what they leave to the layers below is a hole.
    pub(crate) fn visit_upper_extents(
        &self,
        depth: usize,
        range: Range<u64>,
        visit: &mut VisitExtent<'_>,
    ) -> Result<()> {
        let layers = self.shared.layers.get(..depth).unwrap_or_default();
        extents::visit_chain(layers, false, range, visit)
    }

    /// Plans a read of whole sectors: where the bytes are from the start of the range to the end of that block at most.
    /// Waits for a trim of that block under way, also for one that waits for a plan itself: a thread that holds plans uses
    /// [`Image::try_plan_read`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for parts of sectors; otherwise as [`BlockDevice::read_at`].
    pub fn plan_read(&self, range: Range<u64>) -> Result<ReadPlan> {
        self.shared.plan_read(range, Wait::Yes)?.ok_or_else(session::busy)
    }

    /// As [`Image::plan_read`], but `None` instead of waiting.
    ///
    /// # Errors
    /// As [`Image::plan_read`].
    pub fn try_plan_read(&self, range: Range<u64>) -> Result<Option<ReadPlan>> {
        self.shared.plan_read(range, Wait::No)
    }

    /// Plans a write of whole sectors, from the start of the range to the end of that block at most: finds space and loads
    /// the metadata, so that completing the plan needs no I/O. Waits for other changes of that block, also for other plans,
    /// and for room in the log, of which every plan holds some: a thread that holds plans uses [`Image::try_plan_write`].
    ///
    /// ```
    /// use std::sync::Arc;
    /// use vhdkit::image::{BlockDevice, OpenOptions};
    /// use vhdkit::ops::create::{CreateOptions, create};
    /// use vhdkit::storage::{MemoryStorage, Storage};
    ///
    /// # fn main() -> vhdkit::Result<()> {
    /// let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    /// create(&file, &CreateOptions::new(64 << 20), &())?;
    /// let image = OpenOptions::new().write(true).open(file, None)?;
    ///
    /// let plan = image.plan_write(4096..8192)?;
    /// plan.storage().write_at(&[7; 4096], plan.file_offset()).expect("writes to memory");
    /// plan.complete()?;
    /// image.flush()?;
    /// let mut sector = [0; 512];
    /// image.read_at(&mut sector, 4096)?;
    /// assert_eq!(sector, [7; 512]);
    /// image.close()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for parts of sectors; otherwise as [`BlockDevice::write_at`].
    pub fn plan_write(&self, range: Range<u64>) -> Result<WritePlan> {
        self.shared.plan_write(range, Wait::Yes)?.ok_or_else(session::busy)
    }

    /// As [`Image::plan_write`], but `None` instead of waiting.
    ///
    /// # Errors
    /// As [`Image::plan_write`].
    pub fn try_plan_write(&self, range: Range<u64>) -> Result<Option<WritePlan>> {
        self.shared.plan_write(range, Wait::No)
    }

    /// As [`BlockDevice::write_at`], but `false` instead of waiting; some of it may have been written then.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    pub fn try_write_at(&self, buf: &[u8], offset: u64) -> Result<bool> {
        self.shared.write(buf, offset, Wait::No).map_err(|error| self.name(error))
    }

    /// As [`BlockDevice::write_zeroes`], but `false` instead of waiting; some of it may have been done then.
    ///
    /// # Errors
    /// As [`BlockDevice::write_zeroes`].
    pub fn try_write_zeroes(&self, range: Range<u64>, unmap: bool) -> Result<bool> {
        self.shared.write_zeroes(range, unmap, Wait::No).map_err(|error| self.name(error))
    }

    /// As [`BlockDevice::discard`], but `false` instead of waiting; some of it may have been done then.
    ///
    /// # Errors
    /// As [`BlockDevice::discard`].
    pub fn try_discard(&self, range: Range<u64>) -> Result<bool> {
        self.shared.discard(range, Wait::No).map_err(|error| self.name(error))
    }

    /// As [`BlockDevice::flush`], but `false`, with nothing promised, instead of waiting for another flush.
    ///
    /// # Errors
    /// As [`BlockDevice::flush`].
    pub fn try_flush(&self) -> Result<bool> {
        self.shared.flush_with(Wait::No).map_err(|error| self.name(error))
    }

    /// Puts a dirty log into place now, instead of with the first change. `None` when it is clean. The image was opened
    /// with [`OpenOptions::replay`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when that fails; it may be tried again when only room was missing, and by opening anew in any
    /// case.
    pub fn replay(&self) -> Result<Option<ReplayReport>> {
        self.shared.replay_now().map_err(|error| self.name(error))
    }

    /// Ends the session of writing: waits up to a minute for operations and plans under way, makes everything durable,
    /// clears the log, and cuts off space at the end that nothing uses. The image can be read afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when plans are still there: nothing has changed, and it may be tried again. [`ErrorKind::Io`] and
    /// [`ErrorKind::Poisoned`] when writing fails: what was flushed before is safe.
    pub fn close(&self) -> Result<()> {
        self.close_within(session::CLOSE_WAIT)
    }

    /// As [`Image::close`], waiting so long.
    ///
    /// # Errors
    /// As [`Image::close`].
    pub fn close_within(&self, wait: Duration) -> Result<()> {
        self.shared.close(wait).map_err(|error| self.name(error))
    }

    /// Starts the session of writing now, with this data write GUID: until [`Image::close_as`] gives it another one, the
    /// file shows by it what is being made of it.
    ///
    /// # Errors
    /// As the first write; [`ErrorKind::InvalidArgument`] when there was one already.
    pub(crate) fn start_as(&self, data_write_guid: Guid) -> Result<()> {
        self.shared.start_as(data_write_guid).map_err(|error| self.name(error))
    }

    /// As [`Image::close`]; in the end, when everything else is durable, the disk gets this data write GUID: for one that
    /// holds what the disk with that GUID holds.
    ///
    /// # Errors
    /// As [`Image::close`]; the file has one GUID or the other then. [`ErrorKind::InvalidArgument`] when no session was started.
    pub(crate) fn close_as(&self, data_write_guid: Guid) -> Result<()> {
        self.shared.close_as(session::CLOSE_WAIT, data_write_guid).map_err(|error| self.name(error))
    }

    /// Changes between reading and writing on the live handle. To reading: the session ends as with [`Image::close`]. To
    /// writing: the file is locked for it, and everything that must be in order before a first write is checked.
    ///
    /// # Errors
    /// As [`OpenOptions::open`] and [`Image::close`]; the image is as it was then. [`ErrorKind::Busy`] also when another
    /// thread closes or reopens it.
    pub fn reopen(&self, write: bool) -> Result<()> {
        self.shared.reopen(write).map_err(|error| self.name(error))
    }

    fn name(&self, error: Error) -> Error {
        self.shared.top().name_error(error)
    }
}

impl Shared {
    fn top(&self) -> &Layer {
        #[expect(clippy::indexing_slicing, reason = "opening pushes the image itself first, and nothing removes it")]
        &self.layers[0]
    }

    /// Reads from a layer and what lies beneath it.
    fn read_layer(&self, depth: usize, beneath: Beneath, buf: &mut [u8], offset: u64) -> Result<()> {
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
            self.read_block((depth, beneath), layer, part, offset).map_err(|error| layer.name_error(error))?;
            offset += length; // does not pass the end of the disk
            rest = tail;
        }
        Ok(())
    }

    /// Reads inside one block.
    #[inline]
    fn read_block(&self, at: (usize, Beneath), layer: &Layer, buf: &mut [u8], offset: u64) -> Result<()> {
        let geometry = layer.geometry();
        let block = geometry.block_of(GuestOffset(offset));
        let entry = layer.bat().payload(block, layer.rules(), layer.view())?;
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => {
                // The block lies inside the file, as far as the disk reaches: judged when its page was loaded.
                layer.view().read_at(buf, entry.file_offset().0 + geometry.offset_in_block(GuestOffset(offset)))
            }
            Some(PayloadState::PartiallyPresent) => self.read_partial(at, layer, entry, buf, offset),
            Some(PayloadState::NotPresent) if geometry.is_differencing() => self.read_parent(at, layer, buf, offset),
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    fn read_parent(
        &self,
        (depth, beneath): (usize, Beneath),
        layer: &Layer,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<()> {
        if beneath == Beneath::No {
            buf.fill(0);
            return Ok(());
        }
        if self.parents_missing && depth + 1 == self.layers.len() {
            return Err(layer.parent_missing(offset));
        }
        self.read_layer(depth + 1, beneath, buf, offset)
    }

    /// Reads inside a partially present block: runs of sectors from here, runs from the parent.
    fn read_partial(
        &self,
        at: (usize, Beneath),
        layer: &Layer,
        entry: BatEntry,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<()> {
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
            let key = BitmapKey { chunk: geometry.chunk_of(block), page: bit / bitmap::PAGE_BITS };
            let page = layer.bitmaps().page(key, bat::bitmap_page_offset(bitmap, key.page), layer.view())?;
            let in_sector = offset % sector;
            let sectors = (in_sector + rest.len() as u64).div_ceil(sector);
            let (here, count) = bitmap::bit_run(&page, bit % bitmap::PAGE_BITS, sectors);
            let length = usize::try_from(count * sector - in_sector).unwrap_or(usize::MAX).min(rest.len());
            let (part, tail) = rest.split_at_mut(length);
            if here {
                let place = entry.file_offset().0 + geometry.offset_in_block(GuestOffset(offset));
                layer.view().read_at(part, place)?;
            } else {
                self.read_parent(at, layer, part, offset)?;
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
        self.shared.top().metadata().logical_sector_size
    }

    fn physical_sector_size(&self) -> u32 {
        self.shared.top().metadata().physical_sector_size
    }

    fn allocation_unit(&self) -> u64 {
        self.geometry().block_size()
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        self.shared.writer.get().is_none_or(|writer| writer.mode() != Mode::Writable)
    }

    fn disk_id(&self) -> Option<Guid> {
        Some(self.shared.top().metadata().disk_id)
    }

    #[inline]
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let shared = &*self.shared;
        let layer = shared.top();
        let geometry = layer.geometry();
        check_range(offset, buf.len() as u64, geometry.disk_size())?;
        // What the entries name now must not be given to another block meanwhile.
        let _inside = shared.gate.enter();
        // Most reads lie inside one block; the disk reaches as far as the range was checked to.
        let left = geometry.block_size() - geometry.offset_in_block(GuestOffset(offset));
        if buf.len() as u64 <= left && !buf.is_empty() {
            return shared.read_block((0, Beneath::Yes), layer, buf, offset).map_err(|error| layer.name_error(error));
        }
        shared.read_layer(0, Beneath::Yes, buf, offset)
    }

    #[inline]
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        check_range(offset, buf.len() as u64, self.geometry().disk_size())?;
        let _inside = self.shared.gate.enter();
        self.shared.read_at_once(0, Beneath::Yes, buf, offset)
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        check_range(range.start, range.end.saturating_sub(range.start), self.size())?;
        extents::visit_chain(&self.shared.layers, self.shared.parents_missing, range, visit)
    }

    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        self.shared.layers.get(layer).map(|layer| Arc::clone(layer.storage()))
    }

    #[inline]
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let geometry = self.geometry();
        check_range(offset, buf.len() as u64, geometry.disk_size())?;
        // Most writes lie inside one block that is mapped.
        let left = geometry.block_size() - geometry.offset_in_block(GuestOffset(offset));
        if buf.len() as u64 <= left && !buf.is_empty() {
            match self.shared.write_mapped(buf, offset) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(self.name(error)),
            }
        }
        self.shared.write(buf, offset, Wait::Yes).map(|_| ()).map_err(|error| self.name(error))
    }

    #[inline]
    fn write_at_once(&self, buf: &[u8], offset: u64) -> Result<bool> {
        check_range(offset, buf.len() as u64, self.geometry().disk_size())?;
        self.shared.write_at_once(buf, offset).map_err(|error| self.name(error))
    }

    fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        self.shared.write_zeroes(range, unmap, Wait::Yes).map(|_| ()).map_err(|error| self.name(error))
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.shared.discard(range, Wait::Yes).map(|_| ()).map_err(|error| self.name(error))
    }

    fn flush(&self) -> Result<()> {
        self.shared.flush_with(Wait::Yes).map(|_| ()).map_err(|error| self.name(error))
    }
}
