//! Broken images with real file systems in them, judged by strangers: QEMU reads what was repaired or recovered, and the file
//! system's own checker is content.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::ops::recover::{RecoverOptions, RecoverReport, recover};
use vhdkit::ops::repair::{RepairOptions, apply, plan, restore};
use vhdkit::storage::{FileAccess, FileStorage, MemoryStorage, NewFile, NewFileOptions, Sharing, Storage};
use vhdkit_testkit::foreign::{assert_success, qemu_img, run_tool, sha256_file};
use vhdkit_testkit::harness::{Case, Needs, main_with};
use vhdkit_testkit::rng::Rng;

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file system of 300 MiB, in which ext4 has eight superblocks, with files of random bytes.
fn file_system(directory: &Path, kind: &str) {
    let tree = directory.join("tree");
    std::fs::create_dir(&tree).unwrap();
    let mut rng = Rng::new(5);
    for number in 0..40 {
        let bytes: Vec<u8> = (0..rng.between(1000, 700_000)).map(|_| rng.below(256) as u8).collect();
        std::fs::write(tree.join(format!("file{number}")), bytes).unwrap();
    }
    let raw = directory.join("disk.raw");
    File::create(&raw).unwrap().set_len(300 * MIB).unwrap();
    match kind {
        "ext4" => assert_success(&run_tool("mkfs.ext4", &["-q", "-b", "1024", "-d", text(&tree), text(&raw)])),
        other => panic!("{other}"),
    }
}

/// The image that QEMU makes of the raw disk, in blocks of 1 MiB.
fn image(directory: &Path) {
    let (raw, image) = (directory.join("disk.raw"), directory.join("disk.vhdx"));
    let arguments = ["convert", "-O", "vhdx", "-o", "block_size=1M", text(&raw), text(&image)];
    assert_success(&qemu_img(&arguments));
}

fn read_u64(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_le_bytes(bytes)
}

/// Where QEMU puts BAT and metadata: from the region table, by hand.
fn regions(file: &File) -> (u64, u64) {
    let table = 192 << 10;
    let first = (read_u64(file, table + 16), read_u64(file, table + 16 + 16));
    let second = read_u64(file, table + 48 + 16);
    // The GUID of the BAT region begins with 66 77 c2 2d.
    if first.0 & 0xffff_ffff == 0x2dc2_7766 { (first.1, second) } else { (second, first.1) }
}

fn recovered(directory: &Path) -> RecoverReport {
    recovered_with(directory, &RecoverOptions::default())
}

fn recovered_with(directory: &Path, options: &RecoverOptions<'_>) -> RecoverReport {
    let source = FileStorage::open(&directory.join("disk.vhdx"), FileAccess::Read, Sharing::Normal).unwrap();
    let source: Arc<dyn Storage> = Arc::new(source);
    let target = NewFile::create(&directory.join("rescued.vhdx"), NewFileOptions::default()).unwrap();
    let storage: Arc<dyn Storage> = target.storage();
    let report = recover(&source, None, &storage, options, &()).unwrap();
    target.commit(false).unwrap();
    report
}

/// What QEMU reads of an image is the disk, and its own checks are content.
fn judge(directory: &Path, image: &str) {
    let (image, raw) = (directory.join(image), directory.join("disk.raw"));
    assert_success(&qemu_img(&["check", text(&image)]));
    let out = directory.join("out.raw");
    assert_success(&qemu_img(&["convert", "-O", "raw", text(&image), text(&out)]));
    assert_success(&run_tool("e2fsck", &["-fn", text(&out)]));
    assert_eq!(sha256_file(&out).unwrap(), sha256_file(&raw).unwrap());
}

/// Breaks an image, recovers, and has strangers judge.
fn recover_case(name: &'static str, damage: fn(&File)) -> Case {
    let needs = Needs::tools(&["qemu-img", "mkfs.ext4", "e2fsck"]);
    Case::new(format!("ext4 is whole after recovery: {name}"), needs, move || {
        let directory = tempfile::tempdir().unwrap();
        file_system(directory.path(), "ext4");
        image(directory.path());
        damage(&File::options().read(true).write(true).open(directory.path().join("disk.vhdx")).unwrap());
        let report = recovered(directory.path());
        assert_eq!((report.disk_size, report.block_size), (300 * MIB, MIB), "{report:?}");
        judge(directory.path(), "rescued.vhdx");
    })
}

fn zero(file: &File, offset: u64, length: u64) {
    file.write_all_at(&vec![0; length as usize], offset).unwrap();
}

/// Entries of the BAT of blocks with data.
fn present(file: &File, bat: u64) -> Vec<u64> {
    (0..300).map(|index| bat + index * 8).filter(|place| read_u64(file, *place) & 7 == 6).collect()
}

/// The BAT is gone. What says where it is comes to its place; the rest is in the order of the file.
fn without_a_table() {
    let directory = tempfile::tempdir().unwrap();
    file_system(directory.path(), "ext4");
    image(directory.path());
    let file = File::options().read(true).write(true).open(directory.path().join("disk.vhdx")).unwrap();
    let (bat, _) = regions(&file);
    zero(&file, bat, MIB);
    let report = recovered(directory.path());
    assert!(report.recognised.contains(&"ext".to_owned()) && !report.is_certain(), "{report:?}");
    let out = directory.path().join("out.raw");
    assert_success(&qemu_img(&["convert", "-O", "raw", text(&directory.path().join("rescued.vhdx")), text(&out)]));
    // The superblock, and its copies at the beginning of groups of 8 MiB.
    let (out, raw) = (File::open(out).unwrap(), File::open(directory.path().join("disk.raw")).unwrap());
    for group in [0, 1, 3, 5, 7, 9, 25, 27] {
        let offset = group * 8 * MIB + 1024;
        let (mut one, mut other) = ([0; 1024], [0; 1024]);
        out.read_exact_at(&mut one, offset).unwrap();
        raw.read_exact_at(&mut other, offset).unwrap();
        assert!(one == other && one != [0; 1024], "the superblock at {offset:#x}");
    }
}

/// Everything but the data is gone. What is on the disk, and the size of the blocks, tell where it belongs.
fn without_a_beginning(kind: &str, block: u64) {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("disk.raw"), directory.path().join("disk.vhdx"));
    let file = File::create(&raw).unwrap();
    let size = if kind == "xfs" { 512 * MIB } else { 300 * MIB };
    file.set_len(size).unwrap();
    let partition = directory.path().join("partition.raw");
    match kind {
        // Little more than what says where it is.
        "xfs" => {
            let options = ["-q", "-f", "-m", "crc=1", "-d", "agcount=4,size=512m", "-l", "size=64m", text(&raw)];
            assert_success(&run_tool("mkfs.xfs", &options));
        }
        // All of it is data, in a partition.
        "ntfs" => {
            let bytes = vec![0x5a; MIB as usize];
            (2..299).for_each(|mib| file.write_all_at(&bytes, mib * MIB).unwrap());
            File::create(&partition).unwrap().set_len(297 * MIB).unwrap();
            assert_success(&run_tool("sgdisk", &["-n", "1:4096:612351", "-t", "1:0700", text(&raw)]));
            assert_success(&run_tool(
                "mkntfs",
                &["-q", "-F", "-f", "-p", "4096", "-H", "16", "-S", "63", text(&partition)],
            ));
            let source = File::open(&partition).unwrap();
            let (mut buffer, empty) = (vec![0; MIB as usize], vec![0; MIB as usize]);
            for mib in 0..297 {
                source.read_exact_at(&mut buffer, mib * MIB).unwrap();
                if buffer != empty {
                    file.write_all_at(&buffer, (mib + 2) * MIB).unwrap();
                }
            }
        }
        other => panic!("{other}"),
    }
    let block_size = format!("block_size={block}");
    assert_success(&qemu_img(&["convert", "-O", "vhdx", "-o", &block_size, text(&raw), text(&path)]));
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let (bat, metadata) = regions(&file);
    zero(&file, 0, bat.max(metadata) + MIB);
    drop(file);
    let source = FileStorage::open(&path, FileAccess::Read, Sharing::Normal).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(source);
    // By itself nothing says that this was a VHDX.
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let error = recover(&storage, None, &target, &RecoverOptions::default(), &()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotVhdx);
    assert!(error.hint().unwrap().contains("--block-size"), "{error:?}");
    drop(storage);
    let options = RecoverOptions { block_size: u32::try_from(block).ok(), ..RecoverOptions::default() };
    let report = recovered_with(directory.path(), &options);
    assert_eq!((report.disk_size, report.block_size), (size, block), "{report:?}");
    assert!(!report.is_certain() && report.blocks_lost == 0, "{report:?}");
    let out = directory.path().join("out.raw");
    assert_success(&qemu_img(&["convert", "-O", "raw", text(&directory.path().join("rescued.vhdx")), text(&out)]));
    assert_eq!(sha256_file(&out).unwrap(), sha256_file(&raw).unwrap());
    std::fs::remove_file(directory.path().join("rescued.vhdx")).unwrap();
    if kind == "xfs" {
        assert_success(&run_tool("xfs_repair", &["-n", "-f", text(&out)]));
        // The size of the disk is enough: that of the blocks shows.
        let report =
            recovered_with(directory.path(), &RecoverOptions { disk_size: Some(size), ..RecoverOptions::default() });
        assert_eq!(report.block_size, block, "{report:?}");
    }
}

/// An image of a smaller disk lies in the file system. Its table and backup are not those of the disk around it.
fn a_disk_inside_a_disk() {
    for all_gone in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        file_system(directory.path(), "ext4");
        let inner = directory.path().join("inner.raw");
        let mut rng = Rng::new(6);
        std::fs::write(&inner, rng.bytes(24 * MIB as usize)).unwrap();
        assert_success(&run_tool("sgdisk", &["-o", "-n", "1:2048:0", text(&inner)]));
        let raw = File::options().write(true).open(directory.path().join("disk.raw")).unwrap();
        raw.write_all_at(&std::fs::read(&inner).unwrap(), 200 * MIB).unwrap();
        image(directory.path());
        let file = File::options().read(true).write(true).open(directory.path().join("disk.vhdx")).unwrap();
        let (bat, metadata) = regions(&file);
        if all_gone {
            zero(&file, 0, bat.max(metadata) + MIB);
        } else {
            zero(&file, bat, MIB);
        }
        let report = recovered_with(
            directory.path(),
            &RecoverOptions { block_size: Some(1 << 20), ..RecoverOptions::default() },
        );
        assert_eq!(report.disk_size, 300 * MIB, "{report:?}");
        assert!(!report.is_certain());
        let out = directory.path().join("out.raw");
        assert_success(&qemu_img(&["convert", "-O", "raw", text(&directory.path().join("rescued.vhdx")), text(&out)]));
        let (out, raw) = (File::open(out).unwrap(), File::open(directory.path().join("disk.raw")).unwrap());
        let (mut one, mut other) = (vec![0; MIB as usize], vec![0; MIB as usize]);
        out.read_exact_at(&mut one, 0).unwrap();
        raw.read_exact_at(&mut other, 0).unwrap();
        assert!(one == other, "the beginning of the disk is that of another");
    }
}

/// A file system in a partition of an MBR begins where the partition does, not where the disk does.
fn a_partition_without_a_table() {
    let directory = tempfile::tempdir().unwrap();
    file_system(directory.path(), "ext4");
    let (raw, part) = (directory.path().join("disk.raw"), directory.path().join("part.raw"));
    std::fs::rename(&raw, &part).unwrap();
    let file = File::options().create_new(true).write(true).open(&raw).unwrap();
    file.set_len(302 * MIB).unwrap();
    let source = File::open(&part).unwrap();
    let mut buffer = vec![0; MIB as usize];
    for mib in 0..300 {
        source.read_exact_at(&mut buffer, mib * MIB).unwrap();
        if buffer.iter().any(|byte| *byte != 0) {
            file.write_all_at(&buffer, (mib + 1) * MIB).unwrap();
        }
    }
    let mut record = [0; 512];
    record[446 + 4] = 0x83;
    record[446 + 8..446 + 12].copy_from_slice(&2048_u32.to_le_bytes());
    record[446 + 12..446 + 16].copy_from_slice(&614_400_u32.to_le_bytes());
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&record, 0).unwrap();
    image(directory.path());
    let file = File::options().read(true).write(true).open(directory.path().join("disk.vhdx")).unwrap();
    let (bat, _) = regions(&file);
    zero(&file, bat, MIB);
    let report = recovered(directory.path());
    assert!(report.recognised.contains(&"MBR".to_owned()) && !report.is_certain(), "{report:?}");
    let out = directory.path().join("out.raw");
    assert_success(&qemu_img(&["convert", "-O", "raw", text(&directory.path().join("rescued.vhdx")), text(&out)]));
    let (out, raw) = (File::open(out).unwrap(), File::open(&raw).unwrap());
    // The record, and the superblocks at the beginning of groups of 8 MiB.
    let groups = [0, 1, 3, 5, 7, 9, 25, 27].map(|group| MIB + group * 8 * MIB + 1024);
    for offset in std::iter::once(0).chain(groups) {
        let (mut one, mut other) = ([0; 1024], [0; 1024]);
        out.read_exact_at(&mut one, offset).unwrap();
        raw.read_exact_at(&mut other, offset).unwrap();
        assert!(one == other && one != [0; 1024], "what lies at {offset:#x}");
    }
}

/// QEMU's own images, broken and repaired in place, are what they were to QEMU; and put back they are what they were to the byte.
fn repaired_in_place() {
    for number in 0..4 {
        let directory = tempfile::tempdir().unwrap();
        file_system(directory.path(), "ext4");
        image(directory.path());
        let path = directory.path().join("disk.vhdx");
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (bat, metadata) = regions(&file);
        let entry = present(&file, bat)[5];
        match number {
            0 => zero(&file, 64 << 10, 4096),
            1 => zero(&file, 192 << 10, 512),
            2 => file.write_all_at(&[1], metadata + 12).unwrap(),
            _ => file.write_all_at(&(read_u64(&file, entry) ^ 1 << 12).to_le_bytes(), entry).unwrap(),
        }
        let before = sha256_file(&path).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, FileAccess::Write, Sharing::Normal).unwrap());
        let planned = plan(&storage, None, &RepairOptions::default(), &()).unwrap();
        assert!(planned.changes_anything() && planned.mends_everything(), "{number}: {:?}", planned.left);
        let undo = MemoryStorage::new();
        apply(&storage, &planned, &undo, &mut || Ok(()), &()).unwrap();
        drop((storage, planned));
        judge(directory.path(), "disk.vhdx");
        let storage = FileStorage::open(&path, FileAccess::Write, Sharing::Normal).unwrap();
        restore(&storage, &undo, &()).unwrap();
        drop(storage);
        assert_eq!(sha256_file(&path).unwrap(), before, "{number}");
    }
}

fn main() {
    let tools = || Needs::tools(&["qemu-img", "mkfs.ext4", "e2fsck"]);
    main_with(vec![
        recover_case("headers and region tables zeroed", |file| zero(file, 64 << 10, 256 << 10)),
        recover_case("first MiB zeroed", |file| zero(file, 0, MIB)),
        recover_case("metadata table zeroed", |file| zero(file, regions(file).1, 64 << 10)),
        recover_case("three entries damaged", |file| {
            let places = present(file, regions(file).0);
            for index in [3, places.len() / 2, places.len() - 2] {
                file.write_all_at(&u64::MAX.to_le_bytes(), places[index]).unwrap();
            }
        }),
        recover_case("three entries zeroed", |file| {
            let places = present(file, regions(file).0);
            for index in [3, places.len() / 2, places.len() - 2] {
                zero(file, places[index], 8);
            }
        }),
        Case::new("ext superblocks come to their places without a BAT", tools(), without_a_table),
        Case::new("QEMU's images are repaired in place", tools(), repaired_in_place),
        Case::new("a partition without a table", tools(), a_partition_without_a_table),
        Case::new("a disk inside a disk", Needs::tools(&["qemu-img", "mkfs.ext4", "sgdisk"]), a_disk_inside_a_disk),
        Case::new(
            "XFS without the beginning of its image",
            Needs::tools(&["qemu-img", "mkfs.xfs", "xfs_repair"]),
            || {
                without_a_beginning("xfs", MIB);
            },
        ),
        Case::new("NTFS without the beginning of its image", Needs::tools(&["qemu-img", "mkntfs", "sgdisk"]), || {
            without_a_beginning("ntfs", 8 * MIB);
        }),
    ]);
}
