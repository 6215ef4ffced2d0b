//! Images that the command makes, read by programs that share no code with it: 7-Zip, libvhdi and QEMU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vhdkit_testkit::foreign::{assert_success, run_tool, sha256_file, sha256_reader};
use vhdkit_testkit::harness::{Case, Needs, main_with};
use vhdkit_testkit::pattern;

const MIB: u64 = 1 << 20;

/// How an image is made: a name, the size of the disk, and the options. 7-Zip refuses a size in which the bit of the
/// sector size is set, although it is a multiple of it; so the odd sizes here are multiples of 1024.
const LAYOUTS: [(&str, u64, &[&str]); 5] = [
    ("dynamic", 40 * MIB + 1024, &["--block-size", "1M"]),
    ("dynamic_by_default", 40 * MIB, &[]),
    ("fixed", 21 * MIB, &["--fixed"]),
    ("sectors_of_4096", 40 * MIB, &["--logical-sector-size", "4096"]),
    // More than one chunk: bitmap entries stand between the payload entries of the BAT.
    ("over_a_chunk", (5 << 30) + 1024, &["--block-size", "8M"]),
];

fn vhdkit(arguments: &[&str], directory: &Path) {
    let output = Command::new(env!("CARGO_BIN_EXE_vhdkit")).args(arguments).current_dir(directory).output().unwrap();
    assert_success(&output);
}

/// A raw disk with data at both ends and at a few places between, and the image made of it.
fn made(directory: &Path, size: u64, options: &[&str]) -> PathBuf {
    let raw = File::create(directory.join("disk.raw")).unwrap();
    raw.set_len(size).unwrap();
    let mut bytes = vec![0; 64 << 10];
    for place in [0, size / 3, size / 2, size - bytes.len() as u64] {
        let place = place - place % 512;
        pattern(7, place / 512, &mut bytes);
        raw.write_all_at(&bytes, place).unwrap();
    }
    let mut arguments = vec!["convert", "--quiet", "disk.raw", "disk.vhdx"];
    arguments.extend(options);
    vhdkit(&arguments, directory);
    directory.join("disk.vhdx")
}

/// What 7-Zip reads from an image has the hash of the raw disk.
fn seven_zip(image: &Path, raw: &Path) {
    let image = image.to_str().unwrap();
    let mut program = Command::new("7z");
    program.args(["x", "-so", image]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = program.spawn().unwrap();
    let hash = sha256_reader(running.stdout.as_mut().unwrap()).unwrap();
    let status = running.wait().unwrap();
    assert!(status.success(), "7z: {status}");
    assert_eq!(hash, sha256_file(raw).unwrap());
}

/// A mount that ends with the test.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// What libvhdi shows of an image has the hash of the raw disk.
fn libvhdi(image: &Path, raw: &Path) {
    let point = image.with_extension("mount");
    std::fs::create_dir(&point).unwrap();
    assert_success(&run_tool("vhdimount", &[image, &point]));
    let mount = Mount(point);
    assert_eq!(sha256_file(&mount.0.join("vhdi1")).unwrap(), sha256_file(raw).unwrap());
}

/// An empty child reads as its parent, and 7-Zip finds the way; it does not follow `..`, so both lie side by side.
fn chain() {
    let directory = tempfile::tempdir().unwrap();
    made(directory.path(), 9 * MIB, &["--block-size", "1M"]);
    vhdkit(&["create", "one.vhdx", "--parent", "disk.vhdx"], directory.path());
    vhdkit(&["create", "two.avhdx", "--parent", "one.vhdx"], directory.path());
    seven_zip(&directory.path().join("one.vhdx"), &directory.path().join("disk.raw"));
    vhdkit(&["compare", "two.avhdx", "disk.raw"], directory.path());
}

fn qemu(program: &str, arguments: &[&str], directory: &Path) {
    assert_success(&Command::new(program).args(arguments).current_dir(directory).output().unwrap());
}

/// What QEMU changed comes into a copy of the base, and QEMU finds no difference.
fn increments_of_what_qemu_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    made(at, 40 * MIB, &["--block-size", "1M"]);
    std::fs::copy(at.join("disk.vhdx"), at.join("target.vhdx")).unwrap();
    for (day, changes) in [
        ("monday", ["write -P 7 1M 3M", "write -P 9 20971008 1024", "write -z 13M 2M"]),
        ("tuesday", ["write -P 8 2M 4k", "write -z 0 64k", "write -P 1 39M 1M"]),
    ] {
        std::fs::copy(at.join("disk.vhdx"), at.join("newer.vhdx")).unwrap();
        let commands = changes.iter().flat_map(|change| ["-c", *change]);
        let arguments: Vec<&str> = ["-f", "vhdx"].into_iter().chain(commands).chain(["newer.vhdx"]).collect();
        qemu("qemu-io", &arguments, at);
        vhdkit(&["diff", "disk.vhdx", "newer.vhdx", "--export", day], at);
        vhdkit(&["apply", day, "target.vhdx", "--verify"], at);
        qemu("qemu-img", &["check", "-f", "vhdx", "target.vhdx"], at);
        qemu("qemu-img", &["compare", "-f", "vhdx", "-F", "vhdx", "target.vhdx", "newer.vhdx"], at);
        std::fs::rename(at.join("newer.vhdx"), at.join("disk.vhdx")).unwrap();
    }
}

/// A chain of children, each written to, exported, and applied to a copy of the base one after another.
fn increments_of_a_chain() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    made(at, 40 * MIB, &["--block-size", "1M"]);
    std::fs::copy(at.join("disk.vhdx"), at.join("target.vhdx")).unwrap();
    let mut parent = "disk.vhdx".to_owned();
    for level in 1..=4_u64 {
        let child = format!("{level}.avhdx");
        vhdkit(&["create", &child, "--parent", &parent, "--block-size", "2M"], at);
        let mut bytes = vec![0; 100_000];
        pattern(level, 0, &mut bytes);
        std::fs::write(at.join("piece"), bytes).unwrap();
        let (offset, zeroed) = ((level * 7 * MIB + 512).to_string(), (level * 5 * MIB + 4096).to_string());
        vhdkit(&["write", &child, "--offset", &offset, "--input", "piece"], at);
        vhdkit(&["zero", &child, "--offset", &zeroed, "--length", "3M"], at);
        let file = format!("{level}.increment");
        vhdkit(&["diff", &child, "--export", &file], at);
        // Beside the chain the target would be taken for the parent of nobody: it is a copy.
        vhdkit(&["apply", &file, "target.vhdx"], at);
        vhdkit(&["convert", &child, "flat.raw", "--force"], at);
        qemu("qemu-img", &["check", "-f", "vhdx", "target.vhdx"], at);
        qemu("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", "target.vhdx", "flat.raw"], at);
        parent = child;
    }
}

fn main() {
    let qemu = || Needs::tools(&["qemu-img", "qemu-io"]);
    let mut cases = vec![
        Case::new("7z_reads_a_chain", Needs::tools(&["7z"]), chain),
        Case::new("qemu_compares_increments_of_what_it_wrote", qemu(), increments_of_what_qemu_wrote),
        Case::new("qemu_compares_increments_of_a_chain", qemu(), increments_of_a_chain),
    ];
    for (name, size, options) in LAYOUTS {
        // libvhdi misreads fixed images over one chunk; ours is below.
        for (tool, needs, read) in [
            ("7z", Needs::tools(&["7z"]), seven_zip as fn(&Path, &Path)),
            ("libvhdi", Needs::tools(&["vhdimount", "umount"]).and_root(), libvhdi),
        ] {
            let run = move || {
                let directory = tempfile::tempdir().unwrap();
                let image = made(directory.path(), size, options);
                read(&image, &directory.path().join("disk.raw"));
            };
            cases.push(Case::new(format!("{tool}_reads_{name}"), needs, run));
        }
    }
    main_with(cases);
}
