//! A server that runs while a test does, and a client that knows as much of the protocol as the tests need.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Scratch;

/// How long anything here may take, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A `vhdkit serve` that is killed with the test, if it has not ended.
pub(crate) struct Server {
    child: Child,
    /// What it printed until it closed its standard output.
    pub(crate) out: String,
    stderr: PathBuf,
}

impl Server {
    /// Starts `vhdkit serve` with these arguments, and waits until it has said where.
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(scratch: &Scratch, arguments: &[S]) -> Self {
        let mut command = scratch.command::<&str>(&["serve"]);
        command.args(arguments);
        Self::run(scratch, command)
    }

    /// The same for a command that starts one.
    #[track_caller]
    pub(crate) fn run(scratch: &Scratch, mut command: Command) -> Self {
        let runtime = scratch.join("run");
        let _ = std::fs::create_dir(&runtime);
        let (_, stderr) = tempfile::NamedTempFile::new_in(&runtime).unwrap().keep().unwrap();
        command.env("XDG_RUNTIME_DIR", &runtime).env_remove("VHDKIT_LOG").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(File::create(&stderr).unwrap()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stdout.read_to_string(&mut text);
            let _ = sender.send(text);
        });
        let mut server = Self { child, out: String::new(), stderr };
        server.out = receiver.recv_timeout(PATIENCE).expect("the server closes its output");
        assert!(!server.out.is_empty(), "the server said nothing: {}", server.err());
        server
    }

    pub(crate) fn err(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The first URI.
    pub(crate) fn uri(&self) -> &str {
        self.out.lines().next().unwrap()
    }

    /// The socket in the first URI, which must have nothing that is encoded.
    #[track_caller]
    pub(crate) fn socket(&self) -> PathBuf {
        let (_, path) = self.uri().split_once("?socket=").expect("it is the URI of a Unix socket");
        assert!(!path.contains('%'), "{path}");
        PathBuf::from(path)
    }

    #[track_caller]
    pub(crate) fn client(&self, name: &str) -> Client {
        Client::connect(&self.socket(), name).unwrap()
    }

    pub(crate) fn send(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
    }

    /// Waits for a line on standard error.
    #[track_caller]
    pub(crate) fn wait_for_line(&self, words: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let err = self.err();
            if let Some(line) = err.lines().find(|line| line.contains(words)) {
                return line.to_owned();
            }
            assert!(Instant::now() < deadline, "no line with {words}: {err}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end: the exit code, and standard error.
    #[track_caller]
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self.err());
            }
            assert!(Instant::now() < deadline, "the server did not end: {}", self.err());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops it, which must go well and without a word.
    #[track_caller]
    pub(crate) fn stop(self) {
        self.send(Signal::TERM);
        assert_eq!(self.wait(), (Some(0), String::new()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client in the transmission phase, with simple replies.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    pub(crate) size: u64,
    pub(crate) flags: u16,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

impl Client {
    /// Shakes hands by NBD_OPT_GO.
    pub(crate) fn connect(socket: &Path, name: &str) -> std::io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut go = 3_u32.to_be_bytes().to_vec(); // fixed newstyle, no zeroes
        go.extend(b"IHAVEOPT");
        go.extend(7_u32.to_be_bytes());
        go.extend((name.len() as u32 + 6).to_be_bytes());
        go.extend((name.len() as u32).to_be_bytes());
        go.extend(name.as_bytes());
        go.extend(0_u16.to_be_bytes());
        stream.write_all(&go)?;
        let mut client = Self { stream, size: 0, flags: 0 };
        loop {
            let head: [u8; 20] = client.take()?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut payload = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            client.stream.read_exact(&mut payload)?;
            match kind {
                1 => return Ok(client),
                3 if payload[..2] == [0, 0] => {
                    client.size = u64::from_be_bytes(payload[2..10].try_into().unwrap());
                    client.flags = u16::from_be_bytes(payload[10..12].try_into().unwrap());
                }
                3 => {}
                _ => return Err(std::io::Error::other(format!("refused: {kind:#x}"))),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> std::io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).map(|()| bytes)
    }

    /// Sends a request without waiting for its reply.
    pub(crate) fn ask(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(1_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request).unwrap();
    }

    /// The error of the next reply, 0 for none.
    fn error(&mut self) -> u32 {
        let reply: [u8; 16] = self.take().unwrap();
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    /// Asks for bytes and takes none.
    pub(crate) fn ask_to_read(&mut self, offset: u64, length: u32) {
        self.ask(READ, offset, length, &[]);
    }

    #[track_caller]
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.ask(READ, offset, length, &[]);
        assert_eq!(self.error(), 0);
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The error of a write.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> u32 {
        self.ask(WRITE, offset, bytes.len() as u32, bytes);
        self.error()
    }

    pub(crate) fn flush(&mut self) -> u32 {
        self.ask(FLUSH, 0, 0, &[]);
        self.error()
    }

    pub(crate) fn disconnect(mut self) {
        self.ask(DISCONNECT, 0, 0, &[]);
    }

    /// Whether the server has ended the connection.
    pub(crate) fn is_over(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
    }
}
