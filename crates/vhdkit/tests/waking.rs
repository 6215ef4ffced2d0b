//! Whoever waits for another operation goes on when that ends: for a block, for room in the log, for plans when closing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use vhdkit::image::{BlockDevice as _, Image, OpenOptions, WritePlan};
use vhdkit::ops::create::{CreateOptions, create};
use vhdkit::storage::{FileStorage, Storage};
use vhdkit::units::{GIB, MIB};

/// Long enough for a thread to come to where it waits.
const MOMENT: Duration = Duration::from_millis(200);
/// Nobody waits so long who is woken.
const FOR_EVER: Duration = Duration::from_secs(30);
/// Pages of the BAT that one entry in a log of 1 MiB holds.
const PAGES: u64 = 126;
/// What one page of the BAT stands for with blocks of 1 MiB.
const PAGE_BYTES: u64 = 512 * MIB;

fn image() -> Image {
    let file = tempfile::tempfile().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::from_file(file, None).unwrap());
    create(&storage, &CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(128 * GIB) }, &()).unwrap();
    OpenOptions::new().write(true).open(storage, None).unwrap()
}

fn plan(image: &Image, offset: u64) -> WritePlan {
    let plan = image.plan_write(offset..offset + 4096).unwrap();
    plan.storage().write_at(&[1; 4096], plan.file_offset()).unwrap();
    plan
}

/// Runs `waits` in a thread, sees that it does not come to an end, runs `ends`, and sees that now it does.
fn waits_until(image: &Image, waits: impl FnOnce(&Image) + Send, ends: impl FnOnce()) {
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        scope.spawn(move || {
            waits(image);
            done.send(()).unwrap();
        });
        assert_eq!(is_done.recv_timeout(MOMENT), Err(RecvTimeoutError::Timeout), "it did not wait");
        ends();
        if is_done.recv_timeout(FOR_EVER).is_err() {
            eprintln!("nobody woke it");
            std::process::abort(); // the scope would wait for it for ever
        }
    });
}

#[test]
fn for_the_same_block() {
    let image = image();
    for complete in [true, false] {
        let offset = if complete { 0 } else { MIB };
        let first = plan(&image, offset);
        let ends = || if complete { first.complete().unwrap() } else { drop(first) };
        waits_until(&image, |image| image.write_at(&[2; 4096], offset + 8192).unwrap(), ends);
    }
    let using = plan(&image, 0);
    waits_until(&image, |image| image.discard(0..MIB).unwrap(), || using.complete().unwrap());
    image.close().unwrap();
}

#[test]
fn for_room_in_the_log() {
    let image = image();
    for complete in [true, false] {
        let mut plans: Vec<WritePlan> = (0..PAGES).map(|page| plan(&image, page * PAGE_BYTES)).collect();
        let one = plans.pop().unwrap();
        let ends = || if complete { one.complete().unwrap() } else { drop(one) };
        waits_until(&image, |image| image.write_at(&[2; 4096], PAGES * PAGE_BYTES).unwrap(), ends);
        plans.into_iter().for_each(drop);
        image.discard(0..image.size()).unwrap();
        image.flush().unwrap();
    }
    image.close().unwrap();
}

#[test]
fn for_plans_when_closing() {
    let image = image();
    let last = plan(&image, 0);
    waits_until(&image, |image| image.close().unwrap(), || last.complete().unwrap());
}
