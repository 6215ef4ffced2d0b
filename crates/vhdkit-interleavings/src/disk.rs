//! A file on a disk that forgets what was not synced, whose every operation is a point where another thread may go on.
//!
//! It takes no space back, so that what was there shows itself when space is given out too early or not zeroed.

use std::io;
use std::ops::Range;

use shuttle::rand::Rng as _;
use shuttle::sync::Mutex;
use vhdkit_testkit::sim::PageMap;

use crate::storage::Storage;

/// A change of the file.
#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(Range<u64>),
    Length(u64),
}

impl Change {
    fn apply(&self, pages: &mut PageMap) {
        match self {
            Self::Write(offset, bytes) => pages.write(*offset, bytes),
            Self::Zero(range) => pages.zero(range.clone()),
            Self::Length(length) => pages.set_len(*length),
        }
    }
}

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A write, also one of zeros.
    Write,
    /// A change of length.
    Length,
    /// A sync.
    Sync,
}

/// A failure to come.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// What fails.
    pub call: Call,
    /// So many of them go well before.
    pub after: u32,
    /// How.
    pub error: io::ErrorKind,
}

#[derive(Debug)]
struct State {
    now: PageMap,
    /// What a power cut leaves for certain.
    durable: PageMap,
    /// What was changed since.
    pending: Vec<Change>,
    /// How many changes were made durable, ever.
    settled: usize,
    fault: Option<Fault>,
    /// False while nothing may be written.
    open: bool,
}

impl State {
    fn fails(&mut self, call: Call) -> io::Result<()> {
        match &mut self.fault {
            Some(fault) if fault.call == call => {
                if fault.after > 0 {
                    fault.after -= 1;
                    return Ok(());
                }
                let error = fault.error;
                self.fault = None;
                Err(error.into())
            }
            _ => Ok(()),
        }
    }

    fn change(&mut self, change: Change) {
        assert!(self.open, "written after the session ended");
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    fn settle(&mut self, count: usize) {
        for change in self.pending.drain(..count) {
            change.apply(&mut self.durable);
        }
        self.settled += count;
    }
}

/// The file.
#[derive(Debug)]
pub struct Disk(Mutex<State>);

impl Disk {
    /// A file with these contents, which are durable.
    #[must_use]
    pub fn new(pages: PageMap) -> Self {
        let (now, durable) = (pages.clone(), pages);
        Self(Mutex::new(State { now, durable, pending: Vec::new(), settled: 0, fault: None, open: true }))
    }

    /// Lets something fail once.
    pub fn fail(&self, fault: Fault) {
        self.0.lock().unwrap().fault = Some(fault);
    }

    /// From now on nothing may be written.
    pub fn forbid(&self) {
        self.0.lock().unwrap().open = false;
    }

    /// Some of what a power cut can leave at this moment: what was synced, and of the rest nothing, all, or any part.
    #[must_use]
    pub fn cuts(&self, count: usize) -> Vec<PageMap> {
        let state = self.0.lock().unwrap();
        let mut random = shuttle::rand::thread_rng();
        (0..count)
            .map(|_| {
                let mut pages = state.durable.clone();
                let chance = [0.0, 0.5, 1.0][random.gen_range(0..3)];
                for change in &state.pending {
                    if random.gen_bool(chance) {
                        change.apply(&mut pages);
                    }
                }
                pages
            })
            .collect()
    }
}

impl Storage for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        if offset + buf.len() as u64 > state.now.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.now.read(offset, buf);
        Ok(())
    }

    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_at(buf, offset).map(|()| true)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.fails(Call::Write)?;
        state.change(Change::Write(offset, buf.to_vec()));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.fails(Call::Length)?;
        state.change(Change::Length(len));
        Ok(())
    }

    /// Covers what was written before it began, and nothing that comes while it lasts.
    fn sync(&self) -> io::Result<()> {
        let covered = {
            let state = self.0.lock().unwrap();
            state.settled + state.pending.len()
        };
        let mut state = self.0.lock().unwrap();
        let left = covered.saturating_sub(state.settled);
        if let Err(error) = state.fails(Call::Sync) {
            // What it did not get done is gone, as Linux has it.
            let done = shuttle::rand::thread_rng().gen_range(0..=left);
            state.settle(done);
            state.pending.drain(..left - done);
            state.settled += left - done;
            return Err(error);
        }
        state.settle(left);
        Ok(())
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.fails(Call::Write)?;
        if range.end > state.now.len() {
            state.change(Change::Length(range.end));
        }
        state.change(Change::Zero(range));
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(self.0.lock().unwrap().now.next_data(range))
    }

    fn set_access(&self, write: bool) -> crate::Result<()> {
        self.0.lock().unwrap().open = write;
        Ok(())
    }
}
