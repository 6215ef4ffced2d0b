//! Bounded reading inside one volume, and where the free ranges of a file system go.

use std::ops::{ControlFlow, Range};

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::error::{Error, Result};
use crate::image::BlockDevice;

/// Longest read: large enough for the medium, small enough for memory.
pub(super) const READ_BYTES_MAX: u64 = 1 << 20;

/// Why a volume was not understood to its end.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Reading failed, or the caller cancelled: nothing is known.
    Failed(Error),
    /// What is there is not what it should be. A sentence without a full stop, for people.
    Reason(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The result of looking at what a guest left.
pub(super) type Checked<T> = Result<T, Trouble>;

/// Ends with a reason.
pub(super) fn reason<T>(text: impl Into<String>) -> Checked<T> {
    Err(Trouble::Reason(text.into()))
}

/// Ends with a reason unless something holds.
pub(super) fn require(holds: bool, text: &str) -> Checked<()> {
    if holds { Ok(()) } else { reason(text) }
}

/// A part of a disk, with offsets of its own.
#[derive(Clone, Copy)]
pub(super) struct Window<'a> {
    disk: &'a dyn BlockDevice,
    start: u64,
    length: u64,
}

impl<'a> Window<'a> {
    /// The part of a disk from `range`, as far as it lies on the disk.
    pub(super) fn new(disk: &'a dyn BlockDevice, range: &Range<u64>) -> Self {
        let start = range.start.min(disk.size());
        let length = range.end.min(disk.size()).saturating_sub(start);
        Self { disk, start, length }
    }

    /// Its bytes.
    pub(super) const fn length(&self) -> u64 {
        self.length
    }

    /// Where it begins on the disk.
    pub(super) const fn start(&self) -> u64 {
        self.start
    }

    /// Reads `length` bytes, at most [`READ_BYTES_MAX`], from `offset`.
    pub(super) fn read(&self, offset: u64, length: u64) -> Checked<Vec<u8>> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.length);
        if !inside || length > READ_BYTES_MAX {
            return reason(format!("a structure of {length} bytes at offset {offset:#x} reaches past its end"));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()]; // at most READ_BYTES_MAX
        if let Some(start) = self.start.checked_add(offset) {
            self.disk.read_at(&mut bytes, start)?;
        }
        Ok(bytes)
    }

    /// Reads a structure.
    pub(super) fn read_struct<T: FromBytes + KnownLayout + Immutable>(&self, offset: u64) -> Checked<T> {
        let bytes = self.read(offset, size_of::<T>() as u64)?;
        parse(&bytes, 0)
    }

    /// Like [`Window::read`], but only as much as there is.
    pub(super) fn read_some(&self, offset: u64, length: u64) -> Checked<Vec<u8>> {
        self.read(offset.min(self.length), length.min(self.length.saturating_sub(offset)))
    }
}

/// A structure at an offset of a buffer.
pub(super) fn parse<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8], offset: usize) -> Checked<T> {
    match bytes.get(offset..).map(T::read_from_prefix) {
        Some(Ok((value, _))) => Ok(value),
        _ => reason("a structure is cut off"),
    }
}

/// Takes free ranges in absolute bytes of the disk; breaks to stop.
pub(super) type VisitFree<'a> = dyn FnMut(Range<u64>) -> ControlFlow<()> + 'a;

/// Where a file system says that it was stopped, or how far it is.
pub(super) type Tick<'a> = dyn Fn(u64) -> Result<()> + 'a;

/// Collects free ranges of one volume, joins neighbours, and holds them to order and bounds.
pub(super) struct FreeSink<'a> {
    visit: &'a mut VisitFree<'a>,
    /// Where the volume begins on the disk.
    base: u64,
    /// Bytes of the volume that the file system covers.
    limit: u64,
    /// The last range, which the next one may continue; offsets in the volume.
    pending: Range<u64>,
    /// Bytes given so far.
    total: u64,
    /// The visitor wants no more.
    stopped: bool,
}

impl<'a> FreeSink<'a> {
    /// A sink for a file system of `limit` bytes at byte `base` of the disk.
    pub(super) fn new(base: u64, limit: u64, visit: &'a mut VisitFree<'a>) -> Self {
        Self { visit, base, limit, pending: 0..0, total: 0, stopped: false }
    }

    /// Takes a range of the volume. Ranges come in order and do not overlap.
    pub(super) fn add(&mut self, range: Range<u64>) -> Checked<()> {
        if range.start >= range.end {
            return Ok(());
        }
        if range.start < self.pending.end || range.end > self.limit {
            return reason(format!("free space at offset {:#x} overlaps other free space or the end", range.start));
        }
        self.total += range.end - range.start; // ranges do not overlap: at most `limit`
        if range.start == self.pending.end && !self.pending.is_empty() {
            self.pending.end = range.end;
            return Ok(());
        }
        let earlier = std::mem::replace(&mut self.pending, range);
        self.send(&earlier);
        Ok(())
    }

    fn send(&mut self, range: &Range<u64>) {
        if self.stopped || range.is_empty() {
            return;
        }
        // Volumes lie on the disk, whose size fits.
        let absolute = self.base.saturating_add(range.start)..self.base.saturating_add(range.end);
        self.stopped = (self.visit)(absolute).is_break();
    }

    /// Whether the visitor wants no more.
    pub(super) const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Gives the last range away; the bytes of all.
    pub(super) fn finish(mut self) -> u64 {
        let last = self.pending.clone();
        self.send(&last);
        self.total
    }
}

/// Calls `found` with each run of zero bits among the first `count` bits of a bitmap, in order; least significant first.
pub(super) fn clear_runs(bitmap: &[u8], count: u64, found: &mut dyn FnMut(Range<u64>) -> Checked<()>) -> Checked<()> {
    let mut begun: Option<u64> = None;
    let mut position = 0_u64;
    for chunk in bitmap.chunks(8) {
        if position >= count {
            break;
        }
        let mut word = [0xff; 8];
        word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        let bits = u64::from_le_bytes(word);
        let width = (count - position).min(64).min(chunk.len() as u64 * 8);
        let mut at = 0;
        while at < width {
            let rest = bits >> at; // `at` is below 64
            let ones = rest & 1 == 1;
            let run = u64::from(if ones { (!rest).trailing_zeros() } else { rest.trailing_zeros() }).min(width - at);
            let start = position + at;
            if ones {
                if let Some(first) = begun.take() {
                    found(first..start)?;
                }
            } else if begun.is_none() {
                begun = Some(start);
            }
            at += run.max(1);
        }
        position += width;
    }
    match begun {
        Some(first) => found(first..position),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bitmap: &[u8], count: u64) -> Vec<Range<u64>> {
        let mut all = Vec::new();
        clear_runs(bitmap, count, &mut |run| {
            all.push(run);
            Ok(())
        })
        .unwrap();
        all
    }

    fn low(value: u64) -> u8 {
        value.to_le_bytes()[0]
    }

    #[test]
    fn runs_of_clear_bits_are_those_of_a_walk_bit_by_bit() {
        let mut state = 1_u64;
        for length in [0_usize, 1, 3, 8, 9, 16, 40] {
            for shape in 0..20 {
                let bytes: Vec<u8> = (0..length)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        match shape % 4 {
                            0 => 0,
                            1 => 0xff,
                            2 => low(state >> 60) & 1,
                            _ => low(state >> 40),
                        }
                    })
                    .collect();
                for count in [0, 1, length as u64 * 8 / 2, (length as u64 * 8).saturating_sub(3), length as u64 * 8] {
                    let mut expected: Vec<Range<u64>> = Vec::new();
                    for bit in 0..count.min(length as u64 * 8) {
                        if bytes[usize::try_from(bit / 8).unwrap()] >> (bit % 8) & 1 == 1 {
                            continue;
                        }
                        match expected.last_mut() {
                            Some(last) if last.end == bit => last.end += 1,
                            _ => expected.push(bit..bit + 1),
                        }
                    }
                    assert_eq!(runs(&bytes, count), expected);
                }
            }
        }
    }

    #[test]
    fn ranges_are_joined_and_held_to_order_and_bounds() {
        let mut seen = Vec::new();
        let mut visit = |range| {
            seen.push(range);
            ControlFlow::Continue(())
        };
        let mut sink = FreeSink::new(1000, 100, &mut visit);
        sink.add(0..10).unwrap();
        sink.add(10..20).unwrap();
        sink.add(30..40).unwrap();
        assert!(sink.add(35..50).is_err());
        assert!(sink.add(90..101).is_err());
        assert_eq!(sink.finish(), 30);
        assert_eq!(seen, [1000..1020, 1030..1040]);
    }
}
