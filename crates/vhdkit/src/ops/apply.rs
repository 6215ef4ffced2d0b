//! Applying an incremental backup to the disk that it was made from.
//!
//! ```text
//! read all of the file: order, counts, every checksum --> judge the target --> nothing is written up to here
//!                                                                                  |
//! the target gets the file's identity -> write, checking each record again -> durable -> it gets the result's identity
//!       \________________________ a crash in here: the same file may be applied again ________/
//! ```
//!
//! The data write GUID of an image names a state of its disk. So an image to which all of an increment was applied gets the
//! data write GUID of the disk that the increment was made for: it holds the same, and the next increment finds it.

mod reader;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::contents::checksum_of;
use super::{Progress, advance};
use crate::error::{Error, ErrorKind, Result};
use crate::format::checksum;
use crate::format::guid::Guid;
use crate::format::increment::{Content, Header, Record, Totals};
use crate::image::{BlockDevice, Image, Layer, RawDisk};
use crate::storage::Storage;
use reader::Reader;

/// What was written is made durable after so many bytes each.
const FLUSH_BYTES: u64 = 256 << 20;

/// What an increment is applied to.
#[derive(Clone, Copy, Debug)]
pub enum ApplyTarget<'a> {
    /// An image that is open for writing, and was not written to yet.
    Image(&'a Image),
    /// The bytes of a raw disk: a file or a block device that can be written.
    Raw(&'a Arc<dyn Storage>),
}

/// What is allowed.
#[derive(Clone, Copy, Debug, Default)]
pub struct ApplyOptions {
    /// Apply it to a disk that is not known to be the base, too. Where the file has checksums of the base, every range that
    /// is replaced must still hold what the base holds there, or what it is to become; the rest is not known.
    pub unknown_base: bool,
    /// Together with `unknown_base`: do not look at what is there. For going on after an apply that was cut.
    pub resume: bool,
}

/// Why the target is taken for the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Its data write GUID is that of the base.
    Identity,
    /// An apply of this very file to it was begun and not finished.
    Begun,
    /// Its data write GUID is that of the result: there is nothing to do.
    Done,
    /// Every range that is replaced holds what the base holds, or what it is to become.
    Contents,
    /// Nothing is known; the caller wants it.
    Nothing,
}

impl Basis {
    /// A stable name for scripts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Begun => "begun",
            Self::Done => "done",
            Self::Contents => "contents",
            Self::Nothing => "nothing",
        }
    }
}

/// What an increment holds; all of it was read, and every checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IncrementSummary {
    /// Its header.
    pub header: Header,
    /// Its records in numbers.
    pub totals: Totals,
    /// Its bytes.
    pub file_bytes: u64,
}

/// Reads all of an increment, and checks everything in it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when it is none, [`ErrorKind::Truncated`] and [`ErrorKind::Corrupt`] when it is cut off or
/// damaged, [`ErrorKind::Cancelled`], and what stands in the way of reading.
pub fn read_increment(file: &dyn Storage, progress: &dyn Progress) -> Result<IncrementSummary> {
    let mut reader = Reader::new(file)?;
    let total = reader.file_bytes();
    while reader.next()?.is_some() {
        advance(progress, reader.position(), Some(total))?;
    }
    Ok(IncrementSummary { header: *reader.header(), totals: reader.totals(), file_bytes: total })
}

/// An increment that may be applied: it is whole, and the target is the right one.
#[derive(Debug)]
pub struct ApplyPlan<'a> {
    file: &'a dyn Storage,
    target: ApplyTarget<'a>,
    summary: IncrementSummary,
    basis: Basis,
}

/// Reads all of an increment and judges the target. Nothing is written, to neither.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::AtomicU64;
/// use vhdkit::image::RawDisk;
/// use vhdkit::ops::apply::{ApplyOptions, ApplyTarget, plan_apply};
/// use vhdkit::ops::diff::{ChangedBy, ExportOptions, export, side_of_raw};
/// use vhdkit::storage::{MemoryStorage, Storage};
///
/// # fn main() -> vhdkit::Result<()> {
/// let target: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(vec![0; 8192]));
/// let wanted: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes([vec![0; 4096], vec![1; 4096]].concat()));
/// let (base, result) = (RawDisk::new(Arc::clone(&target), 512)?, RawDisk::new(wanted, 512)?);
/// let mut increment = Vec::new();
/// let options = ExportOptions { by: ChangedBy::Contents, ..ExportOptions::default() };
/// export((&base, side_of_raw(&base)), (&result, side_of_raw(&result)), &mut increment, &options, &())?;
///
/// let file = MemoryStorage::from_bytes(increment);
/// let options = ApplyOptions { unknown_base: true, ..ApplyOptions::default() }; // raw disks have no identity
/// let plan = plan_apply(&file, ApplyTarget::Raw(&target), &options, &())?;
/// plan.run(&AtomicU64::new(0), &())?;
/// let mut byte = [0];
/// target.read_at(&mut byte, 8191).expect("memory can be read");
/// assert_eq!(byte, [1]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`read_increment`]; [`ErrorKind::Refused`] when the target is not the base, or has another size than the result.
pub fn plan_apply<'a>(
    file: &'a dyn Storage,
    target: ApplyTarget<'a>,
    options: &ApplyOptions,
    progress: &dyn Progress,
) -> Result<ApplyPlan<'a>> {
    let summary = read_increment(file, progress)?;
    let header = &summary.header;
    let basis = match target {
        ApplyTarget::Image(image) => {
            check_size(image.size(), header, true)?;
            let sector = image.logical_sector_size();
            if sector != header.result.logical_sector_size {
                let wanted = header.result.logical_sector_size;
                let what = format!("the disk has logical sectors of {sector} bytes, the increment is for {wanted}");
                return Err(refused(what, "apply it to the image that it was made from, or to a copy of that"));
            }
            judge_image(file, image, header, options, progress)?
        }
        ApplyTarget::Raw(storage) => {
            check_size(RawDisk::new(Arc::clone(storage), 512)?.size(), header, false)?;
            if !options.unknown_base {
                let what = "the target is a raw disk, which has no identity: it cannot be known whether it is the base";
                return Err(refused(what, "if you know that it is, say --force; what is replaced is compared first"));
            }
            judge_contents(file, target, options, progress)?
        }
    };
    Ok(ApplyPlan { file, target, summary, basis })
}

fn refused(what: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::new(ErrorKind::Refused, what).with_hint(hint)
}

fn check_size(size: u64, header: &Header, is_image: bool) -> Result<()> {
    let wanted = header.result.size;
    if size == wanted {
        return Ok(());
    }
    let what = format!("the disk has {size} bytes, with the increment it has {wanted}");
    if size != header.base.size {
        return Err(refused(what, "apply it to the disk that it was made from, or to a copy of that"));
    }
    let resize = if is_image { "vhdkit resize TARGET" } else { "truncate TARGET --size" };
    let hint = format!("run `{resize} {wanted}` first, then apply with --force: its identity is new then");
    Err(refused(what, hint))
}

fn data_write_guid(image: &Image) -> Option<Guid> {
    image.layers().first().map(|layer: &Layer| layer.headers().current.data_write_guid)
}

fn judge_image(
    file: &dyn Storage,
    image: &Image,
    header: &Header,
    options: &ApplyOptions,
    progress: &dyn Progress,
) -> Result<Basis> {
    let found = data_write_guid(image).filter(|guid| !guid.is_nil());
    if found.is_some() && found == header.base.data_write_guid {
        // The identity stays the same in a whole session of writing: a copy from the middle of one has it, too.
        if options.unknown_base && options.resume {
            return Ok(Basis::Nothing); // what it holds is not known, and the result is not that of the increment
        }
        judge_contents(file, ApplyTarget::Image(image), options, progress)?;
        return Ok(Basis::Identity);
    }
    if found == Some(header.id) {
        return Ok(Basis::Begun);
    }
    if found.is_some() && found == header.result.data_write_guid {
        return Ok(Basis::Done);
    }
    if options.unknown_base {
        return judge_contents(file, ApplyTarget::Image(image), options, progress);
    }
    let shown = |guid: Option<Guid>| guid.map_or_else(|| "none".to_owned(), |guid| guid.to_string());
    let what = match header.base.data_write_guid {
        Some(base) => format!(
            "the target is not what the increment was made from: its data write GUID is {}, the base had {base}",
            shown(found)
        ),
        None => "the increment was made from a raw disk, which has no identity".to_owned(),
    };
    let hint =
        "apply the increments before this one first; if you know that the disk holds what the base held, say --force";
    Err(refused(what, hint))
}

/// Whether every range that is replaced holds what the base holds, or what it is to become.
fn judge_contents(
    file: &dyn Storage,
    target: ApplyTarget<'_>,
    options: &ApplyOptions,
    progress: &dyn Progress,
) -> Result<Basis> {
    let mut reader = Reader::new(file)?;
    if options.resume || !reader.header().has_base_checksums {
        return Ok(Basis::Nothing);
    }
    let total = reader.file_bytes();
    let disk = target.disk()?;
    while let Some((record, _)) = reader.next()? {
        let range = record.offset..record.end();
        let found = checksum_of(disk.device(), range.clone())?;
        if record.base_checksum != Some(found) && result_checksum(&record) != found {
            let Range { start, end } = range;
            let what =
                format!("from {start:#x} to {end:#x} the disk holds neither what the base held nor what it is to hold");
            let hint = "it is not the base; if an earlier apply of this file to it was cut, say --force --resume";
            return Err(refused(what, hint));
        }
        advance(progress, reader.position(), Some(total))?;
    }
    Ok(Basis::Contents)
}

fn result_checksum(record: &Record) -> u32 {
    match record.content {
        Content::Data(checksum) => checksum,
        Content::Zero => checksum::append_zeros(0, record.length),
    }
}

/// A target to read from.
enum Readable<'a> {
    Image(&'a Image),
    Raw(RawDisk),
}

impl Readable<'_> {
    fn device(&self) -> &dyn BlockDevice {
        match self {
            Self::Image(image) => *image,
            Self::Raw(raw) => raw,
        }
    }
}

impl<'a> ApplyTarget<'a> {
    /// What the target holds, for reading.
    fn disk(self) -> Result<Readable<'a>> {
        match self {
            Self::Image(image) => Ok(Readable::Image(image)),
            Self::Raw(storage) => RawDisk::new(Arc::clone(storage), 512).map(Readable::Raw),
        }
    }

    fn write(self, record: &Record, payload: &[u8]) -> Result<()> {
        let range = record.offset..record.end();
        match (self, record.content) {
            (Self::Image(image), Content::Data(_)) => image.write_at(payload, record.offset),
            (Self::Image(image), Content::Zero) => image.write_zeroes(range, true),
            (Self::Raw(storage), Content::Data(_)) => {
                let wrote = storage.write_at(payload, record.offset);
                wrote.map_err(|error| Error::io(format!("cannot write at {:#x}", record.offset), error))
            }
            (Self::Raw(storage), Content::Zero) => {
                let zeroed = match storage.punch_hole(range.clone()) {
                    Ok(false) => storage.zero_range(range),
                    other => other.map(|_| ()),
                };
                zeroed.map_err(|error| Error::io(format!("cannot zero at {:#x}", record.offset), error))
            }
        }
    }

    fn flush(self) -> Result<()> {
        match self {
            Self::Image(image) => image.flush(),
            Self::Raw(storage) => {
                storage.sync().map_err(|error| Error::io("cannot bring the data to the medium", error))
            }
        }
    }
}

impl ApplyPlan<'_> {
    /// What is applied.
    #[must_use]
    pub fn summary(&self) -> &IncrementSummary {
        &self.summary
    }

    /// Why the target is taken for the base.
    #[must_use]
    pub fn basis(&self) -> Basis {
        self.basis
    }

    /// Whether the target is the result afterwards, in all that a guest can see: it was known to be the base, and has the
    /// result's disk identity and sector sizes. Then it gets the result's data write GUID, otherwise a new one.
    #[must_use]
    pub fn becomes_result(&self) -> bool {
        let result = &self.summary.header.result;
        let is_known = matches!(self.basis, Basis::Identity | Basis::Begun | Basis::Done);
        match self.target {
            ApplyTarget::Image(image) => {
                is_known
                    && result.data_write_guid.is_some_and(|guid| !guid.is_nil())
                    && image.disk_id().filter(|id| !id.is_nil()) == result.disk_id
                    && image.physical_sector_size() == result.physical_sector_size
            }
            ApplyTarget::Raw(_) => false,
        }
    }

    /// Writes what the increment holds, makes it durable, and closes an image, which then has the data write GUID that
    /// [`ApplyPlan::becomes_result`] says. With [`Basis::Done`] nothing is done. `written`
    /// counts the bytes of the disk that were written or zeroed.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`], and when the file changed meanwhile. The target is between base and result then: an
    /// image that was known to be the base is recognised when the same file is applied again ([`Basis::Begun`]), anything
    /// else needs [`ApplyOptions::resume`].
    pub fn run(&self, written: &AtomicU64, progress: &dyn Progress) -> Result<()> {
        if self.basis == Basis::Done {
            return Ok(());
        }
        let is_known = matches!(self.basis, Basis::Identity | Basis::Begun);
        let identity = match self.target {
            ApplyTarget::Image(image) if is_known => Some((image, self.summary.header.result.data_write_guid)),
            _ => None,
        };
        if let Some((image, _)) = identity {
            image.start_as(self.summary.header.id)?;
        }
        self.write_all(written, progress).map_err(|error| self.with_way_on(error))?;
        match (self.target, identity) {
            (ApplyTarget::Image(_), Some((image, result))) => {
                let result = result.filter(|_| self.becomes_result());
                image.close_as(result.unwrap_or_else(Guid::random)).map_err(|error| self.with_way_on(error))
            }
            (ApplyTarget::Image(image), None) => image.close(),
            (ApplyTarget::Raw(_), _) => Ok(()),
        }
    }

    fn write_all(&self, written: &AtomicU64, progress: &dyn Progress) -> Result<()> {
        let mut reader = Reader::new(self.file)?;
        let changed = || {
            let what = "the increment was changed while it was applied";
            Error::new(ErrorKind::Corrupt, what)
        };
        if *reader.header() != self.summary.header || reader.file_bytes() != self.summary.file_bytes {
            return Err(changed());
        }
        let total = reader.file_bytes();
        let mut flush_at = FLUSH_BYTES;
        while let Some((record, payload)) = reader.next()? {
            self.target.write(&record, payload)?;
            let done = written.fetch_add(record.length, Ordering::Relaxed).saturating_add(record.length);
            if done >= flush_at {
                self.target.flush()?;
                flush_at = done.saturating_add(FLUSH_BYTES);
            }
            advance(progress, reader.position(), Some(total))?;
        }
        if reader.totals() != self.summary.totals {
            return Err(changed());
        }
        self.target.flush()
    }

    /// Says how to go on from the middle.
    fn with_way_on(&self, error: Error) -> Error {
        let again = match (self.target, self.basis) {
            (ApplyTarget::Image(_), Basis::Identity | Basis::Begun) => "apply the same file again (with --replay)",
            _ => "apply the same file again with --force --resume",
        };
        error.with_hint(format!("the target is neither the base nor the result now: {again} to go on"))
    }

    /// Compares what the target holds in every range that was replaced with the increment. For a target that is open for
    /// reading again, or still.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where they differ; otherwise what stands in the way of reading.
    pub fn verify(&self, progress: &dyn Progress) -> Result<()> {
        let mut reader = Reader::new(self.file)?;
        let total = reader.file_bytes();
        let disk = self.target.disk()?;
        while let Some((record, _)) = reader.next()? {
            if checksum_of(disk.device(), record.offset..record.end())? != result_checksum(&record) {
                let what =
                    format!("from {:#x} to {:#x} the disk does not hold what was written", record.offset, record.end());
                return Err(Error::new(ErrorKind::Corrupt, what).with_hint(
                    "the medium or the memory of this machine is faulty, or somebody else writes the file",
                ));
            }
            advance(progress, reader.position(), Some(total))?;
        }
        Ok(())
    }
}
