//! The parts of a disk that hold data, one after another, without a list of all of them in memory.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{ControlFlow, Range};

use crate::error::{Error, Result};
use crate::image::{BlockDevice, Extent, ExtentKind};
use crate::storage::Storage;

/// Extents asked for at once. Each time the tables are found anew, which some file systems take long for.
const BATCH: usize = 4096;
/// A disk that allocates in smaller units tells its holes itself, as raw disks do. In larger units, an allocated block
/// may be a hole of the file for the most part.
const FINE_UNIT: u64 = 64 << 10;
/// Bytes tested for zero before the result is looked at: enough for the processor's wide instructions.
const FOLD_BYTES: usize = 64;
/// The unit in which runs of data and zeros are told apart.
pub(super) const PAGE_BYTES: usize = 4096;
/// Fewer zeros than this between data are written as data: a separate write would cost more.
pub(super) const SHORT_GAP: u64 = 32 << 10;

/// A part of a disk that may hold anything but zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it stands on the disk.
    pub(super) guest: Range<u64>,
    /// The layer and the offset in its file, where there is one place.
    pub(super) place: Option<(usize, u64)>,
}

impl Segment {
    /// Cuts off the first `length` bytes (at most all of them).
    pub(super) fn cut(&mut self, length: u64) -> Self {
        let end = self.guest.end.min(self.guest.start.saturating_add(length));
        let first = Self { guest: self.guest.start..end, place: self.place };
        let taken = end - self.guest.start;
        self.guest.start = end;
        self.place = self.place.map(|(layer, offset)| (layer, offset + taken)); // stays inside the extent
        first
    }
}

/// Stretches of data that are remembered for one file.
const STRETCHES_MAX: usize = 16;
/// Bytes that may be walked in vain in one file before only holes at the start of a range are looked for.
const VAIN_BYTES_MAX: u64 = 4 << 30;

/// Where one file is known to hold data.
///
/// Some file systems find the end of a stretch by walking all of it, page by page. With blocks in no order each search
/// would walk most of the file again, which takes hours.
#[derive(Debug, Default)]
struct KnownData {
    stretches: VecDeque<Range<u64>>,
    /// Bytes that were asked about.
    asked: u64,
    /// Bytes behind those that had to be walked to find the end of their stretch.
    vain: u64,
}

impl KnownData {
    /// As [`Storage::next_data`]; what it calls data may hold holes after all.
    fn next(&mut self, storage: &dyn Storage, range: Range<u64>) -> std::io::Result<Option<Range<u64>>> {
        let known =
            |stretches: &VecDeque<Range<u64>>, at| stretches.iter().find(|stretch| stretch.contains(&at)).cloned();
        if let Some(stretch) = known(&self.stretches, range.start) {
            return Ok(Some(range.start..range.end.min(stretch.end)));
        }
        let Some(start) = storage.data_start(range.clone())?.map(|start| start.max(range.start)) else {
            return Ok(None);
        };
        if let Some(stretch) = known(&self.stretches, start) {
            return Ok(Some(start..range.end.min(stretch.end)));
        }
        if self.vain > self.asked.saturating_add(VAIN_BYTES_MAX) {
            return Ok(Some(start..range.end));
        }
        let Some(found) = storage.next_data(start..storage.len()?.max(range.end))? else { return Ok(None) };
        self.asked = self.asked.saturating_add(range.end.saturating_sub(start));
        self.vain = self.vain.saturating_add(found.end.saturating_sub(found.start.max(range.end)));
        if self.stretches.len() >= STRETCHES_MAX {
            self.stretches.pop_front();
        }
        self.stretches.push_back(found.clone());
        Ok((found.start < range.end).then_some(found.start..found.end.min(range.end)))
    }
}

/// Walks the segments of a disk.
#[derive(Debug)]
pub(super) struct Segments<'a> {
    source: &'a dyn BlockDevice,
    /// Where the extents that were not asked for yet begin.
    asked: u64,
    queue: VecDeque<Extent>,
    /// What is left of the segment at the front.
    current: Option<Segment>,
    /// What is left of an extent whose holes in the file are being looked for.
    open: Option<Segment>,
    look_for_holes: bool,
    /// By layer.
    known: BTreeMap<usize, KnownData>,
}

impl<'a> Segments<'a> {
    pub(super) fn new(source: &'a dyn BlockDevice) -> Self {
        let look_for_holes = source.allocation_unit() >= FINE_UNIT;
        let known = BTreeMap::new();
        Self { source, asked: 0, queue: VecDeque::new(), current: None, open: None, look_for_holes, known }
    }

    /// What comes next; `None` at the end of the disk.
    pub(super) fn peek(&mut self) -> Result<Option<&Segment>> {
        while self.current.as_ref().is_none_or(|segment| segment.guest.is_empty()) {
            let Some(open) = self.open.take() else {
                match self.next_extent()? {
                    Some(extent) => self.open = data(&extent),
                    None => return Ok(None),
                }
                continue;
            };
            self.narrow(open)?;
        }
        Ok(self.current.as_ref())
    }

    /// Takes at most `length` bytes of what [`Self::peek`] showed.
    pub(super) fn take(&mut self, length: u64) -> Option<Segment> {
        self.current.as_mut().map(|segment| segment.cut(length))
    }

    /// Finds the first data of an extent in its file.
    fn narrow(&mut self, mut open: Segment) -> Result<()> {
        let storage = match open.place {
            Some((layer, offset)) if self.look_for_holes => {
                self.source.layer_storage(layer).map(|found| (found, layer, offset))
            }
            _ => None,
        };
        let Some((storage, layer, offset)) = storage else {
            self.current = Some(open);
            return Ok(());
        };
        let length = open.guest.end - open.guest.start;
        // Extents lie below 2^63 in their files.
        let found = self.known.entry(layer).or_default().next(storage.as_ref(), offset..offset + length);
        let found = found.map_err(|error| Error::io(format!("cannot look for data at {offset:#x}"), error))?;
        if let Some(found) = found {
            open.cut(found.start.saturating_sub(offset));
            self.current = Some(open.cut(found.end - found.start));
            self.open = (!open.guest.is_empty()).then_some(open);
        }
        Ok(())
    }

    fn next_extent(&mut self) -> Result<Option<Extent>> {
        let size = self.source.size();
        while self.queue.is_empty() && self.asked < size {
            let queue = &mut self.queue;
            let mut reached = self.asked;
            self.source.visit_extents(self.asked..size, &mut |extent| {
                reached = extent.end();
                if matches!(extent.kind, ExtentKind::Data { .. }) {
                    queue.push_back(*extent);
                }
                if queue.len() < BATCH { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
            if reached == self.asked {
                break; // nothing was visited: there is nothing more
            }
            self.asked = reached;
        }
        Ok(self.queue.pop_front())
    }
}

/// The segment that an extent of data is.
fn data(extent: &Extent) -> Option<Segment> {
    let ExtentKind::Data { file_offset } = extent.kind else { return None };
    Some(Segment { guest: extent.start..extent.end(), place: file_offset.map(|offset| (extent.layer, offset)) })
}

/// Whether all bytes are zero; stops soon after the first that is not.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<FOLD_BYTES>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Finds the runs of a buffer that are worth writing. `start` is where the buffer stands on the disk; runs begin and
/// end on pages of the disk or at the ends of the buffer.
pub(super) fn data_runs(buffer: &[u8], start: u64, runs: &mut Vec<Range<u64>>) {
    let mut rest = buffer;
    let mut position = start;
    while !rest.is_empty() {
        let to_page = PAGE_BYTES - usize::try_from(position % PAGE_BYTES as u64).unwrap_or(0);
        let (page, after) = rest.split_at_checked(to_page).unwrap_or((rest, &[]));
        let end = position + page.len() as u64;
        if !is_zero(page) {
            match runs.last_mut() {
                Some(last) if position - last.end < SHORT_GAP => last.end = end,
                _ => runs.push(position..end),
            }
        }
        position = end;
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::single_range_in_vec_init, reason = "lists of one run are meant")]
    use super::*;

    #[test]
    fn zeros_are_found_to_the_last_byte() {
        let mut bytes = vec![0; 4096 + 37];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 63, 64, 4095, 4096, 4132] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }

    fn runs(marks: &[usize], length: usize, start: u64) -> Vec<Range<u64>> {
        let mut bytes = vec![0; length];
        for mark in marks {
            bytes[*mark] = 1;
        }
        let mut runs = Vec::new();
        data_runs(&bytes, start, &mut runs);
        runs
    }

    #[test]
    fn runs_are_whole_pages_and_short_gaps_are_bridged() {
        assert_eq!(runs(&[], 1 << 16, 0), []);
        assert_eq!(runs(&[5000], 1 << 16, 0), [4096..8192]);
        assert_eq!(runs(&[0, 32768], 1 << 16, 0), [0..36864], "a gap of seven pages is bridged");
        assert_eq!(runs(&[0, 36864], 1 << 16, 0), [0..4096, 36864..40960], "a gap of eight pages is not");
    }

    #[test]
    fn pages_are_those_of_the_disk() {
        assert_eq!(runs(&[0], 1 << 16, 512), [512..4096]);
        assert_eq!(runs(&[3584], 1 << 16, 512), [4096..8192]);
        assert_eq!(runs(&[5119], 5120, 8192), [12288..13312]);
    }
}
