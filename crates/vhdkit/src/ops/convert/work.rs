//! The workers of a conversion.

use std::io::Write;
use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::feed::{self, Action, CHUNK_BYTES, Clones, Feed, Task};
use super::{ConvertOptions, ConvertReport, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::image::BlockDevice;
use crate::ops::segments::data_runs;
use crate::ops::writer::{Piece, Placement, Target, Zeroing, write_error};
use crate::ops::{Progress, advance};
use crate::storage::Storage;
use crate::units::round_up;

/// Most threads. Writes to one file go one after another, so that more would only wait; 16 buffers are 16 MiB.
const THREADS_MAX: usize = 16;

/// What the caller asked for, and what follows from that.
pub(super) struct Setup<'a> {
    pub(super) options: &'a ConvertOptions,
    pub(super) progress: &'a dyn Progress,
    /// The target is a fixed image.
    pub(super) fixed: bool,
    /// The target's disk is a multiple of this.
    pub(super) sector: u64,
    /// The size of the target's disk, where it is known.
    pub(super) size: Option<u64>,
}

/// Where the bytes go.
pub(super) enum Output<'a> {
    Storage(Box<Target>),
    Stream { writer: &'a mut (dyn Write + Send), written: u64 },
}

/// What is done in the order of the disk.
struct Ordered<'a> {
    /// The task whose turn it is.
    turn: u64,
    output: Output<'a>,
}

#[derive(Debug, Default)]
struct Counters {
    read: AtomicU64,
    written: AtomicU64,
    cloned: AtomicU64,
    copied: AtomicU64,
    skipped: AtomicU64,
    /// Up to where the disk is done, for progress.
    done: AtomicU64,
}

fn count(counter: &AtomicU64, bytes: u64) {
    counter.fetch_add(bytes, Ordering::Relaxed);
}

/// Everything that the workers share.
struct Job<'s, 'o, 'p> {
    feed: Mutex<Feed<'s>>,
    ordered: Mutex<Ordered<'o>>,
    turned: Condvar,
    /// The first error; workers stop when there is one.
    failure: Mutex<Option<Error>>,
    stopped: AtomicBool,
    disk: Option<&'s dyn BlockDevice>,
    /// The storage of the target, unless it is a stream, and how gaps in it become zero.
    storage: Option<(Arc<dyn Storage>, Zeroing)>,
    clones: Clones,
    /// Copying inside the kernel has not failed yet.
    copying: AtomicBool,
    zero_scan: bool,
    progress: &'p dyn Progress,
    total: Option<u64>,
    counters: Counters,
}

/// A worker that panicked leaves what it held as it was; its panic ends the conversion.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the workers, then finishes the target.
pub(super) fn run(source: Source<'_>, output: Output<'_>, clones: Clones, setup: &Setup<'_>) -> Result<ConvertReport> {
    let (disk, source_size) = match &source {
        Source::Disk(disk) => (Some(*disk), Some(disk.size())),
        Source::Stream { size, .. } => (None, *size),
    };
    let storage = match &output {
        Output::Storage(target) => Some((Arc::clone(target.storage()), target.zeroing())),
        Output::Stream { .. } => None,
    };
    let kernel_copy = storage.is_some() && (setup.fixed || !setup.options.zero_scan);
    let job = Job {
        feed: Mutex::new(Feed::new(source, kernel_copy, setup.size)),
        ordered: Mutex::new(Ordered { turn: 0, output }),
        turned: Condvar::new(),
        failure: Mutex::new(None),
        stopped: AtomicBool::new(false),
        disk,
        storage,
        clones,
        copying: AtomicBool::new(true),
        zero_scan: setup.options.zero_scan,
        progress: setup.progress,
        total: source_size,
        counters: Counters::default(),
    };
    advance(setup.progress, 0, source_size)?;
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = setup.options.threads.unwrap_or(processors).clamp(1, THREADS_MAX);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| job.work());
        }
        job.work();
    });
    job.finish(source_size, setup)
}

/// Stops the others when a worker panics, so that they do not wait for its turn for ever.
struct StopOnPanic<'a, 's, 'o, 'p>(&'a Job<'s, 'o, 'p>);

impl Drop for StopOnPanic<'_, '_, '_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// What a worker keeps from task to task.
struct Scratch {
    buffer: Vec<u8>,
    runs: Vec<Range<u64>>,
    placement: Placement,
}

impl Job<'_, '_, '_> {
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        drop(lock(&self.ordered)); // nobody is between looking at the flag and beginning to wait
        self.turned.notify_all();
    }

    /// Works until nothing is left to do, or somebody failed.
    fn work(&self) {
        let _guard = StopOnPanic(self);
        let mut scratch = Scratch {
            buffer: vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(1 << 20)],
            runs: Vec::new(),
            placement: Placement::default(),
        };
        while !self.stopped.load(Ordering::Relaxed) {
            let next = lock(&self.feed).next(&mut scratch.buffer, &self.clones, &self.copying);
            let done = match next {
                Ok(None) => return,
                Ok(Some(task)) => self.perform(&task, &mut scratch),
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                lock(&self.failure).get_or_insert(error);
                self.stop();
            }
        }
    }

    fn perform(&self, task: &Task, scratch: &mut Scratch) -> Result<()> {
        let Scratch { buffer, runs, placement } = scratch;
        let length = task.guest.end - task.guest.start;
        let buffer = match task.action {
            Action::Read | Action::Filled => part_mut(buffer, 0..length)?,
            Action::Clone { .. } | Action::Copy { .. } => buffer.as_mut_slice(),
        };
        runs.clear();
        if task.action == Action::Read {
            self.read(buffer, task.guest.start)?;
        }
        if task.action == Action::Filled {
            count(&self.counters.read, length);
        }
        if self.zero_scan && matches!(task.action, Action::Read | Action::Filled) {
            data_runs(buffer, task.guest.start, runs);
            let kept: u64 = runs.iter().map(|run| run.end - run.start).sum();
            count(&self.counters.skipped, length - kept);
        } else {
            runs.push(task.guest.clone());
        }
        self.take_turn(task, buffer, runs, placement)?;
        if let Some((storage, zeroing)) = &self.storage {
            for gap in placement.gaps.drain(..) {
                zeroing.apply(storage.as_ref(), gap, &mut |_| self.advance(task.guest.start))?;
            }
            for piece in &placement.pieces {
                self.transfer(task, piece, buffer, storage.as_ref())?;
            }
        }
        self.advance(task.guest.end)
    }

    /// Waits for the task's turn and finds out where its runs go; to a stream they are written at once.
    fn take_turn(&self, task: &Task, buffer: &[u8], runs: &[Range<u64>], placement: &mut Placement) -> Result<()> {
        placement.clear();
        let mut ordered = lock(&self.ordered);
        while ordered.turn != task.number {
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(()); // nothing is placed, so that nothing is written
            }
            ordered = self.turned.wait(ordered).unwrap_or_else(PoisonError::into_inner);
        }
        for run in runs {
            match &mut ordered.output {
                Output::Storage(target) => target.place(run.clone(), placement)?,
                Output::Stream { writer, written } => {
                    write_zeros(*writer, *written..run.start, &mut |position| self.advance(position))?;
                    let bytes = part(buffer, run.start - task.guest.start..run.end - task.guest.start)?;
                    writer.write_all(bytes).map_err(|error| write_error("cannot write the stream", error))?;
                    count(&self.counters.written, run.end - run.start);
                    *written = run.end;
                }
            }
        }
        ordered.turn += 1;
        drop(ordered);
        self.turned.notify_all();
        Ok(())
    }

    /// Brings one piece to its place.
    fn transfer(&self, task: &Task, piece: &Piece, buffer: &mut [u8], storage: &dyn Storage) -> Result<()> {
        let from_start = piece.guest.start - task.guest.start;
        let length = piece.guest.end - piece.guest.start;
        let failed = |error| write_error(format!("cannot write the target at {:#x}", piece.offset), error);
        match task.action {
            Action::Read | Action::Filled => {
                let bytes = part(buffer, from_start..from_start + length)?;
                storage.write_at(bytes, piece.offset).map_err(failed)?;
                count(&self.counters.written, length);
                Ok(())
            }
            Action::Clone { layer, offset } => {
                let source = feed::layer(self.disk, layer);
                let clone =
                    |source: &dyn Storage| storage.clone_range(source, offset + from_start, piece.offset, length);
                if source.map_or(Ok(false), |source| clone(source.as_ref())).map_err(failed)? {
                    count(&self.counters.cloned, length);
                    return Ok(());
                }
                self.clones.give_up(layer);
                self.copy_by_hand(piece, 0, buffer, storage)
            }
            Action::Copy { layer, offset } => {
                let source = feed::layer(self.disk, layer);
                let copy = |source: &dyn Storage| storage.copy_range(source, offset + from_start, piece.offset, length);
                let copied = source.map_or(Ok(0), |source| copy(source.as_ref())).map_err(failed)?;
                count(&self.counters.copied, copied);
                if copied < length {
                    self.copying.store(false, Ordering::Relaxed);
                }
                self.copy_by_hand(piece, copied, buffer, storage)
            }
        }
    }

    /// Reads and writes what is left of a piece that the kernel did not clone or copy.
    fn copy_by_hand(&self, piece: &Piece, done: u64, buffer: &mut [u8], storage: &dyn Storage) -> Result<()> {
        let mut position = piece.guest.start + done;
        while position < piece.guest.end {
            let bytes = part_mut(buffer, 0..(piece.guest.end - position).min(CHUNK_BYTES))?;
            self.read(bytes, position)?;
            let offset = piece.offset + (position - piece.guest.start);
            let written = storage.write_at(bytes, offset);
            written.map_err(|error| write_error(format!("cannot write the target at {offset:#x}"), error))?;
            count(&self.counters.written, bytes.len() as u64);
            position += bytes.len() as u64;
            advance(self.progress, self.counters.done.load(Ordering::Relaxed), self.total)?;
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], start: u64) -> Result<()> {
        if let Some(disk) = self.disk {
            disk.read_at(buffer, start)?;
            count(&self.counters.read, buffer.len() as u64);
        }
        Ok(())
    }

    /// Tells how far the disk is done.
    fn advance(&self, position: u64) -> Result<()> {
        let done = self.counters.done.fetch_max(position, Ordering::Relaxed).max(position);
        advance(self.progress, done, self.total)
    }

    /// Finishes the target once all workers are done.
    fn finish(self, source_size: Option<u64>, setup: &Setup<'_>) -> Result<ConvertReport> {
        if let Some(error) = self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let stream_length = self.feed.into_inner().unwrap_or_else(PoisonError::into_inner).stream_length();
        let source_size = stream_length.or(source_size).unwrap_or_default();
        let padded = round_up(source_size, setup.sector).unwrap_or(source_size);
        let target_size = setup.size.unwrap_or(padded);
        let ordered = self.ordered.into_inner().unwrap_or_else(PoisonError::into_inner);
        let file_size = match ordered.output {
            Output::Storage(target) => target.finish(target_size, setup.progress)?,
            Output::Stream { writer, written } => {
                let total = Some(target_size);
                write_zeros(writer, written..target_size, &mut |position| advance(setup.progress, position, total))?;
                writer.flush().map_err(|error| write_error("cannot write the stream", error))?;
                target_size
            }
        };
        advance(setup.progress, source_size, Some(source_size))?;
        let value = |counter: AtomicU64| counter.into_inner();
        Ok(ConvertReport {
            source_size,
            target_size,
            padding: padded - source_size,
            file_size,
            bytes_read: value(self.counters.read),
            bytes_written: value(self.counters.written),
            bytes_cloned: value(self.counters.cloned),
            bytes_copied: value(self.counters.copied),
            bytes_skipped_zero: value(self.counters.skipped),
        })
    }
}

/// Writes zeros to a stream, in pieces. `step` hears how far it came.
fn write_zeros(writer: &mut dyn Write, range: Range<u64>, step: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
    static ZEROS: [u8; 256 << 10] = [0; 256 << 10];
    let mut position = range.start;
    while position < range.end {
        let left = usize::try_from(range.end - position).unwrap_or(usize::MAX);
        let piece = ZEROS.get(..left).unwrap_or(&ZEROS);
        writer.write_all(piece).map_err(|error| write_error("cannot write the stream", error))?;
        position += piece.len() as u64; // at most range.end
        step(position)?;
    }
    Ok(())
}

/// A part of a buffer. Tasks and pieces are made to fit; one that does not is our mistake, which must not write
/// anything wrong.
fn part(buffer: &[u8], range: Range<u64>) -> Result<&[u8]> {
    let found = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
    found.and_then(|(start, end)| buffer.get(start..end)).ok_or_else(outside)
}

/// As [`part`].
fn part_mut(buffer: &mut [u8], range: Range<u64>) -> Result<&mut [u8]> {
    let found = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
    found.and_then(|(start, end)| buffer.get_mut(start..end)).ok_or_else(outside)
}

fn outside() -> Error {
    Error::new(ErrorKind::OutOfRange, "a piece of the disk lies outside its buffer")
}
