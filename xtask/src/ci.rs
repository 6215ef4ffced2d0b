//! The gate. Every step runs even when an earlier one failed, so that one run shows everything.

use std::time::Instant;

use crate::shell::{self, Outcome, cargo, find, root};

/// Seconds of fuzzing for each target: enough to run the seeds and notice a target that breaks at once.
const FUZZ_SECONDS: u64 = 15;

type Step = (&'static str, fn() -> Outcome);

const STEPS: [Step; 7] = [
    ("fmt", fmt),
    ("clippy", clippy),
    ("doc", doc),
    ("test", test),
    ("test-release", test_release),
    ("deny", deny),
    ("fuzz", fuzz),
];

/// Runs the named steps, or all of them.
fn run_steps(names: &[String]) -> Outcome<Vec<&'static str>> {
    if let Some(unknown) = names.iter().find(|name| STEPS.iter().all(|(step, _)| step != name)) {
        return Err(format!("there is no step \"{unknown}\"").into());
    }
    let mut failed = Vec::new();
    for (name, step) in STEPS.iter().filter(|(name, _)| names.is_empty() || names.iter().any(|wanted| wanted == name)) {
        eprintln!("== {name}");
        let start = Instant::now();
        match step() {
            Ok(()) => eprintln!("== {name}: ok, {:.1} s", start.elapsed().as_secs_f64()),
            Err(error) => {
                eprintln!("== {name}: FAILED: {error}");
                failed.push(*name);
            }
        }
    }
    Ok(failed)
}

/// The task `ci`.
pub(crate) fn run(names: &[String]) -> Outcome {
    let failed = run_steps(names)?;
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", ")).into()) }
}

fn in_root(arguments: &[&str]) -> Outcome {
    shell::run(cargo().args(arguments).current_dir(root()?))
}

fn fmt() -> Outcome {
    in_root(&["fmt", "--all", "--check"])?;
    shell::run(cargo().args(["fmt", "--all", "--check"]).current_dir(root()?.join("fuzz")))
}

fn clippy() -> Outcome {
    in_root(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
}

/// The command is left out: its documentation would overwrite the library's, which has the same name.
fn doc() -> Outcome {
    let arguments =
        ["doc", "--workspace", "--exclude", "vhdkit-cli", "--no-deps", "--locked", "--document-private-items"];
    shell::run(cargo().args(arguments).env("RUSTDOCFLAGS", "-D warnings").current_dir(root()?))
}

fn test() -> Outcome {
    in_root(&["test", "--workspace", "--locked"])
}

/// Test programs that go through more states without debug assertions, as users run the library, than with them. The others
/// would find there what they find in the other run, and cost a quarter of an hour.
const RELEASE_TESTS: [&str; 6] =
    ["crash", "crash_ops", "apply_crash", "maintain_model", "write_model", "write_threads"];

/// Without debug assertions. Linked plainly: link-time optimization of the test programs would take longer than the tests.
fn test_release() -> Outcome {
    let mut command = cargo();
    command.args(["test", "--package", "vhdkit", "--release", "--locked", "--lib"]);
    command.args(RELEASE_TESTS.iter().flat_map(|name| ["--test", name]));
    command.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    shell::run(command.current_dir(root()?))
}

/// Licences, sources and banned crates; advisories would need a download.
fn deny() -> Outcome {
    if find("cargo-deny").is_none() {
        eprintln!("cargo-deny is not installed: skipped");
        return Ok(());
    }
    in_root(&["deny", "--offline", "check", "licenses", "bans", "sources"])
}

fn fuzz() -> Outcome {
    crate::fuzz::fuzz(FUZZ_SECONDS, &[])
}
