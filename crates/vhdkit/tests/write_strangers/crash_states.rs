//! What power cuts leave, of every phase: QEMU replays our log, and then reads what our overlay shows.
//!
//! What is left out, and why:
//!
//! - differencing disks and sectors of 4096 bytes, which QEMU does not open;
//! - the growth of the file to what the newest entry says, where that is needed: QEMU leaves it out (its bug Q7), so the
//!   copy for QEMU is made that long before. Nothing else is done to an image.
//!
//! QEMU also ignores the tail, replays a run from its first entry, and ranks runs by that entry's number (Q9). That does no
//! harm here, since our entries name only pages of the BAT, so that replaying a retired one is undone by those that follow.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vhdkit::image::OpenOptions;
use vhdkit::image::simulation::phase;
use vhdkit_testkit::ImageBuilder;
use vhdkit_testkit::harness::{Case as Trial, Needs};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{Campaign, Case, CrashImage, Judge, Lab, Sampling, SectorHistory};

use crate::bases::{Base, Kind, base};
use crate::support::{MIB, complaints, complaints_of, open, qemu_check, qemu_repair, qemu_to_raw, same_as_raw};
use crate::truth::active_sequence;
use crate::world::{Style, World, current_header};

/// Images of each phase that QEMU gets to see.
const PER_PHASE: usize = 24;
const PHASES: [&str; 7] = ["start", "payload", "log", "home", "retire", "replay", "close"];
const PROGRAMS: u64 = 34;
const STYLE: Style = Style { nested_percent: 8, replay_percent: 0, damage_percent: 0, second_cuts: 0, ..Style::PLAIN };

/// A disk that QEMU takes long to read.
const LARGE: u64 = 1100 * MIB;

/// Keeps of each phase the images with the smallest hashes: a sample that no program is favoured in.
#[derive(Default)]
struct Sample(Mutex<BTreeMap<&'static str, BTreeMap<u64, CrashImage>>>);

impl Judge for Sample {
    fn judge(&self, image: &CrashImage, history: &SectorHistory, _: &mut Case) -> Result<(), String> {
        let phase = phase().as_str();
        if phase != "home" && history.sector_count() * 512 >= LARGE {
            return Ok(());
        }
        let mut phases = self.0.lock().unwrap();
        let kept = phases.entry(phase).or_default();
        kept.insert(image.pages().content_hash(), image.clone());
        if kept.len() > PER_PHASE {
            kept.pop_last();
        }
        Ok(())
    }
}

/// A disk that uses the first and the third page of its BAT, so that a commit writes two places home.
fn three_pages() -> Base {
    let builder = ImageBuilder::new(LARGE, 1 << 20).pattern_block(0, 1).pattern_block(1098, 2);
    Base::new(builder.build(), &[0, 1, 2, 1097, 1098, 1099])
}

/// QEMU knows neither differencing disks nor sectors of 4096 bytes.
fn base_for_qemu(rng: &mut Rng) -> Base {
    loop {
        let base = match rng.below(8) {
            0 => base(rng, Kind::Fixed),
            1..4 => three_pages(),
            _ => base(rng, Kind::Dynamic),
        };
        if base.image.model.sector_size == 512 {
            return base;
        }
    }
}

fn sample() -> BTreeMap<&'static str, BTreeMap<u64, CrashImage>> {
    let sample = Arc::new(Sample::default());
    let program = |rng: &mut Rng, lab: &Lab| {
        let witness: Arc<dyn Judge> = Arc::clone(&sample) as Arc<dyn Judge>;
        let base = Base { witness: Some(witness), ..base_for_qemu(rng) };
        World::start(lab, rng, base, STYLE)?.run(rng)
    };
    let sampling = Sampling { exhaustive_ops: 1, random: 1 };
    let campaign = Campaign { sampling, per_operation: 2, programs_max: Some(PROGRAMS), ..Campaign::default() };
    let report = campaign.run(&program);
    println!("{report}");
    report.expect_clean();
    std::mem::take(&mut *sample.0.lock().unwrap())
}

/// What was seen.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    images: usize,
    dirty: usize,
    /// The newest entry names a longer file.
    longer: usize,
    /// More than one entry counts.
    several: usize,
}

fn judge_image(image: &CrashImage, directory: &Path, seen: &mut Seen) -> Result<(), String> {
    let (path, raw) = (directory.join("image.vhdx"), directory.join("image.raw"));
    image.pages().write_to_path(&path).unwrap();
    let storage = image.storage();
    let ours = OpenOptions::new().open(Arc::clone(&storage), None).map_err(|error| error.to_string())?;
    let header = current_header(&*storage)?;
    seen.images += 1;
    if header.is_dirty() {
        seen.dirty += 1;
        let active = active_sequence(&*storage, &header)?.ok_or("the log is dirty and holds no sequence")?;
        let head = active.head().ok_or("an active sequence has a head")?;
        seen.several += usize::from(active.entries.len() > 1);
        if head.last_file_offset > image.pages().len() {
            // Q7: QEMU does not grow the file when the newest entry's length is a whole number of mebibytes.
            seen.longer += 1;
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(head.last_file_offset).unwrap();
        }
    }
    qemu_repair(&path)?;
    qemu_check(&path)?;
    qemu_to_raw(&path, &raw)?;
    same_as_raw(&ours, &raw)?;
    // What QEMU replayed is an image like any other for us too.
    let replayed = open(&path);
    if replayed.layers()[0].replay().is_some() {
        return Err("the log is dirty after QEMU's replay".to_owned());
    }
    let new = complaints(&path).difference(&complaints_of(&storage)).cloned().collect::<Vec<_>>();
    if !new.is_empty() {
        return Err(format!("after QEMU's replay: {new:?}"));
    }
    same_as_raw(&replayed, &raw).map_err(|error| format!("replayed: {error}"))
}

/// In two threads: most of the time is QEMU's.
fn judge_all(name: &str, images: &[CrashImage]) -> Seen {
    let total = Mutex::new(Seen::default());
    std::thread::scope(|scope| {
        for part in images.chunks(images.len().div_ceil(2).max(1)) {
            let total = &total;
            scope.spawn(move || {
                let directory = tempfile::tempdir().unwrap();
                for (number, image) in part.iter().enumerate() {
                    let mut seen = Seen::default();
                    if let Err(error) = judge_image(image, directory.path(), &mut seen) {
                        let kept = std::env::temp_dir().join(format!("vhdkit-{name}-{number}.vhdx"));
                        image.pages().write_to_path(&kept).unwrap();
                        panic!("{name}: {error}; the image is {}", kept.display());
                    }
                    let mut total = total.lock().unwrap();
                    total.images += seen.images;
                    total.dirty += seen.dirty;
                    total.longer += seen.longer;
                    total.several += seen.several;
                }
            });
        }
    });
    total.into_inner().unwrap()
}

fn qemu_replays_what_power_cuts_leave() {
    let phases = sample();
    for name in PHASES {
        let images: Vec<CrashImage> = phases.get(name).into_iter().flat_map(|kept| kept.values().cloned()).collect();
        let seen = judge_all(name, &images);
        println!("{name}: {seen:?}");
        assert!(seen.images >= PER_PHASE / 2, "{name}: {seen:?}");
        if matches!(name, "log" | "home" | "retire") {
            assert!(seen.dirty * 2 >= seen.images, "{name}: {seen:?}");
        }
    }
}

pub(crate) fn cases() -> Vec<Trial> {
    let needs = Needs::tools(&["qemu-img"]);
    vec![Trial::new("qemu_replays_what_power_cuts_leave", needs, qemu_replays_what_power_cuts_leave)]
}
