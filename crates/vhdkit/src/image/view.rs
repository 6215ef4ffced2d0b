//! A file as it is after its log was replayed, in memory or in place.
//!
//! The overlay holds no page contents: it remembers which sector of the ring a page comes from, so that its size is
//! bounded by the number of descriptors, not by what they change.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::bat::FileSize;
use crate::format::log::{Change, SECTOR, SECTOR_BYTES, page};
use crate::storage::Storage;
use crate::sync::{AtomicBool, AtomicU64, Ordering, PoisonError, RwLock};

/// What the log puts into a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Zero,
    /// A page, from the data sector at this offset in the file.
    Page {
        sector_offset: u64,
        leading: [u8; 8],
        trailing: [u8; 4],
    },
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    end: u64,
    source: Source,
}

/// The changes of a log, the newest winning.
#[derive(Debug, Default)]
pub(crate) struct LogOverlay {
    segments: BTreeMap<u64, Segment>,
}

impl LogOverlay {
    /// Adds a change over all earlier ones. `log_offset` is where the ring begins in the file.
    pub(crate) fn add(&mut self, change: Change, log_offset: u64) {
        let (start, end) = (change.file_offset(), change.file_offset() + change.length()); // checked by walk_changes
        if start == end {
            return;
        }
        self.cut(start..end);
        let source = match change {
            Change::Zero { .. } => Source::Zero,
            Change::Page { sector, leading, trailing, .. } => {
                Source::Page { sector_offset: log_offset + sector * SECTOR, leading, trailing }
            }
        };
        self.segments.insert(start, Segment { end, source });
    }

    /// How many ranges are changed.
    pub(crate) fn len(&self) -> usize {
        self.segments.len()
    }

    /// Takes earlier changes out of a range. Page segments are whole pages and never split: changes are 4 KiB aligned.
    fn cut(&mut self, range: Range<u64>) {
        if let Some((&start, &segment)) = self.segments.range(..range.start).next_back()
            && segment.end > range.start
        {
            self.segments.insert(start, Segment { end: range.start, ..segment });
            if segment.end > range.end {
                self.segments.insert(range.end, segment);
            }
        }
        let inside: Vec<u64> = self.segments.range(range.clone()).map(|(start, _)| *start).collect();
        for start in inside {
            if let Some(segment) = self.segments.remove(&start).filter(|segment| segment.end > range.end) {
                self.segments.insert(range.end, segment);
            }
        }
    }

    /// The changes that touch a range, in order.
    fn touching(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Source)> {
        let before = self.segments.range(..range.start).next_back().filter(|(_, segment)| segment.end > range.start);
        let inside = self.segments.range(range);
        before.into_iter().chain(inside).map(|(start, segment)| (*start..segment.end, segment.source))
    }

    /// Every changed range, in order; true for zeroed ones.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (Range<u64>, bool)> {
        self.segments.iter().map(|(start, segment)| (*start..segment.end, segment.source == Source::Zero))
    }
}

/// A file as it is after replay: storage, with the overlay where the log is dirty.
#[derive(Debug)]
pub(crate) struct View {
    storage: Arc<dyn Storage>,
    /// The length of the file itself.
    physical_size: AtomicU64,
    /// The length after replay.
    size: Arc<FileSize>,
    /// Locked for the time of a read, so that who replays in place knows when nobody reads from the ring any more.
    overlay: RwLock<Option<LogOverlay>>,
    /// False once there is no overlay; spares the lock.
    has_overlay: AtomicBool,
}

impl View {
    /// The file as it is.
    pub(crate) fn plain(storage: Arc<dyn Storage>, physical_size: u64) -> Self {
        Self {
            storage,
            physical_size: AtomicU64::new(physical_size),
            size: Arc::new(FileSize::new(physical_size)),
            overlay: RwLock::new(None),
            has_overlay: AtomicBool::new(false),
        }
    }

    /// The file with a log replayed over it, at least `size` bytes long.
    pub(crate) fn replayed(storage: Arc<dyn Storage>, physical_size: u64, size: u64, overlay: LogOverlay) -> Self {
        Self {
            storage,
            physical_size: AtomicU64::new(physical_size),
            size: Arc::new(FileSize::new(size)),
            overlay: RwLock::new(Some(overlay)),
            has_overlay: AtomicBool::new(true),
        }
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The length after replay.
    pub(crate) fn size(&self) -> u64 {
        self.size.get()
    }

    /// The same, for those who want to know it later too.
    pub(crate) fn size_cell(&self) -> &Arc<FileSize> {
        &self.size
    }

    pub(crate) fn physical_size(&self) -> u64 {
        self.physical_size.load(Ordering::Acquire)
    }

    /// Tells the view that the file has another length now.
    pub(crate) fn set_size(&self, size: u64) {
        self.physical_size.store(size, Ordering::Release);
        self.size.set(size);
    }

    /// Every range that the log changes, in order; true for zeroed ones.
    pub(crate) fn changes(&self) -> Vec<(Range<u64>, bool)> {
        self.overlay
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map_or_else(Vec::new, |overlay| overlay.ranges().collect())
    }

    /// Forgets the overlay, once everything in it stands in the file. Returns when nobody reads through it any more.
    pub(crate) fn drop_overlay(&self) {
        *self.overlay.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.has_overlay.store(false, Ordering::Release);
    }

    /// True when the bytes of a range stand in the file itself, at the same offsets.
    pub(crate) fn is_in_file(&self, range: &Range<u64>) -> bool {
        let touched = || {
            let overlay = self.overlay.read().unwrap_or_else(PoisonError::into_inner);
            overlay.as_ref().is_some_and(|overlay| overlay.touching(range.clone()).next().is_some())
        };
        range.end <= self.physical_size() && !(self.has_overlay.load(Ordering::Acquire) && touched())
    }

    /// Fills `buf`; what lies behind the end of the file reads as zero.
    #[inline]
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= self.physical_size());
        if inside && !self.has_overlay.load(Ordering::Acquire) {
            return self.storage.read_at(buf, offset).map_err(|error| read_failed(offset, buf.len(), error));
        }
        self.read_slowly(buf, offset)
    }

    /// As [`View::read_at`], but false where that would have to wait for the medium.
    #[inline]
    pub(crate) fn read_at_once(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let inside = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= self.physical_size());
        if !inside || self.has_overlay.load(Ordering::Acquire) {
            return Ok(false);
        }
        let length = buf.len();
        self.storage.read_at_once(buf, offset).map_err(|error| read_failed(offset, length, error))
    }

    fn read_slowly(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let overlay = self.overlay.read().unwrap_or_else(PoisonError::into_inner);
        let length = buf.len();
        let there = usize::try_from(self.physical_size().saturating_sub(offset)).unwrap_or(usize::MAX).min(length);
        let (data, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        if !data.is_empty() {
            self.storage.read_at(data, offset).map_err(|error| read_failed(offset, length, error))?;
        }
        let Some(overlay) = overlay.as_ref() else { return Ok(()) };
        let end = offset.saturating_add(length as u64);
        for (range, source) in overlay.touching(offset..end) {
            let start = range.start.max(offset);
            let stop = range.end.min(end);
            // All of start, stop lie inside offset..end, whose length is a usize.
            let from = usize::try_from(start - offset).unwrap_or(usize::MAX);
            let to = usize::try_from(stop - offset).unwrap_or(usize::MAX);
            let Some(part) = buf.get_mut(from..to) else { continue };
            match source {
                Source::Zero => part.fill(0),
                Source::Page { sector_offset, leading, trailing } => {
                    let mut sector = [0; SECTOR_BYTES];
                    let read = self.storage.read_at(&mut sector, sector_offset);
                    read.map_err(|error| read_failed(sector_offset, SECTOR_BYTES, error))?;
                    let page = page(&sector, leading, trailing);
                    let skip = usize::try_from(start - range.start).unwrap_or(usize::MAX);
                    for (to, byte) in part.iter_mut().zip(page.iter().skip(skip)) {
                        *to = *byte;
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads so many bytes into a new buffer.
    pub(crate) fn read_vec(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let length = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length];
        self.read_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// The first range at or after `range.start` that may hold data; what lies before it reads as zero.
    pub(crate) fn next_data(&self, range: Range<u64>) -> Result<Option<Range<u64>>> {
        let inside = range.start..range.end.min(self.physical_size()).max(range.start);
        let found = self.storage.next_data(inside);
        let found = found.map_err(|error| Error::io(format!("cannot look for data at {:#x}", range.start), error))?;
        let overlay = self.overlay.read().unwrap_or_else(PoisonError::into_inner);
        let Some(overlay) = overlay.as_ref() else { return Ok(found) };
        // A page behind what was found is not looked for: that could walk the same zeroed ranges again and again.
        let until = found.as_ref().map_or(range.end, |found| found.start).max(range.start);
        let mut pages = overlay.touching(range.start..until).filter(|(_, source)| *source != Source::Zero);
        let Some((page, _)) = pages.next() else { return Ok(found) };
        let page = page.start.max(range.start)..page.end.min(range.end);
        // Whichever comes first; the rest is found by the next call.
        Ok(Some(found.filter(|found| found.start <= page.start).unwrap_or(page)))
    }
}

fn read_failed(offset: u64, length: usize, error: std::io::Error) -> Error {
    let error = Error::io(format!("cannot read {length} bytes at {offset:#x} of the file"), error);
    match error.io_error().map(std::io::Error::kind) {
        Some(std::io::ErrorKind::UnexpectedEof) => {
            error.with_hint("the file became shorter while it was open; is something else writing it?")
        }
        _ => error.with_hint("check the medium and the system log (dmesg)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zero(offset: u64, length: u64) -> Change {
        Change::Zero { file_offset: offset, length }
    }

    fn page_at(offset: u64, sector: u64) -> Change {
        Change::Page { file_offset: offset, sector, leading: [0; 8], trailing: [0; 4] }
    }

    #[test]
    fn the_newest_change_wins_wherever_it_cuts() {
        let mut overlay = LogOverlay::default();
        overlay.add(zero(0, 40960), 0);
        overlay.add(page_at(8192, 3), 0);
        overlay.add(zero(4096, 8192), 0);
        overlay.add(page_at(16384, 5), 0);
        let ranges: Vec<_> = overlay.ranges().collect();
        assert_eq!(
            ranges,
            [(0..4096, true), (4096..12288, true), (12288..16384, true), (16384..20480, false), (20480..40960, true)]
        );
    }

    #[test]
    fn zero_over_many_pages_removes_them() {
        let mut overlay = LogOverlay::default();
        for number in 0..10 {
            overlay.add(page_at(number * 4096, number), 0);
        }
        overlay.add(zero(4096, 8 * 4096), 0);
        let ranges: Vec<_> = overlay.ranges().collect();
        assert_eq!(ranges, [(0..4096, false), (4096..36864, true), (36864..40960, false)]);
    }
}
