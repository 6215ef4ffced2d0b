//! `zero` and `discard`: a range of a disk that is not needed any more.

use std::io::Write as _;
use std::ops::Range;

use serde_json::json;
use vhdkit::Error;
use vhdkit::format::metadata::DiskType;
use vhdkit::image::{BlockDevice as _, Image};
use vhdkit::ops::Progress as _;

use crate::args::{DiscardArgs, RangeArgs, WritingArgs, ZeroArgs};
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::input::stopped;
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::Session;

/// What is done at once, between two looks at signals. A multiple of every block size, so that no block is cut.
const PIECE_BYTES: u64 = 1 << 30;

/// What becomes of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Zero,
    Discard,
}

impl Change {
    const fn verb(self) -> &'static str {
        match self {
            Self::Zero => "zeroed",
            Self::Discard => "discarded",
        }
    }

    fn apply(self, image: &Image, range: Range<u64>) -> Result<(), Error> {
        match self {
            Self::Zero => image.write_zeroes(range, true),
            Self::Discard => image.discard(range),
        }
    }
}

/// Makes a range read as zero.
pub(crate) fn zero(context: &Context, args: &ZeroArgs) -> Result<Answer, Failure> {
    clear(context, &args.range, &args.writing, Change::Zero)
}

/// Gives back the space of a range.
pub(crate) fn discard(context: &Context, args: &DiscardArgs) -> Result<Answer, Failure> {
    clear(context, &args.range, &args.writing, Change::Discard)
}

fn clear(context: &Context, args: &RangeArgs, writing: &WritingArgs, change: Change) -> Result<Answer, Failure> {
    let session = Session::open(context, &args.image, writing)?;
    let range = session.range(args.offset, args.length)?;
    let allocated_before = session.layer()?.allocated_bytes()?;
    let title = if change == Change::Zero { "zeroing" } else { "discarding" };
    let bar = Bar::new(title, &context.ui, &context.interrupt);
    let mut position = range.start;
    let mut work = || {
        while position < range.end {
            let boundary = (position / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES);
            let end = boundary.min(range.end);
            change.apply(&session.image, position..end)?;
            position = end;
            if bar.advance(position - range.start, Some(args.length)).is_break() && position < range.end {
                return Err(stopped());
            }
        }
        Ok(())
    };
    let worked = work();
    drop(bar);
    session.finish(worked, change.verb(), position - range.start)?;
    let given_back = allocated_before.saturating_sub(session.layer()?.allocated_bytes()?);
    report(context, args, &session, change, given_back)?;
    Ok(Answer::Yes)
}

fn report(
    context: &Context,
    args: &RangeArgs,
    session: &Session<'_>,
    change: Change,
    given_back: u64,
) -> Result<(), Failure> {
    let note = (given_back == 0 && change == Change::Discard).then(|| why_nothing(&session.image));
    if context.ui.json {
        let field = format!("bytes_{}", change.verb());
        return Ui::print_json(&json!({
            "file": show::path(&args.image),
            "offset": args.offset,
            field: args.length,
            "bytes_given_back": given_back,
            "note": note,
            "replay": session.replayed_json(),
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut text = format!("{}: ", show::path(&args.image));
    match note {
        Some(note) => text.push_str(&note),
        None => {
            text.push_str(&format!("{} {} at offset {}", sizes::long(args.length), change.verb(), args.offset));
            if given_back > 0 {
                text.push_str(&format!(", {} given back", sizes::short(given_back)));
            }
        }
    }
    let mut out = context.ui.out();
    writeln!(out, "{text}{}", session.replayed_text())?;
    Ok(out.flush()?)
}

/// Why a discard gave nothing back.
fn why_nothing(image: &Image) -> String {
    if image.disk_type() == DiskType::Fixed {
        return "nothing is given back, since a fixed disk keeps all its space".to_owned();
    }
    let block = sizes::short(image.allocation_unit());
    format!("nothing is given back, since no block of {block} with data lies in the range as a whole")
}
