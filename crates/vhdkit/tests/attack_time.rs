//! Images that are valid and take long.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod create_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use create_support::{file_storage, region_offset};
use vhdkit::image::OpenOptions;
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::create::{CreateOptions, NewDiskType, create};
use vhdkit::ops::measure::measure;
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

#[test]
fn blocks_in_reverse_order_are_not_looked_through_again_and_again() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("reverse.vhdx");
    let storage = file_storage(&path);
    let blocks = std::env::var("ATTACK_BLOCKS").map_or(1024, |text| text.parse::<u64>().unwrap());
    let options =
        CreateOptions { disk_type: NewDiskType::Fixed, block_size: Some(1 << 20), ..CreateOptions::new(blocks * MIB) };
    create(&storage, &options, &()).unwrap();
    let bat = region_offset(storage.as_ref(), true);
    let end = storage.len().unwrap();
    let bytes = vec![1; MIB as usize];
    for block in 0..blocks {
        let offset = end - (block + 1) * MIB;
        storage.write_at(&bytes, offset).unwrap();
        storage.write_at(&(offset | 6).to_le_bytes(), bat + block * 8).unwrap();
    }
    let image = OpenOptions::new().open_path(&path);
    let image = match image {
        Ok(image) => image,
        Err(_) => OpenOptions::new().open(Arc::clone(&storage), None).unwrap(),
    };
    let started = Instant::now();
    let report =
        measure(&image, &CreateOptions { block_size: Some(1 << 20), ..CreateOptions::default() }, &()).unwrap();
    let took = started.elapsed();
    println!("{blocks} blocks: {took:?}");
    assert!(report.required >= blocks * MIB);
    // Walking to the end of the data for each block takes 1000 walks of 512 MiB, 27 s when this was written.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn holes_in_front_of_long_data_stay_holes() {
    // Blocks in reverse order, nearly all of them holes of the file, and much data behind them.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("holes.vhdx");
    let storage = file_storage(&path);
    let (blocks, data) = (100_000_u64, 64_u64);
    let options =
        CreateOptions { disk_type: NewDiskType::Fixed, block_size: Some(1 << 20), ..CreateOptions::new(blocks * MIB) };
    create(&storage, &options, &()).unwrap();
    let bat = region_offset(storage.as_ref(), true);
    let end = storage.len().unwrap();
    let chunk = 4096; // blocks of 1 MiB in a chunk of 4 GiB: behind each stands a bitmap entry
    for block in 0..blocks {
        let offset = end - (block + 1) * MIB;
        storage.write_at(&(offset | 6).to_le_bytes(), bat + (block + block / chunk) * 8).unwrap();
    }
    storage.write_at(&vec![1; (data * MIB) as usize], end - data * MIB).unwrap();
    let image = OpenOptions::new().open(Arc::clone(&storage), None).unwrap();
    let started = Instant::now();
    let report =
        measure(&image, &CreateOptions { block_size: Some(1 << 20), ..CreateOptions::default() }, &()).unwrap();
    println!("{:?}", started.elapsed());
    let tables = report.fully_allocated - blocks * MIB;
    assert_eq!(report.required - tables, data * MIB);
}

#[test]
fn millions_of_overlaps_are_checked_in_time() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let blocks = 2_000_000_u64;
    let options = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(blocks * MIB) };
    create(&storage, &options, &()).unwrap();
    let bat = region_offset(storage.as_ref(), true);
    let block = storage.len().unwrap();
    storage.set_len(block + MIB).unwrap();
    let entries: Vec<u8> = std::iter::repeat_n((block | 6).to_le_bytes(), blocks as usize).flatten().collect();
    storage.write_at(&entries, bat).unwrap();
    let started = Instant::now();
    let report = check(&storage, None, &CheckOptions::default(), &()).unwrap();
    let took = started.elapsed();
    println!("{} errors: {took:?}", report.errors);
    assert!(report.errors > 1_900_000);
    assert!(report.findings.len() <= 10_000);
    assert!(took < Duration::from_secs(20), "{took:?}");
}
