//! Clients that do not read, do not send, or take their time.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhdkit_nbd::{Export, Options};
use vhdkit_testkit::nbd::wire::{command, command_flag as flag};
use vhdkit_testkit::nbd::{Handshake, Header, Mode, Request, connect, wire};

use crate::siege::{BOUND, LITTLE, Siege, assert_cut_off};
use crate::support::devices::{Manner, Staged};
use crate::support::{MIB, NAME, PATIENCE, image, pattern, tls};

/// Sends the same bytes again and again until the server takes no more for a while, or so many of them are sent.
fn send_until_full(stream: &mut std::os::unix::net::UnixStream, bytes: &[u8], times: usize) {
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..times {
        if stream.write_all(bytes).is_err() {
            return;
        }
    }
}

#[test]
fn clients_that_read_no_replies_hold_up_nobody_else() {
    let siege = Siege::new();
    let mut writer = siege.server.begin(Mode::Simple);
    writer.write(0, &pattern(1, 32 * MIB as usize)).unwrap();
    writer.disconnect().unwrap();
    let mut deaf = Vec::new();
    for round in 0..24 {
        let mode = Mode::ALL[round % 3];
        let mut disk = siege.server.begin(mode);
        let request = match round % 4 {
            0 => Request::read(0, 32 * MIB),
            1 => Request::read(0, 64 << 10),
            2 => Request::read(0, 512),
            _ => Request::flush(),
        };
        // The same cookie each time; nobody will read it. Of the long ones a few are enough to fill everything.
        let times = if request.length > MIB { 1 } else { 200 };
        send_until_full(disk.stream(), &request.bytes(mode, 1).repeat(50), times);
        deaf.push(disk);
        if round % 6 == 5 {
            siege.good_client();
        }
    }
    siege.assert_bounded(BOUND);
    drop(deaf);
    siege.end(BOUND);
}

#[test]
fn large_requests_are_served_while_others_have_all_the_memory() {
    let siege = Siege::new();
    let bytes = pattern(1, 32 * MIB as usize);
    let mut writer = siege.server.begin(Mode::Simple);
    writer.write(16 * MIB, &bytes).unwrap();
    let mut deaf = Vec::new();
    for _ in 0..12 {
        let mut disk = siege.server.begin(Mode::Simple);
        let requests = Request::read(16 * MIB, 32 * MIB).bytes(Mode::Simple, 1).repeat(3);
        send_until_full(disk.stream(), &requests, 1);
        deaf.push(disk);
    }
    for (mode, flags) in Mode::ALL.into_iter().flat_map(|mode| [(mode, 0), (mode, flag::DF)]) {
        if mode == Mode::Simple && flags != 0 {
            continue;
        }
        let mut disk = siege.server.begin(mode);
        let reply = disk.succeed(Request::read(16 * MIB, 32 * MIB).with_flags(flags)).unwrap();
        assert!(reply.data() == bytes, "{mode:?} {flags}");
        for flags in [0, flag::FUA] {
            disk.succeed(Request::write(16 * MIB, bytes.clone()).with_flags(flags)).unwrap();
        }
        disk.succeed(Request::cache(0, 64 * MIB)).unwrap();
    }
    siege.good_client();
    drop((deaf, writer));
    // This client has several times the largest request in memory itself.
    siege.end(BOUND + 160 * MIB);
}

#[test]
fn what_a_client_asked_for_that_is_gone_is_not_done() {
    // A few kilobytes of requests make the server read gigabytes, for nobody.
    for mode in Mode::ALL {
        let siege = Siege::new();
        let mut disk = siege.server.begin(mode);
        disk.write(0, &pattern(1, 32 * MIB as usize)).unwrap();
        let requests = Request::read(0, 32 * MIB).bytes(mode, 1).repeat(4000);
        send_until_full(disk.stream(), &requests, 1);
        drop(disk);
        siege.good_client();
        siege.end(BOUND);
    }
}

#[test]
fn deaf_clients_over_tls_hold_up_nobody_else() {
    let options = Options { tls: Some(tls::server(false).optional()), ..Options::default() };
    let siege = Siege::with(options);
    let mut writer = siege.server.begin(Mode::Simple);
    writer.write(0, &pattern(1, 32 * MIB as usize)).unwrap();
    writer.disconnect().unwrap();
    let mut deaf = Vec::new();
    for round in 0..12 {
        let mut handshake = tls::upgrade(siege.server.handshake(), None).unwrap();
        let mode = Mode::ALL[round % 3];
        handshake.agree_on(mode).unwrap();
        let mut disk = handshake.go(NAME, &[]).unwrap();
        let length = if round % 2 == 0 { 32 * MIB } else { 4096 };
        let times = if length > MIB { 1 } else { 40 };
        let bytes = Request::read(0, length).bytes(mode, 1).repeat(50);
        disk.stream().sock.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let _ = (0..times).try_for_each(|_| disk.stream().write_all(&bytes));
        deaf.push(disk);
    }
    siege.good_client();
    siege.assert_bounded(BOUND);
    drop(deaf);
    siege.end(BOUND);
}

#[test]
fn payloads_that_are_promised_and_never_sent_cost_little() {
    let siege = Siege::new();
    let mut held = Vec::new();
    for round in 0..100 {
        let mode = Mode::ALL[round % 3];
        let mut disk = siege.server.begin(mode);
        let magic = if mode == Mode::Extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        let flags = if mode == Mode::Extended { flag::PAYLOAD_LEN } else { 0 };
        let header = Header { magic, flags, command: command::WRITE, cookie: 1, offset: 0, length: 32 << 20 };
        disk.send_header(&header).unwrap();
        // Zeros of the last blocks; the first MiB is where good clients write.
        disk.send_bytes(&vec![0; 1000 * (round % 20)]).unwrap();
        held.push(disk);
    }
    siege.good_client();
    siege.assert_bounded(BOUND);
    drop(held);
    siege.end(BOUND);
}

#[test]
fn clients_of_a_stuck_disk_hold_up_only_themselves() {
    let device = Arc::new(Staged::new(&[Manner::Gate]));
    let siege = Siege::beside(Arc::clone(&device) as _, Options::default());
    let mut stuck = connect::begin(siege.server.stream(), Mode::Extended, "other").unwrap();
    for index in 0..200 {
        stuck.send(Request::read(index * 512, 512)).unwrap();
        stuck.send(Request::block_status(0, 512)).unwrap();
    }
    let waits = || (device.waiting.load(Ordering::SeqCst) >= 8).then_some(());
    assert!(connect::wait_for(PATIENCE, waits).is_some(), "the disk is not stuck");
    siege.good_client();
    // The client goes without waiting for its answers.
    drop(stuck);
    siege.good_client();
    device.open_gate();
    siege.end(LITTLE);
}

#[test]
fn handshakes_that_take_too_long_are_cut_off() {
    let handshake_time = Duration::from_millis(400);
    let options = Options { handshake_time, tls: Some(tls::server(false).optional()), ..Options::default() };
    let siege = Siege::with(options);
    // Who says nothing at all, who stops at any point, who stops within TLS.
    let mut held = Vec::new();
    held.push(Handshake::greeted(siege.server.stream()).unwrap());
    held.push(siege.handshake());
    let mut half = siege.handshake();
    half.send_bytes(&wire::option_bytes_saying(99, 1000, b"some")).unwrap();
    held.push(half);
    let mut refused = siege.handshake();
    refused.send_bytes(&wire::option_bytes_saying(99, 900_000, b"some")).unwrap();
    held.push(refused);
    let mut secret = siege.handshake();
    secret.starttls().unwrap();
    secret.send_bytes(&[22, 3, 1]).unwrap();
    held.push(secret);
    for mut handshake in held {
        assert_cut_off(&mut handshake);
    }
    // Longer than the limit in all, though never silent for long: one byte at a time, and one option at a time.
    let started = Instant::now();
    let mut slow = Handshake::greeted(siege.server.stream()).unwrap();
    let words = [3_u32.to_be_bytes().to_vec(), wire::option_bytes(option_of_nobody(), &[0; 10_000])].concat();
    let mut bytes = words.iter();
    let cut_off = connect::wait_for(PATIENCE, || slow.send_bytes(&[*bytes.next()?]).err());
    assert!(cut_off.is_some_and(|fault| fault.is_closed()));
    let mut talker = siege.handshake();
    let cut_off = connect::wait_for(PATIENCE, || talker.list().err());
    assert!(cut_off.is_some_and(|fault| fault.is_closed()), "it talks, but gets nowhere");
    assert!(started.elapsed() < PATIENCE);
    // The limit is one of handshakes: who has begun may be silent for as long as it likes.
    let mut disk = siege.server.begin(Mode::Extended);
    std::thread::sleep(2 * handshake_time);
    assert_eq!(disk.read(32 * MIB, 512).unwrap(), [0; 512]);
    drop(disk);
    siege.end(LITTLE);
}

/// An option that nobody knows.
fn option_of_nobody() -> u32 {
    99
}

#[test]
fn slow_handshakes_do_not_keep_the_door_shut() {
    let handshake_time = Duration::from_secs(3600);
    let siege = Siege::with(Options { handshake_time, connections_max: 8, ..Options::default() });
    let mut held: Vec<_> = (0..8).map(|_| Handshake::greeted(siege.server.stream()).unwrap()).collect();
    // Whoever comes gets the place of the slowest one, and keeps it once he has said what he wants.
    let mut disks: Vec<_> = (0..8).map(|_| siege.server.begin(Mode::Extended)).collect();
    for handshake in &mut held {
        assert_cut_off(handshake);
    }
    assert!(Handshake::greeted(siege.server.stream()).is_err(), "all places are taken");
    for disk in &mut disks {
        assert_eq!(disk.read(32 * MIB, 512).unwrap(), [0; 512]);
    }
    drop((held, disks));
    siege.end(LITTLE);
}

#[test]
fn the_server_ends_although_clients_read_nothing() {
    let options = Options { drain_time: Duration::from_millis(500), ..Options::default() };
    let siege = Siege::with(options);
    let mut deaf = Vec::new();
    for mode in Mode::ALL {
        let mut disk = siege.server.begin(mode);
        disk.write(0, &pattern(1, 4 * MIB as usize)).unwrap();
        let bytes = Request::read(0, 4 * MIB).bytes(mode, 1).repeat(50);
        send_until_full(disk.stream(), &bytes, 20);
        deaf.push(disk);
    }
    siege.server.handle.stop();
    let ended = connect::wait_for(PATIENCE, || siege.server.has_ended().then_some(()));
    assert!(ended.is_some(), "the server waits for those who do not read");
}

/// Options that ask for long lists, of clients that take the answers slowly or not at all, cost little memory and end in time.
#[test]
fn answers_that_nobody_takes_end_with_the_time_of_the_handshake() {
    let long = |index: usize| format!("{index:04}{}", "n".repeat(4000));
    let many = (0..60).map(|index| Export::new(long(index), image(MIB)).unwrap().description("d".repeat(4000)));
    let good = Export::new(NAME, image(64 * MIB)).unwrap().writable(true);
    let options = Options { handshake_time: Duration::from_secs(2), ..Options::default() };
    let siege = Siege::serving(many.chain([good]).collect(), options);
    let lists = wire::option_bytes(3, &[]).repeat(250);
    let mut held = Vec::new();
    for _ in 0..32 {
        let mut handshake = siege.handshake();
        handshake.send_bytes(&lists).unwrap();
        held.push(handshake);
    }
    // A little is taken all the time, so that no single call of the server's takes long.
    let mut bytes = [0; 2048];
    let alone = || {
        for handshake in &mut held {
            let _ = handshake.stream().read(&mut bytes);
        }
        (siege.server.handle.connections() == 0).then_some(())
    };
    assert!(connect::wait_for(PATIENCE, alone).is_some(), "the server still waits for them");
    drop(held);
    siege.end(LITTLE);
}

/// When others hold all the memory that there is, a connection's own thread reads what is large, in pieces. No other reply of
/// the same client may come between them.
#[test]
fn large_reads_without_memory_are_not_mixed_with_other_replies() {
    let siege = Siege::with(Options { connections_max: 256, ..Options::default() });
    let bytes = pattern(9, 32 * MIB as usize);
    let mut writer = siege.server.begin(Mode::Simple);
    writer.write(0, &bytes).unwrap();
    writer.disconnect().unwrap();
    let mut deaf = Vec::new();
    for length in [32 * MIB, 4 * MIB] {
        let mut disk = siege.server.begin(Mode::Simple);
        disk.send(Request::read(0, length)).unwrap();
        deaf.push(disk);
    }
    let stalled = || (siege.server.handle.totals().stalls == 2).then_some(());
    assert!(connect::wait_for(PATIENCE, stalled).is_some(), "the memory is taken");
    for (mode, flags) in [(Mode::Simple, 0), (Mode::Structured, flag::DF), (Mode::Extended, flag::DF)] {
        let mut disk = siege.server.begin(mode);
        for _ in 0..6 {
            let mut expected = std::collections::BTreeMap::new();
            for index in 0..12 {
                // Among large ones that are read here, small ones that workers read and write.
                let (offset, length) = (index * MIB, if index % 4 == 3 { 4096 } else { 512 << 10 });
                let cookie = disk.send(Request::read(offset, length).with_flags(flags)).unwrap();
                expected.insert(cookie, &bytes[offset as usize..][..length as usize]);
                let _flush = disk.send(Request::flush()).unwrap();
            }
            for _ in 0..24 {
                let reply = disk.receive().unwrap().successful().unwrap();
                if let Some(bytes) = expected.remove(&reply.cookie) {
                    assert!(reply.data() == bytes, "{mode:?} {}", reply.outline());
                }
            }
            assert!(expected.is_empty());
        }
    }
    drop(deaf);
    siege.end(BOUND);
}
