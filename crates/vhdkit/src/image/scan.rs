//! One pass over a whole BAT: every entry judged, every owned MiB marked, what is left over counted.
//!
//! Memory is one bit per MiB of file: 8 MiB for a full disk of 64 TiB.

use super::bat::judge;
use super::extents::LayerCursor;
use super::layer::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::{BITMAP_PRESENT, BatEntry, BatRules, PayloadState};
use crate::format::finding::{Code, Findings};
use crate::format::geometry::BatSlot;
use crate::units::{BatIndex, BlockIndex, ChunkIndex, MIB};

/// Longest file that is scanned; a full disk of 64 TiB is a sixteenth of that. Keeps the marks below 128 MiB.
const FILE_BYTES_MAX: u64 = 1 << 50;
/// Overlaps for which the other owner is looked up, which takes a pass each.
const OWNERS_NAMED_MAX: u32 = 16;
/// Blocks between two calls of the progress function.
const PROGRESS_BLOCKS: u64 = 1 << 20;

/// What a scan counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BatScan {
    /// Payload blocks by state, in the order of [`PayloadState::ALL`]. Entries in error are not counted.
    pub blocks: [u64; 6],
    /// Sector bitmap blocks that are present.
    pub bitmaps_present: u64,
    /// Runs of payload blocks that follow each other on the disk and in the file.
    pub fragments: u64,
    /// Bytes behind the header section that belong to nothing.
    pub leaked_bytes: u64,
    /// Bytes kept by blocks that hold no data, and by sector bitmaps that no block needs.
    pub unneeded_bytes: u64,
}

/// One bit per MiB of file.
#[derive(Debug)]
pub(crate) struct Marks(Vec<u64>);

impl Marks {
    pub(crate) fn new(file_size: u64) -> Result<Self> {
        if file_size > FILE_BYTES_MAX {
            let what =
                format!("the file has {file_size:#x} bytes; files of more than 1 PiB are not checked for overlaps");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let words = usize::try_from(file_size.div_ceil(64 * MIB)).unwrap_or(usize::MAX); // at most 2^24
        Ok(Self(vec![0; words]))
    }

    /// Marks a range; true when some of it was marked before.
    pub(crate) fn mark(&mut self, start: u64, end: u64) -> bool {
        let (mut position, end) = (start / MIB, end.div_ceil(MIB));
        self.reach(end);
        let mut seen = 0;
        while position < end {
            let bits = (64 - position % 64).min(end - position);
            let mask = (u64::MAX >> (64 - bits)) << (position % 64);
            if let Some(word) = usize::try_from(position / 64).ok().and_then(|word| self.0.get_mut(word)) {
                seen |= *word & mask;
                *word |= mask;
            }
            position += bits;
        }
        seen != 0
    }

    /// Takes the marks off a range of whole MiB.
    pub(crate) fn clear(&mut self, start: u64, end: u64) {
        let (mut position, end) = (start / MIB, end / MIB);
        while position < end {
            let bits = (64 - position % 64).min(end - position);
            let mask = (u64::MAX >> (64 - bits)) << (position % 64);
            if let Some(word) = usize::try_from(position / 64).ok().and_then(|word| self.0.get_mut(word)) {
                *word &= !mask;
            }
            position += bits;
        }
    }

    /// Where the last mark ends, in MiB.
    pub(crate) fn end(&self) -> u64 {
        let last = self.0.iter().rposition(|word| *word != 0);
        last.map_or(0, |index| {
            let word = self.0.get(index).copied().unwrap_or_default();
            index as u64 * 64 + 64 - u64::from(word.leading_zeros())
        })
    }

    /// Makes room for marks up to a MiB.
    fn reach(&mut self, end: u64) {
        let words = usize::try_from(end.div_ceil(64)).unwrap_or(usize::MAX); // files end below 2^63: at most 2^37 bytes
        if words > self.0.len() {
            self.0.resize(words, 0);
        }
    }

    /// The first MiB at or behind `from` with which `length` unmarked MiB begin that end at or before `until`.
    pub(crate) fn find_free(&self, from: u64, until: u64, length: u64) -> Option<u64> {
        let word_at = |position: u64| {
            let index = usize::try_from(position / 64).unwrap_or(usize::MAX);
            self.0.get(index).copied().unwrap_or_default()
        };
        let (mut position, mut start) = (from, from);
        while position < until && start + length <= until {
            let word = word_at(position) >> (position % 64);
            let left = 64 - position % 64;
            if word & 1 == 1 {
                position += u64::from(word.trailing_ones()).min(left);
                start = position;
            } else {
                position += u64::from(word.trailing_zeros()).min(left);
            }
            if position.min(until).saturating_sub(start) >= length {
                return Some(start);
            }
        }
        None
    }

    /// Bytes of a file that were not marked; the last MiB of the file may be cut short.
    fn unmarked(&self, file_size: u64) -> u64 {
        let whole = file_size.div_ceil(MIB);
        // A block whose end the file cuts off is marked as a whole.
        let inside = |(index, word): (usize, &u64)| {
            let first = index as u64 * 64;
            let bits = whole.saturating_sub(first).min(64);
            let mask = if bits == 0 { 0 } else { u64::MAX >> (64 - bits) };
            u64::from((word & mask).count_ones())
        };
        let marked: u64 = self.0.iter().enumerate().map(inside).sum();
        let last = whole.saturating_sub(1);
        let word = usize::try_from(last / 64).ok().and_then(|word| self.0.get(word)).copied().unwrap_or_default();
        let last_is_marked = word >> (last % 64) & 1 == 1;
        let missing = whole * MIB - file_size; // bytes that the last MiB has not; below 1 MiB
        let unmarked = whole.saturating_sub(marked) * MIB;
        if last_is_marked { unmarked } else { unmarked.saturating_sub(missing) }
    }
}

/// The state of a pass.
struct Scan<'a, 'l, 'f> {
    cursor: &'a mut LayerCursor<'l>,
    layer: &'l Layer,
    findings: &'f mut dyn Findings,
    marks: Marks,
    result: BatScan,
    /// Where the last payload block ends in the file, when it was present.
    previous_end: Option<u64>,
    overlaps: u32,
}

/// As [`scan_marks`], without the marks.
///
/// # Errors
/// As [`scan_marks`].
pub(crate) fn scan_bat(
    layer: &Layer,
    findings: &mut dyn Findings,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<BatScan> {
    scan_marks(layer, findings, progress).map(|(scan, _)| scan)
}

/// Judges every entry of a layer's BAT (V-111 to V-122), counts, and marks what is owned. `progress` gets blocks done and blocks in all.
///
/// # Errors
/// When reading fails, the collector stops at a finding, the file is too long, or `progress` says so.
pub(crate) fn scan_marks(
    layer: &Layer,
    findings: &mut dyn Findings,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<(BatScan, Marks)> {
    let rules = layer.rules();
    let mut cursor = LayerCursor::new(layer);
    let mut marks = Marks::new(rules.file_size.get())?;
    for taken in rules.taken.ranges() {
        marks.mark(taken.range.start, taken.range.end.min(rules.file_size.get()));
    }
    let result = BatScan::default();
    let mut scan = Scan { cursor: &mut cursor, layer, findings, marks, result, previous_end: None, overlaps: 0 };
    let geometry = rules.geometry;
    let blocks = geometry.payload_blocks();
    let mut reported = 0;
    for chunk in 0..geometry.chunks() {
        let first = chunk * geometry.chunk_ratio(); // below the number of blocks
        let end = (first + geometry.chunk_ratio()).min(blocks);
        let partial = scan.payload_blocks(first, end)?;
        let index = geometry.bitmap_index(ChunkIndex(chunk));
        let bitmap = if index.0 < geometry.bat_entries() { scan.cursor.entry(index)? } else { BatEntry(0) };
        scan.bitmap(ChunkIndex(chunk), bitmap, partial)?;
        if index.0 < geometry.bat_entries() {
            scan.behind_the_disk(end, first + geometry.chunk_ratio())?;
        }
        if end - reported >= PROGRESS_BLOCKS || end == blocks {
            progress(end, blocks)?;
            reported = end;
        }
    }
    let mut result = scan.result;
    result.leaked_bytes = scan.marks.unmarked(rules.file_size.get());
    Ok((result, scan.marks))
}

/// The place of a state in [`PayloadState::ALL`].
const fn position(state: PayloadState) -> usize {
    match state {
        PayloadState::NotPresent => 0,
        PayloadState::Undefined => 1,
        PayloadState::Zero => 2,
        PayloadState::Unmapped => 3,
        PayloadState::FullyPresent => 4,
        PayloadState::PartiallyPresent => 5,
    }
}

impl Scan<'_, '_, '_> {
    fn rules(&self) -> &BatRules {
        self.layer.rules()
    }

    fn count(&mut self, state: PayloadState, blocks: u64) {
        if let Some(count) = self.result.blocks.get_mut(position(state)) {
            *count += blocks; // at most 2^26 in all
        }
    }

    /// Slots of the last chunk for which the disk has no block. They mean nothing, but what they claim inside the file is not
    /// given to others: who makes the disk larger may take them for real.
    fn behind_the_disk(&mut self, first: u64, end: u64) -> Result<()> {
        let mut block = first;
        while block < end {
            let index = self.rules().geometry.payload_index(BlockIndex(block));
            let entry = self.cursor.entry(index)?;
            if let Some(range) = self.rules().owned_range(BatSlot::Payload(BlockIndex(block)), entry) {
                self.marks.mark(range.start, range.end.min(self.rules().file_size.get()));
            }
            block += self.cursor.count_equal(index, end - block, entry)?.max(1);
        }
        Ok(())
    }

    /// Judges the payload blocks of one chunk. Gives the first one that is partially present.
    fn payload_blocks(&mut self, first: u64, end: u64) -> Result<Option<BlockIndex>> {
        let geometry = self.rules().geometry;
        let mut partial = None;
        let mut block = first;
        while block < end {
            let index = geometry.payload_index(BlockIndex(block));
            let entry = self.cursor.entry(index)?;
            if self.rules().is_plain(entry) {
                self.own(index, BatSlot::Payload(BlockIndex(block)), entry)?;
                self.count(PayloadState::FullyPresent, 1);
                block += 1;
                continue;
            }
            match judge(index, entry, self.rules()) {
                Err(finding) => {
                    // What the entry claims is not leaked, whoever else claims it.
                    if let Some(range) = self.rules().owned_range(BatSlot::Payload(BlockIndex(block)), entry) {
                        self.marks.mark(range.start, range.end.min(self.rules().file_size.get()));
                    }
                    self.previous_end = None;
                    self.findings.take(finding)?;
                }
                Ok(finding) => {
                    let silent = finding.is_none();
                    if let Some(finding) = finding {
                        self.findings.take(finding)?;
                    }
                    let state = entry.payload_state().unwrap_or(PayloadState::NotPresent);
                    if silent && self.rules().owned_range(BatSlot::Payload(BlockIndex(block)), entry).is_none() {
                        let equal = self.cursor.count_equal(index, end - block, entry)?;
                        self.count(state, equal);
                        self.previous_end = None;
                        block += equal.max(1);
                        continue;
                    }
                    if state == PayloadState::PartiallyPresent {
                        partial = partial.or(Some(BlockIndex(block)));
                    }
                    self.count(state, 1);
                    self.own(index, BatSlot::Payload(BlockIndex(block)), entry)?;
                }
            }
            block += 1;
        }
        Ok(partial)
    }

    /// Takes the space of an entry.
    fn own(&mut self, index: BatIndex, slot: BatSlot, entry: BatEntry) -> Result<()> {
        let Some(range) = self.rules().owned_range(slot, entry) else {
            self.previous_end = None;
            return Ok(());
        };
        // Entries in error do not come here: this lies in the file, but for the last block of a disk.
        if self.marks.mark(range.start, range.end) {
            self.report_overlap(index, slot, entry)?;
        }
        if let BatSlot::Payload(_) = slot {
            let present = entry.state_number() >= BITMAP_PRESENT;
            if present && self.previous_end != Some(range.start) {
                self.result.fragments += 1;
            }
            if !present {
                self.result.unneeded_bytes += range.end - range.start;
            }
            self.previous_end = present.then_some(range.end);
        }
        Ok(())
    }

    fn report_overlap(&mut self, index: BatIndex, slot: BatSlot, entry: BatEntry) -> Result<()> {
        let Some(range) = self.rules().owned_range(slot, entry) else { return Ok(()) };
        self.overlaps += u32::from(self.overlaps <= OWNERS_NAMED_MAX);
        let owner = if self.overlaps <= OWNERS_NAMED_MAX { self.find_owner(index, &range)? } else { None };
        let owner = owner.map_or_else(|| "another entry".to_owned(), |owner| self.rules().place(owner).to_string());
        let detail =
            format!("claims {:#x} bytes at {:#x}, which {owner} claims too", range.end - range.start, range.start);
        let place = self.rules().place(index);
        self.findings.report(Code::BatOverlap, place, detail)
    }

    /// The first entry before `index`, in the order of the scan, that owns some of a range.
    fn find_owner(&self, index: BatIndex, range: &std::ops::Range<u64>) -> Result<Option<BatIndex>> {
        let rules = self.layer.rules();
        let mut cursor = LayerCursor::new(self.layer);
        let mut other = 0;
        while other < index.0 {
            let entry = cursor.entry(BatIndex(other))?;
            let owned = rules.owned_range(rules.geometry.slot(BatIndex(other)), entry);
            if owned.is_some_and(|owned| owned.start < range.end && owned.end > range.start) {
                return Ok(Some(BatIndex(other)));
            }
            other += 1;
        }
        Ok(None)
    }

    /// Judges the bitmap entry of a chunk, and whether it is there when it is needed (V-122).
    fn bitmap(&mut self, chunk: ChunkIndex, entry: BatEntry, partial: Option<BlockIndex>) -> Result<()> {
        match self.rules().judge_bitmap(chunk, entry) {
            Err(finding) => return self.findings.take(finding),
            Ok(Some(finding)) => self.findings.take(finding)?,
            Ok(None) => {}
        }
        let differencing = self.rules().geometry.is_differencing();
        let present = differencing && entry.state_number() == BITMAP_PRESENT;
        if present {
            self.result.bitmaps_present += 1;
            self.own(self.rules().geometry.bitmap_index(chunk), BatSlot::Bitmap(chunk), entry)?;
            if partial.is_none() {
                self.result.unneeded_bytes += MIB;
            }
        }
        match partial.filter(|_| !present) {
            Some(block) => {
                let finding = self.rules().bitmap_missing(block);
                self.findings.take(finding)
            }
            None => Ok(()),
        }
    }
}
