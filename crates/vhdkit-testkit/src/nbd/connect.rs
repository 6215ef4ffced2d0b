//! Ways to a server, with time limits, and what a test wants to know about the server's process.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::fault::Fault;
use super::handshake::Handshake;
use super::transmission::Transmission;
use super::wire::{Mode, info};

/// How long a client waits for bytes, or for room to send, before the test fails.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);

/// The metadata contexts that a good client asks for.
pub const CONTEXTS: [&str; 2] = ["base:allocation", "qemu:allocation-depth"];

/// Connects to a Unix socket.
pub fn unix(path: &Path) -> io::Result<UnixStream> {
    limited(UnixStream::connect(path)?)
}

/// Gives a stream the usual time limits.
pub fn limited(stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

/// Connects to a TCP port.
pub fn tcp(address: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

/// A handshake with everything that the mode offers, up to the chosen export.
pub fn begin<S: io::Read + io::Write>(stream: S, mode: Mode, export: &str) -> Result<Transmission<S>, Fault> {
    let mut handshake = Handshake::start(stream)?;
    handshake.agree_on(mode)?;
    if mode != Mode::Simple {
        handshake.set_meta_context(export, &CONTEXTS)?;
    }
    handshake.go(export, &[info::BLOCK_SIZE, info::NAME, info::DESCRIPTION])
}

/// Asks again and again until there is an answer, or the time is up.
pub fn wait_for<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes of memory that a process has at this moment; `None` is this one.
///
/// Panics where the operating system does not tell.
#[must_use]
pub fn resident_bytes(process: Option<u32>) -> u64 {
    let process = process.map_or_else(|| "self".to_owned(), |id| id.to_string());
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("the status of the process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    let kibibytes = line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB");
    kibibytes * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_an_answer_or_with_the_time() {
        let mut count = 0;
        let answer = wait_for(Duration::from_secs(10), || {
            count += 1;
            (count == 3).then_some(count)
        });
        assert_eq!(answer, Some(3));
        assert_eq!(wait_for(Duration::from_millis(5), || None::<u8>), None);
    }

    #[test]
    fn memory_is_seen_to_grow() {
        let before = resident_bytes(None);
        // Far more than other tests of the process give back meanwhile.
        let memory = std::hint::black_box(vec![1_u8; 256 << 20]);
        assert!(resident_bytes(None) >= before + (128 << 20), "{} bytes are not seen", memory.len());
    }
}
