//! Random 4 KiB reads inside this process.

use super::{Bench, Row};
use crate::shell::Outcome;

pub(crate) fn one_thread(bench: &Bench) -> Outcome<Row> {
    let _ = bench;
    Err("not written".into())
}

pub(crate) fn two_threads(bench: &Bench) -> Outcome<Row> {
    let _ = bench;
    Err("not written".into())
}
