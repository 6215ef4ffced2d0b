//! Fuzz targets, with seeds from the testkit's image builder and address sanitizer.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::seeds;
use crate::shell::{self, Outcome, find, root};

/// The targets of `fuzz/`.
pub(crate) const TARGETS: [&str; 8] = ["decode", "open", "locator", "model", "nbd", "filesystems", "apply", "recover"];

/// Longest input that libFuzzer makes: the fuzz format of `open` describes a file in few bytes.
const INPUT_BYTES_MAX: u32 = 32 << 10;
/// The same for `model`: the operations of one program.
const PROGRAM_BYTES_MAX: u32 = 512;

/// Memory that a target may take at most, in MiB; the sanitizer itself needs some hundred.
const MEMORY_MIB_MAX: u32 = 1024;

/// Seconds that one input may take at most.
const INPUT_SECONDS_MAX: u32 = 10;

/// The task `fuzz`.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let mut seconds = 10;
    let mut targets = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--seconds" {
            seconds =
                words.next().ok_or("--seconds needs a number")?.parse().map_err(|_| "--seconds needs a number")?;
        } else if TARGETS.contains(&word.as_str()) {
            targets.push(word.as_str());
        } else {
            return Err(format!("there is no target \"{word}\"; there are {}", TARGETS.join(", ")).into());
        }
    }
    fuzz(seconds, &targets)
}

/// Runs the named targets, or all, for so many seconds each.
pub(crate) fn fuzz(seconds: u64, targets: &[&str]) -> Outcome {
    let program = cargo_fuzz()?;
    let folder = root()?.join("fuzz");
    let mut failed = Vec::new();
    for target in TARGETS.iter().filter(|target| targets.is_empty() || targets.contains(target)) {
        let corpus = folder.join("corpus").join(target);
        fs::create_dir_all(&corpus)?;
        let seeds = seeds::write(target, &folder.join("seeds").join(target))?;
        eprintln!("{target}: {seeds} seeds");
        let mut command = Command::new(&program);
        command.args(["fuzz", "run", target]).arg(format!("corpus/{target}")).arg(format!("seeds/{target}"));
        let length = if *target == "model" { PROGRAM_BYTES_MAX } else { INPUT_BYTES_MAX };
        command.arg("--").arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={length}"));
        command.arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}")).arg(format!("-timeout={INPUT_SECONDS_MAX}"));
        command.arg("-print_final_stats=1").arg("-verbosity=0").current_dir(&folder);
        // The sanitizer is not stable yet; nothing but the fuzz targets may be built with this.
        command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", shell::target_dir()?.join("fuzz"));
        match run_quietly(&mut command)? {
            Ok(summary) => println!("{target}: ok, {summary}"),
            Err(said) => {
                eprintln!("{said}\n{target}: FAILED");
                failed.push(*target);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("fuzz targets failed: {}", failed.join(", ")).into()) }
}

/// The program cargo-fuzz, wherever it is installed.
fn cargo_fuzz() -> Outcome<PathBuf> {
    let tools = shell::target_dir()?.join("tools/bin/cargo-fuzz");
    if tools.is_file() {
        return Ok(tools);
    }
    find("cargo-fuzz").ok_or_else(|| "cargo-fuzz is missing: cargo install cargo-fuzz --locked --version 0.13.2".into())
}

/// Lines that are shown of a run that failed, besides those that name a panic.
const LINES_SHOWN: usize = 60;
/// How much of a line is shown: libFuzzer prints whole inputs.
const LINE_CHARACTERS_SHOWN: usize = 400;

/// Runs a target; gives its figures, or the end of what it said.
fn run_quietly(command: &mut Command) -> Outcome<Result<String, String>> {
    eprintln!("+ {}", shell::shown(command));
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    if !output.status.success() {
        let skipped = lines.len().saturating_sub(LINES_SHOWN);
        let panics = lines.iter().take(skipped).filter(|line| line.contains("panicked at"));
        let cut = |line: &&str| line.chars().take(LINE_CHARACTERS_SHOWN).collect::<String>();
        let shown: Vec<String> = panics.chain(lines.iter().skip(skipped)).map(cut).collect();
        return Ok(Err(shown.join("\n")));
    }
    let figure = |name: &str| {
        let line = lines.iter().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        line.map_or("?", |line| line.trim_start_matches(':').trim()).to_owned()
    };
    let (runs, peak) = (figure("number_of_executed_units"), figure("peak_rss_mb"));
    Ok(Ok(format!("{runs} inputs, {peak} MiB at most")))
}
