//! What lies inside a disk: partition tables and file systems, and which of their space is free.
//!
//! ```text
//! survey ---> table (GPT, MBR with logical partitions, none)
//!        ---> known: every signature in each volume
//!        ---> ext | ntfs | fat | exfat | xfs: checked from end to end, then trusted
//! ```
//!
//! Everything here only reads. What is free may be thrown away by whoever asks, so a file system is trusted only when all
//! of it is understood, in order and at rest; anything else is left alone, with a reason. `docs/guests.md` has the list.
//!
//! ```
//! use std::ops::ControlFlow;
//! use std::sync::Arc;
//! use vhdkit::guest::{Table, VolumeKind, survey};
//! use vhdkit::image::RawDisk;
//! use vhdkit::storage::MemoryStorage;
//!
//! let disk = RawDisk::new(Arc::new(MemoryStorage::with_len(1 << 30)), 512)?;
//! let survey = survey(&disk, &())?;
//! assert_eq!(survey.table, Table::None);
//! for volume in &survey.volumes {
//!     println!("{} at {:#x}: {:?}", volume.kind, volume.range.start, volume.state);
//!     volume.visit_free(&disk, &mut |range| {
//!         println!("free: {range:?}");
//!         ControlFlow::Continue(())
//!     })?;
//! }
//! # assert_eq!(survey.volumes[0].kind, VolumeKind::Empty);
//! # Ok::<(), vhdkit::Error>(())
//! ```

mod backup;
mod exfat;
mod ext;
mod fat;
mod gpt;
mod known;
mod mbr;
mod ntfs;
mod sums;
mod table;
mod window;
mod xfs;

use std::ops::{ControlFlow, Range};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{BlockDevice, ExtentKind};
use crate::ops::{Progress, advance};

use self::window::{Checked, FreeSink, Tick, Trouble, Window, reason};

pub use self::backup::plan_backup_gpt;
pub use self::known::VolumeKind;
pub use self::table::{PartitionInfo, PartitionType, Table};

/// What was found on a disk.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Its partition table.
    pub table: Table,
    /// Its volumes in the order of the disk; with [`Table::None`] the disk itself, with [`Table::Unusable`] none.
    pub volumes: Vec<Volume>,
    /// What else people should know, in whole sentences.
    pub remarks: Vec<String>,
    /// Where the last thing that the table describes ends, in bytes.
    table_end: u64,
    /// No block of the disk holds data.
    empty: bool,
}

/// A partition, or a disk without partitions.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Where it lies on the disk, in bytes.
    pub range: Range<u64>,
    /// What the partition table says of it.
    pub partition: Option<PartitionInfo>,
    /// What lies in it.
    pub kind: VolumeKind,
    /// Whether its free space is known.
    pub state: VolumeState,
    system: Option<FileSystem>,
}

/// Whether the free space of a volume is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeState {
    /// A file system that is understood, in order, and not in use.
    Readable {
        /// Bytes of the volume that the file system covers, from its beginning.
        size_bytes: u64,
        /// The unit in which it gives space to files.
        cluster_bytes: u64,
        /// Bytes that it does not use.
        free_bytes: u64,
    },
    /// Nothing is known to be free.
    LeftAlone {
        /// Why: a sentence without a full stop. Text from the disk in it is escaped.
        reason: String,
    },
}

/// How small a disk may be made without cutting anything off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Smallest {
    /// Everything that is known to be on the disk lies below.
    SafeAt {
        /// Bytes; a multiple of the logical sector.
        bytes: u64,
        /// The end of the disk holds a backup GPT, for which there is room in `bytes`, and which has to move
        /// ([`plan_backup_gpt`]).
        moves_backup_gpt: bool,
    },
    /// Something on the disk is not understood, so that its end may be in use.
    Unknown {
        /// What: a sentence without a full stop.
        reason: String,
    },
}

/// A file system that is understood.
#[derive(Clone, Debug)]
enum FileSystem {
    Ext(ext::Ext),
    Ntfs(ntfs::Ntfs),
    Fat(fat::Fat),
    ExFat(exfat::ExFat),
    Xfs(xfs::Xfs),
}

impl FileSystem {
    fn open(kind: VolumeKind, window: &Window<'_>) -> Checked<Self> {
        match kind {
            VolumeKind::Ext4 => ext::Ext::open(window).map(Self::Ext),
            VolumeKind::Ntfs => ntfs::Ntfs::open(window).map(Self::Ntfs),
            VolumeKind::Fat32 => fat::Fat::open(window).map(Self::Fat),
            VolumeKind::ExFat => exfat::ExFat::open(window).map(Self::ExFat),
            VolumeKind::Xfs => xfs::Xfs::open(window).map(Self::Xfs),
            other => reason(format!("{other} is recognised, but not understood")),
        }
    }

    /// The kind that a volume with a signature seems to be, in order or not.
    fn likely(kind: VolumeKind, window: &Window<'_>) -> Checked<VolumeKind> {
        match kind {
            VolumeKind::Ext4 => ext::kind_of(window),
            VolumeKind::Fat32 => fat::kind_of(window),
            other => Ok(other),
        }
    }

    const fn kind(&self) -> VolumeKind {
        match self {
            Self::Ext(ext) => ext.kind(),
            Self::Ntfs(_) => VolumeKind::Ntfs,
            Self::Fat(fat) => fat.kind(),
            Self::ExFat(_) => VolumeKind::ExFat,
            Self::Xfs(_) => VolumeKind::Xfs,
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Ext(ext) => ext.bytes(),
            Self::Ntfs(ntfs) => ntfs.bytes(),
            Self::Fat(fat) => fat.bytes(),
            Self::ExFat(exfat) => exfat.bytes(),
            Self::Xfs(xfs) => xfs.bytes(),
        }
    }

    const fn cluster_bytes(&self) -> u64 {
        match self {
            Self::Ext(ext) => ext.cluster_bytes(),
            Self::Ntfs(ntfs) => ntfs.cluster_bytes(),
            Self::Fat(fat) => fat.cluster_bytes(),
            Self::ExFat(exfat) => exfat.cluster_bytes(),
            Self::Xfs(xfs) => xfs.cluster_bytes(),
        }
    }

    /// Checks what the walk does not, and what need not be checked twice.
    fn check(&self, window: &Window<'_>, tick: &Tick<'_>) -> Checked<()> {
        match self {
            Self::Ntfs(ntfs) => ntfs.check_files(window, tick),
            _ => Ok(()),
        }
    }

    /// Gives every free range to the sink, and checks everything on the way.
    fn walk(&self, window: &Window<'_>, sink: &mut FreeSink<'_>, tick: &Tick<'_>) -> Checked<()> {
        match self {
            Self::Ext(ext) => ext.walk(window, sink, tick),
            Self::Ntfs(ntfs) => ntfs.walk(window, sink, tick),
            Self::Fat(fat) => fat.walk(window, sink, tick),
            Self::ExFat(exfat) => exfat.walk(window, sink, tick),
            Self::Xfs(xfs) => xfs.walk(window, sink, tick),
        }
    }
}

/// Looks at the partition table of a disk and at everything that lies in its volumes. Reads metadata only; the time goes
/// with them, the memory stays within some 100 MiB for the largest file systems that are understood.
///
/// Progress is in bytes of the disk.
///
/// # Errors
/// What stands in the way of reading the disk, and [`ErrorKind::Cancelled`]. Whatever lies on it is no error: what is not
/// as it should be becomes a reason to leave a volume alone.
pub fn survey(disk: &dyn BlockDevice, progress: &dyn Progress) -> Result<Survey> {
    let whole = Window::new(disk, &(0..disk.size()));
    let signatures = settled(known::scan(&whole))?;
    let found = settled(table::find(&whole, u64::from(disk.logical_sector_size()), &signatures))?;
    let mut volumes = Vec::new();
    if found.table == Table::None {
        volumes.push(examine(disk, 0..disk.size(), None, &signatures, progress)?);
    }
    let mut partitions = found.partitions;
    partitions.sort_by_key(|partition| partition.range.start);
    for partition in partitions {
        let signatures = settled(known::scan(&Window::new(disk, &partition.range)))?;
        volumes.push(examine(disk, partition.range, Some(partition.info), &signatures, progress)?);
    }
    let empty = is_empty(disk, 0..disk.size())?;
    advance(progress, disk.size(), Some(disk.size()))?;
    Ok(Survey { table: found.table, volumes, remarks: found.remarks, table_end: found.end, empty })
}

/// Everything whose signature lies in a range of a disk, as far as it lies on the disk, in no order: several where one
/// thing was made over another. Understood or in order need none of it be. Of the kinds of ext and FAT, whichever it
/// is, [`VolumeKind::Ext4`] and [`VolumeKind::Fat32`] are named.
///
/// # Errors
/// What stands in the way of reading the disk.
pub fn recognise(disk: &dyn BlockDevice, range: &Range<u64>) -> Result<Vec<VolumeKind>> {
    settled(known::scan(&Window::new(disk, range)))
}

/// Looks at one volume.
fn examine(
    disk: &dyn BlockDevice,
    range: Range<u64>,
    partition: Option<PartitionInfo>,
    signatures: &[VolumeKind],
    progress: &dyn Progress,
) -> Result<Volume> {
    advance(progress, range.start, Some(disk.size()))?;
    let said = partition.as_ref().and_then(|info| known::of_type(&info.kind));
    let mut volume = Volume { range, partition, kind: VolumeKind::Unknown, state: left_alone(""), system: None };
    match (signatures, said) {
        ([], said) => {
            let empty = is_empty(disk, volume.range.clone())?;
            volume.kind = said.unwrap_or(if empty { VolumeKind::Empty } else { VolumeKind::Unknown });
            volume.state = left_alone(match (said, empty) {
                (_, true) => "nothing is stored in it".to_owned(),
                (Some(kind), _) => format!("its partition type says {kind}"),
                (None, _) => "what lies in it is not known".to_owned(),
            });
        }
        ([kind], Some(said)) if *kind != said => {
            volume.kind = VolumeKind::Several;
            volume.state = left_alone(format!("its partition type says {said}, its content {kind}"));
        }
        ([kind], _) => open(disk, &mut volume, *kind, progress)?,
        (several, _) => {
            let names: Vec<&str> = several.iter().map(|kind| kind.name()).collect();
            volume.kind = VolumeKind::Several;
            volume.state = left_alone(format!("it has the signatures of {}", names.join(" and ")));
        }
    }
    Ok(volume)
}

/// Checks a file system from end to end.
fn open(disk: &dyn BlockDevice, volume: &mut Volume, kind: VolumeKind, progress: &dyn Progress) -> Result<()> {
    let window = Window::new(disk, &volume.range);
    volume.kind = match FileSystem::likely(kind, &window) {
        Ok(likely) => likely,
        Err(Trouble::Reason(_)) => kind,
        Err(Trouble::Failed(error)) => return Err(error),
    };
    let opened = FileSystem::open(kind, &window).and_then(|system| {
        volume.kind = system.kind();
        let tick = |position: u64| advance(progress, window.start().saturating_add(position), Some(disk.size()));
        let mut ignore = |_| ControlFlow::Continue(());
        let mut sink = FreeSink::new(window.start(), system.bytes(), &mut ignore);
        system.walk(&window, &mut sink, &tick)?;
        system.check(&window, &tick)?;
        Ok((sink.finish(), system))
    });
    match opened {
        Ok((free_bytes, system)) => {
            let (size_bytes, cluster_bytes) = (system.bytes(), system.cluster_bytes());
            volume.state = VolumeState::Readable { size_bytes, cluster_bytes, free_bytes };
            volume.system = Some(system);
        }
        Err(Trouble::Reason(reason)) => volume.state = VolumeState::LeftAlone { reason },
        Err(Trouble::Failed(error)) => return Err(error),
    }
    Ok(())
}

fn left_alone(reason: impl Into<String>) -> VolumeState {
    VolumeState::LeftAlone { reason: reason.into() }
}

/// The result of a look that gives no reasons: the disk ends too early for it, which nobody can ask for.
fn settled<T>(checked: Checked<T>) -> Result<T> {
    checked.map_err(|trouble| match trouble {
        Trouble::Failed(error) => error,
        Trouble::Reason(reason) => Error::new(ErrorKind::OutOfRange, reason),
    })
}

/// Whether nothing of a range holds data.
fn is_empty(disk: &dyn BlockDevice, range: Range<u64>) -> Result<bool> {
    let mut empty = true;
    if range.start < range.end {
        disk.visit_extents(range, &mut |extent| {
            empty = !matches!(extent.kind, ExtentKind::Data { .. });
            if empty { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
    }
    Ok(empty)
}

impl Volume {
    /// Visits the free ranges of the volume, in bytes of the disk: in order, joined, and inside the volume. Nothing is
    /// visited where the volume is left alone. Everything is read and checked again; memory stays bounded, whatever the
    /// size. A visitor that breaks ends it without an error.
    ///
    /// The disk has to be the one that was surveyed, unchanged.
    ///
    /// # Errors
    /// What stands in the way of reading the disk, and [`ErrorKind::Refused`] when the volume is not as it was; what was
    /// visited before must not be used then.
    pub fn visit_free(
        &self,
        disk: &dyn BlockDevice,
        visit: &mut dyn FnMut(Range<u64>) -> ControlFlow<()>,
    ) -> Result<()> {
        let Some(system) = &self.system else { return Ok(()) };
        let window = Window::new(disk, &self.range);
        let mut sink = FreeSink::new(window.start(), system.bytes().min(window.length()), visit);
        match system.walk(&window, &mut sink, &|_| Ok(())) {
            Ok(()) => {
                sink.finish();
                Ok(())
            }
            Err(Trouble::Failed(error)) => Err(error),
            Err(Trouble::Reason(reason)) => {
                let (kind, start) = (self.kind, self.range.start);
                let what = format!("the {kind} file system at offset {start:#x} changed while it was read: {reason}");
                Err(Error::new(ErrorKind::Refused, what))
            }
        }
    }
}

impl Survey {
    /// Whether something on the disk is recognised, and not understood well enough to tell how far it reaches: also zeros at
    /// the end may be part of it, such as blocks of a file system that a dirty journal is still to fill.
    #[must_use]
    pub fn end_may_matter(&self) -> bool {
        let is_known = |volume: &Volume| !matches!(volume.kind, VolumeKind::Unknown | VolumeKind::Empty);
        let left_alone = |volume: &Volume| matches!(volume.state, VolumeState::LeftAlone { .. });
        match &self.table {
            Table::Unusable { .. } => true,
            Table::None => self.volumes.iter().any(|volume| is_known(volume) && left_alone(volume)),
            _ => self
                .volumes
                .iter()
                .any(|volume| matches!(volume.kind, VolumeKind::DynamicDisk | VolumeKind::StorageSpaces)),
        }
    }

    /// What reaches to the end of what is in use, for a message: a partition, or a file system. Names of partitions are
    /// escaped for printing.
    #[must_use]
    pub fn last_in_use(&self) -> String {
        let last = self.volumes.iter().max_by_key(|volume| volume.range.end);
        match last.map(|volume| (volume, &volume.partition)) {
            Some((volume, Some(partition))) if volume.range.end == self.table_end => {
                let name = if partition.name.is_empty() { String::new() } else { format!(" \"{}\"", partition.name) };
                format!("partition {}{name} ({})", partition.number, volume.kind)
            }
            Some((volume, None)) => format!("the {} file system", volume.kind),
            _ => "what the partition table describes".to_owned(),
        }
    }

    /// How small the disk may be made: to the end of the last partition, with room for a backup GPT behind it where there is
    /// one; for a disk that is one file system, to the end of that.
    #[must_use]
    pub fn smallest_safe_size(&self) -> Smallest {
        let unknown = |reason: String| Smallest::Unknown { reason };
        if self.empty {
            return Smallest::SafeAt { bytes: 0, moves_backup_gpt: false };
        }
        let whole = [VolumeKind::DynamicDisk, VolumeKind::StorageSpaces];
        if let Some(volume) = self.volumes.iter().find(|volume| whole.contains(&volume.kind)) {
            return unknown(format!("the disk is part of a {}", volume.kind));
        }
        match &self.table {
            Table::Unusable { reason } => unknown(format!("its partition table cannot be followed: {reason}")),
            Table::Mbr if self.volumes.is_empty() => {
                unknown("its partition table is empty, and the disk is not".to_owned())
            }
            Table::Mbr => Smallest::SafeAt { bytes: self.table_end, moves_backup_gpt: false },
            Table::Gpt { backup_bytes, .. } => {
                Smallest::SafeAt { bytes: self.table_end.saturating_add(*backup_bytes), moves_backup_gpt: true }
            }
            Table::None => match self.volumes.first().map(|volume| (volume.kind, &volume.state)) {
                Some((_, VolumeState::Readable { size_bytes, .. })) => {
                    Smallest::SafeAt { bytes: *size_bytes, moves_backup_gpt: false }
                }
                Some((VolumeKind::Unknown, VolumeState::LeftAlone { reason })) => unknown(reason.clone()),
                Some((kind, VolumeState::LeftAlone { reason })) => unknown(format!("it holds {kind}: {reason}")),
                None => unknown("nothing is known of it".to_owned()),
            },
        }
    }
}
