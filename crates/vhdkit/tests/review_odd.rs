//! What a second reviewer found: odd and hostile images that are written, and storages that fail in odd ways.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared modules")]

mod write_support;

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use vhdkit::format::finding::Code;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::create::{CreateOptions, create};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit::{ErrorKind, Result};
use vhdkit_testkit::Guid;
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::Content;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec, LogRing};
use vhdkit_testkit::spec::RegionSpec;
use write_support::{Parents, load, snapshot};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 1 << 20;

fn open(top: &BuiltImage, storage: &Arc<dyn Storage>, write: bool) -> Result<Image> {
    let parents = top.parent.iter().map(|parent| Arc::new(load(&parent.file)) as Arc<dyn Storage>).collect();
    let options = OpenOptions::new().parents(Arc::new(Parents(parents))).write(write).replay(write);
    options.open(Arc::clone(storage), None)
}

fn child() -> ImageBuilder {
    let full = |builder: ImageBuilder, block| builder.block(block, BlockSpec::present(Content::Fill(0xAA)));
    let base = (0..16).fold(ImageBuilder::new(24 * MIB, 1 << 20), full).named("base.vhdx").build();
    ImageBuilder::new(24 * MIB, 1 << 20).differencing(&Arc::new(base))
}

fn stored(top: &BuiltImage) -> Arc<dyn Storage> {
    Arc::new(load(&top.file))
}

fn errors(storage: &Arc<dyn Storage>) -> u64 {
    check(storage, None, &CheckOptions::default(), &()).unwrap().errors
}

fn read(image: &Image, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    image.read_at(&mut bytes, offset).unwrap();
    bytes
}

/// The entry of a sector bitmap that is not present, with an offset: of another block, of the BAT, of the log, of nothing.
/// Nothing is read or written there.
#[test]
fn a_bitmap_that_is_not_present_has_no_place_whatever_its_entry_says() {
    let plain = child().block(5, BlockSpec::present(Content::Fill(0x55)).at(40)).build();
    for place in [40 * MIB, plain.layout.bat, plain.layout.log, 900 * MIB] {
        let builder = child().block(5, BlockSpec::present(Content::Fill(0x55)).at(40));
        let top = builder.with(|builder| _ = builder.bat_raw.insert(4096, place)).build();
        let storage = stored(&top);
        let image = open(&top, &storage, true).unwrap();
        image.write_at(&[7; 512], 0).unwrap();
        image.flush().unwrap();
        let verify = |image: &Image, when: &str| {
            assert_eq!(read(image, 0, 1024), [[7; 512], [0xAA; 512]].concat(), "{place:#x}, {when}");
            assert!(read(image, 5 * MIB, BLOCK) == vec![0x55; BLOCK], "{place:#x}, {when}: another block");
        };
        verify(&image, "before");
        let crashed: Arc<dyn Storage> = Arc::new(load(&snapshot(storage.as_ref())));
        verify(&open(&top, &crashed, true).unwrap(), "after a crash");
        image.close().unwrap();
        verify(&open(&top, &storage, true).unwrap(), "closed");
        assert_eq!(errors(&storage), 0);
    }
}

/// A partially present block whose bitmap is not present has no bits, also where the bitmap's entry names a place.
#[test]
fn a_bitmap_that_is_not_present_is_missing_to_readers_too() {
    let builder = child().block(5, BlockSpec::present(Content::Fill(0x55)).at(40));
    let top = builder
        .with(|builder| {
            builder.bat_raw.insert(4096, 40 * MIB);
            builder.bat_raw.insert(5, (40 * MIB) | 7);
        })
        .build();
    let image = open(&top, &stored(&top), false).unwrap();
    let error = image.read_at(&mut [0; 512], 5 * MIB).unwrap_err();
    assert_eq!(error.code(), Some(Code::BitmapMissing));
    assert!(image.visit_extents(5 * MIB..6 * MIB, &mut |_| ControlFlow::Continue(())).is_err());
}

/// A differencing disk has slots behind its last block, which mean nothing. What stands there harms nobody, stays, and
/// its space is nobody else's.
#[test]
fn slots_behind_the_disk_mean_nothing() {
    for value in [0x18, 9000 << 20 | 6, 41 << 20 | 6, u64::MAX] {
        let builder = child().block(5, BlockSpec::present(Content::Fill(0x55)));
        let top = builder
            .with(|builder| {
                builder.bat_raw.insert(30, value);
                builder.file_length = Some(60 * MIB);
            })
            .build();
        let storage = stored(&top);
        let walk = |image: &Image| {
            image.visit_extents(0..24 * MIB, &mut |_| ControlFlow::Continue(())).unwrap();
            image.layers()[0].allocated_bytes().unwrap();
        };
        let image = open(&top, &storage, false).unwrap();
        assert_eq!(read(&image, 0, 512), [0xAA; 512], "{value:#x}");
        walk(&image);
        drop(image);
        let image = open(&top, &storage, true).unwrap();
        for block in 6..24 {
            image.write_at(&vec![7; BLOCK], block * MIB).unwrap();
            let plan = image.plan_write(block * MIB..block * MIB + 512).unwrap();
            assert_ne!(plan.file_offset() / MIB, 41 * u64::from(value >> 20 == 41), "somebody else's space");
        }
        walk(&image);
        image.flush().unwrap();
        image.close().unwrap();
        let image = open(&top, &storage, true).unwrap();
        assert!(read(&image, 6 * MIB, BLOCK) == vec![7; BLOCK] && read(&image, 5 * MIB, BLOCK) == vec![0x55; BLOCK]);
        assert_eq!(errors(&storage), 0, "{value:#x}");
    }
}

/// Blocks would come to lie in an optional region that reaches past the end of the file, and could not be read again.
#[test]
fn a_file_that_ends_inside_of_an_optional_region_is_not_written() {
    let end = ImageBuilder::new(64 * MIB, 1 << 20).pattern_block(0, 1).build().file.len();
    let region = RegionSpec::at(Guid::seeded(77), end + 2 * MIB, 8 << 20, 0);
    let top = ImageBuilder::new(64 * MIB, 1 << 20)
        .pattern_block(0, 1)
        .both_region_tables(|table| table.entries.push(region.clone()))
        .with(|builder| builder.file_length = Some(end))
        .build();
    let storage = stored(&top);
    assert!(open(&top, &storage, false).is_ok());
    let error = open(&top, &storage, true).unwrap_err();
    assert_eq!(error.code(), Some(Code::RegionOptionalOutsideFile), "{error}");
    assert!(error.to_string().contains("past the end of the file"), "{error}");
}

/// A storage that fails in ways that files do not.
#[derive(Debug, Default)]
struct Odd {
    inner: MemoryStorage,
    fail_shrink: AtomicBool,
    shrink_and_fail: AtomicBool,
    panic_at_sync: AtomicBool,
    panic_at_write: AtomicBool,
    panic_at_growth: AtomicBool,
    panic_at_zeroing: AtomicBool,
    /// The holes of the log cannot be filled, until a hole is punched elsewhere.
    log_is_full: AtomicBool,
    fail_sync: AtomicBool,
    /// Reads of 512 bytes take so many microseconds.
    read_delay: AtomicU64,
    /// As on a block device of so many bytes; zero: none.
    capacity: AtomicU64,
    /// A write of one block that begins with 9 waits twice.
    stops: Option<Barrier>,
    stop_once: AtomicBool,
}

impl Storage for Odd {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let delay = self.read_delay.load(Ordering::SeqCst);
        if delay > 0 && buf.len() == 512 {
            std::thread::sleep(Duration::from_micros(delay));
        }
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert!(!self.panic_at_write.swap(false, Ordering::SeqCst), "the storage panics");
        if self.log_is_full.load(Ordering::SeqCst) && buf.len() == 64 << 10 && offset < 2 * MIB {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if let Some(stops) = &self.stops
            && buf.len() == BLOCK
            && buf[0] == 9
            && self.stop_once.swap(false, Ordering::SeqCst)
        {
            stops.wait();
            stops.wait();
        }
        self.inner.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        assert!(!self.panic_at_growth.swap(false, Ordering::SeqCst), "the storage panics");
        let capacity = self.capacity.load(Ordering::SeqCst);
        if capacity > 0 {
            let too_small = || io::Error::new(io::ErrorKind::InvalidInput, "the block device is too small");
            return if len <= capacity { Ok(()) } else { Err(too_small()) };
        }
        if len < self.inner.len()? {
            if self.fail_shrink.swap(false, Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(5));
            }
            if self.shrink_and_fail.swap(false, Ordering::SeqCst) {
                self.inner.set_len(len)?;
                return Err(io::Error::from_raw_os_error(5));
            }
        }
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        assert!(!self.panic_at_sync.swap(false, Ordering::SeqCst), "the storage panics");
        if self.fail_sync.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(5));
        }
        self.inner.sync()
    }

    fn growth_reads_zero(&self) -> bool {
        self.capacity.load(Ordering::SeqCst) == 0
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        assert!(!self.panic_at_zeroing.swap(false, Ordering::SeqCst), "the storage panics");
        self.inner.zero_range(range)
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        self.log_is_full.store(false, Ordering::SeqCst);
        self.inner.punch_hole(range)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(range)
    }
}

fn fresh(odd: Odd, size: u64) -> (Arc<Odd>, Image) {
    let odd = Arc::new(odd);
    let storage: Arc<dyn Storage> = Arc::clone(&odd) as _;
    create(&storage, &CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(size) }, &()).unwrap();
    let image = OpenOptions::new().write(true).open(storage, None).unwrap();
    (odd, image)
}

fn copy(odd: &Odd) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(odd.inner.to_vec()))
}

#[test]
fn after_a_cut_that_failed_stale_space_is_still_stale() {
    let (odd, image) = fresh(Odd::default(), 64 * MIB);
    image.write_at(&[1; 512], 0).unwrap();
    // A plan that comes to nothing, with its payload written: its space is stale.
    let plan = image.plan_write(MIB..2 * MIB).unwrap();
    plan.storage().write_at(&vec![0xBB; BLOCK], plan.file_offset()).unwrap();
    drop(plan);
    image.flush().unwrap();
    odd.fail_shrink.store(true, Ordering::SeqCst);
    image.close().unwrap_err();
    image.write_at(&[2; 512], 2 * MIB).unwrap();
    assert!(read(&image, 2 * MIB + 512, BLOCK - 512) == vec![0; BLOCK - 512]);
    image.close().unwrap();
    assert_eq!(errors(&copy(&odd)), 0);
}

#[test]
fn a_cut_that_happens_and_says_that_it_failed_makes_no_entry_lie() {
    let (odd, image) = fresh(Odd::default(), 64 * MIB);
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    odd.shrink_and_fail.store(true, Ordering::SeqCst);
    image.close().unwrap_err();
    image.discard(0..MIB).unwrap();
    image.flush().unwrap();
    // The process dies here.
    let image = OpenOptions::new().open(copy(&odd), None).unwrap();
    assert_eq!(read(&image, 0, 512), [0; 512]);
    assert_eq!(errors(&copy(&odd)), 0);
}

#[test]
fn a_panic_in_a_commit_ends_all_writing() {
    let (odd, image) = fresh(Odd::default(), 64 * MIB);
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    image.write_at(&[2; 512], 5 * MIB).unwrap();
    odd.panic_at_sync.store(true, Ordering::SeqCst);
    let flush = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| image.flush()));
    assert!(flush.is_err());
    assert_eq!(image.write_at(&[3; 512], 0).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(image.close().unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(read(&image, 5 * MIB, 512), [2; 512], "reading goes on");
    drop(image);
    let image = OpenOptions::new().open(copy(&odd), None).unwrap();
    assert_eq!(read(&image, 0, 512), [1; 512]);
    assert_eq!(errors(&copy(&odd)), 0);
}

/// Panics of a storage in the middle of a first write: nobody waits for that block for ever.
#[test]
fn a_panic_in_a_first_write_lets_go_of_the_block() {
    let places: [fn(&Odd) -> &AtomicBool; 3] =
        [|odd| &odd.panic_at_write, |odd| &odd.panic_at_growth, |odd| &odd.panic_at_zeroing];
    for (number, place) in places.into_iter().enumerate() {
        let (odd, image) = fresh(Odd::default(), 64 * MIB);
        if number != 1 {
            image.write_at(&[1; 512], 0).unwrap();
        }
        if number == 2 {
            drop(image.plan_write(MIB..2 * MIB).unwrap()); // its space is stale, and zeroed for the next
        }
        place(&odd).store(true, Ordering::SeqCst);
        let write = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| image.write_at(&[2; 512], 5 * MIB)));
        assert!(write.is_err() && !place(&odd).load(Ordering::SeqCst), "{number}");
        assert!(image.try_write_at(&[3; 512], 5 * MIB).unwrap(), "{number}: the block is held");
        assert!(image.try_discard(5 * MIB..6 * MIB).unwrap(), "{number}");
        image.write_at(&[3; 512], 5 * MIB).unwrap();
        image.close().unwrap();
        let image = OpenOptions::new().open(copy(&odd), None).unwrap();
        assert_eq!(read(&image, 5 * MIB, 1024)[511..513], [3, 0], "{number}");
        assert_eq!(errors(&copy(&odd)), 0);
    }
}

/// A program panics for reasons of its own, and flushes and closes while it unwinds.
#[test]
fn who_writes_while_unwinding_harms_nothing() {
    struct Cleanup<'a>(&'a Image, &'a AtomicU64);
    impl Drop for Cleanup<'_> {
        fn drop(&mut self) {
            let done = [self.0.write_at(&[1; 512], 0), self.0.flush(), self.0.write_at(&[2; 512], 9 * MIB)];
            self.1.store(done.iter().filter(|done| done.is_ok()).count() as u64, Ordering::SeqCst);
        }
    }
    let (odd, image) = fresh(Odd::default(), 64 * MIB);
    let done = AtomicU64::new(0);
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _cleanup = Cleanup(&image, &done);
        panic!("of the program");
    }));
    assert_eq!(done.load(Ordering::SeqCst), 3);
    image.write_at(&[3; 512], MIB).unwrap();
    image.close().unwrap();
    let image = OpenOptions::new().open(copy(&odd), None).unwrap();
    assert_eq!((read(&image, 0, 1), read(&image, 9 * MIB, 1), read(&image, MIB, 1)), (vec![1], vec![2], vec![3]));
}

/// Readers do not stop for whoever closes; the file is cut all the same.
#[test]
fn closing_beside_readers_cuts_the_file() {
    let (odd, image) = fresh(Odd::default(), 64 * MIB);
    for block in 0..32 {
        image.write_at(&[1; 512], block * MIB).unwrap();
    }
    image.flush().unwrap();
    odd.read_delay.store(300, Ordering::SeqCst);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    assert_eq!(read(&image, 0, 512), [1; 512]);
                }
            });
        }
        std::thread::sleep(Duration::from_millis(10));
        image.discard(MIB..32 * MIB).unwrap();
        let closed = image.close();
        stop.store(true, Ordering::SeqCst);
        closed.unwrap();
    });
    let length = odd.len().unwrap();
    assert!(length <= 6 * MIB, "{} MiB for one block", length / MIB);
    assert_eq!(errors(&copy(&odd)), 0);
}

/// On a full file system, what earlier discards freed makes room for what the later ones log.
#[test]
fn discards_make_room_for_discards() {
    for zero in [false, true] {
        let (odd, image) = fresh(Odd::default(), 64 << 30);
        for block in 0..40 {
            image.write_at(&[1; 512], block * 1000 * MIB).unwrap(); // each in another page of the BAT
            image.flush().unwrap();
        }
        odd.log_is_full.store(true, Ordering::SeqCst);
        for block in 0..40 {
            let range = block * 1000 * MIB..(block * 1000 + 1) * MIB;
            let done = if zero { image.write_zeroes(range, true) } else { image.discard(range) };
            done.unwrap_or_else(|error| panic!("block {block}: {error}"));
        }
        assert!(!odd.log_is_full.load(Ordering::SeqCst), "there was room anyway");
        image.close().unwrap();
        assert_eq!(errors(&copy(&odd)), 0);
    }
}

/// Slow readers that overlap, so that somebody is reading at every moment: what is freed is used again all the same.
#[test]
fn readers_do_not_keep_freed_space_from_being_used() {
    let (odd, image) = fresh(Odd::default(), 4096 * MIB);
    image.write_at(&[1; 4096], 0).unwrap();
    image.flush().unwrap();
    odd.read_delay.store(3000, Ordering::SeqCst);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    assert_eq!(read(&image, 0, 512), [1; 512]);
                }
            });
        }
        for round in 0..20 {
            for block in 1..65 {
                image.write_at(&[round; 4096], block * MIB).unwrap();
            }
            image.flush().unwrap();
            image.discard(MIB..65 * MIB).unwrap();
            image.flush().unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    let length = odd.len().unwrap();
    assert!(length <= 400 * MIB, "{} MiB for 65 blocks in 20 rounds", length / MIB);
    image.close().unwrap();
}

#[test]
fn freed_space_is_room_on_a_full_device() {
    let (plain, image) = fresh(Odd::default(), 64 * MIB);
    drop(image);
    let capacity = plain.len().unwrap() + 16 * MIB;
    plain.inner.set_len(capacity).unwrap();
    plain.capacity.store(capacity, Ordering::SeqCst);
    let image = OpenOptions::new().write(true).open(Arc::clone(&plain) as Arc<dyn Storage>, None).unwrap();
    let full = (0..64).find_map(|block| image.write_at(&[1; 4096], block * MIB).err()).unwrap();
    assert_eq!(full.io_error().map(io::Error::kind), Some(io::ErrorKind::StorageFull), "{full}");
    image.flush().unwrap();
    image.discard(0..8 * MIB).unwrap();
    image.write_at(&[2; 4096], 40 * MIB).unwrap();
    let plan = image.plan_write(41 * MIB..42 * MIB).unwrap();
    drop(plan);
    image.close().unwrap();
    assert_eq!(errors(&(plain as Arc<dyn Storage>)), 0);
}

#[test]
fn a_long_write_ends_when_writing_has_failed_for_good() {
    let odd = Odd { stops: Some(Barrier::new(2)), ..Odd::default() };
    let (odd, image) = fresh(odd, 64 * MIB);
    image.write_at(&vec![1; 16 << 20], 0).unwrap();
    image.flush().unwrap();
    odd.stop_once.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| image.write_at(&vec![9; 16 << 20], 0));
        odd.stops.as_ref().unwrap().wait();
        odd.fail_sync.store(true, Ordering::SeqCst);
        assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Io);
        odd.stops.as_ref().unwrap().wait();
        assert_eq!(writer.join().unwrap().unwrap_err().kind(), ErrorKind::Poisoned);
    });
    assert_eq!(read(&image, MIB, 512), [1; 512], "the second block was not written any more");
}

/// A log can name terabytes of zeros; they must take no space.
#[test]
fn zeros_of_a_log_take_no_space() {
    let guid = Guid::seeded(5);
    let builder = ImageBuilder::new(64 * MIB, 1 << 20).pattern_block(0, 1);
    let mut top = builder.both_headers(move |header| header.log_guid = guid).build();
    let (end, more) = (top.file.len(), 1 << 30);
    let zeros = DescriptorSpec::zero(end, more);
    let entry = LogEntrySpec::new(guid, 9, end).with(|entry| entry.last_file_offset = end + more).descriptor(zeros);
    LogRing::new(top.layout.log, top.layout.log_length).place(&mut top.file, &entry);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zeros.vhdx");
    top.write_to(&path).unwrap();
    let used = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    let before = used();
    let image = OpenOptions::new().write(true).replay(true).open_path(&path).unwrap();
    image.replay().unwrap().unwrap();
    image.close().unwrap();
    assert!(used() <= before + MIB, "{} bytes before, {} now", before, used());
}

/// Closing waits for a slow read, and nobody else has to.
#[test]
fn try_flush_waits_for_nobody_who_closes() {
    let (odd, image) = fresh(Odd::default(), 64 * MIB);
    for block in 0..4 {
        image.write_at(&[1; 4096], block * MIB).unwrap();
    }
    image.flush().unwrap();
    image.discard(MIB..2 * MIB).unwrap();
    image.flush().unwrap();
    odd.read_delay.store(2_000_000, Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| read(&image, 0, 512));
        std::thread::sleep(Duration::from_millis(100));
        let closer = scope.spawn(|| image.close_within(Duration::from_secs(30)));
        std::thread::sleep(Duration::from_millis(100));
        let begin = Instant::now();
        let _ = image.try_flush();
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        closer.join().unwrap().unwrap();
    });
}
