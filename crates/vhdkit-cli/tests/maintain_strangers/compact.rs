//! Compacting: the files of the guest are the same bit for bit, and what is left is exactly what holds a used cluster.
//!
//! What is free is counted by dumpe2fs, xfs_db, ntfsinfo with ntfscat, and dump.exfat and fsck.fat beside plain readings of the tables.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vhdkit_testkit::foreign::sha256_file;
use vhdkit_testkit::harness::{Case, Needs};

use crate::common::{MIB, Scratch};
use crate::disks::{EXT4, Kind, NTFS, XFS, copy, gone, text, tool, tree, used};
use crate::truth::free;
use crate::vhdx::{
    blocks_with_space, check, first_difference, overhead, raw, same_disk, write_difference, zero_blocks,
};

/// What a file may have besides payload and BAT.
const OVERHEAD_MAX: u64 = 8 * MIB;

/// Name, file system, MiB, MiB of its largest file that is deleted, block size of the image.
const WHOLE: &[(&str, Kind, u64, u64, &str)] = &[
    ("ext4, blocks of 1 MiB", EXT4, 96, 12, "1M"),
    ("ext4, blocks of 32 MiB", EXT4, 400, 180, "32M"),
    (
        "ext4 with 1 KiB and flex_bg off, blocks of 2 MiB",
        Kind::Ext(&["-t", "ext4", "-b", "1024", "-O", "^flex_bg"]),
        96,
        12,
        "2M",
    ),
    ("ext4 with bigalloc, blocks of 1 MiB", Kind::Ext(&["-t", "ext4", "-O", "bigalloc", "-C", "65536"]), 200, 12, "1M"),
    ("ext4 with meta_bg, blocks of 1 MiB", Kind::Ext(&["-t", "ext4", "-O", "meta_bg,^resize_inode"]), 200, 12, "1M"),
    (
        "ext4 with uninit_bg, blocks of 1 MiB",
        Kind::Ext(&["-t", "ext4", "-O", "^metadata_csum,uninit_bg"]),
        96,
        12,
        "1M",
    ),
    ("ext2, blocks of 1 MiB", Kind::Ext(&["-t", "ext2", "-b", "1024"]), 96, 12, "1M"),
    ("XFS, blocks of 2 MiB", XFS, 320, 12, "2M"),
    ("XFS, blocks of 32 MiB", XFS, 320, 130, "32M"),
    ("XFS with reverse mappings, blocks of 1 MiB", Kind::Xfs(&["-m", "rmapbt=1"]), 320, 12, "1M"),
    ("NTFS, blocks of 1 MiB", NTFS, 96, 12, "1M"),
    ("NTFS with clusters of 64 KiB, blocks of 2 MiB", Kind::Ntfs(&["-c", "65536"]), 128, 12, "2M"),
    ("FAT32, blocks of 1 MiB", Kind::Fat32, 96, 12, "1M"),
    ("exFAT, blocks of 1 MiB", Kind::ExFat, 96, 12, "1M"),
    ("exFAT, blocks of 2 MiB", Kind::ExFat, 128, 12, "2M"),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, kind, mib, large, block) in WHOLE.iter().copied() {
        let run = move || whole(kind, mib, large, block);
        cases.push(Case::new(format!("compact: {name}"), kind.needs(&["qemu-img"]), run));
    }
    for (name, kind, mib, block) in
        [("ext4", EXT4, 96, "1M"), ("XFS", XFS, 320, "2M"), ("NTFS", NTFS, 96, "1M"), ("FAT32", Kind::Fat32, 96, "2M")]
    {
        cases.push(Case::new(format!("compact: {name} in a child"), kind.needs(&[]), move || child(kind, mib, block)));
    }
    cases.push(Case::new("compact: children that would break", EXT4.needs(&[]), children_that_would_break));
    cases.push(Case::new("compact: GPT with five file systems", all_needs("sgdisk"), gpt));
    cases.push(Case::new("compact: MBR with three file systems", all_needs("parted"), mbr));
    cases
}

fn all_needs(table: &str) -> Needs {
    let kinds = [EXT4, XFS, NTFS, Kind::Fat32, Kind::ExFat];
    let tools: Vec<&str> = kinds.iter().flat_map(|kind| kind.tools()).copied().chain([table, "qemu-img"]).collect();
    Needs::tools(&tools).and_root().and_file("/dev/fuse").and_file("/dev/loop-control")
}

/// A file system on a disk: where, and the raw file that it was copied from.
struct Part {
    kind: Kind,
    start: u64,
    file: PathBuf,
}

fn bytes_of(block: &str) -> u64 {
    block.trim_end_matches('M').parse::<u64>().unwrap() * MIB
}

/// The blocks that lie wholly in a free range of one file system.
fn free_blocks(parts: &[Part], block: u64) -> BTreeSet<u64> {
    let mut blocks = BTreeSet::new();
    for part in parts {
        let ranges = free(part.kind, &part.file);
        let moved = ranges.into_iter().map(|range| range.start + part.start..range.end + part.start);
        for Range { start, end } in moved {
            blocks.extend(start.div_ceil(block)..end / block);
        }
    }
    blocks
}

/// Each file system is in order and has the files that it had.
fn judge_files(scratch: &Scratch, parts: &[Part], disk: &Path) {
    for part in parts {
        let length = part.file.metadata().unwrap().len();
        let now = tempfile::tempdir_in(scratch.path()).unwrap().keep().join("part");
        copy((disk, part.start), (&now, 0), length);
        part.kind.check(&now);
        part.kind.same_files(scratch, &part.file, &now);
        std::fs::remove_file(now).unwrap();
    }
}

/// An image of the raw disk, compacted and judged.
fn compacted(scratch: &Scratch, disk: &Path, parts: &[Part], block_text: &str) {
    let block = bytes_of(block_text);
    let image = scratch.join("disk.vhdx");
    scratch.run(&["convert", "-q", text(disk), text(&image), "--from", "raw", "--block-size", block_text]).expect(0);
    let size = disk.metadata().unwrap().len();
    let (free, zero) = (free_blocks(parts, block), zero_blocks(disk, block));
    let before = blocks_with_space(&image, size, block);
    let left: BTreeSet<u64> =
        before.iter().filter(|index| !free.contains(index) && !zero.contains(index)).copied().collect();
    assert!(left.len() < before.len(), "nothing is to be gained: {} blocks", before.len());
    let sum = sha256_file(&image).unwrap();
    let plan = scratch.run(&["compact", "--dry-run", "--json", text(&image)]).expect(0).json();
    assert_eq!(sha256_file(&image).unwrap(), sum, "a dry run changes nothing");
    let done = scratch.run(&["compact", "--json", text(&image)]).expect(0).json();
    check(scratch, &image);
    for field in ["zero_blocks", "free_blocks", "remarks", "blocks"] {
        assert_eq!(plan[field], done[field], "{field}");
    }
    // Exactly what holds a used cluster and anything but zeros.
    assert_eq!(blocks_with_space(&image, size, block), left, "{}", done["remarks"]);
    assert_eq!(done["new_file_size"], image.metadata().unwrap().len());
    let over = overhead(&image, left.len() as u64 * block);
    assert!(over <= OVERHEAD_MAX, "{over} bytes more than payload and BAT");
    let after = raw(scratch, &image);
    same_disk(&image, &after);
    assert_eq!(first_difference(disk, &after, block, |index| free.contains(&index)), None);
    judge_files(scratch, parts, &after);
    // There is nothing left to do.
    let again = scratch.run(&["compact", "--json", text(&image)]).expect(0).json();
    assert_eq!((&again["free_blocks"], &again["zero_blocks"], &again["moved"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!(again["old_file_size"], again["new_file_size"]);
}

fn whole(kind: Kind, mib: u64, large: u64, block: &str) {
    let scratch = Scratch::new();
    let file = used(&scratch, "before", kind, mib, large);
    compacted(&scratch, &file.clone(), &[Part { kind, start: 0, file }], block);
}

/// File systems one behind the other, each where its partition is to be; from 1 MiB on, with 1 MiB between.
fn parts(scratch: &Scratch, kinds: &[(Kind, u64)]) -> (Vec<Part>, u64) {
    let mut start = MIB;
    let mut parts = Vec::new();
    for (number, (kind, mib)) in kinds.iter().enumerate() {
        let file = used(scratch, &format!("part{number}"), *kind, *mib, 10);
        parts.push(Part { kind: *kind, start, file });
        start += (mib + 1) * MIB;
    }
    (parts, start + MIB)
}

/// The raw disk with the parts in their places, and noise between them.
fn assembled(scratch: &Scratch, parts: &[Part], size: u64, table: impl FnOnce(&Path)) -> PathBuf {
    let disk = scratch.join("disk.raw");
    File::create(&disk).unwrap().set_len(size).unwrap();
    let noise = scratch.write("noise", &vhdkit_testkit::Rng::new(3).bytes(MIB as usize));
    for part in parts {
        let length = part.file.metadata().unwrap().len();
        copy((&part.file, 0), (&disk, part.start), length);
        copy((&noise, 0), (&disk, part.start + length), MIB);
    }
    table(&disk);
    disk
}

fn gpt() {
    let scratch = Scratch::new();
    let kinds = [(EXT4, 64), (NTFS, 64), (Kind::Fat32, 64), (Kind::ExFat, 64), (XFS, 300)];
    let (parts, size) = parts(&scratch, &kinds);
    let disk = assembled(&scratch, &parts, size, |disk| {
        for (number, part) in parts.iter().enumerate() {
            let (first, sectors) = (part.start / 512, part.file.metadata().unwrap().len() / 512);
            let place = format!("{}:{first}:{}", number + 1, first + sectors - 1);
            tool("sgdisk", &["-n", &place, text(disk)]);
        }
        tool("sgdisk", &["-v", text(disk)]);
    });
    compacted(&scratch, &disk, &parts, "1M");
    let after = raw(&scratch, &scratch.join("disk.vhdx"));
    let said = tool("sgdisk", &["-v", text(&after)]);
    assert!(said.contains("No problems found"), "{said}");
}

fn mbr() {
    let scratch = Scratch::new();
    let (parts, size) = parts(&scratch, &[(EXT4, 80), (NTFS, 64), (Kind::Fat32, 64)]);
    let disk = assembled(&scratch, &parts, size, |disk| {
        tool("parted", &["-s", text(disk), "mklabel", "msdos"]);
        for part in &parts {
            let (first, sectors) = (part.start / 512, part.file.metadata().unwrap().len() / 512);
            let (start, end) = (format!("{first}s"), format!("{}s", first + sectors - 1));
            let kind = match part.kind {
                Kind::Ntfs(_) => "ntfs",
                Kind::Fat32 => "fat32",
                _ => "ext4",
            };
            tool("parted", &["-s", text(disk), "mkpart", "primary", kind, &start, &end]);
        }
    });
    compacted(&scratch, &disk, &parts, "2M");
}

/// Free blocks of a parent are dropped only on request; the zeros go in any case.
fn children_that_would_break() {
    let scratch = Scratch::new();
    let file = used(&scratch, "file", EXT4, 64, 12);
    let (image, child) = (scratch.join("disk.vhdx"), scratch.join("child.avhdx"));
    scratch.run(&["convert", "-q", text(&file), text(&image), "--from", "raw", "--block-size", "1M"]).expect(0);
    scratch.run(&["create", "-q", text(&child), "--parent", text(&image)]).expect(0);
    let sum = sha256_file(&image).unwrap();
    for more in [&[][..], &["--dry-run"]] {
        let run = scratch.run(&[&["compact", text(&image)], more].concat()).expect(6);
        assert!(run.err.contains("child.avhdx") && run.err.contains("--no-filesystems"), "{}", run.err);
        // A dry run prints the plan all the same.
        assert_eq!(run.out.contains("nothing was changed"), more == ["--dry-run"], "{}", run.out);
        assert_eq!(sha256_file(&image).unwrap(), sum);
    }
    let said = scratch.run(&["compact", text(&image), "--no-filesystems", "--json"]).expect(0).json();
    assert_eq!(said["free_blocks"], 0);
    assert_eq!(first_difference(&file, &raw(&scratch, &child), MIB, |_| false), None);
    let said = scratch.run(&["compact", text(&image), "--break-children", "--json"]).expect(0).json();
    assert!(said["free_blocks"].as_u64().unwrap() > 8, "{said}");
    scratch.run(&["read", text(&child)]).expect(6);
    judge_files(&scratch, &[Part { kind: EXT4, start: 0, file }], &raw(&scratch, &image));
}

/// The parent holds the file system as it was first; the child what changed then. The free map is read through the chain.
fn child(kind: Kind, mib: u64, block_text: &str) {
    let block = bytes_of(block_text);
    let scratch = Scratch::new();
    let old = scratch.join("old");
    kind.make(&old, mib);
    let first = tree(&scratch, 1, 8);
    kind.fill(&scratch, &old, &first);
    let file = scratch.join("new");
    copy((&old, 0), (&file, 0), mib * MIB);
    let second = tree(&scratch, 2, 12);
    for folder in ["kept", "gone"] {
        std::fs::rename(second.join(folder), second.join(format!("{folder} later"))).unwrap();
    }
    kind.fill(&scratch, &file, &second);
    let later = gone().iter().map(|name| name.replace("gone/", "gone later/")).collect::<Vec<_>>();
    kind.delete(&scratch, &file, &[gone(), later].concat());
    kind.check(&file);

    let (parent, image) = (scratch.join("parent.vhdx"), scratch.join("child.avhdx"));
    scratch.run(&["convert", "-q", text(&old), text(&parent), "--from", "raw", "--block-size", "1M"]).expect(0);
    scratch.run(&["create", "-q", text(&image), "--parent", text(&parent), "--block-size", block_text]).expect(0);
    // What was deleted again before is not in the difference; so it is written, and then what there is in the end.
    let between = scratch.join("between");
    copy((&old, 0), (&between, 0), mib * MIB);
    kind.fill(&scratch, &between, &second);
    write_difference(&scratch, &image, &old, &between);
    write_difference(&scratch, &image, &between, &file);
    let parent_before = sha256_file(&parent).unwrap();

    let parts = [Part { kind, start: 0, file: file.clone() }];
    let free = free_blocks(&parts, block);
    let before = blocks_with_space(&image, mib * MIB, block);
    let zero = zero_blocks(&file, block);
    let left: BTreeSet<u64> =
        before.iter().filter(|index| !free.contains(index) && !zero.contains(index)).copied().collect();
    assert!(left.len() < before.len(), "nothing is to be gained: {} blocks", before.len());
    scratch.run(&["compact", text(&image)]).expect(0);
    check(&scratch, &image);
    assert_eq!(blocks_with_space(&image, mib * MIB, block), left);
    let after = raw(&scratch, &image);
    assert_eq!(first_difference(&file, &after, block, |index| free.contains(&index)), None);
    judge_files(&scratch, &parts, &after);
    // Payload that is neither copied nor shown again: the parent is what it was, and children of it still open.
    assert_eq!(sha256_file(&parent).unwrap(), parent_before);
    // What the parent still has there does not come through where the child had dropped its own.
    let shown = zero_blocks(&after, block);
    assert!(before.iter().filter(|index| free.contains(index)).all(|index| shown.contains(index)));
}
