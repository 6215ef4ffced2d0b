//! The NBD client is judged by servers of others: what it sends they must understand, what they send must keep to the
//! rules that it knows.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::big_endian_bytes,
    reason = "test code"
)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use vhdkit_testkit::foreign::{assert_success, qemu_img, tool};
use vhdkit_testkit::harness::{Case, Needs, main_with};
use vhdkit_testkit::nbd::wire::{chunk_kind, code, command, command_flag, export_flag, info, option, reply};
use vhdkit_testkit::nbd::{Chunk, Extent, Fault, Handshake, Header, Mode, Request, Transmission, connect, wire};

const SIZE: u64 = 64 << 20;
/// What one number of the pattern stands for.
const UNIT: u64 = 512;
const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";

/// A server of others, which is gone when this is dropped.
struct Stranger {
    directory: TempDir,
    child: Child,
    name: &'static str,
}

impl Stranger {
    /// Starts a program in the directory; an argument `SOCKET` becomes the path of the socket.
    fn start(program: &str, arguments: &[&str], directory: TempDir, name: &'static str) -> Self {
        let socket = directory.path().join("socket");
        let complaints = directory.path().join("complaints");
        let mut command = Command::new(tool(program).expect("the harness has looked for it"));
        for argument in arguments {
            command.arg(if *argument == "SOCKET" { socket.as_os_str() } else { OsStr::new(argument) });
        }
        command.current_dir(&directory).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&complaints).unwrap());
        let child = command.spawn().unwrap();
        let mut server = Self { directory, child, name };
        let ready = connect::wait_for(connect::SILENCE_MAX, || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "{program}: {}", std::fs::read_to_string(&complaints).unwrap());
            connect::unix(&socket).ok()
        });
        assert!(ready.is_some(), "{program} does not listen: {}", std::fs::read_to_string(&complaints).unwrap());
        server
    }

    /// `qemu-nbd` with a raw disk of which the first MiB is a pattern.
    fn qemu(more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_disk(&directory);
        let arguments = ["-k", "SOCKET", "-t", "-e", "8", "-f", "raw", "-x", "name", "-D", "words", "--discard=unmap"];
        Self::start("qemu-nbd", &[&arguments, more, &["disk"]].concat(), directory, "name")
    }

    /// `nbdkit` with one of its plugins.
    fn nbdkit(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_disk(&directory);
        Self::start("nbdkit", &[&["-f", "-U", "SOCKET"], arguments].concat(), directory, "")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn handshake(&self) -> Handshake<UnixStream> {
        Handshake::start(connect::unix(&self.socket()).unwrap()).unwrap()
    }

    fn begin(&self, mode: Mode) -> Transmission<UnixStream> {
        connect::begin(connect::unix(&self.socket()).unwrap(), mode, self.name).unwrap()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // It may have ended itself; there is nothing to do about failures here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bytes of a pattern from an offset on.
fn pattern(seed: u64, offset: u64, length: usize) -> Vec<u8> {
    let skipped = (offset % UNIT) as usize;
    let mut bytes = vec![0; skipped + length];
    vhdkit_testkit::pattern(seed, offset / UNIT, &mut bytes);
    bytes.split_off(skipped)
}

fn make_disk(directory: &TempDir) {
    let disk = File::create(directory.path().join("disk")).unwrap();
    disk.set_len(SIZE).unwrap();
    disk.write_all_at(&pattern(1, 0, 1 << 20), 0).unwrap();
}

fn broken(fault: &Fault) -> bool {
    matches!(fault, Fault::Broken(_))
}

fn handshake_of_qemu() {
    let server = Stranger::qemu(&[]);
    let mut handshake = server.handshake();
    assert_eq!(handshake.list().unwrap(), [("name".to_owned(), "words".to_owned())]);
    let requests = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    let export = handshake.info("name", &requests).unwrap();
    assert_eq!((export.size, export.name.as_deref()), (SIZE, Some("name")));
    assert_eq!(export.description.as_deref(), Some("words"));
    assert!(export.block_sizes.is_some_and(|[least, _, most]| least <= 512 && most == 32 << 20));
    assert!(export.has(export_flag::SEND_FLUSH | export_flag::SEND_FUA | export_flag::SEND_FAST_ZERO));
    assert!(!export.has(export_flag::SEND_DF), "structured replies were not asked for");
    assert_eq!(handshake.info("other", &[]).unwrap_err().refusal(), Some(reply::ERR_UNKNOWN));
    assert_eq!(handshake.starttls().unwrap_err().refusal(), Some(reply::ERR_POLICY));
    assert_eq!(handshake.plain_option(77, b"data").unwrap_err().refusal(), Some(reply::ERR_UNSUP));
    let early = handshake.set_meta_context("name", &[ALLOCATION]).unwrap_err();
    assert_eq!(early.refusal(), Some(reply::ERR_INVALID));
    handshake.structured_reply().unwrap();
    assert_eq!(handshake.list_meta_context("name", &[]).unwrap(), [ALLOCATION]);
    assert_eq!(handshake.list_meta_context("name", &["base:", "x:y"]).unwrap(), [ALLOCATION]);
    let contexts = handshake.set_meta_context("name", &[ALLOCATION, DEPTH, "x:y"]).unwrap();
    assert_eq!(contexts.iter().map(|context| context.name.as_str()).collect::<Vec<_>>(), [ALLOCATION]);
    assert!(handshake.info("name", &requests).unwrap().has(export_flag::SEND_DF));
    handshake.extended_headers().unwrap();
    assert_eq!(handshake.mode(), Mode::Extended);
    handshake.abort().unwrap();
}

fn exports_by_name_of_both() {
    for server in [Stranger::qemu(&[]), Stranger::nbdkit(&["file", "disk"])] {
        for flags in [1, 3] {
            let mut handshake = Handshake::greeted(connect::unix(&server.socket()).unwrap()).unwrap();
            handshake.send_client_flags(flags).unwrap();
            let mut disk = handshake.export_name(server.name).unwrap();
            assert_eq!((disk.export().size, disk.mode()), (SIZE, Mode::Simple));
            assert_eq!(disk.read(4096, 512).unwrap(), pattern(1, 4096, 512));
            disk.disconnect().unwrap();
        }
        // Flags that do not exist.
        let mut handshake = Handshake::greeted(connect::unix(&server.socket()).unwrap()).unwrap();
        handshake.send_client_flags(1 << 20).unwrap();
        assert!(handshake.list().unwrap_err().is_closed());
    }
    let server = Stranger::qemu(&[]);
    assert!(server.handshake().export_name("other").unwrap_err().is_closed());
}

/// Everything that changes or reads bytes, against a server that can do all of it.
fn commands(server: &Stranger, mode: Mode) {
    let mut disk = server.begin(mode);
    assert_eq!((disk.mode(), disk.export().size), (mode, SIZE));
    assert_eq!(disk.read(1000, 5000).unwrap(), pattern(1, 1000, 5000));
    let bytes = pattern(2, 0, 1 << 20);
    disk.write(3 << 20, &bytes).unwrap();
    disk.succeed(Request::write(5 << 20, &bytes[..4096]).with_flags(command_flag::FUA)).unwrap();
    disk.flush().unwrap();
    assert_eq!(disk.read((3 << 20) - 512, 1 << 20).unwrap(), [&[0; 512], &bytes[..(1 << 20) - 512]].concat());
    disk.succeed(Request::write_zeroes(3 << 20, 65536)).unwrap();
    disk.succeed(Request::write_zeroes((3 << 20) + 65536, 65536).with_flags(command_flag::NO_HOLE)).unwrap();
    assert_eq!(disk.read(3 << 20, 131_072).unwrap(), vec![0; 131_072]);
    disk.succeed(Request::trim(5 << 20, 65536).with_flags(command_flag::FUA)).unwrap();
    if disk.export().has(export_flag::SEND_CACHE) {
        disk.succeed(Request::cache(0, 1 << 20)).unwrap();
    }
    assert_eq!(disk.code(Request::read(SIZE - 512, 1024)).unwrap(), code::EINVAL);
    // QEMU has one code for everything that is wrong with a request.
    let behind = disk.code(Request::write(SIZE - 512, [0; 1024])).unwrap();
    assert_eq!(behind, if server.name == "name" { code::EINVAL } else { code::ENOSPC }, "{mode:?}");
    assert_eq!(disk.code(Request::read(0, 512).with_flags(command_flag::REQ_ONE)).unwrap(), code::EINVAL);
    assert_eq!(disk.code(Request::new(99, 0, 0)).unwrap(), code::EINVAL);
    disk.write(3 << 20, &vec![0; 1 << 20]).unwrap();
    assert_eq!(disk.read(0, 512).unwrap(), pattern(1, 0, 512), "still in step");
    disk.disconnect().unwrap();
}

fn commands_of_qemu() {
    let server = Stranger::qemu(&[]);
    Mode::ALL.into_iter().for_each(|mode| commands(&server, mode));
}

fn commands_of_nbdkit() {
    for arguments in [["file", "disk"], ["memory", "64M"]] {
        let server = Stranger::nbdkit(&arguments);
        let mut writer = server.begin(Mode::Simple);
        writer.write(0, &pattern(1, 0, 1 << 20)).unwrap();
        writer.disconnect().unwrap();
        [Mode::Simple, Mode::Structured].into_iter().for_each(|mode| commands(&server, mode));
        let refused = server.handshake().extended_headers().unwrap_err();
        assert_eq!(refused.refusal(), Some(reply::ERR_UNSUP), "a server without extended headers");
    }
}

fn holes_of_qemu() {
    let server = Stranger::qemu(&[]);
    for mode in [Mode::Structured, Mode::Extended] {
        let mut disk = server.begin(mode);
        let answer = disk.succeed(Request::read(0, 2 << 20)).unwrap();
        assert_eq!(answer.holes(), [(1 << 20, 1 << 20)]);
        assert_eq!(answer.data(), [pattern(1, 0, 1 << 20), vec![0; 1 << 20]].concat());
        let whole = disk.succeed(Request::read(0, 2 << 20).with_flags(command_flag::DF)).unwrap();
        assert_eq!((whole.holes(), whole.data()), (vec![], answer.data()));
    }
}

fn metadata_of_qemu() {
    let server = Stranger::qemu(&["-A"]);
    let [data, hole] = [(1 << 20, 0), (SIZE - (1 << 20), 3)].map(|(length, flags)| Extent { length, flags });
    for mode in [Mode::Structured, Mode::Extended] {
        let mut disk = server.begin(mode);
        let (allocation, depth) = (disk.context(ALLOCATION).unwrap(), disk.context(DEPTH).unwrap());
        let answer = disk.succeed(Request::block_status(0, SIZE)).unwrap();
        assert_eq!(answer.extents(allocation).unwrap(), [data, hole]);
        assert_eq!(answer.extents(depth).unwrap(), [Extent { length: SIZE, flags: 1 }]);
        let one = disk.succeed(Request::block_status(0, 4096).with_flags(command_flag::REQ_ONE)).unwrap();
        assert_eq!(one.extents(allocation).unwrap(), [Extent { length: 4096, flags: 0 }]);
        let extended = |chunk: &Chunk| matches!(chunk, Chunk::Status { extended: true, .. });
        assert_eq!(answer.chunks().any(extended), mode == Mode::Extended);
        if mode == Mode::Extended {
            assert!(disk.export().has(export_flag::BLOCK_STAT_PAYLOAD));
            let filtered = disk.succeed(Request::block_status_of(0, SIZE, &[depth])).unwrap();
            assert_eq!((filtered.extents(allocation), filtered.extents(depth).map(<[_]>::len)), (None, Some(1)));
            let unknown = disk.code(Request::block_status_of(0, SIZE, &[depth, 9999])).unwrap();
            assert_eq!(unknown, code::EINVAL);
        }
        disk.disconnect().unwrap();
    }
}

fn depths_of_a_chain_of_qemu() {
    let directory = tempfile::tempdir().unwrap();
    make_disk(&directory);
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(str::to_owned);
    assert_success(&qemu_img(&[create.as_slice(), &[at("disk"), at("child")]].concat()));
    let arguments = ["-k", "SOCKET", "-t", "-f", "qcow2", "-x", "name", "-A", "child"];
    let server = Stranger::start("qemu-nbd", &arguments, directory, "name");
    let mut disk = server.begin(Mode::Extended);
    disk.write(512 << 10, &vec![7; 64 << 10]).unwrap();
    let depth = disk.context(DEPTH).unwrap();
    let answer = disk.succeed(Request::block_status(0, 1 << 20)).unwrap();
    let depths: Vec<_> =
        answer.extents(depth).unwrap().iter().map(|extent| (extent.length >> 10, extent.flags)).collect();
    assert_eq!(depths[..2], [(512, 2), (64, 1)]);
}

fn lengths_of_64_bits_of_qemu() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("disk")).unwrap().set_len(1 << 40).unwrap();
    let arguments = ["-k", "SOCKET", "-t", "-f", "raw", "--discard=unmap", "disk"];
    let server = Stranger::start("qemu-nbd", &arguments, directory, "");
    let mut disk = server.begin(Mode::Extended);
    disk.succeed(Request::trim(0, 1 << 40)).unwrap();
    disk.succeed(Request::write_zeroes(0, 1 << 35)).unwrap();
    let allocation = disk.context(ALLOCATION).unwrap();
    let answer = disk.succeed(Request::block_status(0, 1 << 40)).unwrap();
    let sum: u64 = answer.extents(allocation).unwrap().iter().map(|extent| extent.length).sum();
    assert!(sum > 1 << 33, "{answer:?}");
}

fn many_in_flight() {
    let servers = [
        (Stranger::qemu(&[]), Mode::ALL.as_slice()),
        (Stranger::nbdkit(&["file", "disk"]), &[Mode::Simple, Mode::Structured]),
    ];
    for (server, modes) in servers {
        for &mode in modes {
            let mut disk = server.begin(mode);
            let mut expected = BTreeMap::new();
            for index in 0..40 {
                let (offset, length) = (index * 8192, 4096 + index);
                expected.insert(disk.send(Request::read(offset, length)).unwrap(), pattern(1, offset, length as usize));
            }
            assert_eq!(disk.in_flight(), 40);
            let (&last, _) = expected.last_key_value().unwrap();
            assert_eq!(disk.receive_of(last).unwrap().data(), expected.remove(&last).unwrap());
            for _ in 1..40 {
                let answer = disk.receive().unwrap().successful().unwrap();
                assert_eq!(Some(answer.data()), expected.remove(&answer.cookie));
            }
            assert_eq!((disk.in_flight(), expected.len()), (0, 0));
            disk.disconnect().unwrap();
        }
    }
}

fn replies_overtake_each_other() {
    let server = Stranger::nbdkit(&["--filter=delay", "memory", "64M", "delay-read=300ms"]);
    let mut disk = server.begin(Mode::Structured);
    let slow = disk.send(Request::read(0, 4096)).unwrap();
    let quick = disk.send(Request::write(1 << 20, [1; 512])).unwrap();
    assert_eq!(disk.receive().unwrap().cookie, quick);
    assert_eq!(disk.receive().unwrap().successful().unwrap().cookie, slow);
}

fn errors_of_nbdkit() {
    let server = Stranger::nbdkit(&["--filter=error", "memory", "64M", "error-pread=EIO", "error-pread-rate=100%"]);
    for mode in [Mode::Simple, Mode::Structured] {
        let mut disk = server.begin(mode);
        assert_eq!(disk.read(0, 512).unwrap_err().code(), Some(code::EIO));
        disk.write(0, &[1; 512]).unwrap();
        let fault = disk.read(0, 512).unwrap_err();
        assert!(!broken(&fault), "{fault}");
    }
    let server = Stranger::nbdkit(&["-r", "memory", "64M"]);
    let mut disk = server.begin(Mode::Structured);
    assert!(disk.export().has(export_flag::READ_ONLY));
    for request in [Request::write(0, [1; 512]), Request::trim(0, 512), Request::write_zeroes(0, 512)] {
        assert!([code::EPERM, code::EINVAL].contains(&disk.code(request).unwrap()));
    }
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
}

fn raw_bytes_reach_the_server() {
    let server = Stranger::qemu(&[]);
    // A wrong magic of an option ends the connection.
    let mut handshake = server.handshake();
    handshake.send_bytes(&[0xEE; 16]).unwrap();
    assert!(handshake.receive_reply().unwrap_err().is_closed());
    // Data of an option that are too short for what they say.
    let mut handshake = server.handshake();
    let lying = handshake.option(option::INFO, b"\0\0\0\x09four\0\0").unwrap_err();
    assert_eq!(lying.refusal(), Some(reply::ERR_INVALID));
    assert_eq!(handshake.list().unwrap().len(), 1, "the handshake goes on");
    // A header with anything in it, whose reply is read message by message.
    let mut disk = server.begin(Mode::Structured);
    let magic = wire::REQUEST_MAGIC;
    let flags = command_flag::FAST_ZERO;
    let header = Header { magic, flags, command: command::READ, cookie: 0xABCD, offset: 0, length: 1 };
    disk.send_header(&header).unwrap();
    let message = disk.receive_message().unwrap();
    assert_eq!((message.cookie, message.is_done()), (0xABCD, true));
    assert!(matches!(message.chunk, Chunk::Error(error) if error.code == code::EINVAL));
    disk.send_header(&Header { magic: 1, ..header }).unwrap();
    // QEMU has a last word about it before it closes.
    let end = std::iter::repeat_with(|| disk.receive_message()).take(2).find_map(Result::err);
    assert!(end.unwrap().is_closed());
}

fn servers_that_break_the_rules_are_found_out() {
    // A server made of bytes: whatever the client asks, this is the answer.
    let answer = |bytes: &'static [u8]| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &theirs, bytes).unwrap();
        (ours, theirs)
    };
    let (stream, _server) = answer(b"NBDMAGICIHAVEOPU\0\x03");
    assert!(broken(&Handshake::greeted(stream).unwrap_err()));
    let (stream, _server) = answer(b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x04\0\0\0\x01\0\0\0\0");
    let mut handshake = Handshake::start(stream).unwrap();
    assert!(broken(&handshake.list().unwrap_err()), "an answer to another option");
    let mut reply = wire::STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    reply.extend(1_u16.to_be_bytes());
    reply.extend(chunk_kind::NONE.to_be_bytes());
    reply.extend([0; 12]);
    let (stream, server) = answer(b"NBDMAGICIHAVEOPT\0\x03");
    std::io::Write::write_all(&mut &server, &reply).unwrap();
    let handshake = Handshake::start(stream).unwrap();
    let mut disk = handshake.into_transmission(vhdkit_testkit::nbd::ExportInfo::default());
    assert!(broken(&disk.receive().unwrap_err()), "a cookie that nobody sent");
}

fn main() {
    let qemu = || Needs::tools(&["qemu-nbd", "qemu-img"]);
    let nbdkit = || Needs::tools(&["nbdkit"]);
    let both = || Needs::tools(&["qemu-nbd", "nbdkit"]);
    main_with(vec![
        Case::new("handshake_of_qemu", qemu(), handshake_of_qemu),
        Case::new("exports_by_name_of_both", both(), exports_by_name_of_both),
        Case::new("commands_of_qemu", qemu(), commands_of_qemu),
        Case::new("commands_of_nbdkit", nbdkit(), commands_of_nbdkit),
        Case::new("holes_of_qemu", qemu(), holes_of_qemu),
        Case::new("metadata_of_qemu", qemu(), metadata_of_qemu),
        Case::new("depths_of_a_chain_of_qemu", qemu(), depths_of_a_chain_of_qemu),
        Case::new("lengths_of_64_bits_of_qemu", qemu(), lengths_of_64_bits_of_qemu),
        Case::new("many_in_flight", both(), many_in_flight),
        Case::new("replies_overtake_each_other", nbdkit(), replies_overtake_each_other),
        Case::new("errors_of_nbdkit", nbdkit(), errors_of_nbdkit),
        Case::new("raw_bytes_reach_the_server", qemu(), raw_bytes_reach_the_server),
        Case::new(
            "servers_that_break_the_rules_are_found_out",
            Needs::nothing(),
            servers_that_break_the_rules_are_found_out,
        ),
    ]);
}
