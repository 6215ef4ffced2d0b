//! What stands at the edges: standard input and output, names, limits, files of other kinds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::process::Command;

use common::{MIB, Run, Scratch, junk};
use vhdkit_testkit::foreign;

#[test]
fn the_size_of_a_stream_need_not_be_whole_sectors() {
    let scratch = Scratch::new();
    let bytes = junk(70_001);
    let run = scratch.pipe(&["convert", "-", "a.vhdx", "--size", "70001"], &bytes).expect(0);
    assert!(run.err.contains("padded with 143 bytes"), "{}", run.err);
    let sectors = ["--logical-sector-size", "4096"];
    scratch.pipe(&[&["convert", "-", "b.vhdx", "--size", "70001"], &sectors[..]].concat(), &bytes).expect(0);
    for (name, length) in [("a.vhdx", 70_144), ("b.vhdx", 73_728)] {
        let read = scratch.run(&["read", name]).expect(0).stdout;
        assert_eq!((read.len(), &read[..70_001]), (length, &bytes[..]), "{name}");
        assert!(read[70_001..].iter().all(|byte| *byte == 0), "{name}");
    }
}

#[test]
fn standard_input_that_looks_like_a_vhdx_is_raw_and_said_to_be() {
    let scratch = Scratch::new();
    scratch.image("inner.vhdx");
    let file = std::fs::read(scratch.join("inner.vhdx")).unwrap();
    for target in ["out.vhdx", "out.raw"] {
        let run = scratch.pipe(&["convert", "-", target], &file).expect(0);
        assert!(run.err.contains("looks like a VHDX") && run.err.contains("--from vhdx"), "{}", run.err);
        assert_eq!(run.err.matches("looks like").count(), 1, "{}", run.err);
        assert_eq!(scratch.run(&["read", target]).expect(0).stdout, file);
    }
    scratch.pipe(&["convert", "-", "other.raw"], &junk(4096)).expect(0).silent();
}

#[test]
fn only_convert_takes_a_disk_from_standard_input() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    for arguments in [
        &["info", "-"][..],
        &["check", "-"],
        &["map", "-"],
        &["read", "-"],
        &["compare", "-", "disk.vhdx"],
        &["measure", "-"],
        &["write", "-", "--offset", "0"],
        &["zero", "-", "--offset", "0", "--length", "1"],
        &["discard", "-", "--offset", "0", "--length", "1"],
        &["replay", "-"],
    ] {
        let run = scratch.run(arguments).expect(2);
        assert!(run.err.contains("standard input") && run.err.contains("hint: "), "{arguments:?}: {}", run.err);
    }
    std::fs::rename(scratch.join("disk.vhdx"), scratch.join("-")).unwrap();
    scratch.run(&["info", "./-"]).expect(0).silent();
}

#[test]
fn images_of_other_formats_are_named_with_the_way_to_convert_them() {
    let scratch = Scratch::new();
    let mut qcow = vec![0; 4096];
    qcow[..4].copy_from_slice(b"QFI\xfb");
    let mut fixed_vhd = vec![0; 4096];
    fixed_vhd[3584..3592].copy_from_slice(b"conectix");
    for (bytes, name, format) in [(&qcow, "QCOW2", "-f qcow2"), (&fixed_vhd, "VHD", "-f vpc")] {
        scratch.write("disk", bytes);
        for arguments in [&["info", "disk"][..], &["check", "disk"], &["map", "disk"], &["convert", "disk", "x.vhdx"]] {
            let run = scratch.run(arguments).expect(3);
            let says_all = run.err.contains(name) && run.err.contains(format);
            assert!(says_all, "{arguments:?}: {}", run.err);
            // What reads images alone has no use for a raw disk.
            assert_eq!(run.err.contains("--from raw"), arguments[0] == "convert", "{arguments:?}: {}", run.err);
        }
        scratch.run(&["convert", "disk", "x.vhdx", "--from", "raw", "--force"]).expect(0);
    }
}

#[test]
fn a_named_parent_that_is_not_there_is_a_parent_that_was_not_found() {
    let scratch = Scratch::new();
    scratch.chain();
    for arguments in [&["read", "child.vhdx"][..], &["map", "child.vhdx"], &["convert", "child.vhdx", "x.raw"]] {
        let run = scratch.run(&[arguments, &["--parent", "nowhere.vhdx", "--json"]].concat()).expect(6);
        let error = run.json_error();
        assert_eq!((&error["kind"], &error["file"]), (&"parent-not-found".into(), &"nowhere.vhdx".into()), "{error}");
    }
    let info = scratch.run(&["info", "child.vhdx", "--parent", "nowhere.vhdx", "--json"]).expect(0).json();
    assert_eq!(info["chain"][0]["verdict"], "parent-not-found");
    assert_eq!(scratch.run(&["info", "nowhere.vhdx", "--json"]).expect(5).json_error()["kind"], "io");
    assert_eq!(scratch.names(), ["base.vhdx", "child.vhdx"]);
}

#[test]
fn the_picture_goes_to_standard_output_too() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let picture = scratch.run(&["map", "disk.vhdx", "--svg", "-"]).expect(0).silent().out;
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"), "{picture}");
    scratch.run(&["map", "disk.vhdx", "--svg", "file.svg"]).expect(0);
    assert_eq!(std::fs::read_to_string(scratch.join("file.svg")).unwrap(), picture);
    scratch.run(&["map", "disk.vhdx", "--svg", "-", "--json"]).expect(2);
    assert_eq!(scratch.names(), ["disk.vhdx", "file.svg"]);
}

#[test]
fn a_limit_of_the_file_size_is_an_error_and_no_death() {
    let scratch = Scratch::new();
    scratch.write("source.raw", &junk(3 * MIB as usize));
    let program = env!("CARGO_BIN_EXE_vhdkit");
    for command in
        ["convert source.raw x.vhdx", "convert source.raw x.raw --to raw --no-zero-scan", "create x.vhdx --size 1G"]
    {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -f 1024; exec \"$0\" {command}"), program]).current_dir(scratch.path());
        let run = Run::new(foreign::run(&mut shell, std::time::Duration::from_secs(60)).unwrap()).expect(5);
        assert!(run.err.contains("x.") && run.err.contains("hint: "), "{command}: {}", run.err);
    }
    assert_eq!(scratch.names(), ["source.raw"]);
}

#[test]
fn a_name_that_is_too_long() {
    let scratch = Scratch::new();
    let name = format!("{}.vhdx", "x".repeat(300));
    let run = scratch.run(&["create", &name, "--size", "1M"]).expect(5);
    assert!(run.err.contains("hint: choose a shorter name"), "{}", run.err);
}

#[test]
fn check_judges_a_vhdx_whose_first_sector_is_gone() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let mut file = std::fs::read(scratch.join("disk.vhdx")).unwrap();
    file[..512].fill(0);
    scratch.write("disk.vhdx", &file);
    let report = scratch.run(&["check", "disk.vhdx", "--json"]).expect(1).silent().json();
    assert_eq!(report["findings"][0]["code"], "file-signature");
    scratch.run(&["info", "disk.vhdx"]).expect(3);
    scratch.write("junk.vhdx", &junk(MIB as usize));
    scratch.run(&["check", "junk.vhdx"]).expect(3);
}

#[test]
fn check_sends_nobody_to_check() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let mut file = std::fs::read(scratch.join("disk.vhdx")).unwrap();
    for header in [0x1_0000, 0x2_0000] {
        file[header..header + 4].fill(0);
    }
    scratch.write("disk.vhdx", &file);
    let run = scratch.run(&["check", "disk.vhdx"]).expect(1);
    assert!(run.out.contains("headers-damaged") && !run.out.contains("vhdkit check"), "{}", run.out);
    let run = scratch.run(&["info", "disk.vhdx"]).expect(4);
    assert!(run.err.contains("vhdkit check"), "{}", run.err);
}

#[test]
fn a_map_that_fails_at_once_prints_nothing() {
    let scratch = Scratch::new();
    scratch.run(&["create", "disk.vhdx", "--size", "64M"]).expect(0);
    let mut file = std::fs::read(scratch.path().join("disk.vhdx")).expect("reads");
    file[3 << 20] = 4; // the first entry of the BAT: a state that there is not
    scratch.write("disk.vhdx", &file);
    let run = scratch.run(&["map", "disk.vhdx"]).expect(4);
    assert_eq!(run.out, "", "{}", run.err);
}

#[test]
fn a_map_without_parents_is_that_of_the_image_alone() {
    let scratch = Scratch::new();
    scratch.chain();
    let json = scratch.run(&["map", "child.vhdx", "--no-parents"]).expect(0).json();
    let extents = json.as_array().expect("an array");
    assert!(extents.iter().all(|extent| extent["depth"] == 0), "{extents:?}");
    assert!(extents.iter().any(|extent| extent["present"] == false), "{extents:?}");
}
