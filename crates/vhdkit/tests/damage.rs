//! Every kind of damage, and what repair and recovery make of it: the table of `docs/damage.md`, which may get better and
//! never worse.
//!
//! `cargo test -p vhdkit --test damage -- --ignored write_the_table` writes it again.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::ops::recover::{RecoverOptions, recover};
use vhdkit::ops::repair::{RepairOptions, apply, plan, restore};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::damage::{self, Damage};
use vhdkit_testkit::{BlockSpec, BuiltImage, Content, DirtyPlan, ImageBuilder, SectorMask, SparseFile};

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 72;
/// Bytes of a block that are compared at once.
const PIECE: usize = 16 << 10;

/// An image with the bytes of every block that holds data.
struct Shape {
    name: &'static str,
    image: BuiltImage,
    parent: Option<Image>,
    /// Number of the block, and its bytes.
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Shape {
    fn new(name: &'static str, image: BuiltImage) -> Self {
        let size = u64::from(image.model.block_size);
        let all =
            (0..image.model.virtual_size / size).map(|block| (block, image.model.read(block * size, size as usize)));
        let blocks = all.filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)).collect();
        let parent = image.parent.as_ref().map(|parent| OpenOptions::new().open(storage(&parent.file), None).unwrap());
        Self { name, image, parent, blocks }
    }
}

fn content(seed: u64) -> Content {
    Content::Sparse { seed, stride: 1024 }
}

/// Most blocks have data, in holes of one and of nine.
fn has_data(block: u64) -> bool {
    !block.is_multiple_of(7) && !(30..39).contains(&block)
}

fn dynamic() -> ImageBuilder {
    let blocks = (0..BLOCKS).filter(|block| has_data(*block));
    blocks.fold(ImageBuilder::new(BLOCKS * MIB, 1 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(content(block + 1)))
    })
}

fn shapes() -> Vec<Shape> {
    let fixed = (0..BLOCKS).fold(ImageBuilder::new(BLOCKS * MIB, 1 << 20), |builder, block| {
        builder.block(block, BlockSpec::present(content(block + 1)))
    });
    let parent = Arc::new(dynamic().named("parent.vhdx").build());
    let child = (0..BLOCKS).filter(|block| block % 3 == 0).fold(
        ImageBuilder::new(BLOCKS * MIB, 1 << 20).named("child.vhdx").differencing(&parent),
        |builder, block| match block % 2 {
            0 => builder.block(block, BlockSpec::present(content(block + 500))),
            _ => builder
                .block(block, BlockSpec::partial(content(block + 500), SectorMask::new(|sector| sector % 2048 < 1024))),
        },
    );
    let mut dirty = dynamic().build();
    DirtyPlan::new(7).move_bat(&dirty).move_metadata(&dirty).apply(&mut dirty);
    vec![
        Shape::new("dynamic", dynamic().build()),
        Shape::new("scattered", dynamic().scatter(3).build()),
        Shape::new("fixed", fixed.fixed().build()),
        Shape::new("4 KiB sectors", dynamic().sector_sizes(4096, 4096).build()),
        Shape::new("dirty log", dirty),
        Shape::new("differencing", child.build()),
    ]
}

fn storage(file: &SparseFile) -> Arc<dyn Storage> {
    let memory = MemoryStorage::with_len(file.len());
    for (offset, bytes) in file.segments() {
        memory.write_at(bytes, offset).unwrap();
    }
    Arc::new(memory)
}

/// Blocks of a disk that are what they were.
fn intact(shape: &Shape, disk: Option<&dyn BlockDevice>) -> u64 {
    let Some(disk) = disk else { return 0 };
    let size = u64::from(shape.image.model.block_size);
    let mut buffer = vec![0; PIECE];
    // The beginning, where there is data in the middle, and the end: blocks that are alike in these are the same block.
    let pieces = [0, size as usize / 2, size as usize - PIECE];
    let right = shape.blocks.iter().filter(|(block, bytes)| {
        pieces.iter().all(|piece| {
            let start = block * size + *piece as u64;
            let read = start + PIECE as u64 <= disk.size() && disk.read_at(&mut buffer, start).is_ok();
            read && buffer == bytes[*piece..*piece + PIECE]
        })
    });
    right.count() as u64
}

/// Opens with the parent of the shape.
fn open(shape: &Shape, file: &Arc<dyn Storage>) -> Option<Image> {
    let options = OpenOptions::new();
    match &shape.image.parent {
        Some(parent) => {
            let resolver = Arc::new(Parent(storage(&parent.file)));
            options.parents(resolver).open(Arc::clone(file), None).ok()
        }
        None => options.open(Arc::clone(file), None).ok(),
    }
}

/// Gives the one parent there is.
#[derive(Debug)]
struct Parent(Arc<dyn Storage>);

impl vhdkit::image::ParentResolver for Parent {
    fn resolve(
        &self,
        _wanted: &vhdkit::image::ParentRequest<'_>,
    ) -> vhdkit::Result<Vec<vhdkit::image::ParentCandidate>> {
        let storage = Arc::clone(&self.0);
        Ok(vec![vhdkit::image::ParentCandidate { storage, path: None, named: true, lock: None }])
    }
}

/// Data blocks whose bytes are all in the file still, wherever nothing says so.
fn there(shape: &Shape, file: &SparseFile) -> u64 {
    let whole = shape.blocks.iter().filter(|(block, _)| match shape.image.layout.payload.get(block) {
        Some(place) => file.len() >= place + u64::from(shape.image.model.block_size),
        None => true, // the parent's
    });
    whole.count() as u64
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    shape: &'static str,
    damage: String,
    there: u64,
    as_is: u64,
    repaired: u64,
    recovered: u64,
    mended: &'static str,
    verdict: &'static str,
}

fn judge(shape: &Shape, damage: &Damage) -> Row {
    let mut file = shape.image.file.clone();
    damage.apply(&mut file);
    let at = format!("{}, {}", shape.name, damage.name);
    let device = |image: &Option<Image>| intact(shape, image.as_ref().map(|image| image as &dyn BlockDevice));
    let damaged = storage(&file);
    let as_is = device(&open(shape, &damaged));
    let (mut mended, mut repaired) = ("refused", as_is);
    if let Ok(planned) = plan(&damaged, None, &RepairOptions::default(), &()) {
        mended = match (planned.changes_anything(), planned.mends_everything()) {
            (true, true) => "all",
            (true, false) => "some",
            (false, true) => "nothing to do",
            (false, false) => "nothing",
        };
        if planned.changes_anything() {
            let undo = MemoryStorage::new();
            apply(&damaged, &planned, &undo, &mut || Ok(()), &()).unwrap();
            repaired = device(&open(shape, &damaged));
            restore(damaged.as_ref(), &undo, &()).unwrap();
            assert_eq!(device(&open(shape, &damaged)), as_is, "{at}: not put back");
        }
    }
    assert!(repaired >= as_is, "{at}: repair made it worse: {repaired} of {as_is}");
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let parent = shape.parent.as_ref().map(|parent| parent as &dyn BlockDevice);
    let options = RecoverOptions { parent, ..RecoverOptions::default() };
    let (recovered, verdict) = match recover(&damaged, None, &target, &options, &()) {
        Ok(report) => {
            let blocks = device(&OpenOptions::new().open(target, None).ok());
            (blocks, if report.is_certain() { "certain" } else { "guessed" })
        }
        Err(_) => (0, "refused"),
    };
    let there = there(shape, &file);
    Row { shape: shape.name, damage: damage.name.clone(), there, as_is, repaired, recovered, mended, verdict }
}

fn rows() -> Vec<Row> {
    let shapes = shapes();
    let work: Vec<(&Shape, Damage)> = shapes
        .iter()
        .flat_map(|shape| damage::all(&shape.image).into_iter().map(move |damage| (shape, damage)))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let parts: Vec<Vec<(usize, Row)>> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads)
            .map(|first| {
                let work = &work;
                scope.spawn(move || {
                    let mine = work.iter().enumerate().skip(first).step_by(threads);
                    mine.map(|(number, (shape, damage))| (number, judge(shape, damage))).collect()
                })
            })
            .collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut all: Vec<(usize, Row)> = parts.into_iter().flatten().collect();
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, row)| row).collect()
}

const HEAD: &str = "\
# Damage, and what is left after it

Made by `cargo test -p vhdkit --test damage -- --ignored write_the_table`. Each row is one kind of damage to one kind of image:
72 blocks of 1 MiB, most of them with data (two sectors of each are not zero). `there` counts the blocks with data whose bytes are
still in the file, `as is` those that read right without doing anything, `repair` those after `vhdkit repair --apply`, and
`recover` those in the image that `vhdkit recover` makes. `repair` never has less than `as is`: a test holds that. `mended` says
whether repair mends all findings, some of them, or nothing since what is right is not certain; `verdict` whether recover says that
everything is certain. The blocks hold no file systems, so that nothing in them helps: for file systems see
`crates/vhdkit/tests/recover_file_systems.rs`.
";

fn table(rows: &[Row]) -> String {
    let mut text = HEAD.to_owned();
    let mut shape = "";
    for row in rows {
        if row.shape != shape {
            shape = row.shape;
            let of_shape: Vec<&Row> = rows.iter().filter(|other| other.shape == shape).collect();
            let sum = |count: fn(&Row) -> u64| of_shape.iter().map(|row| count(row)).sum::<u64>();
            let (there, as_is) = (sum(|row| row.there), sum(|row| row.as_is));
            let (repaired, recovered) = (sum(|row| row.repaired), sum(|row| row.recovered));
            let best = sum(|row| row.repaired.max(row.recovered));
            writeln!(text, "\n## {shape}\n").unwrap();
            let percent = |part: u64| 100.0 * part as f64 / there as f64;
            writeln!(
                text,
                "Of the blocks that are there: {:.1} % as it is, {:.1} % after repair, {:.1} % after recover, {:.1} % with the better of the two.\n",
                percent(as_is),
                percent(repaired),
                percent(recovered),
                percent(best)
            )
            .unwrap();
            text.push_str(
                "| damage | there | as is | repair | recover | mended | verdict |\n|---|--:|--:|--:|--:|---|---|\n",
            );
        }
        let Row { damage, there, as_is, repaired, recovered, mended, verdict, .. } = row;
        writeln!(text, "| {damage} | {there} | {as_is} | {repaired} | {recovered} | {mended} | {verdict} |").unwrap();
    }
    text
}

fn document() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/damage.md")
}

/// The numbers of a table, by image and damage: repaired, recovered.
fn numbers(text: &str) -> Vec<((String, String), [u64; 2])> {
    let mut shape = String::new();
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            name.clone_into(&mut shape);
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if let [_, damage, there, _, repaired, recovered, ..] = cells[..]
            && there.parse::<u64>().is_ok()
        {
            let counts = [repaired.parse().unwrap(), recovered.parse().unwrap()];
            found.push(((shape.clone(), damage.to_owned()), counts));
        }
    }
    found
}

#[test]
fn the_table_is_not_worse_than_the_committed_one() {
    let rows = rows();
    let now = numbers(&table(&rows));
    let committed = numbers(&std::fs::read_to_string(document()).unwrap());
    assert_eq!(now.len(), committed.len(), "write the table again");
    assert!(now.len() > 400);
    for ((key, now), (other, before)) in now.iter().zip(&committed) {
        assert_eq!(key, other, "write the table again");
        assert!(now.iter().zip(before).all(|(now, before)| now >= before), "{key:?}: {now:?} instead of {before:?}");
    }
    // What is said to be certain is right, but for damage that no reader can see: it makes a valid image of another disk.
    let invisible = |row: &Row| {
        row.damage.starts_with("log: ") && row.shape == "dirty log"
            || row.damage.ends_with(": zeroed")
                && (row.damage.starts_with("BAT, ") || row.damage.starts_with("bitmap "))
    };
    for row in rows.iter().filter(|row| row.verdict == "certain" && !invisible(row)) {
        let all = rows.iter().filter(|other| other.shape == row.shape).map(|other| other.there).max().unwrap();
        assert_eq!(row.recovered, all, "said to be certain: {row:?}");
    }
}

#[test]
#[ignore = "writes docs/damage.md"]
fn write_the_table() {
    std::fs::write(document(), table(&rows())).unwrap();
}
