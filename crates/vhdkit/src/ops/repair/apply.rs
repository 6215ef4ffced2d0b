//! Carries a plan out.
//!
//! The undo record is whole and durable before the first byte of the image changes, so a crash at any later moment, and
//! what a medium makes of writes that were under way, can be undone. The order after that is the one of a session of
//! writing: headers with new write GUIDs first, what new entries lead to before the entries, and a log is declared empty
//! only when all of it is in place. After a crash in between the record is put back, which gives the file that was planned for;
//! from what a crash left a new plan may leave more alone, as copies that nothing names yet look like somebody's data.

use super::undo::{self, UndoReport};
use super::{Draft, RepairPlan};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{HEADER_BYTES, Header, OFFSETS};
use crate::format::undo::PIECE_BYTES_MAX;
use crate::ops::{Progress, advance};
use crate::storage::Storage;
use std::sync::Arc;

/// Mends an image as planned. `undo` is empty storage for the undo record; `keep` is called once it is written, and makes
/// it durable under its name before it returns: only then the image is changed.
///
/// The plan must be made from this storage, which nobody else has changed since. It is not cancelled any more once the
/// image is being changed.
///
/// # Errors
/// [`InvalidArgument`](ErrorKind::InvalidArgument) for a plan that changes nothing or was made from another file,
/// [`Cancelled`](ErrorKind::Cancelled), and whatever `keep` and writing the record give: then the image is as it was.
/// When writing the image fails it may be changed in part; [`restore`](super::restore) makes it what it was.
pub fn apply(
    storage: &Arc<dyn Storage>,
    plan: &RepairPlan,
    undo: &dyn Storage,
    keep: &mut dyn FnMut() -> Result<()>,
    progress: &dyn Progress,
) -> Result<UndoReport> {
    if !plan.changes_anything() {
        return Err(Error::new(ErrorKind::InvalidArgument, "the plan changes nothing"));
    }
    if !Arc::ptr_eq(storage, plan.draft.base()) {
        return Err(Error::new(ErrorKind::InvalidArgument, "the plan was made from another file"));
    }
    let report = undo::write(plan, undo, &mut |done| advance(progress, done, None))?;
    keep()?;
    change(storage.as_ref(), plan, progress).map_err(|error| {
        error.with_hint("the image may be changed in part: put it back with `vhdkit repair IMAGE --restore RECORD`")
    })?;
    Ok(report)
}

fn change(storage: &dyn Storage, plan: &RepairPlan, progress: &dyn Progress) -> Result<()> {
    let draft = plan.draft.as_ref();
    let mut done = 0;
    let mut tell = |bytes: u64| {
        done += bytes; // of a file
        let _ = progress.advance(done, Some(plan.bytes_changed)); // too late to cancel
    };
    let mut updates = plan.headers.iter();
    if let Some(update) = updates.next() {
        write_headers(storage, plan, update)?;
    }
    if draft.length() > draft.base_length() {
        set_length(storage, draft.length())?;
    }
    for copy in draft.copies() {
        let length = copy.from.end - copy.from.start;
        copy_data(storage, draft, copy.to..copy.to + length)?; // the draft is that long
        tell(length);
    }
    sync(storage)?;
    for_each_change(draft, &mut |offset, _, new| {
        let wrote = storage.write_at(new, offset);
        wrote.map_err(|error| Error::io(format!("cannot write the image at {offset:#x}"), error))?;
        tell(new.len() as u64);
        Ok(())
    })?;
    sync(storage)?;
    for update in updates {
        write_headers(storage, plan, update)?;
    }
    if draft.length() < draft.base_length() {
        set_length(storage, draft.length())?;
        sync(storage)?;
    }
    Ok(())
}

/// Where the two headers of an update go: the copy that is not current first.
pub(super) fn header_places(plan: &RepairPlan) -> [u64; 2] {
    if plan.current_copy == 0 { [OFFSETS[1], OFFSETS[0]] } else { OFFSETS }
}

fn write_headers(storage: &dyn Storage, plan: &RepairPlan, update: &[Header; 2]) -> Result<()> {
    for (header, offset) in update.iter().zip(header_places(plan)) {
        let wrote = storage.write_at(&header.encode(), offset);
        wrote.map_err(|error| Error::io(format!("cannot write the header at {offset:#x}"), error))?;
        sync(storage)?;
    }
    Ok(())
}

fn sync(storage: &dyn Storage) -> Result<()> {
    storage.sync().map_err(|error| Error::io("cannot make the image durable", error))
}

fn set_length(storage: &dyn Storage, length: u64) -> Result<()> {
    let old = storage.len().map_err(|error| Error::io("cannot tell the length of the image", error))?;
    let failed = |error| Error::io(format!("cannot make the image {length:#x} bytes long"), error);
    storage.set_len(length).map_err(failed)?;
    if length > old && !storage.growth_reads_zero() {
        storage.zero_range(old..length).map_err(failed)?;
    }
    Ok(())
}

/// Writes a part of the draft that holds a copy. Holes stay holes.
fn copy_data(storage: &dyn Storage, draft: &Draft, range: std::ops::Range<u64>) -> Result<()> {
    let mut buffer = vec![0; PIECE_BYTES_MAX as usize];
    let mut position = range.start;
    while position < range.end {
        let length = usize::try_from(range.end - position).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..length) else { break };
        draft.read(part, position).map_err(|error| Error::io("cannot read the block to copy", error))?;
        if part.iter().any(|byte| *byte != 0) {
            let wrote = storage.write_at(part, position);
            wrote.map_err(|error| Error::io(format!("cannot write the image at {position:#x}"), error))?;
        }
        position += length as u64; // inside the range
    }
    Ok(())
}

/// Bytes that are written, headers and copies included.
pub(super) fn bytes_changed(plan: &RepairPlan) -> Result<u64> {
    let mut bytes = plan.headers.len() as u64 * 2 * HEADER_BYTES as u64; // two updates at most
    bytes += plan.draft.copies().iter().map(|copy| copy.from.end - copy.from.start).sum::<u64>();
    for_each_change(&plan.draft, &mut |_, _, new| {
        bytes += new.len() as u64;
        Ok(())
    })?;
    Ok(bytes)
}

/// Takes the offset of a change, what the file has there, and what it gets.
type VisitChange<'a> = dyn FnMut(u64, &[u8], &[u8]) -> Result<()> + 'a;

/// Visits every range that changes, in pieces, without headers and copies. What both have as a hole is passed over.
pub(super) fn for_each_change(draft: &Draft, visit: &mut VisitChange<'_>) -> Result<()> {
    let mut old = vec![0; PIECE_BYTES_MAX as usize];
    let mut new = old.clone();
    for range in draft.changed_ranges() {
        let mut position = range.start;
        while let Some(start) = next_data(draft, position..range.end)? {
            // A piece lies before the end of the file as it was, or behind it.
            let border = if start < draft.base_length() { draft.base_length() } else { u64::MAX };
            let end = range.end.min(start + u64::from(PIECE_BYTES_MAX)).min(border); // start lies in a file
            let length = usize::try_from(end - start).unwrap_or_default(); // at most 1 MiB
            let (Some(old), Some(new)) = (old.get_mut(..length), new.get_mut(..length)) else { break };
            read_old(draft, old, start)?;
            draft.read(new, start).map_err(|error| Error::io(format!("cannot read the image at {start:#x}"), error))?;
            if old != new {
                visit(start, old, new)?;
            }
            position = end;
        }
    }
    Ok(())
}

/// The first place in a range where the file or the draft may hold data.
fn next_data(draft: &Draft, range: std::ops::Range<u64>) -> Result<Option<u64>> {
    if range.start >= range.end {
        return Ok(None);
    }
    let failed = |error| Error::io(format!("cannot look for data at {:#x}", range.start), error);
    let inside = range.start..range.end.min(draft.base_length()).max(range.start);
    let old = draft.base().data_start(inside).map_err(failed)?;
    let new = draft.data_start(range.clone()).map_err(failed)?;
    Ok(old.into_iter().chain(new).min())
}

/// What the file has; zeros behind its end.
fn read_old(draft: &Draft, buffer: &mut [u8], offset: u64) -> Result<()> {
    if offset >= draft.base_length() {
        buffer.fill(0);
        return Ok(());
    }
    let read = draft.base().read_at(buffer, offset);
    read.map_err(|error| Error::io(format!("cannot read the image at {offset:#x}"), error))
}
