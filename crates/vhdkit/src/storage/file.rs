//! A regular file or a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::lock::{self, LockMode, LockReport};
use super::{FileSystem, Storage, StorageIdentity, reopen, sys};
use crate::error::{Error, ErrorKind, Result};

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileAccess {
    /// Reading alone.
    Read,
    /// Reading and writing.
    Write,
}

/// How a file goes together with other users of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Locked as QEMU locks images: any number of readers, or one writer.
    #[default]
    Normal,
    /// Not locked and no lock looked at: what is read may be changing meanwhile. For reading only.
    ForceShare,
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file: it can grow and have holes.
    Regular,
    /// A block device: it has its capacity, and what nobody wrote holds anything.
    BlockDevice,
}

/// Parts of a block device are zeroed and discarded in multiples of this; no device has larger logical blocks.
const DEVICE_ALIGNMENT: u64 = 4096;

/// The most bytes that one in-kernel copy is asked for; the kernel itself stops a little below 2 GiB.
const COPY_BYTES_MAX: u64 = 1 << 30;

/// How often, and after what pause, a file is opened again that somebody holds a lease on. Programs that only look
/// whether a file is in use, as [`lock::is_open_elsewhere`] does, hold one for microseconds.
const LEASE_ATTEMPTS: u32 = 5;
const LEASE_PAUSE: Duration = Duration::from_millis(10);

/// The file behind a loop device that shows all of it: the same bytes under another name.
fn loop_file(device: u64) -> Option<StorageIdentity> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let directory = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/loop"));
    if std::fs::read_to_string(directory.join("offset")).ok()?.trim() != "0" {
        return None;
    }
    let file = std::fs::read_to_string(directory.join("backing_file")).ok()?;
    let metadata = std::fs::metadata(file.trim_end_matches('\n')).ok()?;
    Some(StorageIdentity { device: metadata.dev(), inode: metadata.ino() })
}

/// Whether a block device can zero a range by itself, when that can be told.
fn writes_zeroes(device: u64) -> Option<bool> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let directory = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition has no queue of its own; the directory above it is its disk's.
    let read = |queue: &str| std::fs::read_to_string(directory.join(queue).join("write_zeroes_max_bytes")).ok();
    let bytes = read("queue").or_else(|| read("../queue"))?;
    Some(bytes.trim() != "0")
}

/// A regular file or a block device, opened or handed over. Offsets are the file's own.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: Option<PathBuf>,
    kind: FileKind,
    identity: StorageIdentity,
    lock: LockReport,
    sharing: Sharing,
    /// Whether `file` itself was opened for writing.
    file_writes: bool,
    /// The same file opened once more, for writing. It stays open when writing ends: requests may be using it.
    writer: OnceLock<File>,
    /// Whether writes are let through at this moment.
    writing: AtomicBool,
    /// Held while that changes.
    change: Mutex<()>,
    /// Whether it lies on a file system without a medium; asked for once.
    in_memory: OnceLock<bool>,
}

impl FileStorage {
    /// Opens a regular file or a block device and locks it for as long as this storage lives.
    ///
    /// ```
    /// use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
    ///
    /// # fn main() -> vhdkit::Result<()> {
    /// # let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    /// let storage = FileStorage::open(&path, FileAccess::Read, Sharing::Normal)?;
    /// assert!(storage.path().is_some());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for anything that is neither regular file nor block device, and for
    /// [`Sharing::ForceShare`] with [`FileAccess::Write`]; [`ErrorKind::Locked`] when somebody uses it in a way that
    /// does not go together; otherwise what the operating system says.
    pub fn open(path: &Path, access: FileAccess, sharing: Sharing) -> Result<Self> {
        if sharing == Sharing::ForceShare && access == FileAccess::Write {
            return Err(written_by_others().with_path(path));
        }
        let mode = match access {
            FileAccess::Read => LockMode::Read,
            FileAccess::Write => LockMode::Write,
        };
        let open = || {
            check_type(&std::fs::metadata(path).map_err(|error| open_error(error, access))?)?;
            let mut storage = Self::from_file(open_without_waiting(path, access)?, Some(path.to_owned()))?;
            storage.sharing = sharing;
            if sharing == Sharing::Normal {
                storage.lock = lock::acquire(&storage.file, mode)?;
            }
            Ok(storage)
        };
        open().map_err(|error: Error| error.with_path(path))
    }

    /// Opens a block device to overwrite all of it: nobody else may use it, in particular it must not be mounted.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for anything but a block device; [`ErrorKind::Refused`] for one that is mounted
    /// or otherwise claimed by the system; [`ErrorKind::Locked`] for one that is open as an image; otherwise what the
    /// operating system says.
    pub fn open_block_target(path: &Path) -> Result<Self> {
        let open = || {
            let metadata = std::fs::metadata(path).map_err(|error| open_error(error, FileAccess::Write))?;
            if !metadata.file_type().is_block_device() {
                return Err(Error::new(ErrorKind::InvalidArgument, "is not a block device"));
            }
            // On a block device O_EXCL without O_CREAT asks for it alone.
            let flags = OFlags::EXCL | OFlags::NONBLOCK;
            let file = match open_with(path, FileAccess::Write, flags) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    let message = "the device, or a partition of it, is mounted or in use by the system";
                    let hint = "unmount it, or take it out of the swap, RAID, LVM or encrypted volume that uses it";
                    return Err(Error::new(ErrorKind::Refused, message).with_hint(hint));
                }
                other => other.map_err(|error| open_error(error, FileAccess::Write))?,
            };
            let mut storage = Self::from_file(file, Some(path.to_owned()))?;
            if storage.kind != FileKind::BlockDevice {
                return Err(Error::new(ErrorKind::InvalidArgument, "is not a block device any more"));
            }
            storage.lock = lock::acquire(&storage.file, LockMode::Write)?;
            Ok(storage)
        };
        open().map_err(|error: Error| error.with_path(path))
    }

    /// Takes over an open file, without locking it. The path is for messages, and for opening the file for writing
    /// later where that cannot be done without.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when it is neither regular file nor block device, and when it was opened for
    /// appending.
    pub fn from_file(file: File, path: Option<PathBuf>) -> Result<Self> {
        Self::take_over(file, path.clone()).map_err(|error| match path {
            Some(path) => error.with_path(path),
            None => error,
        })
    }

    fn take_over(file: File, path: Option<PathBuf>) -> Result<Self> {
        let metadata = file.metadata().map_err(|error| Error::io("cannot tell what kind of file it is", error))?;
        let kind = check_type(&metadata)?;
        let flags = rustix::fs::fcntl_getfl(&file);
        let flags = flags.map_err(|error| Error::io("cannot tell what it is open for", error.into()))?;
        let file_writes = flags & OFlags::RWMODE != OFlags::RDONLY;
        if file_writes && flags.contains(OFlags::APPEND) {
            // The kernel puts whatever is written at the end then, wherever it belongs.
            let error = Error::new(ErrorKind::InvalidArgument, "is open for appending, where nothing else can be done");
            return Err(error.with_hint("open it for reading and writing (in a shell with <>, not with >>)"));
        }
        let identity = match kind {
            FileKind::Regular => StorageIdentity { device: metadata.dev(), inode: metadata.ino() },
            // A device may have many names, each with its own inode; no file has the highest inode number.
            FileKind::BlockDevice => {
                loop_file(metadata.rdev()).unwrap_or(StorageIdentity { device: metadata.rdev(), inode: u64::MAX })
            }
        };
        Ok(Self {
            file,
            path,
            kind,
            identity,
            lock: LockReport::not_asked(),
            sharing: Sharing::Normal,
            file_writes,
            writer: OnceLock::new(),
            writing: AtomicBool::new(file_writes),
            change: Mutex::new(()),
            in_memory: OnceLock::new(),
        })
    }

    /// Locks a file that was taken over.
    pub(crate) fn lock(&mut self, mode: LockMode) -> Result<()> {
        self.lock = lock::acquire(&self.file, mode)?;
        Ok(())
    }

    /// What kind of file it is.
    #[must_use]
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// The path that it was opened by, for messages.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How the file is locked, and what the user should know about that.
    #[must_use]
    pub fn lock_report(&self) -> &LockReport {
        &self.lock
    }

    /// What the file lies on.
    ///
    /// # Errors
    /// The operating system's.
    pub fn file_system(&self) -> io::Result<FileSystem> {
        FileSystem::of(&self.file)
    }

    /// Whether the file system keeps everything in memory.
    fn is_in_memory(&self) -> bool {
        // The node of a block device may lie there too, which says nothing about the device.
        let is_there = || self.file_system().is_ok_and(FileSystem::is_in_memory);
        *self.in_memory.get_or_init(|| self.kind == FileKind::Regular && is_there())
    }

    /// The file opened for writing, whether writes are let through or not.
    #[inline]
    fn written_file(&self) -> &File {
        if self.file_writes { &self.file } else { self.writer.get().unwrap_or(&self.file) }
    }

    /// Where to write, if that is what the storage is for at this moment.
    #[inline]
    fn target(&self) -> io::Result<&File> {
        if self.writing.load(Ordering::Acquire) { Ok(self.written_file()) } else { Err(for_reading()) }
    }

    /// From reading to writing. What fails leaves everything as it was.
    fn begin_writing(&self) -> Result<()> {
        if self.writing.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.sharing == Sharing::ForceShare {
            return Err(written_by_others());
        }
        let has_writer = self.file_writes || self.writer.get().is_some();
        let writer = if has_writer { None } else { Some(reopen::for_writing(&self.file, self.path())?) };
        lock::raise(&self.file, self.lock.how)?;
        if let Some(writer) = writer {
            let _ = self.writer.set(writer); // it is empty, and nobody else changes anything now
        }
        self.writing.store(true, Ordering::Release);
        Ok(())
    }

    /// From writing to reading.
    fn end_writing(&self) -> Result<()> {
        self.writing.store(false, Ordering::Release);
        lock::lower(&self.file, self.lock.how)
    }

    /// Runs fallocate on a range. `Ok(false)` where there is none of that kind.
    fn fallocate(&self, flags: FallocateFlags, range: &Range<u64>) -> io::Result<bool> {
        let length = range.end.saturating_sub(range.start);
        let target = self.target()?;
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(target, flags, range.start, length)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Zeroes a range of a regular file, see [`Storage::zero_range`].
    fn zero_file_range(&self, range: Range<u64>) -> io::Result<()> {
        check_position(range.end)?;
        if self.fallocate(FallocateFlags::ZERO_RANGE, &range)? {
            return Ok(());
        }
        if !self.punch_hole(range.clone())? {
            return super::write_zeros(self, range);
        }
        if self.len()? < range.end {
            // Not by setting the length: that would cut off what somebody else appends at this moment.
            self.target()?.write_all_at(&[0], range.end - 1)?; // range.end > 0: the length is less
        }
        Ok(())
    }

    /// Zeroes a range of a block device: what is aligned by the kernel, the edges by writing.
    fn zero_device_range(&self, range: Range<u64>) -> io::Result<()> {
        if range.end > self.len()? {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let Some(inner) = aligned_part(&range) else { return super::write_zeros(self, range) };
        if !self.fallocate(FallocateFlags::ZERO_RANGE, &inner)? {
            return super::write_zeros(self, range);
        }
        super::write_zeros(self, range.start..inner.start)?;
        super::write_zeros(self, inner.end..range.end)
    }

    /// Punches a hole into a block device, see [`Storage::punch_hole`].
    fn punch_device_hole(&self, range: Range<u64>) -> io::Result<bool> {
        self.target()?;
        let Some(inner) = aligned_part(&range) else { return Ok(false) };
        let device = rustix::fs::fstat(&self.file)?.st_rdev;
        if writes_zeroes(device) == Some(false) {
            return Ok(false);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if !self.fallocate(flags, &inner)? {
            // The kernel asks the device only after dropping the range from its cache, and with it whatever was not
            // synced: what the range holds is unknown now. The space cannot be given back, but the content be kept to.
            super::write_zeros(self, range)?;
            return Ok(true);
        }
        super::write_zeros(self, range.start..inner.start)?;
        super::write_zeros(self, inner.end..range.end)?;
        Ok(true)
    }

    /// Where the next data, or the next hole, begins; `None` at the end, `Err(INVAL)` where that cannot be told.
    fn seek(&self, position: SeekFrom) -> Result<Option<u64>, Errno> {
        match rustix::fs::seek(&self.file, position) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        match self.kind {
            FileKind::Regular => Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0)),
            FileKind::BlockDevice => Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?),
        }
    }

    #[inline]
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|error| read_error(error, offset, buf.len()))
    }

    #[inline]
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        if self.in_memory.get().is_some_and(|in_memory| *in_memory) {
            return self.read_at(buf, offset).map(|()| true);
        }
        let length = buf.len();
        let read = rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT);
        match read {
            Ok(count) => Ok(count == length),
            // The file system cannot tell. What has no medium never waits for one.
            Err(Errno::OPNOTSUPP) if self.is_in_memory() => self.read_at(buf, offset).map(|()| true),
            Err(_) => Ok(false), // whoever waits is told what is wrong
        }
    }

    #[inline]
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() { Ok(()) } else { self.target()?.write_all_at(buf, offset) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.kind {
            FileKind::Regular => self.target()?.set_len(len),
            FileKind::BlockDevice if len <= self.len()? => self.target().map(|_| ()),
            FileKind::BlockDevice => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the block device is too small for that"))
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.written_file().sync_data() // includes the length, and whatever else is needed to read the data again
    }

    fn growth_reads_zero(&self) -> bool {
        self.kind == FileKind::Regular
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        match self.kind {
            _ if range.is_empty() => Ok(()),
            FileKind::Regular => self.zero_file_range(range),
            FileKind::BlockDevice => self.zero_device_range(range),
        }
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        let clipped = range.start..range.end.min(self.len()?);
        match self.kind {
            _ if clipped.is_empty() => Ok(true),
            FileKind::Regular => self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, &clipped),
            FileKind::BlockDevice => self.punch_device_hole(clipped),
        }
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        self.target()?;
        if self.kind == FileKind::BlockDevice {
            // Nor is it asked: kernels before 6.7 drop the range from their cache, with what was not synced, before
            // they refuse.
            return Ok(false);
        }
        check_position(range.end)?;
        self.fallocate(FallocateFlags::empty(), &range)
    }

    fn begin_write_out(&self, range: Range<u64>) {
        // Linux begins to write what is dirty in the range; only what is clean leaves the page cache. A medium in memory
        // ignores it.
        if let Some(length) = range.end.checked_sub(range.start).and_then(NonZeroU64::new) {
            let _ = rustix::fs::fadvise(&self.file, range.start, Some(length), rustix::fs::Advice::DontNeed);
        }
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let clip = |end: u64| {
            let clipped = range.start..range.end.min(end);
            (!clipped.is_empty()).then_some(clipped)
        };
        if range.is_empty() || range.start > MAX_POSITION {
            return Ok(None);
        }
        if self.kind == FileKind::BlockDevice {
            return Ok(clip(self.len()?));
        }
        let start = match self.seek(SeekFrom::Data(range.start)) {
            Ok(Some(start)) if start < range.end => start,
            Ok(_) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(clip(self.len()?)),
            Err(error) => return Err(error.into()),
        };
        // There is a hole at the end of every file, so that none here means that the file was cut meanwhile.
        Ok(match self.seek(SeekFrom::Hole(start))? {
            Some(end) if end > start => Some(start..end.min(range.end)),
            _ => Some(start..range.end),
        })
    }

    fn data_start(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        if self.kind == FileKind::Regular && !range.is_empty() && range.start <= MAX_POSITION {
            match self.seek(SeekFrom::Data(range.start)) {
                Ok(found) => return Ok(found.filter(|start| *start < range.end)),
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.next_data(range)?.map(|found| found.start))
    }

    fn clone_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<bool> {
        if length == 0 {
            return Ok(true); // to the kernel it would mean everything up to the end
        }
        let target = self.target()?;
        let Some(source) = source.as_file() else { return Ok(false) };
        match sys::clone_range(source, source_offset, target, offset, length) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => Ok(false),
                _ => Err(error),
            },
        }
    }

    fn copy_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        if length == 0 {
            return Ok(0);
        }
        let target = self.target()?;
        let Some(source) = source.as_file() else { return Ok(0) };
        let (mut from, mut to, mut copied) = (source_offset, offset, 0_u64);
        while copied < length {
            let piece = usize::try_from((length - copied).min(COPY_BYTES_MAX)).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), piece) {
                Ok(0) => break, // the end of the source
                Ok(count) => copied += count as u64,
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(copied)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn set_access(&self, write: bool) -> Result<()> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner); // it guards no data
        let outcome = if write { self.begin_writing() } else { self.end_writing() };
        outcome.map_err(|error| match &self.path {
            Some(path) => error.with_path(path),
            None => error,
        })
    }

    fn identity(&self) -> Option<StorageIdentity> {
        Some(self.identity)
    }
}

/// The last position that a file can have.
const MAX_POSITION: u64 = i64::MAX.unsigned_abs();

/// Refuses positions that the kernel cannot count, which it would otherwise take for an unsupported operation.
fn check_position(end: u64) -> io::Result<()> {
    if end > MAX_POSITION { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
}

/// The part of a range that lies on whole blocks of any block device.
fn aligned_part(range: &Range<u64>) -> Option<Range<u64>> {
    let start = range.start.checked_next_multiple_of(DEVICE_ALIGNMENT)?;
    let inner = start..range.end - range.end % DEVICE_ALIGNMENT;
    (!inner.is_empty()).then_some(inner)
}

/// The error of a write to storage that is for reading at this moment.
#[cold]
fn for_reading() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "the file is open for reading alone")
}

/// The error of writing a file that others may be writing too.
fn written_by_others() -> Error {
    let error = Error::new(ErrorKind::InvalidArgument, "a file cannot be written while others may write it");
    error.with_hint("open it for reading, or without forced sharing")
}

/// Makes reading where no file reaches the end of file that it is; the kernel calls it an invalid argument.
#[cold]
fn read_error(error: io::Error, offset: u64, length: usize) -> io::Error {
    let end = offset.checked_add(length as u64);
    if error.kind() == io::ErrorKind::InvalidInput && end.is_none_or(|end| end > MAX_POSITION) {
        return io::ErrorKind::UnexpectedEof.into();
    }
    error
}

/// Opens without waiting for anything: a lease that somebody holds, a drive without a medium.
pub(super) fn open_without_waiting(path: &Path, access: FileAccess) -> Result<File> {
    let mut attempt = 1;
    loop {
        match open_with(path, access, OFlags::NONBLOCK) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempt < LEASE_ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(LEASE_PAUSE);
            }
            other => return other.map_err(|error| open_error(error, access)),
        }
    }
}

/// Opens with flags beyond the usual ones.
fn open_with(path: &Path, access: FileAccess, flags: OFlags) -> io::Result<File> {
    let flags = flags.bits().cast_signed();
    OpenOptions::new().read(true).write(access == FileAccess::Write).custom_flags(flags).open(path)
}

/// What kind of file it is, if it is one of those that have bytes at offsets.
pub(super) fn check_type(metadata: &std::fs::Metadata) -> Result<FileKind> {
    let file_type = metadata.file_type();
    let what = match () {
        () if file_type.is_file() => return Ok(FileKind::Regular),
        () if file_type.is_block_device() => return Ok(FileKind::BlockDevice),
        () if file_type.is_dir() => "a directory",
        () if file_type.is_fifo() => "a pipe",
        () if file_type.is_char_device() => "a character device",
        () if file_type.is_socket() => "a socket",
        () => "neither regular file nor block device",
    };
    let error = Error::new(ErrorKind::InvalidArgument, format!("is {what}"));
    Err(error.with_hint("give a regular file or a block device"))
}

/// The error of an opening that failed, with what to do next.
pub(super) fn open_error(error: io::Error, access: FileAccess) -> Error {
    let writing = access == FileAccess::Write;
    let hint = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => "no such file: check the spelling of the path, and that its disk is mounted",
        Some(Errno::NOTDIR) => "a part of the path is a file, not a directory: check the spelling of the path",
        Some(Errno::ACCESS | Errno::PERM) if writing => "get write permission, or run as a user who has it",
        Some(Errno::ACCESS | Errno::PERM) => "get read permission, or run as a user who has it",
        Some(Errno::ROFS) => "the file system is mounted read-only: mount it for writing, or work on a copy",
        Some(Errno::TXTBSY) => {
            "the system uses the file itself, as swap space or as a running program: stop that first"
        }
        Some(Errno::LOOP) => "the path goes around in circles through symbolic links: correct the links",
        Some(Errno::NOMEDIUM) => "there is no medium in the drive: insert it",
        Some(Errno::MFILE | Errno::NFILE) => "too many files are open: raise the limit with ulimit -n",
        Some(Errno::WOULDBLOCK) => {
            let mode = if writing { LockMode::Write } else { LockMode::Read };
            return lock::locked("another program holds a lease on it", mode);
        }
        _ => return Error::io("cannot open", error),
    };
    Error::io(if writing { "cannot open for writing" } else { "cannot open" }, error).with_hint(hint)
}
