//! Free space in the file: which MiB belong to nothing, and whether they are zero for certain.
//!
//! ```text
//! 0            zero_from          end
//! |owned, stale ... | grown by us, never given out: zero |
//! ```
//!
//! Space is zero only if this session grew it and nobody was ever given it. All other free space is stale: it may hold
//! anything, and whoever gets it for a part of a block zeroes the rest.

use std::ops::Range;

use super::scan::Marks;
use crate::units::MIB;

/// What free space holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Zeros.
    Zero,
    /// Anything.
    Stale,
}

/// Space that was given out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) range: Range<u64>,
    pub(crate) holds: Holds,
}

/// The free space of a file, in MiB.
#[derive(Debug)]
pub(crate) struct Space {
    owned: Marks,
    /// Whole MiB of the file.
    end: u64,
    /// From here on the file is zero and free.
    zero_from: u64,
    /// No free run of a block, and none of one MiB, begins before these.
    hints: [u64; 2],
    block: u64,
    /// End of the highest MiB that was ever owned: what [MS-VHDX] 2.3.1.1 calls the last file offset.
    high: u64,
    /// True once the file was made longer, or something was made free.
    moved: bool,
}

impl Space {
    /// The space of a file of `file_size` bytes in which `owned` is taken.
    pub(crate) fn new(owned: Marks, file_size: u64, block_size: u64) -> Self {
        let end = file_size / MIB;
        let high = owned.end();
        // What a last MiB that is cut short holds is not known when it is filled up.
        let zero_from = file_size.div_ceil(MIB).max(high);
        Self { owned, end, zero_from, hints: [0; 2], block: block_size / MIB, high, moved: false }
    }

    /// Takes so many bytes (a block, or one MiB): the lowest stale space that is large enough, else zero space.
    pub(crate) fn take(&mut self, bytes: u64) -> Option<Given> {
        let length = bytes / MIB;
        let which = usize::from(length != self.block);
        let hint = self.hints.get(which).copied().unwrap_or_default();
        match self.owned.find_free(hint, self.zero_from.min(self.end), length) {
            Some(start) => {
                self.set_hint(which, start + length);
                Some(self.give(start, length, Holds::Stale))
            }
            None => {
                self.set_hint(which, self.zero_from.min(self.end).saturating_sub(length - 1));
                let start = self.zero_from;
                if self.end < start + length {
                    return None;
                }
                self.zero_from = start + length;
                Some(self.give(start, length, Holds::Zero))
            }
        }
    }

    /// Takes so many bytes in one piece, of any length: the lowest there are, also where the file has not grown beyond.
    /// With `before`, only what ends at or before that file offset.
    pub(crate) fn take_run(&mut self, bytes: u64, before: Option<u64>) -> Option<Given> {
        let length = bytes.div_ceil(MIB);
        let limit = before.map_or(self.end, |before| (before / MIB).min(self.end));
        let stale_end = self.zero_from.min(limit);
        if let Some(start) = self.owned.find_free(0, stale_end, length) {
            return Some(self.give(start, length, Holds::Stale));
        }
        let start = self.zero_from;
        if start + length > limit {
            return None;
        }
        self.zero_from = start + length;
        Some(self.give(start, length, Holds::Zero))
    }

    /// Whether so many bytes are free in one piece that ends at or before a file offset.
    pub(crate) fn has_run(&self, bytes: u64, before: u64) -> bool {
        let length = bytes.div_ceil(MIB);
        let limit = (before / MIB).min(self.end);
        self.owned.find_free(0, self.zero_from.min(limit), length).is_some() || self.zero_from + length <= limit
    }

    /// Where the last owned MiB below a file offset ends.
    pub(crate) fn used_end_below(&self, offset: u64) -> u64 {
        self.owned.end_below(offset / MIB) * MIB
    }

    /// How long the file has to be, in bytes, so that so many more can be taken at its end; `None` when it is that long.
    pub(crate) fn end_wanted(&self, bytes: u64) -> Option<u64> {
        let end = self.zero_from + bytes.div_ceil(MIB); // files end below 2^63
        (end > self.end).then_some(end * MIB)
    }

    fn set_hint(&mut self, which: usize, value: u64) {
        if let Some(hint) = self.hints.get_mut(which) {
            *hint = value;
        }
    }

    fn give(&mut self, start: u64, length: u64, holds: Holds) -> Given {
        self.owned.mark(start * MIB, (start + length) * MIB);
        self.high = self.high.max(start + length);
        Given { range: start * MIB..(start + length) * MIB, holds }
    }

    /// Makes space free again; it counts as stale.
    pub(crate) fn give_back(&mut self, range: &Range<u64>) {
        self.owned.clear(range.start, range.end);
        self.moved = true;
        let start = range.start / MIB;
        for (hint, length) in self.hints.iter_mut().zip([self.block, 1]) {
            *hint = (*hint).min((start + 1).saturating_sub(length));
        }
    }

    /// The file has grown; `zero` when what was added reads as zero.
    pub(crate) fn grown(&mut self, file_size: u64, zero: bool) {
        let end = file_size / MIB;
        if end > self.end {
            if !zero {
                self.zero_from = end;
            }
            self.end = end;
            self.moved = true;
        }
    }

    /// True once the file was made longer, or something was made free.
    pub(crate) fn has_moved(&self) -> bool {
        self.moved
    }

    /// True when so many bytes can be taken without making the file longer.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        let length = bytes / MIB;
        let hint = self.hints.get(usize::from(length != self.block)).copied().unwrap_or_default();
        self.end >= self.zero_from + length
            || self.owned.find_free(hint, self.zero_from.min(self.end), length).is_some()
    }

    /// The file was cut.
    pub(crate) fn cut(&mut self, file_size: u64) {
        self.end = file_size / MIB;
        self.zero_from = self.zero_from.min(self.end);
        self.high = self.owned.end();
    }

    /// Where the last owned MiB ends, in bytes.
    pub(crate) fn used_end(&self) -> u64 {
        self.owned.end() * MIB
    }

    /// The end of everything that was ever owned, in bytes.
    pub(crate) fn high(&self) -> u64 {
        self.high * MIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(end: u64, owned: &[Range<u64>], block: u64) -> Space {
        let mut marks = Marks::new(end * MIB).unwrap();
        for range in owned {
            marks.mark(range.start * MIB, range.end * MIB);
        }
        Space::new(marks, end * MIB, block * MIB)
    }

    fn taken(given: Option<Given>) -> Option<(u64, Holds)> {
        given.map(|given| (given.range.start / MIB, given.holds))
    }

    #[test]
    fn the_lowest_hole_that_is_large_enough_comes_first() {
        let mut space = space(12, &[0..4, 5..6, 9..10], 2);
        assert_eq!(taken(space.take(2 * MIB)), Some((6, Holds::Stale)));
        assert_eq!(taken(space.take(MIB)), Some((4, Holds::Stale)));
        assert_eq!(taken(space.take(2 * MIB)), Some((10, Holds::Stale)));
        assert_eq!(taken(space.take(2 * MIB)), None);
        assert_eq!(taken(space.take(MIB)), Some((8, Holds::Stale)));
        assert_eq!(taken(space.take(MIB)), None);
        space.grown(16 * MIB, true);
        assert_eq!(taken(space.take(2 * MIB)), Some((12, Holds::Zero)));
        space.give_back(&(12 * MIB..14 * MIB));
        assert_eq!(taken(space.take(MIB)), Some((12, Holds::Stale)), "given back is stale");
        assert_eq!(taken(space.take(2 * MIB)), Some((14, Holds::Zero)));
        assert_eq!(space.used_end(), 16 * MIB);
        space.give_back(&(14 * MIB..16 * MIB));
        space.give_back(&(6 * MIB..8 * MIB));
        assert_eq!(space.used_end(), 13 * MIB);
        assert_eq!(space.high(), 16 * MIB);
        space.cut(13 * MIB);
        assert_eq!(space.high(), 13 * MIB);
        assert_eq!(taken(space.take(2 * MIB)), Some((6, Holds::Stale)));
        assert_eq!(taken(space.take(2 * MIB)), None);
        space.grown(17 * MIB, false);
        assert_eq!(taken(space.take(2 * MIB)), Some((13, Holds::Stale)), "growth that is not zero is stale");
    }

    /// Random takes and gives beside a list of booleans.
    #[test]
    fn agrees_with_a_list() {
        let mut random = 88_172_645_463_325_252_u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut space = space(300, std::slice::from_ref(&(0..4)), 4);
        let mut owned = vec![false; 300];
        owned[..4].fill(true);
        let mut given: Vec<Range<u64>> = Vec::new();
        for _ in 0..5000 {
            if next(3) == 0 && !given.is_empty() {
                let range = given.swap_remove(usize::try_from(next(given.len() as u64)).unwrap());
                space.give_back(&range);
                for mib in range.start / MIB..range.end / MIB {
                    owned[usize::try_from(mib).unwrap()] = false;
                }
            } else {
                let length = if next(2) == 0 { 4 } else { 1 };
                let free = |start: usize| owned[start..start + length].iter().all(|owned| !owned);
                let expected = (0..=300 - length).find(|start| free(*start));
                let got = space.take(length as u64 * MIB);
                assert_eq!(got.as_ref().map(|given| usize::try_from(given.range.start / MIB).unwrap()), expected);
                if let Some(got) = got {
                    let start = usize::try_from(got.range.start / MIB).unwrap();
                    owned[start..start + length].fill(true);
                    given.push(got.range);
                }
            }
            let end = owned.iter().rposition(|owned| *owned).unwrap() + 1;
            assert_eq!(space.used_end(), end as u64 * MIB);
        }
    }
}
