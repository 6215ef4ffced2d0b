//! Whether the log of an XFS is empty: its newest record says that the file system was unmounted.
//!
//! ```text
//! | cycle 7 | 7 | 7 | unmount record, cycle 7 || cycle 6 | 6 | ... | 6 |
//!                                             ^ head: where the cycle falls
//! ```
//!
//! Each sector begins with the number of the cycle that wrote it, so that the head is found by halving; a log that has not
//! been round once ends in zeros.

use std::ops::Range;

use super::Xfs;
use super::raw::{RawLogOperation, RawLogRecord};
use crate::guest::window::{Checked, READ_BYTES_MAX, Window, parse, reason, require};

/// Bytes of a sector of the log, whatever the medium has.
const SECTOR: u64 = 512;
/// The magic number of a record.
const MAGIC: u32 = 0xfeed_babe;
/// `flags` of the operation that is written when unmounting.
const UNMOUNT: u8 = 0x20;
/// Bytes of a record that one sector of its head describes.
const BYTES_PER_HEAD: u64 = 32 << 10;
/// Longest record.
const RECORD_BYTES_MAX: u64 = 256 << 10;
/// As much as may have been under way at once: eight buffers. Sectors this far around the head are looked at one by one.
const UNDER_WAY_SECTORS: u64 = 8 * RECORD_BYTES_MAX / SECTOR;

/// Refuses a log that does not end with an unmount.
pub(super) fn is_clean(xfs: &Xfs, window: &Window<'_>) -> Checked<()> {
    let log = Log {
        window,
        offset: xfs.log_offset,
        sectors: (xfs.log_blocks.end - xfs.log_blocks.start) * xfs.block / SECTOR,
    };
    let head = log.head()?;
    log.check_cycles(head)?;
    let record = log.last_record(head)?;
    let raw: RawLogRecord = window.read_struct(log.place(record))?;
    let version = raw.version.get();
    require(matches!(version, 1 | 2), "the version of its log is not understood")?;
    require(raw.uuid == log_uuid(xfs, window)?, "its log belongs to another file system")?;
    let size = u64::from(raw.size.get());
    let heads =
        if version == 2 { size.div_ceil(BYTES_PER_HEAD).clamp(1, RECORD_BYTES_MAX / BYTES_PER_HEAD) } else { 1 };
    let length = u64::from(raw.length.get());
    require(length > 0 && length <= RECORD_BYTES_MAX, "a record of its log is damaged")?;
    let body = (record + heads) % log.sectors;
    let behind = (record + heads + length.div_ceil(SECTOR)) % log.sectors;
    let operation: RawLogOperation = window.read_struct(log.place(body))?;
    let unmounted = raw.operations.get() == 1 && behind == head && operation.flags & UNMOUNT != 0;
    require(unmounted, "its log has to be replayed: it was not unmounted")
}

/// The identity in the log is the one that users see, also where metadata have another.
fn log_uuid(_: &Xfs, window: &Window<'_>) -> Checked<[u8; 16]> {
    let raw: super::raw::RawSuper = window.read_struct(0)?;
    Ok(raw.uuid)
}

struct Log<'a> {
    window: &'a Window<'a>,
    offset: u64,
    sectors: u64,
}

impl Log<'_> {
    const fn place(&self, sector: u64) -> u64 {
        self.offset + sector * SECTOR // inside the volume, as the log is
    }

    /// The cycle that wrote a sector.
    fn cycle(&self, sector: u64) -> Checked<u32> {
        let bytes = self.window.read(self.place(sector), 8)?;
        cycle_of(&bytes)
    }

    /// The first sector that the next record would be written to.
    fn head(&self) -> Checked<u64> {
        let first = self.cycle(0)?;
        let last = self.cycle(self.sectors - 1)?; // a log has blocks
        require(first != 0, "its log was never written")?;
        if first == last {
            return Ok(0);
        }
        // Sectors before the head have the first cycle.
        let (mut low, mut high) = (0, self.sectors - 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cycle(middle)? == first { low = middle } else { high = middle }
        }
        Ok(high)
    }

    /// Checks that cycles fall at the head and nowhere near it: sectors that were written out of order tell of a crash.
    fn check_cycles(&self, head: u64) -> Checked<()> {
        let newest = self.cycle((head + self.sectors - 1) % self.sectors)?;
        let before = head.saturating_sub(UNDER_WAY_SECTORS)..head;
        let behind = head..(head + UNDER_WAY_SECTORS).min(self.sectors);
        self.all(before, &|cycle| cycle == newest)?;
        if head == 0 {
            // The whole log is of one cycle.
            return self.all(self.sectors.saturating_sub(UNDER_WAY_SECTORS)..self.sectors, &|cycle| cycle == newest);
        }
        let oldest = self.cycle(head)?;
        require(oldest == 0 || oldest == newest.wrapping_sub(1), "the cycles of its log do not follow each other")?;
        self.all(behind, &|cycle| cycle == oldest)
    }

    fn all(&self, sectors: Range<u64>, holds: &dyn Fn(u32) -> bool) -> Checked<()> {
        let mut position = sectors.start;
        while position < sectors.end {
            let count = (sectors.end - position).min(READ_BYTES_MAX / SECTOR);
            let bytes = self.window.read(self.place(position), count * SECTOR)?;
            for sector in bytes.chunks_exact(usize::try_from(SECTOR).unwrap_or_default()) {
                require(holds(cycle_of(sector)?), "its log has to be replayed: it was written to when it stopped")?;
            }
            position += count;
        }
        Ok(())
    }

    /// Looks backwards from the head for the beginning of the newest record.
    fn last_record(&self, head: u64) -> Checked<u64> {
        let most = (RECORD_BYTES_MAX / SECTOR + RECORD_BYTES_MAX / BYTES_PER_HEAD + 1).min(self.sectors);
        for back in 1..=most {
            let sector = (head + self.sectors - back) % self.sectors;
            let bytes = self.window.read(self.place(sector), 4)?;
            if parse::<zerocopy::big_endian::U32>(&bytes, 0)?.get() == MAGIC {
                return Ok(sector);
            }
        }
        reason("its log has no record before its end")
    }
}

/// The cycle of a sector: its first word, or the second one behind the magic number of a record.
fn cycle_of(sector: &[u8]) -> Checked<u32> {
    let first = parse::<zerocopy::big_endian::U32>(sector, 0)?.get();
    if first == MAGIC { Ok(parse::<zerocopy::big_endian::U32>(sector, 4)?.get()) } else { Ok(first) }
}
