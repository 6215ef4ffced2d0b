//! Each part of the protocol, as its document wants it, judged by a client that shares no code with the server.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::big_endian_bytes,
    reason = "test code"
)]

mod commands;
mod handshake;
mod lifetime;
mod metadata;
mod model;
mod order;
#[path = "../support/mod.rs"]
mod support;
mod tls;
