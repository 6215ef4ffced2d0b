//! NTFS, judged by ntfscat and ntfsinfo; and in every state that speaks against it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhdkit::guest::{Smallest, VolumeKind};
use vhdkit_testkit::foreign::{TOOL_TIMEOUT, assert_success, run, run_tool};
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;

const LAYOUTS: &[(&str, u64, u64, &[&str])] = &[
    ("NTFS with clusters of 4 KiB", 100, 4096, &[]),
    ("NTFS with clusters of 512 bytes", 20, 512, &["-c", "512"]),
    ("NTFS with clusters of 64 KiB", 300, 65536, &["-c", "65536"]),
    ("NTFS with sectors of 4 KiB", 60, 4096, &["-s", "4096"]),
    ("NTFS of 3 GiB", 3072, 4096, &[]),
];

fn needs() -> Needs {
    Needs::tools(&["mkntfs", "ntfscp", "ntfscat", "ntfsinfo"])
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, mib, cluster, arguments) in LAYOUTS {
        cases.push(Case::new(*name, needs(), move || layout(*mib, *cluster, arguments)));
    }
    cases.push(Case::new("NTFS: states that speak against it", needs(), states));
    let resized = Needs { tools: [needs().tools, vec!["ntfsresize".into(), "ntfsfix".into()]].concat(), ..needs() };
    cases.push(Case::new("NTFS: made smaller", resized, made_smaller));
    cases.push(Case::new("NTFS: hibernated", needs(), hibernated));
    cases.push(Case::new("NTFS: structures that disagree", needs(), disagreements));
    let root = Needs { tools: [needs().tools, vec!["ntfs-3g".into()]].concat(), ..Needs::default() };
    cases.push(Case::new("NTFS by ntfs-3g", root.and_root().and_file("/dev/fuse"), by_ntfs_3g));
    cases
}

/// A volume with the tree in it.
pub(crate) fn make(scratch: &Scratch, mib: u64, arguments: &[&str]) -> PathBuf {
    let path = scratch.file("image", mib * MIB);
    let mut all = vec!["-q", "-f", "-F", "-p", "0", "-H", "255", "-S", "63"];
    all.extend(arguments);
    all.push(text(&path));
    tool("mkntfs", &all);
    let tree = scratch.tree();
    for number in 0..FILES {
        let (from, to) = (tree.join("a").join(name(number)), format!("/{}", name(number)));
        tool("ntfscp", &["-q", text(&path), text(&from), &to]);
    }
    path
}

/// What the bitmap, as ntfscat reads it, says is free, in bytes.
pub(crate) fn truth(path: &Path) -> Vec<Range<u64>> {
    let info = run_tool("ntfsinfo", &["-m", text(path)]);
    assert_success(&info);
    let info = String::from_utf8_lossy(&info.stdout).into_owned();
    let value = |name: &str| -> u64 {
        let line = info.lines().find_map(|line| line.trim().strip_prefix(name)).expect(name);
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let (cluster, clusters) = (value("Cluster Size:"), value("Volume Size in Clusters:"));
    let bitmap = run(Command::new("ntfscat").arg(path).arg("$Bitmap"), TOOL_TIMEOUT).unwrap();
    assert_success(&bitmap);
    let is_free = |number: u64| bitmap.stdout[usize::try_from(number / 8).unwrap()] >> (number % 8) & 1 == 0;
    let free: Vec<u64> = (0..clusters).filter(|number| is_free(*number)).collect();
    assert_eq!(free.len() as u64, value("Free Clusters:"));
    joined(free.into_iter().map(|number| number * cluster..(number + 1) * cluster).collect())
}

fn layout(mib: u64, cluster: u64, arguments: &[&str]) {
    let scratch = Scratch::new();
    let path = make(&scratch, mib, arguments);
    let disk = open(&path);
    let volume = only(&disk);
    assert_eq!(volume.kind, VolumeKind::Ntfs, "{:?}", volume.state);
    let free = free_of(&disk, &volume);
    assert!(!free.is_empty(), "{:?}", volume.state);
    assert!(free.iter().all(|range| range.start % cluster == 0));
    assert_eq!(free, truth(&path));
    // The copy of the boot sector lies behind the last cluster.
    let end = mib * MIB;
    assert_eq!(look(&disk).smallest_safe_size(), Smallest::SafeAt { bytes: end, moves_backup_gpt: false });
}

/// ntfsresize leaves the copy of the boot sector where the size ends that was asked for, not where the last cluster does.
fn made_smaller() {
    for size in [60 * MIB, 60 * MIB + 512, 61_000_192] {
        let scratch = Scratch::new();
        let path = make(&scratch, 100, &[]);
        tool("ntfsresize", &["-ff", "-P", "-s", &size.to_string(), text(&path)]);
        // It marks the volume, so that Windows looks at it.
        tool("ntfsfix", &["-d", text(&path)]);
        let disk = open(&path);
        assert_eq!(free_of(&disk, &only(&disk)), truth(&path), "{size}");
        let smallest = look(&disk).smallest_safe_size();
        assert_eq!(smallest, Smallest::SafeAt { bytes: size, moves_backup_gpt: false });
    }
}

/// Where a record of the file table lies, on a volume with clusters of 4 KiB and records of 1 KiB.
fn record(disk: &Patched, number: u64) -> u64 {
    let cluster = u64::from_le_bytes(disk.bytes(0x30, 8).try_into().unwrap());
    cluster * 4096 + number * 1024
}

/// Where something lies in a record.
fn find(disk: &Patched, record: u64, what: &[u8]) -> u64 {
    let bytes = disk.bytes(record, 1024);
    record + bytes.windows(what.len()).position(|window| window == what).expect("it is there") as u64
}

/// Where the resident value of `$VOLUME_INFORMATION` lies.
fn volume_information(disk: &Patched) -> u64 {
    find(disk, record(disk, 3), &[0x70, 0, 0, 0, 0x28, 0, 0, 0]) + 0x18
}

/// Changes the record in the file table and in its mirror.
fn in_both(disk: &Patched, offset: u64, bytes: &[u8]) -> Patched {
    let mirror = u64::from_le_bytes(disk.bytes(0x38, 8).try_into().unwrap()) * 4096;
    let distance = offset - record(disk, 0);
    disk.with(offset, bytes).with(mirror + distance, bytes)
}

/// Where `$LogFile` begins.
fn log_file(disk: &Patched) -> u64 {
    // A journal as mkntfs leaves it is full of ones.
    let blank = vec![0xff; 65536];
    let cluster = (0..disk.size / 4096 - 16).find(|number| disk.bytes(number * 4096, 65536) == blank);
    cluster.unwrap() * 4096
}

/// A restart page: sequence, version, clients in use, flags.
fn restart_page(sequence: u8, major: u8, clients: [u8; 2], flags: u8) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..4].copy_from_slice(b"RSTR");
    page[4..8].copy_from_slice(&[0x1e, 0, 9, 0]);
    page[0x11] = 0x10; // pages of 4096 bytes
    page[0x15] = 0x10;
    page[0x18] = 0x30;
    page[0x1a] = 1;
    page[0x1c] = major;
    page[0x1e] = 5; // the stamp
    for sector in 0..8 {
        page[sector * 512 + 510] = 5;
    }
    page[0x30] = sequence;
    page[0x3c..0x3e].copy_from_slice(&clients);
    page[0x3e] = flags;
    page
}

fn states() {
    let scratch = Scratch::new();
    let disk = Patched::read(&make(&scratch, 20, &["-c", "4096"]));
    assert!(!free_of_all(&disk).is_empty());
    let flags = volume_information(&disk) + 10;
    assert!(why(&in_both(&disk, flags, &[1, 0])).contains("dirty"));
    assert!(why(&in_both(&disk, flags, &[2, 0])).contains("journal"));
    assert!(why(&in_both(&disk, flags, &[0, 0x40])).contains("chkdsk"));
    assert!(why(&in_both(&disk, flags, &[4, 0])).contains("flags that are not understood"));
    assert!(!free_of_all(&in_both(&disk, flags, &[0x80, 0x80])).is_empty());
    assert!(why(&in_both(&disk, flags - 2, &[3, 2])).contains("version 3.2"));
    assert!(why(&disk.with(flags, &[1, 0])).contains("mirror"));

    let log = log_file(&disk);
    let nobody = [0xff, 0xff];
    let two = |first: Vec<u8>, second: Vec<u8>| disk.with(log, &[first, second].concat());
    let used = || restart_page(2, 1, [0, 0], 0);
    let closed = || restart_page(1, 1, nobody, 0);
    let clean = |sequence| restart_page(sequence, 1, [0, 0], 2);
    assert!(why(&two(used(), used())).contains("replayed"));
    assert!(why(&two(closed(), used())).contains("replayed"), "the newer page counts");
    assert!(why(&two(used(), closed())).contains("replayed"), "the newer page counts");
    assert!(!free_of_all(&two(clean(3), used())).is_empty());
    assert!(!free_of_all(&two(closed(), closed())).is_empty());
    assert!(why(&two(restart_page(1, 2, nobody, 2), closed())).contains("fast startup"));
    assert!(why(&two(restart_page(1, 3, nobody, 2), closed())).contains("version 3.1"));
    let mut torn = closed();
    torn[1022] = 6;
    assert!(why(&two(torn, closed())).contains("not written together"));
    let mut checked = closed();
    checked[..4].copy_from_slice(b"CHKD");
    assert!(why(&two(checked, closed())).contains("chkdsk"));
    assert!(why(&disk.with(log, &vec![0; 8192])).contains("restart page"));

    // A catalogue of shadow copies.
    let guid = [0x6b, 0x87, 0x08, 0x38, 0x76, 0xc1, 0x48, 0x4e, 0xb7, 0xae, 0x04, 0x04, 0x6e, 0x6c, 0xc7, 0x52];
    let header = disk.with(0x1e00, &guid);
    assert!(!free_of_all(&header).is_empty());
    assert!(why(&header.with(0x1e00 + 48, &[0, 0, 1])).contains("shadow copies"));
}

/// A hibernation file: only what it begins with says whether Windows sleeps.
fn hibernated() {
    let scratch = Scratch::new();
    for (begin, asleep) in [(b"hibr", true), (b"HIBR", true), (b"RSTR", true), (b"wake", false), (&[0; 4], false)] {
        let path = make(&scratch, 20, &["-c", "4096"]);
        let mut content = vec![0; 9000];
        content[..4].copy_from_slice(begin);
        let file = scratch.join("hibernation");
        std::fs::write(&file, &content).unwrap();
        tool("ntfscp", &["-q", text(&path), text(&file), "/HiberFil.sys"]);
        let disk = open(&path);
        if asleep {
            assert!(why(&disk).contains("hibernated"));
        } else {
            assert_eq!(free_of_all(&disk), truth(&path));
        }
    }
}

fn disagreements() {
    let scratch = Scratch::new();
    let disk = Patched::read(&make(&scratch, 20, &["-c", "4096"]));
    // The number of sectors, in the boot sector alone.
    let sectors = disk.bytes(0x28, 1)[0];
    assert!(why(&disk.with(0x28, &[sectors ^ 8])).contains("copy behind its end"));
    // The stamp of a sector of the record of $Bitmap.
    let bitmap = record(&disk, 6);
    let stamp = disk.bytes(bitmap + 510, 1)[0];
    assert!(why(&disk.with(bitmap + 510, &[stamp ^ 1])).contains("not written together"));
    assert!(why(&disk.with(bitmap + 0x16, &[0])).contains("not in use"));
    // The first clusters, which are those of $Boot, marked as free.
    let runs = find(&disk, bitmap, &[0x80, 0, 0, 0]) + 0x40;
    let place = disk.bytes(runs, 5);
    assert_eq!((place[0], place[4]), (0x21, 0), "one run, whose place has two bytes");
    let cluster = u64::from(u16::from_le_bytes([place[2], place[3]])) * 4096;
    assert_eq!(disk.bytes(cluster, 1)[0] & 3, 3);
    assert!(why(&disk.with(cluster, &[0xfc])).contains("system file"));
    // A run that leads elsewhere, and one that is sparse.
    assert!(why(&disk.with(runs, &[0x11, 1, 0x7f, 0])).contains("system file"));
    assert!(why(&disk.with(runs, &[0x01, 1, 0])).contains("not stored plainly"));
    // A cluster of a file marked as free, of the system or not.
    let bits = disk.bytes(cluster, 4096);
    let used = (0..20 * 256 - 1_usize).rev().filter(|number| bits[number / 8] >> (number % 8) & 1 == 1);
    let files: Vec<usize> =
        used.filter(|number| disk.bytes(*number as u64 * 4096, 4).iter().any(|byte| *byte != 0)).collect();
    let mut caught = 0;
    for number in files.iter().take(60) {
        let byte = bits[number / 8] & !(1 << (number % 8));
        let reason = why(&disk.with(cluster + *number as u64 / 8, &[byte]));
        assert!(reason.contains("marked as free"), "{reason}");
        caught += usize::from(reason.contains("clusters of file"));
    }
    assert!(caught > 10, "{caught} of {files:?}");
    let mut cut = disk.clone();
    cut.size -= 512;
    assert!(why(&cut).contains("larger"));
}

fn by_ntfs_3g() {
    let scratch = Scratch::new();
    let path = scratch.file("image", 100 * MIB);
    tool("mkntfs", &["-q", "-f", "-F", text(&path)]);
    let point = scratch.join("mounted");
    mounted(&point, Command::new("ntfs-3g").arg(&path).arg(&point), |point| use_it(&scratch, point));
    // ntfs-3g is done some time after umount.
    gone(&format!("ntfs-3g {}", text(&path)));
    let free = free_of_all(&open(&path));
    assert!(free.len() > 3);
    assert_eq!(free, truth(&path));
}
