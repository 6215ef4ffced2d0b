//! Timing of commands that take turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::shell::{self, Outcome};

/// One of the commands that a row compares.
pub(crate) struct Contender {
    /// Its name in the table.
    pub(crate) label: &'static str,
    /// The command line.
    pub(crate) line: String,
    /// A file that is removed before each run, outside of the time taken.
    pub(crate) target: Option<PathBuf>,
}

impl Contender {
    /// A command that makes no file.
    pub(crate) fn new(label: &'static str, line: String) -> Self {
        Self { label, line, target: None }
    }

    /// A command that makes a file.
    pub(crate) fn making(label: &'static str, line: String, target: &Path) -> Self {
        Self { target: Some(target.to_owned()), ..Self::new(label, line) }
    }

    /// The command. It is split at spaces, so that no shell starts inside of the time taken; only a line with `&&`
    /// needs one, and pays less than a millisecond for it.
    fn command(&self) -> Command {
        if self.line.contains("&&") {
            let mut command = Command::new("sh");
            command.arg("-c").arg(&self.line);
            return command;
        }
        let mut words = self.line.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or("false"));
        command.args(words);
        command
    }

    fn prepare(&self) -> Outcome {
        match &self.target {
            Some(target) if target.exists() => Ok(fs::remove_file(target)?),
            _ => Ok(()),
        }
    }

    /// Runs it once; seconds taken.
    fn run(&self) -> Outcome<f64> {
        self.prepare()?;
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let start = Instant::now();
        let output = command.spawn().and_then(std::process::Child::wait_with_output);
        let seconds = start.elapsed().as_secs_f64();
        let output = output.map_err(|error| format!("{}: {error}", self.line))?;
        if output.status.success() {
            return Ok(seconds);
        }
        Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into())
    }

    /// Runs it once for its largest resident set, in KiB; nothing where GNU time is not installed. GNU time is
    /// smaller than anything that is measured, so what it holds between fork and exec does not show.
    fn peak_kib(&self) -> Outcome<Option<u64>> {
        let Some(time) = shell::find("time") else {
            self.run()?;
            return Ok(None);
        };
        self.prepare()?;
        let report = std::env::temp_dir().join(format!("vhdkit-peers-{}.time", std::process::id()));
        let inner = self.command();
        let mut command = Command::new(time);
        command.arg("-f").arg("%M").arg("-o").arg(&report).arg(inner.get_program()).args(inner.get_args());
        let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
        let text = fs::read_to_string(&report)?;
        fs::remove_file(&report)?;
        if !output.status.success() {
            return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into());
        }
        Ok(text.lines().last().and_then(|line| line.trim().parse().ok()))
    }
}

/// What was measured of one contender.
pub(crate) struct Measured {
    /// The name in the table.
    pub(crate) label: String,
    /// The command line.
    pub(crate) line: String,
    /// Seconds of each run, or operations per second, sorted.
    pub(crate) figures: Vec<f64>,
    /// The largest resident set, in KiB.
    pub(crate) peak_kib: Option<u64>,
    /// Why there is nothing.
    pub(crate) failure: Option<String>,
}

impl Measured {
    /// What was measured in this process.
    pub(crate) fn of(label: &str, line: &str, mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        Self { label: label.to_owned(), line: line.to_owned(), figures, peak_kib: None, failure: None }
    }

    /// How many times the least the most is.
    pub(crate) fn spread(&self) -> Option<f64> {
        self.figures.last().zip(self.figures.first()).map(|(most, least)| most / least)
    }

    /// The middle one of the runs.
    pub(crate) fn median(&self) -> Option<f64> {
        self.figures.get(self.figures.len() / 2).copied().filter(|_| self.failure.is_none())
    }
}

/// Lets contenders take turns: one run each to warm up, in which memory is measured, then `rounds` timed runs each.
/// Of a contender that fails, the failure is kept.
pub(crate) fn alternate(contenders: &[Contender], rounds: usize) -> Vec<Measured> {
    let warm_up = |contender: &Contender| {
        let (peak_kib, failure) = match contender.peak_kib() {
            Ok(peak) => (peak, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let (label, line) = (contender.label.to_owned(), contender.line.clone());
        Measured { label, line, figures: Vec::new(), peak_kib, failure }
    };
    let mut measured: Vec<Measured> = contenders.iter().map(warm_up).collect();
    for _ in 0..rounds {
        for (contender, measured) in contenders.iter().zip(&mut measured) {
            if measured.failure.is_some() {
                continue;
            }
            match contender.run() {
                Ok(seconds) => measured.figures.push(seconds),
                Err(error) => measured.failure = Some(error.to_string()),
            }
        }
    }
    for measured in &mut measured {
        measured.figures.sort_by(f64::total_cmp);
    }
    measured
}

/// Something that gives a figure each time it is run, for the most part inside this process.
pub(crate) struct Sampler<'a> {
    label: &'static str,
    line: String,
    run: Box<dyn FnMut() -> Outcome<f64> + 'a>,
}

impl<'a> Sampler<'a> {
    /// A name in the table, what it does, and how.
    pub(crate) fn new(label: &'static str, line: impl Into<String>, run: impl FnMut() -> Outcome<f64> + 'a) -> Self {
        Self { label, line: line.into(), run: Box::new(run) }
    }
}

/// Lets samplers take turns: one run each to warm up, then `rounds` that count. Of one that fails, the failure is kept.
pub(crate) fn alternate_samples(mut samplers: Vec<Sampler<'_>>, rounds: usize) -> Vec<Measured> {
    let mut measured: Vec<Measured> =
        samplers.iter().map(|sampler| Measured::of(sampler.label, &sampler.line, Vec::new())).collect();
    for round in 0..=rounds {
        for (sampler, measured) in samplers.iter_mut().zip(&mut measured) {
            if measured.failure.is_some() {
                continue;
            }
            match (sampler.run)() {
                Ok(figure) if round > 0 => measured.figures.push(figure),
                Ok(_) => {}
                Err(error) => measured.failure = Some(error.to_string()),
            }
        }
    }
    for measured in &mut measured {
        measured.figures.sort_by(f64::total_cmp);
    }
    measured
}
