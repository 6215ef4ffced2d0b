//! Plans: where the bytes of a range are, or are to go, for callers that do the payload I/O themselves.

use std::ops::Range;
use std::sync::Arc;

use super::Shared;
use super::bat::bitmap_page_offset;
use super::bitmap::{BitmapKey, PAGE_BITS, bit_run};
use super::change::Change;
use super::device::check_range;
use super::layer::Layer;
use super::tokens::{Hold, Wait};
use super::writer::{Writer, read_only};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::PayloadState;
use crate::storage::Storage;
use crate::sync::{Ordering, fence};
use crate::units::{BlockIndex, GuestOffset};

/// Where some bytes of a planned read are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadStep {
    /// In the file of a layer ([`BlockDevice::layer_storage`](super::BlockDevice::layer_storage)).
    File {
        /// 0 is the image itself, 1 its parent, and so on.
        layer: usize,
        /// Where in that layer's file.
        file_offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// Here: they come out of a dirty log, or lie at the cut end of a file.
    Memory(Vec<u8>),
    /// So many zeros.
    Zero(u64),
}

impl ReadStep {
    /// How many bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::File { length, .. } | Self::Zero(length) => *length,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }
}

/// A planned read of a range inside one block. The places stay valid as long as it lives: trimming or zeroing the block
/// waits for it.
#[derive(Debug)]
pub struct ReadPlan {
    range: Range<u64>,
    steps: Vec<ReadStep>,
    shared: Arc<Shared>,
    /// The block that is held; `None` where there is no writer.
    held: Option<BlockIndex>,
}

impl ReadPlan {
    /// What it covers: from the start of the range that was asked for, up to the end of that block at most.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Where the bytes are, in order.
    #[must_use]
    pub fn steps(&self) -> &[ReadStep] {
        &self.steps
    }
}

impl Drop for ReadPlan {
    fn drop(&mut self) {
        match (self.held.take(), self.shared.writer.get()) {
            (Some(block), Some(writer)) => {
                writer.tokens.release(block, Hold::Use);
                writer.leave();
            }
            _ => {
                self.shared.loose_plans.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

/// A planned write of a range inside one block. Write the bytes of [`WritePlan::range`] to [`WritePlan::storage`] at
/// [`WritePlan::file_offset`], then call [`WritePlan::complete`]. Until then nobody sees anything of it, and a crash leaves
/// the block as it was. What is mapped already (a block, or sectors of a partially present one) is written in place.
///
/// Dropping a plan gives its space back; drop it only when none of its I/O is under way. Otherwise
/// [`abandon`](WritePlan::abandon) it.
#[derive(Debug)]
pub struct WritePlan {
    shared: Arc<Shared>,
    range: Range<u64>,
    change: Option<Change>,
}

impl WritePlan {
    /// What it covers: from the start of the range that was asked for, up to the end of that block at most.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Where the first byte goes in the file; the others follow it.
    #[must_use]
    pub fn file_offset(&self) -> u64 {
        self.change.as_ref().map_or(0, |change| change.file_offset)
    }

    /// The file.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        self.shared.storage()
    }

    /// Publishes the write: reads see it, and the next flush makes it durable. Does no I/O.
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`] when writing has failed for good meanwhile; the plan is undone then.
    pub fn complete(mut self) -> Result<()> {
        let (Some(writer), Some(change)) = (self.shared.writer.get(), self.change.take()) else { return Ok(()) };
        let result = self.shared.finish_or_undo(writer, change);
        writer.leave();
        result
    }

    /// Gives the plan up while its I/O may still be under way: its space is not used again before the image is opened anew.
    pub fn abandon(mut self) {
        self.end(false);
    }

    fn end(&mut self, reusable: bool) {
        if let (Some(writer), Some(change)) = (self.shared.writer.get(), self.change.take()) {
            self.shared.undo(writer, change, reusable);
            writer.leave();
        }
    }
}

impl Drop for WritePlan {
    fn drop(&mut self) {
        self.end(true);
    }
}

impl Shared {
    /// Publishes a change, unless writing has failed for good.
    pub(super) fn finish_or_undo(&self, writer: &Writer, change: Change) -> Result<()> {
        match writer.poisoned() {
            Some(error) => {
                self.undo(writer, change, true);
                Err(error)
            }
            None => {
                self.finish(writer, change);
                Ok(())
            }
        }
    }

    /// The part of a range that lies in its first block.
    pub(super) fn first_block_part(&self, range: &Range<u64>) -> Range<u64> {
        let geometry = self.top().geometry();
        let block = geometry.block_of(GuestOffset(range.start));
        range.start..range.end.min(geometry.block_range(block).end)
    }

    pub(super) fn plan_write(self: &Arc<Self>, range: Range<u64>, wait: Wait) -> Result<Option<WritePlan>> {
        self.check_plan(&range)?;
        let writer = self.writer.get().ok_or_else(read_only)?;
        let active = writer.enter()?;
        if !self.start(writer, wait)? {
            return Ok(None);
        }
        let range = self.first_block_part(&range);
        let begun = self.with_room(writer, wait, || self.begin(writer, &range, wait))?;
        let Some(change) = begun else { return Ok(None) };
        active.keep();
        Ok(Some(WritePlan { shared: Arc::clone(self), range, change: Some(change) }))
    }

    pub(super) fn plan_read(self: &Arc<Self>, range: Range<u64>, wait: Wait) -> Result<Option<ReadPlan>> {
        self.check_plan(&range)?;
        let range = self.first_block_part(&range);
        let block = self.top().geometry().block_of(GuestOffset(range.start));
        // Without a writer nothing moves; one that comes later refuses while such plans are there.
        self.loose_plans.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst); // either it is seen here, or it sees this plan
        let mut plan = ReadPlan { range: range.clone(), steps: Vec::new(), shared: Arc::clone(self), held: None };
        if let Some(writer) = self.writer.get() {
            if !writer.tokens.acquire(block, Hold::Use, wait) {
                return Ok(None);
            }
            writer.count();
            self.loose_plans.fetch_sub(1, Ordering::SeqCst);
            plan.held = Some(block);
        }
        let _inside = self.gate.enter();
        self.resolve(0, range, &mut plan.steps)?;
        Ok(Some(plan))
    }

    /// Where the bytes of a range are, for a layer and what lies beneath it.
    fn resolve(&self, depth: usize, range: Range<u64>, steps: &mut Vec<ReadStep>) -> Result<()> {
        let Some(layer) = self.layers.get(depth) else {
            steps.push(ReadStep::Zero(range.end - range.start));
            return Ok(());
        };
        let geometry = layer.geometry();
        let mut position = range.start;
        while position < range.end {
            if position >= geometry.disk_size() {
                // Behind a shorter parent's end everything reads as zero.
                steps.push(ReadStep::Zero(range.end - position));
                break;
            }
            let block = geometry.block_of(GuestOffset(position));
            let part = position..range.end.min(geometry.block_range(block).end);
            position = part.end;
            self.resolve_block(depth, layer, block, part, steps).map_err(|error| layer.name_error(error))?;
        }
        Ok(())
    }

    fn resolve_block(
        &self,
        depth: usize,
        layer: &Layer,
        block: BlockIndex,
        range: Range<u64>,
        steps: &mut Vec<ReadStep>,
    ) -> Result<()> {
        let geometry = layer.geometry();
        let entry = layer.bat().payload(block, layer.rules(), layer.view())?;
        let at = |position| entry.file_offset().0 + geometry.offset_in_block(GuestOffset(position));
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => place(depth, layer, at(range.start), range.end - range.start, steps),
            Some(PayloadState::NotPresent) if geometry.is_differencing() => {
                self.resolve_parent(depth, layer, range, steps)
            }
            Some(PayloadState::PartiallyPresent) => {
                let chunk = geometry.chunk_of(block);
                let bitmap = layer.bat().bitmap(chunk, layer.rules(), layer.view())?;
                if bitmap.0 == 0 {
                    return Err(Error::from_finding(&layer.rules().bitmap_missing(block)));
                }
                let sector = geometry.logical_sector_size();
                let mut position = range.start;
                while position < range.end {
                    let bit = geometry.bitmap_bit(GuestOffset(position));
                    let key = BitmapKey { chunk, page: bit / PAGE_BITS };
                    let page = layer.bitmaps().page(key, bitmap_page_offset(bitmap, key.page), layer.view())?;
                    let sectors = (range.end - position).div_ceil(sector);
                    let (here, count) = bit_run(&page, bit % PAGE_BITS, sectors);
                    let end = (position + count * sector).min(range.end);
                    if here {
                        place(depth, layer, at(position), end - position, steps)?;
                    } else {
                        self.resolve_parent(depth, layer, position..end, steps)?;
                    }
                    position = end;
                }
                Ok(())
            }
            _ => {
                steps.push(ReadStep::Zero(range.end - range.start));
                Ok(())
            }
        }
    }

    fn resolve_parent(&self, depth: usize, layer: &Layer, range: Range<u64>, steps: &mut Vec<ReadStep>) -> Result<()> {
        if self.parents_missing && depth + 1 == self.layers.len() {
            return Err(layer.parent_missing(range.start));
        }
        self.resolve(depth + 1, range, steps)
    }

    fn check_plan(&self, range: &Range<u64>) -> Result<()> {
        let geometry = self.top().geometry();
        check_range(range.start, range.end.saturating_sub(range.start), geometry.disk_size())?;
        let sector = geometry.logical_sector_size();
        if range.is_empty() || !range.start.is_multiple_of(sector) || !range.end.is_multiple_of(sector) {
            let what = format!(
                "a plan has to cover whole sectors of {sector} bytes, not {:#x}..{:#x}",
                range.start, range.end
            );
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        Ok(())
    }
}

/// A range of a layer's file: in the file where all of it stands there, else its bytes.
fn place(depth: usize, layer: &Layer, file_offset: u64, length: u64, steps: &mut Vec<ReadStep>) -> Result<()> {
    if layer.view().is_in_file(&(file_offset..file_offset + length)) {
        steps.push(ReadStep::File { layer: depth, file_offset, length });
    } else {
        steps.push(ReadStep::Memory(layer.view().read_vec(file_offset..file_offset + length)?)); // at most a block
    }
    Ok(())
}
