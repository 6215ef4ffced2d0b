//! The log of a fresh file is a hole until entries reach it. Room for an entry is made when the pages that it will hold are
//! reserved, so that a full file system fails the request that needs more room, and not the commit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared modules")]

mod write_support;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::storage::Storage;
use vhdkit::{Error, Result};
use vhdkit_testkit::builder::{BuiltImage, ImageBuilder};
use vhdkit_testkit::sim::{
    Case, CrashImage, Fault, FaultError, ImageJudge, OpInfo, OpKind, Sampling, SectorHistory, SimStorage,
    frozen_parents, verify_image,
};
use vhdkit_testkit::spec::MIB;
use write_support::watched::sim;
use write_support::{assert_clean, load};

/// Holes of the log are filled in steps of so much.
const STEP: u64 = 64 << 10;
/// Sectors of a block.
const BLOCK: u64 = 2048;

struct Disk {
    top: BuiltImage,
    sim: Arc<SimStorage>,
    image: Image,
    history: SectorHistory,
}

impl Disk {
    fn new(with_parent: bool) -> Self {
        let base = Arc::new(ImageBuilder::new(MIB, 1 << 20).pattern_block(0, 1).named("base.vhdx").build());
        let builder = ImageBuilder::new(64 << 30, 1 << 20).with(|builder| builder.log_length = 3 << 20);
        let top = if with_parent { builder.differencing(&base) } else { builder }.build();
        let sim = sim(&top.file);
        let image = open(&top, &sim);
        let history = SectorHistory::of_model(&top.model);
        Self { top, sim, image, history }
    }

    /// Makes the writes of zeros into a part of the log fail that fill its holes, the first so many of them.
    fn fail_room(&self, part: Range<u64>, times: u64) {
        let (weak, count) = (Arc::downgrade(&self.sim), AtomicU64::new(0));
        let part = self.top.layout.log + part.start..self.top.layout.log + part.end;
        self.sim.set_hook(Some(Arc::new(move |info: &OpInfo| {
            let fills = info.kind == OpKind::Write && info.range.end - info.range.start == STEP;
            if fills && part.contains(&info.range.start) && count.fetch_add(1, Ordering::SeqCst) < times {
                let fault = Fault::nth(1, FaultError::ENOSPC).only(&[OpKind::Write]);
                weak.upgrade().unwrap().set_fault(Some(fault));
            }
        })));
    }

    fn write(&mut self, first: u64, count: u64) -> Result<()> {
        let (ticket, bytes) = self.history.start_write(first, count);
        let done = self.image.write_at(&bytes, first * 512);
        match &done {
            Ok(()) => self.history.finish(ticket),
            Err(_) => self.history.fail(ticket),
        }
        done
    }

    fn flush(&mut self) -> Result<()> {
        let flush = self.history.start_flush();
        let done = self.image.flush();
        if done.is_ok() {
            self.history.finish_flush(flush);
        }
        done
    }

    /// Reads give what is current; what was flushed is there after power cuts.
    fn look(&mut self) {
        for sectors in self.history.interesting() {
            let mut bytes = vec![0; usize::try_from((sectors.end - sectors.start) * 512).unwrap()];
            self.image.read_at(&mut bytes, sectors.start * 512).unwrap();
            self.history.observe_run(sectors.start, &bytes).unwrap();
        }
        let judge = ImageJudge { parents: parents(&self.top), ..ImageJudge::default() };
        let point = self.sim.crash_point();
        for state in point.states(&Sampling { exhaustive_ops: 1, random: 6 }, 7).iter().take(12) {
            let image = CrashImage::new(point.build(state));
            verify_image(&image, &self.history, &judge, &mut Case::new(2)).unwrap();
        }
    }

    fn end(mut self) {
        self.look();
        self.image.close().unwrap();
        self.image = open(&self.top, &self.sim);
        self.look();
        assert_clean("log room", &(Arc::new(load(&self.sim.pages().to_sparse())) as Arc<dyn Storage>));
    }
}

fn parents(top: &BuiltImage) -> Option<Arc<dyn vhdkit::image::ParentResolver>> {
    Some(frozen_parents(vec![CrashImage::new(sim(&top.parent.as_ref()?.file).pages())]))
}

fn open(top: &BuiltImage, sim: &Arc<SimStorage>) -> Image {
    let options = OpenOptions::new().write(true);
    let options = match parents(top) {
        Some(parents) => options.parents(parents),
        None => options,
    };
    options.open(Arc::clone(sim) as Arc<dyn Storage>, None).unwrap()
}

fn is_full(error: &Error) -> bool {
    error.io_error().is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
}

/// Pages of 60 blocks fit into the first part of the log; when the part behind finds no room, the one request that needs
/// it fails, and works when it is made again.
#[test]
fn a_request_that_finds_no_room_in_the_log_fails_alone() {
    for with_parent in [false, true] {
        let mut disk = Disk::new(with_parent);
        // Twice: when freed space is waiting, the first time is made up for.
        disk.fail_room(2 * MIB..3 * MIB, 2);
        let mut failed = 0;
        for round in 0..12 {
            for block in 0..60 {
                // Another page of the BAT each, and another one of the bitmaps.
                let first = (block * 1000 + round) * BLOCK + 8;
                while let Err(error) = disk.write(first, 4) {
                    assert!(is_full(&error), "{error}");
                    assert!(error.message().starts_with("cannot make room in the log"), "{error}");
                    failed += 1;
                    disk.look();
                }
            }
            // A discard goes the same way: its space must not be lost, nor be free too early.
            let discarded = (round * 1000 + round) * BLOCK;
            let ticket = disk.history.start_discard(discarded..discarded + BLOCK);
            disk.image.discard(discarded * 512..(discarded + BLOCK) * 512).unwrap();
            disk.history.finish(ticket);
            disk.flush().unwrap();
        }
        assert!(matches!(failed, 1 | 2), "{failed}");
        disk.end();
    }
}

/// A plan that was held open over a commit has its room behind the new entry. When none was found there, the next commit
/// fails, what it took is dirty again, and goes with the one after.
#[test]
fn a_commit_that_finds_no_room_in_the_log_is_made_up_for() {
    for with_parent in [false, true] {
        let mut disk = Disk::new(with_parent);
        let planned = 61_000 * BLOCK;
        let plan = disk.image.plan_write(planned * 512..(planned + 8) * 512).unwrap();
        let (ticket, bytes) = disk.history.start_write(planned, 8);
        plan.storage().write_at(&bytes, plan.file_offset()).unwrap();
        // Fails twice: when the commit looks for room for the plan, and when the next one needs it.
        disk.fail_room(STEP..3 * MIB, 2);
        // 13 or 11 pages: with those of the plan they just fit into the room that there is, and leave none behind them.
        for block in 0..if with_parent { 5 } else { 13 } {
            disk.write(block * 1000 * BLOCK + 8, 4).unwrap();
        }
        disk.flush().unwrap();
        plan.complete().unwrap();
        disk.history.finish(ticket);
        let error = disk.flush().unwrap_err();
        assert!(is_full(&error), "{error}");
        assert!(error.message().starts_with("cannot make room in the log"), "{error}");
        disk.look();
        disk.flush().unwrap();
        disk.end();
    }
}

/// 14 pages are what the first 64 KiB hold, behind the entry that opens the log: then no more room is needed, and one page
/// more is refused alone.
#[test]
fn what_just_fits_needs_no_more_room() {
    for pages in 12..=16 {
        let mut disk = Disk::new(false);
        disk.fail_room(STEP..3 * MIB, u64::MAX);
        let refused = (0..pages).filter(|block| disk.write(block * 1000 * BLOCK + 8, 4).is_err()).count();
        assert_eq!(refused as u64, pages.saturating_sub(14), "{pages} pages");
        disk.flush().unwrap();
        disk.sim.set_hook(None);
        disk.end();
    }
}

/// Room is asked for in advance; that there is none to spare refuses nobody.
#[test]
fn room_that_is_there_is_not_refused() {
    let mut disk = Disk::new(false);
    disk.fail_room(4 * STEP..3 * MIB, u64::MAX);
    for block in 0..60 {
        disk.write(block * 1000 * BLOCK + 8, 4).unwrap();
    }
    disk.flush().unwrap();
    disk.sim.set_hook(None);
    disk.end();
}
