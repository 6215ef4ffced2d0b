//! `repair`: a plan, the plan carried out, and the undo record put back.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use vhdkit::format::finding::Severity;
use vhdkit::ops::chain::{ParentFile, directory_of};
use vhdkit::ops::check::CheckReport;
use vhdkit::ops::repair::{RepairOptions, RepairPlan, Restored, apply, plan, plan_restore, restore};
use vhdkit::storage::{FileAccess, FileStorage, NewFile, NewFileOptions, Sharing, Storage};
use vhdkit::text::escape;
use vhdkit::{Error, ErrorKind};

use super::dependents;
use super::info::{finding_json, refuse_raw};
use crate::args_mending::RepairArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::is_block_device;
use crate::opening::{check_parent_options, open_options, sharing};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::{BAD, DOUBTFUL, FAINT, GOOD, HEADING, Ui};
use crate::writing::{refuse_sharing, warn_of_change_tracking, warn_of_hidden_locks};

/// Plans, mends or restores, as asked.
pub(crate) fn run(context: &Context, args: &RepairArgs) -> Result<Answer, Failure> {
    refuse_raw(context, &args.image, args.from.from)?;
    check_parent_options(&context.global)?;
    if let Some(record) = &args.restore {
        return put_back(context, args, record);
    }
    let record = if args.apply { Some(record_path(args)?) } else { None };
    let storage = open(context, &args.image, args.apply)?;
    let bar = Bar::new("checking", &context.ui, &context.interrupt);
    let planned = plan(&storage, Some(&args.image), &RepairOptions::default(), &bar);
    let planned = planned.map_err(|error| error.with_path(&args.image))?;
    drop(bar);
    let record = record.filter(|_| planned.changes_anything());
    let breaks = planned.changes_anything() && planned.breaks_children && !args.children.break_children;
    let parent_file = ParentFile { identity: storage.identity(), data_write_guid: planned.data_write_guid };
    let children = if breaks { broken_children(context, args, &parent_file)? } else { Vec::new() };
    let refusal = || {
        let names = children.join(", ");
        let what = format!("mending the image changes what its guest sees, and it is the parent of {names}");
        refused_for_children(what, &args.image)
    };
    if let Some(record) = &record {
        if !children.is_empty() {
            return Err(refusal());
        }
        carry_out(context, args, &storage, &planned, record)?;
    }
    drop(storage);
    let parent = if planned.after.errors == 0 { parent_trouble(context, &args.image)? } else { None };
    let (path, record) = (args.image.as_path(), record.as_deref());
    let report = Report { context, path, plan: &planned, record, parent, children: &children, asked: args.apply };
    report.print()?;
    if args.dry_run && !children.is_empty() {
        return Err(refusal());
    }
    Ok(if planned.mends_everything() && report.parent.is_none() { Answer::Yes } else { Answer::No })
}

/// Children that were linked to the repaired image do not accept the one from before.
fn refuse_children_of_the_repaired(
    context: &Context,
    args: &RepairArgs,
    storage: &Arc<dyn Storage>,
    undo: &FileStorage,
    bar: &Bar,
) -> Result<(), Failure> {
    let (Ok(before), Ok(now)) = (plan_restore(storage.as_ref(), undo, bar), ParentFile::at(&args.image)) else {
        return Ok(()); // said when it is put back, or nobody's parent
    };
    if args.children.break_children || before.data_write_guid == Some(now.data_write_guid) {
        return Ok(());
    }
    let children = broken_children(context, args, &now)?;
    if children.is_empty() {
        return Ok(());
    }
    let names = children.join(", ");
    let what = format!("putting the record back changes what the guest sees, and the image is the parent of {names}");
    Err(refused_for_children(what, &args.image))
}

fn refused_for_children(what: String, image: &Path) -> Failure {
    let hint = "work on a copy, or use --break-children and link the children again with `vhdkit reparent CHILD PARENT \
                --ignore-id-mismatch` once you know that they fit";
    Error::new(ErrorKind::Refused, what).with_path(image).with_hint(hint).into()
}

/// Children that do not accept the image any more once it is mended.
fn broken_children(context: &Context, args: &RepairArgs, of: &ParentFile) -> Result<Vec<String>, Failure> {
    let own = [directory_of(&args.image)];
    Ok(dependents::names_of_broken(&dependents::children_of(context, of, &own, &args.children.child)?))
}

fn open(context: &Context, path: &Path, write: bool) -> Result<Arc<dyn Storage>, Failure> {
    let storage = if write {
        refuse_sharing(context)?;
        FileStorage::open(path, FileAccess::Write, Sharing::Normal)?
    } else {
        FileStorage::open(path, FileAccess::Read, sharing(&context.global))?
    };
    if let Some(note) = &storage.lock_report().note {
        context.ui.warn(None, note);
    }
    if write {
        warn_of_hidden_locks(context, path, &storage);
    }
    Ok(Arc::new(storage))
}

/// Where the undo record goes.
fn record_path(args: &RepairArgs) -> Result<PathBuf, Failure> {
    if let Some(record) = &args.undo {
        if record.as_os_str() == "-" {
            return Err(Failure::usage(
                "the undo record is written to a file, which has to be there before the image is changed",
                "name one: --undo FILE (for a file of this name, ./-)",
            ));
        }
        return Ok(record.clone());
    }
    if is_block_device(&args.image) {
        return Err(Failure::usage(
            "the image is a block device, beside which no undo record can lie",
            "say where it goes with --undo FILE",
        ));
    }
    let mut name = args.image.clone().into_os_string();
    name.push(".undo");
    Ok(PathBuf::from(name))
}

fn carry_out(
    context: &Context,
    args: &RepairArgs,
    storage: &Arc<dyn Storage>,
    planned: &RepairPlan,
    record: &Path,
) -> Result<(), Failure> {
    let path = args.image.as_path();
    let undo_it =
        format!("vhdkit repair {} --restore {}", show::quoted(path.as_os_str()), show::quoted(record.as_os_str()));
    // One that was named may be that of a copy of the image.
    if args.undo.is_none() && is_spent_record(context, storage, record)? {
        set_aside(context, record)?;
    }
    let file = NewFile::create(record, NewFileOptions::default());
    let file = file.map_err(|error| match error.kind() {
        ErrorKind::Exists => error.with_hint(format!(
            "if it is the record of an earlier repair, `{undo_it}` puts that back; or name another one with --undo FILE"
        )),
        _ => error,
    })?;
    let undo = file.storage();
    let mut file = Some(file);
    let mut keep = || file.take().map_or(Ok(()), |file| file.commit(true));
    let bar = Bar::new("repairing", &context.ui, &context.interrupt);
    let applied = apply(storage, planned, undo.as_ref(), &mut keep, &bar);
    drop(bar);
    applied.map_err(|error| {
        let error = error.with_path(path);
        if file.is_some() {
            return error; // nothing was changed
        }
        error.with_hint(format!("the image may be changed in part: put it back with `{undo_it}`"))
    })?;
    warn_of_change_tracking(context, path);
    Ok(())
}

/// Gives a record that has nothing to put back another name: a copy of the image may need it.
fn set_aside(context: &Context, record: &Path) -> Result<(), Failure> {
    let numbered = |number: u32| {
        let mut name = record.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    };
    let is_free = |path: &PathBuf| std::fs::symlink_metadata(path).is_err();
    let Some(kept) = (1..=1000).map(numbered).find(is_free) else { return Ok(()) };
    let renamed = std::fs::rename(record, &kept);
    renamed.map_err(|error| Error::io("cannot give the earlier undo record another name", error).with_path(record))?;
    let what = format!("the earlier undo record, which has nothing to put back here, is {} now", show::path(&kept));
    context.ui.warn(None, &what);
    Ok(())
}

/// Whether there is a record already that has nothing to put back: it was put back before, or never needed.
fn is_spent_record(context: &Context, storage: &Arc<dyn Storage>, record: &Path) -> Result<bool, Failure> {
    let is_file = std::fs::symlink_metadata(record).is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        return Ok(false);
    }
    let old = FileStorage::open(record, FileAccess::Read, Sharing::ForceShare)?;
    let bar = Bar::new("comparing with the record that is there", &context.ui, &context.interrupt);
    match plan_restore(storage.as_ref(), &old, &bar) {
        Ok(all) => Ok(all.bytes == 0 && all.file_size_before == all.file_size_after),
        // Some other file, or the record of another image.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::Refused) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn put_back(context: &Context, args: &RepairArgs, record: &Path) -> Result<Answer, Failure> {
    let path = args.image.as_path();
    // Not locked: should it be the image itself, that is to be said, and not that it is in use.
    let undo = FileStorage::open(record, FileAccess::Read, Sharing::ForceShare)?;
    let storage = open(context, path, !args.dry_run)?;
    if storage.identity() == undo.identity() {
        return Err(Failure::usage("the record is the image itself", "name the record that `repair --apply` wrote"));
    }
    let bar = Bar::new("restoring", &context.ui, &context.interrupt);
    refuse_children_of_the_repaired(context, args, &storage, &undo, &bar)?;
    let put_back = if args.dry_run { plan_restore } else { restore };
    let restored = put_back(storage.as_ref(), &undo, &bar).map_err(|error| match error.kind() {
        ErrorKind::InvalidArgument => error.with_path(record),
        _ => error.with_path(path),
    })?;
    drop(bar);
    if !args.dry_run {
        warn_of_change_tracking(context, path);
    }
    let Restored { bytes, file_size_before, file_size_after, .. } = restored;
    if context.ui.json {
        Ui::print_json(&json!({
            "file": show::path(path),
            "record": show::path(record),
            "restored": !args.dry_run,
            "dry_run": args.dry_run,
            "bytes": bytes,
            "file_size_before": file_size_before,
            "file_size_after": file_size_after,
        }))?;
    } else if !context.ui.quiet {
        let mut out = context.ui.out();
        let (file, amount) = (show::path(path), sizes::short(bytes));
        if args.dry_run {
            writeln!(out, "{file}: {amount} would be put back; nothing was changed")?;
        } else {
            writeln!(out, "{file}: as it was before the repair, {amount} put back")?;
        }
        out.flush()?;
    }
    Ok(Answer::Yes)
}

/// Whether a child and its parent do not belong together: no repair of the one file can mend that.
fn parent_trouble(context: &Context, path: &Path) -> Result<Option<Error>, Failure> {
    let named = context.global.parent.iter().map(AsRef::as_ref);
    let opened = open_options(&context.global, named)?.open_path(path);
    Ok(opened.err().filter(|error| matches!(error.kind(), ErrorKind::ParentMismatch | ErrorKind::Chain)))
}

/// The next step when the parent is not the right one.
const REPARENT: &str = "`vhdkit reparent CHILD PARENT` links a child to the right parent; a parent that was changed after its \
                        child was made cannot be used without damage";

/// What is told in the end.
struct Report<'a> {
    context: &'a Context,
    path: &'a Path,
    plan: &'a RepairPlan,
    /// The undo record, when the plan was carried out.
    record: Option<&'a Path>,
    parent: Option<Error>,
    /// Children that are found and do not accept the image any more once it is mended.
    children: &'a [String],
    /// The user asked for the plan to be carried out.
    asked: bool,
}

impl Report<'_> {
    fn print(&self) -> Result<(), Failure> {
        if self.context.ui.json {
            return Ui::print_json(&self.to_json());
        }
        let mut out = self.context.ui.out();
        self.write(&mut out)?;
        Ok(out.flush()?)
    }

    fn to_json(&self) -> Value {
        let plan = self.plan;
        let actions = plan.actions.iter().map(|action| {
            json!({
                "finding": finding_json(&action.finding),
                "action": escape(&action.what),
                "lost": action.lost.as_deref().map(escape),
            })
        });
        let left =
            plan.left.iter().map(|left| json!({ "finding": finding_json(&left.finding), "advice": left.advice }));
        json!({
            "file": show::path(self.path),
            "applied": self.record.is_some(),
            "undo": self.record.map(show::path),
            "possible": plan.changes_anything(),
            "actions": actions.collect::<Vec<_>>(),
            "left": left.collect::<Vec<_>>(),
            "before": counts_json(&plan.before),
            "after": counts_json(&plan.after),
            "breaks_children": plan.changes_anything() && plan.breaks_children,
            "children": self.children,
            "file_size_before": plan.file_size_before,
            "file_size_after": plan.file_size_after,
            "bytes_changed": plan.bytes_changed,
            "parent": self.parent.as_ref().map(|error| json!({
                "kind": error.kind().as_str(),
                "message": escape(error.message()),
                "hint": REPARENT,
            })),
        })
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let plan = self.plan;
        let file = show::path(self.path);
        let done = if self.record.is_some() { "done" } else { "would do" };
        for action in &plan.actions {
            let finding = &action.finding;
            let style = style_of(finding.severity());
            let text = finding.to_string();
            writeln!(out, "{style}{}{style:#}: {} ({})", finding.severity().as_str(), escape(&text), finding.code())?;
            if plan.changes_anything() {
                writeln!(out, "  {done}: {}", escape(&action.what))?;
                let lost = action.lost.as_deref().map_or_else(|| "nothing".into(), escape);
                writeln!(out, "  lost: {lost}")?;
            }
        }
        for left in &plan.left {
            let style = style_of(left.finding.severity());
            let text = left.finding.to_string();
            let severity = left.finding.severity().as_str();
            writeln!(out, "{style}{severity}{style:#}: {} ({})", escape(&text), left.finding.code())?;
            writeln!(out, "  left: {}", left.advice)?;
        }
        if let Some(error) = &self.parent {
            writeln!(out, "{BAD}error{BAD:#}: {}", escape(&error.to_string()))?;
            writeln!(out, "  left: {REPARENT}")?;
        }
        if self.context.ui.quiet {
            return Ok(());
        }
        self.write_end(out, &file)
    }

    fn write_end(&self, out: &mut dyn Write, file: &str) -> io::Result<()> {
        let plan = self.plan;
        if plan.actions.is_empty() && plan.left.is_empty() && self.parent.is_none() {
            return writeln!(out, "{file}: {GOOD}nothing to mend{GOOD:#}");
        }
        if !plan.actions.is_empty() || !plan.left.is_empty() {
            writeln!(out)?;
        }
        if plan.changes_anything() && plan.breaks_children {
            let will = if self.record.is_some() { "no longer accept" } else { "will no longer accept" };
            writeln!(
                out,
                "{HEADING}note{HEADING:#}: children of this image {will} it as their parent, as what it holds changes"
            )?;
            if !self.children.is_empty() {
                let names = self.children.join(", ");
                writeln!(out, "  found: {names}; --apply is refused without --break-children")?;
            }
        }
        let (before, after) = (total(&plan.before), total(&plan.after));
        let counts = format!("{before} before, {after} {}", if self.record.is_some() { "now" } else { "afterwards" });
        match (self.record, plan.changes_anything()) {
            (Some(record), _) => {
                let (image, record) = (show::quoted(self.path.as_os_str()), show::quoted(record.as_os_str()));
                writeln!(out, "{file}: {GOOD}mended{GOOD:#}, errors and warnings: {counts}")?;
                writeln!(out, "to undo: vhdkit repair {image} --restore {record}")
            }
            (None, true) => writeln!(
                out,
                "{file}: {FAINT}nothing was changed{FAINT:#}; with --apply, errors and warnings: {counts}"
            ),
            (None, false) if plan.actions.is_empty() => {
                writeln!(out, "{file}: nothing of this can be mended for certain")
            }
            (None, false) => writeln!(
                out,
                "{file}: it could not be opened even if all of this were done, so nothing {}; see `vhdkit recover`",
                if self.asked { "was changed" } else { "would be changed" }
            ),
        }
    }
}

fn style_of(severity: Severity) -> anstyle::Style {
    match severity {
        Severity::Error => BAD,
        Severity::Warning => DOUBTFUL,
        Severity::Note => FAINT,
    }
}

fn total(report: &CheckReport) -> u64 {
    report.errors.saturating_add(report.warnings)
}

fn counts_json(report: &CheckReport) -> Value {
    json!({ "errors": report.errors, "warnings": report.warnings, "notes": report.notes })
}
