//! Sizes on the command line and in the output: always binary. What is read is exact; what is rounded in print comes with
//! the exact number wherever it matters.

/// The unit letters and the power of two that each stands for.
const UNITS: [(char, u32); 5] = [('k', 10), ('m', 20), ('g', 30), ('t', 40), ('p', 50)];
/// Names of the same units, for printing, largest first.
const NAMES: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
/// Digits behind the point that are read; more cannot matter for an exact number of bytes below 2^64.
const FRACTION_DIGITS_MAX: usize = 18;

/// Reads a size: `64G`, `64GiB` and `64g` are 64 GiB; also plain bytes (`512`), hexadecimal bytes (`0x200`) and
/// fractions that are a whole number of bytes (`1.5G`).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0x") {
        return parse_hexadecimal(digits);
    }
    let number_end = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, suffix) = lower.split_at(number_end);
    let shift = parse_suffix(suffix)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) {
        return Err(format!("not a number of bytes; {EXAMPLES}"));
    }
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let whole = u128::from(whole) << shift; // at most 2^114
    let total = whole.checked_add(fraction_bytes(fraction, shift)?).ok_or_else(too_large)?;
    u64::try_from(total).map_err(|_| too_large())
}

/// What every message about a malformed size ends with.
const EXAMPLES: &str = "write for example 64G, 1.5M, 1048576 or 0x100000";

fn too_large() -> String {
    "the size is larger than 2^64 bytes".to_owned()
}

fn parse_hexadecimal(digits: &str) -> Result<u64, String> {
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(format!("not a hexadecimal number of bytes; {EXAMPLES}"));
    }
    u64::from_str_radix(digits, 16).map_err(|_| too_large())
}

/// The power of two of a suffix: nothing or `b` for bytes, a unit letter alone or followed by `b` or `ib`.
fn parse_suffix(suffix: &str) -> Result<u32, String> {
    let mut rest = suffix.chars();
    let Some(first) = rest.next() else { return Ok(0) };
    if suffix == "b" {
        return Ok(0);
    }
    let unit = UNITS.iter().find(|(letter, _)| *letter == first);
    match (unit, rest.as_str()) {
        (Some((_, shift)), "" | "b" | "ib") => Ok(*shift),
        _ => Err(format!("unknown unit; units are K, M, G, T and P, all binary; {EXAMPLES}")),
    }
}

/// The bytes of the digits behind the point, which must be a whole number.
fn fraction_bytes(digits: &str, shift: u32) -> Result<u128, String> {
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() {
        return Ok(0);
    }
    let not_whole = || "the fraction is not a whole number of bytes".to_owned();
    if digits.len() > FRACTION_DIGITS_MAX {
        return Err(not_whole());
    }
    if digits.contains('.') {
        return Err(format!("not a number of bytes; {EXAMPLES}"));
    }
    let numerator: u128 = digits.parse().map_err(|_| not_whole())?;
    let denominator = digits.bytes().fold(1_u128, |power, _| power * 10); // at most 10^18
    let scaled = numerator << shift; // at most 10^18 * 2^50, below 2^110
    if scaled.is_multiple_of(denominator) { Ok(scaled / denominator) } else { Err(not_whole()) }
}

/// A size for people: `64 GiB`, `1.5 MiB`, `12.34 MiB` (rounded to two digits), `512 bytes`.
pub(crate) fn short(bytes: u64) -> String {
    let Some((name, shift)) = NAMES.iter().find(|(_, shift)| bytes >> shift > 0) else {
        return if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} bytes") };
    };
    let hundredths = (u128::from(bytes) * 100 + (1_u128 << (shift - 1))) >> shift;
    let (whole, part) = (hundredths / 100, hundredths % 100);
    match (part, part % 10) {
        (0, _) => format!("{whole} {name}"),
        (_, 0) => format!("{whole}.{} {name}", part / 10),
        _ => format!("{whole}.{part:02} {name}"),
    }
}

/// A size for people with the exact count: `64 GiB (68719476736 bytes)`.
pub(crate) fn long(bytes: u64) -> String {
    if bytes < 1024 { short(bytes) } else { format!("{} ({bytes} bytes)", short(bytes)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn every_spelling_of_a_size() {
        for text in ["64G", "64g", "64GiB", "64gib", "64GB", "64gb", "68719476736", "68719476736b", "0x1000000000"] {
            assert_eq!(parse(text), Ok(64 * GIB), "{text}");
        }
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("1K"), Ok(1024));
        assert_eq!(parse("1m"), Ok(1 << 20));
        assert_eq!(parse("64T"), Ok(64 << 40));
        assert_eq!(parse("2P"), Ok(2 << 50));
        assert_eq!(parse("1.5G"), Ok(GIB + GIB / 2));
        assert_eq!(parse("0.50k"), Ok(512));
        assert_eq!(parse("0.0009765625K"), Ok(1));
        assert_eq!(parse("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(parse("0xffffffffffffffff"), Ok(u64::MAX));
    }

    #[test]
    fn what_is_not_a_size() {
        for text in [
            "",
            " ",
            "G",
            ".",
            ".5G",
            "5.",
            "5.G",
            "-1",
            "+1",
            "1 G",
            "64X",
            "64Gi",
            "64GGB",
            "1e9",
            "0x",
            "0xg",
            "0x-1",
            "0x+1",
            "0x1G",
            "1.2.3G",
            "64bb",
            "64\u{2009}G",
            "1.0000000000000000001G",
        ] {
            assert!(parse(text).is_err(), "{text} is taken for {:?}", parse(text));
        }
    }

    #[test]
    fn fractions_are_exact_or_refused() {
        assert!(parse("1.5").is_err());
        assert!(parse("0.3K").is_err());
        assert!(parse("1.1M").is_err());
        assert_eq!(parse("1.0"), Ok(1));
        assert_eq!(parse("1.25K"), Ok(1280));
    }

    #[test]
    fn nothing_overflows() {
        for text in ["18446744073709551616", "16384P", "18446744073709551615P", "0x10000000000000000"] {
            assert_eq!(parse(text), Err(too_large()), "{text}");
        }
        assert_eq!(parse("16383.5P"), Ok(16383 * (1 << 50) + (1 << 49)));
    }

    #[test]
    fn printed_sizes() {
        assert_eq!(short(0), "0 bytes");
        assert_eq!(short(1), "1 byte");
        assert_eq!(short(1023), "1023 bytes");
        assert_eq!(long(64 * GIB), "64 GiB (68719476736 bytes)");
        assert_eq!(short(3 * GIB / 2), "1.5 GiB");
        assert_eq!(short(GIB + GIB / 4), "1.25 GiB");
        assert_eq!(short(GIB + GIB / 100), "1.01 GiB");
        assert_eq!(short((1 << 20) - 1), "1024 KiB");
        assert_eq!(short(u64::MAX), "16384 PiB");
        assert_eq!(long(512), "512 bytes");
    }
}
