//! What a disk is made of, told three ways: as JSON, as a picture in a terminal, as a picture in SVG.

pub(crate) mod grid;
pub(crate) mod json;
pub(crate) mod picture;
pub(crate) mod svg;

use std::ops::ControlFlow;

use vhdkit::image::Extent;

use crate::failure::Failure;
use crate::opening::Disk;

/// Visits all extents of a disk, with neighbours that belong together joined. Of an image without its parents: what the
/// image itself says.
pub(crate) fn visit_joined(disk: &Disk, visit: &mut dyn FnMut(&Extent) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut pending: Option<Extent> = None;
    let mut failed = None;
    let mut join = |extent: &Extent| {
        if let Some(held) = pending.as_mut().filter(|held| held.continues_with(extent)) {
            held.length += extent.length;
            return ControlFlow::Continue(());
        }
        match pending.replace(*extent).map_or(Ok(()), |complete| visit(&complete)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                failed = Some(failure);
                ControlFlow::Break(())
            }
        }
    };
    let whole = 0..disk.device.size();
    match disk.image.as_ref().filter(|image| image.parents_missing()) {
        Some(image) => image.visit_layer_extents(0, whole, &mut join)?,
        None => disk.device.visit_extents(whole, &mut join)?,
    }
    if let Some(failure) = failed {
        return Err(failure);
    }
    pending.map_or(Ok(()), |last| visit(&last))
}
