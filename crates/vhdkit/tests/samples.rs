//! The chain in `samples/`: the child shows its own files, and the parent's where it changed nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "test code")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::format::metadata::DiskType;
use vhdkit::image::{BlockDevice, FileResolver, Image, OpenOptions};

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../samples").join(name)
}

fn disk(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn contains(disk: &[u8], text: &str) -> bool {
    // File contents begin at a sector.
    disk.chunks(512).any(|sector| sector.starts_with(text.as_bytes()))
}

#[test]
fn the_child_shows_its_own_files_over_the_parents() {
    let parents = Arc::new(FileResolver::new().allow_own_directory());
    let child = OpenOptions::new().parents(parents).open_path(&sample("child.vhdx")).unwrap();
    let parent = OpenOptions::new().open_path(&sample("parent.vhdx")).unwrap();
    assert_eq!((child.disk_type(), parent.disk_type()), (DiskType::Differencing, DiskType::Dynamic));
    assert_eq!(child.layers().len(), 2);
    let (child, parent) = (disk(&child), disk(&parent));
    assert_eq!(child[510..512], [0x55, 0xaa]);
    assert!(contains(&parent, "Hello from the parent."));
    assert!(contains(&child, "Hello from the child"));
    assert!(!contains(&parent, "Hello from the child"));
    assert!(contains(&child, "A FAT volume inside a VHDX"), "a file that only the parent has");
    assert!(contains(&child, "This file exists in the child only."));
}

#[test]
fn parents_are_denied_unless_allowed() {
    let error = OpenOptions::new().open_path(&sample("child.vhdx")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentDenied);
    let alone = OpenOptions::new().without_parents().open_path(&sample("child.vhdx")).unwrap();
    assert!(alone.parents_missing());
    let error = alone.read_at(&mut vec![0; 16 << 20], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMissing);
}
