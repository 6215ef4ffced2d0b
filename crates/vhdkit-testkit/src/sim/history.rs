//! What every sector of a disk may hold after a power cut, and what it is that it holds instead.
//!
//! Sectors are filled with stamps that name their place and version, so that a wrong one can be told by name. What is
//! remembered of a sector is a list of events, the oldest first:
//!
//! ```text
//! initial | write 5 (started, ended) | write 8 (started, in flight) | ...
//! ```
//!
//! Every content in the list may be found. A flush drops what a write that ended before the flush began has replaced:
//! an event goes when such a write *started* after it had ended, since of two that ran at once either may have won.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::pages::{SECTOR_BYTES, SECTOR_LENGTH, hash_bytes};
use crate::model::ModelDisk;
use crate::rng::mix;

/// Words of a stamp that its place and version stand in, and the one that proves it.
const STAMP_HEAD: usize = 3;
/// Keeps stamps apart from anything else.
const STAMP: u64 = 0x5354_414D_5033_2121;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Zeros.
    Zero,
    /// A stamp.
    Stamp {
        /// The sector that it was written to.
        sector: u64,
        /// The version that was written.
        version: u64,
    },
    /// Anything else, by its hash.
    Other(u64),
}

impl Content {
    /// What 512 bytes are.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), SECTOR_LENGTH, "a sector");
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().unwrap_or_default());
        let (sector, version, proof) = (word(0), word(1), word(2));
        if proof == stamp_proof(sector, version)
            && (STAMP_HEAD..SECTOR_LENGTH / 8).all(|at| word(at) == stamp_word(proof, at))
        {
            return Self::Stamp { sector, version };
        }
        if bytes == [0; SECTOR_LENGTH] { Self::Zero } else { Self::Other(hash_bytes(bytes)) }
    }

    /// A number for a digest.
    fn digest(self) -> u64 {
        match self {
            Self::Zero => 1,
            Self::Stamp { sector, version } => mix(sector ^ mix(version ^ STAMP)),
            Self::Other(hash) => hash,
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => write!(f, "zero"),
            Self::Stamp { sector, version } => write!(f, "version {version} of sector {sector}"),
            Self::Other(hash) => write!(f, "bytes with the hash {hash:016x}"),
        }
    }
}

fn stamp_proof(sector: u64, version: u64) -> u64 {
    mix(STAMP ^ mix(sector ^ mix(version)))
}

fn stamp_word(proof: u64, at: usize) -> u64 {
    proof ^ (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Fills a sector with a stamp.
pub fn fill_stamp(sector: u64, version: u64, bytes: &mut [u8]) {
    assert_eq!(bytes.len(), SECTOR_LENGTH, "a sector");
    let proof = stamp_proof(sector, version);
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match at {
            0 => sector,
            1 => version,
            2 => proof,
            _ => stamp_word(proof, at),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// One thing that happened to a sector.
#[derive(Clone, Copy, Debug)]
struct Event {
    /// The request; 0 for the content that was there first.
    ticket: u64,
    content: Content,
    started: u64,
    ended: Ended,
    /// A discard: what was there before may have stayed.
    maybe: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    No,
    Well(u64),
    Failed(u64),
}

impl Event {
    fn first(content: Content) -> Self {
        Self { ticket: 0, content, started: 0, ended: Ended::Well(0), maybe: false }
    }

    fn ended_before(&self, time: u64) -> bool {
        match self.ended {
            Ended::No => false,
            Ended::Well(ended) | Ended::Failed(ended) => ended < time,
        }
    }

    /// Whether it is certain to have happened by a time.
    fn certain_at(&self, time: u64) -> bool {
        !self.maybe && matches!(self.ended, Ended::Well(ended) if ended <= time)
    }
}

/// A request in flight that zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Zeroing {
    maybe: bool,
}

/// Drops what was replaced by something that is certain at a time.
fn prune(events: &mut Vec<Event>, time: u64) {
    if let Some(newest) = events.iter().filter(|event| event.certain_at(time)).map(|event| event.started).max() {
        events.retain(|event| !event.ended_before(newest));
    }
}

/// A request that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// A read that has started, and what it could see then.
#[derive(Clone, Debug)]
pub struct ReadTicket {
    first: u64,
    clock: u64,
    seen: Vec<Vec<Event>>,
}

/// A flush that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushTicket(u64);

/// What every 512 bytes of a disk were, are, and may be.
///
/// ```
/// use vhdkit_testkit::sim::SectorHistory;
///
/// let mut history = SectorHistory::new(1 << 20, Default::default());
/// let (first, bytes) = history.start_write(17, 1);
/// history.finish(first);
/// let flush = history.start_flush();
/// history.finish_flush(flush);
/// assert!(history.allowed(17, &bytes).is_ok());
/// let lost = history.allowed(17, &[0; 512]).unwrap_err();
/// assert_eq!(lost, "sector 17 is zero; allowed: version 1 (written)");
/// ```
#[derive(Clone, Debug)]
pub struct SectorHistory {
    disk_bytes: u64,
    initial: Arc<BTreeMap<u64, Content>>,
    sectors: BTreeMap<u64, Vec<Event>>,
    /// Requests in flight; whether one zeroes, and then whether for certain.
    open: BTreeMap<u64, (Range<u64>, Option<Zeroing>)>,
    clock: u64,
    epoch: u64,
    /// Reads in flight, and what was zeroed since the first of them began.
    reads: usize,
    zeroed: Vec<(u64, Range<u64>)>,
}

impl SectorHistory {
    /// A disk of so many bytes. `initial` has the sectors that are not zero at the start: for a differencing disk those of
    /// its parents too.
    #[must_use]
    pub fn new(disk_bytes: u64, initial: BTreeMap<u64, Content>) -> Self {
        let initial = Arc::new(initial);
        Self {
            disk_bytes,
            initial,
            sectors: BTreeMap::new(),
            open: BTreeMap::new(),
            clock: 0,
            epoch: 0,
            reads: 0,
            zeroed: Vec::new(),
        }
    }

    /// A disk that holds what a model says.
    #[must_use]
    pub fn of_model(model: &ModelDisk) -> Self {
        let mut initial = BTreeMap::new();
        for (offset, bytes) in model.data_pieces(1 << 16) {
            for (sector, piece) in (offset / SECTOR_BYTES..).zip(bytes.chunks_exact(SECTOR_LENGTH)) {
                if Content::of(piece) != Content::Zero {
                    initial.insert(sector, Content::of(piece));
                }
            }
        }
        Self::new(model.virtual_size, initial)
    }

    /// The number of 512-byte sectors.
    #[must_use]
    pub fn sector_count(&self) -> u64 {
        self.disk_bytes / SECTOR_BYTES
    }

    /// Changes whenever less is allowed than before: with every flush that ends.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn initial_of(&self, sector: u64) -> Content {
        self.initial.get(&sector).copied().unwrap_or(Content::Zero)
    }

    fn start(&mut self, range: Range<u64>, zeroing: Option<Zeroing>) -> Event {
        assert!(range.start < range.end && range.end <= self.sector_count(), "{range:?} is not on the disk");
        let started = self.tick();
        if zeroing.is_some() && self.reads > 0 {
            self.zeroed.push((started, range.clone()));
        }
        self.open.insert(started, (range, zeroing));
        Event { ticket: started, content: Content::Zero, started, ended: Ended::No, maybe: false }
    }

    fn push(&mut self, sector: u64, event: Event) {
        let initial = self.initial_of(sector);
        let open = &self.open;
        // Zeroing in flight had no list to be noted in while the sector was zero.
        let list = || {
            let zeroing = open.iter().filter_map(|(ticket, (range, zeroing))| {
                let Zeroing { maybe } = (*zeroing)?;
                let noted = *ticket != event.ticket && range.contains(&sector);
                noted.then_some(Event {
                    ticket: *ticket,
                    content: Content::Zero,
                    started: *ticket,
                    ended: Ended::No,
                    maybe,
                })
            });
            std::iter::once(Event::first(initial)).chain(zeroing).collect()
        };
        self.sectors.entry(sector).or_insert_with(list).push(event);
    }

    /// A write begins; the bytes to write, a new version of every sector, are made here.
    #[must_use]
    pub fn start_write(&mut self, first: u64, count: u64) -> (Ticket, Vec<u8>) {
        let event = self.start(first..first + count, None);
        let mut bytes = vec![0; count as usize * SECTOR_LENGTH];
        for (sector, piece) in (first..).zip(bytes.chunks_exact_mut(SECTOR_LENGTH)) {
            let version = event.ticket;
            fill_stamp(sector, version, piece);
            self.push(sector, Event { content: Content::Stamp { sector, version }, ..event });
        }
        (Ticket(event.ticket), bytes)
    }

    /// A write of given bytes begins.
    pub fn start_write_of(&mut self, first: u64, bytes: &[u8]) -> Ticket {
        let event = self.start(first..first + (bytes.len() / SECTOR_LENGTH) as u64, None);
        for (sector, piece) in (first..).zip(bytes.chunks_exact(SECTOR_LENGTH)) {
            self.push(sector, Event { content: Content::of(piece), ..event });
        }
        Ticket(event.ticket)
    }

    /// Zeroing begins.
    pub fn start_zero(&mut self, sectors: Range<u64>) -> Ticket {
        self.start_zeros(sectors, false)
    }

    /// A discard begins: each sector stays or becomes zero, until somebody reads which ([`SectorHistory::observe`]).
    pub fn start_discard(&mut self, sectors: Range<u64>) -> Ticket {
        self.start_zeros(sectors, true)
    }

    fn start_zeros(&mut self, sectors: Range<u64>, maybe: bool) -> Ticket {
        let event = Event { maybe, ..self.start(sectors.clone(), Some(Zeroing { maybe })) };
        // What never was anything but zero stays zero, and needs no list.
        let mut known: Vec<u64> = self.sectors.range(sectors.clone()).map(|(sector, _)| *sector).collect();
        known.extend(self.initial.range(sectors).map(|(sector, _)| *sector));
        known.sort_unstable();
        known.dedup();
        known.into_iter().for_each(|sector| self.push(sector, event));
        Ticket(event.ticket)
    }

    fn end(&mut self, ticket: Ticket, ended: impl Fn(u64) -> Ended, then: impl Fn(&mut Vec<Event>)) {
        let time = self.tick();
        let (range, _) = self.open.remove(&ticket.0).expect("the request is in flight");
        for (_, events) in self.sectors.range_mut(range) {
            if let Some(event) = events.iter_mut().find(|event| event.ticket == ticket.0) {
                event.ended = ended(time);
                then(events);
            }
        }
    }

    /// A request has ended well.
    pub fn finish(&mut self, ticket: Ticket) {
        self.end(ticket, Ended::Well, |_| {});
    }

    /// A request has failed, or its plan was dropped: each of its sectors may hold the old or the new for as long as nothing
    /// else is written there.
    pub fn fail(&mut self, ticket: Ticket) {
        self.end(ticket, Ended::Failed, |_| {});
    }

    /// A request that is durable as soon as it ends has ended.
    pub fn finish_through(&mut self, ticket: Ticket) {
        self.epoch += 1;
        self.end(ticket, Ended::Well, |events| {
            let own = events.iter().find(|event| event.ticket == ticket.0).map_or(0, |event| event.started);
            if events.iter().any(|event| event.ticket == ticket.0 && !event.maybe) {
                events.retain(|event| !event.ended_before(own));
            }
        });
    }

    /// A flush begins.
    pub fn start_flush(&mut self) -> FlushTicket {
        FlushTicket(self.tick())
    }

    /// A flush has ended: what had ended before the flush began is durable.
    pub fn finish_flush(&mut self, flush: FlushTicket) {
        self.tick();
        self.epoch += 1;
        self.sectors.values_mut().for_each(|events| prune(events, flush.0));
    }

    /// Whether a sector may hold these bytes after a power cut now.
    ///
    /// # Errors
    /// What it holds instead, and what would be allowed.
    pub fn allowed(&self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        self.judge(sector, Content::of(bytes), &self.events(sector))
    }

    /// Whether a read may give these bytes now, without any power cut.
    ///
    /// # Errors
    /// As [`SectorHistory::allowed`].
    pub fn current(&self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        self.judge(sector, Content::of(bytes), &self.visible(sector))
    }

    /// Somebody has read these bytes: a discard that may or may not have done something has shown what.
    ///
    /// # Errors
    /// As [`SectorHistory::current`].
    pub fn observe(&mut self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        let content = Content::of(bytes);
        let visible = self.visible(sector);
        self.judge(sector, content, &visible)?;
        if visible.iter().any(|event| event.ended == Ended::No)
            || !visible.iter().any(|event| event.maybe)
            || visible.iter().any(|event| !event.maybe && event.content == Content::Zero)
        {
            return Ok(());
        }
        self.epoch += 1;
        if let Some(events) = self.sectors.get_mut(&sector) {
            match content {
                // Of several the last: by then it was zero, whichever of them did it.
                Content::Zero => {
                    if let Some(event) = events.iter_mut().rev().find(|event| event.maybe) {
                        event.maybe = false;
                    }
                }
                // A discard that had ended before this was written is not told by it.
                _ => {
                    let written = events.iter().rev().find(|event| event.content == content);
                    let written = written.map_or(0, |event| event.started);
                    events.retain(|event| !event.maybe || event.ended_before(written));
                }
            }
        }
        Ok(())
    }

    /// After a power cut, or another end of the session: what a sector was found to hold is what it holds from now on.
    /// Requests and flushes in flight are forgotten.
    ///
    /// # Errors
    /// As [`SectorHistory::allowed`].
    pub fn settle(&mut self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        self.allowed(sector, bytes)?;
        self.open.clear();
        self.reads = 0;
        self.zeroed.clear();
        self.epoch += 1;
        if let Some(events) = self.sectors.get_mut(&sector) {
            *events = vec![Event::first(Content::of(bytes))];
        }
        Ok(())
    }

    /// Settles every sector that can hold anything but zero, with what `read` gives for a byte offset.
    ///
    /// # Errors
    /// As [`SectorHistory::settle`], and what `read` says.
    pub fn settle_all(&mut self, mut read: impl FnMut(&mut [u8], u64) -> Result<(), String>) -> Result<(), String> {
        for sectors in self.interesting() {
            let mut bytes = vec![0; (sectors.end - sectors.start) as usize * SECTOR_LENGTH];
            read(&mut bytes, sectors.start * SECTOR_BYTES)?;
            for (sector, piece) in sectors.zip(bytes.chunks_exact(SECTOR_LENGTH)) {
                self.settle(sector, piece)?;
            }
        }
        Ok(())
    }

    /// Somebody has read sectors that follow each other ([`SectorHistory::observe`]).
    ///
    /// # Errors
    /// As [`SectorHistory::current`].
    pub fn observe_run(&mut self, first: u64, bytes: &[u8]) -> Result<(), String> {
        let mut sectors = (first..).zip(bytes.chunks_exact(SECTOR_LENGTH));
        sectors.try_for_each(|(sector, piece)| self.observe(sector, piece))
    }

    /// A read begins, in the middle of which other things may happen.
    #[must_use]
    pub fn start_read(&mut self, first: u64, count: u64) -> ReadTicket {
        self.reads += 1;
        let seen = (first..first + count).map(|sector| self.visible(sector)).collect();
        ReadTicket { first, clock: self.clock, seen }
    }

    /// A read has ended with these bytes: each sector is what it was when the read began, or was written since.
    ///
    /// # Errors
    /// As [`SectorHistory::observe`].
    pub fn finish_read(&mut self, read: ReadTicket, bytes: &[u8]) -> Result<(), String> {
        self.reads = self.reads.saturating_sub(1);
        let sectors = (read.first..).zip(bytes.chunks_exact(SECTOR_LENGTH)).zip(read.seen);
        for ((sector, piece), mut events) in sectors {
            if self.clock == read.clock {
                self.observe(sector, piece)?;
                continue;
            }
            let content = Content::of(piece);
            // Flushes drop what was written and replaced meanwhile.
            let meanwhile = match content {
                Content::Stamp { sector: own, version } => own == sector && version > read.clock,
                Content::Zero => self.zeroed.iter().any(|(at, range)| *at > read.clock && range.contains(&sector)),
                Content::Other(_) => false,
            };
            if !meanwhile {
                events.extend(self.events(sector).into_iter().filter(|event| event.started > read.clock));
                self.judge(sector, content, &events)?;
            }
        }
        if self.reads == 0 {
            self.zeroed.clear();
        }
        Ok(())
    }

    /// The sectors that can hold anything but zero, or ever could, and their neighbours: as ranges in order. Everywhere else
    /// the disk is zero.
    #[must_use]
    pub fn interesting(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let (mut own, mut initial) = (self.sectors.keys().peekable(), self.initial.keys().peekable());
        loop {
            let sector = match (own.peek(), initial.peek()) {
                (None, None) => break,
                (Some(a), Some(b)) if a > b => initial.next(),
                (Some(_), _) => own.next(),
                (None, Some(_)) => initial.next(),
            };
            let Some(&sector) = sector else { break };
            let (start, end) = (sector.saturating_sub(1), (sector + 2).min(self.sector_count()));
            match ranges.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(end),
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Judges sectors that follow each other, and adds what they hold to a digest.
    ///
    /// # Errors
    /// As [`SectorHistory::allowed`].
    pub fn allowed_run(&self, first: u64, bytes: &[u8], digest: &mut u64) -> Result<(), String> {
        let mut known = self.sectors.range(first..).peekable();
        for (sector, piece) in (first..).zip(bytes.chunks_exact(SECTOR_LENGTH)) {
            let content = Content::of(piece);
            *digest = mix(*digest ^ content.digest());
            match known.peek() {
                Some((at, events)) if **at == sector => {
                    if !events.iter().any(|event| event.content == content) {
                        self.judge(sector, content, events)?;
                    }
                    known.next();
                }
                _ if content == self.initial_of(sector) => {}
                _ => self.judge(sector, content, &self.events(sector))?,
            }
        }
        Ok(())
    }

    fn events(&self, sector: u64) -> Vec<Event> {
        self.sectors.get(&sector).cloned().unwrap_or_else(|| vec![Event::first(self.initial_of(sector))])
    }

    fn visible(&self, sector: u64) -> Vec<Event> {
        let mut events = self.events(sector);
        prune(&mut events, self.clock);
        events
    }

    fn judge(&self, sector: u64, found: Content, events: &[Event]) -> Result<(), String> {
        if events.iter().any(|event| event.content == found) {
            return Ok(());
        }
        let allowed: Vec<String> = events.iter().map(|event| describe(sector, event)).collect();
        let what = match found {
            Content::Zero => "is zero".to_owned(),
            Content::Stamp { sector: own, version } if own == sector => {
                format!("holds its version {version}, which is lost or out of date")
            }
            Content::Stamp { sector: other, version } => {
                format!("holds version {version} of sector {other}, which does not belong here")
            }
            Content::Other(_) => match self.initial.iter().find(|(_, content)| **content == found) {
                Some((at, _)) if *at == sector => "holds what was there at the start".to_owned(),
                Some((at, _)) => format!("holds what sector {at} held at the start, which does not belong here"),
                None => "holds garbage".to_owned(),
            },
        };
        Err(format!("sector {sector} {what}; allowed: {}", allowed.join(", ")))
    }
}

fn describe(sector: u64, event: &Event) -> String {
    let what = match event.content {
        Content::Stamp { sector: own, version } if own == sector => format!("version {version}"),
        content => content.to_string(),
    };
    let state = match event.ended {
        _ if event.ticket == 0 => "at the start",
        _ if event.maybe => "discarded",
        Ended::No => "in flight",
        Ended::Well(_) => "written",
        Ended::Failed(_) => "failed",
    };
    format!("{what} ({state})")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZEROS: [u8; 512] = [0; 512];

    fn history() -> SectorHistory {
        SectorHistory::new(1000 * 512, BTreeMap::new())
    }

    fn written(history: &mut SectorHistory, sector: u64) -> Vec<u8> {
        let (ticket, bytes) = history.start_write(sector, 1);
        history.finish(ticket);
        bytes
    }

    fn flushed(history: &mut SectorHistory) {
        let flush = history.start_flush();
        history.finish_flush(flush);
    }

    #[test]
    fn stamps_are_told_apart() {
        let mut bytes = [0; 512];
        fill_stamp(17, 4, &mut bytes);
        assert_eq!(Content::of(&bytes), Content::Stamp { sector: 17, version: 4 });
        for at in 0..512 {
            let mut other = bytes;
            other[at] ^= 1;
            assert!(matches!(Content::of(&other), Content::Other(_)), "{at}");
        }
        assert_eq!(Content::of(&ZEROS), Content::Zero);
    }

    #[test]
    fn only_what_ended_before_the_flush_began_is_promised() {
        let mut history = history();
        let first = written(&mut history, 5);
        let flush = history.start_flush();
        let second = written(&mut history, 5);
        history.finish_flush(flush);
        assert!(history.allowed(5, &first).is_ok() && history.allowed(5, &second).is_ok());
        assert!(history.allowed(5, &ZEROS).unwrap_err().starts_with("sector 5 is zero; allowed: version"));
        assert!(history.current(5, &first).is_err() && history.current(5, &second).is_ok());
        flushed(&mut history);
        let error = history.allowed(5, &first).unwrap_err();
        assert!(error.contains("holds its version 1, which is lost or out of date"), "{error}");
        let error = history.allowed(6, &first).unwrap_err();
        assert_eq!(
            error,
            "sector 6 holds version 1 of sector 5, which does not belong here; allowed: zero (at the start)"
        );
        assert!(history.allowed(5, &[7; 512]).unwrap_err().contains("garbage"));
    }

    #[test]
    fn zeroing_in_flight_may_win_over_the_first_write_of_a_sector() {
        let mut history = history();
        let zeroing = history.start_zero(0..10);
        let bytes = written(&mut history, 5);
        history.finish(zeroing);
        flushed(&mut history);
        assert!(history.allowed(5, &bytes).is_ok() && history.allowed(5, &ZEROS).is_ok());
        let bytes = written(&mut history, 5);
        flushed(&mut history);
        assert!(history.allowed(5, &bytes).is_ok() && history.allowed(5, &ZEROS).is_err());
    }

    #[test]
    fn a_later_write_does_not_tell_what_an_earlier_discard_did() {
        let mut history = history();
        let first = written(&mut history, 5);
        flushed(&mut history);
        let early = history.start_discard(0..10);
        history.finish(early);
        let (ticket, second) = history.start_write(5, 1);
        let late = history.start_discard(0..10);
        history.finish(late);
        history.finish(ticket);
        history.observe(5, &second).unwrap();
        for may_be_left in [&first[..], &second, &ZEROS] {
            history.allowed(5, may_be_left).unwrap();
        }
        flushed(&mut history);
        assert!(history.allowed(5, &second).is_ok() && history.allowed(5, &ZEROS).is_err());
    }

    #[test]
    fn of_two_writes_at_once_either_may_win() {
        let mut history = history();
        let (a, first) = history.start_write(5, 1);
        let (b, second) = history.start_write(5, 1);
        history.finish(b);
        assert!(history.current(5, &first).is_ok() && history.current(5, &second).is_ok());
        history.finish(a);
        flushed(&mut history);
        assert!(history.allowed(5, &first).is_ok() && history.allowed(5, &second).is_ok());
        assert!(history.allowed(5, &ZEROS).is_err());
        let third = written(&mut history, 5);
        flushed(&mut history);
        assert!(history.allowed(5, &first).is_err() && history.allowed(5, &second).is_err());
        assert!(history.allowed(5, &third).is_ok());
    }

    #[test]
    fn a_failed_write_may_have_happened_until_something_replaces_it() {
        let mut history = history();
        let (ticket, bytes) = history.start_write(5, 1);
        history.fail(ticket);
        flushed(&mut history);
        assert!(history.allowed(5, &bytes).is_ok() && history.allowed(5, &ZEROS).is_ok());
        let next = written(&mut history, 5);
        assert!(history.allowed(5, &bytes).is_ok() && history.current(5, &bytes).is_err());
        flushed(&mut history);
        assert!(history.allowed(5, &bytes).is_err() && history.allowed(5, &next).is_ok());
    }

    #[test]
    fn a_discard_keeps_or_zeroes_until_it_is_read() {
        let mut history = history();
        let old = written(&mut history, 5);
        flushed(&mut history);
        let ticket = history.start_discard(0..10);
        history.finish(ticket);
        flushed(&mut history);
        assert!(history.allowed(5, &old).is_ok() && history.allowed(5, &ZEROS).is_ok());
        let mut kept = history.clone();
        kept.observe(5, &old).unwrap();
        assert!(kept.allowed(5, &ZEROS).is_err());
        history.observe(5, &ZEROS).unwrap();
        assert!(history.current(5, &old).is_err());
        assert!(history.allowed(5, &old).is_ok(), "the zeros may not be durable yet");
        flushed(&mut history);
        assert!(history.allowed(5, &old).is_err());
    }

    #[test]
    fn zeroing_is_promised_and_write_through_needs_no_flush() {
        let mut history = history();
        let old = written(&mut history, 5);
        flushed(&mut history);
        let ticket = history.start_zero(4..6);
        history.finish(ticket);
        assert!(history.allowed(5, &old).is_ok());
        flushed(&mut history);
        assert!(history.allowed(5, &old).is_err());
        let (ticket, bytes) = history.start_write(5, 2);
        history.finish_through(ticket);
        assert!(history.allowed(5, &bytes[..512]).is_ok() && history.allowed(6, &bytes[512..]).is_ok());
        assert!(history.allowed(5, &ZEROS).is_err() && history.allowed(6, &ZEROS).is_err());
    }

    #[test]
    fn the_parents_content_is_where_a_child_starts() {
        let initial = BTreeMap::from([(7, Content::of(&[9; 512])), (8, Content::of(&[8; 512]))]);
        let mut history = SectorHistory::new(1000 * 512, initial);
        assert!(history.allowed(7, &[9; 512]).is_ok() && history.allowed(7, &ZEROS).is_err());
        let error = history.allowed(8, &[9; 512]).unwrap_err();
        assert!(error.contains("holds what sector 7 held at the start"), "{error}");
        let ticket = history.start_discard(0..100);
        history.finish(ticket);
        assert!(history.allowed(7, &ZEROS).is_ok());
        let _ = history.start_write(20, 1);
        assert_eq!(history.interesting(), [6..10, 19..22]);
        let mut digest = 0;
        let run = [[0; 512], [9; 512], [0; 512], [0; 512]].concat();
        history.allowed_run(6, &run, &mut digest).unwrap();
        let mut other = 0;
        history.allowed_run(6, &[0; 2048], &mut other).unwrap();
        assert_ne!(digest, other);
    }

    #[test]
    fn after_a_cut_what_was_found_is_what_there_is() {
        let mut history = history();
        let (_, bytes) = history.start_write(5, 1);
        history.settle(5, &ZEROS).unwrap();
        assert!(history.allowed(5, &bytes).is_err());
        assert!(history.settle(5, &bytes).is_err());
        let (ticket, bytes) = history.start_write(6, 2);
        history.finish(ticket);
        history.observe_run(5, &[&ZEROS, &bytes[..]].concat()).unwrap();
        let left = [&bytes[..512], &ZEROS].concat();
        let read = |buf: &mut [u8], offset: u64| {
            assert_eq!((offset, buf.len()), (4 * 512, 5 * 512), "5 to 7, and a neighbour on each side");
            buf[1024..2048].copy_from_slice(&left);
            Ok(())
        };
        history.settle_all(read).unwrap();
        assert!(history.observe_run(6, &bytes).is_err() && history.observe_run(6, &left).is_ok());
    }
}
