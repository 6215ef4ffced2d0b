//! A server under attack, and what must be true meanwhile and afterwards.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhdkit::image::BlockDevice;
use vhdkit_nbd::{Export, Options};
use vhdkit_testkit::nbd::{Fault, Handshake, Mode, connect};

use crate::support::{MIB, NAME, Served, image, pattern};

/// Attacks come one after another, as they share the memory that is looked at.
static TURN: Mutex<()> = Mutex::new(());

/// How long a good client may wait for its answers while others misbehave.
const PROMPTLY: Duration = Duration::from_secs(10);

/// What attacks may cost that ask for nothing large: buffers, stacks of threads, and what allocators keep.
pub(crate) const LITTLE: u64 = 96 * MIB;
/// What attacks may cost that ask for all the memory that a server gives: its bound of 256 MiB, and the same as above.
pub(crate) const BOUND: u64 = 256 * MIB + LITTLE;

/// An attack.
pub(crate) struct Siege {
    pub(crate) server: Served,
    before: u64,
    _turn: MutexGuard<'static, ()>,
}

impl Siege {
    /// Of a server of one small image.
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        Self::of(image(64 * MIB), options)
    }

    /// Of a server of a good disk, which has the usual name, and one other.
    pub(crate) fn beside(device: Arc<dyn BlockDevice>, options: Options) -> Self {
        let good = Export::new(NAME, image(64 * MIB)).unwrap().writable(true);
        let other = Export::new("other", device).unwrap().writable(true);
        Self::serving(vec![good, other], options)
    }

    fn of(device: Arc<dyn BlockDevice>, options: Options) -> Self {
        Self::serving(vec![Export::new(NAME, device).unwrap().writable(true)], options)
    }

    /// Of a server of any exports, one of which is the good one.
    pub(crate) fn serving(exports: Vec<Export>, options: Options) -> Self {
        // One that failed has left its turn; the others are not to blame.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let server = Served::new(exports, options);
        let mut siege = Self { server, before: 0, _turn: turn };
        siege.good_client();
        siege.server.wait_until_empty();
        siege.before = connect::resident_bytes(None);
        reset_peak();
        siege
    }

    /// A client that does everything right, and has to be served promptly.
    #[track_caller]
    pub(crate) fn good_client(&self) {
        let started = Instant::now();
        let bytes = pattern(started.elapsed().subsec_nanos().into(), 3 * 4096);
        let mut disk = connect::begin(self.server.stream(), Mode::Extended, NAME).unwrap();
        disk.write(MIB - 4096, &bytes).unwrap();
        disk.flush().unwrap();
        assert_eq!(disk.read(MIB - 4096, bytes.len() as u64).unwrap(), bytes);
        disk.succeed(vhdkit_testkit::nbd::Request::block_status(0, MIB)).unwrap();
        disk.disconnect().unwrap();
        assert!(started.elapsed() < PROMPTLY, "a good client had to wait for {:?}", started.elapsed());
    }

    /// A client that got as far as the greeting and its answer.
    pub(crate) fn handshake(&self) -> Handshake<UnixStream> {
        self.server.handshake()
    }

    /// How many bytes of memory the process had at its peak more than before.
    pub(crate) fn grown(&self) -> u64 {
        peak_bytes().saturating_sub(self.before)
    }

    #[track_caller]
    pub(crate) fn assert_bounded(&self, most: u64) {
        let grown = self.grown();
        assert!(grown <= most, "{} MiB of memory more than before, {} are the most", grown / MIB, most / MIB);
    }

    /// Everything is as it was.
    #[track_caller]
    pub(crate) fn end(self, most: u64) {
        self.good_client();
        self.server.wait_until_empty();
        self.assert_bounded(most);
    }
}

/// The server must end the connection, with or without a last word.
#[track_caller]
pub(crate) fn assert_cut_off(handshake: &mut Handshake<UnixStream>) {
    let fault = std::iter::repeat_with(|| handshake.receive_reply()).take(100_000).find_map(Result::err);
    let fault = fault.expect("an end of the answers");
    assert!(fault.is_closed(), "{fault}");
}

/// The fault of something that must not succeed.
#[track_caller]
pub(crate) fn fault_of<T>(outcome: Result<T, Fault>) -> Fault {
    outcome.err().expect("this must not succeed")
}

/// The most memory that the process had since [`reset_peak`].
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn reset_peak() {
    // The number 5 stands for the peak.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}
