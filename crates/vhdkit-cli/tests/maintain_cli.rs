//! `resize`, `compact`, `merge`, `reparent` and `set` as users type them: what they say, refuse, and leave alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use common::{MIB, Run, Scratch, disk_bytes};
use serde_json::{Value, json};

const ITEM: &str = "9a1c5b1e-0000-4000-8000-0123456789ab";
const ID: &str = "01234567-89ab-cdef-0123-456789abcdef";

/// The names of what a run says in JSON.
#[track_caller]
fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn size(scratch: &Scratch, image: &str) -> u64 {
    scratch.run(&["info", "--json", "--no-parents", image]).expect(0).json()["disk_size"].as_u64().unwrap()
}

fn disk(scratch: &Scratch, image: &str) -> Vec<u8> {
    scratch.run(&["read", image]).expect(0).stdout
}

/// A run that is refused: exit code 6, a hint, and no file changed.
#[track_caller]
fn refused(scratch: &Scratch, arguments: &[&str], word: &str) -> Run {
    let before = scratch.sums();
    let run = scratch.run(arguments).expect(6);
    assert_eq!(scratch.sums(), before, "{arguments:?}");
    // Where children are in the way, a dry run says what would happen all the same.
    let plan = if arguments.contains(&"--dry-run") && word.ends_with(".vhdx") { "would" } else { "" };
    assert!(run.out.contains(plan) && run.out.is_empty() == plan.is_empty(), "{arguments:?}: {}", run.out);
    assert!(run.err.contains(word) && run.err.contains("\n  hint: "), "{arguments:?}: {}", run.err);
    let error = scratch.run(&[arguments, &["--json"]].concat()).expect(6).json_error();
    assert_eq!(error["exit_code"], 6, "{arguments:?}");
    run
}

/// A dry run says what would happen and changes no file, not even when it is quiet or JSON.
#[track_caller]
fn dry(scratch: &Scratch, arguments: &[&str], word: &str) {
    let (names, sums) = (scratch.names(), scratch.sums());
    let dry = [arguments, &["--dry-run"]].concat();
    let run = scratch.run(&dry).expect(0);
    assert!(run.out.contains("nothing was") && run.out.contains(word), "{arguments:?}: {}", run.out);
    assert_eq!(scratch.run(&[&dry[..], &["--json"]].concat()).expect(0).json()["dry_run"], true);
    assert_eq!(scratch.run(&[&dry[..], &["--quiet"]].concat()).expect(0).out, "");
    assert_eq!((scratch.names(), scratch.sums()), (names, sums), "{arguments:?}");
}

/// A disk with an MBR whose only partition has the second and third MiB.
fn partitioned(scratch: &Scratch, name: &str) {
    let mut sector = [0; 512];
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 12].copy_from_slice(&2048_u32.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&4096_u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    scratch.run(&["create", "-q", name, "--size", "20M", "--block-size", "1M"]).expect(0);
    assert_eq!(scratch.pipe(&["write", "-q", name, "--offset", "0"], &sector).code, Some(0));
}

#[test]
fn a_size_is_absolute_or_by_how_much() {
    let scratch = Scratch::new();
    scratch.run(&["create", "d.vhdx", "--size", "20G"]).expect(0);
    for (spelling, gib) in [("-5G", 15), ("+5G", 20), ("30G", 30), ("-0.5T", 0), ("+1T", 1054), ("64T", 65_536)] {
        if gib == 0 {
            // More than there is.
            let run = scratch.run(&["resize", "d.vhdx", spelling]).expect(2);
            assert!(run.err.contains("d.vhdx") && run.err.contains("hint: "), "{}", run.err);
            continue;
        }
        dry(&scratch, &["resize", "d.vhdx", spelling], "would become");
        let run = scratch.run(&["resize", "d.vhdx", spelling]).expect(0).silent();
        assert!(run.out.contains("became") && run.out.contains("d.vhdx"), "{}", run.out);
        assert_eq!(size(&scratch, "d.vhdx"), gib << 30, "{spelling}");
        scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
    }
    // Options may stand anywhere beside it.
    for spelling in [["resize", "d.vhdx", "-q", "-1T", "--dry-run"], ["resize", "--dry-run", "-q", "d.vhdx", "-1T"]] {
        assert_eq!(scratch.run(&spelling).expect(0).silent().out, "");
    }
    let run = scratch.run(&["resize", "d.vhdx", "-x"]).expect(2);
    assert!(run.err.contains("-x"), "{}", run.err);
    for wrong in ["65T", "+1", "0", "-64T"] {
        let before = scratch.sums();
        let run = scratch.run(&["resize", "d.vhdx", wrong]).expect(2);
        assert!(run.err.contains("d.vhdx"), "{}", run.err);
        assert_eq!(scratch.sums(), before);
    }
    // The size that it has.
    let before = scratch.sums();
    let run = scratch.run(&["resize", "d.vhdx", "64T"]).expect(0).silent();
    assert!(run.out.contains("already; nothing was changed"), "{}", run.out);
    assert_eq!(scratch.sums(), before);
}

#[test]
fn data_is_cut_off_only_on_request() {
    let scratch = Scratch::new();
    let built = scratch.image("d.vhdx");
    let all = disk_bytes(&built);
    // The last data lies in the fifth MiB.
    refused(&scratch, &["resize", "d.vhdx", "4M"], "0x400000");
    refused(&scratch, &["resize", "d.vhdx", "-4M"], "0x400000");
    refused(&scratch, &["resize", "d.vhdx", "4M", "--dry-run"], "0x400000");
    refused(&scratch, &["resize", "d.vhdx", "--minimum"], "not known");
    scratch.run(&["resize", "d.vhdx", "5M"]).expect(0);
    assert_eq!(disk(&scratch, "d.vhdx"), all[..5 << 20]);
    dry(&scratch, &["resize", "d.vhdx", "4M", "--allow-data-loss"], "data would be cut off, from 0x400000 on");
    let run = scratch.run(&["resize", "d.vhdx", "4M", "--allow-data-loss"]).expect(0).silent();
    assert!(run.out.contains("data was cut off, from 0x400000 on"), "{}", run.out);
    assert_eq!(disk(&scratch, "d.vhdx"), all[..4 << 20]);
    // What was cut off does not come back.
    let run = scratch.run(&["resize", "d.vhdx", "8M", "--quiet"]).expect(0).silent();
    assert_eq!(run.out, "");
    let mut rest = all[..4 << 20].to_vec();
    rest.resize(8 << 20, 0);
    assert_eq!(disk(&scratch, "d.vhdx"), rest);
    scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
}

#[test]
fn cut_in_the_middle_of_a_block() {
    let scratch = Scratch::new();
    let all = disk_bytes(&scratch.image("d.vhdx"));
    let middle = (4 << 20) + 4096 * 3;
    scratch.run(&["resize", "d.vhdx", &middle.to_string(), "--allow-data-loss"]).expect(0);
    assert_eq!(disk(&scratch, "d.vhdx"), all[..middle]);
    scratch.run(&["resize", "d.vhdx", "+3M"]).expect(0);
    let mut expected = all[..middle].to_vec();
    expected.resize(middle + (3 << 20), 0);
    assert!(disk(&scratch, "d.vhdx") == expected, "what was cut off in a block came back");
}

#[test]
fn the_minimum_is_where_the_last_partition_ends() {
    let scratch = Scratch::new();
    partitioned(&scratch, "d.vhdx");
    let run = refused(&scratch, &["resize", "d.vhdx", "2M"], "partition");
    assert!(run.err.contains("3145728"), "{}", run.err);
    dry(&scratch, &["resize", "d.vhdx", "--minimum"], "would become");
    let said = scratch.run(&["resize", "d.vhdx", "--minimum", "--json"]).expect(0).silent().json();
    assert_eq!((&said["old_size"], &said["new_size"]), (&json!(20 * MIB), &json!(3 * MIB)));
    assert_eq!(size(&scratch, "d.vhdx"), 3 * MIB);
    // It cannot be smaller.
    let run = scratch.run(&["resize", "d.vhdx", "--minimum"]).expect(0).silent();
    assert!(run.out.contains("nothing was changed"), "{}", run.out);
}

#[test]
fn what_resize_says_in_json() {
    let scratch = Scratch::new();
    scratch.image("d.vhdx");
    let said = scratch.run(&["resize", "d.vhdx", "16M", "--json"]).expect(0).silent().json();
    let expected = "file dry_run old_size new_size old_file_size new_file_size bat_moves blocks first_data_cut cut_is_unused \
                    smallest_size backup_gpt replay";
    assert_eq!(keys(&said), expected.split_whitespace().collect::<Vec<_>>());
    assert_eq!((&said["file"], &said["dry_run"]), (&json!("d.vhdx"), &json!(false)));
    assert_eq!((&said["old_size"], &said["new_size"]), (&json!(8 * MIB), &json!(16 * MIB)));
    assert_eq!((&said["backup_gpt"], &said["replay"]), (&json!("none"), &Value::Null));
    assert_eq!(said["new_file_size"], scratch.join("d.vhdx").metadata().unwrap().len());
}

#[test]
fn compacting_drops_zeros_moves_the_rest_and_cuts() {
    let scratch = Scratch::new();
    let all = disk_bytes(&scratch.image("d.vhdx"));
    // The first block of the file gets zeros: the other one moves into its place.
    let zeros = scratch.write("zeros", &vec![0; MIB as usize]);
    let zeros = zeros.to_str().unwrap();
    scratch.run(&["write", "-q", "d.vhdx", "--offset", "1M", "--input", zeros]).expect(0);
    let mut expected = all;
    expected[MIB as usize..2 * MIB as usize].fill(0);
    assert_eq!(disk(&scratch, "d.vhdx"), expected);
    let before = scratch.join("d.vhdx").metadata().unwrap().len();
    dry(&scratch, &["compact", "d.vhdx"], "would have about");
    // Without reading there is nothing to find.
    let said = scratch.run(&["compact", "d.vhdx", "--no-zero-scan", "--no-filesystems", "--dry-run", "--json"]);
    let said = said.expect(0).silent().json();
    assert_eq!((&said["zero_blocks"], &said["bytes_read"]), (&json!(0), &json!(0)));
    let said = scratch.run(&["compact", "d.vhdx", "--json"]).expect(0).silent().json();
    let names = "file dry_run old_file_size new_file_size old_disk_usage new_disk_usage block_size blocks zero_blocks \
                 free_blocks unneeded_blocks bitmaps moved regions_moved bytes_read remarks replay";
    assert_eq!(keys(&said), names.split_whitespace().collect::<Vec<_>>());
    assert_eq!((&said["zero_blocks"], &said["blocks"], &said["free_blocks"]), (&json!(1), &json!(2), &json!(0)));
    let after = scratch.join("d.vhdx").metadata().unwrap().len();
    assert_eq!((said["old_file_size"].as_u64(), said["new_file_size"].as_u64()), (Some(before), Some(after)));
    assert!(after < before, "{before} became {after}");
    assert_eq!(disk(&scratch, "d.vhdx"), expected);
    scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
    // Nothing more to gain: no write at all.
    let sums = scratch.sums();
    let run = scratch.run(&["compact", "d.vhdx"]).expect(0).silent();
    assert!(run.out.contains("cannot be made smaller"), "{}", run.out);
    assert_eq!(scratch.run(&["compact", "d.vhdx", "--quiet"]).expect(0).silent().out, "");
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn compacting_says_what_was_gained() {
    let scratch = Scratch::new();
    scratch.image("d.vhdx");
    let zeros = scratch.write("zeros", &vec![0; MIB as usize]);
    scratch.run(&["write", "-q", "d.vhdx", "--offset", "4M", "--input", zeros.to_str().unwrap()]).expect(0);
    let planned = scratch.run(&["compact", "d.vhdx", "--dry-run"]).expect(0).silent().out;
    assert!(planned.contains(" less; nothing was changed") && planned.contains("1 all zero"), "{planned}");
    let run = scratch.run(&["compact", "d.vhdx"]).expect(0).silent();
    assert!(run.out.contains(" has ") && run.out.contains(" now, ") && run.out.contains(" less"), "{}", run.out);
    assert!(run.out.contains("on its file system: ") && run.out.contains("1 all zero"), "{}", run.out);
}

#[test]
fn dropping_zeros_and_moving_blocks_harms_no_child() {
    let scratch = Scratch::new();
    scratch.chain();
    let zeros = scratch.write("zeros", &vec![0; MIB as usize]);
    scratch.run(&["write", "-q", "child.vhdx", "--offset", "6M", "--input", zeros.to_str().unwrap()]).expect(0);
    let before = disk(&scratch, "child.vhdx");
    scratch.run(&["compact", "base.vhdx"]).expect(0);
    let said = scratch.run(&["compact", "child.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!(said["zero_blocks"], 1);
    assert_eq!(disk(&scratch, "child.vhdx"), before);
    for image in ["base.vhdx", "child.vhdx"] {
        scratch.run(&["check", "--strict", image]).expect(0);
    }
}

#[test]
fn what_breaks_children_is_refused() {
    let scratch = Scratch::new();
    scratch.chain();
    let commands: [&[&str]; 4] = [
        &["resize", "base.vhdx", "16M"],
        &["resize", "base.vhdx", "-2M"],
        &["set", "base.vhdx", "--disk-id", ID],
        &["set", "base.vhdx", "--physical-sector-size", "512"],
    ];
    for command in commands {
        for more in [&[][..], &["--dry-run"]] {
            refused(&scratch, &[command, more].concat(), "child.vhdx");
        }
    }
    // Elsewhere it is found when it is named.
    std::fs::create_dir(scratch.join("elsewhere")).unwrap();
    scratch.run(&["reparent", "child.vhdx", "base.vhdx"]).expect(0);
    std::fs::rename(scratch.join("child.vhdx"), scratch.join("elsewhere/child.vhdx")).unwrap();
    for command in commands {
        refused(&scratch, &[command, &["--child", "elsewhere/child.vhdx"]].concat(), "elsewhere/child.vhdx");
        let run = [command, &["--child", "elsewhere/child.vhdx", "--break-children", "--dry-run"]].concat();
        scratch.run(&run).expect(0);
    }
    // What no child sees is none of their business.
    std::fs::rename(scratch.join("elsewhere/child.vhdx"), scratch.join("child.vhdx")).unwrap();
    let item = format!("{ITEM}=note");
    scratch.write("note", b"hello");
    scratch.run(&["set", "base.vhdx", "--user-metadata", &item]).expect(0);
    scratch.run(&["resize", "base.vhdx", "8M"]).expect(0);
    disk(&scratch, "child.vhdx");
    // And it is done on request.
    scratch.run(&["resize", "base.vhdx", "16M", "--break-children"]).expect(0);
    assert_eq!(size(&scratch, "base.vhdx"), 16 * MIB);
    scratch.run(&["read", "child.vhdx"]).expect(6);
}

#[test]
fn a_child_goes_into_its_parent() {
    let scratch = Scratch::new();
    let expected = disk_bytes(&scratch.chain());
    let run = scratch.run(&["merge", "child.vhdx", "--dry-run"]).expect(0).silent();
    assert!(run.out.contains("child.vhdx would be merged into ") && run.out.contains("1 MiB of data"), "{}", run.out);
    dry(&scratch, &["merge", "child.vhdx"], "would be merged");
    dry(&scratch, &["merge", "child.vhdx", "--into", "base.vhdx", "--delete"], "would be merged");
    let said = scratch.run(&["merge", "child.vhdx", "--json"]).expect(0).silent().json();
    let names = "merged into dry_run data_bytes zero_bytes old_size new_size old_file_size new_file_size \
                 data_write_guid deleted";
    assert_eq!(keys(&said), names.split_whitespace().collect::<Vec<_>>());
    assert_eq!((&said["data_bytes"], &said["deleted"]), (&json!(MIB), &json!([])));
    assert!(said["data_write_guid"].is_string());
    // Both show the disk of the child; the merge can be done again.
    for image in ["base.vhdx", "child.vhdx"] {
        assert!(disk(&scratch, image) == expected, "{image}");
        scratch.run(&["check", "--strict", image]).expect(0);
    }
    let run = scratch.run(&["merge", "child.vhdx", "--delete"]).expect(0).silent();
    assert!(run.out.contains("what was merged was removed"), "{}", run.out);
    assert_eq!(scratch.names(), ["base.vhdx"]);
    assert!(disk(&scratch, "base.vhdx") == expected);
}

#[test]
fn what_a_link_leads_to_is_removed_with_it() {
    let scratch = Scratch::new();
    scratch.chain();
    let expected = disk(&scratch, "child.vhdx");
    std::os::unix::fs::symlink("child.vhdx", scratch.join("link.vhdx")).unwrap();
    scratch.run(&["merge", "link.vhdx", "--delete"]).expect(0);
    assert_eq!(scratch.names(), ["base.vhdx"]);
    assert!(disk(&scratch, "base.vhdx") == expected);
}

#[test]
fn many_levels_go_into_one() {
    let scratch = Scratch::new();
    scratch.chain();
    scratch.run(&["create", "-q", "leaf.vhdx", "--parent", "child.vhdx"]).expect(0);
    let bytes = common::junk(100_000);
    assert_eq!(scratch.pipe(&["write", "-q", "leaf.vhdx", "--offset", "5000000"], &bytes).code, Some(0));
    let expected = disk(&scratch, "leaf.vhdx");
    refused(&scratch, &["merge", "child.vhdx", "--delete"], "leaf.vhdx");
    scratch.run(&["merge", "leaf.vhdx", "--into", "leaf.vhdx"]).expect(2);
    scratch.image("other.vhdx");
    let run = scratch.run(&["merge", "leaf.vhdx", "--into", "other.vhdx"]).expect(2);
    assert!(run.err.contains("other.vhdx") && run.err.contains("hint: "), "{}", run.err);
    scratch.run(&["merge", "leaf.vhdx", "--into", "missing.vhdx"]).expect(5);
    let run = scratch.run(&["merge", "base.vhdx"]).expect(2);
    assert!(run.err.contains("not differencing"), "{}", run.err);
    let run = scratch.run(&["merge", "leaf.vhdx", "--into", "base.vhdx", "--delete", "--quiet"]).expect(0).silent();
    assert_eq!(run.out, "");
    assert_eq!(scratch.names(), ["base.vhdx", "other.vhdx"]);
    assert!(disk(&scratch, "base.vhdx") == expected);
}

#[test]
fn a_merge_that_breaks_siblings_is_refused() {
    let scratch = Scratch::new();
    scratch.chain();
    scratch.run(&["create", "-q", "sibling.vhdx", "--parent", "base.vhdx"]).expect(0);
    for command in [&["merge", "child.vhdx"][..], &["merge", "child.vhdx", "--dry-run"]] {
        refused(&scratch, command, "sibling.vhdx");
    }
    // One that lies elsewhere is found when it is named.
    std::fs::create_dir(scratch.join("elsewhere")).unwrap();
    std::fs::rename(scratch.join("sibling.vhdx"), scratch.join("elsewhere/sibling.vhdx")).unwrap();
    refused(&scratch, &["merge", "child.vhdx", "--child", "elsewhere/sibling.vhdx"], "elsewhere/sibling.vhdx");
    scratch.run(&["merge", "child.vhdx"]).expect(0);
}

#[test]
fn a_moved_parent_is_found_again() {
    let scratch = Scratch::new();
    let expected = disk_bytes(&scratch.chain());
    std::fs::create_dir(scratch.join("moved")).unwrap();
    std::fs::rename(scratch.join("base.vhdx"), scratch.join("moved/renamed.vhdx")).unwrap();
    scratch.run(&["read", "child.vhdx"]).expect(6);
    dry(&scratch, &["reparent", "child.vhdx", "moved/renamed.vhdx"], "would be moved/renamed.vhdx");
    let said = scratch.run(&["reparent", "child.vhdx", "moved/renamed.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!(keys(&said), ["child", "parent", "dry_run", "changes", "id_mismatch"]);
    assert_eq!((&said["id_mismatch"], &said["dry_run"]), (&json!(false), &json!(false)));
    assert!(disk(&scratch, "child.vhdx") == expected);
    scratch.run(&["check", "--strict", "child.vhdx"]).expect(0);
    let sums = scratch.sums();
    let run = scratch.run(&["reparent", "child.vhdx", "moved/renamed.vhdx"]).expect(0).silent();
    assert!(run.out.contains("already; nothing was changed"), "{}", run.out);
    assert_eq!(scratch.run(&["reparent", "child.vhdx", "moved/renamed.vhdx", "-q"]).expect(0).silent().out, "");
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn another_parent_is_refused_unless_it_is_wanted() {
    let scratch = Scratch::new();
    scratch.chain();
    assert_eq!(scratch.pipe(&["write", "-q", "base.vhdx", "--offset", "0"], b"x").code, Some(0));
    let run = refused(&scratch, &["reparent", "child.vhdx", "base.vhdx"], "--ignore-id-mismatch");
    assert!(run.err.contains("not the disk that the child was made on"), "{}", run.err);
    refused(&scratch, &["reparent", "child.vhdx", "base.vhdx", "--dry-run"], "--ignore-id-mismatch");
    let run = scratch.run(&["reparent", "child.vhdx", "base.vhdx", "--ignore-id-mismatch"]).expect(0);
    assert!(run.err.contains("warning: ") && run.out.contains("is base.vhdx now"), "{run:?}");
    assert_eq!(disk(&scratch, "child.vhdx")[0], b'x');
    // No image has itself for an ancestor, and a base has no parent.
    refused(&scratch, &["reparent", "child.vhdx", "child.vhdx", "--ignore-id-mismatch"], "its own ancestor");
    let run = scratch.run(&["reparent", "base.vhdx", "child.vhdx"]).expect(2);
    assert!(run.err.contains("not differencing"), "{}", run.err);
}

#[test]
fn another_parent_breaks_grandchildren() {
    let scratch = Scratch::new();
    scratch.chain();
    scratch.run(&["create", "-q", "leaf.vhdx", "--parent", "child.vhdx"]).expect(0);
    scratch.image("other.vhdx");
    assert_eq!(scratch.pipe(&["write", "-q", "other.vhdx", "--offset", "0"], b"x").code, Some(0));
    let command = ["reparent", "child.vhdx", "other.vhdx", "--ignore-id-mismatch"];
    refused(&scratch, &command, "leaf.vhdx");
    // A parent that is the same disk is no change for them.
    std::fs::rename(scratch.join("base.vhdx"), scratch.join("renamed.vhdx")).unwrap();
    scratch.run(&["reparent", "child.vhdx", "renamed.vhdx"]).expect(0);
    disk(&scratch, "leaf.vhdx");
    scratch.run(&[&command[..], &["--break-children"]].concat()).expect(0);
    scratch.run(&["read", "leaf.vhdx"]).expect(6);
}

#[test]
fn what_an_image_says_about_itself() {
    let scratch = Scratch::new();
    let expected = disk_bytes(&scratch.image("d.vhdx"));
    let note = common::junk(70_000);
    scratch.write("note", &note);
    let item = format!("{{{ITEM}}}=note");
    let command = ["set", "d.vhdx", "--disk-id", ID, "--physical-sector-size", "512", "--user-metadata", &item];
    dry(&scratch, &command, "would be changed");
    let said = scratch.run(&[&command[..], &["--json"]].concat()).expect(0).silent().json();
    assert_eq!(keys(&said), ["file", "dry_run", "changes", "new_data_write_guid", "metadata_moved", "replay"]);
    assert_eq!(said["changes"].as_array().unwrap().len(), 3);
    assert_eq!(said["new_data_write_guid"], true);
    let info = scratch.run(&["info", "d.vhdx", "--json"]).expect(0).silent().json();
    assert_eq!(info["physical_sector_size"], 512, "{info}");
    let info = scratch.run(&["info", "d.vhdx", "--verbose"]).expect(0).silent().out;
    assert!(info.contains(ID) && info.contains(ITEM), "{info}");
    assert_eq!(scratch.run(&["info", "d.vhdx", "--user-metadata", ITEM]).expect(0).silent().stdout, note);
    scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
    // The same again is no change.
    let sums = scratch.sums();
    let run = scratch.run(&command).expect(0).silent();
    assert!(run.out.contains("nothing was changed"), "{}", run.out);
    assert_eq!(scratch.sums(), sums);
    // Replaced, taken out, not there any more.
    scratch.write("note", b"");
    assert_eq!(scratch.run(&["set", "-q", "d.vhdx", "--user-metadata", &item]).expect(0).silent().out, "");
    assert_eq!(scratch.run(&["info", "d.vhdx", "--user-metadata", ITEM]).expect(0).silent().out, "");
    dry(&scratch, &["set", "d.vhdx", "--remove-user-metadata", ITEM], "taken out");
    scratch.run(&["set", "d.vhdx", "--remove-user-metadata", ITEM]).expect(0).silent();
    for command in
        [&["info", "d.vhdx", "--user-metadata", ITEM][..], &["set", "d.vhdx", "--remove-user-metadata", ITEM]]
    {
        let run = scratch.run(command).expect(2);
        assert!(run.err.contains(ITEM) && run.err.contains("hint: "), "{}", run.err);
    }
    assert!(disk(&scratch, "d.vhdx") == expected);
    scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
}

#[test]
fn what_cannot_be_set() {
    let scratch = Scratch::new();
    scratch.image("d.vhdx");
    scratch.run(&["create", "-q", "4k.vhdx", "--size", "8M", "--logical-sector-size", "4096"]).expect(0);
    scratch.write("large", &vec![1; MIB as usize + 1]);
    let item = |file: &str| format!("{ITEM}={file}");
    for (arguments, code) in [
        (&["d.vhdx", "--physical-sector-size", "1024"][..], 2),
        (&["d.vhdx", "--user-metadata", &item("missing")], 5),
        (&["d.vhdx", "--user-metadata", &item("large")], 3),
        (&["d.vhdx", "--user-metadata", &item("d.vhdx"), "--remove-user-metadata", ITEM], 3),
        (&["4k.vhdx", "--physical-sector-size", "512"], 6),
    ] {
        let before = scratch.sums();
        let run = scratch.run(&[&["set"], arguments].concat()).expect(code);
        assert!(run.err.starts_with("vhdkit: ") && run.err.contains("hint: "), "{arguments:?}: {}", run.err);
        assert_eq!(scratch.sums(), before, "{arguments:?}");
    }
}

#[test]
fn an_image_that_was_not_closed_is_refused_until_it_may_be_replayed() {
    let commands: [&[&str]; 4] = [
        &["resize", "d.vhdx", "16M"],
        &["resize", "d.vhdx", "--minimum"],
        &["compact", "d.vhdx"],
        &["set", "d.vhdx", "--disk-id", ID],
    ];
    for command in commands {
        let scratch = Scratch::new();
        let built = scratch.dirty("d.vhdx");
        refused(&scratch, command, "--replay");
        if command.contains(&"--minimum") {
            continue;
        }
        let said = scratch.run(&[command, &["--replay", "--json"]].concat()).expect(0).json();
        assert!(said["replay"].is_object(), "{said}");
        assert!(disk(&scratch, "d.vhdx").starts_with(&disk_bytes(&built)), "{command:?}");
        scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
    }
}

/// A parent is looked for where a link to its child leads, so that is where the way to it begins.
#[test]
fn a_child_gets_its_parent_through_a_link() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.join("a")).unwrap();
    std::fs::create_dir(scratch.join("b")).unwrap();
    scratch.run(&["create", "a/base.vhdx", "--size", "16M"]).expect(0);
    scratch.run(&["create", "a/child.vhdx", "--parent", "a/base.vhdx"]).expect(0);
    std::fs::rename(scratch.join("a/base.vhdx"), scratch.join("a/moved.vhdx")).unwrap();
    std::os::unix::fs::symlink("../a/child.vhdx", scratch.join("b/link.vhdx")).unwrap();
    scratch.run(&["reparent", "b/link.vhdx", "a/moved.vhdx"]).expect(0);
    scratch.run(&["read", "a/child.vhdx", "--length", "512"]).expect(0);
}

#[test]
fn what_no_partition_holds_is_cut_and_named() {
    let scratch = Scratch::new();
    partitioned(&scratch, "d.vhdx");
    let at = (10 * MIB + 700).to_string();
    assert_eq!(scratch.pipe(&["write", "-q", "d.vhdx", "--offset", &at], b"stray").code, Some(0));
    let place = format!("{:#x}", 10 * MIB + 700);
    let run = scratch.run(&["resize", "d.vhdx", "--minimum", "--dry-run"]).expect(0);
    assert!(run.out.contains(&place) && run.out.contains("no partition"), "{}", run.out);
    let said = scratch.run(&["resize", "d.vhdx", "4M", "--json"]).expect(0).json();
    assert_eq!((&said["first_data_cut"], &said["cut_is_unused"]), (&json!(10 * MIB + 700), &json!(true)));
}

#[test]
fn a_table_that_cannot_be_followed_moves_no_backup() {
    let scratch = Scratch::new();
    // A protective record without the GPT that it protects.
    let mut sector = [0; 512];
    sector[446 + 4] = 0xee;
    sector[446 + 8..446 + 12].copy_from_slice(&1_u32.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&40_959_u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    scratch.run(&["create", "-q", "d.vhdx", "--size", "20M", "--block-size", "1M"]).expect(0);
    assert_eq!(scratch.pipe(&["write", "-q", "d.vhdx", "--offset", "0"], &sector).code, Some(0));
    for size in ["+8M", "-8M"] {
        refused(&scratch, &["resize", "d.vhdx", size, "--move-backup-gpt"], "cannot be");
    }
    // What is not understood may count on zeros.
    refused(&scratch, &["resize", "d.vhdx", "-8M"], "not known");
    let run = scratch.run(&["resize", "d.vhdx", "+8M"]).expect(0);
    assert!(run.err.contains("warning") && run.err.contains("backup"), "{}", run.err);
}

#[test]
fn a_file_system_that_is_not_in_order_is_not_cut() {
    let scratch = Scratch::new();
    scratch.run(&["create", "-q", "d.vhdx", "--size", "20M", "--block-size", "1M"]).expect(0);
    assert_eq!(scratch.pipe(&["write", "-q", "d.vhdx", "--offset", "65600"], b"_BHRfS_M").code, Some(0));
    refused(&scratch, &["resize", "d.vhdx", "-8M"], "btrfs");
    refused(&scratch, &["resize", "d.vhdx", "-8M", "--dry-run"], "btrfs");
    scratch.run(&["resize", "d.vhdx", "-8M", "--allow-data-loss"]).expect(0);
}

#[test]
fn names_of_the_format_are_no_users_items() {
    let scratch = Scratch::new();
    scratch.image("d.vhdx");
    scratch.write("note", b"hello");
    let sums = scratch.sums();
    let own = ["caa16737-fa36-4d43-b3b6-33f0aa44e76b", "a8d35f2d-b30b-454d-abf7-d3d84834ab0c"];
    for id in own {
        let run = scratch.run(&["set", "d.vhdx", "--user-metadata", &format!("{id}=note")]).expect(2);
        assert!(run.err.contains(id) && run.err.contains("hint: "), "{}", run.err);
    }
    scratch.run(&["set", "d.vhdx", "--disk-id", "00000000-0000-0000-0000-000000000000"]).expect(2);
    assert_eq!(scratch.sums(), sums);
}

#[test]
fn a_dry_run_ends_as_the_real_one_would() {
    let scratch = Scratch::new();
    scratch.dirty("d.vhdx");
    let commands: [&[&str]; 3] =
        [&["compact", "d.vhdx"], &["resize", "d.vhdx", "+5M"], &["set", "d.vhdx", "--disk-id", ID]];
    for command in commands {
        scratch.run(command).expect(6);
        let run = scratch.run(&[command, &["--dry-run"]].concat()).expect(6);
        assert!(run.out.contains("would") && run.err.contains("--replay"), "{}{}", run.out, run.err);
        scratch.run(&[command, &["--dry-run", "--replay"]].concat()).expect(0);
    }
    let said = scratch.run(&["compact", "d.vhdx", "--dry-run", "--replay", "--json"]).expect(0).json();
    assert_eq!(said["moved"], Value::Null);
}

/// Blocks that hold little take little at their new place.
#[test]
fn blocks_that_move_stay_sparse() {
    use std::os::unix::fs::MetadataExt as _;
    let scratch = Scratch::new();
    scratch.run(&["create", "-q", "d.vhdx", "--size", "512M", "--block-size", "32M"]).expect(0);
    for block in 0..16_u64 {
        let at = (block * 32 * MIB + 3 * MIB).to_string();
        scratch.pipe(&["write", "-q", "d.vhdx", "--offset", &at], &common::junk(65536)).expect(0);
    }
    scratch.run(&["zero", "-q", "d.vhdx", "--offset", "0", "--length", "256M"]).expect(0);
    let sum = scratch.run(&["read", "d.vhdx", "--offset", "256M"]).expect(0).stdout;
    let before = std::fs::metadata(scratch.join("d.vhdx")).unwrap().blocks() * 512;
    scratch.run(&["compact", "-q", "d.vhdx"]).expect(0);
    let after = std::fs::metadata(scratch.join("d.vhdx")).unwrap();
    assert!(after.len() < 300 * MIB, "{}", after.len());
    assert!(after.blocks() * 512 <= before + MIB, "{before} before, {} after", after.blocks() * 512);
    assert!(scratch.run(&["read", "d.vhdx", "--offset", "256M"]).expect(0).stdout == sum);
}

/// A disk that was made smaller needs less of a table than it has.
#[test]
fn a_table_that_is_too_long_shrinks_when_it_moves() {
    let scratch = Scratch::new();
    scratch.run(&["create", "-q", "d.vhdx", "--size", "32M", "--block-size", "1M"]).expect(0);
    scratch.pipe(&["write", "-q", "d.vhdx", "--offset", "0"], &common::junk(20 * MIB as usize)).expect(0);
    scratch.run(&["resize", "-q", "d.vhdx", "1T"]).expect(0);
    scratch.run(&["resize", "-q", "d.vhdx", "32M", "--allow-data-loss"]).expect(0);
    let expected = disk(&scratch, "d.vhdx");
    scratch.run(&["zero", "-q", "d.vhdx", "--offset", "2M", "--length", "4M"]).expect(0);
    scratch.run(&["compact", "-q", "d.vhdx", "--no-filesystems"]).expect(0);
    let length = std::fs::metadata(scratch.join("d.vhdx")).unwrap().len();
    assert!(length <= 21 * MIB, "{length}");
    scratch.run(&["check", "--strict", "d.vhdx"]).expect(0);
    let mut wanted = expected;
    wanted[2 * MIB as usize..6 * MIB as usize].fill(0);
    assert!(disk(&scratch, "d.vhdx") == wanted);
}

#[test]
fn a_merge_that_cannot_write_both_files_writes_none() {
    use vhdkit::storage::{FileAccess, FileStorage, Sharing};
    let scratch = Scratch::new();
    scratch.chain();
    for name in ["base.vhdx", "child.vhdx"] {
        let held = FileStorage::open(&scratch.join(name), FileAccess::Read, Sharing::Normal).unwrap();
        let sums = scratch.sums();
        let run = scratch.run(&["merge", "child.vhdx"]).expect(6);
        assert!(run.err.contains(name) && run.err.contains("has it open"), "{}", run.err);
        assert_eq!(scratch.sums(), sums);
        drop(held);
    }
    scratch.run(&["merge", "child.vhdx"]).expect(0);
}
