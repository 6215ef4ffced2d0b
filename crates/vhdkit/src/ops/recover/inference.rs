//! The block size of a file without a table and without metadata, by structures of the disk that say where they belong.
//!
//! Writers put blocks one behind the other, so that the distance of any two of them in the file is a multiple of the block
//! size. A structure at a known offset of the disk tells where in the file its block begins, for any size that is assumed;
//! the largest size at which all of these fit is the likely one.

use std::collections::BTreeSet;
use std::ops::Range;

use super::report::Certainty;
use super::signatures::{self, Says, Sign};
use crate::error::Result;
use crate::format::HEADER_SECTION_BYTES;
use crate::format::geometry::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN};
use crate::image::view::View;
use crate::ops::Progress;
use crate::units::MIB;

/// Stretches of the disk, each moved in the file by another distance, that must agree. Each of them but the first lies well for
/// twice the right size by chance every other time.
const STRETCHES_MIN: usize = 7;
/// How much of the beginning of the disk is read for its partitions.
const DISK_HEAD_BYTES: u64 = 64 << 10;

/// What the structures of the disk show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ByContents {
    /// A structure says where on the disk it is.
    pub(super) any: bool,
    /// The block size at which all of them lie in blocks.
    pub(super) block_size: Option<u32>,
    /// The size of the disk, and what it is by: a GPT, or a file system on the whole disk.
    pub(super) disk_size: Option<(u64, Certainty, &'static str)>,
}

/// Looks for structures that say where on the disk they are, in all of a file but what is known to be something else.
pub(super) fn by_contents(view: &View, taken: &[Range<u64>], progress: &dyn Progress) -> Result<ByContents> {
    let is_taken = |start: u64| taken.iter().any(|range| range.contains(&start));
    let signs = signatures::scan(view, HEADER_SECTION_BYTES..view.size(), &is_taken, progress)?;
    let anchors = anchors(view, &signs)?;
    Ok(ByContents { any: !anchors.is_empty(), block_size: block_size(&anchors), disk_size: disk_size(&signs) })
}

/// The size that the largest thing says that begins where a disk begins. A disk inside a file of the guest is smaller.
fn disk_size(signs: &[(u64, Sign)]) -> Option<(u64, Certainty, &'static str)> {
    let backup = signs.iter().filter_map(|(_, sign)| match sign.says {
        Says::OnDisk { disk_size, what, .. } => Some((disk_size, what)),
        _ => None,
    });
    let begin = signatures::disk_start(signs, u64::MAX).map(|start| (start.disk_size, start.what));
    let (size, what) = begin.into_iter().chain(backup).max_by_key(|(size, _)| *size)?;
    Some((size, Certainty::Guessed, what))
}

/// Places of the file with the places of the disk that they belong to.
fn anchors(view: &View, signs: &[(u64, Sign)]) -> Result<Vec<(u64, u64)>> {
    let mut anchors = Vec::new();
    for (start, sign) in signs {
        match sign.says {
            Says::OnDisk { guest, .. } | Says::PartitionStart { guest, .. } => anchors.push((start + sign.at, guest)),
            Says::InFileSystem { .. } => {}
        }
    }
    let disk_start = signatures::disk_start(signs, u64::MAX).filter(|start| start.is_table).map(|start| start.file);
    let partitions = match disk_start {
        Some(start) => {
            let end = start.saturating_add(DISK_HEAD_BYTES).min(view.size());
            signatures::partitions(&view.read_vec(start..end)?)
        }
        None => Vec::new(),
    };
    for (start, sign) in signs {
        let Says::InFileSystem { offset, size, .. } = sign.says else { continue };
        let fits = partitions.iter().filter(|(begin, end)| end.saturating_sub(*begin) >= size);
        let best = fits.min_by_key(|(begin, end)| end - begin - size).map(|(begin, _)| *begin);
        let begin = best.or(partitions.is_empty().then_some(0));
        anchors.extend(begin.and_then(|begin| begin.checked_add(offset)).map(|guest| (start + sign.at, guest)));
    }
    Ok(anchors)
}

/// The largest block size at which every anchor lies in a block, and all blocks lie a multiple of it apart.
fn block_size(anchors: &[(u64, u64)]) -> Option<u32> {
    let stretches: BTreeSet<u64> = anchors.iter().map(|(file, guest)| file.wrapping_sub(*guest)).collect();
    if stretches.len() < STRETCHES_MIN {
        return None;
    }
    let mut size = BLOCK_SIZE_MAX;
    while size > BLOCK_SIZE_MIN {
        let block = u64::from(size);
        // Where the block of the first one begins; the file may begin with something else in the middle of a MiB-grid.
        let starts: Option<Vec<u64>> = anchors.iter().map(|(file, guest)| file.checked_sub(guest % block)).collect();
        let fits = |starts: &[u64]| {
            let first = starts.first().copied().unwrap_or_default();
            starts.iter().all(|start| start % block == first % block && *start >= HEADER_SECTION_BYTES)
                && first.is_multiple_of(MIB)
        };
        // One place holds one block.
        let pairs = starts.iter().flatten().zip(anchors).map(|(start, (_, guest))| (*start, guest / block));
        let pairs: BTreeSet<(u64, u64)> = pairs.collect();
        let alone = pairs.iter().zip(pairs.iter().skip(1)).all(|(one, other)| one.0 != other.0);
        if alone && starts.is_some_and(|starts| fits(&starts)) {
            return Some(size);
        }
        size /= 2;
    }
    Some(BLOCK_SIZE_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of a size from 5 MiB on, in this order, each with a structure at an offset.
    fn placed(block: u64, blocks: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let one =
            |(number, (index, offset)): (u64, &(u64, u64))| (5 * MIB + number * block + offset, index * block + offset);
        (0..).zip(blocks).map(one).collect()
    }

    #[test]
    fn the_largest_size_that_fits_is_found() {
        let sparse = [(0, 0), (3, MIB), (4, 0), (9, 0), (17, MIB), (40, 0), (51, MIB), (60, 0), (72, MIB)];
        for size in [2 * MIB, 8 * MIB, 32 * MIB, 256 * MIB] {
            assert_eq!(block_size(&placed(size, &sparse)), u32::try_from(size).ok());
        }
        let in_small_ones: Vec<(u64, u64)> = [0, 5, 6, 19, 70, 81, 94, 102, 110].map(|index| (index, 0)).to_vec();
        assert_eq!(block_size(&placed(MIB, &in_small_ones)), u32::try_from(MIB).ok());
    }

    #[test]
    fn what_lies_side_by_side_shows_no_size() {
        assert_eq!(block_size(&placed(MIB, &[(0, 0), (1, 0), (2, 0), (3, 0)])), None);
        assert_eq!(block_size(&[]), None);
    }
}
