//! V-110 to V-129: the block allocation table, blocks and bitmaps.

use vhdkit::error::ErrorKind::{self, Corrupt, Limit, Truncated};
use vhdkit::format::finding::Code;
use vhdkit::image::BlockDevice;
use vhdkit_testkit::model::{NOT_PRESENT, UNDEFINED, UNMAPPED, ZERO};
use vhdkit_testkit::{BitmapSpec, BlockSpec, Content, Guid, ImageBuilder, Place, SectorMask};

use crate::table::{
    ERROR, Expect, MIB, Made, NOTE, Refuses, Row, WARNING, accepted, child_of, data, differencing, dynamic,
    entry_refused, parent, refused, row,
};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = table_size();
    rows.extend(entries());
    rows.extend(file_end());
    rows.extend(anchors());
    rows.extend(overlaps());
    rows.extend(bitmaps());
    rows.extend(ignored());
    rows.extend(geometry());
    rows
}

/// Only a pass over the whole BAT sees it.
fn scan_refused(code: Code) -> Expect {
    Expect::scan_graded(Corrupt, code, [ERROR; 3])
}

/// Block 6 with this entry, whatever it means.
fn raw(entry: u64) -> Made {
    let block = BlockSpec { raw: Some(entry), ..BlockSpec::new(ZERO) };
    Made::new(dynamic().block(6, block)).affects(6)
}

/// The same in a differencing image.
fn raw_child(entry: u64) -> Made {
    let block = BlockSpec { raw: Some(entry), ..BlockSpec::new(ZERO) };
    Made::new(differencing().block(2, block)).affects(2)
}

fn table_size() -> Vec<Row> {
    // A region of 1 MiB has room for 131,072 entries: 131,041 blocks and 31 bitmaps.
    let blocks = |count: u64| {
        let builder = ImageBuilder::new(count * MIB, 1 << 20).with(|builder| builder.bat_length = Some(1 << 20));
        builder.block(0, BlockSpec::present(data(1))).block(count - 1, BlockSpec::present(data(2)))
    };
    let child = |count: u64| {
        let parent = parent();
        let builder = ImageBuilder::new(count * MIB, 1 << 20).named("child.vhdx").differencing(&parent);
        builder.with(|builder| builder.bat_length = Some(1 << 20)).block(0, BlockSpec::present(data(1)))
    };
    let region = |mebibytes: u32| dynamic().with(|builder| builder.bat_length = Some(mebibytes << 20));
    vec![
        row("V-110", "exactly enough", move || blocks(131_041), accepted()),
        row("V-110", "one entry too few", move || blocks(131_042), refused(Corrupt, Code::BatTooSmall)),
        row("V-110", "exactly enough chunks for a child", move || child(31 * 4096), accepted()),
        row(
            "V-110",
            "no room for the last bitmap of a child",
            move || child(31 * 4096 + 1),
            refused(Corrupt, Code::BatTooSmall),
        ),
        row("V-129", "513 MiB", move || region(513), accepted()),
        row("V-129", "514 MiB", move || region(514), refused(Limit, Code::BatTooLarge)),
        row("V-129", "2 GiB", move || region(2048), refused(Limit, Code::BatTooLarge)),
    ]
}

fn entries() -> Vec<Row> {
    let mut rows = Vec::new();
    for bit in [3, 4, 11, 19] {
        for state in [NOT_PRESENT, ZERO, UNMAPPED] {
            rows.push(row(
                "V-111",
                format!("bit {bit} with state {state}"),
                move || raw(1 << bit | u64::from(state)),
                entry_refused(Corrupt, Code::BatReserved),
            ));
        }
        rows.push(row(
            "V-111",
            format!("bit {bit} with a present block"),
            move || {
                let block = BlockSpec { reserved: 1 << (bit - 3), ..BlockSpec::present(data(1)) };
                Made::new(dynamic().block(6, block)).affects(6)
            },
            entry_refused(Corrupt, Code::BatReserved).also(&[Code::LeakedSpace]),
        ));
        rows.push(row(
            "V-111",
            format!("bit {bit} with a bitmap"),
            move || {
                let bitmap = BitmapSpec { reserved: 1 << (bit - 3), ..BitmapSpec::default() };
                let made = Made::new(differencing().bitmap(0, bitmap)).affects(1);
                made.compares(&[0..MIB, 2 * MIB..6 * MIB, 7 * MIB..8 * MIB])
            },
            entry_refused(Corrupt, Code::BatReserved).also(&[Code::BitmapMissing, Code::LeakedSpace]),
        ));
    }
    let state_4 = || entry_refused(Corrupt, Code::BatState).also(&[Code::LeakedSpace]);
    let state_5 = || Expect::entry_graded(Corrupt, Code::BatStateOldUnmapped, [WARNING, ERROR, ERROR]);
    rows.push(row("V-112", "state 4", || raw(4), state_4()));
    rows.push(row("V-112", "state 4 with an offset", || raw((6 * MIB) | 4), state_4()));
    rows.push(row("V-112", "state 4 in a child", || raw_child(4), state_4()));
    rows.push(row("V-112", "state 5, UNMAPPED of version 0.95", || raw(5), state_5()));
    rows.push(row("V-112", "state 5 in a child masks the parent", || raw_child(5), state_5()));
    rows.push(row(
        "V-116",
        "state 5 keeps space behind the end",
        || raw((7 * MIB) | 5),
        state_5().with(|[lenient, _, _]| {
            let refused = Refuses(Corrupt, Some(Code::BatAnchor));
            (lenient.page, lenient.write, lenient.check) = (refused, refused, refused);
        }),
    ));
    let partial = |fixed: bool| {
        let block = BlockSpec::partial(data(6), SectorMask::all());
        let builder = dynamic().block(6, block).with(|builder| builder.leave_blocks_allocated = fixed);
        Made::new(builder).affects(6)
    };
    for fixed in [false, true] {
        rows.push(row(
            "V-113",
            format!("partially present without parent, fixed: {fixed}"),
            move || partial(fixed),
            entry_refused(Corrupt, Code::BatPartialWithoutParent).also(&[Code::LeakedSpace]),
        ));
    }
    rows.push(row("V-114", "present at 0", || raw(6), entry_refused(Corrupt, Code::BatOffset)));
    rows.push(row("V-114", "present at 0 in a child", || raw_child(6), entry_refused(Corrupt, Code::BatOffset)));
    rows.push(row("V-114", "partially present at 0", || raw_child(7), entry_refused(Corrupt, Code::BatOffset)));
    rows
}

fn file_end() -> Vec<Row> {
    let mut rows = Vec::new();
    let outside = || entry_refused(Truncated, Code::BatOutsideFile);
    let leaks = || entry_refused(Truncated, Code::BatOutsideFile).also(&[Code::LeakedSpace]);
    for offset in [7 * MIB, 8 * MIB, 1 << 44, 1 << 62, !(MIB - 1)] {
        rows.push(row("V-115", format!("present at {offset:#x}"), move || raw(offset | 6), outside()));
    }
    rows.push(row("V-115", "partially present behind the end", || raw_child(1 << 40 | 7), outside()));
    // The last block holds half a mebibyte of disk.
    let half = |length: u64| {
        let builder = ImageBuilder::new(3 * MIB + MIB / 2, 1 << 20).block(0, BlockSpec::present(data(1)));
        let builder = builder.block(3, BlockSpec::present(data(3)));
        Made::new(builder.with(|builder| builder.file_length = Some(length))).affects(3)
    };
    let cut = || Expect::entry_graded(Truncated, Code::BatLastBlockCut, [WARNING; 3]);
    rows.push(row("V-115", "the last block is cut off where the disk ends", move || half(5 * MIB + MIB / 2), cut()));
    rows.push(row("V-115", "the last block is cut off by one byte", move || half(6 * MIB - 1), cut()));
    rows.push(row(
        "V-115",
        "the last block is cut off one byte before the disk ends",
        move || half(5 * MIB + MIB / 2 - 1),
        leaks(),
    ));
    rows.push(row(
        "V-115",
        "a block before the last is cut off",
        || {
            let builder = ImageBuilder::new(3 * MIB + MIB / 2, 1 << 20).block(1, BlockSpec::present(data(1)));
            Made::new(builder.with(|builder| builder.file_length = Some(5 * MIB - 512))).affects(1)
        },
        leaks(),
    ));
    rows.push(row(
        "V-115",
        "blocks of 256 MiB behind the end of the file",
        || {
            let builder = ImageBuilder::new(512 * MIB, 256 << 20).block(0, BlockSpec::present(Content::Zero));
            let made = Made::new(builder.with(|builder| builder.file_length = Some(259 * MIB))).affects(0);
            made.compares(&[256 * MIB..257 * MIB, 511 * MIB..512 * MIB])
        },
        leaks(),
    ));
    rows
}

fn anchors() -> Vec<Row> {
    let mut rows = Vec::new();
    let refused = || entry_refused(Corrupt, Code::BatAnchor);
    for state in [UNDEFINED, UNMAPPED] {
        let entry = move |offset: u64| offset | u64::from(state);
        rows.push(row(
            "V-116",
            format!("state {state} keeps its data, which nobody sees"),
            move || dynamic().block(6, BlockSpec::anchored(state, data(66))),
            accepted(),
        ));
        rows.push(row(
            "V-116",
            format!("state {state} keeps its data in a child, and hides the parent"),
            move || differencing().block(2, BlockSpec::anchored(state, data(66))),
            accepted(),
        ));
        for (what, offset) in [("behind the end", 7 * MIB), ("nowhere", !(MIB - 1)), ("over the BAT", 3 * MIB)] {
            rows.push(row("V-116", format!("state {state} keeps space {what}"), move || raw(entry(offset)), refused()));
        }
        rows.push(row(
            "V-116",
            format!("state {state} keeps the space of another block"),
            move || raw(entry(4 * MIB)),
            scan_refused(Code::BatOverlap),
        ));
    }
    let unused = || Expect::entry_graded(Corrupt, Code::BatUnusedOffset, [NOTE, WARNING, ERROR]);
    for state in [NOT_PRESENT, ZERO] {
        for (what, offset) in [("of another block", 4 * MIB), ("of the BAT", 3 * MIB), ("nowhere", 1 << 50)] {
            let block = move || BlockSpec { raw: Some(offset | u64::from(state)), ..BlockSpec::new(state) };
            rows.push(row(
                "V-117",
                format!("state {state} with the offset {what}"),
                move || Made::new(dynamic().block(6, block())).affects(6),
                unused(),
            ));
            rows.push(row(
                "V-117",
                format!("state {state} of a child with the offset {what}"),
                move || Made::new(differencing().block(2, block())).affects(2),
                unused(),
            ));
        }
    }
    rows.push(row(
        "V-117",
        "a bitmap that is not present, with an offset",
        || {
            let parent = parent();
            let builder = ImageBuilder::new(8 * MIB, 1 << 20).named("child.vhdx").differencing(&parent);
            builder.bitmap(0, BitmapSpec { raw: Some(5 * MIB), place: Place::Nowhere, ..BitmapSpec::default() })
        },
        Expect::scan_graded(Corrupt, Code::BatUnusedOffset, [NOTE, WARNING, ERROR]),
    ));
    rows
}

fn overlaps() -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, offset) in [("log", 1), ("metadata", 2), ("BAT", 3)] {
        rows.push(row(
            "V-118",
            format!("a block over the {what}"),
            move || raw(offset << 20 | 6),
            entry_refused(Corrupt, Code::BatOverlap),
        ));
        rows.push(row(
            "V-118",
            format!("a partially present block over the {what}"),
            move || raw_child(offset << 20 | 7),
            entry_refused(Corrupt, Code::BatOverlap),
        ));
    }
    rows.push(row(
        "V-118",
        "a block that begins before the BAT and ends inside it",
        || {
            let builder = ImageBuilder::new(8 * MIB, 2 << 20).with(|builder| builder.bat_offset = Some(5 * MIB));
            Made::new(builder.block(1, BlockSpec { raw: Some((4 * MIB) | 6), ..BlockSpec::new(ZERO) })).affects(1)
        },
        entry_refused(Corrupt, Code::BatOverlap).also(&[Code::LeakedSpace]),
    ));
    rows.push(row(
        "V-118",
        "two blocks at the same place",
        || {
            let block = || BlockSpec::present(Content::Fill(7)).at(7);
            dynamic().block(6, block()).block(7, block())
        },
        scan_refused(Code::BatOverlap),
    ));
    rows.push(row(
        "V-118",
        "two blocks of 2 MiB that share one",
        || {
            let block = |place| BlockSpec::present(Content::Fill(7)).at(place);
            ImageBuilder::new(8 * MIB, 2 << 20).block(0, block(4)).block(3, block(5))
        },
        scan_refused(Code::BatOverlap),
    ));
    rows.extend(bitmap_overlaps());
    rows
}

fn bitmap_overlaps() -> Vec<Row> {
    let mut rows = Vec::new();
    let bitmap = |mebibytes: u64, block: u64| {
        let parent = parent();
        let builder = ImageBuilder::new(8 * MIB, 1 << 20).named("child.vhdx").differencing(&parent);
        let builder = builder.block(0, BlockSpec::present(Content::Zero).at(block));
        let raw = Some((mebibytes * MIB) | 6);
        builder.bitmap(0, BitmapSpec { place: Place::Nowhere, raw, ..BitmapSpec::default() })
    };
    rows.push(row("V-118", "a bitmap over a block", move || bitmap(4, 4), scan_refused(Code::BatOverlap)));
    rows.push(row(
        "V-118",
        "a bitmap over the log that no block needs",
        move || bitmap(1, 4),
        scan_refused(Code::BatOverlap),
    ));
    rows.push(row(
        "V-118",
        "a bitmap over the log that a block needs",
        || {
            let bitmap = BitmapSpec { place: Place::Nowhere, raw: Some(MIB | 6), ..BitmapSpec::default() };
            Made::new(differencing().bitmap(0, bitmap)).affects(1).compares(&[0..MIB, 2 * MIB..6 * MIB])
        },
        entry_refused(Corrupt, Code::BatOverlap).also(&[Code::BitmapMissing]),
    ));
    rows.push(row(
        "V-118",
        "what belongs to nothing is counted to the byte",
        || {
            // The disk's last block ends at 7 MiB.
            Made::new(dynamic().with(|builder| builder.file_length = Some(10 * MIB + 512))).leaks(3 * MIB + 512)
        },
        Expect::scan_graded(Corrupt, Code::LeakedSpace, [NOTE; 3]),
    ));
    rows.push(row(
        "V-118",
        "a block over an unknown region",
        || {
            let builder = dynamic().unknown_region(Guid::seeded(9), 9 * MIB, 1 << 20, 0, 0x5A);
            let block = BlockSpec { raw: Some((9 * MIB) | 6), ..BlockSpec::new(ZERO) };
            Made::new(builder.block(6, block)).affects(6)
        },
        entry_refused(Corrupt, Code::BatOverlap).also(&[Code::RegionUnknown, Code::LeakedSpace]),
    ));
    rows
}

/// A child whose partially present blocks have this bitmap entry.
fn with_bitmap(entry: u64) -> Made {
    let bitmap = BitmapSpec { place: Place::Nowhere, raw: Some(entry), ..BitmapSpec::default() };
    Made::new(differencing().bitmap(0, bitmap)).affects(1).compares(&[0..MIB, 2 * MIB..6 * MIB, 7 * MIB..8 * MIB])
}

/// A child without partially present blocks, with this bitmap entry.
fn with_idle_bitmap(entry: u64) -> Made {
    let bitmap = BitmapSpec { place: Place::Nowhere, raw: Some(entry), ..BitmapSpec::default() };
    let child = child_of(&parent()).block(1, BlockSpec::new(ZERO)).block(6, BlockSpec::new(NOT_PRESENT));
    Made::new(child.bitmap(0, bitmap))
}

fn bitmaps() -> Vec<Row> {
    let mut rows = Vec::new();
    let refused = |kind: ErrorKind, code: Code| entry_refused(kind, code).also(&[Code::BitmapMissing]);
    for state in [1, 2, 3, 4, 5, 7] {
        rows.push(row(
            "V-119",
            format!("state {state}"),
            move || with_bitmap((4 * MIB) | state),
            refused(Corrupt, Code::BitmapState),
        ));
        rows.push(row(
            "V-119",
            format!("state {state} of a bitmap that no block needs"),
            move || with_idle_bitmap(state),
            scan_refused(Code::BitmapState),
        ));
    }
    rows.push(row("V-120", "present at 0", || with_bitmap(6), refused(Corrupt, Code::BitmapOffset)));
    for offset in [7 * MIB, 1 << 50, !(MIB - 1)] {
        rows.push(row(
            "V-120",
            format!("present at {offset:#x}"),
            move || with_bitmap(offset | 6),
            refused(Truncated, Code::BitmapOutsideFile),
        ));
    }
    rows.push(row(
        "V-120",
        "present behind the end, and no block needs it",
        || with_idle_bitmap(1 << 50 | 6),
        Expect::scan_graded(Truncated, Code::BitmapOutsideFile, [ERROR; 3]),
    ));
    // Two chunks: 4096 blocks, a bitmap entry, one more block.
    let two_chunks = |entry: u64| {
        let builder = ImageBuilder::new(4097 * MIB, 1 << 20).block(0, BlockSpec::present(data(1)));
        builder.block(4096, BlockSpec::present(data(2))).with(|builder| {
            builder.bat_raw.insert(4096, entry);
        })
    };
    for entry in [1, (4 * MIB) | 6, u64::MAX, (1 << 50) | 6] {
        rows.push(row(
            "V-121",
            format!("{entry:#x} in an image without parent"),
            move || two_chunks(entry),
            Expect::scan_graded(Corrupt, Code::BitmapUnexpected, [NOTE, WARNING, ERROR]),
        ));
    }
    rows.push(row("V-121", "zero in an image without parent", move || two_chunks(0), accepted()));
    rows.push(row("V-122", "no bitmap", || with_bitmap(0), entry_refused(Corrupt, Code::BitmapMissing)));
    rows.push(row(
        "V-122",
        "no bitmap in the second chunk",
        || {
            let parent = parent();
            let builder = ImageBuilder::new(4097 * MIB, 1 << 20).named("child.vhdx").differencing(&parent);
            let builder = builder.block(0, BlockSpec::partial(data(1), SectorMask::random(1, 4, 50)));
            let builder = builder.block(4096, BlockSpec::partial(data(2), SectorMask::all()));
            let bitmap = BitmapSpec { place: Place::Nowhere, raw: Some(0), ..BitmapSpec::default() };
            Made::new(builder.bitmap(1, bitmap)).affects(4096)
        },
        entry_refused(Corrupt, Code::BitmapMissing),
    ));
    rows
}

fn ignored() -> Vec<Row> {
    let junk = |builder: ImageBuilder| builder.with(|builder| builder.bat_padding = u64::MAX);
    vec![
        row("V-123", "all bits set behind the last entry", move || junk(dynamic()), accepted()),
        row("V-123", "all bits set behind the last entry of a child", move || junk(differencing()), accepted()),
        row(
            "V-123",
            "what would be the bitmap entry of the only chunk is padding without a parent",
            || {
                let builder = ImageBuilder::new(4096 * MIB, 1 << 20).block(4095, BlockSpec::present(data(2)));
                builder.with(|builder| {
                    builder.bat_raw.insert(4096, u64::MAX);
                })
            },
            accepted(),
        ),
        row(
            "V-124",
            "present in a child without bitmap",
            || {
                let child = child_of(&parent()).block(1, BlockSpec::present(data(1)));
                child.block(6, BlockSpec::new(NOT_PRESENT))
            },
            accepted(),
        ),
        row(
            "V-124",
            "present in a child, and its bits are zero",
            || differencing().block(0, BlockSpec::present(data(1)).with_mask(SectorMask::none())),
            accepted(),
        ),
        row(
            "V-124",
            "present in a child, and half its bits are zero",
            || differencing().block(7, BlockSpec::present(data(1)).with_mask(SectorMask::random(1, 3, 50))),
            accepted(),
        ),
        row(
            "V-125",
            "bits of absent blocks are set",
            || {
                let child = (2..6).fold(differencing(), |child, block| {
                    let state = [NOT_PRESENT, ZERO, UNMAPPED, UNDEFINED][block as usize - 2];
                    child.block(block, BlockSpec::new(state).with_mask(SectorMask::all()))
                });
                child.bitmap(0, BitmapSpec { fill: 0xFF, ..BitmapSpec::default() })
            },
            accepted(),
        ),
        row(
            "V-125",
            "an anchored block whose bits are set does not show its old data",
            || {
                let block = BlockSpec::anchored(UNMAPPED, data(66)).with_mask(SectorMask::all());
                differencing().block(2, block)
            },
            accepted(),
        ),
        row(
            "V-125",
            "bits behind the end of the disk are set",
            || {
                let parent = parent();
                let builder = ImageBuilder::new(MIB + 512, 1 << 20).named("child.vhdx").differencing(&parent);
                builder.block(1, BlockSpec::partial(data(1), SectorMask::new(|sector| sector > 0)))
            },
            accepted(),
        ),
    ]
}

fn geometry() -> Vec<Row> {
    const END: u64 = 64 << 40;
    let huge = |block_size: u32, sector: u32| {
        let count = END / u64::from(block_size);
        let builder = ImageBuilder::new(END, block_size).sector_sizes(sector, 4096);
        let sparse = |seed| BlockSpec::present(Content::Sparse { seed, stride: 2048 });
        let builder = [0, count / 2, count - 2].into_iter().fold(builder, |b, block| b.block(block, sparse(block)));
        // The very last sector holds data.
        let last = BlockSpec::present(Content::Sparse { seed: 9, stride: END / 512 - 1 });
        builder.block(count - 1, last)
    };
    let last = |made: Made| {
        made.verify(|image| {
            let mut buffer = [0; 512];
            image.read_at(&mut buffer, END - 512).unwrap();
            assert!(buffer.iter().any(|byte| *byte != 0), "the last sector holds data");
            let error = image.read_at(&mut buffer, END - 511).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
        })
    };
    let mut rows = Vec::new();
    for (block_size, sector) in [(1 << 20, 512), (1 << 20, 4096), (256 << 20, 512), (256 << 20, 4096)] {
        rows.push(row(
            "V-126",
            format!("64 TiB in blocks of {} MiB and sectors of {sector}", block_size >> 20),
            move || last(Made::new(huge(block_size, sector))),
            accepted(),
        ));
    }
    rows.extend(big_sectors());
    let size = 2 * MIB + 1536;
    let partial = move || {
        Made::new(
            ImageBuilder::new(size, 1 << 20)
                .block(0, BlockSpec::present(data(1)))
                .block(2, BlockSpec::present(Content::pattern(3))),
        )
    };
    rows.push(row(
        "V-128",
        "the disk ends inside its last block",
        move || {
            partial().verify(move |image| {
                let mut buffer = vec![0; 4096];
                let kind = |result: vhdkit::Result<()>| result.unwrap_err().kind();
                image.read_at(&mut buffer[..512], size - 512).unwrap();
                image.read_at(&mut [], size).unwrap();
                assert_eq!(kind(image.read_at(&mut buffer[..513], size - 512)), ErrorKind::OutOfRange);
                assert_eq!(kind(image.read_at(&mut buffer[..1], size)), ErrorKind::OutOfRange);
                assert_eq!(kind(image.read_at(&mut buffer, u64::MAX - 4095)), ErrorKind::OutOfRange);
                assert_eq!(kind(image.read_at(&mut buffer, u64::MAX)), ErrorKind::OutOfRange);
                let walk = |range| image.visit_extents(range, &mut |_| std::ops::ControlFlow::Continue(()));
                assert_eq!(kind(walk(0..size + 512)), ErrorKind::OutOfRange);
                assert_eq!(kind(walk(0..u64::MAX)), ErrorKind::OutOfRange);
            })
        },
        accepted(),
    ));
    rows
}

fn big_sectors() -> Vec<Row> {
    // A chunk has 32,768 blocks here; with sectors of 512 bytes it would have 4096.
    let blocks = [0, 4095, 4096, 4097, 32_767, 32_768, 32_769];
    let size = 32_770 * MIB;
    let dynamic = move || {
        let builder = ImageBuilder::new(size, 1 << 20).sector_sizes(4096, 4096);
        blocks.into_iter().fold(builder, |builder, block| builder.block(block, BlockSpec::present(data(block))))
    };
    let child = move || {
        let parent = std::sync::Arc::new(dynamic().named("parent.vhdx").build());
        let builder =
            ImageBuilder::new(size, 1 << 20).sector_sizes(4096, 4096).named("child.vhdx").differencing(&parent);
        blocks.into_iter().fold(builder, |builder, block| {
            builder.block(block, BlockSpec::partial(data(block + 100), SectorMask::random(block, 3, 50)))
        })
    };
    vec![
        row("V-127", "4096-byte sectors over two chunks", dynamic, accepted()),
        row("V-127", "4096-byte sectors over two chunks of a child", child, accepted()),
    ]
}
