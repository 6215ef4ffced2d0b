//! Test support of vhdkit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code: a broken expectation ends the test"
)]

pub mod builder;
pub mod content;
pub mod dirty;
pub mod foreign;
pub mod guid;
pub mod harness;
pub mod layout;
pub mod log;
pub mod model;
pub mod random;
pub mod rng;
pub mod sparse;
pub mod spec;

pub use builder::{BitmapSpec, BlockSpec, BuiltImage, ImageBuilder, Place};
pub use content::{Content, SectorMask, pattern};
pub use guid::Guid;
pub use layout::{Geometry, Layout};
pub use model::ModelDisk;
pub use sparse::SparseFile;
