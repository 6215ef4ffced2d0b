//! Every decoder on arbitrary bytes: no panic, opening and checking agree, and what was understood survives a round trip.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhdkit::error::Result;
use vhdkit::format::bat::{BatEntry, BatRules, FileSize};
use vhdkit::format::checksum::checksum;
use vhdkit::format::finding::{CollectAll, FailFast, Findings, Severity, Strictness};
use vhdkit::format::geometry::{BatSlot, Geometry};
use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES, Header, decode_headers};
use vhdkit::format::ident::RawFileIdentifier;
use vhdkit::format::log::{ReplayLimits, Ring, SECTOR_BYTES, find_active_sequence, walk_changes};
use vhdkit::format::metadata;
use vhdkit::format::region::{self, METADATA_GUID, Region, TABLE_BYTES};
use vhdkit::format::space::TakenSpace;
use vhdkit::text::{escape, escape_utf16};
use vhdkit::units::{BatIndex, BlockIndex, ChunkIndex, FileOffset, GuestOffset, MIB};
use vhdkit_fuzz::take;

const LEVELS: [Strictness; 3] = [Strictness::Lenient, Strictness::Normal, Strictness::Strict];

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let Some([which, options]) = take(&mut rest) else { return };
    match which % 7 {
        0 => headers(rest, options),
        1 => regions(rest, options),
        2 => metadata_region(rest),
        3 => log(rest, options),
        4 => bat(rest),
        5 => geometry(rest),
        _ => text(rest),
    }
});

/// Runs a decoder both ways, and checks that they agree.
fn both<T: std::fmt::Debug>(
    strictness: Strictness,
    mut decode: impl FnMut(&mut dyn Findings) -> Result<T>,
) -> Option<T> {
    let mut all = CollectAll::new(strictness);
    let collected = decode(&mut all);
    let mut fast = FailFast::new(strictness);
    let opened = decode(&mut fast);
    assert_eq!(opened.is_ok(), all.count(Severity::Error) == 0, "{opened:?} {all:?}");
    if opened.is_ok() {
        assert!(collected.is_ok());
        assert_eq!(fast.into_findings(), all.findings());
    }
    opened.ok()
}

fn headers(input: &[u8], options: u8) {
    let mut copies = [[0; HEADER_BYTES]; 2];
    let half = input.len() / 2;
    for (bit, (copy, part)) in copies.iter_mut().zip([&input[..half], &input[half..]]).enumerate() {
        for (to, from) in copy.iter_mut().zip(part) {
            *to = *from;
        }
        if options >> bit & 1 == 0 {
            let sum = checksum(copy);
            copy[4..8].copy_from_slice(&sum.to_le_bytes());
        }
    }
    for level in LEVELS {
        let decoded = both(level, |findings| decode_headers([&copies[0], &copies[1]], 64 * MIB, findings));
        if let Some(headers) = decoded {
            let encoded = headers.current.encode();
            assert_eq!(encoded[8..80], copies[headers.current_copy][8..80]);
            assert_eq!(Header::decode(&encoded), Some(headers.current));
        }
    }
}

fn regions(input: &[u8], options: u8) {
    let mut first = input.to_vec();
    first.resize(TABLE_BYTES, 0);
    let sum = checksum(&first);
    first[4..8].copy_from_slice(&sum.to_le_bytes());
    let mut second = first.clone();
    second[usize::from(options) * 16] ^= options;
    for level in LEVELS {
        let decoded = both(level, |findings| {
            let mut taken = TakenSpace::default();
            let _ = taken.add(0..MIB, "header section");
            region::decode_tables([&first, &second], 64 * MIB, &mut taken, findings)
        });
        if let Some(table) = decoded {
            assert!(table.regions.contains(&table.bat) && table.regions.contains(&table.metadata));
            let encoded = region::encode(&table.regions);
            let again = both(level, |findings| {
                region::decode_tables([&encoded, &encoded], 64 * MIB, &mut TakenSpace::default(), findings)
            });
            assert_eq!(again.expect("our own table").regions, table.regions);
        }
    }
}

fn metadata_region(input: &[u8]) {
    // The input is the used part of the table, then the items.
    let region = Region { guid: METADATA_GUID, file_offset: 2 * MIB, length: 2 * TABLE_BYTES as u64, required: 1 };
    let mut bytes = vec![0; 2 * TABLE_BYTES];
    let (table, items) = input.split_at(input.len().min(32 * 12));
    bytes[..table.len()].copy_from_slice(table);
    let items = &items[..items.len().min(bytes.len() - TABLE_BYTES)];
    bytes[TABLE_BYTES..TABLE_BYTES + items.len()].copy_from_slice(items);
    for level in LEVELS {
        let decoded = both(level, |findings| {
            let mut read = |range: std::ops::Range<u64>| Ok(bytes[range.start as usize..range.end as usize].to_vec());
            metadata::decode(&region, &mut read, findings)
        });
        if let Some(metadata) = decoded {
            assert_eq!(metadata.geometry.disk_size(), metadata.disk_size);
            assert_eq!(metadata.geometry.block_size(), u64::from(metadata.block_size));
        }
    }
}

/// A ring in memory that counts how often its sectors are asked for.
struct Memory {
    sectors: Vec<[u8; SECTOR_BYTES]>,
    reads: u64,
}

impl Ring for Memory {
    fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn sector(&mut self, number: u64) -> Result<&[u8; SECTOR_BYTES]> {
        self.reads += 1;
        Ok(&self.sectors[number as usize])
    }
}

/// The input is sectors of 96 bytes: the first 88 and the last 8 of each.
fn log(input: &[u8], options: u8) {
    let mut sectors: Vec<[u8; SECTOR_BYTES]> = Vec::new();
    for part in input.chunks(96).take(256) {
        let mut sector = [0; SECTOR_BYTES];
        let (start, end) = part.split_at(part.len().min(88));
        sector[..start.len()].copy_from_slice(start);
        sector[SECTOR_BYTES - end.len()..].copy_from_slice(end);
        sectors.push(sector);
    }
    if sectors.is_empty() {
        return;
    }
    let count = sectors.len();
    let guid = Guid::from_printed(1);
    for start in 0..count {
        if !sectors[start].starts_with(b"loge") {
            continue;
        }
        if options & 1 == 0 {
            sectors[start][32..48].copy_from_slice(&guid.stored());
        }
        let claimed = u32::from_le_bytes(sectors[start][8..12].try_into().expect("four bytes")) as usize / SECTOR_BYTES;
        if claimed <= count {
            let entry: Vec<u8> = (0..claimed).flat_map(|number| sectors[(start + number) % count]).collect();
            let sum = checksum(&entry);
            sectors[start][4..8].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let mut ring = Memory { sectors, reads: 0 };
    let found = find_active_sequence(&mut ring, guid).expect("memory can be read");
    // Linear: each sector is looked at as the start of an entry, and as a part of one that fails or counts.
    assert!(ring.reads <= 4 * count as u64 + 4, "{} reads for {count} sectors", ring.reads);
    let Some(sequence) = found else { return };
    let entries = &sequence.entries;
    assert!(entries.windows(2).all(|pair| pair[0].sequence_number + 1 == pair[1].sequence_number));
    assert_eq!(entries[0].start * 4096, entries[entries.len() - 1].tail);
    assert!(entries.iter().map(|entry| entry.sectors).sum::<u64>() <= count as u64);
    let header = Header {
        sequence_number: 1,
        file_write_guid: guid,
        data_write_guid: guid,
        log_guid: guid,
        log_version: 0,
        version: 1,
        log_length: (count * SECTOR_BYTES) as u32,
        log_offset: MIB,
    };
    let limits = ReplayLimits { file_size: 64 * MIB, growth_max: 64 * MIB };
    let mut findings = FailFast::new(Strictness::Normal);
    let _ = walk_changes(&mut ring, &sequence, &header, limits, &mut findings, &mut |entry, change| {
        let end = change.file_offset() + change.length();
        assert!(change.file_offset() >= 3 * 65536 && end <= entry.last_file_offset.next_multiple_of(MIB));
        assert!(end <= 129 * MIB);
        Ok(())
    });
}

fn number(input: &mut &[u8]) -> u64 {
    take(input).map_or(0, u64::from_le_bytes)
}

fn some_geometry(input: &mut &[u8]) -> Option<Geometry> {
    let [shift, flags] = take(input)?;
    let size = number(input) % (64 << 40) + 1;
    let sector = if flags & 1 == 0 { 512 } else { 4096 };
    Geometry::new(size.next_multiple_of(u64::from(sector)), 1 << (20 + shift % 9), sector, flags & 2 != 0)
}

fn bat(input: &[u8]) {
    let mut rest = input;
    let Some(geometry) = some_geometry(&mut rest) else { return };
    let mut taken = TakenSpace::default();
    let _ = taken.add(0..MIB, "header section");
    let _ = taken.add(MIB..4 * MIB, "everything");
    let file_size = number(&mut rest);
    for level in LEVELS {
        let rules = BatRules {
            geometry,
            bat_offset: FileOffset(3 * MIB),
            file_size: std::sync::Arc::new(FileSize::new(file_size)),
            taken_end: 4 * MIB,
            taken: taken.clone(),
            strictness: level,
        };
        let mut rest = rest;
        while rest.len() >= 16 {
            let (block, entry) = (number(&mut rest) % geometry.payload_blocks(), BatEntry(number(&mut rest)));
            let block = BlockIndex(block);
            let judged = rules.judge_payload(block, entry);
            if rules.is_plain(entry) {
                assert_eq!(judged, Ok(None));
            }
            if let Some(owned) = rules.owned_range(BatSlot::Payload(block), entry).filter(|_| judged == Ok(None)) {
                assert!(
                    owned.start >= 4 * MIB
                        && owned.end <= file_size
                        && owned.end - owned.start == geometry.block_size()
                );
            }
            let chunk = geometry.chunk_of(block);
            let judged = rules.judge_bitmap(chunk, entry);
            if let Some(owned) = rules.owned_range(BatSlot::Bitmap(chunk), entry).filter(|_| judged == Ok(None)) {
                assert!(owned.start >= 4 * MIB && owned.end <= file_size && owned.end - owned.start == MIB);
            }
        }
    }
}

fn geometry(input: &[u8]) {
    let mut rest = input;
    let Some(geometry) = some_geometry(&mut rest) else { return };
    let block = BlockIndex(number(&mut rest) % geometry.payload_blocks());
    let index = geometry.payload_index(block);
    assert!(index.0 < geometry.bat_entries());
    assert_eq!(geometry.slot(index), BatSlot::Payload(block));
    let chunk = ChunkIndex(number(&mut rest) % geometry.chunks());
    assert_eq!(geometry.slot(geometry.bitmap_index(chunk)), BatSlot::Bitmap(chunk));
    let any = BatIndex(number(&mut rest) % (1 << 40));
    match geometry.slot(any) {
        BatSlot::Payload(block) => assert_eq!(geometry.payload_index(block), any),
        BatSlot::Bitmap(chunk) => assert_eq!(geometry.bitmap_index(chunk), any),
    }
    let range = geometry.block_range(block);
    assert!(range.start < range.end && range.end <= geometry.disk_size());
    assert_eq!(geometry.block_of(GuestOffset(range.end - 1)), block);
    assert!(geometry.bat_entries() * 8 <= geometry.bat_region_bytes());
    assert!(geometry.bitmap_bit(GuestOffset(range.start)) / 8 + geometry.bitmap_bytes_per_block() <= MIB);
}

fn text(input: &[u8]) {
    let mut start = [0; size_of::<RawFileIdentifier>()];
    let count = start.len().min(input.len());
    start[..count].copy_from_slice(&input[..count]);
    let _ = vhdkit::probe(input);
    let units: Vec<u16> = input.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    let lossy = String::from_utf8_lossy(input);
    for shown in [escape_utf16(&units), escape(&lossy).into_owned()] {
        assert!(!shown.chars().any(char::is_control), "{shown:?}");
        assert_eq!(escape(&shown), shown, "escaping twice changes nothing");
    }
}
