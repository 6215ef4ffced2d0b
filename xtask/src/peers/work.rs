//! What a row runs in a process of its own: `cargo xtask peers-work syncs | memory IMAGE COUNT`, and the servers
//! `peers-work nbd-prototype SOCKET FILE` and `peers-work nbd-null | nbd-null-simple SOCKET BYTES`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vhdkit::image::{BlockDevice as _, OpenOptions};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit::units::MIB;
use vhdkit_testkit::CountingStorage;

use super::nbd_plain;
use crate::shell::{Outcome, shown};

/// Bytes of each write.
pub(super) const WRITE_BYTES: usize = 4096;

/// The task `peers-work`.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    let [what, image, count] = arguments else { return Err("needs WORK IMAGE COUNT".into()) };
    if what == "nbd-prototype" {
        return nbd_plain::prototype(Path::new(image), Path::new(count));
    }
    let count = count.parse().map_err(|_| "COUNT has to be a number")?;
    match what.as_str() {
        "syncs" => syncs(Path::new(image), count),
        "memory" => memory(Path::new(image), count),
        "nbd-null" => nbd_plain::null(Path::new(image), count, true),
        "nbd-null-simple" => nbd_plain::null(Path::new(image), count, false),
        other => Err(format!("there is no work \"{other}\"").into()),
    }
}

/// The command that runs such work.
pub(super) fn command(what: &str, image: &Path, count: u64) -> Outcome<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("peers-work").arg(what).arg(image).arg(count.to_string());
    Ok(command)
}

/// The same as one would type it.
pub(super) fn line(what: &str, image: &Path, count: u64) -> String {
    shown(Command::new("cargo").args(["xtask", "peers-work", what]).arg(image).arg(count.to_string()))
}

/// Opens, writes to the first so many blocks of 1 MiB with a flush after each, and closes; prints the syncs that the
/// storage was asked for.
fn syncs(path: &Path, count: u64) -> Outcome {
    let file = Arc::new(FileStorage::open(path, FileAccess::Write, Sharing::Normal)?);
    let counting = Arc::new(CountingStorage::new(file));
    let storage: Arc<dyn Storage> = counting.clone();
    let image = OpenOptions::new().write(true).open(storage, None)?;
    for block in 0..count {
        image.write_at(&[0x5a; WRITE_BYTES], block * MIB)?;
        image.flush()?;
    }
    image.close()?;
    println!("{}", counting.syncs());
    Ok(())
}

/// Opens, writes to so many blocks all over the disk, and flushes; prints the largest resident set up to then, in KiB.
fn memory(path: &Path, count: u64) -> Outcome {
    let image = OpenOptions::new().write(true).open_path(path)?;
    let blocks = image.size() / image.allocation_unit();
    for number in 0..count {
        let block = blocks / count * number; // more than 512 apart: each in a page of the BAT of its own
        image.write_at(&[0x5a; WRITE_BYTES], block * image.allocation_unit())?;
    }
    image.flush()?;
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("the kernel tells no VmHWM")?;
    println!("{}", peak.trim().trim_end_matches(" kB"));
    image.close()?;
    Ok(())
}
