//! What a power cut may leave of the operations since the last sync.
//!
//! ```text
//! durable image + pending operations --State { which, how torn, in which order, length }--> image
//! ```
//!
//! The rules are those of `docs/format.md`: any subset of the operations, in any order, each torn at 512 bytes. The
//! length is one that the file had since the last sync, or lies inside a write that made it grow, whatever of the
//! writes was kept: what lies past it is cut off.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::operation::{OpKind, Operation};
use super::pages::{PAGE_BYTES, PageMap};
use super::tear::Tear;
use crate::rng::Rng;

/// Lengths up to which all are combined with all subsets.
const LENGTHS_MAX: usize = 4;
/// Operations up to which each torn one is combined with all subsets of the others.
const TORN_CONTEXT_OPS_MAX: usize = 4;

/// A moment at which the power may be cut: what is durable, and what is on its way.
#[derive(Clone, Debug)]
pub struct CrashPoint {
    id: u64,
    durable: PageMap,
    pending: Vec<Arc<Operation>>,
}

/// One thing that a power cut leaves; its text says all of it, and can be parsed.
///
/// ```
/// use vhdkit_testkit::sim::State;
///
/// let text = "point 41 length 0x500000 ops 0:w 3:p2 1:r1f";
/// let state: State = text.parse()?;
/// assert_eq!(state.to_string(), text);
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    point: u64,
    length: u64,
    /// Numbers of pending operations, and what is left of them, in the order in which they reached the medium.
    pieces: Vec<(usize, Tear)>,
}

/// How many states are taken of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Up to so many pending operations every subset is taken, with every length; each of them torn in every way that
    /// [`Tear::variants`] has; and each pair that overlaps in both orders. Beyond, a sample.
    pub exhaustive_ops: usize,
    /// So many random states in addition: subsets, orders, tears and lengths.
    pub random: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { exhaustive_ops: 10, random: 200 }
    }
}

impl State {
    /// The point that it is a state of.
    #[must_use]
    pub fn point(&self) -> u64 {
        self.point
    }

    /// The length of the file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Numbers of the pending operations that left something, from 0, and how they are torn.
    #[must_use]
    pub fn pieces(&self) -> &[(usize, Tear)] {
        &self.pieces
    }

    /// All there is to know, for people: the text, and what each operation was.
    #[must_use]
    pub fn describe(&self, point: &CrashPoint) -> String {
        let mut text = format!("{self}\n  of {} pending operations:\n", point.pending.len());
        for (number, operation) in point.pending.iter().enumerate() {
            let place = self.pieces.iter().position(|(piece, _)| *piece == number);
            let fate = place.map_or_else(|| "lost".to_owned(), |place| format!("kept ({})", self.pieces[place].1));
            text += &format!("  {number:>4} {fate:<12} {operation}\n");
        }
        text
    }

    /// Makes the image again.
    #[must_use]
    pub fn replay(&self, point: &CrashPoint) -> PageMap {
        point.build(self)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "point {} length {:#x} ops", self.point, self.length)?;
        self.pieces.iter().try_for_each(|(number, tear)| write!(f, " {number}:{tear}"))
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a state (point N length 0xN ops N:TEAR ...)");
        let mut words = text.split_whitespace();
        let mut after = |name: &str| words.next().filter(|word| *word == name).and_then(|_| words.next());
        let point = after("point").and_then(|word| word.parse().ok()).ok_or_else(wrong)?;
        let length = after("length").and_then(|word| word.strip_prefix("0x")).ok_or_else(wrong)?;
        let length = u64::from_str_radix(length, 16).map_err(|_| wrong())?;
        words.next().filter(|word| *word == "ops").ok_or_else(wrong)?;
        let piece = |word: &str| {
            let (number, tear) = word.split_once(':').ok_or_else(wrong)?;
            Ok((number.parse().map_err(|_| wrong())?, tear.parse()?))
        };
        Ok(Self { point, length, pieces: words.map(piece).collect::<Result<_, String>>()? })
    }
}

impl CrashPoint {
    pub(super) fn new(id: u64, durable: PageMap, pending: Vec<Arc<Operation>>) -> Self {
        Self { id, durable, pending }
    }

    /// The same point under another number.
    #[must_use]
    pub fn with_id(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// Its number: of the operations before it, unless it was given another.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What is durable.
    #[must_use]
    pub fn durable(&self) -> &PageMap {
        &self.durable
    }

    /// What is on its way, in the order in which it was asked for.
    #[must_use]
    pub fn pending(&self) -> &[Arc<Operation>] {
        &self.pending
    }

    /// The lengths that the file had since the last sync, the durable one first.
    #[must_use]
    pub fn lengths(&self) -> Vec<u64> {
        let mut lengths = vec![self.durable.len()];
        for length in self.pending.iter().map(|operation| operation.length.1) {
            if !lengths.contains(&length) {
                lengths.push(length);
            }
        }
        lengths
    }

    /// Lengths inside of what made the file grow by being written: file systems record those page by page.
    #[must_use]
    pub fn torn_lengths(&self) -> Vec<u64> {
        let grown = self.pending.iter().filter(|operation| operation.kind != OpKind::SetLen);
        let mut lengths = Vec::new();
        for (before, after) in grown.map(|operation| operation.length) {
            let first = (before + 1).next_multiple_of(PAGE_BYTES);
            let middle = (before + after.saturating_sub(before) / 2).next_multiple_of(PAGE_BYTES);
            lengths.extend([first, middle].into_iter().filter(|length| before < *length && *length < after));
        }
        lengths.dedup();
        lengths
    }

    fn last_length(&self) -> u64 {
        self.pending.last().map_or(self.durable.len(), |operation| operation.length.1)
    }

    fn state(&self, length: u64, pieces: Vec<(usize, Tear)>) -> State {
        State { point: self.id, length, pieces }
    }

    /// The image that a state describes.
    #[must_use]
    pub fn build(&self, state: &State) -> PageMap {
        let mut map = self.durable.clone();
        for (number, tear) in &state.pieces {
            self.pending[*number].apply(&mut map, tear);
        }
        map.set_len(state.length);
        map
    }

    /// States that a power cut at this point may leave. Different states may leave the same image.
    #[must_use]
    pub fn states(&self, sampling: &Sampling, seed: u64) -> Vec<State> {
        let mut states = Vec::new();
        let mut rng = Rng::new(seed);
        if self.pending.is_empty() {
            return vec![self.state(self.durable.len(), Vec::new())];
        }
        if self.pending.len() <= sampling.exhaustive_ops {
            self.all_subsets(&mut states, &mut rng);
            self.all_torn(&mut states);
            self.all_swapped(&mut states);
        } else {
            self.named(&mut states);
        }
        states.extend((0..sampling.random).map(|_| self.random(&mut rng, None)));
        states
    }

    /// Random states that all have something of the newest operation, for points between which only it is new.
    #[must_use]
    pub fn newest_states(&self, count: usize, seed: u64) -> Vec<State> {
        let mut rng = Rng::new(seed);
        let newest = self.pending.len().checked_sub(1);
        let count = if newest.is_some() { count } else { 1 };
        (0..count).map(|_| self.random(&mut rng, newest)).collect()
    }

    /// One random state.
    #[must_use]
    pub fn random_state(&self, seed: u64) -> State {
        self.random(&mut Rng::new(seed), None)
    }

    fn all_subsets(&self, states: &mut Vec<State>, rng: &mut Rng) {
        let mut lengths = self.lengths();
        lengths.extend(self.torn_lengths());
        if lengths.len() > LENGTHS_MAX {
            let others = [rng.pick(&lengths), rng.pick(&lengths)];
            lengths = vec![self.durable.len(), self.last_length(), others[0], others[1]];
        }
        for mask in 0..1_u64 << self.pending.len() {
            let kept = (0..self.pending.len()).filter(|number| mask >> number & 1 == 1);
            let pieces: Vec<_> = kept.map(|number| (number, Tear::Whole)).collect();
            states.extend(lengths.iter().map(|&length| self.state(length, pieces.clone())));
        }
    }

    /// Each operation torn in every way, alone, after all earlier ones, and with all others; in the smallest windows with
    /// every subset of the others.
    fn all_torn(&self, states: &mut Vec<State>) {
        let count = self.pending.len();
        for (torn, operation) in self.pending.iter().enumerate() {
            let others = !(1 << torn) & ((1_u64 << count) - 1);
            let contexts: Vec<u64> = if count <= TORN_CONTEXT_OPS_MAX {
                (0..1 << count).filter(|mask| mask & !others == 0).collect()
            } else {
                vec![0, others & ((1 << torn) - 1), others]
            };
            for tear in Tear::variants(operation.sectors()) {
                for mask in &contexts {
                    let kept = (0..count).filter(|&number| number == torn || mask >> number & 1 == 1);
                    let pieces = kept.map(|number| (number, if number == torn { tear } else { Tear::Whole }));
                    states.push(self.state(self.last_length(), pieces.collect()));
                }
            }
        }
    }

    /// Each pair that overlaps, the older one over the newer one, whole and torn; without the others and with them.
    fn all_swapped(&self, states: &mut Vec<State>) {
        let count = self.pending.len();
        for newer in 0..count {
            for older in 0..newer {
                if !self.pending[older].overlaps(&self.pending[newer]) {
                    continue;
                }
                let mut tears = vec![Tear::Whole];
                tears.extend(Tear::variants(self.pending[older].sectors()));
                for tear in tears {
                    let alone = vec![(newer, Tear::Whole), (older, tear)];
                    let others = (0..count).filter(|&number| number != older);
                    let mut all: Vec<_> = others.map(|number| (number, Tear::Whole)).collect();
                    let behind = all.iter().position(|(number, _)| *number == newer).map_or(all.len(), |at| at + 1);
                    all.insert(behind, (older, tear));
                    states.push(self.state(self.last_length(), alone));
                    states.push(self.state(self.last_length(), all));
                }
            }
        }
    }

    /// What every sample has: nothing, everything, each operation alone, all but each; both with the newest length and
    /// with the durable one.
    fn named(&self, states: &mut Vec<State>) {
        let whole = |numbers: &mut dyn Iterator<Item = usize>| numbers.map(|number| (number, Tear::Whole)).collect();
        let count = self.pending.len();
        let mut add = |pieces: Vec<(usize, Tear)>| {
            states.push(self.state(self.last_length(), pieces.clone()));
            if self.last_length() != self.durable.len() {
                states.push(self.state(self.durable.len(), pieces));
            }
        };
        add(Vec::new());
        add(whole(&mut (0..count)));
        for number in 0..count {
            add(vec![(number, Tear::Whole)]);
            add(whole(&mut (0..count).filter(|&other| other != number)));
        }
    }

    fn random(&self, rng: &mut Rng, must: Option<usize>) -> State {
        let percent = rng.pick(&[10, 50, 50, 90]);
        let torn_percent = rng.pick(&[0, 30, 80]);
        let mut pieces = Vec::new();
        for (number, operation) in self.pending.iter().enumerate() {
            if must != Some(number) && !rng.chance(percent) {
                continue;
            }
            let sectors = operation.sectors();
            let tear = if sectors > 1 && rng.chance(torn_percent) {
                let at = rng.below(sectors);
                match rng.below(6) {
                    0 => Tear::Prefix(at.max(1)),
                    1 => Tear::Suffix(at.max(1)),
                    2 => Tear::Only(at),
                    3 => Tear::Without(at),
                    _ => Tear::Random(rng.next_u64() >> 32),
                }
            } else {
                Tear::Whole
            };
            pieces.push((number, tear));
        }
        if rng.chance(30) {
            rng.shuffle(&mut pieces);
        }
        let mut lengths = self.lengths();
        lengths.extend(self.torn_lengths());
        let length = if rng.chance(50) { self.last_length() } else { rng.pick(&lengths) };
        self.state(length, pieces)
    }
}
