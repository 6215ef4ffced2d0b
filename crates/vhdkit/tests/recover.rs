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

/// Written zeros are no part of the table behind them.
#[test]
fn zeros_before_a_table_are_not_its_beginning() {
    let whole = dynamic().build();
    let bat = whole.layout.bat;
    for size in [None, Some(24 * MIB)] {
        let image = dynamic().patch(0, &vec![0; bat as usize]).build();
        let (report, same) =
            recovered(&image, &RecoverOptions { disk_size: size, block_size: Some(2 << 20), ..Default::default() });
        let place = format!("found by its shape at {bat:#x}");
        assert!(report.parts.iter().any(|part| part.detail == place), "{report:?}");
        assert!(report.blocks_guessed == 10 && report.blocks_certain == 0 && !report.is_certain(), "{report:?}");
        if report.disk_size == 24 * MIB {
            assert_eq!(same, Ok(()), "{report:?}");
        }
    }
}

/// The entry of a block that the file cuts names its place like any other.
#[test]
fn a_last_block_that_the_file_cuts_is_found_where_its_entry_says() {
    let half = MIB / 2;
    let builder = ImageBuilder::new(10 * MIB + half, 1 << 20);
    let builder = builder.block(0, BlockSpec::present(Content::Sparse { seed: 1, stride: 7 }));
    let builder = builder.block(10, BlockSpec::present(Content::Sparse { seed: 2, stride: 7 }));
    let whole = builder.build();
    let place = whole.layout.payload_block(10);
    for entry in [place | 6 | 0x10, place | 4] {
        let image = builder.clone().with(|builder| {
            builder.bat_raw.insert(10, entry);
        });
        let file = storage(&image.build().file);
        file.set_len(place + half).unwrap();
        let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let report = recover(&file, None, &target, &RecoverOptions::default(), &()).unwrap();
        assert!(report.blocks_lost == 0 && report.bytes_unplaced == 0, "{report:?}");
        let disk = OpenOptions::new().open(target, None).unwrap();
        let same = whole.model.compare_with(|offset, buffer| {
            disk.read_at(buffer, offset).map_err(|error| std::io::Error::other(error.to_string()))
        });
        assert_eq!(same, Ok(()));
    }
}

/// A damaged size is not taken for certain where the table says something else.
#[test]
fn a_size_that_the_table_contradicts_is_doubted() {
    let whole = dynamic().build();
    let item = (0..64)
        .map(|number| whole.layout.metadata + (64 << 10) + number * 8)
        .find(|place| {
            let mut bytes = [0; 8];
            storage(&whole.file).read_at(&mut bytes, *place).unwrap();
            u64::from_le_bytes(bytes) == 24 * MIB
        })
        .unwrap();
    let with_size = |size: u64| dynamic().patch(item, &size.to_le_bytes()).build();
    let (report, _) = recovered(&with_size(8 * MIB), &RecoverOptions::default());
    assert!(report.parts.iter().any(|part| part.name == "disk size" && part.detail.contains("--size")), "{report:?}");
    assert!(!report.is_certain() && report.disk_size == 8 * MIB, "{report:?}");
    let (report, same) =
        recovered(&with_size(8 * MIB), &RecoverOptions { disk_size: Some(24 * MIB), ..Default::default() });
    assert_eq!(same, Ok(()), "{report:?}");
    // More blocks than the table has room for.
    let (report, _) = recovered(&with_size(4 << 40), &RecoverOptions::default());
    assert!(report.disk_size == 22 * MIB && report.blocks_lost == 0 && !report.is_certain(), "{report:?}");
}

#[test]
fn what_is_given_against_the_metadata_is_not_certain() {
    let image = dynamic().build();
    let (report, same) = recovered(&image, &RecoverOptions { logical_sector_size: Some(4096), ..Default::default() });
    assert_eq!(same, Ok(()));
    assert!(!report.is_certain(), "{report:?}");
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let odd = RecoverOptions { disk_size: Some(3), ..Default::default() };
    let error = recover(&storage(&image.file), None, &target, &odd, &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

/// The file may end inside the last of the blocks whose entries lead nowhere.
#[test]
fn a_last_block_without_its_place_is_found_in_order() {
    let builder = ImageBuilder::new(24 * MIB, 8 << 20);
    let builder =
        (0..3).fold(builder, |builder, block| builder.block(block, BlockSpec::present(Content::pattern(block + 1))));
    let whole = builder.build();
    let image = builder.clone().with(|builder| {
        builder.bat_raw.insert(2, 6);
    });
    for cut in [0, 1, MIB] {
        let file = storage(&image.build().file);
        file.set_len(whole.layout.payload_block(2) + 8 * MIB - cut).unwrap();
        let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let report = recover(&file, None, &target, &RecoverOptions::default(), &()).unwrap();
        assert!(
            report.blocks_lost == 0 && report.blocks_guessed == 1 && report.bytes_unplaced == 0,
            "{cut}: {report:?}"
        );
    }
}

/// A header of a GPT on a disk of so many sectors of 512 bytes (UEFI specification 5.3.2).
fn gpt_header(sectors: u64) -> Vec<u8> {
    let mut header = b"EFI PART\0\0\x01\0\x5c\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    for number in [1, sectors - 1, 34, sectors - 34] {
        header.extend(number.to_le_bytes());
    }
    header.resize(92, 0);
    let sum = header.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    });
    header[16..20].copy_from_slice(&(!sum).to_le_bytes());
    header
}

/// A disk that grew, and whose GPT was left behind: without metadata the entries tell how large it is.
#[test]
fn a_table_that_was_left_behind_does_not_cut_the_disk() {
    let builder = dynamic().block(0, BlockSpec::present(Content::pattern(50)));
    let layout = builder.build().layout;
    let builder = builder.patch(layout.payload_block(0) + 512, &gpt_header(16_384));
    let image = builder.patch(layout.metadata, &vec![0; MIB as usize]).build();
    let (report, _) = recovered(&image, &RecoverOptions::default());
    assert_eq!((report.block_size, report.disk_size), (2 * MIB, 22 * MIB), "{report:?}");
    let size = report.parts.iter().find(|part| part.name == "disk size").unwrap();
    assert!(size.detail.contains("GPT") && !report.is_certain(), "{report:?}");
}
