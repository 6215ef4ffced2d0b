//! Mends what `check` finds, where what is right is certain.
//!
//! ```text
//! plan:   file -> identifier, headers, log, region tables, metadata, BAT, end of the file -> draft in memory -> check
//! apply:  undo record, F -> headers (new write GUIDs), F each -> length, copies of blocks, F -> everything else, F
//!         -> headers (log GUID zero), F each -> cut, F
//! ```
//!
//! Planning reads only. Each step is decided on the draft that the steps before left, in the order of opening, and the
//! finished draft is checked like a file; what it still has wrong is what the repair leaves. So the report of a plan says
//! what a check afterwards will say.
//!
//! Where what is right is not certain nothing is done, and the report says what to do instead. If the image could not be
//! opened even afterwards, nothing is done at all: [`recover`](crate::ops::recover) makes more of a file that is as it was.

mod apply;
mod blocks;
mod draft;
mod ends;
mod tables;
mod undo;

use std::path::Path;
use std::sync::Arc;

use super::Progress;
use super::check::{CheckOptions, CheckReport, check};
use crate::error::{Error, Result};
use crate::format::finding::{Code, Finding, Severity};
use crate::format::guid::Guid;
use crate::format::header::Header;
use crate::format::log::GROWTH_MAX;
use crate::image::layer::Layer;
use crate::storage::{Storage, is_resizable};

use draft::Draft;

pub use apply::apply;
pub use undo::{Restored, UndoReport, plan_restore, restore};

/// How to repair.
#[derive(Clone, Copy, Debug)]
pub struct RepairOptions {
    /// How far a dirty log may let the file grow, in bytes, and how far a file is made longer that was cut off.
    pub growth_max: u64,
}

impl Default for RepairOptions {
    fn default() -> Self {
        Self { growth_max: GROWTH_MAX }
    }
}

/// One thing that is mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    /// What is wrong.
    pub finding: Finding,
    /// What is done about it.
    pub what: String,
    /// What is lost by it, or was lost before and is given up now; `None` when nothing is.
    pub lost: Option<String>,
}

/// A finding that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// What is wrong.
    pub finding: Finding,
    /// What can be done about it.
    pub advice: &'static str,
}

/// What would be done to a file, and what would come of it.
#[derive(Debug)]
pub struct RepairPlan {
    /// What a check says of the file as it is.
    pub before: CheckReport,
    /// What is mended, in the order in which it is decided; the first 10,000.
    pub actions: Vec<Action>,
    /// What a check says afterwards.
    pub after: CheckReport,
    /// Warnings and errors that stay, with what can be done about them.
    pub left: Vec<Left>,
    /// Children of this image no longer accept it as their parent, as what its guest sees changes.
    pub breaks_children: bool,
    /// The data write GUID of the image as it is, by which its children know it; nil without a header.
    pub data_write_guid: Guid,
    /// The file's length before.
    pub file_size_before: u64,
    /// The file's length afterwards.
    pub file_size_after: u64,
    /// Bytes that are written, copies of blocks included.
    pub bytes_changed: u64,
    draft: Arc<Draft>,
    headers: Vec<[Header; 2]>,
    current_copy: usize,
    old_guid: Guid,
}

impl RepairPlan {
    /// True when there is something to do, and [`apply()`] does it.
    #[must_use]
    pub fn changes_anything(&self) -> bool {
        !self.headers.is_empty()
    }

    /// True when nothing is wrong afterwards.
    #[must_use]
    pub fn mends_everything(&self) -> bool {
        self.left.is_empty()
    }
}

/// Most actions that are kept; what goes beyond is a case for `recover`.
const ACTIONS_MAX: usize = 10_000;

/// Finds out what can be mended in an image, by itself, without its parents. The name is for messages. The file is only
/// read.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::ops::create::{CreateOptions, create};
/// use vhdkit::ops::repair::{RepairOptions, apply, plan};
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// # fn main() -> vhdkit::Result<()> {
/// let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// create(&file, &CreateOptions::new(64 << 20), &())?;
/// file.write_at(&[0; 512], 64 << 10).unwrap(); // one header copy is lost
///
/// let plan = plan(&file, None, &RepairOptions::default(), &())?;
/// assert!(plan.changes_anything() && plan.mends_everything());
/// let undo: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// apply(&file, &plan, undo.as_ref(), &mut || Ok(()), &())?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`NotVhdx`](crate::ErrorKind::NotVhdx) for what was never one; when reading fails, or `progress` cancels. What is wrong
/// with the image is in the plan.
pub fn plan(
    storage: &Arc<dyn Storage>,
    name: Option<&Path>,
    options: &RepairOptions,
    progress: &dyn Progress,
) -> Result<RepairPlan> {
    let check_options = CheckOptions { log_growth_max: options.growth_max, ..CheckOptions::default() };
    let before = check(storage, name, &check_options, progress)?;
    let mut planner = Planner::new(storage, *options)?;
    let foreign = before.findings.iter().find(|finding| finding.code() == Code::FileSignature);
    if let (Some(finding), false) = (foreign, planner.has_signatures()?) {
        return Err(Error::from_finding(finding)); // neither identifier, nor headers, nor region tables
    }
    planner.plan(progress)?;
    let mut plan = planner.finish(before.clone());
    if plan.actions.is_empty() {
        return Ok(plan);
    }
    let draft: Arc<dyn Storage> = Arc::<Draft>::clone(&plan.draft);
    plan.after = check(&draft, name, &check_options, progress)?;
    plan.left = left(&plan.after);
    if let Err(error) = Layer::open(&draft, name, check_options.strictness, options.growth_max) {
        if error.code().is_none() {
            return Err(error);
        }
        // It cannot be opened in any case: leave it as it is for `recover`.
        plan.headers.clear();
        plan.left = left(&before);
        plan.after = before;
        plan.file_size_after = plan.file_size_before;
    }
    plan.bytes_changed = if plan.changes_anything() { apply::bytes_changed(&plan)? } else { 0 };
    Ok(plan)
}

/// The findings that matter, with advice.
fn left(report: &CheckReport) -> Vec<Left> {
    let serious = report.findings.iter().filter(|finding| finding.severity() != Severity::Note);
    serious.map(|finding| Left { finding: finding.clone(), advice: advice(finding.code()) }).collect()
}

/// What can be done about a finding that is not mended here.
const fn advice(code: Code) -> &'static str {
    use Code as C;
    match code {
        C::FileSignature => {
            "this may be another kind of file; `vhdkit recover IMAGE TARGET` looks for what is left of an image"
        }
        C::HeaderVersion | C::LogVersion | C::RegionUnknownRequired | C::MetadataUnknownRequired | C::LocatorType => {
            "use the program that made the image: it has something that vhdkit does not know"
        }
        C::HeaderSequenceExhausted | C::LogMissing => "convert the image to a new file (`vhdkit convert`)",
        C::LogTooLong | C::LogGrowth | C::BatTooLarge => {
            "the image is beyond what vhdkit handles; use the program that made it to convert it"
        }
        C::IncompleteFile => "make the image again: its creation was cut short",
        C::SectorSizes => "set the physical sector size (`vhdkit set --physical-sector-size 4096`)",
        C::ParentLocatorMissing
        | C::ParentLocatorUnexpected
        | C::LocatorLength
        | C::LocatorReserved
        | C::LocatorCount
        | C::LocatorRange
        | C::LocatorText
        | C::LocatorDuplicate
        | C::LocatorLinkage
        | C::LocatorLinkage2
        | C::LocatorNoPath
        | C::ParentNotFound
        | C::ParentMismatch
        | C::ParentSectorSize
        | C::ChainCycle
        | C::ChainDepth => {
            "give the image its parent again (`vhdkit reparent CHILD PARENT`), if you know which one it is"
        }
        C::BitmapMissing | C::BitmapOutsideFile | C::BitmapOffset | C::BitmapState => {
            "which sectors are the image's own cannot be known without the bitmap; `vhdkit recover IMAGE TARGET` compares \
             with the parent"
        }
        _ => {
            "what is right cannot be known for certain; `vhdkit recover IMAGE TARGET` makes a new image of what can be found"
        }
    }
}

/// The state of planning.
#[derive(Debug)]
struct Planner {
    draft: Arc<Draft>,
    options: RepairOptions,
    actions: Vec<Action>,
    /// The header that counts, as it is in the file.
    old: Option<(Header, usize)>,
    /// The header as it will be, but for its sequence number and write GUIDs.
    header: Option<Header>,
    /// The log has no place any more and gets a new one.
    needs_log: bool,
    /// What the guest sees is not what it was.
    visible: bool,
    /// The metadata says that there is no parent, and has the locator of one: which is right cannot be known.
    parent_doubtful: bool,
}

/// Whether there is something to go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Next,
    Stop,
}

impl Planner {
    fn new(storage: &Arc<dyn Storage>, options: RepairOptions) -> Result<Self> {
        Ok(Self {
            draft: Arc::new(Draft::new(storage)?),
            options,
            actions: Vec::new(),
            old: None,
            header: None,
            needs_log: false,
            visible: false,
            parent_doubtful: false,
        })
    }

    /// Goes through the file in the order of opening.
    fn plan(&mut self, progress: &dyn Progress) -> Result<()> {
        let before_blocks: [fn(&mut Self) -> Result<Step>; 5] =
            [Self::headers, Self::identifier, Self::log, Self::region_tables, Self::metadata];
        for step in before_blocks {
            if step(self)? == Step::Stop {
                return Ok(());
            }
        }
        if self.blocks(progress)? == Step::Next {
            self.end_of_file()?;
        }
        Ok(())
    }

    fn act(&mut self, finding: Finding, what: impl Into<String>, lost: Option<String>) {
        self.visible |= lost.is_some();
        if self.actions.len() < ACTIONS_MAX {
            self.actions.push(Action { finding, what: what.into(), lost });
        }
    }

    /// Whether the file can be made longer or shorter.
    fn is_resizable(&self) -> bool {
        is_resizable(self.draft.base().as_ref())
    }

    /// The draft as the storage that decoders take.
    fn storage(&self) -> Arc<dyn Storage> {
        Arc::<Draft>::clone(&self.draft)
    }

    /// The plan, with what comes afterwards still to be found out.
    fn finish(self, before: CheckReport) -> RepairPlan {
        let after = before.clone();
        let mut headers = Vec::new();
        let mut current_copy = 0;
        let mut old_guid = Guid::NIL;
        let data_write_guid = self.old.map_or(Guid::NIL, |(old, _)| old.data_write_guid);
        if let (Some((old, copy)), Some(wanted), false) = (self.old, self.header, self.actions.is_empty()) {
            current_copy = copy;
            old_guid = old.file_write_guid;
            headers = header_updates(&old, &wanted, self.visible);
            if let Some([first, second]) = headers.last() {
                let copies = if copy == 0 { [second, first] } else { [first, second] };
                // Headers are whole pages, so that nothing is read; should it fail all the same, the check says so.
                let _ = self.draft.write_headers(copies);
            }
        }
        RepairPlan {
            left: left(&before),
            before,
            actions: self.actions,
            after,
            breaks_children: self.visible,
            data_write_guid,
            file_size_before: self.draft.base_length(),
            file_size_after: self.draft.length(),
            bytes_changed: 0,
            draft: self.draft,
            headers,
            current_copy,
            old_guid,
        }
    }
}

/// The header updates of a repair: each is written to the copy that is not current, then to the other one. The first has
/// the new write GUIDs and nothing else, so that they are there before anything changes (W-001, W-003); the second, where
/// there is one, what was mended in the header.
fn header_updates(old: &Header, wanted: &Header, visible: bool) -> Vec<[Header; 2]> {
    let data_write_guid = if visible { Guid::random() } else { old.data_write_guid };
    let first = Header { file_write_guid: Guid::random(), data_write_guid, ..*old };
    let last = Header { file_write_guid: first.file_write_guid, data_write_guid, ..*wanted };
    let numbered = |header: &Header, after: u64| {
        let number = |more: u64| old.sequence_number.saturating_add(after + more); // refused near the end of all numbers
        [Header { sequence_number: number(1), ..*header }, Header { sequence_number: number(2), ..*header }]
    };
    let mut updates = vec![numbered(&first, 0)];
    if first != (Header { sequence_number: first.sequence_number, ..last }) {
        updates.push(numbered(&last, 2));
    }
    updates
}
