//! Opening an image and its chain of parents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Image;
use super::admission::Admission;
use super::layer::Layer;
use super::parents::{DenyParents, ParentCandidate, ParentRequest, ParentResolver};
use super::simulation::BrokenRule;
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::{Code, FailFast, Location, Strictness};
use crate::format::locator::ParentLocator;
use crate::format::log::GROWTH_MAX;
use crate::storage::{FileAccess, FileStorage, LockReport, Sharing, Storage, StorageIdentity};

/// Images in a chain at most, the image itself included.
///
/// Hyper-V's own limit is not published; other implementations bound chains at the same depth.
pub const CHAIN_DEPTH_MAX: usize = 256;

/// How to open an image.
///
/// ```no_run
/// use std::path::Path;
/// use std::sync::Arc;
/// use vhdkit::image::{BlockDevice, FileResolver, OpenOptions};
///
/// # fn main() -> vhdkit::Result<()> {
/// let parents = Arc::new(FileResolver::new().allow_own_directory());
/// let image = OpenOptions::new().parents(parents).open_path(Path::new("checkpoint.avhdx"))?;
/// let mut sector = [0; 512];
/// image.read_at(&mut sector, 0)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    strictness: Strictness,
    sharing: Sharing,
    write: bool,
    replay: bool,
    broken: Option<BrokenRule>,
    parents: Option<Arc<dyn ParentResolver>>,
    log_growth_max: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            strictness: Strictness::Normal,
            sharing: Sharing::Normal,
            write: false,
            replay: false,
            broken: None,
            parents: Some(Arc::new(DenyParents)),
            log_growth_max: GROWTH_MAX,
        }
    }
}

impl OpenOptions {
    /// Reading, normal strictness, no parents allowed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How strictly to judge the image. [`Strictness::Strict`] also refuses a dirty log.
    #[must_use]
    pub fn strictness(mut self, strictness: Strictness) -> Self {
        self.strictness = strictness;
        self
    }

    /// Whether other programs may have the file open for writing. For [`OpenOptions::open_path`].
    #[must_use]
    pub fn sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// Whether to open the image for writing: it is locked so, and everything that must be in order before a first
    /// write is checked, down to every entry of the BAT. Nothing is written before the first change. Parents are opened
    /// for reading.
    #[must_use]
    pub fn write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// Whether the first change may put a dirty log into place. Without this an image with a dirty log cannot be opened for
    /// writing: it may be in use by somebody whose lock cannot be seen from here (Windows, through WSL or a share).
    #[must_use]
    pub fn replay(mut self, replay: bool) -> Self {
        self.replay = replay;
        self
    }

    /// Breaks a rule of the order of writes, to prove that the crash simulator finds the loss.
    #[cfg(feature = "simulation")]
    #[doc(hidden)]
    #[must_use]
    pub fn break_rule(mut self, rule: Option<BrokenRule>) -> Self {
        self.broken = rule;
        self
    }

    /// Who decides which files are parents.
    #[must_use]
    pub fn parents(mut self, resolver: Arc<dyn ParentResolver>) -> Self {
        self.parents = Some(resolver);
        self
    }

    /// Opens the image alone. Data that only a parent has is an error when it is read.
    #[must_use]
    pub fn without_parents(mut self) -> Self {
        self.parents = None;
        self
    }

    /// How far a dirty log may let the file grow, in bytes; 64 GiB unless said otherwise.
    #[must_use]
    pub fn log_growth_max(mut self, bytes: u64) -> Self {
        self.log_growth_max = bytes;
        self
    }

    /// Opens the image at a path.
    ///
    /// # Errors
    /// When the file cannot be opened or locked, is not a usable VHDX, or its parents are not.
    pub fn open_path(&self, path: &Path) -> Result<Image> {
        let access = if self.write { FileAccess::Write } else { FileAccess::Read };
        let storage = FileStorage::open(path, access, self.sharing)?;
        let lock = storage.lock_report().clone();
        self.open_locked(Arc::new(storage), Some(path), Some(lock))
    }

    /// Opens the image in a storage. The name is for messages, and its directory is where parents are looked for.
    ///
    /// # Errors
    /// When it is not a usable VHDX, or its parents are not.
    pub fn open(&self, storage: Arc<dyn Storage>, name: Option<&Path>) -> Result<Image> {
        self.open_locked(storage, name, None)
    }

    fn open_locked(&self, storage: Arc<dyn Storage>, name: Option<&Path>, lock: Option<LockReport>) -> Result<Image> {
        let mut image = Layer::open(&storage, name, self.strictness, self.log_growth_max)?;
        image.lock = lock;
        let mut identities: Vec<StorageIdentity> = storage.identity().into_iter().collect();
        let mut layers = vec![image];
        while let Some(child) = layers.last().filter(|layer| layer.metadata().has_parent) {
            let Some(resolver) = &self.parents else { break };
            let depth = layers.len() - 1; // there is one
            let parent = self
                .open_parent(child, depth, resolver.as_ref(), &mut identities)
                .map_err(|error| child.name_error(error))?;
            if layers.len() >= CHAIN_DEPTH_MAX {
                let what = format!("the chain of parents is deeper than {CHAIN_DEPTH_MAX} images");
                return Err(Error::new(ErrorKind::Chain, what).with_code(Code::ChainDepth));
            }
            layers.push(parent);
        }
        let complete = layers.last().is_none_or(|deepest| !deepest.metadata().has_parent);
        let admission = Admission { strictness: self.strictness, replay: self.replay, broken: self.broken };
        let image = Image::new(layers, !complete, admission);
        if self.write {
            image.shared.admit()?;
        }
        Ok(image)
    }

    /// Opens the first candidate that is the right parent.
    fn open_parent(
        &self,
        child: &Layer,
        depth: usize,
        resolver: &dyn ParentResolver,
        identities: &mut Vec<StorageIdentity>,
    ) -> Result<Layer> {
        let Some(locator) = &child.metadata().parent_locator else {
            // The metadata was refused unless a differencing image has a locator.
            return Err(Error::new(ErrorKind::Corrupt, "no parent locator").with_code(Code::ParentLocatorMissing));
        };
        let wanted = ParentRequest { child: child.path(), locator, depth };
        let candidates = match resolver.resolve(&wanted) {
            Err(error) if error.kind() == ErrorKind::ParentNotFound => {
                // Nothing was named and there is no path: that is the image's fault.
                locator.check_paths(&Location::of("parent locator"), &mut FailFast::new(self.strictness))?;
                return Err(error);
            }
            other => other?,
        };
        let mut refused = Vec::new();
        for candidate in candidates {
            if candidate.storage.identity().is_some_and(|identity| identities.contains(&identity)) {
                let what = format!("the chain of parents comes back to {}", shown(&candidate));
                refused.push(Error::new(ErrorKind::Chain, what).with_code(Code::ChainCycle));
                continue;
            }
            match self.try_parent(child, locator, &candidate) {
                Ok(parent) => {
                    identities.extend(candidate.storage.identity());
                    return Ok(parent);
                }
                Err(error) => refused.push(error),
            }
        }
        // The first one is the likeliest; its fault is the one to tell.
        Err(refused.into_iter().next().unwrap_or_else(|| {
            Error::new(ErrorKind::ParentNotFound, "no parent was offered").with_code(Code::ParentNotFound)
        }))
    }

    /// Opens a candidate and checks that it is the right one (V-148, V-152, V-153).
    fn try_parent(&self, child: &Layer, locator: &ParentLocator, candidate: &ParentCandidate) -> Result<Layer> {
        let path = candidate.path.as_deref();
        let mut parent = Layer::open(&candidate.storage, path, self.strictness, self.log_growth_max)?;
        parent.lock.clone_from(&candidate.lock);
        let found = parent.headers().current.data_write_guid;
        let anonymous = locator.linkage().is_none_or(|linkage| linkage.is_nil()) && locator.linkage2().is_none();
        let accepted = locator.accepts(found) || (anonymous && candidate.named);
        if !accepted {
            return Err(mismatch(locator, candidate, &format!("{found}"), anonymous));
        }
        let (child_sector, parent_sector) =
            (child.metadata().logical_sector_size, parent.metadata().logical_sector_size);
        if child_sector != parent_sector {
            let what = format!(
                "the parent {} has logical sectors of {parent_sector} bytes; the image has {child_sector} [V-153]",
                shown(candidate)
            );
            return Err(Error::new(ErrorKind::ParentMismatch, what).with_code(Code::ParentSectorSize));
        }
        Ok(parent)
    }
}

fn mismatch(locator: &ParentLocator, candidate: &ParentCandidate, found: &str, anonymous: bool) -> Error {
    let what = if anonymous {
        format!("{} may or may not be the parent: the image's parent linkage is all zero [V-152]", shown(candidate))
    } else {
        let linkage = locator.linkage().map_or_else(|| "none".to_owned(), |guid| guid.to_string());
        let second = locator.linkage2().map_or_else(String::new, |guid| format!(" or {guid}"));
        format!(
            "{} is not the parent, or was changed since: its data write GUID is {found}, the image expects {linkage}{second} [V-152]",
            shown(candidate)
        )
    };
    let hint = if anonymous {
        "if you know that it is the parent, name it with --parent FILE"
    } else {
        "find the copy of the parent that was not changed after the child was made, and name it with --parent FILE"
    };
    Error::new(ErrorKind::ParentMismatch, what).with_code(Code::ParentMismatch).with_hint(hint)
}

fn shown(candidate: &ParentCandidate) -> String {
    let path = candidate.path.clone().unwrap_or_else(|| PathBuf::from("(memory)"));
    format!("\"{}\"", crate::text::escape(&path.to_string_lossy()))
}
