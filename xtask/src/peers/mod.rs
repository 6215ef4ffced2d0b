//! Benchmarks beside other programs: `cargo xtask peers`.
//!
//! In each row the contenders take turns in one run, after a warm-up; the table shows medians, ratios, the command
//! lines, and whether what the row must reach is reached. The first contender of a row is always vhdkit.

mod maintain;
mod measure;
mod nbd;
mod nbd_fio;
mod nbd_plain;
mod nbd_servers;
mod overwrites;
mod random;
mod rows;
mod syncs;
mod table;
mod work;
mod writes;

pub(crate) use work::run as work;

use std::fs;
use std::path::PathBuf;

use crate::shell::{self, Outcome, cargo, root};
use measure::Measured;

/// What a row must reach.
pub(crate) enum Goal {
    /// vhdkit takes at most so many times what the named contender takes.
    Ratio(&'static str, f64),
    /// vhdkit takes at most so many seconds.
    Seconds(f64),
    /// vhdkit's resident set is at most so many MiB.
    PeakMib(u64),
    /// vhdkit's rate is at least so many times that of the named contender.
    Rate(&'static str, f64),
    /// The same of another contender than the first: whose rate, in terms of whose, and how many times at least.
    RateOf(&'static str, &'static str, f64),
    /// Something that was looked at: what, and whether it holds.
    Holds(String, bool),
}

/// One finished row.
pub(crate) struct Row {
    /// What was measured.
    pub(crate) title: &'static str,
    /// The contenders; vhdkit first.
    pub(crate) measured: Vec<Measured>,
    /// What must be reached.
    pub(crate) goals: Vec<Goal>,
    /// What the figures are.
    pub(crate) unit: Unit,
}

/// What the figures of a row are.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    /// Seconds of a run.
    Seconds,
    /// Operations per second.
    PerSecond,
    /// MiB per second.
    MibPerSecond,
    /// A number of something.
    Count,
}

/// What every row needs.
pub(crate) struct Bench {
    /// The release build of the command.
    pub(crate) vhdkit: PathBuf,
    /// A folder in memory.
    pub(crate) memory: PathBuf,
    /// A folder on a disk, for the XFS image and for what syncs.
    pub(crate) disk: PathBuf,
    /// Timed runs of each contender.
    pub(crate) rounds: usize,
    /// Seconds of a run of fio.
    pub(crate) seconds: u64,
}

struct Options {
    rounds: usize,
    seconds: u64,
    write: Option<PathBuf>,
    directory: PathBuf,
    filters: Vec<String>,
}

fn parse(arguments: &[String]) -> Outcome<Options> {
    let (directory, filters) = (std::env::temp_dir(), Vec::new());
    let mut options = Options { rounds: 9, seconds: 5, write: None, directory, filters };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--rounds" => options.rounds = value()?.parse().map_err(|_| "--rounds needs a number")?,
            "--seconds" => options.seconds = value()?.parse().map_err(|_| "--seconds needs a number")?,
            "--write" => options.write = Some(PathBuf::from(value()?)),
            "--dir" => options.directory = PathBuf::from(value()?),
            other if other.starts_with('-') => return Err(format!("there is no option \"{other}\"").into()),
            other => options.filters.push(other.to_owned()),
        }
    }
    if options.rounds == 0 || options.seconds == 0 {
        return Err("--rounds and --seconds need at least 1".into());
    }
    Ok(options)
}

/// The task `peers`.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let options = parse(arguments)?;
    if cfg!(debug_assertions) {
        return Err("this is a debug build; `cargo xtask` builds in release".into());
    }
    shell::run(cargo().args(["build", "--release", "--locked", "--package", "vhdkit-cli"]).current_dir(root()?))?;
    let vhdkit = shell::target_dir()?.join("release/vhdkit");
    let memory = tempfile::Builder::new().prefix("vhdkit-peers-").tempdir_in("/dev/shm")?;
    let disk = tempfile::Builder::new().prefix("vhdkit-peers-").tempdir_in(&options.directory)?;
    let Options { rounds, seconds, .. } = options;
    let bench = Bench { vhdkit, memory: memory.path().to_owned(), disk: disk.path().to_owned(), rounds, seconds };
    let mut text = table::preamble(&bench, &options.directory);
    print!("{text}");
    let mut missed = Vec::new();
    for (name, make) in rows::ROWS {
        if !options.filters.is_empty() && !options.filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        eprintln!("== {name}");
        let section = match make(&bench) {
            Ok(row) => {
                if !table::reached(&row) {
                    missed.push(name);
                }
                table::section(name, &row, &bench)?
            }
            Err(error) => {
                missed.push(name);
                format!("## {name}\n\nNot measured: {error}\n\n")
            }
        };
        print!("{section}");
        text.push_str(&section);
    }
    if let Some(path) = &options.write {
        fs::write(root()?.join(path), text.trim_end().to_owned() + "\n")?;
    }
    if missed.is_empty() { Ok(()) } else { Err(format!("missed or not measured: {}", missed.join(", ")).into()) }
}
