//! Small programs over the latches; each is run in many orders by the tests.

use std::sync::Arc;
use std::time::Duration;

use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use shuttle::thread;

use crate::parts::flushes::{Flushes, Turn};
use crate::parts::gate::Gate;
use crate::parts::tokens::{Hold, Tokens, Wait};
use crate::units::BlockIndex;

/// What a reader does in another order than it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Counts itself in, then looks up.
    Right,
    /// Looks up, then counts itself in.
    LooksUpFirst,
}

/// A slot names one of two cells, as an entry of the BAT names a place. Readers follow it; a writer points it elsewhere,
/// waits until nobody can be in the old cell, and spoils it, so many times.
pub fn gate(readers: usize, looks: usize, rounds: usize, reader: Reader) {
    let gate = Arc::new(Gate::default());
    let slot = Arc::new(AtomicUsize::new(0));
    let cells: Arc<[AtomicBool; 2]> = Arc::new([AtomicBool::new(true), AtomicBool::new(true)]);
    let threads: Vec<_> = (0..readers)
        .map(|_| {
            let (gate, slot, cells) = (Arc::clone(&gate), Arc::clone(&slot), Arc::clone(&cells));
            thread::spawn(move || {
                for _ in 0..looks {
                    let early = (reader == Reader::LooksUpFirst).then(|| slot.load(Ordering::SeqCst));
                    let inside = gate.enter();
                    let at = early.unwrap_or_else(|| slot.load(Ordering::SeqCst));
                    assert!(cells[at].load(Ordering::SeqCst), "a place that was given away");
                    drop(inside);
                }
            })
        })
        .collect();
    for round in 0..rounds {
        let new = (round + 1) % 2;
        cells[new].store(true, Ordering::SeqCst);
        let old = slot.swap(new, Ordering::SeqCst);
        assert!(gate.is_quiet(Duration::from_secs(60)));
        cells[old].store(false, Ordering::SeqCst);
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// What a thread of [`tokens`] holds, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Its mapping is relied on.
    Use,
    /// It is about to be made.
    Change,
    /// It is taken away.
    Alone,
    /// As `Alone`, without waiting.
    TryAlone,
    /// As `Use`, of another block that has the same lock.
    Neighbour,
}

/// Threads that hold one block in several ways: those that exclude each other never do at once, and everybody gets his
/// turn (that nobody waits for ever is what the scheduler sees to).
pub fn tokens(programs: &[&[Wanted]]) {
    let tokens = Arc::new(Tokens::default());
    let inside: Arc<[AtomicUsize; 3]> = Arc::default();
    let threads: Vec<_> = programs
        .iter()
        .map(|program| {
            let (tokens, inside, program) = (Arc::clone(&tokens), Arc::clone(&inside), program.to_vec());
            thread::spawn(move || program.into_iter().for_each(|wanted| hold(&tokens, &inside, wanted)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(tokens.acquire(BlockIndex(1), Hold::Alone, Wait::No), "nothing is left behind");
    assert!(tokens.acquire(BlockIndex(17), Hold::Alone, Wait::No), "nothing is left behind");
}

fn hold(tokens: &Tokens, inside: &[AtomicUsize; 3], wanted: Wanted) {
    let (block, hold, wait) = match wanted {
        Wanted::Use => (BlockIndex(1), Hold::Use, Wait::Yes),
        Wanted::Change => (BlockIndex(1), Hold::Change, Wait::Yes),
        Wanted::Alone => (BlockIndex(1), Hold::Alone, Wait::Yes),
        Wanted::TryAlone => (BlockIndex(1), Hold::Alone, Wait::No),
        Wanted::Neighbour => (BlockIndex(17), Hold::Use, Wait::Yes),
    };
    if !tokens.acquire(block, hold, wait) {
        assert_eq!(wanted, Wanted::TryAlone, "who waits gets it");
        return;
    }
    if wanted != Wanted::Neighbour {
        let [uses, changes, alone] = inside;
        let own = match hold {
            Hold::Use => uses,
            Hold::Change => changes,
            Hold::Alone => alone,
        };
        let before = own.fetch_add(1, Ordering::SeqCst);
        let at_once = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        match hold {
            Hold::Use => assert_eq!(at_once(alone), 0, "used while it is taken away"),
            Hold::Change => assert_eq!((before, at_once(alone)), (0, 0), "made twice, or while it is taken away"),
            Hold::Alone => assert_eq!((before, at_once(uses), at_once(changes)), (0, 0, 0), "not alone"),
        }
        own.fetch_sub(1, Ordering::SeqCst);
    }
    tokens.release(block, hold);
}

/// How a commit of [`flushes`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The newest ticket is read before anything is taken.
    Right,
    /// What is dirty is taken before the newest ticket is read.
    TakesFirst,
    /// The first one fails, and its flush with it.
    FirstFails,
}

/// What the commit lock holds.
#[derive(Debug, Default)]
struct Durable {
    done_ticket: u64,
    commits: usize,
}

/// What is written: bit n by thread n.
#[derive(Debug, Default)]
struct Data {
    memory: AtomicU64,
    /// Nobody but the tests looks at this, so it is no step of its own in the orders that are tried.
    durable: std::sync::atomic::AtomicU64,
}

/// The way of a flush through an image, as `commit.rs` has it; false when its commit failed.
fn flush(flushes: &Flushes, commit: &Mutex<Durable>, data: &Data, how: Commit) -> bool {
    let ticket = flushes.ask();
    let lead = match flushes.turn(ticket, Wait::Yes) {
        Turn::Done => return true,
        Turn::Busy => unreachable!("it waits"),
        Turn::Lead(lead) => lead,
    };
    let mut commit = commit.lock().unwrap();
    if commit.done_ticket < ticket && !run(flushes, &mut commit, data, how) {
        return false;
    }
    lead.done(commit.done_ticket);
    true
}

fn run(flushes: &Flushes, commit: &mut Durable, data: &Data, how: Commit) -> bool {
    let early = (how == Commit::TakesFirst).then(|| data.memory.load(Ordering::SeqCst));
    let ticket = flushes.newest();
    let taken = early.unwrap_or_else(|| data.memory.load(Ordering::SeqCst));
    commit.commits += 1;
    if how == Commit::FirstFails && commit.commits == 1 {
        return false;
    }
    data.durable.fetch_or(taken, Ordering::SeqCst);
    commit.done_ticket = ticket;
    true
}

/// Threads that write and flush, and one that commits without having been asked (to make room in the log): a flush that
/// returns well is covered by a commit that took its pages afterwards.
pub fn flushes(threads: usize, uninvited: bool, how: Commit) {
    let flushes = Arc::new(Flushes::default());
    let commit: Arc<Mutex<Durable>> = Arc::default();
    let data: Arc<Data> = Arc::default();
    let mut running: Vec<_> = (0..threads)
        .map(|number| {
            let (flushes, commit, data) = (Arc::clone(&flushes), Arc::clone(&commit), Arc::clone(&data));
            thread::spawn(move || {
                data.memory.fetch_or(1 << number, Ordering::SeqCst);
                if flush(&flushes, &commit, &data, how) {
                    let written = data.durable.load(Ordering::SeqCst);
                    assert!(written >> number & 1 == 1, "a flush returned without its data");
                }
            })
        })
        .collect();
    if uninvited {
        let (flushes, commit, data) = (Arc::clone(&flushes), Arc::clone(&commit), Arc::clone(&data));
        running.push(thread::spawn(move || {
            run(&flushes, &mut commit.lock().unwrap(), &data, how);
        }));
    }
    running.into_iter().for_each(|thread| thread.join().unwrap());
    let commits = commit.lock().unwrap().commits;
    assert!(commits <= threads + usize::from(uninvited), "{commits} commits for {threads} flushes");
}
