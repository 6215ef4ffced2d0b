//! Checksums of what disks hold, without reading their holes.

use std::ops::{ControlFlow, Range};

use super::buffer::PageBuffer;
use crate::error::Result;
use crate::format::checksum::{append, append_zeros};
use crate::image::{BlockDevice, ExtentKind};

/// Bytes that are read at once.
const CHUNK_BYTES: u64 = 1 << 20;
/// Extents asked for at once.
const BATCH: usize = 4096;

/// The CRC-32C of what a disk holds in a range; behind its end it holds zeros.
///
/// # Errors
/// What stands in the way of reading.
pub(super) fn checksum_of(disk: &dyn BlockDevice, range: Range<u64>) -> Result<u32> {
    let there = range.end.min(disk.size()).max(range.start);
    let mut checksum = 0;
    let mut at = range.start;
    let mut buffer: Option<PageBuffer> = None;
    while at < there {
        let mut extents = Vec::new();
        disk.visit_extents(at..there, &mut |extent| {
            extents.push(*extent);
            if extents.len() < BATCH { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        if extents.is_empty() {
            break; // nothing is said about the rest: zeros
        }
        for extent in extents {
            if !matches!(extent.kind, ExtentKind::Data { .. }) {
                checksum = append_zeros(checksum, extent.length);
                at = extent.end();
                continue;
            }
            let longest = CHUNK_BYTES.min(range.end - range.start);
            let buffer = buffer.get_or_insert_with(|| PageBuffer::new(usize::try_from(longest).unwrap_or_default()));
            while at < extent.end() {
                let length = longest.min(extent.end() - at);
                let piece = buffer.as_mut_slice().get_mut(..usize::try_from(length).unwrap_or_default());
                let piece = piece.unwrap_or_default();
                disk.read_at(piece, at)?;
                checksum = append(checksum, piece);
                at = at.saturating_add(length);
            }
        }
    }
    Ok(append_zeros(checksum, range.end - at))
}
