//! `convert`: between raw and VHDX, or to another layout.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use vhdkit::image::{BlockDevice, OpenOptions};
use vhdkit::ops::compare::compare;
use vhdkit::ops::convert::{ConvertOptions, ConvertReport, Destination, Source, convert};
use vhdkit::ops::create::CreateOptions;
use vhdkit::storage::{NewFile, NewFileOptions, Storage};
use vhdkit::{Error, ErrorKind};

use super::layout;
use crate::args::{ConvertArgs, Format};
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::{Wanted, is_block_device, is_standard_stream, target_format};
use crate::opening::{Disk, DiskRequest, NamedRawDisk, open_disk};
use crate::progress::Bar;
use crate::show;
use crate::signals::Stdin;
use crate::sizes;
use crate::target::Target;
use crate::ui::{self, Ui};

/// What is to be done, with every contradiction resolved.
#[derive(Debug)]
struct Plan<'a> {
    source: &'a Path,
    from: Option<Format>,
    target: &'a Path,
    to: Format,
    layout: CreateOptions,
    raw_sector: u32,
    size: Option<u64>,
    options: ConvertOptions,
    sync: bool,
    verify: bool,
}

impl Plan<'_> {
    fn reads_stdin(&self) -> bool {
        is_standard_stream(self.source)
    }

    fn writes_stdout(&self) -> bool {
        is_standard_stream(self.target)
    }
}

/// Converts.
pub(crate) fn run(context: &Context, args: &ConvertArgs) -> Result<Answer, Failure> {
    let plan = plan(args)?;
    if plan.writes_stdout() {
        return to_stdout(context, &plan);
    }
    let source = open_source(context, &plan)?;
    let sources = source.as_ref().map(Disk::identities).unwrap_or_default();
    let target = Target::open(context, plan.target, sources)?;
    let storage = target.storage();
    let spill = spill(&plan)?;
    let spill_storage: Option<Arc<dyn Storage>> = spill.as_ref().map(|file| file.storage() as Arc<dyn Storage>);
    let destination = match plan.to {
        Format::Raw => Destination::Raw { storage: &storage },
        Format::Vhdx => Destination::Vhdx { storage: &storage, layout: &plan.layout, spill: spill_storage.as_ref() },
    };
    let report = transfer(context, &plan, source.as_ref(), destination)?;
    if plan.verify
        && let Some(source) = &source
    {
        verify(context, &plan, source, &storage)?;
    }
    target.commit(plan.sync)?;
    print_report(context, &plan, &report)?;
    Ok(Answer::Yes)
}

/// Resolves the arguments.
fn plan(args: &ConvertArgs) -> Result<Plan<'_>, Failure> {
    let to = target_format(&args.target, args.to)?;
    let (stdin, stdout) = (is_standard_stream(&args.source), is_standard_stream(&args.target));
    if stdin && args.from.from == Some(Format::Vhdx) {
        return Err(Failure::usage(
            "a VHDX cannot be read from standard input, since it is not read from front to back",
            "save it to a file first",
        ));
    }
    if let Some(option) = layout::first_given(&args.layout).filter(|_| to == Format::Raw) {
        return Err(Failure::usage(
            format!("{option} is about a VHDX, and the target is raw"),
            "leave it out, or say --to vhdx",
        ));
    }
    if args.verify && (stdin || stdout) {
        return Err(Failure::usage(
            "--verify reads source and target a second time, which standard input and output do not allow",
            "leave --verify out, or name files",
        ));
    }
    if args.size.is_some() && !stdin && to == Format::Raw {
        return Err(Failure::usage(
            "--size is for standard input, or for a VHDX that is to be larger than its source",
            "leave --size out",
        ));
    }
    let raw_sector = layout::raw_sector(&args.layout);
    // What a stream has is what was announced; the disk is padded to whole sectors, as that of a raw file is.
    let disk_size = args.size.map(|size| if stdin { padded(size, raw_sector) } else { size });
    Ok(Plan {
        source: &args.source,
        from: args.from.from,
        target: &args.target,
        to,
        layout: layout::options(&args.layout, disk_size)?,
        raw_sector,
        size: args.size,
        options: ConvertOptions { zero_scan: !args.no_zero_scan, ..ConvertOptions::default() },
        sync: !args.no_sync,
        verify: args.verify,
    })
}

/// The size in whole sectors, unless that is beyond all numbers.
fn padded(size: u64, sector: u32) -> u64 {
    size.checked_next_multiple_of(u64::from(sector)).unwrap_or(size)
}

/// The source, unless it is standard input.
fn open_source(context: &Context, plan: &Plan<'_>) -> Result<Option<Disk>, Failure> {
    if plan.reads_stdin() {
        return Ok(None);
    }
    let request = DiskRequest {
        path: plan.source,
        format: plan.from,
        wanted: Wanted::Source,
        option: "--from",
        raw_sector: plan.raw_sector,
    };
    open_disk(context, request).map(Some)
}

fn transfer(
    context: &Context,
    plan: &Plan<'_>,
    source: Option<&Disk>,
    destination: Destination<'_>,
) -> Result<ConvertReport, Failure> {
    let mut stdin = Stdin::new(&context.interrupt, context.ui);
    let from = match source {
        Some(disk) => Source::Disk(disk.device.as_ref()),
        None => Source::Stream { reader: &mut stdin, size: plan.size },
    };
    let bar = Bar::new("converting", &context.ui, &context.interrupt);
    let report = convert(from, destination, &plan.options, &bar);
    // What a source has to say names its file already.
    Ok(report.map_err(|error| if plan.writes_stdout() { error } else { about_target(plan.target, error) })?)
}

/// An error of writing the target. That a device is full means that it is too small.
fn about_target(target: &Path, error: Error) -> Error {
    let full = error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::StorageFull);
    if full && is_block_device(target) {
        let what = "the block device is too small for the disk; its beginning is overwritten";
        let error = Error::new(ErrorKind::Refused, what).with_path(target);
        return error.with_hint("choose a device that is large enough for the disk and its structures");
    }
    error.with_path(target)
}

/// A place for the table of a disk of unknown size. It has no name, and is gone with the process.
fn spill(plan: &Plan<'_>) -> Result<Option<NewFile>, Failure> {
    if !plan.reads_stdin() || plan.size.is_some() || plan.to == Format::Raw {
        return Ok(None);
    }
    let name = format!(".vhdkit-table-{}", std::process::id());
    let path: PathBuf =
        if is_block_device(plan.target) { std::env::temp_dir().join(name) } else { plan.target.with_file_name(name) };
    Ok(Some(NewFile::create(&path, NewFileOptions::default())?))
}

/// Sends the bytes of the disk to standard output.
fn to_stdout(context: &Context, plan: &Plan<'_>) -> Result<Answer, Failure> {
    if io::stdout().is_terminal() && !context.global.force {
        return Err(Failure::usage(
            "the bytes of a disk are not for a terminal",
            "send them to a file or a pipe, or say --force",
        ));
    }
    let source = open_source(context, plan)?;
    let mut out = ui::raw_stdout()?;
    let destination = Destination::Stream { writer: &mut out };
    let report = transfer(context, plan, source.as_ref(), destination)?;
    out.flush()?;
    warn_of_padding(context, &report);
    Ok(Answer::Yes)
}

fn warn_of_padding(context: &Context, report: &ConvertReport) {
    if report.padding > 0 {
        let padding = report.padding;
        context.ui.warn(None, &format!("the disk is padded with {padding} bytes of zeros to whole sectors"));
    }
}

/// Reads source and target again and compares them.
fn verify(context: &Context, plan: &Plan<'_>, source: &Disk, storage: &Arc<dyn Storage>) -> Result<(), Failure> {
    let made: Box<dyn BlockDevice> = match plan.to {
        // A device may be larger than the disk on it.
        Format::Raw => Box::new(NamedRawDisk::beginning(Arc::clone(storage), plan.target, source.device.size())?),
        Format::Vhdx => Box::new(OpenOptions::new().without_parents().open(Arc::clone(storage), Some(plan.target))?),
    };
    let bar = Bar::new("verifying", &context.ui, &context.interrupt);
    let Some(offset) = compare(source.device.as_ref(), made.as_ref(), &bar)?.first_difference else { return Ok(()) };
    let what = format!("source and target differ at offset {offset:#x}, so the target was given up");
    let error = Error::new(ErrorKind::Io, what).with_path(plan.target);
    Err(error.with_hint("make sure that nobody writes to the source, and check memory and disks").into())
}

fn print_report(context: &Context, plan: &Plan<'_>, report: &ConvertReport) -> Result<(), Failure> {
    warn_of_padding(context, report);
    if context.ui.json {
        return Ui::print_json(&json!({
            "source": show::path(plan.source),
            "target": show::path(plan.target),
            "format": if plan.to == Format::Raw { "raw" } else { "vhdx" },
            "source_size": report.source_size,
            "target_size": report.target_size,
            "padding": report.padding,
            "file_size": report.file_size,
            "bytes_read": report.bytes_read,
            "bytes_written": report.bytes_written,
            "bytes_cloned": report.bytes_cloned,
            "bytes_copied": report.bytes_copied,
            "bytes_skipped_zero": report.bytes_skipped_zero,
            "verified": plan.verify,
            "synced": plan.sync,
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let parts = [
        ("written", report.bytes_written),
        ("cloned", report.bytes_cloned),
        ("copied", report.bytes_copied),
        ("left out as zeros", report.bytes_skipped_zero),
    ];
    let mut text = format!("{}: disk of {}", show::path(plan.target), sizes::short(report.target_size));
    for (what, bytes) in parts.into_iter().filter(|(_, bytes)| *bytes > 0) {
        text = format!("{text}, {} {what}", sizes::short(bytes));
    }
    let verified = if plan.verify { ", verified" } else { "" };
    let mut out = context.ui.out();
    writeln!(out, "{text}{verified}")?;
    Ok(out.flush()?)
}
