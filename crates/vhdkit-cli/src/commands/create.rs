//! `create`: an empty image, or a child of a parent.

use std::io::Write as _;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};
use vhdkit::image::{Image, Layer, OpenOptions};
use vhdkit::ops::chain::directory_of;
use vhdkit::ops::create::{CreateOptions, NewParent, create};
use vhdkit::storage::StorageIdentity;
use vhdkit::{Error, ErrorKind};

use super::layout;
use crate::args::{BlockState, CreateArgs};
use crate::cli::Context;
use crate::failure::{Answer, Failure, file_error};
use crate::opening::{open_options, warn_about};
use crate::progress::Bar;
use crate::show;
use crate::sizes;
use crate::target::Target;
use crate::ui::Ui;

/// Creates the image.
pub(crate) fn run(context: &Context, args: &CreateArgs) -> Result<Answer, Failure> {
    let mut options = layout::options(&args.layout, args.size)?;
    let mut sources = Vec::new();
    match context.global.parent.split_first() {
        None if args.size.is_none() => {
            return Err(Failure::usage(
                "the size of the disk is missing",
                "say --size, for example --size 64G, or name a parent with --parent FILE",
            ));
        }
        None => {}
        Some((parent, ancestors)) => {
            check_child_layout(args)?;
            let (parent, identities) = new_parent(context, &args.image, parent, ancestors)?;
            options.parent = Some(parent);
            sources = identities;
        }
    }
    let target = Target::open(context, &args.image, sources)?;
    write_image(context, &target, &args.image, &options)?;
    let storage = target.storage();
    let made = OpenOptions::new().without_parents().open(storage, Some(&args.image))?;
    target.commit(!args.no_sync)?;
    report(context, &args.image, &made)?;
    Ok(Answer::Yes)
}

fn write_image(context: &Context, target: &Target, path: &Path, options: &CreateOptions) -> Result<(), Failure> {
    let bar = Bar::new("creating", &context.ui, &context.interrupt);
    Ok(create(&target.storage(), options, &bar).map_err(|error| error.with_path(path))?)
}

/// Refuses what makes no sense for a child.
fn check_child_layout(args: &CreateArgs) -> Result<(), Failure> {
    let contradiction = if args.layout.fixed {
        "--fixed and --parent contradict each other: a child holds only what differs from its parent"
    } else if args.layout.block_state == Some(BlockState::Zero) {
        "--block-state zero and --parent contradict each other: the child would hide its parent"
    } else {
        return Ok(());
    };
    Err(Failure::usage(contradiction, "leave one of them out"))
}

/// Opens the parent with its chain, and tells what the child must know of it.
fn new_parent(
    context: &Context,
    child: &Path,
    parent: &Path,
    ancestors: &[PathBuf],
) -> Result<(NewParent, Vec<StorageIdentity>), Failure> {
    let image = open_options(&context.global, ancestors.iter().map(PathBuf::as_path))?.open_path(parent)?;
    warn_about(context, &image);
    let layer = top(&image)?;
    let relative_path = relative_windows_path(child, parent)?;
    if relative_path.starts_with("..") {
        let directory = parent.parent().map(show::path).unwrap_or_default();
        let why = format!(
            "the parent lies outside of the child's directory; opening the child needs --parent-dir {directory}"
        );
        context.ui.warn(Some(child), &why);
    }
    let data_write_guid = layer.headers().current.data_write_guid;
    if data_write_guid.is_nil() {
        context.ui.warn(Some(parent), "the data write GUID is all zero; opening the child needs --parent FILE");
    }
    let metadata = layer.metadata();
    let new = NewParent {
        data_write_guid,
        logical_sector_size: metadata.logical_sector_size,
        physical_sector_size: metadata.physical_sector_size,
        disk_size: metadata.disk_size,
        disk_id: metadata.disk_id,
        relative_path,
        absolute_path: None,
    };
    let identities = image.layers().iter().filter_map(|layer| layer.storage().identity()).collect();
    Ok((new, identities))
}

fn top(image: &Image) -> Result<&Layer, Failure> {
    let layer = image.layers().first();
    layer.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "the image has no layers").into())
}

/// The way from the child's directory to the parent, as Windows writes it: `.\base.vhdx`, `..\bases\base.vhdx`.
pub(crate) fn relative_windows_path(child: &Path, parent: &Path) -> Result<String, Failure> {
    let canonical =
        |path: &Path| path.canonicalize().map_err(|error| file_error(path, "cannot find out where this is", error));
    // Where a link leads: that is where the parent is looked for.
    let path = join_relative(&canonical(&directory_of(child))?, &canonical(parent)?);
    path.ok_or_else(|| {
        let what =
            "the way to the parent cannot be written into the child: a name in it has a backslash or is not UTF-8";
        Error::new(ErrorKind::InvalidArgument, what)
            .with_path(parent)
            .with_hint("rename the parent or its directory")
            .into()
    })
}

/// The same for two absolute paths without links; `None` when a name cannot be written.
fn join_relative(directory: &Path, parent: &Path) -> Option<String> {
    let from: Vec<Component<'_>> = directory.components().collect();
    let to: Vec<Component<'_>> = parent.components().collect();
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from.len() - common; // common counts components of both
    let mut parts = vec![".."; up];
    if up == 0 {
        parts.push(".");
    }
    for component in to.iter().skip(common) {
        parts.push(component.as_os_str().to_str().filter(|name| !name.contains('\\'))?);
    }
    Some(parts.join("\\"))
}

fn report(context: &Context, path: &Path, made: &Image) -> Result<(), Failure> {
    let layer = top(made)?;
    if context.ui.json {
        return Ui::print_json(&made_json(path, layer));
    }
    if context.ui.quiet {
        return Ok(());
    }
    let metadata = layer.metadata();
    let (kind, size) = (metadata.disk_type().as_str(), sizes::long(metadata.disk_size));
    let (block, logical) = (sizes::short(u64::from(metadata.block_size)), metadata.logical_sector_size);
    let mut out = context.ui.out();
    writeln!(out, "{}: {kind}, {size}, blocks of {block}, sectors of {logical} bytes", show::path(path))?;
    Ok(out.flush()?)
}

/// What was made, for scripts.
pub(crate) fn made_json(path: &Path, layer: &Layer) -> Value {
    let (metadata, header) = (layer.metadata(), &layer.headers().current);
    json!({
        "file": show::path(path),
        "format": "vhdx",
        "type": metadata.disk_type().as_str(),
        "disk_size": metadata.disk_size,
        "file_size": layer.file_size(),
        "block_size": metadata.block_size,
        "logical_sector_size": metadata.logical_sector_size,
        "physical_sector_size": metadata.physical_sector_size,
        "log_size": header.log_length,
        "disk_id": metadata.disk_id.to_string(),
        "file_write_guid": header.file_write_guid.to_string(),
        "data_write_guid": header.data_write_guid.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_the_parent() {
        let way = |directory: &str, parent: &str| join_relative(Path::new(directory), Path::new(parent));
        assert_eq!(way("/vms", "/vms/base.vhdx").as_deref(), Some(".\\base.vhdx"));
        assert_eq!(way("/vms", "/vms/a/b.vhdx").as_deref(), Some(".\\a\\b.vhdx"));
        assert_eq!(way("/vms/x/y", "/vms/a/b.vhdx").as_deref(), Some("..\\..\\a\\b.vhdx"));
        assert_eq!(way("/", "/b.vhdx").as_deref(), Some(".\\b.vhdx"));
        assert_eq!(way("/vms", "/vms/a\\b.vhdx"), None);
    }
}
