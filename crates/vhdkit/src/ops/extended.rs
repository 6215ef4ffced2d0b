//! A file as if it were longer.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::storage::Storage;

/// Reads a file as if it went on with zeros.
pub(super) fn read_extended(base: &dyn Storage, base_length: u64, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let there = usize::try_from(base_length.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
    let (data, beyond) = buf.split_at_mut(there);
    beyond.fill(0);
    if data.is_empty() { Ok(()) } else { base.read_at(data, offset) }
}

/// A file that goes on with zeros.
#[derive(Debug)]
pub(super) struct Extended {
    base: Arc<dyn Storage>,
    base_length: u64,
    length: u64,
}

impl Extended {
    /// A file of `base_length` bytes as if it had `length`.
    pub(super) fn new(base: &Arc<dyn Storage>, base_length: u64, length: u64) -> Self {
        Self { base: Arc::clone(base), base_length, length }
    }
}

impl Storage for Extended {
    fn len(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.length) && !buf.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read_extended(self.base.as_ref(), self.base_length, buf, offset)
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.base.next_data(range.start..range.end.min(self.base_length).max(range.start))
    }
}
