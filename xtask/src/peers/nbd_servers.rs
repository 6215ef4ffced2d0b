//! The servers that the rows on NBD compare: how each is started, where it listens, and how it ends.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Bench;
use super::rows::{OURS, remove};
use crate::shell::{self, Outcome, shown};

/// How long a server may take until it listens.
const START_MAX: Duration = Duration::from_secs(20);
/// How long it may take to end when asked to: it may have to write gibibytes to a disk first.
const END_MAX: Duration = Duration::from_secs(60);
/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// The label of vhdkit's server with its option to wait for requests in a loop.
pub(super) const POLLING: &str = "vhdkit --poll";
/// The label of nbdkit with its plugin for files.
pub(super) const NBDKIT: &str = "nbdkit";
/// The label of QEMU's server.
pub(super) const QEMU_NBD: &str = "qemu-nbd";
/// The label of the server that does the least for a raw file.
pub(super) const PROTOTYPE: &str = "prototype";
/// The label of the server without a file.
pub(super) const NULL: &str = "null";
/// The label of the same where it offers no structured replies.
const NULL_SIMPLE: &str = "null, simple replies";

/// One of the servers.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Vhdkit,
    Polling,
    Nbdkit,
    Qemu,
    Prototype,
    Null,
    NullSimple,
}

impl Kind {
    /// Its name in the table.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Vhdkit => OURS,
            Self::Polling => POLLING,
            Self::Nbdkit => NBDKIT,
            Self::Qemu => QEMU_NBD,
            Self::Prototype => PROTOTYPE,
            Self::Null => NULL,
            Self::NullSimple => NULL_SIMPLE,
        }
    }

    /// How the name of its file ends: nobody else's, since each is filled through the server that it is measured with.
    pub(super) fn file_name(self) -> &'static str {
        match self {
            Self::Vhdkit => "vhdkit.vhdx",
            Self::Polling => "polling.vhdx",
            Self::Nbdkit => "nbdkit.raw",
            Self::Qemu => "qemu.vhdx",
            Self::Prototype => "prototype.raw",
            Self::Null => "null",
            Self::NullSimple => "null-simple",
        }
    }

    /// What its folder has to have besides the socket.
    pub(super) fn has_file(self) -> bool {
        !matches!(self, Self::Null | Self::NullSimple)
    }

    /// Makes an empty disk: a dynamic VHDX, or a raw file that is one hole.
    pub(super) fn create(self, bench: &Bench, path: &Path, disk: Disk) -> Outcome {
        remove(path)?;
        match self {
            Self::Vhdkit | Self::Polling | Self::Qemu => {
                let mut command = Command::new(&bench.vhdkit);
                command.arg("create").arg("--size").arg(disk.bytes.to_string());
                if let Some(bytes) = disk.block_bytes {
                    command.arg("--block-size").arg(bytes.to_string());
                }
                shell::output(command.arg(path))?;
            }
            Self::Nbdkit | Self::Prototype => File::create_new(path)?.set_len(disk.bytes)?,
            Self::Null | Self::NullSimple => {}
        }
        Ok(())
    }

    /// The command that serves. All serve for writing, also where nothing is written, and all know what writeback is.
    fn command(self, bench: &Bench, path: &Path, socket: &Path, bytes: u64) -> Outcome<Command> {
        let program = match self {
            Self::Vhdkit | Self::Polling => bench.vhdkit.clone(),
            Self::Nbdkit => "nbdkit".into(),
            Self::Qemu => "qemu-nbd".into(),
            Self::Prototype | Self::Null | Self::NullSimple => std::env::current_exe()?,
        };
        let mut command = Command::new(program);
        match self {
            Self::Vhdkit => command.arg("serve").arg(path).arg("--write").arg("--socket").arg(socket),
            Self::Polling => command.arg("serve").arg(path).args(["--write", "--poll", "--socket"]).arg(socket),
            Self::Nbdkit => command.arg("-f").arg("-U").arg(socket).arg("file").arg(path),
            // As many clients as the row with most connections has, and one more for each, as fio asks for the size.
            Self::Qemu => {
                let words = ["-t", "-e", "64", "-f", "vhdx", "-x", "", "--cache=writeback", "--aio=threads", "-k"];
                command.args(words).arg(socket).arg(path)
            }
            Self::Prototype => command.args(["peers-work", "nbd-prototype"]).arg(socket).arg(path),
            Self::Null => command.args(["peers-work", "nbd-null"]).arg(socket).arg(bytes.to_string()),
            Self::NullSimple => command.args(["peers-work", "nbd-null-simple"]).arg(socket).arg(bytes.to_string()),
        };
        Ok(command)
    }
}

/// What an empty disk is like.
#[derive(Clone, Copy)]
pub(super) struct Disk {
    pub(super) bytes: u64,
    /// Bytes of a block of a VHDX; the tool's default where nothing is said.
    pub(super) block_bytes: Option<u64>,
}

/// A server that runs; killed when dropped.
pub(super) struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts a server for a file that is there, and waits until it listens.
    pub(super) fn start(bench: &Bench, kind: Kind, path: &Path, bytes: u64) -> Outcome<Self> {
        // In memory, whose folder has a short name: that of a socket has 107 bytes at most.
        let socket = bench.memory.join(format!("{}.sock", kind.file_name()));
        let log = socket.with_extension("log");
        remove(&socket)?;
        let mut command = kind.command(bench, path, &socket, bytes)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let child = command.spawn().map_err(|error| format!("{}: {error}", shown(&command)))?;
        let mut server = Self { child, socket, log };
        let deadline = Instant::now() + START_MAX;
        while UnixStream::connect(&server.socket).is_err() {
            if let Some(status) = server.child.try_wait()? {
                return Err(format!("{}: {status}: {}", shown(&command), server.said()).into());
            }
            if Instant::now() > deadline {
                return Err(format!("{}: does not listen: {}", shown(&command), server.said()).into());
            }
            sleep(PAUSE);
        }
        Ok(server)
    }

    /// The command line as one would type it, for the table.
    pub(super) fn line(bench: &Bench, kind: Kind, path: &Path, bytes: u64) -> Outcome<String> {
        let command = kind.command(bench, path, Path::new("nbd.sock"), bytes)?;
        let own = std::env::current_exe()?.to_string_lossy().into_owned();
        Ok(shown(&command).replace(&own, "cargo xtask"))
    }

    /// Where it listens, as fio wants it.
    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Its largest resident set up to now, in KiB.
    pub(super) fn peak_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        peak.trim().trim_end_matches(" kB").parse().ok()
    }

    /// Asks it to end, and waits until it has written what it still holds.
    pub(super) fn stop(mut self) -> Outcome {
        let status = self.end()?;
        // Those that have no signal handler end by the signal.
        if status.code().is_some_and(|code| code != 0) {
            return Err(format!("a server ended with {status}: {}", self.said()).into());
        }
        Ok(())
    }

    fn end(&mut self) -> Outcome<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let deadline = Instant::now() + END_MAX;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            sleep(PAUSE);
        }
        Err(format!("a server does not end within {END_MAX:?}: {}", self.said()).into())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.end().is_err() {
            let _ = self.child.kill(); // it does not listen to anything else
            let _ = self.child.wait();
        }
        let _ = fs::remove_file(&self.socket); // most remove it themselves
        let _ = fs::remove_file(&self.log);
    }
}
