//! Replies on their way to a client, from the thread of its connection and from workers.
//!
//! One thread sends at a time, and sends what others have put into the queue meanwhile. Workers never wait for a client: what
//! the socket does not take at once is left to a thread of its own, which exists as long as the client does not keep up.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::net::SendFlags;

use crate::budget::Reservation;
use crate::channel::{Channel, PLAINTEXT_BYTES};

/// Bytes for a client, and the right to have them in memory.
#[derive(Debug)]
struct Parcel {
    bytes: Vec<u8>,
    /// How many of them are sent, or with TLS were made ciphertext of.
    taken: usize,
    /// Ciphertext that is to be sent first, and how much of it is.
    encoded: Vec<u8>,
    sent: usize,
    _held: Option<Reservation>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Parcel>,
    /// Somebody sends, or waits for the client to take more.
    sending: bool,
    /// Nothing can be sent any more.
    broken: bool,
}

/// The replies of one connection.
#[derive(Debug)]
pub(crate) struct Outgoing {
    channel: Channel,
    state: Mutex<State>,
    idle: Condvar,
}

impl Outgoing {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel, state: Mutex::default(), idle: Condvar::new() }
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether nothing can be sent any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.lock().broken
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // changed by single steps, whole at any moment
    }

    /// Takes a reply from a worker. True when the client did not take all of it at once.
    pub(crate) fn deliver(self: &Arc<Self>, bytes: Vec<u8>, held: Option<Reservation>) -> bool {
        let mut state = self.lock();
        if state.broken {
            return false; // nobody is there to take it
        }
        state.queue.push_back(Parcel { bytes, taken: 0, encoded: Vec::new(), sent: 0, _held: held });
        if state.sending {
            return false; // whoever sends takes this along
        }
        state.sending = true;
        drop(state);
        match self.send_queue(SendFlags::DONTWAIT) {
            Ok(()) => false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.leave_to_drainer();
                true
            }
            Err(_) => {
                self.give_up();
                false
            }
        }
    }

    /// Sends what the connection's own thread has, after what is in the queue; waits for the client.
    pub(crate) fn send(&self, bytes: &[u8], may_be_alone: bool) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if may_be_alone {
            // No request is in flight: nobody else has anything to send, and only this thread makes requests.
            let sent = self.channel.send_all(bytes);
            if sent.is_err() {
                self.give_up();
            }
            return sent;
        }
        let state = self.lock();
        let mut state = self.idle.wait_while(state, |state| state.sending).unwrap_or_else(PoisonError::into_inner);
        if state.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.sending = true;
        drop(state);
        let unwinding = GiveUp(self);
        let sent = self.channel.send_all(bytes).and_then(|()| self.send_queue(SendFlags::empty()));
        std::mem::forget(unwinding);
        if sent.is_err() {
            self.give_up();
        }
        sent
    }

    /// Waits until everything is sent, or nothing can be.
    pub(crate) fn wait_until_idle(&self) {
        drop(self.idle.wait_while(self.lock(), |state| state.sending));
    }

    /// Sends the queue until it is empty, and stops being the one who sends then. On an error it still is.
    fn send_queue(&self, flags: SendFlags) -> io::Result<()> {
        loop {
            let mut state = self.lock();
            let Some(mut parcel) = state.queue.pop_front() else {
                state.sending = false;
                drop(state);
                self.idle.notify_all();
                return Ok(());
            };
            drop(state);
            let unwinding = GiveUp(self);
            let sent = self.send_parcel(&mut parcel, flags);
            std::mem::forget(unwinding);
            if sent.is_err() {
                self.lock().queue.push_front(parcel);
                return sent;
            }
        }
    }

    fn send_parcel(&self, parcel: &mut Parcel, flags: SendFlags) -> io::Result<()> {
        loop {
            if let Some(rest) = parcel.encoded.get(parcel.sent..).filter(|rest| !rest.is_empty()) {
                parcel.sent += self.channel.stream.send(rest, flags)?;
                continue;
            }
            let rest = parcel.bytes.get(parcel.taken..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(());
            }
            let piece = rest.get(..PLAINTEXT_BYTES).unwrap_or(rest);
            match self.channel.encode(piece)? {
                Some(encoded) => {
                    parcel.taken += piece.len();
                    (parcel.encoded, parcel.sent) = (encoded, 0);
                }
                None => parcel.taken += self.channel.stream.send(rest, flags)?,
            }
        }
    }

    /// Starts a thread that waits for the client.
    fn leave_to_drainer(self: &Arc<Self>) {
        let outgoing = Arc::clone(self);
        let drain = move || {
            if outgoing.send_queue(SendFlags::empty()).is_err() {
                outgoing.give_up();
            }
        };
        let started = std::thread::Builder::new().name("nbd-drain".to_owned()).stack_size(64 << 10).spawn(drain);
        if let Err(error) = started {
            tracing::warn!(%error, "no thread to wait for a slow client; it is cut off");
            self.give_up();
        }
    }

    /// Nothing can be sent any more: forgets what is in the queue, and lets the connection's thread find out.
    pub(crate) fn give_up(&self) {
        let mut state = self.lock();
        state.broken = true;
        state.sending = false;
        let queue = std::mem::take(&mut state.queue);
        drop(state);
        self.idle.notify_all();
        drop(queue);
        self.channel.stream.shutdown(Shutdown::Both);
    }
}

/// Whoever sends and panics must not leave others waiting for the end of it. Forgotten when all went well.
struct GiveUp<'a>(&'a Outgoing);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}
