//! Records of the master file table: stamps, attributes, run lists.

use std::ops::Range;

use super::raw::{RawAttribute, RawElsewhere, RawRecord, RawResident, RawStamped};
use crate::guest::window::{Checked, parse, reason, require};

/// Bytes that each stamp protects, whatever the sector is.
const STRIDE: usize = 512;
/// `flags` of a record: it is in use.
pub(super) const IN_USE: u16 = 1;
/// Kinds of attributes.
pub(super) mod kind {
    pub(in crate::guest::ntfs) const LIST: u32 = 0x20;
    pub(in crate::guest::ntfs) const VOLUME_INFORMATION: u32 = 0x70;
    pub(in crate::guest::ntfs) const DATA: u32 = 0x80;
    pub(in crate::guest::ntfs) const INDEX_ROOT: u32 = 0x90;
    pub(in crate::guest::ntfs) const INDEX_ALLOCATION: u32 = 0xa0;
    /// Ends the attributes of a record.
    pub(super) const END: u32 = 0xffff_ffff;
}
/// Most runs of an attribute: they stand in one record of at most 4 KiB, two bytes each at least.
const RUNS_MAX: usize = 4096;

/// Takes the stamps out of a structure and puts back what they replaced; checks that all sectors were written together.
pub(super) fn unstamp(bytes: &mut [u8], magic: [u8; 4]) -> Checked<()> {
    let head: RawStamped = parse(bytes, 0)?;
    require(head.magic == magic, "a record has no magic number")?;
    let offset = usize::from(head.stamps_offset.get());
    let sectors = bytes.len() / STRIDE;
    let whole = usize::from(head.stamps_count.get()) == sectors + 1 && bytes.len().is_multiple_of(STRIDE);
    let length = (sectors + 1) * 2;
    let fits = offset.is_multiple_of(2) && offset >= size_of::<RawStamped>() && offset + length <= STRIDE - 2;
    require(whole && fits, "the stamps of a record are not where they can be")?;
    let stamps = bytes.get(offset..offset + length).unwrap_or_default().to_vec();
    let (stamp, originals) = stamps.split_at_checked(2).unwrap_or_default();
    for (sector, original) in bytes.chunks_exact_mut(STRIDE).zip(originals.chunks_exact(2)) {
        let Some(last) = sector.get_mut(STRIDE - 2..) else { continue };
        require(last == stamp, "the sectors of a record were not written together")?;
        last.copy_from_slice(original);
    }
    Ok(())
}

/// The flags of a record as it was read.
pub(super) fn flags_of(bytes: &[u8]) -> Checked<u16> {
    Ok(parse::<RawRecord>(bytes, 0)?.flags.get())
}

/// A record in use, without stamps.
#[derive(Debug)]
pub(super) struct Record {
    bytes: Vec<u8>,
    attributes: Range<usize>,
}

impl Record {
    /// Judges the record of a system file as it was read.
    pub(super) fn new(bytes: Vec<u8>) -> Checked<Self> {
        let raw: RawRecord = parse(&bytes, 0)?;
        let this = Self::any(bytes)?;
        require(raw.flags.get() & IN_USE != 0, "a system record is not in use")?;
        require(raw.base.get() == 0, "a system record is part of another")?;
        Ok(this)
    }

    /// Judges a record as it was read, whatever it is for.
    pub(super) fn any(mut bytes: Vec<u8>) -> Checked<Self> {
        unstamp(&mut bytes, *b"FILE")?;
        let raw: RawRecord = parse(&bytes, 0)?;
        let used = usize::try_from(raw.bytes_used.get()).unwrap_or(usize::MAX);
        let start = usize::from(raw.attributes_offset.get());
        let fits = start >= size_of::<RawRecord>() && start <= used && used <= bytes.len();
        require(fits, "the bytes of a record are not as many as there can be")?;
        Ok(Self { bytes, attributes: start..used })
    }

    /// The bytes that are in use, without stamps.
    pub(super) fn used(&self) -> &[u8] {
        self.bytes.get(..self.attributes.end).unwrap_or_default()
    }

    /// Visits the attributes.
    pub(super) fn attributes(&self) -> Checked<Vec<Attribute<'_>>> {
        let mut all = Vec::new();
        let mut rest = self.bytes.get(self.attributes.clone()).unwrap_or_default();
        loop {
            let Some((kind, _)) = rest.split_first_chunk() else {
                return reason("the attributes of a record do not end");
            };
            if u32::from_le_bytes(*kind) == kind::END {
                return Ok(all);
            }
            let head: RawAttribute = parse(rest, 0)?;
            let length = usize::try_from(head.length.get()).unwrap_or(usize::MAX);
            let long = length >= size_of::<RawResident>() && length.is_multiple_of(8);
            let Some((bytes, behind)) = rest.split_at_checked(length).filter(|_| long) else {
                return reason("an attribute reaches past the end of its record");
            };
            all.push(Attribute { head, bytes });
            rest = behind;
        }
    }

    /// The only attribute of a kind, with this name in ASCII; `None` when there is none.
    pub(super) fn find(&self, kind: u32, name: &str) -> Checked<Option<Attribute<'_>>> {
        let mut found = None;
        for attribute in self.attributes()? {
            require(attribute.head.kind.get() != kind::LIST, "a system file has an attribute list")?;
            if attribute.head.kind.get() == kind && attribute.name()? == name {
                require(found.is_none(), "a system file has an attribute twice")?;
                found = Some(attribute);
            }
        }
        Ok(found)
    }
}

/// An attribute of a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attribute<'a> {
    head: RawAttribute,
    bytes: &'a [u8],
}

impl std::fmt::Debug for RawAttribute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "attribute {:#x}", self.kind.get())
    }
}

/// A value that lies in clusters.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// Runs of clusters; `None` for one that is not stored and reads as zero.
    pub(super) runs: Vec<(Option<u64>, u64)>,
    pub(super) data_bytes: u64,
    pub(super) initialized_bytes: u64,
    /// It begins with its first cluster (no other record has a part before it).
    pub(super) from_start: bool,
    /// It is stored as it is: not compressed, sparse or encrypted.
    pub(super) plain: bool,
}

impl<'a> Attribute<'a> {
    pub(super) const fn is_elsewhere(&self) -> bool {
        self.head.elsewhere != 0
    }

    fn name(&self) -> Checked<String> {
        let start = usize::from(self.head.name_offset.get());
        let length = usize::from(self.head.name_length) * 2;
        let Some(bytes) = self.bytes.get(start..start + length) else {
            return reason("the name of an attribute is cut off");
        };
        let units = bytes.chunks_exact(2).map(|pair| match pair {
            [low, 0] => char::from(*low),
            _ => char::REPLACEMENT_CHARACTER,
        });
        Ok(if length == 0 { String::new() } else { units.collect() })
    }

    /// The value, where it is in the record.
    pub(super) fn value(&self) -> Checked<&'a [u8]> {
        require(!self.is_elsewhere(), "the value of an attribute is not in its record")?;
        let raw: RawResident = parse(self.bytes, 0)?;
        let start = usize::from(raw.value_offset.get());
        let length = usize::try_from(raw.value_length.get()).unwrap_or(usize::MAX);
        match self.bytes.get(start..).and_then(|rest| rest.get(..length)) {
            Some(value) => Ok(value),
            None => reason("the value of an attribute is cut off"),
        }
    }

    /// Where the value lies, for a volume of so many clusters.
    pub(super) fn stored(&self, clusters: u64) -> Checked<Stored> {
        let raw: RawElsewhere = parse(self.bytes, 0)?;
        let start = usize::from(raw.runs_offset.get());
        require(start >= size_of::<RawElsewhere>(), "the runs of an attribute are not where they can be")?;
        let runs = runs(self.bytes.get(start..).unwrap_or_default(), clusters)?;
        Ok(Stored {
            runs,
            data_bytes: raw.data_bytes.get(),
            initialized_bytes: raw.initialized_bytes.get(),
            from_start: raw.first_cluster.get() == 0,
            plain: self.head.flags.get() == 0 && raw.compression_unit == 0,
        })
    }
}

/// Decodes a run list: a byte with two lengths, a length, a signed distance from the run before.
fn runs(mut bytes: &[u8], clusters: u64) -> Checked<Vec<(Option<u64>, u64)>> {
    let mut all = Vec::new();
    let mut place = 0_i64;
    loop {
        let Some((head, rest)) = bytes.split_first() else { return reason("a run list does not end") };
        if *head == 0 {
            return Ok(all);
        }
        let (length_bytes, place_bytes) = (usize::from(head & 0xf), usize::from(head >> 4));
        let split = rest.split_at_checked(length_bytes).and_then(|(length, rest)| {
            let (distance, rest) = rest.split_at_checked(place_bytes)?;
            Some((signed(length)?, distance, rest))
        });
        let Some((length, distance, behind)) = split else { return reason("a run list is damaged") };
        bytes = behind;
        let length = u64::try_from(length).unwrap_or(0);
        require(length > 0 && length <= clusters && all.len() < RUNS_MAX, "a run list is damaged")?;
        if place_bytes == 0 {
            all.push((None, length));
            continue;
        }
        let moved = signed(distance).and_then(|distance| place.checked_add(distance));
        let start = moved.and_then(|place| u64::try_from(place).ok());
        let Some(start) = start.filter(|start| *start < clusters && length <= clusters - *start) else {
            return reason("a run list leads out of the volume");
        };
        place = moved.unwrap_or_default();
        all.push((Some(start), length));
    }
}

/// A signed number of up to eight bytes, little-endian; `None` for one without bytes or with more.
fn signed(bytes: &[u8]) -> Option<i64> {
    let last = bytes.last()?;
    let mut whole = [if last & 0x80 == 0 { 0 } else { 0xff }; 8];
    if bytes.len() > whole.len() {
        return None;
    }
    whole.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    Some(i64::from_le_bytes(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_lists() {
        // 0x18 clusters at 0x342563; then 8 clusters 16 before that; then 4 that are not stored.
        let list = [0x31, 0x18, 0x63, 0x25, 0x34, 0x11, 8, 0xf0, 0x01, 4, 0];
        let found = runs(&list, 1 << 24).unwrap();
        assert_eq!(found, [(Some(0x34_2563), 0x18), (Some(0x34_2553), 8), (None, 4)]);
        for bad in [&list[..4], &[0x11, 1, 0xff, 0], &[0x31, 0x18], &[0x11, 0, 1, 0], &[0x91, 1], &[0x1f, 1], &[]] {
            assert!(runs(bad, 1 << 24).is_err(), "{bad:x?}");
        }
        assert!(runs(&list, 0x34_2563).is_err());
    }

    #[test]
    fn stamps_are_checked_and_taken_out() {
        let mut bytes = vec![0; 1024];
        bytes[..8].copy_from_slice(b"FILE\x30\0\x03\0");
        bytes[0x30..0x36].copy_from_slice(&[7, 0, 1, 2, 3, 4]);
        bytes[510] = 7;
        bytes[1022] = 7;
        let mut good = bytes.clone();
        unstamp(&mut good, *b"FILE").unwrap();
        assert_eq!((&good[510..512], &good[1022..]), (&[1, 2][..], &[3, 4][..]));
        bytes[1022] = 6;
        assert!(unstamp(&mut bytes, *b"FILE").is_err());
    }
}
