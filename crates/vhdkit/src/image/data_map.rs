//! Where a file holds data, asked of the file system for a window at a time.
//!
//! Blocks move from the end of a file, each a little below the one before. A file system that has no index of its holes (tmpfs)
//! walks from the place it is asked about to the next hole, page by page: asked block by block, it would walk over everything
//! that still lies behind, again for every block.

use std::cell::RefCell;
use std::io;
use std::ops::Range;

use crate::storage::Storage;

/// Bytes below and with a wanted range that are looked up together.
const WINDOW_BYTES: u64 = 64 << 20;
/// Ranges that are kept. A file in more pieces is asked each time.
const PIECES_MAX: usize = 4096;

/// What is known. It holds as long as everything that is written is [said](DataMap::wrote).
#[derive(Debug, Default)]
pub(crate) struct DataMap(RefCell<Window>);

#[derive(Debug, Default)]
struct Window {
    range: Range<u64>,
    data: Vec<Range<u64>>,
    in_pieces: bool,
}

impl DataMap {
    /// The first data in a range, as [`Storage::next_data`] says it.
    pub(crate) fn next_data(&self, storage: &dyn Storage, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut window = self.0.borrow_mut();
        let is_known = window.range.start <= range.start && range.end <= window.range.end;
        if range.is_empty() {
            return Ok(None);
        }
        if !is_known && !window.in_pieces {
            window.look_up(storage, &range)?;
        }
        if window.in_pieces {
            return storage.next_data(range);
        }
        let at = window.data.partition_point(|piece| piece.end <= range.start);
        let found = window.data.get(at).map(|piece| piece.start.max(range.start)..piece.end.min(range.end));
        Ok(found.filter(|piece| !piece.is_empty()))
    }

    /// A range was written, or is about to be: it holds data from now on.
    pub(crate) fn wrote(&self, range: &Range<u64>) {
        let mut window = self.0.borrow_mut();
        let inside = range.start.max(window.range.start)..range.end.min(window.range.end);
        if inside.is_empty() {
            return;
        }
        let first = window.data.partition_point(|piece| piece.end < inside.start);
        let end = window.data.partition_point(|piece| piece.start <= inside.end).max(first);
        let joined = window.data.get(first..end).unwrap_or_default();
        let start = joined.first().map_or(inside.start, |piece| piece.start.min(inside.start));
        let until = joined.last().map_or(inside.end, |piece| piece.end.max(inside.end));
        window.data.splice(first..end, std::iter::once(start..until));
    }
}

impl Window {
    fn look_up(&mut self, storage: &dyn Storage, range: &Range<u64>) -> io::Result<()> {
        self.data.clear();
        self.range = 0..0;
        let start = range.end.saturating_sub(WINDOW_BYTES).min(range.start);
        let mut position = start;
        while let Some(piece) = storage.next_data(position..range.end)? {
            position = piece.end;
            if self.data.len() == PIECES_MAX {
                self.in_pieces = true;
                self.data.clear();
                return Ok(());
            }
            self.data.push(piece);
        }
        self.range = start..range.end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    /// Data in every other page, as a file system would say it.
    #[derive(Debug)]
    struct Pages(u64);

    impl Storage for Pages {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0)
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn set_len(&self, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
        fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
            let start = if range.start % 8192 < 4096 { range.start } else { range.start.next_multiple_of(8192) };
            let found = start..(start - start % 8192 + 4096).min(range.end).min(self.0);
            Ok((!found.is_empty()).then_some(found))
        }
    }

    fn all(map: &DataMap, storage: &dyn Storage, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut found, mut position) = (Vec::new(), range.start);
        while let Some(data) = map.next_data(storage, position..range.end).expect("an answer") {
            position = data.end;
            found.push(data);
        }
        found
    }

    #[test]
    fn a_window_answers_as_the_storage_does() {
        for pages in [100, 20_000] {
            let storage = Pages(pages * 8192);
            let (map, end) = (DataMap::default(), pages * 8192);
            for start in [end - (100 << 12), end - (64 << 12) - 17, 8192, 4096 * 3 + 5, 0] {
                let range = start..(start + (90 << 12)).min(end);
                let fresh = DataMap(RefCell::new(Window { in_pieces: true, ..Window::default() }));
                assert_eq!(
                    all(&map, &storage, range.clone()),
                    all(&fresh, &storage, range.clone()),
                    "{pages} {range:?}"
                );
            }
        }
    }

    #[test]
    fn what_was_written_is_data() {
        let (page, whole) = (1 << 12, 0..1 << 10 << 12);
        for range in [3 * page..4 * page, 5 * page + 1..12 * page, 0..1, page - 1..page + 1, 90 * page..100 * page] {
            let map = DataMap::default();
            let storage = Pages(whole.end);
            let before = all(&map, &storage, whole.clone());
            map.wrote(&range);
            let after = all(&map, &storage, whole.clone());
            let is_data = |pieces: &[Range<u64>], at: u64| pieces.iter().any(|piece| piece.contains(&at));
            for at in (0..110 * page).step_by(512).chain([range.start, range.end - 1, range.end]) {
                assert_eq!(is_data(&after, at), is_data(&before, at) || range.contains(&at), "{range:?} {at}");
            }
            assert!(after.windows(2).all(|pair| pair[0].end < pair[1].start), "{after:?}");
        }
    }

    #[test]
    fn the_end_and_nothing_are_no_data() {
        let storage = MemoryStorage::new();
        storage.write_at(&[1; 8192], 0).expect("written");
        let map = DataMap::default();
        assert_eq!(map.next_data(&storage, 4096..4096).expect("an answer"), None);
        for (range, found) in [(4096..8192, true), (100..200, true), (8192..9000, false)] {
            let expected: Vec<Range<u64>> = found.then(|| range.clone()).into_iter().collect();
            assert_eq!(all(&map, &storage, range), expected);
        }
    }
}
