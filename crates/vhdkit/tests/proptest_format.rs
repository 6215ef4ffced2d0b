//! Whatever is encoded is decoded to the same, and what is not well formed is refused and never a panic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::collections::HashSet;

use proptest::collection::vec;
use proptest::prelude::*;
use vhdkit::format::bat::{BatEntry, PayloadState};
use vhdkit::format::finding::{Code, CollectAll, FailFast, Location, Severity};
use vhdkit::format::geometry::{BatSlot, Geometry};
use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES, Header, decode_headers};
use vhdkit::format::ident::RawFileIdentifier;
use vhdkit::format::locator::{KEY_LINKAGE, KEY_RELATIVE_PATH, ParentLocator};
use vhdkit::format::log::page;
use vhdkit::format::metadata::{self, Metadata, NewMetadata};
use vhdkit::format::region::{self, BAT_GUID, METADATA_GUID, Region, decode_tables};
use vhdkit::format::space::TakenSpace;
use vhdkit::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset, GuestOffset};
use vhdkit_testkit::spec::{LocatorPair, LocatorSpec};

const MIB: u64 = 1 << 20;

fn guid() -> impl Strategy<Value = Guid> {
    any::<[u8; 16]>().prop_map(Guid::from_stored)
}

fn header() -> impl Strategy<Value = Header> {
    let guids = (guid(), guid(), guid());
    (any::<u64>(), guids, any::<(u16, u16, u32, u64)>()).prop_map(|(sequence_number, guids, numbers)| Header {
        sequence_number,
        file_write_guid: guids.0,
        data_write_guid: guids.1,
        log_guid: guids.2,
        log_version: numbers.0,
        version: numbers.1,
        log_length: numbers.2,
        log_offset: numbers.3,
    })
}

/// A geometry that the format allows.
fn geometry() -> impl Strategy<Value = Geometry> {
    (20_u32..=28, prop_oneof![Just(512_u32), Just(4096)], any::<bool>(), any::<u64>(), 9_u32..=46).prop_map(
        |(shift, sector, differencing, size, bits)| {
            let unit = u64::from(sector);
            let size = (size % (1 << bits)).next_multiple_of(unit).clamp(unit, 1 << 46);
            Geometry::new(size, 1 << shift, sector, differencing).unwrap()
        },
    )
}

fn decode_metadata(bytes: &[u8], findings: &mut CollectAll) -> vhdkit::Result<Metadata> {
    let length = (bytes.len() as u64).next_multiple_of(MIB);
    let mut padded = bytes.to_vec();
    padded.resize(length as usize, 0);
    let region = Region { guid: METADATA_GUID, file_offset: 2 * MIB, length, required: 1 };
    let mut read = |range: std::ops::Range<u64>| Ok(padded[range.start as usize..range.end as usize].to_vec());
    metadata::decode(&region, &mut read, findings)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers_round_trip(header in header(), position in 0..HEADER_BYTES, bit in 0..8) {
        let mut bytes = header.encode();
        prop_assert_eq!(Header::decode(&bytes), Some(header));
        bytes[position] ^= 1_u8 << bit;
        prop_assert_eq!(Header::decode(&bytes), None);
    }

    #[test]
    fn the_newer_header_counts(first in header(), second in header()) {
        let sound = |header: Header| Header { version: 1, log_length: 1 << 20, log_offset: MIB, log_guid: Guid::NIL, ..header };
        let (first, second) = (sound(first), sound(second));
        prop_assume!(first.sequence_number != second.sequence_number);
        let bytes = [first.encode(), second.encode()];
        let headers = decode_headers([&bytes[0], &bytes[1]], 8 * MIB, &mut FailFast::default()).unwrap();
        let newer = usize::from(second.sequence_number > first.sequence_number);
        prop_assert_eq!((headers.current_copy, headers.current), (newer, [first, second][newer]));
        prop_assert_eq!(headers.copies, [Some(first), Some(second)]);
    }

    #[test]
    fn region_tables_round_trip(
        lengths in vec(1_u64..40, 2..20),
        order in any::<u64>(),
        gaps in vec(0_u64..5, 20),
        required in vec(0_u32..2, 20),
        flip in (0..region::TABLE_BYTES, 0..8),
    ) {
        let mut offset = MIB;
        let mut regions: Vec<Region> = Vec::new();
        for (index, length) in lengths.iter().enumerate() {
            offset += gaps[index] * MIB;
            let guid = match index {
                0 => BAT_GUID,
                1 => METADATA_GUID,
                other => Guid::from_printed(other as u128),
            };
            // An unknown region that is required would rightly be refused.
            let required = if index < 2 { required[index] } else { 0 };
            regions.push(Region { guid, file_offset: offset, length: length * MIB, required });
            offset += length * MIB;
        }
        let turn = order as usize % regions.len();
        regions.rotate_left(turn);
        let good = region::encode(&regions);
        let mut bad = good.clone();
        bad[flip.0] ^= 1_u8 << flip.1;
        for (copies, copy) in [([&good, &good], 0), ([&good, &bad], 0), ([&bad, &good], 1)] {
            let mut space = TakenSpace::default();
            let table = decode_tables([copies[0], copies[1]], offset, &mut space, &mut FailFast::default()).unwrap();
            prop_assert_eq!(&table.regions, &regions);
            prop_assert_eq!(table.copy, copy);
            prop_assert_eq!(table.bat.guid, BAT_GUID);
            prop_assert_eq!(table.metadata.guid, METADATA_GUID);
            prop_assert_eq!(space.ranges().len(), regions.len());
        }
        let mut findings = CollectAll::default();
        prop_assert!(decode_tables([&bad, &bad], offset, &mut TakenSpace::default(), &mut findings).is_err());
    }

    #[test]
    fn metadata_round_trips(geometry in geometry(), fixed in any::<bool>(), physical in prop_oneof![Just(512_u32), Just(4096)], id in guid(), linkage in guid(), path in "[^\\x00]{1,200}") {
        let locator = ParentLocator::new(linkage, &[(KEY_RELATIVE_PATH, path.as_str())]);
        let item = locator.encode().unwrap();
        let differencing = geometry.is_differencing();
        let flags = u32::from(fixed) * metadata::LEAVE_BLOCKS_ALLOCATED + u32::from(differencing) * metadata::HAS_PARENT;
        let new = NewMetadata {
            block_size: geometry.block_size() as u32,
            file_flags: flags,
            disk_size: geometry.disk_size(),
            logical_sector_size: geometry.logical_sector_size() as u32,
            physical_sector_size: physical,
            disk_id: id,
            parent_locator: differencing.then_some(item.as_slice()),
        };
        let mut findings = CollectAll::default();
        let bytes = metadata::encode(&new);
        prop_assert!(bytes.len() as u64 <= metadata::region_bytes(bytes.len() as u64));
        let decoded = decode_metadata(&bytes, &mut findings).unwrap();
        // A physical sector below the logical one is the one thing here that is odd.
        let odd = u64::from(physical) < geometry.logical_sector_size();
        let codes: Vec<Code> = findings.findings().iter().map(|finding| finding.code()).collect();
        prop_assert_eq!(codes, if odd { vec![Code::SectorSizes] } else { vec![] });
        prop_assert_eq!(decoded.geometry, geometry);
        prop_assert_eq!(decoded.block_size, new.block_size);
        prop_assert_eq!(decoded.disk_size, new.disk_size);
        prop_assert_eq!((decoded.logical_sector_size, decoded.physical_sector_size), (new.logical_sector_size, physical));
        prop_assert_eq!((decoded.disk_id, decoded.has_parent, decoded.leave_blocks_allocated), (id, differencing, fixed));
        prop_assert_eq!(decoded.parent_locator, differencing.then_some(locator));
        prop_assert_eq!(decoded.items.len(), 5 + usize::from(differencing));
    }

    #[test]
    fn damaged_metadata_never_panics(geometry in geometry(), damage in vec((0_usize..400, any::<u8>()), 1..20)) {
        let new = NewMetadata {
            block_size: geometry.block_size() as u32,
            file_flags: 0,
            disk_size: geometry.disk_size(),
            logical_sector_size: geometry.logical_sector_size() as u32,
            physical_sector_size: 512,
            disk_id: Guid::NIL,
            parent_locator: None,
        };
        let mut bytes = metadata::encode(&new);
        for (position, value) in damage {
            // The table's used part, and the items behind the table.
            let position = if position < 200 { position } else { region::TABLE_BYTES + position - 200 };
            if let Some(byte) = bytes.get_mut(position) {
                *byte = value;
            }
        }
        let mut findings = CollectAll::default();
        if decode_metadata(&bytes, &mut findings).is_err() {
            prop_assert!(findings.count(Severity::Error) > 0, "an error without a finding");
        }
    }

    #[test]
    fn locators_round_trip(linkage in guid(), pairs in vec(("[^\\x00]{1,30}", "[^\\x00]{1,300}"), 0..8)) {
        let mut keys = HashSet::from([KEY_LINKAGE.to_owned(), "parent_linkage2".to_owned()]);
        let pairs: Vec<(String, String)> = pairs.into_iter().filter(|(key, _)| keys.insert(key.clone())).collect();
        let paths: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let locator = ParentLocator::new(linkage, &paths);
        let bytes = locator.encode().unwrap();
        let decoded = ParentLocator::decode(&bytes, &Location::of("locator"), &mut FailFast::default()).unwrap();
        prop_assert_eq!(&decoded, &locator);
        for (key, value) in &pairs {
            prop_assert_eq!(decoded.get(key), Some(value.as_str()));
        }
        prop_assert_eq!(decoded.linkage(), Some(linkage));
        prop_assert_eq!(decoded.accepts(linkage), !linkage.is_nil());
    }

    /// Any UTF-16 units, as a stranger wrote them: taken exactly when they are text without NUL.
    #[test]
    fn locators_of_others(units in vec((vec(prop_oneof![any::<u16>(), 0x20_u16..0x7F, 0xD800_u16..0xE000], 0..6), vec(any::<u16>(), 0..6)), 0..5)) {
        let mut spec = LocatorSpec::default().pair("parent_linkage", "{01234567-89AB-cdef-0123-456789abcdef}");
        spec.pairs.extend(units.iter().map(|(key, value)| LocatorPair::units(key, value)));
        let text = |units: &[u16]| String::from_utf16(units).ok().filter(|text| !text.is_empty() && !text.contains('\0'));
        let mut expected = vec![("parent_linkage".to_owned(), "{01234567-89AB-cdef-0123-456789abcdef}".to_owned())];
        let mut faults = 0;
        for (key, value) in &units {
            match (text(key), text(value)) {
                (Some(key), Some(value)) if expected.iter().all(|(other, _)| *other != key) => expected.push((key, value)),
                (Some(_), Some(_)) => faults += 1,
                (key, value) => faults += u64::from(key.is_none()) + u64::from(value.is_none()),
            }
        }
        let mut findings = CollectAll::default();
        let locator = ParentLocator::decode(&spec.encode(), &Location::of("locator"), &mut findings).unwrap();
        prop_assert_eq!(locator.pairs(), expected.as_slice());
        prop_assert_eq!(findings.count(Severity::Error), faults);
        let strict = ParentLocator::decode(&spec.encode(), &Location::of("locator"), &mut FailFast::default());
        prop_assert_eq!(strict.is_err(), faults > 0);
    }

    #[test]
    fn locators_of_any_bytes_never_panic(bytes in vec(any::<u8>(), 0..400), typed in any::<bool>()) {
        let mut bytes = bytes;
        if typed && bytes.len() >= 20 {
            bytes[..16].copy_from_slice(&vhdkit::format::locator::VHDX_LOCATOR.stored());
            bytes[18] %= 20;
            bytes[19] = 0;
        }
        let _ = ParentLocator::decode(&bytes, &Location::of("locator"), &mut CollectAll::default());
    }

    #[test]
    fn bat_entries_round_trip(state in 0_u64..8, mebibytes in 0_u64..1 << 44, raw in any::<u64>()) {
        let entry = BatEntry::new(state, FileOffset(mebibytes << 20));
        prop_assert_eq!((entry.state_number(), entry.file_offset().0, entry.reserved()), (state, mebibytes << 20, 0));
        let any = BatEntry(raw);
        prop_assert_eq!(any.state_number() | any.file_offset().0 | any.reserved(), raw);
        if let Some(known) = entry.payload_state() {
            prop_assert!(known.number() == state || (state == 5 && known == PayloadState::Unmapped));
        } else {
            prop_assert_eq!(state, 4);
        }
    }

    #[test]
    fn bat_slots_and_indices_agree(geometry in geometry(), at in any::<u64>()) {
        let block = BlockIndex(at % geometry.payload_blocks());
        let index = geometry.payload_index(block);
        prop_assert!(index.0 < geometry.bat_entries());
        prop_assert_eq!(geometry.slot(index), BatSlot::Payload(block));
        let chunk = ChunkIndex(at % geometry.chunks());
        let index = geometry.bitmap_index(chunk);
        prop_assert_eq!(geometry.slot(index), BatSlot::Bitmap(chunk));
        prop_assert_eq!(index.0 < geometry.bat_entries(), geometry.is_differencing() || chunk.0 + 1 < geometry.chunks());
        let index = BatIndex(at % geometry.bat_entries());
        let back = match geometry.slot(index) {
            BatSlot::Payload(block) => geometry.payload_index(block),
            BatSlot::Bitmap(chunk) => geometry.bitmap_index(chunk),
        };
        prop_assert_eq!(back, index);
        prop_assert!(geometry.bat_entries() * 8 <= geometry.bat_region_bytes());
    }

    #[test]
    fn every_guest_offset_has_one_place(geometry in geometry(), at in any::<u64>()) {
        let offset = GuestOffset(at % geometry.disk_size());
        let block = geometry.block_of(offset);
        let range = geometry.block_range(block);
        prop_assert!(range.contains(&offset.0) && range.end <= geometry.disk_size());
        prop_assert_eq!(range.start + geometry.offset_in_block(offset), offset.0);
        prop_assert!(block.0 < geometry.payload_blocks());
        prop_assert_eq!(geometry.chunk_of(block).0, offset.0 / (geometry.chunk_ratio() * geometry.block_size()));
        let bit = geometry.bitmap_bit(offset);
        let of_block = block.0 % geometry.chunk_ratio() * geometry.bitmap_bytes_per_block() * 8;
        prop_assert_eq!(bit, of_block + geometry.offset_in_block(offset) / geometry.logical_sector_size());
    }

    #[test]
    fn guids_round_trip(guid in guid()) {
        let text = guid.to_string();
        prop_assert_eq!(text.parse(), Ok(guid));
        prop_assert_eq!(format!("{{{}}}", text.to_uppercase()).parse(), Ok(guid));
        prop_assert_eq!(vhdkit_testkit::Guid(guid.stored()).to_string(), text);
    }

    #[test]
    fn pages_are_put_together(truth in vec(any::<u8>(), 4096), noise in any::<[u8; 12]>()) {
        let mut sector: [u8; 4096] = truth.clone().try_into().unwrap();
        sector[..8].copy_from_slice(&noise[..8]);
        sector[4092..].copy_from_slice(&noise[8..]);
        let leading = truth[..8].try_into().unwrap();
        let trailing = truth[4092..].try_into().unwrap();
        prop_assert_eq!(page(&sector, leading, trailing).to_vec(), truth);
    }

    #[test]
    fn creators_are_text_that_is_safe_to_print(text in "[ -\\[\\]-~]{0,256}", any_text in ".{0,300}") {
        prop_assert_eq!(RawFileIdentifier::new(&text).creator_text(), text);
        let shown = RawFileIdentifier::new(&any_text).creator_text();
        prop_assert!(shown.chars().all(|character| !character.is_control()), "{:?}", shown);
    }
}
