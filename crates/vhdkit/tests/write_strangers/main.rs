//! Strangers judge what we write: QEMU replays our logs and writes in turn with us, file systems go through us, and images
//! that others made stay valid.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::single_range_in_vec_init,
    reason = "test code"
)]
#![allow(dead_code, reason = "the modules of other suites are used in part")]

#[path = "../write_support/array.rs"]
mod array;
#[path = "../crash/bases.rs"]
mod bases;
#[path = "../crash/truth.rs"]
mod truth;
#[path = "../crash/world.rs"]
mod world;

mod alternation;
mod corpus;
mod crash_states;
mod file_systems;
mod logs;
mod support;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with(
        [crash_states::cases(), alternation::cases(), corpus::cases(), file_systems::cases(), logs::cases()]
            .into_iter()
            .flatten()
            .collect(),
    );
}
