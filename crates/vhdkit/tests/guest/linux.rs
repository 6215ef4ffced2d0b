//! ext2, ext3, ext4 and XFS inside disks: made, filled and emptied in part by strangers, and judged by their tools.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]
#![allow(dead_code, reason = "each of these programs uses a part of what they share")]

mod ext;
mod support;
mod xfs;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with([ext::cases(), xfs::cases()].into_iter().flatten().collect());
}
