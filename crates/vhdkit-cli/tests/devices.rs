//! Block devices on the command line.
//!
//! These tests need root, loop devices and losetup. They are ignored;
//! `VHDKIT_ROOT_TESTS=1 cargo test --test devices -- --include-ignored` runs them. Without the variable they fail when
//! asked for: nothing that cannot run counts as passed.

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

use common::{MIB, Run, Scratch, junk};

/// A loop device over a file of the scratch directory, full of bytes that are not zero.
struct Device {
    path: String,
}

impl Device {
    fn new(scratch: &Scratch, bytes: u64) -> Self {
        assert!(
            std::env::var_os("VHDKIT_ROOT_TESTS").is_some_and(|value| value == "1"),
            "set VHDKIT_ROOT_TESTS=1 where there are root rights and loop devices; without them leave this test ignored"
        );
        let backing = scratch.write("device.backing", &vec![0xaa; bytes as usize]);
        let output = Command::new("losetup").args(["--find", "--show"]).arg(backing).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self { path: String::from_utf8(output.stdout).unwrap().trim().to_owned() }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_disk_on_a_larger_device_is_verified_as_far_as_it_reaches() {
    let scratch = Scratch::new();
    let device = Device::new(&scratch, 8 * MIB);
    scratch.write("disk.raw", &[junk(MIB as usize), vec![0; MIB as usize], junk(700)].concat());
    scratch.run(&["convert", "disk.raw", &device.path]).expect(6);
    scratch.run(&["convert", "disk.raw", &device.path, "--force", "--verify"]).expect(0);
    let read = scratch.run(&["read", &device.path]).expect(0).stdout;
    let disk = std::fs::read(scratch.join("disk.raw")).unwrap();
    assert!(read[..disk.len()] == disk[..]);
    // The device has more than the disk.
    scratch.run(&["compare", "disk.raw", &device.path]).expect(1);
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_device_that_is_source_and_target_is_named_as_such() {
    let scratch = Scratch::new();
    let device = Device::new(&scratch, MIB);
    let run = scratch.run(&["convert", &device.path, &device.path, "--force"]).expect(6);
    assert!(run.err.contains("source and target are the same device"), "{}", run.err);
    assert!(std::fs::read(scratch.join("device.backing")).unwrap().iter().all(|byte| *byte == 0xaa));
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_file_is_not_written_over_through_its_own_loop_device() {
    let scratch = Scratch::new();
    let device = Device::new(&scratch, MIB);
    let source = scratch.join("device.backing");
    let source = source.to_str().unwrap();
    scratch.run(&["convert", source, &device.path, "--force", "--from", "raw"]).expect(6);
    assert!(std::fs::read(source).unwrap().iter().all(|byte| *byte == 0xaa));
}

#[test]
#[ignore = "needs root and loop devices, and VHDKIT_ROOT_TESTS=1"]
fn a_stream_that_is_too_long_for_the_device_says_so() {
    let scratch = Scratch::new();
    let device = Device::new(&scratch, 2 * MIB);
    for bytes in [vec![0; 5 * MIB as usize], junk(5 * MIB as usize)] {
        let source = scratch.write("long", &bytes);
        let mut command = scratch.command(&["convert", "-", &device.path, "--force"]);
        let stdin = std::fs::File::open(source).unwrap();
        let output = command.stdin(Stdio::from(stdin)).output().unwrap();
        let run = Run::new(output).expect(6);
        assert!(run.err.contains("too small"), "{}", run.err);
    }
}
