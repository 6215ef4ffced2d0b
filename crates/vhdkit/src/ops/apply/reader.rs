//! Reading an increment from front to back, checking everything that is read.

use crate::error::{Error, ErrorKind, Result};
use crate::format::checksum;
use crate::format::increment::{
    Content, HEADER_BYTES, Header, Item, PAYLOAD_MAX, RECORD_BYTES, Record, Sequence, Totals,
};
use crate::storage::Storage;

/// Reads a file once. Whoever gets to its end has seen a whole increment.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    file: &'a dyn Storage,
    header: Header,
    sequence: Sequence,
    /// Of everything that was read.
    checksum: u32,
    position: u64,
    length: u64,
    /// The trailer was read.
    at_end: bool,
    payload: Vec<u8>,
}

fn cut_off(what: &str) -> Error {
    Error::new(ErrorKind::Truncated, format!("the increment is cut off in {what}"))
        .with_hint("get the file again from where it was made; nothing was written")
}

impl<'a> Reader<'a> {
    /// Reads the header.
    pub(super) fn new(file: &'a dyn Storage) -> Result<Self> {
        let length = file.len().map_err(|error| Error::io("cannot tell the length of the increment", error))?;
        let mut bytes = [0; HEADER_BYTES];
        let there = usize::try_from(length).unwrap_or(usize::MAX).min(HEADER_BYTES);
        if let Some(part) = bytes.get_mut(..there) {
            read(file, part, 0)?;
        }
        let header = Header::decode(&bytes);
        if there < HEADER_BYTES && bytes.starts_with(&crate::format::increment::SIGNATURE) {
            return Err(cut_off("its header"));
        }
        let header = header?;
        Ok(Self {
            file,
            header,
            sequence: Sequence::new(&header),
            checksum: checksum::append(0, &bytes),
            position: HEADER_BYTES as u64,
            length,
            at_end: false,
            payload: Vec::new(),
        })
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn totals(&self) -> Totals {
        self.sequence.totals()
    }

    /// Bytes of the file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.length
    }

    /// Bytes that were read.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The next record with its payload, both checked; `None` behind the trailer, which ends the file.
    pub(super) fn next(&mut self) -> Result<Option<(Record, &[u8])>> {
        if self.at_end {
            return Ok(None);
        }
        let mut bytes = [0; RECORD_BYTES];
        let number = self.totals().records;
        self.fill(&mut bytes, number)?;
        match self.sequence.decode(&bytes)? {
            Item::Last(_, expected) => {
                if expected != self.checksum {
                    return Err(damaged("the increment is damaged: the checksum of the whole file is wrong"));
                }
                if self.position != self.length {
                    return Err(damaged("something follows behind the end of the increment"));
                }
                self.at_end = true;
                Ok(None)
            }
            Item::Record(record) => {
                self.checksum = checksum::append(self.checksum, &bytes);
                self.payload.clear();
                if let Content::Data(expected) = record.content {
                    // At most PAYLOAD_MAX, which the sequence has checked.
                    let length = usize::try_from(record.length.min(PAYLOAD_MAX)).unwrap_or_default();
                    let mut payload = std::mem::take(&mut self.payload);
                    payload.resize(length, 0);
                    self.fill(&mut payload, number)?;
                    self.payload = payload;
                    if checksum::append(0, &self.payload) != expected {
                        return Err(damaged(&format!(
                            "the data of record {number} of the increment is damaged: its checksum is wrong"
                        )));
                    }
                    self.checksum = checksum::append(self.checksum, &self.payload);
                }
                Ok(Some((record, &self.payload)))
            }
        }
    }

    fn fill(&mut self, bytes: &mut [u8], number: u64) -> Result<()> {
        let end = self.position.saturating_add(bytes.len() as u64);
        if end > self.length {
            return Err(cut_off(&format!("record {number}")));
        }
        read(self.file, bytes, self.position)?;
        self.position = end;
        Ok(())
    }
}

fn damaged(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, what).with_hint("get the file again from where it was made; nothing was written")
}

fn read(file: &dyn Storage, bytes: &mut [u8], offset: u64) -> Result<()> {
    file.read_at(bytes, offset).map_err(|error| Error::io(format!("cannot read the increment at {offset:#x}"), error))
}
