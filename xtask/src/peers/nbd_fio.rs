//! fio with its nbd engine: one job, and the figure that comes out of it.

use std::path::Path;
use std::process::Command;

use vhdkit::units::MIB;

use super::nbd_servers::Server;
use crate::shell::{self, Outcome};

/// More than any job takes, in seconds on top of what it was told to take: then a server hangs.
const HANG_SECONDS: u64 = 600;

/// What fio does.
#[derive(Clone, Copy)]
pub(super) struct Job {
    /// Its options besides those of every job.
    pub(super) words: &'static str,
    /// What of its report counts.
    pub(super) figure: Figure,
}

/// What is read from fio's report.
#[derive(Clone, Copy)]
pub(super) enum Figure {
    /// Requests per second, reads and writes together.
    PerSecond,
    /// MiB per second, reads and writes together.
    MibPerSecond,
}

/// Runs a job for so many seconds, or until it is done where none are given; the figure.
pub(super) fn run(server: &Server, job: Job, seconds: Option<u64>, folder: &Path) -> Outcome<f64> {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", &(seconds.unwrap_or(0) + HANG_SECONDS).to_string(), "fio"]);
    command.args(["--name=nbd", "--ioengine=nbd", "--group_reporting", "--output-format=json"]);
    command.arg(format!("--uri={}", server.uri())).args(job.words.split_whitespace());
    if let Some(seconds) = seconds {
        command.arg("--time_based").arg(format!("--runtime={seconds}"));
    }
    figure(&shell::output(command.current_dir(folder))?, job.figure)
}

fn figure(report: &str, figure: Figure) -> Outcome<f64> {
    let (key, unit) = match figure {
        Figure::PerSecond => ("iops", 1.0),
        Figure::MibPerSecond => ("bw_bytes", MIB as f64),
    };
    let both = ["read", "write"].map(|direction| number(report, direction, key));
    match both {
        [Some(reads), Some(writes)] if reads + writes > 0.0 => Ok((reads + writes) / unit),
        _ => Err(format!("fio does not tell how fast it was: {report}").into()),
    }
}

/// A number of the report on reads or writes. fio puts each name and value onto a line of its own, and there is one job.
fn number(report: &str, direction: &str, key: &str) -> Option<f64> {
    let (_, section) = report.split_once(&format!("\"{direction}\" : {{"))?;
    let (_, value) = section.split_once(&format!("\"{key}\" : "))?;
    value.split([',', '\n']).next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_reads_and_writes_are_found_and_added() {
        let report = "fio: a note\n{\n \"jobs\" : [ {\n \"job options\" : {\n \"rw\" : \"read\"\n },\n\
                      \"read\" : {\n \"bw_bytes\" : 1048576,\n \"iops\" : 256.500000,\n \"iops_min\" : 7\n },\n\
                      \"write\" : {\n \"bw_bytes\" : 3145728,\n \"iops\" : 768.000000\n } } ]\n}";
        assert_eq!(figure(report, Figure::PerSecond).unwrap(), 1024.5);
        assert_eq!(figure(report, Figure::MibPerSecond).unwrap(), 4.0);
        assert!(figure("{}", Figure::PerSecond).is_err());
    }
}
