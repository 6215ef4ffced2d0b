//! How much space a conversion needs.

use std::ops::Range;

use super::create::CreateOptions;
use super::layout::ImagePlan;
use super::segments::Segments;
use super::{Progress, advance, convert};
use crate::error::Result;
use crate::format::metadata::DiskType;
use crate::image::BlockDevice;
use crate::units::GuestOffset;

/// What [`measure`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeasureReport {
    /// Bytes of the file that a conversion makes. Zeros that stand in the source as data count as data, so that a
    /// conversion that looks for zeros may make a shorter one.
    pub required: u64,
    /// Bytes of the file when every block is allocated.
    pub fully_allocated: u64,
}

/// Tells how long a VHDX made from `source` would be, without reading data.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::image::RawDisk;
/// use vhdkit::ops::create::CreateOptions;
/// use vhdkit::ops::measure::measure;
/// use vhdkit::storage::MemoryStorage;
///
/// let raw = RawDisk::new(Arc::new(MemoryStorage::with_len(1 << 30)), 512)?;
/// let report = measure(&raw, &CreateOptions::default(), &())?;
/// assert_eq!((report.required, report.fully_allocated), (4 << 20, (4 << 20) + (1 << 30)));
/// # Ok::<(), vhdkit::Error>(())
/// ```
///
/// # Errors
/// As [`convert`](super::convert::convert) for a layout that is not possible, and as reading the source.
pub fn measure(source: &dyn BlockDevice, options: &CreateOptions, progress: &dyn Progress) -> Result<MeasureReport> {
    let layout = convert::target_layout(&convert::Source::Disk(source), Some(source.size()), options)?;
    let plan = ImagePlan::new(&layout)?;
    let fully_allocated = plan.full_length();
    if plan.disk_type() == DiskType::Fixed {
        return Ok(MeasureReport { required: fully_allocated, fully_allocated });
    }
    let geometry = plan.geometry();
    let total = Some(source.size());
    let mut segments = Segments::new(source);
    let mut blocks = 0;
    let mut next_block = 0; // blocks before this one are counted
    while segments.peek()?.is_some() {
        let Some(segment) = segments.take(u64::MAX) else { break };
        let Range { start, end } = segment.guest;
        let first = geometry.block_of(GuestOffset(start)).0.max(next_block);
        let behind_last = geometry.block_of(GuestOffset(end - 1)).0 + 1; // segments are not empty
        blocks += behind_last.saturating_sub(first);
        next_block = behind_last.max(next_block);
        advance(progress, end, total)?;
    }
    let required = plan.tables_length() + blocks * geometry.block_size(); // at most fully_allocated
    Ok(MeasureReport { required, fully_allocated })
}
