//! Where clients come in: a Unix socket of our own, one at a given path, a TCP port, or what systemd made.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use listenfd::ListenFd;
use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use vhdkit::{Error, ErrorKind};
use vhdkit_nbd::{Listener, Tls};

use super::uri::Place;
use crate::args::AddressArgs;
use crate::failure::{Failure, file_error};
use crate::show;

/// How often, and after what pause, to try to be the only one who makes a socket in a directory: that takes microseconds, so
/// whoever is in the way for longer is no server.
const TURN_ATTEMPTS: u32 = 100;
const TURN_PAUSE: Duration = Duration::from_millis(20);
/// How many names are tried for a directory of our own.
const NAMES_MAX: u32 = 1000;
/// What a directory and a socket are for others: nothing. The mask takes it away while they are made, so that there is no
/// moment at which they can be reached; it makes a socket 0600 and leaves a directory its 0700.
const PRIVATE: Mode = Mode::from_raw_mode(0o177);
const PRIVATE_DIRECTORY: Mode = Mode::from_raw_mode(0o077);

/// Where the server shall listen; nothing has been made yet.
#[derive(Debug)]
pub(crate) enum Plan {
    /// In a directory of its own.
    Own,
    /// At this path.
    Socket(PathBuf),
    /// At the first of these addresses that can be had.
    Tcp(Vec<SocketAddr>),
    /// On sockets that were handed over.
    Activated(Vec<(Listener, Place)>),
}

impl Plan {
    /// What the options and the environment say. Refuses what strangers could reach.
    pub(crate) fn new(args: &AddressArgs, tls: Option<&Tls>) -> Result<Self, Failure> {
        let activated = activated()?;
        let given = args.socket.is_some() || args.listen.is_some();
        if given && !activated.is_empty() {
            return Err(Failure::usage(
                "systemd handed over sockets, so that --socket and --listen have nothing to say",
                "leave them out, or start the server without socket activation",
            ));
        }
        let check = |address: &SocketAddr| check_reach(address, tls, args.insecure);
        if !activated.is_empty() {
            for (_, place) in &activated {
                if let Place::Tcp(address) = place {
                    check(address)?;
                }
            }
            return Ok(Self::Activated(activated));
        }
        if let Some(path) = &args.socket {
            return Ok(Self::Socket(path.clone()));
        }
        let Some(text) = &args.listen else { return Ok(Self::Own) };
        let addresses = addresses(text)?;
        addresses.iter().try_for_each(check)?;
        Ok(Self::Tcp(addresses))
    }

    /// Makes what is not there yet, and listens.
    pub(crate) fn listen(self) -> Result<Sockets, Failure> {
        match self {
            Self::Own => own_socket(),
            Self::Socket(path) => {
                let path = std::path::absolute(&path).map_err(|error| file_error(&path, "cannot be named", error))?;
                let turn = turn_in(&path)?;
                clear_the_way(&path)?;
                let made = unix_socket(&path, None);
                drop(turn); // it listens now
                made
            }
            Self::Tcp(addresses) => tcp_socket(&addresses),
            Self::Activated(sockets) => {
                let (listeners, places) = sockets.into_iter().unzip();
                Ok(Sockets { listeners, places, made: None })
            }
        }
    }
}

/// Sockets that listen.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) places: Vec<Place>,
    /// What has to be removed in the end.
    pub(crate) made: Option<Made>,
}

impl Sockets {
    /// The path of a socket that was handed over and that other users may connect to.
    pub(crate) fn open_to_others(&self) -> Option<&Path> {
        let mut paths = self.places.iter().filter_map(|place| match place {
            Place::Unix(path) if self.made.is_none() => Some(path.as_path()),
            _ => None,
        });
        let is_open = |path: &&Path| fs::metadata(path).is_ok_and(|metadata| metadata.mode() & 0o022 != 0);
        paths.find(is_open)
    }
}

/// A socket in the file system that is ours. It goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Made {
    path: PathBuf,
    /// Device and inode, so that nothing that has taken its place is removed.
    identity: (u64, u64),
    /// The directory that was made for it.
    directory: Option<PathBuf>,
}

impl Made {
    /// The directory in which a file has to be removed.
    pub(crate) fn place_of_socket(&self) -> Option<&Path> {
        self.path.parent()
    }

    /// The directory in which a directory has to be removed.
    pub(crate) fn place_of_directory(&self) -> Option<&Path> {
        self.directory.as_deref().and_then(Path::parent)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| identity(&metadata) == self.identity) {
            let _ = fs::remove_file(&self.path); // a dead socket is in nobody's way
        }
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory); // stays if somebody put something in
        }
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The sockets of the protocol of systemd, which are ours when LISTEN_PID says so.
fn activated() -> Result<Vec<(Listener, Place)>, Failure> {
    // The crate takes sockets without a process ID too; those may be meant for whoever started us.
    if std::env::var_os("LISTEN_PID").is_none_or(|pid| pid.is_empty()) {
        return Ok(Vec::new());
    }
    let mut handed_over = ListenFd::from_env();
    (0..handed_over.len()).map(|index| activated_socket(&mut handed_over, index)).collect()
}

fn activated_socket(handed_over: &mut ListenFd, index: usize) -> Result<(Listener, Place), Failure> {
    let refused = |what: &str| {
        let message = format!("socket {index} of those that systemd handed over {what}");
        Failure::usage(message, "use ListenStream= with a path or an address, and Accept=no")
    };
    if let Ok(Some(listener)) = handed_over.take_unix_listener(index) {
        if !listens(listener.as_fd()) {
            return Err(refused("does not listen"));
        }
        let address = listener.local_addr().ok();
        let path = address.and_then(|address| address.as_pathname().map(Path::to_owned));
        return Ok((Listener::Unix(listener), path.map_or(Place::Unnamed, Place::Unix)));
    }
    match handed_over.take_tcp_listener(index) {
        Ok(Some(listener)) if listens(listener.as_fd()) => {
            let address = listener.local_addr().map_err(|_| refused("has no address"))?;
            Ok((Listener::Tcp(listener), Place::Tcp(address)))
        }
        Ok(Some(_)) => Err(refused("does not listen")),
        _ => Err(refused("is no stream socket of Unix or TCP")),
    }
}

fn listens(socket: BorrowedFd<'_>) -> bool {
    sockopt::socket_acceptconn(socket).unwrap_or(false)
}

/// The addresses that a text stands for: one, or those of a name.
fn addresses(text: &str) -> Result<Vec<SocketAddr>, Failure> {
    let unclear = |why: String| {
        Failure::usage(
            format!("--listen {text}: {why}"),
            "write ADDR:PORT, as 127.0.0.1:10809 or '[::1]:10809'; port 0 is any that is free",
        )
    };
    let found: Vec<SocketAddr> = match text.to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(error) => return Err(unclear(error.to_string())),
    };
    if found.is_empty() {
        return Err(unclear("the name has no address".to_owned()));
    }
    Ok(found)
}

/// Refuses an address that others can reach when nothing tells them from clients.
fn check_reach(address: &SocketAddr, tls: Option<&Tls>, insecure: bool) -> Result<(), Failure> {
    let is_known = insecure || address.ip().to_canonical().is_loopback() || tls.is_some_and(Tls::verifies_clients);
    if is_known {
        return Ok(());
    }
    let what = format!("{address} can be reached from other machines, and anybody there could use the disks");
    let hint = "serve only known clients with --tls-cert, --tls-key and --tls-client-ca, without --tls-optional; \
                or say --insecure when you trust the whole network; 127.0.0.1 and [::1] stay on this machine";
    Err(Failure::usage(what, hint))
}

fn tcp_socket(addresses: &[SocketAddr]) -> Result<Sockets, Failure> {
    let failed = |error| {
        let shown: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        let error = Error::io(format!("cannot listen on {}", shown.join(" or ")), error);
        error.with_hint("choose an address of this machine and a port that is free; below 1024 they are root's")
    };
    let listener = TcpListener::bind(addresses).map_err(failed)?;
    let place = Place::Tcp(listener.local_addr().map_err(failed)?);
    Ok(Sockets { listeners: vec![Listener::Tcp(listener)], places: vec![place], made: None })
}

/// A socket in a new directory, where those of the user's session are.
fn own_socket() -> Result<Sockets, Failure> {
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let base = session.filter(|base| base.is_absolute() && base.is_dir()).unwrap_or_else(std::env::temp_dir);
    let base = std::path::absolute(&base).map_err(|error| file_error(&base, "cannot be named", error))?;
    let id = std::process::id();
    for count in 0..NAMES_MAX {
        let directory = base.join(if count == 0 { format!("vhdkit-{id}") } else { format!("vhdkit-{id}-{count}") });
        match with_mask(PRIVATE_DIRECTORY, || DirBuilder::new().mode(0o700).create(&directory)) {
            Ok(()) => {
                let made = unix_socket(&directory.join("socket"), Some(directory.clone()));
                if made.is_err() {
                    let _ = fs::remove_dir(&directory); // the error is what matters
                }
                return made;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(file_error(&directory, "cannot make a directory for the socket", error)),
        }
    }
    let error = Error::new(ErrorKind::Exists, "there are too many directories of servers that did not end well");
    Err(error.with_path(base).with_hint("remove those named vhdkit-*, or choose a place with --socket").into())
}

/// Does something with the mask of the process set, which no other thread minds yet.
fn with_mask<T>(mask: Mode, work: impl FnOnce() -> T) -> T {
    let before = rustix::process::umask(mask);
    let done = work();
    rustix::process::umask(before);
    done
}

fn unix_socket(path: &Path, directory: Option<PathBuf>) -> Result<Sockets, Failure> {
    let listener = with_mask(PRIVATE, || UnixListener::bind(path)).map_err(|error| bind_error(path, error))?;
    let metadata = fs::symlink_metadata(path).map_err(|error| file_error(path, "cannot look at the socket", error))?;
    let made = Made { path: path.to_owned(), identity: identity(&metadata), directory };
    Ok(Sockets {
        listeners: vec![Listener::Unix(listener)],
        places: vec![Place::Unix(path.to_owned())],
        made: Some(made),
    })
}

fn bind_error(path: &Path, error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::AddrInUse => taken(path, "something is there by now", "choose another path"),
        io::ErrorKind::InvalidInput => Failure::usage(
            format!("{}: the path is too long for a Unix socket", show::path(path)),
            "choose one of fewer than 108 bytes with --socket",
        ),
        _ => file_error(path, "cannot make the socket", error),
    }
}

fn taken(path: &Path, what: &str, hint: &str) -> Failure {
    Error::new(ErrorKind::Exists, what).with_path(path).with_hint(hint).into()
}

/// Waits until no other server is about to make a socket in that directory: between the look at an old one and the new one
/// that listens nobody else may do the same.
fn turn_in(path: &Path) -> Result<fs::File, Failure> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let failed = |error| file_error(path, "cannot make the socket", error);
    let file = fs::File::open(directory).map_err(failed)?;
    for _ in 0..TURN_ATTEMPTS {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => std::thread::sleep(TURN_PAUSE),
            Err(error) => return Err(failed(error.into())),
        }
    }
    Err(taken(path, "somebody holds a lock on the directory of the socket", "choose another directory"))
}

/// Removes a socket that a server left behind; anything else stays, and is an error.
fn clear_the_way(path: &Path) -> Result<(), Failure> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(file_error(path, "cannot look at the place of the socket", error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(taken(path, "the place of the socket is taken by something else", "choose another path"));
    }
    match is_dead(path) {
        Ok(true) => fs::remove_file(path).map_err(|error| file_error(path, "cannot remove the old socket", error)),
        Ok(false) => Err(taken(path, "another server listens on this socket", "stop it, or choose another path")),
        Err(error) => Err(file_error(path, "cannot tell whether somebody listens on this socket", error)),
    }
}

/// Whether nobody listens on a socket any more.
fn is_dead(path: &Path) -> io::Result<bool> {
    // It does not wait: a server that is too busy to take a connection is a server.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED) => Ok(true),
        Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::PROTOTYPE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
