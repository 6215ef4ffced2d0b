//! The conformance suite notices storage that is wrong: one mistake at a time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "test code"
)]

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use vhdkit::storage::{MemoryStorage, Storage, StorageIdentity};
use vhdkit_testkit::storage_suite;

/// One way in which storage can be wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Nothing,
    DataIsAHole,
    DataPastTheEnd,
    ZeroesOneByteLess,
    ZeroesOneByteMore,
    ZeroDoesNotGrow,
    PunchesNothing,
    PunchGrows,
    ReadsPastTheEnd,
    OtherErrorAtTheEnd,
    WritesOneByteLess,
    KeepsWhatWasCutOff,
    GrowthIsNotZero,
    AllocateShrinks,
    CopiesTooMuchByItsWord,
    ClonesNothing,
    OneIdentity,
    PanicsFarOut,
    ZeroCutsOffOthers,
}

/// Storage in memory with one mistake.
#[derive(Debug)]
struct Mistaken {
    inner: MemoryStorage,
    wrong: Wrong,
}

impl Mistaken {
    /// Cuts, but leaves what was cut off to be found when the storage grows again.
    fn cut_badly(&self, len: u64, new: u64) -> io::Result<()> {
        self.inner.set_len(new)?;
        if new > len {
            self.inner.write_at(&[9], new - 1)?;
        }
        Ok(())
    }
}

impl Storage for Mistaken {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self.inner.read_at(buf, offset) {
            Err(_) if self.wrong == Wrong::ReadsPastTheEnd => Ok(()),
            Err(_) if self.wrong == Wrong::OtherErrorAtTheEnd => Err(io::ErrorKind::InvalidInput.into()),
            Err(_) if self.wrong == Wrong::PanicsFarOut && offset == u64::MAX => panic!("overflow"),
            other => other,
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let less = usize::from(self.wrong == Wrong::WritesOneByteLess && buf.len() > 70_000);
        self.inner.write_at(&buf[..buf.len() - less], offset)
    }

    fn set_len(&self, new: u64) -> io::Result<()> {
        let len = self.inner.len()?;
        match self.wrong {
            Wrong::GrowthIsNotZero => self.cut_badly(len, new),
            Wrong::KeepsWhatWasCutOff if new == 300_000 && len > 0 => self.cut_badly(len, new),
            _ => self.inner.set_len(new),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        let len = self.inner.len()?;
        match self.wrong {
            Wrong::ZeroesOneByteLess if range.end > range.start + 1 => {
                self.inner.set_len(len.max(range.end))?;
                self.inner.zero_range(range.start..range.end - 1)
            }
            Wrong::ZeroesOneByteMore if range.end < len && !range.is_empty() => {
                self.inner.zero_range(range.start..range.end + 1)
            }
            Wrong::ZeroDoesNotGrow => self.inner.zero_range(range.start..range.end.min(len)),
            Wrong::ZeroCutsOffOthers if range.end > len => {
                std::thread::sleep(std::time::Duration::from_millis(1));
                self.inner.set_len(range.end)
            }
            _ => self.inner.zero_range(range),
        }
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<bool> {
        match self.wrong {
            Wrong::PunchesNothing => Ok(true),
            Wrong::PunchGrows if range.end < 1 << 40 => self.inner.zero_range(range).map(|()| true),
            _ => self.inner.punch_hole(range),
        }
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<bool> {
        match self.wrong {
            Wrong::AllocateShrinks if !range.is_empty() && range.end < 1 << 40 => {
                self.inner.set_len(range.end).map(|()| true)
            }
            _ => self.inner.allocate(range),
        }
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        match self.wrong {
            Wrong::DataIsAHole => Ok(self.inner.next_data(range)?.and_then(|data| {
                let less = data.start..data.end - 1;
                (!less.is_empty()).then_some(less)
            })),
            Wrong::DataPastTheEnd => Ok((!range.is_empty()).then_some(range)),
            _ => self.inner.next_data(range),
        }
    }

    fn clone_range(&self, _: &dyn Storage, _: u64, _: u64, length: u64) -> io::Result<bool> {
        Ok(self.wrong == Wrong::ClonesNothing && length > 0)
    }

    fn copy_range(&self, _: &dyn Storage, _: u64, _: u64, length: u64) -> io::Result<u64> {
        Ok(if self.wrong == Wrong::CopiesTooMuchByItsWord { length } else { 0 })
    }

    fn identity(&self) -> Option<StorageIdentity> {
        match self.wrong {
            Wrong::OneIdentity => Some(StorageIdentity { device: 1, inode: 1 }),
            _ => self.inner.identity(),
        }
    }
}

fn run(wrong: Wrong) {
    storage_suite::run(|| Arc::new(Mistaken { inner: MemoryStorage::new(), wrong }));
}

#[test]
fn without_a_mistake_the_suite_passes() {
    run(Wrong::Nothing);
}

#[test]
fn every_mistake_is_noticed() {
    for wrong in [
        Wrong::DataIsAHole,
        Wrong::DataPastTheEnd,
        Wrong::ZeroesOneByteLess,
        Wrong::ZeroesOneByteMore,
        Wrong::ZeroDoesNotGrow,
        Wrong::PunchesNothing,
        Wrong::PunchGrows,
        Wrong::ReadsPastTheEnd,
        Wrong::OtherErrorAtTheEnd,
        Wrong::WritesOneByteLess,
        Wrong::KeepsWhatWasCutOff,
        Wrong::GrowthIsNotZero,
        Wrong::AllocateShrinks,
        Wrong::CopiesTooMuchByItsWord,
        Wrong::ClonesNothing,
        Wrong::OneIdentity,
        Wrong::PanicsFarOut,
        Wrong::ZeroCutsOffOthers,
    ] {
        assert!(catch_unwind(AssertUnwindSafe(|| run(wrong))).is_err(), "the suite does not notice {wrong:?}");
    }
}
