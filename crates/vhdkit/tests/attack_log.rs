//! Logs whose replay costs much.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::collections::HashMap;
use std::time::Instant;

use vhdkit::format::guid::Guid;
use vhdkit::format::log::{Ring, SECTOR_BYTES, find_active_sequence};

/// A ring in memory that counts how often a sector is looked at.
struct Counted {
    bytes: Vec<[u8; SECTOR_BYTES]>,
    reads: u64,
}

impl Ring for Counted {
    fn sectors(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn sector(&mut self, number: u64) -> vhdkit::Result<&[u8; SECTOR_BYTES]> {
        self.reads += 1;
        Ok(&self.bytes[number as usize])
    }
}

fn put(sector: &mut [u8; SECTOR_BYTES], offset: usize, bytes: &[u8]) {
    sector[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// A sector that claims an entry over `sectors` sectors of the ring with so many descriptors.
fn claim(guid: Guid, sectors: u64, descriptors: u32, data: bool) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    put(&mut sector, 0, b"loge");
    put(&mut sector, 8, &u32::try_from(sectors * 4096).unwrap().to_le_bytes());
    put(&mut sector, 16, &7_u64.to_le_bytes());
    put(&mut sector, 24, &descriptors.to_le_bytes());
    put(&mut sector, 32, zerocopy::IntoBytes::as_bytes(&guid));
    for index in 0..126 {
        put(&mut sector, 64 + index * 32, if data { b"desc" } else { b"zero" });
        put(&mut sector, 64 + index * 32 + 24, &7_u64.to_le_bytes());
    }
    sector
}

fn full(kind: &str, guid: Guid, sectors: u64) -> Vec<[u8; SECTOR_BYTES]> {
    let mut data = [0; SECTOR_BYTES];
    put(&mut data, 0, b"data");
    put(&mut data, 4092, &7_u32.to_le_bytes());
    let mut more = [0; SECTOR_BYTES];
    for index in 0..128 {
        put(&mut more, index * 32, b"zero");
        put(&mut more, index * 32 + 24, &7_u64.to_le_bytes());
    }
    let all_zeros = u32::try_from(126 + (sectors - 1) * 128).unwrap();
    let sector = |number: u64| match kind {
        "every sector claims all" => claim(guid, sectors, all_zeros, false),
        "one claims all of zero descriptors" if number == 3 => claim(guid, sectors, all_zeros, false),
        "one claims all of zero descriptors" => more,
        "claims and data in turn" if number.is_multiple_of(2) => claim(guid, sectors, 126, true),
        "claims with data up to the next" if number.is_multiple_of(127) => claim(guid, 127, 126, true),
        _ => data,
    };
    (0..sectors).map(sector).collect()
}

#[test]
fn a_scan_looks_at_each_sector_a_few_times_whatever_they_claim() {
    let guid = Guid::from_printed(5);
    let mut seen = HashMap::new();
    for kind in [
        "every sector claims all",
        "one claims all of zero descriptors",
        "claims and data in turn",
        "claims with data up to the next",
    ] {
        let sectors = 16_384;
        let mut ring = Counted { bytes: full(kind, guid, sectors), reads: 0 };
        let started = Instant::now();
        assert_eq!(find_active_sequence(&mut ring, guid).unwrap(), None, "{kind}");
        println!("{kind}: {} reads of {sectors} sectors, {:?}", ring.reads, started.elapsed());
        assert!(ring.reads <= 4 * sectors, "{kind}: {} reads of {sectors} sectors", ring.reads);
        seen.insert(kind, ring.reads);
    }
    assert!(seen["one claims all of zero descriptors"] > 16_384, "the walk went through all of it");
}
