//! Bytes to and from a client: a socket, with or without TLS.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustls::ServerConnection;

/// Ciphertext that is taken from the socket at once.
const CIPHERTEXT_BYTES: usize = 32 << 10;
/// Plaintext that is made ciphertext of at once, so that what is buffered stays small.
pub(crate) const PLAINTEXT_BYTES: usize = 32 << 10;
/// What TLS needs for a connection: what comes, what goes, and a record of its own for each.
pub(crate) const TLS_BYTES: usize = CIPHERTEXT_BYTES + PLAINTEXT_BYTES + (40 << 10);
/// How a client that vanished is found out over TCP: after two minutes its place is free.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 6;
/// Room that is asked for in sockets, so that many replies can go with one call; the system may give less.
const SOCKET_BYTES: usize = 1 << 20;

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Stream {
    /// Settings for many small messages, and for finding out that the other side is gone.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        if let Self::Tcp(stream) = self {
            stream.set_nodelay(true)?;
            rustix::net::sockopt::set_socket_keepalive(stream, true)?;
            rustix::net::sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
            rustix::net::sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
            rustix::net::sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
            return Ok(());
        }
        // More room is a favour: where it is not given, what there is will do.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(self, SOCKET_BYTES);
        Ok(())
    }

    /// How long receiving and sending may take; `None` for as long as it takes.
    pub(crate) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout).and_then(|()| stream.set_write_timeout(timeout)),
            Self::Tcp(stream) => stream.set_read_timeout(timeout).and_then(|()| stream.set_write_timeout(timeout)),
        }
    }

    /// Ends receiving, or both directions. One that is closed already is no error.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    #[inline]
    pub(crate) fn receive(&self, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match rustix::net::recv(self, &mut *buffer, flags) {
                Ok((count, _)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    #[inline]
    pub(crate) fn send(&self, bytes: &[u8], flags: SendFlags) -> io::Result<usize> {
        loop {
            match rustix::net::send(self, bytes, flags | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    pub(crate) fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = self.send(bytes, SendFlags::empty())?;
            bytes = bytes.get(count..).unwrap_or_default();
        }
        Ok(())
    }
}

/// A socket in the transmission phase.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) stream: Arc<Stream>,
    tls: Option<Mutex<ServerConnection>>,
}

/// The part of a channel that one thread has for receiving.
#[derive(Debug, Default)]
pub(crate) struct Receiver {
    ciphertext: Vec<u8>,
    /// What of the ciphertext was not taken yet.
    pending: std::ops::Range<usize>,
}

impl Channel {
    pub(crate) fn new(stream: Arc<Stream>, tls: Option<ServerConnection>) -> Self {
        Self { stream, tls: tls.map(Mutex::new) }
    }

    /// Sends bytes, waiting for the client.
    pub(crate) fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        if self.tls.is_none() {
            return self.stream.send_all(bytes);
        }
        for piece in bytes.chunks(PLAINTEXT_BYTES) {
            if let Some(encoded) = self.encode(piece)? {
                self.stream.send_all(&encoded)?;
            }
        }
        Ok(())
    }

    /// Receives some bytes; 0 when the client sends no more. With `DONTWAIT`, an error of kind `WouldBlock` when there
    /// are none.
    #[inline]
    pub(crate) fn receive(&self, receiver: &mut Receiver, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        match &self.tls {
            None => self.stream.receive(buffer, flags),
            Some(tls) => loop {
                match self.receive_tls(tls, receiver, buffer, flags) {
                    // What came was no data yet; without `DONTWAIT` that is no reason to return.
                    Ok(None) if !flags.contains(RecvFlags::DONTWAIT) => {}
                    Ok(None) => return Err(io::ErrorKind::WouldBlock.into()),
                    Ok(Some(count)) => return Ok(count),
                    Err(error) => return Err(error),
                }
            },
        }
    }

    /// As [`Channel::receive`], but looks at the socket once only: `None` when what came was no data yet.
    pub(crate) fn receive_once(&self, receiver: &mut Receiver, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match &self.tls {
            None => self.stream.receive(buffer, RecvFlags::empty()).map(Some),
            Some(tls) => self.receive_tls(tls, receiver, buffer, RecvFlags::empty()),
        }
    }

    fn receive_tls(
        &self,
        tls: &Mutex<ServerConnection>,
        receiver: &mut Receiver,
        buffer: &mut [u8],
        flags: RecvFlags,
    ) -> io::Result<Option<usize>> {
        if let Some(count) = decode(tls, receiver, buffer)? {
            return Ok(Some(count));
        }
        receiver.ciphertext.resize(CIPHERTEXT_BYTES, 0);
        let count = self.stream.receive(&mut receiver.ciphertext, flags)?;
        receiver.pending = 0..count;
        if count == 0 {
            return Ok(Some(0));
        }
        decode(tls, receiver, buffer)
    }

    /// What goes over the wire for some bytes; `None` when they go as they are. Whoever calls this sends what it gives
    /// before it is called again.
    pub(crate) fn encode(&self, plain: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let Some(tls) = &self.tls else { return Ok(None) };
        let mut tls = lock(tls);
        let mut encoded = Vec::with_capacity(plain.len() + plain.len() / 512 + 256);
        tls.writer().write_all(plain)?;
        while tls.wants_write() {
            tls.write_tls(&mut encoded)?;
        }
        Ok(Some(encoded))
    }

    /// The last words of TLS.
    pub(crate) fn farewell(&self) -> Vec<u8> {
        let mut encoded = Vec::new();
        if let Some(tls) = &self.tls {
            let mut tls = lock(tls);
            tls.send_close_notify();
            while tls.wants_write() && tls.write_tls(&mut encoded).is_ok() {}
        }
        encoded
    }
}

/// Takes plaintext out of what was received; `None` when that is not enough for any.
fn decode(tls: &Mutex<ServerConnection>, receiver: &mut Receiver, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let mut tls = lock(tls);
    loop {
        match tls.reader().read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // An end without a farewell may be an attacker's; to us it is an end like any other.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Some(0)),
            other => return other.map(Some),
        }
        if receiver.pending.is_empty() {
            return Ok(None);
        }
        let mut bytes = receiver.ciphertext.get(receiver.pending.clone()).unwrap_or_default();
        let before = bytes.len();
        tls.read_tls(&mut bytes)?;
        receiver.pending.start += before - bytes.len();
        tls.process_new_packets().map_err(io::Error::other)?;
    }
}

fn lock(tls: &Mutex<ServerConnection>) -> MutexGuard<'_, ServerConnection> {
    tls.lock().unwrap_or_else(PoisonError::into_inner) // a panic inside ends the connection
}
