//! A disk of hostile bytes: what lies in it is surveyed, its free space visited, its backup GPT moved; and the survey of what
//! was moved says the same.
#![no_main]

use std::ops::ControlFlow;

use libfuzzer_sys::fuzz_target;
use vhdkit::guest::{Smallest, Survey, Table, VolumeState, plan_backup_gpt, survey};
use vhdkit::image::{BlockDevice, RawDisk};
use vhdkit::storage::Storage;
use vhdkit_fuzz::disk;

fuzz_target!(|input: &[u8]| {
    let Some((sector, storage)) = disk(input) else { return };
    let raw = RawDisk::new(storage.clone(), sector).expect("memory knows its length");
    let before = look(&raw);
    let moves = matches!(before.table, Table::Gpt { .. });
    for new_size in [raw.size(), raw.size() / 2, 2 << 30] {
        let new_size = new_size / u64::from(sector) * u64::from(sector);
        let Ok(plan) = plan_backup_gpt(&raw, new_size) else { continue };
        // The partitions stay where they are, and only what lies outside of them is written.
        for (offset, bytes) in &plan {
            let end = offset + bytes.len() as u64;
            assert!(end <= new_size);
            let clear = |range: &std::ops::Range<u64>| range.end <= *offset || range.start >= end;
            assert!(!moves || before.volumes.iter().all(|volume| clear(&volume.range)));
        }
        if moves && new_size == 2 << 30 && raw.size() < new_size {
            let grown = vhdkit::storage::MemoryStorage::with_len(new_size);
            copy(&storage, &grown);
            plan.iter().for_each(|(offset, bytes)| grown.write_at(bytes, *offset).expect("memory takes any write"));
            let grown = RawDisk::new(std::sync::Arc::new(grown), sector).expect("memory knows its length");
            let after = look(&grown);
            assert!(matches!(after.table, Table::Gpt { backup_ok: true, .. }), "{:?}", after.table);
            let places =
                |survey: &Survey| -> Vec<_> { survey.volumes.iter().map(|volume| volume.range.clone()).collect() };
            assert_eq!(places(&before), places(&after));
        }
    }
});

/// Surveys a disk, and holds the survey to its promises.
fn look(disk: &RawDisk) -> Survey {
    let found = survey(disk, &()).expect("memory can be read, and nothing else is an error");
    let mut last = 0;
    for volume in &found.volumes {
        assert!(volume.range.start >= last && volume.range.end <= disk.size().max(volume.range.start));
        last = volume.range.end;
        let mut position = volume.range.start;
        let mut total = 0;
        let visit = volume.visit_free(disk, &mut |range| {
            assert!(range.start < range.end && range.end <= volume.range.end);
            assert!(range.start > position || (range.start == position && total == 0));
            position = range.end;
            total += range.end - range.start;
            ControlFlow::Continue(())
        });
        visit.expect("the disk has not changed");
        match &volume.state {
            VolumeState::Readable { size_bytes, cluster_bytes, free_bytes } => {
                assert_eq!(total, *free_bytes);
                assert!(*size_bytes <= volume.range.end - volume.range.start && *cluster_bytes > 0);
                assert!(position <= volume.range.start + size_bytes);
            }
            VolumeState::LeftAlone { reason } => assert!(total == 0 && !reason.is_empty()),
        }
    }
    if let Smallest::SafeAt { bytes, .. } = found.smallest_safe_size() {
        assert!(
            bytes == 0
                || found.volumes.iter().all(|volume| {
                    let whole = found.table == Table::None;
                    whole || volume.range.end <= bytes
                })
        );
    }
    found
}

fn copy(from: &vhdkit::storage::MemoryStorage, to: &vhdkit::storage::MemoryStorage) {
    let length = from.len().expect("memory knows its length");
    let mut position = 0;
    while let Some(data) = from.next_data(position..length).expect("memory knows its data") {
        let mut bytes = vec![0; usize::try_from(data.end - data.start).expect("it is in memory")];
        from.read_at(&mut bytes, data.start).expect("it is inside");
        to.write_at(&bytes, data.start).expect("memory takes any write");
        position = data.end;
    }
}
