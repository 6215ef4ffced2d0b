//! Free space of FAT12, FAT16 and FAT32: the entries of the file allocation table that are zero.
//!
//! ```text
//! | boot sector, reserved | table | copy of the table | root directory (FAT12, FAT16) | clusters 2, 3, ...
//! ```
//!
//! Source: Microsoft FAT specification (2005). The count of free clusters in the FSInfo sector is a hint, and not read.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::VolumeKind;
use super::window::{Checked, FreeSink, Tick, Window, parse, reason, require};

/// The boot sector as far as all three have it.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBoot {
    jump: [u8; 3],
    name: [u8; 8],
    bytes_per_sector: U16,
    sectors_per_cluster: u8,
    reserved_sectors: U16,
    tables: u8,
    root_entries: U16,
    sectors_small: U16,
    media: u8,
    table_sectors_small: U16,
    of_disk: [u8; 8],
    sectors_large: U32,
}

/// What follows it on FAT12 and FAT16.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSmall {
    drive: u8,
    state: u8,
}

/// What follows it on FAT32.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLarge {
    table_sectors: U32,
    flags: U16,
    version: U16,
    root_cluster: U32,
    info_sector: U16,
    backup_sector: U16,
    reserved: [u8; 12],
    drive: u8,
    state: u8,
}

const _: () = assert!(
    size_of::<RawBoot>() == 0x24
        && offset_of!(RawBoot, tables) == 0x10
        && offset_of!(RawBoot, media) == 0x15
        && offset_of!(RawBoot, sectors_large) == 0x20
        && size_of::<RawBoot>() + offset_of!(RawSmall, state) == 0x25
        && size_of::<RawBoot>() + offset_of!(RawLarge, root_cluster) == 0x2c
        && size_of::<RawBoot>() + offset_of!(RawLarge, state) == 0x41
);

/// An entry of a directory.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    name: [u8; 11],
    attributes: u8,
    dates: [u8; 8],
    cluster_high: U16,
    time: [u8; 4],
    cluster_low: U16,
    size: U32,
}

const _: () = assert!(
    size_of::<RawEntry>() as u64 == ENTRY_BYTES
        && offset_of!(RawEntry, cluster_low) == 26
        && offset_of!(RawEntry, size) == 28
);

/// First byte of the name: no entry here, nor behind; a deleted entry.
const NAME_END: u8 = 0;
const NAME_DELETED: u8 = 0xe5;
/// What the first entry of a directory is called: the directory itself.
const NAME_ITSELF: [u8; 11] = *b".          ";
/// Attributes.
const ATTRIBUTE_LABEL: u8 = 8;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
/// Links of chains that are followed to judge a volume: that is evidence enough.
const LINKS_MAX: u64 = 1 << 17;

/// Bytes of a boot sector, whatever the sector is.
const BOOT_BYTES: usize = 512;
/// Bytes of an entry of the root directory.
const ENTRY_BYTES: u64 = 32;
/// Fewer clusters than this are FAT12.
const CLUSTERS_16: u64 = 4085;
/// Fewer than this are FAT16.
const CLUSTERS_32: u64 = 65525;
/// More clusters than FAT32 can number.
const CLUSTERS_MAX: u64 = 0x0fff_fff5;
/// Sectors that a table may have too many of: the formula of the specification gives up to eight.
const TABLE_SECTORS_TO_SPARE: u64 = 8;
/// Bytes of a table that are looked at once: a multiple of 3, 2 and 4, so that no entry is cut.
const PIECE_BYTES: u64 = 3 << 18;

/// Whether a sector begins a FAT volume: a jump, a signature, and numbers that a formatter writes.
pub(super) fn looks_like(sector: &[u8]) -> bool {
    let Ok(raw) = parse::<RawBoot>(sector, 0) else { return false };
    let sector_bytes = raw.bytes_per_sector.get();
    sector.get(BOOT_BYTES - 2..BOOT_BYTES) == Some(&[0x55, 0xaa])
        && matches!(raw.jump, [0xeb, _, 0x90] | [0xe9, _, _])
        && sector_bytes.is_power_of_two()
        && (512..=4096).contains(&sector_bytes)
        && raw.sectors_per_cluster.is_power_of_two()
        && raw.reserved_sectors.get() > 0
        && matches!(raw.tables, 1..=4)
        && matches!(raw.media, 0xf0 | 0xf8..)
}

/// The kind that a volume seems to be, in order or not.
pub(super) fn kind_of(window: &Window<'_>) -> Checked<VolumeKind> {
    let sector = window.read(0, BOOT_BYTES as u64)?;
    Fat::numbers(&parse(&sector, 0)?, &parse(&sector, size_of::<RawBoot>())?).map(|fat| fat.kind())
}

/// The width of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Twelve,
    Sixteen,
    ThirtyTwo,
}

/// A volume whose boot sector is in order.
#[derive(Clone, Debug)]
pub(super) struct Fat {
    width: Width,
    bytes: u64,
    cluster: u64,
    clusters: u64,
    table_offset: u64,
    /// Bytes of the table that hold entries.
    table_bytes: u64,
    /// How far behind the table its copy lies.
    copy_distance: Option<u64>,
    data_offset: u64,
    /// Bytes of the root directory of FAT12 and FAT16, which ends where the clusters begin.
    root_bytes: u64,
    media: u8,
}

impl Fat {
    /// Reads the boot sector and the first entries.
    pub(super) fn open(window: &Window<'_>) -> Checked<Self> {
        let sector = window.read(0, BOOT_BYTES as u64)?;
        let raw: RawBoot = parse(&sector, 0)?;
        let small: RawSmall = parse(&sector, size_of::<RawBoot>())?;
        let large: RawLarge = parse(&sector, size_of::<RawBoot>())?;
        let this = Self::numbers(&raw, &large)?;
        require(this.bytes <= window.length(), "it is larger than what it lies in")?;
        let state = if this.width == Width::ThirtyTwo { large.state } else { small.state };
        require(state & 1 == 0, "its boot sector says that it is dirty: it needs a check")?;
        require(state & 2 == 0, "its boot sector says that its medium has failed")?;
        if this.width == Width::ThirtyTwo {
            require(large.version.get() == 0, "its version is not understood")?;
            require(large.flags.get() & 0x80 == 0, "its tables do not mirror each other")?;
            let root = u64::from(large.root_cluster.get());
            require(root >= 2 && root - 2 < this.clusters, "its root directory lies outside of it")?;
            this.check_copy(window, &sector, large.backup_sector.get(), u64::from(raw.bytes_per_sector.get()))?;
            let entry = window.read(this.table_offset + root * 4, 4)?;
            require(entry.iter().any(|byte| *byte != 0), "its root directory is marked as free")?;
        }
        this.first_entries(window)?;
        if this.width != Width::ThirtyTwo {
            this.check_root(window)?;
        }
        Ok(this)
    }

    fn numbers(raw: &RawBoot, large: &RawLarge) -> Checked<Self> {
        let sector = u64::from(raw.bytes_per_sector.get());
        let per_cluster = u64::from(raw.sectors_per_cluster);
        let tables = u64::from(raw.tables);
        require(matches!(tables, 1 | 2), "its number of tables is not 1 or 2")?;
        let has_large = raw.table_sectors_small.get() == 0;
        let table_sectors =
            if has_large { u64::from(large.table_sectors.get()) } else { u64::from(raw.table_sectors_small.get()) };
        let sectors = match raw.sectors_small.get() {
            0 => u64::from(raw.sectors_large.get()),
            small => u64::from(small),
        };
        let root_bytes = u64::from(raw.root_entries.get()) * ENTRY_BYTES;
        require(root_bytes.is_multiple_of(sector), "its root directory does not end with a sector")?;
        let root_sectors = root_bytes / sector;
        let reserved = u64::from(raw.reserved_sectors.get());
        // All of these have 32 bits at most.
        let data = reserved + tables * table_sectors + root_sectors;
        require(table_sectors > 0 && data < sectors, "its numbers leave no room for clusters")?;
        let clusters = (sectors - data) / per_cluster;
        let width = match clusters {
            ..CLUSTERS_16 => Width::Twelve,
            CLUSTERS_16..CLUSTERS_32 => Width::Sixteen,
            CLUSTERS_32..CLUSTERS_MAX => Width::ThirtyTwo,
            _ => return reason("it has more clusters than there can be"),
        };
        require(clusters > 0, "its numbers leave no room for clusters")?;
        let agrees = has_large == (width == Width::ThirtyTwo) && (raw.root_entries.get() == 0) == has_large;
        require(agrees, "its number of clusters and its layout belong to different kinds of FAT")?;
        let table_bytes = table_sectors * sector;
        let entries = clusters + 2;
        let needed = match width {
            Width::Twelve => (entries * 3).div_ceil(2),
            Width::Sixteen => entries * 2,
            Width::ThirtyTwo => entries * 4,
        };
        require(needed <= table_bytes, "its table is too short for its clusters")?;
        // Formatters round up, but not by much: a table for many more clusters speaks against the size of a cluster.
        let rounding = needed / 4 + per_cluster.max(TABLE_SECTORS_TO_SPARE) * sector;
        require(table_bytes <= needed + rounding, "its table is too long for its clusters")?;
        Ok(Self {
            width,
            bytes: sectors * sector,
            cluster: per_cluster * sector,
            clusters,
            table_offset: reserved * sector,
            table_bytes: needed,
            copy_distance: (tables == 2).then_some(table_bytes),
            data_offset: data * sector,
            root_bytes: root_sectors * sector,
            media: raw.media,
        })
    }

    /// The kind by the number of clusters.
    pub(super) const fn kind(&self) -> VolumeKind {
        match self.width {
            Width::Twelve => VolumeKind::Fat12,
            Width::Sixteen => VolumeKind::Fat16,
            Width::ThirtyTwo => VolumeKind::Fat32,
        }
    }

    /// Bytes of the volume.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a cluster.
    pub(super) const fn cluster_bytes(&self) -> u64 {
        self.cluster
    }

    /// The copy of the boot sector of FAT32 has the same numbers.
    fn check_copy(&self, window: &Window<'_>, sector: &[u8], copy: u16, sector_bytes: u64) -> Checked<()> {
        const NUMBERS: [std::ops::Range<usize>; 2] = [
            offset_of!(RawBoot, bytes_per_sector)..offset_of!(RawBoot, of_disk),
            offset_of!(RawBoot, sectors_large)..size_of::<RawBoot>() + offset_of!(RawLarge, info_sector),
        ];
        let place = u64::from(copy) * sector_bytes;
        if copy == 0 || copy == u16::MAX {
            return Ok(()); // there is none
        }
        require(place < self.table_offset, "the copy of its boot sector lies outside of the reserved sectors")?;
        let other = window.read(place, BOOT_BYTES as u64)?;
        let same = NUMBERS.into_iter().all(|range| sector.get(range.clone()) == other.get(range));
        require(same, "its boot sector and the copy disagree")
    }

    /// Nothing protects the numbers of FAT12 and FAT16; so what the root directory names has to be where they lead: each
    /// directory names itself, and each file has as many clusters as it needs.
    fn check_root(&self, window: &Window<'_>) -> Checked<()> {
        let mut entries = Vec::new();
        let table = window.read(self.table_offset, self.table_bytes)?; // at most 128 KiB
        self.entries(&table, &mut |entry| {
            entries.push(entry);
            Ok(())
        })?;
        let mut links = 0;
        let mut offset = self.data_offset - self.root_bytes;
        while offset < self.data_offset {
            let piece = window.read(offset, PIECE_BYTES.min(self.data_offset - offset))?;
            for bytes in piece.chunks_exact(size_of::<RawEntry>()) {
                let entry: RawEntry = parse(bytes, 0)?;
                let [first, ..] = entry.name;
                if first == NAME_END || links >= LINKS_MAX {
                    return Ok(());
                }
                if first != NAME_DELETED && entry.attributes & ATTRIBUTE_LABEL == 0 {
                    self.check_named(window, &entry, &entries, &mut links)?;
                }
            }
            offset += PIECE_BYTES;
        }
        Ok(())
    }

    /// Checks a file or directory of the root.
    fn check_named(&self, window: &Window<'_>, entry: &RawEntry, table: &[u32], links: &mut u64) -> Checked<()> {
        let cluster = entry.cluster_low.get();
        let place = u64::from(cluster).checked_sub(2).filter(|index| *index < self.clusters);
        if entry.attributes & ATTRIBUTE_DIRECTORY != 0 {
            let Some(index) = place else { return reason("a directory lies outside of it") };
            let own: RawEntry = window.read_struct(self.data_offset + index * self.cluster)?;
            let itself = own.name == NAME_ITSELF && own.cluster_low == entry.cluster_low;
            return require(itself, "a directory is not where its numbers lead");
        }
        let needed = u64::from(entry.size.get()).div_ceil(self.cluster);
        let mut count = 0;
        let mut next = u32::from(cluster);
        while next >= 2 && u64::from(next) - 2 < self.clusters && count <= needed && *links < LINKS_MAX {
            count += 1;
            *links += 1;
            next = usize::try_from(next).ok().and_then(|next| table.get(next)).copied().unwrap_or_default();
        }
        require(count == needed || *links >= LINKS_MAX, "a file has not as many clusters as it needs")
    }

    /// The first two entries stand for the medium and for the state of the volume.
    fn first_entries(&self, window: &Window<'_>) -> Checked<()> {
        let bytes = window.read(self.table_offset, 8)?;
        let first: U32 = parse(&bytes, 0)?;
        let second: U32 = parse(&bytes, 4)?;
        let (medium, state, clean, sound) = match self.width {
            Width::Twelve => (first.get() & 0xfff, 0, 0, 0),
            Width::Sixteen => (first.get() & 0xffff, first.get() >> 16, 0x8000, 0x4000),
            Width::ThirtyTwo => (first.get() & 0x0fff_ffff, second.get(), 0x0800_0000, 0x0400_0000),
        };
        let marker = match self.width {
            Width::Twelve => 0xf00,
            Width::Sixteen => 0xff00,
            Width::ThirtyTwo => 0x0fff_ff00,
        };
        require(medium == marker | u32::from(self.media), "its table does not begin as it should")?;
        require(state & clean == clean, "its table says that it is dirty: it needs a check")?;
        require(state & sound == sound, "its table says that its medium has failed")
    }

    /// Gives every free range to the sink; both tables have to be equal, and every entry one that there can be.
    pub(super) fn walk(&self, window: &Window<'_>, sink: &mut FreeSink<'_>, tick: &Tick<'_>) -> Checked<()> {
        let mut offset = 0;
        let mut number = 0; // of the next entry
        while offset < self.table_bytes && !sink.is_stopped() {
            let length = PIECE_BYTES.min(self.table_bytes - offset);
            let piece = window.read(self.table_offset + offset, length)?;
            if let Some(distance) = self.copy_distance {
                let copy = window.read(self.table_offset + distance + offset, length)?;
                require(piece == copy, "its two tables differ")?;
            }
            let mut free = 0..0; // clusters in a row, by number
            let mut take = |entry: u32| {
                let this = number;
                number += 1;
                if this < 2 || this - 2 >= self.clusters {
                    return Ok(());
                }
                if entry != 0 {
                    return self.check_entry(this, entry);
                }
                if free.end == this {
                    free.end += 1;
                    return Ok(());
                }
                let run = std::mem::replace(&mut free, this..this + 1);
                self.give(run, sink)
            };
            self.entries(&piece, &mut take)?;
            self.give(free, sink)?;
            offset += length;
            tick(self.data_offset + number.saturating_sub(2).min(self.clusters) * self.cluster)?;
        }
        Ok(())
    }

    /// Takes a piece of the table apart.
    fn entries(&self, piece: &[u8], take: &mut dyn FnMut(u32) -> Checked<()>) -> Checked<()> {
        match self.width {
            Width::Twelve => {
                for three in piece.chunks(3) {
                    if let [a, b, rest @ ..] = three {
                        take(u32::from(u16::from_le_bytes([*a, b & 0xf])))?;
                        if let [c] = rest {
                            take(u32::from(b >> 4) | u32::from(*c) << 4)?;
                        }
                    }
                }
            }
            Width::Sixteen => {
                for two in piece.chunks_exact(2) {
                    take(u32::from(parse::<U16>(two, 0)?.get()))?;
                }
            }
            Width::ThirtyTwo => {
                for four in piece.chunks_exact(4) {
                    take(parse::<U32>(four, 0)?.get() & 0x0fff_ffff)?;
                }
            }
        }
        Ok(())
    }

    /// A used entry names another cluster, the end of a chain, or a bad cluster.
    fn check_entry(&self, number: u64, entry: u32) -> Checked<()> {
        let special = match self.width {
            Width::Twelve => 0xff0,
            Width::Sixteen => 0xfff0,
            Width::ThirtyTwo => 0x0fff_fff0,
        };
        if entry >= special || (entry >= 2 && u64::from(entry) - 2 < self.clusters) {
            return Ok(());
        }
        reason(format!("entry {number} of its table leads out of it"))
    }

    fn give(&self, clusters: std::ops::Range<u64>, sink: &mut FreeSink<'_>) -> Checked<()> {
        let place = |number: u64| self.data_offset + number.saturating_sub(2) * self.cluster; // inside, as `numbers` saw
        if clusters.is_empty() { Ok(()) } else { sink.add(place(clusters.start)..place(clusters.end)) }
    }
}
