//! The commands for files that are broken.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use crate::args::FromArgs;

/// Mend what `check` finds, where it is certain what is right
///
/// Without --apply nothing is changed: the plan tells for every finding what would be done and what would be lost. With
/// --apply an undo record is written and made durable first; --restore puts it back, bit for bit, also after a crash in the
/// middle. Where it is not certain what is right, nothing is done, and the report says what to do instead; `recover` makes a
/// new image of what it can find. A log that was not put into place is put into place first, so make sure that nobody uses the
/// image: Windows' locks (WSL, a share) cannot be seen. Ends with 1 when something is left.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit repair disk.vhdx                              # what would be done
  vhdkit repair disk.vhdx --apply                      # do it; the record is disk.vhdx.undo
  vhdkit repair disk.vhdx --apply --undo /safe/record
  vhdkit repair disk.vhdx --restore disk.vhdx.undo     # as if nothing had been done")]
pub(crate) struct RepairArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Do what the plan says
    #[arg(long)]
    pub(crate) apply: bool,
    /// Where the undo record goes, instead of IMAGE.undo; a file that is there is never replaced
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "apply")]
    pub(crate) undo: Option<PathBuf>,
    /// Put this undo record back
    #[arg(long, value_name = "RECORD", value_hint = ValueHint::FilePath, conflicts_with = "apply")]
    pub(crate) restore: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}
