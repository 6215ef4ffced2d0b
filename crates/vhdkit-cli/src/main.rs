//! The command `vhdkit`: look into, create, check, convert, write and serve VHDX disks.

mod args;
mod args_mending;
mod cli;
mod commands;
mod failure;
mod formats;
mod input;
mod map;
mod opening;
mod progress;
mod serving;
mod show;
mod signals;
mod sizes;
mod target;
mod ui;
mod writing;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(std::env::args_os().collect())
}
