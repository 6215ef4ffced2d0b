//! Turns a clean image into one whose truth is in the log.
//!
//! ```text
//! ring: | older generation | gap | retired | active: tail .. head | other GUID, next number | older run |
//! ```

use crate::builder::BuiltImage;
use crate::guid::Guid;
use crate::log::{DescriptorSpec, LogEntrySpec, LogRing, Placed};
use crate::rng::Rng;
use crate::sparse::is_zero;
use crate::spec::{Checksum, put};

/// A page of the file and of the log.
const PAGE: u64 = 4096;

/// What the home of a logged page holds until replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stale {
    /// Zeros: the page as it was before anything was written.
    #[default]
    Zeros,
    /// Random bytes: a page torn while it was written.
    Junk,
}

/// How to make an image dirty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPlan {
    /// Seed of all junk.
    pub seed: u64,
    /// The log's identity, which goes into every valid header.
    pub log_guid: Guid,
    /// Sequence number of the first entry of the run.
    pub first_sequence: u64,
    /// Ring offset of the first thing written.
    pub ring_start: u32,
    /// File offsets of the pages whose truth moves into the log.
    pub pages: Vec<u64>,
    /// Ranges that are zero in truth: the home gets junk, the log a zero descriptor. Offset, length.
    pub zero_ranges: Vec<(u64, u64)>,
    /// What the homes hold.
    pub stale: Stale,
    /// Active entries that the pages are spread over.
    pub entries: usize,
    /// Whether an entry without descriptors starts the active sequence.
    pub empty_first: bool,
    /// Whether each page is in an earlier active entry too, with junk that the later image must win over.
    pub supersede: bool,
    /// Entries of the same run before the tail, with junk for the same pages.
    pub retired: usize,
    /// File offset of a page that the retired entries overwrite and nothing restores: only a reader that replays
    /// retired entries is harmed.
    pub poison: Option<u64>,
    /// Entries of other GUIDs with junk: so many before the run, and one behind its head with the next number.
    pub older_generations: usize,
    /// Bytes between the older generations and the run.
    pub gap: u32,
    /// Whether a run of the same GUID with lower numbers and junk lies behind the newer one.
    pub older_run: bool,
    /// Cuts the file off here; only the log's `LastFileOffset` still tells the real length.
    pub cut_file: Option<u64>,
}

impl DirtyPlan {
    /// A plan that moves nothing yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            log_guid: Guid::seeded(seed ^ 0x006C_6F67),
            first_sequence: 1 + (seed & 0xFFFF),
            ring_start: 0,
            pages: Vec::new(),
            zero_ranges: Vec::new(),
            stale: Stale::default(),
            entries: 1,
            empty_first: false,
            supersede: false,
            retired: 0,
            poison: None,
            older_generations: 0,
            gap: 0,
            older_run: false,
            cut_file: None,
        }
    }

    /// Any change of the fields, within a chain of calls.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Moves the pages of a range that hold anything but zeros.
    #[must_use]
    pub fn move_range(mut self, image: &BuiltImage, offset: u64, length: u64) -> Self {
        let pages = (offset / PAGE..(offset + length).div_ceil(PAGE)).map(|page| page * PAGE);
        self.pages.extend(pages.filter(|page| !is_zero(&image.file.read(*page, 4096))));
        self
    }

    /// Moves the BAT.
    #[must_use]
    pub fn move_bat(self, image: &BuiltImage) -> Self {
        let layout = &image.layout;
        let length = u64::from(layout.bat_length).min(layout.geometry.entries_required * 8);
        self.move_range(image, layout.bat, length)
    }

    /// Moves every bitmap block.
    #[must_use]
    pub fn move_bitmaps(self, image: &BuiltImage) -> Self {
        image.layout.bitmaps.values().fold(self, |plan, offset| plan.move_range(image, *offset, 1 << 20))
    }

    /// Moves the metadata table and its items.
    #[must_use]
    pub fn move_metadata(self, image: &BuiltImage) -> Self {
        self.move_range(image, image.layout.metadata, 65_536 + 8192)
    }

    /// Moves both region tables.
    #[must_use]
    pub fn move_region_tables(self, image: &BuiltImage) -> Self {
        self.move_range(image, image.layout.region_table(0), 2 << 16)
    }

    /// Makes `image` dirty; the model stays as it is, for it says what a guest must see after replay.
    ///
    /// Gives the places of the active entries.
    pub fn apply(&self, image: &mut BuiltImage) -> Vec<Placed> {
        let truth: Vec<DescriptorSpec> = self
            .pages
            .iter()
            .map(|page| DescriptorSpec::data(*page, &image.file.read(*page, 4096)))
            .chain(self.zero_ranges.iter().map(|(offset, length)| DescriptorSpec::zero(*offset, *length)))
            .collect();
        let length = image.file.len();
        let mut writer = Writer::new(self, image);
        writer.hide_homes();
        if let Some(cut) = self.cut_file {
            writer.image.file.set_len(cut);
        }
        writer.flushed = self.cut_file.unwrap_or(length);
        writer.last = length;
        let placed = writer.write_ring(&truth);
        for slot in 0..2 {
            edit_header(writer.image, slot, |bytes| put(bytes, 48, &self.log_guid.0));
        }
        placed
    }
}

/// Changes a header and gives it a new checksum; a header that is not valid stays as it is.
pub fn edit_header(image: &mut BuiltImage, slot: u64, change: impl FnOnce(&mut [u8])) {
    let offset = image.layout.header(slot);
    let mut bytes = image.file.read(offset, 4096);
    let before = bytes.clone();
    Checksum::Correct.apply(&mut bytes);
    if bytes != before || bytes[..4] != *b"head" {
        return;
    }
    change(&mut bytes);
    Checksum::Correct.apply(&mut bytes);
    image.file.write(offset, &bytes);
}

/// The work of one [`DirtyPlan::apply`].
struct Writer<'work> {
    plan: &'work DirtyPlan,
    image: &'work mut BuiltImage,
    ring: LogRing,
    rng: Rng,
    /// Bytes of the ring that were written or left as a gap.
    used: u64,
    flushed: u64,
    last: u64,
}

impl<'work> Writer<'work> {
    fn new(plan: &'work DirtyPlan, image: &'work mut BuiltImage) -> Self {
        let mut ring = LogRing::new(image.layout.log, image.layout.log_length);
        ring.seek(plan.ring_start);
        Self { plan, image, ring, rng: Rng::new(plan.seed), used: 0, flushed: 0, last: 0 }
    }

    fn hide_homes(&mut self) {
        for page in &self.plan.pages {
            match self.plan.stale {
                Stale::Zeros => self.image.file.zero(*page, PAGE),
                Stale::Junk => self.image.file.write(*page, &self.rng.bytes(4096)),
            }
        }
        for (offset, length) in &self.plan.zero_ranges {
            self.image.file.write(*offset, &self.rng.bytes(*length as usize));
        }
    }

    fn entry(&self, guid: Guid, sequence: u64) -> LogEntrySpec {
        LogEntrySpec::new(guid, sequence, 0).with(|entry| {
            entry.flushed_file_offset = self.flushed;
            entry.last_file_offset = self.last;
        })
    }

    /// An entry with junk for one of the pages, or without descriptors if there are none.
    fn junk_entry(&mut self, guid: Guid, sequence: u64) -> LogEntrySpec {
        let mut entry = self.entry(guid, sequence);
        if !self.plan.pages.is_empty() {
            let page = self.rng.pick(&self.plan.pages);
            entry = entry.descriptor(DescriptorSpec::data(page, &self.rng.bytes(4096)));
        }
        entry
    }

    fn place(&mut self, entry: &LogEntrySpec) -> Placed {
        let placed = self.ring.place(&mut self.image.file, entry);
        self.used += u64::from(placed.length);
        assert!(self.used <= u64::from(self.ring.length), "the entries do not fit the ring");
        placed
    }

    fn write_ring(&mut self, truth: &[DescriptorSpec]) -> Vec<Placed> {
        let plan = self.plan;
        for generation in 0..plan.older_generations as u64 {
            let entry = self.junk_entry(Guid::seeded(plan.seed ^ 0xF00 ^ generation), plan.first_sequence + generation);
            self.place(&entry);
        }
        self.ring.skip(plan.gap);
        self.used += u64::from(plan.gap);
        let mut sequence = plan.first_sequence;
        for _ in 0..plan.retired {
            let mut entry = self.junk_entry(plan.log_guid, sequence);
            if let Some(poison) = plan.poison {
                entry = entry.descriptor(DescriptorSpec::data(poison, &self.rng.bytes(4096)));
            }
            self.place(&entry);
            sequence += 1;
        }
        let tail = self.ring.position;
        let mut placed = Vec::new();
        for entry in self.active_entries(truth, tail, sequence) {
            placed.push(self.place(&entry));
        }
        let next = sequence + placed.len() as u64;
        if plan.older_generations > 0 {
            let entry = self.junk_entry(Guid::seeded(plan.seed ^ 0xE00), next);
            self.place(&entry);
        }
        if plan.older_run && plan.first_sequence > 3 {
            let entry = self.junk_entry(plan.log_guid, 1);
            let tail = self.place(&entry).start;
            let entry = self.junk_entry(plan.log_guid, 2).tail(tail);
            self.place(&entry);
        }
        placed
    }

    /// The active sequence: its pages in the order of the plan, the zero ranges between them.
    fn active_entries(&mut self, truth: &[DescriptorSpec], tail: u32, first_sequence: u64) -> Vec<LogEntrySpec> {
        let plan = self.plan;
        let mut contents: Vec<Vec<DescriptorSpec>> = Vec::new();
        if plan.empty_first {
            contents.push(Vec::new());
        }
        if plan.supersede {
            for page in &plan.pages {
                contents.push(vec![DescriptorSpec::data(*page, &self.rng.bytes(4096))]);
            }
        }
        let mut truth = truth.to_vec();
        self.rng.shuffle(&mut truth);
        let share = truth.len().div_ceil(plan.entries.max(1)).max(1);
        contents.extend(truth.chunks(share).map(<[DescriptorSpec]>::to_vec));
        if contents.is_empty() {
            contents.push(Vec::new());
        }
        let numbered = (first_sequence..).zip(contents);
        numbered
            .map(|(sequence, descriptors)| {
                let entry = self.entry(plan.log_guid, sequence).tail(tail);
                entry.with(|entry| entry.descriptors = descriptors)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::ImageBuilder;

    #[test]
    fn the_ring_holds_what_the_plan_says() {
        let clean = ImageBuilder::new(8 << 20, 1 << 20).pattern_block(0, 1).pattern_block(1, 2).build();
        let poison = clean.layout.payload_block(0);
        let plan = DirtyPlan::new(3).move_bat(&clean).with(|plan| {
            plan.retired = 2;
            plan.poison = Some(poison);
            plan.supersede = true;
            plan.older_run = true;
            plan.first_sequence = 100;
            plan.ring_start = (1 << 20) - 3 * 4096;
            plan.cut_file = Some(clean.file.len() - (1 << 20));
        });
        let mut image = clean.clone();
        let placed = plan.apply(&mut image);
        // Each retired entry takes three sectors; the second one ends in the ring's next round.
        assert_eq!(placed.iter().map(|placed| placed.start).collect::<Vec<_>>(), [3 * 4096, 5 * 4096]);
        for (sequence, place) in (102..).zip(&placed) {
            let entry = image.layout.log + u64::from(place.start);
            assert_eq!(image.file.read(entry, 4), b"loge");
            assert_eq!(image.file.read_u32(entry + 12), placed[0].start);
            assert_eq!(image.file.read_u64(entry + 16), sequence);
            assert_eq!(image.file.read(entry + 32, 16), plan.log_guid.0);
            assert_eq!(image.file.read_u64(entry + 48), image.file.len());
            assert_eq!(image.file.read_u64(entry + 56), clean.file.len());
        }
        // The head carries the true page: first word in the descriptor, the rest in the sector.
        let head = image.layout.log + u64::from(placed[1].start);
        assert_eq!(image.file.read_u64(head + 72), clean.file.read_u64(clean.layout.bat));
        assert!(image.file.read(head + 4096 + 8, 4084) == clean.file.read(clean.layout.bat + 8, 4084));
        assert!(is_zero(&image.file.read(image.layout.bat, 4096)));
        assert!(image.file.read(poison, 4096) == clean.file.read(poison, 4096), "retired entries are not applied");
        // The older run: the same identity, lower numbers.
        assert_eq!(image.file.read_u64(image.layout.log + 7 * 4096 + 16), 1);
        for slot in 0..2 {
            assert_eq!(image.file.read(image.layout.header(slot) + 48, 16), plan.log_guid.0);
        }
    }

    #[test]
    fn an_invalid_header_stays_as_it_is() {
        let mut image =
            ImageBuilder::new(1 << 20, 1 << 20).with(|builder| builder.headers[0].checksum = Checksum::Wrong).build();
        let before = image.file.clone();
        edit_header(&mut image, 0, |bytes| bytes[8] = 99);
        assert_eq!(image.file, before);
        edit_header(&mut image, 1, |bytes| bytes[8] = 99);
        assert_ne!(image.file, before);
    }
}
