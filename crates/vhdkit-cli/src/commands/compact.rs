//! `compact`: a smaller file for the same disk.

use std::io::Write as _;

use serde_json::{Value, json};
use vhdkit::image::Image;
use vhdkit::ops::compact::{CompactOptions, CompactReport, compact_as_planned};

use crate::args::CompactArgs;
use crate::cli::Context;
use crate::commands::dependents;
use crate::failure::{Answer, Failure};
use crate::opening::open_image;
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::{Session, refuse_dirty};

/// Compacts.
pub(crate) fn run(context: &Context, args: &CompactArgs) -> Result<Answer, Failure> {
    if args.dry_run {
        crate::commands::info::refuse_raw(context, &args.image, args.writing.from.from)?;
        let image = open_image(context, &args.image)?;
        let options = options(context, args, &image)?;
        let refusal = refuse_dirty(&image, &args.image, &args.writing);
        let bar = Bar::new("looking", &context.ui, &context.interrupt);
        let mut plan = None;
        let found = compact_as_planned(image, &options, &mut |expected| plan = Some(expected.clone()), &bar);
        drop(bar);
        // Also what would be refused is worth knowing.
        if let Some(plan) = plan {
            report(context, args, &plan, Value::Null, "")?;
        }
        found.map_err(|error| error.with_path(&args.image))?;
        refusal?;
        return Ok(Answer::Yes);
    }
    let session = Session::open(context, &args.image, &args.writing)?;
    let options = options(context, args, &session.image)?;
    let (image, aftermath) = session.into_parts()?;
    let bar = Bar::new("compacting", &context.ui, &context.interrupt);
    let mut said = Ok(());
    let worked = compact_as_planned(image, &options, &mut |plan| said = say_beforehand(context, args, plan), &bar);
    drop(bar);
    said?;
    let done = aftermath.name(worked)?;
    report(context, args, &done, aftermath.replayed_json(), &aftermath.replayed_text())?;
    Ok(Answer::Yes)
}

/// What is about to be gained.
fn say_beforehand(context: &Context, args: &CompactArgs, plan: &CompactReport) -> Result<(), Failure> {
    if context.ui.json || context.ui.quiet || plan.new_file_size >= plan.old_file_size {
        return Ok(());
    }
    let [old, new] = [plan.old_file_size, plan.new_file_size].map(sizes::short);
    let mut out = context.ui.out();
    writeln!(out, "{}: the file of {old} will have about {new}", show::path(&args.image))?;
    Ok(out.flush()?)
}

fn options(context: &Context, args: &CompactArgs, image: &Image) -> Result<CompactOptions, Failure> {
    let children = match image.layers().first() {
        Some(layer) if !args.no_filesystems => dependents::broken_by_writing(context, layer, &args.children)?,
        _ => Vec::new(),
    };
    Ok(CompactOptions {
        zero_scan: !args.no_zero_scan,
        filesystems: !args.no_filesystems,
        children,
        break_children: args.children.break_children,
        dry_run: args.dry_run,
    })
}

fn report(
    context: &Context,
    args: &CompactArgs,
    done: &CompactReport,
    replay: Value,
    replayed: &str,
) -> Result<(), Failure> {
    let file = show::path(&args.image);
    if context.ui.json {
        return Ui::print_json(&json!({
            "file": file,
            "dry_run": args.dry_run,
            "old_file_size": done.old_file_size,
            "new_file_size": done.new_file_size,
            "old_disk_usage": done.disk_usage[0],
            "new_disk_usage": done.disk_usage[1],
            "block_size": done.block_size,
            "blocks": done.blocks,
            "zero_blocks": done.zero_blocks,
            "free_blocks": done.free_blocks,
            "unneeded_blocks": done.unneeded_blocks,
            "bitmaps": done.bitmaps,
            "moved": if args.dry_run { Value::Null } else { json!(done.moved) },
            "regions_moved": done.regions_moved,
            "bytes_read": done.bytes_read,
            "remarks": done.remarks,
            "replay": replay,
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    let (old, new) = (done.old_file_size, done.new_file_size);
    let gain = sizes::short(old.saturating_sub(new));
    if args.dry_run {
        let (old, new) = (sizes::short(old), sizes::short(new));
        writeln!(out, "{file}: the file of {old} would have about {new}, {gain} less; nothing was changed")?;
    } else if old == new && done.zero_blocks + done.free_blocks + done.unneeded_blocks + done.moved > 0 {
        writeln!(out, "{file}: the file still has {}, with more free space in it{replayed}", sizes::short(old))?;
    } else if old == new {
        writeln!(out, "{file}: the file has {} and cannot be made smaller{replayed}", sizes::short(old))?;
    } else {
        let (old, new) = (sizes::short(old), sizes::short(new));
        writeln!(out, "{file}: the file of {old} has {new} now, {gain} less{replayed}")?;
    }
    if let [Some(before), Some(after)] = done.disk_usage {
        writeln!(out, "  on its file system: {}, before {}", sizes::short(after), sizes::short(before))?;
    }
    let block = sizes::short(done.block_size);
    let moved = if args.dry_run { String::new() } else { format!("; {} moved", done.moved) };
    writeln!(
        out,
        "  of {} blocks of {block}: {} all zero, {} free in file systems, {} without contents{moved}",
        done.blocks, done.zero_blocks, done.free_blocks, done.unneeded_blocks
    )?;
    for remark in &done.remarks {
        writeln!(out, "  {remark}")?;
    }
    Ok(out.flush()?)
}
