//! A disk under test, and the steps that a program takes with it, also in the middle of other steps.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES, Header, OFFSETS};
use vhdkit::image::simulation::{BrokenRule, Phase, phase};
use vhdkit::image::{BlockDevice, Image, OpenOptions, ParentResolver, WritePlan};
use vhdkit::storage::Storage;
use vhdkit::{Error, ErrorKind};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{
    Case, CrashImage, Fault, FaultError, ImageJudge, Judge, Lab, PageMap, SectorHistory, Setup, SimHandle, Ticket,
    frozen_parents, verify_image, verify_view,
};

use crate::bases::Base;
use crate::truth::entries_tell_the_truth;

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
    /// Of a hundred crash images, how many are replayed in place.
    pub(crate) replay_percent: u64,
    /// Second cuts in each of those.
    pub(crate) second_cuts: usize,
    /// A rule that is broken.
    pub(crate) broken: Option<BrokenRule>,
}

/// What the disk was when its session began.
struct SessionStart {
    data_write_guid: Guid,
    history: SectorHistory,
}

/// Judges crash images: all that the simulator judges, and what only this format knows.
pub(crate) struct CrashJudge {
    inner: ImageJudge,
    start: Mutex<Option<SessionStart>>,
    witness: Option<Arc<dyn Judge>>,
}

impl Judge for CrashJudge {
    fn judge(&self, image: &CrashImage, history: &SectorHistory, case: &mut Case) -> Result<(), String> {
        verify_image(image, history, &self.inner, case)?;
        let header = current_header(&*image.storage())?;
        entries_tell_the_truth(&image.storage(), &header, self.inner.parents.as_ref())?;
        // While the identity is the old one, so is the content: else a child would take a changed parent for its own.
        if let Some(start) = lock(&self.start).as_ref()
            && header.data_write_guid == start.data_write_guid
        {
            let old = verify_view(&image.storage(), &start.history, &self.inner);
            old.map_err(|error| format!("the data write GUID is that of the session's start: {error}"))?;
        }
        self.witness.as_ref().map_or(Ok(()), |witness| witness.judge(image, history, case))
    }
}

/// Both header copies, where they are valid.
pub(crate) fn headers(storage: &dyn Storage) -> [Option<Header>; 2] {
    OFFSETS.map(|offset| {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(&mut bytes, offset).ok()?;
        Header::decode(&bytes)
    })
}

pub(crate) fn current_header(storage: &dyn Storage) -> Result<Header, String> {
    let newest = headers(storage).into_iter().flatten().max_by_key(|header| header.sequence_number);
    newest.ok_or_else(|| "no valid header".to_owned())
}

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

fn options(broken: Option<BrokenRule>, parents: Option<&Arc<dyn ParentResolver>>) -> OpenOptions {
    let options = OpenOptions::new().write(true).replay(true).break_rule(broken);
    match parents {
        Some(parents) => options.parents(Arc::clone(parents)),
        None => options,
    }
}

fn judge_of(base: &Base, style: &Style) -> Arc<CrashJudge> {
    let parents = std::iter::successors(base.image.parent.as_deref(), |parent| parent.parent.as_deref());
    let parents: Vec<CrashImage> = parents.map(|parent| CrashImage::new(PageMap::from(&parent.file))).collect();
    let parents = Some(frozen_parents(parents));
    let (broken, chain) = (style.broken, parents.clone());
    let inner = ImageJudge {
        parents,
        tolerated: base.tolerated.clone(),
        replay: Some(Arc::new(move |storage: Arc<dyn Storage>| {
            let image = options(broken, chain.as_ref()).open(storage, None)?;
            image.replay()?;
            image.close()
        })),
        replay_percent: style.replay_percent,
        second_cuts: style.second_cuts,
    };
    Arc::new(CrashJudge { inner, start: Mutex::new(None), witness: base.witness.clone() })
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
        storage.set_observer(None);
        storage.set_fault(Some(Fault::nth(1, FaultError::EIO).persistent()));
        lock(&self.shared.plans).clear();
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
            hook_rng: Mutex::new(Rng::new(rng.next_u64())),
            style,
            error: Mutex::new(None),
            disk_bytes,
            block_bytes: u64::from(base.image.model.block_size),
            blocks: base.blocks.clone(),
        });
        let weak: Weak<Self> = Arc::downgrade(&live);
        live.sim.storage().set_hook(Some(Arc::new(move |info| {
            trace(|| format!("      {info}"));
            if let Some(live) = weak.upgrade() {
                live.nested();
            }
        })));
        live
    }

    fn image(&self) -> Option<Arc<Image>> {
        lock(&self.image).clone()
    }

    fn open(&self, broken: Option<BrokenRule>) -> Result<(), String> {
        let storage = self.sim.storage();
        let header = current_header(&*storage)?;
        *lock(&self.judge.start) =
            Some(SessionStart { data_write_guid: header.data_write_guid, history: self.sim.history().clone() });
        let opened = options(broken, self.judge.inner.parents.as_ref()).open(storage, None);
        *lock(&self.image) = Some(Arc::new(opened.map_err(text)?));
        Ok(())
    }

    /// Something else, in the middle of an operation of the storage.
    fn nested(&self) {
        let mut rng = {
            let mut rng = lock(&self.hook_rng);
            let here = !self.style.nested_in_commits || matches!(phase(), Phase::Log | Phase::Home | Phase::Retire);
            if !here || !rng.chance(self.style.nested_percent) {
                return;
            }
            Rng::new(rng.next_u64())
        };
        if let Err(error) = self.step(&mut rng, true) {
            lock(&self.error).get_or_insert(format!("in between: {error}"));
        }
    }

    fn end_plans(&self) {
        let held: Vec<Held> = lock(&self.plans).drain(..).collect();
        for held in held {
            if let Some(ticket) = held.ticket {
                self.sim.history().fail(ticket);
            }
        }
    }

    /// Ends the session; nothing of it is left to be done.
    fn close(&self) -> Result<(), String> {
        self.end_plans();
        self.sim.step("close");
        let Some(image) = self.image() else { return Ok(()) };
        let before = self.sim.storage().counts().operations();
        let flush = self.sim.history().start_flush();
        image.close().map_err(text)?;
        self.sim.history().finish_flush(flush);
        if self.sim.storage().counts().operations() > before {
            self.headers_agree()?;
        }
        lock(&self.image).take();
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
        self.end_plans();
        self.sim.step("drop");
        let flush = self.sim.history().start_flush();
        let image = lock(&self.image).take();
        drop(image);
        self.sim.history().finish_flush(flush);
        self.open(broken)
    }

    fn reopen(&self, rng: &mut Rng) -> Result<(), String> {
        self.end_plans();
        self.sim.step("reopen");
        let Some(image) = self.image() else { return Ok(()) };
        let flush = self.sim.history().start_flush();
        image.reopen(false).map_err(text)?;
        self.sim.history().finish_flush(flush);
        self.read(rng, &image)?;
        image.reopen(true).map_err(text)
    }

    /// One step. Nested ones never wait.
    pub(crate) fn step(&self, rng: &mut Rng, nested: bool) -> Result<(), String> {
        trace(|| format!("step nested={nested} phase={:?} ops={}", phase(), self.sim.storage().counts().operations()));
        let Some(image) = self.image() else { return Ok(()) };
        match rng.below(100) {
            0..30 => self.write(rng, &image, nested),
            30..35 => self.write_block(rng, &image, nested),
            35..38 if !nested => self.write_through(rng, &image),
            35..45 => self.zero(rng, &image, nested),
            45..57 => self.discard(rng, &image, nested),
            57..72 => self.flush(&image, nested),
            72..82 => self.begin_plan(rng, &image),
            82..94 => self.go_on_with_plan(rng),
            _ => self.read(rng, &image),
        }
    }

    /// A few sectors, often where something was before.
    fn sectors(&self, rng: &mut Rng) -> Range<u64> {
        let block = rng.pick(&self.blocks);
        let start = block * self.block_bytes;
        let per_block = (self.block_bytes / SECTOR).min((self.disk_bytes - start) / SECTOR);
        let first = match rng.below(4) {
            0 => 0,
            1 => per_block - rng.between(1, 8).min(per_block),
            2 => rng.below(64).min(per_block - 1),
            _ => rng.below(per_block),
        };
        let first = start / SECTOR + first;
        let count = match rng.below(6) {
            0 => 1,
            1..4 => rng.between(1, 8),
            _ => rng.between(8, 33),
        };
        first..(first + count).min(self.disk_bytes / SECTOR)
    }

    fn whole_blocks(&self, rng: &mut Rng) -> Range<u64> {
        let block = rng.pick(&self.blocks);
        let end = (block + rng.between(1, 3)) * self.block_bytes;
        block * self.block_bytes / SECTOR..end.min(self.disk_bytes) / SECTOR
    }

    /// What a step that might wait has come to: true when it was done.
    fn done(&self, what: &str, ticket: Ticket, result: Result<bool, Error>) -> Result<bool, String> {
        trace(|| format!("   {what} {ticket:?} {result:?}"));
        match result {
            Ok(true) => {
                self.sim.history().finish(ticket);
                Ok(true)
            }
            Ok(false) => {
                self.sim.history().fail(ticket);
                Ok(false)
            }
            Err(error) => {
                self.sim.history().fail(ticket);
                if error.kind() == ErrorKind::Busy { Ok(false) } else { Err(format!("{what}: {error}")) }
            }
        }
    }

    /// Does something that might wait. What stands in the way of a step that is not nested is a plan of this very thread.
    fn attempt(&self, nested: bool, mut attempt: impl FnMut() -> Result<bool, Error>) -> Result<bool, Error> {
        for _ in 0..if nested { 1 } else { 50 } {
            if attempt()? {
                return Ok(true);
            }
            if !nested {
                self.end_plans();
            }
        }
        Ok(false)
    }

    fn write_sectors(&self, image: &Image, sectors: Range<u64>, nested: bool) -> Result<(), String> {
        trace(|| format!("write {sectors:?}"));
        if !nested {
            self.sim.step(format!("write {sectors:?}"));
        }
        let (ticket, bytes) = self.sim.history().start_write(sectors.start, sectors.end - sectors.start);
        let offset = sectors.start * SECTOR;
        let result = self.attempt(nested, || image.try_write_at(&bytes, offset));
        self.done("write", ticket, result).map(|_| ())
    }

    fn write(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        self.write_sectors(image, self.sectors(rng), nested)
    }

    fn write_block(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        if self.block_bytes > 1 << 20 || (nested && rng.below(3) != 0) {
            return self.write(rng, image, nested);
        }
        let block = rng.pick(&self.blocks);
        let end = ((block + 1) * self.block_bytes).min(self.disk_bytes);
        self.write_sectors(image, block * self.block_bytes / SECTOR..end / SECTOR, nested)
    }

    fn write_through(&self, rng: &mut Rng, image: &Image) -> Result<(), String> {
        let sectors = self.sectors(rng);
        self.sim.step(format!("write through {sectors:?}"));
        let (ticket, bytes) = self.sim.history().start_write(sectors.start, sectors.end - sectors.start);
        let written = self.attempt(false, || image.try_write_at(&bytes, sectors.start * SECTOR)).map_err(text)?;
        image.flush().map_err(text)?;
        if written {
            self.sim.history().finish_through(ticket);
        } else {
            self.sim.history().fail(ticket);
        }
        Ok(())
    }

    fn zero(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        let sectors = if rng.below(2) == 0 { self.sectors(rng) } else { self.whole_blocks(rng) };
        let unmap = rng.below(4) != 0;
        trace(|| format!("zero {sectors:?} {unmap}"));
        if !nested {
            self.sim.step(format!("zero {sectors:?} {unmap}"));
        }
        let range = sectors.start * SECTOR..sectors.end * SECTOR;
        let ticket = self.sim.history().start_zero(sectors);
        let result = self.attempt(nested, || image.try_write_zeroes(range.clone(), unmap));
        self.done("zero", ticket, result).map(|_| ())
    }

    fn discard(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        let sectors = self.whole_blocks(rng);
        if !nested {
            self.sim.step(format!("discard {sectors:?}"));
        }
        let range = sectors.start * SECTOR..sectors.end * SECTOR;
        let ticket = self.sim.history().start_discard(sectors.clone());
        let result = self.attempt(nested, || image.try_discard(range.clone()));
        let done = self.done("discard", ticket, result)?;
        if done && !nested {
            self.observe(image, &sectors)?;
        }
        Ok(())
    }

    fn flush(&self, image: &Image, nested: bool) -> Result<(), String> {
        if !nested {
            self.sim.step("flush");
        }
        let flush = self.sim.history().start_flush();
        let done = if nested { image.try_flush() } else { image.flush().map(|()| true) };
        match done {
            Ok(true) => {
                trace(|| "   flushed".to_owned());
                self.sim.history().finish_flush(flush)
            }
            Ok(false) => {}
            Err(error) => return Err(format!("flush: {error}")),
        }
        Ok(())
    }

    fn begin_plan(&self, rng: &mut Rng, image: &Image) -> Result<(), String> {
        if lock(&self.plans).len() >= 4 {
            return self.go_on_with_plan(rng);
        }
        let unit = u64::from(image.logical_sector_size()) / SECTOR;
        let sectors = self.sectors(rng);
        let sectors = sectors.start / unit * unit..sectors.end.next_multiple_of(unit);
        match image.try_plan_write(sectors.start * SECTOR..sectors.end * SECTOR) {
            Ok(Some(plan)) => lock(&self.plans).push(Held { plan, ticket: None }),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(error) => return Err(format!("plan: {error}")),
        }
        Ok(())
    }

    /// Writes the payload of a plan, or ends it.
    fn go_on_with_plan(&self, rng: &mut Rng) -> Result<(), String> {
        let held = {
            let mut plans = lock(&self.plans);
            if plans.is_empty() {
                return Ok(());
            }
            let which = rng.below(plans.len() as u64);
            plans.swap_remove(usize::try_from(which).map_err(text)?)
        };
        let Held { plan, ticket } = held;
        match ticket {
            None => {
                let range = plan.range();
                let sectors = range.start / SECTOR..range.end / SECTOR;
                let (ticket, bytes) = self.sim.history().start_write(sectors.start, sectors.end - sectors.start);
                plan.storage().write_at(&bytes, plan.file_offset()).map_err(text)?;
                lock(&self.plans).push(Held { plan, ticket: Some(ticket) });
            }
            Some(ticket) => match rng.below(8) {
                0 => {
                    drop(plan);
                    self.sim.history().fail(ticket);
                }
                1 => {
                    plan.abandon();
                    self.sim.history().fail(ticket);
                }
                _ => match plan.complete() {
                    Ok(()) => self.sim.history().finish(ticket),
                    Err(error) => return Err(format!("complete: {error}")),
                },
            },
        }
        Ok(())
    }

    fn observe(&self, image: &Image, sectors: &Range<u64>) -> Result<(), String> {
        let mut first = sectors.start;
        while first < sectors.end {
            let count = (sectors.end - first).min(2048);
            let mut bytes = vec![0; usize::try_from(count * SECTOR).map_err(text)?];
            image.read_at(&mut bytes, first * SECTOR).map_err(text)?;
            self.sim.history().observe_run(first, &bytes).map_err(|error| format!("reading: {error}"))?;
            first += count;
        }
        Ok(())
    }

    fn read(&self, rng: &mut Rng, image: &Image) -> Result<(), String> {
        let sectors = self.sectors(rng);
        self.observe(image, &sectors)
    }
}
