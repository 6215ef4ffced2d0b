//! Whether the bitmap of an NTFS volume knows of every file: no cluster that a record of the file table names may be free.
//!
//! Nothing else protects the bitmap, so all of the file table is read. Records that only continue another are among
//! them, so that attribute lists need not be followed.

use super::record::{IN_USE, Record, flags_of};
use super::{Bitmap, Ntfs};
use crate::guest::window::{Checked, READ_BYTES_MAX, Tick, Window, reason};

/// As much of the bitmap is kept at once: 1 TiB in clusters of 4 KiB. The file table is read once for each such piece.
const PIECE_BYTES: u64 = 32 << 20;

/// Checks every record in use.
pub(super) fn check(ntfs: &Ntfs, window: &Window<'_>, tick: &Tick<'_>) -> Checked<()> {
    let bitmap_bytes = ntfs.clusters.div_ceil(8);
    let mut offset = 0;
    while offset < bitmap_bytes {
        let piece = Piece::read(ntfs, window, offset, PIECE_BYTES.min(bitmap_bytes - offset))?;
        check_piece(ntfs, window, &piece)?;
        offset += PIECE_BYTES;
        tick(0)?;
    }
    Ok(())
}

/// A part of the bitmap.
struct Piece {
    /// The first cluster.
    first: u64,
    bytes: Vec<u8>,
}

impl Piece {
    fn read(ntfs: &Ntfs, window: &Window<'_>, offset: u64, length: u64) -> Checked<Self> {
        let mut bytes = Vec::new();
        match &ntfs.bitmap {
            Bitmap::Here(value) => bytes.clone_from(value), // smaller than a piece: it lies in a record
            Bitmap::Stored(stored) => {
                let mut position = offset;
                while position < offset + length {
                    let count = READ_BYTES_MAX.min(offset + length - position);
                    bytes.extend(ntfs.read_runs(window, &stored.runs, position, count)?);
                    position += count;
                }
            }
        }
        Ok(Self { first: offset * 8, bytes })
    }

    /// Whether all clusters of a run that lie in this piece are used.
    fn are_used(&self, start: u64, count: u64) -> bool {
        let end = (start + count).min(self.first + self.bytes.len() as u64 * 8); // runs lie in the volume
        let mut cluster = start.max(self.first);
        while cluster < end {
            let bit = cluster - self.first;
            let byte =
                usize::try_from(bit / 8).ok().and_then(|index| self.bytes.get(index)).copied().unwrap_or_default();
            // Whole bytes at once, where the run has them.
            if bit.is_multiple_of(8) && end - cluster >= 8 {
                if byte != 0xff {
                    return false;
                }
                cluster += 8;
            } else {
                if byte >> (bit % 8) & 1 == 0 {
                    return false;
                }
                cluster += 1;
            }
        }
        true
    }
}

fn check_piece(ntfs: &Ntfs, window: &Window<'_>, piece: &Piece) -> Checked<()> {
    // A cluster belongs to one file; so all together name no more than there are, and looking at them ends.
    let mut left = ntfs.clusters;
    let record_bytes = usize::try_from(ntfs.record_bytes).unwrap_or(usize::MAX);
    let mut position = 0;
    while position < ntfs.table_bytes {
        let count = READ_BYTES_MAX.min(ntfs.table_bytes - position);
        let records = ntfs.read_runs(window, &ntfs.table, position, count)?;
        for (number, bytes) in (position / ntfs.record_bytes..).zip(records.chunks_exact(record_bytes)) {
            // What was never used has no magic number.
            if !bytes.starts_with(b"FILE") || flags_of(bytes)? & IN_USE == 0 {
                continue;
            }
            let record = Record::any(bytes.to_vec())?;
            for attribute in record.attributes()?.iter().filter(|attribute| attribute.is_elsewhere()) {
                let runs = attribute.stored(ntfs.clusters)?.runs;
                for (place, count) in runs.iter().filter_map(|(place, count)| place.map(|place| (place, *count))) {
                    let Some(rest) = left.checked_sub(count) else {
                        return reason("files share clusters: it needs chkdsk");
                    };
                    left = rest;
                    if !piece.are_used(place, count) {
                        return reason(format!("clusters of file {number} are marked as free: it needs chkdsk"));
                    }
                }
            }
        }
        position += count;
    }
    Ok(())
}
