//! Clients that go at each point of a conversation.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;

use vhdkit::image::BlockDevice as _;
use vhdkit_nbd::{Export, Options};
use vhdkit_testkit::nbd::wire::{self, command_flag as flag, option};
use vhdkit_testkit::nbd::{Mode, Request};

use crate::siege::{LITTLE, Siege};
use crate::support::{MIB, NAME, image, pattern, tls};

/// All that a good client sends, from its flags to its farewell. Its writes go to the second half of the disk.
fn conversation(mode: Mode) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(wire::option_bytes(option::LIST, b""));
    bytes.extend(match mode {
        Mode::Simple => wire::option_bytes(option::INFO, &wire::info_data(b"", &[3])),
        Mode::Structured => wire::option_bytes(option::STRUCTURED_REPLY, b""),
        Mode::Extended => wire::option_bytes(option::EXTENDED_HEADERS, b""),
    });
    let contexts = wire::meta_context_data(NAME.as_bytes(), &[b"base:allocation"]);
    bytes.extend(wire::option_bytes(option::SET_META_CONTEXT, &contexts));
    bytes.extend(wire::option_bytes(option::GO, &wire::info_data(NAME.as_bytes(), &[1, 3])));
    let requests = [
        Request::read(0, 512),
        Request::write(32 * MIB, pattern(2, 200)),
        Request::flush(),
        Request::write_zeroes(33 * MIB, 512).with_flags(flag::FUA),
        Request::trim(34 * MIB, 512),
        Request::block_status(0, MIB),
        Request::disconnect(),
    ];
    bytes.extend(requests.iter().flat_map(|request| request.bytes(mode, 7)));
    bytes
}

#[test]
fn a_client_may_vanish_at_every_byte() {
    let siege = Siege::new();
    for mode in Mode::ALL {
        let bytes = conversation(mode);
        for cut in 0..=bytes.len() {
            // The server may have turned it away, or closed already; then there is nothing to send to.
            let mut stream = siege.server.stream();
            let _ = stream.write_all(&bytes[..cut]);
            match cut % 3 {
                0 => drop(stream),
                1 => {
                    let _ = stream.shutdown(Shutdown::Read);
                    drop(stream);
                }
                // It is there to the end, but says no more: what it asked for is answered, and then it is over.
                _ => {
                    let _ = stream.shutdown(Shutdown::Write);
                    let mut rest = Vec::new();
                    let _ = stream.read_to_end(&mut rest);
                    assert!(rest.is_empty() || rest.starts_with(b"NBDMAGIC"));
                }
            }
        }
        siege.good_client();
    }
    siege.end(LITTLE);
}

#[test]
fn a_client_may_vanish_at_every_byte_of_tls() {
    let options = Options { tls: Some(tls::server(false).optional()), ..Options::default() };
    let siege = Siege::with(options);
    // The first message of a client, as its library sends it.
    let hello = {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
        assert!(tls::wrap(ours, None).is_err(), "nobody answers");
        let mut bytes = Vec::new();
        assert!((&theirs).read_to_end(&mut bytes).is_ok() && bytes.len() > 100);
        bytes
    };
    for cut in 0..=hello.len() {
        let mut handshake = siege.handshake();
        handshake.starttls().unwrap();
        handshake.send_bytes(&hello[..cut]).unwrap();
        if cut % 2 == 0 {
            handshake.stream().shutdown(Shutdown::Write).unwrap();
            let _ = handshake.stream().read_to_end(&mut Vec::new());
        }
    }
    siege.end(LITTLE);
}

#[test]
fn a_write_that_is_cut_touches_nothing_else() {
    let device = image(64 * MIB);
    let around = pattern(1, 4 * MIB as usize);
    device.write_at(&around, 8 * MIB).unwrap();
    let export = Export::new(NAME, std::sync::Arc::clone(&device) as _).unwrap().writable(true);
    let siege = Siege::serving(vec![export], Options::default());
    let (offset, length) = (9 * MIB + 100, 2 * MIB as usize);
    for mode in Mode::ALL {
        for sent in [0, 1, 4096, 100_000, length - 1] {
            let mut disk = siege.server.begin(mode);
            let request = Request::write(offset, vec![0xEE; length]);
            let bytes = request.bytes(mode, 1);
            let head = bytes.len() - length;
            disk.send_bytes(&bytes[..head + sent]).unwrap();
            drop(disk);
            siege.server.wait_until_empty();
            let mut seen = vec![0; around.len()];
            device.read_at(&mut seen, 8 * MIB).unwrap();
            let start = (offset - 8 * MIB) as usize;
            assert!(seen[..start] == around[..start], "{mode:?} {sent}: in front of it");
            let (written, rest) = seen[start..start + length].split_at(sent);
            assert!(written.iter().zip(&around[start..]).all(|(new, old)| *new == 0xEE || new == old));
            assert!(rest == &around[start + sent..start + length], "{mode:?} {sent}: what was never sent");
            assert!(seen[start + length..] == around[start + length..], "{mode:?} {sent}: behind it");
            device.write_at(&around, 8 * MIB).unwrap();
        }
    }
    siege.end(LITTLE);
}

#[test]
fn clients_that_go_while_they_are_answered_leave_nothing() {
    let siege = Siege::new();
    let mut writer = siege.server.begin(Mode::Simple);
    writer.write(8 * MIB, &pattern(1, 16 * MIB as usize)).unwrap();
    writer.disconnect().unwrap();
    for round in 0..60_usize {
        let mode = Mode::ALL[round % 3];
        let mut disk = siege.server.begin(mode);
        for request in [Request::read(8 * MIB, 16 * MIB), Request::flush(), Request::read(8 * MIB, 512)] {
            disk.send(request).unwrap();
        }
        let mut some = vec![0; round * 4000 + 1];
        disk.stream().read_exact(&mut some).unwrap();
        drop(disk);
    }
    siege.end(LITTLE + 64 * MIB);
}
