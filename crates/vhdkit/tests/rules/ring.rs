//! Dirty images made by hand. Every entry writes a byte over a page of block 0, so that the disk tells which entries
//! were replayed.

use vhdkit::error::ErrorKind;
use vhdkit::format::finding::Code;
use vhdkit_testkit::log::{DescriptorSpec, LogEntrySpec, LogRing, Placed};
use vhdkit_testkit::{BuiltImage, Guid, ImageBuilder};

use crate::table::{ERROR, Expect, Made, NOTE, Refuses, WARNING, dynamic};

pub(crate) const PAGE: u64 = 4096;

/// The identity of the log in use.
pub(crate) fn guid() -> Guid {
    Guid::seeded(0x10C)
}

/// An image whose log is being written.
pub(crate) struct Ring {
    pub image: BuiltImage,
    pub ring: LogRing,
}

impl Ring {
    /// A log in use that holds nothing yet.
    pub(crate) fn new() -> Self {
        Self::of(dynamic())
    }

    /// The log of this image.
    pub(crate) fn of(builder: ImageBuilder) -> Self {
        Self::clean(builder.both_headers(|header| header.log_guid = guid()))
    }

    /// The log of this image, whose headers stay as they are.
    pub(crate) fn clean(builder: ImageBuilder) -> Self {
        let image = builder.build();
        let ring = LogRing::new(image.layout.log, image.layout.log_length);
        Self { image, ring }
    }

    /// Where a page of block 0 lies in the file.
    pub(crate) fn home(&self, page: u64) -> u64 {
        self.image.layout.payload_block(0) + page * PAGE
    }

    /// An entry without descriptors, alone in its sequence.
    pub(crate) fn empty(&self, sequence: u64) -> LogEntrySpec {
        LogEntrySpec::new(guid(), sequence, self.image.file.len())
    }

    /// A descriptor that writes `byte` over a page of block 0.
    pub(crate) fn page(&self, page: u64, byte: u8) -> DescriptorSpec {
        DescriptorSpec::data(self.home(page), &[byte; 4096])
    }

    /// An entry, alone in its sequence, that writes `byte` over a page of block 0.
    pub(crate) fn entry(&self, sequence: u64, page: u64, byte: u8) -> LogEntrySpec {
        self.empty(sequence).descriptor(self.page(page, byte))
    }

    pub(crate) fn put(&mut self, entry: &LogEntrySpec) -> Placed {
        self.ring.place(&mut self.image.file, entry)
    }

    /// An entry puts `byte` over a page of block 0, and it is replayed.
    pub(crate) fn replayed(&mut self, sequence: u64, page: u64, byte: u8) -> Placed {
        self.sees(page, byte);
        let entry = self.entry(sequence, page, byte);
        self.put(&entry)
    }

    /// The guest sees `byte` on a page of block 0.
    pub(crate) fn sees(&mut self, page: u64, byte: u8) {
        self.image.model.write(page * PAGE, &[byte; 4096]);
    }

    pub(crate) fn done(self) -> Made {
        Made::new(self.image)
    }
}

/// An image whose log this closure writes.
pub(crate) fn made(write: impl FnOnce(&mut Ring)) -> Made {
    let mut ring = Ring::new();
    write(&mut ring);
    ring.done()
}

/// Replayed as [`crate::table::replayed`], with a warning before it.
pub(crate) fn replayed_with_warning(code: Code) -> Expect {
    let stop = Refuses(ErrorKind::NeedsReplay, Some(Code::LogNeedsReplay));
    let expect = Expect::graded(ErrorKind::Corrupt, code, [NOTE, WARNING, ERROR]).with(|[lenient, normal, strict]| {
        lenient.write = stop;
        normal.write = stop;
        (strict.read, strict.write, strict.check) = (stop, stop, stop);
    });
    expect.also(&[Code::LogNeedsReplay, code])
}
