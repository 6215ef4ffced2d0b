//! Flushes that are asked for at the same time: one leads and commits, the others follow and are satisfied with it.
//!
//! ```text
//! ask ---> ticket ---> done already?           --> return
//!                      somebody leads?         --> wait until that has ended, look again
//!                      else lead: commit, which takes every ticket asked for before; wake all
//! ```
//!
//! Those who follow wait here and not for the commit lock: that one is held through a sync, and handed on to one thread
//! at a time, also to those whom the last commit has satisfied.

use super::tokens::Wait;
use crate::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering, PoisonError};

#[derive(Debug, Default)]
struct State {
    /// Flushes up to this ticket are satisfied.
    done: u64,
    leads: bool,
    /// So many wait: waking nobody is a system call too.
    waiting: usize,
}

/// The flushes of an image.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    asked: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

/// What a flush has to do.
#[derive(Debug)]
pub(crate) enum Turn<'a> {
    /// Nothing: a commit that began after it was asked for has ended.
    Done,
    /// Come back later: somebody leads, and it must not wait.
    Busy,
    /// Commit.
    Lead(Lead<'a>),
}

/// The right to commit for all who ask; ends when dropped.
#[derive(Debug)]
pub(crate) struct Lead<'a>(&'a Flushes);

impl Flushes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // changed by single steps, whole at any moment
    }

    /// A flush is asked for. What ended before is covered by every commit that takes this ticket.
    pub(crate) fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The newest ticket: a commit that takes its pages after this covers all up to it.
    pub(crate) fn newest(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    /// Waits until the flush is satisfied or may lead.
    pub(crate) fn turn(&self, ticket: u64, wait: Wait) -> Turn<'_> {
        let mut state = self.lock();
        loop {
            if state.done >= ticket {
                return Turn::Done;
            }
            if !state.leads {
                state.leads = true;
                return Turn::Lead(Lead(self));
            }
            if wait != Wait::Yes {
                return Turn::Busy;
            }
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }
}

impl Lead<'_> {
    /// A commit that took this ticket has ended well.
    pub(crate) fn done(self, ticket: u64) {
        let mut state = self.0.lock();
        state.done = state.done.max(ticket);
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.leads = false;
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.0.changed.notify_all();
        }
    }
}
