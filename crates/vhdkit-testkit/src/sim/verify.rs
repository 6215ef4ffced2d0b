//! The judge of VHDX images: everything that must be true of one after a power cut.
//!
//! ```text
//! crash image --open, read only--> sectors allowed? elsewhere initial? check silent?   --> digest of the sectors
//!      |
//!      +--replay in place--> the same digest; check silent
//!      |       |
//!      |       +--second power cut--> the same digest, also after another replay in place
//!      |
//!      +--either header copy zeroed--> the same digest
//! ```

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

use vhdkit::format::finding::{Code, Severity};
use vhdkit::format::header::{HEADER_BYTES, Header, OFFSETS};
use vhdkit::image::{
    BlockDevice as _, Extent, ExtentKind, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver,
};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::Storage;

use super::campaign::{Case, Judge};
use super::crash::CrashPoint;
use super::history::SectorHistory;
use super::image::CrashImage;
use super::operation::OpInfo;
use super::pages::{PAGE_BYTES, SECTOR_BYTES};
use super::storage::SimStorage;
use crate::sparse::is_zero;

/// Sectors between two interesting ranges that are read rather than left out.
const GAP_SECTORS: u64 = 16;
/// Bytes read at once.
const READ_BYTES: u64 = 1 << 20;
/// Bytes outside of the interesting sectors that are read when their place in the file is unknown; of more, a sample.
const SCATTERED_BYTES_MAX: u64 = 4 << 20;

/// Replays the log of the image in a storage, in place.
pub type Replay = Arc<dyn Fn(Arc<dyn Storage>) -> vhdkit::Result<()> + Send + Sync>;

/// How to judge images.
#[derive(Clone, Default)]
pub struct ImageJudge {
    /// Who finds the parents.
    pub parents: Option<Arc<dyn ParentResolver>>,
    /// Findings above note that are no violation.
    pub tolerated: Vec<Code>,
    /// How to replay in place; nothing is replayed without it.
    pub replay: Option<Replay>,
    /// Of how many in a hundred images with a dirty log it is replayed in place; of clean ones, where nothing may come of
    /// it, an eighth of that.
    pub replay_percent: u64,
    /// Of how many in a hundred images with two valid headers either one is damaged: both must stand for the same disk.
    pub damage_percent: u64,
    /// How many second cuts are taken while one is replayed.
    pub second_cuts: usize,
}

/// Parents that cannot be written, by depth, whatever locators say.
#[derive(Debug)]
struct FrozenParents(Vec<CrashImage>);

impl ParentResolver for FrozenParents {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> vhdkit::Result<Vec<ParentCandidate>> {
        let parent = self.0.get(wanted.depth).map(CrashImage::storage);
        Ok(parent
            .into_iter()
            .map(|storage| ParentCandidate { storage, path: None, named: false, lock: None })
            .collect())
    }
}

/// The parents of an image, its own parent first; a write to one of them fails.
#[must_use]
pub fn frozen_parents(parents: Vec<CrashImage>) -> Arc<dyn ParentResolver> {
    Arc::new(FrozenParents(parents))
}

impl fmt::Debug for ImageJudge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageJudge")
            .field("parents", &self.parents)
            .field("tolerated", &self.tolerated)
            .field("replay", &self.replay.is_some())
            .field("replay_percent", &self.replay_percent)
            .field("damage_percent", &self.damage_percent)
            .field("second_cuts", &self.second_cuts)
            .finish()
    }
}

impl Judge for ImageJudge {
    fn judge(&self, image: &CrashImage, history: &SectorHistory, case: &mut Case) -> Result<(), String> {
        verify_image(image, history, self, case)
    }
}

/// Judges what a power cut left: as an overlay, and, when its turn comes, replayed in place with second cuts.
///
/// # Errors
/// What is wrong.
pub fn verify_image(
    image: &CrashImage,
    history: &SectorHistory,
    judge: &ImageJudge,
    case: &mut Case,
) -> Result<(), String> {
    let digest = verify_view(&image.storage(), history, judge)?;
    let headers = headers(image);
    if headers.iter().all(Option::is_some) && case.rng().chance(judge.damage_percent) {
        case.tally("images with either header copy damaged");
        either_header(image, history, judge, digest)?;
    }
    let Some(replay) = &judge.replay else { return Ok(()) };
    let newest = headers.into_iter().flatten().max_by_key(|header| header.sequence_number);
    let is_dirty = newest.is_some_and(|header| header.is_dirty());
    let percent = if is_dirty { judge.replay_percent } else { judge.replay_percent.div_ceil(8) };
    case.tally(if is_dirty { "images with a dirty log" } else { "images with a clean log" });
    if !case.rng().chance(percent) {
        return Ok(());
    }
    case.tally(if is_dirty { "dirty logs replayed in place" } else { "clean logs replayed in place, to no effect" });
    let points = replay_once(image, history, judge, replay, digest)?;
    for _ in 0..judge.second_cuts {
        let point = &points[case.rng().below(points.len() as u64) as usize];
        let state = point.random_state(case.rng().next_u64());
        let second = CrashImage::new(point.build(&state));
        case.tally("second cuts while replaying");
        case.count("replay", second.pages().content_hash());
        let told = |error: String| format!("second cut, while replaying: {error}\n{}", state.describe(point));
        same(digest, verify_view(&second.storage(), history, judge).map_err(told)?).map_err(told)?;
        replay_once(&second, history, judge, replay, digest).map_err(told)?;
    }
    Ok(())
}

/// Both header copies, where they are valid.
fn headers(image: &CrashImage) -> [Option<Header>; 2] {
    OFFSETS.map(|offset| {
        let mut bytes = [0; HEADER_BYTES];
        image.read_at(&mut bytes, offset).ok()?;
        Header::decode(&bytes)
    })
}

/// With either of its two valid headers gone, the disk is the same: neither names a log that is out of date, nor none
/// where one is needed.
fn either_header(image: &CrashImage, history: &SectorHistory, judge: &ImageJudge, digest: u64) -> Result<(), String> {
    let tolerant = ImageJudge { replay: None, ..judge.clone() };
    let tolerant = ImageJudge { tolerated: [&judge.tolerated[..], &[Code::HeaderCopyDamaged]].concat(), ..tolerant };
    for offset in OFFSETS {
        let mut pages = image.pages().clone();
        pages.zero(offset..offset + HEADER_BYTES as u64);
        let one = CrashImage::new(pages);
        let after = verify_view(&one.storage(), history, &tolerant).and_then(|after| same(digest, after));
        after.map_err(|error| format!("with the header at {offset:#x} damaged: {error}"))?;
    }
    Ok(())
}

fn same(before: u64, after: u64) -> Result<(), String> {
    if before == after { Ok(()) } else { Err("the disk reads differently than the overlay did".to_owned()) }
}

/// Replays in place and verifies the result; gives the moments at which a second cut could come.
fn replay_once(
    image: &CrashImage,
    history: &SectorHistory,
    judge: &ImageJudge,
    replay: &Replay,
    digest: u64,
) -> Result<Vec<CrashPoint>, String> {
    let storage = Arc::new(image.writable());
    let points: Arc<Mutex<Vec<CrashPoint>>> = Arc::default();
    let (list, weak) = (Arc::clone(&points), Arc::downgrade(&storage));
    storage.set_observer(Some(Arc::new(move |_: &OpInfo| {
        if let Some(storage) = weak.upgrade() {
            list.lock().unwrap_or_else(PoisonError::into_inner).push(SimStorage::crash_point(&storage));
        }
    })));
    replay(Arc::clone(&storage) as Arc<dyn Storage>).map_err(|error| format!("replay in place: {error}"))?;
    storage.set_observer(None);
    let result = CrashImage::new(storage.pages());
    let after = verify_view(&result.storage(), history, judge).and_then(|after| same(digest, after));
    after.map_err(|error| format!("after replay in place: {error}"))?;
    let mut points = std::mem::take(&mut *points.lock().unwrap_or_else(PoisonError::into_inner));
    points.push(storage.crash_point());
    Ok(points)
}

/// Opens an image for reading, judges what its disk holds and what `check` says, and gives a digest of what it holds.
///
/// # Errors
/// What is wrong.
pub fn verify_view(storage: &Arc<dyn Storage>, history: &SectorHistory, judge: &ImageJudge) -> Result<u64, String> {
    let options = OpenOptions::new();
    let options = match &judge.parents {
        Some(parents) => options.parents(Arc::clone(parents)),
        None => options,
    };
    let image = options.open(Arc::clone(storage), None).map_err(|error| format!("the image does not open: {error}"))?;
    let size = history.sector_count() * SECTOR_BYTES;
    if image.size() != size {
        return Err(format!("the disk has {} bytes instead of {size}", image.size()));
    }
    let interesting = widened(history.interesting());
    let mut digest = 0;
    let mut buffer = Vec::new();
    for sectors in &interesting {
        for range in pieces(sectors.start * SECTOR_BYTES..sectors.end * SECTOR_BYTES) {
            buffer.resize((range.end - range.start) as usize, 0);
            let read = image.read_at(&mut buffer, range.start);
            read.map_err(|error| format!("reading {range:#x?} of the disk: {error}"))?;
            history.allowed_run(range.start / SECTOR_BYTES, &buffer, &mut digest)?;
        }
    }
    elsewhere(&image, history, &interesting)?;
    silent(storage, judge)?;
    Ok(digest)
}

/// Joins ranges with short gaps between them.
fn widened(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start - last.end <= GAP_SECTORS => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

/// Cuts a range into parts that are read at once.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let parts = (range.end - range.start).div_ceil(READ_BYTES);
    (0..parts).map(move |part| {
        let start = range.start + part * READ_BYTES;
        start..(start + READ_BYTES).min(range.end)
    })
}

/// Nothing above note.
fn silent(storage: &Arc<dyn Storage>, judge: &ImageJudge) -> Result<(), String> {
    let report = check(storage, None, &CheckOptions::default(), &()).map_err(|error| format!("check: {error}"))?;
    let loud = |severity: Severity| severity > Severity::Note;
    let found = report.findings.iter().find(|one| loud(one.severity()) && !judge.tolerated.contains(&one.code()));
    match found {
        Some(finding) => Err(format!("check: {}: {finding}", finding.severity().as_str())),
        None => Ok(()),
    }
}

/// Everything that nobody wrote reads as zero: space of this file that belongs to the disk holds nothing there. What
/// parents hold is in `interesting`, and they are never written.
fn elsewhere(image: &Image, history: &SectorHistory, interesting: &[Range<u64>]) -> Result<(), String> {
    let Some(storage) = image.layer_storage(0) else { return Ok(()) };
    let mut left = SCATTERED_BYTES_MAX;
    let mut result = Ok(());
    let visited = image.visit_extents(0..image.size(), &mut |extent| {
        if extent.layer == 0 && matches!(extent.kind, ExtentKind::Data { .. }) {
            result = outside(extent, interesting)
                .into_iter()
                .try_for_each(|range| zero_in_extent(image, &*storage, history, extent, range, &mut left));
        }
        if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    visited.map_err(|error| format!("extents: {error}"))?;
    result
}

/// The parts of an extent that are not interesting, in bytes of the disk.
fn outside(extent: &Extent, interesting: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut position, end) = (extent.start, extent.end());
    let mut parts = Vec::new();
    let first = interesting.partition_point(|sectors| sectors.end * SECTOR_BYTES <= position);
    for sectors in &interesting[first..] {
        let (from, to) = (sectors.start * SECTOR_BYTES, sectors.end * SECTOR_BYTES);
        if from >= end {
            break;
        }
        if position < from {
            parts.push(position..from);
        }
        position = position.max(to);
    }
    if position < end {
        parts.push(position..end);
    }
    parts
}

fn zero_in_extent(
    image: &Image,
    storage: &dyn Storage,
    history: &SectorHistory,
    extent: &Extent,
    range: Range<u64>,
    left: &mut u64,
) -> Result<(), String> {
    let mut page = [0; PAGE_BYTES as usize];
    let ExtentKind::Data { file_offset: Some(place) } = extent.kind else {
        // Behind the end of the file or out of the log: no shortcut, so the first bytes only where it is long.
        for part in pieces(range) {
            let part = part.start..part.end.min(part.start + (*left).max(PAGE_BYTES));
            *left = left.saturating_sub(part.end - part.start);
            let mut bytes = vec![0; (part.end - part.start) as usize];
            image.read_at(&mut bytes, part.start).map_err(|error| error.to_string())?;
            zero_bytes(history, part.start, &bytes)?;
        }
        return Ok(());
    };
    let shift = |position: u64| place + (position - extent.start);
    let (mut position, end) = (shift(range.start), shift(range.end));
    while position < end {
        let found = storage.next_data(position..end).map_err(|error| error.to_string())?;
        let Some(data) = found else { break };
        let mut at = data.start;
        while at < data.end {
            let stop = ((at / PAGE_BYTES + 1) * PAGE_BYTES).min(data.end);
            let bytes = &mut page[..(stop - at) as usize];
            storage.read_at(bytes, at).map_err(|error| error.to_string())?;
            zero_bytes(history, extent.start + (at - place), bytes)?;
            at = stop;
        }
        position = data.end;
    }
    Ok(())
}

/// Zeros, or what the history says about the first sector that is not.
fn zero_bytes(history: &SectorHistory, offset: u64, bytes: &[u8]) -> Result<(), String> {
    if is_zero(bytes) {
        return Ok(());
    }
    for (sector, piece) in (offset / SECTOR_BYTES..).zip(bytes.chunks(SECTOR_BYTES as usize)) {
        if !is_zero(piece) {
            history.allowed(sector, piece)?;
        }
    }
    Ok(())
}
