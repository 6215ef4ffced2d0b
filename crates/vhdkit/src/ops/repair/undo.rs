//! The undo record: written before an image is changed, and put back on request.

use std::ops::Range;

use super::RepairPlan;
use super::apply::{for_each_change, header_places};
use crate::error::{Error, ErrorKind, Result};
use crate::format::checksum::append;
use crate::format::guid::Guid;
use crate::format::header::{HEADER_BYTES, Header, OFFSETS};
use crate::format::undo::{RawPiece, RawUndoHeader, SUM_BYTES, UndoHeader, UndoPiece, sums};
use crate::ops::{Progress, advance};
use crate::storage::Storage;

/// Bytes of a record's header as an offset.
const HEADER: u64 = size_of::<RawUndoHeader>() as u64;
/// Bytes of a piece's header as an offset.
const PIECE: u64 = size_of::<RawPiece>() as u64;
/// How much of a record is read at once.
const BUFFER_BYTES: usize = 256 << 10;

/// What an undo record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndoReport {
    /// Ranges of the image that it can put back.
    pub pieces: u64,
    /// Bytes of the record.
    pub bytes: u64,
}

/// What putting an undo record back did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Bytes of the image that were written.
    pub bytes: u64,
    /// The file's length before.
    pub file_size_before: u64,
    /// The file's length now, as it was before the repair.
    pub file_size_after: u64,
    /// The data write GUID from before the repair, which the image has again; `None` when it had no sound header.
    pub data_write_guid: Option<Guid>,
}

/// Appends to a record.
struct Writer<'a> {
    undo: &'a dyn Storage,
    end: u64,
    checksum: u32,
    pieces: u64,
}

impl Writer<'_> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let wrote = self.undo.write_at(bytes, self.end);
        wrote.map_err(|error| Error::io("cannot write the undo record", error))?;
        self.checksum = append(self.checksum, bytes);
        self.end += bytes.len() as u64; // a file
        Ok(())
    }

    /// A range with its old bytes, and the sums of everything that is written there one after another.
    fn piece(&mut self, offset: u64, old: &[u8], versions: &[Vec<u32>]) -> Result<()> {
        let too_long = || Error::new(ErrorKind::Limit, "a piece of an undo record is too long");
        let has_old = old.iter().any(|byte| *byte != 0);
        let length = u32::try_from(old.len()).map_err(|_| too_long())?;
        let count = u16::try_from(versions.len()).map_err(|_| too_long())?;
        self.append(&UndoPiece { offset, length, has_old, versions: count }.encode())?;
        let sums: Vec<u8> = versions.iter().flatten().flat_map(|sum| sum.to_le_bytes()).collect();
        self.append(&sums)?;
        if has_old {
            self.append(old)?;
        }
        self.pieces += 1;
        Ok(())
    }
}

/// Writes the record of a plan. The header comes last, so that a record that is not whole is none.
pub(super) fn write(
    plan: &RepairPlan,
    undo: &dyn Storage,
    step: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<UndoReport> {
    let length = undo.len().map_err(|error| Error::io("cannot tell the length of the undo record", error))?;
    if length != 0 {
        return Err(Error::new(ErrorKind::Exists, "there is something in the storage for the undo record"));
    }
    let draft = plan.draft.as_ref();
    let mut writer = Writer { undo, end: HEADER, checksum: 0, pieces: 0 };
    for (slot, offset) in header_places(plan).into_iter().enumerate() {
        let mut old = [0; HEADER_BYTES];
        let read = draft.base().read_at(&mut old, offset);
        read.map_err(|error| Error::io(format!("cannot read the header at {offset:#x}"), error))?;
        let written = plan.headers.iter().filter_map(|update| update.get(slot));
        let versions: Vec<Vec<u32>> = written.map(|header| sums(&header.encode())).collect();
        writer.piece(offset, &old, &versions)?;
    }
    for_each_change(draft, &mut |offset, old, new| {
        if offset < draft.base_length() {
            writer.piece(offset, old, &[sums(new)])?;
        }
        step(writer.end)
    })?;
    let header = UndoHeader {
        old_length: draft.base_length(),
        new_length: draft.length(),
        file_write_guid: plan.old_guid,
        pieces: writer.pieces,
        body_length: writer.end - HEADER,
        body_checksum: writer.checksum,
    };
    let wrote = undo.write_at(&header.encode(), 0);
    wrote.map_err(|error| Error::io("cannot write the undo record", error))?;
    Ok(UndoReport { pieces: writer.pieces, bytes: writer.end })
}

/// Makes an image what it was before a repair, bit for bit and in its length, also after a repair or a restoration that
/// was cut off in the middle. Ends with a sync.
///
/// Before anything is written the record is checked to be whole, and every 512 bytes that it is about to be what they were
/// before the repair or what the repair made of them: otherwise the record belongs to another image, or this one was
/// written to since, which putting the record back would tear apart.
///
/// # Errors
/// [`InvalidArgument`](ErrorKind::InvalidArgument) for a record that is none or not whole; [`Refused`](ErrorKind::Refused)
/// when it does not belong to the image as it is; [`Cancelled`](ErrorKind::Cancelled): all of these before anything is
/// written. When reading or writing fails, it can be done again.
pub fn restore(storage: &dyn Storage, undo: &dyn Storage, progress: &dyn Progress) -> Result<Restored> {
    let (header, length, data_write_guid) = judge(storage, undo, progress)?;
    let total = Some(header.body_length.saturating_mul(2));
    let mut bytes = 0;
    for_each_piece(undo, &header, &mut |position, piece, _, old| {
        let _ = progress.advance(position + header.body_length, total); // too late to cancel
        let mut now = vec![0; old.len()];
        read_extended(storage, length, &mut now, piece.offset)?;
        if now == old {
            return Ok(());
        }
        bytes += old.len() as u64;
        let wrote = storage.write_at(old, piece.offset);
        wrote.map_err(|error| Error::io(format!("cannot write the image at {:#x}", piece.offset), error))
    })?;
    let failed = |error| Error::io(format!("cannot give the image its {:#x} bytes back", header.old_length), error);
    if length != header.old_length {
        storage.set_len(header.old_length).map_err(failed)?;
        if header.old_length > length && !storage.growth_reads_zero() {
            storage.zero_range(length..header.old_length).map_err(failed)?;
        }
    }
    storage.sync().map_err(|error| Error::io("cannot make the image durable", error))?;
    Ok(Restored { bytes, file_size_before: length, file_size_after: header.old_length, data_write_guid })
}

/// What [`restore`] would do: no bytes and the same length where there is nothing to put back any more. Nothing is written.
///
/// # Errors
/// As [`restore`], but for writing.
pub fn plan_restore(storage: &dyn Storage, undo: &dyn Storage, progress: &dyn Progress) -> Result<Restored> {
    let (header, length, data_write_guid) = judge(storage, undo, progress)?;
    let mut bytes = 0;
    for_each_piece(undo, &header, &mut |_, piece, _, old| {
        let mut now = vec![0; old.len()];
        read_extended(storage, length, &mut now, piece.offset)?;
        bytes += if now == old { 0 } else { old.len() as u64 };
        Ok(())
    })?;
    Ok(Restored { bytes, file_size_before: length, file_size_after: header.old_length, data_write_guid })
}

/// Checks that a record is whole and belongs to an image as it is; its header, the length of the image, and the data write
/// GUID that the image had.
fn judge(
    storage: &dyn Storage,
    undo: &dyn Storage,
    progress: &dyn Progress,
) -> Result<(UndoHeader, u64, Option<Guid>)> {
    let header = open(undo)?;
    let length = storage.len().map_err(|error| Error::io("cannot tell the length of the image", error))?;
    let lengths = header.old_length.min(header.new_length)..=header.old_length.max(header.new_length);
    if !lengths.contains(&length) {
        let what = format!("the image has {length:#x} bytes; the record is of one with {:#x}", header.old_length);
        return Err(foreign(&what));
    }
    let total = Some(header.body_length.saturating_mul(2));
    let mut newest: Option<Header> = None;
    for_each_piece(undo, &header, &mut |position, piece, sums, old| {
        advance(progress, position, total)?;
        if let (true, Some(raw)) = (OFFSETS.contains(&piece.offset), old.first_chunk::<HEADER_BYTES>())
            && let Some(found) = Header::decode(raw)
            && newest.is_none_or(|newest| found.sequence_number > newest.sequence_number)
        {
            newest = Some(found);
        }
        let mut now = vec![0; old.len()];
        read_extended(storage, length, &mut now, piece.offset)?;
        compare(piece, sums, old, &now)
    })?;
    Ok((header, length, newest.map(|header| header.data_write_guid)))
}

fn foreign(what: &str) -> Error {
    Error::new(ErrorKind::Refused, format!("the undo record does not belong to this image as it is: {what}"))
        .with_hint("nothing was changed; use the record of this very image, made since it was last written to")
}

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("this is no whole undo record: {what}"))
        .with_hint("name the file that `vhdkit repair --apply` wrote; nothing was changed")
}

/// What the image has; zeros behind its end.
fn read_extended(storage: &dyn Storage, length: u64, buffer: &mut [u8], offset: u64) -> Result<()> {
    let there = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
    let Some(part) = buffer.get_mut(..there).filter(|part| !part.is_empty()) else { return Ok(()) };
    let read = storage.read_at(part, offset);
    read.map_err(|error| Error::io(format!("cannot read the image at {offset:#x}"), error))
}

/// Checks that every sector is what it was or what it was made.
fn compare(piece: &UndoPiece, sums: &[u32], old: &[u8], now: &[u8]) -> Result<()> {
    let row = piece.sums_per_version();
    for (index, (old, now)) in old.chunks(SUM_BYTES).zip(now.chunks(SUM_BYTES)).enumerate() {
        let known = || sums.iter().skip(index).step_by(row.max(1)).any(|sum| *sum == append(0, now));
        if old != now && !known() {
            let at = piece.offset + (index * SUM_BYTES) as u64; // inside the piece
            return Err(foreign(&format!("the bytes at {at:#x} are neither those from before nor those from after")));
        }
    }
    Ok(())
}

/// Checks a record as a whole, and gives its header.
fn open(undo: &dyn Storage) -> Result<UndoHeader> {
    let length = undo.len().map_err(|error| Error::io("cannot tell the length of the undo record", error))?;
    let mut bytes = [0; size_of::<RawUndoHeader>()];
    if length < HEADER {
        return Err(damaged("it is too short"));
    }
    read(undo, &mut bytes, 0)?;
    let Some(header) = UndoHeader::decode(bytes) else { return Err(damaged("its header is damaged")) };
    if length - HEADER != header.body_length {
        return Err(damaged("its length is not the one that it had"));
    }
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut checksum = 0;
    let mut position = HEADER;
    while position < length {
        let count = usize::try_from(length - position).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..count) else { break };
        read(undo, part, position)?;
        checksum = append(checksum, part);
        position += count as u64; // below the length of the record
    }
    if checksum != header.body_checksum {
        return Err(damaged("its checksum is wrong"));
    }
    for_each_piece(undo, &header, &mut |_, _, _, _| Ok(()))?;
    Ok(header)
}

fn read(undo: &dyn Storage, buffer: &mut [u8], offset: u64) -> Result<()> {
    undo.read_at(buffer, offset).map_err(|error| Error::io("cannot read the undo record", error))
}

/// Takes where a piece ends in the record, the piece, its sums, and its old bytes.
type VisitPiece<'a> = dyn FnMut(u64, &UndoPiece, &[u32], &[u8]) -> Result<()> + 'a;

/// Visits every piece of a record, in order.
fn for_each_piece(undo: &dyn Storage, header: &UndoHeader, visit: &mut VisitPiece<'_>) -> Result<()> {
    let end = HEADER.saturating_add(header.body_length);
    let mut position = HEADER;
    for _ in 0..header.pieces {
        let mut bytes = [0; size_of::<RawPiece>()];
        let body = inside(position, PIECE, end)?;
        read(undo, &mut bytes, body.start)?;
        let Some(piece) = UndoPiece::decode(bytes, header.old_length) else {
            return Err(damaged("a piece of it makes no sense"));
        };
        let body = inside(body.end, piece.body_length(), end)?;
        let mut raw = vec![0; piece.sums_per_version() * usize::from(piece.versions) * 4]; // at most 32 KiB
        read(undo, &mut raw, body.start)?;
        let (chunks, _) = raw.as_chunks::<4>();
        let sums: Vec<u32> = chunks.iter().map(|chunk| u32::from_le_bytes(*chunk)).collect();
        let mut old = vec![0; piece.length as usize];
        if piece.has_old {
            read(undo, &mut old, body.start + raw.len() as u64)?; // inside the body
        }
        position = body.end;
        visit(position, &piece, &sums, &old)?;
    }
    if position == end { Ok(()) } else { Err(damaged("there is more in it than its pieces")) }
}

/// A range of the record, if it lies in it.
fn inside(start: u64, length: u64, end: u64) -> Result<Range<u64>> {
    let stop = start.checked_add(length).filter(|stop| *stop <= end);
    stop.map(|stop| start..stop).ok_or_else(|| damaged("a piece of it is missing"))
}
