//! An increment makes a copy of its base what the result is, or nothing is written at all.
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
use std::sync::atomic::{AtomicU64, Ordering};

use diff_support::{Chain, MIB, bytes, copy, disk, increment, parts};
use vhdkit::format::guid::Guid;
use vhdkit::image::{BlockDevice, Image, OpenOptions, RawDisk};
use vhdkit::ops::Progress;
use vhdkit::ops::apply::{ApplyOptions, ApplyTarget, Basis, plan_apply, read_increment};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::compare::compare;
use vhdkit::ops::diff::{ChangedBy, DiffOptions, ExportOptions, diff, export, side_of_image, side_of_raw};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit::{Error, ErrorKind, Result};
use vhdkit_testkit::builder::{BlockSpec, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::faulty::{Fault, FaultyStorage};
use vhdkit_testkit::model::{UNMAPPED, ZERO};
use vhdkit_testkit::random::{RandomOptions, random_image};

const FORCED: ApplyOptions = ApplyOptions { unknown_base: true, resume: false };
const RESUMED: ApplyOptions = ApplyOptions { unknown_base: true, resume: true };

fn file(bytes: &[u8]) -> MemoryStorage {
    MemoryStorage::from_bytes(bytes.to_vec())
}

fn guid_of(storage: &Arc<dyn Storage>) -> Guid {
    let image = OpenOptions::new().without_parents().open(Arc::clone(storage), None).unwrap();
    image.layers()[0].headers().current.data_write_guid
}

/// Applies to an image that is open for writing.
fn apply_to(image: &Image, increment: &[u8], options: &ApplyOptions) -> Result<Basis> {
    let increment = file(increment);
    let plan = plan_apply(&increment, ApplyTarget::Image(image), options, &())?;
    plan.run(&AtomicU64::new(0), &())?;
    if plan.basis() != Basis::Done {
        plan.verify(&())?;
    }
    Ok(plan.basis())
}

/// Applies to a single image in a storage, and opens it again for reading.
fn apply(storage: &Arc<dyn Storage>, increment: &[u8], options: &ApplyOptions) -> Result<Basis> {
    let image = OpenOptions::new().write(true).replay(true).open(Arc::clone(storage), None)?;
    apply_to(&image, increment, options)
}

fn reopened(storage: &Arc<dyn Storage>) -> Image {
    let report = check(storage, None, &CheckOptions::default(), &()).unwrap();
    assert_eq!(report.errors, 0, "{:#?}", report.findings);
    OpenOptions::new().open(Arc::clone(storage), None).unwrap()
}

#[test]
fn random_chains_layer_by_layer() {
    let (mut sizes_differ, mut applied) = (0, 0);
    for depth in 2..=8 {
        for seed in 0..if depth < 4 { 8 } else { 3 } {
            let options = RandomOptions { virtual_size_max: 5 * MIB, blocks_max: 8, ..RandomOptions::chain(depth) };
            let chain = Chain::new(&random_image(seed * 100 + depth as u64, &options));
            // The base is a copy of the deepest file; each increment makes it the next layer.
            let target = copy(&chain.files[depth - 1]);
            if OpenOptions::new().write(true).replay(true).open(Arc::clone(&target), None).is_err() {
                continue; // read-only for ever: its headers are at the last sequence number
            }
            for layer in (0..depth - 1).rev() {
                let name = format!("seed {seed}, depth {depth}, layer {layer}");
                let (base, result) = (chain.open(layer + 1), chain.open(layer));
                let by = if layer % 2 == 0 { ChangedBy::Allocation } else { ChangedBy::Contents };
                let (file, report) = increment(&base, &result, &ExportOptions { by, ..ExportOptions::default() });
                assert_eq!(report.header.result.size, result.size());
                if result.size() != base.size() {
                    sizes_differ += 1;
                    let before = parts(&target);
                    let error = apply(&target, &file, &ApplyOptions::default()).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Refused, "{name}");
                    let resize = format!("vhdkit resize TARGET {}", result.size());
                    assert!(error.hint().unwrap().contains(&resize), "{name}: {error:?} {:?}", error.hint());
                    assert!(parts(&target) == before, "{name}");
                    break;
                }
                assert_eq!(apply(&target, &file, &ApplyOptions::default()).unwrap(), Basis::Identity, "{name}");
                applied += 1;
                assert!(compare(&reopened(&target), &*result, &()).unwrap().is_equal(), "{name}");
                // So the next increment finds what it was made from, and this one has nothing to do any more.
                if result.physical_sector_size() != base.physical_sector_size() {
                    break;
                }
                assert_eq!(guid_of(&target), result.layers()[0].headers().current.data_write_guid, "{name}");
                assert_eq!(apply(&target, &file, &ApplyOptions::default()).unwrap(), Basis::Done, "{name}");
            }
        }
    }
    assert!(sizes_differ > 0 && applied > 8, "{sizes_differ} {applied}");
}

/// A dynamic base of 8 MiB, and a child of it with blocks in every state.
fn pair(sector: u32) -> Chain {
    let parent = ImageBuilder::new(8 * MIB, MIB as u32).sector_sizes(sector, 4096).pattern_block(0, 1);
    let parent = Arc::new(parent.pattern_block(1, 2).pattern_block(2, 3).pattern_block(3, 4).build());
    let sectors = SectorMask::new(|sector| (8..11).contains(&(sector % 256)));
    let child = ImageBuilder::new(8 * MIB, 2 * MIB as u32)
        .sector_sizes(sector, 4096)
        .both_headers(|header| header.data_write_guid = vhdkit_testkit::guid::Guid::seeded(77))
        .differencing(&parent)
        .block(0, BlockSpec::partial(Content::pattern(30), sectors))
        .block(1, BlockSpec::new(ZERO))
        .block(2, BlockSpec::new(UNMAPPED))
        .block(3, BlockSpec::present(Content::pattern(60)));
    Chain::new(&child.build())
}

#[test]
fn a_child_is_applied_to_a_copy_of_its_parent() {
    for sector in [512, 4096] {
        let chain = pair(sector);
        let (file, report) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
        assert_eq!((report.totals.data_bytes > 2 * MIB, report.totals.zero_bytes), (true, 2 * MIB));
        let target = copy(&chain.files[1]);
        apply(&target, &file, &ApplyOptions::default()).unwrap();
        assert_eq!(disk(&reopened(&target)), disk(&*chain.open(0)));
        // Other children of the result find it there.
        assert_eq!(guid_of(&target), guid_of(&chain.files[0]));
    }
}

#[test]
fn the_target_may_be_a_child_itself() {
    let chain = pair(512);
    let (base, result) = (chain.open(1), chain.open(0));
    let (forth, _) = increment(&base, &result, &ExportOptions::default());
    let (back, _) = increment(&result, &base, &ExportOptions::default());
    let target = copy(&chain.files[0]);
    let image = chain.try_open(Arc::clone(&target), 0, true).unwrap();
    assert_eq!(apply_to(&image, &back, &ApplyOptions::default()).unwrap(), Basis::Identity);
    let image = chain.try_open(Arc::clone(&target), 0, false).unwrap();
    assert_eq!(disk(&image), disk(&*base));
    let image = chain.try_open(Arc::clone(&target), 0, true).unwrap();
    assert_eq!(apply_to(&image, &forth, &ApplyOptions::default()).unwrap(), Basis::Identity);
    assert_eq!(disk(&chain.try_open(target, 0, false).unwrap()), disk(&*result));
}

/// Whether the increment is refused, by reading alone.
fn refused(file: &[u8], target: &Arc<dyn Storage>) -> Error {
    let before = bytes(target);
    let storage = MemoryStorage::from_bytes(file.to_vec());
    let image = OpenOptions::new().write(true).open(Arc::clone(target), None).unwrap();
    let error = plan_apply(&storage, ApplyTarget::Image(&image), &RESUMED, &()).unwrap_err();
    drop(image);
    assert!(bytes(target) == before, "the target was changed");
    error
}

#[test]
fn a_file_that_is_damaged_anywhere_is_refused_before_the_first_write() {
    let chain = pair(512);
    let (whole, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
    let target = copy(&chain.files[1]);
    // Where records begin: every byte of each is flipped, and the file is cut off behind each of them.
    let mut starts = vec![];
    let mut at = 256;
    while at < whole.len() {
        starts.push(at);
        let length = u64::from_le_bytes(whole[at + 40..at + 48].try_into().unwrap()) as usize;
        at += if whole[at..].starts_with(b"data") { 64 + length } else { 64 };
    }
    assert!(starts.len() > 5 && whole[starts[starts.len() - 1]..].starts_with(b"last"), "{starts:?}");
    let storage = MemoryStorage::from_bytes(whole.clone());
    let headers = (0..256).chain(starts.iter().flat_map(|start| *start..*start + 64));
    let payload = starts.iter().map(|start| start + 64 + 100).filter(|at| *at < whole.len());
    for at in headers.chain(payload).chain([whole.len() - 1]) {
        storage.write_at(&[whole[at] ^ 1 << (at % 8)], at as u64).unwrap();
        let error = read_increment(&storage, &()).unwrap_err();
        let kinds = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Truncated];
        assert!(kinds.contains(&error.kind()), "{at}: {error:?}");
        storage.write_at(&[whole[at]], at as u64).unwrap();
    }
    assert!(read_increment(&storage, &()).is_ok());
    let cuts = starts.iter().flat_map(|start| [*start, start + 1, start + 63, start + 64, start + 65]);
    for length in cuts.chain([0, 1, 4, 255, 256, whole.len() - 1]).filter(|length| *length < whole.len()) {
        let error = read_increment(&MemoryStorage::from_bytes(whole[..length].to_vec()), &()).unwrap_err();
        let kind = if length < 4 { ErrorKind::Unsupported } else { ErrorKind::Truncated };
        assert_eq!(error.kind(), kind, "cut to {length}: {error:?}");
    }
    // And with the target at hand: nothing of it changes.
    for at in [0, 9, 40, 300, starts[1] + 64 + 5, whole.len() - 3] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        refused(&damaged, &target);
        refused(&whole[..at], &target);
    }
    let error = refused(&[whole.clone(), vec![0]].concat(), &target);
    assert!(error.message().contains("follows"), "{error}");
    // Records left out, exchanged, or taken from another export of the same disks.
    let record = |index: usize| &whole[starts[index]..starts[index + 1]];
    refused(&[&whole[..starts[1]], &whole[starts[2]..]].concat(), &target);
    refused(&[&whole[..starts[0]], record(1), record(0), &whole[starts[2]..]].concat(), &target);
    // A record that is right by itself, and not the one that was written.
    let mut changed = whole.clone();
    let record = &mut changed[starts[1]..starts[1] + 64];
    record[52] ^= 1;
    let right = vhdkit::format::checksum::checksum(record);
    record[4..8].copy_from_slice(&right.to_le_bytes());
    let error = refused(&changed, &target);
    assert!(error.message().contains("whole file"), "{error}");
    let (other, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
    assert_eq!(whole.len(), other.len());
    refused(&[&whole[..starts[1]], &other[starts[1]..]].concat(), &target);
    assert_eq!(apply(&target, &whole, &ApplyOptions::default()).unwrap(), Basis::Identity);
}

#[test]
fn the_wrong_target_is_refused() {
    let chain = pair(512);
    let (file, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
    let refuses = |target: &Arc<dyn Storage>, options: &ApplyOptions, words: &str| {
        let before = bytes(target);
        let error = apply(target, &file, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains(words) && error.hint().is_some(), "{error}");
        assert!(bytes(target) == before, "the target was changed");
    };
    // A base that was written to since.
    let target = copy(&chain.files[1]);
    let image = OpenOptions::new().write(true).open(Arc::clone(&target), None).unwrap();
    image.write_at(b"changed", 4 * MIB).unwrap();
    image.close().unwrap();
    refuses(&target, &ApplyOptions::default(), "is not what the increment was made from");
    // Another disk, and one that is like the base but for its identity.
    let other = ImageBuilder::new(8 * MIB, MIB as u32).pattern_block(0, 50);
    let renamed = |header: &mut vhdkit_testkit::spec::HeaderSpec| header.data_write_guid.0[3] ^= 1;
    let other = diff_support::load(&other.both_headers(renamed).build().file);
    refuses(&other, &ApplyOptions::default(), "is not what");
    refuses(&other, &FORCED, "neither what the base held nor");
    // Forced, and right in what is replaced: what was changed elsewhere stays.
    assert_eq!(apply(&target, &file, &FORCED).unwrap(), Basis::Contents);
    assert_ne!(guid_of(&target), guid_of(&chain.files[0]), "it is not known to be the result");
    let image = reopened(&target);
    let mut found = [0; 7];
    image.read_at(&mut found, 4 * MIB).unwrap();
    assert_eq!(&found, b"changed");
    let found = diff(&image, &*chain.open(0), &DiffOptions { by: ChangedBy::Contents, ranges_max: 9 }, &()).unwrap();
    assert_eq!((found.totals.ranges, found.ranges[0].range.clone()), (1, 4 * MIB..4 * MIB + 512));
    // Without checksums of the base nothing is known.
    let options = ExportOptions { base_checksums: false, ..ExportOptions::default() };
    let (bare, _) = increment(&chain.open(1), &chain.open(0), &options);
    assert_eq!(apply(&other, &bare, &FORCED).unwrap(), Basis::Nothing);
    // Other sectors, other sizes.
    for (size, sector, words) in [(8, 4096, "logical sectors"), (9, 512, "has 9437184 bytes")] {
        let image = ImageBuilder::new(size * MIB, MIB as u32).sector_sizes(sector, 4096).build();
        refuses(&diff_support::load(&image.file), &RESUMED, words);
    }
}

#[test]
fn a_disk_of_another_size_is_resized_first() {
    let base = Chain::new(&ImageBuilder::new(4 * MIB, MIB as u32).pattern_block(0, 1).pattern_block(3, 2).build());
    let wide = ImageBuilder::new(6 * MIB, MIB as u32).pattern_block(0, 1).pattern_block(5, 9);
    let wide = Chain::new(&wide.both_headers(|header| header.data_write_guid.0[0] ^= 1).build());
    let options = ExportOptions { by: ChangedBy::Contents, ..ExportOptions::default() };
    let (growing, report) = increment(&base.open(0), &wide.open(0), &options);
    assert_eq!(report.totals.data_bytes, MIB);
    let target = copy(&base.files[0]);
    let error = apply(&target, &growing, &FORCED).unwrap_err();
    assert!(error.hint().unwrap().contains("vhdkit resize TARGET 6291456"), "{:?}", error.hint());
    // A base that was made larger: its identity is new, its contents are right.
    let grown = ImageBuilder::new(6 * MIB, MIB as u32).pattern_block(0, 1).pattern_block(3, 2);
    let grown = grown.both_headers(|header| header.data_write_guid.0[1] ^= 1).build();
    let grown = diff_support::load(&grown.file);
    assert_eq!(apply(&grown, &growing, &ApplyOptions::default()).unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(apply(&grown, &growing, &FORCED).unwrap(), Basis::Contents);
    assert!(compare(&reopened(&grown), &*wide.open(0), &()).unwrap().is_equal());
    // The other way, what is cut off is not in the file.
    let (shrinking, report) = increment(&wide.open(0), &base.open(0), &options);
    assert_eq!((report.totals.data_bytes, report.totals.zero_bytes), (MIB, 0));
    assert!(apply(&copy(&wide.files[0]), &shrinking, &FORCED).is_err());
}

#[test]
fn raw_disks_have_no_identity() {
    let chain = pair(512);
    let (base, result) = (disk(&*chain.open(1)), disk(&*chain.open(0)));
    let raw = |bytes: &[u8]| -> Arc<dyn Storage> { Arc::new(MemoryStorage::from_bytes(bytes.to_vec())) };
    let disk_of = |bytes: &[u8]| RawDisk::new(raw(bytes), 512).unwrap();
    let (a, b) = (disk_of(&base), disk_of(&result));
    let mut file = Vec::new();
    let options = ExportOptions { by: ChangedBy::Contents, ..ExportOptions::default() };
    export((&a, side_of_raw(&a)), (&b, side_of_raw(&b)), &mut file, &options, &()).unwrap();
    let file = MemoryStorage::from_bytes(file);
    let run = |target: &Arc<dyn Storage>, options: &ApplyOptions| {
        let plan = plan_apply(&file, ApplyTarget::Raw(target), options, &())?;
        plan.run(&AtomicU64::new(0), &())?;
        plan.verify(&())?;
        Ok::<_, Error>(plan.basis())
    };
    let target = raw(&base);
    assert_eq!(run(&target, &ApplyOptions::default()).unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(run(&target, &FORCED).unwrap(), Basis::Contents);
    assert!(bytes(&target) == result);
    assert_eq!(run(&target, &FORCED).unwrap(), Basis::Contents, "what is there already may be there");
    // A record that was written in part only.
    let torn = raw(&base);
    torn.write_at(&result[6 << 20..(6 << 20) + 5000], 6 << 20).unwrap();
    let error = run(&torn, &FORCED).unwrap_err();
    assert!(error.hint().unwrap().contains("--resume"), "{:?}", error.hint());
    assert_eq!(run(&torn, &RESUMED).unwrap(), Basis::Nothing);
    assert!(bytes(&torn) == result);
    assert_eq!(run(&raw(&base[..4 << 20]), &FORCED).unwrap_err().kind(), ErrorKind::Refused);
    // What was made from raw disks may be applied to an image, and the other way round.
    let image = copy(&chain.files[1]);
    assert!(apply(&image, &bytes(&(Arc::new(file) as Arc<dyn Storage>)), &ApplyOptions::default()).is_err());
    let (from_images, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
    let (target, increment) = (raw(&base), MemoryStorage::from_bytes(from_images));
    plan_apply(&increment, ApplyTarget::Raw(&target), &FORCED, &()).unwrap().run(&AtomicU64::new(0), &()).unwrap();
    assert!(bytes(&target) == result);
}

#[test]
fn what_is_cut_is_recognised_and_can_go_on() {
    let chain = pair(512);
    let (file, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
    let expected = disk(&*chain.open(0));
    let mut begun = 0;
    for write in 1.. {
        let target = copy(&chain.files[1]);
        let faulty = Arc::new(FaultyStorage::new(Arc::clone(&target)));
        faulty.arm(Fault::new(write, rustix::io::Errno::IO).from_then_on());
        let outcome = apply(&(Arc::clone(&faulty) as Arc<dyn Storage>), &file, &ApplyOptions::default());
        faulty.disarm();
        let Err(error) = outcome else { break };
        assert_eq!(error.kind(), ErrorKind::Io, "write {write}: {error}");
        // Whatever was left, the file itself may be applied again; another one may not, unless nothing was written.
        let is_base = guid_of(&target) == guid_of(&chain.files[1]);
        let (other, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
        let stranger = apply(&copy(&target), &other, &ApplyOptions::default());
        if is_base {
            assert!(disk(&reopened(&target)) == disk(&*chain.open(1)), "write {write}");
        } else if let Err(error) = stranger {
            assert_eq!(error.kind(), ErrorKind::Refused, "write {write}");
        } else {
            // The last update of the headers came through.
            assert_eq!(stranger.unwrap(), Basis::Done, "write {write}");
            assert!(disk(&reopened(&target)) == expected, "write {write}");
        }
        let basis = apply(&target, &file, &ApplyOptions::default()).unwrap();
        begun += u64::from(basis == Basis::Begun);
        assert!(disk(&reopened(&target)) == expected, "write {write}");
        assert_eq!(guid_of(&target), guid_of(&chain.files[0]), "write {write}");
    }
    assert!(begun > 5, "{begun}");
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    struct Change<'a>(&'a MemoryStorage, u64);
    impl Progress for Change<'_> {
        fn advance(&self, done: u64, _total: Option<u64>) -> ControlFlow<()> {
            if done > MIB {
                self.0.write_at(&[0xFF], self.1).unwrap();
            }
            ControlFlow::Continue(())
        }
    }
    let chain = pair(512);
    let (bytes, _) = increment(&chain.open(1), &chain.open(0), &ExportOptions::default());
    let file = file(&bytes);
    let target = copy(&chain.files[1]);
    let image = OpenOptions::new().write(true).open(Arc::clone(&target), None).unwrap();
    let plan = plan_apply(&file, ApplyTarget::Image(&image), &ApplyOptions::default(), &()).unwrap();
    let written = AtomicU64::new(0);
    let error = plan.run(&written, &Change(&file, bytes.len() as u64 - 70)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.hint().unwrap().contains("apply the same file again"), "{:?}", error.hint());
    assert!(written.load(Ordering::Relaxed) > 0);
    let id = plan.summary().header.id;
    drop(image);
    assert_eq!(guid_of(&target), id);
    assert_eq!(apply(&target, &bytes, &ApplyOptions::default()).unwrap(), Basis::Begun);
    assert_eq!(disk(&reopened(&target)), disk(&*chain.open(0)));
}

#[test]
fn nothing_changed_still_gives_the_identity_of_the_result() {
    let base = ImageBuilder::new(4 * MIB, MIB as u32).pattern_block(0, 1);
    let same = base.clone().both_headers(|header| header.data_write_guid.0[0] ^= 1);
    let (base, same) = (Chain::new(&base.build()), Chain::new(&same.build()));
    let options = ExportOptions { by: ChangedBy::Contents, ..ExportOptions::default() };
    let (file, report) = increment(&base.open(0), &same.open(0), &options);
    assert_eq!((report.totals.records, file.len()), (0, 256 + 64));
    let target = copy(&base.files[0]);
    assert_eq!(apply(&target, &file, &ApplyOptions::default()).unwrap(), Basis::Identity);
    assert_eq!(guid_of(&target), guid_of(&same.files[0]));
    assert_eq!(disk(&reopened(&target)), disk(&*same.open(0)));
}

#[test]
fn what_a_guest_can_tell_apart_has_an_identity_of_its_own() {
    let base = ImageBuilder::new(4 * MIB, MIB as u32).pattern_block(0, 1);
    let result = base.clone().pattern_block(2, 9).both_headers(|header| header.data_write_guid.0[0] ^= 1);
    for result in [result.clone().with(|builder| builder.disk_id.0[0] ^= 1), result.sector_sizes(512, 512)] {
        let (base, result) = (Chain::new(&base.build()), Chain::new(&result.build()));
        let options = ExportOptions { by: ChangedBy::Contents, ..ExportOptions::default() };
        let (file, report) = increment(&base.open(0), &result.open(0), &options);
        let target = copy(&base.files[0]);
        assert_eq!(apply(&target, &file, &ApplyOptions::default()).unwrap(), Basis::Identity);
        assert_eq!(disk(&reopened(&target)), disk(&*result.open(0)));
        let taken = [guid_of(&base.files[0]), guid_of(&result.files[0]), report.header.id];
        assert!(!taken.contains(&guid_of(&target)));
    }
}

#[test]
fn the_same_disks_give_the_same_file() {
    let chain = pair(512);
    let options = ExportOptions { id: Some(Guid::from_printed(5)), ..ExportOptions::default() };
    let (one, _) = increment(&chain.open(1), &chain.open(0), &options);
    assert_eq!(one, increment(&chain.open(1), &chain.open(0), &options).0);
    assert!(one.starts_with(b"vhdi") && one[8..].starts_with(b"vhdkit incremental disk\n"));
    // The layer of an open chain is as good as the file opened by itself.
    let image = chain.open(0);
    let parent = vhdkit::image::LayerDisk::with_parents(Arc::clone(&image), 1).unwrap();
    let sides = (side_of_image(&parent, parent.layer().unwrap()), side_of_image(&*image, &image.layers()[0]));
    let mut out = Vec::new();
    export((&parent, sides.0), (&*image, sides.1), &mut out, &options, &()).unwrap();
    assert_eq!(one, out);
}

/// A copy from the middle of a session has the identity of the base. Force does not take the place of the comparison.
#[test]
fn the_identity_is_compared_with_the_contents_also_by_force() {
    let builder = ImageBuilder::new(4 * MIB, 1 << 20).block(1, BlockSpec::present(Content::pattern(5))).build();
    let memory = MemoryStorage::with_len(builder.file.len());
    for (offset, bytes) in builder.file.segments() {
        memory.write_at(bytes, offset).unwrap();
    }
    let base: Arc<dyn Storage> = Arc::new(memory);
    let result = copy(&base);
    let image = OpenOptions::new().write(true).open(Arc::clone(&result), None).unwrap();
    image.write_at(&[9; 4096], MIB + 8192).unwrap();
    image.close().unwrap();
    let open = |storage: &Arc<dyn Storage>| OpenOptions::new().open(Arc::clone(storage), None).unwrap();
    let (increment, report) = increment(&open(&base), &open(&result), &ExportOptions::default());
    let target = copy(&base);
    target.write_at(&[0x77], builder.layout.payload_block(1) + 8192 + 5).unwrap();
    assert_eq!(guid_of(&target), guid_of(&base));
    let before = parts(&target);
    for options in [ApplyOptions::default(), FORCED] {
        assert_eq!(apply(&target, &increment, &options).unwrap_err().kind(), ErrorKind::Refused);
        assert!(parts(&target) == before);
    }
    // Without a look at it the result is nobody's.
    assert_eq!(apply(&target, &increment, &RESUMED).unwrap(), Basis::Nothing);
    assert_ne!(Some(guid_of(&target)), report.header.result.data_write_guid);
}
