//! GUID partition tables: reading both copies, and putting the backup where a disk of another size ends.
//!
//! ```text
//! | protective MBR | primary header | entries | ... partitions ... | entries | backup header |
//! ```
//!
//! Source: UEFI specification 2.10, chapter 5.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::sums::{self, crc32, crc32_append};
use super::table::{Partition, PartitionInfo, PartitionType};
use super::window::{Checked, READ_BYTES_MAX, Window, parse, reason, require};
use crate::format::guid::Guid;
use crate::text::escape_utf16;

/// What a header begins with.
pub(super) const SIGNATURE: [u8; 8] = *b"EFI PART";
/// The only revision there is.
const REVISION: u32 = 0x1_0000;
/// Most entries; everybody makes 128.
const ENTRIES_MAX: u32 = 1024;

/// A header of a table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    signature: [u8; 8],
    revision: U32,
    header_bytes: U32,
    checksum: U32,
    reserved: U32,
    my_sector: U64,
    other_sector: U64,
    first_usable: U64,
    last_usable: U64,
    disk: Guid,
    entries_sector: U64,
    entries: U32,
    entry_bytes: U32,
    entries_checksum: U32,
}

/// A partition.
#[derive(Clone, Copy, Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    kind: Guid,
    identity: Guid,
    first: U64,
    last: U64,
    attributes: U64,
    name: [U16; 36],
}

const _: () = assert!(
    size_of::<RawHeader>() == 92
        && offset_of!(RawHeader, checksum) == 16
        && offset_of!(RawHeader, disk) == 56
        && offset_of!(RawHeader, entries_checksum) == 88
        && size_of::<RawEntry>() == 128
        && offset_of!(RawEntry, name) == 56
);

/// A header that is in order, with its entries.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    /// The sector of the header, whole.
    sector: Vec<u8>,
    raw: RawHeader,
    entries: Vec<u8>,
    sector_bytes: u64,
}

impl Copy {
    /// Reads the copy whose header lies in a sector.
    pub(super) fn read(window: &Window<'_>, at: u64, sector_bytes: u64) -> Checked<Self> {
        let Some(place) = at.checked_mul(sector_bytes) else { return reason("it lies past the end of the disk") };
        let sector = window.read(place, sector_bytes)?;
        let raw: RawHeader = parse(&sector, 0)?;
        require(raw.signature == SIGNATURE, "it has no signature")?;
        let length = usize::try_from(raw.header_bytes.get()).unwrap_or(usize::MAX);
        let fits = (size_of::<RawHeader>()..=sector.len()).contains(&length);
        require(fits && raw.revision.get() == REVISION, "its revision or length is not one")?;
        require(sums::same(raw.checksum.get(), header_sum(&sector, length)), "its checksum is wrong")?;
        require(raw.my_sector.get() == at, "it belongs elsewhere")?;
        let (count, bytes) = (raw.entries.get(), raw.entry_bytes.get());
        let total = u64::from(count) * u64::from(bytes);
        let fits = count > 0
            && count <= ENTRIES_MAX
            && bytes.is_power_of_two()
            && u64::from(bytes) >= size_of::<RawEntry>() as u64
            && total <= READ_BYTES_MAX;
        require(fits, "the number or length of its entries is not one")?;
        let entries_place = raw.entries_sector.get().saturating_mul(sector_bytes);
        let entries = window.read(entries_place, total)?;
        require(sums::same(raw.entries_checksum.get(), crc32(&entries)), "the checksum of its entries is wrong")?;
        let usable =
            raw.first_usable.get() <= raw.last_usable.get().saturating_add(1) && raw.last_usable.get() < 1 << 54;
        require(usable, "its usable sectors are not ones")?;
        Ok(Self { sector, raw, entries, sector_bytes })
    }

    /// Whether two copies say the same.
    pub(super) fn agrees_with(&self, other: &Self) -> bool {
        let (one, two) = (&self.raw, &other.raw);
        self.entries == other.entries
            && one.disk == two.disk
            && one.first_usable == two.first_usable
            && one.last_usable == two.last_usable
            && one.entry_bytes == two.entry_bytes
    }

    /// The sector that the other copy's header should lie in.
    pub(super) const fn other_sector(&self) -> u64 {
        self.raw.other_sector.get()
    }

    /// Sectors of the entries.
    fn entry_sectors(&self) -> u64 {
        (self.entries.len() as u64).div_ceil(self.sector_bytes)
    }

    /// Bytes of a copy: its entries and its header.
    pub(super) fn bytes(&self) -> u64 {
        (self.entry_sectors() + 1) * self.sector_bytes
    }

    /// Where partitions may begin, in bytes.
    pub(super) fn usable_from(&self) -> u64 {
        self.raw.first_usable.get().saturating_mul(self.sector_bytes)
    }

    /// The partitions, each inside the usable sectors. Whether they overlap is for others to say.
    pub(super) fn partitions(&self) -> Checked<Vec<Partition>> {
        let size = usize::try_from(self.raw.entry_bytes.get()).unwrap_or(usize::MAX);
        let mut all = Vec::new();
        for (number, bytes) in (1..).zip(self.entries.chunks_exact(size)) {
            let raw: RawEntry = parse(bytes, 0)?;
            if raw.kind.is_nil() {
                continue;
            }
            let (first, last) = (raw.first.get(), raw.last.get());
            if first < self.raw.first_usable.get() || last < first || last > self.raw.last_usable.get() {
                return reason(format!("partition {number} lies outside of the usable sectors"));
            }
            let units = raw.name.map(U16::get);
            let name = units.split(|unit| *unit == 0).next().unwrap_or_default();
            all.push(Partition {
                range: first * self.sector_bytes..(last + 1) * self.sector_bytes, // below 2^54 sectors
                info: PartitionInfo {
                    number,
                    kind: PartitionType::Gpt { kind: raw.kind, identity: raw.identity },
                    name: escape_utf16(name),
                },
            });
        }
        Ok(all)
    }

    /// The last sector that a partition uses, or the one before the first usable one.
    fn last_used(&self) -> Checked<u64> {
        let ends = self.partitions()?.into_iter().map(|partition| partition.range.end / self.sector_bytes - 1);
        Ok(ends.max().unwrap_or_else(|| self.raw.first_usable.get().saturating_sub(1)))
    }

    /// The writes that make this primary copy and its backup those of a disk of so many sectors.
    pub(super) fn moved(&self, sectors: u64) -> Checked<Vec<(u64, Vec<u8>)>> {
        let (size, entry_sectors) = (self.sector_bytes, self.entry_sectors());
        let used = self.last_used()?;
        let Some(last_usable) = sectors.checked_sub(entry_sectors + 2).filter(|last| *last >= used) else {
            let needed = (used + 1 + entry_sectors + 1).saturating_mul(size);
            return reason(format!("the partitions and the backup table need a disk of at least {needed} bytes"));
        };
        let first_usable = self.raw.first_usable.get();
        require(last_usable >= first_usable, "the disk would have no room for partitions")?;
        let last_sector = sectors - 1; // more than the entries, as was just seen
        let backup_entries = last_usable + 1;
        let mut primary = self.raw;
        primary.other_sector = last_sector.into();
        primary.last_usable = last_usable.into();
        let mut backup = primary;
        backup.my_sector = last_sector.into();
        backup.other_sector = self.raw.my_sector;
        backup.entries_sector = backup_entries.into();
        let mut entries = self.entries.clone();
        entries.resize(usize::try_from(entry_sectors * size).unwrap_or(entries.len()), 0);
        // The backup first: whatever is cut off then, one copy is in order.
        Ok(vec![
            (backup_entries * size, entries),
            (last_sector * size, self.encoded(&backup)),
            (self.raw.my_sector.get() * size, self.encoded(&primary)),
        ])
    }

    /// The sector of a header, with its checksum.
    fn encoded(&self, raw: &RawHeader) -> Vec<u8> {
        let length = usize::try_from(raw.header_bytes.get()).unwrap_or(usize::MAX);
        let mut sector = self.sector.clone();
        let mut raw = *raw;
        put(&mut sector, &raw);
        raw.checksum = header_sum(&sector, length).into();
        put(&mut sector, &raw);
        sector
    }
}

fn put(sector: &mut [u8], raw: &RawHeader) {
    sector.iter_mut().zip(raw.as_bytes()).for_each(|(to, from)| *to = *from);
}

/// The checksum of a header of so many bytes, its field counted as zero.
fn header_sum(sector: &[u8], length: usize) -> u32 {
    let header = sector.get(..length).unwrap_or_default();
    let (before, rest) = header.split_at_checked(offset_of!(RawHeader, checksum)).unwrap_or_default();
    let (_, after) = rest.split_at_checked(size_of::<u32>()).unwrap_or_default();
    crc32_append(crc32_append(crc32(before), &[0; 4]), after)
}
