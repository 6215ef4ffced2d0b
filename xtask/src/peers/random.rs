//! Random 4 KiB reads inside this process: the library beside plain `pread` in the same loop.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::units::GIB;

use super::measure::{Sampler, alternate_samples};
use super::rows::{OURS, dense};
use super::{Bench, Goal, Row, Unit};
use crate::shell::{self, Outcome};

/// Bytes of the disk.
pub(super) const DISK_BYTES: u64 = GIB;
/// Bytes of a read or write.
pub(super) const READ_BYTES: usize = 4096;
/// Reads of one thread in a sample: about a tenth of a second.
const READS: u64 = 100_000;
/// The label of the peer.
const PREAD: &str = "pread";

/// Reads or writes at random places of a disk of 1 GiB with so many threads; operations per second of all together.
/// Every outcome is looked at.
pub(super) fn sample<R>(threads: u64, operations: u64, operate: R) -> Outcome<f64>
where
    R: Fn(&mut [u8], u64) -> bool + Sync,
{
    let one = |seed: u64| {
        let mut buffer = [0x5a; READ_BYTES];
        let mut state = seed;
        let mut good = true;
        for _ in 0..operations {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let offset = (state >> 33) % (DISK_BYTES / READ_BYTES as u64) * READ_BYTES as u64;
            good &= operate(&mut buffer, offset);
            black_box(&buffer);
        }
        good
    };
    let start = Instant::now();
    let good = std::thread::scope(|scope| {
        let one = &one;
        let running: Vec<_> = (1..threads).map(|seed| scope.spawn(move || one(seed))).collect();
        let mine = one(0);
        running.into_iter().fold(mine, |good, thread| thread.join().unwrap_or(false) && good)
    });
    let seconds = start.elapsed().as_secs_f64();
    if good { Ok((threads * operations) as f64 / seconds) } else { Err("a read or write failed".into()) }
}

/// The same bytes must come out of both before it means anything how fast.
fn compare(image: &Image, raw: &File) -> Outcome {
    let (mut ours, mut theirs) = ([0; READ_BYTES], [0; READ_BYTES]);
    for offset in (0..DISK_BYTES).step_by(64 << 20) {
        image.read_at(&mut ours, offset)?;
        raw.read_exact_at(&mut theirs, offset)?;
        if ours != theirs {
            return Err(format!("the image differs from its source at {offset:#x}").into());
        }
    }
    Ok(())
}

fn random(bench: &Bench, threads: u64, title: &'static str) -> Outcome<Row> {
    let (raw, vhdx) = (bench.memory.join("dense.raw"), bench.memory.join("random.vhdx"));
    dense(&raw, DISK_BYTES)?;
    if !Path::new(&vhdx).exists() {
        shell::output(Command::new(&bench.vhdkit).arg("convert").arg(&raw).arg(&vhdx))?;
    }
    let image = OpenOptions::new().open_path(&vhdx)?;
    let raw = File::open(&raw)?;
    compare(&image, &raw)?;
    let samplers = vec![
        Sampler::new(OURS, "Image::read_at of 4 KiB", || {
            sample(threads, READS, |buffer, offset| image.read_at(buffer, offset).is_ok())
        }),
        Sampler::new(PREAD, "FileExt::read_exact_at of 4 KiB", || {
            sample(threads, READS, |buffer, offset| raw.read_exact_at(buffer, offset).is_ok())
        }),
    ];
    // Samples are short, so there can be more of them than of commands.
    let measured = alternate_samples(samplers, bench.rounds * 3);
    Ok(Row { title, measured, goals: vec![Goal::Rate(PREAD, 0.95)], unit: Unit::PerSecond })
}

pub(crate) fn one_thread(bench: &Bench) -> Outcome<Row> {
    random(bench, 1, "Random 4 KiB reads of a full 1 GiB dynamic image in page cache, in one process, one thread.")
}

pub(crate) fn two_threads(bench: &Bench) -> Outcome<Row> {
    random(bench, 2, "Random 4 KiB reads of a full 1 GiB dynamic image in page cache, in one process, two threads.")
}
