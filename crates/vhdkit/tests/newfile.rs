//! New files: nothing is seen before they are complete, nothing is lost that was there, nothing stays behind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode};
use vhdkit::storage::{
    FileAccess, FileStorage, LockKind, NewFile, NewFileOptions, Sharing, Storage, is_open_elsewhere,
};
use vhdkit::{Error, ErrorKind};

/// A directory on each kind of file system that every machine has.
fn directories() -> Vec<tempfile::TempDir> {
    [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"].map(|parent| tempfile::tempdir_in(parent).unwrap()).into()
}

/// The options of each way to write a new file.
fn ways(replace: bool) -> [NewFileOptions; 2] {
    [true, false].map(|unnamed| NewFileOptions { replace, unnamed, ..NewFileOptions::default() })
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write(new: &NewFile, bytes: &[u8]) {
    new.storage().write_at(bytes, 0).unwrap();
}

/// An error that names the file and says what to do.
fn complete(error: &Error, path: &Path, kind: ErrorKind) {
    assert_eq!(error.kind(), kind, "{error}");
    assert_eq!(error.path(), Some(path), "{error}");
    assert!(error.hint().is_some(), "{error}");
}

#[test]
fn a_new_file_appears_when_it_is_complete() {
    for directory in directories() {
        for options in ways(false).into_iter().chain(ways(true)) {
            let path = directory.path().join("new image");
            let unnamed = options.unnamed;
            let new = NewFile::create(&path, options).unwrap();
            write(&new, b"complete");
            assert_eq!(new.path(), path);
            assert_eq!(new.storage().lock_report().how, LockKind::Ofd);
            assert!(!path.exists());
            match new.temporary_path() {
                None => assert!(unnamed && names(directory.path()).is_empty()),
                Some(temporary) => {
                    assert!(!unnamed);
                    let name = temporary.file_name().unwrap().to_str().unwrap();
                    assert_eq!(names(directory.path()), [name]);
                    assert!(name.starts_with(".new image.") && name.ends_with(".tmp"), "{name}");
                }
            }
            new.commit(true).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"complete");
            assert_eq!(names(directory.path()), ["new image"]);
            let usual = directory.path().join("usual");
            File::create(&usual).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode(), fs::metadata(&usual).unwrap().mode());
            fs::remove_file(&path).unwrap();
            fs::remove_file(&usual).unwrap();
        }
    }
}

#[test]
fn what_is_given_up_leaves_nothing() {
    for directory in directories() {
        for options in ways(false) {
            let new = NewFile::create(&directory.path().join("new"), options).unwrap();
            write(&new, b"half");
            let storage = new.storage();
            drop(new);
            assert!(names(directory.path()).is_empty());
            storage.write_at(b"nobody minds", 0).unwrap();
        }
    }
}

#[test]
fn relative_paths_work() {
    let name = format!("newfile-test-{}", std::process::id());
    let new = NewFile::create(Path::new(&name), NewFileOptions::default()).unwrap();
    write(&new, b"here");
    new.commit(false).unwrap();
    assert_eq!(fs::read(&name).unwrap(), b"here");
    fs::remove_file(&name).unwrap();
}

#[test]
fn what_exists_is_not_touched_without_replace() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("file"), "old").unwrap();
    fs::create_dir(path("directory")).unwrap();
    symlink("nowhere", path("dangling")).unwrap();
    symlink("file", path("link")).unwrap();
    let before = names(directory.path());
    for name in ["file", "directory", "dangling", "link"] {
        for options in ways(false) {
            complete(&NewFile::create(&path(name), options).unwrap_err(), &path(name), ErrorKind::Exists);
        }
    }
    assert_eq!(names(directory.path()), before);
    assert_eq!(fs::read(path("file")).unwrap(), b"old");
}

#[test]
fn what_appears_meanwhile_is_not_touched_without_replace() {
    for directory in directories() {
        for options in ways(false) {
            let path = directory.path().join("new");
            let new = NewFile::create(&path, options).unwrap();
            write(&new, b"new");
            fs::write(&path, "somebody else's").unwrap();
            complete(&new.commit(true).unwrap_err(), &path, ErrorKind::Exists);
            assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
            assert_eq!(names(directory.path()), ["new"]);
            fs::remove_file(&path).unwrap();
            let new = NewFile::create(&path, ways(false)[0].clone()).unwrap();
            symlink("elsewhere", &path).unwrap();
            complete(&new.commit(true).unwrap_err(), &path, ErrorKind::Exists);
            assert_eq!(names(directory.path()), ["new"]);
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn replacing_keeps_the_permissions_and_other_links() {
    for directory in directories() {
        for options in ways(true) {
            let path = directory.path().join("image");
            let other = directory.path().join("other link");
            fs::write(&path, "the old content, which is longer").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
            fs::hard_link(&path, &other).unwrap();
            let as_root = rustix::process::geteuid().is_root();
            if as_root {
                std::os::unix::fs::chown(&path, Some(1234), Some(5678)).unwrap();
            }
            let new = NewFile::create(&path, options).unwrap();
            write(&new, b"new");
            assert_eq!(fs::read(&path).unwrap(), b"the old content, which is longer");
            // From the beginning on nobody may see more of the new one than of the old one.
            assert_eq!(new.storage().as_file().unwrap().metadata().unwrap().mode() & 0o7777, 0o640);
            new.commit(true).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.mode() & 0o7777, 0o640);
            if as_root {
                assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
            }
            assert_eq!(fs::read(&other).unwrap(), b"the old content, which is longer");
            assert_eq!(names(directory.path()), ["image", "other link"]);
            fs::remove_file(&path).unwrap();
            fs::remove_file(&other).unwrap();
        }
    }
}

#[test]
fn a_file_that_is_new_or_gone_meanwhile_is_replaced_all_the_same() {
    for options in ways(true) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let new = NewFile::create(&path, options.clone()).unwrap();
        write(&new, b"first");
        fs::write(&path, "appeared").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        new.commit(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let new = NewFile::create(&path, options).unwrap();
        write(&new, b"second");
        fs::remove_file(&path).unwrap();
        new.commit(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(directory.path()), ["image"]);
    }
}

#[test]
fn a_file_that_is_open_elsewhere_is_not_replaced() {
    for directory in directories() {
        let path = directory.path().join("image");
        fs::write(&path, "in use").unwrap();
        for options in ways(true) {
            // Nobody locks anything here: that it is open is enough.
            let reader = File::open(&path).unwrap();
            complete(&NewFile::create(&path, options.clone()).unwrap_err(), &path, ErrorKind::Locked);
            drop(reader);
            let new = NewFile::create(&path, options).unwrap();
            let reader = File::open(&path).unwrap();
            complete(&new.commit(true).unwrap_err(), &path, ErrorKind::Locked);
            drop(reader);
            assert_eq!(fs::read(&path).unwrap(), b"in use");
            assert_eq!(names(directory.path()), ["image"]);
        }
    }
}

#[test]
fn only_regular_files_are_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("file"), "old").unwrap();
    fs::create_dir(path("directory")).unwrap();
    symlink("file", path("link")).unwrap();
    // Not by running mkfifo: a process that starts holds the files of all other tests open for a moment.
    rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let before = names(directory.path());
    for name in ["directory", "link", "pipe"] {
        for options in ways(true) {
            complete(&NewFile::create(&path(name), options).unwrap_err(), &path(name), ErrorKind::Refused);
        }
    }
    let error = NewFile::create(&path("link"), ways(true)[0].clone()).unwrap_err();
    assert!(error.message().contains("symbolic link to file"), "{error}");
    let null = PathBuf::from("/dev/null");
    complete(&NewFile::create(&null, ways(true)[0].clone()).unwrap_err(), &null, ErrorKind::Refused);
    // Also when it turns into one of them meanwhile.
    let new = NewFile::create(&path("file"), ways(true)[0].clone()).unwrap();
    fs::remove_file(path("file")).unwrap();
    symlink("elsewhere", path("file")).unwrap();
    complete(&new.commit(true).unwrap_err(), &path("file"), ErrorKind::Refused);
    assert_eq!(names(directory.path()), before);
}

#[test]
fn a_source_is_never_the_target() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    fs::write(&path, "source").unwrap();
    let link = directory.path().join("another name");
    fs::hard_link(&path, &link).unwrap();
    let source = FileStorage::open(&path, FileAccess::Read, Sharing::ForceShare).unwrap();
    let identity = source.identity().unwrap();
    for target in [&path, &link] {
        for replace in [false, true] {
            let options = NewFileOptions { replace, sources: vec![identity], ..NewFileOptions::default() };
            complete(&NewFile::create(target, options).unwrap_err(), target, ErrorKind::Refused);
        }
    }
    drop(source);
    let mut new = NewFile::create(&path, ways(true)[0].clone()).unwrap();
    complete(&new.refuse_identity(&[identity]).unwrap_err(), &path, ErrorKind::Refused);
    complete(&new.commit(true).unwrap_err(), &path, ErrorKind::Refused);
    // One that becomes the target meanwhile.
    let other = directory.path().join("other");
    let mut new = NewFile::create(&other, ways(true)[1].clone()).unwrap();
    new.refuse_identity(&[identity]).unwrap();
    fs::rename(&link, &other).unwrap();
    complete(&new.commit(true).unwrap_err(), &other, ErrorKind::Refused);
    assert_eq!(fs::read(&path).unwrap(), b"source");
    assert_eq!(names(directory.path()), ["image", "other"]);
}

#[test]
fn a_directory_that_is_renamed_meanwhile_does_not_matter() {
    for options in ways(false) {
        let parent = tempfile::tempdir().unwrap();
        let (before, after) = (parent.path().join("before"), parent.path().join("after"));
        fs::create_dir(&before).unwrap();
        let new = NewFile::create(&before.join("new"), options).unwrap();
        fs::rename(&before, &after).unwrap();
        new.commit(true).unwrap();
        assert_eq!(names(&after), ["new"]);
    }
}

#[test]
fn impossible_targets_say_why() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("missing").join("new");
    let error = NewFile::create(&path, NewFileOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.hint().is_some() && error.path().is_some());
    for path in ["", "/", "..", "/tmp/", "/tmp/."] {
        let error = NewFile::create(Path::new(path), NewFileOptions::default()).unwrap_err();
        complete(&error, Path::new(path), ErrorKind::InvalidArgument);
    }
    let path = PathBuf::from("/proc/new");
    let error = NewFile::create(&path, NewFileOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    let long = directory.path().join("n".repeat(300));
    assert_eq!(NewFile::create(&long, NewFileOptions::default()).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn names_at_the_limit_of_the_file_system_work() {
    for options in ways(true) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("\u{e9}".repeat(127));
        for content in ["first", "second"] {
            let new = NewFile::create(&path, options.clone()).unwrap();
            write(&new, content.as_bytes());
            new.commit(false).unwrap();
        }
        assert_eq!(names(directory.path()).len(), 1);
    }
}

#[test]
fn a_file_is_open_elsewhere_or_not() {
    let named = tempfile::NamedTempFile::new().unwrap();
    let path = named.into_temp_path();
    let file = File::open(&path).unwrap();
    assert!(!is_open_elsewhere(&file).unwrap());
    for write in [false, true] {
        let other = File::options().read(!write).write(write).open(&path).unwrap();
        assert!(is_open_elsewhere(&file).unwrap());
        drop(other);
        assert!(!is_open_elsewhere(&file).unwrap());
    }
    let image = FileStorage::open(&path, FileAccess::Write, Sharing::Normal).unwrap();
    assert!(is_open_elsewhere(&file).unwrap());
    drop(image);
    assert!(!is_open_elsewhere(&file).unwrap());
}
