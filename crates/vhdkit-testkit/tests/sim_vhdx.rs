//! The judge of VHDX images: what is in order passes, dirty or not, and each kind of damage is named; a replay in place
//! that is right survives second cuts, and wrong ones are found.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::sync::Arc;
use std::time::Instant;

use vhdkit::storage::Storage;
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{
    Campaign, Case, CrashImage, ImageJudge, Lab, PageMap, Replay, SectorHistory, Setup, frozen_parents, verify_image,
    verify_view,
};
use vhdkit_testkit::{
    BlockSpec, BuiltImage, Checksum, Content, DirtyPlan, ImageBuilder, RandomOptions, SectorMask, random_dirty_plan,
    random_image,
};

const MIB: u64 = 1 << 20;

fn sparse(seed: u64) -> BlockSpec {
    BlockSpec::present(Content::Sparse { seed, stride: 97 })
}

/// Blocks 0 to 4 of 64; the last one is mapped and holds nothing.
fn small() -> BuiltImage {
    let builder = ImageBuilder::new(64 * MIB, 1 << 20);
    let builder = (0..4).fold(builder, |builder, block| builder.block(block, sparse(block + 1)));
    builder.block(4, BlockSpec::present(Content::Zero)).build()
}

fn chain() -> BuiltImage {
    let parent = ImageBuilder::new(64 * MIB, 2 << 20).block(0, sparse(9)).block(3, sparse(10)).named("p.vhdx").build();
    ImageBuilder::new(64 * MIB, 1 << 20)
        .differencing(&Arc::new(parent))
        .block(0, BlockSpec::partial(Content::Sparse { seed: 11, stride: 13 }, SectorMask::new(|sector| sector < 100)))
        .block(6, sparse(12))
        .named("c.vhdx")
        .build()
}

fn image_of(built: &BuiltImage) -> CrashImage {
    CrashImage::new(PageMap::from(&built.file))
}

fn judge_of(built: &BuiltImage) -> ImageJudge {
    let parents = std::iter::successors(built.parent.as_deref(), |parent| parent.parent.as_deref());
    ImageJudge { parents: Some(frozen_parents(parents.map(image_of).collect())), ..ImageJudge::default() }
}

fn verify(built: &BuiltImage, history: &SectorHistory) -> Result<u64, String> {
    verify_view(&image_of(built).storage(), history, &judge_of(built))
}

#[test]
fn images_in_order_pass_alone_and_in_chains_clean_and_dirty() {
    for clean in [small(), chain()] {
        let history = SectorHistory::of_model(&clean.model);
        let digest = verify(&clean, &history).unwrap();
        for seed in 0..20 {
            let mut dirty = clean.clone();
            DirtyPlan::new(seed).move_bat(&clean).move_bitmaps(&clean).move_metadata(&clean).apply(&mut dirty);
            assert_eq!(verify(&dirty, &history), Ok(digest), "a dirty log is a note");
        }
    }
}

#[test]
fn random_images_and_dirty_logs_pass() {
    let options =
        RandomOptions { virtual_size_max: 1 << 30, blocks_max: 4, torn: false, junk: false, ..RandomOptions::chain(2) };
    let mut judged = 0;
    for seed in 0..30 {
        let mut image = random_image(seed, &options);
        let history = SectorHistory::of_model(&image.model);
        // Foreign writers leave things behind that `check` warns about; what our own writer may leave is stricter.
        let before = match verify(&image, &history) {
            Err(error) if error.starts_with("check: warning") => continue,
            other => other.unwrap(),
        };
        random_dirty_plan(seed, &image).apply(&mut image);
        assert_eq!(verify(&image, &history), Ok(before), "seed {seed}");
        judged += 1;
    }
    assert!(judged >= 10, "{judged}");
}

/// The error for an image after a change to its bytes.
fn damaged(change: impl FnOnce(&mut BuiltImage)) -> String {
    let mut image = small();
    let mut history = SectorHistory::of_model(&image.model);
    // Some stamps, as a program would have written them: sectors 40 of blocks 0 and 1, flushed.
    for sector in [40, 2048 + 40] {
        let (ticket, bytes) = history.start_write(sector, 1);
        history.finish(ticket);
        let place = image.layout.payload_block(sector / 2048) + 40 * 512;
        image.file.write(place, &bytes);
    }
    let flush = history.start_flush();
    history.finish_flush(flush);
    verify(&image, &history).unwrap();
    change(&mut image);
    verify(&image, &history).unwrap_err()
}

fn assert_says(error: &str, wanted: &str) {
    assert!(error.contains(wanted), "{wanted:?} is not in: {error}");
}

#[test]
fn damage_is_named() {
    let place = |image: &BuiltImage, block: u64, sector: u64| image.layout.payload_block(block) + sector * 512;
    let lost = damaged(|image| image.file.zero(place(image, 0, 40), 512));
    assert_says(&lost, "sector 40 is zero; allowed: version 1 (written)");
    let swapped = damaged(|image| {
        let (a, b) = (image.layout.payload_entry(0), image.layout.payload_entry(1));
        let (first, second) = (image.file.read_u64(a), image.file.read_u64(b));
        image.file.write_u64(a, second);
        image.file.write_u64(b, first);
    });
    assert_says(&swapped, "sector 0 is zero; allowed: bytes with the hash");
    let moved = damaged(|image| {
        let stamp = image.file.read(place(image, 1, 40), 512);
        image.file.write(place(image, 0, 40), &stamp);
    });
    assert_says(&moved, "sector 40 holds version 3 of sector 2088, which does not belong here");
    let stale = damaged(|image| image.file.write(place(image, 4, 1000), &[7; 512]));
    assert_says(&stale, "sector 9192 holds garbage; allowed: zero (at the start)");
    let torn = damaged(|image| image.file.write(place(image, 0, 40) + 100, b"x"));
    assert_says(&torn, "sector 40 holds garbage");
    let twice = damaged(|image| {
        let entry = image.file.read_u64(image.layout.payload_entry(4));
        image.file.write_u64(image.layout.payload_entry(5), entry);
    });
    assert_says(&twice, "check: error: ");
    let cut = damaged(|image| image.file.set_len(image.file.len() - MIB));
    assert!(!cut.is_empty());
    let header = damaged(|image| image.file.write(image.layout.header(0) + 20, b"x"));
    assert_says(&header, "check: warning: ");
}

#[test]
fn what_is_tolerated_is_said() {
    let mut image = small();
    let header = image.layout.header(0) + 20;
    image.file.write(header, b"x");
    let history = SectorHistory::of_model(&image.model);
    assert!(verify(&image, &history).is_err());
    let tolerated = vec![vhdkit::format::finding::Code::HeaderCopyDamaged];
    let judge = ImageJudge { tolerated, ..judge_of(&image) };
    verify_view(&image_of(&image).storage(), &history, &judge).unwrap();
}

#[test]
fn the_parents_of_a_child_show_through_and_are_not_forgotten() {
    let built = chain();
    let history = SectorHistory::of_model(&built.model);
    // A child that has lost its bitmap bits shows the parent where its own data should be.
    let mut child = built.clone();
    let bits = child.layout.block_bits(0);
    child.file.zero(bits, 8);
    assert!(verify(&child, &history).is_err());
    // Without its parent it does not open.
    let alone = verify_view(&image_of(&built).storage(), &history, &ImageJudge::default());
    assert_says(&alone.unwrap_err(), "does not open");
}

/// How a replay in place goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReplayMistake {
    None,
    ClearedTooEarly,
    HalfForgotten,
}

/// A replay in place for a dirty image whose true pages are known, with the order of `docs/format.md`.
fn replay_of(clean: &BuiltImage, plan: &DirtyPlan, mistake: ReplayMistake) -> Replay {
    let pages: Vec<(u64, Vec<u8>)> = plan.pages.iter().map(|page| (*page, clean.file.read(*page, 4096))).collect();
    let headers = [clean.layout.header(0), clean.layout.header(1)];
    Arc::new(move |storage: Arc<dyn Storage>| {
        let read = |at: u64| {
            let mut bytes = vec![0; 4096];
            storage.read_at(&mut bytes, at).unwrap();
            bytes
        };
        let sequence = |header: &[u8]| u64::from_le_bytes(header[8..16].try_into().unwrap());
        let mut order = headers;
        order.sort_by_key(|at| sequence(&read(*at)));
        let current = read(order[1]);
        if current[48..64] == [0; 16] {
            return Ok(());
        }
        let kept = if mistake == ReplayMistake::HalfForgotten { pages.len() / 2 } else { pages.len() };
        for (at, bytes) in &pages[..kept] {
            storage.write_at(bytes, *at).unwrap();
        }
        if mistake != ReplayMistake::ClearedTooEarly {
            storage.sync().unwrap();
        }
        for (number, at) in order.iter().enumerate() {
            let mut header = current.clone();
            header[8..16].copy_from_slice(&(sequence(&current) + 1 + number as u64).to_le_bytes());
            header[48..64].fill(0);
            Checksum::Correct.apply(&mut header);
            storage.write_at(&header, *at).unwrap();
            storage.sync().unwrap();
        }
        Ok(())
    })
}

fn replayed(mistake: ReplayMistake, second_cuts: usize) -> Result<usize, String> {
    let mut images = 0;
    for (seed, clean) in (0..).zip([small(), chain()]) {
        let plan = DirtyPlan::new(seed).move_bat(&clean).move_bitmaps(&clean).move_metadata(&clean);
        let mut dirty = clean.clone();
        plan.apply(&mut dirty);
        let replay = Some(replay_of(&clean, &plan, mistake));
        let judge = ImageJudge { replay, replay_percent: 100, second_cuts, ..judge_of(&clean) };
        let mut case = Case::new(seed);
        verify_image(&image_of(&dirty), &SectorHistory::of_model(&clean.model), &judge, &mut case)?;
        images += case.counted().len();
    }
    Ok(images)
}

#[test]
fn a_right_replay_in_place_survives_second_cuts() {
    assert_eq!(replayed(ReplayMistake::None, 100), Ok(200));
}

#[test]
fn wrong_replays_in_place_are_found() {
    let forgotten = replayed(ReplayMistake::HalfForgotten, 0).unwrap_err();
    assert_says(&forgotten, "after replay in place");
    assert_eq!(replayed(ReplayMistake::ClearedTooEarly, 0), Ok(0), "only a second cut shows it");
    let early = replayed(ReplayMistake::ClearedTooEarly, 100).unwrap_err();
    assert_says(&early, "second cut, while replaying");
}

/// Writes to mapped blocks, in place, as the format needs no log for; `shift` is a mistake in the arithmetic.
fn in_place(rng: &mut Rng, lab: &Lab, shift: u64) -> Result<(), String> {
    let built = small();
    let history = SectorHistory::of_model(&built.model);
    let setup = Setup {
        file: PageMap::from(&built.file),
        history,
        judge: Arc::new(judge_of(&built)),
        phase_source: || "payload",
    };
    let sim = lab.start(setup);
    for _ in 0..40 {
        if sim.is_over() {
            break;
        }
        if rng.chance(20) {
            sim.step("flush");
            let flush = sim.history().start_flush();
            sim.storage().sync().map_err(|error| error.to_string())?;
            sim.history().finish_flush(flush);
            continue;
        }
        let (block, sector, count) = (rng.below(5), rng.below(2000), rng.between(1, 40));
        sim.step(format!("write {count} sectors at {sector} of block {block}"));
        let (ticket, bytes) = sim.history().start_write(block * 2048 + sector, count);
        let place = built.layout.payload_block(block) + (sector + shift) * 512;
        sim.storage().write_at(&bytes, place).map_err(|error| error.to_string())?;
        sim.history().finish(ticket);
    }
    Ok(())
}

#[test]
fn a_campaign_over_real_images_is_clean_and_bites() {
    let campaign = Campaign { distinct_max: Some(3000), ..Campaign::default() };
    let begun = Instant::now();
    let report = campaign.run(&|rng: &mut Rng, lab: &Lab| in_place(rng, lab, 0));
    println!("{report}\n{} us for each image", begun.elapsed().as_micros() as u64 / report.total().distinct);
    report.expect_clean();
    assert!(report.total().distinct >= 3000);
    let wrong = campaign.run(&|rng: &mut Rng, lab: &Lab| in_place(rng, lab, 1));
    let violation = wrong.violation.expect("a write to the wrong sector");
    assert_says(&violation.message, "which does not belong here");
}

#[test]
fn judging_is_fast() {
    let clean = small();
    let plan = DirtyPlan::new(3).move_bat(&clean).move_metadata(&clean);
    let mut dirty = clean.clone();
    plan.apply(&mut dirty);
    let history = SectorHistory::of_model(&clean.model);
    for (name, built) in [("clean", &clean), ("dirty", &dirty)] {
        let (image, judge) = (image_of(built), judge_of(built));
        let begun = Instant::now();
        for _ in 0..200 {
            verify_view(&image.storage(), &history, &judge).unwrap();
        }
        let each = begun.elapsed().as_micros() / 200;
        println!("{name}: {each} us for each image");
        assert!(each < 20_000, "{name}: {each} us"); // far from the aim, so that a busy machine does not fail it
    }
}
