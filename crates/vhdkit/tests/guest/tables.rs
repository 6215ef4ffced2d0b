//! Partition tables that strangers made, with file systems in them; the backup GPT on disks of other sizes, judged by
//! sgdisk; and tables that contradict themselves.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use vhdkit::ErrorKind;
use vhdkit::guest::{PartitionType, Smallest, Table, VolumeKind, VolumeState, plan_backup_gpt};
use vhdkit::image::BlockDevice as _;
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;
use crate::{ext, fat};

fn needs() -> Needs {
    Needs::tools(&["sgdisk", "parted", "mke2fs", "debugfs", "dumpe2fs", "mkfs.fat", "mcopy", "mdel", "fsck.fat"])
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("GPT with file systems", needs(), gpt),
        Case::new("GPT with sectors of 4 KiB", needs(), gpt_with_large_sectors),
        Case::new("MBR with logical partitions", needs(), mbr),
        Case::new("the backup GPT moves", needs(), backup_moves),
        Case::new("the backup GPT moves on sectors of 4 KiB", needs(), backup_moves_on_large_sectors),
        Case::new("the backup GPT stays where it would do harm", needs(), backup_stays),
        Case::new("GPT that cannot be followed", needs(), unusable_gpt),
        Case::new("MBR that cannot be followed", needs(), unusable_mbr),
        Case::new("whole disks", needs(), whole_disks),
    ]
}

/// The table of [`gpt_disk`] alone.
fn bare_gpt_disk(scratch: &Scratch, mib: u64) -> PathBuf {
    let disk = scratch.file("disk", mib * MIB);
    let one = ["-n", "1:2048:+64M", "-t", "1:ef00", "-c", "1:EFI \u{e4}"];
    let three = ["-n", "3:+1M:+100M", "-c", "3:root"];
    let two = ["-n", "2:0:+10M", "-t", "2:8e00"];
    tool("sgdisk", &[&one[..], &three, &two, &[text(&disk)]].concat());
    disk
}

/// A disk with a GPT: FAT32 as partition 1, ext4 as partition 3, and LVM as partition 2 behind them.
fn gpt_disk(scratch: &Scratch, mib: u64) -> (PathBuf, PathBuf, PathBuf) {
    let disk = bare_gpt_disk(scratch, mib);
    let (one, two) = (Scratch::new(), Scratch::new());
    let fat = scratch.join("fat");
    std::fs::rename(fat::make(&one, 64 << 10, &["-F", "32", "-s", "1"]), &fat).unwrap();
    let ext = scratch.join("ext");
    std::fs::rename(ext::make(&two, 100, &["-t", "ext4"]), &ext).unwrap();
    put_into(&disk, MIB, &fat);
    put_into(&disk, 66 * MIB, &ext);
    (disk, fat, ext)
}

fn gpt() {
    let scratch = Scratch::new();
    let (path, fat, ext) = gpt_disk(&scratch, 300);
    let disk = open(&path);
    let survey = look(&disk);
    let Table::Gpt { backup_ok, backup_offset, backup_bytes, usable_from } = survey.table else {
        panic!("{:?}", survey.table)
    };
    assert_eq!((backup_ok, backup_offset, backup_bytes, usable_from), (true, 300 * MIB - 512, 33 * 512, 34 * 512));
    assert_eq!(survey.remarks, Vec::<String>::new());
    let kinds: Vec<_> =
        survey.volumes.iter().map(|volume| (volume.partition.as_ref().unwrap().number, volume.kind)).collect();
    assert_eq!(kinds, [(1, VolumeKind::Fat32), (3, VolumeKind::Ext4), (2, VolumeKind::Lvm)]);
    assert_eq!(survey.volumes[0].range, MIB..65 * MIB);
    let partition = survey.volumes[0].partition.as_ref().unwrap();
    assert_eq!(partition.name, "EFI \u{e4}");
    let PartitionType::Gpt { kind, .. } = partition.kind else { panic!("{partition:?}") };
    assert_eq!(kind.to_string(), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
    let moved = |ranges: Vec<std::ops::Range<u64>>, offset: u64| -> Vec<std::ops::Range<u64>> {
        ranges.into_iter().map(|range| range.start + offset..range.end + offset).collect()
    };
    assert_eq!(free_of(&disk, &survey.volumes[0]), moved(fat::truth(&fat, VolumeKind::Fat32), MIB));
    assert_eq!(free_of(&disk, &survey.volumes[1]), moved(ext::truth(&ext), 66 * MIB));
    assert_eq!(free_of(&disk, &survey.volumes[2]), []);
    let bytes = 176 * MIB + 33 * 512;
    assert_eq!(survey.smallest_safe_size(), Smallest::SafeAt { bytes, moves_backup_gpt: true });
}

/// sgdisk takes a file's sectors for 512 bytes, so the table is rewritten for sectors of 4096 by hand.
fn large_sectors(scratch: &Scratch) -> Patched {
    let (path, ..) = gpt_disk(scratch, 300);
    let disk = Patched::read(&path);
    let mut header = disk.bytes(512, 92);
    let mut entries = disk.bytes(1024, 128 * 128);
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    for entry in entries.chunks_mut(128).filter(|entry| entry[0] != 0) {
        let (first, last) = (number(entry, 32) / 8, (number(entry, 40) + 1) / 8 - 1);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
    }
    let last = 300 * MIB / 4096 - 1;
    header[40..48].copy_from_slice(&6_u64.to_le_bytes());
    header[48..56].copy_from_slice(&(last - 5).to_le_bytes());
    header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    let sealed = |mut header: Vec<u8>, my: u64, other: u64, table: u64| {
        header[24..32].copy_from_slice(&my.to_le_bytes());
        header[32..40].copy_from_slice(&other.to_le_bytes());
        header[72..80].copy_from_slice(&table.to_le_bytes());
        header[16..20].fill(0);
        let sum = crc32(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    };
    let mut disk = disk.with(512, &[0; 512]).with(300 * MIB - 512, &[0; 512]).with(1024, &vec![0; 128 * 128]);
    disk.sector = 4096;
    disk.with(4096, &sealed(header.clone(), 1, last, 2))
        .with(2 * 4096, &entries)
        .with(last * 4096, &sealed(header, last, 1, last - 4))
        .with((last - 4) * 4096, &entries)
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

fn gpt_with_large_sectors() {
    let scratch = Scratch::new();
    let disk = large_sectors(&scratch);
    let survey = look(&disk);
    assert!(matches!(survey.table, Table::Gpt { backup_ok: true, backup_bytes: 20480, .. }), "{:?}", survey.table);
    assert_eq!(survey.volumes[0].range, MIB..65 * MIB);
    assert!(matches!(survey.volumes[1].state, VolumeState::Readable { .. }), "{:?}", survey.volumes[1]);
    let bytes = 176 * MIB + 5 * 4096;
    assert_eq!(survey.smallest_safe_size(), Smallest::SafeAt { bytes, moves_backup_gpt: true });
    // The same bytes on a disk with other sectors.
    let mut other = disk;
    other.sector = 512;
    assert!(unusable(&other).contains("sectors of 4096 bytes"), "{}", unusable(&other));
}

fn mbr() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", 200 * MIB);
    let script = "mklabel msdos mkpart primary fat32 1MiB 20MiB mkpart extended 20MiB 190MiB mkpart logical ext4 21MiB 90MiB \
        mkpart logical linux-swap 91MiB 100MiB mkpart logical ext4 101MiB 150MiB";
    tool("parted", &[&["-s", text(&path)], &script.split_whitespace().collect::<Vec<_>>()[..]].concat());
    let inner = Scratch::new();
    let image = ext::make(&inner, 49, &["-t", "ext4"]);
    put_into(&path, 101 * MIB, &image);
    let disk = open(&path);
    let survey = look(&disk);
    assert_eq!(survey.table, Table::Mbr);
    let volumes: Vec<_> = survey
        .volumes
        .iter()
        .map(|volume| (volume.partition.as_ref().unwrap().number, volume.range.start / MIB, volume.range.end / MIB))
        .collect();
    assert_eq!(volumes, [(1, 1, 20), (5, 21, 90), (6, 91, 100), (7, 101, 150)]);
    assert_eq!(survey.volumes[2].kind, VolumeKind::Swap);
    let truth = ext::truth(&image).into_iter().map(|range| range.start + 101 * MIB..range.end + 101 * MIB);
    assert_eq!(free_of(&disk, &survey.volumes[3]), truth.collect::<Vec<_>>());
    // The extended partition ends behind the last logical one.
    let smallest = Smallest::SafeAt { bytes: 190 * MIB, moves_backup_gpt: false };
    assert_eq!(survey.smallest_safe_size(), smallest);
}

/// Applies a plan to a copy of the disk that has the new size.
fn apply(scratch: &Scratch, path: &Path, new_size: u64) -> PathBuf {
    let plan = plan_backup_gpt(&open(path), new_size).unwrap();
    let copy = scratch.join(&format!("moved-{new_size}"));
    tool("cp", &["--sparse=always", text(path), text(&copy)]);
    let file = std::fs::File::options().read(true).write(true).open(&copy).unwrap();
    file.set_len(new_size).unwrap();
    for (offset, bytes) in plan {
        assert!(offset + bytes.len() as u64 <= new_size && offset % 512 == 0 && bytes.len() % 512 == 0);
        file.write_all_at(&bytes, offset).unwrap();
    }
    copy
}

fn backup_moves() {
    let scratch = Scratch::new();
    let path = bare_gpt_disk(&scratch, 300);
    let before = look(&open(&path));
    let Smallest::SafeAt { bytes: smallest, .. } = before.smallest_safe_size() else { panic!() };
    for new_size in [smallest, smallest + 512, 200 * MIB, 300 * MIB, 400 * MIB, 5 << 40] {
        let copy = apply(&scratch, &path, new_size);
        let said = tool("sgdisk", &["-v", text(&copy)]);
        assert!(said.contains("No problems found"), "{new_size}: {said}");
        let after = look(&open(&copy));
        let Table::Gpt { backup_ok: true, backup_offset, .. } = after.table else { panic!("{:?}", after.table) };
        assert_eq!(backup_offset, new_size - 512);
        assert_eq!(after.remarks, Vec::<String>::new());
        let places = |survey: &vhdkit::guest::Survey| -> Vec<_> {
            survey
                .volumes
                .iter()
                .map(|volume| (volume.range.clone(), volume.partition.clone(), volume.state.clone()))
                .collect()
        };
        assert_eq!(places(&before), places(&after));
        std::fs::remove_file(copy).unwrap();
    }
    // A disk that was cut already, and has no backup at all.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(200 * MIB).unwrap();
    let cut = look(&open(&path));
    assert!(matches!(cut.table, Table::Gpt { backup_ok: false, .. }), "{:?}", cut.table);
    assert_eq!(cut.remarks.len(), 1);
    let copy = apply(&scratch, &path, 200 * MIB);
    assert!(tool("sgdisk", &["-v", text(&copy)]).contains("No problems found"));
    // A disk that was enlarged: the backup lies in the middle.
    file.set_len(250 * MIB).unwrap();
    let copy = apply(&scratch, &path, 200 * MIB);
    std::fs::File::options().write(true).open(&copy).unwrap().set_len(260 * MIB).unwrap();
    let grown = look(&open(&copy));
    assert!(matches!(grown.table, Table::Gpt { backup_ok: true, .. }));
    assert!(grown.remarks[0].contains("not lie at the end"), "{:?}", grown.remarks);
}

fn backup_moves_on_large_sectors() {
    let scratch = Scratch::new();
    let disk = large_sectors(&scratch);
    for new_size in [176 * MIB + 5 * 4096, 500 * MIB] {
        let plan = plan_backup_gpt(&disk, new_size).unwrap();
        let mut moved = disk.clone();
        moved.size = new_size;
        for (offset, bytes) in plan {
            moved = moved.with(offset, &bytes);
        }
        let survey = look(&moved);
        let Table::Gpt { backup_ok: true, backup_offset, .. } = survey.table else { panic!("{:?}", survey.table) };
        assert_eq!(backup_offset, new_size - 4096);
        assert_eq!(survey.volumes.len(), 3);
    }
}

fn backup_stays() {
    let scratch = Scratch::new();
    let path = bare_gpt_disk(&scratch, 300);
    let disk = Patched::read(&path);
    let kind = |disk: &Patched, size: u64| plan_backup_gpt(disk, size).unwrap_err().kind();
    let Smallest::SafeAt { bytes: smallest, .. } = look(&disk).smallest_safe_size() else { panic!() };
    assert_eq!(kind(&disk, smallest - 512), ErrorKind::Refused);
    for size in [0, 512, 1024, 40 * 512] {
        assert_eq!(kind(&disk, size), ErrorKind::Refused, "{size}");
    }
    assert_eq!(kind(&disk, smallest + 1), ErrorKind::InvalidArgument);
    assert_eq!(kind(&disk.with(512 + 60, &[0xff]), 400 * MIB), ErrorKind::Refused);
    assert_eq!(kind(&disk.with(1024, &[0xff]), 400 * MIB), ErrorKind::Refused);
    // A hybrid MBR.
    let hybrid = disk.with(446 + 16, &[0, 0, 0, 0, 7, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
    assert_eq!(kind(&hybrid, 400 * MIB), ErrorKind::Refused);
    assert_eq!(kind(&disk.with(510, &[0]), 400 * MIB), ErrorKind::Refused);
}

fn unusable(disk: &Patched) -> String {
    let survey = look(disk);
    assert!(survey.volumes.is_empty(), "{:?}", survey.volumes);
    let Table::Unusable { reason } = &survey.table else { panic!("{:?}", survey.table) };
    assert!(matches!(survey.smallest_safe_size(), Smallest::Unknown { .. }));
    reason.clone()
}

fn unusable_gpt() {
    let scratch = Scratch::new();
    let path = bare_gpt_disk(&scratch, 300);
    let disk = Patched::read(&path);
    assert_eq!(look(&disk).volumes.len(), 3);
    let protective = disk.bytes(446, 16);
    assert!(unusable(&disk.with(446, &[0; 16])).contains("does not protect"));
    assert!(unusable(&disk.with(510, &[0, 0])).contains("does not protect"));
    assert!(unusable(&disk.with(446 + 16, &protective)).contains("hybrid"));
    assert!(unusable(&disk.with(446 + 8, &[2])).contains("hybrid"));
    assert!(unusable(&disk.with(512 + 56, &[1, 2, 3])).contains("primary GPT header is damaged: its checksum"));
    assert!(unusable(&disk.with(1024 + 56, &[1, 2, 3])).contains("checksum of its entries"));
    // The backup is damaged: the primary counts. It says something else: nothing counts.
    let last = 300 * MIB - 512;
    let survey = look(&disk.with(last + 60, &[1, 2, 3]));
    assert!(matches!(survey.table, Table::Gpt { backup_ok: false, .. }), "{:?}", survey.table);
    assert_eq!(survey.volumes.len(), 3);
    let mut header = disk.bytes(last, 92);
    header[56] ^= 1;
    header[16..20].fill(0);
    let sum = crc32(&header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    assert!(unusable(&disk.with(last, &header)).contains("disagree"));
    // Partitions that overlap, or lie where they cannot, with checksums that are right.
    let with_entry = |at: usize, value: u64| {
        let mut entries = disk.bytes(1024, 128 * 128);
        entries[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let sealed = |place: u64| {
            let mut header = disk.bytes(place, 92);
            header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
            header[16..20].fill(0);
            let sum = crc32(&header);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            header
        };
        disk.with(1024, &entries).with(last - 32 * 512, &entries).with(512, &sealed(512)).with(last, &sealed(last))
    };
    assert_eq!(look(&with_entry(48, 0)).volumes.len(), 3, "attributes do not matter");
    assert!(unusable(&with_entry(40, 70 * 2048)).contains("overlap"));
    assert!(unusable(&with_entry(32, 5)).contains("usable sectors"));
    assert!(unusable(&with_entry(40, u64::MAX)).contains("usable sectors"));
    assert!(unusable(&with_entry(40, 100)).contains("usable sectors"));
    let mut cut = disk.clone();
    cut.size = 120 * MIB;
    assert!(unusable(&cut).contains("reaches past the end of the disk"));
    // The disk as a whole is a member of a RAID, whose superblock lies in its end.
    let raid = disk.with((300 * MIB / 512 - 16) / 8 * 8 * 512, &[0xfc, 0x4e, 0x2b, 0xa9]);
    assert!(unusable(&raid).contains("Linux RAID"));
}

fn unusable_mbr() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", 200 * MIB);
    let script = "mklabel msdos mkpart primary 1MiB 20MiB mkpart extended 20MiB 190MiB mkpart logical 21MiB 90MiB \
        mkpart logical 91MiB 100MiB";
    tool("parted", &[&["-s", text(&path)], &script.split_whitespace().collect::<Vec<_>>()[..]].concat());
    let disk = Patched::read(&path);
    assert_eq!(look(&disk).volumes.len(), 3);
    let entry = |number: u64, kind: u8, first: u32, sectors: u32| {
        let bytes = [&[0, 0, 0, 0, kind, 0, 0, 0][..], &first.to_le_bytes(), &sectors.to_le_bytes()].concat();
        disk.with(446 + 16 * number, &bytes)
    };
    assert!(unusable(&entry(2, 0x83, 10 * 2048, 100)).contains("overlap"));
    assert!(unusable(&entry(2, 0x83, 95 * 2048, 100)).contains("extended"));
    assert!(unusable(&entry(2, 5, 195 * 2048, 100)).contains("two extended"));
    assert!(unusable(&entry(2, 0x83, 195 * 2048, u32::MAX)).contains("does not lie"));
    assert!(unusable(&entry(2, 0x83, 0, 5)).contains("does not lie"));
    assert!(unusable(&entry(2, 0xee, 195 * 2048, 100)).contains("hybrid"));
    // The chain: into itself, out of the extended partition, to a link without a signature, to a partition over a link.
    let link = 20 * MIB;
    let next = |first: u32| disk.with(link + 446 + 16 + 8, &first.to_le_bytes());
    assert!(unusable(&next(0)).contains("into itself"));
    assert!(unusable(&next(180 * 2048)).contains("leads out"));
    assert!(unusable(&next(75 * 2048)).contains("damaged"));
    assert!(unusable(&disk.with(link + 446 + 12, &(80 * 2048_u32).to_le_bytes())).contains("overlap"));
    assert!(unusable(&disk.with(link + 446 + 8, &[0; 4])).contains("outside"));
    assert!(unusable(&disk.with(link + 446 + 36, &[7])).contains("more than two"));
    // A file system over all of it, too.
    assert!(unusable(&disk.with(1024 + 0x38, &[0x53, 0xef])).contains("signature of ext"));
    let mut odd = disk.bytes(446, 64);
    odd[0] = 0x7f;
    assert!(unusable(&disk.with(446, &odd)).contains("unknown kind"));
}

/// Disks without a table: empty ones, unknown ones, and an empty table.
fn whole_disks() {
    let scratch = Scratch::new();
    for size in [0, 512, 1024, 4096, 100_352, 4 << 40] {
        let path = scratch.file("empty", size);
        let disk = open(&path);
        let survey = look(&disk);
        assert_eq!(survey.smallest_safe_size(), Smallest::SafeAt { bytes: 0, moves_backup_gpt: false });
        assert_eq!(survey.volumes[0].kind, VolumeKind::Empty);
        assert_eq!(survey.volumes[0].range, 0..disk.size());
    }
    let path = scratch.file("unknown", MIB);
    std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"something", 70_000).unwrap();
    let survey = look(&open(&path));
    assert_eq!((survey.table.clone(), survey.volumes[0].kind), (Table::None, VolumeKind::Unknown));
    assert!(matches!(survey.smallest_safe_size(), Smallest::Unknown { .. }));
    let path = scratch.file("table", 10 * MIB);
    tool("parted", &["-s", text(&path), "mklabel", "msdos"]);
    let survey = look(&open(&path));
    assert_eq!((survey.table.clone(), survey.volumes.len()), (Table::Mbr, 0));
    assert!(matches!(survey.smallest_safe_size(), Smallest::Unknown { .. }));
}
