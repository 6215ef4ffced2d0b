//! Power cuts at every moment of operations on the structure of images: the disk is what it was before, or what it is
//! afterwards, and never a mixture.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::single_range_in_vec_init,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

#[path = "../crash/bases.rs"]
#[allow(dead_code, reason = "shared with the crash suite of writes")]
mod bases;
mod chains;

use std::sync::Arc;

use vhdkit::format::finding::Code;
use vhdkit::format::guid::Guid;
use vhdkit::image::simulation::{phase, start_rings_at};
use vhdkit::image::{BlockDevice as _, Image, OpenOptions, ParentResolver};
use vhdkit::ops::compact::{CompactOptions, compact};
use vhdkit::ops::reparent::{ReparentOptions, reparent};
use vhdkit::ops::resize::{ResizeOptions, resize};
use vhdkit::ops::set::{SetOptions, UserItem, set, user_item};
use vhdkit::storage::Storage;
use vhdkit_testkit::model::ModelDisk;
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{
    Campaign, Case, CrashImage, ImageJudge, Judge, Lab, PageMap, SectorHistory, Setup, SimHandle, frozen_parents,
    verify_image,
};

use bases::{Base, Kind, base};

const MIB: u64 = 1 << 20;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The phase of the writer on this thread, for the simulator.
fn phase_name() -> &'static str {
    phase().as_str()
}

/// Accepts the disk as it was before and as it is afterwards, and what is said of it then.
struct BeforeOrAfter {
    inner: ImageJudge,
    after: SectorHistory,
    /// What else must be as before or as afterwards, all of it at once.
    says: Says,
}

type Says = Arc<dyn Fn(&Image) -> Result<Side, String> + Send + Sync>;

/// Which of the two an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Before,
    After,
    /// Both would say so.
    Either,
}

impl Judge for BeforeOrAfter {
    fn judge(&self, image: &CrashImage, history: &SectorHistory, case: &mut Case) -> Result<(), String> {
        let options = OpenOptions::new();
        let options = match &self.inner.parents {
            Some(parents) => options.parents(Arc::clone(parents)),
            None => options,
        };
        let opened =
            options.open(image.storage(), None).map_err(|error| format!("the image does not open: {error}"))?;
        let side = (self.says)(&opened)?;
        drop(opened);
        match side {
            Side::Before => verify_image(image, history, &self.inner, case),
            Side::After => verify_image(image, &self.after, &self.inner, case),
            Side::Either => verify_image(image, history, &self.inner, case)
                .or_else(|_| verify_image(image, &self.after, &self.inner, case)),
        }
    }
}

/// What an operation is run on.
struct Bench {
    sim: SimHandle,
    parents: Option<Arc<dyn ParentResolver>>,
}

impl Bench {
    fn start(lab: &Lab, rng: &mut Rng, base: &Base, after: SectorHistory, says: Says) -> Self {
        let parents = std::iter::successors(base.image.parent.as_deref(), |parent| parent.parent.as_deref());
        let parents: Vec<CrashImage> = parents.map(|parent| CrashImage::new(PageMap::from(&parent.file))).collect();
        let parents = Some(frozen_parents(parents));
        let chain = parents.clone();
        let mut tolerated = base.tolerated.clone();
        tolerated.push(Code::RegionCopiesDiffer);
        let inner = ImageJudge {
            parents: parents.clone(),
            tolerated,
            replay: Some(Arc::new(move |storage: Arc<dyn Storage>| {
                let image = options(chain.as_ref()).open(storage, None)?;
                image.replay()?;
                image.close()
            })),
            replay_percent: 25,
            damage_percent: 10,
            second_cuts: 1,
        };
        let sim = lab.start(Setup {
            file: PageMap::from(&base.image.file),
            history: SectorHistory::of_model(&base.image.model),
            judge: Arc::new(BeforeOrAfter { inner, after, says }),
            phase_source: phase_name,
        });
        let sectors = 256;
        start_rings_at(if rng.chance(50) { sectors - rng.between(1, 16) } else { rng.below(sectors) });
        Self { sim, parents }
    }

    fn open(&self) -> Result<Image, String> {
        options(self.parents.as_ref()).open(self.sim.storage(), None).map_err(text)
    }
}

fn options(parents: Option<&Arc<dyn ParentResolver>>) -> OpenOptions {
    let options = OpenOptions::new().write(true).replay(true);
    match parents {
        Some(parents) => options.parents(Arc::clone(parents)),
        None => options,
    }
}

fn any_base(rng: &mut Rng) -> Base {
    match rng.below(10) {
        0..4 => base(rng, Kind::Dynamic),
        4..8 => base(rng, Kind::Child),
        8 => base(rng, Kind::Large),
        _ => base(rng, Kind::Fixed),
    }
}

/// The disk of a model with another size; what is new is zero.
fn resized(model: &ModelDisk, size: u64) -> ModelDisk {
    let mut new = ModelDisk::new(size, model.sector_size, model.block_size);
    for (offset, bytes) in model.data_pieces(64 << 10) {
        if offset < size {
            let length = (bytes.len() as u64).min(size - offset);
            new.write(offset, &bytes[..length as usize]);
        }
    }
    new
}

fn resize_program(rng: &mut Rng, lab: &Lab) -> Result<(), String> {
    let base = any_base(rng);
    let old = base.image.model.virtual_size;
    let sector = u64::from(base.image.model.sector_size);
    let drawn = match rng.below(5) {
        0 => old + rng.below(8 * MIB),
        1 => old + rng.below(4 << 30),
        // More entries than the BAT region has room for.
        2 if base.image.model.block_size == 1 << 20 && !base.image.model.blocks.is_empty() => old + (140 << 30),
        3 => rng.below(old),
        _ => old.saturating_sub(rng.below(3 * MIB)),
    };
    let fixed = base.image.model.blocks.len() == 6;
    let drawn = if fixed { drawn.min(old + 8 * MIB) } else { drawn };
    let size = (drawn / sector * sector).max(sector);
    let after = SectorHistory::of_model(&resized(&base.image.model, size));
    let says: Says = Arc::new(move |image| match image.size() {
        same if same == old && old == size => Ok(Side::Either),
        same if same == old => Ok(Side::Before),
        same if same == size => Ok(Side::After),
        other => Err(format!("the disk has {other} bytes, neither {old} nor {size}")),
    });
    let bench = Bench::start(lab, rng, &base, after, says);
    bench.sim.step(format!("resize {old:#x} to {size:#x}"));
    let options = ResizeOptions { allow_data_loss: true, ..ResizeOptions::to(size) };
    let report = resize(bench.open()?, &options, &()).map_err(text)?;
    bench.sim.tally(if size > old { "grown" } else { "shrunk" });
    if report.bat_moves {
        bench.sim.tally("BAT moved");
    }
    Ok(())
}

fn compact_program(rng: &mut Rng, lab: &Lab) -> Result<(), String> {
    let mut base = any_base(rng);
    // More to drop and to move.
    if rng.chance(50) && base.image.parent.is_none() && base.image.model.block_size == 1 << 20 {
        base = scattered(rng);
    }
    let after = SectorHistory::of_model(&base.image.model);
    let guid = base.image.data_write_guid;
    let says: Says = Arc::new(move |image| {
        let now = image.layers()[0].headers().current.data_write_guid;
        if now.to_string().to_lowercase() == guid_text(&guid) {
            Ok(Side::Before)
        } else {
            Err(format!("the data write GUID became {now}"))
        }
    });
    let bench = Bench::start(lab, rng, &base, after, says);
    bench.sim.step("compact");
    let options = CompactOptions { filesystems: false, zero_scan: rng.chance(70), ..CompactOptions::default() };
    let report = compact(bench.open()?, &options, &()).map_err(text)?;
    for (what, count) in [
        ("blocks moved", report.moved),
        ("zero blocks dropped", report.zero_blocks),
        ("regions moved", report.regions_moved.len() as u64),
        ("bitmaps dropped", report.bitmaps),
    ] {
        if count > 0 {
            bench.sim.tally(what);
        }
    }
    Ok(())
}

fn guid_text(guid: &vhdkit_testkit::Guid) -> String {
    Guid::from_stored(guid.0).to_string().to_lowercase()
}

/// A dynamic disk whose blocks lie in any order with gaps, some of them all zero, and whose regions lie behind them.
fn scattered(rng: &mut Rng) -> Base {
    use vhdkit_testkit::{BlockSpec, Content, ImageBuilder};
    let mut builder = ImageBuilder::new(24 * MIB, 1 << 20).scatter(rng.next_u64());
    for block in 0..20 {
        let content = match rng.below(3) {
            0 => Content::Zero,
            _ => Content::Sparse { seed: block + 1, stride: 97 },
        };
        if rng.chance(70) {
            builder = builder.block(block, BlockSpec::present(content));
        }
    }
    if rng.chance(50) {
        builder.bat_offset = Some(70 * MIB);
        builder.metadata_offset = Some(71 * MIB);
        builder.log_offset = Some(72 * MIB);
    }
    Base::new(builder.build(), &[0])
}

fn set_program(rng: &mut Rng, lab: &Lab) -> Result<(), String> {
    let base = any_base(rng);
    let after = SectorHistory::of_model(&base.image.model);
    let (id, item) = (Guid::random(), Guid::random());
    let length = rng.pick(&[1, 3000, 70_000, 900_000, 1 << 20]) as usize;
    let bytes = vec![7; length];
    let expected = bytes.clone();
    let says: Says = Arc::new(move |image| {
        let found = user_item(&image.layers()[0], item).map_err(text)?;
        match (image.disk_id() == Some(id), found) {
            (false, None) => Ok(Side::Before),
            (true, Some(found)) if found == expected => Ok(Side::After),
            (id, found) => Err(format!("new disk ID: {id}; item: {:?} bytes", found.map(|found| found.len()))),
        }
    });
    let bench = Bench::start(lab, rng, &base, after, says);
    bench.sim.step(format!("set, an item of {length} bytes"));
    let options = SetOptions {
        disk_id: Some(id),
        user_items: vec![UserItem { id: item, value: Some(bytes) }],
        ..SetOptions::default()
    };
    let report = set(bench.open()?, &options).map_err(text)?;
    if report.region_moved {
        bench.sim.tally("metadata moved");
    }
    Ok(())
}

fn reparent_program(rng: &mut Rng, lab: &Lab) -> Result<(), String> {
    let base = base(rng, Kind::Child);
    let after = SectorHistory::of_model(&base.image.model);
    let says: Says = Arc::new(|image| {
        let locator = image.layers()[0].metadata().parent_locator.clone().ok_or("no locator")?;
        Ok(if locator.get("relative_path") == Some("..\\new\\p.vhdx") { Side::After } else { Side::Before })
    });
    let bench = Bench::start(lab, rng, &base, after, says);
    bench.sim.step("reparent");
    let parent = base.image.parent.as_ref().unwrap();
    let parent = CrashImage::new(PageMap::from(&parent.file)).storage();
    let parent = OpenOptions::new().open(parent, None).map_err(text)?;
    let options = ReparentOptions {
        relative_path: "..\\new\\p.vhdx".to_owned(),
        absolute_path: rng.chance(50).then(|| format!("C:\\{}\\p.vhdx", "long\\".repeat(400))),
        ignore_id_mismatch: false,
        dry_run: false,
    };
    let report = reparent(bench.open()?, &parent, &options).map_err(text)?;
    if report.mismatch { Err("the parent is the same".to_owned()) } else { Ok(()) }
}

fn campaign(program: &(dyn Fn(&mut Rng, &Lab) -> Result<(), String> + Sync), distinct: u64, tallies: &[&str]) {
    let distinct = if cfg!(debug_assertions) { distinct / 10 } else { distinct };
    let report = Campaign { distinct_max: Some(distinct), ..Campaign::default() }.run(&program);
    println!("{report}");
    report.expect_clean();
    for what in tallies {
        assert!(report.tallied(what) > 0, "never met: {what}\n{report}");
    }
}

#[test]
fn resize_is_cut_at_every_moment() {
    campaign(&resize_program, 12_000, &["grown", "shrunk", "BAT moved"]);
}

#[test]
fn compact_is_cut_at_every_moment() {
    campaign(&compact_program, 20_000, &["blocks moved", "zero blocks dropped", "regions moved"]);
}

#[test]
fn set_is_cut_at_every_moment() {
    campaign(&set_program, 8_000, &["metadata moved"]);
}

#[test]
fn reparent_is_cut_at_every_moment() {
    campaign(&reparent_program, 4_000, &[]);
}
