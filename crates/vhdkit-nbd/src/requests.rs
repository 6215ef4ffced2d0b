//! Requests: what a client wants, and whether it may. Pure: no I/O.

use std::ops::Range;

use zerocopy::FromBytes as _;

use crate::export::REQUEST_BYTES_MAX;
use crate::handshake::{ALLOCATION_ID, Contexts, DEPTH_ID, Mode};
use crate::wire::{
    COMPACT_REQUEST_BYTES, CompactRequest, EXTENDED_REQUEST_BYTES, EXTENDED_REQUEST_MAGIC, Errno, ExtendedRequest,
    REQUEST_MAGIC, Reader, command, command_flag,
};

/// A payload that is not wanted is read and thrown away up to this length; who sends more is cut off.
const SKIP_BYTES_MAX: u64 = u32::MAX as u64;
/// The longest payload of a block status request: a length and both contexts.
pub(crate) const STATUS_PAYLOAD_BYTES_MAX: u64 = 16;

/// A request's header, compact or extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// How many bytes a header has.
pub(crate) const fn header_bytes(mode: Mode) -> usize {
    match mode {
        Mode::Extended => EXTENDED_REQUEST_BYTES,
        _ => COMPACT_REQUEST_BYTES,
    }
}

/// The header at the front of some bytes; `None` when it has the wrong magic number or there are too few.
#[inline]
pub(crate) fn decode(mode: Mode, bytes: &[u8]) -> Option<Header> {
    if mode == Mode::Extended {
        let (raw, _) = ExtendedRequest::read_from_prefix(bytes).ok()?;
        (raw.magic.get() == EXTENDED_REQUEST_MAGIC).then(|| Header {
            flags: raw.flags.get(),
            command: raw.command.get(),
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
        })
    } else {
        let (raw, _) = CompactRequest::read_from_prefix(bytes).ok()?;
        (raw.magic.get() == REQUEST_MAGIC).then(|| Header {
            flags: raw.flags.get(),
            command: raw.command.get(),
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            length: raw.length.get().into(),
        })
    }
}

/// Something to do, checked: ranges lie on the disk, lengths are within bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read {
        offset: u64,
        length: u32,
        whole: bool,
    },
    Write {
        offset: u64,
        length: u32,
        through: bool,
    },
    Flush,
    Trim {
        start: u64,
        end: u64,
        through: bool,
    },
    WriteZeroes {
        start: u64,
        end: u64,
        through: bool,
        no_hole: bool,
        fast: bool,
    },
    Cache {
        start: u64,
        end: u64,
    },
    BlockStatus {
        start: u64,
        end: u64,
        only_one: bool,
        contexts: Contexts,
    },
    /// A block status request whose payload, of so many bytes, narrows it.
    NarrowedStatus {
        offset: u64,
        only_one: bool,
        payload: u32,
    },
    Disconnect,
}

/// What to do about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Run(Command),
    /// Say so, after so many bytes of payload were thrown away.
    Refuse(Errno, u64),
    /// Where the next request begins cannot be told, or too far away.
    Close(&'static str),
}

/// What requests are judged by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judge {
    pub(crate) mode: Mode,
    pub(crate) contexts: Contexts,
    pub(crate) size: u64,
    pub(crate) writable: bool,
}

impl Judge {
    #[inline]
    pub(crate) fn judge(&self, header: &Header) -> Verdict {
        let payload = self.payload(header);
        if payload > SKIP_BYTES_MAX {
            return Verdict::Close("a request has a payload without end");
        }
        match self.command(header) {
            Ok(command) => Verdict::Run(command),
            Err(error) => Verdict::Refuse(error, payload),
        }
    }

    /// How many bytes follow the header.
    fn payload(&self, header: &Header) -> u64 {
        let says_so = header.flags & command_flag::PAYLOAD_LENGTH != 0;
        match (self.mode, header.command) {
            // QEMU (10.0 as well) does not say that its writes have a payload, as the protocol wants it with extended
            // headers; they have one all the same.
            (_, command::WRITE) => header.length,
            (Mode::Extended, _) if says_so => header.length,
            _ => 0,
        }
    }

    fn command(&self, header: &Header) -> Result<Command, Errno> {
        use command_flag as flag;
        let allowed = match header.command {
            command::READ if self.mode != Mode::Simple => flag::FUA | flag::DONT_FRAGMENT,
            command::WRITE if self.mode == Mode::Extended => flag::FUA | flag::PAYLOAD_LENGTH,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS if self.mode == Mode::Extended && self.contexts.any() => {
                flag::FUA | flag::REQ_ONE | flag::PAYLOAD_LENGTH
            }
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            _ => flag::FUA,
        };
        if header.flags & !allowed != 0 {
            return Err(Errno::Invalid);
        }
        let has = |bit| header.flags & bit != 0;
        let through = has(flag::FUA);
        let offset = header.offset;
        match header.command {
            command::READ => {
                let length = self.payload_length(header)?;
                self.range(header, Errno::Invalid)?;
                Ok(Command::Read { offset, length, whole: has(flag::DONT_FRAGMENT) })
            }
            command::WRITE => {
                self.may_write()?;
                let length = self.payload_length(header)?;
                self.range(header, Errno::NoSpace)?;
                Ok(Command::Write { offset, length, through })
            }
            command::DISCONNECT => Ok(Command::Disconnect),
            command::FLUSH => Ok(Command::Flush),
            command::TRIM => {
                self.may_write()?;
                let Range { start, end } = self.range(header, Errno::Invalid)?;
                Ok(Command::Trim { start, end, through })
            }
            command::CACHE => {
                let Range { start, end } = self.range(header, Errno::Invalid)?;
                Ok(Command::Cache { start, end })
            }
            command::WRITE_ZEROES => {
                self.may_write()?;
                let Range { start, end } = self.range(header, Errno::NoSpace)?;
                let (no_hole, fast) = (has(flag::NO_HOLE), has(flag::FAST_ZERO));
                Ok(Command::WriteZeroes { start, end, through, no_hole, fast })
            }
            command::BLOCK_STATUS => self.block_status(header, has(flag::REQ_ONE), has(flag::PAYLOAD_LENGTH)),
            _ => Err(Errno::Invalid),
        }
    }

    fn block_status(&self, header: &Header, only_one: bool, narrowed: bool) -> Result<Command, Errno> {
        if !self.contexts.any() {
            return Err(Errno::Invalid);
        }
        if narrowed {
            let payload = u32::try_from(header.length).map_err(|_| Errno::Invalid)?;
            let fits = (12..=STATUS_PAYLOAD_BYTES_MAX).contains(&header.length) && header.length.is_multiple_of(4);
            return if fits {
                Ok(Command::NarrowedStatus { offset: header.offset, only_one, payload })
            } else {
                Err(Errno::Invalid)
            };
        }
        let Range { start, end } = self.range(header, Errno::Invalid)?;
        if start == end {
            return Err(Errno::Invalid);
        }
        Ok(Command::BlockStatus { start, end, only_one, contexts: self.contexts })
    }

    /// What a block status request and its payload ask for together.
    pub(crate) fn narrow(&self, offset: u64, only_one: bool, payload: &[u8]) -> Result<Command, Errno> {
        let mut reader = Reader(payload);
        let length = reader.u64().filter(|length| *length > 0).ok_or(Errno::Invalid)?;
        let mut contexts = Contexts::default();
        while !reader.is_empty() {
            let slot = match reader.u32() {
                Some(ALLOCATION_ID) if self.contexts.allocation => &mut contexts.allocation,
                Some(DEPTH_ID) if self.contexts.depth => &mut contexts.depth,
                _ => return Err(Errno::Invalid),
            };
            if std::mem::replace(slot, true) {
                return Err(Errno::Invalid); // twice the same
            }
        }
        let end = offset.checked_add(length).filter(|end| *end <= self.size).ok_or(Errno::Invalid)?;
        Ok(Command::BlockStatus { start: offset, end, only_one, contexts })
    }

    fn may_write(&self) -> Result<(), Errno> {
        if self.writable { Ok(()) } else { Err(Errno::NotPermitted) }
    }

    fn payload_length(&self, header: &Header) -> Result<u32, Errno> {
        let length = u32::try_from(header.length).ok().filter(|length| *length <= REQUEST_BYTES_MAX);
        let whole = header.flags & command_flag::DONT_FRAGMENT != 0;
        length.ok_or(if whole { Errno::Overflow } else { Errno::Invalid })
    }

    fn range(&self, header: &Header, outside: Errno) -> Result<Range<u64>, Errno> {
        let end = header.offset.checked_add(header.length).filter(|end| *end <= self.size);
        end.map(|end| header.offset..end).ok_or(outside)
    }
}

/// For fuzzing: judges one header and holds the judgement to what it promises.
pub fn fuzz(bytes: &[u8], mode: u8, contexts: u8, size: u64, writable: bool) {
    let mode = match mode % 3 {
        0 => Mode::Simple,
        1 => Mode::Structured,
        _ => Mode::Extended,
    };
    let contexts = Contexts { allocation: contexts & 1 != 0, depth: contexts & 2 != 0 };
    let judge = Judge { mode, contexts, size, writable };
    let Some(header) = decode(mode, bytes) else { return };
    let lies_on_disk = |start: u64, end: u64| assert!(start <= end && end <= size);
    match judge.judge(&header) {
        Verdict::Run(Command::Read { offset, length, .. }) => lies_on_disk(offset, offset + u64::from(length)),
        Verdict::Run(Command::Write { offset, length, .. }) => {
            assert!(writable && length <= REQUEST_BYTES_MAX);
            lies_on_disk(offset, offset + u64::from(length));
        }
        Verdict::Run(Command::Trim { start, end, .. } | Command::WriteZeroes { start, end, .. }) => {
            assert!(writable);
            lies_on_disk(start, end);
        }
        Verdict::Run(Command::Cache { start, end } | Command::BlockStatus { start, end, .. }) => {
            lies_on_disk(start, end);
        }
        Verdict::Run(Command::NarrowedStatus { offset, only_one, .. }) => {
            let payload = bytes.get(header_bytes(mode)..).unwrap_or_default();
            if let Ok(Command::BlockStatus { start, end, contexts: some, .. }) = judge.narrow(offset, only_one, payload)
            {
                lies_on_disk(start, end);
                assert!((contexts.allocation || !some.allocation) && (contexts.depth || !some.depth));
            }
        }
        Verdict::Refuse(_, skip) => assert!(skip <= SKIP_BYTES_MAX),
        Verdict::Run(Command::Flush | Command::Disconnect) | Verdict::Close(_) => {}
    }
}
