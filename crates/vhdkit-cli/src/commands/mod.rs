//! One module for each command: arguments in, answer out.

pub(crate) mod apply;
pub(crate) mod chain;
pub(crate) mod check;
pub(crate) mod clear;
pub(crate) mod compact;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod create;
pub(crate) mod dependents;
pub(crate) mod diff;
pub(crate) mod info;
pub(crate) mod layout;
pub(crate) mod manual;
pub(crate) mod map;
pub(crate) mod measure;
pub(crate) mod merge;
pub(crate) mod read;
pub(crate) mod recover;
pub(crate) mod repair;
pub(crate) mod reparent;
pub(crate) mod replay;
pub(crate) mod resize;
pub(crate) mod serve;
pub(crate) mod set;
pub(crate) mod write;
