//! The region table in its two copies, and the metadata table.

use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{Planner, Step};
use crate::error::{Error, Result};
use crate::format::HEADER_SECTION_BYTES;
use crate::format::checksum::checksum;
use crate::format::finding::{Code, CollectAll, Finding, Findings, Severity};
use crate::format::metadata::{self, FLAG_USER, Metadata};
use crate::format::region::{self, BAT_GUID, METADATA_GUID, RegionTable, decode_tables};
use crate::format::space::TakenSpace;
use crate::units::{MIB, round_up};

impl Planner {
    /// Chooses the copy of the region table that counts, and writes it over the other (V-060 to V-074).
    pub(super) fn region_tables(&mut self) -> Result<Step> {
        let copies = [
            self.bytes(region::OFFSETS[0], region::TABLE_BYTES)?,
            self.bytes(region::OFFSETS[1], region::TABLE_BYTES)?,
        ];
        let mut findings = CollectAll::default();
        let decoded = self.decode_regions([&copies[0], &copies[1]], &mut findings);
        let found = findings.findings().to_vec();
        let valid = match &decoded {
            Ok(table) => table.valid,
            Err(error) if error.code() == Some(Code::RegionTablesDamaged) => return Ok(Step::Stop),
            Err(error) if error.code().is_none() => return Ok(Step::Stop),
            Err(_) => {
                let damaged = found.iter().find(|finding| finding.code() == Code::RegionCopyDamaged);
                let first = damaged.and_then(|finding| finding.location().offset()) == Some(region::OFFSETS[0]);
                [!first, first || damaged.is_none()]
            }
        };
        let chosen = match valid {
            [true, false] => 0,
            [false, true] => 1,
            _ if copies[0] == copies[1] || self.makes_sense(&copies[0])? => 0,
            _ if self.makes_sense(&copies[1])? => 1,
            _ => 0,
        };
        let Some(mut table) = copies.get(chosen).cloned() else { return Ok(Step::Stop) };
        if chosen == 0 || valid == [false, true] {
            for finding in found {
                self.region_finding(finding, &mut table)?;
            }
        } else if let Some(finding) = found.into_iter().find(|finding| finding.code() == Code::RegionCopiesDiffer) {
            let what = "copy 2 is written over copy 1, which leads to no metadata while copy 2 does";
            self.act(finding, what, None);
        }
        seal(&mut table);
        for (copy, offset) in copies.iter().zip(region::OFFSETS) {
            if *copy != table {
                self.draft.write(offset, &table)?;
            }
        }
        Ok(Step::Next)
    }

    fn region_finding(&mut self, finding: Finding, table: &mut [u8]) -> Result<()> {
        match finding.code() {
            Code::RegionCopyDamaged => self.act(finding, "the good copy is written over it", None),
            Code::RegionCopiesDiffer => self.act(finding, "copy 1, which counts, is written over copy 2", None),
            Code::RegionReserved => {
                change_table_header(table, |header| header.reserved = 0.into());
                self.act(finding, "the reserved field becomes zero", None);
            }
            Code::RegionRequiredFlag => {
                change_entries(table, |entry| {
                    let known = entry.guid == BAT_GUID || entry.guid == METADATA_GUID;
                    entry.required = if known { 1 } else { entry.required.get() & 1 }.into();
                });
                self.act(finding, "the field becomes what the format says", None);
            }
            Code::RegionOptionalOutsideFile => self.lengthen_for_region(finding, table),
            _ => {}
        }
        Ok(())
    }

    /// Makes the file long enough for a region that nobody here understands: what it held is gone in any case.
    fn lengthen_for_region(&mut self, finding: Finding, table: &mut [u8]) {
        let size = self.draft.length();
        let mut wanted = size;
        change_entries(table, |entry| {
            let end = entry.file_offset.get().checked_add(u64::from(entry.length.get()));
            wanted = wanted.max(end.unwrap_or(u64::MAX));
        });
        let Some(wanted) = round_up(wanted, MIB).filter(|wanted| wanted - size <= self.options.growth_max) else {
            return;
        };
        if wanted > size && !self.is_resizable() {
            return;
        }
        self.draft.set_length(wanted);
        let lost = "what the region held behind the end of the file";
        self.act(finding, format!("the file is made {wanted:#x} bytes long"), Some(lost.to_owned()));
    }

    fn decode_regions(&self, copies: [&[u8]; 2], findings: &mut dyn Findings) -> Result<RegionTable> {
        let mut taken = TakenSpace::default();
        let _ = taken.add(0..HEADER_SECTION_BYTES, "header section"); // nothing else is there yet
        if let Some(header) = &self.header {
            let log = header.log_offset..header.log_offset.saturating_add(u64::from(header.log_length));
            let _ = taken.add(log, "log");
        }
        decode_tables(copies, self.draft.length(), &mut taken, findings)
    }

    /// True when a copy of the region table leads to metadata in which nothing is wrong.
    fn makes_sense(&self, copy: &[u8]) -> Result<bool> {
        let mut findings = CollectAll::default();
        let decoded = self.decode_regions([copy, copy], &mut findings);
        let Ok(table) = decoded else { return Ok(false) };
        let metadata = self.decode_metadata(&table, &mut findings);
        match metadata {
            Ok(_) => Ok(findings.count(Severity::Error) == 0),
            Err(error) if error.code().is_some() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn decode_metadata(&self, table: &RegionTable, findings: &mut dyn Findings) -> Result<Metadata> {
        let region = table.metadata;
        let mut read = |range: std::ops::Range<u64>| {
            let length = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX); // items: 1 MiB at most
            self.bytes(region.file_offset + range.start, length) // inside the region
        };
        metadata::decode(&region, &mut read, findings)
    }

    /// Mends reserved fields and flags of the metadata table (V-082, V-083, V-086, V-096, V-104).
    pub(super) fn metadata(&mut self) -> Result<Step> {
        let first = self.bytes(region::OFFSETS[0], region::TABLE_BYTES)?;
        let second = self.bytes(region::OFFSETS[1], region::TABLE_BYTES)?;
        let mut findings = CollectAll::default();
        let Ok(regions) = self.decode_regions([&first, &second], &mut findings) else { return Ok(Step::Stop) };
        let mut findings = CollectAll::default();
        let decoded = self.decode_metadata(&regions, &mut findings);
        if decoded.as_ref().is_err_and(|error| error.code().is_none()) {
            return decoded.map(|_| Step::Stop);
        }
        let offset = regions.metadata.file_offset;
        let before = self.bytes(offset, metadata::TABLE_BYTES)?;
        let mut table = before.clone();
        for finding in findings.findings() {
            let finding = finding.clone();
            match finding.code() {
                Code::MetadataReserved => {
                    if let Ok((header, _)) = metadata::RawTableHeader::mut_from_prefix(&mut table) {
                        header.reserved = 0.into();
                        header.reserved2 = [0; 20];
                    }
                    self.act(finding, "the reserved fields become zero", None);
                }
                Code::MetadataEntryReserved => {
                    change_items(&mut table, |entry| {
                        entry.flags = (entry.flags.get() & 7).into();
                        entry.reserved2 = 0.into();
                    });
                    self.act(finding, "the reserved bits become zero", None);
                }
                Code::MetadataEmptyOffset => {
                    change_items(&mut table, |entry| {
                        if entry.length.get() == 0 {
                            entry.offset = 0.into();
                        }
                    });
                    self.act(finding, "the offset becomes zero", None);
                }
                Code::MetadataFlags => {
                    change_items(&mut table, |entry| {
                        let flags = metadata::flags_of(entry.item_id).filter(|_| entry.flags.get() & FLAG_USER == 0);
                        entry.flags = flags.unwrap_or(entry.flags.get()).into();
                    });
                    self.act(finding, "the flags become those that the format gives the item", None);
                }
                Code::FileParametersReserved => self.file_parameters(offset, finding)?,
                Code::ParentLocatorUnexpected => self.parent_doubtful = true,
                _ => {}
            }
        }
        if table != before {
            self.draft.write(offset, &table)?;
        }
        Ok(if decoded.is_ok() { Step::Next } else { Step::Stop })
    }

    fn file_parameters(&mut self, region: u64, finding: Finding) -> Result<()> {
        let Some(place) = finding.location().offset().filter(|place| *place >= region) else { return Ok(()) };
        let bytes = self.bytes(place, size_of::<metadata::RawFileParameters>())?;
        let Ok(mut parameters) = metadata::RawFileParameters::read_from_bytes(&bytes) else { return Ok(()) };
        let known = metadata::LEAVE_BLOCKS_ALLOCATED | metadata::HAS_PARENT;
        parameters.flags = (parameters.flags.get() & known).into();
        self.draft.write(place, parameters.as_bytes())?;
        self.act(finding, "the reserved bits become zero", None);
        Ok(())
    }

    /// Bytes of the draft.
    pub(super) fn bytes(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let read = self.draft.read(&mut bytes, offset);
        read.map_err(|error| Error::io(format!("cannot read {length} bytes at {offset:#x} of the file"), error))?;
        Ok(bytes)
    }
}

/// Computes the checksum of a region table again.
fn seal(table: &mut [u8]) {
    let sum = checksum(table);
    change_table_header(table, |header| header.checksum = sum.into());
}

fn change_table_header(table: &mut [u8], change: impl FnOnce(&mut region::RawTableHeader)) {
    if let Ok((header, _)) = region::RawTableHeader::mut_from_prefix(table) {
        change(header);
    }
}

/// Changes every entry of a region table.
fn change_entries(table: &mut [u8], mut change: impl FnMut(&mut region::RawEntry)) {
    let Ok((header, mut rest)) = region::RawTableHeader::mut_from_prefix(table) else { return };
    for _ in 0..header.entry_count.get().min(region::ENTRIES_MAX) {
        let Ok((entry, tail)) = region::RawEntry::mut_from_prefix(rest) else { return };
        change(entry);
        rest = tail;
    }
}

/// Changes every entry of a metadata table.
fn change_items(table: &mut [u8], mut change: impl FnMut(&mut metadata::RawEntry)) {
    let Ok((header, mut rest)) = metadata::RawTableHeader::mut_from_prefix(table) else { return };
    for _ in 0..header.entry_count.get().min(metadata::ENTRIES_MAX) {
        let Ok((entry, tail)) = metadata::RawEntry::mut_from_prefix(rest) else { return };
        change(entry);
        rest = tail;
    }
}
