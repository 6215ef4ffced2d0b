//! Two servers to measure by: one that touches no file, and one that does the least that a server of a file can do.
//!
//! ```text
//!     socket -> input, 256 KiB -> requests one after another -> replies, 128 KiB -> socket
//!               one read() takes all that has come              one write() when nothing is left to answer,
//!                                                               or the replies are full
//! ```
//!
//! One thread serves a connection, from its handshake to its end. Only what fio and libnbd ask for is here, and what is
//! wrong ends the connection, so this is no server for anything else.

#![expect(clippy::big_endian_bytes, reason = "the numbers of the protocol are big-endian")]

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::shell::Outcome;

/// Bytes that are read at once: all writes of 4 KiB at depth 32, and what still fits a cache of the processor.
const INPUT_BYTES: usize = 256 << 10;
/// Bytes that are written at once.
const REPLIES_BYTES: usize = 128 << 10;

const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Fixed newstyle, and no zeros behind the handshake.
const HANDSHAKE_FLAGS: u16 = 3;
/// Flags are there, and flushes may be sent.
const EXPORT_FLAGS: u16 = 1 | 4;
/// The last chunk of a reply.
const CHUNK_DONE: u16 = 1;
const CHUNK_OFFSET_DATA: u16 = 1;

const OPTION_ABORT: u32 = 2;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_ACK: u32 = 1;
const OPTION_INFO: u32 = 3;
const OPTION_UNSUPPORTED: u32 = 0x8000_0001;
const INFO_EXPORT: u16 = 0;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// Bytes of a request without its payload.
const REQUEST_BYTES: usize = 28;

/// What is served.
trait Disk: Send + Sync + 'static {
    fn bytes(&self) -> u64;
    /// Whether a client gets structured replies when it asks for them.
    fn offers_structured(&self) -> bool {
        true
    }
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn write(&self, piece: &[u8], offset: u64) -> io::Result<()>;
    fn flush(&self) -> io::Result<()>;
}

/// No file: zeros for reads, writes forgotten.
struct Null {
    bytes: u64,
    structured: bool,
}

impl Disk for Null {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn offers_structured(&self) -> bool {
        self.structured
    }

    fn read(&self, buffer: &mut [u8], _offset: u64) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn write(&self, _piece: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A raw file.
struct Raw(File, u64);

impl Disk for Raw {
    fn bytes(&self) -> u64 {
        self.1
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write(&self, piece: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(piece, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Serves nothing of so many bytes, until it is killed.
pub(super) fn null(socket: &Path, bytes: u64, structured: bool) -> Outcome {
    listen(socket, Null { bytes, structured })
}

/// Serves a raw file, until it is killed.
pub(super) fn prototype(socket: &Path, path: &Path) -> Outcome {
    let file = File::options().read(true).write(true).open(path)?;
    let bytes = file.metadata()?.len();
    listen(socket, Raw(file, bytes))
}

fn listen(socket: &Path, disk: impl Disk) -> Outcome {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    let disk = Arc::new(disk);
    for stream in UnixListener::bind(socket)?.incoming() {
        let (stream, disk) = (stream?, Arc::clone(&disk));
        std::thread::spawn(move || match serve(&stream, &*disk) {
            // Whoever only looks whether somebody listens goes without a word.
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => eprintln!("{error}"),
            _ => {}
        });
    }
    Ok(())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

type Input<'a> = BufReader<&'a UnixStream>;

fn take<const N: usize>(input: &mut Input<'_>) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn option_reply(stream: &mut &UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for number in [option, kind, length] {
        reply.extend(number.to_be_bytes());
    }
    reply.extend(data);
    stream.write_all(&reply)
}

/// Until requests may come: whether replies are structured, or nothing where the client went away.
fn handshake(mut stream: &UnixStream, input: &mut Input<'_>, disk: &impl Disk) -> io::Result<Option<bool>> {
    let mut greeting = [SERVER_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
    greeting.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&greeting)?;
    let _client_flags = take::<4>(input)?;
    let mut structured = false;
    loop {
        if u64::from_be_bytes(take(input)?) != OPTION_MAGIC {
            return Err(invalid("an option without its magic"));
        }
        let (option, length) = (u32::from_be_bytes(take(input)?), u32::from_be_bytes(take(input)?));
        io::copy(&mut input.by_ref().take(u64::from(length)), &mut io::sink())?;
        match option {
            OPTION_STRUCTURED_REPLY if disk.offers_structured() => {
                structured = true;
                option_reply(&mut stream, option, OPTION_ACK, &[])?;
            }
            OPTION_GO => {
                let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                info.extend(disk.bytes().to_be_bytes());
                info.extend(EXPORT_FLAGS.to_be_bytes());
                option_reply(&mut stream, option, OPTION_INFO, &info)?;
                option_reply(&mut stream, option, OPTION_ACK, &[])?;
                return Ok(Some(structured));
            }
            OPTION_ABORT => {
                option_reply(&mut stream, option, OPTION_ACK, &[])?;
                return Ok(None);
            }
            other => option_reply(&mut stream, other, OPTION_UNSUPPORTED, &[])?,
        }
    }
}

struct Request {
    kind: u16,
    cookie: [u8; 8],
    offset: u64,
    length: u32,
}

fn request(input: &mut Input<'_>) -> io::Result<Request> {
    if u32::from_be_bytes(take(input)?) != REQUEST_MAGIC {
        return Err(invalid("a request without its magic"));
    }
    let _flags = take::<2>(input)?;
    Ok(Request {
        kind: u16::from_be_bytes(take(input)?),
        cookie: take(input)?,
        offset: u64::from_be_bytes(take(input)?),
        length: u32::from_be_bytes(take(input)?),
    })
}

/// Replies that wait to be written.
struct Replies<'a> {
    stream: &'a UnixStream,
    buffer: Vec<u8>,
    used: usize,
}

impl Replies<'_> {
    fn send(&mut self) -> io::Result<()> {
        let (full, _) = self.buffer.split_at(self.used);
        self.used = 0;
        self.stream.write_all(full)
    }

    /// At most so many bytes of space, at least one of them.
    fn space(&mut self, most: usize) -> io::Result<&mut [u8]> {
        if self.used == self.buffer.len() {
            self.send()?;
        }
        let (_, free) = self.buffer.split_at_mut(self.used);
        let length = free.len().min(most);
        self.used += length;
        Ok(free.split_at_mut(length).0)
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let space = self.space(bytes.len())?;
            let (now, later) = bytes.split_at(space.len());
            space.copy_from_slice(now);
            bytes = later;
        }
        Ok(())
    }
}

/// The head of the reply to a read, before its bytes.
fn read_head(replies: &mut Replies<'_>, request: &Request, structured: bool) -> io::Result<()> {
    if !structured {
        return done(replies, request);
    }
    replies.put(&CHUNK_MAGIC.to_be_bytes())?;
    replies.put(&CHUNK_DONE.to_be_bytes())?;
    replies.put(&CHUNK_OFFSET_DATA.to_be_bytes())?;
    replies.put(&request.cookie)?;
    replies.put(&(request.length + 8).to_be_bytes())?;
    replies.put(&request.offset.to_be_bytes())
}

/// A reply without bytes that tells success.
fn done(replies: &mut Replies<'_>, request: &Request) -> io::Result<()> {
    replies.put(&SIMPLE_REPLY_MAGIC.to_be_bytes())?;
    replies.put(&[0; 4])?;
    replies.put(&request.cookie)
}

fn serve(stream: &UnixStream, disk: &impl Disk) -> io::Result<()> {
    let mut input = BufReader::with_capacity(INPUT_BYTES, stream);
    let Some(structured) = handshake(stream, &mut input, disk)? else { return Ok(()) };
    let mut replies = Replies { stream, buffer: vec![0; REPLIES_BYTES], used: 0 };
    loop {
        if input.buffer().len() < REQUEST_BYTES {
            replies.send()?; // before waiting for more
        }
        let request = request(&mut input)?;
        let (mut offset, end) = (request.offset, request.offset + u64::from(request.length));
        match request.kind {
            READ => {
                read_head(&mut replies, &request, structured)?;
                while offset < end {
                    let space = replies.space(usize::try_from(end - offset).map_err(io::Error::other)?)?;
                    disk.read(space, offset)?;
                    offset += space.len() as u64;
                }
                continue;
            }
            WRITE => {
                while offset < end {
                    let come = input.fill_buf()?;
                    let most = usize::try_from(end - offset).map_err(io::Error::other)?.min(come.len());
                    let (piece, _) = come.split_at(most);
                    if piece.is_empty() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    disk.write(piece, offset)?;
                    input.consume(most);
                    offset += most as u64;
                }
            }
            FLUSH => disk.flush()?,
            DISCONNECT => return replies.send(),
            _ => return Err(invalid("a request of an unknown kind")),
        }
        done(&mut replies, &request)?;
    }
}
