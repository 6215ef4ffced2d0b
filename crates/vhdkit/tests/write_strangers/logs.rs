//! Logs of every size: copies of the file in the middle of a session are replayed by QEMU and by us, and hold what they
//! have to.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use vhdkit::image::simulation::start_rings_at;
use vhdkit::image::{BlockDevice as _, Image, OpenOptions};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::harness::{Case, Needs};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::{BlockSpec, Content, ImageBuilder};

use crate::array::Array;
use crate::support::{
    MIB, complaints, open, open_for_writing, qemu_check, qemu_repair, qemu_to_raw, same_as_raw, unlocked,
};
use crate::world::current_header;

const DISK: u64 = 40 * MIB + 512 * 3;
const BLOCKS: u64 = DISK.div_ceil(MIB);

/// A storage as a sparse file.
fn save(storage: &dyn Storage, path: &Path) {
    let (file, length) = (File::create(path).unwrap(), storage.len().unwrap());
    let (mut position, mut buffer) = (0, vec![0; MIB as usize]);
    while let Some(data) = storage.next_data(position..length).unwrap() {
        let part = &mut buffer[..(data.end - data.start).min(MIB) as usize];
        storage.read_at(part, data.start).unwrap();
        file.write_all_at(part, data.start).unwrap();
        position = data.start + part.len() as u64;
    }
    file.set_len(length).unwrap();
}

/// Changes the mapping in some way, so that the commit that follows has something to log.
fn step(rng: &mut Rng, image: &Image, array: &mut Array) {
    let block = rng.below(BLOCKS);
    let range = block * MIB..((block + 1) * MIB).min(DISK);
    match rng.below(5) {
        0 | 1 => {
            image.write_zeroes(range.clone(), true).unwrap();
            array.zero(range);
        }
        _ => {
            let offset = range.start + rng.below(range.end - range.start);
            let length = rng.between(1, 20_000).min(DISK - offset);
            let bytes = rng.bytes(length as usize);
            image.write_at(&bytes, offset).unwrap();
            array.write(offset, &bytes);
        }
    }
}

/// What QEMU and we make of a copy.
fn judge(name: &str, rng: &mut Rng, path: &Path, array: &Array, was_dirty: bool) {
    let raw = path.with_extension("raw");
    let ours = open(path);
    assert_eq!(ours.layers()[0].replay().is_some(), was_dirty, "{name}");
    array.compare_disk(&format!("{name}, overlay"), rng, &ours);
    // Our replay, in a copy of the copy.
    let replayed = path.with_extension("ours");
    save(&*unlocked(path, false), &replayed);
    let image = open_for_writing(&replayed);
    assert_eq!(image.replay().unwrap().is_some(), was_dirty, "{name}");
    image.close().unwrap();
    qemu_check(&replayed).unwrap_or_else(|error| panic!("{name}, replayed by us: {error}"));
    // QEMU's replay, in the copy itself.
    drop(ours);
    qemu_repair(path).unwrap_or_else(|error| panic!("{name}: {error}"));
    qemu_to_raw(path, &raw).unwrap_or_else(|error| panic!("{name}: {error}"));
    for path in [path, &replayed] {
        same_as_raw(&open(path), &raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(complaints(path).is_empty(), "{name}: {:?}", complaints(path));
    }
    let file = File::open(&raw).unwrap();
    array.compare(&format!("{name}, QEMU"), rng, |offset, length| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    });
}

/// The first sectors of the ring, which change when it begins anew.
fn ring_start(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; 3 * 4096];
    storage.read_at(&mut bytes, current_header(storage).unwrap().log_offset).unwrap();
    bytes
}

/// In memory, since nothing is pulled out here and syncs would take long.
///
/// The log of a session begins at its start, or so many sectors before its end: long ones would not be filled otherwise.
fn program(log: u64, commits: u64, before_end: Option<u64>) {
    start_rings_at(before_end.map_or(0, |sectors| log * MIB / 4096 - sectors));
    let directory = tempfile::tempdir().unwrap();
    let copied = directory.path().join("copy.vhdx");
    let built = ImageBuilder::new(DISK, 1 << 20)
        .with(|builder| builder.log_length = (log * MIB) as u32)
        .block(0, BlockSpec::present(Content::Sparse { seed: 1, stride: 97 }))
        .block(39, BlockSpec::present(Content::Sparse { seed: 2, stride: 97 }))
        .build();
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    built.file.segments().for_each(|(offset, bytes)| storage.write_at(bytes, offset).unwrap());
    storage.set_len(built.file.len()).unwrap();
    let (mut rng, mut array) = (Rng::new(log), Array::over(&built.model));
    assert_eq!(u64::from(current_header(&*storage).unwrap().log_length), log * MIB);
    let image = OpenOptions::new().write(true).open(Arc::clone(&storage), None).unwrap();
    let (mut before, mut round, mut copies) = (Vec::new(), None, 0);
    for commit in 0..commits {
        for _ in 0..rng.between(1, 3) {
            step(&mut rng, &image, &mut array);
        }
        image.flush().unwrap();
        let now = ring_start(&*storage);
        if now != before && commit > 3 {
            round = round.or(Some(commit));
        }
        before = now;
        // Now and then, and in the first commits of a new round.
        if (commit + 1) % (commits / 2) == 0 || round.is_some_and(|round| commit - round < 3) {
            copies += 1;
            save(&*storage, &copied);
            judge(&format!("log of {log} MiB, commit {commit}"), &mut rng, &copied, &array, true);
        }
    }
    start_rings_at(0);
    println!("log of {log} MiB: {commits} commits, {copies} copies, the second round begins with commit {round:?}");
    assert!(round.is_some(), "the ring of {log} MiB is so long that it was not filled");
    image.close().unwrap();
    drop(image);
    save(&*storage, &copied);
    judge(&format!("log of {log} MiB, closed"), &mut rng, &copied, &array, false);
}

pub(crate) fn cases() -> Vec<Case> {
    // An entry of one page takes two sectors of the ring, so that 128 commits are once around the smallest.
    let sizes = [(1, 300, None), (2, 500, None), (3, 700, None), (8, 1500, None), (64, 14_000, None)];
    let long = [(256, 24, Some(17)), (1024, 24, Some(17))];
    let case = |(log, commits, before_end)| {
        let name = format!("qemu_replays_a_log_of_{log}_mib");
        Case::new(name, Needs::tools(&["qemu-img"]), move || program(log, commits, before_end))
    };
    sizes.into_iter().chain(long).map(case).collect()
}
