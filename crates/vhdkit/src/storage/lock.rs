//! Locks that QEMU and vhdkit see of each other.
//!
//! ```text
//!             permission in use              permission not shared with others
//! byte        100  101  102  103             200  201  202  203
//!             read write     resize          read write     resize
//!
//! reader      held -         -               -    held      held       tests 200, 101, 103
//! writer      held held      held            -    held      held       tests 200, 201, 203, 101, 103
//! ```
//!
//! All are shared locks of the open file description (OFD), so taking them never fails because of another image
//! user. What conflicts is found by testing afterwards: whoever uses a permission tests whether somebody does not
//! share it, and whoever does not share one tests whether somebody uses it. Of two that come at the same moment at
//! least one sees the other. The locks last until the open file description is closed, also by a crash.

use std::fs::File;
use std::io;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::sys;
use crate::error::{Error, ErrorKind, Result};

/// Byte of the first permission in use.
const IN_USE: u64 = 100;
/// Byte of the first permission that is not shared.
const NOT_SHARED: u64 = 200;
/// Permission to read consistent data.
const READ: u64 = 0;
/// Permission to write.
const WRITE: u64 = 1;
/// Permission to change the length.
const RESIZE: u64 = 3;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockMode {
    /// Others may read, nobody may write.
    Read,
    /// Others may read without a claim to consistent data, nobody else may write.
    Write,
}

/// How a file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LockKind {
    /// By locks of the open file description, which QEMU respects and takes.
    Ofd,
    /// By `flock`, which other runs of this program respect, but QEMU does not.
    Flock,
    /// Not at all: nobody asked for it, or the file system has no locks.
    None,
}

/// How a file is locked, and what the user should know about that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockReport {
    /// How the file is locked.
    pub how: LockKind,
    /// What the user should know: that the protection is weaker than usual, and why.
    pub note: Option<String>,
}

impl LockReport {
    /// The report on a file that nobody wanted locked.
    pub(super) const fn not_asked() -> Self {
        Self { how: LockKind::None, note: None }
    }
}

/// The bytes that a mode holds and those that it tests.
const fn bytes(mode: LockMode) -> (&'static [u64], &'static [u64]) {
    const HELD_BY_READER: &[u64] = &[IN_USE + READ, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
    const TESTED_BY_READER: &[u64] = &[IN_USE + WRITE, IN_USE + RESIZE, NOT_SHARED + READ];
    const HELD_BY_WRITER: &[u64] =
        &[IN_USE + READ, IN_USE + WRITE, IN_USE + RESIZE, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
    const TESTED_BY_WRITER: &[u64] =
        &[IN_USE + WRITE, IN_USE + RESIZE, NOT_SHARED + READ, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
    match mode {
        LockMode::Read => (HELD_BY_READER, TESTED_BY_READER),
        LockMode::Write => (HELD_BY_WRITER, TESTED_BY_WRITER),
    }
}

/// Locks a file for as long as its open file description lives.
///
/// # Errors
/// [`ErrorKind::Locked`] when somebody else uses it in a way that does not go together; nothing is held then.
pub(super) fn acquire(file: &File, mode: LockMode) -> Result<LockReport> {
    match acquire_ofd(file, mode) {
        Err(Refusal::Unsupported(cause)) => acquire_flock(file, mode, &cause),
        Err(refusal) => Err(refusal.into_error(mode)),
        Ok(()) => Ok(LockReport { how: LockKind::Ofd, note: None }),
    }
}

/// Why a lock was not granted.
#[derive(Debug)]
enum Refusal {
    /// Somebody writes or resizes the file.
    Written,
    /// Somebody does not let others do what is wanted.
    Forbidden,
    /// Somebody holds an exclusive lock, which no image user takes.
    Exclusive,
    /// There are no such locks here.
    Unsupported(io::Error),
    /// Something else went wrong.
    Failed(io::Error),
}

impl Refusal {
    fn from_io(error: io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::AGAIN | Errno::ACCESS) => Self::Exclusive,
            Some(Errno::INVAL | Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => Self::Unsupported(error),
            _ => Self::Failed(error),
        }
    }

    fn into_error(self, mode: LockMode) -> Error {
        let message = match (self, mode) {
            (Self::Written, _) => "another program has it open for writing",
            (Self::Forbidden, LockMode::Read) => "another program has it open and does not let others read it",
            (Self::Forbidden, LockMode::Write) => "another program has it open and does not let others write to it",
            (Self::Exclusive, _) => "another program holds an exclusive lock on it",
            (Self::Unsupported(error) | Self::Failed(error), _) => return Error::io("cannot lock", error),
        };
        locked(message, mode)
    }
}

/// The error for a file in use, with what to do about it.
pub(super) fn locked(message: &str, mode: LockMode) -> Error {
    Error::new(ErrorKind::Locked, message).with_hint(match mode {
        LockMode::Read => {
            "shut down the virtual machine or close the program that uses it, or look at it anyway with --force-share \
             (what is read may be changing meanwhile)"
        }
        LockMode::Write => "shut down the virtual machine or close the program that uses it",
    })
}

/// Raises the locks of a live open file from a reader's to a writer's.
///
/// # Errors
/// [`ErrorKind::Locked`] when somebody else uses it in a way that does not go together; the reader's locks are held
/// then as before.
pub(super) fn raise(file: &File, how: LockKind) -> Result<()> {
    match how {
        LockKind::Ofd => raise_ofd(file).map_err(|refusal| refusal.into_error(LockMode::Write)),
        LockKind::Flock => raise_flock(file),
        LockKind::None => Ok(()),
    }
}

fn raise_ofd(file: &File) -> Result<(), Refusal> {
    // First without taking anything: others must not be kept out, not even for a moment, by an attempt without hope.
    test(file, LockMode::Write)?;
    raise_ofd_or_keep(file)
}

/// Takes a writer's locks in addition to a reader's, and gives up what came in addition when that is not granted.
fn raise_ofd_or_keep(file: &File) -> Result<(), Refusal> {
    let outcome = acquire_ofd_or_leave_some(file, LockMode::Write);
    if outcome.is_err() {
        let _ = lower_ofd(file); // the refusal is what matters
    }
    outcome
}

fn raise_flock(file: &File) -> Result<()> {
    let Err(refusal) = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) else { return Ok(()) };
    // The kernel gave the shared lock up before it looked whether it can grant the exclusive one.
    lower_flock(file)?;
    match refusal {
        Errno::WOULDBLOCK => Err(locked("another program holds a lock on it", LockMode::Write)),
        error => Err(Error::io("cannot lock it for writing", error.into())
            .with_hint("open it for writing in the first place; some file systems want that")),
    }
}

/// Lowers the locks of a live open file from a writer's to a reader's.
///
/// # Errors
/// The operating system's; [`ErrorKind::Locked`] when somebody got in between, which can be only where the locks are
/// not QEMU's.
pub(super) fn lower(file: &File, how: LockKind) -> Result<()> {
    match how {
        LockKind::Ofd => lower_ofd(file).map_err(|error| Error::io("cannot release the writer's locks", error)),
        LockKind::Flock => lower_flock(file),
        LockKind::None => Ok(()),
    }
}

fn lower_ofd(file: &File) -> io::Result<()> {
    let ((held, _), (kept, _)) = (bytes(LockMode::Write), bytes(LockMode::Read));
    let mut outcome = Ok(());
    for &byte in held.iter().filter(|byte| !kept.contains(byte)) {
        outcome = outcome.and(sys::unlock(file, byte, 1));
    }
    outcome
}

fn lower_flock(file: &File) -> Result<()> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            Err(locked("another program has locked it meanwhile, it may be changing", LockMode::Read))
        }
        Err(error) => Err(Error::io("cannot lock it for reading", error.into())),
    }
}

/// Takes the locks of a mode, then looks whether they go together with everybody else's.
fn acquire_ofd(file: &File, mode: LockMode) -> Result<(), Refusal> {
    let (held, _) = bytes(mode);
    let outcome = acquire_ofd_or_leave_some(file, mode);
    if outcome.is_err() {
        for &byte in held {
            // A lock that cannot be released goes when the caller closes the file, which it does after an error.
            let _ = sys::unlock(file, byte, 1);
        }
    }
    outcome
}

/// As [`acquire_ofd`], but keeps what it got when it fails.
fn acquire_ofd_or_leave_some(file: &File, mode: LockMode) -> Result<(), Refusal> {
    let (held, _) = bytes(mode);
    for &byte in held {
        sys::lock_shared(file, byte, 1).map_err(Refusal::from_io)?;
    }
    // Only after all are held: of two that come at the same moment, the later one to test sees the other.
    test(file, mode)
}

/// Looks whether a mode goes together with everybody else's locks.
fn test(file: &File, mode: LockMode) -> Result<(), Refusal> {
    let (_, tested) = bytes(mode);
    for &byte in tested {
        if sys::is_locked_elsewhere(file, byte, 1).map_err(Refusal::from_io)? {
            return Err(if byte < NOT_SHARED { Refusal::Written } else { Refusal::Forbidden });
        }
    }
    Ok(())
}

/// The second best, where the file system has no locks of open file descriptions.
fn acquire_flock(file: &File, mode: LockMode, cause: &io::Error) -> Result<LockReport> {
    let operation = match mode {
        LockMode::Read => FlockOperation::NonBlockingLockShared,
        LockMode::Write => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(LockReport {
            how: LockKind::Flock,
            note: Some(format!(
                "the file system has no locks that QEMU and vhdkit share ({cause}): only other runs of vhdkit are \
                 kept out, make sure that no virtual machine uses the file"
            )),
        }),
        Err(Errno::WOULDBLOCK) => Err(locked("another program holds a lock on it", mode)),
        Err(_) => Ok(LockReport {
            how: LockKind::None,
            note: Some(format!("the file system has no locks ({cause}): make sure that nobody else uses the file")),
        }),
    }
}

/// Whether anybody but this open file description has any byte of the file locked by record locks, as QEMU and this
/// library lock images. Only asks: nothing is locked, and nobody is kept from anything. False where that cannot be told.
pub(crate) fn is_locked_elsewhere(file: &File) -> bool {
    sys::is_locked_elsewhere(file, 0, 0).unwrap_or(false)
}

/// Whether anybody but this open file description has the file open or locked, as far as that can be told: by any
/// record lock, by `flock`, or because the kernel refuses a lease. Used before a file is replaced.
///
/// The lease tells only for files of the caller's own (or for a privileged caller), and not on network file systems;
/// then programs that lock nothing go unnoticed. The caller's own second opening of the file counts as somebody else.
///
/// # Errors
/// The operating system's, when a lock cannot be tested for another reason than that there are none.
pub fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    match sys::is_locked_elsewhere(file, 0, 0) {
        Ok(true) => return Ok(true),
        Ok(false) => {}
        Err(error) => match Refusal::from_io(error) {
            Refusal::Unsupported(_) => {}
            Refusal::Failed(error) => return Err(error),
            Refusal::Exclusive | Refusal::Written | Refusal::Forbidden => return Ok(true),
        },
    }
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => rustix::fs::flock(file, FlockOperation::Unlock)?,
        Err(Errno::WOULDBLOCK) => return Ok(true),
        Err(_) => {} // no such locks here, or not on a file opened for reading
    }
    match sys::probe_write_lease(file) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        _ => Ok(false), // granted, or the question cannot be asked here
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_mode_uses_and_denies_is_tested_by_the_other_side() {
        // Two modes go together only if neither tests a byte that the other holds.
        let together = |a, b| {
            let (held, _) = bytes(a);
            let (_, tested) = bytes(b);
            !held.iter().any(|byte| tested.contains(byte))
        };
        assert!(together(LockMode::Read, LockMode::Read));
        assert!(!together(LockMode::Read, LockMode::Write));
        assert!(!together(LockMode::Write, LockMode::Read));
        assert!(!together(LockMode::Write, LockMode::Write));
    }

    #[test]
    fn a_refused_lock_leaves_nothing_behind() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let writer = named.reopen().unwrap();
        acquire(&writer, LockMode::Write).unwrap();
        let reader = named.reopen().unwrap();
        assert_eq!(acquire(&reader, LockMode::Read).unwrap_err().kind(), ErrorKind::Locked);
        assert!(!sys::is_locked_elsewhere(&writer, 0, 0).unwrap());
    }

    /// The bytes that `file`'s description holds, as another one sees them.
    fn held(other: &File) -> Vec<u64> {
        (0..1000).filter(|&byte| sys::is_locked_elsewhere(other, byte, 1).unwrap()).collect()
    }

    #[test]
    fn raising_and_lowering_end_where_locking_outright_does() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (file, other) = (named.reopen().unwrap(), named.reopen().unwrap());
        acquire(&file, LockMode::Read).unwrap();
        assert_eq!(held(&other), bytes(LockMode::Read).0);
        raise(&file, LockKind::Ofd).unwrap();
        assert_eq!(held(&other), bytes(LockMode::Write).0);
        lower(&file, LockKind::Ofd).unwrap();
        assert_eq!(held(&other), bytes(LockMode::Read).0);
        // Beside another reader the reader's locks stay.
        acquire(&other, LockMode::Read).unwrap();
        assert_eq!(raise(&file, LockKind::Ofd).unwrap_err().kind(), ErrorKind::Locked);
        // So they do when the other one comes only after the first look.
        assert!(matches!(raise_ofd_or_keep(&file), Err(Refusal::Forbidden)));
        sys::unlock(&other, 0, 1000).unwrap();
        assert_eq!(held(&other), bytes(LockMode::Read).0);
    }

    #[test]
    fn raising_without_hope_does_not_disturb_readers() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let [first, second, third] = std::array::from_fn(|_| named.reopen().unwrap());
        acquire(&first, LockMode::Read).unwrap();
        acquire(&second, LockMode::Read).unwrap();
        std::thread::scope(|scope| {
            let readers = scope.spawn(|| {
                for _ in 0..20_000 {
                    acquire(&third, LockMode::Read).unwrap();
                    sys::unlock(&third, 0, 1000).unwrap();
                }
            });
            while !readers.is_finished() {
                assert_eq!(raise(&first, LockKind::Ofd).unwrap_err().kind(), ErrorKind::Locked);
            }
        });
    }

    #[test]
    fn two_readers_that_raise_at_once_never_both_write() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let files = [named.reopen().unwrap(), named.reopen().unwrap()];
        let writers = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for file in &files {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        if acquire(file, LockMode::Read).is_err() {
                            continue;
                        }
                        if raise(file, LockKind::Ofd).is_ok() {
                            assert_eq!(writers.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                            writers.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                            lower(file, LockKind::Ofd).unwrap();
                        }
                        sys::unlock(file, 0, 1000).unwrap();
                    }
                });
            }
        });
        raise(&files[0], LockKind::Ofd).unwrap();
    }

    #[test]
    fn flock_is_raised_and_lowered_and_kept_when_refused() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let (file, other) = (named.reopen().unwrap(), named.reopen().unwrap());
        let shared = FlockOperation::NonBlockingLockShared;
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        rustix::fs::flock(&file, shared).unwrap();
        rustix::fs::flock(&other, shared).unwrap();
        assert_eq!(raise(&file, LockKind::Flock).unwrap_err().kind(), ErrorKind::Locked);
        rustix::fs::flock(&other, exclusive).unwrap_err(); // which gives up its own, but ours was kept
        raise(&file, LockKind::Flock).unwrap();
        rustix::fs::flock(&other, shared).unwrap_err();
        lower(&file, LockKind::Flock).unwrap();
        rustix::fs::flock(&other, shared).unwrap();
    }

    #[test]
    fn file_systems_without_these_locks_fall_back_to_flock_and_say_so() {
        for errno in [Errno::INVAL, Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS] {
            let error = io::Error::from_raw_os_error(errno.raw_os_error());
            assert!(matches!(Refusal::from_io(error), Refusal::Unsupported(_)));
        }
        let cause = io::Error::from(Errno::NOLCK);
        let named = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (named.reopen().unwrap(), named.reopen().unwrap());
        let report = acquire_flock(&first, LockMode::Read, &cause).unwrap();
        assert_eq!(report.how, LockKind::Flock);
        assert!(report.note.unwrap().contains("only other runs of vhdkit"));
        acquire_flock(&second, LockMode::Read, &cause).unwrap();
        let third = named.reopen().unwrap();
        assert_eq!(acquire_flock(&third, LockMode::Write, &cause).unwrap_err().kind(), ErrorKind::Locked);
        drop(first);
        drop(second);
        acquire_flock(&third, LockMode::Write, &cause).unwrap();
    }

    #[test]
    fn an_exclusive_lock_of_somebody_else_is_told_apart() {
        let error = io::Error::from(Errno::AGAIN);
        let error = Refusal::from_io(error).into_error(LockMode::Read);
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.message().contains("exclusive"));
    }
}
