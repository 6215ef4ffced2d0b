//! Several requests at once: replies in any order, but each of them whole.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhdkit_testkit::nbd::wire::command_flag as flag;
use vhdkit_testkit::nbd::{Mode, Request, connect};

use crate::support::devices::{Manner, Staged};
use crate::support::{MIB, PATIENCE, Served, pattern};

#[test]
fn many_requests_in_flight_are_all_answered() {
    for mode in Mode::ALL {
        let (server, image) = Served::image();
        let bytes = pattern(5, 16 * MIB as usize);
        vhdkit::image::BlockDevice::write_at(image.as_ref(), &bytes, 0).unwrap();
        let mut disk = server.begin(mode);
        let mut expected = BTreeMap::new();
        for index in 0..500_u64 {
            let (offset, length) = (index * 30_011 % (15 * MIB), 1 + index * 37 % 9000);
            let cookie = match index % 5 {
                4 => disk.send(Request::flush()).unwrap(),
                3 => disk.send(Request::write(32 * MIB + index * 512, [index as u8; 512])).unwrap(),
                _ => {
                    let cookie = disk.send(Request::read(offset, length)).unwrap();
                    expected.insert(cookie, bytes[offset as usize..][..length as usize].to_vec());
                    cookie
                }
            };
            assert_ne!(cookie, 0);
        }
        assert_eq!(disk.in_flight(), 500);
        for _ in 0..500 {
            let reply = disk.receive().unwrap().successful().unwrap();
            if let Some(bytes) = expected.remove(&reply.cookie) {
                assert!(reply.data() == bytes, "{mode:?} {}", reply.outline());
            }
        }
        assert!(expected.is_empty() && disk.in_flight() == 0);
    }
}

#[test]
fn a_slow_medium_holds_up_nobody_else() {
    for mode in Mode::ALL {
        let device = Arc::new(Staged::new(&[Manner::Quick, Manner::Wait, Manner::Gate]));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        let slow = [
            disk.send(Request::read(2 * MIB, 4096)).unwrap(),
            disk.send(Request::read(2 * MIB, MIB)).unwrap(),
            disk.send(Request::write(2 * MIB + 8192, [1; 512])).unwrap(),
        ];
        let waiting = || (device.waiting.load(Ordering::SeqCst) == 3).then_some(());
        assert!(connect::wait_for(PATIENCE, waiting).is_some());
        let mut other = server.begin(mode);
        for offset in [0, MIB] {
            let expected = &device.contents()[offset as usize..][..4096];
            assert_eq!(disk.read(offset, 4096).unwrap(), expected, "the same connection");
            assert_eq!(other.read(offset, 4096).unwrap(), expected, "another connection");
        }
        device.open_gate();
        for cookie in slow {
            disk.receive_of(cookie).unwrap().successful().unwrap();
        }
    }
}

#[test]
fn the_last_chunk_of_a_reply_comes_last() {
    // The first part of each read is there at once, the second one has to wait a little; meanwhile the server is busy with
    // what dawdles. A part that comes after the chunk that says "done" is a broken reply.
    for mode in [Mode::Structured, Mode::Extended] {
        let device = Arc::new(Staged::new(&[Manner::Quick, Manner::Wait, Manner::Dawdle]));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        let contents = device.contents();
        for round in 0..20 {
            // Few bytes of the first part, so that they could stay behind in a buffer.
            let (offset, length) = (MIB - 1000 - round, 301_000);
            let mut requests = vec![Request::read(offset, length)];
            requests.extend((0..4).map(|index| Request::read(2 * MIB + index * 512, 512)));
            // In one piece, so that the server has them all at once.
            let mut bytes = Vec::new();
            for request in requests {
                let cookie = disk.expect(request.clone());
                bytes.extend(request.bytes(mode, cookie));
            }
            disk.stream().write_all(&bytes).unwrap();
            while disk.in_flight() > 0 {
                let reply = disk.receive().unwrap_or_else(|fault| panic!("{mode:?}, round {round}: {fault}"));
                let (start, length) = (reply.request.offset as usize, reply.request.length as usize);
                assert!(reply.data() == contents[start..start + length], "{}", reply.outline());
            }
        }
    }
}

#[test]
fn long_reads_come_whole_however_the_disk_gives_their_parts() {
    let manners =
        [Manner::Quick, Manner::Wait, Manner::Wait, Manner::Quick, Manner::Dawdle, Manner::Wait, Manner::Quick];
    let device = Arc::new(Staged::new(&manners));
    let server = Served::disk(Arc::clone(&device) as _);
    let contents = device.contents();
    for (mode, flags) in Mode::ALL.into_iter().flat_map(|mode| [(mode, 0), (mode, flag::DF)]) {
        if mode == Mode::Simple && flags != 0 {
            continue;
        }
        let mut disk = server.begin(mode);
        for (offset, length) in [(0, 7 * MIB), (MIB / 2, 5 * MIB + 77), (6 * MIB - 1, MIB), (3 * MIB - 1, 2)] {
            let reply = disk.succeed(Request::read(offset, length).with_flags(flags)).unwrap();
            let expected = &contents[offset as usize..][..length as usize];
            assert!(reply.data() == expected, "{mode:?} {flags}: {}", reply.outline());
        }
    }
}

#[test]
fn a_flush_covers_what_was_acknowledged_before() {
    for mode in Mode::ALL {
        let device = Arc::new(Staged::new(&[Manner::Quick, Manner::Gate]));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        // Ten flushes at once may share work, but each is answered after one that began after it came.
        let flushes: Vec<_> = (0..10).map(|_| disk.send(Request::flush()).unwrap()).collect();
        for cookie in flushes {
            disk.receive_of(cookie).unwrap().successful().unwrap();
        }
        let before = device.flushes.load(Ordering::SeqCst);
        assert!((1..=10).contains(&before), "{before}");
        disk.write(0, &[1; 512]).unwrap();
        disk.flush().unwrap();
        assert_eq!(device.flushes.load(Ordering::SeqCst), before + 1, "one that came later is one more");
    }
}

#[test]
fn requests_that_come_byte_by_byte_are_understood() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        let write = Request::write(700, pattern(2, 100));
        let read = Request::read(700, 100);
        for request in [write, read] {
            let cookie = disk.expect(request.clone());
            for byte in request.bytes(mode, cookie) {
                disk.send_bytes(&[byte]).unwrap();
            }
            let reply = disk.receive_of(cookie).unwrap().successful().unwrap();
            if reply.request.command == 0 {
                assert_eq!(reply.data(), pattern(2, 100));
            }
        }
    }
}
