//! Increments from arbitrary bytes, applied to an image and to a raw disk in memory: refused with the target as it was,
//! or applied as an independent walk over the bytes says.
//!
//! ```text
//! u8 fix     bit 0: the checksum of the header is left as it is; 1: those of records; 2: those of payloads;
//!            3: that of the file; bit 4: base and result are left as they are, and are not made to fit
//! u8 how     bit 0: a raw disk; bit 1: an unknown base may be applied to; bit 2: what it holds is not compared
//! then the increment
//! ```
#![no_main]

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use vhdkit::error::{ErrorKind, Result};
use vhdkit::format::checksum::{append, checksum};
use vhdkit::format::finding::Severity;
use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES as HEADER_SLOT, OFFSETS};
use vhdkit::format::increment::{HEADER_BYTES, RECORD_BYTES};
use vhdkit::image::{BlockDevice, OpenOptions};
use vhdkit::ops::apply::{ApplyOptions, ApplyPlan, ApplyTarget, Basis, plan_apply};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::create::{CreateOptions, create};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_fuzz::take;

const DISK: u64 = 1 << 20;
/// Bytes of the disk that hold something.
const CONTENT: usize = 64 << 10;
const BASE: Guid = Guid::from_printed(11);
const RESULT: Guid = Guid::from_printed(12);

fn put(bytes: &mut [u8], offset: usize, what: &[u8]) {
    if let Some(place) = bytes.get_mut(offset..offset + what.len()) {
        place.copy_from_slice(what);
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..offset + 8].try_into().map_or(0, u64::from_le_bytes)
}

fn put_checksum(part: &mut [u8]) {
    let right = checksum(part);
    put(part, 4, &right.to_le_bytes());
}

/// Makes base and result fit the target.
fn fit(file: &mut [u8]) {
    for (offset, guid) in [(56, BASE), (120, RESULT)] {
        put(file, offset, &guid.stored());
        put(file, offset + 32, &DISK.to_le_bytes());
        put(file, offset + 40, &512_u32.to_le_bytes());
        put(file, offset + 44, &4096_u32.to_le_bytes());
        put(file, offset + 48, &1_u32.to_le_bytes());
        put(file, offset + 52, &[0; 12]);
    }
}

/// Puts right what the input says, walking over the records as far as they go.
fn put_right(file: &mut [u8], fix: u8) {
    if file.len() < HEADER_BYTES {
        return;
    }
    put(file, 0, b"vhdi");
    put(file, 8, b"vhdkit incremental disk\n");
    put(file, 32, &1_u32.to_le_bytes());
    if fix & 16 == 0 {
        fit(file);
    }
    if fix & 1 == 0 {
        put_checksum(&mut file[..HEADER_BYTES]);
    }
    let id: [u8; 16] = file[40..56].try_into().expect("sixteen bytes");
    let (mut at, mut index, mut data, mut zero) = (HEADER_BYTES, 0_u64, 0_u64, 0_u64);
    while at + RECORD_BYTES <= file.len() {
        let (before, rest) = file.split_at_mut(at);
        let (record, rest) = rest.split_at_mut(RECORD_BYTES);
        let (kind, length): ([u8; 4], u64) = (record[..4].try_into().expect("four bytes"), u64_at(record, 40));
        let payload = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
        put(record, 8, &id);
        put(record, 24, &index.to_le_bytes());
        if &kind == b"last" {
            put(record, 32, &data.to_le_bytes());
            put(record, 40, &zero.to_le_bytes());
            if fix & 8 == 0 {
                put(record, 48, &append(0, before).to_le_bytes());
            }
        } else if &kind == b"data" && fix & 4 == 0 {
            put(record, 48, &append(0, &rest[..payload]).to_le_bytes());
        }
        if fix & 2 == 0 {
            put_checksum(record);
        }
        match &kind {
            b"data" => {
                data = data.wrapping_add(length);
                at += RECORD_BYTES + payload;
            }
            b"zero" => {
                zero = zero.wrapping_add(length);
                at += RECORD_BYTES;
            }
            _ => return,
        }
        index += 1;
    }
}

/// What the disk must hold afterwards, by a walk that shares nothing with the library.
fn expected(disk: &mut [u8], file: &[u8]) {
    let mut at = HEADER_BYTES;
    while !file[at..].starts_with(b"last") {
        let (offset, length) = (u64_at(file, at + 32) as usize, u64_at(file, at + 40) as usize);
        let is_data = file[at..].starts_with(b"data");
        at += RECORD_BYTES;
        if is_data {
            disk[offset..offset + length].copy_from_slice(&file[at..at + length]);
            at += length;
        } else {
            disk[offset..offset + length].fill(0);
        }
    }
}

fn bytes(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().expect("memory has a length")).expect("it is small")];
    storage.read_at(&mut bytes, 0).expect("memory can be read");
    bytes
}

/// A disk with something at its beginning.
fn content() -> Vec<u8> {
    let mut disk = vec![0; DISK as usize];
    disk[..CONTENT].iter_mut().zip(0_u32..).for_each(|(byte, at)| *byte = (at % 251) as u8);
    disk
}

fn run(plan: Result<ApplyPlan<'_>>) -> Option<Basis> {
    match plan {
        Ok(plan) => {
            plan.run(&AtomicU64::new(0), &()).expect("what was judged can be applied to memory");
            if plan.basis() != Basis::Done {
                plan.verify(&()).expect("what was written is there");
            }
            Some(plan.basis())
        }
        Err(error) => {
            let kinds = [ErrorKind::Corrupt, ErrorKind::Truncated, ErrorKind::Unsupported, ErrorKind::Refused];
            assert!(kinds.contains(&error.kind()), "{error:?}");
            assert!(error.hint().is_some(), "{error}");
            None
        }
    }
}

fn to_raw(file: &MemoryStorage, options: &ApplyOptions) {
    let mut disk = content();
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(disk.clone()));
    if run(plan_apply(file, ApplyTarget::Raw(&target), options, &())).is_some() {
        expected(&mut disk, &bytes(file));
    }
    assert!(bytes(target.as_ref()) == disk, "the disk holds something else");
}

/// The file of an image that holds [`content`], and has the data write GUID of the base.
fn template() -> &'static [u8] {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let layout = CreateOptions { block_size: Some(1 << 20), log_size: 1 << 20, ..CreateOptions::new(DISK) };
        create(&storage, &layout, &()).expect("an image in memory");
        let image = OpenOptions::new().write(true).open(Arc::clone(&storage), None).expect("our own image");
        image.write_at(&content()[..CONTENT], 0).expect("it can be written");
        image.close().expect("it can be closed");
        let mut file = bytes(storage.as_ref());
        for offset in OFFSETS {
            let header = &mut file[usize::try_from(offset).expect("it is small")..][..HEADER_SLOT];
            put(header, 32, &BASE.stored());
            put_checksum(header);
        }
        file
    })
}

fn to_image(file: &MemoryStorage, options: &ApplyOptions) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(template().to_vec()));
    let image = OpenOptions::new().write(true).open(Arc::clone(&storage), None).expect("our own image");
    let basis = run(plan_apply(file, ApplyTarget::Image(&image), options, &()));
    drop(image);
    if matches!(basis, Some(Basis::Done) | None) {
        assert!(bytes(storage.as_ref()) == template(), "the target was changed");
        return;
    }
    let mut disk = content();
    expected(&mut disk, &bytes(file));
    let report = check(&storage, None, &CheckOptions::default(), &()).expect("memory can be read");
    assert!(report.findings.iter().all(|finding| finding.severity() < Severity::Warning), "{report:?}");
    let image = OpenOptions::new().open(storage, None).expect("our own image");
    let mut found = vec![0; DISK as usize];
    image.read_at(&mut found, 0).expect("memory can be read");
    assert!(found == disk, "the disk holds something else");
}

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let Some([fix, how]) = take(&mut rest) else { return };
    let mut file = rest.to_vec();
    put_right(&mut file, fix);
    let file = MemoryStorage::from_bytes(file);
    let options = ApplyOptions { unknown_base: how & 2 != 0, resume: how & 4 != 0 };
    if how & 1 == 0 { to_image(&file, &options) } else { to_raw(&file, &options) }
});
