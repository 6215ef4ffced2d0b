//! The plain array that every disk is compared with: pages that were written, over what was there at the start.

use std::collections::BTreeMap;
use std::ops::Range;

use vhdkit::image::BlockDevice;
use vhdkit_testkit::sparse::is_zero;
use vhdkit_testkit::{ModelDisk, Rng};

const PAGE: u64 = 64 << 10;

/// What a disk has to hold.
#[derive(Clone, Debug)]
pub(crate) struct Array {
    pub(crate) size: u64,
    /// What pages hold that nobody wrote to; `None` is zeros.
    base: Option<ModelDisk>,
    /// `None` is zeros.
    pages: BTreeMap<u64, Option<Box<[u8]>>>,
}

impl Array {
    pub(crate) fn zeros(size: u64) -> Self {
        Self { size, base: None, pages: BTreeMap::new() }
    }

    pub(crate) fn over(base: &ModelDisk) -> Self {
        Self { size: base.virtual_size, base: Some(base.clone()), pages: BTreeMap::new() }
    }

    fn base(&self, offset: u64, length: usize) -> Vec<u8> {
        self.base.as_ref().map_or_else(|| vec![0; length], |base| base.read_clipped(offset, length))
    }

    fn page(&mut self, number: u64) -> &mut [u8] {
        if !self.pages.contains_key(&number) {
            let bytes = self.base(number * PAGE, PAGE as usize);
            self.pages.insert(number, Some(bytes.into_boxed_slice()));
        }
        let page = self.pages.get_mut(&number).unwrap();
        page.get_or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice())
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let position = offset + done as u64;
            let within = (position % PAGE) as usize;
            let count = (PAGE as usize - within).min(bytes.len() - done);
            self.page(position / PAGE)[within..within + count].copy_from_slice(&bytes[done..done + count]);
            done += count;
        }
    }

    pub(crate) fn zero(&mut self, range: Range<u64>) {
        let mut position = range.start;
        while position < range.end {
            let within = position % PAGE;
            let count = (PAGE - within).min(range.end - position);
            if count == PAGE {
                self.pages.insert(position / PAGE, None);
            } else {
                self.page(position / PAGE)[within as usize..(within + count) as usize].fill(0);
            }
            position += count;
        }
    }

    pub(crate) fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let position = offset + bytes.len() as u64;
            let within = (position % PAGE) as usize;
            let count = (PAGE as usize - within).min(length - bytes.len());
            match self.pages.get(&(position / PAGE)) {
                Some(Some(page)) => bytes.extend_from_slice(&page[within..within + count]),
                Some(None) => bytes.resize(bytes.len() + count, 0),
                None => bytes.extend(self.base(position, count)),
            }
        }
        bytes
    }

    fn page_is_surely_zero(&self, number: u64) -> bool {
        match self.pages.get(&number) {
            Some(page) => page.as_ref().is_none_or(|page| is_zero(page)),
            None => self.base.as_ref().is_none_or(|base| base.is_surely_zero(number * PAGE, PAGE)),
        }
    }

    /// The pages that hold data or were written to, and of the others so many at random, as ranges.
    fn interesting(&self, rng: &mut Rng, others: u64) -> Vec<Range<u64>> {
        let pages = self.size.div_ceil(PAGE);
        let mut numbers: Vec<u64> =
            (0..pages).filter(|page| self.pages.contains_key(page) || !self.page_is_surely_zero(*page)).collect();
        // 256 MiB of zeros need not be read in full each time.
        let zeros = numbers.iter().filter(|page| self.page_is_surely_zero(**page)).count() as u64;
        let skip = zeros.saturating_sub(512) * 100 / zeros.max(1);
        numbers.retain(|page| !self.page_is_surely_zero(*page) || !rng.chance(skip));
        numbers.extend((0..others.min(pages)).map(|_| rng.below(pages)));
        numbers.push(pages - 1);
        numbers.sort_unstable();
        numbers.dedup();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for number in numbers {
            let range = number * PAGE..((number + 1) * PAGE).min(self.size);
            match ranges.last_mut() {
                Some(last) if last.end == range.start && last.end - last.start < 1 << 20 => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Compares everything that may be data, and samples of the rest, with what `read` gives.
    #[track_caller]
    pub(crate) fn compare(&self, name: &str, rng: &mut Rng, mut read: impl FnMut(u64, usize) -> Vec<u8>) {
        for range in self.interesting(rng, 64) {
            let length = (range.end - range.start) as usize;
            let (actual, expected) = (read(range.start, length), self.read(range.start, length));
            if actual != expected {
                let at = actual.iter().zip(&expected).position(|(left, right)| left != right).unwrap();
                panic!(
                    "{name}: byte {:#x} is {:#04x} instead of {:#04x}",
                    range.start + at as u64,
                    actual[at],
                    expected[at]
                );
            }
        }
    }

    /// Compares with a disk.
    #[track_caller]
    pub(crate) fn compare_disk(&self, name: &str, rng: &mut Rng, disk: &dyn BlockDevice) {
        assert_eq!(disk.size(), self.size, "{name}");
        self.compare(name, rng, |offset, length| {
            let mut bytes = vec![0x3C; length];
            disk.read_at(&mut bytes, offset).unwrap_or_else(|error| panic!("{name}: read at {offset:#x}: {error}"));
            bytes
        });
    }

    /// Whether a range is zero throughout.
    pub(crate) fn is_zero(&self, range: &Range<u64>) -> bool {
        let mut position = range.start;
        while position < range.end {
            let end = ((position / PAGE + 1) * PAGE).min(range.end);
            if !self.page_is_surely_zero(position / PAGE) && !is_zero(&self.read(position, (end - position) as usize)) {
                return false;
            }
            position = end;
        }
        true
    }
}
