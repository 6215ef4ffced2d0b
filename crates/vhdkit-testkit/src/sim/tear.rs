//! Which sectors of an operation a power cut leaves.

use std::fmt;
use std::str::FromStr;

use crate::rng::mix;

/// The sectors of an operation that reached the medium, counted from its first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tear {
    /// All of them.
    Whole,
    /// The first so many.
    Prefix(u64),
    /// The last so many.
    Suffix(u64),
    /// This one alone.
    Only(u64),
    /// All but this one.
    Without(u64),
    /// Each one or not, by a seed: about half of them, an eighth, or seven eighths.
    Random(u64),
}

impl Tear {
    /// Whether a sector of so many was written.
    #[must_use]
    pub fn keeps(&self, sector: u64, count: u64) -> bool {
        match *self {
            Self::Whole => true,
            Self::Prefix(kept) => sector < kept,
            Self::Suffix(kept) => sector + kept >= count,
            Self::Only(only) => sector == only,
            Self::Without(lost) => sector != lost,
            Self::Random(seed) => {
                let threshold = [4, 4, 1, 7][(seed % 4) as usize];
                mix(seed ^ mix(sector.wrapping_add(0x7EA2))) % 8 < threshold
            }
        }
    }

    /// The ways in which an operation of so many sectors may be torn: for up to eight sectors every prefix, every suffix,
    /// each sector lost, and each sector alone; for more, those at the edges, in the middle and at pages.
    #[must_use]
    pub fn variants(count: u64) -> Vec<Self> {
        let cuts: Vec<u64> = if count <= 8 {
            (1..count).collect()
        } else {
            let mut cuts = vec![1, 2, 7, 8, count / 2, count / 2 / 8 * 8, count - 8, count - 1];
            cuts.retain(|cut| (1..count).contains(cut));
            cuts.sort_unstable();
            cuts.dedup();
            cuts
        };
        let mut variants = Vec::new();
        variants.extend(cuts.iter().map(|&cut| Self::Prefix(cut)));
        variants.extend(cuts.iter().map(|&cut| Self::Suffix(count - cut)));
        // The first and the last sector alone, or lost, are prefixes and suffixes.
        let middle = cuts.iter().copied().filter(|&cut| cut + 1 < count);
        variants.extend(middle.clone().map(Self::Only));
        variants.extend(middle.map(Self::Without));
        variants
    }
}

impl fmt::Display for Tear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => write!(f, "w"),
            Self::Prefix(count) => write!(f, "p{count:x}"),
            Self::Suffix(count) => write!(f, "s{count:x}"),
            Self::Only(sector) => write!(f, "o{sector:x}"),
            Self::Without(sector) => write!(f, "x{sector:x}"),
            Self::Random(seed) => write!(f, "r{seed:x}"),
        }
    }
}

impl FromStr for Tear {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a tear (w, pN, sN, oN, xN or rN, N in hex)");
        let (letter, number) = text.split_at_checked(1).ok_or_else(wrong)?;
        let number = || u64::from_str_radix(number, 16).map_err(|_| wrong());
        match letter {
            "w" if text.len() == 1 => Ok(Self::Whole),
            "p" => Ok(Self::Prefix(number()?)),
            "s" => Ok(Self::Suffix(number()?)),
            "o" => Ok(Self::Only(number()?)),
            "x" => Ok(Self::Without(number()?)),
            "r" => Ok(Self::Random(number()?)),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn mask(tear: Tear, count: u64) -> u64 {
        (0..count).filter(|&sector| tear.keeps(sector, count)).fold(0, |mask, sector| mask | 1 << sector)
    }

    #[test]
    fn variants_of_a_page_are_all_distinct_and_never_whole_or_nothing() {
        let masks: Vec<u64> = Tear::variants(8).into_iter().map(|tear| mask(tear, 8)).collect();
        let distinct: BTreeSet<u64> = masks.iter().copied().collect();
        // Seven prefixes, seven suffixes, and six inner sectors, lost and alone.
        assert_eq!((masks.len(), distinct.len()), (26, 26));
        assert!(!distinct.contains(&0) && !distinct.contains(&0xFF));
        for sector in 0..8 {
            assert!(distinct.contains(&(1 << sector)) && distinct.contains(&(0xFF ^ 1 << sector)), "{sector}");
        }
        assert_eq!(Tear::variants(1), []);
        let two: BTreeSet<u64> = Tear::variants(2).into_iter().map(|tear| mask(tear, 2)).collect();
        assert_eq!(two, BTreeSet::from([1, 2]));
    }

    #[test]
    fn texts_come_back() {
        let random = [Tear::Random(0xFEDC_BA98_7654_3210), Tear::Whole];
        for tear in Tear::variants(2048).into_iter().chain(random) {
            assert_eq!(tear.to_string().parse(), Ok(tear));
        }
        assert!("q1".parse::<Tear>().is_err() && "".parse::<Tear>().is_err() && "p".parse::<Tear>().is_err());
    }
}
