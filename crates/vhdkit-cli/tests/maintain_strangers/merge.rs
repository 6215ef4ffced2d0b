//! Merging: each layer of a chain changed the file system of the guest; what comes out is what the chain showed.

use std::path::{Path, PathBuf};

use vhdkit_testkit::harness::Case;

use crate::common::{MIB, Scratch};
use crate::disks::{EXT4, Kind, NTFS, XFS, copy, text, tool, tree, used};
use crate::vhdx::{check, first_difference, raw, same_disk, write_difference};

/// Layers above the base.
const LAYERS: usize = 4;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, kind, mib, block) in [
        ("ext4, blocks of 1 MiB", EXT4, 96, "1M"),
        ("ext4, blocks of 32 MiB", EXT4, 96, "32M"),
        ("XFS, blocks of 2 MiB", XFS, 300, "2M"),
        ("NTFS, blocks of 1 MiB", NTFS, 96, "1M"),
        ("FAT32, blocks of 2 MiB", Kind::Fat32, 96, "2M"),
    ] {
        cases.push(Case::new(format!("merge: {name}"), kind.needs(&["qemu-img"]), move || merge(kind, mib, block)));
    }
    cases
}

/// What one layer changes: new files, and some of those of the layer before are deleted.
fn change(scratch: &Scratch, kind: Kind, disk: &Path, number: usize) {
    let tree = tree(scratch, 100 + number as u64, 2);
    for folder in ["kept", "gone"] {
        std::fs::rename(tree.join(folder), tree.join(format!("{folder}{number}"))).unwrap();
    }
    kind.fill(scratch, disk, &tree);
    std::fs::remove_dir_all(tree).unwrap();
    if number > 1 {
        let names = (0..24).map(|file| format!("gone{}/file{file:02}", number - 1));
        kind.delete(scratch, disk, &names.collect::<Vec<_>>());
    }
    kind.check(disk);
}

fn layer(number: usize) -> String {
    format!("layer{number}.avhdx")
}

fn merge(kind: Kind, mib: u64, block: &str) {
    let scratch = Scratch::new();
    let disk = used(&scratch, "disk.raw", kind, mib, 4);
    let base = scratch.join("base.vhdx");
    scratch.run(&["convert", "-q", text(&disk), text(&base), "--from", "raw", "--block-size", block]).expect(0);
    let mut parent = base.clone();
    let mut disks: Vec<PathBuf> = vec![disk.clone()];
    for number in 1..=LAYERS {
        let next = scratch.join(format!("disk{number}.raw"));
        copy((&disks[number - 1], 0), (&next, 0), mib * MIB);
        change(&scratch, kind, &next, number);
        let child = scratch.join(layer(number));
        scratch.run(&["create", "-q", text(&child), "--parent", text(&parent)]).expect(0);
        write_difference(&scratch, &child, &disks[number - 1], &next);
        disks.push(next);
        parent = child;
    }
    let expected = &disks[LAYERS];
    let before = scratch.join("before.vhdx");
    scratch.run(&["convert", "-q", text(&parent), text(&before)]).expect(0);
    same_disk(&before, expected);

    // What another image depends on is not deleted.
    let run = scratch.run(&["merge", &layer(3), "--delete"]).expect(6);
    assert!(run.err.contains(&layer(4)), "{}", run.err);
    // One level.
    scratch.run(&["merge", "-q", &layer(4), "--delete"]).expect(0).silent();
    assert!(!scratch.join(layer(4)).exists());
    check(&scratch, &scratch.join(layer(3)));
    let shown = raw(&scratch, &scratch.join(layer(3)));
    assert_eq!(first_difference(expected, &shown, MIB, |_| false), None);
    kind.check(&shown);

    // All that is left goes into the base.
    scratch.run(&["merge", "-q", &layer(3), "--into", "base.vhdx", "--delete"]).expect(0).silent();
    assert!((1..=LAYERS).all(|number| !scratch.join(layer(number)).exists()), "{:?}", scratch.names());
    check(&scratch, &base);
    same_disk(&base, expected);
    tool("qemu-img", &["compare", "-f", "vhdx", "-F", "vhdx", text(&base), text(&before)]);
    let after = raw(&scratch, &base);
    kind.check(&after);
    kind.same_files(&scratch, expected, &after);
    kind.files(&scratch, &after, |root| {
        assert!(root.join(format!("kept{LAYERS}/file23")).is_file());
        assert!(!root.join("gone1/file00").exists());
    });
}
