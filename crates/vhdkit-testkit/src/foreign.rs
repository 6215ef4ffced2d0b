//! Foreign tools and the corpus of images that others wrote: strangers who judge our files.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

/// How long a foreign tool may run unless a test says otherwise.
pub const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// Whether an absent tool or corpus is a failure: the variable `VHDKIT_REQUIRE_TOOLS` is 1.
#[must_use]
pub fn tools_are_required() -> bool {
    std::env::var_os("VHDKIT_REQUIRE_TOOLS").is_some_and(|value| value == "1")
}

/// Finds an executable in `PATH` and in the directories of system tools.
#[must_use]
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|directory| directory.join(name)).find(|candidate| {
        candidate.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}

/// Like [`tool`], but an absent tool is a panic where tools are required.
#[must_use]
pub fn require_tool(name: &str) -> Option<PathBuf> {
    let found = tool(name);
    assert!(found.is_some() || !tools_are_required(), "{name} is not installed, and VHDKIT_REQUIRE_TOOLS is 1");
    found
}

/// Runs a command to its end and collects what it printed.
///
/// A command that runs longer than `timeout` is killed, and the error is of the kind `TimedOut`.
pub fn run(command: &mut Command, timeout: Duration) -> io::Result<Output> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{command:?} ran longer than {timeout:?}")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    };
    let collect = |thread: Option<std::thread::JoinHandle<Vec<u8>>>| {
        thread.map(|thread| thread.join().expect("the reader does not panic")).unwrap_or_default()
    };
    Ok(Output { status, stdout: collect(stdout), stderr: collect(stderr) })
}

/// Reads a pipe in a thread of its own, so that the tool never waits for us.
fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks has given what it had; the exit status tells the rest.
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// Runs a tool with the usual time limit; panics if it is absent or hangs.
pub fn run_tool<S: AsRef<OsStr>>(name: &str, arguments: &[S]) -> Output {
    let path = tool(name).unwrap_or_else(|| panic!("{name} is not installed"));
    run(Command::new(path).args(arguments), TOOL_TIMEOUT).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Runs `qemu-img`; panics if it is absent or hangs.
pub fn qemu_img<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    run_tool("qemu-img", arguments)
}

/// Panics with everything the tool printed unless it ended well.
#[track_caller]
pub fn assert_success(output: &Output) {
    assert!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The corpus: `VHDKIT_CORPUS`, or `shared/corpus` beside the workspace.
#[must_use]
pub fn corpus_dir() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let named = std::env::var_os("VHDKIT_CORPUS").map(PathBuf::from);
    named.into_iter().chain([beside]).find(|directory| directory.join("manifest.tsv").is_file())
}

/// The guest that `.ci/guest` prepares, a kernel and an initramfs: `VHDKIT_GUEST`, or `target/guest` of the workspace.
#[must_use]
pub fn guest_dir() -> Option<PathBuf> {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let named = std::env::var_os("VHDKIT_GUEST").map(PathBuf::from);
    // The stamp comes last when it is prepared.
    named.into_iter().chain([usual]).find(|directory| directory.join("stamp").is_file())
}

/// One image of the corpus, as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorpusRow {
    /// Path below the corpus, without `.gz`.
    pub name: String,
    /// `fixed`, `dynamic` or `differencing`.
    pub kind: String,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// Bytes of a payload block.
    pub block_size: u32,
    /// Bytes of a logical sector.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector.
    pub physical_sector_size: u32,
    /// Whether the log has to be replayed.
    pub dirty: bool,
    /// Name of the parent's row.
    pub parent: Option<String>,
    /// SHA-256 over the whole disk as the guest sees it.
    pub guest_sha256: String,
    /// SHA-256 over the file.
    pub file_sha256: String,
    /// The creator field; `(empty)` if there is none.
    pub creator: String,
}

/// The rows of the manifest; panics if there is no corpus or the manifest is not what it should be.
#[must_use]
pub fn corpus_manifest() -> Vec<CorpusRow> {
    let path = corpus_dir().expect("the corpus is there").join("manifest.tsv");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut lines = text.lines();
    let columns: Vec<&str> = lines.next().expect("the manifest has a head line").split('\t').collect();
    lines.map(|line| corpus_row(&columns, line)).collect()
}

fn corpus_row(columns: &[&str], line: &str) -> CorpusRow {
    let cells: Vec<&str> = line.split('\t').collect();
    let text = |name: &str| {
        let column = columns.iter().position(|column| *column == name);
        column.map(|column| cells[column].to_owned()).unwrap_or_else(|| panic!("the manifest has no column {name}"))
    };
    let number = |name: &str| text(name).parse::<u64>().unwrap_or_else(|error| panic!("{name} of {line}: {error}"));
    CorpusRow {
        name: text("name"),
        kind: text("type"),
        virtual_size: number("virtual_size"),
        block_size: number("block_size") as u32,
        logical_sector_size: number("logical_sector_size") as u32,
        physical_sector_size: number("physical_sector_size") as u32,
        dirty: text("log") == "dirty",
        parent: Some(text("parent")).filter(|parent| parent != "-"),
        guest_sha256: text("guest_sha256"),
        file_sha256: text("file_sha256"),
        creator: text("creator"),
    }
}

/// Decompresses an image and its parents below `directory`, sparse, and gives the path of the image.
///
/// Panics unless the bytes have the sum that the manifest names.
#[must_use]
pub fn unpack(row: &CorpusRow, directory: &Path) -> PathBuf {
    if let Some(parent) = &row.parent {
        let rows = corpus_manifest();
        let parent_row = rows.iter().find(|other| other.name == *parent).expect("the manifest names the parent");
        let _ = unpack(parent_row, directory);
    }
    let packed = corpus_dir().expect("the corpus is there").join(format!("{}.gz", row.name));
    let target = directory.join(&row.name);
    std::fs::create_dir_all(target.parent().expect("the target is in a directory")).expect("the directory can be made");
    let sum = unpack_file(&packed, &target).unwrap_or_else(|error| panic!("{}: {error}", packed.display()));
    assert_eq!(sum, row.file_sha256, "{} is not the file that the manifest names", packed.display());
    target
}

/// Decompresses one file, leaves holes for zeros, and gives the SHA-256 of the bytes.
fn unpack_file(packed: &Path, target: &Path) -> io::Result<String> {
    let mut source = flate2::read::MultiGzDecoder::new(File::open(packed)?);
    let file = File::create(target)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut offset = 0;
    loop {
        let count = read_full(&mut source, &mut buffer)?;
        if count == 0 {
            break;
        }
        let bytes = &buffer[..count];
        hash.update(bytes);
        if !crate::sparse::is_zero(bytes) {
            file.write_all_at(bytes, offset)?;
        }
        offset += count as u64;
    }
    file.set_len(offset)?;
    Ok(hexadecimal(&hash.finalize()))
}

/// Reads until the buffer is full or the source ends.
fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// The SHA-256 of everything that `source` gives, in lower-case hexadecimal digits.
pub fn sha256_reader(source: &mut impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = read_full(source, &mut buffer)?;
        if count == 0 {
            return Ok(hexadecimal(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

/// The SHA-256 of a file, in lower-case hexadecimal digits.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    sha256_reader(&mut File::open(path)?)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_is_found_or_absent() {
        assert!(tool("sh").is_some());
        assert_eq!(tool("no-such-tool-anywhere"), None);
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let started = Instant::now();
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn output_larger_than_a_pipe_arrives() {
        let output =
            run(Command::new("sh").args(["-c", "head -c 300000 /dev/zero; echo no >&2; exit 3"]), TOOL_TIMEOUT);
        let output = output.unwrap();
        assert_eq!(output.stdout.len(), 300_000);
        assert_eq!(output.stderr, b"no\n");
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn sums_are_those_of_the_standard() {
        let sum = sha256_reader(&mut &b"abc"[..]).unwrap();
        assert_eq!(sum, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn a_row_is_read_by_the_names_of_its_columns() {
        let columns = [
            "log",
            "name",
            "type",
            "virtual_size",
            "block_size",
            "logical_sector_size",
            "physical_sector_size",
            "parent",
            "guest_sha256",
            "file_sha256",
            "creator",
        ];
        let row = corpus_row(&columns, "dirty\ta/b.vhdx\tdynamic\t4096\t1048576\t512\t4096\t-\taa\tbb\t(empty)");
        assert_eq!((row.name.as_str(), row.virtual_size, row.dirty, row.parent), ("a/b.vhdx", 4096, true, None));
    }
}
