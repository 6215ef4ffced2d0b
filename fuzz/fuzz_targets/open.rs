//! Whole images: opened at every level, walked, read, checked; with a parent where the input has one.
#![no_main]

use std::ops::ControlFlow;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhdkit::error::{ErrorKind, Result};
use vhdkit::format::finding::{Code, Severity, Strictness};
use vhdkit::image::{
    BlockDevice, Extent, ExtentKind, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver,
};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_fuzz::{ReadOnly, chain, image, set_data_write_guid};

/// Extents that are looked at in one walk: an image may have millions.
const EXTENTS_MAX: usize = 4096;
/// Extents whose bytes are read.
const READ_MAX: usize = 32;

/// Gives the one parent that the input describes, made to fit.
#[derive(Debug)]
struct Given(Arc<MemoryStorage>);

impl ParentResolver for Given {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        if let Some(linkage) = wanted.locator.linkage().filter(|_| wanted.depth == 0) {
            set_data_write_guid(&self.0, linkage);
        }
        Ok(vec![ParentCandidate { storage: Arc::new(ReadOnly(self.0.clone())), path: None, named: true, lock: None }])
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((child, parent)) = chain(input) else { return };
    let Some(storage) = image(child) else { return };
    let storage = Arc::new(ReadOnly(storage));
    let parent = image(parent);
    for strictness in [Strictness::Lenient, Strictness::Normal, Strictness::Strict] {
        let options = OpenOptions::new().strictness(strictness);
        let alone = options.clone().without_parents().open(storage.clone(), None);
        if let Ok(image) = &alone {
            look_at(image);
        }
        let writable = options.clone().write(true).without_parents().open(storage.clone(), None);
        judge(&storage, strictness, &alone, writable.is_ok());
        let chained = match &parent {
            Some(parent) => options.parents(Arc::new(Given(parent.clone()))).open(storage.clone(), None),
            None => options.open(storage.clone(), None),
        };
        match (&alone, &chained) {
            (Err(alone), Err(chained)) => assert_eq!(alone.kind(), chained.kind()),
            (Err(alone), Ok(_)) => panic!("opens with its parent and not without: {alone}"),
            (Ok(_), Ok(chained)) => look_at(chained),
            (Ok(_), Err(_)) => {}
        }
    }
});

/// Checks the image, and that the check agrees with opening.
fn judge(storage: &Arc<ReadOnly>, strictness: Strictness, opened: &Result<Image>, writable: bool) {
    let storage: Arc<dyn Storage> = storage.clone();
    let options = CheckOptions { strictness, ..CheckOptions::default() };
    let report = check(&storage, None, &options, &()).expect("memory can be read, and nobody cancels");
    match opened {
        Err(error) => assert!(report.errors > 0, "cannot be opened, and check finds nothing: {error}"),
        // Opened alone, an image needs no path to its parent (V-150).
        Ok(_) if writable => {
            let mut errors = report.findings.iter().filter(|finding| finding.severity() == Severity::Error);
            assert!(errors.all(|finding| finding.code() == Code::LocatorNoPath), "writable: {:?}", report.findings);
        }
        Ok(_) => {}
    }
    assert!(report.summary.is_some() || report.errors > 0);
    let Ok(image) = opened else { return };
    if report.errors > 0 {
        return;
    }
    // Nothing is wrong, so everything can be read, except what only a parent has.
    let walked = image.visit_extents(0..image.size(), &mut |_| ControlFlow::Continue(()));
    if let Err(error) = walked {
        assert_eq!(error.kind(), ErrorKind::ParentMissing, "clean, but: {error}");
    }
    let summary = report.summary.expect("it opens");
    assert_eq!(summary.blocks.iter().sum::<u64>(), image.geometry().payload_blocks());
}

/// Walks and reads an image, and checks that what it says fits together.
fn look_at(image: &Image) {
    let size = image.size();
    let mut extents: Vec<Extent> = Vec::new();
    let walked = image.visit_extents(0..size, &mut |extent| {
        extents.push(*extent);
        if extents.len() < EXTENTS_MAX { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    let mut position = 0;
    for extent in &extents {
        assert_eq!(extent.start, position, "a gap or an overlap between extents");
        assert!(extent.length > 0 && extent.layer < image.layers().len());
        position = extent.end();
    }
    assert!(position <= size);
    if walked.is_ok() && extents.len() < EXTENTS_MAX {
        assert_eq!(position, size, "extents do not reach the end of the disk");
    }
    for extent in extents.iter().take(READ_MAX) {
        read_extent(image, extent);
    }
    // Where the walk stopped with an error, reading fails too.
    if let Err(error) = walked {
        assert!(error.kind() != ErrorKind::OutOfRange);
    }
    let mut last = [0; 512];
    let _ = image.read_at(&mut last, size - 512);
    assert_eq!(image.read_at(&mut last, size - 511).map_err(|error| error.kind()), Err(ErrorKind::OutOfRange));
}

/// Reads the start and the end of an extent.
fn read_extent(image: &Image, extent: &Extent) {
    let length = extent.length.min(1500) as usize;
    for start in [extent.start, extent.end() - length as u64] {
        let mut bytes = vec![0xaa; length];
        let read = image.read_at(&mut bytes, start);
        assert!(read.is_ok(), "an extent that cannot be read: {extent:?}: {read:?}");
        let mut again = vec![0x55; length];
        image.read_at(&mut again, start).expect("it was read before");
        assert!(bytes == again, "two reads differ");
        match extent.kind {
            ExtentKind::Zero | ExtentKind::Hole => {
                assert!(bytes.iter().all(|byte| *byte == 0), "{extent:?} is not zero")
            }
            ExtentKind::Data { file_offset: Some(offset) } => {
                let storage = image.layer_storage(extent.layer).expect("the layer exists");
                let mut raw = vec![0; length];
                storage.read_at(&mut raw, offset + (start - extent.start)).expect("the extent is in the file");
                assert!(bytes == raw, "{extent:?} does not hold what is read there");
            }
            ExtentKind::Data { file_offset: None } => {}
        }
    }
}
