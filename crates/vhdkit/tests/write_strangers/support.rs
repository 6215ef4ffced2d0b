//! How QEMU is asked, and how what it says is compared with what we read.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use vhdkit::format::finding::Severity;
use vhdkit::image::{BlockDevice, ExtentKind, FileResolver, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{FileStorage, Sharing, Storage};
use vhdkit_testkit::foreign::qemu_img;

pub(crate) const MIB: u64 = 1 << 20;

/// Up to this size every byte of a disk is compared; of larger ones what anybody says is data.
const READ_ALL_MAX: u64 = 256 * MIB;

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu(arguments: &[&str]) -> Result<(), String> {
    let output = qemu_img(arguments);
    if output.status.success() {
        return Ok(());
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(format!("qemu-img {arguments:?}: {}\n{out}{err}", output.status))
}

/// QEMU checks an image that is clean.
pub(crate) fn qemu_check(path: &Path) -> Result<(), String> {
    qemu(&["check", "-q", "-f", "vhdx", text(path)])
}

/// QEMU replays the log, if there is one to replay. Syncs are left out: they take long and prove nothing here.
pub(crate) fn qemu_repair(path: &Path) -> Result<(), String> {
    qemu(&["check", "-q", "-r", "all", "-T", "unsafe", "-f", "vhdx", text(path)])
}

/// What QEMU reads, as a raw file.
pub(crate) fn qemu_to_raw(path: &Path, raw: &Path) -> Result<(), String> {
    qemu(&["convert", "-t", "unsafe", "-f", "vhdx", "-O", "raw", text(path), text(raw)])
}

/// What QEMU reads of a part of a disk.
pub(crate) fn qemu_part_to_raw(path: &Path, part: &Range<u64>, raw: &Path) -> Result<(), String> {
    let window = format!(
        "driver=raw,offset={},size={},file.driver=vhdx,file.file.filename={}",
        part.start,
        part.end - part.start,
        text(path)
    );
    qemu(&["convert", "-t", "unsafe", "--image-opts", "-O", "raw", &window, text(raw)])
}

/// A file as storage, without locks: between the fork and the exec of a tool that another thread starts, that process
/// would hold them also of files that are closed since.
pub(crate) fn unlocked(path: &Path, write: bool) -> Arc<dyn Storage> {
    let file = File::options().read(true).write(write).open(path).unwrap();
    Arc::new(FileStorage::from_file(file, Some(path.to_owned())).unwrap())
}

/// Opens with parents from the same directory.
fn open_with(path: &Path, write: bool) -> Image {
    let resolver = FileResolver::new().allow_own_directory().sharing(Sharing::ForceShare);
    let options = OpenOptions::new().write(write).replay(write).parents(Arc::new(resolver));
    options.open(unlocked(path, write), Some(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Opens for reading.
pub(crate) fn open(path: &Path) -> Image {
    open_with(path, false)
}

/// Opens for writing, replaying where it is needed.
pub(crate) fn open_for_writing(path: &Path) -> Image {
    open_with(path, true)
}

/// What `check` says above note, by code; in storage.
pub(crate) fn complaints_of(storage: &Arc<dyn Storage>) -> BTreeSet<String> {
    let report = check(storage, None, &CheckOptions::default(), &()).unwrap();
    let loud = report.findings.iter().filter(|finding| finding.severity() > Severity::Note);
    loud.map(|finding| finding.code().as_str().to_owned()).collect()
}

/// What `check` says above note, by code.
pub(crate) fn complaints(path: &Path) -> BTreeSet<String> {
    complaints_of(&unlocked(path, false))
}

/// A read of a disk.
pub(crate) fn read(disk: &dyn BlockDevice, range: &Range<u64>) -> Vec<u8> {
    // Not zeros: what is left as it was must show.
    let mut bytes = vec![0x3c; (range.end - range.start) as usize];
    disk.read_at(&mut bytes, range.start).unwrap_or_else(|error| panic!("reading {range:#x?}: {error}"));
    bytes
}

/// Which pieces of a mebibyte hold something by the extents.
pub(crate) fn data_pieces(disk: &dyn BlockDevice) -> BTreeSet<u64> {
    let mut pieces = BTreeSet::new();
    let visited = disk.visit_extents(0..disk.size(), &mut |extent| {
        if matches!(extent.kind, ExtentKind::Data { .. }) {
            pieces.extend(extent.start / MIB..extent.end().div_ceil(MIB));
        }
        ControlFlow::Continue(())
    });
    visited.unwrap();
    pieces
}

/// Which pieces of a mebibyte of a raw file are not holes.
fn raw_pieces(file: &File) -> BTreeSet<u64> {
    let (mut pieces, mut position) = (BTreeSet::new(), 0);
    while let Ok(start) = seek(file, SeekFrom::Data(position)) {
        let end = seek(file, SeekFrom::Hole(start)).unwrap();
        pieces.extend(start / MIB..end.div_ceil(MIB));
        position = end;
    }
    pieces
}

pub(crate) fn first_difference(left: &[u8], right: &[u8]) -> Option<usize> {
    (left != right).then(|| left.iter().zip(right).position(|(left, right)| left != right).unwrap_or(left.len()))
}

/// A disk holds what a raw file holds, byte for byte.
pub(crate) fn same_as_raw(disk: &dyn BlockDevice, raw: &Path) -> Result<(), String> {
    let file = File::open(raw).unwrap();
    let length = file.metadata().unwrap().len();
    if length != disk.size() {
        return Err(format!("the raw file has {length} bytes, the disk {}", disk.size()));
    }
    let pieces: Box<dyn Iterator<Item = u64>> = if length <= READ_ALL_MAX {
        Box::new(0..length.div_ceil(MIB))
    } else {
        Box::new(data_pieces(disk).union(&raw_pieces(&file)).copied().collect::<Vec<_>>().into_iter())
    };
    let mut theirs = vec![0; MIB as usize];
    for piece in pieces {
        let range = piece * MIB..((piece + 1) * MIB).min(length);
        let theirs = &mut theirs[..(range.end - range.start) as usize];
        file.read_exact_at(theirs, range.start).unwrap();
        if let Some(at) = first_difference(&read(disk, &range), theirs) {
            let offset = range.start + at as u64;
            return Err(format!("byte {offset:#x} is {:#04x} for QEMU and another for us", theirs[at]));
        }
    }
    Ok(())
}
