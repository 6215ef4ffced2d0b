//! Writing into fresh images inside this process: first writes, a whole disk front to back, and the memory it takes.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use vhdkit::image::{BlockDevice as _, Image, OpenOptions};
use vhdkit::units::{GIB, MIB};

use super::measure::{Measured, Sampler, alternate_samples};
use super::rows::{OURS, QEMU, noise, remove};
use super::work::{self, WRITE_BYTES};
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// First writes of a run, one in each block of 1 MiB.
const FIRST_WRITES: u64 = 4096;
/// What QEMU does of them on a disk, where it syncs so often that more would take minutes.
const FIRST_WRITES_QEMU_DISK: u64 = 256;
/// The library grows a file in steps of so much.
const GROWTH_STEP: u64 = 64 * MIB;
/// Where the first block of a fresh image lies, behind headers, log, metadata and BAT of 1 MiB each.
const FIRST_BLOCK: u64 = 4 * MIB;
/// Where its log lies.
const LOG: u64 = MIB;
/// About what the library logs for 4096 new blocks: 8 pages of the BAT and their descriptors.
const LOG_BYTES: usize = 40 << 10;
/// The label of the writes without an image.
const BY_HAND: &str = "by hand";
/// The label of a plain file.
const RAW: &str = "raw file";

/// Makes a fresh dynamic image of 4 GiB with blocks of 1 MiB.
pub(super) fn create(bench: &Bench, path: &Path) -> Outcome {
    remove(path)?;
    let words = ["create", "--size", "4G", "--block-size", "1M"];
    shell::output(Command::new(&bench.vhdkit).args(words).arg(path))?;
    Ok(())
}

fn open(path: &Path) -> Outcome<Image> {
    Ok(OpenOptions::new().write(true).open_path(path)?)
}

/// First writes into a fresh image; writes per second. Opening and closing are not in the time, the start of the session
/// is.
fn first_own(bench: &Bench, path: &Path) -> Outcome<f64> {
    create(bench, path)?;
    let image = open(path)?;
    let start = Instant::now();
    for block in 0..FIRST_WRITES {
        image.write_at(&[0x5a; WRITE_BYTES], block * MIB)?;
    }
    image.flush()?;
    let seconds = start.elapsed().as_secs_f64();
    image.close()?;
    remove(path)?;
    Ok(FIRST_WRITES as f64 / seconds)
}

/// The same payload in the same places of a file, and as much of metadata as is needed to find it again.
fn first_by_hand(path: &Path) -> Outcome<f64> {
    remove(path)?;
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let mut length = FIRST_BLOCK;
    file.set_len(length)?;
    file.sync_all()?;
    let start = Instant::now();
    for block in 0..FIRST_WRITES {
        let place = FIRST_BLOCK + block * MIB;
        if place + MIB > length {
            length += GROWTH_STEP;
            file.set_len(length)?;
        }
        file.write_all_at(&[0x5a; WRITE_BYTES], place)?;
    }
    file.sync_data()?;
    file.write_all_at(&[0x5a; LOG_BYTES], LOG)?;
    file.sync_data()?;
    let seconds = start.elapsed().as_secs_f64();
    drop(file);
    remove(path)?;
    Ok(FIRST_WRITES as f64 / seconds)
}

/// The same by QEMU, which tells how long its requests took without opening and closing.
fn first_by_qemu(path: &Path, words: &[String]) -> Outcome<f64> {
    remove(path)?;
    let create = ["create", "-q", "-f", "vhdx", "-o", "block_size=1M"];
    shell::output(Command::new(QEMU).args(create).arg(path).arg("4G"))?;
    let text = shell::output(Command::new(QEMU).args(words).arg(path))?;
    remove(path)?;
    let seconds = text.lines().find_map(|line| line.strip_prefix("Run completed in ")?.strip_suffix(" seconds."));
    let seconds: f64 = seconds.ok_or("qemu-img bench does not tell how long it took")?.parse()?;
    Ok(seconds)
}

fn first_writes(bench: &Bench, folder: &Path, qemu_writes: u64, title: &'static str) -> Outcome<Row> {
    let [ours, by_hand, theirs] = ["ours.vhdx", "hand.raw", "theirs.vhdx"].map(|name| folder.join(name));
    // One request after another, and one flush after the last.
    let words =
        format!("bench -w -t writeback -f vhdx -d 1 -s 4096 -S 1M -c {qemu_writes} --flush-interval={qemu_writes}");
    let line = format!("{QEMU} {words} {}", theirs.display());
    let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    let samplers = vec![
        Sampler::new(OURS, "Image::write_at of 4 KiB every 1 MiB, one Image::flush", || first_own(bench, &ours)),
        Sampler::new(BY_HAND, "set_len in steps of 64 MiB, pwrite, fdatasync, pwrite of 40 KiB, fdatasync", || {
            first_by_hand(&by_hand)
        }),
        Sampler::new(QEMU, line, || Ok(qemu_writes as f64 / first_by_qemu(&theirs, &words)?)),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    let goals = vec![Goal::Rate(BY_HAND, 0.8), Goal::Rate(QEMU, 50.0)];
    Ok(Row { title, measured, goals, unit: Unit::PerSecond })
}

pub(crate) fn first_in_memory(bench: &Bench) -> Outcome<Row> {
    let title = "4096 first writes of 4 KiB, one in each block of 1 MiB of a fresh dynamic image, and one flush at the end, \
                 in memory (tmpfs), where syncs cost nothing. Opening and closing are not in the time, of none of them.";
    first_writes(bench, &bench.memory, FIRST_WRITES, title)
}

pub(crate) fn first_on_disk(bench: &Bench) -> Outcome<Row> {
    let title = "The same on a disk, where syncs cost most; vhdkit's five for the start of a session are in the time. QEMU \
                 does only 256 of the writes.";
    first_writes(bench, &bench.disk, FIRST_WRITES_QEMU_DISK, title)
}

/// Bytes of a request of the sequential write.
const REQUEST_BYTES: usize = 1 << 20;

/// User and system time of this process.
fn processor_time() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Writes 1 GiB front to back and flushes; seconds, and seconds of processor time.
fn sequential(write: impl Fn(&[u8], u64) -> Outcome, flush: impl Fn() -> Outcome) -> Outcome<[f64; 2]> {
    let mut buffer = vec![0; REQUEST_BYTES];
    noise(&mut 0x9e37_79b9_7f4a_7c15, &mut buffer);
    let (start, processor) = (Instant::now(), processor_time());
    for offset in (0..GIB).step_by(REQUEST_BYTES) {
        write(&buffer, offset)?;
    }
    flush()?;
    Ok([start.elapsed().as_secs_f64(), processor_time() - processor])
}

fn sequential_own(bench: &Bench, path: &Path) -> Outcome<[f64; 2]> {
    remove(path)?;
    shell::output(Command::new(&bench.vhdkit).args(["create", "--size", "1G"]).arg(path))?;
    let image = open(path)?;
    let figures = sequential(|bytes, offset| Ok(image.write_at(bytes, offset)?), || Ok(image.flush()?))?;
    image.close()?;
    remove(path)?;
    Ok(figures)
}

fn sequential_raw(path: &Path) -> Outcome<[f64; 2]> {
    remove(path)?;
    let file = File::options().write(true).create_new(true).open(path)?;
    let figures = sequential(|bytes, offset| Ok(file.write_all_at(bytes, offset)?), || Ok(file.sync_data()?))?;
    drop(file);
    remove(path)?;
    Ok(figures)
}

/// The rate decides, unless raw runs are too unlike each other; then the processor time does. Both are told.
fn sequential_goal(measured: &[Measured; 4]) -> Goal {
    const LEAST_RATE: f64 = 0.9;
    const SPREAD_MAX: f64 = 1.5;
    const PROCESSOR_MAX: f64 = 1.1;
    let [ours, raw, our_processor, raw_processor] = measured;
    let times = |one: &Measured, other: &Measured| {
        one.median().zip(other.median()).map_or(f64::NAN, |(one, other)| one / other)
    };
    let (rate, processor) = (times(raw, ours), times(our_processor, raw_processor));
    let spread = raw.spread().unwrap_or(f64::NAN);
    let by_rate = spread <= SPREAD_MAX;
    let holds = if by_rate { rate >= LEAST_RATE } else { processor <= PROCESSOR_MAX };
    let which = if by_rate { "so the rate decides" } else { "so the processor time decides" };
    let what = format!(
        "at least {:.0} % of the rate of `{RAW}`: {:.1} %; at most {PROCESSOR_MAX:.2} times its user and system time: \
         {processor:.2}; raw runs spread by {spread:.2} (more than {SPREAD_MAX} is too much), {which}",
        LEAST_RATE * 100.0,
        rate * 100.0
    );
    Goal::Holds(what, holds)
}

/// Both meet memory that was in use a moment ago. A virtual machine whose host takes free memory back pays for each page that
/// was free for some seconds, whoever is the first to need it.
fn sequential_write(bench: &Bench, folder: &Path, title: &'static str) -> Outcome<Row> {
    let [vhdx, raw] = ["ours.vhdx", "raw.raw"].map(|name| folder.join(name));
    let warm = || sequential_raw(&raw);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..=bench.rounds {
        warm()?;
        let own = sequential_own(bench, &vhdx)?;
        warm()?;
        let plain = sequential_raw(&raw)?;
        if round > 0 {
            ours.push(own);
            theirs.push(plain);
        }
    }
    let wall = |figures: &[[f64; 2]]| figures.iter().map(|[wall, _]| *wall).collect();
    let processor = |figures: &[[f64; 2]]| figures.iter().map(|[_, processor]| *processor).collect();
    let measured = [
        Measured::of(OURS, "Image::write_at of 1 MiB, one Image::flush", wall(&ours)),
        Measured::of(RAW, "FileExt::write_all_at of 1 MiB, fdatasync", wall(&theirs)),
        Measured::of("vhdkit, processor time", "user and system time of the same runs", processor(&ours)),
        Measured::of("raw file, processor time", "user and system time of the same runs", processor(&theirs)),
    ];
    let goals = vec![sequential_goal(&measured)];
    Ok(Row { title, measured: measured.into(), goals, unit: Unit::Seconds })
}

pub(crate) fn sequential_in_memory(bench: &Bench) -> Outcome<Row> {
    let title = "1 GiB front to back into a fresh dynamic image, requests of 1 MiB and one flush at the end, in memory \
                 (tmpfs). Creating, opening and closing are not in the time. Before each timed run a raw file was written and \
                 removed, so that all meet the same memory.";
    sequential_write(bench, &bench.memory, title)
}

pub(crate) fn sequential_on_disk(bench: &Bench) -> Outcome<Row> {
    sequential_write(bench, &bench.disk, "The same on a disk.")
}

/// Blocks that are written to, each in a page of the BAT of its own.
const TOUCHED: u64 = 10_000;

/// One run of the work in a process of its own: seconds, and its largest resident set in KiB.
fn memory_once(bench: &Bench, path: &PathBuf) -> Outcome<(f64, u64)> {
    remove(path)?;
    let words = ["create", "--size", "64T", "--block-size", "1M"];
    shell::output(Command::new(&bench.vhdkit).args(words).arg(path))?;
    let start = Instant::now();
    let printed = shell::output(&mut work::command("memory", path, TOUCHED)?)?;
    let seconds = start.elapsed().as_secs_f64();
    remove(path)?;
    Ok((seconds, printed.trim().parse()?))
}

pub(crate) fn memory(bench: &Bench) -> Outcome<Row> {
    let path = bench.memory.join("large.vhdx");
    let runs: Vec<(f64, u64)> = (0..bench.rounds).map(|_| memory_once(bench, &path)).collect::<Outcome<_>>()?;
    let mut measured =
        Measured::of(OURS, &work::line("memory", &path, TOUCHED), runs.iter().map(|(seconds, _)| *seconds).collect());
    measured.peak_kib = runs.iter().map(|(_, peak)| *peak).max();
    let title = "A 64 TiB disk with blocks of 1 MiB, open for writing: 10,000 writes of 4 KiB, each to a block in another \
                 page of the BAT, and a flush; in memory (tmpfs). The peak is the largest VmHWM of a process of its own.";
    Ok(Row { title, measured: vec![measured], goals: vec![Goal::PeakMib(64)], unit: Unit::Seconds })
}
