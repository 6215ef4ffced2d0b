//! An NBD server over [`BlockDevice`](vhdkit::image::BlockDevice)s: VHDX images with their chains, layers, raw disks.
//!
//! The protocol is that of the NBD project (`doc/proto.md` there): fixed newstyle, TLS by STARTTLS, structured replies,
//! extended headers, block status. A [`Server`] has [`Export`]s and limits; [`Server::run`] serves listeners until somebody
//! asks it to stop through a [`Handle`], and then lets every request under way end.
//!
//! ```
//! use std::os::unix::net::{UnixListener, UnixStream};
//! use std::sync::Arc;
//! use vhdkit::image::{BlockDevice, OpenOptions};
//! use vhdkit::ops::create::{CreateOptions, create};
//! use vhdkit::storage::{MemoryStorage, Storage};
//! use vhdkit_nbd::{Export, Listener, Options, Server};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
//! create(&file, &CreateOptions::new(64 << 20), &())?;
//! let image = Arc::new(OpenOptions::new().write(true).open(file, None)?);
//!
//! let export = Export::new("disk", Arc::clone(&image) as Arc<dyn BlockDevice>)?.writable(true);
//! let server = Server::new(vec![export], Options::default())?;
//! let handle = server.handle();
//! let directory = tempfile::tempdir()?;
//! let listener = UnixListener::bind(directory.path().join("socket"))?;
//! let thread = std::thread::spawn(move || server.run(vec![Listener::Unix(listener)]));
//! // ... clients come and go ...
//! drop(UnixStream::connect(directory.path().join("socket"))?);
//! handle.stop();
//! thread.join().expect("the server does not panic")?;
//! image.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What a request costs
//!
//! Each connection has a thread. What it can answer without waiting (what is in the page cache, holes, writes to mapped
//! blocks) it answers at once, many requests with one receiving and one sending system call. What has to wait for a medium
//! or for a commit goes to worker threads that the connections to an export share, so that one slow read holds up nobody else;
//! only writes of more than 256 KiB, which come in pieces, are written by the connection's own thread in any case.

mod budget;
mod channel;
mod connection;
mod counters;
mod export;
mod handshake;
mod input;
mod jobs;
mod outgoing;
mod pool;
mod replies;
mod requests;
mod server;
mod tls;
mod wire;

pub use counters::Totals;
pub use export::{Export, InvalidName};
pub use server::{Handle, Listener, Options, Server, StartError};
pub use tls::{Tls, TlsError};

/// For fuzzing: the pure parts, on bytes. Not part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::handshake::fuzz as handshake;
    pub use crate::requests::fuzz as requests;
    pub use crate::server::fuzz as conversation;
}
