//! Free space of exFAT: the clear bits of the allocation bitmap, which the root directory names.
//!
//! ```text
//! | boot region: 12 sectors | its copy | table | cluster heap: clusters 2, 3, ...
//! ```
//!
//! Source: Microsoft exFAT file system specification (2019), sections in the comments.

use std::mem::offset_of;
use std::ops::Range;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::sums;
use super::window::{Checked, FreeSink, READ_BYTES_MAX, Tick, Window, clear_runs, parse, reason, require};

/// The main boot sector (3.1).
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBoot {
    jump: [u8; 3],
    name: [u8; 8],
    must_be_zero: [u8; 53],
    partition_offset: U64,
    volume_length: U64,
    table_offset: U32,
    table_length: U32,
    heap_offset: U32,
    clusters: U32,
    root_cluster: U32,
    serial: U32,
    revision: U16,
    flags: U16,
    sector_shift: u8,
    cluster_shift: u8,
    tables: u8,
    drive: u8,
    percent_in_use: u8,
    reserved: [u8; 7],
    code: [u8; 390],
    signature: [u8; 2],
}

const _: () = assert!(
    size_of::<RawBoot>() == 512
        && offset_of!(RawBoot, volume_length) == 72
        && offset_of!(RawBoot, revision) == 104
        && offset_of!(RawBoot, flags) == 106
        && offset_of!(RawBoot, percent_in_use) == 112
);

/// A directory entry for the allocation bitmap or the up-case table (7.1, 7.2).
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    kind: u8,
    flags: u8,
    reserved: [u8; 2],
    checksum: U32,
    reserved_too: [u8; 12],
    first_cluster: U32,
    length: U64,
}

const _: () = assert!(size_of::<RawEntry>() == 32 && offset_of!(RawEntry, first_cluster) == 20);

/// Sectors of the boot region that its checksum covers; the next one is full of it (3.4).
const SUMMED_SECTORS: u64 = 11;
/// Kinds of entries.
const ENTRY_END: u8 = 0;
const ENTRY_BITMAP: u8 = 0x81;
const ENTRY_UPCASE: u8 = 0x82;
/// Flags of the volume (3.1.13).
const SECOND_TABLE: u16 = 1;
const DIRTY: u16 = 2;
const MEDIA_FAILURE: u16 = 4;
/// Largest cluster: 32 MiB (3.1.15).
const CLUSTER_SHIFT_MAX: u8 = 25;
/// Longest directory (6.1 of the specification says 256 MiB); the entries looked for stand at the beginning.
const ROOT_BYTES_MAX: u64 = 32 << 20;
/// Longest up-case table: one unit for each of 65536 characters (7.2.5).
const UPCASE_BYTES_MAX: u64 = 128 << 10;
/// Most runs of clusters of a file that are followed.
const RUNS_MAX: usize = 1 << 16;

/// A volume that is in order.
#[derive(Clone, Debug)]
pub(super) struct ExFat {
    bytes: u64,
    cluster: u64,
    clusters: u64,
    table_offset: u64,
    heap_offset: u64,
    /// Runs of clusters, counted from 0, that hold the bitmap.
    bitmap: Vec<Range<u64>>,
    /// Clusters of bitmap, root directory and up-case table, in order.
    taken: Vec<Range<u64>>,
}

impl ExFat {
    /// Reads the boot region, and finds the bitmap.
    pub(super) fn open(window: &Window<'_>) -> Checked<Self> {
        let raw: RawBoot = window.read_struct(0)?;
        let mut this = Self::numbers(&raw)?;
        require(this.bytes <= window.length(), "it is larger than what it lies in")?;
        boot_sum(window, 1 << raw.sector_shift)?;
        let flags = raw.flags.get();
        require(flags & DIRTY == 0, "it is marked dirty: it needs a check")?;
        require(flags & MEDIA_FAILURE == 0, "it says that its medium has failed")?;
        require(flags & SECOND_TABLE == 0 && raw.tables == 1, "it has two tables (TexFAT), which is not understood")?;

        let root = this.chain(window, raw.root_cluster.get(), ROOT_BYTES_MAX)?;
        let (bitmap, upcase) = this.system_entries(window, &root)?;
        let needed = this.clusters.div_ceil(8);
        require(bitmap.length.get() >= needed, "its bitmap is too short")?;
        this.bitmap = this.chain(window, bitmap.first_cluster.get(), needed)?;
        let upcase_runs = this.check_upcase(window, &upcase)?;
        let mut taken = [root, this.bitmap.clone(), upcase_runs].concat();
        taken.sort_unstable_by_key(|range| range.start);
        let apart = taken.iter().zip(taken.iter().skip(1)).all(|(one, next)| one.end <= next.start);
        require(apart, "its system files overlap")?;
        this.taken = taken;
        Ok(this)
    }

    fn numbers(raw: &RawBoot) -> Checked<Self> {
        require(raw.must_be_zero.iter().all(|byte| *byte == 0), "its boot sector has fields of another file system")?;
        require(raw.revision.get() == 0x100, "its revision is not 1.00")?;
        let (sector_shift, cluster_shift) = (raw.sector_shift, raw.cluster_shift);
        let fits = (9..=12).contains(&sector_shift) && cluster_shift <= CLUSTER_SHIFT_MAX - sector_shift;
        require(fits, "its sector or cluster size is not one")?;
        let clusters = u64::from(raw.clusters.get());
        let sectors = raw.volume_length.get();
        let per_cluster = 1_u64 << cluster_shift;
        let [table, table_sectors, heap] =
            [raw.table_offset, raw.table_length, raw.heap_offset].map(|value| u64::from(value.get()));
        require(sectors < 1 << 48 && clusters > 0 && clusters < 0xffff_fff5, "its numbers are not ones")?;
        let apart = table >= 24 && table + table_sectors <= heap && heap + clusters * per_cluster <= sectors;
        require(apart, "its parts overlap or lie outside of it")?;
        require((clusters + 2) * 4 <= table_sectors << sector_shift, "its table is too short for its clusters")?;
        Ok(Self {
            bytes: sectors << sector_shift, // below 2^60
            cluster: per_cluster << sector_shift,
            clusters,
            table_offset: table << sector_shift,
            heap_offset: heap << sector_shift,
            bitmap: Vec::new(),
            taken: Vec::new(),
        })
    }

    /// Bytes of the volume.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a cluster.
    pub(super) const fn cluster_bytes(&self) -> u64 {
        self.cluster
    }

    /// Follows the chain of a file of the system, for so many bytes at most; clusters are counted from 0.
    fn chain(&self, window: &Window<'_>, first: u32, bytes_max: u64) -> Checked<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut piece = (0, Vec::new()); // a part of the table, and which entry it begins with
        let mut next = first;
        let mut left = bytes_max.div_ceil(self.cluster);
        while left > 0 {
            let number = u64::from(next).wrapping_sub(2);
            require(number < self.clusters, "the chain of a system file leads out of it")?;
            match runs.last_mut() {
                Some(last) if last.end == number => last.end += 1,
                _ => runs.push(number..number + 1),
            }
            require(runs.len() <= RUNS_MAX, "a system file is too fragmented")?;
            left -= 1;
            next = self.entry(window, next, &mut piece)?;
            if next == u32::MAX {
                return Ok(runs);
            }
        }
        // The rest of a chain that is longer than needed does not matter.
        Ok(runs)
    }

    /// An entry of the table.
    fn entry(&self, window: &Window<'_>, number: u32, piece: &mut (u64, Vec<u8>)) -> Checked<u32> {
        const ENTRIES: u64 = 1024;
        let number = u64::from(number);
        let loaded = piece.1.len() as u64 / 4;
        if number < piece.0 || number - piece.0 >= loaded {
            let count = ENTRIES.min(self.clusters + 2 - number); // the number is one of a cluster
            *piece = (number, window.read(self.table_offset + number * 4, count * 4)?);
        }
        let offset = usize::try_from((number - piece.0) * 4).unwrap_or(usize::MAX);
        Ok(parse::<U32>(&piece.1, offset)?.get())
    }

    /// Reads a part of a file; at most [`READ_BYTES_MAX`].
    fn read_runs(&self, window: &Window<'_>, runs: &[Range<u64>], offset: u64, length: u64) -> Checked<Vec<u8>> {
        let mut bytes = Vec::new();
        let (mut start, mut left) = (offset, length.min(READ_BYTES_MAX));
        for run in runs {
            let run_bytes = (run.end - run.start) * self.cluster; // inside the volume
            if start >= run_bytes {
                start -= run_bytes;
                continue;
            }
            let part = left.min(run_bytes - start);
            bytes.extend(window.read(self.heap_offset + run.start * self.cluster + start, part)?);
            left -= part;
            start = 0;
            if left == 0 {
                return Ok(bytes);
            }
        }
        reason("a system file is shorter than it says")
    }

    /// Finds the entries of the bitmap and of the up-case table in the root directory.
    fn system_entries(&self, window: &Window<'_>, root: &[Range<u64>]) -> Checked<(RawEntry, RawEntry)> {
        let total = root.iter().map(|run| run.end - run.start).sum::<u64>() * self.cluster; // bounded by `chain`
        let (mut bitmap, mut upcase) = (None, None);
        let mut offset = 0;
        'directory: while offset < total {
            let length = READ_BYTES_MAX.min(total - offset);
            let piece = self.read_runs(window, root, offset, length)?;
            for bytes in piece.chunks_exact(size_of::<RawEntry>()) {
                let entry: RawEntry = parse(bytes, 0)?;
                let slot = match entry.kind {
                    ENTRY_END => break 'directory,
                    ENTRY_BITMAP => &mut bitmap,
                    ENTRY_UPCASE => &mut upcase,
                    _ => continue,
                };
                require(slot.is_none() && entry.flags == 0, "its root directory names a system file twice")?;
                *slot = Some(entry);
            }
            offset += length;
        }
        match (bitmap, upcase) {
            (Some(bitmap), Some(upcase)) => Ok((bitmap, upcase)),
            _ => reason("its root directory does not name a bitmap and an up-case table"),
        }
    }

    /// Checks the sum of the up-case table; gives its clusters.
    fn check_upcase(&self, window: &Window<'_>, entry: &RawEntry) -> Checked<Vec<Range<u64>>> {
        let length = entry.length.get();
        require((1..=UPCASE_BYTES_MAX).contains(&length), "the length of its up-case table is not one")?;
        let runs = self.chain(window, entry.first_cluster.get(), length)?;
        let bytes = self.read_runs(window, &runs, 0, length)?;
        let sum = bytes.iter().fold(0_u32, |sum, byte| sum.rotate_right(1).wrapping_add(u32::from(*byte)));
        require(sums::same(entry.checksum.get(), sum), "the checksum of its up-case table is wrong")?;
        Ok(runs)
    }

    /// Gives every free range to the sink, and checks that nothing known is among them.
    pub(super) fn walk(&self, window: &Window<'_>, sink: &mut FreeSink<'_>, tick: &Tick<'_>) -> Checked<()> {
        let bytes = self.clusters.div_ceil(8);
        let mut offset = 0;
        while offset < bytes && !sink.is_stopped() {
            let length = (bytes - offset).min(READ_BYTES_MAX);
            let part = self.read_runs(window, &self.bitmap, offset, length)?;
            let first = offset * 8;
            clear_runs(&part, (self.clusters - first).min(length * 8), &mut |run| {
                let run = first + run.start..first + run.end;
                let next = self.taken.partition_point(|range| range.end <= run.start);
                if self.taken.get(next).is_some_and(|range| range.start < run.end) {
                    return reason(format!("a system file is marked as free near cluster {}", run.start + 2));
                }
                let place = |cluster: u64| self.heap_offset + cluster * self.cluster; // inside, as `numbers` saw
                sink.add(place(run.start)..place(run.end))
            })?;
            offset += length;
            tick(self.heap_offset + (offset * 8).min(self.clusters) * self.cluster)?;
        }
        Ok(())
    }
}

/// Checks the sum over the boot region (3.4): fields that change while the volume is in use do not count.
fn boot_sum(window: &Window<'_>, sector: u64) -> Checked<()> {
    let region = window.read(0, (SUMMED_SECTORS + 1) * sector)?;
    let summed = usize::try_from(SUMMED_SECTORS * sector).unwrap_or_default();
    let (covered, sums) = region.split_at_checked(summed).unwrap_or_default();
    let changing = [offset_of!(RawBoot, flags), offset_of!(RawBoot, flags) + 1, offset_of!(RawBoot, percent_in_use)];
    let sum = covered.iter().enumerate().fold(0_u32, |sum, (offset, byte)| {
        if changing.contains(&offset) { sum } else { sum.rotate_right(1).wrapping_add(u32::from(*byte)) }
    });
    let all = sums
        .chunks_exact(4)
        .all(|stored| matches!(parse::<U32>(stored, 0), Ok(stored) if sums::same(stored.get(), sum)));
    require(all && !sums.is_empty(), "the checksum of its boot region is wrong")
}
