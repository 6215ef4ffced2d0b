//! Seeds for the fuzz targets, from the testkit's image builder: what `fuzz/src/lib.rs` describes.

use std::fs;
use std::path::Path;

use vhdkit_testkit::damage;
use vhdkit_testkit::dirty::Stale;
use vhdkit_testkit::random::{RandomOptions, random_dirty_plan, random_image};
use vhdkit_testkit::spec::LocatorSpec;
use vhdkit_testkit::{BuiltImage, Guid, Rng};

use crate::shell::Outcome;

/// Images that seeds are made from.
const IMAGES: u64 = 60;
/// Longest seed: a short input is mutated where it matters more often.
const SEED_BYTES_MAX: usize = 24 << 10;
/// Longest run of bytes that is kept whole: a structure fits, the pattern in a block does not.
const RUN_BYTES_MAX: usize = 1024;
/// What is kept of a longer run.
const RUN_BYTES_KEPT: usize = 64;
/// How much of each MiB of a block is looked at.
const BLOCK_BYTES_LOOKED_AT: u64 = 8192;
/// Segments start at multiples of this.
const UNIT: usize = 16;

/// Writes the seeds of a target; says how many there are.
pub(crate) fn write(target: &str, folder: &Path) -> Outcome<usize> {
    let seeds: Vec<Vec<u8>> = match target {
        "open" => images().filter_map(|image| chain(&image)).collect(),
        "recover" => broken(),
        "decode" => images().flat_map(|image| structures(&image)).collect(),
        "locator" => locators(),
        "model" => programs(),
        "nbd" => conversations(),
        "filesystems" => crate::guest_seeds::disks()?,
        "apply" => increments(),
        other => return Err(format!("there are no seeds for \"{other}\"").into()),
    };
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(folder.join(format!("{number:04}")), seed)?;
    }
    Ok(seeds.len())
}

/// Small images of every kind, every third one dirty, some with a parent.
fn images() -> impl Iterator<Item = BuiltImage> {
    (0..IMAGES).map(|seed| {
        let options = RandomOptions {
            block_size: (seed % 4 != 0).then_some(1 << 20),
            virtual_size_max: 64 << 20,
            blocks_max: 6,
            junk: false,
            ..RandomOptions::chain(1 + (seed % 2) as usize) // 0 or 1: fits
        };
        let mut image = random_image(seed, &options);
        if seed % 3 == 0 {
            random_dirty_plan(seed, &image).with(|plan| plan.stale = Stale::Zeros).apply(&mut image);
        }
        image
    })
}

/// Small images, each broken in a few of the ways that the testkit knows; the parent's place is that of an undo record.
fn broken() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (number, image) in images().enumerate() {
        for damage in damage::all(&image).into_iter().skip(number % 9).step_by(9) {
            let mut image = image.clone();
            image.parent = None;
            damage.apply(&mut image.file);
            seeds.extend(chain(&image));
        }
    }
    seeds
}

/// The input of `open` for an image and its parent; `None` when it would be too long.
fn chain(image: &BuiltImage) -> Option<Vec<u8>> {
    let child = sparse(image)?;
    let parent = match &image.parent {
        Some(parent) => sparse(parent)?,
        None => Vec::new(),
    };
    let mut input = u16::try_from(child.len()).ok()?.to_le_bytes().to_vec();
    input.extend_from_slice(&child);
    input.extend_from_slice(&parent);
    (input.len() <= SEED_BYTES_MAX).then_some(input)
}

/// A file as segments: the structures whole, and a little of each block.
fn sparse(image: &BuiltImage) -> Option<Vec<u8>> {
    let (file, layout) = (&image.file, &image.layout);
    let structures = [
        (0, 1 << 20),
        (layout.log, u64::from(layout.log_length)),
        (layout.metadata, u64::from(layout.metadata_length)),
        (layout.bat, u64::from(layout.bat_length)),
    ];
    let units = u16::try_from(file.len().div_ceil(4096)).ok()?;
    let cut = u64::from(units) * 4096 - file.len(); // below 4096
    let mut input = vec![u8::try_from(cut.min(7)).ok()? << 5];
    input.extend_from_slice(&units.to_le_bytes());
    for (start, bytes) in file.segments() {
        let inside = structures.iter().any(|(offset, length)| start >= *offset && start < offset + length);
        if !inside && start % (1 << 20) >= BLOCK_BYTES_LOOKED_AT {
            continue;
        }
        for (offset, run) in runs(bytes) {
            let kept =
                if run.len() > RUN_BYTES_MAX || !inside { run.get(..RUN_BYTES_KEPT.min(run.len()))? } else { run };
            let position = u32::try_from((start + offset as u64) / UNIT as u64).ok()?;
            input.extend_from_slice(&position.to_le_bytes());
            input.extend_from_slice(&u16::try_from(kept.len()).ok()?.to_le_bytes());
            input.extend_from_slice(kept);
        }
    }
    Some(input)
}

/// The parts of a page that are not zero, in whole units.
fn runs(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut runs = Vec::new();
    let mut begun: Option<usize> = None;
    for (number, unit) in bytes.chunks(UNIT).enumerate() {
        let offset = number * UNIT;
        match (begun, unit.iter().any(|byte| *byte != 0)) {
            (None, true) => begun = Some(offset),
            (Some(start), false) => {
                runs.extend(bytes.get(start..offset).map(|run| (start, run)));
                begun = None;
            }
            _ => {}
        }
    }
    if let Some(start) = begun {
        runs.extend(bytes.get(start..).map(|run| (start, run)));
    }
    runs
}

/// The inputs of `decode` for each structure of an image.
fn structures(image: &BuiltImage) -> Vec<Vec<u8>> {
    let (file, layout) = (&image.file, &image.layout);
    let seed = |which: u8, parts: &[Vec<u8>]| -> Vec<u8> {
        let mut input = vec![which, 0];
        parts.iter().for_each(|part| input.extend_from_slice(part));
        input
    };
    let ring = (0..8).flat_map(|sector| {
        let start = layout.log + sector * 4096;
        [file.read(start, 88), file.read(start + 4088, 8)]
    });
    let entries: Vec<Vec<u8>> =
        (0..4_u64).map(|block| [block.to_le_bytes().to_vec(), file.read(layout.bat + block * 8, 8)].concat()).collect();
    let shape =
        [vec![0, u8::from(image.parent.is_some()) * 2], image.model.virtual_size.to_le_bytes().to_vec()].concat();
    vec![
        seed(0, &[file.read(layout.header(0), 80), file.read(layout.header(1), 80)]),
        seed(1, &[file.read(layout.region_table(0), 16 + 32 * 4)]),
        seed(2, &[file.read(layout.metadata, 32 * 12), file.read(layout.metadata + 65536, 1024)]),
        seed(3, &ring.collect::<Vec<_>>()),
        seed(4, &[shape.clone(), file.len().to_le_bytes().to_vec(), entries.concat()]),
        seed(5, &[shape, vec![7; 24]]),
        seed(6, &[file.read(0, 520)]),
    ]
}

/// Locators with every key, and with paths of every kind.
fn locators() -> Vec<Vec<u8>> {
    const PATHS: [&str; 8] = [
        r".\parent.vhdx",
        r"..\..\parent.vhdx",
        r"\\?\C:\disks\parent.vhdx",
        r"c:parent.vhdx",
        r"\\?\Volume{01234567-89ab-cdef-0123-456789abcdef}\disks\parent.vhdx",
        r"\\server\share\parent.vhdx",
        r"\\?\UNC\server\share\parent.vhdx",
        "sub/\u{1f4be}.vhdx",
    ];
    let whole = PATHS.iter().zip(0..).map(|(path, seed)| {
        let locator = LocatorSpec::new(Guid::seeded(seed), path).pair("absolute_win32_path", path);
        locator
            .pair("volume_path", path)
            .pair("parent_linkage2", &Guid::ZERO.braced())
            .pair("unknown", "value")
            .encode()
    });
    whole.chain([LocatorSpec::new(Guid::seeded(9), "x").without("relative_path").encode()]).collect()
}

/// Programs on every kind of image that `model` has, of operations drawn at random.
fn programs() -> Vec<Vec<u8>> {
    const OPERATION_BYTES: u64 = 4;
    (0..96)
        .map(|seed| {
            let mut rng = Rng::new(seed);
            let mut program = vec![u8::try_from(seed % 32).unwrap_or_default()];
            let bytes = OPERATION_BYTES * rng.between(1, 60);
            program.extend(rng.bytes(usize::try_from(bytes).unwrap_or_default()));
            program
        })
        .collect()
}

/// Conversations with a server, in the form that `fuzz/fuzz_targets/nbd.rs` describes.
#[expect(clippy::big_endian_bytes, reason = "the protocol is big-endian")]
fn conversations() -> Vec<Vec<u8>> {
    let option = |kind: u32, data: &[u8]| {
        let length = u32::try_from(data.len()).unwrap_or_default();
        [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
    };
    let named = |rest: &[u8]| [&4_u32.to_be_bytes(), b"disk".as_slice(), rest].concat();
    let query = |text: &[u8]| {
        let length = u32::try_from(text.len()).unwrap_or_default();
        named(&[&1_u32.to_be_bytes(), length.to_be_bytes().as_slice(), text].concat())
    };
    let options = [
        option(8, &[]),
        option(11, &[]),
        option(3, &[]),
        option(9, &named(&0_u32.to_be_bytes())),
        option(10, &query(b"base:allocation")),
        option(10, &query(b"qemu:allocation-depth")),
        option(6, &named(&[0, 3, 0, 1, 0, 2, 0, 3])),
        option(5, &[]),
        option(7, &named(&[0, 0])),
        option(1, b"disk"),
        option(2, &[]),
    ];
    let flags = 3_u32.to_be_bytes();
    let mut seeds = Vec::new();
    for kind in [0, 2] {
        let whole = [[kind, 1].as_slice(), &flags, &options.concat()].concat();
        seeds.push(whole);
        for option in &options {
            seeds.push([[kind, 1].as_slice(), &flags, option].concat());
        }
    }
    for command in 0..=8_u16 {
        for mode in 0..3_u8 {
            let magic = if mode == 2 { 0x21e4_1c71_u32 } else { 0x2560_9513 };
            let header =
                [&magic.to_be_bytes(), [0; 2].as_slice(), &command.to_be_bytes(), &[7; 8], &[0; 7], &[8]].concat();
            let length: &[u8] = if mode == 2 { &[0, 0, 0, 0, 0, 0, 16, 0] } else { &[0, 0, 16, 0] };
            seeds.push([[1, mode, 3, 1].as_slice(), &[0; 7], &[1], &header, length].concat());
        }
    }
    // Requests in short form: command, flags, offset, length.
    let program: Vec<u8> = (0..=7).flat_map(|command| [command, 0, 0, 16, command, 0, 32, 0]).collect();
    seeds.extend((0..8).map(|mode| [[3, mode].as_slice(), &program].concat()));
    seeds
}

/// Increments of zeros and of data, for images and raw disks, in the form that `fuzz/fuzz_targets/apply.rs` describes: what
/// it puts right is left out.
fn increments() -> Vec<Vec<u8>> {
    const DISK: u64 = 1 << 20;
    (0..48_u8)
        .map(|seed| {
            let mut rng = Rng::new(u64::from(seed));
            let mut input = vec![if seed % 4 == 3 { 1 << (seed % 5) } else { 0 }, seed % 8];
            let mut header = [0; 256];
            header.iter_mut().skip(40).take(16).for_each(|byte| *byte = seed + 1); // the identity: anything but zero
            header.iter_mut().skip(36).take(1).for_each(|byte| *byte = seed / 8 % 2); // checksums of the base
            input.extend_from_slice(&header);
            let mut position = rng.below(DISK / 4);
            for _ in 0..rng.below(6) {
                let is_data = rng.below(2) == 0;
                let length = if is_data { rng.between(1, 600) } else { rng.between(1, DISK / 8) };
                let mut record = if is_data { *b"data" } else { *b"zero" }.to_vec();
                record.resize(32, 0);
                record.extend_from_slice(&position.to_le_bytes());
                record.extend_from_slice(&length.to_le_bytes());
                record.resize(64, 0);
                input.extend_from_slice(&record);
                if is_data {
                    input.extend(rng.bytes(usize::try_from(length).unwrap_or_default()));
                }
                position += length + rng.below(4096);
            }
            input.extend_from_slice(b"last");
            input.resize(input.len() + 60, 0);
            input
        })
        .collect()
}
