//! One file of a chain: opened in the order that the format asks for, and read block by block.
//!
//! Nothing behind the headers is looked at before the log was replayed ([MS-VHDX] 2.3.3): [`load`] goes from headers to
//! the replayed view to region table to metadata, and each step takes what the one before gave.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bat::BatCache;
use super::bitmap::BitmapCache;
use super::extents::LayerCursor;
use super::replay::{ReplayReport, count_touched, replay_into_memory};
use super::session::needs_replay;
use super::view::View;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::BatRules;
use crate::format::finding::{Code, FailFast, Finding, Findings, Location, Strictness};
use crate::format::geometry::{BAT_ENTRY_BYTES, Geometry};
use crate::format::header::{self, HEADER_BYTES, Headers, decode_headers};
use crate::format::ident::{Probe, RawFileIdentifier, VHD_SIGNATURE, probe};
use crate::format::log::ReplayLimits;
use crate::format::metadata::{self, Metadata};
use crate::format::region::{self, RegionTable, decode_tables};
use crate::format::space::TakenSpace;
use crate::format::{DISK_SIZE_MAX, HEADER_SECTION_BYTES};
use crate::storage::{LockReport, Storage, is_resizable};
use crate::units::FileOffset;

/// The largest BAT region that any disk can need: 64 TiB in blocks of 1 MiB, bitmap entries included, is 513 MiB.
const BAT_REGION_BYTES_MAX: u64 = 513 << 20;

const _: () = assert!((DISK_SIZE_MAX >> 20) * BAT_ENTRY_BYTES < BAT_REGION_BYTES_MAX);

/// Everything that was read to open one file.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) creator: String,
    pub(crate) headers: Headers,
    pub(crate) view: View,
    pub(crate) replay: Option<ReplayReport>,
    pub(crate) region_table: RegionTable,
    pub(crate) metadata: Metadata,
    pub(crate) rules: BatRules,
}

/// Reads the file identifier (V-001, V-002).
fn load_identifier(
    storage: &dyn Storage,
    name: Option<&Path>,
    size: u64,
    findings: &mut dyn Findings,
) -> Result<String> {
    let place = Location::at("file identifier", 0);
    let mut start = [0; size_of::<RawFileIdentifier>()];
    let there = usize::try_from(size).unwrap_or(usize::MAX).min(start.len());
    if let Some(part) = start.get_mut(..there) {
        storage.read_at(part, 0).map_err(|error| Error::io("cannot read the start of the file", error))?;
    }
    let what = probe(&start);
    if what != Probe::Vhdx {
        let detail = what_it_is(storage, what, name, size);
        return Err(findings.fatal(Code::FileSignature, place, detail));
    }
    if size < HEADER_SECTION_BYTES {
        let detail = format!("the file has {size} bytes; the header section alone has 1 MiB");
        return Err(findings.fatal(Code::FileTooSmall, place, detail));
    }
    let raw: RawFileIdentifier = zerocopy::transmute!(start);
    Ok(raw.creator_text())
}

/// Says what a file is that is not a VHDX.
fn what_it_is(storage: &dyn Storage, probe: Probe, name: Option<&Path>, size: u64) -> String {
    let mut footer = [0; 8];
    let has_footer = size >= 512 && storage.read_at(&mut footer, size - 512).is_ok() && footer == VHD_SIGNATURE;
    let is_set = name.and_then(Path::extension).is_some_and(|extension| extension.eq_ignore_ascii_case("vhds"));
    if probe == Probe::Vhd || has_footer {
        "this is a VHD, the older format, and not a VHDX (convert it with `qemu-img convert -f vpc -O raw`)".to_owned()
    } else if is_set {
        "this is a VHD Set, which only coordinates .avhdx files beside it, and not a VHDX (open one of those)"
            .to_owned()
    } else if size == 0 {
        "the file is empty".to_owned()
    } else {
        "the file does not begin with \"vhdxfile\", so it is not a VHDX".to_owned()
    }
}

fn load_headers(storage: &dyn Storage, size: u64, findings: &mut dyn Findings) -> Result<Headers> {
    let mut copies = [[0; HEADER_BYTES]; 2];
    for (copy, offset) in copies.iter_mut().zip(header::OFFSETS) {
        let read = storage.read_at(copy, offset);
        read.map_err(|error| Error::io(format!("cannot read the header at {offset:#x}"), error))?;
    }
    decode_headers([&copies[0], &copies[1]], size, findings)
}

/// Opens one file as far as the metadata. The BAT is not read.
pub(crate) fn load(
    storage: &Arc<dyn Storage>,
    name: Option<&Path>,
    log_growth_max: u64,
    findings: &mut dyn Findings,
) -> Result<Loaded> {
    let size = storage.len().map_err(|error| Error::io("cannot tell the length of the file", error))?;
    let creator = load_identifier(storage.as_ref(), name, size, findings)?;
    let headers = load_headers(storage.as_ref(), size, findings)?;
    let header = &headers.current;
    let (view, mut replay) = if header.is_dirty() {
        let limits = ReplayLimits { file_size: size, growth_max: log_growth_max };
        let (view, report) = replay_into_memory(storage, header, limits, findings)?;
        (view, Some(report))
    } else {
        (View::plain(Arc::clone(storage), size), None)
    };
    let mut taken = TakenSpace::default();
    let _ = taken.add(0..HEADER_SECTION_BYTES, "header section"); // nothing else is there yet
    let log = header.log_offset..header.log_offset + u64::from(header.log_length); // checked with the header
    let _ = taken.add(log, "log"); // behind the header section: checked with the header
    let copies = [
        view.read_vec(region::OFFSETS[0]..region::OFFSETS[0] + region::TABLE_BYTES as u64)?,
        view.read_vec(region::OFFSETS[1]..region::OFFSETS[1] + region::TABLE_BYTES as u64)?,
    ];
    let region_table = decode_tables([&copies[0], &copies[1]], view.size(), &mut taken, findings)?;
    if let Some(report) = &mut replay {
        report.touched = count_touched(&view, &taken);
    }
    let region = region_table.metadata;
    let mut read = |range: std::ops::Range<u64>| {
        view.read_vec(region.file_offset + range.start..region.file_offset + range.end) // inside the region
    };
    let metadata = metadata::decode(&region, &mut read, findings)?;
    check_bat_size(&region_table, &metadata.geometry, findings)?;
    let rules = BatRules {
        geometry: metadata.geometry,
        bat_offset: FileOffset(region_table.bat.file_offset),
        file_size: Arc::clone(view.size_cell()),
        taken_end: taken.ranges().last().map_or(HEADER_SECTION_BYTES, |last| last.range.end),
        taken,
        strictness: findings.strictness(),
    };
    Ok(Loaded { creator, headers, view, replay, region_table, metadata, rules })
}

/// Checks that the BAT region holds every entry (V-110) and is no larger than sense (V-129).
fn check_bat_size(table: &RegionTable, geometry: &Geometry, findings: &mut dyn Findings) -> Result<()> {
    let needed = geometry.bat_entries() * BAT_ENTRY_BYTES; // at most 513 MiB
    let place = Location::at("BAT region", table.bat.file_offset);
    if table.bat.length < needed {
        let detail = format!("has {:#x} bytes; the disk needs {needed:#x}", table.bat.length);
        return Err(findings.fatal(Code::BatTooSmall, place, detail));
    }
    if table.bat.length > BAT_REGION_BYTES_MAX.max(needed) {
        let detail = format!("has {:#x} bytes; no disk needs more than 513 MiB", table.bat.length);
        return Err(findings.fatal(Code::BatTooLarge, place, detail));
    }
    Ok(())
}

/// One file of a chain.
#[derive(Debug)]
pub struct Layer {
    path: Option<PathBuf>,
    loaded: Loaded,
    findings: Vec<Finding>,
    bat: BatCache,
    bitmaps: BitmapCache,
    pub(crate) lock: Option<LockReport>,
}

impl Layer {
    /// Opens a file by itself, without its parents.
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        path: Option<&Path>,
        strictness: Strictness,
        log_growth_max: u64,
    ) -> Result<Self> {
        let mut findings = FailFast::new(strictness);
        let loaded = load(storage, path, log_growth_max, &mut findings).map_err(|error| match path {
            Some(path) => error.with_path(path),
            None => error,
        })?;
        let layer = Self::from_loaded(loaded);
        Ok(Self { path: path.map(Path::to_owned), findings: findings.into_findings(), ..layer })
    }

    /// A layer from what was loaded.
    pub(crate) fn from_loaded(loaded: Loaded) -> Self {
        Self {
            path: None,
            bat: BatCache::new(loaded.metadata.geometry.bat_entries()),
            bitmaps: BitmapCache::new(),
            loaded,
            findings: Vec::new(),
            lock: None,
        }
    }

    /// The file's path, where it has one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The file's name for messages.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.path {
            Some(path) => crate::text::escape(&path.to_string_lossy()).into_owned(),
            None => "(memory)".to_owned(),
        }
    }

    /// The file's length as it is, before any replay.
    #[must_use]
    pub fn file_size(&self) -> u64 {
        self.loaded.view.physical_size()
    }

    /// What opening for writing says to a log that was not put into place, when it may not be replayed.
    ///
    /// # Errors
    /// [`NeedsReplay`](crate::ErrorKind::NeedsReplay) when there is such a log.
    pub fn refuse_dirty(&self) -> Result<()> {
        if self.headers().current.is_dirty() { Err(needs_replay()) } else { Ok(()) }
    }

    /// Bytes that the file occupies on its file system, holes not counted; `None` when that cannot be told.
    #[must_use]
    pub fn disk_usage(&self) -> Option<u64> {
        let storage = self.loaded.view.storage();
        let metadata = storage.as_file().filter(|_| is_resizable(storage.as_ref()))?.metadata().ok()?;
        Some(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512) // st_blocks counts in 512 bytes
    }

    /// The program that made the file, as it names itself; for people only.
    #[must_use]
    pub fn creator(&self) -> &str {
        &self.loaded.creator
    }

    /// Both header copies, and which one counts.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.loaded.headers
    }

    /// The region table, after replay.
    #[must_use]
    pub fn region_table(&self) -> &RegionTable {
        &self.loaded.region_table
    }

    /// The metadata, after replay.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.loaded.metadata
    }

    /// The numbers that place every byte of the disk.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.loaded.metadata.geometry
    }

    /// What the log would change in the file; `None` when the log is clean.
    #[must_use]
    pub fn replay(&self) -> Option<&ReplayReport> {
        self.loaded.replay.as_ref()
    }

    /// Warnings and notes that were met while opening.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The file.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        self.loaded.view.storage()
    }

    /// How the file is locked against other programs, where it is.
    #[must_use]
    pub fn lock_report(&self) -> Option<&LockReport> {
        self.lock.as_ref()
    }

    /// Bytes of the file that hold blocks of the disk, sector bitmaps included. Streams the BAT.
    ///
    /// # Errors
    /// When reading the BAT fails, or an entry cannot be used.
    pub fn allocated_bytes(&self) -> Result<u64> {
        LayerCursor::new(self).allocated_bytes().map_err(|error| self.name_error(error))
    }

    pub(crate) fn view(&self) -> &View {
        &self.loaded.view
    }

    pub(crate) fn rules(&self) -> &BatRules {
        &self.loaded.rules
    }

    pub(crate) fn bat(&self) -> &BatCache {
        &self.bat
    }

    pub(crate) fn bitmaps(&self) -> &BitmapCache {
        &self.bitmaps
    }

    /// Names this file in an error, unless the error names one already.
    pub(crate) fn name_error(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.with_path(path),
            None => error,
        }
    }

    /// The error for data that only a parent has.
    pub(crate) fn parent_missing(&self, offset: u64) -> Error {
        let what = format!("the data at {offset:#x} is in the parent, and the image was opened without parents");
        self.name_error(Error::new(ErrorKind::ParentMissing, what))
            .with_hint("open it with its parents, or use commands that look at one layer only (check, info)")
    }
}
