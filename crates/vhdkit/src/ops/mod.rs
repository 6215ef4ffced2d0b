//! Work on whole images: create, convert, measure and compare.

pub mod apply;
mod buffer;
pub mod chain;
pub mod check;
pub mod compact;
pub mod compare;
mod contents;
pub mod convert;
pub mod create;
pub mod diff;
pub mod dump;
mod edit;
mod extended;
mod layout;
pub mod measure;
pub mod merge;
pub mod recover;
pub mod repair;
pub mod reparent;
pub mod resize;
mod segments;
pub mod set;
mod writer;

use std::ops::ControlFlow;

use crate::error::{Error, ErrorKind, Result};

pub use layout::ImagePlan;

/// Hears how far a long operation has come, and may cancel it.
pub trait Progress: Sync {
    /// `done` of `total` bytes are worked off; `total` is unknown for a stream of unknown length. `Break` cancels: the
    /// operation ends with [`ErrorKind::Cancelled`]. Called from several threads, so `done` may step back a little.
    fn advance(&self, done: u64, total: Option<u64>) -> ControlFlow<()>;
}

/// Never cancels, tells nobody.
impl Progress for () {
    fn advance(&self, _done: u64, _total: Option<u64>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Reports progress; an error when the caller cancels.
pub(crate) fn advance(progress: &dyn Progress, done: u64, total: Option<u64>) -> Result<()> {
    match progress.advance(done, total) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(ErrorKind::Cancelled, "cancelled")),
    }
}
