//! Dirty images: what a reader sees is the image after replay, and the file keeps every byte.
//!
//! The entries come from the testkit's log crafter, which QEMU has replayed (testkit, `tests/qemu.rs`).
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

use std::path::Path;
use std::sync::Arc;

use model_support::{open, read, right_extents, same_reads, try_open};
use vhdkit::ErrorKind;
use vhdkit::format::finding::{Code, Strictness};
use vhdkit::image::{ExtentKind, FileResolver, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::dirty::{DirtyPlan, Stale, edit_header};
use vhdkit_testkit::foreign::sha256_file;
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec, LogRing};
use vhdkit_testkit::model::{UNMAPPED, ZERO};
use vhdkit_testkit::random::{RandomOptions, random_dirty_plan, random_image};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::spec::{MIB, RegionSpec, RegionTableSpec};

const LOG: u64 = 0x106C_6F67;

fn log_guid() -> Guid {
    Guid::seeded(LOG)
}

fn dynamic() -> BuiltImage {
    ImageBuilder::new((6 << 30) + 512, 1 << 20)
        .pattern_block(0, 1)
        .block(1, BlockSpec::present(Content::Fill(0x5A)))
        .block(2, BlockSpec::new(ZERO))
        .block(3, BlockSpec::anchored(UNMAPPED, Content::pattern(2)))
        .pattern_block(4095, 4)
        .pattern_block(4096, 5)
        .pattern_block(6144, 6)
        .build()
}

/// Writes the log's identity into both headers.
fn set_log_guid(image: &mut BuiltImage) {
    for slot in 0..2 {
        edit_header(image, slot, |header| header[48..64].copy_from_slice(&log_guid().0));
    }
}

/// An image whose ring holds exactly these entries, one after another from a ring offset on.
fn with_entries(mut image: BuiltImage, start: u32, entries: &[LogEntrySpec]) -> BuiltImage {
    let mut ring = LogRing::new(image.layout.log, image.layout.log_length);
    ring.seek(start);
    for entry in entries {
        ring.place(&mut image.file, entry);
    }
    set_log_guid(&mut image);
    image
}

fn entry(sequence: u64, image: &BuiltImage) -> LogEntrySpec {
    LogEntrySpec::new(log_guid(), sequence, image.file.len())
}

/// The true contents of a page.
fn truth(image: &BuiltImage, page: u64) -> DescriptorSpec {
    DescriptorSpec::data(page, &image.file.read(page, 4096))
}

fn refused(image: &BuiltImage, kind: ErrorKind, code: Code) {
    let error = try_open(image, &OpenOptions::new()).unwrap_err();
    assert_eq!((error.kind(), error.code()), (kind, Some(code)), "{error}");
    let storage: Arc<dyn Storage> = model_support::TestFile::new(&image.file);
    let report = check(&storage, None, &CheckOptions::default(), &()).unwrap();
    assert!(report.findings.iter().any(|finding| finding.code() == code), "{:#?}", report.findings);
    assert!(report.errors > 0 && report.summary.is_none());
}

fn judge(name: &str, image: &BuiltImage) {
    let opened = open(name, image);
    assert!(opened.layers()[0].replay().is_some(), "{name}: the log is dirty");
    let mut rng = Rng::new(9);
    same_reads(name, &opened, image, &mut rng, 40);
    right_extents(name, &opened, image, &mut rng, true);
}

#[test]
fn every_kind_of_log_is_seen_through() {
    let clean = dynamic();
    let plan = || DirtyPlan::new(7).move_bat(&clean);
    let ring_end = (1 << 20) - 4096;
    let poison = clean.layout.payload_block(1) + 8192;
    let zeroed = clean.layout.payload_block(1) + (1 << 19);
    let zeroed_model = |image: &mut BuiltImage| image.model.write_zeroes((1 << 20) + (1 << 19), 3 * 4096);
    let cases: Vec<(&str, DirtyPlan)> = vec![
        ("one entry", plan()),
        ("several entries", plan().with(|plan| plan.entries = 3)),
        ("the entry wraps", plan().with(|plan| plan.ring_start = ring_end)),
        ("the run wraps", plan().with(|plan| (plan.ring_start, plan.entries, plan.empty_first) = (ring_end, 5, true))),
        ("stale generations", plan().with(|plan| plan.older_generations = 3)),
        ("a gap before the run", plan().with(|plan| (plan.older_generations, plan.gap) = (1, 12_288))),
        ("poison before the tail", plan().with(|plan| (plan.retired, plan.poison) = (3, Some(poison)))),
        ("an older run behind the newer one", plan().with(|plan| plan.older_run = true)),
        ("superseded pages", plan().with(|plan| (plan.supersede, plan.entries) = (true, 2))),
        ("torn homes", plan().with(|plan| plan.stale = Stale::Junk)),
        ("only the metadata", DirtyPlan::new(8).move_metadata(&clean)),
        ("only the region tables", DirtyPlan::new(9).move_region_tables(&clean)),
        ("payload pages", plan().move_range(&clean, clean.layout.payload_block(4096), 1 << 17)),
    ];
    for (name, plan) in cases {
        let mut image = clean.clone();
        plan.apply(&mut image);
        judge(name, &image);
    }
    let mut image = clean.clone();
    plan().with(|plan| (plan.zero_ranges, plan.entries) = (vec![(zeroed, 3 * 4096)], 4)).apply(&mut image);
    zeroed_model(&mut image);
    let opened = open("zero descriptors", &image);
    same_reads("zero descriptors", &opened, &image, &mut Rng::new(3), 60);
    assert_eq!(opened.layers()[0].replay().unwrap().zeroed_bytes, 3 * 4096);
    assert_eq!(read(&opened, (1 << 20) + (1 << 19), 3 * 4096), vec![0; 3 * 4096]);
}

/// Without replay these images are others: otherwise the cases above would prove nothing.
#[test]
fn unreplayed_logs_matter() {
    let clean = dynamic();
    let mut image = clean.clone();
    DirtyPlan::new(7).move_bat(&clean).apply(&mut image);
    for slot in 0..2 {
        edit_header(&mut image, slot, |header| header[48..64].fill(0));
    }
    let opened = open("not replayed", &image);
    assert!(opened.layers()[0].replay().is_none());
    assert_ne!(read(&opened, 0, 512), image.model.read(0, 512));
}

#[test]
fn random_dirty_images_and_chains() {
    for seed in 0..80 {
        let depth = 1 + seed as usize % 3;
        let options = RandomOptions { blocks_max: 6, ..RandomOptions::chain(depth) };
        let mut image = random_image(2000 + seed, &options);
        let plan = random_dirty_plan(seed, &image);
        plan.apply(&mut image);
        if let Some(parent) = image.parent.as_mut().filter(|_| seed % 2 == 0) {
            let parent = Arc::make_mut(parent);
            random_dirty_plan(seed ^ 99, parent).apply(parent);
        }
        let name = format!("seed {seed}, depth {depth}, {plan:?}");
        let opened = open(&name, &image);
        assert!(opened.layers()[0].replay().is_some());
        let mut rng = Rng::new(seed);
        same_reads(&name, &opened, &image, &mut rng, 25);
        right_extents(&name, &opened, &image, &mut rng, true);
    }
}

/// Reads, walks and checks a real dirty file: not a byte and not the time of its last change differ afterwards.
#[test]
fn the_file_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let mut image = random_image(42, &RandomOptions { virtual_size_max: 64 << 20, ..RandomOptions::chain(2) });
    random_dirty_plan(1, &image.clone()).apply(&mut image);
    let parent = Arc::make_mut(image.parent.as_mut().unwrap());
    random_dirty_plan(2, &parent.clone()).apply(parent);
    let path = image.write_chain(directory.path()).unwrap();
    let files = [path.clone(), directory.path().join(&image.parent.as_ref().unwrap().file_name)];
    let state = |path: &Path| (sha256_file(path).unwrap(), std::fs::metadata(path).unwrap().modified().unwrap());
    let before = files.each_ref().map(|path| state(path));
    let opened =
        OpenOptions::new().parents(Arc::new(FileResolver::new().allow_own_directory())).open_path(&path).unwrap();
    assert!(opened.layers().iter().all(|layer| layer.replay().is_some()));
    same_reads("file", &opened, &image, &mut Rng::new(1), 50);
    right_extents("file", &opened, &image, &mut Rng::new(2), true);
    for file in &files {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(file, FileAccess::Read, Sharing::Normal).unwrap());
        assert_eq!(check(&storage, None, &CheckOptions::default(), &()).unwrap().errors, 0);
    }
    drop(opened);
    assert_eq!(files.each_ref().map(|path| state(path)), before);
}

/// V-052: the region table in the log points to another BAT than the one in place.
#[test]
fn the_log_moves_the_bat() {
    let clean = dynamic();
    let mut image = clean.clone();
    DirtyPlan::new(5).move_region_tables(&clean).apply(&mut image);
    let decoy = clean.file.len();
    let table = RegionTableSpec {
        entries: vec![
            RegionSpec::at(Guid::BAT, decoy, MIB as u32, 1),
            RegionSpec::at(Guid::METADATA, clean.layout.metadata, clean.layout.metadata_length, 1),
        ],
        ..RegionTableSpec::default()
    };
    image.file.set_len(decoy + MIB);
    for copy in 0..2 {
        let offset = image.layout.region_table(copy);
        image.file.write(offset, &table.encode(|_| (0, 0)));
    }
    // Only the pages that were not zero are in the log; the rest of the table is zero in both.
    judge("moved BAT", &image);
    assert_eq!(open("moved", &image).layers()[0].region_table().bat.file_offset, clean.layout.bat);
    for slot in 0..2 {
        edit_header(&mut image, slot, |header| header[48..64].fill(0));
    }
    assert_eq!(open("decoy", &image).layers()[0].region_table().bat.file_offset, decoy);
}

/// V-044, V-045: what lies behind the end of the file is there after replay, by LastFileOffset or by a page alone.
#[test]
fn the_log_lets_the_file_grow() {
    let clean =
        ImageBuilder::new(64 << 20, 4 << 20).pattern_block(0, 1).block(9, BlockSpec::present(Content::Zero)).build();
    assert_eq!(clean.layout.payload_block(9) + (4 << 20), clean.file.len(), "the empty block is the last thing");
    let cut = clean.layout.payload_block(9);
    let mut image = clean.clone();
    DirtyPlan::new(3).move_bat(&clean).with(|plan| plan.cut_file = Some(cut)).apply(&mut image);
    judge("grown by LastFileOffset", &image);
    let opened = open("grown", &image);
    let report = opened.layers()[0].replay().unwrap();
    assert_eq!((report.file_size_before, report.file_size_after), (cut, clean.file.len()));
    assert_eq!(opened.layers()[0].file_size(), cut);

    let full = ImageBuilder::new(64 << 20, 1 << 20).pattern_block(0, 1).pattern_block(9, 2).build();
    let cut = full.layout.payload_block(9);
    let mut image = full.clone();
    let plan = DirtyPlan::new(3).move_bat(&full).with(|plan| plan.cut_file = Some(cut));
    // Half of the block's bytes are in the log; the other half is lost and reads as zero.
    plan.move_range(&full, cut, 1 << 19).apply(&mut image);
    image.model.write_zeroes((9 << 20) + (1 << 19), 1 << 19);
    let opened = open("payload behind the end", &image);
    same_reads("payload behind the end", &opened, &image, &mut Rng::new(1), 60);
}

/// Data that the log changes has no one place in the file: whoever copied from there would copy what is stale.
#[test]
fn data_in_the_log_has_no_place_in_the_file() {
    let clean =
        (0..4).fold(ImageBuilder::new(4 << 20, 1 << 20), |builder, block| builder.pattern_block(block, block)).build();
    for (block, page) in [(1, 0), (2, 100), (3, 255)] {
        let mut image = clean.clone();
        let at = clean.layout.payload_block(block) + page * 4096;
        DirtyPlan::new(3).move_range(&clean, at, 4096).apply(&mut image);
        let opened = open("one page", &image);
        for extent in model_support::extents(&opened, 0..4 << 20) {
            let changed = extent.start <= block << 20 && block << 20 < extent.end();
            let placed = matches!(extent.kind, ExtentKind::Data { file_offset: Some(_) });
            assert_eq!(placed, !changed, "page {page} of block {block}: {extent:x?}");
        }
        judge("one page", &image);
    }
}

/// V-045 for a LastFileOffset that is no multiple of 1 MiB, as QEMU writes it.
#[test]
fn an_unaligned_last_file_offset_is_a_warning() {
    let clean = dynamic();
    let page = clean.layout.bat;
    let grown = entry(4, &clean).descriptor(truth(&clean, page)).with(|entry| entry.last_file_offset += 4096);
    let image = with_entries(clean.clone(), 0, &[grown]);
    let opened = open("unaligned", &image);
    assert!(opened.layers()[0].findings().iter().any(|finding| finding.code() == Code::LogFileOffsetUnaligned));
    assert_eq!(opened.layers()[0].replay().unwrap().file_size_after, clean.file.len() + 4096);
}

/// V-040, V-041: the file must be as long as the newest entry says, and only as that one says.
#[test]
fn a_truncated_file_is_refused() {
    let clean = dynamic();
    let longer = clean.file.len() + MIB;
    let old = entry(7, &clean).with(|entry| (entry.flushed_file_offset, entry.last_file_offset) = (longer, longer));
    let head = entry(8, &clean).tail(0);
    judge("only an older entry says so", &with_entries(clean.clone(), 0, &[old, head]));
    let head = entry(8, &clean).with(|entry| (entry.flushed_file_offset, entry.last_file_offset) = (longer, longer));
    refused(&with_entries(clean, 0, &[head]), ErrorKind::Truncated, Code::LogFileTruncated);
}

/// V-035 to V-037, V-043: which entries count. Each case gives the byte that the replayed page begins with.
#[test]
fn the_active_sequence_is_the_right_one() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).block(0, BlockSpec::present(Content::Fill(1))).build();
    let page = clean.layout.payload_block(0);
    let say = |sequence: u64, byte: u8| entry(sequence, &clean).descriptor(DescriptorSpec::data(page, &[byte; 4096]));
    let other = |sequence: u64, byte: u8| say(sequence, byte).with(|entry| entry.log_guid = Guid::seeded(77));
    let (a, b, c) = (0, 8192, 16_384);
    let cases: Vec<(&str, Vec<LogEntrySpec>, u8)> = vec![
        ("the later image wins", vec![say(5, 10).tail(a), say(6, 11).tail(a)], 11),
        ("a gap ends the run, the higher number counts", vec![say(5, 10), say(9, 11)], 11),
        ("a gap ends the run, whatever comes first", vec![say(9, 10), say(5, 11)], 10),
        ("a gap whose head claims the older entry as tail", vec![say(5, 10), say(9, 11).tail(a)], 10),
        ("numbers that stay the same are no run", vec![say(5, 10), say(5, 11).tail(a), say(4, 12)], 10),
        ("another log's next entry", vec![say(5, 10), other(6, 11).tail(a)], 10),
        ("a tail in the middle of an entry", vec![say(5, 10), say(7, 11).tail(b + 4096), say(3, 12)], 10),
        ("an older run in front and behind", vec![say(3, 10), say(8, 11), say(5, 12)], 11),
        ("the tail is the head itself", vec![say(5, 10), say(6, 11).tail(b)], 11),
        (
            "a bad head loses the entry only",
            vec![say(5, 10), say(6, 11).tail(a), say(7, 12).tail(a).with(|entry| entry.reserved = 1)],
            11,
        ),
        ("the run goes on behind", vec![say(5, 10), say(6, 11).tail(a), say(7, 12).tail(c)], 12),
    ];
    for (name, entries, byte) in cases {
        let opened = open(name, &with_entries(clean.clone(), a, &entries));
        assert_eq!(read(&opened, 0, 4096), [byte; 4096], "{name}");
        let wrapped = open(name, &with_entries(clean.clone(), (1 << 20) - 4096, &shifted(&entries)));
        assert_eq!(read(&wrapped, 0, 4096), [byte; 4096], "{name}, around the end of the ring");
    }
    // The image of the tail's predecessor must not come back.
    let poison = page + 4096;
    let retired = say(5, 10).descriptor(DescriptorSpec::data(poison, &[66; 4096]));
    let opened = open("retired", &with_entries(clean.clone(), 0, &[retired, say(6, 11).tail(12_288)]));
    assert_eq!((read(&opened, 0, 1), read(&opened, 4096, 4096)), (vec![11], vec![1; 4096]));
    // A lone run whose tail leads nowhere is no sequence at all.
    let lost = with_entries(clean.clone(), 0, &[say(5, 10).tail(4096)]);
    refused(&lost, ErrorKind::Corrupt, Code::LogNoSequence);
}

/// The same entries, 4096 bytes before the end of the ring instead of at its start.
fn shifted(entries: &[LogEntrySpec]) -> Vec<LogEntrySpec> {
    let shift = |entry: &LogEntrySpec| {
        entry.clone().with(|entry| entry.tail = entry.tail.map(|tail| (tail + (1 << 20) - 4096) % (1 << 20)))
    };
    entries.iter().map(shift).collect()
}

/// V-039: one entry, and a run, that fill the ring to the last sector.
#[test]
fn a_full_ring_is_replayed() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build();
    let pages = |range: std::ops::Range<u64>| -> Vec<DescriptorSpec> {
        range.map(|page| truth(&clean, clean.layout.payload_block(0) + page * 4096)).collect()
    };
    for start in [0, 4096 * 77] {
        // Two descriptor sectors and 254 data sectors.
        let whole = entry(3, &clean).with(|entry| entry.descriptors = pages(0..254));
        assert_eq!(whole.byte_length(), 1 << 20);
        let mut image = with_entries(clean.clone(), start, &[whole]);
        image.file.zero(clean.layout.payload_block(0), 254 * 4096);
        judge("one entry fills the ring", &image);
        let halves: Vec<LogEntrySpec> = [(3, 0..126), (4, 126..253)]
            .into_iter()
            .map(|(sequence, range)| entry(sequence, &clean).tail(start).with(|entry| entry.descriptors = pages(range)))
            .collect();
        assert_eq!(halves.iter().map(LogEntrySpec::byte_length).sum::<usize>(), 1 << 20);
        let mut image = with_entries(clean.clone(), start, &halves);
        image.file.zero(clean.layout.payload_block(0), 253 * 4096);
        judge("two entries fill the ring", &image);
    }
}

/// V-046: zero descriptors take no data sector, wherever they stand among the others.
#[test]
fn data_and_zero_descriptors_mix() {
    let clean = ImageBuilder::new(8 << 20, 1 << 20).block(0, BlockSpec::present(Content::Fill(0xEE))).build();
    let base = clean.layout.payload_block(0);
    let data = |page: u64, byte: u8| DescriptorSpec::data(base + page * 4096, &[byte; 4096]);
    let zero = |page: u64, pages: u64| DescriptorSpec::zero(base + page * 4096, pages * 4096);
    let descriptors = vec![
        data(0, 1),
        zero(1, 2),
        data(3, 3),
        zero(3, 1),
        data(4, 4),
        zero(6, 0),
        zero(7, 4),
        data(8, 8),
        data(1, 9),
    ];
    let image = with_entries(clean.clone(), 0, &[entry(2, &clean).with(|entry| entry.descriptors = descriptors)]);
    let opened = open("mixed", &image);
    for (page, byte) in [1, 9, 0, 0, 4, 0xEE, 0xEE, 0, 8, 0, 0, 0xEE].into_iter().enumerate() {
        assert_eq!(read(&opened, page as u64 * 4096, 4096), [byte; 4096], "page {page}");
        // Unaligned pieces of it too.
        assert_eq!(read(&opened, page as u64 * 4096 + 100, 50), [byte; 50], "page {page}");
    }
    let across = read(&opened, 3 * 4096 - 10, 4096 + 20);
    assert_eq!(across, [vec![0; 4106], vec![4; 10]].concat());
}

/// V-047 to V-049: where a log may never write.
#[test]
fn targets_are_bounded() {
    let clean = dynamic();
    let page = |offset: u64| entry(2, &clean).descriptor(DescriptorSpec::data(offset, &[0xAA; 4096]));
    let zero = |offset: u64, length: u64| entry(2, &clean).descriptor(DescriptorSpec::zero(offset, length));
    let log = clean.layout.log;
    let end = clean.file.len();
    let cases = [
        (page(0), Code::LogTargetHeader),
        (page(0x1_0000), Code::LogTargetHeader),
        (page(0x2_F000), Code::LogTargetHeader),
        (zero(0x2_F000, 8192), Code::LogTargetHeader),
        (page(log), Code::LogTargetLog),
        (page(log + MIB - 4096), Code::LogTargetLog),
        (zero(log - 4096, 8192), Code::LogTargetLog),
        (page(end), Code::LogTargetBeyond),
        (zero(end - 4096, 8192), Code::LogTargetBeyond),
        (zero(MIB * 2, 1 << 60), Code::LogTargetBeyond),
        (zero(u64::MAX - 4095, 4096), Code::LogTargetBeyond),
        (page(u64::MAX - 4095), Code::LogTargetBeyond),
    ];
    for (entry, code) in cases {
        refused(&with_entries(clean.clone(), 0, &[entry]), ErrorKind::Corrupt, code);
    }
    let grow = entry(2, &clean).with(|entry| entry.last_file_offset = end + (65 << 30));
    let image = with_entries(clean.clone(), 0, &[grow]);
    refused(&image, ErrorKind::Limit, Code::LogGrowth);
    try_open(&image, &OpenOptions::new().log_growth_max(66 << 30)).unwrap();
    judge(
        "the first page that may be logged",
        &with_entries(clean.clone(), 0, &[entry(2, &clean).descriptor(truth(&clean, 0x3_0000))]),
    );
}

/// V-032, V-050: no sequence at all is an error, and absurd counts neither overflow nor allocate.
#[test]
fn broken_entries_are_no_sequence() {
    let clean = dynamic();
    let good = || entry(2, &clean).descriptor(truth(&clean, clean.layout.bat));
    let broken: Vec<(&str, LogEntrySpec)> = vec![
        ("signature", good().with(|entry| entry.signature = *b"logx")),
        ("checksum", good().with(|entry| entry.checksum = vhdkit_testkit::spec::Checksum::Wrong)),
        ("length 0", good().with(|entry| entry.entry_length = Some(0))),
        ("length unaligned", good().with(|entry| entry.entry_length = Some(8191))),
        ("length beyond the ring", good().with(|entry| entry.patches.push((8, (2_u32 << 20).to_le_bytes().to_vec())))),
        ("tail unaligned", good().tail(1)),
        ("tail beyond the ring", good().tail(1 << 20)),
        ("sequence 0", entry(0, &clean)),
        ("count", good().with(|entry| entry.descriptor_count = Some(u32::MAX))),
        ("another count", good().with(|entry| entry.descriptor_count = Some(2))),
        ("another log", good().with(|entry| entry.log_guid = Guid::seeded(1))),
        ("descriptor signature", good().with(|entry| entry.descriptors[0].signature = Some(*b"what"))),
        ("descriptor sequence", good().with(|entry| entry.descriptors[0].sequence = Some(3))),
        ("descriptor offset", entry(2, &clean).descriptor(DescriptorSpec::data(clean.layout.bat + 8, &[0; 4096]))),
        ("zero length", entry(2, &clean).descriptor(DescriptorSpec::zero(clean.layout.bat, 100))),
        ("sector signature", good().with(|entry| entry.descriptors[0].sector_signature = Some(*b"date"))),
        ("sector sequence, low", good().with(|entry| entry.descriptors[0].sector_sequence_low = Some(3))),
        ("sector sequence, high", good().with(|entry| entry.descriptors[0].sector_sequence_high = Some(1))),
    ];
    for (name, entry) in broken {
        println!("{name}");
        refused(&with_entries(clean.clone(), 0, &[entry]), ErrorKind::Corrupt, Code::LogNoSequence);
    }
    refused(&with_entries(clean.clone(), 0, &[]), ErrorKind::Corrupt, Code::LogNoSequence);
    judge("an empty entry is a sequence", &with_entries(clean.clone(), 0, &[entry(2, &clean)]));
}

#[test]
fn strict_mode_refuses_a_dirty_log() {
    let clean = dynamic();
    let mut image = clean.clone();
    DirtyPlan::new(7).move_bat(&clean).apply(&mut image);
    let error = try_open(&image, &OpenOptions::new().strictness(Strictness::Strict)).unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::NeedsReplay, Some(Code::LogNeedsReplay)));
    assert_eq!(try_open(&image, &OpenOptions::new().write(true)).unwrap_err().kind(), ErrorKind::NeedsReplay);
}

/// The report says what replay changes.
#[test]
fn the_report_counts_what_is_touched() {
    let parent = Arc::new(dynamic());
    let clean = ImageBuilder::new(64 << 20, 1 << 20)
        .differencing(&parent)
        .block(3, BlockSpec::partial(Content::pattern(1), SectorMask::random(1, 8, 50)))
        .build();
    let layout = &clean.layout;
    let descriptors = vec![
        truth(&clean, layout.bat),
        truth(&clean, layout.metadata),
        truth(&clean, layout.region_table(0)),
        truth(&clean, layout.region_table(1)),
        truth(&clean, layout.bitmap_block(0)),
        truth(&clean, layout.bat), // the same page again counts once
    ];
    let first = entry(11, &clean);
    let second = entry(12, &clean).tail(0).with(|entry| entry.descriptors = descriptors);
    let image = with_entries(clean.clone(), 0, &[first, second]);
    let opened = open("report", &image);
    let report = opened.layers()[0].replay().unwrap();
    assert_eq!((report.entries, report.first_sequence, report.last_sequence, report.pages), (2, 11, 12, 5));
    let mut touched: Vec<(&str, u64)> = report.touched.iter().map(|(name, pages)| (name.as_str(), *pages)).collect();
    touched.sort_unstable();
    let names = ["BAT region", "blocks", "metadata region", "region table copy 1", "region table copy 2"];
    assert_eq!(touched, names.map(|name| (name, 1)));
    judge("report", &image);
}
