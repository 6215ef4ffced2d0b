//! The latches of vhdkit, compiled with locks and counters whose threads run in chosen orders.
//!
//! Not a copy: the files are those of the library. Only `sync`, which they take everything from, is another one.
//! All their operations are sequentially consistent, so that every outcome is that of some order of them, and all orders
//! of small programs can be tried.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code: a broken expectation ends the test"
)]
#![allow(dead_code, unreachable_pub, reason = "the library uses more of these files")]
#![allow(clippy::modulo_one, reason = "there is one group of threads here")]

// The sources bring tests of their own, for real threads; as a test of its own this crate is empty.
#[cfg(not(test))]
mod units {
    /// A block, as the library numbers them.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct BlockIndex(pub(crate) u64);
}

#[cfg(not(test))]
#[path = "../../vhdkit/src/image"]
mod image {
    pub(crate) mod sync {
        //! What the latches are made of here.

        pub(crate) use shuttle::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
        pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
        pub(crate) use std::sync::PoisonError;
        use std::time::Duration;

        /// All threads count in one place.
        pub(crate) const STRIPES: usize = 1;

        /// Waits until it is so, and leaves the others the time for it.
        #[derive(Debug)]
        pub(crate) struct Patience;

        impl Patience {
            pub(crate) fn new(_: Duration) -> Self {
                Self
            }

            pub(crate) fn begin(&mut self) {}

            pub(crate) fn pause(&mut self) -> bool {
                shuttle::thread::yield_now();
                true
            }
        }
    }

    pub(crate) mod flushes;
    pub(crate) mod gate;
    pub(crate) mod tokens;
}

#[cfg(not(test))]
pub mod models;
