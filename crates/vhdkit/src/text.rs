//! Text from an image, made safe to print.

use std::borrow::Cow;
use std::fmt::Write as _;

/// True for characters that can change what a terminal or a reader sees: controls, line and paragraph separators,
/// bidirectional overrides, characters without a width of their own, and what Unicode says is no character.
const fn is_unsafe_to_print(c: char) -> bool {
    (c as u32) & 0xfffe == 0xfffe
        || matches!(c, '\u{fdd0}'..='\u{fdef}')
        || matches!(c,
        '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Replaces characters that could confuse a terminal or a reader by `\u{...}`.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe_to_print) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe_to_print(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Decodes UTF-16 units for printing: a lone surrogate becomes `\u{d800}`, everything else as [`escape`].
#[must_use]
pub fn escape_utf16(units: &[u16]) -> String {
    let mut out = String::with_capacity(units.len());
    for decoded in char::decode_utf16(units.iter().copied()) {
        match decoded {
            Ok(c) if is_unsafe_to_print(c) => out.extend(c.escape_unicode()),
            Ok(c) => out.push(c),
            Err(lone) => {
                let _ = write!(out, "\\u{{{:x}}}", lone.unpaired_surrogate()); // writing to a String cannot fail
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_borrowed() {
        assert!(matches!(escape("C:\\VMs\\Straße.vhdx"), Cow::Borrowed(_)));
    }

    #[test]
    fn controls_and_overrides_are_escaped() {
        assert_eq!(escape("a\u{1b}[2Jb\u{9b}\u{202e}"), "a\\u{1b}[2Jb\\u{9b}\\u{202e}");
        assert_eq!(escape("\u{ffff}\u{1fffe}\u{fdd0}"), "\\u{ffff}\\u{1fffe}\\u{fdd0}");
    }

    #[test]
    fn lone_surrogates_are_escaped() {
        assert_eq!(escape_utf16(&[0x41, 0xd800, 0x42, 0xdc00]), "A\\u{d800}B\\u{dc00}");
    }
}
