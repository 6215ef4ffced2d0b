//! `compare`: what two disks hold.

use std::io::Write as _;
use std::path::Path;

use serde_json::json;
use vhdkit::ops::compare::compare;
use vhdkit::text::escape;

use crate::args::{CompareArgs, Format};
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::Wanted;
use crate::opening::{Disk, DiskRequest, open_disk};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;

/// Compares the disks.
pub(crate) fn run(context: &Context, args: &CompareArgs) -> Result<Answer, Failure> {
    let a = open(context, &args.a, args.from_a, "--from-a")?;
    let b = open(context, &args.b, args.from_b, "--from-b")?;
    let bar = Bar::new("comparing", &context.ui, &context.interrupt);
    let found = compare(a.device.as_ref(), b.device.as_ref(), &bar)?;
    drop(bar);
    let note = found.size_note.as_deref().map(escape);
    if context.ui.json {
        Ui::print_json(&json!({
            "a": show::path(&args.a),
            "b": show::path(&args.b),
            "equal": found.is_equal(),
            "first_difference": found.first_difference,
            "size_a": found.sizes[0],
            "size_b": found.sizes[1],
            "note": note,
        }))?;
    } else if !context.ui.quiet {
        let mut out = context.ui.out();
        match found.first_difference {
            None => writeln!(out, "equal: {}", sizes::long(found.sizes[0].min(found.sizes[1])))?,
            Some(offset) => writeln!(out, "different: the first difference is at offset {offset} ({offset:#x})")?,
        }
        if let Some(note) = note {
            writeln!(out, "{note}")?;
        }
        out.flush()?;
    }
    Ok(if found.is_equal() { Answer::Yes } else { Answer::No })
}

fn open(context: &Context, path: &Path, format: Option<Format>, option: &str) -> Result<Disk, Failure> {
    open_disk(context, DiskRequest { path, format, wanted: Wanted::Source, option, raw_sector: 512 })
}
