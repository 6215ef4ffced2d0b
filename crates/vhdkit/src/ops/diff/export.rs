//! Writing an incremental backup: what makes one disk another, to a stream.

use std::io::Write;
use std::ops::Range;

use super::{ChangedBy, DiffTotals, visit_changes};
use crate::error::{Error, ErrorKind, Result};
use crate::format::checksum;
use crate::format::guid::Guid;
use crate::format::increment::{Content, DISK_MAX, Header, PAYLOAD_MAX, Record, Sequence, Side, Totals, ZERO_MAX};
use crate::image::{BlockDevice, Layer};
use crate::ops::Progress;
use crate::ops::buffer::PageBuffer;
use crate::ops::contents::checksum_of;
use crate::ops::segments::data_runs;

/// How to export.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// When a range counts as changed. By allocation more is written, and less is read.
    pub by: ChangedBy,
    /// Add a checksum of what the base holds in every range that is replaced, which reads that: by these a base is known
    /// that has no identity, or another one.
    pub base_checksums: bool,
    /// The identity of the file, for files that must come out the same each time; random when not given.
    pub id: Option<Guid>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { by: ChangedBy::default(), base_checksums: true, id: None }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// What changed.
    pub changes: DiffTotals,
    /// What is in the file.
    pub totals: Totals,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// The header of the file.
    pub header: Header,
}

/// What an increment says about an image: one that is open for reading, or one of its layers with everything beneath.
#[must_use]
pub fn side_of_image(disk: &dyn BlockDevice, layer: &Layer) -> Side {
    let guid = layer.headers().current.data_write_guid;
    Side { data_write_guid: Some(guid), ..side_of_raw(disk) }
}

/// What an increment says about a disk that has no identity.
#[must_use]
pub fn side_of_raw(disk: &dyn BlockDevice) -> Side {
    Side {
        data_write_guid: None,
        disk_id: disk.disk_id(),
        size: disk.size(),
        logical_sector_size: disk.logical_sector_size(),
        physical_sector_size: disk.physical_sector_size(),
    }
}

/// Writes what has to be written to `base` to make it `result`, from front to back, so that `out` may be a pipe. The
/// format is that of `docs/incremental.md`. What is in `out` after a failure is no increment, and is not taken for one.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::image::RawDisk;
/// use vhdkit::ops::diff::{ChangedBy, ExportOptions, export, side_of_raw};
/// use vhdkit::storage::MemoryStorage;
///
/// # fn main() -> vhdkit::Result<()> {
/// let disk = |bytes| RawDisk::new(Arc::new(MemoryStorage::from_bytes(bytes)), 512);
/// let (base, result) = (disk(vec![0; 8192])?, disk([vec![0; 4096], vec![1; 4096]].concat())?);
/// let mut increment = Vec::new();
/// let options = ExportOptions { by: ChangedBy::Contents, ..ExportOptions::default() };
/// let report = export((&base, side_of_raw(&base)), (&result, side_of_raw(&result)), &mut increment, &options, &())?;
/// assert_eq!(report.totals.data_bytes, 4096);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`diff`](super::diff), and what stands in the way of writing.
pub fn export(
    base: (&dyn BlockDevice, Side),
    result: (&dyn BlockDevice, Side),
    out: &mut dyn Write,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let ((a, base), (b, result)) = (base, result);
    if base.size > DISK_MAX || result.size > DISK_MAX {
        return Err(Error::new(ErrorKind::Limit, "the disk is too large for an increment"));
    }
    let id = options.id.unwrap_or_else(Guid::random);
    let header = Header { id, has_base_checksums: options.base_checksums, base, result };
    let sequence = Sequence::new(&header);
    let mut writer = Writer { out, sequence, checksum: 0, bytes: 0, a, with_base: options.base_checksums, zeros: 0..0 };
    writer.put(&header.encode())?;
    let mut buffer = PageBuffer::new(usize::try_from(PAYLOAD_MAX).unwrap_or_default());
    let changes = visit_changes(a, b, options.by, progress, &mut |change| {
        // What lies behind the end of the result is cut off with the disk.
        let range = change.range.start.min(b.size())..change.range.end.min(b.size());
        if change.zero { writer.zero(range) } else { writer.data(b, range, &mut buffer) }
    })?;
    let (totals, file_bytes) = writer.finish()?;
    Ok(ExportReport { changes, totals, file_bytes, header })
}

struct Writer<'a> {
    out: &'a mut dyn Write,
    sequence: Sequence,
    /// Of everything that was written.
    checksum: u32,
    bytes: u64,
    a: &'a dyn BlockDevice,
    with_base: bool,
    /// Zeros that were not written yet: more may follow.
    zeros: Range<u64>,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum = checksum::append(self.checksum, bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        self.out.write_all(bytes).map_err(|error| Error::io("cannot write the increment", error))
    }

    fn record(&mut self, range: &Range<u64>, content: Content) -> Result<()> {
        let base_checksum = if self.with_base { Some(checksum_of(self.a, range.clone())?) } else { None };
        let record = Record { offset: range.start, length: range.end - range.start, content, base_checksum };
        let bytes = self.sequence.encode(&record)?;
        self.put(&bytes)
    }

    /// Zeros a range, joined with zeros in front of it.
    fn zero(&mut self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if self.zeros.end != range.start || self.zeros.is_empty() {
            self.give_zeros()?;
            self.zeros.start = range.start;
        }
        self.zeros.end = range.end;
        Ok(())
    }

    fn give_zeros(&mut self) -> Result<()> {
        while !self.zeros.is_empty() {
            let end = self.zeros.end.min(self.zeros.start.saturating_add(ZERO_MAX));
            self.record(&(self.zeros.start..end), Content::Zero)?;
            self.zeros.start = end;
        }
        Ok(())
    }

    /// Writes what the disk holds in a range; long zeros in it as such.
    fn data(&mut self, b: &dyn BlockDevice, range: Range<u64>, buffer: &mut PageBuffer) -> Result<()> {
        let mut at = range.start;
        let mut runs = Vec::new();
        while at < range.end {
            let end = range.end.min((at - at % PAYLOAD_MAX).saturating_add(PAYLOAD_MAX));
            let length = usize::try_from(end - at).unwrap_or_default();
            let piece = buffer.as_mut_slice().get_mut(..length).unwrap_or_default();
            b.read_at(piece, at)?;
            runs.clear();
            data_runs(piece, at, &mut runs);
            let mut position = at;
            for run in &runs {
                self.zero(position..run.start)?;
                self.give_zeros()?;
                let within = usize::try_from(run.start - at).unwrap_or_default()
                    ..usize::try_from(run.end - at).unwrap_or_default();
                let payload = piece.get(within).unwrap_or_default();
                self.record(run, Content::Data(checksum::append(0, payload)))?;
                self.put(payload)?;
                position = run.end;
            }
            self.zero(position..end)?;
            at = end;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(Totals, u64)> {
        self.give_zeros()?;
        let last = self.sequence.encode_last(self.checksum);
        self.put(&last)?;
        self.out.flush().map_err(|error| Error::io("cannot write the increment", error))?;
        Ok((self.sequence.totals(), self.bytes))
    }
}
