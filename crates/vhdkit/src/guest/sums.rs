//! The checksums of guest structures that are not CRC-32C as this project's own format uses it.

/// The table of CRC-32 (IEEE 802.3, reflected), made at compile time.
const CRC32: [u32; 256] = table(0xedb8_8320);
/// The table of CRC-16 (reflected 0x8005), as ext4's older group checksums use it.
const CRC16: [u32; 256] = table(0xa001);

const fn table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    let mut value = 0_u32;
    while index < 256 {
        let mut entry = value;
        let mut bit = 0;
        while bit < 8 {
            entry = if entry & 1 == 1 { (entry >> 1) ^ polynomial } else { entry >> 1 };
            bit += 1;
        }
        #[expect(clippy::indexing_slicing, reason = "the index is below 256; a const function has no iterators")]
        {
            table[index] = entry;
        }
        index += 1;
        value += 1;
    }
    table
}

/// CRC-32 as GPT uses it (UEFI 2.10, 5.3.2).
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    crc32_append(0, bytes)
}

/// Adds bytes to what [`crc32`] gave for those before.
pub(super) fn crc32_append(crc: u32, bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!crc, |crc, byte| {
        let [low, ..] = crc.to_le_bytes();
        (crc >> 8) ^ CRC32.get(usize::from(low ^ byte)).copied().unwrap_or_default()
    })
}

/// CRC-16 without any inversion, continued from `crc`.
pub(super) fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    let crc = bytes.iter().fold(u32::from(crc), |crc, byte| {
        let [low, ..] = crc.to_le_bytes();
        (crc >> 8) ^ CRC16.get(usize::from(low ^ byte)).copied().unwrap_or_default()
    });
    u16::try_from(crc).unwrap_or_default() // the entries of the table have 16 bits
}

/// CRC-32C without the inversions before and after, as ext4 chains it.
pub(super) fn crc32c_raw(crc: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!crc, bytes)
}

/// Whether a sum is the one that is stored. A fuzzer that had to guess checksums would see nothing behind them.
pub(super) fn same(stored: u32, computed: u32) -> bool {
    stored == computed || cfg!(fuzzing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_vectors() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32_append(crc32(b"12345"), b"6789"), 0xcbf4_3926);
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
        assert_eq!(!crc32c_raw(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_raw(crc32c_raw(!0, b"12345"), b"6789"), !0xe306_9283);
    }
}
