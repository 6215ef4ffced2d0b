//! A sparse file in memory.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Storage, StorageIdentity};

/// How much memory holds together.
const PAGE_BYTES: u64 = 64 * 1024;
/// The same, for buffers.
const PAGE_LENGTH: usize = 64 * 1024;
/// No file can be longer, on any system that this library runs on.
const LENGTH_MAX: u64 = i64::MAX.unsigned_abs();
/// What space holds that was never written, in storage that does not promise zeros.
const STALE: u8 = 0xa5;

/// The identity of the next storage in memory.
static NEXT_IDENTITY: AtomicU64 = AtomicU64::new(0);

/// A sparse file in memory.
///
/// It is as fast as a map of pages behind one lock can be, which is enough for tests and for small images.
///
/// ```
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// let storage = MemoryStorage::with_len(1 << 40);
/// storage.write_at(b"here", 1 << 30)?;
/// assert_eq!(storage.next_data(0..1 << 40)?, Some((1 << 30)..(1 << 30) + 65536));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct MemoryStorage {
    state: RwLock<State>,
    identity: StorageIdentity,
}

/// What a page holds that was touched. `None` is zeros throughout: only in storage where untouched pages are not zero,
/// and only for pages wholly inside. Bytes past the end of the storage hold the fill, so that growing needs nothing.
type Page = Option<Box<[u8]>>;

struct State {
    len: u64,
    /// What pages hold that are not in the map: 0 or [`STALE`].
    fill: u8,
    pages: BTreeMap<u64, Page>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("len", &self.len).field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStorage {
    /// Storage without any bytes.
    #[must_use]
    pub fn new() -> Self {
        Self::with_len(0)
    }

    /// Storage of zeros, all of it a hole.
    #[must_use]
    pub fn with_len(len: u64) -> Self {
        let inode = NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed);
        Self {
            state: RwLock::new(State { len: len.min(LENGTH_MAX), fill: 0, pages: BTreeMap::new() }),
            identity: StorageIdentity { device: u64::MAX, inode }, // no file system has this device number
        }
    }

    /// Storage that holds `bytes`; pages that hold only zeros become holes.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        let storage = Self::with_len(bytes.len() as u64);
        {
            let mut state = storage.write_state();
            for (index, piece) in (0_u64..).zip(bytes.chunks(PAGE_LENGTH)) {
                if piece.iter().any(|&byte| byte != 0) {
                    state.copy_in(index * PAGE_BYTES, piece); // below the length of a buffer in memory
                }
            }
        }
        storage
    }

    /// The same storage as a stand-in for a raw device: space that growth adds, from here on, holds a pattern instead
    /// of zeros, holes cannot be made, and [`Storage::next_data`] cannot tell any.
    #[must_use]
    pub fn without_zero_growth(self) -> Self {
        {
            let mut state = self.write_state();
            let len = state.len;
            for index in 0..len.div_ceil(PAGE_BYTES) {
                state.pages.entry(index).or_insert(None);
            }
            state.fill = STALE;
            state.fill_tail();
        }
        self
    }

    /// All bytes, holes as zeros.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let state = self.read_state();
        let mut bytes = vec![0; usize::try_from(state.len).unwrap_or(usize::MAX)];
        state.copy_out(&mut bytes, 0);
        bytes
    }

    // A panic while the lock is held leaves at worst a write half done, as a file would be left.
    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One page's part of a range: the page, and which of its bytes.
struct Part {
    index: u64,
    bytes: Range<usize>,
}

/// Splits a range at the ends of pages.
fn parts(range: Range<u64>) -> impl Iterator<Item = Part> {
    let mut position = range.start;
    std::iter::from_fn(move || {
        if position >= range.end {
            return None;
        }
        let index = position / PAGE_BYTES;
        let start = position % PAGE_BYTES;
        let length = (PAGE_BYTES - start).min(range.end - position);
        position += length; // at most range.end
        let inside = |offset: u64| usize::try_from(offset).unwrap_or(PAGE_LENGTH); // at most PAGE_BYTES
        Some(Part { index, bytes: inside(start)..inside(start + length) })
    })
}

impl State {
    /// The bytes of a page for writing.
    fn page_mut(&mut self, index: u64) -> &mut [u8] {
        let page = |byte| vec![byte; PAGE_LENGTH].into_boxed_slice();
        self.pages.entry(index).or_insert_with(|| Some(page(self.fill))).get_or_insert_with(|| page(0))
    }

    /// Copies a range, which lies inside, into `buf`.
    fn copy_out(&self, buf: &mut [u8], offset: u64) {
        let mut rest = buf;
        for part in parts(offset..offset.saturating_add(rest.len() as u64)) {
            let Some((piece, after)) = rest.split_at_mut_checked(part.bytes.len()) else { break };
            match self.pages.get(&part.index) {
                Some(Some(bytes)) => {
                    if let Some(source) = bytes.get(part.bytes) {
                        piece.copy_from_slice(source);
                    }
                }
                Some(None) => piece.fill(0),
                None => piece.fill(self.fill),
            }
            rest = after;
        }
    }

    /// Copies `buf` to `offset`; the caller sets the length.
    fn copy_in(&mut self, offset: u64, buf: &[u8]) {
        let mut rest = buf;
        for part in parts(offset..offset.saturating_add(buf.len() as u64)) {
            let Some((piece, after)) = rest.split_at_checked(part.bytes.len()) else { break };
            if let Some(target) = self.page_mut(part.index).get_mut(part.bytes) {
                target.copy_from_slice(piece);
            }
            rest = after;
        }
    }

    /// Makes a range, which lies inside, read as zero, and gives back pages that are zero throughout.
    fn zero(&mut self, range: Range<u64>) {
        for part in parts(range) {
            if part.bytes.len() == PAGE_LENGTH {
                if self.fill == 0 {
                    self.pages.remove(&part.index);
                } else {
                    self.pages.insert(part.index, None);
                }
            } else if (self.fill != 0 || self.pages.contains_key(&part.index))
                && let Some(target) = self.page_mut(part.index).get_mut(part.bytes)
            {
                target.fill(0);
            }
        }
    }

    /// Fills what lies past the end in the last page.
    fn fill_tail(&mut self) {
        let index = self.len / PAGE_BYTES;
        let inside = usize::try_from(self.len % PAGE_BYTES).unwrap_or(PAGE_LENGTH);
        if self.pages.contains_key(&index) {
            let fill = self.fill;
            if let Some(tail) = self.page_mut(index).get_mut(inside..) {
                tail.fill(fill);
            }
        }
    }
}

/// The range that a buffer covers, when a file can reach there.
fn buffer_range(offset: u64, length: usize) -> io::Result<Range<u64>> {
    let end = offset.checked_add(length as u64).filter(|&end| end <= LENGTH_MAX);
    Ok(offset..end.ok_or(io::ErrorKind::FileTooLarge)?)
}

impl Storage for MemoryStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.read_state().len)
    }

    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_at(buf, offset).map(|()| true)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let state = self.read_state();
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= state.len => state.copy_out(buf, offset),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let range = buffer_range(offset, buf.len())?;
        let mut state = self.write_state();
        state.copy_in(offset, buf);
        state.len = state.len.max(range.end);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > LENGTH_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut state = self.write_state();
        let shrinks = len < state.len;
        state.len = len;
        if shrinks {
            drop(state.pages.split_off(&len.div_ceil(PAGE_BYTES)));
            state.fill_tail();
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn growth_reads_zero(&self) -> bool {
        self.read_state().fill == 0
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if range.end > LENGTH_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut state = self.write_state();
        state.len = state.len.max(range.end);
        state.zero(range);
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        let mut state = self.write_state();
        if state.fill != 0 {
            return Ok(range.is_empty());
        }
        let end = range.end.min(state.len);
        state.zero(range.start..end);
        Ok(true)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        if range.end > LENGTH_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut state = self.write_state();
        state.len = state.len.max(range.end);
        Ok(true)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let state = self.read_state();
        let range = range.start..range.end.min(state.len);
        if range.is_empty() || state.fill != 0 {
            return Ok((!range.is_empty()).then_some(range));
        }
        let mut data: Option<Range<u64>> = None;
        for &index in
            state.pages.range(range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)).map(|(index, _)| index)
        {
            let page = index * PAGE_BYTES..index * PAGE_BYTES + PAGE_BYTES; // pages begin inside LENGTH_MAX
            match &mut data {
                None => data = Some(page),
                Some(data) if data.end == page.start => data.end = page.end,
                Some(_) => break,
            }
        }
        Ok(data.map(|data| data.start.max(range.start)..data.end.min(range.end)))
    }

    fn identity(&self) -> Option<StorageIdentity> {
        Some(self.identity)
    }
}
