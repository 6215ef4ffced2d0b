//! One image, many threads: every read is right although all of them load the same pages at once.
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

use std::sync::{Arc, Barrier};

use model_support::{corners, extents, open, random_range, same_range};
use vhdkit::image::{BlockDevice, FileResolver, Image, OpenOptions};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::model::ZERO;
use vhdkit_testkit::random::{RandomOptions, random_image};
use vhdkit_testkit::rng::Rng;

const THREADS: u64 = 8;

/// Eight threads read random ranges of one image, started together so that nothing is cached yet.
fn hammer(name: &str, image: &Image, top: &BuiltImage, reads: usize) {
    let (corners, start) = (corners(top), Barrier::new(THREADS as usize));
    let whole = extents(image, 0..image.size());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (corners, start, whole) = (&corners, &start, &whole);
            scope.spawn(move || {
                let mut rng = Rng::new(thread);
                start.wait();
                for _ in 0..reads {
                    let (offset, length) = random_range(&mut rng, image.size(), corners);
                    same_range(name, image, &top.model, offset, length);
                }
                assert_eq!(extents(image, 0..image.size()), *whole, "{name}: extents in thread {thread}");
            });
        }
    });
}

fn fixed() -> BuiltImage {
    (0..20)
        .fold(ImageBuilder::new((20 << 20) + 512, 1 << 20), |builder, block| builder.pattern_block(block, block))
        .fixed()
        .scatter(3)
        .build()
}

fn dynamic() -> BuiltImage {
    let builder = ImageBuilder::new(30 << 30, 1 << 20).block(7, BlockSpec::new(ZERO));
    (0..60).fold(builder, |builder, block| builder.pattern_block(block * 511, block)).scatter(5).build()
}

fn chain() -> BuiltImage {
    let parent = Arc::new(
        (0..12)
            .fold(ImageBuilder::new(24 << 20, 2 << 20), |builder, block| builder.pattern_block(block, block))
            .named("base.vhdx")
            .build(),
    );
    let middle =
        (0..20).step_by(2).fold(ImageBuilder::new(22 << 20, 1 << 20).differencing(&parent), |builder, block| {
            builder.block(block, BlockSpec::partial(Content::pattern(50 + block), SectorMask::random(block, 5, 50)))
        });
    let middle = Arc::new(middle.named("middle.avhdx").build());
    let top = (0..6).fold(ImageBuilder::new(30 << 20, 4 << 20).differencing(&middle), |builder, block| {
        builder.block(block, BlockSpec::partial(Content::pattern(90 + block), SectorMask::random(block, 3, 30)))
    });
    top.named("top.avhdx").build()
}

#[test]
fn fixed_dynamic_and_chain_in_memory() {
    for (name, image) in [("fixed", fixed()), ("dynamic", dynamic()), ("chain", chain())] {
        hammer(name, &open(name, &image), &image, 60);
    }
}

#[test]
fn fixed_dynamic_and_chain_in_files() {
    for (name, built) in [("fixed", fixed()), ("dynamic", dynamic()), ("chain", chain())] {
        let directory = tempfile::tempdir().unwrap();
        let path = built.write_chain(directory.path()).unwrap();
        let parents = Arc::new(FileResolver::new().allow_own_directory());
        let image = OpenOptions::new().parents(parents).open_path(&path).unwrap();
        assert_eq!(image.layers().len(), built.depth());
        hammer(name, &image, &built, 60);
    }
}

#[test]
fn random_chains() {
    for seed in 500..506 {
        let built = random_image(seed, &RandomOptions { virtual_size_max: 1 << 30, ..RandomOptions::chain(3) });
        hammer(&format!("seed {seed}"), &open("random", &built), &built, 15);
    }
}

#[test]
fn an_image_moves_between_threads() {
    fn is_shareable<T: Send + Sync + 'static>(_: &T) {}
    let built = dynamic();
    let image = open("dynamic", &built);
    is_shareable(&image);
    let boxed: Box<dyn BlockDevice> = Box::new(image);
    std::thread::spawn(move || same_range("boxed", boxed.as_ref(), &built.model, 511 << 20, 4096)).join().unwrap();
}
