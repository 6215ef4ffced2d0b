//! What the tests of the command line share: running the program, files to run it on, and judging what it says.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::big_endian_bytes,
    reason = "test code"
)]

pub(crate) mod server;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use vhdkit_testkit::builder::{BuiltImage, ImageBuilder};
use vhdkit_testkit::dirty::DirtyPlan;
use vhdkit_testkit::foreign;

/// How long any run in these tests may take, however busy the machine is.
const TIMEOUT: Duration = Duration::from_secs(60);
pub(crate) const MIB: u64 = 1 << 20;

/// A run that ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    pub(crate) fn new(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            stdout: output.stdout,
        }
    }

    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }

    /// The error on standard error as JSON.
    #[track_caller]
    pub(crate) fn json_error(&self) -> Value {
        let line = self.err.lines().last().unwrap_or_default();
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {}", self.err));
        value["error"].clone()
    }

    /// Everything was said, and nothing on standard error.
    #[track_caller]
    pub(crate) fn silent(self) -> Self {
        assert_eq!(self.err, "");
        self
    }
}

/// A directory for one test.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// The command in this directory.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhdkit"));
        command.args(arguments).current_dir(self.path()).env("LC_ALL", "C").env_remove("NO_COLOR");
        command
    }

    /// Runs the program in this directory with nothing on standard input.
    #[track_caller]
    pub(crate) fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Run {
        Run::new(foreign::run(&mut self.command(arguments), TIMEOUT).unwrap())
    }

    /// Runs the program with these bytes on standard input.
    #[track_caller]
    pub(crate) fn pipe(&self, arguments: &[&str], bytes: &[u8]) -> Run {
        let mut command = self.command(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let _ = stdin.write_all(bytes); // given up early when there is something wrong
        drop(stdin);
        Run::new(child.wait_with_output().unwrap())
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The names in the directory, hidden ones too.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// The sum of every regular file in the directory.
    pub(crate) fn sums(&self) -> BTreeMap<String, String> {
        let files = self.names().into_iter().filter(|name| self.join(name).is_file());
        files.map(|name| (name.clone(), foreign::sha256_file(&self.join(name)).unwrap())).collect()
    }

    /// A dynamic image of 8 MiB with data in its second and fifth block.
    pub(crate) fn image(&self, name: &str) -> BuiltImage {
        let built = dynamic().build();
        built.write_to(&self.join(name)).unwrap();
        built
    }

    /// `base.vhdx` and `child.vhdx`.
    pub(crate) fn chain(&self) -> BuiltImage {
        let base = Arc::new(dynamic().named("base.vhdx").build());
        let child = ImageBuilder::new(8 * MIB, MIB as u32).named("child.vhdx").differencing(&base).pattern_block(2, 77);
        let child = child.build();
        child.write_chain(self.path()).unwrap();
        child
    }

    /// An increment that changes nothing in the images that [`Self::image`] makes.
    pub(crate) fn increment(&self, name: &str) {
        let side = |guid| vhdkit::format::increment::Side {
            data_write_guid: Some(guid),
            disk_id: None,
            size: 8 * MIB,
            logical_sector_size: 512,
            physical_sector_size: 4096,
        };
        let image = vhdkit::image::OpenOptions::new().open_path(&self.join("good.vhdx")).unwrap();
        let base = side(image.layers()[0].headers().current.data_write_guid);
        let mut bytes = Vec::new();
        let options = vhdkit::ops::diff::ExportOptions::default();
        vhdkit::ops::diff::export((&image, base), (&image, base), &mut bytes, &options, &()).unwrap();
        self.write(name, &bytes);
    }

    /// An image whose log holds its BAT and metadata.
    pub(crate) fn dirty(&self, name: &str) -> BuiltImage {
        let mut built = dynamic().build();
        let plan = DirtyPlan::new(5).move_bat(&built).move_metadata(&built);
        plan.apply(&mut built);
        built.write_to(&self.join(name)).unwrap();
        built
    }
}

/// The image that most tests use.
pub(crate) fn dynamic() -> ImageBuilder {
    ImageBuilder::new(8 * MIB, MIB as u32).pattern_block(1, 11).pattern_block(4, 44)
}

/// All bytes of a disk.
pub(crate) fn disk_bytes(built: &BuiltImage) -> Vec<u8> {
    built.model.read(0, (8 * MIB) as usize)
}

/// Bytes that are no image, the same each time.
pub(crate) fn junk(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

/// Makes a FIFO.
pub(crate) fn make_fifo(path: &Path) {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}
