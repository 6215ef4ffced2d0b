//! One image, many threads that write, zero, trim, plan and flush at once: nothing is torn, foreign or lost, now and after
//! opening again.
//!
//! Sectors say which sector they are and which version, so that one in a wrong place shows itself.
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

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use vhdkit::ErrorKind;
use vhdkit::image::{AtOnce, BlockDevice, Image, OpenOptions};
use vhdkit::storage::{FileAccess, FileStorage, MemoryStorage, Sharing, Storage};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::SectorMask;
use vhdkit_testkit::counting::CountingStorage;
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{Content, CrashImage, fill_stamp};
use vhdkit_testkit::spec::MIB;
use write_support::watched::sim;
use write_support::{Parents, assert_clean, load, read_by_plan, snapshot};

const SECTOR: u64 = 512;
/// Sectors of a block.
const BLOCK: u64 = MIB / SECTOR;

/// Ends the process when a test takes so long that its threads must be waiting for each other.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn new(what: &'static str) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        std::thread::spawn(move || {
            for _ in 0..1800 {
                std::thread::sleep(Duration::from_millis(100));
                if seen.load(Ordering::SeqCst) {
                    return;
                }
            }
            eprintln!("{what}: the threads wait for each other");
            std::process::abort();
        });
        Self(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A disk of 24 blocks, and the file below it.
fn dynamic() -> BuiltImage {
    ImageBuilder::new(24 * MIB, 1 << 20).build()
}

/// A child whose parent holds stamps of version 0 in every sector, and whose blocks have stale bits.
fn child() -> BuiltImage {
    let stamps = |block: u64| {
        let mut bytes = vec![0; MIB as usize];
        for (sector, piece) in (block * BLOCK..).zip(bytes.chunks_exact_mut(SECTOR as usize)) {
            fill_stamp(sector, 0, piece);
        }
        BlockSpec::present(vhdkit_testkit::content::Content::bytes(&bytes))
    };
    let base = (0..16).fold(ImageBuilder::new(16 * MIB, 1 << 20), |builder, block| builder.block(block, stamps(block)));
    let base = Arc::new(base.named("base.vhdx").build());
    let stale = || BlockSpec::new(0).with_mask(SectorMask::random(1, 9, 50));
    (0..8)
        .fold(ImageBuilder::new(24 * MIB, 1 << 20).differencing(&base), |builder, block| builder.block(block, stale()))
        .build()
}

fn parents(top: &BuiltImage) -> Arc<Parents> {
    Arc::new(Parents(top.parent.iter().map(|parent| Arc::new(load(&parent.file)) as Arc<dyn Storage>).collect()))
}

fn open(top: &BuiltImage, storage: &Arc<dyn Storage>) -> Image {
    OpenOptions::new().parents(parents(top)).write(true).open(Arc::clone(storage), None).unwrap()
}

/// Sectors of one version.
fn stamps(sectors: &Range<u64>, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; ((sectors.end - sectors.start) * SECTOR) as usize];
    for (sector, piece) in sectors.clone().zip(bytes.chunks_exact_mut(SECTOR as usize)) {
        fill_stamp(sector, version, piece);
    }
    bytes
}

fn bytes_of(sectors: &Range<u64>) -> Range<u64> {
    sectors.start * SECTOR..sectors.end * SECTOR
}

/// The versions of sectors; `None` is zeros. Anything but a stamp of this very sector ends the test.
fn versions(first: u64, bytes: &[u8]) -> Vec<Option<u64>> {
    (first..)
        .zip(bytes.chunks_exact(SECTOR as usize))
        .map(|(sector, piece)| match Content::of(piece) {
            Content::Zero => None,
            Content::Stamp { sector: found, version } => {
                assert_eq!(found, sector, "sector {sector} holds another one");
                Some(version)
            }
            Content::Other(_) => panic!("sector {sector} is torn or foreign: {:x?}", &piece[..32]),
        })
        .collect()
}

/// Whether a sector that is read while it is written may show some of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tears {
    /// Reads and writes of the storage are atomic: what memory promises.
    Never,
    /// They are not: the page cache of ext4 copies a write while it is read. What is torn is then made of versions of
    /// this very sector, or of zeros.
    WhileWritten,
}

/// True when every word of a sector is that of one of its own versions, or zero.
fn is_mixture(sector: u64, piece: &[u8], newest: u64) -> bool {
    let mut explained: Vec<bool> = piece.chunks_exact(8).map(|word| word == [0; 8]).collect();
    let mut stamp = [0; SECTOR as usize];
    for version in 0..=newest {
        fill_stamp(sector, version, &mut stamp);
        for (known, (found, word)) in explained.iter_mut().zip(piece.chunks_exact(8).zip(stamp.chunks_exact(8))) {
            *known |= found == word;
        }
    }
    explained.into_iter().all(|known| known)
}

#[test]
fn a_mixture_is_told_from_what_belongs_elsewhere() {
    let (mut old, mut new, mut other) = ([0; 512], [0; 512], [0; 512]);
    fill_stamp(5, 2, &mut old);
    fill_stamp(5, 9, &mut new);
    fill_stamp(6, 9, &mut other);
    let torn = |first: &[u8], second: &[u8]| [&first[..192], &second[192..]].concat();
    assert!(is_mixture(5, &torn(&old, &new), 9) && is_mixture(5, &torn(&new, &[0; 512]), 9));
    assert!(!is_mixture(5, &torn(&old, &new), 8), "that version is not written yet");
    assert!(!is_mixture(5, &torn(&old, &other), 9) && !is_mixture(5, &torn(&old, &[1; 512]), 9));
}

fn look(image: &Image, rng: &mut Rng, newest: &AtomicU64, tears: Tears) {
    let size = image.size() / SECTOR;
    let length = rng.between(1, 300).min(size);
    let first = rng.below(size - length + 1);
    let (first, bytes) = if rng.chance(30) {
        let (range, bytes) = read_by_plan(image, first * SECTOR..(first + length) * SECTOR);
        (range.start / SECTOR, bytes)
    } else {
        let mut bytes = vec![0xEE; (length * SECTOR) as usize];
        match image.read_at_once(&mut bytes, first * SECTOR).unwrap() {
            AtOnce::Filled => {}
            AtOnce::Zero => bytes.fill(0),
            AtOnce::Waits => image.read_at(&mut bytes, first * SECTOR).unwrap(),
        }
        (first, bytes)
    };
    let newest = newest.load(Ordering::SeqCst);
    for (sector, piece) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
        if tears == Tears::WhileWritten && matches!(Content::of(piece), Content::Other(_)) {
            assert!(is_mixture(sector, piece, newest), "sector {sector} is foreign: {:x?}", &piece[..32]);
            continue;
        }
        for version in versions(sector, piece).into_iter().flatten() {
            assert!(version <= newest, "version {version} was not written yet");
        }
    }
}

/// What one thread knows about sectors that nobody else writes.
type Own = HashMap<u64, Option<u64>>;

/// A few sectors inside a block.
fn run_in_block(rng: &mut Rng, block: u64) -> Range<u64> {
    let length = rng.pick(&[1, 1, 3, 8, 64, BLOCK]);
    let first = rng.below(BLOCK - length + 1);
    block * BLOCK + first..block * BLOCK + first + length
}

/// One write, by one of the ways there are; true when it was done.
fn put(image: &Image, rng: &mut Rng, sectors: &Range<u64>, version: u64) -> bool {
    let bytes = stamps(sectors, version);
    match rng.below(8) {
        0 | 1 => {
            let plan = image.plan_write(bytes_of(sectors)).unwrap();
            assert_eq!(plan.range(), bytes_of(sectors), "it lies in one block");
            plan.storage().write_at(&bytes, plan.file_offset()).unwrap();
            if rng.chance(30) {
                std::thread::yield_now();
            }
            plan.complete().unwrap();
        }
        2 => {
            // A plan that comes to nothing.
            if let Some(plan) = image.try_plan_write(bytes_of(sectors)).unwrap()
                && rng.chance(50)
            {
                plan.abandon();
            }
            return false;
        }
        3 => {
            if !image.write_at_once(&bytes, sectors.start * SECTOR).unwrap_or(false)
                && !image.try_write_at(&bytes, sectors.start * SECTOR).unwrap()
            {
                image.write_at(&bytes, sectors.start * SECTOR).unwrap();
            }
        }
        4 if rng.chance(20) => image.write_through_at(&bytes, sectors.start * SECTOR).unwrap(),
        _ => image.write_at(&bytes, sectors.start * SECTOR).unwrap(),
    }
    true
}

/// Everything that a thread does to blocks of its own, and to sectors of its own in blocks that all share.
fn work(image: &Image, thread: u64, threads: u64, steps: u64, newest: &AtomicU64) -> Own {
    let mut rng = Rng::new(thread);
    let mut own = Own::new();
    for _ in 0..steps {
        let version = newest.fetch_add(1, Ordering::SeqCst) + 1;
        let mine = 8 + rng.below(16 / threads) * threads + thread;
        match rng.below(20) {
            0..=8 => {
                // Blocks 0 to 7 are everybody's; sectors go by turns.
                let sector = rng.below(8 * BLOCK / threads) * threads + thread;
                if put(image, &mut rng, &(sector..sector + 1), version) {
                    own.insert(sector, Some(version));
                }
            }
            9..=13 => {
                let sectors = run_in_block(&mut rng, mine);
                if put(image, &mut rng, &sectors, version) {
                    own.extend(sectors.map(|sector| (sector, Some(version))));
                }
            }
            14 | 15 => {
                image.write_zeroes(mine * MIB..(mine + 1) * MIB, rng.chance(70)).unwrap();
                own.extend((mine * BLOCK..(mine + 1) * BLOCK).map(|sector| (sector, None)));
            }
            16 => {
                image.discard(mine * MIB..(mine + 1) * MIB).unwrap();
                let mut bytes = vec![0; MIB as usize];
                image.read_at(&mut bytes, mine * MIB).unwrap();
                own.extend((mine * BLOCK..).zip(versions(mine * BLOCK, &bytes)));
            }
            17 => image.flush().unwrap(),
            18 => drop(image.try_flush().unwrap()),
            _ => {
                let sector = rng.below(BLOCK) + mine * BLOCK;
                let mut bytes = [0; SECTOR as usize];
                image.read_at(&mut bytes, sector * SECTOR).unwrap();
                if let Some(expected) = own.get(&sector) {
                    assert_eq!(versions(sector, &bytes), [*expected], "thread {thread} reads its own sector {sector}");
                }
            }
        }
    }
    own
}

/// Threads with sectors of their own, and readers among them. What a thread reads of its own, and what is left at the
/// end, is whole in any case.
fn disjoint(name: &'static str, top: &BuiltImage, storage: Arc<dyn Storage>, steps: u64, tears: Tears) {
    let _watchdog = Watchdog::new(name);
    let image = open(top, &storage);
    let (newest, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let threads = 4;
    let mut known = Own::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (image, newest) = (&image, &newest);
                scope.spawn(move || work(image, thread, threads, steps, newest))
            })
            .collect();
        let readers: Vec<_> = (0..2)
            .map(|reader| {
                let (image, newest, stop) = (&image, &newest, &stop);
                scope.spawn(move || {
                    let mut rng = Rng::new(1000 + reader);
                    while !stop.load(Ordering::SeqCst) {
                        look(image, &mut rng, newest, tears);
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| known.extend(worker.join().unwrap()));
        stop.store(true, Ordering::SeqCst);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    let judge = |image: &Image, when: &str| {
        for first in (0..image.size() / SECTOR).step_by(BLOCK as usize) {
            let mut bytes = vec![0; MIB as usize];
            image.read_at(&mut bytes, first * SECTOR).unwrap();
            for (sector, found) in (first..).zip(versions(first, &bytes)) {
                let untouched = top.parent.is_some().then_some(0).filter(|_| sector < 16 * BLOCK);
                let expected = known.get(&sector).copied().unwrap_or(untouched);
                assert_eq!(found, expected, "{name}, {when}: sector {sector}");
            }
        }
    };
    judge(&image, "live");
    image.close().unwrap();
    drop(image);
    assert_clean(name, &storage);
    judge(&OpenOptions::new().parents(parents(top)).open(storage, None).unwrap(), "opened again");
}

#[test]
fn disjoint_writers_on_a_dynamic_disk() {
    disjoint("dynamic", &dynamic(), Arc::new(load(&dynamic().file)), 900, Tears::Never);
}

#[test]
fn disjoint_writers_on_a_child() {
    let top = child();
    disjoint("child", &top, Arc::new(load(&top.file)), 900, Tears::Never);
}

#[test]
fn disjoint_writers_where_growth_is_not_zero() {
    let storage = Arc::new(load(&dynamic().file).without_zero_growth());
    disjoint("pattern", &dynamic(), storage, 500, Tears::Never);
}

#[test]
fn disjoint_writers_in_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let top = child();
    let path = top.write_chain(directory.path()).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, FileAccess::Write, Sharing::Normal).unwrap());
    disjoint("file", &top, storage, 300, Tears::WhileWritten);
}

/// Whoever wins, every sector is one that somebody wrote there, or zero, or the parent's; and what is read at the end is
/// there after opening again.
#[test]
fn overlapping_writers_trims_and_zeroes() {
    for top in [dynamic(), child()] {
        let _watchdog = Watchdog::new("overlapping");
        let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
        let image = open(&top, &storage);
        let newest = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..6_u64 {
                let (image, newest) = (&image, &newest);
                scope.spawn(move || {
                    let mut rng = Rng::new(70 + thread);
                    for _ in 0..500 {
                        let version = newest.fetch_add(1, Ordering::SeqCst) + 1;
                        let block = rng.below(5);
                        match rng.below(12) {
                            0..=5 => {
                                let sectors = run_in_block(&mut rng, block);
                                put(image, &mut rng, &sectors, version);
                            }
                            6 => {
                                // Over the ends of blocks.
                                let first = (block + 1) * BLOCK - rng.between(1, 40);
                                let sectors = first..first + rng.between(1, 80);
                                image.write_at(&stamps(&sectors, version), first * SECTOR).unwrap();
                            }
                            7 => image.discard(block * MIB..(block + 2) * MIB).unwrap(),
                            8 => image.write_zeroes(block * MIB..(block + 1) * MIB, rng.chance(50)).unwrap(),
                            9 => {
                                let sectors = run_in_block(&mut rng, block);
                                image.write_zeroes(bytes_of(&sectors), true).unwrap();
                            }
                            10 => image.flush().unwrap(),
                            _ => look(image, &mut rng, newest, Tears::Never),
                        }
                    }
                });
            }
        });
        let mut before = vec![0; image.size() as usize];
        image.read_at(&mut before, 0).unwrap();
        versions(0, &before);
        image.close().unwrap();
        drop(image);
        assert_clean("overlapping", &storage);
        let image = OpenOptions::new().parents(parents(&top)).open(storage, None).unwrap();
        let mut after = vec![0; before.len()];
        image.read_at(&mut after, 0).unwrap();
        assert!(before == after, "the disk is another one after opening again");
    }
}

/// rust-img-vhdx reads, changes and writes a sector of the BAT outside of any lock: 8 threads that write 64 fresh blocks
/// see all of them, and after opening again 51 of 64 are gone, while its check finds nothing.
#[test]
fn rust_img_vhdx_64_fresh_blocks_from_8_threads_are_all_there() {
    let _watchdog = Watchdog::new("64 blocks");
    for round in 0..25_u64 {
        let top = ImageBuilder::new(64 * MIB, 1 << 20).build();
        let storage = sim(&top.file);
        let image = open(&top, &(Arc::clone(&storage) as Arc<dyn Storage>));
        let start = Barrier::new(8);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (image, start) = (&image, &start);
                scope.spawn(move || {
                    start.wait();
                    for number in 0..8 {
                        // Neighbouring entries of the same sector of the BAT, at the same time.
                        let sector = (number * 8 + thread) * BLOCK + round;
                        image.write_at(&stamps(&(sector..sector + 1), round + 1), sector * SECTOR).unwrap();
                    }
                    if round % 2 == 0 {
                        image.flush().unwrap();
                    }
                });
            }
        });
        let judge = |image: &Image, when: &str| {
            for block in 0..64 {
                let mut bytes = [0; SECTOR as usize];
                image.read_at(&mut bytes, block * MIB + round * SECTOR).unwrap();
                assert_eq!(versions(block * BLOCK + round, &bytes), [Some(round + 1)], "{when}: block {block}");
            }
        };
        judge(&image, "live");
        image.flush().unwrap();
        let cut = CrashImage::new(storage.durable_pages());
        judge(&OpenOptions::new().open(cut.storage(), None).unwrap(), "after a power cut");
        image.close().unwrap();
        drop(image);
        let storage: Arc<dyn Storage> = storage;
        assert_clean("64 blocks", &storage);
        judge(&OpenOptions::new().open(storage, None).unwrap(), "opened again");
    }
}

/// Eight threads meet in one fresh block after another, each with a sector of its own: the block is made once.
#[test]
fn first_writes_of_the_same_block_do_not_undo_each_other() {
    let _watchdog = Watchdog::new("same block");
    for top in [dynamic(), child()] {
        let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
        let image = open(&top, &storage);
        let meet = Barrier::new(8);
        let rounds = 24 * 12;
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let (image, meet) = (&image, &meet);
                scope.spawn(move || {
                    let mut rng = Rng::new(thread);
                    for round in 0..rounds {
                        let block = round % 24;
                        if meet.wait().is_leader() {
                            match round / 24 % 2 {
                                0 => image.write_zeroes(block * MIB..(block + 1) * MIB, true).unwrap(),
                                _ => image.discard(block * MIB..(block + 1) * MIB).unwrap(),
                            }
                        }
                        meet.wait();
                        let sector = block * BLOCK + rng.below(BLOCK / 8) * 8 + thread;
                        while !put(image, &mut rng, &(sector..sector + 1), round + 1) {}
                        let mut bytes = [0; SECTOR as usize];
                        image.read_at(&mut bytes, sector * SECTOR).unwrap();
                        assert_eq!(versions(sector, &bytes), [Some(round + 1)], "thread {thread}, round {round}");
                        meet.wait();
                        // It is still there when all have written theirs.
                        image.read_at(&mut bytes, sector * SECTOR).unwrap();
                        assert_eq!(versions(sector, &bytes), [Some(round + 1)], "thread {thread}, round {round}");
                    }
                });
            }
        });
        image.close().unwrap();
        drop(image);
        assert_clean("same block", &storage);
    }
}

/// Memory whose sync takes as long as a fast disk's.
#[derive(Debug)]
struct SlowSync(MemoryStorage);

impl Storage for SlowSync {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        std::thread::sleep(Duration::from_millis(2));
        self.0.sync()
    }
}

/// Flushes that wait for each other are satisfied together: not one sync for each.
#[test]
fn flushes_at_once_share_their_syncs() {
    let _watchdog = Watchdog::new("flushes");
    for first_writes in [false, true] {
        let top = ImageBuilder::new(512 * MIB, 1 << 20).build();
        let storage = Arc::new(CountingStorage::new(Arc::new(SlowSync(load(&top.file)))));
        let image = open(&top, &(Arc::clone(&storage) as Arc<dyn Storage>));
        image.write_at(&[1; 512], 0).unwrap();
        image.flush().unwrap();
        let before = storage.syncs();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let image = &image;
                scope.spawn(move || {
                    for number in 0..20 {
                        let block = if first_writes { thread * 20 + number } else { 0 };
                        image.write_at(&[1; 512], block * MIB + thread * 512).unwrap();
                        image.flush().unwrap();
                    }
                });
            }
        });
        let syncs = storage.syncs() - before;
        // Alone, each flush takes one sync, or two where there is metadata.
        let alone = if first_writes { 320 } else { 160 };
        assert!(syncs * 2 <= alone, "{syncs} syncs of {alone}");
        assert!(syncs >= 20, "{syncs} syncs: a flush did not wait for one that began after it");
        image.close().unwrap();
    }
}

#[test]
fn closing_with_plans_in_flight_is_busy_and_works_later() {
    let top = dynamic();
    let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
    let image = Arc::new(open(&top, &storage));
    let write = image.plan_write(0..4096).unwrap();
    let read = image.plan_read(MIB..MIB + 512).unwrap();
    assert_eq!(image.close_within(Duration::ZERO).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(image.close_within(Duration::from_millis(20)).unwrap_err().kind(), ErrorKind::Busy);
    // It is as it was: other blocks are written, and the plan completes.
    image.write_at(&[2; 512], 3 * MIB).unwrap();
    write.storage().write_at(&[1; 4096], write.file_offset()).unwrap();
    write.complete().unwrap();
    assert_eq!(image.close_within(Duration::ZERO).unwrap_err().kind(), ErrorKind::Busy, "a read plan is left");
    // One that waits gets its turn when the last plan goes.
    let waiting = {
        let image = Arc::clone(&image);
        std::thread::spawn(move || image.close())
    };
    std::thread::sleep(Duration::from_millis(30));
    drop(read);
    waiting.join().unwrap().unwrap();
    let mut bytes = [0; 4096];
    image.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 4096]);
    drop(image);
    assert_clean("busy", &storage);
    let image = OpenOptions::new().open(storage, None).unwrap();
    image.read_at(&mut bytes, 3 * MIB - 4096 + 512).unwrap();
    assert_eq!(bytes[3584..], [2; 512]);
}

/// The handle goes first; the last plan ends the session, in whatever thread it is.
#[test]
fn plans_that_outlive_their_image_leave_a_valid_file() {
    for ending in 0..4 {
        let top = child();
        let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
        let image = open(&top, &storage);
        image.write_at(&stamps(&(9 * BLOCK..9 * BLOCK + 4), 7), 9 * MIB).unwrap();
        let plan = image.plan_write(5 * MIB..5 * MIB + 2048).unwrap();
        let read = image.plan_read(0..512).unwrap();
        drop(image);
        plan.storage().write_at(&stamps(&(5 * BLOCK..5 * BLOCK + 4), 8), plan.file_offset()).unwrap();
        match ending {
            0 => plan.complete().unwrap(),
            1 => drop(plan),
            2 => plan.abandon(),
            _ => std::thread::spawn(move || plan.complete().unwrap()).join().unwrap(),
        }
        drop(read);
        assert_clean("outlived", &storage);
        let image = OpenOptions::new().parents(parents(&top)).open(storage, None).unwrap();
        let mut bytes = vec![0; 2048];
        image.read_at(&mut bytes, 9 * MIB).unwrap();
        assert_eq!(versions(9 * BLOCK, &bytes), [Some(7); 4]);
        image.read_at(&mut bytes, 5 * MIB).unwrap();
        let expected = if matches!(ending, 0 | 3) { 8 } else { 0 };
        assert_eq!(versions(5 * BLOCK, &bytes), [Some(expected); 4]);
    }
}

/// Several handles' worth of closing, reopening and writing at once: one wins, nobody is stuck, nothing is lost.
#[test]
fn closing_and_reopening_among_writers() {
    let _watchdog = Watchdog::new("reopening");
    let top = dynamic();
    let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
    let image = open(&top, &storage);
    let stop = AtomicBool::new(false);
    let mut known = Own::new();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3_u64)
            .map(|thread| {
                let (image, stop) = (&image, &stop);
                scope.spawn(move || {
                    let (mut rng, mut own, mut version) = (Rng::new(thread), Own::new(), 0);
                    while !stop.load(Ordering::SeqCst) {
                        version += 1;
                        let sector = rng.below(8 * BLOCK) * 3 + thread;
                        match image.write_at(&stamps(&(sector..sector + 1), version), sector * SECTOR) {
                            Ok(()) => drop(own.insert(sector, Some(version))),
                            Err(error) => {
                                let kind = error.kind();
                                assert!(matches!(kind, ErrorKind::ReadOnly | ErrorKind::Busy), "{error}");
                            }
                        }
                    }
                    own
                })
            })
            .collect();
        for _ in 0..60 {
            std::thread::sleep(Duration::from_millis(2));
            image.reopen(false).unwrap();
            image.reopen(true).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        writers.into_iter().for_each(|writer| known.extend(writer.join().unwrap()));
    });
    image.close().unwrap();
    drop(image);
    assert_clean("reopening", &storage);
    let image = OpenOptions::new().open(Arc::clone(&storage), None).unwrap();
    let mut bytes = vec![0; 24 * MIB as usize];
    image.read_at(&mut bytes, 0).unwrap();
    for (sector, found) in (0..).zip(versions(0, &bytes)) {
        assert_eq!(found, known.get(&sector).copied().unwrap_or_default(), "sector {sector}");
    }
    assert!(snapshot(storage.as_ref()).len() > top.file.len());
}
