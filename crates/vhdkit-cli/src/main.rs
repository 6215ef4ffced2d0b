//! The command `vhdkit`.

fn main() {}
