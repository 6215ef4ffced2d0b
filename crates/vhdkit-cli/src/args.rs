//! The command line as it is typed: clap's definitions, from which help, completions and man pages are made as well.
//!
//! Nothing is decided here. Each command turns its arguments into a plan, and then runs the plan.

mod chains;
pub(crate) mod maintain;

use std::path::PathBuf;

pub(crate) use chains::{ApplyArgs, ChainArgs, DiffArgs};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
pub(crate) use maintain::{CompactArgs, MergeArgs, ReparentArgs, ResizeArgs, SetArgs};
use vhdkit::format::guid::Guid;

use crate::args_mending::{RecoverArgs, RepairArgs};
use crate::sizes;

/// What `--help` ends with.
const EXIT_CODES: &str = "\
Sizes are binary: 64G and 64GiB are 64 * 2^30 bytes; byte counts and 0x are fine too.
A file named .raw, .img or .bin, a block device and standard input are raw disks, whatever they hold;
--from vhdx says otherwise.

Exit codes:
  0  done; clean; equal
  1  the answer is no: check found errors (with --strict: or warnings), compare or diff --exit-code found a
     difference, chain found a broken link, repair left something, recover guessed or lost something
  2  wrong usage
  3  not a VHDX, or not supported
  4  the image is corrupt or cut off (any command but check)
  5  input or output error, also a file system that is full
  6  refused: in use, parent denied, not found or the wrong one, target exists, would lose data;
     to be written and not closed properly (see --replay of write)
  130 and 143: stopped by SIGINT or SIGTERM; unfinished new files are removed, images that were written are closed.
     For serve these signals are the regular end: 0 when everything is closed

Examples:
  vhdkit info disk.vhdx
  vhdkit create new.vhdx --size 64G
  vhdkit convert disk.vhdx disk.raw
  zcat disk.raw.gz | vhdkit convert - disk.vhdx
  vhdkit check --strict disk.vhdx
  vhdkit write disk.vhdx --offset 1M --input piece.bin
  vhdkit diff checkpoint.avhdx --export tuesday.increment
  vhdkit chain /vms
  vhdkit serve disk.vhdx";

/// Look into, create, check, convert, write and serve VHDX disks: those of Hyper-V, WSL and Azure.
///
/// Reading never changes a file: an image that was not shut down cleanly is replayed in memory only. Only write, zero,
/// discard, replay, apply, repair --apply and serve --write change an image that is there. A parent is opened only when it lies in the image's own directory, or
/// where --parent-dir, --parent or --any-parent allow it.
#[derive(Debug, Parser)]
#[command(name = "vhdkit", version, propagate_version = true, arg_required_else_help = false, after_long_help = EXIT_CODES,
    subcommand_required = true, max_term_width = 120)]
pub(crate) struct LowArgs {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options for every command")]
pub(crate) struct GlobalArgs {
    /// Print JSON, and errors as a JSON object on standard error
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print no warnings and no progress, and nothing that was not asked for
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Print more
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
    /// When to use colours; NO_COLOR is respected
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value_t = Color::Auto)]
    pub(crate) color: Color,
    /// Replace a target that exists, write to a block device, write bytes to a terminal, apply to an unknown base
    #[arg(long, global = true)]
    pub(crate) force: bool,
    /// Look at an image that is in use elsewhere; what is read may be inconsistent
    #[arg(long, global = true)]
    pub(crate) force_share: bool,
    /// Also look for parents in this directory (repeatable)
    ///
    /// The directory of the image itself is always allowed, and those of no other file.
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) parent_dir: Vec<PathBuf>,
    /// Use this file as parent (repeatable, nearest first)
    ///
    /// For parents that were renamed or moved. Their identity is checked all the same. In `create`, the first one is
    /// the parent that the new image gets.
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) parent: Vec<PathBuf>,
    /// Open parents wherever the image says they are
    ///
    /// Only for images that you trust: the path was written by whoever made the image.
    #[arg(long, global = true, conflicts_with = "no_parents")]
    pub(crate) any_parent: bool,
    /// Open no parents; what only they hold cannot be read
    #[arg(long, global = true, conflicts_with = "parent_dir")]
    pub(crate) no_parents: bool,
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// In a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do. What help says about a command stands at its arguments: a comment here would hide all but its first line.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Info(InfoArgs),
    Create(CreateArgs),
    Convert(ConvertArgs),
    Check(CheckArgs),
    Compare(CompareArgs),
    Diff(DiffArgs),
    Apply(ApplyArgs),
    Chain(ChainArgs),
    Read(ReadArgs),
    Write(WriteArgs),
    Zero(ZeroArgs),
    Discard(DiscardArgs),
    Replay(ReplayArgs),
    Repair(RepairArgs),
    Resize(ResizeArgs),
    Compact(CompactArgs),
    Merge(MergeArgs),
    Reparent(ReparentArgs),
    Set(SetArgs),
    Recover(RecoverArgs),
    Serve(ServeArgs),
    Map(MapArgs),
    Measure(MeasureArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Show what an image is: type, sizes, identity, log, regions, chain
///
/// The image stays as it is. When its log holds changes that are not in place yet, they are replayed in memory and
/// shown. A parent that cannot be opened is reported in the chain and is not an error.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit info disk.vhdx
  vhdkit info --json disk.vhdx
  vhdkit info --dump disk.vhdx
  vhdkit info disk.vhdx --user-metadata 9a1c5b1e-0000-4000-8000-0123456789ab > notes.txt
  vhdkit info --parent-dir /vms/base child.avhdx")]
pub(crate) struct InfoArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Show every structure of the file, both copies
    #[arg(long)]
    pub(crate) dump: bool,
    /// Print the bytes of this item of a user, and nothing else
    #[arg(long, value_name = "GUID", value_parser = maintain::parse_guid, conflicts_with = "dump")]
    pub(crate) user_metadata: Option<Guid>,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Create an empty image, or a child of a parent
///
/// The image appears under its name when it is complete, or not at all. With --parent the image is a child: it holds
/// what is written to it, and everything else is the parent's, which must not change any more.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit create disk.vhdx --size 64G
  vhdkit create disk.vhdx --size 64G --fixed --preallocate falloc
  vhdkit create child.vhdx --parent base.vhdx
  vhdkit create disk.vhdx --size 1T --block-size 1M --logical-sector-size 4096")]
pub(crate) struct CreateArgs {
    /// The image to make
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Size of the disk; a child has its parent's size when none is given
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) size: Option<u64>,
    /// Do not wait until the image is on the medium
    #[arg(long)]
    pub(crate) no_sync: bool,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
}

/// Convert between raw and VHDX, or to another layout
///
/// Holes are not read, zeros become holes. The target appears under its name when it is complete, or not at all. A chain
/// becomes one image without parents. "-" is standard input or standard output, raw.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit convert disk.vhdx disk.raw
  vhdkit convert disk.raw disk.vhdx --block-size 1M --verify
  vhdkit convert child.avhdx whole.vhdx
  vhdkit convert dynamic.vhdx fixed.vhdx --fixed
  zcat disk.raw.gz | vhdkit convert - disk.vhdx --size 64G
  vhdkit convert disk.vhdx - | zstd > disk.raw.zst
  vhdkit convert disk.vhdx /dev/sdx --force")]
pub(crate) struct ConvertArgs {
    /// What to convert; "-" is standard input
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub(crate) source: PathBuf,
    /// What to make; "-" is standard output
    #[arg(value_name = "TARGET", value_hint = ValueHint::FilePath)]
    pub(crate) target: PathBuf,
    #[command(flatten)]
    pub(crate) from: FromArgs,
    /// Format of the target, when its name does not tell
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) to: Option<Format>,
    /// Size of the disk on standard input
    ///
    /// Without it the disk ends where the input ends.
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) size: Option<u64>,
    /// Do not look for zeros in the data
    #[arg(long)]
    pub(crate) no_zero_scan: bool,
    /// Do not wait until the target is on the medium
    #[arg(long)]
    pub(crate) no_sync: bool,
    /// Compare source and target before the target gets its name
    #[arg(long)]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
}

/// Check an image and list everything that is wrong with it
///
/// Never changes the image. Looks at this one file: parents are not opened. Every finding has a code, the rule of the
/// format that is broken, and its place.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit check disk.vhdx
  vhdkit check --strict --json disk.vhdx")]
pub(crate) struct CheckArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Judge as strictly as the strictest reader, and fail on warnings too
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Compare what two disks hold
///
/// Compares the bytes that a guest would see, whatever the format and layout. When one disk is longer, the rest of it must
/// be zero. Ends with 1 and names the first difference when they differ.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit compare disk.vhdx disk.raw
  vhdkit compare a.vhdx copy-of-a.img --from-b vhdx")]
pub(crate) struct CompareArgs {
    /// One disk
    #[arg(value_name = "A", value_hint = ValueHint::FilePath)]
    pub(crate) a: PathBuf,
    /// The other disk
    #[arg(value_name = "B", value_hint = ValueHint::FilePath)]
    pub(crate) b: PathBuf,
    /// Format of the first disk
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) from_a: Option<Format>,
    /// Format of the second disk
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) from_b: Option<Format>,
}

/// Write the bytes of a disk to standard output
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit read disk.vhdx > disk.raw
  vhdkit read disk.vhdx --offset 1M --length 512 | xxd")]
pub(crate) struct ReadArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Where to begin
    #[arg(long, value_name = "BYTES", value_parser = sizes::parse, default_value = "0")]
    pub(crate) offset: u64,
    /// How much to write; to the end of the disk when not given
    #[arg(long, value_name = "BYTES", value_parser = sizes::parse)]
    pub(crate) length: Option<u64>,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Write bytes into a disk, from a file or standard input
///
/// Neither the offset nor the length has to be a multiple of a sector. What was written is on the medium when the command
/// ends well; a crash, a full file system or a signal in between leaves a valid image. A child gets what is written, its
/// parents are never changed. Writing to an image that others name as their parent breaks those: they cannot be opened
/// any more.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit write disk.vhdx --offset 0 --input boot.bin
  printf 'hello' | vhdkit write disk.vhdx --offset 1M
  vhdkit read a.vhdx --offset 1G --length 4M | vhdkit write b.vhdx --offset 1G")]
pub(crate) struct WriteArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Where on the disk to begin
    #[arg(long, value_name = "BYTES", value_parser = sizes::parse)]
    pub(crate) offset: u64,
    /// What to write, to its end; standard input when not given, or with "-"
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) input: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// Make a range of a disk read as zero
///
/// Whole blocks give their space back, except those of a fixed disk; parts of blocks are overwritten with zeros. What a
/// parent has there is hidden. Writing to an image that others name as their parent breaks those: they cannot be opened
/// any more.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit zero disk.vhdx --offset 0 --length 1M
  vhdkit zero disk.vhdx --offset 0x7e00 --length 512 --json")]
pub(crate) struct ZeroArgs {
    #[command(flatten)]
    pub(crate) range: RangeArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// Give back the space of a range of a disk
///
/// For what the guest does not need any more. Blocks that lie in the range as a whole give their space back and read as zero;
/// the rest of the range stays as it is. A fixed disk keeps all its space. Writing to an image that others name as their
/// parent breaks those: they cannot be opened any more.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit discard disk.vhdx --offset 1G --length 3G
  vhdkit discard disk.vhdx --offset 1G --length 3G --json")]
pub(crate) struct DiscardArgs {
    #[command(flatten)]
    pub(crate) range: RangeArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
}

/// Put the log of an image that was not closed properly into place
///
/// Such a log holds changes that belong to the image; every reader has to put them over the file first. This makes them
/// part of the file, as the program that wrote them would with its next start, and tells what they were. A clean image stays
/// as it is, byte for byte. Parents are not opened. Make sure that nobody uses the image: Windows' locks (WSL, a share)
/// cannot be seen.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit info disk.vhdx      # what the log would change
  vhdkit replay disk.vhdx
  vhdkit replay disk.vhdx --json")]
pub(crate) struct ReplayArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Serve disks to NBD clients: QEMU, libnbd, the kernel's nbd
///
/// Prints the URI of each export, one a line, closes its output, and serves until SIGTERM or SIGINT: then requests under way are answered, and
/// images that were written are flushed and closed. Without an address it makes a Unix socket in a directory of its own, which
/// only its user can reach. SIGUSR1 prints what was done so far to standard error.
///
/// Images are served for reading, also to several clients at once; with --write clients may change them, under the same
/// rules as the command write: a child gets what is written, and writing to an image that others name as their parent
/// breaks those. Once everything is open the server gives up its access to other files, to making connections and to
/// running programs, where the kernel has Landlock and seccomp.
///
/// TCP beyond the own machine wants TLS with certificates for clients, or --insecure. Sockets that systemd made
/// (LISTEN_FDS) are used when there are any, under the same rule. VHDKIT_LOG=error, warn, info or debug says how much is
/// logged to standard error; it is warn by itself, and info with --verbose.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit serve disk.vhdx
  uri=$(vhdkit serve disk.vhdx --idle-exit 10 &) && nbdinfo \"$uri\"
  vhdkit serve disk.vhdx --write --socket /tmp/disk.sock
  qemu-img convert -O qcow2 'nbd+unix:///disk.vhdx?socket=/tmp/disk.sock' disk.qcow2
  nbdcopy 'nbd+unix:///disk.vhdx?socket=/tmp/disk.sock' disk.raw
  nbdfuse -r mountpoint/nbd 'nbd+unix:///disk.vhdx?socket=/tmp/disk.sock'
  guestfish --ro -a 'nbd:///disk.vhdx?socket=/tmp/disk.sock' -i
  vhdkit serve disk.vhdx --listen 127.0.0.1:10809 --name vm
  nbd-client 127.0.0.1 10809 /dev/nbd0 -N vm
  vhdkit serve child.avhdx --layers --idle-exit 60
  vhdkit serve *.vhdx --listen '[::]:10809' --tls-cert cert.pem --tls-key key.pem --tls-client-ca ca.pem

Socket activation by systemd, vhdkit.socket and vhdkit.service:
  [Socket]
  ListenStream=/run/vhdkit.sock
  SocketMode=0600

  [Service]
  ExecStart=/usr/bin/vhdkit serve --write --idle-exit 60 /srv/disk.vhdx")]
pub(crate) struct ServeArgs {
    /// The images; each is an export with the name of its file
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath, required = true)]
    pub(crate) images: Vec<PathBuf>,
    /// Let clients write
    #[arg(long)]
    pub(crate) write: bool,
    /// Put the logs of images that were not closed properly into place first
    ///
    /// Without this such an image is not served for writing: it may be in use by Windows (WSL, a share) under a lock that
    /// cannot be seen.
    #[arg(long, requires = "write")]
    pub(crate) replay: bool,
    /// Name of the export, when there is one image
    #[arg(long, value_name = "EXPORT")]
    pub(crate) name: Option<String>,
    /// Also serve each file of a chain by itself, as NAME/layer/0, NAME/layer/1, and so on
    ///
    /// For reading: what a file leaves to its parents is a hole. Layer 0 is the image itself.
    #[arg(long)]
    pub(crate) layers: bool,
    #[command(flatten)]
    pub(crate) from: FromArgs,
    #[command(flatten)]
    pub(crate) address: AddressArgs,
    /// Turn clients away when there are so many, 256 at the most
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) max_connections: u16,
    /// End when there was no client for so long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) idle_exit: Option<u32>,
    /// Look for requests for a little while before sleeping: quicker answers, for more processor time
    #[arg(long)]
    pub(crate) poll: bool,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// Where a server is reached.
#[derive(Clone, Debug, Args)]
pub(crate) struct AddressArgs {
    /// Make the Unix socket here, for its user alone
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, conflicts_with = "listen")]
    pub(crate) socket: Option<PathBuf>,
    /// Listen on this TCP port; port 0 is any that is free
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<String>,
    /// Listen beyond the own machine without knowing who the clients are
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// Who a server is, and who its clients are.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsArgs {
    /// Certificate of the server with those that lead to its root, PEM
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Serve only clients with a certificate signed by one of these, PEM
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "tls_cert")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// Serve clients without TLS too
    #[arg(long, requires = "tls_cert")]
    pub(crate) tls_optional: bool,
}

/// A range of an image's disk.
#[derive(Debug, Args)]
pub(crate) struct RangeArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Where on the disk the range begins
    #[arg(long, value_name = "BYTES", value_parser = sizes::parse)]
    pub(crate) offset: u64,
    /// Bytes of the range
    #[arg(long, value_name = "BYTES", value_parser = sizes::parse)]
    pub(crate) length: u64,
}

/// How an image is written.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WritingArgs {
    /// Put the log of an image that was not closed properly into place first
    ///
    /// Without this such an image is refused: it may be in use by Windows (WSL, a share) under a lock that cannot be seen.
    #[arg(long)]
    pub(crate) replay: bool,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Show where the data of a disk is
///
/// In a terminal a picture, elsewhere JSON of the shape that qemu-img map prints, with the name of the layer added.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit map disk.vhdx
  vhdkit map disk.vhdx --json | jq 'map(select(.data))'
  vhdkit map disk.vhdx --svg disk.svg")]
pub(crate) struct MapArgs {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Draw the picture to an SVG file; "-" is standard output
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) svg: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) from: FromArgs,
}

/// Tell how much space a conversion needs
///
/// "required" is what the target takes with the data that the source has now, "fully allocated" what it takes when every
/// block is in use.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit measure disk.raw
  vhdkit measure disk.vhdx --fixed --json
  vhdkit measure --size 64T --block-size 1M")]
pub(crate) struct MeasureArgs {
    /// What would be converted
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath, required_unless_present = "size", conflicts_with = "size")]
    pub(crate) source: Option<PathBuf>,
    /// Measure an empty disk of this size instead
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) size: Option<u64>,
    #[command(flatten)]
    pub(crate) from: FromArgs,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
}

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit completions bash > ~/.local/share/bash-completion/completions/vhdkit
  vhdkit completions zsh > ~/.zfunc/_vhdkit")]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Print the manual page, or write all of them to a directory
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vhdkit man | man -l -
  vhdkit man /usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// Write vhdkit.1 and a page for each command here
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: Option<PathBuf>,
}

/// The format of what is read.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct FromArgs {
    /// Format of the source, when its name or contents do not tell
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub(crate) from: Option<Format>,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The bytes of the file are the bytes of the disk.
    Raw,
    /// A VHDX image.
    Vhdx,
}

/// The layout of a new image.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Layout of the new image")]
pub(crate) struct LayoutArgs {
    /// Allocate every block, for good
    #[arg(long)]
    pub(crate) fixed: bool,
    /// Bytes of a block: a power of two from 1M to 256M
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) block_size: Option<u64>,
    /// Bytes of a logical sector: 512 or 4096
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) logical_sector_size: Option<u64>,
    /// Bytes of a physical sector: 512 or 4096
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) physical_sector_size: Option<u64>,
    /// Bytes of the log, a multiple of 1M; 0 chooses by itself
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    pub(crate) log_size: Option<u64>,
    /// Reserve the space of the file beforehand: of a fixed image all of it, otherwise that of the tables
    #[arg(long, value_name = "HOW", value_enum)]
    pub(crate) preallocate: Option<Preallocate>,
    /// State of blocks without data
    #[arg(long, value_name = "STATE", value_enum)]
    pub(crate) block_state: Option<BlockState>,
    /// Identity of the disk, as the guest sees it
    #[arg(long, value_name = "UUID")]
    pub(crate) disk_id: Option<Guid>,
    /// Name of the creator, for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) creator: Option<String>,
    /// File write identity, for files that must come out the same each time
    #[arg(long, value_name = "UUID")]
    pub(crate) file_write_guid: Option<Guid>,
    /// Data write identity, which children name
    #[arg(long, value_name = "UUID")]
    pub(crate) data_write_guid: Option<Guid>,
}

/// How space is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preallocate {
    /// Not at all: the file is sparse.
    None,
    /// The file system sets the space aside.
    Falloc,
    /// Zeros are written.
    Full,
}

/// What blocks without data say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BlockState {
    /// Nothing is there yet.
    NotPresent,
    /// The block reads as zero, as QEMU writes it.
    Zero,
}
