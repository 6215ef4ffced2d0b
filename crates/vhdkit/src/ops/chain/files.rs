//! The images among the files of a directory, each opened once, for reading and without a lock.

use std::collections::HashSet;
use std::fs::{DirEntry, FileType, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::Strictness;
use crate::format::ident::{Probe, probe};
use crate::format::log::GROWTH_MAX;
use crate::image::Layer;
use crate::ops::{Progress, advance};
use crate::storage::lock::is_locked_elsewhere;
use crate::storage::{FileAccess, FileStorage, Sharing, Storage, StorageIdentity};

/// Files that are looked at, at most: far more than any place for disks has, and few enough for their names to fit into
/// memory.
const FILES_MAX: usize = 1 << 18;
/// Directories that are looked into, at most, and how deep they may lie in each other.
const DEPTH_MAX: usize = 64;
/// How often an image is read that somebody has locked: whoever writes it may be changing a header just now.
const ATTEMPTS: u32 = 3;
/// Endings of names that say that a file is an image, or claims to be one.
const EXTENSIONS: [&str; 4] = ["vhdx", "avhdx", "vhd", "vhds"];

/// A file that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) path: PathBuf,
    pub(super) identity: StorageIdentity,
    /// The name is a symbolic link to it.
    is_link: bool,
}

/// What a file turned out to be.
#[derive(Debug)]
pub(super) enum Content {
    /// An image; somebody may have it locked.
    Image {
        /// Its structures, without the BAT.
        layer: Box<Layer>,
        /// Somebody has it locked.
        in_use: bool,
    },
    /// A VHDX that cannot be opened.
    Damaged(Error),
    /// By its name an image, but not a VHDX, or not to be read.
    Other(Error),
    /// Nothing that has to do with disks.
    Unrelated,
}

/// Whether a name says that the file is an image.
pub(super) fn is_named_like_an_image(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// The regular files of a directory and, where wanted, of those beneath it, in the order of their names. Symbolic links
/// to files count, those to directories do not. A file with several names is listed once by the first that is no link;
/// the others are given too, behind all files.
///
/// # Errors
/// When the directory cannot be read; one beneath it that cannot be read is left out.
pub(super) fn list(directory: &Path, recursive: bool, progress: &dyn Progress) -> Result<Vec<Listed>> {
    let mut files = Vec::new();
    let mut seen = HashSet::new();
    let mut waiting = vec![(directory.to_owned(), 0)];
    while let Some((directory, depth)) = waiting.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(_) if depth > 0 => continue,
            Err(error) => return Err(Error::io("cannot look into the directory", error).with_path(&directory)),
        };
        for entry in entries {
            advance(progress, 0, None)?;
            let entry = entry.map_err(|error| Error::io("cannot read the directory", error).with_path(&directory))?;
            let path = path_of(&directory, &entry);
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                let mut is_new = || entry.metadata().is_ok_and(|found| seen.insert(identity(&found)));
                if recursive && depth < DEPTH_MAX && is_new() {
                    waiting.push((path, depth + 1)); // at most DEPTH_MAX
                }
                continue;
            }
            files.extend(look_at(path, kind));
            if files.len() > FILES_MAX {
                let what = format!("the directory holds more than {FILES_MAX} files");
                return Err(Error::new(ErrorKind::Limit, what)
                    .with_path(&directory)
                    .with_hint("name a directory that holds the images only"));
            }
        }
    }
    files.sort_by(|a, b| (a.is_link, &a.path).cmp(&(b.is_link, &b.path)));
    Ok(files)
}

/// The path of an entry; in the current directory its name alone, unless that could be taken for an option.
fn path_of(directory: &Path, entry: &DirEntry) -> PathBuf {
    let name = entry.file_name();
    let is_plain = directory == Path::new(".") && !name.as_bytes().starts_with(b"-");
    if is_plain { name.into() } else { entry.path() }
}

/// A file that was named. Anything that is no regular file or block device is an error.
pub(super) fn named(path: &Path) -> Result<Listed> {
    let storage = FileStorage::open(path, FileAccess::Read, Sharing::ForceShare)?;
    let identity = storage.identity();
    let identity =
        identity.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "the file cannot be told from others"))?;
    Ok(Listed { path: path.to_owned(), identity, is_link: false })
}

fn look_at(path: PathBuf, kind: FileType) -> Option<Listed> {
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
        return None;
    }
    let metadata = std::fs::metadata(&path).ok().filter(Metadata::is_file)?;
    Some(Listed { path, identity: identity(&metadata), is_link: kind.is_symlink() })
}

/// As [`FileStorage`] tells files apart.
fn identity(metadata: &Metadata) -> StorageIdentity {
    StorageIdentity { device: metadata.dev(), inode: metadata.ino() }
}

/// Looks into a file. It is only read, and never waited for.
pub(super) fn look_into(path: &Path) -> Content {
    let storage = match FileStorage::open(path, FileAccess::Read, Sharing::ForceShare) {
        Ok(storage) => storage,
        Err(error) if is_named_like_an_image(path) => return Content::Other(error),
        Err(_) => return Content::Unrelated,
    };
    let in_use = storage.as_file().is_some_and(is_locked_elsewhere);
    load(&(Arc::new(storage) as Arc<dyn Storage>), path, in_use)
}

/// Looks into a file that is open.
pub(super) fn load(storage: &Arc<dyn Storage>, path: &Path, in_use: bool) -> Content {
    let mut start = [0; 8];
    let is_image = storage.read_at(&mut start, 0).is_ok() && probe(&start) == Probe::Vhdx;
    if !is_image && !is_named_like_an_image(path) {
        return Content::Unrelated;
    }
    let open = || Layer::open(storage, Some(path), Strictness::Normal, GROWTH_MAX);
    let mut opened = open();
    for _ in 1..ATTEMPTS {
        if opened.is_err() && in_use && is_image {
            opened = open();
        }
    }
    match opened {
        Ok(layer) => Content::Image { layer: Box::new(layer), in_use },
        Err(error) if is_image => Content::Damaged(error),
        Err(error) => Content::Other(error),
    }
}
