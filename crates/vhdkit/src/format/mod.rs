//! The format: bytes to values and back, without any I/O.
//!
//! Every on-disk structure is a `repr(C)` struct of little-endian fields with its size and offsets asserted at compile
//! time; every structure has one decoder, which serves opening (stop at the first error) and checking (collect all).
//! Section numbers are those of [MS-VHDX] revision 8.0; rule numbers V-... are those of `docs/format.md`.
//!
//! ```text
//! 0        64K      128K     192K      256K      320K          1M
//! | file ID | header 1 | header 2 | region 1 | region 2 | reserved | objects, any order, 1 MiB aligned ...
//! ```

pub mod bat;
pub mod checksum;
pub mod finding;
pub mod geometry;
pub mod guid;
pub mod header;
pub mod ident;
pub mod increment;
pub mod items;
pub mod locator;
pub mod log;
pub mod metadata;
pub mod region;
pub mod space;
pub mod undo;

/// Size of the header section; everything else lies behind it ([MS-VHDX] 2.2).
pub const HEADER_SECTION_BYTES: u64 = 1 << 20;
/// Size of one slot of the header section.
pub const SLOT_BYTES: u64 = 64 << 10;
/// First byte that the log may change: everything before is the file identifier and the headers.
pub const FIRST_LOGGABLE_BYTE: u64 = 3 * SLOT_BYTES;
/// Largest virtual disk ([MS-VHDX] 2.6.2.2).
pub const DISK_SIZE_MAX: u64 = 64 << 40;
