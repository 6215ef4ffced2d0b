//! The format: bytes to values and back, without any I/O.

pub mod finding;
