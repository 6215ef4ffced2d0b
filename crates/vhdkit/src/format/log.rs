//! The log: a ring of entries, each a set of 4 KiB page images ([MS-VHDX] 2.3).
//!
//! The scan is linear in the ring. A sector is the start of an entry, a further descriptor sector or a data sector, and
//! its first four bytes say which. So two valid entries never share a sector, each is looked at once, and entries that
//! follow each other form disjoint runs. A run counts as a whole: when the Tail of its last entry does not lead to an
//! entry of the run, none of its suffixes counts either, as they end in the same entry.

use std::collections::HashMap;
use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::FIRST_LOGGABLE_BYTE;
use super::checksum::{append, checksum};
use super::finding::{Code, Findings, Location};
use super::guid::Guid;
use super::header::Header;
use crate::error::Result;
use crate::units::{MIB, is_aligned, round_up};

/// Bytes of a log sector and of a page.
pub const SECTOR_BYTES: usize = 4096;
/// The same as a file length.
pub const SECTOR: u64 = 4096;
/// First four bytes of an entry.
pub const ENTRY_SIGNATURE: [u8; 4] = *b"loge";
/// First four bytes of a zero descriptor.
pub const ZERO_SIGNATURE: [u8; 4] = *b"zero";
/// First four bytes of a data descriptor.
pub const DATA_SIGNATURE: [u8; 4] = *b"desc";
/// First four bytes of a data sector.
pub const SECTOR_SIGNATURE: [u8; 4] = *b"data";

/// The header of a log entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawEntryHeader {
    /// `loge`.
    pub signature: [u8; 4],
    /// CRC-32C over the whole entry.
    pub checksum: U32,
    /// Bytes of the whole entry.
    pub entry_length: U32,
    /// Ring offset of the first entry of the sequence that this one ends.
    pub tail: U32,
    /// The previous entry's plus 1.
    pub sequence_number: U64,
    /// Descriptors that follow.
    pub descriptor_count: U32,
    /// Zero.
    pub reserved: U32,
    /// The header's log GUID when the entry was written.
    pub log_guid: Guid,
    /// A file length that was durable.
    pub flushed_file_offset: U64,
    /// A file length that holds everything that was allocated.
    pub last_file_offset: U64,
}

/// A descriptor; what the middle fields mean depends on the signature.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawDescriptor {
    /// `desc` or `zero`.
    pub signature: [u8; 4],
    /// Data: the page's last four bytes. Zero: reserved.
    pub trailing_bytes: [u8; 4],
    /// Data: the page's first eight bytes. Zero: the length.
    pub leading_bytes: [u8; 8],
    /// Where it goes.
    pub file_offset: U64,
    /// The entry's.
    pub sequence_number: U64,
}

/// A data sector.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawDataSector {
    /// `data`.
    pub signature: [u8; 4],
    /// High half of the entry's sequence number.
    pub sequence_high: U32,
    /// The page's bytes 8 to 4091.
    pub data: [u8; 4084],
    /// Low half of the entry's sequence number.
    pub sequence_low: U32,
}

const _: () = assert!(
    size_of::<RawEntryHeader>() == 64
        && offset_of!(RawEntryHeader, entry_length) == 8
        && offset_of!(RawEntryHeader, tail) == 12
        && offset_of!(RawEntryHeader, sequence_number) == 16
        && offset_of!(RawEntryHeader, descriptor_count) == 24
        && offset_of!(RawEntryHeader, reserved) == 28
        && offset_of!(RawEntryHeader, log_guid) == 32
        && offset_of!(RawEntryHeader, flushed_file_offset) == 48
        && offset_of!(RawEntryHeader, last_file_offset) == 56
        && size_of::<RawDescriptor>() == 32
        && offset_of!(RawDescriptor, leading_bytes) == 8
        && offset_of!(RawDescriptor, file_offset) == 16
        && offset_of!(RawDescriptor, sequence_number) == 24
        && size_of::<RawDataSector>() == SECTOR_BYTES
        && offset_of!(RawDataSector, data) == 8
        && offset_of!(RawDataSector, sequence_low) == 4092
);

/// Descriptors in the first sector of an entry, behind its header.
const FIRST_DESCRIPTORS: u64 = 126;
/// Descriptors in every further sector.
const MORE_DESCRIPTORS: u64 = 128;

/// Descriptor sectors of an entry with so many descriptors.
const fn descriptor_sectors(count: u64) -> u64 {
    if count <= FIRST_DESCRIPTORS { 1 } else { 1 + (count - FIRST_DESCRIPTORS).div_ceil(MORE_DESCRIPTORS) }
}

/// Gives the sectors of the ring by number; numbers wrap at the ring's end.
pub trait Ring {
    /// How many sectors the ring has; at least 1.
    fn sectors(&self) -> u64;

    /// The bytes of one sector; `number` is below [`Ring::sectors`].
    ///
    /// # Errors
    /// When reading fails.
    fn sector(&mut self, number: u64) -> Result<&[u8; SECTOR_BYTES]>;
}

/// An entry that is valid by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The sector of the ring that it begins at.
    pub start: u64,
    /// Its sectors.
    pub sectors: u64,
    /// Ring offset of its sequence's first entry.
    pub tail: u64,
    /// Its place in the sequence.
    pub sequence_number: u64,
    /// Its descriptors.
    pub descriptors: u64,
    /// A file length that was durable when it was written.
    pub flushed_file_offset: u64,
    /// A file length that holds everything that was allocated.
    pub last_file_offset: u64,
}

/// The sector `distance` behind `start`, around the ring.
fn around(start: u64, distance: u64, ring: u64) -> u64 {
    (start + distance) % ring // both below the ring's 2^18 sectors
}

/// Reads the header of an entry and checks what it says by itself (E2 to E8).
fn decode_entry_header(sector: &[u8; SECTOR_BYTES], start: u64, ring_sectors: u64, guid: Guid) -> Option<Entry> {
    let (raw, _) = RawEntryHeader::ref_from_prefix(sector).ok()?;
    let length = u64::from(raw.entry_length.get());
    let tail = u64::from(raw.tail.get());
    let descriptors = u64::from(raw.descriptor_count.get());
    let ring_bytes = ring_sectors * SECTOR;
    let sound = raw.signature == ENTRY_SIGNATURE
        && raw.log_guid == guid
        && is_aligned(length, SECTOR)
        && (SECTOR..=ring_bytes).contains(&length)
        && is_aligned(tail, SECTOR)
        && tail < ring_bytes
        && raw.sequence_number.get() > 0
        && raw.reserved.get() == 0
        && descriptor_sectors(descriptors) * SECTOR <= length;
    sound.then(|| Entry {
        start,
        sectors: length / SECTOR,
        tail,
        sequence_number: raw.sequence_number.get(),
        descriptors,
        flushed_file_offset: raw.flushed_file_offset.get(),
        last_file_offset: raw.last_file_offset.get(),
    })
}

/// The descriptors in one sector: the first sector begins with the entry's header.
fn descriptors_in(sector: &[u8; SECTOR_BYTES], first: bool, left: u64) -> impl Iterator<Item = &RawDescriptor> {
    let skip = if first { 2 } else { 0 };
    let (chunks, _) = sector.as_chunks::<32>();
    let take = usize::try_from(left).unwrap_or(usize::MAX);
    chunks.iter().skip(skip).take(take).map(|chunk| zerocopy::transmute_ref!(chunk))
}

/// True when a descriptor is well formed (E10).
fn is_sound(descriptor: &RawDescriptor, sequence_number: u64) -> bool {
    descriptor.sequence_number.get() == sequence_number
        && is_aligned(descriptor.file_offset.get(), SECTOR)
        && match descriptor.signature {
            DATA_SIGNATURE => true,
            ZERO_SIGNATURE => {
                descriptor.trailing_bytes == [0; 4] && is_aligned(u64::from_le_bytes(descriptor.leading_bytes), SECTOR)
            }
            _ => false,
        }
}

/// Reads the entry that begins at a sector; `None` when there is no valid one (E1 to E12). The walk ends at the first
/// sector that does not belong, so structure always fails before the whole of a claimed length is read.
fn decode_entry(ring: &mut dyn Ring, start: u64, guid: Guid) -> Result<Option<Entry>> {
    let ring_sectors = ring.sectors();
    let sector = ring.sector(start)?;
    let Some(entry) = decode_entry_header(sector, start, ring_sectors, guid) else { return Ok(None) };
    let stored = RawEntryHeader::ref_from_prefix(sector).ok().map(|(raw, _)| raw.checksum.get());
    let mut crc = checksum(sector);
    let mut data_sectors = 0_u64;
    let mut left = entry.descriptors;
    let descriptor_sectors = descriptor_sectors(entry.descriptors);
    for number in 0..descriptor_sectors {
        let sector = ring.sector(around(start, number, ring_sectors))?;
        let mut seen = 0;
        for descriptor in descriptors_in(sector, number == 0, left) {
            if !is_sound(descriptor, entry.sequence_number) {
                return Ok(None);
            }
            data_sectors += u64::from(descriptor.signature == DATA_SIGNATURE);
            seen += 1;
        }
        left -= seen; // at most `left` descriptors were taken
        if number > 0 {
            crc = append(crc, sector);
        }
    }
    if entry.sectors != descriptor_sectors + data_sectors {
        return Ok(None);
    }
    for number in descriptor_sectors..entry.sectors {
        let sector = ring.sector(around(start, number, ring_sectors))?;
        let raw: &RawDataSector = zerocopy::transmute_ref!(sector);
        let sequence = u64::from(raw.sequence_high.get()) << 32 | u64::from(raw.sequence_low.get());
        if raw.signature != SECTOR_SIGNATURE || sequence != entry.sequence_number {
            return Ok(None);
        }
        crc = append(crc, sector);
    }
    Ok((stored == Some(crc)).then_some(entry))
}

/// A page to log: where it belongs, and its bytes. A page of zeros needs no data sector.
#[derive(Clone, Copy, Debug)]
pub struct PageToLog<'a> {
    /// Where the page belongs in the file; a multiple of 4 KiB.
    pub file_offset: u64,
    /// What it is to hold.
    pub bytes: &'a [u8; SECTOR_BYTES],
}

/// What an entry says about itself.
#[derive(Clone, Copy, Debug)]
pub struct EntryToLog {
    /// The log GUID of the header.
    pub log_guid: Guid,
    /// The entry's place in the sequence; not 0.
    pub sequence_number: u64,
    /// Ring offset of the sequence's first entry.
    pub tail: u32,
    /// A file length that is durable.
    pub flushed_file_offset: u64,
    /// A file length that holds everything that is allocated once the entry counts.
    pub last_file_offset: u64,
}

/// The sectors that an entry with so many pages takes at most.
#[must_use]
pub const fn entry_sectors_max(pages: u64) -> u64 {
    descriptor_sectors(pages) + pages
}

/// The most pages that always fit into an entry of so many sectors.
#[must_use]
pub const fn pages_per_entry(sectors: u64) -> u64 {
    let mut pages = sectors.saturating_sub(1);
    while pages > 0 && entry_sectors_max(pages) > sectors {
        pages -= 1;
    }
    pages
}

/// The bytes of an entry ([MS-VHDX] 2.3.1), a multiple of 4 KiB, checksum included. `None` when it would have more than
/// 4 GiB.
#[must_use]
pub fn encode_entry(entry: &EntryToLog, pages: &[PageToLog<'_>]) -> Option<Vec<u8>> {
    let count = u32::try_from(pages.len()).ok()?;
    let descriptor_bytes = usize::try_from(descriptor_sectors(u64::from(count)) * SECTOR).ok()?;
    let mut bytes = vec![0; descriptor_bytes];
    let sequence = entry.sequence_number;
    let mut descriptors = Vec::with_capacity(pages.len());
    for page in pages {
        let is_zero = page.bytes.iter().all(|byte| *byte == 0);
        let leading = page.bytes.first_chunk().copied().unwrap_or_default();
        let trailing = page.bytes.last_chunk().copied().unwrap_or_default();
        descriptors.push(RawDescriptor {
            signature: if is_zero { ZERO_SIGNATURE } else { DATA_SIGNATURE },
            trailing_bytes: if is_zero { [0; 4] } else { trailing },
            leading_bytes: if is_zero { SECTOR.to_le_bytes() } else { leading },
            file_offset: page.file_offset.into(),
            sequence_number: sequence.into(),
        });
        if is_zero {
            continue;
        }
        let mut sector = [0; SECTOR_BYTES];
        sector.copy_from_slice(page.bytes);
        let raw: &mut RawDataSector = zerocopy::transmute_mut!(&mut sector);
        raw.signature = SECTOR_SIGNATURE;
        let [high, low] = [sequence >> 32, sequence & 0xffff_ffff].map(|half| u32::try_from(half).unwrap_or_default());
        raw.sequence_high = high.into();
        raw.sequence_low = low.into();
        bytes.extend_from_slice(&sector);
    }
    let mut header = RawEntryHeader {
        signature: ENTRY_SIGNATURE,
        checksum: U32::ZERO,
        entry_length: u32::try_from(bytes.len()).ok()?.into(),
        tail: entry.tail.into(),
        sequence_number: sequence.into(),
        descriptor_count: count.into(),
        reserved: U32::ZERO,
        log_guid: entry.log_guid,
        flushed_file_offset: entry.flushed_file_offset.into(),
        last_file_offset: entry.last_file_offset.into(),
    };
    let fill = |bytes: &mut [u8], header: &RawEntryHeader| {
        let parts = [header.as_bytes(), descriptors.as_bytes()].concat();
        for (to, from) in bytes.iter_mut().zip(parts) {
            *to = from;
        }
    };
    fill(&mut bytes, &header);
    header.checksum = checksum(&bytes).into();
    for (to, from) in bytes.iter_mut().zip(header.as_bytes()) {
        *to = *from;
    }
    Some(bytes)
}

/// The entries to replay, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveSequence {
    /// From the entry that the last one's Tail names to the last one.
    pub entries: Vec<Entry>,
}

impl ActiveSequence {
    /// The newest entry.
    #[must_use]
    pub fn head(&self) -> Option<&Entry> {
        self.entries.last()
    }
}

/// Finds the active sequence of a ring; `None` when there is none.
///
/// # Errors
/// When reading fails.
pub fn find_active_sequence(ring: &mut dyn Ring, guid: Guid) -> Result<Option<ActiveSequence>> {
    let ring_sectors = ring.sectors();
    let mut entries: HashMap<u64, Entry> = HashMap::new();
    let mut position = 0;
    while position < ring_sectors {
        match decode_entry(ring, position, guid)? {
            Some(entry) => {
                entries.insert(position, entry);
                position += entry.sectors;
            }
            None => position += 1,
        }
    }
    let next = |entry: &Entry| {
        let at = around(entry.start, entry.sectors, ring_sectors);
        entries.get(&at).filter(|after| entry.sequence_number.checked_add(1) == Some(after.sequence_number))
    };
    let followers: HashMap<u64, u64> =
        entries.values().filter_map(|entry| next(entry).map(|after| (after.start, entry.start))).collect();
    // Sorted, so that of two runs that end with the same number always the same one wins.
    let mut firsts: Vec<&Entry> = entries.values().filter(|entry| !followers.contains_key(&entry.start)).collect();
    firsts.sort_by_key(|entry| entry.start);
    let mut best: Option<Vec<Entry>> = None;
    for first in firsts {
        let mut run = vec![*first];
        while let Some(after) = run.last().and_then(next) {
            run.push(*after);
        }
        let Some(head) = run.last().copied() else { continue };
        let Some(tail) = run.iter().position(|entry| entry.start * SECTOR == head.tail) else { continue };
        let newest = best.as_ref().and_then(|best| best.last()).map(|best| best.sequence_number);
        if newest.is_none_or(|newest| head.sequence_number > newest) {
            best = Some(run.split_off(tail));
        }
    }
    Ok(best.map(|entries| ActiveSequence { entries }))
}

/// The entries that lead up to `entry` without a gap, oldest first, whether or not they count.
pub(crate) fn entries_before(ring: &mut dyn Ring, entry: &Entry, guid: Guid) -> Result<Vec<Entry>> {
    let mut all = Vec::new();
    for position in 0..ring.sectors() {
        all.extend(decode_entry(ring, position, guid)?);
    }
    let mut before: Vec<Entry> = Vec::new();
    let mut next = *entry;
    while let Some(found) = all.iter().find(|found| {
        around(found.start, found.sectors, ring.sectors()) == next.start
            && found.sequence_number.checked_add(1) == Some(next.sequence_number)
    }) {
        before.insert(0, *found);
        next = *found;
    }
    Ok(before)
}

/// One change that replay makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A page gets new contents.
    Page {
        /// Where the page goes.
        file_offset: u64,
        /// The sector of the ring that holds its bytes 8 to 4091.
        sector: u64,
        /// Its first eight bytes.
        leading: [u8; 8],
        /// Its last four bytes.
        trailing: [u8; 4],
    },
    /// A range becomes zero.
    Zero {
        /// Where the range begins.
        file_offset: u64,
        /// Its bytes.
        length: u64,
    },
}

impl Change {
    /// Where the change begins in the file.
    #[must_use]
    pub const fn file_offset(&self) -> u64 {
        match self {
            Self::Page { file_offset, .. } | Self::Zero { file_offset, .. } => *file_offset,
        }
    }

    /// How many bytes it changes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        match self {
            Self::Page { .. } => SECTOR,
            Self::Zero { length, .. } => *length,
        }
    }
}

/// Puts a page together from its data sector and what its descriptor holds.
#[must_use]
pub fn page(sector: &[u8; SECTOR_BYTES], leading: [u8; 8], trailing: [u8; 4]) -> [u8; SECTOR_BYTES] {
    let mut page = *sector;
    if let Some(start) = page.first_chunk_mut() {
        *start = leading;
    }
    if let Some(end) = page.last_chunk_mut() {
        *end = trailing;
    }
    page
}

/// What a log may do to a file.
#[derive(Clone, Copy, Debug)]
pub struct ReplayLimits {
    /// The file's length before replay.
    pub file_size: u64,
    /// How far beyond that the log may let it grow.
    pub growth_max: u64,
}

/// Growth that a log may ask for unless the caller allows more. A real log extends the file by a few blocks; a hostile
/// one could ask for exabytes.
pub const GROWTH_MAX: u64 = 64 << 30;

/// Walks all changes of a sequence in the order of replay, checking each (V-040, V-047 to V-049, V-055).
///
/// # Errors
/// When a change must not be made, reading fails, the collector stops at a finding, or `apply` fails.
pub fn walk_changes(
    ring: &mut dyn Ring,
    sequence: &ActiveSequence,
    header: &Header,
    limits: ReplayLimits,
    findings: &mut dyn Findings,
    apply: &mut dyn FnMut(&Entry, Change) -> Result<()>,
) -> Result<()> {
    for entry in &sequence.entries {
        check_offsets(entry, header, limits, entry == sequence.entries.last().unwrap_or(entry), findings)?;
    }
    let ring_sectors = ring.sectors();
    for entry in &sequence.entries {
        let mut left = entry.descriptors;
        let mut data = descriptor_sectors(entry.descriptors);
        for number in 0..descriptor_sectors(entry.descriptors) {
            let sector = ring.sector(around(entry.start, number, ring_sectors))?;
            for descriptor in descriptors_in(sector, number == 0, left) {
                left -= 1; // at most `left` descriptors are taken
                let file_offset = descriptor.file_offset.get();
                let change = if descriptor.signature == DATA_SIGNATURE {
                    let sector = around(entry.start, data, ring_sectors);
                    data += 1;
                    let (leading, trailing) = (descriptor.leading_bytes, descriptor.trailing_bytes);
                    Change::Page { file_offset, sector, leading, trailing }
                } else {
                    Change::Zero { file_offset, length: u64::from_le_bytes(descriptor.leading_bytes) }
                };
                check_target(entry, &change, header, findings)?;
                apply(entry, change)?;
            }
        }
    }
    Ok(())
}

fn place(entry: &Entry, header: &Header) -> Location {
    let offset = header.log_offset + entry.start * SECTOR; // inside the log, which lies inside the file
    Location::at(format!("log entry {}", entry.sequence_number), offset)
}

/// Checks the file lengths that an entry records.
fn check_offsets(
    entry: &Entry,
    header: &Header,
    limits: ReplayLimits,
    is_head: bool,
    findings: &mut dyn Findings,
) -> Result<()> {
    let (flushed, last) = (entry.flushed_file_offset, entry.last_file_offset);
    if is_head && limits.file_size < flushed {
        let detail =
            format!("the file had {flushed:#x} bytes when this was written; now it has {:#x}", limits.file_size);
        return Err(findings.fatal(Code::LogFileTruncated, place(entry, header), detail));
    }
    if last > limits.file_size.saturating_add(limits.growth_max) {
        let detail = format!(
            "wants the file to grow from {:#x} to {last:#x} bytes, by more than {:#x}",
            limits.file_size, limits.growth_max
        );
        return Err(findings.fatal(Code::LogGrowth, place(entry, header), detail));
    }
    if !is_aligned(flushed, MIB) || !is_aligned(last, MIB) {
        let detail =
            format!("flushed file offset {flushed:#x} or last file offset {last:#x} is not a multiple of 1 MiB");
        findings.report(Code::LogFileOffsetUnaligned, place(entry, header), detail)?;
    }
    Ok(())
}

/// Checks where a change goes. A violation is fatal: to replay the rest would make up a state that never was.
fn check_target(entry: &Entry, change: &Change, header: &Header, findings: &mut dyn Findings) -> Result<()> {
    let (start, length) = (change.file_offset(), change.length());
    let log_end = header.log_offset + u64::from(header.log_length); // checked with the header
    let limit = round_up(entry.last_file_offset, MIB);
    let Some(end) = start.checked_add(length).filter(|end| limit.is_some_and(|limit| *end <= limit)) else {
        let detail =
            format!("{length:#x} bytes at {start:#x} reach beyond the last file offset {:#x}", entry.last_file_offset);
        return Err(findings.fatal(Code::LogTargetBeyond, place(entry, header), detail));
    };
    if start < FIRST_LOGGABLE_BYTE {
        let detail = format!("wants to change {start:#x}, in the file identifier or the headers");
        return Err(findings.fatal(Code::LogTargetHeader, place(entry, header), detail));
    }
    if start < log_end && end > header.log_offset {
        let detail = format!("wants to change {length:#x} bytes at {start:#x}, in the log itself");
        return Err(findings.fatal(Code::LogTargetLog, place(entry, header), detail));
    }
    Ok(())
}
