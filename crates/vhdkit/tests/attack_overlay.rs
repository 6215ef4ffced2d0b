//! What a log full of zero descriptors takes in memory is bounded by the length of the log, and by a few MiB for a short one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::image::{Image, OpenOptions};
use vhdkit::storage::MemoryStorage;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec, LogRing};
use vhdkit_testkit::{Guid, ImageBuilder};

/// Opens an image whose log zeroes so many pages, every second one, behind its blocks.
fn open_with(pages: u64) -> vhdkit::Result<Image> {
    let guid = Guid(*b"log of many zero");
    let mut image = ImageBuilder::new(4 << 20, 1 << 20)
        .with(|image| image.log_length = 8 << 20)
        .both_headers(|header| header.log_guid = guid)
        .build();
    let mut entry = LogEntrySpec::new(guid, 1, image.file.len()).with(|entry| entry.last_file_offset = 1 << 30);
    for page in 0..pages {
        entry = entry.descriptor(DescriptorSpec::zero((32 << 20) + page * 8192, 4096));
    }
    LogRing::new(image.layout.log, 8 << 20).place(&mut image.file, &entry);
    let bytes: Vec<u8> = (&image.file).into();
    OpenOptions::new().open(Arc::new(MemoryStorage::from_bytes(bytes)), None)
}

#[test]
fn as_many_changes_as_fit_are_replayed_and_more_are_refused() {
    let image = open_with(1 << 16).expect("that many are allowed");
    let replay = image.layers().first().unwrap().replay().unwrap();
    assert_eq!(replay.zeroed_bytes, (1 << 16) * 4096);
    let error = open_with((1 << 16) + 1).expect_err("one more is not");
    assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
}
