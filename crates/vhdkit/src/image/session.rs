//! A session of writing: how it starts with the first change, and how it ends.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shared;
use super::commit::{Commit, is_full};
use super::replay::{FileRing, ReplayReport};
use super::simulation::{BrokenRule, Phase, enter};
use super::tokens::Wait;
use super::writer::{Mode, Writer, read_only};
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::Code;
use crate::format::guid::Guid;
use crate::format::log::{Change, SECTOR, find_active_sequence};
use crate::sync::{MutexGuard, Ordering, TryLockError, fence};

/// How long closing waits for operations and plans under way, unless told otherwise.
pub(super) const CLOSE_WAIT: Duration = Duration::from_secs(60);
/// Zeros of a log that are longer become holes.
const HOLE_MIN: u64 = 1 << 20;
/// Longer than anybody waits; longer ones than the clock can count would overflow.
const WAIT_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What becomes of the data write GUID when a session starts ([MS-VHDX] 2.2.2: it changes with what the guest sees).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// The guest will see something else: a new one.
    New,
    /// The guest will see the same: it stays.
    Kept,
    /// As `New`, with one that was announced to the children before.
    Given(Guid),
}

impl Shared {
    /// Makes sure that the session has started: new write GUIDs in both headers, a dirty log replayed in place. False when
    /// it would have to wait and must not.
    pub(super) fn start(&self, writer: &Writer, wait: Wait) -> Result<bool> {
        self.start_session(writer, wait, Identity::New)
    }

    /// The same with an identity. In a session that has started already nothing happens.
    pub(super) fn start_session(&self, writer: &Writer, wait: Wait, identity: Identity) -> Result<bool> {
        if writer.started.load(Ordering::SeqCst) {
            return Ok(true);
        }
        let Some(mut commit) = writer.lock_commit(wait) else { return Ok(false) };
        if let Some(error) = writer.poisoned() {
            return Err(error);
        }
        if !writer.started.load(Ordering::SeqCst) {
            self.start_locked(writer, &mut commit, identity)?;
            writer.set_room(commit.make_room(self.storage(), 1)?);
            writer.started.store(true, Ordering::SeqCst);
            writer.set_ready(writer.mode() == Mode::Writable);
        }
        Ok(true)
    }

    fn start_locked(&self, writer: &Writer, commit: &mut Commit, identity: Identity) -> Result<()> {
        let _phase = enter(Phase::Start);
        let late = writer.breaks(BrokenRule::DataGuidLate);
        let data_write_guid = match identity {
            Identity::New if late => None,
            Identity::New => Some(writer.chosen().meanwhile.unwrap_or_else(Guid::random)),
            Identity::Kept => None,
            Identity::Given(guid) => Some(guid),
        };
        let old = commit.headers.current().file_write_guid;
        let file_write_guid = if writer.breaks(BrokenRule::FileGuidKept) { old } else { Guid::random() };
        if commit.headers.current().is_dirty() {
            self.update_headers(writer, commit, |header| header.file_write_guid = file_write_guid)?;
            return self.replay_in_place(writer, commit, data_write_guid);
        }
        self.update_headers(writer, commit, |header| {
            header.file_write_guid = file_write_guid;
            header.data_write_guid = data_write_guid.unwrap_or(header.data_write_guid);
        })
    }

    /// Puts the log into place ([MS-VHDX] 2.3.3). It was walked through and found good when the image was opened. Until
    /// the headers say that the log is empty, everything may be done again.
    fn replay_in_place(&self, writer: &Writer, commit: &mut Commit, data_write_guid: Option<Guid>) -> Result<()> {
        let _phase = enter(Phase::Replay);
        let applied = self.apply_log(writer, commit);
        applied.map_err(|error| if is_full(&error) { error } else { writer.poison(error) })?;
        if !writer.breaks(BrokenRule::ReplayClearEarly) {
            self.sync_for_close(writer, commit)?;
        }
        self.update_headers(writer, commit, |header| {
            header.log_guid = Guid::NIL;
            header.data_write_guid = data_write_guid.unwrap_or(header.data_write_guid);
        })?;
        self.view().drop_overlay();
        Ok(())
    }

    fn apply_log(&self, writer: &Writer, commit: &Commit) -> Result<()> {
        let (storage, view) = (self.storage(), self.view());
        let (size, there) = (view.size(), view.physical_size());
        if there < size {
            let grown = storage.set_len(size);
            grown.map_err(|error| Error::io(format!("cannot make the file {size:#x} bytes long"), error))?;
        }
        if writer.breaks(BrokenRule::ReplayFromRunStart) {
            self.apply_whole_run(commit)?;
        }
        for (range, is_zero) in view.changes() {
            let failed =
                |error| Error::io(format!("cannot put the log's change at {:#x} into place", range.start), error);
            if is_zero {
                // What the file grew by is zero already. A hole first: a log can name terabytes of zeros.
                let old = if storage.growth_reads_zero() { range.start..range.end.min(there) } else { range.clone() };
                // Pages of metadata keep their space: they are written again.
                if !old.is_empty() && !self.punch_long(&old).map_err(failed)? {
                    storage.zero_range(old).map_err(failed)?;
                }
            } else {
                storage.write_at(&view.read_vec(range.clone())?, range.start).map_err(failed)?;
            }
        }
        view.set_size(size);
        Ok(())
    }

    /// Makes a hole of a long range; false, with nothing changed, for a short one, or where that cannot be done.
    fn punch_long(&self, range: &Range<u64>) -> std::io::Result<bool> {
        if range.end - range.start > HOLE_MIN { self.storage().punch_hole(range.clone()) } else { Ok(false) }
    }

    /// For the simulator: replays what is retired too, as a reader that ignores the tail would.
    fn apply_whole_run(&self, commit: &Commit) -> Result<()> {
        let header = commit.headers.current();
        let mut ring = FileRing::new(self.storage().as_ref(), header);
        let Some(sequence) = find_active_sequence(&mut ring, header.log_guid)? else { return Ok(()) };
        let mut changes: Vec<(u64, u64, [u8; 8], [u8; 4])> = Vec::new();
        super::replay::walk_stale(&mut ring, &sequence, header, &mut |change| {
            if let Change::Page { file_offset, sector, leading, trailing } = change {
                changes.push((file_offset, sector, leading, trailing));
            }
        })?;
        for (file_offset, sector, leading, trailing) in changes {
            let at = header.log_offset + sector * SECTOR;
            let mut bytes = [0; 4096];
            let read = self.storage().read_at(&mut bytes, at);
            read.map_err(|error| Error::io("cannot read the log", error))?;
            let page = crate::format::log::page(&bytes, leading, trailing);
            let wrote = self.storage().write_at(&page, file_offset);
            wrote.map_err(|error| Error::io("cannot write", error))?;
        }
        Ok(())
    }

    /// Puts a dirty log into place now instead of with the first change. `None` when the log is clean.
    pub(super) fn replay_now(&self) -> Result<Option<ReplayReport>> {
        let writer = self.writer.get().ok_or_else(read_only)?;
        let _active = writer.enter()?;
        let Some(mut commit) = writer.lock_commit(Wait::Yes) else { return Ok(None) };
        writer.fail_if_poisoned()?;
        if !commit.headers.current().is_dirty() || writer.started.load(Ordering::SeqCst) {
            return Ok(None);
        }
        self.start_locked(writer, &mut commit, Identity::Kept)?;
        // The file write GUID is new; a visible change later still needs a new data write GUID, which a session that
        // starts then gives it.
        Ok(self.top().replay().cloned())
    }

    /// Ends the session: what is under way ends first, then everything is committed and home, and the log is clean.
    pub(super) fn end(&self, wait: Duration, then: Mode) -> Result<()> {
        let Some(writer) = self.writer.get() else { return Ok(()) };
        let deadline = Instant::now() + wait.min(WAIT_MAX);
        if !writer.change_mode(Mode::Writable, Mode::Closing) {
            return match writer.mode() {
                Mode::Closing => Err(Error::new(ErrorKind::Busy, "the image is being closed already")),
                Mode::ReadOnly => {
                    writer.set_mode(then);
                    Ok(())
                }
                _ => Ok(()),
            };
        }
        writer.set_ready(false);
        let left = || deadline.saturating_duration_since(Instant::now());
        let is_idle = writer.wait_idle(left());
        // Once more: a first change that was under way may have said that writing is simple now.
        writer.set_ready(false);
        let result = if is_idle && self.gate.is_quiet(left()) {
            let commit = writer.lock_commit(if wait.is_zero() { Wait::No } else { Wait::Yes });
            commit.map_or_else(|| Err(busy()), |mut commit| self.end_locked(writer, &mut commit))
        } else {
            Err(busy())
        };
        match result {
            Ok(()) => {
                writer.started.store(false, Ordering::SeqCst);
                writer.set_mode(then);
                Ok(())
            }
            Err(error) => {
                // In this order: from the second on, somebody else may end the session.
                writer.set_ready(writer.started.load(Ordering::SeqCst));
                writer.set_mode(Mode::Writable);
                Err(error)
            }
        }
    }

    fn end_locked(&self, writer: &Writer, commit: &mut Commit) -> Result<()> {
        if let Some(error) = writer.poisoned() {
            return Err(error);
        }
        if !writer.started.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.commit(writer, commit)?;
        let _phase = enter(Phase::Close);
        if writer.breaks(BrokenRule::DataGuidLate) {
            self.update_headers(writer, commit, |header| header.data_write_guid = Guid::random())?;
        }
        let afterwards = writer.chosen().afterwards;
        if commit.ring.is_none() {
            if let Some(guid) = afterwards {
                self.sync_for_close(writer, commit)?;
                self.update_headers(writer, commit, |header| header.data_write_guid = guid)?;
            }
            self.cut(writer)?;
            return Ok(());
        }
        if writer.breaks(BrokenRule::CutBeforeClear) {
            self.cut(writer)?;
        }
        if !writer.breaks(BrokenRule::ClearBeforeHome) {
            self.sync_for_close(writer, commit)?;
        }
        self.update_headers(writer, commit, |header| {
            header.log_guid = Guid::NIL;
            header.data_write_guid = afterwards.unwrap_or(header.data_write_guid);
        })?;
        commit.ring = None;
        // Readers come and go; but those who were inside after the last change have left before this began.
        self.retire_all(writer, commit);
        self.cut(writer)
    }

    /// Cuts the file behind the last thing that is owned. Fixed images stay as long as they are.
    pub(super) fn cut(&self, writer: &Writer) -> Result<()> {
        let cuts = writer.cuts.load(Ordering::SeqCst);
        if writer.is_fixed && !cuts {
            return Ok(());
        }
        let (end, has_moved) = {
            let meta = writer.meta();
            (meta.space.used_end().saturating_add(writer.kept.load(Ordering::SeqCst)), meta.space.has_moved())
        };
        if !(has_moved || cuts) || end >= self.view().physical_size() {
            return Ok(()); // what trails behind is somebody else's
        }
        let cut = self.storage().set_len(end);
        // Also when that failed, the file may be shorter now; a block device stays as long as it is.
        let length = self.storage().len();
        let length = length
            .map_err(|error| writer.poison(Error::io("cannot tell the length of the file after cutting it", error)))?;
        if length < self.view().physical_size() {
            writer.meta().space.cut(length);
            self.view().set_size(length);
        }
        // Everything is durable and the log is clean: what trails behind is leaked space and no more.
        cut.map_err(|error| Error::io(format!("cannot cut the file to {end:#x} bytes"), error))?;
        let synced = self.storage().sync();
        synced.map_err(|error| writer.poison(Error::io("cannot make the cut file durable", error)))
    }

    /// Starts the session now, with a data write GUID of the caller's: by it, whoever finds the image after a crash knows
    /// what was being done to it.
    pub(super) fn start_as(&self, guid: Guid) -> Result<()> {
        let writer = self.writer.get().ok_or_else(read_only)?;
        let _active = writer.enter()?;
        if writer.started.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::InvalidArgument, "the session of writing has started already"));
        }
        writer.chosen().meanwhile = Some(guid);
        let started = self.start(writer, Wait::Yes).map(|_| ());
        writer.chosen().meanwhile = None;
        started
    }

    /// Ends the session for good; with the last update of the headers, when everything else is durable, the disk gets the
    /// data write GUID of one that holds the same.
    pub(super) fn close_as(&self, wait: Duration, guid: Guid) -> Result<()> {
        let writer = self.writer.get().ok_or_else(read_only)?;
        if !writer.started.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::InvalidArgument, "there is no session of writing to end"));
        }
        writer.chosen().afterwards = Some(guid);
        let closed = self.close(wait);
        // Ended later, by whomever, it is not what the caller meant any more.
        writer.chosen().afterwards = None;
        closed
    }

    /// Ends the session for good.
    pub(super) fn close(&self, wait: Duration) -> Result<()> {
        let _turning = self.turn()?;
        self.end(wait, Mode::Closed)
    }

    /// The right to close or reopen. Nobody waits for it: who has it may wait for plans.
    fn turn(&self) -> Result<MutexGuard<'_, ()>> {
        match self.turning.try_lock() {
            Ok(turning) => Ok(turning),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Error::new(ErrorKind::Busy, "another thread closes or reopens the image").with_hint("try again"))
            }
        }
    }

    /// Changes between reading and writing on the live handle.
    pub(super) fn reopen(&self, write: bool) -> Result<()> {
        let _turning = self.turn()?;
        if !write {
            let was_writable = self.writer.get().is_some_and(|writer| writer.mode() == Mode::Writable);
            self.end(CLOSE_WAIT, Mode::ReadOnly)?;
            let changed = self.storage().set_access(false);
            if let (Err(_), true, Some(writer)) = (&changed, was_writable, self.writer.get()) {
                writer.set_mode(Mode::Writable); // as it was; the next change starts a new session
            }
            return changed;
        }
        match self.writer.get().map(Writer::mode) {
            Some(Mode::Writable) => return Ok(()),
            Some(Mode::Closed) => return Err(Error::new(ErrorKind::ReadOnly, "the image was closed")),
            Some(Mode::Closing) => return Err(busy()),
            Some(Mode::ReadOnly) | None => {}
        }
        self.storage().set_access(true)?;
        let admitted = match self.writer.get() {
            Some(writer) => match writer.poisoned() {
                Some(error) => Err(error),
                None if self.loose_plans.load(Ordering::SeqCst) > 0 => Err(busy()),
                None => {
                    writer.set_mode(Mode::Writable);
                    Ok(())
                }
            },
            None => self.admit(),
        };
        if admitted.is_err() {
            let _ = self.storage().set_access(false); // the first error is the one to tell
        }
        admitted
    }

    /// Checks what a writer needs and makes one. Nothing is written.
    pub(super) fn admit(&self) -> Result<()> {
        let layer = self.top();
        let writer = super::admission::admit(layer, &self.admission).map_err(|error| layer.name_error(error))?;
        let set = self.writer.set(writer);
        set.map_err(|_| Error::new(ErrorKind::Busy, "another thread opens the image for writing"))?;
        fence(Ordering::SeqCst);
        // From here on plans hold tokens; those from before do not.
        if self.loose_plans.load(Ordering::SeqCst) > 0 {
            return Err(busy());
        }
        if let Some(writer) = self.writer.get() {
            writer.set_mode(Mode::Writable);
        }
        Ok(())
    }
}

pub(super) fn busy() -> Error {
    Error::new(ErrorKind::Busy, "operations or plans on the image are still under way")
        .with_hint("finish or drop them, then try again")
}

/// The error for a dirty log that may not be replayed.
pub(super) fn needs_replay() -> Error {
    let what = "the log holds changes that are not in place yet: the image was not closed, or somebody uses it who cannot be \
                seen from here (Windows, through WSL or a share)";
    Error::new(ErrorKind::NeedsReplay, what).with_code(Code::LogNeedsReplay).with_hint(
        "make sure that nobody uses the image, then allow its log to be replayed (--replay, or `vhdkit replay`)",
    )
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Some(writer) = self.writer.get() else { return };
        if !writer.is_poisoned() && !std::thread::panicking() {
            // Nobody is left to be told; what was flushed is safe in any case.
            let _ = self.end(Duration::from_secs(1), Mode::Closed);
        }
    }
}

/// The storage and layer that are written.
impl Shared {
    pub(super) fn storage(&self) -> &Arc<dyn crate::storage::Storage> {
        self.top().storage()
    }

    pub(super) fn view(&self) -> &super::view::View {
        self.top().view()
    }
}
