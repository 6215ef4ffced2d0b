//! What can go wrong for a client, and a reader of received bytes that says so.

use std::fmt;
use std::io;

use super::handshake::OptionReply;
use super::reply::ServerError;

/// Why something was not done.
#[derive(Debug)]
pub enum Fault {
    /// The connection failed, ended, or was silent for too long.
    Io(io::Error),
    /// The server refused an option, by the rules.
    Refused(OptionReply),
    /// The server answered a command with an error, by the rules.
    Server(ServerError),
    /// The server broke the rules of the protocol.
    Broken(String),
}

impl Fault {
    /// Whether the server closed or reset the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
        let closed = [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof];
        matches!(self, Self::Io(error) if closed.contains(&error.kind()))
    }

    /// The kind of reply with which an option was refused.
    #[must_use]
    pub fn refusal(&self) -> Option<u32> {
        match self {
            Self::Refused(reply) => Some(reply.kind),
            _ => None,
        }
    }

    /// The code with which a command failed.
    #[must_use]
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Server(error) => Some(error.code),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(formatter, "connection: {error}"),
            Self::Refused(reply) => write!(formatter, "option refused: {reply:?}"),
            Self::Server(error) => write!(formatter, "command failed: {error:?}"),
            Self::Broken(what) => write!(formatter, "the server broke the protocol: {what}"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Makes a [`Fault::Broken`] unless the condition holds.
pub(super) fn rule(holds: bool, what: impl FnOnce() -> String) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault::Broken(what())) }
}

/// Takes big-endian fields off received bytes.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let what = self.what;
        let short = || Fault::Broken(format!("{what}: {count} more bytes expected, {} there", self.bytes.len()));
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or_else(short)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        Ok(self.take(N)?.try_into().expect("as many bytes as were taken"))
    }

    pub(super) fn u16(&mut self) -> Result<u16, Fault> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_be_bytes)
    }

    /// Everything that is left, as text.
    pub(super) fn rest_text(&mut self) -> Result<String, Fault> {
        let bytes = self.take(self.bytes.len())?;
        text(bytes, self.what)
    }

    /// Everything that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// There must be nothing left.
    pub(super) fn end(self) -> Result<(), Fault> {
        rule(self.bytes.is_empty(), || format!("{}: {} bytes too many", self.what, self.bytes.len()))
    }
}

/// A string by the rules of the protocol: UTF-8, no NUL, at most 4096 bytes.
pub(super) fn text(bytes: &[u8], what: &str) -> Result<String, Fault> {
    rule(bytes.len() <= super::wire::STRING_BYTES_MAX, || format!("{what}: a string of {} bytes", bytes.len()))?;
    rule(!bytes.contains(&0), || format!("{what}: a string with NUL: {bytes:?}"))?;
    let text = std::str::from_utf8(bytes).map_err(|_| Fault::Broken(format!("{what}: not UTF-8: {bytes:?}")))?;
    Ok(text.to_owned())
}
