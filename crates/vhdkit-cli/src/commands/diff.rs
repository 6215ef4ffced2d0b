//! `diff`: what changed between two disks, or between a child and its parent.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhdkit::format::increment::Side;
use vhdkit::image::{BlockDevice, LayerDisk};
use vhdkit::ops::diff::{
    ChangedBy, DiffOptions, DiffReport, DiffTotals, ExportOptions, ExportReport, diff, export, share_a_file,
    side_of_image, side_of_raw,
};
use vhdkit::storage::{Storage, StorageIdentity};
use vhdkit::{Error, ErrorKind};

use crate::args::{DiffArgs, Format};
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::{Wanted, is_block_device, is_standard_stream};
use crate::opening::{Disk, DiskRequest, open_disk};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::target::Target;
use crate::ui::{FAINT, Ui, raw_stdout};

/// Ranges in the table for people.
const ROWS_MAX: usize = 20;
/// Ranges that are listed for scripts, and with --all.
const LISTED_MAX: usize = 1 << 16;
const ALL_MAX: usize = 1 << 22;

/// One of the two disks.
struct Operand {
    device: Arc<dyn BlockDevice>,
    side: Side,
    name: String,
    files: Vec<StorageIdentity>,
}

/// Compares, and exports where that is asked for.
pub(crate) fn run(context: &Context, args: &DiffArgs) -> Result<Answer, Failure> {
    check_export(context, args)?;
    let (a, b) = match &args.b {
        Some(path) => {
            let a = open(context, &args.a, args.from_a, "--from-a")?;
            let b = open(context, path, args.from_b, "--from-b")?;
            (whole(&a, &args.a), whole(&b, path))
        }
        None => child_and_parent(context, args)?,
    };
    let shared = share_a_file(a.device.as_ref(), b.device.as_ref());
    let by = if shared && !args.exact { ChangedBy::Allocation } else { ChangedBy::Contents };
    let totals = match &args.export {
        Some(target) => {
            let report = export_to(context, args, target, (&a, &b), by)?;
            if !is_standard_stream(target) {
                report_export(context, target, (&a, &b), by, &report)?;
            }
            report.changes
        }
        None => {
            let bar = Bar::new("comparing", &context.ui, &context.interrupt);
            let ranges_max = if args.all { ALL_MAX } else { LISTED_MAX };
            let report = diff(a.device.as_ref(), b.device.as_ref(), &DiffOptions { by, ranges_max }, &bar)?;
            drop(bar);
            report_diff(context, args, (&a, &b), by, &report)?;
            report.totals
        }
    };
    let is_equal = totals.ranges == 0 && a.device.size() == b.device.size();
    Ok(if args.exit_code && !is_equal { Answer::No } else { Answer::Yes })
}

fn check_export(context: &Context, args: &DiffArgs) -> Result<(), Failure> {
    let Some(target) = &args.export else { return Ok(()) };
    if context.global.force_share {
        return Err(Failure::usage(
            "an image that is being written keeps its identity while its contents change: an increment of it would not \
             tell which state of it is meant",
            "leave --force-share out, and close the program that uses the image",
        ));
    }
    if is_standard_stream(target) && context.ui.json {
        return Err(Failure::usage(
            "--json and --export - both want standard output",
            "leave one of them out, or name a file for the increment",
        ));
    }
    if is_standard_stream(target) && Ui::out_is_terminal() && !context.global.force {
        return Err(Failure::usage(
            "the bytes of an increment are not for a terminal",
            "send them to a file or a pipe, or say --force",
        ));
    }
    if is_block_device(target) {
        return Err(Failure::usage("an increment is a file, and not for a block device", "name a file for it"));
    }
    Ok(())
}

fn open(context: &Context, path: &Path, format: Option<Format>, option: &str) -> Result<Disk, Failure> {
    open_disk(context, DiskRequest { path, format, wanted: Wanted::Source, option, raw_sector: 512 })
}

fn whole(disk: &Disk, path: &Path) -> Operand {
    let device = disk.device.as_ref();
    let layer = disk.image.as_ref().and_then(|image| image.layers().first());
    let side = layer.map_or_else(|| side_of_raw(device), |layer| side_of_image(device, layer));
    Operand { device: Arc::clone(&disk.device), side, name: show::path(path), files: disk.identities() }
}

/// The disk as it was beneath an image, and the image.
fn child_and_parent(context: &Context, args: &DiffArgs) -> Result<(Operand, Operand), Failure> {
    let disk = open_disk(
        context,
        DiskRequest { path: &args.a, format: args.from_a, wanted: Wanted::Image, option: "--from-a", raw_sector: 512 },
    )?;
    let layers = usize::from(args.layers.unwrap_or(1));
    let Some(image) = disk.image.as_ref().filter(|image| image.layers().len() > layers) else {
        let count = disk.image.as_ref().map_or(0, |image| image.layers().len().saturating_sub(1));
        let what = match (&disk.image, count) {
            (Some(image), 0) if image.parents_missing() => "the image was opened without its parent".to_owned(),
            (_, 0) => "the disk has no parent to compare it with".to_owned(),
            _ => format!("the image has {count} ancestors, fewer than {layers}"),
        };
        let error = Error::new(ErrorKind::InvalidArgument, what).with_path(&args.a);
        return Err(error.with_hint("name two disks, or a child with its parents in reach").into());
    };
    let beneath = LayerDisk::with_parents(Arc::clone(image), layers)?;
    let side = side_of_image(&beneath, beneath.layer()?);
    let name = beneath.layer()?.path().map_or_else(|| "(memory)".to_owned(), show::path);
    let base = Operand { device: Arc::new(beneath), side, name, files: disk.identities() };
    Ok((base, whole(&disk, &args.a)))
}

/// Bytes into a storage, from front to back.
struct Appending {
    storage: Arc<dyn Storage>,
    offset: u64,
}

impl Write for Appending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.storage.write_at(bytes, self.offset)?;
        self.offset = self.offset.saturating_add(bytes.len() as u64); // no file is that long
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn export_to(
    context: &Context,
    args: &DiffArgs,
    target: &Path,
    (a, b): (&Operand, &Operand),
    by: ChangedBy,
) -> Result<ExportReport, Failure> {
    let options = ExportOptions { by, base_checksums: !args.no_base_checksums, id: None };
    let run = |out: &mut dyn Write| {
        let bar = Bar::new("exporting", &context.ui, &context.interrupt);
        export((a.device.as_ref(), a.side), (b.device.as_ref(), b.side), out, &options, &bar)
    };
    if is_standard_stream(target) {
        let mut out: BufWriter<File> = BufWriter::new(raw_stdout()?);
        return Ok(run(&mut out)?);
    }
    let file = Target::open(context, target, [a.files.as_slice(), &b.files].concat())?;
    let appending = Appending { storage: file.storage(), offset: 0 };
    let report = run(&mut BufWriter::with_capacity(1 << 20, appending)).map_err(|error| error.with_path(target))?;
    file.commit(true)?;
    Ok(report)
}

const fn by_name(by: ChangedBy) -> &'static str {
    match by {
        ChangedBy::Allocation => "allocation",
        ChangedBy::Contents => "contents",
    }
}

fn operands_json(a: &Operand, b: &Operand, by: ChangedBy, totals: &DiffTotals) -> serde_json::Map<String, Value> {
    let value = json!({
        "a": a.name,
        "b": b.name,
        "by": by_name(by),
        "equal": totals.ranges == 0 && a.device.size() == b.device.size(),
        "size_a": a.device.size(),
        "size_b": b.device.size(),
        "changed_ranges": totals.ranges,
        "changed_bytes": totals.changed_bytes,
        "zeroed_bytes": totals.zeroed_bytes,
        "bytes_read_a": totals.bytes_read[0],
        "bytes_read_b": totals.bytes_read[1],
    });
    match value {
        Value::Object(object) => object,
        _ => serde_json::Map::new(),
    }
}

fn report_diff(
    context: &Context,
    args: &DiffArgs,
    (a, b): (&Operand, &Operand),
    by: ChangedBy,
    report: &DiffReport,
) -> Result<(), Failure> {
    if context.ui.json {
        let mut object = operands_json(a, b, by, &report.totals);
        let row = |change: &vhdkit::ops::diff::Change| {
            let length = change.range.end - change.range.start; // ranges are not empty
            json!({ "start": change.range.start, "length": length, "zero": change.zero })
        };
        object.insert("ranges".to_owned(), report.ranges.iter().map(row).collect());
        object.insert("ranges_complete".to_owned(), (report.ranges.len() as u64 == report.totals.ranges).into());
        return Ui::print_json(&Value::Object(object));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    write_summary(&mut out, (a, b), by, &report.totals)?;
    let rows = if args.all { report.ranges.len() } else { ROWS_MAX };
    if !report.ranges.is_empty() {
        writeln!(out, "\n{:>20} {:>20}", "offset", "bytes")?;
    }
    for change in report.ranges.iter().take(rows) {
        let length = change.range.end - change.range.start; // ranges are not empty
        let zero = if change.zero { "  zero" } else { "" };
        writeln!(out, "{:>20} {length:>20}{zero}", change.range.start)?;
    }
    let listed = rows.min(report.ranges.len()) as u64;
    let left = report.totals.ranges.saturating_sub(listed);
    if left > 0 {
        let way = if args.all { "" } else { "; --all lists them" };
        writeln!(out, "{FAINT}and {left} more{way}{FAINT:#}")?;
    }
    Ok(out.flush()?)
}

fn write_summary(
    out: &mut dyn Write,
    (a, b): (&Operand, &Operand),
    by: ChangedBy,
    totals: &DiffTotals,
) -> io::Result<()> {
    let how = match by {
        ChangedBy::Allocation => "by what is allocated; --exact compares contents",
        ChangedBy::Contents => "by contents",
    };
    if totals.ranges == 0 {
        writeln!(out, "{} to {}: nothing changed ({how})", a.name, b.name)?;
    } else {
        let ranges = if totals.ranges == 1 { "1 range".to_owned() } else { format!("{} ranges", totals.ranges) };
        let zeroed = match totals.zeroed_bytes {
            0 => String::new(),
            bytes => format!(", {} of it zero now", sizes::short(bytes)),
        };
        let changed = sizes::long(totals.changed_bytes);
        writeln!(out, "{} to {}: {changed} changed in {ranges}{zeroed} ({how})", a.name, b.name)?;
    }
    let (size_a, size_b) = (a.device.size(), b.device.size());
    if size_a != size_b {
        writeln!(out, "the size changed from {} to {}", sizes::long(size_a), sizes::long(size_b))?;
    }
    Ok(())
}

fn report_export(
    context: &Context,
    target: &Path,
    (a, b): (&Operand, &Operand),
    by: ChangedBy,
    report: &ExportReport,
) -> Result<(), Failure> {
    if context.ui.json {
        let mut object = operands_json(a, b, by, &report.changes);
        object.insert(
            "export".to_owned(),
            json!({
                "file": show::path(target),
                "file_bytes": report.file_bytes,
                "id": report.header.id.to_string(),
                "records": report.totals.records,
                "data_bytes": report.totals.data_bytes,
                "zero_bytes": report.totals.zero_bytes,
                "base_checksums": report.header.has_base_checksums,
            }),
        );
        return Ui::print_json(&Value::Object(object));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    write_summary(&mut out, (a, b), by, &report.changes)?;
    let (data, zero) = (sizes::short(report.totals.data_bytes), sizes::short(report.totals.zero_bytes));
    let (file, bytes) = (show::path(target), sizes::short(report.file_bytes));
    writeln!(out, "{file}: {bytes}, with {data} of data and {zero} of zeros")?;
    Ok(out.flush()?)
}
