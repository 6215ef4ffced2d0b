//! V-140 to V-150: the parent locator.

use vhdkit::error::ErrorKind::{Corrupt, ParentMismatch, Unsupported};
use vhdkit::format::finding::Code;
use vhdkit_testkit::spec::{ITEM_IS_REQUIRED, ItemSpec, LocatorPair, LocatorSpec};
use vhdkit_testkit::{Guid, ImageBuilder};

use crate::table::{Expect, Made, Row, accepted, child_of, differencing, parent, parent_builder, refused, row, warned};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = header();
    rows.extend(ranges());
    rows.extend(text());
    rows.extend(linkage());
    rows.extend(paths());
    rows
}

/// What the parent is known by.
fn identity() -> Guid {
    parent_builder().build().data_write_guid
}

/// A child whose locator is changed.
fn with_locator(change: impl FnOnce(LocatorSpec) -> LocatorSpec) -> ImageBuilder {
    let child = differencing();
    let locator = child.locator.clone().unwrap();
    child.with(|child| child.locator = Some(change(locator)))
}

/// A child whose locator item holds these bytes.
fn with_bytes(bytes: &[u8]) -> ImageBuilder {
    differencing().with(|child| {
        child.metadata.remove(Guid::PARENT_LOCATOR);
        child.metadata.entries.push(ItemSpec::new(Guid::PARENT_LOCATOR, ITEM_IS_REQUIRED, bytes));
    })
}

/// A child whose locator has one more pair.
fn with_pair(change: impl FnOnce(&mut LocatorPair)) -> ImageBuilder {
    with_locator(|mut locator| {
        let mut pair = LocatorPair::new("extra_key", "extra value");
        change(&mut pair);
        locator.pairs.push(pair);
        locator
    })
}

fn header() -> Vec<Row> {
    let mut rows = Vec::new();
    for length in [0, 1, 19] {
        rows.push(row(
            "V-140",
            format!("{length} bytes"),
            move || with_bytes(&vec![0; length]),
            refused(Corrupt, Code::LocatorLength),
        ));
    }
    for (name, guid) in [("zero", Guid::ZERO), ("another", Guid::seeded(5)), ("that of the BAT", Guid::BAT)] {
        rows.push(row(
            "V-141",
            format!("{name} type"),
            move || {
                with_locator(|mut locator| {
                    locator.locator_type = guid;
                    locator
                })
            },
            refused(Unsupported, Code::LocatorType),
        ));
    }
    for value in [1, u16::MAX] {
        rows.push(row(
            "V-142",
            format!("{value}"),
            move || {
                with_locator(|mut locator| {
                    locator.reserved = value;
                    locator
                })
            },
            warned(Code::LocatorReserved),
        ));
    }
    // Header, two entries, and text for 14 more: 20 + 12 * 16 bytes are there and a few more.
    for count in [u16::MAX, 40, 1000] {
        rows.push(row(
            "V-143",
            format!("{count} pairs"),
            move || {
                with_locator(|mut locator| {
                    locator.count_override = Some(count);
                    locator
                })
            },
            refused(Corrupt, Code::LocatorCount),
        ));
    }
    rows.push(row(
        "V-143",
        "one pair in 31 bytes",
        || {
            let mut bytes = LocatorSpec::default().encode();
            bytes[18] = 1;
            bytes.resize(31, 0);
            with_bytes(&bytes)
        },
        refused(Corrupt, Code::LocatorCount),
    ));
    rows.push(row("V-143", "no pair", || with_locator(|locator| LocatorSpec { pairs: Vec::new(), ..locator }), {
        refused(Corrupt, Code::LocatorLinkage).also(&[Code::LocatorNoPath])
    }));
    rows
}

fn ranges() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut refuse = |name: &'static str, change: fn(&mut LocatorPair)| {
        rows.push(row("V-144", name, move || with_pair(change), refused(Corrupt, Code::LocatorRange)));
    };
    refuse("key at 0", |pair| pair.key_offset = Some(0));
    refuse("value at 0", |pair| pair.value_offset = Some(0));
    refuse("no key", |pair| pair.key_length = Some(0));
    refuse("no value", |pair| pair.value_length = Some(0));
    refuse("key of three bytes", |pair| pair.key_length = Some(3));
    refuse("value of one byte", |pair| pair.value_length = Some(1));
    refuse("value of 65534 bytes", |pair| pair.value_length = Some(65_534));
    refuse("key at 2^32 - 1", |pair| pair.key_offset = Some(u32::MAX));
    refuse("value at 2^32 - 16", |pair| pair.value_offset = Some(u32::MAX - 15));
    refuse("key in the next item", |pair| pair.key_offset = Some(2000));
    refuse("twelve zero bytes", |pair| pair.raw = Some([0; 12]));
    let item_end = |past: u32| {
        let child = differencing();
        let bytes = child.locator.clone().unwrap().pair("extra_key", "ab").encode();
        let end = bytes.len() as u32;
        with_locator(|mut locator| {
            let pair = LocatorPair { value_offset: Some(end - 4 + past), ..LocatorPair::new("extra_key", "ab") };
            locator.pairs.push(pair);
            locator
        })
    };
    rows.push(row("V-144", "a value that ends with the item", move || item_end(0), accepted()));
    rows.push(row(
        "V-144",
        "a value that ends one byte behind the item",
        move || item_end(1),
        refused(Corrupt, Code::LocatorRange),
    ));
    rows.push(row(
        "V-144",
        "two keys share one value",
        || with_pair(|pair| (pair.value_offset, pair.value_length) = (Some(56), Some(28))),
        accepted(),
    ));
    rows
}

fn text() -> Vec<Row> {
    let mut rows = Vec::new();
    let broken: [(&str, &[u16]); 5] = [
        ("lone high surrogate", &[0x61, 0xD800, 0x62]),
        ("lone low surrogate", &[0xDC00]),
        ("NUL inside", &[0x61, 0, 0x62]),
        ("NUL at the end", &[0x61, 0]),
        ("only NUL", &[0]),
    ];
    for (name, units) in broken {
        rows.push(row(
            "V-145",
            format!("{name} of a key"),
            move || with_pair(|pair| pair.key = units.to_vec()),
            refused(Corrupt, Code::LocatorText),
        ));
        rows.push(row(
            "V-145",
            format!("{name} of a value"),
            move || with_pair(|pair| pair.value = units.to_vec()),
            refused(Corrupt, Code::LocatorText),
        ));
    }
    let twice = |key: &'static str, value: &'static str| with_locator(|locator| locator.pair(key, value));
    let duplicate = || refused(Corrupt, Code::LocatorDuplicate);
    rows.push(row("V-146", "the relative path twice", move || twice("relative_path", "elsewhere.vhdx"), duplicate()));
    rows.push(row("V-146", "the same path twice", move || twice("relative_path", ".\\parent.vhdx"), duplicate()));
    rows.push(row(
        "V-146",
        "an unknown key twice",
        || with_locator(|locator| locator.pair("unknown", "a").pair("unknown", "b")),
        duplicate(),
    ));
    rows.push(row("V-146", "keys that differ in case", move || twice("Relative_Path", "elsewhere.vhdx"), accepted()));
    rows.push(row(
        "V-147",
        "unknown keys around the known ones",
        || {
            with_locator(|locator| {
                let mut pairs = vec![LocatorPair::new("parent_linkage3", "{junk"), LocatorPair::new("x", "\u{1F600}")];
                pairs.extend(locator.pairs.clone());
                pairs.push(LocatorPair::new("absolute_path", "\\\\server\\share"));
                LocatorSpec { pairs, ..locator }
            })
        },
        accepted(),
    ));
    rows
}

fn linkage() -> Vec<Row> {
    let mut rows = Vec::new();
    let linkage =
        |text: String| with_locator(|locator| locator.without("parent_linkage").pair("parent_linkage", &text));
    rows.push(row(
        "V-148",
        "missing",
        || with_locator(|locator| locator.without("parent_linkage")),
        refused(Corrupt, Code::LocatorLinkage),
    ));
    rows.push(row(
        "V-148",
        "missing, although the second one is there",
        || {
            let second = identity().braced();
            with_locator(|locator| locator.without("parent_linkage").pair("parent_linkage2", &second))
        },
        refused(Corrupt, Code::LocatorLinkage),
    ));
    for text in ["parent.vhdx", "{2dc27766-f623-4200-9d64-115e9bfd4a0}", "2dc27766f62342009d64115e9bfd4a08", "{", "{}"]
    {
        rows.push(row(
            "V-148",
            format!("\"{text}\""),
            move || linkage(text.to_owned()),
            refused(Corrupt, Code::LocatorLinkage),
        ));
    }
    rows.push(row("V-148", "in upper case", move || linkage(identity().braced().to_uppercase()), accepted()));
    rows.push(row("V-148", "without braces", move || linkage(identity().to_string()), accepted()));
    let second = |first: Guid, second: String| {
        with_locator(|locator| {
            let locator = locator.without("parent_linkage").pair("parent_linkage2", &second);
            locator.pair("parent_linkage", &first.braced())
        })
    };
    rows.push(row(
        "V-149",
        "not a GUID",
        move || second(identity(), "none".to_owned()),
        refused(Corrupt, Code::LocatorLinkage2),
    ));
    rows.push(row(
        "V-149",
        "the parent has the second identity",
        move || second(Guid::seeded(99), identity().braced()),
        accepted(),
    ));
    rows.push(row(
        "V-149",
        "the parent has the first identity",
        move || second(identity(), Guid::seeded(99).braced()),
        accepted(),
    ));
    rows.push(row("V-149", "all zero means none", move || second(identity(), Guid::ZERO.braced()), accepted()));
    rows.push(row(
        "V-149",
        "all zero means none, also when the parent's identity is all zero",
        || {
            let parent = parent_builder().both_headers(|header| header.data_write_guid = Guid::ZERO).build();
            let parent = std::sync::Arc::new(parent);
            let locator = LocatorSpec::new(Guid::seeded(99), ".\\parent.vhdx");
            child_of(&parent).locator(locator.pair("parent_linkage2", &Guid::ZERO.braced()))
        },
        Expect::parent(ParentMismatch, Some(Code::ParentMismatch)),
    ));
    rows
}

fn paths() -> Vec<Row> {
    let without_path = || with_locator(|locator| locator.without("relative_path"));
    vec![
        row("V-150", "no path", without_path, refused(Corrupt, Code::LocatorNoPath)),
        row(
            "V-150",
            "no path, but the parent is named",
            move || Made::new(without_path()).name_parent("parent.vhdx"),
            named_without_path(),
        ),
        row(
            "V-150",
            "a path under another name only",
            || with_locator(|locator| locator.without("relative_path").pair("RELATIVE_PATH", "parent.vhdx")),
            refused(Corrupt, Code::LocatorNoPath),
        ),
        row("V-150", "a relative path", || child_of(&parent()), accepted()),
    ]
}

/// Opening goes on with the named parent; check looks at one layer, and says that it has no path.
fn named_without_path() -> Expect {
    let mut expect = refused(Corrupt, Code::LocatorNoPath);
    for level in &mut expect.levels {
        (level.read, level.page, level.write) = (crate::table::Accept, crate::table::Accept, crate::table::Accept);
    }
    expect.named = true;
    expect
}
