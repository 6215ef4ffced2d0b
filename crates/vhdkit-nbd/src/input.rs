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
    gathering: Gathering,
}

/// How many replies to send together, learned from what the client does. A client with many requests in flight has other
/// replies to take while some are held back for a moment, and taking those together costs it less.
#[derive(Debug)]
struct Gathering {
    /// So many are sent together, if requests come as fast as that.
    target: u32,
    /// So many times the target stays before a larger one is tried, as the last try was in vain.
    hold: u32,
    /// What that becomes when the next try is in vain.
    next_hold: u32,
}

impl Gathering {
    const TARGET_MAX: u32 = 16;
    const HOLD_MAX: u32 = 64;

    const fn new() -> Self {
        Self { target: 1, hold: 0, next_hold: 1 }
    }

    /// As many as wanted came together.
    fn reached(&mut self) {
        if self.hold > 0 {
            self.hold -= 1;
        } else if self.target < Self::TARGET_MAX {
            self.target += 1;
        } else {
            self.next_hold = 1;
        }
    }

    /// Only so many came.
    fn missed(&mut self, count: u32) {
        self.target = count.clamp(1, self.target);
        self.hold = self.next_hold;
        self.next_hold = (self.next_hold * 2).min(Self::HOLD_MAX);
    }
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
            patience: Patience { poll: poll.then_some(POLL_MAX), credit: 0, gathering: Gathering::new() },
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

    /// Whether another request comes in the next moment, with which the replies to the last `count` could be sent; it is
    /// received then. Never for a client that sends one request after the other.
    pub(crate) fn gather(&mut self, channel: &Channel, count: u32) -> io::Result<bool> {
        if self.patience.credit == 0 {
            return Ok(false);
        }
        if count >= self.patience.gathering.target {
            self.patience.gathering.reached();
            return Ok(false);
        }
        let found = self.receive_within(channel, NEXT_TIME)?;
        if found.is_none() {
            self.patience.gathering.missed(count);
        }
        Ok(found.is_some_and(|count| count > 0))
    }

    /// Moves what is there to the front, so that there is as much room as there can be behind it.
    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Receives what comes within a time; `None` when that is nothing, 0 at the end.
    fn receive_within(&mut self, channel: &Channel, time: Duration) -> io::Result<Option<usize>> {
        self.make_room();
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        let found = look(channel, &mut self.receiver, room, time)?;
        self.end += found.unwrap_or_default();
        Ok(found)
    }

    /// Receives more; false when nothing comes any more. There must be room: no caller needs more than the buffer holds.
    pub(crate) fn fill(&mut self, channel: &Channel, expected: Expected) -> io::Result<bool> {
        if let Some(time) = self.patience.time(expected) {
            let found = self.receive_within(channel, time)?;
            self.patience.learn(expected, found.is_some());
            if let Some(count) = found {
                return Ok(count > 0);
            }
        }
        self.make_room();
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        let count = channel.receive(&mut self.receiver, room, RecvFlags::empty())?;
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
