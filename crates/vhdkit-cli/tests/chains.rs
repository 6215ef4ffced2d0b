//! `chain`, `diff` and `apply`: what they print, what they end with, and what they leave alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use common::{MIB, Scratch, dynamic, junk};
use serde_json::Value;
use vhdkit_testkit::builder::ImageBuilder;

/// `base.vhdx`, `child.avhdx` with a block of data and a zeroed block, `grand.avhdx` with a sector; and `copy.vhdx` of the
/// base in a directory of its own.
fn family() -> Scratch {
    let scratch = Scratch::new();
    dynamic().build().write_to(&scratch.join("base.vhdx")).unwrap();
    std::fs::create_dir(scratch.join("backup")).unwrap();
    std::fs::copy(scratch.join("base.vhdx"), scratch.join("backup/copy.vhdx")).unwrap();
    scratch.run(&["create", "child.avhdx", "--parent", "base.vhdx", "--block-size", "1M", "-q"]).expect(0);
    assert_eq!(scratch.pipe(&["write", "child.avhdx", "--offset", "2M"], &junk(MIB as usize)).code, Some(0));
    scratch.run(&["zero", "child.avhdx", "--offset", "1M", "--length", "1M"]).expect(0);
    scratch.run(&["create", "grand.avhdx", "--parent", "child.avhdx", "--block-size", "1M", "-q"]).expect(0);
    assert_eq!(scratch.pipe(&["write", "grand.avhdx", "--offset", "6M"], &junk(512)).code, Some(0));
    scratch
}

fn json(scratch: &Scratch, arguments: &[&str], code: i32) -> Value {
    scratch.run(&[arguments, &["--json"]].concat()).expect(code).silent().json()
}

/// The remedies of an image that are commands.
fn commands(report: &Value, file: &str) -> Vec<String> {
    let images = report["images"].as_array().unwrap();
    let image = images.iter().find(|image| image["file"].as_str().unwrap().ends_with(file)).unwrap();
    let troubles = image["parent"]["troubles"].as_array().unwrap();
    let remedies = troubles.iter().flat_map(|trouble| trouble["remedies"].as_array().unwrap());
    let words = |command: &Value| {
        let words: Vec<&str> = command.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        words.join(" ")
    };
    remedies.filter(|remedy| !remedy["command"].is_null()).map(|remedy| words(&remedy["command"])).collect()
}

#[test]
fn chain_draws_trees() {
    let scratch = family();
    let before = scratch.sums();
    let run = scratch.run(&["chain", "."]).expect(0).silent();
    let names: Vec<&str> = run.out.lines().map(|line| line.rsplit_once("  ").unwrap().0).collect();
    assert_eq!(names, ["base.vhdx", "`-- child.avhdx", "    `-- grand.avhdx"], "{}", run.out);
    assert!(run.out.contains("differencing, 8 MiB, "), "{}", run.out);
    let report = json(&scratch, &["chain", "grand.avhdx", "--recursive"], 0);
    assert_eq!((&report["whole"], report["images"].as_array().unwrap().len()), (&true.into(), 3));
    let child = &report["images"][1];
    assert_eq!(
        (&child["file"], &child["depth"], &child["type"], &child["dirty"], &child["in_use"], &child["disk_size"]),
        (&"child.avhdx".into(), &1.into(), &"differencing".into(), &false.into(), &false.into(), &(8 * MIB).into())
    );
    let parent = &child["parent"];
    assert_eq!((&parent["state"], &parent["file"]), (&"ok".into(), &"base.vhdx".into()));
    assert_eq!(
        (&parent["identified_by"], &parent["paths"]["relative_path"]),
        (&"parent_linkage".into(), &".\\base.vhdx".into())
    );
    assert_eq!(report["images"][0]["parent"]["state"], "none");
    assert_eq!(report["images"][0]["data_write_guid"], parent["linkage"]);
    let images = json(&scratch, &["chain", ".", "--recursive"], 0)["images"].as_array().unwrap().len();
    assert_eq!(images, 4);
    assert_eq!(scratch.sums(), before);
}

#[test]
fn chain_names_what_is_broken_and_how_to_mend_it() {
    let scratch = family();
    std::fs::rename(scratch.join("base.vhdx"), scratch.join("it's new.vhdx")).unwrap();
    std::fs::write(scratch.join("old.vhd"), [b"conectix".as_slice(), &[0; 504]].concat()).unwrap();
    dynamic()
        .patch(64 << 10, &[0xff; 4096])
        .patch(128 << 10, &[0xff; 4096])
        .build()
        .write_to(&scratch.join("torn.vhdx"))
        .unwrap();
    let run = scratch.run(&["chain", "."]).expect(1).silent();
    for part in [
        "it's new.vhdx  dynamic",
        "`-- child.avhdx  differencing",
        "    |   broken (moved): its parent is not where it says, but at \"it's new.vhdx\"",
        "`vhdkit reparent child.avhdx 'it'\\''s new.vhdx'`",
        "    `-- grand.avhdx",
        "Damaged\n  torn.vhdx: ",
        "Skipped\n  old.vhd: file identifier at 0x0: this is a VHD",
    ] {
        assert!(run.out.contains(part), "{part}: {}", run.out);
    }
    let report = json(&scratch, &["chain", "."], 1);
    assert_eq!(commands(&report, "child.avhdx"), ["vhdkit reparent child.avhdx it's new.vhdx"]);
    assert_eq!(commands(&report, "grand.avhdx"), Vec::<String>::new());
    assert_eq!(
        (&report["damaged"][0]["file"], &report["skipped"][0]["file"]),
        (&"torn.vhdx".into(), &"old.vhd".into())
    );
    // The parent was changed: the way on has its warning.
    std::fs::rename(scratch.join("it's new.vhdx"), scratch.join("base.vhdx")).unwrap();
    assert_eq!(scratch.pipe(&["write", "base.vhdx", "--offset", "0"], b"changed").code, Some(0));
    let report = json(&scratch, &["chain", "grand.avhdx"], 1);
    assert_eq!(commands(&report, "child.avhdx"), ["vhdkit reparent child.avhdx base.vhdx --ignore-id-mismatch"]);
    assert_eq!(report["images"][1]["parent"]["troubles"][0]["kind"], "changed");
    // The copy in the other directory is the right one, where it may be looked for.
    let report = json(&scratch, &["chain", "grand.avhdx", "--parent-dir", "backup"], 1);
    assert_eq!(commands(&report, "child.avhdx"), ["vhdkit reparent child.avhdx backup/copy.vhdx"]);
    let report = json(&scratch, &["chain", "grand.avhdx", "--parent", "backup/copy.vhdx"], 1);
    assert_eq!(commands(&report, "child.avhdx"), ["vhdkit reparent child.avhdx backup/copy.vhdx"]);
    // Missing, and not to be followed at all.
    std::fs::remove_file(scratch.join("base.vhdx")).unwrap();
    let run = scratch.run(&["chain", "child.avhdx"]).expect(1).silent();
    assert!(run.out.contains("broken (missing)") && run.out.contains("--parent-dir DIR"), "{}", run.out);
    scratch.run(&["chain", "child.avhdx", "--no-parents", "--quiet"]).expect(1).silent();
    scratch.run(&["chain", "missing"]).expect(5);
    scratch.run(&["chain", "old.vhd"]).expect(3);
}

#[test]
fn chain_shows_images_that_are_in_use() {
    let scratch = family();
    let mut server = scratch
        .command(&["serve", "grand.avhdx", "--write", "--idle-exit", "60"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut uri = String::new();
    server.stdout.take().unwrap().read_to_string(&mut uri).unwrap();
    let run = scratch.run(&["chain", "."]).expect(0).silent();
    assert!(run.out.lines().any(|line| line.contains("grand.avhdx") && line.contains(", in use")), "{}", run.out);
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn diff_tells_what_changed() {
    let scratch = family();
    let before = scratch.sums();
    let report = json(&scratch, &["diff", "child.avhdx"], 0);
    assert_eq!(report["by"], "allocation");
    assert_eq!(
        (&report["equal"], &report["changed_bytes"], &report["zeroed_bytes"]),
        (&false.into(), &(2 * MIB).into(), &MIB.into())
    );
    assert_eq!(
        report["ranges"],
        serde_json::json!([
            { "start": MIB, "length": MIB, "zero": true },
            { "start": 2 * MIB, "length": MIB, "zero": false },
        ])
    );
    assert_eq!(
        (&report["bytes_read_a"], &report["bytes_read_b"], &report["ranges_complete"]),
        (&0.into(), &0.into(), &true.into())
    );
    let both = json(&scratch, &["diff", "base.vhdx", "child.avhdx"], 0);
    assert_eq!(both["ranges"], report["ranges"]);
    let two = json(&scratch, &["diff", "grand.avhdx", "--layers", "2"], 0);
    assert_eq!(two["changed_bytes"], 2 * MIB + 512);
    let text = scratch.run(&["diff", "grand.avhdx"]).expect(0).silent().out;
    assert!(text.contains("512 bytes changed in 1 range (by what is allocated") && text.contains("6291456"), "{text}");
    // A copy shares no file: its contents are read.
    let copy = json(&scratch, &["diff", "backup/copy.vhdx", "base.vhdx", "--exit-code"], 0);
    assert_eq!((&copy["by"], &copy["equal"]), (&"contents".into(), &true.into()));
    scratch.run(&["diff", "base.vhdx", "child.avhdx", "--exit-code", "--quiet"]).expect(1).silent();
    scratch.run(&["diff", "base.vhdx", "base.vhdx", "--exit-code"]).expect(0).silent();
    // What has no parent, or not so many.
    let run = scratch.run(&["diff", "base.vhdx"]).expect(2);
    assert!(run.err.contains("no parent") && run.err.contains("hint: "), "{}", run.err);
    scratch.run(&["diff", "grand.avhdx", "--layers", "3"]).expect(2);
    scratch.run(&["diff", "grand.avhdx", "--no-parents"]).expect(2);
    assert_eq!(scratch.sums(), before);
}

#[test]
fn long_lists_are_cut() {
    let scratch = Scratch::new();
    let (one, other) = (vec![0; 256 << 10], scratch.join("other.raw"));
    scratch.write("one.raw", &one);
    std::fs::write(&other, &one).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(other).unwrap();
    for at in 0..100 {
        file.write_all_at(b"x", at * 2048).unwrap();
    }
    let lines = |arguments: &[&str]| scratch.run(arguments).expect(0).silent().out.lines().count();
    let text = scratch.run(&["diff", "one.raw", "other.raw"]).expect(0).silent().out;
    assert!(
        text.contains("51200 bytes) changed in 100 ranges (by contents)") && text.contains("and 80 more; --all"),
        "{text}"
    );
    assert_eq!(lines(&["diff", "one.raw", "other.raw"]), 2 + 1 + 20 + 1);
    assert_eq!(lines(&["diff", "one.raw", "other.raw", "--all"]), 2 + 1 + 100);
    assert_eq!(json(&scratch, &["diff", "one.raw", "other.raw"], 0)["ranges"].as_array().unwrap().len(), 100);
}

#[test]
fn increments_are_exported_and_applied_one_after_another() {
    let scratch = family();
    let report = json(&scratch, &["diff", "child.avhdx", "--export", "one.increment"], 0);
    let export = &report["export"];
    assert_eq!(
        (&export["data_bytes"], &export["zero_bytes"], &export["base_checksums"]),
        (&MIB.into(), &MIB.into(), &true.into())
    );
    assert_eq!(export["file_bytes"], std::fs::metadata(scratch.join("one.increment")).unwrap().len());
    let text = scratch.run(&["diff", "grand.avhdx", "--export", "two.increment"]).expect(0).silent().out;
    assert!(text.contains("two.increment: "), "{text}");
    let before = std::fs::read(scratch.join("backup/copy.vhdx")).unwrap();
    let unchanged = || assert!(std::fs::read(scratch.join("backup/copy.vhdx")).unwrap() == before);
    // The second one first: refused.
    let run = scratch.run(&["apply", "two.increment", "backup/copy.vhdx"]).expect(6);
    assert!(run.err.contains("apply the increments before this one first"), "{}", run.err);
    let plan = json(&scratch, &["apply", "one.increment", "backup/copy.vhdx", "--dry-run"], 0);
    assert_eq!(
        (&plan["dry_run"], &plan["applied"], &plan["basis"], &plan["data_bytes"]),
        (&true.into(), &false.into(), &"identity".into(), &MIB.into())
    );
    unchanged();
    let run = scratch.run(&["apply", "one.increment", "backup/copy.vhdx", "--verify"]).expect(0).silent();
    assert!(
        run.out.contains("1 MiB of data and 1 MiB of zeros applied") && run.out.contains("verified"),
        "{}",
        run.out
    );
    scratch.run(&["compare", "backup/copy.vhdx", "child.avhdx"]).expect(0);
    let done = json(&scratch, &["apply", "two.increment", "backup/copy.vhdx"], 0);
    assert_eq!((&done["applied"], &done["basis"], &done["replay"]), (&true.into(), &"identity".into(), &Value::Null));
    scratch.run(&["compare", "backup/copy.vhdx", "grand.avhdx"]).expect(0);
    scratch.run(&["check", "--strict", "backup/copy.vhdx"]).expect(0);
    let again = json(&scratch, &["apply", "two.increment", "backup/copy.vhdx"], 0);
    assert_eq!((&again["applied"], &again["basis"]), (&false.into(), &"done".into()));
    // A child that was made of the newer disk takes the copy as its parent.
    std::fs::rename(scratch.join("backup/copy.vhdx"), scratch.join("backup/child.avhdx")).unwrap();
    scratch.run(&["apply", "two.increment", "backup/child.avhdx"]).expect(0);
}

#[test]
fn an_image_with_children_is_not_changed_unless_that_is_wanted() {
    let scratch = family();
    scratch.run(&["diff", "base.vhdx", "child.avhdx", "--export", "x.increment", "-q"]).expect(0);
    let before = scratch.sums();
    let run = scratch.run(&["apply", "x.increment", "base.vhdx"]).expect(6);
    assert!(run.err.contains("child.avhdx") && run.err.contains("--break-children"), "{}", run.err);
    scratch.run(&["apply", "x.increment", "base.vhdx", "--dry-run"]).expect(6);
    // One elsewhere is found when it is named.
    std::fs::rename(scratch.join("child.avhdx"), scratch.join("backup/child.avhdx")).unwrap();
    let named = ["apply", "x.increment", "base.vhdx", "--child", "backup/child.avhdx"];
    scratch.run(&named).expect(6);
    scratch.run(&["apply", "x.increment", "base.vhdx", "--child", "missing.avhdx"]).expect(5);
    assert_eq!(scratch.sums()["base.vhdx"], before["base.vhdx"]);
    scratch.run(&[&named[..], &["--break-children"]].concat()).expect(0);
    assert_ne!(scratch.sums()["base.vhdx"], before["base.vhdx"]);
}

#[test]
fn what_is_no_increment_or_damaged_is_refused_before_the_first_write() {
    let scratch = family();
    scratch.run(&["diff", "child.avhdx", "--export", "x.increment", "-q"]).expect(0);
    let whole = std::fs::read(scratch.join("x.increment")).unwrap();
    let target = std::fs::read(scratch.join("backup/copy.vhdx")).unwrap();
    let refuses = |name: &str, bytes: &[u8], code| {
        scratch.write("y.increment", bytes);
        let run = scratch.run(&["apply", "y.increment", "backup/copy.vhdx", "--json"]).expect(code);
        assert_eq!(run.json_error()["file"], "y.increment", "{name}: {}", run.err);
        assert!(std::fs::read(scratch.join("backup/copy.vhdx")).unwrap() == target, "{name}");
    };
    refuses("empty", b"", 3);
    refuses("junk", &junk(4096), 3);
    for at in [0, 5, 50, 257, 300, 400, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        refuses(&format!("flipped at {at}"), &flipped, if at == 0 { 3 } else { 4 });
        refuses(&format!("cut at {at}"), &whole[..at], if at == 0 { 3 } else { 4 });
    }
    refuses("longer", &[whole.clone(), vec![0]].concat(), 4);
    let run = scratch.run(&["apply", "missing.increment", "backup/copy.vhdx"]).expect(5);
    assert!(run.err.contains("missing.increment"), "{}", run.err);
    scratch.run(&["apply", ".", "backup/copy.vhdx"]).expect(2);
    scratch.run(&["apply", "x.increment", "backup/copy.vhdx"]).expect(0);
}

#[test]
fn increments_go_through_pipes() {
    let scratch = family();
    let run = scratch.run(&["diff", "child.avhdx", "--export", "-"]).expect(0).silent();
    scratch.write("piped.increment", &run.stdout);
    scratch.run(&["apply", "piped.increment", "backup/copy.vhdx"]).expect(0);
    scratch.run(&["compare", "backup/copy.vhdx", "child.avhdx"]).expect(0);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = scratch.command(&["diff", "child.avhdx", "--export", "-"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
}

#[test]
fn an_apply_that_is_killed_goes_on() {
    let scratch = Scratch::new();
    scratch.run(&["create", "base.vhdx", "--size", "128M", "--block-size", "1M", "-q"]).expect(0);
    scratch.run(&["create", "child.avhdx", "--parent", "base.vhdx", "--block-size", "1M", "-q"]).expect(0);
    let data = scratch.write("data", &junk(40 << 20));
    scratch.run(&["write", "child.avhdx", "--offset", "5M", "--input", data.to_str().unwrap()]).expect(0);
    scratch.run(&["diff", "child.avhdx", "--export", "x.increment", "-q"]).expect(0);
    std::fs::create_dir(scratch.join("backup")).unwrap();
    let mut bases: Vec<String> = Vec::new();
    for milliseconds in [0, 2, 5, 10, 20, 40, 80, 160, 320] {
        std::fs::copy(scratch.join("base.vhdx"), scratch.join("backup/target.vhdx")).unwrap();
        let mut running = scratch.command(&["apply", "x.increment", "backup/target.vhdx", "-q"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        running.kill().unwrap();
        running.wait().unwrap();
        // It may say that the log is dirty.
        let report =
            scratch.run(&["apply", "x.increment", "backup/target.vhdx", "--replay", "--json"]).expect(0).json();
        bases.push(report["basis"].as_str().unwrap().to_owned());
        scratch.run(&["compare", "backup/target.vhdx", "child.avhdx"]).expect(0);
        assert_eq!(json(&scratch, &["apply", "x.increment", "backup/target.vhdx"], 0)["basis"], "done");
    }
    // What is met depends on the machine; nothing else may be.
    assert!(bases.iter().all(|basis| ["identity", "begun", "done"].contains(&basis.as_str())), "{bases:?}");
    println!("{bases:?}");
}

#[test]
fn raw_disks_take_force() {
    let scratch = family();
    scratch.run(&["convert", "base.vhdx", "base.raw", "-q"]).expect(0);
    scratch.run(&["diff", "child.avhdx", "--export", "x.increment", "-q"]).expect(0);
    let before = scratch.sums()["base.raw"].clone();
    let run = scratch.run(&["apply", "x.increment", "base.raw"]).expect(6);
    assert!(run.err.contains("--force"), "{}", run.err);
    let plan = json(&scratch, &["apply", "x.increment", "base.raw", "--force", "--dry-run"], 0);
    assert_eq!(plan["basis"], "contents");
    assert_eq!(scratch.sums()["base.raw"], before);
    scratch.run(&["apply", "x.increment", "base.raw", "--force", "--verify"]).expect(0);
    scratch.run(&["compare", "base.raw", "child.avhdx"]).expect(0);
    // Not what the base held, and not what it is to hold.
    std::fs::OpenOptions::new()
        .write(true)
        .open(scratch.join("base.raw"))
        .unwrap()
        .write_all_at(b"x", 2 * MIB)
        .unwrap();
    let run = scratch.run(&["apply", "x.increment", "base.raw", "--force"]).expect(6);
    assert!(run.err.contains("neither") && run.err.contains("--resume"), "{}", run.err);
    scratch.run(&["apply", "x.increment", "base.raw", "--force", "--resume"]).expect(0);
    scratch.run(&["compare", "base.raw", "child.avhdx"]).expect(0);
}

#[test]
fn another_size_names_the_resize_that_it_takes() {
    let scratch = Scratch::new();
    scratch.image("small.vhdx");
    let large = ImageBuilder::new(16 * MIB, MIB as u32).pattern_block(12, 3);
    large
        .both_headers(|header| header.data_write_guid.0[0] ^= 1)
        .build()
        .write_to(&scratch.join("large.vhdx"))
        .unwrap();
    scratch.run(&["diff", "small.vhdx", "large.vhdx", "--export", "x.increment", "-q"]).expect(0);
    let run = scratch.run(&["apply", "x.increment", "small.vhdx"]).expect(6);
    assert!(run.err.contains("vhdkit resize small.vhdx 16777216"), "{}", run.err);
}
