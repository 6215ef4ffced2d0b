//! Chains in directories: every broken link is named, with what mends it, and nothing is written or locked.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice as _, FileResolver, OpenOptions};
use vhdkit::ops::chain::{ChainOptions, ChainReport, ChildLink, Node, TroubleKind, chain};
use vhdkit::storage::Sharing;
use vhdkit_testkit::BuiltImage;
use vhdkit_testkit::builder::ImageBuilder;
use vhdkit_testkit::dirty::DirtyPlan;
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

fn options() -> ChainOptions {
    let parents = FileResolver::new().allow_own_directory().sharing(Sharing::ForceShare);
    ChainOptions { parents: Some(Arc::new(parents)), ..ChainOptions::default() }
}

fn look(of: &Path) -> ChainReport {
    chain(of, &options(), &()).unwrap()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Depth, name, and the kinds of trouble.
fn drawn(report: &ChainReport) -> Vec<(usize, String, Vec<&'static str>)> {
    let kinds = |node: &Node| node.troubles.iter().map(|trouble| trouble.kind.as_str()).collect();
    report.nodes.iter().map(|node| (node.depth, name(&node.path), kinds(node))).collect()
}

fn row(depth: usize, name: &str, kinds: &[&'static str]) -> (usize, String, Vec<&'static str>) {
    (depth, name.to_owned(), kinds.to_vec())
}

fn node<'a>(report: &'a ChainReport, wanted: &str) -> &'a Node {
    report.nodes.iter().find(|node| name(&node.path) == wanted).unwrap()
}

/// The arguments of all remedies.
fn commands(node: &Node) -> Vec<String> {
    let remedies = node.troubles.iter().flat_map(|trouble| &trouble.remedies);
    remedies
        .filter(|remedy| !remedy.arguments.is_empty())
        .map(|remedy| {
            let words = remedy.arguments.iter().map(|word| match Path::new(word).file_name() {
                Some(file) if Path::new(word).is_absolute() => file.to_string_lossy().into_owned(),
                _ => word.to_string_lossy().into_owned(),
            });
            words.collect::<Vec<_>>().join(" ")
        })
        .collect()
}

/// Whether opening agrees: a link is whole exactly when the image opens with its parents.
fn assert_opening_agrees(report: &ChainReport) {
    for (index, node) in report.nodes.iter().enumerate() {
        let mut whole = true;
        let mut at = Some(index);
        while let Some(place) = at {
            whole &= !report.nodes[place].is_broken();
            at = report.nodes[place].parent;
        }
        let parents = Arc::new(FileResolver::new().allow_own_directory().sharing(Sharing::ForceShare));
        let opened = OpenOptions::new().sharing(Sharing::ForceShare).parents(parents).open_path(&node.path);
        assert_eq!(opened.is_ok(), whole, "{}: {opened:?} {:?}", node.path.display(), node.troubles);
    }
}

#[test]
fn trees_are_drawn_from_their_roots_on() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("m-base.vhdx", 1).pattern_block(1, 7));
    let child = put(at, &builder("a-child.avhdx", 2).differencing(&base));
    put(at, &builder("z-child.avhdx", 3).differencing(&base));
    put(at, &builder("b-grandchild", 4).differencing(&child));
    put(at, &builder("alone.vhdx", 5).sector_sizes(4096, 4096));
    let mut dirty = builder("dirty.vhdx", 6).build();
    DirtyPlan::new(5).move_bat(&dirty).move_metadata(&dirty.clone()).apply(&mut dirty);
    dirty.write_to(&at.join("dirty.vhdx")).unwrap();
    std::fs::write(at.join("notes.txt"), b"no image").unwrap();
    std::fs::write(at.join("old.vhd"), [b"conectix".as_slice(), &[0; 504]].concat()).unwrap();
    std::fs::write(at.join("set.vhds"), [7; 4096]).unwrap();
    let report = look(at);
    assert!(report.is_whole());
    assert_opening_agrees(&report);
    assert_eq!(
        drawn(&report),
        [
            row(0, "alone.vhdx", &[]),
            row(0, "dirty.vhdx", &[]),
            row(0, "m-base.vhdx", &[]),
            row(1, "a-child.avhdx", &[]),
            row(2, "b-grandchild", &[]),
            row(1, "z-child.avhdx", &[]),
        ]
    );
    assert!(node(&report, "dirty.vhdx").is_dirty && !node(&report, "m-base.vhdx").is_dirty);
    let grandchild = node(&report, "b-grandchild");
    assert_eq!(grandchild.parent.map(|parent| name(&report.nodes[parent].path)).unwrap(), "a-child.avhdx");
    assert_eq!(grandchild.link, Some(ChildLink::Linkage));
    assert_eq!((grandchild.disk_size, grandchild.logical_sector_size), (4 * MIB, 512));
    assert_eq!(grandchild.file_size, std::fs::metadata(at.join("b-grandchild")).unwrap().len());
    assert_eq!(grandchild.parent_paths, [("relative_path".to_owned(), ".\\a-child.avhdx".to_owned())]);
    let skipped: Vec<String> = report.skipped.iter().map(|error| name(error.path().unwrap())).collect();
    assert_eq!(skipped, ["old.vhd", "set.vhds"]);
    assert!(report.skipped[0].message().contains("the older format"), "{:?}", report.skipped);

    // One image: its own tree, with everything in it.
    for of in ["m-base.vhdx", "b-grandchild"] {
        let names: Vec<String> = look(&at.join(of)).nodes.iter().map(|node| name(&node.path)).collect();
        assert_eq!(names, ["m-base.vhdx", "a-child.avhdx", "b-grandchild", "z-child.avhdx"], "{of}");
    }
    let report = look(&at.join("alone.vhdx"));
    assert_eq!((drawn(&report), report.skipped.len()), (vec![row(0, "alone.vhdx", &[])], 0));
}

#[test]
fn a_parent_that_moved_is_found_by_its_identity() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    put(at, &builder("child.avhdx", 2).differencing(&base));
    std::fs::rename(at.join("base.vhdx"), at.join("renamed.vhdx")).unwrap();
    let report = look(at);
    assert!(!report.is_whole());
    assert_opening_agrees(&report);
    assert_eq!(drawn(&report), [row(0, "renamed.vhdx", &[]), row(1, "child.avhdx", &["moved"])]);
    assert_eq!(commands(node(&report, "child.avhdx")), ["reparent child.avhdx renamed.vhdx"]);

    // Another image at its place, and a copy of the right one elsewhere.
    put(at, &builder("base.vhdx", 9));
    std::fs::create_dir(at.join("deep")).unwrap();
    std::fs::copy(at.join("renamed.vhdx"), at.join("deep/copy.vhdx")).unwrap();
    let report = chain(at, &ChainOptions { recursive: true, ..options() }, &()).unwrap();
    assert_opening_agrees(&report);
    let child = node(&report, "child.avhdx");
    assert_eq!(commands(child), ["reparent child.avhdx renamed.vhdx"], "the one beside the child is preferred");
    for part in ["deep/copy.vhdx", "base.vhdx\", which is not the parent"] {
        assert!(child.troubles[0].message.contains(part), "{:?}", child.troubles);
    }
    // Without the right one in sight the parent is not the right one; in a directory that is named it is found again.
    std::fs::rename(at.join("renamed.vhdx"), at.join("deep/renamed.vhdx")).unwrap();
    assert_eq!(node(&look(at), "child.avhdx").troubles[0].kind, TroubleKind::Changed);
    let also = ChainOptions { also: vec![at.join("deep/renamed.vhdx")], ..options() };
    let report = chain(&at.join("child.avhdx"), &also, &()).unwrap();
    assert_eq!(drawn(&report), [row(0, "renamed.vhdx", &[]), row(1, "child.avhdx", &["moved"])]);
}

#[test]
fn a_parent_that_was_changed_is_told_with_a_warning() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    put(at, &builder("child.avhdx", 2).differencing(&base));
    let image = OpenOptions::new().write(true).open_path(&at.join("base.vhdx")).unwrap();
    image.write_at(b"changed", 0).unwrap();
    image.close().unwrap();
    let report = look(at);
    assert_opening_agrees(&report);
    assert_eq!(drawn(&report), [row(0, "base.vhdx", &[]), row(1, "child.avhdx", &["changed"])]);
    let child = node(&report, "child.avhdx");
    assert_eq!(commands(child), ["reparent child.avhdx base.vhdx --ignore-id-mismatch"]);
    let trouble = &child.troubles[0];
    assert!(trouble.remedies[0].arguments.is_empty(), "the safe way comes first: {trouble:?}");
    assert!(trouble.remedies[1].what.contains("file systems may be damaged"), "{trouble:?}");
}

#[test]
fn parents_that_are_missing_denied_or_unreadable() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("vms");
    std::fs::create_dir(&at).unwrap();
    let locator = |path: &str| LocatorSpec::new(Guid::seeded(50), path);
    put(&at, &builder("a-missing.avhdx", 1).locator(locator(".\\gone.vhdx")));
    put(&at, &builder("b-denied.avhdx", 2).locator(locator("..\\outside.vhdx")));
    put(&at, &builder("c-damaged.avhdx", 3).locator(locator(".\\damaged.vhdx")));
    put(&at, &builder("d-no-image.avhdx", 4).locator(locator(".\\notes.txt")));
    put(&at, &builder("e-anonymous.avhdx", 5).locator(LocatorSpec::new(Guid([0; 16]), ".\\f-other.vhdx")));
    put(&at, &builder("f-other.vhdx", 6));
    put(
        &at,
        &builder("g-wide.avhdx", 7)
            .sector_sizes(4096, 4096)
            .locator(LocatorSpec::new(Guid::seeded(6), ".\\f-other.vhdx")),
    );
    put(&at, &builder("damaged.vhdx", 50).patch(64 << 10, &[0xff; 4096]).patch(128 << 10, &[0xff; 4096]));
    std::fs::write(at.join("notes.txt"), b"no image").unwrap();
    put(scratch.path(), &builder("outside.vhdx", 50));
    let report = look(&at);
    assert_opening_agrees(&report);
    assert_eq!(
        drawn(&report),
        [
            row(0, "a-missing.avhdx", &["missing"]),
            row(0, "b-denied.avhdx", &["denied"]),
            row(0, "c-damaged.avhdx", &["unreadable"]),
            row(0, "d-no-image.avhdx", &["unreadable"]),
            row(0, "f-other.vhdx", &[]),
            row(1, "e-anonymous.avhdx", &["unidentified"]),
            row(1, "g-wide.avhdx", &["sector-size"]),
        ]
    );
    assert_eq!(
        commands(node(&report, "e-anonymous.avhdx")),
        ["reparent e-anonymous.avhdx f-other.vhdx --ignore-id-mismatch"]
    );
    let damaged: Vec<String> = report.damaged.iter().map(|error| name(error.path().unwrap())).collect();
    assert_eq!(damaged, ["damaged.vhdx"]);
    assert!(node(&report, "c-damaged.avhdx").troubles[0].message.contains("header"), "{report:?}");
    assert!(report.nodes.iter().all(|node| node.troubles.iter().all(|trouble| !trouble.remedies.is_empty())));
    // What is allowed is looked at, with what lies there.
    let resolver = FileResolver::new().allow_own_directory().allow_directory(scratch.path()).unwrap();
    let wider = ChainOptions { parents: Some(Arc::new(resolver)), ..ChainOptions::default() };
    let report = chain(&at.join("b-denied.avhdx"), &wider, &()).unwrap();
    assert_eq!(drawn(&report)[..2], [row(0, "outside.vhdx", &[]), row(1, "a-missing.avhdx", &["moved"])]);
    assert!(!node(&report, "b-denied.avhdx").is_broken());
}

#[test]
fn a_stale_path_and_a_merge_that_was_begun_are_notes() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    put(at, &builder("base.vhdx", 1));
    let stale = LocatorSpec::new(Guid::seeded(1), ".\\old-place\\base.vhdx");
    put(at, &builder("a-stale.avhdx", 2).locator(stale.pair("absolute_win32_path", "C:\\vms\\base.vhdx")));
    let begun = LocatorSpec::new(Guid::seeded(1), ".\\base.vhdx");
    put(at, &builder("b-begun.avhdx", 3).locator(begun.pair("parent_linkage2", &Guid::seeded(70).braced())));
    let half = LocatorSpec::new(Guid::seeded(71), ".\\base.vhdx");
    put(at, &builder("c-half.avhdx", 4).locator(half.pair("parent_linkage2", &Guid::seeded(1).braced())));
    let windows = LocatorSpec::new(Guid::seeded(1), ".\\BASE.vhdx").pair("parent_linkage2", &Guid([0; 16]).braced());
    put(at, &builder("d-windows.avhdx", 5).locator(windows));
    let report = look(at);
    assert!(report.is_whole());
    assert_opening_agrees(&report);
    assert_eq!(
        drawn(&report),
        [
            row(0, "base.vhdx", &[]),
            row(1, "a-stale.avhdx", &["stale-path"]),
            row(1, "b-begun.avhdx", &["merge-begun"]),
            row(1, "c-half.avhdx", &["merge-begun"]),
            row(1, "d-windows.avhdx", &[]),
        ]
    );
    assert_eq!(node(&report, "c-half.avhdx").link, Some(ChildLink::Linkage2));
    assert_eq!(commands(node(&report, "c-half.avhdx")), ["merge c-half.avhdx"]);
    assert_eq!(commands(node(&report, "b-begun.avhdx")), ["merge b-begun.avhdx", "reparent b-begun.avhdx base.vhdx"]);
    assert_eq!(commands(node(&report, "a-stale.avhdx")), ["reparent a-stale.avhdx base.vhdx"]);
}

#[test]
fn cycles_end() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let image = |name: &str, own: u64, parent: u64, path: &str| {
        put(at, &builder(name, own).locator(LocatorSpec::new(Guid::seeded(parent), path)));
    };
    image("a.avhdx", 1, 3, ".\\c.avhdx");
    image("b.avhdx", 2, 1, ".\\a.avhdx");
    image("c.avhdx", 3, 2, ".\\b.avhdx");
    image("d-child.avhdx", 4, 3, ".\\c.avhdx");
    image("e-own.avhdx", 5, 5, ".\\e-own.avhdx");
    let report = look(at);
    assert_opening_agrees(&report);
    assert_eq!(
        drawn(&report),
        [
            row(0, "a.avhdx", &["cycle"]),
            row(0, "b.avhdx", &["cycle"]),
            row(0, "c.avhdx", &["cycle"]),
            row(1, "d-child.avhdx", &[]),
            row(0, "e-own.avhdx", &["cycle"]),
        ]
    );
    assert!(node(&report, "b.avhdx").troubles[0].message.contains("a.avhdx"), "{report:?}");
    for of in ["a.avhdx", "d-child.avhdx"] {
        assert!(!look(&at.join(of)).is_whole());
    }
}

#[test]
fn long_chains_and_many_files_are_joined_once_each() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let mut below = put(at, &builder("000.vhdx", 1000));
    for level in 1..260 {
        below = put(at, &builder(&format!("{level:03}.vhdx"), 1000 + level).differencing(&below));
    }
    let began = std::time::Instant::now();
    let report = look(at);
    assert_eq!(report.nodes.len(), 260);
    for (depth, node) in report.nodes.iter().enumerate() {
        let expected: &[TroubleKind] = if depth < 256 { &[] } else { &[TroubleKind::TooDeep] };
        let kinds: Vec<TroubleKind> = node.troubles.iter().map(|trouble| trouble.kind).collect();
        assert_eq!((node.depth, kinds.as_slice()), (depth, expected));
    }
    assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
}

#[test]
fn names_in_use_and_locks() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let base = put(at, &builder("base.vhdx", 1));
    put(at, &builder("child.avhdx", 2).differencing(&base));
    std::fs::hard_link(at.join("base.vhdx"), at.join("hard.vhdx")).unwrap();
    std::os::unix::fs::symlink("child.avhdx", at.join("a-link.avhdx")).unwrap();
    std::os::unix::fs::symlink("nowhere", at.join("dangling.avhdx")).unwrap();
    let writing = OpenOptions::new().write(true).open_path(&at.join("base.vhdx")).unwrap();
    let report = look(at);
    assert!(report.is_whole());
    assert_eq!(drawn(&report), [row(0, "base.vhdx", &[]), row(1, "child.avhdx", &[])]);
    assert_eq!(node(&report, "base.vhdx").other_names, [at.join("hard.vhdx")]);
    assert_eq!(node(&report, "child.avhdx").other_names, [at.join("a-link.avhdx")]);
    assert!(node(&report, "base.vhdx").in_use && !node(&report, "child.avhdx").in_use);
    writing.write_at(b"still ours", 0).unwrap();
    writing.close().unwrap();
    // By its link, an image is known as what it is.
    let report = look(&at.join("a-link.avhdx"));
    assert_eq!(drawn(&report)[1].1, "a-link.avhdx");
}

#[test]
fn what_is_no_image_or_directory_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    put(at, &builder("image.vhdx", 1));
    std::fs::write(at.join("junk"), [7; 8192]).unwrap();
    std::fs::write(at.join("junk.vhdx"), [7; 8192]).unwrap();
    let kind = |path: PathBuf| chain(&path, &options(), &()).unwrap_err().kind();
    assert_eq!(kind(at.join("missing")), ErrorKind::Io);
    assert_eq!(kind(at.join("junk")), ErrorKind::NotVhdx);
    assert_eq!(kind(at.join("junk.vhdx")), ErrorKind::NotVhdx);
    assert_eq!(kind(PathBuf::from("/dev/null")), ErrorKind::InvalidArgument);
    let also = ChainOptions { also: vec![at.join("missing")], ..options() };
    assert_eq!(chain(at, &also, &()).unwrap_err().kind(), ErrorKind::Io);
    std::fs::create_dir(at.join("empty")).unwrap();
    let report = look(&at.join("empty"));
    assert!(report.nodes.is_empty() && report.is_whole());
}
