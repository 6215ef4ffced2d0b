//! Test support of vhdkit.

pub mod storage_suite;
