//! V-080 to V-107: the metadata region.

use vhdkit::error::ErrorKind::{Corrupt, Unsupported};
use vhdkit::format::finding::Code;
use vhdkit::format::metadata::DiskType;
use vhdkit::image::BlockDevice;
use vhdkit_testkit::spec::{
    ITEM_IS_REQUIRED as REQUIRED, ITEM_IS_USER as USER, ITEM_IS_VIRTUAL_DISK as VIRTUAL_DISK, ItemSpec, LocatorSpec,
    MetadataSpec,
};
use vhdkit_testkit::{BlockSpec, Content, Guid, ImageBuilder};

use crate::table::{
    ERROR, Expect, MIB, Made, NOTE, Row, WARNING, accepted, differencing, dynamic, noted, refused, row, warned,
};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = table();
    rows.extend(places());
    rows.extend(overlaps());
    rows.extend(unknown());
    rows.extend(missing());
    rows.extend(file_parameters());
    rows.extend(sizes());
    rows.extend(flags());
    rows
}

fn changed(change: impl FnOnce(&mut MetadataSpec)) -> ImageBuilder {
    dynamic().with(|builder| change(&mut builder.metadata))
}

/// An item that nobody knows.
fn stranger(number: u64, flags: u32, data: &[u8]) -> ItemSpec {
    ItemSpec::new(Guid::seeded(0x7374_7261 + number), flags, data)
}

/// Refused, unless judged leniently.
fn reserved(code: Code) -> Expect {
    Expect::graded(Corrupt, code, [WARNING, ERROR, ERROR])
}

fn table() -> Vec<Row> {
    let count = |count: u16| changed(|metadata| metadata.count_override = Some(count));
    let mut rows = vec![
        row(
            "V-080",
            "one wrong letter",
            || changed(|metadata| metadata.signature = *b"metadatA"),
            refused(Corrupt, Code::MetadataSignature),
        ),
        row(
            "V-080",
            "zeros",
            || changed(|metadata| metadata.signature = [0; 8]),
            refused(Corrupt, Code::MetadataSignature),
        ),
        row("V-081", "2048 entries", move || count(2048), refused(Corrupt, Code::MetadataCount)),
        row("V-081", "65535 entries", move || count(u16::MAX), refused(Corrupt, Code::MetadataCount)),
        row(
            "V-081",
            "2047 entries, of which 1023 are the system's",
            || {
                changed(|metadata| {
                    metadata.entries.extend((0..1018).map(|number| stranger(number, 0, &[])));
                    metadata.entries.extend((0..1024).map(|number| stranger(number, USER, &[])));
                })
            },
            noted(Code::MetadataUnknown),
        ),
        row(
            "V-082",
            "first reserved field",
            || changed(|metadata| metadata.reserved = 1),
            reserved(Code::MetadataReserved),
        ),
        row(
            "V-082",
            "last byte of the second reserved field",
            || changed(|metadata| metadata.reserved2[19] = 0x80),
            reserved(Code::MetadataReserved),
        ),
        row(
            "V-083",
            "reserved field of an entry",
            || changed(|metadata| metadata.item(Guid::VIRTUAL_DISK_SIZE).reserved = 1),
            reserved(Code::MetadataEntryReserved),
        ),
    ];
    for bit in [3, 17, 31] {
        rows.push(row(
            "V-083",
            format!("flag bit {bit}"),
            move || changed(|metadata| metadata.item(Guid::FILE_PARAMETERS).flags |= 1 << bit),
            reserved(Code::MetadataEntryReserved),
        ));
    }
    rows.extend(duplicates());
    rows
}

fn duplicates() -> Vec<Row> {
    let mut rows = Vec::new();
    let twice = |item: ItemSpec| changed(|metadata| metadata.entries.extend([item.clone(), item]));
    rows.push(row(
        "V-084",
        "the file parameters twice",
        || changed(|metadata| metadata.entries.push(ItemSpec::known(Guid::FILE_PARAMETERS, REQUIRED))),
        refused(Corrupt, Code::MetadataDuplicate),
    ));
    for flags in [0, USER] {
        rows.push(row(
            "V-084",
            format!("an unknown item twice, with flags {flags}"),
            move || twice(stranger(1, flags, b"twice")),
            refused(Corrupt, Code::MetadataDuplicate).also(&[Code::MetadataUnknown]),
        ));
    }
    rows.push(row(
        "V-084",
        "user items with the identities of the system's, before them, are something else",
        || {
            changed(|metadata| {
                let impostors = metadata.entries.clone().into_iter().map(|item| {
                    let data = vec![0xFF; if item.guid == Guid::FILE_PARAMETERS { 8 } else { 16 }];
                    ItemSpec::new(item.guid, USER, &data)
                });
                metadata.entries = impostors.collect::<Vec<_>>().into_iter().chain(metadata.entries.clone()).collect();
            })
        },
        noted(Code::MetadataUnknown),
    ));
    rows
}

fn places() -> Vec<Row> {
    let long = |length: usize| {
        changed(|metadata| metadata.entries.push(stranger(1, 0, &vec![7; length])))
            .with(|builder| builder.metadata_length = 3 << 20)
    };
    let at = |offset: u32, length: u32| {
        changed(|metadata| {
            let item = stranger(1, 0, &[]);
            metadata.entries.push(ItemSpec { offset: Some(offset), length: Some(length), ..item });
        })
    };
    let mut rows = vec![
        row("V-085", "1 MiB", move || long(1 << 20), noted(Code::MetadataUnknown)),
        row("V-085", "1 MiB and one byte", move || long((1 << 20) + 1), refused(Corrupt, Code::MetadataItemLength)),
        row("V-085", "2^32 - 1 bytes", move || at(65_536, u32::MAX), refused(Corrupt, Code::MetadataItemLength)),
        row(
            "V-085",
            "virtual disk size of 4 GiB",
            || changed(|metadata| metadata.item(Guid::VIRTUAL_DISK_SIZE).length = Some(u32::MAX)),
            refused(Corrupt, Code::MetadataItemLength).also(&[Code::MetadataMissing]),
        ),
        row("V-086", "empty at 64 KiB", move || at(65_536, 0), refused(Corrupt, Code::MetadataEmptyOffset)),
        row("V-086", "empty at 1", move || at(1, 0), refused(Corrupt, Code::MetadataEmptyOffset)),
        row("V-086", "empty at 0", move || at(0, 0), noted(Code::MetadataUnknown)),
        row("V-087", "ends with the region", move || at((1 << 20) - 16, 16), noted(Code::MetadataUnknown)),
        row(
            "V-087",
            "the virtual disk size inside the table",
            || changed(|metadata| metadata.item(Guid::VIRTUAL_DISK_SIZE).offset = Some(512)),
            refused(Corrupt, Code::MetadataItemOutside).also(&[Code::MetadataMissing]),
        ),
    ];
    for (offset, length) in
        [(0, 8), (65_535, 8), ((1 << 20) - 15, 16), (1 << 20, 1), (u32::MAX - 15, 32), (u32::MAX, 1 << 20)]
    {
        rows.push(row(
            "V-087",
            format!("{length:#x} bytes at {offset:#x}"),
            move || at(offset, length),
            refused(Corrupt, Code::MetadataItemOutside),
        ));
    }
    rows
}

fn overlaps() -> Vec<Row> {
    let pair = |first: (u32, u32), second: (u32, u32)| {
        changed(|metadata| {
            for (number, (offset, length)) in [(1, first), (2, second)] {
                let item = stranger(number, 0, &[]);
                metadata.entries.push(ItemSpec { offset: Some(offset), length: Some(length), ..item });
            }
        })
    };
    let overlap = || refused(Corrupt, Code::MetadataOverlap).also(&[Code::MetadataUnknown]);
    vec![
        row("V-088", "the same place", move || pair((70_000, 10), (70_000, 10)), overlap()),
        row("V-088", "one byte", move || pair((70_000, 10), (70_009, 10)), overlap()),
        row("V-088", "one inside the other", move || pair((70_004, 2), (70_000, 100)), overlap()),
        row("V-088", "side by side", move || pair((70_000, 10), (70_010, 10)), noted(Code::MetadataUnknown)),
        row(
            "V-088",
            "an unknown item over the file parameters",
            move || {
                changed(|metadata| {
                    let item = stranger(1, 0, &[]);
                    metadata.entries.push(ItemSpec { offset: Some(65_536), length: Some(8), ..item });
                })
            },
            overlap(),
        ),
    ]
}

fn unknown() -> Vec<Row> {
    let users =
        |count: u64| changed(|metadata| metadata.entries.extend((0..count).map(|number| stranger(number, USER, &[]))));
    let added = |item: ItemSpec| dynamic().item(item);
    let required = || refused(Unsupported, Code::MetadataUnknownRequired);
    let mut rows = vec![
        row("V-089", "1024 user items", move || users(1024), noted(Code::MetadataUnknown)),
        row(
            "V-089",
            "1025 user items",
            move || users(1025),
            refused(Corrupt, Code::MetadataUserCount).also(&[Code::MetadataUnknown]),
        ),
        row("V-090", "the system's", move || added(stranger(1, REQUIRED, b"x")), required()),
        row("V-090", "a user's", move || added(stranger(1, REQUIRED | USER, b"x")), required()),
        row(
            "V-090",
            "a user's with the identity of the file parameters",
            move || added(ItemSpec::new(Guid::FILE_PARAMETERS, REQUIRED | USER, &[0; 8])),
            required(),
        ),
        row(
            "V-090",
            "CHS parameters",
            move || added(ItemSpec::new(Guid::CHS_PARAMETERS, REQUIRED, &[1; 8])),
            required(),
        ),
        row(
            "V-092",
            "never finished",
            move || added(ItemSpec::new(Guid::INCOMPLETE_FILE, REQUIRED, &[])),
            refused(Unsupported, Code::IncompleteFile),
        ),
        row(
            "V-092",
            "never finished, not required",
            move || added(ItemSpec::new(Guid::INCOMPLETE_FILE, 0, &[])),
            refused(Unsupported, Code::IncompleteFile),
        ),
    ];
    let optional = [
        ("the system's", stranger(1, 0, b"optional")),
        ("the virtual disk's", stranger(1, VIRTUAL_DISK, b"optional")),
        ("a user's", stranger(1, USER, b"optional")),
        ("empty", stranger(1, 0, &[])),
        ("CHS parameters", ItemSpec::new(Guid::CHS_PARAMETERS, VIRTUAL_DISK, &[1; 8])),
        ("persistent memory labels", ItemSpec::new(Guid::PMEM_LABELS, 0, &[1; 100])),
        ("a user's with the identity of the incomplete mark", ItemSpec::new(Guid::INCOMPLETE_FILE, USER, &[])),
        ("a user's with the identity of the parent locator", ItemSpec::new(Guid::PARENT_LOCATOR, USER, b"junk")),
    ];
    for (name, item) in optional {
        rows.push(row(
            "V-091",
            name,
            move || {
                let guid = item.guid;
                Made::new(added(item.clone())).verify(move |image| {
                    let items = &image.layers()[0].metadata().items;
                    assert!(items.iter().any(|item| item.id.stored() == guid.0), "it is kept");
                })
            },
            noted(Code::MetadataUnknown),
        ));
    }
    rows
}

fn missing() -> Vec<Row> {
    let mut rows = Vec::new();
    let known = [
        ("file parameters", Guid::FILE_PARAMETERS),
        ("virtual disk size", Guid::VIRTUAL_DISK_SIZE),
        ("logical sector size", Guid::LOGICAL_SECTOR_SIZE),
        ("physical sector size", Guid::PHYSICAL_SECTOR_SIZE),
        ("virtual disk ID", Guid::VIRTUAL_DISK_ID),
    ];
    for (name, guid) in known {
        rows.push(row(
            "V-093",
            format!("no {name}"),
            move || changed(|metadata| metadata.remove(guid)),
            refused(Corrupt, Code::MetadataMissing),
        ));
        rows.push(row(
            "V-093",
            format!("{name} as an item of the user"),
            move || changed(|metadata| metadata.item(guid).flags = USER | VIRTUAL_DISK),
            refused(Corrupt, Code::MetadataMissing).also(&[Code::MetadataUnknown]),
        ));
    }
    rows
}

/// An image whose item has these bytes.
fn with_item(guid: Guid, data: &[u8]) -> ImageBuilder {
    changed(|metadata| metadata.item(guid).data = Some(data.to_vec()))
}

fn file_parameters() -> Vec<Row> {
    let mut rows = Vec::new();
    for length in [0, 4, 7, 9, 16] {
        rows.push(row(
            "V-094",
            format!("{length} bytes"),
            move || with_item(Guid::FILE_PARAMETERS, &vec![0; length]),
            refused(Corrupt, Code::FileParametersLength),
        ));
    }
    let sizes = [
        ("0", 0),
        ("512 KiB", 512 << 10),
        ("1 MiB and one byte", (1 << 20) + 1),
        ("3 MiB", 3 << 20),
        ("512 MiB", 512 << 20),
        ("2 GiB", 2 << 30),
        ("2^32 - 1", u32::MAX),
    ];
    for (name, size) in sizes {
        rows.push(row(
            "V-095",
            name,
            move || with_item(Guid::FILE_PARAMETERS, &[size.to_le_bytes(), [0; 4]].concat()),
            refused(Corrupt, Code::BlockSize),
        ));
    }
    for size in [1 << 20, 2 << 20, 32 << 20, 256 << 20] {
        rows.push(row(
            "V-095",
            format!("{} MiB", size >> 20),
            move || {
                let content = Content::Sparse { seed: 4, stride: 4096 };
                ImageBuilder::new(8 * MIB, size).block(0, BlockSpec::present(content))
            },
            accepted(),
        ));
    }
    for bits in [4, 1 << 31, 0xFFFF_FFFC] {
        rows.push(row(
            "V-096",
            format!("{bits:#x}"),
            move || dynamic().with(|builder| builder.file_parameter_bits = bits),
            reserved(Code::FileParametersReserved),
        ));
    }
    rows.push(row(
        "V-097",
        "both flags: differencing",
        || {
            let made = Made::new(differencing().with(|builder| builder.leave_blocks_allocated = true));
            made.verify(|image| assert_eq!(image.disk_type(), DiskType::Differencing))
        },
        accepted(),
    ));
    rows.push(row(
        "V-097",
        "blocks left allocated: fixed, although most are not",
        || {
            let made = Made::new(dynamic().with(|builder| builder.leave_blocks_allocated = true));
            made.verify(|image| assert_eq!(image.disk_type(), DiskType::Fixed))
        },
        accepted(),
    ));
    rows
}

fn sizes() -> Vec<Row> {
    let mut rows = Vec::new();
    let size = |size: u64| with_item(Guid::VIRTUAL_DISK_SIZE, &size.to_le_bytes());
    for length in [0, 4, 7, 9] {
        rows.push(row(
            "V-098",
            format!("{length} bytes"),
            move || with_item(Guid::VIRTUAL_DISK_SIZE, &vec![0; length]),
            refused(Corrupt, Code::DiskSize),
        ));
    }
    for bytes in [(64 << 40) + 512, 64 << 41, u64::MAX - 511, u64::MAX] {
        rows.push(row("V-098", format!("{bytes:#x}"), move || size(bytes), refused(Corrupt, Code::DiskSize)));
    }
    for bytes in [8 * MIB + 1, 8 * MIB + 256, 8 * MIB + 513, 511] {
        rows.push(row(
            "V-099",
            format!("{bytes} in sectors of 512"),
            move || size(bytes),
            refused(Corrupt, Code::DiskSizeUnaligned),
        ));
    }
    for bytes in [8 * MIB + 512, 8 * MIB + 2048] {
        rows.push(row(
            "V-099",
            format!("{bytes} in sectors of 4096"),
            move || size(bytes).sector_sizes(4096, 4096),
            refused(Corrupt, Code::DiskSizeUnaligned),
        ));
    }
    rows.push(row("V-099", "one sector", || ImageBuilder::new(512, 1 << 20), accepted()));
    rows.push(row("V-100", "zero", move || size(0), refused(Corrupt, Code::DiskSizeZero)));
    for (rule, guid, code) in [
        ("V-101", Guid::LOGICAL_SECTOR_SIZE, Code::LogicalSectorSize),
        ("V-102", Guid::PHYSICAL_SECTOR_SIZE, Code::PhysicalSectorSize),
    ] {
        for value in [0_u32, 1, 256, 511, 513, 1024, 2048, 4097, 8192, 65_536, u32::MAX] {
            rows.push(row(
                rule,
                format!("{value}"),
                move || with_item(guid, &value.to_le_bytes()),
                refused(Corrupt, code),
            ));
        }
        for length in [0, 2, 8] {
            rows.push(row(
                rule,
                format!("{length} bytes"),
                move || with_item(guid, &vec![2; length]),
                refused(Corrupt, code),
            ));
        }
    }
    for (logical, physical) in [(512, 512), (512, 4096), (4096, 4096), (4096, 512)] {
        rows.push(row(
            "V-102",
            format!("{physical} under {logical}"),
            move || {
                let made = Made::new(dynamic().sector_sizes(logical, physical));
                made.verify(move |image| {
                    assert_eq!((image.logical_sector_size(), image.physical_sector_size()), (logical, physical));
                })
            },
            if physical < logical {
                Expect::graded(Corrupt, Code::SectorSizes, [NOTE, WARNING, WARNING])
            } else {
                accepted()
            },
        ));
    }
    rows
}

fn flags() -> Vec<Row> {
    let mut rows = Vec::new();
    for length in [0, 8, 15, 17] {
        rows.push(row(
            "V-103",
            format!("{length} bytes"),
            move || with_item(Guid::VIRTUAL_DISK_ID, &vec![1; length]),
            refused(Corrupt, Code::DiskIdLength),
        ));
    }
    for byte in [0, 0xFF] {
        rows.push(row(
            "V-103",
            format!("sixteen times {byte:#x}"),
            move || {
                let made = Made::new(with_item(Guid::VIRTUAL_DISK_ID, &[byte; 16]));
                made.verify(move |image| assert_eq!(image.disk_id().unwrap().stored(), [byte; 16]))
            },
            accepted(),
        ));
    }
    let flags = |guid: Guid, flags: u32| changed(|metadata| metadata.item(guid).flags = flags);
    let grades = || Expect::graded(Corrupt, Code::MetadataFlags, [NOTE, WARNING, WARNING]);
    for (guid, value) in [
        (Guid::FILE_PARAMETERS, 0),
        (Guid::FILE_PARAMETERS, VIRTUAL_DISK | REQUIRED),
        (Guid::VIRTUAL_DISK_SIZE, REQUIRED),
        (Guid::VIRTUAL_DISK_ID, VIRTUAL_DISK),
        (Guid::LOGICAL_SECTOR_SIZE, 0),
        (Guid::PHYSICAL_SECTOR_SIZE, REQUIRED),
    ] {
        rows.push(row("V-104", format!("{guid} with {value}"), move || flags(guid, value), grades()));
    }
    let without_locator = || differencing().with(|builder| builder.metadata.remove(Guid::PARENT_LOCATOR));
    rows.push(row("V-105", "no parent locator", without_locator, refused(Corrupt, Code::ParentLocatorMissing)));
    rows.push(row(
        "V-105",
        "a parent locator of the user's",
        move || differencing().with(|builder| builder.metadata.item(Guid::PARENT_LOCATOR).flags = USER),
        refused(Corrupt, Code::ParentLocatorMissing).also(&[Code::MetadataUnknown]),
    ));
    let locator = |data: Vec<u8>| dynamic().item(ItemSpec::new(Guid::PARENT_LOCATOR, REQUIRED, &data));
    let sound = LocatorSpec::new(Guid::seeded(2), ".\\parent.vhdx").encode();
    for (name, data) in [("sound", sound), ("junk", vec![0xFF; 40]), ("empty", Vec::new())] {
        rows.push(row("V-106", name, move || locator(data.clone()), warned(Code::ParentLocatorUnexpected)));
    }
    let region = |length: u32| dynamic().with(|builder| builder.metadata_length = length);
    rows.push(row("V-107", "128 MiB", move || region(128 << 20), accepted()));
    rows.push(row("V-107", "129 MiB", move || region(129 << 20), refused(Corrupt, Code::MetadataRegionSize)));
    rows.push(row("V-107", "2 GiB", move || region(2 << 30), refused(Corrupt, Code::MetadataRegionSize)));
    rows
}
