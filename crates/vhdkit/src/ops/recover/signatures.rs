//! Structures of partition tables and file systems that say where on the disk they are.
//!
//! | What | Where it says so | Checked by |
//! |---|---|---|
//! | GPT header, primary and backup | its own block number | CRC-32 |
//! | MBR with partitions | that it is the beginning | partitions that can be |
//! | ext2/3/4 superblock and its copies | number of the block group, blocks in a group | CRC-32C where the file system has it |
//! | XFS superblock of each allocation group, with the header behind it | number of the group, blocks in a group | CRC-32C (version 5) |
//! | NTFS, FAT, exFAT boot sector | sectors before the partition | the signature alone |
//!
//! Only what lies at the beginning of a MiB, or at its end, is looked at: partitions and groups begin there, disks end there.
//! Sources: UEFI specification 5.3; ext4 and XFS on-disk format as the Linux kernel documents them; ECMA-107 and the boot
//! sectors that Windows documents.

use std::ops::Range;

use crate::error::Result;
use crate::format::checksum::append;
use crate::image::view::View;
use crate::ops::{Progress, advance};
use crate::units::MIB;

/// How much of a MiB is looked at, at its beginning and at its end.
pub(super) const HEAD_BYTES: usize = 8192;

/// Structures that are kept: no disk has more block groups that say where they are and are worth it.
pub(super) const SIGNS_MAX: usize = 4096;

/// A structure that says where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sign {
    /// Where it begins, from the beginning of what was looked at.
    pub(super) at: u64,
    pub(super) says: Says,
    /// Its checksum is right; a signature alone may be a coincidence, or part of an image inside the disk.
    pub(super) checked: bool,
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Says {
    /// It lies at this offset of the disk, which has so many bytes.
    OnDisk { guest: u64, disk_size: u64, what: &'static str },
    /// It lies at this offset of a file system, which is known by its identity and has so many bytes.
    InFileSystem { identity: [u8; 16], offset: u64, size: u64, what: &'static str },
    /// The partition begins here, so many bytes behind the beginning of the disk, and has so many bytes.
    PartitionStart { guest: u64, size: u64, what: &'static str },
}

fn le16(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes).map(u64::from)
}

fn le32(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes).map(u64::from)
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// XFS has its numbers the other way round.
fn be32(bytes: &[u8], at: usize) -> Option<u64> {
    let swapped = bytes.get(at..at + 4)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    Some(swapped)
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(be32(bytes, at)? << 32 | be32(bytes, at + 4)?)
}

fn identity(bytes: &[u8], at: usize) -> Option<[u8; 16]> {
    bytes.get(at..at + 16)?.try_into().ok()
}

/// CRC-32 of Ethernet, as GPT has it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

/// Everything in a range of whole MiB, each with the beginning of its MiB; `is_taken` says which of them are something else.
pub(super) fn scan(
    view: &View,
    range: Range<u64>,
    is_taken: &dyn Fn(u64) -> bool,
    progress: &dyn Progress,
) -> Result<Vec<(u64, Sign)>> {
    let size = view.size();
    let mut signs = Vec::new();
    let mut start = range.start;
    while start < range.end && signs.len() < SIGNS_MAX {
        advance(progress, start, Some(size))?;
        let Some(data) = view.next_data(start..range.end)? else { break };
        start = data.start - data.start % MIB;
        let end = (start + MIB).min(size);
        if !is_taken(start) {
            let head = view.read_vec(start..end.min(start + HEAD_BYTES as u64))?;
            let tail = view.read_vec(end.saturating_sub(HEAD_BYTES as u64).max(start)..end)?;
            signs.extend(find(&head, &tail, end - start).into_iter().map(|sign| (start, sign)));
        }
        start += MIB;
    }
    signs.truncate(SIGNS_MAX);
    Ok(signs)
}

/// What lies at the beginning of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DiskStart {
    /// Where that is in the file.
    pub(super) file: u64,
    pub(super) disk_size: u64,
    /// A partition table, and not a file system.
    pub(super) is_table: bool,
    pub(super) what: &'static str,
}

/// Of everything that says it lies at the beginning of a disk the one with the largest disk that is not larger than a limit: a
/// guest may keep images of smaller disks in its files.
pub(super) fn disk_start(signs: &[(u64, Sign)], limit: u64) -> Option<DiskStart> {
    let starts = signs.iter().filter_map(|(start, sign)| {
        let (guest, disk_size, is_table, what) = match sign.says {
            Says::OnDisk { guest, disk_size, what } if guest < MIB => (guest, disk_size, true, what),
            Says::InFileSystem { offset: guest @ 0..=1024, size, what, .. } => (guest, size, false, what),
            Says::PartitionStart { guest: 0, size, what } => (0, size, false, what),
            _ => return None,
        };
        let file = (start + sign.at).checked_sub(guest)?;
        Some(DiskStart { file, disk_size, is_table, what })
    });
    starts.filter(|start| start.disk_size <= limit).max_by_key(|start| (start.disk_size, start.is_table))
}

/// Everything in the first and last [`HEAD_BYTES`] of a MiB, which has `length` bytes.
pub(super) fn find(head: &[u8], tail: &[u8], length: u64) -> Vec<Sign> {
    let mut found: Vec<Sign> = Vec::new();
    for sector in [512, 4096] {
        found.extend(gpt(head, sector, sector as u64));
        let start = tail.len().checked_sub(sector);
        let at = length.saturating_sub(sector as u64);
        found.extend(start.and_then(|start| gpt_header(tail.get(start..)?, sector as u64, at)));
    }
    found.extend(ext(head, 0));
    found.extend(ext(head, 1024));
    found.extend(xfs(head));
    found.extend(boot_sector(head));
    found.extend(master_boot_record(head));
    found
}

/// A master boot record with partitions, which lies at the beginning of a disk that reaches to the end of the last one at
/// least. One that only protects a GPT says nothing, nor does a boot sector that is also one of a file system.
fn master_boot_record(head: &[u8]) -> Option<Sign> {
    if le16(head, 510)? != 0xaa55 || boot_sector(head).is_some() || head.get(512..520)? == b"EFI PART" {
        return None;
    }
    let mut ends = Vec::new();
    for index in 0..4 {
        let entry = head.get(446 + index * 16..462 + index * 16)?;
        let (status, kind, first, count) = (*entry.first()?, *entry.get(4)?, le32(entry, 8)?, le32(entry, 12)?);
        match (kind, status) {
            (0, _) => {}
            (0xee, _) => return None,
            (_, 0 | 0x80) if first > 0 && count > 0 => ends.push((first, first + count)), // 32-bit numbers
            _ => return None,
        }
    }
    ends.sort_unstable();
    let overlap = ends.windows(2).any(|pair| pair.first().zip(pair.last()).is_some_and(|(one, next)| one.1 > next.0));
    let size = ends.last()?.1 * 512;
    (!overlap).then_some(Sign { at: 0, says: Says::OnDisk { guest: 0, disk_size: size, what: "MBR" }, checked: false })
}

/// The primary GPT header, one sector behind the beginning of the disk.
fn gpt(head: &[u8], at: usize, sector: u64) -> Option<Sign> {
    gpt_header(head.get(at..)?, sector, at as u64)
}

fn gpt_header(bytes: &[u8], sector: u64, at: u64) -> Option<Sign> {
    let length = usize::try_from(le32(bytes, 12)?).ok().filter(|length| (92..=512).contains(length))?;
    if bytes.get(..8)? != b"EFI PART" {
        return None;
    }
    let mut header = bytes.get(..length)?.to_vec();
    let stored = le32(&header, 16)?;
    header.get_mut(16..20)?.fill(0);
    let (here, other) = (le64(bytes, 24)?, le64(bytes, 32)?);
    let last = here.max(other);
    let disk_size = last.checked_add(1)?.checked_mul(sector)?;
    let what = if here < other { "GPT" } else { "backup GPT" };
    let checked = u64::from(crc32(&header)) == stored;
    checked.then_some(())?;
    Some(Sign { at, says: Says::OnDisk { guest: here.checked_mul(sector)?, disk_size, what }, checked })
}

fn ext(head: &[u8], at: usize) -> Option<Sign> {
    let raw = head.get(at..at + 1024)?;
    if le16(raw, 56)? != 0xef53 {
        return None;
    }
    let (log_block, per_group) = (le32(raw, 24)?, le32(raw, 32)?);
    if log_block > 6 || per_group == 0 || per_group > 65528 * 8 {
        return None;
    }
    let block = 1024_u64 << log_block;
    let features = (le32(raw, 96)?, le32(raw, 100)?);
    let high = if features.0 & 0x80 != 0 { le32(raw, 336)? } else { 0 };
    let blocks = high << 32 | le32(raw, 4)?;
    let group = le16(raw, 90)?;
    let first_block = le32(raw, 20)?;
    let start = group.checked_mul(per_group)?.checked_add(first_block)?.checked_mul(block)?;
    // The first one lies at 1024 whatever the block size is.
    let offset = if group == 0 { 1024 } else { start };
    if (group == 0) != (at == 1024) && block != 1024 {
        return None;
    }
    let has_sum = features.1 & 0x400 != 0;
    // ext4 keeps the sum without the final inversion.
    let checked = has_sum && u64::from(!append(0, raw.get(..1020)?)) == le32(raw, 1020)?;
    if has_sum && !checked {
        return None;
    }
    let size = blocks.checked_mul(block)?;
    if size == 0 || offset >= size {
        return None;
    }
    let says = Says::InFileSystem { identity: identity(raw, 104)?, offset, size, what: "ext" };
    Some(Sign { at: at as u64, says, checked })
}

fn xfs(head: &[u8]) -> Option<Sign> {
    if head.get(..4)? != b"XFSB" {
        return None;
    }
    let (block, blocks) = (be32(head, 4)?, be64(head, 8)?);
    let (group_blocks, version, sector) = (be32(head, 84)?, be16(head, 100)? & 0xf, be16(head, 102)?);
    let sector = usize::try_from(sector).ok().filter(|sector| matches!(sector, 512 | 1024 | 2048 | 4096))?;
    let header = head.get(sector..)?;
    if header.get(..4)? != b"XAGF" || !block.is_power_of_two() || block > 65536 {
        return None;
    }
    let group = be32(header, 8)?;
    let checked = version == 5 && {
        let mut raw = head.get(..sector)?.to_vec();
        let stored = le32(&raw, 224)?;
        raw.get_mut(224..228)?.fill(0);
        u64::from(append(0, &raw)) == stored
    };
    if version == 5 && !checked {
        return None;
    }
    let offset = group.checked_mul(group_blocks)?.checked_mul(block)?;
    let size = blocks.checked_mul(block)?;
    if offset >= size {
        return None;
    }
    let says = Says::InFileSystem { identity: identity(head, 32)?, offset, size, what: "XFS" };
    Some(Sign { at: 0, says, checked })
}

fn be16(bytes: &[u8], at: usize) -> Option<u64> {
    Some(bytes.get(at..at + 2)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn boot_sector(head: &[u8]) -> Option<Sign> {
    if le16(head, 510)? != 0xaa55 {
        return None;
    }
    let sector = le16(head, 11)?;
    let hidden = le32(head, 28)?;
    let known_sector = matches!(sector, 512 | 4096);
    let (guest, size, what) = match (head.get(3..11)?, head.get(82..87)?) {
        (b"NTFS    ", _) if known_sector => {
            (hidden * sector, le64(head, 40)?.checked_add(1)?.checked_mul(sector)?, "NTFS")
        }
        (b"EXFAT   ", _) => {
            let shift = u32::from(*head.get(108)?);
            let sector = 1_u64.checked_shl(shift).filter(|sector| matches!(sector, 512..=4096))?;
            (le64(head, 64)?.checked_mul(sector)?, le64(head, 72)?.checked_mul(sector)?, "exFAT")
        }
        (_, b"FAT32") if known_sector => (hidden * sector, le32(head, 32)? * sector, "FAT32"),
        _ => return None,
    };
    (size > 0).then_some(Sign { at: 0, says: Says::PartitionStart { guest, size, what }, checked: false })
}

/// Where partitions begin and end, from the MBR or GPT at the beginning of a disk, in bytes.
pub(super) fn partitions(start: &[u8]) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for sector in [512_usize, 4096] {
        let Some(header) = start.get(sector..).filter(|header| gpt_header(header, sector as u64, 0).is_some()) else {
            continue;
        };
        let (Some(first), Some(count), Some(size)) = (le64(header, 72), le32(header, 80), le32(header, 84)) else {
            continue;
        };
        let Some(table) = usize::try_from(first).ok().and_then(|first| start.get(first.checked_mul(sector)?..)) else {
            continue;
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX).max(128);
        for entry in table.chunks_exact(size).take(usize::try_from(count.min(128)).unwrap_or(0)) {
            let used = entry.get(..16).is_some_and(|kind| kind.iter().any(|byte| *byte != 0));
            if let (true, Some(first), Some(last)) = (used, le64(entry, 32), le64(entry, 40)) {
                let end = last.saturating_add(1).saturating_mul(sector as u64);
                found.push((first.saturating_mul(sector as u64), end));
            }
        }
        return found;
    }
    if le16(start, 510) == Some(0xaa55) {
        for index in 0..4 {
            let Some(entry) = start.get(446 + index * 16..462 + index * 16) else { continue };
            let (kind, first, count) = (entry.get(4).copied().unwrap_or(0), le32(entry, 8), le32(entry, 12));
            if let (1.., Some(first @ 1..), Some(count @ 1..)) = (kind, first, count) {
                found.push((first * 512, (first + count) * 512)); // 32-bit numbers
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_gpt() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn nothing_is_found_in_nothing() {
        assert_eq!(find(&[0; HEAD_BYTES], &[0; HEAD_BYTES], 1 << 20), Vec::new());
        assert_eq!(find(&[0xff; HEAD_BYTES], &[0xff; HEAD_BYTES], 1 << 20), Vec::new());
        assert_eq!(find(&[], &[], 0), Vec::new());
        assert_eq!(partitions(&[]), Vec::new());
    }
}
