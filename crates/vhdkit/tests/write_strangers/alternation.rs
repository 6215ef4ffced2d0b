//! QEMU and we write to the same file in turn, each opening and closing it; a plain array says what it has to hold.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use vhdkit::image::{BlockDevice as _, Image};
use vhdkit::ops::create::{CreateOptions, NewDiskType, create};
use vhdkit_testkit::foreign::{assert_success, qemu_img, run_tool};
use vhdkit_testkit::harness::{Case, Needs};
use vhdkit_testkit::rng::Rng;

use crate::array::Array;
use crate::support::{
    MIB, complaints, open, open_for_writing, qemu_check, qemu_to_raw, read, same_as_raw, text, unlocked,
};

const ROUNDS: u64 = 10;

/// Who makes the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    Qemu,
    Us,
}

fn make(path: &Path, maker: Maker, size: u64, block: u64, fixed: bool) {
    if maker == Maker::Qemu {
        // Q1: what QEMU calls fixed has no blocks unless it is told so.
        let kind = if fixed { "subformat=fixed,block_state_zero=off" } else { "subformat=dynamic" };
        let options = format!("{kind},block_size={block}");
        return assert_success(&qemu_img(&[
            "create",
            "-q",
            "-f",
            "vhdx",
            "-o",
            &options,
            text(path),
            &size.to_string(),
        ]));
    }
    File::create(path).unwrap();
    let storage = unlocked(path, true);
    let disk_type = if fixed { NewDiskType::Fixed } else { NewDiskType::Dynamic };
    let options = CreateOptions { disk_type, block_size: Some(block as u32), ..CreateOptions::new(size) };
    create(&storage, &options, &()).unwrap();
}

struct Disk {
    name: String,
    path: PathBuf,
    raw: PathBuf,
    array: Array,
    block: u64,
    complaints: BTreeSet<String>,
    rng: Rng,
}

impl Disk {
    /// Whole sectors anywhere, often at the end of a block or of the disk.
    fn range(&mut self, bytes_max: u64) -> Range<u64> {
        let size = self.array.size;
        let blocks = size.div_ceil(self.block);
        let start = match self.rng.below(4) {
            0 => (self.rng.below(blocks) * self.block).saturating_sub(512 * self.rng.below(20)),
            1 => size - 512 * self.rng.between(1, 40),
            _ => self.rng.below(size / 512) * 512,
        };
        let length = match self.rng.below(3) {
            0 => 512,
            1 => 512 * self.rng.between(1, 16),
            _ => 512 * self.rng.between(1, bytes_max / 512),
        };
        start..(start + length).min(size)
    }

    /// QEMU's part of a round: patterns, zeros and flushes.
    fn qemu_writes(&mut self) {
        let mut arguments = vec!["-t".to_owned(), "unsafe".to_owned(), "-f".to_owned(), "vhdx".to_owned()];
        for _ in 0..self.rng.between(1, 5) {
            let range = self.range(200 << 10);
            let (start, length) = (range.start, range.end - range.start);
            let command = match self.rng.below(8) {
                0 => {
                    self.array.zero(range);
                    format!("write -q -z {start} {length}")
                }
                // Q12: QEMU takes it and does nothing.
                1 => format!("discard -q {start} {length}"),
                2 => "flush".to_owned(),
                _ => {
                    let byte = self.rng.between(1, 255) as u8;
                    self.array.write(start, &vec![byte; length as usize]);
                    format!("write -q -P {byte} {start} {length}")
                }
            };
            arguments.extend(["-c".to_owned(), command]);
        }
        arguments.push(text(&self.path).to_owned());
        assert_success(&run_tool("qemu-io", &arguments));
    }

    fn write(&mut self, image: &Image) {
        let mut range = self.range(300 << 10);
        if self.rng.below(3) == 0 {
            // Not whole sectors.
            range.start += self.rng.below(range.end - range.start);
        }
        let bytes = self.rng.bytes((range.end - range.start) as usize);
        match self.rng.below(6) {
            0 => image.write_through_at(&bytes, range.start).unwrap(),
            _ => image.write_at(&bytes, range.start).unwrap(),
        }
        self.array.write(range.start, &bytes);
    }

    /// Whole blocks, or a part of them.
    fn zero_or_discard(&mut self, image: &Image) {
        let size = self.array.size;
        let start = self.rng.below(size.div_ceil(self.block)) * self.block;
        let whole = start..(start + self.block * self.rng.between(1, 2)).min(size);
        let range = if self.rng.below(3) == 0 { self.range(3 * MIB) } else { whole };
        if self.rng.below(2) == 0 {
            let unmap = self.rng.below(2) == 0;
            image.write_zeroes(range.clone(), unmap).unwrap();
            self.array.zero(range);
            return;
        }
        image.discard(range.clone()).unwrap();
        // Each block is zero now, or as it was.
        let mut position = range.start;
        while position < range.end {
            let piece = position..((position / self.block + 1) * self.block).min(range.end);
            let (now, before) = (read(image, &piece), self.array.read(piece.start, (piece.end - piece.start) as usize));
            if now != before {
                assert!(now.iter().all(|byte| *byte == 0), "{}: {piece:#x?} was discarded", self.name);
                self.array.zero(piece.clone());
            }
            position = piece.end;
        }
    }

    /// Our part of a round.
    fn we_write(&mut self) {
        let image = open_for_writing(&self.path);
        for _ in 0..self.rng.between(1, 8) {
            match self.rng.below(8) {
                0..5 => self.write(&image),
                5..7 => self.zero_or_discard(&image),
                _ => image.flush().unwrap(),
            }
        }
        // One last pattern, for qemu-io to find again.
        let range = self.range(300 << 10);
        let byte = self.rng.between(1, 255) as u8;
        let bytes = vec![byte; (range.end - range.start) as usize];
        image.write_at(&bytes, range.start).unwrap();
        self.array.write(range.start, &bytes);
        // A session that is not closed ends well too.
        if self.rng.below(4) != 0 {
            image.close().unwrap();
        }
        drop(image);
        self.qemu_reads(byte, &range);
    }

    /// QEMU reads a pattern that we wrote.
    fn qemu_reads(&self, byte: u8, range: &Range<u64>) {
        let command = format!("read -P {byte} {} {}", range.start, range.end - range.start);
        let output = run_tool("qemu-io", &["-r", "-f", "vhdx", "-c", &command, text(&self.path)]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(printed.contains("read ") && !printed.contains("Pattern verification failed"), "{command}: {printed}");
        assert_success(&output);
    }

    fn judge(&mut self, who: &str) {
        let name = format!("{}, after {who}", self.name);
        qemu_check(&self.path).unwrap_or_else(|error| panic!("{name}: {error}"));
        qemu_to_raw(&self.path, &self.raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        let raw = File::open(&self.raw).unwrap();
        assert_eq!(raw.metadata().unwrap().len(), self.array.size, "{name}");
        self.array.compare(&format!("{name}, by QEMU"), &mut self.rng, |offset, length| {
            let mut bytes = vec![0; length];
            raw.read_exact_at(&mut bytes, offset).unwrap();
            bytes
        });
        let image = open(&self.path);
        assert!(image.layers()[0].replay().is_none(), "{name}: the log is dirty");
        same_as_raw(&image, &self.raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        drop(image);
        assert_eq!(complaints(&self.path), self.complaints, "{name}");
    }
}

fn alternate(maker: Maker, block: u64, fixed: bool) {
    let seed = block / MIB * 4 + u64::from(fixed) * 2 + u64::from(maker == Maker::Us);
    let directory = tempfile::tempdir().unwrap();
    let (path, raw) = (directory.path().join("image.vhdx"), directory.path().join("image.raw"));
    let size = 35 * MIB + 512 * 5;
    make(&path, maker, size, block, fixed);
    let kind = if fixed { "fixed" } else { "dynamic" };
    let complaints = complaints(&path);
    assert!(maker == Maker::Qemu || complaints.is_empty(), "{complaints:?}");
    let mut disk =
        Disk { name: String::new(), path, raw, array: Array::zeros(size), block, complaints, rng: Rng::new(seed) };
    for round in 0..ROUNDS {
        disk.name = format!("{kind} by {maker:?}, blocks of {block:#x}, round {round}");
        disk.qemu_writes();
        disk.judge("QEMU");
        disk.we_write();
        disk.judge("us");
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (megabytes, makers) in
        [(1, [Maker::Qemu, Maker::Us]), (2, [Maker::Us, Maker::Qemu]), (32, [Maker::Qemu, Maker::Us])]
    {
        for (fixed, maker) in [false, true].into_iter().zip(makers) {
            let kind = if fixed { "fixed" } else { "dynamic" };
            let name = format!("qemu_and_we_write_in_turn_{kind}_{megabytes}_mib");
            let needs = Needs::tools(&["qemu-img", "qemu-io"]);
            cases.push(Case::new(name, needs, move || alternate(maker, megabytes * MIB, fixed)));
        }
    }
    cases
}
