//! The command `vhdkit`: look into, create, check and convert VHDX disks.

mod args;
mod cli;
mod commands;
mod failure;
mod formats;
mod map;
mod opening;
mod progress;
mod show;
mod signals;
mod sizes;
mod target;
mod ui;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(std::env::args_os().collect())
}
