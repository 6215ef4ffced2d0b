//! Signals to a server: SIGINT and SIGTERM stop it, SIGUSR1 asks what it has done.

use std::io::{self, Read as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::{flag, low_level::pipe};
use vhdkit_nbd::Handle;

use crate::cli::Context;
use crate::signals::Interrupt;
use crate::ui::Ui;

/// Signals on their way to a server. From the time that this exists SIGUSR1 does not end the process.
#[derive(Debug)]
pub(crate) struct Signals {
    /// A byte for each signal.
    bell: UnixStream,
    asked: Arc<AtomicBool>,
}

/// A thread that waits for signals.
#[derive(Debug)]
pub(crate) struct Watch {
    bell: UnixStream,
    thread: JoinHandle<()>,
}

impl Signals {
    /// Takes the signals from here on. [`Interrupt`] has set its flag when the bell rings: it was there first.
    pub(crate) fn catch() -> io::Result<Self> {
        let (bell, ringing) = UnixStream::pair()?;
        let asked = Arc::new(AtomicBool::new(false));
        flag::register(SIGUSR1, Arc::clone(&asked))?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            pipe::register(signal, ringing.try_clone()?)?;
        }
        Ok(Self { bell, asked })
    }

    /// Passes signals on, those too that came meanwhile.
    pub(crate) fn watch(self, context: &Context, handle: Handle) -> io::Result<Watch> {
        let Self { bell, asked } = self;
        let mut listening = bell.try_clone()?;
        let (ui, interrupt) = (context.ui, context.interrupt.clone());
        let wait = move || {
            loop {
                act(&ui, &interrupt, &asked, &handle);
                match listening.read(&mut [0; 64]) {
                    Ok(0) => break,
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => break,
                    _ => {}
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(wait)?;
        Ok(Watch { bell, thread })
    }
}

fn act(ui: &Ui, interrupt: &Interrupt, asked: &AtomicBool, handle: &Handle) {
    if interrupt.is_set() {
        handle.stop();
    }
    if asked.swap(false, Ordering::Relaxed) {
        print_totals(ui, handle);
    }
}

impl Watch {
    /// Ends the thread.
    pub(crate) fn end(self) {
        let _ = self.bell.shutdown(Shutdown::Both); // it is open, so that this cannot fail
        let _ = self.thread.join(); // if it panicked, nobody needs it any more
    }
}

/// Prints what the server has done so far to standard error.
pub(crate) fn print_totals(ui: &Ui, handle: &Handle) {
    let entries = handle.totals().entries();
    if ui.json {
        let mut totals: Map<String, Value> =
            entries.iter().map(|(name, count)| ((*name).to_owned(), (*count).into())).collect();
        totals.insert("connected".to_owned(), handle.connections().into());
        ui.stderr_line(&json!({ "totals": totals }).to_string());
        return;
    }
    let connected = handle.connections();
    let counts: Vec<String> = entries.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let text = format!("totals: connected {connected}, {}", counts.join(", ")).replace('_', " ");
    ui.stderr_line(&format!("vhdkit: {text}"));
}
