//! Bugs that other writers of this format have, each as a test that a writer with the bug fails.
//!
//! The names say who had it; the first line of each says what that program does. Those of readers are in `known_bugs.rs`.
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

use std::ops::Range;
use std::sync::{Arc, Mutex};

use vhdkit::ErrorKind;
use vhdkit::format::finding::Code;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::counting::{CountingStorage, Method};
use vhdkit_testkit::dirty::{DirtyPlan, edit_header};
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec, LogRing};
use vhdkit_testkit::model::ZERO;
use vhdkit_testkit::sim::{Fault, FaultError, OpKind, Sampling};
use vhdkit_testkit::sparse::{SparseFile, is_zero};
use vhdkit_testkit::spec::{Checksum, MIB};
use write_support::reader::{RawImage, current, header};
use write_support::watched::{for_each_state, sim, survivor, watch};
use write_support::{Parents, assert_clean, load, snapshot, warnings};

fn open(storage: &Arc<impl Storage + 'static>) -> Image {
    OpenOptions::new().write(true).open(Arc::clone(storage) as Arc<dyn Storage>, None).unwrap()
}

fn replaying(storage: &Arc<impl Storage + 'static>) -> Image {
    OpenOptions::new().write(true).replay(true).open(Arc::clone(storage) as Arc<dyn Storage>, None).unwrap()
}

fn read(image: &Image, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xC3; length];
    image.read_at(&mut bytes, offset).unwrap();
    bytes
}

fn inside(range: &Range<u64>, start: u64, length: u64) -> bool {
    range.start >= start && range.end <= start + length
}

fn empty(size: u64, block: u32) -> BuiltImage {
    ImageBuilder::new(size, block).build()
}

fn log_guid() -> Guid {
    Guid::seeded(4321)
}

/// Puts entries into the log, one after another from its start on, and makes the image dirty.
fn log(mut image: BuiltImage, entries: &[LogEntrySpec]) -> BuiltImage {
    let mut ring = LogRing::new(image.layout.log, image.layout.log_length);
    for entry in entries {
        ring.place(&mut image.file, entry);
    }
    for slot in 0..2 {
        edit_header(&mut image, slot, |header| header[48..64].copy_from_slice(&log_guid().0));
    }
    image
}

fn entry(sequence: u64, image: &BuiltImage) -> LogEntrySpec {
    LogEntrySpec::new(log_guid(), sequence, image.file.len())
}

/// The newest entry in a log, by its bytes: sequence number, flushed and last file offset.
fn newest_entry(file: &SparseFile) -> (u64, u64, u64) {
    let header = current(file);
    let sectors = (0..u64::from(header.log_length)).step_by(4096).map(|at| header.log_offset + at);
    let entries = sectors.filter(|at| file.read(*at, 4) == b"loge" && file.read(at + 32, 16) == header.log_guid.0);
    entries.map(|at| (file.read_u64(at + 16), file.read_u64(at + 48), file.read_u64(at + 56))).max().unwrap()
}

// QEMU.

/// QEMU syncs about seven times for each new block: it opens and closes the log for each.
#[test]
fn qemu_q3_two_syncs_for_a_new_block_and_its_flush() {
    let storage = Arc::new(CountingStorage::new(Arc::new(load(&empty(128 * MIB, 1 << 20).file))));
    let image = open(&storage);
    for block in 0..64 {
        image.write_at(&[7; 4096], block * MIB + 8192).unwrap();
        image.flush().unwrap();
    }
    image.close().unwrap();
    drop(image);
    assert!(storage.syncs() <= 2 * 64 + 12, "{} syncs", storage.syncs());
    assert!(storage.syncs() >= 2 * 64, "{} syncs cannot keep the order", storage.syncs());
    assert_clean("Q3", &(storage as Arc<dyn Storage>));
}

/// QEMU changed a wrong page of the log when a BAT entry at the start of a 4 KiB page changed (issue 727).
#[test]
fn qemu_727_entries_at_the_ends_of_pages_are_logged_right() {
    let storage = sim(&empty(3 << 30, 1 << 20).file);
    let image = open(&storage);
    for round in 0..2_u64 {
        for index in [511, 512, 513, 1023, 1024, 1535, 1536] {
            image.write_at(&[(index % 200 + round) as u8 + 1; 512], index * MIB + round * 512).unwrap();
            image.flush().unwrap();
            let survived = survivor(storage.durable_pages());
            assert_eq!(read(&survived, index * MIB + round * 512, 512), [(index % 200 + round) as u8 + 1; 512]);
        }
    }
    image.close().unwrap();
    let file = storage.pages().to_sparse();
    let raw = RawImage::new(&file, None);
    for index in 0..3072 {
        let written = matches!(index, 511..=513 | 1023 | 1024 | 1535 | 1536);
        assert_eq!(raw.payload(index).0 == 6, written, "block {index}");
    }
}

/// QEMU does not let the file grow to a LastFileOffset that is a multiple of 1 MiB.
#[test]
fn qemu_q7_replay_in_place_grows_the_file_to_an_aligned_last_file_offset() {
    let clean =
        ImageBuilder::new(64 << 20, 1 << 20).pattern_block(0, 1).block(9, BlockSpec::present(Content::Zero)).build();
    let mut image = clean.clone();
    let cut = clean.layout.payload_block(9);
    assert_eq!(clean.file.len(), cut + MIB);
    DirtyPlan::new(1).move_bat(&clean).with(|plan| plan.cut_file = Some(cut)).apply(&mut image);
    let storage = Arc::new(load(&image.file));
    let opened = replaying(&storage);
    assert_eq!(opened.replay().unwrap().unwrap().file_size_after, cut + MIB);
    assert_eq!(storage.len().unwrap(), cut + MIB);
    opened.close().unwrap();
    drop(opened);
    assert_clean("Q7", &(Arc::clone(&storage) as Arc<dyn Storage>));
    let opened = open(&storage);
    assert_eq!(read(&opened, 9 * MIB, 4096), [0; 4096]);
    assert_eq!(read(&opened, 0, 4096), clean.model.read(0, 4096));
}

/// QEMU gives an image a new data write GUID when it replays its log: the children of a parent know it no longer.
#[test]
fn qemu_q8_replay_in_place_keeps_the_identity_of_the_data() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(1, 1).build();
    let mut dirty = clean.clone();
    DirtyPlan::new(2).move_bat(&clean).apply(&mut dirty);
    let storage = Arc::new(load(&dirty.file));
    let image = replaying(&storage);
    assert!(image.replay().unwrap().is_some());
    image.close().unwrap();
    drop(image);
    let (before, after) = (current(&dirty.file), current(&snapshot(storage.as_ref())));
    assert_eq!(after.data_write_guid, before.data_write_guid);
    assert_ne!(after.file_write_guid, before.file_write_guid);
    let child = ImageBuilder::new(8 << 20, 1 << 20).differencing(&Arc::new(clean)).build();
    let parents = Arc::new(Parents(vec![storage.clone()]));
    let opened = OpenOptions::new().parents(parents.clone()).open(Arc::new(load(&child.file)), None).unwrap();
    assert_eq!(read(&opened, MIB, 4096), child.model.read(MIB, 4096));
    // Once the data does change, the parent is another one.
    let image = open(&storage);
    image.write_at(&[1], 0).unwrap();
    image.close().unwrap();
    let refused = OpenOptions::new().parents(parents).open(Arc::new(load(&child.file)), None).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ParentMismatch);
}

/// QEMU replays what stands before the tail of the newest entry, and takes numbers 5 and 9 as one sequence.
#[test]
fn qemu_q9_replay_in_place_honours_the_tail_and_gaps() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build();
    let poison = clean.layout.payload_block(1);
    let stale = DescriptorSpec::data(poison, &[0xBD; 4096]);
    let truth = DescriptorSpec::data(clean.layout.bat, &clean.file.read(clean.layout.bat, 4096));
    let retired = entry(5, &clean).descriptor(stale);
    let before_tail = entry(6, &clean).tail(8192).descriptor(truth.clone());
    let behind_gap = entry(9, &clean).descriptor(truth);
    for head in [before_tail, behind_gap] {
        let storage = Arc::new(load(&log(clean.clone(), &[retired.clone(), head]).file));
        let image = replaying(&storage);
        assert_eq!(image.replay().unwrap().unwrap().entries, 1);
        image.close().unwrap();
        drop(image);
        assert_clean("Q9", &(Arc::clone(&storage) as Arc<dyn Storage>));
        let image = open(&storage);
        assert_eq!(read(&image, MIB, 4096), clean.model.read(MIB, 4096));
        assert_eq!(read(&image, 0, 4096), clean.model.read(0, 4096));
    }
}

/// QEMU wrote where descriptors said, also over the file identifier, and called it a repair.
#[test]
fn qemu_q10_a_log_that_aims_at_the_header_is_refused_before_anything_is_written() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).build();
    let truth = DescriptorSpec::data(clean.layout.bat, &clean.file.read(clean.layout.bat, 4096));
    let evil = [0, 0x1_0000, 0x2_0000].map(|target| (DescriptorSpec::data(target, &[0; 4096]), Code::LogTargetHeader));
    let far = (DescriptorSpec::zero(2 * MIB, 1 << 60), Code::LogTargetBeyond);
    for (evil, code) in evil.into_iter().chain([far]) {
        // What stands before it is right, so that a writer that does not look ahead has begun.
        let first = entry(3, &clean).tail(0).descriptor(truth.clone());
        let second = entry(4, &clean).tail(0).descriptor(truth.clone()).descriptor(evil);
        let storage = sim(&log(clean.clone(), &[first, second]).file);
        let before = storage.counts().operations();
        let refused = OpenOptions::new()
            .write(true)
            .replay(true)
            .open(Arc::clone(&storage) as Arc<dyn Storage>, None)
            .unwrap_err();
        assert_eq!((refused.kind(), refused.code()), (ErrorKind::Corrupt, Some(code)));
        assert_eq!(storage.counts().operations(), before, "something was done to the file");
    }
}

/// QEMU computes the rest of a new block with a subtraction that underflows, and leaves it stale where growth is not zero.
#[test]
fn qemu_r1_the_rest_of_a_new_block_is_zeroed_where_growth_is_not() {
    let size = 9 * MIB + 512;
    for parent in [false, true] {
        let base = Arc::new(ImageBuilder::new(size, 1 << 20).named("base.vhdx").build());
        let builder = ImageBuilder::new(size, 2 << 20);
        let top = if parent { builder.differencing(&base).block(0, BlockSpec::new(ZERO)) } else { builder }.build();
        let storage = Arc::new(load(&top.file).without_zero_growth());
        let options = OpenOptions::new().parents(Arc::new(Parents(vec![Arc::new(load(&base.file))])));
        let image = options.write(true).open(storage.clone(), None).unwrap();
        // The start, the middle and the end of blocks, and the block that the disk's end cuts.
        for offset in [0, 2 * MIB + 700 * 512, 6 * MIB - 512, 8 * MIB, size - 512] {
            image.write_at(&[1; 512], offset).unwrap();
        }
        image.close().unwrap();
        let file = snapshot(storage.as_ref());
        let raw = RawImage::new(&file, parent.then_some(&base.model));
        let mut expected = vec![0; size as usize];
        for offset in [0, 2 * MIB + 700 * 512, 6 * MIB - 512, 8 * MIB, size - 512] {
            expected[offset as usize..][..512].fill(1);
        }
        assert!(raw.read(0, size as usize) == expected);
    }
}

/// QEMU publishes a block in memory before its data and its entry are written: what a second writer then flushes hangs on
/// a mapping that a crash takes away.
#[test]
fn qemu_r2_a_block_is_not_there_before_its_payload_and_nobody_overtakes_its_writer() {
    let storage = sim(&empty(16 * MIB, 1 << 20).file);
    let image = Arc::new(open(&storage));
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    // A flush in the middle of a first write: neither the live image nor the durable one knows the block.
    let (hooked, seen) = (Arc::downgrade(&image), Arc::new(Mutex::new(0)));
    let (storage_in_hook, count) = (Arc::downgrade(&storage), Arc::clone(&seen));
    storage.set_hook(Some(Arc::new(move |info| {
        if info.kind == OpKind::Write && info.range.end - info.range.start == 3000 {
            let (image, storage) = (hooked.upgrade().unwrap(), storage_in_hook.upgrade().unwrap());
            image.flush().unwrap();
            assert!(!image.try_write_at(&[3; 512], 5 * MIB + 65_536).unwrap(), "a second writer has to wait");
            assert_eq!(read(&image, 5 * MIB, 3000), [0; 3000]);
            assert_eq!(read(&survivor(storage.durable_pages()), 5 * MIB, 3000), [0; 3000]);
            *count.lock().unwrap() += 1;
        }
    })));
    image.write_at(&[2; 3000], 5 * MIB).unwrap();
    assert_eq!(*seen.lock().unwrap(), 1);
    storage.set_hook(None);
    // The second writer's flush covers the block's mapping, whoever made it.
    image.write_at(&[3; 512], 5 * MIB + 65_536).unwrap();
    image.flush().unwrap();
    let survived = survivor(storage.durable_pages());
    assert_eq!(read(&survived, 5 * MIB + 65_536, 512), [3; 512]);
    assert_eq!(read(&survived, 5 * MIB, 3000), [2; 3000]);
}

/// QEMU goes on after a failed write of its log, with a memory that differs from the file.
#[test]
fn qemu_r2_after_a_failed_log_write_nothing_is_written_any_more() {
    let top = empty(16 * MIB, 1 << 20);
    let storage = sim(&top.file);
    let image = open(&storage);
    image.write_at(&[1; 512], 0).unwrap();
    image.flush().unwrap();
    image.write_at(&[2; 512], 3 * MIB).unwrap();
    let events = watch(&storage);
    // Everything that goes into the ring fails once.
    let ring = top.layout.log..top.layout.log + u64::from(top.layout.log_length);
    let weak = Arc::downgrade(&storage);
    storage.set_hook(Some(Arc::new(move |info| {
        if info.kind == OpKind::Write && ring.contains(&info.range.start) {
            weak.upgrade().unwrap().set_fault(Some(Fault::nth(1, FaultError::EIO).only(&[OpKind::Write])));
        }
    })));
    let failed = image.flush().unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Io);
    storage.set_hook(None);
    let before = events.lock().unwrap().len();
    for refused in [image.write_at(&[9], 0), image.flush(), image.discard(0..MIB), image.close()] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Poisoned);
    }
    assert_eq!(read(&image, 3 * MIB, 512), [2; 512], "reads go on");
    drop(image);
    assert_eq!(events.lock().unwrap().len(), before, "nothing was written after the failure");
    let image = replaying(&storage);
    assert_eq!(read(&image, 0, 512), [1; 512]);
    assert!(matches!(read(&image, 3 * MIB, 512)[0], 0 | 2));
}

/// QEMU ignores what writing its headers returns.
#[test]
fn qemu_r3_a_header_that_cannot_be_written_ends_the_session() {
    let top = empty(16 * MIB, 1 << 20);
    let count_header_writes = || {
        let storage = sim(&top.file);
        let events = watch(&storage);
        let image = open(&storage);
        image.write_at(&[1; 512], 0).unwrap();
        image.close().unwrap();
        let events = events.lock().unwrap();
        let headers = events.iter().filter(|(info, _)| info.kind == OpKind::Write && info.range.start < 192 << 10);
        headers.count() as u64
    };
    let writes = count_header_writes();
    assert_eq!(writes, 6, "start, log, end, each in both copies");
    for number in 1..=writes {
        let storage = sim(&top.file);
        let (weak, seen) = (Arc::downgrade(&storage), Mutex::new(0));
        storage.set_hook(Some(Arc::new(move |info| {
            if info.kind == OpKind::Write && info.range.start < 192 << 10 {
                let mut seen = seen.lock().unwrap();
                *seen += 1;
                if *seen == number {
                    weak.upgrade().unwrap().set_fault(Some(Fault::nth(1, FaultError::EIO).only(&[OpKind::Write])));
                }
            }
        })));
        let image = open(&storage);
        let outcome = image.write_at(&[1; 512], 0).and_then(|()| image.close());
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Io, "header {number}");
        assert_eq!(image.write_at(&[1; 512], 0).unwrap_err().kind(), ErrorKind::Poisoned);
        drop(image);
        storage.set_hook(None);
        let image = replaying(&storage);
        assert!(matches!(read(&image, 0, 512)[0], 0 | 1));
        image.write_at(&[5; 512], 0).unwrap();
        image.close().unwrap();
        assert_clean("header", &(Arc::clone(&storage) as Arc<dyn Storage>));
    }
}

/// QEMU replays a zero descriptor in steps of 4 KiB with a sync after each: one descriptor takes hours.
#[test]
fn qemu_r3_a_large_zero_descriptor_is_few_operations() {
    let clean =
        ImageBuilder::new(2 << 30, 256 << 20).pattern_block(0, 1).block(1, BlockSpec::present(Content::Zero)).build();
    let target = clean.layout.payload_block(1);
    let zeroes = entry(3, &clean).descriptor(DescriptorSpec::zero(target, 256 << 20));
    let mut image = log(clean.clone(), &[zeroes]);
    image.file.write(target + (200 << 20), &[0xEE; 4096]);
    let storage = Arc::new(CountingStorage::new(Arc::new(load(&image.file))));
    let opened = replaying(&storage);
    opened.replay().unwrap().unwrap();
    let counts = storage.counts();
    assert!(counts.calls(Method::Sync) <= 6 && counts.calls(Method::Write) + counts.calls(Method::ZeroRange) <= 8);
    assert_eq!(read(&opened, (256 << 20) + (200 << 20), 4096), [0; 4096]);
    opened.close().unwrap();
    drop(opened);
    assert_clean("zeroes", &(storage as Arc<dyn Storage>));
}

// OpenVMM.

/// OpenVMM writes pages home without a sync between their log entry and them.
#[test]
fn openvmm_ov1_an_entry_is_durable_before_its_pages_go_home() {
    let top = empty(64 * MIB, 1 << 20);
    let storage = sim(&top.file);
    let events = watch(&storage);
    let image = open(&storage);
    for block in 0..20 {
        image.write_at(&[1; 512], block * MIB).unwrap();
        image.flush().unwrap();
    }
    image.close().unwrap();
    let (log, bat) = (top.layout.log, top.layout.bat);
    let events = events.lock().unwrap();
    let mut home = 0;
    for (info, point) in events.iter() {
        let writes_home = info.kind == OpKind::Write && inside(&info.range, bat, u64::from(top.layout.bat_length));
        home += usize::from(writes_home);
        let pending_log = point.pending().iter().any(|pending| {
            let range = pending.changes();
            pending.kind() == OpKind::Write && inside(&range, log, u64::from(top.layout.log_length))
        });
        assert!(!(writes_home && pending_log), "{info}: its entry may be lost");
    }
    assert!(home >= 20);
}

/// OpenVMM notes how far it has to flush before the caller has written its data: a flush by somebody else in between
/// makes it publish a block with what stood in its space before.
#[test]
fn openvmm_ov1_a_flush_between_allocation_and_payload_publishes_nothing() {
    let storage = sim(&empty(16 * MIB, 1 << 20).file);
    let image = open(&storage);
    image.write_at(&vec![0xAA; 3 << 20], 0).unwrap();
    image.flush().unwrap();
    image.discard(0..3 * MIB).unwrap();
    image.close().unwrap();
    drop(image);
    let image = open(&storage);
    let events = watch(&storage);
    let plan = image.plan_write(9 * MIB + 4096..9 * MIB + 12_288).unwrap();
    image.flush().unwrap();
    storage.write_at(&[0xBB; 8192], plan.file_offset()).unwrap();
    image.write_at(&[0xCC; 512], 12 * MIB).unwrap();
    image.flush().unwrap();
    plan.complete().unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    storage.set_observer(None);
    let events = events.lock().unwrap();
    let states = for_each_state(&events, |info, survived| {
        let bytes = read(&survived, 9 * MIB, 1 << 20);
        for (sector, bytes) in bytes.chunks(512).enumerate() {
            let new = (8..24).contains(&sector) && *bytes == [0xBB; 512];
            assert!(new || is_zero(bytes), "{info}: sector {sector} shows {:#x}", bytes[0]);
        }
    });
    assert!(states > 200, "{states}");
}

/// OpenVMM's own tests lose all writes since the last flush or none: no subset, no torn sector, no lost growth.
#[test]
fn openvmm_ov2_what_was_flushed_survives_every_subset_of_what_was_not() {
    let storage = sim(&empty(300 * MIB, 1 << 20).file);
    let image = open(&storage);
    let events = watch(&storage);
    let mut flushed_by: Vec<(u64, usize)> = Vec::new();
    for block in 0..8_u64 {
        image.write_at(&vec![block as u8 + 1; 5000], block * 33 * MIB + 1000).unwrap();
        image.flush().unwrap();
        flushed_by.push((block, events.lock().unwrap().len()));
    }
    image.close().unwrap();
    storage.set_observer(None);
    let events = events.lock().unwrap();
    let mut states = 0;
    for (number, (info, point)) in events.iter().enumerate() {
        for state in point.states(&Sampling { exhaustive_ops: 2, random: 10 }, number as u64) {
            let survived = survivor(point.build(&state));
            for (block, _) in flushed_by.iter().filter(|(_, at)| *at <= number) {
                let bytes = read(&survived, block * 33 * MIB + 1000, 5000);
                assert!(bytes == [*block as u8 + 1; 5000], "{info}: block {block} was flushed and is lost");
            }
            states += 1;
        }
    }
    assert!(states > 300, "{states}");
}

/// OpenVMM keeps the file offsets of its log entries as they were when the file was opened.
#[test]
fn openvmm_ov3_file_offsets_of_entries_follow_the_growth() {
    let storage = sim(&empty(600 * MIB, 1 << 20).file);
    let at_start = storage.len().unwrap();
    let image = open(&storage);
    let (mut last, mut grown) = (0, 0);
    for block in 0..200 {
        image.write_at(&[1; 512], block * 2 * MIB).unwrap();
        image.flush().unwrap();
        if block % 20 == 19 {
            let durable = storage.durable_pages();
            let (_, flushed_offset, last_offset) = newest_entry(&durable.to_sparse());
            assert!(flushed_offset <= durable.len(), "the flushed file offset is more than is durable");
            assert!(flushed_offset > at_start, "the flushed file offset stands still");
            assert!(last_offset >= at_start + (block + 1) * MIB, "a mapped block lies behind the last file offset");
            assert!(last_offset <= storage.len().unwrap());
            grown += usize::from(last_offset > last);
            last = last_offset;
        }
    }
    assert_eq!(grown, 10);
}

// vhdx-rs.

/// vhdx-rs shows zeros for all payload below LastFileOffset while the log is dirty.
#[test]
fn vhdx_rs_a_dirty_image_reads_right_before_and_after_it_is_replayed_in_place() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(5, 2).build();
    let page = clean.file.read(clean.layout.bat, 4096);
    let head = entry(3, &clean).descriptor(DescriptorSpec::data(clean.layout.bat, &page));
    let grown = head.clone().with(|entry| entry.last_file_offset += 4 * MIB);
    for entry in [head, grown] {
        let mut image = log(clean.clone(), &[entry]);
        image.file.zero(clean.layout.bat, 4096);
        let storage = Arc::new(load(&image.file));
        let opened = replaying(&storage);
        assert_eq!(read(&opened, 0, 8 << 20), clean.model.read(0, 8 << 20));
        opened.write_at(&[1; 512], 3 * MIB).unwrap();
        assert_eq!(read(&opened, 0, 3 << 20), clean.model.read(0, 3 << 20));
        assert_eq!(read(&opened, 4 * MIB, 4 << 20), clean.model.read(4 * MIB, 4 << 20));
        opened.close().unwrap();
    }
}

/// vhdx-rs leaves the log GUID after a replay: blocks that it writes without the log are undone by the next replay.
#[test]
fn vhdx_rs_nothing_undoes_what_is_written_after_a_replay() {
    let clean = ImageBuilder::new(16 << 20, 1 << 20).pattern_block(0, 1).build();
    let mut dirty = clean.clone();
    DirtyPlan::new(6).move_bat(&clean).apply(&mut dirty);
    let storage = sim(&dirty.file);
    let image = replaying(&storage);
    image.write_at(&[7; 512], 9 * MIB).unwrap();
    image.flush().unwrap();
    let survived = survivor(storage.durable_pages());
    assert_eq!(read(&survived, 9 * MIB, 512), [7; 512], "cut in the middle of the session");
    image.close().unwrap();
    drop(image);
    let file = storage.pages().to_sparse();
    for slot in 0..2 {
        assert_eq!(header(&file, slot).unwrap().log_guid, Guid::ZERO);
    }
    let image = open(&storage);
    assert_eq!(read(&image, 9 * MIB, 512), [7; 512]);
    assert_eq!(read(&image, 0, 4096), clean.model.read(0, 4096));
}

/// vhdx-rs never changes the data write GUID: a chain check passes although the parent was written.
#[test]
fn vhdx_rs_the_data_write_guid_is_new_and_durable_before_the_first_visible_change() {
    let top = ImageBuilder::new(16 << 20, 1 << 20).pattern_block(0, 1).build();
    let changes: [fn(&Image); 4] = [
        |image| image.write_at(&[1; 512], 0).unwrap(),
        |image| image.write_at(&[1; 512], 5 * MIB).unwrap(),
        |image| image.write_zeroes(0..MIB, true).unwrap(),
        |image| image.discard(0..MIB).unwrap(),
    ];
    for (number, change) in changes.iter().enumerate() {
        let storage = sim(&top.file);
        let before = current(&top.file).data_write_guid;
        let events = watch(&storage);
        let image = open(&storage);
        change(&image);
        image.flush().unwrap();
        for (info, point) in events.lock().unwrap().iter() {
            let headers = info.kind == OpKind::Sync || inside(&info.range, 64 << 10, 128 << 10);
            let file = point.durable().to_sparse();
            let new = [0, 1]
                .into_iter()
                .filter_map(|slot| header(&file, slot))
                .all(|header| header.data_write_guid != before);
            assert!(headers || new, "change {number}: {info} before the new GUID is durable in both headers");
        }
        image.close().unwrap();
        assert_ne!(current(&storage.pages().to_sparse()).data_write_guid, before);
    }
}

// cloud-hypervisor.

/// cloud-hypervisor forgets the entries of bitmaps when it looks a block up: behind 4 GiB it writes over wrong entries.
#[test]
fn cloud_hypervisor_blocks_behind_4_gib_are_written_through_the_right_entry() {
    let top = ImageBuilder::new(10 << 30, 1 << 20).pattern_block(4095, 1).pattern_block(4096, 2).build();
    let storage = Arc::new(load(&top.file));
    let image = open(&storage);
    for gib in [4, 5, 8, 9] {
        image.write_at(&[gib as u8; 512], (gib << 30) + 5 * MIB).unwrap();
    }
    image.close().unwrap();
    let file = snapshot(storage.as_ref());
    let raw = RawImage::new(&file, None);
    for gib in [4, 5, 8, 9] {
        let block = (gib << 10) + 5;
        let (state, place) = raw.payload(block);
        assert_eq!(state, 6);
        assert_eq!(file.read(place, 512), [gib as u8; 512]);
        assert_eq!(file.read_u64(top.layout.bat + 8 * (block + gib / 4)), place | 6);
    }
    assert_eq!((raw.payload(4095).0, raw.payload(4096).0), (6, 6));
    assert_eq!(raw.read((4 << 30) - 512, 1024), top.model.read((4 << 30) - 512, 1024));
    // The slots in between belong to bitmaps, which a dynamic disk has not.
    assert_eq!((file.read_u64(top.layout.bat + 8 * 4096), file.read_u64(top.layout.bat + 8 * 8193)), (0, 0));
}

/// cloud-hypervisor writes the BAT before the data that it points to.
#[test]
fn cloud_hypervisor_data_is_durable_before_anything_points_to_it() {
    let top = empty(64 * MIB, 1 << 20);
    let storage = sim(&top.file);
    let events = watch(&storage);
    let image = open(&storage);
    for block in 0..10_u64 {
        image.write_at(&[0xD0; 4096], block * 3 * MIB).unwrap();
        image.flush().unwrap();
    }
    image.close().unwrap();
    // Shorter writes into the ring are entries without a page; the longer one makes its place real.
    let entry = |range: &Range<u64>| {
        let length = range.end - range.start;
        inside(range, top.layout.log, u64::from(top.layout.log_length)) && (8192..65_536).contains(&length)
    };
    let home = |range: &Range<u64>| inside(range, top.layout.bat, u64::from(top.layout.bat_length));
    let mut looked = 0;
    for (info, point) in events.lock().unwrap().iter() {
        if info.kind == OpKind::Write && (entry(&info.range) || home(&info.range)) {
            let payload = point.pending().iter().any(|pending| pending.changes().start >= top.file.len());
            assert!(!payload, "{info} while payload is not durable");
            looked += 1;
        }
    }
    assert!(looked >= 20);
}

/// cloud-hypervisor wrote data at the start of its block instead of at its sector.
#[test]
fn cloud_hypervisor_data_goes_to_its_sector_inside_the_block() {
    let storage = Arc::new(load(&empty(64 * MIB, 2 << 20).file));
    let image = open(&storage);
    image.write_at(&[1; 512], 6 * MIB + 700 * 512).unwrap();
    image.write_at(&[2; 512], 6 * MIB + 701 * 512).unwrap();
    image.close().unwrap();
    let file = snapshot(storage.as_ref());
    let place = RawImage::new(&file, None).payload(3).1;
    assert_eq!(file.read(place + 700 * 512, 512), [1; 512]);
    assert_eq!(file.read(place + 701 * 512, 512), [2; 512]);
    assert!(is_zero(&file.read(place, 700 * 512)) && is_zero(&file.read(place + 702 * 512, (2 << 20) - 702 * 512)));
}

/// cloud-hypervisor needs both headers, which defeats having two.
#[test]
fn cloud_hypervisor_one_torn_header_does_not_keep_a_writer_out_and_is_mended() {
    for slot in 0..2 {
        for signature in [*b"head", [0; 4]] {
            let top = ImageBuilder::new(8 << 20, 1 << 20)
                .pattern_block(0, 1)
                .with(|builder| {
                    builder.headers[slot].checksum = Checksum::Wrong;
                    builder.headers[slot].signature = signature;
                })
                .build();
            let storage = Arc::new(load(&top.file));
            let image = open(&storage);
            image.write_at(&[1; 512], 5 * MIB).unwrap();
            image.close().unwrap();
            let file = snapshot(storage.as_ref());
            let [first, second] = [header(&file, 0), header(&file, 1)].map(Option::unwrap);
            assert_eq!(first.sequence.abs_diff(second.sequence), 1);
            assert_clean("torn", &(storage as Arc<dyn Storage>));
        }
    }
}

// DiscUtils.

/// DiscUtils gives freed space to another block as it is: the rest of a partial write shows what was deleted.
#[test]
fn discutils_reused_space_shows_nothing_of_what_was_there() {
    let storage = Arc::new(load(&empty(16 * MIB, 1 << 20).file));
    let image = open(&storage);
    image.write_at(&vec![0xAA; 2 << 20], 0).unwrap();
    image.close().unwrap();
    let full = storage.len().unwrap();
    let file = snapshot(storage.as_ref());
    let places = [0, 1].map(|block| RawImage::new(&file, None).payload(block).1);
    drop(image);
    // In one session, across sessions, and in space that a crashed session left behind.
    let image = open(&storage);
    image.discard(0..MIB).unwrap();
    image.flush().unwrap();
    image.flush().unwrap();
    image.write_at(&[1; 512], 5 * MIB + 4096).unwrap();
    image.discard(MIB..2 * MIB).unwrap();
    image.close().unwrap();
    drop(image);
    let image = open(&storage);
    image.write_at(&[2; 512], 8 * MIB + 4096).unwrap();
    image.close().unwrap();
    let file = snapshot(storage.as_ref());
    let raw = RawImage::new(&file, None);
    assert!(places.contains(&raw.payload(5).1) || places.contains(&raw.payload(8).1), "space is used again");
    assert!(storage.len().unwrap() <= full);
    for (block, byte) in [(5, 1), (8, 2)] {
        let place = raw.payload(block).1;
        let mut expected = vec![0; 1 << 20];
        expected[4096..4608].fill(byte);
        assert!(file.read(place, 1 << 20) == expected, "block {block}");
    }
}

/// DiscUtils makes a ZERO block of a child partially present: around what is written the parent shows again.
#[test]
fn discutils_a_zero_block_of_a_child_hides_the_parent_after_a_partial_write() {
    let base = Arc::new(
        (0..4)
            .fold(ImageBuilder::new(8 << 20, 2 << 20), |builder, block| builder.pattern_block(block, 1))
            .named("base.vhdx")
            .build(),
    );
    let top = ImageBuilder::new(8 << 20, 1 << 20)
        .differencing(&base)
        // Bits that lie around from an earlier time claim sectors.
        .block(1, BlockSpec::new(ZERO).with_mask(SectorMask::all()))
        .block(2, BlockSpec::anchored(3, Content::pattern(9)).with_mask(SectorMask::random(1, 3, 50)))
        .block(4, BlockSpec::new(0).with_mask(SectorMask::random(1, 3, 50)))
        .build();
    let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
    let options = OpenOptions::new().parents(Arc::new(Parents(vec![Arc::new(load(&base.file))])));
    let image = options.write(true).open(storage.clone(), None).unwrap();
    for block in [1, 2, 4] {
        image.write_at(&[1; 700], block * MIB + 5000).unwrap();
    }
    image.write_zeroes(6 * MIB..7 * MIB, true).unwrap();
    image.write_at(&[1; 700], 6 * MIB + 5000).unwrap();
    image.close().unwrap();
    let file = snapshot(storage.as_ref());
    let raw = RawImage::new(&file, Some(&base.model));
    for block in [1, 2, 6] {
        assert_eq!(raw.payload(block).0, 6);
        let mut expected = vec![0; 1 << 20];
        expected[5000..5700].fill(1);
        assert!(raw.read(block * MIB, 1 << 20) == expected, "block {block} shows its parent");
    }
    let mut expected = base.model.read(4 * MIB, 1 << 20);
    expected[5000..5700].fill(1);
    assert_eq!(raw.payload(4).0, 7);
    assert!(raw.read(4 * MIB, 1 << 20) == expected, "block 4 takes stale bits for its own");
}

/// DiscUtils does not clear the log GUID after a replay.
#[test]
fn discutils_the_log_is_clean_in_both_headers_after_a_replay() {
    let clean = ImageBuilder::new(16 << 20, 1 << 20).pattern_block(0, 1).build();
    let mut dirty = clean.clone();
    DirtyPlan::new(6).move_bat(&clean).move_metadata(&clean).move_region_tables(&clean).apply(&mut dirty);
    let storage: Arc<dyn Storage> = Arc::new(load(&dirty.file));
    let image = OpenOptions::new().write(true).replay(true).open(storage.clone(), None).unwrap();
    image.replay().unwrap().unwrap();
    drop(image);
    let file = snapshot(storage.as_ref());
    for slot in 0..2 {
        assert_eq!(header(&file, slot).unwrap().log_guid, Guid::ZERO);
    }
    assert_clean("replayed", &storage);
    assert!(file.read(clean.layout.bat, 1 << 20) == clean.file.read(clean.layout.bat, 1 << 20));
    assert!(file.read(192 << 10, 128 << 10) == clean.file.read(192 << 10, 128 << 10));
}

/// DiscUtils looks at the first region table only, and so does QEMU.
#[test]
fn discutils_an_image_is_written_by_its_second_region_table() {
    let top = ImageBuilder::new(16 << 20, 1 << 20)
        .pattern_block(0, 1)
        .with(|builder| {
            builder.region_tables[0].checksum = Checksum::Wrong;
            builder.region_tables[0].patches.push((16, vec![0xEE; 512]));
        })
        .build();
    let storage: Arc<dyn Storage> = Arc::new(load(&top.file));
    let before = warnings("RT2", &storage);
    let image = OpenOptions::new().write(true).open(storage.clone(), None).unwrap();
    image.write_at(&[1; 512], 5 * MIB).unwrap();
    image.close().unwrap();
    assert_eq!(warnings("RT2", &storage), before);
    let file = snapshot(storage.as_ref());
    assert_eq!(RawImage::new(&file, None).read(5 * MIB, 512), [1; 512]);
    assert!(file.read(192 << 10, 64 << 10) == top.file.read(192 << 10, 64 << 10), "mending is for who is asked to");
}

/// The toy of these tests: what is written to memory is there.
#[test]
fn storage_of_these_tests_keeps_what_it_is_given() {
    let file = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(3, 1).build().file;
    let memory: MemoryStorage = load(&file);
    assert!(snapshot(&memory) == snapshot(sim(&file).as_ref()));
    assert!(snapshot(&memory).read(0, 4 << 20) == file.read(0, 4 << 20));
}
