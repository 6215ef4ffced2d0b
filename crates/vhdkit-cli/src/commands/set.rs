//! `set`: what an image says about itself.

use std::io::{Read as _, Write as _};

use serde_json::{Value, json};
use vhdkit::format::metadata::ITEM_BYTES_MAX;
use vhdkit::image::Image;
use vhdkit::ops::set::{SetOptions, SetReport, UserItem, set};
use vhdkit::{Error, ErrorKind};

use crate::args::SetArgs;
use crate::args::maintain::ItemFile;
use crate::cli::Context;
use crate::commands::dependents;
use crate::failure::{Answer, Failure};
use crate::opening::open_image;
use crate::show;
use crate::ui::Ui;
use crate::writing::{Session, refuse_dirty};

/// Changes items.
pub(crate) fn run(context: &Context, args: &SetArgs) -> Result<Answer, Failure> {
    let options = options(args)?;
    crate::commands::info::refuse_raw(context, &args.image, args.writing.from.from)?;
    if args.dry_run {
        let image = open_image(context, &args.image)?;
        let refusal = refuse_children(context, args, &image, &options)
            .and_then(|()| refuse_dirty(&image, &args.image, &args.writing));
        let plan = set(image, &options).map_err(|error| error.with_path(&args.image))?;
        // Also what would be refused is worth knowing.
        report(context, args, &plan, Value::Null, "")?;
        refusal?;
        return Ok(Answer::Yes);
    }
    let session = Session::open_alone(context, &args.image, &args.writing)?;
    refuse_children(context, args, &session.image, &options)?;
    let (image, aftermath) = session.into_parts()?;
    let done = aftermath.name(set(image, &options))?;
    report(context, args, &done, aftermath.replayed_json(), &aftermath.replayed_text())?;
    Ok(Answer::Yes)
}

/// Only what the guest sees breaks children.
fn refuse_children(context: &Context, args: &SetArgs, image: &Image, options: &SetOptions) -> Result<(), Failure> {
    let Some(layer) = image.layers().first() else { return Ok(()) };
    let metadata = layer.metadata();
    let visible = options.disk_id.is_some_and(|id| id != metadata.disk_id)
        || options.physical_sector_size.is_some_and(|size| size != metadata.physical_sector_size);
    if visible { dependents::refuse(context, layer, &args.children) } else { Ok(()) }
}

fn options(args: &SetArgs) -> Result<SetOptions, Failure> {
    let mut user_items = Vec::new();
    for item in &args.user_metadata {
        user_items.push(UserItem { id: item.id, value: Some(contents(item)?) });
    }
    user_items.extend(args.remove_user_metadata.iter().map(|id| UserItem { id: *id, value: None }));
    Ok(SetOptions {
        disk_id: args.disk_id,
        physical_sector_size: args.physical_sector_size,
        user_items,
        dry_run: args.dry_run,
    })
}

/// The contents of a file that becomes an item.
fn contents(item: &ItemFile) -> Result<Vec<u8>, Failure> {
    let failed = |error| Error::io("cannot read the file for a user item", error).with_path(&item.file);
    let file = std::fs::File::open(&item.file).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(u64::from(ITEM_BYTES_MAX) + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > u64::from(ITEM_BYTES_MAX) {
        let error = Error::new(ErrorKind::Limit, "an item of a user has at most 1 MiB, and this file has more");
        return Err(error.with_path(&item.file).with_hint("keep it beside the image").into());
    }
    Ok(bytes)
}

fn report(context: &Context, args: &SetArgs, done: &SetReport, replay: Value, replayed: &str) -> Result<(), Failure> {
    let file = show::path(&args.image);
    if context.ui.json {
        return Ui::print_json(&json!({
            "file": file,
            "dry_run": args.dry_run,
            "changes": done.changes,
            "new_data_write_guid": done.visible,
            "metadata_moved": done.region_moved,
            "replay": replay,
        }));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let mut out = context.ui.out();
    match (done.changes.is_empty(), args.dry_run) {
        (true, _) => writeln!(out, "{file}: everything is so already; nothing was changed")?,
        (false, true) => writeln!(out, "{file}: would be changed; nothing was")?,
        (false, false) => writeln!(out, "{file}: changed{replayed}")?,
    }
    for change in &done.changes {
        writeln!(out, "  {change}")?;
    }
    Ok(out.flush()?)
}
