//! `resize`, `compact`, `merge`, `reparent` and `set` as they are typed.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use vhdkit::format::guid::Guid;

use super::WritingArgs;
use crate::sizes;

/// A new size: absolute, or by how much larger or smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    To(u64),
    By(u64),
    Less(u64),
}

/// Reads `20G`, `+5G` and `-5G`.
pub(crate) fn parse_new_size(text: &str) -> Result<NewSize, String> {
    if let Some(text) = text.strip_prefix('+') {
        return sizes::parse(text).map(NewSize::By);
    }
    if let Some(text) = text.strip_prefix('-') {
        return sizes::parse(text).map(NewSize::Less);
    }
    sizes::parse(text).map(NewSize::To)
}

/// What operations have in common that other images may depend on.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChildrenArgs {
    /// Another place where a child of the image lies (repeatable); its own directory is looked through in any case
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) child: Vec<PathBuf>,
    /// Go on although children of the image cannot be opened afterwards
    #[arg(long)]
    pub(crate) break_children: bool,
}

/// Make a disk larger or smaller, in place
///
/// Up to 64 TiB. What a larger disk adds reads as zero; the guest then makes its partitions and file systems larger. A disk is made
/// smaller only as far as no partition and no file system is cut off; what lies outside of them is, and the report says so. Where
/// they are not understood, everything behind the new end has to be zero, and a file system that is not in order has to be mended
/// first. The backup of a GPT, which lies at the end of the disk, is named and, on request, moved, also later (the same size
/// again). Children of the image do not accept it as their parent any more; when there are any, this is refused.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit resize disk.vhdx 100G
  vhdkit resize disk.vhdx +20G --move-backup-gpt
  vhdkit resize disk.vhdx -5G --dry-run
  vhdkit resize disk.vhdx --minimum")]
pub(crate) struct ResizeArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// The new size, or with + or - in front by how much
    #[arg(
        value_name = "SIZE|+SIZE|-SIZE",
        value_parser = parse_new_size,
        allow_hyphen_values = true,
        required_unless_present = "minimum",
        conflicts_with = "minimum"
    )]
    pub(crate) size: Option<NewSize>,
    /// The smallest size at which nothing is lost
    #[arg(long)]
    pub(crate) minimum: bool,
    /// Cut off data
    #[arg(long)]
    pub(crate) allow_data_loss: bool,
    /// Put the backup GPT where the disk ends afterwards
    #[arg(long)]
    pub(crate) move_backup_gpt: bool,
    /// Say what would happen, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) children: ChildrenArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// Make the file of an image smaller, in place
///
/// Drops blocks that hold only zeros, and blocks that are free in the file systems inside (ext2/3/4, NTFS, FAT, exFAT, XFS; on the
/// whole disk or in GPT and MBR partitions), moves blocks from the end of the file into the holes, and cuts it. The guest's
/// files stay as they are. What is not understood, or not in order, is left alone and named. Needs room for one block.
/// Dropping free blocks breaks children of the image; when there are any, that is refused.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit compact ext4.vhdx --dry-run
  vhdkit compact ext4.vhdx
  vhdkit compact parent.vhdx --no-filesystems   # with children: drop zeros only
  vhdkit compact disk.vhdx --no-zero-scan --json")]
pub(crate) struct CompactArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Say what would be gained, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not read the blocks to find those that hold only zeros
    #[arg(long)]
    pub(crate) no_zero_scan: bool,
    /// Do not look for file systems inside the disk
    #[arg(long)]
    pub(crate) no_filesystems: bool,
    #[command(flatten)]
    pub(crate) children: ChildrenArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// Merge a child into its parent, or into one further down
///
/// The parent then holds the child's disk, with its size and identity. A crash at any moment leaves a chain that
/// opens and shows the same disk; merging again finishes the work. Images that depend on a file that changes are looked for in
/// the directories of the chain, and refuse the merge. The merged files stay, and still show the same disk, unless
/// --delete removes them. To make one file of a whole chain without touching it, use `vhdkit convert`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit merge checkpoint.avhdx
  vhdkit merge leaf.avhdx --into base.vhdx --delete
  vhdkit merge leaf.avhdx --into base.vhdx --dry-run")]
pub(crate) struct MergeArgs {
    /// The child
    #[arg(value_name = "CHILD", value_hint = ValueHint::FilePath)]
    pub(crate) child_image: PathBuf,
    /// Merge everything above this file of the chain into it; the child's own parent if not given
    #[arg(long, value_name = "ANCESTOR", value_hint = ValueHint::FilePath)]
    pub(crate) into: Option<PathBuf>,
    /// Remove the files that were merged
    #[arg(long)]
    pub(crate) delete: bool,
    /// Say what would be copied, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Another image that may depend on a file of the chain (repeatable)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) child: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// Tell a child where its parent is, or give it another one
///
/// For parents that were moved or renamed: the file named is checked to be the same disk, and its relative path is
/// written into the child. A parent that is not the disk that the child was made on is refused, as the result would be a
/// mixture of both that nobody ever wrote; if you know that the contents are the same, use --ignore-id-mismatch.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit chain .                                    # which links are broken
  vhdkit reparent checkpoint.avhdx ../base/disk.vhdx
  vhdkit reparent checkpoint.avhdx restored.vhdx --ignore-id-mismatch")]
pub(crate) struct ReparentArgs {
    /// The child
    #[arg(value_name = "CHILD", value_hint = ValueHint::FilePath)]
    pub(crate) child_image: PathBuf,
    /// Its parent
    #[arg(value_name = "PARENT", value_hint = ValueHint::FilePath)]
    pub(crate) parent_image: PathBuf,
    /// Accept a parent that is not the disk that the child was made on
    #[arg(long)]
    pub(crate) ignore_id_mismatch: bool,
    /// Say what would change, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) children: ChildrenArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// An item of a user and the file that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ItemFile {
    pub(crate) id: Guid,
    pub(crate) file: PathBuf,
}

/// Reads `GUID=FILE`.
pub(crate) fn parse_item_file(text: &str) -> Result<ItemFile, String> {
    let (id, file) = text.split_once('=').ok_or("write GUID=FILE")?;
    if file.is_empty() {
        return Err("write the name of a file behind the =".to_owned());
    }
    Ok(ItemFile { id: parse_guid(id)?, file: PathBuf::from(file) })
}

/// Reads a GUID, with or without braces.
pub(crate) fn parse_guid(text: &str) -> Result<Guid, String> {
    let bare = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    bare.parse().map_err(|_| "not a GUID; write for example 01234567-89ab-cdef-0123-456789abcdef".to_owned())
}

/// Change what an image says about itself: identity, sector size, items of users
///
/// All changes happen at one instant. `vhdkit info` shows them; `vhdkit info IMAGE --user-metadata GUID` prints the bytes of an item of
/// a user. Another disk ID or sector size is something that the guest sees: children of the image do not accept it as
/// their parent any more, and when there are any, that is refused.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:
  vhdkit set disk.vhdx --disk-id 01234567-89ab-cdef-0123-456789abcdef
  vhdkit set disk.vhdx --physical-sector-size 512
  vhdkit set disk.vhdx --user-metadata 9a1c5b1e-0000-4000-8000-0123456789ab=notes.txt
  vhdkit set disk.vhdx --remove-user-metadata 9a1c5b1e-0000-4000-8000-0123456789ab",
    group = clap::ArgGroup::new("what").required(true).multiple(true)
)]
pub(crate) struct SetArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// The identity that the guest sees (SCSI page 83)
    #[arg(long, value_name = "UUID", value_parser = parse_guid, group = "what")]
    pub(crate) disk_id: Option<Guid>,
    /// 512 or 4096
    #[arg(long, value_name = "N", group = "what")]
    pub(crate) physical_sector_size: Option<u32>,
    /// Make the contents of a file an item of a user (repeatable)
    #[arg(long, value_name = "GUID=FILE", value_parser = parse_item_file, group = "what")]
    pub(crate) user_metadata: Vec<ItemFile>,
    /// Take an item of a user out (repeatable)
    #[arg(long, value_name = "GUID", value_parser = parse_guid, group = "what")]
    pub(crate) remove_user_metadata: Vec<Guid>,
    /// Say what would change, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) children: ChildrenArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}
