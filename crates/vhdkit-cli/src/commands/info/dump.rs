//! `info --dump`: every structure as it stands in the file.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhdkit::ErrorKind;
use vhdkit::image::OpenOptions;
use vhdkit::ops::dump::{DumpSection, dump};
use vhdkit::storage::{FileAccess, FileStorage, Storage};
use vhdkit::text::escape;

use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::opening::sharing;
use crate::show;
use crate::ui::{FAINT, HEADING, Ui};

/// Shows every structure. A damaged image is shown as far as it can be; then its error ends the command.
pub(crate) fn run(context: &Context, path: &Path) -> Result<Answer, Failure> {
    let storage = FileStorage::open(path, FileAccess::Read, sharing(&context.global))?;
    if let Some(note) = &storage.lock_report().note {
        context.ui.warn(None, note);
    }
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let opened = OpenOptions::new().without_parents().open(Arc::clone(&storage), Some(path));
    if let Err(error) = opened {
        if matches!(error.kind(), ErrorKind::NotVhdx | ErrorKind::Io) {
            return Err(error.into());
        }
        if let Ok(sections) = dump(&storage, Some(path)) {
            print(context, path, &sections)?;
        }
        return Err(error.into());
    }
    let sections = dump(&storage, Some(path)).map_err(|error| error.with_path(path))?;
    print(context, path, &sections)?;
    Ok(Answer::Yes)
}

fn print(context: &Context, path: &Path, sections: &[DumpSection]) -> Result<(), Failure> {
    if context.ui.json {
        let sections: Vec<Value> = sections.iter().map(section_json).collect();
        return Ui::print_json(&json!({ "file": show::path(path), "dump": sections }));
    }
    let mut out = context.ui.out();
    for section in sections {
        let place = section.offset.map(|offset| format!("  {FAINT}at {offset:#x}{FAINT:#}")).unwrap_or_default();
        writeln!(out, "{HEADING}{}{HEADING:#}{place}", escape(&section.title))?;
        let width = section.fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default() + 1;
        for (name, value) in &section.fields {
            let name = format!("{}:", escape(name));
            writeln!(out, "  {name:<width$} {}", escape(value))?;
        }
    }
    Ok(out.flush()?)
}

fn section_json(section: &DumpSection) -> Value {
    // A list and not an object: names may occur twice.
    let fields: Vec<Value> =
        section.fields.iter().map(|(name, value)| json!({ "name": escape(name), "value": escape(value) })).collect();
    json!({ "title": escape(&section.title), "offset": section.offset, "fields": fields })
}
