//! New images.

use std::sync::Arc;

use super::layout::ImagePlan;
use super::writer::{BatStream, Zeroing, clear_and_reserve, write_error, write_structures};
use super::{Progress, advance};
use crate::error::Result;
use crate::format::geometry::BAT_ENTRY_BYTES;
use crate::format::guid::Guid;
use crate::storage::Storage;

/// What kind of disk to make, when it has no parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NewDiskType {
    /// Every block is allocated and mapped from the start.
    Fixed,
    /// Blocks are allocated when they are first written.
    #[default]
    Dynamic,
}

/// How much space of the file is reserved. Of a fixed image that is all of it; of a dynamic or differencing one only
/// the header section, log, metadata and BAT, because its blocks do not exist yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preallocation {
    /// None: the file is sparse.
    #[default]
    None,
    /// The file system reserves the space without writing it.
    Falloc,
    /// Zeros are written.
    Full,
}

/// What the blocks of a new dynamic image say before they are written. Both read as zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Nothing, as Windows makes them.
    #[default]
    NotPresent,
    /// Zero, as QEMU makes them.
    Zero,
}

/// The parent of a new child, as its opener found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewParent {
    /// The parent's data write GUID. All zero identifies nothing: such a parent has to be named on each opening.
    pub data_write_guid: Guid,
    /// The parent's logical sector size, which the child shares.
    pub logical_sector_size: u32,
    /// The parent's physical sector size.
    pub physical_sector_size: u32,
    /// The size of the parent's disk.
    pub disk_size: u64,
    /// The identity that the guest sees.
    pub disk_id: Guid,
    /// The parent relative to the child's directory, in the form of Windows: `.\base.vhdx`.
    pub relative_path: String,
    /// The parent's full path in the form of Windows, where there is one.
    pub absolute_path: Option<String>,
}

/// What a new image is to be.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::ops::create::{CreateOptions, NewDiskType, create};
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
/// let options = CreateOptions { disk_type: NewDiskType::Fixed, ..CreateOptions::new(8 << 20) };
/// create(&storage, &options, &())?;
/// assert_eq!(storage.len().unwrap(), (4 + 8) << 20);
/// # Ok::<(), vhdkit::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, a multiple of the logical sector size; the parent's (or a conversion's source's) if `None`.
    pub size: Option<u64>,
    /// The kind of disk; [`NewDiskType::Dynamic`] with a parent means differencing.
    pub disk_type: NewDiskType,
    /// Makes a differencing disk on this parent.
    pub parent: Option<NewParent>,
    /// A power of two from 1 MiB to 256 MiB; if `None`, as Windows: 32 MiB for dynamic, 2 MiB for other disks.
    pub block_size: Option<u32>,
    /// 512 or 4096; if `None`, the parent's or source's, otherwise 512.
    pub logical_sector_size: Option<u32>,
    /// 512 or 4096; if `None`, the parent's, otherwise 4096.
    pub physical_sector_size: Option<u32>,
    /// A multiple of 1 MiB up to 1 GiB; 0 means 1 MiB.
    pub log_size: u64,
    /// The identity that the guest sees; if `None`, the parent's, otherwise random.
    pub disk_id: Option<Guid>,
    /// Random if `None`.
    pub file_write_guid: Option<Guid>,
    /// Random if `None`.
    pub data_write_guid: Option<Guid>,
    /// Who made the file, for people; at most 256 UTF-16 units.
    pub creator: String,
    /// How much space is reserved.
    pub preallocation: Preallocation,
    /// What blocks say before they are written.
    pub block_state: BlockState,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: None,
            disk_type: NewDiskType::default(),
            parent: None,
            block_size: None,
            logical_sector_size: None,
            physical_sector_size: None,
            log_size: 0,
            disk_id: None,
            file_write_guid: None,
            data_write_guid: None,
            creator: concat!("vhdkit ", env!("CARGO_PKG_VERSION")).to_owned(),
            preallocation: Preallocation::default(),
            block_state: BlockState::default(),
        }
    }
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes, everything else as Windows makes it.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size: Some(size), ..Self::default() }
    }

    /// A differencing disk, in everything as its parent.
    #[must_use]
    pub fn child(parent: NewParent) -> Self {
        Self { parent: Some(parent), ..Self::default() }
    }
}

/// Writes a new image into storage that holds nothing of worth: an empty file, or a block device.
///
/// Where growth does not read as zero, everything that must is zeroed. The file identifier is written last, so that
/// what is there after a failure is not taken for an image. Nothing is synced. With all identifiers given, the bytes
/// are the same on each run.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for options that do not fit, before anything is written;
/// [`Cancelled`](crate::ErrorKind::Cancelled); otherwise what the operating system says.
pub fn create(storage: &Arc<dyn Storage>, options: &CreateOptions, progress: &dyn Progress) -> Result<()> {
    let plan = ImagePlan::new(options)?;
    let storage = storage.as_ref();
    let length = plan.new_length();
    advance(progress, 0, Some(length))?;
    let zeroing = Zeroing::choose(storage, plan.preallocation())?;
    storage.set_len(length).map_err(|error| write_error("cannot give the image its length", error))?;
    clear_and_reserve(storage, 0..length, zeroing, plan.preallocation(), progress)?;
    if !plan.starts_empty() {
        let mut bat = BatStream::new(&plan);
        let entries = plan.geometry().bat_entries();
        bat.fill(storage, entries, &mut |written| {
            let share = u128::from(length) * u128::from(written) / u128::from(entries * BAT_ENTRY_BYTES).max(1);
            advance(progress, u64::try_from(share).unwrap_or(length), Some(length))
        })?;
        bat.flush(storage)?;
    }
    write_structures(storage, &plan)?;
    advance(progress, length, Some(length))
}
