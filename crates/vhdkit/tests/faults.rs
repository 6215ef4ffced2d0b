//! Every operation on the file fails once, in turn: the error is the right one, what goes on goes on, what was flushed
//! stays, and every sector is old or new.
//!
//! ```text
//! program --n-th operation fails--> payload:  this request alone fails, the same again works
//!                                   metadata: poisoned; reads go on; a new open finds everything that was flushed
//! ```
//!
//! Afterwards the process dies, or the power is cut on top of that.
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

use rustix::io::Errno;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit::{Error, ErrorKind, Result};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::dirty::DirtyPlan;
use vhdkit_testkit::faulty::{Effect, Fault, FaultyStorage, Operation, OperationKind, Space};
use vhdkit_testkit::model::UNMAPPED;
use vhdkit_testkit::sim::{
    Case, CrashImage, FlushTicket, ImageJudge, OpKind, Sampling, SectorHistory, SimStorage, Ticket, frozen_parents,
    verify_image,
};
use vhdkit_testkit::spec::MIB;
use write_support::watched::sim;
use write_support::{assert_clean, load};

/// One step of a program; ranges in sectors.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Through(u64, u64),
    Plan(u64, u64),
    DropPlan(u64, u64),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Flush,
    /// Closes and opens again.
    Reopen,
    /// The live image stops writing and begins again.
    Pause,
}

use Step::{Discard, DropPlan, Flush, Pause, Plan, Reopen, Through, Write, Zero};

/// Sectors of a MiB.
const M: u64 = 2048;

/// What a program runs on.
struct Scene {
    name: &'static str,
    top: BuiltImage,
    dirty: BuiltImage,
    steps: Vec<Step>,
    history: SectorHistory,
}

impl Scene {
    fn new(name: &'static str, top: BuiltImage, plan: Option<DirtyPlan>, steps: Vec<Step>) -> Self {
        let mut dirty = top.clone();
        if let Some(plan) = plan {
            plan.apply(&mut dirty);
        }
        let history = SectorHistory::of_model(&top.model);
        Self { name, top, dirty, steps, history }
    }

    fn parents(&self) -> Option<Arc<dyn vhdkit::image::ParentResolver>> {
        let parents = std::iter::successors(self.top.parent.as_deref(), |parent| parent.parent.as_deref());
        let parents: Vec<CrashImage> = parents.map(|parent| CrashImage::new(sim(&parent.file).pages())).collect();
        (!parents.is_empty()).then(|| frozen_parents(parents))
    }

    fn open(&self, storage: Arc<dyn Storage>) -> Result<Image> {
        let options = OpenOptions::new().write(true).replay(true);
        let options = match self.parents() {
            Some(parents) => options.parents(parents),
            None => options,
        };
        options.open(storage, None)
    }
}

fn blocks(builder: ImageBuilder, present: &[u64]) -> ImageBuilder {
    present.iter().fold(builder, |builder, block| {
        builder.block(*block, BlockSpec::present(Content::Sparse { seed: *block, stride: 40 }))
    })
}

fn dynamic_steps() -> Vec<Step> {
    vec![
        Write(5 * M + 3, 8),
        Write(8 * M - 4, 9),
        Flush,
        Write(M, 6),
        Zero(0..M, true),
        Discard(M..3 * M),
        Flush,
        Through(12 * M + 100, 4),
        Write(14 * M, M),
        Flush,
        Plan(5 * M + 3, 20),
        DropPlan(17 * M, 8),
        Plan(18 * M + 16, 8),
        Zero(18 * M..18 * M + 200, true),
        Zero(4 * M..4 * M + 9, true),
        Write(4 * M + 2, 3),
        Reopen,
        Write(20 * M + 5, 2),
        Discard(0..19 * M),
        Flush,
        Write(21 * M + 5, 2),
        Flush,
        Reopen,
    ]
}

fn dynamic() -> Scene {
    let builder = blocks(ImageBuilder::new(24 * MIB, 1 << 20), &[0, 1, 2, 9]);
    let top = builder.block(4, BlockSpec::anchored(UNMAPPED, Content::pattern(4))).build();
    Scene::new("dynamic", top, None, dynamic_steps())
}

fn dirty() -> Scene {
    let builder = blocks(ImageBuilder::new(24 * MIB, 1 << 20), &[0, 1, 2, 9]);
    let top = builder.block(4, BlockSpec::anchored(UNMAPPED, Content::pattern(4))).build();
    let plan = DirtyPlan::new(1).move_bat(&top).move_metadata(&top).with(|plan| plan.entries = 2);
    let steps = vec![Write(5 * M + 3, 8), Flush, Write(M, 6), Zero(0..M, true), Reopen, Write(7 * M, 3), Flush];
    Scene::new("dirty", top, Some(plan), steps)
}

fn child() -> Scene {
    let base = blocks(ImageBuilder::new(20 * MIB, 2 << 20).named("base.vhdx"), &[0, 1, 2, 3, 6]).build();
    let partial = |seed| BlockSpec::partial(Content::pattern(seed), SectorMask::random(seed, 60, 40));
    let top = ImageBuilder::new(24 * MIB, 1 << 20)
        .differencing(&Arc::new(base))
        .block(3, partial(3))
        .block(6, BlockSpec::present(Content::Fill(9)))
        .build();
    let steps = vec![
        Write(5 * M + 3, 8),
        Flush,
        Write(3 * M + 30, 700),
        Write(3 * M, M),
        Plan(7 * M + 8, 8),
        Flush,
        Zero(5 * M..6 * M, true),
        Discard(3 * M..4 * M),
        Write(5 * M + 9, 2),
        Flush,
        Write(9 * M, M),
        DropPlan(10 * M, 5),
        Zero(12 * M + 5..12 * M + 500, false),
        Reopen,
        Discard(0..24 * M),
        Write(M, 3),
        Flush,
    ];
    Scene::new("child", top, None, steps)
}

/// A child whose first partial block needs the first sector bitmap.
fn child_without_bitmap() -> Scene {
    let base = blocks(ImageBuilder::new(6 * MIB, 2 << 20).named("base.vhdx"), &[0, 1]).build();
    let top = ImageBuilder::new(6 * MIB, 1 << 20).differencing(&Arc::new(base)).build();
    let steps = vec![DropPlan(9, 5), Write(3, 8), Write(2 * M, 1), Flush, Write(3 * M, M), Flush];
    Scene::new("no bitmap", top, None, steps)
}

/// Sectors of 4096 bytes, in a child of a child; writes of parts of them too.
fn grandchild_with_large_sectors() -> Scene {
    let large = |size| ImageBuilder::new(size, 1 << 20).sector_sizes(4096, 4096);
    let base = blocks(large(20 * MIB).named("base.vhdx"), &[0, 1, 2, 3]).build();
    let middle = large(22 * MIB)
        .differencing(&Arc::new(base))
        .block(1, BlockSpec::partial(Content::pattern(5), SectorMask::random(5, 9, 40)))
        .named("middle.vhdx")
        .build();
    let top = large(24 * MIB).differencing(&Arc::new(middle)).block(5, BlockSpec::present(Content::Fill(9))).build();
    let steps = vec![
        Write(M + 8, 16),
        Flush,
        Write(3 * M + 3, 2), // a part of one sector
        Write(2 * M - 5, 12),
        Plan(7 * M + 8, 8),
        Flush,
        Zero(M..2 * M, true),
        Discard(5 * M..6 * M),
        Through(9 * M, M),
        DropPlan(10 * M, 8),
        Zero(12 * M + 8..12 * M + 80, false),
        Pause,
        Write(13 * M + 1, 1),
        Flush,
        Reopen,
    ];
    Scene::new("4096", top, None, steps)
}

fn fixed() -> Scene {
    let builder = ImageBuilder::new(8 * MIB, 1 << 20).fixed();
    let top = (0..8).fold(builder, |builder, block| builder.pattern_block(block, block + 1)).build();
    let mut steps = vec![Write(3, 8), Flush, Write(2 * M - 4, 9), Zero(3 * M..5 * M, true), Discard(0..2 * M)];
    steps.extend([Flush, Through(6 * M + 1, 3), Plan(7 * M, 16), DropPlan(5 * M, 4), Pause]);
    steps.extend((0..8).map(|block| Write(block * M + 77, 2)));
    steps.extend([Zero(M + 3..M + 9, false), Flush, Reopen, Write(5 * M, 1), Flush, Reopen]);
    Scene::new("fixed", top, None, steps)
}

fn large_blocks() -> Scene {
    let builder = ImageBuilder::new(5 * 32 * MIB, 32 << 20);
    let top = builder.block(1, BlockSpec::present(Content::Sparse { seed: 1, stride: 400 })).build();
    let steps = vec![
        Write(5, 20),
        Write(64 * M - 3, 9),
        Flush,
        Discard(32 * M..64 * M),
        Flush,
        Write(100 * M, 7),
        Zero(0..32 * M, true),
        Flush,
        Plan(130 * M, 8),
        Pause,
        Write(40 * M, 2),
        Flush,
        Reopen,
    ];
    Scene::new("large blocks", top, None, steps)
}

/// A run of a program.
struct Run<'a> {
    scene: &'a Scene,
    name: String,
    sim: Arc<SimStorage>,
    faulty: Arc<FaultyStorage>,
    image: Option<Image>,
    history: SectorHistory,
}

/// How a request ends in the history.
enum Asked {
    Request(Ticket),
    Through(Ticket),
    Plan(Ticket),
    Flush(FlushTicket),
}

impl<'a> Run<'a> {
    fn new(scene: &'a Scene, name: String) -> Self {
        let sim = sim(&scene.dirty.file);
        let faulty = Arc::new(FaultyStorage::new(Arc::clone(&sim) as Arc<dyn Storage>));
        let image = Some(scene.open(Arc::clone(&faulty) as Arc<dyn Storage>).unwrap());
        Self { scene, name, sim, faulty, image, history: scene.history.clone() }
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    /// Does a step; what it may have done by half is in the history when it fails.
    fn step(&mut self, step: &Step) -> Result<()> {
        let sectors = |first: &u64, count: &u64| first * 512..(first + count) * 512;
        let (asked, done) = match step {
            Write(first, count) => {
                let (ticket, bytes) = self.history.start_write(*first, *count);
                let at_once = first % 2 == 0;
                let tried = if at_once { self.image().write_at_once(&bytes, first * 512) } else { Ok(false) };
                let written = match tried {
                    Ok(false) => self.image().write_at(&bytes, first * 512),
                    other => other.map(|_| ()),
                };
                (Asked::Request(ticket), written)
            }
            Through(first, count) => {
                let (ticket, bytes) = self.history.start_write(*first, *count);
                (Asked::Through(ticket), self.image().write_through_at(&bytes, first * 512))
            }
            Plan(first, count) | DropPlan(first, count) => {
                let (ticket, bytes) = self.history.start_write(*first, *count);
                let done = self.image().plan_write(sectors(first, count)).and_then(|plan| {
                    let wrote = plan.storage().write_at(&bytes, plan.file_offset());
                    wrote.map_err(|error| Error::io("the payload of a plan", error))?;
                    if matches!(step, Plan(..)) { plan.complete() } else { Ok(()) }
                });
                (if matches!(step, Plan(..)) { Asked::Request(ticket) } else { Asked::Plan(ticket) }, done)
            }
            Zero(range, unmap) => {
                let ticket = self.history.start_zero(range.clone());
                (Asked::Request(ticket), self.image().write_zeroes(range.start * 512..range.end * 512, *unmap))
            }
            Discard(range) => {
                let ticket = self.history.start_discard(range.clone());
                (Asked::Request(ticket), self.image().discard(range.start * 512..range.end * 512))
            }
            Flush => (Asked::Flush(self.history.start_flush()), self.image().flush()),
            Pause => {
                let flush = self.history.start_flush();
                (Asked::Flush(flush), self.image().reopen(false).and_then(|()| self.image().reopen(true)))
            }
            Reopen => {
                let flush = self.history.start_flush();
                let done = self.image().close();
                if done.is_ok() {
                    self.image = Some(self.scene.open(Arc::clone(&self.faulty) as Arc<dyn Storage>)?);
                }
                (Asked::Flush(flush), done)
            }
        };
        self.note(asked, &done);
        done
    }

    /// The history learns how a step has ended.
    fn note(&mut self, asked: Asked, done: &Result<()>) {
        match (asked, done) {
            (Asked::Request(ticket), Ok(())) => self.history.finish(ticket),
            (Asked::Through(ticket), Ok(())) => self.history.finish_through(ticket),
            (Asked::Flush(flush), Ok(())) => self.history.finish_flush(flush),
            (Asked::Plan(ticket), _) | (Asked::Request(ticket) | Asked::Through(ticket), Err(_)) => {
                self.history.fail(ticket);
            }
            (Asked::Flush(_), _) => {}
        }
    }

    /// Reads give what is current, whatever has failed.
    fn look(&mut self) {
        for sectors in self.history.interesting() {
            let mut bytes = vec![0; ((sectors.end - sectors.start) * 512) as usize];
            let read = self.image().read_at(&mut bytes, sectors.start * 512);
            read.unwrap_or_else(|error| panic!("{}: {error}", self.name));
            let seen = self.history.observe_run(sectors.start, &bytes);
            seen.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        }
    }

    fn judge(&self) -> ImageJudge {
        let scene = (self.scene.parents(), self.scene.parents());
        let replay = move |storage: Arc<dyn Storage>| {
            let options = OpenOptions::new().write(true).replay(true);
            let options = match &scene.1 {
                Some(parents) => options.parents(Arc::clone(parents)),
                None => options,
            };
            let image = options.open(storage, None)?;
            image.replay()?;
            image.close()
        };
        ImageJudge {
            parents: scene.0,
            tolerated: Vec::new(),
            replay: Some(Arc::new(replay)),
            replay_percent: 100,
            damage_percent: 100,
            second_cuts: 0,
        }
    }

    /// Everything that was flushed is there, after the death of the process and after power cuts on top.
    fn verify(&self, cuts: usize) {
        let judge = self.judge();
        let now = CrashImage::new(self.sim.pages());
        let died = verify_image(&now, &self.history, &judge, &mut Case::new(1));
        died.unwrap_or_else(|error| panic!("{}: after the death of the process: {error}", self.name));
        let point = self.sim.crash_point();
        let states = point.states(&Sampling { exhaustive_ops: 1, random: cuts }, 7);
        for state in states.iter().take(cuts) {
            let image = CrashImage::new(point.build(state));
            let cut = verify_image(&image, &self.history, &judge, &mut Case::new(2));
            cut.unwrap_or_else(|error| panic!("{}: after a power cut: {error}\n{}", self.name, state.describe(&point)));
        }
    }

    /// A new open in place finds everything and goes on.
    fn go_on(mut self) {
        self.faulty.disarm();
        self.image = None;
        let name = format!("{}, opened again", self.name);
        self.image = Some(self.scene.open(Arc::clone(&self.faulty) as Arc<dyn Storage>).unwrap());
        let image = self.image.as_ref().unwrap();
        let settled =
            self.history.settle_all(|bytes, offset| image.read_at(bytes, offset).map_err(|error| error.to_string()));
        settled.unwrap_or_else(|error| panic!("{name}: {error}"));
        self.name = name;
        for step in [Write(6 * M - 5, 10).within(&self.scene.top), Flush, Write(M + 9, 3), Reopen] {
            self.step(&step).unwrap_or_else(|error| panic!("{}: {step:?}: {error}", self.name));
        }
        self.look();
        self.image().close().unwrap();
        self.image = None;
        assert_clean(&self.name, &(Arc::new(load(&self.sim.pages().to_sparse())) as Arc<dyn Storage>));
        self.verify(0);
    }
}

impl Step {
    /// The same where the disk is large enough for it, else at its start.
    fn within(self, top: &BuiltImage) -> Self {
        match self {
            Write(first, count) if (first + count) * 512 > top.model.virtual_size => Write(0, count),
            other => other,
        }
    }
}

/// What a failure has to lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Nothing: nobody needs to know.
    Ignored,
    /// The request fails, and the same again works.
    Request,
    /// Nothing is written any more.
    Poisoned,
    /// It depends on what was being done.
    Either,
}

/// What the failure of an operation has to lead to, by where it goes.
fn expected(scene: &Scene, operation: &Operation, error: Option<&Error>, full: bool) -> Outcome {
    let layout = &scene.top.layout;
    let start = operation.range.start;
    let inside = |offset: u64, length: u64| start >= offset && start < offset + length;
    let bitmap = layout.bitmaps.values().any(|bitmap| inside(*bitmap, MIB));
    match operation.kind {
        OperationKind::PunchHole => Outcome::Ignored,
        OperationKind::Sync => Outcome::Poisoned,
        OperationKind::Write if inside(0, MIB) => Outcome::Poisoned,
        // Making the ring real may be tried again, appending to it may not.
        OperationKind::Write if inside(layout.log, u64::from(layout.log_length)) => {
            if error.is_some_and(|error| error.message().starts_with("cannot make room in the log")) {
                Outcome::Request
            } else {
                Outcome::Poisoned
            }
        }
        // Full, it is in the log and tried again with the next commit.
        OperationKind::Write if inside(layout.bat, u64::from(layout.bat_length)) || bitmap => {
            if full {
                Outcome::Either
            } else {
                Outcome::Poisoned
            }
        }
        OperationKind::Write if inside(layout.metadata, u64::from(layout.metadata_length)) => Outcome::Either,
        // Growing fails the request; cutting at the end fails the end.
        OperationKind::SetLen => Outcome::Either,
        // A bitmap that came in this session cannot be told from payload here.
        OperationKind::Write if scene.top.parent.is_some() => Outcome::Either,
        OperationKind::Write | OperationKind::ZeroRange => Outcome::Request,
        _ => Outcome::Either,
    }
}

/// Runs the program with a fault; false when it came to its end without.
fn run_with(scene: &Scene, name: String, fault: Fault, errno: Errno) -> bool {
    let mut run = Run::new(scene, name);
    run.faulty.arm(fault);
    let mut failed = false;
    for step in &scene.steps {
        let Err(error) = run.step(step) else { continue };
        failed = true;
        let operation = run.faulty.first_fault().unwrap_or_else(|| panic!("{}: {step:?}: {error}", run.name));
        let context = format!("{}: {step:?} met {operation:x?}: {error}", run.name);
        assert_eq!(error.kind(), ErrorKind::Io, "{context}");
        assert_eq!(error.io_error().and_then(std::io::Error::raw_os_error), Some(errno.raw_os_error()), "{context}");
        run.look();
        run.faulty.disarm();
        let again = run.step(step);
        match (expected(scene, &operation, Some(&error), errno == Errno::NOSPC), &again) {
            (Outcome::Ignored, _) => panic!("{context}: nobody needed to know"),
            (Outcome::Request, _) => assert!(again.is_ok(), "{context}: {:?} the second time", again),
            (Outcome::Poisoned, _) => assert!(again.is_err(), "{context}: it went on"),
            (Outcome::Either, _) => {}
        }
        if let Err(error) = again {
            assert_eq!(error.kind(), ErrorKind::Poisoned, "{context}: then {error}");
            let writes = run.sim.counts().operations();
            for refused in [Write(0, 1), Write(M, 2), Zero(0..M, true), Discard(0..M), Flush, Reopen, Pause, Plan(0, 8)]
            {
                let refused = run.step(&refused).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Poisoned, "{context}: {refused}");
            }
            run.look();
            run.verify(3);
            run.image = None;
            assert_eq!(run.sim.counts().operations(), writes, "{context}: something was written after all");
            run.verify(3);
            run.go_on();
            return true;
        }
    }
    let fired = run.faulty.fired() > 0;
    if fired && !failed {
        let operation = run.faulty.first_fault().unwrap();
        let unheard =
            matches!(expected(scene, &operation, None, errno == Errno::NOSPC), Outcome::Ignored | Outcome::Either);
        let step_down = operation.kind == OperationKind::SetLen; // a smaller step was possible
        // Where room was missing and freed space was waiting, that was settled and the request made again.
        let made_up =
            errno == Errno::NOSPC && matches!(operation.kind, OperationKind::Write | OperationKind::ZeroRange);
        assert!(unheard || step_down || made_up, "{}: {operation:x?} failed, and nobody said so", run.name);
    }
    run.faulty.disarm();
    run.look();
    run.verify(2);
    run.go_on();
    fired
}

fn each_operation_fails(scene: &Scene, what: &str, errno: Errno, change: impl Fn(Fault) -> Fault) {
    for n in 1.. {
        let name = format!("{}, {what} at {n}", scene.name);
        if !run_with(scene, name, change(Fault::new(n, errno)), errno) {
            assert!(n > 20, "{}: the program does hardly anything", scene.name);
            return;
        }
    }
}

fn scenes() -> [Scene; 7] {
    let special = [grandchild_with_large_sectors(), fixed(), large_blocks()];
    let [first, second, third] = special;
    [dynamic(), dirty(), child(), child_without_bitmap(), first, second, third]
}

#[test]
fn every_operation_fails_with_an_input_output_error() {
    scenes().iter().for_each(|scene| each_operation_fails(scene, "EIO", Errno::IO, |fault| fault));
}

#[test]
fn every_operation_finds_the_disk_full() {
    scenes().iter().for_each(|scene| each_operation_fails(scene, "ENOSPC", Errno::NOSPC, |fault| fault));
}

#[test]
fn every_operation_is_cut_short() {
    for (number, scene) in (0..).zip(scenes().iter()) {
        let errno = if number % 3 == 0 { Errno::IO } else { Errno::NOSPC };
        let bytes = 512 * (1 + number * 5 % 11);
        each_operation_fails(scene, "short", errno, |fault| fault.after(Effect::First(bytes)));
    }
}

#[test]
fn every_operation_succeeds_and_says_it_failed() {
    let scenes = [dynamic(), child()];
    scenes.iter().for_each(|scene| each_operation_fails(scene, "liar", Errno::IO, |fault| fault.after(Effect::All)));
}

/// From the n-th operation on nothing works any more, not even the end of the session.
#[test]
fn nothing_works_from_some_operation_on() {
    let with = |errno| move |scene| (scene, errno);
    let full = [dynamic(), child(), large_blocks()].map(with(Errno::NOSPC));
    for (scene, errno) in [dynamic(), child(), fixed()].map(with(Errno::IO)).into_iter().chain(full) {
        for n in 1.. {
            let mut run = Run::new(&scene, format!("{}, dead at {n}", scene.name));
            run.faulty.arm(Fault::new(n, errno).from_then_on());
            let mut ended = false;
            for step in &scene.steps {
                if let Err(error) = run.step(step) {
                    assert!(matches!(error.kind(), ErrorKind::Io | ErrorKind::Poisoned), "{}: {error}", run.name);
                    ended = true;
                }
            }
            run.look();
            run.image = None;
            run.verify(3);
            run.go_on();
            if !ended {
                break;
            }
        }
    }
}

/// Every read fails in its turn: of entries, of bitmaps, of headers that are looked at again, of the log.
#[test]
fn every_read_fails() {
    for scene in scenes() {
        let mut n = 0;
        loop {
            n += 1;
            let mut run = Run::new(&scene, format!("{}, read {n}", scene.name));
            run.faulty.arm(Fault::new(n, Errno::IO).with_reads());
            for step in &scene.steps {
                let Err(error) = run.step(step) else { continue };
                let context = format!("{}: {step:?}: {error}", run.name);
                assert_eq!(error.kind(), ErrorKind::Io, "{context}");
                let operation = run.faulty.first_fault().unwrap();
                run.faulty.disarm();
                if let Err(error) = run.step(step) {
                    assert_eq!(error.kind(), ErrorKind::Poisoned, "{context}: then {error}");
                    let header = operation.range.start < MIB;
                    let log = scene.top.layout.log..scene.top.layout.log + u64::from(scene.top.layout.log_length);
                    let reads = matches!(operation.kind, OperationKind::Read | OperationKind::FindData);
                    // A log that cannot be read while it is put into place, and headers that cannot be compared.
                    let replay = scene.name == "dirty" && n < 20;
                    let header = header || log.contains(&operation.range.start);
                    assert!(!reads || header || replay, "{context}: {operation:x?}");
                    break;
                }
            }
            let fired = run.faulty.fired() > 0;
            run.faulty.disarm();
            run.look();
            run.image = None;
            run.verify(2);
            run.go_on();
            if !fired {
                break;
            }
        }
        assert!(n > 20, "{}: {n}", scene.name);
    }
}

/// Reads that fail while an image is opened for writing: an error, an untouched file, and the next open works.
#[test]
fn every_read_of_opening_fails() {
    for scene in scenes() {
        for n in 1.. {
            let sim = sim(&scene.dirty.file);
            let before = sim.counts().operations();
            let faulty = Arc::new(FaultyStorage::new(Arc::clone(&sim) as Arc<dyn Storage>));
            faulty.arm(Fault::new(n, Errno::IO).with_reads());
            let opened = scene.open(Arc::clone(&faulty) as Arc<dyn Storage>);
            if faulty.fired() == 0 {
                opened.unwrap();
                assert!(n > 3);
                break;
            }
            if let Err(error) = opened {
                assert_eq!(error.kind(), ErrorKind::Io, "{}, {n}: {error}", scene.name);
            }
            assert_eq!(sim.counts().operations(), before, "{}, {n}: opening wrote", scene.name);
            scene.open(faulty).unwrap();
        }
    }
}

/// A disk with less and less room: what needs none goes on, nothing is lost, and with room everything goes on, or after a
/// new open.
#[test]
fn a_full_disk_loses_nothing_and_goes_on_when_there_is_room() {
    for scene in scenes() {
        for space in [Space::Sparse, Space::Dense] {
            for pages in [0, 1, 2, 3, 5, 8, 13, 20, 40, 100, 255, 256, 257, 300, 520] {
                let mut run = Run::new(&scene, format!("{}, {space:?}, room for {pages}", scene.name));
                run.faulty.limit_space(pages * 4096, space);
                let mut full = 0;
                let mut poisoned = false;
                for step in &scene.steps {
                    match run.step(step) {
                        Ok(()) => {}
                        Err(error) if error.kind() == ErrorKind::Poisoned && poisoned => {}
                        Err(error) => {
                            full += 1;
                            let kind = error.io_error().map(std::io::Error::kind);
                            assert_eq!(kind, Some(std::io::ErrorKind::StorageFull), "{}: {step:?}: {error}", run.name);
                            poisoned |= run.step(&Flush).is_err_and(|error| error.kind() == ErrorKind::Poisoned);
                        }
                    }
                }
                run.look();
                run.verify(3);
                run.faulty.make_room(1 << 40);
                if full > 0 && !poisoned {
                    for step in &scene.steps {
                        run.step(step).unwrap_or_else(|error| panic!("{}: with room: {step:?}: {error}", run.name));
                    }
                    run.look();
                }
                run.image = None;
                run.verify(2);
                run.go_on();
            }
        }
    }
}

/// A sync that fails and takes with it what it should have made durable; the next one would say that all is well.
#[test]
fn a_failed_sync_is_never_tried_again() {
    for scene in [dynamic(), child()] {
        for n in 1.. {
            let mut run = Run::new(&scene, format!("{}, sync {n}", scene.name));
            let fault = vhdkit_testkit::sim::Fault::nth(n, vhdkit_testkit::sim::FaultError::EIO);
            run.sim.set_fault(Some(fault.only(&[OpKind::Sync]).sync_loses(n)));
            let mut failed = false;
            for step in &scene.steps {
                match run.step(step) {
                    Ok(()) => assert!(!failed, "{}: {step:?} after a failed sync", run.name),
                    Err(error) => {
                        let expected = if failed { ErrorKind::Poisoned } else { ErrorKind::Io };
                        assert_eq!(error.kind(), expected, "{}: {step:?}: {error}", run.name);
                        failed = true;
                    }
                }
            }
            if !run.sim.fault_struck() {
                break;
            }
            assert!(failed, "{}: a sync failed and nobody said so", run.name);
            run.look();
            run.image = None;
            // Only what is durable counts: the cache has lost the rest.
            let point = run.sim.crash_point();
            let judge = run.judge();
            for state in point.states(&Sampling { exhaustive_ops: 2, random: 6 }, n) {
                let image = CrashImage::new(point.build(&state));
                let verdict = verify_image(&image, &run.history, &judge, &mut Case::new(n));
                verdict.unwrap_or_else(|error| panic!("{}: {error}", run.name));
            }
        }
    }
}

/// A storage that the tests above could not break would prove nothing: one without any fault loses what was not flushed.
#[test]
fn the_judge_notices_a_lost_sector() {
    let scene = dynamic();
    let mut run = Run::new(&scene, "control".to_owned());
    run.step(&Write(5 * M + 3, 8)).unwrap();
    run.step(&Flush).unwrap();
    let place = {
        let plan = run.image().plan_write((5 * M + 3) * 512..(5 * M + 4) * 512).unwrap();
        plan.file_offset()
    };
    let mut damaged = run.sim.pages();
    damaged.write(place, &[0; 512]);
    let verdict = verify_image(&CrashImage::new(damaged), &run.history, &run.judge(), &mut Case::new(1));
    assert!(verdict.unwrap_err().contains("allowed"));
    let memory: MemoryStorage = load(&run.sim.pages().to_sparse());
    assert_eq!(memory.len().unwrap(), run.sim.len().unwrap());
}
