//! A live image changes between reading and writing: what an opening would refuse is refused then too, and nothing is lost.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]
#![allow(dead_code, reason = "every test file uses a part of the shared modules")]

mod write_support;

use std::sync::Arc;

use vhdkit::ErrorKind;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::storage::Storage;
use vhdkit_testkit::{DirtyPlan, ImageBuilder};
use write_support::{assert_clean, load};

const MIB: u64 = 1 << 20;

fn bytes(storage: &Arc<dyn Storage>) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn read(image: &Image, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; 700];
    image.read_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn who_was_opened_to_read_begins_to_write() {
    for (dirty, allowed) in [(false, false), (false, true), (true, false), (true, true)] {
        let clean = ImageBuilder::new(16 * MIB, 1 << 20).pattern_block(0, 1).build();
        let mut built = clean.clone();
        if dirty {
            DirtyPlan::new(3).move_bat(&clean).apply(&mut built);
        }
        let storage: Arc<dyn Storage> = Arc::new(load(&built.file));
        let before = bytes(&storage);
        let image = OpenOptions::new().replay(allowed).open(Arc::clone(&storage), None).unwrap();
        assert!(image.is_read_only());
        // A plan from before holds no token: with it, writing would not be safe.
        let plan = image.plan_read(0..512).unwrap();
        let expected = if dirty && !allowed { ErrorKind::NeedsReplay } else { ErrorKind::Busy };
        assert_eq!(image.reopen(true).unwrap_err().kind(), expected, "dirty {dirty}, allowed {allowed}");
        drop(plan);
        let reopened = image.reopen(true);
        assert!(bytes(&storage) == before, "nothing is written by that");
        if dirty && !allowed {
            assert_eq!(reopened.unwrap_err().kind(), ErrorKind::NeedsReplay);
            assert!(image.is_read_only());
            continue;
        }
        reopened.unwrap();
        image.write_at(&[7; 700], 5 * MIB + 3).unwrap();
        image.reopen(false).unwrap();
        assert_eq!(image.write_at(&[1; 512], 0).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(read(&image, 5 * MIB + 3), [7; 700]);
        image.reopen(true).unwrap();
        image.write_at(&[8; 700], 6 * MIB + 3).unwrap();
        image.close().unwrap();
        drop(image);
        assert_clean("reopened", &storage);
        let image = OpenOptions::new().open(Arc::clone(&storage), None).unwrap();
        assert_eq!((read(&image, 5 * MIB + 3), read(&image, 6 * MIB + 3)), (vec![7; 700], vec![8; 700]));
        let mut block = vec![0; MIB as usize];
        image.read_at(&mut block, 0).unwrap();
        assert!(block == clean.model.read(0, MIB as usize), "what was there before");
    }
}
