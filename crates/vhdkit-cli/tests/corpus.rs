//! Images that others wrote, through the command line: `read` and `convert` give the guest content that independent
//! readers agreed on, and no command that only reads changes a file.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::fs::File;
use std::path::Path;
use std::process::Stdio;

use common::{Run, Scratch};
use vhdkit_testkit::foreign::{CorpusRow, corpus_dir, corpus_manifest, sha256_file, sha256_reader, unpack};
use vhdkit_testkit::harness::{Case, Needs, main_with};

/// Larger disks are not read from end to end here; the library's own corpus test does that.
const READ_WHOLE_BYTES_MAX: u64 = 2 << 30;

fn judge(row: &CorpusRow) {
    let scratch = Scratch::new();
    let image = unpack(row, scratch.path());
    let image = image.to_str().unwrap();
    let raw = scratch.join("converted.raw");
    let raw = raw.to_str().unwrap();
    let info = scratch.run(&["info", "--json", image]).expect(0).json();
    assert_eq!(info["type"], row.kind);
    assert_eq!(info["disk_size"], row.virtual_size);
    assert_eq!(info["block_size"], row.block_size);
    assert_eq!(info["logical_sector_size"], row.logical_sector_size);
    assert_eq!(info["physical_sector_size"], row.physical_sector_size);
    assert_eq!(info["log"]["state"], if row.dirty { "dirty" } else { "clean" });
    assert_eq!(info["chain_complete"], true);
    scratch.run(&["info", image]).expect(0);
    scratch.run(&["info", "--dump", image]).expect(0);
    scratch.run(&["check", image]).expect(0);
    scratch.run(&["map", image]).expect(0);
    scratch.run(&["measure", image]).expect(0);
    if row.virtual_size <= READ_WHOLE_BYTES_MAX {
        assert_eq!(sha256_of_read(&scratch, image), row.guest_sha256, "read");
        scratch.run(&["convert", image, raw, "--no-sync"]).expect(0);
        assert_eq!(sha256_file(Path::new(raw)).unwrap(), row.guest_sha256, "convert");
        scratch.run(&["compare", image, raw]).expect(0);
    }
    assert_eq!(sha256_file(Path::new(image)).unwrap(), row.file_sha256, "the file was changed");
}

/// What `read` writes to a pipe.
fn sha256_of_read(scratch: &Scratch, image: &str) -> String {
    let mut command = scratch.command(&["read", image]);
    let stderr = File::create(scratch.join("stderr")).unwrap();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
    let sum = sha256_reader(&mut child.stdout.take().unwrap()).unwrap();
    Run::new(child.wait_with_output().unwrap()).expect(0);
    sum
}

fn main() {
    let rows = if corpus_dir().is_some() { corpus_manifest() } else { Vec::new() };
    let needs = || Needs::nothing().and_corpus();
    if rows.is_empty() {
        main_with(vec![Case::new("every_image", needs(), || unreachable!("there is no corpus"))]);
    }
    main_with(rows.into_iter().map(|row| Case::new(row.name.clone(), needs(), move || judge(&row))).collect());
}
