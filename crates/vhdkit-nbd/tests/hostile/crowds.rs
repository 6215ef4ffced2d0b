//! Many clients at once, and one after another.

use std::os::unix::net::UnixStream;

use vhdkit_nbd::Options;
use vhdkit_testkit::nbd::{Handshake, Mode, connect};

use crate::siege::{BOUND, LITTLE, Siege};
use crate::support::{MIB, PATIENCE};

/// How many sockets this process may have besides what it needs.
fn sockets_max() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let soft = line.split_whitespace().nth(3).unwrap();
    soft.parse::<usize>().unwrap_or(usize::MAX) - 100
}

#[test]
fn a_thousand_connections_one_after_another_leave_nothing() {
    let siege = Siege::new();
    for round in 0..1000 {
        let stream = siege.server.stream();
        match round % 4 {
            0 => drop(stream),
            1 => drop(Handshake::greeted(stream)),
            2 => drop(Handshake::start(stream)),
            // The server may still be busy with those before; then there is no place.
            _ => drop(connect::begin(stream, Mode::ALL[round % 3], crate::support::NAME)),
        }
    }
    siege.server.wait_until_empty();
    siege.end(LITTLE);
}

#[test]
fn a_thousand_connections_at_once_are_served_up_to_the_limit() {
    let siege = Siege::new();
    let limit = Options::default().connections_max;
    // Where the system allows fewer sockets, there are fewer clients, but more than the server takes.
    let count = 1000.min((sockets_max() - limit) * 2 / 3);
    assert!(count > limit + 100, "the limit of open files leaves no room for this test");
    let streams: Vec<UnixStream> = (0..count).map(|_| siege.server.stream()).collect();
    let all_came = || (siege.server.handle.totals().turned_away as usize == count - limit).then_some(());
    assert!(connect::wait_for(PATIENCE, all_came).is_some(), "{:?}", siege.server.handle.totals());
    assert_eq!(siege.server.handle.connections(), limit);
    // Nobody has shaken hands yet: those who came last have the places, and get all they ask for.
    let mut served = 0;
    for (index, stream) in streams.into_iter().enumerate() {
        let Ok(mut disk) = connect::begin(stream, Mode::Structured, crate::support::NAME) else {
            assert!(index < count - limit, "{index}");
            continue;
        };
        assert_eq!(disk.read(32 * MIB + index as u64 * 512, 512).unwrap(), [0; 512]);
        served += 1;
    }
    assert_eq!(served, limit);
    siege.server.wait_until_empty();
    siege.end(BOUND);
}

#[test]
fn as_many_clients_as_are_allowed_work_at_once() {
    let siege = Siege::new();
    let limit = Options::default().connections_max;
    let mut disks: Vec<_> = (0..limit).map(|index| siege.server.begin(Mode::ALL[index % 3])).collect();
    for round in 0..3 {
        let cookies: Vec<_> = disks
            .iter_mut()
            .enumerate()
            .map(|(index, disk)| {
                let offset = 2 * MIB + (index as u64 * 3 + round) * 4096;
                disk.send(vhdkit_testkit::nbd::Request::write(offset, vec![index as u8; 4096])).unwrap()
            })
            .collect();
        for (disk, cookie) in disks.iter_mut().zip(cookies) {
            disk.receive_of(cookie).unwrap().successful().unwrap();
        }
    }
    for (index, disk) in disks.iter_mut().enumerate() {
        let other = (index + 1) % limit;
        assert_eq!(disk.read(2 * MIB + other as u64 * 3 * 4096, 3 * 4096).unwrap(), vec![other as u8; 3 * 4096]);
    }
    assert!(Handshake::start(siege.server.stream()).is_err(), "one more than the limit");
    drop(disks);
    assert!(connect::wait_for(PATIENCE, || (siege.server.handle.connections() == 0).then_some(())).is_some());
    siege.end(BOUND);
}
