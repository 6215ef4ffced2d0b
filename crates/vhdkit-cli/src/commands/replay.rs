//! `replay`: the log of an image that was not closed properly, put into place.

use std::io::Write as _;
use std::path::Path;

use serde_json::json;
use vhdkit::image::ReplayReport;
use vhdkit::text::escape;

use super::info::replay_json;
use crate::args::ReplayArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::Session;

/// Replays the log in place and says what that changed.
pub(crate) fn run(context: &Context, args: &ReplayArgs) -> Result<Answer, Failure> {
    let report = match Session::open_dirty(context, &args.image, args.from.from)? {
        Some(session) => replay(&session)?,
        None => None,
    };
    if context.ui.json {
        Ui::print_json(&json!({
            "file": show::path(&args.image),
            "replayed": report.is_some(),
            "replay": report.as_ref().map(replay_json),
        }))?;
    } else if !context.ui.quiet {
        let mut out = context.ui.out();
        write_report(&mut out, &args.image, report.as_ref())?;
        out.flush()?;
    }
    Ok(Answer::Yes)
}

/// The report is `None` when somebody else was faster.
fn replay(session: &Session<'_>) -> Result<Option<ReplayReport>, Failure> {
    let replayed = session.image.replay();
    let closed = session.close();
    let report = replayed?;
    closed?;
    Ok(report)
}

fn write_report(out: &mut dyn std::io::Write, path: &Path, report: Option<&ReplayReport>) -> std::io::Result<()> {
    let file = show::path(path);
    let Some(report) = report else {
        return writeln!(out, "{file}: the log is clean; nothing was changed");
    };
    let plural = |count: u64, one: &str, many: &str| format!("{count} {}", if count == 1 { one } else { many });
    let entries = plural(report.entries, "entry", "entries");
    writeln!(out, "{file}: log replayed, {entries}; the image is clean now")?;
    writeln!(out, "  {} changed", plural(report.pages, "page", "pages"))?;
    if report.zeroed_bytes > 0 {
        writeln!(out, "  {} zeroed", sizes::long(report.zeroed_bytes))?;
    }
    for (structure, pages) in &report.touched {
        writeln!(out, "  in {}: {}", escape(structure), plural(*pages, "page", "pages"))?;
    }
    if report.file_size_before != report.file_size_after {
        let (before, after) = (sizes::long(report.file_size_before), sizes::long(report.file_size_after));
        writeln!(out, "  file size: {before}, now {after}")?;
    }
    Ok(())
}
