//! Replay of a dirty log into memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::view::{LogOverlay, View};
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::{Code, Findings, Location};
use crate::format::header::Header;
use crate::format::log::{
    ActiveSequence, Change, ReplayLimits, Ring, SECTOR, SECTOR_BYTES, entries_before, find_active_sequence,
    walk_changes,
};
use crate::format::region;
use crate::format::space::TakenSpace;
use crate::storage::Storage;

/// What replaying the log would change, or has changed for this reader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplayReport {
    /// Entries that are replayed.
    pub entries: u64,
    /// Sequence number of the oldest of them.
    pub first_sequence: u64,
    /// Sequence number of the newest of them.
    pub last_sequence: u64,
    /// Pages of 4 KiB that get new contents.
    pub pages: u64,
    /// Bytes that become zero.
    pub zeroed_bytes: u64,
    /// The file's length before.
    pub file_size_before: u64,
    /// The file's length afterwards.
    pub file_size_after: u64,
    /// Pages changed or zeroed, by the structure they belong to.
    pub touched: Vec<(String, u64)>,
}

/// The ring, read through a window.
pub(crate) struct FileRing<'a> {
    storage: &'a dyn Storage,
    offset: u64,
    sectors: u64,
    window: Vec<[u8; SECTOR_BYTES]>,
    window_start: u64,
}

/// Sectors read at once.
const WINDOW_SECTORS: u64 = 64;

impl<'a> FileRing<'a> {
    pub(crate) fn new(storage: &'a dyn Storage, header: &Header) -> Self {
        let sectors = u64::from(header.log_length) / SECTOR;
        Self { storage, offset: header.log_offset, sectors, window: Vec::new(), window_start: 0 }
    }

    fn load(&mut self, number: u64) -> Result<()> {
        let start = number - number % WINDOW_SECTORS;
        let count = WINDOW_SECTORS.min(self.sectors - start);
        self.window.clear();
        self.window.resize(usize::try_from(count).unwrap_or_default(), [0; SECTOR_BYTES]);
        self.window_start = start;
        let at = self.offset + start * SECTOR; // inside the log, which lies inside the file
        let read = self.storage.read_at(self.window.as_flattened_mut(), at);
        read.map_err(|error| {
            self.window.clear();
            Error::io(format!("cannot read the log at {at:#x}"), error)
        })
    }
}

impl Ring for FileRing<'_> {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn sector(&mut self, number: u64) -> Result<&[u8; SECTOR_BYTES]> {
        let inside = number >= self.window_start && number - self.window_start < self.window.len() as u64;
        if !inside {
            self.load(number)?;
        }
        let index = usize::try_from(number - self.window_start).unwrap_or(usize::MAX);
        self.window.get(index).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format!("log sector {number} is outside of the ring"))
        })
    }
}

/// For the simulator: the changes of every entry that stands before the active sequence without a gap, oldest first.
pub(super) fn walk_stale(
    ring: &mut FileRing<'_>,
    sequence: &ActiveSequence,
    header: &Header,
    apply: &mut dyn FnMut(Change),
) -> Result<()> {
    let Some(first) = sequence.entries.first() else { return Ok(()) };
    let entries = entries_before(ring, first, header.log_guid)?;
    let limits = ReplayLimits { file_size: u64::MAX, growth_max: 0 };
    let run = ActiveSequence { entries };
    let mut findings = crate::format::finding::CollectAll::new(crate::format::finding::Strictness::Lenient);
    walk_changes(ring, &run, header, limits, &mut findings, &mut |_, change| {
        apply(change);
        Ok(())
    })
}

/// A change in memory takes about 80 bytes. A page image takes 4 KiB of log and more, but a hostile log could be full of
/// zero descriptors, which take 32 bytes each: so many bytes of log allow for one change. That keeps the overlay smaller
/// than a log of 8 MiB or more; over a smaller one it takes about 5 MiB at most.
const LOG_BYTES_PER_SEGMENT: u64 = 128;
/// Changes that any log may make.
const SEGMENTS_MIN: u64 = 1 << 16;

/// Finds the active sequence of a dirty log and puts its changes into an overlay (V-032 to V-055). The file is only read.
pub(crate) fn replay_into_memory(
    storage: &Arc<dyn Storage>,
    header: &Header,
    limits: ReplayLimits,
    findings: &mut dyn Findings,
) -> Result<(View, ReplayReport)> {
    let mut ring = FileRing::new(storage.as_ref(), header);
    let place = Location::at("log", header.log_offset);
    let Some(sequence) = find_active_sequence(&mut ring, header.log_guid)? else {
        let detail = "the log is in use, but holds no valid sequence of entries".to_owned();
        return Err(findings.fatal(Code::LogNoSequence, place, detail));
    };
    let mut overlay = LogOverlay::default();
    let segments_max = SEGMENTS_MIN.max(u64::from(header.log_length) / LOG_BYTES_PER_SEGMENT);
    walk_changes(&mut ring, &sequence, header, limits, findings, &mut |_, change| {
        overlay.add(change, header.log_offset);
        if overlay.len() as u64 <= segments_max {
            return Ok(());
        }
        let what = format!("the log changes more than {segments_max} separate ranges, which is not supported");
        Err(Error::new(ErrorKind::Limit, what).with_code(Code::LogTooLong))
    })?;
    let (first, last) = (sequence.entries.first(), sequence.entries.last());
    let end_of_changes = overlay.ranges().map(|(range, _)| range.end).max().unwrap_or_default();
    let last_file_offset = last.map_or(0, |entry| entry.last_file_offset);
    let size = limits.file_size.max(last_file_offset).max(end_of_changes);
    let mut report = ReplayReport {
        entries: sequence.entries.len() as u64,
        first_sequence: first.map_or(0, |entry| entry.sequence_number),
        last_sequence: last.map_or(0, |entry| entry.sequence_number),
        file_size_before: limits.file_size,
        file_size_after: size,
        ..ReplayReport::default()
    };
    for (range, zero) in overlay.ranges() {
        if zero {
            report.zeroed_bytes += range.end - range.start;
        } else {
            report.pages += 1;
        }
    }
    let detail = format!(
        "{} entries are not in place yet: they change {} pages and zero {} bytes",
        report.entries, report.pages, report.zeroed_bytes
    );
    findings.report(Code::LogNeedsReplay, place, detail)?;
    Ok((View::replayed(Arc::clone(storage), limits.file_size, size, overlay), report))
}

/// Counts the changed pages by the structure that they belong to, which is known only after replay.
pub(crate) fn count_touched(view: &View, taken: &TakenSpace) -> Vec<(String, u64)> {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (range, _) in view.changes() {
        let table =
            region::OFFSETS.iter().position(|at| range.start < at + region::TABLE_BYTES as u64 && range.end > *at);
        let name = match (table, taken.overlap(&range)) {
            (Some(0), _) => "region table copy 1",
            (Some(_), _) => "region table copy 2",
            (None, Some(taken)) => taken.name.as_str(),
            (None, None) => "blocks",
        };
        *counts.entry(name).or_default() += (range.end - range.start) / SECTOR;
    }
    counts.into_iter().map(|(name, pages)| (name.to_owned(), pages)).collect()
}
