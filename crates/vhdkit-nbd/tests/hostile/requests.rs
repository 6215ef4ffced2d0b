//! Malformed requests.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;

use vhdkit_nbd::Options;
use vhdkit_testkit::Rng;
use vhdkit_testkit::nbd::wire::{self, code, command, command_flag as flag};
use vhdkit_testkit::nbd::{Fault, Header, Mode, Request, connect};

use crate::siege::{LITTLE, Siege};
use crate::support::devices::Striped;
use crate::support::{Disk, MIB, pattern};

/// The server must end the connection, after whatever it still has to say.
#[track_caller]
fn assert_cut_off(disk: &mut Disk) {
    let end = std::iter::repeat_with(|| disk.receive_message()).take(10_000).find_map(Result::err);
    let fault = end.expect("an end of the messages");
    assert!(fault.is_closed(), "{fault}");
}

fn magic_of(mode: Mode) -> u32 {
    if mode == Mode::Extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC }
}

#[test]
fn wrong_magics_end_the_connection() {
    let siege = Siege::new();
    let wrong = [
        wire::REQUEST_MAGIC,
        wire::EXTENDED_REQUEST_MAGIC,
        wire::SIMPLE_REPLY_MAGIC,
        wire::STRUCTURED_REPLY_MAGIC,
        wire::EXTENDED_REPLY_MAGIC,
        0x1256_0953,
        0,
        u32::MAX,
        u32::from_be_bytes(*b"IHAV"),
    ];
    for (mode, magic) in Mode::ALL.into_iter().flat_map(|mode| wrong.map(|magic| (mode, magic))) {
        if magic == magic_of(mode) {
            continue;
        }
        let mut disk = siege.server.begin(mode);
        let good = disk.send(Request::read(0, 512)).unwrap();
        let header = Header { magic, flags: 0, command: command::READ, cookie: 1, offset: 0, length: 512 };
        disk.send_header(&header).unwrap();
        assert_eq!(disk.receive_of(good).unwrap().code(), 0, "what came before is answered");
        assert_cut_off(&mut disk);
    }
    siege.end(LITTLE);
}

#[test]
fn writes_that_are_too_long_take_no_memory() {
    let siege = Siege::new();
    let mut held = Vec::new();
    for (mode, length) in [
        (Mode::Simple, (32 << 20) + 1),
        (Mode::Structured, u64::from(u32::MAX)),
        (Mode::Extended, 1 << 32),
        (Mode::Extended, 1 << 63),
        (Mode::Extended, u64::MAX),
    ] {
        for offset in [0, u64::MAX] {
            let mut disk = siege.server.begin(mode);
            let flags = if mode == Mode::Extended { flag::PAYLOAD_LEN } else { 0 };
            let command = command::WRITE;
            let header = Header { magic: magic_of(mode), flags, command, cookie: 1, offset, length };
            disk.send_header(&header).unwrap();
            // As much of it as the server takes; it may have had enough at any moment.
            let _ = disk.send_bytes(&vec![0; 2 << 20]);
            held.push(disk);
        }
    }
    siege.good_client();
    siege.assert_bounded(LITTLE);
    drop(held);
    siege.end(LITTLE);
}

#[test]
fn writes_without_the_flag_that_says_so_are_not_guessed_at() {
    let siege = Siege::new();
    let mut disk = siege.server.begin(Mode::Extended);
    // What follows is the payload, or the end; in no case the next request.
    let zeroes = Request::write_zeroes(0, MIB).bytes(Mode::Extended, 77);
    let length = zeroes.len() as u64;
    disk.write(0, &pattern(1, 4096)).unwrap();
    let magic = magic_of(Mode::Extended);
    let header = Header { magic, flags: 0, command: command::WRITE, cookie: 5, offset: MIB, length };
    let flush = Request::flush().bytes(Mode::Extended, 8);
    disk.send_bytes(&[header.extended(), zeroes, flush].concat()).unwrap();
    loop {
        match disk.receive_message() {
            Ok(message) if message.cookie == 8 => break,
            Ok(message) => assert_eq!(message.cookie, 5, "a payload was taken for a request"),
            Err(fault) => {
                assert!(fault.is_closed(), "{fault}");
                break;
            }
        }
    }
    drop(disk);
    let mut disk = siege.server.begin(Mode::Extended);
    assert_eq!(disk.read(0, 4096).unwrap(), pattern(1, 4096));
    drop(disk);
    siege.end(LITTLE);
}

/// A header with anything in it, but such that the client knows what has to come back.
fn random_request(rng: &mut Rng, mode: Mode) -> Request {
    let numbers = [0, 1, 511, 512, MIB, 64 * MIB - 1, 64 * MIB, 1 << 32, 1 << 63, u64::MAX - 511, u64::MAX];
    let command = rng.pick(&[0, 1, 3, 4, 5, 6, 7, 7, 8, 9, 255, 0xFFFF]);
    let flags = if rng.chance(50) { rng.next_u64() as u16 & 0x3F } else { 1 << rng.below(16) };
    let offset = rng.pick(&numbers);
    let mut length = rng.pick(&numbers);
    if mode != Mode::Extended {
        length = length.min(u64::from(u32::MAX));
    }
    // Small enough to be sent, for what has a payload; and answers that are not too long.
    let payload = match mode {
        Mode::Extended => flags & flag::PAYLOAD_LEN != 0 || command == command::WRITE,
        _ => command == command::WRITE,
    };
    if payload || command == command::READ {
        length = length.min(rng.below(70_000));
    }
    let payload = if payload { rng.bytes(length as usize) } else { Vec::new() };
    Request { flags, command, offset, length, payload }
}

#[test]
fn random_requests_are_answered_by_the_rules() {
    let siege = Siege::new();
    for mode in Mode::ALL {
        let mut rng = Rng::new(11 + mode as u64);
        let mut disk = siege.server.begin(mode);
        for round in 0..1500 {
            let request = random_request(&mut rng, mode);
            let reply =
                disk.call(request.clone()).unwrap_or_else(|fault| panic!("{mode:?} {round} {request:x?}: {fault}"));
            let codes = [0, code::EINVAL, code::ENOSPC, code::ENOTSUP, code::EOVERFLOW];
            assert!(codes.contains(&reply.code()), "{}", reply.outline());
        }
        disk.disconnect().unwrap();
    }
    siege.end(LITTLE);
}

#[test]
fn random_bytes_instead_of_requests_end_the_connection() {
    let siege = Siege::new();
    let mut rng = Rng::new(5);
    for round in 0..100 {
        let mode = rng.pick(&Mode::ALL);
        let mut disk = siege.server.begin(mode);
        // It does not begin like a request.
        let bytes = [vec![0], rng.bytes(32 + round * 700)].concat();
        let _ = disk.send_bytes(&bytes);
        assert_cut_off(&mut disk);
    }
    siege.end(LITTLE);
}

#[test]
fn questions_with_long_answers_are_bounded() {
    // Each reply has thousands of extents, and the client reads none of them.
    let siege = Siege::beside(std::sync::Arc::new(Striped), Options::default());
    let mut clients = Vec::new();
    for mode in [Mode::Structured, Mode::Extended] {
        let mut disk = connect::begin(siege.server.stream(), mode, "other").unwrap();
        let stream = disk.stream();
        stream.set_nonblocking(true).unwrap();
        let questions = Request::block_status(0, 1 << 31).bytes(mode, 1).repeat(500);
        let took = connect::wait_for(std::time::Duration::from_secs(4), || {
            // As many as the server takes, for as long as it takes any.
            let mut sent = 0;
            while let Ok(count) = disk.stream().write(&questions[sent % questions.len()..]) {
                sent += count;
            }
            siege.assert_bounded(crate::siege::BOUND);
            None::<()>
        });
        assert!(took.is_none());
        clients.push(disk);
    }
    siege.good_client();
    siege.assert_bounded(crate::siege::BOUND);
    drop(clients);
    siege.end(crate::siege::BOUND);
}

#[test]
fn payloads_of_questions_that_do_not_come_do_not_matter() {
    let siege = Siege::new();
    let mut held = Vec::new();
    for (length, sent) in [(12, 0), (12, 11), (16, 1), (4096, 100), (1 << 31, 4096)] {
        let mut disk = siege.server.begin(Mode::Extended);
        let magic = magic_of(Mode::Extended);
        let (flags, command) = (flag::PAYLOAD_LEN, command::BLOCK_STATUS);
        let header = Header { magic, flags, command, cookie: 9, offset: 0, length };
        disk.send_header(&header).unwrap();
        disk.send_bytes(&vec![0; sent]).unwrap();
        held.push(disk);
    }
    siege.good_client();
    for mut disk in held {
        disk.stream().shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        disk.stream().read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "an answer to half a question: {rest:?}");
    }
    siege.end(LITTLE);
}

#[test]
fn a_client_that_sends_no_more_gets_its_answers() {
    let siege = Siege::new();
    for mode in Mode::ALL {
        let mut disk = siege.server.begin(mode);
        let bytes = pattern(8, 4 * MIB as usize);
        let write = disk.send(Request::write(8 * MIB, bytes.clone())).unwrap();
        let others: Vec<_> = (0..50).map(|index| disk.send(Request::read(index * 512, 512)).unwrap()).collect();
        let flush = disk.send(Request::flush()).unwrap();
        disk.stream().shutdown(Shutdown::Write).unwrap();
        for cookie in others.into_iter().chain([write, flush]) {
            disk.receive_of(cookie).unwrap().successful().unwrap();
        }
        let end: Result<_, Fault> = disk.receive_message();
        assert!(end.unwrap_err().is_closed());
    }
    siege.end(LITTLE);
}
