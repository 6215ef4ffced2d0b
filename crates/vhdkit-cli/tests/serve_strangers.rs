//! Served disks of every kind through clients by strangers: libnbd's tools, QEMU's, fio; and all images that others wrote.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::path::Path;
use std::process::Command;

use common::server::Server;
use common::{MIB, Scratch, disk_bytes, junk};
use rustix::process::Signal;
use serde_json::Value;
use vhdkit_testkit::foreign::{
    CorpusRow, TOOL_TIMEOUT, assert_success, corpus_dir, corpus_manifest, qemu_img, run, run_tool, sha256_file, unpack,
};
use vhdkit_testkit::harness::{Case, Needs, main_with};

/// Copies of larger disks are compared with the image instead of being read from end to end.
const HASHED_BYTES_MAX: u64 = 2 << 30;

/// Which ranges hold data, joined where they are alike.
fn joined(ranges: impl Iterator<Item = (u64, u64, bool)>) -> Vec<(u64, u64, bool)> {
    let mut all: Vec<(u64, u64, bool)> = Vec::new();
    for (start, length, is_data) in ranges {
        match all.last_mut() {
            Some((first, before, same)) if *same == is_data && *first + *before == start => *before += length,
            _ => all.push((start, length, is_data)),
        }
    }
    all
}

/// `nbdinfo --map` says what `vhdkit map` says.
fn assert_maps_agree(scratch: &Scratch, image: &str, uri: &str) {
    let ours = scratch.run(&["map", image, "--json"]).expect(0).json();
    let number = |value: &Value| value.as_u64().unwrap();
    let ours = ours.as_array().unwrap().iter();
    let ours =
        joined(ours.map(|range| (number(&range["start"]), number(&range["length"]), range["data"].as_bool().unwrap())));
    let output = run_tool("nbdinfo", &["--map", "--json", uri]);
    assert_success(&output);
    let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let theirs = theirs.as_array().unwrap().iter();
    let theirs = joined(theirs.map(|range| (number(&range["offset"]), number(&range["length"]), range["type"] == 0)));
    assert_eq!(ours, theirs, "{image}");
}

/// Copies a served disk with several connections.
fn nbdcopy(from: &str, to: &str) {
    assert_success(&run_tool("nbdcopy", &["--connections=4", from, to]));
}

/// Ends a server that may have had something to say about its image.
fn end(server: Server) {
    server.send(Signal::TERM);
    let (code, err) = server.wait();
    assert_eq!(code, Some(0), "{err}");
}

/// An image that somebody else wrote: its content comes through, and the file stays as it is.
fn judge(row: &CorpusRow) {
    let scratch = Scratch::new();
    let image = unpack(row, scratch.path());
    let image = image.to_str().unwrap();
    let server = Server::start(&scratch, &[image]);
    assert_maps_agree(&scratch, image, server.uri());
    let raw = scratch.join("copy.raw");
    nbdcopy(server.uri(), raw.to_str().unwrap());
    assert_eq!(raw.metadata().unwrap().len(), row.virtual_size);
    if row.virtual_size <= HASHED_BYTES_MAX {
        assert_eq!(sha256_file(&raw).unwrap(), row.guest_sha256);
    } else {
        scratch.run(&["compare", image, raw.to_str().unwrap()]).expect(0);
    }
    end(server);
    assert_eq!(sha256_file(Path::new(image)).unwrap(), row.file_sha256, "the file was changed");
}

/// Disks of every kind, with some content: name and options of `serve --write`.
const KINDS: [(&str, &[&str]); 5] = [
    ("dynamic", &[]),
    ("fixed", &["--fixed"]),
    ("child", &[]),
    ("sectors", &["--logical-sector-size", "4096"]),
    ("dirty", &[]),
];

/// Makes one of them; how large it is.
fn make(scratch: &Scratch, kind: &str, options: &[&str]) -> u64 {
    match kind {
        "dirty" => return disk_bytes(&scratch.dirty("dirty.vhdx")).len() as u64,
        "child" => {
            scratch.run(&["create", "parent.vhdx", "--size", "64M", "--block-size", "1M"]).expect(0);
            scratch.write("piece", &junk(20 << 20));
            scratch.run(&["write", "parent.vhdx", "--offset", "5M", "--input", "piece"]).expect(0);
            scratch.run(&["create", "child.vhdx", "--parent", "parent.vhdx"]).expect(0);
        }
        _ => {
            let name = format!("{kind}.vhdx");
            let words = ["create", &name, "--size", "64M", "--block-size", "1M"];
            scratch.run(&[&words[..], options].concat()).expect(0);
        }
    }
    scratch.write("some", &junk(3 << 20));
    scratch.run(&["write", &format!("{kind}.vhdx"), "--offset", "1M", "--input", "some"]).expect(0);
    64 * MIB
}

fn each_kind(judge: impl Fn(&Scratch, &str, u64)) {
    for (kind, options) in KINDS {
        println!("{kind}");
        let scratch = Scratch::new();
        let bytes = make(&scratch, kind, options);
        judge(&scratch, &format!("{kind}.vhdx"), bytes);
        scratch.run(&["check", &format!("{kind}.vhdx")]).expect(0);
    }
}

/// What is copied out is what is read, and the map is the same.
fn copies_and_maps_of_every_kind() {
    each_kind(|scratch, image, _| {
        let server = Server::start(scratch, &[image]);
        assert_maps_agree(scratch, image, server.uri());
        nbdcopy(server.uri(), scratch.join("copy.raw").to_str().unwrap());
        scratch.run(&["compare", image, "copy.raw"]).expect(0);
        assert_success(&qemu_img(&[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            server.uri(),
            scratch.join("copy.raw").to_str().unwrap(),
        ]));
        end(server);
    });
}

/// What is copied in, by libnbd and by QEMU, is there afterwards; zeros take no space.
fn copies_into_every_kind() {
    each_kind(|scratch, image, bytes| {
        let half = (bytes / 2) as usize;
        let mut content = junk(half);
        content.resize(bytes as usize, 0);
        let raw = scratch.write("new.raw", &content);
        let raw = raw.to_str().unwrap();
        let server = Server::start(scratch, &[image, "--write", "--replay"]);
        nbdcopy(raw, server.uri());
        end(server);
        scratch.run(&["compare", image, "new.raw"]).expect(0);
        content.reverse();
        scratch.write("new.raw", &content);
        let server = Server::start(scratch, &[image, "--write"]);
        assert_success(&qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", raw, server.uri()]));
        let qemu_io =
            ["-f", "raw", "-c", "write -P 171 4096 8192", "-c", "read -P 171 4096 8192", "-c", "write -z -u 0 1M"];
        let more = ["-c", "read -P 0 0 1M", "-c", "discard 2M 3M", "-c", "write -f -P 7 1048576 4096", "-c", "flush"];
        let output = run_tool("qemu-io", &[&qemu_io[..], &more, &[server.uri()]].concat());
        assert_success(&output);
        assert!(!String::from_utf8_lossy(&output.stdout).contains("failed"), "{output:?}");
        end(server);
        let first = scratch.run(&["read", image, "--offset", "1M", "--length", "4096"]).expect(0).out;
        assert_eq!(first.as_bytes(), [7; 4096], "{image}");
    });
}

/// fio writes at random from four jobs, with trims among them, and reads back what it wrote.
fn fio_verifies_every_kind() {
    each_kind(|scratch, image, bytes| {
        let server = Server::start(scratch, &[image, "--write", "--replay"]);
        let mut command = Command::new("fio");
        command.args(["--ioengine=nbd", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_state_save=0"]);
        command.arg(format!("--uri={}", server.uri())).arg(format!("--size={}", bytes / 4));
        command.args(["--name=a", "--rw=randrw", "--offset=0", "--name=b", "--rw=randwrite", "--bs=4k-64k"]);
        command.arg(format!("--offset={}", bytes / 4)).args(["--name=c", "--rw=write", "--bs=1m"]);
        command.arg(format!("--offset={}", bytes / 2)).current_dir(scratch.path());
        assert_success(&run(&mut command, TOOL_TIMEOUT).unwrap());
        end(server);
    });
}

fn main() {
    let rows = if corpus_dir().is_some() { corpus_manifest() } else { Vec::new() };
    let tools = || Needs::tools(&["nbdinfo", "nbdcopy"]);
    let mut cases = vec![
        Case::new(
            "copies_and_maps_of_every_kind",
            Needs::tools(&["nbdinfo", "nbdcopy", "qemu-img"]),
            copies_and_maps_of_every_kind,
        ),
        Case::new("copies_into_every_kind", Needs::tools(&["nbdcopy", "qemu-img", "qemu-io"]), copies_into_every_kind),
        Case::new("fio_verifies_every_kind", Needs::tools(&["fio"]), fio_verifies_every_kind),
    ];
    if rows.is_empty() {
        cases.push(Case::new("every_image", tools().and_corpus(), || unreachable!("there is no corpus")));
    }
    let image = |row: CorpusRow| Case::new(row.name.clone(), tools().and_corpus(), move || judge(&row));
    cases.extend(rows.into_iter().map(image));
    main_with(cases);
}
