//! `reparent`: where a child's parent is.

use std::io::Write as _;

use serde_json::json;
use vhdkit::image::OpenOptions;
use vhdkit::ops::reparent::{ReparentOptions, ReparentReport, reparent};

use crate::args::ReparentArgs;
use crate::cli::Context;
use crate::commands::create::relative_windows_path;
use crate::commands::dependents;
use crate::failure::{Answer, Failure};
use crate::opening::{open_image, sharing};
use crate::show;
use crate::ui::Ui;
use crate::writing::Session;

/// Writes the way to the parent.
pub(crate) fn run(context: &Context, args: &ReparentArgs) -> Result<Answer, Failure> {
    let parent = open_image(context, &args.parent_image)?;
    let options = ReparentOptions {
        relative_path: relative_windows_path(&args.child_image, &args.parent_image)?,
        absolute_path: None,
        ignore_id_mismatch: args.ignore_id_mismatch,
        dry_run: args.dry_run,
    };
    let name = |error: vhdkit::Error| error.with_path(&args.child_image);
    let child = || {
        let options = OpenOptions::new().sharing(sharing(&context.global)).without_parents();
        options.open_path(&args.child_image)
    };
    crate::commands::info::refuse_raw(context, &args.child_image, args.writing.from.from)?;
    // What would happen, before anything does.
    let looked_at = child()?;
    let plan = reparent(child()?, &parent, &ReparentOptions { dry_run: true, ..options.clone() }).map_err(name)?;
    let children = match looked_at.layers().first() {
        Some(layer) if plan.mismatch => dependents::refuse(context, layer, &args.children),
        _ => Ok(()),
    };
    drop(looked_at);
    if args.dry_run || children.is_ok() && plan.changes.is_empty() {
        report(context, args, &plan)?;
        children?;
        return Ok(Answer::Yes);
    }
    children?;
    let session = Session::open_alone(context, &args.child_image, &args.writing)?;
    let (image, aftermath) = session.into_parts()?;
    let done = aftermath.name(reparent(image, &parent, &options))?;
    report(context, args, &done)?;
    Ok(Answer::Yes)
}

fn report(context: &Context, args: &ReparentArgs, done: &ReparentReport) -> Result<(), Failure> {
    let (child, parent) = (show::path(&args.child_image), show::path(&args.parent_image));
    if context.ui.json {
        return Ui::print_json(&json!({
            "child": child,
            "parent": parent,
            "dry_run": args.dry_run,
            "changes": done.changes,
            "id_mismatch": done.mismatch,
        }));
    }
    if done.mismatch {
        let what = "the parent is not the disk that the child was made on; check what the disk holds before it is used";
        context.ui.warn(Some(&args.child_image), what);
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    match (done.changes.is_empty(), args.dry_run) {
        (true, _) => writeln!(out, "{child}: its parent is {parent} already; nothing was changed")?,
        (false, true) => writeln!(out, "{child}: its parent would be {parent}; nothing was changed")?,
        (false, false) => writeln!(out, "{child}: its parent is {parent} now")?,
    }
    for change in &done.changes {
        writeln!(out, "  {change}")?;
    }
    Ok(out.flush()?)
}
