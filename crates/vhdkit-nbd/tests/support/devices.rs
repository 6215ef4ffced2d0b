//! Disks that are slow, that fail, that panic, or that remember what was asked of them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use vhdkit::error::{Error, ErrorKind, Result};
use vhdkit::format::guid::Guid;
use vhdkit::image::{AtOnce, BlockDevice, Extent, ExtentKind, VisitExtent};

/// How reading an offset goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// At once.
    Quick,
    /// At once, after some time that the caller did not expect.
    Dawdle,
    /// Only for those who wait, who get it soon.
    Wait,
    /// Only for those who wait until [`Staged::open_gate`].
    Gate,
    /// It fails.
    Fail,
    /// It panics.
    Panic,
    /// At once, and there is no data: it reads as zero, until it is written.
    Hole,
}

/// A disk of data in memory, where each MiB behaves as it is told.
#[derive(Debug)]
pub(crate) struct Staged {
    bytes: Mutex<Vec<u8>>,
    manners: Vec<Manner>,
    gate: Mutex<bool>,
    opened: Condvar,
    /// How many calls wait at the gate.
    pub(crate) waiting: AtomicU64,
    /// How many flushes there were.
    pub(crate) flushes: AtomicU64,
    /// How many writes were durable when they returned.
    pub(crate) through: AtomicU64,
    /// Whether flushing fails.
    pub(crate) flush_fails: AtomicBool,
}

impl Staged {
    /// A disk of as many MiB as there are manners, filled with a pattern.
    pub(crate) fn new(manners: &[Manner]) -> Self {
        Self {
            bytes: Mutex::new(contents(manners)),
            manners: manners.to_vec(),
            gate: Mutex::new(false),
            opened: Condvar::new(),
            waiting: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            through: AtomicU64::new(0),
            flush_fails: AtomicBool::new(false),
        }
    }

    /// What the disk holds at first.
    pub(crate) fn contents(&self) -> Vec<u8> {
        contents(&self.manners)
    }

    /// Lets all go who wait.
    pub(crate) fn open_gate(&self) {
        *self.gate.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn manner(&self, offset: u64) -> Manner {
        self.manners[(offset >> 20) as usize]
    }

    /// What has to happen before bytes at an offset are touched.
    fn pass(&self, offset: u64) -> Result<()> {
        match self.manner(offset) {
            Manner::Quick | Manner::Wait | Manner::Hole => {}
            Manner::Dawdle => std::thread::sleep(Duration::from_millis(20)),
            Manner::Gate => {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                drop(self.opened.wait_while(self.gate.lock().unwrap(), |open| !*open).unwrap());
                self.waiting.fetch_sub(1, Ordering::SeqCst);
            }
            Manner::Fail => return Err(Error::new(ErrorKind::Io, "this place fails")),
            Manner::Panic => panic!("this place panics, as the test wants it"),
        }
        Ok(())
    }

    fn copy(&self, buf: &mut [u8], offset: u64) {
        let start = offset as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[start..start + buf.len()]);
    }
}

/// A pattern, and zeros where holes are.
fn contents(manners: &[Manner]) -> Vec<u8> {
    let mut bytes = super::pattern(77, manners.len() << 20);
    for (index, _) in manners.iter().enumerate().filter(|(_, manner)| **manner == Manner::Hole) {
        bytes[index << 20..(index + 1) << 20].fill(0);
    }
    bytes
}

impl BlockDevice for Staged {
    fn size(&self) -> u64 {
        (self.manners.len() as u64) << 20
    }

    fn logical_sector_size(&self) -> u32 {
        512
    }

    fn physical_sector_size(&self) -> u32 {
        4096
    }

    fn allocation_unit(&self) -> u64 {
        4096
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn disk_id(&self) -> Option<Guid> {
        None
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let mut position = offset;
        while position < end {
            self.pass(position)?;
            position = (position >> 20 << 20) + (1 << 20);
        }
        self.copy(buf, offset);
        Ok(())
    }

    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> Result<AtOnce> {
        if !matches!(self.manner(offset), Manner::Quick | Manner::Dawdle | Manner::Hole) {
            return Ok(AtOnce::Waits);
        }
        self.pass(offset)?;
        self.copy(buf, offset);
        Ok(AtOnce::Filled)
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        let mut start = range.start;
        while start < range.end {
            self.pass(start)?;
            let length = ((start >> 20 << 20) + (1 << 20)).min(range.end) - start;
            let hole = self.manner(start) == Manner::Hole;
            let kind = if hole { ExtentKind::Hole } else { ExtentKind::Data { file_offset: None } };
            if visit(&Extent { start, length, kind, layer: 0 }).is_break() {
                return Ok(());
            }
            start += length;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.pass(offset)?;
        let start = offset as usize;
        self.bytes.lock().unwrap()[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_through_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write_at(buf, offset)?;
        self.through.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, _unmap: bool) -> Result<()> {
        self.write_at(&vec![0; (range.end - range.start) as usize], range.start)
    }

    fn discard(&self, range: Range<u64>) -> Result<()> {
        self.pass(range.start)
    }

    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        match self.flush_fails.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Io, "flushing fails")),
            false => Ok(()),
        }
    }
}

/// A disk for reading that is zero everywhere, and of which every other sector says that it is in another layer.
#[derive(Debug)]
pub(crate) struct Striped;

impl BlockDevice for Striped {
    fn size(&self) -> u64 {
        1 << 40
    }

    fn logical_sector_size(&self) -> u32 {
        512
    }

    fn physical_sector_size(&self) -> u32 {
        4096
    }

    fn allocation_unit(&self) -> u64 {
        1 << 20
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        None
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> Result<()> {
        let mut start = range.start;
        while start < range.end {
            let length = (start / 512 * 512 + 512).min(range.end) - start;
            let odd = !(start / 512).is_multiple_of(2);
            let kind = if odd { ExtentKind::Data { file_offset: None } } else { ExtentKind::Zero };
            if visit(&Extent { start, length, kind, layer: usize::from(odd) }).is_break() {
                return Ok(());
            }
            start += length;
        }
        Ok(())
    }
}
