//! Locks that vhdkit and QEMU see of each other, on raw and on VHDX images.
//!
//! The tests with QEMU need qemu-img and qemu-io. They are ignored; `cargo test --test locking -- --include-ignored`
//! runs them, and they fail where the tools are missing: nothing that cannot run counts as passed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;
use vhdkit::storage::{FileAccess, FileStorage, LockKind, NewFile, NewFileOptions, Sharing, Storage};
use vhdkit::{ErrorKind, Result};

/// One test at a time: a process that another thread starts holds all open files for a moment, and their locks.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const FORMATS: [&str; 2] = ["raw", "vhdx"];

/// An image of 16 MiB, and the directory that it is in.
fn image(format: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("image.{format}"));
    assert!(qemu_img(&["create", "-q", "-f", format], &path, &["16M"]).status.success());
    (directory, path)
}

fn qemu_img(before: &[&str], path: &Path, after: &[&str]) -> Output {
    Command::new("qemu-img").args(before).arg(path).args(after).output().expect("qemu-img")
}

/// What `qemu-io` says about an image that it opens for reading and writing, or for reading alone.
fn qemu_io(format: &str, path: &Path, read_only: bool) -> Output {
    let mut command = Command::new("qemu-io");
    if read_only {
        command.arg("-r");
    }
    command.args(["-f", format, "-c", "read 0 512"]).arg(path).output().expect("qemu-io")
}

/// Checks that QEMU refused because of a lock.
fn assert_lock_error(output: &Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    // qemu-io reports an image that it could not open as a success in some cases, so that the text decides.
    assert!(text.contains("Failed to get") && text.contains("lock"), "{output:?}");
}

fn assert_no_lock_error(output: &Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !text.contains("lock"), "{output:?}");
}

/// A `qemu-io` that holds an image open until it is dropped.
struct QemuIo {
    child: Child,
    input: Option<ChildStdin>,
}

impl QemuIo {
    fn open(format: &str, path: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child = command
            .args(["-f", format])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io");
        let mut input = child.stdin.take().unwrap();
        // It has opened the image when it answers.
        input.write_all(b"length\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("16 MiB") {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "qemu-io ended");
        }
        Self { child, input: Some(input) }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}

fn open(path: &Path, access: FileAccess) -> Result<FileStorage> {
    FileStorage::open(path, access, Sharing::Normal)
}

/// The error of an opening that must not succeed.
fn locked(path: &Path, access: FileAccess) -> vhdkit::Error {
    let error = open(path, access).expect_err("it is in use");
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert_eq!(error.path(), Some(path));
    let hint = error.hint().unwrap();
    assert_eq!(hint.contains("--force-share"), access == FileAccess::Read, "{hint}");
    error
}

fn force_share(path: &Path) -> FileStorage {
    let storage = FileStorage::open(path, FileAccess::Read, Sharing::ForceShare).unwrap();
    assert_eq!(storage.lock_report().how, LockKind::None);
    storage.read_at(&mut [0; 512], 0).unwrap();
    storage
}

#[test]
fn readers_share_and_a_writer_is_alone() {
    let _alone = alone();
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    std::fs::write(&path, [0; 512]).unwrap();
    let first = open(&path, FileAccess::Read).unwrap();
    let second = open(&path, FileAccess::Read).unwrap();
    assert_eq!(second.lock_report().how, LockKind::Ofd);
    let error = locked(&path, FileAccess::Write);
    assert!(error.message().contains("does not let others write"), "{error}");
    drop(first);
    locked(&path, FileAccess::Write);
    drop(second);
    let writer = open(&path, FileAccess::Write).unwrap();
    for access in [FileAccess::Read, FileAccess::Write] {
        let error = locked(&path, access);
        assert!(error.message().contains("open for writing"), "{error}");
    }
    force_share(&path);
    locked(&path, FileAccess::Read); // looking by force has not disturbed the writer's locks
    drop(writer);
    open(&path, FileAccess::Read).unwrap();
}

#[test]
fn locks_end_with_the_process_that_holds_them() {
    let _alone = alone();
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let writer = open(&path, FileAccess::Write).unwrap();
    // A copy of the descriptor is the same open file: the lock goes with the last of them.
    let copy = writer.as_file().unwrap().try_clone().unwrap();
    drop(writer);
    locked(&path, FileAccess::Read);
    drop(copy);
    open(&path, FileAccess::Write).unwrap();
}

#[test]
fn an_exclusive_lock_of_anybody_is_respected() {
    let _alone = alone();
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let other = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    rustix::fs::fcntl_lock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    // Between locks of processes this would be no conflict: all of it is one process. Ours belong to open files.
    let error = locked(&path, FileAccess::Read);
    assert!(error.message().contains("exclusive"), "{error}");
    rustix::fs::fcntl_lock(&other, FlockOperation::Unlock).unwrap();
    open(&path, FileAccess::Write).unwrap();
}

#[test]
#[ignore = "needs qemu-img and qemu-io"]
fn qemu_does_not_open_what_a_writer_of_ours_has() {
    let _alone = alone();
    for format in FORMATS {
        let (_directory, path) = image(format);
        let writer = open(&path, FileAccess::Write).unwrap();
        assert_lock_error(&qemu_io(format, &path, false));
        if format == "vhdx" {
            assert_lock_error(&qemu_io(format, &path, true));
            for command in ["info", "check", "map"] {
                assert_lock_error(&qemu_img(&[command, "-f", format], &path, &[]));
            }
            let copy = path.with_extension("copy");
            assert_lock_error(&qemu_img(&["convert", "-O", "raw", "-f", format], &path, &[copy.to_str().unwrap()]));
        } else {
            // Those who only read a raw image let others write to it: there is no metadata to be confused by.
            assert_no_lock_error(&qemu_io(format, &path, true));
        }
        assert_no_lock_error(&qemu_img(&["info", "--force-share", "-f", format], &path, &[]));
        drop(writer);
        assert_no_lock_error(&qemu_img(&["info", "-f", format], &path, &[]));
        assert_no_lock_error(&qemu_io(format, &path, false));
    }
}

#[test]
#[ignore = "needs qemu-img and qemu-io"]
fn qemu_reads_beside_a_reader_of_ours_but_does_not_write() {
    let _alone = alone();
    for format in FORMATS {
        let (_directory, path) = image(format);
        let reader = open(&path, FileAccess::Read).unwrap();
        assert_no_lock_error(&qemu_img(&["info", "-f", format], &path, &[]));
        assert_no_lock_error(&qemu_io(format, &path, true));
        assert_lock_error(&qemu_io(format, &path, false));
        drop(reader);
        assert_no_lock_error(&qemu_io(format, &path, false));
    }
}

#[test]
#[ignore = "needs qemu-img and qemu-io"]
fn we_do_not_open_what_a_writing_qemu_has() {
    let _alone = alone();
    for format in FORMATS {
        let (_directory, path) = image(format);
        let qemu = QemuIo::open(format, &path, false);
        for access in [FileAccess::Read, FileAccess::Write] {
            let error = locked(&path, access);
            assert!(error.message().contains("open for writing"), "{error}");
        }
        force_share(&path);
        let options = NewFileOptions { replace: true, ..NewFileOptions::default() };
        assert_eq!(NewFile::create(&path, options).unwrap_err().kind(), ErrorKind::Locked);
        drop(qemu);
        open(&path, FileAccess::Read).unwrap();
        open(&path, FileAccess::Write).unwrap();
    }
}

#[test]
#[ignore = "needs qemu-img and qemu-io"]
fn we_read_beside_a_reading_qemu_but_do_not_write() {
    let _alone = alone();
    for format in FORMATS {
        let (_directory, path) = image(format);
        let qemu = QemuIo::open(format, &path, true);
        let reader = open(&path, FileAccess::Read).unwrap();
        drop(reader);
        match format {
            "vhdx" => drop(locked(&path, FileAccess::Write)),
            _ => drop(open(&path, FileAccess::Write).unwrap()), // it lets others write to a raw image
        }
        drop(qemu);
        open(&path, FileAccess::Write).unwrap();
    }
}
