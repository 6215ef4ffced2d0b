//! Broken images: recovered into memory; planned for, repaired and put back; and undo records that anybody wrote.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhdkit::error::ErrorKind;
use vhdkit::format::finding::Finding;
use vhdkit::image::OpenOptions;
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::recover::{RecoverOptions, recover};
use vhdkit::ops::repair::{RepairOptions, apply, plan, restore};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_fuzz::{ReadOnly, chain, image};

/// Bytes of a file that are compared: all that inputs usually describe.
const COMPARED_MAX: u64 = 64 << 20;
/// Bytes of what is compared at once.
const PAGE: u64 = 4096;

fuzz_target!(|input: &[u8]| {
    let Some((described, record)) = chain(input) else { return };
    let Some(memory) = image(described) else { return };
    let file: Arc<dyn Storage> = Arc::new(ReadOnly(memory.clone()));
    recover_it(&file);
    let memory: Arc<dyn Storage> = memory;
    repair_it(&memory);
    put_back_anything(&memory, record);
});

/// What comes out can be opened, whatever went in.
fn recover_it(file: &Arc<dyn Storage>) {
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let report = recover(file, None, &target, &RecoverOptions::default(), &());
    match report {
        Ok(report) => {
            let image = OpenOptions::new().write(true).open(target, None).expect("a new image is in order");
            assert_eq!(image.geometry().disk_size(), report.disk_size);
            let certain = check(file, None, &CheckOptions::default(), &()).expect("memory can be read");
            let mended = certain.errors == 0 && report.is_certain();
            assert!(!mended || report.blocks_lost == 0);
        }
        Err(error) => assert!(error.kind() != ErrorKind::Io, "memory can be read: {error}"),
    }
}

fn shown(findings: &[Finding]) -> Vec<String> {
    findings.iter().map(|finding| format!("{:?} {finding}", finding.code())).collect()
}

/// A hash of what is in a file. Page by page, since zeros that were written and holes are alike.
fn sum(file: &Arc<dyn Storage>) -> (u64, u32) {
    let length = file.len().expect("memory has a length");
    let end = length.min(COMPARED_MAX);
    let (mut sum, mut position) = (0, 0);
    while let Ok(Some(data)) = file.next_data(position..end) {
        let start = data.start - data.start % PAGE;
        let mut bytes = vec![0; (end - start).min(PAGE) as usize];
        file.read_at(&mut bytes, start).expect("memory can be read");
        if bytes.iter().any(|byte| *byte != 0) {
            sum = vhdkit::format::checksum::append(sum ^ (start / PAGE) as u32, &bytes);
        }
        position = start + PAGE;
    }
    (length, sum)
}

/// The plan promises what a check says afterwards, and the record brings everything back.
fn repair_it(file: &Arc<dyn Storage>) {
    let before = sum(file);
    let Ok(planned) = plan(file, None, &RepairOptions::default(), &()) else { return };
    assert!(sum(file) == before, "planning wrote");
    if !planned.changes_anything() {
        return;
    }
    let undo = MemoryStorage::new();
    apply(file, &planned, &undo, &mut || Ok(()), &()).expect("memory can be written");
    let after = check(file, None, &CheckOptions::default(), &()).expect("memory can be read");
    assert_eq!(shown(&after.findings), shown(&planned.after.findings));
    OpenOptions::new().without_parents().open(file.clone(), None).expect("it was planned to open");
    restore(file.as_ref(), &undo, &()).expect("nobody wrote to it since");
    assert!(sum(file) == before, "not what it was");
}

/// A record that does not belong changes nothing.
fn put_back_anything(file: &Arc<dyn Storage>, record: &[u8]) {
    let before = sum(file);
    let undo = MemoryStorage::from_bytes(record.to_vec());
    if restore(file.as_ref(), &undo, &()).is_err() {
        assert!(sum(file) == before, "a refused record was put back");
    }
}
