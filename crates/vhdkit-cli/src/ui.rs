//! Where output goes: what was asked for to standard output, everything else to standard error.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal as _, StdoutLock, Write};
use std::os::fd::AsFd as _;
use std::path::Path;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use serde_json::{Value, json};
use vhdkit::text::escape;

use crate::args::{Color, GlobalArgs};
use crate::failure::{Failure, Report};
use crate::show;

/// Standard output with colours where they are wanted.
pub(crate) type Out = BufWriter<AutoStream<StdoutLock<'static>>>;

/// Standard output as a file: no buffer, no looking for line ends.
pub(crate) fn raw_stdout() -> io::Result<File> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?))
}

/// Headings.
pub(crate) const HEADING: Style = Style::new().bold();
/// What is fine.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// What deserves attention.
pub(crate) const DOUBTFUL: Style = AnsiColor::Yellow.on_default();
/// What is broken.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
/// What is less important.
pub(crate) const FAINT: Style = Style::new().dimmed();

/// How this run talks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ui {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    pub(crate) verbose: bool,
    color: ColorChoice,
}

impl Ui {
    pub(crate) fn new(global: &GlobalArgs) -> Self {
        let color = match global.color {
            Color::Auto => ColorChoice::Auto,
            Color::Always => ColorChoice::Always,
            Color::Never => ColorChoice::Never,
        };
        Self { json: global.json, quiet: global.quiet, verbose: global.verbose, color }
    }

    /// How to talk about a command line that was not understood.
    pub(crate) const fn before_parsing(json: bool) -> Self {
        Self { json, quiet: false, verbose: false, color: ColorChoice::Auto }
    }

    /// Standard output; flush it before the end.
    pub(crate) fn out(&self) -> Out {
        BufWriter::new(AutoStream::new(io::stdout().lock(), self.color))
    }

    /// True when people read standard output.
    pub(crate) fn out_is_terminal() -> bool {
        io::stdout().is_terminal()
    }

    /// True when the terminal shows more than ASCII, by what the locale says.
    pub(crate) fn is_unicode() -> bool {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        locale.is_some_and(|locale| {
            let locale = locale.to_ascii_lowercase();
            locale.contains("utf-8") || locale.contains("utf8")
        })
    }

    /// True when a progress bar is welcome.
    pub(crate) fn shows_progress(&self) -> bool {
        !self.quiet && !self.json && io::stderr().is_terminal()
    }

    /// Prints a JSON value to standard output.
    pub(crate) fn print_json(value: &Value) -> Result<(), Failure> {
        let mut out = BufWriter::new(io::stdout().lock());
        serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
        out.flush()?;
        Ok(())
    }

    /// Says something that the user should know, on standard error.
    pub(crate) fn warn(&self, file: Option<&Path>, message: &str) {
        if self.quiet {
            return;
        }
        let message = escape(message);
        if self.json {
            self.stderr_line(&json!({ "warning": { "file": file.map(show::path), "message": message } }).to_string());
        } else {
            let file = file.map(|file| format!("{}: ", show::path(file))).unwrap_or_default();
            self.stderr_line(&format!("vhdkit: {DOUBTFUL}warning{DOUBTFUL:#}: {file}{message}"));
        }
    }

    /// Says something that a user in front of a terminal should know, on standard error.
    pub(crate) fn note(&self, message: &str) {
        if !self.quiet && !self.json {
            self.stderr_line(&format!("vhdkit: {}", escape(message)));
        }
    }

    /// Says something that only a user who asks for more wants to know, on standard error.
    pub(crate) fn detail(&self, message: &str) {
        if self.verbose && !self.json {
            self.stderr_line(&format!("vhdkit: {}", escape(message)));
        }
    }

    /// Prints the error that ended the run.
    pub(crate) fn report(&self, failure: &Failure, exit_code: u8) {
        match failure {
            Failure::Clap(error) if !error.use_stderr() => {
                let mut out = self.out();
                let _ = write!(out, "{}", error.render().ansi()); // a closed standard output is no news here
                let _ = out.flush();
            }
            Failure::Clap(error) if !self.json => {
                let text = error.render().to_string();
                let lines: Vec<_> = text.lines().map(escape).collect();
                let text = lines.join("\n");
                self.stderr_line(&format!("vhdkit: {}", text.strip_prefix("error: ").unwrap_or(&text)));
            }
            _ if self.json => self.stderr_line(&Report::new(failure, exit_code).to_json().to_string()),
            _ => self.stderr_line(Report::new(failure, exit_code).to_text().trim_end()),
        }
    }

    /// Writes a line to standard error; when that is closed there is nobody to tell.
    pub(crate) fn stderr_line(&self, line: &str) {
        let mut stderr = AutoStream::new(io::stderr().lock(), self.color);
        let _ = writeln!(stderr, "{line}");
    }
}
