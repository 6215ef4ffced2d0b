//! From one disk to another: raw to VHDX, VHDX to raw, VHDX to VHDX of another kind.
//!
//! ```text
//! feed (one at a time)     worker                     turn (in order of the disk)    worker
//! next task, its number -> read, look for zeros    -> allocate, BAT entries       -> write, clone or copy
//! ```
//!
//! Workers take tasks in the order of the disk and allocate in the same order, so that the target does not depend on
//! their number; they read and write side by side.

mod feed;
mod work;

use std::io::{Read, Write};
use std::sync::Arc;

use super::Progress;
use super::create::{CreateOptions, NewDiskType};
use super::layout::ImagePlan;
use super::writer::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::image::BlockDevice;
use crate::storage::Storage;
use crate::units::round_up;

/// Most layers whose files are compared with the target.
const LAYERS_MAX: usize = 512;

/// Where a conversion reads.
pub enum Source<'a> {
    /// A disk: an [`Image`](crate::image::Image) with its parents, or a [`RawDisk`](crate::image::RawDisk).
    Disk(&'a dyn BlockDevice),
    /// The bytes of a disk one after another, such as standard input.
    Stream {
        /// Gives the bytes.
        reader: &'a mut (dyn Read + Send),
        /// How many there are, if that is known; it is an error if there are more or fewer.
        size: Option<u64>,
    },
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Disk(disk) => f.debug_tuple("Disk").field(disk).finish(),
            Self::Stream { size, .. } => f.debug_struct("Stream").field("size", size).finish_non_exhaustive(),
        }
    }
}

/// Where a conversion writes.
pub enum Destination<'a> {
    /// A dynamic or fixed VHDX.
    Vhdx {
        /// Empty storage, or a block device, all of which is overwritten.
        storage: &'a Arc<dyn Storage>,
        /// What the image is to be. The size is the source's unless a larger one is given; the sector sizes of a VHDX
        /// are kept.
        layout: &'a CreateOptions,
        /// Empty storage for a while, needed for a stream of unknown size: up to 8 bytes per block go there.
        spill: Option<&'a Arc<dyn Storage>>,
    },
    /// The bytes of the disk, in an empty file, where zeros become holes, or on a block device.
    Raw {
        /// The file or device.
        storage: &'a Arc<dyn Storage>,
    },
    /// The bytes of the disk one after another, such as standard output.
    Stream {
        /// Takes the bytes.
        writer: &'a mut (dyn Write + Send),
    },
}

impl std::fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vhdx { storage, layout, .. } => {
                f.debug_struct("Vhdx").field("storage", storage).field("layout", layout).finish_non_exhaustive()
            }
            Self::Raw { storage } => f.debug_struct("Raw").field("storage", storage).finish(),
            Self::Stream { .. } => f.debug_struct("Stream").finish_non_exhaustive(),
        }
    }
}

/// How a conversion works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertOptions {
    /// Look for zeros in what is read and leave them out. What is cloned is not looked at, nor what goes to a fixed
    /// image by a copy inside the kernel.
    pub zero_scan: bool,
    /// Threads that read and write; `None` for as many as there are processors.
    pub threads: Option<usize>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self { zero_scan: true, threads: None }
    }
}

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConvertReport {
    /// Bytes of the source's disk.
    pub source_size: u64,
    /// Bytes of the target's disk.
    pub target_size: u64,
    /// Zero bytes added at the end of the disk to make whole sectors. What a `RawDisk` pads itself is not counted.
    pub padding: u64,
    /// Bytes of the target file, its structures included; of a stream, what was written to it.
    pub file_size: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes written to the target, without its structures.
    pub bytes_written: u64,
    /// Bytes that share their place on the disk with the source.
    pub bytes_cloned: u64,
    /// Bytes copied inside the kernel.
    pub bytes_copied: u64,
    /// Bytes read and left out because they are zero.
    pub bytes_skipped_zero: u64,
}

/// Converts a disk. Nothing is synced.
///
/// Holes and zeros of the source are not read. Where the file system of both can clone, data is cloned; elsewhere it
/// is read, looked through for zeros, and written by several threads with a buffer of 1 MiB each.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::image::RawDisk;
/// use vhdkit::ops::convert::{ConvertOptions, Destination, Source, convert};
/// use vhdkit::ops::create::CreateOptions;
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// let raw = RawDisk::new(Arc::new(MemoryStorage::from_bytes(vec![7; 4096])), 512)?;
/// let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// let target = Destination::Vhdx { storage: &storage, layout: &CreateOptions::default(), spill: None };
/// let report = convert(Source::Disk(&raw), target, &ConvertOptions::default(), &())?;
/// assert_eq!((report.target_size, report.bytes_written), (4096, 4096));
/// # Ok::<(), vhdkit::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for a layout that is not possible, and for a stream of another size than given;
/// [`ErrorKind::Refused`] when the target is the source or smaller; [`ErrorKind::Cancelled`]; otherwise what reading
/// the source gives, such as [`ErrorKind::ParentMissing`], or what the operating system says of writing.
pub fn convert(
    source: Source<'_>,
    destination: Destination<'_>,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let source_size = match &source {
        Source::Disk(disk) => Some(disk.size()),
        Source::Stream { size, .. } => *size,
    };
    if let (Source::Disk(disk), Destination::Vhdx { storage, .. } | Destination::Raw { storage }) =
        (&source, &destination)
    {
        refuse_source(*disk, storage.as_ref())?;
    }
    let mut setup = work::Setup { options, progress, fixed: false, sector: 1, size: source_size };
    let (output, clones) = match destination {
        Destination::Vhdx { storage, layout, spill } => {
            let layout = target_layout(&source, source_size, layout)?;
            setup.fixed = layout.disk_type == NewDiskType::Fixed;
            setup.sector = u64::from(layout.logical_sector_size.unwrap_or(512));
            setup.size = layout.size;
            let clones = feed::Clones::probe(&source, storage.as_ref())?;
            let target = if layout.size.is_some() {
                Target::vhdx(storage, ImagePlan::new(&layout)?, progress)?
            } else {
                let Some(spill) = spill else {
                    let message = "a stream of unknown size needs a temporary place for the BAT";
                    return Err(Error::new(ErrorKind::InvalidArgument, message).with_hint("give the size of the disk"));
                };
                Target::vhdx_of_unknown_size(storage, &layout, spill, progress)?
            };
            (work::Output::Storage(Box::new(target)), clones)
        }
        Destination::Raw { storage } => {
            let clones = feed::Clones::probe(&source, storage.as_ref())?;
            (work::Output::Storage(Box::new(Target::raw(storage, source_size)?)), clones)
        }
        Destination::Stream { writer } => (work::Output::Stream { writer, written: 0 }, feed::Clones::none()),
    };
    work::run(source, output, clones, &setup)
}

/// The layout with what it leaves to the source filled in.
pub(super) fn target_layout(
    source: &Source<'_>,
    source_size: Option<u64>,
    layout: &CreateOptions,
) -> Result<CreateOptions> {
    let invalid = |message: &str| Error::new(ErrorKind::InvalidArgument, message);
    if layout.parent.is_some() {
        return Err(invalid("a conversion cannot make a child").with_hint("create the child on its parent instead"));
    }
    let mut layout = layout.clone();
    if let Source::Disk(disk) = source {
        // A raw disk has no sector size of its own to keep, and no identity.
        if disk.disk_id().is_some() {
            let logical = disk.logical_sector_size();
            layout.logical_sector_size = layout.logical_sector_size.or(Some(logical));
            let physical = disk.physical_sector_size().max(layout.logical_sector_size.unwrap_or(logical));
            layout.physical_sector_size = layout.physical_sector_size.or(Some(physical));
        }
    }
    let sector = u64::from(layout.logical_sector_size.unwrap_or(512));
    match (layout.size, source_size) {
        (Some(asked), Some(size)) if asked < size => {
            let message = format!("the source has {size} bytes, which do not fit on a disk of {asked} bytes");
            let error = Error::new(ErrorKind::Refused, message);
            return Err(error.with_hint("give at least the size of the source, or leave the size out"));
        }
        (None, Some(size)) if sector.is_power_of_two() => layout.size = Some(round_up(size, sector).unwrap_or(size)),
        _ => {}
    }
    Ok(layout)
}

/// Refuses a target that is a layer of the source.
fn refuse_source(disk: &dyn BlockDevice, target: &dyn Storage) -> Result<()> {
    let Some(identity) = target.identity() else { return Ok(()) };
    let mut layers = (0..LAYERS_MAX).map_while(|layer| disk.layer_storage(layer));
    if layers.any(|layer| layer.identity() == Some(identity)) {
        let error = Error::new(ErrorKind::Refused, "the target is the source, or one of its parents");
        return Err(error.with_hint("choose another target"));
    }
    Ok(())
}
