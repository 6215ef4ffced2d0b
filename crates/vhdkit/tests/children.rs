//! The children of an image are found by what they say about their parent, wherever it says so.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice as _, OpenOptions};
use vhdkit::ops::Progress;
use vhdkit::ops::chain::{ChildLink, ParentFile, directory_of, find_children};
use vhdkit_testkit::BuiltImage;
use vhdkit_testkit::builder::ImageBuilder;
use vhdkit_testkit::guid::Guid;
use vhdkit_testkit::spec::LocatorSpec;

const MIB: u64 = 1 << 20;

fn builder(name: &str, seed: u64) -> ImageBuilder {
    let guid = Guid::seeded(seed);
    ImageBuilder::new(4 * MIB, MIB as u32).named(name).both_headers(|header| header.data_write_guid = guid)
}

fn put(directory: &Path, builder: &ImageBuilder) -> Arc<BuiltImage> {
    let built = builder.build();
    built.write_to(&directory.join(&built.file_name)).unwrap();
    Arc::new(built)
}

fn children(directory: &Path, of: &str) -> Vec<(String, ChildLink)> {
    let of = ParentFile::at(&directory.join(of)).unwrap();
    let found = find_children(&of, &[directory.to_owned()], &[], &()).unwrap();
    assert!(found.unknown.is_empty(), "{:?}", found.unknown);
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    found.found.iter().map(|child| (name(&child.path), child.link)).collect()
}

#[test]
fn children_are_known_by_either_identity_and_by_their_path() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    put(at, &builder("b-first.avhdx", 2).differencing(&base));
    // What is named without the ending of an image is one by what it holds.
    let child = put(at, &builder("a-second", 3).differencing(&base));
    put(at, &builder("grandchild.avhdx", 4).differencing(&child));
    let merging = LocatorSpec::new(Guid::seeded(99), ".\\gone.vhdx");
    let merging = merging.pair("parent_linkage2", &Guid::seeded(1).braced());
    put(at, &builder("c-merging.avhdx", 5).locator(merging));
    put(at, &builder("d-changed.avhdx", 6).locator(LocatorSpec::new(Guid::seeded(98), ".\\base.vhdx")));
    put(at, &builder("e-moved.avhdx", 7).locator(LocatorSpec::new(Guid::seeded(1), ".\\elsewhere.vhdx")));
    put(at, &builder("f-other.avhdx", 8).locator(LocatorSpec::new(Guid::seeded(97), ".\\other.vhdx")));
    std::fs::write(at.join("notes.txt"), b"no image").unwrap();
    std::fs::write(at.join("old.vhd"), [b"conectix".as_slice(), &[0; 504]].concat()).unwrap();
    std::fs::create_dir(at.join("z.vhdx")).unwrap();
    assert_eq!(
        children(at, "base.vhdx"),
        [
            ("a-second".to_owned(), ChildLink::Linkage),
            ("b-first.avhdx".to_owned(), ChildLink::Linkage),
            ("c-merging.avhdx".to_owned(), ChildLink::Linkage2),
            ("d-changed.avhdx".to_owned(), ChildLink::Path),
            ("e-moved.avhdx".to_owned(), ChildLink::Linkage),
        ]
    );
    assert_eq!(children(at, "a-second"), [("grandchild.avhdx".to_owned(), ChildLink::Linkage)]);
    assert_eq!(children(at, "grandchild.avhdx"), []);
}

#[test]
fn a_linkage_of_zeros_names_nobody() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let zero = Guid([0; 16]);
    put(at, &builder("base.vhdx", 1).both_headers(|header| header.data_write_guid = zero));
    let anonymous = |name: &str, path: &str| builder(name, 2).locator(LocatorSpec::new(zero, path));
    put(at, &anonymous("by-path.avhdx", ".\\base.vhdx"));
    put(at, &anonymous("other.avhdx", ".\\other.vhdx"));
    assert_eq!(children(at, "base.vhdx"), [("by-path.avhdx".to_owned(), ChildLink::Path)]);
}

#[test]
fn other_directories_and_named_files_are_looked_at_and_each_file_counts_once() {
    let scratch = tempfile::tempdir().unwrap();
    let (own, other) = (scratch.path().join("own"), scratch.path().join("other"));
    std::fs::create_dir_all(other.join("beneath")).unwrap();
    std::fs::create_dir(&own).unwrap();
    let base = put(&own, &builder("base.vhdx", 1));
    let child = builder("child.avhdx", 2).differencing(&base);
    put(&other, &child);
    put(&other.join("beneath"), &child);
    std::os::unix::fs::symlink(other.join("child.avhdx"), own.join("a-link.avhdx")).unwrap();
    std::fs::hard_link(other.join("child.avhdx"), other.join("again.avhdx")).unwrap();
    let of = ParentFile::at(&own.join("base.vhdx")).unwrap();
    let found = |directories: &[PathBuf], files: &[PathBuf]| {
        let children = find_children(&of, directories, files, &()).unwrap().found;
        children.into_iter().map(|child| child.path).collect::<Vec<_>>()
    };
    // A link in the image's own directory leads to one.
    assert_eq!(found(std::slice::from_ref(&own), &[]), [own.join("a-link.avhdx")]);
    assert_eq!(found(&[other.clone(), own.clone()], &[]), [other.join("again.avhdx")]);
    let named = other.join("beneath/child.avhdx");
    assert_eq!(found(&[], &[named.clone(), named.clone(), own.join("base.vhdx")]), [named]);
    assert_eq!(directory_of(&own.join("a-link.avhdx")), other.canonicalize().unwrap());
    for missing in [own.join("missing"), own.join("base.vhdx")] {
        assert_eq!(find_children(&of, &[missing], &[], &()).unwrap_err().kind(), ErrorKind::Io);
    }
    assert_eq!(find_children(&of, &[], &[own.join("missing")], &()).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn what_cannot_be_read_is_told_apart_from_what_is_no_child() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    let damaged = builder("damaged.avhdx", 2).differencing(&base);
    put(at, &damaged.patch(64 << 10, &[0xff; 4096]).patch(128 << 10, &[0xff; 4096]));
    let of = ParentFile::at(&at.join("base.vhdx")).unwrap();
    let found = find_children(&of, &[at.to_owned()], &[], &()).unwrap();
    assert!(found.found.is_empty(), "{found:?}");
    let unknown: Vec<_> = found.unknown.iter().map(|error| (error.kind(), error.path().unwrap())).collect();
    assert_eq!(unknown, [(ErrorKind::Corrupt, at.join("damaged.avhdx").as_path())]);
}

#[test]
fn images_in_use_are_no_obstacle_and_stay_in_use() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    put(at, &builder("child.avhdx", 2).differencing(&base));
    let writing = OpenOptions::new().write(true).open_path(&at.join("base.vhdx")).unwrap();
    let child = OpenOptions::new().without_parents().write(true).open_path(&at.join("child.avhdx")).unwrap();
    let of = ParentFile::of(&writing.layers()[0]);
    let found = find_children(&of, &[at.to_owned()], &[], &()).unwrap().found;
    assert_eq!(found.len(), 1);
    assert!(found[0].breaks_by_writing() && found[0].in_use);
    assert_eq!(Some(found[0].identity), child.layers()[0].storage().identity());
    for file in ["base.vhdx", "child.avhdx"] {
        let second = OpenOptions::new().without_parents().open_path(&at.join(file));
        assert_eq!(second.unwrap_err().kind(), ErrorKind::Locked, "{file}");
    }
    drop(child);
    assert!(!find_children(&of, &[at.to_owned()], &[], &()).unwrap().found[0].in_use);
}

#[test]
fn of_several_copies_the_one_that_is_found_is_the_parent() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    put(at, &builder("child.avhdx", 2).differencing(&base));
    std::fs::copy(at.join("base.vhdx"), at.join("copy.vhdx")).unwrap();
    assert_eq!(children(at, "base.vhdx"), [("child.avhdx".to_owned(), ChildLink::Linkage)]);
    assert_eq!(children(at, "copy.vhdx"), []);
    // When it is gone, or is not the parent any more, a copy is all that the child has.
    let image = OpenOptions::new().write(true).open_path(&at.join("base.vhdx")).unwrap();
    image.write_at(b"changed", 0).unwrap();
    image.close().unwrap();
    assert_eq!(children(at, "copy.vhdx"), [("child.avhdx".to_owned(), ChildLink::Linkage)]);
    assert_eq!(children(at, "base.vhdx"), [("child.avhdx".to_owned(), ChildLink::Path)]);
    std::fs::remove_file(at.join("base.vhdx")).unwrap();
    assert_eq!(children(at, "copy.vhdx"), [("child.avhdx".to_owned(), ChildLink::Linkage)]);
}

#[test]
fn it_can_be_cancelled() {
    struct Stop;
    impl Progress for Stop {
        fn advance(&self, _done: u64, _total: Option<u64>) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    put(scratch.path(), &builder("base.vhdx", 1));
    let of = ParentFile::at(&scratch.path().join("base.vhdx")).unwrap();
    let error = find_children(&of, &[scratch.path().to_owned()], &[], &Stop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}
