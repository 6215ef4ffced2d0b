//! Writing, zeroing and trimming ranges of a disk: loops over blocks.

use std::ops::Range;

use super::change::Change;
use super::device::check_range;
use super::simulation::{Phase, enter};
use super::tokens::Wait;
use super::writer::{Writer, read_only};
use super::{Beneath, Shared};
use crate::error::{Error, Result};
use crate::format::bat::PayloadState;
use crate::units::{BlockIndex, GuestOffset};

/// Ranges up to this are zeroed by writing, longer ones by telling the file system.
const WRITE_ZEROS_MAX: u64 = 64 * 1024;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What is put into a range.
#[derive(Clone, Copy, Debug)]
pub(super) enum Payload<'a> {
    Bytes(&'a [u8]),
    Zeros(u64),
}

impl Payload<'_> {
    fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zeros(length) => *length,
        }
    }
}

impl<'a> Payload<'a> {
    /// The first bytes and the others; `at` is at most the length.
    fn split(self, at: u64) -> (Self, Self) {
        match self {
            Self::Bytes(bytes) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
                let (head, tail) = bytes.split_at(at);
                (Payload::<'a>::Bytes(head), Payload::<'a>::Bytes(tail))
            }
            Self::Zeros(length) => (Self::Zeros(at), Self::Zeros(length - at)),
        }
    }
}

/// A change whose payload is being written: undone unless that ends well, also when a storage panics.
struct Begun<'a> {
    shared: &'a Shared,
    writer: &'a Writer,
    change: Option<Change>,
}

impl Begun<'_> {
    fn file_offset(&self) -> u64 {
        self.change.as_ref().map_or(0, |change| change.file_offset)
    }

    fn finish(mut self) -> Result<()> {
        self.change.take().map_or(Ok(()), |change| self.shared.finish_or_undo(self.writer, change))
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if let Some(change) = self.change.take() {
            self.shared.undo(self.writer, change, true);
        }
    }
}

impl Shared {
    /// Writes inside one block that is mapped, in a session that has started. False when it is not so simple.
    #[inline]
    pub(super) fn write_mapped(&self, buf: &[u8], offset: u64) -> Result<bool> {
        let _inside = self.gate.enter();
        if !self.writer.get().is_some_and(Writer::is_ready) {
            return Ok(false);
        }
        self.put_mapped(Payload::Bytes(buf), offset)
    }

    /// The same for anything, inside the gate.
    #[inline]
    fn put_mapped(&self, payload: Payload<'_>, offset: u64) -> Result<bool> {
        let Some(file_offset) = self.mapped(&(offset..offset + payload.length()))? else { return Ok(false) };
        if file_offset + payload.length() > self.view().physical_size() {
            return Ok(false); // the end of the block was cut off
        }
        self.put(payload, file_offset)?;
        Ok(true)
    }

    /// Writes payload to the file.
    #[inline]
    fn put(&self, payload: Payload<'_>, file_offset: u64) -> Result<()> {
        let _phase = enter(Phase::Payload);
        let done = match payload {
            Payload::Bytes(bytes) => self.storage().write_at(bytes, file_offset),
            Payload::Zeros(length) if length <= WRITE_ZEROS_MAX => {
                let zeros = ZEROS.get(..usize::try_from(length).unwrap_or_default()).unwrap_or_default();
                self.storage().write_at(zeros, file_offset)
            }
            Payload::Zeros(length) => self.storage().zero_range(file_offset..file_offset + length),
        };
        done.map_err(|error| {
            let length = payload.length();
            let error = Error::io(format!("cannot write {length} bytes at {file_offset:#x} of the file"), error);
            if super::commit::is_full(&error) {
                return error.with_hint("make room and try again; nothing that was written before is lost");
            }
            error.with_hint("check the medium and the system log (dmesg)")
        })
    }

    /// Writes a buffer anywhere on the disk.
    pub(super) fn write(&self, buf: &[u8], offset: u64, wait: Wait) -> Result<bool> {
        check_range(offset, buf.len() as u64, self.top().geometry().disk_size())?;
        let writer = self.writer.get().ok_or_else(read_only)?;
        let _active = writer.enter()?;
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let part = self.first_block_part(&(offset..offset + rest.len() as u64));
            let length = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
            let Some((piece, tail)) = rest.split_at_checked(length) else { break };
            if !self.put_in_block(writer, Payload::Bytes(piece), part, wait)? {
                return Ok(false);
            }
            offset += length as u64; // does not pass the end of the disk
            rest = tail;
        }
        Ok(true)
    }

    /// Puts payload into a range inside one block, mapped or not.
    fn put_in_block(&self, writer: &Writer, payload: Payload<'_>, range: Range<u64>, wait: Wait) -> Result<bool> {
        if !self.start(writer, wait)? {
            return Ok(false);
        }
        // A look first: most that come here are not mapped, and need no gate to find that out.
        if self.mapped(&range)?.is_some() {
            let _inside = self.gate.enter();
            writer.fail_if_poisoned()?; // by now the place may be somebody else's
            if self.put_mapped(payload, range.start)? {
                return Ok(true);
            }
        }
        match self.sector_edge(&range) {
            Some(edge) if edge < range.end => {
                let (head, tail) = payload.split(edge - range.start);
                Ok(self.put_in_block(writer, head, range.start..edge, wait)?
                    && self.put_in_block(writer, tail, edge..range.end, wait)?)
            }
            Some(_) => self.with_room(writer, wait, || self.put_in_sector(writer, payload, &range, wait)),
            None => self.with_room(writer, wait, || self.put_by_change(writer, payload, &range, wait)),
        }
    }

    /// Where to cut a range so that every part is whole sectors or lies in one; `None` when the range is whole sectors, or
    /// when that does not matter since the rest of a sector cannot be a parent's.
    fn sector_edge(&self, range: &Range<u64>) -> Option<u64> {
        let geometry = self.top().geometry();
        let sector = geometry.logical_sector_size();
        let (start, end) = (range.start % sector, range.end % sector);
        if !geometry.is_differencing() || (start == 0 && end == 0) {
            None
        } else if start != 0 {
            Some((range.start - start + sector).min(range.end))
        } else if range.end - range.start > end {
            Some(range.end - end)
        } else {
            Some(range.end)
        }
    }

    pub(super) fn put_by_change(
        &self,
        writer: &Writer,
        payload: Payload<'_>,
        range: &Range<u64>,
        wait: Wait,
    ) -> Result<bool> {
        // It was looked up just before, and was not mapped.
        let Some(change) = self.begin_as(writer, range, false, wait)? else { return Ok(false) };
        let begun = Begun { shared: self, writer, change: Some(change) };
        self.put(payload, begun.file_offset())?;
        begun.finish().map(|()| true)
    }

    /// A part of a sector that is not here yet: the sector is read under its block's token and written whole.
    fn put_in_sector(&self, writer: &Writer, payload: Payload<'_>, range: &Range<u64>, wait: Wait) -> Result<bool> {
        let sector = self.top().geometry().logical_sector_size();
        let start = range.start - range.start % sector;
        let Some(change) = self.begin(writer, &(start..start + sector), wait)? else { return Ok(false) };
        let is_mapped = change.is_mapped();
        let begun = Begun { shared: self, writer, change: Some(change) };
        if is_mapped {
            self.put(payload, begun.file_offset() + (range.start - start))?;
        } else {
            let bytes = self.fill_sector(payload, range, start, sector)?;
            self.put(Payload::Bytes(&bytes), begun.file_offset())?;
        }
        begun.finish().map(|()| true)
    }

    /// The bytes of a sector: what the disk holds, with the payload over it.
    fn fill_sector(&self, payload: Payload<'_>, range: &Range<u64>, start: u64, sector: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(sector).unwrap_or(usize::MAX)];
        self.read_layer(0, Beneath::Yes, &mut bytes, start)?;
        let skip = usize::try_from(range.start - start).unwrap_or(usize::MAX);
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        if let Some(target) = bytes.get_mut(skip..skip + length) {
            match payload {
                Payload::Bytes(source) => target.copy_from_slice(source),
                Payload::Zeros(_) => target.fill(0),
            }
        }
        Ok(bytes)
    }

    /// Makes a range read as zero. With `unmap`, whole blocks give their space back.
    pub(super) fn write_zeroes(&self, range: Range<u64>, unmap: bool, wait: Wait) -> Result<bool> {
        check_range(range.start, range.end.saturating_sub(range.start), self.top().geometry().disk_size())?;
        let writer = self.writer.get().ok_or_else(read_only)?;
        let _active = writer.enter()?;
        let mut rest = range;
        while !rest.is_empty() {
            let part = self.first_block_part(&rest);
            rest.start = part.end;
            if !self.zero_in_block(writer, &part, unmap && !writer.is_fixed, wait)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn zero_in_block(&self, writer: &Writer, range: &Range<u64>, unmap: bool, wait: Wait) -> Result<bool> {
        let geometry = *self.top().geometry();
        let block = geometry.block_of(GuestOffset(range.start));
        let covers = *range == geometry.block_range(block);
        loop {
            let state = self.state_of(block)?;
            let absent = |state| match state {
                // A fixed disk keeps the space of every block.
                PayloadState::Undefined | PayloadState::Unmapped => !writer.is_fixed,
                PayloadState::NotPresent => covers || !geometry.is_differencing(),
                _ => false,
            };
            if state == PayloadState::Zero {
                return Ok(true);
            }
            // Once the whole block is told to be zero, that is true of a part of it as well.
            let applies = |state| absent(state) || (covers && unmap && is_present(state));
            if !applies(state) {
                let zeros = Payload::Zeros(range.end - range.start);
                return self.put_in_block(writer, zeros, range.clone(), wait);
            }
            let clear = || self.clear_block(writer, block, PayloadState::Zero, applies, wait);
            if !self.start(writer, wait)? || !self.with_room(writer, wait, clear)? {
                return Ok(false);
            }
        }
    }

    fn state_of(&self, block: BlockIndex) -> Result<PayloadState> {
        let layer = self.top();
        let entry = layer.bat().payload(block, layer.rules(), layer.view())?;
        Ok(entry.payload_state().unwrap_or(PayloadState::NotPresent)) // an entry in error was refused just before
    }

    /// Gives up what a range holds: blocks that lie in it as a whole and are present become UNMAPPED. Fixed images keep
    /// theirs.
    pub(super) fn discard(&self, range: Range<u64>, wait: Wait) -> Result<bool> {
        let geometry = *self.top().geometry();
        check_range(range.start, range.end.saturating_sub(range.start), geometry.disk_size())?;
        let writer = self.writer.get().ok_or_else(read_only)?;
        let _active = writer.enter()?;
        if writer.is_fixed {
            return Ok(true);
        }
        let first = range.start.div_ceil(geometry.block_size());
        let end = if range.end == geometry.disk_size() {
            geometry.payload_blocks()
        } else {
            range.end / geometry.block_size()
        };
        for block in (first..end).map(BlockIndex) {
            let clear = || self.clear_block(writer, block, PayloadState::Unmapped, is_present, wait);
            if is_present(self.state_of(block)?)
                && !(self.start(writer, wait)? && self.with_room(writer, wait, clear)?)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

const fn is_present(state: PayloadState) -> bool {
    matches!(state, PayloadState::FullyPresent | PayloadState::PartiallyPresent)
}
