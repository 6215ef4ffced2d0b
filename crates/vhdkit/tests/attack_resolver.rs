//! Parents among names that a resolver may trip over.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use vhdkit::format::guid::Guid;
use vhdkit::format::locator::{KEY_RELATIVE_PATH, ParentLocator};
use vhdkit::image::{FileResolver, ParentRequest, ParentResolver as _};

#[test]
fn a_name_that_is_not_utf8_does_not_hide_the_parent() {
    let directory = tempfile::tempdir().unwrap();
    for number in 0..50_u8 {
        let name = [b"\xff\xfe".as_slice(), &[b'a' + number % 26, b'a' + number / 26]].concat();
        std::fs::write(directory.path().join(OsStr::from_bytes(&name)), "").unwrap();
    }
    std::fs::write(directory.path().join("Base.VHDX"), "").unwrap();
    let child = directory.path().join("child.vhdx");
    let locator = ParentLocator::new(Guid::from_printed(1), &[(KEY_RELATIVE_PATH, ".\\base.vhdx")]);
    let wanted = ParentRequest { child: Some(&child), locator: &locator, depth: 0 };
    let found = FileResolver::new().allow_own_directory().resolve(&wanted).unwrap();
    assert_eq!(found[0].path.as_deref().and_then(|path| path.file_name()), Some(OsStr::new("Base.VHDX")));
}
