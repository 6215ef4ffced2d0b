//! What a second reader of the write path looked for: plans that are given up, second writers, closing in odd moments.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vhdkit::ErrorKind;
use vhdkit::format::header::{HEADER_BYTES, Header, OFFSETS};
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::ops::create::{CreateOptions, create};
use vhdkit::storage::{MemoryStorage, Storage};

const MIB: u64 = 1 << 20;

fn fresh(size: u64) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, &CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(size) }, &()).unwrap();
    storage
}

fn open(storage: &Arc<dyn Storage>) -> Image {
    OpenOptions::new().write(true).open(Arc::clone(storage), None).unwrap()
}

/// The I/O of an abandoned plan may end at any time later. It may hit its own block, never another.
#[test]
fn the_place_of_an_abandoned_plan_over_a_mapped_block_is_never_given_to_another() {
    let storage = fresh(64 * MIB);
    let image = open(&storage);
    image.write_at(&vec![1; 1 << 20], 0).unwrap();
    image.flush().unwrap();
    let plan = image.plan_write(4096..8192).unwrap();
    let (file, late) = (Arc::clone(plan.storage()), plan.file_offset());
    plan.abandon();
    image.discard(0..MIB).unwrap();
    for _ in 0..3 {
        image.flush().unwrap();
    }
    for block in 1..40 {
        image.write_at(&vec![2; 1 << 20], block * MIB).unwrap();
    }
    file.write_at(&[0xbb; 4096], late).unwrap();
    let mut buf = vec![0; 39 << 20];
    image.read_at(&mut buf, MIB).unwrap();
    assert!(buf.iter().all(|byte| *byte == 2), "late I/O of an abandoned plan hit another block");
    image.close().unwrap();
}

#[test]
fn closing_waits_as_long_as_one_likes() {
    let storage = fresh(64 * MIB);
    let image = open(&storage);
    image.write_at(&[1; 512], 0).unwrap();
    image.close_within(Duration::MAX).unwrap();
}

fn headers(storage: &Arc<dyn Storage>) -> [Header; 2] {
    OFFSETS.map(|offset| {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(&mut bytes, offset).unwrap();
        Header::decode(&bytes).unwrap()
    })
}

/// Others write one copy of the header per update: the one that is not current, which is not the one that we wrote last.
#[test]
fn another_writer_that_writes_one_copy_of_the_header_is_noticed() {
    let storage = fresh(64 * MIB);
    let image = open(&storage);
    image.write_at(&[1; 512], 0).unwrap();
    let copies = headers(&storage);
    let current = usize::from(copies[1].sequence_number > copies[0].sequence_number);
    let theirs = Header { sequence_number: copies[current].sequence_number + 1, ..copies[current] };
    storage.write_at(&theirs.encode(), OFFSETS[1 - current]).unwrap();
    let error = image.close().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert_eq!(headers(&storage)[1 - current], theirs, "what somebody else wrote stays");
}

/// Whoever wins, an image that takes writes has a file that does, and no write fails for another reason than the mode.
#[test]
fn reopening_from_two_threads_leaves_no_mixture() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vhdx");
    let bytes = {
        let storage = fresh(64 * MIB);
        let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
        storage.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    std::fs::write(&path, bytes).unwrap();
    let image = OpenOptions::new().write(true).open_path(&path).unwrap();
    let until = Instant::now() + Duration::from_secs(2);
    let (mut written, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        for write in [true, false] {
            let image = &image;
            scope.spawn(move || {
                while Instant::now() < until {
                    let _ = image.reopen(write);
                    std::thread::yield_now();
                }
            });
        }
        while Instant::now() < until {
            match image.write_at(&[1; 512], written % 32 * MIB) {
                Ok(()) => written += 1,
                Err(error) => {
                    refused += 1;
                    let expected = matches!(error.kind(), ErrorKind::ReadOnly | ErrorKind::Busy);
                    assert!(expected, "after {written} writes and {refused} refusals: {error}");
                }
            }
        }
    });
    assert!(written > 0 && refused > 0, "{written} {refused}");
    while image.reopen(true).is_err() {}
    image.write_at(&[2; 512], 0).unwrap();
    image.close().unwrap();
}
