//! What the tools of strangers say is free in a file system, in bytes.

use std::ops::Range;
use std::path::Path;

use crate::disks::{Kind, text, tool};

/// The free ranges, in order and joined.
pub(crate) fn free(kind: Kind, raw: &Path) -> Vec<Range<u64>> {
    match kind {
        Kind::Ext(_) => ext(raw),
        Kind::Xfs(_) => xfs(raw),
        Kind::Ntfs(_) => ntfs(raw),
        Kind::Fat32 => fat32(raw),
        Kind::ExFat => exfat(raw),
    }
}

fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

/// The clusters whose bit is clear.
fn clear(bitmap: &[u8], clusters: u64, start: u64, cluster: u64) -> (u64, Vec<Range<u64>>) {
    let is_free = |number: &u64| bitmap[(number / 8) as usize] >> (number % 8) & 1 == 0;
    let free: Vec<u64> = (0..clusters).filter(is_free).collect();
    let count = free.len() as u64;
    let ranges = free.into_iter().map(|number| start + number * cluster..start + (number + 1) * cluster);
    (count, joined(ranges.collect()))
}

/// The number behind a word at the beginning of a line.
fn value(said: &str, name: &str) -> Option<u64> {
    let line = said.lines().find_map(|line| line.trim().strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn ext(raw: &Path) -> Vec<Range<u64>> {
    let said = tool("dumpe2fs", &[text(raw)]);
    let block = value(&said, "Block size:").unwrap();
    let blocks = value(&said, "Block count:").unwrap();
    let cluster = value(&said, "Cluster size:").map_or(1, |size| size / block);
    let lists = said.lines().filter_map(|line| line.strip_prefix("  Free blocks: "));
    let ranges = lists.flat_map(|list| list.split(", ")).filter(|range| !range.is_empty()).map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        // With bigalloc the first block of each cluster is named.
        first * block..(last + cluster).min(blocks) * block
    });
    let ranges = joined(ranges.collect());
    let total: u64 = ranges.iter().map(|range| (range.end - range.start) / block).sum();
    assert_eq!(Some(total), value(&said, "Free blocks:"));
    ranges
}

fn xfs(raw: &Path) -> Vec<Range<u64>> {
    let field = |name: &str| -> u64 {
        let said = tool("xfs_db", &["-r", "-c", "sb 0", "-c", &format!("print {name}"), text(raw)]);
        said.trim().rsplit(' ').next().unwrap().parse().unwrap()
    };
    let (block, group) = (field("blocksize"), field("agblocks"));
    let said = tool("xfs_db", &["-r", "-c", "freesp -d", text(raw)]);
    let rows = said.lines().skip(1).take_while(|line| !line.contains("from"));
    let ranges = rows.map(|line| {
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let start = numbers[0] * group + numbers[1];
        start * block..(start + numbers[2]) * block
    });
    let ranges: Vec<Range<u64>> = ranges.collect();
    // xfs_db also lists the blocks that are kept for the trees: those of the AGFL, which is a ring.
    let mut kept = Vec::new();
    for number in 0..field("agcount") {
        let (agf, agfl) = (format!("agf {number}"), format!("agfl {number}"));
        let fields = ["-r", "-c", &agf, "-c", "print flfirst flcount", "-c", &agfl, "-c", "print bno", text(raw)];
        let said = tool("xfs_db", &fields);
        let (first, count) = (value(&said, "flfirst =").unwrap(), value(&said, "flcount =").unwrap());
        let (_, list) = said.split_once("bno[").unwrap().1.split_once(" = ").unwrap();
        let places: Vec<&str> = list.split_whitespace().filter_map(|word| Some(word.split_once(':')?.1)).collect();
        for index in 0..count {
            let place = places[(first + index) as usize % places.len()];
            let start = number * group + place.parse::<u64>().unwrap();
            kept.push(start * block..(start + 1) * block);
        }
    }
    outside(&joined(ranges), &joined(kept))
}

/// What of the first does not lie in the second; both in order and joined.
fn outside(ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    for range in ranges {
        let mut position = range.start;
        for other in others.iter().filter(|other| other.end > range.start && other.start < range.end) {
            rest.push(position..other.start.max(position));
            position = other.end.max(position);
        }
        rest.push(position..range.end.max(position));
    }
    rest.retain(|range| range.start < range.end);
    rest
}

fn ntfs(raw: &Path) -> Vec<Range<u64>> {
    let said = tool("ntfsinfo", &["-m", text(raw)]);
    let (cluster, clusters) =
        (value(&said, "Cluster Size:").unwrap(), value(&said, "Volume Size in Clusters:").unwrap());
    let bitmap = vhdkit_testkit::foreign::run_tool("ntfscat", &[text(raw), "$Bitmap"]);
    assert!(bitmap.status.success());
    let (count, ranges) = clear(&bitmap.stdout, clusters, 0, cluster);
    assert_eq!(Some(count), value(&said, "Free Clusters:"));
    ranges
}

fn number(bytes: &[u8], offset: usize, count: usize) -> u64 {
    bytes[offset..offset + count].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A plain reading of the first table, and the count of fsck.fat.
fn fat32(raw: &Path) -> Vec<Range<u64>> {
    let bytes = std::fs::read(raw).unwrap();
    let sector = number(&bytes, 11, 2);
    let cluster = sector * number(&bytes, 13, 1);
    let (reserved, tables, table) = (number(&bytes, 14, 2), number(&bytes, 16, 1), number(&bytes, 36, 4));
    let data = (reserved + tables * table) * sector;
    let clusters = (number(&bytes, 32, 4) * sector - data) / cluster;
    let entry = |index: u64| number(&bytes, (reserved * sector + (index + 2) * 4) as usize, 4) & 0x0fff_ffff;
    let free: Vec<u64> = (0..clusters).filter(|index| entry(*index) == 0).collect();
    // fsck.fat ends with: "image: 26 files, 431/2010 clusters"
    let said = tool("fsck.fat", &["-n", text(raw)]);
    assert!(said.trim_end().ends_with(&format!("{}/{clusters} clusters", clusters - free.len() as u64)), "{said}");
    joined(free.into_iter().map(|index| data + index * cluster..data + (index + 1) * cluster).collect())
}

/// A plain reading of the bitmap, which mkfs.exfat puts first, and the count of dump.exfat.
fn exfat(raw: &Path) -> Vec<Range<u64>> {
    let said = tool("dump.exfat", &[text(raw)]);
    let number = |name: &str| value(&said, name).expect(name);
    assert_eq!(number("Bitmap start cluster:"), 2);
    let bytes = std::fs::read(raw).unwrap();
    let (heap, cluster) = (number("Cluster Heap Offset (sector offset):") * 512, number("Cluster size:"));
    let (count, ranges) = clear(&bytes[heap as usize..], number("Cluster Count:"), heap, cluster);
    assert_eq!(count, number("Free Clusters:"));
    ranges
}
