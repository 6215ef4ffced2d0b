//! Free space of NTFS: the clear bits of `$Bitmap`.
//!
//! NTFS has no checksums and counts no free clusters, so trust comes from elsewhere: the volume is marked clean, `$LogFile`
//! has nothing to replay, Windows does not sleep on it, the first records of the master file table equal their mirror, and
//! every cluster that any record of the master file table names is marked used. Shadow copies keep what they need in clusters that look free, so that
//! a volume with a catalogue of them is left alone.

mod files;
mod raw;
mod record;
mod state;

use std::ops::Range;

use self::raw::RawBoot;
use self::record::{Record, Stored, kind};
use super::window::{Checked, FreeSink, READ_BYTES_MAX, Tick, Window, clear_runs, reason, require};

/// Records of system files.
mod file {
    pub(super) const TABLE: u64 = 0;
    pub(super) const LOG: u64 = 2;
    pub(super) const VOLUME: u64 = 3;
    pub(super) const ROOT: u64 = 5;
    pub(super) const BITMAP: u64 = 6;
    pub(super) const BAD_CLUSTERS: u64 = 8;
    /// The last with a number of its own.
    pub(super) const LAST: u64 = 11;
}

/// Records that have a copy in `$MFTMirr`.
const MIRRORED: u64 = 4;
/// Clusters are at most 2 MiB.
const CLUSTER_BYTES_MAX: u64 = 2 << 20;
/// Most clusters that Windows makes; the format itself has room for more.
const CLUSTERS_MAX: u64 = u32::MAX as u64;
/// Bytes of `$Boot`, whose clusters are always in use.
const BOOT_BYTES: u64 = 8192;

/// A volume that is in order.
#[derive(Clone, Debug)]
pub(super) struct Ntfs {
    sector: u64,
    sectors: u64,
    cluster: u64,
    clusters: u64,
    /// Where the copy of the boot sector ends, and with it the volume.
    end: u64,
    /// Bytes of a record of the master file table.
    record_bytes: u64,
    table: Vec<(Option<u64>, u64)>,
    /// Bytes of the master file table that were ever written: whole records.
    table_bytes: u64,
    bitmap: Bitmap,
    /// Clusters that must not be free, in order, joined.
    taken: Vec<Range<u64>>,
}

/// Where `$Bitmap` is.
#[derive(Clone, Debug)]
enum Bitmap {
    Here(Vec<u8>),
    Stored(Stored),
}

impl Ntfs {
    /// Reads the boot sector and the system files.
    pub(super) fn open(window: &Window<'_>) -> Checked<Self> {
        let raw: RawBoot = window.read_struct(0)?;
        let mut this = Self::numbers(&raw)?;
        require(this.end <= window.length(), "it is larger than what it lies in")?;
        this.find_copy(window, &raw)?;
        let first = window.read(this.place(raw.table_cluster.get())?, this.record_bytes)?;
        let record = Record::new(first)?;
        let Some(data) = record.find(kind::DATA, "")? else { return reason("its file table has no data") };
        let stored = data.stored(this.clusters)?;
        require(stored.plain && stored.from_start, "its file table is not stored plainly")?;
        let starts_there = stored.runs.first().is_some_and(|run| run.0 == Some(raw.table_cluster.get()));
        require(starts_there, "its file table is not where the boot sector says")?;
        let records = stored.data_bytes.min(stored.initialized_bytes) / this.record_bytes;
        this.table_bytes = records * this.record_bytes;
        this.table = stored.runs;
        this.check_mirror(window, raw.mirror_cluster.get())?;
        state::check(&this, window)?;
        this.find_bitmap(window)?;
        this.find_taken(window)?;
        Ok(this)
    }

    fn numbers(raw: &RawBoot) -> Checked<Self> {
        let sector = u64::from(raw.bytes_per_sector.get());
        require(sector.is_power_of_two() && (512..=4096).contains(&sector), "its sector size is not one")?;
        let per_cluster = match raw.sectors_per_cluster {
            small @ ..=0x80 => u64::from(small),
            shift @ 0xf4.. => 1 << (256 - u32::from(shift)),
            _ => 0,
        };
        let cluster = sector * per_cluster;
        require(per_cluster.is_power_of_two() && cluster <= CLUSTER_BYTES_MAX, "its cluster size is not one")?;
        let sectors = raw.sectors.get();
        let clusters = sectors / per_cluster;
        require(clusters > 0 && clusters <= CLUSTERS_MAX && sectors < 1 << 48, "its number of sectors is not one")?;
        require(raw.of_fat.iter().take(7).all(|byte| *byte == 0), "its boot sector has fields of another file system")?;
        let record_bytes = match raw.clusters_per_record {
            shift @ 0xe1.. => 1_u64 << (256 - u32::from(shift)),
            count => u64::from(count) * cluster,
        };
        let fits = record_bytes.is_power_of_two() && (1024..=4096).contains(&record_bytes);
        require(fits, "the size of its file records is not one")?;
        let bitmap = Bitmap::Here(Vec::new());
        let end = (sectors + 1) * sector; // at most 2^48 sectors of 4096 bytes
        let table = Vec::new();
        Ok(Self {
            sector,
            sectors,
            cluster,
            clusters,
            end,
            record_bytes,
            table,
            table_bytes: 0,
            bitmap,
            taken: Vec::new(),
        })
    }

    /// Finds the copy of the boot sector. It lies behind the last sector; but volumes that ntfsresize made end with a whole
    /// cluster, and have it in the last sector of the size that was asked for, which is less than a cluster further on.
    fn find_copy(&mut self, window: &Window<'_>, raw: &RawBoot) -> Checked<()> {
        let first = self.sectors * self.sector; // below the end
        let places = (0..self.cluster / self.sector).map(|sector| first + sector * self.sector);
        for place in places.take_while(|place| place + self.sector <= window.length()) {
            let copy: RawBoot = window.read_struct(place)?;
            if raw.numbers() == copy.numbers() {
                self.end = place + self.sector;
                return Ok(());
            }
        }
        reason("its boot sector and the copy behind its end disagree")
    }

    /// Bytes of the volume: its sectors, and the copy of the boot sector behind them.
    pub(super) const fn bytes(&self) -> u64 {
        self.end
    }

    /// Bytes of a cluster.
    pub(super) const fn cluster_bytes(&self) -> u64 {
        self.cluster
    }

    /// Where a cluster begins.
    fn place(&self, cluster: u64) -> Checked<u64> {
        require(cluster < self.clusters, "a cluster lies outside of it")?;
        Ok(cluster * self.cluster) // below the size
    }

    /// Reads a part of what is stored in runs; at most [`READ_BYTES_MAX`]. What is not stored is zero.
    fn read_runs(
        &self,
        window: &Window<'_>,
        runs: &[(Option<u64>, u64)],
        offset: u64,
        length: u64,
    ) -> Checked<Vec<u8>> {
        require(length <= READ_BYTES_MAX, "a structure is too long")?;
        let mut bytes = Vec::new();
        let (mut start, mut left) = (offset, length);
        for (place, count) in runs {
            let run_bytes = count * self.cluster; // runs are no longer than the volume
            if start >= run_bytes {
                start -= run_bytes;
                continue;
            }
            let part = left.min(run_bytes - start);
            match place {
                Some(cluster) => bytes.extend(window.read(self.place(*cluster)? + start, part)?),
                None => bytes.resize(bytes.len() + usize::try_from(part).unwrap_or_default(), 0),
            }
            left -= part;
            start = 0;
            if left == 0 {
                return Ok(bytes);
            }
        }
        reason("a file is shorter than it says")
    }

    /// Reads a record of the file table.
    fn record(&self, window: &Window<'_>, number: u64) -> Checked<Record> {
        let offset = number.saturating_mul(self.record_bytes);
        Record::new(self.read_runs(window, &self.table, offset, self.record_bytes)?)
    }

    fn check_mirror(&self, window: &Window<'_>, mirror: u64) -> Checked<()> {
        let start = self.place(mirror)?;
        for number in 0..MIRRORED {
            let original = self.record(window, number)?;
            let copy = Record::new(window.read(start + number * self.record_bytes, self.record_bytes)?)?;
            require(original.used() == copy.used(), "the file table and its mirror disagree")?;
        }
        Ok(())
    }

    fn find_bitmap(&mut self, window: &Window<'_>) -> Checked<()> {
        let record = self.record(window, file::BITMAP)?;
        let Some(data) = record.find(kind::DATA, "")? else { return reason("its bitmap is missing") };
        let needed = self.clusters.div_ceil(8);
        if !data.is_elsewhere() {
            let value = data.value()?;
            require(value.len() as u64 >= needed, "its bitmap is too short")?;
            self.bitmap = Bitmap::Here(value.to_vec());
            return Ok(());
        }
        let stored = data.stored(self.clusters)?;
        require(stored.plain && stored.from_start, "its bitmap is not stored plainly")?;
        require(stored.runs.iter().all(|run| run.0.is_some()), "its bitmap is not stored plainly")?;
        let long = stored.data_bytes >= needed && stored.initialized_bytes >= needed;
        let clusters = stored.runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.1));
        require(long && clusters.saturating_mul(self.cluster) >= needed, "its bitmap is too short")?;
        self.bitmap = Bitmap::Stored(stored);
        Ok(())
    }

    /// Collects the clusters of all system files.
    fn find_taken(&mut self, window: &Window<'_>) -> Checked<()> {
        let mut taken = Vec::new();
        taken.push(0..BOOT_BYTES.div_ceil(self.cluster).min(self.clusters));
        for number in file::TABLE..=file::LAST {
            let record = self.record(window, number)?;
            for attribute in record.attributes()? {
                // Those of $BadClus are no places where anything is stored.
                if !attribute.is_elsewhere() || number == file::BAD_CLUSTERS {
                    continue;
                }
                let runs = attribute.stored(self.clusters)?.runs;
                taken.extend(runs.into_iter().filter_map(|(place, count)| place.map(|place| place..place + count)));
            }
        }
        taken.sort_unstable_by_key(|range| range.start);
        for range in taken {
            match self.taken.last_mut() {
                // $Boot itself is among the files.
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => self.taken.push(range),
            }
        }
        Ok(())
    }

    /// Checks that the bitmap knows of every file.
    pub(super) fn check_files(&self, window: &Window<'_>, tick: &Tick<'_>) -> Checked<()> {
        files::check(self, window, tick)
    }

    /// Gives every free range to the sink, and checks that nothing known is among them.
    pub(super) fn walk(&self, window: &Window<'_>, sink: &mut FreeSink<'_>, tick: &Tick<'_>) -> Checked<()> {
        let bytes = self.clusters.div_ceil(8);
        let mut offset = 0;
        while offset < bytes && !sink.is_stopped() {
            let length = (bytes - offset).min(READ_BYTES_MAX);
            let part = match &self.bitmap {
                Bitmap::Here(value) => value.clone(),
                Bitmap::Stored(stored) => self.read_runs(window, &stored.runs, offset, length)?,
            };
            let first = offset * 8;
            clear_runs(&part, (self.clusters - first).min(length * 8), &mut |run| {
                let run = first + run.start..first + run.end;
                let next = self.taken.partition_point(|range| range.end <= run.start);
                if self.taken.get(next).is_some_and(|range| range.start < run.end) {
                    return reason(format!("a system file is marked as free near cluster {}", run.start));
                }
                sink.add(run.start * self.cluster..run.end * self.cluster) // below the size
            })?;
            offset += length;
            tick((offset * 8).min(self.clusters) * self.cluster)?;
        }
        Ok(())
    }
}
