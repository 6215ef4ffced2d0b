//! A client of the NBD protocol for tests: blocking, strict with the server, and free to break every rule itself.
//!
//! It shares no code with vhdkit's server. Each part of the protocol is reachable alone and raw: whatever bytes a test
//! wants to send go through `send_bytes`; whatever comes back is judged by the protocol's document, and what breaks a
//! rule is a [`Fault::Broken`].
//!
//! ```text
//! stream --Handshake::start--> Handshake --go--> Transmission --send, receive--> Reply
//! ```
//!
//! ```no_run
//! use std::path::Path;
//! use vhdkit_testkit::nbd::{Handshake, Request, connect, wire};
//!
//! let mut handshake = Handshake::start(connect::unix(Path::new("disk.socket"))?)?;
//! handshake.extended_headers()?;
//! handshake.set_meta_context("", &["base:allocation"])?;
//! let mut disk = handshake.go("", &[wire::info::BLOCK_SIZE])?;
//!
//! // Several at once, and the replies in whatever order.
//! let write = disk.send(Request::write(0, b"bytes").with_flags(wire::command_flag::FUA))?;
//! let status = disk.send(Request::block_status(1 << 20, 1 << 40))?;
//! let first = disk.receive()?;
//! assert!(first.cookie == write || first.cookie == status);
//! disk.disconnect()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![allow(clippy::big_endian_bytes, reason = "the protocol is big-endian")]

pub mod connect;
mod fault;
mod handshake;
mod reply;
mod request;
mod transmission;
pub mod wire;

pub use fault::Fault;
pub use handshake::{Context, ExportInfo, Handshake, OptionReply, expect_closed};
pub use reply::{Chunk, Extent, Message, Reply, ServerError};
pub use request::Request;
pub use transmission::Transmission;
pub use wire::{Header, Mode};
