//! SIGINT and SIGTERM: the first one cancels, the second one ends the process at once.
//!
//! Commands that make no file and change no image have nothing to clean up; they end at the first signal, wherever they are
//! blocked.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use vhdkit::{Probe, probe};

use crate::ui::Ui;

/// How long a wait for input may take before the flag is looked at again.
const POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What a process ends with after a signal: this plus the signal's number.
pub(crate) const EXIT_BASE: u8 = 128;

/// Knows whether the process was asked to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt {
    number: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Handles the signals from here on. With `clean_up` the first one only sets the flag.
    pub(crate) fn install(clean_up: bool) -> io::Result<Self> {
        let interrupt = Self::default();
        // With a handler the write that goes beyond `ulimit -f` fails, and the file is cleaned up as after any failure.
        flag::register(SIGXFSZ, Arc::default())?;
        let armed = Arc::new(AtomicBool::new(!clean_up));
        for (signal, number) in [(SIGINT, 2_usize), (SIGTERM, 15)] {
            // The order matters: the shutdown must look at the flag before this signal sets it.
            flag::register_conditional_shutdown(signal, i32::from(EXIT_BASE) + signal, Arc::clone(&armed))?;
            flag::register(signal, Arc::clone(&armed))?;
            flag::register_usize(signal, Arc::clone(&interrupt.number), number)?;
        }
        Ok(interrupt)
    }

    /// True once a signal came.
    pub(crate) fn is_set(&self) -> bool {
        self.number.load(Ordering::Relaxed) != 0
    }

    /// Forgets the signal: what it asked for is done. Another one ends the process at once all the same.
    pub(crate) fn acknowledge(&self) {
        self.number.store(0, Ordering::Relaxed);
    }

    /// The exit code that the signal asks for.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        match self.number.load(Ordering::Relaxed) {
            0 => None,
            number => u8::try_from(number).ok().map(|number| EXIT_BASE + number), // 2 or 15
        }
    }
}

/// Reads what there is; gives up when a signal comes, however long nothing arrives.
pub(crate) fn read_interruptibly(input: impl AsFd, interrupt: &Interrupt, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        if interrupt.is_set() {
            return Err(io::Error::other("stopped by a signal"));
        }
        match poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&POLL)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        match rustix::io::read(&input, &mut *buffer) {
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
            Ok(count) => return Ok(count),
        }
    }
}

/// Standard input without a buffer; reading ends when a signal comes, however long nothing arrives.
#[derive(Debug)]
pub(crate) struct Stdin {
    interrupt: Interrupt,
    ui: Ui,
    looked_at: bool,
}

impl Stdin {
    /// Standard input, given up when `interrupt` is set.
    pub(crate) fn new(interrupt: &Interrupt, ui: Ui) -> Self {
        Self { interrupt: interrupt.clone(), ui, looked_at: false }
    }

    /// Says so when the first bytes are those of a VHDX, whose structure a stream does not tell.
    fn look(&mut self, first: &[u8]) {
        if !std::mem::replace(&mut self.looked_at, true) && probe(first) == Probe::Vhdx {
            let what = "standard input is taken for a raw disk, but looks like a VHDX";
            self.ui.warn(None, &format!("{what}; if it is one, save it to a file and convert that with --from vhdx"));
        }
    }
}

impl Read for Stdin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = read_interruptibly(rustix::stdio::stdin(), &self.interrupt, buffer)?;
        self.look(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}
