//! What every command has in common: help, usage errors, bad input, exit codes, JSON errors, and leaving files alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use common::{MIB, Scratch, dynamic, junk, make_fifo};

const ALL: [&str; 25] = [
    "info",
    "create",
    "convert",
    "check",
    "compare",
    "diff",
    "apply",
    "chain",
    "read",
    "write",
    "zero",
    "discard",
    "replay",
    "repair",
    "recover",
    "resize",
    "compact",
    "merge",
    "reparent",
    "set",
    "serve",
    "map",
    "measure",
    "completions",
    "man",
];

/// Every command that only reads an image, with the arguments that make it do so. `@` is the image.
const READERS: [(&str, &[&str]); 22] = [
    ("info", &["info", "@"]),
    ("info --dump", &["info", "--dump", "@"]),
    ("check", &["check", "@"]),
    ("repair", &["repair", "@"]),
    ("recover", &["recover", "@", "target.vhdx"]),
    ("read", &["read", "@"]),
    ("map", &["map", "@"]),
    ("map --svg", &["map", "@", "--svg", "picture.svg"]),
    ("measure", &["measure", "@"]),
    ("compare a", &["compare", "@", "good.vhdx"]),
    ("compare b", &["compare", "good.vhdx", "@"]),
    ("diff a", &["diff", "@", "good.vhdx"]),
    ("diff b", &["diff", "good.vhdx", "@", "--exact"]),
    ("diff --export", &["diff", "good.vhdx", "@", "--export", "target.increment"]),
    ("chain", &["chain", "@"]),
    ("convert to raw", &["convert", "@", "target.raw"]),
    ("convert to vhdx", &["convert", "@", "target.vhdx"]),
    ("create", &["create", "child.vhdx", "--parent", "@"]),
    ("serve", &["serve", "@", "--idle-exit", "1"]),
    ("resize --dry-run", &["resize", "@", "16M", "--dry-run"]),
    ("compact --dry-run", &["compact", "@", "--dry-run"]),
    ("set --dry-run", &["set", "@", "--physical-sector-size", "512", "--dry-run"]),
];

/// Every command that changes an image.
const WRITERS: [(&str, &[&str]); 14] = [
    ("write", &["write", "@", "--offset", "0"]),
    ("zero", &["zero", "@", "--offset", "0", "--length", "1M"]),
    ("discard", &["discard", "@", "--offset", "0", "--length", "1M"]),
    ("replay", &["replay", "@"]),
    ("apply", &["apply", "good.increment", "@"]),
    ("repair --apply", &["repair", "@", "--apply"]),
    ("resize", &["resize", "@", "+8M"]),
    ("resize --minimum", &["resize", "@", "--minimum"]),
    ("compact", &["compact", "@"]),
    ("merge", &["merge", "@"]),
    ("reparent a", &["reparent", "@", "good.vhdx"]),
    ("reparent b", &["reparent", "good.vhdx", "@"]),
    ("set", &["set", "@", "--physical-sector-size", "512"]),
    ("serve --write", &["serve", "@", "--write", "--idle-exit", "1"]),
];

/// The options of `serve`.
const SERVE: [&str; 15] = [
    "--write",
    "--replay",
    "--socket",
    "--listen",
    "--name",
    "--layers",
    "--tls-cert",
    "--tls-key",
    "--tls-client-ca",
    "--tls-optional",
    "--max-connections",
    "--idle-exit",
    "--insecure",
    "--poll",
    "--from",
];

/// Runs each reader on an image in a directory of its own, which `make` fills.
fn for_each_reader(make: impl Fn(&Scratch), image: &str, judge: impl Fn(&str, &Scratch, common::Run)) {
    for_each(&READERS, make, image, judge);
}

/// The same for each command that opens an image.
fn for_each_opener(make: impl Fn(&Scratch), image: &str, judge: impl Fn(&str, &Scratch, common::Run)) {
    for_each(&[&READERS[..], &WRITERS].concat(), make, image, judge);
}

fn for_each(
    commands: &[(&str, &[&str])],
    make: impl Fn(&Scratch),
    image: &str,
    judge: impl Fn(&str, &Scratch, common::Run),
) {
    for (name, arguments) in commands {
        let scratch = Scratch::new();
        scratch.image("good.vhdx");
        scratch.increment("good.increment");
        make(&scratch);
        let arguments: Vec<&str> = arguments.iter().map(|word| if *word == "@" { image } else { word }).collect();
        let (before, sums) = (scratch.names(), scratch.sums());
        let run = scratch.run(&arguments);
        let failed = run.code != Some(0);
        judge(name, &scratch, run);
        if failed {
            assert_eq!(scratch.names(), before, "{name} left something behind");
            assert_eq!(scratch.sums(), sums, "{name} changed a file");
        }
    }
}

/// Whether a command has something to say about an image that cannot be opened.
fn judges(name: &str) -> bool {
    name == "check" || name.starts_with("repair")
}

/// What every error message must have.
#[track_caller]
fn assert_is_an_error(name: &str, run: &common::Run, image: &str) {
    assert!(run.err.starts_with("vhdkit: "), "{name}: {}", run.err);
    assert!(run.err.contains(image), "{name} does not name the file: {}", run.err);
    assert!(run.err.contains("\n  hint: "), "{name} names no next step: {}", run.err);
}

#[test]
fn help_has_examples_and_goes_to_standard_output() {
    let scratch = Scratch::new();
    for command in ALL {
        for help in ["--help", "-h"] {
            let run = scratch.run(&[command, help]).expect(0).silent();
            assert!(run.out.contains("Usage: vhdkit "), "{command}: {}", run.out);
            assert!(run.out.contains("Examples:\n  "), "{command}: {}", run.out);
        }
        scratch.run(&[command, "--version"]).expect(0).silent();
    }
    // The long help is more than the first line.
    let help = scratch.run(&["check", "--help"]).expect(0).out;
    assert!(help.contains("Never changes the image."), "{help}");
    let run = scratch.run(&["--help"]).expect(0).silent();
    assert!(ALL.iter().all(|command| run.out.contains(command)), "{}", run.out);
    assert!(run.out.contains("Exit codes:"));
    assert!(scratch.run(&["--version"]).expect(0).silent().out.starts_with("vhdkit "));
}

#[test]
fn every_option_of_the_contract_is_known() {
    let scratch = Scratch::new();
    let layout = "--fixed --block-size --logical-sector-size --physical-sector-size --log-size --preallocate --block-state \
                  --disk-id --creator --file-write-guid --data-write-guid";
    let everywhere =
        "--json --quiet --verbose --color --force --force-share --parent-dir --parent --any-parent --no-parents";
    for command in ALL {
        let help = scratch.run(&[command, "--help"]).expect(0).out;
        let has = |option: &str| help.contains(&format!("{option} ")) || help.contains(&format!("{option}\n"));
        assert!(everywhere.split(' ').all(has), "{command}: {help}");
        if ["create", "convert", "measure"].contains(&command) {
            assert!(layout.split_whitespace().all(has), "{command}: {help}");
        }
    }
    for (command, options) in [
        ("diff", &["--layers", "--exact", "--exit-code", "--all", "--export", "--no-base-checksums"][..]),
        ("chain", &["--recursive"]),
        (
            "resize",
            &["--minimum", "--allow-data-loss", "--move-backup-gpt", "--dry-run", "--break-children", "--child"],
        ),
        ("compact", &["--dry-run", "--no-zero-scan", "--no-filesystems", "--break-children", "--child", "--replay"]),
        ("merge", &["--into", "--delete", "--dry-run", "--child", "--replay"]),
        ("reparent", &["--ignore-id-mismatch", "--dry-run", "--break-children", "--child", "--replay"]),
        ("set", &["--disk-id", "--physical-sector-size", "--user-metadata", "--remove-user-metadata", "--dry-run"]),
        ("info", &["--user-metadata"]),
    ] {
        let help = scratch.run(&[command, "--help"]).out;
        for option in options {
            assert!(help.contains(option), "{command} {option}");
        }
    }
    let convert = scratch.run(&["convert", "--help"]).out;
    for option in ["--from", "--to", "--size", "--no-zero-scan", "--no-sync", "--verify"] {
        assert!(convert.contains(option), "{option}");
    }
    for (command, options) in [
        ("write", &["--offset", "--input", "--replay"][..]),
        ("zero", &["--offset", "--length", "--replay"]),
        ("discard", &["--offset", "--length", "--replay"]),
        ("serve", &SERVE),
        ("apply", &["--dry-run", "--resume", "--verify", "--break-children", "--child", "--replay", "--from"]),
    ] {
        let help = scratch.run(&[command, "--help"]).out;
        for option in options {
            assert!(help.contains(option), "{command} {option}");
        }
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains("riting to an image that others name as their parent breaks those"), "{command}: {help}");
    }
}

#[test]
fn a_wrong_command_line_is_usage() {
    let scratch = Scratch::new();
    scratch.run::<&str>(&[]).expect(2);
    scratch.run(&["frobnicate"]).expect(2);
    for command in ALL {
        let run = scratch.run(&[command, "--no-such-option"]).expect(2);
        assert_eq!(run.out, "");
        assert!(run.err.contains("--no-such-option"), "{}", run.err);
        if command != "man" {
            scratch.run(&[command]).expect(2);
        }
    }
    for contradiction in [
        ["create", "a.vhdx", "--size", "1X"].as_slice(),
        &["create", "a.vhdx"],
        &["create", "a.vhdx", "--size", "1G", "--disk-id", "no"],
        &["create", "a.vhdx", "--size", "1G", "--preallocate", "some"],
        &["create", "a.vhdx", "--size", "1G", "--quiet", "--verbose"],
        &["create", "a.vhdx", "--parent", "b.vhdx", "--fixed"],
        &["create", "a.vhdx", "--parent", "b.vhdx", "--block-state", "zero"],
        &["info", "a.vhdx", "--any-parent", "--no-parents"],
        &["info", "a.vhdx", "--parent", "b.vhdx", "--no-parents"],
        &["convert", "a.vhdx", "target"],
        &["convert", "a.vhdx", "-", "--to", "vhdx"],
        &["convert", "-", "a.vhdx", "--from", "vhdx"],
        &["convert", "-", "a.vhdx", "--verify"],
        &["convert", "a.vhdx", "b.raw", "--fixed"],
        &["read", "a.vhdx", "--offset", "-1"],
        &["write", "a.vhdx", "--offset", "-1"],
        &["write", "a.vhdx", "--offset", "1X"],
        &["write", "a.vhdx", "--input", "b"],
        &["zero", "a.vhdx", "--offset", "0"],
        &["discard", "a.vhdx", "--length", "1M"],
        &["write", "a.vhdx", "--offset", "0", "--force-share"],
        &["replay", "a.vhdx", "--force-share"],
        &["diff", "a.vhdx", "b.vhdx", "--layers", "2"],
        &["diff", "a.vhdx", "--layers", "0"],
        &["diff", "a.vhdx", "b.vhdx", "--no-base-checksums"],
        &["diff", "a.vhdx", "b.vhdx", "--export", "-", "--json"],
        &["apply", "a.increment"],
        &["apply", "-", "b.vhdx"],
        &["apply", "a.increment", "b.vhdx", "--resume"],
        &["apply", "a.increment", "b.vhdx", "--dry-run", "--verify"],
        &["apply", "a.increment", "b.vhdx", "--force-share"],
        &["repair", "a.vhdx", "--undo", "record"],
        &["repair", "a.vhdx", "--apply", "--restore", "record"],
        &["resize", "a.vhdx"],
        &["resize", "a.vhdx", "5X"],
        &["resize", "a.vhdx", "--5G"],
        &["resize", "a.vhdx", "5G", "--minimum"],
        &["resize", "a.vhdx", "5G", "--force-share"],
        &["resize", "a.vhdx", "-5G", "--minimum"],
        &["compact", "a.vhdx", "b.vhdx"],
        &["compact", "a.vhdx", "--force-share"],
        &["merge", "a.vhdx", "b.vhdx"],
        &["merge", "a.vhdx", "--into"],
        &["merge", "a.vhdx", "--force-share"],
        &["reparent", "a.vhdx"],
        &["set", "a.vhdx"],
        &["set", "a.vhdx", "--dry-run"],
        &["set", "a.vhdx", "--disk-id", "no"],
        &["set", "a.vhdx", "--physical-sector-size", "x"],
        &["set", "a.vhdx", "--user-metadata", "01234567-89ab-cdef-0123-456789abcdef"],
        &["set", "a.vhdx", "--user-metadata", "01234567-89ab-cdef-0123-456789abcdef="],
        &["set", "a.vhdx", "--remove-user-metadata", "no"],
        &["info", "a.vhdx", "--user-metadata", "no"],
        &["serve", "a.vhdx", "--socket", "s", "--listen", "127.0.0.1:0"],
        &["serve", "a.vhdx", "--listen", "0.0.0.0:0"],
        &["serve", "a.vhdx", "--replay"],
        &["serve", "a.vhdx", "--write", "--force-share"],
        &["serve", "a.vhdx", "b.vhdx", "--name", "x"],
        &["serve", "a.vhdx", "b/a.vhdx"],
    ] {
        let run = scratch.run(contradiction).expect(2);
        assert_eq!(run.out, "", "{contradiction:?}");
    }
    assert!(scratch.names().is_empty());
}

#[test]
fn usage_errors_are_json_too() {
    let scratch = Scratch::new();
    for arguments in [["--json", "info"].as_slice(), &["info", "--frob", "--json"], &["convert", "--json", "a", "b"]] {
        let run = scratch.run(arguments).expect(2);
        let error = run.json_error();
        assert_eq!((error["kind"].as_str(), error["exit_code"].as_i64()), (Some("usage"), Some(2)), "{}", run.err);
        assert!(!error["message"].as_str().unwrap().is_empty() && !error["hint"].as_str().unwrap().is_empty());
        assert_eq!(run.out, "");
    }
}

#[test]
fn a_file_that_is_not_there() {
    for_each_opener(
        |_| {},
        "missing.vhdx",
        |name, _, run| {
            let run = run.expect(5);
            assert_is_an_error(name, &run, "missing.vhdx");
        },
    );
}

#[test]
fn a_directory() {
    for_each_opener(
        |scratch| std::fs::create_dir(scratch.join("directory.vhdx")).unwrap(),
        "directory.vhdx",
        |name, _, run| {
            if name == "chain" {
                run.expect(0); // what it is for
                return;
            }
            assert!(matches!(run.code, Some(2..=6)), "{name}: {run:?}");
            assert_is_an_error(name, &run, "directory.vhdx");
            assert!(run.err.contains("directory"), "{name}: {}", run.err);
        },
    );
}

#[test]
fn a_fifo_is_an_error_and_no_hang() {
    for file in ["fifo.vhdx", "fifo.raw"] {
        for_each_opener(
            |scratch| make_fifo(&scratch.join(file)),
            file,
            |name, _, run| {
                assert!(matches!(run.code, Some(2..=6)), "{name}: {run:?}");
                assert_is_an_error(name, &run, file);
            },
        );
    }
}

#[test]
fn a_file_of_a_few_bytes() {
    for content in [b"".as_slice(), b"abc", b"vhdxfil"] {
        for_each_opener(
            |scratch| drop(scratch.write("tiny.vhdx", content)),
            "tiny.vhdx",
            |name, _, run| assert_is_an_error(name, &run.expect(3), "tiny.vhdx"),
        );
    }
}

#[test]
fn not_a_vhdx() {
    let bytes = junk(2 << 20);
    for_each_opener(
        |scratch| drop(scratch.write("junk.vhdx", &bytes)),
        "junk.vhdx",
        |name, _, run| assert_is_an_error(name, &run.expect(3), "junk.vhdx"),
    );
}

#[test]
fn a_vhd_is_named() {
    let mut dynamic_vhd = vec![0; 4096];
    dynamic_vhd[..8].copy_from_slice(b"conectix");
    let mut fixed_vhd = vec![0; 4096];
    fixed_vhd[3584..3592].copy_from_slice(b"conectix");
    for (file, bytes) in [("old.vhd", &dynamic_vhd), ("old.vhdx", &dynamic_vhd), ("fixed.vhd", &fixed_vhd)] {
        for_each_opener(
            |scratch| drop(scratch.write(file, bytes)),
            file,
            |name, _, run| assert!(run.err.contains("VHD, the older format"), "{name}: {run:?}"),
        );
    }
    for_each_opener(
        |scratch| drop(scratch.write("set.vhds", &junk(4096))),
        "set.vhds",
        |name, _, run| {
            assert!(run.err.contains("VHD Set"), "{name}: {run:?}");
            run.expect(3);
        },
    );
}

#[test]
fn a_file_that_was_cut_off() {
    let whole = dynamic().build().file;
    for length in [8, 4096, 300 << 10, (1 << 20) + 4096] {
        let bytes = whole.read(0, length);
        for_each_opener(
            |scratch| drop(scratch.write("cut.vhdx", &bytes)),
            "cut.vhdx",
            |name, _, run| {
                let run = if judges(name) { run.expect(1) } else { run.expect(4) };
                if judges(name) {
                    let next = if name == "check" { "hint: " } else { "left: " };
                    assert!(run.out.contains("error: ") && run.out.contains(next), "{name}: {}", run.out);
                } else {
                    assert_is_an_error(name, &run, "cut.vhdx");
                }
            },
        );
    }
}

#[test]
fn damaged_headers() {
    let make = |scratch: &Scratch| {
        let built = dynamic().patch(64 << 10, &[0xff; 4096]).patch(128 << 10, &[0xff; 4096]).build();
        built.write_to(&scratch.join("damaged.vhdx")).unwrap();
    };
    for_each_opener(make, "damaged.vhdx", |name, _, run| {
        if name == "recover" {
            // The headers have nothing that the rest does not lead to.
            assert!(run.expect(0).out.contains("headers:"));
            return;
        }
        let run = if judges(name) { run.expect(1) } else { run.expect(4) };
        if !judges(name) {
            assert_is_an_error(name, &run, "damaged.vhdx");
            assert!(run.err.contains("[V-006]"), "{name}: {}", run.err);
        }
    });
}

#[test]
fn errors_as_json_objects_on_standard_error() {
    for (name, arguments) in [&READERS[..], &WRITERS].concat() {
        let scratch = Scratch::new();
        scratch.image("good.vhdx");
        scratch.increment("good.increment");
        scratch.write("junk.vhdx", &junk(8192));
        let mut words: Vec<&str> = arguments.iter().map(|word| if *word == "@" { "junk.vhdx" } else { word }).collect();
        words.push("--json");
        let run = scratch.run(&words).expect(3);
        assert_eq!(run.out, "", "{name}");
        let error = run.json_error();
        assert_eq!(error["kind"], "not-vhdx", "{name}");
        assert_eq!(error["code"], "file-signature", "{name}");
        assert_eq!(error["rule"], "V-002", "{name}");
        assert_eq!(error["file"], "junk.vhdx", "{name}");
        assert_eq!(error["offset"], 0, "{name}");
        assert_eq!(error["exit_code"], 3, "{name}");
        assert!(error["message"].is_string() && error["hint"].is_string(), "{name}");
    }
}

#[test]
fn reading_leaves_every_file_as_it_was() {
    for_each_reader(
        |scratch| {
            scratch.dirty("dirty.vhdx");
        },
        "dirty.vhdx",
        |name, scratch, run| {
            // A dry run of what would write says that the log is in the way, after the plan.
            let code = match name {
                "resize --dry-run" | "compact --dry-run" | "set --dry-run" => 6,
                _ => 0,
            };
            assert!(run.code == Some(code) || (name.starts_with("compare") && run.code == Some(1)), "{name}: {run:?}");
            let fresh = Scratch::new();
            fresh.image("good.vhdx");
            fresh.dirty("dirty.vhdx");
            let (now, before) = (scratch.sums(), fresh.sums());
            assert_eq!(now["dirty.vhdx"], before["dirty.vhdx"], "{name}");
            assert_eq!(now["good.vhdx"], before["good.vhdx"], "{name}");
        },
    );
}

#[test]
fn names_with_control_characters_never_reach_the_output() {
    let hostile = "a\u{1b}[31m\u{202e}b.vhdx";
    for_each_opener(
        |scratch| {
            scratch.image(hostile);
        },
        hostile,
        |name, _, run| {
            let text = format!("{}{}", if name == "read" { "" } else { &run.out }, run.err);
            assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'), "{name}: {text:?}");
        },
    );
    for_each_opener(
        |_| {},
        hostile,
        |name, _, run| {
            let run = run.expect(5);
            assert!(
                !run.err.contains('\u{1b}') && run.err.contains("a\\u{1b}[31m\\u{202e}b.vhdx"),
                "{name}: {}",
                run.err
            );
        },
    );
}

#[test]
fn a_target_that_exists_is_kept() {
    let scratch = Scratch::new();
    scratch.image("good.vhdx");
    scratch.write("target.vhdx", b"precious");
    for arguments in [
        ["create", "target.vhdx", "--size", "1G"].as_slice(),
        &["create", "target.vhdx", "--parent", "good.vhdx"],
        &["convert", "good.vhdx", "target.vhdx"],
        &["recover", "good.vhdx", "target.vhdx"],
        &["map", "good.vhdx", "--svg", "target.vhdx"],
        &["diff", "good.vhdx", "good.vhdx", "--export", "target.vhdx"],
    ] {
        let run = scratch.run(arguments).expect(6);
        assert!(run.err.contains("--force"), "{}", run.err);
        assert_eq!(std::fs::read(scratch.join("target.vhdx")).unwrap(), b"precious");
        let mut forced = arguments.to_vec();
        forced.push("--force");
        scratch.run(&forced).expect(0);
        assert_ne!(std::fs::read(scratch.join("target.vhdx")).unwrap(), b"precious");
        scratch.write("target.vhdx", b"precious");
    }
}

#[test]
fn the_source_is_never_the_target() {
    let scratch = Scratch::new();
    scratch.chain();
    let before = scratch.sums();
    for arguments in [
        ["convert", "child.vhdx", "child.vhdx", "--force"].as_slice(),
        &["convert", "child.vhdx", "base.vhdx", "--force"],
        &["recover", "child.vhdx", "child.vhdx", "--force"],
        &["recover", "child.vhdx", "base.vhdx", "--parent", "base.vhdx", "--force"],
        &["create", "base.vhdx", "--parent", "base.vhdx", "--force"],
        &["create", "base.vhdx", "--parent", "child.vhdx", "--force"],
        &["map", "child.vhdx", "--svg", "base.vhdx", "--force"],
        &["diff", "child.vhdx", "--export", "base.vhdx", "--force"],
        &["diff", "base.vhdx", "child.vhdx", "--export", "child.vhdx", "--force"],
        &["apply", "base.vhdx", "base.vhdx"],
    ] {
        scratch.run(arguments).expect(6);
        assert_eq!(scratch.sums(), before, "{arguments:?}");
    }
}

#[test]
fn a_full_disk_of_output_is_an_error_and_a_closed_pipe_is_not() {
    let scratch = Scratch::new();
    scratch.image("good.vhdx");
    for arguments in [["read", "good.vhdx"], ["map", "good.vhdx"], ["info", "good.vhdx"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = scratch.command(&arguments).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{arguments:?}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = scratch.command(&arguments).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert_eq!(output.stderr, b"", "{arguments:?}");
    }
}

#[test]
fn colour_only_where_it_is_wanted() {
    let scratch = Scratch::new();
    scratch.image("good.vhdx");
    let plain = scratch.run(&["info", "good.vhdx"]).expect(0).silent();
    assert!(!plain.out.contains('\u{1b}'));
    let coloured = scratch.run(&["info", "good.vhdx", "--color", "always"]).expect(0).silent();
    assert!(coloured.out.contains('\u{1b}'));
    assert_eq!(anstream::adapter::strip_str(&coloured.out).to_string(), plain.out);
    let json = scratch.run(&["info", "good.vhdx", "--color", "always", "--json"]).expect(0).silent();
    assert!(!json.out.contains('\u{1b}'));
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let scratch = Scratch::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = scratch.run(&["completions", shell]).expect(0).silent().out;
        for command in ALL {
            assert!(script.contains(command), "{shell} does not know {command}");
        }
    }
    let page = scratch.run(&["man"]).expect(0).silent().out;
    assert!(page.contains(".TH vhdkit 1") && page.contains("Exit codes"), "{page}");
    std::fs::create_dir(scratch.join("man1")).unwrap();
    scratch.run(&["man", "man1"]).expect(0).silent();
    let mut expected: Vec<String> = ALL.iter().map(|command| format!("vhdkit-{command}.1")).collect();
    expected.push("vhdkit.1".to_owned());
    expected.sort();
    let mut pages: Vec<String> = std::fs::read_dir(scratch.join("man1"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    assert_eq!(pages, expected);
    let convert = std::fs::read_to_string(scratch.join("man1/vhdkit-convert.1")).unwrap();
    assert!(convert.contains("vhdkit convert") && convert.contains("zero\\-scan"), "{convert}");
    // A directory that is not there is made, unless a file is in its way.
    scratch.run(&["man", "made/deep"]).expect(0);
    assert!(scratch.join("made/deep/vhdkit.1").is_file());
    scratch.write("file", b"in the way");
    scratch.run(&["man", "file/man1"]).expect(5);
}

#[test]
fn exit_codes_of_check_follow_what_was_found() {
    let scratch = Scratch::new();
    scratch.image("clean.vhdx");
    scratch.run(&["check", "clean.vhdx"]).expect(0);
    scratch.run(&["check", "--strict", "clean.vhdx"]).expect(0);
    // One torn header copy is a warning.
    dynamic().patch(64 << 10, &[0xff; 4096]).build().write_to(&scratch.join("warned.vhdx")).unwrap();
    let run = scratch.run(&["check", "warned.vhdx"]).expect(0);
    assert!(run.out.contains("warning: ") && run.out.contains("[V-007]"), "{}", run.out);
    scratch.run(&["check", "--strict", "warned.vhdx"]).expect(1);
    // Two blocks at the same place are an error that only check sees.
    let first = dynamic().build().layout.payload_block(1) / MIB;
    let block = vhdkit_testkit::builder::BlockSpec::present(vhdkit_testkit::content::Content::pattern(11)).at(first);
    let twice = dynamic().block(1, block.clone()).block(2, block);
    twice.build().write_to(&scratch.join("overlap.vhdx")).unwrap();
    let run = scratch.run(&["check", "overlap.vhdx", "--json"]).expect(1).silent();
    let report = run.json();
    assert_eq!((&report["clean"], &report["errors"]), (&false.into(), &1.into()), "{}", run.out);
    let finding = &report["findings"][0];
    assert_eq!((&finding["code"], &finding["severity"]), (&"bat-overlap".into(), &"error".into()));
    assert!(finding["offset"].is_u64() && finding["structure"].is_string() && finding["rule"] == "V-118");
    assert_eq!(report["statistics"]["disk_size"], 8 * MIB);
}
