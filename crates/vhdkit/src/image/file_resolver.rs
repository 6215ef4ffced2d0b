//! Parents as files in directories that the caller allows.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::Errno;

use super::parents::{ParentCandidate, ParentRequest, ParentResolver, WindowsPath};
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::Code;
use crate::format::locator::{KEY_ABSOLUTE_PATH, KEY_RELATIVE_PATH, KEY_VOLUME_PATH};
use crate::storage::{FileKind, FileStorage, LockMode, Sharing};
use crate::text::escape;

/// Finds parents by the paths that children name, in allowed directories only.
///
/// A path is followed beneath an allowed directory with openat2: no symbolic links, no magic links, no way out. Only
/// regular files are opened, and only for reading. Shares (UNC) and devices are never opened. Windows paths are mapped:
/// a relative one from the child's directory, then its end (whole, then ever shorter) beneath the directories that the
/// caller allowed; behind a drive letter or volume, the path's end beneath those and the child's own. Where the exact name is not there, one
/// that differs in case only is taken. What is found must still be the right parent: the chain checks its identity.
///
/// ```no_run
/// use std::path::Path;
/// use vhdkit::image::FileResolver;
///
/// # fn main() -> vhdkit::Result<()> {
/// let resolver = FileResolver::new().allow_own_directory().allow_directory(Path::new("/srv/base-images"))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct FileResolver {
    directories: Vec<PathBuf>,
    own_directory: bool,
    any: bool,
    named: Vec<PathBuf>,
    sharing: Sharing,
}

impl FileResolver {
    /// A resolver that allows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows everything beneath a directory.
    ///
    /// # Errors
    /// When it is not a directory that can be opened.
    pub fn allow_directory(mut self, directory: &Path) -> Result<Self> {
        let canonical = directory.canonicalize().and_then(|path| {
            if path.is_dir() { Ok(path) } else { Err(std::io::Error::from(std::io::ErrorKind::NotADirectory)) }
        });
        let canonical = canonical.map_err(|error| {
            Error::io("cannot use the directory for parents", error)
                .with_path(directory)
                .with_hint("name a directory that exists and can be read")
        })?;
        self.directories.push(canonical);
        Ok(self)
    }

    /// Allows everything beneath the directory of each child.
    #[must_use]
    pub fn allow_own_directory(mut self) -> Self {
        self.own_directory = true;
        self
    }

    /// Allows every directory.
    #[must_use]
    pub fn allow_any(mut self) -> Self {
        self.any = true;
        self
    }

    /// Names a parent: the first one is the image's parent, the next one that one's, and so on. A named file is opened
    /// wherever it is, instead of what the child says; it must be the right one all the same.
    #[must_use]
    pub fn name_parent(mut self, file: &Path) -> Self {
        self.named.push(file.to_owned());
        self
    }

    /// How parents are shared with other programs.
    #[must_use]
    pub fn sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// The directories in which this child's parent may be.
    fn allowed(&self, own: Option<&Path>) -> Vec<PathBuf> {
        let mut allowed: Vec<PathBuf> =
            own.filter(|_| self.own_directory || self.any).map(Path::to_owned).into_iter().collect();
        allowed.extend(self.directories.iter().filter(|directory| Some(directory.as_path()) != own).cloned());
        allowed
    }
}

/// Where one search looked, and what stood in the way.
#[derive(Debug, Default)]
struct Search {
    candidates: Vec<ParentCandidate>,
    looked: Vec<String>,
    denied: Vec<String>,
    /// A place that the child names is a path of this machine, but not in an allowed directory.
    outside: bool,
    obstacle: Option<Error>,
}

/// Candidates at most; each has to be opened.
const CANDIDATES_MAX: usize = 32;
/// Components of a path at most: a locator may hold 32,767 characters, and each suffix is tried.
const COMPONENTS_MAX: usize = 64;

impl ParentResolver for FileResolver {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        if let Some(named) = self.named.get(wanted.depth) {
            let storage = FileStorage::open(named, crate::storage::FileAccess::Read, self.sharing)?;
            if storage.kind() != FileKind::Regular {
                return Err(Error::new(ErrorKind::InvalidArgument, "a parent must be a regular file").with_path(named));
            }
            return Ok(vec![candidate(storage, named.clone(), true)]);
        }
        let own = wanted.child.map(directory_of);
        let mut search = Search::default();
        for key in [KEY_RELATIVE_PATH, KEY_VOLUME_PATH, KEY_ABSOLUTE_PATH] {
            if let Some(text) = wanted.locator.get(key) {
                self.search(text, own.as_deref(), &mut search);
            }
        }
        if search.candidates.is_empty() { Err(search.into_error()) } else { Ok(search.candidates) }
    }
}

impl FileResolver {
    fn search(&self, text: &str, own: Option<&Path>, search: &mut Search) {
        match WindowsPath::parse(text) {
            WindowsPath::Never => search.denied.push(format!("\"{}\" (a share or device)", escape(text))),
            WindowsPath::Relative(parts) => {
                let Some(own) = own else { return };
                match normalize(own, &parts) {
                    Some(path) => self.look_at(&path, Some(own), search),
                    None => search.denied.push(format!("\"{}\" (leads above the root)", escape(text))),
                }
                // The child may have been moved away from its parent: the caller's directories are looked into by name.
                let names: Vec<String> = parts.into_iter().filter(|part| part != "..").collect();
                self.look_for_suffixes(&names, &self.directories, search);
            }
            WindowsPath::Drive(letter, parts) => {
                // Where WSL mounts the drives of Windows.
                let mounted = Path::new("/mnt").join(letter.to_string());
                if let Some(path) = normalize(&mounted, &parts)
                    && mounted.is_dir()
                {
                    self.look_at(&path, own, search);
                }
                self.look_for_suffixes(&parts, &self.allowed(own), search);
            }
            WindowsPath::Volume(parts) => self.look_for_suffixes(&parts, &self.allowed(own), search),
        }
    }

    /// Looks at one place, which must be beneath an allowed directory.
    fn look_at(&self, path: &Path, own: Option<&Path>, search: &mut Search) {
        let mut allowed = self.allowed(own);
        if self.any {
            allowed.push(PathBuf::from("/"));
        }
        let inside = allowed.iter().find_map(|base| path.strip_prefix(base).ok().map(|rest| (base, rest)));
        match inside {
            Some((base, rest)) => self.try_open(base, rest, search),
            None => {
                search.outside = true;
                search.denied.push(format!("\"{}\"", escape(&path.to_string_lossy())));
            }
        }
    }

    /// Looks for the whole path, then for ever shorter ends of it, beneath each allowed directory.
    fn look_for_suffixes(&self, parts: &[String], directories: &[PathBuf], search: &mut Search) {
        if parts.iter().any(|part| part == "..") || parts.len() > COMPONENTS_MAX {
            return;
        }
        for base in directories {
            for start in 0..parts.len() {
                let rest: PathBuf = parts.iter().skip(start).collect();
                self.try_open(base, &rest, search);
            }
        }
    }

    fn try_open(&self, base: &Path, rest: &Path, search: &mut Search) {
        let full = base.join(rest);
        let shown = format!("\"{}\"", escape(&full.to_string_lossy()));
        if search.looked.contains(&shown) || search.candidates.len() >= CANDIDATES_MAX {
            return;
        }
        search.looked.push(shown);
        match open_beneath(base, rest) {
            Ok(Some((file, path))) => match self.accept(file, path) {
                Ok(candidate) => search.candidates.push(candidate),
                Err(error) => search.obstacle = search.obstacle.take().or(Some(error)),
            },
            Ok(None) => {}
            Err(error) => search.obstacle = search.obstacle.take().or(Some(error)),
        }
    }

    fn accept(&self, file: OwnedFd, path: PathBuf) -> Result<ParentCandidate> {
        let mut storage = FileStorage::from_file(file.into(), Some(path.clone()))?;
        if self.sharing == Sharing::Normal {
            storage.lock(LockMode::Read).map_err(|error| error.with_path(&path))?;
        }
        Ok(candidate(storage, path, false))
    }
}

fn candidate(storage: FileStorage, path: PathBuf, named: bool) -> ParentCandidate {
    let lock = Some(storage.lock_report().clone());
    ParentCandidate { storage: Arc::new(storage), path: Some(path), named, lock }
}

impl Search {
    fn into_error(self) -> Error {
        if let Some(obstacle) = self.obstacle {
            return obstacle;
        }
        if self.outside || (self.looked.is_empty() && !self.denied.is_empty()) {
            let mut what =
                format!("the parent would be outside of the allowed directories: {}", self.denied.join(", "));
            if !self.looked.is_empty() {
                what.push_str(&format!("; inside of them it is not at {}", self.looked.join(", ")));
            }
            return Error::new(ErrorKind::ParentDenied, what)
                .with_hint("allow its directory with --parent-dir DIR, or name the file with --parent FILE");
        }
        let mut what = if self.looked.is_empty() {
            "the image says nowhere where its parent is".to_owned()
        } else {
            format!("the parent was not found; looked at {}", self.looked.join(", "))
        };
        if !self.denied.is_empty() {
            what.push_str(&format!("; not allowed: {}", self.denied.join(", ")));
        }
        Error::new(ErrorKind::ParentNotFound, what)
            .with_code(Code::ParentNotFound)
            .with_hint("copy the parent beside the image, allow its directory with --parent-dir DIR, or name it with --parent FILE")
    }
}

/// Resolves `..` in the text alone; `None` when it leads above the root. Symbolic links are refused when opening, so the
/// text is what counts.
fn normalize(base: &Path, parts: &[String]) -> Option<PathBuf> {
    let mut path = base.to_owned();
    for part in parts {
        if part == ".." {
            if !path.pop() {
                return None;
            }
        } else {
            path.push(part);
        }
    }
    Some(path)
}

/// Whether the relative path that a child names leads to `place`; also when there is nothing to be said about that. Only
/// the text counts, as when a parent is looked for; letters may differ in case.
pub(crate) fn is_place_of(child: &Path, relative: &str, place: &Path) -> bool {
    let WindowsPath::Relative(parts) = WindowsPath::parse(relative) else { return true };
    let expected = normalize(&directory_of(child), &parts);
    expected.is_some_and(|path| path.as_os_str().eq_ignore_ascii_case(place.as_os_str()))
}

/// The directory in which an image lies. A link to an image is as good as the image: its parent lies where it really is.
pub(crate) fn directory_of(child: &Path) -> PathBuf {
    let real = child.canonicalize().unwrap_or_else(|_| child.to_owned());
    real.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Opens a regular file beneath a directory for reading; `None` when it is not there. Whatever it is, it is looked at
/// without opening it first, so that no device or FIFO is ever touched.
fn open_beneath(base: &Path, rest: &Path) -> Result<Option<(OwnedFd, PathBuf)>> {
    let failed = |error: Errno| match error {
        Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => None,
        Errno::LOOP | Errno::XDEV => Some(
            Error::new(
                ErrorKind::ParentDenied,
                "the path to the parent leads through a symbolic link or out of the directory",
            )
            .with_hint("name the file with --parent FILE, or its real directory with --parent-dir DIR")
            .with_path(base.join(rest)),
        ),
        other => Some(Error::io("cannot open the parent", other.into()).with_path(base.join(rest))),
    };
    let directory = match open(base, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(directory) => directory,
        Err(error) => return failed(error).map_or(Ok(None), Err),
    };
    let look = |path: &Path| openat2(&directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), RESOLVE);
    let (found, path) = match look(rest) {
        Ok(found) => (found, rest.to_owned()),
        Err(Errno::NOENT) => match find_ignoring_case(&directory, rest) {
            Some(path) => match look(&path) {
                Ok(found) => (found, path),
                Err(error) => return failed(error).map_or(Ok(None), Err),
            },
            None => return Ok(None),
        },
        Err(error) => return failed(error).map_or(Ok(None), Err),
    };
    let full = base.join(&path);
    let kind = rustix::fs::fstat(&found).map(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode));
    if kind != Ok(rustix::fs::FileType::RegularFile) {
        let what = "what lies where the parent should be is not a regular file";
        let hint = "put the parent there, or name it with --parent FILE";
        return Err(Error::new(ErrorKind::ParentDenied, what).with_hint(hint).with_path(full));
    }
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found.as_fd()));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::openat(CWD, link, flags, Mode::empty()) {
        Ok(file) => Ok(Some((file, full))),
        Err(error) => Err(Error::io("cannot open the parent", error.into()).with_path(full)),
    }
}

/// Finds the one path that differs from `rest` in the case of ASCII letters only.
fn find_ignoring_case(base: &OwnedFd, rest: &Path) -> Option<PathBuf> {
    let mut found = PathBuf::new();
    for component in rest.components() {
        let Component::Normal(wanted) = component else { return None };
        let at = if found.as_os_str().is_empty() { Path::new(".") } else { found.as_path() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat2(base, at, flags, Mode::empty(), RESOLVE).ok()?;
        let mut matching: Vec<OsString> = Vec::new();
        for entry in Dir::new(directory).ok()? {
            let name = OsStr::from_bytes(entry.ok()?.file_name().to_bytes()).to_owned(); // UTF-8 or not
            if name == *wanted {
                matching = vec![name];
                break;
            }
            if name.eq_ignore_ascii_case(wanted) {
                matching.push(name);
            }
        }
        match matching.as_slice() {
            [one] => found.push(one),
            _ => return None,
        }
    }
    Some(found)
}
