//! Breaks each structure of an image in each way that media, crashes and programs break them.
//!
//! ```
//! use vhdkit_testkit::{ImageBuilder, damage};
//!
//! let image = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(1, 7).build();
//! for damage in damage::all(&image) {
//!     let mut file = image.file.clone();
//!     damage.apply(&mut file);
//! }
//! ```

use std::ops::Range;

use crate::builder::BuiltImage;
use crate::guid::Guid;
use crate::rng::Rng;
use crate::sparse::SparseFile;
use crate::spec::MIB;

/// One change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Bytes are replaced.
    Write(u64, Vec<u8>),
    /// A range becomes zero.
    Zero(Range<u64>),
    /// A range becomes noise, the same each time.
    Noise(Range<u64>, u64),
    /// One bit is flipped.
    Flip(u64, u8),
    /// Two ranges of so many bytes change places.
    Swap(u64, u64, u64),
    /// A range moves up by so many bytes; what it began with stays.
    Shift(Range<u64>, u64),
    /// The file ends here.
    Cut(u64),
}

/// One way to break an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What is broken, and how.
    pub name: String,
    /// The changes that do it.
    pub edits: Vec<Edit>,
}

impl Damage {
    fn new(name: impl Into<String>, edits: Vec<Edit>) -> Self {
        Self { name: name.into(), edits }
    }

    /// Breaks a file.
    pub fn apply(&self, file: &mut SparseFile) {
        for edit in &self.edits {
            match edit {
                Edit::Write(offset, bytes) => file.write(*offset, bytes),
                Edit::Zero(range) => file.zero(range.start, range.end - range.start),
                Edit::Noise(range, seed) => {
                    let mut rng = Rng::new(*seed);
                    let bytes: Vec<u8> = (range.start..range.end).map(|_| rng.below(256) as u8).collect();
                    file.write(range.start, &bytes);
                }
                Edit::Flip(offset, bit) => {
                    let byte = file.read(*offset, 1)[0] ^ (1 << bit);
                    file.write(*offset, &[byte]);
                }
                Edit::Swap(one, other, length) => {
                    let (first, second) = (file.read(*one, *length as usize), file.read(*other, *length as usize));
                    file.write(*one, &second);
                    file.write(*other, &first);
                }
                Edit::Shift(range, by) => {
                    let bytes = file.read(range.start, (range.end - range.start - by) as usize);
                    file.write(range.start + by, &bytes);
                }
                Edit::Cut(length) => file.set_len(*length),
            }
        }
    }
}

/// Every way to break this image.
#[must_use]
pub fn all(image: &BuiltImage) -> Vec<Damage> {
    let mut list = header_section(image);
    list.extend(metadata(image));
    list.extend(bat(image));
    list.extend(bitmaps(image));
    list.extend(log(image));
    list.extend(tail(image));
    list.extend(rot(image));
    list
}

fn at(offset: u64, length: u64) -> Range<u64> {
    offset..offset + length
}

fn header_section(image: &BuiltImage) -> Vec<Damage> {
    let headers = [0, 1].map(|slot| image.layout.header(slot));
    let tables = [0, 1].map(|copy| image.layout.region_table(copy));
    let mut list = vec![
        Damage::new("identifier: zeroed", vec![Edit::Zero(at(0, 512))]),
        Damage::new("identifier: noise", vec![Edit::Noise(at(0, 4096), 1)]),
        Damage::new("leading MiB: zeroed", vec![Edit::Zero(0..MIB)]),
        Damage::new("leading MiB: noise", vec![Edit::Noise(0..MIB, 2)]),
        Damage::new("leading MiB: first half zeroed", vec![Edit::Zero(0..MIB / 2)]),
    ];
    for (name, places, length) in [("header", headers, 4096), ("region table", tables, 65_536)] {
        for (copy, place) in (1..).zip(places) {
            list.push(Damage::new(format!("{name} {copy}: zeroed"), vec![Edit::Zero(at(place, length))]));
            list.push(Damage::new(format!("{name} {copy}: one bit"), vec![Edit::Flip(place + 20, 3)]));
            list.push(Damage::new(format!("{name} {copy}: first sector zeroed"), vec![Edit::Zero(at(place, 512))]));
        }
        let both = |edit: fn(Range<u64>) -> Edit| places.map(|place| edit(at(place, length))).to_vec();
        list.push(Damage::new(format!("{name} 1 and 2: zeroed"), both(Edit::Zero)));
        list.push(Damage::new(format!("{name} 1 and 2: noise"), both(|range| Edit::Noise(range, 3))));
        let bits = places.map(|place| Edit::Flip(place + 20, 3)).to_vec();
        list.push(Damage::new(format!("{name} 1 and 2: one bit each"), bits));
        list.push(Damage::new(format!("{name} 1 and 2: swapped"), vec![Edit::Swap(places[0], places[1], length)]));
    }
    let headers_and_tables = headers.into_iter().chain(tables).map(|place| Edit::Zero(at(place, 4096))).collect();
    list.push(Damage::new("headers and region tables: zeroed", headers_and_tables));
    list
}

fn metadata(image: &BuiltImage) -> Vec<Damage> {
    let region = image.layout.metadata;
    let mut list = vec![
        Damage::new("metadata: signature zeroed", vec![Edit::Zero(at(region, 8))]),
        Damage::new("metadata: reserved field set", vec![Edit::Flip(region + 12, 0)]),
        Damage::new("metadata: first sector zeroed", vec![Edit::Zero(at(region, 512))]),
        Damage::new("metadata: table zeroed", vec![Edit::Zero(at(region, 65_536))]),
        Damage::new("metadata: table noise", vec![Edit::Noise(at(region, 65_536), 4)]),
        Damage::new("metadata: items zeroed", vec![Edit::Zero(at(region + 65_536, 4096))]),
        Damage::new("metadata: region zeroed", vec![Edit::Zero(at(region, MIB))]),
        Damage::new("metadata: region noise", vec![Edit::Noise(at(region, MIB), 5)]),
    ];
    let names = [
        ("file parameters", Guid::FILE_PARAMETERS, 8),
        ("disk size", Guid::VIRTUAL_DISK_SIZE, 8),
        ("logical sector size", Guid::LOGICAL_SECTOR_SIZE, 4),
        ("physical sector size", Guid::PHYSICAL_SECTOR_SIZE, 4),
        ("disk identity", Guid::VIRTUAL_DISK_ID, 16),
        ("parent locator", Guid::PARENT_LOCATOR, 20),
    ];
    for (name, guid, length) in names {
        let Some((item, entry)) = image.layout.items.get(&guid).copied() else { continue };
        list.push(Damage::new(format!("metadata: {name} zeroed"), vec![Edit::Zero(at(item, length))]));
        list.push(Damage::new(format!("metadata: {name} without entry"), vec![Edit::Zero(at(entry, 32))]));
        list.push(Damage::new(format!("metadata: {name} entry, flags"), vec![Edit::Flip(entry + 24, 5)]));
        list.push(Damage::new(format!("metadata: {name} entry, offset"), vec![Edit::Flip(entry + 18, 6)]));
    }
    list
}

fn bat(image: &BuiltImage) -> Vec<Damage> {
    let layout = &image.layout;
    let used = layout.geometry.entries_required * 8;
    let bat = at(layout.bat, used);
    let mut list = vec![
        Damage::new("BAT: zeroed", vec![Edit::Zero(bat.clone())]),
        Damage::new("BAT: noise", vec![Edit::Noise(bat.clone(), 6)]),
        Damage::new("BAT: shifted by an entry", vec![Edit::Shift(bat.clone(), 8)]),
        Damage::new("BAT: first sector zeroed", vec![Edit::Zero(at(layout.bat, 512.min(used)))]),
        Damage::new("BAT: first sector noise", vec![Edit::Noise(at(layout.bat, 512.min(used)), 7)]),
    ];
    if used >= 1024 {
        list.push(Damage::new("BAT: two sectors swapped", vec![Edit::Swap(layout.bat, layout.bat + 512, 512)]));
        list.push(Damage::new("BAT: second sector zeroed", vec![Edit::Zero(at(layout.bat + 512, used - 512))]));
    }
    let present: Vec<u64> = layout.payload.keys().copied().collect();
    for (which, index) in [("first", 0), ("middle", present.len() / 2), ("last", present.len().saturating_sub(1))] {
        let Some(block) = present.get(index).copied() else { continue };
        let entry = layout.payload_entry(block);
        let value = image.file.read_u64(entry);
        let write = |value: u64| vec![Edit::Write(entry, value.to_le_bytes().to_vec())];
        list.push(Damage::new(format!("BAT, {which} block: zeroed"), write(0)));
        list.push(Damage::new(format!("BAT, {which} block: all ones"), write(u64::MAX)));
        list.push(Damage::new(format!("BAT, {which} block: reserved bit"), write(value ^ 1 << 9)));
        list.push(Damage::new(format!("BAT, {which} block: state 4"), write(value & !7 | 4)));
        list.push(Damage::new(format!("BAT, {which} block: state 0"), write(value & !7)));
        list.push(Damage::new(format!("BAT, {which} block: state 2"), write(value & !7 | 2)));
        list.push(Damage::new(format!("BAT, {which} block: far away"), write(value | 1 << 45)));
        list.push(Damage::new(format!("BAT, {which} block: at the BAT"), write(layout.bat | 6)));
        let other = present.get(if index == 0 { 1 } else { index - 1 }).copied().unwrap_or(block);
        let twice = image.file.read_u64(layout.payload_entry(other));
        list.push(Damage::new(format!("BAT, {which} block: where another is"), write(twice)));
    }
    list
}

fn bitmaps(image: &BuiltImage) -> Vec<Damage> {
    let layout = &image.layout;
    let mut list = Vec::new();
    for (chunk, place) in &layout.bitmaps {
        let entry = layout.bitmap_entry(*chunk);
        list.push(Damage::new(format!("bitmap {chunk}: entry zeroed"), vec![Edit::Zero(at(entry, 8))]));
        list.push(Damage::new(format!("bitmap {chunk}: entry all ones"), vec![Edit::Write(entry, vec![0xff; 8])]));
        list.push(Damage::new(format!("bitmap {chunk}: reserved bit"), vec![Edit::Flip(entry, 7)]));
        list.push(Damage::new(format!("bitmap {chunk}: zeroed"), vec![Edit::Zero(at(*place, MIB))]));
    }
    list
}

fn log(image: &BuiltImage) -> Vec<Damage> {
    let (log, length) = (image.layout.log, u64::from(image.layout.log_length));
    vec![
        Damage::new("log: zeroed", vec![Edit::Zero(at(log, length))]),
        Damage::new("log: noise", vec![Edit::Noise(at(log, length), 8)]),
        Damage::new("log: first sector zeroed", vec![Edit::Zero(at(log, 512))]),
        Damage::new("log: torn in the middle of an entry", vec![Edit::Zero(at(log + 8192, 4096))]),
        Damage::new("log: one bit", vec![Edit::Flip(log + 4100, 1)]),
    ]
}

fn tail(image: &BuiltImage) -> Vec<Damage> {
    let length = image.file.len();
    let block = layout_block(image);
    vec![
        Damage::new("end: a sector cut off", vec![Edit::Cut(length - 512.min(length))]),
        Damage::new("end: a block cut off", vec![Edit::Cut(length.saturating_sub(block))]),
        Damage::new("end: a block and a half cut off", vec![Edit::Cut(length.saturating_sub(block + block / 2))]),
        Damage::new("end: half of the file cut off", vec![Edit::Cut(length / 2 / MIB * MIB)]),
        Damage::new("end: zeros behind it", vec![Edit::Cut(length + 3 * MIB)]),
        Damage::new("end: noise behind it", vec![Edit::Noise(at(length, 3 * MIB), 9)]),
    ]
}

/// Bytes of a block, from the distance that the builder keeps.
fn layout_block(image: &BuiltImage) -> u64 {
    u64::from(image.model.block_size)
}

/// A few bits in the structures, at random.
fn rot(image: &BuiltImage) -> Vec<Damage> {
    let layout = &image.layout;
    let places = [
        (layout.header(0), 80),
        (layout.header(1), 80),
        (layout.region_table(0), 80),
        (layout.region_table(1), 80),
        (layout.metadata, 32 + 32 * layout.items.len() as u64),
        (layout.metadata + 65_536, 40),
        (layout.bat, layout.geometry.entries_required * 8),
    ];
    let mut list = Vec::new();
    for seed in 0..6 {
        let mut rng = Rng::new(100 + seed);
        let edits = (0..3).map(|_| {
            let (start, length) = places[rng.below(places.len() as u64) as usize];
            Edit::Flip(start + rng.below(length), rng.below(8) as u8)
        });
        list.push(Damage::new(format!("bit rot {seed}: three bits in the structures"), edits.collect()));
    }
    list
}
