//! The commit: how changes in memory become durable.
//!
//! ```text
//! take     under meta, at one instant: the images of all dirty pages, the pending frees, the last file offset
//! sync     payload and growth are durable, and earlier home writes: every earlier entry is retired now
//! append   the images, as one entry whose tail is itself
//! sync     the intent is durable; from here on a crash replays it
//! home     the images, never the memory of a later moment
//! retire   what was freed with this commit becomes reusable, once its home writes are durable
//! ```
//!
//! docs/durability.md says why, and which test shows it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::bat::bitmap_page_offset;
use super::flushes::Turn;
use super::gate::Moment;
use super::headers::HeaderPair;
use super::ring::{LogRing, pages_max};
use super::simulation::{BrokenRule, Phase, enter};
use super::tokens::Wait;
use super::writer::{Meta, PageKey, Taken, TakenPage, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{Header, Headers};
use crate::format::log::{PageToLog, SECTOR};
use crate::storage::Storage;
use crate::sync::Ordering;
use crate::units::MIB;

/// How long a commit waits for reads and writes that may still use freed space, before it leaves that for the next.
const QUIET_WAIT: Duration = Duration::from_micros(200);
/// The same for who needs that space now.
const SETTLE_WAIT: Duration = Duration::from_millis(20);
/// Pages written home at once.
const HOME_RUN_MAX: usize = 64;

/// What belongs to the commit lock.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) headers: HeaderPair,
    /// The log, once the header names its GUID.
    pub(super) ring: Option<LogRing>,
    /// The log that will be opened, made real before anything is written: a commit must not fail for lack of room in it.
    spare_ring: Option<LogRing>,
    /// Pages whose entry is durable, but that could not be written home for lack of space.
    unhomed: BTreeMap<u64, TakenPage>,
    /// Freed; home writes issued, not known to be durable.
    cooling: Vec<Range<u64>>,
    /// Freed, and home for certain.
    cooled: Vec<Range<u64>>,
    /// The same; whoever may have seen the old mapping was inside at that moment.
    leaving: Option<(Moment, Vec<Range<u64>>)>,
    /// The file length that is known to be durable.
    durable_length: u64,
    /// Flushes up to this ticket are satisfied.
    done_ticket: u64,
    /// The last file offset when the session began; for the simulator.
    first_last_offset: u64,
}

impl Commit {
    pub(super) fn new(headers: &Headers) -> Self {
        Self {
            headers: HeaderPair::new(headers),
            ring: None,
            spare_ring: None,
            unhomed: BTreeMap::new(),
            cooling: Vec::new(),
            cooled: Vec::new(),
            leaving: None,
            durable_length: 0,
            done_ticket: 0,
            first_last_offset: 0,
        }
    }

    /// The log that would be opened next is somewhere else now.
    pub(super) fn forget_spare_ring(&mut self) {
        self.spare_ring = None;
    }

    /// Makes room in the log for so many pages in the next entry, and some to spare. Gives how many it is enough for.
    pub(super) fn make_room(&mut self, storage: &Arc<dyn Storage>, pages: u64) -> Result<u64> {
        let header = self.headers.current();
        let ring = match &mut self.ring {
            Some(ring) => ring,
            None => self.spare_ring.get_or_insert_with(|| LogRing::new(header)),
        };
        if ring.room() < pages {
            let more = ring.prepare(storage, pages.next_power_of_two().min(pages_max(header.log_length)));
            if ring.room() < pages {
                more?; // what was to spare may be missing
            }
        }
        Ok(ring.room())
    }
}

/// True for an error that goes away when room is made.
pub(super) fn is_full(error: &Error) -> bool {
    use std::io::ErrorKind as Io;
    error.io_error().is_some_and(|error| matches!(error.kind(), Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge))
}

impl Shared {
    /// Makes everything durable that was written before the call. False when it would have to wait and must not.
    pub(super) fn flush_with(&self, wait: Wait) -> Result<bool> {
        let Some(writer) = self.writer.get() else { return Ok(true) };
        if let Some(error) = writer.poisoned() {
            return Err(error);
        }
        if !writer.started.load(Ordering::SeqCst) {
            return Ok(true);
        }
        let ticket = writer.flushes.ask();
        let lead = match writer.flushes.turn(ticket, wait) {
            Turn::Done => return Ok(true),
            Turn::Busy => return Ok(false),
            Turn::Lead(lead) => lead,
        };
        let Some(mut commit) = writer.lock_commit(wait) else { return Ok(false) };
        if commit.done_ticket < ticket {
            self.commit(writer, &mut commit)?;
        }
        lead.done(commit.done_ticket);
        Ok(true)
    }

    /// Syncs the file. What was written home before is durable then.
    fn sync(&self, writer: &Writer, commit: &mut Commit) -> Result<()> {
        let length = self.view().physical_size();
        let synced = self.storage().sync();
        synced.map_err(|error| writer.poison(Error::io("cannot make what was written durable", error)))?;
        commit.durable_length = length;
        if commit.unhomed.is_empty() {
            commit.cooled.append(&mut commit.cooling);
        }
        Ok(())
    }

    /// One commit, as the module says. When it fails for lack of space, nothing is lost and the next one tries again.
    pub(super) fn commit(&self, writer: &Writer, commit: &mut Commit) -> Result<()> {
        if let Some(error) = writer.poisoned() {
            return Err(error);
        }
        let late = writer.breaks(BrokenRule::TailTooEarly);
        if !late {
            self.write_home(writer, commit, Vec::new())?;
        }
        let early = if writer.breaks(BrokenRule::TakeAfterSync) { None } else { Some(self.take(writer)?) };
        let ready = self.make_ready(writer, commit, early.as_ref());
        if let (Err(_), Some(taken)) = (&ready, &early) {
            self.put_back(writer, taken);
        }
        ready?;
        let taken = match early {
            Some(taken) => taken,
            None => self.take(writer)?,
        };
        let _phase = enter(Phase::Log);
        if late {
            self.write_home(writer, commit, Vec::new())?;
        }
        self.retire(writer, commit, QUIET_WAIT);
        if taken.pages.is_empty() {
            commit.done_ticket = Self::satisfied(writer, &taken);
            return Ok(());
        }
        if let Err(error) = self.log(writer, commit, &taken) {
            self.put_back(writer, &taken);
            return Err(error);
        }
        commit.done_ticket = Self::satisfied(writer, &taken);
        self.let_go(writer, &taken);
        let _phase = enter(Phase::Home);
        let Taken { pages, mut frees, .. } = taken;
        if writer.breaks(BrokenRule::FreeAfterTake) {
            frees.append(&mut writer.meta().frees);
        }
        commit.cooling.append(&mut frees);
        let pages = if writer.breaks(BrokenRule::HomeFromMemory) { self.images_now(writer, pages) } else { pages };
        if late {
            commit.unhomed.extend(pages.into_iter().map(|page| (page.file_offset, page)));
            return Ok(());
        }
        match self.write_home(writer, commit, pages) {
            Err(error) if !is_full(&error) => return Err(error),
            _ => {} // what found no room is in the log, and is tried again
        }
        // Operations under way had room where the entry stands now. When none is found for them here, the commit that needs
        // it says so.
        let _ = self.make_room(writer, commit);
        Ok(())
    }

    /// The flushes that a commit satisfies: those asked for before it took its pages.
    fn satisfied(writer: &Writer, taken: &Taken) -> u64 {
        if writer.breaks(BrokenRule::FlushJoined) { writer.flushes.newest() } else { taken.ticket }
    }

    /// Makes the payload of what was taken durable, and opens the log if it is needed.
    fn make_ready(&self, writer: &Writer, commit: &mut Commit, taken: Option<&Taken>) -> Result<()> {
        let logs = taken.is_none_or(|taken| !taken.pages.is_empty());
        if logs && commit.ring.is_none() {
            self.open_log(writer, commit)?;
        }
        if logs && writer.breaks(BrokenRule::LogBeforeData) {
            return Ok(());
        }
        let _phase = enter(Phase::Log);
        self.sync(writer, commit)
    }

    /// Copies everything dirty at one instant. From then on it is clean.
    fn take(&self, writer: &Writer) -> Result<Taken> {
        let mut meta = writer.meta();
        let ticket = writer.flushes.newest();
        let keys = meta.take_dirty();
        let mut taken = Taken { ticket, last_file_offset: meta.space.high(), ..Taken::default() };
        for key in keys {
            let Some(page) = self.image(&meta, key) else {
                drop(meta);
                let what = format!("the page {key:?} is not fit to be written");
                return Err(writer.poison(Error::new(ErrorKind::Corrupt, what)));
            };
            taken.pages.push(page);
        }
        taken.frees = std::mem::take(&mut meta.frees);
        Ok(taken)
    }

    /// The image of a page in memory.
    fn image(&self, meta: &Meta, key: PageKey) -> Option<TakenPage> {
        let layer = self.top();
        match key {
            PageKey::Bat(number) => {
                let file_offset = layer.rules().bat_offset.0 + number * SECTOR; // inside the BAT region
                let bytes = Arc::new(layer.bat().page_bytes(number)?);
                Some(TakenPage { key, file_offset, bytes })
            }
            PageKey::Raw(file_offset) => Some(TakenPage { key, file_offset, bytes: meta.raw(file_offset)? }),
            PageKey::Bitmap(bitmap) => {
                let entry = layer.bat().bitmap(bitmap.chunk, layer.rules(), layer.view()).ok()?;
                let file_offset = bitmap_page_offset(entry, bitmap.page).0;
                Some(TakenPage { key, file_offset, bytes: layer.bitmaps().held(bitmap)? })
            }
        }
    }

    /// For the simulator: everything that is dirty now as well.
    fn images_now(&self, writer: &Writer, mut pages: Vec<TakenPage>) -> Vec<TakenPage> {
        let meta = writer.meta();
        for page in meta.dirty_keys().filter_map(|key| self.image(&meta, key)) {
            pages.retain(|older| older.key != page.key);
            self.pin(&page);
            pages.push(page);
        }
        pages
    }

    /// A commit could not log what it took: it is dirty again.
    fn put_back(&self, writer: &Writer, taken: &Taken) {
        let mut meta = writer.meta();
        for page in &taken.pages {
            let new = meta.mark_dirty(page.key);
            // The pin for being dirty came along with the page; one is enough.
            if let (false, PageKey::Bitmap(key)) = (new, page.key) {
                self.top().bitmaps().unpin(key);
            }
        }
        meta.frees.extend(taken.frees.iter().cloned());
        drop(meta);
        self.let_go(writer, taken);
    }

    /// What a commit took needs no room in the next entry any more, or counts as dirty again.
    fn let_go(&self, writer: &Writer, taken: &Taken) {
        writer.unreserve(taken.pages.iter().map(|page| page.key));
    }

    /// Appends an entry and makes it durable.
    fn log(&self, writer: &Writer, commit: &mut Commit, taken: &Taken) -> Result<()> {
        let Some(mut ring) = commit.ring.take() else {
            return Err(Error::new(ErrorKind::InvalidArgument, "there is no log to write to"));
        };
        let logged = self.log_into(writer, commit, &mut ring, taken);
        writer.set_room(ring.room());
        commit.ring = Some(ring);
        logged
    }

    fn log_into(&self, writer: &Writer, commit: &mut Commit, ring: &mut LogRing, taken: &Taken) -> Result<()> {
        ring.prepare(self.storage(), taken.pages.len() as u64)?;
        let mut pages: Vec<TakenPage> = taken.pages.clone();
        if writer.breaks(BrokenRule::PageFromDisk) {
            self.patch_file_pages(&mut pages);
        }
        let pages: Vec<PageToLog<'_>> =
            pages.iter().map(|page| PageToLog { file_offset: page.file_offset, bytes: &page.bytes }).collect();
        let length = if writer.breaks(BrokenRule::FlushedOffsetAhead) {
            self.view().physical_size()
        } else {
            commit.durable_length
        };
        let frozen = writer.breaks(BrokenRule::LastOffsetFrozen);
        let last = if frozen { commit.first_last_offset } else { taken.last_file_offset };
        let over = writer.breaks(BrokenRule::RingReuse);
        let flushed = length - length % MIB;
        if writer.breaks(BrokenRule::HomeBeforeLogSync) {
            taken.pages.iter().for_each(|page| self.pin(page));
            self.write_home(writer, commit, taken.pages.clone())?;
        }
        let (first, rest) = pages.split_at(if writer.breaks(BrokenRule::SplitEntry) { 1 } else { pages.len() });
        let mut appended = ring.append(self.storage(), first, flushed, last, over);
        if !rest.is_empty() && appended.is_ok() {
            appended = ring.append(self.storage(), rest, flushed, last, over);
        }
        appended.map_err(|error| writer.poison(error))?;
        self.sync(writer, commit)
    }

    /// For the simulator: pages that take over only what differs from the file in the entries changed last.
    fn patch_file_pages(&self, pages: &mut [TakenPage]) {
        for page in pages {
            let mut bytes = [0; 4096];
            if self.storage().read_at(&mut bytes, page.file_offset).is_err() {
                continue;
            }
            // Only the last entry that differs comes from memory.
            let differs =
                |index: &usize| page.bytes.get(index * 8..index * 8 + 8) != bytes.get(index * 8..index * 8 + 8);
            if let Some(index) = (0..512).rev().find(differs)
                && let (Some(to), Some(from)) =
                    (bytes.get_mut(index * 8..index * 8 + 8), page.bytes.get(index * 8..index * 8 + 8))
            {
                to.copy_from_slice(from);
            }
            page.bytes = Arc::new(bytes);
        }
    }

    /// Writes pages home whose entry is durable, and those that found no room before.
    pub(super) fn write_home(&self, writer: &Writer, commit: &mut Commit, pages: Vec<TakenPage>) -> Result<()> {
        for page in pages {
            if let Some(older) = commit.unhomed.insert(page.file_offset, page) {
                self.unpin(&older);
            }
        }
        while !commit.unhomed.is_empty() {
            let mut run: Vec<&TakenPage> = Vec::new();
            for page in commit.unhomed.values() {
                let follows = run.last().is_none_or(|last| last.file_offset + SECTOR == page.file_offset);
                if !follows || run.len() == HOME_RUN_MAX {
                    break;
                }
                run.push(page);
            }
            let Some(start) = run.first().map(|page| page.file_offset) else { break };
            let bytes: Vec<u8> = run.iter().flat_map(|page| page.bytes.iter().copied()).collect();
            let count = run.len() as u64;
            if let Err(error) = self.storage().write_at(&bytes, start) {
                let error = Error::io(format!("cannot write metadata at {start:#x}"), error);
                return Err(if is_full(&error) { error } else { writer.poison(error) });
            }
            for number in 0..count {
                if let Some(page) = commit.unhomed.remove(&(start + number * SECTOR)) {
                    self.unpin(&page);
                }
            }
        }
        Ok(())
    }

    fn pin(&self, page: &TakenPage) {
        if let PageKey::Bitmap(key) = page.key {
            self.top().bitmaps().pin_again(key);
        }
    }

    fn unpin(&self, page: &TakenPage) {
        if let PageKey::Bitmap(key) = page.key {
            self.top().bitmaps().unpin(key);
        }
    }

    /// Gives freed space back whose unmapping is home for certain, unless somebody may still use it: then the next commit
    /// looks again.
    pub(super) fn retire(&self, writer: &Writer, commit: &mut Commit, wait: Duration) {
        // What has waited since an earlier commit first; then what is new.
        for _ in 0..2 {
            let (moment, ranges) = match commit.leaving.take() {
                Some(leaving) => leaving,
                None if commit.cooled.is_empty() => return,
                None => (self.gate.moment(), std::mem::take(&mut commit.cooled)),
            };
            let ignored = writer.breaks(BrokenRule::GateIgnored);
            if !ignored && !self.gate.has_passed_within(moment, wait) {
                commit.leaving = Some((moment, ranges));
                return;
            }
            self.give_ranges_back(writer, ranges);
        }
    }

    /// The same at the end of a session, when whoever was inside after the last change has left.
    pub(super) fn retire_all(&self, writer: &Writer, commit: &mut Commit) {
        let leaving = commit.leaving.take().map(|(_, ranges)| ranges);
        let ranges = leaving.into_iter().flatten().chain(std::mem::take(&mut commit.cooled)).collect();
        self.give_ranges_back(writer, ranges);
    }

    fn give_ranges_back(&self, writer: &Writer, mut ranges: Vec<Range<u64>>) {
        let _phase = enter(Phase::Retire);
        // What lies side by side goes at once: a file system takes nearly as long for little as for much.
        ranges.sort_unstable_by_key(|range| range.start);
        for side_by_side in ranges.chunk_by(|one, next| one.end == next.start) {
            if let (Some(first), Some(last)) = (side_by_side.first(), side_by_side.last()) {
                // It is stale whether or not the file system took it back.
                let _ = self.storage().punch_hole(first.start..last.end);
            }
            for range in side_by_side {
                give_back(&mut writer.meta(), range);
                writer.given_back(range);
            }
        }
        writer.wake(writer.meta());
    }

    /// Commits and syncs until what was freed can be used again.
    pub(super) fn settle(&self, writer: &Writer, commit: &mut Commit, wait: Wait) -> Result<()> {
        self.commit(writer, commit)?;
        self.sync(writer, commit)?;
        self.retire(writer, commit, if wait == Wait::Yes { SETTLE_WAIT } else { QUIET_WAIT });
        Ok(())
    }

    /// Begins a log session: an entry first, then the GUID that points to it (W-021).
    fn open_log(&self, writer: &Writer, commit: &mut Commit) -> Result<()> {
        let _phase = enter(Phase::Start);
        commit.make_room(self.storage(), 1)?;
        let mut ring = commit.spare_ring.take().unwrap_or_else(|| LogRing::new(commit.headers.current()));
        let last = writer.meta().space.high();
        commit.first_last_offset = last;
        let guid = ring.guid();
        if writer.breaks(BrokenRule::GuidBeforeEntry) {
            self.update_headers(writer, commit, |header| header.log_guid = guid)?;
        }
        let flushed = commit.durable_length - commit.durable_length % MIB;
        ring.append(self.storage(), &[], flushed, last, false).map_err(|error| writer.poison(error))?;
        self.sync(writer, commit)?;
        if !writer.breaks(BrokenRule::GuidBeforeEntry) {
            self.update_headers(writer, commit, |header| header.log_guid = guid)?;
        }
        commit.ring = Some(ring);
        Ok(())
    }

    /// Changes both headers, one after the other, each durable before the next (W-001, W-027).
    pub(super) fn update_headers(
        &self,
        writer: &Writer,
        commit: &mut Commit,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut wanted = *commit.headers.current();
        change(&mut wanted);
        let clears = commit.headers.current().is_dirty() && !wanted.is_dirty();
        let copies = if clears && writer.breaks(BrokenRule::ClearOneSlot) { 1 } else { 2 };
        for copy in 0..copies {
            commit.headers.verify(self.storage()).map_err(|error| writer.poison(error))?;
            let written = commit.headers.write_next(self.storage(), &wanted);
            let header = written.map_err(|error| writer.poison(error))?;
            if !(copy == 0 && writer.breaks(BrokenRule::HeadersTogether)) {
                self.sync(writer, commit)?;
            }
            commit.headers.written(header);
        }
        Ok(())
    }

    /// Syncs for who ends a session.
    pub(super) fn sync_for_close(&self, writer: &Writer, commit: &mut Commit) -> Result<()> {
        self.write_home(writer, commit, Vec::new())?;
        self.sync(writer, commit)
    }
}

fn give_back(meta: &mut Meta, range: &Range<u64>) {
    meta.space.give_back(range);
}
