//! Giving a child another parent, or another way to the one it has.

use super::edit::{Placed, change_items, finish, refused, top};
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::items::ItemChange;
use crate::format::locator::{
    KEY_ABSOLUTE_PATH, KEY_LINKAGE, KEY_LINKAGE2, KEY_RELATIVE_PATH, KEY_VOLUME_PATH, ParentLocator,
};
use crate::format::metadata::{FLAG_REQUIRED, PARENT_LOCATOR};
use crate::image::session::Identity;
use crate::image::structure::{Edit, Transaction};
use crate::image::{Image, Layer};
use crate::text::escape;

/// What [`reparent`] writes into the child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReparentOptions {
    /// The parent relative to the child's directory, in the form of Windows: `.\base.vhdx`.
    pub relative_path: String,
    /// The parent's full path in the form of Windows; `None` takes out the ones that are there, which name another place.
    pub absolute_path: Option<String>,
    /// Accept a parent that is not the one that the child was made on: what the child's disk holds may be another mixture
    /// then, which nobody ever wrote.
    pub ignore_id_mismatch: bool,
    /// Only find out what would change.
    pub dry_run: bool,
}

/// What [`reparent`] did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReparentReport {
    /// Sentences, one for each change.
    pub changes: Vec<String>,
    /// Whether the parent is not the one that the child was made on.
    pub mismatch: bool,
}

/// Writes a new parent locator ([MS-VHDX] 2.6.2.6) into a child, at one instant. The child was opened for writing without
/// its parents, the parent for reading with all of its own; the child is closed at the end.
///
/// When the parent is the same disk (its data write GUID is one that the child accepts), only paths change, and the child
/// keeps its identity. With `ignore_id_mismatch` another parent is accepted; what the guest sees may change then, and the
/// child gets a new data write GUID.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] when the child has no parent; [`ErrorKind::ParentMismatch`] for a parent with other
/// logical sectors, or with another identity unless that is to be ignored; [`ErrorKind::Chain`] when the child is among
/// the parent's own parents. Nothing has changed then. Otherwise as [`set`](super::set::set).
pub fn reparent(child: Image, parent: &Image, options: &ReparentOptions) -> Result<ReparentReport> {
    let plan = plan(&child, parent, options)?;
    if options.dry_run || plan.0.changes.is_empty() {
        return Ok(plan.0);
    }
    let (report, locator) = plan;
    let identity = if report.mismatch { Identity::New } else { Identity::Kept };
    let worked = child.edit(identity).and_then(|edit| write_locator(&edit, &locator));
    finish(&child, worked)?;
    Ok(report)
}

fn plan(child: &Image, parent: &Image, options: &ReparentOptions) -> Result<(ReparentReport, ParentLocator)> {
    let (layer, base) = (top(child)?, top(parent)?);
    let Some(old) = layer.metadata().parent_locator.as_ref().filter(|_| layer.metadata().has_parent) else {
        return Err(Error::new(ErrorKind::InvalidArgument, "the image is not differencing: it has no parent")
            .with_hint("`vhdkit create CHILD --parent PARENT` makes a child"));
    };
    let identity = layer.storage().identity();
    if identity.is_some() && parent.layers().iter().any(|layer| layer.storage().identity() == identity) {
        return Err(Error::new(ErrorKind::Chain, "the child would be its own ancestor")
            .with_hint("choose a parent that does not depend on the child"));
    }
    let (mine, theirs) = (layer.metadata().logical_sector_size, base.metadata().logical_sector_size);
    if mine != theirs {
        let what = format!("the child has logical sectors of {mine} bytes and the parent of {theirs}: they never fit");
        return Err(Error::new(ErrorKind::ParentMismatch, what));
    }
    if parent.parents_missing() {
        return Err(Error::new(ErrorKind::ParentMissing, "the parent's own parent is not open")
            .with_hint("mend the chain from its root upwards: reparent the parent first"));
    }
    let guid = base.headers().current.data_write_guid;
    let mismatch = !old.accepts(guid);
    if mismatch && !options.ignore_id_mismatch {
        let expected = old.linkage().map_or_else(|| "none".to_owned(), |guid| guid.to_string());
        let what =
            format!("the parent is not the disk that the child was made on: it is {guid}, the child wants {expected}");
        return Err(Error::new(ErrorKind::ParentMismatch, what).with_hint(
            "if the parent's contents were not changed in between, use --ignore-id-mismatch; otherwise the disk becomes \
             a mixture that nobody wrote",
        ));
    }
    if mismatch && guid.is_nil() {
        return Err(refused(
            "the parent has no identity (its data write GUID is zero), so no child can name it",
            "write to the parent once, or convert it, so that it gets one",
        ));
    }
    let new = locator(old, guid, options);
    let report = ReparentReport { changes: differences(old, &new), mismatch };
    Ok((report, new))
}

/// The new locator: what the old one says besides identity and paths stays.
fn locator(old: &ParentLocator, guid: Guid, options: &ReparentOptions) -> ParentLocator {
    let mut paths = vec![(KEY_RELATIVE_PATH, options.relative_path.as_str())];
    if let Some(path) = &options.absolute_path {
        paths.push((KEY_ABSOLUTE_PATH, path.as_str()));
    }
    let named = [KEY_LINKAGE, KEY_LINKAGE2, KEY_RELATIVE_PATH, KEY_VOLUME_PATH, KEY_ABSOLUTE_PATH];
    let others = old.pairs().iter().filter(|(key, _)| !named.contains(&key.as_str()));
    paths.extend(others.map(|(key, value)| (key.as_str(), value.as_str())));
    ParentLocator::new(guid, &paths)
}

fn differences(old: &ParentLocator, new: &ParentLocator) -> Vec<String> {
    let mut changes = Vec::new();
    for key in [KEY_LINKAGE, KEY_LINKAGE2, KEY_RELATIVE_PATH, KEY_VOLUME_PATH, KEY_ABSOLUTE_PATH] {
        let same = match (key, old.get(key), new.get(key)) {
            (KEY_LINKAGE, ..) => old.linkage() == new.linkage(),
            (_, old, new) => old == new,
        };
        if same {
            continue;
        }
        changes.push(match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) => format!("{key} {} becomes {}", escape(old), escape(new)),
            (None, Some(new)) => format!("new {key} {}", escape(new)),
            (Some(old), None) => format!("{key} {} is taken out", escape(old)),
            (None, None) => continue,
        });
    }
    changes
}

/// Writes a locator into the image, durably.
pub(crate) fn write_locator(edit: &Edit<'_>, locator: &ParentLocator) -> Result<()> {
    let bytes = locator.encode().ok_or_else(|| {
        Error::new(ErrorKind::InvalidArgument, "a path to the parent is empty or longer than a parent locator can hold")
    })?;
    let change = ItemChange { id: PARENT_LOCATOR, is_user: false, value: Some((FLAG_REQUIRED, bytes)) };
    let mut transaction = Transaction::default();
    let mut regions = edit.layer().region_table().regions.clone();
    if change_items(edit, &mut regions, &[change], &mut transaction)? == Placed::NewRegion {
        edit.add_region_tables(&mut transaction, &regions)?;
    }
    edit.apply(transaction)?;
    edit.commit()
}

/// The locator of a child for the time of a merge: it accepts its parent as it is `now`, and as it `will` be.
pub(crate) fn with_second_identity(layer: &Layer, now: Guid, will: Guid) -> Option<ParentLocator> {
    let locator = layer.metadata().parent_locator.as_ref()?;
    // A parent without identity was named by the user; its child keeps what it says.
    let locator = if now.is_nil() { locator.clone() } else { locator.with_linkage(now) };
    Some(locator.with_linkage2(will))
}
