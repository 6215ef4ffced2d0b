//! Parent locators made to cost more than their bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::time::{Duration, Instant};

use vhdkit::format::finding::{CollectAll, FailFast, Findings, Location};
use vhdkit::format::locator::{ParentLocator, VHDX_LOCATOR};

/// An item of 1 MiB whose pairs are given by offset and length of key and value.
fn item(pairs: impl ExactSizeIterator<Item = [(u32, u16); 2]>) -> Vec<u8> {
    let mut bytes = zerocopy::IntoBytes::as_bytes(&VHDX_LOCATOR).to_vec();
    bytes.extend([0, 0]);
    bytes.extend(u16::try_from(pairs.len()).unwrap().to_le_bytes());
    for [key, value] in pairs {
        bytes.extend(key.0.to_le_bytes());
        bytes.extend(value.0.to_le_bytes());
        bytes.extend(key.1.to_le_bytes());
        bytes.extend(value.1.to_le_bytes());
    }
    // Text that is different wherever it begins.
    for unit in 0..(1_usize << 20) - bytes.len() {
        let value = 0x4e00 + (unit as u16 / 2) % 0x5000;
        bytes.push(value.to_le_bytes()[unit % 2]);
    }
    bytes
}

fn text_bytes(locator: &ParentLocator) -> usize {
    locator.pairs().iter().map(|(key, value)| key.len() + value.len()).sum()
}

#[test]
fn pairs_that_share_their_bytes_do_not_multiply_memory() {
    let bytes = item((0..1000_u32).map(|index| [(0x80000 + 2 * index, 60_000), (0x90000, 60_000)]));
    let place = Location::of("parent locator");
    let mut collect = CollectAll::default();
    if let Ok(locator) = ParentLocator::decode(&bytes, &place, &mut collect) {
        assert!(text_bytes(&locator) <= 2 << 20, "{} bytes of text out of an item of 1 MiB", text_bytes(&locator));
    }
    let mut first: Box<dyn Findings> = Box::new(FailFast::default());
    assert!(ParentLocator::decode(&bytes, &place, first.as_mut()).is_err());
}

#[test]
fn findings_about_pairs_stay_small() {
    // The same key again and again, and each finding quotes it.
    let bytes = item((0..2000_u32).map(|_| [(0x80000, 60_000), (0x90000, 60_000)]));
    let mut collect = CollectAll::default();
    let _ = ParentLocator::decode(&bytes, &Location::of("parent locator"), &mut collect);
    let text: usize = collect.findings().iter().map(|finding| finding.to_string().len()).sum();
    assert!(text <= 4 << 20, "{text} bytes of findings");
}

#[test]
fn as_many_keys_as_fit_are_told_apart_in_time() {
    let start = 20 + 12 * 65_535_u32;
    let bytes = item((0..65_535_u32).map(|index| [(start + 2 * (index % 0x5000), 2), (start, 2)]));
    let started = Instant::now();
    let mut collect = CollectAll::default();
    let _ = ParentLocator::decode(&bytes, &Location::of("parent locator"), &mut collect);
    let took = started.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
}
