//! A live storage changes between reading and writing, as far as others and the permissions let it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::fs::{File, Permissions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vhdkit::storage::{FileAccess, FileStorage, FileSystem, LockKind, MemoryStorage, Sharing, Storage};
use vhdkit::{Error, ErrorKind};
use vhdkit_testkit::foreign::{assert_success, qemu_img, run_tool};
use vhdkit_testkit::harness::{Case, Needs, main_with};

/// One test at a time: a process that another thread starts holds all open files for a moment, and their locks.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(path: &Path, access: FileAccess) -> vhdkit::Result<FileStorage> {
    FileStorage::open(path, access, Sharing::Normal)
}

fn reader(path: &Path) -> FileStorage {
    open(path, FileAccess::Read).unwrap()
}

/// A file of `length` bytes 1.
fn file_of_ones(length: usize) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, vec![1; length]).unwrap();
    (directory, path)
}

fn assert_locked(error: &Error, path: &Path) {
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert_eq!(error.path(), Some(path));
    assert!(!error.hint().unwrap().contains("--force-share"), "that is no help for writing: {error}");
}

/// Everything that writes is refused, and nothing has happened.
fn assert_reads_only(storage: &FileStorage, path: &Path) {
    let before = std::fs::read(path).unwrap();
    let refused = |what: &str, outcome: io::Result<()>| {
        assert_eq!(outcome.expect_err(what).kind(), io::ErrorKind::PermissionDenied, "{what}");
    };
    refused("write_at", storage.write_at(&[9], 0));
    refused("set_len", storage.set_len(1));
    refused("zero_range", storage.zero_range(0..4096));
    refused("punch_hole", storage.punch_hole(0..4096).map(drop));
    refused("allocate", storage.allocate(0..1 << 20).map(drop));
    let source = FileStorage::open(path, FileAccess::Read, Sharing::ForceShare).unwrap();
    refused("clone_range", storage.clone_range(&source, 0, 1 << 20, 4096).map(drop));
    refused("copy_range", storage.copy_range(&source, 0, 1 << 20, 4096).map(drop));
    storage.write_at(&[], 0).unwrap();
    storage.sync().unwrap();
    assert_eq!(std::fs::read(path).unwrap(), before);
}

/// Everything that writes does what it should, in a file of 64 KiB; that is what it has afterwards, all 1.
fn assert_writes(storage: &FileStorage, path: &Path) {
    storage.write_at(&[2; 4096], 0).unwrap();
    storage.set_len(1 << 20).unwrap();
    storage.zero_range(4096..8192).unwrap();
    assert_eq!(storage.punch_hole(8192..12_288).ok(), Some(true));
    storage.allocate(0..1 << 20).unwrap();
    let source = FileStorage::open(path, FileAccess::Read, Sharing::ForceShare).unwrap();
    let copied = storage.copy_range(&source, 0, 1 << 19, 4096).unwrap();
    storage.sync().unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len(), 1 << 20);
    assert!(bytes[..4096].iter().all(|&byte| byte == 2) && bytes[4096..12_288].iter().all(|&byte| byte == 0));
    assert!(bytes[1 << 19..][..copied as usize].iter().all(|&byte| byte == 2));
    storage.set_len(1 << 16).unwrap();
    storage.write_at(&[1; 1 << 16], 0).unwrap();
}

fn a_reader_becomes_a_writer_and_a_reader_again() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let storage = reader(&path);
    for _ in 0..3 {
        assert_reads_only(&storage, &path);
        drop(reader(&path));
        assert_locked(&open(&path, FileAccess::Write).unwrap_err(), &path);
        storage.set_access(true).unwrap();
        storage.set_access(true).unwrap();
        for access in [FileAccess::Read, FileAccess::Write] {
            assert_eq!(open(&path, access).unwrap_err().kind(), ErrorKind::Locked);
        }
        assert_writes(&storage, &path);
        assert_eq!(storage.lock_report().how, LockKind::Ofd);
        storage.set_access(false).unwrap();
        storage.set_access(false).unwrap();
    }
    drop(storage);
    open(&path, FileAccess::Write).unwrap();
}

fn a_writer_becomes_a_reader_and_a_writer_again() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let storage = open(&path, FileAccess::Write).unwrap();
    for _ in 0..3 {
        assert_writes(&storage, &path);
        storage.set_access(false).unwrap();
        assert_reads_only(&storage, &path);
        let other = reader(&path);
        assert_locked(&storage.set_access(true).unwrap_err(), &path);
        assert_reads_only(&storage, &path);
        drop(other);
        storage.set_access(true).unwrap();
    }
}

fn other_readers_keep_a_reader_from_writing() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let [first, second] = [reader(&path), reader(&path)];
    for storage in [&first, &second] {
        let error = storage.set_access(true).unwrap_err();
        assert_locked(&error, &path);
        assert!(error.message().contains("does not let others write"), "{error}");
        assert_reads_only(storage, &path);
        drop(reader(&path)); // nothing of the writer's locks is left
    }
    drop(first);
    assert_locked(&open(&path, FileAccess::Write).unwrap_err(), &path); // the reader's locks are
    second.set_access(true).unwrap();
    assert_writes(&second, &path);
}

fn who_shares_by_force_does_not_write() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let storage = FileStorage::open(&path, FileAccess::Read, Sharing::ForceShare).unwrap();
    let error = storage.set_access(true).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::InvalidArgument, Some(path.as_path())));
    assert!(error.hint().is_some());
    assert_reads_only(&storage, &path);
    storage.set_access(false).unwrap();
}

fn a_file_that_was_taken_over_stays_without_locks() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let storage = FileStorage::from_file(File::open(&path).unwrap(), None).unwrap();
    assert_reads_only(&storage, &path);
    let other = reader(&path);
    storage.set_access(true).unwrap();
    assert_writes(&storage, &path);
    storage.set_access(false).unwrap();
    assert_reads_only(&storage, &path);
    drop(other);
    open(&path, FileAccess::Write).unwrap();
    // One that can write does so at once.
    let file = File::options().read(true).write(true).open(&path).unwrap();
    assert_writes(&FileStorage::from_file(file, None).unwrap(), &path);
}

fn a_file_open_for_appending_is_refused() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let file = File::options().read(true).append(true).open(&path).unwrap();
    // Everything written would land at the end, whatever the offset.
    let error = FileStorage::from_file(file, Some(path.clone())).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::InvalidArgument, Some(path.as_path())));
    assert!(error.message().contains("appending") && error.hint().is_some(), "{error}");
}

fn writing_stays_with_the_file_whatever_its_name_is() {
    let _alone = alone();
    let (directory, path) = file_of_ones(1 << 16);
    let storage = reader(&path);
    let renamed = directory.path().join("renamed");
    std::fs::rename(&path, &renamed).unwrap();
    std::fs::write(&path, "another").unwrap();
    storage.set_access(true).unwrap();
    assert_writes(&storage, &renamed);
    assert_eq!(std::fs::read(&path).unwrap(), b"another");
    let unnamed = FileStorage::from_file(File::open(&renamed).unwrap(), None).unwrap();
    std::fs::remove_file(&renamed).unwrap();
    unnamed.set_access(true).unwrap();
    unnamed.write_at(b"no name", 0).unwrap();
    let mut bytes = [0; 7];
    storage.read_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"no name");
}

fn reads_go_on_while_access_changes() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(1 << 16);
    let storage = reader(&path);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let mut bytes = [0; 512];
                    storage.read_at(&mut bytes, 4096).unwrap();
                    assert_eq!(bytes, [1; 512]);
                }
            });
        }
        let changes: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for round in 0..500 {
                        storage.set_access(round % 2 == 0).unwrap();
                    }
                })
            })
            .collect();
        for change in changes {
            change.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    storage.set_access(false).unwrap();
    assert_reads_only(&storage, &path);
    drop(reader(&path));
}

fn memory_has_nothing_to_change() {
    let storage = MemoryStorage::new();
    for write in [false, true] {
        storage.set_access(write).unwrap();
        storage.write_at(&[1], 0).unwrap();
    }
}

fn the_file_system_is_told() {
    let storage = FileStorage::from_file(tempfile::tempfile_in("/dev/shm").unwrap(), None).unwrap();
    let found = storage.file_system().unwrap();
    assert_eq!(found, FileSystem::Other(0x0102_1994));
    assert!(!found.hides_locks_of_others());
}

fn is_root() -> bool {
    tempfile::tempfile().unwrap().metadata().unwrap().uid() == 0
}

const PERMISSION_CASE: &str = "what_permissions_forbid_is_refused_as_when_opening";

fn what_permissions_forbid_is_refused_as_when_opening() {
    let _alone = alone();
    if is_root() {
        // Nothing is forbidden to root: the same once more as somebody else.
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let program = directory.path().join("access");
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        let output =
            Command::new("setpriv").args(user).arg(&program).args(["--exact", PERMISSION_CASE]).output().unwrap();
        assert_success(&output);
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
        return;
    }
    let (_directory, path) = file_of_ones(1 << 16);
    std::fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
    let storage = reader(&path);
    let wanted = open(&path, FileAccess::Write).unwrap_err();
    let error = storage.set_access(true).unwrap_err();
    assert_eq!(error.to_string(), wanted.to_string());
    assert_eq!((error.kind(), error.hint(), error.path()), (wanted.kind(), wanted.hint(), wanted.path()));
    assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::PermissionDenied);
    assert_reads_only(&storage, &path);
    drop(reader(&path));
    std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    storage.set_access(true).unwrap();
    assert_writes(&storage, &path);
}

fn a_file_system_mounted_read_only_is_refused() {
    let _alone = alone();
    let (directory, _) = file_of_ones(1 << 16);
    let place = directory.path().to_str().unwrap();
    assert_success(&run_tool("mount", &["--bind", place, place]));
    assert_success(&run_tool("mount", &["-o", "remount,bind,ro", place]));
    let outcome = std::panic::catch_unwind(|| {
        let path = directory.path().join("file");
        let storage = reader(&path);
        let error = storage.set_access(true).unwrap_err();
        assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::ReadOnlyFilesystem, "{error}");
        assert!(error.hint().unwrap().contains("read-only"));
        assert_reads_only(&storage, &path);
    });
    assert_success(&run_tool("umount", &[place]));
    outcome.unwrap();
}

fn a_block_device_changes_too_and_keeps_its_bytes() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(8 << 20);
    let output = run_tool("losetup", &["--find", "--show", path.to_str().unwrap()]);
    assert_success(&output);
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let outcome = std::panic::catch_unwind(|| {
        let device = Path::new(&device);
        let storage = reader(device);
        for _ in 0..2 {
            let refused = storage.write_at(&[9], 0).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(storage.set_len(1).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            storage.set_access(true).unwrap();
            assert_eq!(open(device, FileAccess::Read).unwrap_err().kind(), ErrorKind::Locked);
            storage.set_access(false).unwrap();
            drop(reader(device));
        }
        assert!(std::fs::read(&path).unwrap().iter().all(|&byte| byte == 1), "changing access writes nothing");
        storage.set_access(true).unwrap();
        storage.write_at(&[2; 4096], 8192).unwrap();
        storage.sync().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 8 << 20);
        assert!(bytes.iter().enumerate().all(|(at, &byte)| byte == 1 + u8::from((8192..12_288).contains(&at))));
    });
    assert_success(&run_tool("losetup", &["--detach", &device]));
    outcome.unwrap();
}

/// A `qemu-io` that holds an image open for reading until it is dropped.
struct QemuIo {
    child: Child,
    input: Option<ChildStdin>,
}

impl QemuIo {
    /// Nothing when it does not get the image.
    fn open(format: &str, path: &Path) -> Option<Self> {
        let mut child = Command::new("qemu-io")
            .args(["-r", "-f", format])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        // It has opened the image when it answers; without one it may have ended already.
        let _ = input.write_all(b"length\n");
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("16 MiB") {
            line.clear();
            if output.read_line(&mut line).unwrap() == 0 || line.contains("no file open") {
                drop(input);
                child.wait().unwrap();
                return None;
            }
        }
        Some(Self { child, input: Some(input) })
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}

fn a_reading_qemu_keeps_us_from_writing_and_a_writer_of_ours_keeps_it_out() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vhdx");
    assert_success(&qemu_img(&["create", "-q", "-f", "vhdx", path.to_str().unwrap(), "16M"]));
    let before = std::fs::read(&path).unwrap();
    let storage = reader(&path);
    let qemu = QemuIo::open("vhdx", &path).expect("qemu reads beside a reader");
    let error = storage.set_access(true).unwrap_err();
    assert_locked(&error, &path);
    assert!(error.message().contains("does not let others write"), "{error}");
    drop(QemuIo::open("vhdx", &path).expect("nothing of the writer's locks is left"));
    drop(qemu);
    storage.set_access(true).unwrap();
    assert!(QemuIo::open("vhdx", &path).is_none(), "qemu reads what we write");
    storage.set_access(false).unwrap();
    drop(QemuIo::open("vhdx", &path).expect("qemu reads beside a reader again"));
    let output = run_tool("qemu-io", &["-f", "vhdx", "-c", "write 0 512", path.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"), "qemu wrote beside a reader: {output:?}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

fn a_qemu_that_lets_others_write_a_raw_image_does_not_hinder() {
    let _alone = alone();
    let (_directory, path) = file_of_ones(16 << 20);
    let storage = reader(&path);
    let qemu = QemuIo::open("raw", &path).unwrap();
    storage.set_access(true).unwrap();
    storage.write_at(&[2; 512], 0).unwrap();
    storage.set_access(false).unwrap();
    drop(qemu);
}

fn main() {
    let case = |name: &str, run: fn()| Case::new(name, Needs::nothing(), run);
    let qemu = || Needs::tools(&["qemu-img", "qemu-io"]);
    let user = if is_root() { Needs::tools(&["setpriv"]) } else { Needs::nothing() };
    main_with(vec![
        case("a_reader_becomes_a_writer_and_a_reader_again", a_reader_becomes_a_writer_and_a_reader_again),
        case("a_writer_becomes_a_reader_and_a_writer_again", a_writer_becomes_a_reader_and_a_writer_again),
        case("other_readers_keep_a_reader_from_writing", other_readers_keep_a_reader_from_writing),
        case("who_shares_by_force_does_not_write", who_shares_by_force_does_not_write),
        case("a_file_that_was_taken_over_stays_without_locks", a_file_that_was_taken_over_stays_without_locks),
        case("a_file_open_for_appending_is_refused", a_file_open_for_appending_is_refused),
        case("writing_stays_with_the_file_whatever_its_name_is", writing_stays_with_the_file_whatever_its_name_is),
        case("reads_go_on_while_access_changes", reads_go_on_while_access_changes),
        case("memory_has_nothing_to_change", memory_has_nothing_to_change),
        case("the_file_system_is_told", the_file_system_is_told),
        Case::new(PERMISSION_CASE, user, what_permissions_forbid_is_refused_as_when_opening),
        Case::new(
            "a_file_system_mounted_read_only_is_refused",
            Needs::tools(&["mount", "umount"]).and_root(),
            a_file_system_mounted_read_only_is_refused,
        ),
        Case::new(
            "a_block_device_changes_too_and_keeps_its_bytes",
            Needs::tools(&["losetup"]).and_root(),
            a_block_device_changes_too_and_keeps_its_bytes,
        ),
        Case::new(
            "a_reading_qemu_keeps_us_from_writing_and_a_writer_of_ours_keeps_it_out",
            qemu(),
            a_reading_qemu_keeps_us_from_writing_and_a_writer_of_ours_keeps_it_out,
        ),
        Case::new(
            "a_qemu_that_lets_others_write_a_raw_image_does_not_hinder",
            qemu(),
            a_qemu_that_lets_others_write_a_raw_image_does_not_hinder,
        ),
    ]);
}
