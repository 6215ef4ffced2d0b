//! A stranger reads what the builder and the log crafter make: QEMU and 7-Zip must see the bytes of the model.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::path::Path;
use std::sync::Arc;

use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::dirty::{DirtyPlan, Stale};
use vhdkit_testkit::foreign::{self, assert_success, qemu_img, run_tool};
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::harness::{Case, Needs, main_with};
use vhdkit_testkit::model::{UNDEFINED, UNMAPPED, ZERO};
use vhdkit_testkit::random::{RandomOptions, random_dirty_plan, random_image};

fn qemu_agrees(name: &str, image: &BuiltImage) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vhdx");
    image.write_to(&path).unwrap();
    let check = qemu_img(&["check", "-f", "vhdx", path.to_str().unwrap()]);
    assert!(check.status.success(), "{name}: check: {}", String::from_utf8_lossy(&check.stderr));
    compare(name, image, &path, directory.path());
}

fn compare(name: &str, image: &BuiltImage, path: &Path, directory: &Path) {
    let raw = directory.join("image.raw");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let convert = qemu_img(&["convert", "-f", "vhdx", "-O", "raw", from, to]);
    assert!(convert.status.success(), "{name}: convert: {}", String::from_utf8_lossy(&convert.stderr));
    if let Err(difference) = image.model.compare_raw(&raw) {
        panic!("{name}: {difference}");
    }
}

fn qemu_replays(name: &str, clean: &BuiltImage, plan: &DirtyPlan) {
    let mut image = clean.clone();
    plan.apply(&mut image);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vhdx");
    image.write_to(&path).unwrap();
    let read_only = qemu_img(&["check", "-f", "vhdx", path.to_str().unwrap()]);
    let complaint = String::from_utf8_lossy(&read_only.stderr);
    assert!(complaint.contains("log"), "{name}: QEMU does not see a log to replay: {complaint}");
    let repair = qemu_img(&["check", "-r", "all", "-f", "vhdx", path.to_str().unwrap()]);
    assert!(repair.status.success(), "{name}: repair: {}", String::from_utf8_lossy(&repair.stderr));
    compare(name, &image, &path, directory.path());
}

fn dynamic() -> BuiltImage {
    ImageBuilder::new((6 << 30) + 512, 1 << 20)
        .pattern_block(0, 1)
        .block(1, BlockSpec::present(Content::Fill(0x5A)))
        .block(2, BlockSpec::new(ZERO))
        .block(3, BlockSpec::anchored(UNMAPPED, Content::pattern(2)))
        .block(4, BlockSpec::anchored(UNDEFINED, Content::pattern(3)))
        .block(5, BlockSpec::present(Content::bytes(b"bytes")))
        .pattern_block(4095, 4)
        .pattern_block(4096, 5)
        .pattern_block(6144, 6)
        .build()
}

fn plain_kinds() {
    qemu_agrees("dynamic", &dynamic());
    qemu_agrees("empty", &ImageBuilder::new(1 << 30, 32 << 20).build());
    qemu_agrees("fixed", &ImageBuilder::new((9 << 20) + 512, 2 << 20).pattern_block(4, 1).fixed().build());
    let scattered = (0..12).fold(ImageBuilder::new(24 << 20, 2 << 20), ImageBuilder::pattern_block_of_index);
    qemu_agrees("scattered", &scattered.scatter(9).build());
    let huge = ImageBuilder::new(63 << 40, 256 << 20)
        .block((63 << 12) - 1, BlockSpec::present(Content::Sparse { seed: 1, stride: 4001 }).at(15 << 20));
    let image = huge.build();
    assert_eq!(image.layout.payload_block((63 << 12) - 1), 15 << 40);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("huge.vhdx");
    image.write_to(&path).unwrap();
    assert_success(&qemu_img(&["check", "-f", "vhdx", path.to_str().unwrap()]));
}

trait PatternOfIndex {
    fn pattern_block_of_index(self, index: u64) -> Self;
}

impl PatternOfIndex for ImageBuilder {
    fn pattern_block_of_index(self, index: u64) -> Self {
        self.pattern_block(index, 100 + index)
    }
}

fn random_images() {
    for seed in 0..25 {
        qemu_agrees(&format!("seed {seed}"), &random_image(seed, &RandomOptions::for_qemu()));
    }
}

fn dirty_logs() {
    let clean = dynamic();
    let layout = clean.layout.clone();
    let plan = || DirtyPlan::new(7).move_bat(&clean);
    assert!(plan().pages.len() > 1, "the BAT has several pages in use");
    qemu_replays("one entry", &clean, &plan());
    qemu_replays("several entries", &clean, &plan().with(|plan| plan.entries = 3));
    qemu_replays("wrap", &clean, &plan().with(|plan| plan.ring_start = (1 << 20) - 4096));
    qemu_replays("older generations", &clean, &plan().with(|plan| plan.older_generations = 2));
    qemu_replays(
        "everything",
        &clean,
        &plan().move_metadata(&clean).move_region_tables(&clean).with(|plan| {
            plan.stale = Stale::Zeros;
            plan.entries = 4;
            plan.empty_first = true;
            plan.supersede = true;
            plan.retired = 2;
            plan.gap = 8192;
        }),
    );
    let zeroed = clean.layout.payload_block(5) + 4096;
    qemu_replays(
        "zero descriptors and payload pages",
        &clean,
        &plan().move_range(&clean, layout.payload_block(0), 65_536).with(|plan| {
            plan.zero_ranges = vec![(zeroed, 3 * 4096)];
            plan.stale = Stale::Junk;
        }),
    );
}

/// Without replay the image is another one: otherwise the cases above would prove nothing.
fn unreplayed_logs_matter() {
    let clean = dynamic();
    let mut image = clean.clone();
    DirtyPlan::new(1).move_bat(&clean).apply(&mut image);
    for slot in 0..2 {
        vhdkit_testkit::dirty::edit_header(&mut image, slot, |header| header[48..64].copy_from_slice(&Guid::ZERO.0));
    }
    let directory = tempfile::tempdir().unwrap();
    let (path, raw) = (directory.path().join("image.vhdx"), directory.path().join("image.raw"));
    image.write_to(&path).unwrap();
    assert_success(&qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]));
    assert!(image.model.compare_raw(&raw).is_err());
}

fn random_dirty_logs() {
    for seed in 0..20 {
        let clean = random_image(1000 + seed, &RandomOptions { blocks_max: 6, ..RandomOptions::for_qemu() });
        let mut plan = random_dirty_plan(seed, &clean);
        // QEMU replays from the start of the run and ranks runs by their first number, so these are beyond it.
        plan.older_run = false;
        qemu_replays(&format!("seed {seed}"), &clean, &plan);
    }
}

/// 7-Zip reads what QEMU does not: parents, and sectors of 4096 bytes.
fn seven_zip_reads_chains() {
    for (sector_size, seed) in [(512, 11), (4096, 12)] {
        let base = (0..7).fold(ImageBuilder::new(8 << 20, 1 << 20), ImageBuilder::pattern_block_of_index);
        let base = Arc::new(base.sector_sizes(sector_size, 4096).named("base.vhdx").scatter(seed).build());
        let mask = SectorMask::random(seed, 3, 50);
        let child = ImageBuilder::new(8 << 20, 2 << 20)
            .sector_sizes(sector_size, 4096)
            .differencing(&base)
            .block(0, BlockSpec::partial(Content::pattern(50), mask.clone()))
            .block(1, BlockSpec::present(Content::pattern(51)).with_mask(SectorMask::none()))
            .block(2, BlockSpec::new(ZERO).with_mask(mask))
            .block(3, BlockSpec::partial(Content::pattern(52), SectorMask::random(seed + 1, 8, 30)))
            .named("child.vhdx")
            .scatter(seed)
            .build();
        let directory = tempfile::tempdir().unwrap();
        let path = child.write_chain(directory.path()).unwrap();
        let output = run_tool("7z", &["x", "-so", "-tvhdx", path.to_str().unwrap()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout.len() as u64, child.model.virtual_size);
        let read = |offset: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&output.stdout[offset as usize..][..buffer.len()]);
            Ok(())
        };
        if let Err(difference) = child.model.compare_with(read) {
            panic!("sectors of {sector_size}: {difference}");
        }
    }
}

fn corpus_unpacks() {
    let directory = tempfile::tempdir().unwrap();
    let rows = foreign::corpus_manifest();
    assert!(rows.len() > 10);
    for row in rows.iter().filter(|row| row.kind == "differencing" || row.dirty) {
        let path = foreign::unpack(row, directory.path());
        assert_eq!(foreign::sha256_file(&path).unwrap(), row.file_sha256);
        if let Some(parent) = &row.parent {
            assert!(directory.path().join(parent).is_file());
        }
    }
}

fn main() {
    let qemu = || Needs::tools(&["qemu-img"]);
    main_with(vec![
        Case::new("plain_kinds", qemu(), plain_kinds),
        Case::new("random_images", qemu(), random_images),
        Case::new("dirty_logs", qemu(), dirty_logs),
        Case::new("unreplayed_logs_matter", qemu(), unreplayed_logs_matter),
        Case::new("random_dirty_logs", qemu(), random_dirty_logs),
        Case::new("seven_zip_reads_chains", Needs::tools(&["7z"]), seven_zip_reads_chains),
        Case::new("corpus_unpacks", Needs::nothing().and_corpus(), corpus_unpacks),
    ]);
}
