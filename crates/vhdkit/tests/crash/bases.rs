//! The images that programs begin with.

use std::sync::Arc;

use vhdkit::format::finding::Code;
use vhdkit_testkit::builder::BitmapSpec;
use vhdkit_testkit::dirty::edit_header;
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::Judge;
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, DirtyPlan, ImageBuilder, SectorMask};

const MIB: u64 = 1 << 20;
/// NOT_PRESENT is 0.
const UNMAPPED: u8 = 3;
const ZERO: u8 = 2;

/// An image, and the blocks that a program uses.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) image: BuiltImage,
    pub(crate) blocks: Vec<u64>,
    /// What `check` may say of it above note.
    pub(crate) tolerated: Vec<Code>,
    /// Who else gets to see every crash image that is in order.
    pub(crate) witness: Option<Arc<dyn Judge>>,
}

impl Base {
    pub(crate) fn new(image: BuiltImage, blocks: &[u64]) -> Self {
        Self { image, blocks: blocks.to_vec(), tolerated: Vec::new(), witness: None }
    }
}

/// What kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A dynamic disk in blocks of 1 MiB.
    Dynamic,
    /// A differencing one with a parent in blocks of 2 MiB, shorter than the child; its bitmap holds stale bits.
    Child,
    /// Blocks of 256 MiB.
    Large,
    /// A fixed disk.
    Fixed,
}

fn sparse(seed: u64) -> BlockSpec {
    BlockSpec::present(Content::Sparse { seed, stride: 97 })
}

/// A free range in the middle of the file, full of what somebody deleted long ago.
fn with_stale_space(builder: ImageBuilder, size: u64) -> ImageBuilder {
    builder.with(|builder| {
        builder.reserved_ranges.push((5 * MIB, size));
        let junk = vec![0x5a; usize::try_from(size).unwrap()];
        builder.patches.push((5 * MIB, junk));
    })
}

fn dynamic(rng: &mut Rng, sector: u32) -> Base {
    let size = 40 * MIB + u64::from(sector) * 3;
    let builder = ImageBuilder::new(size, 1 << 20)
        .with(|builder| builder.logical_sector_size = sector)
        .block(0, sparse(1))
        .block(1, sparse(2))
        .block(2, BlockSpec::new(ZERO))
        .block(3, BlockSpec::anchored(UNMAPPED, Content::Sparse { seed: 7, stride: 3 }))
        .block(40, sparse(4));
    let builder = if rng.below(2) == 0 { with_stale_space(builder, 3 * MIB) } else { builder };
    Base::new(builder.build(), &[0, 1, 2, 3, 4, 5, 39, 40])
}

fn child(rng: &mut Rng, sector: u32) -> Base {
    let parent = ImageBuilder::new(19 * MIB, 2 << 20)
        .with(|builder| builder.logical_sector_size = sector)
        .block(0, sparse(9))
        .block(2, sparse(10))
        .block(3, sparse(11))
        .block(9, BlockSpec::present(Content::Sparse { seed: 15, stride: 4 }))
        .named("p.vhdx")
        .build();
    let mut builder = ImageBuilder::new(20 * MIB, 1 << 20)
        .differencing(&Arc::new(parent))
        .with(|builder| builder.logical_sector_size = sector)
        .block(6, sparse(12));
    if rng.below(3) != 0 {
        let mask = SectorMask::new(|sector| sector < 100 || sector % 7 == 0);
        builder = builder.block(0, BlockSpec::partial(Content::Sparse { seed: 13, stride: 5 }, mask.clone()));
        builder = builder.block(18, BlockSpec::partial(Content::Sparse { seed: 14, stride: 5 }, mask));
        let stale = BitmapSpec { fill: 0xff, ..BitmapSpec::default() };
        builder = builder.with(|builder| {
            builder.bitmaps.insert(0, stale);
        });
    }
    if rng.below(2) == 0 {
        builder = with_stale_space(builder, 3 * MIB);
    }
    Base::new(builder.build(), &[0, 1, 2, 4, 6, 7, 18, 19])
}

fn large(rng: &mut Rng) -> Base {
    let size = 3 * 256 * MIB + MIB;
    let builder = ImageBuilder::new(size, 256 << 20);
    let image = if rng.below(2) == 0 {
        let parent = ImageBuilder::new(size, 32 << 20).block(0, sparse(21)).named("p.vhdx").build();
        builder.differencing(&Arc::new(parent)).build()
    } else {
        builder.block(1, BlockSpec::present(Content::Zero)).build()
    };
    Base::new(image, &[0, 1, 3])
}

fn fixed() -> Base {
    let builder = ImageBuilder::new(6 * MIB, 1 << 20).with(|builder| builder.leave_blocks_allocated = true);
    let builder = (0..5).fold(builder, |builder, block| builder.block(block, sparse(block + 30)));
    Base::new(builder.block(5, BlockSpec::new(ZERO)).build(), &[0, 1, 2, 5])
}

/// A random image of a kind; one in four has a dirty log.
pub(crate) fn base(rng: &mut Rng, kind: Kind) -> Base {
    let sector = if rng.below(3) == 0 { 4096 } else { 512 };
    let mut base = match kind {
        Kind::Dynamic => dynamic(rng, sector),
        Kind::Child => child(rng, sector),
        Kind::Large => large(rng),
        Kind::Fixed => fixed(),
    };
    if rng.below(4) == 0 {
        let clean = base.image.clone();
        let plan = DirtyPlan::new(rng.next_u64()).move_bat(&clean);
        // A whole bitmap block full of stale bits does not fit into the log.
        let plan = if kind == Kind::Child { plan } else { plan.move_bitmaps(&clean) };
        plan.apply(&mut base.image);
    }
    base
}

/// A dynamic disk whose headers have something behind their defined part, so that a torn header is a damaged one.
pub(crate) fn long_headers(rng: &mut Rng) -> Base {
    let mut base = dynamic(rng, 512);
    for slot in 0..2 {
        edit_header(&mut base.image, slot, |header| header[3000] = 0x77);
    }
    base.tolerated = vec![Code::HeaderReserved, Code::HeaderCopyDamaged];
    base
}
