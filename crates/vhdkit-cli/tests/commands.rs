//! What each command does, on images that the testkit makes.
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
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::Stdio;

use common::{MIB, Run, Scratch, disk_bytes, dynamic, junk};
use serde_json::Value;
use vhdkit_testkit::builder::ImageBuilder;

const UUID: [&str; 3] = [
    "11111111-2222-3333-4444-555555555555",
    "21111111-2222-3333-4444-555555555555",
    "31111111-2222-3333-4444-555555555555",
];

#[test]
fn info_tells_what_an_image_is() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let text = scratch.run(&["info", "disk.vhdx"]).expect(0).silent().out;
    for part in [
        "dynamic",
        "8 MiB (8388608 bytes)",
        "vhdkit-testkit",
        "512 bytes logical, 4096 bytes physical",
        "clean",
        "BAT region",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = scratch.run(&["info", "disk.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!(json["format"], "vhdx");
    assert_eq!(json["type"], "dynamic");
    assert_eq!(json["disk_size"], 8 * MIB);
    assert_eq!(json["allocated_bytes"], 2 * MIB);
    assert_eq!(json["block_size"], MIB);
    assert_eq!(json["logical_sector_size"], 512);
    assert_eq!(json["log"]["state"], "clean");
    assert_eq!(json["chain"], Value::Array(Vec::new()));
    assert_eq!(json["chain_complete"], true);
    assert_eq!(json["regions"].as_array().unwrap().len(), 2);
    assert!(json["metadata"].as_array().unwrap().len() >= 5);
    assert!(json["header"]["sequence_number"].is_u64() && json["header"]["data_write_guid"].is_string());
}

#[test]
fn info_tells_what_replay_would_change() {
    let scratch = Scratch::new();
    scratch.dirty("dirty.vhdx");
    let text = scratch.run(&["info", "dirty.vhdx"]).expect(0).out;
    assert!(text.contains("dirty") && text.contains("Replay of the log"), "{text}");
    let json = scratch.run(&["info", "dirty.vhdx", "--json"]).expect(0).json();
    let replay = &json["log"]["replay"];
    assert!(replay["entries"].as_u64().unwrap() > 0 && replay["pages"].as_u64().unwrap() > 0, "{json}");
    assert!(replay["touched"].as_array().unwrap().iter().any(|row| row["structure"] == "BAT region"), "{json}");
}

#[test]
fn info_shows_each_link_of_the_chain() {
    let scratch = Scratch::new();
    scratch.chain();
    let json = scratch.run(&["info", "child.vhdx", "--json"]).expect(0).json();
    assert_eq!((&json["chain_complete"], &json["chain"][0]["verdict"]), (&true.into(), &"ok".into()), "{json}");
    assert_eq!(json["chain"][0]["identified_by"], "parent_linkage");
    let json = scratch.run(&["info", "child.vhdx", "--json", "--no-parents"]).expect(0).json();
    assert_eq!((&json["chain_complete"], &json["chain"][0]["verdict"]), (&false.into(), &"not-opened".into()));

    std::fs::create_dir(scratch.join("away")).unwrap();
    std::fs::rename(scratch.join("base.vhdx"), scratch.join("away/renamed.vhdx")).unwrap();
    let run = scratch.run(&["info", "child.vhdx"]).expect(0);
    assert!(run.out.contains("verdict: parent-not-found") && run.out.contains("hint: "), "{}", run.out);
    scratch.run(&["read", "child.vhdx"]).expect(6);
    scratch.run(&["map", "child.vhdx"]).expect(6);
    scratch.run(&["check", "child.vhdx"]).expect(0);
    let json = scratch.run(&["info", "child.vhdx", "--json", "--parent", "away/renamed.vhdx"]).expect(0).json();
    assert_eq!(json["chain"][0]["verdict"], "ok", "{json}");

    scratch.image("other.vhdx");
    ImageBuilder::new(8 * MIB, MIB as u32)
        .both_headers(|header| header.data_write_guid = vhdkit_testkit::guid::Guid::seeded(99))
        .build()
        .write_to(&scratch.join("wrong.vhdx"))
        .unwrap();
    let json = scratch.run(&["info", "child.vhdx", "--json", "--parent", "wrong.vhdx"]).expect(0).json();
    assert_eq!(json["chain"][0]["verdict"], "parent-mismatch", "{json}");
    let run = scratch.run(&["read", "child.vhdx", "--parent", "wrong.vhdx"]).expect(6);
    assert!(run.err.contains("[V-152]"), "{}", run.err);
}

#[test]
fn a_broken_link_further_up_is_shown_in_its_place() {
    let scratch = Scratch::new();
    scratch.run(&["create", "a.vhdx", "--size", "16M"]).expect(0);
    scratch.run(&["create", "b.vhdx", "--parent", "a.vhdx"]).expect(0);
    scratch.run(&["create", "c.vhdx", "--parent", "b.vhdx"]).expect(0);
    let verdicts = |arguments: &[&str]| {
        let json = scratch.run(arguments).expect(0).json();
        let links = json["chain"].as_array().unwrap().clone();
        links.iter().map(|link| link["verdict"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(verdicts(&["info", "c.vhdx", "--json"]), ["ok", "ok"]);
    std::fs::remove_file(scratch.join("a.vhdx")).unwrap();
    assert_eq!(verdicts(&["info", "c.vhdx", "--json"]), ["ok", "parent-not-found"]);
    std::fs::write(scratch.join("a.vhdx"), b"not an image").unwrap();
    assert_eq!(verdicts(&["info", "c.vhdx", "--json"]), ["ok", "not-vhdx"]);
}

#[test]
fn dump_shows_both_copies_even_of_a_damaged_image() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let text = scratch.run(&["info", "--dump", "disk.vhdx"]).expect(0).out;
    for part in ["header copy 1", "header copy 2", "region table copy 1", "region table copy 2"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = scratch.run(&["info", "--dump", "--json", "disk.vhdx"]).expect(0).json();
    assert!(json["dump"].as_array().unwrap().len() > 5);
    dynamic()
        .patch(192 << 10, &[0; 64])
        .patch(256 << 10, &[0; 64])
        .build()
        .write_to(&scratch.join("bad.vhdx"))
        .unwrap();
    let run = scratch.run(&["info", "--dump", "bad.vhdx"]).expect(4);
    assert!(run.out.contains("header copy 2") && run.err.contains("[V-061]"), "{run:?}");
}

#[test]
fn create_makes_what_was_asked_for() {
    let scratch = Scratch::new();
    let json = scratch
        .run(&[
            "create",
            "disk.vhdx",
            "--size",
            "1.5G",
            "--block-size",
            "1M",
            "--logical-sector-size",
            "4096",
            "--physical-sector-size",
            "4096",
            "--log-size",
            "2M",
            "--preallocate",
            "falloc",
            "--block-state",
            "zero",
            "--disk-id",
            UUID[0],
            "--creator",
            "somebody",
            "--file-write-guid",
            UUID[1],
            "--data-write-guid",
            UUID[2],
            "--json",
        ])
        .expect(0)
        .silent()
        .json();
    let info = scratch.run(&["info", "disk.vhdx", "--json"]).expect(0).json();
    for (key, value) in [
        ("disk_size", Value::from(3_u64 << 29)),
        ("block_size", MIB.into()),
        ("logical_sector_size", 4096.into()),
        ("physical_sector_size", 4096.into()),
        ("type", "dynamic".into()),
        ("disk_id", UUID[0].into()),
    ] {
        assert_eq!((&json[key], &info[key]), (&value, &value), "{key}");
    }
    assert_eq!((&info["creator"], &info["log"]["length"]), (&"somebody".into(), &(2 * MIB).into()));
    assert_eq!(info["header"]["file_write_guid"], UUID[1]);
    assert_eq!(info["header"]["data_write_guid"], UUID[2]);
    let check = scratch.run(&["check", "--strict", "disk.vhdx", "--json"]).expect(0).json();
    assert_eq!(check["statistics"]["blocks"]["zero"], 1536, "{check}");
    let fixed = scratch.run(&["create", "fixed.vhdx", "--size", "8M", "--fixed", "--json"]).expect(0).json();
    assert_eq!(fixed["type"], "fixed");
    let check = scratch.run(&["check", "--strict", "fixed.vhdx", "--json"]).expect(0).json();
    assert_eq!(check["statistics"]["blocks"]["fully-present"], 4, "{check}");
}

#[test]
fn create_is_reproducible_when_all_identities_are_given() {
    let scratch = Scratch::new();
    for name in ["a.vhdx", "b.vhdx"] {
        let ids = ["--disk-id", UUID[0], "--file-write-guid", UUID[1], "--data-write-guid", UUID[2]];
        let arguments = ["create", name, "--size", "64G", "--quiet"].into_iter().chain(ids);
        let run = scratch.run(&arguments.collect::<Vec<_>>()).expect(0).silent();
        assert_eq!(run.out, "");
    }
    let sums = scratch.sums();
    assert_eq!(sums["a.vhdx"], sums["b.vhdx"]);
}

#[test]
fn create_names_the_next_valid_size() {
    let scratch = Scratch::new();
    let run = scratch.run(&["create", "a.vhdx", "--size", "1000"]).expect(2);
    assert!(run.err.contains("1024"), "{}", run.err);
    let layout = [
        ["--block-size", "3M"],
        ["--block-size", "512M"],
        ["--block-size", "8G"],
        ["--logical-sector-size", "1024"],
        ["--physical-sector-size", "1"],
        ["--log-size", "1000"],
        ["--log-size", "64G"],
        ["--size", "65T"],
    ];
    for option in layout {
        let mut arguments = vec!["create", "a.vhdx"];
        if option[0] != "--size" {
            arguments.extend(["--size", "1G"]);
        }
        arguments.extend(option);
        scratch.run(&arguments).expect(2);
    }
    assert!(scratch.names().is_empty());
}

#[test]
fn create_makes_children_that_find_their_parent() {
    let scratch = Scratch::new();
    let base = scratch.image("base.vhdx");
    std::fs::create_dir_all(scratch.join("children")).unwrap();
    scratch.run(&["create", "child.vhdx", "--parent", "base.vhdx"]).expect(0).silent();
    let run = scratch.run(&["create", "children/far.vhdx", "--parent", "base.vhdx"]).expect(0);
    assert!(run.err.contains("warning") && run.err.contains("--parent-dir"), "{}", run.err);
    assert_eq!(scratch.run(&["read", "child.vhdx"]).expect(0).stdout, disk_bytes(&base));
    scratch.run(&["read", "children/far.vhdx"]).expect(6);
    assert_eq!(scratch.run(&["read", "children/far.vhdx", "--parent-dir", "."]).expect(0).stdout, disk_bytes(&base));
    // The nearest first: the parent of the new image, then that one's own renamed parent.
    std::fs::rename(scratch.join("base.vhdx"), scratch.join("old.vhdx")).unwrap();
    scratch.run(&["create", "grandchild.vhdx", "--parent", "child.vhdx"]).expect(6);
    scratch.run(&["create", "grandchild.vhdx", "--parent", "child.vhdx", "--parent", "old.vhdx"]).expect(0);
    let run = scratch.run(&["read", "grandchild.vhdx", "--parent", "child.vhdx", "--parent", "old.vhdx"]);
    assert_eq!(run.expect(0).stdout, disk_bytes(&base));
}

#[test]
fn convert_there_and_back() {
    let scratch = Scratch::new();
    let built = scratch.image("disk.vhdx");
    let bytes = disk_bytes(&built);
    let run = scratch.run(&["convert", "disk.vhdx", "disk.raw", "--json", "--verify"]).expect(0).silent();
    assert_eq!(std::fs::read(scratch.join("disk.raw")).unwrap(), bytes);
    assert!(scratch.join("disk.raw").metadata().unwrap().blocks() * 512 <= 3 * MIB, "the zeros are no holes");
    assert_eq!((&run.json()["target_size"], &run.json()["verified"]), (&(8 * MIB).into(), &true.into()));
    scratch.run(&["convert", "disk.raw", "again.vhdx", "--block-size", "1M", "--no-sync"]).expect(0).silent();
    scratch.run(&["compare", "disk.vhdx", "again.vhdx"]).expect(0);
    let check = scratch.run(&["check", "--strict", "again.vhdx", "--json"]).expect(0).json();
    assert_eq!(check["statistics"]["blocks"]["fully-present"], 2, "{check}");
    scratch.run(&["convert", "again.vhdx", "fixed.vhdx", "--fixed", "--verify"]).expect(0);
    assert_eq!(scratch.run(&["info", "fixed.vhdx", "--json"]).json()["type"], "fixed");
    assert_eq!(scratch.run(&["read", "fixed.vhdx"]).expect(0).stdout, bytes);
    scratch.write("dense.raw", &bytes);
    scratch.run(&["convert", "dense.raw", "scan.vhdx", "--no-zero-scan", "--block-size", "1M"]).expect(0);
    let check = scratch.run(&["check", "scan.vhdx", "--json"]).expect(0).json();
    assert_eq!(check["statistics"]["blocks"]["fully-present"], 8, "{check}");
}

#[test]
fn convert_flattens_a_chain() {
    let scratch = Scratch::new();
    let child = scratch.chain();
    scratch.run(&["convert", "child.vhdx", "whole.vhdx", "--verify"]).expect(0);
    assert_eq!(scratch.run(&["read", "whole.vhdx"]).expect(0).stdout, disk_bytes(&child));
    assert_eq!(scratch.run(&["info", "whole.vhdx", "--json"]).json()["type"], "dynamic");
    let run = scratch.run(&["convert", "child.vhdx", "half.raw", "--no-parents"]).expect(6);
    assert!(run.err.contains("--no-parents") || run.err.contains("parent"), "{}", run.err);
    assert!(!scratch.names().contains(&"half.raw".to_owned()));
}

fn convert_stdin(scratch: &Scratch, arguments: &[&str], bytes: &[u8]) -> Run {
    let mut command = scratch.command(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(bytes); // refused early when the size is wrong
    drop(stdin);
    Run::new(child.wait_with_output().unwrap())
}

#[test]
fn convert_reads_standard_input_and_writes_standard_output() {
    let scratch = Scratch::new();
    let mut bytes = vec![0; 5 << 20];
    bytes[(3 << 20)..(3 << 20) + 70_000].copy_from_slice(&junk(70_000));
    let size = bytes.len().to_string();
    convert_stdin(&scratch, &["convert", "-", "unknown.vhdx", "--block-size", "1M"], &bytes).expect(0).silent();
    convert_stdin(&scratch, &["convert", "-", "known.vhdx", "--size", &size], &bytes).expect(0).silent();
    convert_stdin(&scratch, &["convert", "-", "copy.raw"], &bytes).expect(0).silent();
    assert_eq!(std::fs::read(scratch.join("copy.raw")).unwrap(), bytes);
    for name in ["unknown.vhdx", "known.vhdx"] {
        scratch.run(&["check", "--strict", name]).expect(0);
        assert_eq!(scratch.run(&["convert", name, "-"]).expect(0).stdout, bytes, "{name}");
    }
    assert_eq!(scratch.names(), ["copy.raw", "known.vhdx", "unknown.vhdx"]);
    let run = convert_stdin(&scratch, &["convert", "-", "short.vhdx", "--size", "6M"], &bytes);
    assert!(run.code != Some(0) && !scratch.join("short.vhdx").exists(), "{run:?}");
    assert!(run.err.contains("hint: "), "{run:?}");
    let run = convert_stdin(&scratch, &["convert", "-", "odd.vhdx"], &bytes[..(4 << 20) + 100]).expect(0);
    assert!(run.err.contains("padded with 412 bytes"), "{}", run.err);
}

#[test]
fn what_is_raw_by_its_name_stays_raw() {
    let scratch = Scratch::new();
    let built = scratch.image("inner.vhdx");
    let file = std::fs::read(scratch.join("inner.vhdx")).unwrap();
    for name in ["guest.raw", "guest.img", "guest.bin", "GUEST.IMG"] {
        scratch.write(name, &file);
        let run = scratch.run(&["convert", name, "out.vhdx", "--force"]).expect(0);
        assert!(run.err.contains("looks like a VHDX") && run.err.contains("--from vhdx"), "{}", run.err);
        assert_eq!(scratch.run(&["read", "out.vhdx"]).expect(0).stdout, file, "{name}");
        scratch.run(&["convert", name, "out.vhdx", "--force", "--from", "vhdx"]).expect(0).silent();
        assert_eq!(scratch.run(&["read", "out.vhdx"]).expect(0).stdout, disk_bytes(&built), "{name}");
        let run = scratch.run(&["info", name]).expect(3);
        assert!(run.err.contains("--from vhdx"), "{}", run.err);
        scratch.run(&["info", name, "--from", "vhdx"]).expect(0);
        scratch.run(&["check", name]).expect(3);
        scratch.run(&["check", name, "--from", "vhdx"]).expect(0);
        let run = scratch.run(&["compare", name, "inner.vhdx"]).expect(1);
        assert!(run.err.contains("--from-a vhdx"), "{}", run.err);
        scratch.run(&["compare", name, "inner.vhdx", "--from-a", "vhdx"]).expect(0).silent();
        let run = scratch.run(&["convert", name, "out.vhdx", "--force", "--quiet"]).expect(0).silent();
        assert_eq!(run.out, "");
    }
    // An image under any other name is known by what it holds, and what nobody knows is a raw disk.
    std::fs::copy(scratch.join("inner.vhdx"), scratch.join("snapshot")).unwrap();
    scratch.run(&["compare", "snapshot", "inner.vhdx"]).expect(0).silent();
    scratch.write("boot.iso", &junk(4096));
    scratch.run(&["convert", "boot.iso", "boot.vhdx"]).expect(0);
    assert_eq!(scratch.run(&["read", "boot.vhdx"]).expect(0).stdout, junk(4096));
    scratch.write("other.disk", b"QFI\xfb\0\0\0\x03");
    let run = scratch.run(&["convert", "other.disk", "other.vhdx"]).expect(3);
    assert!(run.err.contains("QCOW2"), "{}", run.err);
}

#[test]
fn a_raw_source_is_padded_to_the_sector_and_says_so() {
    let scratch = Scratch::new();
    scratch.write("odd.raw", &junk(1000));
    let run = scratch.run(&["convert", "odd.raw", "odd.vhdx"]).expect(0);
    assert!(run.err.contains("padded with 24 bytes"), "{}", run.err);
    let read = scratch.run(&["read", "odd.vhdx"]).expect(0).stdout;
    assert_eq!((&read[..1000], &read[1000..]), (junk(1000).as_slice(), [0; 24].as_slice()));
    let run = scratch.run(&["convert", "odd.raw", "large.vhdx", "--logical-sector-size", "4096"]).expect(0);
    assert!(run.err.contains("padded with 3096 bytes"), "{}", run.err);
    scratch.run(&["convert", "odd.raw", "larger.vhdx", "--size", "1M"]).expect(0);
    assert_eq!(scratch.run(&["info", "larger.vhdx", "--json"]).json()["disk_size"], MIB);
    let run = scratch.run(&["convert", "larger.vhdx", "smaller.vhdx", "--size", "4K"]).expect(6);
    assert!(run.err.starts_with("vhdkit: smaller.vhdx: "), "{}", run.err);
    let run = scratch.run(&["convert", "odd.raw", "smaller.vhdx", "--block-size", "3M", "--quiet"]).expect(2);
    assert!(run.err.starts_with("vhdkit: smaller.vhdx: "), "{}", run.err);
}

#[test]
fn compare_finds_the_first_difference() {
    let scratch = Scratch::new();
    let built = scratch.image("a.vhdx");
    let mut bytes = disk_bytes(&built);
    scratch.write("same.raw", &bytes);
    bytes.resize(9 << 20, 0);
    scratch.write("longer.raw", &bytes);
    bytes[5_000_000] ^= 1;
    scratch.write("different.raw", &bytes);
    scratch.run(&["compare", "a.vhdx", "same.raw"]).expect(0).silent();
    let json = scratch.run(&["compare", "a.vhdx", "longer.raw", "--json"]).expect(0).silent().json();
    assert_eq!((&json["equal"], &json["size_b"]), (&true.into(), &(9 * MIB).into()));
    let run = scratch.run(&["compare", "different.raw", "a.vhdx"]).expect(1).silent();
    assert!(run.out.contains("5000000"), "{}", run.out);
    let json = scratch.run(&["compare", "a.vhdx", "different.raw", "--json"]).expect(1).silent().json();
    assert_eq!((&json["equal"], &json["first_difference"]), (&false.into(), &5_000_000.into()));
    assert_eq!(scratch.run(&["compare", "a.vhdx", "different.raw", "--quiet"]).expect(1).silent().out, "");
}

#[test]
fn read_gives_the_bytes_that_were_asked_for() {
    let scratch = Scratch::new();
    let bytes = disk_bytes(&scratch.image("disk.vhdx"));
    assert_eq!(scratch.run(&["read", "disk.vhdx"]).expect(0).silent().stdout, bytes);
    for (offset, length) in [("0", "0"), ("0x100001", "3"), ("1M", "1.5M"), ("8M", "0"), ("8388607", "1")] {
        let run = scratch.run(&["read", "disk.vhdx", "--offset", offset, "--length", length]).expect(0).silent();
        let number = |text: &str| match text {
            "0x100001" => (1 << 20) + 1,
            "1M" => 1 << 20,
            "1.5M" => 3 << 19,
            "8M" => 8 << 20,
            other => other.parse().unwrap(),
        };
        let (offset, length): (usize, usize) = (number(offset), number(length));
        assert_eq!(run.stdout, bytes[offset..offset + length], "{offset} {length}");
    }
    let rest = scratch.run(&["read", "disk.vhdx", "--offset", "5000000"]).expect(0).stdout;
    assert_eq!(rest, bytes[5_000_000..]);
    for (offset, length) in [("8388609", "0"), ("0", "8388609"), ("0xffffffffffffffff", "2"), ("9M", "1")] {
        let run = scratch.run(&["read", "disk.vhdx", "--offset", offset, "--length", length]).expect(2);
        assert!(run.stdout.is_empty() && run.err.contains("8388608 bytes"), "{}", run.err);
    }
}

#[test]
fn read_leaves_holes_in_a_file_and_appends_where_it_is_told_to() {
    let scratch = Scratch::new();
    let bytes = disk_bytes(&scratch.image("disk.vhdx"));
    let file = File::create(scratch.join("sparse")).unwrap();
    assert!(scratch.command(&["read", "disk.vhdx"]).stdout(file).status().unwrap().success());
    assert_eq!(std::fs::read(scratch.join("sparse")).unwrap(), bytes);
    assert!(scratch.join("sparse").metadata().unwrap().blocks() * 512 <= 3 * MIB);
    for append in [true, false] {
        // A longer file with other bytes: zeros must overwrite, and appending must not.
        scratch.write("used", &vec![7; 9 << 20]);
        let file = File::options().append(append).write(true).open(scratch.join("used")).unwrap();
        assert!(scratch.command(&["read", "disk.vhdx"]).stdout(file).status().unwrap().success());
        let mut used = Vec::new();
        File::open(scratch.join("used")).unwrap().read_to_end(&mut used).unwrap();
        if append {
            assert_eq!((used.len(), &used[9 << 20..]), (17 << 20, bytes.as_slice()));
        } else {
            assert_eq!((used.len(), &used[..8 << 20], used[8 << 20]), (9 << 20, bytes.as_slice(), 7));
        }
    }
}

#[test]
fn map_has_the_shape_of_qemu_img_and_covers_the_disk() {
    let scratch = Scratch::new();
    let child = scratch.chain();
    let bytes = disk_bytes(&child);
    for image in ["base.vhdx", "child.vhdx"] {
        let json = scratch.run(&["map", image]).expect(0).silent().json();
        let extents = json.as_array().unwrap();
        let mut position = 0;
        for extent in extents {
            assert_eq!(extent["start"].as_u64().unwrap(), position);
            let length = extent["length"].as_u64().unwrap();
            let (data, layer) = (extent["data"].as_bool().unwrap(), extent["layer"].as_str().unwrap());
            assert_ne!(extent["zero"], extent["data"]);
            assert_eq!(extent["compressed"], false);
            if data {
                let offset = extent["offset"].as_u64().unwrap() as usize;
                let file = std::fs::read(scratch.join(layer)).unwrap();
                let (start, length) = (position as usize, length as usize);
                if image == "child.vhdx" {
                    assert_eq!(file[offset..offset + length], bytes[start..start + length], "{extent}");
                }
                assert_eq!(extent["depth"], u64::from(layer == "base.vhdx" && image == "child.vhdx"));
                assert_eq!(extent["present"], true);
            } else {
                assert!(extent.get("offset").is_none(), "{extent}");
            }
            position += length;
        }
        assert_eq!(position, 8 * MIB);
        assert_eq!(
            extents.iter().filter(|extent| extent["data"] == true).count(),
            if image == "base.vhdx" { 2 } else { 3 }
        );
    }
}

#[test]
fn map_draws_an_svg_picture() {
    let scratch = Scratch::new();
    scratch.chain();
    let name = "a<b>&\u{1b}.vhdx";
    std::fs::rename(scratch.join("child.vhdx"), scratch.join(name)).unwrap();
    let run = scratch.run(&["map", name, "--svg", "map.svg"]).expect(0).silent();
    assert_eq!(run.out, "");
    let svg = std::fs::read_to_string(scratch.join("map.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("a&lt;b&gt;&amp;\\u{1b}.vhdx") && !svg.contains('\u{1b}'), "{svg}");
    assert!(svg.contains("base.vhdx") && svg.contains("data: 2 MiB"), "{svg}");
}

#[test]
fn map_of_a_raw_disk() {
    let scratch = Scratch::new();
    scratch.write("disk.raw", &junk(1 << 20));
    let json = scratch.run(&["map", "disk.raw"]).expect(0).json();
    assert_eq!((&json[0]["length"], &json[0]["offset"]), (&MIB.into(), &0.into()));
}

#[test]
fn measure_tells_what_convert_makes() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    for layout in [["--block-size", "1M"].as_slice(), &["--fixed"], &[]] {
        let mut words = vec!["measure", "disk.vhdx", "--json"];
        words.extend(layout);
        let json = scratch.run(&words).expect(0).silent().json();
        let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["required", "fully-allocated"]);
        let mut words = vec!["convert", "disk.vhdx", "out.vhdx", "--force"];
        words.extend(layout);
        scratch.run(&words).expect(0);
        assert_eq!(
            scratch.join("out.vhdx").metadata().unwrap().len(),
            json["required"].as_u64().unwrap(),
            "{layout:?}"
        );
    }
    let text = scratch.run(&["measure", "--size", "64T", "--block-size", "1M"]).expect(0).out;
    assert!(text.contains("required size:") && text.contains("fully allocated size: 64 TiB"), "{text}");
    scratch.run(&["measure", "--size", "1000"]).expect(2);
}

#[test]
fn a_dirty_image_is_read_as_it_was_meant_to_be_and_says_so() {
    let scratch = Scratch::new();
    let built = scratch.dirty("dirty.vhdx");
    let run = scratch.run(&["read", "dirty.vhdx"]).expect(0);
    assert_eq!(run.stdout, disk_bytes(&built));
    assert!(run.err.contains("warning") && run.err.contains("[V-031]"), "{}", run.err);
    scratch.run(&["read", "dirty.vhdx", "--quiet"]).expect(0).silent();
}

#[test]
fn an_image_in_use_is_refused_unless_sharing_is_forced() {
    use vhdkit::storage::{FileAccess, FileStorage, Sharing};
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let writer = FileStorage::open(&scratch.join("disk.vhdx"), FileAccess::Write, Sharing::Normal).unwrap();
    let image = scratch.join("disk.vhdx");
    let image = image.to_str().unwrap();
    for arguments in [["info", image].as_slice(), &["check", image], &["read", image], &["map", image]] {
        let run = scratch.run(arguments).expect(6);
        assert!(run.err.contains("hint: ") && run.err.contains("--force-share"), "{}", run.err);
        let mut shared = arguments.to_vec();
        shared.push("--force-share");
        scratch.run(&shared).expect(0);
    }
    scratch.run(&["create", "disk.vhdx", "--size", "1G", "--force"]).expect(6);
    drop(writer);
    scratch.run(&["info", image]).expect(0);
}
