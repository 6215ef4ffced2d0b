//! What the tests of the read side share: built images as storage that cannot be written, chains of them, and the
//! comparison of an open image with its model, by reads and by extents.

use std::collections::BTreeSet;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdkit::Result;
use vhdkit::image::{BlockDevice, Extent, ExtentKind, Image, OpenOptions};
use vhdkit::image::{ParentCandidate, ParentRequest, ParentResolver};
use vhdkit::storage::{Storage, StorageIdentity};
use vhdkit_testkit::model::{FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::{BuiltImage, ModelDisk, SparseFile};

/// A built file as storage: it counts what is read and cannot be written at all.
#[derive(Debug)]
pub(crate) struct TestFile {
    file: SparseFile,
    /// The written parts, joined.
    data: Vec<Range<u64>>,
    identity: StorageIdentity,
    /// Calls of `read_at` and `next_data`.
    pub(crate) calls: AtomicU64,
    /// Bytes that were read.
    pub(crate) bytes: AtomicU64,
}

impl TestFile {
    pub(crate) fn new(file: &SparseFile) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut data: Vec<Range<u64>> = Vec::new();
        for (start, bytes) in file.segments() {
            let end = start + bytes.len() as u64;
            match data.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => data.push(start..end),
            }
        }
        let identity = StorageIdentity { device: u64::MAX - 1, inode: NEXT.fetch_add(1, Ordering::Relaxed) };
        Arc::new(Self { file: file.clone(), data, identity, calls: AtomicU64::new(0), bytes: AtomicU64::new(0) })
    }
}

impl Storage for TestFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        if end > self.file.len() && !buf.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.copy_from_slice(&self.file.read(offset, buf.len()));
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], offset: u64) -> io::Result<()> {
        panic!("a reader wrote at {offset:#x}")
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        panic!("a reader changed the length to {len:#x}")
    }

    fn sync(&self) -> io::Result<()> {
        panic!("a reader has nothing to sync")
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let at = self.data.partition_point(|data| data.end <= range.start);
        let found = self.data.get(at).map(|data| data.start.max(range.start)..data.end.min(range.end));
        Ok(found.filter(|found| found.start < found.end))
    }

    fn identity(&self) -> Option<StorageIdentity> {
        Some(self.identity)
    }
}

/// Gives the parents of a chain by depth, whatever their locators say.
#[derive(Debug)]
struct Parents(Vec<Arc<TestFile>>);

impl ParentResolver for Parents {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let storage = Arc::clone(&self.0[wanted.depth]);
        Ok(vec![ParentCandidate { storage, path: None, named: false, lock: None }])
    }
}

/// The images of a chain, the top first.
pub(crate) fn layers(top: &BuiltImage) -> Vec<&BuiltImage> {
    std::iter::successors(Some(top), |image| image.parent.as_deref()).collect()
}

/// Opens an image with its parents.
pub(crate) fn try_open(top: &BuiltImage, options: &OpenOptions) -> Result<Image> {
    let mut files: Vec<Arc<TestFile>> = layers(top).into_iter().map(|image| TestFile::new(&image.file)).collect();
    let storage = files.remove(0);
    options.clone().parents(Arc::new(Parents(files))).open(storage, None)
}

/// Opens an image with its parents, which must succeed.
pub(crate) fn open(name: &str, top: &BuiltImage) -> Image {
    try_open(top, &OpenOptions::new()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Reads a range, which must succeed.
pub(crate) fn read(image: &dyn BlockDevice, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xC3; length];
    image.read_at(&mut bytes, offset).unwrap_or_else(|error| panic!("read {length} at {offset:#x}: {error}"));
    bytes
}

/// Compares one range with the model.
#[track_caller]
pub(crate) fn same_range(name: &str, image: &dyn BlockDevice, model: &ModelDisk, offset: u64, length: usize) {
    let (actual, expected) = (read(image, offset, length), model.read(offset, length));
    if actual != expected {
        let at = actual.iter().zip(&expected).position(|(left, right)| left != right).unwrap_or_default();
        panic!(
            "{name}: read of {length} bytes at {offset:#x}: byte {:#x} is {:#04x} instead of {:#04x}",
            offset + at as u64,
            actual[at],
            expected[at]
        );
    }
}

/// Where arithmetic goes wrong: the ends of blocks that are not in the default state, of chunks and of every layer.
pub(crate) fn corners(top: &BuiltImage) -> Vec<u64> {
    let mut corners = BTreeSet::from([0, top.model.virtual_size]);
    for image in layers(top) {
        let geometry = image.layout.geometry;
        corners.insert(image.model.virtual_size);
        corners.extend(
            image
                .model
                .blocks
                .keys()
                .flat_map(|block| [block * geometry.block_size, (block + 1) * geometry.block_size]),
        );
        corners
            .extend((1..=geometry.chunk_count.min(6)).map(|chunk| chunk * geometry.chunk_ratio * geometry.block_size));
    }
    corners.into_iter().filter(|corner| *corner <= top.model.virtual_size).collect()
}

/// A range of any offset and any length on the disk, with a liking for corners.
pub(crate) fn random_range(rng: &mut Rng, size: u64, corners: &[u64]) -> (u64, usize) {
    let length = match rng.below(8) {
        0 => rng.below(2),
        1 => 512 * rng.between(1, 20),
        2 => rng.between(1, 600),
        3..=5 => rng.between(1, 20_000),
        6 => rng.between(1, 300_000),
        _ => rng.between(1, 2_500_000),
    };
    let length = length.min(size);
    let offset = match rng.below(4) {
        0 => rng.below(size - length + 1),
        1 => size - length,
        _ => rng.pick(corners).saturating_sub(rng.below(length + 1)),
    };
    (offset.min(size - length), length as usize)
}

/// Compares many random ranges with the model.
pub(crate) fn same_reads(name: &str, image: &Image, top: &BuiltImage, rng: &mut Rng, count: usize) {
    assert_eq!(image.size(), top.model.virtual_size, "{name}");
    let corners = corners(top);
    for _ in 0..count {
        let (offset, length) = random_range(rng, image.size(), &corners);
        same_range(name, image, &top.model, offset, length);
    }
    let mut byte = [0];
    assert!(image.read_at(&mut byte, image.size()).is_err(), "{name}: a read past the end");
    assert!(image.read_at(&mut byte, u64::MAX).is_err(), "{name}: a read past everything");
}

/// The extents of a range.
pub(crate) fn extents(image: &dyn BlockDevice, range: Range<u64>) -> Vec<Extent> {
    let mut extents = Vec::new();
    image
        .visit_extents(range.clone(), &mut |extent| {
            extents.push(*extent);
            ControlFlow::Continue(())
        })
        .unwrap_or_else(|error| panic!("extents of {range:x?}: {error}"));
    extents
}

/// Joins neighbours that are alike.
pub(crate) fn joined(extents: &[Extent]) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in extents {
        match joined.last_mut() {
            Some(last) if last.continues_with(extent) => last.length += extent.length,
            _ => joined.push(*extent),
        }
    }
    joined
}

/// What the descriptions of the images, not their bytes, say about one byte of the disk: the layer and the kind.
pub(crate) fn expected(layers: &[&BuiltImage], position: u64) -> (usize, ExtentKind) {
    let deepest = layers.len() - 1;
    for (depth, image) in layers.iter().enumerate() {
        let (model, geometry) = (&image.model, image.layout.geometry);
        if position >= model.virtual_size {
            break;
        }
        let (index, within) = (position / geometry.block_size, position % geometry.block_size);
        let block = model.blocks.get(&index);
        let data = || ExtentKind::Data { file_offset: Some(image.layout.payload_block(index) + within) };
        match block.map_or(model.default_state, |block| block.state) {
            NOT_PRESENT => {}
            FULLY_PRESENT => return (depth, data()),
            PARTIALLY_PRESENT => {
                if block.is_some_and(|block| block.mask.contains(within / geometry.sector_size)) {
                    return (depth, data());
                }
            }
            _ => return (depth, ExtentKind::Zero),
        }
    }
    (deepest, ExtentKind::Hole)
}

/// What a position inside an extent is, as the extent has it.
fn kind_at(extent: &Extent, position: u64) -> ExtentKind {
    match extent.kind {
        ExtentKind::Data { file_offset: Some(offset) } => {
            ExtentKind::Data { file_offset: Some(offset + (position - extent.start)) }
        }
        other => other,
    }
}

/// Checks that extents cover a range exactly, in order.
#[track_caller]
pub(crate) fn covers(name: &str, extents: &[Extent], range: &Range<u64>) {
    let mut position = range.start;
    for extent in extents {
        assert_eq!(extent.start, position, "{name}: gap or overlap before {extent:x?}");
        assert!(extent.length > 0, "{name}: {extent:x?} is empty");
        position += extent.length;
    }
    assert_eq!(position, range.end, "{name}: the extents end at {position:#x}");
}

/// Checks everything that extents promise, against the descriptions and the bytes of the images.
///
/// `scattered` allows data without a place in the file, as dirty images have it.
pub(crate) fn right_extents(name: &str, image: &Image, top: &BuiltImage, rng: &mut Rng, scattered: bool) {
    let (size, layers) = (image.size(), layers(top));
    let whole = extents(image, 0..size);
    covers(name, &whole, &(0..size));
    let sector = u64::from(image.logical_sector_size());
    let check = |extent: &Extent, position: u64| {
        let (layer, kind) = expected(&layers, position);
        let actual = kind_at(extent, position);
        let no_place = scattered && actual == ExtentKind::Data { file_offset: None };
        let same = actual == kind || (no_place && matches!(kind, ExtentKind::Data { .. }));
        assert!(same && layer == extent.layer, "{name}: {position:#x} is {kind:x?} of layer {layer}, not {extent:x?}");
    };
    for extent in &whole {
        if size <= 16 << 20 {
            (extent.start..extent.end()).step_by(sector as usize).for_each(|position| check(extent, position));
        }
        let mut points = vec![extent.start, extent.end() - 1];
        if whole.len() < 5000 {
            points.extend((0..6).map(|_| extent.start + rng.below(extent.length)));
        }
        points.into_iter().for_each(|position| check(extent, position));
    }
    // All of them where there are few.
    let sampled = whole.len().min(60);
    for number in 0..sampled {
        let number = if sampled < whole.len() { rng.below(whole.len() as u64) as usize } else { number };
        let extent = whole[number];
        let length = extent.length.min(rng.between(1, 20_000));
        let inside = extent.start + rng.below(extent.length - length + 1);
        for start in [extent.start, inside, extent.end() - length] {
            right_bytes(name, image, &top.model, &extent, start..start + length);
        }
    }
    let corners = corners(top);
    for _ in 0..20 {
        let (start, length) = random_range(rng, size, &corners);
        let end = if rng.chance(50) { start + length as u64 } else { start + rng.below(size - start + 1) };
        same_part(name, image, &whole, start..end);
    }
}

/// Checks the bytes of a part of an extent: by reading the disk and by reading the layer's file.
fn right_bytes(name: &str, image: &Image, model: &ModelDisk, extent: &Extent, range: Range<u64>) {
    let length = (range.end - range.start) as usize;
    let truth = model.read(range.start, length);
    assert!(read(image, range.start, length) == truth, "{name}: bytes of {range:x?} in {extent:x?}");
    match kind_at(extent, range.start) {
        ExtentKind::Data { file_offset: Some(offset) } => {
            let storage = image.layer_storage(extent.layer).unwrap_or_else(|| panic!("{name}: {extent:x?}"));
            let mut bytes = vec![0; length];
            storage.read_at(&mut bytes, offset).unwrap_or_else(|error| panic!("{name}: {extent:x?}: {error}"));
            assert!(bytes == truth, "{name}: the file of layer {} holds something else for {range:x?}", extent.layer);
        }
        ExtentKind::Data { file_offset: None } => {}
        ExtentKind::Zero | ExtentKind::Hole => {
            assert!(truth.iter().all(|byte| *byte == 0), "{name}: {extent:x?} does not read as zero in {range:x?}");
        }
    }
}

/// Checks that a part of the disk has the same extents as the whole has there.
fn same_part(name: &str, image: &Image, whole: &[Extent], range: Range<u64>) {
    let part = extents(image, range.clone());
    covers(name, &part, &range);
    let first = whole.partition_point(|extent| extent.end() <= range.start);
    let clipped: Vec<Extent> = whole[first..]
        .iter()
        .take_while(|extent| extent.start < range.end)
        .map(|extent| {
            let (start, end) = (extent.start.max(range.start), extent.end().min(range.end));
            Extent { start, length: end - start, kind: kind_at(extent, start), layer: extent.layer }
        })
        .filter(|extent| extent.length > 0)
        .collect();
    assert_eq!(joined(&part), joined(&clipped), "{name}: {range:x?}");
}
