//! The parent locator: key and value pairs that name the parent ([MS-VHDX] 2.6.2.6).

use std::collections::HashSet;
use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::finding::{Code, Findings, Location};
use super::guid::Guid;
use crate::error::Result;
use crate::text::{escape, escape_utf16};

/// The only locator type that is defined.
pub const VHDX_LOCATOR: Guid = Guid::from_printed(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);
/// The parent's data write GUID when the child was made.
pub const KEY_LINKAGE: &str = "parent_linkage";
/// A second identity that is accepted, for merges.
pub const KEY_LINKAGE2: &str = "parent_linkage2";
/// The parent relative to the child's directory.
pub const KEY_RELATIVE_PATH: &str = "relative_path";
/// The parent by volume GUID.
pub const KEY_VOLUME_PATH: &str = "volume_path";
/// The parent by drive letter or UNC name.
pub const KEY_ABSOLUTE_PATH: &str = "absolute_win32_path";

/// The header of a parent locator.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawLocatorHeader {
    /// What kind of locator it is.
    pub locator_type: Guid,
    /// Zero.
    pub reserved: U16,
    /// Pairs that follow.
    pub key_value_count: U16,
}

/// Where one pair stands in the item.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawLocatorEntry {
    /// From the start of the item.
    pub key_offset: U32,
    /// From the start of the item.
    pub value_offset: U32,
    /// In bytes.
    pub key_length: U16,
    /// In bytes.
    pub value_length: U16,
}

const _: () = assert!(
    size_of::<RawLocatorHeader>() == 20
        && offset_of!(RawLocatorHeader, reserved) == 16
        && offset_of!(RawLocatorHeader, key_value_count) == 18
        && size_of::<RawLocatorEntry>() == 12
        && offset_of!(RawLocatorEntry, value_offset) == 4
        && offset_of!(RawLocatorEntry, key_length) == 8
        && offset_of!(RawLocatorEntry, value_length) == 10
);

/// A parent locator that was understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentLocator {
    pairs: Vec<(String, String)>,
    linkage: Option<Guid>,
    linkage2: Option<Guid>,
}

impl ParentLocator {
    /// A locator for a new child.
    #[must_use]
    pub fn new(linkage: Guid, paths: &[(&str, &str)]) -> Self {
        let mut pairs = vec![(KEY_LINKAGE.to_owned(), format!("{{{linkage}}}"))];
        pairs.extend(paths.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        Self { pairs, linkage: Some(linkage), linkage2: None }
    }

    /// The same locator that accepts this identity of its parent, and no other.
    #[must_use]
    pub fn with_linkage(&self, linkage: Guid) -> Self {
        let named = [KEY_LINKAGE, KEY_LINKAGE2];
        let mut pairs = vec![(KEY_LINKAGE.to_owned(), format!("{{{linkage}}}"))];
        pairs.extend(self.pairs.iter().filter(|(key, _)| !named.contains(&key.as_str())).cloned());
        Self { pairs, linkage: Some(linkage), linkage2: None }
    }

    /// The same locator that also accepts another identity, as merges need it ([MS-VHDX] 2.6.2.6, `parent_linkage2`).
    #[must_use]
    pub fn with_linkage2(&self, linkage2: Guid) -> Self {
        let mut pairs: Vec<(String, String)> =
            self.pairs.iter().filter(|(key, _)| key != KEY_LINKAGE2).cloned().collect();
        pairs.push((KEY_LINKAGE2.to_owned(), format!("{{{linkage2}}}")));
        Self { pairs, linkage: self.linkage, linkage2: Some(linkage2) }
    }

    /// The value of a key; keys are case-sensitive.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(other, _)| other == key).map(|(_, value)| value.as_str())
    }

    /// All pairs, in the order of the item.
    #[must_use]
    pub fn pairs(&self) -> &[(String, String)] {
        &self.pairs
    }

    /// The data write GUID that the parent had when the child was made.
    #[must_use]
    pub const fn linkage(&self) -> Option<Guid> {
        self.linkage
    }

    /// The second identity that is accepted; all zero, as Windows writes it, means none.
    #[must_use]
    pub fn linkage2(&self) -> Option<Guid> {
        self.linkage2.filter(|guid| !guid.is_nil())
    }

    /// True when a parent with this data write GUID is the right one. An all-zero linkage identifies nothing.
    #[must_use]
    pub fn accepts(&self, data_write_guid: Guid) -> bool {
        let matches = |linkage: Option<Guid>| linkage.is_some_and(|guid| !guid.is_nil() && guid == data_write_guid);
        matches(self.linkage) || matches(self.linkage2)
    }

    /// The bytes of the metadata item.
    ///
    /// `None` when a key or value is empty or too long for its 16-bit length, or there are more than 65,535 pairs.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let header = RawLocatorHeader {
            locator_type: VHDX_LOCATOR,
            reserved: U16::ZERO,
            key_value_count: u16::try_from(self.pairs.len()).ok()?.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        let mut text = Vec::new();
        let text_start = size_of::<RawLocatorHeader>() + self.pairs.len() * size_of::<RawLocatorEntry>();
        let mut append = |value: &str| -> Option<(u32, u16)> {
            let offset = u32::try_from(text_start + text.len()).ok()?;
            let encoded: Vec<u8> = value.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let length = u16::try_from(encoded.len()).ok().filter(|length| *length > 0)?;
            text.extend_from_slice(&encoded);
            Some((offset, length))
        };
        for (key, value) in &self.pairs {
            let (key_offset, key_length) = append(key)?;
            let (value_offset, value_length) = append(value)?;
            let entry = RawLocatorEntry {
                key_offset: key_offset.into(),
                value_offset: value_offset.into(),
                key_length: key_length.into(),
                value_length: value_length.into(),
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        bytes.extend_from_slice(&text);
        Some(bytes)
    }

    /// Reads the item (V-140 to V-150). `place` is where it stands.
    ///
    /// # Errors
    /// When it cannot be understood at all, or the collector stops at a finding.
    pub fn decode(item: &[u8], place: &Location, findings: &mut dyn Findings) -> Result<Self> {
        let Ok((header, mut rest)) = RawLocatorHeader::ref_from_prefix(item) else {
            let detail = format!("{} bytes are too few for a parent locator", item.len());
            return Err(findings.fatal(Code::LocatorLength, place.clone(), detail));
        };
        if header.locator_type != VHDX_LOCATOR {
            let detail = format!("locator type {} is unknown", header.locator_type);
            return Err(findings.fatal(Code::LocatorType, place.clone(), detail));
        }
        if header.reserved.get() != 0 {
            let detail = format!("reserved field is {:#x}", header.reserved.get());
            findings.report(Code::LocatorReserved, place.clone(), detail)?;
        }
        let count = usize::from(header.key_value_count.get());
        if count * size_of::<RawLocatorEntry>() > rest.len() {
            let detail = format!("claims {count} pairs; the item has {} bytes", item.len());
            return Err(findings.fatal(Code::LocatorCount, place.clone(), detail));
        }
        let mut locator = Self::default();
        let mut seen = HashSet::new();
        let mut text_bytes = 0;
        for index in 0..count {
            let Ok((entry, tail)) = RawLocatorEntry::ref_from_prefix(rest) else { break };
            rest = tail;
            // Pairs that share their bytes could claim gigabytes of text out of an item of 1 MiB.
            text_bytes += claimed_bytes(item, entry); // at most 65,535 pairs of 128 KiB
            if text_bytes > item.len() {
                let detail = format!("the first {} pairs hold more text than the item has bytes", index + 1);
                return Err(findings.fatal(Code::LocatorRange, place.clone(), detail));
            }
            if let Some(pair) = decode_pair(item, entry, index, place, findings)? {
                locator.add(pair, &mut seen, place, findings)?;
            }
        }
        locator.check(place, findings)?;
        Ok(locator)
    }

    fn add(
        &mut self,
        pair: (String, String),
        seen: &mut HashSet<String>,
        place: &Location,
        findings: &mut dyn Findings,
    ) -> Result<()> {
        if !seen.insert(pair.0.clone()) {
            let detail = format!("key \"{}\" occurs twice", escape(&pair.0));
            return findings.report(Code::LocatorDuplicate, place.clone(), detail);
        }
        self.pairs.push(pair);
        Ok(())
    }

    /// Checks what the known keys must hold.
    fn check(&mut self, place: &Location, findings: &mut dyn Findings) -> Result<()> {
        match self.get(KEY_LINKAGE).map(str::parse) {
            Some(Ok(guid)) => self.linkage = Some(guid),
            Some(Err(_)) => {
                let text = escape(self.get(KEY_LINKAGE).unwrap_or_default()).into_owned();
                let detail = format!("parent_linkage \"{text}\" is not a GUID");
                findings.report(Code::LocatorLinkage, place.clone(), detail)?;
            }
            None => {
                let detail = "parent_linkage is missing".to_owned();
                findings.report(Code::LocatorLinkage, place.clone(), detail)?;
            }
        }
        match self.get(KEY_LINKAGE2).map(str::parse) {
            Some(Ok(guid)) => self.linkage2 = Some(guid),
            Some(Err(_)) => {
                let text = escape(self.get(KEY_LINKAGE2).unwrap_or_default()).into_owned();
                let detail = format!("parent_linkage2 \"{text}\" is not a GUID");
                findings.report(Code::LocatorLinkage2, place.clone(), detail)?;
            }
            None => {}
        }
        Ok(())
    }

    /// Checks that some path leads to the parent (V-150). Not part of [`ParentLocator::decode`], since an image can be
    /// opened without a path when the caller names the parent.
    ///
    /// # Errors
    /// When the collector stops at the finding.
    pub fn check_paths(&self, place: &Location, findings: &mut dyn Findings) -> Result<()> {
        if [KEY_RELATIVE_PATH, KEY_VOLUME_PATH, KEY_ABSOLUTE_PATH].iter().all(|key| self.get(key).is_none()) {
            return findings.report(Code::LocatorNoPath, place.clone(), "no path leads to the parent".to_owned());
        }
        Ok(())
    }
}

/// How much text of the item a pair claims; what lies outside is an error of its own.
fn claimed_bytes(item: &[u8], entry: &RawLocatorEntry) -> usize {
    let parts = [(entry.key_offset, entry.key_length), (entry.value_offset, entry.value_length)];
    let inside = parts.iter().map(|(offset, length)| (offset.get() as usize, usize::from(length.get())));
    let inside = inside.filter(|(offset, length)| offset.checked_add(*length).is_some_and(|end| end <= item.len()));
    inside.map(|(_, length)| length).sum()
}

/// Reads one pair; `None` when an error was reported for it.
fn decode_pair(
    item: &[u8],
    entry: &RawLocatorEntry,
    index: usize,
    place: &Location,
    findings: &mut dyn Findings,
) -> Result<Option<(String, String)>> {
    let key = text_at(item, entry.key_offset.get(), entry.key_length.get());
    let value = text_at(item, entry.value_offset.get(), entry.value_length.get());
    let mut usable = |text: Result<String, TextError>, what: &str| match text {
        Ok(text) => Ok(Some(text)),
        Err(TextError::Range) => {
            let detail = format!("{what} of pair {index} lies outside the item, is empty, or has an odd length");
            findings.report(Code::LocatorRange, place.clone(), detail).map(|()| None)
        }
        Err(TextError::Text(shown)) => {
            let detail = format!("{what} of pair {index} is not UTF-16 without NUL: \"{shown}\"");
            findings.report(Code::LocatorText, place.clone(), detail).map(|()| None)
        }
    };
    let (key, value) = (usable(key, "key")?, usable(value, "value")?);
    Ok(key.zip(value))
}

enum TextError {
    Range,
    Text(String),
}

/// The text of a key or value.
fn text_at(item: &[u8], offset: u32, length: u16) -> Result<String, TextError> {
    let start = offset as usize;
    let bytes = start.checked_add(usize::from(length)).and_then(|end| item.get(start..end)).ok_or(TextError::Range)?;
    let (pairs, odd) = bytes.as_chunks::<2>();
    if start == 0 || bytes.is_empty() || !odd.is_empty() {
        return Err(TextError::Range);
    }
    let units: Vec<u16> = pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
    match String::from_utf16(&units) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(TextError::Text(escape_utf16(&units))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{CollectAll, FailFast, Severity};
    use super::*;

    #[test]
    fn round_trip() {
        let locator = ParentLocator::new(Guid::random(), &[(KEY_RELATIVE_PATH, ".\\Straße\u{1f600}.vhdx")]);
        let bytes = locator.encode().unwrap();
        let decoded = ParentLocator::decode(&bytes, &Location::of("parent locator"), &mut FailFast::default()).unwrap();
        assert_eq!(decoded, locator);
        assert!(decoded.accepts(locator.linkage().unwrap()));
        assert!(!decoded.accepts(Guid::NIL));
    }

    #[test]
    fn a_zero_linkage_accepts_nothing() {
        let locator = ParentLocator::new(Guid::NIL, &[(KEY_RELATIVE_PATH, "a")]);
        assert!(!locator.accepts(Guid::NIL));
    }

    #[test]
    fn count_of_65535_neither_overflows_nor_allocates() {
        let mut bytes = ParentLocator::new(Guid::random(), &[(KEY_RELATIVE_PATH, "a")]).encode().unwrap();
        bytes[18..20].copy_from_slice(&[0xff, 0xff]);
        let mut findings = CollectAll::default();
        assert!(ParentLocator::decode(&bytes, &Location::of("parent locator"), &mut findings).is_err());
        assert_eq!(findings.findings()[0].code(), Code::LocatorCount);
        assert_eq!(findings.count(Severity::Error), 1);
    }
}
