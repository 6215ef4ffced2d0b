//! Real file systems on a served disk: made, filled, emptied in part, trimmed, unmounted, checked, and mounted again.
//!
//! ```text
//!   vhdkit serve  <- NBD ->  nbdfuse or qemu-storage-daemon  <- FUSE ->  loop device  <->  the kernel's ext4 or XFS
//! ```

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use vhdkit_testkit::foreign::{assert_success, run_tool};
use vhdkit_testkit::harness::{Case, Needs};

use crate::common::{MIB, Scratch};
use crate::server::{Server, WRITE, end, kill, wait_until};

/// A disk with a file system, and how it is used.
#[derive(Clone, Copy, Debug)]
struct Plan {
    shower: Shower,
    size: &'static str,
    /// Bytes of a sector, of the disk and of the loop device: it sends nothing smaller then.
    sector: &'static str,
    make: &'static [&'static str],
    checker: &'static [&'static str],
}

/// Copies of the source tree, and how many of them are deleted again.
const COPIES: usize = 12;
const DELETED: usize = 8;

/// A program that shows what a server serves as a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shower {
    Nbdfuse,
    StorageDaemon,
}

impl Shower {
    fn tool(self) -> &'static str {
        match self {
            Self::Nbdfuse => "nbdfuse",
            Self::StorageDaemon => "qemu-storage-daemon",
        }
    }

    fn command(self, socket: &Path, point: &Path, read_only: bool) -> Command {
        let mut command = Command::new(self.tool());
        match self {
            Self::Nbdfuse => {
                command.args(read_only.then_some("--readonly")).arg(point).arg("--unix").arg(socket);
            }
            Self::StorageDaemon => {
                let (read, write) = if read_only { ("on", "off") } else { ("off", "on") };
                let node = format!("driver=nbd,node-name=disk,read-only={read},discard=unmap,server.type=unix");
                command.arg("--blockdev").arg(format!("{node},server.path={}", socket.display()));
                let export = format!("type=fuse,id=export,node-name=disk,writable={write}");
                command.arg("--export").arg(format!("{export},mountpoint={}", point.display()));
            }
        }
        command
    }
}

/// A file that is the disk. Gone with the test.
struct Shown {
    child: Child,
    file: PathBuf,
}

impl Shown {
    fn new(scratch: &Scratch, shower: Shower, socket: &Path, read_only: bool) -> Self {
        let file = scratch.write("shown", b"");
        let mut command = shower.command(socket, &file, read_only);
        let shown = Self { child: command.stdin(Stdio::null()).spawn().unwrap(), file };
        wait_until("a file that shows the disk", || shown.file.metadata().is_ok_and(|file| file.len() > 0));
        shown
    }

    /// Unmounts it; whoever shows it gives everything to the server before it ends.
    fn end(mut self) {
        assert_success(&run_tool("umount", &[&self.file]));
        // One of the two ends by itself then.
        let mut ended = false;
        for _ in 0..50 {
            ended |= self.child.try_wait().unwrap().is_some();
            if ended {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        if !ended {
            end(&mut self.child);
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", "--quiet"]).arg(&self.file).stderr(Stdio::null()).status();
        kill(&mut self.child);
    }
}

/// A file system that is mounted from a file, and the loop device between the two. Gone with the test.
struct Mounted {
    device: String,
    point: PathBuf,
    ended: bool,
}

impl Mounted {
    /// Attaches the file and makes a file system in it first when there is a command for that.
    fn new(scratch: &Scratch, file: &Path, sector: &str, make: Option<&[&str]>) -> Self {
        let mut arguments = vec!["--find", "--show", "--sector-size", sector, file.to_str().unwrap()];
        arguments.extend(make.is_none().then_some("--read-only"));
        let output = run_tool("losetup", &arguments);
        assert_success(&output);
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let point = scratch.join("mounted");
        std::fs::create_dir_all(&point).unwrap();
        let mounted = Self { device, point, ended: false };
        if let Some([tool, options @ ..]) = make {
            assert_success(&run_tool(tool, &[options, &[&mounted.device]].concat()));
        }
        let options = if make.is_none() { "ro" } else { "rw" };
        assert_success(&run_tool("mount", &["-o", options, &mounted.device, mounted.point.to_str().unwrap()]));
        mounted
    }

    /// Unmounts and mounts again: XFS frees some of what was deleted only then, in its own time otherwise.
    fn again(&self) {
        assert_success(&run_tool("umount", &[&self.point]));
        assert_success(&run_tool("mount", &[&self.device, self.point.to_str().unwrap()]));
    }

    fn path(&self, name: &str) -> String {
        self.point.join(name).to_str().unwrap().to_owned()
    }

    /// Unmounts it, asks a checker, and lets the file go.
    fn end(mut self, checker: &[&str]) {
        assert_success(&run_tool("umount", &[&self.point]));
        let (tool, options) = checker.split_first().unwrap();
        assert_success(&run_tool(tool, &[options, &[self.device.as_str()]].concat()));
        assert_success(&run_tool("losetup", &["--detach", &self.device]));
        self.ended = true;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Only after a failure is there something to undo; otherwise the device may be another test's by now.
        if !self.ended {
            let _ = Command::new("umount").arg("--quiet").arg(&self.point).stderr(Stdio::null()).status();
            let _ = Command::new("losetup").args(["--detach", &self.device]).stderr(Stdio::null()).status();
        }
    }
}

/// Bytes that a file takes on its medium.
fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

fn same_tree(left: &str, right: &str) {
    assert_success(&run_tool("diff", &["-r", left, right]));
}

fn file_system(plan: Plan) {
    let scratch = Scratch::new();
    let source = scratch.join("source");
    let source = source.to_str().unwrap();
    // A copy, as somebody may be working in the workspace.
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    assert_success(&run_tool("cp", &["-r", workspace, source]));
    let create = ["create", "disk.vhdx", "--size", plan.size, "--block-size", "1M", "--quiet"];
    scratch.run(&[&create[..], &["--logical-sector-size", plan.sector]].concat()).expect(0);
    let image = scratch.join("disk.vhdx");
    let (server, socket) = Server::on_socket(&scratch, "disk.vhdx", WRITE);
    let shown = Shown::new(&scratch, plan.shower, &socket, false);
    let mounted = Mounted::new(&scratch, &shown.file, plan.sector, Some(plan.make));
    for copy in 0..COPIES {
        assert_success(&run_tool("cp", &["-r", source, &mounted.path(&format!("copy{copy}"))]));
    }
    mounted.again();
    let full = allocated(&image);
    for copy in 0..DELETED {
        std::fs::remove_dir_all(mounted.path(&format!("copy{copy}"))).unwrap();
    }
    mounted.again();
    let before = allocated(&image);
    assert_success(&run_tool("fstrim", &[mounted.path("")]));
    mounted.end(plan.checker);
    shown.end();
    server.end();
    // What is freed is given back by the commit after the one that frees it, so by closing at the latest.
    let after = allocated(&image);
    println!("allocated: {full} with everything, {before} before fstrim, {after} after it");
    assert!(after + 8 * MIB < before, "fstrim gave nothing back: {before} before, {after} after");
    scratch.run(&["check", "disk.vhdx"]).expect(0);
    let (server, socket) = Server::on_socket(&scratch, "disk.vhdx", &[]);
    let shown = Shown::new(&scratch, plan.shower, &socket, true);
    let mounted = Mounted::new(&scratch, &shown.file, plan.sector, None);
    for copy in 0..COPIES {
        let path = mounted.path(&format!("copy{copy}"));
        assert_eq!(Path::new(&path).exists(), copy >= DELETED, "{path}");
        if copy >= DELETED {
            same_tree(source, &path);
        }
    }
    mounted.end(plan.checker);
    shown.end();
    server.end();
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, plan: Plan| {
        let common = ["cp", "diff", "losetup", "mount", "umount", "fstrim", plan.shower.tool()];
        let needs = Needs::tools(&[&common[..], &[plan.make[0], plan.checker[0]]].concat());
        let needs = needs.and_root().and_file("/dev/loop-control").and_file("/dev/fuse");
        Case::new(name, needs, move || file_system(plan))
    };
    let ext4 = Plan {
        shower: Shower::Nbdfuse,
        size: "256M",
        sector: "512",
        make: &["mkfs.ext4", "-q", "-F"],
        checker: &["e2fsck", "-f", "-n"],
    };
    let make: &[&str] = &["mkfs.xfs", "-q", "-f"];
    let xfs = Plan { size: "512M", make, checker: &["xfs_repair", "-n"], ..ext4 };
    let shower = Shower::StorageDaemon;
    vec![
        case("real_file_system_ext4_nbdfuse", ext4),
        case("real_file_system_ext4_daemon_4k", Plan { shower, sector: "4096", ..ext4 }),
        case("real_file_system_xfs_nbdfuse_4k", Plan { sector: "4096", ..xfs }),
        case("real_file_system_xfs_daemon", Plan { shower, ..xfs }),
    ]
}
