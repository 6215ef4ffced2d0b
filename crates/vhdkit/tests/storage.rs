//! Every storage passes the conformance suite, and files behave as files should.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::storage::{FileAccess, FileKind, FileStorage, LockKind, MemoryStorage, OverlayStorage, Sharing, Storage};
use vhdkit_testkit::storage_suite;

fn file_in(directory: impl AsRef<Path>) -> Arc<dyn Storage> {
    let file = tempfile::tempfile_in(directory).unwrap();
    Arc::new(FileStorage::from_file(file, None).unwrap())
}

const BUILD: &str = env!("CARGO_TARGET_TMPDIR");
const TMPFS: &str = "/dev/shm";

#[test]
fn files_on_the_build_file_system_pass() {
    let directory = PathBuf::from(BUILD);
    storage_suite::run(|| file_in(&directory));
}

#[test]
fn files_on_tmpfs_pass() {
    storage_suite::run(|| file_in(TMPFS));
}

#[test]
fn memory_passes() {
    storage_suite::run(|| Arc::new(MemoryStorage::new()));
}

#[test]
fn memory_without_zero_growth_passes() {
    storage_suite::run(|| Arc::new(MemoryStorage::new().without_zero_growth()));
}

#[test]
fn overlay_over_memory_passes_and_leaves_the_base_alone() {
    let bytes: Vec<u8> = (0..400_000_u32).map(|at| (at % 251) as u8 + 1).collect();
    storage_suite::run(|| {
        let own = MemoryStorage::from_bytes(bytes.clone()); // an identity of its own for each
        Arc::new(OverlayStorage::new(Arc::new(own)).unwrap())
    });
    let base = Arc::new(MemoryStorage::from_bytes(bytes.clone()));
    for seed in 1..=10 {
        let view = OverlayStorage::new(base.clone()).unwrap();
        storage_suite::random_program(&view, bytes.clone(), seed, 100);
    }
    assert_eq!(base.to_vec(), bytes);
}

#[test]
fn overlay_over_stale_memory_passes_and_grows_zeros() {
    let stale = || {
        let base = MemoryStorage::new().without_zero_growth();
        base.set_len(10_000).unwrap();
        OverlayStorage::new(Arc::new(base)).unwrap()
    };
    storage_suite::run(|| Arc::new(stale()));
    let view = stale();
    assert!(view.growth_reads_zero());
    view.set_len(20_000).unwrap();
    let mut bytes = [1; 2];
    view.read_at(&mut bytes, 9999).unwrap();
    assert_eq!(bytes, [0xa5, 0]);
}

#[test]
fn overlay_over_a_sparse_file_passes_and_leaves_the_base_alone() {
    let mut bytes = vec![0_u8; 300_000];
    bytes[4096..9000].fill(7);
    bytes[200_000..262_144].fill(9);
    let base = file_in(BUILD);
    base.write_at(&bytes[4096..9000], 4096).unwrap();
    base.write_at(&bytes[200_000..262_144], 200_000).unwrap();
    base.set_len(bytes.len() as u64).unwrap();
    for seed in 1..=10 {
        let view = OverlayStorage::new(Arc::clone(&base)).unwrap();
        assert_eq!(view.identity(), base.identity());
        assert_eq!(view.next_data(0..300_000).unwrap(), base.next_data(0..300_000).unwrap());
        storage_suite::random_program(&view, bytes.clone(), seed, 100);
    }
    let mut after = vec![0; bytes.len()];
    base.read_at(&mut after, 0).unwrap();
    assert_eq!(after, bytes);
    assert_eq!(base.len().unwrap(), bytes.len() as u64);
    storage_suite::run(|| Arc::new(OverlayStorage::new(file_in(BUILD)).unwrap()));
}

#[test]
fn overlay_tells_what_is_still_the_base() {
    let base = Arc::new(MemoryStorage::from_bytes(vec![3; 20_000]));
    let view = OverlayStorage::new(base).unwrap();
    assert!(view.is_base(0..20_000));
    assert!(!view.is_base(19_999..20_001));
    view.write_at(&[1], 5000).unwrap();
    assert!(view.is_base(0..4096) && view.is_base(8192..20_000) && !view.is_base(8191..8193));
    view.zero_range(10_000..10_001).unwrap();
    assert!(view.is_base(8192..10_000) && !view.is_base(10_000..10_001) && view.is_base(10_001..20_000));
    assert!(view.memory_bytes() < 10_000);
    view.zero_range(0..1 << 50).unwrap();
    assert!(view.memory_bytes() < 1000, "zeroing needs no memory per byte");
    assert_eq!(view.next_data(0..1 << 50).unwrap(), None);
}

#[test]
fn memory_is_sparse_and_knows_its_holes() {
    let storage = MemoryStorage::with_len(1 << 50);
    storage.write_at(&[1], 1 << 40).unwrap();
    assert_eq!(storage.next_data(0..1 << 50).unwrap(), Some(1 << 40..(1 << 40) + 65_536));
    assert_eq!(storage.next_data((1 << 40) + 65_536..1 << 50).unwrap(), None);
    assert!(storage.punch_hole(1 << 40..(1 << 40) + 65_536).unwrap());
    assert_eq!(storage.next_data(0..1 << 50).unwrap(), None);
    let sparse = MemoryStorage::from_bytes(vec![0; 200_000]);
    assert_eq!(sparse.next_data(0..200_000).unwrap(), None);
    let stale = MemoryStorage::from_bytes(vec![7; 10]).without_zero_growth();
    stale.set_len(12).unwrap();
    assert_eq!(stale.to_vec(), [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0xa5, 0xa5]);
    let stale = MemoryStorage::with_len(70_000).without_zero_growth();
    stale.set_len(200_000).unwrap();
    let bytes = stale.to_vec();
    assert!(bytes[..70_000].iter().all(|&byte| byte == 0) && bytes[70_000..].iter().all(|&byte| byte == 0xa5));
}

#[test]
fn files_have_holes_that_cost_nothing() {
    for directory in [BUILD, TMPFS] {
        let storage = file_in(directory);
        storage.write_at(&[1; 65_536], 1 << 30).unwrap();
        let found = storage.next_data(0..2 << 30).unwrap().unwrap();
        assert_eq!(found, 1 << 30..(1 << 30) + 65_536, "in {directory}");
        assert!(storage.punch_hole(1 << 30..(1 << 30) + 65_536).unwrap());
        assert_eq!(storage.as_file().unwrap().metadata().unwrap().blocks(), 0, "in {directory}");
        assert!(storage.allocate(0..1 << 20).unwrap());
        assert!(storage.as_file().unwrap().metadata().unwrap().blocks() >= 2048, "in {directory}");
    }
}

fn open_error(path: &Path, access: FileAccess) -> vhdkit::Error {
    let error = FileStorage::open(path, access, Sharing::Normal).expect_err("this cannot be opened");
    assert_eq!(error.path(), Some(path));
    assert!(error.hint().is_some(), "{error} has no next step");
    error
}

#[test]
fn what_is_not_a_file_is_an_error_and_not_a_hang() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let link = directory.path().join("link to the pipe");
    std::os::unix::fs::symlink(&pipe, &link).unwrap();
    let missing = directory.path().join("missing");
    for access in [FileAccess::Read, FileAccess::Write] {
        for (path, what) in [
            (directory.path(), "a directory"),
            (&pipe, "a pipe"),
            (&link, "a pipe"),
            (&socket, "a socket"),
            (Path::new("/dev/null"), "a character device"),
            (Path::new("/dev/zero"), "a character device"),
            (Path::new("/dev/tty"), "a character device"),
        ] {
            let error = open_error(path, access);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            assert!(error.message().contains(what), "{error}");
        }
        assert_eq!(open_error(&missing, access).io_error().unwrap().kind(), io::ErrorKind::NotFound);
        let error = open_error(&pipe.join("below"), access);
        assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::NotADirectory);
    }
    let null = FileStorage::from_file(File::open("/dev/null").unwrap(), Some("null".into())).unwrap_err();
    assert_eq!((null.kind(), null.path()), (ErrorKind::InvalidArgument, Some(Path::new("null"))));
    for path in [directory.path(), &pipe, &missing, Path::new("/dev/null")] {
        FileStorage::open_block_target(path).unwrap_err();
    }
    let loop_link = directory.path().join("loop");
    std::os::unix::fs::symlink(&loop_link, &loop_link).unwrap();
    open_error(&loop_link, FileAccess::Read);
}

#[test]
fn an_opened_file_tells_what_it_is() {
    let named = tempfile::NamedTempFile::new().unwrap();
    let storage = FileStorage::open(named.path(), FileAccess::Write, Sharing::Normal).unwrap();
    assert_eq!((storage.kind(), storage.path()), (FileKind::Regular, Some(named.path())));
    assert_eq!(storage.lock_report().how, LockKind::Ofd);
    assert_eq!(storage.lock_report().note, None);
    let taken = FileStorage::from_file(named.reopen().unwrap(), None).unwrap();
    assert_eq!(taken.lock_report().how, LockKind::None);
    assert_eq!(taken.identity(), storage.identity());
    let hard_link = named.path().with_extension("link");
    std::fs::hard_link(named.path(), &hard_link).unwrap();
    let linked = FileStorage::open(&hard_link, FileAccess::Read, Sharing::ForceShare).unwrap();
    std::fs::remove_file(&hard_link).unwrap();
    assert_eq!(linked.identity(), storage.identity());
    assert_ne!(linked.identity(), file_in(TMPFS).identity());
    linked.write_at(&[1], 0).expect_err("it was opened for reading");
    let error = FileStorage::open(named.path(), FileAccess::Write, Sharing::ForceShare).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn copying_between_files_happens_in_the_kernel_where_it_can() {
    for directory in [BUILD, TMPFS] {
        let (source, target) = (file_in(directory), file_in(directory));
        source.write_at(&[5; 100_000], 0).unwrap();
        assert_eq!(target.copy_range(&*source, 1000, 77, 90_000).unwrap(), 90_000, "in {directory}");
        assert_eq!(target.len().unwrap(), 90_077);
        assert_eq!(target.copy_range(&*source, 99_990, 0, 90_000).unwrap(), 10, "the source ends");
        let memory = MemoryStorage::with_len(4096);
        assert_eq!(target.copy_range(&memory, 0, 0, 4096).unwrap(), 0);
        assert!(!target.clone_range(&memory, 0, 0, 4096).unwrap());
    }
    // Between two file systems of different kinds the kernel does not.
    let (source, target) = (file_in(BUILD), file_in(TMPFS));
    source.write_at(&[5; 4096], 0).unwrap();
    assert_eq!(target.copy_range(&*source, 0, 0, 4096).unwrap(), 0);
    assert!(!target.clone_range(&*source, 0, 0, 4096).unwrap());
}
