//! What `write` writes: a file, a device, or whatever comes through standard input.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Seek as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use vhdkit::storage::{FileStorage, Storage as _, StorageIdentity};
use vhdkit::{Error, ErrorKind, Probe, probe};

use crate::failure::Failure;
use crate::formats::is_standard_stream;
use crate::signals::{Interrupt, read_interruptibly};
use crate::ui::Ui;

/// Bytes that are read from front to back. Waiting for them ends when a signal comes.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    file: File,
    /// `None` is standard input.
    path: Option<&'a Path>,
    /// Bytes that are left, when that can be told beforehand.
    length: Option<u64>,
    identity: Option<StorageIdentity>,
    interrupt: Interrupt,
}

impl<'a> Input<'a> {
    /// Opens the file; without one, or with "-", standard input.
    pub(crate) fn open(path: Option<&'a Path>, interrupt: &Interrupt, ui: &Ui) -> Result<Self, Failure> {
        let path = path.filter(|path| !is_standard_stream(path));
        let file = match path {
            Some(path) => open_file(path),
            None => io::stdin().as_fd().try_clone_to_owned().map(File::from),
        };
        let mut file = file.map_err(|error| read_error(path, error))?;
        if path.is_none() && file.is_terminal() {
            ui.note("reading what is typed here; Ctrl-D at the start of a line ends it");
        }
        let metadata = file.metadata().map_err(|error| read_error(path, error))?;
        if metadata.is_dir() {
            return Err(read_error(path, io::Error::from(io::ErrorKind::IsADirectory)).into());
        }
        // Neither for pipes nor for terminals.
        let storage = file.try_clone().ok().and_then(|file| FileStorage::from_file(file, None).ok());
        let identity = storage.as_ref().and_then(|storage| storage.identity());
        let length = storage.and_then(|storage| {
            let end = storage.len().ok()?;
            Some(end.saturating_sub(file.stream_position().ok()?))
        });
        Ok(Self { file, path, length, identity, interrupt: interrupt.clone() })
    }

    /// Bytes that are left, when that can be told beforehand. There may be more: files grow, and those of /proc do not know.
    pub(crate) fn length(&self) -> Option<u64> {
        self.length
    }

    /// What tells the file apart from others.
    pub(crate) fn identity(&self) -> Option<StorageIdentity> {
        self.identity
    }

    /// Names the input in an error.
    pub(crate) fn name(&self, error: Error) -> Error {
        match self.path {
            Some(path) => error.with_path(path),
            None => error,
        }
    }

    /// Fills the buffer as far as there is something: the count, and what ended it before the buffer was full.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> (usize, Option<Error>) {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match read_interruptibly(&self.file, &self.interrupt, rest) {
                Ok(0) => break,
                Ok(count) => filled += count, // at most the rest
                Err(_) if self.interrupt.is_set() => return (filled, Some(stopped())),
                Err(error) => return (filled, Some(read_error(self.path, error))),
            }
        }
        (filled, None)
    }

    /// Says so when the first bytes are those of a VHDX: whoever has one wants the disk in it, nearly always.
    pub(crate) fn look(&self, first: &[u8], ui: &Ui) {
        if probe(first) == Probe::Vhdx {
            let what = "the input looks like a VHDX, and is written as it is";
            ui.warn(self.path, &format!("{what}; what the disk in it holds comes from `vhdkit read`"));
        }
    }
}

/// The error that a signal causes.
pub(crate) fn stopped() -> Error {
    Error::new(ErrorKind::Cancelled, "stopped by a signal").with_hint("run it again")
}

/// A FIFO is opened without waiting for whoever writes to it: that could not be interrupted. Reading waits.
fn open_file(path: &Path) -> io::Result<File> {
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

fn read_error(path: Option<&Path>, error: io::Error) -> Error {
    match path {
        Some(path) => Error::io("cannot read the input", error).with_path(path),
        None => Error::io("cannot read standard input", error),
    }
}
