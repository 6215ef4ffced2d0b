//! What a file could not take is reported: no write is cut short without an error, nothing is half done and called done.
//!
//! The tests on file systems of their own need root and loop mounts. They are ignored;
//! `VHDKIT_ROOT_TESTS=1 cargo test --test storage_failures -- --include-ignored` runs them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use vhdkit::storage::{FileStorage, Storage};

/// No file may become longer than this where [`limited`] runs something.
const LIMIT: u64 = 128 << 10;

/// The variable that names the directory to work in; set where the limit is.
const DIRECTORY: &str = "VHDKIT_TEST_LIMITED_DIRECTORY";

/// Runs a test of this program once more, in a process whose files the kernel keeps below [`LIMIT`]: what reaches past
/// that is cut short there, as on a disk that becomes full in the middle of a write.
fn limited(test: &str, directory: &Path) {
    // In blocks of 512 bytes. Without the trap the kernel would end the process.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", LIMIT / 512);
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg(program).args(["--exact", test, "--include-ignored", "--nocapture"]);
    let output = command.env(DIRECTORY, directory).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

fn file_in(directory: &Path) -> FileStorage {
    FileStorage::from_file(tempfile::tempfile_in(directory).unwrap(), None).unwrap()
}

fn bytes_of(storage: &FileStorage) -> Vec<u8> {
    let mut bytes = vec![0xEE; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Every way of writing, over the limit.
fn writing_past_the_limit_fails(directory: &Path) {
    const MIB: u64 = 1 << 20;
    let storage = file_in(directory);
    assert_eq!(storage.write_at(&[1; 2 * LIMIT as usize], 512).unwrap_err().kind(), ErrorKind::FileTooLarge);
    let bytes = bytes_of(&storage);
    assert_eq!(bytes.len() as u64, LIMIT, "the kernel took a part of it");
    assert!(bytes[512..].iter().all(|&byte| byte == 1));
    assert_eq!(storage.write_at(&[2], LIMIT).unwrap_err().kind(), ErrorKind::FileTooLarge);
    assert_eq!(storage.set_len(MIB).unwrap_err().kind(), ErrorKind::FileTooLarge);
    assert_eq!(storage.zero_range(4096..MIB).unwrap_err().kind(), ErrorKind::FileTooLarge);
    match storage.allocate(0..MIB) {
        Ok(reserved) => assert!(!reserved, "nothing can be reserved there"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::FileTooLarge),
    }
    assert_eq!(storage.len().unwrap(), LIMIT);
    // A source that is long enough is at hand.
    let source = FileStorage::from_file(File::open(std::env::current_exe().unwrap()).unwrap(), None).unwrap();
    let target = file_in(directory);
    if let Ok(copied) = target.copy_range(&source, 0, 0, MIB) {
        assert!(copied <= LIMIT);
        assert_eq!(target.len().unwrap(), copied);
    }
}

#[test]
fn what_the_kernel_cuts_short_is_an_error() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return writing_past_the_limit_fails(Path::new(&directory));
    }
    for directory in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
        limited("what_the_kernel_cuts_short_is_an_error", Path::new(directory));
    }
}

fn need_root_tests() {
    assert!(
        std::env::var_os("VHDKIT_ROOT_TESTS").is_some_and(|value| value == "1"),
        "set VHDKIT_ROOT_TESTS=1 where there are root rights and loop devices; without them leave this test ignored"
    );
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A mounted file system.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        run("mount", &[arguments, &[directory.path().to_str().unwrap()]].concat());
        Self(directory)
    }

    /// In a file of 8 MiB, which goes when the file system does.
    fn small(kind: &str) -> Self {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8 << 20).unwrap();
        let path = image.path().to_str().unwrap();
        run(&format!("mkfs.{kind}"), &["-q", "-F", path]);
        Self::new(&["-o", "loop", path])
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn zeros_that_have_to_be_written_and_are_cut_short_are_an_error() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return writing_past_the_limit_fails(Path::new(&directory));
    }
    need_root_tests();
    let ramfs = Mount::new(&["-t", "ramfs", "ramfs"]); // it has no fallocate of any kind
    limited("zeros_that_have_to_be_written_and_are_cut_short_are_an_error", ramfs.0.path());
}

/// Fills a file system to the last block; then nothing that needs space is called done.
fn a_full_disk_is_reported(directory: &Path) {
    const PIECE: usize = 100_003;
    let storage = file_in(directory);
    let mut written = 0;
    let error = loop {
        match storage.write_at(&[1 + (written % 7) as u8; PIECE], (written * PIECE) as u64) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 1000, "it never becomes full");
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    let bytes = bytes_of(&storage);
    assert!(written > 0);
    for (index, piece) in bytes.chunks_exact(PIECE).take(written).enumerate() {
        assert!(piece.iter().all(|&byte| byte == 1 + (index % 7) as u8), "piece {index}");
    }
    let len = storage.len().unwrap();
    match storage.allocate(0..64 << 20) {
        Ok(reserved) => assert!(!reserved, "64 MiB cannot be reserved"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::StorageFull),
    }
    match storage.zero_range(len..len + (64 << 20)) {
        Ok(()) => {
            let mut zeros = vec![1; 64 << 20];
            storage.read_at(&mut zeros, len).unwrap();
            assert!(zeros.iter().all(|&byte| byte == 0));
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::StorageFull),
    }
    // Nothing is needed for what makes room, and after it writing goes on.
    let hole = if storage.punch_hole(0..len).unwrap() { 0 } else { len / 2 };
    storage.set_len(if hole == 0 { len } else { hole }).unwrap();
    storage.sync().unwrap();
    storage.write_at(&[9; PIECE], hole).unwrap();
    storage.sync().unwrap();
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_disk_that_becomes_full_is_reported() {
    need_root_tests();
    a_full_disk_is_reported(Mount::small("ext4").0.path());
    a_full_disk_is_reported(Mount::small("ext2").0.path());
    a_full_disk_is_reported(Mount::new(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).0.path());
}
