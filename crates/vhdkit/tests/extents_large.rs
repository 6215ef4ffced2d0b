//! What a disk of 64 TiB costs: opening it, reading one block and walking it touch a few pages of the file.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared module")]

mod model_support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model_support::{TestFile, extents, read};
use vhdkit::image::{BlockDevice, ExtentKind, OpenOptions};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::Content;
use vhdkit_testkit::model::ZERO;

const TIB: u64 = 1 << 40;

/// The largest BAT that there is, with these blocks in use.
fn huge(blocks: &[u64]) -> BuiltImage {
    let builder = ImageBuilder::new(64 * TIB, 1 << 20);
    blocks.iter().fold(builder, |builder, block| builder.pattern_block(*block, *block)).build()
}

fn cost(file: &TestFile) -> (u64, u64) {
    (file.calls.load(Ordering::Relaxed), file.bytes.load(Ordering::Relaxed))
}

#[test]
fn one_block_of_64_tib_costs_a_few_reads() {
    let last = 64 * (1 << 20) - 1;
    let built = huge(&[0, 40 << 20, last]);
    let file = TestFile::new(&built.file);
    let image = OpenOptions::new().open(Arc::clone(&file) as _, None).unwrap();
    let (opening, _) = cost(&file);
    for block in [last, 40 << 20, 0] {
        assert_eq!(read(&image, block << 20, 1 << 16), built.model.read(block << 20, 1 << 16));
    }
    let (calls, bytes) = cost(&file);
    println!("{opening} calls to open, {calls} in all, {bytes} bytes");
    assert!(calls < 40, "{calls} calls");
    assert!(bytes < 1 << 20, "{bytes} bytes");
    // Again: nothing but the data itself is read.
    assert_eq!(read(&image, last << 20, 4096), built.model.read(last << 20, 4096));
    assert_eq!(cost(&file), (calls + 1, bytes + 4096));
    // Unallocated blocks whose page of the BAT is known cost nothing.
    assert_eq!(read(&image, (last - 3) << 20, 2 << 20), vec![0; 2 << 20]);
    assert_eq!(cost(&file), (calls + 1, bytes + 4096));
}

#[test]
fn extents_of_an_empty_64_tib_cost_a_few_reads() {
    let built = huge(&[12_345_678]);
    let file = TestFile::new(&built.file);
    let image = OpenOptions::new().open(Arc::clone(&file) as _, None).unwrap();
    let (opened_calls, opened_bytes) = cost(&file);
    let start = Instant::now();
    let all = extents(&image, 0..64 * TIB);
    let elapsed = start.elapsed();
    let (calls, bytes) = cost(&file);
    let (calls, bytes) = (calls - opened_calls, bytes - opened_bytes);
    println!("{calls} calls, {bytes} bytes, {elapsed:?}");
    let kinds: Vec<(u64, u64)> = all.iter().map(|extent| (extent.start, extent.length)).collect();
    let block = 12_345_678 << 20;
    assert_eq!(kinds, [(0, block), (block, 1 << 20), (block + (1 << 20), 64 * TIB - block - (1 << 20))]);
    assert_eq!(all[0].kind, ExtentKind::Hole);
    assert_eq!(all[1].kind, ExtentKind::Data { file_offset: Some(built.layout.payload_block(12_345_678)) });
    assert!(calls < 40 && bytes < 1 << 20, "{calls} calls, {bytes} bytes");
    assert!(elapsed < Duration::from_secs(2), "{elapsed:?}");
}

/// A BAT of ZERO entries, as qemu-img writes it: all of it is read, once, in large pieces, and is one extent.
#[test]
fn extents_of_a_written_bat_read_it_once() {
    let mut builder = ImageBuilder::new(2 * TIB, 1 << 20);
    builder.default_state = ZERO;
    let built = builder.block(1 << 20, BlockSpec::present(Content::Zero)).build();
    let file = TestFile::new(&built.file);
    let image = OpenOptions::new().open(Arc::clone(&file) as _, None).unwrap();
    let (opened_calls, opened_bytes) = cost(&file);
    let all = extents(&image, 0..2 * TIB);
    assert_eq!(all.len(), 3);
    assert_eq!((all[0].kind, all[2].kind), (ExtentKind::Zero, ExtentKind::Zero));
    let (calls, bytes) = cost(&file);
    let bat = built.layout.geometry.entries_required * 8;
    println!("{} calls, {} bytes of {bat}", calls - opened_calls, bytes - opened_bytes);
    assert!(bytes - opened_bytes <= bat + (1 << 20), "the BAT was read more than once");
    assert!(calls - opened_calls <= 2 * bat.div_ceil(1 << 16) + 10, "{calls} calls");
}

/// A child over a huge parent: walking it looks at each BAT once.
#[test]
fn extents_of_a_chain_skip_holes_in_every_layer() {
    let parent = Arc::new(huge(&[5, 60 << 20]));
    let child = ImageBuilder::new(64 * TIB, 32 << 20).differencing(&parent).block(1, BlockSpec::new(ZERO)).build();
    let start = Instant::now();
    let image = model_support::open("chain", &child);
    let all = extents(&image, 0..64 * TIB);
    let kinds: Vec<(u64, usize)> = all.iter().map(|extent| (extent.start >> 20, extent.layer)).collect();
    assert_eq!(kinds, [(0, 1), (5, 1), (6, 1), (32, 0), (64, 1), (60 << 20, 1), ((60 << 20) + 1, 1)]);
    assert_eq!(all[3].kind, ExtentKind::Zero);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// The caller may stop at any extent.
#[test]
fn breaking_off_ends_the_walk() {
    let built = (0..10)
        .step_by(2)
        .fold(ImageBuilder::new(20 << 20, 1 << 20), |builder, block| builder.pattern_block(block, 1))
        .build();
    let image = model_support::open("break", &built);
    for stop in 1..=10 {
        let mut seen = 0;
        let result = image.visit_extents(0..20 << 20, &mut |_| {
            seen += 1;
            if seen == stop { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
        });
        result.unwrap();
        assert_eq!(seen, stop);
    }
    assert!(extents(&image, 7..7).is_empty());
    assert!(image.visit_extents(0..(20 << 20) + 1, &mut |_| unreachable!()).is_err());
    assert!(image.visit_extents(u64::MAX - 1..u64::MAX, &mut |_| unreachable!()).is_err());
}
