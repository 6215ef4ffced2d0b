//! Bounds on what is in flight: of the whole server, and of each connection.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The most bytes in flight of a connection.
pub(crate) const CONNECTION_BYTES_MAX: u64 = 32 << 20;
/// The most bytes in flight of a server.
pub(crate) const SERVER_BYTES_MAX: u64 = 256 << 20;
/// What a connection may have in flight of those whatever others have: it is counted with the connection's buffers.
pub(crate) const FLOOR_BYTES: u64 = 256 << 10;
/// What a request counts for at least: it is remembered, and a client must not be able to have millions remembered.
const REQUEST_BYTES_MIN: u64 = 4096;

/// The bytes that a server has in flight.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicU64,
    max: u64,
}

impl Budget {
    pub(crate) fn new(max: u64) -> Self {
        Self { used: AtomicU64::new(0), max }
    }

    fn try_take(&self, bytes: u64) -> bool {
        let more = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

#[derive(Debug, Default)]
struct InFlight {
    bytes: u64,
    /// Of them, those that are not the server's.
    floor: u64,
    requests: u64,
}

/// The requests of one connection that are in flight.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    state: Mutex<InFlight>,
    landed: Condvar,
}

/// Why nothing could be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// The connection has to wait for its own requests.
    Connection,
    /// Others have taken all that there is.
    Server,
}

/// Bytes in flight; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    flight: Arc<Flight>,
    bytes: u64,
    /// Of them, those that are the server's.
    taken: u64,
}

impl Flight {
    fn lock(&self) -> MutexGuard<'_, InFlight> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // numbers are whole at any moment
    }

    /// Reserves bytes for a request.
    pub(crate) fn reserve(self: &Arc<Self>, budget: &Arc<Budget>, bytes: u64) -> Result<Reservation, Full> {
        let bytes = bytes.max(REQUEST_BYTES_MIN);
        let mut state = self.lock();
        // A request that is as large as the limit still has to go through.
        if state.requests > 0 && state.bytes + bytes > CONNECTION_BYTES_MAX {
            return Err(Full::Connection);
        }
        let taken = if budget.try_take(bytes) {
            bytes
        } else if state.floor + bytes <= FLOOR_BYTES {
            state.floor += bytes;
            0
        } else {
            return Err(Full::Server);
        };
        state.bytes += bytes;
        state.requests += 1;
        Ok(Reservation { budget: Arc::clone(budget), flight: Arc::clone(self), bytes, taken })
    }

    /// Waits until a request has landed, unless none is in flight.
    pub(crate) fn wait_for_one(&self) {
        let state = self.lock();
        let before = state.requests;
        let fewer = |state: &mut InFlight| state.requests == before && before > 0;
        drop(self.landed.wait_while(state, fewer));
    }

    /// Waits until all have landed.
    pub(crate) fn wait_for_all(&self) {
        drop(self.landed.wait_while(self.lock(), |state| state.requests > 0));
    }

    /// True when nothing is in flight.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().requests == 0
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.taken, Ordering::Relaxed);
        let mut state = self.flight.lock();
        state.bytes -= self.bytes;
        state.floor -= self.bytes - self.taken;
        state.requests -= 1;
        drop(state);
        self.flight.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_for_connection_and_server() {
        let budget = Arc::new(Budget::new(40 << 20));
        let (one, other) = (Arc::new(Flight::default()), Arc::new(Flight::default()));
        let first = one.reserve(&budget, 20 << 20).ok();
        assert!(first.is_some());
        assert_eq!(one.reserve(&budget, 20 << 20).err(), Some(Full::Connection));
        assert_eq!(other.reserve(&budget, 21 << 20).err(), Some(Full::Server));
        let second = other.reserve(&budget, 20 << 20).ok();
        assert!(second.is_some());
        drop(first);
        assert!(one.is_empty() && !other.is_empty());
        assert!(one.reserve(&budget, 1).is_ok(), "what was dropped is there again");
    }

    #[test]
    fn a_little_is_there_for_everybody() {
        let budget = Arc::new(Budget::new(1 << 20));
        let (one, other) = (Arc::new(Flight::default()), Arc::new(Flight::default()));
        let all = one.reserve(&budget, 1 << 20).ok();
        assert!(all.is_some());
        let little = other.reserve(&budget, FLOOR_BYTES).ok();
        assert!(little.is_some());
        assert_eq!(other.reserve(&budget, 1).err(), Some(Full::Server));
        drop((all, little));
        assert_eq!((budget.used.load(Ordering::Relaxed), other.lock().floor), (0, 0));
    }

    #[test]
    fn small_requests_count_too() {
        let budget = Arc::new(Budget::new(SERVER_BYTES_MAX));
        let flight = Arc::new(Flight::default());
        let held: Vec<_> = std::iter::from_fn(|| flight.reserve(&budget, 0).ok()).take(1 << 20).collect();
        assert_eq!(held.len() as u64, CONNECTION_BYTES_MAX / REQUEST_BYTES_MIN);
    }
}
