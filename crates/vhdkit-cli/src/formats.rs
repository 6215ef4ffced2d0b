//! What a file is: by its name first, then by what it holds.
//!
//! A guest can write anything into its own disk, `vhdxfile` too. So a file whose name says that it is a raw disk stays
//! raw, and a file without such a name is raw only when nothing else claims it.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use vhdkit::{Error, ErrorKind, Probe, probe};

use crate::args::Format;
use crate::failure::Failure;
use crate::ui::Ui;

/// Names that say: raw.
const RAW_NAMES: [&str; 3] = ["raw", "img", "bin"];
/// Names that say: VHDX.
const VHDX_NAMES: [&str; 2] = ["vhdx", "avhdx"];
/// Names of other files of the same family, which the library names in its error.
const FAMILY_NAMES: [&str; 3] = ["vhd", "avhd", "vhds"];

/// What the file of an IMAGE argument must be, or what the file of a SOURCE argument may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A VHDX; what holds none is not taken for a raw disk.
    Image,
    /// A VHDX or a raw disk.
    Source,
}

fn has_name(path: &Path, names: &[&str]) -> bool {
    path.extension().is_some_and(|extension| names.iter().any(|name| extension.eq_ignore_ascii_case(name)))
}

/// True for a name that says that the file is a raw disk.
pub(crate) fn is_raw_name(path: &Path) -> bool {
    has_name(path, &RAW_NAMES)
}

/// True for "-", which is standard input or standard output.
pub(crate) fn is_standard_stream(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// True for an existing block device.
pub(crate) fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// The first bytes of a file, and the last ones; nothing for what is neither a regular file nor a block device. Errors are
/// left to whoever opens the file in earnest.
fn look(path: &Path) -> (Vec<u8>, Vec<u8>) {
    let nothing = (Vec::new(), Vec::new());
    let Ok(metadata) = std::fs::metadata(path) else { return nothing };
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return nothing; // a FIFO would block
    }
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    let flags = i32::try_from(flags).unwrap_or_default();
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(path) else { return nothing };
    let start = read_some(&file, SeekFrom::Start(0));
    let end = read_some(&file, SeekFrom::End(-512));
    (start, end)
}

fn read_some(mut file: &File, from: SeekFrom) -> Vec<u8> {
    let mut bytes = Vec::new();
    if file.seek(from).is_ok() {
        let _ = file.take(512).read_to_end(&mut bytes); // what was read before an error is kept, which is enough
    }
    bytes
}

/// The name of another disk format that a file has the mark of, and what qemu-img calls it.
fn foreign_format(start: &[u8], end: &[u8]) -> Option<(&'static str, &'static str)> {
    let has = |offset: usize, mark: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(mark));
    if has(0, b"QFI\xfb") {
        Some(("QCOW2 image", "qcow2"))
    } else if has(0, b"KDMV") || has(0, b"# Disk DescriptorFile") {
        Some(("VMDK image", "vmdk"))
    } else if has(0x40, &[0x7f, 0x10, 0xda, 0xbe]) {
        Some(("VDI image", "vdi"))
    } else if has(0, b"conectix") || end.starts_with(b"conectix") {
        Some(("VHD, the older format", "vpc"))
    } else {
        None
    }
}

/// Decides what a file is read as. `option` is the option that overrides the decision.
pub(crate) fn source_format(
    path: &Path,
    given: Option<Format>,
    wanted: Wanted,
    option: &str,
    ui: &Ui,
) -> Result<Format, Failure> {
    if let Some(format) = given {
        return Ok(format);
    }
    if is_standard_stream(path) {
        return Err(Failure::usage(
            "only `convert` takes a disk from standard input, which is read from front to back",
            "save it to a file first; a file that is named so is ./-",
        ));
    }
    let (start, end) = look(path);
    let looks_like_vhdx = probe(&start) == Probe::Vhdx;
    if has_name(path, &RAW_NAMES) || is_block_device(path) {
        if looks_like_vhdx {
            let why = "it is taken for a raw disk by its name or kind, but looks like a VHDX";
            ui.warn(Some(path), &format!("{why}; say {option} vhdx if it is one"));
        }
        return Ok(Format::Raw);
    }
    if looks_like_vhdx {
        return Ok(Format::Vhdx);
    }
    if let Some((name, qemu_name)) = foreign_format(&start, &end) {
        let error = Error::new(ErrorKind::Unsupported, format!("this is a {name}, which vhdkit does not read"));
        let mut hint = format!("convert it with `qemu-img convert -f {qemu_name} -O raw` first");
        if wanted == Wanted::Source {
            hint = format!("{hint}; if it is a raw disk say {option} raw");
        }
        return Err(error.with_hint(hint).with_path(path).into());
    }
    let is_image = wanted == Wanted::Image || has_name(path, &VHDX_NAMES) || has_name(path, &FAMILY_NAMES);
    Ok(if is_image { Format::Vhdx } else { Format::Raw })
}

/// Decides what a target is written as.
pub(crate) fn target_format(path: &Path, given: Option<Format>) -> Result<Format, Failure> {
    let stream = is_standard_stream(path);
    match given {
        Some(Format::Vhdx) if stream => Err(Failure::usage(
            "a VHDX cannot be written to standard output, since it is not written from front to back",
            "name a file, or leave out --to for a raw disk",
        )),
        Some(format) => Ok(format),
        None if has_name(path, &VHDX_NAMES) => Ok(Format::Vhdx),
        None if stream || has_name(path, &RAW_NAMES) || is_block_device(path) => Ok(Format::Raw),
        None => Err(Failure::usage(
            format!("cannot tell the format of the target {} by its name", crate::show::path(path)),
            "say --to vhdx or --to raw",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_by_name() {
        let format = |name: &str| target_format(Path::new(name), None).ok();
        for name in ["a.vhdx", "a.VHDX", "dir.raw/a.avhdx"] {
            assert_eq!(format(name), Some(Format::Vhdx), "{name}");
        }
        for name in ["a.raw", "a.img", "a.IMG", "a.bin", "-"] {
            assert_eq!(format(name), Some(Format::Raw), "{name}");
        }
        for name in ["a", "a.vhd", "raw", ".raw", "a.vhdx.tmp"] {
            assert_eq!(format(name), None, "{name}");
        }
    }

    #[test]
    fn other_formats_are_known_by_their_marks() {
        assert_eq!(foreign_format(b"QFI\xfb\0\0\0\x03", b""), Some(("QCOW2 image", "qcow2")));
        assert_eq!(foreign_format(b"", b"conectix"), Some(("VHD, the older format", "vpc")));
        assert_eq!(foreign_format(b"\xeb\x58\x90mkfs.fat", b""), None);
    }
}
