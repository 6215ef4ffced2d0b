//! Disks: VHDX images and raw ones.

mod device;
mod raw;

pub use device::{BlockDevice, Extent, ExtentKind, VisitExtent};
pub use raw::RawDisk;
