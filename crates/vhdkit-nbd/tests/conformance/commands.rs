//! Each command and flag in all three modes, and the codes with which they fail.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhdkit::image::{BlockDevice, OpenOptions};
use vhdkit::storage::Sharing;
use vhdkit_nbd::{Export, Options};
use vhdkit_testkit::nbd::wire::{code, command, command_flag as flag};
use vhdkit_testkit::nbd::{Chunk, Mode, Request};

use crate::support::devices::{Manner, Staged};
use crate::support::{Disk, MIB, NAME, Served, image, image_in, memory_image, pattern};

const SIZE: u64 = 64 * MIB;
const LARGEST: u64 = 32 * MIB;

/// The code of a request, and proof that the connection is still in step afterwards.
#[track_caller]
fn code_of(disk: &mut Disk, request: &Request) -> u32 {
    let code = disk.code(request.clone()).unwrap_or_else(|fault| panic!("{request:x?}: {fault}"));
    let after = disk.succeed(Request::read(SIZE - 512, 512));
    assert!(after.is_ok(), "out of step after {request:x?}: {after:?}");
    code
}

#[test]
fn bytes_that_were_written_are_read() {
    for mode in Mode::ALL {
        let (server, image) = Served::image();
        let mut disk = server.begin(mode);
        for (seed, (offset, length)) in
            [(0, 512), (1, 1), (511, 2), (MIB - 1, 2), (3 * MIB - 700, 2 * MIB as usize + 1401), (SIZE - 5, 5)]
                .into_iter()
                .enumerate()
        {
            let bytes = pattern(seed as u64, length);
            disk.write(offset, &bytes).unwrap();
            assert_eq!(disk.read(offset, length as u64).unwrap(), bytes, "{mode:?} {offset:#x}+{length:#x}");
            let mut seen = vec![0; length];
            image.read_at(&mut seen, offset).unwrap();
            assert_eq!(seen, bytes, "{mode:?} {offset:#x}: the image has it");
        }
        assert_eq!(disk.read(8 * MIB, MIB).unwrap(), vec![0; MIB as usize], "nothing went anywhere else");
    }
}

#[test]
fn the_largest_requests_work_and_larger_ones_are_refused() {
    let bytes = pattern(9, LARGEST as usize);
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        disk.write(100, &bytes).unwrap();
        assert!(disk.read(100, LARGEST).unwrap() == bytes, "{mode:?}");
        assert_eq!(code_of(&mut disk, &Request::read(0, LARGEST + 1)), code::EINVAL, "{mode:?}");
        let longer = vec![7; LARGEST as usize + 1];
        assert_eq!(code_of(&mut disk, &Request::write(0, longer)), code::EINVAL, "{mode:?}");
        assert!(disk.read(100, LARGEST).unwrap() == bytes, "{mode:?}: nothing was changed");
    }
}

#[test]
fn reads_in_one_piece_are_one_piece() {
    let bytes = pattern(9, 2 * MIB as usize);
    for mode in [Mode::Structured, Mode::Extended] {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        disk.write(MIB, &bytes).unwrap();
        // Data between holes.
        for (offset, length) in [(MIB - 4096, 65536), (0, 4 * MIB), (3 * MIB - 1, 65536), (0, LARGEST)] {
            let request = Request::read(offset, length).with_flags(flag::DF);
            let reply = disk.succeed(request).unwrap();
            let expected = disk.read(offset, length).unwrap();
            assert!(reply.data() == expected, "{mode:?} {offset:#x}+{length:#x}");
            let data = reply.chunks().filter(|chunk| matches!(chunk, Chunk::Data { .. })).count();
            assert_eq!((data, reply.holes().len()), (1, 0), "{}", reply.outline());
        }
        let too_long = code_of(&mut disk, &Request::read(0, LARGEST + 1).with_flags(flag::DF));
        assert!([code::EOVERFLOW, code::EINVAL].contains(&too_long), "{too_long}");
    }
}

#[test]
fn holes_are_sent_as_holes() {
    let bytes = pattern(9, MIB as usize);
    for mode in [Mode::Structured, Mode::Extended] {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        disk.write(4 * MIB, &bytes).unwrap();
        let all = disk.succeed(Request::read(0, 8 * MIB)).unwrap();
        let holes: u64 = all.holes().iter().map(|(_, length)| length).sum();
        assert_eq!(holes, 7 * MIB, "{}", all.outline());
        assert!(all.data()[4 * MIB as usize..5 * MIB as usize] == bytes);
        let small = disk.succeed(Request::read(512, 512)).unwrap();
        assert_eq!(small.holes(), [(512, 512)]);
        disk.succeed(Request::write_zeroes(4 * MIB, MIB)).unwrap();
        let zeroed = disk.succeed(Request::read(4 * MIB, MIB)).unwrap();
        assert_eq!(zeroed.holes().iter().map(|(_, length)| length).sum::<u64>(), MIB, "{}", zeroed.outline());
    }
}

#[test]
fn holes_of_a_medium_that_takes_its_time_are_sent_as_holes() {
    for mode in [Mode::Structured, Mode::Extended] {
        let device = Arc::new(Staged::new(&[Manner::Wait; 4]));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        disk.succeed(Request::write_zeroes(MIB, 2 * MIB)).unwrap();
        let reply = disk.succeed(Request::read(MIB, 2 * MIB)).unwrap();
        assert_eq!(reply.holes().iter().map(|(_, length)| length).sum::<u64>(), 2 * MIB, "{}", reply.outline());
        assert!(disk.read(0, 4 * MIB).unwrap()[3 * MIB as usize..] == device.contents()[3 * MIB as usize..]);
    }
}

#[test]
fn ranges_behind_the_end_have_the_codes_of_the_document() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        let past =
            [(SIZE - 511, 512), (SIZE, 1), (SIZE + 4096, 512), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 7)];
        for (offset, length) in past {
            let bytes = vec![7; length as usize];
            for (request, expected) in [
                (Request::read(offset, length), code::EINVAL),
                (Request::trim(offset, length), code::EINVAL),
                (Request::cache(offset, length), code::EINVAL),
                (Request::block_status(offset, length), code::EINVAL),
                (Request::write(offset, bytes), code::ENOSPC),
                (Request::write_zeroes(offset, length), code::ENOSPC),
                (Request::write_zeroes(offset, length).with_flags(flag::NO_HOLE), code::ENOSPC),
            ] {
                assert_eq!(code_of(&mut disk, &request), expected, "{mode:?} {request:x?}");
            }
        }
        if mode == Mode::Extended {
            for command in [command::TRIM, command::CACHE, command::BLOCK_STATUS] {
                assert_eq!(code_of(&mut disk, &Request::new(command, 1, u64::MAX)), code::EINVAL);
            }
            assert_eq!(code_of(&mut disk, &Request::write_zeroes(512, u64::MAX)), code::ENOSPC);
            let read = code_of(&mut disk, &Request::read(512, u64::MAX));
            assert!([code::EINVAL, code::EOVERFLOW].contains(&read));
        }
    }
}

#[test]
fn what_changes_a_read_only_export_is_not_permitted() {
    let server = Served::new(vec![Export::new(NAME, image(SIZE)).unwrap()], Options::default());
    for mode in Mode::ALL {
        let mut disk = server.begin(mode);
        for flags in [0, flag::FUA] {
            for request in [
                Request::write(0, vec![1; 4096]),
                Request::write(SIZE, vec![1; 4096]),
                Request::write(0, vec![1; 3 * MIB as usize]),
                Request::trim(0, 4096),
                Request::write_zeroes(0, 4096),
                Request::write_zeroes(0, 4096).with_flags(flag::NO_HOLE),
            ] {
                assert_eq!(code_of(&mut disk, &request.with_flags(flags)), code::EPERM, "{mode:?}");
            }
        }
        for request in [Request::flush(), Request::cache(0, 4096), Request::read(0, 4096)] {
            assert_eq!(code_of(&mut disk, &request), 0, "{mode:?}");
        }
    }
}

/// Whether a command may have a flag.
fn is_documented(mode: Mode, command: u16, bit: u16) -> bool {
    match bit {
        flag::FUA => true,
        flag::NO_HOLE | flag::FAST_ZERO => command == command::WRITE_ZEROES,
        flag::DF => command == command::READ && mode != Mode::Simple,
        flag::REQ_ONE => command == command::BLOCK_STATUS,
        // Writes have it in any case; block status has a test of its own.
        flag::PAYLOAD_LEN => command == command::WRITE && mode == Mode::Extended,
        _ => false,
    }
}

#[test]
fn flags_are_accepted_where_they_are_documented_and_nowhere_else() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        let status = (mode != Mode::Simple).then(|| Request::block_status(0, 4096));
        let requests = [
            Request::read(0, 4096),
            Request::write(0, vec![1; 4096]),
            Request::flush(),
            Request::trim(0, 4096),
            Request::cache(0, 4096),
            Request::write_zeroes(0, 4096),
        ];
        for request in requests.into_iter().chain(status) {
            assert_eq!(code_of(&mut disk, &request), 0, "{mode:?} {}", request.command);
            for bit in (0..16).map(|bit| 1 << bit) {
                let flagged = request.clone().with_flags(bit);
                if mode == Mode::Extended && bit == flag::PAYLOAD_LEN && request.command != command::WRITE {
                    continue;
                }
                let expected = if is_documented(mode, request.command, bit) { 0 } else { code::EINVAL };
                let got = code_of(&mut disk, &flagged);
                assert_eq!(got, expected, "{mode:?} command {} flag {bit:#x}", request.command);
            }
        }
    }
}

#[test]
fn payloads_that_nobody_wants_are_read_over() {
    let (server, _image) = Served::image();
    let mut disk = server.begin(Mode::Extended);
    let contents = pattern(1, 4096);
    disk.write(0, &contents).unwrap();
    for command in [0, 3, 4, 5, 6, 8, 77] {
        for length in [0, 1, 4096, 3 * MIB as usize] {
            // The payload looks like requests, in case it is taken for some.
            let payload = Request::write_zeroes(0, 4096).bytes(Mode::Extended, 1).repeat(length / 32 + 1);
            let payload = payload[..length].to_vec();
            let request = Request { length: length as u64, payload, ..Request::new(command, 0, 0) };
            let code = code_of(&mut disk, &request.with_flags(flag::PAYLOAD_LEN));
            assert_eq!(code, code::EINVAL, "command {command} with {length} bytes");
        }
    }
    assert_eq!(disk.read(0, 4096).unwrap(), contents);
}

#[test]
fn unknown_commands_are_invalid() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        for command in [8, 9, 10, 0x7F, 0x100, 0x101, 0xFFFF] {
            assert_eq!(code_of(&mut disk, &Request::new(command, 0, 0)), code::EINVAL, "{mode:?} {command}");
            assert_eq!(code_of(&mut disk, &Request::new(command, 0, 4096)), code::EINVAL, "{mode:?} {command}");
        }
    }
}

#[test]
fn empty_requests_do_not_disconnect() {
    for mode in Mode::ALL {
        let (server, image) = Served::image();
        let mut disk = server.begin(mode);
        for offset in [0, 1, MIB, SIZE] {
            for request in [
                Request::read(offset, 0),
                Request::write(offset, []),
                Request::write(offset, []).with_flags(flag::FUA),
                Request::trim(offset, 0),
                Request::cache(offset, 0),
                Request::write_zeroes(offset, 0),
                Request::write_zeroes(offset, 0).with_flags(flag::NO_HOLE),
                Request::block_status(offset, 0),
                Request::flush(),
            ] {
                let got = code_of(&mut disk, &request);
                assert!([0, code::EINVAL].contains(&got), "{mode:?} {request:?}: {got}");
            }
        }
        assert_eq!(image.layers()[0].allocated_bytes().unwrap(), 0, "nothing was written");
    }
}

#[test]
fn cookies_of_any_value_come_back() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        for cookie in [0, 1, 0x8000_0000_0000_0000, u64::MAX, 0x0102_0304_0506_0708, 7, 7] {
            disk.send_bytes(&Request::flush().bytes(mode, cookie)).unwrap();
            let message = disk.receive_message().unwrap();
            assert_eq!((message.cookie, message.chunk), (cookie, Chunk::None));
        }
    }
}

#[test]
fn zeroes_read_as_zero_whatever_was_there() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        let bytes = pattern(3, 4 * MIB as usize);
        for flags in [0, flag::NO_HOLE, flag::FUA, flag::NO_HOLE | flag::FUA] {
            disk.write(2 * MIB, &bytes).unwrap();
            let (offset, length) = (3 * MIB - 300, 2 * MIB + 77);
            disk.succeed(Request::write_zeroes(offset, length).with_flags(flags)).unwrap();
            let mut expected = bytes.clone();
            let start = (offset - 2 * MIB) as usize;
            expected[start..start + length as usize].fill(0);
            assert!(disk.read(2 * MIB, 4 * MIB).unwrap() == expected, "{mode:?} {flags}");
        }
    }
}

#[test]
fn zeroes_without_holes_get_their_space() {
    let (server, image) = Served::image();
    let mut disk = server.begin(Mode::Extended);
    let allocation = disk.context("base:allocation").unwrap();
    disk.succeed(Request::write_zeroes(8 * MIB, 4 * MIB)).unwrap();
    assert_eq!(image.layers()[0].allocated_bytes().unwrap(), 0, "zeros need no space");
    // From what was never written, from what is zero, from what is data: all get space, and read as zero.
    disk.write(12 * MIB, &pattern(1, MIB as usize)).unwrap();
    disk.succeed(Request::write_zeroes(6 * MIB, 8 * MIB).with_flags(flag::NO_HOLE)).unwrap();
    let status = disk.succeed(Request::block_status(6 * MIB, 8 * MIB)).unwrap();
    let mut covered = 0;
    for extent in status.extents(allocation).unwrap() {
        assert_eq!(extent.flags & 1, 0, "{status:?}: a hole at {covered}");
        covered += extent.length;
    }
    assert!(covered >= 8 * MIB, "{status:?}");
    assert!(disk.read(6 * MIB, 8 * MIB).unwrap() == vec![0; 8 * MIB as usize]);
    assert!(image.layers()[0].allocated_bytes().unwrap() >= 8 * MIB);
}

#[test]
fn fast_zeroes_are_fast_or_do_nothing() {
    for mode in Mode::ALL {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        let bytes = pattern(3, 2 * MIB as usize);
        disk.write(0, &bytes).unwrap();
        for (offset, flags) in [(0, 0), (512, 0), (4 * MIB, 0), (0, flag::NO_HOLE), (MIB, flag::NO_HOLE), (8 * MIB, 2)]
        {
            let before = disk.read(offset, MIB).unwrap();
            let request = Request::write_zeroes(offset, MIB).with_flags(flags | flag::FAST_ZERO);
            let got = code_of(&mut disk, &request);
            let after = disk.read(offset, MIB).unwrap();
            match got {
                0 => assert!(after == vec![0; MIB as usize], "{mode:?} {offset} {flags}"),
                code::ENOTSUP => assert!(after == before, "{mode:?} {offset} {flags}: refused, but not untouched"),
                other => panic!("{mode:?} {offset} {flags}: code {other}"),
            }
        }
        // What was never written has no space, and giving it some is as slow as writing.
        let slow = Request::write_zeroes(32 * MIB, MIB).with_flags(flag::NO_HOLE | flag::FAST_ZERO);
        assert_eq!(code_of(&mut disk, &slow), code::ENOTSUP, "{mode:?}");
        // Not with the flag, not an error.
        assert_eq!(code_of(&mut disk, &Request::write_zeroes(32 * MIB, MIB).with_flags(flag::NO_HOLE)), 0);
    }
}

#[test]
fn fast_zeroes_that_are_refused_have_changed_nothing() {
    // Of a long range the beginning could be zeroed fast, the end could not.
    let manners = [[Manner::Quick; 8], [Manner::Hole; 8]].concat();
    for mode in Mode::ALL {
        let device = Arc::new(Staged::new(&manners));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        let request = Request::write_zeroes(0, 16 * MIB).with_flags(flag::NO_HOLE | flag::FAST_ZERO);
        if disk.code(request).unwrap() == code::ENOTSUP {
            assert!(disk.read(0, 16 * MIB).unwrap() == device.contents(), "{mode:?}: refused, but not untouched");
        } else {
            assert!(disk.read(0, 16 * MIB).unwrap() == vec![0; 16 * MIB as usize], "{mode:?}");
        }
    }
}

#[test]
fn trims_give_whole_blocks_back_and_keep_their_neighbours() {
    for mode in Mode::ALL {
        let (server, image) = Served::image();
        let mut disk = server.begin(mode);
        let bytes = pattern(3, 4 * MIB as usize);
        disk.write(0, &bytes).unwrap();
        let before = image.layers()[0].allocated_bytes().unwrap();
        disk.succeed(Request::trim(MIB - 4096, 2 * MIB + 8192)).unwrap();
        assert_eq!(before - image.layers()[0].allocated_bytes().unwrap(), 2 * MIB, "{mode:?}");
        let (start, end) = ((MIB - 4096) as usize, (3 * MIB + 4096) as usize);
        let after = disk.read(0, 4 * MIB).unwrap();
        assert!(after[..start] == bytes[..start] && after[end..] == bytes[end..], "{mode:?}");
        disk.succeed(Request::trim(0, SIZE)).unwrap();
        assert_eq!(image.layers()[0].allocated_bytes().unwrap(), 0, "{mode:?}");
    }
}

#[test]
fn caching_changes_nothing() {
    for mode in Mode::ALL {
        let (server, image) = Served::image();
        let mut disk = server.begin(mode);
        let bytes = pattern(3, MIB as usize);
        disk.write(MIB, &bytes).unwrap();
        let before = image.layers()[0].allocated_bytes().unwrap();
        disk.succeed(Request::cache(0, SIZE)).unwrap();
        disk.succeed(Request::cache(SIZE - 1, 1)).unwrap();
        assert!(disk.read(MIB, MIB).unwrap() == bytes);
        assert_eq!(image.layers()[0].allocated_bytes().unwrap(), before);
    }
}

/// Writes something with a request that promises durability, and looks for it in the file as it is at that moment.
fn durable_after(mode: Mode, finish: impl Fn(&mut Disk, &[u8], &Served)) {
    let storage = memory_image(SIZE);
    let image = image_in(&storage, true);
    let server = Served::disk(Arc::clone(&image) as _);
    let mut disk = server.begin(mode);
    let bytes = pattern(4, 3 * MIB as usize);
    finish(&mut disk, &bytes, &server);
    // Another reader of the same bytes, while the session goes on.
    let reader = OpenOptions::new().sharing(Sharing::ForceShare).open(Arc::clone(&storage), None).unwrap();
    let mut seen = vec![0; bytes.len()];
    reader.read_at(&mut seen, MIB).unwrap();
    assert!(seen == bytes, "{mode:?}: it is not in the file");
}

#[test]
fn a_flush_and_fua_make_durable() {
    for mode in Mode::ALL {
        durable_after(mode, |disk, bytes, _| {
            disk.write(MIB, bytes).unwrap();
            disk.flush().unwrap();
        });
        // A flush of any connection covers what was acknowledged on others.
        durable_after(mode, |disk, bytes, server| {
            disk.write(MIB, bytes).unwrap();
            server.begin(mode).flush().unwrap();
        });
        durable_after(mode, |disk, bytes, _| {
            disk.succeed(Request::write(MIB, bytes).with_flags(flag::FUA)).unwrap();
        });
        durable_after(mode, |disk, bytes, _| {
            for (index, piece) in bytes.chunks(4096).enumerate() {
                let offset = MIB + 4096 * index as u64;
                disk.send(Request::write(offset, piece)).unwrap();
                disk.receive().unwrap().successful().unwrap();
            }
            disk.succeed(Request::trim(40 * MIB, MIB).with_flags(flag::FUA)).unwrap();
        });
    }
}

#[test]
fn fua_reaches_the_disk_before_the_reply() {
    for mode in Mode::ALL {
        let device = Arc::new(Staged::new(&[Manner::Quick; 64]));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        let durable = |device: &Staged| device.flushes.load(Ordering::SeqCst) + device.through.load(Ordering::SeqCst);
        for (request, expected) in [
            (Request::write(0, vec![1; 512]), true),
            (Request::write(0, vec![1; 8 * MIB as usize]), true),
            (Request::trim(0, MIB), true),
            (Request::write_zeroes(0, MIB), true),
            (Request::write_zeroes(0, MIB).with_flags(flag::NO_HOLE), true),
        ] {
            let before = durable(&device);
            disk.succeed(request.clone()).unwrap();
            assert_eq!(durable(&device), before, "{mode:?}: nobody asked for it");
            disk.succeed(request.with_flags(flag::FUA)).unwrap();
            assert_eq!(durable(&device) > before, expected, "{mode:?}");
        }
    }
}

#[test]
fn failures_of_the_disk_are_reported_and_nothing_more() {
    for mode in Mode::ALL {
        let device = Arc::new(Staged::new(&[Manner::Quick, Manner::Wait, Manner::Fail, Manner::Panic].repeat(16)));
        let server = Served::disk(Arc::clone(&device) as _);
        let mut disk = server.begin(mode);
        for offset in [2 * MIB, 3 * MIB] {
            for request in [
                Request::read(offset, 512),
                Request::read(offset - MIB, 2 * MIB),
                Request::read(offset - MIB, 2 * MIB + 512),
                Request::write(offset, vec![1; 512]),
                Request::write(offset, vec![1; 512]).with_flags(flag::FUA),
                Request::trim(offset, 512),
                Request::write_zeroes(offset, 512),
            ] {
                // A disk that panics is a bug, and may cost its connection, but nobody else anything.
                let panics = offset == 3 * MIB;
                match disk.code(request.clone()) {
                    Ok(got) => assert_eq!(got, code::EIO, "{mode:?} {request:?}"),
                    Err(fault) => {
                        assert!(panics && fault.is_closed(), "{mode:?} {} {fault}", request.command);
                        disk = server.begin(mode);
                    }
                }
                assert_eq!(disk.read(MIB, 512).unwrap(), &device.contents()[MIB as usize..][..512]);
            }
        }
        device.flush_fails.store(true, Ordering::SeqCst);
        assert_eq!(disk.code(Request::flush()).unwrap(), code::EIO);
        device.flush_fails.store(false, Ordering::SeqCst);
        disk.flush().unwrap();
    }
}

#[test]
fn errors_of_structured_replies_have_words() {
    for mode in [Mode::Structured, Mode::Extended] {
        let (server, _image) = Served::image();
        let mut disk = server.begin(mode);
        let reply = disk.call(Request::read(SIZE, 512)).unwrap();
        let error = reply.error().unwrap();
        assert!(!error.message.is_empty() && error.message.is_ascii(), "{error:?}");
    }
}

#[test]
fn connections_see_each_others_writes_at_once() {
    let (server, _image) = Served::image();
    let mut disks: Vec<_> = Mode::ALL.iter().map(|&mode| server.begin(mode)).collect();
    for round in 0..60_u64 {
        let bytes = pattern(round, 3000);
        let (writer, reader) = ((round % 3) as usize, ((round / 3 + 1 + round) % 3) as usize);
        disks[writer].write(round * 100_000, &bytes).unwrap();
        assert_eq!(disks[reader].read(round * 100_000, 3000).unwrap(), bytes);
    }
}
