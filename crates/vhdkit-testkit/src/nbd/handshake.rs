//! The handshake from the client's side: greeting, options, answers.
//!
//! ```text
//! Handshake::start --options--> go / export_name --> Transmission
//!                  \--starttls, then upgrade--> a Handshake over another stream
//! ```

use std::io::{self, Read, Write};

use super::fault::{Fault, Fields, rule, text};
use super::transmission::Transmission;
use super::wire::{self, Mode, client_flag, greeting_flag, info, option, reply};

/// Most bytes that an answer to an option may have before the client takes it for nonsense.
const OPTION_REPLY_BYTES_MAX: u32 = 1 << 20;

/// One answer to an option, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that the server says it answers.
    pub option: u32,
    /// The kind of answer.
    pub kind: u32,
    /// What came with it.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Whether it is an error.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.kind & reply::ERROR != 0
    }

    /// Whether no further answer follows.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.is_error() || self.kind == reply::ACK
    }
}

/// What INFO and GO tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes of the disk.
    pub size: u64,
    /// Flags of the export.
    pub flags: u16,
    /// The canonical name.
    pub name: Option<String>,
    /// A description for people.
    pub description: Option<String>,
    /// Least, preferred and largest block.
    pub block_sizes: Option<[u32; 3]>,
    /// Details that this client does not know.
    pub others: Vec<(u16, Vec<u8>)>,
}

impl ExportInfo {
    /// Whether all of these flags are set.
    #[must_use]
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

/// A metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// The number that stands for it in replies.
    pub id: u32,
    /// Its name.
    pub name: String,
}

/// A connection whose export is not chosen yet.
#[derive(Debug)]
pub struct Handshake<S> {
    stream: S,
    greeting_flags: u16,
    client_flags: u32,
    mode: Mode,
    contexts: Vec<Context>,
}

impl<S: Read + Write> Handshake<S> {
    /// Reads the greeting and answers with all flags that the server offers.
    pub fn start(stream: S) -> Result<Self, Fault> {
        let mut handshake = Self::greeted(stream)?;
        let offered = u32::from(handshake.greeting_flags);
        handshake.send_client_flags(offered & (client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES))?;
        Ok(handshake)
    }

    /// Reads the greeting and answers nothing.
    pub fn greeted(mut stream: S) -> Result<Self, Fault> {
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut fields = Fields::new(&greeting, "greeting");
        let (first, second, greeting_flags) = (fields.u64()?, fields.u64()?, fields.u16()?);
        let magics = first == wire::GREETING_MAGIC && second == wire::OPTION_MAGIC;
        rule(magics, || format!("greeting {first:#x} {second:#x}"))?;
        let known = greeting_flag::FIXED_NEWSTYLE | greeting_flag::NO_ZEROES;
        rule(greeting_flags & !known == 0, || format!("greeting flags {greeting_flags:#x}"))?;
        Ok(Self { stream, greeting_flags, client_flags: 0, mode: Mode::Simple, contexts: Vec::new() })
    }

    /// Sends any client flags.
    pub fn send_client_flags(&mut self, flags: u32) -> Result<(), Fault> {
        self.client_flags = flags;
        self.send_bytes(&flags.to_be_bytes())
    }

    /// The flags of the greeting.
    #[must_use]
    pub fn greeting_flags(&self) -> u16 {
        self.greeting_flags
    }

    /// What headers were agreed on so far.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The contexts that were agreed on last.
    #[must_use]
    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    /// The connection.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Gives the connection back.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Sends any bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.stream.write_all(bytes)?;
        Ok(self.stream.flush()?)
    }

    /// Sends an option and waits for nothing.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> Result<(), Fault> {
        self.send_bytes(&wire::option_bytes(option, data))
    }

    /// Receives one answer to an option.
    pub fn receive_reply(&mut self) -> Result<OptionReply, Fault> {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header)?;
        let mut fields = Fields::new(&header, "answer to an option");
        let (magic, option, kind, length) = (fields.u64()?, fields.u32()?, fields.u32()?, fields.u32()?);
        rule(magic == wire::OPTION_REPLY_MAGIC, || format!("answer to an option with magic {magic:#x}"))?;
        rule(length <= OPTION_REPLY_BYTES_MAX, || format!("answer to option {option} of {length} bytes"))?;
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(OptionReply { option, kind, data })
    }

    /// Receives all answers to one option; the last one is a success.
    pub fn receive_replies(&mut self, option: u32) -> Result<Vec<OptionReply>, Fault> {
        let mut replies = Vec::new();
        loop {
            let answer = self.receive_reply()?;
            rule(answer.option == option, || format!("answer to option {} instead of {option}", answer.option))?;
            if answer.is_error() {
                text(&answer.data, "message of a refusal")?;
                return Err(Fault::Refused(answer));
            }
            if answer.is_last() {
                rule(answer.data.is_empty(), || format!("acknowledgement with data {:?}", answer.data))?;
                return Ok(replies);
            }
            replies.push(answer);
        }
    }

    /// Sends an option and receives all that answers it, except the acknowledgement.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, Fault> {
        self.send_option(option, data)?;
        self.receive_replies(option)
    }

    /// An option that has no answer but yes or no.
    pub fn plain_option(&mut self, option: u32, data: &[u8]) -> Result<(), Fault> {
        let replies = self.option(option, data)?;
        rule(replies.is_empty(), || format!("answers to option {option}: {replies:?}"))
    }

    /// ABORT; the server must acknowledge and close.
    pub fn abort(mut self) -> Result<(), Fault> {
        self.plain_option(option::ABORT, b"")?;
        expect_closed(&mut self.stream)
    }

    /// LIST: names and descriptions of the exports.
    pub fn list(&mut self) -> Result<Vec<(String, String)>, Fault> {
        let replies = self.option(option::LIST, b"")?;
        replies.iter().map(export_of).collect()
    }

    /// STARTTLS; success has to be followed by [`Self::upgrade`].
    pub fn starttls(&mut self) -> Result<(), Fault> {
        self.plain_option(option::STARTTLS, b"")
    }

    /// Goes on over another stream made from this one; nothing that was agreed on stays.
    pub fn upgrade<T>(self, wrap: impl FnOnce(S) -> io::Result<T>) -> Result<Handshake<T>, Fault> {
        Ok(Handshake {
            stream: wrap(self.stream)?,
            greeting_flags: self.greeting_flags,
            client_flags: self.client_flags,
            mode: Mode::Simple,
            contexts: Vec::new(),
        })
    }

    /// STRUCTURED_REPLY.
    pub fn structured_reply(&mut self) -> Result<(), Fault> {
        self.plain_option(option::STRUCTURED_REPLY, b"")?;
        self.mode = self.mode.max(Mode::Structured);
        Ok(())
    }

    /// EXTENDED_HEADERS.
    pub fn extended_headers(&mut self) -> Result<(), Fault> {
        self.plain_option(option::EXTENDED_HEADERS, b"")?;
        self.mode = Mode::Extended;
        Ok(())
    }

    /// Whatever option the mode needs.
    pub fn agree_on(&mut self, mode: Mode) -> Result<(), Fault> {
        match mode {
            Mode::Simple => Ok(()),
            Mode::Structured => self.structured_reply(),
            Mode::Extended => self.extended_headers(),
        }
    }

    /// LIST_META_CONTEXT: the names.
    pub fn list_meta_context(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>, Fault> {
        let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
        let data = wire::meta_context_data(export.as_bytes(), &queries);
        let replies = self.option(option::LIST_META_CONTEXT, &data)?;
        replies.iter().map(|answer| context_of(answer).map(|context| context.name)).collect()
    }

    /// SET_META_CONTEXT: what was chosen, each with a number of its own.
    pub fn set_meta_context(&mut self, export: &str, queries: &[&str]) -> Result<Vec<Context>, Fault> {
        let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
        let data = wire::meta_context_data(export.as_bytes(), &queries);
        self.contexts.clear();
        let replies = self.option(option::SET_META_CONTEXT, &data)?;
        let contexts: Vec<Context> = replies.iter().map(context_of).collect::<Result<_, _>>()?;
        for (index, context) in contexts.iter().enumerate() {
            let twice = contexts.iter().take(index).any(|other| other.id == context.id || other.name == context.name);
            rule(!twice, || format!("contexts that are not different: {contexts:?}"))?;
        }
        self.contexts.clone_from(&contexts);
        Ok(contexts)
    }

    /// INFO.
    pub fn info(&mut self, export: &str, requests: &[u16]) -> Result<ExportInfo, Fault> {
        let replies = self.option(option::INFO, &wire::info_data(export.as_bytes(), requests))?;
        export_info(&replies)
    }

    /// GO; after success the handshake is over.
    pub fn go(mut self, export: &str, requests: &[u16]) -> Result<Transmission<S>, Fault> {
        let export_info = self.try_go(export, requests)?;
        Ok(self.into_transmission(export_info))
    }

    /// GO, where a refusal leaves the handshake as it was; after success only [`Self::into_transmission`] makes sense.
    pub fn try_go(&mut self, export: &str, requests: &[u16]) -> Result<ExportInfo, Fault> {
        let replies = self.option(option::GO, &wire::info_data(export.as_bytes(), requests))?;
        export_info(&replies)
    }

    /// EXPORT_NAME: what follows is transmission, or the end.
    pub fn export_name(mut self, export: &str) -> Result<Transmission<S>, Fault> {
        self.send_option(option::EXPORT_NAME, export.as_bytes())?;
        let mut answer = [0; 10];
        self.stream.read_exact(&mut answer)?;
        let mut fields = Fields::new(&answer, "answer to the export's name");
        let export_info = ExportInfo { size: fields.u64()?, flags: fields.u16()?, ..ExportInfo::default() };
        if self.client_flags & client_flag::NO_ZEROES == 0 {
            let mut zeros = [1; 124];
            self.stream.read_exact(&mut zeros)?;
            rule(zeros == [0; 124], || format!("zeros behind the export's flags: {zeros:?}"))?;
        }
        check_flags(&export_info)?;
        Ok(self.into_transmission(export_info))
    }

    /// Goes on as if an export had been chosen.
    pub fn into_transmission(self, export: ExportInfo) -> Transmission<S> {
        Transmission::new(self.stream, self.mode, export, self.contexts)
    }
}

/// The server must close the connection without sending anything more.
pub fn expect_closed(stream: &mut impl Read) -> Result<(), Fault> {
    let mut byte = [0];
    match stream.read(&mut byte).map_err(Fault::from) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Fault::Broken(format!("byte {:#x} instead of the end of the connection", byte[0]))),
        Err(fault) if fault.is_closed() => Ok(()),
        Err(fault) => Err(fault),
    }
}

fn export_of(answer: &OptionReply) -> Result<(String, String), Fault> {
    rule(answer.kind == reply::SERVER, || format!("answer to LIST: {answer:?}"))?;
    let mut fields = Fields::new(&answer.data, "answer to LIST");
    let length = fields.u32()? as usize;
    let name = text(fields.take(length)?, "name of an export")?;
    Ok((name, fields.rest_text()?))
}

fn context_of(answer: &OptionReply) -> Result<Context, Fault> {
    rule(answer.kind == reply::META_CONTEXT, || format!("answer about contexts: {answer:?}"))?;
    let mut fields = Fields::new(&answer.data, "answer about contexts");
    let context = Context { id: fields.u32()?, name: fields.rest_text()? };
    rule(context.name.contains(':'), || format!("context without a namespace: {context:?}"))?;
    Ok(context)
}

fn export_info(replies: &[OptionReply]) -> Result<ExportInfo, Fault> {
    let mut export = ExportInfo::default();
    let mut kinds = Vec::new();
    for answer in replies {
        rule(answer.kind == reply::INFO, || format!("answer to INFO or GO: {answer:?}"))?;
        let mut fields = Fields::new(&answer.data, "detail of an export");
        let kind = fields.u16()?;
        rule(!kinds.contains(&kind), || format!("detail {kind} of an export comes twice"))?;
        kinds.push(kind);
        match kind {
            info::EXPORT => (export.size, export.flags) = (fields.u64()?, fields.u16()?),
            info::NAME => export.name = Some(fields.rest_text()?),
            info::DESCRIPTION => export.description = Some(fields.rest_text()?),
            info::BLOCK_SIZE => export.block_sizes = Some([fields.u32()?, fields.u32()?, fields.u32()?]),
            _ => export.others.push((kind, fields.rest().to_vec())),
        }
        fields.end()?;
    }
    rule(kinds.contains(&info::EXPORT), || format!("no size among the details: {replies:?}"))?;
    check_flags(&export)?;
    check_block_sizes(&export)?;
    Ok(export)
}

fn check_flags(export: &ExportInfo) -> Result<(), Fault> {
    use wire::export_flag::{HAS_FLAGS, SEND_FAST_ZERO, SEND_WRITE_ZEROES};
    rule(export.has(HAS_FLAGS), || format!("export without HAS_FLAGS: {export:?}"))?;
    let fast = export.has(SEND_FAST_ZERO) && !export.has(SEND_WRITE_ZEROES);
    rule(!fast, || format!("fast zeros without zeros: {export:?}"))
}

fn check_block_sizes(export: &ExportInfo) -> Result<(), Fault> {
    let Some([least, preferred, largest]) = export.block_sizes else { return Ok(()) };
    let sizes = || format!("block sizes {least}, {preferred}, {largest} of a disk of {} bytes", export.size);
    rule(least.is_power_of_two() && least <= 1 << 16, sizes)?;
    rule(preferred.is_power_of_two() && preferred >= least.max(512), sizes)?;
    rule(largest == u32::MAX || (largest >= preferred && largest.is_multiple_of(least)), sizes)?;
    rule(export.size.is_multiple_of(u64::from(least)), sizes)
}
