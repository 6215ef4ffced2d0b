//! The chain of an image, link by link, whether or not all of it can be opened.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use vhdkit::format::guid::Guid;
use vhdkit::format::locator::ParentLocator;
use vhdkit::image::{FileResolver, Image, Layer, OpenOptions, ParentCandidate, ParentRequest, ParentResolver};
use vhdkit::text::escape;
use vhdkit::{Error, Result};

use crate::cli::Context;
use crate::failure::Failure;
use crate::opening::{about_parents, check_parent_options, open_options, resolver, sharing};
use crate::show;

/// Remembers whose parents were asked for: the files that could be opened.
#[derive(Debug)]
struct Recorder {
    inner: FileResolver,
    children: Mutex<Vec<PathBuf>>,
}

impl ParentResolver for Recorder {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.extend(wanted.child.map(Path::to_owned));
        self.inner.resolve(wanted)
    }
}

/// An image with what is known of its chain.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The image with all its parents, or alone when they cannot all be opened.
    pub(crate) image: Image,
    /// The link of each image to its parent, the image's own first.
    pub(crate) links: Vec<Link>,
}

/// One link of a chain: what a child says about its parent, and whether that is so.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) child: String,
    pub(crate) linkage: Option<Guid>,
    /// What the child says where its parent is, safe to print.
    pub(crate) paths: Vec<(String, String)>,
    pub(crate) verdict: Verdict,
}

/// Whether a parent is the right one.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Found, and the right one.
    Right { path: String, disk_size: u64, file_size: u64, data_write_guid: Guid, by: &'static str },
    /// Not to be opened, at the user's wish.
    NotOpened,
    /// Not usable.
    Wrong(Error),
}

/// Opens an image with its chain as far as possible. Only the image itself must be right.
pub(crate) fn open(context: &Context, path: &Path) -> Result<Chain, Failure> {
    let global = &context.global;
    check_parent_options(global)?;
    let named = || global.parent.iter().map(PathBuf::as_path);
    if global.no_parents {
        let image = open_options(global, named())?.open_path(path)?;
        let links = links_of(image.layers(), Some(Verdict::NotOpened));
        return Ok(Chain { image, links });
    }
    let recorder = Arc::new(Recorder { inner: resolver(global, named())?, children: Mutex::new(Vec::new()) });
    let options = OpenOptions::new().sharing(sharing(global));
    match options.clone().parents(Arc::<Recorder>::clone(&recorder)).open_path(path) {
        Ok(image) => {
            let links = links_of(image.layers(), None);
            Ok(Chain { image, links })
        }
        Err(error) => {
            // The image itself may be the culprit; then this fails in the same way.
            let alone = options.without_parents();
            let image = alone.open_path(path)?;
            let children = recorder.children.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if children.is_empty() {
                return Err(error.into());
            }
            let ancestors = children.iter().skip(1).map(|child| alone.open_path(child));
            let ancestors: Vec<Image> = ancestors.collect::<Result<_>>()?;
            let layers = image.layers().iter().chain(ancestors.iter().flat_map(Image::layers));
            let links = links_of(layers, Some(Verdict::Wrong(about_parents(global, error))));
            Ok(Chain { image, links })
        }
    }
}

/// The links between neighbouring layers, and the one from the last layer on, whose verdict is given.
fn links_of<'a>(layers: impl IntoIterator<Item = &'a Layer>, last: Option<Verdict>) -> Vec<Link> {
    let mut links: Vec<Link> = Vec::new();
    let mut child: Option<&Layer> = None;
    for layer in layers {
        if let Some((child, locator)) =
            child.and_then(|child| child.metadata().parent_locator.as_ref().map(|l| (child, l)))
        {
            links.push(link(child, Some(locator), right(locator, layer)));
        }
        child = Some(layer);
    }
    if let (Some(child), Some(verdict)) = (child, last)
        && child.metadata().has_parent
    {
        links.push(link(child, child.metadata().parent_locator.as_ref(), verdict));
    }
    links
}

fn right(locator: &ParentLocator, parent: &Layer) -> Verdict {
    let found = parent.headers().current.data_write_guid;
    let by = if locator.linkage() == Some(found) && !found.is_nil() {
        "parent_linkage"
    } else if locator.linkage2() == Some(found) {
        "parent_linkage2"
    } else {
        "named by the user"
    };
    Verdict::Right {
        path: path_of(parent),
        disk_size: parent.metadata().disk_size,
        file_size: parent.file_size(),
        data_write_guid: found,
        by,
    }
}

fn link(child: &Layer, locator: Option<&ParentLocator>, verdict: Verdict) -> Link {
    let pairs = locator.map(ParentLocator::pairs).unwrap_or_default();
    let paths = pairs.iter().filter(|(key, _)| !key.starts_with("parent_linkage"));
    Link {
        child: path_of(child),
        linkage: locator.and_then(ParentLocator::linkage),
        paths: paths.map(|(key, value)| (escape(key).into_owned(), escape(value).into_owned())).collect(),
        verdict,
    }
}

fn path_of(layer: &Layer) -> String {
    layer.path().map_or_else(|| "(memory)".to_owned(), show::path)
}

impl Link {
    /// One word for scripts, or two.
    pub(crate) fn verdict_name(&self) -> &'static str {
        match &self.verdict {
            Verdict::Right { .. } => "ok",
            Verdict::NotOpened => "not-opened",
            Verdict::Wrong(error) => error.kind().as_str(),
        }
    }

    /// What stands in the way, safe to print.
    pub(crate) fn message(&self) -> Option<String> {
        let Verdict::Wrong(error) = &self.verdict else { return None };
        let mut message = escape(error.message()).into_owned();
        if let Some(source) = std::error::Error::source(error) {
            message = format!("{message}: {source}");
        }
        match error.path().map(show::path).filter(|path| *path != self.child) {
            Some(path) => Some(format!("{path}: {message}")),
            None => Some(message),
        }
    }

    /// What to do about that, safe to print.
    pub(crate) fn hint(&self) -> Option<String> {
        let Verdict::Wrong(error) = &self.verdict else { return None };
        Some(escape(&crate::failure::hint(error)).into_owned())
    }

    pub(crate) fn to_json(&self) -> Value {
        let paths: serde_json::Map<String, Value> =
            self.paths.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        let mut object = json!({
            "child": self.child,
            "verdict": self.verdict_name(),
            "linkage": self.linkage.map(|guid| guid.to_string()),
            "paths": paths,
        });
        let more = match &self.verdict {
            Verdict::Right { path, disk_size, file_size, data_write_guid, by } => json!({
                "parent": path,
                "identified_by": by,
                "disk_size": disk_size,
                "file_size": file_size,
                "data_write_guid": data_write_guid.to_string(),
            }),
            Verdict::NotOpened => json!({}),
            Verdict::Wrong(_) => json!({ "message": self.message(), "hint": self.hint() }),
        };
        if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
            object.extend(more);
        }
        object
    }
}
