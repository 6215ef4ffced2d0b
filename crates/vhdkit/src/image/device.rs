//! A disk as its users see it: sectors that are read, and ranges that are data, zero or nothing.

use std::fmt::Debug;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::storage::Storage;

/// What a range of a disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes in the file of a layer.
    Data {
        /// Where in that layer's file; `None` when they cannot be read from one place there (they come out of the
        /// log of a dirty image, or lie behind the end of the file).
        file_offset: Option<u64>,
    },
    /// A layer says that the range reads as zero.
    Zero,
    /// No layer says anything; the range reads as zero.
    Hole,
}

/// A range of a disk that is all of one kind, in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins on the disk.
    pub start: u64,
    /// Its bytes; never 0.
    pub length: u64,
    /// What it is made of.
    pub kind: ExtentKind,
    /// The layer that decides: 0 is the image itself, 1 its parent, and so on. For a hole: the deepest layer.
    pub layer: usize,
}

impl Extent {
    /// Where it ends on the disk.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start + self.length // extents lie on the disk, which ends below 2^46
    }

    /// True when `next` continues this extent in the same layer and, for data, in the file.
    #[must_use]
    pub fn continues_with(&self, next: &Self) -> bool {
        let same_kind = match (self.kind, next.kind) {
            (ExtentKind::Data { file_offset: Some(a) }, ExtentKind::Data { file_offset: Some(b) }) => {
                a + self.length == b
            }
            (a, b) => a == b,
        };
        self.end() == next.start && self.layer == next.layer && same_kind
    }
}

/// What reading without waiting gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtOnce {
    /// The buffer is filled.
    Filled,
    /// All of the range reads as zero; the buffer is as it was, or zero.
    Zero,
    /// It would have to wait, or cannot tell; the buffer holds nothing of use.
    Waits,
}

/// Takes extents one after another; breaks to stop.
pub type VisitExtent<'a> = dyn FnMut(&Extent) -> ControlFlow<()> + 'a;

/// A disk that can be read, and written where it is not read-only.
///
/// All methods take `&self` and may be called from many threads.
pub trait BlockDevice: Debug + Send + Sync {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Bytes of a logical sector: 512 or 4096.
    fn logical_sector_size(&self) -> u32;

    /// Bytes of a physical sector: 512 or 4096.
    fn physical_sector_size(&self) -> u32;

    /// The unit in which space is allocated, in bytes.
    fn allocation_unit(&self) -> u64;

    /// Whether what was never written reads as zero.
    fn unallocated_reads_zero(&self) -> bool;

    /// Whether the disk refuses writes.
    fn is_read_only(&self) -> bool;

    /// The identity that the guest sees, where there is one.
    fn disk_id(&self) -> Option<Guid>;

    /// Fills `buf` from a byte offset. Neither has to be a multiple of the sector.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] when the range does not lie on the disk; otherwise what stands in the way of
    /// reading it. `buf` holds nothing of use then.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Reads without waiting for a medium or for another thread, for callers with other things to do meanwhile.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`]; an error may also be left to the call that waits.
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        let _ = (buf, offset);
        Ok(AtOnce::Waits)
    }

    /// Visits what a range is made of, in order, without gaps. Neighbours that are alike are joined as far as that
    /// costs nothing. Where data lies in a file is true until somebody zeroes or discards it: who copies by it reads
    /// from a disk that nobody changes meanwhile, or plans his reads.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`]; extents visited before were true.
    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()>;

    /// The file of a layer, for cloning and copying inside the kernel by the file offsets of extents.
    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        let _ = layer;
        None
    }

    /// Writes all of `buf` at a byte offset. Neither has to be a multiple of the sector. Reads see it when this returns;
    /// it is durable after the next [`BlockDevice::flush`].
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] when the disk is not open for writing, [`ErrorKind::OutOfRange`] when the range does not lie
    /// on it, [`ErrorKind::Poisoned`] after a failure of metadata, [`ErrorKind::Io`] with what the operating system says;
    /// any part of `buf` may have been written then.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let _ = (buf, offset);
        Err(super::writer::read_only())
    }

    /// As [`BlockDevice::write_at`], but `false` where that means waiting for another thread, or more than handing the
    /// bytes to the operating system: some of it may have been written then, and it is to be written again. As any write
    /// it may still be held up by a system that has too much to write.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`]; an error may also be left to the call that waits.
    fn write_at_once(&self, buf: &[u8], offset: u64) -> Result<bool> {
        let _ = (buf, offset);
        Ok(false)
    }

    /// As [`BlockDevice::write_at`], and durable when it returns (FUA).
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`] and [`BlockDevice::flush`].
    fn write_through_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_at(buf, offset)?;
        self.flush()
    }

    /// Makes a range read as zero, whatever a parent has there. With `unmap`, space may be given back; without, what is
    /// allocated stays allocated. What is not allocated is not allocated for this.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        let _ = (range, unmap);
        Err(super::writer::read_only())
    }

    /// Says that what a range holds is not needed any more. Whole blocks in it may be given back, and then read as zero
    /// here, but as anything elsewhere; the rest stays as it is.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn discard(&self, range: Range<u64>) -> Result<()> {
        let _ = range;
        Err(super::writer::read_only())
    }

    /// Makes everything durable that was written, zeroed or discarded by calls that had returned before.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when that fails: what an earlier flush covered is safe, and what is in between may or may not
    /// be there after a crash. [`ErrorKind::Poisoned`] after such a failure.
    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Checks that a range lies on a disk.
pub(crate) fn check_range(offset: u64, length: u64, size: u64) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            ErrorKind::OutOfRange,
            format!("{length} bytes at offset {offset} reach past the end of the disk, which has {size} bytes"),
        )),
    }
}
