//! Judges a whole image in one pass, without its parents and without changing it.

use std::path::Path;
use std::sync::Arc;

use super::{Progress, advance};
use crate::error::Result;
use crate::format::finding::{Code, CollectAll, Finding, Findings, Location, Severity, Strictness};
use crate::format::log::GROWTH_MAX;
use crate::format::metadata::DiskType;
use crate::image::ReplayReport;
use crate::image::layer::{Layer, Loaded, load};
use crate::image::scan::{BatScan, scan_bat};
use crate::storage::Storage;

/// How to check.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// How strictly to judge.
    pub strictness: Strictness,
    /// How far a dirty log may let the file grow, in bytes.
    pub log_growth_max: u64,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { strictness: Strictness::Normal, log_growth_max: GROWTH_MAX }
    }
}

/// Everything that was found.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// The findings, in the order they were made; the first 10,000 of them.
    pub findings: Vec<Finding>,
    /// Findings of severity error, those not listed included.
    pub errors: u64,
    /// Findings of severity warning, those not listed included.
    pub warnings: u64,
    /// Findings of severity note, those not listed included.
    pub notes: u64,
    /// What the image holds; `None` when it cannot be opened at all.
    pub summary: Option<CheckSummary>,
}

/// What an image holds.
#[derive(Clone, Debug)]
pub struct CheckSummary {
    /// Fixed, dynamic or differencing.
    pub disk_type: DiskType,
    /// Bytes of the virtual disk.
    pub disk_size: u64,
    /// Bytes of a payload block.
    pub block_size: u64,
    /// Bytes of the file, after replay.
    pub file_size: u64,
    /// Payload blocks by state, in the order of [`crate::format::bat::PayloadState::ALL`]; those in error not counted.
    pub blocks: [u64; 6],
    /// Sector bitmap blocks that are present.
    pub bitmaps_present: u64,
    /// Runs of payload blocks that follow each other on the disk and in the file.
    pub fragments: u64,
    /// Bytes of the file that belong to nothing.
    pub leaked_bytes: u64,
    /// Bytes that compaction would give back without looking into the blocks: leaked space, space kept by blocks
    /// without data, and sector bitmaps that no block needs.
    pub reclaimable_bytes: u64,
    /// What replaying the log would change; `None` when the log is clean.
    pub replay: Option<ReplayReport>,
}

/// Checks the image in a storage: structure, log, metadata, every entry of the BAT, and its parent locator. The name is
/// for messages. The file is only read, and parents are not looked at.
///
/// # Errors
/// Only when reading fails or `progress` cancels. What is wrong with the image is in the report.
pub fn check(
    storage: &Arc<dyn Storage>,
    name: Option<&Path>,
    options: &CheckOptions,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let mut findings = CollectAll::new(options.strictness);
    let summary = match load(storage, name, options.log_growth_max, &mut findings) {
        // A finding that ends the check was taken already.
        Err(error) if error.code().is_some() => None,
        Err(error) => return Err(error),
        Ok(loaded) => Some(judge(loaded, &mut findings, progress)?),
    };
    Ok(CheckReport {
        findings: findings.findings().to_vec(),
        errors: findings.count(Severity::Error),
        warnings: findings.count(Severity::Warning),
        notes: findings.count(Severity::Note),
        summary,
    })
}

fn judge(loaded: Loaded, findings: &mut CollectAll, progress: &dyn Progress) -> Result<CheckSummary> {
    let layer = Layer::from_loaded(loaded);
    let metadata = layer.metadata();
    if let Some(locator) = &metadata.parent_locator {
        locator.check_paths(&Location::of("parent locator"), findings)?;
    }
    let scan = scan_bat(&layer, findings, &mut |done, total| {
        let size = metadata.geometry.block_size(); // done and total count the disk's blocks
        advance(progress, done * size, Some(total * size))
    })?;
    let BatScan { blocks, bitmaps_present, fragments, leaked_bytes, unneeded_bytes } = scan;
    if leaked_bytes > 0 {
        let detail = format!("{leaked_bytes} bytes of the file belong to nothing");
        findings.report(Code::LeakedSpace, Location::of("file"), detail)?;
    }
    Ok(CheckSummary {
        disk_type: metadata.disk_type(),
        disk_size: metadata.disk_size,
        block_size: metadata.geometry.block_size(),
        file_size: layer.rules().file_size.get(),
        blocks,
        bitmaps_present,
        fragments,
        leaked_bytes,
        reclaimable_bytes: leaked_bytes + unneeded_bytes, // both parts of the file, which is at most 1 PiB
        replay: layer.replay().cloned(),
    })
}
