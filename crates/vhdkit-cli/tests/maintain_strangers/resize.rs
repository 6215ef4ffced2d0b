//! Resizing: the file systems grow and shrink with the disk, and the backup GPT moves so that sgdisk is content.

use std::fs::File;
use std::path::{Path, PathBuf};

use vhdkit_testkit::foreign::sha256_file;
use vhdkit_testkit::harness::{Case, Needs};

use crate::common::{MIB, Scratch};
use crate::disks::{EXT4, NTFS, copy, text, tool, tool_ends_well, used};
use crate::vhdx::{check, first_difference, raw, same_disk};

pub(crate) fn cases() -> Vec<Case> {
    let ext = || EXT4.needs(&["qemu-img", "resize2fs"]);
    let mut cases = Vec::new();
    for (name, layout) in [
        ("dynamic", &["--block-size", "1M"][..]),
        ("with blocks of 32 MiB", &["--block-size", "32M"]),
        ("fixed", &["--fixed", "--block-size", "2M"]),
    ] {
        cases.push(Case::new(format!("resize: larger, {name}"), ext(), move || larger(layout)));
        cases.push(Case::new(format!("resize: minimum, {name}"), ext(), move || minimum(layout)));
    }
    let needs = Needs::tools(&["mke2fs", "e2fsck"]);
    cases.push(Case::new("resize: minimum within a large sector", needs, minimum_within_a_sector));
    cases.push(Case::new("resize: minimum of a child", ext(), minimum_of_a_child));
    let ntfs = NTFS.needs(&["qemu-img", "ntfsresize"]);
    cases.push(Case::new("resize: NTFS becomes smaller and larger", ntfs, ntfs_both_ways));
    let gpt = || Needs { tools: [ext().tools, vec!["sgdisk".to_owned()]].concat(), ..ext() };
    cases.push(Case::new("resize: GPT larger", gpt(), gpt_larger));
    cases.push(Case::new("resize: GPT smaller", gpt(), gpt_smaller));
    cases
}

fn image_of(scratch: &Scratch, disk: &Path, layout: &[&str]) -> PathBuf {
    let image = scratch.join("disk.vhdx");
    let arguments = [&["convert", "-q", text(disk), text(&image), "--from", "raw"], layout].concat();
    scratch.run(&arguments).expect(0);
    image
}

/// What is in the disk now, judged by both readers; it has so many bytes.
fn now(scratch: &Scratch, image: &Path, size: u64) -> PathBuf {
    check(scratch, image);
    let disk = raw(scratch, image);
    assert_eq!(disk.metadata().unwrap().len(), size);
    same_disk(image, &disk);
    disk
}

fn larger(layout: &[&str]) {
    let scratch = Scratch::new();
    let before = used(&scratch, "before", EXT4, 64, 8);
    let image = image_of(&scratch, &before, layout);
    scratch.run(&["resize", "-q", text(&image), "+100M"]).expect(0).silent();
    let disk = now(&scratch, &image, 164 * MIB);
    let grown = scratch.join("grown");
    copy((&before, 0), (&grown, 0), 64 * MIB);
    File::options().write(true).open(&grown).unwrap().set_len(164 * MIB).unwrap();
    assert_eq!(first_difference(&grown, &disk, MIB, |_| false), None);
    EXT4.check(&disk);
    // The guest makes its file system larger.
    tool("e2fsck", &["-fy", text(&disk)]);
    tool("resize2fs", &[text(&disk)]);
    scratch.run(&["write", "-q", text(&image), "--offset", "0", "--input", text(&disk)]).expect(0);
    let disk = now(&scratch, &image, 164 * MIB);
    EXT4.check(&disk);
    EXT4.same_files(&scratch, &before, &disk);
    assert!(tool("dumpe2fs", &["-h", text(&disk)]).contains(&blocks(&disk, 164 * MIB)));
}

/// The line of dumpe2fs for a file system of so many bytes.
fn blocks(disk: &Path, bytes: u64) -> String {
    let said = tool("dumpe2fs", &["-h", text(disk)]);
    let block = said.lines().find_map(|line| line.strip_prefix("Block size:")).unwrap().trim().parse::<u64>().unwrap();
    format!("Block count:              {}\n", bytes / block)
}

/// How many bytes an ext file system has.
fn length_of(disk: &Path) -> u64 {
    let said = tool("dumpe2fs", &["-h", text(disk)]);
    let value = |name| said.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse::<u64>().unwrap();
    value("Block size:") * value("Block count:")
}

/// Makes the file system as small as it can be; the file stays as long as it was.
fn shrink(disk: &Path, size: u64) {
    tool("e2fsck", &["-fy", text(disk)]);
    tool_ends_well("resize2fs", &["-M", text(disk)]);
    File::options().write(true).open(disk).unwrap().set_len(size).unwrap();
}

fn minimum(layout: &[&str]) {
    let scratch = Scratch::new();
    let disk = used(&scratch, "disk.raw", EXT4, 128, 60);
    let before = scratch.join("before");
    copy((&disk, 0), (&before, 0), 128 * MIB);
    shrink(&disk, 128 * MIB);
    let least = length_of(&disk);
    assert!(least < 100 * MIB);
    let image = image_of(&scratch, &disk, layout);
    // One sector less cuts it, and is refused.
    let sum = sha256_file(&image).unwrap();
    let less = (least - 512).to_string();
    let run = scratch.run(&["resize", text(&image), &less]).expect(6);
    assert!(run.err.contains(&format!("the ext4 file system reaches to {least} bytes")), "{}", run.err);
    assert_eq!(sha256_file(&image).unwrap(), sum);
    scratch.run(&["resize", "-q", text(&image), "--minimum"]).expect(0).silent();
    let disk = now(&scratch, &image, least);
    EXT4.check(&disk);
    EXT4.same_files(&scratch, &before, &disk);
}

/// A file system that was made in a file may end within a sector of the disk.
fn minimum_within_a_sector() {
    let scratch = Scratch::new();
    let disk = scratch.join("disk.raw");
    File::create(&disk).unwrap().set_len(20 * MIB).unwrap();
    tool("mke2fs", &["-q", "-F", "-t", "ext2", "-b", "1024", text(&disk), "10241"]);
    let image = image_of(&scratch, &disk, &["--logical-sector-size", "4096"]);
    scratch.run(&["resize", "-q", text(&image), "--minimum"]).expect(0).silent();
    // QEMU reads no disks with such sectors.
    scratch.run(&["check", "--strict", text(&image)]).expect(0);
    let disk = raw(&scratch, &image);
    assert_eq!(disk.metadata().unwrap().len(), 10244 << 10);
    EXT4.check(&disk);
}

fn minimum_of_a_child() {
    let scratch = Scratch::new();
    let disk = used(&scratch, "disk.raw", EXT4, 96, 30);
    let before = scratch.join("before");
    copy((&disk, 0), (&before, 0), 96 * MIB);
    let image = image_of(&scratch, &disk, &["--block-size", "1M"]);
    let child = scratch.join("child.avhdx");
    scratch.run(&["create", "-q", text(&child), "--parent", text(&image)]).expect(0);
    let full = scratch.join("full");
    copy((&disk, 0), (&full, 0), 96 * MIB);
    shrink(&disk, 96 * MIB);
    crate::vhdx::write_difference(&scratch, &child, &full, &disk);
    let least = length_of(&disk);
    scratch.run(&["resize", "-q", text(&child), "--minimum"]).expect(0).silent();
    check(&scratch, &child);
    let disk = raw(&scratch, &child);
    assert_eq!(disk.metadata().unwrap().len(), least);
    EXT4.check(&disk);
    EXT4.same_files(&scratch, &before, &disk);
    // What it gets again reads as zero, although the parent has data there.
    scratch.run(&["resize", "-q", text(&child), "96M"]).expect(0).silent();
    let larger = raw(&scratch, &child);
    let grown = scratch.join("grown");
    copy((&disk, 0), (&grown, 0), least);
    File::options().write(true).open(&grown).unwrap().set_len(96 * MIB).unwrap();
    assert_eq!(first_difference(&grown, &larger, MIB, |_| false), None);
}

fn ntfs_both_ways() {
    let scratch = Scratch::new();
    let disk = used(&scratch, "disk.raw", NTFS, 96, 8);
    let before = scratch.join("before");
    copy((&disk, 0), (&before, 0), 96 * MIB);
    let resize = |disk: &Path, size: &str| {
        // It marks the volume, so that Windows looks at it; such a volume would be left alone.
        tool("ntfsresize", &["-ff", "-P", "-s", size, text(disk)]);
        tool("ntfsfix", &["-d", text(disk)]);
    };
    // A sector more than whole clusters: what ntfsfix wants as well.
    let least = 19_531 * 4096 + 512;
    resize(&disk, &least.to_string());
    let image = image_of(&scratch, &disk, &["--block-size", "1M"]);
    scratch.run(&["resize", text(&image), "60M"]).expect(6);
    scratch.run(&["resize", "-q", text(&image), "--minimum"]).expect(0).silent();
    let small = now(&scratch, &image, least);
    NTFS.check(&small);
    NTFS.same_files(&scratch, &before, &small);
    scratch.run(&["resize", "-q", text(&image), "120M"]).expect(0).silent();
    let large = now(&scratch, &image, 120 * MIB);
    tool("ntfsresize", &["-ff", "-P", text(&large)]);
    tool("ntfsfix", &["-d", text(&large)]);
    NTFS.check(&large);
    NTFS.same_files(&scratch, &before, &large);
}

/// A disk of so many MiB with a GPT, and a file system of 64 MiB at 1 MiB.
fn gpt_disk(scratch: &Scratch, mib: u64) -> (PathBuf, PathBuf) {
    let part = used(scratch, "part", EXT4, 64, 8);
    let disk = scratch.join("disk.raw");
    File::create(&disk).unwrap().set_len(mib * MIB).unwrap();
    copy((&part, 0), (&disk, MIB), 64 * MIB);
    tool("sgdisk", &["-n", "1:2048:+64M", "-c", "1:root", text(&disk)]);
    (disk, part)
}

#[track_caller]
fn judge_gpt(scratch: &Scratch, disk: &Path, part: &Path) {
    let said = tool("sgdisk", &["-v", text(disk)]);
    assert!(said.contains("No problems found"), "{said}");
    let now = scratch.join("part now");
    copy((disk, MIB), (&now, 0), 64 * MIB);
    EXT4.check(&now);
    EXT4.same_files(scratch, part, &now);
    assert_eq!(first_difference(part, &now, MIB, |_| false), None);
    std::fs::remove_file(now).unwrap();
}

fn gpt_larger() {
    let scratch = Scratch::new();
    let (disk, part) = gpt_disk(&scratch, 100);
    let image = image_of(&scratch, &disk, &[]);
    let run = scratch.run(&["resize", text(&image), "+1G", "--move-backup-gpt"]).expect(0).silent();
    assert!(run.out.contains("backup GPT"), "{}", run.out);
    let disk = now(&scratch, &image, 1124 * MIB);
    judge_gpt(&scratch, &disk, &part);
    // And the guest can use what was added.
    tool("sgdisk", &["-n", "2:70M:1100M", "-v", text(&disk)]);
    // Without the request it is named, and the guest's tool can do it.
    scratch.run(&["write", "-q", text(&image), "--offset", "0", "--input", text(&disk)]).expect(0);
    let run = scratch.run(&["resize", text(&image), "2G"]).expect(0);
    assert!(run.err.contains("backup GPT") && run.err.contains("--move-backup-gpt"), "{}", run.err);
    let disk = now(&scratch, &image, 2048 * MIB);
    tool("sgdisk", &["-e", text(&disk)]);
    judge_gpt(&scratch, &disk, &part);
}

fn gpt_smaller() {
    let scratch = Scratch::new();
    let (disk, part) = gpt_disk(&scratch, 600);
    let image = image_of(&scratch, &disk, &["--block-size", "1M"]);
    scratch.run(&["resize", text(&image), "300M", "--move-backup-gpt"]).expect(0).silent();
    judge_gpt(&scratch, &now(&scratch, &image, 300 * MIB), &part);
    // The partition is not cut, and room is kept for the backup.
    let sum = sha256_file(&image).unwrap();
    for size in ["64M", "65M"] {
        let run = scratch.run(&["resize", text(&image), size, "--move-backup-gpt"]).expect(6);
        assert!(run.err.contains("partition") || run.err.contains("GPT"), "{}", run.err);
        assert_eq!(sha256_file(&image).unwrap(), sum);
    }
    scratch.run(&["resize", "-q", text(&image), "--minimum", "--move-backup-gpt"]).expect(0).silent();
    let least = now(&scratch, &image, 65 * MIB + 33 * 512);
    judge_gpt(&scratch, &least, &part);
}
