//! The pair of headers while an image is written ([MS-VHDX] 2.2.2.1).

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{HEADER_BYTES, Header, Headers, OFFSETS};
use crate::storage::Storage;

/// Updates that a session may need: start, replay, log, end, each in both copies, and room to spare.
pub(super) const UPDATES_RESERVED: u64 = 64;

/// What the current copy holds, and which one it is.
#[derive(Debug)]
pub(super) struct HeaderPair {
    current: Header,
    copy: usize,
}

impl HeaderPair {
    pub(super) fn new(headers: &Headers) -> Self {
        Self { current: headers.current, copy: headers.current_copy }
    }

    pub(super) fn current(&self) -> &Header {
        &self.current
    }

    /// Makes sure that nobody else wrote a header since we did.
    pub(super) fn verify(&self, storage: &Arc<dyn Storage>) -> Result<()> {
        let offset = OFFSETS.get(self.copy).copied().unwrap_or_default();
        let mut bytes = [0; HEADER_BYTES];
        let other = OFFSETS.get(1 - self.copy).copied().unwrap_or_default();
        read_copy(storage, &mut bytes, offset)?;
        let found = Header::decode(&bytes);
        read_copy(storage, &mut bytes, other)?;
        // Who updates one copy at a time writes the one that is not current; what a crash left there is never newer.
        let newer = Header::decode(&bytes).filter(|header| header.sequence_number > self.current.sequence_number);
        let offset = match (found == Some(self.current), newer) {
            (true, None) => return Ok(()),
            (true, Some(_)) => other,
            (false, _) => offset,
        };
        let what =
            format!("the header at {offset:#x} is not the one that was there before: somebody else writes this file");
        Err(Error::new(ErrorKind::Locked, what)
            .with_hint("close it everywhere else (Hyper-V, WSL, a share), and check it before it is used again"))
    }

    /// Writes the next header into the copy that is not current. The caller syncs, then calls [`HeaderPair::written`].
    pub(super) fn write_next(&self, storage: &Arc<dyn Storage>, wanted: &Header) -> Result<Header> {
        let Some(sequence_number) = self.current.sequence_number.checked_add(1) else {
            return Err(Error::new(ErrorKind::Limit, "the header's sequence number cannot be raised any more"));
        };
        let next = Header { sequence_number, ..*wanted };
        let offset = OFFSETS.get(1 - self.copy).copied().unwrap_or_default();
        let wrote = storage.write_at(&next.encode(), offset);
        wrote.map_err(|error| Error::io(format!("cannot write the header at {offset:#x}"), error))?;
        Ok(next)
    }

    /// The header that was written last is current now.
    pub(super) fn written(&mut self, header: Header) {
        self.current = header;
        self.copy = 1 - self.copy;
    }
}

fn read_copy(storage: &Arc<dyn Storage>, bytes: &mut [u8; HEADER_BYTES], offset: u64) -> Result<()> {
    let read = storage.read_at(bytes, offset);
    read.map_err(|error| Error::io(format!("cannot read the header at {offset:#x} again"), error))
}
