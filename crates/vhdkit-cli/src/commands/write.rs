//! `write`: bytes from a file or standard input into a disk.

use std::io::Write as _;

use serde_json::json;
use vhdkit::image::{BlockDevice as _, Image};
use vhdkit::ops::Progress as _;
use vhdkit::{Error, ErrorKind};

use crate::args::WriteArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::input::{Input, stopped};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::Session;

/// Bytes that are read and written at once. Pieces end at multiples of this, so that no sector is written in parts.
const PIECE_BYTES: u64 = 1 << 20;
/// What is written is made durable after the first piece and then after so many bytes each: a crash in a long stream loses
/// no more than that. The first time also finds room for the log, so that a file system that gets full later does not
/// keep the image from being closed.
const FLUSH_BYTES: u64 = 256 << 20;

/// Writes the input into the disk.
pub(crate) fn run(context: &Context, args: &WriteArgs) -> Result<Answer, Failure> {
    let session = Session::open(context, &args.image, &args.writing)?;
    let mut input = Input::open(args.input.as_deref(), &context.interrupt, &context.ui)?;
    check_input(&session, &input, args)?;
    let bar = Bar::new("writing", &context.ui, &context.interrupt);
    let mut pouring = Pouring { image: &session.image, offset: args.offset, written: 0, bar: &bar, ui: &context.ui };
    let worked = pouring.pour(&mut input);
    let written = pouring.written;
    drop(bar);
    session.finish(worked, "written", written)?;
    report(context, args, &session, written)?;
    Ok(Answer::Yes)
}

/// Everything that can be refused before the first byte.
fn check_input(session: &Session<'_>, input: &Input<'_>, args: &WriteArgs) -> Result<(), Failure> {
    let identity = session.layer()?.storage().identity();
    if identity.is_some() && identity == input.identity() {
        let error = Error::new(ErrorKind::Refused, "the input is the image itself").with_path(&args.image);
        return Err(error.with_hint("name another input; `vhdkit read` gives what the disk holds").into());
    }
    session.range(args.offset, 0)?;
    let rest = session.image.size() - args.offset; // the offset lies on the disk
    match input.length() {
        Some(length) if length > rest => {
            let offset = args.offset;
            let what = format!(
                "the input has {length} bytes, and from offset {offset} to the end of the disk there are {rest}"
            );
            let error = input.name(Error::new(ErrorKind::OutOfRange, what));
            Err(error.with_hint("shorten the input, or choose a smaller --offset; nothing was changed").into())
        }
        _ => Ok(()),
    }
}

/// Input on its way into a disk.
struct Pouring<'a> {
    image: &'a Image,
    /// Where the first byte goes.
    offset: u64,
    written: u64,
    bar: &'a Bar,
    ui: &'a Ui,
}

impl Pouring<'_> {
    /// Reads and writes until the input ends.
    fn pour(&mut self, input: &mut Input<'_>) -> Result<(), Error> {
        let mut buffer = vec![0; usize::try_from(PIECE_BYTES).unwrap_or_default()];
        let mut flush_at = PIECE_BYTES;
        loop {
            let position = self.offset + self.written; // at most the size of the disk
            let rest = self.image.size() - position;
            let wanted = usize::try_from(rest.min(PIECE_BYTES - position % PIECE_BYTES)).unwrap_or_default();
            // Behind the end of the disk one byte is asked for, to see whether there is more.
            let wanted = wanted.max(1);
            let (count, ended) = input.fill(buffer.get_mut(..wanted).unwrap_or_default());
            let piece = buffer.get(..count).unwrap_or_default();
            if count as u64 > rest {
                return Err(too_long(self.image.size()));
            }
            if self.written == 0 {
                input.look(piece, self.ui);
            }
            self.image.write_at(piece, position)?;
            self.written += count as u64;
            if let Some(error) = ended {
                return Err(error);
            }
            if count < wanted {
                return Ok(());
            }
            if self.written >= flush_at {
                self.image.flush()?;
                flush_at = self.written + FLUSH_BYTES; // far below 2^64: both are on the disk
            }
            if self.bar.advance(self.written, input.length().filter(|length| *length >= self.written)).is_break() {
                return Err(stopped());
            }
        }
    }
}

fn too_long(size: u64) -> Error {
    let what = format!("the input goes on behind the end of the disk, which has {size} bytes");
    Error::new(ErrorKind::OutOfRange, what).with_hint("shorten the input, or choose a smaller --offset")
}

fn report(context: &Context, args: &WriteArgs, session: &Session<'_>, written: u64) -> Result<(), Failure> {
    if context.ui.json {
        return Ui::print_json(&json!({
            "file": show::path(&args.image),
            "offset": args.offset,
            "bytes_written": written,
            "replay": session.replayed_json(),
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let (file, offset) = (show::path(&args.image), args.offset);
    let mut out = context.ui.out();
    if written == 0 {
        writeln!(out, "{file}: the input is empty; nothing was changed")?;
        return Ok(out.flush()?);
    }
    writeln!(out, "{file}: {} written at offset {offset}{}", sizes::long(written), session.replayed_text())?;
    Ok(out.flush()?)
}
