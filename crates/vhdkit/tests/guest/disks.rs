//! Partition tables, and what is only recognised inside disks: made, filled and emptied in part by strangers, and judged by their tools.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]
#![allow(dead_code, reason = "each of these programs uses a part of what they share")]

mod corpus;
mod ext;
mod fat;
mod known;
mod ntfs;
mod support;
mod tables;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with([tables::cases(), known::cases(), corpus::cases()].into_iter().flatten().collect());
}
