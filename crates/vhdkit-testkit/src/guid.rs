//! GUIDs as the format stores them: the first three fields little-endian, the last eight bytes as written.

use std::fmt;

use crate::rng::Rng;

/// A GUID by its sixteen stored bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The nil GUID.
    pub const ZERO: Self = Self([0; 16]);
    /// The BAT region.
    pub const BAT: Self =
        Self([0x66, 0x77, 0xC2, 0x2D, 0x23, 0xF6, 0x00, 0x42, 0x9D, 0x64, 0x11, 0x5E, 0x9B, 0xFD, 0x4A, 0x08]);
    /// The metadata region.
    pub const METADATA: Self =
        Self([0x06, 0xA2, 0x7C, 0x8B, 0x90, 0x47, 0x9A, 0x4B, 0xB8, 0xFE, 0x57, 0x5F, 0x05, 0x0F, 0x88, 0x6E]);
    /// The metadata item with block size and flags.
    pub const FILE_PARAMETERS: Self =
        Self([0x37, 0x67, 0xA1, 0xCA, 0x36, 0xFA, 0x43, 0x4D, 0xB3, 0xB6, 0x33, 0xF0, 0xAA, 0x44, 0xE7, 0x6B]);
    /// The metadata item with the virtual disk size.
    pub const VIRTUAL_DISK_SIZE: Self =
        Self([0x24, 0x42, 0xA5, 0x2F, 0x1B, 0xCD, 0x76, 0x48, 0xB2, 0x11, 0x5D, 0xBE, 0xD8, 0x3B, 0xF4, 0xB8]);
    /// The metadata item with the disk's identity for SCSI page 83.
    pub const VIRTUAL_DISK_ID: Self =
        Self([0xAB, 0x12, 0xCA, 0xBE, 0xE6, 0xB2, 0x23, 0x45, 0x93, 0xEF, 0xC3, 0x09, 0xE0, 0x00, 0xC7, 0x46]);
    /// The metadata item with the logical sector size.
    pub const LOGICAL_SECTOR_SIZE: Self =
        Self([0x1D, 0xBF, 0x41, 0x81, 0x6F, 0xA9, 0x09, 0x47, 0xBA, 0x47, 0xF2, 0x33, 0xA8, 0xFA, 0xAB, 0x5F]);
    /// The metadata item with the physical sector size.
    pub const PHYSICAL_SECTOR_SIZE: Self =
        Self([0xC7, 0x48, 0xA3, 0xCD, 0x5D, 0x44, 0x71, 0x44, 0x9C, 0xC9, 0xE9, 0x88, 0x52, 0x51, 0xC5, 0x56]);
    /// The metadata item that names the parent.
    pub const PARENT_LOCATOR: Self =
        Self([0x2D, 0x5F, 0xD3, 0xA8, 0x0B, 0xB3, 0x4D, 0x45, 0xAB, 0xF7, 0xD3, 0xD8, 0x48, 0x34, 0xAB, 0x0C]);
    /// The only defined type of parent locator.
    pub const VHDX_LOCATOR: Self =
        Self([0xB7, 0xEF, 0x4A, 0xB0, 0x9E, 0xD1, 0x81, 0x4A, 0xB7, 0x89, 0x25, 0xB8, 0xE9, 0x44, 0x59, 0x13]);
    /// Item of Microsoft's own: disk geometry in cylinders, heads and sectors.
    pub const CHS_PARAMETERS: Self =
        Self([0xBC, 0xD7, 0x02, 0xDA, 0x3A, 0x3D, 0x3C, 0x42, 0xAC, 0x88, 0x2A, 0x36, 0xAB, 0x21, 0x47, 0x9B]);
    /// Item of Microsoft's own: marks a file whose creation never finished.
    pub const INCOMPLETE_FILE: Self =
        Self([0xF0, 0x85, 0xCC, 0x71, 0x69, 0x1B, 0x28, 0x4E, 0x95, 0x58, 0xC3, 0xBF, 0x83, 0xAE, 0x75, 0xD3]);
    /// Item of Microsoft's own: label storage of a persistent-memory disk.
    pub const PMEM_LABELS: Self =
        Self([0x8A, 0xAE, 0xE1, 0x10, 0x7E, 0x4B, 0x69, 0x41, 0xA4, 0x0F, 0xCD, 0x70, 0xDE, 0x92, 0x83, 0x93]);

    /// Reads the text form, with or without braces; panics on anything else.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let digits: Vec<u8> = text
            .trim_start_matches('{')
            .trim_end_matches('}')
            .chars()
            .filter(|character| *character != '-')
            .map(|character| character.to_digit(16).expect("a GUID is made of hexadecimal digits") as u8)
            .collect();
        assert_eq!(digits.len(), 32, "a GUID has 32 digits: {text}");
        let written: Vec<u8> = digits.chunks(2).map(|pair| pair[0] * 16 + pair[1]).collect();
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        Self(order.map(|position| written[position]))
    }

    /// A GUID that `seed` names; never nil.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        let mut bytes = [0; 16];
        Rng::new(seed ^ 0x6775_6964).fill(&mut bytes);
        Self(bytes)
    }

    /// The text form as parent locators hold it: lower case, with braces.
    #[must_use]
    pub fn braced(&self) -> String {
        format!("{{{self}}}")
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        for (position, source) in order.into_iter().enumerate() {
            if matches!(position, 4 | 6 | 8 | 10) {
                formatter.write_str("-")?;
            }
            write!(formatter, "{:02x}", self.0[source])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Guid({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::Guid;

    #[test]
    fn text_and_bytes_agree_with_the_table() {
        let table = [
            ("2DC27766-F623-4200-9D64-115E9BFD4A08", Guid::BAT),
            ("8B7CA206-4790-4B9A-B8FE-575F050F886E", Guid::METADATA),
            ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", Guid::FILE_PARAMETERS),
            ("2FA54224-CD1B-4876-B211-5DBED83BF4B8", Guid::VIRTUAL_DISK_SIZE),
            ("BECA12AB-B2E6-4523-93EF-C309E000C746", Guid::VIRTUAL_DISK_ID),
            ("8141BF1D-A96F-4709-BA47-F233A8FAAB5F", Guid::LOGICAL_SECTOR_SIZE),
            ("CDA348C7-445D-4471-9CC9-E9885251C556", Guid::PHYSICAL_SECTOR_SIZE),
            ("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", Guid::PARENT_LOCATOR),
            ("B04AEFB7-D19E-4A81-B789-25B8E9445913", Guid::VHDX_LOCATOR),
            ("DA02D7BC-3D3A-423C-AC88-2A36AB21479B", Guid::CHS_PARAMETERS),
            ("71CC85F0-1B69-4E28-9558-C3BF83AE75D3", Guid::INCOMPLETE_FILE),
            ("10E1AE8A-4B7E-4169-A40F-CD70DE928393", Guid::PMEM_LABELS),
        ];
        for (text, guid) in table {
            assert_eq!(Guid::parse(text), guid);
            assert_eq!(guid.to_string(), text.to_lowercase());
            assert_eq!(Guid::parse(&guid.braced()), guid);
        }
    }
}
