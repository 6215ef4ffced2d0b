//! Entries of the BAT.
//!
//! | What is wrong | What becomes of the block |
//! |---|---|
//! | reserved bits, an offset that means nothing, an anchor that is none | the bits go; nothing is lost |
//! | two blocks at one place | each gets its own copy: both read as before, and writing one no longer changes the other |
//! | behind the end of the file | the file becomes long enough; what was cut off reads as zeros |
//! | an entry that can point at nothing | UNDEFINED: zeros, and never the parent's older data; only when no space is left in which its data could lie |
//! | a sector bitmap that is needed and not there | nothing: which sectors count cannot be known |

use std::collections::BTreeMap;
use std::ops::Range;

use super::draft::BlockCopy;
use super::{Planner, Step};
use crate::error::Result;
use crate::format::bat::{BITMAP_PRESENT, BatEntry, BatRules, PayloadState};
use crate::format::finding::{Code, CollectAll, Finding, Findings, Severity, Strictness};
use crate::format::geometry::{BAT_ENTRY_BYTES, BITMAP_BLOCK_BYTES, BatSlot};
use crate::image::extents::LayerCursor;
use crate::image::layer::{Layer, load};
use crate::image::scan::{Marks, scan_marks};
use crate::ops::{Progress, advance};
use crate::units::{BatIndex, FileOffset, MIB, round_up};

/// Entries with something wrong that are looked at one by one. More of them are no slip of a writer: then the BAT as a
/// whole cannot be trusted, and that is a case for `recover`.
const BROKEN_MAX: usize = 10_000;
/// Rounds: mending one entry may show what is wrong with another.
const ROUNDS_MAX: usize = 4;

/// The findings of a scan by entry.
struct Broken {
    bat_offset: u64,
    by_index: BTreeMap<u64, Vec<Finding>>,
    overflown: bool,
}

impl Findings for Broken {
    fn strictness(&self) -> Strictness {
        Strictness::Normal
    }

    fn take(&mut self, finding: Finding) -> Result<()> {
        let offset = finding.location().offset().and_then(|offset| offset.checked_sub(self.bat_offset));
        let Some(index) = offset.map(|offset| offset / BAT_ENTRY_BYTES) else { return Ok(()) };
        if finding.severity() == Severity::Note {
            return Ok(());
        }
        if self.by_index.len() >= BROKEN_MAX && !self.by_index.contains_key(&index) {
            self.overflown = true;
        } else {
            self.by_index.entry(index).or_default().push(finding);
        }
        Ok(())
    }
}

/// What is done about an entry.
#[derive(Debug)]
enum Decision {
    /// Nothing has to be done: it only suffers from others.
    Fine,
    /// Nothing certain can be done.
    Leave,
    /// It gets another value.
    Set { entry: BatEntry, what: String, lost: Option<String> },
    /// It gets a copy of what it claims.
    Copy,
    /// The file is made long enough.
    Extend { lost: Option<String> },
}

impl Planner {
    /// Mends entries until nothing changes any more. Stops when the BAT as a whole is not to be trusted.
    pub(super) fn blocks(&mut self, progress: &dyn Progress) -> Result<Step> {
        for _ in 0..ROUNDS_MAX {
            let mut findings = CollectAll::default();
            let Ok(loaded) = load(&self.storage(), None, self.options.growth_max, &mut findings) else {
                return Ok(Step::Stop);
            };
            let layer = Layer::from_loaded(loaded);
            let bat_offset = layer.rules().bat_offset.0;
            let mut broken = Broken { bat_offset, by_index: BTreeMap::new(), overflown: false };
            let block_size = layer.geometry().block_size();
            scan_marks(&layer, &mut broken, &mut |done, total| {
                advance(progress, done * block_size, Some(total * block_size)) // blocks of a disk
            })?;
            if broken.overflown {
                return Ok(Step::Stop);
            }
            if broken.by_index.is_empty() || !self.mend_entries(&layer, broken.by_index)? {
                break;
            }
        }
        Ok(Step::Next)
    }

    /// Decides about each entry. False when nothing was changed.
    fn mend_entries(&mut self, layer: &Layer, broken: BTreeMap<u64, Vec<Finding>>) -> Result<bool> {
        let rules = layer.rules();
        let mut good = good_marks(layer, &broken)?;
        // An entry in which nothing else is wrong is trusted before one that is damaged.
        let (shared, damaged): (Vec<_>, Vec<_>) = broken.into_iter().partition(|(_, findings)| {
            findings.iter().all(|finding| finding.code() == Code::BatOverlap || finding.code() == Code::BitmapMissing)
        });
        let mut may_be_found = None;
        let mut cut_seen = false;
        let mut copied = 0;
        let mut changed = false;
        let mut cursor = LayerCursor::new(layer);
        for (index, findings) in shared.into_iter().chain(damaged) {
            let index = BatIndex(index);
            let entry = cursor.entry(index)?;
            for finding in findings {
                if finding.code() == Code::BitmapMissing {
                    continue; // which sectors of the block are the image's own cannot be known
                }
                let mut context = Context {
                    planner: self,
                    layer,
                    good: &mut good,
                    may_be_found: &mut may_be_found,
                    cut_seen: &mut cut_seen,
                    copied: &mut copied,
                };
                let decision = context.decide(index, entry, &finding)?;
                let done = self.carry_out(rules, index, entry, finding, decision, &mut good)?;
                changed |= done;
                if done {
                    break; // the next round looks at what is left of it
                }
            }
        }
        Ok(changed)
    }

    fn carry_out(
        &mut self,
        rules: &BatRules,
        index: BatIndex,
        entry: BatEntry,
        finding: Finding,
        decision: Decision,
        good: &mut Marks,
    ) -> Result<bool> {
        let slot = rules.geometry.slot(index);
        let place = rules.bat_offset.0 + index.0 * BAT_ENTRY_BYTES; // inside the BAT region
        match decision {
            Decision::Fine => {
                claim(good, rules.owned_range(slot, entry));
                Ok(false)
            }
            Decision::Leave => Ok(false),
            Decision::Set { entry, what, lost } => {
                self.draft.write(place, &entry.0.to_le_bytes())?;
                claim(good, rules.owned_range(slot, entry));
                self.act(finding, what, lost);
                Ok(true)
            }
            Decision::Extend { .. } if !self.is_resizable() => Ok(false),
            Decision::Extend { lost } => {
                let end = rules.owned_range(slot, entry).map_or(0, |range| range.end);
                let length = round_up(end, MIB).unwrap_or(end).max(self.draft.length());
                self.draft.set_length(length);
                claim(good, rules.owned_range(slot, entry));
                self.act(finding, format!("the file is made {length:#x} bytes long"), lost);
                Ok(true)
            }
            Decision::Copy => {
                let Some(from) = rules.owned_range(slot, entry) else { return Ok(false) };
                let behind = good.end().saturating_mul(MIB).max(rules.taken_end).max(self.draft.length());
                let Some(to) = round_up(behind, MIB) else { return Ok(false) };
                let moved = BatEntry::new(entry.state_number(), FileOffset(to));
                self.draft.copy(BlockCopy { from: from.clone(), to });
                self.draft.write(place, &moved.0.to_le_bytes())?;
                good.mark(to, to + (from.end - from.start)); // the draft is that long now
                self.act(finding, format!("it gets its own copy of these bytes, at {to:#x}"), None);
                Ok(true)
            }
        }
    }
}

fn claim(good: &mut Marks, range: Option<Range<u64>>) {
    if let Some(range) = range {
        good.mark(range.start, range.end);
    }
}

/// What entries claim in which nothing is wrong, and what regions and log take.
fn good_marks(layer: &Layer, broken: &BTreeMap<u64, Vec<Finding>>) -> Result<Marks> {
    let rules = layer.rules();
    let size = rules.file_size.get();
    let mut marks = Marks::new(size)?;
    for taken in rules.taken.ranges() {
        marks.mark(taken.range.start, taken.range.end.min(size));
    }
    let mut cursor = LayerCursor::new(layer);
    let entries = rules.geometry.bat_entries();
    let mut index = 0;
    while index < entries {
        let entry = cursor.entry(BatIndex(index))?;
        if entry.0 == 0 {
            index += cursor.count_equal(BatIndex(index), entries - index, entry)?.max(1);
            continue;
        }
        if !broken.contains_key(&index)
            && let Some(range) = rules.owned_range(rules.geometry.slot(BatIndex(index)), entry)
        {
            marks.mark(range.start, range.end.min(size));
        }
        index += 1;
    }
    Ok(marks)
}

/// What a decision is made from.
struct Context<'a> {
    planner: &'a Planner,
    layer: &'a Layer,
    /// What is claimed by entries that are trusted.
    good: &'a mut Marks,
    /// Whether there is space that no trusted entry owns and that may hold a block's data; looked for once.
    may_be_found: &'a mut Option<bool>,
    /// A block that reaches over the end of the file was judged already; there is one at most.
    cut_seen: &'a mut bool,
    /// Bytes of copies so far.
    copied: &'a mut u64,
}

impl Context<'_> {
    fn rules(&self) -> &BatRules {
        self.layer.rules()
    }

    fn decide(&mut self, index: BatIndex, entry: BatEntry, finding: &Finding) -> Result<Decision> {
        let slot = self.rules().geometry.slot(index);
        match slot {
            BatSlot::Payload(_) => self.payload(slot, entry, finding.code()),
            BatSlot::Bitmap(chunk) => self.bitmap(slot, entry, finding.code(), self.chunk_needs_bitmap(chunk.0)?),
        }
    }

    /// True when a range lies in the file, behind the structures, and no trusted entry claims any of it.
    fn is_free(&self, range: &Range<u64>) -> bool {
        let rules = self.rules();
        range.end <= rules.file_size.get() && self.is_unclaimed(range)
    }

    fn is_unclaimed(&self, range: &Range<u64>) -> bool {
        let (start, end) = (range.start / MIB, range.end.div_ceil(MIB));
        let free = self.good.find_free(start, end, end.saturating_sub(start)) == Some(start);
        range.start >= crate::format::HEADER_SECTION_BYTES && self.rules().taken.overlap(range).is_none() && free
    }

    fn payload(&mut self, slot: BatSlot, entry: BatEntry, code: Code) -> Result<Decision> {
        let set = |entry, what: &str| Decision::Set { entry, what: what.to_owned(), lost: None };
        let bare = BatEntry(entry.0 & !entry.reserved());
        let claimed = self.rules().owned_range(slot, bare);
        let (offset, state) = (bare.file_offset(), bare.state_number());
        Ok(match code {
            Code::BatReserved => match claimed {
                Some(range) if self.is_free(&range) && state != 5 => set(bare, "the reserved bits become zero"),
                None if bare.payload_state().is_some() && offset.0 == 0 && state < 4 => {
                    set(bare, "the reserved bits become zero")
                }
                _ => self.give_up(slot)?,
            },
            // One bit makes a state 7 a state 5: with data at its place the state may be what is damaged.
            Code::BatStateOldUnmapped if self.holds_data(offset.0)? => Decision::Leave,
            Code::BatStateOldUnmapped => {
                let keeps = claimed.is_some_and(|range| self.is_free(&range));
                let anchor = if keeps { offset } else { FileOffset(0) };
                set(
                    BatEntry::new(PayloadState::Unmapped.number(), anchor),
                    "the state becomes UNMAPPED of version 1 (3)",
                )
            }
            Code::BatAnchor => set(BatEntry::new(state, FileOffset(0)), "the block keeps no space; it holds no data"),
            Code::BatUnusedOffset => self.unused_offset(bare)?,
            Code::BatPartialWithoutParent if self.planner.parent_doubtful => Decision::Leave,
            Code::BatPartialWithoutParent | Code::BatState if !self.rules().geometry.is_differencing() => {
                let range = offset.0..offset.0.saturating_add(self.rules().geometry.block_size());
                if offset.0 != 0 && self.is_free(&range) {
                    let entry = BatEntry::new(PayloadState::FullyPresent.number(), offset);
                    set(entry, "the state becomes FULLY_PRESENT: its place is in order, and there is no parent")
                } else {
                    self.give_up(slot)?
                }
            }
            Code::BatLastBlockCut => Decision::Extend { lost: None },
            Code::BatOutsideFile => self.outside(slot, claimed)?,
            Code::BatOverlap if !matches!(state, 6 | 7) => {
                set(BatEntry::new(state, FileOffset(0)), "the block keeps no space; it holds no data")
            }
            Code::BatOverlap => self.overlap(slot, claimed)?,
            Code::BatOffset => self.give_up(slot)?,
            _ => Decision::Leave,
        })
    }

    /// A state without data, but with an offset. If there may be data, the state may be what is damaged.
    fn unused_offset(&self, entry: BatEntry) -> Result<Decision> {
        if self.holds_data(entry.file_offset().0)? {
            return Ok(Decision::Leave);
        }
        let entry = BatEntry::new(entry.state_number(), FileOffset(0));
        Ok(Decision::Set { entry, what: "the offset, which means nothing, becomes zero".to_owned(), lost: None })
    }

    /// True when a block could lie at a place, and there is data that no trusted entry claims.
    fn holds_data(&self, offset: u64) -> Result<bool> {
        // The file may end inside the last block.
        let end = offset.saturating_add(self.rules().geometry.block_size()).min(self.rules().file_size.get());
        let range = offset..end.max(offset);
        Ok(!range.is_empty() && self.is_unclaimed(&range) && !self.planner.is_zero(range)?)
    }

    /// A block behind the end of the file: it was cut off, or its entry is damaged.
    fn outside(&mut self, slot: BatSlot, claimed: Option<Range<u64>>) -> Result<Decision> {
        let rules = self.rules();
        let geometry = &rules.geometry;
        // No image of this disk is longer than all its blocks and bitmaps, its structures, and some room.
        let blocks = geometry.payload_blocks().saturating_mul(geometry.block_size());
        let bitmaps = geometry.chunks().saturating_mul(BITMAP_BLOCK_BYTES);
        let longest = rules.taken_end.saturating_add(blocks).saturating_add(bitmaps).saturating_add(64 * MIB);
        let size = rules.file_size.get();
        let place = rules.place_text(slot);
        match claimed {
            Some(range) if range.end <= longest.max(size) && self.is_unclaimed(&range) => {
                // As long as data is left over elsewhere, its place may be what is damaged, and not the file cut off.
                let elsewhere = if range.start >= size {
                    self.may_be_found()?
                } else {
                    std::mem::replace(self.cut_seen, true) || self.data_left(&range)?
                };
                if elsewhere {
                    return Ok(Decision::Leave);
                }
                let cut = range.end - range.start.max(size).min(range.end);
                if range.end.saturating_sub(size) > self.planner.options.growth_max {
                    return Ok(Decision::Leave);
                }
                Ok(Decision::Extend {
                    lost: Some(format!("the last {cut:#x} bytes of {place} were cut off, and read as zeros")),
                })
            }
            _ => self.give_up(slot),
        }
    }

    /// A place that somebody else claims too.
    fn overlap(&mut self, slot: BatSlot, claimed: Option<Range<u64>>) -> Result<Decision> {
        let Some(range) = claimed else { return Ok(Decision::Leave) };
        if self.rules().taken.overlap(&range).is_some() {
            return self.give_up(slot);
        }
        if range.end > self.rules().file_size.get() {
            return Ok(Decision::Leave); // mended as what it is besides
        }
        if self.is_free(&range) {
            return Ok(Decision::Fine);
        }
        // One of the two may belong to data that is left over; a copy would hide that from `recover`.
        if self.may_be_found()? {
            return Ok(Decision::Leave);
        }
        let length = range.end - range.start;
        // Nobody means to double a file.
        if *self.copied + length > self.rules().file_size.get() || !self.planner.is_resizable() {
            return Ok(Decision::Leave);
        }
        *self.copied += length;
        Ok(Decision::Copy)
    }

    /// A block whose entry cannot lead to its data.
    fn give_up(&mut self, slot: BatSlot) -> Result<Decision> {
        if self.may_be_found()? {
            return Ok(Decision::Leave);
        }
        let what = self.rules().place_text(slot);
        Ok(Decision::Set {
            entry: BatEntry::new(PayloadState::Undefined.number(), FileOffset(0)),
            what: "the block becomes UNDEFINED, as its entry leads to no data".to_owned(),
            lost: Some(format!("{what}: nothing in the file can be its data; it reads as zeros from now on")),
        })
    }

    /// Whether there is data that no trusted entry owns. What damaged entries claim does not count as owned: the claim of
    /// the very entry that is judged may lie over the block that it lost.
    fn may_be_found(&mut self) -> Result<bool> {
        if let Some(known) = *self.may_be_found {
            return Ok(known);
        }
        let found = self.data_left(&(0..0))?;
        *self.may_be_found = Some(found);
        Ok(found)
    }

    /// Whether a MiB of the file, but for a range, holds data that no trusted entry owns. The last one may be a part.
    fn data_left(&self, except: &Range<u64>) -> Result<bool> {
        let size = self.rules().file_size.get();
        let end = size.div_ceil(MIB);
        let mut position = 1;
        while let Some(start) = self.good.find_free(position, end, 1) {
            let range = start * MIB..((start + 1) * MIB).min(size);
            let is_own = except.start < range.end && range.start < except.end;
            if !is_own && !self.planner.is_zero(range)? {
                return Ok(true);
            }
            position = start + 1;
        }
        Ok(false)
    }

    /// True when a block of a chunk is partially present.
    fn chunk_needs_bitmap(&self, chunk: u64) -> Result<bool> {
        let geometry = &self.rules().geometry;
        let first = chunk * geometry.chunk_ratio(); // a chunk of the disk
        let end = (first + geometry.chunk_ratio()).min(geometry.payload_blocks());
        let mut cursor = LayerCursor::new(self.layer);
        for block in first..end {
            let entry = cursor.entry(geometry.payload_index(crate::units::BlockIndex(block)))?;
            if entry.state_number() == PayloadState::PartiallyPresent.number() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn bitmap(&mut self, slot: BatSlot, entry: BatEntry, code: Code, needed: bool) -> Result<Decision> {
        let set = |entry, what: &str| Decision::Set { entry, what: what.to_owned(), lost: None };
        let bare = BatEntry(entry.0 & !entry.reserved());
        let offset = bare.file_offset();
        let range = offset.0..offset.0.saturating_add(BITMAP_BLOCK_BYTES);
        Ok(match code {
            Code::BitmapUnexpected if self.planner.parent_doubtful => Decision::Leave,
            Code::BitmapUnexpected => set(BatEntry(0), "the entry becomes zero: a disk without parent has no bitmap"),
            Code::BatOverlap if self.rules().taken.overlap(&range).is_none() => {
                self.overlap(slot, self.rules().owned_range(slot, bare))?
            }
            Code::BatReserved if bare.state_number() == BITMAP_PRESENT && self.is_free(&range) => {
                set(bare, "the reserved bits become zero")
            }
            Code::BatUnusedOffset
            | Code::BatReserved
            | Code::BitmapState
            | Code::BitmapOffset
            | Code::BitmapOutsideFile
            | Code::BatOverlap
                if !needed =>
            {
                set(BatEntry(0), "the entry becomes zero: no block of the chunk needs a bitmap")
            }
            _ => Decision::Leave,
        })
    }
}

impl BatRules {
    /// What an entry is for, in words.
    fn place_text(&self, slot: BatSlot) -> String {
        match slot {
            BatSlot::Payload(block) => {
                let first = block.0.saturating_mul(self.geometry.block_size());
                format!("block {block}, at {first:#x} of the disk")
            }
            BatSlot::Bitmap(chunk) => format!("the sector bitmap of chunk {chunk}"),
        }
    }
}
