//! Comparing finds the first difference, and reads only what it must.
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

use std::ops::ControlFlow;
use std::sync::Arc;

use create_support::{Hook, marked, open, raw};
use vhdkit::ErrorKind;
use vhdkit::image::BlockDevice;
use vhdkit::ops::compare::compare;
use vhdkit::ops::convert::{ConvertOptions, Destination, Source, convert};
use vhdkit::ops::create::CreateOptions;
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

#[test]
fn the_first_of_many_differences_is_found() {
    let size = 40 * MIB + 512;
    let a = marked(size, [0..size]);
    for first in [0, 1, MIB - 1, MIB, 7 * MIB + 4097, size - 1] {
        let b = marked(size, [0..size]);
        for at in [first, (first + 5 * MIB).min(size - 1), size - 1] {
            b.write_at(&[0], at).unwrap();
        }
        let found = compare(&raw(&a), &raw(&b), &()).unwrap();
        assert_eq!(found.first_difference, Some(first));
        assert_eq!(compare(&raw(&b), &raw(&a), &()).unwrap().first_difference, Some(first));
    }
    assert!(compare(&raw(&a), &raw(&marked(size, [0..size])), &()).unwrap().is_equal());
}

#[test]
fn data_against_a_hole_differs_where_it_is_not_zero() {
    let holes = marked(20 * MIB, []);
    let zeros = marked(20 * MIB, []);
    zeros.write_at(&vec![0; 9 << 20], 0).unwrap();
    let same = compare(&raw(&holes), &raw(&zeros), &()).unwrap();
    assert!(same.is_equal());
    assert_eq!(same.bytes_read, [0, 9 * MIB], "holes are not read");
    zeros.write_at(&[1], 8 * MIB + 77).unwrap();
    assert_eq!(compare(&raw(&zeros), &raw(&holes), &()).unwrap().first_difference, Some(8 * MIB + 77));
}

#[test]
fn sizes_may_differ_if_the_rest_is_zero() {
    let short = marked(4 * MIB, [0..4 * MIB]);
    let long = marked(9 * MIB, [0..4 * MIB]);
    let found = compare(&raw(&short), &raw(&long), &()).unwrap();
    assert!(found.is_equal());
    assert_eq!(found.sizes, [4 * MIB, 9 * MIB]);
    assert_eq!(found.size_note.unwrap(), "the second disk is longer than the first by 5242880 bytes");
    long.write_at(&[1], 6 * MIB + 3).unwrap();
    let found = compare(&raw(&long), &raw(&short), &()).unwrap();
    assert_eq!(found.first_difference, Some(6 * MIB + 3));
    assert!(found.size_note.unwrap().starts_with("the first disk is longer"));
}

#[test]
fn an_image_and_its_source_are_the_same() {
    let source = marked(70 * MIB, [0..3, 3 * MIB..4 * MIB + 1, 69 * MIB..70 * MIB]);
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let destination = Destination::Vhdx { storage: &target, layout: &CreateOptions::default(), spill: None };
    convert(Source::Disk(&raw(&source)), destination, &ConvertOptions::default(), &()).unwrap();
    let image = open(&target);
    assert!(compare(&raw(&source), &image, &()).unwrap().is_equal());
    let with_itself = compare(&image, &open(&target), &()).unwrap();
    assert!(with_itself.is_equal());
    assert_eq!(with_itself.bytes_read, [0, 0], "the same place of the same file is not read");
    source.write_at(&[200], 69 * MIB).unwrap();
    assert_eq!(compare(&raw(&source), &image, &()).unwrap().first_difference, Some(69 * MIB));
    assert_eq!(image.size(), 70 * MIB);
}

#[test]
fn it_can_be_cancelled() {
    let a = marked(100 * MIB, [0..100 * MIB]);
    let b = marked(100 * MIB, [0..100 * MIB]);
    let progress = Hook(|done| if done > 10 * MIB { ControlFlow::Break(()) } else { ControlFlow::Continue(()) });
    assert_eq!(compare(&raw(&a), &raw(&b), &progress).unwrap_err().kind(), ErrorKind::Cancelled);
}
