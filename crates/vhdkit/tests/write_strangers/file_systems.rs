//! File systems are written through us in pieces and in any order, from several threads, into a disk and then, changed,
//! into a child of it: other readers get the same bytes, and the file system's own checker is content.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;

use rustix::fs::{SeekFrom, seek};
use vhdkit::image::{BlockDevice as _, Image};
use vhdkit::ops::convert::{ConvertOptions, Destination, Source, convert};
use vhdkit::ops::create::{CreateOptions, NewParent, create};
use vhdkit_testkit::foreign::{assert_success, run_tool, sha256_file, sha256_reader};
use vhdkit_testkit::harness::{Case, Needs};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sparse::is_zero;

use crate::support::{MIB, complaints, open, open_for_writing, qemu_check, qemu_to_raw, same_as_raw, text, unlocked};

const THREADS: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ext4,
    Ntfs,
}

impl Kind {
    fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["qemu-img", "mkfs.ext4", "debugfs", "e2fsck", "dumpe2fs"],
            Self::Ntfs => &["qemu-img", "mkntfs", "ntfscp", "ntfsfix"],
        }
    }

    /// The file system's own checker, which must not change anything.
    fn check(self, raw: &Path) {
        let before = sha256_file(raw).unwrap();
        let output = match self {
            Self::Ext4 => run_tool("e2fsck", &["-fn", text(raw)]),
            Self::Ntfs => run_tool("ntfsfix", &["-n", text(raw)]),
        };
        assert_success(&output);
        assert_eq!(sha256_file(raw).unwrap(), before, "{} was repaired", raw.display());
    }
}

/// Files of random bytes, some of them with holes.
fn files(rng: &mut Rng, directory: &Path, prefix: &str, count: u64) -> Vec<PathBuf> {
    std::fs::create_dir_all(directory).unwrap();
    let make = |number| {
        let path = directory.join(format!("{prefix}{number}"));
        let file = File::create(&path).unwrap();
        let length = match rng.below(10) {
            0 => 0,
            1 => rng.between(100_000, 900_000),
            _ => rng.between(1, 60_000),
        };
        let hole = if rng.below(5) == 0 { 70_000 } else { 0 };
        file.write_all_at(&rng.bytes(length as usize), hole).unwrap();
        path
    };
    (0..count).map(make).collect()
}

/// Bytes of a block, and how many of them are free.
fn free_blocks(raw: &Path) -> (u64, u64) {
    let output = run_tool("dumpe2fs", &["-h", text(raw)]);
    assert_success(&output);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |name: &str| {
        let line =
            told.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {told}"));
        line.trim().parse().unwrap()
    };
    (number("Block size:"), number("Free blocks:"))
}

/// Fills an ext4 file system until hardly a block is left.
fn fill_up(rng: &mut Rng, directory: &Path, raw: &Path, name: &str) {
    // What extents need of their own is not known before; so in two steps.
    for (step, spare) in [(1, 64), (2, 2)] {
        let (block, free) = free_blocks(raw);
        let path = directory.join(format!("{name}{step}"));
        std::fs::write(&path, rng.bytes(((free - spare) * block) as usize)).unwrap();
        let command = format!("write {} {name}{step}", text(&path));
        assert_success(&run_tool("debugfs", &["-w", "-R", &command, text(raw)]));
    }
    let (_, free) = free_blocks(raw);
    assert!(free <= 8, "{free} blocks are free");
}

fn ext4(rng: &mut Rng, directory: &Path) -> (PathBuf, PathBuf) {
    let (first, second) = (directory.join("a.raw"), directory.join("b.raw"));
    let (source, more) = (directory.join("source"), directory.join("more"));
    files(rng, &source, "f", 250);
    files(rng, &source.join("deep/er"), "g", 50);
    File::create(&first).unwrap().set_len(64 * MIB + 4096).unwrap();
    assert_success(&run_tool("mkfs.ext4", &["-q", "-F", "-d", text(&source), text(&first)]));
    fill_up(rng, directory, &first, "full");
    assert_success(&run_tool("cp", &["--sparse=always", text(&first), text(&second)]));
    // What changes: files go, others come.
    let mut commands = "rm full1\n".to_owned();
    for number in 0..80 {
        commands += &format!("rm f{}\n", number * 3);
    }
    commands += "mkdir new\n";
    for path in files(rng, &more, "h", 120) {
        commands += &format!("write {} new/{}\n", text(&path), path.file_name().unwrap().to_str().unwrap());
    }
    let list = directory.join("commands");
    std::fs::write(&list, commands).unwrap();
    assert_success(&run_tool("debugfs", &["-w", "-f", text(&list), text(&second)]));
    fill_up(rng, directory, &second, "again");
    (first, second)
}

fn ntfs(rng: &mut Rng, directory: &Path) -> (PathBuf, PathBuf) {
    let (first, second) = (directory.join("a.raw"), directory.join("b.raw"));
    let names = files(rng, &directory.join("source"), "f", 200);
    let (old, new) = names.split_at(130);
    File::create(&first).unwrap().set_len(48 * MIB + 512 * 7).unwrap();
    assert_success(&run_tool("mkntfs", &["-F", "-Q", "-q", text(&first)]));
    let copy =
        |raw: &Path, from: &Path, to: &str| assert_success(&run_tool("ntfscp", &["-q", text(raw), text(from), to]));
    for path in old {
        copy(&first, path, path.file_name().unwrap().to_str().unwrap());
    }
    assert_success(&run_tool("cp", &["--sparse=always", text(&first), text(&second)]));
    // What changes: new files, and other content for some old ones.
    for (number, path) in new.iter().enumerate() {
        let name = if number % 2 == 0 { path } else { &old[number] };
        copy(&second, path, name.file_name().unwrap().to_str().unwrap());
    }
    (first, second)
}

fn make(path: &Path, options: &CreateOptions) {
    File::create(path).unwrap();
    create(&unlocked(path, true), options, &()).unwrap();
}

fn parent_of(base: &Image) -> NewParent {
    NewParent {
        data_write_guid: base.layers()[0].headers().current.data_write_guid,
        logical_sector_size: base.logical_sector_size(),
        physical_sector_size: base.physical_sector_size(),
        disk_size: base.size(),
        disk_id: base.disk_id().unwrap(),
        relative_path: ".\\base.vhdx".to_owned(),
        absolute_path: None,
    }
}

/// A part of the disk, and whether the raw file says that it is a hole.
#[derive(Clone, Debug)]
struct Job {
    range: Range<u64>,
    hole: bool,
    seed: u64,
}

/// The disk in pieces of random size, which end anywhere, also within a sector.
fn jobs(rng: &mut Rng, raw: &File, size: u64) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut position = 0;
    while position < size {
        let data = seek(raw, SeekFrom::Data(position)).unwrap_or(size);
        let hole = data > position;
        let end = if hole { data } else { seek(raw, SeekFrom::Hole(position)).unwrap_or(size).min(size) };
        while position < end {
            let longest = if hole { 6 * MIB } else { 300_000 };
            let length = match rng.below(4) {
                0 => rng.between(1, longest),
                1 => 4096,
                _ => 512 * rng.between(1, longest / 512),
            };
            let next = (position + length).min(end);
            jobs.push(Job { range: position..next, hole, seed: rng.next_u64() });
            position = next;
        }
    }
    rng.shuffle(&mut jobs);
    jobs
}

/// Does one piece. `under` is what shows where nothing is written.
fn work(image: &Image, raw: &File, under: Option<&File>, job: &Job) {
    let mut rng = Rng::new(job.seed);
    let range = &job.range;
    let length = (range.end - range.start) as usize;
    let content = |file: &File| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, range.start).unwrap();
        bytes
    };
    let (bytes, below) = (content(raw), under.map_or_else(|| vec![0; length], content));
    if bytes == below && rng.below(5) != 0 {
        if job.hole && under.is_none() {
            image.discard(range.clone()).unwrap();
        }
        return;
    }
    if job.hole || is_zero(&bytes) {
        // Something that was there before is given back.
        let junk = rng.bytes(length.min(5000));
        image.write_at(&junk, range.start).unwrap();
        image.discard(range.clone()).unwrap();
        return image.write_zeroes(range.clone(), rng.below(4) != 0).unwrap();
    }
    match rng.below(30) {
        0 => image.write_through_at(&bytes, range.start).unwrap(),
        _ => image.write_at(&bytes, range.start).unwrap(),
    }
    if rng.below(25) == 0 {
        image.flush().unwrap();
    }
}

fn write_all(path: &Path, raw: &Path, under: Option<&Path>, rng: &mut Rng) {
    let image = open_for_writing(path);
    let raw = File::open(raw).unwrap();
    let under = under.map(|under| File::open(under).unwrap());
    let jobs = Mutex::new(jobs(rng, &raw, image.size()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().unwrap().pop();
                    let Some(job) = job else { break };
                    work(&image, &raw, under.as_ref(), &job);
                }
            });
        }
    });
    image.close().unwrap();
}

/// A disk that holds the first raw file, and a child of it that holds the second.
struct Through {
    directory: tempfile::TempDir,
    raw: [PathBuf; 2],
    disk: [PathBuf; 2],
}

impl Through {
    fn write(kind: Kind, blocks: [u32; 2]) -> Self {
        let mut rng = Rng::new(blocks[0].into());
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = match kind {
            Kind::Ext4 => ext4(&mut rng, directory.path()),
            Kind::Ntfs => ntfs(&mut rng, directory.path()),
        };
        kind.check(&first);
        kind.check(&second);
        let disk = ["base.vhdx", "child.vhdx"].map(|name| directory.path().join(name));
        let size = first.metadata().unwrap().len();
        let options = CreateOptions { block_size: Some(blocks[0]), ..CreateOptions::new(size) };
        make(&disk[0], &options);
        write_all(&disk[0], &first, None, &mut rng);
        let base = open(&disk[0]);
        let parent = parent_of(&base);
        drop(base);
        let before = sha256_file(&disk[0]).unwrap();
        make(&disk[1], &CreateOptions { block_size: Some(blocks[1]), ..CreateOptions::child(parent) });
        write_all(&disk[1], &second, Some(&first), &mut rng);
        assert_eq!(sha256_file(&disk[0]).unwrap(), before, "the parent was touched");
        for path in &disk {
            assert_eq!(complaints(path), BTreeSet::new(), "{}", path.display());
        }
        Self { directory, raw: [first, second], disk }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The same disk as the raw file, and healthy.
    fn same(&self, kind: Kind, which: usize, raw: &Path) {
        assert_eq!(sha256_file(raw).unwrap(), sha256_file(&self.raw[which]).unwrap(), "{}", raw.display());
        kind.check(raw);
    }
}

fn convert_to_raw(disk: &Path, raw: &Path) {
    File::create(raw).unwrap();
    let storage = unlocked(raw, true);
    convert(Source::Disk(&open(disk)), Destination::Raw { storage: &storage }, &ConvertOptions::default(), &())
        .unwrap();
}

fn a_file_system_goes_through_us(kind: Kind, blocks: [u32; 2]) {
    let through = Through::write(kind, blocks);
    for which in 0..2 {
        same_as_raw(&open(&through.disk[which]), &through.raw[which]).unwrap();
        let raw = through.file("ours.raw");
        convert_to_raw(&through.disk[which], &raw);
        through.same(kind, which, &raw);
    }
    // QEMU knows no differencing disks, so it gets the child as one file.
    let flat = through.file("flat.vhdx");
    File::create(&flat).unwrap();
    let (storage, layout) = (unlocked(&flat, true), CreateOptions::default());
    let target = Destination::Vhdx { storage: &storage, layout: &layout, spill: None };
    convert(Source::Disk(&open(&through.disk[1])), target, &ConvertOptions::default(), &()).unwrap();
    for (which, path) in [&through.disk[0], &flat].into_iter().enumerate() {
        let raw = through.file("theirs.raw");
        qemu_check(path).unwrap();
        qemu_to_raw(path, &raw).unwrap();
        through.same(kind, which, &raw);
    }
}

fn seven_zip_reads_it() {
    let through = Through::write(Kind::Ext4, [2 << 20, 1 << 20]);
    for which in 0..2 {
        let output: Output = run_tool("7z", &["x", "-so", "-tvhdx", text(&through.disk[which])]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let sum = sha256_reader(&mut output.stdout.as_slice()).unwrap();
        assert_eq!(sum, sha256_file(&through.raw[which]).unwrap(), "{}", through.disk[which].display());
    }
}

/// A mounted directory.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run_tool("umount", &[text(&self.0)]);
    }
}

fn libvhdi_reads_it() {
    let through = Through::write(Kind::Ext4, [1 << 20, 1 << 20]);
    let point = through.file("mount");
    std::fs::create_dir(&point).unwrap();
    assert_success(&run_tool("vhdimount", &[text(&through.disk[0]), text(&point)]));
    let mounted = Mounted(point);
    assert_eq!(sha256_file(&mounted.0.join("vhdi1")).unwrap(), sha256_file(&through.raw[0]).unwrap());
}

pub(crate) fn cases() -> Vec<Case> {
    let with = |kind: Kind, more: &[&str]| Needs::tools(&[kind.tools(), more].concat());
    let mut cases = Vec::new();
    for (name, kind, blocks) in [
        ("ext4_goes_through_us", Kind::Ext4, [1 << 20, 2 << 20]),
        ("ext4_goes_through_large_blocks", Kind::Ext4, [32 << 20, 1 << 20]),
        ("ntfs_goes_through_us", Kind::Ntfs, [2 << 20, 1 << 20]),
    ] {
        cases.push(Case::new(name, with(kind, &[]), move || a_file_system_goes_through_us(kind, blocks)));
    }
    cases.push(Case::new("seven_zip_reads_what_went_through", with(Kind::Ext4, &["7z"]), seven_zip_reads_it));
    // The case is absent where nothing can be mounted this way, which is no tool that could be installed.
    if File::options().read(true).write(true).open("/dev/fuse").is_ok() {
        let needs = with(Kind::Ext4, &["vhdimount", "umount"]).and_root();
        cases.push(Case::new("libvhdi_reads_what_went_through", needs, libvhdi_reads_it));
    }
    cases
}
