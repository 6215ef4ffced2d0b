//! Bugs that other readers of this format have, each as a test that a reader with the bug fails.
//!
//! The names say who had it. What is wrong with the writers among them is proved where this project writes. Images that
//! QEMU itself made are in `oracle_qemu.rs`.
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

use model_support::{TestFile, extents, layers, open, read, right_extents, same_range, same_reads, try_open};
use vhdkit::ErrorKind;
use vhdkit::format::finding::{Code, Severity, Strictness};
use vhdkit::format::metadata::DiskType;
use vhdkit::image::{BlockDevice, ExtentKind, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, CheckReport, check};
use vhdkit::storage::Storage;
use vhdkit_testkit::builder::{BitmapSpec, BlockSpec, BuiltImage, ImageBuilder, Place};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::dirty::{DirtyPlan, edit_header};
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec, LogRing};
use vhdkit_testkit::model::{FULLY_PRESENT, NOT_PRESENT, UNMAPPED, ZERO};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::spec::{Checksum, ItemSpec, MIB};

const GIB: u64 = 1 << 30;

fn checked(image: &BuiltImage) -> CheckReport {
    let storage: Arc<dyn Storage> = TestFile::new(&image.file);
    check(&storage, None, &CheckOptions::default(), &()).unwrap()
}

fn codes(image: &BuiltImage) -> Vec<Code> {
    checked(image).findings.iter().map(|finding| finding.code()).collect()
}

fn refusal(image: &BuiltImage) -> (ErrorKind, Option<Code>) {
    let error = try_open(image, &OpenOptions::new()).unwrap_err();
    (error.kind(), error.code())
}

/// Compares reads and extents with the model.
fn right(name: &str, built: &BuiltImage) -> Image {
    let image = open(name, built);
    let mut rng = Rng::new(11);
    same_reads(name, &image, built, &mut rng, 60);
    right_extents(name, &image, built, &mut rng, image.layers().iter().any(|layer| layer.replay().is_some()));
    image
}

fn log_guid() -> Guid {
    Guid::seeded(1234)
}

/// Puts entries into the log, one after another from a ring offset on, and makes the image dirty.
fn log(mut image: BuiltImage, start: u32, entries: &[LogEntrySpec]) -> BuiltImage {
    let mut ring = LogRing::new(image.layout.log, image.layout.log_length);
    ring.seek(start);
    for entry in entries {
        ring.place(&mut image.file, entry);
    }
    for slot in 0..2 {
        edit_header(&mut image, slot, |header| header[48..64].copy_from_slice(&log_guid().0));
    }
    image
}

fn entry(sequence: u64, image: &BuiltImage) -> LogEntrySpec {
    LogEntrySpec::new(log_guid(), sequence, image.file.len())
}

/// A dynamic disk of two chunks with data on both sides of the border.
fn two_chunks() -> BuiltImage {
    let blocks = [0, 1, 127, 128, 129, 130, 200];
    blocks
        .into_iter()
        .fold(ImageBuilder::new(7 * GIB, 32 << 20), |builder, block| {
            builder.block(block, BlockSpec::present(Content::Sparse { seed: block, stride: 1021 }))
        })
        .build()
}

/// A fixed disk of two chunks, whose size is no multiple of the block.
fn fixed_over_a_chunk() -> BuiltImage {
    let mut builder = ImageBuilder::new(9 * GIB + (3 << 20) + 512, 32 << 20);
    for block in [0, 127, 128, 255, 256, 257, 288] {
        builder = builder.block(block, BlockSpec::present(Content::Sparse { seed: block, stride: 2039 }));
    }
    builder.fixed().build()
}

fn dirty_dynamic() -> BuiltImage {
    let clean = ImageBuilder::new(64 << 20, 1 << 20).pattern_block(3, 1).pattern_block(40, 2).build();
    let mut image = clean.clone();
    DirtyPlan::new(77).move_bat(&clean).apply(&mut image);
    image
}

// QEMU.

/// "Fixed" with a BAT of ZERO entries and space that nothing uses; later writes lie behind it.
#[test]
fn qemu_q1_fixed_disks_with_zero_entries_are_read_by_their_bat() {
    let mut builder = ImageBuilder::new(64 << 20, 8 << 20);
    builder.leave_blocks_allocated = true;
    builder.default_state = ZERO;
    // 64 MiB of the file are set aside behind the BAT; block 5 was written later, behind all of it.
    let built = builder.block(5, BlockSpec::present(Content::pattern(5)).at(80)).build();
    let image = right("fixed by QEMU", &built);
    assert_eq!(image.disk_type(), DiskType::Fixed);
    let report = checked(&built);
    assert_eq!(report.errors, 0, "{:#?}", report.findings);
    let summary = report.summary.unwrap();
    assert_eq!(summary.blocks, [0, 0, 7, 0, 1, 0]);
    assert!(summary.leaked_bytes >= 64 << 20, "the unused space is told: {}", summary.leaked_bytes);
}

/// The end of the file is compared with where a block lies, not with the place of its entry in the BAT.
#[test]
fn qemu_q2_fixed_disks_over_one_chunk_are_accepted() {
    let built = fixed_over_a_chunk();
    let image = right("fixed", &built);
    assert_eq!(image.disk_type(), DiskType::Fixed);
    assert_eq!(checked(&built).errors, 0);
}

#[test]
fn qemu_q4_regions_without_the_required_flag_are_accepted() {
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .pattern_block(2, 1)
        .both_region_tables(|table| table.entries.iter_mut().for_each(|entry| entry.required = 0))
        .build();
    let image = right("Required is 0", &built);
    let findings = image.layers()[0].findings();
    assert!(findings.iter().any(|finding| finding.code() == Code::RegionRequiredFlag));
    assert!(findings.iter().all(|finding| finding.severity() < Severity::Error));
}

#[test]
fn qemu_q5_region_table_2_is_used_when_1_is_damaged() {
    let damages: [fn(&mut ImageBuilder); 3] = [
        |builder| builder.region_tables[0].checksum = Checksum::Wrong,
        |builder| builder.region_tables[0].signature = [0; 4],
        |builder| builder.patches.push((0x3_0000 + 20, vec![0xFF])),
    ];
    for damage in damages {
        let built = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(2, 1).with(damage).build();
        let image = right("copy 2", &built);
        assert_eq!(image.layers()[0].region_table().copy, 1);
        assert_eq!(codes(&built).iter().filter(|code| **code == Code::RegionCopyDamaged).count(), 1);
    }
}

#[test]
fn qemu_q6_a_log_guid_without_a_sequence_is_an_error() {
    for junk in [None, Some(5)] {
        let mut builder = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(2, 1);
        builder.junk = junk;
        let image = log(builder.build(), 0, &[]);
        assert_eq!(refusal(&image), (ErrorKind::Corrupt, Some(Code::LogNoSequence)));
        let report = checked(&image);
        assert!(report.errors == 1 && report.summary.is_none(), "{:#?}", report.findings);
    }
}

/// The new end is a multiple of 1 MiB; QEMU grows the file only when it is not.
#[test]
fn qemu_q7_an_aligned_last_file_offset_lets_the_file_grow() {
    let clean =
        ImageBuilder::new(64 << 20, 1 << 20).pattern_block(0, 1).block(9, BlockSpec::present(Content::Zero)).build();
    let mut image = clean.clone();
    let cut = clean.layout.payload_block(9);
    assert_eq!(clean.file.len(), cut + MIB);
    DirtyPlan::new(1).move_bat(&clean).with(|plan| plan.cut_file = Some(cut)).apply(&mut image);
    let opened = right("grown", &image);
    assert_eq!(opened.layers()[0].replay().unwrap().file_size_after, cut + MIB);
    assert_eq!(checked(&image).errors, 0);
}

/// Reading a dirty parent does not give it a new identity, so its children still know it.
#[test]
fn qemu_q8_a_dirty_parent_keeps_its_identity() {
    let mut parent = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(1, 1).build();
    DirtyPlan::new(2).move_bat(&parent.clone()).apply(&mut parent);
    let parent = Arc::new(parent);
    let child = ImageBuilder::new(8 << 20, 1 << 20)
        .differencing(&parent)
        .block(1, BlockSpec::partial(Content::pattern(2), SectorMask::new(|sector| sector % 2 == 0)))
        .build();
    for _ in 0..2 {
        let opened = right("child of a dirty parent", &child);
        assert!(opened.layers()[1].replay().is_some());
    }
}

/// Entries before the Tail are done; their targets may hold payload by now.
#[test]
fn qemu_q9_entries_before_the_tail_are_not_replayed() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build();
    let poison = clean.layout.payload_block(1);
    let retired = entry(5, &clean).descriptor(DescriptorSpec::data(poison, &[0xBD; 4096]));
    let truth = clean.file.read(clean.layout.bat, 4096);
    let head = entry(6, &clean).tail(8192).descriptor(DescriptorSpec::data(clean.layout.bat, &truth));
    let image = right("Tail", &log(clean, 0, &[retired, head]));
    assert_eq!(image.layers()[0].replay().unwrap().entries, 1);
}

#[test]
fn qemu_q9_entries_5_and_9_are_not_one_sequence() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build();
    let poison = entry(5, &clean).descriptor(DescriptorSpec::data(clean.layout.payload_block(1), &[0xBD; 4096]));
    let truth = clean.file.read(clean.layout.bat, 4096);
    let data = DescriptorSpec::data(clean.layout.bat, &truth);
    // Each its own tail: the higher number alone counts.
    right("gap", &log(clean.clone(), 0, &[poison.clone(), entry(9, &clean).descriptor(data.clone())]));
    // The later one claims the earlier as its tail: it has no sequence, and only the earlier one is left.
    let stale = entry(9, &clean).tail(0).descriptor(DescriptorSpec::data(clean.layout.payload_block(0), &[0xBD; 4096]));
    right("gap with a tail across it", &log(clean.clone(), 0, &[entry(5, &clean).descriptor(data), stale]));
}

#[test]
fn qemu_q10_a_log_may_not_overwrite_the_file_identifier() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).build();
    for target in [0, 0x1_0000, 0x2_0000] {
        let evil = entry(3, &clean).descriptor(DescriptorSpec::data(target, &[0; 4096]));
        let image = log(clean.clone(), 0, &[evil]);
        assert_eq!(refusal(&image), (ErrorKind::Corrupt, Some(Code::LogTargetHeader)));
        assert!(codes(&image).contains(&Code::LogTargetHeader));
    }
    let far = entry(3, &clean).descriptor(DescriptorSpec::zero(2 * MIB, 1 << 60));
    assert_eq!(refusal(&log(clean, 0, &[far])), (ErrorKind::Corrupt, Some(Code::LogTargetBeyond)));
}

#[test]
fn qemu_q11_check_finds_overlaps_reserved_bits_and_state_4() {
    let builder = || ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2);
    let overlap =
        builder().block(2, BlockSpec::present(Content::Zero).at(5)).block(3, BlockSpec::present(Content::Zero).at(5));
    let reserved = builder().block(2, BlockSpec { reserved: 1, ..BlockSpec::present(Content::Zero) });
    let reserved_high = builder().block(2, BlockSpec { reserved: 1 << 16, ..BlockSpec::new(NOT_PRESENT) });
    let state_4 = builder().block(2, BlockSpec { raw: Some(4), ..BlockSpec::new(NOT_PRESENT) });
    let mut into_the_log = builder().block(2, BlockSpec::present(Content::Zero).at(1));
    into_the_log.log_offset = Some(MIB);
    let cases = [
        (overlap, Code::BatOverlap),
        (reserved, Code::BatReserved),
        (reserved_high, Code::BatReserved),
        (state_4, Code::BatState),
        (into_the_log, Code::BatOverlap),
    ];
    for (builder, code) in cases {
        let report = checked(&builder.build());
        let found: Vec<Code> = report.findings.iter().map(|finding| finding.code()).collect();
        assert!(found.contains(&code), "{code}: {found:?}");
        assert_eq!(report.errors, 1, "{code}: {:#?}", report.findings);
    }
}

/// QEMU's map calls everything data.
#[test]
fn qemu_q12_extents_tell_holes_and_zeros_from_data() {
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .pattern_block(1, 1)
        .block(3, BlockSpec::new(ZERO))
        .block(5, BlockSpec::anchored(UNMAPPED, Content::pattern(9)))
        .build();
    let image = right("map", &built);
    let kinds: Vec<(u64, ExtentKind)> =
        extents(&image, 0..8 << 20).iter().map(|extent| (extent.start >> 20, extent.kind)).collect();
    let data = ExtentKind::Data { file_offset: Some(built.layout.payload_block(1)) };
    let (hole, zero) = (ExtentKind::Hole, ExtentKind::Zero);
    assert_eq!(kinds, [(0, hole), (1, data), (2, hole), (3, zero), (4, hole), (5, zero), (6, hole)]);
}

#[test]
fn qemu_q13_a_dirty_log_is_read_without_writing() {
    let image = right("dirty", &dirty_dynamic());
    assert!(image.layers()[0].replay().is_some());
}

/// Images of QEMU before 8.0: a page of the BAT logged eight bytes too far left junk in unused bitmap entries (issue 727).
#[test]
fn qemu_727_junk_in_unused_bitmap_entries_is_a_warning() {
    let mut builder = ImageBuilder::new(7 * GIB, 32 << 20).block(128, BlockSpec::present(Content::Fill(3)));
    builder.bat_raw.insert(128, 0x70_0006);
    let built = builder.build();
    assert_eq!(built.layout.geometry.bitmap_index(0), 128);
    right("junk", &built);
    assert!(codes(&built).contains(&Code::BitmapUnexpected));
    assert_eq!(checked(&built).errors, 0);
    let strict = OpenOptions::new().strictness(Strictness::Strict);
    try_open(&built, &strict).unwrap(); // the entry is not needed to read
}

/// QEMU once wrote images whose file ends inside the last block, behind the end of the disk.
#[test]
fn qemu_a_last_block_cut_behind_the_end_of_the_disk_is_read() {
    let mut builder = ImageBuilder::new((10 << 20) + 4096, 4 << 20).pattern_block(0, 1).pattern_block(2, 2);
    let whole = builder.build();
    builder.file_length = Some(whole.layout.payload_block(2) + (2 << 20) + 4096);
    let built = builder.build();
    right("cut", &built);
    assert!(codes(&built).contains(&Code::BatLastBlockCut));
    builder.file_length = Some(whole.layout.payload_block(2) + (2 << 20));
    let short = open("cut too short", &builder.build());
    let mut page = [0; 4096];
    let error = short.read_at(&mut page, 10 << 20).unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Truncated, Some(Code::BatOutsideFile)));
}

/// CVE-2014-0148: block and log sizes of zero or beyond all bounds.
#[test]
fn qemu_cve_2014_0148_sizes_are_bounded() {
    for block_size in [0, 1, 4096, 1 << 19, 3 << 20, 512 << 20, u32::MAX] {
        let sized = |item: &mut ItemSpec| item.data = Some([block_size.to_le_bytes(), [0; 4]].concat());
        let built = ImageBuilder::new(8 << 20, 1 << 20)
            .with(|builder| sized(builder.metadata.item(Guid::FILE_PARAMETERS)))
            .build();
        assert_eq!(refusal(&built), (ErrorKind::Corrupt, Some(Code::BlockSize)), "{block_size:#x}");
    }
    for (length, code) in
        [(1, Code::LogLengthUnaligned), (u32::MAX, Code::LogLengthUnaligned), (0xFFF0_0000, Code::LogTooLong)]
    {
        let built = ImageBuilder::new(8 << 20, 1 << 20).both_headers(|header| header.log_length = Some(length)).build();
        assert_eq!(refusal(&built).1, Some(code), "{length:#x}");
    }
}

/// Sysinternals' Disk2vhd writes both headers with the same number and the same bytes.
#[test]
fn disk2vhd_two_identical_headers_are_accepted() {
    let same = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(1, 1).both_headers(|header| header.sequence = 9);
    right("identical", &same.build());
    let mut different = same;
    different.headers[1].file_write_guid = Guid::seeded(99);
    assert_eq!(refusal(&different.build()), (ErrorKind::Corrupt, Some(Code::HeaderConflict)));
}

// libvhdi.

#[test]
fn libvhdi_fixed_disks_over_4_gib_have_interleaved_entries() {
    let built = fixed_over_a_chunk();
    let image = open("fixed", &built);
    for block in [127, 128, 255, 256, 257, 288] {
        let offset = block * (32 << 20);
        assert_ne!(read(&image, offset, 2 << 20), vec![0; 2 << 20], "block {block}");
        same_range("fixed", &image, &built.model, offset, 2 << 20);
    }
}

#[test]
fn libvhdi_a_dirty_log_is_not_ignored() {
    let built = dirty_dynamic();
    assert_ne!(read(&open("dirty", &built), 3 << 20, 512), [0; 512]);
}

#[test]
fn libvhdi_state_4_is_an_error_and_not_zeros() {
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .pattern_block(1, 1)
        .block(2, BlockSpec { raw: Some(4), ..BlockSpec::new(NOT_PRESENT) })
        .build();
    let image = open("state 4", &built);
    same_range("state 4", &image, &built.model, 0, 2 << 20);
    let error = image.read_at(&mut [0; 512], 2 << 20).unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Corrupt, Some(Code::BatState)));
    let extents = image.visit_extents(0..8 << 20, &mut |_| std::ops::ControlFlow::Continue(()));
    assert_eq!(extents.unwrap_err().code(), Some(Code::BatState));
}

#[test]
fn libvhdi_a_damaged_region_table_1_does_not_end_it() {
    let built = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(2, 1).patch(0x3_0000, &[0; 65_536]).build();
    right("no copy 1", &built);
    let both = ImageBuilder::new(8 << 20, 1 << 20).patch(0x3_0000, &[0; 131_072]).build();
    assert_eq!(refusal(&both), (ErrorKind::Corrupt, Some(Code::RegionTablesDamaged)));
}

/// libvhdi issue 17: a block that is not present at offset 0 gave the file's header.
#[test]
fn libvhdi_17_blocks_that_are_not_present_are_not_the_file_header() {
    let built = ImageBuilder::new(8 << 20, 1 << 20).build();
    let image = right("empty", &built);
    assert_eq!(read(&image, 0, 8 << 20), vec![0; 8 << 20]);
    // And a present block at offset 0 is an error.
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .block(0, BlockSpec { place: Place::Nowhere, ..BlockSpec::new(FULLY_PRESENT) })
        .build();
    let error = open("offset 0", &built).read_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(error.code(), Some(Code::BatOffset));
}

// dissect.

#[test]
fn dissect_di1_unaligned_reads_across_blocks_are_right() {
    let built = (0..24).fold(ImageBuilder::new(24 << 20, 1 << 20), |builder, block| {
        if block % 3 == 2 { builder } else { builder.pattern_block(block, block) }
    });
    let built = built.scatter(8).build();
    let image = open("across", &built);
    let mut rng = Rng::new(1);
    for _ in 0..400 {
        let length = rng.between(1, 3 << 20);
        let offset = rng.below((24 << 20) - length);
        same_range("across", &image, &built.model, offset, length as usize);
    }
    for boundary in 1..24 {
        for (before, after) in [(1, 1), (511, 1), (1, 513), (700, 900), (512, 512)] {
            same_range("border", &image, &built.model, (boundary << 20) - before, (before + after) as usize);
        }
    }
}

#[test]
fn dissect_checksums_are_verified() {
    let newest_is_wrong = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(1, 1).with(|builder| {
        builder.headers[1].checksum = Checksum::Wrong;
        builder.headers[1].log_offset = Some(77 << 20);
    });
    right("the older header", &newest_is_wrong.build());
    let none = ImageBuilder::new(8 << 20, 1 << 20).both_headers(|header| header.checksum = Checksum::Wrong).build();
    assert_eq!(refusal(&none), (ErrorKind::Corrupt, Some(Code::HeadersDamaged)));
}

#[test]
fn dissect_unknown_metadata_and_regions_are_passed_over() {
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .pattern_block(1, 1)
        .item(ItemSpec::new(Guid::seeded(50), 0, b"unknown"))
        .item(ItemSpec::new(Guid::FILE_PARAMETERS, 1, b"a user's item with a known GUID"))
        .unknown_region(Guid::seeded(51), 40 << 20, 1 << 20, 0, 0xA7)
        .build();
    right("unknown", &built);
    let required = ImageBuilder::new(8 << 20, 1 << 20).item(ItemSpec::new(Guid::seeded(50), 4, b"unknown")).build();
    assert_eq!(refusal(&required), (ErrorKind::Unsupported, Some(Code::MetadataUnknownRequired)));
    let region = ImageBuilder::new(8 << 20, 1 << 20).unknown_region(Guid::seeded(51), 40 << 20, 1 << 20, 1, 0).build();
    assert_eq!(refusal(&region), (ErrorKind::Unsupported, Some(Code::RegionUnknownRequired)));
}

/// dissect returns fewer bytes than asked for.
#[test]
fn dissect_a_read_over_an_unusable_block_fails_as_a_whole() {
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .pattern_block(1, 1)
        .block(2, BlockSpec { raw: Some(4), ..BlockSpec::new(NOT_PRESENT) })
        .build();
    let image = open("state 4", &built);
    assert!(image.read_at(&mut vec![0; 4096], (2 << 20) - 2048).is_err());
    assert!(image.read_at(&mut vec![0; 8 << 20], 0).is_err());
    same_range("before", &image, &built.model, (2 << 20) - 4096, 4096);
    same_range("behind", &image, &built.model, 3 << 20, 4096);
}

// vhdx-rs.

/// Its replay in memory took LastFileOffset as the end of a zeroed range.
#[test]
fn vhdx_rs_replay_keeps_payload_below_last_file_offset() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(5, 2).build();
    let page = clean.file.read(clean.layout.bat, 4096);
    let head = entry(3, &clean).descriptor(DescriptorSpec::data(clean.layout.bat, &page));
    let grown = head.clone().with(|entry| entry.last_file_offset += 4 * MIB);
    for entry in [head, grown] {
        let image = right("payload", &log(clean.clone(), 0, &[entry]));
        assert_ne!(read(&image, 5 << 20, 512), [0; 512]);
    }
}

/// Blocks are aligned to 1 MiB, whatever their size.
#[test]
fn vhdx_rs_blocks_need_not_be_aligned_to_their_size() {
    let built = ImageBuilder::new(96 << 20, 32 << 20)
        .block(0, BlockSpec::present(Content::Sparse { seed: 1, stride: 50 }).at(39))
        .block(2, BlockSpec::present(Content::Sparse { seed: 2, stride: 50 }).at(5))
        .build();
    right("any mebibyte", &built);
    assert_eq!(checked(&built).errors, 0);
}

#[test]
fn vhdx_rs_a_run_goes_on_around_the_end_of_the_ring() {
    let clean = ImageBuilder::new(64 << 20, 1 << 20).pattern_block(3, 1).build();
    let page = clean.file.read(clean.layout.bat, 4096);
    let start = (1 << 20) - 12_288;
    let wrong = DescriptorSpec::data(clean.layout.bat, &[0; 4096]);
    let right_page = DescriptorSpec::data(clean.layout.bat, &page);
    let entries: Vec<LogEntrySpec> = [(20, &wrong), (21, &wrong), (22, &right_page)]
        .into_iter()
        .map(|(sequence, descriptor)| entry(sequence, &clean).tail(start).descriptor(descriptor.clone()))
        .collect();
    let image = right("around", &log(clean, start, &entries));
    assert_eq!(image.layers()[0].replay().unwrap().entries, 3);
}

#[test]
fn vhdx_rs_zero_and_data_descriptors_are_applied_in_order() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).block(0, BlockSpec::present(Content::Fill(1))).build();
    let base = clean.layout.payload_block(0);
    let data = DescriptorSpec::data(base, &[2; 4096]);
    let zero = DescriptorSpec::zero(base, 8192);
    let at = |entries: &[LogEntrySpec]| read(&open("order", &log(clean.clone(), 0, entries)), 0, 1)[0];
    assert_eq!(at(&[entry(2, &clean).descriptor(data.clone()).descriptor(zero.clone())]), 0);
    assert_eq!(at(&[entry(2, &clean).descriptor(zero.clone()).descriptor(data.clone())]), 2);
    assert_eq!(at(&[entry(2, &clean).descriptor(data.clone()), entry(3, &clean).tail(0).descriptor(zero.clone())]), 0);
    assert_eq!(at(&[entry(2, &clean).descriptor(zero), entry(3, &clean).tail(0).descriptor(data)]), 2);
}

#[test]
fn vhdx_rs_blocks_past_the_end_of_the_file_are_found() {
    let built = ImageBuilder::new(8 << 20, 1 << 20)
        .pattern_block(0, 1)
        .block(2, BlockSpec::present(Content::Zero).at(1 << 31))
        .build();
    let mut cut = built.clone();
    cut.file.set_len(8 << 20);
    assert!(codes(&cut).contains(&Code::BatOutsideFile));
    let image = open("outside", &cut);
    same_range("inside", &image, &cut.model, 0, 1 << 20);
    assert_eq!(image.read_at(&mut [0; 512], 2 << 20).unwrap_err().kind(), ErrorKind::Truncated);
}

// vhdx-core.

/// The target stands at byte 16 of a descriptor, the sequence number at 24; data sectors begin at the next 4 KiB
/// boundary, also behind more than one sector of descriptors; first and last bytes of a page are in the descriptor.
#[test]
fn vhdx_core_descriptors_and_data_sectors_are_where_the_format_has_them() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build();
    for count in [1, 2, 126, 127, 128, 200] {
        let mut image = clean.clone();
        let base = clean.layout.payload_block(0);
        let pages: Vec<u64> = (0..count).map(|page| base + page * 4096).collect();
        let descriptors = pages.iter().map(|page| DescriptorSpec::data(*page, &clean.file.read(*page, 4096))).collect();
        for page in pages {
            image.file.write(page, &[0x99; 4096]);
        }
        let sequence = 0x1234_5678_9ABC_DEF0;
        let image = log(image, 4096 * 3, &[entry(sequence, &clean).with(|entry| entry.descriptors = descriptors)]);
        let opened = right("pages", &image);
        // The first eight and the last four bytes of each page by themselves.
        for page in 0..count {
            same_range("leading bytes", &opened, &image.model, page * 4096, 8);
            same_range("trailing bytes", &opened, &image.model, page * 4096 + 4092, 4);
        }
    }
}

// cloud-hypervisor.

#[test]
fn cloud_hypervisor_bitmap_entries_are_skipped_in_every_bat() {
    right("two chunks", &two_chunks());
    // 4096-byte sectors: a chunk has 32 GiB.
    let built = [1023, 1024, 1025]
        .into_iter()
        .fold(ImageBuilder::new(40 * GIB, 32 << 20).sector_sizes(4096, 4096), |builder, block| {
            builder.block(block, BlockSpec::present(Content::Sparse { seed: block, stride: 1024 }))
        });
    right("4096-byte sectors", &built.build());
}

#[test]
fn cloud_hypervisor_a_dirty_log_is_not_ignored() {
    right("dirty", &dirty_dynamic());
}

#[test]
fn cloud_hypervisor_one_torn_header_and_one_torn_region_table_are_survived() {
    for header in 0..2 {
        for table in 0..2 {
            let built = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(1, 1).with(|builder| {
                builder.headers[header].checksum = Checksum::Wrong;
                builder.region_tables[table].checksum = Checksum::Wrong;
            });
            let built = built.build();
            right("torn", &built);
            assert_eq!(checked(&built).errors, 0);
        }
    }
}

// keramics and Aaru.

#[test]
fn keramics_fixed_disks_are_interleaved() {
    right("fixed", &fixed_over_a_chunk());
}

/// A chunk without partially present blocks needs no bitmap; its entry with offset 0 is none.
#[test]
fn keramics_a_bitmap_that_is_not_present_is_not_read_at_offset_0() {
    let parent = Arc::new(
        (0..8).fold(ImageBuilder::new(8 << 20, 1 << 20), |builder, block| builder.pattern_block(block, block)).build(),
    );
    let child = ImageBuilder::new(8 << 20, 1 << 20)
        .differencing(&parent)
        .pattern_block(1, 50)
        .block(2, BlockSpec::new(ZERO))
        .block(3, BlockSpec::new(UNMAPPED))
        .build();
    assert!(child.layout.bitmaps.is_empty());
    right("no bitmap", &child);
    // A block that needs the bitmap cannot be read without one.
    let mut broken = ImageBuilder::new(8 << 20, 1 << 20)
        .differencing(&parent)
        .block(1, BlockSpec::partial(Content::pattern(1), SectorMask::all()));
    broken.bitmaps.insert(0, BitmapSpec { state: NOT_PRESENT, place: Place::Nowhere, ..BitmapSpec::default() });
    let broken = broken.build();
    let image = open("missing", &broken);
    assert_eq!(image.read_at(&mut [0; 512], 1 << 20).unwrap_err().code(), Some(Code::BitmapMissing));
    same_range("others", &image, &broken.model, 0, 1 << 20);
    assert!(codes(&broken).contains(&Code::BitmapMissing));
}

#[test]
fn keramics_a_stored_checksum_of_0_is_wrong() {
    let zero = ImageBuilder::new(8 << 20, 1 << 20).both_headers(|header| header.checksum = Checksum::Value(0)).build();
    assert_eq!(refusal(&zero), (ErrorKind::Corrupt, Some(Code::HeadersDamaged)));
    let zero =
        ImageBuilder::new(8 << 20, 1 << 20).both_region_tables(|table| table.checksum = Checksum::Value(0)).build();
    assert_eq!(refusal(&zero), (ErrorKind::Corrupt, Some(Code::RegionTablesDamaged)));
}

/// It spends a block at each bitmap entry, so that the blocks at the end of a chunk are lost or shifted.
#[test]
fn aaru_no_block_is_lost_at_the_end_of_a_chunk() {
    // Blocks of 256 MiB: a chunk has 16 of them.
    let builder = ImageBuilder::new(20 * GIB, 256 << 20);
    let all = (0..80).fold(builder, |builder, block| {
        builder.block(block, BlockSpec::present(Content::Sparse { seed: block, stride: 1 << 18 }))
    });
    let built = all.build();
    let image = open("all blocks", &built);
    for block in 0..80 {
        let offset: u64 = block << 28;
        let unit = offset.next_multiple_of(512 << 18);
        assert_ne!(read(&image, unit, 512), [0; 512], "block {block}");
        same_range("all blocks", &image, &built.model, unit, 4096);
    }
}

#[test]
fn aaru_differencing_disks_have_all_entries() {
    let parent = Arc::new(two_chunks());
    let masks = [0, 127, 128, 129, 223];
    let child = masks.into_iter().fold(ImageBuilder::new(7 * GIB, 32 << 20).differencing(&parent), |builder, block| {
        let content = Content::Sparse { seed: 1000 + block, stride: 1021 };
        builder.block(block, BlockSpec::partial(content, SectorMask::random(block, 700, 50)))
    });
    right("differencing", &child.build());
}

// go-vhdx.

#[test]
fn go_vhdx_partially_present_blocks_are_not_taken_whole() {
    let parent = Arc::new(ImageBuilder::new(4 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build());
    let child = ImageBuilder::new(4 << 20, 1 << 20)
        .differencing(&parent)
        .block(0, BlockSpec::partial(Content::pattern(3), SectorMask::new(|sector| sector % 3 == 0)))
        .block(1, BlockSpec::partial(Content::pattern(4), SectorMask::none()))
        .build();
    let image = right("partial", &child);
    assert_eq!(layers(&child).len(), image.layers().len());
    assert_eq!(read(&image, 512, 512), parent.model.read(512, 512));
    assert_eq!(read(&image, 1 << 20, 1 << 20), parent.model.read(1 << 20, 1 << 20));
}

// 7-Zip and DiscUtils.

/// 7-Zip tests one bit of the size only.
#[test]
fn seven_zip_a_size_that_is_no_multiple_of_the_sector_is_refused() {
    for (size, sector) in
        [((8_u64 << 20) + 1, 512_u32), ((8 << 20) + 256, 512), ((8 << 20) + 512, 4096), ((8 << 20) + 2048, 4096)]
    {
        let built = ImageBuilder::new(8 << 20, 1 << 20)
            .sector_sizes(sector, 4096)
            .with(|builder| builder.metadata.item(Guid::VIRTUAL_DISK_SIZE).data = Some(size.to_le_bytes().to_vec()))
            .build();
        assert_eq!(refusal(&built), (ErrorKind::Corrupt, Some(Code::DiskSizeUnaligned)), "{size} {sector}");
    }
}

#[test]
fn seven_zip_a_dirty_log_is_not_left_out() {
    right("dirty", &dirty_dynamic());
}

/// A ZERO block of a child hides the parent, and so do UNMAPPED and UNDEFINED ones.
#[test]
fn discutils_zero_blocks_of_a_child_hide_the_parent() {
    let parent = Arc::new(
        (0..4).fold(ImageBuilder::new(4 << 20, 1 << 20), |builder, block| builder.pattern_block(block, block)).build(),
    );
    let child = (1..4).fold(ImageBuilder::new(4 << 20, 1 << 20).differencing(&parent), |builder, state| {
        builder.block(u64::from(state), BlockSpec::new(state).with_mask(SectorMask::all()))
    });
    let image = right("hidden", &child.build());
    assert_eq!(read(&image, 0, 512), parent.model.read(0, 512));
    assert_eq!(read(&image, 1 << 20, 3 << 20), vec![0; 3 << 20]);
}
