//! V-030 to V-039 and V-050: which entries of the ring count.

use vhdkit::error::ErrorKind::Corrupt;
use vhdkit::format::finding::Code;
use vhdkit_testkit::Guid;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec};
use vhdkit_testkit::spec::Checksum;

use crate::ring::{PAGE, Ring, guid, made};
use crate::table::{Made, Row, accepted, dynamic, refused, replayed, row};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = use_of_log();
    rows.extend(entry_conditions());
    rows.extend(sequences());
    rows.extend(tails());
    rows.extend(runs());
    rows.extend(wraps());
    rows
}

fn no_sequence() -> crate::table::Expect {
    refused(Corrupt, Code::LogNoSequence)
}

fn use_of_log() -> Vec<Row> {
    let clean = |write: fn(&mut Ring)| {
        let mut ring = Ring::clean(dynamic());
        write(&mut ring);
        ring.done()
    };
    let mut rows = vec![
        row(
            "V-030",
            "entries of a former log in use",
            move || {
                clean(|ring| {
                    let entry = ring.entry(9, 0, 0xAA);
                    ring.put(&entry);
                })
            },
            accepted(),
        ),
        row(
            "V-030",
            "entries whose GUID is zero, as the header's",
            move || {
                clean(|ring| {
                    let entry = ring.entry(9, 0, 0xAA).with(|entry| entry.log_guid = Guid::ZERO);
                    ring.put(&entry);
                })
            },
            accepted(),
        ),
        row(
            "V-031",
            "one page",
            || {
                made(|ring| {
                    ring.replayed(5, 0, 0xA0);
                })
            },
            replayed(),
        ),
        row(
            "V-031",
            "only the older header says that the log is in use",
            || {
                let mut ring = Ring::clean(dynamic().with(|builder| builder.headers[0].log_guid = guid()));
                let entry = ring.entry(9, 0, 0xAA);
                ring.put(&entry);
                ring.done()
            },
            accepted(),
        ),
    ];
    rows.extend(without_sequence());
    rows
}

fn without_sequence() -> Vec<Row> {
    vec![
        row("V-032", "an empty ring", || made(|_| ()), no_sequence()),
        row(
            "V-032",
            "a ring of junk",
            || made(|ring| ring.image.file.write(1 << 20, &vec![0x5A; 1 << 20])),
            no_sequence(),
        ),
        row(
            "V-032",
            "only entries of a former log",
            || {
                made(|ring| {
                    let entry = ring.entry(9, 0, 0xAA).with(|entry| entry.log_guid = Guid::seeded(1));
                    ring.put(&entry);
                })
            },
            no_sequence(),
        ),
        row(
            "V-032",
            "only entries whose GUID is zero",
            || {
                made(|ring| {
                    let entry = ring.entry(9, 0, 0xAA).with(|entry| entry.log_guid = Guid::ZERO);
                    ring.put(&entry);
                })
            },
            no_sequence(),
        ),
    ]
}

/// What may be wrong with an entry: the condition, what is wrong, and how to make it so.
type Fault = (&'static str, &'static str, fn(LogEntrySpec) -> LogEntrySpec);

fn first(mut entry: LogEntrySpec, change: impl FnOnce(&mut DescriptorSpec)) -> LogEntrySpec {
    change(&mut entry.descriptors[0]);
    entry
}

/// Puts bytes over an entry before its checksum is made.
fn patch(entry: LogEntrySpec, offset: usize, bytes: &[u8]) -> LogEntrySpec {
    let bytes = bytes.to_vec();
    entry.with(|entry| entry.patches.push((offset, bytes)))
}

const FAULTS: &[Fault] = &[
    ("E2", "signature", |entry| entry.with(|entry| entry.signature = *b"logE")),
    ("E3", "length 8192 + 512", |entry| entry.with(|entry| entry.entry_length = Some(8192 + 512))),
    ("E3", "length 0", |entry| patch(entry, 8, &[0; 4])),
    ("E3", "length of 2 MiB in a ring of 1 MiB", |entry| patch(entry, 8, &(2_u32 << 20).to_le_bytes())),
    ("E3", "length 2^32 - 4096", |entry| patch(entry, 8, &0xFFFF_F000_u32.to_le_bytes())),
    ("E4", "tail 512", |entry| entry.tail(512)),
    ("E4", "tail at the end of the ring", |entry| entry.tail(1 << 20)),
    ("E4", "tail 2^32 - 4096", |entry| entry.tail(0xFFFF_F000)),
    ("E6", "383 descriptors in two sectors", |entry| entry.with(|entry| entry.descriptor_count = Some(383))),
    ("E6", "no descriptor for the data", |entry| entry.with(|entry| entry.descriptor_count = Some(0))),
    ("E7", "reserved field", |entry| entry.with(|entry| entry.reserved = 1)),
    ("E8", "another log GUID", |entry| entry.with(|entry| entry.log_guid = Guid::seeded(99))),
    ("E9", "checksum", |entry| entry.with(|entry| entry.checksum = Checksum::Wrong)),
    ("E9", "checksum 0", |entry| entry.with(|entry| entry.checksum = Checksum::Value(0))),
    ("E10", "descriptor signature", |entry| first(entry, |data| data.signature = Some(*b"dexc"))),
    ("E10", "descriptor sequence number", |entry| first(entry, |data| data.sequence = Some(4))),
    ("E10", "unaligned target", |entry| {
        let target = u64::from_le_bytes(entry.encode(0)[80..88].try_into().unwrap());
        patch(entry, 80, &(target + 512).to_le_bytes())
    }),
    ("E10", "unaligned length to zero", |entry| entry.descriptor(DescriptorSpec::zero(4 << 20, 4096 + 512))),
    ("E10", "unaligned target to zero", |entry| entry.descriptor(DescriptorSpec::zero((4 << 20) + 512, 4096))),
    ("E10", "reserved field of a zero descriptor", |entry| {
        let mut zero = DescriptorSpec::zero(4 << 20, 4096);
        zero.reserved = 1;
        entry.descriptor(zero)
    }),
    ("E10", "one good descriptor, then zeros", |entry| entry.descriptor(DescriptorSpec::raw([0; 32]))),
    ("E11", "one sector too long", |entry| entry.with(|entry| entry.entry_length = Some(12_288))),
    ("E11", "one data sector more than descriptors", |entry| {
        let sequence = entry.sequence.to_le_bytes();
        let entry = patch(patch(entry, 8192, b"data"), 8196, &sequence[4..]);
        patch(entry, 12_284, &sequence[..4]).with(|entry| entry.entry_length = Some(12_288))
    }),
    ("E12", "signature of the data sector", |entry| first(entry, |data| data.sector_signature = Some(*b"dats"))),
    ("E12", "upper sequence number of the data sector", |entry| {
        first(entry, |data| data.sector_sequence_high = Some(1))
    }),
    ("E12", "lower sequence number of the data sector", |entry| {
        first(entry, |data| data.sector_sequence_low = Some(4))
    }),
];

/// A good entry, and behind it one that continues it, but for one fault.
fn behind(fault: fn(LogEntrySpec) -> LogEntrySpec) -> Made {
    made(|ring| {
        let head = ring.replayed(5, 0, 0xA0);
        let next = fault(ring.entry(6, 1, 0xB1).tail(head.start));
        ring.put(&next);
    })
}

/// A good entry elsewhere, and a later sequence whose last entry has a fault.
fn falls_back(fault: fn(LogEntrySpec) -> LogEntrySpec) -> Made {
    made(|ring| {
        ring.ring.seek(0x8_0000);
        ring.replayed(5, 0, 0xA0);
        ring.ring.seek(0);
        let next = fault(ring.entry(70, 1, 0xB1));
        ring.put(&next);
    })
}

/// Nothing but an entry with a fault.
fn alone(fault: fn(LogEntrySpec) -> LogEntrySpec) -> Made {
    made(|ring| {
        let only = fault(ring.entry(6, 1, 0xB1));
        ring.put(&only);
    })
}

fn entry_conditions() -> Vec<Row> {
    let mut rows = Vec::new();
    for (condition, what, fault) in FAULTS.iter().copied() {
        rows.push(row("V-033", format!("{condition}, {what}: behind the head"), move || behind(fault), replayed()));
        rows.push(row(
            "V-033",
            format!("{condition}, {what}: a later sequence vanishes"),
            move || falls_back(fault),
            replayed(),
        ));
        rows.push(row("V-033", format!("{condition}, {what}: alone"), move || alone(fault), no_sequence()));
    }
    rows.extend(places_and_numbers());
    rows
}

fn places_and_numbers() -> Vec<Row> {
    let mut rows = Vec::new();
    // E1 and E5 are about where an entry is and what its number is, so that they need rings of their own.
    rows.push(row(
        "V-033",
        "E1, not at a sector: behind the head",
        || {
            made(|ring| {
                let head = ring.replayed(5, 0, 0xA0);
                ring.ring.skip(2048);
                let next = ring.entry(6, 1, 0xB1).tail(head.start);
                ring.put(&next);
            })
        },
        replayed(),
    ));
    rows.push(row(
        "V-033",
        "E1, not at a sector: alone",
        || {
            made(|ring| {
                ring.ring.seek(512);
                let only = ring.entry(6, 1, 0xB1);
                ring.put(&only);
            })
        },
        no_sequence(),
    ));
    rows.push(row(
        "V-033",
        "E5, sequence number 0: behind 2^64 - 1",
        || {
            made(|ring| {
                let head = ring.replayed(u64::MAX, 0, 0xA0);
                let next = ring.entry(0, 1, 0xB1).tail(head.start);
                ring.put(&next);
            })
        },
        replayed(),
    ));
    rows.push(row(
        "V-033",
        "E5, sequence number 0: alone",
        || {
            made(|ring| {
                let only = ring.entry(0, 1, 0xB1);
                ring.put(&only);
            })
        },
        no_sequence(),
    ));
    rows.extend(descriptor_counts());
    rows
}

fn descriptor_counts() -> Vec<Row> {
    let mut rows = Vec::new();
    for count in [u32::MAX, 0x0800_0000, 0x07FF_FFFE] {
        let fault = move |entry: LogEntrySpec| entry.with(|entry| entry.descriptor_count = Some(count));
        rows.push(row(
            "V-050",
            format!("{count:#x} descriptors behind the head"),
            move || {
                made(|ring| {
                    let head = ring.replayed(5, 0, 0xA0);
                    let next = fault(ring.entry(6, 1, 0xB1).tail(head.start));
                    ring.put(&next);
                })
            },
            replayed(),
        ));
        rows.push(row(
            "V-050",
            format!("{count:#x} descriptors alone"),
            move || {
                made(|ring| {
                    let only = fault(ring.entry(6, 1, 0xB1));
                    ring.put(&only);
                })
            },
            no_sequence(),
        ));
    }
    rows
}

fn sequences() -> Vec<Row> {
    let stale = |log_guid: Guid| {
        made(|ring| {
            let head = ring.replayed(5, 0, 0xA0);
            let next = ring.entry(6, 1, 0xB1).tail(head.start).with(|entry| entry.log_guid = log_guid);
            ring.put(&next);
        })
    };
    let mut rows = vec![
        row("V-034", "a stale generation continues the numbers", move || stale(Guid::seeded(3)), replayed()),
        row("V-034", "so does one whose GUID is zero", move || stale(Guid::ZERO), replayed()),
        row(
            "V-034",
            "a stale generation with far higher numbers, before and behind",
            || {
                made(|ring| {
                    for sequence in [900, 901] {
                        let old = ring.entry(sequence, 1, 0xB1).with(|entry| entry.log_guid = Guid::seeded(3));
                        ring.put(&old);
                    }
                    let tail = ring.replayed(5, 0, 0xA0).start;
                    ring.sees(2, 0xA2);
                    let head = ring.entry(6, 2, 0xA2).tail(tail);
                    ring.put(&head);
                    let old = ring.entry(902, 1, 0xB1).with(|entry| entry.log_guid = Guid::seeded(4));
                    ring.put(&old);
                })
            },
            replayed(),
        ),
    ];
    rows.extend(gaps());
    rows
}

fn gaps() -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, number) in [("one is left out", 7), ("the same again", 5), ("backwards", 4), ("back to 1", 1)] {
        rows.push(row(
            "V-035",
            format!("{what}: 5 and then {number}, which belongs to it by its tail"),
            move || {
                made(|ring| {
                    let head = ring.replayed(5, 0, 0xA0);
                    let next = ring.entry(number, 1, 0xB1).tail(head.start);
                    ring.put(&next);
                })
            },
            replayed(),
        ));
    }
    rows.push(row(
        "V-035",
        "behind a gap begins a sequence of its own, and it is newer",
        || {
            made(|ring| {
                let old = ring.entry(5, 1, 0xB1);
                ring.put(&old);
                ring.replayed(7, 0, 0xA0);
            })
        },
        replayed(),
    ));
    rows.push(row(
        "V-035",
        "a gap between the first and the second of three",
        || {
            made(|ring| {
                let old = ring.entry(5, 1, 0xB1);
                let start = ring.put(&old).start;
                let old = ring.entry(7, 2, 0xB2).tail(start);
                ring.put(&old);
                // The last two are a run, but their tail is not in it. The first is one, and its own tail.
                let old = ring.entry(8, 3, 0xB3).tail(start);
                ring.put(&old);
                ring.sees(1, 0xB1);
            })
        },
        replayed(),
    ));
    rows
}

/// Two entries in a row; the tail of the second is this.
fn tail(tail: impl FnOnce(u32) -> u32) -> Made {
    made(|ring| {
        let start = ring.put(&ring.entry(5, 1, 0xB1)).start;
        let head = ring.entry(6, 2, 0xB2).tail(tail(start));
        ring.put(&head);
    })
}

fn tails() -> Vec<Row> {
    vec![
        row("V-036", "inside an entry of the run", || tail(|start| start + 4096), no_sequence()),
        row("V-036", "inside the last entry", || tail(|start| start + 3 * 4096), no_sequence()),
        row("V-036", "behind the last entry", || tail(|start| start + 4 * 4096), no_sequence()),
        row("V-036", "far away", || tail(|_| 0x4_0000), no_sequence()),
        row(
            "V-036",
            "at an entry of another run",
            || {
                made(|ring| {
                    let other = ring.put(&ring.entry(1, 3, 0xB3)).start;
                    ring.ring.skip(4096);
                    let head = ring.entry(6, 2, 0xB2).tail(other);
                    ring.put(&head);
                    ring.sees(3, 0xB3);
                })
            },
            replayed(),
        ),
        row(
            "V-036",
            "the newer run falls back to an older one",
            || {
                made(|ring| {
                    ring.replayed(3, 0, 0xA0);
                    ring.ring.seek(0x8_0000);
                    let start = ring.put(&ring.entry(5, 1, 0xB1)).start;
                    let head = ring.entry(6, 2, 0xB2).tail(start + 4096);
                    ring.put(&head);
                })
            },
            replayed(),
        ),
    ]
}

fn runs() -> Vec<Row> {
    let two = |older: u32, newer: u32| {
        made(|ring| {
            ring.ring.seek(older);
            let start = ring.put(&ring.entry(10, 1, 0xB1)).start;
            let old = ring.entry(11, 2, 0xB2).tail(start);
            ring.put(&old);
            ring.ring.seek(newer);
            let start = ring.replayed(20, 0, 0xA0).start;
            let head = ring.entry(21, 3, 0xA3).tail(start);
            ring.put(&head);
            ring.sees(3, 0xA3);
        })
    };
    vec![
        row("V-037", "the older run lies before", move || two(0, 0x8_0000), replayed()),
        row("V-037", "the older run lies behind", move || two(0x8_0000, 0), replayed()),
        row("V-037", "the older run lies right before", move || two(0, 4 * 4096), replayed()),
        row("V-037", "the older run lies right behind", move || two(4 * 4096, 0), replayed()),
        row(
            "V-037",
            "the first number of a run does not decide",
            || {
                made(|ring| {
                    // Entries 1 to 30, and a run of its own with number 20.
                    let start = ring.ring.position;
                    for sequence in 1..=30 {
                        let entry = ring.entry(sequence, sequence, 0xA0).tail(start);
                        ring.put(&entry);
                        ring.sees(sequence, 0xA0);
                    }
                    ring.ring.seek(0x8_0000);
                    let old = ring.entry(20, 0, 0xB1);
                    ring.put(&old);
                })
            },
            replayed(),
        ),
    ]
}

/// Three entries with a page each, and two more pages in the last, from this place on.
fn around(start: u32) -> Made {
    made(|ring| {
        ring.ring.seek(start);
        let tail = ring.replayed(5, 0, 0xA0).start;
        let middle = ring.entry(6, 1, 0xA1).tail(tail);
        ring.put(&middle);
        let last = ring.entry(7, 2, 0xA2).tail(tail).descriptor(ring.page(3, 0xA3)).descriptor(ring.page(4, 0xA4));
        ring.put(&last);
        for page in 1..5 {
            ring.sees(page, 0xA0 + page as u8);
        }
    })
}

/// An entry of two descriptor sectors and two pages, from this place on.
fn long(start: u32) -> Made {
    made(|ring| {
        ring.ring.seek(start);
        let mut entry = ring.empty(5).descriptor(ring.page(0, 0xA0));
        for page in 10..138 {
            entry = entry.descriptor(DescriptorSpec::zero(ring.home(page), PAGE));
        }
        let entry = entry.descriptor(ring.page(1, 0xA1));
        assert_eq!(entry.descriptor_sectors(), 2);
        ring.put(&entry);
        ring.sees(0, 0xA0);
        ring.sees(1, 0xA1);
        ring.image.model.write_zeroes(10 * PAGE, 128 * PAGE);
    })
}

/// The ring is full to the last sector with entries of one page each, from this place on.
fn full(start: u32) -> Made {
    made(|ring| {
        ring.ring.seek(start);
        for number in 0..128 {
            let entry = ring.entry(100 + number, number, 0xA0 + (number % 16) as u8).tail(start);
            ring.put(&entry);
            ring.sees(number, 0xA0 + (number % 16) as u8);
        }
        assert_eq!(ring.ring.position, start);
    })
}

/// The ring is full with one entry of 254 pages, from this place on.
fn one_entry(start: u32) -> Made {
    made(|ring| {
        ring.ring.seek(start);
        let pages = (0..254).map(|page| ring.page(page, page as u8)).collect();
        let entry = ring.empty(5).with(|entry| entry.descriptors = pages);
        assert_eq!(entry.byte_length(), 1 << 20);
        ring.put(&entry);
        (0..254).for_each(|page| ring.sees(page, page as u8));
    })
}

fn wraps() -> Vec<Row> {
    let mut rows = Vec::new();
    for sectors in 1..=7 {
        let start = (1 << 20) - sectors * 4096;
        rows.push(row(
            "V-038",
            format!("three entries, {sectors} sectors before the end"),
            move || around(start),
            replayed(),
        ));
    }
    for sectors in 1..=3 {
        let start = (1 << 20) - sectors * 4096;
        rows.push(row(
            "V-038",
            format!("one entry, {sectors} sectors before the end"),
            move || long(start),
            replayed(),
        ));
    }
    for start in [0, 4096, 100 * 4096, 255 * 4096] {
        rows.push(row("V-039", format!("128 entries, from {start:#x} on"), move || full(start), replayed()));
        rows.push(row("V-039", format!("one entry, from {start:#x} on"), move || one_entry(start), replayed()));
    }
    rows.push(row(
        "V-039",
        "256 entries without descriptors",
        || {
            made(|ring| {
                for sequence in 1..=256 {
                    let entry = ring.empty(sequence).tail(0);
                    ring.put(&entry);
                }
            })
        },
        replayed(),
    ));
    rows
}
