//! The server: listeners, connections, and the end of both.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::budget::{Budget, SERVER_BYTES_MAX};
use crate::channel::Stream;
use crate::connection::{CONNECTION_BYTES, Common, Connection, End, Pools, shake_hands};
use crate::counters::{Counters, Totals};
use crate::export::{Export, Exports};
use crate::tls::Tls;

/// The most connections that can be allowed: what each of them has for itself is within the server's bound then.
const CONNECTIONS_MAX: usize = 256;
/// How often the log tells of clients that are turned away.
const WARNING_PAUSE: Duration = Duration::from_secs(1);
/// How long to leave a listener alone that cannot give connections, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where clients come from.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP port.
    Tcp(TcpListener),
}

impl Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    /// The next client, if there is one.
    fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match self {
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream)),
            // The last ones: the client went before it was its turn.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most connections at a time, from 1 to 256. Those beyond are turned away.
    pub connections_max: usize,
    /// Certificate and key, where TLS is offered.
    pub tls: Option<Tls>,
    /// Ends the server when it had no connection for so long.
    pub idle_exit: Option<Duration>,
    /// Whether threads look for requests for a little while before they sleep: quicker answers for more processor time.
    pub poll: bool,
    /// How long a handshake may take, TLS included.
    pub handshake_time: Duration,
    /// How long clients have to take their replies once the server was asked to stop.
    pub drain_time: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections_max: 128,
            tls: None,
            idle_exit: None,
            poll: false,
            handshake_time: Duration::from_secs(10),
            drain_time: Duration::from_secs(10),
        }
    }
}

/// Why a server cannot be made of what it was given.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// What the server, its connections and its handles share about its life.
#[derive(Debug)]
struct Control {
    wake: OwnedFd,
    connections: Mutex<BTreeMap<u64, Client>>,
    ended: Condvar,
}

/// A client that has a place.
#[derive(Debug)]
struct Client {
    stream: Arc<Stream>,
    /// It has not said yet what it wants.
    shakes_hands: bool,
}

impl Control {
    fn connections(&self) -> MutexGuard<'_, BTreeMap<u64, Client>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner) // changed by single steps
    }

    fn wake(&self) {
        // An eventfd takes so many of these that it never has to wait; if it were full, it would be awake.
        let _ = rustix::io::write(&self.wake, &[1; 8]);
    }
}

/// Stops a server, and tells what it does, from anywhere.
#[derive(Clone, Debug)]
pub struct Handle {
    control: Arc<Control>,
    common: Arc<Common>,
}

impl Handle {
    /// Asks the server to stop: no more connections and requests; what is under way is done and answered.
    pub fn stop(&self) {
        self.common.stopping.store(true, Ordering::SeqCst);
        self.control.wake();
    }

    /// What it has done so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.common.counters.totals()
    }

    /// How many connections there are at this moment.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.control.connections().len()
    }
}

/// An NBD server.
#[derive(Debug)]
pub struct Server {
    options: Options,
    common: Arc<Common>,
    control: Arc<Control>,
    /// When the log was told of clients that were turned away.
    warned: Mutex<Option<Instant>>,
}

impl Server {
    /// A server for some exports.
    ///
    /// # Errors
    /// [`StartError`] without exports, with two of the same name, and for limits that are out of bounds.
    pub fn new(exports: Vec<Export>, options: Options) -> Result<Self, StartError> {
        let mut names = HashSet::new();
        if exports.is_empty() {
            return Err(StartError("there is nothing to serve".to_owned()));
        }
        if let Some(twice) = exports.iter().find(|export| !names.insert(export.name())) {
            return Err(StartError(format!("two exports have the name \"{}\"", twice.name())));
        }
        if !(1..=CONNECTIONS_MAX).contains(&options.connections_max) {
            return Err(StartError(format!("the limit of connections has to lie between 1 and {CONNECTIONS_MAX}")));
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| StartError(format!("cannot make an eventfd: {error}")))?;
        let own = options.connections_max as u64 * CONNECTION_BYTES;
        let all_threads = Arc::default();
        let common = Common {
            pools: exports.iter().map(|_| Pools::new(&all_threads)).collect(),
            exports: Exports(exports.into_iter().map(Arc::new).collect()),
            tls: options.tls.clone(),
            handshake_time: options.handshake_time,
            poll: options.poll,
            stopping: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
            budget: Arc::new(Budget::new(SERVER_BYTES_MAX.saturating_sub(own))),
            counters: Counters::default(),
        };
        let control = Control { wake, connections: Mutex::default(), ended: Condvar::new() };
        Ok(Self { options, common: Arc::new(common), control: Arc::new(control), warned: Mutex::default() })
    }

    /// What stops it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { control: Arc::clone(&self.control), common: Arc::clone(&self.common) }
    }

    /// Serves until [`Handle::stop`], or until it was idle for as long as the options say. When it returns no request is
    /// under way; disks are neither flushed nor closed: they are not the server's.
    ///
    /// # Errors
    /// The operating system's, when listening is not possible; connections that there were have ended.
    pub fn run(&self, listeners: Vec<Listener>) -> io::Result<()> {
        let listened = self.listen(&listeners);
        drop(listeners);
        self.drain();
        listened
    }

    fn listen(&self, listeners: &[Listener]) -> io::Result<()> {
        for listener in listeners {
            listener.set_nonblocking()?;
        }
        let mut next_id = 0;
        let mut idle_since = Instant::now();
        let mut was_busy = false;
        let mut pause = false;
        while !self.common.stopping.load(Ordering::SeqCst) {
            // The end of the last connection wakes this thread, and only then it begins to be idle.
            let is_busy = self.handle().connections() > 0;
            if is_busy || was_busy {
                idle_since = Instant::now();
            }
            was_busy = is_busy;
            let idle_left = self.options.idle_exit.map(|limit| limit.saturating_sub(idle_since.elapsed()));
            if idle_left.is_some_and(|left| left.is_zero()) {
                tracing::info!("no connection for a while: the server ends");
                return Ok(());
            }
            let ready = self.wait(listeners, pause, idle_left)?;
            pause = false;
            for listener in ready {
                match listener.accept() {
                    Ok(Some(stream)) => {
                        next_id += 1;
                        idle_since = Instant::now();
                        self.begin(next_id, stream);
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        pause = true;
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits for clients, for being woken, or for the end of the time.
    fn wait<'a>(
        &self,
        listeners: &'a [Listener],
        pause: bool,
        idle_left: Option<Duration>,
    ) -> io::Result<Vec<&'a Listener>> {
        let listening = if pause { &[] } else { listeners };
        let mut polled = vec![PollFd::new(&self.control.wake, PollFlags::IN)];
        polled.extend(listening.iter().map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
        let time = [idle_left, pause.then_some(ACCEPT_PAUSE)].into_iter().flatten().min();
        // A little later than due, so that the time is over then.
        let time = time.and_then(|time| Timespec::try_from(time + Duration::from_millis(1)).ok());
        match poll(&mut polled, time.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready.first() == Some(&true) {
            let _ = rustix::io::read(&self.control.wake, &mut [0_u8; 8]); // it was only to wake this thread
        }
        Ok(listening
            .iter()
            .zip(ready.iter().skip(1))
            .filter(|(_, ready)| **ready)
            .map(|(listener, _)| listener)
            .collect())
    }

    /// Gives a client a thread.
    fn begin(&self, id: u64, stream: Stream) {
        let count = |more: Totals| self.common.counters.add(&more);
        let stream = Arc::new(stream);
        if !self.has_place() {
            self.warn_of_crowd();
            return count(Totals { turned_away: 1, ..Totals::default() });
        }
        self.control.connections().insert(id, Client { stream: Arc::clone(&stream), shakes_hands: true });
        count(Totals { connections: 1, ..Totals::default() });
        let registered = Registered { id, control: Arc::clone(&self.control) };
        let common = Arc::clone(&self.common);
        let serve = move || {
            let registered = registered; // ends with this thread, however it ends
            let served = catch_unwind(AssertUnwindSafe(|| converse(&common, &registered, &stream)));
            if served.is_err() {
                tracing::error!(connection = id, "a connection panicked");
                stream.shutdown(Shutdown::Both);
            }
        };
        let thread = std::thread::Builder::new().name("nbd-connection".to_owned()).stack_size(512 << 10);
        if let Err(error) = thread.spawn(serve) {
            tracing::warn!(%error, "no thread for a connection: a client is turned away");
        }
    }

    /// Whether there is a place for one more. Where all are taken, whoever has shaken hands for the longest time loses his: so
    /// strangers, who come no further, keep nobody out for long.
    fn has_place(&self) -> bool {
        let mut connections = self.control.connections();
        if connections.len() < self.options.connections_max {
            return true;
        }
        let slowest = connections.iter().find(|(_, client)| client.shakes_hands).map(|(id, _)| *id);
        let Some(client) = slowest.and_then(|id| connections.remove(&id)) else { return false };
        drop(connections);
        client.stream.shutdown(Shutdown::Both);
        self.common.counters.add(&Totals { turned_away: 1, ..Totals::default() });
        self.warn_of_crowd();
        true
    }

    fn warn_of_crowd(&self) {
        let mut last = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= WARNING_PAUSE) {
            *last = Some(Instant::now());
            tracing::warn!(limit = self.options.connections_max, "too many connections: clients are turned away");
        }
    }

    /// Lets what is under way end.
    fn drain(&self) {
        // A listener that failed ends the server too.
        self.common.stopping.store(true, Ordering::SeqCst);
        for client in self.control.connections().values() {
            client.stream.shutdown(Shutdown::Read);
        }
        let deadline = Instant::now() + self.options.drain_time;
        let mut connections = self.control.connections();
        while !connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(count = connections.len(), "clients whose requests or replies take longer are cut off");
                self.common.cut_off.store(true, Ordering::SeqCst);
                for client in connections.values() {
                    client.stream.shutdown(Shutdown::Both);
                }
                break;
            }
            let waited = self.control.ended.wait_timeout(connections, left);
            connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        // What is left waits for the disk, as everybody has to.
        drop(self.control.ended.wait_while(connections, |connections| !connections.is_empty()));
        self.common.end_pools();
    }
}

/// A connection that is known to the server; not any more when dropped.
struct Registered {
    id: u64,
    control: Arc<Control>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let client = self.control.connections().remove(&self.id);
        drop(client);
        self.control.ended.notify_all();
        self.control.wake(); // the time of being idle may begin
    }
}

impl Registered {
    /// The client has said what it wants, and keeps its place. False when it has lost that before.
    fn established(&self) -> bool {
        let mut connections = self.control.connections();
        let client = connections.get_mut(&self.id);
        client.map(|client| client.shakes_hands = false).is_some()
    }
}

/// All that is said on one connection.
fn converse(common: &Arc<Common>, registered: &Registered, stream: &Arc<Stream>) {
    let id = registered.id;
    let count = |more: Totals| common.counters.add(&more);
    let established =
        stream.prepare().map_err(End::from).and_then(|()| shake_hands(common, stream, &|| registered.established()));
    let end = match established {
        Ok(Some(established)) => {
            tracing::debug!(connection = id, "connected");
            Connection::new(Arc::clone(common), id, established).run()
        }
        Ok(None) => {
            tracing::debug!(connection = id, "went without a request");
            return stream.shutdown(Shutdown::Both);
        }
        Err(end) => {
            count(Totals { handshakes_failed: 1, ..Totals::default() });
            end
        }
    };
    stream.shutdown(Shutdown::Both);
    match end {
        End::Regular => tracing::debug!(connection = id, "disconnected"),
        End::Protocol(why) => {
            count(Totals { protocol_errors: 1, ..Totals::default() });
            tracing::warn!(connection = id, why, "cut off");
        }
        End::Broken(error) => tracing::info!(connection = id, %error, "connection lost"),
    }
}

/// For fuzzing: one connection, on this thread. A panic of it is not caught.
pub fn fuzz(exports: Vec<Export>, stream: std::os::unix::net::UnixStream) -> Result<Totals, StartError> {
    let server = Server::new(exports, Options::default())?;
    let stream = Arc::new(Stream::Unix(stream));
    server.control.connections().insert(1, Client { stream: Arc::clone(&stream), shakes_hands: true });
    converse(&server.common, &Registered { id: 1, control: Arc::clone(&server.control) }, &stream);
    server.common.end_pools();
    Ok(server.handle().totals())
}
