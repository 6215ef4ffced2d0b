//! Merging a child into one of its parents, so that a crash at any moment leaves a chain that opens.
//!
//! ```text
//! 1. G is drawn; the ancestor's own child records it as a second identity of its parent (parent_linkage2), durably
//! 2. the ancestor's data write GUID becomes G: at every instant one of the two that the child accepts matches
//! 3. what the layers above hold is copied into the ancestor; read through them, the disk never changes
//! 4. the ancestor holds the child's disk by now, and gets the child's data write GUID C in the same way, as that stands for
//!    these contents: what stood on the child may stand on the ancestor
//! 5. the ancestor's child records C alone
//! ```

use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::Arc;

use super::edit::{OpenLayers, Placed, change_items, finish, refused, top};
use super::reparent::{with_second_identity, write_locator};
use super::resize::{new_geometry, run as resize_image};
use super::{Progress, advance};
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::items::ItemChange;
use crate::format::metadata::{FLAG_VIRTUAL_DISK, PHYSICAL_SECTOR_SIZE, VIRTUAL_DISK_ID};
use crate::image::session::Identity;
use crate::image::structure::Transaction;
use crate::image::{BlockDevice as _, Extent, ExtentKind, Image, Layer, OpenOptions, VisitExtent};
use crate::ops::set::user_item;

/// Bytes copied at once.
const COPY_BYTES: u64 = 1 << 20;
/// Extents looked at before they are copied.
const EXTENTS_MAX: usize = 4096;
/// What was copied is made durable after so many bytes.
const FLUSH_BYTES: u64 = 256 << 20;

/// What [`merge`] is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MergeOptions {
    /// Into which layer of the chain: 1 is the parent, 2 its parent, and so on.
    pub into: usize,
    /// Other images that depend on a layer that changes, or that lies between. That is refused.
    pub dependents: Vec<String>,
    /// Put a dirty log of a file that is written into place first.
    pub replay: bool,
    /// Only find out what would be copied.
    pub dry_run: bool,
}

/// What [`merge`] did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MergeReport {
    /// The files of the layers that were merged, from the child on.
    pub merged: Vec<Option<PathBuf>>,
    /// The file that they were merged into.
    pub into: Option<PathBuf>,
    /// Bytes that the merged layers hold.
    pub data_bytes: u64,
    /// Bytes that they say are zero.
    pub zero_bytes: u64,
    /// Bytes of the ancestor's disk before and of the child's disk.
    pub sizes: [u64; 2],
    /// Bytes of the ancestor's file before.
    pub old_file_size: u64,
    /// Bytes of the ancestor's file afterwards; for a dry run what it may grow to.
    pub new_file_size: u64,
    /// The ancestor's data write GUID afterwards, which is the child's; `None` for a dry run.
    pub data_write_guid: Option<Guid>,
}

/// Merges the first layers of a chain into the one below them ([MS-VHDX] 2.6.2.6, `parent_linkage2`). `chain` was opened for
/// reading with all its parents; the files that have to be written are changed to writing meanwhile.
///
/// Read through the chain, the disk is the same at every instant, also after a crash: then the merge is done again, from the
/// start. Afterwards the ancestor alone holds the disk, with the child's size and identities, so that the child's own children accept
/// it as their parent ([`reparent`](super::reparent::reparent) tells them where it is). The merged layers stay as they
/// are and still show the same disk; they can be deleted. Copied is only what they hold.
///
/// # Errors
/// [`Refused`](ErrorKind::Refused) when other images would break; [`InvalidArgument`](ErrorKind::InvalidArgument) when
/// there is no such layer; [`NeedsReplay`](ErrorKind::NeedsReplay) for a dirty file. Nothing has changed then. Otherwise as in writing,
/// and [`Cancelled`](ErrorKind::Cancelled): the chain shows the disk, the ancestor by itself is a mixture.
pub fn merge(chain: Image, options: &MergeOptions, progress: &dyn Progress) -> Result<MergeReport> {
    let merge = Merge::new(&chain, options)?;
    let mut report = merge.plan()?;
    if options.dry_run {
        return Ok(report);
    }
    merge.ask_for_access()?;
    let guid = Guid::random();
    merge.announce(merge.ancestor.headers().current.data_write_guid, guid)?;
    merge.write_ancestor(guid, report.data_bytes + report.zero_bytes, progress)?;
    let last = match merge.child.headers().current.data_write_guid {
        nil if nil.is_nil() => guid,
        of_child => {
            merge.announce(guid, of_child)?;
            merge.rename_ancestor(of_child)?;
            of_child
        }
    };
    merge.settle(last)?;
    report.data_write_guid = Some(last);
    let length = merge.ancestor.storage().len();
    report.new_file_size = length.map_err(|error| Error::io("cannot tell the length of the file", error))?;
    Ok(report)
}

struct Merge<'a> {
    chain: &'a Image,
    options: &'a MergeOptions,
    child: &'a Layer,
    /// The ancestor's own child.
    above: &'a Layer,
    ancestor: &'a Layer,
}

impl<'a> Merge<'a> {
    fn new(chain: &'a Image, options: &'a MergeOptions) -> Result<Self> {
        let layers = chain.layers();
        let invalid = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
        let [child, parents @ ..] = layers else { return invalid("the chain is empty".to_owned()) };
        if chain.parents_missing() {
            return Err(Error::new(ErrorKind::ParentMissing, "a merge needs all parents, and one is not open")
                .with_hint("`vhdkit chain` finds out where it is"));
        }
        if parents.is_empty() {
            return invalid("the image is not differencing: there is nothing to merge it into".to_owned());
        }
        let (Some(ancestor), Some(above)) = (layers.get(options.into), layers.get(options.into.wrapping_sub(1))) else {
            return invalid(format!("the chain has {} parents, and no parent {}", parents.len(), options.into));
        };
        if !options.dependents.is_empty() {
            let what = format!("the merge would break {}", options.dependents.join(", "));
            return Err(refused(
                what,
                "they depend on a file that changes or goes; merge or flatten (`vhdkit convert`) them first. Children of the merged \
                 image itself go on without --delete, and accept the ancestor then (`vhdkit reparent CHILD ANCESTOR`)",
            ));
        }
        for layer in [above, ancestor] {
            if layer.headers().current.is_dirty() && !options.replay {
                let name = layer.name();
                let what = format!("{name} was not closed: its log holds changes that are not in place yet");
                return Err(Error::new(ErrorKind::NeedsReplay, what)
                    .with_hint("make sure that nobody uses it, then allow its log to be replayed with --replay"));
            }
        }
        Ok(Self { chain, options, child, above, ancestor })
    }

    fn plan(&self) -> Result<MergeReport> {
        let merged = self.chain.layers().get(..self.options.into).unwrap_or_default();
        let length = self.ancestor.storage().len();
        let length = length.map_err(|error| Error::io("cannot tell the length of the file", error))?;
        let mut report = MergeReport {
            merged: merged.iter().map(|layer| layer.path().map(ToOwned::to_owned)).collect(),
            into: self.ancestor.path().map(ToOwned::to_owned),
            sizes: [self.ancestor.geometry().disk_size(), self.child.geometry().disk_size()],
            old_file_size: length,
            ..MergeReport::default()
        };
        let block = self.ancestor.geometry().block_size();
        let (mut new_blocks, mut counted) = (0, 0);
        self.visit(0..self.size(), &mut |extent| {
            match extent.kind {
                ExtentKind::Data { .. } => {
                    report.data_bytes += extent.length;
                    // What begins or ends inside a block may need all of it.
                    let start = extent.start / block * block;
                    new_blocks += extent.end().next_multiple_of(block).saturating_sub(start.max(counted));
                    counted = extent.end().next_multiple_of(block);
                }
                ExtentKind::Zero => report.zero_bytes += extent.length,
                ExtentKind::Hole => {}
            }
            ControlFlow::Continue(())
        })?;
        report.new_file_size = length + new_blocks; // at most 2^46 and a file
        Ok(report)
    }

    fn size(&self) -> u64 {
        self.child.geometry().disk_size()
    }

    /// Visits what the layers that are merged say: a hole is what they leave to the ancestor. Behind the end of a layer in
    /// between nothing shows of what lies below it.
    fn visit(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        let between = self.chain.layers().get(1..self.options.into).unwrap_or_default();
        let reach = between.iter().map(|layer| layer.geometry().disk_size()).min().unwrap_or(u64::MAX);
        self.chain.visit_upper_extents(self.options.into, range, &mut |extent| {
            if extent.kind != ExtentKind::Hole || extent.end() <= reach {
                return visit(extent);
            }
            let cut = extent.start.max(reach);
            let zero = Extent { start: cut, length: extent.end() - cut, kind: ExtentKind::Zero, ..*extent };
            if cut > extent.start && visit(&Extent { length: cut - extent.start, ..*extent }).is_break() {
                return ControlFlow::Break(());
            }
            visit(&zero)
        })
    }

    /// Finds out, before the first write, that both files that change can be written.
    fn ask_for_access(&self) -> Result<()> {
        for layer in [self.ancestor, self.above] {
            layer.storage().set_access(true).map_err(|error| layer.name_error(error))?;
            layer.storage().set_access(false)?;
        }
        Ok(())
    }

    /// Opens a layer for writing, on the file that the chain has open.
    fn open(&self, depth: usize, with_parents: bool) -> Result<Image> {
        let layers = self.chain.layers();
        let Some((layer, parents)) = layers.get(depth..).and_then(<[Layer]>::split_first) else {
            return Err(Error::new(ErrorKind::InvalidArgument, format!("the chain has no layer {depth}")));
        };
        layer.storage().set_access(true).map_err(|error| layer.name_error(error))?;
        let options = OpenOptions::new().write(true).replay(self.options.replay);
        let options =
            if with_parents { options.parents(Arc::new(OpenLayers::new(parents))) } else { options.without_parents() };
        options.open(Arc::clone(layer.storage()), layer.path())
    }

    /// The file is for reading again.
    fn release(layer: &Layer) -> Result<()> {
        // What its log held is in place, and the log holds something else.
        let length = layer.storage().len();
        layer.view().set_size(length.map_err(|error| Error::io("cannot tell the length of the file", error))?);
        layer.view().drop_overlay();
        layer.storage().set_access(false)
    }

    /// The ancestor's child accepts the identity that the ancestor has now, and the one that it will have.
    fn announce(&self, now: Guid, guid: Guid) -> Result<()> {
        let image = self.open(self.options.into - 1, false)?;
        let worked = (|| {
            let edit = image.edit(Identity::Kept)?;
            let locator = with_second_identity(self.above, now, guid).ok_or_else(no_locator)?;
            write_locator(&edit, &locator)
        })();
        finish(&image, worked)?;
        drop(image);
        Self::release(self.above)
    }

    /// The ancestor's child accepts the ancestor's new identity, and no other.
    fn settle(&self, guid: Guid) -> Result<()> {
        let image = self.open(self.options.into - 1, false)?;
        let worked = (|| {
            let edit = image.edit(Identity::Kept)?;
            let old = self.above.metadata().parent_locator.as_ref().ok_or_else(no_locator)?;
            write_locator(&edit, &old.with_linkage(guid))
        })();
        finish(&image, worked)?;
        drop(image);
        Self::release(self.above)
    }

    /// The ancestor gets another identity, and nothing else changes.
    fn rename_ancestor(&self, guid: Guid) -> Result<()> {
        let image = self.open(self.options.into, true)?;
        finish(&image, image.edit(Identity::Given(guid)).map(drop))?;
        drop(image);
        Self::release(self.ancestor)
    }

    fn write_ancestor(&self, guid: Guid, total: u64, progress: &dyn Progress) -> Result<()> {
        let identity = Identity::Given(guid);
        if self.size() > self.ancestor.geometry().disk_size() {
            let image = self.open(self.options.into, true)?;
            let geometry = new_geometry(self.ancestor, self.size())?;
            finish(&image, resize_image(&image, &geometry, identity, &()))?;
        }
        let image = self.open(self.options.into, true)?;
        let worked = self.copy(&image, identity, total, progress).and_then(|()| self.take_identity(&image, identity));
        finish(&image, worked)?;
        drop(image);
        if self.size() < self.ancestor.geometry().disk_size() {
            let image = self.open(self.options.into, true)?;
            let geometry = new_geometry(self.ancestor, self.size())?;
            finish(&image, resize_image(&image, &geometry, identity, &()))?;
        }
        Self::release(self.ancestor)
    }

    fn copy(&self, image: &Image, identity: Identity, total: u64, progress: &dyn Progress) -> Result<()> {
        drop(image.edit(identity)?);
        let (mut position, mut done, mut flushed) = (0, 0, 0);
        let mut buffer = vec![0; usize::try_from(COPY_BYTES).unwrap_or(0)];
        let mut extents: Vec<Extent> = Vec::new();
        while position < self.size() {
            extents.clear();
            let mut end = self.size();
            self.visit(position..self.size(), &mut |extent| {
                if extent.kind != ExtentKind::Hole {
                    extents.push(*extent);
                }
                if extents.len() >= EXTENTS_MAX {
                    end = extent.end();
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })?;
            position = end;
            for extent in &extents {
                if extent.kind == ExtentKind::Zero {
                    image.write_zeroes(extent.start..extent.end(), true)?;
                    done += extent.length;
                } else {
                    done += self.copy_data(image, extent.start..extent.end(), &mut buffer)?;
                }
                if done - flushed >= FLUSH_BYTES {
                    image.flush()?;
                    flushed = done;
                }
                advance(progress, done, Some(total))?;
            }
        }
        image.flush()
    }

    /// Copies a range in which the layers above have all data.
    fn copy_data(&self, image: &Image, range: Range<u64>, buffer: &mut [u8]) -> Result<u64> {
        let mut position = range.start;
        while position < range.end {
            // Pieces end at multiples of the copy size, so that whole blocks are written as such.
            let length = (COPY_BYTES - position % COPY_BYTES).min(range.end - position);
            let part = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
            self.chain.read_at(part, position)?;
            image.write_at(part, position)?;
            position += length;
        }
        Ok(range.end - range.start)
    }

    /// The ancestor's disk becomes the child's in what the guest sees besides its bytes.
    fn take_identity(&self, image: &Image, identity: Identity) -> Result<()> {
        // Items may lie elsewhere since the child's locator was changed.
        let child = OpenOptions::new().without_parents();
        let child = child.open(Arc::clone(self.child.storage()), self.child.path())?;
        let child = top(&child)?;
        let (from, to) = (child.metadata(), self.ancestor.metadata());
        let mut changes = Vec::new();
        let flags = crate::format::metadata::FLAG_REQUIRED | FLAG_VIRTUAL_DISK;
        if from.disk_id != to.disk_id {
            let value = Some((flags, from.disk_id.stored().to_vec()));
            changes.push(ItemChange { id: VIRTUAL_DISK_ID, is_user: false, value });
        }
        if from.physical_sector_size != to.physical_sector_size {
            let value = Some((flags, from.physical_sector_size.to_le_bytes().to_vec()));
            changes.push(ItemChange { id: PHYSICAL_SECTOR_SIZE, is_user: false, value });
        }
        for item in from.items.iter().filter(|item| item.is_user() && item.flags & FLAG_VIRTUAL_DISK != 0) {
            let bytes = user_item(child, item.id)?.unwrap_or_default();
            if user_item(self.ancestor, item.id)?.as_ref() != Some(&bytes) {
                changes.push(ItemChange { id: item.id, is_user: true, value: Some((item.flags, bytes)) });
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        let edit = image.edit(identity)?;
        let mut transaction = Transaction::default();
        let mut regions = edit.layer().region_table().regions.clone();
        if change_items(&edit, &mut regions, &changes, &mut transaction)? == Placed::NewRegion {
            edit.add_region_tables(&mut transaction, &regions)?;
        }
        edit.apply(transaction)?;
        edit.commit()
    }
}

fn no_locator() -> Error {
    Error::new(ErrorKind::InvalidArgument, "the layer has no parent locator")
}
