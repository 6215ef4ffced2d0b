//! Partition tables of the master boot record, with logical partitions.
//!
//! Logical partitions hang on a chain: each link is a sector with one partition, whose place counts from the link, and the
//! next link, whose place counts from the beginning of the extended partition.

use std::mem::offset_of;
use std::ops::Range;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{Partition, PartitionInfo, PartitionType};
use super::window::{Checked, Window, reason, require};

/// The first sector.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawRecord {
    pub(super) code: [u8; 446],
    pub(super) entries: [RawEntry; 4],
    pub(super) signature: [u8; 2],
}

/// One of its entries.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawEntry {
    pub(super) status: u8,
    pub(super) first_address: [u8; 3],
    pub(super) kind: u8,
    pub(super) last_address: [u8; 3],
    pub(super) first: U32,
    pub(super) sectors: U32,
}

const _: () = assert!(
    size_of::<RawRecord>() == 512
        && offset_of!(RawRecord, entries) == 446
        && size_of::<RawEntry>() == 16
        && offset_of!(RawEntry, first) == 8
);

/// The last two bytes of the first sector.
pub(super) const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The type of the entry that protects a GPT.
pub(super) const PROTECTIVE: u8 = 0xee;
/// The type of an entry that stands for nothing.
pub(super) const EMPTY: u8 = 0;
/// The types of an extended partition.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Most logical partitions; Linux names no more than 60.
const LOGICAL_MAX: u32 = 128;
/// The number of the first logical partition, for every system.
const FIRST_LOGICAL: u32 = 5;

impl RawRecord {
    /// Whether the bytes where entries lie can be entries, at least one of which is used.
    pub(super) fn has_table(&self) -> bool {
        self.signature == SIGNATURE
            && self.entries.iter().all(|entry| matches!(entry.status, 0 | 0x80))
            && self.entries.iter().any(|entry| entry.kind != EMPTY)
    }

    /// Whether there are entries, and none is used.
    pub(super) fn has_empty_table(&self) -> bool {
        self.signature == SIGNATURE && self.entries.iter().all(|entry| entry.as_bytes().iter().all(|byte| *byte == 0))
    }
}

/// The partitions of a disk, and the sectors of links, which belong to no partition; in bytes.
pub(super) struct Found {
    pub(super) partitions: Vec<Partition>,
    pub(super) links: Vec<Range<u64>>,
    /// Where the extended partition ends.
    pub(super) extended_end: u64,
}

/// Reads the partitions of a disk whose first sector is given.
pub(super) fn read(window: &Window<'_>, record: &RawRecord, sector: u64) -> Checked<Found> {
    let mut found = Found { partitions: Vec::new(), links: Vec::new(), extended_end: 0 };
    let mut extended: Option<Range<u64>> = None;
    for (number, entry) in (1..).zip(&record.entries) {
        if entry.kind == EMPTY {
            continue;
        }
        let range = entry_range(entry, 0, sector);
        if range.start == 0 || range.is_empty() || range.end > window.length() {
            return reason(format!("partition {number} does not lie on the disk"));
        }
        if EXTENDED.contains(&entry.kind) {
            require(extended.is_none(), "there are two extended partitions")?;
            found.extended_end = range.end;
            extended = Some(range);
        } else {
            found.partitions.push(partition(number, entry, range));
        }
    }
    if let Some(extended) = extended {
        // Nothing else may lie in it, whether or not a logical partition is there.
        let apart = |other: &Partition| other.range.end <= extended.start || other.range.start >= extended.end;
        require(found.partitions.iter().all(apart), "a partition overlaps the extended partition")?;
        logical(window, &extended, sector, &mut found)?;
    }
    Ok(found)
}

fn partition(number: u32, entry: &RawEntry, range: Range<u64>) -> Partition {
    let info = PartitionInfo { number, kind: PartitionType::Mbr { kind: entry.kind }, name: String::new() };
    Partition { range, info }
}

/// The bytes that an entry names, counted from a sector.
fn entry_range(entry: &RawEntry, from: u64, sector: u64) -> Range<u64> {
    let first = from + u64::from(entry.first.get()); // both have 34 bits at most
    first * sector..(first + u64::from(entry.sectors.get())) * sector
}

/// Follows the chain of logical partitions.
fn logical(window: &Window<'_>, extended: &Range<u64>, sector: u64, found: &mut Found) -> Checked<()> {
    let base = extended.start / sector;
    let mut link = extended.start;
    for step in 0..LOGICAL_MAX {
        if link < extended.start || link.saturating_add(sector) > extended.end {
            return reason("the chain of logical partitions leads out of the extended partition");
        }
        let here = link..link + sector;
        require(!found.links.contains(&here), "the chain of logical partitions leads back into itself")?;
        found.links.push(here);
        let record: RawRecord = window.read_struct(link)?;
        require(record.signature == SIGNATURE, "a link of the chain of logical partitions is damaged")?;
        let [first, second, others @ ..] = &record.entries;
        let spare = others.iter().all(|entry| entry.kind == EMPTY);
        require(spare, "a link of the chain of logical partitions has more than two entries")?;
        // The first partition of a chain may have been deleted.
        if first.kind != EMPTY {
            require(!EXTENDED.contains(&first.kind), "a logical partition is extended itself")?;
            let range = entry_range(first, link / sector, sector);
            let inside = range.start > link && range.end <= extended.end && !range.is_empty();
            require(inside, "a logical partition lies outside of the extended partition")?;
            found.partitions.push(partition(FIRST_LOGICAL + step, first, range));
        }
        if second.kind == EMPTY {
            return Ok(());
        }
        require(EXTENDED.contains(&second.kind), "a link of the chain of logical partitions is damaged")?;
        link = entry_range(second, base, sector).start;
    }
    reason("there are more logical partitions than are supported")
}
