//! What changed between two disks is found by their tables, exactly where contents are compared, and without reading
//! what both share.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod diff_support;

use std::ops::ControlFlow;
use std::sync::Arc;

use diff_support::{Chain, MIB, disk, load};
use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice, ExtentKind, Image, LayerDisk, RawDisk};
use vhdkit::ops::Progress;
use vhdkit::ops::diff::{Change, ChangedBy, DiffOptions, DiffReport, diff, share_a_file};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::builder::{BlockSpec, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::counting::{CountingStorage, Method};
use vhdkit_testkit::model::{UNMAPPED, ZERO};
use vhdkit_testkit::random::{RandomOptions, random_image};

fn by(by: ChangedBy) -> DiffOptions {
    DiffOptions { by, ..DiffOptions::default() }
}

/// Ranges with whether they are zero.
fn ranges(report: &DiffReport) -> Vec<(u64, u64, bool)> {
    report.ranges.iter().map(|Change { range, zero }| (range.start, range.end, *zero)).collect()
}

/// The sectors that differ, joined, what only one has being zero elsewhere.
fn differing(a: &[u8], b: &[u8], unit: usize) -> Vec<(u64, u64)> {
    let size = a.len().max(b.len());
    let wide = |bytes: &[u8]| [bytes, &vec![0; size - bytes.len()]].concat();
    let (a, b) = (wide(a), wide(b));
    let mut found: Vec<(u64, u64)> = Vec::new();
    for at in (0..size).step_by(unit) {
        let end = (at + unit).min(size);
        if a[at..end] != b[at..end] {
            match found.last_mut() {
                Some(last) if last.1 == at as u64 => last.1 = end as u64,
                _ => found.push((at as u64, end as u64)),
            }
        }
    }
    found
}

fn joined(report: &DiffReport) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for change in &report.ranges {
        match found.last_mut() {
            Some(last) if last.1 == change.range.start => last.1 = change.range.end,
            _ => found.push((change.range.start, change.range.end)),
        }
    }
    found
}

fn assert_counts_agree(report: &DiffReport) {
    assert_eq!(report.totals.ranges, report.ranges.len() as u64);
    let length = |change: &Change| change.range.end - change.range.start;
    assert_eq!(report.totals.changed_bytes, report.ranges.iter().map(length).sum::<u64>());
    let zeroed = report.ranges.iter().filter(|change| change.zero).map(length).sum::<u64>();
    assert_eq!(report.totals.zeroed_bytes, zeroed);
    assert!(report.ranges.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start), "{report:?}");
}

/// Whether a range lies in those of a list, which are joined.
fn lies_in((start, end): (u64, u64), list: &[(u64, u64)]) -> bool {
    list.iter().any(|(from, to)| *from <= start && end <= *to)
}

fn judge(name: &str, a: &dyn BlockDevice, b: &dyn BlockDevice) {
    let (bytes_a, bytes_b) = (disk(a), disk(b));
    let unit = a.logical_sector_size().min(b.logical_sector_size()) as usize;
    let expected = differing(&bytes_a, &bytes_b, unit);
    let exact = diff(a, b, &by(ChangedBy::Contents), &()).unwrap();
    assert_counts_agree(&exact);
    assert_eq!(joined(&exact), expected, "{name}");
    let coarse = diff(a, b, &by(ChangedBy::Allocation), &()).unwrap();
    assert_counts_agree(&coarse);
    assert_eq!(coarse.totals.bytes_read, [0, 0], "{name}");
    let found = joined(&coarse);
    for range in expected {
        assert!(lies_in(range, &found), "{name}: {range:x?} is missing in {found:x?}");
    }
    for change in exact.ranges.iter().chain(&coarse.ranges).filter(|change| change.zero) {
        let end = change.range.end.min(bytes_b.len() as u64);
        let inside = change.range.start.min(end) as usize..end as usize;
        assert!(bytes_b[inside].iter().all(|byte| *byte == 0), "{name}: {change:?} is not zero");
    }
}

#[test]
fn random_chains_against_their_model() {
    for depth in 1..=8 {
        for seed in 0..if depth < 4 { 5 } else { 2 } {
            let options = RandomOptions { virtual_size_max: 12 * MIB, blocks_max: 8, ..RandomOptions::chain(depth) };
            let top = random_image(seed * 100 + depth as u64, &options);
            let chain = Chain::new(&top);
            let image = chain.open(0);
            for layer in 1..depth {
                let name = format!("seed {seed}, depth {depth}, layer {layer}");
                let beneath = LayerDisk::with_parents(Arc::clone(&image), layer).unwrap();
                let alone = chain.open(layer);
                assert_eq!(disk(&beneath), disk(&*alone), "{name}");
                judge(&name, &beneath, &*image);
                // Opened by itself the file is the same one all the same.
                let found = diff(&*alone, &*image, &DiffOptions::default(), &()).unwrap();
                assert_eq!(found, diff(&beneath, &*image, &DiffOptions::default(), &()).unwrap(), "{name}");
                assert!(share_a_file(&*alone, &*image) && share_a_file(&beneath, &*image));
            }
            let other = Chain::new(&random_image(seed + 7000, &options));
            assert!(!share_a_file(&*image, &*other.open(0)));
            judge(&format!("seed {seed}, depth {depth}, another"), &*other.open(0), &*image);
            let same = diff(&*image, &*chain.open(0), &DiffOptions::default(), &()).unwrap();
            assert!(same.is_equal(), "seed {seed}, depth {depth}: {same:?}");
        }
    }
}

/// A parent with data in its blocks 0 to 3 of 8, and a child with a block in every state.
fn states() -> Chain {
    let parent = ImageBuilder::new(8 * MIB, MIB as u32).pattern_block(0, 1).pattern_block(1, 2);
    let parent = Arc::new(parent.pattern_block(2, 3).pattern_block(3, 4).build());
    let sectors = SectorMask::new(|sector| (8..16).contains(&(sector % 2048)));
    let child = ImageBuilder::new(8 * MIB, MIB as u32)
        .differencing(&parent)
        .block(0, BlockSpec::present(Content::pattern(1)))
        .block(1, BlockSpec::new(ZERO))
        .block(2, BlockSpec::partial(Content::pattern(30), sectors))
        .block(4, BlockSpec::new(UNMAPPED))
        .block(5, BlockSpec::present(Content::Zero))
        .block(6, BlockSpec::present(Content::pattern(60)));
    Chain::new(&child.build())
}

#[test]
fn every_state_of_a_block() {
    let chain = states();
    let child = chain.open(0);
    let parent = LayerDisk::with_parents(Arc::clone(&child), 1).unwrap();
    let report = diff(&parent, &*child, &DiffOptions::default(), &()).unwrap();
    let partial = (2 * MIB + 4096, 2 * MIB + 8192, false);
    // Block 0 was written with what was there before; 4 was nothing before and is nothing now; 5 was written with zeros.
    assert_eq!(ranges(&report), [(0, MIB, false), (MIB, 2 * MIB, true), partial, (5 * MIB, 7 * MIB, false)]);
    let report = diff(&parent, &*child, &by(ChangedBy::Contents), &()).unwrap();
    assert_eq!(ranges(&report), [(MIB, 2 * MIB, true), partial, (6 * MIB, 7 * MIB, false)]);
    // The other way round: what the child hid comes back.
    let report = diff(&*child, &parent, &DiffOptions::default(), &()).unwrap();
    assert_eq!(ranges(&report), [(0, 2 * MIB, false), partial, (5 * MIB, 7 * MIB, true)]);
    let listed = DiffOptions { ranges_max: 1, ..DiffOptions::default() };
    let report = diff(&parent, &*child, &listed, &()).unwrap();
    assert_eq!((report.ranges.len(), report.totals.ranges), (1, 4));
}

#[test]
fn tables_of_a_chain_are_enough() {
    let block = 32 * MIB;
    let parent = ImageBuilder::new(640 * MIB, block as u32);
    let parent = Arc::new((0..10).fold(parent, |parent, at| parent.pattern_block(at, at + 1)).build());
    let child = ImageBuilder::new(640 * MIB, block as u32).differencing(&parent).pattern_block(3, 33);
    let mask = SectorMask::random(5, 8, 50);
    let child = Arc::new(child.block(4, BlockSpec::partial(Content::pattern(44), mask)).build());
    let top = ImageBuilder::new(640 * MIB, block as u32).differencing(&child).pattern_block(11, 55).build();
    let mut chain = Chain::new(&top);
    let counted: Vec<Arc<CountingStorage>> =
        chain.files.iter().map(|file| Arc::new(CountingStorage::new(Arc::clone(file)))).collect();
    chain.files = counted.iter().map(|file| Arc::clone(file) as Arc<dyn Storage>).collect();
    let read = || counted.iter().map(|file| file.counts().bytes(Method::Read)).sum::<u64>();
    let (image, alone) = (chain.open(0), chain.open(2));
    let before = read();
    let report = diff(&*alone, &*image, &DiffOptions::default(), &()).unwrap();
    assert!(report.totals.changed_bytes > 2 * block && report.totals.changed_bytes < 3 * block, "{report:?}");
    let tables = read() - before;
    // BATs of 22 entries each, and the pages of one block's bitmap: two of 4 KiB.
    assert!(tables < 64 << 10, "{tables} bytes were read");

    // Comparing the contents reads what may differ, of both, and nothing else.
    let before = read();
    let exact = diff(&*alone, &*image, &by(ChangedBy::Contents), &()).unwrap();
    assert_eq!(exact.totals.changed_bytes, report.totals.changed_bytes);
    let [of_parent, of_child] = exact.totals.bytes_read;
    assert_eq!((of_child, of_parent), (report.totals.changed_bytes, report.totals.changed_bytes - block));
    assert!(read() - before < of_parent + of_child + (64 << 10));
}

#[test]
fn disks_of_different_sizes_and_sectors() {
    let raw = |bytes: Vec<u8>, sector| RawDisk::new(Arc::new(MemoryStorage::from_bytes(bytes)), sector).unwrap();
    let mut long = vec![0; 3 << 20];
    long[(2 << 20) + 5000] = 1;
    let (short, long) = (raw(vec![0; 1 << 20], 512), raw(long, 512));
    let report = diff(&short, &long, &by(ChangedBy::Contents), &()).unwrap();
    assert_eq!(ranges(&report), [((2 << 20) + 4608, (2 << 20) + 5120, false)]);
    assert_eq!((report.sizes, report.is_equal()), ([1 << 20, 3 << 20], false));
    let report = diff(&long, &short, &by(ChangedBy::Contents), &()).unwrap();
    assert_eq!(ranges(&report), [((2 << 20) + 4608, (2 << 20) + 5120, true)]);
    // Only the size differs: that is a difference, too.
    let report = diff(&short, &raw(vec![0; 2 << 20], 512), &by(ChangedBy::Contents), &()).unwrap();
    assert!(report.ranges.is_empty() && !report.is_equal());
    // The smaller sector counts; the end of a file need not be one of a sector.
    let mut odd = vec![0; 9000];
    odd[8999] = 1;
    let report = diff(&raw(vec![0; 12288], 4096), &raw(odd, 512), &by(ChangedBy::Contents), &()).unwrap();
    assert_eq!(ranges(&report), [(8704, 9216, false)]);
}

#[test]
fn unrelated_disks_are_read_where_either_has_data() {
    let built = |seed| Chain::new(&ImageBuilder::new(64 * MIB, MIB as u32).pattern_block(3, seed).build());
    let (one, other) = (built(1), built(1));
    let report = diff(&*one.open(0), &*other.open(0), &by(ChangedBy::Contents), &()).unwrap();
    assert!(report.is_equal());
    assert_eq!(report.totals.bytes_read, [MIB, MIB]);
    let report = diff(&*one.open(0), &*other.open(0), &DiffOptions::default(), &()).unwrap();
    assert_eq!(ranges(&report), [(3 * MIB, 4 * MIB, false)], "by their tables they have nothing in common");
    let report = diff(&*one.open(0), &*built(2).open(0), &by(ChangedBy::Contents), &()).unwrap();
    assert_eq!(ranges(&report), [(3 * MIB, 4 * MIB, false)]);
}

#[test]
fn a_parent_that_is_not_there_is_an_error_where_it_counts() {
    let chain = states();
    let open = || {
        let options = vhdkit::image::OpenOptions::new().without_parents();
        Arc::new(options.open(Arc::clone(&chain.files[0]), None).unwrap())
    };
    let error = diff(&*open(), &*open(), &DiffOptions::default(), &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMissing);
    assert_eq!(LayerDisk::with_parents(open(), 1).unwrap_err().kind(), ErrorKind::InvalidArgument);
    // The layer by itself says what it holds.
    let mut data = 0;
    let alone = LayerDisk::new(open(), 0).unwrap();
    alone
        .visit_extents(0..8 * MIB, &mut |extent| {
            data += if matches!(extent.kind, ExtentKind::Data { .. }) { extent.length } else { 0 };
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(data, 3 * MIB + 4096);
}

#[test]
fn a_layer_with_what_lies_beneath_it_names_the_right_files() {
    let chain = states();
    let image: Arc<Image> = chain.open(0);
    let beneath = LayerDisk::with_parents(Arc::clone(&image), 1).unwrap();
    assert_eq!(beneath.layer_storage(0).unwrap().identity(), chain.files[1].identity());
    assert!(beneath.layer_storage(1).is_none());
    let whole = LayerDisk::with_parents(Arc::clone(&image), 0).unwrap();
    assert_eq!(whole.layer_storage(1).unwrap().identity(), chain.files[1].identity());
    assert!(LayerDisk::new(image, 0).unwrap().layer_storage(1).is_none());
}

#[test]
fn it_can_be_cancelled() {
    struct Stop;
    impl Progress for Stop {
        fn advance(&self, done: u64, _total: Option<u64>) -> ControlFlow<()> {
            if done > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let one = load(&ImageBuilder::new(8 * MIB, MIB as u32).pattern_block(3, 1).build().file);
    let image = vhdkit::image::OpenOptions::new().open(one, None).unwrap();
    let empty = RawDisk::new(Arc::new(MemoryStorage::with_len(8 * MIB)), 512).unwrap();
    let error = diff(&image, &empty, &by(ChangedBy::Contents), &Stop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}
