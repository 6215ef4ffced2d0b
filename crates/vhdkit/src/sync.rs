//! What an image is shared with: locks, counters, and patience.
//!
//! Everything under `image` takes them from here. `crates/vhdkit-interleavings` compiles the library with another module in
//! place of this one, whose threads run in chosen orders.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

/// Groups of threads that count on cache lines of their own.
pub(crate) const STRIPES: usize = 16;
/// How often something is looked at before the thread sleeps in between.
const SPINS: u32 = 200;

/// Waits for something short, up to some time.
#[derive(Debug)]
pub(crate) struct Patience {
    deadline: Instant,
    spins: u32,
}

impl Patience {
    pub(crate) fn new(wait: Duration) -> Self {
        Self { deadline: Instant::now() + wait, spins: 0 }
    }

    /// Begins to wait for something else, up to the same time.
    pub(crate) fn begin(&mut self) {
        self.spins = 0;
    }

    /// Waits a little; false when the time is over.
    pub(crate) fn pause(&mut self) -> bool {
        self.spins += 1;
        if self.spins < SPINS {
            std::hint::spin_loop();
        } else if Instant::now() >= self.deadline {
            return false;
        } else {
            std::thread::sleep(Duration::from_micros(20));
        }
        true
    }
}
