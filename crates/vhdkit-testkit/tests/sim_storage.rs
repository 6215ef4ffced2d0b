//! The simulated storage behaves as storage, and knows exactly what a power cut can leave of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::sim::{CrashPoint, Fault, FaultError, OpInfo, OpKind, PageMap, Sampling, SimStorage, State, Tear};
use vhdkit_testkit::storage_suite;

const EXHAUSTIVE: Sampling = Sampling { exhaustive_ops: 10, random: 0 };

/// A durable file of `length` bytes of `fill`.
fn filled(length: usize, fill: u8) -> SimStorage {
    let mut pages = PageMap::new();
    pages.write(0, &vec![fill; length]);
    SimStorage::from_pages(pages)
}

fn bytes(map: &PageMap) -> Vec<u8> {
    let mut bytes = vec![0; map.len() as usize];
    map.read(0, &mut bytes);
    bytes
}

/// The first byte of each sector: enough where sectors are filled evenly.
fn sectors(map: &PageMap) -> Vec<u8> {
    let bytes = bytes(map);
    assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])), "a sector is atomic");
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

fn images(point: &CrashPoint, sampling: &Sampling) -> BTreeSet<Vec<u8>> {
    point.states(sampling, 7).iter().map(|state| sectors(&point.build(state))).collect()
}

#[test]
fn the_simulated_storage_passes_the_storage_suite() {
    storage_suite::run(|| Arc::new(SimStorage::new()));
}

#[test]
fn a_sync_leaves_one_state_and_reads_see_everything_before_it() {
    let storage = filled(4096, 1);
    storage.write_at(&[2; 1024], 512).unwrap();
    let mut read = [0; 4];
    storage.read_at(&mut read, 1534).unwrap();
    assert_eq!(read, [2, 2, 1, 1]);
    assert!(storage.crash_point().states(&EXHAUSTIVE, 1).len() > 1);
    storage.sync().unwrap();
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE), BTreeSet::from([vec![1, 2, 2, 1, 1, 1, 1, 1]]));
    assert_eq!((storage.counts().of(OpKind::Write), storage.counts().syncs()), (1, 1));
}

#[test]
fn two_writes_of_one_sector_leave_exactly_four_states() {
    let storage = filled(1024, 0);
    storage.set_len(1024).unwrap();
    storage.sync().unwrap();
    storage.write_at(&[1; 512], 0).unwrap();
    storage.write_at(&[2; 512], 512).unwrap();
    let wanted = [vec![0, 0], vec![1, 0], vec![0, 2], vec![1, 2]];
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE), BTreeSet::from(wanted));
}

#[test]
fn a_page_is_torn_in_all_26_ways() {
    let storage = filled(4096, 1);
    storage.write_at(&[2; 4096], 0).unwrap();
    // Nothing, everything, and the tears.
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE).len(), 28);
}

#[test]
fn the_older_write_may_win_sector_by_sector() {
    let storage = filled(1024, 0);
    storage.write_at(&[1; 1024], 0).unwrap();
    storage.write_at(&[2; 1024], 0).unwrap();
    let found = images(&storage.crash_point(), &EXHAUSTIVE);
    let all: BTreeSet<Vec<u8>> = (0..3).flat_map(|a| (0..3).map(move |b| vec![a, b])).collect();
    assert_eq!(found, all);
}

#[test]
fn growth_is_lost_or_kept_whatever_becomes_of_the_bytes() {
    let storage = filled(512, 1);
    storage.write_at(&[2; 512], 512).unwrap();
    let wanted = [vec![1], vec![1, 0], vec![1, 2]];
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE), BTreeSet::from(wanted));
    storage.sync().unwrap();
    storage.set_len(1536).unwrap();
    storage.write_at(&[3; 512], 0).unwrap();
    let wanted = [vec![1, 2], vec![3, 2], vec![1, 2, 0], vec![3, 2, 0]];
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE), BTreeSet::from(wanted));
}

#[test]
fn a_growing_write_may_leave_a_length_inside_of_it() {
    let storage = filled(512, 1);
    storage.write_at(&[2; 16384], 512).unwrap();
    let lengths: BTreeSet<usize> = images(&storage.crash_point(), &EXHAUSTIVE).iter().map(Vec::len).collect();
    assert_eq!(lengths, BTreeSet::from([1, 8, 24, 33]), "in sectors: durable, first page, middle, all");
}

#[test]
fn cutting_off_and_growing_again_may_lose_either() {
    let storage = filled(1024, 1);
    storage.set_len(512).unwrap();
    storage.set_len(1024).unwrap();
    let wanted = [vec![1, 1], vec![1], vec![1, 0]];
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE), BTreeSet::from(wanted));
}

#[test]
fn holes_and_zeros_are_torn_like_writes() {
    for punch in [true, false] {
        let storage = filled(2048, 1);
        if punch {
            assert!(storage.punch_hole(512..1536).unwrap());
        } else {
            storage.zero_range(512..1536).unwrap();
        }
        let wanted = [vec![1, 1, 1, 1], vec![1, 0, 1, 1], vec![1, 1, 0, 1], vec![1, 0, 0, 1]];
        assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE), BTreeSet::from(wanted));
    }
}

#[test]
fn the_number_of_states_of_small_windows_is_known() {
    let storage = filled(64 << 10, 1);
    for count in 1..=10_u32 {
        storage.write_at(&[count as u8 + 1; 512], u64::from(count) * 512).unwrap();
        let states = storage.crash_point().states(&EXHAUSTIVE, 1);
        assert_eq!(states.len(), 1 << count, "single sectors cannot be torn");
        let distinct: BTreeSet<u64> =
            states.iter().map(|state| storage.crash_point().build(state).content_hash()).collect();
        assert_eq!(distinct.len(), 1 << count);
    }
    storage.write_at(&[99; 512], 0).unwrap();
    let states = storage.crash_point().states(&Sampling { random: 50, ..EXHAUSTIVE }, 1);
    assert_eq!(states.len(), 2 + 2 * 11 + 50, "beyond the bound: nothing, everything, each, all but each, random");
}

#[test]
fn a_sample_has_torn_states_lost_lengths_and_wrong_orders() {
    let storage = filled(4096, 1);
    for number in 0..20 {
        storage.write_at(&[number + 2; 2048], 1024 * u64::from(number)).unwrap();
    }
    let point = storage.crash_point();
    let states = point.states(&Sampling { exhaustive_ops: 3, random: 500 }, 5);
    let count = |what: &dyn Fn(&State) -> bool| states.iter().filter(|state| what(state)).count();
    let torn = |state: &State| state.pieces().iter().any(|(_, tear)| *tear != Tear::Whole);
    let reordered = |state: &State| !state.pieces().is_sorted_by_key(|(number, _)| *number);
    let cut = |state: &State| {
        let ends = state.pieces().iter().map(|(number, _)| point.pending()[*number].changes().end);
        ends.max().is_some_and(|end| end > state.length())
    };
    assert!(count(&torn) > 100 && count(&reordered) > 50 && count(&cut) > 50);
    let distinct: BTreeSet<u64> = states.iter().map(|state| point.build(state).content_hash()).collect();
    assert!(distinct.len() > 400, "{}", distinct.len());
    assert_eq!(point.states(&EXHAUSTIVE, 5), point.states(&EXHAUSTIVE, 5), "the same seed, the same sample");
}

#[test]
fn a_description_makes_the_same_image_again() {
    let storage = filled(8192, 1);
    storage.write_at(&[2; 4096], 100).unwrap();
    storage.set_len(20_000).unwrap();
    storage.punch_hole(0..5000).unwrap();
    storage.write_at(&[3; 30_000], 6000).unwrap();
    storage.zero_range(9000..12_000).unwrap();
    storage.set_len(7000).unwrap();
    let point = storage.crash_point().with_id(12);
    let states = point.states(&Sampling { exhaustive_ops: 10, random: 300 }, 9);
    assert!(states.len() > 1000);
    for state in &states {
        let again: State = state.to_string().parse().unwrap();
        assert_eq!(again, *state);
        assert!(bytes(&again.replay(&point)) == bytes(&point.build(state)), "{}", state.describe(&point));
    }
    let text = states[states.len() - 1].describe(&point);
    assert!(text.starts_with("point 12 length 0x") && text.contains("SetLen") && text.lines().count() == 8, "{text}");
}

#[test]
fn hooks_run_before_operations_without_lock_and_never_inside_themselves() {
    let storage = Arc::new(filled(4096, 1));
    let (seen, observed) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU64::new(0)));
    let (inner, list) = (Arc::clone(&storage), Arc::clone(&seen));
    storage.set_hook(Some(Arc::new(move |info: &OpInfo| {
        list.lock().unwrap().push((info.number, info.kind, info.after));
        if info.kind == OpKind::Sync && !info.after {
            inner.write_at(&[9; 512], 512).unwrap(); // calls no hook, and comes too late for this sync
        }
    })));
    let counter = Arc::clone(&observed);
    storage.set_observer(Some(Arc::new(move |_: &OpInfo| {
        counter.fetch_add(1, Ordering::Relaxed);
    })));
    storage.write_at(&[2; 512], 0).unwrap();
    storage.sync().unwrap();
    let wanted = [(1, OpKind::Write, false), (2, OpKind::Sync, false), (2, OpKind::Sync, true)];
    assert_eq!(*seen.lock().unwrap(), wanted);
    assert_eq!(observed.load(Ordering::Relaxed), 4, "the observer sees the nested write too");
    assert_eq!(sectors(&storage.durable_pages())[..3], [2, 1, 1]);
    assert_eq!((storage.pending(), sectors(&storage.pages())[1]), (1, 9));
    storage.set_hook(None);
    storage.sync().unwrap();
    assert_eq!(sectors(&storage.durable_pages())[..3], [2, 9, 1]);
    // A hook of one storage does not silence that of another.
    let other = Arc::new(filled(512, 0));
    let calls = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&calls);
    other.set_hook(Some(Arc::new(move |_: &OpInfo| {
        counter.fetch_add(1, Ordering::Relaxed);
    })));
    let target = Arc::clone(&other);
    storage.set_hook(Some(Arc::new(move |_: &OpInfo| target.write_at(&[1; 512], 0).unwrap())));
    storage.write_at(&[2; 512], 0).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[test]
fn phases_are_told_and_counted() {
    thread_local!(static PHASE: std::cell::Cell<&'static str> = const { std::cell::Cell::new("start") });
    let storage = filled(512, 0).with_phase_source(|| PHASE.get());
    let seen: Arc<Mutex<BTreeMap<&str, u64>>> = Arc::default();
    let counts = Arc::clone(&seen);
    storage
        .set_observer(Some(Arc::new(move |info: &OpInfo| *counts.lock().unwrap().entry(info.phase).or_default() += 1)));
    storage.write_at(&[1], 0).unwrap();
    PHASE.set("log");
    storage.write_at(&[1], 0).unwrap();
    storage.sync().unwrap();
    assert_eq!(*seen.lock().unwrap(), BTreeMap::from([("start", 1), ("log", 3)]));
}

#[test]
fn faults_strike_once_or_for_good_and_may_leave_a_part() {
    let storage = filled(4096, 1);
    storage.set_fault(Some(Fault::nth(2, FaultError::EIO).only(&[OpKind::Write]).after_sectors(2)));
    storage.write_at(&[2; 512], 0).unwrap();
    storage.sync().unwrap();
    assert!(!storage.fault_struck());
    assert_eq!(storage.write_at(&[3; 2048], 1024).unwrap_err().raw_os_error(), Some(5));
    assert!(storage.fault_struck());
    assert_eq!(sectors(&storage.pages()), [2, 1, 3, 3, 1, 1, 1, 1]);
    assert_eq!(sectors(&storage.durable_pages()), [2, 1, 1, 1, 1, 1, 1, 1]);
    storage.write_at(&[4; 512], 0).unwrap();
    storage.set_fault(Some(Fault::nth(1, FaultError::ENOSPC).persistent()));
    for _ in 0..3 {
        assert_eq!(storage.set_len(9000).unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(storage.punch_hole(0..512).unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(storage.sync().unwrap_err().kind(), ErrorKind::StorageFull);
    }
    assert_eq!(storage.len().unwrap(), 4096);
    storage.read_at(&mut [0], 0).unwrap();
    storage.set_fault(Some(Fault::nth(1, FaultError::Kind(ErrorKind::TimedOut)).only(&[OpKind::Read])));
    assert_eq!(storage.read_at(&mut [0], 0).unwrap_err().kind(), ErrorKind::TimedOut);
    storage.read_at(&mut [0], 0).unwrap();
}

#[test]
fn a_failed_sync_may_lose_for_good_what_the_next_one_confirms() {
    let mut lost = 0;
    for seed in 0..20 {
        let storage = filled(4096, 1);
        storage.set_fault(Some(Fault::nth(1, FaultError::EIO).only(&[OpKind::Sync]).sync_loses(seed)));
        storage.write_at(&[2; 4096], 0).unwrap();
        storage.sync().unwrap_err();
        storage.write_at(&[3; 512], 0).unwrap();
        storage.sync().unwrap();
        assert_eq!(sectors(&storage.pages()), [3, 2, 2, 2, 2, 2, 2, 2], "reads see it");
        let durable = sectors(&storage.durable_pages());
        assert_eq!(durable[0], 3, "what was written after the failure is durable");
        lost += u32::from(durable[1..].contains(&1));
    }
    assert!((3..20).contains(&lost), "{lost}");
}

#[test]
fn clones_and_copies_are_data_that_a_cut_can_lose() {
    let source = MemoryStorage::from_bytes(vec![5; 8192]);
    let storage = filled(8192, 1);
    assert!(storage.clone_range(&source, 0, 4096, 4096).unwrap());
    assert!(!storage.clone_range(&source, 512, 4096, 4096).unwrap(), "not aligned");
    assert_eq!(storage.copy_range(&source, 7680, 0, 4096).unwrap(), 512);
    assert_eq!(sectors(&storage.pages())[..9], [5, 1, 1, 1, 1, 1, 1, 1, 5]);
    assert_eq!(images(&storage.crash_point(), &EXHAUSTIVE).len(), 2 * 28);
}

#[test]
fn a_full_file_system_refuses_new_pages_only() {
    let storage = filled(8192, 1);
    storage.set_len(1 << 20).unwrap();
    storage.set_capacity(Some(3));
    storage.write_at(&[2; 4096], 16384).unwrap();
    assert_eq!(storage.write_at(&[3; 8192], 4096).unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(sectors(&storage.pages())[8], 1, "nothing was done");
    storage.write_at(&[4; 8192], 0).unwrap();
    assert!(storage.punch_hole(0..4096).unwrap());
    storage.write_at(&[5; 4096], 8192).unwrap();
    storage.set_capacity(None);
    storage.write_at(&[6; 4096], 32768).unwrap();
}

#[test]
fn read_hooks_run_before_reads_alone_and_what_they_write_is_read() {
    let storage = Arc::new(filled(4096, 1));
    let (inner, observed) = (Arc::clone(&storage), Arc::new(AtomicU64::new(0)));
    storage.set_read_hook(Some(Arc::new(move |info: &OpInfo| {
        assert_eq!((info.kind, info.range.clone(), info.after), (OpKind::Read, 512..1024, false));
        let mut sector = [0; 512];
        inner.read_at(&mut sector, 0).unwrap(); // calls no hook
        inner.write_at(&[sector[0] + 6; 512], 512).unwrap();
    })));
    let counter = Arc::clone(&observed);
    storage.set_observer(Some(Arc::new(move |_: &OpInfo| {
        counter.fetch_add(1, Ordering::Relaxed);
    })));
    let mut sector = [0; 512];
    storage.read_at(&mut sector, 512).unwrap();
    assert_eq!(sector, [7; 512]);
    assert_eq!(observed.load(Ordering::Relaxed), 1, "the write, and no read");
    storage.write_at(&[2; 512], 0).unwrap();
    assert_eq!(storage.counts().operations(), 2);
}
