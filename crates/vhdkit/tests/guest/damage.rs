//! Damage of every kind: no byte that is changed, cut off or made up gives a range free that the file system uses.
#![allow(clippy::single_range_in_vec_init, reason = "a list of ranges may have one")]

use std::ops::Range;
use std::path::Path;

use vhdkit::image::BlockDevice as _;
use vhdkit_testkit::Rng;
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;
use crate::{ext, fat, ntfs, xfs};

/// Variants of each disk with bytes changed at random.
const RANDOM_VARIANTS: usize = 200;

pub(crate) fn cases() -> Vec<Case> {
    let ext = || Needs::tools(&["mke2fs", "debugfs"]);
    let fat = || Needs::tools(&["mkfs.fat", "mcopy", "mdel"]);
    let of_ext = |mib: u64, arguments: &'static [&'static str]| {
        move || {
            let scratch = Scratch::new();
            damage(&ext::make(&scratch, mib, arguments), &[1024..3072], &[]);
        }
    };
    let of_fat = |kib: u64, arguments: &'static [&'static str]| {
        move || {
            let scratch = Scratch::new();
            damage(&fat::make(&scratch, kib, arguments), &[0..96, 3072..3168], &[]);
        }
    };
    let of_xfs = |arguments: &'static [&'static str]| {
        move || {
            let scratch = Scratch::new();
            damage(&xfs::make(&scratch, 320, arguments), &[0..264, 512..736], &[]);
        }
    };
    vec![
        Case::new("damage: ext4", ext(), of_ext(16, &["-t", "ext4", "-b", "1024"])),
        Case::new(
            "damage: ext4 with group checksums",
            ext(),
            of_ext(16, &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"]),
        ),
        Case::new("damage: ext3", ext(), of_ext(16, &["-t", "ext3", "-b", "1024"])),
        Case::new("damage: ext2", ext(), of_ext(16, &["-t", "ext2", "-b", "1024", "-O", "^resize_inode"])),
        Case::new("damage: FAT12", fat(), of_fat(2048, &["-F", "12"])),
        Case::new("damage: FAT16", fat(), of_fat(20 << 10, &["-F", "16", "-s", "2"])),
        Case::new("damage: FAT32", fat(), of_fat(40 << 10, &["-F", "32", "-s", "1"])),
        Case::new("damage: exFAT", Needs::tools(&["mkfs.exfat", "dump.exfat"]), of_exfat),
        Case::new("damage: NTFS", Needs::tools(&["mkntfs", "ntfscp", "ntfscat", "ntfsinfo"]), of_ntfs),
        Case::new("damage: XFS version 5", Needs::tools(&["mkfs.xfs"]), of_xfs(&[])),
        Case::new("damage: XFS version 4", Needs::tools(&["mkfs.xfs"]), of_xfs(&["-m", "crc=0"])),
    ]
}

fn of_exfat() {
    let scratch = Scratch::new();
    let path = fat::make_exfat(&scratch, 8, &["-c", "4K"]);
    let disk = Patched::read(&path);
    let heap = u64::from(u32::from_le_bytes(disk.bytes(88, 4).try_into().unwrap())) * 512;
    let clusters = u64::from(u32::from_le_bytes(disk.bytes(92, 4).try_into().unwrap()));
    // Nothing protects the bitmap: a bit that is cleared there is free.
    damage(&path, &[0..128], &[heap..heap + clusters.div_ceil(8)]);
}

fn of_ntfs() {
    let scratch = Scratch::new();
    let path = ntfs::make(&scratch, 8, &["-c", "4096"]);
    let disk = Patched::read(&path);
    let table = u64::from_le_bytes(disk.bytes(0x30, 8).try_into().unwrap()) * 4096;
    // Each cluster of a file is looked for in the bitmap, so that it needs no exception.
    damage(&path, &[0..128, table..table + 480, table + 6144..table + 6144 + 512], &[]);
}

/// Changes bytes: each of those in `dense` in several ways, then any that are not zero, and cuts the disk.
fn damage(path: &Path, dense: &[Range<u64>], bitmaps: &[Range<u64>]) {
    let disk = Patched::read(path);
    let free = free_of_all(&disk);
    assert!(!free.is_empty());
    let judge = |what: &dyn std::fmt::Debug, variant: &Patched| {
        let wrong = outside(&free_of_all(variant), &free);
        assert!(wrong.is_empty(), "{what:?} makes free what is in use: {wrong:?}");
    };
    for offset in dense.iter().flat_map(Clone::clone) {
        let byte = disk.bytes(offset, 1)[0];
        for new in [byte ^ 1 << (offset % 8), byte << 1] {
            if new != byte {
                judge(&(offset, byte, new), &disk.with(offset, &[new]));
            }
        }
    }
    let mut rng = Rng::new(7);
    let sectors = used_sectors(&disk);
    for _ in 0..RANDOM_VARIANTS {
        let mut variant = disk.clone();
        let mut what = Vec::new();
        for _ in 0..rng.between(1, 4) {
            let offset = rng.pick(&sectors) * 512 + rng.below(512);
            if bitmaps.iter().any(|bitmap| bitmap.contains(&offset)) {
                continue;
            }
            let byte = disk.bytes(offset, 1)[0];
            let new = match rng.below(4) {
                0 => 0,
                1 => 0xff,
                2 => byte ^ 1 << rng.below(8),
                _ => rng.bytes(1)[0],
            };
            what.push((offset, byte, new));
            variant = variant.with(offset, &[new]);
        }
        judge(&what, &variant);
    }
    for part in 1..12 {
        let mut variant = disk.clone();
        variant.size = disk.size / 12 / 512 * 512 * part;
        judge(&variant.size, &variant);
    }
    // Sectors that were never written.
    for sector in &sectors {
        let offset = sector * 512;
        if !bitmaps.iter().any(|bitmap| bitmap.start < offset + 512 && bitmap.end > offset) {
            judge(&("zeros at", offset), &disk.with(offset, &[0; 512]));
        }
    }
}

/// The sectors that are not zero, but few of each run: what is alike in a row is content of files.
fn used_sectors(disk: &Patched) -> Vec<u64> {
    let mut all = Vec::new();
    let mut row = 0;
    let chunk = 256 << 10;
    for start in (0..disk.size()).step_by(chunk) {
        let count = chunk.min(usize::try_from(disk.size() - start).unwrap());
        let bytes = disk.bytes(start, count);
        for (sector, content) in (start / 512..).zip(bytes.chunks(512)) {
            row = if content.iter().all(|byte| *byte == 0) { 0 } else { row + 1 };
            if (1..=3).contains(&row) {
                all.push(sector);
            }
        }
    }
    all
}
