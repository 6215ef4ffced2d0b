//! Incremental backups: what has to be written to one disk to make it another (`docs/incremental.md`).
//!
//! ```text
//! | header | record | payload | record | record | payload | ... | trailer |
//!   256      64       length    64       64                        64 bytes
//! ```
//!
//! Our own format, read from front to back. Every part has a CRC-32C and the identity of the file, records have numbers
//! and stand in the order of the disk, and the trailer counts them and has a checksum of everything before it: what is
//! cut off, joined, exchanged or flipped is found before anything is written to a disk.

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::checksum;
use super::guid::Guid;
use crate::error::{Error, ErrorKind, Result};

/// The version that is written and read.
pub const VERSION: u32 = 1;
/// What a file begins with.
pub const SIGNATURE: [u8; 4] = *b"vhdi";
/// What stands behind the signature and the checksum, for people who look into the file.
pub const FORMAT_NAME: [u8; 24] = *b"vhdkit incremental disk\n";
/// Bytes of payload in one record at most: what has to be in memory at once.
pub const PAYLOAD_MAX: u64 = 1 << 20;
/// Bytes that one record may zero at most, so that work goes in steps.
pub const ZERO_MAX: u64 = 1 << 30;
/// The largest disk: sums of offsets and lengths stay far from overflowing.
pub const DISK_MAX: u64 = 1 << 60;
/// Flag: records have checksums of what the base holds in their place.
pub const FLAG_BASE_CHECKSUMS: u32 = 1;

const KIND_VHDX: u32 = 1;
const KIND_RAW: u32 = 2;
const DATA: [u8; 4] = *b"data";
const ZERO: [u8; 4] = *b"zero";
const LAST: [u8; 4] = *b"last";

/// One of the two disks, as stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawSide {
    /// The data write GUID of a VHDX; zero for a raw disk.
    pub data_write_guid: Guid,
    /// The identity that the guest sees; zero where there is none.
    pub disk_id: Guid,
    /// Bytes of the disk.
    pub size: U64,
    /// Bytes of a logical sector.
    pub logical_sector_size: U32,
    /// Bytes of a physical sector.
    pub physical_sector_size: U32,
    /// 1: VHDX; 2: raw.
    pub kind: U32,
    /// Zero.
    pub reserved: [u8; 12],
}

/// The header, as stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// `vhdi`.
    pub signature: [u8; 4],
    /// CRC-32C of the header with this field zero.
    pub checksum: U32,
    /// For people.
    pub format_name: [u8; 24],
    /// 1.
    pub version: U32,
    /// Bit 0: base checksums; the others are zero.
    pub flags: U32,
    /// The identity of this file, random.
    pub id: Guid,
    /// What the records are written to.
    pub base: RawSide,
    /// What becomes of it.
    pub result: RawSide,
    /// Zero.
    pub reserved: [u8; 72],
}

/// A record or the trailer, as stored.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawRecord {
    /// `data`, `zero` or `last`.
    pub signature: [u8; 4],
    /// CRC-32C of the record with this field zero, without the payload.
    pub checksum: U32,
    /// The identity of the file.
    pub id: Guid,
    /// Records before this one.
    pub index: U64,
    /// Where it stands on the disk. Trailer: bytes of payload in the file.
    pub offset: U64,
    /// Bytes of the range. Trailer: bytes that are zeroed.
    pub length: U64,
    /// CRC-32C of the payload; zero for a range of zeros. Trailer: CRC-32C of everything before it.
    pub content_checksum: U32,
    /// CRC-32C of what the base holds in this range, where the flag says so; otherwise zero.
    pub base_checksum: U32,
    /// Zero.
    pub reserved: [u8; 8],
}

/// Bytes of the header.
pub const HEADER_BYTES: usize = 256;
/// Bytes of a record without its payload, and of the trailer.
pub const RECORD_BYTES: usize = 64;

const _: () = assert!(
    size_of::<RawSide>() == 64
        && offset_of!(RawSide, size) == 32
        && offset_of!(RawSide, logical_sector_size) == 40
        && offset_of!(RawSide, kind) == 48
        && size_of::<RawHeader>() == HEADER_BYTES
        && offset_of!(RawHeader, version) == 32
        && offset_of!(RawHeader, id) == 40
        && offset_of!(RawHeader, base) == 56
        && offset_of!(RawHeader, result) == 120
        && offset_of!(RawHeader, reserved) == 184
        && size_of::<RawRecord>() == RECORD_BYTES
        && offset_of!(RawRecord, id) == 8
        && offset_of!(RawRecord, index) == 24
        && offset_of!(RawRecord, offset) == 32
        && offset_of!(RawRecord, length) == 40
        && offset_of!(RawRecord, content_checksum) == 48
        && offset_of!(RawRecord, base_checksum) == 52
);

/// One of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// Which state of which disk it is: the data write GUID of a VHDX; a raw disk has none.
    pub data_write_guid: Option<Guid>,
    /// The identity that the guest sees.
    pub disk_id: Option<Guid>,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector_size: u32,
}

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The identity of this file.
    pub id: Guid,
    /// Whether records have checksums of what the base holds.
    pub has_base_checksums: bool,
    /// What the records are written to.
    pub base: Side,
    /// What becomes of it.
    pub result: Side,
}

/// What a range becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The payload, which has this checksum.
    Data(u32),
    /// Zeros.
    Zero,
}

/// A range and what it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it begins on the disk.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// What it becomes.
    pub content: Content,
    /// Checksum of what the base holds there.
    pub base_checksum: Option<u32>,
}

impl Record {
    /// Where it ends on the disk.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.length) // at most DISK_MAX: checked when it was decoded
    }
}

/// What a whole file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Records, without the trailer.
    pub records: u64,
    /// Bytes of payload.
    pub data_bytes: u64,
    /// Bytes that become zero.
    pub zero_bytes: u64,
}

/// What stands behind a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A record; if it is data, so many bytes of payload follow.
    Record(Record),
    /// The end, with the checksum of everything before the trailer.
    Last(Totals, u32),
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what).with_hint("get the file again from where it was made; nothing was written")
}

impl RawSide {
    fn new(side: &Side) -> Self {
        Self {
            data_write_guid: side.data_write_guid.unwrap_or(Guid::NIL),
            disk_id: side.disk_id.unwrap_or(Guid::NIL),
            size: side.size.into(),
            logical_sector_size: side.logical_sector_size.into(),
            physical_sector_size: side.physical_sector_size.into(),
            kind: if side.data_write_guid.is_some() { KIND_VHDX } else { KIND_RAW }.into(),
            reserved: [0; 12],
        }
    }

    fn decode(&self, name: &str) -> Result<Side> {
        let bad = |what: &str| corrupt(format!("the {name} in the header of the increment: {what}"));
        let data_write_guid = match self.kind.get() {
            KIND_VHDX => Some(self.data_write_guid),
            KIND_RAW if self.data_write_guid.is_nil() => None,
            KIND_RAW => return Err(bad("a raw disk has no data write GUID")),
            other => return Err(bad(&format!("kind {other} is unknown"))),
        };
        let sector_sizes = [self.logical_sector_size.get(), self.physical_sector_size.get()];
        if sector_sizes.iter().any(|size| ![512, 4096].contains(size)) {
            return Err(bad("sector sizes are 512 or 4096 bytes"));
        }
        if self.size.get() > DISK_MAX {
            return Err(bad("the disk is larger than any"));
        }
        if self.reserved != [0; 12] {
            return Err(bad("a reserved field is not zero"));
        }
        Ok(Side {
            data_write_guid,
            disk_id: Some(self.disk_id).filter(|id| !id.is_nil()),
            size: self.size.get(),
            logical_sector_size: self.logical_sector_size.get(),
            physical_sector_size: self.physical_sector_size.get(),
        })
    }
}

impl Header {
    /// The bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = RawHeader {
            signature: SIGNATURE,
            checksum: U32::ZERO,
            format_name: FORMAT_NAME,
            version: VERSION.into(),
            flags: if self.has_base_checksums { FLAG_BASE_CHECKSUMS } else { 0 }.into(),
            id: self.id,
            base: RawSide::new(&self.base),
            result: RawSide::new(&self.result),
            reserved: [0; 72],
        };
        raw.checksum = checksum(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for anything that is not an increment of this version, [`ErrorKind::Corrupt`] when it is
    /// damaged.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.signature != SIGNATURE || raw.format_name != FORMAT_NAME {
            let what = "the file does not begin as an increment does, which `vhdkit diff --export` makes";
            return Err(Error::new(ErrorKind::Unsupported, what).with_hint("name the file that was exported"));
        }
        if raw.checksum.get() != checksum(bytes) {
            return Err(corrupt("the header of the increment is damaged: its checksum is wrong"));
        }
        if raw.version.get() != VERSION {
            let what = format!("the increment has version {}; version {VERSION} is known", raw.version.get());
            return Err(
                Error::new(ErrorKind::Unsupported, what).with_hint("use the program that made it, or a newer one")
            );
        }
        let flags = raw.flags.get();
        if flags & !FLAG_BASE_CHECKSUMS != 0 {
            let what = format!("the increment has flags {flags:#x}, which are not all known");
            return Err(
                Error::new(ErrorKind::Unsupported, what).with_hint("use the program that made it, or a newer one")
            );
        }
        if raw.reserved != [0; 72] || raw.id.is_nil() {
            return Err(corrupt("the header of the increment has no identity, or a reserved field that is not zero"));
        }
        let (base, result) = (raw.base.decode("base")?, raw.result.decode("result")?);
        // While it is applied, the target is called by the identity of the file: nobody else may be.
        if [base.data_write_guid, result.data_write_guid].contains(&Some(raw.id)) {
            return Err(corrupt("the increment has the identity of one of its disks"));
        }
        Ok(Self { id: raw.id, has_base_checksums: flags & FLAG_BASE_CHECKSUMS != 0, base, result })
    }
}

/// Walks the records of a file, writing or reading: they come in order, and are counted.
#[derive(Clone, Debug)]
pub struct Sequence {
    id: Guid,
    has_base_checksums: bool,
    size: u64,
    end: u64,
    totals: Totals,
}

impl Sequence {
    /// In front of the first record.
    #[must_use]
    pub fn new(header: &Header) -> Self {
        Self {
            id: header.id,
            has_base_checksums: header.has_base_checksums,
            size: header.result.size,
            end: 0,
            totals: Totals::default(),
        }
    }

    /// What was walked over.
    #[must_use]
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// The bytes of the next record, without its payload. It must be one that [`Sequence::decode`] takes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when it is not.
    pub fn encode(&mut self, record: &Record) -> Result<[u8; RECORD_BYTES]> {
        let (signature, content_checksum) = match record.content {
            Content::Data(checksum) => (DATA, checksum),
            Content::Zero => (ZERO, 0),
        };
        let index = self.totals.records;
        if self.has_base_checksums != record.base_checksum.is_some() {
            return Err(Error::new(ErrorKind::InvalidArgument, "either all records have base checksums or none"));
        }
        self.add(record).map_err(|what| Error::new(ErrorKind::InvalidArgument, what))?;
        Ok(self.raw(
            signature,
            index,
            record.offset,
            record.length,
            content_checksum,
            record.base_checksum.unwrap_or(0),
        ))
    }

    /// The bytes of the trailer.
    #[must_use]
    pub fn encode_last(&self, file_checksum: u32) -> [u8; RECORD_BYTES] {
        let Totals { records, data_bytes, zero_bytes } = self.totals;
        self.raw(LAST, records, data_bytes, zero_bytes, file_checksum, 0)
    }

    fn raw(
        &self,
        signature: [u8; 4],
        index: u64,
        offset: u64,
        length: u64,
        content: u32,
        base: u32,
    ) -> [u8; RECORD_BYTES] {
        let mut raw = RawRecord {
            signature,
            checksum: U32::ZERO,
            id: self.id,
            index: index.into(),
            offset: offset.into(),
            length: length.into(),
            content_checksum: content.into(),
            base_checksum: base.into(),
            reserved: [0; 8],
        };
        raw.checksum = checksum(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Counts a record, which must stand behind all others and on the disk; says what is wrong with it.
    fn add(&mut self, record: &Record) -> Result<(), String> {
        let Record { offset, length, .. } = *record;
        let longest = if record.content == Content::Zero { ZERO_MAX } else { PAYLOAD_MAX };
        let end = offset.checked_add(length).filter(|end| *end <= self.size);
        let (Some(end), true) = (end, length > 0 && length <= longest) else {
            return Err(format!("a record of {length} bytes at {offset:#x} is too long, empty, or not on the disk"));
        };
        if offset < self.end {
            return Err(format!("the record at {offset:#x} begins before the one in front of it ends"));
        }
        self.end = end;
        self.totals.records = self.totals.records.saturating_add(1); // each takes a byte of the disk: below 2^60
        let bytes = match record.content {
            Content::Data(_) => &mut self.totals.data_bytes,
            Content::Zero => &mut self.totals.zero_bytes,
        };
        *bytes = bytes.saturating_add(length); // records do not overlap: at most the size of the disk
        Ok(())
    }

    /// Reads the next record or the trailer.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it is damaged, does not belong here, or does not fit on the disk.
    pub fn decode(&mut self, bytes: &[u8; RECORD_BYTES]) -> Result<Item> {
        let raw: &RawRecord = zerocopy::transmute_ref!(bytes);
        let number = self.totals.records;
        let bad = |what: &str| corrupt(format!("record {number} of the increment {what}"));
        if raw.checksum.get() != checksum(bytes) {
            return Err(bad("is damaged: its checksum is wrong"));
        }
        if raw.id != self.id {
            return Err(bad("belongs to another file"));
        }
        if raw.index.get() != number {
            return Err(bad(&format!("has the number {}", raw.index.get())));
        }
        if raw.reserved != [0; 8] {
            return Err(bad("has a reserved field that is not zero"));
        }
        let (checksum, base) = (raw.content_checksum.get(), raw.base_checksum.get());
        let content = match raw.signature {
            DATA => Content::Data(checksum),
            ZERO if checksum == 0 => Content::Zero,
            LAST if base == 0 => {
                let said = Totals { records: number, data_bytes: raw.offset.get(), zero_bytes: raw.length.get() };
                if said != self.totals {
                    return Err(corrupt("the trailer of the increment does not count what stands before it"));
                }
                return Ok(Item::Last(said, checksum));
            }
            _ => return Err(bad("is of no kind that is known")),
        };
        if !self.has_base_checksums && base != 0 {
            return Err(bad("has a checksum of the base, which the header denies"));
        }
        let base_checksum = self.has_base_checksums.then_some(base);
        let record = Record { offset: raw.offset.get(), length: raw.length.get(), content, base_checksum };
        self.add(&record).map_err(|what| bad(&format!("does not fit: {what}")))?;
        Ok(Item::Record(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(size: u64, guid: u128) -> Side {
        Side {
            data_write_guid: (guid != 0).then(|| Guid::from_printed(guid)),
            disk_id: Some(Guid::from_printed(9)),
            size,
            logical_sector_size: 512,
            physical_sector_size: 4096,
        }
    }

    fn header() -> Header {
        let (base, result) = (side(1 << 20, 1), side(2 << 20, 2));
        Header { id: Guid::from_printed(7), has_base_checksums: true, base, result }
    }

    fn zero(offset: u64, length: u64) -> Record {
        Record { offset, length, content: Content::Zero, base_checksum: Some(5) }
    }

    #[test]
    fn headers_come_back() {
        for (has_base_checksums, guid) in [(true, 1), (false, 0)] {
            let header = Header { has_base_checksums, base: side(77 << 20, guid), ..header() };
            assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }
    }

    #[test]
    fn a_file_has_an_identity_of_its_own() {
        for id in [Guid::NIL, Guid::from_printed(1), Guid::from_printed(2)] {
            assert!(Header::decode(&Header { id, ..header() }.encode()).is_err(), "{id}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_header_and_a_record_is_found() {
        let header = header();
        let bytes = header.encode();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
        let bytes = Sequence::new(&header).encode(&zero(512, 512)).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Sequence::new(&header).decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn records_come_in_order_and_are_counted() {
        let header = header();
        let (mut writing, mut reading) = (Sequence::new(&header), Sequence::new(&header));
        let data = Record { offset: 4096, length: 1 << 20, content: Content::Data(3), base_checksum: Some(0) };
        let records = [zero(0, 512), zero(512, 100), data];
        for record in records {
            let bytes = writing.encode(&record).unwrap();
            assert_eq!(reading.clone().decode(&bytes).unwrap(), Item::Record(record));
            reading.decode(&bytes).unwrap();
        }
        let totals = Totals { records: 3, data_bytes: 1 << 20, zero_bytes: 612 };
        assert_eq!(reading.decode(&writing.encode_last(8)).unwrap(), Item::Last(totals, 8));
        // Too early, and so with records left out.
        assert!(Sequence::new(&header).decode(&writing.encode_last(8)).is_err());
        for wrong in [zero(4096, 1), zero(2 << 20, 1), zero((2 << 20) - 1, 2), zero(u64::MAX, 2), zero(1 << 21, 0)] {
            assert!(writing.clone().encode(&wrong).is_err(), "{wrong:?}");
        }
        let long = Record { offset: 0, length: PAYLOAD_MAX + 1, content: Content::Data(3), base_checksum: Some(0) };
        assert!(Sequence::new(&header).encode(&long).is_err());
        assert!(Sequence::new(&header).encode(&Record { base_checksum: None, ..data }).is_err());
    }

    #[test]
    fn records_of_another_file_or_place_do_not_belong() {
        let header = header();
        let mut writing = Sequence::new(&header);
        let first = writing.encode(&zero(0, 512)).unwrap();
        let second = writing.encode(&zero(512, 512)).unwrap();
        assert!(Sequence::new(&header).decode(&second).is_err(), "one is missing");
        let mut reading = Sequence::new(&header);
        reading.decode(&first).unwrap();
        assert!(reading.clone().decode(&first).is_err(), "twice");
        assert!(reading.decode(&second).is_ok());
        let other = Header { id: Guid::from_printed(8), ..header };
        assert!(Sequence::new(&other).decode(&first).is_err(), "another file");
    }
}
