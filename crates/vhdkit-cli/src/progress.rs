//! A progress bar that appears when work takes long, and the way by which a signal cancels the work.

use std::ops::ControlFlow;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vhdkit::ops::Progress;

use crate::signals::Interrupt;
use crate::ui::Ui;

/// Work that is done sooner shows no bar.
const APPEARS_AFTER: Duration = Duration::from_millis(300);

/// Shows how far an operation is, and cancels it when a signal came.
#[derive(Debug)]
pub(crate) struct Bar {
    what: &'static str,
    began: Instant,
    shown: bool,
    bar: OnceLock<ProgressBar>,
    interrupt: Interrupt,
}

impl Bar {
    /// A bar for work that is called `what`.
    pub(crate) fn new(what: &'static str, ui: &Ui, interrupt: &Interrupt) -> Self {
        let shown = ui.shows_progress();
        Self { what, began: Instant::now(), shown, bar: OnceLock::new(), interrupt: interrupt.clone() }
    }

    fn draw(&self, total: Option<u64>) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
        let template = match total {
            Some(_) => "{msg} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            None => "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(self.what);
        bar
    }
}

impl Progress for Bar {
    fn advance(&self, done: u64, total: Option<u64>) -> ControlFlow<()> {
        if self.interrupt.is_set() {
            return ControlFlow::Break(());
        }
        if self.shown && (self.bar.get().is_some() || self.began.elapsed() > APPEARS_AFTER) {
            self.bar.get_or_init(|| self.draw(total)).set_position(done);
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}
