//! A file in memory that holds only the pages that were written, so that offsets of terabytes cost nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// The granularity of storage.
const PAGE: u64 = 4096;

/// Whether all bytes are zero; many times faster than a loop over the bytes in a build without optimisation.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(PAGE as usize).all(|piece| *piece == [0; PAGE as usize][..piece.len()])
}

/// Bytes at offsets with a length; what was never written reads as zero.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SparseFile {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    length: u64,
}

impl std::fmt::Debug for SparseFile {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "SparseFile {{ length: {:#x}, pages: {} }}", self.length, self.pages.len())
    }
}

impl SparseFile {
    /// An empty file.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut file = Self::new();
        file.write_nonzero(0, bytes);
        file.set_len(bytes.len() as u64);
        file
    }

    /// Reads a real file; pages of zeros become holes.
    pub fn from_path(path: &Path) -> io::Result<Self> {
        let source = File::open(path)?;
        let length = source.metadata()?.len();
        let mut file = Self::new();
        let mut buffer = vec![0; 1 << 20];
        let mut offset = 0;
        while offset < length {
            let count = (length - offset).min(buffer.len() as u64) as usize;
            source.read_exact_at(&mut buffer[..count], offset)?;
            file.write_nonzero(offset, &buffer[..count]);
            offset += count as u64;
        }
        file.set_len(length);
        Ok(file)
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether the length is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many bytes of memory the written pages take.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Writes `bytes` at `offset`, and grows the file where they end past its end.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.store(offset, bytes, false);
    }

    /// Like [`write`](Self::write), but zeros that fall on a hole leave it a hole.
    pub fn write_nonzero(&mut self, offset: u64, bytes: &[u8]) {
        self.store(offset, bytes, true);
    }

    fn store(&mut self, offset: u64, bytes: &[u8], keep_holes: bool) {
        let mut position = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let within = (position % PAGE) as usize;
            let (piece, behind) = rest.split_at(rest.len().min(PAGE as usize - within));
            let index = position / PAGE;
            let hole = keep_holes && !self.pages.contains_key(&index) && is_zero(piece);
            if !hole {
                let page = self.pages.entry(index).or_insert_with(|| Box::new([0; PAGE as usize]));
                page[within..within + piece.len()].copy_from_slice(piece);
            }
            position += piece.len() as u64;
            rest = behind;
        }
        self.length = self.length.max(position);
    }

    /// Reads `length` bytes; holes and what lies past the end are zero.
    #[must_use]
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let end = offset + length as u64;
        for (index, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = (index * PAGE).max(offset);
            let stop = ((index + 1) * PAGE).min(end);
            let source = &page[(start - index * PAGE) as usize..(stop - index * PAGE) as usize];
            bytes[(start - offset) as usize..(stop - offset) as usize].copy_from_slice(source);
        }
        bytes
    }

    /// Reads a little-endian `u32`.
    #[must_use]
    pub fn read_u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset, 4).try_into().expect("four bytes were asked for"))
    }

    /// Reads a little-endian `u64`.
    #[must_use]
    pub fn read_u64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(offset, 8).try_into().expect("eight bytes were asked for"))
    }

    /// Writes a little-endian `u32`.
    pub fn write_u32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Writes a little-endian `u64`.
    pub fn write_u64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Makes the file this long: cuts it off, or lets it end with a hole.
    pub fn set_len(&mut self, length: u64) {
        drop(self.pages.split_off(&length.div_ceil(PAGE)));
        if let Some(page) = self.pages.get_mut(&(length / PAGE)) {
            page[(length % PAGE) as usize..].fill(0);
        }
        self.length = length;
    }

    /// Zeroes a range without growing the file; whole pages become holes.
    pub fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.length).max(offset);
        let indices: Vec<u64> = self.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(index, _)| *index).collect();
        for index in indices {
            let start = (index * PAGE).max(offset);
            let stop = ((index + 1) * PAGE).min(end);
            if stop - start == PAGE {
                self.pages.remove(&index);
            } else if let Some(page) = self.pages.get_mut(&index) {
                page[(start - index * PAGE) as usize..(stop - index * PAGE) as usize].fill(0);
            }
        }
    }

    /// The written parts in ascending order, page by page, cut off at the end of the file.
    pub fn segments(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().map(|(index, page)| {
            let start = index * PAGE;
            (start, &page[..(self.length - start).min(PAGE) as usize])
        })
    }

    /// Writes a real file that is sparse where this one is.
    pub fn write_to_path(&self, path: &Path) -> io::Result<()> {
        let target = File::create(path)?;
        for (offset, bytes) in self.segments() {
            target.write_all_at(bytes, offset)?;
        }
        target.set_len(self.length)
    }
}

impl From<&SparseFile> for Vec<u8> {
    /// All bytes; for small files.
    fn from(file: &SparseFile) -> Self {
        file.read(0, file.len() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::SparseFile;

    #[test]
    fn reads_back_what_was_written_and_zeros_elsewhere() {
        let mut file = SparseFile::new();
        file.write(4090, &[7; 12]);
        file.write((60 << 40) - 3, b"tib");
        assert_eq!(file.len(), 60 << 40);
        assert_eq!(file.resident_bytes(), 3 * 4096);
        assert_eq!(file.read(4088, 16), [0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
        assert_eq!(file.read((60 << 40) - 4, 8), b"\0tib\0\0\0\0");
    }

    #[test]
    fn cutting_off_forgets_the_bytes() {
        let mut file = SparseFile::from_bytes(&[9; 10_000]);
        file.set_len(5000);
        file.set_len(10_000);
        assert_eq!(file.read(0, 5000), [9; 5000]);
        assert_eq!(file.read(5000, 5000), [0; 5000]);
        file.zero(100, 4000);
        assert_eq!(file.read(99, 4002).iter().filter(|byte| **byte == 9).count(), 2);
    }

    #[test]
    fn a_real_file_round_trips_and_is_sparse() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut file = SparseFile::new();
        file.write(3 << 30, &[5; 5000]);
        file.set_len(4 << 30);
        file.write_to_path(&path).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 4 << 30);
        assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) < 1000);
        let whole: Vec<u8> = (&SparseFile::from_bytes(&[1, 2, 3])).into();
        assert_eq!(whole, [1, 2, 3]);
    }
}
