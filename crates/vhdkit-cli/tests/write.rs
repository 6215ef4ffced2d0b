//! Commands that change an image: what they write is what is read, and what they refuse stays as it was.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{MIB, Run, Scratch, disk_bytes, dynamic, junk, make_fifo};
use vhdkit::storage::{FileAccess, FileStorage, Sharing};
use vhdkit_testkit::builder::{BuiltImage, ImageBuilder};
use vhdkit_testkit::dirty::DirtyPlan;
use vhdkit_testkit::foreign;

/// What the disk of an image holds, and that the image is in order.
#[track_caller]
fn content(scratch: &Scratch, image: &str) -> Vec<u8> {
    scratch.run(&["check", image]).expect(0);
    scratch.run(&["read", image]).expect(0).stdout
}

/// Compares without printing megabytes.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let place = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(place, None, "{what}: the first difference");
}

/// Every kind of image under the name `disk.vhdx`, with what a guest sees.
fn kinds() -> [(&'static str, BuiltImage); 5] {
    let base = Arc::new(dynamic().named("base.vhdx").build());
    let named = |builder: ImageBuilder| builder.named("disk.vhdx").build();
    [
        ("dynamic", named(dynamic())),
        ("fixed", named(dynamic().fixed())),
        ("differencing", named(ImageBuilder::new(8 * MIB, MIB as u32).differencing(&base).pattern_block(2, 77))),
        ("sectors of 4096", named(dynamic().sector_sizes(4096, 4096))),
        ("a last block in part", named(ImageBuilder::new(8 * MIB, 2 << 20).pattern_block(3, 5))),
    ]
}

#[test]
fn what_is_written_zeroed_and_discarded_is_what_is_read() {
    for (kind, built) in kinds() {
        let scratch = Scratch::new();
        built.write_chain(scratch.path()).unwrap();
        let base = scratch.sums().get("base.vhdx").cloned();
        let mut disk = disk_bytes(&built);
        let bytes = junk(3 * MIB as usize + 12_345);
        for (offset, length) in [(0, 512), (1000, 3), (MIB - 1, 2), (5_000_001, bytes.len()), (8 * MIB - 1, 1)] {
            let offset = offset as usize;
            let length = length.min(disk.len() - offset);
            let place = offset.to_string();
            let run = if length % 2 == 0 {
                scratch.write("input", &bytes[..length]);
                scratch.run(&["write", "disk.vhdx", "--offset", &place, "--input", "input", "--json"])
            } else {
                scratch.pipe(&["write", "disk.vhdx", "--offset", &place, "--json"], &bytes[..length])
            };
            let report = run.expect(0).silent().json();
            let expected = serde_json::json!({
                "file": "disk.vhdx", "offset": offset, "bytes_written": length, "replay": null
            });
            assert_eq!(report, expected, "{kind}");
            disk[offset..offset + length].copy_from_slice(&bytes[..length]);
        }
        assert_same(&content(&scratch, "disk.vhdx"), &disk, kind);
        let zeroed = ["zero", "disk.vhdx", "--offset", "0x123", "--length", "3M", "--json"];
        let report = scratch.run(&zeroed).expect(0).silent().json();
        disk[0x123..0x123 + (3 << 20)].fill(0);
        assert_same(&content(&scratch, "disk.vhdx"), &disk, kind);
        assert_eq!((&report["bytes_zeroed"], &report["offset"]), (&(3 * MIB).into(), &0x123.into()), "{kind}");
        // What is discarded as a whole reads as zero unless the disk is fixed.
        scratch.run(&["discard", "disk.vhdx", "--offset", "5M", "--length", "3M"]).expect(0).silent();
        if kind != "fixed" {
            let start = if kind == "a last block in part" { 6 << 20 } else { 5 << 20 };
            disk[start..].fill(0);
        }
        assert_same(&content(&scratch, "disk.vhdx"), &disk, kind);
        assert_eq!(scratch.sums().get("base.vhdx").cloned(), base, "the parent was changed");
    }
}

#[test]
fn what_is_given_back_is_told() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    // Blocks 1 and 4 are there.
    let report = scratch.run(&["zero", "disk.vhdx", "--offset", "1M", "--length", "1M", "--json"]).expect(0).json();
    assert_eq!((&report["bytes_given_back"], &report["note"]), (&MIB.into(), &serde_json::Value::Null));
    let run = scratch.run(&["discard", "disk.vhdx", "--offset", "0", "--length", "4.5M"]).expect(0).silent();
    assert!(run.out.contains("nothing is given back, since no block of 1 MiB"), "{}", run.out);
    let run = scratch.run(&["discard", "disk.vhdx", "--offset", "0", "--length", "8M"]).expect(0).silent();
    assert!(run.out.contains("8 MiB (8388608 bytes) discarded at offset 0, 1 MiB given back"), "{}", run.out);
    assert!(content(&scratch, "disk.vhdx").iter().all(|byte| *byte == 0));
}

#[test]
fn a_fixed_disk_says_that_nothing_is_given_back() {
    let scratch = Scratch::new();
    let built = dynamic().fixed().build();
    built.write_to(&scratch.join("fixed.vhdx")).unwrap();
    let before = scratch.sums();
    let discard = ["discard", "fixed.vhdx", "--offset", "0", "--length", "8M"];
    let run = scratch.run(&discard).expect(0).silent();
    assert!(run.out.contains("nothing is given back, since a fixed disk keeps all its space"), "{}", run.out);
    let report = scratch.run(&[&discard[..], &["--json"]].concat()).expect(0).silent().json();
    assert_eq!(report["bytes_given_back"], 0);
    assert!(report["note"].as_str().unwrap().contains("fixed disk"), "{report}");
    assert_eq!(scratch.sums(), before);
    assert_same(&content(&scratch, "fixed.vhdx"), &disk_bytes(&built), "fixed");
}

#[test]
fn nothing_to_do_leaves_the_file_byte_for_byte() {
    let scratch = Scratch::new();
    scratch.image("clean.vhdx");
    scratch.dirty("dirty.vhdx");
    scratch.write("empty", b"");
    for name in ["clean.vhdx.rct", "dirty.vhdx.rct"] {
        scratch.write(name, b"");
    }
    let before = scratch.sums();
    for arguments in [
        &["write", "clean.vhdx", "--offset", "0"][..],
        &["write", "clean.vhdx", "--offset", "0", "--input", "-"],
        &["write", "clean.vhdx", "--offset", "8M", "--input", "empty"],
        &["write", "dirty.vhdx", "--offset", "0", "--input", "empty", "--replay", "--quiet"],
        &["zero", "clean.vhdx", "--offset", "8M", "--length", "0"],
        &["discard", "clean.vhdx", "--offset", "0", "--length", "1M"],
        &["discard", "clean.vhdx", "--offset", "4194305", "--length", "1M"],
        &["replay", "clean.vhdx"],
        &["replay", "clean.vhdx", "--json"],
    ] {
        let run = scratch.run(arguments).expect(0).silent();
        assert!(!run.out.is_empty() || arguments.contains(&"--quiet"), "{arguments:?}");
        assert_eq!(scratch.sums(), before, "{arguments:?}");
    }
    let run = scratch.run(&["replay", "clean.vhdx"]).expect(0).silent();
    assert!(run.out.contains("the log is clean; nothing was changed"), "{}", run.out);
    let report = scratch.run(&["replay", "clean.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!(report, serde_json::json!({ "file": "clean.vhdx", "replayed": false, "replay": null }));
    let run = scratch.run(&["write", "clean.vhdx", "--offset", "0"]).expect(0).silent();
    assert!(run.out.contains("the input is empty"), "{}", run.out);
}

#[test]
fn a_dirty_image_is_refused_without_replay() {
    let scratch = Scratch::new();
    scratch.dirty("dirty.vhdx");
    let before = scratch.sums();
    for arguments in [
        &["write", "dirty.vhdx", "--offset", "0"][..],
        &["zero", "dirty.vhdx", "--offset", "0", "--length", "1M"],
        &["discard", "dirty.vhdx", "--offset", "0", "--length", "8M"],
    ] {
        let run = scratch.pipe(arguments, b"bytes").expect(6);
        for words in ["dirty.vhdx", "Windows", "WSL", "share", "\n  hint: ", "--replay", "`vhdkit replay`"] {
            assert!(run.err.contains(words), "{words}: {}", run.err);
        }
        let error = scratch.pipe(&[arguments, &["--json"]].concat(), b"bytes").expect(6).json_error();
        assert_eq!((&error["kind"], &error["rule"]), (&"needs-replay".into(), &"V-031".into()));
        assert_eq!(scratch.sums(), before, "{arguments:?}");
    }
}

#[test]
fn with_replay_a_dirty_image_is_written() {
    for command in ["write", "zero", "discard"] {
        let scratch = Scratch::new();
        let mut disk = disk_bytes(&scratch.dirty("dirty.vhdx"));
        let range = (4 << 20)..(5 << 20);
        let bytes = junk(range.len());
        let place = ["dirty.vhdx", "--offset", "4M", "--replay", "--json"];
        let run = match command {
            "write" => scratch.pipe(&[&[command], &place[..]].concat(), &bytes),
            _ => scratch.run(&[&[command], &place[..], &["--length", "1M"]].concat()),
        };
        let run = run.expect(0);
        assert!(run.json()["replay"]["entries"].as_u64().unwrap() > 0, "{}", run.out);
        match command {
            "write" => disk[range].copy_from_slice(&bytes),
            _ => disk[range].fill(0),
        }
        assert_same(&content(&scratch, "dirty.vhdx"), &disk, command);
        assert_eq!(scratch.run(&["info", "dirty.vhdx", "--json"]).expect(0).json()["log"]["state"], "clean");
    }
    let scratch = Scratch::new();
    scratch.dirty("dirty.vhdx");
    let run = scratch.pipe(&["write", "dirty.vhdx", "--offset", "0", "--replay"], b"x").expect(0);
    assert!(run.out.contains("1 byte written at offset 0, after replaying its log (1 entry)"), "{}", run.out);
}

/// A dirty image with everything that a log may hold, whose file is also cut off.
fn very_dirty() -> BuiltImage {
    let mut built = dynamic().named("dirty.vhdx").build();
    let length = built.file.len();
    let plan = DirtyPlan::new(9).move_bat(&built).move_metadata(&built).move_region_tables(&built).with(|plan| {
        plan.entries = 3;
        plan.supersede = true;
        plan.retired = 2;
        plan.older_generations = 2;
        plan.older_run = true;
        plan.zero_ranges = vec![(length, MIB)];
    });
    built.file.set_len(length + MIB);
    plan.apply(&mut built);
    built
}

#[test]
fn replay_puts_the_log_into_place_and_says_what_it_changed() {
    let scratch = Scratch::new();
    let built = very_dirty();
    built.write_to(&scratch.join("dirty.vhdx")).unwrap();
    std::fs::copy(scratch.join("dirty.vhdx"), scratch.join("copy.vhdx")).unwrap();
    let announced = scratch.run(&["info", "dirty.vhdx", "--json"]).expect(0).json()["log"]["replay"].clone();
    let report = scratch.run(&["replay", "dirty.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!((&report["file"], &report["replayed"]), (&"dirty.vhdx".into(), &true.into()));
    assert_eq!(report["replay"], announced, "what was announced is not what was done");
    assert!(report["replay"]["pages"].as_u64().unwrap() >= 3 && report["replay"]["zeroed_bytes"] == MIB, "{report}");
    assert_same(&content(&scratch, "dirty.vhdx"), &disk_bytes(&built), "after replay");
    let info = scratch.run(&["info", "dirty.vhdx", "--json"]).expect(0).json();
    assert_eq!(info["log"]["state"], "clean");
    let after = scratch.sums();
    let run = scratch.run(&["replay", "dirty.vhdx"]).expect(0).silent();
    assert!(run.out.contains("the log is clean"), "{}", run.out);
    assert_eq!(scratch.sums(), after);
    let run = scratch.run(&["replay", "copy.vhdx"]).expect(0).silent();
    for words in ["copy.vhdx: log replayed, ", "entries; the image is clean now", "pages changed", "1 MiB", "in BAT"] {
        assert!(run.out.contains(words), "{words}: {}", run.out);
    }
    scratch.run(&["compare", "copy.vhdx", "dirty.vhdx"]).expect(0);
}

#[test]
fn replay_makes_a_file_that_was_cut_off_whole() {
    let scratch = Scratch::new();
    let mut built = dynamic().build();
    let length = built.file.len();
    built.file.set_len(length + 2 * MIB);
    DirtyPlan::new(3).move_bat(&built).with(|plan| plan.cut_file = Some(length)).apply(&mut built);
    built.write_to(&scratch.join("cut.vhdx")).unwrap();
    let report = scratch.run(&["replay", "cut.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!(report["replay"]["file_size_before"], length);
    assert_eq!(report["replay"]["file_size_after"], length + 2 * MIB);
    assert_eq!(scratch.join("cut.vhdx").metadata().unwrap().len(), length + 2 * MIB);
    assert_same(&content(&scratch, "cut.vhdx"), &disk_bytes(&built), "after replay");
}

#[test]
fn a_child_is_replayed_without_its_parent() {
    let scratch = Scratch::new();
    let base = Arc::new(dynamic().named("base.vhdx").build());
    let child = ImageBuilder::new(8 * MIB, MIB as u32).named("child.vhdx").differencing(&base).pattern_block(2, 77);
    let mut child = child.build();
    DirtyPlan::new(8).move_bat(&child).apply(&mut child);
    child.write_to(&scratch.join("child.vhdx")).unwrap();
    scratch.run(&["replay", "child.vhdx"]).expect(0).silent();
    base.write_to(&scratch.join("base.vhdx")).unwrap();
    assert_same(&content(&scratch, "child.vhdx"), &disk_bytes(&child), "with its parent");
}

#[test]
fn a_range_that_is_not_on_the_disk_is_refused_before_anything() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let before = scratch.sums();
    for (offset, length) in [
        ("0", "8388609"),
        ("8M", "1"),
        ("8388609", "0"),
        ("1", "0xffffffffffffffff"),
        ("0xffffffffffffffff", "1"),
        ("0xffffffffffffffff", "0xffffffffffffffff"),
        ("0", "64T"),
    ] {
        for command in ["zero", "discard"] {
            let run = scratch.run(&[command, "disk.vhdx", "--offset", offset, "--length", length]).expect(2);
            assert!(run.err.contains("which has 8388608 bytes") && run.err.contains("hint: "), "{}", run.err);
            assert_eq!(scratch.sums(), before, "{command} {offset} {length}");
        }
    }
    for offset in ["8388609", "0xffffffffffffffff", "64T", "0x7fffffffffffffff"] {
        let run = scratch.pipe(&["write", "disk.vhdx", "--offset", offset], b"x").expect(2);
        assert!(run.err.contains("behind the end of the disk, which has 8388608 bytes"), "{}", run.err);
        assert_eq!(scratch.sums(), before, "{offset}");
    }
}

#[test]
fn input_that_is_too_long_is_refused_before_the_first_byte_where_its_length_is_known() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    scratch.write("input", &junk(1025));
    let before = scratch.sums();
    let place = ["write", "disk.vhdx", "--offset", "8387584"];
    let run = scratch.run(&[&place[..], &["--input", "input"]].concat()).expect(2);
    assert!(run.err.contains("input: the input has 1025 bytes") && run.err.contains("there are 1024"), "{}", run.err);
    let redirected = std::fs::File::open(scratch.join("input")).unwrap();
    let output = scratch.command(&place).stdin(redirected).output().unwrap();
    let run = Run::new(output).expect(2);
    assert!(run.err.contains("the input has 1025 bytes"), "{}", run.err);
    assert_eq!(scratch.sums(), before);
}

#[test]
fn a_stream_that_is_too_long_says_how_much_of_it_was_written() {
    let scratch = Scratch::new();
    let mut disk = disk_bytes(&scratch.image("disk.vhdx"));
    let bytes = junk(4 << 20);
    let run = scratch.pipe(&["write", "disk.vhdx", "--offset", "6291455"], &bytes).expect(2);
    assert!(run.err.contains("goes on behind the end of the disk, which has 8388608 bytes"), "{}", run.err);
    assert!(run.err.contains("2097153 bytes were written before, and the image is valid"), "{}", run.err);
    disk[6_291_455..].copy_from_slice(&bytes[..2_097_153]);
    assert_same(&content(&scratch, "disk.vhdx"), &disk, "what was written before");
    let error = scratch.pipe(&["write", "disk.vhdx", "--offset", "8M", "--json"], &bytes).expect(2).json_error();
    assert_eq!((&error["kind"], &error["bytes_done"]), (&"out-of-range".into(), &0.into()), "{error}");
    assert_eq!(error["closed"], true);
}

#[test]
fn the_image_itself_is_no_input() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    std::fs::hard_link(scratch.join("disk.vhdx"), scratch.join("hard.vhdx")).unwrap();
    std::os::unix::fs::symlink("disk.vhdx", scratch.join("soft.vhdx")).unwrap();
    let before = scratch.sums();
    for (image, input) in
        [("disk.vhdx", "disk.vhdx"), ("disk.vhdx", "hard.vhdx"), ("soft.vhdx", "disk.vhdx"), ("hard.vhdx", "soft.vhdx")]
    {
        let run = scratch.run(&["write", image, "--offset", "0", "--input", input]).expect(6);
        assert!(run.err.contains("the input is the image itself"), "{}", run.err);
        assert_eq!(scratch.sums(), before);
    }
    let itself = std::fs::File::open(scratch.join("disk.vhdx")).unwrap();
    let output = scratch.command(&["write", "disk.vhdx", "--offset", "0"]).stdin(itself).output().unwrap();
    assert!(Run::new(output).expect(6).err.contains("the input is the image itself"));
    assert_eq!(scratch.sums(), before);
}

#[test]
fn inputs_of_every_kind() {
    let scratch = Scratch::new();
    let mut disk = disk_bytes(&scratch.image("disk.vhdx"));
    // A FIFO whose writer comes later.
    make_fifo(&scratch.join("fifo"));
    let write = ["write", "disk.vhdx", "--offset", "7", "--input", "fifo"];
    let mut command = scratch.command(&write);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::fs::write(scratch.join("fifo"), b"through a fifo").unwrap();
    Run::new(child.wait_with_output().unwrap()).expect(0).silent();
    disk[7..21].copy_from_slice(b"through a fifo");
    // A file that says that it is empty, and is not.
    let proc = std::fs::read("/proc/version").unwrap();
    scratch.run(&["write", "disk.vhdx", "--offset", "3M", "--input", "/proc/version"]).expect(0).silent();
    disk[3 << 20..][..proc.len()].copy_from_slice(&proc);
    // The rest of a file whose beginning was read already.
    scratch.write("input", b"beginning and rest");
    let shell = "dd bs=1 count=10 of=/dev/null 2> /dev/null; exec \"$0\" write disk.vhdx --offset 4M";
    let mut rest = Command::new("sh");
    rest.args(["-c", shell, env!("CARGO_BIN_EXE_vhdkit")]);
    let input = std::fs::File::open(scratch.join("input")).unwrap();
    let output = rest.current_dir(scratch.path()).stdin(input).output().unwrap();
    assert!(Run::new(output).expect(0).out.contains("8 bytes written"));
    disk[4 << 20..][..8].copy_from_slice(b"and rest");
    assert_same(&content(&scratch, "disk.vhdx"), &disk, "inputs");
    let before = scratch.sums();
    std::fs::create_dir(scratch.join("directory")).unwrap();
    for (input, words) in [("directory", "directory"), ("missing", "No such file")] {
        let run = scratch.run(&["write", "disk.vhdx", "--offset", "0", "--input", input]).expect(5);
        assert!(run.err.contains(input) && run.err.contains(words) && run.err.contains("hint: "), "{}", run.err);
    }
    assert_eq!(scratch.sums(), before);
    // Whoever writes an image into a disk most likely wanted the disk in it.
    scratch.image("inner.vhdx");
    let run =
        scratch.pipe(&["write", "disk.vhdx", "--offset", "0"], &std::fs::read(scratch.join("inner.vhdx")).unwrap());
    assert!(run.err.contains("the input looks like a VHDX"), "{}", run.err);
}

#[test]
fn change_tracking_beside_the_disk_is_named_when_something_was_written() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    scratch.image("other.vhdx");
    scratch.dirty("dirty.vhdx");
    for name in ["disk.vhdx.rct", "disk.vhdx.mrt", "dirty.vhdx.RCT", "disk.rct"] {
        scratch.write(name, b"tracking");
    }
    std::fs::create_dir(scratch.join("links")).unwrap();
    std::os::unix::fs::symlink("../disk.vhdx", scratch.join("links/link.vhdx")).unwrap();
    let says = |run: &Run, file: &str| run.err.contains(file) && run.err.contains("the next backup must be full");
    for (arguments, file) in [
        (&["write", "disk.vhdx", "--offset", "0"][..], "disk.vhdx.rct and disk.vhdx.mrt"),
        (&["write", "links/link.vhdx", "--offset", "0"], "disk.vhdx.rct and disk.vhdx.mrt"),
        (&["zero", "disk.vhdx", "--offset", "1M", "--length", "1M"], "disk.vhdx.rct"),
        (&["discard", "disk.vhdx", "--offset", "0", "--length", "8M"], "disk.vhdx.mrt"),
        (&["replay", "dirty.vhdx"], "dirty.vhdx.RCT"),
    ] {
        let run = scratch.pipe(arguments, b"x").expect(0);
        assert!(says(&run, file), "{arguments:?}: {}", run.err);
        assert_eq!(run.err.matches("warning").count(), 1, "{arguments:?}: {}", run.err);
    }
    // Also when it ended badly, and for scripts.
    let run = scratch.pipe(&["write", "disk.vhdx", "--offset", "8388607", "--json"], b"xy").expect(2);
    let warning: serde_json::Value = serde_json::from_str(run.err.lines().next().unwrap()).unwrap();
    assert_eq!(warning["warning"]["file"], "disk.vhdx");
    assert!(says(&run, "disk.vhdx.rct"), "{}", run.err);
    // Nothing is said where there is nothing, or nothing was written, or nobody wants to hear it.
    for arguments in [
        &["write", "other.vhdx", "--offset", "0"][..],
        &["discard", "disk.vhdx", "--offset", "0", "--length", "1M"],
        &["zero", "disk.vhdx", "--offset", "1M", "--length", "1M", "--quiet"],
        &["write", "disk.vhdx", "--offset", "0", "--quiet"],
        &["replay", "disk.vhdx"],
    ] {
        scratch.pipe(arguments, b"x").expect(0).silent();
    }
    assert_eq!(std::fs::read(scratch.join("disk.vhdx.rct")).unwrap(), b"tracking");
}

#[test]
fn an_image_in_use_is_not_written() {
    for access in [FileAccess::Read, FileAccess::Write] {
        // A new directory each time: processes that other tests start inherit locks for a moment.
        let scratch = Scratch::new();
        scratch.image("disk.vhdx");
        scratch.dirty("dirty.vhdx");
        let before = scratch.sums();
        let hold = |name: &str| FileStorage::open(&scratch.join(name), access, Sharing::Normal).unwrap();
        let _held = (hold("disk.vhdx"), hold("dirty.vhdx"));
        for arguments in [
            &["write", "disk.vhdx", "--offset", "0"][..],
            &["zero", "disk.vhdx", "--offset", "0", "--length", "1"],
            &["discard", "disk.vhdx", "--offset", "0", "--length", "8M"],
            &["write", "dirty.vhdx", "--offset", "0", "--replay"],
            &["replay", "dirty.vhdx"],
        ] {
            let run = scratch.pipe(arguments, b"x").expect(6);
            assert!(run.err.contains("another program has it open"), "{arguments:?}: {}", run.err);
            assert!(run.err.contains("hint: ") && !run.err.contains("--force-share"), "{}", run.err);
        }
        assert_eq!(scratch.sums(), before);
    }
}

#[test]
fn a_child_is_written_with_its_parent_only() {
    let scratch = Scratch::new();
    let child = scratch.chain();
    std::fs::create_dir(scratch.join("bases")).unwrap();
    std::fs::rename(scratch.join("base.vhdx"), scratch.join("bases/base.vhdx")).unwrap();
    let write = ["write", "child.vhdx", "--offset", "1048677"];
    scratch.pipe(&write, b"new").expect(6);
    let error = scratch.pipe(&[&write[..], &["--no-parents", "--json"]].concat(), b"new").expect(6).json_error();
    assert_eq!((&error["kind"], &error["bytes_done"]), (&"parent-missing".into(), &0.into()), "{error}");
    let run = scratch.pipe(&[&write[..], &["--parent-dir", "bases"]].concat(), b"new").expect(0).silent();
    assert!(run.out.contains("3 bytes written"), "{}", run.out);
    scratch.pipe(&["write", "child.vhdx", "--offset", "0", "--parent", "bases/base.vhdx"], b"more").expect(0).silent();
    let mut disk = disk_bytes(&child);
    disk[1_048_677..1_048_680].copy_from_slice(b"new");
    disk[..4].copy_from_slice(b"more");
    let read = scratch.run(&["read", "child.vhdx", "--parent-dir", "bases"]).expect(0).stdout;
    assert_same(&read, &disk, "child");
    // A parent that was written is no parent any more.
    scratch.pipe(&["write", "bases/base.vhdx", "--offset", "0"], b"x").expect(0);
    let error = scratch.run(&["read", "child.vhdx", "--parent-dir", "bases", "--json"]).expect(6).json_error();
    assert_eq!(error["kind"], "parent-mismatch");
}

#[test]
fn a_limit_of_the_file_size_ends_a_write_and_leaves_a_valid_image() {
    let scratch = Scratch::new();
    scratch.run(&["create", "disk.vhdx", "--size", "64M", "--block-size", "1M"]).expect(0);
    let bytes = junk(24 << 20);
    scratch.write("input", &bytes);
    let mut shell = Command::new("sh");
    let command = "ulimit -f 20480; exec \"$0\" write disk.vhdx --offset 0 --input input --json";
    shell.args(["-c", command, env!("CARGO_BIN_EXE_vhdkit")]).current_dir(scratch.path());
    let run = Run::new(foreign::run(&mut shell, std::time::Duration::from_secs(60)).unwrap()).expect(5);
    let error = run.json_error();
    assert!(error["message"].as_str().unwrap().contains("File too large"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("ulimit -f"), "{error}");
    assert_eq!(error["closed"], true);
    let written = error["bytes_done"].as_u64().unwrap() as usize;
    assert!((1..bytes.len()).contains(&written), "{error}");
    assert_same(&content(&scratch, "disk.vhdx")[..written], &bytes[..written], "what was written before");
}

#[test]
fn a_damaged_image_is_not_written() {
    let scratch = Scratch::new();
    let first = dynamic().build().layout.payload_block(1) / MIB;
    let block = vhdkit_testkit::builder::BlockSpec::present(vhdkit_testkit::content::Content::pattern(11)).at(first);
    let twice = dynamic().block(1, block.clone()).block(2, block).build();
    twice.write_to(&scratch.join("overlap.vhdx")).unwrap();
    let before = scratch.sums();
    for arguments in [
        &["write", "overlap.vhdx", "--offset", "0"][..],
        &["zero", "overlap.vhdx", "--offset", "0", "--length", "1"],
        &["discard", "overlap.vhdx", "--offset", "0", "--length", "8M"],
    ] {
        let run = scratch.pipe(arguments, b"x").expect(4);
        assert!(run.err.contains("[V-118]") && run.err.contains("hint: "), "{}", run.err);
    }
    assert_eq!(scratch.sums(), before);
}

#[test]
fn a_raw_disk_is_not_written() {
    let scratch = Scratch::new();
    scratch.write("disk.raw", &junk(8192));
    scratch.image("image.img");
    let before = scratch.sums();
    for image in ["disk.raw", "image.img"] {
        let run = scratch.pipe(&["write", image, "--offset", "0"], b"x").expect(3);
        assert!(run.err.contains("not a VHDX") && run.err.contains("--from vhdx"), "{}", run.err);
    }
    assert_eq!(scratch.sums(), before);
    scratch.pipe(&["write", "image.img", "--offset", "0", "--from", "vhdx"], b"x").expect(0);
    assert_ne!(scratch.sums(), before);
}
