//! Odd images and failing files under the operations that change the structure of an image.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use vhdkit::ErrorKind;
use vhdkit::format::finding::Severity;
use vhdkit::format::guid::Guid;
use vhdkit::image::{BlockDevice as _, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver};
use vhdkit::ops::Progress;
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::compact::{CompactOptions, compact};
use vhdkit::ops::merge::{MergeOptions, merge};
use vhdkit::ops::resize::{ResizeOptions, resize};
use vhdkit::ops::set::{SetOptions, UserItem, set, user_item};
use vhdkit::storage::Storage;
use vhdkit_testkit::faulty::{Fault, FaultyStorage, Space};
use vhdkit_testkit::sim::{CrashImage, PageMap, SimStorage, frozen_parents};
use vhdkit_testkit::spec::ItemSpec;
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, DirtyPlan, ImageBuilder, SectorMask};

const MIB: u64 = 1 << 20;

/// An image in memory on parents that nobody writes.
struct Bench {
    image: BuiltImage,
    storage: Arc<dyn Storage>,
}

impl Bench {
    fn new(image: BuiltImage) -> Self {
        let storage = Arc::new(SimStorage::from_pages(PageMap::from(&image.file)));
        Self { image, storage }
    }

    fn open_on(&self, storage: Arc<dyn Storage>, write: bool) -> vhdkit::Result<Image> {
        let parents = std::iter::successors(self.image.parent.as_deref(), |parent| parent.parent.as_deref());
        let parents: Vec<CrashImage> = parents.map(|parent| CrashImage::new(PageMap::from(&parent.file))).collect();
        OpenOptions::new().write(write).replay(write).parents(frozen_parents(parents)).open(storage, None)
    }

    fn open(&self, write: bool) -> Image {
        self.open_on(Arc::clone(&self.storage), write).unwrap()
    }

    /// All bytes of the disk.
    fn disk(&self) -> Vec<u8> {
        disk(&self.open(false))
    }

    fn expect_no_errors(&self) {
        let report = check(&self.storage, None, &CheckOptions::default(), &()).unwrap();
        let error = report.findings.iter().find(|finding| finding.severity() == Severity::Error);
        assert!(error.is_none(), "{error:?}");
    }
}

fn disk(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn expect_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the first byte of the disk that is wrong");
}

/// Old versions of QEMU leave files that end where the data of the last block does.
#[test]
fn a_disk_grows_whose_file_cuts_off_the_last_block() {
    for by in [MIB, 3 * MIB, 200 * MIB] {
        let size = 5 * MIB;
        let builder = ImageBuilder::new(size, 2 << 20)
            .block(0, BlockSpec::present(Content::pattern(1)))
            .block(2, BlockSpec::present(Content::pattern(2)));
        let length = builder.build().file.len();
        let bench = Bench::new(builder.with(|builder| builder.file_length = Some(length - MIB)).build());
        let mut expected = bench.disk();
        resize(bench.open(true), &ResizeOptions::to(size + by), &()).unwrap();
        expected.resize((size + by) as usize, 0);
        bench.expect_no_errors();
        expect_same(&bench.disk(), &expected);
        drop(bench.open(true));
    }
}

/// A partially present block all of whose sectors are there, as far as the disk goes, and a parent that goes on behind.
#[test]
fn nothing_of_a_longer_parent_shows_behind_a_last_block_of_which_every_sector_is_there() {
    let parent = (0..4).fold(ImageBuilder::new(8 * MIB, 2 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(Content::pattern(block + 1)))
    });
    let parent = Arc::new(parent.named("p.vhdx").build());
    let mask = SectorMask::new(|sector| sector < 2048);
    let child = ImageBuilder::new(5 * MIB, 2 << 20)
        .differencing(&parent)
        .block(2, BlockSpec::partial(Content::pattern(9), mask));
    let bench = Bench::new(child.build());
    let mut expected = bench.disk();
    resize(bench.open(true), &ResizeOptions::to(8 * MIB), &()).unwrap();
    expected.resize((8 * MIB) as usize, 0);
    expect_same(&bench.disk(), &expected);
    bench.expect_no_errors();
}

/// The files of a chain, the child first.
#[derive(Clone, Debug)]
struct Files(Vec<Arc<dyn Storage>>);

impl ParentResolver for Files {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> vhdkit::Result<Vec<ParentCandidate>> {
        let storage = self.0.get(wanted.depth + 1).cloned();
        Ok(storage
            .into_iter()
            .map(|storage| ParentCandidate { storage, path: None, named: true, lock: None })
            .collect())
    }
}

impl Files {
    fn new(image: &BuiltImage) -> Self {
        let images = std::iter::successors(Some(image), |image| image.parent.as_deref());
        let file =
            |image: &BuiltImage| Arc::new(SimStorage::from_pages(PageMap::from(&image.file))) as Arc<dyn Storage>;
        Self(images.map(file).collect())
    }

    fn open(&self, write: bool) -> vhdkit::Result<Image> {
        let options = OpenOptions::new().write(write).replay(write).parents(Arc::new(self.clone()));
        options.open(Arc::clone(&self.0[0]), None)
    }

    fn disk(&self) -> Vec<u8> {
        disk(&self.open(false).unwrap())
    }

    fn expect_no_errors(&self, what: &str) {
        for file in &self.0 {
            let report = check(file, None, &CheckOptions::default(), &()).unwrap();
            let error = report.findings.iter().find(|finding| finding.severity() == Severity::Error);
            assert!(error.is_none(), "{what}: {error:?}");
        }
    }
}

/// Says stop at the n-th call.
struct Stop {
    at: u64,
    calls: AtomicU64,
}

impl Progress for Stop {
    fn advance(&self, _: u64, _: Option<u64>) -> ControlFlow<()> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if call == self.at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

type Run = dyn Fn(&Files, &dyn Progress) -> vhdkit::Result<()>;

/// Lets every operation on every file (of so many one) fail in turn, and stops at every call of the progress. The disk is as before or as
/// afterwards then, and a second run does the whole work.
fn fails_anywhere(name: &str, image: &BuiltImage, step: usize, run: &Run) {
    let before = Files::new(image).disk();
    let whole = Files::new(image);
    run(&whole, &()).unwrap();
    let after = whole.disk();
    let (mut faults, mut stops) = (0, 0);
    let judge = |files: &Files, result: vhdkit::Result<()>, what: &str| {
        let found = files.disk();
        assert!(found == after || result.is_err() && found == before, "{what}, {result:?}: a mixture");
        files.expect_no_errors(what);
        run(files, &()).unwrap_or_else(|error| panic!("{what}, once more: {error}"));
        assert!(files.disk() == after, "{what}: wrong after it was done once more");
        files.expect_no_errors(what);
    };
    for errno in [Errno::NOSPC, Errno::IO] {
        for victim in 0..whole.0.len() {
            for n in (1..).step_by(step) {
                let (files, what) = (Files::new(image), format!("{name}: operation {n} of file {victim}, {errno}"));
                let faulty = Arc::new(FaultyStorage::new(Arc::clone(&files.0[victim])));
                faulty.arm(Fault::new(n, errno));
                let mut shown = files.clone();
                shown.0[victim] = Arc::clone(&faulty) as Arc<dyn Storage>;
                let result = run(&shown, &());
                if faulty.fired() == 0 {
                    result.unwrap();
                    break;
                }
                faults += 1;
                judge(&files, result, &format!("{what} ({:?})", faulty.first_fault()));
            }
        }
    }
    for at in (1..).step_by(step) {
        let files = Files::new(image);
        let stop = Stop { at, calls: AtomicU64::new(0) };
        let result = run(&files, &stop);
        if stop.calls.load(Ordering::Relaxed) < at {
            result.unwrap();
            break;
        }
        stops += 1;
        assert!(result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Cancelled), "{name}: {result:?}");
        judge(&files, result, &format!("{name}: stopped at call {at}"));
    }
    println!("{name}: {faults} faults, {stops} stops");
    assert!(faults > 10);
}

fn resized(size: u64) -> impl Fn(&Files, &dyn Progress) -> vhdkit::Result<()> {
    move |files, progress| {
        let options = ResizeOptions { allow_data_loss: true, ..ResizeOptions::to(size) };
        resize(files.open(true)?, &options, progress).map(drop)
    }
}

fn small() -> ImageBuilder {
    ImageBuilder::new(5 * MIB + 512, 1 << 20)
        .block(0, BlockSpec::present(Content::Sparse { seed: 1, stride: 97 }).at(9))
        .block(2, BlockSpec::present(Content::Zero).at(6))
        .block(3, BlockSpec::present(Content::Sparse { seed: 3, stride: 97 }).at(11))
        .block(5, BlockSpec::present(Content::pattern(5)).at(8))
}

#[test]
fn resizing_fails_anywhere() {
    let image = small().build();
    fails_anywhere("grow", &image, 1, &resized(7 * MIB));
    fails_anywhere("shrink", &image, 1, &resized(2 * MIB + 1024));
    let parent = ImageBuilder::new(8 * MIB, 1 << 20).block(5, BlockSpec::present(Content::pattern(8)));
    let parent = Arc::new(parent.block(6, BlockSpec::present(Content::pattern(9))).named("p.vhdx").build());
    let child = ImageBuilder::new(5 * MIB + 512, 1 << 20).differencing(&parent).build();
    fails_anywhere("grow a child", &child, 1, &resized(8 * MIB));
}

/// Regions behind the blocks, which move down into the holes.
#[test]
fn compacting_fails_anywhere() {
    let image = small().with(|builder| {
        builder.log_offset = Some(14 * MIB);
        builder.metadata_offset = Some(15 * MIB);
        builder.bat_offset = Some(16 * MIB);
    });
    fails_anywhere("compact", &image.build(), 1, &|files, progress| {
        let options = CompactOptions { filesystems: false, ..CompactOptions::default() };
        compact(files.open(true)?, &options, progress).map(drop)
    });
}

#[test]
fn merging_fails_anywhere() {
    let base = Arc::new(small().named("b.vhdx").build());
    let mask = SectorMask::new(|sector| sector % 3 == 0);
    let middle = ImageBuilder::new(6 * MIB, 1 << 20)
        .differencing(&base)
        .block(0, BlockSpec::partial(Content::pattern(21), mask.clone()))
        .block(1, BlockSpec::present(Content::pattern(22)))
        .named("m.vhdx");
    let child = ImageBuilder::new(4 * MIB, 1 << 20)
        .differencing(&Arc::new(middle.build()))
        .block(0, BlockSpec::partial(Content::pattern(31), mask))
        .block(2, BlockSpec::new(2))
        .build();
    for into in [1, 2] {
        fails_anywhere(&format!("merge into {into}"), &child, 61, &move |files, progress| {
            merge(files.open(false)?, &MergeOptions { into, replay: true, ..MergeOptions::default() }, progress)
                .map(drop)
        });
    }
}

#[test]
fn setting_fails_anywhere() {
    fails_anywhere("set", &small().build(), 1, &|files, _| {
        let item = UserItem { id: Guid::from_stored([7; 16]), value: Some(vec![7; 1 << 20]) };
        let disk_id = Some(Guid::from_stored([9; 16]));
        set(files.open(true)?, &SetOptions { disk_id, user_items: vec![item], ..SetOptions::default() }).map(drop)
    });
}

/// [MS-VHDX] 2.6.2.1, LeaveBlockAllocated: blocks of a fixed disk stay, and its file has room for all of them.
#[test]
fn the_blocks_of_a_fixed_disk_stay_allocated() {
    let fixed = small().with(|builder| builder.leave_blocks_allocated = true);
    for builder in [fixed.clone(), (0..6).fold(fixed, |builder, block| builder.block(block, BlockSpec::new(6)))] {
        let long = builder.with(|builder| builder.file_length = Some(40 * MIB));
        let bench = Bench::new(long.build());
        let expected = bench.disk();
        let options = CompactOptions::default();
        let report = compact(bench.open(true), &options, &()).unwrap();
        assert_eq!((report.zero_blocks, report.free_blocks, report.unneeded_blocks), (0, 0, 0));
        let allocated = 6 * MIB;
        let rest = 4 * MIB; // header section, log, metadata, BAT
        assert!(report.new_file_size >= allocated + rest, "{report:?}");
        expect_same(&bench.disk(), &expected);
        resize(bench.open(true), &ResizeOptions { allow_data_loss: true, ..ResizeOptions::to(3 * MIB) }, &()).unwrap();
        assert!(bench.storage.len().unwrap() >= 3 * MIB + rest);
        expect_same(&bench.disk(), &expected[..(3 * MIB) as usize]);
    }
}

/// More disk space than for one block is never needed.
#[test]
fn compacting_needs_room_for_one_block() {
    let builder = (0..10).fold(ImageBuilder::new(10 * MIB, 1 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(Content::pattern(block + 1)).at(40 + block))
    });
    let bench = Bench::new(builder.build());
    let expected = bench.disk();
    let faulty = Arc::new(FaultyStorage::new(Arc::clone(&bench.storage)));
    // One block, and the log.
    faulty.limit_space(MIB + MIB / 2, Space::Sparse);
    let image = bench.open_on(Arc::clone(&faulty) as Arc<dyn Storage>, true).unwrap();
    let options = CompactOptions { filesystems: false, ..CompactOptions::default() };
    let report = compact(image, &options, &()).unwrap();
    assert_eq!(report.moved, 10, "{report:?}");
    assert!(faulty.refused_for_space() > 0);
    expect_same(&bench.disk(), &expected);
    bench.expect_no_errors();
}

/// A chain of two, the child with a block of each kind.
fn pair(change: impl FnOnce(ImageBuilder) -> ImageBuilder) -> BuiltImage {
    let base = (0..8).fold(ImageBuilder::new(8 * MIB, 1 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(Content::pattern(block + 1)))
    });
    let child = ImageBuilder::new(8 * MIB, 1 << 20)
        .differencing(&Arc::new(base.named("b.vhdx").build()))
        .block(1, BlockSpec::present(Content::pattern(21)))
        .block(3, BlockSpec::partial(Content::pattern(22), SectorMask::new(|sector| sector % 3 == 0)))
        .block(5, BlockSpec::new(2));
    change(child).build()
}

fn merge_all(files: &Files) {
    let options = MergeOptions { into: 1, replay: true, ..MergeOptions::default() };
    merge(files.open(false).unwrap(), &options, &()).unwrap();
}

/// The child's log is put into place before its parent is written; from then on the log holds something else.
#[test]
fn a_child_is_merged_whose_structures_are_in_its_log() {
    let expected = Files::new(&pair(|child| child)).disk();
    for (seed, entries) in [(1, 1), (2, 2), (3, 3)] {
        let mut image = pair(|child| child);
        let clean = image.clone();
        let plan = DirtyPlan::new(seed).move_bat(&clean).move_bitmaps(&clean).with(|plan| {
            plan.entries = entries;
            plan.ring_start = 0;
        });
        plan.apply(&mut image);
        let files = Files::new(&image);
        expect_same(&files.disk(), &expected);
        merge_all(&files);
        expect_same(&files.disk(), &expected);
        expect_same(&Files(files.0[1..].to_vec()).disk(), &expected);
        files.expect_no_errors("dirty child");
    }
}

/// The child's metadata moves to a larger region for its new locator, and the parent gets the child's items from there.
#[test]
fn items_of_a_child_are_merged_whose_metadata_moves() {
    let id = vhdkit_testkit::Guid::seeded(77);
    let bytes: Vec<u8> = (0..978_944_u32).map(|number| (number % 251) as u8).collect();
    let files = Files::new(&pair(|child| child.item(ItemSpec::new(id, 3, &bytes))));
    let expected = files.disk();
    merge_all(&files);
    let alone = Files(files.0[1..].to_vec());
    expect_same(&alone.disk(), &expected);
    let found = user_item(&alone.open(false).unwrap().layers()[0], Guid::from_stored(id.0)).unwrap().unwrap();
    assert!(found == bytes, "the item has other bytes");
}
