//! Random images against the model: every read and every extent must be what the description of the image says.
//!
//! A failure names the seed; `random_image(seed, options)` makes the same image again.
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

use model_support::{TestFile, expected, layers, open, right_extents, same_reads, try_open};
use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice, ExtentKind, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::Storage;
use vhdkit_testkit::BuiltImage;
use vhdkit_testkit::random::{RandomOptions, random_image};
use vhdkit_testkit::rng::Rng;

fn judge(name: &str, top: &BuiltImage, rng: &mut Rng) {
    let image = open(name, top);
    assert_eq!(image.layers().len(), top.depth(), "{name}");
    assert_eq!(image.logical_sector_size(), top.model.sector_size, "{name}");
    assert_eq!(image.allocation_unit(), u64::from(top.model.block_size), "{name}");
    same_reads(name, &image, top, rng, 25);
    right_extents(name, &image, top, rng, false);
}

fn judge_seeds(seeds: std::ops::Range<u64>, options: &RandomOptions) {
    for seed in seeds {
        judge(&format!("seed {seed} of {options:?}"), &random_image(seed, options), &mut Rng::new(seed));
    }
}

#[test]
fn single_images() {
    judge_seeds(0..60, &RandomOptions::default());
}

#[test]
fn images_with_4096_byte_sectors() {
    judge_seeds(0..20, &RandomOptions { logical_sector_size: Some(4096), ..RandomOptions::chain(2) });
}

#[test]
fn children_with_a_parent() {
    judge_seeds(0..50, &RandomOptions::chain(2));
}

#[test]
fn chains_of_several_layers() {
    for depth in 3..=5 {
        judge_seeds(0..12, &RandomOptions { blocks_max: 5, ..RandomOptions::chain(depth) });
    }
}

#[test]
fn small_blocks_over_many_chunks() {
    let options = RandomOptions {
        block_size: Some(1 << 20),
        virtual_size_max: 200 << 30,
        blocks_max: 24,
        ..RandomOptions::chain(2)
    };
    judge_seeds(0..15, &options);
}

/// Every image that the builder makes is legal, so the check must not call anything an error.
#[test]
fn check_finds_no_errors_in_legal_images() {
    for seed in 0..40 {
        for image in layers(&random_image(seed, &RandomOptions::chain(2))) {
            let storage: Arc<dyn Storage> = TestFile::new(&image.file);
            let report = check(&storage, None, &CheckOptions::default(), &()).unwrap();
            assert_eq!(report.errors, 0, "seed {seed}, {}: {:#?}", image.file_name, report.findings);
            let summary = report.summary.unwrap();
            let present = summary.blocks[4] + summary.blocks[5];
            let states = image.model.blocks.values().filter(|block| block.state >= 6).count() as u64;
            assert_eq!(present, states, "seed {seed}, {}", image.file_name);
        }
    }
}

/// What a layer alone says, and what it may not say: the data of a parent that was not opened.
#[test]
fn without_parents_only_own_data_is_given() {
    let mut refused = 0;
    for seed in 0..40 {
        let top = random_image(seed, &RandomOptions { blocks_max: 6, ..RandomOptions::chain(2) });
        let (image, chain) = (TestFile::new(&top.file), layers(&top));
        let image = OpenOptions::new().without_parents().open(image, None).unwrap();
        assert!(image.parents_missing());
        let mut rng = Rng::new(seed);
        let corners = model_support::corners(&top);
        for _ in 0..30 {
            let position = (rng.pick(&corners) + rng.below(3) * 512).min(top.model.virtual_size - 1) / 4096 * 4096;
            let mut sector = [0; 512];
            let result = image.read_at(&mut sector, position);
            let own = expected(&chain[..1], position);
            if own == (0, ExtentKind::Hole) {
                refused += 1;
                assert_eq!(result.unwrap_err().kind(), ErrorKind::ParentMissing, "seed {seed} at {position:#x}");
                let extents = image.visit_extents(position..position + 512, &mut |_| unreachable!());
                assert_eq!(extents.unwrap_err().kind(), ErrorKind::ParentMissing, "seed {seed} at {position:#x}");
            } else {
                result.unwrap();
                assert_eq!(sector.as_slice(), top.model.read(position, 512), "seed {seed} at {position:#x}");
            }
        }
    }
    assert!(refused > 100, "the images leave hardly anything to their parents");
}

/// One layer's own extents: what it leaves to its parent is a hole.
#[test]
fn layers_by_themselves_leave_holes() {
    for seed in 0..30 {
        let top = random_image(seed, &RandomOptions { virtual_size_max: 200 << 20, ..RandomOptions::chain(3) });
        let image = open("layers", &top);
        for (depth, layer) in layers(&top).into_iter().enumerate() {
            let size = layer.model.virtual_size;
            let mut extents = Vec::new();
            let result = image.visit_layer_extents(depth, 0..size, &mut |extent| {
                extents.push(*extent);
                std::ops::ControlFlow::Continue(())
            });
            result.unwrap();
            model_support::covers("layer", &extents, &(0..size));
            for extent in extents {
                assert_eq!(extent.layer, depth, "seed {seed}");
                let (_, kind) = expected(&[layer], extent.start);
                assert_eq!(extent.kind, kind, "seed {seed}, layer {depth}: {extent:x?}");
                let (_, last) = expected(&[layer], extent.end() - 1);
                assert_eq!(
                    std::mem::discriminant(&extent.kind),
                    std::mem::discriminant(&last),
                    "seed {seed}: {extent:x?}"
                );
            }
        }
        assert!(image.visit_layer_extents(3, 0..1, &mut |_| std::ops::ControlFlow::Continue(())).is_err());
    }
}

/// The comparison itself can fail: one wrong byte anywhere in the data is noticed.
#[test]
fn a_wrong_byte_is_noticed() {
    let options = RandomOptions { virtual_size_max: 30 << 20, torn: false, ..RandomOptions::default() };
    let mut top =
        (0..).map(|seed| random_image(seed, &options)).find(|image| !image.layout.payload.is_empty()).unwrap();
    let (block, offset) = top
        .layout
        .payload
        .iter()
        .map(|(block, offset)| (*block, *offset))
        .find(|(block, _)| top.model.blocks[block].state == 6 && !top.model.blocks[block].content.is_zero())
        .unwrap();
    let byte = top.file.read(offset, 1)[0];
    top.file.write(offset, &[!byte]);
    let image = try_open(&top, &OpenOptions::new()).unwrap();
    let at = block * top.layout.geometry.block_size;
    assert_ne!(model_support::read(&image, at, 512), top.model.read(at, 512));
}
