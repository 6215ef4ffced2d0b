//! What is measured, and what must be reached.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdkit::format::bat::{BatEntry, PayloadState};
use vhdkit::format::finding::{FailFast, Strictness};
use vhdkit::format::region;
use vhdkit::format::space::TakenSpace;
use vhdkit::units::{FileOffset, GIB, MIB};

use super::measure::{Contender, alternate};
use super::{Bench, Goal, Row, Unit};
use super::{maintain, nbd, overwrites, random, syncs, writes};
use crate::shell::{self, Outcome};

type Make = fn(&Bench) -> Outcome<Row>;

/// Every row, by name.
pub(crate) const ROWS: [(&str, Make); 39] = [
    ("dense raw to VHDX", dense_in),
    ("dense VHDX to raw", dense_out),
    ("sparse raw to VHDX", sparse_in),
    ("sparse VHDX to raw", sparse_out),
    ("reflink raw to fixed VHDX", reflink_in),
    ("reflink fixed VHDX to raw", reflink_out),
    ("info of 64 TiB", info_own),
    ("map of 64 TiB", map_own),
    ("info of 64 TiB by QEMU", info_qemu),
    ("map of 64 TiB by QEMU", map_qemu),
    ("check of 64 TiB", check_full),
    ("random reads, one thread", random::one_thread),
    ("random reads, two threads", random::two_threads),
    ("first writes in memory", writes::first_in_memory),
    ("first writes on a disk", writes::first_on_disk),
    ("syncs of 64 first writes", syncs::few),
    ("syncs of 1000 first writes", syncs::many),
    ("random overwrites, one thread", overwrites::one_thread),
    ("random overwrites, two threads", overwrites::two_threads),
    ("sequential write in memory", writes::sequential_in_memory),
    ("sequential write on a disk", writes::sequential_on_disk),
    ("memory of writing 64 TiB", writes::memory),
    ("compact, moving", maintain::compact_moving),
    ("compact, moving on a disk", maintain::compact_moving_on_disk),
    ("compact, dry run of 1 TiB", maintain::compact_dry_run),
    ("merge", maintain::merge),
    ("resize", maintain::resize),
    ("diff of two layers", maintain::diff),
    ("nbd random reads, depth 32", nbd::random_reads),
    ("nbd random reads on a disk, depth 32", nbd::random_reads_on_disk),
    ("nbd random writes, depth 32", nbd::random_writes),
    ("nbd random writes on a disk, depth 32", nbd::random_writes_on_disk),
    ("nbd random reads, depth 1", nbd::single_reads),
    ("nbd sequential reads, depth 8", nbd::sequential_reads),
    ("nbd sequential writes, depth 8", nbd::sequential_writes),
    ("nbd first writes in memory", nbd::first_in_memory),
    ("nbd first writes on a disk", nbd::first_on_disk),
    ("nbd cold reads, depth 32", nbd::cold_reads),
    ("nbd memory of 16 connections", nbd::memory),
];

/// The label of this project's command.
pub(super) const OURS: &str = "vhdkit";
/// The label of QEMU's.
pub(super) const QEMU: &str = "qemu-img";
/// The label of the copy that writes every byte.
const CP_DENSE: &str = "cp --sparse=never";
/// The label of the copy that leaves out zeros.
const CP_SPARSE: &str = "cp --sparse=always";
/// The label of the copy that shares extents.
const CP_REFLINK: &str = "cp --reflink=always";

fn line(program: &Path, words: &str, files: [&Path; 2]) -> String {
    format!("{} {words} {} {}", program.display(), files[0].display(), files[1].display())
}

/// Fills a buffer with bytes that neither compress nor repeat.
pub(crate) fn noise(seed: &mut u64, buffer: &mut [u8]) {
    for word in buffer.chunks_mut(8) {
        // xorshift64: no zero ever follows from a seed that is not zero
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        for (to, from) in word.iter_mut().zip(seed.to_le_bytes()) {
            *to = from;
        }
    }
}

/// Writes a dense file of noise, unless it is there.
pub(crate) fn dense(path: &Path, bytes: u64) -> Outcome {
    if path.exists() {
        return Ok(());
    }
    let mut file = BufWriter::new(File::create(path)?);
    let mut buffer = vec![0; 1 << 20];
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..bytes / MIB {
        noise(&mut seed, &mut buffer);
        file.write_all(&buffer)?;
    }
    Ok(file.into_inner()?.sync_all()?)
}

/// Runs of data of the sparse disk, and bytes of each: 500 MiB, scattered as a used file system scatters them.
const SPARSE_RUNS: u64 = 8000;
const SPARSE_RUN_BYTES: u64 = 64 << 10;

/// A disk of 20 GiB that holds 500 MiB, the rest holes.
fn sparse(path: &Path) -> Outcome {
    if path.exists() {
        return Ok(());
    }
    let file = File::create(path)?;
    file.set_len(20 * GIB)?;
    let mut buffer = vec![0; 64 << 10];
    let mut seed = 0x2545_f491_4f6c_dd1d;
    let slot = 20 * GIB / SPARSE_RUNS;
    for run in 0..SPARSE_RUNS {
        noise(&mut seed, &mut buffer);
        let start = run * slot + seed % (slot - SPARSE_RUN_BYTES); // each run stays inside its own slot
        file.write_all_at(&buffer, start / 4096 * 4096)?;
    }
    Ok(())
}

/// Both directions of a conversion in memory: `label` is the plain copy that stands beside.
fn into_vhdx(bench: &Bench, source: &Path, copy: (&'static str, &str)) -> Outcome<Vec<Contender>> {
    let [ours, theirs, copied] = ["ours.vhdx", "theirs.vhdx", "copy.raw"].map(|name| bench.memory.join(name));
    Ok(vec![
        Contender::making(OURS, line(&bench.vhdkit, "convert", [source, &ours]), &ours),
        Contender::making(copy.0, line(Path::new("cp"), copy.1, [source, &copied]), &copied),
        Contender::making(QEMU, line(Path::new(QEMU), "convert -f raw -O vhdx", [source, &theirs]), &theirs),
    ])
}

fn into_raw(bench: &Bench, raw: &Path, copy: (&'static str, &str)) -> Outcome<Vec<Contender>> {
    let source = bench.memory.join("source.vhdx");
    remove(&source)?;
    shell::output(Command::new(&bench.vhdkit).arg("convert").arg(raw).arg(&source))?;
    let [ours, theirs, copied] = ["ours.raw", "theirs.raw", "copy.raw"].map(|name| bench.memory.join(name));
    Ok(vec![
        Contender::making(OURS, line(&bench.vhdkit, "convert", [&source, &ours]), &ours),
        Contender::making(copy.0, line(Path::new("cp"), copy.1, [raw, &copied]), &copied),
        Contender::making(QEMU, line(Path::new(QEMU), "convert -f vhdx -O raw", [&source, &theirs]), &theirs),
    ])
}

/// Removes a file if it is there.
pub(super) fn remove(path: &Path) -> Outcome {
    if path.exists() {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Runs the contenders and frees the memory that their files took.
fn timed(bench: &Bench, contenders: &[Contender], title: &'static str, goals: Vec<Goal>) -> Outcome<Row> {
    let measured = alternate(contenders, bench.rounds);
    for target in contenders.iter().filter_map(|contender| contender.target.as_deref()) {
        remove(target)?;
    }
    Ok(Row { title, measured, goals, unit: Unit::Seconds })
}

/// Writing 1 GiB without reading anything: nothing that writes a file by system calls can be faster.
fn write_only(bench: &Bench) -> Contender {
    let target = bench.memory.join("zeros.raw");
    let line = format!("dd if=/dev/zero of={} bs=256k count=4096 status=none", target.display());
    Contender::making("dd, writing only", line, &target)
}

fn dense_in(bench: &Bench) -> Outcome<Row> {
    let source = bench.memory.join("dense.raw");
    dense(&source, GIB)?;
    let mut contenders = into_vhdx(bench, &source, (CP_DENSE, "--sparse=never"))?;
    contenders.push(write_only(bench));
    let goals = vec![Goal::Ratio(CP_DENSE, 1.0), Goal::Ratio(QEMU, 1.0 / 1.2), Goal::PeakMib(64)];
    timed(bench, &contenders, "1 GiB without a zero, raw to dynamic VHDX, in memory.", goals)
}

fn dense_out(bench: &Bench) -> Outcome<Row> {
    let raw = bench.memory.join("dense.raw");
    dense(&raw, GIB)?;
    let mut contenders = into_raw(bench, &raw, (CP_DENSE, "--sparse=never"))?;
    contenders.push(write_only(bench));
    let goals = vec![Goal::Ratio(CP_DENSE, 1.0), Goal::Ratio(QEMU, 1.0 / 1.2), Goal::PeakMib(64)];
    let row = timed(bench, &contenders, "1 GiB without a zero, dynamic VHDX to raw, in memory.", goals);
    remove(&bench.memory.join("source.vhdx"))?;
    row
}

fn sparse_in(bench: &Bench) -> Outcome<Row> {
    let source = bench.memory.join("sparse.raw");
    sparse(&source)?;
    let contenders = into_vhdx(bench, &source, (CP_SPARSE, "--sparse=always"))?;
    let goals = vec![Goal::Ratio(CP_SPARSE, 1.2), Goal::Ratio(QEMU, 1.0 / 2.5), Goal::PeakMib(64)];
    timed(
        bench,
        &contenders,
        "20 GiB that hold 500 MiB in runs of 64 KiB, raw to dynamic VHDX, in memory. With few long runs qemu-img is faster: on 125 runs of 4 MiB, in one run on the same machine, vhdkit took 0.61 of its time (0.235 s and 0.387 s), which misses this goal.",
        goals,
    )
}

fn sparse_out(bench: &Bench) -> Outcome<Row> {
    let raw = bench.memory.join("sparse.raw");
    sparse(&raw)?;
    let contenders = into_raw(bench, &raw, (CP_SPARSE, "--sparse=always"))?;
    let goals = vec![Goal::Ratio(CP_SPARSE, 1.1), Goal::Ratio(QEMU, 1.0 / 6.0), Goal::PeakMib(64)];
    let row = timed(
        bench,
        &contenders,
        "20 GiB that hold 500 MiB in runs of 64 KiB, dynamic VHDX to raw, in memory. With few long runs qemu-img is faster: on 125 runs of 4 MiB, in one run on the same machine, vhdkit took 0.20 of its time (0.228 s and 1.140 s), which misses this goal.",
        goals,
    );
    remove(&bench.memory.join("source.vhdx"))?;
    row
}

/// An XFS with reflink in a loop mount; unmounted and gone when dropped.
struct Xfs {
    image: PathBuf,
    mount: PathBuf,
}

impl Xfs {
    fn new(bench: &Bench) -> Outcome<Self> {
        let (image, mount) = (bench.disk.join("xfs.img"), bench.disk.join("xfs"));
        File::create(&image)?.set_len(24 * GIB)?;
        fs::create_dir_all(&mount)?;
        let mkfs = shell::find("mkfs.xfs").ok_or("mkfs.xfs is not installed (xfsprogs)")?;
        shell::output(Command::new(mkfs).args(["-q", "-m", "reflink=1"]).arg(&image))?;
        shell::output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount))?;
        Ok(Self { image, mount })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.mount.join(name)
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        if let Err(error) = shell::output(Command::new("umount").arg(&self.mount)) {
            eprintln!("{error}");
            return;
        }
        let _ = fs::remove_file(&self.image); // the folder is temporary and goes anyway
    }
}

/// Blocks of 4 KiB of a file that share their place with another file, by the FIEMAP that filefrag prints.
fn shared_blocks(file: &Path) -> Outcome<u64> {
    let text = shell::output(Command::new("filefrag").args(["-v", "-b4096"]).arg(file))?;
    let shared = text.lines().filter(|line| line.contains("shared"));
    // "   0:        0..  262143:      12345..    274488: 262144:             last,shared,eof"
    Ok(shared.filter_map(|line| line.split(':').nth(3)?.trim().parse::<u64>().ok()).sum())
}

fn reflink(bench: &Bench, back: bool) -> Outcome<Row> {
    const BYTES: u64 = 4 * GIB;
    let xfs = Xfs::new(bench)?;
    let [raw, fixed, ours, copied] =
        ["source.raw", "fixed.vhdx", if back { "ours.raw" } else { "ours.vhdx" }, "copy"].map(|name| xfs.file(name));
    dense(&raw, BYTES)?;
    let mut source = &raw;
    if back {
        shell::output(Command::new(&bench.vhdkit).args(["convert", "--fixed"]).arg(&raw).arg(&fixed))?;
        source = &fixed;
    }
    shell::output(Command::new("sync").arg("-f").arg(&xfs.mount))?;
    let words = if back { "convert" } else { "convert --fixed" };
    let (from, to) = (source.display(), copied.display());
    let contenders = [
        Contender::making(OURS, line(&bench.vhdkit, words, [source, &ours]), &ours),
        Contender::making(CP_REFLINK, format!("cp --reflink=always {from} {to} && sync -d {to}"), &copied),
    ];
    let measured = alternate(&contenders, bench.rounds);
    let shared = shared_blocks(&ours).unwrap_or(0);
    let what = format!("{} of {} MiB of disk share extents with the source (filefrag -v)", shared >> 8, BYTES >> 20);
    let goals = vec![Goal::Seconds(0.2), Goal::Holds(what, shared >= BYTES >> 12), Goal::PeakMib(64)];
    let title = if back {
        "4 GiB, fixed VHDX to raw, on an XFS with reflink, source synced first."
    } else {
        "4 GiB, raw to fixed VHDX, on an XFS with reflink, source synced first."
    };
    Ok(Row { title, measured, goals, unit: Unit::Seconds })
}

fn reflink_in(bench: &Bench) -> Outcome<Row> {
    reflink(bench, false)
}

fn reflink_out(bench: &Bench) -> Outcome<Row> {
    reflink(bench, true)
}

/// A disk of 64 TiB with blocks of 1 MiB, made by `vhdkit create`, with one block put into use.
fn one_block(bench: &Bench) -> Outcome<PathBuf> {
    let path = bench.memory.join("one-block.vhdx");
    if path.exists() {
        return Ok(path);
    }
    let words = ["create", "--size", "64T", "--block-size", "1M"];
    shell::output(Command::new(&bench.vhdkit).args(words).arg(&path))?;
    let file = File::options().read(true).write(true).open(&path)?;
    let length = file.metadata()?.len();
    let mut tables = [vec![0; region::TABLE_BYTES], vec![0; region::TABLE_BYTES]];
    for (table, offset) in tables.iter_mut().zip(region::OFFSETS) {
        file.read_exact_at(table, offset)?;
    }
    let [first, second] = &tables;
    let mut findings = FailFast::new(Strictness::Normal);
    let table = region::decode_tables([first, second], length, &mut TakenSpace::default(), &mut findings)?;
    let block = length.next_multiple_of(MIB);
    file.set_len(block + MIB)?;
    file.write_all_at(&[0x5a; 1 << 20], block)?;
    // The first entry of the BAT is that of block 0.
    let entry = BatEntry::new(PayloadState::FullyPresent.number(), FileOffset(block));
    file.write_all_at(&entry.0.to_le_bytes(), table.bat.file_offset)?;
    Ok(path)
}

/// The same made by QEMU, whose table holds 512 MiB of ZERO entries.
fn by_qemu(bench: &Bench) -> Outcome<PathBuf> {
    let path = bench.memory.join("by-qemu.vhdx");
    if !path.exists() {
        let words = ["create", "-q", "-f", "vhdx", "-o", "block_size=1M"];
        shell::output(Command::new(QEMU).args(words).arg(&path).arg("64T"))?;
    }
    Ok(path)
}

fn looked_at(bench: &Bench, path: &Path, command: &str, title: &'static str, goals: Vec<Goal>) -> Outcome<Row> {
    let options = if command == "map" { "-f vhdx --output=json" } else { "-f vhdx" };
    let contenders = [
        Contender::new(OURS, format!("{} {command} {}", bench.vhdkit.display(), path.display())),
        Contender::new(QEMU, format!("{QEMU} {command} {options} {}", path.display())),
    ];
    timed(bench, &contenders, title, goals)
}

fn info_own(bench: &Bench) -> Outcome<Row> {
    let path = one_block(bench)?;
    let title = "64 TiB disk with blocks of 1 MiB, made by `vhdkit create`, one block in use.";
    looked_at(bench, &path, "info", title, vec![Goal::Seconds(0.02), Goal::PeakMib(16)])
}

fn map_own(bench: &Bench) -> Outcome<Row> {
    let path = one_block(bench)?;
    let title = "64 TiB disk with blocks of 1 MiB, made by `vhdkit create`, one block in use.";
    let row = looked_at(bench, &path, "map", title, vec![Goal::Seconds(0.02), Goal::PeakMib(16)]);
    remove(&path)?;
    row
}

fn info_qemu(bench: &Bench) -> Outcome<Row> {
    let path = by_qemu(bench)?;
    let title = "64 TiB disk with blocks of 1 MiB, made by `qemu-img create`.";
    looked_at(bench, &path, "info", title, vec![Goal::Seconds(0.02), Goal::PeakMib(16)])
}

fn map_qemu(bench: &Bench) -> Outcome<Row> {
    let path = by_qemu(bench)?;
    let title = "64 TiB disk with blocks of 1 MiB, made by `qemu-img create`.";
    let row = looked_at(bench, &path, "map", title, vec![Goal::Seconds(0.3), Goal::PeakMib(16)]);
    remove(&path)?;
    row
}

fn check_full(bench: &Bench) -> Outcome<Row> {
    let xfs = Xfs::new(bench)?;
    let path = xfs.file("full.vhdx");
    let words = ["create", "--fixed", "--block-size", "1M", "--size", "64T", "--preallocate", "none"];
    shell::output(Command::new(&bench.vhdkit).args(words).arg(&path))?;
    let title = "64 TiB disk with all 67,108,864 blocks of 1 MiB mapped, a sparse file on an XFS.";
    looked_at(bench, &path, "check", title, vec![Goal::Seconds(3.0), Goal::PeakMib(64)])
}
