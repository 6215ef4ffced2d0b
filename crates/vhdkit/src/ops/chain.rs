//! Chains of images as they lie in directories: who is whose parent, and who looks for one in vain.
//!
//! ```text
//! list files -> open each once -> ask the resolver where its parent could be -> load what lies outside, too
//!                                                                                     |
//!        draw as trees  <-  cut cycles  <-  join by path and identity, or by identity alone (moved)
//! ```

mod children;
mod files;
mod links;
mod survey;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use children::{Child, ChildLink, Children, ParentFile, directory_of, find_children, refuse_to_break};

use super::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::metadata::DiskType;
use crate::image::ParentResolver;
use files::{list, named};
use survey::Survey;

/// How to look for chains.
#[derive(Clone, Debug, Default)]
pub struct ChainOptions {
    /// Also look into the directories beneath the one that is named.
    pub recursive: bool,
    /// Who decides which files may be opened as parents, beside those that are found anyway. It should lock nothing
    /// ([`Sharing::ForceShare`](crate::storage::Sharing::ForceShare)). Without one no path is followed, and parents are known by
    /// identity alone.
    pub parents: Option<Arc<dyn ParentResolver>>,
    /// More files and directories where parents and children may be.
    pub also: Vec<PathBuf>,
}

/// An image with its place in a chain.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where it is.
    pub path: PathBuf,
    /// Other names of the same file.
    pub other_names: Vec<PathBuf>,
    /// The image beneath which it stands, by its place in [`ChainReport::nodes`]: its parent, or what was or may be its
    /// parent where the link is broken.
    pub parent: Option<usize>,
    /// How deep it stands in its tree: 0 for a root.
    pub depth: usize,
    /// What kind of disk it is.
    pub disk_type: DiskType,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Bytes of the file.
    pub file_size: u64,
    /// Bytes that the file takes on its file system, where that can be told.
    pub disk_usage: Option<u64>,
    /// Bytes of a logical sector.
    pub logical_sector_size: u32,
    /// The log holds changes that are not in place yet.
    pub is_dirty: bool,
    /// Somebody has it locked.
    pub in_use: bool,
    /// The identity that children name.
    pub data_write_guid: Guid,
    /// The identity that the guest sees.
    pub disk_id: Guid,
    /// The identity of the parent, where there is one.
    pub linkage: Option<Guid>,
    /// The second one.
    pub linkage2: Option<Guid>,
    /// What the image says where its parent is: keys and texts, safe to print, long ones cut.
    pub parent_paths: Vec<(String, String)>,
    /// By what its parent is known; `None` for a root, and where the link is broken.
    pub link: Option<ChildLink>,
    /// What is wrong with its link, or odd about it.
    pub troubles: Vec<Trouble>,
}

impl Node {
    /// Whether the image has a parent, but cannot be opened with it.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.troubles.iter().any(|trouble| trouble.kind.breaks())
    }
}

/// What can be wrong with a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TroubleKind {
    /// The parent is somewhere else, or has another name.
    Moved,
    /// The file at the parent's place is another one, or was changed since.
    Changed,
    /// Nothing is there.
    Missing,
    /// It would be outside of where parents may be looked for.
    Denied,
    /// What is there cannot be opened.
    Unreadable,
    /// The image says where its parent is, but not which one it is.
    Unidentified,
    /// The parent has logical sectors of another size.
    SectorSize,
    /// The image is its own ancestor.
    Cycle,
    /// There are more ancestors than [`CHAIN_DEPTH_MAX`](crate::image::CHAIN_DEPTH_MAX).
    TooDeep,
    /// The parent is found, but not where the image says first.
    StalePath,
    /// A merge into the parent was begun and not finished.
    MergeBegun,
}

impl TroubleKind {
    /// Whether the image cannot be opened with its parent.
    #[must_use]
    pub const fn breaks(self) -> bool {
        !matches!(self, Self::StalePath | Self::MergeBegun)
    }

    /// A stable name for scripts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Changed => "changed",
            Self::Missing => "missing",
            Self::Denied => "denied",
            Self::Unreadable => "unreadable",
            Self::Unidentified => "unidentified",
            Self::SectorSize => "sector-size",
            Self::Cycle => "cycle",
            Self::TooDeep => "too-deep",
            Self::StalePath => "stale-path",
            Self::MergeBegun => "merge-begun",
        }
    }
}

/// Something that is wrong with a link, and ways to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What it is.
    pub kind: TroubleKind,
    /// The same in words, safe to print.
    pub message: String,
    /// What may help, the likeliest first.
    pub remedies: Vec<Remedy>,
}

/// A way to mend a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// What it does, and what has to be known before; safe to print.
    pub what: String,
    /// The arguments of `vhdkit` that do it; none where that takes a person.
    pub arguments: Vec<OsString>,
}

/// What [`chain`] found.
#[derive(Debug, Default)]
pub struct ChainReport {
    /// The images, every tree from its root on: each stands behind the one it stands beneath.
    pub nodes: Vec<Node>,
    /// Images that cannot be opened, so that it is not known where they belong.
    pub damaged: Vec<Error>,
    /// Files that are images by their name, and are in another format or cannot be read.
    pub skipped: Vec<Error>,
}

impl ChainReport {
    /// Whether every image has its parent, and none is damaged.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.damaged.is_empty() && !self.nodes.iter().any(Node::is_broken)
    }
}

/// Images in one report at most: enough for any directory of disks, and few enough to fit into memory.
const IMAGES_MAX: usize = 1 << 14;

/// Finds the chains of all images in a directory, or the tree in which one image stands: its ancestors and their
/// descendants, as far as they lie in its directory, where `options` say, or where the resolver lets parents be opened.
/// Files are only read, never locked, each of them once; what is in use, damaged or no VHDX is named and is no error.
///
/// ```no_run
/// use std::path::Path;
/// use vhdkit::ops::chain::{ChainOptions, chain};
///
/// # fn main() -> vhdkit::Result<()> {
/// for node in chain(Path::new("vms"), &ChainOptions::default(), &())?.nodes {
///     println!("{:indent$}{}", "", node.path.display(), indent = node.depth);
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When the directory or the image cannot be opened, a place in `options` does not exist, there are too many images
/// ([`ErrorKind::Limit`]), or `progress` cancels.
pub fn chain(of: &Path, options: &ChainOptions, progress: &dyn Progress) -> Result<ChainReport> {
    let mut survey = Survey::new(options.parents.as_deref());
    let is_directory = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.is_dir());
    let mut wanted = None;
    let mut files = if is_directory(of) {
        list(of, options.recursive, progress)?
    } else {
        let file = named(of)?;
        wanted = Some(file.identity);
        let mut files = vec![file];
        files.extend(list(&beside(of), options.recursive, progress)?);
        files
    };
    for place in &options.also {
        if is_directory(place) {
            files.extend(list(place, options.recursive, progress)?);
        } else {
            files.push(named(place)?);
        }
    }
    survey.look_into_all(files, wanted, progress)?;
    let mut report = links::join(survey, wanted);
    if wanted.is_some() {
        // What else lies there has nothing to do with the image.
        report.damaged.clear();
        report.skipped.clear();
    }
    Ok(report)
}

/// The directory of an image, with the name that the user gave it as far as that leads there.
fn beside(image: &Path) -> PathBuf {
    let is_link = std::fs::symlink_metadata(image).is_ok_and(|found| found.is_symlink());
    match image.parent() {
        Some(parent) if !is_link && !parent.as_os_str().is_empty() => parent.to_owned(),
        Some(_) if !is_link => PathBuf::from("."),
        _ => directory_of(image),
    }
}

fn too_many() -> Error {
    Error::new(ErrorKind::Limit, format!("there are more than {IMAGES_MAX} images"))
        .with_hint("name a directory that holds fewer of them")
}
