//! Repair gives no block up, and hides none, whose data may still be in the file: `recover` can find it, repair cannot know.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::sync::Arc;

use vhdkit::ops::repair::{RepairOptions, RepairPlan, plan};
use vhdkit::storage::Storage;
use vhdkit_testkit::sim::{PageMap, SimStorage};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, ImageBuilder, SectorMask};

const MIB: u64 = 1 << 20;

fn sparse(seed: u64) -> BlockSpec {
    BlockSpec::present(Content::Sparse { seed, stride: 7 })
}

fn planned(image: &BuiltImage) -> RepairPlan {
    let storage: Arc<dyn Storage> = Arc::new(SimStorage::from_pages(PageMap::from(&image.file)));
    plan(&storage, None, &RepairOptions::default(), &()).unwrap()
}

/// The plan leaves the finding, with advice, and does not say that all is mended.
#[track_caller]
fn left_alone(image: &BuiltImage) {
    let plan = planned(image);
    assert!(!plan.mends_everything(), "{:?}", plan.after.findings);
    assert!(!plan.left.is_empty() && plan.left.iter().all(|left| !left.advice.is_empty()));
}

/// The same image with entries of its BAT changed.
fn with_entry(builder: &ImageBuilder, index: u64, change: impl Fn(u64) -> u64) -> BuiltImage {
    let offset = builder.build().layout.payload_block(index);
    let changed = builder.clone().with(|builder| {
        builder.bat_raw.insert(index, change(offset | 6));
    });
    changed.build()
}

#[test]
fn an_entry_that_points_into_a_region_may_have_lost_its_block() {
    let builder = ImageBuilder::new(96 * MIB, 32 << 20).block(0, sparse(1)).block(1, sparse(2)).block(2, sparse(3));
    assert!(planned(&builder.build()).mends_everything());
    for place in [2, 3] {
        left_alone(&with_entry(&builder, 0, |entry| entry & 0xf | (place * MIB)));
    }
}

#[test]
fn an_entry_outside_of_the_file_is_not_taken_for_a_cut_file() {
    let builder = ImageBuilder::new(16 * MIB, 1 << 20).block(0, sparse(1)).block(1, sparse(2)).block(5, sparse(3));
    for bit in 23..28 {
        left_alone(&with_entry(&builder, 0, |entry| entry ^ (1 << bit)));
    }
}

#[test]
fn a_state_of_old_writers_may_be_one_bit_off() {
    let parent = ImageBuilder::new(16 * MIB, 1 << 20).block(6, sparse(9)).named("p.vhdx").build();
    let mask = SectorMask::new(|sector| sector % 3 == 0);
    let partial = BlockSpec::partial(Content::Sparse { seed: 4, stride: 3 }, mask);
    let builder = ImageBuilder::new(16 * MIB, 1 << 20).differencing(&Arc::new(parent)).block(6, partial);
    left_alone(&with_entry(&builder, 6, |entry| (entry & !0xf) | 5));
}

#[test]
fn two_blocks_at_one_place_may_have_left_a_third() {
    let builder = ImageBuilder::new(16 * MIB, 1 << 20).block(0, sparse(1)).block(1, sparse(2)).block(2, sparse(3));
    let other = builder.build().layout.payload_block(1);
    left_alone(&with_entry(&builder, 0, |entry| (entry & 0xf) | other));
}

/// A disk whose last block is half behind its end, in a file that ends with the disk: a valid image.
#[test]
fn the_last_block_may_reach_over_the_end_of_the_file() {
    let half = MIB / 2;
    let builder = ImageBuilder::new(10 * MIB + half, 1 << 20).block(0, sparse(1)).block(10, sparse(2));
    let parent = Arc::new(ImageBuilder::new(10 * MIB + half, 1 << 20).named("p.vhdx").build());
    let child = builder.clone().differencing(&parent);
    let cut = |image: &BuiltImage| {
        let sim = SimStorage::from_pages(PageMap::from(&image.file));
        sim.set_len(image.layout.payload_block(10) + half).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(sim);
        plan(&storage, None, &RepairOptions::default(), &()).unwrap()
    };
    let sound = cut(&builder.build());
    assert!(sound.actions.iter().all(|action| action.lost.is_none()), "{:?}", sound.actions);
    for (number, builder, flip) in
        [(0, &child, 7 ^ 6 ^ 5), (1, &child, 2 ^ 6), (2, &builder, 2 ^ 6), (3, &builder, 0x10), (4, &builder, 4 ^ 6)]
    {
        let plan = cut(&with_entry(builder, 10, |entry| if number == 0 { (entry & !7) | 5 } else { entry ^ flip }));
        let changed = plan.actions.iter().any(|action| action.what.contains("UN") || action.what.contains("offset"));
        assert!(!plan.mends_everything() && !changed, "{number}: {:?}", plan.actions);
    }
}
