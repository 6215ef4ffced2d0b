//! What is to be done next, in the order of the disk.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{LAYERS_MAX, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::image::BlockDevice;
use crate::ops::segments::{SHORT_GAP, Segment, Segments};
use crate::storage::Storage;

/// Bytes read at once. Large enough that system calls do not matter, small enough for the processor's cache.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;
/// Bytes cloned at once.
const CLONE_BYTES: u64 = 256 << 20;
/// Bytes copied inside the kernel at once.
const COPY_BYTES: u64 = 8 << 20;
/// File systems share whole blocks; this is a multiple of the block of nearly all.
const CLONE_ALIGNMENT: u64 = 4096;
/// Less than this is read: sharing would only scatter the file.
const CLONE_LEAST: u64 = 64 << 10;

/// Which layers of the source can be cloned from into the target.
#[derive(Debug)]
pub(super) struct Clones {
    layers: Vec<AtomicBool>,
}

impl Clones {
    pub(super) fn none() -> Self {
        Self { layers: Vec::new() }
    }

    /// Tries with the first bytes of each layer, which leaves an empty target empty.
    pub(super) fn probe(source: &Source<'_>, target: &dyn Storage) -> Result<Self> {
        let Source::Disk(disk) = source else { return Ok(Self::none()) };
        let failed = |error| Error::io("cannot prepare the target", error);
        let empty = target.as_file().is_some() && target.growth_reads_zero() && target.is_empty().map_err(failed)?;
        if !empty {
            return Ok(Self::none());
        }
        let mut layers = Vec::new();
        for storage in (0..LAYERS_MAX).map_while(|layer| disk.layer_storage(layer)) {
            // Errors are not looked at: what the real work meets counts.
            let cloned = storage.as_file().is_some()
                && target.clone_range(storage.as_ref(), 0, 0, CLONE_ALIGNMENT).unwrap_or(false);
            if cloned {
                target.set_len(0).map_err(failed)?;
            }
            layers.push(AtomicBool::new(cloned));
        }
        Ok(Self { layers })
    }

    fn can(&self, layer: usize) -> bool {
        self.layers.get(layer).is_some_and(|can| can.load(Ordering::Relaxed))
    }

    /// A layer could not be cloned from after all.
    pub(super) fn give_up(&self, layer: usize) {
        if let Some(can) = self.layers.get(layer) {
            can.store(false, Ordering::Relaxed);
        }
    }

    /// How much of a segment can be cloned from its start on.
    fn length(&self, segment: &Segment) -> Option<u64> {
        let (layer, offset) = segment.place.filter(|(layer, _)| self.can(*layer))?;
        let length = (segment.guest.end - segment.guest.start).min(CLONE_BYTES) / CLONE_ALIGNMENT * CLONE_ALIGNMENT;
        let aligned = segment.guest.start.is_multiple_of(CLONE_ALIGNMENT) && offset.is_multiple_of(CLONE_ALIGNMENT);
        (aligned && length >= CLONE_LEAST && layer < self.layers.len()).then_some(length)
    }
}

/// How the bytes of a task get to the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// They are to be read.
    Read,
    /// They are in the worker's buffer.
    Filled,
    /// They are to be shared with a layer's file at an offset.
    Clone { layer: usize, offset: u64 },
    /// They are to be copied inside the kernel from a layer's file at an offset.
    Copy { layer: usize, offset: u64 },
}

/// A part of the disk, and what to do with it.
#[derive(Debug)]
pub(super) struct Task {
    /// Tasks are numbered from 0 in the order of the disk.
    pub(super) number: u64,
    /// Which part of the disk; at most [`CHUNK_BYTES`] when it is read.
    pub(super) guest: Range<u64>,
    pub(super) action: Action,
}

/// A stream that is read to its end.
pub(super) struct Stream<'a> {
    reader: &'a mut (dyn Read + Send),
    /// The bytes that there must be.
    exactly: Option<u64>,
    /// The bytes that there may be.
    at_most: Option<u64>,
    position: u64,
    ended: bool,
}

/// Gives tasks.
pub(super) enum Feed<'a> {
    Disk { segments: Segments<'a>, kernel_copy: bool, number: u64 },
    Stream { stream: Stream<'a>, number: u64 },
}

impl<'a> Feed<'a> {
    /// `kernel_copy`: copy inside the kernel where that can be done. `size` is the target's.
    pub(super) fn new(source: Source<'a>, kernel_copy: bool, size: Option<u64>) -> Self {
        match source {
            Source::Disk(disk) => Self::Disk { segments: Segments::new(disk), kernel_copy, number: 0 },
            Source::Stream { reader, size: exactly } => {
                Self::Stream { stream: Stream { reader, exactly, at_most: size, position: 0, ended: false }, number: 0 }
            }
        }
    }

    /// The next task; fills the buffer if the source is a stream.
    pub(super) fn next(&mut self, buffer: &mut [u8], clones: &Clones, copying: &AtomicBool) -> Result<Option<Task>> {
        let (found, number) = match self {
            Self::Disk { segments, kernel_copy, number } => {
                let copy = *kernel_copy && copying.load(Ordering::Relaxed);
                (next_of_disk(segments, clones, copy)?, number)
            }
            Self::Stream { stream, number } => (stream.fill(buffer)?.map(|guest| (guest, Action::Filled)), number),
        };
        Ok(found.map(|(guest, action)| {
            let task = Task { number: *number, guest, action };
            *number += 1;
            task
        }))
    }

    /// How many bytes the source had, once all are read.
    pub(super) fn stream_length(&self) -> Option<u64> {
        match self {
            Self::Disk { .. } => None,
            Self::Stream { stream, .. } => Some(stream.position),
        }
    }
}

impl Stream<'_> {
    /// Reads until the buffer is full or the stream ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<Option<Range<u64>>> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty() && !self.ended) {
            match self.reader.read(rest) {
                Ok(0) => self.ended = true,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let at = self.position + filled as u64;
                    return Err(Error::io(format!("cannot read the stream after {at} bytes"), error));
                }
            }
        }
        let start = self.position;
        self.position += filled as u64;
        self.check_length()?;
        Ok((filled > 0).then_some(start..self.position))
    }

    fn check_length(&self) -> Result<()> {
        let position = self.position;
        let message = match (self.exactly, self.at_most) {
            (Some(size), _) if position > size => {
                format!("the stream goes on after the {size} bytes that were announced")
            }
            (Some(size), _) if self.ended && position < size => {
                format!("the stream ended after {position} of the {size} bytes that were announced")
            }
            (None, Some(size)) if position > size => format!("the stream does not fit on a disk of {size} bytes"),
            _ => return Ok(()),
        };
        let error = Error::new(ErrorKind::InvalidArgument, message);
        Err(error.with_hint("give the right size, or leave it out"))
    }
}

/// The next part of a disk: a large one if it can be cloned or copied, otherwise one that fits a buffer.
fn next_of_disk(segments: &mut Segments<'_>, clones: &Clones, copy: bool) -> Result<Option<(Range<u64>, Action)>> {
    let Some(segment) = segments.peek()? else { return Ok(None) };
    if let (Some(length), Some((layer, offset))) = (clones.length(segment), segment.place) {
        return Ok(segments.take(length).map(|taken| (taken.guest, Action::Clone { layer, offset })));
    }
    if let (true, Some((layer, offset))) = (copy, segment.place) {
        return Ok(segments.take(COPY_BYTES).map(|taken| (taken.guest, Action::Copy { layer, offset })));
    }
    let start = segment.guest.start;
    let boundary = (start / CHUNK_BYTES + 1) * CHUNK_BYTES; // disks end below 2^47
    let mut end = start;
    // Short pieces are read together, with the short holes between them.
    while let Some(next) = segments.peek()? {
        let position = next.guest.start;
        let far = position >= boundary || position - end > SHORT_GAP;
        if far || (end > start && clones.length(next).is_some()) {
            break;
        }
        let limit = read_until(next, clones, boundary);
        match segments.take(limit - position) {
            Some(taken) => end = taken.guest.end,
            None => break,
        }
    }
    Ok(Some((start..end, Action::Read)))
}

/// Up to where a segment is read: where its inner part can be cloned, only what stands before that.
fn read_until(segment: &Segment, clones: &Clones, boundary: u64) -> u64 {
    let aligned = segment.guest.start.next_multiple_of(CLONE_ALIGNMENT);
    let mut inner = segment.clone();
    inner.cut(aligned - segment.guest.start);
    if aligned > segment.guest.start && clones.length(&inner).is_some() { aligned } else { boundary }
}

/// The file of a layer that a task named.
pub(super) fn layer(disk: Option<&dyn BlockDevice>, layer: usize) -> Option<Arc<dyn Storage>> {
    disk.and_then(|disk| disk.layer_storage(layer))
}
