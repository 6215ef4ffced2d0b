//! What an image has in memory while it may be written.
//!
//! ```text
//! Locks, acquired downwards, never upwards:
//!   1. admission    nothing held: the session is started, pages of the next log entry are reserved
//!   2. commit       one at a time; the only lock held across a sync; never taken while a token or meta is held
//!   3. block token  owned, by block number, may cross threads (tokens.rs)
//!   4. growth       one at a time makes the file longer
//!   5. meta         free space, dirty pages; held for microseconds, no I/O
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bitmap::BitmapKey;
use super::commit::Commit;
use super::flushes::Flushes;
use super::ring::pages_max;
use super::simulation::BrokenRule;
use super::space::{Given, Space};
use super::tokens::{Hold, Tokens, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::header::Header;
use crate::sync::{
    AtomicBool, AtomicU8, AtomicU64, Condvar, Mutex, MutexGuard, OnceLock, Ordering, PoisonError, TryLockError,
};
use crate::units::{BlockIndex, ChunkIndex};

/// Bytes of a page of metadata.
pub(super) type PageBytes = [u8; 4096];

/// A page that commits write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum PageKey {
    /// A page of the BAT, by number.
    Bat(u64),
    /// A page of a sector bitmap.
    Bitmap(BitmapKey),
    /// Any other page of metadata, by file offset.
    Raw(u64),
}

/// The pages that changing a block can touch: its page of the BAT, and in a differencing disk those of the sector bitmap.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) bat: PageKey,
    pub(super) others: Vec<PageKey>,
}

impl Keys {
    pub(super) fn one(bat: PageKey) -> Self {
        Self { bat, others: Vec::new() }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = PageKey> + '_ {
        std::iter::once(self.bat).chain(self.others.iter().copied())
    }

    fn count(&self) -> usize {
        1 + self.others.len()
    }
}

/// What came of asking for pages of the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reserved {
    /// They are reserved.
    Yes,
    /// They are reserved, but the log may have holes where the entry goes.
    WithoutRoom,
    /// A commit would free pages.
    Full,
    /// Others have reserved all, and the caller does not wait.
    Busy,
}

/// Why a page counts towards the next entry.
#[derive(Clone, Copy, Debug, Default)]
struct PageUse {
    /// Changed since the last commit took its pages.
    dirty: bool,
    /// So many operations under way may change it.
    reserved: u32,
}

/// Space for a sector bitmap that first writes under way will publish.
#[derive(Debug)]
pub(super) struct NewBitmap {
    pub(super) given: Given,
    pub(super) users: u32,
}

/// What is changed in memory at one instant.
#[derive(Debug)]
pub(super) struct Meta {
    pages: BTreeMap<PageKey, PageUse>,
    dirty: usize,
    pub(super) space: Space,
    /// Freed since the last commit took its pages.
    pub(super) frees: Vec<Range<u64>>,
    /// Where blocks begin that plans were given up over whose I/O may still come: such a place is not given to another.
    pub(super) abandoned: BTreeSet<u64>,
    pub(super) new_bitmaps: HashMap<ChunkIndex, NewBitmap>,
    /// Pages that are neither BAT nor bitmap, by file offset.
    raw: BTreeMap<u64, Arc<PageBytes>>,
    /// So many wait for pages: waking nobody is a system call too.
    waiting: usize,
}

impl Meta {
    pub(super) fn has_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// The pages that are dirty.
    pub(super) fn dirty_keys(&self) -> impl Iterator<Item = PageKey> {
        self.pages.iter().filter(|(_, page)| page.dirty).map(|(key, _)| *key)
    }

    /// Marks a page changed; true when it was not before.
    pub(super) fn mark_dirty(&mut self, key: PageKey) -> bool {
        let page = self.pages.entry(key).or_default();
        let new = !page.dirty;
        page.dirty = true;
        self.dirty += usize::from(new);
        new
    }

    /// Changes a page that is neither BAT nor bitmap.
    pub(super) fn set_raw(&mut self, file_offset: u64, bytes: PageBytes) {
        self.raw.insert(file_offset, Arc::new(bytes));
        self.mark_dirty(PageKey::Raw(file_offset));
    }

    /// A page that is neither BAT nor bitmap, as it was changed last.
    pub(super) fn raw(&self, file_offset: u64) -> Option<Arc<PageBytes>> {
        self.raw.get(&file_offset).map(Arc::clone)
    }

    /// Pages that are dirty or reserved.
    pub(super) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Reserves pages if they fit beside what is dirty and reserved already.
    fn reserve(&mut self, keys: &Keys, capacity: usize) -> bool {
        let more = || keys.iter().filter(|key| !self.pages.contains_key(key)).count();
        if self.pages.len() + keys.count() > capacity && self.pages.len() + more() > capacity {
            return false;
        }
        for key in keys.iter() {
            self.pages.entry(key).or_default().reserved += 1;
        }
        true
    }

    pub(super) fn unreserve(&mut self, keys: impl Iterator<Item = PageKey>) {
        for key in keys {
            if let Some(page) = self.pages.get_mut(&key) {
                page.reserved = page.reserved.saturating_sub(1);
                if page.reserved == 0 && !page.dirty {
                    self.pages.remove(&key);
                }
            }
        }
    }

    /// The dirty pages, which are clean from here on. They stay reserved for the commit that takes them, so that there is
    /// room for them should it fail.
    pub(super) fn take_dirty(&mut self) -> Vec<PageKey> {
        let keys: Vec<PageKey> = self.dirty_keys().collect();
        for page in self.pages.values_mut().filter(|page| page.dirty) {
            page.dirty = false;
            page.reserved += 1;
        }
        self.dirty = 0;
        keys
    }
}

/// Whether and how the image takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Mode {
    /// Reading only.
    ReadOnly = 0,
    /// Reading and writing.
    Writable = 1,
    /// On the way out: nothing new begins.
    Closing = 2,
    /// Closed for good.
    Closed = 3,
}

/// The writer of an image.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) tokens: Tokens,
    meta: Mutex<Meta>,
    /// Reserved pages were given back.
    meta_changed: Condvar,
    pub(super) commit: Mutex<Commit>,
    pub(super) growth: Mutex<()>,
    mode: AtomicU8,
    /// True once the session's GUIDs are durable in both headers.
    pub(super) started: AtomicBool,
    /// Operations and plans under way.
    active: AtomicU64,
    /// Somebody waits for the end of all: waking nobody is a system call too.
    is_awaited: AtomicBool,
    idle: Mutex<()>,
    active_changed: Condvar,
    poison: OnceLock<String>,
    /// True while mapped blocks may be overwritten without further questions.
    ready: AtomicBool,
    pub(super) flushes: Flushes,
    /// Pages that one entry of the log holds.
    capacity: usize,
    /// Bytes freed, but not given back yet.
    waiting_bytes: AtomicU64,
    /// Pages that the next entry holds without meeting a hole of the file. Written under the commit lock.
    room: AtomicU64,
    pub(super) is_fixed: bool,
    /// The file of a fixed disk may be cut all the same.
    pub(super) cuts: AtomicBool,
    /// So many bytes stay behind what is owned then.
    pub(super) kept: AtomicU64,
    pub(super) broken: Option<BrokenRule>,
    /// The data write GUIDs that the caller chose, instead of a random one.
    pub(super) chosen: Mutex<ChosenGuids>,
}

/// Data write GUIDs for a session that makes a disk what another one is.
#[derive(Debug, Default)]
pub(super) struct ChosenGuids {
    /// From the first change on.
    pub(super) meanwhile: Option<Guid>,
    /// Once everything is durable and the log is clean.
    pub(super) afterwards: Option<Guid>,
}

/// A block's token and reserved pages while it is not clear what becomes of them: given back unless they are kept, also
/// when a storage panics.
#[derive(Debug)]
pub(super) struct Held<'a> {
    writer: &'a Writer,
    block: BlockIndex,
    hold: Option<Hold>,
    keys: Option<Keys>,
}

impl<'a> Held<'a> {
    pub(super) fn new(writer: &'a Writer, block: BlockIndex, keys: Option<Keys>) -> Self {
        Self { writer, block, hold: None, keys }
    }

    /// Takes the token too; false when it is busy and the caller does not wait.
    pub(super) fn acquire(&mut self, hold: Hold, wait: Wait) -> bool {
        let got = self.writer.tokens.acquire(self.block, hold, wait);
        self.hold = got.then_some(hold);
        got
    }

    pub(super) fn keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    /// They stay; whoever has the keys now gives all of it back.
    pub(super) fn keep(mut self) -> Option<Keys> {
        self.hold = None;
        self.keys.take()
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(keys) = self.keys.take() {
            self.writer.unreserve(keys.iter());
        }
        if let Some(hold) = self.hold {
            self.writer.tokens.release(self.block, hold);
        }
    }
}

/// The commit lock while it is held. What a commit was about to do when it panics is lost with it, so that ends all writing.
#[derive(Debug)]
pub(super) struct CommitGuard<'a> {
    writer: &'a Writer,
    guard: MutexGuard<'a, Commit>,
    /// Who flushes while it unwinds panicked somewhere else.
    was_panicking: bool,
}

impl Deref for CommitGuard<'_> {
    type Target = Commit;

    fn deref(&self) -> &Commit {
        &self.guard
    }
}

impl DerefMut for CommitGuard<'_> {
    fn deref_mut(&mut self) -> &mut Commit {
        &mut self.guard
    }
}

impl Drop for CommitGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.was_panicking {
            let _ = self.writer.poison(Error::new(ErrorKind::Poisoned, "a panic in the middle of a commit"));
        }
    }
}

/// Counts an operation while it lasts.
#[derive(Debug)]
pub(super) struct Active<'a>(&'a Writer);

impl Active<'_> {
    /// The operation goes on in a plan, which ends it by [`Writer::leave`].
    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Writer {
    /// The GUIDs that the caller chose. Locked for moments only.
    pub(super) fn chosen(&self) -> MutexGuard<'_, ChosenGuids> {
        self.chosen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn new(commit: Commit, header: &Header, space: Space, is_fixed: bool) -> Self {
        let meta = Meta {
            pages: BTreeMap::new(),
            dirty: 0,
            space,
            frees: Vec::new(),
            abandoned: BTreeSet::new(),
            new_bitmaps: HashMap::new(),
            raw: BTreeMap::new(),
            waiting: 0,
        };
        Self {
            tokens: Tokens::default(),
            meta: Mutex::new(meta),
            meta_changed: Condvar::new(),
            commit: Mutex::new(commit),
            growth: Mutex::new(()),
            mode: AtomicU8::new(Mode::ReadOnly as u8),
            started: AtomicBool::new(false),
            active: AtomicU64::new(0),
            is_awaited: AtomicBool::new(false),
            idle: Mutex::default(),
            active_changed: Condvar::new(),
            poison: OnceLock::new(),
            ready: AtomicBool::new(false),
            flushes: Flushes::default(),
            capacity: usize::try_from(pages_max(header.log_length)).unwrap_or(usize::MAX),
            waiting_bytes: AtomicU64::new(0),
            room: AtomicU64::new(0),
            is_fixed,
            cuts: AtomicBool::new(false),
            kept: AtomicU64::new(0),
            broken: None,
            chosen: Mutex::default(),
        }
    }

    /// Whether a rule is broken on purpose; only ever in the crash simulator's tests.
    #[inline]
    pub(super) fn breaks(&self, rule: BrokenRule) -> bool {
        cfg!(feature = "simulation") && self.broken == Some(rule)
    }

    pub(super) fn meta(&self) -> MutexGuard<'_, Meta> {
        // Nothing in there panics halfway; were it to, the sums below would still err on the side of "taken".
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The commit lock; `None` when it is busy and the caller does not wait.
    pub(super) fn lock_commit(&self, wait: Wait) -> Option<CommitGuard<'_>> {
        let guard = match wait {
            Wait::Yes => self.commit.lock().unwrap_or_else(PoisonError::into_inner),
            Wait::No | Wait::AtOnce => match self.commit.try_lock() {
                Ok(commit) => commit,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return None,
            },
        };
        Some(CommitGuard { writer: self, guard, was_panicking: std::thread::panicking() })
    }

    pub(super) fn mode(&self) -> Mode {
        match self.mode.load(Ordering::SeqCst) {
            1 => Mode::Writable,
            2 => Mode::Closing,
            3 => Mode::Closed,
            _ => Mode::ReadOnly,
        }
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// Changes the mode if it is `from`.
    pub(super) fn change_mode(&self, from: Mode, to: Mode) -> bool {
        self.mode.compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The error that everything gets which would write after a failure; `None` when there was none.
    pub(super) fn poisoned(&self) -> Option<Error> {
        self.poison.get().map(|why| {
            let what = format!("nothing is written any more after an earlier failure ({why})");
            Error::new(ErrorKind::Poisoned, what)
                .with_hint("what was flushed before is safe; open the image again, which replays its log")
        })
    }

    /// Ends all writing for good. Gives the error back for who met it.
    pub(super) fn poison(&self, error: Error) -> Error {
        let _ = self.poison.set(error.to_string()); // the first failure is the one to tell
        self.ready.store(false, Ordering::SeqCst);
        drop(self.meta()); // who looked before this waits by now
        self.meta_changed.notify_all(); // for pages, in vain
        error.with_hint(
            "the image writes nothing any more; what was flushed before is safe, and opening it again replays its log",
        )
    }

    /// Whether mapped blocks may be overwritten without further questions. Asked inside the gate.
    #[inline]
    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    /// Says whether they may; never again once something has failed.
    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
        if self.is_poisoned() {
            self.ready.store(false, Ordering::SeqCst);
        }
    }

    /// The same as an error to return.
    pub(super) fn fail_if_poisoned(&self) -> Result<()> {
        self.poisoned().map_or(Ok(()), Err)
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poison.get().is_some()
    }

    /// Begins an operation that may change the image.
    pub(super) fn enter(&self) -> Result<Active<'_>> {
        self.count();
        let active = Active(self);
        match self.mode() {
            Mode::Writable => {}
            Mode::ReadOnly => return Err(read_only()),
            Mode::Closing => return Err(Error::new(ErrorKind::Busy, "the image is being closed")),
            Mode::Closed => return Err(Error::new(ErrorKind::ReadOnly, "the image was closed")),
        }
        match self.poisoned() {
            Some(error) => Err(error),
            None => Ok(active),
        }
    }

    /// Counts a plan that only reads.
    pub(super) fn count(&self) {
        self.active.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends an operation or a plan.
    pub(super) fn leave(&self) {
        let is_last = self.active.fetch_sub(1, Ordering::SeqCst) == 1;
        // Either who waits sees the new count, or this sees that somebody waits.
        if is_last && self.is_awaited.load(Ordering::SeqCst) {
            drop(self.lock_idle());
            self.active_changed.notify_all();
        }
    }

    fn lock_idle(&self) -> MutexGuard<'_, ()> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is under way; false when that takes too long. One at a time waits.
    pub(super) fn wait_idle(&self, wait: Duration) -> bool {
        let deadline = Instant::now() + wait;
        let mut idle = self.lock_idle();
        self.is_awaited.store(true, Ordering::SeqCst);
        let is_idle = loop {
            if self.active.load(Ordering::SeqCst) == 0 {
                break true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            idle = self.active_changed.wait_timeout(idle, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.is_awaited.store(false, Ordering::SeqCst);
        is_idle
    }

    /// Takes note of freed space. What I/O of an abandoned plan may still hit stays taken.
    pub(super) fn free(&self, meta: &mut Meta, range: Range<u64>) {
        if !meta.abandoned.contains(&range.start) {
            self.waiting_bytes.fetch_add(range.end - range.start, Ordering::SeqCst);
            meta.frees.push(range);
        }
    }

    /// Freed space can be used again.
    pub(super) fn given_back(&self, range: &Range<u64>) {
        self.waiting_bytes.fetch_sub(range.end - range.start, Ordering::SeqCst);
    }

    /// Pages that one entry of the log holds.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes freed, but not given back yet.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes.load(Ordering::SeqCst)
    }

    /// Says for how many pages the log has room.
    pub(super) fn set_room(&self, pages: u64) {
        self.room.store(pages, Ordering::SeqCst);
    }

    /// Reserves pages of the next entry.
    pub(super) fn try_reserve(&self, keys: &Keys, wait: Wait) -> Reserved {
        let mut meta = self.meta();
        loop {
            if meta.reserve(keys, self.capacity) {
                let enough = meta.page_count() as u64 <= self.room.load(Ordering::SeqCst);
                return if enough { Reserved::Yes } else { Reserved::WithoutRoom };
            }
            if meta.has_dirty() || self.is_poisoned() {
                return Reserved::Full; // the commit says what is wrong
            }
            if wait != Wait::Yes {
                return Reserved::Busy;
            }
            meta.waiting += 1;
            meta = self.meta_changed.wait(meta).unwrap_or_else(PoisonError::into_inner);
            meta.waiting -= 1;
        }
    }

    /// Gives reserved pages back.
    pub(super) fn unreserve(&self, keys: impl Iterator<Item = PageKey>) {
        let mut meta = self.meta();
        meta.unreserve(keys);
        self.wake(meta);
    }

    /// Lets go of what is changed in memory, and wakes those who wait for pages.
    pub(super) fn wake(&self, meta: MutexGuard<'_, Meta>) {
        let is_awaited = meta.waiting > 0;
        drop(meta);
        if is_awaited {
            self.meta_changed.notify_all();
        }
    }
}

/// The error for writing to an image that was opened for reading.
pub(super) fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the image was opened for reading only")
}

/// A page taken for a commit.
#[derive(Clone, Debug)]
pub(super) struct TakenPage {
    pub(super) key: PageKey,
    pub(super) file_offset: u64,
    pub(super) bytes: Arc<PageBytes>,
}

/// Everything that a commit took at one instant.
#[derive(Debug, Default)]
pub(super) struct Taken {
    pub(super) ticket: u64,
    pub(super) pages: Vec<TakenPage>,
    pub(super) frees: Vec<Range<u64>>,
    /// The end of everything that is owned.
    pub(super) last_file_offset: u64,
}
