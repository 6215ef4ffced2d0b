//! Random programs against a plain array: whatever is written, zeroed, trimmed, planned and reopened in whatever order,
//! the disk holds what the array holds, now, after opening anew, and for a stranger who reads the bare bytes.
//!
//! A failure names the kind of image and the seed of the program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared modules")]

mod model_support;
mod write_support;

use std::sync::Arc;

use model_support::{TestFile, layers};
use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice, FileResolver, OpenOptions};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::dirty::DirtyPlan;
use vhdkit_testkit::foreign::sha256_file;
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::model::{UNDEFINED, UNMAPPED, ZERO};
use vhdkit_testkit::random::{RandomOptions, random_dirty_plan, random_image};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::spec::MIB;
use write_support::{Machine, load, snapshot};

/// The files of the parents; writing to them is a panic.
fn parents(top: &BuiltImage) -> Vec<Arc<dyn Storage>> {
    layers(top).into_iter().skip(1).map(|image| TestFile::new(&image.file) as Arc<dyn Storage>).collect()
}

/// Makes an image dirty; without a plan it stays as it is.
fn dirtied(top: &BuiltImage, plan: Option<&DirtyPlan>) -> BuiltImage {
    let mut image = top.clone();
    if let Some(plan) = plan {
        plan.apply(&mut image);
    }
    image
}

/// Runs a program of so many steps, and closes.
fn run(name: &str, top: &BuiltImage, plan: Option<&DirtyPlan>, seed: u64, steps: usize) {
    let storage: Arc<dyn Storage> = Arc::new(load(&dirtied(top, plan).file));
    run_on(name, top, storage, seed, steps);
}

fn run_on(name: &str, top: &BuiltImage, storage: Arc<dyn Storage>, seed: u64, steps: usize) {
    let mut machine = Machine::new(name, top, &top.file, storage, parents(top), seed);
    if machine.is_exhausted() {
        return;
    }
    machine.open();
    for _ in 0..steps {
        machine.step();
    }
    machine.judge_extents();
    machine.close();
    // Once more, without a change: not a byte differs.
    let before = snapshot(machine.storage.as_ref());
    machine.eager = false;
    machine.open();
    machine.image().flush().unwrap();
    machine.close();
    assert!(snapshot(machine.storage.as_ref()) == before, "{name}: opening and closing changed the file");
}

/// Blocks of every kind, in a file of random order, with junk wherever nothing may look.
fn crafted(seed: u64, size: u64, block: u32, sector: u32, log: u32, parent: Option<&Arc<BuiltImage>>) -> BuiltImage {
    let mut rng = Rng::new(seed);
    let physical = if sector == 512 { rng.pick(&[512, 4096]) } else { 4096 };
    let mut builder = ImageBuilder::new(size, block).sector_sizes(sector, physical).named("top.vhdx");
    builder.log_length = log;
    builder.scatter = rng.chance(50).then(|| rng.next_u64());
    builder.junk = rng.chance(50).then(|| rng.next_u64());
    if let Some(parent) = parent {
        builder = builder.differencing(parent);
    }
    let blocks = builder.geometry().block_count;
    for _ in 0..blocks.min(12) {
        let content =
            Content::Sparse { seed: rng.next_u64(), stride: rng.between(3, 29).max(u64::from(block >> 20) * 8) };
        let mask = SectorMask::random(rng.next_u64(), rng.pick(&[1, 8, 100]), rng.pick(&[0, 30, 90, 100]));
        let spec = match rng.below(if parent.is_some() { 10 } else { 7 }) {
            0 => BlockSpec::new(ZERO),
            1 => BlockSpec::anchored(UNMAPPED, content),
            2 => BlockSpec::anchored(UNDEFINED, content),
            3 => BlockSpec::new(UNMAPPED),
            4 => BlockSpec::present(content),
            // Bits of a block that is not partially present mean nothing, until it becomes so.
            5 | 6 if parent.is_some() => BlockSpec::new(0).with_mask(mask),
            5 | 6 => continue,
            7 => BlockSpec::new(ZERO).with_mask(mask),
            _ => BlockSpec::partial(content, mask),
        };
        builder.blocks.insert(rng.below(blocks), spec);
    }
    builder.build()
}

fn parent_of(seed: u64, size: u64, block: u32, sector: u32) -> Arc<BuiltImage> {
    let blocks = size.div_ceil(u64::from(block));
    let builder = ImageBuilder::new(size, block).sector_sizes(sector, 4096).named("base.vhdx");
    let stride = (u64::from(block) >> 20) * 4 + 1;
    let with = |builder: ImageBuilder, number| {
        builder.block(number, BlockSpec::present(Content::Sparse { seed: seed + number, stride }))
    };
    Arc::new((0..blocks.min(9)).filter(|number| number % 4 != 3).fold(builder, with).build())
}

#[test]
fn dynamic_with_small_blocks() {
    for seed in 0..10 {
        let log = if seed % 2 == 0 { MIB } else { 3 * MIB } as u32;
        let sector = if seed % 3 == 0 { 4096 } else { 512 };
        let block = if seed % 4 == 0 { 2 << 20 } else { 1 << 20 };
        // The last block is cut short, by whole pages or by few sectors.
        let size = 14 * MIB + [0, 4096, 512 * 1024, MIB - 4096][seed as usize % 4];
        let top = crafted(seed, size, block, sector, log, None);
        run(&format!("small {seed}"), &top, None, seed, 220);
    }
}

#[test]
fn dynamic_with_large_blocks() {
    for seed in 0..4 {
        let top = crafted(seed, 130 * MIB + 512, 32 << 20, 512, MIB as u32, None);
        run(&format!("32 MiB, {seed}"), &top, None, seed, 120);
    }
    for seed in 0..3 {
        let sector = if seed == 1 { 4096 } else { 512 };
        let top = crafted(seed, 700 * MIB, 256 << 20, sector, MIB as u32, None);
        run(&format!("256 MiB, {seed}"), &top, None, seed, 80);
    }
}

#[test]
fn fixed() {
    for seed in 0..4 {
        let block = if seed % 2 == 0 { 1 << 20 } else { 4 << 20 };
        let builder = ImageBuilder::new(9 * MIB + 512, block).pattern_block(1, seed);
        let top = builder.fixed().with(|builder| builder.scatter = (seed > 1).then_some(seed)).build();
        run(&format!("fixed {seed}"), &top, None, seed, 200);
    }
}

#[test]
fn children_of_larger_smaller_and_differently_divided_parents() {
    let shapes = [
        // size, block of the child; size, block of the parent
        (12 * MIB + 512, 1, 12 * MIB + 512, 1),
        (12 * MIB, 2, 9 * MIB + 1536, 1),
        (9 * MIB, 1, 40 * MIB, 4),
        (70 * MIB, 32, 33 * MIB + 512, 2),
        (30 * MIB + 1024, 2, 64 * MIB, 32),
        (300 * MIB, 256, 290 * MIB, 1),
    ];
    for (number, (size, block, parent_size, parent_block)) in shapes.into_iter().enumerate() {
        for seed in 0..2 {
            let parent = parent_of(seed, parent_size, parent_block << 20, 512);
            let log = if seed == 0 { MIB } else { 3 * MIB } as u32;
            let top = crafted(seed + 50 * number as u64, size, block << 20, 512, log, Some(&parent));
            run(&format!("child {number}, {seed}"), &top, None, seed, 160);
        }
    }
}

#[test]
fn children_with_4096_byte_sectors() {
    for seed in 0..3 {
        let parent = parent_of(seed, 11 * MIB + 4096, 2 << 20, 4096);
        let top = crafted(seed, 14 * MIB + 8192, 1 << 20, 4096, MIB as u32, Some(&parent));
        run(&format!("4096, {seed}"), &top, None, seed, 200);
    }
}

/// A parent that is a child itself.
#[test]
fn chains_of_two_parents() {
    for seed in 0..4 {
        let base = parent_of(seed, 20 * MIB, 4 << 20, 512);
        let middle = crafted(seed + 7, 17 * MIB + 512, 2 << 20, 512, MIB as u32, Some(&base));
        let middle = Arc::new(BuiltImage { file_name: "middle.vhdx".to_owned(), ..middle });
        let top = crafted(seed + 9, 19 * MIB, 1 << 20, 512, MIB as u32, Some(&middle));
        run(&format!("chain {seed}"), &top, None, seed, 180);
    }
}

/// Layouts that only the specification bounds: regions anywhere, unknown regions and items, torn copies, several chunks.
#[test]
fn random_images() {
    for seed in 0..24 {
        let options = RandomOptions {
            virtual_size_max: if seed % 3 == 0 { 6 << 30 } else { 100 * MIB },
            block_size: (seed % 3 == 0).then_some(1 << 20),
            blocks_max: 8,
            ..RandomOptions::chain(1 + seed as usize % 3)
        };
        run(&format!("random {seed}"), &random_image(seed, &options), None, seed, 90);
    }
}

#[test]
fn random_dirty_images() {
    for seed in 100..130 {
        let options = RandomOptions {
            virtual_size_max: if seed % 3 == 0 { 6 << 30 } else { 60 * MIB },
            block_size: (seed % 2 == 0).then_some(1 << 20),
            blocks_max: 6,
            ..RandomOptions::chain(1 + seed as usize % 2)
        };
        let top = random_image(seed, &options);
        let plan = random_dirty_plan(seed, &top);
        // Some programs are so short that the replay is all there is.
        run(&format!("dirty {seed}"), &top, Some(&plan), seed, [0, 3, 60][seed as usize % 3]);
    }
}

/// Storage whose growth holds a pattern, as a raw device's does.
#[test]
fn where_growth_is_not_zero() {
    for seed in 0..6 {
        let parent = parent_of(seed, 8 * MIB, 1 << 20, 512);
        let parent = (seed % 2 == 1).then_some(&parent);
        let top = crafted(seed, 9 * MIB + 512, 1 << 20, 512, MIB as u32, parent);
        let storage: Arc<dyn Storage> = Arc::new(load(&top.file).without_zero_growth());
        run_on(&format!("pattern {seed}"), &top, storage, seed, 150);
    }
}

/// Real files, with parents found by path: their bytes and the times of their last change stay.
#[test]
fn in_files() {
    for seed in 0..3 {
        let directory = tempfile::tempdir().unwrap();
        let base = parent_of(seed, 20 * MIB, 4 << 20, 512);
        let top = crafted(seed, 19 * MIB, 1 << 20, 512, MIB as u32, Some(&base));
        let path = top.write_chain(directory.path()).unwrap();
        let parent = directory.path().join(&base.file_name);
        let state = || (sha256_file(&parent).unwrap(), std::fs::metadata(&parent).unwrap().modified().unwrap());
        let before = state();
        {
            let resolver = Arc::new(FileResolver::new().allow_own_directory());
            let image = OpenOptions::new().parents(resolver).write(true).open_path(&path).unwrap();
            image.write_at(&[1; 5000], 4 * MIB - 2500).unwrap();
            image.close().unwrap();
        }
        let mut written = vec![0; 5000];
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, FileAccess::Write, Sharing::Normal).unwrap());
        let mut machine = Machine::new("files", &top, &top.file, storage, parents(&top), seed);
        machine.array.write(4 * MIB - 2500, &[1; 5000]);
        machine.open();
        machine.image().read_at(&mut written, 4 * MIB - 2500).unwrap();
        assert_eq!(written, [1; 5000]);
        (0..80).for_each(|_| machine.step());
        machine.close();
        assert_eq!(state(), before, "the parent was touched");
    }
}

/// More dirty pages than one entry of the smallest log holds: commits come by themselves, and nothing is lost.
#[test]
fn more_pages_than_an_entry_holds() {
    // Each page of the BAT maps 512 MiB here; an entry holds 126 pages.
    for parent in [false, true] {
        let size = 300 * 512 * MIB;
        let base = parent_of(1, 3 * MIB, 1 << 20, 512);
        let top = crafted(3, size, 1 << 20, 512, MIB as u32, parent.then_some(&base));
        let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
        let mut machine = Machine::new("many pages", &top, &top.file, storage, parents(&top), 1);
        machine.open();
        for round in 0..290_u64 {
            let (offset, bytes) = (round * 512 * MIB + round * 4096 + 100, vec![round as u8 | 1; 700]);
            machine.put_for_test(offset, &bytes);
        }
        machine.judge_extents();
        machine.close();
    }
}

/// Hundreds of small commits in one session: the ring wraps over and over.
#[test]
fn the_ring_wraps_many_times() {
    for seed in 0..2 {
        let base = parent_of(seed, 30 * MIB, 2 << 20, 512);
        let top = crafted(seed, 40 * MIB, 1 << 20, 512, MIB as u32, (seed == 1).then_some(&base));
        let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
        let mut machine = Machine::new("wraps", &top, &top.file, storage, parents(&top), seed);
        machine.open();
        let mut rng = Rng::new(seed);
        for round in 0..700_u64 {
            let block = rng.below(40);
            if rng.chance(45) {
                machine.discard_for_test(block * MIB..(block + 1) * MIB);
            } else {
                machine.put_for_test(block * MIB + rng.below(2000) * 512, &[round as u8; 512]);
            }
            machine.image().flush().unwrap();
        }
        let header = write_support::reader::current(&snapshot(machine.storage.as_ref()));
        assert_ne!(header.log_guid, Guid::ZERO, "V-172: a session is under way");
        machine.close();
    }
}

/// Opening for writing and closing leaves every byte of every kind of image as it was.
#[test]
fn no_change_is_no_change() {
    for seed in 0..40 {
        let top = random_image(seed, &RandomOptions { blocks_max: 5, ..RandomOptions::chain(1 + seed as usize % 2) });
        let plan = (seed % 2 == 0).then(|| random_dirty_plan(seed, &top));
        let storage: Arc<dyn Storage> = Arc::new(load(&dirtied(&top, plan.as_ref()).file));
        let before = snapshot(storage.as_ref());
        let options = OpenOptions::new().parents(Arc::new(write_support::Parents(parents(&top))));
        let image = match options.write(true).replay(true).open(Arc::clone(&storage), None) {
            Ok(image) => image,
            Err(error) if error.kind() == ErrorKind::Limit => continue, // see `Machine::is_exhausted`
            Err(error) => panic!("seed {seed}: {error}"),
        };
        image.flush().unwrap();
        image.discard(0..0).unwrap();
        image.write_zeroes(0..0, true).unwrap();
        image.write_at(&[], 0).unwrap();
        image.reopen(false).unwrap();
        image.reopen(true).unwrap();
        if seed % 3 != 0 {
            image.close().unwrap();
        }
        drop(image);
        assert!(snapshot(storage.as_ref()) == before, "seed {seed}");
    }
}
