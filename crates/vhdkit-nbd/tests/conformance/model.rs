//! Random commands over several connections at once beside a plain array; in the end the file is opened again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use vhdkit::image::BlockDevice;
use vhdkit::ops::check::{CheckOptions, check};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage};
use vhdkit_testkit::Rng;
use vhdkit_testkit::nbd::wire::command_flag as flag;
use vhdkit_testkit::nbd::{Mode, Reply, Request};

use crate::support::{Disk, MIB, Sender, Served, close, make_child_file, make_disk_file, open_file, pattern};

const SIZE: u64 = 24 * MIB;
const CONNECTIONS: u64 = 5;
/// Connections have parts of the disk that share blocks and sectors with each other.
const PART: u64 = SIZE / CONNECTIONS + 1;
const STEPS: usize = 400;
const IN_FLIGHT: usize = 8;

/// One connection, its part of the disk, and what the part has to hold.
struct Player {
    disk: Disk,
    /// Sends on a thread of its own: a client that reads nothing while it sends may wait for the server for ever.
    sender: Sender,
    rng: Rng,
    start: u64,
    array: Vec<u8>,
    /// What is asked for and not answered yet.
    open: BTreeMap<u64, Request>,
}

impl Player {
    fn new(mut disk: Disk, index: u64, seed: u64, initial: &[u8]) -> Self {
        let start = index * PART;
        let end = (start + PART).min(SIZE);
        let array = initial[start as usize..end as usize].to_vec();
        let sender = Sender::new(&mut disk);
        Self { disk, sender, rng: Rng::new(seed * 100 + index), start, array, open: BTreeMap::new() }
    }

    /// A range of the part; short ones are more frequent, and some are aligned.
    fn range(&mut self) -> (u64, u64) {
        let size = self.array.len() as u64;
        let most = self.rng.pick(&[1, 512, 4096, 70_000, 3 * MIB]);
        let length = self.rng.between(1, most.min(size));
        let offset = self.rng.below(size - length + 1);
        if self.rng.chance(50) {
            let start = (self.start + offset).next_multiple_of(4096);
            let length = length.next_multiple_of(4096);
            if start + length <= self.start + size {
                return (start, length);
            }
        }
        (self.start + offset, length)
    }

    fn request(&mut self) -> Request {
        let (offset, length) = self.range();
        let seed = self.rng.next_u64();
        let durable = if self.rng.chance(10) { flag::FUA } else { 0 };
        let request = match self.rng.below(100) {
            0..35 => Request::write(offset, pattern(seed, length as usize)).with_flags(durable),
            35..45 => Request::write_zeroes(offset, length).with_flags(durable),
            45..50 => Request::write_zeroes(offset, length).with_flags(durable | flag::NO_HOLE),
            // Whatever a trim leaves: who wants to know has to read it first, so it is always followed by zeros.
            50..55 => Request::trim(offset, length).with_flags(durable),
            55..60 => Request::flush(),
            60..63 => Request::cache(offset, length),
            63..68 if self.disk.mode() != Mode::Simple => Request::block_status(offset, length),
            68..73 if self.disk.mode() != Mode::Simple => Request::read(offset, length).with_flags(flag::DF),
            _ => Request::read(offset, length),
        };
        // In simple mode the flags of large lengths do not matter; a request that overlaps one in flight would.
        request
    }

    /// Whether the outcome of a request does not depend on those in flight.
    fn is_independent(&self, request: &Request) -> bool {
        let range = |request: &Request| (request.offset, request.offset + request.length);
        let (start, end) = range(request);
        let quiet = |request: &Request| matches!(request.command, 0 | 3 | 5 | 7);
        self.open.values().all(|other| {
            let (from, to) = range(other);
            (quiet(request) && quiet(other)) || end <= from || to <= start
        })
    }

    fn play(&mut self) {
        for _ in 0..STEPS {
            let request = self.request();
            while self.open.len() >= IN_FLIGHT || !self.is_independent(&request) {
                self.take_one();
            }
            let cookie = self.sender.send(&mut self.disk, &request);
            self.open.insert(cookie, request);
        }
        while !self.open.is_empty() {
            self.take_one();
        }
        self.disk.flush().unwrap();
    }

    fn take_one(&mut self) {
        let reply = self.disk.receive().unwrap().successful().unwrap();
        let request = self.open.remove(&reply.cookie).unwrap();
        self.apply(&request, &reply);
    }

    fn apply(&mut self, request: &Request, reply: &Reply) {
        if matches!(request.command, 2 | 3 | 5 | 7) {
            return;
        }
        let start = (request.offset - self.start) as usize;
        let range = start..start + request.length as usize;
        match request.command {
            0 => assert!(reply.data() == self.array[range], "{}", reply.outline()),
            1 => self.array[range].copy_from_slice(&request.payload),
            6 => self.array[range].fill(0),
            // What a trim leaves is not said; it must stay within the range, so the range is made known again.
            4 => {
                let zeroes = Request::write_zeroes(request.offset, request.length);
                let zeroed = self.sender.send(&mut self.disk, &zeroes);
                self.disk.receive_of(zeroed).unwrap().successful().unwrap();
                self.array[range].fill(0);
            }
            other => panic!("command {other}"),
        }
    }
}

/// Reads a whole image in another session and checks its file.
fn reopened(path: &Path) -> Vec<u8> {
    let image = open_file(path, false);
    let mut bytes = vec![0; SIZE as usize];
    image.read_at(&mut bytes, 0).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, FileAccess::Read, Sharing::ForceShare).unwrap());
    let report = check(&storage, Some(path), &CheckOptions::default(), &()).unwrap();
    assert_eq!((report.errors, report.warnings), (0, 0), "{:#?}", report.findings);
    bytes
}

fn play(path: &Path, seed: u64) {
    let initial = reopened(path);
    let image = open_file(path, true);
    let server = Served::disk(Arc::clone(&image) as _);
    let players = (0..CONNECTIONS).map(|index| {
        let mode = Mode::ALL[((index + seed) % 3) as usize];
        Player::new(server.begin(mode), index, seed, &initial)
    });
    let threads: Vec<_> = players
        .map(|mut player| {
            thread::spawn(move || {
                player.play();
                player
            })
        })
        .collect();
    let players: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let mut expected = Vec::new();
    for player in players {
        expected.extend(player.array);
        player.disk.disconnect().unwrap();
    }
    server.stop();
    close(image);
    let found = reopened(path);
    let difference = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    assert_eq!((found.len(), difference), (expected.len(), None), "seed {seed}");
}

#[test]
fn a_new_disk_holds_what_several_clients_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vhdx");
    make_disk_file(&path, SIZE);
    // Each seed goes on with the disk as the one before left it.
    (1..=3).for_each(|seed| play(&path, seed));
}

#[test]
fn a_child_holds_what_several_clients_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let (base, child) = (directory.path().join("base.vhdx"), directory.path().join("child.vhdx"));
    make_disk_file(&base, SIZE);
    let image = open_file(&base, true);
    image.write_at(&pattern(99, 10 * MIB as usize), 3 * MIB).unwrap();
    close(image);
    make_child_file(&child, &base);
    (4..=6).for_each(|seed| play(&child, seed));
}
