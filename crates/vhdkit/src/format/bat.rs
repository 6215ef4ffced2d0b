//! Entries of the block allocation table ([MS-VHDX] 2.5.1).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::HEADER_SECTION_BYTES;
use super::finding::{Code, Finding, Location, Strictness};
use super::geometry::{BITMAP_BLOCK_BYTES, BatSlot, Geometry};
use super::space::TakenSpace;
use crate::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset};

/// One entry as it stands in the file: state in bits 0 to 2, offset in MiB in bits 20 to 63.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatEntry(pub u64);

const STATE_MASK: u64 = 7;
const OFFSET_MASK: u64 = !0xf_ffff;

/// State of a payload block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PayloadState {
    /// Never written: the parent's, or zero.
    NotPresent,
    /// The contents are undefined; reads as zero here.
    Undefined,
    /// Zero; hides the parent.
    Zero,
    /// Trimmed; reads as zero here.
    Unmapped,
    /// In this file.
    FullyPresent,
    /// Sectors whose bitmap bit is set are in this file, the others in the parent.
    PartiallyPresent,
}

impl PayloadState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::NotPresent, Self::Undefined, Self::Zero, Self::Unmapped, Self::FullyPresent, Self::PartiallyPresent];

    /// The specification's name, in lower case.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotPresent => "not-present",
            Self::Undefined => "undefined",
            Self::Zero => "zero",
            Self::Unmapped => "unmapped",
            Self::FullyPresent => "fully-present",
            Self::PartiallyPresent => "partially-present",
        }
    }

    /// The number in the entry.
    #[must_use]
    pub const fn number(self) -> u64 {
        match self {
            Self::NotPresent => 0,
            Self::Undefined => 1,
            Self::Zero => 2,
            Self::Unmapped => 3,
            Self::FullyPresent => 6,
            Self::PartiallyPresent => 7,
        }
    }
}

/// The state of a sector bitmap block that is present.
pub const BITMAP_PRESENT: u64 = 6;
/// UNMAPPED as format version 0.95 wrote it.
const OLD_UNMAPPED: u64 = 5;

impl BatEntry {
    /// An entry; `offset` is a multiple of 1 MiB, or 0.
    #[must_use]
    pub const fn new(state: u64, offset: FileOffset) -> Self {
        Self((state & STATE_MASK) | (offset.0 & OFFSET_MASK))
    }

    /// The state's number.
    #[must_use]
    pub const fn state_number(self) -> u64 {
        self.0 & STATE_MASK
    }

    /// The payload state; 5, which only version 0.95 knows, counts as UNMAPPED; `None` for 4.
    #[must_use]
    pub const fn payload_state(self) -> Option<PayloadState> {
        Some(match self.0 & STATE_MASK {
            0 => PayloadState::NotPresent,
            1 => PayloadState::Undefined,
            2 => PayloadState::Zero,
            3 | OLD_UNMAPPED => PayloadState::Unmapped,
            6 => PayloadState::FullyPresent,
            7 => PayloadState::PartiallyPresent,
            _ => return None,
        })
    }

    /// Where the block lies, or lay.
    #[must_use]
    pub const fn file_offset(self) -> FileOffset {
        FileOffset(self.0 & OFFSET_MASK)
    }

    /// Bits 3 to 19.
    #[must_use]
    pub const fn reserved(self) -> u64 {
        self.0 & !(STATE_MASK | OFFSET_MASK)
    }
}

/// The length of a file, which changes while the image is written.
#[derive(Debug, Default)]
pub struct FileSize(AtomicU64);

impl FileSize {
    /// A length in bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(AtomicU64::new(bytes))
    }

    /// The length now.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Sets the length; before an entry names what lies behind the old one.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Release);
    }
}

/// What an entry is judged against.
#[derive(Clone, Debug)]
pub struct BatRules {
    /// The disk's geometry.
    pub geometry: Geometry,
    /// Where the BAT begins in the file.
    pub bat_offset: FileOffset,
    /// The file's length, after replay.
    pub file_size: Arc<FileSize>,
    /// Header section, log and regions.
    pub taken: TakenSpace,
    /// How strictly to judge.
    pub strictness: Strictness,
    /// Where the last of the taken ranges ends.
    pub taken_end: u64,
}

/// A block that may be used, and what is to be said about its entry all the same.
pub type Judged = Result<Option<Finding>, Finding>;

impl BatRules {
    /// The location of an entry, for findings.
    #[must_use]
    pub fn place(&self, index: BatIndex) -> Location {
        let name = match self.geometry.slot(index) {
            BatSlot::Payload(block) => format!("BAT entry {index} (block {block})"),
            BatSlot::Bitmap(chunk) => format!("BAT entry {index} (sector bitmap of chunk {chunk})"),
        };
        Location::at(name, self.bat_offset.0 + index.0 * 8) // inside the BAT region, which lies inside the file
    }

    /// True for an entry that is fine whatever block it belongs to: fully present, behind everything that is taken and
    /// inside the file. Spares most entries the full judgement.
    #[inline]
    #[must_use]
    pub fn is_plain(&self, entry: BatEntry) -> bool {
        let offset = entry.0 & OFFSET_MASK;
        let file_size = self.file_size.get();
        entry.0 & !OFFSET_MASK == 6
            && offset >= self.taken_end
            && offset <= file_size
            && file_size - offset >= self.geometry.block_size()
    }

    fn finding(&self, code: Code, index: BatIndex, detail: String) -> Finding {
        Finding::new(code, self.strictness, self.place(index), detail)
    }

    /// Sorts a finding by whether it stops the entry from being used.
    fn sort(finding: Finding) -> Judged {
        match finding.severity() {
            super::finding::Severity::Error => Err(finding),
            _ => Ok(Some(finding)),
        }
    }

    /// The file range that an entry owns: that of a present block, and that which an undefined or unmapped one keeps.
    #[must_use]
    pub fn owned_range(&self, slot: BatSlot, entry: BatEntry) -> Option<Range<u64>> {
        let start = entry.file_offset().0;
        let length = match (slot, entry.state_number()) {
            (BatSlot::Payload(_), 1 | 3 | OLD_UNMAPPED | 6 | 7) if start != 0 => self.geometry.block_size(),
            (BatSlot::Bitmap(_), BITMAP_PRESENT) if start != 0 && self.geometry.is_differencing() => BITMAP_BLOCK_BYTES,
            _ => return None,
        };
        Some(start..start.saturating_add(length))
    }

    /// Judges a payload block's entry (V-111 to V-118, as far as the entry alone tells). `Err` means that the block
    /// cannot be used.
    ///
    /// # Errors
    /// The finding that forbids using the block.
    pub fn judge_payload(&self, block: BlockIndex, entry: BatEntry) -> Judged {
        let index = self.geometry.payload_index(block);
        if entry.reserved() != 0 {
            let detail = format!("reserved bits are not zero: entry is {:#018x}", entry.0);
            return Err(self.finding(Code::BatReserved, index, detail));
        }
        let Some(state) = entry.payload_state() else {
            let detail = format!("state {} is unknown: entry is {:#018x}", entry.state_number(), entry.0);
            return Err(self.finding(Code::BatState, index, detail));
        };
        let offset = entry.file_offset().0;
        match state {
            PayloadState::NotPresent | PayloadState::Zero if offset != 0 => {
                let detail = format!("state {} with offset {offset:#x}", state.as_str());
                Self::sort(self.finding(Code::BatUnusedOffset, index, detail))
            }
            PayloadState::NotPresent | PayloadState::Zero => Ok(None),
            PayloadState::Undefined | PayloadState::Unmapped => self.judge_anchor(block, index, entry),
            PayloadState::PartiallyPresent if !self.geometry.is_differencing() => {
                let detail = "the block is partially present, but the disk has no parent".to_owned();
                Err(self.finding(Code::BatPartialWithoutParent, index, detail))
            }
            PayloadState::FullyPresent | PayloadState::PartiallyPresent => self.judge_present(block, index, offset),
        }
    }

    fn judge_anchor(&self, block: BlockIndex, index: BatIndex, entry: BatEntry) -> Judged {
        let old = (entry.state_number() == OLD_UNMAPPED).then(|| {
            let detail = "state 5 is UNMAPPED of format version 0.95".to_owned();
            self.finding(Code::BatStateOldUnmapped, index, detail)
        });
        if let Some(finding) = old.clone().filter(|finding| finding.severity() == super::finding::Severity::Error) {
            return Err(finding);
        }
        if let Some(range) = self.owned_range(BatSlot::Payload(block), entry) {
            let beyond = range.end > self.file_size.get();
            if beyond || self.taken.overlap(&range).is_some() {
                let what =
                    if beyond { "reaches past the end of the file" } else { "overlaps the file's own structures" };
                let detail = format!("space kept at {:#x} {what}", range.start);
                return Err(self.finding(Code::BatAnchor, index, detail));
            }
        }
        Ok(old)
    }

    fn judge_present(&self, block: BlockIndex, index: BatIndex, offset: u64) -> Judged {
        if offset < HEADER_SECTION_BYTES {
            let detail = format!("the block is present at offset {offset:#x}, inside the header section");
            return Err(self.finding(Code::BatOffset, index, detail));
        }
        let range = offset..offset.saturating_add(self.geometry.block_size());
        if let Some(taken) = self.taken.overlap(&range) {
            let detail = format!("block at {offset:#x} overlaps the {} at {:#x}", taken.name, taken.range.start);
            return Err(self.finding(Code::BatOverlap, index, detail));
        }
        if range.end <= self.file_size.get() {
            return Ok(None);
        }
        let guest = self.geometry.block_range(block);
        let needed = offset.saturating_add(guest.end - guest.start);
        let detail = format!("block at {offset:#x} reaches past the end of the file ({:#x})", self.file_size.get());
        if needed <= self.file_size.get() && guest.end == self.geometry.disk_size() {
            return Self::sort(self.finding(Code::BatLastBlockCut, index, detail));
        }
        Err(self.finding(Code::BatOutsideFile, index, detail))
    }

    /// Judges a sector bitmap block's entry (V-119 to V-121).
    ///
    /// # Errors
    /// The finding that forbids using the bitmap.
    pub fn judge_bitmap(&self, chunk: ChunkIndex, entry: BatEntry) -> Judged {
        let index = self.geometry.bitmap_index(chunk);
        if !self.geometry.is_differencing() {
            if entry.0 == 0 {
                return Ok(None);
            }
            let detail = format!("entry is {:#018x}, but the disk has no parent and so no bitmap", entry.0);
            return Self::sort(self.finding(Code::BitmapUnexpected, index, detail));
        }
        if entry.reserved() != 0 {
            let detail = format!("reserved bits are not zero: entry is {:#018x}", entry.0);
            return Err(self.finding(Code::BatReserved, index, detail));
        }
        let offset = entry.file_offset().0;
        match entry.state_number() {
            0 if offset != 0 => {
                let detail = format!("the bitmap is not present, but has offset {offset:#x}");
                Self::sort(self.finding(Code::BatUnusedOffset, index, detail))
            }
            0 => Ok(None),
            BITMAP_PRESENT => self.judge_present_bitmap(index, offset),
            state => {
                let detail = format!("bitmap state {state} is unknown");
                Err(self.finding(Code::BitmapState, index, detail))
            }
        }
    }

    fn judge_present_bitmap(&self, index: BatIndex, offset: u64) -> Judged {
        if offset < HEADER_SECTION_BYTES {
            let detail = format!("the bitmap is present at offset {offset:#x}, inside the header section");
            return Err(self.finding(Code::BitmapOffset, index, detail));
        }
        let range = offset..offset.saturating_add(BITMAP_BLOCK_BYTES);
        if let Some(taken) = self.taken.overlap(&range) {
            let detail = format!("bitmap at {offset:#x} overlaps the {} at {:#x}", taken.name, taken.range.start);
            return Err(self.finding(Code::BatOverlap, index, detail));
        }
        if range.end > self.file_size.get() {
            let detail =
                format!("bitmap at {offset:#x} reaches past the end of the file ({:#x})", self.file_size.get());
            return Err(self.finding(Code::BitmapOutsideFile, index, detail));
        }
        Ok(None)
    }

    /// The finding for a partially present block without bitmap (V-122).
    #[must_use]
    pub fn bitmap_missing(&self, block: BlockIndex) -> Finding {
        let chunk = self.geometry.chunk_of(block);
        let detail = format!("block {block} is partially present, but the sector bitmap of chunk {chunk} is not there");
        self.finding(Code::BitmapMissing, self.geometry.payload_index(block), detail)
    }
}
