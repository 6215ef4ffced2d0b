//! Whether Windows is done with an NTFS volume: flags, journal, hibernation, shadow copies.

use super::raw::{
    INDEX_BLOCK_HEAD_OFFSET, INDEX_ROOT_HEAD_OFFSET, RawFileName, RawIndexEntry, RawIndexHead, RawRestartArea,
    RawRestartPage, RawShadow, RawVolumeInformation, SHADOW_GUID, SHADOW_OFFSET,
};
use super::record::{Record, kind, unstamp};
use super::{Ntfs, file};
use crate::format::guid::Guid;
use crate::guest::window::{Checked, Window, parse, reason, require};

/// Flags of the volume.
mod flag {
    pub(super) const DIRTY: u16 = 0x1;
    pub(super) const RESIZE_LOG: u16 = 0x2;
    pub(super) const CHECKING: u16 = 0x4000;
    /// Seen on volumes in order; and "modified by chkdsk".
    pub(super) const HARMLESS: u16 = 0x80 | 0x8000;
}

/// Where the second restart page may lie.
const PAGE_BYTES: u64 = 4096;
/// `clients_in_use`: nobody has the log open.
const NO_CLIENT: u16 = 0xffff;
/// `flags` of the restart area: the volume was dismounted in order.
const VOLUME_CLEAN: u16 = 2;
/// Longest index of the root directory that is searched; tens of thousands of entries.
const ROOT_BYTES_MAX: u64 = 16 << 20;
/// Bytes of an index block: 4096 everywhere but on odd volumes.
const INDEX_BYTES: u64 = 4096;
/// Most entries for one name: more than one are left in blocks that are not in use.
const HIBERNATION_FILES_MAX: usize = 64;
/// `flags` of an index entry: it is the last, and has no name.
const ENTRY_LAST: u32 = 2;

/// Refuses a volume that somebody is not done with.
pub(super) fn check(ntfs: &Ntfs, window: &Window<'_>) -> Checked<()> {
    volume_flags(ntfs, window)?;
    log_is_clean(ntfs, window)?;
    hibernation(ntfs, window)?;
    shadow_copies(window)
}

fn volume_flags(ntfs: &Ntfs, window: &Window<'_>) -> Checked<()> {
    let record = ntfs.record(window, file::VOLUME)?;
    let Some(attribute) = record.find(kind::VOLUME_INFORMATION, "")? else {
        return reason("its volume information is missing");
    };
    let raw: RawVolumeInformation = parse(attribute.value()?, 0)?;
    let (major, minor) = (raw.major, raw.minor);
    if major != 3 || minor > 1 {
        return reason(format!("its version {major}.{minor} is not understood"));
    }
    let flags = raw.flags.get();
    require(flags & flag::DIRTY == 0, "it is marked dirty: it needs chkdsk")?;
    require(flags & flag::CHECKING == 0, "chkdsk is not done with it")?;
    require(flags & flag::RESIZE_LOG == 0, "Windows wants to change its journal first")?;
    let unknown = flags & !flag::HARMLESS;
    if unknown == 0 { Ok(()) } else { reason(format!("it has flags that are not understood ({unknown:#x})")) }
}

/// Judges the restart pages of `$LogFile`: the newer one counts.
fn log_is_clean(ntfs: &Ntfs, window: &Window<'_>) -> Checked<()> {
    let record = ntfs.record(window, file::LOG)?;
    let Some(data) = record.find(kind::DATA, "")? else { return reason("its journal is missing") };
    let stored = data.stored(ntfs.clusters)?;
    require(stored.plain && stored.from_start, "its journal is not stored plainly")?;
    let pages = ntfs.read_runs(window, &stored.runs, 0, 2 * PAGE_BYTES)?;
    if pages.iter().all(|byte| *byte == 0xff) {
        return Ok(()); // as a formatter leaves it
    }
    let mut newest: Option<(u64, bool)> = None;
    for page in pages.chunks_exact(usize::try_from(PAGE_BYTES).unwrap_or_default()) {
        let (sequence, clean) = restart_page(page)?;
        if newest.is_none_or(|(other, _)| sequence >= other) {
            newest = Some((sequence, clean));
        }
    }
    require(newest.is_some_and(|newest| newest.1), "its journal has to be replayed: Windows did not dismount it")
}

/// The sequence number of a restart page, and whether it says that the volume was dismounted.
fn restart_page(page: &[u8]) -> Checked<(u64, bool)> {
    let mut page = page.to_vec();
    if page.starts_with(b"CHKD") {
        return reason("chkdsk has changed its journal, and Windows has not used it since");
    }
    let raw: RawRestartPage = parse(&page, 0)?;
    require(page.starts_with(b"RSTR"), "its journal has no restart page")?;
    require(u64::from(raw.system_page_bytes.get()) == PAGE_BYTES, "the pages of its journal are not of 4096 bytes")?;
    unstamp(&mut page, *b"RSTR")?;
    let (major, minor) = (raw.major.get(), raw.minor.get());
    if major == 2 {
        return reason("Windows keeps some of it in memory across a shutdown (fast startup): shut it down completely");
    }
    if major != 1 || minor > 1 {
        return reason(format!("version {major}.{minor} of its journal is not understood"));
    }
    let area: RawRestartArea = parse(&page, usize::from(raw.area_offset.get()))?;
    let clean = area.clients_in_use.get() == NO_CLIENT || area.flags.get() & VOLUME_CLEAN != 0;
    Ok((area.sequence.get(), clean))
}

/// Looks whether `hiberfil.sys` holds a Windows that sleeps.
fn hibernation(ntfs: &Ntfs, window: &Window<'_>) -> Checked<()> {
    let root = ntfs.record(window, file::ROOT)?;
    let Some(index) = root.find(kind::INDEX_ROOT, "$I30")? else { return reason("its root directory is missing") };
    let mut files = Vec::new();
    entries(index.value()?, INDEX_ROOT_HEAD_OFFSET, &mut files)?;
    if let Some(blocks) = root.find(kind::INDEX_ALLOCATION, "$I30")? {
        let stored = blocks.stored(ntfs.clusters)?;
        let fits = stored.plain && stored.from_start && stored.data_bytes <= ROOT_BYTES_MAX;
        require(fits, "its root directory is too large, or not stored plainly")?;
        for number in 0..stored.data_bytes / INDEX_BYTES {
            let mut block = ntfs.read_runs(window, &stored.runs, number * INDEX_BYTES, INDEX_BYTES)?;
            // A block that is not in use may hold anything; one that is in use and damaged is searched in vain by
            // Windows too.
            if block.starts_with(b"INDX") && unstamp(&mut block, *b"INDX").is_ok() {
                let _ = entries(&block, INDEX_BLOCK_HEAD_OFFSET, &mut files);
            }
        }
    }
    require(files.len() <= HIBERNATION_FILES_MAX, "its root directory is damaged")?;
    for reference in files {
        awake(ntfs, window, reference)?;
    }
    Ok(())
}

/// Collects the files called `hiberfil.sys` among the entries of a node of a directory.
fn entries(node: &[u8], head_offset: usize, files: &mut Vec<u64>) -> Checked<()> {
    const NAME: &str = "hiberfil.sys";
    let head: RawIndexHead = parse(node, head_offset)?;
    let offset = |value: u32| usize::try_from(value).unwrap_or(usize::MAX).saturating_add(head_offset);
    let range = offset(head.entries_offset.get())..offset(head.entries_bytes.get());
    let Some(mut rest) = node.get(range) else { return reason("its root directory is damaged") };
    while !rest.is_empty() {
        let entry: RawIndexEntry = parse(rest, 0)?;
        if entry.flags.get() & ENTRY_LAST != 0 {
            break;
        }
        let length = usize::from(entry.length.get());
        let Some((this, behind)) = rest.split_at_checked(length).filter(|_| length >= size_of::<RawIndexEntry>())
        else {
            return reason("its root directory is damaged");
        };
        rest = behind;
        let key = this.get(size_of::<RawIndexEntry>()..).unwrap_or_default();
        let Ok(name) = parse::<RawFileName>(key, 0) else { continue };
        let units = key.get(size_of::<RawFileName>()..).unwrap_or_default().chunks_exact(2);
        let ascii = units.take(usize::from(name.characters)).map(|unit| match unit {
            [low, 0] => char::from(low.to_ascii_lowercase()),
            _ => char::REPLACEMENT_CHARACTER,
        });
        if ascii.eq(NAME.chars()) {
            files.push(entry.file.get());
        }
    }
    Ok(())
}

/// Refuses a hibernation file that holds a system.
fn awake(ntfs: &Ntfs, window: &Window<'_>, reference: u64) -> Checked<()> {
    let number = reference & ((1 << 48) - 1); // the upper 16 bits are a sequence number
    let record: Record = ntfs.record(window, number)?;
    let Some(data) = record.find(kind::DATA, "")? else { return reason("its hibernation file has no data") };
    let begin = if data.is_elsewhere() {
        let stored = data.stored(ntfs.clusters)?;
        require(stored.from_start && stored.plain, "its hibernation file is not stored plainly")?;
        if stored.runs.is_empty() || stored.initialized_bytes < 4 {
            return Ok(());
        }
        ntfs.read_runs(window, &stored.runs, 0, 4)?
    } else {
        data.value()?.iter().copied().take(4).collect()
    };
    let idle = begin.iter().all(|byte| *byte == 0) || begin.eq_ignore_ascii_case(b"wake");
    require(idle, "a hibernated Windows has it in use: start it and shut it down completely")
}

fn shadow_copies(window: &Window<'_>) -> Checked<()> {
    let raw: RawShadow = window.read_struct(SHADOW_OFFSET)?;
    let none = raw.guid != Guid::from_printed(SHADOW_GUID) || raw.catalog.get() == 0;
    require(none, "it may hold shadow copies, which need clusters that look free")
}
