//! `serve` beside others: clients by strangers, TLS, sockets that were handed over, a file system that is full.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

mod common;

use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::server::{Client, Server};
use common::{MIB, Scratch, disk_bytes, junk};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::Signal;
use serde_json::Value;
use vhdkit_testkit::foreign::{TOOL_TIMEOUT, assert_success, qemu_img, run, run_tool};
use vhdkit_testkit::harness::{Case, Needs, main_with};

fn nbdinfo(arguments: &[&str]) -> Value {
    let output = run_tool("nbdinfo", &[&["--json"], arguments].concat());
    assert_success(&output);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What libnbd sees is what is announced.
fn nbdinfo_lists_the_exports() {
    let scratch = Scratch::new();
    scratch.chain();
    scratch.image("a disk.vhdx");
    let server = Server::start(&scratch, &["child.vhdx", "a disk.vhdx", "--layers", "--json"]);
    let told: Value = serde_json::from_str(&server.out).unwrap();
    let told = told["exports"].as_array().unwrap();
    let seen = nbdinfo(&["--list", told[0]["uri"].as_str().unwrap()]);
    let seen = seen["exports"].as_array().unwrap();
    assert_eq!((seen.len(), told.len()), (5, 5));
    for (told, seen) in told.iter().zip(seen) {
        assert_eq!(
            (&seen["export-name"], &seen["description"], &seen["export-size"]),
            (&told["name"], &told["description"], &told["size"])
        );
        assert_eq!(seen["is_read_only"], true);
        // The URI of each leads to it.
        let seen = nbdinfo(&[told["uri"].as_str().unwrap()]);
        assert_eq!(seen["exports"][0]["export-name"], told["name"]);
    }
    server.stop();
}

/// QEMU copies a disk into an image through one server, and finds it there through another.
fn qemu_img_writes_and_reads() {
    let scratch = Scratch::new();
    let raw = scratch.write("disk.raw", &junk(24 << 20));
    scratch.run(&["create", "disk.vhdx", "--size", "24M", "--block-size", "1M"]).expect(0);
    let server = Server::start(&scratch, &["disk.vhdx", "--write"]);
    assert_success(&qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", raw.to_str().unwrap(), server.uri()]));
    server.stop();
    scratch.run(&["compare", "disk.vhdx", "disk.raw"]).expect(0);
    scratch.run(&["check", "disk.vhdx"]).expect(0);
    for address in ["127.0.0.1:0", "localhost:0"] {
        let server = Server::start(&scratch, &["disk.vhdx", "--listen", address]);
        assert_success(&qemu_img(&["compare", "-f", "raw", "-F", "raw", raw.to_str().unwrap(), server.uri()]));
        server.stop();
    }
}

/// A certificate of our own making, and the key to it.
fn certificates(scratch: &Scratch, ca: &str) {
    let at = |name: &str| scratch.join(ca).join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(scratch.join(ca)).unwrap();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout"];
    let openssl = |words: &[&str]| assert_success(&run_tool("openssl", words));
    let (ca_key, ca_certificate) = (at("ca-key.pem"), at("ca-cert.pem"));
    let more = [ca_key.as_str(), "-out", &ca_certificate, "-days", "30", "-subj", "/CN=vhdkit test"];
    openssl(&[&["req", "-x509"][..], &key, &more].concat());
    for who in ["server", "client"] {
        let [request, key_file, extensions] = [at("request"), at(&format!("{who}-key.pem")), at("extensions")];
        openssl(&[&["req"][..], &key, &[&key_file, "-out", &request, "-subj", &format!("/CN={who}")]].concat());
        let names = "subjectAltName=DNS:localhost,IP:127.0.0.1\nkeyUsage=digitalSignature\n";
        std::fs::write(&extensions, format!("{names}extendedKeyUsage={who}Auth\n")).unwrap();
        let certificate = at(&format!("{who}-cert.pem"));
        let signing = ["-CA", &ca_certificate, "-CAkey", &ca_key, "-CAcreateserial", "-days", "30"];
        let files = ["-in", &request, "-extfile", &extensions, "-out", &certificate];
        openssl(&[&["x509", "-req"][..], &signing, &files].concat());
    }
}

const TLS: [&str; 4] = ["--tls-cert", "ours/server-cert.pem", "--tls-key", "ours/server-key.pem"];
const CLIENTS: [&str; 2] = ["--tls-client-ca", "ours/ca-cert.pem"];

/// `nbdinfo --size` with the certificates in a directory.
fn size_with(uri: &str, directory: &Path) -> Output {
    let separator = if uri.contains('?') { '&' } else { '?' };
    let uri = format!("{uri}{separator}tls-certificates={}", directory.display());
    run_tool("nbdinfo", &["--size", &uri])
}

fn tls_with_libnbd() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    certificates(&scratch, "ours");
    certificates(&scratch, "theirs");
    let (ours, theirs) = (scratch.join("ours"), scratch.join("theirs"));
    let start = |arguments: &[&str]| Server::start(&scratch, &[&["disk.vhdx"], &TLS[..], arguments].concat());
    let has_size = |output: &Output| output.status.success() && output.stdout == b"8388608\n";
    // Over a Unix socket, and on this machine, anybody who knows the server.
    for address in [&[][..], &["--listen", "127.0.0.1:0"]] {
        let server = start(address);
        assert!(server.uri().starts_with(if address.is_empty() { "nbds+unix:///" } else { "nbds://" }));
        let output = size_with(server.uri(), &ours);
        assert!(has_size(&output), "{output:?}");
        if !address.is_empty() {
            // Over Unix sockets libnbd does not ask who the server is.
            assert!(!has_size(&size_with(server.uri(), &theirs)), "a server that signed itself is believed");
        }
        assert!(!has_size(&run_tool("nbdinfo", &["--size", &server.uri().replacen("nbds", "nbd", 1)])));
        server.send(Signal::TERM);
        assert_eq!(server.wait().0, Some(0));
    }
    // With certificates for clients everybody else is turned away, and any address is fine.
    let server = start(&[&CLIENTS[..], &["--listen", "0.0.0.0:0"]].concat());
    let uri = server.uri().replace("0.0.0.0", "127.0.0.1");
    let output = size_with(&uri, &ours);
    assert!(has_size(&output), "{output:?}");
    for name in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(theirs.join(name), ours.join(name)).unwrap();
    }
    assert!(!has_size(&size_with(&uri, &ours)), "a client that signed itself is believed");
    server.send(Signal::TERM);
    assert_eq!(server.wait().0, Some(0));
    // Where TLS is optional, both come in.
    let server = start(&["--tls-optional"]);
    for uri in [server.uri().to_owned(), server.uri().replacen("nbds", "nbd", 1)] {
        let output = size_with(&uri, &ours);
        assert!(has_size(&output), "{uri}: {output:?}");
    }
    server.stop();
    // That is not enough beyond this machine.
    let more = [&["serve", "disk.vhdx", "--tls-optional", "--listen", "0.0.0.0:0"], &TLS[..], &CLIENTS].concat();
    assert!(scratch.run(&more).expect(2).err.contains("without --tls-optional"));
    // A key of somebody else.
    let wrong = ["--tls-cert", "ours/server-cert.pem", "--tls-key", "theirs/server-key.pem"];
    let run = scratch.run(&[&["serve", "disk.vhdx"], &wrong[..]].concat()).expect(2);
    assert!(run.err.contains("certificate and key"), "{}", run.err);
}

fn tls_with_qemu() {
    let scratch = Scratch::new();
    let built = scratch.image("disk.vhdx");
    scratch.write("disk.raw", &disk_bytes(&built));
    certificates(&scratch, "ours");
    let arguments = [&["disk.vhdx"], &TLS[..], &CLIENTS, &["--listen", "127.0.0.1:0"]].concat();
    let server = Server::start(&scratch, &arguments);
    let port = server.uri().trim_end_matches("/disk.vhdx").rsplit(':').next().unwrap();
    let credentials = format!("tls-creds-x509,id=tls,dir={},endpoint=client", scratch.join("ours").display());
    let remote = format!("driver=nbd,host=127.0.0.1,port={port},export=disk.vhdx,tls-creds=tls");
    let local = format!("driver=raw,file.driver=file,file.filename={}", scratch.join("disk.raw").display());
    assert_success(&qemu_img(&["compare", "--object", &credentials, "--image-opts", &remote, &local]));
    server.stop();
}

/// The number of the first socket that the helper hands over.
const FIRST: i32 = 100;
const HELPER: &str = "VHDKIT_TEST_SOCKETS";

/// This program as systemd: makes sockets, and becomes vhdkit.
fn become_activated(sockets: &str) -> ! {
    let made: Vec<OwnedFd> = sockets.split(',').map(make_socket).collect();
    for (socket, number) in made.iter().zip(FIRST..) {
        let socket = fcntl_dupfd_cloexec(socket, number).unwrap();
        fcntl_setfd(socket.as_fd(), FdFlags::empty()).unwrap();
        std::mem::forget(socket); // it is for the program that comes
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhdkit"));
    command.args(std::env::args_os().skip(1)).env_remove(HELPER);
    if std::env::var_os("LISTEN_PID").is_none() {
        command.env("LISTEN_PID", std::process::id().to_string());
    }
    let error = command.env("LISTEN_FDS", made.len().to_string()).env("LISTEN_FDS_FIRST_FD", FIRST.to_string()).exec();
    panic!("{error}");
}

fn make_socket(text: &str) -> OwnedFd {
    match text.split_once('=').unwrap() {
        ("unix", path) => UnixListener::bind(path).unwrap().into(),
        ("tcp", address) => TcpListener::bind(address).unwrap().into(),
        ("datagram", path) => UnixDatagram::bind(path).unwrap().into(),
        _ => UnixStream::pair().unwrap().0.into(),
    }
}

/// `vhdkit serve` with sockets that are there.
fn activated(scratch: &Scratch, sockets: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.current_dir(scratch.path()).env(HELPER, sockets).arg("serve").args(arguments);
    command
}

fn sockets_that_were_handed_over() {
    let scratch = Scratch::new();
    scratch.image("disk.vhdx");
    let path = scratch.join("given");
    let sockets = format!("unix={},tcp=127.0.0.1:0", path.display());
    let server = Server::run(&scratch, activated(&scratch, &sockets, &["disk.vhdx", "--idle-exit", "60"]));
    let uris: Vec<&str> = server.out.lines().collect();
    assert_eq!(uris[0], format!("nbd+unix:///disk.vhdx?socket={}", path.display()));
    assert!(uris[1].starts_with("nbd://127.0.0.1:") && uris.len() == 2, "{uris:?}");
    assert_eq!(Client::connect(&path, "").unwrap().size, 8 * MIB);
    let address = uris[1].strip_prefix("nbd://").unwrap().strip_suffix("/disk.vhdx").unwrap();
    assert!(std::net::TcpStream::connect(address).is_ok());
    server.stop();
    assert!(path.exists(), "the socket is not ours to remove");
    std::fs::remove_file(&path).unwrap();
    // The same rules hold.
    let refused = |sockets: &str, arguments: &[&str], words: &str| {
        let output = run(&mut activated(&scratch, sockets, arguments), TOOL_TIMEOUT).unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(2) && err.contains(words) && err.contains("\n  hint: "),
            "{sockets}: {err}"
        );
    };
    refused("tcp=0.0.0.0:0", &["disk.vhdx"], "can be reached from other machines");
    refused("tcp=127.0.0.1:0", &["disk.vhdx", "--socket", "s"], "--socket and --listen have nothing to say");
    refused("tcp=127.0.0.1:0", &["disk.vhdx", "--listen", "127.0.0.1:0"], "nothing to say");
    refused(&format!("datagram={}", scratch.join("d").display()), &["disk.vhdx"], "no stream socket");
    refused("connected=", &["disk.vhdx"], "does not listen");
    // Sockets that are meant for another process are not ours.
    let mut command = activated(&scratch, "tcp=0.0.0.0:0", &["disk.vhdx"]);
    command.env("LISTEN_PID", "1");
    let server = Server::run(&scratch, command);
    assert!(server.uri().starts_with("nbd+unix:"), "{}", server.out);
    server.stop();
}

/// A small file system in memory, gone with the test.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// What cannot be closed ends with an error, whatever stopped the server.
fn an_image_that_cannot_be_closed() {
    let scratch = Scratch::new();
    let small = Small(scratch.join("small"));
    std::fs::create_dir(&small.0).unwrap();
    assert_success(&run_tool("mount", &["-t", "tmpfs", "-o", "size=16m", "none", small.0.to_str().unwrap()]));
    for image in ["small/a.vhdx", "b.vhdx", "small/c.vhdx"] {
        scratch.run(&["create", image, "--size", "64M", "--block-size", "1M", "--quiet"]).expect(0);
    }
    let server = Server::start(&scratch, &["small/a.vhdx", "b.vhdx", "small/c.vhdx", "--write"]);
    for name in ["a.vhdx", "b.vhdx", "c.vhdx"] {
        assert_eq!(server.client(name).write(0, &[7; 4096]), 0);
    }
    let filler = std::fs::File::create(small.0.join("filler")).unwrap();
    let _ = std::io::copy(&mut std::io::repeat(1), &mut std::io::BufWriter::new(filler));
    server.send(Signal::TERM);
    let (code, err) = server.wait();
    assert_eq!(code, Some(5), "{err}");
    assert!(err.contains("a.vhdx: ") && err.contains("No space left on device") && err.contains("hint: "), "{err}");
    assert!(err.contains("warning: small/c.vhdx: "), "{err}");
    // The others are closed all the same, and these are what they were.
    scratch.run(&["check", "b.vhdx"]).expect(0);
    assert_eq!(scratch.run(&["read", "b.vhdx", "--length", "1"]).expect(0).stdout, [7]);
    scratch.run(&["check", "small/a.vhdx"]).expect(0);
}

fn main() {
    if let Ok(sockets) = std::env::var(HELPER) {
        become_activated(&sockets);
    }
    main_with(vec![
        Case::new("nbdinfo_lists_the_exports", Needs::tools(&["nbdinfo"]), nbdinfo_lists_the_exports),
        Case::new("qemu_img_writes_and_reads", Needs::tools(&["qemu-img"]), qemu_img_writes_and_reads),
        Case::new("tls_with_libnbd", Needs::tools(&["nbdinfo", "openssl"]), tls_with_libnbd),
        Case::new("tls_with_qemu", Needs::tools(&["qemu-img", "openssl"]), tls_with_qemu),
        Case::new("sockets_that_were_handed_over", Needs::nothing(), sockets_that_were_handed_over),
        Case::new(
            "an_image_that_cannot_be_closed",
            Needs::tools(&["mount", "umount"]).and_root(),
            an_image_that_cannot_be_closed,
        ),
    ]);
}
