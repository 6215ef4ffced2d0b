//! Every rule of the order of writes, broken on purpose: the simulator has to find the loss within 10,000 states.

use vhdkit::image::simulation::BrokenRule;
use vhdkit_testkit::dirty::edit_header;
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{Campaign, Lab, Report, Sampling};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, DescriptorSpec, Guid, ImageBuilder, LogEntrySpec, LogRing};

use crate::bases::{Base, Kind, base, long_headers};
use crate::world::{Style, World};

/// States that may be made, equal ones counted, before a broken rule has to be found.
const STATES_MAX: u64 = 10_000;

/// Programs of a style on images of a kind, until something is found or so many states were made.
fn campaign(make: impl Fn(&mut Rng) -> Base + Sync, style: Style, bounds: Campaign) -> Report {
    // What needs an unlikely order of steps is found by many programs rather than by many states of a few.
    let few = style.nested_percent >= 50;
    let sampling =
        if few { Sampling { exhaustive_ops: 1, random: 2 } } else { Sampling { exhaustive_ops: 3, random: 8 } };
    let program = |rng: &mut Rng, lab: &Lab| {
        let base = make(rng);
        World::start(lab, rng, base, style)?.run(rng)
    };
    let per_operation = if few { 1 } else { 3 };
    Campaign { sampling, per_operation, ..bounds }.run(&program)
}

fn found(rule: BrokenRule, make: impl Fn(&mut Rng) -> Base + Sync, style: Style) {
    let style = Style { broken: Some(rule), ..style };
    let report = campaign(make, style, Campaign { states_max: Some(STATES_MAX), ..Campaign::default() });
    let total = report.total();
    let Some(violation) = &report.violation else {
        panic!("{rule:?} was broken, and nothing was found in {} states\n{report}", total.states);
    };
    println!("{rule:?}: found after {} states, {} images: {}", total.states, total.distinct, violation.message);
    assert!(total.states <= STATES_MAX, "{rule:?} was found only after {} states\n{report}", total.states);
}

const STYLE: Style = Style { replay_percent: 10, ..Style::PLAIN };

macro_rules! broken {
    ($($name:ident: $rule:ident in $kind:expr;)*) => {
        $(
            #[test]
            fn $name() {
                found(BrokenRule::$rule, |rng| base(rng, $kind), STYLE);
            }
        )*
    };
}

broken! {
    logging_before_the_payload_is_durable: LogBeforeData in Kind::Dynamic;
    writing_home_before_the_entry_is_durable: HomeBeforeLogSync in Kind::Child;
    writing_an_entry_over_the_newest_one: RingReuse in Kind::Dynamic;
    retiring_an_entry_that_is_not_home: TailTooEarly in Kind::Child;
    publishing_the_log_guid_before_an_entry: GuidBeforeEntry in Kind::Dynamic;
    clearing_the_log_guid_before_home_is_durable: ClearBeforeHome in Kind::Child;
    clearing_the_log_guid_in_one_header: ClearOneSlot in Kind::Dynamic;
    giving_freed_space_out_at_once: FreeAtOnce in Kind::Dynamic;
    cutting_the_file_before_the_log_is_clean: CutBeforeClear in Kind::Dynamic;
    a_last_file_offset_that_stays_behind: LastOffsetFrozen in Kind::Dynamic;
    a_data_write_guid_that_comes_late: DataGuidLate in Kind::Dynamic;
    keeping_stale_bits: StaleBits in Kind::Child;
    a_sector_bitmap_in_stale_space: BitmapNotZeroed in Kind::Child;
    a_part_of_a_block_in_stale_space: StaleSpace in Kind::Dynamic;
    pages_made_from_the_file: PageFromDisk in Kind::Dynamic;
    one_commit_in_two_entries: SplitEntry in Kind::Child;
    a_file_write_guid_that_stays: FileGuidKept in Kind::Dynamic;
}

/// Where it takes something else in the middle of a commit.
const NESTED: Style = Style { nested_percent: 60, nested_in_commits: true, chain_percent: 5, ..STYLE };

#[test]
fn retiring_frees_that_came_after_the_take() {
    found(BrokenRule::FreeAfterTake, |rng| base(rng, Kind::Dynamic), NESTED);
}

/// Two blocks whose bits stand in different pages of the bitmap.
fn two_pages(rng: &mut Rng) -> Base {
    Base { blocks: vec![0, 18], ..base(rng, Kind::Child) }
}

#[test]
fn home_writes_of_a_later_moment() {
    found(BrokenRule::HomeFromMemory, two_pages, NESTED);
}

/// Where it takes others to give a block up, and its space to be used again, in the middle of one operation.
const CHAINED: Style = Style { nested_percent: 50, chain_percent: 80, ..STYLE };

#[test]
fn space_given_out_while_somebody_may_still_use_it() {
    found(BrokenRule::GateIgnored, |rng| base(rng, Kind::Dynamic), CHAINED);
}

/// Where flushes meet.
const BESIDE: Style = Style { follow_percent: 100, nested_percent: 50, ..STYLE };

#[test]
fn satisfying_a_flush_that_came_after_the_take() {
    found(BrokenRule::FlushJoined, |rng| base(rng, Kind::Dynamic), BESIDE);
}

/// Where it takes much else in the middle of anything.
const BUSY: Style = Style { nested_percent: 50, ..STYLE };

#[test]
fn publishing_before_the_payload() {
    found(BrokenRule::PublishBeforeData, |rng| base(rng, Kind::Child), BUSY);
}

#[test]
fn a_flushed_file_offset_that_runs_ahead() {
    found(BrokenRule::FlushedOffsetAhead, |rng| base(rng, Kind::Dynamic), NESTED);
}

/// A dynamic disk with free space that holds what somebody deleted long ago: a payload that is lost there shows.
fn with_junk(rng: &mut Rng) -> Base {
    loop {
        let base = base(rng, Kind::Dynamic);
        if base.image.file.read(5 << 20, 1) == [0x5a] {
            return base;
        }
    }
}

#[test]
fn taking_after_the_sync() {
    found(BrokenRule::TakeAfterSync, with_junk, NESTED);
}

#[test]
fn writing_both_headers_at_once() {
    found(BrokenRule::HeadersTogether, long_headers, STYLE);
}

/// A dirty log that needs replay, always.
fn dirty(rng: &mut Rng) -> Base {
    loop {
        let base = base(rng, Kind::Child);
        if base.image.file.read(base.image.layout.header(0) + 48, 16) != [0; 16] {
            return base;
        }
    }
}

const REPLAYED: Style = Style { replay_percent: 100, second_cuts: 4, ..STYLE };

#[test]
fn clearing_the_log_guid_before_the_replay_is_durable() {
    found(BrokenRule::ReplayClearEarly, dirty, REPLAYED);
}

/// An entry before the tail that names a place which a block has got since.
fn retired_entry_over_payload(_: &mut Rng) -> Base {
    let mut image: BuiltImage = ImageBuilder::new(8 << 20, 1 << 20)
        .block(0, BlockSpec::present(Content::Sparse { seed: 1, stride: 2 }))
        .block(1, BlockSpec::present(Content::Sparse { seed: 2, stride: 2 }))
        .build();
    let guid = Guid::seeded(77);
    let length = image.file.len();
    let mut ring = LogRing::new(image.layout.log, image.layout.log_length);
    let over = image.layout.payload_block(1);
    let retired = LogEntrySpec::new(guid, 10, length).descriptor(DescriptorSpec::data(over, &[0xdd; 4096]));
    let placed = ring.place(&mut image.file, &retired);
    let bat = image.file.read(image.layout.bat, 4096);
    let newest = LogEntrySpec::new(guid, 11, length)
        .descriptor(DescriptorSpec::data(image.layout.bat, &bat))
        .tail(placed.start + placed.length);
    ring.place(&mut image.file, &newest);
    for slot in 0..2 {
        edit_header(&mut image, slot, |header| header[48..64].copy_from_slice(&guid.0));
    }
    Base::new(image, &[0, 1])
}

#[test]
fn replaying_what_lies_before_the_tail() {
    found(BrokenRule::ReplayFromRunStart, retired_entry_over_payload, REPLAYED);
}

/// Images of each kind and style above that are looked at with no rule broken.
const CONTROL_IMAGES: u64 = if cfg!(debug_assertions) { 200 } else { 2_000 };

/// The control: the same images and styles, and no rule broken, are found to be in order.
#[test]
fn nothing_is_found_where_nothing_is_broken() {
    type Make = fn(&mut Rng) -> Base;
    let kinds: [(&str, Make, Style); 12] = [
        ("dynamic", |rng| base(rng, Kind::Dynamic), STYLE),
        ("child", |rng| base(rng, Kind::Child), STYLE),
        ("long headers", long_headers, STYLE),
        ("dynamic, nested", |rng| base(rng, Kind::Dynamic), NESTED),
        ("junk, nested", with_junk, NESTED),
        ("two pages, nested", two_pages, NESTED),
        ("dynamic, chained", |rng| base(rng, Kind::Dynamic), CHAINED),
        ("dynamic, flushes beside", |rng| base(rng, Kind::Dynamic), BESIDE),
        ("child, busy", |rng| base(rng, Kind::Child), BUSY),
        ("dirty, replayed", dirty, REPLAYED),
        ("retired entry, replayed", retired_entry_over_payload, REPLAYED),
        ("large, busy", |rng| base(rng, Kind::Large), BUSY),
    ];
    for (name, make, style) in kinds {
        let bounds = Campaign { first_seed: 1000, distinct_max: Some(CONTROL_IMAGES), ..Campaign::default() };
        let report = campaign(make, style, bounds);
        println!("{name}: {} images, {} states", report.total().distinct, report.total().states);
        report.expect_clean();
        assert!(report.total().distinct >= CONTROL_IMAGES, "{name}\n{report}");
    }
}
