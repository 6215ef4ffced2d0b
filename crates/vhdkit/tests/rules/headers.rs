//! V-001 to V-021: file identifier and headers.

use vhdkit::error::ErrorKind::{Corrupt, Limit, NotVhdx, Truncated, Unsupported};
use vhdkit::format::finding::Code;
use vhdkit_testkit::spec::{Checksum, HeaderSpec};
use vhdkit_testkit::{Guid, ImageBuilder};

use crate::table::{MIB, Made, Row, accepted, dynamic, refused, row, warned, write_refused};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = identifier();
    rows.extend(copies());
    rows.extend(sequences());
    rows.extend(versions());
    rows.extend(log_place());
    rows.extend(limits());
    rows
}

fn cut(length: u64) -> ImageBuilder {
    dynamic().with(|builder| builder.file_length = Some(length))
}

fn identifier() -> Vec<Row> {
    let footer = |signature: &'static [u8; 8]| {
        dynamic().with(|builder| builder.signature = [0; 8]).patch(9 * MIB - 512, signature)
    };
    let creator = |units: Vec<u16>| dynamic().with(|builder| builder.creator = units);
    let says = |what: &'static str| move |error: &vhdkit::Error| assert!(error.message().contains(what), "{error}");
    vec![
        row("V-001", "empty file", || cut(0), refused(NotVhdx, Code::FileSignature)),
        row("V-001", "7 bytes", || cut(7), refused(NotVhdx, Code::FileSignature)),
        row("V-001", "the signature and nothing else", || cut(8), refused(Truncated, Code::FileTooSmall)),
        row("V-001", "ends inside the first header", || cut(65_536 + 100), refused(Truncated, Code::FileTooSmall)),
        row("V-001", "one byte short of the header section", || cut(MIB - 1), refused(Truncated, Code::FileTooSmall)),
        row("V-001", "the header section and nothing else", || cut(MIB), refused(Truncated, Code::LogOutsideFile)),
        row("V-002", "one wrong letter", || dynamic().patch(7, b"E"), refused(NotVhdx, Code::FileSignature)),
        row("V-002", "zeros", || dynamic().patch(0, &[0; 8]), refused(NotVhdx, Code::FileSignature)),
        row(
            "V-002",
            "dynamic VHD",
            move || Made::new(dynamic().patch(0, b"conectix")).verify_error(says("VHD, the older format")),
            refused(NotVhdx, Code::FileSignature),
        ),
        row(
            "V-002",
            "fixed VHD, which has its signature at the end",
            move || Made::new(footer(b"conectix")).verify_error(says("VHD, the older format")),
            refused(NotVhdx, Code::FileSignature),
        ),
        row(
            "V-003",
            "256 units without NUL",
            move || {
                let made = Made::new(creator(vec![u16::from(b'x'); 256]));
                made.verify(|image| assert_eq!(image.layers()[0].creator(), "x".repeat(256)))
            },
            accepted(),
        ),
        row(
            "V-003",
            "lone surrogates and escape sequences",
            move || {
                let made = Made::new(creator(vec![0xDC00, 0xD800, 0x1B, 0x5B, 0xD800]));
                made.verify(|image| {
                    assert_eq!(image.layers()[0].creator(), "\\u{dc00}\\u{d800}\\u{1b}[\\u{d800}");
                })
            },
            accepted(),
        ),
        row("V-003", "no creator", move || creator(Vec::new()), accepted()),
        row("V-003", "all bits set", move || creator(vec![0xFFFF; 256]), accepted()),
    ]
}

/// A header that would lead a reader astray: a version that does not exist, and a log that is nowhere.
fn bait(sequence: u64) -> HeaderSpec {
    HeaderSpec {
        sequence,
        version: 9,
        log_guid: Guid::seeded(66),
        log_offset: Some(77 * MIB),
        data_write_guid: Guid::seeded(67),
        ..HeaderSpec::default()
    }
}

/// The copy of this number is damaged, though it claims to be the newer one.
fn damaged(copy: usize, change: fn(&mut HeaderSpec)) -> Made {
    let made = Made::new(dynamic().with(|builder| {
        builder.headers[1 - copy] = HeaderSpec { sequence: 100, ..HeaderSpec::default() };
        builder.headers[copy] = bait(101);
        change(&mut builder.headers[copy]);
    }));
    made.verify(move |image| assert_eq!(image.layers()[0].headers().current_copy, 1 - copy))
}

fn copies() -> Vec<Row> {
    let mut rows = Vec::new();
    for (copy, rule) in [(0, "V-004"), (1, "V-005")] {
        let warn = || warned(Code::HeaderCopyDamaged);
        let signature = |header: &mut HeaderSpec| header.signature = *b"heaD";
        let checksum = |header: &mut HeaderSpec| header.checksum = Checksum::Wrong;
        rows.push(row(rule, "wrong signature in the newer copy", move || damaged(copy, signature), warn()));
        rows.push(row(rule, "wrong checksum in the newer copy", move || damaged(copy, checksum), warn()));
        rows.push(row(
            rule,
            "one bit flipped in the reserved part, which the checksum covers",
            move || {
                let slot = (copy as u64 + 1) << 16;
                damaged(copy, |_| ()).edit(|image| image.file.write(slot + 4095, &[1]))
            },
            warn(),
        ));
        rows.push(row(
            "V-007",
            format!("copy {} alone is valid, the other is zero", 2 - copy),
            move || damaged(copy, |_| ()).edit(|image| image.file.zero((copy as u64 + 1) << 16, 65_536)),
            warn(),
        ));
    }
    for (first, second) in [(Checksum::Wrong, Checksum::Wrong), (Checksum::Value(0), Checksum::Wrong)] {
        rows.push(row(
            "V-006",
            format!("checksums {first:?} and {second:?}"),
            move || {
                dynamic().with(|builder| {
                    builder.headers[0].checksum = first;
                    builder.headers[1].checksum = second;
                })
            },
            refused(Corrupt, Code::HeadersDamaged),
        ));
    }
    rows.push(row(
        "V-006",
        "one wrong signature, one wrong checksum",
        || {
            dynamic().with(|builder| {
                builder.headers[0].signature = *b"daeh";
                builder.headers[1].checksum = Checksum::Wrong;
            })
        },
        refused(Corrupt, Code::HeadersDamaged),
    ));
    rows
}

fn sequences() -> Vec<Row> {
    let mut rows = Vec::new();
    for (older, newer) in [(0, 1 << 63), ((1 << 63) - 1, 1 << 63), (0, 1), (7, u64::MAX - 100)] {
        for newer_copy in [0, 1] {
            rows.push(row(
                "V-008",
                format!("{newer:#x} in copy {} wins over {older:#x}", newer_copy + 1),
                move || {
                    let made = Made::new(dynamic().with(|builder| {
                        builder.headers[1 - newer_copy] = bait(older);
                        builder.headers[newer_copy].sequence = newer;
                    }));
                    made.verify(move |image| {
                        assert_eq!(image.layers()[0].headers().current.sequence_number, newer);
                    })
                },
                accepted(),
            ));
        }
    }
    let tie = |change: fn(&mut HeaderSpec)| {
        dynamic().both_headers(|header| header.sequence = 7).with(|builder| change(&mut builder.headers[1]))
    };
    let conflict = || refused(Corrupt, Code::HeaderConflict);
    rows.push(row("V-009", "identical, as Disk2vhd writes", move || tie(|_| ()), warned(Code::HeaderSequenceTie)));
    rows.push(row(
        "V-009",
        "another data write GUID",
        move || tie(|header| header.data_write_guid = Guid::seeded(5)),
        conflict(),
    ));
    rows.push(row("V-009", "another log GUID", move || tie(|header| header.log_guid = Guid::seeded(5)), conflict()));
    rows.push(row(
        "V-009",
        "all fields equal, another reserved byte",
        move || tie(|header| header.patches.push((4000, vec![1]))),
        conflict(),
    ));
    rows
}

fn versions() -> Vec<Row> {
    let versions = |first: u16, second: u16| {
        dynamic().with(|builder| {
            builder.headers[0].version = first;
            builder.headers[1].version = second;
        })
    };
    let unsupported = || refused(Unsupported, Code::HeaderVersion);
    vec![
        row("V-010", "2 in the newer copy is no reason to fall back", move || versions(1, 2), unsupported()),
        row("V-010", "2 in both", move || versions(2, 2), unsupported()),
        row("V-010", "0 in the newer copy", move || versions(1, 0), unsupported()),
        row("V-010", "2 in the older copy does not matter", move || versions(2, 1), accepted()),
        row(
            "V-011",
            "log version 5 without a log in use",
            || dynamic().both_headers(|header| header.log_version = 5),
            accepted(),
        ),
        row(
            "V-011",
            "log version 1 with a log in use",
            || {
                dynamic().both_headers(|header| {
                    header.log_version = 1;
                    header.log_guid = Guid::seeded(8);
                })
            },
            refused(Unsupported, Code::LogVersion),
        ),
    ]
}

fn log_place() -> Vec<Row> {
    let log = |offset: Option<u64>, length: Option<u32>| {
        dynamic().both_headers(move |header| {
            header.log_offset = offset;
            header.log_length = length;
        })
    };
    let mut rows = Vec::new();
    for length in [4096, 512 << 10, (1 << 20) + 4096] {
        rows.push(row(
            "V-012",
            format!("length {length:#x}"),
            move || log(None, Some(length)),
            refused(Corrupt, Code::LogLengthUnaligned),
        ));
    }
    for offset in [MIB + 4096, MIB + 512, 4096] {
        rows.push(row(
            "V-013",
            format!("offset {offset:#x}"),
            move || log(Some(offset), None),
            refused(Corrupt, Code::LogOffsetUnaligned),
        ));
    }
    rows.push(row("V-014", "offset 0", move || log(Some(0), None), refused(Corrupt, Code::LogOffsetLow)));
    let end = !(MIB - 1);
    for (offset, length) in [(64 * MIB, 1 << 20), (end, 1 << 20), (end - MIB, 3 << 20), (MIB, 900 << 20)] {
        rows.push(row(
            "V-015",
            format!("{length:#x} bytes at {offset:#x}"),
            move || log(Some(offset), Some(length)),
            refused(Truncated, Code::LogOutsideFile),
        ));
    }
    rows.push(row(
        "V-016",
        "log GUID without a log",
        || {
            dynamic().both_headers(|header| {
                header.log_length = Some(0);
                header.log_guid = Guid::seeded(8);
            })
        },
        refused(Corrupt, Code::LogGuidWithoutLog),
    ));
    rows
}

fn limits() -> Vec<Row> {
    let sequence = |sequence: u64| {
        dynamic().with(|builder| {
            builder.headers[0].sequence = sequence - 1;
            builder.headers[1].sequence = sequence;
        })
    };
    let exhausted = || write_refused(Limit, Code::HeaderSequenceExhausted);
    let reserved =
        |copy: usize, offset: usize| dynamic().with(|builder| builder.headers[copy].patches.push((offset, vec![0xFF])));
    let without_log = |offset: u64| {
        let builder = dynamic().with(|builder| builder.log_length = 0);
        builder.both_headers(move |header| header.log_offset = Some(offset))
    };
    let log_length = |length: u32| dynamic().with(|builder| builder.log_length = length);
    vec![
        row("V-017", "2^64 - 65 leaves room for a session", move || sequence(u64::MAX - 64), accepted()),
        row("V-017", "2^64 - 64", move || sequence(u64::MAX - 63), exhausted()),
        row("V-017", "2^64 - 2", move || sequence(u64::MAX - 1), exhausted()),
        row("V-017", "2^64 - 1", move || sequence(u64::MAX), exhausted()),
        row("V-018", "byte 80 of the current copy", move || reserved(1, 80), warned(Code::HeaderReserved)),
        row("V-018", "byte 4095 of the other copy", move || reserved(0, 4095), warned(Code::HeaderReserved)),
        row(
            "V-018",
            "the reserved bytes of a damaged copy mean nothing",
            || damaged(0, |_| ()).edit(|image| image.file.write(1 << 16, &[0xAA; 4096])),
            warned(Code::HeaderCopyDamaged),
        ),
        row("V-019", "1 GiB", move || log_length(1 << 30), accepted()),
        row("V-019", "1 GiB and 1 MiB", move || log_length((1 << 30) + (1 << 20)), refused(Limit, Code::LogTooLong)),
        row("V-019", "2 GiB", move || log_length(2 << 30), refused(Limit, Code::LogTooLong)),
        row("V-020", "no log, at 0", move || without_log(0), write_refused(Limit, Code::LogMissing)),
        row("V-020", "no log, at nowhere", move || without_log(12_345), write_refused(Limit, Code::LogMissing)),
        row("V-020", "no log, at the end", move || without_log(u64::MAX), write_refused(Limit, Code::LogMissing)),
        row(
            "V-021",
            "junk wherever it must be ignored",
            || dynamic().with(|builder| builder.junk = Some(4)),
            accepted(),
        ),
        row(
            "V-021",
            "all bits set behind the region tables and behind the headers",
            || {
                let builder = dynamic().patch(5 << 16, &vec![0xFF; (11 << 16) as usize]);
                builder.patch(65_536 + 4096, &[0xFF; 61_440]).patch(131_072 + 4096, &[0xFF; 61_440])
            },
            accepted(),
        ),
    ]
}
