//! Looking after disks beside what people do today: a conversion to a new file, and a comparison.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use vhdkit::image::{BlockDevice as _, Image, OpenOptions};
use vhdkit::units::{GIB, MIB};

use super::measure::{Sampler, alternate_samples};
use super::rows::{OURS, QEMU, noise, remove};
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// Bytes that are moved, and bytes that a child holds.
const MOVED_BYTES: u64 = 512 * MIB;
/// The label of the plain copy of as many bytes.
const CP: &str = "cp";

fn vhdkit(bench: &Bench, words: &[&str]) -> Outcome {
    shell::output(Command::new(&bench.vhdkit).args(words)).map(drop)
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()).into())
}

/// Runs a command; seconds taken.
fn seconds(command: &mut Command) -> Outcome<f64> {
    let start = Instant::now();
    shell::output(command)?;
    Ok(start.elapsed().as_secs_f64())
}

/// An image of 2 GiB in blocks of 1 MiB.
fn fresh(bench: &Bench, path: &Path) -> Outcome<Image> {
    remove(path)?;
    vhdkit(bench, &["create", "--quiet", "--size", "2G", "--block-size", "1M", text(path)?])?;
    Ok(OpenOptions::new().write(true).open_path(path)?)
}

/// Fills a range with noise.
fn fill(image: &Image, from: u64, bytes: u64) -> Outcome {
    let mut buffer = vec![0; 1 << 20];
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for offset in (from..from + bytes).step_by(1 << 20) {
        noise(&mut seed, &mut buffer);
        image.write_at(&buffer, offset)?;
    }
    Ok(())
}

/// An image with 1 GiB of data whose first half was trimmed: 512 MiB lie at the end of its file, behind as many of nothing.
fn with_a_hole(bench: &Bench, path: &Path) -> Outcome {
    let image = fresh(bench, path)?;
    fill(&image, 0, 2 * MOVED_BYTES)?;
    image.discard(0..MOVED_BYTES)?;
    image.flush()?;
    Ok(image.close()?)
}

fn copy(from: &Path, to: &Path) -> Outcome {
    remove(to)?;
    shell::output(Command::new("cp").arg("--sparse=always").arg(from).arg(to)).map(drop)
}

/// A new file with the same contents, and a comparison of both.
fn convert_and_compare(source: &Path, target: &Path) -> Outcome<f64> {
    remove(target)?;
    let start = Instant::now();
    shell::output(Command::new(QEMU).args(["convert", "-f", "vhdx", "-O", "vhdx"]).args([source, target]))?;
    shell::output(Command::new(QEMU).args(["compare", "-f", "vhdx", "-F", "vhdx"]).args([source, target]))?;
    let taken = start.elapsed().as_secs_f64();
    remove(target)?;
    Ok(taken)
}

/// Copies as many bytes as are moved, into a file that is there.
fn copy_moved(source: &Path, target: &Path) -> Outcome<f64> {
    remove(target)?;
    let taken = seconds(Command::new(CP).arg("--sparse=never").args([source, target]))?;
    remove(target)?;
    Ok(taken)
}

fn files<const N: usize>(bench: &Bench, names: [&str; N]) -> [PathBuf; N] {
    names.map(|name| bench.memory.join(name))
}

/// Moving blocks into holes.
pub(super) fn compact_moving(bench: &Bench) -> Outcome<Row> {
    let [source, ours, theirs, raw, copied] =
        files(bench, ["source.vhdx", "ours.vhdx", "theirs.vhdx", "raw", "copied"]);
    with_a_hole(bench, &source)?;
    remove(&raw)?;
    super::rows::dense(&raw, MOVED_BYTES)?;
    let words = ["compact", "--quiet", "--no-zero-scan", "--no-filesystems"];
    let run_ours = || {
        copy(&source, &ours)?;
        seconds(Command::new(&bench.vhdkit).args(words).arg(&ours))
    };
    let samplers = vec![
        Sampler::new(OURS, format!("vhdkit {} $M/ours.vhdx", words.join(" ")), run_ours),
        Sampler::new(CP, "cp --sparse=never of 512 MiB", || copy_moved(&raw, &copied)),
        Sampler::new(QEMU, "qemu-img convert -O vhdx, then qemu-img compare", || convert_and_compare(&source, &theirs)),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    for file in [&source, &ours, &raw] {
        remove(file)?;
    }
    let title = "An image with 1 GiB of data, of which the first half was trimmed: 512 MiB are moved to the front of the \
                 file, in memory. cp writes as many bytes into a new file.";
    let goals = vec![Goal::Ratio(CP, 1.1), Goal::Ratio(QEMU, 1.0)];
    Ok(Row { title, measured, goals, unit: Unit::Seconds })
}

/// The same on a disk, to the medium: there the file system may share what is copied, for both.
pub(super) fn compact_moving_on_disk(bench: &Bench) -> Outcome<Row> {
    let [source, ours, raw, copied] = ["source.vhdx", "ours.vhdx", "raw", "copied"].map(|name| bench.disk.join(name));
    with_a_hole(bench, &source)?;
    remove(&raw)?;
    super::rows::dense(&raw, MOVED_BYTES)?;
    let words = ["compact", "--quiet", "--no-zero-scan", "--no-filesystems"];
    let sync = |path: &Path| shell::output(Command::new("sync").arg(path)).map(drop);
    let run_ours = || {
        copy(&source, &ours)?;
        sync(&ours)?;
        seconds(Command::new(&bench.vhdkit).args(words).arg(&ours))
    };
    let run_cp = || {
        remove(&copied)?;
        let start = Instant::now();
        shell::output(Command::new(CP).args(["--sparse=never", "--reflink=never"]).args([&raw, &copied]))?;
        sync(&copied)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let samplers = vec![
        Sampler::new(OURS, format!("vhdkit {} $T/ours.vhdx", words.join(" ")), run_ours),
        Sampler::new(CP, "cp --sparse=never --reflink=never of 512 MiB, then sync", run_cp),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    for file in [&source, &ours, &raw, &copied] {
        remove(file)?;
    }
    let title = "The same on a disk, everything synced before and at the end.";
    Ok(Row { title, measured, goals: vec![Goal::Ratio(CP, 1.1)], unit: Unit::Seconds })
}

/// Looking what would be gained, with nothing in the page cache.
pub(super) fn compact_dry_run(bench: &Bench) -> Outcome<Row> {
    let [raw, image] = ["ext4.raw", "ext4.vhdx"].map(|name| bench.disk.join(name));
    remove(&raw)?;
    remove(&image)?;
    let file = fs::File::create(&raw)?;
    file.set_len(1 << 40)?;
    drop(file);
    shell::output(
        Command::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&raw),
    )?;
    vhdkit(bench, &["convert", "--quiet", text(&raw)?, text(&image)?, "--block-size", "1M"])?;
    remove(&raw)?;
    // 20 GiB of blocks, of which the file system knows nothing: a sector in each is enough for the image.
    let disk = OpenOptions::new().write(true).open_path(&image)?;
    for block in 0..20 * 1024 {
        disk.write_at(&[7; 512], 500 * GIB + block * MIB)?;
    }
    disk.close()?;
    drop(disk);
    let words = ["compact", "--dry-run", "--no-zero-scan", "--quiet"];
    let run = || {
        shell::output(Command::new("sync").arg(&image))?;
        // As the superuser only; the file alone otherwise.
        if fs::write("/proc/sys/vm/drop_caches", "3").is_err() {
            let of = format!("of={}", image.display());
            shell::output(Command::new("dd").args([&of, "oflag=nocache", "conv=notrunc,fdatasync", "count=0"]))?;
        }
        seconds(Command::new(&bench.vhdkit).args(words).arg(&image))
    };
    let samplers = vec![Sampler::new(OURS, format!("vhdkit {} $D/ext4.vhdx", words.join(" ")), run)];
    let measured = alternate_samples(samplers, bench.rounds);
    remove(&image)?;
    let title =
        "What could be gained from 1 TiB with an ext4 and 20 GiB of blocks, the page cache dropped before each run.";
    Ok(Row { title, measured, goals: vec![Goal::Seconds(5.0)], unit: Unit::Seconds })
}

/// Merging a child that holds a part of the disk.
pub(super) fn merge(bench: &Bench) -> Outcome<Row> {
    let [base, parent, child, theirs, raw, copied] =
        files(bench, ["base.vhdx", "parent.vhdx", "child.vhdx", "theirs.vhdx", "raw", "copied"]);
    let image = fresh(bench, &base)?;
    fill(&image, 0, GIB)?;
    image.close()?;
    drop(image);
    remove(&raw)?;
    super::rows::dense(&raw, MOVED_BYTES)?;
    let run_ours = || {
        copy(&base, &parent)?;
        remove(&child)?;
        vhdkit(bench, &["create", "--quiet", text(&child)?, "--parent", text(&parent)?, "--block-size", "1M"])?;
        vhdkit(bench, &["write", "--quiet", text(&child)?, "--offset", "512M", "--input", text(&raw)?])?;
        seconds(Command::new(&bench.vhdkit).args(["merge", "--quiet", "--delete"]).arg(&child))
    };
    let samplers = vec![
        Sampler::new(OURS, "vhdkit merge --quiet --delete $M/child.vhdx", run_ours),
        Sampler::new(CP, "cp --sparse=never of 512 MiB", || copy_moved(&raw, &copied)),
        Sampler::new(QEMU, "qemu-img convert -O vhdx of the parent alone, then qemu-img compare", || {
            convert_and_compare(&base, &theirs)
        }),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    for file in [&base, &parent, &raw] {
        remove(file)?;
    }
    let title = "A child with 512 MiB into a parent with 1 GiB, in memory. QEMU has no children; a chain is made one file \
                 by converting the whole of it.";
    let goals = vec![Goal::Ratio(CP, 1.3), Goal::Ratio(QEMU, 1.0)];
    Ok(Row { title, measured, goals, unit: Unit::Seconds })
}

/// A size that needs nothing to be moved.
pub(super) fn resize(bench: &Bench) -> Outcome<Row> {
    let (source, image) = (bench.disk.join("source.vhdx"), bench.disk.join("resized.vhdx"));
    let theirs = bench.disk.join("theirs.vhdx");
    let made = fresh(bench, &source)?;
    fill(&made, 0, GIB)?;
    made.close()?;
    drop(made);
    copy(&source, &image)?;
    let mut larger = false;
    let run = || {
        larger = !larger;
        let size = if larger { "40G" } else { "2G" };
        seconds(Command::new(&bench.vhdkit).args(["resize", "--quiet"]).arg(&image).arg(size))
    };
    let samplers = vec![
        Sampler::new(OURS, "vhdkit resize --quiet $D/resized.vhdx 40G, then 2G, in turns", run),
        Sampler::new(QEMU, "qemu-img convert -O vhdx, then qemu-img compare", || convert_and_compare(&source, &theirs)),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    remove(&image)?;
    remove(&source)?;
    let title = "A disk with 1 GiB of data made larger and smaller, on a disk, syncs included.";
    Ok(Row { title, measured, goals: vec![Goal::Seconds(0.2), Goal::Ratio(QEMU, 0.1)], unit: Unit::Seconds })
}

/// What a child changed, by its tables.
pub(super) fn diff(bench: &Bench) -> Outcome<Row> {
    let [base, child, theirs] = files(bench, ["base.vhdx", "child.vhdx", "theirs.vhdx"]);
    let image = fresh(bench, &base)?;
    fill(&image, 0, GIB)?;
    image.close()?;
    drop(image);
    remove(&child)?;
    vhdkit(bench, &["create", "--quiet", text(&child)?, "--parent", text(&base)?, "--block-size", "1M"])?;
    let options = OpenOptions::new().write(true);
    let parents = vhdkit::image::FileResolver::new().allow_own_directory();
    let image = options.parents(std::sync::Arc::new(parents)).open_path(&child)?;
    fill(&image, 256 * MIB, MOVED_BYTES)?;
    image.close()?;
    drop(image);
    let samplers = vec![
        Sampler::new(OURS, "vhdkit diff --json $M/child.vhdx", || {
            seconds(Command::new(&bench.vhdkit).args(["diff", "--json"]).arg(&child))
        }),
        Sampler::new(QEMU, "qemu-img convert -O vhdx of the parent, then qemu-img compare", || {
            convert_and_compare(&base, &theirs)
        }),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    remove(&base)?;
    remove(&child)?;
    let title =
        "What a child with 512 MiB changed in a disk with 1 GiB, in memory; no payload is read (a test counts that).";
    Ok(Row { title, measured, goals: vec![Goal::Seconds(0.05), Goal::Ratio(QEMU, 0.1)], unit: Unit::Seconds })
}
