//! Read, create, check and convert VHDX disks.

pub mod error;
pub mod format;
pub mod image;
pub mod ops;
pub mod storage;
pub mod text;
pub mod units;

pub use error::{Error, ErrorKind, Result};
pub use format::ident::{Probe, probe};
