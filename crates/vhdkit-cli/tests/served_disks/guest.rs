//! A guest in QEMU: the kernel and the initramfs that `.ci/guest` prepares, with our script as its first process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use vhdkit_testkit::foreign::guest_dir;

use crate::common::Scratch;
use crate::promises::Promises;
use crate::server::kill;

/// The first process of the guest.
const INIT: &str = include_str!("../guest/init");
/// How often to wait a second for a guest that is silent, on a busy machine. The clock does not count: the machine may
/// stand still, as virtual ones do.
const SECONDS: usize = 60;

/// What a boot is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// To put a load on the disk until the power goes.
    Load,
    /// To unmount and to switch off.
    End,
}

/// A guest that runs. Its power is cut when the test forgets it.
#[derive(Debug)]
pub(crate) struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    console: PathBuf,
}

/// What a guest found on its disk.
#[derive(Debug)]
pub(crate) struct Found {
    /// The sums of the files by name.
    pub(crate) files: BTreeMap<String, String>,
    /// Whether the file system had to be recovered.
    pub(crate) recovered: bool,
}

impl Guest {
    /// Switches it on: its disk is what a server shows at `port`.
    pub(crate) fn boot(scratch: &Scratch, port: u16, sector: u64, boot: usize, task: Task) -> Self {
        let rig = guest_dir().expect("the guest is prepared");
        let mut initramfs = std::fs::read(rig.join("initramfs")).unwrap();
        append(&mut initramfs, "init", 0o100_755, INIT.as_bytes());
        append(&mut initramfs, "TRAILER!!!", 0, b"");
        let initramfs = scratch.write("initramfs", &initramfs);
        let console = scratch.join(format!("console{boot}"));
        let task = if task == Task::Load { "load" } else { "end" };
        let words = format!("console=ttyS0 quiet panic=-1 PORT={port} BLOCK={sector} BOOT={boot} TASK={task}");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config"]);
        qemu.args(["-display", "none", "-no-reboot", "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]);
        qemu.arg("-kernel").arg(rig.join("vmlinuz")).arg("-initrd").arg(initramfs).args(["-append", &words]);
        qemu.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
        let mut qemu = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut output = output;
            let mut line = String::new();
            // What the power cut left of a line was not said.
            while output.read_line(&mut line).is_ok_and(|count| count > 0) && line.ends_with('\n') {
                let _ = sender.send(std::mem::take(&mut line).trim_end().to_owned());
            }
        });
        Self { qemu, lines, console }
    }

    /// The next line that it says; nothing when it is off.
    #[track_caller]
    fn next_line(&self) -> Option<String> {
        let mut wait = || self.lines.recv_timeout(Duration::from_secs(1));
        let mut lines = std::iter::repeat_with(&mut wait).take(SECONDS);
        let Some(line) = lines.find(|line| *line != Err(RecvTimeoutError::Timeout)) else {
            panic!("the guest says nothing; its console:\n{}", self.console());
        };
        let line = line.ok()?;
        assert!(!line.starts_with("failed "), "the guest: {line}; its console:\n{}", self.console());
        Some(line)
    }

    /// The end of what its kernel and its programs have printed.
    pub(crate) fn console(&self) -> String {
        let text = String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Waits until it has told what is on its disk.
    #[track_caller]
    pub(crate) fn found(&self) -> Found {
        let mut found = Found { files: BTreeMap::new(), recovered: false };
        while let Some(line) = self.next_line() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["note", "recovered"] => found.recovered = true,
                ["have", sum, name] => {
                    found.files.insert(name.to_owned(), sum.to_owned());
                }
                ["verified", count] => {
                    assert_eq!(found.files.len().to_string(), count, "lines were lost");
                    return found;
                }
                _ => panic!("the guest: {line}"),
            }
        }
        panic!("the guest is off; its console:\n{}", self.console());
    }

    /// Listens until it has given so many promises more.
    #[track_caller]
    pub(crate) fn wait_for_promises(&self, promises: &mut Promises, count: usize) {
        let wanted = promises.given + count;
        while promises.given < wanted {
            match self.next_line() {
                Some(line) => promises.hear(&line),
                None => panic!("the guest is off; its console:\n{}", self.console()),
            }
        }
    }

    /// Hears what it has said so far.
    pub(crate) fn hear_so_far(&self, promises: &mut Promises) {
        self.lines.try_iter().for_each(|line| promises.hear(&line));
    }

    /// Cuts its power, and hears what it said before.
    pub(crate) fn cut(mut self, promises: &mut Promises) {
        kill(&mut self.qemu);
        while let Some(line) = self.next_line() {
            promises.hear(&line);
        }
    }

    /// Waits until it has unmounted its disk and is off.
    #[track_caller]
    pub(crate) fn wait_for_end(mut self) {
        let mut unmounted = false;
        while let Some(line) = self.next_line() {
            unmounted |= line == "note unmounted";
        }
        assert!(unmounted, "the guest did not unmount; its console:\n{}", self.console());
        assert!(self.qemu.wait().unwrap().success(), "QEMU failed");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        kill(&mut self.qemu);
    }
}

/// Appends a file to an initramfs, in the format that cpio calls newc: the kernel unpacks one archive after the other.
fn append(initramfs: &mut Vec<u8>, name: &str, mode: u32, bytes: &[u8]) {
    while !initramfs.len().is_multiple_of(4) {
        initramfs.push(0);
    }
    let mut header = "070701".to_owned();
    let name_length = name.len() as u32 + 1;
    // Number, mode, owner, group, links, time, length, four numbers of devices, length of the name, sum.
    for field in [0, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, name_length, 0] {
        write!(header, "{field:08x}").unwrap();
    }
    initramfs.extend(header.as_bytes());
    initramfs.extend(name.as_bytes());
    initramfs.push(0);
    while !initramfs.len().is_multiple_of(4) {
        initramfs.push(0);
    }
    initramfs.extend(bytes);
}
