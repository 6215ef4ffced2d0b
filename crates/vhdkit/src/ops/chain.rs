//! Chains of images as they lie in directories: who is whose parent, and who looks for one in vain.

mod children;
mod files;

pub use children::{Child, ChildLink, Children, ParentFile, directory_of, find_children};
