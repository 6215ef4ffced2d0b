//! Random valid images, each named by a seed: any layout that the specification allows.

use std::sync::Arc;

use crate::builder::{BlockSpec, BuiltImage, ImageBuilder};
use crate::content::{Content, SectorMask};
use crate::dirty::{DirtyPlan, Stale};
use crate::guid::Guid;
use crate::model::{FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, UNDEFINED, UNMAPPED, ZERO};
use crate::rng::Rng;
use crate::spec::{Checksum, HeaderSpec, ITEM_IS_USER, ItemSpec, LocatorPair, MIB};

/// The bounds of random images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RandomOptions {
    /// Images in the chain: 1 has no parent.
    pub depth: usize,
    /// The logical sector size; `None` draws one.
    pub logical_sector_size: Option<u32>,
    /// The block size; `None` draws one, small ones more often.
    pub block_size: Option<u32>,
    /// The largest virtual disk in bytes.
    pub virtual_size_max: u64,
    /// Payload blocks that are not in the default state, at most.
    pub blocks_max: u64,
    /// Whether one header or one copy of the region table may be torn.
    pub torn: bool,
    /// Whether places that must be ignored may hold junk.
    pub junk: bool,
    /// Whether only what QEMU supports is drawn.
    pub for_qemu: bool,
}

impl Default for RandomOptions {
    fn default() -> Self {
        Self {
            depth: 1,
            logical_sector_size: None,
            block_size: None,
            virtual_size_max: 40 << 30,
            blocks_max: 10,
            torn: true,
            junk: true,
            for_qemu: false,
        }
    }
}

impl RandomOptions {
    /// A chain of so many images.
    #[must_use]
    pub fn chain(depth: usize) -> Self {
        Self { depth, ..Self::default() }
    }

    /// What QEMU supports: no parent, 512-byte sectors, the first copy of the region table intact.
    #[must_use]
    pub fn for_qemu() -> Self {
        Self { logical_sector_size: Some(512), for_qemu: true, ..Self::default() }
    }
}

/// The image that `seed` names within `options`, on its parents if the options ask for some.
#[must_use]
pub fn random_image(seed: u64, options: &RandomOptions) -> BuiltImage {
    let mut rng = Rng::new(seed);
    let options = RandomOptions {
        logical_sector_size: Some(options.logical_sector_size.unwrap_or_else(|| rng.pick(&[512, 512, 512, 4096]))),
        ..options.clone()
    };
    let mut image: Option<Arc<BuiltImage>> = None;
    for level in (0..options.depth.max(1)).rev() {
        let layer_seed = rng.next_u64();
        image = Some(Arc::new(layer(layer_seed, &options, level, image.as_ref())));
    }
    let image = image.expect("a chain has at least one image");
    Arc::unwrap_or_clone(image)
}

/// A random way to make an image dirty, which every correct reader sees through.
#[must_use]
pub fn random_dirty_plan(seed: u64, image: &BuiltImage) -> DirtyPlan {
    let mut rng = Rng::new(seed);
    let mut plan = DirtyPlan::new(rng.next_u64()).move_bat(image);
    if rng.chance(50) {
        plan = plan.move_bitmaps(image);
    }
    if rng.chance(30) {
        plan = plan.move_metadata(image);
    }
    if rng.chance(20) {
        plan = plan.move_region_tables(image);
    }
    rng.shuffle(&mut plan.pages);
    plan.pages.truncate(40);
    plan.with(|plan| {
        plan.stale = rng.pick(&[Stale::Zeros, Stale::Junk]);
        plan.ring_start = (rng.below(u64::from(image.layout.log_length) / 4096) * 4096) as u32;
        plan.entries = rng.between(1, 5) as usize;
        plan.empty_first = rng.chance(30);
        plan.supersede = rng.chance(40);
        plan.retired = rng.below(4) as usize;
        plan.older_generations = rng.below(3) as usize;
        plan.gap = (rng.below(4) * 4096) as u32;
        plan.older_run = rng.chance(30);
    })
}

/// One image of a chain; level 0 is the top.
fn layer(seed: u64, options: &RandomOptions, level: usize, parent: Option<&Arc<BuiltImage>>) -> BuiltImage {
    let mut rng = Rng::new(seed);
    let sector_size = options.logical_sector_size.unwrap_or(512);
    let block_size = options.block_size.unwrap_or_else(|| {
        let mebibytes: u32 = rng.pick(&[1, 1, 1, 1, 2, 2, 2, 4, 4, 8, 16, 32, 32, 64, 128, 256]);
        mebibytes << 20
    });
    let size = match parent {
        // Mostly the parent's size, as real chains have it.
        Some(parent) if rng.chance(60) => parent.model.virtual_size,
        _ => virtual_size(&mut rng, options.virtual_size_max, u64::from(sector_size), u64::from(block_size)),
    };
    let physical = if sector_size == 512 { rng.pick(&[512, 4096]) } else { 4096 };
    let mut builder = ImageBuilder::new(size, block_size)
        .sector_sizes(sector_size, physical)
        .named(&format!("layer{level}.vhdx"))
        .with(|builder| identities(builder, &mut rng));
    if let Some(parent) = parent {
        builder = builder.differencing(parent).with(|builder| locator_variety(builder, &mut rng));
    }
    draw_blocks(&mut builder, &mut rng, options);
    place_regions(&mut builder, &mut rng);
    metadata_variety(&mut builder, &mut rng);
    if options.junk && rng.chance(60) {
        builder.junk = Some(rng.next_u64());
        if !options.for_qemu {
            builder.bat_padding = rng.pick(&[0, u64::MAX, 6, 0x10_0006]);
        }
    }
    if options.torn && rng.chance(50) {
        tear(&mut builder, &mut rng, options.for_qemu);
    }
    builder.build()
}

/// A size from one sector to the largest: tiny, a few blocks, or several chunks.
fn virtual_size(rng: &mut Rng, largest: u64, sector_size: u64, block_size: u64) -> u64 {
    let limit = match rng.below(4) {
        0 => 64 * 1024,
        1 | 2 => block_size * 12,
        _ => largest,
    };
    let size = rng.between(sector_size, limit.clamp(sector_size, largest));
    let unit = rng.pick(&[sector_size, sector_size, MIB, block_size]);
    size.next_multiple_of(unit).min(largest) / sector_size * sector_size
}

fn identities(builder: &mut ImageBuilder, rng: &mut Rng) {
    let sequence = rng.pick(&[0, 1, 41, 1 << 32, (1 << 63) - 1, u64::MAX - 10]);
    let header = HeaderSpec {
        sequence,
        file_write_guid: Guid::seeded(rng.next_u64()),
        data_write_guid: Guid::seeded(rng.next_u64()),
        ..HeaderSpec::default()
    };
    let newer = HeaderSpec { sequence: sequence + 1, ..header.clone() };
    builder.headers = if rng.chance(50) { [header, newer] } else { [newer, header] };
    builder.disk_id = Guid::seeded(rng.next_u64());
    let units = rng.pick(&[0, 5, 30, 256]);
    builder.creator = (0..units).map(|_| rng.between(0x20, 0x7E) as u16).collect();
}

fn draw_blocks(builder: &mut ImageBuilder, rng: &mut Rng, options: &RandomOptions) {
    let geometry = builder.geometry();
    let (count, ratio) = (geometry.block_count, geometry.chunk_ratio);
    if count < 100_000 && rng.chance(25) {
        builder.default_state = rng.pick(&[ZERO, UNMAPPED, UNDEFINED]);
    }
    // The first block, the last one and both sides of every chunk's end are where arithmetic goes wrong.
    let mut candidates = vec![0, count - 1];
    candidates.extend((1..geometry.chunk_count.min(4)).flat_map(|chunk| [chunk * ratio - 1, chunk * ratio]));
    candidates.extend((0..options.blocks_max).map(|_| rng.below(count)));
    rng.shuffle(&mut candidates);
    candidates.truncate(options.blocks_max as usize);
    let mut full_patterns = 0;
    for index in candidates {
        let seed = rng.next_u64();
        let content = if geometry.block_size <= 2 * MIB && full_patterns < 3 {
            full_patterns += 1;
            Content::pattern(seed)
        } else {
            Content::Sparse { seed, stride: rng.between(17, 23).max(geometry.block_size / 512 / 256) }
        };
        builder.blocks.insert(index, draw_block(rng, builder.has_parent, content));
    }
    if !builder.has_parent && count <= 16 && geometry.block_size <= 32 * MIB && rng.chance(30) {
        builder.blocks.retain(|_, block| block.state == FULLY_PRESENT);
        *builder = builder.clone().fixed();
    }
    if rng.chance(60) {
        builder.scatter = Some(rng.next_u64());
    }
}

fn draw_block(rng: &mut Rng, has_parent: bool, content: Content) -> BlockSpec {
    let mut states = vec![FULLY_PRESENT, FULLY_PRESENT, FULLY_PRESENT, ZERO, UNMAPPED, UNDEFINED, NOT_PRESENT];
    if has_parent {
        states.extend([PARTIALLY_PRESENT; 5]);
    }
    let run = rng.pick(&[1, 3, 8, 64, 1000]);
    let mask = SectorMask::random(rng.next_u64(), run, rng.pick(&[0, 10, 50, 90, 100]));
    match rng.pick(&states) {
        PARTIALLY_PRESENT => BlockSpec::partial(content, mask),
        state @ (UNMAPPED | UNDEFINED) if rng.chance(50) => BlockSpec::anchored(state, content),
        state => {
            let block = BlockSpec { content, ..BlockSpec::new(state) };
            // Bits of blocks that are not partially present mean nothing.
            if has_parent && rng.chance(40) { block.with_mask(mask) } else { block }
        }
    }
}

/// Puts log, metadata and BAT in any order with gaps, and sometimes an unknown region among them.
fn place_regions(builder: &mut ImageBuilder, rng: &mut Rng) {
    builder.log_length = rng.pick(&[1, 1, 1, 2, 5]) << 20;
    builder.metadata_length = rng.pick(&[1, 1, 2]) << 20;
    let bat_length = builder.geometry().bat_length() + rng.pick(&[0, 0, 1, 3]) * MIB;
    builder.bat_length = Some(bat_length as u32);
    let unknown_length = rng.between(1, 3) * MIB;
    let mut order = [0, 1, 2, 3];
    rng.shuffle(&mut order);
    let mut cursor = MIB;
    for object in order {
        cursor += rng.pick(&[0, 0, 1, 2, 40]) * MIB;
        let start = cursor;
        match object {
            0 => builder.log_offset = Some(start),
            1 => builder.metadata_offset = Some(start),
            2 => builder.bat_offset = Some(start),
            _ => {}
        }
        cursor += match object {
            0 => u64::from(builder.log_length),
            1 => u64::from(builder.metadata_length),
            2 => bat_length,
            _ if rng.chance(30) => {
                let guid = Guid::seeded(rng.next_u64());
                *builder = builder.clone().unknown_region(guid, start, unknown_length as u32, 0, 0xA7);
                unknown_length
            }
            _ => 0,
        };
    }
    let mut entries = builder.region_tables[0].entries.clone();
    rng.shuffle(&mut entries);
    builder.region_tables.iter_mut().for_each(|table| table.entries.clone_from(&entries));
}

fn metadata_variety(builder: &mut ImageBuilder, rng: &mut Rng) {
    if rng.chance(30) {
        let size = rng.between(1, 600) as usize;
        let flags = rng.pick(&[0, ITEM_IS_USER]);
        builder.metadata.entries.push(ItemSpec::new(Guid::seeded(rng.next_u64()), flags, &rng.bytes(size)));
    }
    if rng.chance(20) {
        builder.metadata.entries.push(ItemSpec::new(Guid::seeded(rng.next_u64()), ITEM_IS_USER, &[]));
    }
    rng.shuffle(&mut builder.metadata.entries);
    if rng.chance(40) {
        // Items need no alignment and no order, only space of their own.
        let mut slots: Vec<u32> = (0..builder.metadata.entries.len() as u32).collect();
        rng.shuffle(&mut slots);
        for (item, slot) in builder.metadata.entries.iter_mut().zip(slots) {
            let empty = item.data.as_ref().is_some_and(Vec::is_empty);
            item.offset = (!empty).then(|| 65_536 + slot * 8192 + rng.below(1000) as u32);
        }
    }
}

fn locator_variety(builder: &mut ImageBuilder, rng: &mut Rng) {
    let Some(locator) = builder.locator.as_mut() else { return };
    if rng.chance(40) {
        locator.pairs.push(LocatorPair::new("parent_linkage2", &Guid::ZERO.braced()));
    }
    if rng.chance(40) {
        locator.pairs.push(LocatorPair::new("absolute_win32_path", "\\\\?\\C:\\nowhere\\parent.vhdx"));
    }
    if rng.chance(20) {
        locator.pairs.push(LocatorPair::new("some_unknown_key", "some value"));
    }
    rng.shuffle(&mut locator.pairs);
}

/// Damages one header or one copy of the region table, as a crash in the middle of its write does.
fn tear(builder: &mut ImageBuilder, rng: &mut Rng, for_qemu: bool) {
    let wrong = rng.pick(&[Checksum::Wrong, Checksum::Value(0)]);
    if rng.chance(60) {
        let header = &mut builder.headers[rng.below(2) as usize];
        if rng.chance(30) {
            header.signature = [0; 4];
        } else {
            header.checksum = wrong;
        }
    }
    if rng.chance(50) {
        // QEMU reads the first copy only.
        let copy = if for_qemu { 1 } else { rng.below(2) as usize };
        let table = &mut builder.region_tables[copy];
        table.checksum = wrong;
        table.patches.push((16, vec![0xEE; 512]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_names_one_image() {
        let options = RandomOptions { virtual_size_max: 1 << 30, ..RandomOptions::chain(3) };
        for seed in 0..10 {
            let (first, second) = (random_image(seed, &options), random_image(seed, &options));
            assert_eq!(first.file, second.file);
            assert_eq!(first.depth(), 3);
            assert_eq!(first.model.read(0, 512), second.model.read(0, 512));
        }
        assert_ne!(random_image(1, &options).file, random_image(2, &options).file);
    }

    #[test]
    fn nothing_overlaps_and_everything_is_inside_the_file() {
        for seed in 0..60 {
            let image = random_image(seed, &RandomOptions::chain(1 + seed as usize % 2));
            let layout = &image.layout;
            let mut ranges = vec![
                (0, MIB),
                (layout.log, u64::from(layout.log_length)),
                (layout.metadata, u64::from(layout.metadata_length)),
                (layout.bat, u64::from(layout.bat_length)),
            ];
            ranges.extend(layout.payload.values().map(|offset| (*offset, layout.geometry.block_size)));
            ranges.extend(layout.bitmaps.values().map(|offset| (*offset, MIB)));
            ranges.sort_unstable();
            for pair in ranges.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "seed {seed}: {pair:x?}");
            }
            let (start, length) = ranges[ranges.len() - 1];
            assert!(start + length <= image.file.len(), "seed {seed}");
        }
    }

    #[test]
    fn every_kind_of_image_is_drawn() {
        let images: Vec<BuiltImage> = (0..80).map(|seed| random_image(seed, &RandomOptions::chain(2))).collect();
        let states = |image: &BuiltImage| image.model.blocks.values().map(|block| block.state).collect::<Vec<_>>();
        for state in [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT] {
            assert!(images.iter().any(|image| states(image).contains(&state)), "state {state}");
        }
        let parent = |image: &BuiltImage| image.parent.as_ref().map_or(0, |parent| parent.model.virtual_size);
        assert!(images.iter().any(|image| image.layout.geometry.chunk_count > 1));
        assert!(images.iter().any(|image| image.model.sector_size == 4096));
        assert!(images.iter().any(|image| parent(image) > image.model.virtual_size));
        assert!(images.iter().any(|image| parent(image) < image.model.virtual_size));
    }
}
