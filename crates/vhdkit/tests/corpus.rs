//! Images that others wrote: each gives the guest content that independent readers agreed on, and is left as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use vhdkit::format::finding::Strictness;
use vhdkit::image::{BlockDevice, FileResolver, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{FileAccess, FileStorage, Sharing};
use vhdkit_testkit::foreign::{CorpusRow, corpus_dir, corpus_manifest, sha256_file, unpack};
use vhdkit_testkit::harness::{Case, Needs, main_with};

fn open(path: &Path) -> Image {
    OpenOptions::new().parents(Arc::new(FileResolver::new().allow_own_directory())).open_path(path).expect("opens")
}

/// Hashes the disk: by plain reads when `extents` is false, else reading only what the extents call data.
fn guest_sha256(image: &Image, extents: bool) -> String {
    let mut hash = Sha256::new();
    let zeros = vec![0_u8; 1 << 20];
    let mut buffer = vec![0_u8; 1 << 20];
    let mut pieces = Vec::new();
    if extents {
        image
            .visit_extents(0..image.size(), &mut |extent| {
                let data = matches!(extent.kind, vhdkit::image::ExtentKind::Data { .. });
                pieces.push((extent.start, extent.length, data));
                std::ops::ControlFlow::Continue(())
            })
            .expect("extents");
        assert_eq!(pieces.iter().map(|(_, length, _)| length).sum::<u64>(), image.size());
    } else {
        pieces.push((0, image.size(), true));
    }
    for (start, length, data) in pieces {
        let mut position = start;
        while position < start + length {
            let count = (start + length - position).min(1 << 20);
            let part = &mut buffer[..usize::try_from(count).unwrap()];
            if data {
                image.read_at(part, position).expect("reads");
                hash.update(part);
            } else {
                hash.update(&zeros[..part.len()]);
            }
            position += count;
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn verify(row: &CorpusRow) {
    let directory = tempfile::tempdir().unwrap();
    if let Some(name) = &row.parent {
        let parent = corpus_manifest().into_iter().find(|other| other.name == *name).expect("parent row");
        let _ = unpack(&parent, directory.path());
    }
    let path = unpack(row, directory.path());
    let image = open(&path);
    assert_eq!(image.size(), row.virtual_size);
    assert_eq!(image.allocation_unit(), u64::from(row.block_size));
    assert_eq!(image.disk_type().as_str(), row.kind);
    assert_eq!(image.logical_sector_size(), row.logical_sector_size);
    assert_eq!(image.physical_sector_size(), row.physical_sector_size);
    assert_eq!(image.layers()[0].replay().is_some(), row.dirty);
    assert_eq!(guest_sha256(&image, true), row.guest_sha256, "by extents");
    if row.virtual_size <= 2 << 30 {
        assert_eq!(guest_sha256(&image, false), row.guest_sha256, "by plain reads");
    }
    drop(image);
    let storage = FileStorage::open(&path, FileAccess::Read, Sharing::Normal).unwrap();
    let options = CheckOptions { strictness: Strictness::Normal, ..CheckOptions::default() };
    let report = check(&(Arc::new(storage) as Arc<dyn vhdkit::storage::Storage>), None, &options, &()).unwrap();
    assert_eq!(report.errors, 0, "{:#?}", report.findings);
    assert_eq!(sha256_file(&path).unwrap(), row.file_sha256, "the file was changed");
}

fn main() {
    let cases = if corpus_dir().is_none() {
        // Reported as ignored, or as failed where everything must be there.
        vec![Case::new("corpus", Needs::nothing().and_corpus(), || panic!("the corpus is not there"))]
    } else {
        let rows = corpus_manifest();
        assert!(!rows.is_empty(), "the corpus has no rows");
        let case = |row: CorpusRow| Case::new(row.name.clone(), Needs::nothing().and_corpus(), move || verify(&row));
        rows.into_iter().map(case).collect()
    };
    main_with(cases);
}
