//! What must be in order before an image may be written, decided before the first byte is.

use super::commit::Commit;
use super::headers::UPDATES_RESERVED;
use super::layer::Layer;
use super::scan::scan_marks;
use super::session::needs_replay;
use super::simulation::BrokenRule;
use super::space::Space;
use super::writer::Writer;
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::{Code, FailFast, Findings, Location, Strictness};
use crate::format::metadata::DiskType;
use crate::format::space::TakenRange;
use crate::storage::is_resizable;

/// What the caller allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Admission {
    /// How strictly to judge.
    pub(super) strictness: Strictness,
    /// Whether a dirty log may be put into place.
    pub(super) replay: bool,
    /// A rule to break, for the crash simulator.
    pub(super) broken: Option<BrokenRule>,
}

/// Checks a layer for writing: the header can be raised (V-017), there is a log (V-020) and it is clean or may be
/// replayed, and no entry of the BAT is in error (V-110 to V-122). Gives what writes it.
pub(super) fn admit(layer: &Layer, admission: &Admission) -> Result<Writer> {
    let header = &layer.headers().current;
    let mut findings = FailFast::new(admission.strictness);
    if header.sequence_number > u64::MAX - UPDATES_RESERVED {
        let detail = format!("the sequence number {} cannot be raised any more", header.sequence_number);
        return Err(findings.fatal(Code::HeaderSequenceExhausted, Location::of("header"), detail));
    }
    if header.log_length == 0 {
        return Err(findings.fatal(Code::LogMissing, Location::of("header"), "the file has no log".to_owned()));
    }
    if header.is_dirty() && !admission.replay {
        return Err(needs_replay());
    }
    let (there, wanted) = (layer.view().physical_size(), layer.view().size());
    if header.is_dirty() && wanted > there && !is_resizable(layer.storage().as_ref()) {
        let what = format!("the log wants {wanted:#x} bytes for the file, and the device has {there:#x}");
        return Err(
            Error::new(ErrorKind::Truncated, what).with_hint("copy the image to a file or a larger device first")
        );
    }
    let reaches_past = |taken: &&TakenRange| taken.range.end > layer.view().size();
    if let Some(region) = layer.rules().taken.ranges().iter().find(reaches_past) {
        let detail = format!(
            "the {} at {:#x} reaches past the end of the file ({:#x}): writing would put blocks there",
            region.name,
            region.range.start,
            layer.view().size()
        );
        return Err(findings.fatal(Code::RegionOptionalOutsideFile, Location::of("region table"), detail));
    }
    let (_, marks) = scan_marks(layer, &mut findings, &mut |_, _| Ok(()))?;
    let space = Space::new(marks, layer.view().size(), layer.geometry().block_size());
    let is_fixed = layer.metadata().disk_type() == DiskType::Fixed;
    let mut writer = Writer::new(Commit::new(layer.headers()), header, space, is_fixed);
    writer.broken = admission.broken;
    Ok(writer)
}
