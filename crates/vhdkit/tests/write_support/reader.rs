//! A reader of clean images from bare bytes that shares nothing with the library, and the headers it sees.

use std::ops::Range;

use vhdkit_testkit::{Guid, ModelDisk, SparseFile};

/// A valid header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawHeader {
    pub(crate) sequence: u64,
    pub(crate) file_write_guid: Guid,
    pub(crate) data_write_guid: Guid,
    pub(crate) log_guid: Guid,
    pub(crate) log_length: u32,
    pub(crate) log_offset: u64,
}

fn guid(file: &SparseFile, offset: u64) -> Guid {
    Guid(file.read(offset, 16).try_into().unwrap())
}

fn checksum_is_right(file: &SparseFile, offset: u64, length: usize) -> bool {
    let mut bytes = file.read(offset, length);
    let stored = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
    bytes[4..8].fill(0);
    crc32c::crc32c(&bytes) == stored
}

/// The header in a slot, if it is valid.
pub(crate) fn header(file: &SparseFile, slot: u64) -> Option<RawHeader> {
    let at = (slot + 1) << 16;
    (file.read(at, 4) == b"head" && checksum_is_right(file, at, 4096)).then(|| RawHeader {
        sequence: file.read_u64(at + 8),
        file_write_guid: guid(file, at + 16),
        data_write_guid: guid(file, at + 32),
        log_guid: guid(file, at + 48),
        log_length: file.read_u32(at + 68),
        log_offset: file.read_u64(at + 72),
    })
}

/// The valid header with the larger sequence number.
pub(crate) fn current(file: &SparseFile) -> RawHeader {
    let headers = [header(file, 0), header(file, 1)];
    headers.into_iter().flatten().max_by_key(|header| header.sequence).expect("one header is valid")
}

/// The regions of the first intact table: identity, and place in the file.
pub(crate) fn regions(file: &SparseFile) -> Vec<(Guid, Range<u64>)> {
    let table = [3_u64 << 16, 4 << 16]
        .into_iter()
        .find(|at| file.read(*at, 4) == b"regi" && checksum_is_right(file, *at, 1 << 16))
        .expect("one region table is intact");
    (0..u64::from(file.read_u32(table + 8)))
        .map(|number| {
            let entry = table + 16 + 32 * number;
            let start = file.read_u64(entry + 16);
            (guid(file, entry), start..start + u64::from(file.read_u32(entry + 24)))
        })
        .collect()
}

/// An image whose log is clean.
#[derive(Debug)]
pub(crate) struct RawImage<'a> {
    file: &'a SparseFile,
    parent: Option<&'a ModelDisk>,
    pub(crate) size: u64,
    pub(crate) block: u64,
    sector: u64,
    differencing: bool,
    bat: u64,
}

impl<'a> RawImage<'a> {
    pub(crate) fn new(file: &'a SparseFile, parent: Option<&'a ModelDisk>) -> Self {
        assert_eq!(current(file).log_guid, Guid::ZERO, "the log is clean");
        let regions = regions(file);
        let region = |wanted: Guid| regions.iter().find(|(guid, _)| *guid == wanted).unwrap().1.start;
        let metadata = region(Guid::METADATA);
        let count = u64::from(file.read_u32(metadata + 8) >> 16);
        let item = |wanted: Guid| {
            let entry = (1..=count).map(|number| metadata + 32 * number).find(|entry| guid(file, *entry) == wanted);
            metadata + u64::from(file.read_u32(entry.expect("the item is there") + 16))
        };
        let parameters = item(Guid::FILE_PARAMETERS);
        let differencing = file.read_u32(parameters + 4) & 2 != 0;
        assert_eq!(differencing, parent.is_some());
        Self {
            file,
            parent,
            size: file.read_u64(item(Guid::VIRTUAL_DISK_SIZE)),
            block: u64::from(file.read_u32(parameters)),
            sector: u64::from(file.read_u32(item(Guid::LOGICAL_SECTOR_SIZE))),
            differencing,
            bat: region(Guid::BAT),
        }
    }

    fn chunk_ratio(&self) -> u64 {
        (self.sector << 23) / self.block
    }

    fn entry(&self, index: u64) -> (u64, u64) {
        let entry = self.file.read_u64(self.bat + 8 * index);
        assert_eq!(entry >> 3 & 0x1_FFFF, 0, "reserved bits of entry {index}");
        (entry & 7, entry >> 20 << 20)
    }

    /// State and place of a payload block.
    pub(crate) fn payload(&self, block: u64) -> (u64, u64) {
        self.entry(block + block / self.chunk_ratio())
    }

    /// State and place of a chunk's bitmap.
    fn bitmap(&self, chunk: u64) -> (u64, u64) {
        self.entry((chunk + 1) * self.chunk_ratio() + chunk)
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// What a guest sees of a range inside one block.
    fn read_in_block(&self, offset: u64, length: usize) -> Vec<u8> {
        let (block, within) = (offset / self.block, offset % self.block);
        let (state, place) = self.payload(block);
        let parent =
            |offset, length| self.parent.map_or_else(|| vec![0; length], |parent| parent.read_clipped(offset, length));
        match state {
            0 if self.differencing => parent(offset, length),
            0..=3 => vec![0; length],
            6 => self.file.read(place + within, length),
            7 => {
                assert!(self.differencing, "block {block} is partially present without a parent");
                let (state, bitmap) = self.bitmap(block / self.chunk_ratio());
                assert_eq!(state, 6, "the bitmap of block {block}");
                let mut bytes = Vec::with_capacity(length);
                while bytes.len() < length {
                    let position = within + bytes.len() as u64;
                    let part = (self.sector - position % self.sector).min((length - bytes.len()) as u64) as usize;
                    let bit = block % self.chunk_ratio() * (self.block / self.sector) + position / self.sector;
                    let here = self.file.read(bitmap + bit / 8, 1)[0] >> (bit % 8) & 1 == 1;
                    let at = offset + bytes.len() as u64;
                    bytes.extend(if here { self.file.read(place + position, part) } else { parent(at, part) });
                }
                bytes
            }
            other => panic!("block {block} has the state {other}"),
        }
    }

    /// What a guest sees.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let position = offset + bytes.len() as u64;
            let left = (self.block - position % self.block).min((length - bytes.len()) as u64);
            bytes.extend(self.read_in_block(position, left as usize));
        }
        bytes
    }

    /// Checks that no byte of the file is owned twice, and that everything owned is inside of it.
    pub(crate) fn assert_owned_once(&self, name: &str) {
        let header = current(self.file);
        let mut owned = vec![
            (0..1 << 20, "headers".to_owned()),
            (header.log_offset..header.log_offset + u64::from(header.log_length), "log".to_owned()),
        ];
        owned.extend(regions(self.file).into_iter().map(|(guid, range)| (range, format!("region {guid}"))));
        for block in 0..self.blocks() {
            let (state, place) = self.payload(block);
            if place != 0 {
                // The last block may be cut off behind the end of the disk.
                let end = self.block.min((self.size - block * self.block).next_multiple_of(self.sector));
                assert!(state >= 6 || state == 1 || state == 3, "{name}: block {block} in state {state} has a place");
                assert!(place + end <= self.file.len(), "{name}: block {block} at {place:#x} ends behind the file");
                owned.push((place..place + self.block, format!("block {block}")));
            }
        }
        if self.differencing {
            for chunk in 0..self.blocks().div_ceil(self.chunk_ratio()) {
                let (state, place) = self.bitmap(chunk);
                if state == 6 {
                    assert!(place + (1 << 20) <= self.file.len(), "{name}: bitmap {chunk} ends behind the file");
                    owned.push((place..place + (1 << 20), format!("bitmap {chunk}")));
                }
            }
        }
        owned.sort_by_key(|(range, _)| range.start);
        for pair in owned.windows(2) {
            assert!(pair[0].0.end <= pair[1].0.start, "{name}: {:x?} and {:x?}", pair[0], pair[1]);
        }
    }
}
