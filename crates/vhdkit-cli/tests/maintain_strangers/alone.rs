//! What is not in order or not understood is left alone and named: not one byte of it is dropped.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use vhdkit_testkit::Rng;
use vhdkit_testkit::harness::{Case, Needs};

use crate::common::{MIB, Scratch};
use crate::disks::{EXT4, Kind, NTFS, XFS, copy, gone, text, tool, tool_ends_well, tree, used};
use crate::vhdx::{check, first_difference, raw, same_disk};

/// Signatures over noise: the name that has to be said, offset, bytes.
const SIGNATURES: &[(&str, u64, &[u8])] = &[
    ("LUKS", 0, b"LUKS\xba\xbe\0\x02"),
    ("LVM", 512, b"LABELONE"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("btrfs", 65600, b"_BHRfS_M"),
    ("Linux RAID", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, kind, mib) in [("ext4", EXT4, 64), ("XFS", XFS, 300), ("exFAT", Kind::ExFat, 64)] {
        let run = move || mounted(kind, mib, name);
        cases.push(Case::new(format!("alone: {name} that was not unmounted"), kind.needs(&["qemu-img"]), run));
    }
    cases.push(Case::new("alone: NTFS with its dirty flag", NTFS.needs(&["qemu-img"]), dirty_ntfs));
    cases.push(Case::new("alone: FAT32 with its dirty bit", Kind::Fat32.needs(&["qemu-img"]), dirty_fat));
    cases.push(Case::new("alone: swap", Needs::tools(&["mkswap", "qemu-img"]), swap));
    cases.push(Case::new("alone: LUKS of both kinds", Needs::tools(&["cryptsetup", "qemu-img"]), luks));
    cases.push(Case::new("alone: btrfs", Needs::tools(&["mkfs.btrfs", "qemu-img"]), btrfs));
    for (name, offset, bytes) in SIGNATURES.iter().copied() {
        let run = move || signature(name, offset, bytes);
        cases.push(Case::new(format!("alone: {name}"), Needs::tools(&["qemu-img"]), run));
    }
    cases
}

/// Compacts an image of the disk; nothing is dropped as free, and the remarks name it and say why.
fn left_alone(scratch: &Scratch, disk: &Path, words: &[&str]) {
    let image = scratch.join("disk.vhdx");
    scratch.run(&["convert", "-q", text(disk), text(&image), "--from", "raw", "--block-size", "1M"]).expect(0);
    let before = image.metadata().unwrap().len();
    let said = scratch.run(&["compact", "--json", text(&image)]).expect(0).json();
    check(scratch, &image);
    assert_eq!(said["free_blocks"], 0, "{said}");
    let remarks = said["remarks"].to_string();
    assert!(words.iter().all(|word| remarks.contains(word)), "{words:?}: {remarks}");
    assert!(remarks.contains("left alone: "), "{remarks}");
    // At most the space of nothing goes.
    assert!(said["new_file_size"].as_u64().unwrap() <= before);
    let after = raw(scratch, &image);
    same_disk(&image, disk);
    assert_eq!(first_difference(disk, &after, MIB, |_| false), None);
}

/// A copy is made while the file system is in use.
fn mounted(kind: Kind, mib: u64, name: &str) {
    let scratch = Scratch::new();
    let file = used(&scratch, "file", kind, mib, 8);
    let disk = scratch.join("copy");
    kind.while_mounted(&scratch, &file, |point| {
        let tree = tree(&scratch, 9, 4);
        tool("cp", &["-r", &format!("{}/.", text(&tree)), text(&point.join("kept"))]);
        std::fs::remove_dir_all(tree).unwrap();
        for name in &gone() {
            std::fs::remove_file(point.join("kept").join(name)).unwrap();
        }
        tool_ends_well("sync", &["-f", text(point)]);
        copy((&file, 0), (&disk, 0), mib * MIB);
    });
    left_alone(&scratch, &disk, &[name]);
}

/// ntfsfix leaves a volume marked, so that Windows looks at it.
fn dirty_ntfs() {
    let scratch = Scratch::new();
    let disk = used(&scratch, "disk.raw", NTFS, 64, 8);
    tool("ntfsfix", &[text(&disk)]);
    left_alone(&scratch, &disk, &["NTFS", "dirty"]);
}

/// Windows clears a bit of the second entry of the table while it is mounted; Linux sets one in the boot sector.
fn dirty_fat() {
    for by_linux in [false, true] {
        let scratch = Scratch::new();
        let disk = used(&scratch, "disk.raw", Kind::Fat32, 64, 8);
        let file = File::options().read(true).write(true).open(&disk).unwrap();
        let mut boot = [0; 512];
        file.read_exact_at(&mut boot, 0).unwrap();
        if by_linux {
            file.write_all_at(&[boot[0x41] | 1], 0x41).unwrap();
        } else {
            let reserved = u64::from(u16::from_le_bytes([boot[14], boot[15]])) * 512;
            let table = u64::from(u32::from_le_bytes(boot[36..40].try_into().unwrap())) * 512;
            for start in [reserved, reserved + table] {
                let mut byte = [0];
                file.read_exact_at(&mut byte, start + 7).unwrap();
                file.write_all_at(&[byte[0] & 0xf7], start + 7).unwrap();
            }
        }
        left_alone(&scratch, &disk, &["FAT32", "dirty"]);
    }
}

fn noise(scratch: &Scratch) -> std::path::PathBuf {
    scratch.write("disk.raw", &Rng::new(17).bytes(8 * MIB as usize))
}

fn swap() {
    let scratch = Scratch::new();
    let disk = noise(&scratch);
    tool("mkswap", &[text(&disk)]);
    left_alone(&scratch, &disk, &["Linux swap"]);
}

fn luks() {
    for kind in ["luks1", "luks2"] {
        let scratch = Scratch::new();
        let disk = scratch.write("disk.raw", &Rng::new(18).bytes(24 * MIB as usize));
        let key = scratch.write("key", b"a long passphrase");
        // As few rounds as it takes: nothing is kept in it.
        let quickly: &[&str] = match kind {
            "luks1" => &["--pbkdf-force-iterations", "1000"],
            _ => &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"],
        };
        let command = ["luksFormat", "-q", "--type", kind, "--key-file", text(&key)];
        tool("cryptsetup", &[&command, quickly, &[text(&disk)]].concat());
        left_alone(&scratch, &disk, &["LUKS"]);
    }
}

fn btrfs() {
    let scratch = Scratch::new();
    let disk = scratch.join("disk.raw");
    File::create(&disk).unwrap().set_len(200 * MIB).unwrap();
    tool("mkfs.btrfs", &["-q", "--rootdir", text(&tree(&scratch, 3, 8)), text(&disk)]);
    left_alone(&scratch, &disk, &["btrfs"]);
}

fn signature(name: &str, offset: u64, bytes: &[u8]) {
    let scratch = Scratch::new();
    let disk = noise(&scratch);
    File::options().write(true).open(&disk).unwrap().write_all_at(bytes, offset).unwrap();
    left_alone(&scratch, &disk, &[name]);
}
