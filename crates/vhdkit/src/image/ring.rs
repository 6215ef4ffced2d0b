//! The log while an image is written: where the next entry goes, and making its place real before.
//!
//! ```text
//! ring:  | ... | newest durable entry | next entry -> | ...  |
//! ```
//!
//! An entry takes at most half the ring less one sector, and every entry but the newest is home for certain when the
//! next is written, so the next one never reaches the newest (W-030 to W-033 hold without tail-moving entries).
//!
//! The first entry of a new round is followed by a sector of zeros. QEMU does not compare the numbers of the first two
//! entries of a run: it would take an old entry right behind for the second one, follow the old round once around the
//! ring, and refuse the image.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::header::Header;
use crate::format::log::{
    EntryToLog, PageToLog, SECTOR, SECTOR_BYTES, encode_entry, entry_sectors_max, pages_per_entry,
};
use crate::storage::Storage;

/// Pages of an entry at most, however long the log is: bounds the memory of a commit to 4 MiB.
const PAGES_MAX: u64 = 1024;
/// Holes of the ring are filled in steps of so many bytes; a log is a multiple of them.
const ROOM_STEP: u64 = 64 * 1024;

/// The ring of one log session.
#[derive(Debug)]
pub(super) struct LogRing {
    offset: u64,
    sectors: u64,
    guid: Guid,
    next_sequence: u64,
    /// Where the next entry goes.
    head: u64,
    /// Sectors of the newest entry, which end at `head`.
    newest: u64,
    /// Bytes of the ring, from its start, that are known not to be a hole of the file.
    real: u64,
}

/// Pages that an entry holds at most in a log of so many bytes.
pub(super) const fn pages_max(log_length: u32) -> u64 {
    let half = log_length as u64 / SECTOR / 2;
    let pages = pages_per_entry(half.saturating_sub(1));
    if pages < PAGES_MAX { pages } else { PAGES_MAX }
}

impl LogRing {
    /// A ring that holds nothing of use.
    pub(super) fn new(header: &Header) -> Self {
        let guid = Guid::random();
        // Any start will do; Windows draws one too. Half the range is left to count up.
        let seed = u64::from_le_bytes(Guid::random().stored().first_chunk().copied().unwrap_or_default());
        let sectors = u64::from(header.log_length) / SECTOR;
        Self {
            offset: header.log_offset,
            sectors,
            guid,
            next_sequence: (seed >> 2) + 1,
            head: super::simulation::ring_start() % sectors.max(1),
            newest: 0,
            real: 0,
        }
    }

    pub(super) fn guid(&self) -> Guid {
        self.guid
    }

    /// Sectors that go between the head and the next entry with pages: the empty entry that opens the log.
    fn opening(&self) -> u64 {
        u64::from(self.newest == 0)
    }

    /// Pages that the next entry can hold without meeting a hole of the file.
    pub(super) fn room(&self) -> u64 {
        let length = self.sectors * SECTOR;
        if self.real >= length {
            return u64::MAX; // what wraps goes where the ring is real as well
        }
        pages_per_entry((self.real / SECTOR).saturating_sub(self.head + self.opening()))
    }

    /// Fills the holes of the file where an entry with so many pages goes, so that writing it cannot fail for lack of
    /// space. Nothing that counts is touched.
    pub(super) fn prepare(&mut self, storage: &Arc<dyn Storage>, pages: u64) -> Result<()> {
        let length = self.sectors * SECTOR;
        let end = ((self.head + self.opening() + entry_sectors_max(pages)) * SECTOR).min(length);
        while self.real < end {
            let until = (self.real + ROOM_STEP).min(length);
            let failed =
                |error| Error::io(format!("cannot make room in the log at {:#x}", self.offset + self.real), error);
            let mut position = self.offset + self.real;
            let stop = self.offset + until;
            while position < stop {
                let data = storage.next_data(position..stop).map_err(failed)?.unwrap_or(stop..stop);
                write_zeros(storage, position, data.start.max(position)).map_err(failed)?;
                position = data.end.max(position + 1);
            }
            self.real = until;
        }
        Ok(())
    }

    /// Writes an entry behind the newest one. What was written when it fails is unknown.
    pub(super) fn append(
        &mut self,
        storage: &Arc<dyn Storage>,
        pages: &[PageToLog<'_>],
        flushed_file_offset: u64,
        last_file_offset: u64,
        over_newest: bool,
    ) -> Result<()> {
        let start = if over_newest { (self.head + self.sectors - self.newest) % self.sectors } else { self.head };
        let tail = u32::try_from(start * SECTOR).unwrap_or(u32::MAX); // the ring is at most 1 GiB long
        let entry = EntryToLog {
            log_guid: self.guid,
            sequence_number: self.next_sequence,
            tail,
            flushed_file_offset,
            last_file_offset,
        };
        let fits = |bytes: &Vec<u8>| over_newest || bytes.len() as u64 / SECTOR + self.newest <= self.sectors;
        let bytes = encode_entry(&entry, pages).filter(fits);
        let Some(mut bytes) = bytes else {
            // Admission keeps commits small enough.
            return Err(Error::new(ErrorKind::Limit, format!("{} pages do not fit into the log", pages.len())));
        };
        let sectors = bytes.len() as u64 / SECTOR;
        // Two entries of nearly half a ring leave two sectors between them, so the newest entry stays whole.
        if start < (self.head + self.sectors - self.newest) % self.sectors && sectors + self.newest < self.sectors {
            bytes.extend_from_slice(&[0; SECTOR_BYTES]);
        }
        let to_end = usize::try_from((self.sectors - start) * SECTOR).unwrap_or(usize::MAX);
        let (first, wrapped) = bytes.split_at(to_end.min(bytes.len()));
        let at = self.offset + start * SECTOR;
        let failed = |error| Error::io(format!("cannot write the log at {at:#x}"), error);
        storage.write_at(first, at).map_err(failed)?;
        storage.write_at(wrapped, self.offset).map_err(failed)?;
        self.newest = sectors;
        self.head = (start + self.newest) % self.sectors;
        self.next_sequence += 1; // began below 2^62
        Ok(())
    }
}

/// Writes zeros; holes are to become real, so not by `zero_range`, which may leave them to be filled later.
fn write_zeros(storage: &Arc<dyn Storage>, start: u64, end: u64) -> std::io::Result<()> {
    static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
    let mut position = start;
    while position < end {
        let length = usize::try_from(end - position).unwrap_or(usize::MAX).min(ZEROS.len());
        storage.write_at(ZEROS.get(..length).unwrap_or_default(), position)?;
        position += length as u64; // at most end
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::log::{Ring, find_active_sequence};
    use crate::image::replay::FileRing;
    use crate::storage::MemoryStorage;
    use crate::units::MIB;

    fn header(log_length: u32) -> Header {
        Header {
            sequence_number: 1,
            file_write_guid: Guid::random(),
            data_write_guid: Guid::random(),
            log_guid: Guid::NIL,
            log_version: 0,
            version: 1,
            log_length,
            log_offset: MIB,
        }
    }

    #[test]
    fn half_a_ring_less_one_sector() {
        assert_eq!(pages_max(1 << 20), 126);
        assert_eq!(pages_max(2 << 20), 253);
        assert_eq!(pages_max(1 << 30), 1024);
    }

    /// Every entry is the active sequence by itself once it is there, and leaves the one before whole, wherever it wraps.
    #[test]
    fn the_newest_entry_counts_and_the_one_before_stays_whole() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::with_len(4 * MIB));
        let header = header(1 << 20);
        let mut ring = LogRing::new(&header);
        let page = [7_u8; SECTOR_BYTES];
        let zero = [0_u8; SECTOR_BYTES];
        let (mut before, mut rounds): (Option<(u64, Vec<u8>)>, u32) = (None, 0);
        for round in 0..200_u64 {
            let count = (round * 37 + 3) % 127;
            let pages: Vec<PageToLog<'_>> = (0..count)
                .map(|number| PageToLog {
                    file_offset: 2 * MIB + number * SECTOR,
                    bytes: if (number + round) % 5 == 0 { &zero } else { &page },
                })
                .collect();
            ring.prepare(&storage, count).unwrap();
            let start = ring.head;
            ring.append(&storage, &pages, 4 * MIB, 4 * MIB, false).unwrap();
            let mut reader = FileRing::new(storage.as_ref(), &header);
            assert_eq!(reader.sectors(), 256);
            let active = find_active_sequence(&mut reader, ring.guid()).unwrap().unwrap();
            assert_eq!(active.entries.len(), 1, "round {round}");
            let head = active.head().unwrap();
            assert_eq!((head.start, head.descriptors, head.tail), (start, count, start * SECTOR));
            let read = |at: u64, sectors: u64| -> Vec<u8> {
                (0..sectors)
                    .flat_map(|number| {
                        let mut bytes = [0; SECTOR_BYTES];
                        storage.read_at(&mut bytes, MIB + (at + number) % 256 * SECTOR).unwrap();
                        bytes
                    })
                    .collect()
            };
            if let Some((at, bytes)) = &before {
                assert!(read(*at, bytes.len() as u64 / SECTOR) == *bytes, "round {round} damaged the entry before");
            }
            if before.as_ref().is_some_and(|(at, _)| start < *at) {
                rounds += 1;
                assert!(read(ring.head, 1) == zero, "round {round}: an old entry may follow");
            }
            before = Some((start, read(start, ring.newest)));
        }
        assert!(rounds > 20);
    }
}
