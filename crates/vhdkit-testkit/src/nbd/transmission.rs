//! The phase after the handshake: commands out, replies in, as many at once as one likes.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use super::fault::{Fault, Fields, rule};
use super::handshake::{Context, ExportInfo, expect_closed};
use super::reply::{Chunk, Message, Reply, ServerError, parse_chunk};
use super::request::Request;
use super::wire::{self, Header, Mode, code};

/// Most bytes of payload that this client takes from one message.
const MESSAGE_BYTES_MAX: u64 = 80 << 20;

/// A request that waits for its reply, and what came of it already.
#[derive(Debug)]
struct Pending {
    request: Request,
    messages: Vec<Message>,
}

/// A connection to a chosen export.
#[derive(Debug)]
pub struct Transmission<S> {
    stream: S,
    mode: Mode,
    export: ExportInfo,
    contexts: Vec<Context>,
    next_cookie: u64,
    pending: BTreeMap<u64, Pending>,
    finished: Vec<Reply>,
}

impl<S: Read + Write> Transmission<S> {
    pub(super) fn new(stream: S, mode: Mode, export: ExportInfo, contexts: Vec<Context>) -> Self {
        // Cookies that are not small and not in a row catch servers that make up their own.
        let next_cookie = 0xC001_0000_0000_0001;
        Self { stream, mode, export, contexts, next_cookie, pending: BTreeMap::new(), finished: Vec::new() }
    }

    /// What the handshake told about the export.
    #[must_use]
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// What headers were agreed on.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The number of a context by its name.
    #[must_use]
    pub fn context(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|context| context.name == name).map(|context| context.id)
    }

    /// The connection.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// How many requests wait for their replies.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Sends any bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.stream.write_all(bytes)?;
        Ok(self.stream.flush()?)
    }

    /// Sends any header, in the form that the mode wants, and waits for nothing.
    pub fn send_header(&mut self, header: &Header) -> Result<(), Fault> {
        let bytes = if self.mode == Mode::Extended { header.extended() } else { header.compact() };
        self.send_bytes(&bytes)
    }

    /// Sends a request without waiting, and gives its cookie.
    pub fn send(&mut self, request: Request) -> Result<u64, Fault> {
        let cookie = self.expect(request.clone());
        self.send_bytes(&request.bytes(self.mode, cookie))?;
        Ok(cookie)
    }

    /// Expects a reply to a request that goes, or went, to the server in some other way.
    pub fn expect(&mut self, request: Request) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie = cookie.wrapping_mul(5).wrapping_add(7);
        self.pending.insert(cookie, Pending { request, messages: Vec::new() });
        cookie
    }

    /// Receives one message, whatever it answers.
    pub fn receive_message(&mut self) -> Result<Message, Fault> {
        let mut magic = [0; 4];
        self.stream.read_exact(&mut magic)?;
        match u32::from_be_bytes(magic) {
            wire::SIMPLE_REPLY_MAGIC => self.receive_simple(),
            wire::STRUCTURED_REPLY_MAGIC => self.receive_chunk(Mode::Structured),
            wire::EXTENDED_REPLY_MAGIC => self.receive_chunk(Mode::Extended),
            magic => Err(Fault::Broken(format!("message with magic {magic:#x}"))),
        }
    }

    fn receive_simple(&mut self) -> Result<Message, Fault> {
        let header = self.receive_bytes(12)?;
        let mut fields = Fields::new(&header, "simple reply");
        let (error, cookie) = (fields.u32()?, fields.u64()?);
        let request = self.pending.get(&cookie).map(|pending| pending.request.clone());
        let chunk = match request {
            _ if error != 0 => {
                rule(code::ALL.contains(&error), || format!("error code {error} in a simple reply"))?;
                Chunk::Error(ServerError { code: error, message: String::new(), offset: None })
            }
            Some(request) if request.command == wire::command::READ && self.mode == Mode::Simple => {
                Chunk::Data { offset: request.offset, bytes: self.receive_bytes(request.length)? }
            }
            _ => Chunk::None,
        };
        Ok(Message { mode: Mode::Simple, cookie, flags: wire::CHUNK_FLAG_DONE, offset: None, chunk })
    }

    fn receive_chunk(&mut self, mode: Mode) -> Result<Message, Fault> {
        let extended = mode == Mode::Extended;
        let header = self.receive_bytes(if extended { 28 } else { 16 })?;
        let mut fields = Fields::new(&header, "header of a chunk");
        let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        let offset = if extended { Some(fields.u64()?) } else { None };
        let length = if extended { fields.u64()? } else { u64::from(fields.u32()?) };
        let payload = self.receive_bytes(length)?;
        let chunk = parse_chunk(kind, &payload)?;
        let message = Message { mode, cookie, flags, offset, chunk };
        let done = message.chunk != Chunk::None || message.is_done();
        rule(done, || format!("an empty chunk that is not the last one: {message:?}"))?;
        Ok(message)
    }

    fn receive_bytes(&mut self, length: u64) -> Result<Vec<u8>, Fault> {
        rule(length <= MESSAGE_BYTES_MAX, || format!("message of {length} bytes"))?;
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Receives until some reply is complete, and checks it.
    pub fn receive(&mut self) -> Result<Reply, Fault> {
        if !self.finished.is_empty() {
            return Ok(self.finished.remove(0));
        }
        loop {
            let message = self.receive_message()?;
            let (cookie, done) = (message.cookie, message.is_done());
            let pending = self.pending.get_mut(&cookie);
            let pending = pending.ok_or_else(|| Fault::Broken(format!("nobody waits for {message:?}")))?;
            pending.messages.push(message);
            if done && let Some(Pending { request, messages }) = self.pending.remove(&cookie) {
                let reply = Reply { cookie, request, messages };
                let contexts: Vec<u32> = self.contexts.iter().map(|context| context.id).collect();
                reply.check(self.mode, &contexts)?;
                return Ok(reply);
            }
        }
    }

    /// Receives the reply to one request; others that come first are kept for [`Self::receive`].
    pub fn receive_of(&mut self, cookie: u64) -> Result<Reply, Fault> {
        if let Some(index) = self.finished.iter().position(|reply| reply.cookie == cookie) {
            return Ok(self.finished.remove(index));
        }
        let mut others = std::mem::take(&mut self.finished);
        let found = loop {
            match self.receive() {
                Ok(reply) if reply.cookie != cookie => others.push(reply),
                other => break other,
            }
        };
        self.finished = others;
        found
    }

    /// Sends a request and receives its reply, with or without an error in it.
    pub fn call(&mut self, request: Request) -> Result<Reply, Fault> {
        let cookie = self.send(request)?;
        self.receive_of(cookie)
    }

    /// Sends a request that must succeed.
    pub fn succeed(&mut self, request: Request) -> Result<Reply, Fault> {
        self.call(request)?.successful()
    }

    /// The code with which a request fails; 0 if it does not.
    pub fn code(&mut self, request: Request) -> Result<u32, Fault> {
        Ok(self.call(request)?.code())
    }

    /// READ.
    pub fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, Fault> {
        Ok(self.succeed(Request::read(offset, length))?.data())
    }

    /// WRITE.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.succeed(Request::write(offset, bytes)).map(drop)
    }

    /// FLUSH.
    pub fn flush(&mut self) -> Result<(), Fault> {
        self.succeed(Request::flush()).map(drop)
    }

    /// DISC; the server must close without another word.
    pub fn disconnect(mut self) -> Result<(), Fault> {
        self.send_bytes(&Request::disconnect().bytes(self.mode, 0))?;
        expect_closed(&mut self.stream)
    }
}
