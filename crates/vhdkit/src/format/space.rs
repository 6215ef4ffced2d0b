//! Which parts of a file are taken by the structures that are not blocks.

use std::ops::Range;

/// One taken range, with what it is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenRange {
    /// The range in the file.
    pub range: Range<u64>,
    /// What lies there: `log`, `BAT region`, ...
    pub name: String,
}

/// The header section, the log and all regions, sorted by offset and free of overlaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenSpace {
    ranges: Vec<TakenRange>,
}

impl TakenSpace {
    /// Adds a range. Returns what it overlaps, and adds nothing then.
    pub fn add(&mut self, range: Range<u64>, name: &str) -> Option<&TakenRange> {
        let at = self.ranges.partition_point(|taken| taken.range.end <= range.start);
        // The borrow checker wants the question asked twice.
        if self.ranges.get(at).is_some_and(|taken| taken.range.start < range.end) && !range.is_empty() {
            return self.ranges.get(at);
        }
        if !range.is_empty() {
            self.ranges.insert(at, TakenRange { range, name: name.to_owned() });
        }
        None
    }

    /// The first taken range that shares a byte with `range`.
    #[must_use]
    pub fn overlap(&self, range: &Range<u64>) -> Option<&TakenRange> {
        let at = self.ranges.partition_point(|taken| taken.range.end <= range.start);
        self.ranges.get(at).filter(|taken| taken.range.start < range.end)
    }

    /// All taken ranges, in the order of the file.
    #[must_use]
    pub fn ranges(&self) -> &[TakenRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_found_at_both_ends() {
        let mut space = TakenSpace::default();
        assert_eq!(space.add(10..20, "a"), None);
        assert_eq!(space.add(30..40, "b"), None);
        assert_eq!(space.add(20..30, "between"), None);
        for bad in [19..21, 0..11, 35..36, 0..100] {
            assert!(space.add(bad.clone(), "bad").is_some(), "{bad:?}");
            assert!(space.overlap(&bad).is_some(), "{bad:?}");
        }
        assert_eq!(space.overlap(&(0..10)), None);
        assert_eq!(space.overlap(&(40..50)), None);
        assert_eq!(space.ranges().len(), 3);
    }
}
