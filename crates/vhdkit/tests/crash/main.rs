//! Power cuts at every moment of random programs, and the proof that the simulator finds every rule that is broken.
//!
//! `VHDKIT_CRASH_SECONDS=3600 cargo test --release -p vhdkit --test crash -- long --ignored --nocapture` is the long mode;
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
use vhdkit_testkit::sim::{Campaign, Lab, Report, Violation};

use bases::{Kind, base, long_headers};
use world::{Style, World};

const STYLE: Style = Style { steps: 60, nested_percent: 12, follow_percent: 50, ..Style::PLAIN };

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

/// What has to be met often: once in so many images.
const OFTEN: [(&str, u64); 6] = [
    ("images whose newest log entry goes on at the start of the ring", 100),
    ("images with either header copy damaged", 20),
    ("dirty logs replayed in place", 10),
    ("second cuts while replaying", 10),
    ("reads by plans that were held", 2000),
    ("flushes that came in the middle of another", 6_000),
];

/// What to type to see a violation again.
fn see_again(violation: &Violation) -> Option<String> {
    let state = violation.state.as_ref()?;
    let variable = format!("VHDKIT_CRASH_AGAIN=\"{} {state}\"", violation.seed);
    Some(format!("{variable} cargo test --release -p vhdkit --test crash -- again --ignored --exact --nocapture"))
}

/// Nothing was found, every phase was met, the short ones too (home and retire: one image in a hundred each), and at
/// least half of the images lie inside of a commit.
fn expect_much(report: &Report) {
    println!("{report}");
    if let Some(again) = report.violation.as_ref().and_then(see_again) {
        println!("{again}");
    }
    report.expect_clean();
    let total = report.total().distinct;
    for phase in ["start", "payload", "log", "home", "retire", "replay", "close"] {
        let images = report.distinct_in(&[phase]);
        let least = if ["home", "retire"].contains(&phase) { total.div_ceil(100) } else { 1 };
        assert!(images >= least, "only {images} images in phase {phase}\n{report}");
    }
    for (what, least) in OFTEN {
        let count = report.tallied(what);
        // Without optimization there are half a dozen programs, of which one more or less decides.
        let least = if cfg!(debug_assertions) { least * 10 } else { least };
        assert!(count * least >= total, "only {count} {what}\n{report}");
    }
    let inside = report.distinct_in(&["log", "home", "retire"]);
    assert!(inside * 2 >= total, "only {inside} images lie inside of a commit\n{report}");
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
#[ignore = "runs for as long as VHDKIT_CRASH_SECONDS says"]
fn long() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = number("VHDKIT_CRASH_SECONDS").expect("VHDKIT_CRASH_SECONDS says for how long");
    let first_seed = number("VHDKIT_CRASH_SEED").unwrap_or(1_000_000);
    let time_max = Some(Duration::from_secs(seconds));
    let report = Campaign { first_seed, time_max, ..Campaign::default() }.run(&program);
    expect_much(&report);
}

/// Makes a state again: `VHDKIT_CRASH_AGAIN="seed state"`, as a violation says it, with the steps that led there.
#[test]
#[ignore = "makes the state again that VHDKIT_CRASH_AGAIN names"]
fn again() {
    let text = std::env::var("VHDKIT_CRASH_AGAIN").expect("VHDKIT_CRASH_AGAIN names a seed and a state");
    let (seed, state) = text.split_once(' ').expect("seed and state");
    let replayed = Campaign::default().replay(&program, seed.parse().expect("seed"), state).expect("the state is made");
    panic!("{:?}\n{:#?}", replayed.verdict, replayed.point.pending());
}
