//! What `recover` makes of images that are whole, and of such that lost one part after another.
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
use vhdkit::image::{BlockDevice, OpenOptions};
use vhdkit::ops::recover::{RecoverOptions, RecoverReport, recover};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::{
    BlockSpec, BuiltImage, Content, ImageBuilder, RandomOptions, SparseFile, random_dirty_plan, random_image,
};

const MIB: u64 = 1 << 20;

fn storage(file: &SparseFile) -> Arc<dyn Storage> {
    let memory = MemoryStorage::with_len(file.len());
    for (offset, bytes) in file.segments() {
        memory.write_at(bytes, offset).unwrap();
    }
    Arc::new(memory)
}

/// Recovers with the parent, and says whether the disk is what it was.
fn recovered(image: &BuiltImage, options: &RecoverOptions<'_>) -> (RecoverReport, Result<(), String>) {
    let file = storage(&image.file);
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let report = recover(&file, None, &target, options, &()).unwrap();
    let disk = OpenOptions::new().open(target, None).unwrap();
    let same = image.model.compare_with(|offset, buffer| {
        disk.read_at(buffer, offset).map_err(|error| std::io::Error::other(error.to_string()))
    });
    (report, same)
}

/// Opens the parent of an image, which has none itself.
fn parent(image: &BuiltImage) -> Option<vhdkit::image::Image> {
    let parent = image.parent.as_ref()?;
    Some(OpenOptions::new().open(storage(&parent.file), None).unwrap())
}

#[test]
fn a_whole_image_is_certain() {
    for seed in 0..60 {
        let options = RandomOptions { virtual_size_max: 64 * MIB, ..RandomOptions::chain(usize::from(seed % 3 == 0)) };
        let mut image = random_image(seed, &options);
        if seed % 4 == 1 {
            random_dirty_plan(seed + 1000, &image).apply(&mut image);
        }
        let parent = parent(&image);
        let options =
            RecoverOptions { parent: parent.as_ref().map(|parent| parent as &dyn BlockDevice), ..Default::default() };
        let (report, same) = recovered(&image, &options);
        assert_eq!(same, Ok(()), "seed {seed}: {report:?}");
        assert!(report.blocks_lost == 0 && report.blocks_guessed == 0, "seed {seed}: {report:?}");
    }
}

/// Twelve blocks of 2 MiB, ten of them with data, in the order of the disk.
fn dynamic() -> ImageBuilder {
    (1..11).fold(ImageBuilder::new(24 * MIB, 2 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(Content::Sparse { seed: block, stride: 8 }))
    })
}

#[test]
fn without_headers_and_region_tables_metadata_and_table_are_found() {
    for first in [0, 64 << 10, 192 << 10] {
        let zeros = vec![0; (MIB - first) as usize];
        let image = dynamic().patch(first, &zeros).build();
        let (report, same) = recovered(&image, &RecoverOptions::default());
        assert_eq!(same, Ok(()), "{report:?}");
        assert_eq!(report.disk_size, 24 * MIB);
    }
}

#[test]
fn without_metadata_the_sizes_are_inferred() {
    let whole = dynamic().build();
    let image = dynamic().patch(whole.layout.metadata, &vec![0; MIB as usize]).build();
    let (report, same) = recovered(&image, &RecoverOptions { disk_size: Some(24 * MIB), ..Default::default() });
    assert_eq!(same, Ok(()), "{report:?}");
    assert_eq!(report.block_size, 2 * MIB);
    assert!(!report.is_certain());
    // Without its size it ends with the last block that has data.
    let (report, _) = recovered(&image, &RecoverOptions::default());
    assert_eq!(report.disk_size, 22 * MIB);
}

#[test]
fn a_metadata_table_is_not_needed_for_its_items() {
    let whole = dynamic().build();
    let image = dynamic().patch(whole.layout.metadata, &[0xee; 4096]).build();
    let (report, same) = recovered(&image, &RecoverOptions::default());
    assert_eq!(same, Ok(()), "{report:?}");
    assert_eq!((report.block_size, report.disk_size), (2 * MIB, 24 * MIB));
}

#[test]
fn without_entries_neighbours_tell() {
    let whole = dynamic().build();
    for block in 1..11 {
        for garbage in [u64::MAX, 5, 0x0dd0_0000_0000_0006, 0x20_0004] {
            let image = dynamic().patch(whole.layout.payload_entry(block), &garbage.to_le_bytes()).build();
            let (report, same) = recovered(&image, &RecoverOptions::default());
            assert_eq!(same, Ok(()), "block {block} {garbage:#x}: {report:?}");
            assert_eq!((report.blocks_guessed, report.blocks_lost), (1, 0));
            assert!(!report.is_certain());
        }
    }
}

#[test]
fn a_fixed_disk_lies_in_order() {
    let builder = (0..16).fold(ImageBuilder::new(16 * MIB, 1 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(Content::Sparse { seed: block, stride: 4 }))
    });
    let builder = builder.fixed();
    let whole = builder.build();
    let image = builder.patch(whole.layout.bat, &[0; 4096]).build();
    let (report, same) = recovered(&image, &RecoverOptions::default());
    assert_eq!(same, Ok(()), "{report:?}");
    assert_eq!((report.blocks_guessed, report.bytes_unplaced), (16, 0));
}

#[test]
fn what_is_no_image_is_refused() {
    for (bytes, kind) in [
        (vec![0; 3 << 20], ErrorKind::NotVhdx),
        (vec![7; 100], ErrorKind::NotVhdx),
        (b"vhdxfile".to_vec(), ErrorKind::Truncated),
    ] {
        let file: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
        let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let error = recover(&file, None, &target, &RecoverOptions::default(), &()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(target.len().unwrap(), 0);
    }
}
