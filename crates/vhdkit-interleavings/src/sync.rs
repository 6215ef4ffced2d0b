//! What the library is made of here, in place of its own module of this name.

pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::Duration;

use shuttle::rand::Rng as _;

/// All threads count in one place.
pub(crate) const STRIPES: usize = 1;
/// Who waits no longer than this may be told that it was too long.
const SHORT: Duration = Duration::from_secs(1);

/// Waits until something is so, and leaves the others the time for it. Short waits end after a few looks.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Looks that are left; `None` for as many as it takes.
    looks: Option<u32>,
}

impl Patience {
    pub(crate) fn new(wait: Duration) -> Self {
        Self { looks: (wait < SHORT).then(|| shuttle::rand::thread_rng().gen_range(0..4)) }
    }

    pub(crate) fn begin(&mut self) {}

    pub(crate) fn pause(&mut self) -> bool {
        if let Some(looks) = &mut self.looks {
            if *looks == 0 {
                return false;
            }
            *looks -= 1;
        }
        shuttle::thread::yield_now();
        true
    }
}

/// A cell that is filled once. Looking at it and filling it are points where another thread may go on.
#[derive(Debug)]
pub(crate) struct OnceLock<T> {
    cell: std::sync::OnceLock<T>,
    point: AtomicBool,
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> OnceLock<T> {
    pub(crate) const fn new() -> Self {
        Self { cell: std::sync::OnceLock::new(), point: AtomicBool::new(false) }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        self.point.load(Ordering::SeqCst);
        self.cell.get()
    }

    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        self.point.store(true, Ordering::SeqCst);
        self.cell.set(value)
    }

    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get() {
            return value;
        }
        // Made before anything is locked: nobody can be met halfway.
        let value = make();
        self.cell.get_or_init(|| value)
    }
}
