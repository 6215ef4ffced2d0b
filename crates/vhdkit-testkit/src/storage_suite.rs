//! What every `Storage` must do, whatever it is made of.
//!
//! [`run`] panics with a message at the first thing that is wrong. Storage of a fixed length (a block device) is found
//! out by trying to empty it; it must have [`FIXED_BYTES_MIN`] bytes, and is overwritten.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;

use vhdkit::storage::Storage;

/// The bytes that storage of a fixed length needs for the suite.
pub const FIXED_BYTES_MIN: u64 = 8 << 20;

/// Positions just before, at and after the ends of everything that storage is likely to be divided by.
const EDGES: &[u64] = &[0, 1, 511, 512, 4095, 4096, 4097, 65535, 65536, 65537, 131_071, 262_144, 1 << 20];

/// Runs all of the suite. `make` gives storage that nobody else uses; it may hold anything.
pub fn run(make: impl Fn() -> Arc<dyn Storage>) {
    let cases: &[(&str, Case)] = &[
        ("exact reads and writes at odd offsets", odd_offsets),
        ("the end", the_end),
        ("positions that no file has", far_positions),
        ("growing", growing),
        ("shrinking and growing again", shrinking),
        ("zeroing", zeroing),
        ("zeroing past the end", zeroing_past_the_end),
        ("punching holes", punching),
        ("allocating", allocating),
        ("finding data", finding_data),
        ("cloning and copying", cloning_and_copying),
        ("threads that write and read", threads),
        ("threads that grow", growing_threads),
        ("identity", identity),
        ("random programs", random_programs),
    ];
    for (name, case) in cases {
        println!("storage suite: {name}");
        case(&Subject { make: &make });
    }
}

/// One part of the suite.
type Case = fn(&Subject<'_>);

/// What is tested.
struct Subject<'a> {
    make: &'a dyn Fn() -> Arc<dyn Storage>,
}

impl Subject<'_> {
    /// Storage of `len` zeros (of a fixed length: with as many zeros at its start).
    fn zeros(&self, len: u64) -> Arc<dyn Storage> {
        let storage = (self.make)();
        storage.set_len(0).expect("an empty file");
        if is_fixed(&*storage) {
            assert!(storage.len().unwrap() >= FIXED_BYTES_MIN, "too small for this suite");
        }
        storage.set_len(len).expect("a longer file");
        storage.zero_range(0..len).expect("zeros");
        assert!(storage.len().unwrap() == len || is_fixed(&*storage));
        check(&*storage, 0, &vec![0; len as usize], "after zero_range");
        storage
    }
}

/// Whether the storage, just emptied, could not be.
fn is_fixed(storage: &dyn Storage) -> bool {
    let len = storage.len().unwrap();
    let fixed = len >= FIXED_BYTES_MIN && {
        storage.set_len(len - 1).unwrap();
        storage.len().unwrap() == len
    };
    assert!(!(fixed && storage.growth_reads_zero()), "what does not grow cannot promise what growth reads as");
    fixed
}

/// Bytes that are never zero, and differ for each seed.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length).map(|_| next_random(&mut state) as u8 | 1).collect()
}

/// The xorshift generator: good enough, and the same everywhere.
fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 8
}

fn read(storage: &dyn Storage, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0xEE; (range.end - range.start) as usize];
    storage.read_at(&mut bytes, range.start).unwrap_or_else(|error| panic!("read of {range:?}: {error}"));
    bytes
}

/// Compares, and tells the first difference instead of megabytes.
fn check(storage: &dyn Storage, offset: u64, wanted: &[u8], when: &str) {
    let got = read(storage, offset..offset + wanted.len() as u64);
    if got != wanted {
        let at = (0..wanted.len()).find(|&at| got[at] != wanted[at]).unwrap();
        panic!("{when}: byte {:#x} is {:#04x}, not {:#04x}", offset + at as u64, got[at], wanted[at]);
    }
}

fn odd_offsets(subject: &Subject<'_>) {
    const LENGTH: usize = 2 << 20;
    let storage = subject.zeros(LENGTH as u64);
    let mut model = vec![0; LENGTH];
    for (seed, &offset) in (1..).zip(EDGES) {
        for length in [1, 3, 513, 4096, 70_001] {
            let bytes = pattern(length, seed + length as u64);
            storage.write_at(&bytes, offset).expect("a write inside");
            model[offset as usize..offset as usize + length].copy_from_slice(&bytes);
            check(&*storage, offset, &bytes, "what was just written");
        }
    }
    check(&*storage, 0, &model, "everything");
    for &offset in EDGES {
        check(&*storage, offset, &model[offset as usize..offset as usize + 100_003], "in pieces");
    }
    storage.sync().expect("a sync");
    check(&*storage, 0, &model, "after a sync");
}

fn the_end(subject: &Subject<'_>) {
    let storage = subject.zeros(70_001);
    let len = storage.len().unwrap();
    assert_eq!(storage.is_empty().unwrap(), len == 0);
    let fails = |offset: u64, length: usize| {
        let error = storage.read_at(&mut vec![0; length], offset).expect_err("a read past the end");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "a read of {length} bytes at {offset:#x}");
    };
    storage.read_at(&mut [0; 5], len - 5).expect("the last bytes");
    fails(len - 5, 6);
    fails(len - 70_000, 70_001);
    fails(len, 1);
    fails(len + 1, 1);
    fails(len + (1 << 40), 4096);
    for offset in [0, len, len + 1, u64::MAX] {
        storage.read_at(&mut [], offset).expect("an empty read");
        storage.write_at(&[], offset).expect("an empty write");
    }
    assert_eq!(storage.len().unwrap(), len, "empty writes change nothing");
}

fn far_positions(subject: &Subject<'_>) {
    let storage = subject.zeros(4096);
    let len = storage.len().unwrap();
    storage.write_at(b"still here", 0).unwrap();
    const LAST: u64 = i64::MAX as u64;
    for offset in [LAST - 1, LAST, LAST + 1, u64::MAX - 4096, u64::MAX - 1, u64::MAX] {
        let error = storage.read_at(&mut [0; 4], offset).expect_err("a read where no file reaches");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "a read at {offset:#x}");
        storage.write_at(&[1; 4], offset).expect_err("a write where no file reaches");
        assert_eq!(storage.next_data(offset..u64::MAX).unwrap(), None, "data at {offset:#x}");
        let _ = storage.punch_hole(offset..u64::MAX);
        if offset < u64::MAX {
            storage.zero_range(offset..u64::MAX).expect_err("zeros where no file reaches");
            assert!(!storage.allocate(offset..u64::MAX).unwrap_or(false), "space at {offset:#x}");
        }
    }
    storage.set_len(u64::MAX).expect_err("a length that no file has");
    storage.set_len(LAST + 1).expect_err("a length that no file has");
    assert_eq!(storage.len().unwrap(), len);
    check(&*storage, 0, b"still here", "after all that");
    let _ = storage.punch_hole(4000..u64::MAX);
    assert_eq!(storage.len().unwrap(), len);
}

fn growing(subject: &Subject<'_>) {
    let storage = subject.zeros(0);
    if storage.len().unwrap() != 0 {
        return;
    }
    storage.write_at(b"abc", 0).unwrap();
    assert_eq!(storage.len().unwrap(), 3);
    storage.set_len(100_001).unwrap();
    assert_eq!(storage.len().unwrap(), 100_001);
    storage.write_at(b"xyz", 300_001).unwrap();
    assert_eq!(storage.len().unwrap(), 300_004);
    check(&*storage, 0, b"abc", "the start");
    check(&*storage, 300_001, b"xyz", "past the old end");
    if !storage.growth_reads_zero() {
        storage.zero_range(3..300_001).unwrap();
    }
    check(&*storage, 3, &vec![0; 299_998], "the space between");
    check(&*storage, 0, b"abc", "the start");
    check(&*storage, 300_001, b"xyz", "past the old end");
}

fn shrinking(subject: &Subject<'_>) {
    let storage = subject.zeros(0);
    if storage.len().unwrap() != 0 {
        return;
    }
    let bytes = pattern(300_000, 7);
    for keep in [131_073_u64, 131_072, 65_537, 65_536, 4097, 4096, 1, 0] {
        storage.write_at(&bytes, 0).unwrap();
        storage.set_len(keep).unwrap();
        assert_eq!(storage.len().unwrap(), keep);
        check(&*storage, 0, &bytes[..keep as usize], "what was kept");
        let error = storage.read_at(&mut [0], keep).expect_err("a read past the new end");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(storage.next_data(keep..keep + 100_000).unwrap(), None, "data past the end");
        storage.set_len(300_000).unwrap();
        if storage.growth_reads_zero() {
            check(&*storage, keep, &vec![0; 300_000 - keep as usize], "what was cut off");
        }
        check(&*storage, 0, &bytes[..keep as usize], "what was kept");
    }
}

/// Ranges with edges of all kinds, inside the first MiB.
fn ranges() -> impl Iterator<Item = Range<u64>> {
    EDGES.iter().flat_map(|&start| EDGES.iter().map(move |&end| start..end)).filter(|range| range.end < 1 << 20)
}

fn zeroing(subject: &Subject<'_>) {
    const LENGTH: usize = 1 << 20;
    let storage = subject.zeros(LENGTH as u64);
    let len = storage.len().unwrap();
    let bytes = pattern(LENGTH, 3);
    for range in ranges() {
        storage.write_at(&bytes, 0).unwrap();
        storage.zero_range(range.clone()).unwrap_or_else(|error| panic!("zeroing {range:?}: {error}"));
        let mut model = bytes.clone();
        if !range.is_empty() {
            model[range.start as usize..range.end as usize].fill(0);
        }
        check(&*storage, 0, &model, &format!("after zeroing {range:?}"));
        assert_eq!(storage.len().unwrap(), len);
    }
}

fn zeroing_past_the_end(subject: &Subject<'_>) {
    for (old, range) in
        [(0, 0..1), (0, 0..70_000), (5, 3..9), (5000, 4096..8192), (100, 5000..6001), (65_536, 65_536..131_073)]
    {
        let storage = subject.zeros(0);
        if storage.len().unwrap() != 0 {
            let end = storage.len().unwrap();
            storage.zero_range(end - 4097..end + 1).expect_err("zeros past the end of a device");
            return;
        }
        let bytes = pattern(old as usize, 11);
        storage.write_at(&bytes, 0).unwrap();
        storage.zero_range(range.clone()).unwrap();
        assert_eq!(storage.len().unwrap(), range.end, "the length after zeroing {range:?} of {old}");
        check(&*storage, range.start, &vec![0; (range.end - range.start) as usize], "what was zeroed");
        let kept = old.min(range.start);
        check(&*storage, 0, &bytes[..kept as usize], "before it");
        if storage.growth_reads_zero() && range.start > old {
            check(&*storage, old, &vec![0; (range.start - old) as usize], "the space between");
        }
    }
}

fn punching(subject: &Subject<'_>) {
    const LENGTH: usize = 1 << 20;
    let storage = subject.zeros(LENGTH as u64);
    let len = storage.len().unwrap();
    let bytes = pattern(LENGTH, 5);
    for range in ranges().chain([(LENGTH as u64 - 9000)..len + 9000, len..len + 4096, len + 5..len + 9]) {
        storage.write_at(&bytes, 0).unwrap();
        let done = storage.punch_hole(range.clone()).unwrap_or_else(|error| panic!("punching {range:?}: {error}"));
        let mut model = bytes.clone();
        if done && !range.is_empty() && range.start < LENGTH as u64 {
            model[range.start as usize..LENGTH.min(range.end as usize)].fill(0);
        }
        check(&*storage, 0, &model, &format!("after punching {range:?}, which was {done}"));
        assert_eq!(storage.len().unwrap(), len, "the length stays");
        walk(&*storage, 0..LENGTH as u64);
    }
}

fn allocating(subject: &Subject<'_>) {
    let storage = subject.zeros(10_000);
    let len = storage.len().unwrap();
    let bytes = pattern(10_000, 13);
    storage.write_at(&bytes, 0).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    for range in [7..7, 9..3] {
        storage.allocate(range).unwrap();
        assert_eq!(storage.len().unwrap(), len);
    }
    let done = storage.allocate(5000..50_001).unwrap();
    check(&*storage, 0, &bytes, "after allocating");
    if done {
        assert_eq!(storage.len().unwrap(), 50_001.max(len));
        if storage.growth_reads_zero() {
            check(&*storage, 10_000, &[0; 40_001], "what was allocated");
        }
        storage.allocate(0..100).unwrap();
        assert_eq!(storage.len().unwrap(), 50_001.max(len), "allocating inside does not shrink");
    } else {
        assert_eq!(storage.len().unwrap(), len, "nothing changed");
    }
}

/// Goes through all the data of a range: everything else must read as zero.
fn walk(storage: &dyn Storage, range: Range<u64>) -> Vec<Range<u64>> {
    let (mut position, mut found) = (range.start, Vec::new());
    let end = range.end.min(storage.len().unwrap());
    let hole = |hole: Range<u64>| {
        let zeros = vec![0; hole.end.saturating_sub(hole.start) as usize];
        if !zeros.is_empty() {
            check(storage, hole.start, &zeros, "inside what was said to be a hole");
        }
    };
    while position < range.end {
        let Some(data) = storage.next_data(position..range.end).unwrap() else { break };
        assert!(position <= data.start && data.start < data.end && data.end <= end, "{data:?} in {position}..{end}");
        hole(position..data.start);
        position = data.end;
        found.push(data);
    }
    hole(position..end);
    found
}

fn finding_data(subject: &Subject<'_>) {
    const LENGTH: u64 = 4 << 20;
    let storage = subject.zeros(LENGTH);
    for (seed, offset) in (1..).zip([100, 65_530, 1 << 20, (1 << 20) + 70_000, (2 << 20) - 1, LENGTH - 1]) {
        let length = (LENGTH - offset).min(seed * 7) as usize;
        storage.write_at(&pattern(length, seed), offset).unwrap();
    }
    let whole = walk(&*storage, 0..LENGTH);
    assert!(!whole.is_empty());
    for start in [0, 1, 99, 100, 101, 4096, 65_529, 65_536, 65_537, 1 << 20, (1 << 20) + 1, LENGTH - 1] {
        for length in [1, 2, 4096, 100_000, 1 << 20] {
            let found = walk(&*storage, start..(start + length).min(LENGTH));
            let bytes = read(&*storage, start..(start + length).min(LENGTH));
            assert_eq!(found.is_empty(), found.is_empty() && bytes.iter().all(|&byte| byte == 0));
        }
    }
    let len = storage.len().unwrap();
    assert_eq!(storage.next_data(len..len + 10).unwrap(), None, "past the end");
    assert_eq!(storage.next_data(len + 1..u64::MAX).unwrap(), None, "past the end");
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    for range in [100..100, 101..100] {
        assert_eq!(storage.next_data(range).unwrap(), None, "an empty range");
    }
    walk(&*storage, LENGTH - 5000..len + 4096);
}

fn cloning_and_copying(subject: &Subject<'_>) {
    const LENGTH: usize = 256 << 10;
    let target = subject.zeros(LENGTH as u64);
    if is_fixed(&*target) {
        return; // the other one would be the same device
    }
    let source = subject.zeros(LENGTH as u64);
    let (bytes, old) = (pattern(LENGTH, 17), pattern(LENGTH, 19));
    source.write_at(&bytes, 0).unwrap();
    for (from, to, length) in [(0, 0, LENGTH), (65_536, 131_072, 65_536), (1, 2, 3), (4096, 0, 5000), (9, 9, 0)] {
        let (from_u, to_u, end) = (from as u64, to as u64, to + length);
        target.write_at(&old, 0).unwrap();
        let mut model = old.clone();
        if target.clone_range(&*source, from_u, to_u, length as u64).unwrap() {
            model[to..end].copy_from_slice(&bytes[from..from + length]);
        }
        check(&*target, 0, &model, "after cloning");
        target.write_at(&old, 0).unwrap();
        let copied = target.copy_range(&*source, from_u, to_u, length as u64).unwrap() as usize;
        assert!(copied <= length);
        model = old.clone();
        model[to..to + copied].copy_from_slice(&bytes[from..from + copied]);
        check(&*target, 0, &model, "after copying");
    }
    let copied = target.copy_range(&*source, LENGTH as u64 - 10, 0, 100).unwrap();
    assert!(copied <= 10, "{copied} bytes copied from 10");
    check(&*source, 0, &bytes, "the source");
}

fn threads(subject: &Subject<'_>) {
    const SLOT: u64 = 12_347; // so that neighbours share pages
    const THREADS: u64 = 8;
    let storage = subject.zeros(SLOT * THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let storage = &*storage;
            scope.spawn(move || {
                let offset = thread * SLOT;
                for round in 0..40 {
                    let bytes = pattern(SLOT as usize, thread * 1000 + round);
                    storage.write_at(&bytes, offset).unwrap();
                    check(storage, offset, &bytes, "what this thread wrote");
                    storage.zero_range(offset + 10..offset + 5000).unwrap();
                    check(storage, offset + 10, &[0; 4990], "what this thread zeroed");
                    check(storage, offset, &bytes[..10], "before it");
                    check(storage, offset + 5000, &bytes[5000..], "behind it");
                    walk(storage, offset + 10..offset + 5000);
                }
            });
        }
    });
    for thread in 0..THREADS {
        check(&*storage, thread * SLOT + 5000, &pattern(SLOT as usize, thread * 1000 + 39)[5000..], "at the end");
    }
}

fn growing_threads(subject: &Subject<'_>) {
    const SLOT: u64 = 4099;
    const THREADS: u64 = 6;
    const ROUNDS: u64 = 50;
    let storage = subject.zeros(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let storage = &*storage;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let offset = (round * THREADS + thread) * SLOT;
                    if thread.is_multiple_of(2) {
                        storage.write_at(&pattern(SLOT as usize, offset), offset).unwrap();
                    } else {
                        storage.zero_range(offset..offset + SLOT).unwrap();
                    }
                }
            });
        }
    });
    for slot in 0..THREADS * ROUNDS {
        let wanted = if (slot % THREADS).is_multiple_of(2) {
            pattern(SLOT as usize, slot * SLOT)
        } else {
            vec![0; SLOT as usize]
        };
        check(&*storage, slot * SLOT, &wanted, "after growing from many threads");
    }
}

fn identity(subject: &Subject<'_>) {
    let first = subject.zeros(0);
    assert_eq!(first.identity(), first.identity());
    if !is_fixed(&*first) {
        let second = subject.zeros(0);
        assert!(first.identity().is_none() || first.identity() != second.identity(), "{:?}", first.identity());
    }
}

fn random_programs(subject: &Subject<'_>) {
    for seed in 1..=8 {
        let storage = subject.zeros(200_000);
        random_program(&*storage, vec![0; 200_000], seed, 100);
    }
}

/// How far random programs reach.
const SPACE: u64 = 300_000;

/// Runs random operations on storage that holds `initial` at its start, and compares with a model after each.
pub fn random_program(storage: &dyn Storage, initial: Vec<u8>, seed: u64, steps: u32) {
    let fixed = is_fixed(storage);
    let mut model =
        Model { bytes: initial.into_iter().map(Some).collect(), growth: storage.growth_reads_zero().then_some(0) };
    if fixed {
        model.bytes.resize(SPACE as usize, None);
    } else {
        storage.set_len(model.bytes.len() as u64).unwrap();
    }
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    for step in 0..steps {
        let range = random_range(&mut state);
        let operation = match next_random(&mut state) % 8 {
            6 if fixed => 7, // it does not shrink
            operation => operation,
        };
        random_step(storage, &mut model, operation, range, seed + u64::from(step));
        compare(storage, &model.bytes, fixed, &format!("seed {seed}, step {step}"));
    }
}

/// What storage must hold.
struct Model {
    /// `None` where growth may have put anything.
    bytes: Vec<Option<u8>>,
    /// What growth adds.
    growth: Option<u8>,
}

impl Model {
    fn grow(&mut self, end: u64) {
        if (self.bytes.len() as u64) < end {
            self.bytes.resize(end as usize, self.growth);
        }
    }

    fn inside(&mut self, range: &Range<u64>) -> &mut [Option<u8>] {
        let len = self.bytes.len();
        &mut self.bytes[len.min(range.start as usize)..len.min(range.end as usize)]
    }
}

fn random_range(state: &mut u64) -> Range<u64> {
    let start = next_random(state) % SPACE;
    let length = match next_random(state) % 4 {
        0 => next_random(state) % 10,
        1 => next_random(state) % 5000,
        2 => 4096 * (next_random(state) % 40),
        _ => next_random(state) % SPACE,
    };
    let start = if next_random(state).is_multiple_of(3) { start & !4095 } else { start };
    start..(start + length).min(SPACE)
}

/// One operation, on the storage and on the model.
fn random_step(storage: &dyn Storage, model: &mut Model, operation: u64, range: Range<u64>, seed: u64) {
    // What is empty grows nothing.
    let end = if range.is_empty() { 0 } else { range.end };
    match operation {
        0..=2 => {
            let bytes = pattern((range.end - range.start) as usize, seed);
            storage.write_at(&bytes, range.start).unwrap();
            model.grow(end);
            model.inside(&range).iter_mut().zip(bytes).for_each(|(byte, new)| *byte = Some(new));
        }
        3 | 4 => {
            storage.zero_range(range.clone()).unwrap();
            model.grow(end);
            model.inside(&range).fill(Some(0));
        }
        5 => {
            if storage.punch_hole(range.clone()).unwrap() {
                model.inside(&range).fill(Some(0));
            }
        }
        6 => {
            storage.set_len(range.start).unwrap();
            model.bytes.truncate(range.start as usize);
            model.grow(range.start);
        }
        _ => {
            if storage.allocate(range).unwrap() {
                model.grow(end);
            }
        }
    }
}

/// Compares with a model, and the holes with what is there.
fn compare(storage: &dyn Storage, model: &[Option<u8>], fixed: bool, when: &str) {
    let len = model.len() as u64;
    assert!(fixed || storage.len().unwrap() == len, "{when}: {} bytes, not {len}", storage.len().unwrap());
    let bytes = read(storage, 0..len);
    for (at, (got, wanted)) in bytes.iter().zip(model).enumerate() {
        assert!(wanted.is_none_or(|wanted| *got == wanted), "{when}: byte {at:#x} is {got:#04x}, not {wanted:?}");
    }
    walk(storage, 0..len);
}
