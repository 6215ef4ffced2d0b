//! `info`: what an image is.

mod chain;
mod dump;
mod report;

pub(crate) use report::{finding_json, replay_json};

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use vhdkit::format::finding::Severity;
use vhdkit::format::guid::Guid;
use vhdkit::image::Layer;
use vhdkit::ops::set::user_item;
use vhdkit::{Error, ErrorKind};

use crate::args::{Format, InfoArgs};
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::{Wanted, source_format};
use crate::ui::Ui;

/// Bytes of a BAT that are read to count the blocks in use. Counting more would take longer than all the rest.
const COUNTED_BAT_BYTES_MAX: u64 = 16 << 20;

/// Shows the image.
pub(crate) fn run(context: &Context, args: &InfoArgs) -> Result<Answer, Failure> {
    refuse_raw(context, &args.image, args.from.from)?;
    if args.dump {
        return dump::run(context, &args.image);
    }
    let chain = chain::open(context, &args.image)?;
    let layer = chain.image.layers().first();
    let layer = layer.ok_or_else(|| Failure::usage("the image has no layers", "report this as a bug"))?;
    if let Some(id) = args.user_metadata {
        return print_item(context, &args.image, layer, id);
    }
    if let Some(note) = layer.lock_report().and_then(|report| report.note.as_deref()) {
        context.ui.warn(None, note);
    }
    let facts = report::Facts { path: &args.image, layer, chain: &chain, space: Space::of(layer)? };
    if context.ui.json {
        Ui::print_json(&facts.to_json())?;
        return Ok(Answer::Yes);
    }
    let mut out = context.ui.out();
    facts.write(&mut out, context.ui.verbose)?;
    out.flush()?;
    Ok(Answer::Yes)
}

/// Prints the bytes of an item of a user.
fn print_item(context: &Context, path: &Path, layer: &Layer, id: Guid) -> Result<Answer, Failure> {
    if context.ui.json {
        return Err(Failure::usage("--user-metadata prints bytes, not JSON", "leave --json out"));
    }
    let Some(bytes) = user_item(layer, id)? else {
        let error = Error::new(ErrorKind::InvalidArgument, format!("there is no user item {id}")).with_path(path);
        return Err(error.with_hint("`vhdkit info` lists the items of an image").into());
    };
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes)?;
    out.flush()?;
    Ok(Answer::Yes)
}

/// Refuses what is a raw disk by its name: there is nothing in it to show or to check.
pub(crate) fn refuse_raw(context: &Context, path: &Path, given: Option<Format>) -> Result<(), Failure> {
    if source_format(path, given, Wanted::Image, "--from", &context.ui)? == Format::Vhdx || !path.exists() {
        return Ok(());
    }
    let what = if given.is_some() {
        "a raw disk has no structure"
    } else {
        "this is a raw disk by its name or kind, not a VHDX"
    };
    let error = Error::new(ErrorKind::NotVhdx, what).with_path(path);
    Err(error.with_hint("if it is a VHDX all the same, say --from vhdx").into())
}

/// How much space a file takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space {
    /// Bytes that the file system holds for the file.
    pub(crate) allocated: Option<u64>,
    /// Bytes of blocks in use; `None` when counting them would take long.
    pub(crate) in_use: Option<u64>,
    /// Why they are not counted, or cannot be.
    pub(crate) not_counted: Option<&'static str>,
}

impl Space {
    fn of(layer: &Layer) -> Result<Self, Failure> {
        let metadata = layer.storage().as_file().and_then(|file| file.metadata().ok());
        let allocated = metadata.filter(|metadata| metadata.is_file()).map(|metadata| metadata.blocks() * 512);
        if !is_quickly_counted(layer) {
            let why = "the block allocation table is large; `vhdkit check` counts them";
            return Ok(Self { allocated, in_use: None, not_counted: Some(why) });
        }
        match layer.allocated_bytes() {
            Ok(bytes) => Ok(Self { allocated, in_use: Some(bytes), not_counted: None }),
            Err(error) if error.kind() == ErrorKind::Io => Err(error.into()),
            // Everything else about the image is still worth showing.
            Err(_) => {
                let why = "the block allocation table is damaged; `vhdkit check` tells how";
                Ok(Self { allocated, in_use: None, not_counted: Some(why) })
            }
        }
    }
}

/// True when the part of the BAT that the file holds is small.
fn is_quickly_counted(layer: &Layer) -> bool {
    let bat = layer.region_table().bat;
    let (mut position, end) = (bat.file_offset, bat.file_offset.saturating_add(bat.length));
    let mut bytes = 0;
    while position < end {
        let Ok(Some(data)) = layer.storage().next_data(position..end) else { break };
        bytes += data.end - data.start;
        if bytes > COUNTED_BAT_BYTES_MAX {
            return false;
        }
        position = data.end.max(position + 1);
    }
    true
}

/// Worth showing among the findings: everything in verbose mode, otherwise what is not only a note.
fn is_shown(severity: Severity, verbose: bool) -> bool {
    verbose || severity > Severity::Note
}
