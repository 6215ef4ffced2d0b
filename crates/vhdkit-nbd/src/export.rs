//! What is served under which name.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vhdkit::image::BlockDevice;

use crate::wire::export_flag;

/// The longest name, by the protocol.
const NAME_BYTES_MAX: usize = 4096;
/// The largest payload of a request, and the largest read.
pub(crate) const REQUEST_BYTES_MAX: u32 = 32 << 20;

/// A name that no export can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidName(String);

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for InvalidName {}

/// A disk and the name that it is served under.
#[derive(Clone, Debug)]
pub struct Export {
    name: String,
    description: String,
    device: Arc<dyn BlockDevice>,
    size: u64,
    writable: bool,
}

impl Export {
    /// A disk under a name, for reading.
    ///
    /// # Errors
    /// [`InvalidName`] for names of more than 4096 bytes and those with a NUL.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Result<Self, InvalidName> {
        let name = name.into();
        if name.len() > NAME_BYTES_MAX {
            let what = format!("the name of the export has {} bytes, and {NAME_BYTES_MAX} are the most", name.len());
            return Err(InvalidName(what));
        }
        if name.contains('\0') {
            return Err(InvalidName("the name of the export has a NUL in it".to_owned()));
        }
        let size = device.size();
        Ok(Self { name, description: String::new(), device, size, writable: false })
    }

    /// Lets clients write, if the disk can be written.
    #[must_use]
    pub fn writable(mut self, writable: bool) -> Self {
        self.writable = writable && !self.device.is_read_only();
        self
    }

    /// What people are told about it. It is cut at 4096 bytes.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        let mut end = self.description.len().min(NAME_BYTES_MAX);
        while !self.description.is_char_boundary(end) {
            end -= 1;
        }
        self.description.truncate(end);
        self
    }

    /// The name that clients ask for.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn described(&self) -> &str {
        &self.description
    }

    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Its bytes; they do not change while it is served.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether clients may write.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Transmission flags, before what depends on the replies that were negotiated.
    pub(crate) fn flags(&self) -> u16 {
        use export_flag as flag;
        let always = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE | flag::CAN_MULTI_CONN;
        let writing = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        always | if self.writable { writing } else { flag::READ_ONLY }
    }

    /// Minimum, preferred and maximum size of a request. Any byte range is served; a disk of 4 KiB sectors says that it is
    /// one, so that whoever makes a block device of it gives that the right sectors.
    pub(crate) fn block_sizes(&self) -> [u32; 3] {
        let minimum = if self.device.logical_sector_size() == 4096 { 4096 } else { 1 };
        [minimum, self.device.physical_sector_size().max(4096), REQUEST_BYTES_MAX]
    }
}

/// All exports of a server.
#[derive(Debug)]
pub(crate) struct Exports(pub(crate) Vec<Arc<Export>>);

impl Exports {
    /// The export of a name. The empty name stands for the only one there is.
    pub(crate) fn find(&self, name: &[u8]) -> Option<&Arc<Export>> {
        let named = self.0.iter().find(|export| export.name.as_bytes() == name);
        match self.0.as_slice() {
            [only] if name.is_empty() => Some(only),
            _ => named,
        }
    }
}
