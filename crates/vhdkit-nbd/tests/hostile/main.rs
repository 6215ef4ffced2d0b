//! Clients that lie, stop, flood and vanish: after each of them a good client is served, and memory stays bounded.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::big_endian_bytes,
    reason = "test code"
)]

mod crowds;
mod handshake;
mod requests;
mod siege;
mod silence;
#[path = "../support/mod.rs"]
mod support;
mod vanishing;
