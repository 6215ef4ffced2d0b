//! Programs of several threads over one image, and what must be true of them in every order.
//!
//! Every thread has sectors of its own, some in a block that all share, so that it knows what they hold. A flush that
//! returns well is followed by a power cut: the file that is left must hold what the thread had written. In the end the
//! disk is read, closed, checked and read again. All of that looking is done by the library as it is, over a copy.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::Rng as _;
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use vhdkit::image::BlockDevice as _;
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::SectorMask;
use vhdkit_testkit::sim::{Content, CrashImage, PageMap, fill_stamp};
use vhdkit_testkit::spec::MIB;

use crate::disk::{Disk, Fault};
use crate::error::{ErrorKind, Result};
use crate::image::simulation::BrokenRule;
use crate::image::{
    AtOnce, BlockDevice as _, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver, ReadStep, WritePlan,
};
use crate::storage::Storage;

const SECTOR: u64 = 512;
/// Long enough for what must come to an end.
const LONG: Duration = Duration::from_secs(3600);

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Writes a sector of its own in the block that all share.
    Write,
    /// Writes a sector of its own block.
    WriteOwn,
    /// Writes half a sector of its own in the block that all share, and then the other half.
    WriteHalves,
    /// Plans to write a sector in the shared block, writes, and completes the plan.
    Plan,
    /// Plans to write a sector of its own block, and gives the plan up.
    Abandon,
    /// Trims its own block.
    Discard,
    /// Makes its own block zero and gives its space back.
    Zero,
    /// Makes everything durable.
    Flush,
    /// The same, unless that means waiting.
    TryFlush,
    /// Reads everybody's sectors.
    Read,
    /// Lets those go on who wait for this.
    Mark,
    /// Waits until somebody marks that it is time.
    Await,
    /// The power fails at this moment; what is left is looked at.
    Cut,
    /// Reads a sector of its own block by a plan, and looks again when others had their turn.
    ReadPlan,
    /// To reading only.
    ReadOnly,
    /// To writing.
    Writable,
    /// Closes, if that works at once.
    TryClose,
    /// Closes.
    Close,
}

/// Where a program runs.
#[derive(Clone, Debug)]
pub struct World {
    /// Bytes of a block.
    block: u64,
    pages: PageMap,
    parents: Vec<PageMap>,
    /// What the sectors of the disk hold where nobody wrote.
    untouched: Option<u64>,
    fault: Option<Fault>,
    broken: Option<BrokenRule>,
    /// Opened for writing to begin with.
    writable: bool,
    /// What fills the log before the threads begin: plans over so many blocks.
    plans: u64,
}

impl World {
    fn new(block: u64, top: &BuiltImage) -> Self {
        let parents = top.parent.iter().map(|parent| PageMap::from(&parent.file)).collect::<Vec<_>>();
        let untouched = (!parents.is_empty()).then_some(0);
        let pages = PageMap::from(&top.file);
        Self { block, pages, parents, untouched, fault: None, broken: None, writable: true, plans: 0 }
    }

    /// A dynamic disk of blocks of 1 MiB in which nothing is mapped.
    #[must_use]
    pub fn dynamic() -> Self {
        Self::new(MIB, &ImageBuilder::new(16 * MIB, 1 << 20).build())
    }

    /// A child over a parent that holds version 0 of every sector that threads use. Old bits stand in its bitmap.
    #[must_use]
    pub fn child() -> Self {
        Self::child_of(1 << 20)
    }

    /// A child of blocks so large that seven of them fill an entry of the log.
    #[must_use]
    pub fn large_child() -> Self {
        Self::child_of(256 << 20)
    }

    fn child_of(block: u32) -> Self {
        let size = 16 * u64::from(block);
        let mut stamps = vec![0; 64 << 10];
        let base = (0..16_u64).fold(ImageBuilder::new(size, block), |builder, number| {
            let first = number * u64::from(block) / SECTOR;
            for (sector, piece) in (first..).zip(stamps.chunks_exact_mut(SECTOR as usize)) {
                fill_stamp(sector, 0, piece);
            }
            builder.block(number, BlockSpec::present(vhdkit_testkit::content::Content::bytes(&stamps)))
        });
        let base = Arc::new(base.named("base.vhdx").build());
        let stale = BlockSpec::new(0).with_mask(SectorMask::random(1, 9, 50));
        let child = ImageBuilder::new(size, block).differencing(&base).block(0, stale.clone()).block(1, stale).build();
        Self::new(u64::from(block), &child)
    }

    /// Something fails once.
    #[must_use]
    pub fn with_fault(mut self, fault: Fault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// A rule is broken on purpose.
    #[must_use]
    pub fn breaking(mut self, rule: BrokenRule) -> Self {
        self.broken = Some(rule);
        self
    }

    /// Opened for reading to begin with.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// Plans over so many blocks reserve pages of the log while the threads run; one thread more ends them.
    #[must_use]
    pub fn with_plans(mut self, plans: u64) -> Self {
        self.plans = plans;
        self
    }

    /// Runs a program: a list of acts for every thread.
    pub fn run(&self, programs: &[&[Act]]) {
        let disk = Arc::new(Disk::new(self.pages.clone()));
        let parents = self.parents.iter().map(|pages| Arc::new(Disk::new(pages.clone())) as Arc<dyn Storage>);
        let storage = Arc::clone(&disk) as Arc<dyn Storage>;
        let options = OpenOptions::new().write(self.writable).break_rule(self.broken);
        let image = options.parents(Arc::new(Parents(parents.collect()))).open(storage, None).unwrap();
        if !self.writable {
            disk.forbid();
        }
        let image = Arc::new(image);
        let plans = self.hold_plans(&image);
        if let Some(fault) = self.fault {
            disk.fail(fault);
        }
        let all = (Arc::clone(&image), Arc::clone(&disk), Arc::<Mark>::default());
        let threads: Vec<_> = programs
            .iter()
            .enumerate()
            .map(|(number, program)| {
                let mut hand = Hand::new(self, &all, number as u64, programs.len() as u64);
                let program = program.to_vec();
                thread::spawn(move || {
                    program.into_iter().for_each(|act| hand.act(act));
                    (hand.own, hand.kept)
                })
            })
            .collect();
        drop(all);
        // The thread that holds the plans ends them one by one; who waits for their pages goes on then.
        plans.into_iter().for_each(|plan| {
            thread::yield_now();
            drop(plan);
        });
        let (mut known, mut kept) = (Own::new(), Own::new());
        for (own, of_thread) in threads.into_iter().map(|thread| thread.join().unwrap()) {
            known.extend(own);
            kept.extend(of_thread);
        }
        self.judge(image, &disk, &known, &kept);
    }

    fn hold_plans(&self, image: &Image) -> Vec<WritePlan> {
        let first = 16 - self.plans;
        (first..16).map(|number| image.plan_write(number * self.block..number * self.block + 512).unwrap()).collect()
    }

    /// The end: what is there is there after closing, and the file is in order.
    fn judge(&self, image: Arc<Image>, disk: &Disk, known: &Own, kept: &Own) {
        for (sector, allowed) in known {
            let mut bytes = [0; SECTOR as usize];
            image.read_at(&mut bytes, sector * SECTOR).unwrap();
            assert_is_one_of(*sector, &bytes, allowed, "live");
        }
        let closed = image.close_within(LONG);
        drop(image);
        let left = CrashImage::new(disk.cuts(1)[0].clone()).storage();
        match closed {
            Ok(()) => {
                let report = vhdkit::ops::check::check(&left, None, &vhdkit::ops::check::CheckOptions::default(), &());
                let report = report.unwrap();
                assert_eq!((report.errors, report.warnings), (0, 0), "{:#?}", report.findings);
                assert!(report.summary.unwrap().replay.is_none(), "the log is clean");
                self.look(&disk.cuts(1)[0], known.iter(), "closed");
            }
            Err(error) => {
                assert!(self.fault.is_some(), "closing: {error}");
                self.look(&disk.cuts(1)[0], kept.iter(), "not closed");
            }
        }
    }

    /// Looks at what a power cut left.
    fn look<'a>(&self, pages: &PageMap, sectors: impl Iterator<Item = (&'a u64, &'a Vec<Option<u64>>)>, when: &str) {
        let parents = self.parents.iter().map(|pages| CrashImage::new(pages.clone()).storage()).collect();
        let options = vhdkit::image::OpenOptions::new().parents(Arc::new(StillParents(parents)));
        let image = options.open(CrashImage::new(pages.clone()).storage(), None).unwrap();
        for (sector, allowed) in sectors {
            let mut bytes = [0; SECTOR as usize];
            image.read_at(&mut bytes, sector * SECTOR).unwrap();
            assert_is_one_of(*sector, &bytes, allowed, when);
        }
    }
}

/// What sectors may hold: versions, or zeros.
type Own = BTreeMap<u64, Vec<Option<u64>>>;

/// The version that a sector holds; a foreign one ends the test.
fn version(sector: u64, bytes: &[u8]) -> Option<u64> {
    match Content::of(bytes) {
        Content::Zero => None,
        Content::Stamp { sector: found, version } => {
            assert_eq!(found, sector, "sector {sector} holds another one");
            Some(version)
        }
        Content::Other(_) => panic!("sector {sector} is torn or foreign"),
    }
}

/// Nothing allowed stands for anything that belongs there.
fn assert_is_one_of(sector: u64, bytes: &[u8], allowed: &[Option<u64>], when: &str) {
    let found = version(sector, bytes);
    assert!(
        allowed.is_empty() || allowed.contains(&found),
        "{when}: sector {sector} holds {found:?} instead of {allowed:?}"
    );
}

fn stamp(sector: u64, version: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    fill_stamp(sector, version, &mut bytes);
    bytes
}

/// Whether it is time.
type Mark = (Mutex<bool>, Condvar);

/// One thread.
struct Hand {
    world: World,
    image: Arc<Image>,
    disk: Arc<Disk>,
    mark: Arc<Mark>,
    /// Its sector of the shared block.
    shared: u64,
    /// The first sector of its own block.
    block: u64,
    /// Everybody's sectors in the shared block, and in the blocks of each.
    all: Vec<u64>,
    version: u64,
    /// What its sectors may hold now.
    own: Own,
    /// What they may hold after a power cut: what was flushed, and what came later.
    kept: Own,
}

impl Hand {
    fn new(world: &World, shared: &(Arc<Image>, Arc<Disk>, Arc<Mark>), number: u64, threads: u64) -> Self {
        let (image, disk, mark) = shared.clone();
        let of_block = world.block / SECTOR;
        let all = (0..threads).flat_map(|number| [number * 3, (1 + number) * of_block]).collect();
        let (shared, block) = (number * 3, (1 + number) * of_block);
        let own: Own = [(shared, vec![world.untouched]), (block, vec![world.untouched])].into();
        let kept = own.clone();
        Self { world: world.clone(), image, disk, mark, shared, block, all, version: 0, own, kept }
    }

    fn next(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    /// An operation on a sector begins; from now on a power cut may leave this.
    fn begin(&mut self, sector: u64, new: Option<u64>) {
        self.kept.get_mut(&sector).unwrap().push(new);
    }

    /// What an operation on a sector of its own came to. One that failed may have been done.
    fn done(&mut self, sector: u64, result: Result<()>, new: Option<u64>) {
        let allowed = self.own.get_mut(&sector).unwrap();
        match result {
            Ok(()) => *allowed = vec![new],
            // Nothing was begun.
            Err(error) if matches!(error.kind(), ErrorKind::Busy | ErrorKind::ReadOnly) => {}
            Err(error) => {
                assert!(self.world.fault.is_some(), "{error}");
                allowed.push(new);
            }
        }
    }

    fn act(&mut self, act: Act) {
        let block = self.block * SECTOR..self.block * SECTOR + self.world.block;
        match act {
            Act::Write => self.write(self.shared),
            Act::WriteOwn => self.write(self.block),
            Act::WriteHalves => {
                let version = self.next();
                let (bytes, at) = (stamp(self.shared, version), self.shared * SECTOR);
                self.begin(self.shared, Some(version));
                let first = self.image.write_at(&bytes[..200], at);
                if first.is_ok() {
                    let second = self.image.write_at(&bytes[200..], at + 200);
                    self.done(self.shared, second, Some(version));
                }
            }
            Act::Plan => {
                let version = self.next();
                self.begin(self.shared, Some(version));
                let result = self.plan(version);
                self.done(self.shared, result, Some(version));
            }
            Act::Abandon => {
                if let Ok(plan) = self.image.plan_write(block.start + 8 * SECTOR..block.start + 9 * SECTOR) {
                    plan.abandon();
                }
            }
            Act::Discard => {
                self.begin(self.block, None);
                let result = self.image.discard(block);
                let found = self.trimmed();
                self.done(self.block, result, found);
            }
            Act::Zero => {
                self.begin(self.block, None);
                let result = self.image.write_zeroes(block, true);
                self.done(self.block, result, None);
            }
            Act::Flush => {
                let result = self.image.flush().map(|()| true);
                self.flushed(result);
            }
            Act::TryFlush => {
                let result = self.image.try_flush();
                self.flushed(result);
            }
            Act::Read => self.read(),
            Act::Cut => self.cut(),
            Act::Mark => {
                *self.mark.0.lock().unwrap() = true;
                self.mark.1.notify_all();
            }
            Act::Await => drop(self.mark.1.wait_while(self.mark.0.lock().unwrap(), |marked| !*marked).unwrap()),
            Act::ReadPlan => self.read_plan(),
            Act::ReadOnly => self.end(|image| image.reopen(false)),
            Act::Writable => self.end(|image| image.reopen(true)),
            Act::TryClose => self.end(|image| image.close_within(Duration::ZERO)),
            Act::Close => self.end(|image| image.close_within(LONG)),
        }
    }

    fn write(&mut self, sector: u64) {
        let version = self.next();
        self.begin(sector, Some(version));
        let (bytes, at) = (stamp(sector, version), sector * SECTOR);
        let result = match self.image.write_at_once(&bytes, at) {
            Ok(true) => Ok(()),
            _ => self.image.write_at(&bytes, at),
        };
        self.done(sector, result, Some(version));
    }

    fn plan(&self, version: u64) -> Result<()> {
        let at = self.shared * SECTOR;
        let plan = self.image.plan_write(at..at + SECTOR)?;
        let written = plan.storage().write_at(&stamp(self.shared, version), plan.file_offset());
        written.map_err(|error| crate::Error::io("cannot write where the plan says", error))?;
        plan.complete()
    }

    /// A trim need not do anything; what it did is looked up.
    fn trimmed(&self) -> Option<u64> {
        let mut bytes = [0; SECTOR as usize];
        self.image.read_at(&mut bytes, self.block * SECTOR).unwrap();
        let found = version(self.block, &bytes);
        assert!(self.own[&self.block].contains(&found) || found.is_none(), "sector {} after a trim", self.block);
        found
    }

    /// A flush that returned well: whatever else a power cut leaves, what was written is there.
    fn flushed(&mut self, result: Result<bool>) {
        match result {
            Ok(true) => {
                self.kept.clone_from(&self.own);
                self.world.look(&self.disk.cuts(1)[0], self.own.iter(), "a power cut after a flush");
            }
            Ok(false) => {}
            Err(error) => assert!(self.world.fault.is_some(), "{error}"),
        }
    }

    fn cut(&self) {
        let everything: Own = self.all.iter().map(|sector| (*sector, Vec::new())).collect();
        // A look is a single step. The others take many: to copy a page of the BAT is 512.
        (0..shuttle::rand::thread_rng().gen_range(0..800)).for_each(|_| thread::yield_now());
        for pages in self.disk.cuts(4) {
            self.world.look(&pages, everything.iter().chain(&self.kept), "a power cut");
        }
    }

    fn read(&self) {
        for sector in &self.all {
            let mut bytes = [0; SECTOR as usize];
            match self.image.read_at_once(&mut bytes, sector * SECTOR).unwrap() {
                AtOnce::Filled => {}
                AtOnce::Zero => bytes.fill(0),
                AtOnce::Waits => self.image.read_at(&mut bytes, sector * SECTOR).unwrap(),
            }
            let found = version(*sector, &bytes);
            if let Some(allowed) = self.own.get(sector) {
                assert!(allowed.contains(&found), "sector {sector} reads as {found:?} instead of {allowed:?}");
            }
        }
    }

    /// What a plan says holds as long as the plan does.
    fn read_plan(&self) {
        let sector = self.all[shuttle::rand::thread_rng().gen_range(0..self.all.len())];
        let Ok(plan) = self.image.plan_read(sector * SECTOR..(sector + 1) * SECTOR) else { return };
        for _ in 0..3 {
            thread::yield_now();
            for step in plan.steps() {
                if let ReadStep::File { layer, file_offset, .. } = step {
                    let mut bytes = [0; SECTOR as usize];
                    self.image.layer_storage(*layer).unwrap().read_at(&mut bytes, *file_offset).unwrap();
                    version(sector, &bytes);
                }
            }
        }
    }

    fn end(&self, how: impl Fn(&Image) -> Result<()>) {
        if let Err(error) = how(&self.image) {
            let expected = matches!(error.kind(), ErrorKind::Busy | ErrorKind::ReadOnly);
            assert!(expected || self.world.fault.is_some(), "{error}");
        }
    }
}

/// The parents of the image under test.
#[derive(Debug)]
struct Parents(Vec<Arc<dyn Storage>>);

impl ParentResolver for Parents {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let storage = Arc::clone(&self.0[wanted.depth]);
        Ok(vec![ParentCandidate { storage, path: None, named: false, lock: None }])
    }
}

/// The parents for looking at what is left.
#[derive(Debug)]
struct StillParents(Vec<Arc<dyn vhdkit::storage::Storage>>);

impl vhdkit::image::ParentResolver for StillParents {
    fn resolve(
        &self,
        wanted: &vhdkit::image::ParentRequest<'_>,
    ) -> vhdkit::Result<Vec<vhdkit::image::ParentCandidate>> {
        let storage = Arc::clone(&self.0[wanted.depth]);
        Ok(vec![vhdkit::image::ParentCandidate { storage, path: None, named: false, lock: None }])
    }
}
