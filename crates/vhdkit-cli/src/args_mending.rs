//! The commands for files that are broken.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use crate::args::FromArgs;
use crate::args::maintain::ChildrenArgs;
use crate::sizes;

/// Mend what `check` finds, where it is certain what is right
///
/// Without --apply nothing is changed: the plan tells for every finding what would be done and what would be lost. With
/// --apply an undo record is written and made durable first; --restore puts it back, bit for bit, also after a crash in the
/// middle. Where it is not certain what is right, nothing is done, and the report says what to do instead; `recover` makes a
/// new image of what it can find. A log that was not put into place is put into place first, so make sure that nobody uses the
/// image: Windows' locks (WSL, a share) cannot be seen. Where mending changes what the guest sees and there are children, --apply
/// is refused. Ends with 1 when something is left.
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
    /// Say what would be done and change nothing, as without --apply
    #[arg(long, conflicts_with = "apply")]
    pub(crate) dry_run: bool,
    /// Where the undo record goes, instead of IMAGE.undo; it must not exist. (An IMAGE.undo that was put back gets another name)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "apply")]
    pub(crate) undo: Option<PathBuf>,
    /// Put this undo record back
    #[arg(long, value_name = "RECORD", value_hint = ValueHint::FilePath, conflicts_with = "apply")]
    pub(crate) restore: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) children: ChildrenArgs,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Make a new image of what can be found in a file that cannot be opened any more
///
/// The file is only read. Headers, region tables, metadata and the BAT are taken where they are whole and searched for where
/// they are not; sizes are inferred, and blocks whose entries are gone are placed by the file systems inside, by their
/// neighbours and by the order of the file. The report tells what is certain and what is guessed: check the file systems on
/// the new disk before you rely on it. The target appears under its name when it is complete. A differencing disk becomes one
/// without parent: with --parent it is the whole disk, without it what only the parent has reads as zeros. Ends with 1 when
/// data was guessed or is lost.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit recover broken.vhdx rescued.vhdx --dry-run
  vhdkit recover broken.vhdx rescued.vhdx
  vhdkit recover broken.avhdx rescued.vhdx --parent base.vhdx
  vhdkit recover broken.vhdx rescued.vhdx --block-size 32M --size 127G")]
pub(crate) struct RecoverArgs {
    /// What is left of an image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// The image to make
    #[arg(value_name = "TARGET", value_hint = ValueHint::FilePath)]
    pub(crate) target: PathBuf,
    /// Bytes of a block, when it is known: a power of two from 1M to 256M
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) block_size: Option<u64>,
    /// Size of the disk, when it is known
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) size: Option<u64>,
    /// Bytes of a logical sector, when it is known: 512 or 4096
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) sector_size: Option<u64>,
    /// Say what would be found, and make nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not wait until the target is on the medium
    #[arg(long)]
    pub(crate) no_sync: bool,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}
