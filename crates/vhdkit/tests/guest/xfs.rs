//! XFS of both versions, judged by xfs_db; and in every state that speaks against it.
#![allow(clippy::big_endian_bytes, reason = "XFS is big-endian")]

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdkit::guest::{VolumeKind, VolumeState};
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;

const LAYOUTS: &[(&str, u64, &[&str])] = &[
    ("XFS version 5", 320, &[]),
    ("XFS version 5 with reverse mappings", 320, &["-m", "rmapbt=1"]),
    ("XFS version 5 without anything", 320, &["-m", "reflink=0,finobt=0"]),
    ("XFS version 5 with blocks of 1 KiB", 320, &["-b", "size=1024"]),
    ("XFS version 5 with sectors of 4 KiB", 320, &["-s", "size=4096"]),
    ("XFS version 5 of 16 groups", 2048, &["-d", "agcount=16"]),
    ("XFS version 4", 320, &["-m", "crc=0"]),
    ("XFS version 4 with eager counters", 320, &["-m", "crc=0", "-l", "lazy-count=0"]),
    ("XFS version 4 with blocks of 512 bytes", 320, &["-m", "crc=0", "-b", "size=512"]),
];

fn needs() -> Needs {
    Needs::tools(&["mkfs.xfs", "xfs_db"])
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, mib, arguments) in LAYOUTS {
        cases.push(Case::new(*name, needs(), move || layout(*mib, arguments)));
    }
    cases.push(Case::new("XFS: states that speak against it", needs(), states));
    cases.push(Case::new("XFS: checksums and counts", needs(), sums));
    let root = || needs().and_root().and_file("/dev/loop-control");
    let with_log = Needs::tools(&["mkfs.xfs", "xfs_db", "xfs_logprint"]).and_root().and_file("/dev/loop-control");
    cases.push(Case::new("XFS by the kernel", root(), || by_the_kernel(&[], true)));
    cases.push(Case::new("XFS by the kernel, with reverse mappings", root(), || {
        by_the_kernel(&["-m", "rmapbt=1"], false)
    }));
    cases.push(Case::new("XFS by the kernel, until its log has been round", with_log, round_the_log));
    cases
}

/// A file system with the tree in it, by a protofile.
pub(crate) fn make(scratch: &Scratch, mib: u64, arguments: &[&str]) -> PathBuf {
    let path = scratch.file("image", mib * MIB);
    let tree = scratch.tree();
    let mut proto = String::from("/\n0 0\nd--755 0 0\n");
    for folder in ["a", "b"] {
        writeln!(proto, "{folder} d--755 0 0").unwrap();
        for number in 0..FILES {
            writeln!(proto, "{0} ---644 0 0 {1}", name(number), text(&tree.join(folder).join(name(number)))).unwrap();
        }
        writeln!(proto, "$").unwrap();
    }
    writeln!(proto, "$").unwrap();
    let file = scratch.join("proto");
    std::fs::write(&file, proto).unwrap();
    let mut all = vec!["-q", "-f", "-p", text(&file)];
    all.extend(arguments);
    all.push(text(&path));
    tool("mkfs.xfs", &all);
    path
}

/// What xfs_db says is free, in bytes.
pub(crate) fn truth(path: &Path) -> Vec<Range<u64>> {
    let value = |name: &str| -> u64 {
        let said = tool("xfs_db", &["-r", "-c", "sb 0", "-c", &format!("print {name}"), text(path)]);
        said.trim().rsplit(' ').next().unwrap().parse().unwrap()
    };
    let (block, group) = (value("blocksize"), value("agblocks"));
    let said = tool("xfs_db", &["-r", "-c", "freesp -d", text(path)]);
    let rows = said.lines().skip(1).take_while(|line| !line.contains("from"));
    let ranges = rows.map(|line| {
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let start = numbers[0] * group + numbers[1];
        start * block..(start + numbers[2]) * block
    });
    // xfs_db also lists the blocks that are kept for the trees: those of the AGFL.
    let mut kept = Vec::new();
    for number in 0..value("agcount") {
        let list = tool(
            "xfs_db",
            &[
                "-r",
                "-c",
                &format!("agf {number}"),
                "-c",
                "print flfirst fllast flcount",
                "-c",
                &format!("agfl {number}"),
                "-c",
                "print bno",
                text(path),
            ],
        );
        let field = |name: &str| -> usize {
            list.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse().unwrap()
        };
        let (first, last, count) = (field("flfirst ="), field("fllast ="), field("flcount ="));
        let places: std::collections::BTreeMap<usize, u64> = list
            .lines()
            .last()
            .unwrap()
            .split_whitespace()
            .filter_map(|word| word.split_once(':'))
            .filter_map(|(index, place)| Some((index.parse().ok()?, place.parse().ok()?)))
            .collect();
        for index in (first..=last).take(count) {
            let start = number * group + places[&index];
            kept.push(start * block..(start + 1) * block);
        }
    }
    outside(&joined(ranges.collect()), &joined(kept))
}

fn layout(mib: u64, arguments: &[&str]) {
    let scratch = Scratch::new();
    let path = make(&scratch, mib, arguments);
    check(&path);
}

fn check(path: &Path) {
    let disk = open(path);
    let volume = only(&disk);
    assert_eq!(volume.kind, VolumeKind::Xfs);
    assert!(matches!(volume.state, VolumeState::Readable { .. }), "{:?}", volume.state);
    let free = free_of(&disk, &volume);
    assert!(!free.is_empty());
    assert_eq!(free, truth(path));
}

fn by_the_kernel(arguments: &[&str], copied: bool) {
    let scratch = Scratch::new();
    let path = scratch.file("image", 400 * MIB);
    tool("mkfs.xfs", &[&["-q", "-f"], arguments, &[text(&path)]].concat());
    let point = scratch.join("mounted");
    let copy = scratch.join("copy");
    mounted(&point, Command::new("mount").args(["-o", "loop"]).arg(&path).arg(&point), |point| {
        use_it(&scratch, point);
        tool("sync", &["-f", text(point)]);
        if copied {
            tool("cp", &["--sparse=always", text(&path), text(&copy)]);
        }
    });
    if copied {
        assert!(why(&open(&copy)).contains("replayed"), "{}", why(&open(&copy)));
    }
    check(&path);
}

/// Times that a file system is mounted until its log has been round.
const SESSIONS_MAX: usize = 30;

/// A log that has been written to its end more than once: the cycles in it fall somewhere in the middle.
fn round_the_log() {
    let scratch = Scratch::new();
    let path = scratch.file("image", 400 * MIB);
    tool("mkfs.xfs", &["-q", "-f", "--unsupported", "-l", "size=6m", text(&path)]);
    let point = scratch.join("mounted");
    let mut cycle = 1;
    for _ in 0..SESSIONS_MAX {
        mounted(&point, Command::new("mount").args(["-o", "loop"]).arg(&path).arg(&point), |point| {
            for round in 0..4 {
                let file = |number: u32| point.join(format!("{number}-{}", "x".repeat(200)));
                (0..1000).for_each(|number| std::fs::write(file(number), [round]).unwrap());
                tool("sync", &["-f", text(point)]);
                (0..1000).for_each(|number| std::fs::remove_file(file(number)).unwrap());
                tool("sync", &["-f", text(point)]);
            }
        });
        check(&path);
        let said = tool_says("xfs_logprint", &["-t", text(&path)]);
        assert!(said.contains("<CLEAN>"), "{said}");
        let disk = Patched::read(&path);
        let log = log_offset(&disk);
        let first = word(&disk, log, 4);
        cycle = if first == 0xfeed_babe { word(&disk, log + 4, 4) } else { first };
        if cycle > 2 {
            return;
        }
    }
    panic!("the log has not been round twice: {cycle}");
}

fn word(disk: &Patched, offset: u64, count: usize) -> u64 {
    disk.bytes(offset, count).iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Where the log of a file system begins.
fn log_offset(disk: &Patched) -> u64 {
    let (block, group, shift) = (word(disk, 4, 4), word(disk, 84, 4), disk.bytes(124, 1)[0]);
    let start = word(disk, 48, 8);
    ((start >> shift) * group + (start & ((1 << shift) - 1))) * block
}

fn states() {
    let scratch = Scratch::new();
    let disk = Patched::read(&make(&scratch, 320, &["-m", "crc=0"]));
    assert!(!free_of_all(&disk).is_empty());
    assert!(why(&disk.with(126, &[1])).contains("not been made"));
    assert!(why(&disk.with(23, &[1])).contains("real-time"));
    assert!(why(&disk.with(48, &[0; 8])).contains("another device"));
    assert!(why(&disk.with(101, &[0xb3])).contains("version"));
    let bits = word(&disk, 100, 2);
    assert!(why(&disk.with(100, &[disk.bytes(100, 1)[0] | 2])).contains("shared"), "{bits:x}");
    for bit in [2, 4, 5, 6, 10, 11, 31_u32] {
        let changed = u32::try_from(word(&disk, 200, 4)).unwrap() | 1 << bit;
        assert!(why(&disk.with(200, &changed.to_be_bytes())).contains("not understood"), "{bit}");
    }
    // The log: the newest record is no unmount; it is of another file system; it was never written.
    let log = log_offset(&disk);
    assert_eq!(word(&disk, log, 4), 0xfeed_babe);
    assert!(why(&disk.with(log + 512 + 9, &[0])).contains("replayed"));
    assert!(why(&disk.with(log + 43, &[2])).contains("replayed"));
    assert!(why(&disk.with(log + 304, &[disk.bytes(log + 304, 1)[0] ^ 1])).contains("another file system"));
    assert!(why(&disk.with(log, &[0; 512])).contains("never written"));
    // Another record behind it, and a sector of a later cycle that was written out of order.
    let record = disk.bytes(log, 512);
    let data = disk.bytes(log + 512, 512);
    let mut more = record.clone();
    more[43] = 9;
    let behind = disk.with(log + 1024, &[more, data].concat());
    assert!(why(&behind).contains("replayed"), "{}", why(&behind));
    let odd = why(&disk.with(log + 40 * 512, &[0, 0, 0, 1]));
    assert!(odd.contains("log"), "{odd}");

    let disk = Patched::read(&make(&scratch, 320, &[]));
    for (offset, name) in [(208, "compatible"), (212, "read-only"), (216, "incompatible"), (220, "log")] {
        let changed = u32::try_from(word(&disk, offset, 4)).unwrap() | 1 << 20;
        let reason = why(&xfs_sum(&disk.with(offset, &changed.to_be_bytes()), 0, 512, 224));
        assert!(reason.contains(name) && reason.contains("not understood"), "{reason}");
    }
    let changed = u32::try_from(word(&disk, 216, 4)).unwrap() | 0x10;
    assert!(why(&disk.with(216, &changed.to_be_bytes())).contains("xfs_repair"));
    let mut cut = disk.clone();
    cut.size -= 4096;
    assert!(why(&cut).contains("larger"));
}

/// Puts the checksum of a structure right.
fn xfs_sum(disk: &Patched, offset: u64, length: usize, field: usize) -> Patched {
    let mut bytes = disk.bytes(offset, length);
    bytes[field..field + 4].fill(0);
    let sum = bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    });
    disk.with(offset + field as u64, &(!sum).to_le_bytes())
}

fn sums() {
    let scratch = Scratch::new();
    let disk = Patched::read(&make(&scratch, 320, &[]));
    let free = free_of_all(&disk);
    let (block, group) = (word(&disk, 4, 4), word(&disk, 84, 4));
    assert!(why(&disk.with(108, b"x")).contains("checksum of its superblock"));
    assert_eq!(free_of_all(&xfs_sum(&disk.with(108, b"x"), 0, 512, 224)), free);
    // AGF, AGFL, and the root of the tree, in the second group.
    let second = group * block;
    assert!(why(&disk.with(second + 512 + 100, &[1])).contains("header of allocation group 1"));
    assert!(why(&disk.with(second + 3 * 512 + 100, &[1])).contains("list of kept blocks"));
    let root = second + word(&disk, second + 512 + 16, 4) * block;
    assert!(why(&disk.with(root + 4000, &[1])).contains("tree of free space"));
    // A record that is longer by one, with a checksum that is right.
    let last = root + 56 + 8 * (word(&disk, root + 6, 2) - 1);
    let count = u32::try_from(word(&disk, last + 4, 4)).unwrap();
    let shorter = xfs_sum(&disk.with(last + 4, &(count - 1).to_be_bytes()), root, 4096, 52);
    assert!(why(&shorter).contains("add up"), "{}", why(&shorter));
    let longer = xfs_sum(&disk.with(last + 4, &(count + 1).to_be_bytes()), root, 4096, 52);
    assert!(matches!(only(&longer).state, VolumeState::LeftAlone { .. }));
    // The count of the superblock.
    let blocks = word(&disk, 144, 8) - 1;
    assert!(why(&xfs_sum(&disk.with(144, &blocks.to_be_bytes()), 0, 512, 224)).contains("superblock says"));
}
