//! What `info` says about an image, for people and for scripts.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use vhdkit::format::finding::{Finding, Severity};
use vhdkit::format::metadata::{FLAG_REQUIRED, FLAG_VIRTUAL_DISK, Item};
use vhdkit::format::region::Region;
use vhdkit::image::{Layer, ReplayReport};
use vhdkit::text::escape;

use super::chain::{Chain, Link, Verdict};
use super::{Space, is_shown};
use crate::opening::guid_text;
use crate::show;
use crate::sizes;
use crate::ui::{BAD, DOUBTFUL, FAINT, GOOD, HEADING};

/// Columns of the names in the report.
const NAME_WIDTH: usize = 22;

/// Everything that the report is made of.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) path: &'a Path,
    pub(crate) layer: &'a Layer,
    pub(crate) chain: &'a Chain,
    pub(crate) space: Space,
}

fn field(out: &mut dyn Write, name: &str, value: &str) -> io::Result<()> {
    let name = format!("{name}:");
    writeln!(out, "{name:<NAME_WIDTH$} {value}")
}

fn heading(out: &mut dyn Write, text: &str) -> io::Result<()> {
    writeln!(out, "\n{HEADING}{text}{HEADING:#}")
}

impl Facts<'_> {
    /// For people.
    pub(crate) fn write(&self, out: &mut dyn Write, verbose: bool) -> io::Result<()> {
        self.write_disk(out)?;
        self.write_headers(out)?;
        if let Some(replay) = self.layer.replay() {
            write_replay(out, replay)?;
        }
        heading(out, "Regions")?;
        for region in &self.layer.region_table().regions {
            writeln!(out, "  {}", region_line(region))?;
        }
        heading(out, "Metadata")?;
        for item in &self.layer.metadata().items {
            writeln!(out, "  {}", item_line(item))?;
        }
        if !self.chain.links.is_empty() {
            heading(out, "Chain")?;
            for (depth, link) in self.chain.links.iter().enumerate() {
                write_link(out, depth, link)?;
            }
        }
        let shown: Vec<&Finding> = self.findings().filter(|finding| is_shown(finding.severity(), verbose)).collect();
        if !shown.is_empty() {
            heading(out, "Findings")?;
            for finding in shown {
                let style = if finding.severity() == Severity::Note { FAINT } else { DOUBTFUL };
                writeln!(out, "  {style}{}{style:#}: {}", finding.severity().as_str(), escape(&finding.to_string()))?;
            }
        }
        Ok(())
    }

    fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.layer.findings().iter()
    }

    fn write_disk(&self, out: &mut dyn Write) -> io::Result<()> {
        let (layer, metadata) = (self.layer, self.layer.metadata());
        field(out, "image", &show::path(self.path))?;
        field(out, "type", metadata.disk_type().as_str())?;
        field(out, "disk size", &sizes::long(metadata.disk_size))?;
        field(out, "file size", &sizes::long(layer.file_size()))?;
        if let Some(allocated) = self.space.allocated {
            field(out, "space on disk", &sizes::long(allocated))?;
        }
        let in_use = self.space.in_use.map(sizes::long);
        let not_counted = || format!("not counted: {}", self.space.not_counted.unwrap_or("unknown"));
        field(out, "allocated blocks", &in_use.unwrap_or_else(not_counted))?;
        field(out, "block size", &sizes::short(u64::from(metadata.block_size)))?;
        let (logical, physical) = (metadata.logical_sector_size, metadata.physical_sector_size);
        field(out, "sectors", &format!("{logical} bytes logical, {physical} bytes physical"))?;
        field(out, "disk ID", &metadata.disk_id.to_string())?;
        let creator = escape(layer.creator());
        field(out, "creator", if creator.is_empty() { "(not named)" } else { &creator })
    }

    fn write_headers(&self, out: &mut dyn Write) -> io::Result<()> {
        let headers = self.layer.headers();
        let header = &headers.current;
        heading(out, "Header")?;
        let both = headers.copies.iter().all(Option::is_some);
        let state = if both { "both copies are valid" } else { "the other copy is damaged" };
        field(out, "current", &format!("copy {}; {state}", headers.current_copy + 1))?;
        field(out, "sequence number", &header.sequence_number.to_string())?;
        field(out, "file write GUID", &guid_text(header.file_write_guid))?;
        field(out, "data write GUID", &guid_text(header.data_write_guid))?;
        let size = sizes::short(u64::from(header.log_length));
        let place = format!("{size} at {:#x}", header.log_offset);
        let state = match self.layer.replay() {
            None => format!("{GOOD}clean{GOOD:#}, {place}"),
            Some(_) => format!("{DOUBTFUL}dirty{DOUBTFUL:#}, {place}, log GUID {}", header.log_guid),
        };
        field(out, "log", &state)
    }

    /// For scripts.
    pub(crate) fn to_json(&self) -> Value {
        let (layer, metadata) = (self.layer, self.layer.metadata());
        let links = &self.chain.links;
        let complete = links.iter().all(|link| matches!(link.verdict, Verdict::Right { .. }));
        json!({
            "file": show::path(self.path),
            "format": "vhdx",
            "type": metadata.disk_type().as_str(),
            "disk_size": metadata.disk_size,
            "file_size": layer.file_size(),
            "file_allocated_bytes": self.space.allocated,
            "allocated_bytes": self.space.in_use,
            "block_size": metadata.block_size,
            "logical_sector_size": metadata.logical_sector_size,
            "physical_sector_size": metadata.physical_sector_size,
            "disk_id": metadata.disk_id.to_string(),
            "creator": escape(layer.creator()),
            "header": self.header_json(),
            "log": self.log_json(),
            "regions": layer.region_table().regions.iter().map(region_json).collect::<Vec<_>>(),
            "metadata": metadata.items.iter().map(item_json).collect::<Vec<_>>(),
            "chain_complete": complete,
            "chain": links.iter().map(Link::to_json).collect::<Vec<_>>(),
            "findings": self.findings().map(finding_json).collect::<Vec<_>>(),
        })
    }

    fn header_json(&self) -> Value {
        let headers = self.layer.headers();
        let header = &headers.current;
        json!({
            "copy": headers.current_copy + 1,
            "valid_copies": headers.copies.iter().map(Option::is_some).collect::<Vec<_>>(),
            "sequence_number": header.sequence_number,
            "file_write_guid": header.file_write_guid.to_string(),
            "data_write_guid": header.data_write_guid.to_string(),
            "log_guid": header.log_guid.to_string(),
            "version": header.version,
            "log_version": header.log_version,
        })
    }

    fn log_json(&self) -> Value {
        let header = &self.layer.headers().current;
        let replay = self.layer.replay();
        json!({
            "state": if replay.is_some() { "dirty" } else { "clean" },
            "offset": header.log_offset,
            "length": header.log_length,
            "replay": replay.map(replay_json),
        })
    }
}

fn write_replay(out: &mut dyn Write, replay: &ReplayReport) -> io::Result<()> {
    heading(out, "Replay of the log (in memory; the file stays as it is)")?;
    let sequence = format!("{}, sequence {} to {}", replay.entries, replay.first_sequence, replay.last_sequence);
    field(out, "entries", &sequence)?;
    field(out, "pages to change", &replay.pages.to_string())?;
    field(out, "bytes to zero", &replay.zeroed_bytes.to_string())?;
    let (before, after) = (replay.file_size_before, replay.file_size_after);
    let growth = if before == after {
        "unchanged".to_owned()
    } else {
        format!("{} to {}", sizes::long(before), sizes::long(after))
    };
    field(out, "file size", &growth)?;
    for (structure, pages) in &replay.touched {
        let plural = if *pages == 1 { "page" } else { "pages" };
        field(out, &format!("in {}", escape(structure)), &format!("{pages} {plural}"))?;
    }
    Ok(())
}

/// The JSON of a replay report.
pub(crate) fn replay_json(replay: &ReplayReport) -> Value {
    let touched = replay.touched.iter().map(|(name, pages)| json!({ "structure": escape(name), "pages": pages }));
    json!({
        "entries": replay.entries,
        "first_sequence": replay.first_sequence,
        "last_sequence": replay.last_sequence,
        "pages": replay.pages,
        "zeroed_bytes": replay.zeroed_bytes,
        "file_size_before": replay.file_size_before,
        "file_size_after": replay.file_size_after,
        "touched": touched.collect::<Vec<_>>(),
    })
}

fn region_line(region: &Region) -> String {
    let required = if region.required & 1 == 1 { "required" } else { "optional" };
    let (offset, length) = (region.file_offset, sizes::short(region.length));
    format!("{:<24} {length:>10} at {offset:<#14x} {required}", escape(&region.name()))
}

fn region_json(region: &Region) -> Value {
    json!({
        "name": escape(&region.name()),
        "guid": region.guid.to_string(),
        "offset": region.file_offset,
        "length": region.length,
        "required": region.required & 1 == 1,
    })
}

fn item_flags(item: &Item) -> Vec<&'static str> {
    let flags = [
        (item.is_user(), "user"),
        (item.flags & FLAG_VIRTUAL_DISK != 0, "virtual-disk"),
        (item.flags & FLAG_REQUIRED != 0, "required"),
    ];
    flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect()
}

fn item_line(item: &Item) -> String {
    let length = sizes::short(u64::from(item.length));
    format!("{:<24} {length:>10} at +{:<#13x} {}", escape(&item.name()), item.offset, item_flags(item).join(", "))
}

fn item_json(item: &Item) -> Value {
    json!({
        "name": escape(&item.name()),
        "guid": item.id.to_string(),
        "offset": item.offset,
        "length": item.length,
        "flags": item_flags(item),
    })
}

/// The JSON of a finding.
pub(crate) fn finding_json(finding: &Finding) -> Value {
    json!({
        "code": finding.code().as_str(),
        "rule": finding.code().rule(),
        "severity": finding.severity().as_str(),
        "structure": escape(finding.location().structure()),
        "offset": finding.location().offset(),
        "message": escape(finding.detail()),
    })
}

fn write_link(out: &mut dyn Write, depth: usize, link: &Link) -> io::Result<()> {
    let (style, name) = match &link.verdict {
        Verdict::Right { .. } => (GOOD, "ok"),
        Verdict::NotOpened => (FAINT, "not opened"),
        Verdict::Wrong(_) => (BAD, link.verdict_name()),
    };
    writeln!(out, "  {depth} {}", link.child)?;
    let linkage = link.linkage.map_or_else(|| "nothing".to_owned(), |guid| guid.to_string());
    writeln!(out, "    expects a parent with data write GUID {linkage}")?;
    for (key, value) in &link.paths {
        writeln!(out, "    {key}: {value}")?;
    }
    writeln!(out, "    verdict: {style}{name}{style:#}")?;
    match &link.verdict {
        Verdict::Right { path, disk_size, by, .. } => {
            let size = sizes::short(*disk_size);
            writeln!(out, "  {} {path}", depth + 1)?;
            writeln!(out, "    identified by {by}, disk of {size}")
        }
        Verdict::NotOpened => Ok(()),
        Verdict::Wrong(_) => {
            writeln!(out, "    {}", link.message().unwrap_or_default())?;
            writeln!(out, "    hint: {}", link.hint().unwrap_or_default())
        }
    }
}
