//! FAT12, FAT16, FAT32 and exFAT, judged by readings of their own and by the counts of fsck.fat and dump.exfat.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdkit::guest::VolumeKind;
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;

const LAYOUTS: &[(&str, u64, VolumeKind, &[&str])] = &[
    ("FAT12", 4096, VolumeKind::Fat12, &["-F", "12"]),
    ("FAT12 of a floppy disk", 1440, VolumeKind::Fat12, &["-F", "12", "-s", "1"]),
    ("FAT16", 40 << 10, VolumeKind::Fat16, &["-F", "16"]),
    ("FAT16 with sectors of 4 KiB", 200 << 10, VolumeKind::Fat16, &["-F", "16", "-S", "4096"]),
    ("FAT32", 300 << 10, VolumeKind::Fat32, &["-F", "32"]),
    ("FAT32 with one table", 50 << 10, VolumeKind::Fat32, &["-F", "32", "-s", "1", "-f", "1"]),
];

fn needs() -> Needs {
    Needs::tools(&["mkfs.fat", "fsck.fat", "mcopy", "mdel"])
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, kib, kind, arguments) in LAYOUTS {
        cases.push(Case::new(*name, needs(), move || layout(*kib, *kind, arguments)));
    }
    cases.push(Case::new("FAT: states that speak against it", needs(), states));
    let exfat = || Needs::tools(&["mkfs.exfat", "dump.exfat"]);
    cases.push(Case::new("exFAT, empty", exfat(), empty_exfat));
    cases.push(Case::new("exFAT: states that speak against it", exfat(), exfat_states));
    let mut root = exfat().and_root().and_file("/dev/fuse").and_file("/dev/loop-control");
    root.tools.push("mount.exfat-fuse".to_owned());
    cases.push(Case::new("exFAT, used", root, used_exfat));
    cases
}

/// A volume with the tree in it, half of it deleted.
pub(crate) fn make(scratch: &Scratch, kib: u64, arguments: &[&str]) -> PathBuf {
    let path = scratch.file("image", kib * KIB);
    let mut all = arguments.to_vec();
    all.push(text(&path));
    tool("mkfs.fat", &all);
    let tree = scratch.tree();
    let (a, b) = (tree.join("a"), tree.join("b"));
    tool("mcopy", &["-s", "-i", text(&path), text(&a), text(&b), "::/"]);
    for file in deleted() {
        tool("mdel", &["-i", text(&path), &format!("::/{file}")]);
    }
    path
}

fn number(bytes: &[u8], offset: usize, count: usize) -> u64 {
    bytes[offset..offset + count].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// What a plain reading of the first table says is free, in bytes.
pub(crate) fn truth(path: &Path, kind: VolumeKind) -> Vec<Range<u64>> {
    let bytes = std::fs::read(path).unwrap();
    let sector = number(&bytes, 11, 2);
    let cluster = sector * number(&bytes, 13, 1);
    let (reserved, tables) = (number(&bytes, 14, 2), number(&bytes, 16, 1));
    let pick = |small: u64, large: u64| if small == 0 { large } else { small };
    let table = pick(number(&bytes, 22, 2), number(&bytes, 36, 4));
    let sectors = pick(number(&bytes, 19, 2), number(&bytes, 32, 4));
    let data = (reserved + tables * table) * sector + number(&bytes, 17, 2) * 32;
    let clusters = (sectors * sector - data) / cluster;
    let start = usize::try_from(reserved * sector).unwrap();
    let entry = |index: usize| match kind {
        VolumeKind::Fat12 => number(&bytes, start + index * 3 / 2, 2) >> (index % 2 * 4) & 0xfff,
        VolumeKind::Fat16 => number(&bytes, start + index * 2, 2),
        _ => number(&bytes, start + index * 4, 4) & 0x0fff_ffff,
    };
    let free: Vec<u64> = (0..clusters).filter(|index| entry(usize::try_from(index + 2).unwrap()) == 0).collect();
    // fsck.fat ends with: "image: 26 files, 431/2010 clusters"
    let said = tool_says("fsck.fat", &["-n", text(path)]);
    let counts = said.lines().last().unwrap().rsplit(", ").next().unwrap();
    let (used, all) = counts.split_once(' ').unwrap().0.split_once('/').unwrap();
    assert_eq!(all.parse::<u64>().unwrap(), clusters);
    assert_eq!(clusters - used.parse::<u64>().unwrap(), free.len() as u64);
    joined(free.into_iter().map(|index| data + index * cluster..data + (index + 1) * cluster).collect())
}

fn layout(kib: u64, kind: VolumeKind, arguments: &[&str]) {
    let scratch = Scratch::new();
    let path = make(&scratch, kib, arguments);
    let disk = open(&path);
    let volume = only(&disk);
    assert_eq!(volume.kind, kind, "{:?}", volume.state);
    let free = free_of(&disk, &volume);
    assert!(free.len() > 3, "{free:?} {:?}", volume.state);
    assert_eq!(free, truth(&path, kind));
}

fn states() {
    let scratch = Scratch::new();
    for (kib, arguments, state, dirty, failed) in [
        (4096, &["-F", "12"][..], 0x25, None, None),
        (40 << 10, &["-F", "16"][..], 0x25, Some((3, 0x7f)), Some((3, 0xbf))),
        (50 << 10, &["-F", "32", "-s", "1"][..], 0x41, Some((7, 0xf7)), Some((7, 0xfb))),
    ] {
        let disk = Patched::read(&make(&scratch, kib, arguments));
        assert!(!free_of_all(&disk).is_empty());
        assert!(why(&disk.with(state, &[1])).contains("dirty"));
        assert!(why(&disk.with(state, &[2])).contains("failed"));
        let start = disk.bytes(14, 2);
        let table = number(&start, 0, 2) * 512;
        for ((offset, mask), word) in
            [(dirty, "dirty"), (failed, "failed")].into_iter().filter_map(|(a, b)| Some((a?, b)))
        {
            let byte = disk.bytes(table + offset, 1)[0] & mask;
            let reason = why(&disk.with(table + offset, &[byte]));
            assert!(reason.contains(word), "{reason}");
        }
        // The copy of the table differs in one entry.
        let sectors = disk.bytes(22, 2);
        let sectors = if sectors == [0, 0] { disk.bytes(36, 4) } else { sectors };
        let copy = table + number(&sectors, 0, sectors.len()) * 512;
        assert!(why(&disk.with(copy + 60, &[0x5a])).contains("tables differ"));
        // An entry that leads out of the volume, in both.
        let both = disk.with(table + 60, &[0xef; 4]).with(copy + 60, &[0xef; 4]);
        assert!(why(&both).contains("leads out"), "{}", why(&both));
        let mut cut = disk.clone();
        cut.size -= 512 * 16;
        assert!(why(&cut).contains("larger"));
    }
    // Another cluster size than the table was made for.
    let disk = Patched::read(&make(&scratch, 40 << 10, &["-F", "16", "-s", "4"]));
    assert!(why(&disk.with(13, &[8])).contains("too long"));
    let disk = Patched::read(&make(&scratch, 50 << 10, &["-F", "32", "-s", "1"]));
    assert!(why(&disk.with(44, &[3])).contains("copy disagree"));
    let both = |offset: u64, value: &[u8]| disk.with(offset, value).with(6 * 512 + offset, value);
    assert!(why(&both(40, &[0x80])).contains("mirror"));
    assert!(why(&both(42, &[1])).contains("version"));
}

/// What a plain reading of the bitmap says is free, in bytes. mkfs.exfat puts the bitmap first.
pub(crate) fn exfat_truth(path: &Path) -> Vec<Range<u64>> {
    let said = tool("dump.exfat", &[text(path)]);
    let value = |name: &str| -> u64 {
        let line = said.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.trim().parse().unwrap()
    };
    assert_eq!(value("Bitmap start cluster:"), 2);
    let bytes = std::fs::read(path).unwrap();
    let (heap, cluster) = (value("Cluster Heap Offset (sector offset):") * 512, value("Cluster size:"));
    let start = usize::try_from(heap).unwrap();
    let is_free = |index: u64| bytes[start + usize::try_from(index / 8).unwrap()] >> (index % 8) & 1 == 0;
    let free: Vec<u64> = (0..value("Cluster Count:")).filter(|index| is_free(*index)).collect();
    assert_eq!(free.len() as u64, value("Free Clusters:"));
    joined(free.into_iter().map(|index| heap + index * cluster..heap + (index + 1) * cluster).collect())
}

pub(crate) fn make_exfat(scratch: &Scratch, mib: u64, arguments: &[&str]) -> PathBuf {
    let path = scratch.file("image", mib * MIB);
    let mut all = arguments.to_vec();
    all.push(text(&path));
    tool("mkfs.exfat", &all);
    path
}

fn empty_exfat() {
    let scratch = Scratch::new();
    for (mib, arguments) in [(20, &["-c", "4K"][..]), (100, &[][..]), (300, &["-c", "128K"][..])] {
        let path = make_exfat(&scratch, mib, arguments);
        let disk = open(&path);
        let volume = only(&disk);
        assert_eq!(volume.kind, VolumeKind::ExFat, "{:?}", volume.state);
        let free = free_of(&disk, &volume);
        assert!(!free.is_empty(), "{:?}", volume.state);
        assert_eq!(free, exfat_truth(&path));
    }
}

fn used_exfat() {
    let scratch = Scratch::new();
    let path = make_exfat(&scratch, 100, &[]);
    let device = Loop::new(&path);
    let point = scratch.join("mounted");
    let copy = scratch.join("copy");
    mounted(
        &point,
        Command::new("mount.exfat-fuse").arg(&device.0).arg(&point).stdout(std::process::Stdio::null()),
        |point| {
            use_it(&scratch, point);
            tool("sync", &[]);
            tool("cp", &["--sparse=always", &device.0, text(&copy)]);
        },
    );
    assert!(why(&open(&copy)).contains("dirty"));
    gone(&format!("exfat-fuse {}", device.0));
    drop(device);
    let free = free_of_all(&open(&path));
    assert!(free.len() > 1, "{free:?}");
    assert_eq!(free, exfat_truth(&path));
}

/// Puts the checksum of the boot region right.
pub(crate) fn exfat_sum(disk: &Patched) -> Patched {
    let region = disk.bytes(0, 11 * 512);
    let sum = region.iter().enumerate().filter(|(offset, _)| ![106, 107, 112].contains(offset));
    let sum = sum.fold(0_u32, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u32::from(*byte)));
    disk.with(11 * 512, &sum.to_le_bytes().repeat(128))
}

fn exfat_states() {
    let scratch = Scratch::new();
    let disk = Patched::read(&make_exfat(&scratch, 20, &["-c", "4K"]));
    assert!(!free_of_all(&disk).is_empty());
    assert!(why(&disk.with(106, &[2])).contains("dirty"));
    assert!(why(&disk.with(106, &[4])).contains("failed"));
    assert!(why(&disk.with(106, &[1])).contains("TexFAT"));
    assert!(why(&disk.with(100, &[9])).contains("checksum of its boot region"));
    assert!(!free_of_all(&exfat_sum(&disk.with(100, &[9]))).is_empty(), "the serial number does not matter");
    assert!(why(&exfat_sum(&disk.with(110, &[2]))).contains("TexFAT"));
    assert!(why(&exfat_sum(&disk.with(105, &[2]))).contains("revision"));
    let heap = number(&disk.bytes(88, 4), 0, 4) * 512;
    let root = heap + (number(&disk.bytes(96, 4), 0, 4) - 2) * 4096;
    let entries = disk.bytes(root, 4096);
    let entry = |kind: u8| root + 32 * entries.chunks(32).position(|entry| entry[0] == kind).unwrap() as u64;
    assert!(why(&disk.with(entry(0x81), &[1])).contains("does not name a bitmap"));
    assert!(why(&disk.with(entry(0x82), &[0x81])).contains("twice"));
    assert!(why(&disk.with(entry(0x82) + 4, &[1, 2])).contains("up-case table is wrong"));
    assert!(why(&disk.with(heap, &[0])).contains("system file"));
    assert!(why(&disk.with(entry(0x81) + 24, &[1, 0])).contains("too short"));
}
