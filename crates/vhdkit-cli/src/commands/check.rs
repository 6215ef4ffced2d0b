//! `check`: everything that is wrong with an image.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhdkit::Error;
use vhdkit::format::bat::PayloadState;
use vhdkit::format::finding::{Code, Severity, Strictness};
use vhdkit::ops::check::{CheckOptions, CheckReport, CheckSummary, check};
use vhdkit::storage::{FileAccess, FileStorage, Storage};
use vhdkit::text::escape;

use super::info::{finding_json, refuse_raw, replay_json};
use crate::args::CheckArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::opening::sharing;
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::{BAD, DOUBTFUL, FAINT, GOOD, HEADING, Ui};

/// Columns of the names in the statistics.
const NAME_WIDTH: usize = 27;

/// Checks the image and lists the findings.
pub(crate) fn run(context: &Context, args: &CheckArgs) -> Result<Answer, Failure> {
    refuse_raw(context, &args.image, args.from.from)?;
    let storage = FileStorage::open(&args.image, FileAccess::Read, sharing(&context.global))?;
    if let Some(note) = &storage.lock_report().note {
        context.ui.warn(None, note);
    }
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let strictness = if args.strict { Strictness::Strict } else { Strictness::Normal };
    let options = CheckOptions { strictness, ..CheckOptions::default() };
    let bar = Bar::new("checking", &context.ui, &context.interrupt);
    let report = check(&storage, Some(&args.image), &options, &bar).map_err(|error| error.with_path(&args.image))?;
    drop(bar);
    // What is no VHDX at all is nothing to judge; one whose first sector is damaged is.
    let foreign = report.findings.iter().find(|finding| finding.code() == Code::FileSignature);
    if let Some(finding) = foreign.filter(|_| !has_headers(storage.as_ref())) {
        return Err(Error::from_finding(finding).with_path(&args.image).into());
    }
    let clean = report.errors == 0 && (report.warnings == 0 || !args.strict);
    if context.ui.json {
        Ui::print_json(&to_json(&args.image, &report, clean))?;
    } else {
        let mut out = context.ui.out();
        write_report(&mut out, context, &args.image, &report, clean)?;
        out.flush()?;
    }
    Ok(if clean { Answer::Yes } else { Answer::No })
}

/// True when there is the signature of a header or of a region table where a VHDX has them.
fn has_headers(storage: &dyn Storage) -> bool {
    let places = [(0x1_0000, b"head"), (0x2_0000, b"head"), (0x3_0000, b"regi"), (0x4_0000, b"regi")];
    places.into_iter().any(|(offset, signature)| {
        let mut bytes = [0; 4];
        storage.read_at(&mut bytes, offset).is_ok() && bytes == *signature
    })
}

fn write_report(
    out: &mut dyn Write,
    context: &Context,
    path: &Path,
    report: &CheckReport,
    clean: bool,
) -> io::Result<()> {
    for finding in &report.findings {
        let style = match finding.severity() {
            Severity::Error => BAD,
            Severity::Warning => DOUBTFUL,
            Severity::Note if context.ui.quiet => continue,
            Severity::Note => FAINT,
        };
        let text = finding.to_string();
        writeln!(out, "{style}{}{style:#}: {} ({})", finding.severity().as_str(), escape(&text), finding.code())?;
        // What sends people to this very command is no next step here.
        let hint = finding.code().hint().filter(|hint| !hint.contains("`vhdkit check`"));
        if let Some(hint) = hint.filter(|_| finding.severity() == Severity::Error) {
            writeln!(out, "  hint: {hint}")?;
        }
    }
    let listed = report.findings.len() as u64;
    let all = report.errors.saturating_add(report.warnings).saturating_add(report.notes);
    if all > listed {
        writeln!(out, "... and {} more findings", all - listed)?;
    }
    if context.ui.quiet {
        return Ok(());
    }
    if let Some(summary) = &report.summary {
        if !report.findings.is_empty() {
            writeln!(out)?;
        }
        write_summary(out, summary)?;
        writeln!(out)?;
    }
    let (style, verdict) = if clean { (GOOD, "clean") } else { (BAD, "not clean") };
    let CheckReport { errors, warnings, notes, .. } = report;
    let counts = format!("{}, {}, {}", count(*errors, "error"), count(*warnings, "warning"), count(*notes, "note"));
    writeln!(out, "{}: {style}{verdict}{style:#} ({counts})", show::path(path))
}

fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn write_summary(out: &mut dyn Write, summary: &CheckSummary) -> io::Result<()> {
    let mut field = |name: &str, value: String| {
        let name = format!("{name}:");
        writeln!(out, "{name:<NAME_WIDTH$} {value}")
    };
    field("type", summary.disk_type.as_str().to_owned())?;
    field("disk size", sizes::long(summary.disk_size))?;
    field("block size", sizes::short(summary.block_size))?;
    field("file size", sizes::long(summary.file_size))?;
    for (state, blocks) in PayloadState::ALL.into_iter().zip(summary.blocks).filter(|(_, blocks)| *blocks > 0) {
        field(&format!("blocks {}", state.as_str()), blocks.to_string())?;
    }
    if summary.bitmaps_present > 0 {
        field("sector bitmaps", summary.bitmaps_present.to_string())?;
    }
    field("fragments", summary.fragments.to_string())?;
    field("leaked space", sizes::long(summary.leaked_bytes))?;
    field("compaction would give back", sizes::long(summary.reclaimable_bytes))?;
    let log = summary.replay.as_ref().map_or_else(
        || "clean".to_owned(),
        |replay| format!("dirty: {} entries change {} pages", replay.entries, replay.pages),
    );
    writeln!(out, "{HEADING}{:<NAME_WIDTH$}{HEADING:#} {log}", "log:")
}

fn to_json(path: &Path, report: &CheckReport, clean: bool) -> Value {
    json!({
        "file": show::path(path),
        "clean": clean,
        "errors": report.errors,
        "warnings": report.warnings,
        "notes": report.notes,
        "findings": report.findings.iter().map(finding_json).collect::<Vec<_>>(),
        "statistics": report.summary.as_ref().map(summary_json),
    })
}

fn summary_json(summary: &CheckSummary) -> Value {
    let blocks: serde_json::Map<String, Value> = PayloadState::ALL
        .into_iter()
        .zip(summary.blocks)
        .map(|(state, blocks)| (state.as_str().to_owned(), blocks.into()))
        .collect();
    json!({
        "type": summary.disk_type.as_str(),
        "disk_size": summary.disk_size,
        "block_size": summary.block_size,
        "file_size": summary.file_size,
        "blocks": blocks,
        "bitmaps_present": summary.bitmaps_present,
        "fragments": summary.fragments,
        "leaked_bytes": summary.leaked_bytes,
        "reclaimable_bytes": summary.reclaimable_bytes,
        "log": {
            "state": if summary.replay.is_some() { "dirty" } else { "clean" },
            "replay": summary.replay.as_ref().map(replay_json),
        },
    })
}
