//! Storage that fails when told to: at the n-th operation, or when a disk that exists only here is full.

mod disk;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vhdkit::storage::{Storage, StorageIdentity};

use disk::{Blocks, Disk};

pub use disk::Space;

/// What can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationKind {
    /// `read_at`; counted only where asked for.
    Read,
    /// `next_data` and `data_start`; counted only where asked for.
    FindData,
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
    /// `clone_range`.
    CloneRange,
    /// `copy_range`.
    CopyRange,
}

/// One operation, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What it is.
    pub kind: OperationKind,
    /// Where: for `set_len` from zero up to the new length, for `sync` nowhere.
    pub range: Range<u64>,
}

/// What reaches the file before an operation fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    #[default]
    Nothing,
    /// The first bytes of a write, a copy or a range; nothing of a change of the length or a sync.
    First(u64),
    /// Everything: the error is all that is wrong.
    All,
}

/// Which operation fails, and how.
#[derive(Clone, Debug)]
pub struct Fault {
    at: u64,
    errno: Errno,
    stays: bool,
    reads: bool,
    effect: Effect,
}

impl Fault {
    /// The n-th operation from now on, counted from 1, fails once and leaves no trace. What only reads is not counted.
    #[must_use]
    pub fn new(n: u64, errno: Errno) -> Self {
        assert!(n > 0, "operations are counted from 1");
        Self { at: n, errno, stays: false, reads: false, effect: Effect::Nothing }
    }

    /// Every operation after it fails too.
    #[must_use]
    pub fn from_then_on(mut self) -> Self {
        self.stays = true;
        self
    }

    /// What reads is counted too, and may fail.
    #[must_use]
    pub fn with_reads(mut self) -> Self {
        self.reads = true;
        self
    }

    /// Something reaches the file before the error.
    #[must_use]
    pub fn after(mut self, effect: Effect) -> Self {
        self.effect = effect;
        self
    }
}

/// No file reaches further; what does is refused by the storage below, whatever is planned here.
const END_MAX: u64 = i64::MAX.unsigned_abs();

/// Which operation fails, and what happened up to now.
#[derive(Debug, Default)]
struct Faults {
    fault: Option<Fault>,
    seen: u64,
    fired: u64,
    first: Option<Operation>,
}

/// Storage that fails when told to.
///
/// Operations are counted over everything that changes the file: `write_at`, `set_len`, `sync`, `zero_range`,
/// `punch_hole`, `allocate`, `clone_range` and `copy_range`. Empty ones always succeed and are not counted. The file below
/// is given away ([`Storage::as_file`]); what is done with that directly never fails by order.
///
/// ```
/// use std::sync::Arc;
/// use rustix::io::Errno;
/// use vhdkit::storage::{MemoryStorage, Storage};
/// use vhdkit_testkit::faulty::{Effect, Fault, FaultyStorage};
///
/// for n in 1.. {
///     let storage = FaultyStorage::new(Arc::new(MemoryStorage::new()));
///     storage.arm(Fault::new(n, Errno::IO).after(Effect::First(2)));
///     let outcome = storage.write_at(b"abc", 0).and_then(|()| storage.sync());
///     if storage.fired() == 0 {
///         assert_eq!((n, storage.seen()), (3, 2));
///         break;
///     }
///     let error = outcome.expect_err("no fault goes unnoticed");
///     assert_eq!(error.raw_os_error(), Some(5), "at {:?}", storage.first_fault());
/// }
/// ```
///
/// A disk that becomes full is there too. What still fits is written before the error.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::storage::{MemoryStorage, Storage};
/// use vhdkit_testkit::faulty::{FaultyStorage, Space};
///
/// let storage = FaultyStorage::new(Arc::new(MemoryStorage::new()));
/// storage.limit_space(8192, Space::Sparse);
/// storage.set_len(1 << 30)?;
/// assert_eq!(storage.write_at(&[1; 10_000], 0).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
/// storage.write_at(&[2; 8192], 0)?;
/// storage.make_room(4096);
/// storage.write_at(&[1; 10_000], 0)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct FaultyStorage {
    inner: Arc<dyn Storage>,
    faults: Mutex<Faults>,
    disk: Mutex<Option<Disk>>,
}

impl FaultyStorage {
    /// Storage that does not fail yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, faults: Mutex::default(), disk: Mutex::default() }
    }

    /// The storage below, which never fails by order.
    #[must_use]
    pub fn inner(&self) -> &Arc<dyn Storage> {
        &self.inner
    }

    /// Plans a fault, in place of any other. Counting begins anew.
    pub fn arm(&self, fault: Fault) {
        *lock(&self.faults) = Faults { fault: Some(fault), ..Faults::default() };
    }

    /// Nothing fails by order any more. What was counted stays.
    pub fn disarm(&self) {
        lock(&self.faults).fault = None;
    }

    /// How many operations were counted.
    #[must_use]
    pub fn seen(&self) -> u64 {
        lock(&self.faults).seen
    }

    /// How many of them failed by order; a full disk does not count.
    #[must_use]
    pub fn fired(&self) -> u64 {
        lock(&self.faults).fired
    }

    /// The first one that failed by order.
    #[must_use]
    pub fn first_fault(&self) -> Option<Operation> {
        lock(&self.faults).first.clone()
    }

    /// From now on the disk below has this much space left, in whole blocks of 4096 bytes. What the file has got, it
    /// keeps; what it gives back counts as room.
    pub fn limit_space(&self, bytes: u64, space: Space) {
        let len = self.inner.len().expect("the length can be told");
        let mut owned = Blocks::default();
        match space {
            Space::Dense => owned.insert(Blocks::around(&(0..len))),
            Space::Sparse => {
                let mut position = 0;
                while let Some(data) = self.inner.next_data(position..len).expect("data can be found") {
                    owned.insert(Blocks::around(&data));
                    position = data.end;
                }
            }
        }
        *lock(&self.disk) = Some(Disk { space, room: bytes, refused: 0, owned });
    }

    /// Adds space, where it is limited.
    pub fn make_room(&self, bytes: u64) {
        if let Some(disk) = lock(&self.disk).as_mut() {
            disk.room = disk.room.saturating_add(bytes);
        }
    }

    /// The space left, where it is limited.
    #[must_use]
    pub fn room(&self) -> Option<u64> {
        lock(&self.disk).as_ref().map(|disk| disk.room)
    }

    /// How many operations failed for lack of space.
    #[must_use]
    pub fn refused_for_space(&self) -> u64 {
        lock(&self.disk).as_ref().map_or(0, |disk| disk.refused)
    }

    /// Counts an operation; gives the fault when it has to fail.
    fn judge(&self, kind: OperationKind, range: Range<u64>) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let reads = matches!(kind, OperationKind::Read | OperationKind::FindData);
        if reads && !faults.fault.as_ref().is_some_and(|fault| fault.reads) {
            return None;
        }
        faults.seen += 1;
        let seen = faults.seen;
        let fault = faults.fault.clone().filter(|fault| seen == fault.at || (fault.stays && seen > fault.at))?;
        faults.fired += 1;
        faults.first.get_or_insert(Operation { kind, range });
        Some(fault)
    }

    /// Does something with a range that needs space: with as much of it as may have an effect and finds space.
    fn fill(
        &self,
        kind: OperationKind,
        range: Range<u64>,
        act: impl FnOnce(Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        if range.is_empty() || range.end > END_MAX {
            return act(range);
        }
        let fault = self.judge(kind, range.clone());
        let wanted = match &fault {
            None => range.clone(),
            Some(fault) => fault.part(range.clone()),
        };
        let mut disk = lock(&self.disk);
        let end = match disk.as_mut() {
            Some(disk) => disk.take(self.inner.len()?, &wanted),
            None => {
                drop(disk); // only a full disk needs one after the other
                act(wanted)?;
                return fault.map_or(Ok(()), |fault| Err(fault.errno.into()));
            }
        };
        if end > wanted.start {
            act(wanted.start..end)?;
        }
        match fault {
            Some(fault) => Err(fault.errno.into()),
            None if end < wanted.end => Err(Errno::NOSPC.into()),
            None => Ok(()),
        }
    }
}

impl Fault {
    /// The part of a range that the operation reaches.
    fn part(&self, range: Range<u64>) -> Range<u64> {
        match self.effect {
            Effect::Nothing => range.start..range.start,
            Effect::First(bytes) => range.start..range.end.min(range.start.saturating_add(bytes)),
            Effect::All => range,
        }
    }
}

/// Tests panic; what they leave behind a lock is as good as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn range_of(offset: u64, length: u64) -> Range<u64> {
    offset..offset.saturating_add(length)
}

impl Storage for FaultyStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn is_empty(&self) -> io::Result<bool> {
        self.inner.is_empty()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !buf.is_empty()
            && let Some(fault) = self.judge(OperationKind::Read, range_of(offset, buf.len() as u64))
        {
            return Err(fault.errno.into());
        }
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = range_of(offset, buf.len() as u64);
        if range.end > END_MAX {
            return self.inner.write_at(buf, offset);
        }
        self.fill(OperationKind::Write, range, |part| {
            self.inner.write_at(&buf[..(part.end - part.start) as usize], offset)
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let fault = self.judge(OperationKind::SetLen, 0..len);
        if fault.as_ref().is_none_or(|fault| fault.effect == Effect::All) {
            let mut disk = lock(&self.disk);
            if let Some(disk) = disk.as_mut() {
                let old = self.inner.len()?;
                let grown = old.min(len)..len;
                if disk.space == Space::Dense {
                    if !disk.has_room(old, &grown) {
                        disk.refused += 1;
                        return Err(Errno::NOSPC.into());
                    }
                    disk.take(old, &grown);
                }
                self.inner.set_len(len)?;
                disk.give_back(len..Blocks::around(&(0..old.max(len))).end);
            } else {
                drop(disk);
                self.inner.set_len(len)?;
            }
        }
        fault.map_or(Ok(()), |fault| Err(fault.errno.into()))
    }

    fn sync(&self) -> io::Result<()> {
        let fault = self.judge(OperationKind::Sync, 0..0);
        if fault.as_ref().is_none_or(|fault| fault.effect == Effect::All) {
            self.inner.sync()?;
        }
        fault.map_or(Ok(()), |fault| Err(fault.errno.into()))
    }

    fn growth_reads_zero(&self) -> bool {
        self.inner.growth_reads_zero()
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.fill(OperationKind::ZeroRange, range, |part| self.inner.zero_range(part))
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        if range.is_empty() {
            return self.inner.punch_hole(range);
        }
        let fault = self.judge(OperationKind::PunchHole, range.clone());
        let part = fault.as_ref().map_or(range.clone(), |fault| fault.part(range));
        let mut disk = lock(&self.disk);
        let punched = self.inner.punch_hole(part.clone())?;
        if let Some(disk) = disk.as_mut()
            && disk.space == Space::Sparse
            && punched
        {
            disk.give_back(part);
        }
        fault.map_or(Ok(punched), |fault| Err(fault.errno.into()))
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        if range.is_empty() || range.end > END_MAX {
            return self.inner.allocate(range);
        }
        let fault = self.judge(OperationKind::Allocate, range.clone());
        let part = fault.as_ref().map_or(range.clone(), |fault| fault.part(range));
        let mut disk = lock(&self.disk);
        let len = self.inner.len()?;
        if let Some(disk) = disk.as_mut()
            && !disk.has_room(len, &part)
        {
            disk.refused += 1; // and nothing of it is reserved
            return Err(fault.map_or(Errno::NOSPC, |fault| fault.errno).into());
        }
        let allocated = self.inner.allocate(part.clone())?;
        if let Some(disk) = disk.as_mut()
            && allocated
        {
            disk.take(len, &part);
        }
        fault.map_or(Ok(allocated), |fault| Err(fault.errno.into()))
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        match self.judge(OperationKind::FindData, range.clone()) {
            Some(fault) => Err(fault.errno.into()),
            None => self.inner.next_data(range),
        }
    }

    fn data_start(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        match self.judge(OperationKind::FindData, range.clone()) {
            Some(fault) => Err(fault.errno.into()),
            None => self.inner.data_start(range),
        }
    }

    /// Cloned blocks are shared, and take no space.
    fn clone_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<bool> {
        if length == 0 {
            return self.inner.clone_range(source, source_offset, offset, length);
        }
        let fault = self.judge(OperationKind::CloneRange, range_of(offset, length));
        let mut cloned = false;
        if fault.as_ref().is_none_or(|fault| fault.effect == Effect::All) {
            cloned = self.inner.clone_range(source, source_offset, offset, length)?;
        }
        if let Some(disk) = lock(&self.disk).as_mut()
            && cloned
        {
            disk.owned.insert(Blocks::around(&range_of(offset, length)));
        }
        fault.map_or(Ok(cloned), |fault| Err(fault.errno.into()))
    }

    fn copy_range(&self, source: &dyn Storage, source_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        let mut copied = 0;
        let range = range_of(offset, length);
        if range.end > END_MAX {
            return self.inner.copy_range(source, source_offset, offset, length);
        }
        self.fill(OperationKind::CopyRange, range, |part| {
            copied = self.inner.copy_range(source, source_offset, offset, part.end - part.start)?;
            Ok(())
        })?;
        Ok(copied)
    }

    fn as_file(&self) -> Option<&File> {
        self.inner.as_file()
    }

    fn set_access(&self, write: bool) -> vhdkit::Result<()> {
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
    use std::io::ErrorKind;
    use vhdkit::storage::{FileStorage, MemoryStorage};

    fn file() -> FileStorage {
        FileStorage::from_file(tempfile::tempfile().unwrap(), None).unwrap()
    }

    fn memory() -> FaultyStorage {
        FaultyStorage::new(Arc::new(MemoryStorage::new()))
    }

    /// Memory of 64 KiB of the byte 1.
    fn ones() -> FaultyStorage {
        FaultyStorage::new(Arc::new(MemoryStorage::from_bytes(vec![1; 1 << 16])))
    }

    fn bytes(storage: &FaultyStorage) -> Vec<u8> {
        let mut bytes = vec![0xEE; storage.len().unwrap() as usize];
        storage.inner().read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn without_a_fault_it_behaves_as_what_is_below() {
        storage_suite::run(|| Arc::new(memory()));
        storage_suite::run(|| Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::new().without_zero_growth()))));
        storage_suite::run(|| Arc::new(FaultyStorage::new(Arc::new(file()))));
        for space in [Space::Sparse, Space::Dense] {
            storage_suite::run(|| {
                let storage = memory();
                storage.limit_space(1 << 62, space);
                Arc::new(storage)
            });
        }
        // A fault that is never reached changes nothing either.
        storage_suite::run(|| {
            let storage = memory();
            storage.arm(Fault::new(u64::MAX, Errno::IO).with_reads());
            Arc::new(storage)
        });
    }

    /// Everything that is counted, once.
    fn program(storage: &FaultyStorage) -> Vec<io::Result<()>> {
        let source = MemoryStorage::from_bytes(vec![5; 4096]);
        vec![
            storage.write_at(&[2; 4096], 0),
            storage.set_len(100_000),
            storage.sync(),
            storage.zero_range(0..100),
            storage.punch_hole(0..4096).map(drop),
            storage.allocate(0..200_000).map(drop),
            storage.clone_range(&source, 0, 0, 4096).map(drop),
            storage.copy_range(&source, 0, 0, 4096).map(drop),
        ]
    }

    #[test]
    fn each_operation_fails_in_its_turn() {
        use OperationKind::*;
        let kinds = [Write, SetLen, Sync, ZeroRange, PunchHole, Allocate, CloneRange, CopyRange];
        for (n, kind) in (1..).zip(kinds) {
            for (stays, failing) in [(false, 1), (true, kinds.len() + 1 - n as usize)] {
                let storage = ones();
                let fault = Fault::new(n, Errno::NOSPC);
                storage.arm(if stays { fault.from_then_on() } else { fault });
                let outcomes = program(&storage);
                let failed: Vec<usize> = (0..outcomes.len()).filter(|&index| outcomes[index].is_err()).collect();
                assert_eq!(failed, (n as usize - 1..n as usize - 1 + failing).collect::<Vec<_>>());
                let error = outcomes[failed[0]].as_ref().unwrap_err();
                assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
                assert_eq!(storage.first_fault().unwrap().kind, kind);
                assert_eq!((storage.seen(), storage.fired()), (kinds.len() as u64, failing as u64));
                storage.disarm();
                assert!(program(&storage).iter().all(Result::is_ok));
                assert_eq!(storage.fired(), failing as u64);
            }
        }
        let storage = ones();
        storage.arm(Fault::new(kinds.len() as u64 + 1, Errno::IO));
        assert!(program(&storage).iter().all(Result::is_ok));
        assert_eq!((storage.seen(), storage.fired(), storage.first_fault()), (kinds.len() as u64, 0, None));
    }

    #[test]
    fn what_is_empty_or_only_reads_is_not_counted_unless_asked_for() {
        let storage = ones();
        let read = || storage.read_at(&mut [0; 10], 0);
        storage.arm(Fault::new(1, Errno::IO));
        storage.write_at(&[], 0).unwrap();
        storage.zero_range(5..5).unwrap();
        assert!(storage.punch_hole(5..5).unwrap() && storage.allocate(5..5).unwrap());
        read().unwrap();
        storage.next_data(0..10).unwrap();
        assert_eq!((storage.seen(), storage.fired()), (0, 0));
        storage.arm(Fault::new(2, Errno::IO).with_reads());
        storage.write_at(&[1], 0).unwrap();
        assert_eq!(read().unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));
        assert_eq!(storage.first_fault().unwrap(), Operation { kind: OperationKind::Read, range: 0..10 });
        read().unwrap();
        storage.arm(Fault::new(1, Errno::IO).with_reads().from_then_on());
        storage.next_data(0..10).unwrap_err();
        storage.data_start(0..10).unwrap_err();
        storage.sync().unwrap_err();
        assert_eq!((storage.seen(), storage.fired()), (3, 3));
    }

    #[test]
    fn a_part_of_an_operation_reaches_the_file() {
        type Act<'a> = &'a dyn Fn(&FaultyStorage) -> io::Result<()>;
        let failing = |effect, act: Act<'_>| {
            let storage = ones();
            storage.arm(Fault::new(1, Errno::IO).after(effect));
            act(&storage).unwrap_err();
            bytes(&storage)
        };
        let reached = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte != 1).count();
        let write = |storage: &FaultyStorage| storage.write_at(&[2; 1000], 100);
        let zero = |storage: &FaultyStorage| storage.zero_range(100..1100);
        let punch = |storage: &FaultyStorage| storage.punch_hole(100..1100).map(drop);
        let acts: [Act<'_>; 3] = [&write, &zero, &punch];
        for act in acts {
            assert_eq!(reached(&failing(Effect::Nothing, act)), 0);
            let bytes = failing(Effect::First(512), act);
            assert_eq!((reached(&bytes), reached(&bytes[100..612])), (512, 512));
            assert_eq!(reached(&failing(Effect::First(u64::MAX), act)), 1000);
            assert_eq!(reached(&failing(Effect::All, act)), 1000);
        }
        for (effect, len) in [(Effect::Nothing, 1 << 16), (Effect::First(10), 1 << 16), (Effect::All, 10)] {
            assert_eq!(failing(effect, &|storage| storage.set_len(10)).len(), len);
        }
        let allocated = failing(Effect::First(1 << 17), &|storage| storage.allocate(0..1 << 20).map(drop));
        assert_eq!(allocated.len(), 1 << 17);
        let source = file();
        source.write_at(&[2; 4096], 0).unwrap();
        let target = FaultyStorage::new(Arc::new(file()));
        target.arm(Fault::new(1, Errno::IO).after(Effect::First(1024)));
        target.copy_range(&source, 0, 0, 4096).unwrap_err();
        assert_eq!(bytes(&target), [2; 1024]);
    }

    #[test]
    fn threads_count_every_operation_once() {
        let storage = memory();
        storage.arm(Fault::new(500, Errno::IO));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let storage = &storage;
                scope.spawn(move || {
                    for index in 0..250 {
                        let _ = storage.write_at(&[1], thread * 250 + index);
                    }
                });
            }
        });
        assert_eq!((storage.seen(), storage.fired()), (1000, 1));
        assert_eq!(
            bytes(&storage).iter().filter(|&&byte| byte == 0).count() + (1000 - storage.len().unwrap() as usize),
            1
        );
    }

    #[test]
    fn holes_take_space_when_they_are_filled_and_give_it_back() {
        let storage = ones();
        storage.limit_space(8192, Space::Sparse);
        storage.set_len(1 << 30).unwrap();
        storage.write_at(&[2; 1 << 16], 0).unwrap(); // it has its space already
        assert_eq!(storage.room(), Some(8192));
        storage.write_at(&[3; 2], (1 << 20) - 1).unwrap(); // one byte in each of two blocks
        assert_eq!((storage.room(), storage.refused_for_space()), (Some(0), 0));
        storage.write_at(&[3; 8192], (1 << 20) - 4096).unwrap();
        for outcome in [
            storage.write_at(&[4], 1 << 21),
            storage.zero_range(1 << 21..(1 << 21) + 1),
            storage.allocate(1 << 21..(1 << 21) + 1).map(drop),
            storage.write_at(&[4], 1 << 30),
        ] {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::StorageFull);
        }
        assert_eq!((storage.len().unwrap(), storage.refused_for_space(), storage.fired()), (1 << 30, 4, 0));
        storage.sync().unwrap();
        // A hole gives whole blocks back, a shorter file what lies behind.
        assert!(storage.punch_hole(1..8192).unwrap());
        assert_eq!(storage.room(), Some(4096));
        storage.set_len(1 << 20).unwrap();
        assert_eq!(storage.room(), Some(8192));
        storage.make_room(4096);
        assert!(storage.allocate(0..1 << 20).is_err());
        assert!(storage.allocate(1 << 19..(1 << 19) + 12_288).unwrap());
        assert_eq!(storage.room(), Some(0));
        storage.write_at(&[5; 12_288], 1 << 19).unwrap(); // reserved is reserved
    }

    #[test]
    fn without_holes_growth_takes_space() {
        let storage = ones();
        storage.limit_space(8192, Space::Dense);
        storage.set_len((1 << 16) + 8193).unwrap_err();
        storage.set_len((1 << 16) + 4096).unwrap();
        assert_eq!((storage.len().unwrap(), storage.room()), ((1 << 16) + 4096, Some(4096)));
        storage.write_at(&[1], 1 << 17).unwrap_err(); // the gap before it has no space
        assert_eq!((storage.len().unwrap(), storage.room()), ((1 << 16) + 4096, Some(4096)));
        storage.punch_hole(0..1 << 16).unwrap();
        storage.zero_range(0..1 << 16).unwrap();
        storage.make_room((1 << 17) - (1 << 16));
        storage.write_at(&[1], 1 << 17).unwrap();
        assert_eq!(storage.room(), Some(4096));
        storage.set_len(0).unwrap();
        assert_eq!(storage.room(), Some((1 << 17) + 8192));
    }

    #[test]
    fn what_fits_is_written_before_a_full_disk_is_reported() {
        for space in [Space::Sparse, Space::Dense] {
            let storage = memory();
            storage.limit_space(10_000, space); // two blocks
            assert_eq!(storage.write_at(&[1; 10_000], 100).unwrap_err().kind(), ErrorKind::StorageFull);
            let bytes = bytes(&storage);
            assert_eq!(bytes.len(), 8192);
            assert!(bytes[..100].iter().all(|&byte| byte == 0) && bytes[100..].iter().all(|&byte| byte == 1));
            storage.zero_range(0..10_000).unwrap_err();
            assert_eq!(self::bytes(&storage), [0; 8192]);
            storage.make_room(4096);
            storage.write_at(&[1; 10_000], 100).unwrap();
            assert_eq!(storage.refused_for_space(), 2);
        }
    }

    #[test]
    fn a_fault_and_a_full_disk_go_together() {
        let storage = memory();
        storage.limit_space(4096, Space::Sparse);
        storage.arm(Fault::new(1, Errno::IO).after(Effect::All));
        assert_eq!(storage.write_at(&[1; 8192], 0).unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));
        assert_eq!(storage.len().unwrap(), 4096);
    }
}
