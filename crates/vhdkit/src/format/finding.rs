//! Findings: what a decoder has to say about an image.
//!
//! Every decoder reports through [`Findings`]. Opening an image stops at the first finding of severity
//! [`Severity::Error`]; `check` collects them all. So the parser and the checker cannot disagree.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// The file deviates from the format, but what it means is certain.
    Warning,
    /// The file cannot be trusted: it is refused, or the request that needs the broken part is.
    Error,
}

impl Severity {
    /// A stable name for scripts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// How strictly an image is judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strictness {
    /// Also accept what is against the letter of the format but has one sensible meaning: reserved fields in the
    /// metadata that are not zero, and the UNMAPPED state of format version 0.95.
    Lenient,
    /// Accept what is in practical use.
    #[default]
    Normal,
    /// Refuse also what other readers refuse: reserved offsets and bitmap entries that are not zero, a dirty log.
    Strict,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $slug:literal, $rule:literal, $kind:ident, $lenient:ident $normal:ident $strict:ident
        $(, hint $hint:literal)?;)*) => {
        /// The stable code of a finding. The numbers V-001 to V-157 are those of `docs/format.md`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code { $($(#[$doc])* $variant,)* }

        impl Code {
            /// Every code there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// A stable name for scripts.
            #[must_use]
            pub const fn as_str(self) -> &'static str { match self { $(Self::$variant => $slug,)* } }

            /// The rule of `docs/format.md` that is broken.
            #[must_use]
            pub const fn rule(self) -> &'static str { match self { $(Self::$variant => $rule,)* } }

            /// The kind of the error that it is when it is one.
            #[must_use]
            pub const fn kind(self) -> ErrorKind { match self { $(Self::$variant => ErrorKind::$kind,)* } }

            /// How bad it is, under the given strictness.
            #[must_use]
            pub const fn severity(self, strictness: Strictness) -> Severity {
                match (self, strictness) {
                    $((Self::$variant, Strictness::Lenient) => Severity::$lenient,
                      (Self::$variant, Strictness::Normal) => Severity::$normal,
                      (Self::$variant, Strictness::Strict) => Severity::$strict,)*
                }
            }

            /// What the user can do about it, where there is something.
            #[must_use]
            pub const fn hint(self) -> Option<&'static str> {
                match self { $($(Self::$variant => Some($hint),)?)* _ => None }
            }
        }
    };
}

codes! {
    // File and headers.
    /// The file is smaller than the header section.
    FileTooSmall = "file-too-small", "V-001", Truncated, Error Error Error, hint "the file was cut off; get a complete copy";
    /// The file does not begin with `vhdxfile`.
    FileSignature = "file-signature", "V-002", NotVhdx, Error Error Error;
    /// One of the two header copies is damaged; the other is used.
    HeaderCopyDamaged = "header-copy-damaged", "V-007", Corrupt, Warning Warning Warning;
    /// Neither header copy is valid.
    HeadersDamaged = "headers-damaged", "V-006", Corrupt, Error Error Error, hint "run `vhdkit check` to see everything that is damaged";
    /// Both header copies carry the same sequence number and are identical (Disk2vhd writes that).
    HeaderSequenceTie = "header-sequence-tie", "V-009", Corrupt, Warning Warning Warning;
    /// Both header copies carry the same sequence number and differ.
    HeaderConflict = "header-conflict", "V-009", Corrupt, Error Error Error;
    /// The format version is not 1.
    HeaderVersion = "header-version", "V-010", Unsupported, Error Error Error;
    /// The log version is not 0 while a log is in use.
    LogVersion = "log-version", "V-011", Unsupported, Error Error Error;
    /// The log length is not a multiple of 1 MiB.
    LogLengthUnaligned = "log-length-unaligned", "V-012", Corrupt, Error Error Error;
    /// The log offset is not a multiple of 1 MiB.
    LogOffsetUnaligned = "log-offset-unaligned", "V-013", Corrupt, Error Error Error;
    /// The log lies inside the header section.
    LogOffsetLow = "log-offset-low", "V-014", Corrupt, Error Error Error;
    /// The log reaches past the end of the file.
    LogOutsideFile = "log-outside-file", "V-015", Truncated, Error Error Error, hint "the file was cut off; get a complete copy";
    /// A log GUID is set, but there is no log.
    LogGuidWithoutLog = "log-guid-without-log", "V-016", Corrupt, Error Error Error;
    /// The header sequence number cannot be raised any more.
    HeaderSequenceExhausted = "header-sequence-exhausted", "V-017", Limit, Error Error Error, hint "convert the image to a new file to write to it";
    /// Reserved bytes of the header are not zero.
    HeaderReserved = "header-reserved", "V-018", Corrupt, Warning Warning Warning;
    /// The log is longer than this implementation handles.
    LogTooLong = "log-too-long", "V-019", Limit, Error Error Error;
    /// There is no log, and writing needs one.
    LogMissing = "log-missing", "V-020", Limit, Error Error Error, hint "convert the image to a new file to write to it";

    // Log.
    /// The log holds changes that are not in place yet.
    LogNeedsReplay = "log-needs-replay", "V-031", NeedsReplay, Note Note Error;
    /// The log is in use, but holds no valid sequence of entries.
    LogNoSequence = "log-no-sequence", "V-032", Corrupt, Error Error Error, hint "changes that were only in the log are lost; get an older copy if there is one";
    /// The file is shorter than the log says it must be.
    LogFileTruncated = "log-file-truncated", "V-040", Truncated, Error Error Error, hint "the file was cut off; get a complete copy";
    /// A log entry aims at the file identifier or the headers.
    LogTargetHeader = "log-target-header", "V-047", Corrupt, Error Error Error;
    /// A log entry aims at the log itself.
    LogTargetLog = "log-target-log", "V-048", Corrupt, Error Error Error;
    /// A log entry aims beyond the end of the file that it declares.
    LogTargetBeyond = "log-target-beyond", "V-049", Corrupt, Error Error Error;
    /// The log wants the file to grow by more than a sane amount.
    LogGrowth = "log-growth", "V-049", Limit, Error Error Error;
    /// A file offset recorded in the log is not a multiple of 1 MiB (QEMU writes such).
    LogFileOffsetUnaligned = "log-file-offset-unaligned", "V-055", Corrupt, Note Warning Warning;

    // Region tables.
    /// One of the two region table copies is damaged; the other is used.
    RegionCopyDamaged = "region-copy-damaged", "V-060", Corrupt, Warning Warning Warning;
    /// Neither region table copy is valid.
    RegionTablesDamaged = "region-tables-damaged", "V-061", Corrupt, Error Error Error, hint "run `vhdkit check` to see everything that is damaged";
    /// Both region table copies are valid and differ; the first is used.
    RegionCopiesDiffer = "region-copies-differ", "V-062", Corrupt, Warning Warning Warning;
    /// The region table claims more entries than fit.
    RegionCount = "region-count", "V-063", Corrupt, Error Error Error;
    /// The reserved field of the region table header is not zero.
    RegionReserved = "region-reserved", "V-064", Corrupt, Warning Warning Warning;
    /// A region GUID occurs twice.
    RegionDuplicate = "region-duplicate", "V-065", Corrupt, Error Error Error;
    /// A region offset is not a multiple of 1 MiB, or lies inside the header section.
    RegionOffset = "region-offset", "V-066", Corrupt, Error Error Error;
    /// A region length is not a multiple of 1 MiB.
    RegionLength = "region-length", "V-067", Corrupt, Error Error Error;
    /// The BAT or metadata region has no length.
    RegionEmpty = "region-empty", "V-068", Corrupt, Error Error Error;
    /// A region reaches past the end of the file.
    RegionOutsideFile = "region-outside-file", "V-069", Truncated, Error Error Error, hint "the file was cut off; get a complete copy";
    /// A region that is not needed reaches past the end of the file.
    RegionOptionalOutsideFile = "region-optional-outside-file", "V-069", Truncated, Warning Warning Warning;
    /// A region overlaps another region, the log or the header section.
    RegionOverlap = "region-overlap", "V-070", Corrupt, Error Error Error;
    /// The BAT or metadata region is missing.
    RegionMissing = "region-missing", "V-071", Corrupt, Error Error Error;
    /// A region that must be understood is unknown.
    RegionUnknownRequired = "region-unknown-required", "V-072", Unsupported, Error Error Error;
    /// A region is unknown; it is kept and not used.
    RegionUnknown = "region-unknown", "V-073", Unsupported, Note Note Note;
    /// The Required field of a region is not what the format says (QEMU and mkimg write such).
    RegionRequiredFlag = "region-required-flag", "V-074", Corrupt, Note Warning Warning;

    // Metadata.
    /// The metadata table does not begin with `metadata`.
    MetadataSignature = "metadata-signature", "V-080", Corrupt, Error Error Error;
    /// The metadata table claims more entries than fit.
    MetadataCount = "metadata-count", "V-081", Corrupt, Error Error Error;
    /// Reserved fields of the metadata table header are not zero.
    MetadataReserved = "metadata-reserved", "V-082", Corrupt, Warning Error Error;
    /// Reserved bits of a metadata table entry are not zero.
    MetadataEntryReserved = "metadata-entry-reserved", "V-083", Corrupt, Warning Error Error;
    /// A metadata item occurs twice.
    MetadataDuplicate = "metadata-duplicate", "V-084", Corrupt, Error Error Error;
    /// A metadata item is longer than 1 MiB.
    MetadataItemLength = "metadata-item-length", "V-085", Corrupt, Error Error Error;
    /// An empty metadata item has an offset.
    MetadataEmptyOffset = "metadata-empty-offset", "V-086", Corrupt, Error Error Error;
    /// A metadata item lies outside the metadata region.
    MetadataItemOutside = "metadata-item-outside", "V-087", Corrupt, Error Error Error;
    /// Metadata items overlap.
    MetadataOverlap = "metadata-overlap", "V-088", Corrupt, Error Error Error;
    /// There are more user items than the format allows.
    MetadataUserCount = "metadata-user-count", "V-089", Corrupt, Error Error Error;
    /// A metadata item that must be understood is unknown.
    MetadataUnknownRequired = "metadata-unknown-required", "V-090", Unsupported, Error Error Error;
    /// A metadata item is unknown; it is kept and not used.
    MetadataUnknown = "metadata-unknown", "V-091", Unsupported, Note Note Note;
    /// The file was never finished by the program that made it.
    IncompleteFile = "incomplete-file", "V-092", Unsupported, Error Error Error, hint "make the image again: its creation was cut short";
    /// A metadata item that every image must have is missing.
    MetadataMissing = "metadata-missing", "V-093", Corrupt, Error Error Error;
    /// The file parameters item has a wrong length.
    FileParametersLength = "file-parameters-length", "V-094", Corrupt, Error Error Error;
    /// The block size is not a power of two from 1 to 256 MiB.
    BlockSize = "block-size", "V-095", Corrupt, Error Error Error;
    /// Reserved bits of the file parameters are not zero.
    FileParametersReserved = "file-parameters-reserved", "V-096", Corrupt, Warning Error Error;
    /// The virtual disk size item has a wrong length, or the size is more than 64 TiB.
    DiskSize = "disk-size", "V-098", Corrupt, Error Error Error;
    /// The virtual disk size is not a multiple of the logical sector size.
    DiskSizeUnaligned = "disk-size-unaligned", "V-099", Corrupt, Error Error Error;
    /// The virtual disk size is zero.
    DiskSizeZero = "disk-size-zero", "V-100", Corrupt, Error Error Error;
    /// The logical sector size is neither 512 nor 4096.
    LogicalSectorSize = "logical-sector-size", "V-101", Corrupt, Error Error Error;
    /// The physical sector size is neither 512 nor 4096.
    PhysicalSectorSize = "physical-sector-size", "V-102", Corrupt, Error Error Error;
    /// The physical sector is smaller than the logical one, which no disk has.
    SectorSizes = "sector-sizes", "V-102", Corrupt, Note Warning Warning;
    /// The virtual disk ID item has a wrong length.
    DiskIdLength = "disk-id-length", "V-103", Corrupt, Error Error Error;
    /// A known metadata item carries other flags than the format gives it.
    MetadataFlags = "metadata-flags", "V-104", Corrupt, Note Warning Warning;
    /// The image is differencing, but names no parent.
    ParentLocatorMissing = "parent-locator-missing", "V-105", Corrupt, Error Error Error;
    /// The image names a parent, but is not differencing.
    ParentLocatorUnexpected = "parent-locator-unexpected", "V-106", Corrupt, Warning Warning Warning;
    /// The metadata region is too small for its table, or larger than this implementation handles.
    MetadataRegionSize = "metadata-region-size", "V-107", Corrupt, Error Error Error;

    // BAT and blocks.
    /// The BAT region is too small for the disk.
    BatTooSmall = "bat-too-small", "V-110", Corrupt, Error Error Error;
    /// Reserved bits of a BAT entry are not zero.
    BatReserved = "bat-reserved", "V-111", Corrupt, Error Error Error;
    /// A payload block has a state that the format does not know.
    BatState = "bat-state", "V-112", Corrupt, Error Error Error;
    /// A payload block has the UNMAPPED state of format version 0.95.
    BatStateOldUnmapped = "bat-state-old-unmapped", "V-112", Corrupt, Warning Error Error;
    /// A payload block is partially present in an image without a parent.
    BatPartialWithoutParent = "bat-partial-without-parent", "V-113", Corrupt, Error Error Error;
    /// A payload block is present, but lies inside the header section.
    BatOffset = "bat-offset", "V-114", Corrupt, Error Error Error;
    /// A payload block reaches past the end of the file.
    BatOutsideFile = "bat-outside-file", "V-115", Truncated, Error Error Error, hint "the file was cut off; get a complete copy";
    /// The last payload block is cut short by the end of the file, behind the end of the disk (old QEMU writes such).
    BatLastBlockCut = "bat-last-block-cut", "V-115", Truncated, Warning Warning Warning;
    /// The space that an unmapped block keeps is not inside the file.
    BatAnchor = "bat-anchor", "V-116", Corrupt, Error Error Error;
    /// A block without data has an offset.
    BatUnusedOffset = "bat-unused-offset", "V-117", Corrupt, Note Warning Error;
    /// Two structures claim the same file space.
    BatOverlap = "bat-overlap", "V-118", Corrupt, Error Error Error;
    /// A sector bitmap entry has a state that the format does not know.
    BitmapState = "bitmap-state", "V-119", Corrupt, Error Error Error;
    /// A sector bitmap block is present, but lies inside the header section.
    BitmapOffset = "bitmap-offset", "V-120", Corrupt, Error Error Error;
    /// A sector bitmap block reaches past the end of the file.
    BitmapOutsideFile = "bitmap-outside-file", "V-120", Truncated, Error Error Error, hint "the file was cut off; get a complete copy";
    /// An image without a parent has a sector bitmap entry (QEMU before 8.0 leaves garbage there).
    BitmapUnexpected = "bitmap-unexpected", "V-121", Corrupt, Note Warning Error;
    /// A partially present block has no sector bitmap.
    BitmapMissing = "bitmap-missing", "V-122", Corrupt, Error Error Error;
    /// The BAT is larger than any disk can need.
    BatTooLarge = "bat-too-large", "V-129", Limit, Error Error Error;
    /// Space in the file belongs to nothing.
    LeakedSpace = "leaked-space", "L7", Corrupt, Note Note Note;

    // Parent.
    /// The parent locator is shorter than its header.
    LocatorLength = "locator-length", "V-140", Corrupt, Error Error Error;
    /// The parent locator is of an unknown type.
    LocatorType = "locator-type", "V-141", Unsupported, Error Error Error;
    /// The reserved field of the parent locator is not zero.
    LocatorReserved = "locator-reserved", "V-142", Corrupt, Warning Warning Warning;
    /// The parent locator claims more pairs than fit.
    LocatorCount = "locator-count", "V-143", Corrupt, Error Error Error;
    /// A key or value of the parent locator lies outside of it, is empty, or has an odd length.
    LocatorRange = "locator-range", "V-144", Corrupt, Error Error Error;
    /// A key or value of the parent locator is not valid UTF-16 without NUL.
    LocatorText = "locator-text", "V-145", Corrupt, Error Error Error;
    /// A key of the parent locator occurs twice.
    LocatorDuplicate = "locator-duplicate", "V-146", Corrupt, Error Error Error;
    /// The parent linkage is missing or not a GUID.
    LocatorLinkage = "locator-linkage", "V-148", Corrupt, Error Error Error;
    /// The second parent linkage is not a GUID.
    LocatorLinkage2 = "locator-linkage2", "V-149", Corrupt, Error Error Error;
    /// The parent locator has no path.
    LocatorNoPath = "locator-no-path", "V-150", Corrupt, Error Error Error, hint "name the parent with --parent FILE";
    /// No file was found where the parent could be.
    ParentNotFound = "parent-not-found", "V-151", ParentNotFound, Error Error Error;
    /// The parent's data write GUID is not the one that the child expects.
    ParentMismatch = "parent-mismatch", "V-152", ParentMismatch, Error Error Error;
    /// The parent has another logical sector size.
    ParentSectorSize = "parent-sector-size", "V-153", ParentMismatch, Error Error Error;
    /// The chain of parents has a cycle.
    ChainCycle = "chain-cycle", "V-154", Chain, Error Error Error;
    /// The chain of parents is too deep.
    ChainDepth = "chain-depth", "V-154", Chain, Error Error Error;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where in an image a finding is: the structure in words, with copy and index where there are several, and its
/// offset in the file where it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    structure: String,
    offset: Option<u64>,
}

impl Location {
    /// A structure without a place of its own.
    #[must_use]
    pub fn of(structure: impl Into<String>) -> Self {
        Self { structure: structure.into(), offset: None }
    }

    /// A structure at an offset in the file.
    #[must_use]
    pub fn at(structure: impl Into<String>, offset: u64) -> Self {
        Self { structure: structure.into(), offset: Some(offset) }
    }

    /// The structure in words.
    #[must_use]
    pub fn structure(&self) -> &str {
        &self.structure
    }

    /// The offset in the file.
    #[must_use]
    pub const fn offset(&self) -> Option<u64> {
        self.offset
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} at {offset:#x}", self.structure),
            None => f.write_str(&self.structure),
        }
    }
}

/// One thing that a decoder has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    code: Code,
    severity: Severity,
    location: Location,
    detail: String,
}

impl Finding {
    /// A finding, with its severity under the given strictness.
    #[must_use]
    pub fn new(code: Code, strictness: Strictness, location: Location, detail: impl Into<String>) -> Self {
        Self { code, severity: code.severity(strictness), location, detail: detail.into() }
    }

    /// The stable code.
    #[must_use]
    pub const fn code(&self) -> Code {
        self.code
    }

    /// How bad it is.
    #[must_use]
    pub const fn severity(&self) -> Severity {
        self.severity
    }

    /// Where it is.
    #[must_use]
    pub const fn location(&self) -> &Location {
        &self.location
    }

    /// What is wrong there, in words.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.detail
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} [{}]", self.location, self.detail, self.code.rule())
    }
}

/// Who a decoder reports to.
pub trait Findings {
    /// How strictly to judge.
    fn strictness(&self) -> Strictness;

    /// Takes a finding.
    ///
    /// # Errors
    /// The finding as an error, when the collector stops at it.
    fn take(&mut self, finding: Finding) -> Result<()>;

    /// Makes a finding and takes it.
    ///
    /// # Errors
    /// As [`Findings::take`].
    fn report(&mut self, code: Code, location: Location, detail: String) -> Result<()> {
        let finding = Finding::new(code, self.strictness(), location, detail);
        self.take(finding)
    }

    /// Takes a finding that nothing behind it can be made sense of, and gives the error to return.
    fn fatal(&mut self, code: Code, location: Location, detail: String) -> Error {
        let finding = Finding::new(code, self.strictness(), location, detail);
        let error = Error::from_finding(&finding);
        match self.take(finding) {
            Ok(()) => error,
            Err(error) => error,
        }
    }
}

/// Stops at the first error; keeps the first warnings and notes.
#[derive(Debug, Default)]
pub struct FailFast {
    strictness: Strictness,
    kept: Vec<Finding>,
}

/// Findings kept at most, so that a hostile image cannot fill memory with them.
pub const FINDINGS_KEPT_MAX: usize = 10_000;

impl FailFast {
    /// A collector that judges with the given strictness.
    #[must_use]
    pub fn new(strictness: Strictness) -> Self {
        Self { strictness, kept: Vec::new() }
    }

    /// The warnings and notes.
    #[must_use]
    pub fn into_findings(self) -> Vec<Finding> {
        self.kept
    }
}

impl Findings for FailFast {
    fn strictness(&self) -> Strictness {
        self.strictness
    }

    fn take(&mut self, finding: Finding) -> Result<()> {
        if finding.severity() == Severity::Error {
            return Err(Error::from_finding(&finding));
        }
        if self.kept.len() < FINDINGS_KEPT_MAX {
            self.kept.push(finding);
        }
        Ok(())
    }
}

/// Collects everything, up to a limit, and counts the rest.
#[derive(Debug, Default)]
pub struct CollectAll {
    strictness: Strictness,
    kept: Vec<Finding>,
    errors: u64,
    warnings: u64,
    notes: u64,
}

impl CollectAll {
    /// A collector that judges with the given strictness.
    #[must_use]
    pub fn new(strictness: Strictness) -> Self {
        Self { strictness, ..Self::default() }
    }

    /// The findings, in the order they were made, at most [`FINDINGS_KEPT_MAX`].
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.kept
    }

    /// How many findings of a severity there were, those not kept included.
    #[must_use]
    pub const fn count(&self, severity: Severity) -> u64 {
        match severity {
            Severity::Error => self.errors,
            Severity::Warning => self.warnings,
            Severity::Note => self.notes,
        }
    }
}

impl Findings for CollectAll {
    fn strictness(&self) -> Strictness {
        self.strictness
    }

    fn take(&mut self, finding: Finding) -> Result<()> {
        match finding.severity() {
            Severity::Error => self.errors += 1,
            Severity::Warning => self.warnings += 1,
            Severity::Note => self.notes += 1,
        }
        if self.kept.len() < FINDINGS_KEPT_MAX {
            self.kept.push(finding);
        }
        Ok(())
    }
}
