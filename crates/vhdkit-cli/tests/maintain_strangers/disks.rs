//! File systems in raw files: made by mkfs, filled from a tree, emptied in part, unmounted, checked, and looked into.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vhdkit_testkit::Rng;
use vhdkit_testkit::foreign::{assert_success, run_tool};
use vhdkit_testkit::harness::Needs;

use crate::common::{MIB, Scratch};

/// A file system that strangers make, mount and check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// ext2, ext3 or ext4, with options of mke2fs.
    Ext(&'static [&'static str]),
    Xfs(&'static [&'static str]),
    Ntfs(&'static [&'static str]),
    Fat32,
    ExFat,
}

pub(crate) const EXT4: Kind = Kind::Ext(&["-t", "ext4"]);
pub(crate) const XFS: Kind = Kind::Xfs(&[]);
pub(crate) const NTFS: Kind = Kind::Ntfs(&[]);

impl Kind {
    /// The tools, for making and judging.
    pub(crate) fn tools(self) -> &'static [&'static str] {
        match self {
            Self::Ext(_) => &["mke2fs", "e2fsck", "dumpe2fs", "losetup", "mount", "umount", "diff"],
            Self::Xfs(_) => &["mkfs.xfs", "xfs_repair", "xfs_db", "losetup", "mount", "umount", "diff"],
            Self::Ntfs(_) => &["mkntfs", "ntfsfix", "ntfs-3g", "ntfsinfo", "ntfscat", "umount", "diff"],
            Self::Fat32 => &["mkfs.fat", "fsck.fat", "mcopy", "mdel", "diff"],
            Self::ExFat => &["mkfs.exfat", "fsck.exfat", "dump.exfat", "mount.exfat-fuse", "losetup", "umount", "diff"],
        }
    }

    /// What a test with it needs.
    pub(crate) fn needs(self, more: &[&str]) -> Needs {
        let needs = Needs::tools(&[self.tools(), more].concat());
        match self {
            Self::Fat32 => needs,
            Self::Ext(_) | Self::Xfs(_) => needs.and_root().and_file("/dev/loop-control"),
            Self::Ntfs(_) => needs.and_root().and_file("/dev/fuse"),
            Self::ExFat => needs.and_root().and_file("/dev/fuse").and_file("/dev/loop-control"),
        }
    }

    /// An empty one of so many MiB.
    pub(crate) fn make(self, path: &Path, mib: u64) {
        File::create(path).unwrap().set_len(mib * MIB).unwrap();
        let path = text(path);
        match self {
            Self::Ext(options) => tool("mke2fs", &[&["-q", "-F"], options, &[path]].concat()),
            Self::Xfs(options) => tool("mkfs.xfs", &[&["-q", "-f"], options, &[path]].concat()),
            Self::Ntfs(options) => {
                // Geometry and start are named, as it asks a device for them otherwise.
                tool("mkntfs", &[&["-q", "-F", "-p", "0", "-H", "255", "-S", "63"], options, &[path]].concat())
            }
            Self::Fat32 => tool("mkfs.fat", &["-F", "32", "-s", "1", path]),
            Self::ExFat => tool("mkfs.exfat", &[path]),
        };
    }

    /// Whether its own checker, which changes nothing, is content.
    #[track_caller]
    pub(crate) fn check(self, raw: &Path) {
        let raw = text(raw);
        match self {
            Self::Ext(_) => tool("e2fsck", &["-fn", raw]),
            Self::Xfs(_) => tool("xfs_repair", &["-n", "-f", raw]),
            Self::Ntfs(_) => {
                let said = tool("ntfsfix", &["-n", raw]);
                assert!(said.contains("was processed successfully"), "{said}");
                said
            }
            Self::Fat32 => tool("fsck.fat", &["-n", raw]),
            Self::ExFat => {
                let said = tool("fsck.exfat", &["-n", raw]);
                assert!(said.contains("clean"), "{said}");
                said
            }
        };
    }

    /// Mounts it, runs something on its root, unmounts it.
    fn mounted(self, scratch: &Scratch, raw: &Path, write: bool, work: impl FnOnce(&Path)) {
        let point = tempfile::tempdir_in(scratch.path()).unwrap().keep();
        let (raw, at) = (text(raw), text(&point));
        let access = if write { "rw" } else { "ro" };
        let mut device = None;
        match self {
            Self::Ext(_) => drop(tool("mount", &["-o", &format!("loop,{access}"), raw, at])),
            Self::Xfs(_) => drop(tool("mount", &["-o", &format!("loop,nouuid,{access}"), raw, at])),
            Self::Ntfs(_) => drop(tool("ntfs-3g", &["-o", access, raw, at])),
            Self::ExFat => {
                let attached = Attached::new(raw);
                // It stays in the background, and would keep our pipes open.
                let mut command = Command::new("mount.exfat-fuse");
                command.args(["-o", access, &attached.0, at]).stdin(Stdio::null()).stdout(Stdio::null());
                assert!(command.stderr(Stdio::null()).status().unwrap().success());
                device = Some(attached);
            }
            Self::Fat32 => unreachable!("there is no driver for it; its tools need none"),
        }
        let mount = Mount(point);
        work(&mount.0);
        let _ = Command::new("sync").arg("-f").arg(&mount.0).status();
        drop(mount);
        if let Some(device) = device {
            // The program behind FUSE writes the last of it after the unmounting.
            settle(&device.0);
        }
    }

    /// Copies a tree into it.
    pub(crate) fn fill(self, scratch: &Scratch, raw: &Path, tree: &Path) {
        match self {
            Self::Fat32 => {
                for entry in std::fs::read_dir(tree).unwrap() {
                    tool("mcopy", &["-s", "-i", text(raw), text(&entry.unwrap().path()), "::/"]);
                }
            }
            _ => self.mounted(scratch, raw, true, |point| {
                tool("cp", &["-r", &format!("{}/.", text(tree)), text(point)]);
            }),
        }
    }

    /// Deletes files from it.
    pub(crate) fn delete(self, scratch: &Scratch, raw: &Path, names: &[String]) {
        match self {
            Self::Fat32 => {
                for name in names {
                    tool("mdel", &["-i", text(raw), &format!("::/{name}")]);
                }
            }
            _ => self.mounted(scratch, raw, true, |point| {
                for name in names {
                    std::fs::remove_file(point.join(name)).unwrap();
                }
            }),
        }
    }

    /// Runs something while it is mounted.
    pub(crate) fn while_mounted(self, scratch: &Scratch, raw: &Path, work: impl FnOnce(&Path)) {
        self.mounted(scratch, raw, true, work);
    }

    /// Its files, below a folder that is there only for the while.
    pub(crate) fn files(self, scratch: &Scratch, raw: &Path, work: impl FnOnce(&Path)) {
        match self {
            Self::Fat32 => {
                let folder = tempfile::tempdir_in(scratch.path()).unwrap();
                tool("mcopy", &["-s", "-n", "-i", text(raw), "::/*", text(folder.path())]);
                work(folder.path());
            }
            _ => self.mounted(scratch, raw, false, work),
        }
    }

    /// Panics unless both have the same files with the same bytes, and at least one.
    #[track_caller]
    pub(crate) fn same_files(self, scratch: &Scratch, one: &Path, other: &Path) {
        self.files(scratch, one, |one| {
            assert!(std::fs::read_dir(one.join("kept")).unwrap().count() > 2);
            self.files(scratch, other, |other| drop(tool("diff", &["-r", "--no-dereference", text(one), text(other)])));
        });
    }
}

/// A mounted file system; unmounted with the test.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg(&self.0).status();
        assert!(std::thread::panicking() || ended.unwrap().success(), "{} stays mounted", self.0.display());
    }
}

/// A loop device, detached with the test.
struct Attached(String);

impl Attached {
    fn new(raw: &str) -> Self {
        Self(tool("losetup", &["--find", "--show", raw]).trim().to_owned())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Waits until nobody has the device open.
fn settle(device: &str) {
    let begun = Instant::now();
    loop {
        let holders = std::fs::read_dir("/proc").unwrap().filter(|process| {
            let Ok(process) = process else { return false };
            let Ok(files) = std::fs::read_dir(process.path().join("fd")) else { return false };
            files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target == Path::new(device)))
        });
        if holders.count() == 0 {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{device} is still in use");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A folder with two folders: files that stay, and files that are deleted later, the largest of them of `large` MiB.
pub(crate) fn tree(scratch: &Scratch, seed: u64, large: u64) -> PathBuf {
    let root = tempfile::tempdir_in(scratch.path()).unwrap().keep();
    let noise = Rng::new(seed).bytes(MIB as usize + 8192);
    for folder in ["kept", "gone"] {
        std::fs::create_dir(root.join(folder)).unwrap();
    }
    // Kept files lie between those that are deleted, so that used and free space alternate.
    for number in 0..24_usize {
        let size = 1 + (number * number * 7919 + number * 104_729) % (700 << 10);
        for folder in ["kept", "gone"] {
            let bytes = &noise[number * 16..number * 16 + size];
            std::fs::write(root.join(folder).join(format!("file{number:02}")), bytes).unwrap();
        }
    }
    let file = File::create(root.join("gone/large")).unwrap();
    for mib in 0..large {
        file.write_all_at(&noise[mib as usize % 4096..][..MIB as usize], mib * MIB).unwrap();
    }
    root
}

/// The names of what is deleted of a tree: everything in its second folder but two files.
pub(crate) fn gone() -> Vec<String> {
    (2..24).map(|number| format!("gone/file{number:02}")).chain(["gone/large".to_owned()]).collect()
}

/// One that was filled and emptied in part; it is in order.
pub(crate) fn used(scratch: &Scratch, name: &str, kind: Kind, mib: u64, large: u64) -> PathBuf {
    let raw = scratch.join(name);
    kind.make(&raw, mib);
    let tree = tree(scratch, mib, large);
    kind.fill(scratch, &raw, &tree);
    std::fs::remove_dir_all(tree).unwrap();
    kind.delete(scratch, &raw, &gone());
    kind.check(&raw);
    raw
}

/// Runs a tool that has to end well.
#[track_caller]
pub(crate) fn tool(name: &str, arguments: &[&str]) -> String {
    let output = run_tool(name, arguments);
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same where only the end matters.
#[track_caller]
pub(crate) fn tool_ends_well(name: &str, arguments: &[&str]) {
    assert_success(&run_tool(name, arguments));
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Copies bytes of one file into another; zeros leave holes where the file is new.
pub(crate) fn copy(from: (&Path, u64), to: (&Path, u64), length: u64) {
    let source = File::open(from.0).unwrap();
    let target = File::options().write(true).create(true).truncate(false).open(to.0).unwrap();
    let end = to.1 + length;
    if target.metadata().unwrap().len() < end {
        target.set_len(end).unwrap();
    }
    let mut buffer = vec![0; MIB as usize];
    let mut position = 0;
    while position < length {
        let count = (length - position).min(MIB) as usize;
        source.read_exact_at(&mut buffer[..count], from.1 + position).unwrap();
        if buffer[..count].iter().any(|byte| *byte != 0) {
            target.write_all_at(&buffer[..count], to.1 + position).unwrap();
        }
        position += count as u64;
    }
}
