//! What the tests of diff and apply share: chains of the testkit in memory, opened from any layer on.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::sync::Arc;

use vhdkit::Result;
use vhdkit::image::{BlockDevice, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver};
use vhdkit::ops::diff::{ExportOptions, ExportReport, export, side_of_image};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::{BuiltImage, SparseFile};

pub const MIB: u64 = 1 << 20;

/// A built file in memory.
pub fn load(file: &SparseFile) -> Arc<dyn Storage> {
    let storage = MemoryStorage::with_len(file.len());
    for (start, bytes) in file.segments() {
        storage.write_at(bytes, start).unwrap();
    }
    Arc::new(storage)
}

/// Gives the parents of a chain by depth, whatever their locators say.
#[derive(Debug)]
struct Parents(Vec<Arc<dyn Storage>>);

impl ParentResolver for Parents {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let storage = Arc::clone(&self.0[wanted.depth]);
        Ok(vec![ParentCandidate { storage, path: None, named: true, lock: None }])
    }
}

/// A chain, the top first.
#[derive(Debug)]
pub struct Chain {
    pub files: Vec<Arc<dyn Storage>>,
}

impl Chain {
    pub fn new(top: &BuiltImage) -> Self {
        let layers = std::iter::successors(Some(top), |image| image.parent.as_deref());
        Self { files: layers.map(|image| load(&image.file)).collect() }
    }

    /// The image at a depth with everything beneath it.
    pub fn open(&self, depth: usize) -> Arc<Image> {
        Arc::new(self.try_open(Arc::clone(&self.files[depth]), depth, false).unwrap())
    }

    /// A file in place of the one at a depth.
    pub fn try_open(&self, file: Arc<dyn Storage>, depth: usize, write: bool) -> Result<Image> {
        let parents = Arc::new(Parents(self.files[depth + 1..].to_vec()));
        OpenOptions::new().write(write).replay(write).parents(parents).open(file, None)
    }
}

/// The parts of a storage that may hold data: large blocks are holes for the most part.
pub fn parts(of: &Arc<dyn Storage>) -> Vec<(u64, Vec<u8>)> {
    let length = of.len().unwrap();
    let (mut parts, mut at) = (Vec::new(), 0);
    while let Some(found) = of.next_data(at..length).unwrap() {
        let mut bytes = vec![0; (found.end - found.start) as usize];
        of.read_at(&mut bytes, found.start).unwrap();
        parts.push((found.start, bytes));
        at = found.end;
    }
    parts
}

/// A copy of what a storage holds.
pub fn copy(of: &Arc<dyn Storage>) -> Arc<dyn Storage> {
    let copy = MemoryStorage::with_len(of.len().unwrap());
    for (start, bytes) in parts(of) {
        copy.write_at(&bytes, start).unwrap();
    }
    Arc::new(copy)
}

/// All bytes of a storage.
pub fn bytes(of: &Arc<dyn Storage>) -> Vec<u8> {
    let mut bytes = vec![0; of.len().unwrap() as usize];
    of.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// All bytes of a disk.
pub fn disk(of: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0xC3; of.size() as usize];
    of.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Exports what makes one image another.
pub fn increment(base: &Image, result: &Image, options: &ExportOptions) -> (Vec<u8>, ExportReport) {
    let mut out = Vec::new();
    let side = |image: &Image| side_of_image(image, &image.layers()[0]);
    let report = export((base, side(base)), (result, side(result)), &mut out, options, &()).unwrap();
    assert_eq!(report.file_bytes, out.len() as u64);
    (out, report)
}
