//! The structures of an image as values that a test may set to anything, and their bytes.

use crate::guid::Guid;

/// One mebibyte, the unit of placement.
pub const MIB: u64 = 1 << 20;

/// Whether a checksum is right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// Computed over the final bytes.
    #[default]
    Correct,
    /// The right one with every bit flipped.
    Wrong,
    /// This value, whatever the bytes.
    Value(u32),
}

impl Checksum {
    /// Puts the checksum over `bytes` to its place, bytes 4 to 7.
    pub fn apply(self, bytes: &mut [u8]) {
        bytes[4..8].fill(0);
        let right = crc32c::crc32c(bytes);
        let value = match self {
            Self::Correct => right,
            Self::Wrong => !right,
            Self::Value(value) => value,
        };
        bytes[4..8].copy_from_slice(&value.to_le_bytes());
    }
}

/// Copies `bytes` into `target` at `offset`.
pub(crate) fn put(target: &mut [u8], offset: usize, bytes: &[u8]) {
    target[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// One of the two headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderSpec {
    /// `head`.
    pub signature: [u8; 4],
    /// The sequence number: the larger one is current.
    pub sequence: u64,
    /// Identity of the file's contents.
    pub file_write_guid: Guid,
    /// Identity of the guest-visible contents.
    pub data_write_guid: Guid,
    /// Nil when the log is empty.
    pub log_guid: Guid,
    /// 0.
    pub log_version: u16,
    /// 1.
    pub version: u16,
    /// Bytes of log; `None` is where the builder put it.
    pub log_length: Option<u32>,
    /// File offset of the log; `None` is where the builder put it.
    pub log_offset: Option<u64>,
    /// Bytes put over the structure before its checksum is made: offset in the 4096 bytes, bytes.
    pub patches: Vec<(usize, Vec<u8>)>,
    /// Whether the checksum is right.
    pub checksum: Checksum,
}

impl Default for HeaderSpec {
    fn default() -> Self {
        Self {
            signature: *b"head",
            sequence: 7,
            file_write_guid: Guid::seeded(1),
            data_write_guid: Guid::seeded(2),
            log_guid: Guid::ZERO,
            log_version: 0,
            version: 1,
            log_length: None,
            log_offset: None,
            patches: Vec::new(),
            checksum: Checksum::Correct,
        }
    }
}

impl HeaderSpec {
    /// Whether signature and checksum are right, as far as the fields tell.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.signature == *b"head" && self.checksum == Checksum::Correct
    }

    /// The 4096 bytes, with the given place of the log where the specification leaves it open.
    #[must_use]
    pub fn encode(&self, log_offset: u64, log_length: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        put(&mut bytes, 0, &self.signature);
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write_guid.0);
        put(&mut bytes, 32, &self.data_write_guid.0);
        put(&mut bytes, 48, &self.log_guid.0);
        put(&mut bytes, 64, &self.log_version.to_le_bytes());
        put(&mut bytes, 66, &self.version.to_le_bytes());
        put(&mut bytes, 68, &self.log_length.unwrap_or(log_length).to_le_bytes());
        put(&mut bytes, 72, &self.log_offset.unwrap_or(log_offset).to_le_bytes());
        for (offset, patch) in &self.patches {
            put(&mut bytes, *offset, patch);
        }
        self.checksum.apply(&mut bytes);
        bytes
    }
}

/// One entry of a region table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Which region.
    pub guid: Guid,
    /// Its file offset; `None` is where the builder put it.
    pub offset: Option<u64>,
    /// Its length in bytes; `None` is what the builder gave it.
    pub length: Option<u32>,
    /// 1: who does not know the region must not open the file.
    pub required: u32,
}

impl RegionSpec {
    /// An entry for a region that the builder places.
    #[must_use]
    pub fn new(guid: Guid) -> Self {
        Self { guid, offset: None, length: None, required: 1 }
    }

    /// An entry with all fields.
    #[must_use]
    pub fn at(guid: Guid, offset: u64, length: u32, required: u32) -> Self {
        Self { guid, offset: Some(offset), length: Some(length), required }
    }
}

/// One of the two region tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionTableSpec {
    /// `regi`.
    pub signature: [u8; 4],
    /// 0.
    pub reserved: u32,
    /// The entries.
    pub entries: Vec<RegionSpec>,
    /// The count to write instead of the number of entries.
    pub count_override: Option<u32>,
    /// Bytes put over the structure before its checksum is made: offset in the 65,536 bytes, bytes.
    pub patches: Vec<(usize, Vec<u8>)>,
    /// Whether the checksum is right.
    pub checksum: Checksum,
}

impl Default for RegionTableSpec {
    fn default() -> Self {
        Self {
            signature: *b"regi",
            reserved: 0,
            entries: vec![RegionSpec::new(Guid::BAT), RegionSpec::new(Guid::METADATA)],
            count_override: None,
            patches: Vec::new(),
            checksum: Checksum::Correct,
        }
    }
}

impl RegionTableSpec {
    /// The 65,536 bytes; `place` gives offset and length of a region whose entry leaves them open.
    #[must_use]
    pub fn encode(&self, place: impl Fn(Guid) -> (u64, u32)) -> Vec<u8> {
        let mut bytes = vec![0; 65_536];
        put(&mut bytes, 0, &self.signature);
        put(&mut bytes, 8, &self.count_override.unwrap_or(self.entries.len() as u32).to_le_bytes());
        put(&mut bytes, 12, &self.reserved.to_le_bytes());
        for (index, entry) in self.entries.iter().take(2047).enumerate() {
            let (offset, length) = place(entry.guid);
            let start = 16 + index * 32;
            put(&mut bytes, start, &entry.guid.0);
            put(&mut bytes, start + 16, &entry.offset.unwrap_or(offset).to_le_bytes());
            put(&mut bytes, start + 24, &entry.length.unwrap_or(length).to_le_bytes());
            put(&mut bytes, start + 28, &entry.required.to_le_bytes());
        }
        for (offset, patch) in &self.patches {
            put(&mut bytes, *offset, patch);
        }
        self.checksum.apply(&mut bytes);
        bytes
    }
}

/// Flag of a metadata item: it belongs to the user, not to the system.
pub const ITEM_IS_USER: u32 = 1;
/// Flag of a metadata item: it belongs to the virtual disk, not to the file.
pub const ITEM_IS_VIRTUAL_DISK: u32 = 2;
/// Flag of a metadata item: who does not know it must not open the file.
pub const ITEM_IS_REQUIRED: u32 = 4;

/// One metadata item with its table entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemSpec {
    /// Which item.
    pub guid: Guid,
    /// Offset from the start of the region; `None` packs it behind the item before.
    pub offset: Option<u32>,
    /// The length to write instead of the length of the data.
    pub length: Option<u32>,
    /// The flag bits.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
    /// The bytes; `None` is what the builder's fields say, for the six known items.
    pub data: Option<Vec<u8>>,
}

impl ItemSpec {
    /// A known item that the builder fills.
    #[must_use]
    pub fn known(guid: Guid, flags: u32) -> Self {
        Self { guid, offset: None, length: None, flags, reserved: 0, data: None }
    }

    /// An item with these bytes.
    #[must_use]
    pub fn new(guid: Guid, flags: u32, data: &[u8]) -> Self {
        Self { data: Some(data.to_vec()), ..Self::known(guid, flags) }
    }
}

/// The metadata table with its items.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataSpec {
    /// `metadata`.
    pub signature: [u8; 8],
    /// 0.
    pub reserved: u16,
    /// 0.
    pub reserved2: [u8; 20],
    /// The items.
    pub entries: Vec<ItemSpec>,
    /// The count to write instead of the number of items.
    pub count_override: Option<u16>,
}

impl Default for MetadataSpec {
    fn default() -> Self {
        Self {
            signature: *b"metadata",
            reserved: 0,
            reserved2: [0; 20],
            entries: vec![
                ItemSpec::known(Guid::FILE_PARAMETERS, ITEM_IS_REQUIRED),
                ItemSpec::known(Guid::VIRTUAL_DISK_SIZE, ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED),
                ItemSpec::known(Guid::LOGICAL_SECTOR_SIZE, ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED),
                ItemSpec::known(Guid::PHYSICAL_SECTOR_SIZE, ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED),
                ItemSpec::known(Guid::VIRTUAL_DISK_ID, ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED),
            ],
            count_override: None,
        }
    }
}

impl MetadataSpec {
    /// The item with this GUID, for changes; panics if there is none.
    pub fn item(&mut self, guid: Guid) -> &mut ItemSpec {
        self.entries.iter_mut().find(|item| item.guid == guid).expect("the metadata has this item")
    }

    /// Takes the items with this GUID out.
    pub fn remove(&mut self, guid: Guid) {
        self.entries.retain(|item| item.guid != guid);
    }
}

/// One key and value of a parent locator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocatorPair {
    /// The key in UTF-16 units.
    pub key: Vec<u16>,
    /// The value in UTF-16 units.
    pub value: Vec<u16>,
    /// The key offset to write instead of the real one.
    pub key_offset: Option<u32>,
    /// The value offset to write instead of the real one.
    pub value_offset: Option<u32>,
    /// The key length in bytes to write instead of the real one.
    pub key_length: Option<u16>,
    /// The value length in bytes to write instead of the real one.
    pub value_length: Option<u16>,
    /// The twelve bytes of the entry to write instead of all of these.
    pub raw: Option<[u8; 12]>,
}

impl LocatorPair {
    /// A pair from text.
    #[must_use]
    pub fn new(key: &str, value: &str) -> Self {
        Self { key: key.encode_utf16().collect(), value: value.encode_utf16().collect(), ..Self::default() }
    }

    /// A pair from UTF-16 units, which need not be valid.
    #[must_use]
    pub fn units(key: &[u16], value: &[u16]) -> Self {
        Self { key: key.to_vec(), value: value.to_vec(), ..Self::default() }
    }
}

/// A parent locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatorSpec {
    /// The type; one is defined.
    pub locator_type: Guid,
    /// 0.
    pub reserved: u16,
    /// The keys and values.
    pub pairs: Vec<LocatorPair>,
    /// The count to write instead of the number of pairs.
    pub count_override: Option<u16>,
    /// Bytes behind the last string.
    pub trailing: Vec<u8>,
}

impl Default for LocatorSpec {
    fn default() -> Self {
        Self {
            locator_type: Guid::VHDX_LOCATOR,
            reserved: 0,
            pairs: Vec::new(),
            count_override: None,
            trailing: Vec::new(),
        }
    }
}

impl LocatorSpec {
    /// A locator with the identity of the parent and one relative path.
    #[must_use]
    pub fn new(parent_data_write_guid: Guid, relative_path: &str) -> Self {
        Self::default().pair("parent_linkage", &parent_data_write_guid.braced()).pair("relative_path", relative_path)
    }

    /// Adds a pair.
    #[must_use]
    pub fn pair(mut self, key: &str, value: &str) -> Self {
        self.pairs.push(LocatorPair::new(key, value));
        self
    }

    /// Takes the pairs with this key out.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.pairs.retain(|pair| String::from_utf16_lossy(&pair.key) != key);
        self
    }

    /// The bytes of the item.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let strings_start = 20 + 12 * self.pairs.len();
        let mut bytes = vec![0; strings_start];
        put(&mut bytes, 0, &self.locator_type.0);
        put(&mut bytes, 16, &self.reserved.to_le_bytes());
        put(&mut bytes, 18, &self.count_override.unwrap_or(self.pairs.len() as u16).to_le_bytes());
        for (index, pair) in self.pairs.iter().enumerate() {
            let key_offset = bytes.len() as u32;
            bytes.extend(pair.key.iter().flat_map(|unit| unit.to_le_bytes()));
            let value_offset = bytes.len() as u32;
            bytes.extend(pair.value.iter().flat_map(|unit| unit.to_le_bytes()));
            let start = 20 + 12 * index;
            put(&mut bytes, start, &pair.key_offset.unwrap_or(key_offset).to_le_bytes());
            put(&mut bytes, start + 4, &pair.value_offset.unwrap_or(value_offset).to_le_bytes());
            put(&mut bytes, start + 8, &pair.key_length.unwrap_or(pair.key.len() as u16 * 2).to_le_bytes());
            put(&mut bytes, start + 10, &pair.value_length.unwrap_or(pair.value.len() as u16 * 2).to_le_bytes());
            if let Some(raw) = pair.raw {
                put(&mut bytes, start, &raw);
            }
        }
        bytes.extend(&self.trailing);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u32 {
        u32::from_le_bytes(bytes[4..8].try_into().unwrap())
    }

    #[test]
    fn the_checksum_is_the_castagnoli_one() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c::crc32c(&[0; 4096]), 0x98F9_4189);
        assert_eq!(crc32c::crc32c(&[0; 65_536]), 0x72C0_C4A4);
    }

    #[test]
    fn headers_match_the_published_vectors() {
        let bare = HeaderSpec { file_write_guid: Guid::ZERO, data_write_guid: Guid::ZERO, ..HeaderSpec::default() };
        let encode = |sequence| HeaderSpec { sequence, ..bare.clone() }.encode(MIB, MIB as u32);
        assert_eq!(checksum(&encode(1)), 0xF1FD_4713);
        assert_eq!(checksum(&encode(0)), 0x7305_DB64);
        let wrong = HeaderSpec { checksum: Checksum::Wrong, sequence: 1, ..bare.clone() }.encode(MIB, MIB as u32);
        assert_eq!(checksum(&wrong), !0xF1FD_4713);
    }

    #[test]
    fn region_tables_match_the_published_vectors() {
        let windows = RegionTableSpec::default();
        let bytes = windows.encode(|guid| (if guid == Guid::BAT { 3 * MIB } else { 2 * MIB }, MIB as u32));
        assert_eq!(checksum(&bytes), 0xC66B_8CAE);
        let mut other = RegionTableSpec::default();
        for (entry, offset) in other.entries.iter_mut().zip([2 * MIB, 3 * MIB]) {
            *entry = RegionSpec::at(entry.guid, offset, MIB as u32, 0);
        }
        assert_eq!(checksum(&other.encode(|_| (0, 0))), 0x2C6F_CE83);
    }

    #[test]
    fn a_locator_has_its_strings_where_the_entries_say() {
        let bytes = LocatorSpec::new(Guid::BAT, "..\\a.vhdx").encode();
        assert_eq!(bytes[18..20], [2, 0]);
        let entry = &bytes[32..44];
        let key = u32::from_le_bytes(entry[0..4].try_into().unwrap()) as usize;
        let value = u32::from_le_bytes(entry[4..8].try_into().unwrap()) as usize;
        assert_eq!(entry[8..12], [26, 0, 18, 0]);
        assert_eq!(bytes[key..key + 4], *b"r\0e\0");
        assert_eq!(bytes[value..value + 4], *b".\0.\0");
        assert_eq!(value + 18, bytes.len());
    }
}
