//! What is done to a storage: operations, their effects on sectors, and faults.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::pages::{PAGE_BYTES, PAGE_LENGTH, Page, PageMap, SECTOR_BYTES, SECTOR_LENGTH, inside, pages_of};
use super::tear::Tear;

/// Kinds of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpKind {
    /// `read_at`. Counted and may fail; told to read hooks alone.
    Read,
    /// `write_at`.
    Write,
    /// `set_len`.
    SetLen,
    /// `zero_range`.
    Zero,
    /// `punch_hole`.
    Punch,
    /// `allocate`.
    Allocate,
    /// `clone_range`.
    Clone,
    /// `copy_range`.
    Copy,
    /// `sync`.
    Sync,
}

impl OpKind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Read,
        Self::Write,
        Self::SetLen,
        Self::Zero,
        Self::Punch,
        Self::Allocate,
        Self::Clone,
        Self::Copy,
        Self::Sync,
    ];
}

/// An operation that is about to happen, or a sync that has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpInfo {
    /// Counts the operations of the storage from 1 on; a read has the number of the one before it.
    pub number: u64,
    /// What it does.
    pub kind: OpKind,
    /// The bytes it does it to; for `set_len` from 0 to the new length.
    pub range: Range<u64>,
    /// What the code under test says that it is doing.
    pub phase: &'static str,
    /// Whether it has happened: a sync that is durable now.
    pub after: bool,
}

impl std::fmt::Display for OpInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let when = if self.after { "after" } else { "before" };
        write!(f, "{when} operation {} ({:?} {:#x?}, phase {})", self.number, self.kind, self.range, self.phase)
    }
}

/// How many operations there were of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([u64; OpKind::ALL.len()]);

impl Counts {
    pub(super) fn add(&mut self, kind: OpKind) {
        self.0[kind as usize] += 1;
    }

    /// Those of one kind.
    #[must_use]
    pub fn of(&self, kind: OpKind) -> u64 {
        self.0[kind as usize]
    }

    /// The syncs.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.of(OpKind::Sync)
    }

    /// Everything that is numbered: all but reads.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.iter().sum::<u64>() - self.of(OpKind::Read)
    }
}

/// New bytes for a part of a page, at their place in it.
#[derive(Clone, Debug)]
pub(super) struct Patch {
    index: u64,
    part: Range<usize>,
    page: Arc<Page>,
}

/// What an operation does to the bytes.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    None,
    Data(Vec<Patch>),
    Zero(Range<u64>),
}

impl Effect {
    /// Bytes for a range; `bytes` may be longer.
    pub(super) fn data(range: &Range<u64>, bytes: &[u8]) -> Self {
        let patch = |index: u64| {
            let part = inside(index, range);
            let at = (index * PAGE_BYTES + part.start as u64 - range.start) as usize;
            let mut page = Page::zero();
            page.bytes_mut()[part.clone()].copy_from_slice(&bytes[at..at + part.len()]);
            Patch { index, part, page: Arc::new(page) }
        };
        if range.is_empty() { Self::None } else { Self::Data(pages_of(range).map(patch).collect()) }
    }

    /// Zeros for a range that may be empty.
    pub(super) fn cut(range: Range<u64>) -> Self {
        if range.is_empty() { Self::None } else { Self::Zero(range) }
    }

    /// Whether a file has no more than so many pages afterwards.
    pub(super) fn fits(&self, map: &PageMap, pages: usize) -> bool {
        match self {
            Self::Data(patches) => {
                let new = patches.iter().filter(|patch| map.page(patch.index).is_none()).count();
                new == 0 || map.page_count() + new <= pages
            }
            _ => true,
        }
    }

    /// The bytes that it changes.
    pub(super) fn range(&self) -> Range<u64> {
        match self {
            Self::None => 0..0,
            Self::Zero(range) => range.clone(),
            Self::Data(patches) => {
                let (first, last) = (&patches[0], &patches[patches.len() - 1]);
                first.index * PAGE_BYTES + first.part.start as u64..last.index * PAGE_BYTES + last.part.end as u64
            }
        }
    }
}

/// One operation that a power cut may lose, in whole or in part.
#[derive(Clone, Debug)]
pub struct Operation {
    pub(super) number: u64,
    /// Counts what was done, in that order; numbers are given before the hook runs.
    pub(super) serial: u64,
    pub(super) kind: OpKind,
    pub(super) range: Range<u64>,
    pub(super) phase: &'static str,
    pub(super) effect: Effect,
    /// The length before and after.
    pub(super) length: (u64, u64),
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{} {:?} {:#x?}", self.number, self.kind, self.range)?;
        if self.length.0 != self.length.1 {
            write!(f, " length {:#x} -> {:#x}", self.length.0, self.length.1)?;
        }
        write!(f, " in {}", self.phase)
    }
}

impl Operation {
    /// Its number in the storage.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// What it does.
    #[must_use]
    pub fn kind(&self) -> OpKind {
        self.kind
    }

    /// The bytes whose contents it changes.
    #[must_use]
    pub fn changes(&self) -> Range<u64> {
        self.effect.range()
    }

    /// How many sectors it changes, at least in part.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        let range = self.changes();
        range.end.div_ceil(SECTOR_BYTES) - range.start / SECTOR_BYTES
    }

    /// Whether it and another one change a sector that both touch.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.changes(), other.changes());
        let sectors = |range: &Range<u64>| range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES);
        let (a, b) = (sectors(&a), sectors(&b));
        a.start < b.end && b.start < a.end
    }

    /// Changes the bytes, all of them; lengths are the caller's.
    pub(super) fn apply_whole(&self, map: &mut PageMap) {
        match &self.effect {
            Effect::None => {}
            Effect::Zero(range) => map.zero(range.clone()),
            Effect::Data(patches) => patches.iter().for_each(|patch| patch.apply(map)),
        }
    }

    /// Changes the bytes in those sectors that the tear leaves.
    pub(super) fn apply(&self, map: &mut PageMap, tear: &Tear) {
        if *tear == Tear::Whole {
            return self.apply_whole(map);
        }
        let (range, count) = (self.changes(), self.sectors());
        let first = range.start / SECTOR_BYTES;
        let sectors = |map: &mut PageMap, index: u64, part: &Range<usize>, page: Option<&Page>| {
            let mut start = part.start;
            while start < part.end {
                let end = ((start / SECTOR_LENGTH + 1) * SECTOR_LENGTH).min(part.end);
                let sector = (index * PAGE_BYTES + start as u64) / SECTOR_BYTES - first;
                match page {
                    _ if !tear.keeps(sector, count) => {}
                    Some(page) => map.patch(index, start..end, &page.bytes()[start..end]),
                    None => map.zero_part(index, start..end),
                }
                start = end;
            }
        };
        match &self.effect {
            Effect::None => {}
            Effect::Data(patches) => {
                patches.iter().for_each(|patch| sectors(map, patch.index, &patch.part, Some(&patch.page)));
            }
            Effect::Zero(range) => {
                // Holes stay holes whatever the tear leaves of the zeros.
                let present: Vec<u64> = map.pages_in(pages_of(range)).map(|(index, _)| index).collect();
                present.iter().for_each(|&index| sectors(map, index, &inside(index, range), None));
            }
        }
    }
}

impl Patch {
    fn apply(&self, map: &mut PageMap) {
        if self.part.len() == PAGE_LENGTH {
            map.set_page(self.index, Arc::clone(&self.page));
        } else {
            map.patch(self.index, self.part.clone(), &self.page.bytes()[self.part.clone()]);
        }
    }
}

/// The error that an operation fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    /// An error of a kind, without a number.
    Kind(io::ErrorKind),
    /// An error number of the operating system.
    Errno(i32),
}

impl FaultError {
    /// Input/output error.
    pub const EIO: Self = Self::Errno(5);
    /// No space left on device.
    pub const ENOSPC: Self = Self::Errno(28);

    fn make(self) -> io::Error {
        match self {
            Self::Kind(kind) => kind.into(),
            Self::Errno(number) => io::Error::from_raw_os_error(number),
        }
    }
}

/// An operation that fails.
///
/// ```
/// use vhdkit::storage::Storage as _;
/// use vhdkit_testkit::sim::{Fault, FaultError, OpKind, SimStorage};
///
/// let storage = SimStorage::new();
/// storage.set_fault(Some(Fault::nth(2, FaultError::ENOSPC).only(&[OpKind::Write]).after_sectors(1)));
/// storage.write_at(&[1; 4096], 0)?;
/// storage.sync()?;
/// assert_eq!(storage.write_at(&[2; 4096], 0).unwrap_err().raw_os_error(), Some(28));
/// let mut bytes = [0; 1024];
/// storage.read_at(&mut bytes, 0)?;
/// assert_eq!((bytes[511], bytes[512]), (2, 1), "a short write");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Fault {
    error: FaultError,
    /// Matching operations still to come until it strikes; 0 once it has.
    countdown: u64,
    kinds: Vec<OpKind>,
    phase: Option<&'static str>,
    sectors: u64,
    persistent: bool,
    lost_seed: Option<u64>,
}

impl Fault {
    /// The n-th operation from now on fails, the next one being the first. Reads are left out unless they are named.
    #[must_use]
    pub fn nth(n: u64, error: FaultError) -> Self {
        assert!(n > 0, "operations are counted from 1");
        Self {
            error,
            countdown: n,
            kinds: OpKind::ALL[1..].to_vec(),
            phase: None,
            sectors: 0,
            persistent: false,
            lost_seed: None,
        }
    }

    /// Only operations of these kinds count.
    #[must_use]
    pub fn only(mut self, kinds: &[OpKind]) -> Self {
        self.kinds = kinds.to_vec();
        self
    }

    /// Only operations in this phase count.
    #[must_use]
    pub fn in_phase(mut self, phase: &'static str) -> Self {
        self.phase = Some(phase);
        self
    }

    /// So many sectors are done before it fails: a short write. Changes of the length are done whole or not at all.
    #[must_use]
    pub fn after_sectors(mut self, sectors: u64) -> Self {
        self.sectors = sectors;
        self
    }

    /// Every later one fails as well.
    #[must_use]
    pub fn persistent(mut self) -> Self {
        self.persistent = true;
        self
    }

    /// A sync that fails loses what it should have made durable: a part, chosen by the seed, is durable, the rest never
    /// will be, though reads see it and the next sync succeeds. That is what Linux does.
    #[must_use]
    pub fn sync_loses(mut self, seed: u64) -> Self {
        self.lost_seed = Some(seed);
        self
    }

    /// Whether it has struck.
    #[must_use]
    pub fn struck(&self) -> bool {
        self.countdown == 0
    }

    pub(super) fn lost_seed(&self) -> Option<u64> {
        self.lost_seed
    }

    /// The error for an operation and the sectors that are done all the same, when it is this operation's turn.
    pub(super) fn strike(&mut self, kind: OpKind, phase: &str) -> Option<(io::Error, u64)> {
        if !self.kinds.contains(&kind) || self.phase.is_some_and(|wanted| wanted != phase) {
            return None;
        }
        let strikes = self.countdown == 1 || (self.countdown == 0 && self.persistent);
        self.countdown = self.countdown.saturating_sub(1);
        strikes.then(|| (self.error.make(), self.sectors))
    }
}
