//! Rows as Markdown.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::measure::Measured;
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// What the reader of the table has to know about the machine.
pub(crate) fn preamble(bench: &Bench, directory: &Path) -> String {
    let first = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or("", |(_, value)| value).trim().to_owned()
    };
    let version = |program: &str| {
        let text = shell::output(Command::new(program).arg("--version")).unwrap_or_default();
        text.lines().next().unwrap_or("not installed").to_owned()
    };
    let place = ["-no", "FSTYPE,SOURCE", "-T"];
    let place = shell::output(Command::new("findmnt").args(place).arg(directory)).unwrap_or_default();
    let place = place.split_whitespace().collect::<Vec<_>>().join(" on ");
    format!(
        "# Speed and memory beside other programs\n\n\
         Made by `cargo xtask peers`. In each row the commands take turns in one run after a warm-up: {} timed runs \
         each, medians; a run of fio takes {} s. Peak memory is the largest resident set of the whole process, from GNU time. A goal that \
         is missed says so.\n\n\
         Machine: {}, {} processors, {} of memory, Linux {}.\nPeers: {}.\n\
         In the command lines `$M` is a folder in memory (tmpfs), `$D` one on an XFS in a loop mount, `$T` one on a disk \
         ({}).\n\n",
        bench.rounds,
        bench.seconds,
        first("/proc/cpuinfo", "model name"),
        std::thread::available_parallelism().map_or(0, usize::from),
        first("/proc/meminfo", "MemTotal"),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        ["qemu-img", "cp", "nbdkit", "fio"].map(version).join("; "),
        if place.is_empty() { "of an unknown file system" } else { &place },
    )
}

/// True when a row has reached all its goals.
pub(crate) fn reached(row: &Row) -> bool {
    row.goals.iter().all(|goal| verdict(goal, row).1)
}

/// A goal in words, and whether it is reached.
fn verdict(goal: &Goal, row: &Row) -> (String, bool) {
    let ours = row.measured.first();
    let median = ours.and_then(Measured::median);
    let of = |label: &str| row.measured.iter().find(|other| other.label == label).and_then(Measured::median);
    let to = |label: &str| median.zip(of(label)).map(|(ours, theirs)| ours / theirs);
    let or_none = |seen: Option<String>| seen.unwrap_or_else(|| "not measured".to_owned());
    let (words, reached) = match goal {
        Goal::Ratio(label, most) => {
            let seen = to(label);
            let shown = or_none(seen.map(|ratio| format!("{ratio:.2}")));
            (format!("at most {most:.2} times `{label}`: {shown}"), seen.is_some_and(|ratio| ratio <= *most))
        }
        Goal::Rate(label, least) => at_least("", label, to(label), *least),
        Goal::RateOf(whose, label, least) => {
            let seen = of(whose).zip(of(label)).map(|(one, other)| one / other);
            at_least(&format!("`{whose}` "), label, seen, *least)
        }
        Goal::Seconds(most) => {
            let shown = or_none(median.map(duration));
            (format!("at most {}: {shown}", duration(*most)), median.is_some_and(|seconds| seconds <= *most))
        }
        Goal::PeakMib(most) => {
            let peak = ours.and_then(|ours| ours.peak_kib);
            let shown = or_none(peak.map(mebibytes));
            (format!("at most {most} MiB: {shown}"), peak.is_some_and(|peak| peak <= most << 10))
        }
        Goal::Holds(what, holds) => (what.clone(), *holds),
    };
    (format!("{}: {words}", if reached { "reached" } else { "MISSED" }), reached)
}

/// A goal on a rate in terms of another: whose it is, where it is not vhdkit's.
fn at_least(whose: &str, label: &str, seen: Option<f64>, least: f64) -> (String, bool) {
    let shown = seen.map_or("not measured".to_owned(), |ratio| format!("{:.1} %", ratio * 100.0));
    let words = format!("{whose}at least {:.0} % of `{label}`: {shown}", least * 100.0);
    (words, seen.is_some_and(|ratio| ratio >= least))
}

fn duration(seconds: f64) -> String {
    if seconds < 0.1 { format!("{:.1} ms", seconds * 1000.0) } else { format!("{seconds:.3} s") }
}

fn mebibytes(kib: u64) -> String {
    format!("{}.{} MiB", kib >> 10, ((kib & 1023) * 10) >> 10)
}

fn figure(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Seconds => duration(value),
        Unit::PerSecond => format!("{value:.0}/s"),
        Unit::MibPerSecond => format!("{value:.0} MiB/s"),
        Unit::Count => format!("{value:.0}"),
    }
}

/// A row as a section of the document.
pub(crate) fn section(name: &str, row: &Row, bench: &Bench) -> Outcome<String> {
    let mut text = String::new();
    writeln!(text, "## {name}\n\n{}\n", row.title)?;
    writeln!(text, "| | median | least to most | in terms of vhdkit | peak memory | command |")?;
    writeln!(text, "|---|---|---|---|---|---|")?;
    let ours = row.measured.first().and_then(Measured::median);
    for measured in &row.measured {
        let (label, line) = (&measured.label, plain(&measured.line, bench));
        let (Some(median), Some(least), Some(most)) =
            (measured.median(), measured.figures.first(), measured.figures.last())
        else {
            let why = plain(measured.failure.as_deref().unwrap_or("not run"), bench);
            writeln!(text, "| {label} | - | - | - | - | `{line}`: {why} |")?;
            continue;
        };
        let spread = format!("{} to {}", figure(*least, row.unit), figure(*most, row.unit));
        let ratio = ours.map_or(String::new(), |ours| format!("{:.2}", median / ours));
        let peak = measured.peak_kib.map_or("-".to_owned(), mebibytes);
        writeln!(text, "| {label} | {} | {spread} | {ratio} | {peak} | `{line}` |", figure(median, row.unit))?;
    }
    text.push('\n');
    for goal in &row.goals {
        writeln!(text, "- {}", verdict(goal, row).0)?;
    }
    text.push('\n');
    Ok(text)
}

/// A line without the folders of this run, fit for a table.
fn plain(line: &str, bench: &Bench) -> String {
    let replace = |line: String, path: &Path, name: &str| line.replace(&path.to_string_lossy().into_owned(), name);
    let line = replace(line.to_owned(), &bench.vhdkit, "vhdkit");
    let line = replace(line, &bench.memory, "$M");
    let line = replace(line, &bench.disk.join("xfs"), "$D");
    replace(line, &bench.disk, "$T").replace('|', "\\|").replace('\n', " ")
}
