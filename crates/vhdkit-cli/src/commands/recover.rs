//! `recover`: a new image of what is left of a broken one.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhdkit::image::{BlockDevice, Image};
use vhdkit::ops::recover::{Certainty, RecoverOptions, RecoverReport, recover};
use vhdkit::storage::{FileAccess, FileStorage, MemoryStorage, Storage, StorageIdentity};
use vhdkit::text::escape;
use vhdkit::{Error, ErrorKind};

use super::info::refuse_raw;
use crate::args_mending::RecoverArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::{is_raw_name, is_standard_stream};
use crate::opening::{check_parent_options, open_options, sharing, warn_about};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::target::Target;
use crate::ui::{BAD, DOUBTFUL, GOOD, Ui};

/// Columns of the names of parts.
const NAME_WIDTH: usize = 14;

/// Recovers.
pub(crate) fn run(context: &Context, args: &RecoverArgs) -> Result<Answer, Failure> {
    refuse_raw(context, &args.image, args.from.from)?;
    if is_standard_stream(&args.target) {
        return Err(Failure::usage(
            "what is recovered is written to a file, in no order",
            "name one (for a file of this name, ./-)",
        ));
    }
    if is_raw_name(&args.target) {
        let what =
            format!("what is recovered becomes a VHDX, and {} is the name of a raw disk", show::path(&args.target));
        return Err(Failure::usage(what, "name it .vhdx; `vhdkit convert` makes a raw disk of it afterwards"));
    }
    check_parent_options(&context.global)?;
    let storage = FileStorage::open(&args.image, FileAccess::Read, sharing(&context.global))?;
    if let Some(note) = &storage.lock_report().note {
        context.ui.warn(None, note);
    }
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let parent = open_parent(context)?;
    let options = RecoverOptions {
        block_size: args.block_size.map(|size| small(size, "--block-size")).transpose()?,
        disk_size: args.size,
        logical_sector_size: args.sector_size.map(|size| small(size, "--sector-size")).transpose()?,
        parent: parent.as_ref().map(|parent| parent as &dyn BlockDevice),
        parent_guid: parent
            .as_ref()
            .and_then(|parent| parent.layers().first())
            .map(|layer| layer.headers().current.data_write_guid),
        dry_run: args.dry_run,
    };
    if args.dry_run {
        let bar = Bar::new("looking", &context.ui, &context.interrupt);
        let nowhere: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let report = recover(&storage, Some(&args.image), &nowhere, &options, &bar);
        drop(bar);
        let report = report.map_err(|error| error.with_path(&args.image))?;
        print(context, args, &report)?;
        return Ok(if report.is_certain() { Answer::Yes } else { Answer::No });
    }
    let sources: Vec<StorageIdentity> = storage.identity().into_iter().chain(identities(parent.as_ref())).collect();
    let target = Target::open(context, &args.target, sources)?;
    let bar = Bar::new("recovering", &context.ui, &context.interrupt);
    let report = recover(&storage, Some(&args.image), &target.storage(), &options, &bar);
    drop(bar);
    let report = report.map_err(|error| error.with_path(&args.image))?;
    target.commit(!args.no_sync)?;
    print(context, args, &report)?;
    Ok(if report.is_certain() { Answer::Yes } else { Answer::No })
}

/// Sizes of blocks and sectors; the library knows which ones are possible.
fn small(size: u64, option: &str) -> Result<u32, Failure> {
    u32::try_from(size).map_err(|_| Failure::usage(format!("{option} is too large"), "see --help for what is possible"))
}

/// The parent that the user names, with its own parents.
fn open_parent(context: &Context) -> Result<Option<Image>, Failure> {
    let mut named = context.global.parent.iter().map(AsRef::as_ref);
    let Some(nearest) = named.next() else { return Ok(None) };
    let parent =
        open_options(&context.global, named)?.open_path(nearest).map_err(|error: Error| match error.kind() {
            ErrorKind::Io => error.with_hint("check the spelling after --parent"),
            _ => error,
        })?;
    warn_about(context, &parent);
    Ok(Some(parent))
}

fn identities(parent: Option<&Image>) -> Vec<StorageIdentity> {
    let layers = parent.map(Image::layers).unwrap_or_default();
    layers.iter().filter_map(|layer| layer.storage().identity()).collect()
}

fn print(context: &Context, args: &RecoverArgs, report: &RecoverReport) -> Result<(), Failure> {
    if context.ui.json {
        return Ui::print_json(&to_json(args, report));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    write(&mut out, &args.target, report)?;
    Ok(out.flush()?)
}

fn to_json(args: &RecoverArgs, report: &RecoverReport) -> Value {
    let parts = report
        .parts
        .iter()
        .map(|part| json!({ "part": part.name, "certainty": part.certainty.as_str(), "detail": escape(&part.detail) }));
    let unplaced =
        report.unplaced.iter().map(|range| json!({ "start": range.start, "length": range.end - range.start }));
    json!({
        "file": show::path(&args.image),
        "target": show::path(&args.target),
        "dry_run": args.dry_run,
        "certain": report.is_certain(),
        "parts": parts.collect::<Vec<_>>(),
        "disk_size": report.disk_size,
        "block_size": report.block_size,
        "logical_sector_size": report.logical_sector_size,
        "blocks_certain": report.blocks_certain,
        "blocks_guessed": report.blocks_guessed,
        "blocks_lost": report.blocks_lost,
        "lost": report.lost,
        "bytes_unplaced": report.bytes_unplaced,
        "unplaced": unplaced.collect::<Vec<_>>(),
        "without_parent": report.without_parent,
        "recognised": report.recognised,
        "file_size": report.file_size,
    })
}

fn write(out: &mut dyn Write, target: &Path, report: &RecoverReport) -> io::Result<()> {
    for part in &report.parts {
        let style = match part.certainty {
            Certainty::Certain => GOOD,
            Certainty::Guessed => DOUBTFUL,
            Certainty::Lost => BAD,
        };
        let name = format!("{}:", part.name);
        writeln!(out, "{name:<NAME_WIDTH$} {style}{}{style:#}, {}", part.certainty.as_str(), escape(&part.detail))?;
    }
    let mut line = |name: &str, text: String| {
        let name = format!("{name}:");
        writeln!(out, "{name:<NAME_WIDTH$} {text}")
    };
    let RecoverReport { blocks_certain, blocks_guessed, blocks_lost, .. } = report;
    let blocks = format!("{blocks_certain} certain, {blocks_guessed} guessed, {blocks_lost} lost");
    line("blocks", format!("{blocks} (of {})", sizes::short(report.block_size)))?;
    if !report.lost.is_empty() {
        let named: Vec<String> = report.lost.iter().take(16).map(u64::to_string).collect();
        let more = if report.lost.len() > named.len() { ", ..." } else { "" };
        line("lost blocks", format!("{}{more}", named.join(", ")))?;
    }
    if report.bytes_unplaced > 0 {
        let first = report.unplaced.first().map_or(0, |range| range.start);
        let bytes = sizes::short(report.bytes_unplaced);
        line(
            "unplaced",
            format!("{bytes} of data that no entry of the disk leads to, from {first:#x} of the file on"),
        )?;
    }
    if !report.recognised.is_empty() {
        line("recognised", escape(&report.recognised.join(", ")).into_owned())?;
    }
    if report.without_parent {
        line("parent", "none given: what only the parent has reads as zeros (--parent FILE)".to_owned())?;
    }
    let verdict = if report.is_certain() {
        format!("{GOOD}everything is certain{GOOD:#}")
    } else {
        format!(
            "{DOUBTFUL}something is guessed or lost{DOUBTFUL:#}: check the file systems on it before you rely on them"
        )
    };
    writeln!(out, "{}: disk of {}, {verdict}", show::path(target), sizes::short(report.disk_size))
}
