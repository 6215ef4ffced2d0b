//! Targets that are written front to back: where each run of a disk goes, and what has to be made zero.
//!
//! Blocks are allocated in the order of the disk, so that the layout does not depend on threads or timing, and each
//! run lies behind the one before it in the file. What lies between two runs is a gap that reads as zero.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::create::{BlockState, CreateOptions, Preallocation};
use super::layout::{ImagePlan, initial_entry};
use super::{Progress, advance};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DISK_SIZE_MAX;
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::geometry::{BAT_ENTRY_BYTES, Geometry};
use crate::format::metadata::DiskType;
use crate::storage::Storage;
use crate::units::{BatIndex, BlockIndex, FileOffset, GuestOffset, MIB};

/// BAT entries collected before they are written.
const WINDOW_BYTES: usize = 256 << 10;
/// How far a file is grown ahead of what is written to it: growing once is cheaper than with every write.
const GROWTH_STEP: u64 = 64 * MIB;
/// Most bytes made zero between two looks at whether the caller cancelled.
const ZERO_STEP: u64 = 256 * MIB;
/// The same where zeros are written one by one.
const WRITE_ZEROS_STEP: usize = 1 << 20;

/// An error of writing, with what the user can do where that is known.
pub(super) fn write_error(what: impl Into<String>, error: io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull => "free space where the target lies, or choose another place",
        io::ErrorKind::QuotaExceeded => "the disk quota is used up: free space, or choose another place",
        io::ErrorKind::FileTooLarge => "the file system, or a limit of the shell, does not allow a file of that size",
        io::ErrorKind::InvalidInput => {
            let hint = "choose a device that is large enough for the disk and its structures";
            return Error::new(ErrorKind::Refused, format!("{}: {error}", what.into())).with_hint(hint);
        }
        _ => return Error::io(what, error),
    };
    Error::io(what, error).with_hint(hint)
}

/// How ranges that must read as zero come to do so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeroing {
    /// They do already.
    Nothing,
    /// What is there is stale: give its space back, or make it zero where that cannot be done.
    Clear,
    /// What is there is stale, and its space has to stay.
    Keep,
    /// Zeros are written whatever is there.
    Write,
}

impl Zeroing {
    /// What a target needs, judged before anything is written to it.
    pub(super) fn choose(storage: &dyn Storage, preallocation: Preallocation) -> Result<Self> {
        let length = storage.len().map_err(|error| Error::io("cannot tell the length of the target", error))?;
        let stale = length != 0 || !storage.growth_reads_zero();
        Ok(match preallocation {
            Preallocation::Full => Self::Write,
            Preallocation::Falloc if stale => Self::Keep,
            Preallocation::None if stale => Self::Clear,
            Preallocation::None | Preallocation::Falloc => Self::Nothing,
        })
    }

    /// Makes a range read as zero. `step` is called with the bytes done, and may end it.
    pub(super) fn apply(
        self,
        storage: &dyn Storage,
        range: Range<u64>,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let zeros = if self == Self::Write { vec![0; WRITE_ZEROS_STEP] } else { Vec::new() };
        let mut position = if self == Self::Nothing { range.end } else { range.start };
        while position < range.end {
            let length = (range.end - position).min(if self == Self::Write { zeros.len() as u64 } else { ZERO_STEP });
            let piece = position..position + length; // ends inside range
            let zeros = zeros.get(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
            let done = match self {
                Self::Nothing => Ok(()),
                Self::Clear => clear(storage, piece),
                Self::Keep => storage.zero_range(piece),
                Self::Write => storage.write_at(zeros, position),
            };
            done.map_err(|error| write_error(format!("cannot write zeros at {position:#x}"), error))?;
            position += length;
            step(position - range.start)?;
        }
        Ok(())
    }
}

/// Gives the space of a range back where that can be done, and makes it zero elsewhere, also past the end.
fn clear(storage: &dyn Storage, range: Range<u64>) -> io::Result<()> {
    let end = storage.len()?.clamp(range.start, range.end);
    if range.start < end && !storage.punch_hole(range.start..end)? {
        storage.zero_range(range.start..end)?;
    }
    if end < range.end { storage.zero_range(end..range.end) } else { Ok(()) }
}

/// Makes a range read as zero and reserves its space, as the options say.
pub(super) fn clear_and_reserve(
    storage: &dyn Storage,
    range: Range<u64>,
    zeroing: Zeroing,
    preallocation: Preallocation,
    progress: &dyn Progress,
) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let total = Some(range.end);
    zeroing.apply(storage, range.clone(), &mut |done| advance(progress, range.start + done, total))?;
    if preallocation == Preallocation::Falloc {
        let reserved = storage.allocate(range).map_err(|error| write_error("cannot reserve space", error))?;
        if !reserved {
            let error = Error::io("the target cannot reserve space", io::ErrorKind::Unsupported.into());
            return Err(error.with_hint("preallocate in full, which writes zeros, or not at all"));
        }
    }
    Ok(())
}

/// Writes everything of an image but BAT and blocks; the file identifier comes last.
pub(super) fn write_structures(storage: &dyn Storage, plan: &ImagePlan) -> Result<()> {
    for (offset, bytes) in plan.structures() {
        let what = || format!("cannot write the structures of the image at {offset:#x}");
        storage.write_at(&bytes, offset).map_err(|error| write_error(what(), error))?;
    }
    Ok(())
}

/// A BAT that is written from its first entry to its last, without being held in memory.
#[derive(Debug)]
pub(super) struct BatStream {
    geometry: Geometry,
    fixed_payload_offset: Option<u64>,
    state: BlockState,
    /// Where the BAT begins in its storage.
    base: u64,
    /// The index of the first entry in the window.
    first: u64,
    window: Vec<u8>,
}

impl BatStream {
    /// The BAT of a planned image, in its place.
    pub(super) fn new(plan: &ImagePlan) -> Self {
        Self {
            geometry: *plan.geometry(),
            fixed_payload_offset: plan.fixed_payload_offset(),
            state: plan.block_state(),
            base: plan.bat_range().start,
            first: 0,
            window: Vec::with_capacity(WINDOW_BYTES),
        }
    }

    /// The index of the next entry.
    const fn next(&self) -> u64 {
        self.first + self.window.len() as u64 / BAT_ENTRY_BYTES // at most 2^26 entries and their bitmaps'
    }

    /// Sets an entry; what lies between it and the one before gets what blocks start with.
    fn put(&mut self, storage: &dyn Storage, index: BatIndex, entry: BatEntry) -> Result<()> {
        self.fill(storage, index.0, &mut |_| Ok(()))?;
        self.push(storage, entry)
    }

    fn push(&mut self, storage: &dyn Storage, entry: BatEntry) -> Result<()> {
        self.window.extend_from_slice(&entry.0.to_le_bytes());
        if self.window.len() >= WINDOW_BYTES { self.flush(storage) } else { Ok(()) }
    }

    /// Gives all entries up to an index what blocks start with. `step` hears how many bytes of the BAT are written.
    pub(super) fn fill(
        &mut self,
        storage: &dyn Storage,
        until: u64,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let empty = self.fixed_payload_offset.is_none() && self.state == BlockState::NotPresent;
        if empty && until.saturating_sub(self.next()) * BAT_ENTRY_BYTES >= WINDOW_BYTES as u64 {
            self.flush(storage)?;
            self.first = until; // what is passed over reads as zero already
        }
        while self.next() < until {
            let entry = initial_entry(&self.geometry, self.fixed_payload_offset, self.state, BatIndex(self.next()));
            self.push(storage, entry)?;
            if self.window.is_empty() {
                step(self.first * BAT_ENTRY_BYTES)?;
            }
        }
        Ok(())
    }

    /// Writes what is collected.
    pub(super) fn flush(&mut self, storage: &dyn Storage) -> Result<()> {
        let offset = self.base + self.first * BAT_ENTRY_BYTES;
        let written = storage.write_at(&self.window, offset);
        written.map_err(|error| write_error(format!("cannot write the BAT at {offset:#x}"), error))?;
        self.first = self.next();
        self.window.clear();
        Ok(())
    }
}

/// A part of a run that is contiguous in the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it stands on the disk.
    pub(super) guest: Range<u64>,
    /// Where it goes in the target.
    pub(super) offset: u64,
}

/// Where runs go, in order, and what lies between them.
#[derive(Debug, Default)]
pub(super) struct Placement {
    pub(super) pieces: Vec<Piece>,
    /// Ranges of the target that must be made zero.
    pub(super) gaps: Vec<Range<u64>>,
}

impl Placement {
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.gaps.clear();
    }
}

/// Blocks of a dynamic image, allocated as they come.
#[derive(Debug)]
struct Blocks {
    geometry: Geometry,
    /// Where the next block goes.
    next: u64,
    /// The block allocated last, and where.
    last: Option<(BlockIndex, u64)>,
    bat: BatStream,
    /// Where the BAT is written: the target, or a temporary place until its length is known.
    bat_storage: Arc<dyn Storage>,
}

impl Blocks {
    /// Where a block lies; allocates it if it is not the one that was asked for last.
    fn locate(&mut self, block: BlockIndex) -> Result<u64> {
        match self.last {
            Some((last, offset)) if last == block => Ok(offset),
            _ => {
                let offset = self.next;
                let entry = BatEntry::new(PayloadState::FullyPresent.number(), FileOffset(offset));
                self.bat.put(self.bat_storage.as_ref(), self.geometry.payload_index(block), entry)?;
                self.next += self.geometry.block_size(); // each block is allocated once: at most 64 TiB
                self.last = Some((block, offset));
                Ok(offset)
            }
        }
    }
}

#[derive(Debug)]
enum Kind {
    /// The bytes of the disk.
    Raw,
    /// A disk whose blocks all lie in order behind this offset.
    Fixed(u64),
    /// A disk whose blocks are allocated as they come.
    Dynamic(Blocks),
}

/// What a VHDX target is to be, when it is finished.
#[derive(Debug)]
enum Tables {
    /// None: a raw target.
    None,
    /// In front of the data; all is known.
    First(Box<ImagePlan>),
    /// Behind the data, whose size is not known yet.
    Behind(Box<CreateOptions>),
}

/// A raw or VHDX target in storage.
#[derive(Debug)]
pub(super) struct Target {
    storage: Arc<dyn Storage>,
    kind: Kind,
    tables: Tables,
    zeroing: Zeroing,
    /// Up to where the target has been written or passed over.
    reached: u64,
    /// The length that the file was given; `u64::MAX` if it is not to be grown ahead.
    grown: u64,
}

impl Target {
    /// A raw target: the bytes of a disk of `size` bytes, or of as many as will come.
    pub(super) fn raw(storage: &Arc<dyn Storage>, size: Option<u64>) -> Result<Self> {
        let zeroing = Zeroing::choose(storage.as_ref(), Preallocation::None)?;
        if let Some(size) = size {
            let message = || format!("cannot give the target the length {size}");
            storage.set_len(size).map_err(|error| write_error(message(), error))?;
        }
        let grown = if zeroing == Zeroing::Nothing { size.unwrap_or_default() } else { u64::MAX };
        Ok(Self { storage: Arc::clone(storage), kind: Kind::Raw, tables: Tables::None, zeroing, reached: 0, grown })
    }

    /// A VHDX target whose size is known.
    pub(super) fn vhdx(storage: &Arc<dyn Storage>, plan: ImagePlan, progress: &dyn Progress) -> Result<Self> {
        let zeroing = Zeroing::choose(storage.as_ref(), plan.preallocation())?;
        let fixed = plan.disk_type() == DiskType::Fixed;
        let gaps = gap_zeroing(storage.as_ref(), fixed, plan.preallocation())?;
        if fixed {
            let message = || format!("cannot give the target the length {}", plan.full_length());
            storage.set_len(plan.full_length()).map_err(|error| write_error(message(), error))?;
        }
        clear_and_reserve(storage.as_ref(), 0..plan.payload_offset(), zeroing, plan.preallocation(), progress)?;
        if fixed && plan.preallocation() == Preallocation::Falloc {
            let blocks = plan.payload_offset()..plan.full_length();
            clear_and_reserve(storage.as_ref(), blocks, Zeroing::Nothing, Preallocation::Falloc, progress)?;
        }
        let kind = match plan.disk_type() {
            DiskType::Fixed => Kind::Fixed(plan.payload_offset()),
            _ => Kind::Dynamic(Blocks {
                geometry: *plan.geometry(),
                next: plan.payload_offset(),
                last: None,
                bat: BatStream::new(&plan),
                bat_storage: Arc::clone(storage),
            }),
        };
        Ok(Self {
            storage: Arc::clone(storage),
            kind,
            zeroing: gaps,
            reached: plan.payload_offset(),
            grown: if fixed || gaps != Zeroing::Nothing { u64::MAX } else { 0 },
            tables: Tables::First(Box::new(plan)),
        })
    }

    /// A VHDX target whose size is known only at the end. `spill` holds the BAT meanwhile: empty storage that reads
    /// as zero where it grows.
    pub(super) fn vhdx_of_unknown_size(
        storage: &Arc<dyn Storage>,
        layout: &CreateOptions,
        spill: &Arc<dyn Storage>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        // Everything but the size is checked now; the largest size gives the right place in the BAT to every block.
        let options = CreateOptions { size: Some(DISK_SIZE_MAX), ..layout.clone() };
        let plan = ImagePlan::with_tables_behind(&options, 0)?;
        let zeroing = Zeroing::choose(storage.as_ref(), plan.preallocation())?;
        let fixed = plan.disk_type() == DiskType::Fixed;
        let gaps = gap_zeroing(storage.as_ref(), fixed, plan.preallocation())?;
        if fixed && plan.preallocation() == Preallocation::Falloc {
            let message = "space cannot be reserved before the size of the disk is known";
            return Err(
                Error::new(ErrorKind::InvalidArgument, message).with_hint("give the size, or preallocate in full")
            );
        }
        clear_and_reserve(storage.as_ref(), 0..plan.payload_offset(), zeroing, plan.preallocation(), progress)?;
        let kind = if fixed {
            Kind::Fixed(plan.payload_offset())
        } else {
            let bat = BatStream { base: 0, ..BatStream::new(&plan) };
            Kind::Dynamic(Blocks {
                geometry: *plan.geometry(),
                next: plan.payload_offset(),
                last: None,
                bat,
                bat_storage: Arc::clone(spill),
            })
        };
        Ok(Self {
            storage: Arc::clone(storage),
            kind,
            zeroing: gaps,
            reached: plan.payload_offset(),
            grown: if gaps == Zeroing::Nothing { 0 } else { u64::MAX },
            tables: Tables::Behind(Box::new(layout.clone())),
        })
    }

    /// Where the bytes go.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// How gaps become zero.
    pub(super) const fn zeroing(&self) -> Zeroing {
        self.zeroing
    }

    /// Adds where a run of the disk goes. Runs come in the order of the disk.
    pub(super) fn place(&mut self, guest: Range<u64>, out: &mut Placement) -> Result<()> {
        debug_assert!(out.pieces.last().is_none_or(|last| last.guest.end <= guest.start), "runs come in order");
        if guest.end > DISK_SIZE_MAX && !matches!(self.kind, Kind::Raw) {
            let error = Error::new(ErrorKind::InvalidArgument, "the source is larger than a VHDX can be");
            return Err(error.with_hint("a VHDX holds 64 TiB at most: write a raw disk instead"));
        }
        let mut position = guest.start;
        while position < guest.end {
            let (offset, end) = match &mut self.kind {
                Kind::Raw => (position, guest.end),
                Kind::Fixed(start) => (*start + position, guest.end),
                Kind::Dynamic(blocks) => {
                    let at = GuestOffset(position);
                    let inside = blocks.geometry.offset_in_block(at);
                    let offset = blocks.locate(blocks.geometry.block_of(at))? + inside;
                    (offset, guest.end.min(position - inside + blocks.geometry.block_size()))
                }
            };
            self.add(Piece { guest: position..end, offset }, out);
            position = end;
        }
        self.grow()
    }

    /// Adds a piece, and the gap before it.
    fn add(&mut self, piece: Piece, out: &mut Placement) {
        if piece.offset > self.reached && self.zeroing != Zeroing::Nothing {
            out.gaps.push(self.reached..piece.offset);
        }
        self.reached = piece.offset + (piece.guest.end - piece.guest.start);
        match out.pieces.last_mut() {
            Some(last)
                if last.guest.end == piece.guest.start
                    && last.offset + (last.guest.end - last.guest.start) == piece.offset =>
            {
                last.guest.end = piece.guest.end;
            }
            _ => out.pieces.push(piece),
        }
    }

    /// Makes the file longer than what is about to be written.
    fn grow(&mut self) -> Result<()> {
        if self.reached <= self.grown {
            return Ok(());
        }
        let ahead = self.reached.next_multiple_of(MIB) + GROWTH_STEP;
        // Where a file cannot be that long, the writes themselves will tell.
        self.grown = if self.storage.set_len(ahead).is_ok() { ahead } else { u64::MAX };
        Ok(())
    }

    /// Writes what is missing once all data is there, for a disk of `size` bytes. Returns the bytes of the file.
    pub(super) fn finish(mut self, size: u64, progress: &dyn Progress) -> Result<u64> {
        let tables = std::mem::replace(&mut self.tables, Tables::None);
        match tables {
            Tables::None => self.end_data(size, progress),
            Tables::First(plan) => {
                let end = match &self.kind {
                    Kind::Dynamic(blocks) => blocks.next,
                    _ => plan.full_length(),
                };
                self.end_data(end, progress)?;
                self.finish_bat(&plan)?;
                write_structures(self.storage.as_ref(), &plan)?;
                Ok(end)
            }
            Tables::Behind(options) => self.finish_tables(&options, size, progress),
        }
    }

    /// Ends the data: what was not reached becomes zero, and the file gets its length.
    fn end_data(&mut self, end: u64, progress: &dyn Progress) -> Result<u64> {
        let gap = self.reached.min(end)..end;
        self.zeroing.apply(self.storage.as_ref(), gap, &mut |_| advance(progress, end, Some(end)))?;
        self.set_length(end)?;
        Ok(end)
    }

    fn set_length(&self, length: u64) -> Result<()> {
        let message = || format!("cannot give the target the length {length}");
        self.storage.set_len(length).map_err(|error| write_error(message(), error))
    }

    /// Writes the entries of the BAT that are not written yet.
    fn finish_bat(&mut self, plan: &ImagePlan) -> Result<()> {
        let entries = plan.geometry().bat_entries();
        if let Kind::Dynamic(blocks) = &mut self.kind {
            let storage = Arc::clone(&blocks.bat_storage);
            blocks.bat.fill(storage.as_ref(), entries, &mut |_| Ok(()))?;
            blocks.bat.flush(storage.as_ref())
        } else {
            let mut bat = BatStream::new(plan);
            bat.fill(self.storage.as_ref(), entries, &mut |_| Ok(()))?;
            bat.flush(self.storage.as_ref())
        }
    }

    /// Writes metadata and BAT behind the data.
    fn finish_tables(mut self, options: &CreateOptions, size: u64, progress: &dyn Progress) -> Result<u64> {
        let options = CreateOptions { size: Some(size), ..options.clone() };
        let plan = ImagePlan::with_tables_behind(&options, 0)?;
        let data_length = match &self.kind {
            Kind::Dynamic(blocks) => blocks.next - plan.payload_offset(),
            _ => plan.geometry().payload_blocks() * plan.geometry().block_size(),
        };
        let plan = ImagePlan::with_tables_behind(&options, data_length)?;
        self.end_data(plan.metadata_range().start, progress)?;
        let end = plan.bat_range().end;
        let tables = plan.metadata_range().start..end;
        self.set_length(end)?;
        self.zeroing.apply(self.storage.as_ref(), tables, &mut |_| advance(progress, size, Some(size)))?;
        self.finish_bat(&plan)?;
        if let Kind::Dynamic(blocks) = &self.kind {
            let bytes = plan.geometry().bat_entries() * BAT_ENTRY_BYTES;
            copy_bat(blocks.bat_storage.as_ref(), self.storage.as_ref(), plan.bat_range().start, bytes)?;
        }
        write_structures(self.storage.as_ref(), &plan)?;
        Ok(end)
    }
}

/// How gaps between runs become zero: space is reserved for all of a fixed image, but not for the blocks of others.
fn gap_zeroing(storage: &dyn Storage, fixed: bool, preallocation: Preallocation) -> Result<Zeroing> {
    Zeroing::choose(storage, if fixed { preallocation } else { Preallocation::None })
}

/// Copies the BAT out of its temporary place.
fn copy_bat(spill: &dyn Storage, target: &dyn Storage, offset: u64, length: u64) -> Result<()> {
    let there = spill.len().map_err(|error| Error::io("cannot tell the length of the temporary file", error))?;
    let length = length.min(there); // entries behind the last one that was written are zero
    let mut buffer = vec![0; WINDOW_BYTES];
    let mut position = 0;
    while position < length {
        let piece = usize::try_from(length - position).unwrap_or(usize::MAX).min(buffer.len());
        let Some(piece) = buffer.get_mut(..piece) else { break };
        spill.read_at(piece, position).map_err(|error| Error::io("cannot read the temporary file", error))?;
        let written = target.write_at(piece, offset + position);
        written.map_err(|error| write_error(format!("cannot write the BAT at {:#x}", offset + position), error))?;
        position += piece.len() as u64;
    }
    Ok(())
}
