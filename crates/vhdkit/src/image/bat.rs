//! The BAT in memory: read page by page when first needed, looked up without a lock.
//!
//! ```text
//! directory (1 pointer per 2 MiB of BAT) -> 512 page slots -> page of 512 judged entries, or "all zero"
//! ```

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::view::View;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BatEntry, BatRules};
use crate::format::finding::Finding;
use crate::format::geometry::BatSlot;
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset};

/// Entries of a page.
const PAGE_ENTRIES: usize = 512;
/// Pages of a directory slot.
const SLOT_PAGES: usize = 512;

/// Stands for an entry that must not be used. No valid entry has reserved bits set.
const UNUSABLE: u64 = u64::MAX;

type Page = [AtomicU64; PAGE_ENTRIES];
/// A loaded page; `None` when all its entries are zero, as in a hole of the file.
type PageSlot = OnceLock<Option<Box<Page>>>;

/// The BAT of one layer.
#[derive(Debug)]
pub(crate) struct BatCache {
    slots: Box<[OnceLock<Box<[PageSlot]>>]>,
    entries: u64,
}

impl BatCache {
    pub(crate) fn new(entries: u64) -> Self {
        let pages = entries.div_ceil(PAGE_ENTRIES as u64);
        let slots = usize::try_from(pages.div_ceil(SLOT_PAGES as u64)).unwrap_or(usize::MAX); // at most 257
        Self { slots: (0..slots).map(|_| OnceLock::new()).collect(), entries }
    }

    /// The entry of a payload block.
    #[inline]
    pub(crate) fn payload(&self, block: BlockIndex, rules: &BatRules, view: &View) -> Result<BatEntry> {
        let entry = self.entry(rules.geometry.payload_index(block), rules, view)?;
        if entry == UNUSABLE {
            return Err(self.explain(rules.geometry.payload_index(block), rules, view));
        }
        Ok(BatEntry(entry))
    }

    /// The entry of a chunk's sector bitmap.
    pub(crate) fn bitmap(&self, chunk: ChunkIndex, rules: &BatRules, view: &View) -> Result<BatEntry> {
        let index = rules.geometry.bitmap_index(chunk);
        let entry = self.entry(index, rules, view)?;
        if entry == UNUSABLE {
            return Err(self.explain(index, rules, view));
        }
        Ok(BatEntry(entry))
    }

    #[inline]
    fn entry(&self, index: BatIndex, rules: &BatRules, view: &View) -> Result<u64> {
        let page_number = index.0 / PAGE_ENTRIES as u64;
        let (slot, page) = (page_number / SLOT_PAGES as u64, page_number % SLOT_PAGES as u64);
        let outside = || Error::new(ErrorKind::OutOfRange, format!("BAT entry {index} is outside of the table"));
        let slot = self.slots.get(usize::try_from(slot).unwrap_or(usize::MAX)).ok_or_else(outside)?;
        let pages = slot.get_or_init(|| (0..SLOT_PAGES).map(|_| OnceLock::new()).collect());
        let page = pages.get(usize::try_from(page).unwrap_or(usize::MAX)).ok_or_else(outside)?;
        let loaded = match page.get() {
            Some(loaded) => loaded,
            None => self.load(page, page_number, rules, view)?,
        };
        let Some(entries) = loaded else { return Ok(0) };
        let position = usize::try_from(index.0 % PAGE_ENTRIES as u64).unwrap_or(usize::MAX);
        entries.get(position).map(|entry| entry.load(Ordering::Acquire)).ok_or_else(outside)
    }

    /// Reads a page and judges every entry that the disk uses. A thread that loses the race gives its copy up.
    #[cold]
    fn load<'a>(
        &self,
        page: &'a PageSlot,
        page_number: u64,
        rules: &BatRules,
        view: &View,
    ) -> Result<&'a Option<Box<Page>>> {
        let first = page_number * PAGE_ENTRIES as u64;
        let mut bytes = [0_u8; PAGE_ENTRIES * 8];
        let used = usize::try_from((self.entries - first).min(PAGE_ENTRIES as u64)).unwrap_or(PAGE_ENTRIES);
        if let Some(part) = bytes.get_mut(..used * 8) {
            view.read_at(part, rules.bat_offset.0 + first * 8)?; // inside the BAT region
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(page.get_or_init(|| None));
        }
        let entries: Box<Page> = Box::new([const { AtomicU64::new(0) }; PAGE_ENTRIES]);
        let (raw, _) = bytes.as_chunks::<8>();
        for (number, (to, raw)) in (first..).zip(entries.iter().zip(raw).take(used)) {
            let entry = BatEntry(u64::from_le_bytes(*raw));
            let usable = judge(BatIndex(number), entry, rules).is_ok();
            to.store(if usable { entry.0 } else { UNUSABLE }, Ordering::Relaxed);
        }
        Ok(page.get_or_init(|| Some(entries)))
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
}

/// Judges an entry by its place.
pub(crate) fn judge(index: BatIndex, entry: BatEntry, rules: &BatRules) -> Result<Option<Finding>, Finding> {
    match rules.geometry.slot(index) {
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
