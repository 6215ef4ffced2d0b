//! Whether two disks hold the same.

use std::num::NonZero;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::segments::{Segment, Segments, is_zero};
use super::{Progress, advance};
use crate::error::{Error, Result};
use crate::image::BlockDevice;
use crate::storage::StorageIdentity;

/// Bytes compared at once.
const CHUNK_BYTES: u64 = 512 << 10;
/// The same, for buffers.
const CHUNK_LENGTH: usize = 512 << 10;
/// Most threads; each has two buffers.
const THREADS_MAX: usize = 16;

/// What [`compare`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// The first byte that differs, if one does. What only the longer disk has is compared with zero.
    pub first_difference: Option<u64>,
    /// The sizes of both disks.
    pub sizes: [u64; 2],
    /// What there is to say when the sizes differ.
    pub size_note: Option<String>,
    /// Bytes that were read of each disk.
    pub bytes_read: [u64; 2],
}

impl Comparison {
    /// Whether the disks hold the same, the rest of a longer one being zero.
    #[must_use]
    pub const fn is_equal(&self) -> bool {
        self.first_difference.is_none()
    }
}

/// A part of the disks that has to be compared, and who may have anything but zeros there.
struct Part {
    guest: Range<u64>,
    has: [bool; 2],
}

/// Walks both disks at once.
struct Pair<'a> {
    disks: [&'a dyn BlockDevice; 2],
    segments: [Segments<'a>; 2],
}

struct Work<'a> {
    disks: [&'a dyn BlockDevice; 2],
    pair: Mutex<Pair<'a>>,
    /// The lowest offset where a difference was found; `u64::MAX` while there is none.
    difference: AtomicU64,
    failure: Mutex<Option<Error>>,
    stopped: AtomicBool,
    done: AtomicU64,
    read: [AtomicU64; 2],
    total: u64,
    progress: &'a dyn Progress,
}

/// Compares two disks. Where neither has data nothing is read, nor where both lie at the same place of one file.
///
/// ```
/// use std::sync::Arc;
/// use vhdkit::image::RawDisk;
/// use vhdkit::ops::compare::compare;
/// use vhdkit::storage::MemoryStorage;
///
/// let disk = |bytes| RawDisk::new(Arc::new(MemoryStorage::from_bytes(bytes)), 512);
/// let (zeros, marked) = (disk(vec![0; 4096])?, disk([vec![0; 4000], vec![1; 96]].concat())?);
/// assert_eq!(compare(&zeros, &marked, &())?.first_difference, Some(4000));
/// # Ok::<(), vhdkit::Error>(())
/// ```
///
/// # Errors
/// [`Cancelled`](crate::ErrorKind::Cancelled), and what stands in the way of reading.
pub fn compare(a: &dyn BlockDevice, b: &dyn BlockDevice, progress: &dyn Progress) -> Result<Comparison> {
    let sizes = [a.size(), b.size()];
    let total = a.size().max(b.size());
    let work = Work {
        disks: [a, b],
        pair: Mutex::new(Pair { disks: [a, b], segments: [Segments::new(a), Segments::new(b)] }),
        difference: AtomicU64::new(u64::MAX),
        failure: Mutex::new(None),
        stopped: AtomicBool::new(false),
        done: AtomicU64::new(0),
        read: [AtomicU64::new(0), AtomicU64::new(0)],
        total,
        progress,
    };
    advance(progress, 0, Some(total))?;
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| work.run());
        }
        work.run();
    });
    if let Some(error) = work.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let difference = work.difference.into_inner();
    if difference == u64::MAX {
        advance(progress, total, Some(total))?;
    }
    let size_note = (a.size() != b.size()).then(|| {
        let [longer, shorter] = if a.size() > b.size() { ["first", "second"] } else { ["second", "first"] };
        format!("the {longer} disk is longer than the {shorter} by {} bytes", a.size().abs_diff(b.size()))
    });
    Ok(Comparison {
        first_difference: (difference != u64::MAX).then_some(difference),
        sizes,
        size_note,
        bytes_read: work.read.map(AtomicU64::into_inner),
    })
}

impl Pair<'_> {
    /// The next part that has to be read.
    fn next(&mut self) -> Result<Option<Part>> {
        loop {
            let [a, b] = &mut self.segments;
            let (has, guest) = match (a.peek()?, b.peek()?) {
                (None, None) => return Ok(None),
                (Some(one), None) => ([true, false], one.guest.clone()),
                (None, Some(other)) => ([false, true], other.guest.clone()),
                (Some(one), Some(other)) => {
                    let start = one.guest.start.min(other.guest.start);
                    let has = [one.guest.start == start, other.guest.start == start];
                    // Up to where what they have changes.
                    let until = |segment: &Segment, has| if has { segment.guest.end } else { segment.guest.start };
                    (has, start..until(one, has[0]).min(until(other, has[1])))
                }
            };
            let length = (guest.end - guest.start).min(CHUNK_BYTES);
            let places = [(a, has[0]), (b, has[1])]
                .map(|(segments, has)| if has { segments.take(length).and_then(|taken| taken.place) } else { None });
            if has != [true, true] || !self.is_same_place(places) {
                return Ok(Some(Part { guest: guest.start..guest.start + length, has }));
            }
        }
    }

    /// Whether two places are one, so that what is there must be the same.
    fn is_same_place(&self, places: [Option<(usize, u64)>; 2]) -> bool {
        let [Some((layer_a, offset_a)), Some((layer_b, offset_b))] = places else { return false };
        let identity =
            |disk: &dyn BlockDevice, layer| -> Option<StorageIdentity> { disk.layer_storage(layer)?.identity() };
        let [a, b] = self.disks;
        offset_a == offset_b && identity(a, layer_a).is_some_and(|found| identity(b, layer_b) == Some(found))
    }
}

impl Work<'_> {
    fn run(&self) {
        let mut buffers = [vec![0; CHUNK_LENGTH], vec![0; CHUNK_LENGTH]];
        // Parts come in order: once a difference is found, no part that is not given out yet can hold an earlier one.
        while !self.stopped.load(Ordering::Relaxed) && self.difference.load(Ordering::Relaxed) == u64::MAX {
            let next = self.pair.lock().unwrap_or_else(PoisonError::into_inner).next();
            let done = match next {
                Ok(None) => return,
                Ok(Some(part)) => self.look(&part, &mut buffers),
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                self.stopped.store(true, Ordering::Relaxed);
            }
        }
    }

    fn look(&self, part: &Part, buffers: &mut [Vec<u8>; 2]) -> Result<()> {
        let Range { start, end } = part.guest;
        let length = usize::try_from(end - start).unwrap_or(CHUNK_LENGTH).min(CHUNK_LENGTH);
        let mut pieces: [&[u8]; 2] = [&[], &[]];
        let sources = self.disks.iter().zip(buffers).zip(&part.has).zip(&self.read);
        for (piece, (((disk, buffer), has), read)) in pieces.iter_mut().zip(sources) {
            let Some(buffer) = buffer.get_mut(..length).filter(|_| *has) else { continue };
            disk.read_at(buffer, start)?;
            read.fetch_add(end - start, Ordering::Relaxed);
            *piece = buffer;
        }
        let first = match pieces {
            [one, []] | [[], one] => {
                if is_zero(one) {
                    None
                } else {
                    one.iter().position(|byte| *byte != 0)
                }
            }
            [one, other] if one == other => None,
            [one, other] => one.iter().zip(other).position(|(a, b)| a != b),
        };
        if let Some(first) = first {
            self.difference.fetch_min(start + first as u64, Ordering::Relaxed);
        }
        let done = self.done.fetch_max(end, Ordering::Relaxed).max(end);
        advance(self.progress, done, Some(self.total))
    }
}
