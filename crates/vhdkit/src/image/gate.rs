//! Tells when every short piece of I/O that began before some moment has ended.
//!
//! Reads and writes of mapped blocks look an entry up and then use the place that it names. A trim changes the entry and
//! waits for nobody; but before the place is given to another block, whoever may have seen the old entry must be done.
//!
//! ```text
//! enter:     count in the current epoch, then look entries up      leave: count out of that epoch
//! advance:   flip the epoch, if nobody is counted in the one that is not current
//! moment:    has passed after two flips: each of them found one epoch's counts at zero after the moment
//! ```
//!
//! Whoever is counted when an epoch's counts are looked at is waited for; whoever counts himself in after that looks entries
//! up later still, and sees the change. Flipping gives those who are inside the time to leave while others come: without it
//! two readers who take turns could keep a count above zero for ever. This is the idea of sleepable read-copy-update
//! (McKenney, 2006), with counts per group of threads so that threads do not fight for one cache line.
//!
//! Nobody has to wait: a moment can be asked about whenever there is time to.

use std::time::Duration;

use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering, Patience, PoisonError, STRIPES};

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
    /// How often the epoch was flipped. Held while that is done; never for long.
    flips: Mutex<u64>,
}

/// A moment, to be asked about later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(u64);

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

    /// Now.
    pub(crate) fn moment(&self) -> Moment {
        Moment(*self.lock_flips())
    }

    /// True once everything that began before a moment has ended.
    pub(crate) fn has_passed(&self, moment: Moment) -> bool {
        let mut flips = self.lock_flips();
        while *flips < moment.0 + 2 {
            let other = (self.epoch.load(Ordering::SeqCst) & 1) ^ 1;
            if self.is_busy(other) {
                return false;
            }
            self.epoch.fetch_xor(1, Ordering::SeqCst);
            *flips += 1;
        }
        true
    }

    /// True once everything that began before the call has ended; false when that takes longer than `wait`.
    pub(crate) fn is_quiet(&self, wait: Duration) -> bool {
        self.has_passed_within(self.moment(), wait)
    }

    /// The same for everything that began before a moment.
    pub(crate) fn has_passed_within(&self, moment: Moment, wait: Duration) -> bool {
        let mut patience = Patience::new(wait);
        patience.begin();
        while !self.has_passed(moment) {
            if !patience.pause() {
                return false;
            }
        }
        true
    }

    /// Whether anybody is counted in an epoch.
    fn is_busy(&self, epoch: usize) -> bool {
        self.stripes.iter().any(|stripe| {
            let [even, odd] = &stripe.counts;
            (if epoch == 0 { even } else { odd }).load(Ordering::SeqCst) != 0
        })
    }

    fn lock_flips(&self) -> MutexGuard<'_, u64> {
        self.flips.lock().unwrap_or_else(PoisonError::into_inner) // a number is whole at any moment
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

    /// Readers who take turns, so that somebody is inside at every moment, keep nobody waiting for ever.
    #[test]
    fn a_moment_passes_though_somebody_is_always_inside() {
        let gate = Gate::default();
        let mut inside = gate.enter();
        let moment = gate.moment();
        let mut turns = 0;
        while !gate.has_passed(moment) {
            let next = gate.enter();
            drop(inside);
            inside = next;
            turns += 1;
            assert!(turns < 4);
        }
        assert!(turns > 0, "who was inside has to leave first");
        drop(inside);
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
