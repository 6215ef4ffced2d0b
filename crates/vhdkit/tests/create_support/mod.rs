//! What the tests of create, convert, measure and compare share. The parsing here is on purpose not the library's.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use vhdkit::format::guid::Guid;
use vhdkit::image::{Image, OpenOptions, RawDisk};
use vhdkit::ops::Progress;
use vhdkit::ops::create::CreateOptions;
use vhdkit::storage::{FileStorage, MemoryStorage, Storage};

/// A new, empty file as storage.
pub fn file_storage(path: &Path) -> Arc<dyn Storage> {
    let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    Arc::new(FileStorage::from_file(file, Some(path.to_owned())).unwrap())
}

/// An existing file as storage, without locks.
pub fn existing(path: &Path) -> Arc<dyn Storage> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    Arc::new(FileStorage::from_file(file, Some(path.to_owned())).unwrap())
}

/// Bytes that a file takes on its file system.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

pub fn read_u64(storage: &dyn Storage, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, offset).unwrap();
    u64::from_le_bytes(bytes)
}

/// Where the BAT or the metadata region lies, by the first region table.
pub fn region_offset(storage: &dyn Storage, bat: bool) -> u64 {
    let wanted = if bat { 0x2dc2_7766_u64 } else { 0x8b7c_a206 };
    (0..2_u64)
        .map(|entry| (192 << 10) + 16 + 32 * entry)
        .find(|entry| read_u64(storage, *entry) & 0xffff_ffff == wanted)
        .map(|entry| read_u64(storage, entry + 16))
        .unwrap()
}

pub fn bat_entry(storage: &dyn Storage, bat: u64, index: u64) -> u64 {
    read_u64(storage, bat + 8 * index)
}

/// The same options with every identifier given.
pub fn fixed_guids(options: CreateOptions) -> CreateOptions {
    CreateOptions {
        disk_id: Some(Guid::from_printed(1)),
        file_write_guid: Some(Guid::from_printed(2)),
        data_write_guid: Some(Guid::from_printed(3)),
        ..options
    }
}

/// Progress that asks a function whether to go on.
pub struct Hook<F>(pub F);

impl<F: Fn(u64) -> ControlFlow<()> + Sync> Progress for Hook<F> {
    fn advance(&self, done: u64, _total: Option<u64>) -> ControlFlow<()> {
        (self.0)(done)
    }
}

/// Storage that is full behind an offset, and can neither reserve nor clone.
#[derive(Debug)]
pub struct Limited {
    inner: MemoryStorage,
    limit: u64,
}

impl Limited {
    pub fn new(limit: u64) -> Self {
        Self { inner: MemoryStorage::new(), limit }
    }
}

impl Storage for Limited {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 > self.limit {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Storage of zeros with bytes of their own in some ranges.
pub fn marked(size: u64, ranges: impl IntoIterator<Item = Range<u64>>) -> Arc<dyn Storage> {
    let storage = MemoryStorage::with_len(size);
    for range in ranges {
        let bytes: Vec<u8> = range.clone().map(|at| (at % 251) as u8 | 1).collect();
        storage.write_at(&bytes, range.start).unwrap();
    }
    Arc::new(storage)
}

/// A raw disk of 512 byte sectors.
pub fn raw(storage: &Arc<dyn Storage>) -> RawDisk {
    RawDisk::new(Arc::clone(storage), 512).unwrap()
}

/// Opens an image that has no parent, with nothing to complain about.
pub fn open(storage: &Arc<dyn Storage>) -> Image {
    let image = OpenOptions::new().open(Arc::clone(storage), None).unwrap();
    assert_eq!(image.layers()[0].findings(), []);
    image
}
