//! How long a hostile log may take: the scan is linear, whatever the ring claims.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhdkit::error::ErrorKind::Corrupt;
use vhdkit::format::finding::Code;
use vhdkit::image::OpenOptions;
use vhdkit::storage::Storage;
use vhdkit_testkit::SparseFile;
use vhdkit_testkit::log::{LogEntrySpec, SECTOR};
use vhdkit_testkit::spec::Checksum;

use crate::ring::{Ring, guid};
use crate::table::{MIB, Row, dynamic, special};

/// The largest log that a writer is known to make.
const LOG_BYTES: u32 = 256 << 20;
const SECTORS: u64 = LOG_BYTES as u64 / 4096;

/// What the scan may cost. The issue asks for a second; without optimisation it is slower.
const LIMIT: Duration = if cfg!(debug_assertions) { Duration::from_secs(4) } else { Duration::from_secs(1) };

pub(crate) fn rows() -> Vec<Row> {
    vec![
        bounded("V-032", "every sector of 256 MiB claims to be an entry of all of it", claims_all),
        bounded(
            "V-050",
            "every sector of 256 MiB claims to be an entry of all of it, full of descriptors",
            claims_descriptors,
        ),
        bounded("V-032", "one entry of all of 256 MiB with a wrong checksum", wrong_checksum),
        bounded("V-036", "256 MiB of valid entries, and the last has a bad tail", bad_tail),
        bounded("V-036", "256 MiB of valid entries, each alone, with bad tails", bad_tails),
    ]
}

/// A ring that is made when it is read.
struct Hostile {
    file: SparseFile,
    ring: Range<u64>,
    sector: fn(u64) -> [u8; SECTOR],
}

impl std::fmt::Debug for Hostile {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Hostile({:?})", self.ring)
    }
}

impl Storage for Hostile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.ring.contains(&offset) {
            buf.copy_from_slice(&self.file.read(offset, buf.len()));
            return Ok(());
        }
        assert!(offset.is_multiple_of(4096) && buf.len().is_multiple_of(SECTOR), "logs are read by the sector");
        for (number, sector) in ((offset - self.ring.start) / 4096..).zip(buf.chunks_mut(SECTOR)) {
            sector.copy_from_slice(&(self.sector)(number));
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        panic!("opening for reading writes");
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        panic!("opening for reading changes the length");
    }

    fn sync(&self) -> io::Result<()> {
        panic!("opening for reading syncs");
    }
}

/// The time that this thread spent on a processor, so that a busy machine does not fail the test.
fn cpu_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?))
}

fn bounded(rule: &'static str, name: &'static str, sector: fn(u64) -> [u8; SECTOR]) -> Row {
    special(rule, name, &[Code::LogNoSequence], move || {
        let ring = Ring::of(dynamic().with(|builder| builder.log_length = LOG_BYTES));
        let hostile = Hostile { file: ring.image.file, ring: MIB..MIB + u64::from(LOG_BYTES), sector };
        let (wall, cpu) = (Instant::now(), cpu_time());
        let error = OpenOptions::new().open(Arc::new(hostile), None).unwrap_err();
        let spent = cpu_time().zip(cpu).map_or_else(|| wall.elapsed(), |(after, before)| after - before);
        assert_eq!(error.kind(), Corrupt, "{error}");
        assert!(spent < LIMIT, "took {spent:?}");
        vec![error.code().unwrap()]
    })
}

fn one_sector(entry: &LogEntrySpec, own_offset: u32) -> [u8; SECTOR] {
    entry.encode(own_offset)[..SECTOR].try_into().unwrap()
}

fn empty(sequence: u64) -> LogEntrySpec {
    LogEntrySpec::new(guid(), sequence, 7 * MIB)
}

fn claims_all(number: u64) -> [u8; SECTOR] {
    let entry = empty(number + 1).with(|entry| entry.patches.push((8, LOG_BYTES.to_le_bytes().to_vec())));
    one_sector(&entry, number as u32 * 4096)
}

/// Sound descriptors fill the sector of each entry, and would fill all others too.
fn claims_descriptors(number: u64) -> [u8; SECTOR] {
    let mut sector = claims_all(number);
    let count = 126 + (SECTORS as u32 - 1) * 128;
    sector[24..28].copy_from_slice(&count.to_le_bytes());
    for descriptor in sector[64..].chunks_mut(32) {
        descriptor[..4].copy_from_slice(b"zero");
        descriptor[24..32].copy_from_slice(&(number + 1).to_le_bytes());
    }
    sector
}

/// A well-formed entry with as many data sectors as fit, whose checksum is wrong.
fn wrong_checksum(number: u64) -> [u8; SECTOR] {
    // 508 descriptor sectors describe 65,022 data sectors; 6 sectors are left over.
    const DESCRIPTORS: u64 = 126 + 507 * 128;
    let mut sector = [0; SECTOR];
    let descriptor = |bytes: &mut [u8]| {
        bytes[..4].copy_from_slice(b"desc");
        bytes[16..24].copy_from_slice(&(4 * MIB).to_le_bytes());
        bytes[24..32].copy_from_slice(&5_u64.to_le_bytes());
    };
    match number {
        0 => {
            let length = (508 + DESCRIPTORS) as u32 * 4096;
            let entry = empty(5).with(|entry| {
                entry.checksum = Checksum::Value(0);
                entry.patches.push((8, length.to_le_bytes().to_vec()));
                entry.descriptor_count = Some(DESCRIPTORS as u32);
            });
            sector = one_sector(&entry, 0);
            sector[64..].chunks_mut(32).for_each(descriptor);
        }
        1..508 => sector.chunks_mut(32).for_each(descriptor),
        _ => {
            sector[..4].copy_from_slice(b"data");
            sector[4092..].copy_from_slice(&5_u32.to_le_bytes());
        }
    }
    sector
}

/// The entries are one run up to the last sector, which holds none; the last entry's tail leads there.
fn bad_tail(number: u64) -> [u8; SECTOR] {
    if number == SECTORS - 1 {
        return [0; SECTOR];
    }
    let tail = if number == SECTORS - 2 { LOG_BYTES - 4096 } else { 0 };
    one_sector(&empty(number + 10).tail(tail), number as u32 * 4096)
}

fn bad_tails(number: u64) -> [u8; SECTOR] {
    let tail = ((number + 1) % SECTORS) as u32 * 4096;
    one_sector(&empty(7).tail(tail), number as u32 * 4096)
}
