//! Pages of sector bitmaps: a small cache, so that 16 GiB of bitmaps cost 4 MiB at most, and the pages that a writer
//! changes, which stay until they are home.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::view::View;
use crate::error::Result;
use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering, PoisonError};
use crate::units::{ChunkIndex, FileOffset};

/// Bytes of a bitmap page.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Bits of a bitmap page.
pub(crate) const PAGE_BITS: u64 = PAGE_BYTES * 8;

/// A bitmap page.
pub(crate) type BitmapPage = [u8; 4096];

const SHARDS: usize = 16;
const SHARD_PAGES: usize = 64;

/// Which page: the chunk, and the page's number in the chunk's bitmap block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BitmapKey {
    pub(crate) chunk: ChunkIndex,
    pub(crate) page: u64,
}

/// Pages that nobody is about to change. `generation` counts the pages that came back changed: who began to read before
/// must not put an older page in.
#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<BitmapKey, Arc<BitmapPage>>,
    generation: u64,
}

/// A page that a plan will change, or that was changed and is not home yet.
#[derive(Debug)]
struct Pinned {
    page: Arc<BitmapPage>,
    pins: u64,
}

/// A bounded cache of bitmap pages of one layer, and those that a writer holds on to.
#[derive(Debug)]
pub(crate) struct BitmapCache {
    shards: [Mutex<Shard>; SHARDS],
    pinned: Mutex<HashMap<BitmapKey, Pinned>>,
    /// How many pages are pinned; spares readers the lock when there are none.
    pinned_count: AtomicUsize,
}

impl BitmapCache {
    pub(crate) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            pinned: Mutex::default(),
            pinned_count: AtomicUsize::new(0),
        }
    }

    fn shard(&self, key: BitmapKey) -> MutexGuard<'_, Shard> {
        let number = usize::try_from((key.page ^ key.chunk.0) % SHARDS as u64).unwrap_or_default();
        self.shards.get(number).unwrap_or(&self.shards[0]).lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pinned(&self) -> MutexGuard<'_, HashMap<BitmapKey, Pinned>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page if a writer holds on to it: the file may be behind.
    pub(crate) fn held(&self, key: BitmapKey) -> Option<Arc<BitmapPage>> {
        if self.pinned_count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.pinned().get(&key).map(|pinned| Arc::clone(&pinned.page))
    }

    /// A page, when it is in memory.
    pub(crate) fn in_memory(&self, key: BitmapKey) -> Option<Arc<BitmapPage>> {
        self.held(key).or_else(|| self.shard(key).pages.get(&key).map(Arc::clone))
    }

    /// A page; `offset` is where it stands in the file. No lock is held while reading.
    pub(crate) fn page(&self, key: BitmapKey, offset: FileOffset, view: &View) -> Result<Arc<BitmapPage>> {
        loop {
            if let Some(page) = self.held(key) {
                return Ok(page);
            }
            let generation = {
                let shard = self.shard(key);
                if let Some(page) = shard.pages.get(&key) {
                    return Ok(Arc::clone(page));
                }
                shard.generation
            };
            let mut page: BitmapPage = [0; 4096];
            view.read_at(&mut page, offset.0)?;
            let page = Arc::new(page);
            let mut shard = self.shard(key);
            if shard.generation == generation {
                shard.insert(key, Arc::clone(&page));
                return Ok(page);
            }
        }
    }

    /// Holds on to a page. `offset` is where it stands in the file; `None` for a page of a new block, which is zero.
    pub(crate) fn pin(&self, key: BitmapKey, offset: Option<FileOffset>, view: &View) -> Result<()> {
        let page = match offset {
            Some(offset) => self.page(key, offset, view)?,
            None => Arc::new([0; 4096]),
        };
        let mut pinned = self.pinned();
        match pinned.get_mut(&key) {
            Some(there) => there.pins += 1,
            None => {
                // What came back changed since it was looked up lies in its shard, unless it was evicted: then ask again.
                let page = match offset {
                    Some(_) => self.shard(key).pages.get(&key).map(Arc::clone),
                    None => Some(page),
                };
                let Some(page) = page else {
                    drop(pinned);
                    return self.pin(key, offset, view);
                };
                pinned.insert(key, Pinned { page, pins: 1 });
                self.pinned_count.store(pinned.len(), Ordering::Release);
            }
        }
        Ok(())
    }

    /// Holds on to a page once more that is held already.
    pub(crate) fn pin_again(&self, key: BitmapKey) {
        if let Some(there) = self.pinned().get_mut(&key) {
            there.pins += 1;
        }
    }

    /// Lets go of a page as often as it was pinned.
    pub(crate) fn unpin(&self, key: BitmapKey) {
        let mut pinned = self.pinned();
        let Some(there) = pinned.get_mut(&key) else { return };
        there.pins = there.pins.saturating_sub(1);
        if there.pins == 0
            && let Some(there) = pinned.remove(&key)
        {
            let mut shard = self.shard(key);
            shard.generation += 1;
            shard.insert(key, there.page);
            drop(shard);
            self.pinned_count.store(pinned.len(), Ordering::Release);
        }
    }

    /// Changes a page that is pinned. Those who have it see the old one.
    pub(crate) fn change(&self, key: BitmapKey, change: impl FnOnce(&mut BitmapPage)) {
        if let Some(there) = self.pinned().get_mut(&key) {
            change(Arc::make_mut(&mut there.page));
        }
    }
}

impl Shard {
    fn insert(&mut self, key: BitmapKey, page: Arc<BitmapPage>) {
        if self.pages.len() >= SHARD_PAGES {
            // Any page will do: what is in use stays alive through its Arc.
            let victim = self.pages.keys().next().copied();
            victim.and_then(|victim| self.pages.remove(&victim));
        }
        self.pages.insert(key, page);
    }
}

/// Sets or clears bits of a page; `bits` count from its start.
pub(crate) fn set_bits(page: &mut BitmapPage, bits: Range<u64>, value: bool) {
    for (number, byte) in (0..).zip(page.iter_mut()) {
        let first = number * 8;
        let (from, to) = (bits.start.max(first), bits.end.min(first + 8));
        if from >= to {
            continue;
        }
        let mask = (0xff_u8 >> (8 - (to - from))) << (from - first);
        *byte = if value { *byte | mask } else { *byte & !mask };
    }
}

/// The value of a bit and how many bits from it on, at most `limit`, have that value. `first` counts from the start of
/// the page.
pub(crate) fn bit_run(page: &BitmapPage, first: u64, limit: u64) -> (bool, u64) {
    let bit = |number: u64| {
        let byte = page.get(usize::try_from(number / 8).unwrap_or(usize::MAX)).copied().unwrap_or_default();
        byte >> (number % 8) & 1 == 1
    };
    let value = bit(first);
    let same_byte = if value { 0xff } else { 0 };
    let end = (first + limit).min(PAGE_BITS);
    let mut position = first;
    while position < end {
        let byte = usize::try_from(position / 8).unwrap_or(usize::MAX);
        if position.is_multiple_of(8) && position + 8 <= end && page.get(byte) == Some(&same_byte) {
            position += 8;
        } else if bit(position) == value {
            position += 1;
        } else {
            break;
        }
    }
    (value, position - first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_and_cleared_exactly() {
        for bits in [0..1, 3..5, 7..9, 0..32_768, 100..100, 8..16, 32_760..32_768, 5..1000] {
            let mut page: BitmapPage = [0; 4096];
            set_bits(&mut page, bits.clone(), true);
            let mut cleared: BitmapPage = [0xff; 4096];
            set_bits(&mut cleared, bits.clone(), false);
            for number in 0..32_768_u64 {
                let byte = usize::try_from(number / 8).unwrap();
                assert_eq!(page[byte] >> (number % 8) & 1 == 1, bits.contains(&number), "{bits:?} {number}");
                assert_eq!(cleared[byte] >> (number % 8) & 1 == 0, bits.contains(&number), "{bits:?} {number}");
            }
        }
    }

    #[test]
    fn runs_agree_with_single_bits() {
        let mut page: BitmapPage = [0; 4096];
        for (index, byte) in page.iter_mut().enumerate() {
            *byte = match index % 7 {
                0..3 => 0,
                3..5 => 0xff,
                5 => 0b1110_0011,
                _ => 0b0001_0000,
            };
        }
        let bits: Vec<bool> = (0..4096 * 8).map(|number| page[number / 8] >> (number % 8) & 1 == 1).collect();
        for first in (0..200).chain(32_600..32_768) {
            for limit in [1, 3, 8, 17, 64, 100_000] {
                let expected = bits[first..].iter().take(limit).take_while(|bit| **bit == bits[first]).count();
                assert_eq!(
                    bit_run(&page, first as u64, limit as u64),
                    (bits[first], expected as u64),
                    "{first} {limit}"
                );
            }
        }
    }
}
