//! Writing: what is written is read back, now and after opening again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::create::{CreateOptions, create};
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

fn fresh(size: u64, block_size: u32) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, &CreateOptions { block_size: Some(block_size), ..CreateOptions::new(size) }, &()).unwrap();
    storage
}

fn open(storage: &Arc<dyn Storage>) -> Image {
    OpenOptions::new().write(true).open(Arc::clone(storage), None).unwrap()
}

fn assert_clean(storage: &Arc<dyn Storage>) {
    let report = check(storage, None, &CheckOptions::default(), &()).unwrap();
    assert_eq!((report.errors, report.warnings), (0, 0), "{:?}", report.findings);
    assert!(report.summary.unwrap().replay.is_none(), "the log is clean");
}

fn read(image: &Image, offset: u64, length: usize) -> Vec<u8> {
    let mut buf = vec![0xee; length];
    image.read_at(&mut buf, offset).unwrap();
    buf
}

#[test]
fn what_is_written_is_there_after_opening_again() {
    let storage = fresh(64 * MIB + 512, 1 << 20);
    let image = open(&storage);
    image.write_at(&[1; 5000], 3 * MIB - 1000).unwrap();
    image.write_at(&[2; 512], 64 * MIB).unwrap();
    image.write_at(&vec![3; 2 << 20], 10 * MIB).unwrap();
    assert_eq!(read(&image, 3 * MIB - 1000, 5000), [1; 5000]);
    image.flush().unwrap();
    image.write_at(&[4; 100], 3 * MIB + 10).unwrap();
    image.close().unwrap();
    assert_eq!(image.write_at(&[0], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_clean(&storage);
    let image = OpenOptions::new().open(storage, None).unwrap();
    let mut expected = vec![1; 5000];
    expected[1010..1110].fill(4);
    assert_eq!(read(&image, 3 * MIB - 1000, 5000), expected);
    assert_eq!(read(&image, 64 * MIB, 512), [2; 512]);
    assert_eq!(read(&image, 10 * MIB, 2 << 20), vec![3; 2 << 20]);
    assert_eq!(read(&image, 12 * MIB, 512), [0; 512]);
}

#[test]
fn zeroed_and_discarded_blocks_give_their_space_back() {
    let storage = fresh(64 * MIB, 1 << 20);
    let image = open(&storage);
    let empty = storage.len().unwrap();
    image.write_at(&vec![1; 20 << 20], 0).unwrap();
    image.close().unwrap();
    drop(image);
    assert_eq!(storage.len().unwrap(), empty + 20 * MIB);
    let image = open(&storage);
    image.discard(512..10 * MIB).unwrap();
    image.write_zeroes(10 * MIB..12 * MIB, true).unwrap();
    image.write_zeroes(12 * MIB + 512..12 * MIB + 1024, true).unwrap();
    assert_eq!(read(&image, 0, 512), [1; 512], "the first block was not covered");
    assert_eq!(read(&image, MIB, 512), [0; 512]);
    assert_eq!(read(&image, 12 * MIB + 512, 512), [0; 512]);
    assert_eq!(read(&image, 12 * MIB + 1024, 512), [1; 512]);
    image.flush().unwrap();
    image.flush().unwrap();
    image.write_at(&vec![5; 11 << 20], 30 * MIB).unwrap();
    image.close().unwrap();
    assert_clean(&storage);
    assert_eq!(storage.len().unwrap(), empty + 20 * MIB, "the new blocks went where the old ones were");
}

/// Old versions of QEMU cut the file behind the last block's last sector of the disk. What lies behind belongs to the block
/// all the same.
#[test]
fn the_cut_end_of_the_last_block_is_not_given_to_another() {
    use vhdkit_testkit::{BlockSpec, Content, ImageBuilder};
    let built = ImageBuilder::new(64 * MIB + 5 * MIB, 32 << 20)
        .block(2, BlockSpec::present(Content::Sparse { seed: 3, stride: 1 }))
        .build();
    let start = built.layout.payload_block(2);
    let mut file = built.file.clone();
    file.set_len(start + 5 * MIB);
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap()];
    bytes.copy_from_slice(&file.read(0, usize::try_from(file.len()).unwrap()));
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
    let image = open(&storage);
    image.write_at(&[7; 4096], 0).unwrap();
    image.write_at(&[8; 4096], 68 * MIB).unwrap();
    image.flush().unwrap();
    image.write_at(&[9; 4096], 32 * MIB).unwrap();
    image.close().unwrap();
    assert_clean(&storage);
    let image = OpenOptions::new().open(storage, None).unwrap();
    assert_eq!(read(&image, 0, 4096), [7; 4096]);
    assert_eq!(read(&image, 32 * MIB, 4096), [9; 4096]);
    assert_eq!(read(&image, 68 * MIB, 4096), [8; 4096]);
    assert_eq!(read(&image, 64 * MIB, 4 << 20), built.model.read(64 * MIB, 4 << 20));
}
