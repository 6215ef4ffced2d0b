//! What the fuzz targets share: images and disks in few bytes, with checksums put right.
//!
//! ```text
//! chain:    u16 length of the child's input, the child's input, the parent's input
//! input:    | fix | file length | segment | segment | ...        (all numbers little-endian)
//! fix       u8    bit n set: checksum n is left as it is (0, 1 headers; 2, 3 region tables; 4 log entries);
//!                 bits 5 to 7: so many bytes are cut off the file
//! length    u16   in units of 4096 bytes
//! segment   u32 offset in units of 16 bytes, u16 length, then so many bytes
//! ```
//!
//! A mutation of such an input moves, cuts or changes a structure of the image, where a mutation of the image itself
//! would nearly always hit data that nobody looks at, or break a checksum.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vhdkit::format::checksum::checksum;
use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES, OFFSETS as HEADER_OFFSETS};
use vhdkit::format::log::ENTRY_SIGNATURE;
use vhdkit::format::region::{OFFSETS as REGION_OFFSETS, TABLE_BYTES};
use vhdkit::storage::{MemoryStorage, Storage, StorageIdentity};

/// Longest log that checksums are put right in: the seeds have logs of 1 MiB.
const LOG_BYTES_MAX: usize = 2 << 20;
/// Longest log entry that gets its checksum.
const ENTRY_BYTES_MAX: usize = 1 << 20;

/// Splits a number off an input.
pub fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(*first)
}

/// Splits the input of a chain.
pub fn chain(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut rest = input;
    let length = usize::from(u16::from_le_bytes(take(&mut rest)?));
    Some(rest.split_at(length.min(rest.len())))
}

/// Gives both headers of an image another data write GUID.
pub fn set_data_write_guid(storage: &MemoryStorage, guid: Guid) {
    for offset in HEADER_OFFSETS {
        if storage.write_at(&guid.stored(), offset + 32).is_ok() {
            put_right(storage, offset, HEADER_BYTES);
        }
    }
}

/// The image that an input describes.
pub fn image(input: &[u8]) -> Option<Arc<MemoryStorage>> {
    let mut rest = input;
    let [fix] = take(&mut rest)?;
    let units = u16::from_le_bytes(take(&mut rest)?);
    let length = (u64::from(units) * 4096).saturating_sub(u64::from(fix >> 5));
    let storage = MemoryStorage::with_len(length);
    while let Some(offset) = take(&mut rest) {
        let offset = u64::from(u32::from_le_bytes(offset)) * 16;
        let Some(count) = take(&mut rest) else { break };
        let count = usize::from(u16::from_le_bytes(count)).min(rest.len());
        let (bytes, tail) = rest.split_at(count);
        rest = tail;
        let inside = usize::try_from(length.saturating_sub(offset)).map_or(count, |left| left.min(count));
        storage.write_at(&bytes[..inside], offset).expect("memory takes any write inside of it");
    }
    for (bit, offset) in HEADER_OFFSETS.into_iter().enumerate() {
        if fix >> bit & 1 == 0 {
            put_right(&storage, offset, HEADER_BYTES);
        }
    }
    for (bit, offset) in REGION_OFFSETS.into_iter().enumerate() {
        if fix >> (bit + 2) & 1 == 0 {
            put_right(&storage, offset, TABLE_BYTES);
        }
    }
    if fix >> 4 & 1 == 0 {
        put_log_right(&storage);
    }
    Some(Arc::new(storage))
}

/// The disk that an input of `filesystems` describes, and its sectors:
///
/// ```text
/// sector   u8    bit 0: sectors of 4096 bytes
/// length   u16   in units of 64 KiB
/// segment  u32 offset in units of 16 bytes, u16 length, then so many bytes; or, with the upper bit of the length
///          set, one byte that is repeated 16 times the rest of the length
/// ```
///
/// Checksums need not be right: the library takes any when it is built for fuzzing.
pub fn disk(input: &[u8]) -> Option<(u32, Arc<MemoryStorage>)> {
    let mut rest = input;
    let [sector] = take(&mut rest)?;
    let length = u64::from(u16::from_le_bytes(take(&mut rest)?)) << 16;
    let storage = MemoryStorage::with_len(length);
    while let (Some(offset), Some(count)) = (take(&mut rest), take(&mut rest)) {
        let offset = u64::from(u32::from_le_bytes(offset)) * 16;
        let count = u16::from_le_bytes(count);
        let inside = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let bytes = if count >> 15 == 1 {
            let Some([byte]) = take(&mut rest) else { break };
            vec![byte; (usize::from(count & 0x7fff) * 16).min(inside)]
        } else {
            let (bytes, tail) = rest.split_at(usize::from(count).min(rest.len()));
            rest = tail;
            bytes[..bytes.len().min(inside)].to_vec()
        };
        storage.write_at(&bytes, offset).expect("memory takes any write inside of it");
    }
    Some((if sector & 1 == 0 { 512 } else { 4096 }, Arc::new(storage)))
}

fn read(storage: &MemoryStorage, offset: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    storage.read_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

fn put_right(storage: &MemoryStorage, offset: u64, length: usize) {
    if let Some(bytes) = read(storage, offset, length) {
        storage.write_at(&checksum(&bytes).to_le_bytes(), offset + 4).expect("it was just read there");
    }
}

/// Gives every sector of the log that begins like an entry the checksum of as many bytes as it claims.
fn put_log_right(storage: &MemoryStorage) {
    let Some(header) = read(storage, HEADER_OFFSETS[0], 80) else { return };
    let length = u32::from_le_bytes([header[68], header[69], header[70], header[71]]) as usize;
    let offset = u64::from_le_bytes(header[72..80].try_into().expect("eight bytes"));
    if length > LOG_BYTES_MAX || length % 4096 != 0 || offset >= 1 << 40 {
        return;
    }
    let Some(ring) = read(storage, offset, length) else { return };
    for start in (0..length).step_by(4096).filter(|start| ring[*start..].starts_with(&ENTRY_SIGNATURE)) {
        let claimed = u32::from_le_bytes(ring[start + 8..start + 12].try_into().expect("four bytes")) as usize;
        if claimed % 4096 != 0 || claimed == 0 || claimed > length.min(ENTRY_BYTES_MAX) {
            continue;
        }
        let end = start + claimed;
        let mut entry = ring[start..end.min(length)].to_vec();
        entry.extend_from_slice(&ring[..end.saturating_sub(length)]);
        storage.write_at(&checksum(&entry).to_le_bytes(), offset + start as u64 + 4).expect("it was just read there");
    }
}

/// Storage that must only be read.
#[derive(Debug)]
pub struct ReadOnly(pub Arc<MemoryStorage>);

impl Storage for ReadOnly {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, _buf: &[u8], offset: u64) -> io::Result<()> {
        panic!("a reader wrote at {offset:#x}");
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        panic!("a reader set the length to {len:#x}");
    }

    fn sync(&self) -> io::Result<()> {
        panic!("a reader synced");
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(range)
    }

    fn identity(&self) -> Option<StorageIdentity> {
        self.0.identity()
    }
}
