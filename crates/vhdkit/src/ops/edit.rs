//! What operations on the structure of an image share.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::items::{ItemChange, rebuild, rewrite};
use crate::format::metadata::{REGION_BYTES_MAX, TABLE_BYTES, region_bytes};
use crate::format::region::{METADATA_GUID, Region};
use crate::image::structure::{Edit, Transaction};
use crate::image::{Image, Layer, OpenOptions, ParentCandidate, ParentRequest, ParentResolver};

/// The image itself, without its parents.
pub(crate) fn top(image: &Image) -> Result<&Layer> {
    image.layers().first().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "the image has no layers"))
}

/// An operation that would lose something, or break somebody.
pub(crate) fn refused(what: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::new(ErrorKind::Refused, what).with_hint(hint)
}

/// Closes an image whatever became of the work on it. The first error is the one to tell.
pub(crate) fn finish<T>(image: &Image, worked: Result<T>) -> Result<T> {
    let closed = image.close();
    let value = worked?;
    closed.map(|()| value)
}

/// Gives the layers of a chain that is open as parents.
#[derive(Debug)]
pub(crate) struct OpenLayers(Vec<ParentCandidate>);

impl OpenLayers {
    pub(crate) fn new(parents: &[Layer]) -> Self {
        let candidates = parents.iter().map(|parent| ParentCandidate {
            storage: Arc::clone(parent.storage()),
            path: parent.path().map(ToOwned::to_owned),
            named: true,
            lock: None,
        });
        Self(candidates.collect())
    }
}

impl ParentResolver for OpenLayers {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let found = self.0.get(wanted.depth).cloned();
        found.map(|found| vec![found]).ok_or_else(|| Error::new(ErrorKind::ParentNotFound, "the chain ends there"))
    }
}

/// Opens an image anew for writing, on the same files, after its structure has changed.
pub(crate) fn reopen(image: &Image) -> Result<Image> {
    let [layer, parents @ ..] = image.layers() else {
        return Err(Error::new(ErrorKind::InvalidArgument, "the image has no layers"));
    };
    let options = OpenOptions::new().write(true);
    let options = match image.parents_missing() {
        true => options.without_parents(),
        false => options.parents(Arc::new(OpenLayers::new(parents))),
    };
    options.open(Arc::clone(layer.storage()), layer.path())
}

/// Whether items change where they are, or a region moves for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    InRegion,
    NewRegion,
}

/// Adds changes of metadata items to a transaction. What they need beforehand is written, where nothing points to. A region
/// that is too small is replaced in `regions`; the caller adds the region tables then.
pub(crate) fn change_items(
    edit: &Edit<'_>,
    regions: &mut [Region],
    changes: &[ItemChange],
    transaction: &mut Transaction,
) -> Result<Placed> {
    let region = edit.layer().region_table().metadata;
    let mut read = |range: std::ops::Range<u64>| {
        edit.layer().view().read_vec(region.file_offset + range.start..region.file_offset + range.end)
    };
    let Some(rewrite) = rewrite(region.length, changes, &mut read)? else {
        let bytes = rebuild(changes, &mut read)?;
        place_metadata(edit, regions, &bytes, None, transaction)?;
        return Ok(Placed::NewRegion);
    };
    for (offset, bytes) in &rewrite.fresh {
        edit.write(bytes, region.file_offset + offset)?;
    }
    for (offset, bytes) in rewrite.pages {
        let page = bytes.try_into().map_err(|_| Error::new(ErrorKind::InvalidArgument, "a page is not whole"))?;
        transaction.add_page(region.file_offset + offset, page);
    }
    Ok(Placed::InRegion)
}

/// The bytes of the metadata region as they would be in a new place, without gaps.
pub(crate) fn rebuilt_metadata(edit: &Edit<'_>) -> Result<Vec<u8>> {
    let region = edit.layer().region_table().metadata;
    let mut read = |range: std::ops::Range<u64>| {
        edit.layer().view().read_vec(region.file_offset + range.start..region.file_offset + range.end)
    };
    rebuild(&[], &mut read)
}

/// Writes a metadata region to a new place; with `before`, only to one that ends there. False when there is none.
pub(crate) fn place_metadata(
    edit: &Edit<'_>,
    regions: &mut [Region],
    bytes: &[u8],
    before: Option<u64>,
    transaction: &mut Transaction,
) -> Result<bool> {
    let length = region_bytes((bytes.len() as u64).max(TABLE_BYTES as u64));
    if length > REGION_BYTES_MAX {
        return Err(Error::new(ErrorKind::Limit, "the metadata would take more than 128 MiB"));
    }
    let given = match before {
        Some(end) => match edit.take_below(length, end) {
            Some(given) => given,
            None => return Ok(false),
        },
        None => edit.take(length)?,
    };
    edit.write(bytes, given.range.start)?;
    if given.holds == crate::image::space::Holds::Stale {
        edit.zero(given.range.start + bytes.len() as u64..given.range.end)?;
    }
    let old = edit.layer().region_table().metadata;
    set_region(regions, METADATA_GUID, given.range.start, length);
    transaction.frees.push(old.file_offset..old.file_offset + old.length); // inside the file
    Ok(true)
}

/// Says where a region is now.
pub(crate) fn set_region(regions: &mut [Region], guid: crate::format::guid::Guid, file_offset: u64, length: u64) {
    if let Some(region) = regions.iter_mut().find(|region| region.guid == guid) {
        region.file_offset = file_offset;
        region.length = length;
    }
}
