//! Programs of a few threads over whole images, in many orders.
//!
//! What runs is the library's own code of writing, trimming, committing, closing and reopening. Each program ends with a
//! look at what a power cut would leave. The controls break a rule of the commit on purpose, and must be caught.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use std::io::ErrorKind;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};
use vhdkit_interleavings::disk::{Call, Fault};
use vhdkit_interleavings::image::simulation::BrokenRule;
use vhdkit_interleavings::world::Act::{
    Abandon, Await, Close, Cut, Discard, Flush, Mark, Plan, Read, ReadOnly, ReadPlan, TryClose, TryFlush, Writable,
    Write, WriteHalves, WriteOwn, Zero,
};
use vhdkit_interleavings::world::{Act, World};

/// Orders of a program, by each of the two ways to draw them.
const ORDERS: usize = 1_000;
/// Orders among which a broken rule must show itself.
const CONTROL_ORDERS: usize = 20_000;

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.silence_warnings = true;
    config
}

/// Runs a program in many orders: at random, and with priorities that change three times.
fn run(world: &World, programs: &'static [&'static [Act]]) {
    let again = world.clone();
    Runner::new(RandomScheduler::new(ORDERS), config()).run(move || again.run(programs));
    let again = world.clone();
    Runner::new(PctScheduler::new(3, ORDERS), config()).run(move || again.run(programs));
}

/// Runs it in many more, one of which is expected to go wrong.
fn control(world: World, programs: &'static [&'static [Act]]) {
    let mut config = config();
    config.failure_persistence = shuttle::FailurePersistence::None;
    Runner::new(RandomScheduler::new(CONTROL_ORDERS), config).run(move || world.run(programs));
}

#[test]
fn what_was_flushed_is_there_after_a_power_cut() {
    for world in [World::dynamic(), World::child()] {
        run(&world, &[&[Write, Flush, WriteOwn, Flush], &[WriteOwn, Flush, Write, Flush]]);
        run(&world, &[&[Write, Flush], &[WriteOwn, Flush], &[Plan, TryFlush, Write, Flush]]);
    }
}

#[test]
fn trims_give_space_back_that_nobody_uses() {
    for world in [World::dynamic(), World::child()] {
        run(
            &world,
            &[&[WriteOwn, Flush, Discard, Flush, Flush], &[Write, WriteOwn, Flush, Plan, Flush], &[Read, Read, Read]],
        );
        run(
            &world,
            &[&[WriteOwn, Zero, WriteOwn, Flush], &[WriteOwn, Discard, Flush, Write, Flush], &[Read, ReadPlan]],
        );
    }
}

#[test]
fn halves_of_sectors_and_plans_meet_in_one_block() {
    for world in [World::dynamic(), World::child()] {
        run(&world, &[&[WriteHalves, Flush], &[Plan, Flush], &[WriteHalves, Flush, WriteHalves]]);
        run(&world, &[&[Abandon, WriteOwn, Flush], &[Plan, Discard, Flush], &[ReadPlan, ReadPlan]]);
    }
}

#[test]
fn closing_and_reopening_meet_writers() {
    let world = World::dynamic();
    run(&world, &[&[Write, Write, Flush], &[ReadOnly]]);
    run(&world, &[&[Write, Write, WriteOwn, Flush], &[ReadOnly, Writable], &[WriteOwn, Plan, Discard, Flush]]);
    run(&world, &[&[Write, Flush, Write], &[TryClose, TryClose, Close]]);
    run(&world, &[&[Plan, Read, Write], &[ReadPlan, ReadOnly, Writable, Write, Flush], &[Close]]);
}

#[test]
fn a_reader_becomes_a_writer_among_plans() {
    for world in [World::dynamic().read_only(), World::child().read_only()] {
        run(&world, &[&[ReadPlan, ReadPlan], &[Writable, WriteOwn, Flush, Discard, Flush, Flush], &[Write, WriteOwn]]);
        run(&world, &[&[Writable, Write, ReadOnly], &[Writable, Write, Flush]]);
    }
}

/// Six plans over blocks of 256 MiB leave too little of the entry for two more: who comes last waits for a plan's end, or
/// commits what is dirty.
#[test]
fn who_needs_more_of_the_log_than_is_left_gets_it_when_others_are_done() {
    for plans in [6, 7] {
        run(&World::large_child().with_plans(plans), &[&[WriteOwn, Flush], &[Write, WriteOwn, Flush]]);
    }
}

#[test]
fn a_failure_costs_nothing_that_was_flushed() {
    let calls = [Call::Write, Call::Length, Call::Sync];
    for (call, error) in calls.iter().flat_map(|call| [(*call, ErrorKind::Other), (*call, ErrorKind::StorageFull)]) {
        for after in [0, 2, 4, 7, 11] {
            let world = World::dynamic().with_fault(Fault { call, after, error });
            let again = world.clone();
            let programs: &[&[Act]] =
                &[&[WriteOwn, Flush, Discard, Flush, WriteOwn, Flush], &[Write, Flush, Plan, Flush], &[Write, Flush]];
            Runner::new(RandomScheduler::new(ORDERS / 10), config()).run(move || again.run(programs));
            Runner::new(PctScheduler::new(3, ORDERS / 10), config()).run(move || world.run(programs));
        }
    }
}

/// Space of the thread's own block comes into use for the shared one, with the same sector of it.
const REUSES: &[Act] = &[WriteOwn, Flush, Discard, Flush, Flush, Mark, Write, Flush];

#[test]
fn space_changes_hands() {
    for world in [World::dynamic(), World::child()] {
        run(&world, &[REUSES, &[Await, WriteOwn, Flush], &[Await, Cut, Read, Cut, Read]]);
        run(
            &world,
            &[REUSES, &[WriteOwn, Flush, Await, Discard, Flush, WriteOwn, Flush], &[Await, ReadPlan, ReadPlan]],
        );
    }
}

#[test]
#[should_panic(expected = "sector 0 holds another one")]
fn an_entry_that_is_logged_before_its_payload_is_durable_is_caught() {
    control(World::dynamic().breaking(BrokenRule::LogBeforeData), &[REUSES, &[Await, Cut, Cut, Cut, Cut]]);
}

#[test]
#[should_panic(expected = "sector 0 holds another one")]
fn a_first_write_that_is_published_before_its_payload_is_caught() {
    control(World::dynamic().breaking(BrokenRule::PublishBeforeData), &[REUSES, &[Await, Read, Read, Read, Read]]);
}

#[test]
#[should_panic(expected = "holds another one")]
fn space_that_is_given_out_at_once_is_caught() {
    control(
        World::dynamic().breaking(BrokenRule::FreeAtOnce),
        &[&[WriteOwn, Flush, Discard, Write, Cut], &[Read, Read]],
    );
}
