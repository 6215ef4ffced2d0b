//! Looks at an image in every way and under every strictness, and says where that differs from the table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdkit::error::{Error, ErrorKind, Result};
use vhdkit::format::finding::{Code, Finding, Severity, Strictness};
use vhdkit::format::locator::KEY_RELATIVE_PATH;
use vhdkit::image::{
    BlockDevice, Extent, ExtentKind, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver,
};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{MemoryStorage, Storage, StorageIdentity};
use vhdkit_testkit::SparseFile;

use crate::table::{Accept, Expect, Level, Made, Notes, Outcome, Refuses, STRICTNESSES, Unreached, Warns};

/// Storage in memory that counts what tries to change it.
#[derive(Debug)]
pub(crate) struct Guarded {
    inner: MemoryStorage,
    changes: AtomicU64,
}

impl Guarded {
    pub(crate) fn new(file: &SparseFile) -> Arc<Self> {
        let inner = MemoryStorage::with_len(file.len());
        for (offset, bytes) in file.segments() {
            inner.write_at(bytes, offset).unwrap();
        }
        Arc::new(Self { inner, changes: AtomicU64::new(0) })
    }

    fn count(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Says so when anything tried to change the bytes, or they did.
    pub(crate) fn changed(&self, file: &SparseFile) -> Option<String> {
        let changes = self.changes.load(Ordering::Relaxed);
        if changes > 0 {
            return Some(format!("{changes} attempts to write"));
        }
        if self.inner.len().unwrap() != file.len() {
            return Some("the length changed".to_owned());
        }
        let mut seen = SparseFile::new();
        let mut position = 0;
        while let Some(range) = self.inner.next_data(position..file.len()).unwrap() {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.inner.read_at(&mut bytes, range.start).unwrap();
            seen.write_nonzero(range.start, &bytes);
            position = range.end;
        }
        let pages = |file: &SparseFile| -> BTreeMap<u64, Vec<u8>> {
            let whole = file.segments().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0));
            whole.map(|(offset, bytes)| (offset, bytes.to_vec())).collect()
        };
        (pages(&seen) != pages(file)).then(|| "the bytes changed".to_owned())
    }
}

impl Storage for Guarded {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.count();
        self.inner.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.count();
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.count();
        self.inner.sync()
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.count();
        self.inner.zero_range(range)
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        self.count();
        self.inner.punch_hole(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        self.count();
        self.inner.allocate(range)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(range)
    }

    fn identity(&self) -> Option<StorageIdentity> {
        self.inner.identity()
    }
}

/// Finds parents by the last part of the relative path, in a map; or by the names that the caller gives.
#[derive(Debug, Default)]
pub(crate) struct MapResolver {
    pub files: BTreeMap<String, Arc<Guarded>>,
    pub named: Vec<String>,
}

impl ParentResolver for MapResolver {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let named = self.named.get(wanted.depth);
        let path = wanted.locator.get(KEY_RELATIVE_PATH).map(|path| path.rsplit('\\').next().unwrap().to_owned());
        let found = named.cloned().or(path).and_then(|name| self.files.get(&name).map(|file| (name, file)));
        let Some((name, file)) = found else {
            return Err(Error::new(ErrorKind::ParentNotFound, "no such file").with_code(Code::ParentNotFound));
        };
        let storage: Arc<dyn Storage> = Arc::clone(file) as Arc<dyn Storage>;
        Ok(vec![ParentCandidate { storage, path: Some(PathBuf::from(name)), named: named.is_some(), lock: None }])
    }
}

/// A made image with the files of its chain as storage.
pub(crate) struct Stage {
    pub made: Made,
    pub storage: Arc<Guarded>,
    files: BTreeMap<String, (Arc<Guarded>, SparseFile)>,
}

impl Stage {
    pub(crate) fn new(made: Made) -> Self {
        let mut files = BTreeMap::new();
        let mut next = Some(&made.image);
        while let Some(image) = next {
            files.insert(image.file_name.clone(), (Guarded::new(&image.file), image.file.clone()));
            next = image.parent.as_deref();
        }
        for (name, file) in &made.others {
            files.insert(name.clone(), (Guarded::new(file), file.clone()));
        }
        let storage = Arc::clone(&files[&made.image.file_name].0);
        Self { made, storage, files }
    }

    pub(crate) fn options(&self, strictness: Strictness) -> OpenOptions {
        let files = self.files.iter().map(|(name, (storage, _))| (name.clone(), Arc::clone(storage))).collect();
        let resolver = MapResolver { files, named: self.made.named.clone() };
        OpenOptions::new().strictness(strictness).parents(Arc::new(resolver))
    }

    pub(crate) fn open(&self, options: &OpenOptions) -> Result<Image> {
        options.open(Arc::clone(&self.storage) as Arc<dyn Storage>, Some(Path::new(&self.made.image.file_name)))
    }

    /// What changed, of all files.
    pub(crate) fn changed(&self) -> Vec<String> {
        let changes = self
            .files
            .iter()
            .filter_map(|(name, (storage, file))| storage.changed(file).map(|change| format!("{name}: {change}")));
        changes.collect()
    }
}

/// Judges an image against the table; a panic says everything that differs.
pub(crate) fn judge(made: Made, expect: &Expect) {
    let stage = Stage::new(made);
    let mut faults = String::new();
    for (strictness, level) in STRICTNESSES.into_iter().zip(expect.levels) {
        for fault in judge_level(&stage, strictness, level, &expect.also) {
            let _ = writeln!(faults, "  {strictness:?}: {fault}");
        }
    }
    for change in stage.changed() {
        let _ = writeln!(faults, "  changed: {change}");
    }
    assert!(faults.is_empty(), "\n{faults}");
}

fn judge_level(stage: &Stage, strictness: Strictness, level: Level, also: &[Code]) -> Vec<String> {
    let mut faults = Vec::new();
    let options = stage.options(strictness);
    let read = stage.open(&options);
    faults.extend(judge_open(&read, level.read, also).map(|fault| format!("read: {fault}")));
    match (&read, level.page) {
        (Err(error), Unreached) => {
            if let Some(verify) = &stage.made.verify_error {
                verify(error);
            }
        }
        (Err(_), _) => {}
        (Ok(_), Unreached) => faults.push("page: the image was opened".to_owned()),
        (Ok(image), page) => {
            faults.extend(judge_pages(&stage.made, image, page).map(|fault| format!("page: {fault}")));
            if let Some(verify) = &stage.made.verify {
                verify(image);
            }
        }
    }
    let write = stage.open(&options.clone().write(true));
    faults.extend(judge_open(&write, level.write, also).map(|fault| format!("write: {fault}")));
    faults.extend(judge_check(stage, strictness, level.check, also).map(|fault| format!("check: {fault}")));
    faults
}

fn judge_error(error: &Error, kind: ErrorKind, code: Option<Code>) -> Option<String> {
    let right = error.kind() == kind && error.code() == code;
    (!right).then(|| format!("{:?} {:?} instead of {kind:?} {code:?}: {error}", error.kind(), error.code()))
}

fn judge_open(result: &Result<Image>, expected: Outcome, also: &[Code]) -> Option<String> {
    match (result, expected) {
        (Err(error), Refuses(kind, code)) => judge_error(error, kind, code),
        (Err(error), _) => Some(format!("refused instead of {expected:?}: {:?} {error}", error.code())),
        (Ok(_), Refuses(..)) => Some(format!("accepted instead of {expected:?}")),
        (Ok(image), _) => judge_findings(image.layers()[0].findings(), expected, also),
    }
}

/// The expected finding is there, and nothing else that was not announced.
fn judge_findings(findings: &[Finding], expected: Outcome, also: &[Code]) -> Option<String> {
    let wanted = match expected {
        Warns(code) => Some((code, Severity::Warning)),
        Notes(code) => Some((code, Severity::Note)),
        Refuses(_, code) => code.map(|code| (code, Severity::Error)),
        Accept | Unreached => None,
    };
    if let Some((code, severity)) = wanted {
        let found: Vec<_> = findings.iter().filter(|finding| finding.code() == code).collect();
        if found.is_empty() || found.iter().any(|finding| finding.severity() != severity) {
            return Some(format!("{code:?} as {severity:?} is not among {}", list(findings)));
        }
    }
    let extra = findings
        .iter()
        .find(|finding| wanted.is_none_or(|(code, _)| code != finding.code()) && !also.contains(&finding.code()));
    extra.map(|finding| format!("{:?} was not expected: {}", finding.code(), list(findings)))
}

fn list(findings: &[Finding]) -> String {
    let shown =
        findings.iter().take(8).map(|finding| format!("{:?} {:?}: {finding}", finding.severity(), finding.code()));
    format!("[{}]", shown.collect::<Vec<_>>().join("; "))
}

fn judge_check(stage: &Stage, strictness: Strictness, expected: Outcome, also: &[Code]) -> Option<String> {
    let options = CheckOptions { strictness, ..CheckOptions::default() };
    let storage = Arc::clone(&stage.storage) as Arc<dyn Storage>;
    let report = match check(&storage, None, &options, &()) {
        Ok(report) => report,
        Err(error) => return Some(format!("cannot be done: {error:?}")),
    };
    if let Refuses(kind, Some(code)) = expected
        && code.kind() != kind
    {
        return Some(format!("{code:?} is of kind {:?} instead of {kind:?}", code.kind()));
    }
    if (report.errors > 0) != matches!(expected, Refuses(..)) {
        return Some(format!("{} errors instead of {expected:?}: {}", report.errors, list(&report.findings)));
    }
    let leaked = report.summary.as_ref().map(|summary| summary.leaked_bytes);
    if stage.made.leaked.is_some() && leaked != stage.made.leaked {
        return Some(format!("{leaked:?} bytes belong to nothing instead of {:?}", stage.made.leaked));
    }
    judge_findings(&report.findings, expected, also)
}

/// Reads what the case is about, and compares the rest with the model.
fn judge_pages(made: &Made, image: &Image, expected: Outcome) -> Option<String> {
    let size = image.size();
    if size != made.image.model.virtual_size {
        return Some(format!("the disk has {size} bytes instead of {}", made.image.model.virtual_size));
    }
    let block_size = image.geometry().block_size();
    let affected = made.affected * block_size..((made.affected + 1) * block_size).min(size);
    let ranges = made.ranges.clone().unwrap_or_else(|| default_ranges(made, size, block_size));
    let Refuses(kind, code) = expected else {
        return ranges.into_iter().find_map(|range| compare(made, image, range));
    };
    let mut buffer = vec![0; (affected.end - affected.start).min(MIB_PIECE) as usize];
    let read = image.read_at(&mut buffer, affected.start);
    let walked = image.visit_extents(affected.clone(), &mut |_| ControlFlow::Continue(()));
    for (what, result) in [("read", read), ("extents", walked)] {
        match result {
            Ok(()) => return Some(format!("{what}: accepted instead of {expected:?}")),
            Err(error) => {
                if let Some(fault) = judge_error(&error, kind, code) {
                    return Some(format!("{what}: {fault}"));
                }
            }
        }
    }
    // A bad entry takes nothing else with it.
    let others = ranges
        .into_iter()
        .flat_map(|range| [range.start..range.end.min(affected.start), range.start.max(affected.end)..range.end]);
    others.filter(|range| range.start < range.end).find_map(|range| compare(made, image, range))
}

/// Everything, or of large disks the ends of the disk and of what holds data.
fn default_ranges(made: &Made, size: u64, block_size: u64) -> Vec<Range<u64>> {
    const END: u64 = 65_536;
    if size <= 64 << 20 {
        return std::iter::once(0..size).collect();
    }
    let mut ranges = vec![0..END, size - END..size];
    for block in made.image.model.blocks.keys() {
        let (start, end) = (block * block_size, ((block + 1) * block_size).min(size));
        ranges.extend([start..(start + END).min(end), end.saturating_sub(END).max(start)..end]);
    }
    ranges
}

/// Compares reads and extents of a range with the model; says what differs first.
pub(crate) fn compare(made: &Made, image: &Image, range: Range<u64>) -> Option<String> {
    let model = &made.image.model;
    let mut position = range.start;
    while position < range.end {
        let length = (range.end - position).min(MIB_PIECE) as usize;
        let mut buffer = vec![0xEE; length];
        if let Err(error) = image.read_at(&mut buffer, position) {
            return Some(format!("read at {position:#x}: {error}"));
        }
        let expected = model.read(position, length);
        if buffer != expected {
            let at = buffer.iter().zip(&expected).position(|(left, right)| left != right).unwrap();
            let (found, wanted) = (buffer[at], expected[at]);
            return Some(format!("byte {:#x} is {found:#x} instead of {wanted:#x}", position + at as u64));
        }
        position += length as u64;
    }
    compare_extents(made, image, range)
}

const MIB_PIECE: u64 = 1 << 20;

fn compare_extents(made: &Made, image: &Image, range: Range<u64>) -> Option<String> {
    let mut extents: Vec<Extent> = Vec::new();
    let walked = image.visit_extents(range.clone(), &mut |extent| {
        extents.push(*extent);
        ControlFlow::Continue(())
    });
    if let Err(error) = walked {
        return Some(format!("extents: {error}"));
    }
    let mut position = range.start;
    for extent in &extents {
        if extent.start != position || extent.length == 0 {
            return Some(format!("extent {extent:?} does not follow {position:#x}"));
        }
        position = extent.end();
        let mut start = extent.start;
        while start < extent.end() {
            let length = (extent.end() - start).min(MIB_PIECE) as usize;
            let expected = made.image.model.read(start, length);
            let right = match extent.kind {
                ExtentKind::Zero | ExtentKind::Hole => expected.iter().all(|byte| *byte == 0),
                ExtentKind::Data { file_offset: Some(offset) } => {
                    let mut bytes = vec![0; length];
                    let storage = image.layer_storage(extent.layer).unwrap();
                    storage.read_at(&mut bytes, offset + (start - extent.start)).is_ok() && bytes == expected
                }
                ExtentKind::Data { file_offset: None } => true,
            };
            if !right {
                return Some(format!("extent {extent:?} is not what the disk holds"));
            }
            start += length as u64;
        }
    }
    (position != range.end).then(|| format!("the extents end at {position:#x} instead of {:#x}", range.end))
}

/// The expectations of one level agree with each other: what opening refuses check refuses too, and the other way round.
pub(crate) fn contradiction(expect: &Expect) -> Option<String> {
    for level in &expect.levels {
        let refuses = |outcome: Outcome| matches!(outcome, Refuses(..));
        if refuses(level.read) != (level.page == Unreached) {
            return Some(format!("{level:?}: pages are unreached exactly where opening refuses"));
        }
        if refuses(level.read) && !refuses(level.write) {
            return Some(format!("{level:?}: what cannot be read cannot be written"));
        }
        if refuses(level.read) && level.check != level.read && !expect.in_parent {
            return Some(format!("{level:?}: check does not see what opening refuses"));
        }
        if refuses(level.check) && !refuses(level.write) && !expect.named {
            return Some(format!("{level:?}: an image in error would be written"));
        }
    }
    None
}
