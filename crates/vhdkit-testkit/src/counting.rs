//! Storage that counts what is asked of the storage below it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdkit::storage::{Storage, StorageIdentity};

/// A method of [`Storage`] that reaches the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// `len`.
    Len,
    /// `read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `set_len`.
    SetLen,
    /// `sync`.
    Sync,
    /// `zero_range`.
    ZeroRange,
    /// `punch_hole`.
    PunchHole,
    /// `allocate`.
    Allocate,
    /// `next_data` and `data_start`.
    FindData,
    /// `clone_range`.
    CloneRange,
    /// `copy_range`.
    CopyRange,
    /// `set_access`.
    SetAccess,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Len,
        Self::Read,
        Self::Write,
        Self::SetLen,
        Self::Sync,
        Self::ZeroRange,
        Self::PunchHole,
        Self::Allocate,
        Self::FindData,
        Self::CloneRange,
        Self::CopyRange,
        Self::SetAccess,
    ];
}

/// How many calls there were, and how many bytes they were about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    calls: [u64; Method::ALL.len()],
    bytes: [u64; Method::ALL.len()],
}

impl Counts {
    /// The calls of a method, those that failed too.
    #[must_use]
    pub fn calls(&self, method: Method) -> u64 {
        self.calls[method as usize]
    }

    /// The bytes of the calls that did what they were asked for: read, written, zeroed, punched, allocated, cloned or
    /// copied. Other methods have none.
    #[must_use]
    pub fn bytes(&self, method: Method) -> u64 {
        self.bytes[method as usize]
    }

    /// What was added since an earlier look.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = *self;
        for (now, before) in difference.calls.iter_mut().zip(earlier.calls) {
            *now -= before;
        }
        for (now, before) in difference.bytes.iter_mut().zip(earlier.bytes) {
            *now -= before;
        }
        difference
    }
}

#[derive(Debug, Default)]
struct Counter {
    calls: AtomicU64,
    bytes: AtomicU64,
}

/// Storage that counts what is asked of the storage below it; each call costs one or two relaxed additions.
///
/// It gives the file below away ([`Storage::as_file`]); what is done with that directly is not counted.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::storage::{MemoryStorage, Storage};
/// use vhdkit_testkit::{CountingStorage, Method};
///
/// let storage = CountingStorage::new(Arc::new(MemoryStorage::new()));
/// storage.write_at(b"abc", 0)?;
/// let before = storage.counts();
/// storage.write_at(b"de", 3)?;
/// storage.sync()?;
/// let counts = storage.counts().since(&before);
/// assert_eq!((counts.calls(Method::Write), counts.bytes(Method::Write), counts.calls(Method::Sync)), (1, 2, 1));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct CountingStorage {
    inner: Arc<dyn Storage>,
    counters: [Counter; Method::ALL.len()],
}

impl CountingStorage {
    /// Counts from zero.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, counters: std::array::from_fn(|_| Counter::default()) }
    }

    /// What was counted up to now. Calls that other threads are making may be in it by half.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            calls: std::array::from_fn(|index| self.counters[index].calls.load(Ordering::Relaxed)),
            bytes: std::array::from_fn(|index| self.counters[index].bytes.load(Ordering::Relaxed)),
        }
    }

    /// The disk syncs up to now, those that failed too.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.counters[Method::Sync as usize].calls.load(Ordering::Relaxed)
    }

    fn call(&self, method: Method) {
        self.counters[method as usize].calls.fetch_add(1, Ordering::Relaxed);
    }

    fn moved(&self, method: Method, bytes: u64) {
        self.counters[method as usize].bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The bytes of a range, none if it ends before it starts.
fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

impl Storage for CountingStorage {
    fn len(&self) -> io::Result<u64> {
        self.call(Method::Len);
        self.inner.len()
    }

    fn is_empty(&self) -> io::Result<bool> {
        self.call(Method::Len);
        self.inner.is_empty()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.call(Method::Read);
        self.inner.read_at(buf, offset)?;
        self.moved(Method::Read, buf.len() as u64);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.call(Method::Write);
        self.inner.write_at(buf, offset)?;
        self.moved(Method::Write, buf.len() as u64);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call(Method::SetLen);
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.call(Method::Sync);
        self.inner.sync()
    }

    fn growth_reads_zero(&self) -> bool {
        self.inner.growth_reads_zero()
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.call(Method::ZeroRange);
        let bytes = length(&range);
        self.inner.zero_range(range)?;
        self.moved(Method::ZeroRange, bytes);
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        self.call(Method::PunchHole);
        let bytes = length(&range);
        let punched = self.inner.punch_hole(range)?;
        self.moved(Method::PunchHole, if punched { bytes } else { 0 });
        Ok(punched)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        self.call(Method::Allocate);
        let bytes = length(&range);
        let allocated = self.inner.allocate(range)?;
        self.moved(Method::Allocate, if allocated { bytes } else { 0 });
        Ok(allocated)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.call(Method::FindData);
        self.inner.next_data(range)
    }

    fn data_start(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        self.call(Method::FindData);
        self.inner.data_start(range)
    }

    fn clone_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<bool> {
        self.call(Method::CloneRange);
        let cloned = self.inner.clone_range(source, source_offset, offset, length)?;
        self.moved(Method::CloneRange, if cloned { length } else { 0 });
        Ok(cloned)
    }

    fn copy_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        self.call(Method::CopyRange);
        let copied = self.inner.copy_range(source, source_offset, offset, length)?;
        self.moved(Method::CopyRange, copied);
        Ok(copied)
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file()
    }

    fn set_access(&self, write: bool) -> vhdkit::Result<()> {
        self.call(Method::SetAccess);
        self.inner.set_access(write)
    }

    fn identity(&self) -> Option<StorageIdentity> {
        self.inner.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage_suite;
    use vhdkit::storage::{FileStorage, MemoryStorage};

    fn file() -> FileStorage {
        FileStorage::from_file(tempfile::tempfile().unwrap(), None).unwrap()
    }

    #[test]
    fn it_behaves_as_what_is_below() {
        storage_suite::run(|| Arc::new(CountingStorage::new(Arc::new(MemoryStorage::new()))));
        storage_suite::run(|| Arc::new(CountingStorage::new(Arc::new(MemoryStorage::new().without_zero_growth()))));
        storage_suite::run(|| Arc::new(CountingStorage::new(Arc::new(file()))));
    }

    #[test]
    fn every_method_is_counted_and_forwarded() {
        let inner = Arc::new(file());
        let storage = CountingStorage::new(inner.clone());
        storage.set_len(10).unwrap();
        assert!(!storage.is_empty().unwrap());
        storage.write_at(&[1; 5], 2).unwrap();
        storage.zero_range(0..3).unwrap();
        storage.punch_hole(3..4).unwrap();
        let allocated = storage.allocate(0..8192).unwrap();
        storage.read_at(&mut [0; 7], 0).unwrap();
        storage.next_data(0..10).unwrap();
        storage.data_start(0..10).unwrap();
        let cloned = storage.clone_range(&file(), 0, 0, 4096).unwrap_or(false);
        let source = file();
        source.write_at(&[4; 6], 0).unwrap();
        let copied = storage.copy_range(&source, 0, 0, 6).unwrap();
        storage.sync().unwrap();
        storage.set_access(false).unwrap();
        storage.write_at(&[1], 0).unwrap_err();
        storage.read_at(&mut [0; 7], 1 << 40).unwrap_err();
        storage.len().unwrap();
        let bytes = |on: bool, bytes: u64| if on { bytes } else { 0 };
        let counts = storage.counts();
        let wanted = [
            (Method::Len, 2, 0),
            (Method::Read, 2, 7),
            (Method::Write, 2, 5),
            (Method::SetLen, 1, 0),
            (Method::Sync, 1, 0),
            (Method::ZeroRange, 1, 3),
            (Method::PunchHole, 1, 1),
            (Method::Allocate, 1, bytes(allocated, 8192)),
            (Method::FindData, 2, 0),
            (Method::CloneRange, 1, bytes(cloned, 4096)),
            (Method::CopyRange, 1, copied),
            (Method::SetAccess, 1, 0),
        ];
        for (method, calls, bytes) in wanted {
            assert_eq!((counts.calls(method), counts.bytes(method)), (calls, bytes), "{method:?}");
        }
        assert_eq!(wanted.map(|(method, ..)| method), Method::ALL);
        assert_eq!(storage.syncs(), 1);
        assert_eq!(storage.identity(), inner.identity());
        assert!(storage.as_file().is_some() && storage.growth_reads_zero());
        assert_eq!(storage.counts().since(&counts), Counts::default());
    }
}
