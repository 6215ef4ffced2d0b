//! `resize`, `compact` and `merge` on disks with real file systems: made, filled, emptied in part by strangers, and judged by them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

#[path = "../common/mod.rs"]
mod common;

mod alone;
mod compact;
mod disks;
mod merge;
mod resize;
mod truth;
mod vhdx;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with([compact::cases(), alone::cases(), resize::cases(), merge::cases()].into_iter().flatten().collect());
}
