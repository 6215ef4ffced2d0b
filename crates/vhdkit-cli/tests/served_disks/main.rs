//! Disks that are served to systems: the Linux kernel's client in a guest whose power is cut, file systems that are
//! mounted, used and trimmed, and servers that are killed.
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
mod file_systems;
mod guest;
mod kills;
mod power_cut;
mod promises;
mod server;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with([power_cut::cases(), file_systems::cases(), kills::cases()].into_iter().flatten().collect());
}
