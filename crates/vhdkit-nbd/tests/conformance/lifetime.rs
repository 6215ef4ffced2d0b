//! The server itself: what it is made of, how many it serves, how it ends.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhdkit_nbd::{Export, Listener, Options, Server};
use vhdkit_testkit::nbd::{Handshake, Mode, Request, connect, expect_closed};

use crate::support::devices::{Manner, Staged};
use crate::support::{MIB, NAME, PATIENCE, Served, image, pattern};

#[test]
fn a_server_is_made_of_sensible_things_only() {
    let export = |name: &str| Export::new(name, image(8 * MIB));
    let make = |exports: Vec<Export>, options: Options| Server::new(exports, options).map(drop);
    make(vec![export("one").unwrap(), export("two").unwrap()], Options::default()).unwrap();
    make(vec![], Options::default()).unwrap_err();
    make(vec![export("one").unwrap(), export("one").unwrap()], Options::default()).unwrap_err();
    for connections_max in [0, 100_000] {
        make(vec![export("one").unwrap()], Options { connections_max, ..Options::default() }).unwrap_err();
    }
    export(&"n".repeat(4097)).unwrap_err();
    export("a\0b").unwrap_err();
}

#[test]
fn what_is_under_way_is_answered_before_the_server_ends() {
    let device = Arc::new(Staged::new(&[Manner::Quick, Manner::Gate]));
    let server = Served::disk(Arc::clone(&device) as _);
    for mode in Mode::ALL {
        assert!(server.begin(mode).read(0, 512).is_ok());
    }
    let mut disk = server.begin(Mode::Extended);
    let read = disk.send(Request::read(MIB, 4096)).unwrap();
    let write = disk.send(Request::write(MIB, [5; 512])).unwrap();
    let waiting = || (device.waiting.load(Ordering::SeqCst) == 2).then_some(());
    assert!(connect::wait_for(PATIENCE, waiting).is_some(), "both wait for the medium");
    server.handle.stop();
    device.open_gate();
    let first = disk.receive().unwrap().successful().unwrap().cookie;
    let second = disk.receive().unwrap().successful().unwrap().cookie;
    let mut answered = [first, second];
    answered.sort_unstable();
    assert_eq!(answered, [read.min(write), read.max(write)]);
    expect_closed(disk.stream()).unwrap();
    assert!(connect::wait_for(PATIENCE, || server.has_ended().then_some(())).is_some());
    server.stop();
}

#[test]
fn disconnecting_waits_for_what_is_under_way() {
    let device = Arc::new(Staged::new(&[Manner::Gate]));
    let server = Served::disk(Arc::clone(&device) as _);
    let mut disk = server.begin(Mode::Structured);
    let read = disk.send(Request::read(0, 4096)).unwrap();
    disk.send_bytes(&Request::disconnect().bytes(Mode::Structured, 9)).unwrap();
    let waiting = || (device.waiting.load(Ordering::SeqCst) == 1).then_some(());
    assert!(connect::wait_for(PATIENCE, waiting).is_some());
    device.open_gate();
    assert_eq!(disk.receive_of(read).unwrap().data(), &device.contents()[..4096]);
    expect_closed(disk.stream()).unwrap();
}

#[test]
fn a_server_without_clients_ends_when_it_is_told_to() {
    let options = Options { idle_exit: Some(Duration::from_millis(300)), ..Options::default() };
    let server = Served::new(vec![Export::new(NAME, image(8 * MIB)).unwrap()], options);
    let mut disk = server.begin(Mode::Simple);
    // Longer than the limit, but not idle.
    let busy_until = Instant::now() + Duration::from_millis(700);
    while Instant::now() < busy_until {
        disk.read(0, 512).unwrap();
        assert!(!server.has_ended());
    }
    disk.disconnect().unwrap();
    let ended = connect::wait_for(PATIENCE, || server.has_ended().then_some(()));
    assert!(ended.is_some(), "the server goes on without clients");
}

#[test]
fn clients_beyond_the_limit_are_turned_away_until_there_is_room() {
    let options = Options { connections_max: 3, ..Options::default() };
    let server = Served::new(vec![Export::new(NAME, image(8 * MIB)).unwrap()], options);
    let mut disks: Vec<_> = (0..3).map(|_| server.begin(Mode::Simple)).collect();
    let refused = Handshake::start(server.stream()).unwrap_err();
    assert!(refused.is_closed(), "{refused}");
    assert_eq!(server.handle.totals().turned_away, 1);
    for disk in &mut disks {
        assert_eq!(disk.read(0, 512).unwrap(), [0; 512], "who was there first is not disturbed");
    }
    disks.pop().unwrap().disconnect().unwrap();
    let again = || Handshake::start(server.stream()).ok();
    assert!(connect::wait_for(PATIENCE, again).is_some(), "there is room again");
}

#[test]
fn several_listeners_of_both_kinds_are_served() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| directory.path().join(name));
    let mut listeners: Vec<_> = paths.iter().map(|path| Listener::Unix(UnixListener::bind(path).unwrap())).collect();
    let ports = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = ports.each_ref().map(|port| port.local_addr().unwrap());
    listeners.extend(ports.map(Listener::Tcp));
    let export = Export::new(NAME, image(8 * MIB)).unwrap().writable(true);
    let server = Server::new(vec![export], Options::default()).unwrap();
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.run(listeners));
    let bytes = pattern(3, 3 * MIB as usize);
    let mut first = connect::begin(connect::unix(&paths[0]).unwrap(), Mode::Extended, NAME).unwrap();
    first.write(77, &bytes).unwrap();
    for (mode, address) in Mode::ALL.into_iter().flat_map(|mode| addresses.map(|address| (mode, address))) {
        let mut disk = connect::begin(connect::tcp(address).unwrap(), mode, NAME).unwrap();
        assert!(disk.read(77, bytes.len() as u64).unwrap() == bytes, "{mode:?} {address}");
        disk.write(77, &bytes).unwrap();
        disk.disconnect().unwrap();
    }
    let mut second = connect::begin(connect::unix(&paths[1]).unwrap(), Mode::Simple, NAME).unwrap();
    assert!(second.read(77, bytes.len() as u64).unwrap() == bytes);
    handle.stop();
    thread.join().unwrap().unwrap();
    assert!(connect::tcp(addresses[0]).is_err(), "nobody listens any more");
}

#[test]
fn totals_count_what_was_done() {
    let (server, _image) = Served::image();
    let mut disk = server.begin(Mode::Extended);
    disk.write(0, &pattern(1, 4096)).unwrap();
    disk.read(0, 8192).unwrap();
    disk.flush().unwrap();
    disk.succeed(Request::trim(0, 4096)).unwrap();
    disk.succeed(Request::write_zeroes(0, 4096)).unwrap();
    disk.succeed(Request::cache(0, 4096)).unwrap();
    disk.succeed(Request::block_status(0, 4096)).unwrap();
    assert_ne!(disk.code(Request::new(99, 0, 0)).unwrap(), 0);
    disk.disconnect().unwrap();
    server.wait_until_empty();
    let totals = server.handle.totals();
    assert_eq!((totals.connections, totals.reads, totals.writes, totals.flushes), (1, 1, 1, 1));
    assert_eq!((totals.trims, totals.zeroes, totals.caches, totals.block_statuses), (1, 1, 1, 1));
    assert_eq!((totals.bytes_read, totals.bytes_written, totals.errors), (8192, 4096, 1));
    assert_eq!((totals.handshakes_failed, totals.protocol_errors), (0, 0));
}

/// Requests that would take hours end with their client, and with the server.
#[test]
fn long_work_ends_with_its_client_and_with_the_server() {
    let disk_bytes = 16 << 40;
    let long = |server: &Served, request: Request| {
        let mut disk = server.begin(Mode::Extended);
        disk.send(request).unwrap();
        disk
    };
    let requests = || [Request::cache(0, disk_bytes), Request::write_zeroes(0, disk_bytes).with_flags(2)];
    for request in requests() {
        let options = Options { drain_time: Duration::from_millis(100), ..Options::default() };
        let export = Export::new(NAME, image(disk_bytes)).unwrap().writable(true);
        let server = Served::new(vec![export], options);
        drop(long(&server, request.clone()));
        server.wait_until_empty();
        let still_there = long(&server, request);
        server.wait_until_connected(1);
        server.handle.stop();
        assert!(connect::wait_for(PATIENCE, || server.has_ended().then_some(())).is_some(), "the server goes on");
        drop(still_there);
    }
}

/// A client that never stops asking is served until the server is told to stop, and no longer.
#[test]
fn a_stop_ends_clients_that_never_stop_asking() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let options = Options { drain_time: Duration::from_secs(3600), ..Options::default() };
    let server = Server::new(vec![Export::new(NAME, image(8 * MIB)).unwrap()], options).unwrap();
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.run(vec![Listener::Tcp(listener)]));
    let client = std::thread::spawn(move || {
        let mut disk = connect::begin(connect::tcp(address).unwrap(), Mode::Simple, NAME).unwrap();
        let mut count = 0_u64;
        loop {
            while disk.in_flight() < 16 {
                if disk.send(Request::read(0, 64 << 10)).is_err() {
                    return count;
                }
            }
            if disk.receive().is_err() {
                return count;
            }
            count += 1;
        }
    });
    assert!(connect::wait_for(PATIENCE, || (handle.totals().reads > 100).then_some(())).is_some());
    handle.stop();
    assert!(connect::wait_for(PATIENCE, || thread.is_finished().then_some(())).is_some(), "the server goes on");
    thread.join().unwrap().unwrap();
    assert!(client.join().unwrap() > 0);
}
