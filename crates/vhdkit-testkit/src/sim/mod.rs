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

mod crash;
mod operation;
mod pages;
mod storage;
mod tear;

pub use crash::{CrashPoint, Sampling, State};
pub use operation::{Counts, Fault, FaultError, OpInfo, OpKind, Operation};
pub use pages::{PAGE_BYTES, Page, PageMap, SECTOR_BYTES};
pub use storage::{Hook, SimStorage};
pub use tear::Tear;
