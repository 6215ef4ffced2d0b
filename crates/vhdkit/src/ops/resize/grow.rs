//! A larger disk.
//!
//! ```text
//! 1. the last old block: what lies behind the old end is zero, and its own, not a parent's
//! 2. entries of new blocks, where nobody looks yet: in place behind the old ones, or all in a new region
//! 3. one entry of the log: the size, the page of the BAT that old and new entries share, the region tables
//! ```

use super::super::edit::{Placed, change_items, set_region, top};
use super::super::{Progress, advance};
use super::{ResizeReport, bat_bytes, is_fixed, parent_size, size_item};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::finding::FailFast;
use crate::format::geometry::{BAT_ENTRY_BYTES, BatSlot, Geometry};
use crate::format::log::SECTOR;
use crate::format::region::BAT_GUID;
use crate::image::scan::scan_marks;
use crate::image::session::Identity;
use crate::image::space::Given;
use crate::image::structure::{Edit, Transaction};
use crate::image::{BlockDevice as _, Image, Layer};
use crate::storage::is_resizable;
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset, MIB};

/// Entries of a page of the BAT.
const PAGE_ENTRIES: u64 = SECTOR / BAT_ENTRY_BYTES;
/// Pages of the BAT written at once.
const RUN_PAGES: u64 = 256;

pub(super) fn plan(image: &Image, geometry: &Geometry, report: &mut ResizeReport) -> Result<()> {
    let layer = top(image)?;
    report.bat_moves = bat_bytes(geometry) > layer.region_table().bat.length;
    if is_fixed(layer) {
        report.blocks = geometry.payload_blocks() - layer.geometry().payload_blocks(); // it grows
    }
    parent_size(image)?;
    let table = if report.bat_moves { bat_bytes(geometry) } else { 0 };
    let blocks = if is_fixed(layer) { report.blocks.saturating_mul(geometry.block_size()) } else { 0 };
    // The last one for metadata that find no room at home.
    fits_on_device(layer, &[table, blocks, MIB])
}

/// A block device that has no room is found out while nothing has changed: what is taken must be free there in one piece.
fn fits_on_device(layer: &Layer, pieces: &[u64]) -> Result<()> {
    if is_resizable(layer.storage().as_ref()) {
        return Ok(());
    }
    let mut findings = FailFast::new(layer.rules().strictness);
    let (_, mut marks) = scan_marks(layer, &mut findings, &mut |_, _| Ok(()))?;
    let size = layer.view().physical_size();
    for bytes in pieces.iter().filter(|bytes| **bytes > 0) {
        if let Some(start) = marks.find_free(1, size / MIB, bytes.div_ceil(MIB)) {
            marks.mark(start * MIB, start * MIB + bytes); // in the file
        } else {
            let what = format!("the larger disk needs {bytes} bytes in one piece, which the block device has not got");
            return Err(
                Error::new(ErrorKind::Limit, what).with_hint("copy the image to a larger device or to a file first")
            );
        }
    }
    Ok(())
}

pub(crate) fn run(image: &Image, geometry: &Geometry, identity: Identity, progress: &dyn Progress) -> Result<()> {
    let parent = parent_size(image)?;
    let edit = image.edit(identity)?;
    finish_last_block(image, &edit, parent)?;
    edit.commit()?;
    let entries = NewEntries::new(image, &edit, geometry, parent)?;
    let mut transaction = Transaction::default();
    let mut regions = edit.layer().region_table().regions.clone();
    let bat = edit.layer().region_table().bat;
    let moves = bat_bytes(geometry) > bat.length;
    if moves {
        let given = edit.take(bat_bytes(geometry))?;
        set_region(&mut regions, BAT_GUID, given.range.start, given.range.end - given.range.start);
        transaction.frees.push(bat.file_offset..bat.file_offset + bat.length); // inside the file
        entries.write_moved(&edit, &given, progress)?;
    } else {
        entries.write_in_place(&edit, progress)?;
        for page in entries.shared_pages() {
            let offset = bat.file_offset + page * SECTOR;
            transaction.add_page(offset, entries.page(page, &edit.read_page(offset)?));
        }
    }
    let placed = change_items(&edit, &mut regions, &[size_item(geometry.disk_size())], &mut transaction)?;
    if moves || placed == Placed::NewRegion {
        edit.add_region_tables(&mut transaction, &regions)?;
    }
    advance(progress, 1, Some(1))?;
    edit.apply(transaction)?;
    edit.commit()
}

/// Sees to it that the rest of the last block reads as zero when the disk goes on there.
fn finish_last_block(image: &Image, edit: &Edit<'_>, parent: Option<u64>) -> Result<()> {
    let layer = edit.layer();
    let geometry = layer.geometry();
    let (size, block_size) = (geometry.disk_size(), geometry.block_size());
    let inside = size % block_size;
    if inside == 0 {
        return Ok(());
    }
    let block = BlockIndex(size / block_size);
    let index = geometry.payload_index(block);
    let state = edit.entry(index)?.payload_state();
    let shows_parent = state == Some(PayloadState::NotPresent) && parent.is_some_and(|parent| parent > size);
    if state == Some(PayloadState::PartiallyPresent) || shows_parent {
        // All that the disk has of it is written into the image itself, so that no bits and no parent count any more.
        copy_up(image, geometry.block_range(block))?;
        edit.commit()?;
    }
    let entry = edit.entry(index)?;
    if let Some(owned) = layer.rules().owned_range(BatSlot::Payload(block), entry) {
        // Old versions of QEMU cut the file where the data of the last block ends; it is the last no longer.
        edit.reach(owned.end)?;
        edit.zero(owned.start + inside..owned.end)?;
    }
    if entry.payload_state() == Some(PayloadState::PartiallyPresent) {
        // All its sectors were there before, so that nothing made it whole; bits behind the old end would count now.
        let whole = BatEntry::new(PayloadState::FullyPresent.number(), entry.file_offset());
        edit.apply(Transaction { entries: vec![(index, whole)], ..Transaction::default() })?;
    }
    Ok(())
}

/// Writes what a range reads as into the image itself.
fn copy_up(image: &Image, range: std::ops::Range<u64>) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut position = range.start;
    while position < range.end {
        let length = (range.end - position).min(1 << 20);
        let part = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
        image.read_at(part, position)?;
        image.write_at(part, position)?;
        position += length;
    }
    Ok(())
}

/// Entries behind the old ones.
struct NewEntries {
    /// The first index that is new, and the one behind the last.
    first: u64,
    end: u64,
    geometry: Geometry,
    old_blocks: u64,
    /// Blocks below this say ZERO, so that a longer parent does not show.
    zero_below: u64,
    /// Where the blocks of a fixed disk go, one after the other.
    space: Option<Given>,
}

impl NewEntries {
    fn new(image: &Image, edit: &Edit<'_>, geometry: &Geometry, parent: Option<u64>) -> Result<Self> {
        let layer = edit.layer();
        let old = layer.geometry();
        let old_blocks = old.payload_blocks();
        let block_size = geometry.block_size();
        let added = geometry.payload_blocks() - old_blocks; // it grows
        let space = if is_fixed(top(image)?) && added > 0 {
            let given = edit.take(added * block_size)?; // at most 64 TiB
            edit.zero_given(&given)?;
            Some(given)
        } else {
            None
        };
        Ok(Self {
            // Slots of a last chunk behind the old end may hold anything: they meant nothing.
            first: old.payload_index(BlockIndex(old_blocks - 1)).0 + 1, // a disk has a block
            end: geometry.bat_entries(),
            geometry: *geometry,
            old_blocks,
            zero_below: parent.map_or(0, |parent| parent.min(geometry.disk_size()).div_ceil(block_size)),
            space,
        })
    }

    /// What a new entry says; `old` is what stands there.
    fn entry(&self, index: u64, old: BatEntry) -> BatEntry {
        match self.geometry.slot(BatIndex(index)) {
            // The bitmap of the last old chunk stays; those of new chunks are not there.
            BatSlot::Bitmap(chunk) if self.has_old_bitmap(chunk.0) => old,
            BatSlot::Bitmap(_) => BatEntry(0),
            BatSlot::Payload(block) if block.0 >= self.geometry.payload_blocks() => BatEntry(0),
            BatSlot::Payload(block) => match &self.space {
                Some(given) => {
                    let offset = given.range.start + (block.0 - self.old_blocks) * self.geometry.block_size();
                    BatEntry::new(PayloadState::FullyPresent.number(), FileOffset(offset))
                }
                None if block.0 < self.zero_below => BatEntry::new(PayloadState::Zero.number(), FileOffset(0)),
                None => BatEntry(0),
            },
        }
    }

    /// Whether the bitmap entry of a chunk counted before: in a differencing disk that of the last old chunk did.
    fn has_old_bitmap(&self, chunk: u64) -> bool {
        let last = (self.old_blocks - 1) / self.geometry.chunk_ratio(); // a disk has a block
        self.geometry.is_differencing() && chunk <= last
    }

    /// Where the bitmap entry of the last old chunk stands, when it counted before.
    fn old_bitmap(&self) -> Option<u64> {
        let chunk = ChunkIndex((self.old_blocks - 1) / self.geometry.chunk_ratio()); // a disk has a block
        self.geometry.is_differencing().then(|| self.geometry.bitmap_index(chunk).0)
    }

    /// Whether nothing on a page of the BAT counted before.
    fn is_all_new(&self, page: u64) -> bool {
        let entries = page * PAGE_ENTRIES..(page + 1) * PAGE_ENTRIES;
        entries.start >= self.first && !self.old_bitmap().is_some_and(|bitmap| entries.contains(&bitmap))
    }

    /// A page with its new entries put in.
    fn page(&self, page: u64, old: &[u8; 4096]) -> [u8; 4096] {
        let mut bytes = *old;
        let (cells, _) = bytes.as_chunks_mut::<8>();
        for (index, cell) in (page * PAGE_ENTRIES..).zip(cells) {
            if index >= self.first {
                let old = BatEntry(u64::from_le_bytes(*cell));
                let new = if index < self.end { self.entry(index, old) } else { BatEntry(0) };
                *cell = new.0.to_le_bytes();
            }
        }
        bytes
    }

    /// Pages of the BAT up to the last entry.
    fn pages(&self) -> u64 {
        self.end.div_ceil(PAGE_ENTRIES)
    }

    /// The pages that hold old entries and new ones, which change with the size: the one where the old entries end, and the
    /// one with the bitmap entry of that chunk.
    fn shared_pages(&self) -> Vec<u64> {
        let mut pages = vec![self.first / PAGE_ENTRIES];
        pages.extend(self.old_bitmap().map(|bitmap| bitmap / PAGE_ENTRIES));
        pages.dedup();
        pages.retain(|page| *page < self.pages() && !self.is_all_new(*page));
        pages
    }

    /// Writes the pages on which nothing counted before.
    fn write_in_place(&self, edit: &Edit<'_>, progress: &dyn Progress) -> Result<()> {
        let bat = edit.layer().region_table().bat;
        self.each_run(
            self.first / PAGE_ENTRIES,
            progress,
            &mut |first, old| {
                for (page, old) in (first..).zip(old.as_chunks::<4096>().0) {
                    let new = self.page(page, old);
                    if self.is_all_new(page) && new != *old {
                        edit.write(&new, bat.file_offset + page * SECTOR)?;
                    }
                }
                Ok(())
            },
            edit,
        )
    }

    /// Writes the whole BAT to a new place.
    fn write_moved(&self, edit: &Edit<'_>, given: &Given, progress: &dyn Progress) -> Result<()> {
        edit.zero_given(given)?;
        self.each_run(
            0,
            progress,
            &mut |first, old| {
                let new: Vec<u8> =
                    (first..).zip(old.as_chunks::<4096>().0).flat_map(|(page, old)| self.page(page, old)).collect();
                if new.iter().all(|byte| *byte == 0) {
                    return Ok(());
                }
                edit.write(&new, given.range.start + first * SECTOR)
            },
            edit,
        )
    }

    /// Visits the old contents of the table's pages from one on, many at once; what its region does not reach is zero.
    fn each_run(
        &self,
        from: u64,
        progress: &dyn Progress,
        visit: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
        edit: &Edit<'_>,
    ) -> Result<()> {
        let bat = edit.layer().region_table().bat;
        let mut page = from;
        while page < self.pages() {
            let count = (self.pages() - page).min(RUN_PAGES);
            let range = page * SECTOR..(page + count) * SECTOR;
            let inside = range.start.min(bat.length)..range.end.min(bat.length);
            let mut old = edit.layer().view().read_vec(bat.file_offset + inside.start..bat.file_offset + inside.end)?;
            old.resize(usize::try_from(range.end - range.start).unwrap_or(0), 0); // at most 1 MiB
            visit(page, &old)?;
            page += count;
            advance(progress, page, Some(self.pages()))?;
        }
        Ok(())
    }
}
