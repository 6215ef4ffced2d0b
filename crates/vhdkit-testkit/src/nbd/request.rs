//! Commands that a client may send, within the rules or not.

use super::wire::{self, Header, Mode, command, command_flag};

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags of the command. Where headers are extended, [`Self::bytes`] adds `PAYLOAD_LEN` to a write.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// Where on the disk.
    pub offset: u64,
    /// The length that the header says.
    pub length: u64,
    /// The bytes behind the header.
    pub payload: Vec<u8>,
}

impl Request {
    /// Any command without a payload.
    #[must_use]
    pub fn new(command: u16, offset: u64, length: u64) -> Self {
        Self { flags: 0, command, offset, length, payload: Vec::new() }
    }

    /// READ.
    #[must_use]
    pub fn read(offset: u64, length: u64) -> Self {
        Self::new(command::READ, offset, length)
    }

    /// WRITE.
    #[must_use]
    pub fn write(offset: u64, payload: impl Into<Vec<u8>>) -> Self {
        let payload = payload.into();
        Self { length: payload.len() as u64, payload, ..Self::new(command::WRITE, offset, 0) }
    }

    /// DISC.
    #[must_use]
    pub fn disconnect() -> Self {
        Self::new(command::DISC, 0, 0)
    }

    /// FLUSH.
    #[must_use]
    pub fn flush() -> Self {
        Self::new(command::FLUSH, 0, 0)
    }

    /// TRIM.
    #[must_use]
    pub fn trim(offset: u64, length: u64) -> Self {
        Self::new(command::TRIM, offset, length)
    }

    /// CACHE.
    #[must_use]
    pub fn cache(offset: u64, length: u64) -> Self {
        Self::new(command::CACHE, offset, length)
    }

    /// WRITE_ZEROES.
    #[must_use]
    pub fn write_zeroes(offset: u64, length: u64) -> Self {
        Self::new(command::WRITE_ZEROES, offset, length)
    }

    /// BLOCK_STATUS of all contexts that were agreed on.
    #[must_use]
    pub fn block_status(offset: u64, length: u64) -> Self {
        Self::new(command::BLOCK_STATUS, offset, length)
    }

    /// BLOCK_STATUS of some contexts, with a payload that names them.
    #[must_use]
    pub fn block_status_of(offset: u64, length: u64, contexts: &[u32]) -> Self {
        let mut payload = length.to_be_bytes().to_vec();
        payload.extend(contexts.iter().flat_map(|context| context.to_be_bytes()));
        let length = payload.len() as u64;
        Self { length, payload, flags: command_flag::PAYLOAD_LEN, ..Self::block_status(offset, 0) }
    }

    /// The same with more flags.
    #[must_use]
    pub fn with_flags(self, flags: u16) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    /// Bytes of the disk that the command is about.
    #[must_use]
    pub fn effect_length(&self) -> u64 {
        let filtered = self.command == command::BLOCK_STATUS && self.flags & command_flag::PAYLOAD_LEN != 0;
        match self.payload.first_chunk() {
            Some(length) if filtered => u64::from_be_bytes(*length),
            _ => self.length,
        }
    }

    /// The contexts that the payload names; nothing if it names none, or is not there.
    #[must_use]
    pub fn contexts(&self) -> Option<Vec<u32>> {
        let filtered = self.command == command::BLOCK_STATUS && self.flags & command_flag::PAYLOAD_LEN != 0;
        let ids = self.payload.get(8..).filter(|_| filtered)?;
        Some(ids.as_chunks().0.iter().map(|id| u32::from_be_bytes(*id)).collect())
    }

    /// The header that the mode wants.
    #[must_use]
    pub fn header(&self, mode: Mode, cookie: u64) -> Header {
        let &Self { flags, command, offset, length, .. } = self;
        let extended = mode == Mode::Extended;
        let says_payload = extended && command == wire::command::WRITE;
        let flags = if says_payload { flags | command_flag::PAYLOAD_LEN } else { flags };
        let magic = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        Header { magic, flags, command, cookie, offset, length }
    }

    /// Header and payload.
    ///
    /// Panics if the length does not fit the header.
    #[must_use]
    pub fn bytes(&self, mode: Mode, cookie: u64) -> Vec<u8> {
        let header = self.header(mode, cookie);
        assert!(mode == Mode::Extended || u32::try_from(self.length).is_ok(), "{header:x?} does not fit 32 bits");
        let mut bytes = if mode == Mode::Extended { header.extended() } else { header.compact() };
        bytes.extend(&self.payload);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_says_where_its_length_is_a_payload() {
        let write = Request::write(512, b"abc");
        let compact = write.bytes(Mode::Structured, 7);
        assert_eq!((compact.len(), &compact[..8]), (28 + 3, b"\x25\x60\x95\x13\0\0\0\x01".as_slice()));
        let extended = write.bytes(Mode::Extended, 7);
        assert_eq!((extended.len(), &extended[..8]), (32 + 3, b"\x21\xe4\x1c\x71\0\x20\0\x01".as_slice()));
        assert!(extended.ends_with(b"\0\0\0\x03abc"));
    }

    #[test]
    fn a_filtered_question_has_its_length_in_the_payload() {
        let request = Request::block_status_of(0, 4096, &[3, 9]);
        assert_eq!((request.length, request.effect_length(), request.contexts()), (16, 4096, Some(vec![3, 9])));
        let plain = Request::block_status(0, 4096);
        assert_eq!((plain.effect_length(), plain.contexts()), (4096, None));
    }
}
