//! Making a file smaller in place: drop what nobody needs, move blocks from the end into the holes, cut.

mod blocks;
mod moving;

use std::ops::ControlFlow;

use super::edit::{finish, refused, reopen, top};
use super::{Progress, advance};
use crate::error::Result;
use crate::format::bat::PayloadState;
use crate::format::finding::FailFast;
use crate::format::metadata::DiskType;
use crate::guest::{Table, VolumeState, survey};
use crate::image::scan::scan_marks;
use crate::image::session::Identity;
use crate::image::structure::Edit;
use crate::image::{BlockDevice as _, Image, Layer};
use crate::storage::is_resizable;
use crate::units::{BlockIndex, MIB};
use blocks::{BlockSet, FreeBlocks, Unneeded, find_unneeded};

/// What [`compact`] may drop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompactOptions {
    /// Read every block with data, and drop those that hold nothing but zeros.
    pub zero_scan: bool,
    /// Look for file systems inside the disk, and drop blocks that are free in them.
    pub filesystems: bool,
    /// Children of the image, which do not accept it any more when free blocks are dropped. That is refused when there are
    /// any, unless `break_children` is set.
    pub children: Vec<String>,
    /// Drop free blocks all the same.
    pub break_children: bool,
    /// Only find out what would be gained.
    pub dry_run: bool,
}

impl Default for CompactOptions {
    fn default() -> Self {
        Self { zero_scan: true, filesystems: true, children: Vec::new(), break_children: false, dry_run: false }
    }
}

/// What [`compact`] did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompactReport {
    /// Bytes of the file before.
    pub old_file_size: u64,
    /// Bytes of the file afterwards; for a dry run what is to be expected, give or take a few MiB.
    pub new_file_size: u64,
    /// Bytes that the file took on its file system before and afterwards, where that can be told.
    pub disk_usage: [Option<u64>; 2],
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks with space before.
    pub blocks: u64,
    /// Blocks that held nothing but zeros.
    pub zero_blocks: u64,
    /// Blocks that were free inside file systems of the guest.
    pub free_blocks: u64,
    /// Blocks that kept space and held nothing.
    pub unneeded_blocks: u64,
    /// Sector bitmaps that no block needs any more.
    pub bitmaps: u64,
    /// Blocks and sector bitmaps that were moved.
    pub moved: u64,
    /// Regions that were moved: the BAT, the metadata, the log.
    pub regions_moved: Vec<String>,
    /// Bytes of payload that were read to look for zeros.
    pub bytes_read: u64,
    /// Sentences about what is inside the disk, and what was left alone and why.
    pub remarks: Vec<String>,
}

/// Makes the file of an image smaller in place. The image was opened for writing, a differencing one with its parents, and is
/// closed at the end.
///
/// Zero blocks become ZERO, free ones UNMAPPED, both without space; the guest's files are what they were. The blocks of a
/// fixed disk stay allocated ([MS-VHDX] 2.6.2.1), and are moved at most. A crash leaves an
/// image with the same contents, somewhere in between. It needs room for one block, and what is freed is given back to the
/// file system as it goes. Dropping free blocks changes what the guest reads there, and so gives the image a new data
/// write GUID; dropping zeros and moving blocks do not.
///
/// # Errors
/// [`Refused`](crate::ErrorKind::Refused) when free blocks would be dropped and there are children;
/// [`Cancelled`](crate::ErrorKind::Cancelled), with the image valid and some of the work done; otherwise as in writing.
pub fn compact(image: Image, options: &CompactOptions, progress: &dyn Progress) -> Result<CompactReport> {
    compact_as_planned(image, options, &mut |_| {}, progress)
}

/// As [`compact`]; `planned` hears before the first change what is to be expected, as a dry run would report it; in a dry run
/// also where children are in the way.
///
/// # Errors
/// As [`compact`].
pub fn compact_as_planned(
    image: Image,
    options: &CompactOptions,
    planned: &mut dyn FnMut(&CompactReport),
    progress: &dyn Progress,
) -> Result<CompactReport> {
    let layer = top(&image)?;
    let mut report = CompactReport {
        old_file_size: layer.view().physical_size(),
        disk_usage: [layer.disk_usage(), None],
        block_size: layer.geometry().block_size(),
        ..CompactReport::default()
    };
    let is_fixed = layer.metadata().disk_type() == DiskType::Fixed;
    if !is_resizable(layer.storage().as_ref()) {
        let remark = "the image lies on a block device, which keeps its size: what is not needed at its end is free";
        report.remarks.push(remark.to_owned());
    }
    if is_fixed {
        let remark = "the disk is fixed: its blocks stay allocated (`vhdkit convert` makes a dynamic disk of it)";
        report.remarks.push(remark.to_owned());
    }
    let drops = !is_fixed;
    let free = free_blocks(&image, drops && options.filesystems, &mut report, progress)?;
    let mut unneeded = find_unneeded(&image, layer, &free, drops && options.zero_scan, progress)?;
    if is_fixed {
        unneeded.anchored = BlockSet::default();
    }
    drop(free);
    fill(&mut report, &unneeded);
    let to_drop = report.zero_blocks + report.free_blocks + report.unneeded_blocks;
    report.new_file_size = expected_size(layer, to_drop, progress)?;
    let breaks = report.free_blocks > 0 && !options.children.is_empty() && !options.break_children;
    if options.dry_run || !breaks {
        planned(&report);
    }
    if breaks {
        return Err(has_children(&report, &options.children));
    }
    if options.dry_run {
        return Ok(report);
    }
    if to_drop > 0 || moving::can_move(&image)? {
        let worked = run(&image, &unneeded, &mut report, progress);
        finish(&image, worked)?;
        if image.move_log_down()? {
            report.regions_moved.push("log".to_owned());
        }
        if !report.regions_moved.is_empty() {
            return move_again(&image, report, progress);
        }
    } else {
        finish(&image, image.replay())?;
    }
    finish_report(&image, report)
}

/// Where regions were there may be room for blocks now.
fn move_again(image: &Image, mut report: CompactReport, progress: &dyn Progress) -> Result<CompactReport> {
    let image = reopen(image)?;
    if moving::can_move(&image)? {
        let worked = image.edit(Identity::Kept).and_then(|edit| {
            image.allow_cut(top(&image)?.geometry().payload_blocks())?;
            report.moved += moving::move_down(&edit, progress)?;
            edit.commit()
        });
        finish(&image, worked)?;
    }
    finish_report(&image, report)
}

fn finish_report(image: &Image, mut report: CompactReport) -> Result<CompactReport> {
    let layer = top(image)?;
    report.new_file_size = layer.view().physical_size();
    report.disk_usage = [report.disk_usage.first().copied().flatten(), layer.disk_usage()];
    Ok(report)
}

fn fill(report: &mut CompactReport, unneeded: &Unneeded) {
    report.blocks = unneeded.present;
    report.zero_blocks = unneeded.zero.len();
    report.free_blocks = unneeded.free.len();
    report.unneeded_blocks = unneeded.anchored.len();
    report.bytes_read = unneeded.bytes_read;
}

fn has_children(report: &CompactReport, children: &[String]) -> crate::Error {
    let what = format!(
        "{} blocks are free inside the guest's file systems, and dropping them breaks {}, which {} on this image",
        report.free_blocks,
        children.join(", "),
        if children.len() == 1 { "depends" } else { "depend" },
    );
    refused(what, "merge the children first, drop only zeros with --no-filesystems, or use --break-children")
}

/// The blocks that are free inside the guest's file systems.
fn free_blocks(image: &Image, looks: bool, report: &mut CompactReport, progress: &dyn Progress) -> Result<BlockSet> {
    let mut free = FreeBlocks::new(image.size(), image.geometry().block_size());
    if !looks {
        return Ok(free.blocks);
    }
    let survey = survey(image, progress)?;
    report.remarks.extend(survey.remarks.iter().cloned());
    if let Table::Unusable { reason } = &survey.table {
        report.remarks.push(format!("the partition table cannot be followed: {reason}"));
    }
    for volume in &survey.volumes {
        let place = match &volume.partition {
            Some(partition) => format!("partition {}", partition.number),
            None => "the whole disk".to_owned(),
        };
        match &volume.state {
            VolumeState::Readable { cluster_bytes, free_bytes, .. } => {
                let kind = volume.kind;
                let gib = free_bytes / MIB;
                report.remarks.push(format!("{place}: {kind}, {gib} MiB free in units of {cluster_bytes} bytes"));
            }
            VolumeState::LeftAlone { reason } => {
                report.remarks.push(format!("{place}: {}, left alone: {reason}", volume.kind));
            }
        }
        volume.visit_free(image, &mut |range| {
            free.add(&range);
            ControlFlow::Continue(())
        })?;
        free.end_run();
        advance(progress, 0, None)?;
    }
    Ok(free.blocks)
}

/// About how long the file will be: everything that is owned, one after the other.
fn expected_size(layer: &Layer, dropped: u64, progress: &dyn Progress) -> Result<u64> {
    let mut findings = FailFast::new(layer.rules().strictness);
    let (_, marks) = scan_marks(layer, &mut findings, &mut |_, _| advance(progress, 0, None))?;
    let owned = (marks.count() * MIB).saturating_sub(dropped * layer.geometry().block_size());
    let size = layer.view().physical_size();
    Ok(if is_resizable(layer.storage().as_ref()) { owned.min(size) } else { size })
}

fn run(image: &Image, unneeded: &Unneeded, report: &mut CompactReport, progress: &dyn Progress) -> Result<()> {
    let identity = if report.free_blocks > 0 { Identity::New } else { Identity::Kept };
    let edit = image.edit(identity)?;
    image.allow_cut(edit.layer().geometry().payload_blocks())?;
    drop_blocks(&edit, unneeded, progress)?;
    report.bitmaps = moving::drop_bitmaps(&edit)?;
    edit.settle()?;
    report.moved = moving::move_down(&edit, progress)?;
    report.regions_moved = moving::move_regions(&edit)?;
    edit.commit()
}

fn drop_blocks(edit: &Edit<'_>, unneeded: &Unneeded, progress: &dyn Progress) -> Result<()> {
    let block_size = edit.layer().geometry().block_size();
    let total = (unneeded.zero.len() + unneeded.free.len() + unneeded.anchored.len()) * block_size;
    let mut done = 0;
    let kinds = [
        (&unneeded.zero, PayloadState::Zero),
        (&unneeded.free, PayloadState::Unmapped),
        (&unneeded.anchored, PayloadState::Unmapped),
    ];
    for (set, state) in kinds {
        for block in set.iter() {
            edit.clear_block(BlockIndex(block), state)?;
            done += block_size;
            advance(progress, done, Some(total))?;
        }
    }
    Ok(())
}
