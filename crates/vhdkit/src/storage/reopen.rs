//! Opening a file that is open already once more, for writing.
//!
//! The path is the second choice: another file may have taken the name meanwhile.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::file::{FileAccess, open_error, open_without_waiting};
use crate::error::{Error, ErrorKind, Result};

/// Opens the file behind an open one for reading and writing: whatever its name is now, also when it has none any more.
///
/// # Errors
/// As opening by path, when the permissions of the file or the file system forbid writing; [`ErrorKind::Refused`] when
/// only the path is left to open by, and leads to another file.
pub(super) fn for_writing(file: &File, path: Option<&Path>) -> Result<File> {
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    through(&link, file, path)
}

/// As [`for_writing`], by a link that leads to the open file where there is one.
fn through(link: &Path, file: &File, path: Option<&Path>) -> Result<File> {
    let Err(first) = same_file(link, file) else { return open_same(link, file) };
    // No /proc here.
    match path {
        Some(path) => open_same(path, file),
        None => Err(first.with_hint("mount /proc, or open the file for writing in the first place")),
    }
}

/// Opens what a path leads to, if that is the file.
fn open_same(path: &Path, file: &File) -> Result<File> {
    same_file(path, file)?; // before opening: opening some devices does something
    let opened = open_without_waiting(path, FileAccess::Write)?;
    let metadata = opened.metadata().map_err(cannot_tell)?;
    compare(&metadata, file)?; // another one may have come between
    Ok(opened)
}

/// Whether a path leads to the file.
fn same_file(path: &Path, file: &File) -> Result<()> {
    compare(&std::fs::metadata(path).map_err(|error| open_error(error, FileAccess::Write))?, file)
}

fn compare(found: &Metadata, file: &File) -> Result<()> {
    let wanted = file.metadata().map_err(cannot_tell)?;
    let is_device = |metadata: &Metadata| metadata.file_type().is_block_device();
    let same = match is_device(&wanted) {
        // A device may have many names, each with its own inode.
        true => is_device(found) && found.rdev() == wanted.rdev(),
        false => (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()),
    };
    if same {
        return Ok(());
    }
    let error = Error::new(ErrorKind::Refused, "the path leads to another file than the one that is open");
    Err(error.with_hint("find out who replaced the file, and open it again"))
}

fn cannot_tell(error: io::Error) -> Error {
    Error::io("cannot tell whether it is the same file", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    const NOWHERE: &str = "/proc/self/no-such-directory/0";

    #[test]
    fn a_file_is_found_whatever_happened_to_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("name");
        std::fs::write(&path, "first").unwrap();
        let file = File::open(&path).unwrap();
        std::fs::rename(&path, directory.path().join("renamed")).unwrap();
        std::fs::write(&path, "second").unwrap();
        for_writing(&file, Some(&path)).unwrap().write_all_at(b"FI", 0).unwrap();
        std::fs::remove_file(directory.path().join("renamed")).unwrap();
        for_writing(&file, None).unwrap().write_all_at(b"R", 2).unwrap();
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"FIRst");
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
    }

    #[test]
    fn without_proc_the_path_has_to_lead_to_the_same_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("name");
        std::fs::write(&path, "first").unwrap();
        let file = File::open(&path).unwrap();
        let nowhere = Path::new(NOWHERE);
        through(nowhere, &file, Some(&path)).unwrap().write_all_at(b"F", 0).unwrap();
        assert_eq!(through(nowhere, &file, None).unwrap_err().kind(), ErrorKind::Io);
        std::fs::rename(&path, directory.path().join("renamed")).unwrap();
        let error = through(nowhere, &file, Some(&path)).unwrap_err();
        assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::NotFound, "{error}");
        std::fs::write(&path, "second").unwrap();
        let error = through(nowhere, &file, Some(&path)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.hint().is_some());
        // A link that leads elsewhere is no better than none.
        let other = directory.path().join("other");
        std::os::unix::fs::symlink(&path, &other).unwrap();
        assert_eq!(through(&other, &file, Some(&path)).unwrap_err().kind(), ErrorKind::Refused);
        through(&other, &file, Some(&directory.path().join("renamed"))).unwrap();
    }
}
