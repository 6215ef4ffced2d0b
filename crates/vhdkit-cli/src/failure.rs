//! How a run ends: the only place where exit codes are decided and errors are put into words.

use std::io;
use std::path::PathBuf;

use clap::error::ErrorKind as ClapKind;
use serde_json::{Value, json};
use vhdkit::text::escape;
use vhdkit::{Error, ErrorKind};

use crate::show;

/// What a command that did its work has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done; clean; equal.
    Yes,
    /// Errors were found; the disks differ.
    No,
}

/// Why a command did not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line makes no sense to clap, or asks it for help.
    Clap(clap::Error),
    /// The command line makes no sense.
    Usage { message: String, hint: String },
    /// The library says so.
    Library(Error),
    /// A change of an image ended before its end.
    Cut { error: Error, done: Done },
    /// Standard output cannot be written.
    Output(io::Error),
}

/// How far a change of an image came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// What was done: "written", "zeroed".
    pub(crate) verb: &'static str,
    /// So many bytes from the start.
    pub(crate) bytes: u64,
    /// Whether the image was closed, and so all of that is in it for good.
    pub(crate) closed: bool,
}

impl Done {
    fn to_text(self) -> String {
        let Self { verb, bytes, closed } = self;
        let were = if bytes == 1 { "byte was" } else { "bytes were" };
        if closed {
            format!("{bytes} {were} {verb} before, and the image is valid")
        } else if bytes == 0 {
            format!("0 bytes were {verb}; the image could not be closed")
        } else {
            format!("{bytes} {were} {verb} before, but the image could not be closed, so that they may be missing")
        }
    }
}

impl Failure {
    /// A command line that makes no sense, and what would.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// True when whoever reads our output has seen enough.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        let error = match self {
            Self::Output(error) => Some(error),
            Self::Library(error) => error.io_error(),
            Self::Clap(_) | Self::Usage { .. } | Self::Cut { .. } => None,
        };
        error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Library(error)
    }
}

/// Only for writing to standard output; everything else says what it was doing, by [`Error::io`].
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// The exit code of a run that no signal stopped.
pub(crate) fn exit_code(result: &Result<Answer, Failure>) -> u8 {
    match result {
        Ok(Answer::Yes) => 0,
        Ok(Answer::No) => 1,
        Err(failure) if failure.is_broken_pipe() => 0,
        Err(Failure::Clap(error)) if !error.use_stderr() => 0,
        Err(Failure::Clap(_) | Failure::Usage { .. }) => 2,
        Err(Failure::Output(_)) => 5,
        Err(Failure::Library(error) | Failure::Cut { error, .. }) => exit_code_of_kind(error.kind()),
    }
}

fn exit_code_of_kind(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::OutOfRange | ErrorKind::InvalidArgument => 2,
        ErrorKind::NotVhdx | ErrorKind::Unsupported | ErrorKind::Limit => 3,
        ErrorKind::Corrupt | ErrorKind::Truncated => 4,
        ErrorKind::ParentDenied
        | ErrorKind::ParentNotFound
        | ErrorKind::ParentMismatch
        | ErrorKind::Chain
        | ErrorKind::ParentMissing
        | ErrorKind::NeedsReplay
        | ErrorKind::ReadOnly
        | ErrorKind::Locked
        | ErrorKind::Busy
        | ErrorKind::Exists
        | ErrorKind::Refused => 6,
        _ => 5, // Io, Poisoned; Cancelled only comes with a signal, whose code goes first
    }
}

/// An error in the parts that people and scripts want.
#[derive(Debug)]
pub(crate) struct Report {
    kind: &'static str,
    code: Option<&'static str>,
    rule: Option<&'static str>,
    message: String,
    file: Option<String>,
    offset: Option<u64>,
    hint: String,
    exit_code: u8,
    done: Option<Done>,
}

impl Report {
    /// Takes a failure apart. Everything in the report is safe to print.
    pub(crate) fn new(failure: &Failure, exit_code: u8) -> Self {
        let plain = |kind, message: String, hint: &str| Self {
            kind,
            code: None,
            rule: None,
            message,
            file: None,
            offset: None,
            hint: escape(hint).into_owned(),
            exit_code,
            done: None,
        };
        match failure {
            Failure::Clap(error) => plain("usage", clap_message(error), "see `vhdkit --help`"),
            Failure::Usage { message, hint } => plain("usage", escape(message).into_owned(), hint),
            Failure::Output(error) => {
                plain("io", format!("cannot write to standard output: {error}"), io_hint(error.kind()))
            }
            Failure::Library(error) => Self::of_library(error, exit_code),
            Failure::Cut { error, done } => {
                let mut report = Self::of_library(error, exit_code);
                if !done.closed && is_full(error) {
                    // The library's hint promises more than holds for an image that could not be closed.
                    report.hint = "make room, then do it again; what was on the disk before is safe".to_owned();
                }
                Self { message: format!("{}; {}", report.message, done.to_text()), done: Some(*done), ..report }
            }
        }
    }

    fn of_library(error: &Error, exit_code: u8) -> Self {
        let mut message = escape(error.message()).into_owned();
        if let Some(source) = std::error::Error::source(error) {
            message = format!("{message}: {}", escape(&source.to_string()));
        }
        let rule = error.code().map(|code| code.rule());
        if let Some(rule) = rule.filter(|rule| !message.contains(rule)) {
            message = format!("{message} [{rule}]");
        }
        Self {
            kind: error.kind().as_str(),
            code: error.code().map(|code| code.as_str()),
            rule,
            message,
            file: error.path().map(show::path),
            offset: error.location().and_then(|location| location.offset()),
            hint: escape(&hint(error)).into_owned(),
            exit_code,
            done: None,
        }
    }

    /// For people: `vhdkit: FILE: what, where [rule]`, and a line with the next step.
    pub(crate) fn to_text(&self) -> String {
        let file = self.file.as_ref().map(|file| format!("{file}: ")).unwrap_or_default();
        format!("vhdkit: {file}{}\n  hint: {}\n", self.message, self.hint)
    }

    /// For scripts.
    pub(crate) fn to_json(&self) -> Value {
        let mut report = json!({ "error": {
            "kind": self.kind,
            "code": self.code,
            "rule": self.rule,
            "message": self.message,
            "file": self.file,
            "offset": self.offset,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }});
        if let Some(done) = self.done
            && let Some(error) = report.get_mut("error").and_then(Value::as_object_mut)
        {
            error.insert("bytes_done".to_owned(), done.bytes.into());
            error.insert("closed".to_owned(), done.closed.into());
        }
        report
    }
}

/// What clap has to say, without the usage and the hints that follow, on one line.
fn clap_message(error: &clap::Error) -> String {
    if error.kind() == ClapKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command is needed".to_owned();
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("tip:"));
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with("For more information")).collect();
    escape(&lines.join(" ")).into_owned()
}

/// The next step after a library error.
pub(crate) fn hint(error: &Error) -> String {
    error.hint().map_or_else(|| fallback_hint(error), str::to_owned)
}

/// The next step where the library does not name one.
fn fallback_hint(error: &Error) -> String {
    let text = match error.kind() {
        ErrorKind::NotVhdx => {
            "`file` may tell what it is; a raw disk is named with --from raw where a source is asked for"
        }
        ErrorKind::Corrupt => return check_hint(error),
        ErrorKind::Truncated => "the file was cut off; get a complete copy",
        ErrorKind::Unsupported => "use the program that made the image to convert it",
        ErrorKind::Limit => "this image goes beyond what vhdkit handles; use the program that made it to convert it",
        ErrorKind::NeedsReplay => {
            "open it without --strict, or put its log into place with `vhdkit replay` when nobody uses it"
        }
        ErrorKind::ParentDenied => "allow the place with --parent-dir DIR, or name the parent with --parent FILE",
        ErrorKind::ParentNotFound => "name the parent with --parent FILE, or its directory with --parent-dir DIR",
        ErrorKind::ParentMismatch => {
            "name the right parent with --parent FILE; one that was changed after the child was made cannot be used"
        }
        ErrorKind::Chain => "look at each file of the chain with `vhdkit info --no-parents`",
        ErrorKind::ParentMissing => "leave out --no-parents, or name the parent with --parent FILE",
        ErrorKind::ReadOnly => "write to a copy, or to a place where writing is allowed",
        ErrorKind::OutOfRange => "`vhdkit info` tells the size of the disk",
        ErrorKind::InvalidArgument => "see the command's --help for what is allowed",
        ErrorKind::Locked => "close the program that uses the file, or look at it all the same with --force-share",
        ErrorKind::Busy => "try again when the other operation has ended",
        ErrorKind::Poisoned => {
            "what was there before is safe; find the cause of the first error, then open the image again"
        }
        ErrorKind::Exists => "choose another name, or replace it with --force",
        ErrorKind::Refused => "choose another target",
        ErrorKind::Cancelled => "run it again; nothing was left behind",
        _ => error.io_error().map_or("run it again", |error| io_hint(error.kind())),
    };
    text.to_owned()
}

/// True for an error that making room cures.
fn is_full(error: &Error) -> bool {
    let kind = error.io_error().map(io::Error::kind);
    matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

fn check_hint(error: &Error) -> String {
    match error.path() {
        Some(path) => format!("run `vhdkit check {}` to see everything that is damaged", show::path(path)),
        None => "run `vhdkit check` to see everything that is damaged".to_owned(),
    }
}

/// The next step after an error of the operating system.
fn io_hint(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => "check the name and the directory",
        io::ErrorKind::PermissionDenied => "check the permissions of the file and its directory, or run as its owner",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space, or choose another file system",
        io::ErrorKind::InvalidFilename => "choose a shorter name",
        io::ErrorKind::FileTooLarge => {
            "raise the limit (ulimit -f), or choose a file system that takes files of this size"
        }
        io::ErrorKind::IsADirectory => "name a file, not a directory",
        io::ErrorKind::NotADirectory => "check the directories in the name",
        io::ErrorKind::ReadOnlyFilesystem => "choose a place that can be written",
        io::ErrorKind::UnexpectedEof => "the file became shorter meanwhile; make sure that nobody changes it",
        _ => "the system log (dmesg) may say more about the device",
    }
}

/// The error of a file that this program opened or wrote itself.
pub(crate) fn file_error(path: impl Into<PathBuf>, what: &str, error: io::Error) -> Failure {
    Failure::Library(Error::io(what, error).with_path(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_an_exit_code_and_a_next_step() {
        let cases = [
            (ErrorKind::NotVhdx, 3),
            (ErrorKind::Corrupt, 4),
            (ErrorKind::Truncated, 4),
            (ErrorKind::Unsupported, 3),
            (ErrorKind::Limit, 3),
            (ErrorKind::NeedsReplay, 6),
            (ErrorKind::ParentDenied, 6),
            (ErrorKind::ParentNotFound, 6),
            (ErrorKind::ParentMismatch, 6),
            (ErrorKind::Chain, 6),
            (ErrorKind::ParentMissing, 6),
            (ErrorKind::ReadOnly, 6),
            (ErrorKind::OutOfRange, 2),
            (ErrorKind::InvalidArgument, 2),
            (ErrorKind::Locked, 6),
            (ErrorKind::Busy, 6),
            (ErrorKind::Poisoned, 5),
            (ErrorKind::Exists, 6),
            (ErrorKind::Refused, 6),
            (ErrorKind::Io, 5),
        ];
        for (kind, expected) in cases {
            let failure = Failure::Library(Error::new(kind, "what\u{1b} happened"));
            let result = Err(failure);
            assert_eq!(exit_code(&result), expected, "{kind:?}");
            let Err(failure) = result else { unreachable!() };
            let report = Report::new(&failure, expected);
            assert!(report.hint.len() > 8, "{kind:?}");
            assert!(report.to_text().starts_with("vhdkit: what\\u{1b} happened"), "{}", report.to_text());
            assert_eq!(report.to_json()["error"]["exit_code"], expected);
        }
    }

    #[test]
    fn what_was_cut_off_says_how_far_it_came() {
        let full = || Error::io("cannot write", io::Error::from_raw_os_error(28)).with_path("a.vhdx");
        let cut = |bytes, closed| {
            let failure = Failure::Cut { error: full(), done: Done { verb: "written", bytes, closed } };
            let code = exit_code(&Err(failure));
            assert_eq!(code, 5);
            let failure = Failure::Cut { error: full(), done: Done { verb: "written", bytes, closed } };
            Report::new(&failure, code)
        };
        let text = cut(4096, true).to_text();
        assert!(text.contains("a.vhdx: cannot write: No space left on device"), "{text}");
        assert!(text.contains("4096 bytes were written before, and the image is valid"), "{text}");
        assert!(text.contains("hint: free some space"), "{text}");
        assert!(cut(8192, false).to_text().contains("hint: make room, then do it again"));
        let error = cut(1, false).to_json()["error"].clone();
        assert_eq!((&error["bytes_done"], &error["closed"]), (&1.into(), &false.into()));
        assert!(error["message"].as_str().unwrap_or_default().contains("1 byte was written before, but"), "{error}");
        assert!(cut(0, false).to_text().contains("0 bytes were written; the image could not"));
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let pipe = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(exit_code(&Err(Failure::Output(pipe()))), 0);
        assert_eq!(exit_code(&Err(Failure::Library(Error::io("cannot write", pipe())))), 0);
        assert_eq!(exit_code(&Err(Failure::Output(io::Error::from(io::ErrorKind::StorageFull)))), 5);
    }
}
