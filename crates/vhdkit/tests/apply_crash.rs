//! Power cuts at every moment of an apply: by its identity, the target says whether it is the base, the result, or in
//! between, and from in between the same increment goes on to the result.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod diff_support;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use diff_support::{Chain, MIB, disk, increment};
use vhdkit::Result;
use vhdkit::format::guid::Guid;
use vhdkit::image::OpenOptions;
use vhdkit::ops::apply::{ApplyOptions, ApplyTarget, Basis, plan_apply};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::diff::ExportOptions;
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_testkit::builder::{BlockSpec, BuiltImage, ImageBuilder};
use vhdkit_testkit::content::{Content, SectorMask};
use vhdkit_testkit::model::ZERO;
use vhdkit_testkit::sim::{CrashImage, CrashPoint, PageMap, Sampling, SimStorage};

fn sparse(seed: u64) -> Content {
    Content::Sparse { seed, stride: 97 }
}

/// A base, and a child with a block of each kind of change: mapped in place, new, zeroed, in parts.
fn pair() -> (Arc<BuiltImage>, Chain) {
    let base = ImageBuilder::new(6 * MIB, MIB as u32).block(0, BlockSpec::present(sparse(1)));
    let base = base.block(1, BlockSpec::present(sparse(2))).block(2, BlockSpec::present(sparse(3)));
    let base = Arc::new(base.build());
    let child = ImageBuilder::new(6 * MIB, MIB as u32)
        .both_headers(|header| header.data_write_guid = vhdkit_testkit::guid::Guid::seeded(77))
        .differencing(&base)
        .block(0, BlockSpec::partial(sparse(10), SectorMask::new(|sector| sector % 512 < 60)))
        .block(1, BlockSpec::new(ZERO))
        .block(4, BlockSpec::present(sparse(12)));
    (Arc::clone(&base), Chain::new(&child.build()))
}

fn apply(storage: &Arc<dyn Storage>, increment: &[u8]) -> Result<Basis> {
    let increment = MemoryStorage::from_bytes(increment.to_vec());
    let image = OpenOptions::new().write(true).replay(true).open(Arc::clone(storage), None)?;
    let plan = plan_apply(&increment, ApplyTarget::Image(&image), &ApplyOptions::default(), &())?;
    plan.run(&AtomicU64::new(0), &())?;
    Ok(plan.basis())
}

/// The moments of an apply at which the power may be cut.
fn moments(start: PageMap, increment: &[u8]) -> Vec<CrashPoint> {
    let storage = Arc::new(SimStorage::from_pages(start));
    let points: Arc<Mutex<Vec<CrashPoint>>> = Arc::default();
    let (seen, watched) = (Arc::clone(&points), Arc::downgrade(&storage));
    storage.set_observer(Some(Arc::new(move |_| {
        if let Some(storage) = watched.upgrade() {
            seen.lock().unwrap().push(storage.crash_point());
        }
    })));
    let target: Arc<dyn Storage> = Arc::<SimStorage>::clone(&storage);
    apply(&target, increment).unwrap();
    storage.set_observer(None);
    let mut points = std::mem::take(&mut *points.lock().unwrap());
    points.push(storage.crash_point());
    points
}

/// What the cuts have to be judged by.
struct Truth {
    base: (Guid, Vec<u8>),
    result: (Guid, Vec<u8>),
    id: Guid,
    increment: Vec<u8>,
}

impl Truth {
    /// Judges what a cut left, and says what the target takes itself for.
    fn judge(&self, name: &str, left: &CrashImage) -> &'static str {
        let storage = left.storage();
        let report = check(&storage, None, &CheckOptions::default(), &()).unwrap();
        assert_eq!(report.errors, 0, "{name}: {:#?}", report.findings);
        let image = OpenOptions::new().open(storage, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (guid, bytes) = (image.layers()[0].headers().current.data_write_guid, disk(&image));
        if guid == self.base.0 {
            assert!(bytes == self.base.1, "{name}: the base is not what it was");
            return "base";
        }
        if guid == self.result.0 {
            assert!(bytes == self.result.1, "{name}: the result is not complete");
            return "result";
        }
        assert_eq!(guid, self.id, "{name}: who is this?");
        let sectors = bytes.chunks(512).zip(self.base.1.chunks(512)).zip(self.result.1.chunks(512));
        for (number, ((found, base), result)) in sectors.enumerate() {
            assert!(found == base || found == result, "{name}: sector {number} is neither old nor new");
        }
        "between"
    }

    /// Applies the same increment to what a cut left.
    fn go_on(&self, name: &str, left: &CrashImage) {
        let storage: Arc<dyn Storage> = Arc::new(left.writable());
        apply(&storage, &self.increment).unwrap_or_else(|error| panic!("{name}: {error}"));
        let image = OpenOptions::new().open(storage, None).unwrap();
        assert_eq!(image.layers()[0].headers().current.data_write_guid, self.result.0, "{name}");
        assert!(disk(&image) == self.result.1, "{name}");
    }
}

fn sample(states: usize, random: usize) -> Sampling {
    Sampling { exhaustive_ops: states, random }
}

#[test]
fn power_cuts_leave_the_base_the_result_or_something_that_goes_on() {
    let (built, chain) = pair();
    let (base, result) = (chain.open(1), chain.open(0));
    let (increment, report) = increment(&base, &result, &ExportOptions::default());
    assert!(report.totals.records > 4 && report.totals.zero_bytes >= MIB, "{report:?}");
    let guid = |depth| chain.open(depth).layers()[0].headers().current.data_write_guid;
    let truth = Truth {
        base: (guid(1), disk(&*base)),
        result: (guid(0), disk(&*result)),
        id: report.header.id,
        increment: increment.clone(),
    };
    let (mut seen, mut number) = (BTreeMap::new(), 0_u64);
    let points = moments(PageMap::from(&built.file), &increment);
    // Without optimization some of them.
    let every = if cfg!(debug_assertions) { 4 } else { 1 };
    for (moment, point) in points.iter().enumerate() {
        for state in point.states(&sample(1, 4), moment as u64).into_iter().step_by(every) {
            number += 1;
            let name = format!("moment {moment}, {}", state.describe(point));
            let left = CrashImage::new(point.build(&state));
            *seen.entry(truth.judge(&name, &left)).or_insert(0) += 1;
            if number % 3 == 0 {
                truth.go_on(&name, &left);
            }
            // Now and then a second cut while it goes on.
            if number % 61 == 0 {
                let again = moments(left.pages().clone(), &increment);
                for point in again.iter().step_by(7) {
                    let left = CrashImage::new(point.build(&point.random_state(number)));
                    *seen.entry(truth.judge(&name, &left)).or_insert(0) += 1;
                    truth.go_on(&name, &left);
                }
            }
        }
    }
    println!("{} moments, {number} cuts: {seen:?}", points.len());
    assert!(points.len() > 30 && seen.len() == 3 && seen["between"] > 500, "{seen:?}");
}
