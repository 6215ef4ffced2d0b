//! `chain`: who is whose parent, and what is wrong with that.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhdkit::Error;
use vhdkit::ops::chain::{ChainOptions, ChainReport, ChildLink, Node, Remedy, Trouble, chain};
use vhdkit::storage::Sharing;
use vhdkit::text::escape;

use crate::args::ChainArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure, hint};
use crate::opening::{check_parent_options, resolver};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::{BAD, DOUBTFUL, FAINT, HEADING, Ui};

/// Finds the chains and shows them.
pub(crate) fn run(context: &Context, args: &ChainArgs) -> Result<Answer, Failure> {
    check_parent_options(&context.global)?;
    let global = &context.global;
    let mut options = ChainOptions { recursive: args.recursive, ..ChainOptions::default() };
    if !global.no_parents {
        options.parents = Some(Arc::new(resolver(global, [])?.sharing(Sharing::ForceShare)));
        options.also = [global.parent.as_slice(), global.parent_dir.as_slice()].concat();
    }
    let bar = Bar::new("looking", &context.ui, &context.interrupt);
    let report = chain(&args.place, &options, &bar)?;
    drop(bar);
    if context.ui.json {
        Ui::print_json(&to_json(&args.place, &report))?;
    } else if !context.ui.quiet {
        let mut out = context.ui.out();
        let lines = if Ui::out_is_terminal() && Ui::is_unicode() { &BOXES } else { &ASCII };
        write(&mut out, &args.place, &report, lines, context.ui.verbose)?;
        out.flush()?;
    }
    Ok(if report.is_whole() { Answer::Yes } else { Answer::No })
}

/// What trees are drawn with.
struct Lines {
    /// In front of a child with siblings behind it, and of the last one.
    child: (&'static str, &'static str),
    /// In front of what stands beneath these.
    beneath: (&'static str, &'static str),
}

impl Lines {
    const fn child(&self, is_last: bool) -> &'static str {
        if is_last { self.child.1 } else { self.child.0 }
    }

    const fn beneath(&self, is_last: bool) -> &'static str {
        if is_last { self.beneath.1 } else { self.beneath.0 }
    }
}

const BOXES: Lines =
    Lines { child: ("\u{251c}\u{2500}\u{2500} ", "\u{2514}\u{2500}\u{2500} "), beneath: ("\u{2502}   ", "    ") };
const ASCII: Lines = Lines { child: ("|-- ", "`-- "), beneath: ("|   ", "    ") };

fn write(out: &mut dyn Write, place: &Path, report: &ChainReport, lines: &Lines, verbose: bool) -> io::Result<()> {
    let are_last = are_last(&report.nodes);
    // Whether the ancestor at each depth is the last of its siblings.
    let mut above: Vec<bool> = Vec::new();
    for (index, (node, is_last)) in report.nodes.iter().zip(are_last).enumerate() {
        above.truncate(node.depth);
        let mut beneath: String = above.iter().skip(1).map(|is_last| lines.beneath(*is_last)).collect();
        let mut own = beneath.clone();
        if node.depth > 0 {
            own.push_str(lines.child(is_last));
            beneath.push_str(lines.beneath(is_last));
        } else if index > 0 {
            writeln!(out)?;
        }
        above.push(is_last);
        write_node(out, node, &own, place, verbose)?;
        let has_children = report.nodes.get(index + 1).is_some_and(|next| next.depth > node.depth);
        beneath.push_str(lines.beneath(!has_children));
        for trouble in &node.troubles {
            write_trouble(out, trouble, &beneath)?;
        }
    }
    if report.nodes.is_empty() {
        writeln!(out, "{}: no VHDX images", show::path(place))?;
    }
    write_others(out, report)
}

/// Whether each node is the last child of its parent.
fn are_last(nodes: &[Node]) -> Vec<bool> {
    // From the end on: whether a node of each depth comes later, beneath the same parent.
    let mut comes_later: Vec<bool> = Vec::new();
    let mut found: Vec<bool> = nodes
        .iter()
        .rev()
        .map(|node| {
            comes_later.resize(node.depth + 1, false); // at most as deep as there are nodes
            comes_later.last_mut().is_none_or(|later| !std::mem::replace(later, true))
        })
        .collect();
    found.reverse();
    found
}

/// A path, without the directory that the user named.
fn name_in(place: &Path, path: &Path) -> String {
    match path.strip_prefix(place) {
        Ok(rest) if !rest.as_os_str().is_empty() => show::path(rest),
        _ => show::path(path),
    }
}

fn write_node(out: &mut dyn Write, node: &Node, prefix: &str, place: &Path, verbose: bool) -> io::Result<()> {
    let mut facts = vec![
        node.disk_type.as_str().to_owned(),
        sizes::short(node.disk_size),
        format!("{} in the file", sizes::short(node.file_size)),
    ];
    if node.is_dirty {
        facts.push("dirty".to_owned());
    }
    if node.in_use {
        facts.push("in use".to_owned());
    }
    let names: Vec<String> = node.other_names.iter().map(|name| name_in(place, name)).collect();
    if !names.is_empty() {
        facts.push(format!("also named {}", names.join(", ")));
    }
    if verbose {
        facts.push(format!("data write GUID {}", node.data_write_guid));
    }
    let name = name_in(place, &node.path);
    let style = if node.is_broken() { BAD } else { HEADING };
    writeln!(out, "{FAINT}{prefix}{FAINT:#}{style}{name}{style:#}  {}", facts.join(", "))
}

fn write_trouble(out: &mut dyn Write, trouble: &Trouble, prefix: &str) -> io::Result<()> {
    let (style, word) = if trouble.kind.breaks() { (BAD, "broken") } else { (DOUBTFUL, "note") };
    let kind = trouble.kind.as_str();
    writeln!(out, "{FAINT}{prefix}{FAINT:#}{style}{word} ({kind}){style:#}: {}", trouble.message)?;
    for remedy in &trouble.remedies {
        writeln!(out, "{FAINT}{prefix}{FAINT:#}  {}", remedy_text(remedy))?;
    }
    Ok(())
}

fn remedy_text(remedy: &Remedy) -> String {
    if remedy.arguments.is_empty() {
        return remedy.what.clone();
    }
    let words: Vec<String> = remedy.arguments.iter().map(|word| show::quoted(word)).collect();
    format!("`vhdkit {}` {}", words.join(" "), remedy.what)
}

fn write_others(out: &mut dyn Write, report: &ChainReport) -> io::Result<()> {
    for (title, errors) in [("Damaged", &report.damaged), ("Skipped", &report.skipped)] {
        if errors.is_empty() {
            continue;
        }
        writeln!(out, "\n{HEADING}{title}{HEADING:#}")?;
        for error in errors {
            writeln!(out, "  {}: {}", file_of(error), message_of(error))?;
            if title == "Damaged" {
                writeln!(out, "    hint: {}", escape(&hint(error)))?;
            }
        }
    }
    Ok(())
}

fn file_of(error: &Error) -> String {
    error.path().map(show::path).unwrap_or_default()
}

fn message_of(error: &Error) -> String {
    let message = escape(error.message()).into_owned();
    match std::error::Error::source(error) {
        Some(source) => format!("{message}: {}", escape(&source.to_string())),
        None => message,
    }
}

fn to_json(place: &Path, report: &ChainReport) -> Value {
    let path_of =
        |index: Option<usize>| index.and_then(|index| report.nodes.get(index)).map(|node| show::path(&node.path));
    let errors = |errors: &[Error]| -> Vec<Value> {
        let one = |error: &Error| {
            json!({ "file": file_of(error), "kind": error.kind().as_str(), "message": message_of(error),
                "hint": escape(&hint(error)) })
        };
        errors.iter().map(one).collect()
    };
    json!({
        "place": show::path(place),
        "whole": report.is_whole(),
        "images": report.nodes.iter().map(|node| node_json(node, path_of(node.parent))).collect::<Vec<_>>(),
        "damaged": errors(&report.damaged),
        "skipped": errors(&report.skipped),
    })
}

fn node_json(node: &Node, parent: Option<String>) -> Value {
    let state = match (node.linkage.or(node.linkage2).is_some() || !node.troubles.is_empty(), node.is_broken()) {
        (false, _) => "none",
        (true, false) => "ok",
        (true, true) => "broken",
    };
    let by = node.link.map(|link| match link {
        ChildLink::Linkage => "parent_linkage",
        ChildLink::Linkage2 => "parent_linkage2",
        ChildLink::Path => "path",
    });
    let paths: serde_json::Map<String, Value> =
        node.parent_paths.iter().map(|(key, text)| (key.clone(), text.clone().into())).collect();
    json!({
        "file": show::path(&node.path),
        "other_names": node.other_names.iter().map(|name| show::path(name)).collect::<Vec<_>>(),
        "depth": node.depth,
        "type": node.disk_type.as_str(),
        "disk_size": node.disk_size,
        "file_size": node.file_size,
        "disk_usage": node.disk_usage,
        "logical_sector_size": node.logical_sector_size,
        "dirty": node.is_dirty,
        "in_use": node.in_use,
        "data_write_guid": node.data_write_guid.to_string(),
        "disk_id": node.disk_id.to_string(),
        "parent": {
            "state": state,
            "file": parent,
            "identified_by": by,
            "linkage": node.linkage.map(|guid| guid.to_string()),
            "linkage2": node.linkage2.map(|guid| guid.to_string()),
            "paths": paths,
            "troubles": node.troubles.iter().map(trouble_json).collect::<Vec<_>>(),
        },
    })
}

fn trouble_json(trouble: &Trouble) -> Value {
    let remedies = trouble.remedies.iter().map(|remedy| {
        let words: Vec<String> = remedy.arguments.iter().map(|word| show::path(Path::new(word))).collect();
        let command = (!words.is_empty()).then(|| [vec!["vhdkit".to_owned()], words].concat());
        json!({ "what": remedy.what, "command": command })
    });
    json!({
        "kind": trouble.kind.as_str(),
        "broken": trouble.kind.breaks(),
        "message": trouble.message,
        "remedies": remedies.collect::<Vec<_>>(),
    })
}
