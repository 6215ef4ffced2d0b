//! Every order of small programs over the latches, and many orders of larger ones.
//!
//! Each kind has a control: a program that uses the latch wrongly, which must be caught.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use shuttle::{check_dfs, check_pct, check_random};
use vhdkit_interleavings::latches::Wanted::{Alone, Change, Neighbour, TryAlone, Use};
use vhdkit_interleavings::latches::{Commit, Reader, Wanted, flushes, gate, tokens};

/// Orders of programs that have too many to try all.
const ORDERS: usize = 10_000;

#[test]
fn nobody_is_met_in_a_place_that_was_given_away() {
    for (readers, looks, rounds) in [(1, 2, 2), (1, 3, 3), (2, 2, 2), (3, 2, 3)] {
        check_random(move || gate(readers, looks, rounds, Reader::Right), ORDERS);
        check_pct(move || gate(readers, looks, rounds, Reader::Right), ORDERS, 3);
    }
}

#[test]
#[should_panic(expected = "a place that was given away")]
fn a_reader_that_looks_up_before_it_counts_is_caught() {
    check_random(|| gate(1, 2, 2, Reader::LooksUpFirst), ORDERS);
}

#[test]
fn holders_exclude_each_other_and_nobody_waits_for_ever() {
    let exhaustive: [&[&[Wanted]]; 6] = [
        &[&[Use], &[Alone]],
        &[&[Change], &[Change]],
        &[&[Alone], &[Alone]],
        &[&[Change], &[Alone]],
        &[&[Alone], &[Neighbour]],
        &[&[Use], &[TryAlone]],
    ];
    for programs in exhaustive {
        check_dfs(move || tokens(programs), None);
    }
    let many: [&[&[Wanted]]; 5] = [
        &[&[Use], &[Alone], &[Change]],
        &[&[Alone, Use], &[Change, Use], &[Use, Alone]],
        &[&[Alone, Alone], &[Alone, Neighbour], &[Change, Alone], &[Use, TryAlone]],
        &[&[Use, Use], &[Use, Change], &[Alone], &[Neighbour, Alone]],
        &[&[Change], &[Change], &[Change], &[Alone]],
    ];
    for programs in many {
        check_random(move || tokens(programs), ORDERS);
        check_pct(move || tokens(programs), ORDERS, 3);
    }
}

/// All orders of two flushes (about half a million), and many of more.
#[test]
fn a_flush_that_returns_is_covered_by_a_commit_that_began_after_it() {
    check_dfs(|| flushes(2, false, Commit::Right), None);
    for (threads, uninvited) in [(2, true), (3, false), (3, true), (5, true)] {
        check_random(move || flushes(threads, uninvited, Commit::Right), ORDERS);
        check_pct(move || flushes(threads, uninvited, Commit::Right), ORDERS, 3);
    }
}

#[test]
fn when_the_one_who_leads_fails_the_others_go_on() {
    check_dfs(|| flushes(2, false, Commit::FirstFails), None);
    check_random(|| flushes(4, true, Commit::FirstFails), ORDERS);
}

#[test]
#[should_panic(expected = "a flush returned without its data")]
fn a_commit_that_takes_before_it_looks_at_the_tickets_is_caught() {
    check_random(|| flushes(3, false, Commit::TakesFirst), ORDERS);
}
