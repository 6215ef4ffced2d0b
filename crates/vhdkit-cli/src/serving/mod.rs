//! What `serve` is made of: disks, sockets, their URIs, the log, signals, and what the process gives up.

pub(crate) mod confinement;
pub(crate) mod disks;
pub(crate) mod log;
pub(crate) mod sockets;
pub(crate) mod uri;
pub(crate) mod watch;
