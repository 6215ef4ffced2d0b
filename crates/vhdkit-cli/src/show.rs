//! Names of files, made safe to print.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use vhdkit::text::escape;

/// A word for a shell.
pub(crate) fn quoted(word: &OsStr) -> String {
    let shown = path(Path::new(word));
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    if !shown.is_empty() && shown.chars().all(is_plain) { shown } else { format!("'{}'", shown.replace('\'', "'\\''")) }
}

/// A path as people read it: control characters and the like as `\u{...}`, bytes that are not UTF-8 as `\x..`.
pub(crate) fn path(path: &Path) -> String {
    let mut out = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        out.push_str(&escape(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}"); // writing to a String cannot fail
        }
    }
    out
}

/// The last component of a path, for where the directory would only be noise.
pub(crate) fn file_name(whole: &Path) -> String {
    whole.file_name().map_or_else(|| path(whole), |name| path(Path::new(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_reaches_the_terminal_as_it_is() {
        let hostile = OsStr::from_bytes(b"dir/a\x1b[31m\xff\xfeb\n\xe2\x80\xae.vhdx");
        assert_eq!(path(Path::new(hostile)), "dir/a\\u{1b}[31m\\xff\\xfeb\\u{a}\\u{202e}.vhdx");
        assert_eq!(file_name(Path::new(hostile)), "a\\u{1b}[31m\\xff\\xfeb\\u{a}\\u{202e}.vhdx");
        assert_eq!(path(Path::new("/vms/plain.vhdx")), "/vms/plain.vhdx");
    }
}
