//! Runs programs, cuts the power everywhere, counts what is found, and stops at the first violation.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::crash::{CrashPoint, Sampling, State};
use super::history::SectorHistory;
use super::image::CrashImage;
use super::operation::OpInfo;
use super::pages::PageMap;
use super::storage::SimStorage;
use crate::rng::{Rng, mix};

/// The phases of a write path, in the order of a table.
const PHASES: [&str; 7] = ["start", "payload", "log", "home", "retire", "replay", "close"];

/// Phases of very few operations each.
const SHORT_PHASES: [&str; 2] = ["home", "retire"];

/// Says whether what a power cut left is in order.
pub trait Judge: Send + Sync {
    /// Judges an image.
    ///
    /// # Errors
    /// What is wrong with it.
    fn judge(&self, image: &CrashImage, history: &SectorHistory, case: &mut Case) -> Result<(), String>;
}

/// What a judge may use for one image: random numbers that are the same on every run, and a place to count more images.
#[derive(Debug)]
pub struct Case {
    rng: Rng,
    counted: Vec<(&'static str, u64)>,
    tallies: Vec<&'static str>,
}

impl Case {
    /// A case by itself, outside of any campaign.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed), counted: Vec::new(), tallies: Vec::new() }
    }

    /// Random numbers.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// Counts another image that was judged, by phase and content.
    pub fn count(&mut self, phase: &'static str, hash: u64) {
        self.counted.push((phase, hash));
    }

    /// Adds one to a line of the report, which says how often something worth knowing was met.
    pub fn tally(&mut self, what: &'static str) {
        self.tallies.push(what);
    }

    /// What was counted.
    #[must_use]
    pub fn counted(&self) -> &[(&'static str, u64)] {
        &self.counted
    }
}

/// What is run, once for each seed. Everything that it does must follow from the random numbers.
pub trait Program: Sync {
    /// Starts a simulation, or several one after another, and does things to it.
    ///
    /// # Errors
    /// What was wrong without any power cut: a read that gave something else, an error nobody ordered.
    fn run(&self, rng: &mut Rng, lab: &Lab) -> Result<(), String>;
}

impl<F: Fn(&mut Rng, &Lab) -> Result<(), String> + Sync> Program for F {
    fn run(&self, rng: &mut Rng, lab: &Lab) -> Result<(), String> {
        self(rng, lab)
    }
}

/// What a simulation starts with.
pub struct Setup {
    /// The file, all of it durable.
    pub file: PageMap,
    /// What the disk holds.
    pub history: SectorHistory,
    /// Who judges.
    pub judge: Arc<dyn Judge>,
    /// Who knows in which phase the code under test is, on the calling thread.
    pub phase_source: fn() -> &'static str,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup").field("file", &self.file).finish_non_exhaustive()
    }
}

/// One running simulation.
#[derive(Clone)]
pub struct SimHandle {
    storage: Arc<SimStorage>,
    history: Arc<Mutex<SectorHistory>>,
    judge: Arc<dyn Judge>,
    lab: Arc<LabState>,
}

impl fmt::Debug for SimHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimHandle").field("storage", &self.storage).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimHandle {
    /// The storage to run on, and to set a hook or a fault on. Its observer is taken.
    #[must_use]
    pub fn storage(&self) -> Arc<SimStorage> {
        Arc::clone(&self.storage)
    }

    /// What the disk may hold. Do not keep it locked over an operation of the storage.
    pub fn history(&self) -> MutexGuard<'_, SectorHistory> {
        lock(&self.history)
    }

    /// Says what the program does next, for messages.
    pub fn step(&self, what: impl Into<String>) {
        let mut record = lock(&self.lab.record);
        record.step_number += 1;
        record.step = what.into();
    }

    /// Cuts the power here and now, for a look at what would be left; the program goes on.
    pub fn cut(&self) {
        self.lab.look(&self.storage, &self.history, &*self.judge, None);
    }

    /// Cuts the power for good: one of the things that may be left, for the program to start again from.
    #[must_use]
    pub fn crash(&self, rng: &mut Rng) -> CrashImage {
        let point = self.storage.crash_point();
        CrashImage::new(point.build(&point.random_state(rng.next_u64())))
    }

    /// Adds one to a line of the report.
    pub fn tally(&self, what: &'static str) {
        *lock(&self.lab.record).tallies.entry(what).or_default() += 1;
    }

    /// What is promised has changed, other than by a flush of the history.
    pub fn promise(&self) {
        lock(&self.lab.record).promises += 1;
    }

    /// Whether the program may as well end: something was found, or time is up.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.lab.is_over()
    }
}

/// Where a program starts its simulations.
#[derive(Debug)]
pub struct Lab {
    state: Arc<LabState>,
    handles: Mutex<Vec<SimHandle>>,
}

impl Lab {
    /// Starts a simulation.
    #[must_use]
    pub fn start(&self, setup: Setup) -> SimHandle {
        let storage = Arc::new(SimStorage::from_pages(setup.file).with_phase_source(setup.phase_source));
        let history = Arc::new(Mutex::new(setup.history));
        let handle = SimHandle { storage, history, judge: setup.judge, lab: Arc::clone(&self.state) };
        lock(&self.state.record).new_simulation();
        let (history, judge, lab) = (Arc::clone(&handle.history), Arc::clone(&handle.judge), Arc::clone(&self.state));
        // The observer must not keep the storage alive that holds it.
        let weak = Arc::downgrade(&handle.storage);
        let observer = move |info: &OpInfo| {
            if let Some(storage) = weak.upgrade() {
                lab.look(&storage, &history, &*judge, Some(info));
            }
        };
        handle.storage.set_observer(Some(Arc::new(observer)));
        lock(&self.handles).push(handle.clone());
        handle
    }

    /// The seed of the program.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.state.seed
    }
}

/// The place of a state that is looked for.
#[derive(Clone, Debug)]
struct Wanted {
    moment: u64,
    state: State,
}

/// What a run of one program has in common.
struct LabState {
    seed: u64,
    sampling: Sampling,
    per_operation: usize,
    wanted: Option<Wanted>,
    /// Seeds above this one need not go on.
    last_seed: Arc<AtomicU64>,
    deadline: Option<Instant>,
    record: Mutex<Record>,
}

impl fmt::Debug for LabState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LabState").field("seed", &self.seed).finish_non_exhaustive()
    }
}

/// What was counted and found in a run of one program.
#[derive(Default)]
struct Record {
    moment: u64,
    step: String,
    step_number: u64,
    promises: u64,
    /// The promise that `judged` was judged by.
    promise: (u64, u64),
    /// Images that were judged already by the same promise, or a stricter one.
    judged: HashSet<u64>,
    counted: HashSet<u64>,
    images: Vec<(&'static str, u64)>,
    phases: BTreeMap<&'static str, PhaseCount>,
    tallies: BTreeMap<&'static str, u64>,
    violation: Option<Violation>,
    found: Option<Replayed>,
}

impl Record {
    fn new_simulation(&mut self) {
        self.judged.clear();
        self.promise = (u64::MAX, u64::MAX);
    }

    fn count(&mut self, phase: &'static str, hash: u64) {
        if self.counted.insert(hash) {
            self.images.push((phase, hash));
        }
    }
}

/// What was counted in one phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseCount {
    /// Moments at which the power was cut.
    pub moments: u64,
    /// States that were made, equal ones included.
    pub states: u64,
    /// Images that no earlier moment of any program had left.
    pub distinct: u64,
}

/// A state that was made again.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// The moment.
    pub point: CrashPoint,
    /// What was left.
    pub image: CrashImage,
    /// What the judge said.
    pub verdict: Result<(), String>,
}

/// What was wrong, and how to see it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The seed of the program.
    pub seed: u64,
    /// How many steps the program had announced, and the last of them.
    pub step: (u64, String),
    /// The operation that the cut came before or after.
    pub operation: Option<OpInfo>,
    /// The moment and the state, for [`Campaign::replay`]; nothing when the program itself complained.
    pub state: Option<State>,
    /// The state in words.
    pub description: String,
    /// What was wrong.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, step {} ({}): {}", self.seed, self.step.0, self.step.1, self.message)?;
        if let Some(operation) = &self.operation {
            writeln!(f, "  power cut {operation}")?;
        }
        match &self.state {
            Some(state) => {
                writeln!(f, "  to see it again: replay(&program, {}, \"{state}\")\n{}", self.seed, self.description)
            }
            None => writeln!(f, "  without a power cut"),
        }
    }
}

impl LabState {
    fn is_over(&self) -> bool {
        self.seed > self.last_seed.load(Ordering::Relaxed)
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            || lock(&self.record).is_over()
    }

    /// A moment at which the power could be cut.
    fn look(&self, storage: &SimStorage, history: &Mutex<SectorHistory>, judge: &dyn Judge, info: Option<&OpInfo>) {
        let moment = {
            let mut record = lock(&self.record);
            record.moment += 1;
            record.moment
        };
        if self.is_over() {
            return;
        }
        let point = storage.crash_point().with_id(moment);
        let history = lock(history);
        if let Some(wanted) = &self.wanted {
            if wanted.moment == moment {
                let image = CrashImage::new(point.build(&wanted.state));
                let mut case = Case::new(case_seed(self.seed, &wanted.state));
                let verdict = judge_safely(judge, &image, &history, &mut case);
                lock(&self.record).found = Some(Replayed { point, image, verdict });
            }
            return;
        }
        let (states, promise) = self.choose(&point, &history, info);
        self.judge_all(&point, &states, promise, &history, judge, info);
    }

    /// The states to look at: all or a large sample before a sync, when something was promised, and right after a page
    /// went home; a few with the newest operation in between.
    fn choose(&self, point: &CrashPoint, history: &SectorHistory, info: Option<&OpInfo>) -> (Vec<State>, (u64, u64)) {
        let record = lock(&self.record);
        let promise = (history.epoch(), record.promises);
        let seed = mix(self.seed ^ mix(point.id()));
        let sync = info.is_none_or(|info| info.kind == super::OpKind::Sync);
        let states = if sync || behind(point) == Some("home") || promise != record.promise {
            point.states(&self.sampling, seed)
        } else {
            point.newest_states(self.per_operation, seed)
        };
        (states, promise)
    }

    fn judge_all(
        &self,
        point: &CrashPoint,
        states: &[State],
        promise: (u64, u64),
        history: &SectorHistory,
        judge: &dyn Judge,
        info: Option<&OpInfo>,
    ) {
        let phase = behind(point).or_else(|| info.map(|info| info.phase)).unwrap_or("-");
        {
            let mut record = lock(&self.record);
            if record.promise != promise {
                record.promise = promise;
                record.judged.clear();
            }
            record.phases.entry(phase).or_default().moments += 1;
        }
        for state in states {
            let pages = point.build(state);
            let hash = pages.content_hash();
            {
                let mut record = lock(&self.record);
                record.phases.entry(phase).or_default().states += 1;
                record.count(phase, hash);
                if !record.judged.insert(hash) {
                    continue;
                }
            }
            let mut case = Case::new(case_seed(self.seed, state));
            let verdict = judge_safely(judge, &CrashImage::new(pages), history, &mut case);
            let mut record = lock(&self.record);
            for what in case.tallies {
                *record.tallies.entry(what).or_default() += 1;
            }
            for (phase, hash) in case.counted {
                record.phases.entry(phase).or_default().states += 1;
                record.count(phase, hash);
            }
            if let Err(message) = verdict {
                record.violation = Some(Violation {
                    seed: self.seed,
                    step: (record.step_number, record.step.clone()),
                    operation: info.cloned(),
                    state: Some(state.clone()),
                    description: state.describe(point),
                    message,
                });
                self.last_seed.fetch_min(self.seed, Ordering::Relaxed);
            }
            drop(record);
            if self.is_over() {
                break;
            }
        }
    }
}

impl Record {
    fn is_over(&self) -> bool {
        self.violation.is_some() || self.found.is_some()
    }
}

/// The phase of the newest operation on its way, when that is one of those that are short: what a cut leaves of it can be
/// seen only from the next operation on, which belongs to another phase.
fn behind(point: &CrashPoint) -> Option<&'static str> {
    point.pending().last().map(|newest| newest.phase).filter(|phase| SHORT_PHASES.contains(phase))
}

/// Judges; a panic over an image is a violation like others, and must not unwind through the code under test.
fn judge_safely(judge: &dyn Judge, image: &CrashImage, history: &SectorHistory, case: &mut Case) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| judge.judge(image, history, case)))
        .unwrap_or_else(|panic| Err(panic_text(&*panic)))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a message"))
}

/// The seed of what a judge does at random with a state.
fn case_seed(seed: u64, state: &State) -> u64 {
    let text = state.to_string();
    text.bytes().fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte)))
}

/// What a campaign does, and for how long.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// The first seed; each program gets the next one.
    pub first_seed: u64,
    /// Threads that run programs.
    pub threads: usize,
    /// How many states are made before each sync, and whenever something was promised.
    pub sampling: Sampling,
    /// How many states are made before each other operation.
    pub per_operation: usize,
    /// Ends after so many programs.
    pub programs_max: Option<u64>,
    /// Ends with the program that brings so many distinct images.
    pub distinct_max: Option<u64>,
    /// Ends with the program that brings so many states, equal ones included.
    pub states_max: Option<u64>,
    /// Ends after this time.
    pub time_max: Option<Duration>,
}

impl Default for Campaign {
    fn default() -> Self {
        Self {
            first_seed: 1,
            threads: 2,
            sampling: Sampling { exhaustive_ops: 3, random: 20 },
            per_operation: 3,
            programs_max: None,
            distinct_max: None,
            states_max: None,
            time_max: None,
        }
    }
}

/// What a campaign counted and found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Programs that were run and counted.
    pub programs: u64,
    /// What was counted, by phase.
    pub phases: BTreeMap<&'static str, PhaseCount>,
    /// What judges and programs tallied.
    pub tallies: BTreeMap<&'static str, u64>,
    /// The violation in the program with the lowest seed.
    pub violation: Option<Violation>,
    /// How long it took.
    pub elapsed: Duration,
}

impl Report {
    /// All phases together.
    #[must_use]
    pub fn total(&self) -> PhaseCount {
        self.phases.values().fold(PhaseCount::default(), |sum, count| PhaseCount {
            moments: sum.moments + count.moments,
            states: sum.states + count.states,
            distinct: sum.distinct + count.distinct,
        })
    }

    /// Distinct images of some phases.
    #[must_use]
    pub fn distinct_in(&self, phases: &[&str]) -> u64 {
        phases.iter().filter_map(|phase| self.phases.get(phase)).map(|count| count.distinct).sum()
    }

    /// How often something was tallied.
    #[must_use]
    pub fn tallied(&self, what: &str) -> u64 {
        self.tallies.get(what).copied().unwrap_or_default()
    }

    /// Ends a test when something was found.
    ///
    /// # Panics
    /// With the violation, when there is one.
    #[track_caller]
    pub fn expect_clean(&self) {
        if let Some(violation) = &self.violation {
            panic!("{violation}\n{self}");
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, count: &PhaseCount| {
            writeln!(f, "{name:<10} {:>10} {:>12} {:>16}", count.moments, count.states, count.distinct)
        };
        writeln!(f, "{:<10} {:>10} {:>12} {:>16}", "phase", "moments", "states", "distinct images")?;
        for phase in PHASES {
            if let Some(count) = self.phases.get(phase) {
                row(f, phase, count)?;
            }
        }
        for (phase, count) in self.phases.iter().filter(|(phase, _)| !PHASES.contains(phase)) {
            row(f, phase, count)?;
        }
        row(f, "all", &self.total())?;
        for (what, count) in &self.tallies {
            writeln!(f, "{count:>10} {what}")?;
        }
        write!(f, "{} programs in {:.1} s", self.programs, self.elapsed.as_secs_f64())
    }
}

/// What the workers share.
struct Shared {
    next_seed: AtomicU64,
    last_seed: Arc<AtomicU64>,
    deadline: Option<Instant>,
    merged: Mutex<Merged>,
}

/// Results in the order of seeds, so that the sum does not depend on which thread was faster.
#[derive(Default)]
struct Merged {
    waiting: BTreeMap<u64, Record>,
    next: u64,
    images: HashSet<u64>,
    report: Report,
    full: bool,
}

impl Campaign {
    /// Runs programs until one of the bounds is met or something is found.
    #[must_use]
    pub fn run(&self, program: &dyn Program) -> Report {
        let begun = Instant::now();
        let last = self.programs_max.map_or(u64::MAX, |count| (self.first_seed + count).saturating_sub(1));
        let shared = Shared {
            next_seed: AtomicU64::new(self.first_seed),
            last_seed: Arc::new(AtomicU64::new(last)),
            deadline: self.time_max.and_then(|time_max| begun.checked_add(time_max)),
            merged: Mutex::new(Merged { next: self.first_seed, ..Merged::default() }),
        };
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| self.work(program, &shared));
            }
        });
        let mut report = shared.merged.into_inner().unwrap_or_else(PoisonError::into_inner).report;
        report.elapsed = begun.elapsed();
        report
    }

    fn work(&self, program: &dyn Program, shared: &Shared) {
        loop {
            let seed = shared.next_seed.fetch_add(1, Ordering::Relaxed);
            let late = shared.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if late || seed > shared.last_seed.load(Ordering::Relaxed) {
                return;
            }
            let record = run_one(program, self.lab(seed, None, &shared.last_seed, shared.deadline));
            shared.merge(seed, record, self);
        }
    }

    fn lab(&self, seed: u64, wanted: Option<Wanted>, last: &Arc<AtomicU64>, deadline: Option<Instant>) -> Lab {
        let state = LabState {
            seed,
            sampling: self.sampling,
            per_operation: self.per_operation,
            wanted,
            last_seed: Arc::clone(last),
            deadline,
            record: Mutex::default(),
        };
        Lab { state: Arc::new(state), handles: Mutex::default() }
    }

    /// Runs the program of a seed again and makes a state again, judged once more.
    ///
    /// # Errors
    /// When the text is not a state, or the program does not come to its point any more.
    pub fn replay(&self, program: &dyn Program, seed: u64, state: &str) -> Result<Replayed, String> {
        let state: State = state.parse()?;
        let wanted = Wanted { moment: state.point(), state };
        let moment = wanted.moment;
        let lab = self.lab(seed, Some(wanted), &Arc::new(AtomicU64::new(u64::MAX)), None);
        let record = run_one(program, lab);
        record
            .found
            .ok_or_else(|| format!("the program of seed {seed} has only {} moments, not {moment}", record.moment))
    }
}

/// Runs the program of a seed, and cuts the power once more at its end.
fn run_one(program: &dyn Program, lab: Lab) -> Record {
    let mut rng = Rng::new(lab.state.seed);
    let result = catch_unwind(AssertUnwindSafe(|| {
        let result = program.run(&mut rng, &lab);
        lock(&lab.handles).iter().for_each(SimHandle::cut);
        result
    }));
    // Hooks hold what they work on, often the storage itself.
    lock(&lab.handles).drain(..).for_each(|handle| handle.storage.set_hook(None));
    let message = match result {
        Ok(Ok(())) => None,
        Ok(Err(message)) => Some(message),
        Err(panic) => Some(panic_text(&*panic)),
    };
    let mut record = std::mem::take(&mut *lock(&lab.state.record));
    if let Some(message) = message
        && !record.is_over()
    {
        let step = (record.step_number, record.step.clone());
        let seed = lab.state.seed;
        record.violation =
            Some(Violation { seed, step, operation: None, state: None, description: String::new(), message });
        lab.state.last_seed.fetch_min(seed, Ordering::Relaxed);
    }
    record
}

impl Shared {
    fn merge(&self, seed: u64, record: Record, bounds: &Campaign) {
        let mut merged = lock(&self.merged);
        let merged = &mut *merged;
        merged.waiting.insert(seed, record);
        while let Some(record) = merged.waiting.remove(&merged.next) {
            merged.next += 1;
            if merged.full {
                continue;
            }
            merged.report.programs += 1;
            for (phase, count) in record.phases {
                let sum = merged.report.phases.entry(phase).or_default();
                sum.moments += count.moments;
                sum.states += count.states;
            }
            for (what, count) in record.tallies {
                *merged.report.tallies.entry(what).or_default() += count;
            }
            for (phase, hash) in record.images {
                if merged.images.insert(hash) {
                    merged.report.phases.entry(phase).or_default().distinct += 1;
                }
            }
            merged.full = record.violation.is_some()
                || bounds.distinct_max.is_some_and(|max| merged.images.len() as u64 >= max)
                || bounds.states_max.is_some_and(|max| merged.report.total().states >= max);
            merged.report.violation = record.violation;
            if merged.full {
                self.last_seed.fetch_min(merged.next - 1, Ordering::Relaxed);
            }
        }
    }
}
