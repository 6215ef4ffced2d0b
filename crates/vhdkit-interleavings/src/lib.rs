//! vhdkit, compiled with locks and counters whose threads run in chosen orders.
//!
//! Not a copy: the files are those of the library, all but `ops`. Only `sync`, which everything under `image` takes its
//! locks, counters and patience from, is another one. Every operation on them is a point where another thread may go on,
//! and so is every operation on the file.
//!
//! ```text
//! latches   programs over gate, tokens and flushes alone    every order of small ones, many orders of larger ones
//! images    programs over whole images on a disk that       many orders, at random and by priorities: a flush alone
//!           forgets what was not synced                     has hundreds of points, so that trying all is out of reach
//! ```
//!
//! All operations are sequentially consistent here, whatever the sources ask for: what a weaker order on a real processor
//! would show is not found.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code: a broken expectation ends the test"
)]
#![allow(dead_code, unreachable_pub, reason = "the library is used in part, and all of it is private here")]
#![allow(clippy::modulo_one, reason = "there is one group of threads here")]

// The sources bring tests of their own, for real threads; as a test of its own this crate is empty.
#[cfg(not(test))]
#[path = "../../vhdkit/src/error.rs"]
pub mod error;
#[cfg(not(test))]
#[path = "../../vhdkit/src/format/mod.rs"]
pub mod format;
#[cfg(not(test))]
#[path = "../../vhdkit/src/image/mod.rs"]
pub mod image;
#[cfg(not(test))]
#[path = "../../vhdkit/src/storage/mod.rs"]
pub mod storage;
#[cfg(not(test))]
mod sync;
#[cfg(not(test))]
#[path = "../../vhdkit/src/text.rs"]
pub mod text;
#[cfg(not(test))]
#[path = "../../vhdkit/src/units.rs"]
pub mod units;

/// The latches once more: inside of `image` they are private.
#[cfg(not(test))]
#[expect(clippy::duplicate_mod, reason = "the same files, for programs over a latch alone")]
#[path = "../../vhdkit/src/image"]
mod parts {
    pub(crate) mod flushes;
    pub(crate) mod gate;
    pub(crate) mod tokens;
}

#[cfg(not(test))]
pub mod disk;
#[cfg(not(test))]
pub mod latches;
#[cfg(not(test))]
pub mod world;

#[cfg(not(test))]
pub use error::{Error, ErrorKind, Result};
