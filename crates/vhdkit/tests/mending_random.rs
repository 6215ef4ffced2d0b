//! Several kinds of damage at once, to random images: whatever comes of it, repair does what it planned and can be undone,
//! and recover makes an image that opens.
//!
//! `VHDKIT_MENDING_SEED=N` looks at one of them again, and
//! `VHDKIT_MENDING_SEEDS=100000 cargo test --release -p vhdkit --test mending_random` is the long mode.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::sync::Arc;

use vhdkit::error::ErrorKind;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::recover::{RecoverOptions, recover};
use vhdkit::ops::repair::{RepairOptions, apply, plan, restore};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::damage::{self, Edit};
use vhdkit_testkit::{RandomOptions, Rng, SparseFile, random_dirty_plan, random_image};

const MIB: u64 = 1 << 20;
const PIECE: usize = 64 << 10;

fn storage(file: &SparseFile) -> Arc<dyn Storage> {
    let memory = MemoryStorage::with_len(file.len());
    for (offset, bytes) in file.segments() {
        memory.write_at(bytes, offset).unwrap();
    }
    Arc::new(memory)
}

/// A random image with one to four kinds of damage, or bits flipped anywhere in its structures.
fn broken(seed: u64) -> SparseFile {
    let mut rng = Rng::new(seed);
    let options =
        RandomOptions { virtual_size_max: 16 * MIB, blocks_max: 6, ..RandomOptions::chain(1 + (seed % 2) as usize) };
    let mut image = random_image(seed, &options);
    if rng.below(4) == 0 {
        random_dirty_plan(seed, &image).apply(&mut image);
    }
    let all = damage::all(&image);
    let mut file = image.file.clone();
    for _ in 0..=rng.below(4) {
        all[rng.below(all.len() as u64) as usize].apply(&mut file);
    }
    for _ in 0..rng.below(6) {
        let places = [image.layout.bat, image.layout.metadata, image.layout.metadata + 65_536, image.layout.header(0)];
        let offset = places[rng.below(4) as usize] + rng.below(256);
        let edits = vec![Edit::Flip(offset, rng.below(8) as u8)];
        damage::Damage { name: String::new(), edits }.apply(&mut file);
    }
    file
}

/// Every piece of the disk, where it can be read.
fn pieces(image: &Image) -> Vec<Option<Vec<u8>>> {
    let size = image.size().min(32 * MIB);
    let read = |start: u64| {
        let mut bytes = vec![0; PIECE.min((size - start) as usize)];
        image.read_at(&mut bytes, start).is_ok().then_some(bytes)
    };
    (0..size).step_by(PIECE).map(read).collect()
}

/// The length, and every piece that is not zero.
fn bytes(storage: &Arc<dyn Storage>) -> (u64, Vec<(u64, Vec<u8>)>) {
    let length = storage.len().unwrap();
    let (mut all, mut position) = (Vec::new(), 0);
    while let Some(data) = storage.next_data(position..length).unwrap() {
        let start = data.start - data.start % PIECE as u64;
        let mut bytes = vec![0; (length - start).min(PIECE as u64) as usize];
        storage.read_at(&mut bytes, start).unwrap();
        position = start + bytes.len() as u64;
        if bytes.iter().any(|byte| *byte != 0) {
            all.push((start, bytes));
        }
    }
    (length, all)
}

fn judge(seed: u64) {
    let file = storage(&broken(seed));
    let alone = OpenOptions::new().without_parents();
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    match recover(&file, None, &target, &RecoverOptions::default(), &()) {
        Ok(report) => {
            let image = OpenOptions::new().write(true).open(target, None).unwrap();
            assert_eq!(image.size(), report.disk_size, "seed {seed}");
        }
        Err(error) => assert!(error.kind() != ErrorKind::Io, "seed {seed}: {error}"),
    }
    let readable = alone.open(Arc::clone(&file), None).map(|image| pieces(&image)).unwrap_or_default();
    let before = bytes(&file);
    let Ok(planned) = plan(&file, None, &RepairOptions::default(), &()) else { return };
    assert!(bytes(&file) == before, "seed {seed}: planning wrote");
    if !planned.changes_anything() {
        return;
    }
    let undo = MemoryStorage::new();
    apply(&file, &planned, &undo, &mut || Ok(()), &()).unwrap();
    let after = check(&file, None, &CheckOptions::default(), &()).unwrap();
    let shown =
        |findings: &[vhdkit::format::finding::Finding]| findings.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(shown(&planned.after.findings), shown(&after.findings), "seed {seed}");
    let now = pieces(&alone.open(Arc::clone(&file), None).unwrap());
    for (number, (old, new)) in readable.iter().zip(&now).enumerate() {
        assert!(old.is_none() || old == new, "seed {seed}: piece {number} was readable, and is another now");
    }
    restore(file.as_ref(), &undo, &()).unwrap();
    assert!(bytes(&file) == before, "seed {seed}: not what it was");
}

#[test]
fn nothing_gets_worse() {
    let seeds = std::env::var("VHDKIT_MENDING_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(80);
    if let Some(seed) = std::env::var("VHDKIT_MENDING_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return judge(seed);
    }
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    std::thread::scope(|scope| {
        for first in 0..threads {
            scope.spawn(move || (first..seeds).step_by(threads as usize).for_each(judge));
        }
    });
}
