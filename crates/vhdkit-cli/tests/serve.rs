//! `serve`: where it is found, what it serves, who may reach it, and how it ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::server::{Client, Server};
use common::{MIB, Scratch, disk_bytes};
use rustix::process::Signal;

/// Not permitted, as the protocol numbers it.
const EPERM: u32 = 1;
/// The flag of an export that cannot be written.
const READ_ONLY: u16 = 1 << 1;

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

/// A usage error or another, with words in it, and files left as they were.
#[track_caller]
fn refused(scratch: &Scratch, arguments: &[&str], code: i32, words: &str) {
    let before = (scratch.names(), scratch.sums());
    let run = scratch.run(&[&["serve"], arguments].concat()).expect(code);
    assert!(run.err.contains(words), "{arguments:?}: {}", run.err);
    assert!(run.err.starts_with("vhdkit: ") && run.err.contains("\n  hint: "), "{arguments:?}: {}", run.err);
    assert_eq!(run.out, "", "{arguments:?}");
    assert_eq!((scratch.names(), scratch.sums()), before, "{arguments:?}");
}

#[test]
fn a_disk_is_served_for_reading_in_a_directory_of_its_own() {
    let scratch = Scratch::new();
    let built = scratch.image("disk.vhdx");
    let before = scratch.sums();
    let server = Server::start(&scratch, &["disk.vhdx"]);
    let socket = server.socket();
    assert_eq!(server.out, format!("nbd+unix:///disk.vhdx?socket={}\n", socket.display()));
    assert!(socket.starts_with(scratch.join("run")), "{}", socket.display());
    let directory = socket.parent().unwrap().to_owned();
    assert_eq!((mode(&directory), mode(&socket)), (0o700, 0o600));
    assert!(std::fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
    // Without a name it is the only export.
    for name in ["disk.vhdx", ""] {
        let mut client = server.client(name);
        assert_eq!(client.size, 8 * MIB);
        assert_ne!(client.flags & READ_ONLY, 0);
        assert!(client.read(0, (8 * MIB) as u32) == disk_bytes(&built));
        assert_eq!(client.write(0, &[1; 512]), EPERM);
        client.disconnect();
    }
    assert!(Client::connect(&socket, "other").unwrap_err().to_string().contains("refused"));
    server.stop();
    assert!(!directory.exists(), "the directory of the socket was left behind");
    assert_eq!(scratch.sums(), before);
}

#[test]
fn a_socket_has_its_mode_whatever_the_mask_of_the_process() {
    for mask in ["000", "077", "777"] {
        let scratch = Scratch::new();
        scratch.image("disk.vhdx");
        for more in ["", "--socket made"] {
            let mut command = Command::new("sh");
            let program = env!("CARGO_BIN_EXE_vhdkit");
            command.args(["-c", &format!("umask {mask}; exec {program} serve disk.vhdx {more}")]);
            command.current_dir(scratch.path());
            let server = Server::run(&scratch, command);
            assert_eq!(mode(&server.socket()), 0o600, "{mask} {more}");
            if more.is_empty() {
                assert_eq!(mode(server.socket().parent().unwrap()), 0o700, "{mask}");
            }
            server.client("").disconnect();
            server.stop();
            assert!(!scratch.join("made").exists());
        }
    }
}

#[test]
fn a_socket_at_a_path_replaces_only_one_that_is_dead() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let server = Server::start(&scratch, &["disk.vhdx", "--socket", "a socket?"]);
    let made = scratch.join("a socket?");
    let directory = scratch.path().display();
    assert_eq!(server.out, format!("nbd+unix:///disk.vhdx?socket={directory}/a%20socket%3F\n"));
    assert_eq!(mode(&made), 0o600);
    refused(&scratch, &["disk.vhdx", "--socket", "a socket?"], 6, "another server listens on this socket");
    Client::connect(&made, "disk.vhdx").unwrap().disconnect();
    // A file stays as it is, and so does a link.
    scratch.write("file", b"precious");
    refused(&scratch, &["disk.vhdx", "--socket", "file"], 6, "taken by something else");
    std::os::unix::fs::symlink("nowhere", scratch.join("link")).unwrap();
    refused(&scratch, &["disk.vhdx", "--socket", "link"], 6, "taken by something else");
    assert!(!scratch.join("nowhere").exists());
    refused(&scratch, &["disk.vhdx", "--socket", "missing/socket"], 5, "cannot make the socket");
    refused(&scratch, &["disk.vhdx", "--socket", &"long".repeat(40)], 2, "too long");
    // What was left behind is replaced.
    server.send(Signal::KILL);
    server.wait();
    assert!(made.exists());
    let server = Server::start(&scratch, &["disk.vhdx", "--socket", "a socket?"]);
    Client::connect(&made, "disk.vhdx").unwrap().disconnect();
    // What somebody else put there meanwhile is not removed.
    std::fs::remove_file(&made).unwrap();
    let other = UnixListener::bind(&made).unwrap();
    server.stop();
    assert!(made.exists());
    drop(other);
}

#[test]
fn what_clients_write_is_in_the_image_after_a_signal() {
    for signal in [Signal::TERM, Signal::INT] {
        let scratch = Scratch::new();
        scratch.chain();
        let base = scratch.sums()["base.vhdx"].clone();
        let server = Server::start(&scratch, &["child.vhdx", "--write", "--name", "vm"]);
        assert!(server.out.starts_with("nbd+unix:///vm?socket="), "{}", server.out);
        let mut client = server.client("vm");
        assert_eq!(client.flags & READ_ONLY, 0);
        assert_eq!(client.write(MIB - 100, &[7; 200]), 0);
        assert_eq!(client.write(6 * MIB, &[8; 512]), 0);
        assert_eq!(client.flush(), 0);
        assert_eq!(client.write(7 * MIB + 1, &[9; 3]), 0); // and no flush
        server.send(signal);
        assert!(client.is_over());
        assert_eq!(server.wait(), (Some(0), String::new()));
        let check = scratch.run(&["check", "child.vhdx"]).expect(0);
        assert!(check.out.contains("clean (0 errors"), "{}", check.out);
        assert_eq!(scratch.run(&["info", "child.vhdx", "--json"]).expect(0).json()["log"]["state"], "clean");
        let disk = scratch.run(&["read", "child.vhdx"]).expect(0).stdout;
        let start = MIB as usize - 100;
        assert!(disk[start..start + 200] == [7; 200]);
        assert!(disk[6 * MIB as usize..][..512] == [8; 512]);
        assert_eq!(disk[7 * MIB as usize..][..5], [0, 9, 9, 9, 0]);
        assert_eq!(scratch.sums()["base.vhdx"], base);
    }
}

#[test]
fn several_images_and_each_of_their_layers() {
    let scratch = Scratch::new();
    let child = scratch.chain();
    let other = scratch.image("other.vhdx");
    let raw = disk_bytes(&other);
    scratch.write("plain.raw", &raw);
    let server = Server::start(&scratch, &["child.vhdx", "other.vhdx", "plain.raw", "--layers"]);
    let names: Vec<&str> = server.out.lines().map(|uri| uri.split(['?']).next().unwrap()).collect();
    let expected =
        ["child.vhdx", "child.vhdx/layer/0", "child.vhdx/layer/1", "other.vhdx", "other.vhdx/layer/0", "plain.raw"];
    assert_eq!(names, expected.map(|name| format!("nbd+unix:///{name}")));
    let read = |name: &str| server.client(name).read(0, (8 * MIB) as u32);
    assert!(read("child.vhdx") == disk_bytes(&child));
    assert!(read("plain.raw") == raw);
    assert!(read("other.vhdx/layer/0") == raw);
    // The child has one block of its own, the rest is the base's.
    let (layer, whole) = (read("child.vhdx/layer/0"), disk_bytes(&child));
    let block = 2 * MIB as usize..3 * MIB as usize;
    assert!(layer[block.clone()] == whole[block.clone()]);
    assert!(layer[..block.start].iter().chain(&layer[block.end..]).all(|byte| *byte == 0));
    assert!(read("child.vhdx/layer/1") == scratch.run(&["read", "base.vhdx"]).expect(0).stdout);
    assert!(Client::connect(&server.socket(), "").is_err(), "with several exports none is meant without a name");
    server.stop();
}

#[test]
fn json_tells_everything_in_one_line() {
    let scratch = Scratch::new();
    scratch.chain();
    let server = Server::start(&scratch, &["child.vhdx", "--layers", "--write", "--json", "--socket", "s"]);
    assert_eq!(server.out.lines().count(), 1);
    let told: serde_json::Value = serde_json::from_str(&server.out).unwrap();
    let socket = scratch.join("s");
    assert_eq!(told["socket"], socket.to_str().unwrap());
    assert_eq!(told["uri"], format!("nbd+unix:///child.vhdx?socket={}", socket.display()));
    assert!(told["listen"].is_null());
    let exports = told["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 3);
    assert_eq!((&exports[0]["name"], &exports[0]["writable"]), (&"child.vhdx".into(), &true.into()));
    assert_eq!(exports[0]["size"], 8 * MIB);
    assert_eq!(exports[0]["description"], "child.vhdx, a differencing VHDX on base.vhdx");
    assert_eq!((&exports[2]["name"], &exports[2]["writable"]), (&"child.vhdx/layer/1".into(), &false.into()));
    assert_eq!(exports[2]["description"], "what base.vhdx holds by itself, layer 1 of child.vhdx");
    assert_eq!(exports[0]["uris"][0], told["uri"]);
    // What happens is JSON too.
    let mut client = Client::connect(&socket, "child.vhdx").unwrap();
    client.ask(99, 0, 0, &[0xff; 64]);
    let line = server.wait_for_line("log");
    let log: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(log["log"]["level"] == "warn" && log["log"]["time"].is_f64(), "{line}");
    server.send(Signal::TERM);
    assert_eq!(server.wait().0, Some(0));
}

#[test]
fn it_ends_by_itself_when_nobody_wants_anything() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let started = Instant::now();
    let server = Server::start(&scratch, &["disk.vhdx", "--write", "--idle-exit", "1", "--quiet"]);
    let client = server.client("");
    std::thread::sleep(Duration::from_millis(1500));
    drop(client); // it was there all the time
    let socket = server.socket();
    assert_eq!(server.wait(), (Some(0), String::new()));
    assert!(started.elapsed() >= Duration::from_millis(2400), "{:?}", started.elapsed());
    assert!(!socket.exists());
}

#[test]
fn sigusr1_tells_what_was_done() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    for json in [false, true] {
        let arguments: &[&str] =
            if json { &["disk.vhdx", "--json", "--socket", "s"] } else { &["disk.vhdx", "--socket", "s"] };
        let server = Server::start(&scratch, arguments);
        let mut client = Client::connect(&scratch.join("s"), "").unwrap();
        assert_eq!(client.read(0, 4096).len(), 4096);
        server.send(Signal::USR1);
        let line = server.wait_for_line("totals");
        if json {
            let totals = &serde_json::from_str::<serde_json::Value>(&line).unwrap()["totals"];
            let counts = ["connected", "connections", "reads", "bytes_read"].map(|name| totals[name].as_u64());
            assert_eq!(counts, [1, 1, 1, 4096].map(Some), "{line}");
        } else {
            assert!(line.starts_with("vhdkit: totals: connected 1, connections 1, "), "{line}");
            assert!(line.contains(", reads 1, ") && line.contains(", bytes read 4096, "), "{line}");
        }
        assert_eq!(client.read(0, 512).len(), 512, "it goes on");
        server.send(Signal::TERM);
        assert_eq!(server.wait(), (Some(0), format!("{line}\n")));
    }
    // With --verbose it is told in the end as well.
    let server = Server::start(&scratch, &["disk.vhdx", "--verbose"]);
    server.client("").disconnect();
    server.send(Signal::TERM);
    let (code, err) = server.wait();
    assert!(code == Some(0) && err.contains("totals: connected 0, connections 1"), "{err}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let scratch = Scratch::new();
    scratch.run(&["create", "disk.vhdx", "--size", "64M"]).expect(0);
    let server = Server::start(&scratch, &["disk.vhdx"]);
    let mut client = server.client("");
    // A client that takes no replies: for ten seconds the server waits for it.
    for _ in 0..16 {
        client.ask_to_read(0, 32 << 20);
    }
    std::thread::sleep(Duration::from_millis(200));
    let socket = server.socket();
    server.send(Signal::TERM);
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        assert!(Instant::now() < deadline, "it goes on listening");
        std::thread::sleep(Duration::from_millis(5));
    }
    server.send(Signal::TERM);
    assert_eq!(server.wait().0, Some(143));
    drop(client);
}

#[test]
fn what_could_reach_others_or_clash_is_refused() {
    let scratch = Scratch::new();
    scratch.chain();
    std::fs::create_dir(scratch.join("other")).unwrap();
    std::fs::copy(scratch.join("base.vhdx"), scratch.join("other/base.vhdx")).unwrap();
    scratch.write("plain.raw", &[0; 4096]);
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809", "[::ffff:192.0.2.1]:10809"] {
        refused(&scratch, &["base.vhdx", "--listen", address], 2, "--tls-client-ca");
    }
    for address in ["localhost", "127.0.0.1", "127.0.0.1:x", ":", "10809"] {
        refused(&scratch, &["base.vhdx", "--listen", address], 2, "ADDR:PORT");
    }
    refused(
        &scratch,
        &["base.vhdx", "--listen", "192.0.2.1:10809", "--insecure"],
        5,
        "cannot listen on 192.0.2.1:10809",
    );
    refused(&scratch, &["base.vhdx", "other/base.vhdx"], 2, "start a server for each, with --name");
    refused(&scratch, &["base.vhdx", "child.vhdx", "--name", "x"], 2, "--name is for one image");
    refused(&scratch, &["base.vhdx", "--name", &"x".repeat(5000)], 2, "4096");
    std::os::unix::fs::symlink("base.vhdx", scratch.join("link.vhdx")).unwrap();
    for images in [["base.vhdx", "child.vhdx"], ["child.vhdx", "base.vhdx"], ["base.vhdx", "link.vhdx"]] {
        refused(&scratch, &[images[0], images[1], "--write"], 6, "belongs to two of the images");
    }
    refused(&scratch, &["base.vhdx", "--write", "--force-share"], 2, "--force-share");
    refused(&scratch, &["plain.raw", "--write"], 6, "served for reading only");
    refused(&scratch, &["plain.raw", "--from", "raw", "--write"], 6, "leave out --write");
    for file in ["missing.pem", "plain.raw"] {
        let code = if file == "plain.raw" { 2 } else { 5 };
        refused(&scratch, &["base.vhdx", "--tls-cert", file, "--tls-key", file], code, file);
    }
    for arguments in [
        ["--socket", "a", "--listen", "127.0.0.1:0"].as_slice(),
        &["--replay"],
        &["--tls-cert", "a"],
        &["--tls-client-ca", "a"],
        &["--tls-optional"],
        &["--max-connections", "0"],
        &["--max-connections", "401"],
        &["--idle-exit", "0"],
        &["--parent", "b.vhdx", "--no-parents"],
    ] {
        let run = scratch.run(&[&["serve", "base.vhdx"], arguments].concat()).expect(2);
        assert_eq!(run.out, "", "{arguments:?}");
    }
    scratch.run(&["check", "base.vhdx"]).expect(0);
}

#[test]
fn ports_on_this_machine_are_open_to_it() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let has_ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    for (address, host) in [("127.0.0.1:0", "127.0.0.1"), ("localhost:0", ""), ("[::1]:0", "[::1]")] {
        if host == "[::1]" && !has_ipv6 {
            continue;
        }
        let server = Server::start(&scratch, &["disk.vhdx", "--listen", address]);
        let rest = server.uri().strip_prefix("nbd://").unwrap();
        let authority = rest.strip_suffix("/disk.vhdx").unwrap();
        assert!(authority.starts_with(host) && !authority.ends_with(":0"), "{}", server.out);
        let mut stream = std::net::TcpStream::connect(authority).unwrap();
        let mut greeting = [0; 8];
        std::io::Read::read_exact(&mut stream, &mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGIC");
        // The port is taken.
        refused(&scratch, &["disk.vhdx", "--listen", authority], 5, "cannot listen on");
        server.stop();
    }
    // Nobody but this machine is meant, yet it is said to be fine.
    let server = Server::start(&scratch, &["disk.vhdx", "--listen", "0.0.0.0:0", "--insecure"]);
    assert!(server.uri().starts_with("nbd://0.0.0.0:"), "{}", server.out);
    server.stop();
}

#[test]
fn an_image_that_was_not_closed_is_written_only_after_its_log_was_replayed() {
    let scratch = Scratch::new();
    let built = scratch.dirty("disk.vhdx");
    refused(&scratch, &["disk.vhdx", "--write"], 6, "--replay");
    // For reading it is replayed in memory, and stays as it is.
    let before = scratch.sums();
    let server = Server::start(&scratch, &["disk.vhdx"]);
    assert!(server.client("").read(0, (8 * MIB) as u32) == disk_bytes(&built));
    server.send(Signal::TERM);
    let (code, err) = server.wait();
    assert!(code == Some(0) && err.contains("warning: disk.vhdx: "), "{err}");
    assert_eq!(scratch.sums(), before);
    let server = Server::start(&scratch, &["disk.vhdx", "--write", "--replay"]);
    assert_eq!(server.client("").write(0, b"hello"), 0);
    server.send(Signal::TERM);
    assert_eq!(server.wait().0, Some(0));
    assert_eq!(scratch.run(&["info", "disk.vhdx", "--json"]).expect(0).json()["log"]["state"], "clean");
    assert!(scratch.run(&["read", "disk.vhdx", "--length", "5"]).expect(0).stdout == b"hello");
}

#[test]
fn an_image_that_is_served_for_writing_is_in_use() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let reading = Server::start(&scratch, &["disk.vhdx"]);
    refused(&scratch, &["disk.vhdx", "--write"], 6, "another program has it open");
    let other = Server::start(&scratch, &["disk.vhdx"]); // both only read
    other.stop();
    reading.stop();
    let writing = Server::start(&scratch, &["disk.vhdx", "--write"]);
    refused(&scratch, &["disk.vhdx"], 6, "another program has it open");
    writing.stop();
}

#[test]
fn change_tracking_is_warned_of_when_something_was_written() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    scratch.write("disk.vhdx.rct", b"tracking");
    Server::start(&scratch, &["disk.vhdx", "--write"]).stop();
    let server = Server::start(&scratch, &["disk.vhdx", "--write"]);
    assert_eq!(server.client("").write(0, b"x"), 0);
    server.send(Signal::TERM);
    let (code, err) = server.wait();
    assert!(code == Some(0) && err.contains("the next backup must be full"), "{err}");
}

#[test]
fn too_many_clients_are_turned_away_and_logged() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let server = Server::start(&scratch, &["disk.vhdx", "--max-connections", "1", "--poll"]);
    let mut first = server.client("");
    assert!(Client::connect(&server.socket(), "").is_err());
    let line = server.wait_for_line("turned away");
    assert!(line.starts_with("vhdkit: warning: too many connections") && line.ends_with("(limit: 1)"), "{line}");
    assert_eq!(first.read(0, 512).len(), 512);
    server.send(Signal::TERM);
    assert_eq!(server.wait().0, Some(0));
    // The variable goes before the options.
    for (level, logged) in [("off", false), ("debug", true)] {
        let mut command = scratch.command(&["serve", "disk.vhdx", "--verbose"]);
        command.args(["--socket", "s"]);
        let mut shell = Command::new("env");
        shell.arg(format!("VHDKIT_LOG={level}")).arg(command.get_program()).args(command.get_args());
        shell.current_dir(scratch.path());
        let server = Server::run(&scratch, shell);
        server.client("").disconnect();
        server.send(Signal::TERM);
        let (code, err) = server.wait();
        assert!(code == Some(0) && err.contains("debug: connected (connection: 1)") == logged, "{level}: {err}");
    }
    let mut command = scratch.command(&["serve", "disk.vhdx"]);
    let output = command.env("VHDKIT_LOG", "loud").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn every_thread_has_given_up_what_it_does_not_need() {
    let scratch = Scratch::new();
    scratch.run(&["create", "disk.vhdx", "--size", "1G"]).expect(0);
    let server = Server::start(&scratch, &["disk.vhdx", "--write", "--verbose"]);
    let mut client = server.client("");
    for block in 0..64 {
        assert_eq!(client.write(block * 4 * MIB, &vec![block as u8 + 1; 1 << 20]), 0);
    }
    assert_eq!(client.flush(), 0);
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", server.id())).unwrap() {
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        threads += 1;
        let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        assert_eq!(value("NoNewPrivs:"), Some("1"), "{status}");
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            assert_eq!(value("Seccomp:"), Some("2"), "{status}");
        }
    }
    assert!(threads >= 3, "{threads}");
    let err = server.err();
    assert!(err.contains("vhdkit: Landlock: ") && err.contains("vhdkit: seccomp: system calls"), "{err}");
    server.send(Signal::TERM);
    assert_eq!(server.wait().0, Some(0));
    scratch.run(&["check", "disk.vhdx"]).expect(0);
    let last = scratch.run(&["read", "disk.vhdx", "--offset", "252M", "--length", "1M"]).expect(0).stdout;
    assert!(last == vec![64; 1 << 20]);
}

#[test]
fn a_server_that_cannot_say_where_it_is_ends() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let (names, sums) = (scratch.names(), scratch.sums());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for (stdout, code) in [(full.into(), 5), (std::process::Stdio::from(writer), 0)] {
        let mut command = scratch.command(&["serve", "disk.vhdx", "--write", "--socket", "s"]);
        let output = command.stdout(stdout).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert_eq!((scratch.names(), scratch.sums()), (names.clone(), sums.clone()));
    }
}

#[test]
fn names_that_would_confuse_a_terminal_are_encoded_or_escaped() {
    let scratch = Scratch::new();
    let hostile = "a\u{1b}[31m b.vhdx";
    scratch.image(hostile);
    let server = Server::start(&scratch, &[hostile]);
    assert!(server.out.starts_with("nbd+unix:///a%5Cu%7B1b%7D%5B31m%20b.vhdx?socket="), "{}", server.out);
    server.client("a\\u{1b}[31m b.vhdx").disconnect();
    server.stop();
    let server = Server::start(&scratch, &[hostile, "--name", "\u{1b}/x", "--layers", "--json"]);
    assert!(!server.out.contains('\u{1b}') && server.out.contains("nbd+unix:///%1B/x/layer/0?"), "{}", server.out);
    server.stop();
}
