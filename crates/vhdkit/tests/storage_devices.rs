//! Block devices, and a file system that clones.
//!
//! These tests need root, loop devices, and the tools of util-linux and xfsprogs. They are ignored;
//! `VHDKIT_ROOT_TESTS=1 cargo test --test storage_devices -- --include-ignored` runs them. Without the variable they
//! fail when asked for: nothing that cannot run counts as passed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhdkit::ErrorKind;
use vhdkit::storage::{FileAccess, FileKind, FileStorage, NewFile, NewFileOptions, Sharing, Storage};
use vhdkit_testkit::storage_suite;

/// Stops a test that was asked for without the means to run it, and lets one run at a time: a process that another
/// thread starts holds all open files for a moment, and their locks.
fn need_root_tests() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    assert!(
        std::env::var_os("VHDKIT_ROOT_TESTS").is_some_and(|value| value == "1"),
        "set VHDKIT_ROOT_TESTS=1 where there are root rights and loop devices; without them leave this test ignored"
    );
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device over a file, mostly of its own.
struct LoopDevice {
    path: String,
    backing: Option<tempfile::NamedTempFile>,
}

impl LoopDevice {
    fn new(bytes: u64, sector: u32) -> Self {
        let backing = tempfile::NamedTempFile::new().unwrap();
        backing.as_file().set_len(bytes).unwrap();
        let sector = sector.to_string();
        let path = run("losetup", &["--find", "--show", "--sector-size", &sector, backing.path().to_str().unwrap()]);
        Self { path, backing: Some(backing) }
    }

    /// Over a file that belongs to somebody else.
    fn over(backing: &Path) -> Self {
        Self { path: run("losetup", &["--find", "--show", backing.to_str().unwrap()]), backing: None }
    }

    fn path(&self) -> &Path {
        Path::new(&self.path)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

/// A mounted file system, on a loop device if it needs a device.
struct Mount {
    directory: tempfile::TempDir,
    device: Option<LoopDevice>,
}

impl Mount {
    fn new(kind: &str, arguments: &[&str]) -> Self {
        let device = LoopDevice::new(512 << 20, 512);
        run(&format!("mkfs.{kind}"), &[arguments, &[device.path.as_str()]].concat());
        let directory = tempfile::tempdir().unwrap();
        run("mount", &["-t", kind, &device.path, directory.path().to_str().unwrap()]);
        Self { directory, device: Some(device) }
    }

    fn without_device(kind: &str, options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        run("mount", &["-t", kind, "-o", options, kind, directory.path().to_str().unwrap()]);
        Self { directory, device: None }
    }

    fn file(&self) -> Arc<dyn Storage> {
        let file = tempfile::tempfile_in(self.directory.path()).unwrap();
        Arc::new(FileStorage::from_file(file, None).unwrap())
    }

    fn free_bytes(&self) -> i64 {
        let output = run("stat", &["--file-system", "--format", "%f %S", self.directory.path().to_str().unwrap()]);
        let (blocks, size) = output.split_once(' ').unwrap();
        blocks.parse::<i64>().unwrap() * size.parse::<i64>().unwrap()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.directory.path()).status();
    }
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn block_devices_pass() {
    const CAPACITY: u64 = storage_suite::FIXED_BYTES_MIN + 4096;
    let _alone = need_root_tests();
    for sector in [512, 4096] {
        let device = LoopDevice::new(CAPACITY, sector);
        storage_suite::run(|| Arc::new(FileStorage::open(device.path(), FileAccess::Write, Sharing::Normal).unwrap()));
        let storage = FileStorage::open_block_target(device.path()).unwrap();
        assert_eq!((storage.kind(), storage.len().unwrap()), (FileKind::BlockDevice, CAPACITY));
        assert!(!storage.growth_reads_zero());
        assert_eq!(storage.next_data(5..u64::MAX).unwrap(), Some(5..CAPACITY));
        assert_eq!(storage.set_len(CAPACITY + 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(storage.punch_hole(0..CAPACITY).unwrap(), "loop devices can discard");
        // What reaches the medium is what was written.
        storage.write_at(b"on the medium", 4097).unwrap();
        storage.sync().unwrap();
        drop(storage);
        let bytes = std::fs::read(device.backing.as_ref().unwrap().path()).unwrap();
        assert_eq!(&bytes[4097..4110], b"on the medium");
        assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), 13);
    }
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_block_device_in_use_is_refused_as_target() {
    let _alone = need_root_tests();
    let mount = Mount::new("xfs", &["-q"]);
    let error = FileStorage::open_block_target(mount.device.as_ref().unwrap().path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.message().contains("mounted") && error.hint().is_some(), "{error}");
    let free = LoopDevice::new(storage_suite::FIXED_BYTES_MIN, 512);
    let reader = FileStorage::open(free.path(), FileAccess::Read, Sharing::Normal).unwrap();
    assert_eq!(FileStorage::open_block_target(free.path()).unwrap_err().kind(), ErrorKind::Locked);
    drop(reader);
    let first = FileStorage::open_block_target(free.path()).unwrap();
    assert_eq!(FileStorage::open_block_target(free.path()).unwrap_err().kind(), ErrorKind::Refused);
    drop(first);
    // Another name for the same device.
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("node");
    run("mknod", &[other.to_str().unwrap(), "b", "7", free.path.trim_start_matches("/dev/loop")]);
    let first = FileStorage::open(free.path(), FileAccess::Read, Sharing::ForceShare).unwrap();
    let second = FileStorage::open(&other, FileAccess::Read, Sharing::ForceShare).unwrap();
    assert_eq!(first.identity(), second.identity());
    // A new file does not take the place of a device.
    let options = NewFileOptions { replace: true, ..NewFileOptions::default() };
    assert_eq!(NewFile::create(&other, options).unwrap_err().kind(), ErrorKind::Refused);
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn xfs_passes_and_clones() {
    let _alone = need_root_tests();
    let mount = Mount::new("xfs", &["-q", "-m", "reflink=1"]);
    storage_suite::run(|| mount.file());
    let (source, target) = (mount.file(), mount.file());
    let bytes: Vec<u8> = (0..16_u32 << 20).map(|at| (at % 241) as u8).collect();
    source.write_at(&bytes, 0).unwrap();
    source.sync().unwrap();
    let before = mount.free_bytes();
    assert!(target.clone_range(&*source, 1 << 20, 3 << 20, 12 << 20).unwrap());
    assert_eq!(target.len().unwrap(), 15 << 20);
    let mut copy = vec![0; 12 << 20];
    target.read_at(&mut copy, 3 << 20).unwrap();
    assert_eq!(copy, &bytes[1 << 20..13 << 20]);
    target.sync().unwrap();
    let used = before - mount.free_bytes();
    assert!(used < 4 << 20, "the blocks are not shared: {used} bytes were used");
    // What is shared stays apart.
    target.write_at(&[0xFF; 10], 3 << 20).unwrap();
    source.read_at(&mut copy, 1 << 20).unwrap();
    assert_eq!(copy, &bytes[1 << 20..13 << 20]);
    // What cannot be cloned is said, and changes nothing.
    assert!(!target.clone_range(&*source, 1, 0, 4096).unwrap(), "not on blocks");
    assert!(!target.clone_range(&*source, 64 << 20, 0, 4096).unwrap(), "past the end of the source");
    let elsewhere = FileStorage::from_file(tempfile::tempfile_in("/dev/shm").unwrap(), None).unwrap();
    elsewhere.set_len(4096).unwrap();
    assert!(!target.clone_range(&elsewhere, 0, 0, 4096).unwrap(), "another file system");
    assert!(target.clone_range(&*source, 0, 0, 0).unwrap(), "nothing");
    assert_eq!(target.len().unwrap(), 15 << 20);
}

/// Makes new files in a directory, in each of the ways there are.
fn new_files_work(directory: &Path) {
    let path = directory.join("new");
    for (unnamed, replace, content) in
        [(true, false, "first"), (true, true, "second"), (false, true, "third"), (false, true, "fourth")]
    {
        let options = NewFileOptions { replace, unnamed, ..NewFileOptions::default() };
        let new = NewFile::create(&path, options).unwrap();
        new.storage().write_at(content.as_bytes(), 0).unwrap();
        new.commit(true).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
    let error = NewFile::create(&path, NewFileOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    let reader = std::fs::File::open(&path).unwrap();
    let options = NewFileOptions { replace: true, ..NewFileOptions::default() };
    assert_eq!(NewFile::create(&path, options).unwrap_err().kind(), ErrorKind::Locked);
    drop(reader);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(std::fs::read_dir(directory).unwrap().filter(|entry| is_ours(entry.as_ref().unwrap())).count(), 0);
}

/// Whether an entry is not part of the file system's own furniture.
fn is_ours(entry: &std::fs::DirEntry) -> bool {
    entry.file_name() != "lost+found"
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn file_systems_that_can_do_less_pass() {
    let _alone = need_root_tests();
    for mount in [Mount::new("ext2", &["-q"]), Mount::without_device("ramfs", "mode=755")] {
        storage_suite::run(|| mount.file());
        new_files_work(mount.directory.path());
    }
    let mount = Mount::without_device("ramfs", "mode=755");
    let file = mount.file();
    file.write_at(&[1; 4096], 0).unwrap();
    assert!(!file.allocate(0..4096).unwrap() && !file.punch_hole(0..4096).unwrap(), "it has no fallocate");
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn layers_as_containers_use_them_pass() {
    let _alone = need_root_tests();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Layers { mount, lower } = Layers::new(directory.path());
    storage_suite::run(|| mount.file());
    let path = mount.directory.path().join("old");
    let options = NewFileOptions { replace: true, ..NewFileOptions::default() };
    let new = NewFile::create(&path, options).unwrap();
    new.storage().write_at(b"above", 0).unwrap();
    new.commit(true).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "above");
    assert_eq!(std::fs::read_to_string(lower.join("old")).unwrap(), "below");
    std::fs::remove_file(&path).unwrap();
    new_files_work(mount.directory.path());
}

/// Punches a hole into a device over a file in the directory. When that is not possible, the kernel finds out after it
/// dropped the range from its cache, with everything that was not synced. Tells whether the range became zero.
fn punching_loses_nothing(directory: &Path) -> bool {
    let backing = directory.join("device.img");
    std::fs::File::create(&backing).unwrap().set_len(storage_suite::FIXED_BYTES_MIN).unwrap();
    let device = LoopDevice::over(&backing);
    let storage = FileStorage::open(device.path(), FileAccess::Write, Sharing::Normal).unwrap();
    storage.write_at(&[1; 1 << 20], 0).unwrap();
    storage.sync().unwrap();
    storage.write_at(&[2; 1 << 20], 0).unwrap();
    let hole = 4096..65_536 + 512_usize;
    let punched = storage.punch_hole(hole.start as u64..hole.end as u64).unwrap();
    let wanted = if punched { 0 } else { 2 };
    let mut bytes = vec![0xEE; 1 << 20];
    storage.read_at(&mut bytes, 0).unwrap();
    assert!(bytes[hole.clone()].iter().all(|&byte| byte == wanted), "{:?}, not {wanted}", &bytes[4096..4100]);
    assert!(bytes[..hole.start].iter().chain(&bytes[hole.end..]).all(|&byte| byte == 2), "the rest");
    punched
}

/// Layers as containers use them, in a directory; there is a file `old` in the lower one.
struct Layers {
    mount: Mount,
    lower: PathBuf,
}

impl Layers {
    fn new(directory: &Path) -> Self {
        let options: Vec<String> = [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")]
            .map(|(option, name)| {
                let directory = directory.join(name);
                std::fs::create_dir(&directory).unwrap();
                format!("{option}={}", directory.display())
            })
            .into();
        let lower = directory.join("lower");
        std::fs::write(lower.join("old"), "below").unwrap();
        Self { mount: Mount::without_device("overlay", &options.join(",")), lower }
    }
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_device_that_cannot_punch_loses_nothing() {
    let _alone = need_root_tests();
    let ramfs = Mount::without_device("ramfs", "mode=755");
    // It says so beforehand, as the file below has no fallocate.
    assert!(!punching_loses_nothing(ramfs.directory.path()), "what is known beforehand costs no writing");
    // It finds out when it is asked to: layers have fallocate, but what is below them has none.
    let layers = Layers::new(ramfs.directory.path());
    assert!(punching_loses_nothing(layers.mount.directory.path()));
}
