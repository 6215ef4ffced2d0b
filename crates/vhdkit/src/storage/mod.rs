//! Bytes at offsets: everything the library asks of the outside world.
//!
//! A [`Storage`] knows nothing of VHDX. The library holds it as `Arc<dyn Storage>`; a virtual call beside a
//! system call costs nothing. [`FileStorage`] is a regular file or a block device, [`MemoryStorage`] a sparse file
//! in memory, [`OverlayStorage`] a view that keeps what is written to it in memory. [`NewFile`] is a file that gets
//! its name only when it is complete.

mod file;
mod filesystem;
pub(crate) mod lock;
mod memory;
mod newfile;
mod overlay;
mod reopen;
mod sys;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;

use crate::error::Result;

pub use file::{FileAccess, FileKind, FileStorage, Sharing};
pub use filesystem::FileSystem;
pub use lock::{LockKind, LockMode, LockReport, is_open_elsewhere};
pub use memory::MemoryStorage;
pub use newfile::{NewFile, NewFileOptions};
pub use overlay::OverlayStorage;

/// What tells two storages apart: opening the same file twice gives the same identity.
///
/// Chains use it to find cycles, and conversions to refuse a target that is the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StorageIdentity {
    /// The device that holds the file, or a number of the process for storage in memory.
    pub device: u64,
    /// The inode, or the address of the storage in memory.
    pub inode: u64,
}

/// Positional, exact, shareable access to the bytes of one file.
///
/// All methods take `&self` and may be called from many threads. Reads and writes are exact: they transfer the
/// whole buffer or fail. What may have been written when a write fails is unknown. An empty buffer and an empty range
/// (also one that ends before it starts) succeed and change nothing, wherever they lie.
pub trait Storage: Debug + Send + Sync {
    /// The length in bytes (of a block device: its capacity).
    ///
    /// # Errors
    /// The operating system's, when the length cannot be told.
    fn len(&self) -> io::Result<u64>;

    /// True when the storage has no bytes at all.
    ///
    /// # Errors
    /// As [`Storage::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the bytes asked for reach past the end; otherwise the operating system's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// As [`Storage::read_at`], but `Ok(false)`, with nothing of use in `buf`, where the medium would have to be waited
    /// for. Storage that cannot tell always answers that.
    ///
    /// # Errors
    /// As [`Storage::read_at`]; an error may also be left to the call that waits.
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        let _ = (buf, offset);
        Ok(false)
    }

    /// Writes all of `buf` at `offset`, growing a file when needed.
    ///
    /// # Errors
    /// The operating system's; some of the bytes may have been written.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Sets the length. Whether what a growth adds reads as zero is told by
    /// [`Storage::growth_reads_zero`]. A block device accepts any length up to its capacity and ignores it.
    ///
    /// # Errors
    /// The operating system's; `InvalidInput` for a block device that is too small.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable, the length included.
    ///
    /// # Errors
    /// The operating system's. After a failure the state on the medium is unknown.
    fn sync(&self) -> io::Result<()>;

    /// Whether space that [`Storage::set_len`] or a write past the end adds reads as zero.
    fn growth_reads_zero(&self) -> bool {
        true
    }

    /// Makes a range read as zero, by the cheapest means there is; writes zeros where there is none.
    /// The range may reach past the end, which then grows. The space of the range may stay or become allocated:
    /// [`Storage::punch_hole`] is what gives it back.
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        write_zeros(self, range)
    }

    /// Gives the space of a range back; it then reads as zero. What lies past the end is left out, and the length stays.
    /// `Ok(false)`, with nothing changed, when the storage cannot do that.
    ///
    /// # Errors
    /// The operating system's.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        let _ = range;
        Ok(false)
    }

    /// Reserves space for a range, so that later writes into it do not fail for lack of it. Grows the file to the
    /// end of the range. `Ok(false)`, with nothing changed, when the storage cannot do that.
    ///
    /// # Errors
    /// The operating system's.
    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        let _ = range;
        Ok(false)
    }

    /// Begins to bring a range to the medium, and does not wait for it: a hint that makes the next sync shorter. What was
    /// just written stays in the page cache.
    fn begin_write_out(&self, range: Range<u64>) {
        let _ = range;
    }

    /// The first range at or after `range.start`, clipped to `range`, that may hold data; what lies before it reads
    /// as zero. `None` when all of `range` is a hole. Storage that cannot tell answers `Some(range)`.
    /// Positions past the end count as hole.
    ///
    /// # Errors
    /// The operating system's.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok((!range.is_empty()).then_some(range))
    }

    /// Where the first range that [`Storage::next_data`] would give begins, without looking for its end, which can
    /// take long.
    ///
    /// # Errors
    /// The operating system's.
    fn data_start(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        Ok(self.next_data(range)?.map(|found| found.start))
    }

    /// Makes a range here share the blocks of a range of `source` (reflink). `Ok(false)`, with nothing changed, when
    /// the file system cannot do that for this pair or alignment.
    ///
    /// # Errors
    /// The operating system's.
    fn clone_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<bool> {
        let _ = (source, source_offset, offset, length);
        Ok(false)
    }

    /// Copies a range from `source` inside the kernel. Returns how many bytes were copied from the start of the range
    /// on: fewer than asked, down to 0, when the kernel cannot do (more of) it.
    ///
    /// # Errors
    /// The operating system's.
    fn copy_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        let _ = (source, source_offset, offset, length);
        Ok(0)
    }

    /// The open file behind this storage, when there is just one and its offsets are this storage's offsets.
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// Changes a live storage between reading and writing: what others may do with the file meanwhile, and whether
    /// writes are let through. Changing to what it is already does nothing. Storage that nobody else can reach has
    /// nothing to change.
    ///
    /// The caller sees to it that no write is in flight when writing ends; nothing is synced.
    ///
    /// # Errors
    /// When writing is not possible, for lack of permission or because somebody else uses the file, everything stays as
    /// it was. When ending it fails, writes are refused nevertheless, and others may still be kept out.
    fn set_access(&self, write: bool) -> Result<()> {
        let _ = write;
        Ok(())
    }

    /// What tells this storage apart from others, when it can be told.
    fn identity(&self) -> Option<StorageIdentity> {
        None
    }
}

/// Whether the length of a storage can change: that of a block device cannot.
pub(crate) fn is_resizable(storage: &dyn Storage) -> bool {
    let is_device = |file: &File| {
        file.metadata().is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type()))
    };
    !storage.as_file().is_some_and(is_device)
}

/// Zeros to write from, for storage that has no better way.
static ZEROS: [u8; 256 * 1024] = [0; 256 * 1024];

/// Writes zeros over `range` in pieces.
fn write_zeros<S: Storage + ?Sized>(storage: &S, range: Range<u64>) -> io::Result<()> {
    let mut offset = range.start;
    while offset < range.end {
        let left = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
        let piece = ZEROS.get(..left.min(ZEROS.len())).unwrap_or(&ZEROS);
        storage.write_at(piece, offset)?;
        offset += piece.len() as u64; // cannot pass range.end: piece is at most what is left
    }
    Ok(())
}
