//! Commands that change an image, where that needs something of the system: QEMU, a file system that is full or
//! read-only, the images of others.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Scratch, junk};
use rustix::process::{Pid, Signal, kill_process};
use vhdkit_testkit::foreign::{
    CorpusRow, assert_success, corpus_dir, corpus_manifest, qemu_img, run_tool, sha256_reader, unpack,
};
use vhdkit_testkit::harness::{Case, Needs, main_with};

/// A small file system in memory, gone with the test.
struct Small(PathBuf);

impl Small {
    fn new(scratch: &Scratch, options: &str) -> Self {
        let point = scratch.join("small");
        std::fs::create_dir(&point).unwrap();
        let mount = Self(point);
        assert_success(&run_tool("mount", &["-t", "tmpfs", "-o", options, "none", mount.path()]));
        mount
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn image(scratch: &Scratch, name: &str) {
    scratch.run(&["create", name, "--size", "64M", "--block-size", "1M", "--quiet"]).expect(0);
}

fn a_full_file_system() {
    let scratch = Scratch::new();
    let small = Small::new(&scratch, "size=16m");
    image(&scratch, "small/disk.vhdx");
    let bytes = junk(24 << 20);
    let input = scratch.write("input", &bytes);
    let write = ["write", "small/disk.vhdx", "--offset", "0", "--input", input.to_str().unwrap()];
    let run = scratch.run(&write).expect(5);
    assert!(run.err.contains("No space left on device"), "{}", run.err);
    assert!(run.err.contains("bytes were written before, and the image is valid"), "{}", run.err);
    assert!(run.err.contains("hint: make room"), "{}", run.err);
    let error = scratch.run(&[&write[..], &["--json"]].concat()).expect(5).json_error();
    assert_eq!((&error["kind"], &error["closed"]), (&"io".into(), &true.into()), "{error}");
    let written = error["bytes_done"].as_u64().unwrap() as usize;
    assert!((8 << 20..16 << 20).contains(&written), "{error}");
    scratch.run(&["check", "small/disk.vhdx"]).expect(0);
    assert!(scratch.run(&["read", "small/disk.vhdx"]).expect(0).stdout[..written] == bytes[..written]);
    // Room is made, by the way: what is given back can be written again.
    scratch.run(&["discard", "small/disk.vhdx", "--offset", "0", "--length", "4M"]).expect(0);
    scratch.pipe(&["write", "small/disk.vhdx", "--offset", "32M"], &bytes[..3 << 20]).expect(0);
    // Nothing left, not even for the log: what was there before is still there.
    image(&scratch, "second.vhdx");
    std::fs::remove_file(small.0.join("disk.vhdx")).unwrap();
    std::fs::copy(scratch.join("second.vhdx"), small.0.join("disk.vhdx")).unwrap();
    let filler = std::fs::File::create(small.0.join("filler")).unwrap();
    let mut filler = std::io::BufWriter::new(filler);
    let _ = std::io::copy(&mut std::io::repeat(1), &mut filler);
    let run = scratch.pipe(&["write", "small/disk.vhdx", "--offset", "0"], &bytes[..3 << 20]).expect(5);
    assert!(run.err.contains("No space left on device") && run.err.contains("room"), "{}", run.err);
    drop(filler);
    std::fs::remove_file(small.0.join("filler")).unwrap();
    scratch.run(&["check", "small/disk.vhdx"]).expect(0);
    scratch.pipe(&["write", "small/disk.vhdx", "--offset", "0"], &bytes[..3 << 20]).expect(0);
}

fn a_read_only_file_system() {
    let scratch = Scratch::new();
    let small = Small::new(&scratch, "size=64m");
    image(&scratch, "small/disk.vhdx");
    scratch.dirty("small/dirty.vhdx");
    assert_success(&run_tool("mount", &["-o", "remount,ro", small.path()]));
    for arguments in [
        &["write", "small/disk.vhdx", "--offset", "0"][..],
        &["zero", "small/disk.vhdx", "--offset", "0", "--length", "1M"],
        &["discard", "small/disk.vhdx", "--offset", "0", "--length", "1M"],
        &["replay", "small/dirty.vhdx"],
    ] {
        let run = scratch.pipe(arguments, b"x").expect(5);
        assert!(run.err.contains("Read-only file system") && run.err.contains("hint: "), "{}", run.err);
    }
    // To find out that there is nothing to replay, nothing has to be written.
    scratch.run(&["replay", "small/disk.vhdx"]).expect(0).silent();
}

fn qemu_holds_the_image() {
    let scratch = Scratch::new();
    image(&scratch, "disk.vhdx");
    let mut command = Command::new("qemu-io");
    command.args(["-f", "vhdx", "disk.vhdx"]).current_dir(scratch.path());
    let mut qemu = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // It has the image open when it answers.
    use std::io::Write as _;
    qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut answer = String::new();
    BufReader::new(qemu.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
    let before = scratch.sums();
    for arguments in [
        &["write", "disk.vhdx", "--offset", "0"][..],
        &["zero", "disk.vhdx", "--offset", "0", "--length", "1M"],
        &["discard", "disk.vhdx", "--offset", "0", "--length", "1M"],
        &["replay", "disk.vhdx"],
    ] {
        let run = scratch.pipe(arguments, b"x").expect(6);
        assert!(run.err.contains("another program has it open for writing"), "{}", run.err);
    }
    assert_eq!(scratch.sums(), before, "{answer}");
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    scratch.pipe(&["write", "disk.vhdx", "--offset", "0"], b"x").expect(0);
}

/// A program that shows a file through FUSE, as drvfs, sshfs and others do. It ends with the test.
struct Fuse(Child);

impl Fuse {
    fn new(scratch: &Scratch, file: &str, point: &str) -> Self {
        scratch.write(point, b"");
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &format!("driver=file,node-name=file,filename={file}")]);
        command.args(["--blockdev", "driver=raw,node-name=raw,file=file", "--export"]);
        let point = scratch.join(point);
        let export = "type=fuse,id=export,node-name=raw,writable=on,growable=on";
        command.arg(format!("{export},mountpoint={}", point.display())).current_dir(scratch.path());
        let fuse = Self(command.stdin(Stdio::null()).spawn().unwrap());
        for _ in 0..400 {
            if point.metadata().is_ok_and(|metadata| metadata.len() > 0) {
                return fuse;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("qemu-storage-daemon shows nothing");
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // Asked to end, it unmounts.
        let asked = kill_process(Pid::from_raw(self.0.id() as i32).unwrap(), Signal::TERM);
        let _ = asked.map(|()| self.0.wait());
    }
}

fn where_locks_are_invisible_there_is_a_warning() {
    let scratch = Scratch::new();
    image(&scratch, "behind.vhdx");
    let bytes = junk(3_000_000);
    {
        let _fuse = Fuse::new(&scratch, "behind.vhdx", "shown.vhdx");
        let write = ["write", "shown.vhdx", "--offset", "1000"];
        let run = scratch.pipe(&write, &bytes).expect(0);
        assert!(run.err.starts_with("vhdkit: warning: shown.vhdx: it lies on a file system behind"), "{}", run.err);
        assert!(run.err.contains("(FUSE)") && run.err.contains("cannot be seen"), "{}", run.err);
        scratch.pipe(&[&write[..], &["--quiet"]].concat(), &bytes).expect(0).silent();
        scratch.run(&["read", "shown.vhdx"]).expect(0).silent();
        scratch.run(&["replay", "shown.vhdx"]).expect(0).silent();
    }
    let run = scratch.pipe(&["write", "behind.vhdx", "--offset", "0"], b"x").expect(0);
    assert_eq!(run.err, "");
    assert!(scratch.run(&["read", "behind.vhdx"]).expect(0).stdout[1000..][..bytes.len()] == bytes);
}

/// QEMU reads what was written, and what it writes is read, in turns.
fn qemu_and_we_take_turns() {
    let scratch = Scratch::new();
    image(&scratch, "disk.vhdx");
    let mut disk = vec![0; 64 << 20];
    for round in 0..6_usize {
        let offset = round * 7 * (1 << 20) + round * 1000;
        let bytes = junk(2_500_000 + round);
        scratch.pipe(&["write", "disk.vhdx", "--offset", &offset.to_string()], &bytes).expect(0);
        disk[offset..offset + bytes.len()].copy_from_slice(&bytes);
        let zero = ["zero", "disk.vhdx", "--offset", &(offset + 4096).to_string(), "--length", "1500000"];
        scratch.run(&zero).expect(0);
        disk[offset + 4096..][..1_500_000].fill(0);
        let theirs = (round * 9 + 3) << 20;
        let command = format!("write -P {} {theirs} 1M", round + 1);
        let path = scratch.join("disk.vhdx");
        assert_success(&run_tool("qemu-io", &["-f", "vhdx", "-c", &command, "-c", "flush", path.to_str().unwrap()]));
        disk[theirs..][..1 << 20].fill(round as u8 + 1);
        scratch.run(&["check", "disk.vhdx"]).expect(0);
    }
    assert!(scratch.run(&["read", "disk.vhdx"]).expect(0).stdout == disk);
    let raw = scratch.write("disk.raw", &disk);
    let image = scratch.join("disk.vhdx");
    let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    assert_success(&qemu_img(&["check", "-f", "vhdx", image]));
    assert_success(&qemu_img(&["compare", "-f", "vhdx", "-F", "raw", image, raw]));
}

/// An image that somebody else made keeps its content through a replay, is written, and stays in order.
fn replay_and_write(row: &CorpusRow) {
    let scratch = Scratch::new();
    let image = unpack(row, scratch.path());
    let image = image.to_str().unwrap();
    let report = scratch.run(&["replay", image, "--json"]).expect(0).json();
    assert_eq!(report["replayed"], row.dirty);
    assert_eq!(scratch.run(&["info", image, "--json"]).expect(0).json()["log"]["state"], "clean");
    assert_eq!(report["replay"].is_object(), row.dirty, "{report}");
    assert_eq!(sum_of_read(&scratch, image), row.guest_sha256, "replay changed what the guest sees");
    let offset = (row.virtual_size / 3).to_string();
    let bytes = junk(100_000.min(row.virtual_size as usize / 3));
    scratch.pipe(&["write", image, "--offset", &offset], &bytes).expect(0);
    let length = bytes.len().to_string();
    let read = scratch.run(&["read", image, "--offset", &offset, "--length", &length]).expect(0).stdout;
    assert!(read == bytes, "what was written is not what is read");
    scratch.run(&["check", image]).expect(0);
}

fn sum_of_read(scratch: &Scratch, image: &str) -> String {
    let mut command = scratch.command(&["read", image]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let sum = sha256_reader(&mut child.stdout.take().unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    sum
}

/// Larger disks take too long here.
const DISK_BYTES_MAX: u64 = 2 << 30;

fn main() {
    let mount = || Needs::tools(&["mount", "umount"]).and_root();
    let mut cases = vec![
        Case::new("a_full_file_system", mount(), a_full_file_system),
        Case::new("a_read_only_file_system", mount(), a_read_only_file_system),
        Case::new("qemu_holds_the_image", Needs::tools(&["qemu-io"]), qemu_holds_the_image),
        Case::new("qemu_and_we_take_turns", Needs::tools(&["qemu-io", "qemu-img"]), qemu_and_we_take_turns),
    ];
    let fuse = Needs::tools(&["qemu-storage-daemon"]).and_root();
    let warning = where_locks_are_invisible_there_is_a_warning;
    cases.push(Case::new("where_locks_are_invisible_there_is_a_warning", fuse, warning));
    let rows = if corpus_dir().is_some() { corpus_manifest() } else { Vec::new() };
    let corpus = || Needs::nothing().and_corpus();
    if rows.is_empty() {
        cases.push(Case::new("every_image_of_the_corpus", corpus(), || unreachable!("there is no corpus")));
    }
    for row in rows.into_iter().filter(|row| row.virtual_size <= DISK_BYTES_MAX || row.dirty) {
        cases.push(Case::new(format!("corpus_{}", row.name), corpus(), move || replay_and_write(&row)));
    }
    main_with(cases);
}
