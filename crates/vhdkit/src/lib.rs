//! Read, create, check and convert VHDX disks.

pub mod error;
pub mod format;
pub mod storage;
pub mod text;
pub mod units;

pub use error::{Error, ErrorKind, Result};
