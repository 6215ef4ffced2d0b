//! CRC-32C as the format uses it: over a whole structure, with the checksum field itself counted as zero.

use std::ops::Range;

/// Where the checksum field lies in every structure that has one.
const FIELD: Range<usize> = 4..8;

/// CRC-32C of `bytes` with bytes 4 to 7 counted as zero.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u32 {
    let (Some(before), Some(after)) = (bytes.get(..FIELD.start), bytes.get(FIELD.end..)) else {
        return crc32c::crc32c(bytes);
    };
    let crc = crc32c::crc32c(before);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, after)
}

/// Adds more bytes to a checksum that [`checksum`] began.
#[must_use]
pub fn append(checksum: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(checksum, bytes)
}

/// Adds so many zero bytes to a checksum, without having them.
#[must_use]
pub fn append_zeros(checksum: u32, count: u64) -> u32 {
    // The checksum of 2^n zeros comes from that of half as many.
    let (mut result, mut power, mut length) = (checksum, crc32c::crc32c(&[0]), 1_usize);
    let mut left = count;
    while left > 0 {
        if left & 1 == 1 {
            result = crc32c::crc32c_combine(result, power, length);
        }
        left >>= 1;
        if left > 0 {
            power = crc32c::crc32c_combine(power, power, length);
            length = length.wrapping_mul(2); // below 2^63: `left` still has a bit
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_vectors() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(checksum(&[0; 4096]), 0x98f9_4189);
        assert_eq!(checksum(&vec![0; 65536]), 0x72c0_c4a4);
    }

    #[test]
    fn zeros_count_without_being_there() {
        for start in [0, crc32c::crc32c(b"abc")] {
            for count in [0, 1, 2, 3, 511, 512, 4096, 65536, 1_000_003] {
                let expected = append(start, &vec![0; usize::try_from(count).unwrap()]);
                assert_eq!(append_zeros(start, count), expected, "{count}");
            }
            // More than anybody has: in two steps as in one.
            assert_eq!(append_zeros(append_zeros(start, 1 << 46), 77), append_zeros(start, (1 << 46) + 77));
        }
    }

    #[test]
    fn the_field_itself_does_not_count() {
        let mut bytes = vec![7_u8; 4096];
        let before = checksum(&bytes);
        bytes[4..8].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(checksum(&bytes), before);
        bytes[8] ^= 1;
        assert_ne!(checksum(&bytes), before);
    }
}
