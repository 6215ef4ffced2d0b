//! Where everything goes in a new image: options in, offsets and bytes out, no I/O.
//!
//! ```text
//! tables first:  | header section | log | metadata | BAT | payload blocks ...            (as Windows lays files out)
//! tables behind: | header section | log | payload blocks ... | metadata | BAT |         (a stream of unknown length)
//! ```

use std::ops::Range;

use super::create::{BlockState, CreateOptions, NewDiskType, NewParent, Preallocation};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::geometry::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, BatSlot, Geometry};
use crate::format::guid::Guid;
use crate::format::header::{Header, LOG_BYTES_MAX, VERSION};
use crate::format::ident::{CREATOR_UNITS_MAX, RawFileIdentifier};
use crate::format::locator::{KEY_ABSOLUTE_PATH, KEY_RELATIVE_PATH, ParentLocator};
use crate::format::metadata::{self, DiskType, HAS_PARENT, ITEM_BYTES_MAX, LEAVE_BLOCKS_ALLOCATED, NewMetadata};
use crate::format::region::{self, BAT_GUID, METADATA_GUID, Region};
use crate::format::{DISK_SIZE_MAX, HEADER_SECTION_BYTES};
use crate::units::{BatIndex, BlockIndex, FileOffset, MIB, is_aligned, round_up};

/// The log that a new image gets unless told otherwise, as Windows makes it.
const LOG_BYTES_DEFAULT: u64 = MIB;
/// Block size of a new dynamic image, as Windows makes it.
const BLOCK_SIZE_DYNAMIC: u32 = 32 << 20;
/// Block size of a new fixed or differencing image, as Windows makes them.
const BLOCK_SIZE_FIXED_OR_CHILD: u32 = 2 << 20;
/// The sequence number of the first header copy of a new image; the second has the next one.
const FIRST_SEQUENCE: u64 = 1;

/// A new image, checked and laid out, with every identifier chosen.
#[derive(Clone, Debug)]
pub struct ImagePlan {
    geometry: Geometry,
    disk_type: DiskType,
    block_state: BlockState,
    preallocation: Preallocation,
    physical_sector_size: u32,
    disk_id: Guid,
    file_write_guid: Guid,
    data_write_guid: Guid,
    creator: String,
    log_length: u32,
    /// The used part of the metadata region.
    metadata: Vec<u8>,
    metadata_offset: u64,
    bat_offset: u64,
    payload_offset: u64,
}

impl ImagePlan {
    /// Checks the options and lays the image out as Windows does.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] with what is wrong, and what would be right.
    pub fn new(options: &CreateOptions) -> Result<Self> {
        let mut plan = Self::checked(options)?;
        plan.metadata_offset = plan.log_range().end;
        plan.bat_offset = plan.metadata_range().end;
        plan.payload_offset = plan.bat_range().end;
        Ok(plan)
    }

    /// The same with metadata and BAT behind `data_length` bytes of payload blocks.
    pub(super) fn with_tables_behind(options: &CreateOptions, data_length: u64) -> Result<Self> {
        let mut plan = Self::checked(options)?;
        plan.payload_offset = plan.log_range().end;
        plan.metadata_offset = plan.payload_offset + data_length; // at most 64 TiB of blocks and 1 GiB of log
        plan.bat_offset = plan.metadata_range().end;
        Ok(plan)
    }

    /// Everything but the offsets.
    fn checked(options: &CreateOptions) -> Result<Self> {
        let parent = options.parent.as_ref();
        check_contradictions(options)?;
        let logical = logical_sector_size(options)?;
        let physical = physical_sector_size(options, logical)?;
        let disk_size = disk_size(options, logical)?;
        let (disk_type, default_block_size) = match (parent, options.disk_type) {
            (Some(_), _) => (DiskType::Differencing, BLOCK_SIZE_FIXED_OR_CHILD),
            (None, NewDiskType::Fixed) => (DiskType::Fixed, BLOCK_SIZE_FIXED_OR_CHILD),
            (None, NewDiskType::Dynamic) => (DiskType::Dynamic, BLOCK_SIZE_DYNAMIC),
        };
        let block_size = options.block_size.unwrap_or(default_block_size);
        if !block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size) {
            let message = format!("a block size of {block_size} bytes is not possible");
            return Err(invalid(message).with_hint("give a power of two from 1 MiB to 256 MiB"));
        }
        let geometry = Geometry::new(disk_size, block_size, logical, parent.is_some())
            .ok_or_else(|| invalid(format!("a disk of {disk_size} bytes is not possible")))?;
        if options.creator.encode_utf16().count() > CREATOR_UNITS_MAX {
            return Err(invalid(format!("the creator has more than {CREATOR_UNITS_MAX} UTF-16 units"))
                .with_hint("give a shorter creator text"));
        }
        let disk_id = options.disk_id.or(parent.map(|parent| parent.disk_id)).unwrap_or_else(Guid::random);
        let locator = parent.map(encode_locator).transpose()?;
        let file_flags = match disk_type {
            DiskType::Fixed => LEAVE_BLOCKS_ALLOCATED,
            DiskType::Dynamic => 0,
            DiskType::Differencing => HAS_PARENT,
        };
        let metadata = metadata::encode(&NewMetadata {
            block_size,
            file_flags,
            disk_size,
            logical_sector_size: logical,
            physical_sector_size: physical,
            disk_id,
            parent_locator: locator.as_deref(),
        });
        Ok(Self {
            geometry,
            disk_type,
            block_state: options.block_state,
            preallocation: options.preallocation,
            physical_sector_size: physical,
            disk_id,
            file_write_guid: options.file_write_guid.unwrap_or_else(Guid::random),
            data_write_guid: options.data_write_guid.unwrap_or_else(Guid::random),
            creator: options.creator.clone(),
            log_length: log_length(options.log_size)?,
            metadata,
            metadata_offset: 0,
            bat_offset: 0,
            payload_offset: 0,
        })
    }

    /// The numbers that place every byte of the disk.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The kind of disk.
    #[must_use]
    pub const fn disk_type(&self) -> DiskType {
        self.disk_type
    }

    /// Bytes of a physical sector.
    #[must_use]
    pub const fn physical_sector_size(&self) -> u32 {
        self.physical_sector_size
    }

    /// The identity that the guest sees.
    #[must_use]
    pub const fn disk_id(&self) -> Guid {
        self.disk_id
    }

    /// The identity of what the guest sees; children name it.
    #[must_use]
    pub const fn data_write_guid(&self) -> Guid {
        self.data_write_guid
    }

    /// How space is reserved.
    #[must_use]
    pub const fn preallocation(&self) -> Preallocation {
        self.preallocation
    }

    /// Where the log lies in the file.
    #[must_use]
    pub const fn log_range(&self) -> Range<u64> {
        HEADER_SECTION_BYTES..HEADER_SECTION_BYTES + self.log_length as u64
    }

    /// Where the metadata region lies in the file.
    #[must_use]
    pub const fn metadata_range(&self) -> Range<u64> {
        self.metadata_offset..self.metadata_offset + metadata::region_bytes(self.metadata.len() as u64)
    }

    /// Where the BAT lies in the file.
    #[must_use]
    pub const fn bat_range(&self) -> Range<u64> {
        self.bat_offset..self.bat_offset + self.geometry.bat_region_bytes()
    }

    /// Where the first payload block goes.
    #[must_use]
    pub const fn payload_offset(&self) -> u64 {
        self.payload_offset
    }

    /// Bytes of the file without any payload block.
    #[must_use]
    pub const fn tables_length(&self) -> u64 {
        HEADER_SECTION_BYTES
            + self.log_length as u64
            + metadata::region_bytes(self.metadata.len() as u64)
            + self.geometry.bat_region_bytes()
    }

    /// Bytes of the file with every payload block allocated.
    #[must_use]
    pub const fn full_length(&self) -> u64 {
        // At most 64 TiB of blocks and 2 GiB of tables.
        self.tables_length() + self.geometry.payload_blocks() * self.geometry.block_size()
    }

    /// Bytes of the file when it is new.
    #[must_use]
    pub const fn new_length(&self) -> u64 {
        if matches!(self.disk_type, DiskType::Fixed) { self.full_length() } else { self.tables_length() }
    }

    /// Whether every entry that the BAT starts with is 0.
    pub(super) const fn starts_empty(&self) -> bool {
        !matches!(self.disk_type, DiskType::Fixed) && matches!(self.block_state, BlockState::NotPresent)
    }

    /// Where the blocks of a fixed image begin.
    pub(super) const fn fixed_payload_offset(&self) -> Option<u64> {
        if matches!(self.disk_type, DiskType::Fixed) { Some(self.payload_offset) } else { None }
    }

    /// What unallocated blocks say.
    pub(super) const fn block_state(&self) -> BlockState {
        self.block_state
    }

    /// The structures to write, in the order to write them: what makes the file a VHDX comes last.
    pub(super) fn structures(&self) -> Vec<(u64, Vec<u8>)> {
        let regions = [(BAT_GUID, self.bat_range()), (METADATA_GUID, self.metadata_range())].map(|(guid, range)| {
            Region { guid, file_offset: range.start, length: range.end - range.start, required: 1 }
        });
        let table = region::encode(&regions);
        let mut structures = vec![(self.metadata_offset, self.metadata.clone())];
        structures.extend(region::OFFSETS.map(|offset| (offset, table.clone())));
        for (sequence_number, offset) in (FIRST_SEQUENCE..).zip(crate::format::header::OFFSETS) {
            structures.push((offset, self.header(sequence_number).encode().to_vec()));
        }
        let identifier = RawFileIdentifier::new(&self.creator);
        structures.push((0, zerocopy::IntoBytes::as_bytes(&identifier).to_vec()));
        structures
    }

    fn header(&self, sequence_number: u64) -> Header {
        Header {
            sequence_number,
            file_write_guid: self.file_write_guid,
            data_write_guid: self.data_write_guid,
            log_guid: Guid::NIL,
            log_version: 0,
            version: VERSION,
            log_length: self.log_length,
            log_offset: HEADER_SECTION_BYTES,
        }
    }
}

/// The entry of a block that holds no data yet.
pub(super) fn initial_entry(
    geometry: &Geometry,
    fixed_payload_offset: Option<u64>,
    state: BlockState,
    index: BatIndex,
) -> BatEntry {
    let BatSlot::Payload(block) = geometry.slot(index) else { return BatEntry(0) };
    match (fixed_payload_offset, state) {
        (Some(start), _) => BatEntry::new(PayloadState::FullyPresent.number(), fixed_offset(geometry, start, block)),
        (None, BlockState::NotPresent) => BatEntry(0),
        (None, BlockState::Zero) => BatEntry::new(PayloadState::Zero.number(), FileOffset(0)),
    }
}

/// Where a block of a fixed image lies.
const fn fixed_offset(geometry: &Geometry, start: u64, block: BlockIndex) -> FileOffset {
    FileOffset(start + block.0 * geometry.block_size()) // at most 64 TiB behind at most 2 GiB of tables
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

/// Options that contradict each other.
fn check_contradictions(options: &CreateOptions) -> Result<()> {
    let fixed = options.disk_type == NewDiskType::Fixed;
    if options.parent.is_some() {
        if fixed {
            return Err(invalid("a fixed disk cannot have a parent").with_hint("leave out one of the two"));
        }
        if options.block_state == BlockState::Zero {
            return Err(invalid("blocks that start as zero would hide the parent")
                .with_hint("use the block state not-present with a parent"));
        }
    } else if fixed && options.block_state == BlockState::Zero {
        return Err(invalid("a fixed disk has every block allocated, so none can have the state zero")
            .with_hint("leave the block state out; a new fixed disk reads as zero anyway"));
    }
    Ok(())
}

fn logical_sector_size(options: &CreateOptions) -> Result<u32> {
    let parents = options.parent.as_ref().map(|parent| parent.logical_sector_size);
    let logical = options.logical_sector_size.or(parents).unwrap_or(512);
    if logical != 512 && logical != 4096 {
        return Err(
            invalid(format!("a logical sector size of {logical} bytes is not possible")).with_hint("give 512 or 4096")
        );
    }
    match parents {
        Some(parents) if parents != logical => {
            Err(invalid(format!("the logical sector size {logical} differs from the parent's, which is {parents}"))
                .with_hint("leave it out: a child has the logical sector size of its parent"))
        }
        _ => Ok(logical),
    }
}

fn physical_sector_size(options: &CreateOptions, logical: u32) -> Result<u32> {
    let parents = options.parent.as_ref().map(|parent| parent.physical_sector_size);
    let physical = options.physical_sector_size.or(parents).unwrap_or(4096);
    if physical != 512 && physical != 4096 {
        return Err(invalid(format!("a physical sector size of {physical} bytes is not possible"))
            .with_hint("give 512 or 4096"));
    }
    if physical < logical {
        // A parent that says so exists; its child need not repeat it.
        if options.physical_sector_size.is_none() {
            return Ok(logical);
        }
        return Err(invalid(format!(
            "a physical sector of {physical} bytes cannot hold a logical sector of {logical} bytes"
        ))
        .with_hint("give 4096 for the physical sector size"));
    }
    Ok(physical)
}

fn disk_size(options: &CreateOptions, logical: u32) -> Result<u64> {
    let parents = options.parent.as_ref().map(|parent| parent.disk_size);
    let Some(size) = options.size.or(parents) else {
        return Err(invalid("the size of the disk is missing").with_hint("give a size, such as 64G"));
    };
    if size == 0 {
        return Err(invalid("a disk of 0 bytes is not possible").with_hint("give a size of at least one sector"));
    }
    if size > DISK_SIZE_MAX {
        return Err(invalid(format!("a disk of {size} bytes is not possible")).with_hint("a VHDX holds 64 TiB at most"));
    }
    if !is_aligned(size, u64::from(logical)) {
        let next = round_up(size, u64::from(logical)).unwrap_or(DISK_SIZE_MAX);
        return Err(invalid(format!("the size {size} is not a multiple of the logical sector size {logical}"))
            .with_hint(format!("the next possible size is {next}")));
    }
    Ok(size)
}

fn log_length(asked: u64) -> Result<u32> {
    let length = if asked == 0 { LOG_BYTES_DEFAULT } else { asked };
    u32::try_from(length).ok().filter(|_| is_aligned(length, MIB) && length <= LOG_BYTES_MAX).ok_or_else(|| {
        invalid(format!("a log of {length} bytes is not possible"))
            .with_hint(format!("give a multiple of 1 MiB, at most {} MiB, or 0 for 1 MiB", LOG_BYTES_MAX / MIB))
    })
}

fn encode_locator(parent: &NewParent) -> Result<Vec<u8>> {
    let mut paths = vec![(KEY_RELATIVE_PATH, parent.relative_path.as_str())];
    if let Some(absolute) = &parent.absolute_path {
        paths.push((KEY_ABSOLUTE_PATH, absolute.as_str()));
    }
    let encoded = ParentLocator::new(parent.data_write_guid, &paths).encode();
    encoded.filter(|bytes| bytes.len() <= usize::try_from(ITEM_BYTES_MAX).unwrap_or(usize::MAX)).ok_or_else(|| {
        invalid("a path of the parent is empty, or too long to be stored")
            .with_hint("move the parent to a shorter path")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GIB, TIB};

    fn plan(change: impl FnOnce(&mut CreateOptions)) -> Result<ImagePlan> {
        let mut options = CreateOptions::new(GIB);
        change(&mut options);
        ImagePlan::new(&options)
    }

    fn parent() -> NewParent {
        NewParent {
            data_write_guid: Guid::from_printed(7),
            logical_sector_size: 4096,
            physical_sector_size: 4096,
            disk_size: 3 * GIB,
            disk_id: Guid::from_printed(8),
            relative_path: ".\\base.vhdx".to_owned(),
            absolute_path: None,
        }
    }

    #[test]
    fn an_empty_dynamic_image_is_laid_out_as_windows_does() {
        let plan = plan(|_| ()).unwrap();
        assert_eq!(plan.log_range(), MIB..2 * MIB);
        assert_eq!(plan.metadata_range(), 2 * MIB..3 * MIB);
        assert_eq!(plan.bat_range(), 3 * MIB..4 * MIB);
        assert_eq!((plan.payload_offset(), plan.new_length()), (4 * MIB, 4 * MIB));
        assert_eq!(plan.geometry().block_size(), 32 * MIB);
        assert_eq!(plan.physical_sector_size(), 4096);
    }

    #[test]
    fn the_largest_disk_fits_its_offsets() {
        let plan = plan(|options| {
            options.size = Some(64 * TIB);
            options.block_size = Some(1 << 20);
            options.disk_type = NewDiskType::Fixed;
            options.log_size = LOG_BYTES_MAX;
        })
        .unwrap();
        assert_eq!(plan.new_length(), 64 * TIB + (1 + 1024 + 1 + 513) * MIB);
    }

    #[test]
    fn a_child_takes_after_its_parent() {
        let plan = ImagePlan::new(&CreateOptions::child(parent())).unwrap();
        assert_eq!(plan.geometry().disk_size(), 3 * GIB);
        assert_eq!(plan.geometry().logical_sector_size(), 4096);
        assert_eq!(plan.geometry().block_size(), 2 * MIB);
        assert_eq!(plan.disk_id(), Guid::from_printed(8));
        assert_eq!(plan.disk_type(), DiskType::Differencing);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let long = "x".repeat(CREATOR_UNITS_MAX + 1);
        let cases: Vec<(&str, Result<ImagePlan>)> = vec![
            ("0 bytes", plan(|options| options.size = Some(0))),
            ("missing", plan(|options| options.size = None)),
            ("64 TiB", plan(|options| options.size = Some(64 * TIB + 512))),
            ("next possible size is 1024", plan(|options| options.size = Some(513))),
            ("power of two", plan(|options| options.block_size = Some(3 << 20))),
            ("power of two", plan(|options| options.block_size = Some(1 << 19))),
            ("power of two", plan(|options| options.block_size = Some(1 << 29))),
            ("multiple of 1 MiB", plan(|options| options.log_size = 4096)),
            ("multiple of 1 MiB", plan(|options| options.log_size = LOG_BYTES_MAX + MIB)),
            ("512 or 4096", plan(|options| options.logical_sector_size = Some(520))),
            ("512 or 4096", plan(|options| options.physical_sector_size = Some(1024))),
            (
                "cannot hold",
                plan(|options| {
                    options.logical_sector_size = Some(4096);
                    options.physical_sector_size = Some(512);
                }),
            ),
            (
                "differs from the parent's",
                plan(|options| {
                    options.parent = Some(parent());
                    options.logical_sector_size = Some(512);
                }),
            ),
            (
                "cannot have a parent",
                plan(|options| {
                    options.parent = Some(parent());
                    options.disk_type = NewDiskType::Fixed;
                }),
            ),
            (
                "hide the parent",
                plan(|options| {
                    options.parent = Some(parent());
                    options.block_state = BlockState::Zero;
                }),
            ),
            (
                "every block allocated",
                plan(|options| {
                    options.disk_type = NewDiskType::Fixed;
                    options.block_state = BlockState::Zero;
                }),
            ),
            ("UTF-16", plan(|options| options.creator = long)),
            (
                "path of the parent",
                plan(|options| {
                    options.parent = Some(NewParent { relative_path: String::new(), ..parent() });
                }),
            ),
        ];
        for (expected, result) in cases {
            let error = result.unwrap_err();
            let text = format!("{error} | {}", error.hint().unwrap_or_default());
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{text}");
            assert!(text.contains(expected), "{text} does not say {expected}");
            assert!(error.hint().is_some(), "{text}");
        }
    }
}
