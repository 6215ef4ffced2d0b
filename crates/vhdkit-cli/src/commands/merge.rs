//! `merge`: a child into one of its parents.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use vhdkit::image::{Image, Layer};
use vhdkit::ops::chain::directory_of;
use vhdkit::ops::merge::{MergeOptions, MergeReport, merge};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage as _};
use vhdkit::{Error, ErrorKind};

use crate::args::MergeArgs;
use crate::cli::Context;
use crate::commands::dependents::children;
use crate::failure::{Answer, Failure};
use crate::opening::open_image;
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::ui::Ui;
use crate::writing::{lock_warning_of, warn_of_change_tracking};

/// Merges.
pub(crate) fn run(context: &Context, args: &MergeArgs) -> Result<Answer, Failure> {
    crate::commands::info::refuse_raw(context, &args.child_image, args.writing.from.from)?;
    if context.global.force_share {
        return Err(Failure::usage(
            "--force-share is for looking at an image; one that others may be writing is not merged",
            "leave it out, and close the program that uses the images",
        ));
    }
    let chain = open_image(context, &args.child_image)?;
    let into = layer_named(args, &chain)?;
    let dependents = dependents(context, args, &chain, into)?;
    let options = MergeOptions { into, dependents, replay: args.writing.replay, dry_run: args.dry_run };
    if args.dry_run && !options.dependents.is_empty() {
        // Also what would be refused for their sake is worth knowing.
        let alone = MergeOptions { dependents: Vec::new(), ..options.clone() };
        let bar = Bar::new("looking", &context.ui, &context.interrupt);
        let planned = merge(open_image(context, &args.child_image)?, &alone, &bar);
        drop(bar);
        report(context, args, &planned.map_err(|error| error.with_path(&args.child_image))?, &[])?;
    }
    if let Some(warning) = chain.layers().get(into).and_then(lock_warning_of) {
        context.ui.warn(chain.layers().get(into).and_then(Layer::path), &warning);
    }
    let bar = Bar::new("merging", &context.ui, &context.interrupt);
    let worked = merge(chain, &options, &bar);
    drop(bar);
    let done = worked.map_err(|error| error.with_path(&args.child_image))?;
    let mut deleted = Vec::new();
    if !args.dry_run {
        if let Some(path) = &done.into {
            warn_of_change_tracking(context, path);
        }
        if args.delete {
            deleted = delete(&done).map_err(|error| merged_all_the_same(&done, error))?;
        }
    }
    report(context, args, &done, &deleted)?;
    Ok(Answer::Yes)
}

/// The layer to merge into.
fn layer_named(args: &MergeArgs, chain: &Image) -> Result<usize, Failure> {
    let Some(wanted) = &args.into else { return Ok(1) };
    let storage = FileStorage::open(wanted, FileAccess::Read, Sharing::ForceShare)?;
    let identity = storage.identity();
    let found = chain.layers().iter().position(|layer| identity.is_some() && layer.storage().identity() == identity);
    match found {
        Some(0) => {
            let error = Error::new(ErrorKind::InvalidArgument, "the child cannot be merged into itself");
            Err(error.with_path(wanted).with_hint("name one of its parents with --into").into())
        }
        Some(depth) => Ok(depth),
        None => {
            let error = Error::new(ErrorKind::InvalidArgument, "this is none of the child's parents").with_path(wanted);
            Err(error.with_hint("`vhdkit info CHILD` shows its chain").into())
        }
    }
}

/// Other images that would break: children of the files that change or go, besides the chain itself.
fn dependents(context: &Context, args: &MergeArgs, chain: &Image, into: usize) -> Result<Vec<String>, Failure> {
    let first = usize::from(!args.delete);
    let layers = chain.layers();
    let own: Vec<_> = layers.iter().filter_map(|layer| layer.storage().identity()).collect();
    let mut found: Vec<String> = Vec::new();
    for (depth, layer) in layers.iter().enumerate().take(into + 1).skip(first) {
        for child in children(context, layer, &args.child)?.found {
            // The child itself stays as it is for its own children; what is deleted must not even be named.
            let breaks = child.breaks_by_writing() || depth < into;
            if breaks && !own.contains(&child.identity) {
                found.push(show::path(&child.path));
            }
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// What could not be removed was merged nevertheless, which is to be said.
fn merged_all_the_same(done: &MergeReport, error: Error) -> Failure {
    let into = done.into.as_deref().map_or_else(|| "(memory)".to_owned(), show::path);
    error
        .with_hint(format!("the merge itself is done: {into} holds the whole disk; remove the merged files yourself"))
        .into()
}

/// Removes what was merged, the child first, so that nobody is left without a parent. Of a symbolic link both go, the file
/// first: what was merged must not stay and look as if it still counted.
fn delete(done: &MergeReport) -> Result<Vec<PathBuf>, Error> {
    let mut deleted: Vec<PathBuf> = Vec::new();
    for path in done.merged.iter().flatten() {
        let failed = |error| Error::io("cannot remove the merged file", error).with_path(path);
        let is_link = std::fs::symlink_metadata(path).map_err(failed)?.file_type().is_symlink();
        let file = if is_link { Some(std::fs::canonicalize(path).map_err(failed)?) } else { None };
        for name in file.into_iter().chain([path.clone()]) {
            std::fs::remove_file(&name).map_err(failed)?;
            sync_directory(&directory_of(&name)).map_err(failed)?;
            deleted.push(name);
        }
    }
    Ok(deleted)
}

fn sync_directory(directory: &Path) -> std::io::Result<()> {
    File::open(directory)?.sync_all()
}

fn report(context: &Context, args: &MergeArgs, done: &MergeReport, deleted: &[PathBuf]) -> Result<(), Failure> {
    let name = |path: &Option<PathBuf>| path.as_deref().map_or_else(|| "(memory)".to_owned(), show::path);
    let merged: Vec<String> = done.merged.iter().map(name).collect();
    let into = name(&done.into);
    if context.ui.json {
        return Ui::print_json(&json!({
            "merged": merged,
            "into": into,
            "dry_run": args.dry_run,
            "data_bytes": done.data_bytes,
            "zero_bytes": done.zero_bytes,
            "old_size": done.sizes[0],
            "new_size": done.sizes[1],
            "old_file_size": done.old_file_size,
            "new_file_size": done.new_file_size,
            "data_write_guid": done.data_write_guid.map(|guid| guid.to_string()),
            "deleted": deleted.iter().map(|path| show::path(path)).collect::<Vec<_>>(),
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    let merged = merged.join(", ");
    let amount = format!("{} of data, {} to zero", sizes::short(done.data_bytes), sizes::short(done.zero_bytes));
    if args.dry_run {
        let most = sizes::short(done.new_file_size);
        writeln!(out, "{merged} would be merged into {into}: {amount}; its file would have at most {most}")?;
        writeln!(out, "  nothing was changed")?;
        return Ok(out.flush()?);
    }
    writeln!(out, "{merged} merged into {into}: {amount}")?;
    if done.sizes[0] != done.sizes[1] {
        writeln!(out, "  the disk of {} became {}", sizes::long(done.sizes[0]), sizes::long(done.sizes[1]))?;
    }
    if deleted.is_empty() {
        writeln!(out, "  {into} holds the whole disk now; what was merged is not needed any more, and was kept")?;
    } else {
        writeln!(out, "  what was merged was removed")?;
    }
    Ok(out.flush()?)
}
