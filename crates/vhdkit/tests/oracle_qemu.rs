//! Images that QEMU made, with its own data in them: this library and QEMU must read the same bytes.
//!
//! QEMU is the judge where it is right; where it refuses its own images (bug Q2), the bytes are put in by hand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared module")]

mod model_support;

use std::fs::{File, OpenOptions as FileOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use model_support::{covers, extents, read};
use vhdkit::format::metadata::DiskType;
use vhdkit::image::{BlockDevice, ExtentKind, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, CheckReport, check};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit_testkit::foreign::{assert_success, qemu_img, run_tool, sha256_file};
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::harness::{Case, Needs, main_with};
use vhdkit_testkit::random::{RandomOptions, random_dirty_plan, random_image};
use vhdkit_testkit::rng::Rng;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// What tells that a file was changed: its length and time, and the bytes where hashing does not take long.
fn state(path: &Path) -> (u64, SystemTime, Option<String>) {
    let metadata = std::fs::metadata(path).unwrap();
    let sum = (metadata.len() < 256 * MIB).then(|| sha256_file(path).unwrap());
    (metadata.len(), metadata.modified().unwrap(), sum)
}

/// One image in a directory of its own.
struct Made {
    directory: tempfile::TempDir,
    path: PathBuf,
}

impl Made {
    fn create(size: u64, options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.vhdx");
        let size = size.to_string();
        let path_text = path.to_str().unwrap();
        assert_success(&qemu_img(&["create", "-q", "-f", "vhdx", "-o", options, path_text, &size]));
        Self { directory, path }
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Writes patterns: offset, length, byte.
    fn write(&self, writes: &[(u64, u64, u8)]) {
        let mut arguments = vec!["-f".to_owned(), "vhdx".to_owned()];
        for (offset, length, byte) in writes {
            arguments.extend(["-c".to_owned(), format!("write -q -P {byte} {offset} {length}")]);
        }
        arguments.push(self.text().to_owned());
        assert_success(&run_tool("qemu-io", &arguments));
    }

    fn open(&self) -> Image {
        OpenOptions::new().open_path(&self.path).unwrap()
    }

    fn check(&self) -> CheckReport {
        let storage = FileStorage::open(&self.path, FileAccess::Read, Sharing::Normal).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(storage);
        check(&storage, None, &CheckOptions::default(), &()).unwrap()
    }

    /// What QEMU reads, as a sparse raw file.
    fn raw(&self) -> PathBuf {
        let raw = self.directory.path().join("image.raw");
        assert_success(&qemu_img(&["convert", "-f", "vhdx", "-O", "raw", self.text(), raw.to_str().unwrap()]));
        raw
    }

    /// Compares everything with what QEMU reads, and finds no errors.
    fn agrees(&self, name: &str) -> Image {
        let before = state(&self.path);
        let report = self.check();
        assert_eq!(report.errors, 0, "{name}: {:#?}", report.findings);
        let image = self.open();
        same_as_raw(name, &image, &self.raw());
        assert_eq!(state(&self.path), before, "{name}: the image was changed");
        image
    }
}

/// Compares a disk with a raw file: data by its bytes, the rest by being zero there too, and random places.
fn same_as_raw(name: &str, image: &Image, raw: &Path) {
    let file = File::open(raw).unwrap();
    assert_eq!(file.metadata().unwrap().len(), image.size(), "{name}");
    let all = extents(image, 0..image.size());
    covers(name, &all, &(0..image.size()));
    let piece = |start: u64, end: u64, data: bool| {
        let mut truth = vec![0; (end - start) as usize];
        file.read_exact_at(&mut truth, start).unwrap();
        let same = if data { read(image, start, truth.len()) == truth } else { truth.iter().all(|byte| *byte == 0) };
        assert!(same, "{name}: {start:#x}..{end:#x}");
    };
    for extent in &all {
        let data = matches!(extent.kind, ExtentKind::Data { .. });
        let mut position = extent.start;
        while position < extent.end() {
            if !data {
                // A hole of the raw file needs no comparing.
                match rustix_next_data(&file, position) {
                    Some(next) if next < extent.end() => position = position.max(next),
                    _ => break,
                }
            }
            let end = (position + MIB).min(extent.end());
            piece(position, end, data);
            position = end;
        }
    }
    let mut rng = Rng::new(7);
    for _ in 0..60 {
        let length = rng.between(1, 100_000).min(image.size());
        let near = all[rng.below(all.len() as u64) as usize].end().saturating_sub(rng.below(length + 1));
        let start = if rng.chance(60) { near } else { rng.below(image.size()) }.min(image.size() - length);
        piece(start, start + length, true);
    }
}

/// Where the next data of a file starts.
fn rustix_next_data(file: &File, position: u64) -> Option<u64> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Data(position)).ok()
}

/// Writes all over a disk: at its ends, at the ends of blocks and chunks, unaligned, and at random.
fn scattered(size: u64, block: u64, seed: u64) -> Vec<(u64, u64, u8)> {
    let mut rng = Rng::new(seed);
    let chunk = 4 * GIB;
    let mut places = vec![0, block - 512, 2 * block + 512, size / 2 / 512 * 512, size.saturating_sub(512)];
    places.extend((1..=3).map(|number| number * chunk - 1024));
    places.extend((0..6).map(|_| rng.below(size) / 512 * 512));
    let mut writes = Vec::new();
    for place in places.into_iter().filter(|place| *place < size) {
        let length = (512 * rng.between(1, 60)).min(size - place);
        writes.push((place, length, rng.between(1, 255) as u8));
    }
    // Explicit zeros allocate too.
    writes.push((0, 512, 0));
    writes
}

fn dynamic_with_every_block_size() {
    for shift in 0_u32..=8 {
        let block = MIB << shift;
        for (size, zero) in [(3 * block + 5 * MIB + 512, "on"), (7 * block, "off")] {
            let made = Made::create(size, &format!("block_size={block},block_state_zero={zero}"));
            made.write(&scattered(size, block, u64::from(shift)));
            let name = format!("dynamic, blocks of {block:#x}, {zero}");
            let image = made.agrees(&name);
            assert_eq!((image.disk_type(), image.allocation_unit()), (DiskType::Dynamic, block), "{name}");
        }
    }
}

fn dynamic_over_chunks() {
    for (size, block) in [(9 * GIB + 3 * MIB + 512, MIB), (13 * GIB, 8 * MIB), (21 * GIB + 512, 64 * MIB)] {
        let made = Made::create(size, &format!("block_size={block}"));
        made.write(&scattered(size, block, size));
        made.agrees(&format!("dynamic of {size:#x}, blocks of {block:#x}"));
    }
}

fn fixed() {
    for (size, block) in
        [(3 * MIB + 512, MIB), (64 * MIB + 512, 8 * MIB), (300 * MIB, 256 * MIB), (5 * GIB + MIB, 32 * MIB)]
    {
        let made = Made::create(size, &format!("subformat=fixed,block_size={block}"));
        made.write(&scattered(size, block, size));
        let name = format!("fixed of {size:#x}, blocks of {block:#x}");
        assert_eq!(made.agrees(&name).disk_type(), DiskType::Fixed, "{name}");
    }
    let made = Made::create(100 * MIB + 512, "subformat=fixed,block_state_zero=off,block_size=8M");
    made.write(&scattered(100 * MIB + 512, 8 * MIB, 1));
    let image = made.agrees("really fixed");
    assert_eq!(made.check().summary.unwrap().blocks, [0, 0, 0, 0, 13, 0]);
    assert!(extents(&image, 0..image.size()).iter().all(|extent| matches!(extent.kind, ExtentKind::Data { .. })));
}

/// Q1: what QEMU calls fixed has no block until something is written, and then behind the space set aside.
fn qemu_q1_its_fixed_disks_are_read_by_their_bat() {
    let made = Made::create(64 * MIB, "subformat=fixed,block_size=8M");
    let before = std::fs::metadata(&made.path).unwrap().len();
    assert_eq!(made.check().summary.unwrap().blocks, [0, 0, 8, 0, 0, 0]);
    made.write(&[(20 * MIB, 65_536, 0x77)]);
    let image = made.agrees("fixed");
    assert!(std::fs::metadata(&made.path).unwrap().len() > before, "this QEMU has the bug no more");
    assert_eq!(image.disk_type(), DiskType::Fixed);
    assert_eq!(read(&image, 20 * MIB, 65_536), vec![0x77; 65_536]);
    let summary = made.check().summary.unwrap();
    assert_eq!(summary.blocks, [0, 0, 7, 0, 1, 0]);
    assert!(summary.leaked_bytes >= 64 * MIB, "{}", summary.leaked_bytes);
}

/// The file offset of a BAT entry, by the first region table and nothing of the library.
fn bat_offset(file: &File) -> u64 {
    let mut table = vec![0; 65_536];
    file.read_exact_at(&mut table, 0x3_0000).unwrap();
    let entry = table[16..].chunks(32).find(|entry| entry[..16] == Guid::BAT.0).unwrap();
    u64::from_le_bytes(entry[16..24].try_into().unwrap())
}

/// Q2: QEMU refuses the fixed disks over one chunk that it makes itself, so it cannot be the judge.
fn qemu_q2_its_fixed_disks_over_a_chunk_are_read() {
    let (size, block) = (10 * GIB + 3 * MIB, 32 * MIB);
    let made = Made::create(size, "subformat=fixed,block_state_zero=off,block_size=32M");
    let refused = !qemu_img(&["check", "-f", "vhdx", made.text()]).status.success();
    println!("QEMU refuses its own image: {refused}");
    let file = FileOptions::new().read(true).write(true).open(&made.path).unwrap();
    let bat = bat_offset(&file);
    let blocks = [0_u64, 127, 128, 129, 256, 319, 320];
    for number in blocks {
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, bat + 8 * (number + number / 128)).unwrap();
        let entry = u64::from_le_bytes(entry);
        assert_eq!(entry & 0xF_FFFF, 6, "block {number}");
        file.write_all_at(&[number as u8 + 1; 4096], (entry & !0xF_FFFF) + 8192).unwrap();
    }
    drop(file);
    let report = made.check();
    assert_eq!(report.errors, 0, "{:#?}", report.findings);
    let image = made.open();
    for number in 0..321 {
        let expected = if blocks.contains(&number) { number as u8 + 1 } else { 0 };
        let last = number == 320;
        assert_eq!(read(&image, number * block + 8192, 4096), [expected; 4096], "block {number}");
        assert_eq!(read(&image, number * block + if last { 2 * MIB } else { 31 * MIB }, 512), [0; 512]);
    }
    let all = extents(&image, 0..size);
    assert!(all.iter().all(|extent| matches!(extent.kind, ExtentKind::Data { .. })), "{all:x?}");
}

/// Checks patterns where they were written, zeros around them, and that QEMU reads the same.
fn huge(name: &str, made: &Made, size: u64, writes: &[(u64, u64, u8)]) {
    let image = made.open();
    assert_eq!(image.size(), size, "{name}");
    let start = Instant::now();
    let all = extents(&image, 0..size);
    covers(name, &all, &(0..size));
    println!("{name}: {} extents in {:?}", all.len(), start.elapsed());
    for (offset, length, byte) in writes {
        assert!(read(&image, *offset, *length as usize).iter().all(|other| other == byte), "{name}: {offset:#x}");
        if *offset > 0 {
            assert_eq!(read(&image, offset - 512, 512), [0; 512], "{name}: before {offset:#x}");
        }
        if offset + length < size {
            assert_eq!(read(&image, offset + length, 512), [0; 512], "{name}: behind {offset:#x}");
        }
    }
    let data: u64 =
        all.iter().filter(|extent| matches!(extent.kind, ExtentKind::Data { .. })).map(|extent| extent.length).sum();
    assert!(data <= (writes.len() as u64 * 2) * image.allocation_unit(), "{name}: {data} bytes of data");
    // QEMU finds the same patterns.
    let mut arguments = vec!["-r".to_owned(), "-f".to_owned(), "vhdx".to_owned()];
    for (offset, length, byte) in writes {
        arguments.extend(["-c".to_owned(), format!("read -q -P {byte} {offset} {length}")]);
    }
    arguments.push(made.text().to_owned());
    let output = run_tool("qemu-io", &arguments);
    assert_success(&output);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("verification failed"), "{name}");
}

fn sparse_disks_up_to_64_tib() {
    for (size, block, zero) in [
        (64 * TIB, 256 * MIB, "on"),
        (64 * TIB, 64 * MIB, "off"),
        (17 * TIB + 512, 32 * MIB, "on"),
        (2 * TIB + 3 * MIB, MIB, "off"),
    ] {
        let made = Made::create(size, &format!("block_size={block},block_state_zero={zero}"));
        let writes = [
            (0, 4096, 1),
            (4 * GIB - 4096, 8192, 2),
            (size / 2 / 512 * 512 + 1024, 512, 3),
            (TIB + 5 * GIB, 70_000 / 512 * 512, 4),
            (size - 512, 512, 5),
        ];
        made.write(&writes);
        let report = made.check();
        assert_eq!(report.errors, 0, "{:#?}", report.findings);
        huge(&format!("{size:#x} in blocks of {block:#x}, {zero}"), &made, size, &writes);
    }
}

/// 512 MiB of ZERO entries.
fn the_largest_bat_there_is() {
    let made = Made::create(64 * TIB, "block_size=1M");
    let writes = [(64 * TIB - 512, 512, 9), (33 * TIB, 4096, 8)];
    made.write(&writes);
    huge("64 TiB in blocks of 1 MiB", &made, 64 * TIB, &writes);
}

/// Dirty images: this library reads them as they are; QEMU replays a copy into the file and converts that.
fn dirty_images() {
    for seed in 0..25 {
        let options = RandomOptions { blocks_max: 6, virtual_size_max: 12 << 30, ..RandomOptions::for_qemu() };
        let mut built = random_image(3000 + seed, &options);
        let mut plan = random_dirty_plan(seed, &built);
        // QEMU replays from the start of the run and ranks runs by their first number, so these are beyond it.
        plan.older_run = false;
        plan.apply(&mut built);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.vhdx");
        built.write_to(&path).unwrap();
        let made = Made { directory, path };
        let image = made.open();
        assert!(image.layers()[0].replay().is_some(), "seed {seed}");
        let before = state(&made.path);
        let copy = made.directory.path().join("copy.vhdx");
        built.write_to(&copy).unwrap();
        let copy_text = copy.to_str().unwrap();
        assert_success(&qemu_img(&["check", "-q", "-r", "all", "-f", "vhdx", copy_text]));
        let raw = made.directory.path().join("image.raw");
        assert_success(&qemu_img(&["convert", "-f", "vhdx", "-O", "raw", copy_text, raw.to_str().unwrap()]));
        same_as_raw(&format!("seed {seed}"), &image, &raw);
        // The copy, clean now, is the same disk.
        let replayed = OpenOptions::new().open_path(&copy).unwrap();
        assert!(replayed.layers()[0].replay().is_none(), "seed {seed}");
        same_as_raw(&format!("seed {seed}, replayed"), &replayed, &raw);
        assert_eq!(state(&made.path), before, "seed {seed}: the dirty image was changed");
    }
}

fn main() {
    let img = || Needs::tools(&["qemu-img"]);
    let both = || Needs::tools(&["qemu-img", "qemu-io"]);
    main_with(vec![
        Case::new("dynamic_with_every_block_size", both(), dynamic_with_every_block_size),
        Case::new("dynamic_over_chunks", both(), dynamic_over_chunks),
        Case::new("fixed", both(), fixed),
        Case::new(
            "qemu_q1_its_fixed_disks_are_read_by_their_bat",
            both(),
            qemu_q1_its_fixed_disks_are_read_by_their_bat,
        ),
        Case::new(
            "qemu_q2_its_fixed_disks_over_a_chunk_are_read",
            img(),
            qemu_q2_its_fixed_disks_over_a_chunk_are_read,
        ),
        Case::new("sparse_disks_up_to_64_tib", both(), sparse_disks_up_to_64_tib),
        Case::new("the_largest_bat_there_is", both(), the_largest_bat_there_is),
        Case::new("dirty_images", img(), dirty_images),
    ]);
}
