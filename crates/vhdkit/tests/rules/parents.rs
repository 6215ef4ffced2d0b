//! V-151 to V-157: the files of a chain, in memory.

use std::sync::Arc;

use vhdkit::error::ErrorKind::ParentMismatch as Mismatch;
use vhdkit::error::ErrorKind::{self, Chain, Corrupt, ParentNotFound, Truncated, Unsupported};
use vhdkit::format::finding::Code;
use vhdkit::image::{BlockDevice, CHAIN_DEPTH_MAX, OpenOptions};
use vhdkit::storage::Storage;
use vhdkit_testkit::dirty::DirtyPlan;
use vhdkit_testkit::spec::{Checksum, LocatorSpec};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, Guid, ImageBuilder, SectorMask};

use crate::judge::Stage;
use crate::table::{
    Expect, MIB, Made, Refuses, Row, Unreached, accepted, child_of, data, differencing, parent, parent_builder, row,
    special,
};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = found();
    rows.extend(identity());
    rows.extend(sector_sizes());
    rows.extend(cycles());
    rows.extend(faults());
    rows.extend(untouched());
    rows.extend(sizes());
    rows
}

/// A child of the parent, after the parent was changed.
fn after(change: impl Fn(ImageBuilder) -> ImageBuilder) -> ImageBuilder {
    let changed = Arc::new(change(parent_builder()).build());
    let locator = LocatorSpec::new(parent().data_write_guid, ".\\parent.vhdx");
    child_of(&changed).locator(locator)
}

fn found() -> Vec<Row> {
    let not_found = || Expect::parent(ParentNotFound, Some(Code::ParentNotFound));
    let path = |path: &'static str| child_of(&parent()).locator(LocatorSpec::new(parent().data_write_guid, path));
    vec![
        row("V-151", "no such file", move || path("..\\elsewhere.vhdx"), not_found()),
        row("V-151", "the file is there", move || path("..\\images\\parent.vhdx"), accepted()),
        special("V-151", "parents are denied by default", &[], || {
            let stage = Stage::new(differencing().into());
            let storage = Arc::clone(&stage.storage) as Arc<dyn Storage>;
            let error = OpenOptions::new().open(storage, None).unwrap_err();
            assert_eq!((error.kind(), error.code()), (ErrorKind::ParentDenied, None));
            Vec::new()
        }),
        special("V-151", "without parents only what the child holds can be read", &[], || {
            let stage = Stage::new(differencing().into());
            let image = stage.open(&OpenOptions::new().without_parents()).unwrap();
            assert!(image.parents_missing());
            for range in [0..MIB, 3 * MIB..6 * MIB] {
                assert_eq!(crate::judge::compare(&stage.made, &image, range), None);
            }
            for block in [1, 2, 6, 7] {
                let mut buffer = vec![0; MIB as usize];
                let error = image.read_at(&mut buffer, block * MIB).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ParentMissing);
            }
            Vec::new()
        }),
    ]
}

fn identity() -> Vec<Row> {
    let mismatch = || Expect::parent(Mismatch, Some(Code::ParentMismatch));
    let zero = || {
        let zero = parent_builder().both_headers(|header| header.data_write_guid = Guid::ZERO);
        Made::new(child_of(&Arc::new(zero.build())))
    };
    let mut rows = vec![
        row(
            "V-152",
            "the parent was written to",
            || after(|parent| parent.both_headers(|header| header.data_write_guid = Guid::seeded(70))),
            mismatch(),
        ),
        row(
            "V-152",
            "only the parent's older header still has the identity",
            || after(|parent| parent.with(|parent| parent.headers[1].data_write_guid = Guid::seeded(70))),
            mismatch(),
        ),
        row(
            "V-152",
            "the parent's newer header with another identity is torn",
            || {
                after(|parent| {
                    parent.with(|parent| {
                        parent.headers[1].data_write_guid = Guid::seeded(70);
                        parent.headers[1].checksum = Checksum::Wrong;
                    })
                })
            },
            accepted(),
        ),
        row(
            "V-152",
            "the parent's file changed, but not what its guest sees",
            || after(|parent| parent.both_headers(|header| header.file_write_guid = Guid::seeded(70))),
            accepted(),
        ),
        row(
            "V-152",
            "a file with the same path and the same disk ID is not enough",
            || after(|parent| parent.both_headers(|header| header.data_write_guid = header.file_write_guid)),
            mismatch(),
        ),
        row("V-152", "an all-zero identity names nobody", zero, mismatch()),
        row("V-152", "an all-zero identity and a named parent", move || zero().name_parent("parent.vhdx"), accepted()),
    ];
    rows.extend(named());
    rows
}

fn named() -> Vec<Row> {
    let mismatch = || Expect::parent(Mismatch, Some(Code::ParentMismatch));
    vec![
        row(
            "V-152",
            "a named parent must be the right one all the same",
            || {
                let other = parent_builder().named("other.vhdx").both_headers(|header| {
                    header.data_write_guid = Guid::seeded(70);
                });
                Made::new(differencing()).other(&other.build()).name_parent("other.vhdx")
            },
            mismatch(),
        ),
        row(
            "V-152",
            "a grandparent in the place of the parent",
            || {
                let made = Made::new(three());
                made.name_parent("parent.vhdx")
            },
            mismatch(),
        ),
        row(
            "V-152",
            "parents are named from the nearest one on",
            || Made::new(three()).name_parent("middle.vhdx").name_parent("parent.vhdx"),
            accepted(),
        ),
    ]
}

/// A chain of three: top.vhdx, middle.vhdx, parent.vhdx.
fn three() -> BuiltImage {
    let middle = child_of(&parent()).named("middle.vhdx").both_headers(|header| {
        header.data_write_guid = Guid::seeded(71);
    });
    let middle = Arc::new(middle.build());
    let top = ImageBuilder::new(8 * MIB, 2 << 20).named("top.vhdx");
    top.block(1, BlockSpec::partial(data(50), SectorMask::random(9, 11, 30))).differencing(&middle).build()
}

fn sector_sizes() -> Vec<Row> {
    let mut rows = Vec::new();
    for (parent_size, child_size) in [(512, 4096), (4096, 512)] {
        rows.push(row(
            "V-153",
            format!("{child_size} on {parent_size}"),
            move || {
                let parent = Arc::new(parent_builder().sector_sizes(parent_size, 4096).build());
                child_of(&parent).sector_sizes(child_size, 4096)
            },
            Expect::parent(Mismatch, Some(Code::ParentSectorSize)),
        ));
    }
    rows.push(row(
        "V-153",
        "the physical sector size may differ",
        || child_of(&Arc::new(parent_builder().sector_sizes(512, 512).build())).sector_sizes(512, 4096),
        accepted(),
    ));
    rows
}

/// A child of a file with this identity, which has this one itself.
fn linked(name: &str, own: u64, parent: u64, path: &str) -> ImageBuilder {
    let builder = ImageBuilder::new(8 * MIB, 1 << 20).named(name).block(0, BlockSpec::present(data(own)));
    let builder = builder.both_headers(|header| header.data_write_guid = Guid::seeded(own));
    builder.locator(LocatorSpec::new(Guid::seeded(parent), path))
}

fn cycles() -> Vec<Row> {
    let cycle = || Expect::parent(Chain, Some(Code::ChainCycle));
    vec![
        row("V-154", "a file that is its own parent", || linked("a.vhdx", 1, 1, "a.vhdx"), cycle()),
        row(
            "V-154",
            "two files that are each other's parents",
            || {
                let other = linked("b.vhdx", 2, 1, ".\\a.vhdx").build();
                Made::new(linked("a.vhdx", 1, 2, ".\\b.vhdx")).other(&other)
            },
            cycle(),
        ),
        row(
            "V-154",
            "a cycle that the image itself is not in",
            || {
                let made = Made::new(linked("a.vhdx", 1, 2, "b.vhdx"));
                let made = made.other(&linked("b.vhdx", 2, 3, "c.vhdx").build());
                made.other(&linked("c.vhdx", 3, 2, "b.vhdx").build())
            },
            cycle(),
        ),
        special("V-154", "256 images work, 257 are refused", &[Code::ChainDepth], depth),
    ]
}

/// A chain of so many images, each of which holds one sector of block 0.
fn chain(depth: u64) -> BuiltImage {
    let bottom = ImageBuilder::new(4 * MIB, 1 << 20).named("0.vhdx").block(1, BlockSpec::present(data(1)));
    let bottom = bottom.both_headers(|header| header.data_write_guid = Guid::seeded(500));
    (1..depth).fold(bottom.build(), |below, number| {
        let builder = ImageBuilder::new(4 * MIB, 1 << 20).named(&format!("{number}.vhdx"));
        let mut bytes = vec![0; (number as usize + 1) * 512];
        vhdkit_testkit::pattern(number, number, &mut bytes[number as usize * 512..]);
        let mask = SectorMask::new(move |sector| sector == number);
        let block = BlockSpec::partial(Content::bytes(&bytes), mask);
        let builder = builder.block(0, block).differencing(&Arc::new(below));
        builder.both_headers(|header| header.data_write_guid = Guid::seeded(500 + number)).build()
    })
}

fn depth() -> Vec<Code> {
    assert_eq!(CHAIN_DEPTH_MAX, 256);
    let too_deep = chain(257);
    let stage = Stage::new(too_deep.parent.as_deref().unwrap().clone().into());
    let options = stage.options(vhdkit::format::finding::Strictness::Normal);
    let image = stage.open(&options).unwrap();
    assert_eq!(image.layers().len(), 256);
    assert_eq!(crate::judge::compare(&stage.made, &image, 0..image.size()), None);
    drop(image);
    let stage = Stage::new(too_deep.into());
    let error = stage.open(&stage.options(vhdkit::format::finding::Strictness::Normal)).unwrap_err();
    assert_eq!(error.kind(), Chain);
    assert_eq!(stage.changed(), Vec::<String>::new());
    vec![error.code().unwrap()]
}

fn faults() -> Vec<Row> {
    let faulty = |change: fn(ImageBuilder) -> ImageBuilder| {
        let made = Made::new(child_of(&Arc::new(change(parent_builder()).build())));
        made.verify_error(|error| assert_eq!(error.path().unwrap().to_str(), Some("parent.vhdx"), "{error}"))
    };
    let expect = |kind, code| Expect::parent(kind, Some(code));
    vec![
        row(
            "V-155",
            "both headers of the parent are damaged",
            move || faulty(|parent| parent.both_headers(|header| header.checksum = Checksum::Wrong)),
            expect(Corrupt, Code::HeadersDamaged),
        ),
        row(
            "V-155",
            "the parent is cut off",
            move || faulty(|parent| parent.with(|parent| parent.file_length = Some(2 * MIB))),
            expect(Truncated, Code::RegionOutsideFile),
        ),
        row(
            "V-155",
            "the parent is of another version",
            move || faulty(|parent| parent.both_headers(|header| header.version = 2)),
            expect(Unsupported, Code::HeaderVersion),
        ),
        row(
            "V-155",
            "the parent is no VHDX",
            move || faulty(|parent| parent.with(|parent| parent.signature = *b"qcow2\0\0\0")),
            expect(ErrorKind::NotVhdx, Code::FileSignature),
        ),
        special("V-155", "a block of the parent is damaged", &[Code::BatState], || {
            let block = BlockSpec { raw: Some(4), ..BlockSpec::new(0) };
            let parent = Arc::new(parent_builder().block(2, block).build());
            let stage = Stage::new(child_of(&parent).into());
            let image = stage.open(&stage.options(vhdkit::format::finding::Strictness::Normal)).unwrap();
            let mut buffer = [0; 512];
            image.read_at(&mut buffer, 0).unwrap();
            let error = image.read_at(&mut buffer, 2 * MIB).unwrap_err();
            assert_eq!(error.path().unwrap().to_str(), Some("parent.vhdx"));
            let walked = image.visit_extents(2 * MIB..3 * MIB, &mut |_| std::ops::ControlFlow::Continue(()));
            let walked = walked.unwrap_err();
            assert_eq!((walked.path(), walked.code()), (error.path(), error.code()));
            vec![error.code().unwrap()]
        }),
    ]
}

fn untouched() -> Vec<Row> {
    let dirty = || {
        let mut parent = parent_builder().build();
        let plan = DirtyPlan::new(8).move_bat(&parent).move_metadata(&parent);
        plan.apply(&mut parent);
        child_of(&Arc::new(parent))
    };
    let stop = Refuses(ErrorKind::NeedsReplay, Some(Code::LogNeedsReplay));
    vec![
        row("V-156", "a clean parent", differencing, accepted()),
        row(
            "V-156",
            "a dirty parent is replayed in memory",
            dirty,
            Expect { in_parent: true, ..accepted() }.with(|[_, _, strict]| {
                (strict.read, strict.page, strict.write) = (stop, Unreached, stop);
            }),
        ),
    ]
}

fn sizes() -> Vec<Row> {
    let over = |parent_size: u64, child_size: u64, block_size: u32| {
        let builder = ImageBuilder::new(parent_size, 1 << 20).named("parent.vhdx");
        let blocks = parent_size.div_ceil(MIB);
        let parent = (0..blocks).fold(builder, |b, block| b.block(block, BlockSpec::present(data(100 + block))));
        let child = ImageBuilder::new(child_size, block_size).named("child.vhdx");
        let mask = SectorMask::random(4, 5, 40);
        child.block(1, BlockSpec::partial(data(31), mask)).differencing(&Arc::new(parent.build()))
    };
    let mut rows = Vec::new();
    for (parent_size, child_size) in
        [(3 * MIB + 512, 8 * MIB), (MIB - 512, 8 * MIB), (512, 8 * MIB), (8 * MIB, 3 * MIB + 512), (8 * MIB, 8 * MIB)]
    {
        for block_size in [1 << 20, 2 << 20] {
            rows.push(row(
                "V-157",
                format!("{child_size} bytes in blocks of {block_size} on {parent_size} bytes"),
                move || over(parent_size, child_size, block_size),
                accepted(),
            ));
        }
    }
    rows
}
