//! What a row of the table is: an image, and what each of the four ways to look at it must say.

use std::ops::Range;
use std::sync::Arc;

use vhdkit::error::{Error, ErrorKind};
use vhdkit::format::finding::{Code, Severity, Strictness};
use vhdkit::image::Image;
use vhdkit_testkit::{BlockSpec, model};
use vhdkit_testkit::{BuiltImage, Content, ImageBuilder, SectorMask, SparseFile};

pub(crate) const MIB: u64 = 1 << 20;

/// What one way of looking at an image says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing to say.
    Accept,
    /// Goes on, with a warning.
    Warns(Code),
    /// Goes on, with a note.
    Notes(Code),
    /// Does not go on.
    Refuses(ErrorKind, Option<Code>),
    /// The image cannot be opened, so no block of it can be read.
    Unreached,
}

pub(crate) use Outcome::{Accept, Notes, Refuses, Unreached, Warns};

/// What the four ways say under one strictness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    /// Opening for reading.
    pub read: Outcome,
    /// Reading the affected block, and walking its extents. Where nothing refuses, the whole disk must hold what the
    /// model says.
    pub page: Outcome,
    /// Opening for writing.
    pub write: Outcome,
    /// `check`, as the one finding that the case is about.
    pub check: Outcome,
}

/// The severities of a finding under lenient, normal and strict judgement.
pub(crate) type Grades = [Severity; 3];

pub(crate) const NOTE: Severity = Severity::Note;
pub(crate) const WARNING: Severity = Severity::Warning;
pub(crate) const ERROR: Severity = Severity::Error;

pub(crate) const STRICTNESSES: [Strictness; 3] = [Strictness::Lenient, Strictness::Normal, Strictness::Strict];

/// What is expected, by strictness.
#[derive(Clone, Debug)]
pub(crate) struct Expect {
    pub levels: [Level; 3],
    /// Findings that may come along: what follows from the violation, and what the image cannot do without.
    pub also: Vec<Code>,
    /// The check of one layer does not see it, since it lies in another file.
    pub in_parent: bool,
    /// Only check sees it: a caller who names the parent does not need what is wrong.
    pub named: bool,
}

fn said(severity: Severity, kind: ErrorKind, code: Code) -> Outcome {
    match severity {
        Severity::Note => Notes(code),
        Severity::Warning => Warns(code),
        Severity::Error => Refuses(kind, Some(code)),
    }
}

impl Expect {
    fn of(levels: [Level; 3]) -> Self {
        Self { levels, also: Vec::new(), in_parent: false, named: false }
    }

    fn graded_by(grades: Grades, level: impl Fn(Severity) -> Level) -> Self {
        Self::of(grades.map(level))
    }

    /// Opening says it, with these severities.
    pub(crate) fn graded(kind: ErrorKind, code: Code, grades: Grades) -> Self {
        Self::graded_by(grades, |severity| {
            let said = said(severity, kind, code);
            let page = if severity == Severity::Error { Unreached } else { Accept };
            Level { read: said, page, write: said, check: said }
        })
    }

    /// Only what reads the entry says it: check always, a read and opening for writing where it is an error.
    pub(crate) fn entry_graded(kind: ErrorKind, code: Code, grades: Grades) -> Self {
        Self::graded_by(grades, |severity| {
            let check = said(severity, kind, code);
            let stops = if severity == Severity::Error { check } else { Accept };
            Level { read: Accept, page: stops, write: stops, check }
        })
    }

    /// Only a pass over the whole BAT says it: no read needs what is wrong, but nothing may be written.
    pub(crate) fn scan_graded(kind: ErrorKind, code: Code, grades: Grades) -> Self {
        let mut expect = Self::entry_graded(kind, code, grades);
        expect.levels.iter_mut().for_each(|level| level.page = Accept);
        expect
    }

    /// The reads that need the parent fail, and check does not look at it.
    pub(crate) fn parent(kind: ErrorKind, code: Option<Code>) -> Self {
        let refused = Refuses(kind, code);
        let level = Level { read: refused, page: Unreached, write: refused, check: Accept };
        Self { in_parent: true, ..Self::of([level; 3]) }
    }

    /// These findings may come along.
    pub(crate) fn also(mut self, codes: &[Code]) -> Self {
        self.also.extend_from_slice(codes);
        self
    }

    /// Any change of one level.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut [Level; 3])) -> Self {
        change(&mut self.levels);
        self
    }
}

/// Everything accepts the image.
pub(crate) fn accepted() -> Expect {
    Expect::of([Level { read: Accept, page: Accept, write: Accept, check: Accept }; 3])
}

/// Everything refuses the image, however it is judged.
pub(crate) fn refused(kind: ErrorKind, code: Code) -> Expect {
    Expect::graded(kind, code, [ERROR; 3])
}

/// Everything warns, however the image is judged.
pub(crate) fn warned(code: Code) -> Expect {
    Expect::graded(ErrorKind::Corrupt, code, [WARNING; 3])
}

/// Everything notes, however the image is judged.
pub(crate) fn noted(code: Code) -> Expect {
    Expect::graded(ErrorKind::Corrupt, code, [NOTE; 3])
}

/// A block's entry is refused by whatever reads it, however the image is judged.
pub(crate) fn entry_refused(kind: ErrorKind, code: Code) -> Expect {
    Expect::entry_graded(kind, code, [ERROR; 3])
}

/// Only opening for writing refuses.
pub(crate) fn write_refused(kind: ErrorKind, code: Code) -> Expect {
    accepted().with(|levels| levels.iter_mut().for_each(|level| level.write = Refuses(kind, Some(code))))
}

/// The log is replayed into memory, which is noted; opening for writing refuses, and strict judgement refuses all.
pub(crate) fn replayed() -> Expect {
    let stop = Refuses(ErrorKind::NeedsReplay, Some(Code::LogNeedsReplay));
    Expect::graded(ErrorKind::NeedsReplay, Code::LogNeedsReplay, [NOTE, NOTE, ERROR])
        .with(|levels| levels.iter_mut().for_each(|level| level.write = stop))
}

/// Panics when something does not hold.
pub(crate) type Verify<T> = Arc<dyn Fn(&T) + Send + Sync>;

/// An image with everything that is needed to judge it.
#[derive(Clone)]
pub(crate) struct Made {
    pub image: BuiltImage,
    /// Files beside the image and its chain that a parent locator may name.
    pub others: Vec<(String, SparseFile)>,
    /// Parents that the caller names, nearest first.
    pub named: Vec<String>,
    /// The block that a refused read is about.
    pub affected: u64,
    /// Guest ranges to compare, where the disk is too large to compare all of it.
    pub ranges: Option<Vec<Range<u64>>>,
    /// What else must hold of the open image.
    pub verify: Option<Verify<Image>>,
    /// What else must hold of the error that refuses to open it.
    pub verify_error: Option<Verify<Error>>,
    /// Bytes that belong to nothing, where that matters.
    pub leaked: Option<u64>,
}

impl From<BuiltImage> for Made {
    fn from(image: BuiltImage) -> Self {
        Self {
            image,
            others: Vec::new(),
            named: Vec::new(),
            affected: 0,
            ranges: None,
            verify: None,
            verify_error: None,
            leaked: None,
        }
    }
}

impl From<ImageBuilder> for Made {
    fn from(builder: ImageBuilder) -> Self {
        builder.build().into()
    }
}

impl Made {
    pub(crate) fn new(made: impl Into<Self>) -> Self {
        made.into()
    }

    /// The violation is in this block.
    pub(crate) fn affects(mut self, block: u64) -> Self {
        self.affected = block;
        self
    }

    /// Compares only these ranges of the guest's disk.
    pub(crate) fn compares(mut self, ranges: &[Range<u64>]) -> Self {
        self.ranges = Some(ranges.to_vec());
        self
    }

    pub(crate) fn other(mut self, image: &BuiltImage) -> Self {
        self.others.push((image.file_name.clone(), image.file.clone()));
        self
    }

    pub(crate) fn name_parent(mut self, name: &str) -> Self {
        self.named.push(name.to_owned());
        self
    }

    pub(crate) fn verify(mut self, verify: impl Fn(&Image) + Send + Sync + 'static) -> Self {
        self.verify = Some(Arc::new(verify));
        self
    }

    pub(crate) fn verify_error(mut self, verify: impl Fn(&Error) + Send + Sync + 'static) -> Self {
        self.verify_error = Some(Arc::new(verify));
        self
    }

    pub(crate) fn leaks(mut self, bytes: u64) -> Self {
        self.leaked = Some(bytes);
        self
    }

    /// Any change of the file, past the builder.
    pub(crate) fn edit(mut self, edit: impl FnOnce(&mut BuiltImage)) -> Self {
        edit(&mut self.image);
        self
    }
}

/// How a row is judged.
pub(crate) enum Judge {
    /// By what the four ways say.
    Image { make: Box<dyn Fn() -> Made + Send>, expect: Expect },
    /// By a function, which gives the codes that it saw.
    Special { run: Box<dyn Fn() -> Vec<Code> + Send>, codes: Vec<Code> },
}

/// A row of the table.
pub(crate) struct Row {
    pub rule: &'static str,
    pub name: String,
    pub judge: Judge,
}

/// A row with an image.
pub(crate) fn row<I: Into<Made>>(
    rule: &'static str,
    name: impl Into<String>,
    make: impl Fn() -> I + Send + 'static,
    expect: Expect,
) -> Row {
    Row { rule, name: name.into(), judge: Judge::Image { make: Box::new(move || make().into()), expect } }
}

/// A row that needs more than one image or more than memory; it must see exactly these codes.
pub(crate) fn special(
    rule: &'static str,
    name: impl Into<String>,
    codes: &[Code],
    run: impl Fn() -> Vec<Code> + Send + 'static,
) -> Row {
    Row { rule, name: name.into(), judge: Judge::Special { run: Box::new(run), codes: codes.to_vec() } }
}

/// Data that is cheap to make: every eighth sector holds a pattern.
pub(crate) fn data(seed: u64) -> Content {
    Content::Sparse { seed, stride: 8 }
}

/// An 8 MiB dynamic disk in 1 MiB blocks: data, data, zero, unmapped, undefined, data, and nothing twice.
pub(crate) fn dynamic() -> ImageBuilder {
    ImageBuilder::new(8 * MIB, 1 << 20)
        .block(0, BlockSpec::present(data(10)))
        .block(1, BlockSpec::present(data(11)))
        .block(2, BlockSpec::new(model::ZERO))
        .block(3, BlockSpec::new(model::UNMAPPED))
        .block(4, BlockSpec::new(model::UNDEFINED))
        .block(5, BlockSpec::present(data(15)))
}

/// A parent with data everywhere.
pub(crate) fn parent_builder() -> ImageBuilder {
    let builder = ImageBuilder::new(8 * MIB, 1 << 20).named("parent.vhdx");
    (0..8).fold(builder, |builder, block| builder.block(block, BlockSpec::present(data(100 + block))))
}

/// The parent, built.
pub(crate) fn parent() -> Arc<BuiltImage> {
    Arc::new(parent_builder().build())
}

/// A child of the parent in every state: data, some sectors, nothing, zero, unmapped, undefined, some sectors, nothing.
pub(crate) fn child_of(parent: &Arc<BuiltImage>) -> ImageBuilder {
    ImageBuilder::new(8 * MIB, 1 << 20)
        .named("child.vhdx")
        .block(0, BlockSpec::present(data(30)))
        .block(1, BlockSpec::partial(data(31), SectorMask::random(5, 7, 50)))
        .block(3, BlockSpec::new(model::ZERO))
        .block(4, BlockSpec::new(model::UNMAPPED))
        .block(5, BlockSpec::new(model::UNDEFINED))
        .block(6, BlockSpec::partial(data(36), SectorMask::new(|sector| sector % 2 == 1)))
        .differencing(parent)
}

/// A child with its parent.
pub(crate) fn differencing() -> ImageBuilder {
    child_of(&parent())
}
