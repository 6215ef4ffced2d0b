//! What the latches are made of: locks, counters, and patience.
//!
//! `crates/vhdkit-interleavings` compiles `gate.rs`, `tokens.rs` and `flushes.rs` with another module in place of this
//! one, whose threads run in every order.

pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
pub(super) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Groups of threads that count on cache lines of their own.
pub(super) const STRIPES: usize = 16;
/// How often something is looked at before the thread sleeps in between.
const SPINS: u32 = 200;

/// Waits for something short, up to some time.
#[derive(Debug)]
pub(super) struct Patience {
    deadline: Instant,
    spins: u32,
}

impl Patience {
    pub(super) fn new(wait: Duration) -> Self {
        Self { deadline: Instant::now() + wait, spins: 0 }
    }

    /// Begins to wait for something else, up to the same time.
    pub(super) fn begin(&mut self) {
        self.spins = 0;
    }

    /// Waits a little; false when the time is over.
    pub(super) fn pause(&mut self) -> bool {
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
