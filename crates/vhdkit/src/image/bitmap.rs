//! Pages of sector bitmaps: a small cache, so that 16 GiB of bitmaps cost 4 MiB at most.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::view::View;
use crate::error::Result;
use crate::units::FileOffset;

/// Bytes of a bitmap page.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Bits of a bitmap page.
pub(crate) const PAGE_BITS: u64 = PAGE_BYTES * 8;

/// A bitmap page.
pub(crate) type BitmapPage = [u8; 4096];

const SHARDS: usize = 16;
const SHARD_PAGES: usize = 64;

/// A bounded cache of bitmap pages of one layer.
#[derive(Debug)]
pub(crate) struct BitmapCache {
    shards: [Mutex<HashMap<u64, Arc<BitmapPage>>>; SHARDS],
}

impl BitmapCache {
    pub(crate) fn new() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::new(HashMap::new())) }
    }

    /// The page at a file offset. The lock is not held while reading.
    pub(crate) fn page(&self, offset: FileOffset, view: &View) -> Result<Arc<BitmapPage>> {
        let shard = (offset.0 / PAGE_BYTES) as usize % SHARDS; // only the low bits matter
        let shard = self.shards.get(shard).unwrap_or(&self.shards[0]);
        if let Some(page) = shard.lock().unwrap_or_else(PoisonError::into_inner).get(&offset.0) {
            return Ok(Arc::clone(page));
        }
        let mut page: BitmapPage = [0; 4096];
        view.read_at(&mut page, offset.0)?;
        let page = Arc::new(page);
        let mut pages = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.len() >= SHARD_PAGES {
            // Any page will do: what is in use stays alive through its Arc.
            let victim = pages.keys().next().copied();
            victim.and_then(|victim| pages.remove(&victim));
        }
        pages.insert(offset.0, Arc::clone(&page));
        Ok(page)
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
