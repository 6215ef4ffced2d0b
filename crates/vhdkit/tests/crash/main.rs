//! Power cuts at every moment of random programs, and the proof that the simulator finds every rule that is broken.
//!
//! `VHDKIT_CRASH_SECONDS=3600 cargo test --release -p vhdkit --test crash -- long --nocapture` is the long mode;
//! `VHDKIT_CRASH_SEED` says where it begins.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::single_range_in_vec_init,
    reason = "test code"
)]

mod bases;
mod broken;
mod truth;
mod world;

use std::time::Duration;

use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{Campaign, Lab, Report};

use bases::{Kind, base, long_headers};
use world::{Style, World};

const STYLE: Style =
    Style { steps: 60, nested_percent: 12, nested_in_commits: false, replay_percent: 8, second_cuts: 1, broken: None };

/// A random program on a random image.
fn program(rng: &mut Rng, lab: &Lab) -> Result<(), String> {
    let base = match rng.below(20) {
        0..8 => base(rng, Kind::Dynamic),
        8..16 => base(rng, Kind::Child),
        16..18 => base(rng, Kind::Large),
        18 => base(rng, Kind::Fixed),
        _ => long_headers(rng),
    };
    World::start(lab, rng, base, STYLE)?.run(rng)
}

/// Nothing was found, every phase was met, and at least half of the images lie inside of a commit.
fn expect_much(report: &Report) {
    println!("{report}");
    report.expect_clean();
    for phase in ["start", "payload", "log", "home", "retire", "replay", "close"] {
        assert!(report.distinct_in(&[phase]) > 0, "no image in phase {phase}\n{report}");
    }
    let inside = report.distinct_in(&["log", "home", "retire"]);
    assert!(inside * 2 >= report.total().distinct, "only {inside} images lie inside of a commit\n{report}");
}

/// At least 100,000 distinct images with optimization, fewer without.
#[test]
fn power_cuts_at_every_moment_lose_nothing_that_was_flushed() {
    let distinct = if cfg!(debug_assertions) { 6_000 } else { 110_000 };
    let report = Campaign { distinct_max: Some(distinct), ..Campaign::default() }.run(&program);
    expect_much(&report);
    assert!(report.total().distinct >= distinct);
}

/// For as long as somebody wants.
#[test]
fn long() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let Some(seconds) = number("VHDKIT_CRASH_SECONDS") else { return };
    let first_seed = number("VHDKIT_CRASH_SEED").unwrap_or(1_000_000);
    let time_max = Some(Duration::from_secs(seconds));
    let report = Campaign { first_seed, time_max, ..Campaign::default() }.run(&program);
    expect_much(&report);
}

/// Makes a state again: `VHDKIT_CRASH_AGAIN="seed state"`, as a violation says it, with the steps that led there.
#[test]
fn again() {
    let Ok(text) = std::env::var("VHDKIT_CRASH_AGAIN") else { return };
    let (seed, state) = text.split_once(' ').expect("seed and state");
    let replayed = Campaign::default().replay(&program, seed.parse().expect("seed"), state).expect("the state is made");
    panic!("{:?}\n{:#?}", replayed.verdict, replayed.point.pending());
}
