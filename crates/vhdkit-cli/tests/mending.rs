//! `repair` and `recover` as they are typed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::os::unix::fs::MetadataExt as _;

use common::{MIB, Scratch, disk_bytes, dynamic};
use vhdkit_testkit::builder::BlockSpec;
use vhdkit_testkit::content::Content;

/// An image with a torn header copy, a damaged region table copy, and two blocks at one place.
fn broken(scratch: &Scratch, name: &str) {
    let first = dynamic().build().layout.payload_block(1) / MIB;
    let shared = BlockSpec::present(Content::pattern(11)).at(first);
    let builder = dynamic().block(1, shared.clone()).block(2, shared).patch(64 << 10, &[0xff; 512]);
    builder.patch(256 << 10, &[0xff; 512]).build().write_to(&scratch.join(name)).unwrap();
}

#[test]
fn a_plan_changes_nothing() {
    let scratch = Scratch::new();
    broken(&scratch, "a.vhdx");
    let (sums, before) = (scratch.sums(), std::fs::metadata(scratch.join("a.vhdx")).unwrap());
    let run = scratch.run(&["repair", "a.vhdx"]).expect(0).silent();
    for words in ["would do: ", "lost: nothing", "nothing was changed", "--apply", "V-007", "V-060", "V-118"] {
        assert!(run.out.contains(words), "{words}: {}", run.out);
    }
    let after = std::fs::metadata(scratch.join("a.vhdx")).unwrap();
    assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
    assert_eq!((scratch.sums(), scratch.names()), (sums, vec!["a.vhdx".to_owned()]));
    let plan = scratch.run(&["repair", "a.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!((&plan["applied"], &plan["possible"], &plan["undo"]), (&false.into(), &true.into(), &().into()));
    assert_eq!(plan["actions"].as_array().unwrap().len(), 3);
    assert_eq!((&plan["after"]["errors"], &plan["left"]), (&0.into(), &serde_json::json!([])));
    assert_eq!(plan["actions"][0]["finding"]["code"], "header-copy-damaged");
}

#[test]
fn a_record_that_was_put_back_makes_room() {
    let scratch = Scratch::new();
    broken(&scratch, "a.vhdx");
    let sums = scratch.sums();
    scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0);
    let record = std::fs::read(scratch.join("a.vhdx.undo")).unwrap();
    scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo"]).expect(0);
    // It has nothing to put back any more, and the next repair goes on as the first did.
    scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0);
    assert_ne!(std::fs::read(scratch.join("a.vhdx.undo")).unwrap(), record, "the GUIDs are new");
    scratch.run(&["check", "--strict", "a.vhdx"]).expect(0);
    scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo"]).expect(0);
    // One that was named stays, as it may be that of a copy; so does one that has something to put back.
    let run = scratch.run(&["repair", "a.vhdx", "--apply", "--undo", "a.vhdx.undo"]).expect(6);
    assert!(run.err.contains("`vhdkit repair a.vhdx --restore a.vhdx.undo`"), "{}", run.err);
    let repaired = scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0);
    assert!(repaired.out.contains("mended"), "{}", repaired.out);
    let mut image = std::fs::read(scratch.join("a.vhdx")).unwrap();
    let torn = image.clone();
    image[64 << 10..][..512].fill(0xff);
    scratch.write("a.vhdx", &image);
    scratch.run(&["repair", "a.vhdx", "--apply"]).expect(6);
    scratch.write("a.vhdx", &torn);
    scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo"]).expect(0);
    // Neither is there a record to a pipe.
    let run = scratch.run(&["repair", "a.vhdx", "--apply", "--undo", "-"]).expect(2);
    assert!(run.err.contains("--undo FILE"), "{}", run.err);
    let run = scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo", "--dry-run"]).expect(0);
    assert!(run.out.contains("0 bytes would be put back"), "{}", run.out);
    for name in ["a.vhdx.undo", "a.vhdx.undo.1", "a.vhdx.undo.2"] {
        std::fs::remove_file(scratch.join(name)).unwrap();
    }
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn mending_that_breaks_children_is_refused() {
    let scratch = Scratch::new();
    scratch.chain();
    // The last block of the parent loses its end: the guest will see zeros there.
    let path = scratch.join("base.vhdx");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 65536 - 512).unwrap();
    drop(file);
    let sums = scratch.sums();
    let run = scratch.run(&["repair", "base.vhdx"]).expect(0).silent();
    assert!(run.out.contains("lost: ") && run.out.contains("child.vhdx; --apply is refused"), "{}", run.out);
    let said = scratch.run(&["repair", "base.vhdx", "--json"]).expect(0).json();
    assert!(said["children"][0].as_str().unwrap().ends_with("child.vhdx"), "{said}");
    scratch.run(&["repair", "base.vhdx", "--dry-run"]).expect(6);
    let run = scratch.run(&["repair", "base.vhdx", "--apply"]).expect(6);
    assert!(run.err.contains("child.vhdx") && run.err.contains("--break-children"), "{}", run.err);
    assert_eq!(scratch.sums(), sums);
    scratch.run(&["repair", "base.vhdx", "--apply", "--break-children"]).expect(0);
    scratch.run(&["check", "base.vhdx"]).expect(0);
    scratch.run(&["read", "child.vhdx"]).expect(6);
    // Linked to the mended one, the child would not accept the one from before.
    scratch.run(&["reparent", "child.vhdx", "base.vhdx", "--ignore-id-mismatch"]).expect(0);
    for more in [&[][..], &["--dry-run"]] {
        let restore = ["repair", "base.vhdx", "--restore", "base.vhdx.undo"];
        let run = scratch.run(&[&restore[..], more].concat()).expect(6);
        assert!(run.err.contains("child.vhdx") && run.err.contains("--break-children"), "{}", run.err);
    }
    scratch.run(&["read", "child.vhdx"]).expect(0);
    scratch.run(&["repair", "base.vhdx", "--restore", "base.vhdx.undo", "--break-children"]).expect(0);
    assert_eq!(scratch.sums()["base.vhdx"], sums["base.vhdx"]);
}

#[test]
fn what_is_applied_can_be_undone() {
    let scratch = Scratch::new();
    broken(&scratch, "a.vhdx");
    let sums = scratch.sums();
    let run = scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0).silent();
    assert!(run.out.contains("done: ") && run.out.contains("repair a.vhdx --restore a.vhdx.undo"), "{}", run.out);
    scratch.run(&["check", "--strict", "a.vhdx"]).expect(0);
    let again = scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0).silent();
    assert!(again.out.contains("nothing to mend"), "{}", again.out);
    let run = scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo", "--json"]).expect(0).silent();
    assert_eq!(run.json()["restored"], true);
    std::fs::remove_file(scratch.join("a.vhdx.undo")).unwrap();
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn a_record_is_never_replaced() {
    let scratch = Scratch::new();
    broken(&scratch, "a.vhdx");
    scratch.write("a.vhdx.undo", b"precious");
    scratch.write("other", b"precious too");
    let sums = scratch.sums();
    for arguments in [
        &["repair", "a.vhdx", "--apply"][..],
        &["repair", "a.vhdx", "--apply", "--force"],
        &["repair", "a.vhdx", "--apply", "--undo", "other"],
        &["repair", "a.vhdx", "--apply", "--undo", "a.vhdx"],
    ] {
        let run = scratch.run(arguments).expect(6);
        assert!(run.err.contains("--restore"), "{}", run.err);
        assert_eq!(scratch.sums(), sums, "{arguments:?}");
    }
    scratch.run(&["repair", "a.vhdx", "--apply", "--undo", "fresh"]).expect(0);
    assert!(scratch.join("fresh").is_file());
}

#[test]
fn a_record_that_does_not_belong_is_refused() {
    let scratch = Scratch::new();
    broken(&scratch, "a.vhdx");
    broken(&scratch, "b.vhdx");
    scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0);
    scratch.write("junk", &common::junk(5000));
    scratch.pipe(&["write", "b.vhdx", "--offset", "1M"], b"hello").expect(4);
    let sums = scratch.sums();
    // b is the same file, so that its state is a legal one; what is written to since is not.
    scratch.run(&["repair", "b.vhdx", "--restore", "junk"]).expect(2);
    scratch.run(&["repair", "b.vhdx", "--restore", "missing"]).expect(5);
    scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx"]).expect(2);
    assert_eq!(scratch.sums(), sums);
    scratch.pipe(&["write", "a.vhdx", "--offset", "1M"], b"hello").expect(0);
    let sums = scratch.sums();
    let run = scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo"]).expect(6);
    assert!(run.err.contains("does not belong"), "{}", run.err);
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn what_is_left_ends_with_1() {
    let scratch = Scratch::new();
    let metadata = dynamic().build().layout.metadata;
    dynamic().patch(metadata, &[0; 4096]).build().write_to(&scratch.join("a.vhdx")).unwrap();
    let sums = scratch.sums();
    for arguments in [&["repair", "a.vhdx"][..], &["repair", "a.vhdx", "--apply"]] {
        let run = scratch.run(arguments).expect(1).silent();
        assert!(run.out.contains("left: ") && run.out.contains("vhdkit recover"), "{}", run.out);
        assert_eq!(scratch.sums(), sums);
    }
    let run = scratch.run(&["recover", "a.vhdx", "b.vhdx"]).expect(0).silent();
    assert!(run.out.contains("metadata:"), "{}", run.out);
    let disk = scratch.run(&["read", "b.vhdx"]).expect(0).stdout;
    assert!(disk == disk_bytes(&dynamic().build()));
}

#[test]
fn a_dirty_log_is_put_into_place() {
    let scratch = Scratch::new();
    let built = scratch.dirty("a.vhdx");
    let sums = scratch.sums();
    let run = scratch.run(&["repair", "a.vhdx"]).expect(0).silent();
    assert!(run.out.contains("put into place"), "{}", run.out);
    assert_eq!(scratch.sums(), sums);
    scratch.run(&["repair", "a.vhdx", "--apply"]).expect(0);
    assert_eq!(scratch.run(&["info", "a.vhdx", "--json"]).expect(0).json()["log"]["state"], "clean");
    assert!(scratch.run(&["read", "a.vhdx"]).expect(0).stdout == disk_bytes(&built));
    scratch.run(&["repair", "a.vhdx", "--restore", "a.vhdx.undo"]).expect(0);
    std::fs::remove_file(scratch.join("a.vhdx.undo")).unwrap();
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn a_child_that_lost_its_parent_is_told_of_reparent() {
    let scratch = Scratch::new();
    scratch.chain();
    scratch.run(&["repair", "child.vhdx"]).expect(0);
    scratch.pipe(&["write", "base.vhdx", "--offset", "0"], b"changed").expect(0);
    let run = scratch.run(&["repair", "child.vhdx"]).expect(1);
    assert!(run.out.contains("vhdkit reparent") && run.out.contains("V-152"), "{}", run.out);
    let run = scratch.run(&["repair", "child.vhdx", "--json"]).expect(1);
    assert_eq!(run.json()["parent"]["kind"], "parent-mismatch");
}

#[test]
fn a_child_is_recovered_with_its_parent() {
    let scratch = Scratch::new();
    let child = scratch.chain();
    let run = scratch.run(&["recover", "child.vhdx", "alone.vhdx"]).expect(1).silent();
    assert!(run.out.contains("--parent FILE"), "{}", run.out);
    scratch.run(&["recover", "child.vhdx", "whole.vhdx", "--parent", "base.vhdx"]).expect(0);
    assert!(scratch.run(&["read", "whole.vhdx"]).expect(0).stdout == disk_bytes(&child));
}

#[test]
fn sizes_that_are_known_may_be_given() {
    let scratch = Scratch::new();
    let layout = dynamic().build().layout;
    let zeros = vec![0; MIB as usize];
    dynamic().patch(layout.metadata, &zeros).build().write_to(&scratch.join("a.vhdx")).unwrap();
    let arguments =
        ["recover", "a.vhdx", "b.vhdx", "--size", "8M", "--block-size", "1M", "--sector-size", "512", "--json"];
    let names = scratch.names();
    scratch.run(&[&arguments[..], &["--dry-run"]].concat()).expect(1).silent();
    assert_eq!(scratch.names(), names, "a dry run makes nothing");
    // Whether there was a parent stood in the metadata.
    let report = scratch.run(&arguments).expect(1).silent().json();
    assert_eq!(report["certain"], false);
    assert_eq!((&report["disk_size"], &report["block_size"]), (&(8 * MIB).into(), &MIB.into()));
    assert!(scratch.run(&["read", "b.vhdx"]).expect(0).stdout == disk_bytes(&dynamic().build()));
    scratch.run(&["recover", "a.vhdx", "c.vhdx", "--block-size", "3M"]).expect(2);
    scratch.run(&["recover", "a.vhdx", "c.vhdx", "--sector-size", "520"]).expect(2);
    assert!(!scratch.names().contains(&"c.vhdx".to_owned()));
}

#[test]
fn what_is_recovered_is_no_raw_disk() {
    let scratch = Scratch::new();
    broken(&scratch, "a.vhdx");
    let run = scratch.run(&["recover", "a.vhdx", "out.img"]).expect(2);
    assert!(run.err.contains("out.img") && run.err.contains("vhdkit convert"), "{}", run.err);
    let run = scratch.run(&["recover", "a.vhdx", "-"]).expect(2);
    assert!(run.err.contains("./-"), "{}", run.err);
    assert_eq!(scratch.names(), ["a.vhdx"]);
}
