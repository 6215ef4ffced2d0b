//! Numbers of the protocol, typed from its document, and the bytes of headers.
//!
//! ```text
//! compact request   magic u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u32
//! extended request  magic u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u64
//! simple reply      magic u32 | error u32 | cookie u64
//! structured reply  magic u32 | flags u16 | kind u16 | cookie u64 | length u32
//! extended reply    magic u32 | flags u16 | kind u16 | cookie u64 | offset u64 | length u64
//! ```

/// First eight bytes that a server sends.
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second eight bytes of the server, and the first of every option.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// First eight bytes of the reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First four bytes of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Most bytes of a name or a message.
pub const STRING_BYTES_MAX: usize = 4096;
/// Most bytes of payload that every peer has to take unless told otherwise.
pub const PAYLOAD_BYTES_MAX: usize = 32 << 20;

/// Flags of the server's greeting.
pub mod greeting_flag {
    /// Options other than the export's name are answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The zeros behind the answer to the export's name may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Flags with which a client answers the greeting.
pub mod client_flag {
    /// The client knows the fixed handshake.
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client wants no zeros behind the answer to the export's name.
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Options of the handshake.
pub mod option {
    /// Choose an export and begin, without a way to say no.
    pub const EXPORT_NAME: u32 = 1;
    /// Go away.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Withdrawn.
    pub const PEEK_EXPORT: u32 = 4;
    /// Everything behind the answer is TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and begin.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A detail of an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The bit that all errors have.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// Forbidden.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// Malformed, or not at this point.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR + 4;
    /// Not without TLS.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// The client has to ask for block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// Request or reply are too large.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Not without extended headers.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Kinds of details of an export.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Least, preferred and largest block.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export, valid while its disk is served.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Nothing may be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The command flag FUA is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium turns.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The command flag DF is known.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see each other's writes.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Experimental.
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// CACHE is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The command flag FAST_ZERO is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload that names contexts.
    pub const BLOCK_STAT_PAYLOAD: u16 = 1 << 12;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// End; there is no reply.
    pub const DISC: u16 = 2;
    /// Make durable what was acknowledged.
    pub const FLUSH: u16 = 3;
    /// Forget.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeros without sending them.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for metadata.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: with space of its own.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: in one piece.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: quick or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is that of a payload behind the header.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Kinds of chunks of structured and extended replies.
pub mod chunk_kind {
    /// Nothing; the last one.
    pub const NONE: u16 = 0;
    /// Bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// Metadata, 32 bits each.
    pub const BLOCK_STATUS: u16 = 5;
    /// Metadata, 64 bits each.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The bit that all errors have.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// The flag of the last chunk of a reply.
pub const CHUNK_FLAG_DONE: u16 = 1;

/// Codes of errors during transmission.
pub mod code {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// Not valid.
    pub const EINVAL: u32 = 22;
    /// No space left, or behind the end.
    pub const ENOSPC: u32 = 28;
    /// Too large to be sent in one piece.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported, or not quickly.
    pub const ENOTSUP: u32 = 95;
    /// The server is going down.
    pub const ESHUTDOWN: u32 = 108;

    /// All of them.
    pub const ALL: [u32; 8] = [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];
}

/// What headers client and server agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Simple, Self::Structured, Self::Extended];
}

/// The fields of a request's header, any values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// One of the two magic numbers, or not.
    pub magic: u32,
    /// Flags of the command.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// What the reply names again.
    pub cookie: u64,
    /// Where on the disk.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

impl Header {
    /// The 28 bytes of a compact header; what of the length does not fit is lost.
    #[must_use]
    pub fn compact(&self) -> Vec<u8> {
        let length = self.length as u32;
        [self.start().as_slice(), &length.to_be_bytes()].concat()
    }

    /// The 32 bytes of an extended header.
    #[must_use]
    pub fn extended(&self) -> Vec<u8> {
        [self.start().as_slice(), &self.length.to_be_bytes()].concat()
    }

    fn start(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes
    }
}

/// The bytes of an option: its header, saying `length`, and the data, however long.
#[must_use]
pub fn option_bytes_saying(option: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The bytes of an option.
#[must_use]
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("the data of an option fit 32 bits");
    option_bytes_saying(option, length, data)
}

/// The data of INFO and GO.
#[must_use]
pub fn info_data(name: &[u8], requests: &[u16]) -> Vec<u8> {
    let mut data = string_bytes(name);
    let count = u16::try_from(requests.len()).expect("the requests can be counted in 16 bits");
    data.extend(count.to_be_bytes());
    data.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    data
}

/// The data of the two options about metadata contexts.
#[must_use]
pub fn meta_context_data(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = string_bytes(name);
    let count = u32::try_from(queries.len()).expect("the queries can be counted in 32 bits");
    data.extend(count.to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string_bytes(query)));
    data
}

/// A length of 32 bits and the bytes.
#[must_use]
pub fn string_bytes(text: &[u8]) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("a string fits 32 bits");
    [length.to_be_bytes().as_slice(), text].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_bytes_of_the_document() {
        let header = Header {
            magic: REQUEST_MAGIC,
            flags: 0x0102,
            command: 0x0304,
            cookie: 0x05,
            offset: 0x0600,
            length: 0x7_0000_0001,
        };
        let start = b"\x25\x60\x95\x13\x01\x02\x03\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\x06\0";
        assert_eq!(header.compact(), [start.as_slice(), b"\0\0\0\x01"].concat());
        assert_eq!(header.extended(), [start.as_slice(), b"\0\0\0\x07\0\0\0\x01"].concat());
    }

    #[test]
    fn options_have_the_bytes_of_the_document() {
        assert_eq!(option_bytes(option::LIST, b""), b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        assert_eq!(info_data(b"ab", &[1, 0x203]), b"\0\0\0\x02ab\0\x02\0\x01\x02\x03");
        assert_eq!(meta_context_data(b"", &[b"x:y"]), b"\0\0\0\0\0\0\0\x01\0\0\0\x03x:y");
    }
}
