//! Processes that are killed while they write: what they said was flushed is there.
//!
//! A child process, this same program, writes to a real file by a list of operations that its seed names, and says on a
//! pipe which flush has returned. It is killed at a random moment; its successor opens the same file and goes on. This
//! proves what the death of a process leaves; the loss of power is the simulator's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared modules")]

mod write_support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhdkit::image::{BlockDevice, FileResolver, OpenOptions};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{CrashImage, ImageJudge, SectorHistory, fill_stamp, frozen_parents, verify_view};
use vhdkit_testkit::sparse::SparseFile;
use vhdkit_testkit::spec::MIB;
use write_support::reader::current;
use write_support::watched::sim;

/// Says to the child which image to write, and by which list.
const IMAGE: &str = "VHDKIT_KILL_IMAGE";
const SEED: &str = "VHDKIT_KILL_SEED";

/// Kills of each image.
const KILLS: u64 = 50;
const DISK: u64 = 40 * MIB;
/// Sectors of a block.
const BLOCK: u64 = MIB / 512;

/// One operation; ranges in sectors.
#[derive(Clone, Debug)]
enum Operation {
    Write(Range<u64>),
    Zero(Range<u64>),
    Discard(Range<u64>),
    Flush,
}

/// The operation of a number; the same for who writes and who judges.
fn operation(seed: u64, number: u64) -> Operation {
    let mut rng = Rng::new(seed.wrapping_mul(1_000_003).wrapping_add(number));
    let block = rng.below(DISK / MIB - 1) * BLOCK;
    match rng.below(10) {
        0 | 1 => Operation::Flush,
        2 => Operation::Zero(block..block + BLOCK),
        3 => Operation::Discard(block..block + BLOCK),
        4 => {
            let first = block + BLOCK - rng.between(1, 9);
            Operation::Write(first..first + rng.between(10, 60))
        }
        _ => {
            let first = block + rng.below(BLOCK - 16);
            Operation::Write(first..first + rng.between(1, 16))
        }
    }
}

fn stamps(sectors: &Range<u64>, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; ((sectors.end - sectors.start) * 512) as usize];
    for (sector, piece) in sectors.clone().zip(bytes.chunks_exact_mut(512)) {
        fill_stamp(sector, version, piece);
    }
    bytes
}

fn version(seed: u64, number: u64) -> u64 {
    (seed << 32) + number
}

/// The child: writes until it is killed.
#[test]
#[ignore = "killed by the other test, which starts it"]
fn child() {
    // Whoever runs all ignored tests starts it too.
    let Some(path) = std::env::var_os(IMAGE) else { return };
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let parents = Arc::new(FileResolver::new().allow_own_directory());
    let image = OpenOptions::new().write(true).replay(true).parents(parents).open_path(Path::new(&path)).unwrap();
    let mut out = std::io::stdout();
    for number in 0.. {
        match operation(seed, number) {
            Operation::Write(sectors) => {
                image.write_at(&stamps(&sectors, version(seed, number)), sectors.start * 512).unwrap();
            }
            Operation::Zero(sectors) => image.write_zeroes(sectors.start * 512..sectors.end * 512, true).unwrap(),
            Operation::Discard(sectors) => image.discard(sectors.start * 512..sectors.end * 512).unwrap(),
            Operation::Flush => {
                image.flush().unwrap();
                writeln!(out, "flushed {number}").unwrap();
                out.flush().unwrap();
            }
        }
    }
}

/// Starts a child, kills it after a while, and gives the number of the last flush that it has reported.
fn kill_one(path: &Path, seed: u64, after: Duration) -> Option<u64> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(IMAGE, path).env(SEED, seed.to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        let numbers = output
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| line.rsplit_once("flushed ").and_then(|(_, number)| number.parse().ok()));
        numbers.last()
    });
    std::thread::sleep(after);
    assert!(child.try_wait().unwrap().is_none(), "the child has ended by itself");
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

/// What the list has done up to a flush for certain, and may have done up to the second flush behind it.
fn follow(history: &mut SectorHistory, seed: u64, flushed: Option<u64>) {
    let mut behind = 0;
    for number in 0.. {
        let certain = flushed.is_some_and(|flushed| number <= flushed);
        let ticket = match operation(seed, number) {
            Operation::Flush if certain => {
                let flush = history.start_flush();
                history.finish_flush(flush);
                continue;
            }
            Operation::Flush => {
                // It may have returned without being reported, and what follows up to the next one not.
                behind += 1;
                if behind == 2 {
                    return;
                }
                continue;
            }
            Operation::Write(sectors) => {
                history.start_write_of(sectors.start, &stamps(&sectors, version(seed, number)))
            }
            Operation::Zero(sectors) => history.start_zero(sectors),
            Operation::Discard(sectors) => history.start_discard(sectors),
        };
        if certain {
            history.finish(ticket);
        }
    }
}

fn images() -> Vec<(&'static str, BuiltImage)> {
    let pattern = |seed| BlockSpec::present(Content::Sparse { seed, stride: 31 });
    let dynamic =
        (0..6).fold(ImageBuilder::new(DISK, 1 << 20), |builder, block| builder.block(block * 5, pattern(block)));
    let base = (0..9).fold(ImageBuilder::new(30 * MIB, 2 << 20), |builder, block| builder.block(block, pattern(block)));
    let base = Arc::new(base.named("base.vhdx").build());
    let partial = |seed| BlockSpec::partial(Content::pattern(seed), SectorMask::random(seed, 30, 50));
    let child = (0..6).fold(ImageBuilder::new(DISK, 1 << 20).differencing(&base), |builder, block| {
        builder.block(block * 4, partial(block))
    });
    vec![("dynamic", dynamic.build()), ("child", child.named("child.vhdx").build())]
}

#[test]
fn two_hundred_processes_are_killed_while_they_write() {
    let began = Instant::now();
    let (mut kills, mut dirty, mut reported) = (0, 0, 0);
    for round in 0..2_u64 {
        for (name, built) in images() {
            let directory = tempfile::tempdir().unwrap();
            let path = built.write_chain(directory.path()).unwrap();
            let parents =
                built.parent.as_ref().map(|parent| frozen_parents(vec![CrashImage::new(sim(&parent.file).pages())]));
            let judge = ImageJudge { parents: parents.clone(), ..ImageJudge::default() };
            let mut history = SectorHistory::of_model(&built.model);
            let mut rng = Rng::new(round);
            for kill in 0..KILLS {
                let seed = 1 + round * 1000 + kill;
                // Some die before they have opened the image, most in the middle of something.
                let after = Duration::from_micros(rng.between(2_000, 90_000));
                let flushed = kill_one(&path, seed, after);
                reported += u64::from(flushed.is_some());
                follow(&mut history, seed, flushed);
                let storage: Arc<dyn Storage> =
                    Arc::new(FileStorage::open(&path, FileAccess::Read, Sharing::Normal).unwrap());
                let context = format!("{name}, round {round}, kill {kill} after {after:?}, flushed {flushed:?}");
                let verdict = verify_view(&storage, &history, &judge);
                verdict.unwrap_or_else(|error| panic!("{context}: {error}"));
                let options = OpenOptions::new();
                let options = match &parents {
                    Some(parents) => options.parents(Arc::clone(parents)),
                    None => options,
                };
                let image = options.open(Arc::clone(&storage), None).unwrap();
                dirty += u64::from(image.layers()[0].replay().is_some());
                let settled =
                    history.settle_all(|bytes, at| image.read_at(bytes, at).map_err(|error| error.to_string()));
                settled.unwrap_or_else(|error| panic!("{context}: {error}"));
                kills += 1;
            }
            finish(name, &path, &history, &judge);
        }
    }
    assert_eq!(kills, 200);
    println!("{kills} kills, {dirty} left a dirty log, {reported} had reported a flush, {:?}", began.elapsed());
    assert!(dirty >= 60 && reported >= 60, "{dirty} dirty, {reported} reported: they die too early to prove anything");
}

/// The last one is replayed in place, and closed for good.
fn finish(name: &str, path: &Path, history: &SectorHistory, judge: &ImageJudge) {
    let parents = Arc::new(FileResolver::new().allow_own_directory());
    let image = OpenOptions::new().write(true).replay(true).parents(parents).open_path(path).unwrap();
    image.replay().unwrap();
    image.close().unwrap();
    drop(image);
    assert_eq!(current(&SparseFile::from_path(path).unwrap()).log_guid, Guid::ZERO);
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, FileAccess::Read, Sharing::Normal).unwrap());
    verify_view(&storage, history, judge).unwrap_or_else(|error| panic!("{name}, at the end: {error}"));
}
