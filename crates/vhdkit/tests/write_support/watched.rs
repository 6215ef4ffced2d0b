//! Simulated storage that is watched: what happens to it, and what a power cut could leave at each moment.

use std::sync::{Arc, Mutex};

use vhdkit::image::{Image, OpenOptions};
use vhdkit::storage::Storage as _;
use vhdkit_testkit::sim::{CrashImage, CrashPoint, OpInfo, PageMap, Sampling, SimStorage};
use vhdkit_testkit::sparse::SparseFile;

/// A file in memory of which the power may be cut.
pub(crate) fn sim(file: &SparseFile) -> Arc<SimStorage> {
    let storage = SimStorage::new();
    for (offset, bytes) in file.segments() {
        storage.write_at(bytes, offset).unwrap();
    }
    storage.set_len(file.len()).unwrap();
    storage.sync().unwrap();
    Arc::new(storage)
}

/// Remembers what happens to a storage from now on, with the moment before each operation.
#[allow(clippy::type_complexity, reason = "said once")]
pub(crate) fn watch(storage: &Arc<SimStorage>) -> Arc<Mutex<Vec<(OpInfo, CrashPoint)>>> {
    let seen: Arc<Mutex<Vec<(OpInfo, CrashPoint)>>> = Arc::default();
    let (events, weak) = (Arc::clone(&seen), Arc::downgrade(storage));
    storage.set_observer(Some(Arc::new(move |info| {
        let storage = weak.upgrade().unwrap();
        events.lock().unwrap().push((info.clone(), storage.crash_point()));
    })));
    seen
}

/// Opens what a power cut left, for reading.
pub(crate) fn survivor(pages: PageMap) -> Image {
    OpenOptions::new().open(CrashImage::new(pages).storage(), None).unwrap()
}

/// What every moment of a program could leave, sampled.
pub(crate) fn for_each_state(events: &[(OpInfo, CrashPoint)], mut judge: impl FnMut(&OpInfo, Image)) -> usize {
    let mut count = 0;
    for (number, (info, point)) in events.iter().enumerate() {
        let sampling = Sampling { exhaustive_ops: 2, random: 12 };
        for state in point.states(&sampling, number as u64) {
            judge(info, survivor(point.build(&state)));
            count += 1;
        }
    }
    count
}
