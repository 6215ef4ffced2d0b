//! Images: made by the command, read by QEMU, and their block allocation table by a plain reading of its own.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::common::{MIB, Scratch};
use crate::disks::{text, tool};

/// Where the first copy of the region table lies, and what is searched in it [MS-VHDX] 2.2.3: the GUID of the BAT.
const REGION_TABLE: u64 = 192 << 10;
const BAT: [u8; 16] = [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08];

fn number(file: &File, offset: u64, count: usize) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes[..count], offset).unwrap();
    u64::from_le_bytes(bytes)
}

/// Which blocks have space of their own, in an image with an empty log and 512-byte sectors.
pub(crate) fn blocks_with_space(image: &Path, disk: u64, block: u64) -> BTreeSet<u64> {
    let file = File::open(image).unwrap();
    let (bat, _) = bat(&file);
    let chunk = ((1_u64 << 23) * 512) / block;
    // 6 is FULLY_PRESENT, 7 PARTIALLY_PRESENT; behind each chunk there is an entry for its sector bitmap.
    let entry = |index: u64| number(&file, bat + 8 * (index + index / chunk), 8);
    (0..disk.div_ceil(block)).filter(|index| matches!(entry(*index) & 7, 6 | 7)).collect()
}

/// Offset and length of the BAT.
fn bat(file: &File) -> (u64, u64) {
    let entries = (0..number(file, REGION_TABLE + 8, 4)).map(|index| REGION_TABLE + 16 + 32 * index);
    let is_bat = |entry: &u64| {
        let mut guid = [0; 16];
        file.read_exact_at(&mut guid, *entry).unwrap();
        guid == BAT
    };
    let entry = entries.into_iter().find(is_bat).unwrap();
    (number(file, entry + 16, 8), number(file, entry + 24, 4))
}

/// By how much the file exceeds its payload and its BAT.
pub(crate) fn overhead(image: &Path, payload: u64) -> u64 {
    let file = File::open(image).unwrap();
    let (_, bat) = bat(&file);
    file.metadata().unwrap().len().checked_sub(payload + bat).expect("the file holds its blocks and its BAT")
}

/// The image as a raw file beside it.
pub(crate) fn raw(scratch: &Scratch, image: &Path) -> PathBuf {
    let raw = tempfile::tempdir_in(scratch.path()).unwrap().keep().join("raw");
    scratch.run(&["convert", "--quiet", text(image), text(&raw), "--to", "raw"]).expect(0);
    raw
}

/// Both checks are content.
#[track_caller]
pub(crate) fn check(scratch: &Scratch, image: &Path) {
    scratch.run(&["check", "--strict", text(image)]).expect(0);
    if !is_child(image) {
        tool("qemu-img", &["check", "-q", "-f", "vhdx", text(image)]);
    }
}

fn is_child(image: &Path) -> bool {
    image.extension().is_some_and(|name| name == "avhdx")
}

/// QEMU reads the same disk from the image as lies in the raw file; it reads no children.
#[track_caller]
pub(crate) fn same_disk(image: &Path, raw: &Path) {
    tool("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", text(image), text(raw)]);
}

/// Writes what is different into an image, in ranges of so many bytes.
pub(crate) fn write_difference(scratch: &Scratch, image: &Path, old: &Path, new: &Path) {
    const PIECE: u64 = 64 << 10;
    let (old, new) = (File::open(old).unwrap(), File::open(new).unwrap());
    let size = new.metadata().unwrap().len();
    assert_eq!(old.metadata().unwrap().len(), size);
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let (mut one, mut other) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    for start in (0..size).step_by(PIECE as usize) {
        let count = PIECE.min(size - start);
        old.read_exact_at(&mut one[..count as usize], start).unwrap();
        new.read_exact_at(&mut other[..count as usize], start).unwrap();
        if one[..count as usize] != other[..count as usize] {
            match ranges.last_mut() {
                Some(last) if start - last.end <= PIECE => last.end = start + count,
                _ => ranges.push(start..start + count),
            }
        }
    }
    assert!(!ranges.is_empty());
    for range in ranges {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        new.read_exact_at(&mut bytes, range.start).unwrap();
        let file = scratch.write("difference", &bytes);
        let offset = range.start.to_string();
        scratch.run(&["write", "-q", text(image), "--offset", &offset, "--input", text(&file)]).expect(0);
    }
}

/// The first byte that differs outside the blocks in which something may.
pub(crate) fn first_difference(one: &Path, other: &Path, block: u64, may: impl Fn(u64) -> bool) -> Option<u64> {
    let (one, other) = (File::open(one).unwrap(), File::open(other).unwrap());
    let size = one.metadata().unwrap().len();
    assert_eq!(other.metadata().unwrap().len(), size);
    let piece = block.min(MIB);
    let (mut left, mut right) = (vec![0; piece as usize], vec![0; piece as usize]);
    for start in (0..size).step_by(piece as usize).filter(|start| !may(start / block)) {
        let count = piece.min(size - start) as usize;
        one.read_exact_at(&mut left[..count], start).unwrap();
        other.read_exact_at(&mut right[..count], start).unwrap();
        if let Some(at) = left[..count].iter().zip(&right[..count]).position(|(left, right)| left != right) {
            return Some(start + at as u64);
        }
    }
    None
}

/// The blocks that hold nothing but zeros in a raw file.
pub(crate) fn zero_blocks(raw: &Path, block: u64) -> BTreeSet<u64> {
    let file = File::open(raw).unwrap();
    let size = file.metadata().unwrap().len();
    let mut bytes = vec![0; block as usize];
    (0..size.div_ceil(block))
        .filter(|index| {
            let count = block.min(size - index * block) as usize;
            file.read_exact_at(&mut bytes[..count], index * block).unwrap();
            bytes[..count].iter().all(|byte| *byte == 0)
        })
        .collect()
}
