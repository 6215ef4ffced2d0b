//! What a power cut left, as storage that can be read.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdkit::storage::{Storage, StorageIdentity};

use super::pages::PageMap;
use super::storage::SimStorage;

static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

/// A file as a power cut left it. It cannot be written; [`CrashImage::writable`] makes a storage from it without
/// copying anything.
#[derive(Clone, Debug)]
pub struct CrashImage {
    pages: Arc<PageMap>,
    identity: StorageIdentity,
}

impl CrashImage {
    /// An image of these contents.
    #[must_use]
    pub fn new(pages: PageMap) -> Self {
        // No file system has this device number.
        let inode = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        Self { pages: Arc::new(pages), identity: StorageIdentity { device: u64::MAX - 3, inode } }
    }

    /// The contents.
    #[must_use]
    pub fn pages(&self) -> &PageMap {
        &self.pages
    }

    /// The image as storage.
    #[must_use]
    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.clone())
    }

    /// A storage that starts with these contents, all of them durable.
    #[must_use]
    pub fn writable(&self) -> SimStorage {
        SimStorage::from_pages(PageMap::clone(&self.pages))
    }
}

fn refuse<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a crash image is only looked at"))
}

impl Storage for CrashImage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.pages.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.pages.len() => self.pages.read(offset, buf),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        refuse()
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        refuse()
    }

    fn sync(&self) -> io::Result<()> {
        refuse()
    }

    fn zero_range(&self, _range: Range<u64>) -> io::Result<()> {
        refuse()
    }

    fn punch_hole(&self, _range: Range<u64>) -> io::Result<bool> {
        refuse()
    }

    fn allocate(&self, _range: Range<u64>) -> io::Result<bool> {
        refuse()
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(self.pages.next_data(range))
    }

    fn data_start(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        Ok(self.pages.data_start(range))
    }

    fn identity(&self) -> Option<StorageIdentity> {
        Some(self.identity)
    }
}
