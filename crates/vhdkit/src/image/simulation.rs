//! What the crash simulator sees of a writer, and how it makes a writer break one rule on purpose.
//!
//! Without the feature `simulation` nothing can be set here, every question answers "no", and nothing of it is left in
//! the program.

#![cfg_attr(
    not(feature = "simulation"),
    allow(unreachable_pub, dead_code, reason = "only the simulator asks for these")
)]

/// A rule of the order of writes that is broken on purpose, to prove that the simulator finds the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BrokenRule {
    /// The entry is logged before the payload that it maps is durable (W-041).
    LogBeforeData,
    /// Pages are written home before their entry is durable (W-010).
    HomeBeforeLogSync,
    /// A new entry is written over the newest durable one (W-031).
    RingReuse,
    /// An entry names itself as tail while the one before it is not home for certain (W-014).
    TailTooEarly,
    /// The log GUID is published before the first entry is there (W-022).
    GuidBeforeEntry,
    /// The log GUID is cleared before the home writes are durable (W-025).
    ClearBeforeHome,
    /// The log GUID is cleared in one header only (W-027).
    ClearOneSlot,
    /// Both headers are written without a sync in between (W-001).
    HeadersTogether,
    /// Freed space is given out before the entry that freed it is durable (W-040).
    FreeAtOnce,
    /// Frees that came after `take` are retired with that commit.
    FreeAfterTake,
    /// The file is cut before the log GUID is cleared (W-045).
    CutBeforeClear,
    /// An entry's last file offset is that of the session's start (W-044).
    LastOffsetFrozen,
    /// An entry's flushed file offset is the length at that moment, durable or not (W-044).
    FlushedOffsetAhead,
    /// Replay begins with the first entry that is there instead of the tail.
    ReplayFromRunStart,
    /// Replay clears the log GUID before what it wrote is durable (W-002).
    ReplayClearEarly,
    /// The data write GUID changes at the end of the session instead of before the first visible change (W-003).
    DataGuidLate,
    /// A first write is published before its payload is written (W-041, W-043).
    PublishBeforeData,
    /// A block that becomes partially present keeps the bits that it had before.
    StaleBits,
    /// A new sector bitmap is not zeroed, and trusted to be zero.
    BitmapNotZeroed,
    /// A partial first write leaves the rest of stale space as it is.
    StaleSpace,
    /// The image of a page is made from the file instead of from memory (W-011).
    PageFromDisk,
    /// Home writes take everything that is dirty at that moment instead of the logged copies.
    HomeFromMemory,
    /// Pages are taken after the payload was synced instead of before.
    TakeAfterSync,
    /// The pages of one commit are logged in two entries, the sector bitmaps last (W-012).
    SplitEntry,
    /// The file write GUID stays as it is (W-001).
    FileGuidKept,
    /// Freed space is given out while reads and writes are under way that looked it up before.
    GateIgnored,
    /// A commit satisfies every flush that was asked for before its end, instead of before its take (W-046).
    FlushJoined,
}

/// What a writer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Headers and first entry of a session.
    Start,
    /// Payload, growth and zeroing.
    Payload,
    /// The first sync of a commit and the entry.
    Log,
    /// Pages on their way home.
    Home,
    /// Freed space is given back.
    Retire,
    /// The log is put into place.
    Replay,
    /// The end of a session.
    Close,
}

impl Phase {
    /// A name for tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Payload => "payload",
            Self::Log => "log",
            Self::Home => "home",
            Self::Retire => "retire",
            Self::Replay => "replay",
            Self::Close => "close",
        }
    }
}

#[cfg(feature = "simulation")]
mod current {
    use super::Phase;
    use std::cell::Cell;

    thread_local! {
        static PHASE: Cell<Phase> = const { Cell::new(Phase::Payload) };
        static RING_START: Cell<u64> = const { Cell::new(0) };
    }

    /// Lets the logs that this thread opens from now on begin at a sector of their ring, so that they soon come to its end.
    pub fn start_rings_at(sector: u64) {
        RING_START.set(sector);
    }

    /// Where a log begins in its ring.
    pub(crate) fn ring_start() -> u64 {
        RING_START.get()
    }

    /// How many flushes of an image were asked for.
    #[must_use]
    pub fn flushes_asked(image: &super::super::Image) -> u64 {
        image.shared.writer.get().map_or(0, |writer| writer.flushes.newest())
    }

    /// What this thread is doing inside a writer.
    #[must_use]
    pub fn phase() -> Phase {
        PHASE.get()
    }

    /// Ends the phase when dropped.
    #[derive(Debug)]
    pub(crate) struct InPhase(Phase);

    impl Drop for InPhase {
        fn drop(&mut self) {
            PHASE.set(self.0);
        }
    }

    pub(crate) fn enter(phase: Phase) -> InPhase {
        InPhase(PHASE.replace(phase))
    }
}

#[cfg(not(feature = "simulation"))]
mod current {
    /// Nothing to end.
    #[derive(Debug)]
    pub(crate) struct InPhase;

    pub(crate) const fn enter(_: super::Phase) -> InPhase {
        InPhase
    }

    pub(crate) const fn ring_start() -> u64 {
        0
    }
}

pub(crate) use current::{enter, ring_start};
#[cfg(feature = "simulation")]
pub use current::{flushes_asked, phase, start_rings_at};
