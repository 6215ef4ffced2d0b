//! What the file will be: the file itself, with its log and the planned changes laid over it in memory.
//!
//! ```text
//! read:  pages that are changed  >  copies of blocks  >  the replayed log  >  the file  >  zeros behind its end
//! ```
//!
//! Every decoder reads the draft as it would read the file, so what is decided next always builds on what was decided
//! before, and the end is judged by `check` itself before a byte is written.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::{Error, Result};
use crate::format::header::{HEADER_BYTES, Header, OFFSETS};
use crate::image::view::View;
use crate::ops::extended::{Extended, read_extended};
use crate::storage::Storage;

/// Bytes of a page of changes.
pub(super) const PAGE_BYTES: usize = 4096;
/// The same as an offset.
pub(super) const PAGE: u64 = 4096;

/// A range that gets what another range of the file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockCopy {
    /// What is copied; it is not changed by anything else.
    pub(super) from: Range<u64>,
    /// Where the copy goes, behind the end of the file as it is.
    pub(super) to: u64,
}

#[derive(Debug, Default)]
struct State {
    /// The length that the file gets.
    length: u64,
    /// The file with its log replayed.
    log: Option<View>,
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
    copies: Vec<BlockCopy>,
}

/// A file as it is planned to be. Others only read it; the planner changes it.
#[derive(Debug)]
pub(super) struct Draft {
    base: Arc<dyn Storage>,
    base_length: u64,
    state: RwLock<State>,
}

impl Draft {
    /// The file as it is.
    pub(super) fn new(base: &Arc<dyn Storage>) -> Result<Self> {
        let length = base.len().map_err(|error| Error::io("cannot tell the length of the file", error))?;
        let state = State { length, ..State::default() };
        Ok(Self { base: Arc::clone(base), base_length: length, state: RwLock::new(state) })
    }

    /// The length of the file as it is.
    pub(super) const fn base_length(&self) -> u64 {
        self.base_length
    }

    /// The file itself.
    pub(super) const fn base(&self) -> &Arc<dyn Storage> {
        &self.base
    }

    /// The length that the file gets.
    pub(super) fn length(&self) -> u64 {
        self.state().length
    }

    /// Gives the file another length.
    pub(super) fn set_length(&self, length: u64) {
        self.state_mut().length = length;
    }

    /// The file as it is, with zeros behind its end up to the planned length.
    pub(super) fn extended(&self) -> Arc<dyn Storage> {
        let length = self.length().max(self.base_length);
        Arc::new(Extended::new(&self.base, self.base_length, length))
    }

    /// Lays a replayed log over the file.
    pub(super) fn set_log(&self, view: View) {
        let mut state = self.state_mut();
        state.length = state.length.max(view.size());
        state.log = Some(view);
    }

    /// Changes bytes.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut position = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let page = position / PAGE;
            let within = usize::try_from(position % PAGE).unwrap_or_default(); // below 4096
            let (part, tail) = rest.split_at(rest.len().min(PAGE_BYTES - within));
            let mut content = Box::new([0; PAGE_BYTES]);
            self.read(content.as_mut_slice(), page * PAGE)
                .map_err(|error| Error::io(format!("cannot read the file at {:#x}", page * PAGE), error))?;
            if let Some(to) = content.get_mut(within..within + part.len()) {
                to.copy_from_slice(part);
            }
            self.state_mut().pages.insert(page, content);
            position += part.len() as u64; // what is planned lies in a file
            rest = tail;
        }
        Ok(())
    }

    /// Changes both header copies.
    pub(super) fn write_headers(&self, headers: [&Header; 2]) -> Result<()> {
        for (header, offset) in headers.into_iter().zip(OFFSETS) {
            self.write(offset, &header.encode())?;
        }
        Ok(())
    }

    /// Plans a copy of a range of the file.
    pub(super) fn copy(&self, copy: BlockCopy) {
        let mut state = self.state_mut();
        state.length = state.length.max(copy.to.saturating_add(copy.from.end - copy.from.start));
        state.copies.push(copy);
    }

    /// The copies that are planned.
    pub(super) fn copies(&self) -> Vec<BlockCopy> {
        self.state().copies.clone()
    }

    /// Every range that is changed, but for copies: sorted, joined, without the headers.
    pub(super) fn changed_ranges(&self) -> Vec<Range<u64>> {
        let state = self.state();
        let mut ranges: Vec<Range<u64>> =
            state.log.as_ref().map_or_else(Vec::new, View::changes).into_iter().map(|(range, _)| range).collect();
        ranges.extend(state.pages.keys().map(|page| page * PAGE..(page + 1) * PAGE));
        ranges.sort_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            if OFFSETS.iter().any(|offset| range.start == *offset && range.end == offset + HEADER_BYTES as u64) {
                continue;
            }
            let range = range.start..range.end.min(state.length);
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ if range.start < range.end => joined.push(range),
                _ => {}
            }
        }
        joined
    }

    /// Reads the draft; what lies behind its end reads as zero.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state();
        let end = offset.saturating_add(buf.len() as u64);
        self.read_beneath(&state, buf, offset)?;
        for copy in &state.copies {
            let to = copy.to..copy.to + (copy.from.end - copy.from.start); // planned to lie in a file
            let (start, stop) = (to.start.max(offset), to.end.min(end));
            if let Some(part) = part_of(buf, offset, &(start..stop)) {
                self.read_beneath(&state, part, copy.from.start + (start - to.start))?;
            }
        }
        for (page, content) in state.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (start, stop) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            let skip = usize::try_from(start - page * PAGE).unwrap_or(PAGE_BYTES);
            if let Some(part) = part_of(buf, offset, &(start..stop)) {
                for (to, from) in part.iter_mut().zip(content.iter().skip(skip)) {
                    *to = *from;
                }
            }
        }
        Ok(())
    }

    /// Reads the file with its log replayed.
    fn read_beneath(&self, state: &State, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match &state.log {
            Some(view) => view.read_at(buf, offset).map_err(into_io),
            None => read_extended(self.base.as_ref(), self.base_length, buf, offset),
        }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of a buffer, which begins at `offset`, that holds a range.
fn part_of<'a>(buf: &'a mut [u8], offset: u64, range: &Range<u64>) -> Option<&'a mut [u8]> {
    if range.start >= range.end {
        return None;
    }
    let start = usize::try_from(range.start.checked_sub(offset)?).ok()?;
    let end = usize::try_from(range.end.checked_sub(offset)?).ok()?;
    buf.get_mut(start..end)
}

fn into_io(error: Error) -> io::Error {
    error.io_error().map_or_else(|| io::Error::other(error.message().to_owned()), |cause| cause.kind().into())
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a plan is only read")
}

impl Storage for Draft {
    fn len(&self) -> io::Result<u64> {
        Ok(self.length())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.length()) && !buf.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(buf, offset)
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let state = self.state();
        let range = range.start..range.end.min(state.length).max(range.start);
        let mut found = match &state.log {
            Some(view) => view.next_data(range.clone()).map_err(into_io)?,
            None => self.base.next_data(range.start..range.end.min(self.base_length).max(range.start))?,
        };
        let copies = state.copies.iter().map(|copy| copy.to..copy.to + (copy.from.end - copy.from.start));
        let page = state.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)).next();
        let page = page.map(|(page, _)| page * PAGE..(page + 1) * PAGE);
        for other in copies.chain(page) {
            let other = other.start.max(range.start)..other.end.min(range.end);
            let earlier = found.as_ref().is_none_or(|found| other.start < found.start);
            if other.start < other.end && earlier {
                found = Some(other);
            }
        }
        Ok(found)
    }
}
