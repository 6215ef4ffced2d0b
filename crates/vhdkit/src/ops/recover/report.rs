//! What a recovery has to say about what it did.

/// How sure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Certainty {
    /// It stands in the file, or follows from what does.
    Certain,
    /// It is likely, and may be wrong.
    Guessed,
    /// Nothing of it was found.
    Lost,
}

impl Certainty {
    /// A stable name for scripts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Certain => "certain",
            Self::Guessed => "guessed",
            Self::Lost => "lost",
        }
    }
}

/// A part of the image, and how it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which one: `headers`, `log`, `region table`, `metadata`, `block size`, ...
    pub name: &'static str,
    /// How sure that is.
    pub certainty: Certainty,
    /// How it was found, in words.
    pub detail: String,
}

/// What was recovered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverReport {
    /// Each part of the image, in the order in which it was looked for.
    pub parts: Vec<Part>,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes of a logical sector.
    pub logical_sector_size: u32,
    /// Blocks with data whose place is certain.
    pub blocks_certain: u64,
    /// Blocks whose place or content was guessed.
    pub blocks_guessed: u64,
    /// Blocks of which nothing was found; they read as zeros.
    pub blocks_lost: u64,
    /// Bytes of the file that hold data and could not be placed on the disk.
    pub bytes_unplaced: u64,
    /// The first ranges of the file that could not be placed.
    pub unplaced: Vec<std::ops::Range<u64>>,
    /// The first blocks that are lost.
    pub lost: Vec<u64>,
    /// The disk has a parent, and none was given: what only the parent has reads as zeros.
    pub without_parent: bool,
    /// What is on the disk, where it was recognised.
    pub recognised: Vec<String>,
    /// Bytes of the new file.
    pub file_size: u64,
}

impl RecoverReport {
    /// True when nothing of the disk's data is guessed or lost.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        let data = ["log", "block size", "disk size", "sector size", "BAT", "parent"];
        let parts = self.parts.iter().filter(|part| data.contains(&part.name));
        let doubtful = parts.filter(|part| part.certainty != Certainty::Certain).count();
        let blocks = self.blocks_guessed == 0 && self.blocks_lost == 0;
        doubtful == 0 && blocks && self.bytes_unplaced == 0 && !self.without_parent
    }
}

/// Collects what is said on the way.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) parts: Vec<Part>,
}

impl Notes {
    /// Says of a part that is there already why it is doubtful.
    pub(super) fn doubt(&mut self, name: &'static str, why: &str) {
        match self.parts.iter_mut().find(|part| part.name == name) {
            Some(part) => {
                part.certainty = part.certainty.max(Certainty::Guessed);
                part.detail = why.to_owned();
            }
            None => self.part(name, Certainty::Guessed, why),
        }
    }

    pub(super) fn part(&mut self, name: &'static str, certainty: Certainty, detail: impl Into<String>) {
        self.parts.push(Part { name, certainty, detail: detail.into() });
    }
}
