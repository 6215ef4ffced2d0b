//! Measuring says what a conversion makes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::single_range_in_vec_init,
    reason = "test code"
)]

mod create_support;

use std::sync::Arc;

use create_support::{file_storage, marked, open, raw};
use vhdkit::ErrorKind;
use vhdkit::image::BlockDevice;
use vhdkit::ops::convert::{ConvertOptions, Destination, Source, convert};
use vhdkit::ops::create::{CreateOptions, NewDiskType};
use vhdkit::ops::measure::measure;
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

fn agrees(source: &dyn BlockDevice, layout: &CreateOptions) -> u64 {
    let measured = measure(source, layout, &()).unwrap();
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let destination = Destination::Vhdx { storage: &target, layout, spill: None };
    let options = ConvertOptions { zero_scan: false, threads: None };
    convert(Source::Disk(source), destination, &options, &()).unwrap();
    assert_eq!(measured.required, target.len().unwrap(), "{layout:?}");
    measured.fully_allocated
}

#[test]
fn it_agrees_with_a_conversion_in_every_layout() {
    let size = 5 * 1024 * MIB + 512;
    let marks = [0..1, MIB - 1..MIB + 1, 4096 * MIB - 1..4096 * MIB + 1, size - 1..size];
    let source = marked(size, marks);
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        for block_size in [1_u32 << 20, 32 << 20, 256 << 20] {
            let layout = CreateOptions { disk_type, block_size: Some(block_size), ..CreateOptions::default() };
            let full = agrees(&raw(&source), &layout);
            assert_eq!(full, 4 * MIB + size.next_multiple_of(u64::from(block_size)));
        }
    }
}

#[test]
fn an_image_is_measured_by_the_holes_of_its_file_too() {
    let directory = tempfile::tempdir().unwrap();
    let target = file_storage(&directory.path().join("image.vhdx"));
    let source = marked(256 * MIB, [40 * MIB..40 * MIB + 4096]);
    let destination = Destination::Vhdx { storage: &target, layout: &CreateOptions::default(), spill: None };
    convert(Source::Disk(&raw(&source)), destination, &ConvertOptions::default(), &()).unwrap();
    let image = open(&target);
    let layout = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::default() };
    agrees(&image, &layout);
    assert_eq!(measure(&image, &layout, &()).unwrap().required, 5 * MIB, "one block of 1 MiB out of one of 32 MiB");
}

#[test]
fn layouts_that_are_not_possible_are_refused() {
    let source = marked(4 * MIB, []);
    let smaller = CreateOptions::new(2 * MIB);
    assert_eq!(measure(&raw(&source), &smaller, &()).unwrap_err().kind(), ErrorKind::Refused);
    let odd = CreateOptions { block_size: Some(3 << 20), ..CreateOptions::default() };
    assert_eq!(measure(&raw(&source), &odd, &()).unwrap_err().kind(), ErrorKind::InvalidArgument);
}
