//! A server is killed under a load of another program's: what it acknowledged before a flush is there afterwards.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vhdkit_testkit::foreign::{self, assert_success};
use vhdkit_testkit::harness::{Case, Needs};
use vhdkit_testkit::rng::Rng;

use crate::common::{MIB, Scratch};
use crate::power_cut::seed;
use crate::server::{PATIENCE, Server, WRITE, kill, wait_until};

/// Kills of each disk.
const KILLS: usize = 4;
/// The Python that has Debian's bindings of libnbd.
const PYTHON: &str = "/usr/bin/python3";

/// A server and its socket.
type Served = (Server, PathBuf);

/// The load: a program that knows what the disk may hold. It ends with the test.
struct Load {
    child: Child,
    /// What the server prints, for when it is to blame.
    server: PathBuf,
}

impl Load {
    fn start(scratch: &Scratch, server: &Served, seed: u64, sector: u64, task: &str) -> Self {
        let (server, socket) = server;
        let mut command = Command::new(PYTHON);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/served_disks/load.py"));
        command.arg(socket).arg("state").args([&seed.to_string(), &sector.to_string(), task]);
        command.current_dir(scratch.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.spawn().unwrap(), server: server.log.clone() }
    }

    /// Waits until it has judged the disk and begins to write.
    #[track_caller]
    fn wait_for_judgement(mut self) -> Self {
        let mut line = String::new();
        // It writes little more before it ends, so nothing is lost with this buffer.
        let mut output = BufReader::with_capacity(1, self.child.stdout.as_mut().unwrap());
        output.read_line(&mut line).unwrap();
        if line != "loading\n" {
            self.end();
            panic!("the load ended well and wrote nothing: {line}");
        }
        self
    }

    /// Waits for its end, which is a good one; gives what it has to tell.
    #[track_caller]
    fn end(mut self) -> String {
        let mut status = None;
        wait_until("the end of the load", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        let (mut told, mut error) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut told).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        let server = std::fs::read_to_string(&self.server).unwrap_or_default();
        assert!(status.unwrap().success(), "{told}{error}the server:\n{server}");
        told.trim().to_owned()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

fn killed_server(name: &str, create: &[&str], sector: u64, child: bool) {
    let seed = seed();
    println!("{name}: seed {seed}");
    let mut rng = Rng::new(seed);
    let scratch = Scratch::new();
    scratch.run(&[&["create", "disk.vhdx", "--quiet"], create].concat()).expect(0);
    let mut image = "disk.vhdx";
    if child {
        let server = Server::on_socket(&scratch, image, WRITE);
        Load::start(&scratch, &server, rng.next_u64(), sector, "fill").end();
        server.0.end();
        scratch.run(&["create", "child.vhdx", "--parent", "disk.vhdx", "--block-size", "1M", "--quiet"]).expect(0);
        image = "child.vhdx";
    }
    for _ in 0..KILLS {
        let server = Server::on_socket(&scratch, image, WRITE);
        let load = Load::start(&scratch, &server, rng.next_u64(), sector, "load").wait_for_judgement();
        let moment = rng.between(20, 900);
        std::thread::sleep(Duration::from_millis(moment));
        server.0.kill();
        println!("{name}: killed after {moment} ms: {}", load.end());
        scratch.run(&["check", image]).expect(0);
    }
    for options in [WRITE, &[]] {
        let server = Server::on_socket(&scratch, image, options);
        Load::start(&scratch, &server, 0, sector, "judge").end();
        server.0.end();
        scratch.run(&["check", image]).expect(0);
    }
}

/// A command of fio on a half of the disk.
fn fio(socket: &Path, half: u64, options: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=half", "--ioengine=nbd", "--bs=4k", "--iodepth=16", "--size=32M", "--verify=crc32c"]);
    command.arg("--verify_state_save=0");
    command.arg(format!("--offset={}", half * 32 * MIB)).arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
    command.args(options).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What fio wrote and flushed stays, whatever becomes of what it writes beside that when the server is killed.
fn fio_verifies_after_a_kill() {
    let scratch = Scratch::new();
    scratch.run(&["create", "disk.vhdx", "--size", "64M", "--block-size", "1M", "--quiet"]).expect(0);
    let run = |mut command: Command| assert_success(&foreign::run(&mut command, PATIENCE).unwrap());
    let mut options = ["--rw=randwrite", "--randseed=1", "--do_verify=0", "--end_fsync=1"];
    for round in 0..2 {
        let (server, socket) = Server::on_socket(&scratch, "disk.vhdx", WRITE);
        run(fio(&socket, round, &options));
        let others = ["--rw=randwrite", "--do_verify=0", "--fsync=8", "--time_based", "--runtime=20"];
        let mut load = fio(&socket, 1 - round, &others).current_dir(scratch.path()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        server.kill();
        assert!(!load.wait().unwrap().success(), "fio ended before the server was killed");
        scratch.run(&["check", "disk.vhdx"]).expect(0);
        let (server, socket) = Server::on_socket(&scratch, "disk.vhdx", WRITE);
        options[2] = "--verify_only=1";
        run(fio(&socket, round, &options));
        options[2] = "--do_verify=0";
        server.end();
        scratch.run(&["check", "disk.vhdx"]).expect(0);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    // Whoever has nbdsh has the bindings.
    let needs = || Needs::tools(&["nbdsh"]).and_file(PYTHON);
    let case = |name: &'static str, create: &'static [&'static str], sector, child| {
        Case::new(name, needs(), move || killed_server(name, create, sector, child))
    };
    let dynamic: &[&str] = &["--size", "100M", "--block-size", "1M"];
    let large_sectors: &[&str] = &["--size", "100M", "--block-size", "1M", "--logical-sector-size", "4096"];
    vec![
        case("killed_server_dynamic", dynamic, 512, false),
        case("killed_server_fixed", &["--size", "40M", "--fixed"], 512, false),
        case("killed_server_child", dynamic, 512, true),
        case("killed_server_4k", large_sectors, 4096, false),
        case("killed_server_child_4k", large_sectors, 4096, true),
        Case::new("fio_verifies_after_a_kill", Needs::tools(&["fio"]), fio_verifies_after_a_kill),
    ]
}
