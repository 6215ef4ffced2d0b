//! The simulator bites: a toy store that is right passes every power cut, and each mistake in it is found.
//!
//! ```text
//! page 0   | 1, 2: tables, written in turn      | 3 ...: blocks, wherever there is room
//! nothing  | number, checksum, place of each block; one place in each sector |
//!
//! flush:  take the table; sync the blocks; write the older table; sync; what was replaced may be used again
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhdkit::storage::Storage;
use vhdkit_testkit::rng::{Rng, mix};
use vhdkit_testkit::sim::{
    Campaign, Case, CrashImage, Fault, FaultError, Judge, Lab, OpInfo, OpKind, PageMap, Report, Sampling,
    SectorHistory, Setup, SimHandle, SimStorage, fill_stamp,
};

const PAGE: u64 = 4096;
const BLOCKS: usize = 4;
const FIRST_BLOCK: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// The table may be durable before what it points to.
    NoSyncBetweenDataAndTable,
    /// The only table is overwritten.
    OneTable,
    /// A torn table is believed.
    NoChecksum,
    /// A table may point past an end of the file that is not durable: nothing was written there, only the file grew.
    SizeTrusted,
    /// A replaced block is written over while the durable table still points to it.
    ReuseTooEarly,
    /// A flush says that it is done before it is.
    FlushTooEarly,
    /// The table is taken after the sync: it has blocks that the sync did not cover.
    TakenLate,
    /// What a failed sync left is believed to be durable after the next one.
    SyncRetried,
}

thread_local!(static PHASE: Cell<&'static str> = const { Cell::new("idle") });

#[derive(Clone, Copy, Default)]
struct Table {
    number: u64,
    places: [u64; BLOCKS],
}

#[derive(Default)]
struct State {
    table: Table,
    durable_number: u64,
    free: Vec<u64>,
    replaced: Vec<u64>,
    changed: bool,
    written: bool,
    pages: u64,
    poisoned: bool,
}

struct Toy {
    storage: Arc<SimStorage>,
    mistake: Mistake,
    state: Mutex<State>,
}

fn checksum(page: &[u8]) -> u64 {
    page[16..].chunks(8).fold(u64::from_le_bytes(page[..8].try_into().unwrap()), |sum, word| {
        mix(sum ^ u64::from_le_bytes(word.try_into().unwrap()))
    })
}

fn encode(table: &Table) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    page[..8].copy_from_slice(&table.number.to_le_bytes());
    for (block, place) in table.places.iter().enumerate() {
        page[(block + 1) * 512..][..8].copy_from_slice(&place.to_le_bytes());
    }
    let sum = checksum(&page);
    page[8..16].copy_from_slice(&sum.to_le_bytes());
    page
}

fn decode(page: &[u8], mistake: Mistake) -> Option<Table> {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let valid = word(8) == checksum(page) || mistake == Mistake::NoChecksum;
    let places = std::array::from_fn(|block| word((block + 1) * 512));
    (valid && word(0) > 0).then_some(Table { number: word(0), places })
}

/// The newest table in a file.
fn open(storage: &dyn Storage, mistake: Mistake) -> Result<Table, String> {
    let tables = (1..3).filter_map(|page| {
        let mut bytes = vec![0; PAGE as usize];
        storage.read_at(&mut bytes, page * PAGE).ok()?;
        decode(&bytes, mistake)
    });
    tables.max_by_key(|table| table.number).ok_or_else(|| "there is no valid table".to_owned())
}

/// A new store: the first table is durable, and no block is there.
fn new_store() -> PageMap {
    let mut file = PageMap::new();
    file.write(PAGE, &encode(&Table { number: 1, places: [0; BLOCKS] }));
    file.set_len(FIRST_BLOCK * PAGE);
    file
}

impl Toy {
    fn new(storage: Arc<SimStorage>, mistake: Mistake) -> Self {
        let table = open(&*storage, mistake).unwrap();
        let state = State { table, durable_number: table.number, pages: FIRST_BLOCK, ..State::default() };
        Self { storage, mistake, state: Mutex::new(state) }
    }

    /// A place for a block.
    fn place(&self) -> Result<u64, std::io::Error> {
        let free = self.state.lock().unwrap().free.pop();
        if let Some(place) = free {
            return Ok(place);
        }
        let place = {
            let mut state = self.state.lock().unwrap();
            state.pages += 1;
            state.pages - 1
        };
        self.storage.set_len((place + 1) * PAGE)?;
        Ok(place)
    }

    fn map(&self, block: usize, place: u64) {
        let mut state = self.state.lock().unwrap();
        let old = std::mem::replace(&mut state.table.places[block], place);
        if old != 0 && self.mistake == Mistake::ReuseTooEarly {
            state.free.push(old);
        } else if old != 0 {
            state.replaced.push(old);
        }
        state.changed = true;
    }

    /// A block gets new contents in a new place.
    fn put(&self, block: usize, bytes: &[u8]) -> std::io::Result<()> {
        let place = self.place()?;
        self.storage.write_at(bytes, place * PAGE)?;
        self.state.lock().unwrap().written = true;
        self.map(block, place);
        Ok(())
    }

    /// A block becomes zero: a place that only growing made.
    fn clear(&self, block: usize) -> std::io::Result<()> {
        let place = {
            let mut state = self.state.lock().unwrap();
            state.pages += 1;
            state.pages - 1
        };
        self.storage.set_len((place + 1) * PAGE)?;
        self.map(block, place);
        Ok(())
    }

    /// A sector of a block that is there is written in place.
    fn poke(&self, block: usize, sector: u64, bytes: &[u8]) -> std::io::Result<bool> {
        let place = self.state.lock().unwrap().table.places[block];
        if place == 0 {
            return Ok(false);
        }
        self.storage.write_at(bytes, place * PAGE + sector * 512)?;
        self.state.lock().unwrap().written = true;
        Ok(true)
    }

    fn sync(&self, phase: &'static str) -> std::io::Result<()> {
        PHASE.set(phase);
        let result = self.storage.sync();
        if result.is_err() && self.mistake != Mistake::SyncRetried {
            self.state.lock().unwrap().poisoned = true;
        }
        result
    }

    fn take(&self) -> (Table, Vec<u64>, bool) {
        let mut state = self.state.lock().unwrap();
        let changed = std::mem::take(&mut state.changed);
        (state.table, std::mem::take(&mut state.replaced), changed)
    }

    fn flush(&self) -> std::io::Result<()> {
        if self.state.lock().unwrap().poisoned {
            return Err(std::io::Error::other("an earlier sync has failed"));
        }
        let written = std::mem::take(&mut self.state.lock().unwrap().written);
        let mut taken = self.take();
        let skip = match self.mistake {
            Mistake::NoSyncBetweenDataAndTable => taken.2,
            Mistake::SizeTrusted => !written,
            _ => false,
        };
        if !skip && let Err(error) = self.sync("payload") {
            self.state.lock().unwrap().changed |= taken.2;
            return Err(error);
        }
        if self.mistake == Mistake::TakenLate {
            let late = self.take();
            taken = (late.0, [taken.1, late.1].concat(), taken.2 || late.2);
        }
        let (mut table, replaced, changed) = taken;
        if changed {
            table.number = {
                let mut state = self.state.lock().unwrap();
                state.durable_number += 1;
                state.durable_number
            };
            PHASE.set("log");
            let page = if self.mistake == Mistake::OneTable { 1 } else { 2 - table.number % 2 };
            self.storage.write_at(&encode(&table), page * PAGE)?;
            if self.mistake != Mistake::FlushTooEarly {
                self.sync("log")?;
            }
            self.state.lock().unwrap().free.extend(replaced);
        }
        PHASE.set("idle");
        Ok(())
    }
}

/// Opens what was left, and reads every block.
struct ToyJudge(Mistake);

impl Judge for ToyJudge {
    fn judge(&self, image: &CrashImage, history: &SectorHistory, _case: &mut Case) -> Result<(), String> {
        let table = open(image, self.0)?;
        let mut digest = 0;
        for (block, &place) in table.places.iter().enumerate() {
            let mut bytes = vec![0; PAGE as usize];
            if place != 0 {
                let read = image.read_at(&mut bytes, place * PAGE);
                read.map_err(|error| format!("block {block} at page {place}: {error}"))?;
            }
            history.allowed_run(block as u64 * 8, &bytes, &mut digest)?;
        }
        Ok(())
    }
}

fn step(rng: &mut Rng, toy: &Toy, sim: &SimHandle) -> Result<(), String> {
    let block = rng.below(BLOCKS as u64);
    match rng.below(10) {
        0..=4 => {
            sim.step(format!("put {block}"));
            let (ticket, bytes) = sim.history().start_write(block * 8, 8);
            toy.put(block as usize, &bytes).map_err(|error| error.to_string())?;
            sim.history().finish(ticket);
        }
        5 => {
            sim.step(format!("clear {block}"));
            let ticket = sim.history().start_zero(block * 8..block * 8 + 8);
            toy.clear(block as usize).map_err(|error| error.to_string())?;
            sim.history().finish(ticket);
        }
        _ => {
            let sector = rng.below(8);
            sim.step(format!("poke {block} {sector}"));
            if toy.state.lock().unwrap().table.places[block as usize] != 0 {
                let (ticket, bytes) = sim.history().start_write(block * 8 + sector, 1);
                toy.poke(block as usize, sector, &bytes).map_err(|error| error.to_string())?;
                sim.history().finish(ticket);
            }
        }
    }
    Ok(())
}

/// Random steps and flushes; other steps come in the middle of flushes, through the hook.
fn program(rng: &mut Rng, lab: &Lab, mistake: Mistake, steps: u64) -> Result<(), String> {
    PHASE.set("idle");
    let history = SectorHistory::new(BLOCKS as u64 * PAGE, Default::default());
    let judge = Arc::new(ToyJudge(mistake));
    let sim = lab.start(Setup { file: new_store(), history, judge, phase_source: || PHASE.get() });
    let toy = Arc::new(Toy::new(sim.storage(), mistake));
    let flushing = Arc::new(AtomicBool::new(false));
    let (inner, active, handle) = (Arc::clone(&toy), Arc::clone(&flushing), sim.clone());
    let other = Mutex::new(Rng::new(rng.next_u64()));
    sim.storage().set_hook(Some(Arc::new(move |_: &OpInfo| {
        let mut rng = other.lock().unwrap();
        if active.load(Ordering::Relaxed) && rng.chance(20) {
            step(&mut rng, &inner, &handle).unwrap();
        }
    })));
    for _ in 0..steps {
        if sim.is_over() {
            break;
        }
        if rng.chance(70) {
            step(rng, &toy, &sim)?;
            continue;
        }
        sim.step("flush");
        if rng.chance(10) {
            let lost = rng.next_u64();
            sim.storage().set_fault(Some(Fault::nth(1, FaultError::EIO).only(&[OpKind::Sync]).sync_loses(lost)));
        }
        let flush = sim.history().start_flush();
        flushing.store(true, Ordering::Relaxed);
        let result = toy.flush();
        flushing.store(false, Ordering::Relaxed);
        PHASE.set("idle");
        if result.is_ok() {
            sim.history().finish_flush(flush);
        }
    }
    Ok(())
}

fn run(campaign: &Campaign, mistake: Mistake, steps: u64) -> Report {
    campaign.run(&|rng: &mut Rng, lab: &Lab| program(rng, lab, mistake, steps))
}

#[test]
fn the_right_store_passes_exhaustively() {
    let campaign = Campaign {
        sampling: Sampling { exhaustive_ops: 7, random: 20 },
        programs_max: Some(60),
        ..Campaign::default()
    };
    let report = run(&campaign, Mistake::None, 25);
    println!("{report}");
    report.expect_clean();
    assert_eq!(report.programs, 60);
    assert!(report.total().distinct > 20_000 && report.distinct_in(&["payload", "log"]) > 10_000, "{report}");
}

#[test]
fn every_mistake_is_found_soon_and_can_be_seen_again() {
    for mistake in [
        Mistake::NoSyncBetweenDataAndTable,
        Mistake::OneTable,
        Mistake::NoChecksum,
        Mistake::SizeTrusted,
        Mistake::ReuseTooEarly,
        Mistake::FlushTooEarly,
        Mistake::TakenLate,
        Mistake::SyncRetried,
    ] {
        let campaign = Campaign { distinct_max: Some(10_000), ..Campaign::default() };
        let report = run(&campaign, mistake, 25);
        let violation = report.violation.as_ref().unwrap_or_else(|| panic!("{mistake:?} is not found:\n{report}"));
        println!("{mistake:?}, after {} images: {violation}", report.total().distinct);
        assert!(report.total().distinct <= 10_000);
        let state = violation.state.as_ref().expect("a power cut").to_string();
        let again = campaign.replay(&|rng: &mut Rng, lab: &Lab| program(rng, lab, mistake, 25), violation.seed, &state);
        let again = again.unwrap();
        assert_eq!(again.verdict.as_ref().unwrap_err(), &violation.message);
        let hash = again.point.build(violation.state.as_ref().unwrap()).content_hash();
        assert_eq!(again.image.pages().content_hash(), hash);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let message = |mistake| {
        let campaign = Campaign { distinct_max: Some(10_000), ..Campaign::default() };
        run(&campaign, mistake, 25).violation.unwrap().message
    };
    assert!(message(Mistake::OneTable).contains("no valid table"));
    assert!(message(Mistake::SizeTrusted).contains("at page"));
    let reused = message(Mistake::ReuseTooEarly);
    assert!(reused.contains("which does not belong here") || reused.contains("out of date"), "{reused}");
}

#[test]
fn the_same_seeds_give_the_same_report_whatever_threads_do() {
    let mut reports = Vec::new();
    for threads in [1, 2, 3] {
        let campaign = Campaign { threads, first_seed: 7, programs_max: Some(12), ..Campaign::default() };
        let right = run(&campaign, Mistake::None, 20);
        let wrong = run(&Campaign { programs_max: None, ..campaign }, Mistake::TakenLate, 20);
        reports.push((right.programs, right.phases, wrong.programs, wrong.phases, wrong.violation));
    }
    assert!(reports[0].4.is_some());
    assert!(reports[0] == reports[1] && reports[1] == reports[2], "{reports:?}");
}

#[test]
fn a_program_that_complains_or_panics_is_a_violation_too() {
    let campaign = Campaign { programs_max: Some(3), ..Campaign::default() };
    let complains = campaign.run(&|_: &mut Rng, lab: &Lab| match lab.seed() {
        2 => Err("wrong".to_owned()),
        _ => Ok(()),
    });
    let violation = complains.violation.unwrap();
    assert_eq!((violation.seed, violation.message.as_str(), complains.programs), (2, "wrong", 2));
    let panics = campaign.run(&|_: &mut Rng, _: &Lab| -> Result<(), String> { panic!("out of {}", "order") });
    assert_eq!(panics.violation.unwrap().message, "panic: out of order");
}

/// Panics over a page that is torn.
struct PanickingJudge;

impl Judge for PanickingJudge {
    fn judge(&self, image: &CrashImage, _history: &SectorHistory, _case: &mut Case) -> Result<(), String> {
        let mut bytes = [0; 4096];
        image.read_at(&mut bytes, 0).unwrap();
        assert!(bytes[0] == bytes[4095], "torn");
        Ok(())
    }
}

#[test]
fn a_judge_that_panics_has_found_something() {
    let mut file = PageMap::new();
    file.write(0, &[1; 4096]);
    let program = |rng: &mut Rng, lab: &Lab| {
        let history = SectorHistory::new(PAGE, Default::default());
        let setup = Setup { file: file.clone(), history, judge: Arc::new(PanickingJudge), phase_source: || "payload" };
        let sim = lab.start(setup);
        sim.storage().write_at(&[2; 4096], 0).unwrap();
        assert!([1, 2].contains(&sim.crash(rng).pages().page(0).unwrap().bytes()[9]));
        sim.storage().sync().map_err(|error| error.to_string())
    };
    let campaign = Campaign { programs_max: Some(1), ..Campaign::default() };
    let violation = campaign.run(&program).violation.unwrap();
    assert_eq!(violation.message, "panic: torn");
    let again = campaign.replay(&program, 1, &violation.state.unwrap().to_string()).unwrap();
    assert_eq!(again.verdict.unwrap_err(), "panic: torn");
}

#[test]
fn time_ends_a_campaign() {
    let campaign = Campaign { time_max: Some(Duration::from_millis(300)), ..Campaign::default() };
    let report = run(&campaign, Mistake::None, 1000);
    report.expect_clean();
    assert!(report.elapsed < Duration::from_secs(20), "{report}");
    assert!(report.programs > 0);
}

/// A read sees what was there when it began, and what was written since, also where a flush has forgotten it.
#[test]
fn reads_in_the_middle_of_which_something_happens() {
    let stamp = |version: u64| {
        let mut bytes = [0; 512];
        fill_stamp(3, version, &mut bytes);
        bytes
    };
    let mut history = SectorHistory::new(PAGE, Default::default());
    let write = |history: &mut SectorHistory| {
        let (ticket, bytes) = history.start_write(3, 1);
        history.finish(ticket);
        let version = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        assert_eq!(bytes, stamp(version));
        version
    };
    let (lost, first) = (write(&mut history), write(&mut history));
    let read = |history: &mut SectorHistory, meanwhile: &mut dyn FnMut(&mut SectorHistory), bytes: &[u8]| {
        let ticket = history.start_read(3, 1);
        meanwhile(history);
        history.finish_read(ticket, bytes)
    };
    let nothing = &mut |_: &mut SectorHistory| {};
    assert!(read(&mut history.clone(), nothing, &stamp(first)).is_ok());
    assert!(
        read(&mut history.clone(), nothing, &stamp(lost)).is_err() && read(&mut history, nothing, &[0; 512]).is_err()
    );
    let mut versions = Vec::new();
    let mut much = |history: &mut SectorHistory| {
        let zero = history.start_zero(0..8);
        history.finish(zero);
        versions = vec![write(history), write(history)];
        let flush = history.start_flush();
        history.finish_flush(flush);
    };
    assert!(read(&mut history.clone(), &mut much, &stamp(lost)).is_err(), "was gone before");
    assert!(read(&mut history.clone(), &mut much, &stamp(first)).is_ok());
    assert!(read(&mut history.clone(), &mut much, &[0; 512]).is_ok(), "was zero for a while");
    let ticket = history.start_read(3, 1);
    much(&mut history);
    let between = stamp(versions[0]);
    assert!(history.finish_read(ticket, &between).is_ok());
    assert!(read(&mut history, nothing, &between).is_err(), "is gone now");
}

#[test]
fn a_campaign_ends_after_so_many_states() {
    let report = Campaign { states_max: Some(500), ..Campaign::default() }
        .run(&|rng: &mut Rng, lab: &Lab| program(rng, lab, Mistake::None, 10));
    assert!(report.violation.is_none() && (500..5000).contains(&report.total().states), "{report}");
}
