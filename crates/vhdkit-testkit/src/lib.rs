//! Test support of vhdkit.
