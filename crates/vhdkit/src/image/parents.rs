//! Who decides which file is the parent of an image.
//!
//! A parent locator is a path that whoever made the image wrote: hostile input. The library opens nothing by itself; a
//! [`ParentResolver`] that the caller gives decides, and the default denies.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::locator::ParentLocator;
use crate::storage::{LockReport, Storage};

/// What a child says about its parent.
#[derive(Clone, Copy, Debug)]
pub struct ParentRequest<'a> {
    /// The child's path, where it has one.
    pub child: Option<&'a Path>,
    /// What the child says.
    pub locator: &'a ParentLocator,
    /// How deep the child is: 0 for the image itself, 1 for its parent, ...
    pub depth: usize,
}

/// A file that could be the parent. The chain checks its identity.
#[derive(Clone, Debug)]
pub struct ParentCandidate {
    /// The file, open for reading.
    pub storage: Arc<dyn Storage>,
    /// Its path, from which its own parent is looked for.
    pub path: Option<PathBuf>,
    /// The caller named this very file. Only such a one is accepted for a child whose linkage is all zero.
    pub named: bool,
    /// How it is locked.
    pub lock: Option<LockReport>,
}

/// Decides which files may be opened as parents.
pub trait ParentResolver: Debug + Send + Sync {
    /// Gives the files that could be the parent, the likeliest first.
    ///
    /// # Errors
    /// [`ErrorKind::ParentNotFound`] when there is none, [`ErrorKind::ParentDenied`] when looking is not allowed.
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>>;
}

/// Opens no parents at all: the default.
#[derive(Clone, Copy, Debug, Default)]
pub struct DenyParents;

impl ParentResolver for DenyParents {
    fn resolve(&self, _wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        Err(Error::new(ErrorKind::ParentDenied, "the image has a parent, and no parents are allowed")
            .with_hint("open it with a resolver that says where parents may be"))
    }
}

/// The text of a Windows path, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WindowsPath {
    /// Relative to the child's directory.
    Relative(Vec<String>),
    /// Behind a drive letter.
    Drive(char, Vec<String>),
    /// Behind a volume GUID.
    Volume(Vec<String>),
    /// A share, a device, or something with a NUL: never opened.
    Never,
}

impl WindowsPath {
    /// Takes a path apart; `/` counts as `\`, and a missing `\\?\` is forgiven.
    pub(crate) fn parse(text: &str) -> Self {
        let text = text.replace('/', "\\");
        if text.contains('\0') {
            return Self::Never;
        }
        let (verbatim, rest) = match text.strip_prefix(r"\\?\") {
            Some(rest) => (true, rest),
            None => (false, text.as_str()),
        };
        let parts = |text: &str| -> Vec<String> {
            text.split('\\').filter(|part| !part.is_empty() && *part != ".").map(str::to_owned).collect()
        };
        if verbatim && rest.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("volume{")) {
            return match rest.split_once('\\') {
                Some((_, path)) => Self::Volume(parts(path)),
                None => Self::Never,
            };
        }
        let mut characters = rest.chars();
        if let (Some(letter), Some(':')) = (characters.next(), characters.next()) {
            let path = characters.as_str();
            let rooted = path.starts_with('\\') && letter.is_ascii_alphabetic();
            // `C:file` is relative to a current directory that nobody knows.
            return if rooted { Self::Drive(letter.to_ascii_lowercase(), parts(path)) } else { Self::Never };
        }
        if verbatim || rest.starts_with('\\') {
            // UNC (`\\server`, `\\?\UNC\`), devices (`\\.\`), and `\path` on an unknown drive.
            return Self::Never;
        }
        Self::Relative(parts(rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(parts: &[&str]) -> Vec<String> {
        parts.iter().map(|part| (*part).to_owned()).collect()
    }

    #[test]
    fn windows_paths_are_taken_apart() {
        let cases = [
            (r".\a.vhdx", WindowsPath::Relative(list(&["a.vhdx"]))),
            (r"..\b\a.vhdx", WindowsPath::Relative(list(&["..", "b", "a.vhdx"]))),
            ("sub/a.vhdx", WindowsPath::Relative(list(&["sub", "a.vhdx"]))),
            (r"\\?\C:\VMs\a.vhdx", WindowsPath::Drive('c', list(&["VMs", "a.vhdx"]))),
            (r"d:\a.vhdx", WindowsPath::Drive('d', list(&["a.vhdx"]))),
            (r"\\?\Volume{01234567-89ab-cdef-0123-456789abcdef}\d\a.vhdx", WindowsPath::Volume(list(&["d", "a.vhdx"]))),
            (r"\\server\share\a.vhdx", WindowsPath::Never),
            (r"\\?\UNC\server\share\a.vhdx", WindowsPath::Never),
            (r"\\.\PhysicalDrive0", WindowsPath::Never),
            (r"\a.vhdx", WindowsPath::Never),
            ("//server/share/a.vhdx", WindowsPath::Never),
            ("c:a.vhdx", WindowsPath::Never),
            ("/etc/passwd", WindowsPath::Never),
            ("a\0b", WindowsPath::Never),
        ];
        for (text, expected) in cases {
            assert_eq!(WindowsPath::parse(text), expected, "{text}");
        }
    }
}
