//! Commands that change the structure of images, on odd files and names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]
#![allow(dead_code, reason = "every test file uses a part of the shared module")]

mod common;

use common::Scratch;

/// A parent is looked for where a link to its child leads, so that is where the way to it begins.
#[test]
fn a_child_gets_its_parent_through_a_link() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.join("a")).unwrap();
    std::fs::create_dir(scratch.join("b")).unwrap();
    scratch.run(&["create", "a/base.vhdx", "16M"]).expect(0);
    scratch.run(&["create", "a/child.vhdx", "--parent", "a/base.vhdx"]).expect(0);
    std::fs::rename(scratch.join("a/base.vhdx"), scratch.join("a/moved.vhdx")).unwrap();
    std::os::unix::fs::symlink("../a/child.vhdx", scratch.join("b/link.vhdx")).unwrap();
    scratch.run(&["reparent", "b/link.vhdx", "a/moved.vhdx"]).expect(0);
    scratch.run(&["read", "a/child.vhdx", "--length", "512"]).expect(0);
}
