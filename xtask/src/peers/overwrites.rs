//! Random 4 KiB overwrites of mapped blocks inside this process: the library beside plain `pwrite` in the same loop.
//!
//! How fast plain `pwrite` is depends on how a file came into the page cache. So both files are filled the same way, each
//! by the one that is measured, and plain `pwrite` is measured on both: on the image's file at the places where its blocks
//! lie.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use vhdkit::image::{BlockDevice as _, ExtentKind, Image, OpenOptions};
use vhdkit::units::MIB;

use super::measure::{Measured, Sampler, alternate_samples};
use super::random::{DISK_BYTES, READ_BYTES, sample};
use super::rows::{OURS, remove};
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// Writes of one thread in a sample: some tenths of a second.
const WRITES: u64 = 300_000;
/// The label of the peer.
const PWRITE: &str = "pwrite";
/// The label of plain writes to the image's file.
const PWRITE_INTO: &str = "pwrite into the VHDX file";
/// How far plain writes to both files may lie apart for the row to mean anything.
const APART_MAX: f64 = 0.1;

/// Fills a disk front to back, 4 KiB after 4 KiB.
fn fill(write: impl Fn(&[u8], u64) -> Outcome) -> Outcome {
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    let mut buffer = [0; READ_BYTES];
    for offset in (0..DISK_BYTES).step_by(READ_BYTES) {
        super::rows::noise(&mut seed, &mut buffer);
        write(&buffer, offset)?;
    }
    Ok(())
}

/// Where each MiB of the disk lies in the file.
fn places(image: &Image) -> Outcome<Vec<u64>> {
    let mut places = Vec::new();
    image.visit_extents(0..DISK_BYTES, &mut |extent| {
        if let ExtentKind::Data { file_offset: Some(start) } = extent.kind {
            places.extend((0..extent.length / MIB).map(|mib| start + mib * MIB));
        }
        ControlFlow::Continue(())
    })?;
    if places.len() as u64 == DISK_BYTES / MIB {
        Ok(places)
    } else {
        Err("not every block of the disk is mapped".into())
    }
}

/// Whether plain writes to both files are alike, so that the row says something about the library.
fn alike(measured: &[Measured]) -> Goal {
    let rate = |label| measured.iter().find(|other| other.label == label).and_then(Measured::median);
    let apart = rate(PWRITE).zip(rate(PWRITE_INTO)).map(|(raw, into)| (into / raw - 1.0).abs());
    let shown = apart.map_or("not measured".to_owned(), |apart| format!("{:.1} %", apart * 100.0));
    let what = format!("plain writes to both files lie at most {:.0} % apart: {shown}", APART_MAX * 100.0);
    Goal::Holds(what, apart.is_some_and(|apart| apart <= APART_MAX))
}

fn make(bench: &Bench, vhdx: &Path, raw: &Path) -> Outcome<(Image, File)> {
    remove(vhdx)?;
    remove(raw)?;
    shell::output(Command::new(&bench.vhdkit).args(["create", "--size", "1G"]).arg(vhdx))?;
    let image = OpenOptions::new().write(true).open_path(vhdx)?;
    fill(|bytes, offset| Ok(image.write_at(bytes, offset)?))?;
    image.flush()?;
    let raw = File::options().read(true).write(true).create_new(true).open(raw)?;
    fill(|bytes, offset| Ok(raw.write_all_at(bytes, offset)?))?;
    raw.sync_data()?;
    Ok((image, raw))
}

fn overwrites(bench: &Bench, threads: u64, title: &'static str) -> Outcome<Row> {
    let [vhdx, raw_path] = ["overwrites.vhdx", "overwrites.raw"].map(|name| bench.memory.join(name));
    let (image, raw) = make(bench, &vhdx, &raw_path)?;
    let places = places(&image)?;
    let into = File::options().write(true).open(&vhdx)?;
    let place = |offset: u64| places.get((offset / MIB) as usize).map_or(u64::MAX, |place| place + offset % MIB);
    let samplers = vec![
        Sampler::new(OURS, "Image::write_at of 4 KiB", || {
            sample(threads, WRITES, |buffer, offset| image.write_at(buffer, offset).is_ok())
        }),
        Sampler::new(PWRITE, "FileExt::write_all_at of 4 KiB, raw file", || {
            sample(threads, WRITES, |buffer, offset| raw.write_all_at(buffer, offset).is_ok())
        }),
        Sampler::new(PWRITE_INTO, "FileExt::write_all_at of 4 KiB, where the image's blocks lie", || {
            sample(threads, WRITES, |buffer, offset| into.write_all_at(buffer, place(offset)).is_ok())
        }),
    ];
    let measured = alternate_samples(samplers, bench.rounds);
    image.close()?;
    remove(&vhdx)?;
    remove(&raw_path)?;
    let goals = vec![Goal::Rate(PWRITE, 0.95), alike(&measured)];
    Ok(Row { title, measured, goals, unit: Unit::PerSecond })
}

pub(crate) fn one_thread(bench: &Bench) -> Outcome<Row> {
    overwrites(
        bench,
        1,
        "Random 4 KiB overwrites of a full 1 GiB dynamic image in page cache (tmpfs), in one process, one thread. Image \
         and raw file were filled by 4 KiB writes front to back and synced, the image through the library.",
    )
}

pub(crate) fn two_threads(bench: &Bench) -> Outcome<Row> {
    overwrites(
        bench,
        2,
        "Random 4 KiB overwrites of a full 1 GiB dynamic image in page cache (tmpfs), in one process, two threads. Image \
         and raw file were filled by 4 KiB writes front to back and synced, the image through the library.",
    )
}
