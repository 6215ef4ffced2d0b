//! NBD: handshakes, requests, and whole conversations with a server.
//!
//! ```text
//! u8 kind (modulo 4)
//! 0: handshake, pure.       u8 TLS; then what the client sends, received in pieces
//! 1: a request, pure.       u8 mode, u8 contexts, u8 writable, u64 size of the disk, header and payload
//! 2: a conversation.        u8 unused; then what the client sends
//! 3: a conversation after a handshake that is made here.
//!                           u8 mode and contexts; then requests: u8 command, u8 flags, u24 offset and u24 length in
//!                           units of 64 bytes, both with a few odd values
//! ```
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhdkit::format::finding::Severity;
use vhdkit::image::{BlockDevice, Image, OpenOptions};
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::ops::create::{CreateOptions, create};
use vhdkit::storage::{MemoryStorage, Storage};
use vhdkit_fuzz::take;
use vhdkit_nbd::{Export, fuzzing};

const DISK: u64 = 8 << 20;
/// Requests of a program: more of them find nothing new.
const REQUESTS_MAX: usize = 64;

fn disk() -> (Arc<dyn Storage>, Arc<Image>) {
    let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let options = CreateOptions { block_size: Some(1 << 20), ..CreateOptions::new(DISK) };
    create(&file, &options, &()).expect("an image in memory");
    let image = OpenOptions::new().write(true).open(Arc::clone(&file), None).expect("our own image");
    image.write_at(&[7; 5000], 1 << 20).expect("it can be written");
    (file, Arc::new(image))
}

fn export(image: &Arc<Image>) -> Export {
    let device = Arc::clone(image) as Arc<dyn BlockDevice>;
    Export::new("disk", device).expect("a good name").writable(true).description("for fuzzing")
}

/// Lets a server read what a client sent before it went.
fn converse(sent: &[u8]) {
    let (file, image) = disk();
    let (mut client, server) = UnixStream::pair().expect("sockets");
    let mut receiver = client.try_clone().expect("descriptors");
    let sent = sent.to_vec();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _ = client.write_all(&sent); // the server may have had enough before
            let _ = client.shutdown(Shutdown::Write);
        });
        scope.spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while receiver.read(&mut bytes).is_ok_and(|count| count > 0) {}
        });
        fuzzing::conversation(vec![export(&image)], server).expect("a good server");
    });
    image.close().expect("nothing is under way any more");
    drop(image);
    let report = check(&file, None, &CheckOptions::default(), &()).expect("it can be checked");
    // Space between blocks that was given back is worth a note.
    assert!(report.findings.iter().all(|finding| finding.severity() == Severity::Note), "{:?}", report.findings);
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn program(mode: u8, mut input: &[u8]) -> Vec<u8> {
    let mut sent = vec![0, 0, 0, 3];
    match mode % 3 {
        0 => {}
        1 => sent.extend(option(8, &[])),
        _ => sent.extend(option(11, &[])),
    }
    if mode & 4 != 0 {
        let queries = [b"base:allocation".as_slice(), b"qemu:allocation-depth"];
        let queries: Vec<u8> =
            queries.iter().flat_map(|query| [&(query.len() as u32).to_be_bytes(), *query].concat()).collect();
        sent.extend(option(10, &[&[0, 0, 0, 4], b"disk".as_slice(), &[0, 0, 0, 2], &queries].concat()));
    }
    sent.extend(option(7, &[0, 0, 0, 4, b'd', b'i', b's', b'k', 0, 0]));
    let mut left = REQUESTS_MAX;
    while let Some([command, flags, o1, o2, o3, l1, l2, l3]) = take(&mut input).filter(|_| left > 0) {
        left -= 1;
        let wide = |a: u8, b: u8, c: u8| {
            u64::from(u32::from_be_bytes([0, a, b, c])) * 64 % (DISK + (1 << 20)) + u64::from(c & 1)
        };
        let (offset, length) = (wide(o1, o2, o3), wide(l1, l2, l3) % (3 << 20));
        let magic = if mode % 3 == 2 { 0x21e4_1c71_u32 } else { 0x2560_9513 };
        sent.extend(magic.to_be_bytes());
        sent.extend([0, flags, 0, command]);
        sent.extend([left as u8; 8]);
        sent.extend(offset.to_be_bytes());
        let extended = mode % 3 == 2;
        if extended {
            sent.extend(length.to_be_bytes());
        } else {
            sent.extend((length as u32).to_be_bytes());
        }
        if (command == 1 && !extended) || (extended && flags & 0x20 != 0) {
            sent.extend(std::iter::repeat_n(left as u8, length as usize));
        }
    }
    sent
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    let Some((first, rest)) = rest.split_first() else { return };
    match kind % 4 {
        0 => {
            let (_, image) = disk();
            let mut pieces = rest.chunks(1 + usize::from(*first)).map(<[u8]>::to_vec);
            fuzzing::handshake(vec![export(&image)], *first, &mut pieces);
        }
        1 => {
            let mut rest = rest;
            let (Some([contexts, writable]), Some(size)) = (take(&mut rest), take(&mut rest)) else { return };
            fuzzing::requests(rest, *first, contexts, u64::from_be_bytes(size), writable & 1 != 0);
        }
        2 => converse(rest),
        _ => converse(&program(*first, rest)),
    }
});
