//! Walking two disks at once by what their tables say.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{ControlFlow, Range};

use crate::error::Result;
use crate::image::{BlockDevice, Extent, ExtentKind};
use crate::storage::StorageIdentity;

/// Extents asked for at once.
const BATCH: usize = 4096;

/// A range in which both disks are all of one kind each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) range: Range<u64>,
    /// Whether each disk has data there; otherwise it has zeros.
    pub(super) has: [bool; 2],
    /// Both hold the same for sure.
    pub(super) is_same: bool,
}

/// Where bytes come from: a place that is the same holds the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    file: StorageIdentity,
    /// `None` for bytes that are at no one place, as those in a dirty log: a file has one of these for each place of the
    /// disk.
    offset: Option<u64>,
}

/// What a disk has from some position on, up to an end.
#[derive(Clone, Copy, Debug)]
struct Piece {
    end: u64,
    has: bool,
    place: Option<Place>,
}

/// One of the two disks.
#[derive(Debug)]
struct Side<'a> {
    disk: &'a dyn BlockDevice,
    queue: VecDeque<Extent>,
    /// Where the extents that were not asked for yet begin.
    asked: u64,
    /// The file of each layer.
    files: BTreeMap<usize, Option<StorageIdentity>>,
}

impl<'a> Side<'a> {
    fn new(disk: &'a dyn BlockDevice) -> Self {
        Self { disk, queue: VecDeque::new(), asked: 0, files: BTreeMap::new() }
    }

    /// What the disk has at a position, which never steps back. Behind its end it has zeros for ever.
    fn at(&mut self, position: u64) -> Result<Piece> {
        let size = self.disk.size();
        if position >= size {
            return Ok(Piece { end: u64::MAX, has: false, place: None });
        }
        while self.queue.front().is_some_and(|extent| extent.end() <= position) {
            self.queue.pop_front();
        }
        if self.queue.is_empty() {
            self.asked = self.asked.max(position);
            let (queue, asked) = (&mut self.queue, &mut self.asked);
            self.disk.visit_extents(*asked..size, &mut |extent| {
                queue.push_back(*extent);
                *asked = extent.end();
                if queue.len() < BATCH { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
        }
        let Some(extent) = self.queue.front().copied() else {
            return Ok(Piece { end: size, has: false, place: None });
        };
        if extent.start > position {
            return Ok(Piece { end: extent.start, has: false, place: None });
        }
        let ExtentKind::Data { file_offset } = extent.kind else {
            return Ok(Piece { end: extent.end(), has: false, place: None });
        };
        let disk = self.disk;
        let file = self.files.entry(extent.layer).or_insert_with(|| disk.layer_storage(extent.layer)?.identity());
        let within = position - extent.start;
        let place = file.map(|file| Place { file, offset: file_offset.map(|offset| offset.saturating_add(within)) });
        Ok(Piece { end: extent.end(), has: true, place })
    }
}

/// Walks both disks, as far as the longer one reaches.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    sides: [Side<'a>; 2],
    position: u64,
    size: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(a: &'a dyn BlockDevice, b: &'a dyn BlockDevice) -> Self {
        Self { sides: [Side::new(a), Side::new(b)], position: 0, size: a.size().max(b.size()) }
    }

    /// The next part. Where contents may have to be looked at it has at most `longest` bytes.
    pub(super) fn next(&mut self, longest: u64) -> Result<Option<Part>> {
        if self.position >= self.size {
            return Ok(None);
        }
        let start = self.position;
        let [a, b] = &mut self.sides;
        let (a, b) = (a.at(start)?, b.at(start)?);
        let is_same = match (a.has, b.has) {
            (false, false) => true,
            (true, true) => a.place.is_some() && a.place == b.place,
            _ => false,
        };
        let mut end = a.end.min(b.end).min(self.size);
        if !is_same {
            end = end.min(start.saturating_add(longest));
        }
        self.position = end;
        Ok(Some(Part { range: start..end, has: [a.has, b.has], is_same }))
    }
}
