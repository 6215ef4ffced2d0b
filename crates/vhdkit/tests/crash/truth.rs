//! What log entries say about the length of the file has to be true.

use std::ops::ControlFlow;
use std::sync::Arc;

use vhdkit::Result;
use vhdkit::format::header::Header;
use vhdkit::format::log::{ActiveSequence, Ring, SECTOR, SECTOR_BYTES, find_active_sequence};
use vhdkit::image::{BlockDevice, ExtentKind, OpenOptions, ParentResolver};
use vhdkit::storage::Storage;

struct RingOf<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    sector: [u8; SECTOR_BYTES],
}

impl Ring for RingOf<'_> {
    fn sectors(&self) -> u64 {
        u64::from(self.header.log_length) / SECTOR
    }

    fn sector(&mut self, number: u64) -> Result<&[u8; SECTOR_BYTES]> {
        let read = self.storage.read_at(&mut self.sector, self.header.log_offset + number * SECTOR);
        read.map_err(|error| vhdkit::Error::io("reading the log", error))?;
        Ok(&self.sector)
    }
}

/// The sequence of log entries that a dirty header names.
pub(crate) fn active_sequence(
    storage: &dyn Storage,
    header: &Header,
) -> std::result::Result<Option<ActiveSequence>, String> {
    let mut ring = RingOf { storage, header, sector: [0; SECTOR_BYTES] };
    find_active_sequence(&mut ring, header.log_guid).map_err(|error| error.to_string())
}

/// The newest entry's LastFileOffset holds everything that is mapped, and its FlushedFileOffset is no longer than the file
/// (W-044). Gives whether that entry goes on at the start of the ring.
pub(crate) fn entries_tell_the_truth(
    storage: &Arc<dyn Storage>,
    header: &Header,
    parents: Option<&Arc<dyn ParentResolver>>,
) -> std::result::Result<bool, String> {
    if !header.is_dirty() {
        return Ok(false);
    }
    let active = active_sequence(storage.as_ref(), header)?;
    let Some(head) = active.as_ref().and_then(|active| active.head()) else {
        return Err("the log is dirty and holds no sequence".to_owned());
    };
    let options = OpenOptions::new();
    let options = match parents {
        Some(parents) => options.parents(Arc::clone(parents)),
        None => options,
    };
    let image = options.open(Arc::clone(storage), None).map_err(|error| error.to_string())?;
    let mut end = 0;
    let visited = image.visit_layer_extents(0, 0..image.size(), &mut |extent| {
        if let ExtentKind::Data { file_offset: Some(offset) } = extent.kind {
            end = end.max(offset + extent.length);
        }
        ControlFlow::Continue(())
    });
    visited.map_err(|error| error.to_string())?;
    if end > head.last_file_offset {
        return Err(format!("blocks reach to {end:#x}, and the last file offset is {:#x}", head.last_file_offset));
    }
    let length = storage.len().map_err(|error| error.to_string())?;
    if head.flushed_file_offset > length {
        return Err(format!("the flushed file offset is {:#x} in a file of {length:#x}", head.flushed_file_offset));
    }
    Ok(head.start + head.sectors > u64::from(header.log_length) / SECTOR)
}
