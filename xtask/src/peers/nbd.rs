//! NBD servers, measured by fio through a Unix socket: vhdkit's beside those of nbdkit and QEMU, and beside two that show
//! what the socket and fio allow.
//!
//! Rows keep their files in memory (tmpfs) unless they say otherwise. That is page cache and nothing else: there is no
//! writeback that starts when the kernel likes to, takes one of few processors, and hits whoever is at turn. But a server
//! may know that nothing in tmpfs ever waits for a medium, so what counts most is measured on a disk as well, everything
//! in page cache again, and all that is dirty written back before each run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdkit::units::{GIB, MIB};

use super::measure::{Measured, Sampler, alternate_samples};
use super::nbd_fio::{self, Figure, Job};
use super::nbd_servers::{Disk, Kind, NBDKIT, NULL, POLLING, QEMU_NBD, Server};
use super::rows::remove;
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// The disk that lies in page cache.
const WARM: Disk = Disk { bytes: GIB, block_bytes: None };
/// The disk that is read from a device: more than 5 s of random reads fetch.
const COLD: Disk = Disk { bytes: 4 * GIB, block_bytes: None };
/// Blocks of the disk of first writes. fio counts milliseconds, and this many take more than a hundred.
const FIRST_BLOCKS: u64 = 16384;
/// The disk of first writes, with as large blocks as the writes lie apart.
const FIRST: Disk = Disk { bytes: FIRST_BLOCKS * MIB, block_bytes: Some(MIB) };

/// How a disk is filled through the server that is measured, and how it is seen that it holds what was written.
#[derive(Clone, Copy)]
struct Fill {
    write: &'static str,
    check: &'static str,
}

/// How a disk in page cache is filled: page after page.
const FILL_PAGES: Fill = Fill {
    write: "--rw=write --bs=4k --iodepth=1 --size=100% --end_fsync=1 --verify=crc32c --do_verify=0",
    check: "--rw=read --bs=4k --iodepth=32 --size=100% --verify=crc32c --verify_fatal=1",
};
/// How a disk is filled whose page cache is dropped afterwards.
const FILL_QUICKLY: Fill = Fill {
    write: "--rw=write --bs=1m --iodepth=8 --size=100% --end_fsync=1 --verify=crc32c --do_verify=0",
    check: "--rw=read --bs=1m --iodepth=8 --size=100% --verify=crc32c --verify_fatal=1",
};

/// Without these there is nothing to compare.
fn tools() -> Outcome {
    for (tool, package) in [("fio", "fio"), ("nbdkit", "nbdkit"), ("qemu-nbd", "qemu-utils"), ("timeout", "coreutils")]
    {
        shell::find(tool).ok_or_else(|| format!("{tool} is not installed ({package})"))?;
    }
    let engines = shell::output(Command::new("fio").arg("--enghelp"))?;
    if engines.lines().any(|line| line.trim() == "nbd") { Ok(()) } else { Err("this fio has no nbd engine".into()) }
}

/// A server whose disk is full. The disk is made and filled unless an earlier row has done so.
fn full(bench: &Bench, kind: Kind, path: &Path, disk: Disk, fill: Fill) -> Outcome<Server> {
    let is_new = kind.has_file() && !path.exists();
    if is_new {
        kind.create(bench, path, disk)?;
    }
    let filled = Server::start(bench, kind, path, disk.bytes).and_then(|server| {
        for words in [fill.write, fill.check].into_iter().filter(|_| is_new) {
            nbd_fio::run(&server, Job { words, figure: Figure::PerSecond }, None, &bench.memory)?;
        }
        Ok(server)
    });
    if is_new && filled.is_err() {
        remove(path)?;
    }
    filled
}

/// What a row of servers that stay up compares, and how.
struct Steady<'a> {
    kinds: &'a [Kind],
    folder: &'a Path,
    /// What the names of its files begin with.
    prefix: &'static str,
    disk: Disk,
    fill: Fill,
    job: Job,
    /// What is done before each run.
    before: fn() -> Outcome,
}

impl Steady<'_> {
    fn path(&self, kind: Kind) -> PathBuf {
        self.folder.join(format!("{}-{}", self.prefix, kind.file_name()))
    }

    fn remove_files(&self) -> Outcome {
        self.kinds.iter().try_for_each(|kind| remove(&self.path(*kind)))
    }
}

/// Starts all servers, lets fio take turns between them, and looks at their memory before they end.
fn steady(bench: &Bench, row: &Steady<'_>) -> Outcome<Vec<Measured>> {
    tools()?;
    let servers: Vec<Result<Server, String>> = row
        .kinds
        .iter()
        .map(|kind| full(bench, *kind, &row.path(*kind), row.disk, row.fill).map_err(|error| error.to_string()))
        .collect();
    let mut samplers = Vec::new();
    for (kind, server) in row.kinds.iter().zip(&servers) {
        let line = Server::line(bench, *kind, &row.path(*kind), row.disk.bytes)?;
        samplers.push(Sampler::new(kind.label(), line, || {
            let server = server.as_ref().map_err(Clone::clone)?;
            (row.before)()?;
            nbd_fio::run(server, row.job, Some(bench.seconds), &bench.memory)
        }));
    }
    let mut measured = alternate_samples(samplers, bench.rounds);
    for (server, measured) in servers.into_iter().zip(&mut measured) {
        let Ok(server) = server else { continue };
        measured.peak_kib = server.peak_kib();
        if let Err(error) = server.stop() {
            measured.failure.get_or_insert(error.to_string());
        }
    }
    Ok(measured)
}

/// A row of servers whose files are in memory, where they stay for the rows that follow.
fn warm(bench: &Bench, kinds: &[Kind], job: Job) -> Outcome<Vec<Measured>> {
    let (folder, prefix, before) = (&bench.memory, "full", || Ok(()));
    steady(bench, &Steady { kinds, folder, prefix, disk: WARM, fill: FILL_PAGES, job, before })
}

/// A row of servers whose files are on a disk and in page cache. Until their pages are old enough for the kernel to begin
/// with writing them back, a run is over.
fn warm_on_disk(bench: &Bench, job: Job) -> Outcome<Vec<Measured>> {
    let (folder, prefix) = (&bench.disk, "full");
    let row = Steady { kinds: &ALL, folder, prefix, disk: WARM, fill: FILL_PAGES, job, before: write_back };
    let measured = steady(bench, &row);
    row.remove_files()?;
    measured
}

/// Writes back what is dirty in the page cache.
fn write_back() -> Outcome {
    shell::output(&mut Command::new("sync")).map(drop)
}

/// All but vhdkit that polls.
const ALL: [Kind; 5] = [Kind::Vhdkit, Kind::Nbdkit, Kind::Qemu, Kind::Prototype, Kind::Null];

/// The same, and what fio and the socket would allow if replies to reads were simple.
const READING: [Kind; 6] = [Kind::Vhdkit, Kind::Nbdkit, Kind::Qemu, Kind::Prototype, Kind::Null, Kind::NullSimple];

/// Random reads at depth 32.
const RANDOM_READS: Job = Job { words: "--rw=randread --bs=4k --iodepth=32", figure: Figure::PerSecond };
/// Random writes at depth 32.
const RANDOM_WRITES: Job = Job { words: "--rw=randwrite --bs=4k --iodepth=32", figure: Figure::PerSecond };

fn random_reads_row(title: &'static str, measured: Vec<Measured>) -> Row {
    let goals = vec![Goal::Rate(NBDKIT, 1.7), Goal::Rate(QEMU_NBD, 6.0), Goal::Rate(NULL, 0.9)];
    Row { title, measured, goals, unit: Unit::PerSecond }
}

fn random_writes_row(title: &'static str, measured: Vec<Measured>) -> Row {
    let goals = vec![Goal::Rate(NBDKIT, 1.2), Goal::Rate(QEMU_NBD, 4.0), Goal::Rate(NULL, 0.75)];
    Row { title, measured, goals, unit: Unit::PerSecond }
}

pub(crate) fn random_reads(bench: &Bench) -> Outcome<Row> {
    let title = "Random 4 KiB reads of a full disk of 1 GiB in page cache (tmpfs), 32 at a time: \
                 `fio --ioengine=nbd --rw=randread --bs=4k --iodepth=32`.";
    Ok(random_reads_row(title, warm(bench, &READING, RANDOM_READS)?))
}

pub(crate) fn random_reads_on_disk(bench: &Bench) -> Outcome<Row> {
    let title = "The same with files on a disk, all of them in page cache.";
    Ok(random_reads_row(title, warm_on_disk(bench, RANDOM_READS)?))
}

pub(crate) fn random_writes(bench: &Bench) -> Outcome<Row> {
    let title = "Random 4 KiB writes to a full disk of 1 GiB in page cache (tmpfs), 32 at a time: \
                 `fio --ioengine=nbd --rw=randwrite --bs=4k --iodepth=32`.";
    Ok(random_writes_row(title, warm(bench, &ALL, RANDOM_WRITES)?))
}

pub(crate) fn random_writes_on_disk(bench: &Bench) -> Outcome<Row> {
    let title =
        "The same with files on a disk, all of them in page cache; what is dirty is written back before each run.";
    Ok(random_writes_row(title, warm_on_disk(bench, RANDOM_WRITES)?))
}

pub(crate) fn single_reads(bench: &Bench) -> Outcome<Row> {
    let job = Job { words: "--rw=randread --bs=4k --iodepth=1", figure: Figure::PerSecond };
    let kinds = [Kind::Vhdkit, Kind::Polling, Kind::Nbdkit, Kind::Qemu, Kind::Prototype, Kind::Null];
    let measured = warm(bench, &kinds, job)?;
    let title = "Random 4 KiB reads of a full disk of 1 GiB in page cache (tmpfs), one at a time: \
                 `fio --ioengine=nbd --rw=randread --bs=4k --iodepth=1`.";
    let goals = vec![Goal::Rate(NBDKIT, 1.0), Goal::RateOf(POLLING, NBDKIT, 2.0)];
    Ok(Row { title, measured, goals, unit: Unit::PerSecond })
}

pub(crate) fn sequential_reads(bench: &Bench) -> Outcome<Row> {
    let job = Job { words: "--rw=read --bs=1m --iodepth=8", figure: Figure::MibPerSecond };
    let measured = warm(bench, &ALL, job)?;
    let title = "1 MiB after 1 MiB read from a full disk of 1 GiB in page cache (tmpfs), 8 at a time: \
                 `fio --ioengine=nbd --rw=read --bs=1m --iodepth=8`.";
    Ok(Row { title, measured, goals: vec![Goal::Rate(NBDKIT, 1.0)], unit: Unit::MibPerSecond })
}

pub(crate) fn sequential_writes(bench: &Bench) -> Outcome<Row> {
    let job = Job { words: "--rw=write --bs=1m --iodepth=8", figure: Figure::MibPerSecond };
    let measured = warm(bench, &ALL, job)?;
    let title = "1 MiB after 1 MiB written to a full disk of 1 GiB in page cache (tmpfs), 8 at a time: \
                 `fio --ioengine=nbd --rw=write --bs=1m --iodepth=8`.";
    Ok(Row { title, measured, goals: vec![Goal::Rate(NBDKIT, 1.0)], unit: Unit::MibPerSecond })
}

pub(crate) fn memory(bench: &Bench) -> Outcome<Row> {
    let words = "--rw=randrw --bs=64k --iodepth=64 --numjobs=16";
    let job = Job { words, figure: Figure::PerSecond };
    let measured = warm(bench, &[Kind::Vhdkit, Kind::Nbdkit, Kind::Qemu], job)?;
    let title = "Random reads and writes of 64 KiB, half and half, of a full disk of 1 GiB in page cache (tmpfs), by 16 \
                 connections with 64 at a time each: \
                 `fio --ioengine=nbd --rw=randrw --bs=64k --iodepth=64 --numjobs=16`. The peak is VmHWM of the server \
                 after all its runs.";
    Ok(Row { title, measured, goals: vec![Goal::PeakMib(128)], unit: Unit::PerSecond })
}

/// Drops what is clean in the page cache. Files in memory stay.
fn drop_caches() -> Outcome {
    fs::write("/proc/sys/vm/drop_caches", "3")
        .map_err(|error| format!("the page cache cannot be dropped, which root may: {error}").into())
}

pub(crate) fn cold_reads(bench: &Bench) -> Outcome<Row> {
    drop_caches()?;
    let kinds = &[Kind::Vhdkit, Kind::Nbdkit, Kind::Qemu];
    let (folder, prefix, job, before) = (&bench.disk, "cold", RANDOM_READS, drop_caches);
    let row = Steady { kinds, folder, prefix, disk: COLD, fill: FILL_QUICKLY, job, before };
    let measured = steady(bench, &row);
    row.remove_files()?;
    let title = "Random 4 KiB reads of a full disk of 4 GiB on a disk, 32 at a time, the page cache dropped before each \
                 run: `fio --ioengine=nbd --rw=randread --bs=4k --iodepth=32`.";
    Ok(Row { title, measured: measured?, goals: vec![Goal::Rate(NBDKIT, 1.0)], unit: Unit::PerSecond })
}

/// First writes of 4 KiB, one in each MiB, and one flush, which is in fio's time as well.
const FIRST_WRITES: &str = "--rw=write:1020k --bs=4k --io_size=64m --iodepth=32 --end_fsync=1";
/// The same of as few as QEMU does in a similar time.
const FIRST_WRITES_QEMU: &str = "--rw=write:1020k --bs=4k --io_size=1m --iodepth=32 --end_fsync=1";

/// One run on a new disk with a server of its own; writes per second.
fn first_run(bench: &Bench, kind: Kind, path: &Path, words: &'static str) -> Outcome<f64> {
    kind.create(bench, path, FIRST)?;
    let server = Server::start(bench, kind, path, FIRST.bytes)?;
    let rate = nbd_fio::run(&server, Job { words, figure: Figure::PerSecond }, None, &bench.memory)?;
    server.stop()?;
    Ok(rate)
}

fn first_writes(bench: &Bench, folder: &Path, title: &'static str) -> Outcome<Row> {
    tools()?;
    let kinds = [(Kind::Vhdkit, FIRST_WRITES), (Kind::Nbdkit, FIRST_WRITES), (Kind::Qemu, FIRST_WRITES_QEMU)];
    let mut samplers = Vec::new();
    for (kind, words) in kinds {
        let path: PathBuf = folder.join(format!("first-{}", kind.file_name()));
        let line = Server::line(bench, kind, &path, FIRST.bytes)?;
        samplers.push(Sampler::new(kind.label(), line, move || {
            let rate = first_run(bench, kind, &path, words);
            remove(&path)?;
            rate
        }));
    }
    let measured = alternate_samples(samplers, bench.rounds);
    let goals = vec![Goal::Rate(QEMU_NBD, 80.0), Goal::Rate(NBDKIT, 0.5)];
    Ok(Row { title, measured, goals, unit: Unit::PerSecond })
}

pub(crate) fn first_in_memory(bench: &Bench) -> Outcome<Row> {
    let title = "16384 first writes of 4 KiB, one in each block of 1 MiB of a fresh dynamic image of 16 GiB (nbdkit: of a \
                 raw file that is one hole), 32 at a time, and one flush at the end, which is in the time; in memory \
                 (tmpfs), where syncs cost nothing. QEMU does only 256 of the writes: \
                 `fio --ioengine=nbd --rw=write:1020k --bs=4k --io_size=64m --iodepth=32 --end_fsync=1`.";
    first_writes(bench, &bench.memory, title)
}

pub(crate) fn first_on_disk(bench: &Bench) -> Outcome<Row> {
    first_writes(bench, &bench.disk, "The same on a disk, where syncs cost most.")
}
