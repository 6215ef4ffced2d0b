//! Requests that have to wait, done by worker threads.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use vhdkit::image::{BlockDevice, ExtentKind};

use crate::budget::Reservation;
use crate::connection::Session;
use crate::counters::Totals;
use crate::handshake::{ALLOCATION_ID, Contexts, DEPTH_ID, Mode};
use crate::pool::Work;
use crate::replies::{HEAD_BYTES_MAX, To, errno_of};
use crate::wire::{Errno, STATE_HOLE_ZERO};

/// A read that may come in parts is answered in parts of this.
const READ_PART_BYTES: u64 = 1 << 20;
/// Zeroing and trimming is done in steps of this at least, so that others can pass; larger blocks make larger steps.
const STEP_BYTES: u64 = 256 << 20;
/// The most blocks of a step.
const STEP_BLOCKS: u64 = 256;
/// Where space has to be written to be there, steps are as short as this, and have no more parts.
const PROVISION_STEP_BYTES: u64 = 4 << 20;
const PROVISION_STEP_PARTS: usize = 256;
/// Filling the cache is done in steps of this.
const CACHE_STEP_BYTES: u64 = 4 << 20;
/// The most extents in a reply to a block status request.
const EXTENTS_MAX: usize = 4096;
/// The most ranges that are looked at for such a reply, as many of them may be alike.
const EXTENTS_SEEN_MAX: usize = 256 << 10;
/// The most bytes of the disk that are looked at for it.
const STATUS_BYTES_MAX: u64 = 4 << 40;
/// Zeros to write from.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// A request that will be answered: in any case, and once.
#[derive(Debug)]
pub(crate) struct Request {
    session: Arc<Session>,
    to: To,
    held: Option<Reservation>,
    answered: bool,
}

impl Request {
    pub(crate) fn new(session: Arc<Session>, to: To, held: Option<Reservation>) -> Self {
        Self { session, to, held, answered: false }
    }

    fn device(&self) -> &Arc<dyn BlockDevice> {
        self.session.device()
    }

    /// Sends a part of the answer.
    fn send_part(&self, bytes: Vec<u8>) {
        self.session.deliver(bytes, None);
    }

    /// Sends the (rest of the) answer.
    fn send(mut self, bytes: Vec<u8>) {
        self.answered = true;
        self.session.deliver(bytes, self.held.take());
    }

    fn answer(self, result: Result<(), Errno>) {
        let mut bytes = Vec::with_capacity(64);
        match result {
            Ok(()) => self.to.ok(&mut bytes),
            Err(error) => {
                self.session.count(&Totals { errors: 1, ..Totals::default() });
                self.to.error(error, &mut bytes);
            }
        }
        self.send(bytes);
    }

    /// Tells the log of a failure; the client gets its number.
    fn judge<T>(&self, what: &'static str, writing: bool, result: vhdkit::Result<T>) -> Result<T, Errno> {
        result.map_err(|error| {
            let export = self.session.export().name();
            tracing::warn!(export, request = what, offset = self.to.offset, %error, "request failed");
            errno_of(&error, writing)
        })
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.answered {
            // Whoever had it panicked.
            let mut bytes = Vec::new();
            self.to.error(Errno::Io, &mut bytes);
            self.session.deliver(bytes, self.held.take());
        }
    }
}

/// What a request asks for.
#[derive(Debug)]
pub(crate) enum Job {
    Read {
        offset: u64,
        length: u32,
        whole: bool,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
        through: bool,
    },
    /// All flushes of the session that wait.
    Flushes,
    /// The end of a write that has to be durable.
    FlushFor,
    Clear {
        range: Range<u64>,
        through: bool,
        how: Clear,
    },
    Cache {
        range: Range<u64>,
    },
    Status {
        range: Range<u64>,
        only_one: bool,
        contexts: Contexts,
    },
}

impl Job {
    /// Whether it is done in steps, of which there may be very many, or looks at much.
    pub(crate) const fn is_stepped(&self) -> bool {
        matches!(self, Self::Clear { .. } | Self::Cache { .. } | Self::Status { .. })
    }
}

/// How a range is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clear {
    /// It is not needed any more.
    Discard,
    /// It reads as zero afterwards.
    Zero,
    /// It reads as zero, and has all its space.
    Provision,
    /// The same, but only where that is fast.
    ProvisionFast,
}

/// A request and what it asks for.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) request: Request,
    pub(crate) job: Job,
}

impl Task {
    /// Does all of it, on this thread.
    pub(crate) fn run(self) {
        let mut next: Option<Box<dyn Work>> = Some(Box::new(self));
        while let Some(work) = next {
            next = work.step();
        }
    }
}

impl Work for Task {
    fn step(self: Box<Self>) -> Option<Box<dyn Work>> {
        let Self { request, job } = *self;
        let given_up = match job {
            Job::Read { .. } => request.session.is_deserted(),
            _ => job.is_stepped() && request.session.is_given_up(),
        };
        if given_up {
            return None; // nobody waits for it any more
        }
        match job {
            Job::Read { offset, length, whole } => read(request, offset, length, whole),
            Job::Write { offset, data, through } => {
                let device = request.device();
                let written =
                    if through { device.write_through_at(&data, offset) } else { device.write_at(&data, offset) };
                let result = request.judge("write", true, written);
                drop(data);
                request.answer(result);
            }
            Job::Flushes => flushes(request),
            Job::FlushFor => {
                let result = request.judge("flush", true, request.device().flush());
                request.answer(result);
            }
            Job::Clear { range, through, how } => return clear(request, range, through, how),
            Job::Cache { range } => return cache(request, range),
            Job::Status { range, only_one, contexts } => status(request, range, only_one, contexts),
        }
        None
    }
}

/// Reads, waiting for whatever has to be waited for.
fn read(request: Request, offset: u64, length: u32, whole: bool) {
    let in_parts = request.to.mode != Mode::Simple && !whole;
    let end = offset + u64::from(length); // lies on the disk
    let mut position = offset;
    loop {
        let part = if in_parts { (end - position).min(READ_PART_BYTES) } else { end - position };
        let part = u32::try_from(part).unwrap_or(u32::MAX); // a request has at most 32 MiB
        let done = position + u64::from(part) == end;
        match read_part(&request, position, part, in_parts, done) {
            Ok(bytes) if done => return request.send(bytes),
            Ok(bytes) => {
                request.send_part(bytes);
                if request.session.is_deserted() {
                    return;
                }
            }
            Err(error) => return request.answer(Err(error)),
        }
        position += u64::from(part);
    }
}

/// A part of a read as it goes over the wire.
fn read_part(request: &Request, offset: u64, length: u32, may_be_hole: bool, done: bool) -> Result<Vec<u8>, Errno> {
    let (to, device) = (request.to, request.device());
    let count = usize::try_from(length).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(count + HEAD_BYTES_MAX).map_err(|_| Errno::NoMemory)?;
    to.data_head(offset, length, done, &mut bytes);
    let head = bytes.len();
    bytes.resize(head + count, 0);
    let data = bytes.get_mut(head..).unwrap_or_default();
    request.judge("read", false, device.read_at(data, offset))?;
    // Whether it was a hole is not asked: it had to be waited for, and the next one of the same block will not have to be.
    if may_be_hole && is_zero(data) {
        bytes.clear();
        bytes.shrink_to(64);
        to.hole(offset, length, done, &mut bytes);
    }
    Ok(bytes)
}

/// Whether all bytes are zero; for data it mostly ends with the first ones.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// One flush for all of the session's that wait.
fn flushes(request: Request) {
    let session = Arc::clone(&request.session);
    let others = session.take_flushes();
    let result = request.judge("flush", true, request.device().flush());
    request.answer(result);
    for other in others {
        other.answer(result);
    }
}

/// Zeroes or trims a step, and leaves the rest for later.
fn clear(request: Request, range: Range<u64>, through: bool, how: Clear) -> Option<Box<dyn Work>> {
    if how == Clear::ProvisionFast {
        // What is refused must not have changed anything: all of it is looked at before the first step.
        if let Err(error) = has_all_its_space(&request, range.clone()) {
            request.answer(Err(error));
            return None;
        }
        return clear(request, range, through, Clear::Provision);
    }
    let stop = match how {
        Clear::Provision | Clear::ProvisionFast => provision_step(&request, range.clone()),
        Clear::Discard | Clear::Zero => clear_step(&request, range.clone(), how),
    };
    let result = match stop {
        Ok(stop) if stop < range.end => {
            return Some(Box::new(Task { request, job: Job::Clear { range: stop..range.end, through, how } }));
        }
        other => other.map(|_| ()),
    };
    let flushed = result.and_then(|()| match through {
        true => request.judge("flush", true, request.device().flush()),
        false => Ok(()),
    });
    request.answer(flushed);
    None
}

/// Zeroes or trims the first part of a range; where that ends.
fn clear_step(request: &Request, range: Range<u64>, how: Clear) -> Result<u64, Errno> {
    let device = request.device();
    let unit = device.allocation_unit().max(1);
    let step = (unit.saturating_mul(STEP_BLOCKS)).min(STEP_BYTES.max(unit));
    // Steps end where blocks end, so that no block is cut in two.
    let stop = (range.start / unit * unit).saturating_add(step).min(range.end);
    if how == Clear::Discard {
        request.judge("trim", true, device.discard(range.start..stop))?;
    } else {
        request.judge("write zeroes", true, device.write_zeroes(range.start..stop, true))?;
    }
    Ok(stop)
}

/// Zeroes the first part of a range and gives it all its space; where that ends.
fn provision_step(request: &Request, range: Range<u64>) -> Result<u64, Errno> {
    let device = request.device();
    let mut parts = Vec::new();
    let (mut stop, mut to_write) = (range.start, PROVISION_STEP_BYTES);
    let ahead = range.start..range.end.min(range.start.saturating_add(STEP_BYTES));
    let seen = device.visit_extents(ahead, &mut |extent| {
        let is_data = matches!(extent.kind, ExtentKind::Data { .. });
        let length = if is_data { extent.length } else { extent.length.min(to_write) };
        parts.push((extent.start..extent.start + length, is_data));
        stop = extent.start + length; // lies on the disk
        to_write -= if is_data { 0 } else { length };
        let full = to_write == 0 || parts.len() == PROVISION_STEP_PARTS;
        if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    request.judge("write zeroes", true, seen)?;
    for (part, is_data) in parts {
        let done = if is_data { device.write_zeroes(part, false) } else { write_zeros(device.as_ref(), part) };
        request.judge("write zeroes", true, done)?;
    }
    Ok(stop)
}

/// Refuses a range of which some has no space, as that would have to be written, and one that is too scattered to tell.
fn has_all_its_space(request: &Request, range: Range<u64>) -> Result<(), Errno> {
    let (mut all_data, mut count) = (true, 0);
    let seen = request.device().visit_extents(range, &mut |extent| {
        count += 1;
        all_data = matches!(extent.kind, ExtentKind::Data { .. }) && count < EXTENTS_SEEN_MAX;
        if all_data { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    request.judge("write zeroes", true, seen)?;
    if all_data { Ok(()) } else { Err(Errno::NotSupported) }
}

fn write_zeros(device: &dyn BlockDevice, range: Range<u64>) -> vhdkit::Result<()> {
    let mut position = range.start;
    while position < range.end {
        let left = usize::try_from(range.end - position).unwrap_or(usize::MAX);
        let zeros = ZEROS.get(..left.min(ZEROS.len())).unwrap_or(&ZEROS);
        device.write_at(zeros, position)?;
        position += zeros.len() as u64; // at most what is left
    }
    Ok(())
}

/// Reads a step for the page cache, and leaves the rest for later.
fn cache(request: Request, range: Range<u64>) -> Option<Box<dyn Work>> {
    let stop = range.end.min(range.start.saturating_add(CACHE_STEP_BYTES));
    let mut buffer = vec![0; ZEROS.len()];
    let mut position = range.start;
    while position < stop {
        let left = usize::try_from(stop - position).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        let part = buffer.get_mut(..length).unwrap_or_default();
        if let Err(error) = request.judge("cache", false, request.device().read_at(part, position)) {
            request.answer(Err(error));
            return None;
        }
        position += length as u64;
    }
    if stop < range.end {
        return Some(Box::new(Task { request, job: Job::Cache { range: stop..range.end } }));
    }
    request.answer(Ok(()));
    None
}

/// The most bytes of a reply to a block status request.
pub(crate) fn status_bytes_max(only_one: bool, contexts: Contexts) -> u64 {
    let extents = if only_one { 1 } else { EXTENTS_MAX as u64 };
    let chunk = HEAD_BYTES_MAX as u64 + extents * 16;
    chunk * (u64::from(contexts.allocation) + u64::from(contexts.depth))
}

/// Lengths and flags of one context, joined where they are alike.
#[derive(Debug, Default)]
struct Extents {
    list: Vec<(u64, u32)>,
    full: bool,
}

impl Extents {
    /// Adds a range; what does not fit any more is left out, and so is all that comes after it.
    fn add(&mut self, length: u64, flags: u32, max: usize) {
        let is_last = self.list.len() == max;
        match self.list.last_mut() {
            _ if self.full => {}
            Some((before, same)) if *same == flags => *before += length, // the sum lies on the disk
            _ if is_last => self.full = true,
            _ => self.list.push((length, flags)),
        }
    }
}

fn status(request: Request, range: Range<u64>, only_one: bool, contexts: Contexts) {
    let max = if only_one { 1 } else { EXTENTS_MAX };
    let (mut allocation, mut depth) = (Extents::default(), Extents::default());
    let mut seen = 0;
    let range = range.start..range.end.min(range.start.saturating_add(STATUS_BYTES_MAX));
    let visited = request.device().visit_extents(range, &mut |extent| {
        let (state, layer) = match extent.kind {
            ExtentKind::Data { .. } => (0, extent.layer + 1),
            ExtentKind::Zero => (STATE_HOLE_ZERO, extent.layer + 1),
            ExtentKind::Hole => (STATE_HOLE_ZERO, 0),
        };
        allocation.add(extent.length, state, max);
        depth.add(extent.length, u32::try_from(layer).unwrap_or(u32::MAX), max);
        seen += 1;
        let full = (allocation.full || !contexts.allocation) && (depth.full || !contexts.depth);
        if full || seen == EXTENTS_SEEN_MAX { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    // What was seen before a bad entry is true, and is an answer.
    if let Err(error) = request.judge("block status", false, visited)
        && allocation.list.is_empty()
    {
        return request.answer(Err(error));
    }
    let mut bytes = Vec::new();
    let mut left = u8::from(contexts.allocation) + u8::from(contexts.depth);
    for (chosen, id, extents) in [(contexts.allocation, ALLOCATION_ID, allocation), (contexts.depth, DEPTH_ID, depth)] {
        if chosen {
            left -= 1;
            request.to.block_status(id, &extents.list, left == 0, &mut bytes);
        }
    }
    request.send(bytes);
}
