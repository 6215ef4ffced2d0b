//! Conversions: what comes out is what went in, whatever the layout, the threads and the storage.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod create_support;

use std::io::Read;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use create_support::{Hook, Limited, allocated, file_storage, fixed_guids, marked, open, raw, region_offset};
use vhdkit::ErrorKind;
use vhdkit::image::BlockDevice;
use vhdkit::ops::compare::compare;
use vhdkit::ops::convert::{ConvertOptions, ConvertReport, Destination, Source, convert};
use vhdkit::ops::create::{BlockState, CreateOptions, NewDiskType, NewParent, Preallocation, create};
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

fn memory() -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new())
}

fn bytes(storage: &Arc<dyn Storage>) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn to_vhdx(
    source: &dyn BlockDevice,
    target: &Arc<dyn Storage>,
    layout: &CreateOptions,
    options: &ConvertOptions,
) -> ConvertReport {
    convert(Source::Disk(source), Destination::Vhdx { storage: target, layout, spill: None }, options, &()).unwrap()
}

fn to_raw(source: &dyn BlockDevice, target: &Arc<dyn Storage>) -> ConvertReport {
    convert(Source::Disk(source), Destination::Raw { storage: target }, &ConvertOptions::default(), &()).unwrap()
}

/// Data of all shapes: in pages, across blocks, at the end, alone in a block.
fn shapes(size: u64) -> Arc<dyn Storage> {
    let marks = [0..1, 4095..4097, 100_000..300_000, 3 * MIB - 7..5 * MIB + 9, 11 * MIB + 512..11 * MIB + 1024];
    let storage = marked(size, marks.into_iter().filter(|mark| mark.end <= size));
    storage.write_at(&[9; 3], size - 3).unwrap();
    storage
}

#[test]
fn raw_to_vhdx_and_back_is_the_same_in_every_layout() {
    let size = 70 * MIB + 1536;
    let source = raw(&shapes(size));
    let expected = bytes(&shapes(size));
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        for block_size in [1 << 20, 2 << 20, 32 << 20, 256 << 20] {
            for zero_scan in [true, false] {
                let layout = CreateOptions { disk_type, block_size: Some(block_size), ..CreateOptions::default() };
                let options = ConvertOptions { zero_scan, threads: Some(3) };
                let target = memory();
                let report = to_vhdx(&source, &target, &layout, &options);
                assert_eq!(report.file_size, target.len().unwrap());
                assert!(report.file_size.is_multiple_of(MIB));
                assert_eq!((report.source_size, report.target_size, report.padding), (size, size, 0));
                let image = open(&target);
                assert_eq!(image.geometry().block_size(), u64::from(block_size));
                let back = memory();
                to_raw(&image, &back);
                assert!(bytes(&back) == expected, "{disk_type:?} {block_size} {zero_scan}");
            }
        }
    }
}

#[test]
fn blocks_without_data_are_not_allocated() {
    let source = marked(64 * MIB, [33 * MIB..33 * MIB + 1]);
    let target = memory();
    let layout = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::default() };
    let report = to_vhdx(&raw(&source), &target, &layout, &ConvertOptions::default());
    assert_eq!(target.len().unwrap(), 5 * MIB, "header, log, metadata, BAT and one block");
    assert_eq!(report.bytes_written, 4096);
    let bat = region_offset(target.as_ref(), true);
    for block in 0..64 {
        let expected = if block == 33 { (4 * MIB) | 6 } else { 0 };
        assert_eq!(create_support::bat_entry(target.as_ref(), bat, block), expected, "block {block}");
    }
}

#[test]
fn zeros_that_stand_in_the_source_are_left_out_only_by_the_scan() {
    let zeros = Arc::new(MemoryStorage::new());
    zeros.write_at(&vec![0; 8 << 20], 0).unwrap();
    let zeros: Arc<dyn Storage> = zeros;
    let layout = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::default() };
    for (zero_scan, blocks) in [(true, 0), (false, 8)] {
        let target = memory();
        let options = ConvertOptions { zero_scan, threads: None };
        let report = to_vhdx(&raw(&zeros), &target, &layout, &options);
        assert_eq!(target.len().unwrap(), (4 + blocks) * MIB);
        assert_eq!(report.bytes_skipped_zero, if zero_scan { 8 * MIB } else { 0 });
        assert_eq!(report.bytes_read, 8 * MIB);
    }
}

#[test]
fn holes_are_not_read() {
    let source = marked(4 << 40, [1 << 40..(1 << 40) + 10, (3 << 40)..(3 << 40) + 10]);
    let target = memory();
    let report = to_vhdx(&raw(&source), &target, &CreateOptions::default(), &ConvertOptions::default());
    assert_eq!(report.bytes_read, 2 * 65536, "two pages of the storage");
    let back = memory();
    let report = to_raw(&open(&target), &back);
    assert!(report.bytes_read <= 4 * 65536, "{report:?}");
    assert_eq!(back.len().unwrap(), 4 << 40);
    assert!(compare(&raw(&source), &raw(&back), &()).unwrap().is_equal());
}

#[test]
fn the_target_does_not_depend_on_the_threads() {
    let source = shapes(40 * MIB);
    let layout = fixed_guids(CreateOptions { block_size: Some(1 << 20), ..CreateOptions::default() });
    let make = |threads| {
        let target = memory();
        to_vhdx(&raw(&source), &target, &layout, &ConvertOptions { threads: Some(threads), zero_scan: true });
        bytes(&target)
    };
    let expected = make(1);
    for threads in [2, 3, 8, 16, 2, 3, 8, 16] {
        assert!(make(threads) == expected, "{threads} threads");
    }
}

#[test]
fn stale_targets_get_every_zero() {
    let size = 20 * MIB + 512;
    let source = shapes(size);
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        let layout = fixed_guids(CreateOptions { disk_type, block_size: Some(2 << 20), ..CreateOptions::default() });
        let clean = memory();
        to_vhdx(&raw(&source), &clean, &layout, &ConvertOptions::default());
        let stale: Arc<dyn Storage> = Arc::new(MemoryStorage::new().without_zero_growth());
        to_vhdx(&raw(&source), &stale, &layout, &ConvertOptions::default());
        assert!(bytes(&clean) == bytes(&stale), "{disk_type:?}");
        let full = CreateOptions { preallocation: Preallocation::Full, ..layout };
        let full_target = memory();
        to_vhdx(&raw(&source), &full_target, &full, &ConvertOptions::default());
        assert!(bytes(&clean) == bytes(&full_target), "{disk_type:?}");
    }
    let stale: Arc<dyn Storage> = Arc::new(MemoryStorage::new().without_zero_growth());
    to_raw(&raw(&source), &stale);
    assert!(bytes(&stale) == bytes(&source));
    // A file that is not empty, and longer than what is to come.
    let used = marked(30 * MIB, [0..30 * MIB]);
    to_raw(&raw(&source), &used);
    assert!(bytes(&used) == bytes(&source));
    let used = marked(90 * MIB, [0..90 * MIB]);
    let layout = fixed_guids(CreateOptions::default());
    let clean = memory();
    to_vhdx(&raw(&source), &used, &layout, &ConvertOptions::default());
    to_vhdx(&raw(&source), &clean, &layout, &ConvertOptions::default());
    assert!(bytes(&used) == bytes(&clean));
}

/// A reader that gives a few bytes at a time, as a pipe may.
struct Dribble<'a>(&'a [u8]);

impl Read for Dribble<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let count = buf.len().min(self.0.len()).min(77_777);
        buf[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        Ok(count)
    }
}

#[test]
fn a_stream_becomes_an_image_with_and_without_its_size() {
    let size = 11 * MIB + 700; // not whole sectors
    let content = bytes(&shapes(size));
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        for block_state in [BlockState::NotPresent, BlockState::Zero] {
            for announced in [Some(size), None] {
                if disk_type == NewDiskType::Fixed && block_state == BlockState::Zero {
                    continue;
                }
                let layout =
                    CreateOptions { disk_type, block_state, block_size: Some(1 << 20), ..CreateOptions::default() };
                let (target, spill) = (memory(), memory());
                let mut reader = Dribble(&content);
                let report = convert(
                    Source::Stream { reader: &mut reader, size: announced },
                    Destination::Vhdx { storage: &target, layout: &layout, spill: Some(&spill) },
                    &ConvertOptions::default(),
                    &(),
                )
                .unwrap();
                assert_eq!((report.source_size, report.target_size, report.padding), (size, size + 324, 324));
                assert_eq!(report.file_size, target.len().unwrap());
                let image = open(&target);
                let mut read = vec![1; size as usize + 324];
                image.read_at(&mut read, 0).unwrap();
                assert!(read[..size as usize] == content, "{disk_type:?} {announced:?}");
                assert_eq!(read[size as usize..], [0; 324]);
                assert_eq!(region_offset(target.as_ref(), true) > 4 * MIB, announced.is_none(), "tables behind");
            }
        }
    }
}

#[test]
fn a_stream_of_unknown_size_works_on_stale_storage() {
    let content = bytes(&shapes(40 * MIB));
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        let layout = fixed_guids(CreateOptions { disk_type, block_size: Some(1 << 20), ..CreateOptions::default() });
        let make = |target: Arc<dyn Storage>| {
            let spill = memory();
            convert(
                Source::Stream { reader: &mut content.as_slice(), size: None },
                Destination::Vhdx { storage: &target, layout: &layout, spill: Some(&spill) },
                &ConvertOptions::default(),
                &(),
            )
            .unwrap();
            bytes(&target)
        };
        assert!(make(memory()) == make(Arc::new(MemoryStorage::new().without_zero_growth())));
    }
}

#[test]
fn a_stream_of_another_size_than_announced_is_an_error() {
    let content = vec![5; 100_000];
    for announced in [99_999, 100_001, 1, 1 << 30] {
        let target = memory();
        let error = convert(
            Source::Stream { reader: &mut content.as_slice(), size: Some(announced) },
            Destination::Raw { storage: &target },
            &ConvertOptions::default(),
            &(),
        )
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{announced}: {error}");
    }
    let (target, spill) = (memory(), memory());
    let layout = CreateOptions::new(65536);
    let destination = Destination::Vhdx { storage: &target, layout: &layout, spill: Some(&spill) };
    let source = Source::Stream { reader: &mut content.as_slice(), size: None };
    let error = convert(source, destination, &ConvertOptions::default(), &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}

#[test]
fn an_empty_stream_is_no_disk() {
    let (target, spill) = (memory(), memory());
    let layout = CreateOptions::default();
    let destination = Destination::Vhdx { storage: &target, layout: &layout, spill: Some(&spill) };
    let source = Source::Stream { reader: &mut [].as_slice(), size: None };
    let error = convert(source, destination, &ConvertOptions::default(), &()).unwrap_err();
    assert!(error.to_string().contains("0 bytes"), "{error}");
}

#[test]
fn a_stream_target_gets_every_byte_in_order() {
    let size = 30 * MIB + 512;
    let source = shapes(size);
    let target = memory();
    to_vhdx(&raw(&source), &target, &CreateOptions::default(), &ConvertOptions::default());
    for threads in [1, 4] {
        let mut out = Vec::new();
        let options = ConvertOptions { threads: Some(threads), zero_scan: true };
        let image = open(&target);
        let report = convert(Source::Disk(&image), Destination::Stream { writer: &mut out }, &options, &()).unwrap();
        assert!(out == bytes(&source), "{threads} threads");
        assert_eq!(report.file_size, size);
    }
}

#[test]
fn sectors_change_where_the_size_allows_and_padding_is_told() {
    let size = 5 * MIB + 512;
    let source = shapes(size);
    let layout = CreateOptions { logical_sector_size: Some(4096), ..CreateOptions::default() };
    let target = memory();
    let report = to_vhdx(&raw(&source), &target, &layout, &ConvertOptions::default());
    assert_eq!((report.target_size, report.padding), (5 * MIB + 4096, 3584));
    let image = open(&target);
    assert_eq!(image.logical_sector_size(), 4096);
    let back = memory();
    let narrow = CreateOptions { logical_sector_size: Some(512), ..CreateOptions::default() };
    let report = to_vhdx(&image, &back, &narrow, &ConvertOptions::default());
    assert_eq!((report.target_size, report.padding), (5 * MIB + 4096, 0));
    let compared = compare(&raw(&source), &open(&back), &()).unwrap();
    assert!(compared.is_equal() && compared.size_note.is_some());
    // The sectors of a VHDX are kept unless told otherwise.
    let kept = memory();
    to_vhdx(&image, &kept, &CreateOptions::default(), &ConvertOptions::default());
    assert_eq!(open(&kept).logical_sector_size(), 4096);
}

#[test]
fn a_larger_disk_is_possible_and_a_smaller_one_refused() {
    let source = shapes(5 * MIB);
    let target = memory();
    let report = to_vhdx(&raw(&source), &target, &CreateOptions::new(9 * MIB), &ConvertOptions::default());
    assert_eq!(report.target_size, 9 * MIB);
    let image = open(&target);
    assert_eq!(image.size(), 9 * MIB);
    let layout = CreateOptions::new(4 * MIB);
    let destination = Destination::Vhdx { storage: &target, layout: &layout, spill: None };
    let error = convert(Source::Disk(&raw(&source)), destination, &ConvertOptions::default(), &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[test]
fn the_source_is_not_a_target() {
    let source = shapes(5 * MIB);
    let before = bytes(&source);
    let disk = raw(&source);
    let layout = CreateOptions::default();
    for destination in
        [Destination::Raw { storage: &source }, Destination::Vhdx { storage: &source, layout: &layout, spill: None }]
    {
        let error = convert(Source::Disk(&disk), destination, &ConvertOptions::default(), &()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }
    assert!(bytes(&source) == before);
}

#[test]
fn a_child_without_its_parent_is_an_error() {
    let child = memory();
    let parent = NewParent {
        data_write_guid: vhdkit::format::guid::Guid::from_printed(5),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        disk_size: 8 * MIB,
        disk_id: vhdkit::format::guid::Guid::from_printed(6),
        relative_path: "base.vhdx".to_owned(),
        absolute_path: None,
    };
    create(&child, &CreateOptions::child(parent), &()).unwrap();
    let image = vhdkit::image::OpenOptions::new().without_parents().open(child, None).unwrap();
    let target = memory();
    let error = convert(Source::Disk(&image), Destination::Raw { storage: &target }, &ConvertOptions::default(), &())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMissing, "{error}");
}

#[test]
fn cancelling_stops_soon_and_leaves_no_image() {
    let source = marked(200 * MIB, [0..200 * MIB]);
    let seen = AtomicU64::new(0);
    let progress = Hook(|done: u64| {
        seen.fetch_max(done, Ordering::Relaxed);
        if done > 20 * MIB { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let target = memory();
    let layout = CreateOptions::default();
    let destination = Destination::Vhdx { storage: &target, layout: &layout, spill: None };
    let options = ConvertOptions { threads: Some(4), zero_scan: true };
    let error = convert(Source::Disk(&raw(&source)), destination, &options, &progress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(seen.into_inner() < 40 * MIB);
    let mut signature = [0; 8];
    target.read_at(&mut signature, 0).unwrap();
    assert_eq!(signature, [0; 8]);
}

#[test]
fn a_full_file_system_is_told() {
    let source = marked(64 * MIB, [0..64 * MIB]);
    for threads in [1, 4] {
        let target: Arc<dyn Storage> = Arc::new(Limited::new(20 * MIB));
        let layout = CreateOptions::default();
        let destination = Destination::Vhdx { storage: &target, layout: &layout, spill: None };
        let options = ConvertOptions { threads: Some(threads), zero_scan: true };
        let error = convert(Source::Disk(&raw(&source)), destination, &options, &()).unwrap_err();
        assert_eq!(error.io_error().unwrap().kind(), std::io::ErrorKind::StorageFull);
        assert!(error.hint().unwrap().contains("free space"), "{error}");
    }
}

#[test]
fn files_stay_sparse_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let source = file_storage(&directory.path().join("source.raw"));
    source.set_len(1 << 30).unwrap();
    for at in [0, 100 * MIB, 1023 * MIB] {
        source.write_at(&vec![3; 1 << 20], at).unwrap();
    }
    let image_path = directory.path().join("image.vhdx");
    let target = file_storage(&image_path);
    to_vhdx(&raw(&source), &target, &CreateOptions::default(), &ConvertOptions::default());
    assert!(allocated(&image_path) < 5 * MIB, "{}", allocated(&image_path));
    let back_path = directory.path().join("back.raw");
    let back = file_storage(&back_path);
    let report = to_raw(&open(&target), &back);
    assert!(allocated(&back_path) <= 4 * MIB, "{}", allocated(&back_path));
    assert!(report.bytes_read <= 4 * MIB, "holes of the image file are not read: {report:?}");
    assert!(compare(&raw(&source), &raw(&back), &()).unwrap().is_equal());
}

#[test]
fn the_kernel_copies_where_nobody_has_to_look() {
    let directory = tempfile::tempdir().unwrap();
    let source = file_storage(&directory.path().join("source.raw"));
    let content = bytes(&marked(20 * MIB + 512, [5..20 * MIB]));
    source.write_at(&content, 0).unwrap();
    for (disk_type, zero_scan) in
        [(NewDiskType::Fixed, true), (NewDiskType::Fixed, false), (NewDiskType::Dynamic, false)]
    {
        let target = file_storage(&directory.path().join(format!("{disk_type:?}-{zero_scan}.vhdx")));
        let layout = CreateOptions { disk_type, block_size: Some(1 << 20), ..CreateOptions::default() };
        let report = to_vhdx(&raw(&source), &target, &layout, &ConvertOptions { zero_scan, threads: None });
        let moved = report.bytes_cloned + report.bytes_copied + report.bytes_written;
        assert_eq!(moved, source.len().unwrap());
        let mut read = vec![0; content.len()];
        open(&target).read_at(&mut read, 0).unwrap();
        assert!(read == content, "{disk_type:?} {zero_scan}");
    }
}
