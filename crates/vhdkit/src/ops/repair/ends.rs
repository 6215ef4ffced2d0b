//! What stands at the two ends of opening: identifier, headers and log in the beginning, the length of the file in the end.

use std::ops::Range;

use super::{Planner, Step};
use crate::error::{Error, ErrorKind, Result};
use crate::format::HEADER_SECTION_BYTES;
use crate::format::finding::{Code, CollectAll, Finding, Location, Strictness};
use crate::format::guid::Guid;
use crate::format::header::{HEADER_BYTES, Header, OFFSETS, VERSION, decode_headers};
use crate::format::ident::{Probe, SIGNATURE, probe};
use crate::format::log::{ReplayLimits, find_active_sequence};
use crate::format::metadata::DiskType;
use crate::image::layer::{Layer, load};
use crate::image::replay::{FileRing, replay_into_memory};
use crate::image::scan::scan_marks;
use crate::units::{MIB, round_up};

/// Header updates that must be possible: those of the repair, and of a session of writing afterwards.
const UPDATES_RESERVED: u64 = 128;
/// The log that an image gets whose log has no place any more.
const NEW_LOG_BYTES: u64 = MIB;

/// What a discarded log may cost.
const LOG_LOST: &str = "changes that were only in the log: what the guest wrote last into new blocks, up to the last flush or \
                        later; blocks that it wrote over before are not affected";

impl Planner {
    /// Chooses the header that counts (V-006 to V-020).
    pub(super) fn headers(&mut self) -> Result<Step> {
        if self.draft.base_length() < HEADER_SECTION_BYTES {
            return Ok(Step::Stop);
        }
        let mut copies = [[0; HEADER_BYTES]; 2];
        for (copy, offset) in copies.iter_mut().zip(OFFSETS) {
            let read = self.draft.read(copy, offset);
            read.map_err(|error| Error::io(format!("cannot read the header at {offset:#x}"), error))?;
        }
        let decoded = copies.map(|copy| Header::decode(&copy));
        let mut findings = CollectAll::default();
        let size = self.draft.length();
        let headers = decode_headers([&copies[0], &copies[1]], size, &mut findings);
        let found = findings.findings().to_vec();
        let (current, copy) = match (&headers, decoded) {
            (Ok(headers), _) => (headers.current, headers.current_copy),
            (Err(_), [None, None]) => return Ok(Step::Stop),
            (Err(_), [Some(first), Some(second)]) if first.sequence_number == second.sequence_number => {
                if !same_log(&first, &second) {
                    return Ok(Step::Stop); // which log counts cannot be known
                }
                (first, 0)
            }
            (Err(_), [Some(first), Some(second)]) => {
                if first.sequence_number > second.sequence_number {
                    (first, 0)
                } else {
                    (second, 1)
                }
            }
            (Err(_), [Some(only), None]) => (only, 0),
            (Err(_), [None, Some(only)]) => (only, 1),
        };
        if current.version != VERSION || current.sequence_number > u64::MAX - UPDATES_RESERVED {
            return Ok(Step::Stop);
        }
        self.old = Some((current, copy));
        self.header = Some(current);
        for finding in found {
            if self.header_finding(&current, decoded, finding) == Step::Stop {
                return Ok(Step::Stop);
            }
        }
        Ok(Step::Next)
    }

    /// True when there is the signature of a header or a region table where a VHDX has them.
    pub(super) fn has_signatures(&self) -> Result<bool> {
        let headers = OFFSETS.map(|offset| (offset, crate::format::header::SIGNATURE));
        let tables = crate::format::region::OFFSETS.map(|offset| (offset, crate::format::region::SIGNATURE));
        for (offset, signature) in headers.into_iter().chain(tables) {
            let mut bytes = [0; 4];
            self.draft.read(&mut bytes, offset).map_err(|error| Error::io("cannot read the file", error))?;
            if bytes == signature {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn header_finding(&mut self, current: &Header, copies: [Option<Header>; 2], finding: Finding) -> Step {
        match finding.code() {
            Code::HeaderCopyDamaged => self.act(finding, "both copies are written anew from the good one", None),
            Code::HeaderSequenceTie => self.act(finding, "both copies get numbers of their own", None),
            Code::HeaderReserved => self.act(finding, "the reserved bytes become zero", None),
            Code::HeaderConflict => {
                let other = copies[1].map(|copy| copy.data_write_guid).filter(|guid| *guid != current.data_write_guid);
                let lost = other.map(|guid| {
                    format!("the data write GUID {guid} of the second copy, which children may name (then `vhdkit reparent`)")
                });
                self.act(finding, "the first copy counts: they agree about the log, and only write GUIDs differ", lost);
            }
            Code::LogLengthUnaligned
            | Code::LogOffsetUnaligned
            | Code::LogOffsetLow
            | Code::LogOutsideFile
            | Code::LogGuidWithoutLog => {
                let lost = current.is_dirty().then(|| LOG_LOST.to_owned());
                self.drop_log(finding, lost);
            }
            _ => return Step::Stop,
        }
        Step::Next
    }

    /// The header names no log any more; one is made when the rest of the file is known.
    fn drop_log(&mut self, finding: Finding, lost: Option<String>) {
        self.act(finding, "the log is given up, and the image gets an empty one at the end of the file", lost);
        self.needs_log = true;
        self.change_header(|header| {
            header.log_guid = Guid::NIL;
            header.log_version = 0;
            header.log_length = 0;
            header.log_offset = 0;
        });
    }

    fn change_header(&mut self, change: impl FnOnce(&mut Header)) {
        if let Some(header) = &mut self.header {
            change(header);
        }
    }

    /// The first eight bytes of the file (V-002). There is a valid header, so that it is certain what they were.
    pub(super) fn identifier(&mut self) -> Result<Step> {
        let mut start = [0; 8];
        self.draft.read(&mut start, 0).map_err(|error| Error::io("cannot read the start of the file", error))?;
        if probe(&start) != Probe::Vhdx {
            let place = Location::at("file identifier", 0);
            let detail = "the file does not begin with \"vhdxfile\", but has a valid header".to_owned();
            let finding = Finding::new(Code::FileSignature, Strictness::Normal, place, detail);
            self.draft.write(0, &SIGNATURE)?;
            self.act(finding, "the signature is written again", None);
        }
        Ok(Step::Next)
    }

    /// Replays the log, or gives it up (V-031 to V-055).
    pub(super) fn log(&mut self) -> Result<Step> {
        let Some(header) = self.header else { return Ok(Step::Stop) };
        if !header.is_dirty() {
            return self.put_header();
        }
        if header.log_version != 0 {
            return Ok(Step::Stop);
        }
        let mut findings = CollectAll::default();
        let storage = self.draft.extended();
        let limits = ReplayLimits { file_size: self.draft.length(), growth_max: self.options.growth_max };
        let replayed = replay_into_memory(&storage, &header, limits, &mut findings);
        let found = findings.findings().to_vec();
        match replayed {
            Ok((view, _)) if view.size() > self.draft.length() && !self.is_resizable() => return Ok(Step::Stop),
            Ok((view, _)) => {
                self.draft.set_log(view);
                for finding in found {
                    let what = match finding.code() {
                        Code::LogNeedsReplay => "the log is put into place",
                        _ => "it is gone with the log, which is put into place",
                    };
                    self.act(finding, what, None);
                }
                self.change_header(|header| header.log_guid = Guid::NIL);
            }
            Err(error) => {
                let Some(finding) = found.into_iter().find(|finding| Some(finding.code()) == error.code()) else {
                    // An error without a finding is one of reading, or a limit.
                    return if error.kind() == ErrorKind::Limit { Ok(Step::Stop) } else { Err(error) };
                };
                if self.broken_log(&header, finding)? == Step::Stop {
                    return Ok(Step::Stop);
                }
                if self.header.is_some_and(|header| header.is_dirty()) {
                    return self.log(); // once more, in a file that is long enough now
                }
            }
        }
        self.put_header()
    }

    fn broken_log(&mut self, header: &Header, finding: Finding) -> Result<Step> {
        match finding.code() {
            Code::LogNoSequence | Code::LogTargetHeader | Code::LogTargetLog | Code::LogTargetBeyond => {
                self.act(finding, "the log is given up as a whole: it cannot be replayed", Some(LOG_LOST.to_owned()));
                self.change_header(|header| header.log_guid = Guid::NIL);
                Ok(Step::Next)
            }
            Code::LogFileTruncated => {
                let storage = self.draft.extended();
                let mut ring = FileRing::new(storage.as_ref(), header);
                let sequence = find_active_sequence(&mut ring, header.log_guid)?;
                let flushed =
                    sequence.as_ref().and_then(|sequence| sequence.head()).map(|head| head.flushed_file_offset);
                let size = self.draft.length();
                let Some(wanted) = flushed.and_then(|flushed| round_up(flushed, MIB)) else { return Ok(Step::Stop) };
                if wanted <= size || wanted - size > self.options.growth_max || !self.is_resizable() {
                    return Ok(Step::Stop);
                }
                self.draft.set_length(wanted);
                let lost = format!("what was in the last {} bytes of the file reads as zeros", wanted - size);
                self.act(finding, format!("the file is made {wanted:#x} bytes long again"), Some(lost));
                Ok(Step::Next)
            }
            _ => Ok(Step::Stop),
        }
    }

    /// Shows the header as it will be to whoever reads the draft.
    fn put_header(&mut self) -> Result<Step> {
        if let Some(header) = &self.header {
            let newer = Header { sequence_number: header.sequence_number + 1, ..*header }; // far from the end of all numbers
            self.draft.write_headers([header, &newer])?;
        }
        Ok(Step::Next)
    }

    /// Gives the image a log where it lost its own, and cuts off what trails behind and holds nothing.
    pub(super) fn end_of_file(&mut self) -> Result<()> {
        let mut findings = CollectAll::default();
        let Ok(loaded) = load(&self.storage(), None, self.options.growth_max, &mut findings) else { return Ok(()) };
        let layer = Layer::from_loaded(loaded);
        let is_fixed = layer.metadata().disk_type() == DiskType::Fixed;
        let (_, marks) = scan_marks(&layer, &mut findings, &mut |_, _| Ok(()))?;
        let regions_end = layer.rules().taken_end;
        let used = regions_end.max(marks.end().saturating_mul(MIB));
        if self.needs_log {
            let start = round_up(used.max(self.draft.length()), MIB).unwrap_or(u64::MAX);
            let Some(end) = start.checked_add(NEW_LOG_BYTES).filter(|_| self.is_resizable()) else { return Ok(()) };
            self.draft.set_length(end);
            self.change_header(|header| {
                header.log_offset = start;
                header.log_length = u32::try_from(NEW_LOG_BYTES).unwrap_or_default();
            });
            return self.put_header().map(|_| ());
        }
        let length = self.draft.length();
        let clean = findings.count(crate::format::finding::Severity::Error) == 0;
        if is_fixed || !clean || used >= length || !self.is_resizable() || !self.is_zero(used..length)? {
            return Ok(());
        }
        if !is_zero(self.draft.base(), used..length.min(self.draft.base_length()))? {
            return Ok(()); // the undo record would have to keep it all
        }
        let finding = Finding::new(
            Code::LeakedSpace,
            Strictness::Normal,
            Location::at("file", used),
            format!("{} bytes at the end of the file belong to nothing and are zero", length - used),
        );
        self.draft.set_length(used);
        self.act(finding, format!("the file is cut to {used:#x} bytes"), None);
        Ok(())
    }

    /// True when a range of the draft holds nothing but zeros.
    pub(super) fn is_zero(&self, range: Range<u64>) -> Result<bool> {
        is_zero(&self.storage(), range)
    }
}

/// True when a range holds nothing but zeros. Holes are not read.
pub(super) fn is_zero(storage: &std::sync::Arc<dyn crate::storage::Storage>, range: Range<u64>) -> Result<bool> {
    let failed = |error, at: u64| Error::io(format!("cannot read the file at {at:#x}"), error);
    let mut buffer = vec![0; 256 << 10];
    let mut position = range.start;
    while position < range.end {
        let found = storage.next_data(position..range.end).map_err(|error| failed(error, position))?;
        let Some(data) = found else { return Ok(true) };
        let length = usize::try_from(data.end - data.start).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..length).filter(|part| !part.is_empty()) else { return Ok(true) };
        storage.read_at(part, data.start).map_err(|error| failed(error, data.start))?;
        if part.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        position = data.start + length as u64; // inside the range
    }
    Ok(true)
}

/// True when two headers say the same about the log and the format.
fn same_log(first: &Header, second: &Header) -> bool {
    let of =
        |header: &Header| (header.version, header.log_version, header.log_guid, header.log_length, header.log_offset);
    of(first) == of(second)
}
