//! Odd images and failing files under the operations that change the structure of an image.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::sync::Arc;

use vhdkit::format::finding::Severity;
use vhdkit::image::{BlockDevice as _, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::resize::{ResizeOptions, resize};
use vhdkit::storage::Storage;
use vhdkit_testkit::sim::{CrashImage, PageMap, SimStorage, frozen_parents};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, ImageBuilder, SectorMask};

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
