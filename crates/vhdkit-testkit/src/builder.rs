//! Builds images from a description in which everything may be set to anything.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::content::{Content, SectorMask};
use crate::guid::Guid;
use crate::layout::{Geometry, Layout};
use crate::model::{FULLY_PRESENT, ModelBlock, ModelDisk, NOT_PRESENT, PARTIALLY_PRESENT};
use crate::rng::Rng;
use crate::sparse::{SparseFile, is_zero};
use crate::spec::{HeaderSpec, ItemSpec, LocatorSpec, MIB, MetadataSpec, RegionSpec, RegionTableSpec, put};

/// No structure is written at or past this offset, whatever a BAT entry claims.
const WRITABLE_END: u64 = 1 << 50;

/// Where a block lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: the entry's offset is zero.
    Nowhere,
    /// Where the builder finds space.
    Auto,
    /// At this many mebibytes, even over something else.
    At(u64),
}

/// A payload block with its BAT entry.
#[derive(Clone, Debug)]
pub struct BlockSpec {
    /// The three state bits.
    pub state: u8,
    /// Where the block lies.
    pub place: Place,
    /// The seventeen reserved bits.
    pub reserved: u64,
    /// What it holds. In states that hide it, the file has it anyway, if the block has a place.
    pub content: Content,
    /// The block's bits in the bitmap, if any are to be written; a partially present block without one has none set.
    pub mask: Option<SectorMask>,
    /// The whole entry to write instead.
    pub raw: Option<u64>,
}

impl BlockSpec {
    /// A block in some state; it gets a place if the state is 6 or 7.
    #[must_use]
    pub fn new(state: u8) -> Self {
        let place = if matches!(state, FULLY_PRESENT | PARTIALLY_PRESENT) { Place::Auto } else { Place::Nowhere };
        Self { state, place, reserved: 0, content: Content::Zero, mask: None, raw: None }
    }

    /// A fully present block.
    #[must_use]
    pub fn present(content: Content) -> Self {
        Self { content, ..Self::new(FULLY_PRESENT) }
    }

    /// A partially present block; where the mask has no sector, the file holds stale bytes.
    #[must_use]
    pub fn partial(content: Content, mask: SectorMask) -> Self {
        Self { content, mask: Some(mask), ..Self::new(PARTIALLY_PRESENT) }
    }

    /// A block in a state without data that still owns its former place: a soft anchor.
    #[must_use]
    pub fn anchored(state: u8, content: Content) -> Self {
        Self { content, place: Place::Auto, ..Self::new(state) }
    }

    /// Puts the block at this many mebibytes.
    #[must_use]
    pub fn at(mut self, mebibytes: u64) -> Self {
        self.place = Place::At(mebibytes);
        self
    }

    /// Sets bits in the bitmap although the state does not ask for them.
    #[must_use]
    pub fn with_mask(mut self, mask: SectorMask) -> Self {
        self.mask = Some(mask);
        self
    }
}

/// A bitmap block with its BAT entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapSpec {
    /// The three state bits.
    pub state: u8,
    /// Where the block lies.
    pub place: Place,
    /// The seventeen reserved bits.
    pub reserved: u64,
    /// The byte that the bitmap holds where no block has a mask.
    pub fill: u8,
    /// The whole entry to write instead.
    pub raw: Option<u64>,
}

impl Default for BitmapSpec {
    fn default() -> Self {
        Self { state: FULLY_PRESENT, place: Place::Auto, reserved: 0, fill: 0, raw: None }
    }
}

/// A description of an image; every field may be set to anything.
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    /// `vhdxfile`.
    pub signature: [u8; 8],
    /// The creator in UTF-16 units, at most 256.
    pub creator: Vec<u16>,
    /// The two headers.
    pub headers: [HeaderSpec; 2],
    /// The two region tables.
    pub region_tables: [RegionTableSpec; 2],
    /// The metadata table with its items.
    pub metadata: MetadataSpec,
    /// The parent locator, for the item without data of its own.
    pub locator: Option<LocatorSpec>,
    /// Bytes of a payload block.
    pub block_size: u32,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes of a logical sector.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector.
    pub physical_sector_size: u32,
    /// Whether the disk is differencing.
    pub has_parent: bool,
    /// Whether the disk is fixed.
    pub leave_blocks_allocated: bool,
    /// More bits for the flags of the file parameters.
    pub file_parameter_bits: u32,
    /// The identity of the virtual disk.
    pub disk_id: Guid,
    /// File offset of the log; `None` takes the first free space.
    pub log_offset: Option<u64>,
    /// Bytes of the log.
    pub log_length: u32,
    /// File offset of the metadata region; `None` takes the first free space.
    pub metadata_offset: Option<u64>,
    /// Bytes of the metadata region.
    pub metadata_length: u32,
    /// File offset of the BAT region; `None` takes the first free space.
    pub bat_offset: Option<u64>,
    /// Bytes of the BAT region; `None` is enough for every entry.
    pub bat_length: Option<u32>,
    /// File ranges in bytes that no block may get, as unknown regions have them: offset, length.
    pub reserved_ranges: Vec<(u64, u64)>,
    /// The payload blocks that are not in the default state.
    pub blocks: BTreeMap<u64, BlockSpec>,
    /// The state of all other payload blocks.
    pub default_state: u8,
    /// Bitmap blocks by chunk, where the automatic ones do not do.
    pub bitmaps: BTreeMap<u64, BitmapSpec>,
    /// Whole BAT entries by index, instead of everything above.
    pub bat_raw: BTreeMap<u64, u64>,
    /// The value of every BAT entry past the last used one.
    pub bat_padding: u64,
    /// Seed of a random order of blocks with random gaps; `None` is ascending without gaps.
    pub scatter: Option<u64>,
    /// Seed of junk in all places that must be ignored, an unused log included.
    pub junk: Option<u64>,
    /// Bytes put over the finished file, without a new checksum.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// The length of the file instead of the end of the last object.
    pub file_length: Option<u64>,
    /// The parent, for the model and for writing the chain.
    pub parent: Option<Arc<BuiltImage>>,
    /// The name that [`BuiltImage::write_chain`] gives the file.
    pub file_name: String,
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct BuiltImage {
    /// The bytes.
    pub file: SparseFile,
    /// What the guest must see.
    pub model: ModelDisk,
    /// Where everything lies.
    pub layout: Layout,
    /// The identity that a child's locator must name, from the current header.
    pub data_write_guid: Guid,
    /// The parent, if there is one.
    pub parent: Option<Arc<BuiltImage>>,
    /// The name within a chain.
    pub file_name: String,
}

impl BuiltImage {
    /// Writes the image alone.
    pub fn write_to(&self, path: &Path) -> io::Result<()> {
        self.file.write_to_path(path)
    }

    /// Writes the image and all its parents into a directory, and gives the path of the image.
    pub fn write_chain(&self, directory: &Path) -> io::Result<PathBuf> {
        let mut next = Some(self);
        while let Some(image) = next {
            image.write_to(&directory.join(&image.file_name))?;
            next = image.parent.as_deref();
        }
        Ok(directory.join(&self.file_name))
    }

    /// How many images the chain has, this one included.
    #[must_use]
    pub fn depth(&self) -> usize {
        1 + self.parent.as_ref().map_or(0, |parent| parent.depth())
    }
}

impl ImageBuilder {
    /// An empty dynamic disk with 512-byte sectors, laid out as Windows does.
    #[must_use]
    pub fn new(virtual_size: u64, block_size: u32) -> Self {
        let first = HeaderSpec::default();
        let second = HeaderSpec { sequence: first.sequence + 1, ..first.clone() };
        Self {
            signature: *b"vhdxfile",
            creator: "vhdkit-testkit".encode_utf16().collect(),
            headers: [first, second],
            region_tables: [RegionTableSpec::default(), RegionTableSpec::default()],
            metadata: MetadataSpec::default(),
            locator: None,
            block_size,
            virtual_size,
            logical_sector_size: 512,
            physical_sector_size: 4096,
            has_parent: false,
            leave_blocks_allocated: false,
            file_parameter_bits: 0,
            disk_id: Guid::seeded(3),
            log_offset: None,
            log_length: MIB as u32,
            metadata_offset: None,
            metadata_length: MIB as u32,
            bat_offset: None,
            bat_length: None,
            reserved_ranges: Vec::new(),
            blocks: BTreeMap::new(),
            default_state: NOT_PRESENT,
            bitmaps: BTreeMap::new(),
            bat_raw: BTreeMap::new(),
            bat_padding: 0,
            scatter: None,
            junk: None,
            patches: Vec::new(),
            file_length: None,
            parent: None,
            file_name: "image.vhdx".to_owned(),
        }
    }

    /// Any change of the fields, within a chain of calls.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Sets one payload block.
    #[must_use]
    pub fn block(mut self, index: u64, spec: BlockSpec) -> Self {
        self.blocks.insert(index, spec);
        self
    }

    /// Makes one payload block fully present with the pattern of `seed`.
    #[must_use]
    pub fn pattern_block(self, index: u64, seed: u64) -> Self {
        self.block(index, BlockSpec::present(Content::pattern(seed)))
    }

    /// Sets one bitmap block.
    #[must_use]
    pub fn bitmap(mut self, chunk: u64, spec: BitmapSpec) -> Self {
        self.bitmaps.insert(chunk, spec);
        self
    }

    /// Sets both sector sizes.
    #[must_use]
    pub fn sector_sizes(mut self, logical: u32, physical: u32) -> Self {
        self.logical_sector_size = logical;
        self.physical_sector_size = physical;
        self
    }

    /// Makes the disk fixed: every block that is not set is fully present with zeros.
    #[must_use]
    pub fn fixed(mut self) -> Self {
        self.leave_blocks_allocated = true;
        for index in 0..self.geometry().block_count {
            self.blocks.entry(index).or_insert_with(|| BlockSpec::present(Content::Zero));
        }
        self
    }

    /// Makes the disk differencing over `parent`, which lies beside it in the same directory.
    #[must_use]
    pub fn differencing(mut self, parent: &Arc<BuiltImage>) -> Self {
        let locator = LocatorSpec::new(parent.data_write_guid, &format!(".\\{}", parent.file_name));
        self.parent = Some(Arc::clone(parent));
        self.disk_id = Guid(parent.file.read(parent.layout.item(Guid::VIRTUAL_DISK_ID), 16).try_into().unwrap());
        self.locator(locator)
    }

    /// Makes the disk differencing with this locator, and adds the metadata item if it is not there.
    #[must_use]
    pub fn locator(mut self, locator: LocatorSpec) -> Self {
        self.has_parent = true;
        self.locator = Some(locator);
        if !self.metadata.entries.iter().any(|item| item.guid == Guid::PARENT_LOCATOR) {
            self.metadata.entries.push(ItemSpec::known(Guid::PARENT_LOCATOR, crate::spec::ITEM_IS_REQUIRED));
        }
        self
    }

    /// Changes both headers alike.
    #[must_use]
    pub fn both_headers(mut self, change: impl Fn(&mut HeaderSpec)) -> Self {
        self.headers.iter_mut().for_each(change);
        self
    }

    /// Changes both region tables alike.
    #[must_use]
    pub fn both_region_tables(mut self, change: impl Fn(&mut RegionTableSpec)) -> Self {
        self.region_tables.iter_mut().for_each(change);
        self
    }

    /// Adds an unknown region to both tables, keeps its space free of blocks, and fills it with `fill`.
    #[must_use]
    pub fn unknown_region(mut self, guid: Guid, offset: u64, length: u32, required: u32, fill: u8) -> Self {
        self.reserved_ranges.push((offset, u64::from(length)));
        self.patches.push((offset, vec![fill; length as usize]));
        self.both_region_tables(|table| table.entries.push(RegionSpec::at(guid, offset, length, required)))
    }

    /// Adds a metadata item.
    #[must_use]
    pub fn item(mut self, item: ItemSpec) -> Self {
        self.metadata.entries.push(item);
        self
    }

    /// Puts bytes over the finished file, without a new checksum.
    #[must_use]
    pub fn patch(mut self, offset: u64, bytes: &[u8]) -> Self {
        self.patches.push((offset, bytes.to_vec()));
        self
    }

    /// Puts the blocks in random order with random gaps, aligned to nothing but the mebibyte.
    #[must_use]
    pub fn scatter(mut self, seed: u64) -> Self {
        self.scatter = Some(seed);
        self
    }

    /// Names the file within a chain.
    #[must_use]
    pub fn named(mut self, file_name: &str) -> Self {
        file_name.clone_into(&mut self.file_name);
        self
    }

    /// Blocks, chunks and BAT indices of what is described so far.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.virtual_size, self.block_size, self.logical_sector_size, self.has_parent)
    }

    /// Makes the image.
    #[must_use]
    pub fn build(&self) -> BuiltImage {
        let bitmaps = self.effective_bitmaps();
        let mut layout = self.allocate(&bitmaps);
        let mut file = SparseFile::new();
        // Blocks first: an image with overlaps on purpose keeps its structures readable.
        self.write_payload(&mut file, &layout);
        self.write_bitmaps(&mut file, &layout, &bitmaps);
        if let Some(seed) = self.junk {
            self.write_junk(&mut file, &layout, seed);
        }
        self.write_bat(&mut file, &layout, &bitmaps);
        self.write_metadata(&mut file, &mut layout);
        self.write_header_section(&mut file, &layout);
        for (offset, bytes) in &self.patches {
            file.write(*offset, bytes);
        }
        let natural = layout.end.max(file.len()).next_multiple_of(MIB);
        file.set_len(self.file_length.unwrap_or(natural));
        let rank = |slot: usize| (self.headers[slot].is_valid(), self.headers[slot].sequence);
        let current = usize::from(rank(1) > rank(0));
        BuiltImage {
            file,
            model: self.model(),
            layout,
            data_write_guid: self.headers[current].data_write_guid,
            parent: self.parent.clone(),
            file_name: self.file_name.clone(),
        }
    }

    fn model(&self) -> ModelDisk {
        let mut model = ModelDisk::new(self.virtual_size, self.logical_sector_size, self.geometry().block_size as u32);
        model.default_state = self.default_state;
        model.parent = self.parent.as_ref().map(|parent| Arc::new(parent.model.clone()));
        for (index, block) in &self.blocks {
            let mask = block.mask.clone().unwrap_or_else(SectorMask::none);
            model.blocks.insert(*index, ModelBlock { state: block.state, content: block.content.clone(), mask });
        }
        model
    }

    /// The bitmap blocks that were set, and those that blocks with masks need.
    fn effective_bitmaps(&self) -> BTreeMap<u64, BitmapSpec> {
        let mut bitmaps = self.bitmaps.clone();
        if self.has_parent {
            for (index, block) in &self.blocks {
                if block.state == PARTIALLY_PRESENT || block.mask.is_some() {
                    bitmaps.entry(index / self.geometry().chunk_ratio).or_default();
                }
            }
        }
        bitmaps
    }

    /// Finds a place for everything that has none.
    fn allocate(&self, bitmaps: &BTreeMap<u64, BitmapSpec>) -> Layout {
        let geometry = self.geometry();
        let bat_length = self.bat_length.unwrap_or(geometry.bat_length() as u32);
        let mut taken = self.reserved_ranges.clone();
        for (offset, length) in [
            (self.log_offset, self.log_length),
            (self.metadata_offset, self.metadata_length),
            (self.bat_offset, bat_length),
        ] {
            taken.extend(offset.map(|offset| (offset, u64::from(length))));
        }
        for (place, length) in self
            .blocks
            .values()
            .map(|block| (block.place, geometry.block_size))
            .chain(bitmaps.values().map(|bitmap| (bitmap.place, MIB)))
        {
            if let Place::At(mebibytes) = place {
                taken.push((mebibytes << 20, length));
            }
        }
        let mut space = Space { cursor: MIB, taken };
        let mut layout = Layout {
            geometry,
            log: self.log_offset.unwrap_or_else(|| space.take(u64::from(self.log_length))),
            log_length: self.log_length,
            metadata: self.metadata_offset.unwrap_or_else(|| space.take(u64::from(self.metadata_length))),
            metadata_length: self.metadata_length,
            bat: self.bat_offset.unwrap_or_else(|| space.take(u64::from(bat_length))),
            bat_length,
            items: BTreeMap::new(),
            payload: BTreeMap::new(),
            bitmaps: BTreeMap::new(),
            end: 0,
        };
        self.allocate_blocks(&mut layout, &mut space, bitmaps);
        layout.end = space.end();
        layout
    }

    fn allocate_blocks(&self, layout: &mut Layout, space: &mut Space, bitmaps: &BTreeMap<u64, BitmapSpec>) {
        let geometry = layout.geometry;
        let mut objects: Vec<(u64, bool, u64, Place)> = Vec::new();
        for (block, spec) in &self.blocks {
            objects.push((geometry.payload_index(*block), false, *block, spec.place));
        }
        for (chunk, spec) in bitmaps {
            // Ascending order puts a bitmap block before the payload blocks of its chunk.
            objects.push((chunk * (geometry.chunk_ratio + 1), true, *chunk, spec.place));
        }
        objects.sort_by_key(|(index, is_bitmap, ..)| (*index, !is_bitmap));
        let mut rng = self.scatter.map(Rng::new);
        if let Some(rng) = &mut rng {
            rng.shuffle(&mut objects);
        }
        for (_, is_bitmap, number, place) in objects {
            let length = if is_bitmap { MIB } else { geometry.block_size };
            let offset = match place {
                Place::Nowhere => continue,
                Place::At(mebibytes) => mebibytes << 20,
                Place::Auto => {
                    space.cursor += rng.as_mut().map_or(0, |rng| rng.below(4) * MIB);
                    space.take(length)
                }
            };
            let map = if is_bitmap { &mut layout.bitmaps } else { &mut layout.payload };
            map.insert(number, offset);
        }
    }

    fn write_payload(&self, file: &mut SparseFile, layout: &Layout) {
        let block_size = layout.geometry.block_size;
        let mut buffer = vec![0; 1 << 16];
        for (index, offset) in &layout.payload {
            let block = &self.blocks[index];
            if block.content.is_zero() || offset.saturating_add(block_size) > WRITABLE_END {
                continue;
            }
            let partial = block.state == PARTIALLY_PRESENT;
            let stale = block.content.stale();
            let mut within = 0;
            while within < block_size {
                let count = (block_size - within).min(buffer.len() as u64) as usize;
                let piece = &mut buffer[..count];
                block.content.fill(index * block_size, within, piece);
                // The stale bytes lie in the same units, so what is zero needs no second look.
                if partial && !is_zero(piece) {
                    hide_absent(block, &stale, index * block_size, within, layout.geometry.sector_size, piece);
                }
                file.write_nonzero(offset + within, piece);
                within += count as u64;
            }
        }
    }

    fn write_bitmaps(&self, file: &mut SparseFile, layout: &Layout, bitmaps: &BTreeMap<u64, BitmapSpec>) {
        let geometry = layout.geometry;
        let sectors = geometry.block_size / geometry.sector_size;
        for (chunk, offset) in &layout.bitmaps {
            if offset.saturating_add(MIB) > WRITABLE_END {
                continue;
            }
            let mut bits = vec![bitmaps[chunk].fill; MIB as usize];
            let range = chunk * geometry.chunk_ratio..(chunk + 1) * geometry.chunk_ratio;
            for (index, block) in self.blocks.range(range) {
                let Some(mask) = block.mask.as_ref() else { continue };
                let first = geometry.bits_start(*index) * 8;
                for sector in 0..sectors {
                    let bit = first + sector;
                    let byte = &mut bits[(bit / 8) as usize];
                    *byte &= !(1 << (bit % 8));
                    *byte |= u8::from(mask.contains(sector)) << (bit % 8);
                }
            }
            file.write_nonzero(*offset, &bits);
        }
    }

    fn write_bat(&self, file: &mut SparseFile, layout: &Layout, bitmaps: &BTreeMap<u64, BitmapSpec>) {
        let geometry = layout.geometry;
        let mut entries: BTreeMap<u64, u64> = BTreeMap::new();
        if self.default_state != NOT_PRESENT {
            let default = u64::from(self.default_state);
            entries.extend((0..geometry.block_count).map(|block| (geometry.payload_index(block), default)));
        }
        if self.bat_padding != 0 {
            let padding = geometry.entries_required..u64::from(layout.bat_length) / 8;
            entries.extend(padding.map(|index| (index, self.bat_padding)));
        }
        let word = |state: u8, reserved: u64, offset: Option<&u64>| {
            u64::from(state) | (reserved << 3) & 0xF_FFF8 | offset.copied().unwrap_or(0)
        };
        for (block, spec) in &self.blocks {
            let value = word(spec.state, spec.reserved, layout.payload.get(block));
            entries.insert(geometry.payload_index(*block), spec.raw.unwrap_or(value));
        }
        for (chunk, spec) in bitmaps {
            let value = word(spec.state, spec.reserved, layout.bitmaps.get(chunk));
            entries.insert(geometry.bitmap_index(*chunk), spec.raw.unwrap_or(value));
        }
        entries.extend(&self.bat_raw);
        file.zero(layout.bat, u64::from(layout.bat_length));
        for (index, value) in entries {
            if value != 0 || file.read_u64(layout.bat_entry(index)) != 0 {
                file.write_u64(layout.bat_entry(index), value);
            }
        }
    }

    fn item_data(&self, item: &ItemSpec) -> Vec<u8> {
        if let Some(data) = &item.data {
            return data.clone();
        }
        match item.guid {
            Guid::FILE_PARAMETERS => {
                let kind = u32::from(self.leave_blocks_allocated) | u32::from(self.has_parent) << 1;
                let flags = kind | self.file_parameter_bits;
                [self.block_size.to_le_bytes(), flags.to_le_bytes()].concat()
            }
            Guid::VIRTUAL_DISK_SIZE => self.virtual_size.to_le_bytes().to_vec(),
            Guid::LOGICAL_SECTOR_SIZE => self.logical_sector_size.to_le_bytes().to_vec(),
            Guid::PHYSICAL_SECTOR_SIZE => self.physical_sector_size.to_le_bytes().to_vec(),
            Guid::VIRTUAL_DISK_ID => self.disk_id.0.to_vec(),
            Guid::PARENT_LOCATOR => self.locator.clone().unwrap_or_default().encode(),
            other => panic!("item {other} has no data"),
        }
    }

    fn write_metadata(&self, file: &mut SparseFile, layout: &mut Layout) {
        let spec = &self.metadata;
        let mut table = vec![0; 65_536];
        put(&mut table, 0, &spec.signature);
        put(&mut table, 8, &spec.reserved.to_le_bytes());
        put(&mut table, 10, &spec.count_override.unwrap_or(spec.entries.len() as u16).to_le_bytes());
        put(&mut table, 12, &spec.reserved2);
        let mut packed: u32 = 65_536;
        for (index, item) in spec.entries.iter().take(2047).enumerate() {
            let data = self.item_data(item);
            let natural = if data.is_empty() { 0 } else { packed };
            let offset = item.offset.unwrap_or(natural);
            let entry = 32 + 32 * index;
            put(&mut table, entry, &item.guid.0);
            put(&mut table, entry + 16, &offset.to_le_bytes());
            put(&mut table, entry + 20, &item.length.unwrap_or(data.len() as u32).to_le_bytes());
            put(&mut table, entry + 24, &item.flags.to_le_bytes());
            put(&mut table, entry + 28, &item.reserved.to_le_bytes());
            let home = layout.metadata + u64::from(offset);
            // An item that claims a place outside its region gets no bytes there.
            if u64::from(offset) + data.len() as u64 <= u64::from(layout.metadata_length) {
                file.write(home, &data);
            }
            layout.items.insert(item.guid, (home, layout.metadata + entry as u64));
            packed = packed.max(offset.saturating_add(data.len() as u32));
        }
        file.write(layout.metadata, &table);
    }

    fn write_header_section(&self, file: &mut SparseFile, layout: &Layout) {
        let place = |guid| match guid {
            Guid::BAT => (layout.bat, layout.bat_length),
            Guid::METADATA => (layout.metadata, layout.metadata_length),
            _ => (0, 0),
        };
        for (copy, spec) in (0..).zip(&self.region_tables) {
            file.write(layout.region_table(copy), &spec.encode(place));
        }
        for (slot, spec) in (0..).zip(&self.headers) {
            file.write(layout.header(slot), &spec.encode(layout.log, layout.log_length));
        }
        file.write(0, &self.signature);
        let creator: Vec<u8> = self.creator.iter().take(256).flat_map(|unit| unit.to_le_bytes()).collect();
        file.write(8, &creator);
    }

    /// Fills what readers must ignore; structures are written over it later.
    fn write_junk(&self, file: &mut SparseFile, layout: &Layout, seed: u64) {
        let mut rng = Rng::new(seed);
        let mut junk = |start: u64, length: u64| {
            let count = length.min(12_288);
            file.write(start + (length - count) / 512 * 512, &rng.bytes(count as usize));
            file.write(start, &rng.bytes(count.min(700) as usize));
        };
        junk(520, 65_536 - 520);
        junk((1 << 16) + 4096, 65_536 - 4096);
        junk((2 << 16) + 4096, 65_536 - 4096);
        junk(5 << 16, MIB - (5 << 16));
        junk(layout.log, u64::from(layout.log_length));
        if layout.metadata_length > 65_536 {
            junk(layout.metadata + 65_536, u64::from(layout.metadata_length) - 65_536);
        }
    }
}

/// Overwrites the sectors that the bitmap does not claim, so that a reader that ignores the bitmap is caught.
fn hide_absent(block: &BlockSpec, stale: &Content, start: u64, within: u64, sector_size: u64, piece: &mut [u8]) {
    for (unit, bytes) in (within / 512..).zip(piece.chunks_mut(512)) {
        if !block.mask.as_ref().is_some_and(|mask| mask.contains(unit * 512 / sector_size)) {
            stale.fill(start, unit * 512, bytes);
        }
    }
}

/// Free space of the file, given out in ascending order.
struct Space {
    cursor: u64,
    /// Ranges that were placed by hand: offset, length.
    taken: Vec<(u64, u64)>,
}

impl Space {
    fn take(&mut self, length: u64) -> u64 {
        let (mut start, length) = (self.cursor.next_multiple_of(MIB), length.next_multiple_of(MIB));
        while let Some((offset, size)) =
            self.taken.iter().find(|(offset, size)| *offset < start + length && offset.saturating_add(*size) > start)
        {
            start = (offset + size).next_multiple_of(MIB);
        }
        self.cursor = start + length;
        start
    }

    /// The end of everything, without what lies absurdly far away.
    fn end(&self) -> u64 {
        let ends = self.taken.iter().map(|(offset, size)| offset.saturating_add(*size));
        ends.filter(|end| *end < WRITABLE_END).fold(self.cursor, u64::max)
    }
}
