//! Threads that do what has to wait, for all connections to a disk, in turns.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The most threads of a pool, and the most of them that work for one connection, so that some are left for others. They
/// wait most of the time.
pub(crate) const WAITING: Limits = Limits { threads: 64, of_connection: 32 };
/// The same for work of many steps and of unknown length, so that it cannot hold up what is short.
pub(crate) const STEPPED: Limits = Limits { threads: 8, of_connection: 4 };
/// The most threads of all pools of a server; every pool may have one all the same.
const THREADS_OF_SERVER_MAX: usize = 256;
/// How long a thread waits for work before it ends.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// How many threads there may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    threads: usize,
    of_connection: usize,
}

/// Something to do that may take a while.
pub(crate) trait Work: Send {
    /// Does it, or a step of it: what is left comes after what other connections want.
    fn step(self: Box<Self>) -> Option<Box<dyn Work>>;
}

/// What a connection wants.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Box<dyn Work>>,
    /// So many threads work for it.
    running: usize,
    /// Whether it stands in the round.
    listed: bool,
}

#[derive(Default)]
struct State {
    queues: HashMap<u64, Queue>,
    /// Connections whose turn comes.
    round: VecDeque<u64>,
    threads: usize,
    idle: usize,
    /// Work that nobody has begun.
    waiting: usize,
    ended: bool,
    /// The most threads that work for one connection.
    of_connection: usize,
}

impl State {
    fn list(&mut self, connection: u64) {
        let running_max = self.of_connection;
        let is_due = |queue: &&mut Queue| !queue.listed && !queue.waiting.is_empty() && queue.running < running_max;
        if let Some(queue) = self.queues.get_mut(&connection).filter(is_due) {
            queue.listed = true;
            self.round.push_back(connection);
        }
    }

    fn next(&mut self) -> Option<(u64, Box<dyn Work>)> {
        let connection = self.round.pop_front()?;
        let queue = self.queues.get_mut(&connection)?;
        queue.listed = false;
        let work = queue.waiting.pop_front()?;
        queue.running += 1;
        self.waiting -= 1;
        self.list(connection);
        Some((connection, work))
    }

    fn ended(&mut self, connection: u64, rest: Option<Box<dyn Work>>) {
        if let Some(queue) = self.queues.get_mut(&connection) {
            queue.running -= 1;
            self.waiting += usize::from(rest.is_some());
            queue.waiting.extend(rest);
            if queue.running == 0 && queue.waiting.is_empty() {
                self.queues.remove(&connection);
                return;
            }
        }
        self.list(connection);
    }
}

/// The threads of an export.
pub(crate) struct Pool {
    state: Mutex<State>,
    work: Condvar,
    limits: Limits,
    /// Threads of all pools of the server.
    all_threads: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.lock().threads).finish_non_exhaustive()
    }
}

impl Pool {
    pub(crate) fn new(limits: Limits, all_threads: &Arc<AtomicUsize>) -> Self {
        let state = State { of_connection: limits.of_connection, ..State::default() };
        Self { state: Mutex::new(state), work: Condvar::new(), limits, all_threads: Arc::clone(all_threads) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // nothing in here panics
    }

    /// Leaves work to the threads; gives it back when there are none and none can be started.
    pub(crate) fn push(self: &Arc<Self>, connection: u64, work: Box<dyn Work>) -> Result<(), Box<dyn Work>> {
        let mut state = self.lock();
        // Those that are idle have been woken for what waits already.
        let wanted = state.idle <= state.waiting && state.threads < self.limits.threads;
        let allowed = state.threads == 0 || self.all_threads.load(Ordering::Relaxed) < THREADS_OF_SERVER_MAX;
        if wanted && allowed && !self.start(&mut state) && state.threads == 0 {
            return Err(work);
        }
        state.queues.entry(connection).or_default().waiting.push_back(work);
        state.waiting += 1;
        state.list(connection);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    fn start(self: &Arc<Self>, state: &mut State) -> bool {
        let pool = Arc::clone(self);
        let thread = std::thread::Builder::new().name("nbd-worker".to_owned()).stack_size(512 << 10);
        let started = thread.spawn(move || pool.serve());
        if let Err(error) = &started {
            tracing::warn!(%error, "cannot start one more worker thread");
        } else {
            state.threads += 1;
            self.all_threads.fetch_add(1, Ordering::Relaxed);
        }
        started.is_ok()
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some((connection, work)) = state.next() {
                drop(state);
                // Work answers its request when it is dropped, also by a panic.
                let rest = catch_unwind(AssertUnwindSafe(|| work.step()));
                if rest.is_err() {
                    tracing::error!("a request panicked");
                }
                state = self.lock();
                state.ended(connection, rest.unwrap_or_default());
                continue;
            }
            if state.ended {
                break;
            }
            state.idle += 1;
            let waited = self.work.wait_timeout(state, IDLE_TIME).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            state.idle -= 1;
            if waited.1.timed_out() && state.round.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        self.all_threads.fetch_sub(1, Ordering::Relaxed);
    }

    /// Lets the threads end once nothing is left to do.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Steps(usize, mpsc::Sender<usize>);

    impl Work for Steps {
        fn step(mut self: Box<Self>) -> Option<Box<dyn Work>> {
            assert!(self.0 != 13, "the unlucky one panics");
            self.0 -= 1;
            if self.0 == 0 {
                self.1.send(1).ok();
                return None;
            }
            Some(self)
        }
    }

    #[test]
    fn every_step_is_done_and_a_panic_harms_nobody_else() {
        let threads = Arc::new(AtomicUsize::new(0));
        let pool = Arc::new(Pool::new(STEPPED, &threads));
        let (sender, receiver) = mpsc::channel();
        for connection in 0..10 {
            for steps in [1, 5, 13, 3] {
                assert!(pool.push(connection, Box::new(Steps(steps, sender.clone()))).is_ok());
            }
        }
        drop(sender);
        pool.end();
        assert_eq!(receiver.iter().sum::<usize>(), 30);
        while threads.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
    }
}
