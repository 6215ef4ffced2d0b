//! V-040 to V-055: what replay does, and what it must not do.

use std::sync::Arc;

use vhdkit::error::ErrorKind::{Corrupt, Limit, Truncated};
use vhdkit::format::finding::Code;
use vhdkit::image::{BlockDevice, OpenOptions};
use vhdkit::storage::Storage;
use vhdkit_testkit::dirty::{DirtyPlan, Stale};
use vhdkit_testkit::log::DescriptorSpec;
use vhdkit_testkit::spec::{RegionSpec, RegionTableSpec};
use vhdkit_testkit::{BlockSpec, Content, Guid, ImageBuilder};

use crate::judge::Stage;
use crate::ring::{PAGE, Ring, made, replayed_with_warning};
use crate::table::{MIB, Made, Row, STRICTNESSES, data, differencing, dynamic, refused, replayed, row, special};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = file_lengths();
    rows.extend(order());
    rows.extend(growth());
    rows.extend(zeroes());
    rows.extend(targets());
    rows.extend(structures());
    rows.extend(sessions());
    rows.extend(unaligned());
    rows
}

fn file_lengths() -> Vec<Row> {
    let flushed = |more: u64, cut: u64| {
        made(|ring| {
            let length = ring.image.file.len();
            let entry = ring.entry(5, 0, 0xA0).with(|entry| entry.flushed_file_offset = length + more);
            ring.put(&entry);
            ring.sees(0, 0xA0);
            ring.image.file.set_len(length - cut);
        })
    };
    let truncated = || refused(Truncated, Code::LogFileTruncated);
    vec![
        row("V-040", "exactly as long as it must be", move || flushed(0, 0), replayed()),
        row("V-040", "1 MiB too short", move || flushed(MIB, 0), truncated()),
        row("V-040", "one byte too short", move || flushed(0, 1), truncated()),
        row("V-040", "2^64 - 1 MiB", move || flushed(u64::MAX - 7 * MIB, 0), truncated()),
        row(
            "V-041",
            "an entry before the last had a longer file",
            || {
                made(|ring| {
                    let length = ring.image.file.len();
                    let entry = ring.entry(5, 0, 0xA0).with(|entry| entry.flushed_file_offset = length + 600 * MIB);
                    let tail = ring.put(&entry).start;
                    let head = ring.entry(6, 1, 0xA1).tail(tail);
                    ring.put(&head);
                    ring.sees(0, 0xA0);
                    ring.sees(1, 0xA1);
                })
            },
            replayed(),
        ),
    ]
}

fn order() -> Vec<Row> {
    let mut rows = vec![
        row(
            "V-042",
            "three images of a page in three entries",
            || {
                made(|ring| {
                    let tail = ring.ring.position;
                    for (sequence, byte) in [(5, 0xB0), (6, 0xB1), (7, 0xA0)] {
                        let entry = ring.entry(sequence, 0, byte).tail(tail);
                        ring.put(&entry);
                    }
                    ring.sees(0, 0xA0);
                })
            },
            replayed(),
        ),
        row(
            "V-042",
            "two images of a page in one entry",
            || {
                made(|ring| {
                    let entry = ring.entry(5, 0, 0xB0).descriptor(ring.page(0, 0xA0));
                    ring.put(&entry);
                    ring.sees(0, 0xA0);
                })
            },
            replayed(),
        ),
        row(
            "V-042",
            "zeros over a page, and a page over zeros",
            || {
                made(|ring| {
                    let entry = ring.entry(5, 0, 0xB0);
                    let entry = entry.descriptor(DescriptorSpec::zero(ring.home(0), 4 * PAGE));
                    let entry = entry.descriptor(ring.page(2, 0xA2));
                    ring.put(&entry);
                    ring.image.model.write_zeroes(0, 4 * PAGE);
                    ring.sees(2, 0xA2);
                })
            },
            replayed(),
        ),
    ];
    rows.extend(before_the_tail());
    rows
}

fn before_the_tail() -> Vec<Row> {
    let poison = |plan: DirtyPlan| {
        let mut image = dynamic().build();
        let poison = image.layout.payload_block(0) + 7 * PAGE;
        let plan = plan.move_bat(&image).with(|plan| {
            plan.poison = Some(poison);
            plan.retired = 3;
            plan.entries = 2;
        });
        plan.apply(&mut image);
        Made::new(image)
    };
    vec![
        row(
            "V-043",
            "an entry before the tail",
            || {
                made(|ring| {
                    let retired = ring.entry(4, 1, 0xB1);
                    ring.put(&retired);
                    ring.replayed(5, 0, 0xA0);
                })
            },
            replayed(),
        ),
        row("V-043", "poison in entries before the tail", move || poison(DirtyPlan::new(3)), replayed()),
        row(
            "V-043",
            "poison before the tail, around the end of the ring",
            move || poison(DirtyPlan::new(4).with(|plan| plan.ring_start = (1 << 20) - 3 * 4096)),
            replayed(),
        ),
        row(
            "V-043",
            "stale generations, an older run, superseded pages and a gap at once",
            move || {
                poison(DirtyPlan::new(5).with(|plan| {
                    plan.older_generations = 3;
                    plan.older_run = true;
                    plan.supersede = true;
                    plan.empty_first = true;
                    plan.gap = 8192;
                    plan.stale = Stale::Junk;
                }))
            },
            replayed(),
        ),
    ]
}

/// An image whose last block lies behind the end of its file, as after a crash before the file's length was durable.
fn cut() -> Ring {
    let mut ring = Ring::of(dynamic().block(7, BlockSpec::present(Content::Zero)));
    let end = ring.image.layout.payload_block(7);
    assert_eq!(end + MIB, ring.image.file.len());
    ring.image.file.set_len(end);
    ring
}

fn grows_to(made: Made, length: u64) -> Made {
    made.verify(move |image| {
        let layer = &image.layers()[0];
        assert_eq!(layer.replay().unwrap().file_size_after, length);
        assert!(layer.file_size() < length, "the file itself stays as it is");
    })
}

fn growth() -> Vec<Row> {
    vec![
        row(
            "V-044",
            "a page behind the end of the file",
            || {
                let mut ring = cut();
                let home = ring.image.file.len();
                let page = DescriptorSpec::data(home + 8 * PAGE, &[0xA0; 4096]);
                let entry = ring.empty(5).descriptor(page).with(|entry| entry.last_file_offset = home + MIB);
                ring.put(&entry);
                ring.image.model.write(7 * MIB + 8 * PAGE, &[0xA0; 4096]);
                grows_to(ring.done(), home + MIB)
            },
            replayed(),
        ),
        row(
            "V-044",
            "zeros over the end of the file",
            || {
                let mut ring = cut();
                let home = ring.image.file.len();
                let zero = DescriptorSpec::zero(home - PAGE, MIB + PAGE);
                let entry = ring.empty(5).descriptor(zero).with(|entry| entry.last_file_offset = home + MIB);
                ring.put(&entry);
                ring.image.model.write_zeroes(6 * MIB - PAGE, PAGE);
                grows_to(ring.done(), home + MIB)
            },
            replayed(),
        ),
        row(
            "V-045",
            "only the recorded length says that the file is longer, and no page lies there",
            || {
                let mut ring = cut();
                let home = ring.image.file.len();
                let entry = ring.empty(5).with(|entry| entry.last_file_offset = home + MIB);
                ring.put(&entry);
                grows_to(ring.done(), home + MIB)
            },
            replayed(),
        ),
        row(
            "V-045",
            "the recorded length is not a multiple of 1 MiB",
            || {
                let mut ring = cut();
                let home = ring.image.file.len();
                let entry = ring.empty(5).with(|entry| entry.last_file_offset = home + MIB + 512);
                ring.put(&entry);
                grows_to(ring.done(), home + MIB + 512)
            },
            replayed_with_warning(Code::LogFileOffsetUnaligned).also(&[Code::LeakedSpace]),
        ),
        row(
            "V-045",
            "a recorded length below the file's changes nothing",
            || {
                made(|ring| {
                    let entry = ring.empty(5).with(|entry| {
                        entry.flushed_file_offset = 0;
                        entry.last_file_offset = 0;
                    });
                    ring.put(&entry);
                })
            },
            replayed(),
        ),
    ]
}

fn zeroes() -> Vec<Row> {
    vec![
        row(
            "V-046",
            "data, zeros, data, nothing, data",
            || {
                made(|ring| {
                    let entry = ring.entry(5, 0, 0xA0).descriptor(DescriptorSpec::zero(ring.home(1), 2 * PAGE));
                    let entry = entry.descriptor(ring.page(3, 0xA3)).descriptor(DescriptorSpec::zero(ring.home(4), 0));
                    let entry = entry.descriptor(ring.page(5, 0xA5));
                    ring.put(&entry);
                    ring.image.model.write_zeroes(PAGE, 2 * PAGE);
                    for page in [0, 3, 5] {
                        ring.sees(page, 0xA0 + page as u8);
                    }
                })
            },
            replayed(),
        ),
        row(
            "V-046",
            "nothing but zeros, over a whole block",
            || {
                made(|ring| {
                    let entry = ring.empty(5).descriptor(DescriptorSpec::zero(ring.home(0), MIB));
                    ring.put(&entry);
                    ring.image.model.write_zeroes(0, MIB);
                })
            },
            replayed(),
        ),
        row(
            "V-046",
            "zeros over the data of two blocks and back",
            || {
                made(|ring| {
                    let zero = DescriptorSpec::zero(ring.home(250), 12 * PAGE);
                    let entry = ring.empty(5).descriptor(zero).descriptor(ring.page(252, 0xA2));
                    ring.put(&entry);
                    ring.image.model.write_zeroes(250 * PAGE, 12 * PAGE);
                    ring.sees(252, 0xA2);
                })
            },
            replayed(),
        ),
    ]
}

/// A log with one good page, and this.
fn aims(descriptor: DescriptorSpec) -> Made {
    made(|ring| {
        let entry = ring.entry(5, 0, 0xA0).descriptor(descriptor);
        ring.put(&entry);
        ring.sees(0, 0xA0);
    })
}

/// A log whose last entry says that the file gets this much longer.
fn grows(more: u64) -> Made {
    made(|ring| {
        let length = ring.image.file.len();
        let entry = ring.entry(5, 0, 0xA0).with(|entry| entry.last_file_offset = length.saturating_add(more));
        ring.put(&entry);
        ring.sees(0, 0xA0);
    })
}

fn targets() -> Vec<Row> {
    let page = |offset: u64| DescriptorSpec::data(offset, &[0xBB; 4096]);
    let zero = DescriptorSpec::zero;
    let mut rows = Vec::new();
    let mut refuse = |rule, name: &str, code, descriptor: DescriptorSpec| {
        rows.push(row(rule, name, move || aims(descriptor.clone()), refused(Corrupt, code)));
    };
    refuse("V-047", "the file identifier", Code::LogTargetHeader, page(0));
    refuse("V-047", "the first header", Code::LogTargetHeader, page(0x1_0000));
    refuse("V-047", "the second header", Code::LogTargetHeader, page(0x2_0000));
    refuse("V-047", "the last page before the region tables", Code::LogTargetHeader, page(0x2_F000));
    refuse(
        "V-047",
        "zeros from the second header into the region tables",
        Code::LogTargetHeader,
        zero(0x2_0000, 0x2_0000),
    );
    refuse("V-048", "the first page of the log", Code::LogTargetLog, page(MIB));
    refuse("V-048", "the last page of the log", Code::LogTargetLog, page(2 * MIB - PAGE));
    refuse("V-048", "zeros that reach into the log", Code::LogTargetLog, zero(MIB - PAGE, 2 * PAGE));
    refuse("V-048", "zeros that cover the log", Code::LogTargetLog, zero(0x8_0000, 3 * MIB));
    refuse("V-049", "a page at the end", Code::LogTargetBeyond, page(7 * MIB));
    refuse("V-049", "zeros over the end", Code::LogTargetBeyond, zero(6 * MIB, MIB + PAGE));
    refuse("V-049", "2^60 bytes of zeros", Code::LogTargetBeyond, zero(6 * MIB, 1 << 60));
    refuse("V-049", "2^64 - 4096 bytes of zeros", Code::LogTargetBeyond, zero(6 * MIB, u64::MAX - 4095));
    refuse("V-049", "a page whose end is 2^64", Code::LogTargetBeyond, page(u64::MAX - 4095));
    refuse("V-049", "2^60 bytes of zeros at 2^63", Code::LogTargetBeyond, zero(1 << 63, 1 << 60));
    rows.extend(bounds());
    rows
}

fn bounds() -> Vec<Row> {
    let mut rows = Vec::new();
    let limit = || refused(Limit, Code::LogGrowth);
    let leaks = || replayed().also(&[Code::LeakedSpace]);
    rows.push(row(
        "V-047",
        "the first page of the region tables, as it is",
        || {
            made(|ring| {
                let table = ring.image.file.read(0x3_0000, 4096);
                let entry = ring.empty(5).descriptor(DescriptorSpec::data(0x3_0000, &table));
                ring.put(&entry);
            })
        },
        replayed(),
    ));
    rows.push(row(
        "V-048",
        "the pages right before and right behind the log",
        || {
            made(|ring| {
                let behind = ring.image.file.read(2 * MIB, 4096);
                let entry = ring.empty(5).descriptor(DescriptorSpec::data(2 * MIB, &behind));
                let entry = entry.descriptor(DescriptorSpec::zero(MIB - PAGE, PAGE));
                ring.put(&entry);
            })
        },
        replayed(),
    ));
    rows.push(row("V-049", "64 GiB more", || grows(64 << 30), leaks()));
    rows.push(row("V-049", "64 GiB and 1 MiB more", || grows((64 << 30) + MIB), limit()));
    rows.push(row("V-049", "2^64 - 1 bytes", || grows(u64::MAX), limit()));
    rows.push(row(
        "V-049",
        "an entry before the last asks for too much",
        || {
            made(|ring| {
                let entry = ring.empty(5).with(|entry| entry.last_file_offset = 1 << 50);
                let tail = ring.put(&entry).start;
                let entry = ring.entry(6, 0, 0xA0).tail(tail);
                ring.put(&entry);
            })
        },
        limit(),
    ));
    rows.push(special(
        "V-049",
        "64 GiB and 1 MiB more, where the caller allows it",
        &[Code::LogGrowth],
        growth_allowed,
    ));
    rows
}

fn growth_allowed() -> Vec<Code> {
    let stage = Stage::new(grows((64 << 30) + MIB));
    let open = |options: OpenOptions| options.open(Arc::clone(&stage.storage) as Arc<dyn Storage>, None);
    let error = open(OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), Limit);
    let image = open(OpenOptions::new().log_growth_max((64 << 30) + MIB)).unwrap();
    assert_eq!(crate::judge::compare(&stage.made, &image, 0..image.size()), None);
    assert!(open(OpenOptions::new().log_growth_max((64 << 30) + MIB - 1)).is_err());
    let check = |log_growth_max| {
        let options = vhdkit::ops::check::CheckOptions { log_growth_max, ..Default::default() };
        let storage = Arc::clone(&stage.storage) as Arc<dyn Storage>;
        vhdkit::ops::check::check(&storage, None, &options, &()).unwrap().errors
    };
    assert_eq!((check((64 << 30) + MIB), check(64 << 30)), (0, 1));
    assert!(stage.changed().is_empty());
    vec![error.code().unwrap()]
}

/// The whole structure of an image is in its log; its homes hold zeros or junk.
fn moved(builder: ImageBuilder, stale: Stale) -> Made {
    let mut image = builder.build();
    let plan = DirtyPlan::new(11).move_region_tables(&image).move_metadata(&image).move_bat(&image);
    let plan = plan.move_bitmaps(&image).with(|plan| {
        plan.stale = stale;
        plan.entries = 5;
        plan.supersede = true;
    });
    plan.apply(&mut image);
    Made::new(image)
}

fn structures() -> Vec<Row> {
    let empties = |count: u64| {
        let made = made(|ring| {
            for sequence in 1..=count {
                let entry = ring.empty(sequence).tail(0);
                ring.put(&entry);
            }
        });
        made.verify(move |image| {
            let report = image.layers()[0].replay().unwrap();
            assert_eq!((report.entries, report.pages, report.zeroed_bytes), (count, 0, 0));
            assert_eq!(report.file_size_before, report.file_size_after);
        })
    };
    let mut rows = vec![
        row("V-051", "one entry without descriptors", move || empties(1), replayed()),
        row("V-051", "three of them", move || empties(3), replayed()),
        row(
            "V-052",
            "the log moves the BAT and says so in both region tables",
            moves_the_bat,
            replayed().also(&[Code::LeakedSpace]),
        ),
        row("V-052", "the log makes the disk larger", grows_the_disk, replayed()),
    ];
    for stale in [Stale::Zeros, Stale::Junk] {
        rows.push(row(
            "V-052",
            format!("every structure is in the log over {stale:?}"),
            move || moved(dynamic(), stale),
            replayed(),
        ));
        rows.push(row(
            "V-052",
            format!("every structure of a child is in the log over {stale:?}"),
            move || moved(differencing(), stale),
            replayed(),
        ));
    }
    rows
}

/// The region tables in place name the old BAT, which maps other blocks; the log has the new one.
fn moves_the_bat() -> Made {
    let mut ring = Ring::of(dynamic().with(|builder| builder.bat_offset = Some(12 * MIB)));
    let (file, layout) = (&mut ring.image.file, &ring.image.layout);
    let new_bat = file.read(layout.bat, 4096);
    let mut old_bat = new_bat.clone();
    old_bat.rotate_left(8);
    let new_tables = file.read(layout.region_table(0), 131_072);
    let old = RegionTableSpec {
        entries: vec![
            RegionSpec::at(Guid::BAT, 13 * MIB, 1 << 20, 1),
            RegionSpec::at(Guid::METADATA, layout.metadata, 1 << 20, 1),
        ],
        ..RegionTableSpec::default()
    };
    for copy in 0..2 {
        file.write(layout.region_table(copy), &old.encode(|_| (0, 0)));
    }
    file.write(layout.bat, &old_bat);
    file.write(13 * MIB, &old_bat);
    file.set_len(14 * MIB);
    let mut entry = ring.empty(5).descriptor(DescriptorSpec::data(ring.image.layout.bat, &new_bat));
    for (page, bytes) in (0..).zip(new_tables.chunks(4096)) {
        entry = entry.descriptor(DescriptorSpec::data(0x3_0000 + page * PAGE, bytes));
    }
    ring.put(&entry);
    ring.done()
}

/// The metadata in place says 4 MiB; the log says 8 MiB.
fn grows_the_disk() -> Made {
    let mut ring = Ring::new();
    let home = ring.image.layout.item(Guid::VIRTUAL_DISK_SIZE);
    let page = home / PAGE * PAGE;
    let entry = ring.empty(5).descriptor(DescriptorSpec::data(page, &ring.image.file.read(page, 4096)));
    ring.put(&entry);
    ring.image.file.write_u64(home, 4 * MIB);
    ring.done()
}

fn sessions() -> Vec<Row> {
    let interrupted = |done: usize| {
        let mut image = dynamic().build();
        let plan = DirtyPlan::new(21).move_region_tables(&image).move_metadata(&image).move_bat(&image);
        let pages = plan.pages.clone();
        let truth: Vec<Vec<u8>> = pages.iter().map(|page| image.file.read(*page, 4096)).collect();
        plan.with(|plan| plan.stale = Stale::Junk).apply(&mut image);
        for (page, truth) in pages.iter().zip(&truth).take(done) {
            image.file.write(*page, truth);
        }
        if let (Some(page), Some(truth)) = (pages.get(done), truth.get(done)) {
            image.file.write(*page, &truth[..1536]); // torn
        }
        Made::new(image)
    };
    let mut rows = Vec::new();
    for done in [0, 1, 2, 3, 100] {
        rows.push(row(
            "V-053",
            format!("another reader crashed after {done} pages of its replay"),
            move || interrupted(done),
            replayed(),
        ));
    }
    rows.push(special("V-053", "replay into memory can be repeated", &[], repeated));
    rows.push(row(
        "V-054",
        "opening for writing refuses a dirty image and leaves it as it was",
        || {
            made(|ring| {
                ring.replayed(5, 0, 0xA0);
            })
        },
        replayed(),
    ));
    rows
}

fn repeated() -> Vec<Code> {
    let stage = Stage::new(moved(dynamic(), Stale::Junk));
    let mut reports = Vec::new();
    for strictness in STRICTNESSES.into_iter().take(2) {
        for _ in 0..2 {
            let image = stage.open(&stage.options(strictness)).unwrap();
            assert_eq!(crate::judge::compare(&stage.made, &image, 0..image.size()), None);
            reports.push(image.layers()[0].replay().unwrap().clone());
            assert_eq!(stage.changed(), Vec::<String>::new());
        }
    }
    assert!(reports.windows(2).all(|pair| pair[0] == pair[1]), "{reports:#?}");
    Vec::new()
}

fn unaligned() -> Vec<Row> {
    let lengths = |flushed: u64, last: u64| {
        made(|ring| {
            let entry = ring.entry(5, 0, 0xA0).with(|entry| {
                entry.flushed_file_offset = flushed;
                entry.last_file_offset = last;
            });
            ring.put(&entry);
            ring.sees(0, 0xA0);
        })
    };
    let expect = || replayed_with_warning(Code::LogFileOffsetUnaligned);
    vec![
        row(
            "V-055",
            "the flushed length is not a multiple of 1 MiB",
            move || lengths(6 * MIB + 512, 7 * MIB),
            expect(),
        ),
        row("V-055", "the last length is not a multiple of 1 MiB", move || lengths(6 * MIB, 6 * MIB + 1), expect()),
        row(
            "V-055",
            "the lengths of a file as QEMU leaves it",
            || {
                let builder = dynamic().block(7, BlockSpec::present(data(7)));
                let mut ring = Ring::of(builder.with(|builder| builder.file_length = Some(8 * MIB + 4096)));
                ring.replayed(5, 0, 0xA0);
                ring.done()
            },
            expect().also(&[Code::LeakedSpace]),
        ),
    ]
}
