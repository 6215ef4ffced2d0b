//! What was done, for who asks.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// What a server has done so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Totals {
            $($(#[$doc])* pub $name: u64,)+
        }

        /// The same, while it goes on.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($name: AtomicU64,)+
        }

        impl Counters {
            pub(crate) fn add(&self, more: &Totals) {
                $(if more.$name != 0 {
                    self.$name.fetch_add(more.$name, Ordering::Relaxed);
                })+
            }

            pub(crate) fn totals(&self) -> Totals {
                Totals { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }
        }

        impl Totals {
            /// Names and numbers, for printing.
            #[must_use]
            pub fn entries(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)+]
            }
        }
    };
}

counters! {
    /// Connections that were accepted.
    connections,
    /// Connections that were turned away at once, as there were too many.
    turned_away,
    /// Connections that were cut off, or broke, before their transmission phase.
    handshakes_failed,
    /// Connections that were cut off for what the client sent.
    protocol_errors,
    /// Requests to read.
    reads,
    /// Requests to write.
    writes,
    /// Requests to flush.
    flushes,
    /// Requests to trim.
    trims,
    /// Requests to write zeroes.
    zeroes,
    /// Requests for block status.
    block_statuses,
    /// Requests to fill the cache.
    caches,
    /// Bytes that were read, holes included.
    bytes_read,
    /// Bytes that were written.
    bytes_written,
    /// Requests that worker threads took on, as they had to wait.
    waited,
    /// Requests that failed.
    errors,
    /// Times that a client did not take its replies as fast as they came.
    stalls,
}
