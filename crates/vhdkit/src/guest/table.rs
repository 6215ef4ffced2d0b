//! Which partition table a disk has, and what lies in it.

use std::ops::Range;

use super::gpt;
use super::known::{self, VolumeKind};
use super::mbr::{self, RawRecord};
use super::window::{Checked, Trouble, Window, parse, reason, require};
use crate::format::guid::Guid;

/// The partition table of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Table {
    /// There is none: the disk is a volume itself, or empty, or unknown.
    None,
    /// A master boot record.
    Mbr,
    /// A GUID partition table whose primary copy is in order.
    Gpt {
        /// Whether the backup is where the primary says, in order, and says the same.
        backup_ok: bool,
        /// Where the sector of the backup header begins, as the primary says, in bytes; it may lie past the end of the disk.
        backup_offset: u64,
        /// Bytes that a backup takes at the end of the disk: entries and header.
        backup_bytes: u64,
        /// Where partitions may begin, in bytes.
        usable_from: u64,
    },
    /// There is something like one, and it is not safe to follow it.
    Unusable {
        /// Why: a sentence without a full stop.
        reason: String,
    },
}

impl Table {
    /// Bytes that the backup of a GPT takes at the end of the disk.
    pub(crate) const fn backup_bytes(&self) -> u64 {
        match self {
            Self::Gpt { backup_bytes, .. } => *backup_bytes,
            _ => 0,
        }
    }
}

/// What the partition table says of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionInfo {
    /// Its number, from 1; logical partitions from 5.
    pub number: u32,
    /// What it is said to be.
    pub kind: PartitionType,
    /// Its name in a GPT, escaped for printing.
    pub name: String,
}

/// What a partition is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartitionType {
    /// In a master boot record.
    Mbr {
        /// The type.
        kind: u8,
    },
    /// In a GPT.
    Gpt {
        /// The type.
        kind: Guid,
        /// The identity of the partition.
        identity: Guid,
    },
}

/// A partition of either kind of table.
#[derive(Clone, Debug)]
pub(super) struct Partition {
    pub(super) range: Range<u64>,
    pub(super) info: PartitionInfo,
}

/// What was found at the beginning and the end of a disk.
pub(super) struct Found {
    pub(super) table: Table,
    pub(super) partitions: Vec<Partition>,
    pub(super) remarks: Vec<String>,
    /// Where the last thing that the table describes ends, in bytes.
    pub(super) end: u64,
}

impl Found {
    const fn nothing(table: Table) -> Self {
        Self { table, partitions: Vec::new(), remarks: Vec::new(), end: 0 }
    }
}

/// Looks for a partition table on a disk, on which these signatures lie.
pub(super) fn find(window: &Window<'_>, sector: u64, signatures: &[VolumeKind]) -> Checked<Found> {
    let found = match look(window, sector, signatures) {
        Err(Trouble::Reason(reason)) => return Ok(Found::nothing(Table::Unusable { reason })),
        other => other?,
    };
    match check_places(window, &found) {
        Err(Trouble::Reason(reason)) => Ok(Found::nothing(Table::Unusable { reason })),
        other => other.map(|()| found),
    }
}

fn look(window: &Window<'_>, sector: u64, signatures: &[VolumeKind]) -> Checked<Found> {
    let start = window.read_some(0, size_of::<RawRecord>() as u64)?;
    let Ok(record) = parse::<RawRecord>(&start, 0) else { return Ok(Found::nothing(Table::None)) };
    let protected = record.has_table() && record.entries.iter().any(|entry| entry.kind == mbr::PROTECTIVE);
    let header_at = |place: u64| Ok(window.read_some(place, 8)? == gpt::SIGNATURE);
    let headers = [sector, window.length().saturating_sub(sector)].map(header_at);
    let has_header = headers.into_iter().collect::<Checked<Vec<bool>>>()?.contains(&true);
    let foreign = if sector == 512 { 4096 } else { 512 };
    if !has_header && header_at(foreign)? {
        return reason(format!(
            "its GPT was made for sectors of {foreign} bytes, and the disk has sectors of {sector}"
        ));
    }
    if !protected {
        require(!has_header, "there is a GPT header, but the first sector does not protect it")?;
        return without_gpt(window, &record, sector, signatures);
    }
    require(!signatures.contains(&VolumeKind::Iso9660), "it is a disc image with a GPT as well")?;
    check_members(signatures)?;
    require(is_protective(&record), "it has a hybrid MBR: partitions in two tables at once")?;
    with_gpt(window, sector)
}

/// Whether a master boot record protects a GPT and does nothing else.
pub(super) fn is_protective(record: &RawRecord) -> bool {
    let mut used = record.entries.iter().filter(|entry| entry.kind != mbr::EMPTY);
    let only = used.next().is_some_and(|entry| entry.kind == mbr::PROTECTIVE && entry.first.get() == 1);
    only && used.next().is_none()
}

fn with_gpt(window: &Window<'_>, sector: u64) -> Checked<Found> {
    let primary = match gpt::Copy::read(window, 1, sector) {
        Err(Trouble::Reason(why)) => return reason(format!("the primary GPT header is damaged: {why}")),
        other => other?,
    };
    let mut remarks = Vec::new();
    let last = window.length() / sector - 1; // a disk with a header has more than one sector
    let other = primary.other_sector();
    let mut backup_ok = true;
    for place in [other, last] {
        match gpt::Copy::read(window, place, sector) {
            Ok(copy) => require(primary.agrees_with(&copy), "its GPT and the backup disagree")?,
            Err(Trouble::Reason(why)) if place == other => {
                backup_ok = false;
                remarks.push(format!("The backup GPT at sector {other} is damaged or missing: {why}."));
            }
            Err(Trouble::Reason(_)) => {} // the backup of a disk that was enlarged lies elsewhere
            Err(failed) => return Err(failed),
        }
    }
    if backup_ok && other < last {
        remarks.push("The backup GPT does not lie at the end of the disk.".to_owned());
    }
    let partitions = primary.partitions()?;
    let end = partitions.iter().map(|partition| partition.range.end).fold(primary.usable_from(), u64::max);
    let table = Table::Gpt {
        backup_ok,
        backup_offset: other.saturating_mul(sector),
        backup_bytes: primary.bytes(),
        usable_from: primary.usable_from(),
    };
    Ok(Found { table, partitions, remarks, end })
}

fn without_gpt(window: &Window<'_>, record: &RawRecord, sector: u64, signatures: &[VolumeKind]) -> Checked<Found> {
    if record.has_empty_table() && signatures.is_empty() {
        return Ok(Found { end: sector, ..Found::nothing(Table::Mbr) });
    }
    if !record.has_table() {
        let odd = record.signature == mbr::SIGNATURE && signatures.is_empty();
        require(!odd, "its first sector is a boot sector of an unknown kind")?;
        return Ok(Found::nothing(Table::None));
    }
    if let Some(kind) = signatures.first() {
        return reason(format!("it has a partition table, but also the signature of {}", kind.name()));
    }
    let found = mbr::read(window, record, sector)?;
    // A link may lie in no partition.
    let clear = |link: &Range<u64>| {
        found.partitions.iter().all(|other| other.range.end <= link.start || other.range.start >= link.end)
    };
    require(found.links.iter().all(clear), "a logical partition overlaps the chain of logical partitions")?;
    let end = found.partitions.iter().map(|partition| partition.range.end).fold(found.extended_end, u64::max);
    Ok(Found { table: Table::Mbr, partitions: found.partitions, remarks: Vec::new(), end })
}

/// Refuses a disk that is as a whole a part of something larger.
fn check_members(signatures: &[VolumeKind]) -> Checked<()> {
    match signatures.iter().find(|kind| known::holds_disks(**kind)) {
        Some(kind) => reason(format!("the disk as a whole has the signature of {}", kind.name())),
        None => Ok(()),
    }
}

/// Partitions lie on the disk and do not overlap.
fn check_places(window: &Window<'_>, found: &Found) -> Checked<()> {
    let mut order: Vec<&Partition> = found.partitions.iter().collect();
    order.sort_by_key(|partition| partition.range.start);
    for partition in &order {
        if partition.range.end > window.length() {
            return reason(format!("partition {} reaches past the end of the disk", partition.info.number));
        }
    }
    for (one, next) in order.iter().zip(order.iter().skip(1)) {
        if next.range.start < one.range.end {
            return reason(format!("partitions {} and {} overlap", one.info.number, next.info.number));
        }
    }
    Ok(())
}
