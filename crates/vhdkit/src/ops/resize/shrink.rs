//! A smaller disk.
//!
//! ```text
//! 1. one entry of the log: the size, and as many entries of blocks behind the new end as it holds
//! 2. the other entries, which mean nothing by now; their space is given back
//! ```

use super::super::edit::{Placed, change_items, refused, top};
use super::super::{Progress, advance};
use super::{ResizeOptions, ResizeReport, first_data, size_item};
use crate::error::Result;
use crate::format::bat::{BITMAP_PRESENT, BatEntry};
use crate::format::geometry::{BatSlot, Geometry};
use crate::guest::{Smallest, Survey, Table};
use crate::image::Image;
use crate::image::bat::page_of;
use crate::image::extents::LayerCursor;
use crate::image::session::Identity;
use crate::image::structure::{Edit, Transaction};
use crate::units::{BatIndex, BlockIndex, ChunkIndex};

pub(super) fn plan(
    image: &Image,
    geometry: &Geometry,
    options: &ResizeOptions,
    survey: &Survey,
    report: &mut ResizeReport,
    progress: &dyn Progress,
) -> Result<()> {
    let (old, new) = (report.old_size, geometry.disk_size());
    let smallest = survey.smallest_safe_size();
    report.smallest = Some(smallest.clone());
    let hint =
        "make partitions and file systems smaller inside the guest first, or cut all the same with --allow-data-loss";
    match smallest {
        Smallest::SafeAt { bytes, .. } if bytes <= new => {
            let backup = survey.table.backup_bytes();
            report.first_data_cut = first_data(image, new..old.saturating_sub(backup).max(new), progress)?;
            report.cut_is_unused = true;
        }
        Smallest::SafeAt { bytes, moves_backup_gpt } => {
            if !options.allow_data_loss {
                let backup = if moves_backup_gpt { " with room for the backup GPT behind it" } else { "" };
                let last = survey.last_in_use();
                let what = format!("{last} reaches to {bytes} bytes{backup}: {new} are too few");
                return Err(refused(what, hint));
            }
        }
        Smallest::Unknown { reason } if survey.end_may_matter() && !options.allow_data_loss => {
            let what = format!("a disk of {new} bytes may be too small: what may be cut off is not known, as {reason}");
            let hint = match survey.table {
                Table::Unusable { .. } => {
                    "mend the partition table in the guest first, or cut all the same with --allow-data-loss"
                }
                _ => {
                    "bring what is on the disk in order first (mount it in the guest, or have it checked there), or cut all \
                     the same with --allow-data-loss"
                }
            };
            return Err(refused(what, hint));
        }
        Smallest::Unknown { reason } => {
            report.first_data_cut = first_data(image, new..old, progress)?;
            if let Some(offset) = report.first_data_cut.filter(|_| !options.allow_data_loss) {
                let what = format!(
                    "a disk of {new} bytes would lose data: the byte at {offset:#x} is not zero, and what may be cut off \
                     is not known, as {reason}"
                );
                return Err(refused(what, hint));
            }
        }
    }
    let layer = top(image)?;
    report.blocks = layer.geometry().payload_blocks() - geometry.payload_blocks(); // it shrinks
    Ok(())
}

pub(crate) fn run(image: &Image, geometry: &Geometry, identity: Identity, progress: &dyn Progress) -> Result<()> {
    let edit = image.edit(identity)?;
    let mut cleared = Cleared::new(&edit, geometry);
    let mut transaction = Transaction::default();
    let mut regions = edit.layer().region_table().regions.clone();
    let placed = change_items(&edit, &mut regions, &[size_item(geometry.disk_size())], &mut transaction)?;
    if placed == Placed::NewRegion {
        edit.add_region_tables(&mut transaction, &regions)?;
    }
    cleared.add(&edit, &mut transaction)?;
    edit.apply(transaction)?;
    edit.commit()?;
    image.allow_cut(geometry.payload_blocks())?;
    // The disk is small by now. What is left is space to give back.
    while !cleared.is_done() {
        advance(progress, cleared.next, Some(cleared.end))?;
        let mut transaction = Transaction::default();
        cleared.add(&edit, &mut transaction)?;
        edit.apply(transaction)?;
        edit.commit()?;
    }
    advance(progress, cleared.end, Some(cleared.end))
}

/// Entries behind the new end, which become zero.
struct Cleared<'a> {
    cursor: LayerCursor<'a>,
    geometry: Geometry,
    next: u64,
    end: u64,
}

impl<'a> Cleared<'a> {
    fn new(edit: &'a Edit<'_>, geometry: &Geometry) -> Self {
        let old = edit.layer().geometry();
        Self {
            cursor: LayerCursor::new(edit.layer()),
            geometry: *geometry,
            next: geometry.payload_index(BlockIndex(geometry.payload_blocks() - 1)).0 + 1, // a disk has a block
            end: old.bat_entries(),
        }
    }

    fn is_done(&self) -> bool {
        self.next >= self.end
    }

    /// Adds as many entries as one entry of the log holds.
    fn add(&mut self, edit: &Edit<'_>, transaction: &mut Transaction) -> Result<()> {
        let layer = edit.layer();
        let mut pages = transaction.pages.len();
        let mut last_page = None;
        while self.next < self.end {
            let index = BatIndex(self.next);
            let entry = self.cursor.entry(index)?;
            let slot = layer.geometry().slot(index);
            if entry.0 != 0 && !self.stays(slot) {
                if last_page != Some(page_of(index)) {
                    if pages == edit.capacity() {
                        return Ok(());
                    }
                    pages += 1;
                    last_page = Some(page_of(index));
                }
                transaction.entries.push((index, BatEntry(0)));
                transaction.frees.extend(self.owned(edit, slot, entry));
            }
            self.next +=
                if entry.0 == 0 { self.cursor.count_equal(index, self.end - self.next, entry)?.max(1) } else { 1 };
        }
        Ok(())
    }

    /// The bitmap of the last chunk that is left.
    fn stays(&self, slot: BatSlot) -> bool {
        match slot {
            BatSlot::Bitmap(chunk) => chunk.0 < self.geometry.chunks() && self.geometry.is_differencing(),
            BatSlot::Payload(_) => false,
        }
    }

    /// The space of an entry, unless it is one that meant nothing before.
    fn owned(&self, edit: &Edit<'_>, slot: BatSlot, entry: BatEntry) -> Option<std::ops::Range<u64>> {
        let layer = edit.layer();
        match slot {
            BatSlot::Payload(block) if block.0 >= layer.geometry().payload_blocks() => None,
            BatSlot::Bitmap(ChunkIndex(_)) if entry.state_number() != BITMAP_PRESENT => None,
            _ => layer.rules().owned_range(slot, entry),
        }
    }
}
