//! Images that others made are written to: they stay valid, and hold what was written and nothing else that is new.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use vhdkit::image::{BlockDevice as _, Image};
use vhdkit_testkit::foreign::{CorpusRow, corpus_dir, corpus_manifest, sha256_file, unpack};
use vhdkit_testkit::harness::{Case, Needs};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sparse::is_zero;

use crate::support::{
    MIB, complaints, data_pieces, first_difference, open, open_for_writing, qemu_check, qemu_part_to_raw, qemu_to_raw,
    read, same_as_raw,
};

/// Up to this size QEMU converts the whole disk; of larger ones parts.
const CONVERT_MAX: u64 = 256 * MIB;
/// So many of them.
const PARTS_MAX: usize = 8;

/// The disk as it was, and what was done to it; later changes come later.
struct Expected {
    before: Image,
    changes: Vec<(Range<u64>, Option<Vec<u8>>)>,
}

impl Expected {
    fn read(&self, range: &Range<u64>) -> Vec<u8> {
        let mut bytes = read(&self.before, range);
        for (changed, content) in &self.changes {
            let (start, end) = (changed.start.max(range.start), changed.end.min(range.end));
            if start >= end {
                continue;
            }
            let target = &mut bytes[(start - range.start) as usize..(end - range.start) as usize];
            match content {
                Some(content) => {
                    target.copy_from_slice(&content[(start - changed.start) as usize..(end - changed.start) as usize]);
                }
                None => target.fill(0),
            }
        }
        bytes
    }

    /// Everything that was, is or should be data.
    fn compare(&self, name: &str, now: &Image) {
        let size = now.size();
        assert_eq!(size, self.before.size(), "{name}");
        let mut pieces = data_pieces(now);
        pieces.extend(data_pieces(&self.before));
        for (range, _) in &self.changes {
            pieces.extend(range.start / MIB..range.end.div_ceil(MIB));
        }
        for piece in pieces {
            let range = piece * MIB..((piece + 1) * MIB).min(size);
            if let Some(at) = first_difference(&read(now, &range), &self.read(&range)) {
                panic!("{name}: byte {:#x} is not what it should be", range.start + at as u64);
            }
        }
    }
}

/// Where something is, where nothing is, at ends of blocks and of the disk.
fn place(rng: &mut Rng, image: &Image, pieces: &[u64], length_max: u64) -> Range<u64> {
    let (size, block) = (image.size(), image.allocation_unit());
    let start = match rng.below(5) {
        0 | 1 if !pieces.is_empty() => rng.pick(pieces) * MIB + rng.below(MIB),
        2 => (rng.below(size.div_ceil(block)) * block).saturating_sub(rng.below(5000)),
        3 => size - rng.between(1, 10_000),
        _ => rng.below(size),
    };
    let start = start.min(size - 1);
    start..(start + rng.between(1, length_max)).min(size)
}

fn session(rng: &mut Rng, path: &Path, expected: &mut Expected) {
    let image = open_for_writing(path);
    let pieces: Vec<u64> = data_pieces(&expected.before).into_iter().collect();
    let (size, block) = (image.size(), image.allocation_unit());
    for _ in 0..8 {
        let range = place(rng, &image, &pieces, 150_000);
        let bytes = rng.bytes((range.end - range.start) as usize);
        image.write_at(&bytes, range.start).unwrap();
        expected.changes.push((range, Some(bytes)));
    }
    image.flush().unwrap();
    for round in 0..6 {
        let range = place(rng, &image, &pieces, 2 * block);
        if round % 2 == 0 {
            image.write_zeroes(range.clone(), round != 0).unwrap();
            expected.changes.push((range, None));
            continue;
        }
        let whole = range.start / block * block..range.end.next_multiple_of(block).min(size);
        image.discard(whole.clone()).unwrap();
        // Each part is zero now, or as it was.
        for start in (whole.start..whole.end).step_by(MIB as usize) {
            let part = start..(start + MIB).min(whole.end);
            let now = read(&image, &part);
            if now != expected.read(&part) {
                assert!(is_zero(&now), "{part:#x?} was discarded");
                expected.changes.push((part, None));
            }
        }
    }
    image.close().unwrap();
}

/// QEMU reads what we read: the whole disk, or parts where data is.
fn qemu_agrees(name: &str, rng: &mut Rng, path: &Path, image: &Image) {
    qemu_check(path).unwrap_or_else(|error| panic!("{name}: {error}"));
    let raw = path.with_extension("raw");
    if image.size() <= CONVERT_MAX {
        qemu_to_raw(path, &raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        same_as_raw(image, &raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        return;
    }
    let mut pieces: Vec<u64> = data_pieces(image).into_iter().collect();
    rng.shuffle(&mut pieces);
    for piece in pieces.into_iter().take(PARTS_MAX) {
        let range = (piece * MIB).saturating_sub(3 * MIB)..((piece + 4) * MIB).min(image.size());
        qemu_part_to_raw(path, &range, &raw).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut theirs = vec![0; (range.end - range.start) as usize];
        File::open(&raw).unwrap().read_exact_at(&mut theirs, 0).unwrap();
        assert_eq!(first_difference(&read(image, &range), &theirs), None, "{name}: {range:#x?}");
    }
}

fn verify(row: &CorpusRow) {
    let (untouched, written) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let before = unpack(row, untouched.path());
    let path = unpack(row, written.path());
    let mut rng = Rng::new(row.virtual_size ^ row.name.len() as u64);
    let old_complaints = complaints(&before);
    let mut expected = Expected { before: open(&before), changes: Vec::new() };
    for round in 0..2 {
        let name = format!("{}, session {round}", row.name);
        session(&mut rng, &path, &mut expected);
        let image = open(&path);
        assert!(image.layers()[0].replay().is_none(), "{name}: the log is dirty");
        expected.compare(&name, &image);
        let new: Vec<String> = complaints(&path).difference(&old_complaints).cloned().collect();
        assert!(new.is_empty(), "{name}: {new:?}");
        // QEMU refuses differencing disks.
        if row.parent.is_none() {
            qemu_agrees(&name, &mut rng, &path, &image);
        }
    }
    assert_eq!(sha256_file(&before).unwrap(), row.file_sha256, "the file that was only read");
    if let Some(parent) = &row.parent {
        let parent = corpus_manifest().into_iter().find(|other| other.name == *parent).unwrap();
        assert_eq!(sha256_file(&written.path().join(&parent.name)).unwrap(), parent.file_sha256, "the parent");
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let needs = || Needs::tools(&["qemu-img"]).and_corpus();
    if corpus_dir().is_none() {
        return vec![Case::new("corpus_images_stay_valid", needs(), || panic!("the corpus is not there"))];
    }
    let case =
        |row: CorpusRow| Case::new(format!("corpus_images_stay_valid: {}", row.name), needs(), move || verify(&row));
    corpus_manifest().into_iter().map(case).collect()
}
