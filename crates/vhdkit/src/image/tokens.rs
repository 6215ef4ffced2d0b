//! Who may do what with a block: one token per block number, owned, and free to cross threads.
//!
//! | held | goes together with |
//! |---|---|
//! | `Use`: a plan over a mapped block | `Use`, `Change` |
//! | `Change`: a first write, setting bitmap bits | `Use` |
//! | `Alone`: trim, zero, move | nothing |
//!
//! Readers never wait for a first write: until it is complete they see the old state.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::units::BlockIndex;

/// How a block is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Its mapping is relied on.
    Use,
    /// Its mapping is about to be made or extended.
    Change,
    /// Its mapping is taken away.
    Alone,
}

/// Whether to wait for what stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until it is gone.
    Yes,
    /// Not at all: say busy.
    No,
    /// Nor is anything done that takes long by itself, such as a commit.
    AtOnce,
}

#[derive(Debug, Default)]
struct State {
    uses: usize,
    change: bool,
    alone: bool,
    /// Those who wait to be alone; others who would wait stand behind them.
    waiting_alone: usize,
}

impl State {
    fn admits(&self, hold: Hold) -> bool {
        match hold {
            Hold::Use => !self.alone,
            Hold::Change => !self.alone && !self.change,
            Hold::Alone => !self.alone && !self.change && self.uses == 0,
        }
    }

    fn is_free(&self) -> bool {
        self.uses == 0 && !self.change && !self.alone && self.waiting_alone == 0
    }
}

/// Spreads block numbers: one multiplication by an odd number (Fibonacci hashing), the high bits folded in. A guest that chose
/// its blocks by it would slow down nobody but itself.
#[derive(Debug, Default)]
struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let spread = (self.0 ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = spread ^ (spread >> 32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

const SHARDS: usize = 16;

/// The blocks of a shard that somebody holds or waits for.
#[derive(Debug, Default)]
struct Blocks {
    states: HashMap<u64, State, BuildHasherDefault<BlockHasher>>,
    /// So many wait: waking nobody is a system call too.
    waiting: usize,
}

#[derive(Debug, Default)]
struct Shard {
    blocks: Mutex<Blocks>,
    released: Condvar,
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner) // changed by single steps, whole at any moment
    }
}

/// The tokens of a disk's blocks.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    shards: [Shard; SHARDS],
}

impl Tokens {
    fn shard(&self, block: BlockIndex) -> &Shard {
        let number = usize::try_from(block.0 % SHARDS as u64).unwrap_or_default();
        self.shards.get(number).unwrap_or(&self.shards[0])
    }

    /// Takes a token; false when it is busy and the caller does not wait. Has to be given back by [`Tokens::release`].
    pub(crate) fn acquire(&self, block: BlockIndex, hold: Hold, wait: Wait) -> bool {
        let shard = self.shard(block);
        let mut blocks = shard.lock();
        let mut state = blocks.states.entry(block.0).or_default();
        let behind = state.waiting_alone > 0;
        if !state.admits(hold) || behind {
            if wait != Wait::Yes {
                if state.is_free() {
                    blocks.states.remove(&block.0);
                }
                return false;
            }
            if hold == Hold::Alone {
                state.waiting_alone += 1;
            }
            blocks.waiting += 1;
            loop {
                blocks = shard.released.wait(blocks).unwrap_or_else(PoisonError::into_inner);
                let state = blocks.states.entry(block.0).or_default();
                if state.admits(hold) && (hold == Hold::Alone || state.waiting_alone == 0) {
                    break;
                }
            }
            blocks.waiting -= 1;
            state = blocks.states.entry(block.0).or_default();
            if hold == Hold::Alone {
                state.waiting_alone -= 1;
            }
        }
        match hold {
            Hold::Use => state.uses += 1,
            Hold::Change => state.change = true,
            Hold::Alone => state.alone = true,
        }
        true
    }

    /// Gives a token back.
    pub(crate) fn release(&self, block: BlockIndex, hold: Hold) {
        let shard = self.shard(block);
        let mut blocks = shard.lock();
        let Entry::Occupied(mut held) = blocks.states.entry(block.0) else { return };
        let state = held.get_mut();
        match hold {
            Hold::Use => state.uses = state.uses.saturating_sub(1),
            Hold::Change => state.change = false,
            Hold::Alone => state.alone = false,
        }
        if state.is_free() {
            held.remove();
        }
        let is_awaited = blocks.waiting > 0;
        drop(blocks);
        if is_awaited {
            shard.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const BLOCK: BlockIndex = BlockIndex(17);

    #[test]
    fn what_goes_together() {
        let table = [
            (Hold::Use, Hold::Use, true),
            (Hold::Use, Hold::Change, true),
            (Hold::Use, Hold::Alone, false),
            (Hold::Change, Hold::Use, true),
            (Hold::Change, Hold::Change, false),
            (Hold::Change, Hold::Alone, false),
            (Hold::Alone, Hold::Use, false),
            (Hold::Alone, Hold::Change, false),
            (Hold::Alone, Hold::Alone, false),
        ];
        for (first, second, together) in table {
            let tokens = Tokens::default();
            assert!(tokens.acquire(BLOCK, first, Wait::No));
            assert_eq!(tokens.acquire(BLOCK, second, Wait::No), together, "{first:?} {second:?}");
            assert!(tokens.acquire(BlockIndex(17 + 16), Hold::Alone, Wait::No), "another block is free");
            tokens.release(BLOCK, first);
            if together {
                tokens.release(BLOCK, second);
            }
            assert!(tokens.acquire(BLOCK, Hold::Alone, Wait::No));
        }
    }

    #[test]
    fn holders_exclude_each_other_across_threads() {
        let tokens = Tokens::default();
        let (uses, alone) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (tokens, uses, alone) = (&tokens, &uses, &alone);
                scope.spawn(move || {
                    for round in 0..2000 {
                        if (round + thread) % 3 == 0 {
                            tokens.acquire(BLOCK, Hold::Alone, Wait::Yes);
                            assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0);
                            assert_eq!(uses.load(Ordering::SeqCst), 0);
                            alone.fetch_sub(1, Ordering::SeqCst);
                            tokens.release(BLOCK, Hold::Alone);
                        } else {
                            tokens.acquire(BLOCK, Hold::Use, Wait::Yes);
                            uses.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(alone.load(Ordering::SeqCst), 0);
                            uses.fetch_sub(1, Ordering::SeqCst);
                            tokens.release(BLOCK, Hold::Use);
                        }
                    }
                });
            }
        });
        assert!(
            tokens.shards.iter().all(|shard| shard.lock().states.is_empty() && shard.lock().waiting == 0),
            "nothing is left behind"
        );
    }
}
