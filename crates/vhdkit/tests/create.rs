//! New images: what other programs say about them, byte for byte where that can be told.
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

use create_support::{Limited, allocated, bat_entry, file_storage, fixed_guids, read_u64, region_offset};
use vhdkit::ErrorKind;
use vhdkit::format::guid::Guid;
use vhdkit::ops::create::{BlockState, CreateOptions, NewDiskType, NewParent, Preallocation, create};
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

fn made(options: &CreateOptions) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, options, &()).unwrap();
    storage
}

#[test]
fn a_fixed_image_maps_every_block_in_order() {
    // 5 GiB of 1 MiB blocks: over one chunk, so that a bitmap slot lies between.
    let size = 5 * 1024 * MIB + 512;
    let options =
        CreateOptions { disk_type: NewDiskType::Fixed, block_size: Some(1 << 20), ..CreateOptions::new(size) };
    let storage = made(&options);
    let bat = region_offset(storage.as_ref(), true);
    let blocks = size.div_ceil(MIB);
    let mut expected = storage.len().unwrap() - blocks * MIB;
    for block in 0..blocks {
        let entry = bat_entry(storage.as_ref(), bat, block + block / 4096);
        assert_eq!(entry, expected | 6, "block {block}");
        expected += MIB;
    }
    assert_eq!(expected, storage.len().unwrap(), "the file ends with the last block");
    assert_eq!(bat_entry(storage.as_ref(), bat, 4096), 0, "the bitmap slot of the first chunk");
    assert_eq!(bat_entry(storage.as_ref(), bat, blocks + blocks / 4096), 0, "behind the last block");
}

#[test]
fn zero_blocks_have_no_offset_and_bitmap_slots_stay_empty() {
    let options = CreateOptions {
        block_state: BlockState::Zero,
        block_size: Some(1 << 20),
        ..CreateOptions::new(5 * 1024 * MIB)
    };
    let storage = made(&options);
    let bat = region_offset(storage.as_ref(), true);
    for index in 0..=5120 {
        assert_eq!(bat_entry(storage.as_ref(), bat, index), if index == 4096 { 0 } else { 2 }, "entry {index}");
    }
    assert_eq!(bat_entry(storage.as_ref(), bat, 5121), 0);
}

#[test]
fn both_headers_and_region_tables_are_as_windows_writes_them() {
    let storage = made(&fixed_guids(CreateOptions::new(64 * MIB)));
    let storage = storage.as_ref();
    let sequences = [read_u64(storage, 0x10008), read_u64(storage, 0x20008)];
    assert_eq!(sequences[1], sequences[0] + 1);
    let mut copies = [vec![0; 65536], vec![0; 65536]];
    storage.read_at(&mut copies[0], 192 << 10).unwrap();
    storage.read_at(&mut copies[1], 256 << 10).unwrap();
    assert_eq!(copies[0], copies[1]);
    let required: Vec<u8> = (0..2).map(|entry| copies[0][16 + 32 * entry + 28]).collect();
    assert_eq!(required, [1, 1]);
    assert_eq!(region_offset(storage, true), 3 * MIB);
    assert_eq!(region_offset(storage, false), 2 * MIB);
    assert_eq!(&copies[0][16..20], &[0x66, 0x77, 0xc2, 0x2d], "the BAT comes first");
    let mut log_guid = [1; 16];
    storage.read_at(&mut log_guid, 0x10000 + 48).unwrap();
    assert_eq!(log_guid, [0; 16]);
}

#[test]
fn the_same_identifiers_make_the_same_bytes() {
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        let options = fixed_guids(CreateOptions { disk_type, ..CreateOptions::new(16 * MIB) });
        let copies = [(); 2].map(|()| {
            let storage = Arc::new(MemoryStorage::new());
            let shared: Arc<dyn Storage> = Arc::clone(&storage) as Arc<dyn Storage>;
            create(&shared, &options, &()).unwrap();
            storage.to_vec()
        });
        assert!(copies[0] == copies[1]);
        let random = CreateOptions { disk_id: None, ..options };
        let other = [(); 2].map(|()| {
            let storage = Arc::new(MemoryStorage::new());
            let shared: Arc<dyn Storage> = Arc::clone(&storage) as Arc<dyn Storage>;
            create(&shared, &random, &()).unwrap();
            storage.to_vec()
        });
        assert!(other[0] != other[1], "a disk id that is not given is random");
    }
}

#[test]
fn stale_space_makes_the_same_bytes() {
    for (disk_type, preallocation) in [
        (NewDiskType::Dynamic, Preallocation::None),
        (NewDiskType::Dynamic, Preallocation::Full),
        (NewDiskType::Fixed, Preallocation::None),
        (NewDiskType::Fixed, Preallocation::Full),
    ] {
        let options = fixed_guids(CreateOptions { disk_type, preallocation, ..CreateOptions::new(9 * MIB + 512) });
        let clean = Arc::new(MemoryStorage::new());
        create(&(Arc::clone(&clean) as Arc<dyn Storage>), &options, &()).unwrap();
        let stale = Arc::new(MemoryStorage::new().without_zero_growth());
        create(&(Arc::clone(&stale) as Arc<dyn Storage>), &options, &()).unwrap();
        assert!(clean.to_vec() == stale.to_vec(), "{disk_type:?} {preallocation:?}");
    }
}

#[test]
fn preallocation_takes_the_space() {
    let directory = tempfile::tempdir().unwrap();
    for (preallocation, least, most) in [
        (Preallocation::None, 0, MIB),
        (Preallocation::Falloc, 20 * MIB, 40 * MIB),
        (Preallocation::Full, 20 * MIB, 40 * MIB),
    ] {
        let path = directory.path().join(format!("{preallocation:?}.vhdx"));
        let options = CreateOptions { disk_type: NewDiskType::Fixed, preallocation, ..CreateOptions::new(20 * MIB) };
        create(&file_storage(&path), &options, &()).unwrap();
        let taken = allocated(&path);
        assert!((least..=most).contains(&taken), "{preallocation:?}: {taken}");
    }
}

#[test]
fn storage_that_cannot_reserve_says_so() {
    let storage: Arc<dyn Storage> = Arc::new(Limited::new(u64::MAX));
    let options = CreateOptions { preallocation: Preallocation::Falloc, ..CreateOptions::new(MIB) };
    let error = create(&storage, &options, &()).unwrap_err();
    assert!(error.to_string().contains("cannot reserve space"), "{error}");
    assert!(error.hint().is_some());
}

#[test]
fn a_full_file_system_is_told() {
    let storage: Arc<dyn Storage> = Arc::new(Limited::new(20 * MIB));
    let options = CreateOptions {
        disk_type: NewDiskType::Fixed,
        preallocation: Preallocation::Full,
        ..CreateOptions::new(64 * MIB)
    };
    let error = create(&storage, &options, &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(error.io_error().unwrap().kind(), std::io::ErrorKind::StorageFull);
    assert!(error.hint().is_some());
}

#[test]
fn a_child_carries_its_locator() {
    let parent = NewParent {
        data_write_guid: Guid::from_printed(0x1111_2222_3333_4444_5555_6666_7777_8888),
        logical_sector_size: 4096,
        physical_sector_size: 4096,
        disk_size: 16 * MIB,
        disk_id: Guid::from_printed(9),
        relative_path: ".\\base.vhdx".to_owned(),
        absolute_path: Some("C:\\disks\\base.vhdx".to_owned()),
    };
    let storage = made(&CreateOptions::child(parent));
    let metadata = region_offset(storage.as_ref(), false);
    let mut bytes = vec![0; 1 << 20];
    storage.read_at(&mut bytes, metadata).unwrap();
    for text in ["{11112222-3333-4444-5555-666677778888}", ".\\base.vhdx", "C:\\disks\\base.vhdx", "parent_linkage"] {
        let needle: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(bytes.windows(needle.len()).any(|window| window == needle), "{text}");
    }
    assert_eq!(&bytes[65536..65544], &[0, 0, 0x20, 0, 2, 0, 0, 0], "2 MiB blocks, has parent");
}

#[test]
fn cancelling_ends_it_before_it_is_an_image() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let options = CreateOptions {
        disk_type: NewDiskType::Fixed,
        preallocation: Preallocation::Full,
        ..CreateOptions::new(64 * MIB)
    };
    let progress =
        create_support::Hook(
            |done: u64| {
                if done > 10 * MIB { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        );
    let error = create(&storage, &options, &progress).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let mut signature = [0; 8];
    storage.read_at(&mut signature, 0).unwrap();
    assert_eq!(signature, [0; 8]);
}
