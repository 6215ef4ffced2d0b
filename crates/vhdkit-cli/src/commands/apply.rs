//! `apply`: an incremental backup into the disk that it was made from.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use vhdkit::image::Image;
use vhdkit::ops::apply::{ApplyOptions, ApplyPlan, ApplyTarget, Basis, plan_apply};
use vhdkit::ops::chain::refuse_to_break;
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit::text::escape;
use vhdkit::{Error, ErrorKind};

use crate::args::{ApplyArgs, Format};
use crate::cli::Context;
use crate::failure::{Answer, Done, Failure};
use crate::formats::{Wanted, is_block_device, is_standard_stream, source_format};
use crate::opening::sharing;
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::Session;

/// Checks everything, and then applies.
pub(crate) fn run(context: &Context, args: &ApplyArgs) -> Result<Answer, Failure> {
    if args.resume && !context.global.force {
        return Err(Failure::usage(
            "--resume writes over whatever the target holds, and goes with --force only",
            "say --force --resume if the target was being made by this very file",
        ));
    }
    if is_standard_stream(&args.file) {
        return Err(Failure::usage(
            "an increment is read twice, once before the first write, which standard input cannot be",
            "save it to a file first; a file that is named so is ./-",
        ));
    }
    if context.global.force_share {
        return Err(Failure::usage(
            "--force-share is for looking at an image; one that others may be writing is not written",
            "leave it out, and close the program that uses the image",
        ));
    }
    let format = source_format(&args.target, args.writing.from.from, Wanted::Source, "--from", &context.ui)?;
    let file = FileStorage::open(&args.file, FileAccess::Read, sharing(&context.global))?;
    refuse_same_file(&file, args)?;
    match format {
        Format::Vhdx => apply_to_image(context, args, &file),
        Format::Raw => apply_to_raw(context, args, &file),
    }
}

/// Looked at before the target is opened in earnest, since the increment's own lock would be taken for another program's.
fn refuse_same_file(file: &FileStorage, args: &ApplyArgs) -> Result<(), Failure> {
    let target = FileStorage::open(&args.target, FileAccess::Read, Sharing::ForceShare);
    if target.is_ok_and(|target| target.identity().is_some() && target.identity() == file.identity()) {
        let error = Error::new(ErrorKind::Refused, "the increment is the target itself").with_path(&args.target);
        return Err(error.with_hint("name the disk that it is to be applied to").into());
    }
    Ok(())
}

fn options(context: &Context, args: &ApplyArgs) -> ApplyOptions {
    ApplyOptions { unknown_base: context.global.force, resume: args.resume }
}

/// Names the target in an error about it, and in a hint what is to be resized; an error about the increment names that.
fn name(args: &ApplyArgs, error: Error) -> Error {
    let hint = error.hint().map(|hint| hint.replace("TARGET", &show::path(&args.target)));
    let path = match error.kind() {
        ErrorKind::Corrupt | ErrorKind::Truncated | ErrorKind::Unsupported => &args.file,
        ErrorKind::Io if error.message().starts_with("cannot read the increment") => &args.file,
        _ => &args.target,
    };
    let error = error.with_path(path);
    match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    }
}

fn plan<'a>(
    context: &Context,
    args: &ApplyArgs,
    file: &'a FileStorage,
    target: ApplyTarget<'a>,
) -> Result<ApplyPlan<'a>, Failure> {
    let bar = Bar::new("checking", &context.ui, &context.interrupt);
    Ok(plan_apply(file, target, &options(context, args), &bar).map_err(|error| name(args, error))?)
}

fn apply_to_image(context: &Context, args: &ApplyArgs, file: &FileStorage) -> Result<Answer, Failure> {
    let session = Session::open(context, &args.target, &args.writing)?;
    let image: &Image = &session.image;
    let plan = plan(context, args, file, ApplyTarget::Image(image))?;
    if args.dry_run {
        // Also what would be refused for the sake of children is worth knowing.
        report(context, args, &plan, Value::Null, "")?;
    }
    if plan.basis() != Basis::Done && !args.break_children {
        let bar = Bar::new("looking for children", &context.ui, &context.interrupt);
        let children = refuse_to_break(session.layer()?, &args.child, &bar)?;
        for error in children.unknown {
            let what = format!("whether it is a child of the target cannot be known: {}", error.message());
            context.ui.warn(error.path(), &what);
        }
    }
    if args.dry_run {
        return Ok(Answer::Yes);
    }
    let written = AtomicU64::new(0);
    let bar = Bar::new("applying", &context.ui, &context.interrupt);
    let worked = plan.run(&written, &bar).map_err(|error| name(args, error));
    drop(bar);
    session.finish(worked, "applied", written.load(Ordering::Relaxed))?;
    verify(context, args, &plan)?;
    report(context, args, &plan, session.replayed_json(), &session.replayed_text())?;
    Ok(Answer::Yes)
}

fn apply_to_raw(context: &Context, args: &ApplyArgs, file: &FileStorage) -> Result<Answer, Failure> {
    let path: &Path = &args.target;
    let opened = if is_block_device(path) && context.global.force && !args.dry_run {
        FileStorage::open_block_target(path)?
    } else {
        // Without --force it is refused in any case, as it has no identity.
        let writes = context.global.force && !args.dry_run;
        let access = if writes { FileAccess::Write } else { FileAccess::Read };
        FileStorage::open(path, access, Sharing::Normal)?
    };
    if let Some(note) = &opened.lock_report().note {
        context.ui.warn(None, note);
    }
    let storage: Arc<dyn Storage> = Arc::new(opened);
    let plan = plan(context, args, file, ApplyTarget::Raw(&storage))?;
    if !args.dry_run {
        let written = AtomicU64::new(0);
        let bar = Bar::new("applying", &context.ui, &context.interrupt);
        if let Err(error) = plan.run(&written, &bar) {
            let done = Done { verb: "applied", bytes: written.load(Ordering::Relaxed), closed: false };
            return Err(Failure::Cut { error: name(args, error), done });
        }
        drop(bar);
        verify(context, args, &plan)?;
    }
    report(context, args, &plan, Value::Null, "")?;
    Ok(Answer::Yes)
}

fn verify(context: &Context, args: &ApplyArgs, plan: &ApplyPlan<'_>) -> Result<(), Failure> {
    if args.verify && plan.basis() != Basis::Done {
        let bar = Bar::new("verifying", &context.ui, &context.interrupt);
        plan.verify(&bar).map_err(|error| error.with_path(&args.target))?;
    }
    Ok(())
}

fn report(
    context: &Context,
    args: &ApplyArgs,
    plan: &ApplyPlan<'_>,
    replay: Value,
    replayed: &str,
) -> Result<(), Failure> {
    let summary = plan.summary();
    let (header, totals) = (&summary.header, &summary.totals);
    let target = show::path(&args.target);
    if context.ui.json {
        let side = |side: &vhdkit::format::increment::Side| {
            json!({
                "data_write_guid": side.data_write_guid.map(|guid| guid.to_string()),
                "disk_id": side.disk_id.map(|guid| guid.to_string()),
                "disk_size": side.size,
            })
        };
        return Ui::print_json(&json!({
            "file": show::path(&args.file),
            "target": target,
            "dry_run": args.dry_run,
            "basis": plan.basis().as_str(),
            "applied": !args.dry_run && plan.basis() != Basis::Done,
            "becomes_result": plan.becomes_result(),
            "verified": args.verify && plan.basis() != Basis::Done,
            "records": totals.records,
            "data_bytes": totals.data_bytes,
            "zero_bytes": totals.zero_bytes,
            "base": side(&header.base),
            "result": side(&header.result),
            "replay": replay,
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    let why = match plan.basis() {
        Basis::Identity => "known by its data write GUID",
        Basis::Begun => "an apply of this file was begun, and goes on",
        Basis::Done => {
            writeln!(out, "{target}: the increment is in it already; nothing was changed")?;
            return Ok(out.flush()?);
        }
        Basis::Contents => "not known by its identity; what is replaced is right",
        Basis::Nothing => "not known to be the base",
    };
    let mut amount = format!("{} of data", sizes::short(totals.data_bytes));
    if totals.zero_bytes > 0 {
        amount.push_str(&format!(" and {} of zeros", sizes::short(totals.zero_bytes)));
    }
    if args.dry_run {
        writeln!(out, "{target}: {amount} would be applied ({why}); nothing was changed")?;
    } else {
        let verified = if args.verify { ", and verified" } else { "" };
        writeln!(out, "{target}: {amount} applied ({why}){verified}{}", escape(replayed))?;
    }
    let is_known = matches!(plan.basis(), Basis::Identity | Basis::Begun);
    if is_known && !plan.becomes_result() {
        let what =
            "it has another disk identity or physical sector size than the newer disk, and so an identity of its own";
        writeln!(out, "{what}: increments that follow need --force")?;
    }
    Ok(out.flush()?)
}
