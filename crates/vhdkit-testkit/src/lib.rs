//! Test support of vhdkit: images made byte by byte from the specification, the disk a guest must see in them,
//! dirty logs, and strangers to judge the result.
//!
//! Nothing here but the storage suite and the crash simulator uses the library under test: one mind must not write
//! both sides.
//!
//! ```text
//! ImageBuilder --build--> BuiltImage { file: SparseFile, model: ModelDisk, layout: Layout }
//!                              |
//!              DirtyPlan --apply: truth moves into the log, the model stays
//! ```
//!
//! # An image and what is in it
//!
//! ```
//! use vhdkit_testkit::{BlockSpec, Content, Guid, ImageBuilder};
//!
//! let image = ImageBuilder::new(64 << 20, 1 << 20)
//!     .pattern_block(3, 42)
//!     .block(5, BlockSpec::present(Content::bytes(b"hello")))
//!     .build();
//! assert_eq!(image.model.read(5 << 20, 5), b"hello");
//! assert_eq!(image.file.read(image.layout.payload_block(5), 5), b"hello");
//! assert_eq!(image.file.read_u64(image.layout.payload_entry(4)), 0);
//! assert_eq!(image.file.read_u32(image.layout.item(Guid::FILE_PARAMETERS)), 1 << 20);
//! ```
//!
//! # Something broken on purpose
//!
//! Every field may be set to anything. Checksums follow the fields; [`ImageBuilder::patch`] goes around them.
//!
//! ```
//! use vhdkit_testkit::spec::Checksum;
//! use vhdkit_testkit::{BlockSpec, Guid, ImageBuilder};
//!
//! let newer_header_torn = ImageBuilder::new(64 << 20, 1 << 20)
//!     .with(|builder| builder.headers[1].checksum = Checksum::Wrong)
//!     .build();
//! let block_of_three_mebibytes = ImageBuilder::new(64 << 20, 1 << 20)
//!     .with(|builder| {
//!         let data = [(3_u32 << 20).to_le_bytes(), [0; 4]].concat();
//!         builder.metadata.item(Guid::FILE_PARAMETERS).data = Some(data);
//!     })
//!     .build();
//! let two_blocks_overlap = ImageBuilder::new(64 << 20, 2 << 20)
//!     .block(0, BlockSpec::new(6).at(8))
//!     .block(1, BlockSpec::new(6).at(9))
//!     .build();
//! # drop((newer_header_torn, block_of_three_mebibytes, two_blocks_overlap));
//! ```
//!
//! # A chain
//!
//! ```
//! use std::sync::Arc;
//! use vhdkit_testkit::{BlockSpec, Content, ImageBuilder, SectorMask};
//!
//! let base = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).named("base.vhdx").build();
//! let child = ImageBuilder::new(8 << 20, 2 << 20)
//!     .differencing(&Arc::new(base))
//!     .block(0, BlockSpec::partial(Content::Fill(7), SectorMask::new(|sector| sector == 1)))
//!     .named("child.vhdx")
//!     .build();
//! assert_eq!(child.model.read(512, 512), [7; 512]);
//! assert_ne!(child.model.read(0, 512), [7; 512], "the parent's");
//! let directory = tempfile::tempdir()?;
//! let path = child.write_chain(directory.path())?;
//! # drop(path);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # A dirty log
//!
//! ```
//! use vhdkit_testkit::{DescriptorSpec, DirtyPlan, Guid, ImageBuilder, LogEntrySpec, LogRing};
//!
//! // The BAT's truth is in three log entries that wrap around the end of the ring; its home is zero.
//! let mut image = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).build();
//! let plan = DirtyPlan::new(1).move_bat(&image).with(|plan| plan.ring_start = 0xF_F000);
//! plan.apply(&mut image);
//! assert_eq!(image.file.read_u64(image.layout.payload_entry(0)), 0);
//!
//! // Or entry by entry, with anything wrong in them.
//! let mut ring = LogRing::new(image.layout.log, image.layout.log_length);
//! let entry = LogEntrySpec::new(Guid::seeded(9), 17, image.file.len())
//!     .descriptor(DescriptorSpec::zero(image.layout.bat, 4096))
//!     .with(|entry| entry.descriptor_count = Some(u32::MAX));
//! let placed = ring.place(&mut image.file, &entry);
//! assert_eq!(placed.length, 4096);
//! ```
//!
//! # Random images
//!
//! ```
//! use vhdkit_testkit::{RandomOptions, random_dirty_plan, random_image};
//!
//! let mut image = random_image(1234, &RandomOptions { virtual_size_max: 1 << 30, ..RandomOptions::chain(2) });
//! random_dirty_plan(5678, &image).apply(&mut image);
//! ```
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
pub mod counting;
pub mod damage;
pub mod dirty;
pub mod faulty;
pub mod foreign;
pub mod guid;
pub mod harness;
pub mod layout;
pub mod log;
pub mod model;
pub mod nbd;
pub mod random;
pub mod rng;
pub mod sim;
pub mod sparse;
pub mod spec;
pub mod storage_suite;

pub use builder::{BitmapSpec, BlockSpec, BuiltImage, ImageBuilder, Place};
pub use content::{Content, SectorMask, pattern};
pub use counting::{CountingStorage, Counts, Method};
pub use dirty::DirtyPlan;
pub use faulty::FaultyStorage;
pub use guid::Guid;
pub use layout::{Geometry, Layout};
pub use log::{DescriptorSpec, LogEntrySpec, LogRing};
pub use model::ModelDisk;
pub use random::{RandomOptions, random_dirty_plan, random_image};
pub use rng::Rng;
pub use sparse::SparseFile;
pub use spec::{Checksum, LocatorSpec};
