//! A view of another storage that keeps in memory what is written to it.
//!
//! ```text
//! position      0 ........ base_limit ........ len
//! pages           [page]        [page]   [page]         written here: they hide everything below
//! zeros             ----------                          zeroed here without being written
//! base            base  base  |                         the rest of the base
//!                             |  zero   zero            beyond the base, or cut off once
//! ```

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Storage, StorageIdentity};

/// How much is copied from the base when a byte of it is written: what a log entry changes at a time.
const PAGE_BYTES: u64 = 4096;
/// The same, for buffers.
const PAGE_LENGTH: usize = 4096;
/// No file can be longer, on any system that this library runs on.
const LENGTH_MAX: u64 = i64::MAX.unsigned_abs();

/// A view of another storage that keeps in memory what is written to it. The base is never written.
///
/// The base must not change while it is viewed. Memory is used for what is written, in pages of 4 KiB, and for each
/// separate range that is zeroed, but not for its bytes.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::storage::{MemoryStorage, OverlayStorage, Storage};
///
/// let base = Arc::new(MemoryStorage::from_bytes(b"as it was".to_vec()));
/// let view = OverlayStorage::new(base.clone())?;
/// view.write_at(b"is", 3)?;
/// let mut text = [0; 9];
/// view.read_at(&mut text, 0)?;
/// assert_eq!(&text, b"as is was");
/// assert_eq!(base.to_vec(), b"as it was");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct OverlayStorage {
    base: Arc<dyn Storage>,
    state: RwLock<State>,
}

struct State {
    len: u64,
    /// From here on the base is not looked at: its length, or the least length that the view was cut to. Never more
    /// than `len`.
    base_limit: u64,
    /// Pages written here. What they hold past the end is zero, so that growing needs nothing.
    pages: BTreeMap<u64, Box<[u8]>>,
    /// Start to end of ranges that hide the base: neither empty nor touching each other, all below `base_limit` when
    /// they were made.
    zeros: BTreeMap<u64, u64>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("len", &self.len)
            .field("base_limit", &self.base_limit)
            .field("pages", &self.pages.len())
            .field("zeros", &self.zeros.len())
            .finish()
    }
}

/// Where the bytes of a piece of a range come from.
enum Piece<'a> {
    /// From a page, from this position in it on.
    Page(&'a [u8]),
    /// From the base.
    Base,
    /// They are zero.
    Zero,
}

impl OverlayStorage {
    /// A view of `base` as it is now.
    ///
    /// # Errors
    /// The operating system's, when the length of the base cannot be told.
    pub fn new(base: Arc<dyn Storage>) -> io::Result<Self> {
        let len = base.len()?;
        let state = State { len, base_limit: len, pages: BTreeMap::new(), zeros: BTreeMap::new() };
        Ok(Self { base, state: RwLock::new(state) })
    }

    /// What the view is of.
    #[must_use]
    pub fn base(&self) -> &Arc<dyn Storage> {
        &self.base
    }

    /// Whether every byte of the range still is the base's, so that it can be read there. What lies past the end of
    /// the base is not the base's.
    #[must_use]
    pub fn is_base(&self, range: Range<u64>) -> bool {
        let state = self.read_state();
        let mut position = range.start;
        while position < range.end {
            match state.piece(position..range.end) {
                (Piece::Base, end) => position = end,
                _ => return false,
            }
        }
        true
    }

    /// About how much memory the view holds.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let state = self.read_state();
        let pages = (state.pages.len() as u64).saturating_mul(PAGE_BYTES + 32);
        pages.saturating_add((state.zeros.len() as u64).saturating_mul(32))
    }

    // A panic while the lock is held leaves at worst a write half done, as a file would be left.
    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `buf` from a range that lies inside.
    fn copy_out(&self, state: &State, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut position) = (buf, offset);
        while !rest.is_empty() {
            let (piece, end) = state.piece(position..position.saturating_add(rest.len() as u64));
            let length = usize::try_from(end - position).unwrap_or(usize::MAX);
            let Some((target, after)) = rest.split_at_mut_checked(length) else { break };
            match piece {
                Piece::Page(bytes) => {
                    if let Some(bytes) = bytes.get(..length) {
                        target.copy_from_slice(bytes);
                    }
                }
                Piece::Base => self.base.read_at(target, position)?,
                Piece::Zero => target.fill(0),
            }
            rest = after;
            position = end;
        }
        Ok(())
    }

    /// Makes sure that a page is in memory.
    fn load(&self, state: &mut State, index: u64) -> io::Result<()> {
        if !state.pages.contains_key(&index) {
            let mut bytes = vec![0; PAGE_LENGTH].into_boxed_slice();
            let start = index * PAGE_BYTES; // a position of a byte below LENGTH_MAX, rounded down
            let inside = usize::try_from(state.len.saturating_sub(start)).unwrap_or(usize::MAX).min(PAGE_LENGTH);
            if let Some(inside) = bytes.get_mut(..inside) {
                self.copy_out(state, inside, start)?;
            }
            state.pages.insert(index, bytes);
        }
        Ok(())
    }
}

/// The part of a page's bytes that a range covers.
fn inside(index: u64, range: &Range<u64>) -> Range<usize> {
    let start = index * PAGE_BYTES; // the page lies below LENGTH_MAX
    let clip =
        |position: u64| usize::try_from(position.clamp(start, start + PAGE_BYTES) - start).unwrap_or(PAGE_LENGTH);
    clip(range.start)..clip(range.end)
}

/// The pages that a range touches.
fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

impl State {
    /// Where the bytes at the start of a range, which is not empty, come from, and how far that goes at most.
    fn piece(&self, range: Range<u64>) -> (Piece<'_>, u64) {
        let index = range.start / PAGE_BYTES;
        if let Some(bytes) = self.pages.get(&index) {
            let end = range.end.min((index + 1) * PAGE_BYTES);
            return (Piece::Page(bytes.get(inside(index, &range)).unwrap_or_default()), end);
        }
        let next_page = self.pages.range(index..pages_of(&range).end).next();
        let end = next_page.map_or(range.end, |(&page, _)| page * PAGE_BYTES);
        if range.start >= self.base_limit {
            return (Piece::Zero, end);
        }
        let end = end.min(self.base_limit);
        if let Some((_, &zeros_end)) = self.zeros.range(..=range.start).next_back()
            && zeros_end > range.start
        {
            return (Piece::Zero, end.min(zeros_end));
        }
        let next_zeros = self.zeros.range(range.start..end).next();
        (Piece::Base, next_zeros.map_or(end, |(&start, _)| start))
    }

    /// Hides a range of the base.
    fn hide(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end.min(self.base_limit));
        if start >= end {
            return;
        }
        // Everything that begins at or before the end and reaches the start is one with the new range.
        while let Some((&other_start, &other_end)) = self.zeros.range(..=end).next_back()
            && other_end >= start
        {
            self.zeros.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.zeros.insert(start, end);
    }

    /// Makes a range, which lies inside, read as zero.
    fn zero(&mut self, range: Range<u64>) {
        let indices: Vec<u64> = self.pages.range(pages_of(&range)).map(|(&index, _)| index).collect();
        for index in indices {
            let part = inside(index, &range);
            if part.len() == PAGE_LENGTH {
                self.pages.remove(&index);
            } else if let Some(target) = self.pages.get_mut(&index).and_then(|bytes| bytes.get_mut(part)) {
                target.fill(0);
            }
        }
        self.hide(range);
    }
}

/// Refuses positions that no file can have.
fn check_position(end: Option<u64>) -> io::Result<u64> {
    end.filter(|&end| end <= LENGTH_MAX).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
}

impl Storage for OverlayStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.read_state().len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let state = self.read_state();
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= state.len => self.copy_out(&state, buf, offset),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let end = check_position(offset.checked_add(buf.len() as u64))?;
        let range = offset..end;
        let mut state = self.write_state();
        let mut rest = buf;
        for index in pages_of(&range) {
            let part = inside(index, &range);
            let Some((piece, after)) = rest.split_at_checked(part.len()) else { break };
            if part.len() == PAGE_LENGTH {
                state.pages.insert(index, piece.into());
            } else {
                self.load(&mut state, index)?;
                if let Some(target) = state.pages.get_mut(&index).and_then(|bytes| bytes.get_mut(part)) {
                    target.copy_from_slice(piece);
                }
            }
            state.len = state.len.max(index * PAGE_BYTES + (PAGE_BYTES).min(end - index * PAGE_BYTES));
            rest = after;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        check_position(Some(len))?;
        let mut state = self.write_state();
        if len < state.len {
            drop(state.pages.split_off(&len.div_ceil(PAGE_BYTES)));
            let cut = len..len.next_multiple_of(PAGE_BYTES);
            let last = len / PAGE_BYTES;
            if let Some(tail) = state.pages.get_mut(&last).and_then(|bytes| bytes.get_mut(inside(last, &cut))) {
                tail.fill(0);
            }
            state.base_limit = state.base_limit.min(len);
        }
        state.len = len;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let end = check_position(Some(range.end))?;
        let mut state = self.write_state();
        state.len = state.len.max(end);
        state.zero(range);
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        let mut state = self.write_state();
        let clipped = range.start..range.end.min(state.len);
        if !clipped.is_empty() {
            state.zero(clipped);
        }
        Ok(true)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        if !range.is_empty() {
            let end = check_position(Some(range.end))?;
            let mut state = self.write_state();
            state.len = state.len.max(end);
        }
        Ok(true)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let state = self.read_state();
        let end = range.end.min(state.len);
        let mut position = range.start;
        while position < end {
            let (piece, piece_end) = state.piece(position..end);
            match piece {
                Piece::Page(_) => return Ok(Some(position..piece_end)),
                Piece::Base => {
                    if let Some(data) = self.base.next_data(position..piece_end)? {
                        return Ok(Some(data));
                    }
                }
                Piece::Zero => {}
            }
            position = piece_end;
        }
        Ok(None)
    }

    fn identity(&self) -> Option<StorageIdentity> {
        self.base.identity() // for finding cycles and targets that are sources, the view is what it is of
    }
}
