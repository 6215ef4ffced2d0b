//! What a server sends during transmission, and whether it may.
//!
//! ```text
//! Message   one header and its payload
//! Reply     all messages with one cookie, checked against the request
//! ```

use super::fault::{Fault, Fields, rule, text};
use super::request::Request;
use super::wire::{self, Mode, chunk_kind, code, command, command_flag};

/// An error that a server reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// One of the codes of the protocol.
    pub code: u32,
    /// Words for people; empty if there are none.
    pub message: String,
    /// Where, if the server said so.
    pub offset: Option<u64>,
}

/// One extent of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// What holds for them.
    pub flags: u64,
}

/// What a message carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing.
    None,
    /// Bytes at an offset.
    Data {
        /// Where on the disk.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Zeros at an offset.
    Hole {
        /// Where on the disk.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// Metadata of one context.
    Status {
        /// The number of the context.
        context: u32,
        /// Extents from the offset of the request on.
        extents: Vec<Extent>,
        /// Whether the extents came with 64 bits.
        extended: bool,
    },
    /// An error.
    Error(ServerError),
    /// An error of a kind that this client does not know.
    UnknownError {
        /// The kind.
        kind: u16,
        /// What it has in common with other errors.
        error: ServerError,
    },
}

/// One message of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What header it had.
    pub mode: Mode,
    /// The cookie of the request.
    pub cookie: u64,
    /// Flags of the chunk; a simple reply is always done.
    pub flags: u16,
    /// The offset that an extended header repeats.
    pub offset: Option<u64>,
    /// What it carries.
    pub chunk: Chunk,
}

impl Message {
    /// Whether no further message follows for the request.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.flags & wire::CHUNK_FLAG_DONE != 0
    }
}

/// Everything that answered one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The cookie.
    pub cookie: u64,
    /// The request.
    pub request: Request,
    /// The messages as they came.
    pub messages: Vec<Message>,
}

impl Reply {
    /// What the messages carry.
    pub fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.messages.iter().map(|message| &message.chunk)
    }

    /// The first error.
    #[must_use]
    pub fn error(&self) -> Option<&ServerError> {
        self.chunks().find_map(|chunk| match chunk {
            Chunk::Error(error) | Chunk::UnknownError { error, .. } => Some(error),
            _ => None,
        })
    }

    /// The code of the first error; 0 if there is none.
    #[must_use]
    pub fn code(&self) -> u32 {
        self.error().map_or(0, |error| error.code)
    }

    /// The reply, if it has no error.
    pub fn successful(self) -> Result<Self, Fault> {
        match self.error() {
            Some(error) => Err(Fault::Server(error.clone())),
            None => Ok(self),
        }
    }

    /// The bytes of a successful READ, from whatever pieces.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        let mut data = vec![0; self.request.length as usize];
        for chunk in self.chunks() {
            if let Chunk::Data { offset, bytes } = chunk {
                let start = (offset - self.request.offset) as usize;
                data[start..start + bytes.len()].copy_from_slice(bytes);
            }
        }
        data
    }

    /// Offsets and lengths of the holes, in the order of the disk.
    #[must_use]
    pub fn holes(&self) -> Vec<(u64, u64)> {
        let hole = |chunk: &Chunk| match chunk {
            Chunk::Hole { offset, length } => Some((*offset, *length)),
            _ => None,
        };
        let mut holes: Vec<_> = self.chunks().filter_map(hole).collect();
        holes.sort_unstable();
        holes
    }

    /// The extents of one context; nothing if the reply is silent about it.
    #[must_use]
    pub fn extents(&self, id: u32) -> Option<&[Extent]> {
        self.chunks().find_map(|chunk| match chunk {
            Chunk::Status { context, extents, .. } if *context == id => Some(extents.as_slice()),
            _ => None,
        })
    }

    /// Whether the messages keep to the rules for this request; `contexts` are the numbers that were agreed on.
    pub fn check(&self, mode: Mode, contexts: &[u32]) -> Result<(), Fault> {
        for message in &self.messages {
            self.check_header(mode, message)?;
        }
        let errors = self.error().is_some();
        match self.request.command {
            command::READ => self.check_read(mode, errors),
            command::BLOCK_STATUS => self.check_status(mode, contexts, errors),
            _ => rule(self.chunks().all(|chunk| matches!(chunk, Chunk::None | Chunk::Error(_))), || {
                format!("a reply without content is expected: {self:?}")
            }),
        }
    }

    fn check_header(&self, mode: Mode, message: &Message) -> Result<(), Fault> {
        let wrong = || format!("a message that does not fit the mode {mode:?} and the request: {message:?}");
        // A simple reply without payload is an answer to anything but READ, unless headers are extended.
        let simple = message.mode == Mode::Simple && mode == Mode::Structured && self.request.command != command::READ;
        rule(message.mode == mode || simple, wrong)?;
        rule(message.offset.is_none_or(|offset| offset == self.request.offset), wrong)?;
        rule(message.flags & !wire::CHUNK_FLAG_DONE == 0, wrong)?;
        if let Chunk::Error(ServerError { offset: Some(offset), .. }) = message.chunk {
            let within = offset.checked_sub(self.request.offset);
            rule(within.is_some_and(|within| within < self.request.effect_length()), wrong)?;
        }
        Ok(())
    }

    fn check_read(&self, mode: Mode, errors: bool) -> Result<(), Fault> {
        let broken = |what: &str| format!("{what}: {:?}", self.outline());
        let end = self.request.offset.saturating_add(self.request.length);
        let mut ranges = Vec::new();
        for chunk in self.chunks() {
            match chunk {
                Chunk::Data { offset, bytes } => ranges.push((*offset, offset + bytes.len() as u64)),
                Chunk::Hole { offset, length } => ranges.push((*offset, offset + length)),
                Chunk::Status { .. } => return Err(Fault::Broken(broken("metadata in a read"))),
                Chunk::None | Chunk::Error(_) | Chunk::UnknownError { .. } => {}
            }
        }
        let single = self.request.flags & command_flag::DF != 0;
        rule(!single || ranges.len() <= 1, || broken("an unfragmented read in pieces"))?;
        ranges.sort_unstable();
        let empty = mode != Mode::Simple && ranges.iter().any(|(start, end)| start == end);
        rule(!empty, || broken("a piece without bytes"))?;
        rule(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), || broken("pieces overlap"))?;
        let within = ranges.iter().all(|&(from, to)| from >= self.request.offset && to <= end);
        rule(within, || broken("a piece outside the request"))?;
        let sum: u64 = ranges.iter().map(|(from, to)| to - from).sum();
        rule(errors || sum == self.request.length, || broken("success without all bytes"))
    }

    fn check_status(&self, mode: Mode, contexts: &[u32], errors: bool) -> Result<(), Fault> {
        let broken = |what: &str| format!("{what}: {self:?}");
        let mut expected = self.request.contexts().unwrap_or_else(|| contexts.to_vec());
        let mut seen = Vec::new();
        for chunk in self.chunks() {
            match chunk {
                Chunk::Status { context, extents, extended } => {
                    rule(!extended || mode == Mode::Extended, || broken("64 bits that nobody asked for"))?;
                    rule(!seen.contains(context), || broken("a context twice"))?;
                    rule(expected.contains(context), || broken("a context that nobody asked for"))?;
                    seen.push(*context);
                    self.check_extents(extents)?;
                }
                Chunk::None | Chunk::Error(_) | Chunk::UnknownError { .. } => {}
                Chunk::Data { .. } | Chunk::Hole { .. } => return Err(Fault::Broken(broken("bytes as metadata"))),
            }
        }
        expected.sort_unstable();
        seen.sort_unstable();
        rule(errors || seen == expected, || broken("success without all contexts"))
    }

    fn check_extents(&self, extents: &[Extent]) -> Result<(), Fault> {
        let broken = |what: &str| format!("{what}: {extents:?} for {:?}", self.request);
        let length = self.request.effect_length();
        let Some((last, before)) = extents.split_last() else {
            return Err(Fault::Broken(broken("no extents")));
        };
        rule(extents.iter().all(|extent| extent.length > 0), || broken("an empty extent"))?;
        let sum = before.iter().fold(0_u64, |sum, extent| sum.saturating_add(extent.length));
        rule(before.is_empty() || sum < length, || broken("extents behind what was asked for"))?;
        let one = self.request.flags & command_flag::REQ_ONE != 0;
        rule(!one || (before.is_empty() && last.length <= length), || broken("more than one extent"))
    }

    /// The chunks without their bytes, to be shown.
    #[must_use]
    pub fn outline(&self) -> String {
        let chunks: Vec<String> = self
            .chunks()
            .map(|chunk| match chunk {
                Chunk::Data { offset, bytes } => format!("data {offset:#x}+{:#x}", bytes.len()),
                other => format!("{other:x?}"),
            })
            .collect();
        let Request { command, flags, offset, length, .. } = &self.request;
        format!("command {command} flags {flags:#x} {offset:#x}+{length:#x}: {}", chunks.join(", "))
    }
}

/// Takes a payload of a structured or extended reply apart.
pub(super) fn parse_chunk(kind: u16, payload: &[u8]) -> Result<Chunk, Fault> {
    let mut fields = Fields::new(payload, "chunk");
    let chunk = match kind {
        chunk_kind::NONE => Chunk::None,
        chunk_kind::OFFSET_DATA => Chunk::Data { offset: fields.u64()?, bytes: fields.rest().to_vec() },
        chunk_kind::OFFSET_HOLE => Chunk::Hole { offset: fields.u64()?, length: u64::from(fields.u32()?) },
        chunk_kind::BLOCK_STATUS => parse_status(&mut fields)?,
        chunk_kind::BLOCK_STATUS_EXT => parse_status_extended(&mut fields)?,
        chunk_kind::ERROR => Chunk::Error(parse_error(&mut fields)?),
        chunk_kind::ERROR_OFFSET => {
            let error = parse_error(&mut fields)?;
            Chunk::Error(ServerError { offset: Some(fields.u64()?), ..error })
        }
        kind if kind & chunk_kind::ERROR_BIT != 0 => {
            let error = parse_error(&mut fields)?;
            fields.rest();
            Chunk::UnknownError { kind, error }
        }
        kind => return Err(Fault::Broken(format!("chunk of kind {kind} with {} bytes", payload.len()))),
    };
    fields.end()?;
    Ok(chunk)
}

fn parse_error(fields: &mut Fields<'_>) -> Result<ServerError, Fault> {
    let (code, length) = (fields.u32()?, fields.u16()?);
    let message = text(fields.take(usize::from(length))?, "message of an error")?;
    rule(code::ALL.contains(&code), || format!("error code {code}: {message}"))?;
    Ok(ServerError { code, message, offset: None })
}

fn parse_status(fields: &mut Fields<'_>) -> Result<Chunk, Fault> {
    let context = fields.u32()?;
    let mut extents = Vec::new();
    while !fields.is_empty() {
        extents.push(Extent { length: u64::from(fields.u32()?), flags: u64::from(fields.u32()?) });
    }
    Ok(Chunk::Status { context, extents, extended: false })
}

fn parse_status_extended(fields: &mut Fields<'_>) -> Result<Chunk, Fault> {
    let (context, count) = (fields.u32()?, fields.u32()?);
    let mut extents = Vec::new();
    while !fields.is_empty() {
        extents.push(Extent { length: fields.u64()?, flags: fields.u64()? });
    }
    // Zero leaves the count to the length of the chunk.
    let counted = count == 0 || extents.len() as u64 == u64::from(count);
    rule(counted, || format!("{} extents where {count} are announced", extents.len()))?;
    Ok(Chunk::Status { context, extents, extended: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn structured(chunk: Chunk, flags: u16) -> Message {
        Message { mode: Mode::Structured, cookie: 1, flags, offset: None, chunk }
    }

    fn verdict(request: Request, chunks: Vec<Chunk>) -> Result<(), Fault> {
        let mut messages: Vec<_> = chunks.into_iter().map(|chunk| structured(chunk, 0)).collect();
        messages.push(structured(Chunk::None, 1));
        Reply { cookie: 1, request, messages }.check(Mode::Structured, &[3, 4])
    }

    fn data(offset: u64, count: usize) -> Chunk {
        Chunk::Data { offset, bytes: vec![1; count] }
    }

    #[test]
    fn reads_that_break_the_rules_are_told_from_good_ones() {
        let read = || Request::read(100, 10);
        verdict(read(), vec![data(105, 5), Chunk::Hole { offset: 100, length: 5 }]).unwrap();
        let unfragmented = read().with_flags(command_flag::DF);
        for (request, chunks) in [
            (read(), vec![data(100, 9)]),
            (read(), vec![data(100, 6), data(105, 5)]),
            (read(), vec![data(99, 10)]),
            (read(), vec![data(101, 10)]),
            (read(), vec![data(100, 10), data(110, 0)]),
            (unfragmented, vec![data(100, 5), data(105, 5)]),
            (read(), vec![Chunk::Status { context: 3, extents: vec![], extended: false }]),
        ] {
            assert!(matches!(verdict(request, chunks.clone()), Err(Fault::Broken(_))), "{chunks:?}");
        }
    }

    #[test]
    fn metadata_that_break_the_rules_are_told_from_good_ones() {
        let status = |context, lengths: &[u64]| {
            let extents = lengths.iter().map(|&length| Extent { length, flags: 0 }).collect();
            Chunk::Status { context, extents, extended: false }
        };
        let ask = || Request::block_status(0, 10);
        verdict(ask(), vec![status(4, &[9, 5]), status(3, &[1])]).unwrap();
        let one = || ask().with_flags(command_flag::REQ_ONE);
        for (request, chunks) in [
            (ask(), vec![status(3, &[10])]),
            (ask(), vec![status(3, &[10]), status(4, &[10]), status(5, &[1])]),
            (ask(), vec![status(3, &[10]), status(3, &[10]), status(4, &[1])]),
            (ask(), vec![status(3, &[10, 1]), status(4, &[10])]),
            (ask(), vec![status(3, &[0]), status(4, &[10])]),
            (ask(), vec![status(3, &[]), status(4, &[10])]),
            (one(), vec![status(3, &[11]), status(4, &[10])]),
            (one(), vec![status(3, &[5, 5]), status(4, &[10])]),
        ] {
            assert!(matches!(verdict(request, chunks.clone()), Err(Fault::Broken(_))), "{chunks:?}");
        }
    }

    #[test]
    fn errors_have_known_codes_and_places_within_the_request() {
        let error = |code: u32, offset: u64| {
            let payload = [code.to_be_bytes().as_slice(), b"\0\x02no", &offset.to_be_bytes()].concat();
            parse_chunk(chunk_kind::ERROR_OFFSET, &payload)
        };
        let chunk = error(5, 104).unwrap();
        let expected = ServerError { code: 5, message: "no".to_owned(), offset: Some(104) };
        assert_eq!(chunk, Chunk::Error(expected));
        verdict(Request::read(100, 10), vec![chunk]).unwrap();
        assert!(verdict(Request::read(100, 4), vec![error(5, 104).unwrap()]).is_err());
        assert!(error(6, 104).is_err());
    }

    #[test]
    fn counted_extents_must_be_there() {
        let chunk = |count: u8| {
            let mut payload = vec![0, 0, 0, 7, 0, 0, 0, count];
            payload.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
            parse_chunk(chunk_kind::BLOCK_STATUS_EXT, &payload)
        };
        let expected =
            Chunk::Status { context: 7, extents: vec![Extent { length: 1 << 32, flags: 3 }], extended: true };
        assert_eq!(chunk(1).unwrap(), expected);
        assert_eq!(chunk(0).unwrap(), expected);
        assert!(chunk(2).is_err());
    }
}
