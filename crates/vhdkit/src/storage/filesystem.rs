//! What a file lies on, as far as that decides how much locks are worth.

use std::fmt;
use std::fs::File;
use std::io;

/// What a file lies on: the file systems behind which another system may use the same file, by name, and the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileSystem {
    /// 9p: a directory of the host of a virtual machine, also Windows' drives under WSL 2.
    Plan9,
    /// The file systems of WSL 1: all of them are directories of Windows.
    Wsl,
    /// A Windows share: CIFS, SMB 2 or 3.
    Smb,
    /// A share of another server.
    Nfs,
    /// Anything behind a program: virtiofs (also Windows' drives under WSL 2), sshfs, ntfs-3g and many more.
    Fuse,
    /// A shared folder of VirtualBox, VMware or Parallels.
    SharedFolder,
    /// Any other, by the number that the system has for it.
    Other(u64),
}

impl FileSystem {
    /// What an open file lies on.
    ///
    /// # Errors
    /// The operating system's.
    pub fn of(file: &File) -> io::Result<Self> {
        // The width of the number, and whether it has a sign, differ per target; it is 32 bits everywhere.
        Ok(Self::from_number(rustix::fs::fstatfs(file)?.f_type as u64 & 0xffff_ffff))
    }

    /// By the number in the answer of statfs.
    const fn from_number(number: u64) -> Self {
        match number {
            0x0102_1997 => Self::Plan9,
            0x5346_4846 => Self::Wsl,
            0xff53_4d42 | 0xfe53_4d42 | 0x517b => Self::Smb,
            0x6969 => Self::Nfs,
            0x6573_5546 => Self::Fuse,
            0x786f_4256 | 0xbacb_acbc | 0x7c7c_6673 => Self::SharedFolder,
            other => Self::Other(other),
        }
    }

    /// Whether it keeps everything in memory (tmpfs, ramfs): nothing there ever waits for a medium.
    #[must_use]
    pub const fn is_in_memory(self) -> bool {
        matches!(self, Self::Other(0x0102_1994 | 0x8584_58f6))
    }

    /// Whether another system, Windows above all, may use the same file under locks that are not seen here.
    #[must_use]
    pub const fn hides_locks_of_others(self) -> bool {
        !matches!(self, Self::Other(_))
    }
}

/// For messages: `it lies on {}`.
impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plan9 => "a directory of the host or of Windows (9p)",
            Self::Wsl => "a directory of Windows (WSL 1)",
            Self::Smb => "a Windows share (SMB)",
            Self::Nfs => "a network share (NFS)",
            Self::Fuse => "a file system behind a program (FUSE)",
            Self::SharedFolder => "a shared folder of the host",
            Self::Other(number) => return write!(f, "a file system of type {number:#x}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_may_lock_is_known_by_its_number() {
        for (number, words) in [
            (0x0102_1997, "9p"),
            (0x5346_4846, "WSL"),
            (0xff53_4d42, "SMB"),
            (0xfe53_4d42, "SMB"),
            (0x6969, "NFS"),
            (0x6573_5546, "FUSE"),
            (0x786f_4256, "host"),
        ] {
            let found = FileSystem::from_number(number);
            assert!(found.hides_locks_of_others() && found.to_string().contains(words), "{number:#x}: {found}");
        }
        let ext4 = FileSystem::from_number(0xef53);
        assert_eq!((ext4, ext4.hides_locks_of_others()), (FileSystem::Other(0xef53), false));
        assert_eq!(ext4.to_string(), "a file system of type 0xef53");
    }

    #[test]
    fn the_number_of_a_file_is_what_the_system_says() {
        let tmpfs = tempfile::tempfile_in("/dev/shm").unwrap();
        assert_eq!(FileSystem::of(&tmpfs).unwrap(), FileSystem::Other(0x0102_1994));
    }
}
