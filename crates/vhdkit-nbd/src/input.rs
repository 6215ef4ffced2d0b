//! What a client has sent and nobody has taken yet.

use std::io;
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;

use crate::channel::{Channel, Receiver};

/// Bytes that are received at once, and the most that a request and its payload may have to be taken as a whole.
pub(crate) const INPUT_BYTES: usize = 256 << 10;

/// With polling: how long to look for bytes before sleeping, at most.
const POLL_MAX: Duration = Duration::from_micros(100);
/// How long to look for the rest of a request whose beginning is there: it comes in the next moment, if at all.
const REST_TIME: Duration = Duration::from_micros(50);
/// How long to look for another request of a client that sends them in numbers: about what it costs to sleep and to be woken,
/// so that in the worst case a sleep costs twice as much.
const NEXT_TIME: Duration = Duration::from_micros(10);
/// How often that may be in vain: looks that found something count one, those that did not four.
const CREDIT_MAX: u32 = 16;
const CREDIT_OF_FAILURE: u32 = 4;
/// Looking is a system call: so many pauses of the processor lie between two looks.
const PAUSES: u32 = 16;

/// Bytes that came in, in a buffer that never grows.
#[derive(Debug)]
pub(crate) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    receiver: Receiver,
    patience: Patience,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// More of a request that has begun.
    Rest,
    /// Another request, after so many that came together.
    Request(u32),
}

/// How long to look for bytes before sleeping. Sleeping costs this thread little, but the client has to wake it then, which
/// costs more than all the rest of sending a request.
#[derive(Debug)]
struct Patience {
    /// With polling: how long to look for the next request.
    poll: Option<Duration>,
    /// Without: whether the client sends so many that another one is likely to come at once.
    credit: u32,
}

impl Patience {
    fn time(&mut self, expected: Expected) -> Option<Duration> {
        match expected {
            Expected::Rest => return Some(REST_TIME),
            Expected::Request(together) if together > 1 => self.credit = (self.credit + 2).min(CREDIT_MAX),
            Expected::Request(_) => {}
        }
        self.poll.or((self.credit > 0).then_some(NEXT_TIME))
    }

    /// What came in time makes it look as long the next time; what did not makes it look half as long, down to a few looks,
    /// which find out when the client is quick again.
    fn learn(&mut self, expected: Expected, found: bool) {
        if expected == Expected::Rest {
            return;
        }
        if let Some(poll) = &mut self.poll {
            *poll = if found { POLL_MAX } else { (*poll / 2).max(POLL_MAX / 32) };
        }
        self.credit =
            if found { (self.credit + 1).min(CREDIT_MAX) } else { self.credit.saturating_sub(CREDIT_OF_FAILURE) };
    }
}

impl Input {
    pub(crate) fn new(poll: bool, receiver: Receiver) -> Self {
        Self {
            bytes: vec![0; INPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            receiver,
            patience: Patience { poll: poll.then_some(POLL_MAX), credit: 0 },
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
    pub(crate) fn fill(&mut self, channel: &Channel, expected: Expected) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        let mut found = None;
        if let Some(time) = self.patience.time(expected) {
            found = look(channel, &mut self.receiver, room, time)?;
            self.patience.learn(expected, found.is_some());
        }
        let count = match found {
            Some(count) => count,
            None => channel.receive(&mut self.receiver, room, RecvFlags::empty())?,
        };
        self.end += count;
        Ok(count > 0)
    }
}

/// Receives what comes within a time; `None` when that is nothing.
fn look(channel: &Channel, receiver: &mut Receiver, room: &mut [u8], time: Duration) -> io::Result<Option<usize>> {
    let start = Instant::now();
    loop {
        match channel.receive(receiver, room, RecvFlags::DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other.map(Some),
        }
        if start.elapsed() >= time {
            return Ok(None);
        }
        (0..PAUSES).for_each(|_| std::hint::spin_loop());
    }
}
