//! Random programs on a disk beside a plain array, and what must be true of the file whenever a session has ended.

pub(crate) mod array;
pub(crate) mod reader;
pub(crate) mod watched;

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use vhdkit::format::finding::{Code, Severity};
use vhdkit::image::{
    AtOnce, BlockDevice, ExtentKind, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver, ReadStep,
    WritePlan,
};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit::{ErrorKind, Result};
use vhdkit_testkit::sparse::is_zero;
use vhdkit_testkit::{BuiltImage, Guid, ModelDisk, Rng, SparseFile};

use array::Array;
use reader::{RawImage, current, header, regions};

/// Gives the parents of a chain by depth, whatever their locators say.
#[derive(Debug)]
pub(crate) struct Parents(pub(crate) Vec<Arc<dyn Storage>>);

impl ParentResolver for Parents {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> Result<Vec<ParentCandidate>> {
        let storage = Arc::clone(&self.0[wanted.depth]);
        Ok(vec![ParentCandidate { storage, path: None, named: false, lock: None }])
    }
}

/// A built file in storage.
pub(crate) fn load(file: &SparseFile) -> MemoryStorage {
    let storage = MemoryStorage::new();
    for (offset, bytes) in file.segments() {
        storage.write_at(bytes, offset).unwrap();
    }
    storage.set_len(file.len()).unwrap();
    storage
}

/// The bytes of a storage.
pub(crate) fn snapshot(storage: &dyn Storage) -> SparseFile {
    let (mut file, length) = (SparseFile::new(), storage.len().unwrap());
    let mut position = 0;
    let mut buffer = vec![0; 1 << 20];
    while let Some(data) = storage.next_data(position..length).unwrap() {
        let count = (data.end - data.start).min(buffer.len() as u64);
        storage.read_at(&mut buffer[..count as usize], data.start).unwrap();
        file.write_nonzero(data.start, &buffer[..count as usize]);
        position = data.start + count;
    }
    file.set_len(length);
    file
}

/// The codes of all warnings; errors are not accepted.
pub(crate) fn warnings(name: &str, storage: &Arc<dyn Storage>) -> BTreeSet<String> {
    let report = check(storage, None, &CheckOptions::default(), &()).unwrap();
    assert_eq!(report.errors, 0, "{name}: {:#?}", report.findings);
    let warnings = report.findings.iter().filter(|finding| finding.severity() == Severity::Warning);
    warnings.map(|finding| format!("{:?}", finding.code())).collect()
}

/// Checks an image that a session of its own was closed on: clean, without a word of warning.
#[track_caller]
pub(crate) fn assert_clean(name: &str, storage: &Arc<dyn Storage>) {
    let report = check(storage, None, &CheckOptions::default(), &()).unwrap();
    assert_eq!((report.errors, report.warnings), (0, 0), "{name}: {:#?}", report.findings);
    assert!(report.summary.unwrap().replay.is_none(), "{name}: the log is clean");
}

/// Executes a planned read.
pub(crate) fn read_by_plan(image: &Image, range: Range<u64>) -> (Range<u64>, Vec<u8>) {
    let plan = image.plan_read(range).unwrap();
    let mut bytes = Vec::new();
    for step in plan.steps() {
        match step {
            ReadStep::File { layer, file_offset, length } => {
                let mut part = vec![0; *length as usize];
                image.layer_storage(*layer).unwrap().read_at(&mut part, *file_offset).unwrap();
                bytes.extend(part);
            }
            ReadStep::Memory(part) => bytes.extend(part),
            ReadStep::Zero(length) => bytes.resize(bytes.len() + *length as usize, 0),
        }
    }
    assert_eq!(bytes.len() as u64, plan.range().end - plan.range().start);
    (plan.range(), bytes)
}

/// What a session may have changed.
#[derive(Clone, Copy, Debug, Default)]
struct Changed {
    /// Something was asked for that may change what a guest sees.
    asked: bool,
    /// What a guest sees is different.
    visible: bool,
}

/// A write plan that was not finished yet.
struct Held {
    plan: WritePlan,
    range: Range<u64>,
    bytes: Vec<u8>,
    /// Whether the payload was written.
    written: bool,
}

/// A disk that programs run on.
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) storage: Arc<dyn Storage>,
    parents: Vec<Arc<dyn Storage>>,
    parent_model: Option<ModelDisk>,
    pub(crate) image: Option<Image>,
    pub(crate) array: Array,
    rng: Rng,
    held: Vec<Held>,
    changed: Changed,
    /// The file when it was opened.
    before: SparseFile,
    /// What must stay: the image as its log says it is.
    clean: SparseFile,
    allowed: BTreeSet<String>,
    hot: Vec<u64>,
    fixed: bool,
    /// Whether opening a dirty image may replay it at once.
    pub(crate) eager: bool,
}

impl Machine {
    /// A machine over a built image, which may be dirty; `clean` is the same image before it was made so.
    pub(crate) fn new(
        name: &str,
        top: &BuiltImage,
        clean: &SparseFile,
        storage: Arc<dyn Storage>,
        parents: Vec<Arc<dyn Storage>>,
        seed: u64,
    ) -> Self {
        let mut rng = Rng::new(seed);
        let geometry = top.layout.geometry;
        let mut blocks: Vec<u64> = top.model.blocks.keys().copied().collect();
        rng.shuffle(&mut blocks);
        blocks.truncate(5);
        blocks.extend([0, 1, geometry.block_count - 1, geometry.chunk_ratio - 1, geometry.chunk_ratio]);
        blocks.extend((0..3).map(|_| rng.below(geometry.block_count)));
        if let Some(parent) = &top.parent {
            blocks.push(parent.model.virtual_size / geometry.block_size);
        }
        let hot = blocks.into_iter().filter(|block| *block < geometry.block_count);
        let hot = hot.map(|block| block * geometry.block_size).collect();
        let clean_storage: Arc<dyn Storage> = Arc::new(load(clean));
        Self {
            name: name.to_owned(),
            parents,
            parent_model: top.parent.as_ref().map(|parent| parent.model.clone()),
            image: None,
            array: Array::over(&top.model),
            rng,
            held: Vec::new(),
            changed: Changed::default(),
            before: snapshot(storage.as_ref()),
            storage,
            clean: clean.clone(),
            allowed: warnings(name, &clean_storage),
            hot,
            fixed: clean.read_u32(top.layout.item(Guid::FILE_PARAMETERS) + 4) & 1 != 0,
            eager: true,
        }
    }

    pub(crate) fn options(&self) -> OpenOptions {
        OpenOptions::new().parents(Arc::new(Parents(self.parents.clone())))
    }

    pub(crate) fn image(&self) -> &Image {
        self.image.as_ref().expect("the image is open")
    }

    /// Whether the headers count so high that no session can start (V-017). Such an image is refused untouched.
    pub(crate) fn is_exhausted(&self) -> bool {
        if current(&self.before).sequence < u64::MAX - 1000 {
            return false;
        }
        let opened = self.options().write(true).replay(true).open(Arc::clone(&self.storage), None);
        assert_eq!(opened.unwrap_err().code(), Some(Code::HeaderSequenceExhausted), "{}", self.name);
        assert!(snapshot(self.storage.as_ref()) == self.before, "{}: a refused image was written", self.name);
        true
    }

    /// Opens for writing; a dirty log must have been refused before that is allowed to replay it.
    pub(crate) fn open(&mut self) {
        self.before = snapshot(self.storage.as_ref());
        self.changed = Changed::default();
        let plain = self.options().write(true).open(Arc::clone(&self.storage), None);
        let dirty = current(&self.before).log_guid != Guid::ZERO;
        let image = match plain {
            Ok(image) => {
                assert!(!dirty, "{}: a dirty image was opened for writing without a word", self.name);
                image
            }
            Err(error) => {
                assert!(dirty && error.kind() == ErrorKind::NeedsReplay, "{}: {error}", self.name);
                let image = self.options().write(true).replay(true).open(Arc::clone(&self.storage), None).unwrap();
                if self.rng.chance(30) {
                    assert!(snapshot(self.storage.as_ref()) == self.before, "{}: opening wrote", self.name);
                }
                if self.eager && self.rng.chance(30) {
                    assert!(image.replay().unwrap().is_some());
                    assert!(image.replay().unwrap().is_none(), "it is clean now");
                }
                image
            }
        };
        assert!(!image.is_read_only());
        self.image = Some(image);
    }

    /// Closes, drops, and judges the file.
    pub(crate) fn close(&mut self) {
        self.finish_all();
        let image = self.image.take().unwrap();
        image.close().unwrap_or_else(|error| panic!("{}: {error}", self.name));
        assert_eq!(image.write_at(&[1], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(image.reopen(true).unwrap_err().kind(), ErrorKind::ReadOnly);
        self.array.compare_disk(&format!("{}, closed", self.name), &mut self.rng, &image);
        drop(image);
        self.judge();
    }

    /// Judges the file after a session has ended.
    pub(crate) fn judge(&mut self) {
        let name = self.name.clone();
        let after = snapshot(self.storage.as_ref());
        if after == self.before {
            assert!(!self.changed.visible, "{name}: nothing was written");
            return;
        }
        self.judge_headers(&after);
        self.judge_untouched(&after);
        let warnings = warnings(&name, &self.storage);
        assert!(warnings.is_subset(&self.allowed), "{name}: {warnings:?} is more than {:?}", self.allowed);
        let raw = RawImage::new(&after, self.parent_model.as_ref());
        raw.assert_owned_once(&name);
        self.array.compare(&format!("{name}, stranger"), &mut self.rng, |offset, length| raw.read(offset, length));
        let fresh = self.options().open(Arc::clone(&self.storage), None).unwrap();
        assert!(fresh.layers()[0].replay().is_none(), "{name}: still dirty");
        self.array.compare_disk(&format!("{name}, opened anew"), &mut self.rng, &fresh);
        if self.fixed {
            assert_eq!(after.len(), self.clean.len(), "{name}: a fixed image keeps its length");
        }
        self.before = after;
    }

    /// V-171 to V-173.
    fn judge_headers(&self, after: &SparseFile) {
        let name = &self.name;
        let [first, second] =
            [header(after, 0), header(after, 1)].map(|header| header.expect("both headers are valid"));
        assert_eq!(first.sequence.abs_diff(second.sequence), 1, "{name}: V-171");
        let same = reader::RawHeader { sequence: first.sequence, ..second.clone() };
        assert_eq!(first, same, "{name}: V-171");
        assert_eq!(first.log_guid, Guid::ZERO, "{name}: V-172");
        let before = current(&self.before);
        assert!(first.sequence.max(second.sequence) > before.sequence, "{name}");
        assert_eq!((first.log_offset, first.log_length), (before.log_offset, before.log_length), "{name}");
        assert_ne!(first.file_write_guid, before.file_write_guid, "{name}: V-173, bytes have changed");
        let data = first.data_write_guid != before.data_write_guid;
        assert!(data || !self.changed.visible, "{name}: V-173, what a guest sees has changed");
        assert!(!data || self.changed.asked, "{name}: V-173, nothing that a guest can see was asked for");
    }

    /// V-170 and V-177: what no writer of blocks has any business with.
    fn judge_untouched(&self, after: &SparseFile) {
        let mut untouched = vec![
            ("file identifier", 0..1 << 16),
            ("rest of header 1", (1 << 16) + 4096..2 << 16),
            ("rest of header 2", (2 << 16) + 4096..1 << 20),
        ];
        for (guid, range) in regions(&self.clean) {
            match guid {
                Guid::BAT => {}
                Guid::METADATA => untouched.push(("metadata", range)),
                _ => untouched.push(("unknown region", range)),
            }
        }
        for (what, range) in untouched {
            let length = (range.end - range.start) as usize;
            let same = after.read(range.start, length) == self.clean.read(range.start, length);
            assert!(same, "{}: V-170, V-177: {what} has changed", self.name);
        }
    }

    /// A range with a liking for the ends of blocks; `aligned` to sectors.
    fn range(&mut self, aligned: bool) -> Range<u64> {
        let size = self.array.size;
        let sector = u64::from(self.image().logical_sector_size());
        let unit = if aligned { sector } else { self.rng.pick(&[1, 1, 7, sector, sector, 4096]) };
        let length = match self.rng.below(10) {
            0 => self.rng.between(1, 3),
            1..=4 => self.rng.between(1, 9000),
            5..=7 => self.rng.between(1, 70_000),
            8 => self.rng.between(1, 400_000),
            _ => self.rng.between(1, 2_500_000),
        };
        let near = self.rng.pick(&self.hot.clone());
        let start = match self.rng.below(5) {
            0 => near,
            1 => near.saturating_sub(self.rng.below(length + 1)),
            2 => near + self.rng.below(self.image().allocation_unit()),
            3 => near + self.rng.below(20) * 512,
            _ => size.saturating_sub(length),
        };
        let start = start.min(size - 1) / unit * unit;
        let end = (start + length.next_multiple_of(unit)).min(size);
        if aligned && !start.is_multiple_of(sector) { 0..sector } else { start..end }
    }

    /// A few whole blocks.
    fn whole_blocks(&mut self) -> Range<u64> {
        let block = self.image().allocation_unit();
        let start = self.rng.pick(&self.hot.clone());
        let count = self.rng.pick(&[1, 1, 1, 2, 3]);
        start..(start + count * block).min(self.array.size)
    }

    fn is_held(&self, range: &Range<u64>) -> bool {
        let sector = u64::from(self.image().logical_sector_size());
        let wide = range.start / sector * sector..range.end.next_multiple_of(sector);
        self.held.iter().any(|held| held.range.start < wide.end && wide.start < held.range.end)
    }

    fn bytes(&mut self, length: u64) -> Vec<u8> {
        if self.rng.chance(8) { vec![0; length as usize] } else { self.rng.bytes(length as usize) }
    }

    fn read(&self, range: &Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0xC3; (range.end - range.start) as usize];
        self.image().read_at(&mut bytes, range.start).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let mut again = vec![0x3C; bytes.len()];
        match self.image().read_at_once(&mut again, range.start).unwrap() {
            AtOnce::Filled => assert_eq!(again, bytes, "{}: read at once, {range:x?}", self.name),
            AtOnce::Zero => assert!(bytes.iter().all(|byte| *byte == 0), "{}: zero at once, {range:x?}", self.name),
            AtOnce::Waits => {}
        }
        bytes
    }

    /// Takes over what the disk holds after something that may have been done by half: every 512 bytes old or new.
    fn adopt(&mut self, what: &str, range: &Range<u64>, new: impl Fn(u64, usize) -> Vec<u8>) {
        let mut position = range.start;
        while position < range.end {
            let end = ((position / 512 + 1) * 512).min(range.end);
            let (actual, length) = (self.read(&(position..end)), (end - position) as usize);
            let old = self.array.read(position, length);
            if actual != old {
                assert!(actual == new(position, length), "{}: {what}: neither old nor new at {position:#x}", self.name);
                self.array.write(position, &actual);
                self.changed.visible = true;
            }
            position = end;
        }
    }

    fn put(&mut self, range: &Range<u64>, bytes: &[u8]) {
        self.changed.asked = true;
        self.changed.visible |= self.array.read(range.start, bytes.len()) != bytes;
        self.array.write(range.start, bytes);
    }

    fn write(&mut self, through: bool) {
        let aligned = self.rng.chance(30);
        let mut range = self.range(aligned);
        if self.rng.chance(4) && self.image().allocation_unit() <= 2 << 20 {
            range = self.whole_blocks();
        }
        if self.is_held(&range) {
            return;
        }
        let bytes = self.bytes(range.end - range.start);
        self.changed.asked = true;
        if self.held.is_empty() {
            let image = self.image();
            let at_once = !through && range.start.is_multiple_of(2);
            let done = if through {
                image.write_through_at(&bytes, range.start)
            } else if at_once && image.write_at_once(&bytes, range.start).unwrap_or(false) {
                Ok(())
            } else {
                image.write_at(&bytes, range.start)
            };
            done.unwrap_or_else(|error| panic!("{}: write of {range:x?}: {error}", self.name));
            self.put(&range, &bytes);
        } else if self.image().try_write_at(&bytes, range.start).unwrap() {
            self.put(&range, &bytes);
        } else {
            let start = range.start;
            self.adopt("write", &range, |at, length| bytes[(at - start) as usize..][..length].to_vec());
        }
    }

    fn zero(&mut self, range: &Range<u64>) {
        if self.is_held(range) {
            return;
        }
        let unmap = self.rng.chance(60);
        self.changed.asked = true;
        let done = if self.held.is_empty() {
            self.image().write_zeroes(range.clone(), unmap).map(|()| true)
        } else {
            self.image().try_write_zeroes(range.clone(), unmap)
        };
        if done.unwrap_or_else(|error| panic!("{}: zeroes over {range:x?}: {error}", self.name)) {
            self.changed.visible |= !self.array.is_zero(range);
            self.array.zero(range.clone());
        } else {
            self.adopt("zeroes", range, |_, length| vec![0; length]);
        }
    }

    /// Every whole block is as it was or zero; everything else stays.
    fn discard(&mut self, range: &Range<u64>) {
        if self.is_held(range) {
            return;
        }
        let before = Changed { asked: true, ..self.changed };
        let done = if self.held.is_empty() {
            self.image().discard(range.clone()).map(|()| true)
        } else {
            self.image().try_discard(range.clone())
        };
        done.unwrap_or_else(|error| panic!("{}: discard of {range:x?}: {error}", self.name));
        self.changed = before;
        let block = self.image().allocation_unit();
        let mut position = range.start;
        while position < range.end {
            let start = position / block * block;
            let end = (start + block).min(self.array.size);
            let whole = range.start <= start && end <= range.end;
            let part = position..end.min(range.end);
            let steps = || (part.start..part.end).step_by(1 << 20).map(|step| step..(step + (1 << 20)).min(part.end));
            let old =
                steps().all(|step| self.read(&step) == self.array.read(step.start, (step.end - step.start) as usize));
            if !old {
                assert!(whole, "{}: a discard changed a part of block {:#x}", self.name, start / block);
                let zero = steps().all(|step| is_zero(&self.read(&step)));
                assert!(zero, "{}: a discard of {range:x?} left something else", self.name);
                self.changed.visible = true;
                self.array.zero(part.clone());
            }
            position = part.end;
        }
    }

    fn plan(&mut self) {
        let range = self.range(true);
        if self.is_held(&range) {
            return;
        }
        self.changed.asked = true;
        let plan = if self.held.is_empty() {
            self.image().plan_write(range).unwrap_or_else(|error| panic!("{}: {error}", self.name))
        } else {
            match self.image().try_plan_write(range).unwrap() {
                Some(plan) => plan,
                None => return,
            }
        };
        let range = plan.range();
        let bytes = self.bytes(range.end - range.start);
        self.held.push(Held { plan, range, bytes, written: false });
        if self.rng.chance(60) {
            self.write_plan(self.held.len() - 1);
        }
        if self.rng.chance(60) || self.held.len() > 3 {
            self.finish_one();
        }
    }

    fn write_plan(&mut self, number: usize) {
        let held = &mut self.held[number];
        held.written = true;
        held.plan.storage().write_at(&held.bytes, held.plan.file_offset()).unwrap();
        // Sectors that were mapped show at once, the others with completion.
        let (range, bytes) = (held.range.clone(), held.bytes.clone());
        let start = range.start;
        self.adopt("plan", &range, |at, length| bytes[(at - start) as usize..][..length].to_vec());
    }

    fn finish_one(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let number = self.rng.below(self.held.len() as u64) as usize;
        match self.rng.below(4) {
            0 => drop(self.held.swap_remove(number).plan),
            1 => self.held.swap_remove(number).plan.abandon(),
            _ => {
                if !self.held[number].written {
                    self.write_plan(number);
                }
                let held = self.held.swap_remove(number);
                held.plan.complete().unwrap();
                self.put(&held.range, &held.bytes);
            }
        }
    }

    fn finish_all(&mut self) {
        while !self.held.is_empty() {
            self.finish_one();
        }
    }

    fn look(&mut self) {
        let range = self.range(false);
        let expected = self.array.read(range.start, (range.end - range.start) as usize);
        let same = self.read(&range) == expected;
        assert!(same, "{}: read of {range:x?}", self.name);
        let range = self.range(true);
        let (range, bytes) = read_by_plan(self.image(), range);
        let same = bytes == self.array.read(range.start, bytes.len());
        assert!(same, "{}: planned read of {range:x?}", self.name);
    }

    /// What extents say is what reads give.
    pub(crate) fn judge_extents(&mut self) {
        let image = self.image.take().unwrap();
        let mut extents = Vec::new();
        image
            .visit_extents(0..image.size(), &mut |extent| {
                extents.push(*extent);
                ControlFlow::Continue(())
            })
            .unwrap();
        let mut position = 0;
        let sampled = extents.len() > 600;
        for extent in extents {
            assert_eq!(extent.start, position, "{}: a gap before {extent:x?}", self.name);
            position = extent.end();
            if sampled && self.rng.chance(70) {
                continue;
            }
            match extent.kind {
                ExtentKind::Zero | ExtentKind::Hole => {
                    let zero = self.array.is_zero(&(extent.start..extent.end()));
                    assert!(zero, "{}: {extent:x?} is not zero", self.name);
                }
                ExtentKind::Data { file_offset: Some(offset) } => {
                    let length = extent.length.min(8192);
                    for within in [0, extent.length - length, self.rng.below(extent.length - length + 1)] {
                        let mut bytes = vec![0; length as usize];
                        image.layer_storage(extent.layer).unwrap().read_at(&mut bytes, offset + within).unwrap();
                        let same = bytes == self.array.read(extent.start + within, length as usize);
                        assert!(same, "{}: {extent:x?} holds something else", self.name);
                    }
                }
                ExtentKind::Data { file_offset: None } => {}
            }
        }
        assert_eq!(position, image.size(), "{}", self.name);
        self.image = Some(image);
    }

    fn reopen(&mut self) {
        if self.held.is_empty() {
            self.image().reopen(false).unwrap();
            assert!(self.image().is_read_only());
            assert_eq!(self.image().write_at(&[1], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
            self.look();
            self.image().reopen(true).unwrap();
        } else {
            assert_eq!(self.image().close_within(Duration::ZERO).unwrap_err().kind(), ErrorKind::Busy);
        }
    }

    /// The handle goes, and plans that are left do what they still do.
    fn drop_image(&mut self) {
        let image = self.image.take().unwrap();
        let mut held = std::mem::take(&mut self.held);
        drop(image);
        while let Some(mut last) = held.pop() {
            if self.rng.chance(50) {
                last.plan.storage().write_at(&last.bytes, last.plan.file_offset()).unwrap();
                last.written = true;
                let (range, bytes) = (last.range.clone(), last.bytes.clone());
                last.plan.complete().unwrap();
                self.put(&range, &bytes);
            }
        }
        self.judge();
    }

    /// Writes one range and remembers it.
    pub(crate) fn put_for_test(&mut self, offset: u64, bytes: &[u8]) {
        self.image().write_at(bytes, offset).unwrap();
        self.put(&(offset..offset + bytes.len() as u64), bytes);
    }

    /// Discards a range and takes over what became of it.
    pub(crate) fn discard_for_test(&mut self, range: Range<u64>) {
        self.discard(&range);
    }

    /// One random step.
    pub(crate) fn step(&mut self) {
        match self.rng.below(100) {
            0..=35 => self.write(false),
            36..=38 => self.write(true),
            39..=46 => {
                let range = self.range(false);
                self.zero(&range);
            }
            47..=54 => {
                let range = self.whole_blocks();
                self.zero(&range);
            }
            55..=62 => {
                let range = if self.rng.chance(70) { self.whole_blocks() } else { self.range(false) };
                self.discard(&range);
            }
            63..=71 => self.image().flush().unwrap(),
            72..=79 => self.plan(),
            80..=83 => self.finish_one(),
            84..=92 => self.look(),
            93..=94 => {
                self.close();
                self.open();
            }
            95..=96 => self.reopen(),
            97 => {
                self.drop_image();
                self.open();
            }
            _ => self.judge_extents(),
        }
    }
}
