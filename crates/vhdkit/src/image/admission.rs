//! What must be in order before an image may be written, decided before the first byte is.

use super::layer::Layer;
use super::scan::scan_bat;
use crate::error::{Error, ErrorKind, Result};
use crate::format::finding::{Code, FailFast, Findings, Location, Strictness};

/// Checks a layer for writing: the header can be raised (V-017), there is a log (V-020) and it is clean, and no entry of
/// the BAT is in error (V-110 to V-122).
pub(super) fn check_writable(layer: &Layer, strictness: Strictness) -> Result<()> {
    let header = &layer.headers().current;
    let mut findings = FailFast::new(strictness);
    if header.sequence_number >= u64::MAX - 1 {
        let detail = format!("the sequence number {} cannot be raised any more", header.sequence_number);
        return Err(findings.fatal(Code::HeaderSequenceExhausted, Location::of("header"), detail));
    }
    if header.log_length == 0 {
        return Err(findings.fatal(Code::LogMissing, Location::of("header"), "the file has no log".to_owned()));
    }
    if header.is_dirty() {
        let what = "the log holds changes that are not in place yet; it has to be replayed before anything is written";
        return Err(Error::new(ErrorKind::NeedsReplay, what).with_code(Code::LogNeedsReplay));
    }
    scan_bat(layer, &mut findings, &mut |_, _| Ok(())).map(|_| ())
}
