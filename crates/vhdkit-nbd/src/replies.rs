//! Replies as bytes, in the form that was agreed upon. Pure: no I/O.

use zerocopy::IntoBytes as _;
use zerocopy::big_endian::{U16, U32, U64};

use crate::handshake::Mode;
use crate::wire::{
    EXTENDED_REPLY_MAGIC, Errno, ExtendedReply, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply,
    StructuredReply, chunk,
};

/// The longest head of a chunk of data: header and offset.
pub(crate) const HEAD_BYTES_MAX: usize = 40;

/// Where replies are put together.
pub(crate) trait Sink {
    /// Adds some bytes.
    fn put(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Which request a reply belongs to, and how replies look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct To {
    pub(crate) mode: Mode,
    pub(crate) cookie: u64,
    /// The offset of the request, which extended replies repeat.
    pub(crate) offset: u64,
}

impl To {
    /// How many bytes go before data.
    pub(crate) const fn data_head_bytes(self) -> usize {
        match self.mode {
            Mode::Simple => 16,
            Mode::Structured => 28,
            Mode::Extended => 40,
        }
    }

    /// What goes before `length` bytes of data from an offset of the disk.
    #[inline]
    pub(crate) fn data_head(self, offset: u64, length: u32, done: bool, sink: &mut impl Sink) {
        if self.mode == Mode::Simple {
            return self.simple(0, sink);
        }
        self.chunk_head(chunk::OFFSET_DATA, u64::from(length) + 8, done, sink);
        sink.put(U64::new(offset).as_bytes());
    }

    /// A range that reads as zero; not for simple replies.
    pub(crate) fn hole(self, offset: u64, length: u32, done: bool, sink: &mut impl Sink) {
        self.chunk_head(chunk::OFFSET_HOLE, 12, done, sink);
        sink.put(U64::new(offset).as_bytes());
        sink.put(U32::new(length).as_bytes());
    }

    /// All went well, and there is nothing (more) to say.
    #[inline]
    pub(crate) fn ok(self, sink: &mut impl Sink) {
        match self.mode {
            Mode::Extended => self.chunk_head(chunk::NONE, 0, true, sink),
            _ => self.simple(0, sink),
        }
    }

    /// A read of nothing, or the end of one.
    pub(crate) fn end_of_read(self, sink: &mut impl Sink) {
        match self.mode {
            Mode::Simple => self.simple(0, sink),
            _ => self.chunk_head(chunk::NONE, 0, true, sink),
        }
    }

    /// It failed.
    pub(crate) fn error(self, error: Errno, sink: &mut impl Sink) {
        if self.mode == Mode::Simple {
            return self.simple(error.number(), sink);
        }
        let message = error.message().as_bytes();
        self.chunk_head(chunk::ERROR, 6 + message.len() as u64, true, sink);
        sink.put(U32::new(error.number()).as_bytes());
        sink.put(U16::new(u16::try_from(message.len()).unwrap_or_default()).as_bytes());
        sink.put(message);
    }

    /// What a metadata context says: lengths and flags.
    pub(crate) fn block_status(self, context: u32, extents: &[(u64, u32)], done: bool, sink: &mut impl Sink) {
        let count = extents.len() as u64;
        if self.mode == Mode::Extended {
            self.chunk_head(chunk::BLOCK_STATUS_EXTENDED, 8 + count * 16, done, sink);
            sink.put(U32::new(context).as_bytes());
            sink.put(U32::new(u32::try_from(count).unwrap_or_default()).as_bytes());
            for (length, flags) in extents {
                sink.put(U64::new(*length).as_bytes());
                sink.put(U64::new(u64::from(*flags)).as_bytes());
            }
        } else {
            self.chunk_head(chunk::BLOCK_STATUS, 4 + count * 8, done, sink);
            sink.put(U32::new(context).as_bytes());
            for (length, flags) in extents {
                // Such requests have lengths of 32 bits, and no extent is longer than its request.
                sink.put(U32::new(u32::try_from(*length).unwrap_or(u32::MAX)).as_bytes());
                sink.put(U32::new(*flags).as_bytes());
            }
        }
    }

    #[inline]
    fn simple(self, error: u32, sink: &mut impl Sink) {
        let reply = SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: self.cookie.into() };
        sink.put(reply.as_bytes());
    }

    #[inline]
    fn chunk_head(self, kind: u16, length: u64, done: bool, sink: &mut impl Sink) {
        let flags = if done { chunk::DONE } else { 0 };
        if self.mode == Mode::Extended {
            let head = ExtendedReply {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: kind.into(),
                cookie: self.cookie.into(),
                offset: self.offset.into(),
                length: length.into(),
            };
            sink.put(head.as_bytes());
        } else {
            let head = StructuredReply {
                magic: STRUCTURED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: kind.into(),
                cookie: self.cookie.into(),
                length: u32::try_from(length).unwrap_or(u32::MAX).into(), // reads and extents are bounded
            };
            sink.put(head.as_bytes());
        }
    }
}

/// The error of the protocol for one of the library.
pub(crate) fn errno_of(error: &vhdkit::Error, writing: bool) -> Errno {
    use std::io::ErrorKind as Io;
    use vhdkit::ErrorKind;
    match error.kind() {
        ErrorKind::ReadOnly => Errno::NotPermitted,
        ErrorKind::OutOfRange if writing => Errno::NoSpace,
        ErrorKind::OutOfRange | ErrorKind::InvalidArgument => Errno::Invalid,
        ErrorKind::Limit => Errno::NoMemory,
        _ => match error.io_error().map(std::io::Error::kind) {
            Some(Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge) => Errno::NoSpace,
            Some(Io::OutOfMemory) => Errno::NoMemory,
            _ => Errno::Io,
        },
    }
}
