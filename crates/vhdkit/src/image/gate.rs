//! Tells when every short piece of I/O that began before some moment has ended.
//!
//! Reads and writes of mapped blocks look an entry up and then use the place that it names. A trim changes the entry and
//! waits for nobody; but before the place is given to another block, whoever may have seen the old entry must be done.
//!
//! ```text
//! enter:   count in the current epoch, then look entries up        leave: count out of that epoch
//! quiet:   twice: flip the epoch, wait until the old one's counts are zero
//! ```
//!
//! Twice, because a thread may have read the epoch and be about to count into it when it is flipped. Such a thread looks
//! entries up after it has counted, so it is missed only if it sees the change, and the second round does not miss it
//! in the other epoch. This is the idea of sleepable read-copy-update (McKenney, 2006), with counts per group of threads
//! so that threads do not fight for one cache line.

use std::time::Duration;

use crate::sync::{AtomicUsize, Mutex, Ordering, Patience, PoisonError, STRIPES};

/// The counts of one group, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe {
    counts: [AtomicUsize; 2],
}

/// Counts what is under way.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    epoch: AtomicUsize,
    stripes: [Stripe; STRIPES],
    /// One flips at a time.
    flipping: Mutex<()>,
}

/// Something under way; ends when dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    count: &'a AtomicUsize,
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The group of this thread.
#[inline]
fn stripe() -> usize {
    // Only a number to draw; it orders nothing.
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    thread_local! {
        static STRIPE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES;
    }
    STRIPE.with(|stripe| *stripe)
}

impl Gate {
    /// Begins a short piece of I/O. What decides where it goes must be looked up after this.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_> {
        let epoch = self.epoch.load(Ordering::SeqCst) & 1;
        let stripe = self.stripes.get(stripe()).unwrap_or(&self.stripes[0]);
        let [even, odd] = &stripe.counts;
        let count = if epoch == 0 { even } else { odd };
        count.fetch_add(1, Ordering::SeqCst);
        Inside { count }
    }

    /// True once everything that began before the call has ended; false when that takes longer than `wait`.
    pub(crate) fn is_quiet(&self, wait: Duration) -> bool {
        let _flipping = self.flipping.lock().unwrap_or_else(PoisonError::into_inner);
        let mut patience = Patience::new(wait);
        (0..2).all(|_| {
            let old = self.epoch.fetch_xor(1, Ordering::SeqCst) & 1;
            self.drained(old, &mut patience)
        })
    }

    fn drained(&self, epoch: usize, patience: &mut Patience) -> bool {
        let busy = || {
            self.stripes.iter().any(|stripe| {
                let [even, odd] = &stripe.counts;
                (if epoch == 0 { even } else { odd }).load(Ordering::SeqCst) != 0
            })
        };
        patience.begin();
        while busy() {
            if !patience.pause() {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    #[test]
    fn is_quiet_only_when_everybody_has_left() {
        let gate = Gate::default();
        assert!(gate.is_quiet(Duration::ZERO));
        let inside = gate.enter();
        assert!(!gate.is_quiet(Duration::ZERO));
        assert!(!gate.is_quiet(Duration::from_millis(1)));
        drop(inside);
        assert!(gate.is_quiet(Duration::ZERO));
    }

    /// A slot names a cell; readers follow it, a writer points it elsewhere, waits, and spoils the old cell.
    #[test]
    fn nobody_meets_a_place_that_was_given_away() {
        let gate = Arc::new(Gate::default());
        let slot = Arc::new(AtomicUsize::new(0));
        let cells: Arc<[AtomicU64; 2]> = Arc::new([const { AtomicU64::new(1) }; 2]);
        let stop = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let _inside = gate.enter();
                        let at = slot.load(Ordering::SeqCst);
                        std::thread::yield_now();
                        assert_eq!(cells[at].load(Ordering::SeqCst), 1, "a spoiled cell");
                    }
                });
            }
            for round in 0..2000 {
                let old = slot.swap((round + 1) % 2, Ordering::SeqCst);
                assert!(gate.is_quiet(Duration::from_secs(10)));
                cells[old].store(0, Ordering::SeqCst);
                std::thread::yield_now();
                cells[old].store(1, Ordering::SeqCst);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
