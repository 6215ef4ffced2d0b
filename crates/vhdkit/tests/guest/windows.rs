//! NTFS, FAT and exFAT inside disks: made, filled and emptied in part by strangers, and judged by their tools.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]
#![allow(dead_code, reason = "each of these programs uses a part of what they share")]

mod fat;
mod ntfs;
mod support;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with([ntfs::cases(), fat::cases()].into_iter().flatten().collect());
}
