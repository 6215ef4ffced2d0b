//! The crash simulator: a storage that remembers what a power cut could lose, every state that one may leave, and
//! judges of what is found in it.
//!
//! ```text
//! Program --writes, flushes--> Image --operations--> SimStorage --hook--> other steps of the program
//!    |                                                  |
//!    +--> SectorHistory                                 +--observer--> CrashPoint --> State, State, ... --> CrashImage
//!              |                                                                                               |
//!              +------------------------------> verify_image <-------------------------------------------------+
//! ```
//!
//! [`SimStorage`] knows nothing of VHDX, and neither do [`CrashPoint`] and [`Campaign`]: the judge of a crash image is
//! given by whoever starts the campaign. [`verify_image`] is the judge for VHDX images.
//!
//! # A campaign
//!
//! ```
//! use std::sync::Arc;
//! use vhdkit::storage::Storage as _;
//! use vhdkit_testkit::rng::Rng;
//! use vhdkit_testkit::sim::{Campaign, ImageJudge, Lab, PageMap, SectorHistory, Setup};
//! use vhdkit_testkit::{BlockSpec, Content, ImageBuilder};
//!
//! let program = |rng: &mut Rng, lab: &Lab| -> Result<(), String> {
//!     let image = ImageBuilder::new(8 << 20, 1 << 20).block(2, BlockSpec::present(Content::Zero)).build();
//!     let sim = lab.start(Setup {
//!         file: PageMap::from(&image.file),
//!         history: SectorHistory::of_model(&image.model),
//!         judge: Arc::new(ImageJudge::default()),
//!         phase_source: || "payload",
//!     });
//!     // What an image under test would do: here, to a block that is mapped, in place.
//!     let sector = rng.below(2000);
//!     sim.step(format!("write sector {sector} of block 2"));
//!     let (ticket, bytes) = sim.history().start_write(2 * 2048 + sector, 8);
//!     sim.storage().write_at(&bytes, image.layout.payload_block(2) + sector * 512).map_err(|error| error.to_string())?;
//!     sim.history().finish(ticket);
//!     let flush = sim.history().start_flush();
//!     sim.storage().sync().map_err(|error| error.to_string())?;
//!     sim.history().finish_flush(flush);
//!     Ok(())
//! };
//! let report = Campaign { programs_max: Some(2), ..Campaign::default() }.run(&program);
//! report.expect_clean();
//! assert!(report.total().distinct > 50);
//! println!("{report}");
//! ```

mod campaign;
mod crash;
mod history;
mod image;
mod operation;
mod pages;
mod storage;
mod tear;
mod verify;

pub use campaign::{Campaign, Case, Judge, Lab, PhaseCount, Program, Replayed, Report, Setup, SimHandle, Violation};
pub use crash::{CrashPoint, Sampling, State};
pub use history::{Content, FlushTicket, ReadTicket, SectorHistory, Ticket, fill_stamp};
pub use image::CrashImage;
pub use operation::{Counts, Fault, FaultError, OpInfo, OpKind, Operation};
pub use pages::{PAGE_BYTES, Page, PageMap, SECTOR_BYTES};
pub use storage::{Hook, SimStorage};
pub use tear::Tear;
pub use verify::{ImageJudge, Replay, frozen_parents, verify_image, verify_view};
