//! What a client has sent and nobody has taken yet.

use std::io;
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;

use crate::channel::{Channel, Receiver};

/// Bytes that are received at once, and the most that a request and its payload may have to be taken as a whole.
pub(crate) const INPUT_BYTES: usize = 256 << 10;

/// How long to keep looking for bytes before sleeping: at most, and at first.
const POLL_MAX: Duration = Duration::from_micros(100);

/// Bytes that came in, in a buffer that never grows.
#[derive(Debug)]
pub(crate) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    receiver: Receiver,
    poll: Option<Poll>,
}

/// Looking for bytes for a while before sleeping, as long as that pays.
#[derive(Debug)]
struct Poll {
    patience: Duration,
}

impl Input {
    pub(crate) fn new(poll: bool, receiver: Receiver) -> Self {
        Self {
            bytes: vec![0; INPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            receiver,
            poll: poll.then_some(Poll { patience: POLL_MAX }),
        }
    }

    /// Puts bytes before everything that is received. They came with the handshake, and are few.
    pub(crate) fn put_first(&mut self, bytes: &[u8]) {
        if let Some(room) = self.bytes.get_mut(..bytes.len()) {
            room.copy_from_slice(bytes);
            (self.start, self.end) = (0, bytes.len());
        }
    }

    /// What is there.
    #[inline]
    pub(crate) fn available(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Takes some of it away.
    #[inline]
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// Receives more; false when nothing comes any more. There must be room: no caller needs more than the buffer holds.
    pub(crate) fn fill(&mut self, channel: &Channel) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        let polled = match &mut self.poll {
            Some(poll) => poll.receive(channel, &mut self.receiver, room)?,
            None => None,
        };
        let count = match polled {
            Some(count) => count,
            None => channel.receive(&mut self.receiver, room, RecvFlags::empty())?,
        };
        self.end += count;
        Ok(count > 0)
    }
}

impl Poll {
    /// Receives what comes soon; `None` when that is nothing. What came in time makes it look as long the next time, what
    /// did not makes it look half as long, down to a few looks, which find out when the client is quick again.
    fn receive(&mut self, channel: &Channel, receiver: &mut Receiver, room: &mut [u8]) -> io::Result<Option<usize>> {
        let start = Instant::now();
        loop {
            match channel.receive(receiver, room, RecvFlags::DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => {
                    self.patience = POLL_MAX;
                    return other.map(Some);
                }
            }
            if start.elapsed() >= self.patience {
                self.patience = (self.patience / 2).max(POLL_MAX / 32);
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }
}
