//! Reading and writing without waiting: what is in memory here and in the page cache, and nothing else.
//!
//! Whoever serves many requests on one thread asks this first, and hands what has to wait to another thread.

use super::bitmap::{BitmapKey, PAGE_BITS, bit_run};
use super::commit::is_full;
use super::device::AtOnce;
use super::layer::Layer;
use super::tokens::Wait;
use super::write::Payload;
use super::{Beneath, Shared};
use crate::error::{ErrorKind, Result};
use crate::format::bat::{BatEntry, PayloadState};
use crate::units::GuestOffset;

/// What the pieces of a read gave together.
#[derive(Clone, Copy, Debug, Default)]
struct Pieces {
    any_filled: bool,
}

impl Pieces {
    /// Takes what a piece gave; false when the whole has to wait.
    fn add(&mut self, piece: &mut [u8], outcome: AtOnce) -> bool {
        match outcome {
            AtOnce::Filled => self.any_filled = true,
            AtOnce::Zero => piece.fill(0),
            AtOnce::Waits => return false,
        }
        true
    }

    const fn outcome(self) -> AtOnce {
        if self.any_filled { AtOnce::Filled } else { AtOnce::Zero }
    }
}

impl Shared {
    /// Reads from a layer and what lies beneath it.
    pub(super) fn read_at_once(&self, depth: usize, beneath: Beneath, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        let Some(layer) = self.layers.get(depth) else { return Ok(AtOnce::Zero) };
        let geometry = layer.geometry();
        let in_block = geometry.offset_in_block(GuestOffset(offset));
        let on_disk = offset.saturating_add(buf.len() as u64) <= geometry.disk_size();
        if on_disk && buf.len() as u64 <= geometry.block_size() - in_block {
            return self.block_at_once(depth, beneath, layer, buf, offset);
        }
        let there = usize::try_from(geometry.disk_size().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (mut rest, beyond) = buf.split_at_mut(there);
        let mut pieces = Pieces::default();
        let mut offset = offset;
        while !rest.is_empty() {
            let left = geometry.block_size() - geometry.offset_in_block(GuestOffset(offset));
            let (piece, tail) = rest.split_at_mut(usize::try_from(left).unwrap_or(usize::MAX).min(rest.len()));
            let outcome = self.block_at_once(depth, beneath, layer, piece, offset)?;
            if !pieces.add(piece, outcome) {
                return Ok(AtOnce::Waits);
            }
            offset += piece.len() as u64; // does not pass the end of the disk
            rest = tail;
        }
        beyond.fill(0); // behind a shorter parent's end everything reads as zero
        Ok(pieces.outcome())
    }

    fn block_at_once(
        &self,
        depth: usize,
        beneath: Beneath,
        layer: &Layer,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<AtOnce> {
        let geometry = layer.geometry();
        let block = geometry.block_of(GuestOffset(offset));
        let Some(entry) = layer.bat().in_memory(geometry.payload_index(block)) else { return Ok(AtOnce::Waits) };
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => place_at_once(layer, entry, buf, offset),
            Some(PayloadState::PartiallyPresent) => self.partial_at_once((depth, beneath), layer, entry, buf, offset),
            Some(PayloadState::NotPresent) if geometry.is_differencing() => {
                self.parent_at_once(depth, beneath, buf, offset)
            }
            _ => Ok(AtOnce::Zero),
        }
    }

    fn parent_at_once(&self, depth: usize, beneath: Beneath, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        if beneath == Beneath::No {
            return Ok(AtOnce::Zero);
        }
        if self.parents_missing && depth + 1 == self.layers.len() {
            return Ok(AtOnce::Waits); // whoever waits is told what is missing
        }
        self.read_at_once(depth + 1, beneath, buf, offset)
    }

    fn partial_at_once(
        &self,
        (depth, beneath): (usize, Beneath),
        layer: &Layer,
        entry: BatEntry,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<AtOnce> {
        let geometry = layer.geometry();
        let chunk = geometry.chunk_of(geometry.block_of(GuestOffset(offset)));
        let sector = geometry.logical_sector_size();
        let (mut rest, mut offset) = (buf, offset);
        let mut pieces = Pieces::default();
        while !rest.is_empty() {
            let bit = geometry.bitmap_bit(GuestOffset(offset));
            let key = BitmapKey { chunk, page: bit / PAGE_BITS };
            let Some(page) = layer.bitmaps().in_memory(key) else { return Ok(AtOnce::Waits) };
            let in_sector = offset % sector;
            let sectors = (in_sector + rest.len() as u64).div_ceil(sector);
            let (here, count) = bit_run(&page, bit % PAGE_BITS, sectors);
            let length = usize::try_from(count * sector - in_sector).unwrap_or(usize::MAX).min(rest.len());
            let (piece, tail) = rest.split_at_mut(length);
            let outcome = if here {
                place_at_once(layer, entry, piece, offset)?
            } else {
                self.parent_at_once(depth, beneath, piece, offset)?
            };
            if !pieces.add(piece, outcome) {
                return Ok(AtOnce::Waits);
            }
            offset += length as u64; // stays inside the block
            rest = tail;
        }
        Ok(pieces.outcome())
    }

    /// Writes a buffer that lies on the disk.
    pub(super) fn write_at_once(&self, buf: &[u8], offset: u64) -> Result<bool> {
        let geometry = *self.top().geometry();
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let left = geometry.block_size() - geometry.offset_in_block(GuestOffset(offset));
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let Some((piece, tail)) = rest.split_at_checked(length) else { break };
            if !self.is_known(offset, piece.len() as u64) {
                return Ok(false);
            }
            if !self.write_mapped(piece, offset)? && !self.first_write_at_once(piece, offset)? {
                return Ok(false);
            }
            offset += length as u64; // does not pass the end of the disk
            rest = tail;
        }
        Ok(true)
    }

    /// Whether everything that tells where a piece of a block goes is in memory.
    fn is_known(&self, offset: u64, length: u64) -> bool {
        let layer = self.top();
        let geometry = layer.geometry();
        let block = geometry.block_of(GuestOffset(offset));
        let Some(entry) = layer.bat().in_memory(geometry.payload_index(block)) else { return false };
        if entry.payload_state() != Some(PayloadState::PartiallyPresent) {
            return true;
        }
        let last = geometry.bitmap_bit(GuestOffset(offset + length.saturating_sub(1))); // lies on the disk
        let pages = geometry.bitmap_bit(GuestOffset(offset)) / PAGE_BITS..=last / PAGE_BITS;
        let chunk = geometry.chunk_of(block);
        pages.into_iter().all(|page| layer.bitmaps().in_memory(BitmapKey { chunk, page }).is_some())
    }

    /// Writes a piece of a block that is not mapped, where that takes neither bitmaps nor a commit.
    fn first_write_at_once(&self, buf: &[u8], offset: u64) -> Result<bool> {
        let Some(writer) = self.writer.get().filter(|_| !self.top().geometry().is_differencing()) else {
            return Ok(false);
        };
        let _active = writer.enter()?;
        // Only now: the session that was there before may have been closed, and the image reopened.
        if !writer.is_ready() {
            return Ok(false);
        }
        let range = offset..offset + buf.len() as u64;
        match self.put_by_change(writer, Payload::Bytes(buf), &range, Wait::AtOnce) {
            // Freed space may become room, but not at once.
            Err(error) if is_full(&error) && writer.waiting_bytes() > 0 => Ok(false),
            Err(error) if error.kind() == ErrorKind::Busy => Ok(false),
            other => other,
        }
    }
}

/// Reads what lies in the file of a layer.
fn place_at_once(layer: &Layer, entry: BatEntry, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
    let at = entry.file_offset().0 + layer.geometry().offset_in_block(GuestOffset(offset));
    let filled = layer.view().read_at_once(buf, at).map_err(|error| layer.name_error(error))?;
    Ok(if filled { AtOnce::Filled } else { AtOnce::Waits })
}
