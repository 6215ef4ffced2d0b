//! Programs on a small disk beside a plain array: an input is a list of operations, and whatever they are, the disk holds
//! what the array holds, and `check` finds nothing, whenever a session has ended.
//!
//! ```text
//! input:  u8 kind of image | operation | operation | ...        (all numbers little-endian)
//! kind    bit 0: with a parent; bit 1: sectors of 4096 bytes; bit 2: blocks of 2 MiB; bit 3: growth is not zero;
//!         bit 4: starts with a dirty log
//! operation  u8 what, u16 where (bits 0 to 2: block, the others: sectors of 512 bytes from one of its ends), u8 how many
//! ```
#![no_main]

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use vhdkit::error::{ErrorKind, Result};
use vhdkit::image::{
    AtOnce, BlockDevice, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver, ReadStep, WritePlan,
};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_fuzz::take;
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, DirtyPlan, ImageBuilder, SectorMask, SparseFile};

const MIB: u64 = 1 << 20;
/// Not a multiple of any block; of both sectors.
const DISK: u64 = 5 * MIB + 12_288;
/// Operations of one program: more take long, and what they find is found by several programs.
const OPERATIONS_MAX: usize = 100;
/// What is compared at once, where anything was ever written.
const PAGE: u64 = 64 << 10;
/// Plans that are held at once.
const PLANS_MAX: usize = 3;

#[derive(Debug)]
struct Parent(Arc<MemoryStorage>);

impl ParentResolver for Parent {
    fn resolve(&self, _: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        Ok(vec![ParentCandidate { storage: self.0.clone(), path: None, named: false, lock: None }])
    }
}

/// An image to start from: the file, what its disk holds, and its parent.
struct Start {
    file: SparseFile,
    disk: Vec<u8>,
    /// Pages that are not zero.
    data: Vec<bool>,
    parent: Option<Arc<MemoryStorage>>,
}

fn load(file: &SparseFile) -> MemoryStorage {
    let storage = MemoryStorage::with_len(file.len());
    for (offset, bytes) in file.segments() {
        storage.write_at(bytes, offset).expect("memory can be written");
    }
    storage
}

/// A copy of everything that a storage holds.
fn copy(storage: &dyn Storage) -> MemoryStorage {
    let length = storage.len().expect("memory has a length");
    let copy = MemoryStorage::with_len(length);
    let mut position = 0;
    while let Some(data) = storage.next_data(position..length).expect("memory can be read") {
        let mut bytes = vec![0; usize::try_from(data.end - data.start).expect("a small file")];
        storage.read_at(&mut bytes, data.start).expect("memory can be read");
        copy.write_at(&bytes, data.start).expect("memory can be written");
        position = data.end;
    }
    copy
}

fn build(kind: u8) -> Start {
    let sector = if kind & 2 == 0 { 512 } else { 4096 };
    let block = if kind & 4 == 0 { 1 << 20 } else { 2 << 20 };
    let builder = |size, block| ImageBuilder::new(size, block).sector_sizes(sector, 4096);
    let pattern = |seed| Content::Sparse { seed, stride: 301 };
    let mut image = builder(DISK, block).block(1, BlockSpec::present(pattern(1)));
    image = image.block(2, BlockSpec::anchored(3, pattern(2)));
    let mut parent: Option<Arc<BuiltImage>> = None;
    if kind & 1 != 0 {
        let base = (0..2).fold(builder(4 * MIB, 2 << 20), |builder, number| {
            builder.block(number, BlockSpec::present(pattern(10 + number)))
        });
        let base = Arc::new(base.build());
        image = image.differencing(&base);
        // Stale bits of a block that is not there, and a block that is partially.
        image = image.block(0, BlockSpec::new(0).with_mask(SectorMask::random(1, 9, 50)));
        image = image.block(1, BlockSpec::partial(pattern(3), SectorMask::random(2, 40, 50)));
        parent = Some(base);
    }
    let mut image = image.build();
    let disk = image.model.read(0, usize::try_from(DISK).expect("small"));
    if kind & 16 != 0 {
        DirtyPlan::new(1).move_bat(&image.clone()).move_bitmaps(&image.clone()).apply(&mut image);
    }
    let data = disk.chunks(PAGE as usize).map(|page| page.iter().any(|byte| *byte != 0)).collect();
    Start { file: image.file, disk, data, parent: parent.map(|parent| Arc::new(load(&parent.file))) }
}

/// The image of a kind; each is built once.
fn start(kind: u8) -> &'static Start {
    static STARTS: [OnceLock<Start>; 32] = [const { OnceLock::new() }; 32];
    STARTS[usize::from(kind & 31)].get_or_init(|| build(kind & 31))
}

struct Held {
    plan: WritePlan,
    range: Range<u64>,
    bytes: Vec<u8>,
}

struct Machine {
    start: &'static Start,
    storage: Arc<MemoryStorage>,
    image: Option<Image>,
    array: Vec<u8>,
    /// Pages that are not zero, or were not for some time.
    data: Vec<bool>,
    held: Vec<Held>,
    sector: u64,
    counter: u32,
    growth_is_zero: bool,
}

fn index(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).expect("small")..usize::try_from(range.end).expect("small")
}

impl Machine {
    fn options(&self) -> OpenOptions {
        match &self.start.parent {
            Some(parent) => OpenOptions::new().parents(Arc::new(Parent(parent.clone()))),
            None => OpenOptions::new(),
        }
    }

    fn open(&mut self) {
        let image = self.options().write(true).replay(true).open(self.storage.clone(), None);
        self.image = Some(image.expect("the image opens"));
    }

    fn image(&self) -> &Image {
        self.image.as_ref().expect("open")
    }

    /// Bytes that no other operation has written.
    fn bytes(&mut self, length: u64) -> Vec<u8> {
        self.counter += 1;
        let word = self.counter.wrapping_mul(0x9E37_79B1).to_le_bytes();
        let length = usize::try_from(length).expect("small");
        let mut bytes = word.repeat(length.div_ceil(4));
        bytes.truncate(length);
        bytes
    }

    fn read(&self, range: &Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0xC3; index(range).len()];
        self.image().read_at(&mut bytes, range.start).expect("it can be read");
        let mut again = vec![0x3C; bytes.len()];
        match self.image().read_at_once(&mut again, range.start).expect("it can be read") {
            AtOnce::Filled => assert_eq!(again, bytes),
            AtOnce::Zero => assert!(bytes.iter().all(|byte| *byte == 0)),
            AtOnce::Waits => {}
        }
        bytes
    }

    /// Compares what was ever written, and the ends of everything else.
    fn compare(&self, disk: &dyn BlockDevice, when: &str) {
        let mut bytes = [0; PAGE as usize];
        for (number, data) in self.data.iter().enumerate() {
            let start = number as u64 * PAGE;
            let end = (start + if *data { PAGE } else { 512 }).min(DISK);
            let part = &mut bytes[..index(&(start..end)).len()];
            disk.read_at(part, start).expect("it can be read");
            let expected = &self.array[index(&(start..end))];
            if part != expected {
                let at = part.iter().zip(expected).position(|(left, right)| left != right).unwrap_or_default();
                panic!("{when}: byte {:#x} is {:#x} instead of {:#x}", start + at as u64, part[at], expected[at]);
            }
        }
    }

    /// The array's bytes of a range, for a change.
    fn change(&mut self, range: &Range<u64>) -> &mut [u8] {
        for page in range.start / PAGE..range.end.div_ceil(PAGE) {
            self.data[usize::try_from(page).expect("small")] = true;
        }
        &mut self.array[index(range)]
    }

    fn is_held(&self, range: &Range<u64>) -> bool {
        let wide = range.start / self.sector * self.sector..range.end.next_multiple_of(self.sector);
        self.held.iter().any(|held| held.range.start < wide.end && wide.start < held.range.end)
    }

    /// What may have been done by half: every 512 bytes old or new.
    fn adopt(&mut self, range: &Range<u64>, new: &[u8]) {
        let actual = self.read(range);
        let mut position = range.start;
        while position < range.end {
            let end = ((position / 512 + 1) * 512).min(range.end);
            let inside = index(&(position - range.start..end - range.start));
            let old = self.change(&(position..end));
            if actual[inside.clone()] != *old {
                assert_eq!(actual[inside.clone()], new[inside.clone()], "neither old nor new at {position:#x}");
                old.copy_from_slice(&actual[inside]);
            }
            position = end;
        }
    }

    fn write(&mut self, range: Range<u64>, through: bool) {
        if self.is_held(&range) {
            return;
        }
        let bytes = self.bytes(range.end - range.start);
        if !self.held.is_empty() {
            if !self.image().try_write_at(&bytes, range.start).expect("it can be written") {
                return self.adopt(&range, &bytes);
            }
        } else if through {
            self.image().write_through_at(&bytes, range.start).expect("it can be written");
        } else if range.start % 2 != 0 || !self.image().write_at_once(&bytes, range.start).expect("it can be written") {
            self.image().write_at(&bytes, range.start).expect("it can be written");
        }
        self.change(&range).copy_from_slice(&bytes);
    }

    fn zero(&mut self, range: Range<u64>, unmap: bool) {
        if self.is_held(&range) {
            return;
        }
        if self.held.is_empty() {
            self.image().write_zeroes(range.clone(), unmap).expect("it can be zeroed");
            self.change(&range).fill(0);
        } else {
            let _ = self.image().try_write_zeroes(range.clone(), unmap).expect("it can be zeroed");
            let zeros = vec![0; index(&range).len()];
            self.adopt(&range, &zeros);
        }
    }

    /// Whole blocks are as they were or zero; the rest stays.
    fn discard(&mut self, range: &Range<u64>) {
        if self.is_held(range) {
            return;
        }
        let done = if self.held.is_empty() {
            self.image().discard(range.clone()).map(|()| true)
        } else {
            self.image().try_discard(range.clone())
        };
        done.expect("it can be discarded");
        let block = self.image().allocation_unit();
        let mut position = range.start;
        while position < range.end {
            let whole = position / block * block..((position / block + 1) * block).min(DISK);
            let part = position..whole.end.min(range.end);
            let actual = self.read(&part);
            if actual != self.array[index(&part)] {
                assert!(part == whole, "a part of a block was discarded: {part:x?}");
                assert!(actual.iter().all(|byte| *byte == 0), "a discarded block holds something else");
                self.change(&part).fill(0);
            }
            position = part.end;
        }
    }

    fn plan(&mut self, range: &Range<u64>, write: bool) {
        let range = range.start / self.sector * self.sector..range.end.next_multiple_of(self.sector).min(DISK);
        if self.is_held(&range) || self.held.len() >= PLANS_MAX {
            return;
        }
        let plan = if self.held.is_empty() {
            Some(self.image().plan_write(range).expect("it can be planned"))
        } else {
            self.image().try_plan_write(range).expect("it can be planned")
        };
        let Some(plan) = plan else { return };
        let range = plan.range();
        let bytes = self.bytes(range.end - range.start);
        self.held.push(Held { plan, range: range.clone(), bytes: bytes.clone() });
        if write {
            self.payload(self.held.len() - 1);
        }
    }

    /// Sectors that were mapped show at once.
    fn payload(&mut self, number: usize) {
        let held = &self.held[number];
        held.plan.storage().write_at(&held.bytes, held.plan.file_offset()).expect("memory can be written");
        let (range, bytes) = (held.range.clone(), held.bytes.clone());
        self.adopt(&range, &bytes);
    }

    fn end_plan(&mut self, how: u8) {
        if self.held.is_empty() {
            return;
        }
        let number = usize::from(how >> 2) % self.held.len();
        if how & 3 > 1 {
            self.payload(number);
        }
        let held = self.held.swap_remove(number);
        match how & 3 {
            0 => drop(held.plan),
            1 => held.plan.abandon(),
            _ => {
                held.plan.complete().expect("it can be completed");
                self.change(&held.range).copy_from_slice(&held.bytes);
            }
        }
    }

    fn look(&self, range: &Range<u64>) {
        assert!(self.read(range) == self.array[index(range)], "a read of {range:x?}");
        let range = range.start / self.sector * self.sector..range.end.next_multiple_of(self.sector).min(DISK);
        let plan = self.image().plan_read(range).expect("it can be planned");
        let mut bytes = Vec::new();
        for step in plan.steps() {
            match step {
                ReadStep::File { layer, file_offset, length } => {
                    let mut part = vec![0; usize::try_from(*length).expect("small")];
                    let storage = self.image().layer_storage(*layer).expect("the layer exists");
                    storage.read_at(&mut part, *file_offset).expect("it is in the file");
                    bytes.extend(part);
                }
                ReadStep::Memory(part) => bytes.extend(part),
                ReadStep::Zero(length) => bytes.resize(bytes.len() + usize::try_from(*length).expect("small"), 0),
            }
        }
        assert!(bytes == self.array[index(&plan.range())], "a planned read of {:x?}", plan.range());
    }

    /// Ends the session by closing or by dropping, judges the file, and opens it again.
    fn end(&mut self, close: bool) {
        while !self.held.is_empty() {
            self.end_plan(2);
        }
        let image = self.image.take().expect("open");
        if close {
            image.close().expect("it can be closed");
            assert_eq!(image.write_at(&[1], 0).map_err(|error| error.kind()), Err(ErrorKind::ReadOnly));
            self.compare(&image, "closed");
        }
        drop(image);
        let storage: Arc<dyn Storage> = self.storage.clone();
        let report = check(&storage, None, &CheckOptions::default(), &()).expect("memory can be read");
        assert_eq!((report.errors, report.warnings), (0, 0), "{:?}", report.findings);
        let fresh = self.options().open(storage, None).expect("it opens");
        self.compare(&fresh, "opened anew");
    }

    /// The process dies after a flush: what it leaves is replayed.
    fn die(&mut self) {
        while !self.held.is_empty() {
            self.end_plan(2);
        }
        self.image().flush().expect("it can be flushed");
        let left = Arc::new(copy(self.storage.as_ref()));
        self.image = None; // ends its session on what nobody looks at any more
        self.storage = left;
        let seen = self.options().open(self.storage.clone(), None).expect("it opens");
        self.compare(&seen, "after a death");
    }

    fn operate(&mut self, what: u8, range: Range<u64>, how: u8) {
        match what % 16 {
            0..=3 => self.write(range, false),
            4 => self.write(range, true),
            5 => self.zero(range, how & 1 == 0),
            6 => self.zero(self.blocks(&range), how & 1 == 0),
            7 => self.discard(&range),
            8 => self.discard(&self.blocks(&range)),
            9 => self.image().flush().expect("it can be flushed"),
            10 | 11 => self.plan(&range, how & 1 == 0),
            12 => self.end_plan(how),
            13 => self.look(&range),
            14 => {
                self.end(how & 1 == 0);
                self.open();
            }
            // Where growth is a pattern there is no hole, and a copy takes long.
            _ if how & 1 == 0 && self.growth_is_zero => {
                self.die();
                self.open();
            }
            _ if self.held.is_empty() => {
                self.image().reopen(false).expect("it can be closed");
                self.look(&range);
                self.image().reopen(true).expect("it can be opened");
            }
            _ => {}
        }
    }

    /// The whole blocks around a range.
    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        let block = self.image().allocation_unit();
        range.start / block * block..range.end.next_multiple_of(block).min(DISK)
    }
}

fn program(input: &[u8]) -> Option<()> {
    let mut rest = input;
    let [kind] = take(&mut rest)?;
    let start = start(kind);
    // Space that growth adds holds a pattern from here on.
    let file = load(&start.file);
    let storage = Arc::new(if kind & 8 == 0 { file } else { file.without_zero_growth() });
    let sector = if kind & 2 == 0 { 512 } else { 4096 };
    let mut machine = Machine {
        start,
        storage,
        image: None,
        array: start.disk.clone(),
        data: start.data.clone(),
        held: Vec::new(),
        sector,
        counter: 0,
        growth_is_zero: kind & 8 == 0,
    };
    machine.open();
    for _ in 0..OPERATIONS_MAX {
        let Some([what]) = take(&mut rest) else { break };
        let Some(at) = take(&mut rest).map(u16::from_le_bytes) else { break };
        let Some([length]) = take(&mut rest) else { break };
        let (block, sectors) = (u64::from(at & 7), u64::from(at >> 4) * 512);
        // Both ends of a block, and unaligned where the length is odd.
        let offset = if at & 8 == 0 { sectors } else { MIB.saturating_sub(sectors) };
        let begin = (block * MIB + offset + u64::from(length & 1) * 100).min(DISK - 1);
        let length = match length {
            0..128 => u64::from(length) * 61 + 1,
            _ => u64::from(length - 128) * 1024,
        };
        let end = (begin + length).min(DISK);
        machine.operate(what, begin..end.max(begin + 1), what >> 4);
    }
    machine.end(true);
    Some(())
}

fuzz_target!(|input: &[u8]| {
    program(input);
});
