//! What changed between two disks, from their tables as far as these tell.
//!
//! ```text
//!   a:  |  layer 1  |  layer 1  | nothing | layer 2 |        walked together; where both take the same place of
//!   b:  |  layer 1  |  layer 0  |  zero   | nothing |        the same file, or both are zero, nothing changed, and
//!            same      changed     same     zeroed           nothing is read
//! ```

mod export;
mod walk;

use std::ops::Range;

use super::Progress;
use super::buffer::PageBuffer;
use super::segments::is_zero;
use crate::error::Result;
use crate::image::BlockDevice;
use crate::units::round_up;
pub use export::{ExportOptions, ExportReport, export, side_of_image, side_of_raw};
use walk::{Part, Walk};

/// Bytes that are compared at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// When a range counts as changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChangedBy {
    /// When the disks take it from different places, and not both have zeros there by their tables: what was written with the
    /// bytes that were there before counts too. No payload is read. For disks of one chain; of others everything is changed.
    #[default]
    Allocation,
    /// When bytes differ: what the tables leave open is read and compared, in units of a sector.
    Contents,
}

/// How to compare.
#[derive(Clone, Copy, Debug)]
pub struct DiffOptions {
    /// When a range counts as changed.
    pub by: ChangedBy,
    /// Ranges that are listed at most; all are counted.
    pub ranges_max: usize,
}

impl Default for DiffOptions {
    fn default() -> Self {
        Self { by: ChangedBy::default(), ranges_max: 1 << 16 }
    }
}

/// A range that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where it is on the disks, in whole sectors.
    pub range: Range<u64>,
    /// The second disk has zeros there by its tables. Otherwise it has data, which may be zeros too.
    pub zero: bool,
}

/// How much changed, and what it took to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffTotals {
    /// Ranges that changed.
    pub ranges: u64,
    /// Bytes that changed.
    pub changed_bytes: u64,
    /// Of these, bytes that are zero in the second disk by its tables.
    pub zeroed_bytes: u64,
    /// Bytes of payload that were read of each disk.
    pub bytes_read: [u64; 2],
}

/// What [`diff`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiffReport {
    /// The changed ranges in the order of the disk, as many as were to be listed.
    pub ranges: Vec<Change>,
    /// All of them in numbers.
    pub totals: DiffTotals,
    /// The sizes of both disks. What only the longer one has is compared with zeros.
    pub sizes: [u64; 2],
}

impl DiffReport {
    /// Whether nothing changed, the sizes included.
    #[must_use]
    pub const fn is_equal(&self) -> bool {
        self.totals.ranges == 0 && self.sizes[0] == self.sizes[1]
    }
}

/// Lists what changed from one disk to another.
///
/// The parent of an image and the image itself are compared by
/// [`LayerDisk::with_parents`](crate::image::LayerDisk::with_parents):
///
/// ```no_run
/// use std::path::Path;
/// use std::sync::Arc;
/// use vhdkit::image::{FileResolver, LayerDisk, OpenOptions};
/// use vhdkit::ops::diff::{DiffOptions, diff};
///
/// # fn main() -> vhdkit::Result<()> {
/// let parents = Arc::new(FileResolver::new().allow_own_directory());
/// let child = Arc::new(OpenOptions::new().parents(parents).open_path(Path::new("child.avhdx"))?);
/// let parent = LayerDisk::with_parents(Arc::clone(&child), 1)?;
/// let report = diff(&parent, &*child, &DiffOptions::default(), &())?;
/// println!("{} bytes changed", report.totals.changed_bytes);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Cancelled`](crate::ErrorKind::Cancelled), and what stands in the way of reading tables or contents.
pub fn diff(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    options: &DiffOptions,
    progress: &dyn Progress,
) -> Result<DiffReport> {
    let mut ranges = Vec::new();
    let totals = visit_changes(a, b, options.by, progress, &mut |change| {
        if ranges.len() < options.ranges_max {
            ranges.push(change.clone());
        }
        Ok(())
    })?;
    Ok(DiffReport { ranges, totals, sizes: [a.size(), b.size()] })
}

/// Whether two disks have a file in common, so that their tables tell what is equal.
#[must_use]
pub fn share_a_file(a: &dyn BlockDevice, b: &dyn BlockDevice) -> bool {
    let files = |disk: &dyn BlockDevice| {
        let storages = (0..crate::image::CHAIN_DEPTH_MAX).map_while(|layer| disk.layer_storage(layer));
        storages.filter_map(|storage| storage.identity()).collect::<Vec<_>>()
    };
    let others = files(b);
    files(a).iter().any(|file| others.contains(file))
}

/// Visits what changed from one disk to another, in the order of the disk; an error of `visit` ends it.
///
/// # Errors
/// As [`diff`], and those of `visit`.
pub fn visit_changes(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    by: ChangedBy,
    progress: &dyn Progress,
    visit: &mut dyn FnMut(&Change) -> Result<()>,
) -> Result<DiffTotals> {
    let size = a.size().max(b.size());
    let unit = u64::from(a.logical_sector_size().min(b.logical_sector_size())).max(512);
    let mut joined = Joined { unit, size, pending: None, totals: DiffTotals::default(), visit };
    let mut buffers = [PageBuffer::new(0), PageBuffer::new(0)];
    if by == ChangedBy::Contents {
        buffers = [(); 2].map(|()| PageBuffer::new(usize::try_from(CHUNK_BYTES).unwrap_or_default()));
    }
    let mut walk = Walk::new(a, b);
    super::advance(progress, 0, Some(size))?;
    while let Some(part) = walk.next(match by {
        ChangedBy::Allocation => size,
        ChangedBy::Contents => CHUNK_BYTES,
    })? {
        if !part.is_same {
            match by {
                ChangedBy::Allocation => joined.add(part.range.clone(), !part.has[1])?,
                ChangedBy::Contents => compare([a, b], &part, &mut buffers, &mut joined)?,
            }
        }
        super::advance(progress, part.range.end, Some(size))?;
    }
    joined.finish()
}

/// Compares what two disks hold in a part of at most [`CHUNK_BYTES`].
fn compare(
    disks: [&dyn BlockDevice; 2],
    part: &Part,
    buffers: &mut [PageBuffer; 2],
    joined: &mut Joined<'_>,
) -> Result<()> {
    let Range { start, end } = part.range;
    let length = usize::try_from(end - start).unwrap_or_default();
    let mut pieces: [&[u8]; 2] = [&[], &[]];
    for (index, ((disk, buffer), piece)) in disks.iter().zip(buffers).zip(&mut pieces).enumerate() {
        let has = part.has.get(index).copied().unwrap_or_default();
        let Some(buffer) = buffer.as_mut_slice().get_mut(..length).filter(|_| has) else { continue };
        disk.read_at(buffer, start)?;
        if let Some(read) = joined.totals.bytes_read.get_mut(index) {
            *read = read.saturating_add(end - start);
        }
        *piece = buffer;
    }
    let [a, b] = pieces;
    let mut at = start;
    while at < end {
        // Up to the next sector of the disk.
        let until = (at - at % joined.unit).saturating_add(joined.unit).min(end);
        let within =
            usize::try_from(at - start).unwrap_or_default()..usize::try_from(until - start).unwrap_or_default();
        let differs = match (a.get(within.clone()), b.get(within)) {
            (Some(one), Some(other)) => one != other,
            (Some(one), None) | (None, Some(one)) => !is_zero(one),
            (None, None) => false,
        };
        if differs {
            joined.add(at..until, !part.has[1])?;
        }
        at = until;
    }
    Ok(())
}

/// Joins neighbours, in whole sectors, and counts.
struct Joined<'a> {
    unit: u64,
    size: u64,
    pending: Option<Change>,
    totals: DiffTotals,
    visit: &'a mut dyn FnMut(&Change) -> Result<()>,
}

impl Joined<'_> {
    fn add(&mut self, range: Range<u64>, zero: bool) -> Result<()> {
        let start = range.start - range.start % self.unit;
        let end = round_up(range.end, self.unit).unwrap_or(self.size).min(self.size);
        // A sector that is zero in part only is data.
        let zero = zero && start == range.start && end == range.end;
        if let Some(pending) = &mut self.pending {
            let is_shared = start < pending.range.end;
            if is_shared || (start == pending.range.end && pending.zero == zero) {
                pending.range.end = pending.range.end.max(end);
                pending.zero = pending.zero && zero;
                return Ok(());
            }
        }
        self.give()?;
        self.pending = Some(Change { range: start..end, zero });
        Ok(())
    }

    fn give(&mut self) -> Result<()> {
        let Some(change) = self.pending.take() else { return Ok(()) };
        let bytes = change.range.end - change.range.start;
        self.totals.ranges = self.totals.ranges.saturating_add(1); // ranges do not overlap: fewer than bytes
        self.totals.changed_bytes = self.totals.changed_bytes.saturating_add(bytes);
        if change.zero {
            self.totals.zeroed_bytes = self.totals.zeroed_bytes.saturating_add(bytes);
        }
        (self.visit)(&change)
    }

    fn finish(mut self) -> Result<DiffTotals> {
        self.give()?;
        Ok(self.totals)
    }
}
