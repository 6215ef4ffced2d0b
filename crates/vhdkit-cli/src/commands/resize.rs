//! `resize`: a larger or smaller disk in the same file.

use std::io::Write as _;

use serde_json::{Value, json};
use vhdkit::guest::Smallest;
use vhdkit::image::{BlockDevice as _, Image};
use vhdkit::ops::resize::{BackupGpt, ResizeOptions, ResizeReport, moves_backup_gpt, resize, smallest_size};
use vhdkit::text::escape;
use vhdkit::{Error, ErrorKind};

use crate::args::ResizeArgs;
use crate::args::maintain::NewSize;
use crate::cli::Context;
use crate::commands::dependents;
use crate::failure::{Answer, Failure};
use crate::opening::open_image;
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::{Session, refuse_dirty};

/// Changes the size.
pub(crate) fn run(context: &Context, args: &ResizeArgs) -> Result<Answer, Failure> {
    if args.dry_run {
        crate::commands::info::refuse_raw(context, &args.image, args.writing.from.from)?;
        let image = open_image(context, &args.image)?;
        let options = options(context, args, &image)?;
        let refusal = refuse_children(context, args, &image, &options)
            .and_then(|()| refuse_dirty(&image, &args.image, &args.writing));
        let bar = Bar::new("looking", &context.ui, &context.interrupt);
        let made = resize(image, &options, &bar).map_err(|error| error.with_path(&args.image))?;
        drop(bar);
        // Also what would be refused is worth knowing.
        report(context, args, &made, Value::Null, "")?;
        refusal?;
        return Ok(Answer::Yes);
    }
    let session = Session::open(context, &args.image, &args.writing)?;
    let options = options(context, args, &session.image)?;
    refuse_children(context, args, &session.image, &options)?;
    let (image, aftermath) = session.into_parts()?;
    let bar = Bar::new("resizing", &context.ui, &context.interrupt);
    let worked = resize(image, &options, &bar);
    drop(bar);
    let made = aftermath.name(worked)?;
    report(context, args, &made, aftermath.replayed_json(), &aftermath.replayed_text())?;
    Ok(Answer::Yes)
}

fn refuse_children(
    context: &Context,
    args: &ResizeArgs,
    image: &Image,
    options: &ResizeOptions,
) -> Result<(), Failure> {
    match image.layers().first() {
        Some(layer) if options.size != image.size() => dependents::refuse(context, layer, &args.children),
        Some(layer) if options.move_backup_gpt => {
            let bar = Bar::new("looking", &context.ui, &context.interrupt);
            // What stands in the way is said by the operation itself.
            let moves = moves_backup_gpt(image, &bar).unwrap_or(false);
            drop(bar);
            if moves { dependents::refuse(context, layer, &args.children) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

fn options(context: &Context, args: &ResizeArgs, image: &Image) -> Result<ResizeOptions, Failure> {
    let old = image.size();
    let outside = |what: String| Error::new(ErrorKind::InvalidArgument, what).with_path(&args.image);
    let size = match args.size {
        Some(NewSize::To(size)) => size,
        Some(NewSize::By(more)) => {
            old.checked_add(more).ok_or_else(|| outside("the size is larger than 2^64 bytes".to_owned()))?
        }
        Some(NewSize::Less(less)) => old.checked_sub(less).filter(|size| *size > 0).ok_or_else(|| {
            outside(format!("the disk has {old} bytes, and {less} less are none"))
                .with_hint("write the new size without a sign, or take away less")
        })?,
        None => minimum(context, args, image)?,
    };
    Ok(ResizeOptions {
        size,
        allow_data_loss: args.allow_data_loss,
        move_backup_gpt: args.move_backup_gpt,
        dry_run: args.dry_run,
    })
}

/// What is left of a disk with nothing on it.
const EMPTY_BYTES: u64 = 1 << 20;

/// The smallest size at which nothing is lost.
fn minimum(context: &Context, args: &ResizeArgs, image: &Image) -> Result<u64, Failure> {
    let bar = Bar::new("looking", &context.ui, &context.interrupt);
    match smallest_size(image, &bar).map_err(|error| error.with_path(&args.image))? {
        // A file system knows nothing of the disk's sectors, when it was made in a file.
        Smallest::SafeAt { bytes, .. } => {
            let sector = u64::from(image.logical_sector_size());
            let bytes = if bytes == 0 { EMPTY_BYTES } else { bytes };
            Ok(bytes.checked_next_multiple_of(sector).map_or(image.size(), |bytes| bytes.min(image.size())))
        }
        Smallest::Unknown { reason } => {
            let what = format!("how small the disk may be is not known, as {reason}");
            let error = Error::new(ErrorKind::Refused, what).with_path(&args.image);
            Err(error.with_hint("bring what is on the disk in order in the guest first, or name a size, which is refused when it may cut something off").into())
        }
    }
}

fn report(
    context: &Context,
    args: &ResizeArgs,
    made: &ResizeReport,
    replay: Value,
    replayed: &str,
) -> Result<(), Failure> {
    let file = show::path(&args.image);
    if context.ui.json {
        return Ui::print_json(&json!({
            "file": file,
            "dry_run": args.dry_run,
            "old_size": made.old_size,
            "new_size": made.new_size,
            "old_file_size": made.old_file_size,
            "new_file_size": made.new_file_size,
            "bat_moves": made.bat_moves,
            "blocks": made.blocks,
            "first_data_cut": made.first_data_cut,
            "cut_is_unused": made.cut_is_unused,
            "smallest_size": match &made.smallest {
                Some(Smallest::SafeAt { bytes, .. }) => json!(bytes),
                _ => Value::Null,
            },
            "backup_gpt": match made.backup_gpt {
                BackupGpt::None => "none",
                BackupGpt::Unknown => "unknown",
                BackupGpt::LeftBehind => "left behind",
                BackupGpt::Moved => "moved",
                BackupGpt::InPlace => "in place",
            },
            "replay": replay,
        }));
    }
    let is_kept = made.backup_gpt == BackupGpt::LeftBehind;
    if is_kept {
        let what = if made.new_size < made.old_size {
            "the backup GPT at the end of the disk is cut off; the primary one stays"
        } else {
            "the backup GPT stays where the disk ended before"
        };
        let hint = "--move-backup-gpt puts it at the new end, as `sgdisk --move-second-header` does in the guest";
        context.ui.warn(Some(&args.image), &format!("{what}; {hint}"));
    }
    if made.backup_gpt == BackupGpt::Unknown {
        let what =
            "the partition table cannot be followed: if it is a GPT, its backup is not at the end of the disk any more";
        context.ui.warn(Some(&args.image), &format!("{what}; mend it with the tools of the guest"));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    let (old, new) = (sizes::long(made.old_size), sizes::long(made.new_size));
    if made.old_size == made.new_size {
        let done = match (made.backup_gpt, args.dry_run) {
            (BackupGpt::Moved, true) => "the backup GPT would be moved to its end; nothing was changed",
            (BackupGpt::Moved, false) => "the backup GPT was moved to its end",
            _ => "nothing was changed",
        };
        writeln!(out, "{file}: the disk has {old} already; {done}")?;
        return Ok(out.flush()?);
    }
    let verb = if args.dry_run { "would become" } else { "became" };
    writeln!(out, "{file}: the disk of {old} {verb} {new}{}", escape(replayed))?;
    if made.bat_moves {
        let moved = if args.dry_run { "needs more room and would move" } else { "needed more room and was moved" };
        writeln!(out, "  the block allocation table {moved}")?;
    }
    if made.backup_gpt == BackupGpt::Moved {
        let moved = if args.dry_run { "would be moved" } else { "was moved" };
        writeln!(out, "  the backup GPT {moved} to the new end")?;
    }
    if let Some(offset) = made.first_data_cut {
        let cut = if args.dry_run { "would be cut off" } else { "was cut off" };
        let what = if made.cut_is_unused { "what no partition and no file system holds" } else { "data" };
        writeln!(out, "  {what} {cut}, from {offset:#x} on")?;
    }
    if let Some(size) = made.new_file_size {
        writeln!(out, "  file: {}, before {}", sizes::short(size), sizes::short(made.old_file_size))?;
    } else {
        writeln!(out, "  nothing was changed")?;
    }
    Ok(out.flush()?)
}
