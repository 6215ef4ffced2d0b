//! File systems and partition tables that are damaged in every way never give a range free that is in use.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]
#![allow(dead_code, reason = "each of these programs uses a part of what they share")]

mod damage;
mod ext;
mod fat;
mod ntfs;
mod support;
mod xfs;

use vhdkit_testkit::harness::main_with;

fn main() {
    main_with(damage::cases());
}
