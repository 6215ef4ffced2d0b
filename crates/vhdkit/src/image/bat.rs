//! The BAT in memory: read page by page when first needed, looked up without a lock, changed by a writer.
//!
//! ```text
//! directory (1 pointer per 2 MiB of BAT) -> 512 page slots -> page of 512 judged entries, or "all zero"
//! ```
//!
//! A page never leaves memory and the first one in a slot stays, so no loader can replace what a writer changed. From its
//! first change on a page in memory is the truth; the file follows with a commit.

use std::collections::BTreeSet;
use std::ops::Range;

use super::view::View;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BITMAP_PRESENT, BatEntry, BatRules};
use crate::format::finding::Finding;
use crate::format::geometry::BatSlot;
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, OnceLock, Ordering, PoisonError};
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset};

/// Entries of a page.
pub(crate) const PAGE_ENTRIES: usize = 512;
/// The same as a number of entries.
const ENTRIES_PER_PAGE: u64 = PAGE_ENTRIES as u64;
/// Pages of a directory slot.
const SLOT_PAGES: usize = 512;

/// Stands for an entry that must not be used. No valid entry has reserved bits set.
const UNUSABLE: u64 = u64::MAX;

type Page = [AtomicU64; PAGE_ENTRIES];

/// Where a page goes. Nothing in it: not read yet.
#[derive(Debug, Default)]
struct PageSlot {
    page: OnceLock<Box<Page>>,
    /// True when the page was read and is zero throughout, as in a hole of the file. `page` goes first.
    is_zero: AtomicBool,
    /// True once the page stands in `changed`.
    is_changed: AtomicBool,
}

/// The BAT of one layer.
#[derive(Debug)]
pub(crate) struct BatCache {
    slots: Box<[OnceLock<Box<[PageSlot]>>]>,
    entries: u64,
    /// Pages that a writer has changed, ever: the file may be behind.
    changed: Mutex<BTreeSet<u64>>,
    has_changes: AtomicBool,
}

impl BatCache {
    pub(crate) fn new(entries: u64) -> Self {
        let pages = entries.div_ceil(ENTRIES_PER_PAGE);
        let slots = usize::try_from(pages.div_ceil(SLOT_PAGES as u64)).unwrap_or(usize::MAX); // at most 257
        Self {
            slots: (0..slots).map(|_| OnceLock::new()).collect(),
            entries,
            changed: Mutex::new(BTreeSet::new()),
            has_changes: AtomicBool::new(false),
        }
    }

    /// The entry of a payload block.
    #[inline]
    pub(crate) fn payload(&self, block: BlockIndex, rules: &BatRules, view: &View) -> Result<BatEntry> {
        self.entry(rules.geometry.payload_index(block), rules, view)
    }

    /// The entry of a chunk's sector bitmap; zero when that is not present, whatever offset its entry has.
    pub(crate) fn bitmap(&self, chunk: ChunkIndex, rules: &BatRules, view: &View) -> Result<BatEntry> {
        Ok(present_bitmap(self.entry(rules.geometry.bitmap_index(chunk), rules, view)?))
    }

    /// The entry at an index.
    #[inline]
    pub(crate) fn entry(&self, index: BatIndex, rules: &BatRules, view: &View) -> Result<BatEntry> {
        let slot = self.slot(page_of(index))?;
        let page = match slot.page.get() {
            Some(page) => page,
            None if slot.is_zero.load(Ordering::Acquire) => return Ok(BatEntry(0)),
            None => match self.load(slot, page_of(index), rules, view)? {
                Some(page) => page,
                None => return Ok(BatEntry(0)),
            },
        };
        // In one order with the counts of the gate: who entered it too late to be waited for sees the newer entry.
        let entry = cell(page, index).map_or(UNUSABLE, |cell| cell.load(Ordering::SeqCst));
        if entry == UNUSABLE {
            return Err(self.explain(index, rules, view));
        }
        Ok(BatEntry(entry))
    }

    /// The entry at an index, when its page is in memory and it can be used.
    #[inline]
    pub(crate) fn in_memory(&self, index: BatIndex) -> Option<BatEntry> {
        let slot = self.slot(page_of(index)).ok()?;
        let Some(page) = slot.page.get() else {
            // A page comes first and the mark goes last: without a page the mark is true.
            return slot.is_zero.load(Ordering::Acquire).then_some(BatEntry(0));
        };
        let entry = cell(page, index)?.load(Ordering::SeqCst);
        (entry != UNUSABLE).then_some(BatEntry(entry))
    }

    #[inline]
    fn slot(&self, page_number: u64) -> Result<&PageSlot> {
        let (slot, page) = (page_number / SLOT_PAGES as u64, page_number % SLOT_PAGES as u64);
        let outside = || Error::new(ErrorKind::OutOfRange, format!("BAT page {page_number} is outside of the table"));
        let slot = self.slots.get(usize::try_from(slot).unwrap_or(usize::MAX)).ok_or_else(outside)?;
        let pages = slot.get_or_init(|| (0..SLOT_PAGES).map(|_| PageSlot::default()).collect());
        pages.get(usize::try_from(page).unwrap_or(usize::MAX)).ok_or_else(outside)
    }

    /// Reads a page and judges every entry that the disk uses. A thread that loses the race gives its copy up.
    #[cold]
    fn load<'a>(
        &self,
        slot: &'a PageSlot,
        page_number: u64,
        rules: &BatRules,
        view: &View,
    ) -> Result<Option<&'a Page>> {
        let first = page_number * ENTRIES_PER_PAGE;
        let mut bytes = [0_u8; PAGE_ENTRIES * 8];
        let used = usize::try_from((self.entries - first).min(ENTRIES_PER_PAGE)).unwrap_or(PAGE_ENTRIES);
        if let Some(part) = bytes.get_mut(..used * 8) {
            view.read_at(part, rules.bat_offset.0 + first * 8)?; // inside the BAT region
        }
        if bytes.iter().all(|byte| *byte == 0) {
            // Should a writer have put a page here meanwhile, that one is looked at first.
            slot.is_zero.store(true, Ordering::Release);
            return Ok(slot.page.get().map(|page| &**page));
        }
        let entries = empty_page();
        let (raw, _) = bytes.as_chunks::<8>();
        for (number, (to, raw)) in (first..).zip(entries.iter().zip(raw).take(used)) {
            let entry = BatEntry(u64::from_le_bytes(*raw));
            let usable = judge(BatIndex(number), entry, rules).is_ok();
            let meaningless = usable && entry.0 == UNUSABLE; // only behind the disk
            let kept = if meaningless { 0 } else { entry.0 };
            to.store(if usable { kept } else { UNUSABLE }, Ordering::Relaxed);
        }
        Ok(Some(slot.page.get_or_init(|| entries)))
    }

    /// Reads an unusable entry again and says what is wrong with it.
    #[cold]
    fn explain(&self, index: BatIndex, rules: &BatRules, view: &View) -> Error {
        let mut raw = [0; 8];
        if let Err(error) = view.read_at(&mut raw, rules.bat_offset.0 + index.0 * 8) {
            return error;
        }
        match judge(index, BatEntry(u64::from_le_bytes(raw)), rules) {
            Err(finding) => Error::from_finding(&finding),
            Ok(_) => Error::new(
                ErrorKind::Io,
                format!("BAT entry {index} changed while the image was open; is something else writing it?"),
            ),
        }
    }

    /// Makes sure that an entry's page is in memory and can be changed without I/O from now on. Gives the entry.
    pub(crate) fn pin(&self, index: BatIndex, rules: &BatRules, view: &View) -> Result<BatEntry> {
        let entry = self.entry(index, rules, view)?;
        let slot = self.slot(page_of(index))?;
        if slot.page.get().is_none() {
            slot.page.get_or_init(empty_page);
        }
        Ok(entry)
    }

    /// Changes an entry whose page is pinned. The caller holds the writer's lock. Gives the page's number.
    pub(crate) fn set(&self, index: BatIndex, entry: BatEntry) -> Result<u64> {
        let number = page_of(index);
        let slot = self.slot(number)?;
        let Some(cell) = slot.page.get().and_then(|page| cell(page, index)) else {
            return Err(Error::new(ErrorKind::InvalidArgument, format!("BAT page {number} is not in memory")));
        };
        if !slot.is_changed.load(Ordering::Relaxed) {
            self.changed_pages().insert(number);
            self.has_changes.store(true, Ordering::Release);
            slot.is_changed.store(true, Ordering::Relaxed);
        }
        cell.store(entry.0, Ordering::SeqCst);
        Ok(number)
    }

    /// The bytes of a page in memory as they belong into the file; `None` when it is not there or not fit to be written.
    pub(crate) fn page_bytes(&self, page_number: u64) -> Option<[u8; 4096]> {
        let page = self.slot(page_number).ok()?.page.get()?;
        let mut bytes = [0; 4096];
        let (chunks, _) = bytes.as_chunks_mut::<8>();
        for (to, entry) in chunks.iter_mut().zip(page.iter()) {
            let entry = entry.load(Ordering::Acquire);
            if entry == UNUSABLE {
                return None;
            }
            *to = entry.to_le_bytes();
        }
        Some(bytes)
    }

    /// True when a writer has changed anything since the image was opened.
    pub(crate) fn has_changes(&self) -> bool {
        self.has_changes.load(Ordering::Acquire)
    }

    /// The entries of the first changed page at or behind an index: for those who read the file.
    pub(crate) fn next_changed(&self, index: u64) -> Option<Range<u64>> {
        if !self.has_changes() {
            return None;
        }
        let page = *self.changed_pages().range(index / ENTRIES_PER_PAGE..).next()?;
        Some(page * ENTRIES_PER_PAGE..(page + 1) * ENTRIES_PER_PAGE)
    }

    fn changed_pages(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner) // a set of numbers is whole at any moment
    }
}

/// The number of the page that an entry stands in.
pub(crate) const fn page_of(index: BatIndex) -> u64 {
    index.0 / ENTRIES_PER_PAGE
}

fn cell(page: &Page, index: BatIndex) -> Option<&AtomicU64> {
    page.get(usize::try_from(index.0 % ENTRIES_PER_PAGE).unwrap_or(usize::MAX))
}

fn empty_page() -> Box<Page> {
    Box::new([const { AtomicU64::new(0) }; PAGE_ENTRIES])
}

/// A sector bitmap's entry, zero unless its state says that it is present.
pub(crate) fn present_bitmap(entry: BatEntry) -> BatEntry {
    if entry.state_number() == BITMAP_PRESENT { entry } else { BatEntry(0) }
}

/// Judges an entry by its place. Those behind the last block of the disk (a differencing disk has some) mean nothing, and are
/// left as they are (ones throughout become zero).
pub(crate) fn judge(index: BatIndex, entry: BatEntry, rules: &BatRules) -> Result<Option<Finding>, Finding> {
    match rules.geometry.slot(index) {
        BatSlot::Payload(block) if block.0 >= rules.geometry.payload_blocks() => Ok(None),
        BatSlot::Payload(block) => {
            if rules.is_plain(entry) {
                Ok(None)
            } else {
                rules.judge_payload(block, entry)
            }
        }
        BatSlot::Bitmap(chunk) => rules.judge_bitmap(chunk, entry),
    }
}

/// Where a page of a chunk's sector bitmap stands in the file; the bitmap must be present.
pub(crate) fn bitmap_page_offset(bitmap: BatEntry, page: u64) -> FileOffset {
    FileOffset(bitmap.file_offset().0 + page * super::bitmap::PAGE_BYTES) // inside the bitmap block, inside the file
}
