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
pub use history::{Content, FlushTicket, SectorHistory, Ticket, fill_stamp};
pub use image::CrashImage;
pub use operation::{Counts, Fault, FaultError, OpInfo, OpKind, Operation};
pub use pages::{PAGE_BYTES, Page, PageMap, SECTOR_BYTES};
pub use storage::{Hook, SimStorage};
pub use tear::Tear;
pub use verify::{ImageJudge, Replay, frozen_parents, verify_image, verify_view};
