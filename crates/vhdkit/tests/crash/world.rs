//! A disk under test, and the steps that a program takes with it, also in the middle of other steps.

// By path: other tests use this module from elsewhere.
#[path = "judge.rs"]
mod judge;
#[path = "steps.rs"]
mod steps;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{JoinHandle, ThreadId};

use vhdkit::format::header::Header;
use vhdkit::format::log::SECTOR as LOG_SECTOR;
use vhdkit::image::simulation::{BrokenRule, Phase, phase, start_rings_at};
use vhdkit::image::{BlockDevice, Image, OpenOptions, ParentResolver, ReadPlan, WritePlan};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{
    Fault, FaultError, FlushTicket, Judge, Lab, OpInfo, OpKind, PageMap, ReadTicket, SectorHistory, Setup, SimHandle,
    Ticket,
};

use crate::bases::Base;
pub(crate) use judge::current_header;
use judge::{CrashJudge, SessionStart, headers, judge_of};

/// Bytes of what the simulator counts in.
pub(crate) const SECTOR: u64 = 512;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a program is to behave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// Steps of a program.
    pub(crate) steps: u64,
    /// In how many of a hundred operations of the storage something else happens in between.
    pub(crate) nested_percent: u64,
    /// Only in the middle of commits.
    pub(crate) nested_in_commits: bool,
    /// In how many of a hundred such cases a block is given up, its space retired, and something else put there.
    pub(crate) chain_percent: u64,
    /// In how many of a hundred flushes another one, of another thread, is asked for in the middle of the commit.
    pub(crate) follow_percent: u64,
    /// Of a hundred crash images with a dirty log, how many are replayed in place.
    pub(crate) replay_percent: u64,
    /// Of a hundred crash images, of how many either header copy is damaged.
    pub(crate) damage_percent: u64,
    /// Second cuts in each of those.
    pub(crate) second_cuts: usize,
    /// A rule that is broken.
    pub(crate) broken: Option<BrokenRule>,
}

impl Style {
    /// Ordinary programs.
    pub(crate) const PLAIN: Self = Self {
        steps: 40,
        nested_percent: 20,
        nested_in_commits: false,
        chain_percent: 10,
        follow_percent: 10,
        replay_percent: 25,
        damage_percent: 10,
        second_cuts: 1,
        broken: None,
    };
}

/// A plan to read that is open.
struct HeldRead {
    plan: ReadPlan,
    ticket: ReadTicket,
}

/// A flush of another thread.
type Follower = (FlushTicket, JoinHandle<vhdkit::Result<()>>);

/// A plan that is open, whose payload was written or not.
struct Held {
    plan: WritePlan,
    ticket: Option<Ticket>,
}

/// The disk and everything that happens to it.
pub(crate) struct World<'a> {
    lab: &'a Lab,
    base: Base,
    style: Style,
    pub(crate) shared: Arc<Live>,
}

/// What hooks see as well.
pub(crate) struct Live {
    sim: SimHandle,
    judge: Arc<CrashJudge>,
    image: Mutex<Option<Arc<Image>>>,
    plans: Mutex<Vec<Held>>,
    reads: Mutex<Vec<HeldRead>>,
    follower: Mutex<Option<Follower>>,
    /// True while a flush of the program itself is under way.
    is_flushing: AtomicBool,
    /// True while something waits that a plan would stand in the way of.
    no_plans: AtomicBool,
    /// True while the image is open for reading only.
    is_read_only: AtomicBool,
    /// True while reads may go through the overlay of a dirty log: the session cannot start in the middle of one.
    has_overlay: AtomicBool,
    /// The block that the program's own step is about.
    block: AtomicU64,
    /// The program's thread. Another one that flushes beside it does nothing else.
    thread: ThreadId,
    hook_rng: Mutex<Rng>,
    style: Style,
    error: Mutex<Option<String>>,
    disk_bytes: u64,
    block_bytes: u64,
    /// Blocks that the program uses, so that they meet again.
    blocks: Vec<u64>,
}

/// Prints what happens, with `VHDKIT_CRASH_TRACE` set: for looking at one program again.
fn trace(text: impl FnOnce() -> String) {
    if std::env::var_os("VHDKIT_CRASH_TRACE").is_some() {
        eprintln!("{}", text());
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Where the next log begins in its ring: mostly shortly before its end, so that it soon goes on at the start.
fn ring_start(rng: &mut Rng, sectors: u64) -> u64 {
    match rng.below(4) {
        0 => 0,
        1 => rng.below(sectors.max(1)),
        _ => sectors.saturating_sub(rng.between(1, 16)),
    }
}

fn options(broken: Option<BrokenRule>, parents: Option<&Arc<dyn ParentResolver>>) -> OpenOptions {
    let options = OpenOptions::new().write(true).replay(true).break_rule(broken);
    match parents {
        Some(parents) => options.parents(Arc::clone(parents)),
        None => options,
    }
}

impl<'a> World<'a> {
    /// Starts with an image that is all durable.
    pub(crate) fn start(lab: &'a Lab, rng: &mut Rng, base: Base, style: Style) -> Result<Self, String> {
        let file = PageMap::from(&base.image.file);
        let history = SectorHistory::of_model(&base.image.model);
        let shared = Live::start(lab, rng, &base, style, file, history);
        let world = Self { lab, base, style, shared };
        world.open()?;
        Ok(world)
    }

    fn open(&self) -> Result<(), String> {
        self.shared.open(self.style.broken)
    }

    /// Cuts the power for good, and goes on with one of the things that are left.
    fn crash(&mut self, rng: &mut Rng) -> Result<(), String> {
        self.shared.sim.step("power cut");
        let left = self.shared.sim.crash(rng);
        // What was under way ends with the machine: nothing of it reaches the file any more.
        let storage = self.shared.sim.storage();
        storage.set_hook(None);
        storage.set_read_hook(None);
        storage.set_observer(None);
        storage.set_fault(Some(Fault::nth(1, FaultError::EIO).persistent()));
        lock(&self.shared.plans).clear();
        lock(&self.shared.reads).clear();
        lock(&self.shared.image).take();
        let mut history = self.shared.sim.history().clone();
        let view = OpenOptions::new();
        let view = match &self.shared.judge.inner.parents {
            Some(parents) => view.parents(Arc::clone(parents)),
            None => view,
        };
        let view = view.open(left.storage(), None).map_err(text)?;
        history.settle_all(|buf, offset| view.read_at(buf, offset).map_err(text))?;
        self.shared = Live::start(self.lab, rng, &self.base, self.style, left.pages().clone(), history);
        self.open()
    }

    /// Runs the program.
    pub(crate) fn run(&mut self, rng: &mut Rng) -> Result<(), String> {
        for _ in 0..self.style.steps {
            if self.shared.sim.is_over() {
                return Ok(());
            }
            match rng.below(100) {
                0..2 => self.shared.close_and_open(self.style.broken)?,
                2 => self.shared.drop_and_open(self.style.broken)?,
                3 => self.shared.reopen(rng)?,
                4 if self.style.broken.is_none() => self.crash(rng)?,
                _ => self.shared.step(rng, false)?,
            }
            if let Some(error) = lock(&self.shared.error).take() {
                return Err(error);
            }
        }
        self.shared.end_plans();
        self.shared.close_and_open(self.style.broken)
    }
}

impl Live {
    fn start(lab: &Lab, rng: &mut Rng, base: &Base, style: Style, file: PageMap, history: SectorHistory) -> Arc<Self> {
        let judge = judge_of(base, &style);
        let disk_bytes = history.sector_count() * SECTOR;
        let sim = lab.start(Setup {
            file,
            history,
            judge: Arc::clone(&judge) as Arc<dyn Judge>,
            phase_source: || phase().as_str(),
        });
        let live = Arc::new(Self {
            sim,
            judge,
            image: Mutex::new(None),
            plans: Mutex::default(),
            reads: Mutex::default(),
            follower: Mutex::default(),
            is_flushing: AtomicBool::new(false),
            no_plans: AtomicBool::new(false),
            is_read_only: AtomicBool::new(false),
            has_overlay: AtomicBool::new(false),
            block: AtomicU64::new(0),
            thread: std::thread::current().id(),
            hook_rng: Mutex::new(Rng::new(rng.next_u64())),
            style,
            error: Mutex::new(None),
            disk_bytes,
            block_bytes: u64::from(base.image.model.block_size),
            blocks: base.blocks.clone(),
        });
        let weak: Weak<Self> = Arc::downgrade(&live);
        let hook: vhdkit_testkit::sim::Hook = Arc::new(move |info| {
            trace(|| format!("      {info}"));
            if let Some(live) = weak.upgrade() {
                live.nested(info);
            }
        });
        live.sim.storage().set_hook(Some(Arc::clone(&hook)));
        live.sim.storage().set_read_hook(Some(hook));
        live
    }

    fn image(&self) -> Option<Arc<Image>> {
        lock(&self.image).clone()
    }

    fn open(&self, broken: Option<BrokenRule>) -> Result<(), String> {
        let storage = self.sim.storage();
        let header = current_header(&*storage)?;
        let start = SessionStart::new(&header, self.sim.history().clone(), &storage);
        *lock(&self.judge.start) = Some(start);
        self.has_overlay.store(header.is_dirty(), Ordering::Relaxed);
        self.no_plans.store(false, Ordering::Relaxed);
        let sectors = u64::from(header.log_length) / LOG_SECTOR;
        start_rings_at(ring_start(&mut lock(&self.hook_rng), sectors));
        let opened = options(broken, self.judge.inner.parents.as_ref()).open(storage, None);
        *lock(&self.image) = Some(Arc::new(opened.map_err(text)?));
        Ok(())
    }

    /// Something else, in the middle of an operation of the storage: often one step, else several.
    fn nested(&self, info: &OpInfo) {
        if std::thread::current().id() != self.thread {
            return;
        }
        let in_commit = matches!(phase(), Phase::Log | Phase::Home | Phase::Retire);
        if info.kind != OpKind::Read && !matches!(phase(), Phase::Start | Phase::Replay) {
            self.has_overlay.store(false, Ordering::Relaxed);
        }
        let is_locked = info.kind == OpKind::Read && self.has_overlay.load(Ordering::Relaxed)
            || self.is_read_only.load(Ordering::Relaxed);
        let mut rng = {
            let mut rng = lock(&self.hook_rng);
            if is_locked || (self.style.nested_in_commits && !in_commit) || !rng.chance(self.style.nested_percent) {
                return;
            }
            Rng::new(rng.next_u64())
        };
        if let Err(error) = self.steps_between(&mut rng, info) {
            lock(&self.error).get_or_insert(format!("in between: {error}"));
        }
    }

    fn steps_between(&self, rng: &mut Rng, info: &OpInfo) -> Result<(), String> {
        let at_sync = info.kind == OpKind::Sync && !info.after && phase() == Phase::Log;
        if at_sync && self.is_flushing.load(Ordering::Relaxed) && rng.chance(self.style.follow_percent) {
            self.flush_beside(rng)?;
        }
        if rng.chance(self.style.chain_percent) {
            return self.reuse_space(rng);
        }
        let count = if rng.below(3) == 0 { rng.between(2, 6) } else { 1 };
        (0..count).try_for_each(|_| self.step(rng, true))
    }

    /// Ends what is held, and lets nothing else be held until the image is opened again.
    fn end_plans_for_good(&self) {
        self.no_plans.store(true, Ordering::Relaxed);
        self.end_plans();
    }

    fn end_plans(&self) {
        let reads: Vec<HeldRead> = lock(&self.reads).drain(..).collect();
        for read in reads {
            if let (Some(image), None) = (self.image(), lock(&self.error).as_ref())
                && let Err(error) = self.finish_read(&image, read)
            {
                lock(&self.error).get_or_insert(error);
            }
        }
        let held: Vec<Held> = lock(&self.plans).drain(..).collect();
        for held in held {
            if let Some(ticket) = held.ticket {
                self.sim.history().fail(ticket);
            }
        }
    }

    /// Ends the session; nothing of it is left to be done.
    fn close(&self) -> Result<(), String> {
        self.end_plans_for_good();
        self.sim.step("close");
        let Some(image) = self.image() else { return Ok(()) };
        let before = self.sim.storage().counts().operations();
        let flush = self.sim.history().start_flush();
        image.close().map_err(text)?;
        self.sim.history().finish_flush(flush);
        lock(&self.image).take();
        if self.sim.storage().counts().operations() > before {
            self.judge.judge_closed(&self.sim.storage().pages(), &self.sim.history())?;
            self.headers_agree()?;
        }
        Ok(())
    }

    /// Both headers say the same (V-171), and that the log is clean (V-172).
    fn headers_agree(&self) -> Result<(), String> {
        let [Some(first), Some(second)] = headers(&*self.sim.storage()) else {
            return Err("a header is damaged after closing".to_owned());
        };
        let same = Header { sequence_number: 0, ..first } == Header { sequence_number: 0, ..second };
        if !same || first.sequence_number.abs_diff(second.sequence_number) != 1 || first.is_dirty() {
            return Err(format!("after closing, the headers are {first:?} and {second:?}"));
        }
        Ok(())
    }

    fn close_and_open(&self, broken: Option<BrokenRule>) -> Result<(), String> {
        self.close()?;
        self.open(broken)
    }

    fn drop_and_open(&self, broken: Option<BrokenRule>) -> Result<(), String> {
        self.end_plans_for_good();
        self.sim.step("drop");
        let flush = self.sim.history().start_flush();
        let image = lock(&self.image).take();
        drop(image);
        self.sim.history().finish_flush(flush);
        self.open(broken)
    }

    fn reopen(&self, rng: &mut Rng) -> Result<(), String> {
        self.end_plans_for_good();
        self.sim.step("reopen");
        let Some(image) = self.image() else { return Ok(()) };
        let flush = self.sim.history().start_flush();
        image.reopen(false).map_err(text)?;
        self.sim.history().finish_flush(flush);
        self.is_read_only.store(true, Ordering::Relaxed);
        self.read(rng, &image, false)?;
        self.is_read_only.store(false, Ordering::Relaxed);
        image.reopen(true).map_err(text)?;
        self.no_plans.store(false, Ordering::Relaxed);
        Ok(())
    }
}
