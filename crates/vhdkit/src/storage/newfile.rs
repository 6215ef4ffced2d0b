//! A file that gets its name only when it is complete.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid};
use rustix::io::Errno;

use super::file::{FileAccess, FileStorage, open_error};
use super::lock::{self, LockMode};
use super::{Storage as _, StorageIdentity};
use crate::error::{Error, ErrorKind, Result};

/// How many random names are tried before giving up; two tries already mean that something is odd.
const NAME_ATTEMPTS: u32 = 16;
/// The most bytes of the target's name that go into a temporary name, which must stay below 255.
const NAME_BYTES_MAX: usize = 200;

/// How a new file comes to be.
#[derive(Clone, Debug)]
pub struct NewFileOptions {
    /// Replace a file that exists already, when nobody has it open.
    pub replace: bool,
    /// Write without a name where the file system can do that; otherwise, or without this, under a hidden temporary
    /// name in the same directory.
    pub unnamed: bool,
    /// Files that must not be replaced whatever `replace` says: the ones that the new one is made from.
    pub sources: Vec<StorageIdentity>,
}

impl Default for NewFileOptions {
    fn default() -> Self {
        Self { replace: false, unnamed: true, sources: Vec::new() }
    }
}

/// A file that gets its name only when it is complete: nobody ever sees half of it, and nothing stays behind when it is
/// given up.
///
/// It is written without a name, or under a hidden temporary one, in the directory of its target.
/// [`NewFile::commit`] gives it the name. Without `replace` an existing file, whatever its kind, is never touched, not
/// even one that appeared meanwhile. With it, a regular file is replaced in one step, when nobody has it open; its
/// permissions stay (its owner and group too, where the caller may set them), its other hard links keep the old
/// content. A symbolic link is never followed nor replaced: following it would write where the user did not look, and
/// replacing it would cut others off from where it leads.
///
/// ```
/// use vhdkit::storage::{NewFile, NewFileOptions, Storage};
///
/// # fn main() -> vhdkit::Result<()> {
/// # let directory = tempfile::tempdir().unwrap();
/// # let path = directory.path().join("new");
/// let new = NewFile::create(&path, NewFileOptions::default())?;
/// new.storage().write_at(b"complete", 0).unwrap();
/// assert!(!path.exists());
/// new.commit(true)?;
/// assert_eq!(std::fs::read(&path).unwrap(), b"complete");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct NewFile {
    storage: Arc<FileStorage>,
    /// Everything happens relative to this, so that a directory renamed meanwhile does not matter.
    directory: OwnedFd,
    directory_path: PathBuf,
    /// The name in the directory that the file gets.
    name: OsString,
    path: PathBuf,
    /// The name in the directory that the file has until then; removed when dropped.
    temporary: Option<OsString>,
    options: NewFileOptions,
}

impl NewFile {
    /// Begins a new file.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] when there is something of that name and it is not to be replaced;
    /// [`ErrorKind::Refused`] when it cannot be replaced: it is a source, a symbolic link, or no regular file;
    /// [`ErrorKind::Locked`] when somebody has it open; [`ErrorKind::InvalidArgument`] for a path without a file name;
    /// otherwise what the operating system says.
    pub fn create(path: &Path, options: NewFileOptions) -> Result<Self> {
        Self::begin(path, options).map_err(|error| error.with_path(path))
    }

    fn begin(path: &Path, options: NewFileOptions) -> Result<Self> {
        let (directory_path, name) = split(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&directory_path, flags, Mode::empty()).map_err(|error| {
            let error = Error::io("cannot open the directory of the new file", error.into()).with_path(&directory_path);
            error.with_hint("create the directory, or check the spelling and permissions of the path")
        })?;
        let old = examine(directory.as_fd(), &name, &options)?;
        let (file, temporary) = create_in(&directory, &directory_path, &name, &options, old.is_some())?;
        let storage = FileStorage::from_file(file, Some(path.to_owned()));
        let mut new = Self {
            storage: Arc::new(match storage {
                Ok(storage) => storage,
                Err(error) => {
                    remove(&directory, temporary.as_deref());
                    return Err(error);
                }
            }),
            directory,
            directory_path,
            name,
            path: path.to_owned(),
            temporary,
            options,
        };
        // From here on dropping `new` removes the temporary name.
        if let Some(storage) = Arc::get_mut(&mut new.storage) {
            storage.lock(LockMode::Write)?;
        }
        if let Some(old) = &old {
            new.take_over_permissions(old)?;
        }
        Ok(new)
    }

    /// The file, to write to. It stays open, and locked, for as long as anybody holds this.
    #[must_use]
    pub fn storage(&self) -> Arc<FileStorage> {
        Arc::clone(&self.storage)
    }

    /// The path that the file gets.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The hidden name that the file has until it is committed, if it needs one: what to remove when the process is
    /// about to end without dropping it.
    #[must_use]
    pub fn temporary_path(&self) -> Option<PathBuf> {
        self.temporary.as_ref().map(|name| self.directory_path.join(name))
    }

    /// Adds files that must not be replaced: the ones that this one is made from.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when the file that exists under the new one's name is one of them.
    pub fn refuse_identity(&mut self, sources: &[StorageIdentity]) -> Result<()> {
        self.options.sources.extend_from_slice(sources);
        match stat(&self.directory, &self.name) {
            Ok(Some(old)) => refuse_source(&old, &self.options.sources).map_err(|error| error.with_path(&self.path)),
            Ok(None) => Ok(()),
            Err(error) => Err(Error::io("cannot look at the target", error).with_path(&self.path)),
        }
    }

    /// Gives the file its name, for good: with `sync` the content is made durable before, the name after.
    ///
    /// # Errors
    /// As [`NewFile::create`], for what happened to the target meanwhile; otherwise what the operating system says. The
    /// new file is gone then and an existing one untouched, with one exception: when only the last step, making the
    /// name durable, failed, the new file has its name, and the message says so.
    pub fn commit(mut self, sync: bool) -> Result<()> {
        let path = self.path.clone();
        self.publish(sync).map_err(|error| error.with_path(path))
    }

    fn publish(&mut self, sync: bool) -> Result<()> {
        if sync {
            let file = self.storage.as_file().map_or(Ok(()), File::sync_all);
            file.map_err(|error| Error::io("cannot make the new file durable", error))?;
        }
        if self.options.replace {
            self.name_replacing()?;
        } else {
            self.name_without_replacing()?;
        }
        if sync {
            rustix::fs::fsync(&self.directory).map_err(|error| {
                Error::io("the file is complete, but its name could not be made durable", error.into())
            })?;
        }
        Ok(())
    }

    /// Names the file, unless there is something of that name.
    fn name_without_replacing(&mut self) -> Result<()> {
        let outcome = match &self.temporary {
            None => link(self.storage.as_ref(), &self.directory, &self.name),
            Some(temporary) => rename_without_replacing(&self.directory, temporary, &self.name),
        };
        match outcome {
            Ok(()) => {
                self.temporary = None;
                Ok(())
            }
            Err(Errno::EXIST) => Err(exists("a file of that name has appeared meanwhile")),
            Err(error) => Err(Error::io("cannot give the new file its name", error.into())),
        }
    }

    /// Names the file in place of the one that has the name now, if any.
    fn name_replacing(&mut self) -> Result<()> {
        let Some(old) = examine(self.directory.as_fd(), &self.name, &self.options)? else {
            return self.name_without_replacing();
        };
        self.take_over_permissions(&old)?;
        let temporary = match self.temporary.clone() {
            Some(temporary) => temporary,
            // Only a name can be put in place of a name. Dropping removes it if that fails.
            None => self.temporary.insert(self.link_temporary()?).clone(),
        };
        // Again, as late as can be: what matters is who has it open when it goes.
        if examine(self.directory.as_fd(), &self.name, &self.options)?.is_none() {
            return self.name_without_replacing();
        }
        rustix::fs::renameat(&self.directory, &temporary, &self.directory, &self.name)
            .map_err(|error| Error::io("cannot replace the existing file", error.into()))?;
        self.temporary = None;
        Ok(())
    }

    /// Gives an unnamed file a temporary name.
    fn link_temporary(&self) -> Result<OsString> {
        for _ in 0..NAME_ATTEMPTS {
            let name = temporary_name(&self.name);
            match link(self.storage.as_ref(), &self.directory, &name) {
                Ok(()) => return Ok(name),
                Err(Errno::EXIST) => {}
                Err(error) => return Err(Error::io("cannot give the new file a temporary name", error.into())),
            }
        }
        Err(Error::io("cannot find a free temporary name", io::ErrorKind::AlreadyExists.into()))
    }

    /// Makes the new file as accessible as the one that it replaces, and never more.
    fn take_over_permissions(&self, old: &Stat) -> Result<()> {
        let Some(file) = self.storage.as_file() else { return Ok(()) };
        let failed = |error: Errno| Error::io("cannot set the permissions of the new file", error.into());
        let new = rustix::fs::fstat(file).map_err(failed)?;
        let mut mode = Mode::from_raw_mode(old.st_mode) & (Mode::RWXU | Mode::RWXG | Mode::RWXO);
        if new.st_uid != old.st_uid {
            // Only a privileged caller may give files away. Otherwise it stays the caller's, who wrote it.
            let _ = rustix::fs::fchown(file, Some(Uid::from_raw(old.st_uid)), None);
        }
        if new.st_gid != old.st_gid
            && rustix::fs::fchown(file, None, Some(Gid::from_raw(old.st_gid))).is_err()
            && !mode.contains(Mode::RWXO)
        {
            mode &= !Mode::RWXG; // the group is another one, which nobody gave these rights
        }
        if Mode::from_raw_mode(new.st_mode) == mode {
            return Ok(()); // some file systems cannot set any
        }
        rustix::fs::fchmod(file, mode).map_err(failed)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        remove(&self.directory, self.temporary.as_deref());
    }
}

/// Removes a temporary name. When that fails there is nobody to tell, and nothing better to do.
fn remove(directory: &OwnedFd, temporary: Option<&OsStr>) {
    if let Some(name) = temporary {
        let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
    }
}

/// Splits a path into directory and file name.
fn split(path: &Path) -> Result<(PathBuf, OsString)> {
    let bytes = path.as_os_str().as_bytes();
    let name = path.file_name().filter(|_| !bytes.ends_with(b"/") && !bytes.ends_with(b"/."));
    let Some(name) = name else {
        let error = Error::new(ErrorKind::InvalidArgument, "is not the path of a file");
        return Err(error.with_hint("add a file name to the path"));
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((directory.to_owned(), name.to_owned()))
}

/// A hidden name that nobody else uses.
fn temporary_name(name: &OsStr) -> OsString {
    let mut kept = name.as_bytes();
    if kept.len() > NAME_BYTES_MAX {
        // Between characters, where the name is text: some file systems take nothing else.
        let length = name.to_str().map_or(NAME_BYTES_MAX, |text| text.floor_char_boundary(NAME_BYTES_MAX));
        kept = kept.get(..length).unwrap_or(kept);
    }
    let random = uuid::Uuid::new_v4().simple().to_string();
    let random = random.get(..8).unwrap_or(&random);
    let mut bytes = Vec::with_capacity(kept.len() + 14);
    bytes.push(b'.');
    bytes.extend_from_slice(kept);
    bytes.push(b'.');
    bytes.extend_from_slice(random.as_bytes());
    bytes.extend_from_slice(b".tmp");
    OsString::from_vec(bytes)
}

/// What is known of a name in a directory, without following it.
fn stat(directory: impl std::os::fd::AsFd, name: &OsStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The error for a target that exists.
fn exists(message: &str) -> Error {
    Error::new(ErrorKind::Exists, message).with_hint("choose another name, or replace it with --force")
}

/// Refuses a target that the new file is made from.
fn refuse_source(old: &Stat, sources: &[StorageIdentity]) -> Result<()> {
    if sources.contains(&StorageIdentity { device: old.st_dev, inode: old.st_ino }) {
        let error = Error::new(ErrorKind::Refused, "the target is the source, or one of its parents");
        return Err(error.with_hint("choose another name"));
    }
    Ok(())
}

/// Looks at what has the new file's name now, and refuses what may not be replaced.
fn examine(directory: std::os::fd::BorrowedFd<'_>, name: &OsStr, options: &NewFileOptions) -> Result<Option<Stat>> {
    let looked = stat(directory, name).map_err(|error| Error::io("cannot look at the target", error))?;
    let Some(old) = looked else { return Ok(None) };
    refuse_source(&old, &options.sources)?;
    let refused = |message: &str, hint: &str| Err(Error::new(ErrorKind::Refused, message).with_hint(hint));
    match FileType::from_raw_mode(old.st_mode) {
        _ if !options.replace => return Err(exists("exists already")),
        FileType::RegularFile => {}
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(directory, name, Vec::new()).unwrap_or_default();
            let message = format!("is a symbolic link to {}", crate::text::escape(&target.to_string_lossy()));
            return refused(&message, "name the file that the link leads to, or remove the link");
        }
        FileType::Directory => return refused("is a directory", "add a file name to the path"),
        FileType::BlockDevice => return refused("is a block device, which cannot be replaced", "write to it as such"),
        _ => return refused("exists and is not a regular file", "choose another name"),
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(error) => {
            // Without reading permission nobody can tell whether it is in use. An open lease is a Locked already.
            let error = open_error(error.into(), FileAccess::Read);
            return Err(match error.kind() {
                ErrorKind::Locked => lock::locked("the existing file is open elsewhere", LockMode::Write),
                _ => error,
            });
        }
    };
    match lock::is_open_elsewhere(&file) {
        Ok(false) => Ok(Some(old)),
        Ok(true) => Err(lock::locked("the existing file is open elsewhere", LockMode::Write)),
        Err(error) => Err(Error::io("cannot tell whether the existing file is open elsewhere", error)),
    }
}

/// Creates the file, and tells the temporary name if it has one. A file that replaces another begins as one that only
/// its owner may read.
fn create_in(
    directory: &OwnedFd,
    directory_path: &Path,
    name: &OsStr,
    options: &NewFileOptions,
    private: bool,
) -> Result<(File, Option<OsString>)> {
    let mode = if private { Mode::RUSR | Mode::WUSR } else { Mode::from_raw_mode(0o666) };
    if options.unnamed
        && let Some(file) = create_unnamed(directory, mode)?
    {
        return Ok((file, None));
    }
    for _ in 0..NAME_ATTEMPTS {
        let temporary = temporary_name(name);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::openat(directory, &temporary, flags, mode) {
            Ok(file) => return Ok((file.into(), Some(temporary))),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(create_error(error).with_path(directory_path)),
        }
    }
    Err(Error::io("cannot find a free temporary name", io::ErrorKind::AlreadyExists.into()))
}

/// The error of a directory that takes no new file.
fn create_error(error: Errno) -> Error {
    let hint = match error {
        Errno::ACCESS | Errno::PERM => "get write permission for the directory, or choose another one",
        Errno::ROFS => "the file system is mounted read-only: choose another directory",
        Errno::NOSPC | Errno::DQUOT => "the file system is full: make room, or choose another directory",
        _ => return Error::io("cannot create a file in the directory", error.into()),
    };
    Error::io("cannot create a file in the directory", error.into()).with_hint(hint)
}

/// A file without a name, where there is such a thing and it can be named later.
fn create_unnamed(directory: &OwnedFd, mode: Mode) -> Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, ".", flags, mode) {
        // Naming it goes through /proc, which may be missing in a container or a rescue system.
        Ok(file) => Ok(Path::new(&proc_path(file.as_raw_fd())).exists().then(|| file.into())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL | Errno::NOSYS) => Ok(None),
        Err(error) => Err(create_error(error)),
    }
}

/// Where the kernel shows an open file of this process.
fn proc_path(descriptor: i32) -> String {
    format!("/proc/self/fd/{descriptor}")
}

/// Names an unnamed file.
fn link(storage: &FileStorage, directory: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let Some(file) = super::Storage::as_file(storage) else { return Err(Errno::BADF) };
    rustix::fs::linkat(rustix::fs::CWD, proc_path(file.as_raw_fd()), directory, name, AtFlags::SYMLINK_FOLLOW)
}

/// Renames, unless there is something of the new name.
fn rename_without_replacing(directory: &OwnedFd, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
    match rustix::fs::renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        outcome => return outcome,
    }
    rename_over_own_placeholder(directory, from, to)
}

/// The same where the file system cannot do it in one step: takes the name, with an empty file, then replaces that.
fn rename_over_own_placeholder(directory: &OwnedFd, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    drop(rustix::fs::openat(directory, to, flags, Mode::RUSR | Mode::WUSR)?);
    rustix::fs::renameat(directory, from, directory, to).inspect_err(|_| remove(directory, Some(to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_fit_and_are_hidden() {
        let long = "\u{e9}".repeat(127); // 254 bytes
        let name = temporary_name(OsStr::new(&long));
        assert!(name.len() <= 255);
        assert!(name.to_str().unwrap().starts_with(".\u{e9}"));
        assert!(name.to_str().unwrap().ends_with(".tmp"));
        assert_ne!(temporary_name(OsStr::new("a")), temporary_name(OsStr::new("a")));
    }

    #[test]
    fn without_a_rename_that_keeps_what_is_there_a_placeholder_does_it() {
        let parent = tempfile::tempdir().unwrap();
        let directory = OwnedFd::from(File::open(parent.path()).unwrap());
        let [from, to] = ["from", "to"].map(OsStr::new);
        std::fs::write(parent.path().join("from"), "new").unwrap();
        std::fs::write(parent.path().join("to"), "old").unwrap();
        assert_eq!(rename_over_own_placeholder(&directory, from, to), Err(Errno::EXIST));
        assert_eq!(std::fs::read(parent.path().join("to")).unwrap(), b"old");
        std::fs::remove_file(parent.path().join("to")).unwrap();
        assert_eq!(rename_over_own_placeholder(&directory, OsStr::new("missing"), to), Err(Errno::NOENT));
        assert!(!parent.path().join("to").exists(), "the placeholder went");
        rename_over_own_placeholder(&directory, from, to).unwrap();
        assert_eq!(std::fs::read(parent.path().join("to")).unwrap(), b"new");
        assert!(!parent.path().join("from").exists());
    }

    #[test]
    fn paths_without_a_file_name_are_refused() {
        for path in ["", "/", "..", "a/", "a/.", "a/.."] {
            assert_eq!(split(Path::new(path)).unwrap_err().kind(), ErrorKind::InvalidArgument, "{path:?}");
        }
        assert_eq!(split(Path::new("a")).unwrap(), (".".into(), "a".into()));
        assert_eq!(split(Path::new("/a")).unwrap(), ("/".into(), "a".into()));
    }
}
