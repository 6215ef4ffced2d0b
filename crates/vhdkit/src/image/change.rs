//! Changing the mapping of one block: reserve, hold, prepare, do the payload, publish.
//!
//! | from | write | to |
//! |---|---|---|
//! | NOT_PRESENT, no parent | any | FULLY_PRESENT, the rest zero |
//! | NOT_PRESENT, parent | whole block | FULLY_PRESENT |
//! | NOT_PRESENT, parent | part | PARTIALLY_PRESENT, the block's bits rewritten |
//! | UNDEFINED, ZERO, UNMAPPED | any | FULLY_PRESENT, the rest zero |
//! | PARTIALLY_PRESENT | whole block, or the last bits | FULLY_PRESENT |
//! | PARTIALLY_PRESENT | other bits | more bits |
//!
//! Nothing that a reader or a commit sees changes before [`Shared::finish`], which does no I/O.

use std::ops::Range;

use super::Shared;
use super::bat::{bitmap_page_offset, page_of};
use super::bitmap::{BitmapKey, PAGE_BITS, bit_run, set_bits};
use super::commit::{Commit, is_full};
use super::simulation::{BrokenRule, Phase, enter};
use super::space::{Given, Holds};
use super::tokens::{Hold, Wait};
use super::writer::{Held, Keys, Meta, NewBitmap, PageKey, Reserved, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BITMAP_PRESENT, BatEntry, PayloadState};
use crate::format::geometry::BITMAP_BLOCK_BYTES;
use crate::sync::{PoisonError, TryLockError};
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset, GuestOffset, MIB, round_up};

/// The file grows by at least so much: one change of length for many blocks.
const GROWTH_STEP: u64 = 64 * MIB;
/// More freed space than this is settled before the file grows.
const WAITING_MAX: u64 = 64 * MIB;

/// What finishing a change publishes.
#[derive(Debug)]
pub(super) enum Kind {
    /// Nothing: the range was mapped already.
    Mapped,
    /// The block becomes fully present in this space; `None` for space that it owned already.
    Full(Option<Given>),
    /// The block becomes partially present in this space, with these bits.
    Partial(Given, Range<u64>),
    /// These bits are set.
    Bits(Range<u64>),
}

/// A change of one block's mapping under way.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) block: BlockIndex,
    pub(super) file_offset: u64,
    kind: Kind,
    hold: Hold,
    /// Pages of the next entry that are reserved for it; none where nothing will change.
    keys: Option<Keys>,
    /// Bitmap pages that are pinned.
    pins: Vec<BitmapKey>,
    /// The chunk whose new sector bitmap this change uses.
    new_bitmap: Option<ChunkIndex>,
}

impl Change {
    /// A change that changes nothing yet: the range is mapped, or is about to be prepared.
    fn new(block: BlockIndex, file_offset: u64, hold: Hold) -> Self {
        Self { block, file_offset, kind: Kind::Mapped, hold, keys: None, pins: Vec::new(), new_bitmap: None }
    }

    /// True when the range is mapped already and is written in place.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.kind, Kind::Mapped)
    }

    /// The pages that are reserved for it.
    fn reserved(&self) -> impl Iterator<Item = PageKey> + '_ {
        self.keys.iter().flat_map(Keys::iter)
    }
}

/// What looking at a block again under its token gave.
enum Prepared {
    Ready(Change),
    /// Somebody else was faster: look again.
    Other,
    Busy,
}

impl Shared {
    /// Where a range inside one block lies in the file, if all of it is mapped.
    #[inline]
    pub(super) fn mapped(&self, range: &Range<u64>) -> Result<Option<u64>> {
        let layer = self.top();
        let block = layer.geometry().block_of(GuestOffset(range.start));
        let entry = layer.bat().payload(block, layer.rules(), layer.view())?;
        self.mapped_by(entry, block, range)
    }

    /// The same by the block's entry.
    #[inline]
    fn mapped_by(&self, entry: BatEntry, block: BlockIndex, range: &Range<u64>) -> Result<Option<u64>> {
        let geometry = self.top().geometry();
        let at = || entry.file_offset().0 + geometry.offset_in_block(GuestOffset(range.start));
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => Ok(Some(at())),
            Some(PayloadState::PartiallyPresent) => Ok(self.has_bits(block, range)?.then(at)),
            _ => Ok(None),
        }
    }

    /// Whether all sectors of a range inside one partially present block are here.
    fn has_bits(&self, block: BlockIndex, range: &Range<u64>) -> Result<bool> {
        let layer = self.top();
        let geometry = layer.geometry();
        let bits = self.bits_of(range);
        let chunk = geometry.chunk_of(block);
        let bitmap = layer.bat().bitmap(chunk, layer.rules(), layer.view())?;
        if bitmap.0 == 0 {
            return Err(Error::from_finding(&layer.rules().bitmap_missing(block)));
        }
        let mut bit = bits.start;
        while bit < bits.end {
            let key = BitmapKey { chunk, page: bit / PAGE_BITS };
            let page = layer.bitmaps().page(key, bitmap_page_offset(bitmap, key.page), layer.view())?;
            let (here, count) = bit_run(&page, bit % PAGE_BITS, bits.end - bit);
            if !here {
                return Ok(false);
            }
            bit += count.max(1);
        }
        Ok(true)
    }

    /// The bits of a range inside one block, in its chunk's bitmap; sectors that are touched count as a whole.
    fn bits_of(&self, range: &Range<u64>) -> Range<u64> {
        let geometry = self.top().geometry();
        let sector = geometry.logical_sector_size();
        let first = geometry.bitmap_bit(GuestOffset(range.start));
        let sectors = range.end.div_ceil(sector) - range.start / sector;
        first..first + sectors
    }

    /// Every page that changing a block can touch.
    fn keys_of(&self, block: BlockIndex) -> Keys {
        let geometry = self.top().geometry();
        let mut keys = Keys::one(PageKey::Bat(page_of(geometry.payload_index(block))));
        if geometry.is_differencing() {
            let chunk = geometry.chunk_of(block);
            let bitmap = PageKey::Bat(page_of(geometry.bitmap_index(chunk)));
            if keys.bat != bitmap {
                keys.others.push(bitmap);
            }
            let bits = self.bits_of(&self.whole_block(block));
            let pages = bits.start / PAGE_BITS..bits.end.div_ceil(PAGE_BITS);
            keys.others.extend(pages.map(|page| PageKey::Bitmap(BitmapKey { chunk, page })));
        }
        keys
    }

    /// Reserves pages for the next entry, with a commit where that makes room. No lock may be held. False when that means
    /// waiting and the caller must not.
    pub(super) fn reserve(&self, writer: &Writer, keys: &Keys, wait: Wait) -> Result<bool> {
        loop {
            match writer.try_reserve(keys, wait) {
                Reserved::Yes => return Ok(true),
                Reserved::Busy => return Ok(false),
                Reserved::WithoutRoom if wait == Wait::AtOnce => {
                    writer.unreserve(keys.iter());
                    return Ok(false);
                }
                Reserved::Full if wait == Wait::AtOnce => return Ok(false),
                Reserved::WithoutRoom => {
                    let made = match writer.lock_commit(wait) {
                        Some(mut commit) => self.make_room(writer, &mut commit).map(|()| true),
                        None => Ok(false),
                    };
                    if !matches!(made, Ok(true)) {
                        writer.unreserve(keys.iter());
                    }
                    return made;
                }
                Reserved::Full => {
                    let Some(mut commit) = writer.lock_commit(wait) else { return Ok(false) };
                    self.commit(writer, &mut commit)?;
                }
            }
        }
    }

    /// Makes room in the log for all that is reserved.
    pub(super) fn make_room(&self, writer: &Writer, commit: &mut Commit) -> Result<()> {
        if let Some(error) = writer.poisoned() {
            return Err(error);
        }
        let pages = writer.meta().page_count() as u64;
        writer.set_room(commit.make_room(self.storage(), pages)?);
        Ok(())
    }

    /// Settles freed space before the file would have to grow, when there is much of it. False when that takes longer than
    /// the caller can.
    fn settle_freed(&self, writer: &Writer, wait: Wait) -> Result<bool> {
        if writer.waiting_bytes() < WAITING_MAX {
            return Ok(true);
        }
        let wanted = !writer.meta().space.has_room(self.top().geometry().block_size());
        if wanted && wait == Wait::AtOnce {
            return Ok(false);
        }
        if wanted && let Some(mut commit) = writer.lock_commit(wait) {
            self.settle(writer, &mut commit, wait)?;
        }
        Ok(true)
    }

    /// Does something once more when there was no room for it, and freed space has become room.
    pub(super) fn with_room<T>(&self, writer: &Writer, wait: Wait, attempt: impl Fn() -> Result<T>) -> Result<T> {
        let error = match attempt() {
            Err(error) if is_full(&error) && writer.waiting_bytes() > 0 => error,
            other => return other,
        };
        let settled = writer.lock_commit(wait).is_some_and(|mut commit| self.settle(writer, &mut commit, wait).is_ok());
        if settled { attempt() } else { Err(error) } // the first error is the one to tell
    }

    /// Begins to change the mapping of a range inside one block, so that it can be written. The session has started, and
    /// the operation is counted. `None` when that means waiting and the caller must not.
    pub(super) fn begin(&self, writer: &Writer, range: &Range<u64>, wait: Wait) -> Result<Option<Change>> {
        let is_mapped = self.mapped(range)?.is_some();
        self.begin_as(writer, range, is_mapped, wait)
    }

    /// The same for a range that was mapped a moment ago, or was not.
    pub(super) fn begin_as(
        &self,
        writer: &Writer,
        range: &Range<u64>,
        mut is_mapped: bool,
        wait: Wait,
    ) -> Result<Option<Change>> {
        let block = self.top().geometry().block_of(GuestOffset(range.start));
        writer.fail_if_poisoned()?;
        loop {
            let found = if is_mapped {
                self.begin_mapped(writer, block, range, wait)?
            } else {
                self.begin_change(writer, block, range, wait)?
            };
            match found {
                Prepared::Ready(change) => return Ok(Some(change)),
                Prepared::Busy => return Ok(None),
                Prepared::Other => is_mapped = self.mapped(range)?.is_some(),
            }
        }
    }

    fn begin_mapped(&self, writer: &Writer, block: BlockIndex, range: &Range<u64>, wait: Wait) -> Result<Prepared> {
        let mut held = Held::new(writer, block, None);
        if !held.acquire(Hold::Use, wait) {
            return Ok(Prepared::Busy);
        }
        let Some(change) = self.use_mapped(writer, block, range, wait)? else { return Ok(Prepared::Other) };
        held.keep();
        Ok(Prepared::Ready(change))
    }

    fn begin_change(&self, writer: &Writer, block: BlockIndex, range: &Range<u64>, wait: Wait) -> Result<Prepared> {
        if !self.settle_freed(writer, wait)? {
            return Ok(Prepared::Busy);
        }
        let keys = self.keys_of(block);
        if !self.reserve(writer, &keys, wait)? {
            return Ok(Prepared::Busy);
        }
        let mut held = Held::new(writer, block, Some(keys));
        if !held.acquire(Hold::Change, wait) {
            return Ok(Prepared::Busy);
        }
        let Some(keys) = held.keys() else { return Ok(Prepared::Other) };
        match self.prepare(writer, block, range, keys, wait)? {
            Prepared::Ready(change) => {
                Ok(Prepared::Ready(self.ready_or_broken(writer, Change { keys: held.keep(), ..change })))
            }
            other => Ok(other),
        }
    }

    /// For the simulator: publishes before the payload is there.
    fn ready_or_broken(&self, writer: &Writer, change: Change) -> Change {
        if !writer.breaks(BrokenRule::PublishBeforeData) {
            return change;
        }
        let (block, file_offset) = (change.block, change.file_offset);
        writer.tokens.acquire(block, Hold::Use, Wait::Yes);
        self.finish(writer, change);
        Change::new(block, file_offset, Hold::Use)
    }

    /// Looks at a mapped range again under its token.
    fn use_mapped(&self, writer: &Writer, block: BlockIndex, range: &Range<u64>, wait: Wait) -> Result<Option<Change>> {
        let Some(file_offset) = self.mapped(range)? else { return Ok(None) };
        self.reach(writer, file_offset + (range.end - range.start), wait)?;
        Ok(Some(Change::new(block, file_offset, Hold::Use)))
    }

    /// Makes the file long enough for a block whose end it cuts off (old versions of QEMU leave such files).
    pub(super) fn reach(&self, writer: &Writer, end: u64, wait: Wait) -> Result<()> {
        if end <= self.view().physical_size() {
            return Ok(());
        }
        if self.grow(writer, wait, |length| (end > length).then_some(end))? {
            return Ok(());
        }
        Err(super::session::busy())
    }

    /// Looks at the block under its token, loads what will change, and finds space.
    fn prepare(
        &self,
        writer: &Writer,
        block: BlockIndex,
        range: &Range<u64>,
        keys: &Keys,
        wait: Wait,
    ) -> Result<Prepared> {
        let layer = self.top();
        let geometry = *layer.geometry();
        let entry = layer.bat().pin(geometry.payload_index(block), layer.rules(), layer.view())?;
        if self.mapped_by(entry, block, range)?.is_some() {
            return Ok(Prepared::Other);
        }
        let covers = *range == geometry.block_range(block);
        let in_block = geometry.offset_in_block(GuestOffset(range.start));
        let mut change = Change::new(block, entry.file_offset().0 + in_block, Hold::Change);
        let state = entry.payload_state();
        let part_of_child = geometry.is_differencing() && state == Some(PayloadState::NotPresent) && !covers;
        if state == Some(PayloadState::PartiallyPresent) || part_of_child {
            match self.prepare_bitmap(writer, &mut change, keys, wait) {
                Ok(true) => {}
                other => {
                    self.undo_bitmap(writer, &mut change);
                    return other.map(|_| Prepared::Busy);
                }
            }
        }
        if state == Some(PayloadState::PartiallyPresent) {
            change.kind = if covers { Kind::Full(None) } else { Kind::Bits(self.bits_of(range)) };
            return Ok(Prepared::Ready(change));
        }
        let own = entry.file_offset().0;
        // What an undefined or unmapped block kept is its own: only its own old data could ever show.
        let anchored = own != 0 && matches!(state, Some(PayloadState::Undefined | PayloadState::Unmapped));
        let given = if anchored {
            Ok(Some(Given { range: own..own + geometry.block_size(), holds: Holds::Stale }))
        } else {
            self.allocate(writer, geometry.block_size(), wait)
        };
        let zeroed = given.and_then(|given| {
            let Some(given) = given else { return Ok(None) };
            let zeroed = self.zero_rest(writer, &given, range, in_block, wait);
            if !matches!(zeroed, Ok(true)) && !anchored {
                give_back(&mut writer.meta(), &given);
            }
            zeroed.map(|zeroed| zeroed.then_some(given))
        });
        match zeroed {
            Ok(Some(given)) => {
                change.file_offset = given.range.start + in_block;
                change.kind = match (part_of_child, anchored) {
                    (true, _) => Kind::Partial(given, self.bits_of(range)),
                    (false, true) => Kind::Full(None),
                    (false, false) => Kind::Full(Some(given)),
                };
                Ok(Prepared::Ready(change))
            }
            other => {
                self.undo_bitmap(writer, &mut change);
                other.map(|_| Prepared::Busy)
            }
        }
    }

    /// Zeroes what a first write leaves of stale space. False where that takes longer than the caller can.
    fn zero_rest(&self, writer: &Writer, given: &Given, range: &Range<u64>, in_block: u64, wait: Wait) -> Result<bool> {
        if given.holds == Holds::Zero || writer.breaks(BrokenRule::StaleSpace) {
            return Ok(true);
        }
        if wait == Wait::AtOnce {
            return Ok(false);
        }
        let _phase = enter(Phase::Payload);
        let data = given.range.start + in_block..given.range.start + in_block + (range.end - range.start);
        for rest in [given.range.start..data.start, data.end..given.range.end] {
            if !rest.is_empty() {
                let start = rest.start;
                let zeroed = self.storage().zero_range(rest);
                zeroed.map_err(|error| Error::io(format!("cannot zero the new block at {start:#x}"), error))?;
            }
        }
        Ok(true)
    }

    /// Pins the pages of the block's bitmap; with a new bitmap block where its chunk has none. False when busy.
    fn prepare_bitmap(&self, writer: &Writer, change: &mut Change, keys: &Keys, wait: Wait) -> Result<bool> {
        let layer = self.top();
        let geometry = *layer.geometry();
        let chunk = geometry.chunk_of(change.block);
        layer.bat().pin(geometry.bitmap_index(chunk), layer.rules(), layer.view())?;
        loop {
            let there = {
                let mut meta = writer.meta();
                let entry = layer.bat().bitmap(chunk, layer.rules(), layer.view())?; // in memory: pinned
                if entry.0 == 0
                    && let Some(new) = meta.new_bitmaps.get_mut(&chunk)
                {
                    new.users += 1;
                    change.new_bitmap = Some(chunk);
                }
                entry
            };
            if there.0 != 0 || change.new_bitmap.is_some() {
                break;
            }
            let Some(given) = self.allocate(writer, BITMAP_BLOCK_BYTES, wait)? else { return Ok(false) };
            if given.holds == Holds::Stale && !writer.breaks(BrokenRule::BitmapNotZeroed) {
                let zeroed = self.storage().zero_range(given.range.clone());
                zeroed.map_err(|error| {
                    give_back(&mut writer.meta(), &given);
                    Error::io(format!("cannot zero the new sector bitmap at {:#x}", given.range.start), error)
                })?;
            }
            let mut meta = writer.meta();
            let taken = layer.bat().bitmap(chunk, layer.rules(), layer.view())?.0 != 0;
            if taken || meta.new_bitmaps.contains_key(&chunk) {
                give_back(&mut meta, &given); // somebody else was faster
            } else {
                meta.new_bitmaps.insert(chunk, NewBitmap { given, users: 0 });
            }
        }
        for key in keys.iter() {
            if let PageKey::Bitmap(key) = key {
                self.pin_bitmap_page(writer, key)?;
                change.pins.push(key);
            }
        }
        Ok(true)
    }

    /// Pins a page of a bitmap, one of a new bitmap as zeros. That it is still new is asked under the lock that publishes
    /// it: another block that shares the page may have been first, and its bits may be home already.
    fn pin_bitmap_page(&self, writer: &Writer, key: BitmapKey) -> Result<()> {
        let layer = self.top();
        let meta = writer.meta();
        let entry = layer.bat().bitmap(key.chunk, layer.rules(), layer.view())?; // in memory: pinned
        let mut offset = (entry.0 != 0).then(|| bitmap_page_offset(entry, key.page));
        if writer.breaks(BrokenRule::BitmapNotZeroed)
            && let Some(new) = meta.new_bitmaps.get(&key.chunk)
        {
            offset = Some(FileOffset(new.given.range.start + key.page * 4096));
        }
        if offset.is_some() {
            drop(meta); // the page may have to be read
            return layer.bitmaps().pin(key, offset, layer.view());
        }
        layer.bitmaps().pin(key, None, layer.view())
    }

    /// Lets go of the bitmap pages of a change, and of a new bitmap that nobody published.
    fn undo_bitmap(&self, writer: &Writer, change: &mut Change) {
        for key in change.pins.drain(..) {
            self.top().bitmaps().unpin(key);
        }
        let mut meta = writer.meta();
        if let Some(chunk) = change.new_bitmap.take()
            && let Some(new) = meta.new_bitmaps.get_mut(&chunk)
        {
            new.users = new.users.saturating_sub(1);
            if new.users == 0
                && let Some(new) = meta.new_bitmaps.remove(&chunk)
            {
                give_back(&mut meta, &new.given);
            }
        }
    }

    /// Takes free space, growing the file where there is none. `None` when that means waiting and the caller must not.
    fn allocate(&self, writer: &Writer, bytes: u64, wait: Wait) -> Result<Option<Given>> {
        loop {
            if let Some(given) = writer.meta().space.take(bytes) {
                return Ok(Some(given));
            }
            let wanted = |length: u64| {
                let room = writer.meta().space.has_room(bytes);
                (!room).then(|| length + bytes) // files end below 2^63
            };
            if !self.grow(writer, wait, wanted)? {
                return Ok(None);
            }
        }
    }

    /// Makes the file longer if `wanted` still says so, given its length. False when that means waiting and the caller must
    /// not.
    pub(super) fn grow(&self, writer: &Writer, wait: Wait, wanted: impl Fn(u64) -> Option<u64>) -> Result<bool> {
        let _growing = match wait {
            Wait::Yes => writer.growth.lock().unwrap_or_else(PoisonError::into_inner),
            Wait::No | Wait::AtOnce => match writer.growth.try_lock() {
                Ok(growing) => growing,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(), // it guards nothing that could be half done
                Err(TryLockError::WouldBlock) => return Ok(false),
            },
        };
        let length = self.view().physical_size();
        let Some(least) = wanted(length).and_then(|end| round_up(end, MIB)) else { return Ok(true) };
        let _phase = enter(Phase::Payload);
        // A fixed image is not cut when it is closed, so it does not grow by more than it needs.
        let step = if writer.is_fixed { least } else { round_up(length, MIB).unwrap_or(length) + GROWTH_STEP };
        let grown = match self.storage().set_len(least.max(step)) {
            // A step too far for a limit or a full device; what is needed may still fit.
            Err(_) if least < step => self.storage().set_len(least).map(|()| least),
            other => other.map(|()| least.max(step)),
        };
        let failed = |error: std::io::Error| {
            // A block device that is too small is as full as a file system can be.
            let full = error.kind() == std::io::ErrorKind::InvalidInput;
            let error = if full { std::io::Error::new(std::io::ErrorKind::StorageFull, error) } else { error };
            Error::io(format!("cannot make the file {least:#x} bytes long"), error)
        };
        let (new, zero) = match &grown {
            Ok(new) => (*new, self.storage().growth_reads_zero()),
            // It may have happened all the same.
            Err(_) => (self.storage().len().unwrap_or(length), false),
        };
        if new < length {
            let what = format!("the file had {length:#x} bytes and has {new:#x} now: somebody else cuts it");
            return Err(writer.poison(Error::new(ErrorKind::Locked, what)));
        }
        self.view().set_size(new);
        writer.meta().space.grown(new, zero);
        grown.map_err(failed).map(|_| true)
    }

    /// Publishes a change: readers and the next commit see it. Does no I/O.
    pub(super) fn finish(&self, writer: &Writer, mut change: Change) {
        let pins = std::mem::take(&mut change.pins);
        {
            let mut meta = writer.meta();
            self.publish(writer, &mut meta, &change);
            meta.unreserve(change.reserved());
            writer.wake(meta);
        }
        for key in pins {
            self.top().bitmaps().unpin(key);
        }
        writer.tokens.release(change.block, change.hold);
    }

    fn publish(&self, writer: &Writer, meta: &mut Meta, change: &Change) {
        let block = change.block;
        match &change.kind {
            Kind::Mapped => {}
            Kind::Full(given) => {
                let start = match given {
                    Some(given) => given.range.start,
                    None => self.own_space(block),
                };
                self.set_payload(meta, block, PayloadState::FullyPresent, start);
            }
            Kind::Partial(given, bits) => {
                let start = given.range.start;
                if !writer.breaks(BrokenRule::StaleBits) && !writer.breaks(BrokenRule::BitmapNotZeroed) {
                    let all = self.bits_of(&self.whole_block(block));
                    self.change_bits(meta, block, &all, false);
                }
                self.change_bits(meta, block, bits, true);
                self.publish_bitmap(meta, change.new_bitmap);
                self.set_payload(meta, block, PayloadState::PartiallyPresent, start);
            }
            Kind::Bits(bits) => {
                self.change_bits(meta, block, bits, true);
                if self.has_bits(block, &self.top().geometry().block_range(block)).unwrap_or(false) {
                    let start = self.own_space(block);
                    self.set_payload(meta, block, PayloadState::FullyPresent, start);
                }
            }
        }
    }

    /// A block's range, also behind the end of the disk.
    fn whole_block(&self, block: BlockIndex) -> Range<u64> {
        let geometry = self.top().geometry();
        let start = geometry.block_range(block).start;
        start..start + geometry.block_size() // below 2^46 + 2^28
    }

    /// Where a block's space begins that it owns already.
    fn own_space(&self, block: BlockIndex) -> u64 {
        let layer = self.top();
        layer.bat().payload(block, layer.rules(), layer.view()).map_or(0, |entry| entry.file_offset().0)
    }

    /// Publishes a new sector bitmap with the first block that needs it.
    fn publish_bitmap(&self, meta: &mut Meta, chunk: Option<ChunkIndex>) {
        if let Some(chunk) = chunk
            && let Some(new) = meta.new_bitmaps.remove(&chunk)
        {
            let index = self.top().geometry().bitmap_index(chunk);
            self.set_entry(meta, index, BITMAP_PRESENT, new.given.range.start);
        }
    }

    fn set_payload(&self, meta: &mut Meta, block: BlockIndex, state: PayloadState, file_offset: u64) {
        self.set_entry(meta, self.top().geometry().payload_index(block), state.number(), file_offset);
    }

    /// Changes an entry of the BAT in memory; its page is pinned.
    pub(super) fn set_entry(&self, meta: &mut Meta, index: BatIndex, state: u64, file_offset: u64) {
        let entry = BatEntry::new(state, FileOffset(file_offset));
        match self.top().bat().set(index, entry) {
            Ok(page) => {
                meta.mark_dirty(PageKey::Bat(page));
            }
            Err(error) => debug_assert!(false, "{error}: every page is pinned before it is changed"),
        }
    }

    /// Changes bits of a block in memory; their pages are pinned.
    fn change_bits(&self, meta: &mut Meta, block: BlockIndex, bits: &Range<u64>, value: bool) {
        let chunk = self.top().geometry().chunk_of(block);
        for page in bits.start / PAGE_BITS..bits.end.div_ceil(PAGE_BITS) {
            let key = BitmapKey { chunk, page };
            let first = page * PAGE_BITS;
            let inside = bits.start.max(first) - first..bits.end.min(first + PAGE_BITS) - first;
            self.top().bitmaps().change(key, |page| set_bits(page, inside, value));
            if meta.mark_dirty(PageKey::Bitmap(key)) {
                self.top().bitmaps().pin_again(key);
            }
        }
    }

    /// Undoes a change that was not finished. Its space is stale and free again, unless somebody may still write to it.
    pub(super) fn undo(&self, writer: &Writer, mut change: Change, reusable: bool) {
        self.undo_bitmap(writer, &mut change);
        {
            let mut meta = writer.meta();
            match (reusable, &change.kind) {
                (true, Kind::Full(Some(given)) | Kind::Partial(given, _)) => give_back(&mut meta, given),
                // New space stays marked; a place that the block owns must stay so when the block gives it up.
                (false, Kind::Mapped | Kind::Bits(_) | Kind::Full(None)) => {
                    meta.abandoned.insert(self.own_space(change.block));
                }
                _ => {}
            }
            meta.unreserve(change.reserved());
            writer.wake(meta);
        }
        writer.tokens.release(change.block, change.hold);
    }

    /// Takes a block's mapping away: `to` is ZERO or UNMAPPED. Only if its state is still one that `applies`. False when
    /// that means waiting and the caller must not.
    pub(super) fn clear_block(
        &self,
        writer: &Writer,
        block: BlockIndex,
        to: PayloadState,
        applies: impl Fn(PayloadState) -> bool,
        wait: Wait,
    ) -> Result<bool> {
        let layer = self.top();
        let index = layer.geometry().payload_index(block);
        let keys = Keys::one(PageKey::Bat(page_of(index)));
        if !self.reserve(writer, &keys, wait)? {
            return Ok(false);
        }
        let mut held = Held::new(writer, block, Some(keys));
        if !held.acquire(Hold::Alone, wait) {
            return Ok(false);
        }
        let entry = layer.bat().pin(index, layer.rules(), layer.view())?;
        if entry.payload_state().is_some_and(&applies) {
            let mut meta = writer.meta();
            self.set_payload(&mut meta, block, to, 0);
            let owned = layer.rules().owned_range(crate::format::geometry::BatSlot::Payload(block), entry);
            if let Some(owned) = owned {
                if writer.breaks(BrokenRule::FreeAtOnce) {
                    meta.space.give_back(&owned);
                } else {
                    writer.free(&mut meta, owned);
                }
            }
        }
        Ok(true)
    }
}

pub(super) fn give_back(meta: &mut Meta, given: &Given) {
    meta.space.give_back(&given.range);
}
