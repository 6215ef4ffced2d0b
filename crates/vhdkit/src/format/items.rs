//! Changing the items of a metadata region ([MS-VHDX] 2.6): pure, bytes in and bytes out.
//!
//! A short item that keeps its length is changed where it stands. Any other is written to a place of the region that nobody
//! uses, and the table, which changes at one instant, names the new place. What nobody names any more is left as it is.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::guid::Guid;
use super::metadata::{
    ENTRIES_MAX, FLAG_USER, ITEM_BYTES_MAX, RawEntry, RawTableHeader, SIGNATURE, TABLE_BYTES, USER_ENTRIES_MAX,
};
use crate::error::{Error, ErrorKind, Result};
use crate::units::round_up;

/// Bytes of a page, which changes as a whole.
const PAGE: u64 = 4096;
/// Longest item that is changed in place: it touches two pages at most.
const IN_PLACE_MAX: u64 = 4096;
/// Pages of items that are changed in place: with the table and both region tables they fit into one entry of the shortest
/// log, which holds 126.
const IN_PLACE_PAGES_MAX: usize = 64;

/// What becomes of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemChange {
    /// Which item.
    pub id: Guid,
    /// Whether it belongs to a user of the disk; the same GUID may stand for an item of each kind.
    pub is_user: bool,
    /// Its new flags and bytes; `None` takes it out.
    pub value: Option<(u32, Vec<u8>)>,
}

/// How a metadata region changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Bytes that go where nothing is, by offset in the region: they are durable before the pages change.
    pub fresh: Vec<(u64, Vec<u8>)>,
    /// Pages of 4 KiB that change at one instant, by offset in the region.
    pub pages: BTreeMap<u64, Vec<u8>>,
}

/// Gives bytes of the region, by offset from its start.
pub type ReadRegion<'a> = dyn FnMut(Range<u64>) -> Result<Vec<u8>> + 'a;

/// The entries of a table, as they stand there.
fn entries(table: &[u8]) -> Result<Vec<RawEntry>> {
    let broken = || Error::new(ErrorKind::Corrupt, "the metadata table cannot be read again");
    let (header, mut rest) = RawTableHeader::ref_from_prefix(table).map_err(|_| broken())?;
    if header.signature != SIGNATURE || header.entry_count.get() > ENTRIES_MAX {
        return Err(broken());
    }
    let mut entries = Vec::new();
    for _ in 0..header.entry_count.get() {
        let (entry, tail) = RawEntry::ref_from_prefix(rest).map_err(|_| broken())?;
        entries.push(*entry);
        rest = tail;
    }
    Ok(entries)
}

fn is_of(entry: &RawEntry, change: &ItemChange) -> bool {
    entry.item_id == change.id && (entry.flags.get() & FLAG_USER != 0) == change.is_user
}

/// Plans changes of a region of `length` bytes. `None` when its items need more room than it has.
///
/// # Errors
/// [`ErrorKind::Limit`] for an item that is too long or one too many, [`ErrorKind::InvalidArgument`] for taking out what is
/// not there; and what stands in the way of reading.
pub fn rewrite(length: u64, changes: &[ItemChange], read: &mut ReadRegion<'_>) -> Result<Option<Rewrite>> {
    let table = read(0..TABLE_BYTES as u64)?;
    let mut list = entries(&table)?;
    // Until the table changes, these items count: nothing is written over them before.
    let old = list.clone();
    let mut rewrite = Rewrite::default();
    for change in changes {
        let found = list.iter().position(|entry| is_of(entry, change));
        let Some((flags, bytes)) = &change.value else {
            let index = found.ok_or_else(|| missing(change))?;
            list.remove(index);
            continue;
        };
        check_length(bytes)?;
        if let Some(entry) = found.and_then(|index| list.get_mut(index)) {
            let fits = entry.length.get() as usize == bytes.len() && bytes.len() as u64 <= IN_PLACE_MAX;
            if fits && rewrite.pages.len() + 2 <= IN_PLACE_PAGES_MAX {
                let offset = u64::from(entry.offset.get());
                patch(&mut rewrite.pages, offset, bytes, read)?;
                continue;
            }
            let Some(offset) = place(length, &old, &rewrite.fresh, bytes.len() as u64) else { return Ok(None) };
            if let Some(entry) = found.and_then(|index| list.get_mut(index)) {
                set_place(entry, offset, bytes.len());
            }
            rewrite.fresh.push((offset, bytes.clone()));
        } else {
            let Some(offset) = place(length, &old, &rewrite.fresh, bytes.len() as u64) else { return Ok(None) };
            list.push(new_entry(change, *flags, offset, bytes.len()));
            rewrite.fresh.push((offset, bytes.clone()));
        }
    }
    rewrite.fresh.retain(|(_, bytes)| !bytes.is_empty());
    check_counts(&list)?;
    let new = encode_table(&table, &list);
    for (offset, (old, new)) in (0..).step_by(4096).zip(table.chunks(4096).zip(new.chunks(4096))) {
        if old != new {
            rewrite.pages.insert(offset, new.to_vec());
        }
    }
    Ok(Some(rewrite))
}

/// A whole new region with the items of an old one, changed: for moving it, or when it has become too small. The result is
/// as long as its contents; the region is that, rounded up to 1 MiB.
///
/// # Errors
/// As [`rewrite`].
pub fn rebuild(changes: &[ItemChange], read: &mut ReadRegion<'_>) -> Result<Vec<u8>> {
    let table = read(0..TABLE_BYTES as u64)?;
    let mut items: Vec<(RawEntry, Vec<u8>)> = Vec::new();
    for entry in entries(&table)? {
        let (start, length) = (u64::from(entry.offset.get()), u64::from(entry.length.get()));
        items.push((entry, if length == 0 { Vec::new() } else { read(start..start + length)? }));
    }
    for change in changes {
        let found = items.iter().position(|(entry, _)| is_of(entry, change));
        match (&change.value, found) {
            (None, Some(index)) => drop(items.remove(index)),
            (None, None) => return Err(missing(change)),
            (Some((_, bytes)), Some(index)) => {
                check_length(bytes)?;
                if let Some((_, old)) = items.get_mut(index) {
                    old.clone_from(bytes);
                }
            }
            (Some((flags, bytes)), None) => {
                check_length(bytes)?;
                items.push((new_entry(change, *flags, 0, bytes.len()), bytes.clone()));
            }
        }
    }
    let mut data: Vec<u8> = Vec::new();
    let mut list = Vec::new();
    for (mut entry, bytes) in items {
        set_place(&mut entry, TABLE_BYTES as u64 + data.len() as u64, bytes.len());
        data.extend_from_slice(&bytes);
        list.push(entry);
    }
    check_counts(&list)?;
    let mut region = encode_table(&table, &list);
    region.extend_from_slice(&data);
    Ok(region)
}

fn missing(change: &ItemChange) -> Error {
    let kind = if change.is_user { "user item" } else { "item" };
    Error::new(ErrorKind::InvalidArgument, format!("there is no {kind} {}", change.id))
        .with_hint("`vhdkit info` lists the items of an image")
}

fn check_length(bytes: &[u8]) -> Result<()> {
    if bytes.len() as u64 > u64::from(ITEM_BYTES_MAX) {
        let what = format!("an item of {} bytes is too long; 1 MiB is allowed", bytes.len());
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(())
}

fn check_counts(list: &[RawEntry]) -> Result<()> {
    let users = list.iter().filter(|entry| entry.flags.get() & FLAG_USER != 0).count();
    if list.len() > usize::from(ENTRIES_MAX) || users > USER_ENTRIES_MAX {
        let what = format!("the metadata table has room for {USER_ENTRIES_MAX} user items and {ENTRIES_MAX} in all");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(())
}

fn new_entry(change: &ItemChange, flags: u32, offset: u64, length: usize) -> RawEntry {
    let mut entry = RawEntry {
        item_id: change.id,
        offset: 0.into(),
        length: 0.into(),
        flags: (if change.is_user { flags | FLAG_USER } else { flags & !FLAG_USER }).into(),
        reserved2: 0.into(),
    };
    set_place(&mut entry, offset, length);
    entry
}

/// An empty item has no place.
fn set_place(entry: &mut RawEntry, offset: u64, length: usize) {
    let offset = if length == 0 { 0 } else { offset };
    entry.offset = u32::try_from(offset).unwrap_or(u32::MAX).into(); // regions are at most 128 MiB
    entry.length = u32::try_from(length).unwrap_or(u32::MAX).into(); // at most 1 MiB
}

/// The lowest place of whole pages that no item touches, neither an old one nor one that was written before.
fn place(region: u64, old: &[RawEntry], fresh: &[(u64, Vec<u8>)], length: u64) -> Option<u64> {
    let mut taken: Vec<Range<u64>> = old
        .iter()
        .filter(|entry| entry.length.get() > 0)
        .map(|entry| u64::from(entry.offset.get())..u64::from(entry.offset.get()) + u64::from(entry.length.get()))
        .chain(fresh.iter().map(|(offset, bytes)| *offset..*offset + bytes.len() as u64))
        .collect();
    taken.sort_by_key(|range| range.start);
    let mut start = TABLE_BYTES as u64;
    for range in taken {
        // Pages that change at once must not be shared with what was written before.
        if range.start - range.start % PAGE >= round_up(start + length, PAGE)? {
            break;
        }
        start = start.max(round_up(range.end, PAGE)?);
    }
    (start + length <= region).then_some(start)
}

/// Changes bytes in pages that change at once.
fn patch(pages: &mut BTreeMap<u64, Vec<u8>>, offset: u64, bytes: &[u8], read: &mut ReadRegion<'_>) -> Result<()> {
    for (position, byte) in (offset..).zip(bytes) {
        let start = position - position % PAGE;
        if let Entry::Vacant(page) = pages.entry(start) {
            page.insert(read(start..start + PAGE)?);
        }
        let index = usize::try_from(position % PAGE).unwrap_or(usize::MAX);
        if let Some(to) = pages.get_mut(&start).and_then(|page| page.get_mut(index)) {
            *to = *byte;
        }
    }
    Ok(())
}

/// The table with these entries; what of its header is reserved stays as it is.
fn encode_table(old: &[u8], list: &[RawEntry]) -> Vec<u8> {
    let mut table: Vec<u8> = old.get(..size_of::<RawTableHeader>()).unwrap_or_default().to_vec();
    if let Ok((header, _)) = RawTableHeader::mut_from_prefix(&mut table) {
        header.entry_count = u16::try_from(list.len()).unwrap_or(u16::MAX).into(); // checked
    }
    for entry in list {
        table.extend_from_slice(entry.as_bytes());
    }
    table.resize(TABLE_BYTES, 0);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::finding::{CollectAll, Strictness};
    use crate::format::metadata::{Metadata, NewMetadata, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE, decode, encode};
    use crate::format::region::{METADATA_GUID, Region};

    const MIB: usize = 1 << 20;

    fn region() -> Vec<u8> {
        let mut bytes = encode(&NewMetadata {
            block_size: 1 << 20,
            file_flags: 0,
            disk_size: 64 << 20,
            logical_sector_size: 512,
            physical_sector_size: 4096,
            disk_id: Guid::from_stored([7; 16]),
            parent_locator: None,
        });
        bytes.resize(MIB, 0);
        bytes
    }

    fn understood(bytes: &[u8]) -> Metadata {
        let region = Region { guid: METADATA_GUID, file_offset: 0, length: bytes.len() as u64, required: 1 };
        let mut findings = CollectAll::new(Strictness::Strict);
        let metadata = decode(&region, &mut |range| Ok(slice(bytes, &range)), &mut findings).unwrap();
        assert!(
            findings.findings().iter().all(|finding| finding.code().as_str() == "metadata-unknown"),
            "{findings:?}"
        );
        metadata
    }

    fn slice(bytes: &[u8], range: &Range<u64>) -> Vec<u8> {
        bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec()
    }

    fn apply(bytes: &mut [u8], rewrite: &Rewrite) {
        for (offset, new) in rewrite.fresh.iter().map(|(offset, new)| (offset, new)).chain(&rewrite.pages) {
            let start = usize::try_from(*offset).unwrap();
            bytes[start..start + new.len()].copy_from_slice(new);
        }
    }

    fn set(id: Guid, is_user: bool, bytes: &[u8]) -> ItemChange {
        ItemChange { id, is_user, value: Some((2, bytes.to_vec())) }
    }

    fn changed(bytes: &[u8], changes: &[ItemChange]) -> Option<Vec<u8>> {
        let mut new = bytes.to_vec();
        let rewrite = rewrite(bytes.len() as u64, changes, &mut |range| Ok(slice(bytes, &range))).unwrap()?;
        // Until the pages change, nothing has changed.
        let fresh = Rewrite { fresh: rewrite.fresh.clone(), pages: BTreeMap::new() };
        apply(&mut new, &fresh);
        assert_eq!(understood(&new), understood(bytes));
        for item in understood(bytes).items {
            let range = u64::from(item.offset)..u64::from(item.offset + item.length);
            assert!(slice(&new, &range) == slice(bytes, &range), "item {} is overwritten while it counts", item.id);
        }
        apply(&mut new, &rewrite);
        Some(new)
    }

    fn item(bytes: &[u8], id: Guid) -> Vec<u8> {
        let item = *understood(bytes).items.iter().find(|item| item.id == id).unwrap();
        slice(bytes, &(u64::from(item.offset)..u64::from(item.offset + item.length)))
    }

    #[test]
    fn a_short_item_is_changed_where_it_stands() {
        let old = region();
        let new = changed(&old, &[set(VIRTUAL_DISK_SIZE, false, &(128_u64 << 20).to_le_bytes())]).unwrap();
        let metadata = understood(&new);
        assert_eq!(metadata.disk_size, 128 << 20);
        assert_eq!(metadata.items, understood(&old).items);
        assert_eq!(old.iter().zip(&new).filter(|(old, new)| old != new).count(), 1);
    }

    #[test]
    fn items_of_users_come_change_and_go() {
        let old = region();
        let (a, b) = (Guid::from_stored([1; 16]), Guid::from_stored([2; 16]));
        let one = changed(&old, &[set(a, true, b"first"), set(b, true, &[9; 70_000])]).unwrap();
        assert_eq!((item(&one, a), item(&one, b).len()), (b"first".to_vec(), 70_000));
        let two = changed(&one, &[set(a, true, &[3; 5000])]).unwrap();
        assert_eq!((item(&two, a), item(&two, b)), (vec![3; 5000], vec![9; 70_000]));
        let three = changed(&two, &[ItemChange { id: b, is_user: true, value: None }]).unwrap();
        assert_eq!(understood(&three).items.len(), understood(&old).items.len() + 1);
        assert_eq!(item(&three, a), vec![3; 5000]);
        let empty = changed(&three, &[set(a, true, b"")]).unwrap();
        assert_eq!(item(&empty, a), Vec::<u8>::new());
        let gone = ItemChange { id: b, is_user: true, value: None };
        let refused = rewrite(MIB as u64, &[gone], &mut |range| Ok(slice(&three, &range))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
    }

    /// What is new does not go where something was that is taken out, or moved, at the same instant.
    #[test]
    fn old_items_stay_whole_until_the_table_changes() {
        let (a, b, c) = (Guid::from_stored([1; 16]), Guid::from_stored([2; 16]), Guid::from_stored([3; 16]));
        let old = changed(&region(), &[set(a, true, &[1; 9000]), set(b, true, &[2; 7000])]).unwrap();
        let out = ItemChange { id: a, is_user: true, value: None };
        let new = changed(&old, &[out, set(c, true, &[3; 8000])]).unwrap();
        assert_eq!((item(&new, b), item(&new, c)), (vec![2; 7000], vec![3; 8000]));
        let new = changed(&old, &[set(a, true, &[4; 9001]), set(b, true, &[5; 7001])]).unwrap();
        assert_eq!((item(&new, a), item(&new, b)), (vec![4; 9001], vec![5; 7001]));
    }

    /// An entry of the log holds what changes at once, however many items that are.
    #[test]
    fn many_items_change_at_once() {
        let mut bytes = region();
        bytes.resize(8 * MIB, 0);
        let all = |value: u8| -> Vec<ItemChange> {
            (0..300_u128).map(|number| set(Guid::from_printed(number + 1), true, &[value; 100])).collect()
        };
        let old = changed(&bytes, &all(1)).unwrap();
        let rewrite = rewrite(8 * MIB as u64, &all(2), &mut |range| Ok(slice(&old, &range))).unwrap().unwrap();
        assert!(rewrite.pages.len() <= 126 - 32, "{} pages", rewrite.pages.len());
        let new = changed(&old, &all(2)).unwrap();
        assert_eq!(item(&new, Guid::from_printed(1)), vec![2; 100]);
        assert_eq!(item(&new, Guid::from_printed(300)), vec![2; 100]);
    }

    /// The same GUID names an item of the format and one of a user.
    #[test]
    fn an_item_of_a_user_is_not_taken_for_one_of_the_format() {
        let new = changed(&region(), &[set(VIRTUAL_DISK_ID, true, &[1; 16])]).unwrap();
        let metadata = understood(&new);
        assert_eq!(metadata.disk_id, Guid::from_stored([7; 16]));
        assert_eq!(metadata.items.len(), 6);
    }

    #[test]
    fn what_does_not_fit_needs_a_new_region() {
        let old = region();
        let a = Guid::from_stored([1; 16]);
        let change = [set(a, true, &[5; MIB])];
        assert_eq!(changed(&old, &change), None);
        let mut new = rebuild(&change, &mut |range| Ok(slice(&old, &range))).unwrap();
        new.resize(2 * MIB, 0);
        assert_eq!(item(&new, a), vec![5; MIB]);
        assert_eq!(understood(&new).disk_size, 64 << 20);
        let long = set(a, true, &vec![5; MIB + 1]);
        let refused = rebuild(&[long], &mut |range| Ok(slice(&old, &range))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Limit);
    }

    #[test]
    fn the_table_is_full_at_last() {
        let mut bytes = region();
        let changes: Vec<ItemChange> =
            (0..USER_ENTRIES_MAX as u128).map(|number| set(Guid::from_printed(number + 1), true, b"x")).collect();
        bytes.resize(8 * MIB, 0);
        let full = changed(&bytes, &changes).unwrap();
        let one_more = set(Guid::from_printed(1 << 90), true, b"x");
        let refused = rewrite(8 * MIB as u64, &[one_more], &mut |range| Ok(slice(&full, &range))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Limit);
    }
}
