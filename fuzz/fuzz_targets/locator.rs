//! Parent locators from arbitrary bytes, and what looking for such parents does.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vhdkit::format::finding::{CollectAll, FailFast, Location, Severity, Strictness};
use vhdkit::format::locator::{ParentLocator, VHDX_LOCATOR};
use vhdkit::image::{FileResolver, ParentRequest, ParentResolver};

fuzz_target!(|input: &[u8]| {
    let mut item = input.to_vec();
    // Most inputs get the only type that is known, so that the bytes behind it count.
    if item.first().is_some_and(|first| first % 8 != 7) {
        for (to, from) in item.iter_mut().zip(VHDX_LOCATOR.stored()) {
            *to = from;
        }
    }
    let place = Location::of("parent locator");
    let mut all = CollectAll::new(Strictness::Normal);
    let collected = ParentLocator::decode(&item, &place, &mut all);
    let strict = ParentLocator::decode(&item, &place, &mut FailFast::new(Strictness::Normal));
    // Opening and checking agree.
    assert_eq!(strict.is_ok(), all.count(Severity::Error) == 0, "{strict:?} {all:?}");
    let Ok(locator) = collected else { return };
    if let Ok(strict) = &strict {
        assert_eq!(*strict, locator);
        // What was read can be written, and reads the same again.
        let bytes = locator.encode().expect("every pair came out of an item");
        let again = ParentLocator::decode(&bytes, &place, &mut FailFast::new(Strictness::Strict));
        assert_eq!(again.expect("our own item"), locator);
    }
    // Nothing beneath an empty directory is ever found, whatever the path says; and nothing else is opened.
    let directory = Path::new("/proc/self/fdinfo/none");
    let wanted = ParentRequest { child: Some(&directory.join("child.vhdx")), locator: &locator, depth: 0 };
    assert!(FileResolver::new().allow_own_directory().resolve(&wanted).is_err());
    assert!(FileResolver::new().resolve(&wanted).is_err());
});
