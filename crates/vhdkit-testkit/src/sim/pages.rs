//! A sparse file made of pages that are shared until they are written, so that a copy costs nothing.
//!
//! ```text
//! base   Arc of page number -> Arc of page      shared by every copy
//! delta  page number -> page, or "a hole"       what this copy has changed since
//! ```

use std::collections::{BTreeMap, btree_map};
use std::io;
use std::iter::Peekable;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::rng::mix;
use crate::sparse::SparseFile;

/// The bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// The same, for buffers.
pub(super) const PAGE_LENGTH: usize = 4096;
/// What a device writes whole or not at all.
pub const SECTOR_BYTES: u64 = 512;
/// The same, for buffers.
pub(super) const SECTOR_LENGTH: usize = 512;
/// Changed pages up to which a copy keeps them beside the shared base.
const DELTA_PAGES_MAX: usize = 64;

/// A page of zeros.
static ZEROS: [u8; PAGE_LENGTH] = [0; PAGE_LENGTH];

/// One page, which knows the hash of its contents once somebody asked.
pub struct Page {
    bytes: [u8; PAGE_LENGTH],
    /// 0 before it was computed.
    hash: AtomicU64,
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Page({:#x})", self.hash())
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Self::new(self.bytes)
    }
}

impl Page {
    /// A page with these contents.
    #[must_use]
    pub fn new(bytes: [u8; PAGE_LENGTH]) -> Self {
        Self { bytes, hash: AtomicU64::new(0) }
    }

    /// A page of zeros.
    #[must_use]
    pub fn zero() -> Self {
        Self::new(ZEROS)
    }

    /// The contents.
    #[must_use]
    pub fn bytes(&self) -> &[u8; PAGE_LENGTH] {
        &self.bytes
    }

    /// The contents, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8; PAGE_LENGTH] {
        *self.hash.get_mut() = 0;
        &mut self.bytes
    }

    /// A hash of the contents; 1 for zeros, never 0.
    fn hash(&self) -> u64 {
        let known = self.hash.load(Ordering::Relaxed);
        if known != 0 {
            return known;
        }
        let hash = if self.bytes == ZEROS { 1 } else { hash_bytes(&self.bytes).max(2) };
        self.hash.store(hash, Ordering::Relaxed);
        hash
    }
}

/// Hashes bytes whose number is a multiple of 32; four lanes, because one would wait for each multiplication.
pub(super) fn hash_bytes(bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut lanes = [1_u64, 2, 3, 4];
    for piece in bytes.as_chunks::<32>().0 {
        for (lane, word) in lanes.iter_mut().zip(piece.as_chunks::<8>().0) {
            *lane = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR).rotate_left(31);
        }
    }
    lanes.iter().fold(bytes.len() as u64, |hash, lane| mix(hash ^ lane))
}

/// What a page adds to the hash of a file: nothing when it is zero, since a hole reads the same.
fn placed_hash(index: u64, page: Option<&Arc<Page>>) -> u64 {
    match page.map(|page| page.hash()) {
        None | Some(1) => 0,
        Some(hash) => mix(hash ^ mix(index.wrapping_add(0x5111_7A6E))),
    }
}

/// The pages that copies share.
#[derive(Default)]
struct Base {
    pages: BTreeMap<u64, Arc<Page>>,
    hash: OnceLock<u64>,
}

/// A sparse file that is cheap to copy. Bytes past its end are zero in every page.
#[derive(Clone, Default)]
pub struct PageMap {
    base: Arc<Base>,
    delta: BTreeMap<u64, Option<Arc<Page>>>,
    len: u64,
}

impl std::fmt::Debug for PageMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageMap {{ len: {:#x}, base: {}, delta: {} }}", self.len, self.base.pages.len(), self.delta.len())
    }
}

impl From<&SparseFile> for PageMap {
    fn from(file: &SparseFile) -> Self {
        let mut map = Self { len: file.len(), ..Self::default() };
        for (offset, bytes) in file.segments() {
            map.write(offset, bytes);
        }
        map.settle();
        map
    }
}

/// The pages that a range of bytes touches.
pub(super) fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

/// The part of a page's bytes that a range covers.
pub(super) fn inside(index: u64, range: &Range<u64>) -> Range<usize> {
    let start = index * PAGE_BYTES;
    let clip = |position: u64| (position.clamp(start, start + PAGE_BYTES) - start) as usize;
    clip(range.start)..clip(range.end)
}

impl PageMap {
    /// An empty file.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the length is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A page, or nothing for a hole.
    #[must_use]
    pub fn page(&self, index: u64) -> Option<&Arc<Page>> {
        match self.delta.get(&index) {
            Some(changed) => changed.as_ref(),
            None => self.base.pages.get(&index),
        }
    }

    /// A page to be changed; a hole becomes a page of zeros.
    fn page_mut(&mut self, index: u64) -> &mut [u8; PAGE_LENGTH] {
        let base = &self.base.pages;
        let slot = self.delta.entry(index).or_insert_with(|| base.get(&index).cloned());
        Arc::make_mut(slot.get_or_insert_with(|| Arc::new(Page::zero()))).bytes_mut()
    }

    /// Puts a page into its place.
    pub(super) fn set_page(&mut self, index: u64, page: Arc<Page>) {
        self.delta.insert(index, Some(page));
    }

    /// Changes a part of a page.
    pub(super) fn patch(&mut self, index: u64, part: Range<usize>, bytes: &[u8]) {
        self.page_mut(index)[part].copy_from_slice(bytes);
    }

    /// The pages in a range of page numbers that are not holes.
    pub(super) fn pages_in(&self, range: Range<u64>) -> Pages<'_> {
        let range = range.start..range.end.max(range.start);
        Pages { base: self.base.pages.range(range.clone()).peekable(), delta: self.delta.range(range).peekable() }
    }

    /// Reads; what lies past the end is zero.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let range = offset..offset + buf.len() as u64;
        let pages = pages_of(&range);
        if pages.end - pages.start == 1 {
            match self.page(pages.start) {
                Some(page) => buf.copy_from_slice(&page.bytes[inside(pages.start, &range)]),
                None => buf.fill(0),
            }
            return;
        }
        let mut done = 0;
        for (index, page) in self.pages_in(pages) {
            let part = inside(index, &range);
            let at = ((index * PAGE_BYTES).max(offset) - offset) as usize;
            buf[done..at].fill(0);
            done = at + part.len();
            buf[at..done].copy_from_slice(&page.bytes[part]);
        }
        buf[done..].fill(0);
    }

    /// Writes, and grows where that is needed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let range = offset..offset + bytes.len() as u64;
        let mut rest = bytes;
        for index in pages_of(&range) {
            let part = inside(index, &range);
            let (piece, after) = rest.split_at(part.len());
            match <&[u8; PAGE_LENGTH]>::try_from(piece) {
                Ok(whole) => self.set_page(index, Arc::new(Page::new(*whole))),
                Err(_) => self.patch(index, part, piece),
            }
            rest = after;
        }
        if !bytes.is_empty() {
            self.len = self.len.max(range.end);
        }
    }

    /// Makes a range zero without growing; whole pages become holes.
    pub fn zero(&mut self, range: Range<u64>) {
        let present: Vec<u64> = self.pages_in(pages_of(&range)).map(|(index, _)| index).collect();
        for index in present {
            self.zero_part(index, inside(index, &range));
        }
    }

    /// Makes a part of a page zero that is not a hole.
    pub(super) fn zero_part(&mut self, index: u64, part: Range<usize>) {
        if part.len() < PAGE_LENGTH {
            self.page_mut(index)[part].fill(0);
        } else if self.base.pages.contains_key(&index) {
            self.delta.insert(index, None);
        } else {
            self.delta.remove(&index);
        }
    }

    /// Sets the length; what is cut off is gone.
    pub fn set_len(&mut self, len: u64) {
        let first_gone = len.div_ceil(PAGE_BYTES);
        drop(self.delta.split_off(&first_gone));
        for (&index, _) in self.base.pages.range(first_gone..) {
            self.delta.insert(index, None);
        }
        let last = len / PAGE_BYTES;
        if !len.is_multiple_of(PAGE_BYTES) && self.page(last).is_some() {
            let tail = (len % PAGE_BYTES) as usize..PAGE_LENGTH;
            if self.page(last).is_some_and(|page| page.bytes[tail.clone()] != ZEROS[tail.clone()]) {
                self.page_mut(last)[tail].fill(0);
            }
        }
        self.len = len;
    }

    /// Sets the length unless it is that already.
    pub(super) fn set_len_if_changed(&mut self, len: u64) {
        if len != self.len {
            self.set_len(len);
        }
    }

    /// Moves what has changed into the shared base when it has become much, so that copies stay cheap.
    pub(super) fn settle(&mut self) {
        if self.delta.len() <= DELTA_PAGES_MAX {
            return;
        }
        let mut pages = match Arc::get_mut(&mut self.base) {
            Some(base) => std::mem::take(&mut base.pages),
            None => self.base.pages.clone(),
        };
        for (index, page) in std::mem::take(&mut self.delta) {
            match page {
                Some(page) => pages.insert(index, page),
                None => pages.remove(&index),
            };
        }
        self.base = Arc::new(Base { pages, hash: OnceLock::new() });
    }

    /// A hash of length and contents: equal for files that read the same, whatever is a hole in them.
    #[must_use]
    pub fn content_hash(&self) -> u64 {
        let base = &*self.base;
        let start = base
            .hash
            .get_or_init(|| base.pages.iter().fold(0, |hash, (index, page)| hash ^ placed_hash(*index, Some(page))));
        let changed = self.delta.iter().fold(*start, |hash, (index, page)| {
            hash ^ placed_hash(*index, base.pages.get(index)) ^ placed_hash(*index, page.as_ref())
        });
        mix(changed ^ mix(self.len))
    }

    /// The first range of data at or after the start of a range, clipped to it.
    #[must_use]
    pub fn next_data(&self, range: Range<u64>) -> Option<Range<u64>> {
        let range = range.start..range.end.min(self.len);
        if range.start >= range.end {
            return None;
        }
        let mut data: Option<Range<u64>> = None;
        for (index, _) in self.pages_in(pages_of(&range)) {
            let page = index * PAGE_BYTES..(index + 1) * PAGE_BYTES;
            match &mut data {
                None => data = Some(page),
                Some(data) if data.end == page.start => data.end = page.end,
                Some(_) => break,
            }
        }
        data.map(|data| data.start.max(range.start)..data.end.min(range.end))
    }

    /// Where [`PageMap::next_data`] would begin.
    #[must_use]
    pub fn data_start(&self, range: Range<u64>) -> Option<u64> {
        let range = range.start..range.end.min(self.len).max(range.start);
        let first = self.pages_in(pages_of(&range)).next().map(|(index, _)| index * PAGE_BYTES);
        first.map(|start| start.max(range.start)).filter(|_| !range.is_empty())
    }

    /// How many pages hold data.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.pages_in(0..u64::MAX).count()
    }

    /// The same file for the rest of the testkit.
    #[must_use]
    pub fn to_sparse(&self) -> SparseFile {
        let mut file = SparseFile::new();
        file.set_len(self.len);
        for (index, page) in self.pages_in(0..u64::MAX) {
            let start = index * PAGE_BYTES;
            file.write(start, &page.bytes[..(self.len - start).min(PAGE_BYTES) as usize]);
        }
        file
    }

    /// Writes a real file, for people and foreign tools to look at.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_to_path(&self, path: &Path) -> io::Result<()> {
        self.to_sparse().write_to_path(path)
    }
}

/// Pages in order; those of the delta hide those of the base.
pub(super) struct Pages<'a> {
    base: Peekable<btree_map::Range<'a, u64, Arc<Page>>>,
    delta: Peekable<btree_map::Range<'a, u64, Option<Arc<Page>>>>,
}

impl<'a> Iterator for Pages<'a> {
    type Item = (u64, &'a Arc<Page>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let base = self.base.peek().map(|(index, _)| **index);
            let delta = self.delta.peek().map(|(index, _)| **index);
            match (base, delta) {
                (None, None) => return None,
                (Some(below), over) if over.is_none_or(|over| below < over) => {
                    return self.base.next().map(|(index, page)| (*index, page));
                }
                (below, over) => {
                    if below == over {
                        self.base.next();
                    }
                    if let Some((index, Some(page))) = self.delta.next() {
                        return Some((*index, page));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn copies_are_independent_and_agree_with_a_plain_array() {
        let mut rng = Rng::new(1);
        let mut maps = vec![(PageMap::new(), Vec::<u8>::new())];
        for step in 0..4000 {
            let number = rng.below(maps.len() as u64) as usize;
            let (map, model) = &mut maps[number];
            let start = rng.below(600_000);
            let end = start + rng.below(20_000);
            match rng.below(5) {
                0 | 1 => {
                    let bytes = rng.bytes((end - start) as usize);
                    map.write(start, &bytes);
                    if !bytes.is_empty() {
                        model.resize(model.len().max(end as usize), 0);
                        model[start as usize..end as usize].copy_from_slice(&bytes);
                    }
                }
                2 => {
                    map.zero(start..end);
                    let length = model.len();
                    model[length.min(start as usize)..length.min(end as usize)].fill(0);
                }
                3 if rng.chance(20) => {
                    map.set_len(end);
                    model.resize(end as usize, 0);
                }
                _ => map.settle(),
            }
            let mut bytes = vec![9; model.len()];
            map.read(0, &mut bytes);
            assert!(bytes == *model && map.len() == model.len() as u64, "step {step}");
            if step % 50 == 0 {
                let other = PageMap::from(&SparseFile::from_bytes(model));
                assert_eq!(map.content_hash(), other.content_hash(), "step {step}: equal bytes, equal hash");
                let copy = maps[number].clone();
                maps.push(copy);
            }
        }
    }

    #[test]
    fn the_hash_sees_one_bit_the_place_and_the_length() {
        let mut map = PageMap::new();
        map.write(10_000, &[1; 20_000]);
        let first = map.content_hash();
        let mut other = map.clone();
        other.write(15_000, &[3]);
        assert_ne!(other.content_hash(), first);
        other.write(15_000, &[1]);
        assert_eq!(other.content_hash(), first);
        other.set_len(40_000);
        assert_ne!(other.content_hash(), first);
        other.write(35_000, &[0; 10]);
        other.set_len(30_000);
        assert_eq!(other.content_hash(), first);
        let (mut here, mut there) = (PageMap::new(), PageMap::new());
        here.write(0, &[7; 4096]);
        there.write(4096, &[7; 4096]);
        here.set_len(8192);
        assert_ne!(here.content_hash(), there.content_hash(), "the same page elsewhere");
    }
}
