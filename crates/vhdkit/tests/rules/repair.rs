//! What `repair` makes of every image of the table: it never makes anything worse, does what it said, and can be undone
//! from every state that a power cut leaves.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vhdkit::error::{ErrorKind, Result};
use vhdkit::format::finding::{Code, Finding, Severity};
use vhdkit::image::{BlockDevice as _, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, CheckReport, check};
use vhdkit::ops::repair::{RepairOptions, RepairPlan, apply, plan, restore};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::sim::{CrashPoint, PageMap, Sampling, SimStorage};

use crate::judge::{Guarded, MapResolver};
use crate::table::{MIB, Made};

/// Longer disks are compared in part.
const COMPARED_MAX: u64 = 64 * MIB;
/// States looked at for each moment.
const SAMPLING: Sampling = Sampling { exhaustive_ops: 2, random: 3 };

/// What became of an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Codes above note before.
    pub before: BTreeSet<Code>,
    /// Codes above note afterwards.
    pub after: BTreeSet<Code>,
    /// Something was changed.
    pub changed: bool,
}

/// What is mended whenever the image can be opened afterwards.
const MENDED: [Code; 20] = [
    Code::HeaderCopyDamaged,
    Code::HeaderSequenceTie,
    Code::HeaderReserved,
    Code::LogNoSequence,
    Code::LogTargetHeader,
    Code::LogTargetLog,
    Code::LogTargetBeyond,
    Code::LogFileOffsetUnaligned,
    Code::RegionCopyDamaged,
    Code::RegionCopiesDiffer,
    Code::RegionReserved,
    Code::MetadataReserved,
    Code::MetadataEntryReserved,
    Code::MetadataEmptyOffset,
    Code::MetadataFlags,
    Code::FileParametersReserved,
    Code::BatStateOldUnmapped,
    Code::BatAnchor,
    Code::BatLastBlockCut,
    Code::BitmapUnexpected,
];

/// What is never mended, as what is right cannot be known from the file.
const LEFT: [Code; 22] = [
    Code::FileTooSmall,
    Code::HeadersDamaged,
    Code::HeaderVersion,
    Code::LogVersion,
    Code::LogGrowth,
    Code::LogTooLong,
    Code::RegionTablesDamaged,
    Code::RegionMissing,
    Code::RegionOverlap,
    Code::RegionUnknownRequired,
    Code::MetadataSignature,
    Code::MetadataMissing,
    Code::MetadataOverlap,
    Code::MetadataUnknownRequired,
    Code::IncompleteFile,
    Code::BlockSize,
    Code::DiskSize,
    Code::LogicalSectorSize,
    Code::ParentLocatorMissing,
    Code::BatTooSmall,
    Code::BitmapMissing,
    Code::LocatorLinkage,
];

/// What is certain is mended, and what is not is left.
pub(crate) fn expect(outcome: &Outcome) {
    let Outcome { before, after, changed } = outcome;
    let mended = before.iter().filter(|code| MENDED.contains(code));
    let openable = *changed || before.iter().all(|code| MENDED.contains(code));
    for code in mended.filter(|_| openable) {
        assert!(*changed && !after.contains(code), "{code:?} is not mended: {outcome:?}");
    }
    for code in before.iter().filter(|code| LEFT.contains(code)) {
        assert!(after.contains(code), "{code:?} is mended: {outcome:?}");
    }
}

fn serious(findings: &[Finding]) -> BTreeSet<Code> {
    findings.iter().filter(|finding| finding.severity() > Severity::Note).map(Finding::code).collect()
}

fn check_it(storage: &Arc<dyn Storage>) -> CheckReport {
    check(storage, None, &CheckOptions::default(), &()).unwrap()
}

fn files(made: &Made) -> MapResolver {
    let mut resolver = MapResolver { named: made.named.clone(), ..MapResolver::default() };
    let mut next = made.image.parent.as_deref();
    while let Some(image) = next {
        resolver.files.insert(image.file_name.clone(), Guarded::new(&image.file));
        next = image.parent.as_deref();
    }
    for (name, file) in &made.others {
        resolver.files.insert(name.clone(), Guarded::new(file));
    }
    resolver
}

fn open(made: &Made, storage: &Arc<dyn Storage>) -> Result<Image> {
    let name = Path::new(&made.image.file_name);
    let alone = OpenOptions::new().without_parents();
    let chained = OpenOptions::new().parents(Arc::new(files(made))).open(Arc::clone(storage), Some(name));
    chained.or_else(|_| alone.open(Arc::clone(storage), Some(name)))
}

/// What can be read of a disk, piece by piece.
fn read(made: &Made, image: &Image) -> Vec<(u64, Vec<u8>)> {
    let piece = 64 << 10;
    let all = made.ranges.clone().unwrap_or_else(|| vec![Range { start: 0, end: image.size().min(COMPARED_MAX) }]);
    let mut read = Vec::new();
    for range in all {
        for start in range.step_by(piece) {
            let mut bytes = vec![0; piece.min((image.size() - start) as usize)];
            if image.read_at(&mut bytes, start).is_ok() {
                read.push((start, bytes));
            }
        }
    }
    read
}

/// Puts an image back from every state that the moments leave.
fn undo_all(points: &Mutex<Vec<CrashPoint>>, undo: &dyn Storage, original: &PageMap) {
    let mut seen = BTreeSet::new();
    for (number, point) in points.lock().unwrap().iter().enumerate() {
        for state in point.states(&SAMPLING, number as u64) {
            let cut = point.build(&state);
            if !seen.insert(cut.content_hash()) {
                continue;
            }
            let cut = SimStorage::from_pages(cut);
            restore(&cut, undo, &()).unwrap_or_else(|error| panic!("cut {number}, {state}: {error}"));
            assert!(same(original, &cut), "cut {number}, {state}: not what it was");
        }
    }
}

fn same(original: &PageMap, now: &SimStorage) -> bool {
    now.pages().content_hash() == original.content_hash()
}

/// Collects the moments at which the power may be cut.
fn watch(storage: &Arc<SimStorage>) -> Arc<Mutex<Vec<CrashPoint>>> {
    let points = Arc::new(Mutex::new(Vec::new()));
    let (weak, seen) = (Arc::downgrade(storage), Arc::clone(&points));
    storage.set_observer(Some(Arc::new(move |_| {
        if let Some(storage) = weak.upgrade() {
            seen.lock().unwrap().push(storage.crash_point());
        }
    })));
    points
}

/// Repairs an image and puts it back, in every way.
pub(crate) fn judge(made: &Made) -> Outcome {
    let original = PageMap::from(&made.image.file);
    let sim = Arc::new(SimStorage::from_pages(original.clone()));
    let storage: Arc<dyn Storage> = Arc::<SimStorage>::clone(&sim);
    let before = check_it(&storage);
    let readable = open(made, &storage).map(|image| read(made, &image)).unwrap_or_default();
    let planned = match plan(&storage, None, &RepairOptions::default(), &()) {
        Ok(planned) => planned,
        Err(error) => {
            // Only what is no VHDX at all is refused.
            assert_eq!(error.kind(), ErrorKind::NotVhdx, "{error}");
            return Outcome::default();
        }
    };
    assert_eq!(sim.counts().operations() + sim.counts().syncs(), 0, "planning wrote");
    let codes =
        |findings: &[Finding]| findings.iter().map(|finding| (finding.code(), finding.to_string())).collect::<Vec<_>>();
    assert_eq!(codes(&planned.before.findings), codes(&before.findings));
    assert!(planned.after.errors <= before.errors || before.summary.is_none(), "worse: {:?}", planned.after.findings);
    let outcome = Outcome {
        before: serious(&before.findings),
        after: serious(&planned.after.findings),
        changed: planned.changes_anything(),
    };
    assert_eq!(planned.mends_everything(), outcome.after.is_empty());
    assert!(planned.left.iter().all(|left| !left.advice.is_empty()));
    if !planned.changes_anything() {
        assert_eq!(outcome.before, outcome.after);
        return outcome;
    }
    let undo: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    carry_out(&sim, &storage, &planned, &undo, &original);
    let after = check_it(&storage);
    assert_eq!(codes(&planned.after.findings), codes(&after.findings), "the plan promised something else");
    assert_eq!(storage.len().unwrap(), planned.file_size_after);
    let image = open(made, &storage).unwrap();
    let now = read(made, &image);
    for (start, bytes) in &readable {
        let found = now.iter().find(|(other, _)| other == start);
        assert!(found.is_some_and(|(_, other)| other == bytes), "what was read at {start:#x} is another now");
    }
    drop(image);
    let again = plan(&storage, None, &RepairOptions::default(), &()).unwrap();
    assert!(!again.changes_anything(), "a second repair finds {:?}", again.actions);
    refuse_after_a_write(&sim, undo.as_ref(), &planned);
    put_back(&sim, undo.as_ref(), &original);
    outcome
}

/// Applies the plan, and undoes it from what every cut leaves.
fn carry_out(
    sim: &Arc<SimStorage>,
    storage: &Arc<dyn Storage>,
    planned: &RepairPlan,
    undo: &Arc<dyn Storage>,
    original: &PageMap,
) {
    let points = watch(sim);
    let mut kept = 0;
    let mut keep = || {
        assert_eq!(sim.counts().operations(), 0, "the image was changed before the undo record was safe");
        kept += 1;
        Ok(())
    };
    let report = apply(storage, planned, undo.as_ref(), &mut keep, &()).unwrap();
    assert_eq!((kept, report.bytes), (1, undo.len().unwrap()));
    sim.set_observer(None);
    assert_eq!(sim.pending(), 0, "something is not durable in the end");
    undo_all(&points, undo.as_ref(), original);
}

/// Once the image was written to, the record is refused, and nothing is changed.
fn refuse_after_a_write(sim: &SimStorage, undo: &dyn Storage, planned: &RepairPlan) {
    if !planned.mends_everything() {
        return;
    }
    let other = SimStorage::from_pages(sim.pages());
    let other: Arc<dyn Storage> = Arc::new(other);
    let Ok(image) = OpenOptions::new().write(true).without_parents().open(Arc::clone(&other), None) else { return };
    image.write_at(&[7; 512], 0).or_else(|_| image.write_zeroes(0..512, true)).ok();
    if image.close().is_err() {
        return;
    }
    let error = restore(other.as_ref(), undo, &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
}

/// Puts the record back, with cuts in the middle of that.
fn put_back(sim: &Arc<SimStorage>, undo: &dyn Storage, original: &PageMap) {
    let points = watch(sim);
    let storage: Arc<dyn Storage> = Arc::<SimStorage>::clone(sim);
    restore(storage.as_ref(), undo, &()).unwrap();
    sim.set_observer(None);
    assert!(same(original, sim), "not what it was");
    assert_eq!(sim.pending(), 0, "something is not durable in the end");
    undo_all(&points, undo, original);
    // Once more changes nothing.
    restore(storage.as_ref(), undo, &()).unwrap();
    assert!(same(original, sim));
}
