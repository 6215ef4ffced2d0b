//! The disk that becomes full.

use std::collections::BTreeMap;
use std::ops::Range;

/// What takes space on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Blocks that were written, zeroed or reserved: as on ext4, XFS and most others.
    Sparse,
    /// All of the file's length: as on file systems that know no holes.
    Dense,
}

/// The unit in which the disk gives space away.
const BLOCK: u64 = 4096;

/// A disk with so many bytes left.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) space: Space,
    pub(super) room: u64,
    /// How often there was not enough.
    pub(super) refused: u64,
    pub(super) owned: Blocks,
}

/// Ranges of whole blocks, by their start; they do not touch each other.
#[derive(Debug, Default)]
pub(super) struct Blocks(BTreeMap<u64, u64>);

impl Blocks {
    /// The smallest range of whole blocks around one of bytes.
    pub(super) fn around(range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return range.start..range.start;
        }
        range.start - range.start % BLOCK..range.end.div_ceil(BLOCK).saturating_mul(BLOCK)
    }

    /// The first part of a range that is not in here.
    fn first_missing(&self, range: Range<u64>) -> Option<Range<u64>> {
        let mut start = range.start;
        if let Some((_, &end)) = self.0.range(..=start).next_back() {
            start = start.max(end);
        }
        // What begins behind `start` leaves a gap before it, as ranges do not touch.
        let next = self.0.range(start..).next().map_or(u64::MAX, |(&next, _)| next);
        let missing = start..range.end.min(next);
        (!missing.is_empty()).then_some(missing)
    }

    pub(super) fn insert(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        if range.is_empty() {
            return;
        }
        while let Some((&other_start, &other_end)) = self.0.range(..=end).next_back()
            && other_end >= start
        {
            self.0.remove(&other_start);
            (start, end) = (start.min(other_start), end.max(other_end));
        }
        self.0.insert(start, end);
    }

    /// Takes a range out, and tells how much of it was in here.
    fn remove(&mut self, range: Range<u64>) -> u64 {
        let mut removed = 0;
        while !range.is_empty()
            && let Some((&start, &end)) = self.0.range(..range.end).next_back()
            && end > range.start
        {
            self.0.remove(&start);
            if end > range.end {
                self.0.insert(range.end, end);
            }
            if start < range.start {
                self.0.insert(start, range.start);
            }
            removed += end.min(range.end) - start.max(range.start);
        }
        removed
    }
}

impl Disk {
    /// Gives a range the space that it has not, as far as there is some; tells where that ends.
    pub(super) fn take(&mut self, len: u64, range: &Range<u64>) -> u64 {
        if range.is_empty() {
            return range.end;
        }
        if !self.has_room(len, &(range.start..range.start + 1)) {
            self.refused += 1; // not even the gap before it can be filled
            return range.start;
        }
        let blocks = Blocks::around(&(self.first_filled(len, range)..range.end));
        while let Some(missing) = self.owned.first_missing(blocks.clone()) {
            let available = self.room - self.room % BLOCK;
            let got = missing.start..missing.end.min(missing.start.saturating_add(available));
            self.room -= got.end - got.start;
            self.owned.insert(got.clone());
            if got.end < missing.end {
                self.refused += 1;
                return got.end.clamp(range.start, range.end);
            }
        }
        range.end
    }

    /// Whether a range could have all the space that it has not.
    pub(super) fn has_room(&self, len: u64, range: &Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let mut rest = Blocks::around(&(self.first_filled(len, range)..range.end));
        let mut available = self.room - self.room % BLOCK;
        while let Some(missing) = self.owned.first_missing(rest.clone()) {
            let Some(left) = available.checked_sub(missing.end - missing.start) else { return false };
            available = left;
            rest.start = missing.end;
        }
        true
    }

    /// Where filling has to begin for a range: without holes, at the end of the file.
    fn first_filled(&self, len: u64, range: &Range<u64>) -> u64 {
        if self.space == Space::Dense { range.start.min(len) } else { range.start }
    }

    /// Takes the whole blocks of a range back.
    pub(super) fn give_back(&mut self, range: Range<u64>) {
        let start = range.start.div_ceil(BLOCK).saturating_mul(BLOCK);
        self.room += self.owned.remove(start..range.end - range.end % BLOCK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn ranges_of_blocks_agree_with_a_list_of_blocks() {
        let mut rng = Rng::new(7);
        let (mut blocks, mut model) = (Blocks::default(), [false; 64]);
        for _ in 0..20_000 {
            let start = rng.below(64);
            let end = start + rng.below(65 - start);
            let listed = start as usize..end as usize;
            let missing = listed.clone().find(|&index| !model[index]);
            let found = blocks.first_missing(start..end);
            assert_eq!(found.as_ref().map(|range| range.start as usize), missing);
            if let Some(found) = found {
                let until = (found.start as usize..end as usize).find(|&index| model[index]).unwrap_or(end as usize);
                assert_eq!(found.end as usize, until);
            }
            if rng.below(2) == 0 {
                blocks.insert(start..end);
                model[listed].fill(true);
            } else {
                let wanted = model[listed.clone()].iter().filter(|&&owned| owned).count();
                assert_eq!(blocks.remove(start..end), wanted as u64);
                model[listed].fill(false);
            }
        }
    }
}
