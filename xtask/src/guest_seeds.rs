//! Seeds for the fuzz target `filesystems`: disks that the formatters of others made, in the form that `fuzz/src/lib.rs`
//! describes.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use crate::shell::{self, Outcome, find};

/// KiB of a disk, a tool that has to be there, what a shell runs; `DISK` is the file.
const RECIPES: &[(u64, &str, &str)] = &[
    (2048, "mke2fs", "mke2fs -q -F -t ext2 -b 1024 -N 16 DISK"),
    (8192, "mke2fs", "mke2fs -q -F -t ext3 -b 1024 -N 64 DISK"),
    (16384, "mke2fs", "mke2fs -q -F -t ext4 -b 1024 -N 64 DISK"),
    (20480, "mke2fs", "mke2fs -q -F -t ext4 -b 1024 -g 2048 -G 4 -N 64 -O ^metadata_csum,uninit_bg DISK"),
    (32768, "mke2fs", "mke2fs -q -F -t ext4 -b 4096 -N 64 -O bigalloc,^has_journal -C 16384 DISK"),
    (20480, "mke2fs", "mke2fs -q -F -t ext4 -b 1024 -g 1024 -N 64 -O meta_bg,^resize_inode,^flex_bg,mmp DISK"),
    (8192, "mkntfs", "mkntfs -q -f -F -p 0 -H 255 -S 63 -c 4096 DISK"),
    (4096, "mkntfs", "mkntfs -q -f -F -p 0 -H 255 -S 63 -c 512 DISK"),
    (1440, "mkfs.fat", "mkfs.fat -F 12 DISK"),
    (20480, "mkfs.fat", "mkfs.fat -F 16 -s 2 DISK"),
    (40960, "mkfs.fat", "mkfs.fat -F 32 -s 1 DISK"),
    (8192, "mkfs.exfat", "mkfs.exfat -c 4K DISK"),
    (307_200, "mkfs.xfs", "mkfs.xfs -q -f DISK"),
    (307_200, "mkfs.xfs", "mkfs.xfs -q -f -m crc=0 DISK"),
    (8192, "sgdisk", "sgdisk -n 1:2048:+2M -n 2:0:+1M -t 2:8e00 DISK"),
    (8192, "sgdisk", "sgdisk -n 1:2048:+2M DISK && mkfs.fat -F 12 --offset 2048 DISK 2048"),
    (
        20480,
        "parted",
        "parted -s DISK mklabel msdos mkpart primary 1MiB 3MiB mkpart extended 3MiB 19MiB mkpart logical 4MiB 6MiB \
         mkpart logical 7MiB 9MiB",
    ),
    (1024, "mkswap", "mkswap DISK"),
];

/// Longest input that is kept.
const SEED_BYTES_MAX: usize = 30 << 10;
/// Longest run of bytes that is kept whole, and what is kept of a longer one.
const RUN_BYTES_MAX: usize = 2048;
const RUN_BYTES_KEPT: usize = 512;
/// Segments start at multiples of this.
const UNIT: usize = 16;
/// Shortest row of equal bytes that is written as one.
const FILL_UNITS_MIN: usize = 4;
/// Longest of these.
const FILL_UNITS_MAX: usize = 0x7fff;
/// Bytes that are looked at together.
const CHUNK_BYTES: usize = 64 << 10;

/// The disks of all tools that are there, and one that needs none.
pub(crate) fn disks() -> Outcome<Vec<Vec<u8>>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk");
    // A table with one partition, and its signature.
    let mut seeds = vec![[&[0, 16, 0][..], &segment(28, &boot_sector())].concat()];
    for (kib, tool, recipe) in RECIPES {
        if find(tool).is_none() {
            eprintln!("no seed by {tool}, which is not there");
            continue;
        }
        let file = File::create(&path)?;
        file.set_len(kib << 10)?;
        let script = recipe.replace("DISK", &shell_word(&path));
        let mut command = Command::new("sh");
        let paths = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{paths}:/usr/sbin:/sbin")).args(["-c", &script]);
        // A formatter of another version may want other options: its seed is missing then, and nothing else.
        match shell::output(&mut command).and_then(|_| packed(&path, *kib)) {
            Ok(seed) if seed.len() <= SEED_BYTES_MAX => seeds.push(seed),
            Ok(seed) => eprintln!("no seed by \"{recipe}\": it would have {} bytes", seed.len()),
            Err(error) => eprintln!("no seed by \"{recipe}\": {error}"),
        }
    }
    Ok(seeds)
}

/// The first sector of a disk with one partition, from its byte 448 on: the rest of the entry, and the signature.
fn boot_sector() -> Vec<u8> {
    const ENTRY: [u8; 14] = [0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 64, 0, 0, 0];
    [&ENTRY[..], &[0; 48], &[0x55, 0xaa]].concat()
}

fn shell_word(path: &Path) -> String {
    format!("'{}'", path.display())
}

/// A disk as an input.
fn packed(path: &Path, kib: u64) -> Outcome<Vec<u8>> {
    let file = File::open(path)?;
    let units = u16::try_from((kib << 10).div_ceil(64 << 10))?;
    let mut seed = [&[0][..], &units.to_le_bytes()].concat();
    let mut buffer = vec![0; CHUNK_BYTES];
    let length = file.metadata()?.len();
    let mut position = 0;
    while position < length {
        let count = usize::try_from((length - position).min(CHUNK_BYTES as u64))?;
        let chunk = buffer.get_mut(..count).ok_or("a chunk is too long")?;
        file.read_exact_at(chunk, position)?;
        let first = u32::try_from(position / UNIT as u64)?;
        if chunk.iter().any(|byte| *byte != 0) {
            pack_chunk(chunk, first, &mut seed);
        }
        position += count as u64;
    }
    Ok(seed)
}

/// Adds what is not zero in a chunk: rows of one byte, and runs of others.
fn pack_chunk(chunk: &[u8], first: u32, seed: &mut Vec<u8>) {
    let units: Vec<&[u8]> = chunk.chunks(UNIT).collect();
    let mut index = 0;
    let mut run: Option<(usize, Vec<u8>)> = None;
    let flush = |run: &mut Option<(usize, Vec<u8>)>, seed: &mut Vec<u8>| {
        if let Some((start, mut bytes)) = run.take() {
            if bytes.len() > RUN_BYTES_MAX {
                bytes.truncate(RUN_BYTES_KEPT);
            }
            seed.extend(segment(first + u32::try_from(start).unwrap_or_default(), &bytes));
        }
    };
    while let Some(unit) = units.get(index) {
        let byte = unit.first().copied().unwrap_or_default();
        let same = units.iter().skip(index).take_while(|unit| unit.iter().all(|other| *other == byte)).count();
        if byte == 0 && same > 0 {
            flush(&mut run, seed);
            index += same;
        } else if same >= FILL_UNITS_MIN {
            flush(&mut run, seed);
            let count = u16::try_from(same.min(FILL_UNITS_MAX)).unwrap_or_default();
            seed.extend((first + u32::try_from(index).unwrap_or_default()).to_le_bytes());
            seed.extend((count | 0x8000).to_le_bytes());
            seed.push(byte);
            index += same;
        } else {
            run.get_or_insert_with(|| (index, Vec::new())).1.extend_from_slice(unit);
            index += 1;
        }
    }
    flush(&mut run, seed);
}

/// Bytes at an offset in units of 16.
fn segment(unit: u32, bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or_default();
    [&unit.to_le_bytes()[..], &length.to_le_bytes(), bytes].concat()
}
