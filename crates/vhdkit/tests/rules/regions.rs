//! V-060 to V-074: region tables.

use vhdkit::error::ErrorKind::{Corrupt, Truncated, Unsupported};
use vhdkit::format::finding::Code;
use vhdkit_testkit::spec::{Checksum, RegionSpec, RegionTableSpec};
use vhdkit_testkit::{Guid, ImageBuilder};

use crate::table::{
    Expect, MIB, Made, NOTE, Refuses, Row, WARNING, accepted, dynamic, entry_refused, noted, refused, row, warned,
};

const UNKNOWN: u64 = 0x756E;

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = copies();
    rows.extend(header());
    rows.extend(places());
    rows.extend(overlaps());
    rows.extend(unknown());
    rows.extend(required());
    rows
}

/// Changes the entry of the BAT in both tables.
fn bat(change: impl Fn(&mut RegionSpec)) -> ImageBuilder {
    dynamic().both_region_tables(|table| change(&mut table.entries[0]))
}

/// Changes the entry of the metadata region in both tables.
fn metadata(change: impl Fn(&mut RegionSpec)) -> ImageBuilder {
    dynamic().both_region_tables(|table| change(&mut table.entries[1]))
}

/// Adds an entry to both tables.
fn added(entry: RegionSpec) -> ImageBuilder {
    dynamic().both_region_tables(|table| table.entries.push(entry.clone()))
}

/// A table that leads elsewhere: the BAT where the metadata is, and the other way round.
fn bait(table: &mut RegionTableSpec) {
    let swapped = [3 * MIB, 2 * MIB].map(|offset| (offset, 1 << 20));
    for (entry, (offset, length)) in table.entries.iter_mut().zip(swapped.into_iter().rev()) {
        (entry.offset, entry.length) = (Some(offset), Some(length));
    }
}

fn copies() -> Vec<Row> {
    let spoilt = |copy: usize, change: fn(&mut RegionTableSpec)| {
        dynamic().with(|builder| {
            bait(&mut builder.region_tables[copy]);
            change(&mut builder.region_tables[copy]);
        })
    };
    let signature = |table: &mut RegionTableSpec| table.signature = *b"Regi";
    let checksum = |table: &mut RegionTableSpec| table.checksum = Checksum::Wrong;
    let mut rows = Vec::new();
    for copy in [0, 1] {
        let uses =
            move |made: Made| made.verify(move |image| assert_eq!(image.layers()[0].region_table().copy, 1 - copy));
        let uses = move |made: Made| if copy == 0 { uses(made) } else { made };
        let number = copy + 1;
        let warn = || warned(Code::RegionCopyDamaged);
        rows.push(row(
            "V-060",
            format!("wrong signature in copy {number}"),
            move || uses(spoilt(copy, signature).into()),
            warn(),
        ));
        rows.push(row(
            "V-060",
            format!("wrong checksum in copy {number}"),
            move || uses(spoilt(copy, checksum).into()),
            warn(),
        ));
        rows.push(row(
            "V-060",
            format!("one bit flipped in the last byte of copy {number}, which the checksum covers"),
            move || uses(spoilt(copy, |_| ()).patch(((copy as u64 + 4) << 16) - 1, &[0x80]).into()),
            warn(),
        ));
        rows.push(row(
            "V-061",
            format!("copy {number} is zero, the other is enough"),
            move || uses(spoilt(copy, |_| ()).patch((copy as u64 + 3) << 16, &[0; 65_536]).into()),
            warn(),
        ));
    }
    rows.push(row(
        "V-061",
        "both checksums are wrong",
        || dynamic().both_region_tables(|table| table.checksum = Checksum::Wrong),
        refused(Corrupt, Code::RegionTablesDamaged),
    ));
    rows.push(row(
        "V-061",
        "both are zero",
        || dynamic().patch(3 << 16, &[0; 131_072]),
        refused(Corrupt, Code::RegionTablesDamaged),
    ));
    rows.push(row(
        "V-062",
        "copy 2 says that the BAT is elsewhere",
        move || {
            let made = Made::new(spoilt(1, |_| ()));
            made.verify(|image| assert_eq!(image.layers()[0].region_table().copy, 0))
        },
        warned(Code::RegionCopiesDiffer),
    ));
    rows.push(row(
        "V-062",
        "copy 2 differs behind its entries only",
        || dynamic().with(|builder| builder.region_tables[1].patches.push((65_000, vec![1]))),
        warned(Code::RegionCopiesDiffer),
    ));
    rows
}

fn header() -> Vec<Row> {
    let count = |count: u32| dynamic().both_region_tables(|table| table.count_override = Some(count));
    let full = || {
        let entries = (0..2045).map(|number| RegionSpec::at(Guid::seeded(1000 + number), MIB, 0, 0));
        dynamic().both_region_tables(|table| table.entries.extend(entries.clone()))
    };
    let reserved = |value: u32| dynamic().both_region_tables(|table| table.reserved = value);
    let twice = |guid: Guid, required: u32| {
        let builder = added(RegionSpec::at(guid, 20 * MIB, 1 << 20, required));
        let builder = builder.both_region_tables(|table| {
            table.entries.push(RegionSpec::at(guid, 21 * MIB, 1 << 20, required));
        });
        builder.with(|builder| builder.file_length = Some(22 * MIB))
    };
    vec![
        row("V-063", "2048 entries", move || count(2048), refused(Corrupt, Code::RegionCount)),
        row("V-063", "2^32 - 1 entries", move || count(u32::MAX), refused(Corrupt, Code::RegionCount)),
        row("V-063", "2047 entries", full, noted(Code::RegionUnknown)),
        row("V-064", "1", move || reserved(1), warned(Code::RegionReserved)),
        row("V-064", "all bits", move || reserved(u32::MAX), warned(Code::RegionReserved)),
        row(
            "V-065",
            "the BAT twice",
            move || added(RegionSpec::at(Guid::BAT, 20 * MIB, 1 << 20, 1)).with(|b| b.file_length = Some(21 * MIB)),
            refused(Corrupt, Code::RegionDuplicate).also(&[Code::LeakedSpace]),
        ),
        row(
            "V-065",
            "the metadata twice, with the same place",
            || dynamic().both_region_tables(|table| table.entries.push(RegionSpec::new(Guid::METADATA))),
            refused(Corrupt, Code::RegionDuplicate),
        ),
        row(
            "V-065",
            "an unknown region twice",
            move || twice(Guid::seeded(UNKNOWN), 0),
            refused(Corrupt, Code::RegionDuplicate).also(&[Code::RegionUnknown, Code::LeakedSpace]),
        ),
    ]
}

fn places() -> Vec<Row> {
    let mut rows = Vec::new();
    let missing = |code| refused(Corrupt, code).also(&[Code::RegionMissing]);
    let unknown = |offset, length| added(RegionSpec::at(Guid::seeded(UNKNOWN), offset, length, 0));
    for offset in [0, 64 << 10, 3 * MIB + 4096, 3 * MIB + 512 * 1024] {
        rows.push(row(
            "V-066",
            format!("the BAT at {offset:#x}"),
            move || bat(|entry| entry.offset = Some(offset)),
            missing(Code::RegionOffset),
        ));
        rows.push(row(
            "V-066",
            format!("an unknown region at {offset:#x}"),
            move || unknown(offset, 1 << 20),
            refused(Corrupt, Code::RegionOffset).also(&[Code::RegionUnknown]),
        ));
    }
    rows.push(row(
        "V-066",
        "the metadata at 0",
        || metadata(|entry| entry.offset = Some(0)),
        missing(Code::RegionOffset),
    ));
    for length in [8, 4096, 512 << 10, (1 << 20) + 4096, u32::MAX] {
        rows.push(row(
            "V-067",
            format!("{length:#x} bytes of BAT"),
            move || bat(|entry| entry.length = Some(length)),
            missing(Code::RegionLength),
        ));
    }
    rows.push(row(
        "V-067",
        "65536 bytes of metadata",
        || metadata(|entry| entry.length = Some(65_536)),
        missing(Code::RegionLength),
    ));
    rows.push(row(
        "V-067",
        "4096 bytes of an unknown region",
        move || unknown(20 * MIB, 4096),
        refused(Corrupt, Code::RegionLength).also(&[Code::RegionUnknown]),
    ));
    rows.push(row("V-068", "no BAT", || bat(|entry| entry.length = Some(0)), missing(Code::RegionEmpty)));
    rows.push(row("V-068", "no metadata", || metadata(|entry| entry.length = Some(0)), missing(Code::RegionEmpty)));
    rows.push(row("V-068", "an empty unknown region", move || unknown(MIB, 0), noted(Code::RegionUnknown)));
    rows.extend(ends());
    rows
}

fn ends() -> Vec<Row> {
    let mut rows = Vec::new();
    let end = !(MIB - 1);
    let outside = || refused(Truncated, Code::RegionOutsideFile).also(&[Code::RegionMissing]);
    for (offset, length) in [(64 * MIB, 1 << 20), (end, 1 << 20), (end, 4095 << 20), (3 * MIB, 100 << 20)] {
        rows.push(row(
            "V-069",
            format!("the BAT with {length:#x} bytes at {offset:#x}"),
            move || bat(|entry| (entry.offset, entry.length) = (Some(offset), Some(length))),
            outside(),
        ));
        rows.push(row(
            "V-069",
            format!("an unknown region with {length:#x} bytes at {offset:#x}"),
            move || {
                // Behind everything else, so that it overlaps nothing.
                added(RegionSpec::at(Guid::seeded(UNKNOWN), offset.max(64 * MIB), length, 0))
            },
            // Where a file could ever reach it, blocks would be put there.
            warned(Code::RegionOptionalOutsideFile).also(&[Code::RegionUnknown]).with(|levels| {
                if offset != end {
                    let stop = Refuses(Truncated, Some(Code::RegionOptionalOutsideFile));
                    levels.iter_mut().for_each(|level| level.write = stop);
                }
            }),
        ));
    }
    rows.push(row(
        "V-069",
        "the metadata one mebibyte past the end",
        || {
            let builder = dynamic().with(|builder| {
                builder.blocks.clear();
                builder.bat_offset = Some(2 * MIB);
                builder.metadata_offset = Some(3 * MIB);
                builder.file_length = Some(4 * MIB);
            });
            builder.both_region_tables(|table| table.entries[1].length = Some(2 << 20))
        },
        outside(),
    ));
    rows
}

fn overlaps() -> Vec<Row> {
    let overlap = || refused(Corrupt, Code::RegionOverlap).also(&[Code::LeakedSpace]);
    let unknown = |offset, length, required| added(RegionSpec::at(Guid::seeded(UNKNOWN), offset, length, required));
    let follow = [Code::RegionUnknown, Code::MetadataSignature, Code::BatOverlap, Code::BatReserved, Code::BatAnchor];
    vec![
        row(
            "V-070",
            "the BAT over the metadata",
            || bat(|entry| entry.offset = Some(2 * MIB)),
            overlap().also(&[Code::BatReserved, Code::BatState]),
        ),
        row("V-070", "the BAT over the log", || bat(|entry| entry.offset = Some(MIB)), overlap()),
        row(
            "V-070",
            "the metadata over the log",
            || metadata(|entry| entry.offset = Some(MIB)),
            overlap().also(&follow),
        ),
        row("V-070", "the metadata into the BAT", || metadata(|entry| entry.length = Some(2 << 20)), overlap()),
        row("V-070", "an unknown region over the log", move || unknown(MIB, 1 << 20, 0), overlap().also(&follow)),
        row("V-070", "an unknown region over the BAT", move || unknown(3 * MIB, 1 << 20, 0), overlap().also(&follow)),
        row("V-070", "an unknown region over everything", move || unknown(MIB, 3 << 20, 0), overlap().also(&follow)),
        row(
            "V-070",
            "an unknown region over a block",
            move || Made::new(unknown(4 * MIB, 1 << 20, 0)).affects(0),
            entry_refused(Corrupt, Code::BatOverlap).also(&[Code::RegionUnknown]),
        ),
    ]
}

fn unknown() -> Vec<Row> {
    let without = |guid: Guid| dynamic().both_region_tables(|table| table.entries.retain(|entry| entry.guid != guid));
    let unknown = |required| {
        Made::new(dynamic().unknown_region(Guid::seeded(UNKNOWN), 3 * MIB, 2 << 20, required, 0x5A)).verify(|image| {
            let regions = &image.layers()[0].region_table().regions;
            assert!(regions.iter().any(|region| region.file_offset == 3 * MIB && region.length == 2 * MIB));
        })
    };
    vec![
        row("V-071", "no BAT", move || without(Guid::BAT), refused(Corrupt, Code::RegionMissing)),
        row("V-071", "no metadata", move || without(Guid::METADATA), refused(Corrupt, Code::RegionMissing)),
        row(
            "V-071",
            "no region",
            || dynamic().both_region_tables(|table| table.entries.clear()),
            refused(Corrupt, Code::RegionMissing),
        ),
        row("V-072", "required", move || unknown(1), refused(Unsupported, Code::RegionUnknownRequired)),
        row(
            "V-072",
            "required, with other bits",
            move || unknown(0x8000_0001),
            refused(Unsupported, Code::RegionUnknownRequired).also(&[Code::RegionRequiredFlag]),
        ),
        row("V-073", "optional, between the others", move || unknown(0), noted(Code::RegionUnknown)),
        row(
            "V-073",
            "optional, before the others in the table",
            || {
                let builder = dynamic().unknown_region(Guid::seeded(UNKNOWN), 5 * MIB, 1 << 20, 0, 0xFF);
                builder.both_region_tables(|table| table.entries.rotate_right(1))
            },
            noted(Code::RegionUnknown),
        ),
    ]
}

fn required() -> Vec<Row> {
    let mut rows = Vec::new();
    let grades = || Expect::graded(Corrupt, Code::RegionRequiredFlag, [NOTE, WARNING, WARNING]);
    for value in [0, 2, 0xCCCC_CCCC, u32::MAX] {
        rows.push(row(
            "V-074",
            format!("{value:#x} at the BAT"),
            move || bat(|entry| entry.required = value),
            grades(),
        ));
        rows.push(row(
            "V-074",
            format!("{value:#x} at the metadata"),
            move || metadata(|entry| entry.required = value),
            grades(),
        ));
    }
    rows.push(row(
        "V-074",
        "bit 1 at an unknown region does not make it required",
        || dynamic().unknown_region(Guid::seeded(UNKNOWN), 3 * MIB, 1 << 20, 2, 1),
        grades().also(&[Code::RegionUnknown]),
    ));
    rows.push(row("V-074", "1 at both", dynamic, accepted()));
    rows
}
