//! Read, write, create, check and convert VHDX disks: the format of Hyper-V, WSL and Azure's tools.
//!
//! # Tour
//!
//! - [`image::OpenOptions`] opens an [`image::Image`]: fixed, dynamic or differencing, with its chain of parents. A dirty
//!   log is replayed into memory; files are never changed by reading them. Opened with
//!   [`write(true)`](image::OpenOptions::write), it takes writes, zeroes, discards and flushes; a crash at any moment loses
//!   nothing that was flushed (`docs/durability.md`).
//! - [`image::BlockDevice`] is what images and raw disks ([`image::RawDisk`]) have in common: `read_at` with `&self` from
//!   many threads, and [`visit_extents`](image::BlockDevice::visit_extents), which tells data from zeros and holes and names
//!   the layer and the place in its file.
//! - [`ops`] works on whole images: [`create`](ops::create), [`convert`](ops::convert), [`check`](ops::check),
//!   [`compare`](ops::compare), [`measure`](ops::measure), [`dump`](ops::dump); and on broken ones:
//!   [`repair`](ops::repair), [`recover`](ops::recover).
//! - [`storage::Storage`] is all that the library asks of the outside world; files, block devices, memory and overlays are
//!   there, and you can bring your own.
//! - [`mod@format`] turns bytes into values and back, without any I/O, and holds the numbered rules.
//!
//! ```
//! use std::sync::Arc;
//! use vhdkit::image::{BlockDevice, OpenOptions};
//! use vhdkit::ops::create::{CreateOptions, create};
//! use vhdkit::storage::{MemoryStorage, Storage};
//!
//! # fn main() -> vhdkit::Result<()> {
//! let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
//! create(&file, &CreateOptions::new(64 << 30), &())?;
//!
//! let image = OpenOptions::new().open(file, None)?;
//! assert_eq!(image.size(), 64 << 30);
//! let mut sector = [0xff; 512];
//! image.read_at(&mut sector, 1 << 30)?;
//! assert_eq!(sector, [0; 512]);
//! # Ok(())
//! # }
//! ```
//!
//! Writing is the same with `write(true)`, and ends with [`close`](image::Image::close), which says whether all went well:
//!
//! ```
//! # use std::sync::Arc;
//! # use vhdkit::image::{BlockDevice, OpenOptions};
//! # use vhdkit::ops::create::{CreateOptions, create};
//! # use vhdkit::storage::{MemoryStorage, Storage};
//! # fn main() -> vhdkit::Result<()> {
//! # let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
//! # create(&file, &CreateOptions::new(64 << 30), &())?;
//! let image = OpenOptions::new().write(true).open(file, None)?;
//! image.write_at(b"boot", 0)?;
//! image.write_zeroes(1 << 20..1 << 30, true)?;
//! image.flush()?; // what was written is durable
//! image.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What to trust
//!
//! Everything in a file is hostile input: each structure is checked before it is used, numbers are added with care, memory
//! is bounded before it is taken, and no input makes the library panic. A parent is opened only where a
//! [`image::ParentResolver`] that you give says so; the default opens none. Text from an image is escaped before it is
//! printed ([`text::escape`]). What the rules are, and what each of them does when it is broken, is in `docs/format.md`.

pub mod error;
pub mod format;
pub mod guest;
pub mod image;
pub mod ops;
pub mod storage;
mod sync;
pub mod text;
pub mod units;

pub use error::{Error, ErrorKind, Result};
pub use format::ident::{Probe, probe};
