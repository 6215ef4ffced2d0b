//! Making a disk larger or smaller in place.

mod grow;
mod shrink;

use std::cmp::Ordering;

use super::edit::{finish, refused, reopen, top};
use super::{Progress, advance};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DISK_SIZE_MAX;
use crate::format::geometry::{BAT_ENTRY_BYTES, Geometry};
use crate::format::items::ItemChange;
use crate::format::metadata::{DiskType, FLAG_REQUIRED, FLAG_VIRTUAL_DISK, VIRTUAL_DISK_SIZE};
use crate::guest::{Smallest, Survey, Table, plan_backup_gpt, survey};
use crate::image::session::Identity;
use crate::image::{BlockDevice as _, Image, Layer};
use crate::units::{MIB, round_up};

/// What [`resize`] is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizeOptions {
    /// Bytes of the disk afterwards: a multiple of the logical sector size, at most 64 TiB.
    pub size: u64,
    /// Cut off whatever is there.
    pub allow_data_loss: bool,
    /// Put the backup of a GPT where the disk ends afterwards.
    pub move_backup_gpt: bool,
    /// Only find out what would happen.
    pub dry_run: bool,
}

impl ResizeOptions {
    /// To so many bytes, losing nothing.
    #[must_use]
    pub const fn to(size: u64) -> Self {
        Self { size, allow_data_loss: false, move_backup_gpt: false, dry_run: false }
    }
}

/// What [`resize`] did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResizeReport {
    /// Bytes of the disk before.
    pub old_size: u64,
    /// Bytes of the disk afterwards.
    pub new_size: u64,
    /// Bytes of the file before.
    pub old_file_size: u64,
    /// Bytes of the file afterwards; `None` for a dry run.
    pub new_file_size: Option<u64>,
    /// The BAT has to be longer than its region, and moves to a new one.
    pub bat_moves: bool,
    /// Blocks that are allocated for a fixed disk that grows, or given up by a disk that shrinks.
    pub blocks: u64,
    /// The first byte behind the new end that is not zero, where one was found: of something that is not understood, or, with
    /// `cut_is_unused`, of nothing that the partition table and the file systems know.
    pub first_data_cut: Option<u64>,
    /// What is cut off lies outside of all partitions, or behind the file system.
    pub cut_is_unused: bool,
    /// How small the disk may be, where it becomes smaller.
    pub smallest: Option<Smallest>,
    /// What becomes of the backup of a GPT.
    pub backup_gpt: BackupGpt,
}

/// What becomes of the backup of a GPT, which lies at the end of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackupGpt {
    /// There is none.
    #[default]
    None,
    /// The partition table cannot be followed, so that it is not known whether there is one.
    Unknown,
    /// It is cut off, or left in the middle of a larger disk; the primary one goes on working. The tools of the guest put
    /// it right (`sgdisk --move-second-header`), or `move_backup_gpt`.
    LeftBehind,
    /// It was moved, or would be.
    Moved,
    /// It is at the end of the disk already, which keeps its size.
    InPlace,
}

/// Changes the size of a disk in place ([MS-VHDX] 2.6.2.2; the order of steps is in `docs/durability.md`). The image was
/// opened for writing, a differencing one with its parents, and is closed at the end.
///
/// A crash leaves the old size or the new one, with everything that both have. The image gets a new data write GUID, so its
/// children do not accept it as their parent any more. What a larger disk adds reads as zero, also where a parent is longer.
/// A fixed disk gets its new blocks allocated.
///
/// How much of a disk may be cut off its partition table and file system say: what lies outside of them goes, and the report
/// says where. Where they are not understood, everything behind the new end has to be zero; a file system or partition table
/// that is recognised and not in order may count on what is zero, too, and refuses. A backup GPT is moved before the disk becomes smaller and after it became larger, each
/// time so that at any moment one of the two is in order.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for a size that cannot be; [`ErrorKind::Refused`] when data would be lost;
/// [`ErrorKind::ParentMissing`] when the parent's size matters and it is not open. Nothing has changed then. Otherwise as in
/// writing, and [`ErrorKind::Cancelled`]: the disk has the old size, or, when only space was still to be given back, the new one.
pub fn resize(image: Image, options: &ResizeOptions, progress: &dyn Progress) -> Result<ResizeReport> {
    let layer = top(&image)?;
    let old = layer.metadata().disk_size;
    check_size(layer, options.size)?;
    advance(progress, 0, None)?;
    let mut report = ResizeReport {
        old_size: old,
        new_size: options.size,
        old_file_size: layer.view().physical_size(),
        ..ResizeReport::default()
    };
    if options.size == old && options.move_backup_gpt {
        return move_backup(&image, options, report, progress);
    }
    if options.size == old {
        report.new_file_size = (!options.dry_run).then_some(report.old_file_size);
        return Ok(report);
    }
    let geometry = new_geometry(layer, options.size)?;
    let survey = survey(&image, progress)?;
    if options.size > old {
        grow::plan(&image, &geometry, &mut report)?;
    } else {
        shrink::plan(&image, &geometry, options, &survey, &mut report, progress)?;
    }
    report.backup_gpt = backup_gpt(&survey, options)?;
    // Found out now, while nothing has changed.
    let backup = match report.backup_gpt {
        BackupGpt::Moved => plan_backup_gpt(&image, options.size)?,
        _ => Vec::new(),
    };
    if options.dry_run {
        return Ok(report);
    }
    let moved = if options.size < old { write_all(&image, &backup) } else { Ok(()) };
    finish(&image, moved.and_then(|()| run(&image, &geometry, Identity::New, progress)))?;
    report.new_file_size = Some(top(&image)?.view().physical_size());
    if options.size > old && !backup.is_empty() {
        let image = reopen(&image)?;
        finish(&image, write_all(&image, &backup))?;
        report.new_file_size = Some(top(&image)?.view().physical_size());
    }
    Ok(report)
}

/// What becomes of the backup of a GPT.
fn backup_gpt(survey: &Survey, options: &ResizeOptions) -> Result<BackupGpt> {
    Ok(match &survey.table {
        Table::Gpt { .. } if options.move_backup_gpt => BackupGpt::Moved,
        Table::Gpt { .. } => BackupGpt::LeftBehind,
        Table::Unusable { reason } if options.move_backup_gpt => {
            let what = format!("the backup GPT cannot be moved: the partition table cannot be followed: {reason}");
            return Err(refused(what, "mend the table with the tools of the guest first, for example gdisk"));
        }
        Table::Unusable { .. } => BackupGpt::Unknown,
        _ => BackupGpt::None,
    })
}

/// Puts a backup GPT that was left behind by an earlier change of size to the end of the disk.
fn move_backup(
    image: &Image,
    options: &ResizeOptions,
    mut report: ResizeReport,
    progress: &dyn Progress,
) -> Result<ResizeReport> {
    report.new_file_size = (!options.dry_run).then_some(report.old_file_size);
    let survey = survey(image, progress)?;
    if backup_gpt(&survey, options)? != BackupGpt::Moved {
        return Ok(report);
    }
    let pieces = plan_backup_gpt(image, options.size)?;
    report.backup_gpt = if is_in_place(image, &pieces)? { BackupGpt::InPlace } else { BackupGpt::Moved };
    if options.dry_run {
        return Ok(report);
    }
    let worked =
        if report.backup_gpt == BackupGpt::Moved { write_all(image, &pieces) } else { image.replay().map(drop) };
    finish(image, worked)?;
    Ok(report)
}

fn is_in_place(image: &Image, pieces: &[(u64, Vec<u8>)]) -> Result<bool> {
    for (offset, bytes) in pieces {
        let mut found = vec![0; bytes.len()];
        image.read_at(&mut found, *offset)?;
        if found != *bytes {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether [`resize`] to the size that a disk has would move the backup of its GPT, which changes what its children see.
///
/// # Errors
/// As [`resize`], before the first write.
pub fn moves_backup_gpt(image: &Image, progress: &dyn Progress) -> Result<bool> {
    match survey(image, progress)?.table {
        Table::Gpt { .. } => Ok(!is_in_place(image, &plan_backup_gpt(image, image.size())?)?),
        _ => Ok(false),
    }
}

/// How small a disk may be made so that its partitions and file systems lose nothing.
///
/// # Errors
/// What stands in the way of reading the disk.
pub fn smallest_size(image: &Image, progress: &dyn Progress) -> Result<Smallest> {
    Ok(survey(image, progress)?.smallest_safe_size())
}

/// Writes each piece durably before the next: the backup before the primary that names it.
fn write_all(image: &Image, pieces: &[(u64, Vec<u8>)]) -> Result<()> {
    for (offset, bytes) in pieces {
        image.write_at(bytes, *offset)?;
        image.flush()?;
    }
    Ok(())
}

/// Makes the disk of an image that of a geometry; the image is to be closed then.
pub(crate) fn run(image: &Image, geometry: &Geometry, identity: Identity, progress: &dyn Progress) -> Result<()> {
    match geometry.disk_size().cmp(&top(image)?.metadata().disk_size) {
        Ordering::Greater => grow::run(image, geometry, identity, progress),
        Ordering::Less => shrink::run(image, geometry, identity, progress),
        Ordering::Equal => Ok(()),
    }
}

fn check_size(layer: &Layer, size: u64) -> Result<()> {
    let sector = u64::from(layer.metadata().logical_sector_size);
    let invalid = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
    if size == 0 {
        return invalid("a disk of 0 bytes is not possible".to_owned());
    }
    if size > DISK_SIZE_MAX {
        return invalid(format!("a disk of {size} bytes is not possible; the format ends at 64 TiB"));
    }
    if !size.is_multiple_of(sector) {
        return invalid(format!("{size} bytes are no multiple of the logical sector of {sector} bytes"));
    }
    Ok(())
}

pub(crate) fn new_geometry(layer: &Layer, size: u64) -> Result<Geometry> {
    let metadata = layer.metadata();
    Geometry::new(size, metadata.block_size, metadata.logical_sector_size, metadata.has_parent)
        .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, format!("a disk of {size} bytes is not possible")))
}

/// Bytes that the BAT of a geometry needs, in whole MiB.
pub(crate) fn bat_bytes(geometry: &Geometry) -> u64 {
    round_up(geometry.bat_entries() * BAT_ENTRY_BYTES, MIB).unwrap_or(u64::MAX) // at most 513 MiB
}

/// The change of the item that says how large the disk is.
fn size_item(size: u64) -> ItemChange {
    let flags = FLAG_REQUIRED | FLAG_VIRTUAL_DISK;
    ItemChange { id: VIRTUAL_DISK_SIZE, is_user: false, value: Some((flags, size.to_le_bytes().to_vec())) }
}

fn is_fixed(layer: &Layer) -> bool {
    layer.metadata().disk_type() == DiskType::Fixed
}

/// Bytes of the disk below, for an image with parents.
fn parent_size(image: &Image) -> Result<Option<u64>> {
    let [layer, parents @ ..] = image.layers() else { return Ok(None) };
    if !layer.geometry().is_differencing() {
        return Ok(None);
    }
    if image.parents_missing() || parents.is_empty() {
        return Err(Error::new(
            ErrorKind::ParentMissing,
            "the size of the parent's disk matters here, and the parent is not open",
        )
        .with_hint("leave --no-parents out; `vhdkit chain` finds out where the parent is"));
    }
    // Only the nearest parent: what it leaves to its own lies on its own disk.
    Ok(parents.first().map(|parent| parent.geometry().disk_size()))
}

/// Whether a part of the disk holds anything but zeros: the first byte that does not.
fn first_data(image: &Image, range: std::ops::Range<u64>, progress: &dyn Progress) -> Result<Option<u64>> {
    use crate::image::ExtentKind;
    use std::ops::ControlFlow;
    let mut extents = Vec::new();
    let mut position = range.start;
    let mut buffer = vec![0; 1 << 20];
    while position < range.end {
        // A few at a time: a disk may have millions.
        extents.clear();
        let mut end = range.end;
        image.visit_extents(position..range.end, &mut |extent| {
            end = extent.end();
            if matches!(extent.kind, ExtentKind::Data { .. }) {
                extents.push(extent.start..extent.end());
            }
            if extents.len() == 1024 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        for extent in &extents {
            let mut at = extent.start;
            while at < extent.end {
                let length = (extent.end - at).min(1 << 20);
                let part = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
                image.read_at(part, at)?;
                if let Some(index) = part.iter().position(|byte| *byte != 0) {
                    return Ok(Some(at + index as u64)); // on the disk
                }
                at += length;
                advance(progress, at - range.start, Some(range.end - range.start))?;
            }
        }
        position = end;
    }
    Ok(None)
}
