//! The steps of a program. Nested ones, which come in the middle of other steps, never wait.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhdkit::image::simulation::{flushes_asked, phase};
use vhdkit::image::{BlockDevice, Image, ReadStep};
use vhdkit::{Error, ErrorKind};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::Ticket;

use super::{Held, HeldRead, Live, SECTOR, lock, text, trace};

impl Live {
    /// One step. Nested ones never wait.
    pub(super) fn step(&self, rng: &mut Rng, nested: bool) -> Result<(), String> {
        trace(|| format!("step nested={nested} phase={:?} ops={}", phase(), self.sim.storage().counts().operations()));
        let Some(image) = self.image() else { return Ok(()) };
        match rng.below(100) {
            0..30 => self.write(rng, &image, nested),
            30..35 => self.write_block(rng, &image, nested),
            35..38 if !nested => self.write_through(rng, &image),
            35..45 => self.zero(rng, &image, nested),
            45..57 => self.discard(rng, &image, nested),
            57..72 => self.flush(&image, nested),
            72..80 => self.begin_plan(rng, &image),
            80..83 => self.begin_read(rng, &image),
            83..94 => self.go_on_with_plan(rng),
            _ => self.read(rng, &image, nested),
        }
    }

    /// Gives a block up, mostly the one that the step outside is about, makes its space free, and writes elsewhere.
    pub(super) fn reuse_space(&self, rng: &mut Rng) -> Result<(), String> {
        let Some(image) = self.image() else { return Ok(()) };
        let outside = self.block.load(Ordering::Relaxed);
        let block = if rng.below(3) == 0 { rng.pick(&self.blocks) } else { outside };
        let sectors = self.block_sectors(block);
        let range = sectors.start * SECTOR..sectors.end * SECTOR;
        let ticket = self.sim.history().start_discard(sectors);
        let result = image.try_discard(range);
        self.done("discard", ticket, result)?;
        self.flush(&image, true)?;
        self.flush(&image, true)?;
        for _ in 0..rng.between(1, 3) {
            self.write(rng, &image, true)?;
        }
        Ok(())
    }

    /// Writes something, and asks for another flush, on another thread, in the middle of one of this thread.
    pub(super) fn flush_beside(&self, rng: &mut Rng) -> Result<(), String> {
        let Some(image) = self.image() else { return Ok(()) };
        if lock(&self.follower).is_some() {
            return Ok(());
        }
        self.write(rng, &image, true)?;
        let (flush, asked) = (self.sim.history().start_flush(), flushes_asked(&image));
        let other = Arc::clone(&image);
        let thread = std::thread::spawn(move || other.flush());
        while flushes_asked(&image) == asked && !thread.is_finished() {
            std::thread::yield_now();
        }
        self.sim.tally("flushes that came in the middle of another");
        *lock(&self.follower) = Some((flush, thread));
        Ok(())
    }

    fn block_sectors(&self, block: u64) -> Range<u64> {
        block * self.block_bytes / SECTOR..((block + 1) * self.block_bytes).min(self.disk_bytes) / SECTOR
    }

    /// A few sectors, often where something was before.
    fn sectors(&self, rng: &mut Rng, nested: bool) -> Range<u64> {
        let block = rng.pick(&self.blocks);
        if !nested {
            self.block.store(block, Ordering::Relaxed);
        }
        let start = block * self.block_bytes;
        let per_block = (self.block_bytes / SECTOR).min((self.disk_bytes - start) / SECTOR);
        let first = match rng.below(4) {
            0 => 0,
            1 => per_block - rng.between(1, 8).min(per_block),
            2 => rng.below(64).min(per_block - 1),
            _ => rng.below(per_block),
        };
        let first = start / SECTOR + first;
        let count = match rng.below(6) {
            0 => 1,
            1..4 => rng.between(1, 8),
            _ => rng.between(8, 33),
        };
        first..(first + count).min(self.disk_bytes / SECTOR)
    }

    fn whole_blocks(&self, rng: &mut Rng) -> Range<u64> {
        let block = rng.pick(&self.blocks);
        let end = (block + rng.between(1, 3)) * self.block_bytes;
        block * self.block_bytes / SECTOR..end.min(self.disk_bytes) / SECTOR
    }

    /// What a step that might wait has come to: true when it was done.
    fn done(&self, what: &str, ticket: Ticket, result: Result<bool, Error>) -> Result<bool, String> {
        trace(|| format!("   {what} {ticket:?} {result:?}"));
        match result {
            Ok(true) => {
                self.sim.history().finish(ticket);
                Ok(true)
            }
            Ok(false) => {
                self.sim.history().fail(ticket);
                Ok(false)
            }
            Err(error) => {
                self.sim.history().fail(ticket);
                if error.kind() == ErrorKind::Busy { Ok(false) } else { Err(format!("{what}: {error}")) }
            }
        }
    }

    /// Does something that might wait. What stands in the way of a step that is not nested is a plan of this very thread.
    fn attempt(&self, nested: bool, mut attempt: impl FnMut() -> Result<bool, Error>) -> Result<bool, Error> {
        for _ in 0..if nested { 1 } else { 50 } {
            if attempt()? {
                return Ok(true);
            }
            if !nested {
                self.end_plans();
            }
        }
        Ok(false)
    }

    fn write_sectors(&self, image: &Image, sectors: Range<u64>, nested: bool) -> Result<(), String> {
        trace(|| format!("write {sectors:?}"));
        if !nested {
            self.sim.step(format!("write {sectors:?}"));
        }
        let (ticket, bytes) = self.sim.history().start_write(sectors.start, sectors.end - sectors.start);
        let offset = sectors.start * SECTOR;
        let at_once = sectors.start.is_multiple_of(2);
        let result = self.attempt(nested, || {
            // An error may be left to the call that waits.
            let written = at_once && image.write_at_once(&bytes, offset).unwrap_or(false);
            if written { Ok(true) } else { image.try_write_at(&bytes, offset) }
        });
        self.done("write", ticket, result).map(|_| ())
    }

    fn write(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        self.write_sectors(image, self.sectors(rng, nested), nested)
    }

    fn write_block(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        if self.block_bytes > 1 << 20 || (nested && rng.below(3) != 0) {
            return self.write(rng, image, nested);
        }
        let block = rng.pick(&self.blocks);
        self.write_sectors(image, self.block_sectors(block), nested)
    }

    fn write_through(&self, rng: &mut Rng, image: &Image) -> Result<(), String> {
        let sectors = self.sectors(rng, false);
        self.sim.step(format!("write through {sectors:?}"));
        // It waits for plans, which nobody would end meanwhile.
        self.end_plans_for_good();
        let flush = self.sim.history().start_flush();
        let (ticket, bytes) = self.sim.history().start_write(sectors.start, sectors.end - sectors.start);
        image.write_through_at(&bytes, sectors.start * SECTOR).map_err(text)?;
        self.sim.history().finish_through(ticket);
        self.sim.history().finish_flush(flush);
        self.no_plans.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn zero(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        let sectors = if rng.below(2) == 0 { self.sectors(rng, nested) } else { self.whole_blocks(rng) };
        let unmap = rng.below(4) != 0;
        trace(|| format!("zero {sectors:?} {unmap}"));
        if !nested {
            self.sim.step(format!("zero {sectors:?} {unmap}"));
        }
        let range = sectors.start * SECTOR..sectors.end * SECTOR;
        let ticket = self.sim.history().start_zero(sectors);
        let result = self.attempt(nested, || image.try_write_zeroes(range.clone(), unmap));
        self.done("zero", ticket, result).map(|_| ())
    }

    fn discard(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        let sectors = self.whole_blocks(rng);
        if !nested {
            self.sim.step(format!("discard {sectors:?}"));
        }
        let range = sectors.start * SECTOR..sectors.end * SECTOR;
        let ticket = self.sim.history().start_discard(sectors.clone());
        let result = self.attempt(nested, || image.try_discard(range.clone()));
        let done = self.done("discard", ticket, result)?;
        if done && !nested {
            self.observe(image, &sectors)?;
        }
        Ok(())
    }

    fn flush(&self, image: &Image, nested: bool) -> Result<(), String> {
        if !nested {
            self.sim.step("flush");
        }
        let flush = self.sim.history().start_flush();
        self.is_flushing.store(!nested, Ordering::Relaxed);
        let done = if nested { image.try_flush() } else { image.flush().map(|()| true) };
        self.is_flushing.store(false, Ordering::Relaxed);
        let follower = if nested { None } else { lock(&self.follower).take() };
        if let Some((flush, thread)) = follower {
            let done = thread.join().map_err(|_| "a flush on another thread panicked".to_owned())?;
            done.map_err(|error| format!("flush on another thread: {error}"))?;
            self.sim.history().finish_flush(flush);
        }
        match done {
            Ok(true) => {
                trace(|| "   flushed".to_owned());
                self.sim.history().finish_flush(flush)
            }
            Ok(false) => {}
            Err(error) => return Err(format!("flush: {error}")),
        }
        Ok(())
    }

    fn begin_plan(&self, rng: &mut Rng, image: &Image) -> Result<(), String> {
        if self.no_plans.load(Ordering::Relaxed) || lock(&self.plans).len() >= 4 {
            return self.go_on_with_plan(rng);
        }
        let sectors = self.whole_sectors(rng, image);
        match image.try_plan_write(sectors.start * SECTOR..sectors.end * SECTOR) {
            Ok(Some(plan)) => lock(&self.plans).push(Held { plan, ticket: None }),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(error) => return Err(format!("plan: {error}")),
        }
        Ok(())
    }

    /// A few sectors of the disk's own size.
    fn whole_sectors(&self, rng: &mut Rng, image: &Image) -> Range<u64> {
        let unit = u64::from(image.logical_sector_size()) / SECTOR;
        let sectors = self.sectors(rng, true);
        sectors.start / unit * unit..sectors.end.next_multiple_of(unit)
    }

    /// Begins to read by a plan, or ends one that was begun.
    fn begin_read(&self, rng: &mut Rng, image: &Image) -> Result<(), String> {
        let read = lock(&self.reads).pop();
        if let Some(read) = read {
            return self.finish_read(image, read);
        }
        if self.no_plans.load(Ordering::Relaxed) {
            return Ok(());
        }
        let sectors = self.whole_sectors(rng, image);
        let sectors =
            sectors.start..sectors.end.min(sectors.start / self.per_block() * self.per_block() + self.per_block());
        let ticket = self.sim.history().start_read(sectors.start, sectors.end - sectors.start);
        let plan = image.try_plan_read(sectors.start * SECTOR..sectors.end * SECTOR).map_err(text)?;
        if let Some(plan) = plan {
            lock(&self.reads).push(HeldRead { plan, ticket });
        }
        Ok(())
    }

    /// Sectors of a block.
    fn per_block(&self) -> u64 {
        self.block_bytes / SECTOR
    }

    /// Reads where a plan says: whatever happened meanwhile, nobody else got the place.
    pub(super) fn finish_read(&self, image: &Image, read: HeldRead) -> Result<(), String> {
        let HeldRead { plan, ticket } = read;
        let mut bytes = Vec::new();
        for step in plan.steps() {
            let start = bytes.len();
            bytes.resize(start + usize::try_from(step.length()).map_err(text)?, 0);
            match step {
                ReadStep::File { layer, file_offset, .. } => {
                    let storage = image.layer_storage(*layer).ok_or("a layer without a file")?;
                    storage.read_at(&mut bytes[start..], *file_offset).map_err(text)?;
                }
                ReadStep::Memory(memory) => bytes[start..].copy_from_slice(memory),
                ReadStep::Zero(_) => {}
            }
        }
        drop(plan);
        self.sim.tally("reads by plans that were held");
        self.sim.history().finish_read(ticket, &bytes).map_err(|error| format!("reading by a plan: {error}"))
    }

    /// Writes the payload of a plan, or ends it.
    fn go_on_with_plan(&self, rng: &mut Rng) -> Result<(), String> {
        let held = {
            let mut plans = lock(&self.plans);
            if plans.is_empty() {
                return Ok(());
            }
            let which = rng.below(plans.len() as u64);
            plans.swap_remove(usize::try_from(which).map_err(text)?)
        };
        let Held { plan, ticket } = held;
        match ticket {
            None => {
                let range = plan.range();
                let sectors = range.start / SECTOR..range.end / SECTOR;
                let (ticket, bytes) = self.sim.history().start_write(sectors.start, sectors.end - sectors.start);
                plan.storage().write_at(&bytes, plan.file_offset()).map_err(text)?;
                lock(&self.plans).push(Held { plan, ticket: Some(ticket) });
            }
            Some(ticket) => match rng.below(8) {
                0 => {
                    drop(plan);
                    self.sim.history().fail(ticket);
                }
                1 => {
                    plan.abandon();
                    self.sim.history().fail(ticket);
                }
                _ => match plan.complete() {
                    Ok(()) => self.sim.history().finish(ticket),
                    Err(error) => return Err(format!("complete: {error}")),
                },
            },
        }
        Ok(())
    }

    fn observe(&self, image: &Image, sectors: &Range<u64>) -> Result<(), String> {
        let mut first = sectors.start;
        while first < sectors.end {
            let count = (sectors.end - first).min(2048);
            let mut bytes = vec![0; usize::try_from(count * SECTOR).map_err(text)?];
            let ticket = self.sim.history().start_read(first, count);
            image.read_at(&mut bytes, first * SECTOR).map_err(text)?;
            self.sim.history().finish_read(ticket, &bytes).map_err(|error| format!("reading: {error}"))?;
            first += count;
        }
        Ok(())
    }

    pub(super) fn read(&self, rng: &mut Rng, image: &Image, nested: bool) -> Result<(), String> {
        let sectors = self.sectors(rng, nested);
        self.observe(image, &sectors)
    }
}
