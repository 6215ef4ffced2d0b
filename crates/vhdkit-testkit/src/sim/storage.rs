//! A storage that remembers what a power cut could lose.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhdkit::storage::{Storage, StorageIdentity};

use super::crash::CrashPoint;
use super::operation::{Counts, Effect, Fault, OpInfo, OpKind, Operation};
use super::pages::{PageMap, SECTOR_BYTES};

/// No file can be longer, on any system that the library runs on.
const LENGTH_MAX: u64 = i64::MAX.unsigned_abs();

/// The number of the next storage, which is its identity too.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The storages whose hook runs on this thread, so that what a hook does calls it not again.
    static IN_HOOK: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Called with an operation that is about to happen, or with a sync that has become durable.
pub type Hook = Arc<dyn Fn(&OpInfo) + Send + Sync>;

/// A sparse file in memory that knows which of its bytes are durable.
///
/// ```
/// use vhdkit::storage::Storage as _;
/// use vhdkit_testkit::sim::{Sampling, SimStorage};
///
/// let storage = SimStorage::new();
/// storage.write_at(&[1; 512], 0)?;
/// storage.sync()?;
/// storage.write_at(&[2; 512], 0)?;
/// storage.write_at(&[3; 512], 512)?;
/// let point = storage.crash_point();
/// let lengths: Vec<u64> = point.states(&Sampling::default(), 1).iter().map(|state| point.build(state).len()).collect();
/// assert!(lengths.contains(&512) && lengths.contains(&1024), "the growth is lost or not");
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct SimStorage {
    number: u64,
    identity: StorageIdentity,
    phase_source: fn() -> &'static str,
    state: Mutex<State>,
    callbacks: Mutex<Callbacks>,
}

#[derive(Clone, Default)]
struct Callbacks {
    hook: Option<Hook>,
    read_hook: Option<Hook>,
    observer: Option<Hook>,
}

#[derive(Default)]
struct State {
    /// What reads see.
    current: PageMap,
    /// What every power cut leaves.
    durable: PageMap,
    /// Set when a failed sync has lost something for good: reads see what will never be durable.
    diverged: bool,
    /// What happened since the last sync.
    pending: Vec<Arc<Operation>>,
    operations: u64,
    /// Counts what was done to `pending`.
    serial: u64,
    counts: Counts,
    fault: Option<Fault>,
    /// Pages that the file may have; holes take none.
    capacity: Option<usize>,
}

impl std::fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("SimStorage")
            .field("number", &self.number)
            .field("current", &state.current)
            .field("durable", &state.durable)
            .field("pending", &state.pending.len())
            .finish_non_exhaustive()
    }
}

impl Default for SimStorage {
    fn default() -> Self {
        Self::new()
    }
}

/// The phase where nobody tells one.
fn no_phase() -> &'static str {
    "-"
}

/// Takes the storage off the list of those whose hook runs, also when the hook panics.
struct InHook(u64);

impl Drop for InHook {
    fn drop(&mut self) {
        IN_HOOK.with_borrow_mut(|running| {
            if let Some(at) = running.iter().rposition(|number| *number == self.0) {
                running.remove(at);
            }
        });
    }
}

impl SimStorage {
    /// An empty file.
    #[must_use]
    pub fn new() -> Self {
        Self::from_pages(PageMap::new())
    }

    /// A file with these contents, all of them durable.
    #[must_use]
    pub fn from_pages(mut pages: PageMap) -> Self {
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        pages.settle();
        Self {
            number,
            identity: StorageIdentity { device: u64::MAX - 2, inode: number }, // no file system has this device number
            phase_source: no_phase,
            state: Mutex::new(State { durable: pages.clone(), current: pages, ..State::default() }),
            callbacks: Mutex::default(),
        }
    }

    /// The same, with somebody who knows in which phase the code under test is.
    #[must_use]
    pub fn with_phase_source(mut self, source: fn() -> &'static str) -> Self {
        self.phase_source = source;
        self
    }

    /// Sets what is called before every operation that changes something, before every sync, and after a sync has
    /// become durable ([`OpInfo::after`]). It runs without any lock of the storage, and may use the storage: what it
    /// does calls it not again.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.lock_callbacks().hook = hook;
    }

    /// Sets what is called before every read, as the hook is before everything else. Observers are not told: a read changes
    /// nothing that a power cut could leave. Its number is that of the operation before it.
    pub fn set_read_hook(&self, hook: Option<Hook>) {
        self.lock_callbacks().read_hook = hook;
    }

    /// Sets what is called at the same moments, after the hook, and also for what a hook does. It must not change the
    /// storage. This is where cuts are taken.
    pub fn set_observer(&self, observer: Option<Hook>) {
        self.lock_callbacks().observer = observer;
    }

    /// Lets an operation fail. Replaces the fault that was set before.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
    }

    /// Lets everything that needs more pages of 4 KiB than this fail for lack of space; `None` gives room again. Holes
    /// take none, and reserving does not count.
    pub fn set_capacity(&self, pages: Option<usize>) {
        self.lock().capacity = pages;
    }

    /// Whether a fault that was set has struck.
    #[must_use]
    pub fn fault_struck(&self) -> bool {
        self.lock().fault.as_ref().is_some_and(Fault::struck)
    }

    /// How many operations there were, by kind; those that failed included.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// What a power cut at this moment can leave.
    #[must_use]
    pub fn crash_point(&self) -> CrashPoint {
        let state = self.lock();
        CrashPoint::new(state.operations, state.durable.clone(), state.pending.clone())
    }

    /// What reads see now.
    #[must_use]
    pub fn pages(&self) -> PageMap {
        self.lock().current.clone()
    }

    /// What is durable now.
    #[must_use]
    pub fn durable_pages(&self) -> PageMap {
        self.lock().durable.clone()
    }

    /// How many operations wait for a sync.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.lock().pending.len()
    }

    // A panic of a test while the lock is held leaves the state whole: nothing in here calls foreign code under it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_callbacks(&self) -> MutexGuard<'_, Callbacks> {
        self.callbacks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers and counts an operation, and tells it to hook and observer.
    fn announce(&self, kind: OpKind, range: Range<u64>) -> OpInfo {
        let number = {
            let mut state = self.lock();
            state.operations += 1;
            state.counts.add(kind);
            state.operations
        };
        let info = OpInfo { number, kind, range, phase: (self.phase_source)(), after: false };
        self.tell(&info);
        info
    }

    fn tell(&self, info: &OpInfo) {
        let callbacks = self.lock_callbacks().clone();
        self.call(callbacks.hook, info);
        if let Some(observer) = callbacks.observer {
            observer(info);
        }
    }

    /// Calls a hook, unless one of this storage runs already on this thread.
    fn call(&self, hook: Option<Hook>, info: &OpInfo) {
        if let Some(hook) = hook
            && !IN_HOOK.with_borrow(|running| running.contains(&self.number))
        {
            IN_HOOK.with_borrow_mut(|running| running.push(self.number));
            let _running = InHook(self.number);
            hook(info);
        }
    }

    fn tell_of_read(&self, range: Range<u64>) {
        let hook = self.lock_callbacks().read_hook.clone();
        if hook.is_some() {
            let number = self.lock().operations;
            self.call(hook, &OpInfo { number, kind: OpKind::Read, range, phase: (self.phase_source)(), after: false });
        }
    }

    /// Does an operation: `effect` says what it does to a range, all of it or the start that a fault leaves.
    fn operate(
        &self,
        kind: OpKind,
        range: Range<u64>,
        grows: bool,
        effect: impl FnOnce(Range<u64>, &PageMap) -> Effect,
    ) -> io::Result<()> {
        let info = self.announce(kind, range.clone());
        let mut state = self.lock();
        let failure = state.fault.as_mut().and_then(|fault| fault.strike(kind, info.phase));
        let range = match &failure {
            None => range,
            Some((_, 0)) => range.start..range.start,
            Some(_) if matches!(kind, OpKind::SetLen | OpKind::Allocate) => range.start..range.start,
            // The bytes of the first so many sectors of the device that the range touches.
            Some((_, sectors)) => {
                let end = (range.start / SECTOR_BYTES + sectors) * SECTOR_BYTES;
                range.start..end.clamp(range.start, range.end)
            }
        };
        if failure.is_none() || !range.is_empty() {
            // Measured here: hooks and other threads may have changed it since the call.
            let before = state.current.len();
            let after = if kind == OpKind::SetLen {
                range.end
            } else if grows {
                before.max(range.end)
            } else {
                before
            };
            let effect = effect(range.clone(), &state.current);
            if state.capacity.is_some_and(|pages| !effect.fits(&state.current, pages)) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            state.serial += 1;
            let operation = Operation {
                number: info.number,
                serial: state.serial,
                kind,
                range,
                phase: info.phase,
                effect,
                length: (before, after),
            };
            operation.apply_whole(&mut state.current);
            state.current.set_len_if_changed(after);
            state.pending.push(Arc::new(operation));
        }
        failure.map_or(Ok(()), |(error, _)| Err(error))
    }

    fn read_fault(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.counts.add(OpKind::Read);
        let failure = state.fault.as_mut().and_then(|fault| fault.strike(OpKind::Read, "-"));
        failure.map_or(Ok(()), |(error, _)| Err(error))
    }
}

/// Refuses positions that no file has.
fn check_end(offset: u64, length: u64) -> io::Result<Range<u64>> {
    let end = offset.checked_add(length).filter(|&end| end <= LENGTH_MAX);
    Ok(offset..end.ok_or(io::ErrorKind::FileTooLarge)?)
}

impl Storage for SimStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().current.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.tell_of_read(offset..offset.saturating_add(buf.len() as u64));
        self.read_fault()?;
        let state = self.lock();
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= state.current.len() => state.current.read(offset, buf),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let range = check_end(offset, buf.len() as u64)?;
        self.operate(OpKind::Write, range, true, |range, _| Effect::data(&range, buf))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        check_end(len, 0)?;
        // What is cut off becomes zero, also where the file grows again before the next sync.
        self.operate(OpKind::SetLen, 0..len, true, |_, current| Effect::cut(len..current.len()))
    }

    /// Makes durable what was done before it began: what a hook or another thread does meanwhile is not covered, as a
    /// real sync does not promise it.
    fn sync(&self) -> io::Result<()> {
        let covered = self.lock().serial;
        let mut info = self.announce(OpKind::Sync, 0..0);
        {
            let mut state = self.lock();
            let failure = state.fault.as_mut().and_then(|fault| fault.strike(OpKind::Sync, info.phase));
            if let Some((error, _)) = failure {
                if let Some(seed) = state.fault.as_ref().and_then(Fault::lost_seed) {
                    let point = CrashPoint::new(0, state.durable.clone(), std::mem::take(&mut state.pending));
                    state.durable = point.build(&point.random_state(seed));
                    state.diverged = true;
                }
                return Err(error);
            }
            state.make_durable(covered);
        }
        info.after = true;
        self.tell(&info);
        Ok(())
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        check_end(range.end, 0)?;
        self.operate(OpKind::Zero, range, true, |range, _| Effect::Zero(range))
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        let range = range.start..range.end.min(self.lock().current.len());
        if !range.is_empty() {
            self.operate(OpKind::Punch, range, false, |range, current| {
                Effect::cut(range.start..range.end.min(current.len()))
            })?;
        }
        Ok(true)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        if !range.is_empty() {
            check_end(range.end, 0)?;
            self.operate(OpKind::Allocate, range, true, |_, _| Effect::None)?;
        }
        Ok(true)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(self.lock().current.next_data(range))
    }

    fn data_start(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        Ok(self.lock().current.data_start(range))
    }

    fn clone_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<bool> {
        let aligned = [source_offset, offset, length].iter().all(|number| number.is_multiple_of(4096));
        let inside = source_offset.checked_add(length).is_some_and(|end| source.len().is_ok_and(|len| end <= len));
        if !aligned || !inside {
            return Ok(false);
        }
        self.take_from(OpKind::Clone, source, source_offset, offset, length)?;
        Ok(true)
    }

    fn copy_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        let length = length.min(source.len()?.saturating_sub(source_offset));
        self.take_from(OpKind::Copy, source, source_offset, offset, length)?;
        Ok(length)
    }

    fn identity(&self) -> Option<StorageIdentity> {
        Some(self.identity)
    }
}

impl SimStorage {
    /// Writes what another storage holds, as one operation.
    fn take_from(
        &self,
        kind: OpKind,
        source: &dyn Storage,
        source_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let range = check_end(offset, length)?;
        let mut bytes = vec![0; length as usize];
        source.read_at(&mut bytes, source_offset)?;
        self.operate(kind, range, true, |range, _| Effect::data(&range, &bytes))
    }
}

impl State {
    fn make_durable(&mut self, covered: u64) {
        self.current.settle();
        let all = self.pending.last().is_none_or(|newest| newest.serial <= covered);
        if all && !self.diverged {
            self.pending.clear();
            self.durable = self.current.clone();
            return;
        }
        let (done, left) = std::mem::take(&mut self.pending).into_iter().partition(|one| one.serial <= covered);
        self.pending = left;
        let done: Vec<Arc<Operation>> = done;
        for operation in done {
            operation.apply_whole(&mut self.durable);
            self.durable.set_len_if_changed(operation.length.1);
        }
        self.durable.settle();
    }
}
