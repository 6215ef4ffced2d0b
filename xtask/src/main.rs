//! Development tasks: `cargo xtask ci | fuzz | peers | samples`.

mod ci;
#[cfg(test)]
mod document;
mod fuzz;
mod guest_seeds;
mod peers;
mod samples;
mod seeds;
mod shell;

use std::process::ExitCode;

/// What `cargo xtask` prints when it is asked for help, or for something it does not know.
const USAGE: &str = "\
cargo xtask ci [STEP...]                          the gate; steps: fmt clippy doc test test-release deny fuzz
cargo xtask fuzz [--seconds N] [TARGET...]        fuzz targets with address sanitizer (10 s each unless told)
cargo xtask peers [--rounds N] [--seconds N] [--dir DIR] [--write FILE] [FILTER...]
                                                  benchmarks beside cp, qemu-img and nbdkit, as a Markdown table
cargo xtask samples                               makes the images in samples/ again";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((task, rest)) = arguments.split_first() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let outcome = match task.as_str() {
        "ci" => ci::run(rest),
        "fuzz" => fuzz::run(rest),
        "peers" => peers::run(rest),
        // What a row of `peers` runs in a process of its own.
        "peers-work" => peers::work(rest),
        "samples" => samples::run(rest),
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => {
            eprintln!("xtask: there is no task \"{other}\"\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {task}: {error}");
            ExitCode::FAILURE
        }
    }
}
