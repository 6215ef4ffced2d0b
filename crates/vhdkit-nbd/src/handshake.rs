//! The handshake: what a client says before its first request. Pure: bytes in, bytes out, no I/O.
//!
//! ```text
//! server: greeting -> client: flags -> (client: option -> server: replies)* -> transmission
//!                                        STARTTLS: everything said before is forgotten
//! ```

use std::sync::Arc;

use zerocopy::{FromBytes as _, IntoBytes};

use crate::export::{Export, Exports};
use crate::wire::{
    FIXED_NEWSTYLE, GREETING, Greeting, NO_ZEROES, OPTION_HEADER_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader,
    OptionReply, Reader, answer, export_flag, info, option,
};

/// The most bytes that come with an option: room for the longest name and many queries.
pub(crate) const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Data of an option up to this length is read and thrown away; who sends more is cut off.
const DISCARD_BYTES_MAX: u32 = 1 << 20;
/// Answers are sent when there are more than this, before the next option is looked at: a list may be long.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// The most options of a handshake: every export of a large server can be asked for.
const OPTIONS_MAX: u32 = 1024;
/// The longest name, by the protocol.
const NAME_BYTES_MAX: usize = 4096;
/// Zeros behind the answer to `EXPORT_NAME`, for clients that want them.
const PADDING: [u8; 124] = [0; 124];

/// Names of the metadata contexts that there are, and their numbers.
const CONTEXTS: [(&str, &str, u32); 2] =
    [("base:", "base:allocation", ALLOCATION_ID), ("qemu:", "qemu:allocation-depth", DEPTH_ID)];
/// The number of `base:allocation`.
pub(crate) const ALLOCATION_ID: u32 = 1;
/// The number of `qemu:allocation-depth`.
pub(crate) const DEPTH_ID: u32 = 2;

/// How replies look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A header and the data.
    #[default]
    Simple,
    /// Chunks with lengths of 32 bits.
    Structured,
    /// Chunks with lengths of 64 bits, and such requests.
    Extended,
}

/// Which metadata contexts a client has chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contexts {
    pub(crate) allocation: bool,
    pub(crate) depth: bool,
}

impl Contexts {
    pub(crate) const fn any(self) -> bool {
        self.allocation || self.depth
    }

    fn add(&mut self, id: u32) {
        self.allocation |= id == ALLOCATION_ID;
        self.depth |= id == DEPTH_ID;
    }

    fn has(self, id: u32) -> bool {
        (self.allocation && id == ALLOCATION_ID) || (self.depth && id == DEPTH_ID)
    }
}

/// What client and server agreed upon.
#[derive(Clone, Debug)]
pub(crate) struct Agreed {
    pub(crate) export: Arc<Export>,
    pub(crate) mode: Mode,
    pub(crate) contexts: Contexts,
}

/// How a step of the handshake ended.
#[derive(Debug)]
pub(crate) enum Progress {
    /// More bytes are needed.
    More,
    /// What was said is sent, then the rest of what the client sent is taken.
    Again,
    /// What was said is sent, then TLS begins. Bytes that the client sent already are an error.
    StartTls,
    /// Requests follow.
    Transmission(Agreed),
    /// The client gave up; the answer is sent, then the connection ends.
    Abort,
    /// What was said is sent, then the connection ends.
    Close(&'static str),
}

/// Whether there is TLS, and whether it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsState {
    /// The server has no certificate.
    None,
    /// A client may ask for it.
    Offered,
    /// Nothing goes without it.
    Required,
    /// It is there.
    Active,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    ClientFlags,
    Option,
    /// So many bytes that belong to an option which was refused.
    Discard(u32),
}

/// A handshake under way.
#[derive(Debug)]
pub(crate) struct Handshake<'a> {
    exports: &'a Exports,
    tls: TlsState,
    expects: Expects,
    no_zeroes: bool,
    options: u32,
    mode: Mode,
    /// Contexts that were chosen, for this export.
    contexts: Option<(Arc<Export>, Contexts)>,
}

impl<'a> Handshake<'a> {
    /// Begins, and says hello.
    pub(crate) fn new(exports: &'a Exports, tls: TlsState, output: &mut Vec<u8>) -> Self {
        let greeting = Greeting {
            magic: GREETING.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: (FIXED_NEWSTYLE | NO_ZEROES).into(),
        };
        output.extend_from_slice(greeting.as_bytes());
        Self {
            exports,
            tls,
            expects: Expects::ClientFlags,
            no_zeroes: false,
            options: 0,
            mode: Mode::Simple,
            contexts: None,
        }
    }

    /// TLS is there now: what was agreed before is forgotten.
    pub(crate) fn tls_started(&mut self) {
        self.tls = TlsState::Active;
        self.mode = Mode::Simple;
        self.contexts = None;
    }

    /// Takes what the client sent: how many bytes of it were used, and how to go on. What is to be sent is added to
    /// `output`.
    pub(crate) fn advance(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Progress) {
        let mut used = 0;
        loop {
            let rest = input.get(used..).unwrap_or_default();
            let (step, progress) = match self.expects {
                Expects::ClientFlags => self.client_flags(rest),
                Expects::Option => self.option(rest, output),
                Expects::Discard(left) => self.discard(rest, left),
            };
            used += step;
            if !matches!(progress, Progress::More) || step == 0 {
                return (used, progress);
            }
            if output.len() > OUTPUT_BYTES_MAX {
                return (used, Progress::Again);
            }
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Progress) {
        let Some(flags) = Reader(input).u32() else { return (0, Progress::More) };
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        if flags & !known != 0 {
            return (4, Progress::Close("the client has flags that were not offered"));
        }
        // Without "fixed" only EXPORT_NAME is allowed to it; it gets the answers of a fixed server all the same.
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        self.expects = Expects::Option;
        (4, Progress::More)
    }

    fn discard(&mut self, input: &[u8], left: u32) -> (usize, Progress) {
        let step = u32::try_from(input.len()).unwrap_or(u32::MAX).min(left);
        self.expects = if step == left { Expects::Option } else { Expects::Discard(left - step) };
        (usize::try_from(step).unwrap_or_default(), Progress::More)
    }

    fn option(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Progress) {
        let Ok((header, rest)) = OptionHeader::read_from_prefix(input) else { return (0, Progress::More) };
        if header.magic.get() != OPTION_MAGIC {
            return (0, Progress::Close("an option does not begin with its magic number"));
        }
        let (kind, length) = (header.option.get(), header.length.get());
        if length > OPTION_BYTES_MAX {
            self.options += 1;
            return self.too_long(kind, length, output);
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(data) = rest.get(..length) else { return (0, Progress::More) };
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return (0, Progress::Close("there is no end to the options"));
        }
        let progress = self.judge(kind, data, output);
        (OPTION_HEADER_BYTES + length, progress)
    }

    fn too_long(&mut self, kind: u32, length: u32, output: &mut Vec<u8>) -> (usize, Progress) {
        if kind == option::EXPORT_NAME || length > DISCARD_BYTES_MAX || self.options > OPTIONS_MAX {
            return (0, Progress::Close("an option is too long"));
        }
        if kind == option::SET_META_CONTEXT {
            self.contexts = None;
        }
        refuse(output, kind, answer::TOO_BIG, "the option is too long");
        self.expects = Expects::Discard(length);
        (OPTION_HEADER_BYTES, Progress::More)
    }

    /// Answers an option that is there in full.
    fn judge(&mut self, kind: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        if self.tls == TlsState::Required && !matches!(kind, option::ABORT | option::STARTTLS) {
            if kind == option::EXPORT_NAME {
                return Progress::Close("the client did not start TLS, which is required");
            }
            refuse(output, kind, answer::TLS_REQUIRED, "start TLS first");
            return Progress::More;
        }
        match kind {
            option::EXPORT_NAME => return self.export_name(data, output),
            option::ABORT => {
                reply(output, kind, answer::ACK, &[]);
                return Progress::Abort;
            }
            option::STARTTLS => return self.start_tls(data, output),
            option::INFO | option::GO => return self.info_or_go(kind, data, output),
            option::LIST => self.list(data, output),
            option::STRUCTURED_REPLY => self.set_mode(kind, Mode::Structured, data, output),
            option::EXTENDED_HEADERS => self.set_mode(kind, Mode::Extended, data, output),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(kind, data, output),
            _ => refuse(output, kind, answer::UNSUPPORTED, "unknown option"),
        }
        Progress::More
    }

    fn export_name(&self, data: &[u8], output: &mut Vec<u8>) -> Progress {
        if self.mode == Mode::Extended {
            return Progress::Close("EXPORT_NAME does not go with extended headers");
        }
        let Some(export) = self.exports.find(data) else { return Progress::Close("there is no export of that name") };
        let agreed = self.agree(export);
        output.extend_from_slice(&export.size().to_big_endian());
        output.extend_from_slice(&flags(&agreed).to_big_endian());
        if !self.no_zeroes {
            output.extend_from_slice(&PADDING);
        }
        Progress::Transmission(agreed)
    }

    fn agree(&self, export: &Arc<Export>) -> Agreed {
        let chosen = self.contexts.as_ref().filter(|(of, _)| Arc::ptr_eq(of, export));
        let contexts = chosen.map_or_else(Contexts::default, |(_, contexts)| *contexts);
        Agreed { export: Arc::clone(export), mode: self.mode, contexts }
    }

    fn start_tls(&self, data: &[u8], output: &mut Vec<u8>) -> Progress {
        match self.tls {
            _ if !data.is_empty() => refuse(output, option::STARTTLS, answer::INVALID, "STARTTLS has no data"),
            TlsState::None => refuse(output, option::STARTTLS, answer::POLICY, "the server has no certificate"),
            TlsState::Active => refuse(output, option::STARTTLS, answer::INVALID, "TLS is there already"),
            TlsState::Offered | TlsState::Required => {
                reply(output, option::STARTTLS, answer::ACK, &[]);
                return Progress::StartTls;
            }
        }
        Progress::More
    }

    fn list(&self, data: &[u8], output: &mut Vec<u8>) {
        if !data.is_empty() {
            return refuse(output, option::LIST, answer::INVALID, "LIST has no data");
        }
        for export in &self.exports.0 {
            let mut item = Vec::new();
            item.extend_from_slice(&length_of(export.name().as_bytes()).to_big_endian());
            item.extend_from_slice(export.name().as_bytes());
            item.extend_from_slice(export.described().as_bytes());
            reply(output, option::LIST, answer::SERVER, &item);
        }
        reply(output, option::LIST, answer::ACK, &[]);
    }

    fn set_mode(&mut self, kind: u32, mode: Mode, data: &[u8], output: &mut Vec<u8>) {
        if !data.is_empty() {
            return refuse(output, kind, answer::INVALID, "the option has no data");
        }
        if self.mode != Mode::Extended {
            self.mode = mode; // extended headers take precedence over structured replies
        }
        reply(output, kind, answer::ACK, &[]);
    }

    fn info_or_go(&self, kind: u32, data: &[u8], output: &mut Vec<u8>) -> Progress {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(output, kind, answer::INVALID, "the lengths in the option do not fit together");
            return Progress::More;
        };
        if name.len() > NAME_BYTES_MAX {
            refuse(output, kind, answer::TOO_BIG, "names have at most 4096 bytes");
            return Progress::More;
        }
        let Some(export) = self.exports.find(name) else {
            refuse(output, kind, answer::UNKNOWN, "there is no export of that name");
            return Progress::More;
        };
        let agreed = self.agree(export);
        let mut send = |what: u16, item: &[u8]| {
            let bytes = [what.to_big_endian().as_slice(), item].concat();
            reply(output, kind, answer::INFO, &bytes);
        };
        let sizes = export.size().to_big_endian();
        send(info::EXPORT, &[sizes.as_slice(), &flags(&agreed).to_big_endian()].concat());
        for what in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            match what {
                _ if !wanted.contains(&what) => {}
                info::NAME => send(what, export.name().as_bytes()),
                info::DESCRIPTION if export.described().is_empty() => {}
                info::DESCRIPTION => send(what, export.described().as_bytes()),
                _ => send(what, &export.block_sizes().map(|size| size.to_big_endian()).concat()),
            }
        }
        reply(output, kind, answer::ACK, &[]);
        if kind == option::GO { Progress::Transmission(agreed) } else { Progress::More }
    }

    fn meta_context(&mut self, kind: u32, data: &[u8], output: &mut Vec<u8>) {
        let sets = kind == option::SET_META_CONTEXT;
        if sets {
            self.contexts = None; // also when this fails
        }
        if self.mode == Mode::Simple {
            return refuse(output, kind, answer::INVALID, "ask for structured replies or extended headers first");
        }
        let Some((name, queries)) = parse_queries(data) else {
            return refuse(output, kind, answer::INVALID, "the lengths in the option do not fit together");
        };
        let Some(export) = self.exports.find(name) else {
            return refuse(output, kind, answer::UNKNOWN, "there is no export of that name");
        };
        let mut chosen = Contexts::default();
        for (namespace, context, id) in CONTEXTS {
            let matches = |query: &&[u8]| *query == context.as_bytes() || (!sets && *query == namespace.as_bytes());
            if queries.iter().any(matches) || (!sets && queries.is_empty()) {
                chosen.add(id);
            }
        }
        for (_, context, id) in CONTEXTS.iter().filter(|(_, _, id)| chosen.has(*id)) {
            let shown = if sets { *id } else { 0 };
            reply(output, kind, answer::META_CONTEXT, &[&shown.to_big_endian(), context.as_bytes()].concat());
        }
        if sets {
            self.contexts = Some((Arc::clone(export), chosen));
        }
        reply(output, kind, answer::ACK, &[]);
    }
}

/// Numbers as they go over the wire.
trait ToWire<const N: usize> {
    fn to_big_endian(self) -> [u8; N];
}

macro_rules! to_wire {
    ($number:ty, $view:ident, $bytes:literal) => {
        impl ToWire<$bytes> for $number {
            fn to_big_endian(self) -> [u8; $bytes] {
                zerocopy::big_endian::$view::new(self).to_bytes()
            }
        }
    };
}
to_wire!(u16, U16, 2);
to_wire!(u32, U32, 4);
to_wire!(u64, U64, 8);

/// The transmission flags of what was agreed upon.
fn flags(agreed: &Agreed) -> u16 {
    let mut flags = agreed.export.flags();
    if agreed.mode != Mode::Simple {
        flags |= export_flag::SEND_DF;
    }
    if agreed.mode == Mode::Extended && agreed.contexts.any() {
        flags |= export_flag::BLOCK_STATUS_PAYLOAD;
    }
    flags
}

/// A name and the kinds of information that are asked for.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u16()?;
    let wanted = (0..count).map(|_| reader.u16()).collect::<Option<Vec<u16>>>()?;
    reader.is_empty().then_some((name, wanted))
}

/// A name and queries. Their number is bounded by the length of the data, whatever it is said to be.
fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(reader.string()?);
    }
    reader.is_empty().then_some((name, queries))
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX) // names and descriptions are short
}

/// Adds a reply to an option.
fn reply(output: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    let header = OptionReply {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        length: length_of(data).into(),
    };
    output.extend_from_slice(header.as_bytes());
    output.extend_from_slice(data);
}

fn refuse(output: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    reply(output, option, kind, message.as_bytes());
}

/// For fuzzing: a handshake in which the input comes in pieces. TLS is taken to succeed whenever it is asked for.
pub fn fuzz(exports: Vec<Export>, tls: u8, pieces: &mut dyn Iterator<Item = Vec<u8>>) -> usize {
    let exports = Exports(exports.into_iter().map(Arc::new).collect());
    let state = match tls % 3 {
        0 => TlsState::None,
        1 => TlsState::Offered,
        _ => TlsState::Required,
    };
    let mut output = Vec::new();
    let mut handshake = Handshake::new(&exports, state, &mut output);
    let mut input = Vec::new();
    let mut sent = 0;
    for piece in pieces {
        input.extend_from_slice(&piece);
        let (used, progress) = handshake.advance(&input, &mut output);
        assert!(used <= input.len(), "no more is used than there is");
        input.drain(..used);
        sent += output.len();
        output.clear();
        match progress {
            Progress::More => {
                let longest = OPTION_HEADER_BYTES + usize::try_from(OPTION_BYTES_MAX).unwrap_or_default();
                assert!(input.len() < longest, "what is left over is part of one option");
            }
            Progress::Again => {}
            Progress::StartTls => handshake.tls_started(),
            Progress::Transmission(agreed) => {
                assert!(state != TlsState::Required || handshake.tls == TlsState::Active);
                assert!(agreed.mode != Mode::Simple || !agreed.contexts.any());
                break;
            }
            Progress::Abort | Progress::Close(_) => break,
        }
    }
    sent
}
