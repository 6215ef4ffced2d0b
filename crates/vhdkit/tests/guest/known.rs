//! What is only recognised is left alone and named, alone, over another file system, and by the type of its partition.

use vhdkit::guest::{Table, VolumeKind, VolumeState};
use vhdkit_testkit::harness::{Case, Needs};

use crate::ext;
use crate::support::*;

/// Name, offset from the beginning or (negative) from the end, bytes.
const SIGNATURES: &[(&str, i64, &[u8])] = &[
    ("Linux swap", 4086, b"SWAPSPACE2"),
    ("Linux swap", 65526, b"SWAPSPACE2"),
    ("LVM", 512, b"LABELONE"),
    ("Linux RAID", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("Linux RAID", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("Linux RAID", -65536, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("Linux RAID", -8192, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("btrfs", 65600, b"_BHRfS_M"),
    ("ZFS", 128 * 1024 + 5 * 1024, &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0]),
    ("ZFS", -128 * 1024, &[0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c]),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("LUKS", 0x4000, b"SKUL\xba\xbe"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("ReFS", 3, b"ReFS\0\0\0\0"),
    ("F2FS", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    ("ISO 9660 or UDF", 32769, b"CD001"),
    ("Windows dynamic disk", 3072, b"PRIVHEAD"),
    ("DDF RAID", -512, &[0xde, 0x11, 0xde, 0x11]),
    ("Intel RAID", -1024, b"Intel Raid ISM Cfg Sig. "),
    ("DRBD", -4096 + 60, &[0x83, 0x74, 0x02, 0x6b]),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("XFS", 0, b"XFSB"),
    ("HFS+", 1024, b"H+"),
    ("APFS", 32, b"NXSB"),
    ("squashfs", 0, b"hsqs"),
];

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("known: alone", Needs::nothing(), alone),
        Case::new("known: over ext4", Needs::tools(&["mke2fs", "debugfs"]), over_another),
        Case::new("known: types of partitions", Needs::tools(&["sgdisk", "mke2fs", "debugfs"]), types),
        Case::new("known: swap by mkswap", Needs::tools(&["mkswap"]), swap),
    ]
}

fn place(offset: i64, size: u64) -> u64 {
    size.checked_add_signed(if offset < 0 { offset } else { offset - i64::try_from(size).unwrap() }).unwrap()
}

fn alone() {
    let scratch = Scratch::new();
    let disk = Patched::read(&scratch.file("empty", 4 * MIB));
    for (name, offset, bytes) in SIGNATURES {
        let volume = only(&disk.with(place(*offset, disk.size), bytes));
        assert_eq!(volume.kind.name(), *name);
        let VolumeState::LeftAlone { reason } = volume.state else { panic!("{name}") };
        assert!(!reason.is_empty());
    }
}

/// What lies in an ext4 that is in order otherwise.
fn over_another() {
    let scratch = Scratch::new();
    // Without checksums, as some of these lie in the superblock.
    let disk = Patched::read(&ext::make(&scratch, 40, &["-t", "ext4", "-b", "4096", "-O", "^metadata_csum"]));
    assert!(!free_of_all(&disk).is_empty());
    for (name, offset, bytes) in SIGNATURES {
        let reason = why(&disk.with(place(*offset, disk.size), bytes));
        assert!(reason.contains(name) && reason.contains("ext4"), "{name}: {reason}");
    }
}

fn types() {
    let types = [
        ("8300", ""),
        ("8e00", "LVM"),
        ("fd00", "Linux RAID"),
        ("8200", "Linux swap"),
        ("8309", "LUKS"),
        ("4200", "Windows dynamic disk"),
        ("e75caf8f-f680-4cee-afa3-b001e56efc2d", "Storage Spaces"),
        ("0c01", "Microsoft reserved partition"),
        ("a504", "ZFS"),
    ];
    let scratch = Scratch::new();
    let path = scratch.file("disk", 100 * MIB);
    let mut script = Vec::new();
    for (number, (code, _)) in (1..).zip(types) {
        script.extend(["-n".to_owned(), format!("{number}:0:+10M"), "-t".to_owned(), format!("{number}:{code}")]);
    }
    script.push(text(&path).to_owned());
    tool("sgdisk", &script.iter().map(String::as_str).collect::<Vec<_>>());
    let empty = look(&open(&path));
    assert_eq!(empty.volumes.len(), types.len());
    for (volume, (_, name)) in empty.volumes.iter().zip(types).skip(1) {
        assert_eq!(volume.kind.name(), name);
    }
    // With an ext4 in each, what the type says still holds.
    let inner = Scratch::new();
    let image = ext::make(&inner, 10, &["-t", "ext4"]);
    for volume in &empty.volumes {
        put_into(&path, volume.range.start, &image);
    }
    let disk = open(&path);
    for (volume, (_, name)) in look(&disk).volumes.iter().zip(types) {
        match &volume.state {
            VolumeState::Readable { .. } => {
                assert_eq!((volume.kind, name), (VolumeKind::Ext4, ""));
                assert!(!free_of(&disk, volume).is_empty());
            }
            VolumeState::LeftAlone { reason } => {
                assert!(reason.contains("type says") && reason.contains(name) && reason.contains("ext4"), "{reason}");
            }
        }
    }
}

fn swap() {
    let scratch = Scratch::new();
    let path = scratch.file("image", 20 * MIB);
    tool("mkswap", &[text(&path)]);
    let survey = look(&open(&path));
    assert_eq!((survey.table, survey.volumes[0].kind), (Table::None, VolumeKind::Swap));
}
