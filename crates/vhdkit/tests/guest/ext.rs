//! ext2, ext3 and ext4 in every layout, judged by dumpe2fs; and in every state that speaks against them.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdkit::guest::{Smallest, VolumeKind, VolumeState};
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;

/// A file system: name, MiB, kind, arguments of mke2fs.
const LAYOUTS: &[(&str, u64, VolumeKind, &[&str])] = &[
    ("ext4 with blocks of 4 KiB", 600, VolumeKind::Ext4, &["-t", "ext4", "-b", "4096"]),
    ("ext4 with blocks of 1 KiB", 60, VolumeKind::Ext4, &["-t", "ext4", "-b", "1024"]),
    ("ext4 with blocks of 2 KiB", 60, VolumeKind::Ext4, &["-t", "ext4", "-b", "2048"]),
    ("ext4 of many groups", 3000, VolumeKind::Ext4, &["-t", "ext4", "-b", "4096", "-N", "4096"]),
    ("ext4 without flex_bg", 200, VolumeKind::Ext4, &["-t", "ext4", "-b", "1024", "-O", "^flex_bg"]),
    ("ext4 without 64bit", 200, VolumeKind::Ext4, &["-t", "ext4", "-b", "1024", "-O", "^64bit"]),
    ("ext4 with bigalloc", 400, VolumeKind::Ext4, &["-t", "ext4", "-b", "4096", "-O", "bigalloc", "-C", "65536"]),
    ("ext4 with bigalloc, 1 KiB", 60, VolumeKind::Ext4, &["-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "8192"]),
    ("ext4 with meta_bg", 1200, VolumeKind::Ext4, &["-t", "ext4", "-b", "4096", "-O", "meta_bg,^resize_inode"]),
    (
        "ext4 with meta_bg, without flex_bg",
        300,
        VolumeKind::Ext4,
        &["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode,^flex_bg"],
    ),
    ("ext4 with sparse_super2", 600, VolumeKind::Ext4, &["-t", "ext4", "-b", "4096", "-O", "sparse_super2"]),
    (
        "ext4 without sparse_super",
        300,
        VolumeKind::Ext4,
        &["-t", "ext4", "-b", "1024", "-O", "^sparse_super,^resize_inode"],
    ),
    ("ext4 with uninit_bg", 300, VolumeKind::Ext4, &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"]),
    ("ext4 without checksums", 300, VolumeKind::Ext4, &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^uninit_bg"]),
    ("ext4 with mmp", 100, VolumeKind::Ext4, &["-t", "ext4", "-O", "mmp"]),
    ("ext4 with a seed for checksums", 100, VolumeKind::Ext4, &["-t", "ext4", "-O", "metadata_csum_seed"]),
    ("ext4 with quotas", 100, VolumeKind::Ext4, &["-t", "ext4", "-O", "quota,project"]),
    ("ext4 without a journal", 100, VolumeKind::Ext4, &["-t", "ext4", "-O", "^has_journal"]),
    ("ext3", 100, VolumeKind::Ext3, &["-t", "ext3"]),
    ("ext2", 100, VolumeKind::Ext2, &["-t", "ext2", "-b", "1024"]),
    ("ext2 with blocks of 4 KiB", 300, VolumeKind::Ext2, &["-t", "ext2", "-b", "4096"]),
];

pub(crate) fn cases() -> Vec<Case> {
    let needs = || Needs::tools(&["mke2fs", "debugfs", "dumpe2fs"]);
    let mut cases = Vec::new();
    for (name, mib, kind, arguments) in LAYOUTS {
        cases.push(Case::new(*name, needs(), move || layout(*mib, *kind, arguments)));
    }
    cases.push(Case::new("ext: states that speak against it", needs(), states));
    cases.push(Case::new("ext: features that are not understood", needs(), unknown_features));
    cases.push(Case::new("ext: checksums", needs(), checksums));
    cases.push(Case::new("ext: counts that disagree", needs(), counts));
    cases.push(Case::new("ext: larger than its partition", needs(), larger));
    cases.push(Case::new("ext4 of 1 TiB: only metadata is read", needs(), metadata_only));
    let root = || needs().and_root().and_file("/dev/loop-control");
    cases.push(Case::new("ext4 by the kernel", root(), || by_the_kernel("ext4")));
    cases.push(Case::new("ext2 by the kernel", root(), || by_the_kernel("ext2")));
    cases
}

/// A file system with the tree in it, half of it deleted.
pub(crate) fn make(scratch: &Scratch, mib: u64, arguments: &[&str]) -> PathBuf {
    let path = scratch.file("image", mib * MIB);
    let tree = scratch.tree();
    let mut all = vec!["-q", "-F", "-d", text(&tree)];
    all.extend(arguments);
    all.push(text(&path));
    tool("mke2fs", &all);
    let mut script = String::new();
    for file in deleted() {
        writeln!(script, "rm {file}").unwrap();
    }
    debugfs(scratch, &path, &script);
    path
}

fn debugfs(scratch: &Scratch, path: &Path, script: &str) {
    let file = scratch.join("script");
    std::fs::write(&file, script).unwrap();
    tool("debugfs", &["-w", "-f", text(&file), text(path)]);
}

/// What dumpe2fs says is free, in bytes.
pub(crate) fn truth(path: &Path) -> Vec<Range<u64>> {
    let said = tool("dumpe2fs", &[text(path)]);
    let value = |name: &str| -> Option<u64> {
        said.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().parse().unwrap())
    };
    let block = value("Block size:").unwrap();
    let blocks = value("Block count:").unwrap();
    let cluster = value("Cluster size:").map_or(1, |size| size / block);
    let mut all = Vec::new();
    for list in said.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for range in list.split(", ").filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
            // With bigalloc the first block of each cluster is named.
            all.push(first * block..(last + cluster).min(blocks) * block);
        }
    }
    joined(all)
}

fn layout(mib: u64, kind: VolumeKind, arguments: &[&str]) {
    let scratch = Scratch::new();
    let path = make(&scratch, mib, arguments);
    let disk = open(&path);
    let volume = only(&disk);
    assert_eq!(volume.kind, kind, "{:?}", volume.state);
    let free = free_of(&disk, &volume);
    assert!(free.len() > 3, "{free:?}, {:?}", volume.state);
    assert_eq!(free, truth(&path));
    let VolumeState::Readable { size_bytes, .. } = volume.state else { panic!("{:?}", volume.state) };
    let smallest = look(&disk).smallest_safe_size();
    assert_eq!(smallest, Smallest::SafeAt { bytes: size_bytes, moves_backup_gpt: false });
}

/// A file system of ext3 without checksums, whose superblock may be patched.
fn plain(scratch: &Scratch) -> Patched {
    Patched::read(&make(scratch, 40, &["-t", "ext3", "-b", "1024"]))
}

const SUPER: u64 = 1024;

fn states() {
    let scratch = Scratch::new();
    let disk = plain(&scratch);
    assert!(!free_of_all(&disk).is_empty());
    let word = |offset: u64, value: u32| disk.with(SUPER + offset, &value.to_le_bytes());
    let incompatible = u32::from_le_bytes(disk.bytes(SUPER + 0x60, 4).try_into().unwrap());
    assert!(why(&word(0x60, incompatible | 4)).contains("replayed"));
    assert!(why(&word(0x60, incompatible | 8)).contains("journal of another"));
    assert!(why(&disk.with(SUPER + 0x3a, &[0])).contains("unmounted"));
    assert!(why(&disk.with(SUPER + 0x3a, &[3])).contains("errors"));
    assert!(why(&word(0x194, 1)).contains("errors"));
    assert!(why(&word(0xe8, 12)).contains("orphans"));
    assert!(why(&word(0xe0, 0)).contains("another device"));
    // The journal's own superblock says where the log begins.
    let journal = (0..disk.size / 1024).find(|block| disk.bytes(block * 1024, 4) == [0xc0, 0x3b, 0x39, 0x98]).unwrap();
    assert!(why(&disk.with(journal * 1024 + 28, &[0, 0, 0, 1])).contains("not in place"));
    assert!(why(&disk.with(journal * 1024, &[0])).contains("magic"));
    // Multiple mount protection: somebody holds it.
    let path = make(&scratch, 40, &["-t", "ext4", "-O", "mmp,^metadata_csum"]);
    let disk = Patched::read(&path);
    assert!(!free_of_all(&disk).is_empty());
    let block = u64::from_le_bytes(disk.bytes(SUPER + 0x168, 8).try_into().unwrap());
    assert!(why(&disk.with(block * 1024 + 4, &[7, 0, 0, 0])).contains("multiple mount"));
    let held = make(&scratch, 40, &["-t", "ext4"]);
    debugfs(&scratch, &held, "feature needs_recovery\n");
    assert!(why(&open(&held)).contains("replayed"));
}

fn unknown_features() {
    let scratch = Scratch::new();
    let disk = plain(&scratch);
    for (offset, name, known) in
        [(0x5c, "compatible", 0x1e3f_u32), (0x60, "incompatible", 0x3_e7d2), (0x64, "read-only", 0xb77b)]
    {
        let now = u32::from_le_bytes(disk.bytes(SUPER + offset, 4).try_into().unwrap());
        for bit in (0..32).filter(|bit| known >> bit & 1 == 0) {
            let reason = why(&disk.with(SUPER + offset, &(now | 1 << bit).to_le_bytes()));
            let named = reason.contains("features that are not understood") && reason.contains(name);
            // Some have a sentence of their own.
            let own = ["replayed", "journal of another", "orphans", "two kinds"].iter().any(|own| reason.contains(own));
            assert!(named || own, "bit {bit} of {name}: {reason}");
        }
    }
}

fn checksums() {
    let scratch = Scratch::new();
    for (arguments, sums) in [
        (&["-t", "ext4", "-b", "1024"][..], true),
        (&["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"][..], false),
    ] {
        let path = make(&scratch, 40, arguments);
        let disk = Patched::read(&path);
        let free = free_of_all(&disk);
        assert!(!free.is_empty());
        if sums {
            // The label: it matters to nobody but the checksum.
            assert!(why(&disk.with(SUPER + 0x78, b"x")).contains("checksum of its superblock"));
        }
        // Unused inodes of the first descriptor; then a bit of its bitmap that is free, and one that is used.
        let reason = why(&disk.with(2 * 1024 + 0x1c, &[0xff]));
        assert!(reason.contains("checksum of group 0"), "{reason}");
        let bitmap = u64::from(u32::from_le_bytes(disk.bytes(2 * 1024, 4).try_into().unwrap())) * 1024;
        let byte = disk.bytes(bitmap, 1)[0];
        let reason = why(&disk.with(bitmap, &[byte ^ 1]));
        assert!(reason.contains(if sums { "bitmap of group 0" } else { "metadata is marked as free" }), "{reason}");
    }
}

fn counts() {
    let scratch = Scratch::new();
    let disk = plain(&scratch);
    let now = u32::from_le_bytes(disk.bytes(SUPER + 0xc, 4).try_into().unwrap());
    assert!(why(&disk.with(SUPER + 0xc, &(now - 1).to_le_bytes())).contains("superblock says"));
    let group = disk.bytes(2 * 1024 + 0xc, 1)[0];
    assert!(why(&disk.with(2 * 1024 + 0xc, &[group ^ 1])).contains("descriptor says"));
    // Metadata marked as free, in a bitmap whose counts agree: the inode bitmap, for a block that is free.
    let bitmap = u64::from(u32::from_le_bytes(disk.bytes(2 * 1024, 4).try_into().unwrap())) * 1024;
    let inodes = u32::from_le_bytes(disk.bytes(2 * 1024 + 4, 4).try_into().unwrap()) - 1;
    let bits = disk.bytes(bitmap, 1024);
    let free = (0..8192).find(|bit| bits[bit / 8] >> (bit % 8) & 1 == 0).unwrap();
    let metadata = usize::try_from(inodes).unwrap();
    let mut changed = bits;
    changed[free / 8] |= 1 << (free % 8);
    changed[metadata / 8] &= !(1 << (metadata % 8));
    assert!(why(&disk.with(bitmap, &changed)).contains("metadata is marked as free"));
}

fn larger() {
    let scratch = Scratch::new();
    let mut disk = plain(&scratch);
    disk.size -= 1024;
    assert!(why(&disk).contains("larger than what it lies in"));
    let disk = Patched { size: disk.size + 10 * MIB, ..disk };
    assert!(!free_of_all(&disk).is_empty());
}

/// Filled by the kernel; while it is mounted it is left alone.
fn by_the_kernel(kind: &str) {
    let scratch = Scratch::new();
    let path = scratch.file("image", 700 * MIB);
    tool("mke2fs", &["-q", "-F", "-t", kind, "-b", "4096", text(&path)]);
    let point = scratch.join("mounted");
    let copy = scratch.join("copy");
    mounted(&point, Command::new("mount").args(["-o", "loop"]).arg(&path).arg(&point), |point| {
        use_it(&scratch, point);
        tool("sync", &["-f", text(point)]);
        tool("cp", &["--sparse=always", text(&path), text(&copy)]);
    });
    let reason = why(&open(&copy));
    assert!(reason.contains("unmounted") || reason.contains("replayed"), "{reason}");
    let disk = open(&path);
    let free = free_of_all(&disk);
    assert!(free.len() > 3);
    assert_eq!(free, truth(&path));
}

/// What is read of a large disk goes with its metadata, in few reads.
fn metadata_only() {
    let scratch = Scratch::new();
    let path = make(&scratch, 1 << 20, &["-t", "ext4", "-b", "4096"]);
    let disk = Counted::new(&path);
    let survey = look(&disk);
    assert!(matches!(survey.volumes[0].state, VolumeState::Readable { .. }), "{:?}", survey.volumes[0].state);
    let (reads, bytes) = disk.counts();
    // 8192 groups: descriptors of 512 KiB, few bitmaps; 1.5 MiB for signatures.
    assert!(reads < 700 && bytes < 5 * MIB, "{reads} reads of {bytes} bytes");
    let free = free_of(&disk, &survey.volumes[0]);
    let (more, _) = disk.counts();
    assert!(more < 2 * reads, "{more} reads");
    assert_eq!(free, truth(&path));
}
