//! More bugs of other writers as tests named after them: metadata that is written past the log, headers that are updated in place,
//! queues that allocate at once, replays in place that shorten the file or mind no order.
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

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES, Header, OFFSETS};
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::dirty::edit_header;
use vhdkit_testkit::sim::{CrashImage, OpKind, Sampling, SimStorage};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, DescriptorSpec, DirtyPlan, ImageBuilder, LogEntrySpec, LogRing};
use write_support::watched::sim;
use write_support::{assert_clean, load};

const MIB: u64 = 1 << 20;

fn open(storage: &Arc<SimStorage>) -> Image {
    OpenOptions::new().write(true).replay(true).open(Arc::clone(storage) as Arc<dyn Storage>, None).unwrap()
}

fn headers(storage: &dyn Storage) -> [Option<Header>; 2] {
    OFFSETS.map(|offset| {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(&mut bytes, offset).unwrap();
        Header::decode(&bytes)
    })
}

/// cloud-hypervisor #6844: updating the headers left images that nothing opened any more.
#[test]
fn cloud_hypervisor_6844_a_header_update_never_leaves_an_image_without_one() {
    let storage = sim(&ImageBuilder::new(16 * MIB, 1 << 20).pattern_block(0, 1).build().file);
    let (weak, looks) = (Arc::downgrade(&storage), Arc::new(Mutex::new(0_u64)));
    let counted = Arc::clone(&looks);
    storage.set_observer(Some(Arc::new(move |_| {
        let Some(storage) = weak.upgrade() else { return };
        let point = storage.crash_point();
        for state in point.states(&Sampling { exhaustive_ops: 2, random: 6 }, 7) {
            let left = CrashImage::new(point.build(&state)).storage();
            let valid = headers(left.as_ref()).into_iter().flatten().max_by_key(|header| header.sequence_number);
            assert!(valid.is_some(), "no header is left: {}", state.describe(&point));
            OpenOptions::new().open(left, None).unwrap_or_else(|error| panic!("{error}\n{}", state.describe(&point)));
            *counted.lock().unwrap() += 1;
        }
    })));
    for session in 0..6_u64 {
        let image = open(&storage);
        image.write_at(&[session as u8; 512], session * MIB).unwrap();
        image.close().unwrap();
    }
    storage.set_observer(None);
    assert!(*looks.lock().unwrap() > 1000);
    let [Some(first), Some(second)] = headers(storage.as_ref()) else { panic!("a header is damaged") };
    assert_eq!(first.sequence_number.abs_diff(second.sequence_number), 1);
}

/// cloud-hypervisor #6890, #6905, #7665: queues that allocate at once got the same space, or lost entries of the BAT.
#[test]
fn cloud_hypervisor_6890_queues_that_allocate_at_once_get_their_own_space() {
    const QUEUES: u64 = 8;
    const BLOCKS: u64 = 64;
    let file = ImageBuilder::new(QUEUES * BLOCKS * MIB, 1 << 20).build().file;
    let storage: Arc<dyn Storage> = Arc::new(load(&file));
    let image = OpenOptions::new().write(true).open(Arc::clone(&storage), None).unwrap();
    std::thread::scope(|scope| {
        for queue in 0..QUEUES {
            let image = &image;
            scope.spawn(move || {
                for number in 0..BLOCKS {
                    // Neighbours in the BAT belong to different queues.
                    let block = number * QUEUES + queue;
                    image.write_at(&block.to_le_bytes().repeat(512), block * MIB + 4096 * queue).unwrap();
                    if number % 16 == queue {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    image.close().unwrap();
    drop(image);
    assert_clean("queues", &storage);
    let image = OpenOptions::new().open(storage, None).unwrap();
    for block in 0..QUEUES * BLOCKS {
        let mut bytes = vec![0; MIB as usize];
        image.read_at(&mut bytes, block * MIB).unwrap();
        let at = (block % QUEUES * 4096) as usize;
        assert!(bytes[at..at + 4096] == block.to_le_bytes().repeat(512), "block {block}");
        assert!(bytes[..at].iter().chain(&bytes[at + 4096..]).all(|byte| *byte == 0), "block {block}: the rest");
    }
}

/// cloud-hypervisor writes the whole BAT in place for each new block, DiscUtils the entry and the bitmap, both past the log.
#[test]
fn cloud_hypervisor_and_discutils_metadata_goes_through_the_log_page_by_page() {
    let base = Arc::new(ImageBuilder::new(8 << 30, 1 << 20).pattern_block(0, 1).named("base.vhdx").build());
    for with_parent in [false, true] {
        let builder = ImageBuilder::new(8 << 30, 1 << 20);
        let top = if with_parent { builder.differencing(&base) } else { builder }.build();
        let storage = sim(&top.file);
        let image = OpenOptions::new()
            .write(true)
            .parents(Arc::new(write_support::Parents(vec![Arc::new(load(&base.file)) as Arc<dyn Storage>])))
            .open(Arc::clone(&storage) as Arc<dyn Storage>, None)
            .unwrap();
        let (bat, log) = (top.layout.bat, top.layout.log);
        let bat = bat..bat + u64::from(top.layout.bat_length);
        let log = log..log + u64::from(top.layout.log_length);
        let seen = Arc::new(Mutex::new((false, false, BTreeSet::new())));
        let told = Arc::clone(&seen);
        storage.set_observer(Some(Arc::new(move |info| {
            let (logged, durable, pages) = &mut *told.lock().unwrap();
            match info.kind {
                OpKind::Write if log.contains(&info.range.start) => (*logged, *durable) = (true, false),
                OpKind::Sync => *durable = *logged,
                OpKind::Write if bat.contains(&info.range.start) => {
                    assert!(*durable, "{info}: no durable entry of the log");
                    pages.extend((info.range.start / 4096..info.range.end.div_ceil(4096)).map(|page| page * 4096));
                }
                _ => {}
            }
        })));
        for block in [1, 2, 700, 5000] {
            image.write_at(&[7; 512], block * MIB).unwrap();
            image.flush().unwrap();
        }
        image.close().unwrap();
        storage.set_observer(None);
        let pages = seen.lock().unwrap().2.len();
        assert!((3..=5).contains(&pages), "{pages} pages of the BAT were written for entries in three of them");
    }
}

/// DiscUtils never changes the data write GUID: a child takes a changed parent for the one that it was made from.
#[test]
fn discutils_every_session_that_changes_the_disk_has_a_new_data_write_guid() {
    let storage = sim(&ImageBuilder::new(16 * MIB, 1 << 20).build().file);
    let guid = || -> Guid {
        let newest = headers(storage.as_ref()).into_iter().flatten().max_by_key(|header| header.sequence_number);
        newest.unwrap().data_write_guid
    };
    let mut seen = vec![guid()];
    for session in 0..5_u64 {
        let image = open(&storage);
        image.write_at(&[session as u8 + 1; 512], 3 * MIB).unwrap();
        image.close().unwrap();
        assert!(!seen.contains(&guid()), "session {session}");
        seen.push(guid());
        open(&storage).close().unwrap();
        assert_eq!(seen.last(), Some(&guid()), "a session without a change");
    }
    let memory: MemoryStorage = load(&storage.pages().to_sparse());
    assert_clean("sessions", &(Arc::new(memory) as Arc<dyn Storage>));
}

/// Makes an image dirty by one entry.
fn with_entry(mut image: BuiltImage, change: impl FnOnce(LogEntrySpec) -> LogEntrySpec) -> BuiltImage {
    let guid = vhdkit_testkit::Guid::seeded(4321);
    let entry = change(LogEntrySpec::new(guid, 3, image.file.len()));
    LogRing::new(image.layout.log, image.layout.log_length).place(&mut image.file, &entry);
    for slot in 0..2 {
        edit_header(&mut image, slot, |header| header[48..64].copy_from_slice(&guid.0));
    }
    image
}

/// Replays in place; the disk is that of the model, the image is in order, and the file no shorter than it was.
fn replays_to(image: &BuiltImage, clean: &BuiltImage, what: &str) {
    let storage = sim(&image.file);
    let opened = open(&storage);
    assert!(opened.replay().unwrap().is_some(), "{what}");
    assert!(storage.len().unwrap() >= image.file.len(), "{what}: the file was shortened");
    let size = clean.model.virtual_size as usize;
    let mut bytes = vec![0; size];
    opened.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == clean.model.read(0, size), "{what}");
    opened.close().unwrap();
    drop(opened);
    let closed = open(&storage);
    closed.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == clean.model.read(0, size), "{what}, opened again");
    assert_clean(what, &(Arc::new(load(&storage.pages().to_sparse())) as Arc<dyn Storage>));
}

fn eight_blocks() -> BuiltImage {
    let builder = ImageBuilder::new(8 * MIB, 1 << 20);
    (0..8).fold(builder, |builder, block| builder.block(block, BlockSpec::present(Content::pattern(block)))).build()
}

/// vhdx-rs sets the length of the file to the last file offset, also where the file is longer.
#[test]
fn vhdx_rs_a_replay_in_place_never_shortens_the_file() {
    let clean = eight_blocks();
    let page = clean.file.read(clean.layout.bat, 4096);
    let mut image = with_entry(clean.clone(), |entry| {
        let entry = entry.descriptor(DescriptorSpec::data(clean.layout.bat, &page));
        entry.with(|entry| (entry.flushed_file_offset, entry.last_file_offset) = (4 * MIB, 4 * MIB))
    });
    image.file.zero(clean.layout.bat, 4096);
    replays_to(&image, &clean, "a last file offset that lies before the end");
}

/// vhdx-rs looks for the parts of an entry or of a run behind the end of the ring.
#[test]
fn vhdx_rs_what_wraps_is_replayed_in_place() {
    let clean = eight_blocks();
    let end = clean.layout.log_length;
    for back in [1, 2, 3, 5] {
        for (entries, supersede) in [(1, false), (4, true)] {
            let mut image = clean.clone();
            let plan = DirtyPlan::new(9).move_bat(&clean).move_metadata(&clean);
            plan.with(|plan| (plan.ring_start, plan.entries, plan.supersede) = (end - back * 4096, entries, supersede))
                .apply(&mut image);
            replays_to(&image, &clean, &format!("{entries} entries from {back} sectors before the end"));
        }
    }
}

/// vhdx-rs applies the zeros of an entry after its pages, whatever their order.
#[test]
fn vhdx_rs_descriptors_are_replayed_in_place_in_their_order() {
    let clean = eight_blocks();
    let (bat, page) = (clean.layout.bat, clean.file.read(clean.layout.bat, 4096));
    let junk = vec![0xEE; 4096];
    let (zero, right, wrong) =
        (DescriptorSpec::zero(bat, 4096), DescriptorSpec::data(bat, &page), DescriptorSpec::data(bat, &junk));
    for before in [vec![zero.clone()], vec![wrong.clone()], vec![wrong, zero]] {
        let mut image = with_entry(clean.clone(), |entry| {
            before.iter().cloned().chain([right.clone()]).fold(entry, LogEntrySpec::descriptor)
        });
        image.file.zero(bat, 4096);
        replays_to(&image, &clean, &format!("{} descriptors before the right one", before.len()));
    }
}
