//! Disks of the corpus: what Windows and others made is read as the strangers' tools read it.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use vhdkit::guest::{VolumeKind, VolumeState};
use vhdkit::image::{BlockDevice as _, FileResolver, Image, OpenOptions};
use vhdkit_testkit::foreign::{CorpusRow, corpus_dir, corpus_manifest, unpack};
use vhdkit_testkit::harness::{Case, Needs};

use crate::support::*;
use crate::{ext, fat, ntfs};

/// What lies in the disks that have something in them.
const EXPECTED: &[(&str, &[VolumeKind])] = &[
    ("discutils/btrfs.vhdx", &[VolumeKind::Btrfs]),
    ("discutils/lvm2.vhdx", &[VolumeKind::Lvm]),
    ("discutils/swap.vhdx", &[VolumeKind::Swap]),
    ("discutils/xfs.vhdx", &[VolumeKind::Xfs]),
    ("dfvfs/ext2.vhdx", &[VolumeKind::Ext2]),
    ("dfvfs/fat-differential.vhdx", &[VolumeKind::Fat12]),
    ("dfvfs/fat-parent.vhdx", &[VolumeKind::Fat12]),
    ("dfvfs/ntfs-dynamic.vhdx", &[VolumeKind::Ntfs]),
    ("dfvfs/ntfs-fixed.vhdx", &[VolumeKind::Ntfs]),
    ("dfvfs/ntfs-parent.vhdx", &[VolumeKind::Ntfs]),
    ("dfvfs/ntfs-differential.vhdx", &[VolumeKind::Ntfs]),
    ("coreos-hyperv/config2_base.vhdx", &[VolumeKind::Fat32]),
    ("exfat/exFAT-v1.vhdx", &[VolumeKind::Other("Microsoft reserved partition"), VolumeKind::ExFat]),
];

/// Volumes up to this size are judged by the strangers' tools.
const JUDGED_BYTES_MAX: u64 = 200 << 20;

pub(crate) fn cases() -> Vec<Case> {
    let needs = || Needs::tools(&["ntfscat", "ntfsinfo", "dumpe2fs", "fsck.fat"]).and_corpus();
    if corpus_dir().is_none() {
        return vec![Case::new("guests of the corpus", needs(), || panic!("the corpus is not there"))];
    }
    let case = |row: CorpusRow| Case::new(format!("guests of {}", row.name), needs(), move || judge(&row));
    corpus_manifest().into_iter().map(case).collect()
}

fn judge(row: &CorpusRow) {
    let scratch = Scratch::new();
    let path = unpack(row, &scratch.join("corpus"));
    let resolver = Arc::new(FileResolver::new().allow_own_directory());
    let image = OpenOptions::new().parents(resolver).open_path(&path).unwrap();
    let survey = look(&image);
    let Some((_, kinds)) = EXPECTED.iter().find(|(name, _)| *name == row.name) else {
        let readable = survey.volumes.iter().any(|volume| matches!(volume.state, VolumeState::Readable { .. }));
        assert!(!readable, "{survey:?}");
        return;
    };
    let found: Vec<VolumeKind> = survey.volumes.iter().map(|volume| volume.kind).collect();
    assert_eq!(found, *kinds, "{survey:?}");
    for volume in &survey.volumes {
        let free = free_of(&image, volume);
        let understood = matches!(
            volume.kind,
            VolumeKind::Ext2
                | VolumeKind::Ntfs
                | VolumeKind::Fat12
                | VolumeKind::Fat32
                | VolumeKind::ExFat
                | VolumeKind::Xfs
        );
        assert_eq!(!free.is_empty(), understood, "{:?}", volume.state);
        let range = &volume.range;
        if !understood || range.end - range.start > JUDGED_BYTES_MAX {
            continue;
        }
        let alone = extracted(&scratch, &image, range);
        let truth = match volume.kind {
            VolumeKind::Ext2 => ext::truth(&alone),
            VolumeKind::Ntfs => ntfs::truth(&alone),
            kind => fat::truth(&alone, kind),
        };
        let truth: Vec<_> = truth.into_iter().map(|free| free.start + range.start..free.end + range.start).collect();
        assert_eq!(free, truth);
    }
}

/// A volume as a file of its own.
fn extracted(scratch: &Scratch, image: &Image, range: &std::ops::Range<u64>) -> PathBuf {
    let path = scratch.file("volume", range.end - range.start);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let mut position = range.start;
    while position < range.end {
        let mut bytes = vec![0; usize::try_from((range.end - position).min(MIB)).unwrap()];
        image.read_at(&mut bytes, position).unwrap();
        file.write_all_at(&bytes, position - range.start).unwrap();
        position += bytes.len() as u64;
    }
    path
}
