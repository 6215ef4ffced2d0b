//! Changing the structure of an image: metadata items, region tables, and where regions and blocks lie.
//!
//! Operations that own the image for themselves use this: `resize`, `compact`, `merge`, `reparent`, `set`. Everything goes
//! through the commit that writes use, so that a crash leaves the state before a step or the one after it, and freed space
//! is given out only when nothing durable names it any more.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::bat::page_of;
use super::change::give_back;
use super::data_map::DataMap;
use super::extents::LayerCursor;
use super::layer::Layer;
use super::session::Identity;
use super::simulation::{Phase, enter};
use super::space::{Given, Holds};
use super::tokens::{Hold, Wait};
use super::writer::{Active, Held, Keys, PageBytes, PageKey, Writer, read_only};
use super::{Image, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BITMAP_PRESENT, BatEntry, PayloadState};
use crate::format::geometry::{BITMAP_BLOCK_BYTES, BatSlot};
use crate::format::log::SECTOR;
use crate::format::region::{self, Region};
use crate::storage::Storage;
use crate::sync::Ordering;
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset};

/// Bytes copied at once inside the file.
const COPY_BYTES: u64 = 1 << 20;

/// What one entry of the log changes.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    /// Pages of metadata anywhere in the file, by file offset.
    pub(crate) pages: Vec<(u64, PageBytes)>,
    /// Entries of the BAT.
    pub(crate) entries: Vec<(BatIndex, BatEntry)>,
    /// Space that nothing names any more afterwards.
    pub(crate) frees: Vec<Range<u64>>,
}

impl Transaction {
    /// Puts bytes into the page at a file offset; `old` is what the page holds.
    pub(crate) fn add_page(&mut self, file_offset: u64, bytes: PageBytes) {
        match self.pages.iter_mut().find(|(other, _)| *other == file_offset) {
            Some((_, page)) => *page = bytes,
            None => self.pages.push((file_offset, bytes)),
        }
    }
}

/// An image whose structure is being changed. Nobody else uses it meanwhile.
#[derive(Debug)]
pub(crate) struct Edit<'a> {
    shared: &'a Shared,
    writer: &'a Writer,
    _active: Active<'a>,
}

impl Image {
    /// Starts a session in which the structure changes. After a step that moves a region or changes the disk's size, what
    /// the image has in memory is out of date: the edit ends, and the image is closed.
    pub(crate) fn edit(&self, identity: Identity) -> Result<Edit<'_>> {
        let shared = &*self.shared;
        let writer = shared.writer.get().ok_or_else(read_only)?;
        let active = writer.enter()?;
        shared.start_session(writer, Wait::Yes, identity)?;
        Ok(Edit { shared, writer, _active: active })
    }

    /// Lets the file of a fixed disk be cut when it is closed: its blocks were moved or became fewer. The first `blocks` of
    /// them are left; those that have no space yet find some at the end of the file, if it was there ([MS-VHDX] 2.6.2.1,
    /// LeaveBlockAllocated: the file is never too short for all blocks).
    pub(crate) fn allow_cut(&self, blocks: u64) -> Result<()> {
        let Some(writer) = self.shared.writer.get() else { return Ok(()) };
        if writer.is_fixed {
            let missing = blocks_without_space(self.shared.top(), blocks)?;
            writer.kept.store(missing * self.shared.top().geometry().block_size(), Ordering::SeqCst); // at most 64 TiB
        }
        writer.cuts.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Moves the log to a lower place if it is what keeps the file long. False when it is not, or there is no such place. The
    /// session has ended.
    ///
    /// # Errors
    /// As in writing; the log is at one of the two places then, and empty.
    pub(crate) fn move_log_down(&self) -> Result<bool> {
        self.shared.move_log_down()
    }

    /// Whether so many bytes are free in one piece that ends at or before a file offset.
    pub(crate) fn has_hole_below(&self, bytes: u64, end: u64) -> bool {
        self.shared.writer.get().is_some_and(|writer| writer.meta().space.has_run(bytes, end))
    }

    /// Bytes from the start of the file to the end of the last thing that is owned.
    pub(crate) fn used_end(&self) -> Option<u64> {
        Some(self.shared.writer.get()?.meta().space.used_end())
    }
}

/// How many of the first blocks of a disk own no space.
fn blocks_without_space(layer: &Layer, blocks: u64) -> Result<u64> {
    let geometry = layer.geometry();
    let mut cursor = LayerCursor::new(layer);
    let (mut block, mut missing) = (0, 0);
    while block < blocks {
        let index = geometry.payload_index(BlockIndex(block));
        let entry = cursor.entry(index)?;
        let is_owned = layer.rules().owned_range(BatSlot::Payload(BlockIndex(block)), entry).is_some();
        let in_chunk = geometry.chunk_ratio() - block % geometry.chunk_ratio();
        let equal = if is_owned { 1 } else { cursor.count_equal(index, in_chunk.min(blocks - block), entry)?.max(1) };
        missing += if is_owned { 0 } else { equal };
        block += equal;
    }
    Ok(missing)
}

impl Edit<'_> {
    pub(crate) fn layer(&self) -> &Layer {
        self.shared.top()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        self.shared.storage()
    }

    /// Pages that one transaction may have.
    pub(crate) fn capacity(&self) -> usize {
        self.writer.capacity()
    }

    /// Takes so many bytes in one piece, the lowest there are, growing the file where there are none.
    pub(crate) fn take(&self, bytes: u64) -> Result<Given> {
        loop {
            if let Some(given) = self.writer.meta().space.take_run(bytes, None) {
                return Ok(given);
            }
            self.shared.grow(self.writer, Wait::Yes, |_| self.writer.meta().space.end_wanted(bytes))?;
        }
    }

    /// Does something once more when there was no room for it, and freed space has become room.
    pub(crate) fn with_room<T>(&self, attempt: impl Fn() -> Result<T>) -> Result<T> {
        self.shared.with_room(self.writer, Wait::Yes, attempt)
    }

    /// Takes so many bytes that end before a file offset, if there are any.
    pub(crate) fn take_below(&self, bytes: u64, end: u64) -> Option<Given> {
        self.writer.meta().space.take_run(bytes, Some(end))
    }

    /// Gives back what was taken and not used.
    pub(crate) fn give_back(&self, given: &Given) {
        give_back(&mut self.writer.meta(), given);
    }

    /// Where the last owned thing ends.
    pub(crate) fn used_end(&self) -> u64 {
        self.writer.meta().space.used_end()
    }

    /// Where the last owned thing ends that begins below a file offset.
    pub(crate) fn used_end_below(&self, offset: u64) -> u64 {
        self.writer.meta().space.used_end_below(offset)
    }

    /// Copies a range of the file to space that was taken.
    pub(crate) fn copy(&self, from: Range<u64>, to: &Given) -> Result<()> {
        self.copy_within(from, to, &DataMap::default())
    }

    /// Makes the file so long at least.
    pub(crate) fn reach(&self, end: u64) -> Result<()> {
        self.shared.reach(self.writer, end, Wait::Yes)
    }

    /// Writes bytes where nothing durable points to yet.
    pub(crate) fn write(&self, bytes: &[u8], file_offset: u64) -> Result<()> {
        let _phase = enter(Phase::Payload);
        let wrote = self.storage().write_at(bytes, file_offset);
        wrote.map_err(|error| Error::io(format!("cannot write at {file_offset:#x}"), error))
    }

    /// Zeroes a range that nothing durable points to yet, or that means nothing to anybody.
    pub(crate) fn zero(&self, range: Range<u64>) -> Result<()> {
        let _phase = enter(Phase::Payload);
        let start = range.start;
        let inside = range.start..range.end.min(self.shared.view().physical_size());
        let zeroed = if inside.is_empty() { Ok(()) } else { self.storage().zero_range(inside) };
        zeroed.map_err(|error| Error::io(format!("cannot zero the file at {start:#x}"), error))
    }

    /// Makes zeros of space that was taken, unless it is zero already.
    pub(crate) fn zero_given(&self, given: &Given) -> Result<()> {
        if given.holds == Holds::Zero { Ok(()) } else { self.zero(given.range.clone()) }
    }

    /// Reads metadata as it is in the file; nothing of it may be dirty.
    pub(crate) fn read_page(&self, file_offset: u64) -> Result<PageBytes> {
        let mut bytes = [0; 4096];
        self.shared.view().read_at(&mut bytes, file_offset)?;
        Ok(bytes)
    }

    /// The entry at an index of the BAT.
    pub(crate) fn entry(&self, index: BatIndex) -> Result<BatEntry> {
        let layer = self.layer();
        layer.bat().entry(index, layer.rules(), layer.view())
    }

    /// Makes everything durable that was changed, and puts it where it belongs: who moves a region or reads a page reads
    /// the file.
    pub(crate) fn commit(&self) -> Result<()> {
        self.shared.flush_with(Wait::Yes)?;
        let Some(mut commit) = self.writer.lock_commit(Wait::Yes) else { return Ok(()) };
        self.shared.write_home(self.writer, &mut commit, Vec::new())
    }

    /// The same, and makes freed space usable again.
    pub(crate) fn settle(&self) -> Result<()> {
        let Some(mut commit) = self.writer.lock_commit(Wait::Yes) else { return Ok(()) };
        self.shared.settle(self.writer, &mut commit, Wait::Yes)?;
        self.shared.write_home(self.writer, &mut commit, Vec::new())
    }

    /// Does all of a transaction at one instant. It is durable after the next [`Edit::commit`]. Nothing has happened when
    /// this fails.
    pub(crate) fn apply(&self, transaction: Transaction) -> Result<()> {
        let layer = self.layer();
        let mut keys: Vec<PageKey> = transaction.pages.iter().map(|(offset, _)| PageKey::Raw(*offset)).collect();
        let mut seen = BTreeSet::new();
        for (index, _) in &transaction.entries {
            layer.bat().pin(*index, layer.rules(), layer.view())?;
            if seen.insert(page_of(*index)) {
                keys.push(PageKey::Bat(page_of(*index)));
            }
        }
        if keys.len() > self.capacity() {
            let what = format!("{} pages of metadata do not fit into one entry of the log", keys.len());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let mut keys = keys.into_iter();
        let Some(first) = keys.next() else { return Ok(()) };
        let keys = Keys { bat: first, others: keys.collect() };
        if !self.shared.reserve(self.writer, &keys, Wait::Yes)? {
            return Err(super::session::busy());
        }
        let mut meta = self.writer.meta();
        for (offset, bytes) in transaction.pages {
            meta.set_raw(offset, bytes);
        }
        for (index, entry) in transaction.entries {
            self.shared.set_entry(&mut meta, index, entry.state_number(), entry.file_offset().0);
        }
        for range in transaction.frees {
            self.writer.free(&mut meta, range);
        }
        meta.unreserve(keys.iter());
        self.writer.wake(meta);
        Ok(())
    }

    /// Takes the mapping of a block away; `to` is ZERO or UNMAPPED. Its space is free after the next commits.
    pub(crate) fn clear_block(&self, block: BlockIndex, to: PayloadState) -> Result<()> {
        self.shared.clear_block(self.writer, block, to, |_| true, Wait::Yes).map(|_| ())
    }

    /// Moves a payload block to space that was taken: copies what it holds, then changes its entry. False when the block is
    /// not where it was said to be; the space is given back then. `data` is what is known of the file; nothing but moving may
    /// have been done since it was made.
    pub(crate) fn move_block(&self, block: BlockIndex, from: u64, to: &Given, data: &DataMap) -> Result<bool> {
        let layer = self.layer();
        let index = layer.geometry().payload_index(block);
        let keys = Keys::one(PageKey::Bat(page_of(index)));
        self.shared.reserve(self.writer, &keys, Wait::Yes)?;
        let mut held = Held::new(self.writer, block, Some(keys));
        held.acquire(Hold::Alone, Wait::Yes);
        let entry = layer.bat().pin(index, layer.rules(), layer.view())?;
        let owned = layer.rules().owned_range(BatSlot::Payload(block), entry);
        let Some(owned) = owned.filter(|owned| owned.start == from && entry.file_offset().0 == from) else {
            self.give_back(to);
            return Ok(false);
        };
        if let Err(error) = self.copy_within(owned.clone(), to, data) {
            self.give_back(to);
            return Err(error);
        }
        let mut meta = self.writer.meta();
        self.shared.set_entry(&mut meta, index, entry.state_number(), to.range.start);
        self.writer.free(&mut meta, owned);
        Ok(true)
    }

    /// Moves a sector bitmap block to space that was taken. No page of it may be dirty.
    pub(crate) fn move_bitmap(&self, chunk: ChunkIndex, from: u64, to: &Given, data: &DataMap) -> Result<bool> {
        let layer = self.layer();
        let index = layer.geometry().bitmap_index(chunk);
        let entry = layer.bat().pin(index, layer.rules(), layer.view())?;
        if entry.state_number() != BITMAP_PRESENT || entry.file_offset().0 != from {
            self.give_back(to);
            return Ok(false);
        }
        let owned = from..from + BITMAP_BLOCK_BYTES; // inside the file
        if let Err(error) = self.copy_within(owned.clone(), to, data) {
            self.give_back(to);
            return Err(error);
        }
        let entry = BatEntry::new(BITMAP_PRESENT, FileOffset(to.range.start));
        self.apply(Transaction { entries: vec![(index, entry)], frees: vec![owned], ..Transaction::default() })?;
        Ok(true)
    }

    /// Copies inside the file. Holes stay holes where the new place is zero.
    fn copy_within(&self, from: Range<u64>, to: &Given, data: &DataMap) -> Result<()> {
        let _phase = enter(Phase::Payload);
        let storage = self.storage();
        let failed =
            |error| Error::io(format!("cannot copy the block at {:#x} to {:#x}", from.start, to.range.start), error);
        let place = |position: u64| to.range.start + (position - from.start);
        let end = from.end.min(self.shared.view().physical_size());
        let mut position = from.start;
        let mut buffer: Vec<u8> = Vec::new();
        while position < from.end {
            let found = data.next_data(storage.as_ref(), position..end.max(position)).map_err(failed)?;
            let piece = found.unwrap_or(from.end..from.end);
            if to.holds == Holds::Stale && piece.start > position {
                // What takes no space takes none at its new place.
                let hole = place(position)..place(piece.start);
                if !storage.punch_hole(hole.clone()).map_err(failed)? {
                    storage.zero_range(hole).map_err(failed)?;
                }
            }
            position = piece.start;
            while position < piece.end {
                let length = (piece.end - position).min(COPY_BYTES);
                let copied = storage.copy_range(storage.as_ref(), position, place(position), length).map_err(failed)?;
                if copied == 0 {
                    buffer.resize(usize::try_from(length).unwrap_or(0), 0); // at most 1 MiB
                    storage.read_at(&mut buffer, position).map_err(failed)?;
                    storage.write_at(&buffer, place(position)).map_err(failed)?;
                }
                position += if copied == 0 { length } else { copied };
            }
        }
        data.wrote(&to.range);
        // The medium works on it while the next block is copied.
        storage.begin_write_out(to.range.clone());
        Ok(())
    }

    /// Adds the pages of both region tables that change when these are the regions. A copy that is damaged becomes whole.
    pub(crate) fn add_region_tables(&self, transaction: &mut Transaction, regions: &[Region]) -> Result<()> {
        let table = region::encode(regions);
        for copy in region::OFFSETS {
            for (number, page) in (0..).zip(table.chunks_exact(4096)) {
                let offset = copy + number * SECTOR;
                if let Ok(page) = <&PageBytes>::try_from(page)
                    && self.read_page(offset)? != *page
                {
                    transaction.add_page(offset, *page);
                }
            }
        }
        Ok(())
    }
}

impl Shared {
    /// Moves the log to the lowest free place below its own ([MS-VHDX] 2.2.2: the headers say where it is). Only while the
    /// headers say that it is empty: both name the new place, one after the other, before the old one is free.
    fn move_log_down(&self) -> Result<bool> {
        let Some(writer) = self.writer.get() else { return Ok(false) };
        let Some(mut commit) = writer.lock_commit(Wait::Yes) else { return Ok(false) };
        writer.fail_if_poisoned()?;
        let header = *commit.headers.current();
        if header.is_dirty() || commit.ring.is_some() || writer.started.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let length = u64::from(header.log_length);
        if header.log_offset + length != writer.meta().space.used_end() {
            return Ok(false);
        }
        let Some(given) = writer.meta().space.take_run(length, Some(header.log_offset)) else { return Ok(false) };
        let _phase = enter(Phase::Close);
        let zeroed = self.storage().zero_range(given.range.clone()).and_then(|()| self.storage().sync());
        if let Err(error) = zeroed {
            give_back(&mut writer.meta(), &given);
            return Err(Error::io(format!("cannot make a new log at {:#x}", given.range.start), error));
        }
        self.update_headers(writer, &mut commit, |header| header.log_offset = given.range.start)?;
        writer.meta().space.give_back(&(header.log_offset..header.log_offset + length));
        commit.forget_spare_ring();
        self.cut(writer)?;
        Ok(true)
    }
}
