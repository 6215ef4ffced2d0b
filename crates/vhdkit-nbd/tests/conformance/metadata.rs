//! Block status: both contexts, on disks with and without parents, narrowed by a payload.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use vhdkit::image::{BlockDevice, ExtentKind, Image};
use vhdkit_testkit::Rng;
use vhdkit_testkit::nbd::wire::{code, command_flag as flag};
use vhdkit_testkit::nbd::{Chunk, Extent, Mode, Request};

use crate::support::{Disk, MIB, NAME, Served, close, image, make_child_file, make_disk_file, open_file, pattern};

const SIZE: u64 = 16 * MIB;
const MODES: [Mode; 2] = [Mode::Structured, Mode::Extended];

/// `base:allocation` and `qemu:allocation-depth`.
fn ids(disk: &Disk) -> [u32; 2] {
    [disk.context("base:allocation").unwrap(), disk.context("qemu:allocation-depth").unwrap()]
}

/// A disk of three layers:
///
/// ```text
/// MiB          0        1        2        3        4        5        6
/// image        data     zero     -        -        half     -        -
/// parent       data     data     data     -        data     zero     -
/// grandparent  data     data     data     data     data     data     -
/// ```
fn chain(directory: &Path) -> Arc<Image> {
    let path = |name: &str| directory.join(name);
    let (base, middle, top) = (path("base.vhdx"), path("middle.vhdx"), path("top.vhdx"));
    let block = pattern(1, MIB as usize);
    make_disk_file(&base, SIZE);
    let image = open_file(&base, true);
    (0..6).for_each(|index| image.write_at(&block, index * MIB).unwrap());
    close(image);
    make_child_file(&middle, &base);
    let image = open_file(&middle, true);
    [0, 1, 2, 4].into_iter().for_each(|index| image.write_at(&block, index * MIB).unwrap());
    image.write_zeroes(5 * MIB..6 * MIB, true).unwrap();
    close(image);
    make_child_file(&top, &middle);
    let image = open_file(&top, true);
    image.write_at(&block, 0).unwrap();
    image.write_zeroes(MIB..2 * MIB, true).unwrap();
    image.write_at(&block[..MIB as usize / 2], 4 * MIB).unwrap();
    close(image);
    open_file(&top, true)
}

/// All extents of a context, joined where they are alike, asked for piece by piece.
fn whole(disk: &mut Disk, context: u32, step: u64) -> Vec<Extent> {
    let size = disk.export().size;
    let mut all: Vec<Extent> = Vec::new();
    let mut position = 0;
    while position < size {
        let reply = disk.succeed(Request::block_status(position, step.min(size - position))).unwrap();
        for extent in reply.extents(context).unwrap() {
            assert!(position + extent.length <= size, "behind the end of the disk: {reply:?}");
            position += extent.length;
            match all.last_mut() {
                Some(last) if last.flags == extent.flags => last.length += extent.length,
                _ => all.push(*extent),
            }
        }
    }
    all
}

fn halves(list: &[(u64, u64)]) -> Vec<Extent> {
    list.iter().map(|&(halves, flags)| Extent { length: halves * MIB / 2, flags }).collect()
}

#[test]
fn both_contexts_tell_about_a_chain() {
    let directory = tempfile::tempdir().unwrap();
    let server = Served::disk(chain(directory.path()));
    for mode in MODES {
        let mut disk = server.begin(mode);
        let [allocation, depth] = ids(&disk);
        for step in [SIZE, MIB, 64 << 10, MIB + 512, 12_345] {
            let expected = halves(&[(2, 0), (2, 3), (6, 0), (22, 3)]);
            assert_eq!(whole(&mut disk, allocation, step), expected, "{mode:?} {step}");
            let expected = halves(&[(2, 1), (2, 1), (2, 2), (2, 3), (1, 1), (1, 2), (2, 2), (20, 0)]);
            let mut joined: Vec<Extent> = Vec::new();
            for extent in expected {
                match joined.last_mut() {
                    Some(last) if last.flags == extent.flags => last.length += extent.length,
                    _ => joined.push(extent),
                }
            }
            assert_eq!(whole(&mut disk, depth, step), joined, "{mode:?} {step}");
        }
    }
}

#[test]
fn every_reply_has_both_contexts_in_its_own_form() {
    let directory = tempfile::tempdir().unwrap();
    let server = Served::disk(chain(directory.path()));
    for mode in MODES {
        let mut disk = server.begin(mode);
        let [allocation, depth] = ids(&disk);
        let reply = disk.succeed(Request::block_status(0, SIZE)).unwrap();
        assert!(reply.extents(allocation).unwrap().len() >= 4 && reply.extents(depth).unwrap().len() >= 5);
        for chunk in reply.chunks() {
            if let Chunk::Status { extended, .. } = chunk {
                assert_eq!(*extended, mode == Mode::Extended);
            }
        }
    }
}

#[test]
fn one_extent_means_one() {
    let directory = tempfile::tempdir().unwrap();
    let server = Served::disk(chain(directory.path()));
    let mut rng = Rng::new(1);
    for mode in MODES {
        let mut disk = server.begin(mode);
        let [allocation, depth] = ids(&disk);
        for _ in 0..200 {
            let offset = rng.below(SIZE);
            let length = rng.between(1, SIZE - offset);
            let reply = disk.succeed(Request::block_status(offset, length).with_flags(flag::REQ_ONE)).unwrap();
            for context in [allocation, depth] {
                let [extent] = reply.extents(context).unwrap() else { panic!("{reply:?}") };
                let many = disk.succeed(Request::block_status(offset, length)).unwrap();
                let first = many.extents(context).unwrap()[0];
                assert_eq!((extent.flags, extent.length), (first.flags, first.length.min(length)), "{offset}+{length}");
            }
        }
    }
}

#[test]
fn what_is_said_to_be_zero_is_zero_and_depths_are_the_layers() {
    let directory = tempfile::tempdir().unwrap();
    let image = chain(directory.path());
    let mut rng = Rng::new(2);
    for _ in 0..40 {
        let offset = rng.below(SIZE / 512 - 1) * 512;
        let length = rng.between(1, 200) * 512;
        let bytes = pattern(rng.next_u64(), length.min(SIZE - offset) as usize);
        match rng.below(3) {
            0 => image.write_zeroes(offset..offset + bytes.len() as u64, true).unwrap(),
            _ => image.write_at(&bytes, offset).unwrap(),
        }
    }
    let server = Served::disk(Arc::clone(&image) as _);
    let mut expected = Vec::new();
    image
        .visit_extents(0..SIZE, &mut |extent| {
            let hole = extent.kind == ExtentKind::Hole;
            expected.push((extent.start, extent.length, if hole { 0 } else { extent.layer as u64 + 1 }));
            ControlFlow::Continue(())
        })
        .unwrap();
    for mode in MODES {
        let mut disk = server.begin(mode);
        let [allocation, depth] = ids(&disk);
        let mut position = 0;
        for extent in whole(&mut disk, allocation, SIZE) {
            if extent.flags & 2 != 0 {
                let bytes = disk.read(position, extent.length).unwrap();
                assert!(bytes.iter().all(|byte| *byte == 0), "{position}: not zero");
            }
            position += extent.length;
        }
        let mut position = 0;
        for extent in whole(&mut disk, depth, SIZE) {
            let within =
                |&&(start, length, _): &&(u64, u64, u64)| start < position + extent.length && start + length > position;
            for (start, _, layer) in expected.iter().filter(within) {
                assert_eq!(*layer, extent.flags, "{mode:?} at {start}");
            }
            position += extent.length;
        }
    }
}

#[test]
fn a_payload_narrows_the_question() {
    let directory = tempfile::tempdir().unwrap();
    let server = Served::disk(chain(directory.path()));
    let mut disk = server.begin(Mode::Extended);
    let [allocation, depth] = ids(&disk);
    let all = disk.succeed(Request::block_status(0, SIZE)).unwrap();
    for contexts in [vec![allocation], vec![depth], vec![allocation, depth], vec![depth, allocation]] {
        let reply = disk.succeed(Request::block_status_of(0, SIZE, &contexts)).unwrap();
        for context in [allocation, depth] {
            let expected = all.extents(context).filter(|_| contexts.contains(&context));
            assert_eq!(reply.extents(context), expected, "{contexts:?}");
        }
        let one = Request::block_status_of(MIB, SIZE - MIB, &contexts).with_flags(flag::REQ_ONE);
        assert_eq!(disk.succeed(one).unwrap().extents(contexts[0]).unwrap().len(), 1);
    }
}

#[test]
fn payloads_that_make_no_sense_are_invalid_and_keep_step() {
    let (server, _image) = Served::image();
    let mut disk = server.begin(Mode::Extended);
    let size = disk.export().size;
    let [allocation, depth] = ids(&disk);
    let of = |contexts: &[u32]| Request::block_status_of(0, 4096, contexts);
    let payload = |payload: Vec<u8>| Request { length: payload.len() as u64, payload, ..of(&[]) };
    for request in [
        of(&[allocation, 0xDEAD]),
        of(&[0xDEAD]),
        of(&[allocation, allocation]),
        of(&[allocation, depth, allocation]),
        payload(vec![]),
        payload(vec![0; 7]),
        payload([4096_u64.to_be_bytes().as_slice(), &allocation.to_be_bytes(), &[0]].concat()),
        payload(vec![0; 4 << 20]),
        Request::block_status_of(0, size + 1, &[allocation]),
        Request::block_status_of(size, 1, &[allocation]),
        Request::block_status_of(u64::MAX, u64::MAX, &[allocation]),
    ] {
        assert_eq!(disk.code(request.clone()).unwrap(), code::EINVAL, "{:?}", request.length);
        assert_eq!(disk.read(0, 512).unwrap(), [0; 512], "in step");
    }
    disk.succeed(of(&[allocation])).unwrap();
}

#[test]
fn a_payload_without_contexts_or_extended_headers_is_invalid() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    handshake.extended_headers().unwrap();
    let mut disk = handshake.go(NAME, &[]).unwrap();
    assert_eq!(disk.code(Request::block_status_of(0, 4096, &[1])).unwrap(), code::EINVAL);
    assert_eq!(disk.code(Request::block_status(0, 4096)).unwrap(), code::EINVAL);
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512], "the payload was read over");
    // With compact headers there is no payload, whatever the flag says.
    let mut disk = server.begin(Mode::Structured);
    let request = Request::block_status(0, 4096).with_flags(flag::PAYLOAD_LEN);
    assert_eq!(disk.code(request).unwrap(), code::EINVAL);
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512], "in step");
}

#[test]
fn one_context_alone_is_answered_alone() {
    let (server, _image) = Served::image();
    for (mode, name) in MODES.into_iter().flat_map(|mode| [(mode, "base:allocation"), (mode, "qemu:allocation-depth")])
    {
        let mut handshake = server.handshake();
        handshake.agree_on(mode).unwrap();
        let context = handshake.set_meta_context(NAME, &[name]).unwrap()[0].id;
        let mut disk = handshake.go(NAME, &[]).unwrap();
        let reply = disk.succeed(Request::block_status(0, 4096)).unwrap();
        assert_eq!(reply.extents(context).unwrap().len(), 1);
        assert_eq!(reply.chunks().filter(|chunk| matches!(chunk, Chunk::Status { .. })).count(), 1);
    }
}

#[test]
fn a_disk_of_64_tebibytes_is_described_in_few_words() {
    const LARGE: u64 = 64 << 40;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.vhdx");
    make_disk_file(&path, LARGE);
    let image = open_file(&path, true);
    image.write_at(&[1; 4096], LARGE - MIB).unwrap();
    let server = Served::disk(Arc::clone(&image) as _);
    let mut disk = server.begin(Mode::Extended);
    let [allocation, depth] = ids(&disk);
    let (mut position, mut questions) = (0, 0);
    while position < LARGE {
        let reply = disk.succeed(Request::block_status(position, LARGE - position)).unwrap();
        let sums =
            [allocation, depth].map(|id| reply.extents(id).unwrap().iter().map(|extent| extent.length).sum::<u64>());
        position += sums[0].min(sums[1]);
        questions += 1;
    }
    assert!(questions <= 64, "{questions} questions");
    // With 32 bits it takes more of them, but each is answered.
    let mut disk = server.begin(Mode::Structured);
    let reply = disk.succeed(Request::block_status(LARGE - (1 << 32) + 1, (1 << 32) - 1)).unwrap();
    let sum: u64 = reply.extents(ids(&disk)[0]).unwrap().iter().map(|extent| extent.length).sum();
    assert_eq!(sum, (1 << 32) - 1);
    let mut disk = server.begin(Mode::Extended);
    disk.succeed(Request::trim(0, LARGE)).unwrap();
    disk.succeed(Request::write_zeroes(1 << 40, 8 << 32)).unwrap();
    assert_eq!(disk.read(LARGE - MIB, 4096).unwrap(), [0; 4096]);
}

#[test]
fn an_empty_disk_is_a_hole_in_no_layer() {
    let server = Served::disk(image(SIZE));
    for mode in MODES {
        let mut disk = server.begin(mode);
        let [allocation, depth] = ids(&disk);
        assert_eq!(whole(&mut disk, allocation, SIZE), [Extent { length: SIZE, flags: 3 }]);
        assert_eq!(whole(&mut disk, depth, SIZE), [Extent { length: SIZE, flags: 0 }]);
        disk.write(MIB + 5, &[1]).unwrap();
        let blocks = |flags: [u64; 3]| [(1, flags[0]), (1, flags[1]), (14, flags[2])];
        let extents = |flags| blocks(flags).map(|(length, flags)| Extent { length: length * MIB, flags });
        assert_eq!(whole(&mut disk, allocation, SIZE), extents([3, 0, 3]));
        assert_eq!(whole(&mut disk, depth, SIZE), extents([0, 1, 0]));
        disk.succeed(Request::trim(0, SIZE)).unwrap();
        assert_eq!(whole(&mut disk, allocation, SIZE), [Extent { length: SIZE, flags: 3 }]);
        // Trimmed blocks may stay with the layer, but the next round needs a new disk.
        if mode == Mode::Structured {
            disk.succeed(Request::write_zeroes(0, SIZE)).unwrap();
            let zeroed = whole(&mut disk, allocation, SIZE);
            assert_eq!(zeroed, [Extent { length: SIZE, flags: 3 }]);
            return;
        }
    }
}
