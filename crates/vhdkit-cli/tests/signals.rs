//! SIGINT and SIGTERM end every command soon, with the code that shells expect; they leave nothing behind, and a valid image.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Scratch, make_fifo};
use rustix::process::{Pid, Signal, kill_process};

/// How long a process may take to end after a signal, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal).unwrap();
}

/// Waits for the end, and kills what does not come to one.
fn wait(mut child: Child) -> (Option<i32>, String) {
    let deadline = Instant::now() + PATIENCE;
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the process did not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (code, text)
}

/// A command that reads a standard input that never ends. It has read some of it when this returns.
fn endless_input(scratch: &Scratch, arguments: &[&str]) -> (Child, std::process::ChildStdin) {
    let mut command = scratch.command(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A pipe holds 64 KiB: when all of this is written, the program is reading.
    stdin.write_all(&vec![7; 3 << 20]).unwrap();
    (child, stdin)
}

#[test]
fn a_conversion_that_waits_for_input_is_given_up() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        for target in ["out.vhdx", "out.raw"] {
            for more in [[].as_slice(), &["--size", "1G"], &["--json"]] {
                let scratch = Scratch::new();
                let mut words = vec!["convert", "-", target];
                words.extend(more);
                let (child, stdin) = endless_input(&scratch, &words);
                assert!(!scratch.join(target).exists(), "the target has its name before it is complete");
                send(&child, signal);
                let (ended, text) = wait(child);
                assert_eq!(ended, Some(code), "{words:?}: {text}");
                assert!(text.contains("signal"), "{text}");
                assert_eq!(scratch.names(), Vec::<String>::new(), "{words:?}");
                drop(stdin);
            }
        }
    }
}

#[test]
fn output_that_nobody_takes_does_not_hold_the_process() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    for words in [["read", "disk.vhdx"].as_slice(), &["convert", "disk.vhdx", "-"]] {
        for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
            let mut command = scratch.command(words);
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            // One byte through the pipe: it is writing, and will be blocked soon.
            let mut stdout = child.stdout.take().unwrap();
            stdout.read_exact(&mut [0]).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            send(&child, signal);
            let (ended, _) = wait(child);
            assert_eq!(ended, Some(code), "{words:?}");
            drop(stdout);
        }
    }
}

#[test]
fn a_write_that_is_stopped_says_how_much_is_written_and_leaves_a_valid_image() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let scratch = Scratch::new();
        scratch.run(&["create", "disk.vhdx", "--size", "64M", "--block-size", "1M"]).expect(0);
        let (child, stdin) = endless_input(&scratch, &["write", "disk.vhdx", "--offset", "100", "--json"]);
        send(&child, signal);
        let (ended, text) = wait(child);
        assert_eq!(ended, Some(code), "{text}");
        drop(stdin);
        let error: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let error = &error["error"];
        assert_eq!((&error["kind"], &error["closed"]), (&"cancelled".into(), &true.into()), "{text}");
        assert_eq!(error["exit_code"], code, "{text}");
        assert!(error["message"].as_str().unwrap().contains("stopped by a signal"), "{text}");
        // Everything that had left the pipe is there.
        let written = error["bytes_done"].as_u64().unwrap() as usize;
        assert!(((3 << 20) - (64 << 10)..=3 << 20).contains(&written), "{text}");
        scratch.run(&["check", "disk.vhdx"]).expect(0);
        let disk = scratch.run(&["read", "disk.vhdx"]).expect(0).stdout;
        let sevens = disk.iter().filter(|byte| **byte == 7).count();
        assert_eq!((sevens, disk[99], disk[100], disk[99 + written]), (written, 0, 7, 7));
        assert_eq!(scratch.run(&["info", "disk.vhdx", "--json"]).expect(0).json()["log"]["state"], "clean");
    }
}

#[test]
fn waiting_for_a_fifo_that_nobody_writes_to_ends_with_a_signal() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    make_fifo(&scratch.join("fifo"));
    let before = scratch.sums();
    let mut command = scratch.command(&["write", "disk.vhdx", "--offset", "0", "--input", "fifo"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    send(&child, Signal::INT);
    let (ended, text) = wait(child);
    assert_eq!(ended, Some(130), "{text}");
    assert!(text.contains("0 bytes were written"), "{text}");
    assert_eq!(scratch.sums(), before);
}

#[test]
fn zeroing_a_huge_disk_can_be_stopped() {
    let scratch = Scratch::new();
    // In a child every single block has to be marked.
    scratch.run(&["create", "base.vhdx", "--size", "64T", "--block-size", "1M"]).expect(0);
    scratch.run(&["create", "disk.vhdx", "--parent", "base.vhdx", "--block-size", "1M"]).expect(0);
    let mut command = scratch.command(&["zero", "disk.vhdx", "--offset", "0", "--length", "64T"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    send(&child, Signal::TERM);
    let (ended, text) = wait(child);
    assert_eq!(ended, Some(143), "{text}");
    assert!(text.contains("bytes were zeroed before, and the image is valid"), "{text}");
    scratch.run(&["check", "disk.vhdx"]).expect(0);
}
