//! The one error type of the library, one word wide.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::format::finding::{Code, Finding, Location};

/// What a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file is not a VHDX at all.
    NotVhdx,
    /// The file breaks a rule of the format.
    Corrupt,
    /// The file is shorter than its structures say.
    Truncated,
    /// The file needs something that this implementation does not know: a version, a required region or item.
    Unsupported,
    /// The file is legal, but beyond a limit of this implementation.
    Limit,
    /// The log holds changes that are not in place yet, and the caller asked not to look past that.
    NeedsReplay,
    /// The image has a parent, and the caller's resolver does not allow any place where it could be.
    ParentDenied,
    /// No file was found where the image's parent could be.
    ParentNotFound,
    /// A parent was found, but it is not the one that the child was made from.
    ParentMismatch,
    /// The chain of parents has a cycle or is too deep.
    Chain,
    /// Data is asked for that only a parent could give, and the image was opened without parents.
    ParentMissing,
    /// The image or storage cannot be written.
    ReadOnly,
    /// The range lies outside the disk.
    OutOfRange,
    /// An argument does not fit: an unaligned size, an option that contradicts another.
    InvalidArgument,
    /// Something under way stands in the way; trying again later may work.
    Busy,
    /// Writing failed before in a way that leaves the state of the medium unknown; only reading works any more.
    Poisoned,
    /// The file is in use elsewhere.
    Locked,
    /// The target exists already.
    Exists,
    /// Doing it would lose data or break something, and the caller did not insist.
    Refused,
    /// The caller cancelled the operation.
    Cancelled,
    /// The operating system reported an error.
    Io,
}

impl ErrorKind {
    /// A stable name for scripts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotVhdx => "not-vhdx",
            Self::Corrupt => "corrupt",
            Self::Truncated => "truncated",
            Self::Unsupported => "unsupported",
            Self::Limit => "limit",
            Self::NeedsReplay => "needs-replay",
            Self::ParentDenied => "parent-denied",
            Self::ParentNotFound => "parent-not-found",
            Self::ParentMismatch => "parent-mismatch",
            Self::Chain => "chain",
            Self::ParentMissing => "parent-missing",
            Self::ReadOnly => "read-only",
            Self::OutOfRange => "out-of-range",
            Self::InvalidArgument => "invalid-argument",
            Self::Busy => "busy",
            Self::Poisoned => "poisoned",
            Self::Locked => "locked",
            Self::Exists => "exists",
            Self::Refused => "refused",
            Self::Cancelled => "cancelled",
            Self::Io => "io",
        }
    }
}

/// Everything that can go wrong, with what a caller acts on ([`Error::kind`]), which rule of the format was broken
/// ([`Error::code`]), which file it was ([`Error::path`]) and what to do next ([`Error::hint`]).
pub struct Error(Box<Repr>);

struct Repr {
    kind: ErrorKind,
    code: Option<Code>,
    location: Option<Location>,
    message: String,
    hint: Option<String>,
    path: Option<PathBuf>,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

/// The result of nearly everything in this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with a message: lower case, no full stop, what and where.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Repr {
            kind,
            code: None,
            location: None,
            message: message.into(),
            hint: None,
            path: None,
            source: None,
        }))
    }

    /// An error of the operating system, with what was being done.
    #[must_use]
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, what);
        error.0.source = Some(Box::new(source));
        error
    }

    /// The error that a finding of severity error is.
    #[must_use]
    pub fn from_finding(finding: &Finding) -> Self {
        let mut error = Self::new(finding.code().kind(), finding.to_string());
        error.0.code = Some(finding.code());
        error.0.location = Some(finding.location().clone());
        error.0.hint = finding.code().hint().map(str::to_owned);
        error
    }

    /// Adds what the user can do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Names the file, unless one is named already (the innermost wins: a parent's error is the parent's).
    #[must_use]
    pub fn with_path(mut self, path: impl AsRef<Path>) -> Self {
        if self.0.path.is_none() {
            self.0.path = Some(path.as_ref().to_owned());
        }
        self
    }

    /// Adds the code of the rule that was broken.
    #[must_use]
    pub fn with_code(mut self, code: Code) -> Self {
        self.0.code = Some(code);
        self
    }

    /// What a caller can act on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The code of the rule that the image breaks, when it is the image's fault.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        self.0.code
    }

    /// Where in the image, when it is the image's fault.
    #[must_use]
    pub fn location(&self) -> Option<&Location> {
        self.0.location.as_ref()
    }

    /// What the user can do next.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The file that the error is about.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The message alone, without file, cause and hint.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The operating system's error, when it is one.
    #[must_use]
    pub fn io_error(&self) -> Option<&io::Error> {
        self.0.source.as_deref().and_then(|source| source.downcast_ref())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", crate::text::escape(&path.to_string_lossy()))?;
        }
        f.write_str(&self.0.message)?;
        match &self.0.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("code", &self.0.code)
            .field("path", &self.0.path)
            .field("message", &self.0.message)
            .field("source", &self.0.source)
            .finish_non_exhaustive()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        }
    }
}
