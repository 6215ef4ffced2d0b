//! Log entries with every field free, and the ring that holds them.

use crate::guid::Guid;
use crate::sparse::SparseFile;
use crate::spec::{Checksum, put};

/// Sectors of the log, and pages that it carries, have this many bytes.
pub const SECTOR: usize = 4096;

/// What a descriptor does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DescriptorKind {
    /// Writes a page.
    Data {
        /// The page's place in the file.
        file_offset: u64,
        /// The page.
        page: Box<[u8; SECTOR]>,
    },
    /// Zeroes a range.
    Zero {
        /// The start of the range in the file.
        file_offset: u64,
        /// The length of the range.
        length: u64,
    },
    /// These 32 bytes, without a data sector.
    Raw([u8; 32]),
}

/// A descriptor, with its data sector if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorSpec {
    /// What it does.
    pub kind: DescriptorKind,
    /// The signature to write instead of `desc` or `zero`.
    pub signature: Option<[u8; 4]>,
    /// The sequence number to write instead of the entry's.
    pub sequence: Option<u64>,
    /// The reserved field of a zero descriptor.
    pub reserved: u32,
    /// The signature of the data sector to write instead of `data`.
    pub sector_signature: Option<[u8; 4]>,
    /// The upper half of the sequence number to write into the data sector.
    pub sector_sequence_high: Option<u32>,
    /// The lower half of the sequence number to write into the data sector.
    pub sector_sequence_low: Option<u32>,
}

impl DescriptorSpec {
    fn new(kind: DescriptorKind) -> Self {
        Self {
            kind,
            signature: None,
            sequence: None,
            reserved: 0,
            sector_signature: None,
            sector_sequence_high: None,
            sector_sequence_low: None,
        }
    }

    /// Writes `page`, 4096 bytes, to `file_offset`.
    #[must_use]
    pub fn data(file_offset: u64, page: &[u8]) -> Self {
        let page = Box::new(page.try_into().expect("a page has 4096 bytes"));
        Self::new(DescriptorKind::Data { file_offset, page })
    }

    /// Zeroes `length` bytes from `file_offset` on.
    #[must_use]
    pub fn zero(file_offset: u64, length: u64) -> Self {
        Self::new(DescriptorKind::Zero { file_offset, length })
    }

    /// These 32 bytes.
    #[must_use]
    pub fn raw(bytes: [u8; 32]) -> Self {
        Self::new(DescriptorKind::Raw(bytes))
    }

    fn encode(&self, entry_sequence: u64) -> [u8; 32] {
        let mut bytes = [0; 32];
        let sequence = self.sequence.unwrap_or(entry_sequence);
        match &self.kind {
            DescriptorKind::Data { file_offset, page } => {
                put(&mut bytes, 0, &self.signature.unwrap_or(*b"desc"));
                put(&mut bytes, 4, &page[4092..]);
                put(&mut bytes, 8, &page[..8]);
                put(&mut bytes, 16, &file_offset.to_le_bytes());
                put(&mut bytes, 24, &sequence.to_le_bytes());
            }
            DescriptorKind::Zero { file_offset, length } => {
                put(&mut bytes, 0, &self.signature.unwrap_or(*b"zero"));
                put(&mut bytes, 4, &self.reserved.to_le_bytes());
                put(&mut bytes, 8, &length.to_le_bytes());
                put(&mut bytes, 16, &file_offset.to_le_bytes());
                put(&mut bytes, 24, &sequence.to_le_bytes());
            }
            DescriptorKind::Raw(raw) => bytes = *raw,
        }
        bytes
    }

    fn encode_sector(&self, entry_sequence: u64) -> Option<Vec<u8>> {
        let DescriptorKind::Data { page, .. } = &self.kind else { return None };
        let high = self.sector_sequence_high.unwrap_or((entry_sequence >> 32) as u32);
        let low = self.sector_sequence_low.unwrap_or(entry_sequence as u32);
        let mut sector = page.to_vec();
        put(&mut sector, 0, &self.sector_signature.unwrap_or(*b"data"));
        put(&mut sector, 4, &high.to_le_bytes());
        put(&mut sector, 4092, &low.to_le_bytes());
        Some(sector)
    }
}

/// A log entry; what is `None` is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntrySpec {
    /// `loge`.
    pub signature: [u8; 4],
    /// Whether the checksum is right.
    pub checksum: Checksum,
    /// The length to write; a larger multiple of 4096 also lengthens the entry with zeros, up to 64 MiB.
    pub entry_length: Option<u32>,
    /// Ring offset of the first entry of the sequence; `None` is this entry.
    pub tail: Option<u32>,
    /// The sequence number.
    pub sequence: u64,
    /// The count to write instead of the number of descriptors.
    pub descriptor_count: Option<u32>,
    /// 0.
    pub reserved: u32,
    /// The log's identity.
    pub log_guid: Guid,
    /// The file size that was durable.
    pub flushed_file_offset: u64,
    /// The file size that everything fits into.
    pub last_file_offset: u64,
    /// The descriptors.
    pub descriptors: Vec<DescriptorSpec>,
    /// Bytes put over the entry before its checksum is made: offset in the entry, bytes.
    pub patches: Vec<(usize, Vec<u8>)>,
}

impl LogEntrySpec {
    /// An entry without descriptors that starts a sequence of its own, for a file of `file_length` bytes.
    #[must_use]
    pub fn new(log_guid: Guid, sequence: u64, file_length: u64) -> Self {
        Self {
            signature: *b"loge",
            checksum: Checksum::Correct,
            entry_length: None,
            tail: None,
            sequence,
            descriptor_count: None,
            reserved: 0,
            log_guid,
            flushed_file_offset: file_length,
            last_file_offset: file_length,
            descriptors: Vec::new(),
            patches: Vec::new(),
        }
    }

    /// Adds a descriptor.
    #[must_use]
    pub fn descriptor(mut self, descriptor: DescriptorSpec) -> Self {
        self.descriptors.push(descriptor);
        self
    }

    /// Sets the tail.
    #[must_use]
    pub fn tail(mut self, ring_offset: u32) -> Self {
        self.tail = Some(ring_offset);
        self
    }

    /// Any change of the fields, within a chain of calls.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Sectors that header and descriptors take.
    #[must_use]
    pub fn descriptor_sectors(&self) -> usize {
        (64 + 32 * self.descriptors.len()).div_ceil(SECTOR)
    }

    /// The bytes that the entry takes in the ring.
    #[must_use]
    pub fn byte_length(&self) -> usize {
        let is_data = |descriptor: &&DescriptorSpec| matches!(descriptor.kind, DescriptorKind::Data { .. });
        let natural = SECTOR * (self.descriptor_sectors() + self.descriptors.iter().filter(is_data).count());
        let asked = self.entry_length.unwrap_or_default() as usize;
        if asked.is_multiple_of(SECTOR) && asked <= 64 << 20 { natural.max(asked) } else { natural }
    }

    /// The bytes of the entry, for a place `own_offset` bytes into the ring.
    ///
    /// The checksum covers as many bytes as the entry claims to have, if it has them.
    #[must_use]
    pub fn encode(&self, own_offset: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.byte_length()];
        let claimed = self.entry_length.unwrap_or(bytes.len() as u32);
        put(&mut bytes, 0, &self.signature);
        put(&mut bytes, 8, &claimed.to_le_bytes());
        put(&mut bytes, 12, &self.tail.unwrap_or(own_offset).to_le_bytes());
        put(&mut bytes, 16, &self.sequence.to_le_bytes());
        put(&mut bytes, 24, &self.descriptor_count.unwrap_or(self.descriptors.len() as u32).to_le_bytes());
        put(&mut bytes, 28, &self.reserved.to_le_bytes());
        put(&mut bytes, 32, &self.log_guid.0);
        put(&mut bytes, 48, &self.flushed_file_offset.to_le_bytes());
        put(&mut bytes, 56, &self.last_file_offset.to_le_bytes());
        let mut sector_offset = SECTOR * self.descriptor_sectors();
        for (index, descriptor) in self.descriptors.iter().enumerate() {
            put(&mut bytes, 64 + 32 * index, &descriptor.encode(self.sequence));
            if let Some(sector) = descriptor.encode_sector(self.sequence) {
                put(&mut bytes, sector_offset, &sector);
                sector_offset += SECTOR;
            }
        }
        for (offset, patch) in &self.patches {
            put(&mut bytes, *offset, patch);
        }
        let covered = (claimed as usize).clamp(64, bytes.len());
        self.checksum.apply(&mut bytes[..covered]);
        bytes
    }
}

/// Where an entry went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Ring offset of its first byte.
    pub start: u32,
    /// Bytes that it takes.
    pub length: u32,
}

/// The ring of a log in a file, with the position of the next entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRing {
    /// File offset of the ring.
    pub offset: u64,
    /// Bytes of the ring.
    pub length: u32,
    /// Ring offset of the next entry.
    pub position: u32,
}

impl LogRing {
    /// A ring that starts to be written at its start.
    #[must_use]
    pub fn new(offset: u64, length: u32) -> Self {
        Self { offset, length, position: 0 }
    }

    /// The next entry goes here.
    pub fn seek(&mut self, position: u32) {
        self.position = position % self.length;
    }

    /// Leaves a gap.
    pub fn skip(&mut self, length: u32) {
        self.seek(self.position + length);
    }

    /// Writes an entry at the position, around the end of the ring if need be, and moves on behind it.
    pub fn place(&mut self, file: &mut SparseFile, entry: &LogEntrySpec) -> Placed {
        let start = self.position;
        let bytes = entry.encode(start);
        self.write(file, &bytes);
        Placed { start, length: bytes.len() as u32 }
    }

    /// Writes any bytes at the position, around the end of the ring if need be, and moves on behind them.
    pub fn write(&mut self, file: &mut SparseFile, bytes: &[u8]) {
        assert!(bytes.len() <= self.length as usize, "{} bytes do not fit the ring", bytes.len());
        let before_end = bytes.len().min((self.length - self.position) as usize);
        file.write(self.offset + u64::from(self.position), &bytes[..before_end]);
        file.write(self.offset, &bytes[before_end..]);
        self.skip(bytes.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::MIB;

    fn guid() -> Guid {
        Guid::parse("00112233-4455-6677-8899-aabbccddeeff")
    }

    fn checksum(bytes: &[u8]) -> u32 {
        u32::from_le_bytes(bytes[4..8].try_into().unwrap())
    }

    #[test]
    fn an_empty_entry_matches_the_published_vector() {
        let bytes = LogEntrySpec::new(guid(), 1, 4 * MIB).encode(0);
        assert_eq!(bytes.len(), 4096);
        assert_eq!(checksum(&bytes), 0x6384_8303);
    }

    #[test]
    fn an_entry_with_a_page_matches_the_published_vector() {
        let page: Vec<u8> = (0..4096).map(|index| index as u8).collect();
        let entry = LogEntrySpec::new(guid(), 0x1_0000_0002, 4 * MIB)
            .descriptor(DescriptorSpec::data(0x30_0000, &page))
            .with(|entry| entry.last_file_offset = 36 * MIB);
        let bytes = entry.encode(0x1000);
        assert_eq!(bytes.len(), 8192);
        assert_eq!(bytes[68..72], 0xFFFE_FDFC_u32.to_le_bytes());
        assert_eq!(bytes[72..80], 0x0706_0504_0302_0100_u64.to_le_bytes());
        assert_eq!(bytes[4096..4104], *b"data\x01\0\0\0");
        assert_eq!(checksum(&bytes), 0xA1D7_452B);
    }

    #[test]
    fn descriptors_beyond_the_first_sector_move_the_data() {
        let mut entry = LogEntrySpec::new(guid(), 5, MIB);
        for index in 0..127 {
            entry = entry.descriptor(DescriptorSpec::zero(MIB + index * 4096, 4096));
        }
        assert_eq!(entry.descriptor_sectors(), 2);
        let bytes = entry.descriptor(DescriptorSpec::data(MIB, &[0xAB; 4096])).encode(0);
        assert_eq!(bytes.len(), 3 * 4096);
        assert_eq!(bytes[64 + 32 * 126..][..4], *b"zero");
        assert_eq!(bytes[8192..8196], *b"data");
    }

    #[test]
    fn an_entry_wraps_around_the_end_of_the_ring() {
        let mut file = SparseFile::new();
        let mut ring = LogRing::new(MIB, 1 << 20);
        ring.seek((1 << 20) - 4096);
        let entry = LogEntrySpec::new(guid(), 5, MIB).descriptor(DescriptorSpec::data(3 * MIB, &[1; 4096]));
        let placed = ring.place(&mut file, &entry);
        assert_eq!(placed, Placed { start: (1 << 20) - 4096, length: 8192 });
        assert_eq!(ring.position, 4096);
        assert_eq!(file.read(2 * MIB - 4096, 4), b"loge");
        assert_eq!(file.read(MIB, 4), b"data");
        assert_eq!(file.len(), 2 * MIB);
    }
}
