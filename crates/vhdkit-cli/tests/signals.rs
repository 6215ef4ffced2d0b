//! SIGINT and SIGTERM end every command soon, with the code that shells expect, and leave nothing behind.
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

use common::Scratch;
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

/// A conversion from a standard input that never ends. It has read some of it when this returns.
fn endless_conversion(scratch: &Scratch, arguments: &[&str]) -> (Child, std::process::ChildStdin) {
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
                let (child, stdin) = endless_conversion(&scratch, &words);
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
