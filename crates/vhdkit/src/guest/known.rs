//! What is recognised by a signature, whether or not it is understood.

use std::fmt;

use zerocopy::big_endian::U32;

use super::fat;
use super::table::PartitionType;
use super::window::{Checked, READ_BYTES_MAX, Window, parse};
use crate::format::guid::Guid;

/// What lies in a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VolumeKind {
    /// ext2.
    Ext2,
    /// ext3.
    Ext3,
    /// ext4.
    Ext4,
    /// NTFS.
    Ntfs,
    /// FAT with entries of 12 bits.
    Fat12,
    /// FAT with entries of 16 bits.
    Fat16,
    /// FAT with entries of 32 bits.
    Fat32,
    /// exFAT.
    ExFat,
    /// XFS.
    Xfs,
    /// Linux swap space.
    Swap,
    /// A physical volume of LVM.
    Lvm,
    /// A member of a Linux RAID.
    MdRaid,
    /// btrfs.
    Btrfs,
    /// A member of a ZFS pool.
    Zfs,
    /// LUKS encryption.
    Luks,
    /// BitLocker encryption.
    BitLocker,
    /// ReFS.
    Refs,
    /// F2FS.
    F2fs,
    /// An image of a disc (ISO 9660 or UDF).
    Iso9660,
    /// A Windows dynamic disk (LDM).
    DynamicDisk,
    /// A member of Storage Spaces.
    StorageSpaces,
    /// Something else that is only recognised.
    Other(&'static str),
    /// More than one thing at once.
    Several,
    /// Something unknown.
    Unknown,
    /// All of it reads as zero.
    Empty,
}

impl VolumeKind {
    /// Its name for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Ntfs => "NTFS",
            Self::Fat12 => "FAT12",
            Self::Fat16 => "FAT16",
            Self::Fat32 => "FAT32",
            Self::ExFat => "exFAT",
            Self::Xfs => "XFS",
            Self::Swap => "Linux swap",
            Self::Lvm => "LVM",
            Self::MdRaid => "Linux RAID",
            Self::Btrfs => "btrfs",
            Self::Zfs => "ZFS",
            Self::Luks => "LUKS",
            Self::BitLocker => "BitLocker",
            Self::Refs => "ReFS",
            Self::F2fs => "F2FS",
            Self::Iso9660 => "ISO 9660 or UDF",
            Self::DynamicDisk => "Windows dynamic disk",
            Self::StorageSpaces => "Storage Spaces",
            Self::Other(name) => name,
            Self::Several => "several",
            Self::Unknown => "unknown",
            Self::Empty => "empty",
        }
    }
}

impl fmt::Display for VolumeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How much of the beginning is looked at: the labels of ZFS end here.
const HEAD_BYTES: u64 = 512 << 10;
/// How much of the end is looked at: an old RAID superblock lies up to 128 KiB before it, ZFS 512 KiB, LDM 1 MiB.
const TAIL_BYTES: u64 = READ_BYTES_MAX;

/// Bytes at a fixed place from the beginning of a volume.
const SIGNATURES: &[(VolumeKind, usize, &[u8])] = &[
    // Those that are understood.
    (VolumeKind::Ext4, 0x438, &[0x53, 0xef]),
    (VolumeKind::Ntfs, 3, b"NTFS    "),
    (VolumeKind::ExFat, 3, b"EXFAT   "),
    (VolumeKind::Xfs, 0, b"XFSB"),
    // Those that are not file systems.
    (VolumeKind::Swap, 4096 - 10, b"SWAPSPACE2"),
    (VolumeKind::Swap, 8192 - 10, b"SWAPSPACE2"),
    (VolumeKind::Swap, 16384 - 10, b"SWAPSPACE2"),
    (VolumeKind::Swap, 32768 - 10, b"SWAPSPACE2"),
    (VolumeKind::Swap, 65536 - 10, b"SWAPSPACE2"),
    (VolumeKind::Swap, 4096 - 10, b"SWAP-SPACE"),
    (VolumeKind::Swap, 4096 - 10, b"S1SUSPEND"),
    (VolumeKind::Swap, 4096 - 10, b"S2SUSPEND"),
    (VolumeKind::Swap, 4096 - 10, b"ULSUSPEND"),
    (VolumeKind::Swap, 4096 - 10, b"LINHIB0001"),
    (VolumeKind::Lvm, 0, b"LABELONE"),
    (VolumeKind::Lvm, 512, b"LABELONE"),
    (VolumeKind::Lvm, 1024, b"LABELONE"),
    (VolumeKind::Lvm, 1536, b"LABELONE"),
    (VolumeKind::MdRaid, 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    (VolumeKind::MdRaid, 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    (VolumeKind::Luks, 0, b"LUKS\xba\xbe"),
    (VolumeKind::Luks, 0x4000, b"SKUL\xba\xbe"),
    (VolumeKind::Luks, 0x8000, b"SKUL\xba\xbe"),
    (VolumeKind::Luks, 0x10000, b"SKUL\xba\xbe"),
    (VolumeKind::Luks, 0x20000, b"SKUL\xba\xbe"),
    (VolumeKind::Luks, 0x40000, b"SKUL\xba\xbe"),
    (VolumeKind::BitLocker, 3, b"-FVE-FS-"),
    (VolumeKind::BitLocker, 0x1a8, b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01"),
    (VolumeKind::DynamicDisk, 6 * 512, b"PRIVHEAD"),
    (
        VolumeKind::Other("bcache or bcachefs"),
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    ),
    (
        VolumeKind::Other("bcache or bcachefs"),
        4096 + 24,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
    ),
    (VolumeKind::Other("dm-integrity"), 0, b"integrt\0"),
    (VolumeKind::Other("dm-verity"), 0, b"verity\0\0"),
    (VolumeKind::Other("VDO"), 0, b"dmvdo001"),
    (VolumeKind::Other("Stratis"), 512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh"),
    (VolumeKind::Other("Ceph BlueStore"), 0, b"bluestore block device"),
    // Other file systems.
    (VolumeKind::Btrfs, 65536 + 64, b"_BHRfS_M"),
    (VolumeKind::Refs, 3, b"ReFS\0\0\0\0"),
    (VolumeKind::F2fs, 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    (VolumeKind::F2fs, 4096 + 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    (VolumeKind::Iso9660, 32769, b"CD001"),
    (VolumeKind::Iso9660, 32769, b"BEA01"),
    (VolumeKind::Iso9660, 32769, b"NSR0"),
    (VolumeKind::Iso9660, 34817, b"NSR0"),
    (VolumeKind::Other("JFS"), 32768, b"JFS1"),
    (VolumeKind::Other("ReiserFS"), 65536 + 52, b"ReIsEr"),
    (VolumeKind::Other("ReiserFS"), 8192 + 52, b"ReIsEr"),
    (VolumeKind::Other("Reiser4"), 65536, b"ReIsEr4"),
    (VolumeKind::Other("NILFS2"), 1024, &[2, 0, 0, 0, 0, 0, 0x34, 0x34]),
    (VolumeKind::Other("HFS"), 1024, b"BD"),
    (VolumeKind::Other("HFS+"), 1024, b"H+"),
    (VolumeKind::Other("HFS+"), 1024, b"HX"),
    (VolumeKind::Other("APFS"), 32, b"NXSB"),
    (VolumeKind::Other("EROFS"), 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    (VolumeKind::Other("squashfs"), 0, b"hsqs"),
    (VolumeKind::Other("cramfs"), 0, &[0x45, 0x3d, 0xcd, 0x28]),
    (VolumeKind::Other("romfs"), 0, b"-rom1fs-"),
    (VolumeKind::Other("UFS"), 8192 + 1372, &[0x54, 0x19, 0x01, 0x00]),
    (VolumeKind::Other("UFS"), 8192 + 1372, &[0x00, 0x01, 0x19, 0x54]),
    (VolumeKind::Other("UFS"), 65536 + 1372, &[0x19, 0x01, 0x54, 0x19]),
    (VolumeKind::Other("OCFS2"), 1024, b"OCFSV2"),
    (VolumeKind::Other("OCFS2"), 2048, b"OCFSV2"),
    (VolumeKind::Other("OCFS2"), 4096, b"OCFSV2"),
    (VolumeKind::Other("OCFS2"), 8192, b"OCFSV2"),
    (VolumeKind::Other("GFS2"), 65536, &[0x01, 0x16, 0x19, 0x70]),
    (VolumeKind::Other("HPFS"), 8192, &[0x49, 0xe8, 0x95, 0xf9]),
];

/// Bytes at a fixed place before the end of a volume.
const SIGNATURES_AT_END: &[(VolumeKind, u64, &[u8])] = &[
    (VolumeKind::Other("DDF RAID"), 512, &[0xde, 0x11, 0xde, 0x11]),
    (VolumeKind::Other("Intel RAID"), 1024, b"Intel Raid ISM Cfg Sig. "),
    (VolumeKind::DynamicDisk, 512, b"PRIVHEAD"),
];

/// Where the uberblocks of a ZFS label lie, and how far one is from the next.
const ZFS_UBERBLOCKS: std::ops::Range<usize> = 128 << 10..256 << 10;
const ZFS_UBERBLOCK_BYTES: usize = 1024;
/// The first eight bytes of an uberblock, in either order.
const ZFS_MAGIC: [[u8; 8]; 2] = [[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c]];
/// Bytes of a ZFS label; there are two at each end.
const ZFS_LABEL_BYTES: usize = 256 << 10;
/// The magic number of a Linux RAID superblock, in either order.
const MD_MAGIC: [[u8; 4]; 2] = [[0xfc, 0x4e, 0x2b, 0xa9], [0xa9, 0x2b, 0x4e, 0xfc]];
/// The magic numbers of DRBD's metadata.
const DRBD_MAGIC: std::ops::RangeInclusive<u32> = 0x8374_0267..=0x8374_026f;

/// Everything whose signature lies in a volume, each once.
pub(super) fn scan(window: &Window<'_>) -> Checked<Vec<VolumeKind>> {
    let head = window.read_some(0, HEAD_BYTES)?;
    let tail_start = window.length().saturating_sub(TAIL_BYTES) & !511;
    let tail = window.read_some(tail_start, window.length() - tail_start)?;
    let mut found = Vec::new();
    let mut add = |kind| {
        if !found.contains(&kind) {
            found.push(kind);
        }
    };
    for (kind, offset, magic) in SIGNATURES {
        if head.get(*offset..).is_some_and(|rest| rest.starts_with(magic)) {
            add(*kind);
        }
    }
    if fat::looks_like(&head) && !found_boot_sector(&head) {
        add(VolumeKind::Fat32);
    }
    for (kind, back, magic) in SIGNATURES_AT_END {
        let Some(place) = window.length().checked_sub(*back) else { continue };
        if at(&tail, tail_start, place).starts_with(magic) {
            add(*kind);
        }
    }
    if is_md(&tail, tail_start, window.length()) {
        add(VolumeKind::MdRaid);
    }
    if is_zfs(&head) || is_zfs(tail.get(tail.len().saturating_sub(2 * ZFS_LABEL_BYTES)..).unwrap_or_default()) {
        add(VolumeKind::Zfs);
    }
    if is_drbd(at(&tail, tail_start, window.length().saturating_sub(4096))) {
        add(VolumeKind::Other("DRBD"));
    }
    Ok(found)
}

/// Boot sectors of others that look like FAT: BitLocker To Go is one on purpose, and is named for itself.
fn found_boot_sector(head: &[u8]) -> bool {
    let name = head.get(3..11).unwrap_or_default();
    [b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"].iter().any(|other| name == *other)
}

/// What lies at a place of the volume, out of its tail.
fn at(tail: &[u8], tail_start: u64, place: u64) -> &[u8] {
    let offset = place.checked_sub(tail_start).and_then(|offset| usize::try_from(offset).ok());
    offset.and_then(|offset| tail.get(offset..)).unwrap_or_default()
}

/// RAID superblocks at the end: version 0.90 in the last whole 64 KiB, version 1.0 8 to 12 KiB before the end.
fn is_md(tail: &[u8], tail_start: u64, length: u64) -> bool {
    let old = (length & !0xffff).checked_sub(0x1_0000);
    let new = (length / 512).checked_sub(16).map(|sector| (sector & !7) * 512);
    [old, new].into_iter().flatten().any(|place| {
        let bytes = at(tail, tail_start, place);
        MD_MAGIC.iter().any(|magic| bytes.starts_with(magic))
    })
}

fn is_zfs(labels: &[u8]) -> bool {
    labels.chunks(ZFS_LABEL_BYTES).filter_map(|label| label.get(ZFS_UBERBLOCKS)).any(|uberblocks| {
        uberblocks.chunks(ZFS_UBERBLOCK_BYTES).any(|block| ZFS_MAGIC.iter().any(|magic| block.starts_with(magic)))
    })
}

/// DRBD keeps its metadata in the last 4 KiB; where in them the magic number lies depends on the version.
fn is_drbd(block: &[u8]) -> bool {
    let head = block.get(..128).unwrap_or_default();
    head.chunks_exact(4).any(|four| parse::<U32>(four, 0).is_ok_and(|word| DRBD_MAGIC.contains(&word.get())))
}

/// Whether something may hold a whole disk, partition table and all, and leave its signature at the end.
pub(super) const fn holds_disks(kind: VolumeKind) -> bool {
    matches!(kind, VolumeKind::MdRaid | VolumeKind::DynamicDisk | VolumeKind::Zfs | VolumeKind::Other(_))
}

/// Types of GPT partitions whose content is not a file system, or not one that lies there alone.
const TYPES_LEFT_ALONE: &[(u128, VolumeKind)] = &[
    (0xe6d6_d379_f507_44c2_a23c_238f_2a3d_f928, VolumeKind::Lvm),
    (0xa19d_880f_05fc_4d3b_a006_743f_0f84_911e, VolumeKind::MdRaid),
    (0x0657_fd6d_a4ab_43c4_84e5_0933_c84b_4f4f, VolumeKind::Swap),
    (0xca7d_7ccb_63ed_4c53_861c_1742_5360_59cc, VolumeKind::Luks),
    (0x7ffe_c5c9_2d00_49b7_8941_3ea1_0a55_86b7, VolumeKind::Other("plain dm-crypt")),
    (0x5808_c8aa_7e8f_42e0_85d2_e1e9_0434_cfb3, VolumeKind::DynamicDisk),
    (0xaf9b_60a0_1431_4f62_bc68_3311_714a_69ad, VolumeKind::DynamicDisk),
    (0xe75c_af8f_f680_4cee_afa3_b001_e56e_fc2d, VolumeKind::StorageSpaces),
    (0x558d_43c5_a1ac_43c0_aac8_d147_2b29_23d1, VolumeKind::Other("Storage Replica")),
    (0xe3c9_e316_0b5c_4db8_817d_f92d_f002_15ae, VolumeKind::Other("Microsoft reserved partition")),
    (0x2168_6148_6449_6e6f_744e_6565_6445_4649, VolumeKind::Other("BIOS boot partition")),
    (0x516e_7cba_6ecf_11d6_8ff8_0002_2d09_712b, VolumeKind::Zfs),
    (0x6a89_8cc3_1dd2_11b2_99a6_0800_2073_6631, VolumeKind::Zfs),
    (0x4846_5300_0000_11aa_aa11_0030_6543_ecac, VolumeKind::Other("HFS+")),
    (0x7c34_57ef_0000_11aa_aa11_0030_6543_ecac, VolumeKind::Other("APFS")),
    (0x5374_6f72_6167_11aa_aa11_0030_6543_ecac, VolumeKind::Other("Apple Core Storage")),
    (0xaa31_e02a_400f_11db_9590_000c_2911_d1b8, VolumeKind::Other("VMFS")),
    (0x4fbd_7e29_9d25_41b8_afd0_062c_0cef_f05d, VolumeKind::Other("Ceph")),
    (0x8da6_3339_0007_60c0_c436_083a_c823_0908, VolumeKind::Other("Linux reserved partition")),
    (0x37af_fc90_ef7d_4e96_91c3_2d7a_e055_b174, VolumeKind::Other("GPFS")),
    (0xd3bf_e2de_3daf_11df_ba40_e3a5_56d8_9593, VolumeKind::Other("Intel Rapid Start")),
];

/// What the type of a partition says that is not an ordinary file system.
pub(super) fn of_type(kind: &PartitionType) -> Option<VolumeKind> {
    match kind {
        PartitionType::Gpt { kind, .. } => {
            let mut types = TYPES_LEFT_ALONE.iter();
            types.find(|(guid, _)| Guid::from_printed(*guid) == *kind).map(|(_, kind)| *kind)
        }
        PartitionType::Mbr { kind } => match kind {
            0x42 => Some(VolumeKind::DynamicDisk),
            0x82 => Some(VolumeKind::Swap),
            0x84 => Some(VolumeKind::Other("hibernation partition")),
            0x8e => Some(VolumeKind::Lvm),
            0xe8 => Some(VolumeKind::Luks),
            0xe7 => Some(VolumeKind::StorageSpaces),
            0xa5 | 0xa6 | 0xa9 => Some(VolumeKind::Other("BSD disk label")),
            0xa8 | 0xab | 0xaf => Some(VolumeKind::Other("HFS+")),
            0xbe | 0xbf => Some(VolumeKind::Other("Solaris")),
            0xfb | 0xfc => Some(VolumeKind::Other("VMFS")),
            0xfd => Some(VolumeKind::MdRaid),
            _ => None,
        },
    }
}
