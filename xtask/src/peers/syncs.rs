//! How many disk syncs first writes cost, each followed by a flush: counted in the storage and by strace.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::measure::Measured;
use super::rows::{OURS, QEMU, remove};
use super::work;
use super::writes::create;
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// Calls that make something durable by themselves.
const SYNCS: [&str; 6] = ["fsync", "fdatasync", "sync_file_range", "sync", "syncfs", "msync"];
/// Calls that do when the file was opened for that, or when they are told to.
const WRITES: [&str; 5] = ["write", "pwrite64", "writev", "pwritev", "pwritev2"];
/// Calls whose syncs strace does not see. None are expected.
const UNSEEN: [&str; 2] = ["io_submit", "io_uring_enter"];
/// Calls that open files.
const OPENS: [&str; 2] = ["openat", "openat2"];

/// Counts what makes something durable in what strace wrote: syncs, writes with RWF_DSYNC or RWF_SYNC, and writes to a
/// file that was opened with O_DSYNC or O_SYNC.
fn count(trace: &str) -> Outcome<u64> {
    let mut synchronous = HashSet::new();
    let mut syncs = 0;
    for line in trace.lines() {
        // "1234  fdatasync(5) = 0"; what was interrupted by another thread's line is resumed in a line that begins
        // with "<..." and is not counted twice
        let call = line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
        let Some((name, rest)) = call.split_once('(') else { continue };
        let file = || rest.split([',', ')', ' ']).next().unwrap_or_default().to_owned();
        if UNSEEN.contains(&name) {
            return Err(format!("{name} was called, whose syncs do not show").into());
        } else if OPENS.contains(&name) && (rest.contains("O_DSYNC") || rest.contains("O_SYNC")) {
            let opened = rest.rsplit_once("= ").map(|(_, result)| result.trim());
            synchronous.extend(opened.map(str::to_owned));
        } else if SYNCS.contains(&name) {
            syncs += 1;
        } else if WRITES.contains(&name) {
            let told = rest.contains("RWF_DSYNC") || rest.contains("RWF_SYNC");
            syncs += u64::from(told || synchronous.contains(&file()));
        }
    }
    Ok(syncs)
}

/// Runs a command under strace: what it printed, and its syncs.
fn traced(bench: &Bench, command: &Command) -> Outcome<(String, u64)> {
    let trace = bench.disk.join("strace");
    let calls = [&SYNCS[..], &WRITES, &UNSEEN, &OPENS].concat().join(",");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-s", "0", "-e"]).arg(format!("trace={calls}")).arg("-o").arg(&trace);
    let printed = shell::output(strace.arg(command.get_program()).args(command.get_args()))?;
    let syncs = count(&fs::read_to_string(&trace)?)?;
    fs::remove_file(&trace)?;
    Ok((printed, syncs))
}

/// The same by QEMU.
fn by_qemu(bench: &Bench, writes: u64) -> Outcome<(String, u64)> {
    let image = bench.disk.join("theirs.vhdx");
    remove(&image)?;
    shell::output(
        Command::new(QEMU).args(["create", "-q", "-f", "vhdx", "-o", "block_size=1M"]).arg(&image).arg("4G"),
    )?;
    // Without "-t writeback" it would flush after each write by itself.
    let mut command = Command::new("qemu-io");
    command.args(["-f", "vhdx", "-t", "writeback"]);
    for number in 0..writes {
        command.args(["-c", &format!("write -q -P 90 {number}M 4k"), "-c", "flush"]);
    }
    let (_, syncs) = traced(bench, command.arg(&image))?;
    remove(&image)?;
    let line = "qemu-io -f vhdx -t writeback -c \"write -q -P 90 0M 4k\" -c flush ... theirs.vhdx";
    Ok((line.to_owned(), syncs))
}

fn own(bench: &Bench, image: &Path, writes: u64) -> Outcome<[u64; 2]> {
    create(bench, image)?;
    let (printed, traced) = traced(bench, &work::command("syncs", image, writes)?)?;
    remove(image)?;
    Ok([printed.trim().parse()?, traced])
}

fn syncs(bench: &Bench, writes: u64, qemu: bool, title: &'static str) -> Outcome<Row> {
    let image = bench.disk.join("ours.vhdx");
    let line = work::line("syncs", &image, writes);
    let [counted, traced] = own(bench, &image, writes)?;
    let mut measured = vec![
        Measured::of(OURS, &line, vec![counted as f64]),
        Measured::of("vhdkit, by strace", &line, vec![traced as f64]),
    ];
    if qemu {
        let (line, syncs) = by_qemu(bench, writes)?;
        measured.push(Measured::of("qemu-io, by strace", &line, vec![syncs as f64]));
    }
    let most = 2 * writes + 12;
    let what = format!("at most 2 x {writes} + 12 = {most} syncs: {counted} asked of the storage, {traced} by strace");
    let goals = vec![Goal::Holds(what, counted <= most && traced <= most)];
    Ok(Row { title, measured, goals, unit: Unit::Count })
}

pub(crate) fn few(bench: &Bench) -> Outcome<Row> {
    let title = "Disk syncs of 64 first writes of 4 KiB, one in each block of 1 MiB, with a flush after each, opening and \
                 closing included; counted in one run in a wrapper of the storage and by strace (fsync, fdatasync and \
                 the like, RWF_DSYNC, writes to what is open with O_DSYNC or O_SYNC).";
    syncs(bench, 64, true, title)
}

pub(crate) fn many(bench: &Bench) -> Outcome<Row> {
    syncs(bench, 1000, false, "The same with 1000 first writes.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_makes_durable_is_counted_once() {
        let trace = "\
100   openat(AT_FDCWD, \"/tmp/a\"..., O_RDWR|O_CLOEXEC) = 3
100   openat(AT_FDCWD, \"/tmp/b\"..., O_RDWR|O_DSYNC|O_CLOEXEC) = 4
100   pwrite64(3, \"\"..., 4096, 0) = 4096
100   pwrite64(4, \"\"..., 4096, 0) = 4096
100   write(4, \"\"..., 1) = 1
100   fdatasync(3) = 0
101   fsync(3 <unfinished ...>
100   pwritev2(3, [{iov_base=\"\"..., iov_len=512}], 1, 0, RWF_DSYNC) = 512
100   pwritev2(3, [{iov_base=\"\"..., iov_len=512}], 1, 0, 0) = 512
101   <... fsync resumed>) = 0
100   sync_file_range(3, 0, 0, SYNC_FILE_RANGE_WRITE) = 0
100   +++ exited with 0 +++
";
        assert_eq!(count(trace).unwrap(), 6);
        count("100 io_uring_enter(5, 1, 0, 0, NULL, 8) = 1\n").unwrap_err();
    }
}
