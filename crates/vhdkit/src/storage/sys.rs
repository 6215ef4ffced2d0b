//! The system calls that neither the standard library nor rustix offers: the only unsafe code of the library.
//!
//! Every function takes an open file and plain numbers, and gives the operating system's error as it is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use libc::{c_int, c_short};

/// Which signal tells of a lease that somebody wants broken. The libc crate has it for other systems only; the number
/// is the same on all of Linux but PA-RISC.
const F_SETSIG: c_int = 10;

/// A record lock of `length` bytes from `start` (length 0: up to the end of all files), as fcntl wants it.
fn record(kind: c_int, start: u64, length: u64) -> io::Result<libc::flock> {
    let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
    // SAFETY: flock is a plain C structure of integers, for which all zeros is a value. (Some targets have padding
    // fields that cannot be named in a literal; l_pid must be 0 for these locks.)
    #[expect(unsafe_code, reason = "a C structure with fields that differ per target")]
    let mut record: libc::flock = unsafe { std::mem::zeroed() };
    record.l_type = c_short::try_from(kind).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    record.l_whence = 0; // SEEK_SET, which libc gives as an int of another width
    record.l_start = start.try_into().map_err(too_far)?;
    record.l_len = length.try_into().map_err(too_far)?;
    Ok(record)
}

/// Runs one of the lock commands on the open file description of `file`.
fn record_command(file: &File, command: c_int, record: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the lock commands read and write one
    // flock structure through the pointer, which is valid and unaliased for the call.
    #[expect(unsafe_code, reason = "rustix has no locks of open file descriptions")]
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(record)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a shared lock that belongs to the open file description, without waiting.
pub(super) fn lock_shared(file: &File, start: u64, length: u64) -> io::Result<()> {
    record_command(file, libc::F_OFD_SETLK, &mut record(libc::F_RDLCK, start, length)?)
}

/// Releases locks of the open file description.
pub(super) fn unlock(file: &File, start: u64, length: u64) -> io::Result<()> {
    record_command(file, libc::F_OFD_SETLK, &mut record(libc::F_UNLCK, start, length)?)
}

/// Whether anybody but this open file description holds a lock, shared or exclusive, in the range.
pub(super) fn is_locked_elsewhere(file: &File, start: u64, length: u64) -> io::Result<bool> {
    let mut record = record(libc::F_WRLCK, start, length)?;
    record_command(file, libc::F_OFD_GETLK, &mut record)?;
    Ok(c_int::from(record.l_type) != libc::F_UNLCK)
}

/// Runs a fcntl command that takes a plain number.
fn number_command(file: &File, command: c_int, argument: c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the commands used here (F_SETLEASE,
    // F_SETSIG) take an int and touch no memory of this process.
    #[expect(unsafe_code, reason = "rustix has no leases")]
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a write lease and gives it back at once. It is granted only to the one open file description of a file:
/// `WouldBlock` means that somebody else has the file open.
pub(super) fn probe_write_lease(file: &File) -> io::Result<()> {
    // Whoever opens the file just now makes the kernel send a signal here. The default one, SIGIO, would end the
    // process; SIGURG is ignored unless somebody asked for it.
    number_command(file, F_SETSIG, libc::SIGURG)?;
    number_command(file, libc::F_SETLEASE, libc::F_WRLCK)?;
    number_command(file, libc::F_SETLEASE, libc::F_UNLCK)
}

/// Makes a range of `target` share the blocks of a range of `source`.
pub(super) fn clone_range(
    source: &File,
    source_offset: u64,
    target: &File,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    let argument = libc::file_clone_range {
        src_fd: i64::from(source.as_raw_fd()),
        src_offset: source_offset,
        src_length: length,
        dest_offset: offset,
    };
    // SAFETY: both descriptors are open for as long as the files are borrowed, and the command reads one
    // file_clone_range structure, which lives through the call.
    #[expect(unsafe_code, reason = "rustix clones only whole files")]
    let result = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, std::ptr::from_ref(&argument)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn locks_are_seen_by_other_descriptions_and_not_by_their_own() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let ours = named.reopen().unwrap();
        let theirs = named.reopen().unwrap();
        lock_shared(&ours, 100, 2).unwrap();
        assert!(is_locked_elsewhere(&theirs, 101, 1).unwrap());
        assert!(!is_locked_elsewhere(&theirs, 102, 1).unwrap());
        assert!(is_locked_elsewhere(&theirs, 0, 0).unwrap());
        assert!(!is_locked_elsewhere(&ours, 0, 0).unwrap());
        lock_shared(&theirs, 100, 1).unwrap();
        unlock(&ours, 100, 2).unwrap();
        assert!(!is_locked_elsewhere(&theirs, 0, 0).unwrap());
        assert!(is_locked_elsewhere(&ours, 100, 1).unwrap());
    }

    #[test]
    fn positions_beyond_what_the_system_counts_are_errors() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(lock_shared(&file, u64::MAX, 1).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(unlock(&file, 0, u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_lease_tells_whether_a_file_is_open_twice() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let other = File::open(named.path()).unwrap();
        drop(named.reopen().unwrap());
        assert_eq!(probe_write_lease(&other).unwrap_err().kind(), ErrorKind::WouldBlock, "named holds it open");
        let path = named.into_temp_path();
        probe_write_lease(&other).unwrap();
        let again = File::open(&path).unwrap();
        assert_eq!(probe_write_lease(&other).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(again);
        probe_write_lease(&other).unwrap();
    }

    #[test]
    fn a_file_that_somebody_opens_during_a_probe_does_no_harm() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let file = File::open(&path).unwrap();
        let (mut granted, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            let opener = scope.spawn(|| {
                for _ in 0..20_000 {
                    drop(File::open(&path).unwrap());
                }
            });
            while !opener.is_finished() || granted == 0 {
                match probe_write_lease(&file) {
                    Ok(()) => granted += 1,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::WouldBlock);
                        refused += 1;
                    }
                }
            }
        });
        assert!(granted > 0 && refused > 0, "{granted} granted, {refused} refused");
    }

    #[test]
    fn cloning_into_something_that_cannot_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let null = File::options().write(true).open("/dev/null").unwrap();
        clone_range(&file, 0, &null, 0, 4096).unwrap_err();
    }
}
