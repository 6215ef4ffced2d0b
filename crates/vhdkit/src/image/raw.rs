//! A raw disk: a file or block device whose bytes are the disk's.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use super::device::{AtOnce, BlockDevice, Extent, ExtentKind, VisitExtent, check_range};
use crate::error::{Error, Result};
use crate::format::guid::Guid;
use crate::storage::Storage;
use crate::units::round_up;

/// A raw disk over any storage. Its size is the storage's length, padded with zeros to whole sectors.
#[derive(Debug)]
pub struct RawDisk {
    storage: Arc<dyn Storage>,
    length: u64,
    size: u64,
    sector: u32,
}

impl RawDisk {
    /// A disk with sectors of 512 or 4096 bytes.
    ///
    /// # Errors
    /// When the storage cannot tell its length.
    pub fn new(storage: Arc<dyn Storage>, sector: u32) -> Result<Self> {
        let length = storage.len().map_err(|error| Error::io("cannot tell the length of the raw disk", error))?;
        let size = round_up(length, u64::from(sector)).unwrap_or(u64::MAX);
        Ok(Self { storage, length, size, sector })
    }

    /// How many zero bytes were added at the end to make whole sectors.
    #[must_use]
    pub const fn padding(&self) -> u64 {
        self.size - self.length // the size is the length rounded up
    }
}

impl BlockDevice for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.sector
    }

    fn physical_sector_size(&self) -> u32 {
        self.sector
    }

    fn allocation_unit(&self) -> u64 {
        4096
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        None
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let there = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (data, padding) = buf.split_at_mut(there);
        padding.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        self.storage.read_at(data, offset).map_err(|error| Error::io(format!("cannot read at {offset:#x}"), error))
    }

    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        check_range(offset, buf.len() as u64, self.size)?;
        if offset + buf.len() as u64 > self.length {
            return Ok(AtOnce::Waits); // reaches into the padding, which is rare
        }
        let read = self.storage.read_at_once(buf, offset);
        let filled = read.map_err(|error| Error::io(format!("cannot read at {offset:#x}"), error))?;
        Ok(if filled { AtOnce::Filled } else { AtOnce::Waits })
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        check_range(range.start, range.end.saturating_sub(range.start), self.size)?;
        let mut send = |start: u64, end: u64, kind| {
            let extent = Extent { start, length: end - start, kind, layer: 0 };
            if start < end { visit(&extent) } else { ControlFlow::Continue(()) }
        };
        let mut position = range.start;
        let end = range.end.min(self.length).max(range.start);
        while position < end {
            let found = self.storage.next_data(position..end);
            let data = found.map_err(|error| Error::io("cannot look for data in the raw disk", error))?;
            let data = data.unwrap_or(end..end);
            let kind = ExtentKind::Data { file_offset: Some(data.start) };
            if send(position, data.start, ExtentKind::Hole).is_break() || send(data.start, data.end, kind).is_break() {
                return Ok(());
            }
            position = data.end;
        }
        let _ = send(position, range.end, ExtentKind::Hole);
        Ok(())
    }

    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        (layer == 0).then(|| Arc::clone(&self.storage))
    }
}
