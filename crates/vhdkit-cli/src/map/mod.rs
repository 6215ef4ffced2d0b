//! What a disk is made of, told three ways: as JSON, as a picture in a terminal, as a picture in SVG.

pub(crate) mod grid;
pub(crate) mod json;
pub(crate) mod picture;
pub(crate) mod svg;

use std::ops::ControlFlow;

use vhdkit::image::{BlockDevice, Extent};

use crate::failure::Failure;

/// Visits all extents of a disk, with neighbours that belong together joined.
pub(crate) fn visit_joined(
    disk: &dyn BlockDevice,
    visit: &mut dyn FnMut(&Extent) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut pending: Option<Extent> = None;
    let mut failed = None;
    disk.visit_extents(0..disk.size(), &mut |extent| {
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
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    pending.map_or(Ok(()), |last| visit(&last))
}
