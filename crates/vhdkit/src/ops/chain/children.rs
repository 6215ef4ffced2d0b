//! The images that have a given one as their parent.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::files::{Content, Listed, list, load, look_into, named};
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::image::{FileResolver, Layer, ParentRequest, ParentResolver as _};
use crate::ops::{Progress, advance};
use crate::storage::{Sharing, StorageIdentity};
use crate::text::escape;

/// Children that are named in an error.
const NAMES_SHOWN: usize = 5;

/// The image whose children are looked for.
#[derive(Clone, Debug)]
pub struct ParentFile {
    /// What tells the file apart from others, where it can be told.
    pub identity: Option<StorageIdentity>,
    /// The identity that children name.
    pub data_write_guid: Guid,
}

impl ParentFile {
    /// A layer of an open image: with the identity that it had when it was opened.
    #[must_use]
    pub fn of(layer: &Layer) -> Self {
        let data_write_guid = layer.headers().current.data_write_guid;
        Self { identity: layer.storage().identity(), data_write_guid }
    }

    /// The image in a file. It is only read, and not locked.
    ///
    /// # Errors
    /// When it is not an image that can be opened.
    pub fn at(path: &Path) -> Result<Self> {
        match look_into(path) {
            Content::Image { layer, .. } => Ok(Self::of(&layer)),
            Content::Damaged(error) | Content::Other(error) => Err(error),
            Content::Unrelated => Err(Error::new(ErrorKind::NotVhdx, "the file is not a VHDX").with_path(path)),
        }
    }
}

/// Why an image counts as a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildLink {
    /// Its `parent_linkage` is the parent's data write GUID.
    Linkage,
    /// Its `parent_linkage2` is; a merge was begun.
    Linkage2,
    /// Its path leads to the parent, but it expects another state of it, or none that can be told: writing to the parent
    /// breaks nothing that was whole, removing it does.
    Path,
}

/// An image that has another one as its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Where it is.
    pub path: PathBuf,
    /// What tells its file apart from others.
    pub identity: StorageIdentity,
    /// Why it is a child.
    pub link: ChildLink,
    /// Somebody has it locked, who may be using it and its parents at this moment.
    pub in_use: bool,
}

impl Child {
    /// Whether a change of what the parent holds takes this child its parent.
    #[must_use]
    pub const fn breaks_by_writing(&self) -> bool {
        !matches!(self.link, ChildLink::Path)
    }
}

/// What [`find_children`] found.
#[derive(Debug, Default)]
pub struct Children {
    /// The children, in the order of directories and names.
    pub found: Vec<Child>,
    /// Files that are images, by their contents or their name, and could not be read: whether they are children is not known.
    pub unknown: Vec<Error>,
}

/// Finds the images that have `of` as their parent, among the files of some directories (not those beneath them) and the
/// files named. What cannot be read is told apart from what is no child. Files are only read and not locked, each of them
/// once; an image that its user has open is no obstacle.
///
/// Of several copies of one image, children are those of the copy that their path leads to. Only what lies there is found: an
/// image elsewhere may be a child all the same.
///
/// ```no_run
/// use std::path::{Path, PathBuf};
/// use vhdkit::ops::chain::{ParentFile, find_children};
///
/// # fn main() -> vhdkit::Result<()> {
/// let base = ParentFile::at(Path::new("vms/base.vhdx"))?;
/// for child in find_children(&base, &[PathBuf::from("vms")], &[], &())?.found {
///     println!("{}", child.path.display());
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When a directory cannot be read, a named file cannot be opened, or `progress` cancels.
pub fn find_children(
    of: &ParentFile,
    directories: &[PathBuf],
    files: &[PathBuf],
    progress: &dyn Progress,
) -> Result<Children> {
    let mut listed = Vec::new();
    for directory in directories {
        listed.extend(list(directory, false, progress)?);
    }
    for file in files {
        listed.push(named(file)?);
    }
    let mut resolver = FileResolver::new().allow_own_directory().sharing(Sharing::ForceShare);
    for directory in directories {
        resolver = resolver.allow_directory(directory)?;
    }
    let mut children = Children::default();
    let mut seen: HashSet<StorageIdentity> = of.identity.into_iter().collect();
    for file in listed {
        advance(progress, 0, None)?;
        if !seen.insert(file.identity) {
            continue;
        }
        match look_into(&file.path) {
            Content::Image { layer, in_use } => {
                let link = judge(of, &file, &layer, &resolver);
                let child = |link| Child { path: file.path, identity: file.identity, link, in_use };
                children.found.extend(link.map(child));
            }
            Content::Damaged(error) => children.unknown.push(error.with_path(&file.path)),
            // Another format by its name or its contents; what cannot be read at all may be anything.
            Content::Other(error) if error.io_error().is_some() => children.unknown.push(error.with_path(&file.path)),
            Content::Other(_) | Content::Unrelated => {}
        }
    }
    Ok(children)
}

/// The directory in which an image lies, and with it, mostly, its children: beside what a symbolic link leads to.
#[must_use]
pub fn directory_of(image: &Path) -> PathBuf {
    crate::image::file_resolver::directory_of(image)
}

/// Refuses when the image has children whom a change of its disk would take their parent: among the files of its own
/// directory, and those named. Gives what was found otherwise.
///
/// # Errors
/// [`ErrorKind::Refused`] when there are such children; otherwise as [`find_children`].
pub fn refuse_to_break(of: &Layer, files: &[PathBuf], progress: &dyn Progress) -> Result<Children> {
    let own: Vec<PathBuf> = of.path().map(directory_of).into_iter().collect();
    let children = find_children(&ParentFile::of(of), &own, files, progress)?;
    let broken: Vec<&Child> = children.found.iter().filter(|child| child.breaks_by_writing()).collect();
    if broken.is_empty() {
        return Ok(children);
    }
    let names = broken.iter().take(NAMES_SHOWN).map(|child| format!("\"{}\"", escape(&child.path.to_string_lossy())));
    let mut names = names.collect::<Vec<_>>().join(", ");
    if broken.len() > NAMES_SHOWN {
        names.push_str(&format!(" and {} more", broken.len() - NAMES_SHOWN)); // there are more
    }
    let what = format!("the image is the parent of {names}, which could not be opened any more");
    let error = Error::new(ErrorKind::Refused, what)
        .with_hint("work on a copy; or say --break-children if nobody needs these images any more");
    Err(of.name_error(error))
}

fn judge(of: &ParentFile, file: &Listed, layer: &Layer, resolver: &FileResolver) -> Option<ChildLink> {
    let locator = layer.metadata().parent_locator.as_ref().filter(|_| layer.metadata().has_parent)?;
    let wanted = Some(of.data_write_guid).filter(|guid| !guid.is_nil());
    let link = if wanted.is_some() && locator.linkage() == wanted {
        Some(ChildLink::Linkage)
    } else if wanted.is_some() && locator.linkage2() == wanted {
        Some(ChildLink::Linkage2)
    } else {
        None
    };
    let request = ParentRequest { child: Some(&file.path), locator, depth: 0 };
    let candidates = resolver.resolve(&request).unwrap_or_default(); // no path, no link by it
    let Some(link) = link else {
        let first = candidates.first()?.storage.identity();
        return (first.is_some() && first == of.identity).then_some(ChildLink::Path);
    };
    // Of several copies, the parent is the one that is found first.
    for candidate in candidates {
        if candidate.storage.identity() == of.identity {
            break;
        }
        let path = candidate.path.unwrap_or_default();
        if let Content::Image { layer, .. } = load(&candidate.storage, &path, false)
            && locator.accepts(layer.headers().current.data_write_guid)
        {
            return None;
        }
    }
    Some(link)
}
