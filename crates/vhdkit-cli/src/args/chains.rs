//! `chain`, `diff` and `apply` as they are typed.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::{Format, WritingArgs};

/// Draw the chains of images, and say which link is broken and how to mend it
///
/// For a directory: every chain in it. For an image: the tree in which it stands, with its ancestors and what was made from
/// them, as far as these lie in its directory or where --parent-dir and --parent say. Files are known by what they hold, not by
/// their names; they are only read, never locked, so that images in use can be looked at, too. A parent that was moved or
/// renamed is found by its identity. Ends with 1 when a link is broken, or an image is too damaged to tell.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit chain /vms
  vhdkit chain checkpoint.avhdx
  vhdkit chain /vms --recursive --json
  vhdkit chain checkpoint.avhdx --parent-dir /vms/base")]
pub(crate) struct ChainArgs {
    /// An image, or a directory with images
    #[arg(value_name = "IMAGE|DIRECTORY", value_hint = ValueHint::AnyPath)]
    pub(crate) place: PathBuf,
    /// Also look into the directories beneath
    #[arg(long)]
    pub(crate) recursive: bool,
}

/// Tell what changed between two disks, or what a child changed; export it as an incremental backup
///
/// With one image: what it changed against its parent. With two: what makes A become B. Disks that share files, as those of
/// one chain do, are compared by their tables alone, and nothing that they share is read: what was written with the bytes
/// that were there before counts as changed, too, unless --exact compares the contents. Other disks are always compared by their
/// contents. --export writes what has to be written to A (the parent) to make it B (the child); `vhdkit apply` does that.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit diff checkpoint.avhdx
  vhdkit diff monday.vhdx tuesday.vhdx --exact --json
  vhdkit diff checkpoint.avhdx --export tuesday.increment
  vhdkit diff checkpoint.avhdx --export - | zstd > tuesday.increment.zst
  vhdkit diff a.vhdx b.raw --exit-code && echo equal")]
pub(crate) struct DiffArgs {
    /// The first disk; alone, a child that is compared with its parent
    #[arg(value_name = "A", value_hint = ValueHint::FilePath)]
    pub(crate) a: PathBuf,
    /// The second disk
    #[arg(value_name = "B", value_hint = ValueHint::FilePath)]
    pub(crate) b: Option<PathBuf>,
    /// With one image: compare it with what lies so many layers beneath it
    #[arg(long, value_name = "N", conflicts_with = "b", value_parser = clap::value_parser!(u16).range(1..=255))]
    pub(crate) layers: Option<u16>,
    /// Compare the contents of what may differ
    #[arg(long)]
    pub(crate) exact: bool,
    /// End with 1 when there is a difference
    #[arg(long)]
    pub(crate) exit_code: bool,
    /// List all ranges
    #[arg(long)]
    pub(crate) all: bool,
    /// Write an incremental backup here; "-" is standard output
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) export: Option<PathBuf>,
    /// Export without checksums of what A holds in the changed ranges, and do not read that
    #[arg(long, requires = "export")]
    pub(crate) no_base_checksums: bool,
    /// Format of the first disk
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) from_a: Option<Format>,
    /// Format of the second disk
    #[arg(long, value_name = "FORMAT", value_enum, requires = "b")]
    pub(crate) from_b: Option<Format>,
}

/// Apply an incremental backup to the disk that it was made from
///
/// FILE is what `vhdkit diff --export` wrote. All of it is read and every checksum compared before the first write, and the
/// target must be what FILE was made from: the same image, or a copy, known by its data write GUID. Afterwards it holds what the
/// newer disk held, and has its data write GUID, so that the next increment can be applied, and children of the newer disk take it as
/// their parent. When it is cut off by a crash, apply the same FILE again.
///
/// A raw disk has no identity, and an image may have another one (after a resize): --force applies to those, too, when every
/// range that is replaced still holds what it should. What lies in between cannot be known then. Writing to an image that others name
/// as their parent breaks those; it is refused when they are found.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit apply tuesday.increment copy-of-monday.vhdx
  vhdkit apply tuesday.increment copy-of-monday.vhdx --dry-run --json
  vhdkit apply tuesday.increment copy-of-monday.vhdx --verify
  vhdkit apply tuesday.increment disk.raw --force")]
pub(crate) struct ApplyArgs {
    /// What was exported
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// The disk to change
    #[arg(value_name = "TARGET", value_hint = ValueHint::FilePath)]
    pub(crate) target: PathBuf,
    /// Check everything and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// With --force: go on after an apply that was cut, whatever the target holds now
    #[arg(long)]
    pub(crate) resume: bool,
    /// Read what was written and compare it
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) verify: bool,
    /// Go on although images are found that have the target as their parent
    #[arg(long)]
    pub(crate) break_children: bool,
    /// Look whether this file has the target as its parent, too (repeatable)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) child: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}
