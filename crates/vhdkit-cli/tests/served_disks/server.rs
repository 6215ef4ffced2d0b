//! `vhdkit serve` as a process that is started, asked to end, and killed.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::Scratch;

/// How long a process may take to start, or to end when it is asked to.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Options of a server for clients that write. What was killed before has left a log to replay.
pub(crate) const WRITE: &[&str] = &["--write", "--replay"];

/// Asks until the answer is yes; panics when it takes too long.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        assert!(Instant::now() < deadline, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks a process to end and waits for it; gives its exit code.
#[track_caller]
pub(crate) fn end(child: &mut Child) -> Option<i32> {
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::TERM).unwrap();
    let mut status = None;
    wait_until("the end of a process after SIGTERM", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().code()
}

/// Kills a process without a word.
pub(crate) fn kill(child: &mut Child) {
    // An error says that it has ended already.
    let _ = child.kill();
    child.wait().unwrap();
}

/// A server of one image. It is killed when the test forgets it.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// Where it prints to.
    pub(crate) log: PathBuf,
}

impl Server {
    /// Serves on a Unix socket of the directory.
    #[track_caller]
    pub(crate) fn on_socket(scratch: &Scratch, image: &str, options: &[&str]) -> (Self, PathBuf) {
        let path = scratch.join(format!("{image}.socket"));
        // A server that was killed leaves it.
        let _ = std::fs::remove_file(&path);
        let mut server = Self::start(scratch, image, &[&["--socket", path.to_str().unwrap()], options].concat());
        server.wait_for(|| UnixStream::connect(&path).is_ok());
        (server, path)
    }

    /// Serves on a port of the loopback interface.
    #[track_caller]
    pub(crate) fn on_port(scratch: &Scratch, image: &str, options: &[&str]) -> (Self, u16) {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let mut server = Self::start(scratch, image, &[&["--listen", &address.to_string()], options].concat());
        server.wait_for(|| TcpStream::connect(address).is_ok());
        (server, address.port())
    }

    fn start(scratch: &Scratch, image: &str, options: &[&str]) -> Self {
        let log = scratch.join(format!("{image}.server"));
        let mut command = scratch.command(&[&["serve", image], options].concat());
        let output = File::options().create(true).append(true).open(&log).unwrap();
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        Self { child: command.spawn().unwrap(), log }
    }

    #[track_caller]
    fn wait_for(&mut self, answers: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !answers() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "no server, {ended:?}: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything that it has printed.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end: it does so, and well.
    #[track_caller]
    pub(crate) fn end(mut self) {
        let code = end(&mut self.child);
        assert_eq!(code, Some(0), "{}", self.said());
    }

    /// Kills it in the middle of what it does; it must have been alive.
    #[track_caller]
    pub(crate) fn kill(mut self) {
        let ended = self.child.try_wait().unwrap();
        assert_eq!(ended, None, "the server ended by itself: {}", self.said());
        kill(&mut self.child);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}
