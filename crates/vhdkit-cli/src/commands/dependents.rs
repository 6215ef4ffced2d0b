//! Other images that depend on one that is about to change.

use std::path::PathBuf;

use vhdkit::image::Layer;
use vhdkit::ops::chain::{Children, ParentFile, directory_of, find_children};
use vhdkit::{Error, ErrorKind};

use crate::args::maintain::ChildrenArgs;
use crate::cli::Context;
use crate::failure::Failure;
use crate::progress::Bar;
use crate::show;

/// The children of an image: in its own directory, and those named. Files that may be children are warned of.
pub(crate) fn children(context: &Context, of: &Layer, named: &[PathBuf]) -> Result<Children, Failure> {
    let own: Vec<PathBuf> = of.path().map(directory_of).into_iter().collect();
    children_of(context, &ParentFile::of(of), &own, named)
}

/// The same of an image that need not be one that can be opened.
pub(crate) fn children_of(
    context: &Context,
    of: &ParentFile,
    directories: &[PathBuf],
    named: &[PathBuf],
) -> Result<Children, Failure> {
    let bar = Bar::new("looking for children", &context.ui, &context.interrupt);
    let children = find_children(of, directories, named, &bar)?;
    for error in &children.unknown {
        let what = format!("whether it is a child of the image cannot be known: {}", error.message());
        context.ui.warn(error.path(), &what);
    }
    Ok(children)
}

/// The names of those that a change of the disk breaks, safe to print; with --break-children none.
pub(crate) fn broken_by_writing(context: &Context, of: &Layer, args: &ChildrenArgs) -> Result<Vec<String>, Failure> {
    if args.break_children {
        return Ok(Vec::new());
    }
    Ok(names_of_broken(&children(context, of, &args.child)?))
}

/// The names of those that a change of the disk breaks, safe to print.
pub(crate) fn names_of_broken(children: &Children) -> Vec<String> {
    children.found.iter().filter(|child| child.breaks_by_writing()).map(|child| show::path(&child.path)).collect()
}

/// Refuses when a change of the disk breaks children.
pub(crate) fn refuse(context: &Context, of: &Layer, args: &ChildrenArgs) -> Result<(), Failure> {
    let broken = broken_by_writing(context, of, args)?;
    if broken.is_empty() {
        return Ok(());
    }
    let what = format!("the image is the parent of {}, which could not be opened any more", broken.join(", "));
    let error = Error::new(ErrorKind::Refused, what);
    let error = match of.path() {
        Some(path) => error.with_path(path),
        None => error,
    };
    Err(error.with_hint("work on a copy, merge the children first, or use --break-children").into())
}
