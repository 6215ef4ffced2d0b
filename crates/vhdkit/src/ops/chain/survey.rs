//! Opening what there is: every image once, and the files that could be its parent.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{Content, Listed, load, look_into};
use super::{IMAGES_MAX, Node, too_many};
use crate::error::{Error, Result};
use crate::format::locator::{KEY_ABSOLUTE_PATH, KEY_RELATIVE_PATH, KEY_VOLUME_PATH};
use crate::image::{Layer, ParentRequest, ParentResolver};
use crate::ops::{Progress, advance};
use crate::storage::lock::is_locked_elsewhere;
use crate::storage::{Storage, StorageIdentity};
use crate::text::escape;

/// Characters of a path that are kept to be shown; a locator may hold 32,767.
const SHOWN_MAX: usize = 1024;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// An image, by its place.
    Image(usize),
    /// Not to be opened, by its place among what is damaged.
    Damaged(usize),
    /// No image.
    Other,
}

/// A file that could be a parent.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) identity: StorageIdentity,
    pub(super) path: PathBuf,
}

/// An image, and where its parent could be.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) node: Node,
    pub(super) identity: StorageIdentity,
    pub(super) has_parent: bool,
    /// What the relative path alone leads to is where the first candidate lies.
    pub(super) relative_path: Option<String>,
    pub(super) candidates: Vec<Candidate>,
    /// Why there are no candidates.
    pub(super) refused: Option<Error>,
}

/// Everything that was found.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    parents: Option<&'a dyn ParentResolver>,
    pub(super) found: Vec<Found>,
    pub(super) known: HashMap<StorageIdentity, Entry>,
    pub(super) damaged: Vec<Error>,
    pub(super) skipped: Vec<Error>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(parents: Option<&'a dyn ParentResolver>) -> Self {
        Self { parents, found: Vec::new(), known: HashMap::new(), damaged: Vec::new(), skipped: Vec::new() }
    }

    /// Whether anybody says where parents are.
    pub(super) fn follows_paths(&self) -> bool {
        self.parents.is_some()
    }

    /// Looks into files, and into those that their parents could be. The one that is wanted must be an image.
    pub(super) fn look_into_all(
        &mut self,
        files: Vec<Listed>,
        wanted: Option<StorageIdentity>,
        progress: &dyn Progress,
    ) -> Result<()> {
        // What is listed is opened by its listed name, not as somebody's parent.
        let listed: HashSet<StorageIdentity> = files.iter().map(|file| file.identity).collect();
        for file in files {
            advance(progress, 0, None)?;
            if let Some(entry) = self.known.get(&file.identity) {
                if let Entry::Image(index) = *entry
                    && let Some(found) = self.found.get_mut(index)
                    && found.node.path != file.path
                {
                    found.node.other_names.push(file.path);
                }
                continue;
            }
            let content = look_into(&file.path);
            if wanted == Some(file.identity) {
                match content {
                    Content::Damaged(error) | Content::Other(error) => return Err(error.with_path(&file.path)),
                    Content::Unrelated => return Err(not_an_image(&file.path)),
                    Content::Image { .. } => {}
                }
            }
            let mut waiting = Vec::new();
            self.take(content, &file.path, file.identity, &listed, &mut waiting)?;
            while let Some((storage, path, identity)) = waiting.pop() {
                advance(progress, 0, None)?;
                let in_use = storage.as_file().is_some_and(is_locked_elsewhere);
                let content = load(&storage, &path, in_use);
                drop(storage);
                self.take(content, &path, identity, &listed, &mut waiting)?;
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        content: Content,
        path: &Path,
        identity: StorageIdentity,
        listed: &HashSet<StorageIdentity>,
        waiting: &mut Vec<(Arc<dyn Storage>, PathBuf, StorageIdentity)>,
    ) -> Result<()> {
        let entry = match content {
            Content::Image { layer, in_use } => {
                if self.found.len() >= IMAGES_MAX {
                    return Err(too_many());
                }
                self.known.insert(identity, Entry::Image(self.found.len()));
                let found = self.find_candidates(&layer, path, identity, in_use, listed, waiting);
                self.found.push(found);
                return Ok(());
            }
            Content::Damaged(error) => {
                self.damaged.push(error.with_path(path));
                Entry::Damaged(self.damaged.len().saturating_sub(1))
            }
            Content::Other(error) => {
                self.skipped.push(error.with_path(path));
                Entry::Other
            }
            Content::Unrelated => Entry::Other,
        };
        self.known.insert(identity, entry);
        Ok(())
    }

    fn find_candidates(
        &mut self,
        layer: &Layer,
        path: &Path,
        identity: StorageIdentity,
        in_use: bool,
        listed: &HashSet<StorageIdentity>,
        waiting: &mut Vec<(Arc<dyn Storage>, PathBuf, StorageIdentity)>,
    ) -> Found {
        let has_parent = layer.metadata().has_parent;
        let locator = layer.metadata().parent_locator.as_ref().filter(|_| has_parent);
        let relative_path = locator.and_then(|locator| locator.get(KEY_RELATIVE_PATH)).map(cut);
        let node = node(layer, path, in_use);
        let mut found = Found { node, identity, has_parent, relative_path, candidates: Vec::new(), refused: None };
        let (Some(locator), Some(resolver)) = (locator, self.parents) else { return found };
        match resolver.resolve(&ParentRequest { child: Some(path), locator, depth: 0 }) {
            Ok(candidates) => {
                for candidate in candidates {
                    let (Some(identity), Some(path)) = (candidate.storage.identity(), candidate.path) else { continue };
                    if !listed.contains(&identity) && !self.known.contains_key(&identity) {
                        // Until it is looked into; so it is not asked for twice.
                        self.known.insert(identity, Entry::Other);
                        waiting.push((candidate.storage, path.clone(), identity));
                    }
                    found.candidates.push(Candidate { identity, path });
                }
            }
            Err(error) => found.refused = Some(error),
        }
        found
    }
}

fn not_an_image(path: &Path) -> Error {
    let what = "the file does not begin with \"vhdxfile\", so it is not a VHDX";
    Error::new(crate::ErrorKind::NotVhdx, what).with_path(path)
}

fn cut(text: &str) -> String {
    text.chars().take(SHOWN_MAX).collect()
}

fn node(layer: &Layer, path: &Path, in_use: bool) -> Node {
    let metadata = layer.metadata();
    let locator = metadata.parent_locator.as_ref().filter(|_| metadata.has_parent);
    let shown = |key: &str| {
        let text = locator.and_then(|locator| locator.get(key))?;
        Some((key.to_owned(), escape(&cut(text)).into_owned()))
    };
    Node {
        path: path.to_owned(),
        other_names: Vec::new(),
        parent: None,
        depth: 0,
        disk_type: metadata.disk_type(),
        disk_size: metadata.disk_size,
        file_size: layer.file_size(),
        disk_usage: layer.disk_usage(),
        logical_sector_size: metadata.logical_sector_size,
        is_dirty: layer.replay().is_some(),
        in_use,
        data_write_guid: layer.headers().current.data_write_guid,
        disk_id: metadata.disk_id,
        linkage: locator.and_then(crate::format::locator::ParentLocator::linkage),
        linkage2: locator.and_then(crate::format::locator::ParentLocator::linkage2),
        parent_paths: [KEY_RELATIVE_PATH, KEY_VOLUME_PATH, KEY_ABSOLUTE_PATH].into_iter().filter_map(shown).collect(),
        link: None,
        troubles: Vec::new(),
    }
}
