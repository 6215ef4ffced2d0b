//! Disks with file systems in files, disks that differ from them in a few bytes, and sets of ranges.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdkit::format::guid::Guid;
use vhdkit::guest::{Survey, Volume, VolumeState, survey};
use vhdkit::image::{BlockDevice, RawDisk, VisitExtent};
use vhdkit::storage::{FileAccess, FileStorage, Sharing};
use vhdkit_testkit::Rng;
use vhdkit_testkit::foreign::{assert_success, run_tool};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// A folder that goes with the test.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of so many bytes without any data.
    pub(crate) fn file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// A folder with files of many sizes; every second one is to be deleted again.
    pub(crate) fn tree(&self) -> PathBuf {
        let root = self.join("tree");
        let mut rng = Rng::new(5);
        for folder in ["a", "b"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
            for number in 0..FILES {
                let size = (1 + number * number * 173) % 60_000;
                std::fs::write(root.join(folder).join(name(number)), rng.bytes(size)).unwrap();
            }
        }
        root
    }
}

/// Files in each folder of the tree.
pub(crate) const FILES: usize = 12;

/// The name of a file of the tree.
pub(crate) fn name(number: usize) -> String {
    format!("file{number:02}")
}

/// The files of the tree that are deleted.
pub(crate) fn deleted() -> Vec<String> {
    (0..FILES).step_by(2).map(|number| format!("a/{}", name(number))).collect()
}

/// Runs a tool that has to end well.
#[track_caller]
pub(crate) fn tool(name: &str, arguments: &[&str]) -> String {
    let output = run_tool(name, arguments);
    assert_success(&output);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a tool whose exit status says something else.
pub(crate) fn tool_says(name: &str, arguments: &[&str]) -> String {
    String::from_utf8_lossy(&run_tool(name, arguments).stdout).into_owned()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Copies a file into another, without its zeros.
pub(crate) fn put_into(disk: &Path, offset: u64, image: &Path) {
    let source = File::open(image).unwrap();
    let target = File::options().write(true).open(disk).unwrap();
    let length = source.metadata().unwrap().len();
    let mut buffer = vec![0; 64 << 10];
    let mut position = 0;
    while position < length {
        let count = usize::try_from((length - position).min(64 << 10)).unwrap();
        source.read_exact_at(&mut buffer[..count], position).unwrap();
        if buffer[..count].iter().any(|byte| *byte != 0) {
            target.write_all_at(&buffer[..count], offset + position).unwrap();
        }
        position += count as u64;
    }
}

pub(crate) fn open(path: &Path) -> RawDisk {
    open_with(path, 512)
}

pub(crate) fn open_with(path: &Path, sector: u32) -> RawDisk {
    let storage = FileStorage::open(path, FileAccess::Read, Sharing::Normal).unwrap();
    RawDisk::new(Arc::new(storage), sector).unwrap()
}

/// A disk as a file and what is different; the file is shared between many variants.
#[derive(Clone, Debug)]
pub(crate) struct Patched {
    pub(crate) base: Arc<File>,
    pub(crate) base_size: u64,
    pub(crate) patches: Vec<(u64, Vec<u8>)>,
    pub(crate) size: u64,
    pub(crate) sector: u32,
}

impl Patched {
    pub(crate) fn read(path: &Path) -> Self {
        let base = File::open(path).unwrap();
        let size = base.metadata().unwrap().len();
        Self { base: Arc::new(base), base_size: size, patches: Vec::new(), size, sector: 512 }
    }

    pub(crate) fn with(&self, offset: u64, bytes: &[u8]) -> Self {
        let mut other = self.clone();
        other.patches.push((offset, bytes.to_vec()));
        other
    }

    pub(crate) fn bytes(&self, offset: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.read_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl BlockDevice for Patched {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.sector
    }

    fn physical_sector_size(&self) -> u32 {
        4096
    }

    fn allocation_unit(&self) -> u64 {
        4096
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        None
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> vhdkit::Result<()> {
        assert!(offset + buf.len() as u64 <= self.size, "{} bytes at {offset} of {}", buf.len(), self.size);
        assert!(buf.len() <= 1 << 20, "a read of {} bytes", buf.len());
        let there = usize::try_from(self.base_size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        buf[there..].fill(0);
        self.base.read_exact_at(&mut buf[..there], offset).unwrap();
        for (place, bytes) in &self.patches {
            for (byte, at) in bytes.iter().zip(*place..) {
                if let Some(to) = at.checked_sub(offset).and_then(|at| buf.get_mut(usize::try_from(at).unwrap())) {
                    *to = *byte;
                }
            }
        }
        Ok(())
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> vhdkit::Result<()> {
        use vhdkit::image::{Extent, ExtentKind};
        let kind = ExtentKind::Data { file_offset: None };
        if range.start < range.end {
            let _ = visit(&Extent { start: range.start, length: range.end - range.start, kind, layer: 0 });
        }
        Ok(())
    }
}

/// A disk that counts what is read.
#[derive(Debug)]
pub(crate) struct Counted {
    disk: RawDisk,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Counted {
    pub(crate) fn new(path: &Path) -> Self {
        Self { disk: open(path), reads: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    /// Reads, and bytes of all.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.reads.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

impl BlockDevice for Counted {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn logical_sector_size(&self) -> u32 {
        512
    }

    fn physical_sector_size(&self) -> u32 {
        512
    }

    fn allocation_unit(&self) -> u64 {
        4096
    }

    fn unallocated_reads_zero(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn disk_id(&self) -> Option<Guid> {
        None
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> vhdkit::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.disk.read_at(buf, offset)
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> vhdkit::Result<()> {
        self.disk.visit_extents(range, visit)
    }
}

pub(crate) fn look(disk: &dyn BlockDevice) -> Survey {
    survey(disk, &()).unwrap()
}

/// The free ranges of a volume; checks that they are in order, joined, inside, and as many bytes as was said.
pub(crate) fn free_of(disk: &dyn BlockDevice, volume: &Volume) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    volume
        .visit_free(disk, &mut |range| {
            assert!(range.start < range.end && range.start >= volume.range.start && range.end <= volume.range.end);
            assert!(all.last().is_none_or(|last| last.end < range.start), "{range:?} behind {:?}", all.last());
            all.push(range);
            ControlFlow::Continue(())
        })
        .unwrap();
    let total: u64 = all.iter().map(|range| range.end - range.start).sum();
    match volume.state {
        VolumeState::Readable { free_bytes, size_bytes, .. } => {
            assert_eq!(total, free_bytes);
            assert!(all.last().is_none_or(|last| last.end - volume.range.start <= size_bytes));
        }
        VolumeState::LeftAlone { .. } => assert_eq!(total, 0),
    }
    all
}

/// The free ranges of all volumes.
pub(crate) fn free_of_all(disk: &dyn BlockDevice) -> Vec<Range<u64>> {
    look(disk).volumes.iter().flat_map(|volume| free_of(disk, volume)).collect()
}

/// The only volume of a disk.
#[track_caller]
pub(crate) fn only(disk: &dyn BlockDevice) -> Volume {
    let survey = look(disk);
    assert_eq!(survey.volumes.len(), 1, "{survey:?}");
    survey.volumes.into_iter().next().unwrap()
}

/// Why the only volume of a disk is left alone.
#[track_caller]
pub(crate) fn why(disk: &dyn BlockDevice) -> String {
    match only(disk).state {
        VolumeState::LeftAlone { reason } => reason,
        readable @ VolumeState::Readable { .. } => panic!("{readable:?}"),
    }
}

/// Ranges in order, joined.
pub(crate) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().filter(|range| range.start < range.end) {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

/// What of `inner` does not lie in `outer`; both in order and joined.
pub(crate) fn outside(inner: &[Range<u64>], outer: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    for range in inner {
        let mut position = range.start;
        for other in outer.iter().filter(|other| other.end > range.start && other.start < range.end) {
            if other.start > position {
                rest.push(position..other.start);
            }
            position = position.max(other.end);
        }
        if position < range.end {
            rest.push(position..range.end);
        }
    }
    rest
}

/// Mounts a file by a command, runs something on it, unmounts it.
pub(crate) fn mounted(point: &Path, mount: &mut Command, work: impl FnOnce(&Path)) {
    std::fs::create_dir_all(point).unwrap();
    let status = mount.status().unwrap();
    assert!(status.success(), "{mount:?}");
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(point)));
    let _ = Command::new("sync").arg("-f").arg(point).status();
    let ended = Command::new("umount").arg(point).status().unwrap();
    assert!(ended.success());
    outcome.unwrap();
}

/// Waits until no process has such a command line: those that serve a file system end some time after it is unmounted.
pub(crate) fn gone(command: &str) {
    for _ in 0..500 {
        if tool_says("pgrep", &["-f", command]).trim().is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("{command} does not end");
}

/// Copies the tree into a mounted file system, and deletes half of it again.
pub(crate) fn use_it(scratch: &Scratch, point: &Path) {
    let tree = scratch.tree();
    tool("cp", &["-r", &format!("{}/.", text(&tree)), text(point)]);
    for path in deleted() {
        std::fs::remove_file(point.join(path)).unwrap();
    }
}

/// A loop device, detached with the test.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    pub(crate) fn new(file: &Path) -> Self {
        Self(tool("losetup", &["--find", "--show", text(file)]).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
