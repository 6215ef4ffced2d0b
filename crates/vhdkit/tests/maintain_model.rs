//! Random images resized, compacted, merged, set and given other parents, against the model of what their disks hold.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::format::finding::Severity;
use vhdkit::format::guid::Guid;
use vhdkit::format::metadata::DiskType;
use vhdkit::image::{BlockDevice as _, ExtentKind, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::compact::{CompactOptions, compact};
use vhdkit::ops::merge::{MergeOptions, merge};
use vhdkit::ops::reparent::{ReparentOptions, reparent};
use vhdkit::ops::resize::{ResizeOptions, resize};
use vhdkit::ops::set::{SetOptions, UserItem, set, user_item};
use vhdkit::storage::Storage;
use vhdkit_testkit::model::ModelDisk;
use vhdkit_testkit::random::{RandomOptions, random_dirty_plan, random_image};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{CrashImage, PageMap, SimStorage, frozen_parents};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, ImageBuilder};

const MIB: u64 = 1 << 20;

/// The files of a chain, the image itself first.
struct Chain {
    files: Vec<Arc<SimStorage>>,
    models: Vec<ModelDisk>,
}

impl Chain {
    fn new(image: &BuiltImage) -> Self {
        let images = std::iter::successors(Some(image), |image| image.parent.as_deref());
        let (files, models) = images
            .map(|image| (Arc::new(SimStorage::from_pages(PageMap::from(&image.file))), image.model.clone()))
            .unzip();
        Self { files, models }
    }

    fn open(&self, depth: usize, write: bool) -> Image {
        self.try_open(depth, write).unwrap()
    }

    /// The layer at a depth, on those below.
    fn try_open(&self, depth: usize, write: bool) -> vhdkit::Result<Image> {
        let options =
            OpenOptions::new().write(write).replay(write).parents(Arc::new(Below(self.files[depth + 1..].to_vec())));
        options.open(Arc::clone(&self.files[depth]) as Arc<dyn Storage>, None)
    }
}

/// Gives files as parents, by depth.
#[derive(Debug)]
struct Below(Vec<Arc<SimStorage>>);

impl ParentResolver for Below {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> vhdkit::Result<Vec<ParentCandidate>> {
        let storage = self.0.get(wanted.depth).map(|storage| Arc::clone(storage) as Arc<dyn Storage>);
        Ok(storage
            .into_iter()
            .map(|storage| ParentCandidate { storage, path: None, named: true, lock: None })
            .collect())
    }
}

fn options(rng: &mut Rng, depth: usize) -> RandomOptions {
    let block_size = rng.pick(&[None, Some(1 << 20), Some(2 << 20)]);
    // The model of a long chain takes its time.
    let virtual_size_max = if depth > 2 { 300 << 20 } else { 5 << 30 };
    RandomOptions { depth, block_size, virtual_size_max, ..RandomOptions::default() }
}

/// A random chain of which every layer may be written (some have headers that cannot be raised any more).
fn built(seed: u64, depth: usize) -> BuiltImage {
    let mut rng = Rng::new(seed);
    loop {
        let seed = rng.next_u64();
        let mut image = random_image(seed, &options(&mut rng, depth));
        if rng.chance(20) {
            random_dirty_plan(seed, &image).apply(&mut image);
        }
        let chain = Chain::new(&image);
        if (0..depth).all(|layer| chain.try_open(layer, true).is_ok()) {
            return image;
        }
    }
}

/// What the disk holds is what the model does as far as both reach, and zero behind.
fn expect_disk(image: &Image, model: &ModelDisk, limit: u64, what: &str) {
    let limit = limit.min(model.virtual_size).min(image.size());
    let mut pieces: Vec<Range<u64>> = Vec::new();
    let add = |pieces: &mut Vec<Range<u64>>, range: Range<u64>| {
        let cuts = (range.start / MIB + 1..range.end.div_ceil(MIB)).map(|mebibyte| mebibyte * MIB);
        let ends: Vec<u64> = cuts.chain([range.end]).collect();
        let mut start = range.start;
        for end in ends {
            pieces.push(start..end);
            start = end;
        }
    };
    for start in (0..limit.div_ceil(MIB)).map(|mebibyte| mebibyte * MIB) {
        let end = (start + MIB).min(limit);
        if !model.is_surely_zero(start, end - start) {
            pieces.push(start..end);
        }
    }
    let visited = image.visit_extents(0..image.size(), &mut |extent| {
        if matches!(extent.kind, ExtentKind::Data { .. }) {
            add(&mut pieces, extent.start..extent.end());
        }
        ControlFlow::Continue(())
    });
    visited.unwrap();
    let mut buffer = vec![0; MIB as usize];
    for range in pieces {
        let part = &mut buffer[..(range.end - range.start) as usize];
        image.read_at(part, range.start).unwrap();
        let within = range.end.min(limit).saturating_sub(range.start);
        let mut expected = model.read_clipped(range.start, within as usize);
        expected.resize(part.len(), 0);
        let wrong = part.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{what}: byte {:#x} of the disk", range.start + wrong.unwrap_or(0) as u64);
    }
}

/// Findings above note.
fn loud(storage: &Arc<SimStorage>) -> Vec<String> {
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    let report = check(&storage, None, &CheckOptions::default(), &()).unwrap();
    let loud = report.findings.iter().filter(|finding| finding.severity() > Severity::Note);
    loud.map(|finding| finding.code().as_str().to_owned()).collect()
}

/// Nothing is wrong that was not wrong before, and the log is clean.
fn expect_clean(storage: &Arc<SimStorage>, before: &[String], what: &str) {
    let after = loud(storage);
    assert!(after.iter().all(|code| before.contains(code)), "{what}: {after:?}, before {before:?}");
    let image = OpenOptions::new().without_parents().write(true).open(Arc::clone(storage) as Arc<dyn Storage>, None);
    drop(image.unwrap_or_else(|error| panic!("{what}: cannot be written afterwards: {error}")));
}

fn new_size(rng: &mut Rng, old: u64, sector: u64, fixed: bool) -> u64 {
    let drawn = match rng.below(if fixed { 2 } else { 6 }) {
        0 if fixed => old + rng.below(2 << 30),
        1 if fixed => rng.below(old),
        0 => old + sector * rng.between(1, 300),
        1 => old + rng.below(64 * MIB),
        2 => old + rng.below(300 << 30),
        3 => old.saturating_sub(sector * rng.between(1, 300)),
        4 => rng.below(old),
        _ => 1 << rng.between(20, 40),
    };
    (drawn / sector * sector).max(sector)
}

fn programs() -> u64 {
    if cfg!(debug_assertions) { 45 } else { 100 }
}

#[test]
fn a_resized_disk_holds_what_both_sizes_have() {
    let mut seen = [0; 4];
    for seed in 0..programs() {
        let mut rng = Rng::new(seed ^ 0x5e);
        let depth = rng.pick(&[1, 1, 2, 3]);
        let chain = Chain::new(&built(seed, depth));
        let before = loud(&chain.files[0]);
        let (mut limit, mut what) = (chain.models[0].virtual_size, format!("seed {seed}"));
        for _ in 0..rng.between(1, 4) {
            let image = chain.open(0, true);
            let (old, sector) = (image.size(), u64::from(image.logical_sector_size()));
            let fixed = image.disk_type() == DiskType::Fixed;
            let size = new_size(&mut rng, old, sector, fixed);
            what = format!("{what}, {old:#x} to {size:#x}");
            let identity = image.layers()[0].headers().current.data_write_guid;
            let report = resize(image, &ResizeOptions { allow_data_loss: true, ..ResizeOptions::to(size) }, &());
            let report = match report {
                Err(error) if fixed && error.io_error().is_some() => break,
                other => other.unwrap_or_else(|error| panic!("{what}: {error}")),
            };
            limit = limit.min(size);
            let image = chain.open(0, false);
            assert_eq!((image.size(), report.new_size), (size, size), "{what}");
            assert_eq!(size == old, image.layers()[0].headers().current.data_write_guid == identity, "{what}");
            assert_eq!(report.new_file_size, Some(chain.files[0].len().unwrap()), "{what}");
            expect_disk(&image, &chain.models[0], limit, &what);
            expect_clean(&chain.files[0], &before, &what);
            seen[0] += u64::from(size > old);
            seen[1] += u64::from(size < old);
            seen[2] += u64::from(report.bat_moves);
            seen[3] += u64::from(fixed && size > old);
        }
    }
    println!("grown {}, shrunk {}, BAT moved {}, fixed grown {}", seen[0], seen[1], seen[2], seen[3]);
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

#[test]
fn data_that_would_be_cut_off_is_a_refusal_that_changes_nothing() {
    let image = ImageBuilder::new(16 * MIB, 1 << 20)
        .block(12, BlockSpec::present(Content::Sparse { seed: 1, stride: 7 }))
        .build();
    let chain = Chain::new(&image);
    let before = chain.files[0].pages().content_hash();
    let refused = resize(chain.open(0, true), &ResizeOptions::to(12 * MIB), &()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    let dry = ResizeOptions { dry_run: true, allow_data_loss: true, ..ResizeOptions::to(12 * MIB) };
    assert!(resize(chain.open(0, true), &dry, &()).unwrap().first_data_cut.is_some());
    assert_eq!(chain.files[0].pages().content_hash(), before);
    resize(chain.open(0, true), &ResizeOptions::to(13 * MIB), &()).unwrap();
    expect_disk(&chain.open(0, false), &chain.models[0], 13 * MIB, "13 MiB");
}

#[test]
fn a_compacted_disk_holds_the_same_in_a_shorter_file() {
    let (mut shorter, mut moved, mut regions) = (0, 0, 0);
    for seed in 0..programs() {
        let mut rng = Rng::new(seed ^ 0xc0);
        let depth = rng.pick(&[1, 1, 2, 3]);
        let chain = Chain::new(&built(seed, depth));
        let before = loud(&chain.files[0]);
        if rng.chance(30) {
            // Regions at the end of the file are what a larger disk leaves.
            let image = chain.open(0, true);
            let size = image.size();
            if image.disk_type() == DiskType::Fixed {
                continue;
            }
            resize(image, &ResizeOptions::to(size + (200 << 30)), &()).unwrap();
            let image = chain.open(0, true);
            resize(image, &ResizeOptions::to(size), &()).unwrap();
        }
        let what = format!("seed {seed}");
        let length = chain.files[0].len().unwrap();
        let options = CompactOptions { zero_scan: rng.chance(80), filesystems: false, ..CompactOptions::default() };
        let image = chain.open(0, true);
        let identity = image.layers()[0].headers().current.data_write_guid;
        let report = compact(image, &options, &()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let image = chain.open(0, false);
        assert_eq!(image.layers()[0].headers().current.data_write_guid, identity, "{what}");
        expect_disk(&image, &chain.models[0], chain.models[0].virtual_size, &what);
        expect_clean(&chain.files[0], &before, &what);
        let after = chain.files[0].len().unwrap();
        assert_eq!((report.old_file_size, report.new_file_size), (length, after), "{what}");
        assert!(after <= length, "{what}");
        shorter += u64::from(after < length);
        moved += report.moved;
        regions += report.regions_moved.len();
        let again = compact(chain.open(0, true), &options, &()).unwrap();
        assert!(again.zero_blocks == 0 && again.new_file_size <= after, "{what}: {again:?}");
        expect_disk(&chain.open(0, false), &chain.models[0], chain.models[0].virtual_size, &what);
    }
    println!("{shorter} became shorter, {moved} blocks and {regions} regions moved");
    assert!(shorter > 0 && moved > 0 && regions > 0);
}

#[test]
fn chains_merged_in_any_order_show_the_same_disk() {
    for seed in 0..programs() / 3 {
        let mut rng = Rng::new(seed ^ 0x3e);
        let depth = rng.pick(&[2, 3, 4, 5, 8, 20]) as usize;
        let image = built(seed, depth);
        let mut chain = Chain::new(&image);
        let top = chain.models[0].clone();
        while chain.files.len() > 1 {
            let child = rng.below(chain.files.len() as u64 - 1) as usize;
            let into = rng.between(1, (chain.files.len() - 1 - child) as u64) as usize;
            let what = format!("seed {seed}: {} layers, layer {child} into {into} below", chain.files.len());
            let before = loud(&chain.files[child + into]);
            let expected = chain.models[child].clone();
            let source = chain.try_open(child, false).unwrap_or_else(|error| panic!("{what}: {error}"));
            let options = MergeOptions { into, replay: true, ..MergeOptions::default() };
            let report = merge(source, &options, &()).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(report.merged.len(), into, "{what}");
            // Alone, and through what was merged.
            let alone = chain.open(child + into, false);
            expect_disk(&alone, &expected, expected.virtual_size, &what);
            assert_eq!(alone.size(), expected.virtual_size, "{what}");
            assert_eq!(alone.disk_id(), chain.open(child, false).disk_id(), "{what}");
            expect_disk(&chain.open(child, false), &expected, expected.virtual_size, &what);
            expect_clean(&chain.files[child + into], &before, &what);
            drop(alone);
            chain.files.drain(child..child + into);
            chain.models.drain(child..child + into);
            chain.models[child] = expected;
            if child > 0 {
                // Who stood on the child stands on the ancestor now.
                let parent = chain.open(child, false);
                let options = ReparentOptions {
                    relative_path: ".\\new.vhdx".to_owned(),
                    absolute_path: None,
                    ignore_id_mismatch: false,
                    dry_run: false,
                };
                let above = OpenOptions::new().without_parents().write(true).replay(true);
                let above = above.open(Arc::clone(&chain.files[child - 1]) as Arc<dyn Storage>, None).unwrap();
                let report = reparent(above, &parent, &options).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(!report.mismatch, "{what}");
                expect_disk(&chain.open(child - 1, false), &chain.models[child - 1], u64::MAX, &what);
            }
        }
        expect_disk(&chain.open(0, false), &top, top.virtual_size, &format!("seed {seed}, at last"));
    }
}

#[test]
fn other_images_in_the_way_refuse_a_merge() {
    let chain = Chain::new(&built(7, 3));
    let hashes: Vec<u64> = chain.files.iter().map(|file| file.pages().content_hash()).collect();
    let options = MergeOptions { into: 1, dependents: vec!["sibling.vhdx".to_owned()], ..MergeOptions::default() };
    let refused = merge(chain.open(0, false), &options, &()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(refused.to_string().contains("sibling.vhdx"));
    let none = merge(chain.open(0, false), &MergeOptions { into: 3, ..MergeOptions::default() }, &()).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::InvalidArgument, "{none}");
    let dry = MergeOptions { into: 2, dry_run: true, replay: true, ..MergeOptions::default() };
    assert_eq!(merge(chain.open(0, false), &dry, &()).unwrap().data_write_guid, None);
    let after: Vec<u64> = chain.files.iter().map(|file| file.pages().content_hash()).collect();
    assert_eq!(hashes, after, "a refusal and a plan change nothing");
}

#[test]
fn items_are_set_and_nothing_else_changes() {
    for seed in 0..programs() {
        let mut rng = Rng::new(seed ^ 0x5e7);
        let chain = Chain::new(&built(seed, 1));
        let before = loud(&chain.files[0]);
        let what = format!("seed {seed}");
        let old = chain.open(0, false);
        let logical = old.logical_sector_size();
        let id = Guid::random();
        let mine: Vec<UserItem> = (0..rng.below(4))
            .map(|_| {
                let length = rng.pick(&[0, 1, 100, 5000, 70_000, 600_000, 1 << 20]);
                UserItem { id: Guid::random(), value: Some(vec![rng.next_u64() as u8; length as usize]) }
            })
            .collect();
        let options = SetOptions {
            disk_id: rng.chance(50).then_some(id),
            physical_sector_size: rng.chance(50).then_some(if logical == 4096 { 4096 } else { 512 }),
            user_items: mine.clone(),
            dry_run: false,
        };
        let report = set(chain.open(0, true), &options).unwrap_or_else(|error| panic!("{what}: {error}"));
        let new = chain.open(0, false);
        if options.disk_id.is_some() {
            assert_eq!(new.disk_id(), Some(id), "{what}");
        }
        let same =
            old.layers()[0].headers().current.data_write_guid == new.layers()[0].headers().current.data_write_guid;
        assert_eq!(report.visible, !same, "{what}");
        for item in &mine {
            assert_eq!(user_item(&new.layers()[0], item.id).unwrap(), item.value, "{what}");
        }
        expect_disk(&new, &chain.models[0], u64::MAX, &what);
        expect_clean(&chain.files[0], &before, &what);
        let gone = mine.iter().map(|item| UserItem { id: item.id, value: None }).collect();
        let options = SetOptions { user_items: gone, ..SetOptions::default() };
        set(chain.open(0, true), &options).unwrap_or_else(|error| panic!("{what}: {error}"));
        let new = chain.open(0, false);
        assert_eq!(new.layers()[0].metadata().items.len(), old.layers()[0].metadata().items.len(), "{what}");
        expect_disk(&new, &chain.models[0], u64::MAX, &what);
    }
}

/// Parents that were given up are not touched.
#[test]
fn frozen_parents_are_read_only() {
    let image = built(11, 2);
    let parents = std::iter::successors(image.parent.as_deref(), |parent| parent.parent.as_deref());
    let frozen = frozen_parents(parents.map(|parent| CrashImage::new(PageMap::from(&parent.file))).collect());
    let storage = Arc::new(SimStorage::from_pages(PageMap::from(&image.file)));
    let open = || {
        let options = OpenOptions::new().write(true).replay(true).parents(Arc::clone(&frozen));
        options.open(Arc::clone(&storage) as Arc<dyn Storage>, None).unwrap()
    };
    let size = open().size();
    resize(open(), &ResizeOptions::to(size + 5 * MIB), &()).unwrap();
    compact(open(), &CompactOptions { filesystems: false, ..CompactOptions::default() }, &()).unwrap();
    expect_disk(&open(), &image.model, size, "on frozen parents");
}
