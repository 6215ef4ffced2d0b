//! Merges cut at every moment: the power goes for all files of the chain at once.

use std::sync::{Arc, Mutex, PoisonError};

use vhdkit::image::{BlockDevice as _, Image, OpenOptions, ParentCandidate, ParentRequest, ParentResolver};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::merge::{MergeOptions, merge};
use vhdkit::storage::Storage;
use vhdkit_testkit::model::ModelDisk;
use vhdkit_testkit::random::{RandomOptions, random_image};
use vhdkit_testkit::rng::Rng;
use vhdkit_testkit::sim::{CrashImage, CrashPoint, OpInfo, PageMap, SimStorage};

/// Files of a chain, the image itself first.
#[derive(Debug, Clone)]
struct Files(Vec<Arc<dyn Storage>>);

impl ParentResolver for Files {
    fn resolve(&self, wanted: &ParentRequest<'_>) -> vhdkit::Result<Vec<ParentCandidate>> {
        let storage = self.0.get(wanted.depth + 1).map(Arc::clone);
        // Not "named": identities have to match.
        Ok(storage
            .into_iter()
            .map(|storage| ParentCandidate { storage, path: None, named: false, lock: None })
            .collect())
    }
}

fn open(files: &Files) -> Result<Image, String> {
    let options = OpenOptions::new().parents(Arc::new(files.clone()));
    options.open(Arc::clone(&files.0[0]), None).map_err(|error| error.to_string())
}

fn expect(image: &Image, model: &ModelDisk) -> Result<(), String> {
    if image.size() != model.virtual_size {
        return Err(format!("the disk has {} bytes instead of {}", image.size(), model.virtual_size));
    }
    model.compare_with(|offset, buffer| {
        image.read_at(buffer, offset).map_err(|error| std::io::Error::other(error.to_string()))
    })
}

/// A moment: what every file may have become.
type Moment = Vec<CrashPoint>;

fn small(rng: &mut Rng, depth: usize) -> RandomOptions {
    RandomOptions {
        depth,
        block_size: Some(1 << 20),
        logical_sector_size: Some(rng.pick(&[512, 4096])),
        virtual_size_max: 12 << 20,
        blocks_max: 5,
        torn: false,
        junk: false,
        for_qemu: false,
    }
}

struct Run {
    moments: Vec<Moment>,
    model: ModelDisk,
    into: usize,
}

/// Merges, and keeps every moment.
fn run(seed: u64) -> Option<Run> {
    let mut rng = Rng::new(seed);
    let depth = rng.pick(&[2, 2, 3, 4]) as usize;
    let image = random_image(rng.next_u64(), &small(&mut rng, depth));
    let model = image.model.clone();
    let chain = std::iter::successors(Some(&image), |image| image.parent.as_deref());
    let files: Vec<Arc<SimStorage>> =
        chain.map(|image| Arc::new(SimStorage::from_pages(PageMap::from(&image.file)))).collect();
    let storages = Files(files.iter().map(|file| Arc::clone(file) as Arc<dyn Storage>).collect());
    let writable = (0..files.len()).all(|layer| {
        let options = OpenOptions::new().write(true).without_parents();
        options.open(Arc::clone(&storages.0[layer]), None).is_ok()
    });
    let source = open(&storages).ok().filter(|_| writable)?;
    let moments: Arc<Mutex<Vec<Moment>>> = Arc::default();
    for file in &files {
        let (list, all) = (Arc::clone(&moments), files.iter().map(Arc::downgrade).collect::<Vec<_>>());
        file.set_observer(Some(Arc::new(move |_: &OpInfo| {
            let moment = all.iter().filter_map(std::sync::Weak::upgrade).map(|file| file.crash_point()).collect();
            list.lock().unwrap_or_else(PoisonError::into_inner).push(moment);
        })));
    }
    let into = rng.between(1, depth as u64 - 1) as usize;
    merge(source, &MergeOptions { into, ..MergeOptions::default() }, &())
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    files.iter().for_each(|file| file.set_observer(None));
    let mut moments = std::mem::take(&mut *moments.lock().unwrap_or_else(PoisonError::into_inner));
    moments.push(files.iter().map(|file| file.crash_point()).collect());
    Some(Run { moments, model, into })
}

/// What is left of every file.
fn left(moment: &Moment, rng: &mut Rng) -> Vec<CrashImage> {
    moment.iter().map(|point| CrashImage::new(point.build(&point.random_state(rng.next_u64())))).collect()
}

fn judge(images: &[CrashImage], run: &Run) -> Result<(), String> {
    let files = Files(images.iter().map(CrashImage::storage).collect());
    expect(&open(&files)?, &run.model)?;
    for (depth, file) in files.0.iter().enumerate() {
        let report = check(file, None, &CheckOptions::default(), &()).map_err(|error| error.to_string())?;
        if let Some(finding) = report.findings.iter().find(|finding| finding.severity().as_str() == "error") {
            return Err(format!("layer {depth}: {finding}"));
        }
    }
    Ok(())
}

/// Merges once more where a cut left the files, and to the end.
fn finish_again(images: &[CrashImage], run: &Run) -> Result<(), String> {
    let files: Vec<Arc<dyn Storage>> =
        images.iter().map(|image| Arc::new(image.writable()) as Arc<dyn Storage>).collect();
    let files = Files(files);
    let options = MergeOptions { into: run.into, replay: true, ..MergeOptions::default() };
    merge(open(&files)?, &options, &()).map_err(|error| error.to_string())?;
    expect(&open(&files)?, &run.model)?;
    let alone = Files(files.0[run.into..].to_vec());
    expect(&open(&alone)?, &run.model)
}

#[test]
fn merge_is_cut_at_every_moment() {
    let (programs, states) = if cfg!(debug_assertions) { (6, 2) } else { (40, 6) };
    let (mut seed, mut done, mut judged, mut again) = (0, 0, 0, 0);
    while done < programs {
        seed += 1;
        let Some(run) = run(seed) else { continue };
        done += 1;
        let mut rng = Rng::new(seed);
        for (number, moment) in run.moments.iter().enumerate() {
            for _ in 0..states {
                let images = left(moment, &mut rng);
                let told = |error: String| panic!("seed {seed}, moment {number} of {}: {error}", run.moments.len());
                judge(&images, &run).unwrap_or_else(told);
                judged += 1;
                if rng.chance(5) {
                    finish_again(&images, &run).unwrap_or_else(told);
                    again += 1;
                }
            }
        }
    }
    println!("{done} merges, {judged} cuts, {again} merges done again after one");
    assert!(judged > 100 * programs && again > programs);
}
