//! One connection: its handshake, and then its requests, answered at once or left to the workers.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use vhdkit::image::{AtOnce, BlockDevice};

use crate::budget::{Budget, FLOOR_BYTES, Flight, Full, Reservation};
use crate::channel::{Channel, Receiver, Stream, TLS_BYTES};
use crate::counters::{Counters, Totals};
use crate::export::{Export, Exports};
use crate::handshake::{Agreed, Handshake, Mode, Progress, TlsState};
use crate::input::{Expected, INPUT_BYTES, Input};
use crate::jobs::{Clear, Job, Request, Task, status_bytes_max};
use crate::outgoing::Outgoing;
use crate::pool::{self, Pool, Work};
use crate::replies::{HEAD_BYTES_MAX, Sink, To, errno_of};
use crate::requests::{Command, Header, Judge, Verdict, decode, header_bytes};
use crate::tls::Tls;
use crate::wire::{Errno, command};

/// Replies that are put together before they are sent, at most: a part of a read and some small ones.
const OUTPUT_BYTES: usize = PART_BYTES + 4096;
/// Longer reads are answered in parts of this. It is small enough for a part to be still in the processor's cache when it is
/// sent.
const PART_BYTES: usize = 256 << 10;
/// What a connection may have in memory whatever others have: its buffers, those of TLS, and a little in flight.
pub(crate) const CONNECTION_BYTES: u64 = (INPUT_BYTES + OUTPUT_BYTES + TLS_BYTES) as u64 + FLOOR_BYTES;
/// How long the last words of TLS may take.
const FAREWELL_TIME: Duration = Duration::from_secs(1);

/// What all connections of a server share.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) exports: Exports,
    pub(crate) tls: Option<Tls>,
    pub(crate) handshake_time: Duration,
    pub(crate) poll: bool,
    /// Of each export, in their order.
    pub(crate) pools: Vec<Pools>,
    /// No more requests are taken.
    pub(crate) stopping: AtomicBool,
    /// What is under way for long ends at its next step.
    pub(crate) cut_off: AtomicBool,
    pub(crate) budget: Arc<Budget>,
    pub(crate) counters: Counters,
}

impl Common {
    /// Lets the worker threads end.
    pub(crate) fn end_pools(&self) {
        for pools in &self.pools {
            pools.waiting.end();
            pools.stepped.end();
        }
    }

    fn pools_of(&self, export: &Arc<Export>) -> Option<Pools> {
        let index = self.exports.0.iter().position(|other| Arc::ptr_eq(other, export))?;
        self.pools.get(index).cloned()
    }
}

/// The worker threads of an export: those of a disk that hangs are no use to others.
#[derive(Clone, Debug)]
pub(crate) struct Pools {
    pub(crate) waiting: Arc<Pool>,
    pub(crate) stepped: Arc<Pool>,
}

impl Pools {
    pub(crate) fn new(all_threads: &Arc<AtomicUsize>) -> Self {
        let pool = |limits| Arc::new(Pool::new(limits, all_threads));
        Self { waiting: pool(pool::WAITING), stepped: pool(pool::STEPPED) }
    }
}

/// A connection in the transmission phase, as workers share it.
#[derive(Debug)]
pub(crate) struct Session {
    id: u64,
    agreed: Agreed,
    outgoing: Arc<Outgoing>,
    flight: Arc<Flight>,
    common: Arc<Common>,
    pools: Option<Pools>,
    /// The client is gone, without a word.
    gone: AtomicBool,
    flushes: Mutex<Flushes>,
}

/// Flushes that wait for one to be done for all of them.
#[derive(Debug, Default)]
struct Flushes {
    /// The first of them is with the workers, and nobody has begun with it.
    handed_over: bool,
    others: Vec<Request>,
}

impl Session {
    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        self.agreed.export.device()
    }

    pub(crate) fn export(&self) -> &Export {
        &self.agreed.export
    }

    pub(crate) fn count(&self, more: &Totals) {
        self.common.counters.add(more);
    }

    pub(crate) fn deliver(&self, bytes: Vec<u8>, held: Option<Reservation>) {
        if self.outgoing.deliver(bytes, held) {
            self.count(&Totals { stalls: 1, ..Totals::default() });
        }
    }

    /// Whether nothing can be sent to the client any more.
    pub(crate) fn is_deserted(&self) -> bool {
        self.outgoing.is_broken()
    }

    /// Whether work of many steps is to end before it is done: nobody waits for it, or nobody can wait any longer.
    pub(crate) fn is_given_up(&self) -> bool {
        let cut_off = self.common.cut_off.load(Ordering::Relaxed);
        cut_off || self.gone.load(Ordering::Relaxed) || self.is_deserted()
    }

    pub(crate) fn take_flushes(&self) -> Vec<Request> {
        let mut flushes = self.flushes.lock().unwrap_or_else(PoisonError::into_inner);
        flushes.handed_over = false;
        std::mem::take(&mut flushes.others)
    }
}

/// How a client left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// It said so.
    SaidSo,
    /// Nothing comes any more.
    Silent,
}

/// Why a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client said so, or sends no more.
    Regular,
    /// What the client sent makes no sense.
    Protocol(&'static str),
    /// The connection broke.
    Broken(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// What the handshake led to.
pub(crate) struct Established {
    agreed: Agreed,
    channel: Channel,
    /// What the client sent already, and ciphertext of the same.
    rest: Vec<u8>,
    receiver: Receiver,
}

/// Does the handshake, within its time. `keeps_place` is asked before a client is told that it is let in.
pub(crate) fn shake_hands(
    common: &Common,
    stream: &Arc<Stream>,
    keeps_place: &dyn Fn() -> bool,
) -> Result<Option<Established>, End> {
    let deadline = Instant::now() + common.handshake_time;
    let hurry = || {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { stream.set_timeout(Some(left)) }
    };
    let state = match &common.tls {
        None => TlsState::None,
        Some(tls) if tls.is_required() => TlsState::Required,
        Some(_) => TlsState::Offered,
    };
    let mut output = Vec::new();
    let mut handshake = Handshake::new(&common.exports, state, &mut output);
    let mut channel = Channel::new(Arc::clone(stream), None);
    let (mut input, mut receiver, mut bytes) = (Vec::new(), Receiver::default(), [0; 4096]);
    loop {
        let (used, progress) = handshake.advance(&input, &mut output);
        input.drain(..used);
        if matches!(progress, Progress::Transmission(_)) && !keeps_place() {
            return Ok(None);
        }
        send_hurried(&channel, &output, &hurry)?;
        output.clear();
        match progress {
            Progress::More => {}
            Progress::Again => continue,
            Progress::Abort => return Ok(None),
            Progress::Close(why) => return Err(End::Protocol(why)),
            Progress::Transmission(agreed) => {
                stream.set_timeout(None)?;
                return Ok(Some(Established { agreed, channel, rest: input, receiver }));
            }
            Progress::StartTls => {
                let Some(tls) = &common.tls else { return Err(End::Protocol("TLS without a certificate")) };
                if !input.is_empty() {
                    return Err(End::Protocol("the client did not wait for TLS before it went on"));
                }
                let connection = tls.accept(stream, &|| hurry().is_err())?;
                channel = Channel::new(Arc::clone(stream), Some(connection));
                handshake.tls_started();
                continue;
            }
        }
        match channel.receive_once(&mut receiver, &mut bytes) {
            Ok(Some(0)) => return Ok(None),
            Ok(Some(count)) => input.extend_from_slice(bytes.get(..count).unwrap_or_default()),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // too late, as is found above
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends what belongs to a handshake: a client that takes it slowly runs out of time like one that says nothing.
fn send_hurried(channel: &Channel, bytes: &[u8], hurry: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    let encoded = channel.encode(bytes)?;
    let mut rest = encoded.as_deref().unwrap_or(bytes);
    hurry()?;
    while !rest.is_empty() {
        match channel.stream.send(rest, SendFlags::empty()) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // too late, as is found below
            Err(error) => return Err(error),
        }
        hurry()?;
    }
    Ok(())
}

/// Replies that are put together, in a buffer that never grows.
#[derive(Debug)]
struct Output {
    bytes: Box<[u8]>,
    used: usize,
}

impl Sink for Output {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.used..self.used + bytes.len()) {
            room.copy_from_slice(bytes);
            self.used += bytes.len();
        }
    }
}

impl Output {
    fn room(&self) -> usize {
        self.bytes.len() - self.used
    }
}

/// The thread of a connection, after the handshake.
pub(crate) struct Connection {
    session: Arc<Session>,
    judge: Judge,
    input: Input,
    output: Output,
    totals: Totals,
    /// Requests that came together.
    together: u32,
}

impl Drop for Connection {
    /// Also where the thread panicked: nobody serves this client any more, and what was begun for it ends before its place is
    /// free.
    fn drop(&mut self) {
        self.session.gone.store(true, Ordering::Relaxed);
        self.session.outgoing.give_up();
        self.session.flight.wait_for_all();
    }
}

impl Connection {
    pub(crate) fn new(common: Arc<Common>, id: u64, established: Established) -> Self {
        let Established { agreed, channel, rest, receiver } = established;
        let judge = Judge {
            mode: agreed.mode,
            contexts: agreed.contexts,
            size: agreed.export.size(),
            writable: agreed.export.is_writable(),
        };
        let export = Arc::clone(&agreed.export);
        let mut input = Input::new(common.poll, receiver);
        input.put_first(&rest);
        let session = Session {
            id,
            agreed,
            outgoing: Arc::new(Outgoing::new(channel)),
            flight: Arc::default(),
            pools: common.pools_of(&export),
            common,
            gone: AtomicBool::new(false),
            flushes: Mutex::default(),
        };
        let output = Output { bytes: vec![0; OUTPUT_BYTES].into_boxed_slice(), used: 0 };
        Self { session: Arc::new(session), judge, input, output, totals: Totals::default(), together: 0 }
    }

    /// Serves until the client goes. What it asked for is done and answered before this returns, but for work of many steps,
    /// which ends early unless the client said that it goes.
    pub(crate) fn run(&mut self) -> End {
        let (said_so, end) = match self.serve() {
            Ok(Leave::SaidSo) => (true, End::Regular),
            Ok(Leave::Silent) => (self.session.common.stopping.load(Ordering::SeqCst), End::Regular),
            Err(end) => (false, end),
        };
        // What has begun is done and answered all the same, but nothing long is.
        self.session.gone.store(!said_so, Ordering::Relaxed);
        let flushed = self.flush();
        self.session.flight.wait_for_all();
        if flushed.is_ok() && matches!(end, End::Regular) {
            let channel = self.session.outgoing.channel();
            let _ = channel.stream.set_timeout(Some(FAREWELL_TIME)); // a courtesy, for which nobody waits long
            let _ = channel.stream.send_all(&channel.farewell());
        }
        end
    }

    fn serve(&mut self) -> Result<Leave, End> {
        loop {
            while let Some(header) = self.next_header()? {
                if !self.request(&header)? {
                    let said_so = header.command == command::DISCONNECT;
                    return Ok(if said_so { Leave::SaidSo } else { Leave::Silent });
                }
            }
            if self.session.common.stopping.load(Ordering::Relaxed) {
                return Ok(Leave::Silent);
            }
            // Replies wait for others only as long as there is room for many more.
            let few = self.output.used > 0 && self.output.room() > PART_BYTES / 2;
            if few && self.input.gather(self.session.outgoing.channel(), self.together)? {
                continue;
            }
            let together = std::mem::take(&mut self.together);
            let begun = !self.input.available().is_empty();
            if !self.receive(if begun { Expected::Rest } else { Expected::Request(together) })? {
                // Less than a request is left: the client went in the middle of one, or is done.
                return Ok(Leave::Silent);
            }
        }
    }

    /// Sends what there is and receives more; false at the end.
    fn receive(&mut self, expected: Expected) -> Result<bool, End> {
        self.flush()?;
        Ok(self.input.fill(self.session.outgoing.channel(), expected)?)
    }

    /// Sends what was put together.
    #[inline]
    fn flush(&mut self) -> io::Result<()> {
        // Whatever becomes of it: some of it may have gone, and must not go twice.
        let used = std::mem::take(&mut self.output.used);
        if used > 0 {
            let bytes = self.output.bytes.get(..used).unwrap_or_default();
            self.session.outgoing.send(bytes, self.session.flight.is_empty())?;
        }
        self.session.common.counters.add(&std::mem::take(&mut self.totals));
        Ok(())
    }

    fn make_room(&mut self, bytes: usize) -> io::Result<()> {
        if self.output.room() < bytes { self.flush() } else { Ok(()) }
    }

    /// The next request, if all of its header is there. It stays in the input.
    #[inline]
    fn next_header(&self) -> Result<Option<Header>, End> {
        let available = self.input.available();
        if available.len() < header_bytes(self.judge.mode) {
            return Ok(None);
        }
        let header = decode(self.judge.mode, available);
        header.map(Some).ok_or(End::Protocol("a request does not begin with its magic number"))
    }

    /// Does one request; false when it was the last one.
    fn request(&mut self, header: &Header) -> Result<bool, End> {
        self.input.consume(header_bytes(self.judge.mode));
        self.together = self.together.saturating_add(1);
        let to = To { mode: self.judge.mode, cookie: header.cookie, offset: header.offset };
        let verdict = self.judge.judge(header);
        match verdict {
            Verdict::Run(Command::Read { offset, length, whole }) => self.read(to, offset, length, whole)?,
            Verdict::Run(Command::Write { offset, length, through }) => self.write(to, offset, length, through)?,
            Verdict::Run(Command::NarrowedStatus { offset, only_one, payload }) => {
                let payload = usize::try_from(payload).unwrap_or(usize::MAX);
                if !self.await_bytes(payload)? {
                    return Ok(false);
                }
                let bytes = self.input.available().get(..payload).unwrap_or_default();
                let narrowed = self.judge.narrow(offset, only_one, bytes);
                self.input.consume(payload);
                match narrowed {
                    Ok(command) => self.wait_for(to, command)?,
                    Err(error) => self.refuse(to, error)?,
                }
            }
            Verdict::Run(Command::Disconnect) => return Ok(false),
            Verdict::Run(command) => self.wait_for(to, command)?,
            Verdict::Refuse(error, payload) => {
                if !self.skip(payload)? {
                    return Ok(false);
                }
                self.refuse(to, error)?;
            }
            Verdict::Close(why) => return Err(End::Protocol(why)),
        }
        Ok(true)
    }

    fn refuse(&mut self, to: To, error: Errno) -> Result<(), End> {
        self.totals.errors += 1;
        self.make_room(128)?;
        to.error(error, &mut self.output);
        Ok(())
    }

    /// Makes sure that so many bytes are there, which fit into the input; false when the client goes before.
    fn await_bytes(&mut self, count: usize) -> Result<bool, End> {
        while self.input.available().len() < count {
            if !self.receive(Expected::Rest)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Throws a payload away; false when the client goes before its end.
    fn skip(&mut self, mut left: u64) -> Result<bool, End> {
        while left > 0 {
            if self.input.available().is_empty() && !self.receive(Expected::Rest)? {
                return Ok(false);
            }
            let count = self.input.available().len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.input.consume(count);
            left -= count as u64;
        }
        Ok(true)
    }

    #[inline]
    fn read(&mut self, to: To, offset: u64, length: u32, whole: bool) -> Result<(), End> {
        self.totals.reads += 1;
        self.totals.bytes_read += u64::from(length);
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        if count == 0 {
            self.make_room(HEAD_BYTES_MAX)?;
            to.end_of_read(&mut self.output);
            return Ok(());
        }
        if count <= PART_BYTES {
            let read = self.read_part(to, offset, length, !whole, true)?;
            return if read { Ok(()) } else { self.offload(to, Job::Read { offset, length, whole }, length.into()) };
        }
        if to.mode == Mode::Simple || whole {
            return self.offload(to, Job::Read { offset, length, whole }, length.into());
        }
        let (end, mut position) = (offset + u64::from(length), offset); // lies on the disk
        while position < end {
            let part_bytes = PART_BYTES as u64;
            let stop = ((position / part_bytes + 1) * part_bytes).min(end);
            let part = u32::try_from(stop - position).unwrap_or(u32::MAX);
            if !self.read_part(to, position, part, true, stop == end)? {
                // The parts before go first: the worker says when the reply is complete.
                self.flush()?;
                let length = u32::try_from(end - position).unwrap_or(u32::MAX);
                return self.offload(to, Job::Read { offset: position, length, whole: false }, length.into());
            }
            position = stop;
        }
        Ok(())
    }

    /// Reads a part of a request, not longer than [`PART_BYTES`], if that can be had at once. An error is an answer too.
    #[inline]
    fn read_part(&mut self, to: To, offset: u64, length: u32, may_be_hole: bool, done: bool) -> Result<bool, End> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        self.make_room(HEAD_BYTES_MAX + count)?;
        let start = self.output.used + to.data_head_bytes();
        let Some(data) = self.output.bytes.get_mut(start..start + count) else { return Ok(false) };
        match self.session.device().read_at_once(data, offset) {
            Ok(AtOnce::Zero) if may_be_hole && to.mode != Mode::Simple => {
                to.hole(offset, length, done, &mut self.output);
            }
            Ok(outcome @ (AtOnce::Filled | AtOnce::Zero)) => {
                if outcome == AtOnce::Zero {
                    data.fill(0);
                }
                to.data_head(offset, length, done, &mut self.output);
                self.output.used += count;
            }
            // Whoever waits finds out whether the error is one.
            Ok(AtOnce::Waits) | Err(_) => return Ok(false),
        }
        Ok(true)
    }

    #[inline]
    fn write(&mut self, to: To, offset: u64, length: u32, through: bool) -> Result<(), End> {
        self.totals.writes += 1;
        self.totals.bytes_written += u64::from(length);
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        if count > INPUT_BYTES - HEAD_BYTES_MAX {
            return self.write_long(to, offset, count, through);
        }
        if !self.await_bytes(count)? {
            return Err(End::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let data = self.input.available().get(..count).unwrap_or_default();
        let written = if through { Ok(false) } else { self.session.device().write_at_once(data, offset) };
        if matches!(written, Ok(true)) {
            self.input.consume(count);
            self.make_room(HEAD_BYTES_MAX)?;
            to.ok(&mut self.output);
            return Ok(());
        }
        self.totals.waited += 1;
        let held = self.reserve(length.into())?;
        let data = self.input.available().get(..count).unwrap_or_default();
        let Some(held) = held else { return self.write_here(to, offset, count, through) };
        let data = data.to_vec();
        self.input.consume(count);
        let request = Request::new(Arc::clone(&self.session), to, Some(held));
        self.hand_over(Task { request, job: Job::Write { offset, data, through } })
    }

    /// Writes what is in the input, waiting for the medium.
    fn write_here(&mut self, to: To, offset: u64, count: usize, through: bool) -> Result<(), End> {
        self.flush()?;
        let data = self.input.available().get(..count).unwrap_or_default();
        let device = self.session.device();
        let written = if through { device.write_through_at(data, offset) } else { device.write_at(data, offset) };
        let outcome = written.map_err(|error| self.failed("write", offset, &error));
        self.input.consume(count);
        match outcome {
            Err(error) => self.refuse(to, error),
            Ok(()) => {
                self.make_room(HEAD_BYTES_MAX)?;
                to.ok(&mut self.output);
                Ok(())
            }
        }
    }

    /// Tells the log of a failure; the client gets its number.
    fn failed(&self, request: &'static str, offset: u64, error: &vhdkit::Error) -> Errno {
        let export = self.session.export().name();
        tracing::warn!(export, request, offset, %error, "request failed");
        errno_of(error, request == "write")
    }

    /// Writes what is longer than the input, piece by piece as it comes.
    fn write_long(&mut self, to: To, offset: u64, count: usize, through: bool) -> Result<(), End> {
        self.flush()?; // a piece may have to wait for the medium
        let (mut left, mut position) = (count, offset);
        let mut outcome = Ok(());
        while left > 0 {
            // Pieces end at multiples of their size, so that no page is written in two halves.
            let to_edge = INPUT_BYTES / 2 - usize::try_from(position % (INPUT_BYTES as u64 / 2)).unwrap_or_default();
            let piece = left.min(to_edge);
            if !self.await_bytes(piece)? {
                return Err(End::Broken(io::ErrorKind::UnexpectedEof.into()));
            }
            let data = self.input.available().get(..piece).unwrap_or_default();
            if outcome.is_ok() {
                let device = self.session.device();
                let written = match device.write_at_once(data, position) {
                    Ok(true) => Ok(()),
                    _ => device.write_at(data, position),
                };
                outcome = written.map_err(|error| self.failed("write", position, &error));
            }
            self.input.consume(piece);
            position += piece as u64; // lies on the disk
            left -= piece;
        }
        match outcome {
            Err(error) => self.refuse(to, error),
            Ok(()) if through => self.offload(to, Job::FlushFor, 0),
            Ok(()) => {
                self.make_room(HEAD_BYTES_MAX)?;
                to.ok(&mut self.output);
                Ok(())
            }
        }
    }

    /// What is never done on this thread.
    fn wait_for(&mut self, to: To, command: Command) -> Result<(), End> {
        let job = match command {
            Command::Flush => {
                self.totals.flushes += 1;
                return self.flush_disk(to);
            }
            Command::Trim { start, end, through } => {
                self.totals.trims += 1;
                Job::Clear { range: start..end, through, how: Clear::Discard }
            }
            Command::WriteZeroes { start, end, through, no_hole, fast } => {
                self.totals.zeroes += 1;
                let how = match (no_hole, fast) {
                    (false, _) => Clear::Zero,
                    (true, false) => Clear::Provision,
                    (true, true) => Clear::ProvisionFast,
                };
                Job::Clear { range: start..end, through, how }
            }
            Command::Cache { start, end } => {
                self.totals.caches += 1;
                Job::Cache { range: start..end }
            }
            Command::BlockStatus { start, end, only_one, contexts } => {
                self.totals.block_statuses += 1;
                let job = Job::Status { range: start..end, only_one, contexts };
                return self.offload(to, job, status_bytes_max(only_one, contexts));
            }
            Command::Read { .. } | Command::Write { .. } | Command::NarrowedStatus { .. } | Command::Disconnect => {
                return self.refuse(to, Errno::Invalid); // done elsewhere
            }
        };
        self.offload(to, job, 0)
    }

    /// Flushes that wait are done together.
    fn flush_disk(&mut self, to: To) -> Result<(), End> {
        let Some(held) = self.reserve(0)? else { return self.run_here(to, Job::Flushes) };
        let request = Request::new(Arc::clone(&self.session), to, Some(held));
        {
            let mut flushes = self.session.flushes.lock().unwrap_or_else(PoisonError::into_inner);
            if flushes.handed_over {
                flushes.others.push(request);
                return Ok(());
            }
            flushes.handed_over = true;
        }
        self.hand_over(Task { request, job: Job::Flushes })
    }

    /// Leaves a request to the workers.
    fn offload(&mut self, to: To, job: Job, bytes: u64) -> Result<(), End> {
        self.totals.waited += 1;
        match self.reserve(bytes)? {
            Some(held) => {
                let request = Request::new(Arc::clone(&self.session), to, Some(held));
                self.hand_over(Task { request, job })
            }
            None => self.run_here(to, job),
        }
    }

    /// Reserves memory; `None` when others have it all: then this thread has to do it.
    fn reserve(&mut self, bytes: u64) -> Result<Option<Reservation>, End> {
        loop {
            if self.session.is_deserted() {
                return Err(End::Broken(io::ErrorKind::BrokenPipe.into()));
            }
            match self.session.flight.reserve(&self.session.common.budget, bytes) {
                Ok(held) => return Ok(Some(held)),
                Err(Full::Server) => return Ok(None),
                Err(Full::Connection) => {
                    self.flush()?;
                    self.session.flight.wait_for_one();
                }
            }
        }
    }

    fn hand_over(&mut self, task: Task) -> Result<(), End> {
        let is_stepped = task.job.is_stepped();
        let task: Box<dyn Work> = Box::new(task);
        let pools = self.session.pools.as_ref();
        let pushed = match pools.map(|pools| if is_stepped { &pools.stepped } else { &pools.waiting }) {
            Some(pool) => pool.push(self.session.id, task),
            None => Err(task),
        };
        match pushed {
            Ok(()) => Ok(()),
            Err(mut work) => {
                self.flush()?;
                while let Some(next) = work.step() {
                    work = next;
                }
                Ok(())
            }
        }
    }

    /// Does a request on this thread, after everything that went before it was sent.
    fn run_here(&mut self, to: To, job: Job) -> Result<(), End> {
        self.flush()?;
        if let Job::Read { offset, length, whole } = job {
            return self.read_here(to, offset, length, whole);
        }
        Task { request: Request::new(Arc::clone(&self.session), to, None), job }.run();
        // Nothing is reserved for the reply: this thread must not send before it has gone.
        self.session.outgoing.wait_until_idle();
        Ok(())
    }

    /// Reads with no more memory than the output has, waiting for the medium.
    fn read_here(&mut self, to: To, offset: u64, length: u32, whole: bool) -> Result<(), End> {
        let end = offset + u64::from(length); // lies on the disk
        if to.mode == Mode::Simple || whole {
            return self.read_under_one_head(to, offset, end);
        }
        let mut position = offset;
        while position < end {
            let stop = end.min(position + PART_BYTES as u64);
            let part = u32::try_from(stop - position).unwrap_or(u32::MAX);
            if let Err(error) = self.read_piece(to.data_head_bytes(), position, stop)? {
                return self.refuse(to, error);
            }
            to.data_head(position, part, stop == end, &mut self.output);
            self.output.used += usize::try_from(part).unwrap_or(usize::MAX);
            position = stop;
        }
        Ok(())
    }

    /// The same for a reply that has one head for all its data: until the last byte has gone, nothing else may be sent. So
    /// everything else is sent before, and as only this thread makes requests, nothing comes up meanwhile.
    fn read_under_one_head(&mut self, to: To, offset: u64, end: u64) -> Result<(), End> {
        self.flush()?;
        self.session.flight.wait_for_all();
        self.session.outgoing.wait_until_idle();
        let mut position = offset;
        while position < end {
            let stop = end.min(position + PART_BYTES as u64);
            let head = if position == offset { to.data_head_bytes() } else { 0 };
            match self.read_piece(head, position, stop)? {
                Ok(()) => {}
                Err(error) if position == offset => return self.refuse(to, error),
                Err(_) => {
                    // Whatever came now would be taken for data.
                    self.session.outgoing.give_up();
                    return Err(End::Broken(io::Error::other("a read failed after a part of it was sent")));
                }
            }
            if position == offset {
                to.data_head(offset, u32::try_from(end - offset).unwrap_or(u32::MAX), true, &mut self.output);
            }
            self.output.used += usize::try_from(stop - position).unwrap_or(usize::MAX);
            position = stop;
        }
        Ok(self.flush()?)
    }

    /// Reads a piece of the disk into the output, behind room for a head.
    fn read_piece(&mut self, head: usize, start: u64, stop: u64) -> Result<Result<(), Errno>, End> {
        let count = usize::try_from(stop - start).unwrap_or(usize::MAX);
        self.make_room(HEAD_BYTES_MAX + count)?;
        let from = self.output.used + head;
        let data = self.output.bytes.get_mut(from..from + count).unwrap_or_default(); // there is room now
        let read = self.session.device().read_at(data, start);
        Ok(read.map_err(|error| self.failed("read", start, &error)))
    }
}
