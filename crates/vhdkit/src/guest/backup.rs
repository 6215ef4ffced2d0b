//! Moving the backup GPT to where a disk of another size ends.

use zerocopy::IntoBytes;

use super::gpt;
use super::mbr::{self, RawRecord};
use super::table::is_protective;
use super::window::{Checked, Trouble, Window, require};
use crate::error::{Error, ErrorKind, Result};
use crate::image::BlockDevice;

/// What has to be written, where, for a disk with a GPT to be `new_size` bytes long: the backup entries, the backup header,
/// the primary header, and the first sector where the protective entry names another size. In this order, and with a flush
/// between the backup and the primary, a copy is in order whatever is cut off. All of it lies below `new_size`; the disk has
/// to have that size when it is written. The old backup stays as it is: without the header that names it, nobody looks for
/// it.
///
/// Works for shrinking, growing, and a disk whose backup is missing. Reads the beginning of the disk only.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] when `new_size` is not a whole number of sectors; [`ErrorKind::Refused`] when the primary
/// GPT is not in order, the first sector does something else than to protect it, or partitions and backup do not fit into
/// `new_size`; otherwise what stands in the way of reading the disk.
pub fn plan_backup_gpt(disk: &dyn BlockDevice, new_size: u64) -> Result<Vec<(u64, Vec<u8>)>> {
    let sector = u64::from(disk.logical_sector_size());
    if !new_size.is_multiple_of(sector) {
        let what = format!("a disk of {new_size} bytes does not end with a whole sector of {sector} bytes");
        return Err(Error::new(ErrorKind::InvalidArgument, what));
    }
    let (failed, hint) = match primary(disk, sector) {
        Ok((primary, record)) => match moved(disk, sector, new_size / sector, &primary, record) {
            Ok(writes) => return Ok(writes),
            Err(trouble) => (
                trouble,
                "choose a larger disk, make the partitions smaller in the guest first, or leave the backup where it is",
            ),
        },
        Err(trouble) => (trouble, "mend the table with the tools of the guest first, for example gdisk"),
    };
    Err(match failed {
        Trouble::Failed(error) => error,
        Trouble::Reason(reason) => {
            Error::new(ErrorKind::Refused, format!("the backup GPT cannot be moved: {reason}")).with_hint(hint)
        }
    })
}

/// The primary GPT and the record that protects it, both in order.
fn primary(disk: &dyn BlockDevice, sector: u64) -> Checked<(gpt::Copy, RawRecord)> {
    let window = Window::new(disk, &(0..disk.size()));
    let record: RawRecord = window.read_struct(0)?;
    require(
        record.signature == mbr::SIGNATURE && is_protective(&record),
        "the first sector does not protect a GPT alone",
    )?;
    Ok((gpt::Copy::read(&window, 1, sector)?, record))
}

fn moved(
    disk: &dyn BlockDevice,
    sector: u64,
    sectors: u64,
    primary: &gpt::Copy,
    mut record: RawRecord,
) -> Checked<Vec<(u64, Vec<u8>)>> {
    let window = Window::new(disk, &(0..disk.size()));
    let mut writes = primary.moved(sectors)?;
    let protected = u32::try_from(sectors.saturating_sub(1)).unwrap_or(u32::MAX);
    for entry in record.entries.iter_mut().filter(|entry| entry.kind == mbr::PROTECTIVE) {
        // A size of "everything" is right for every disk.
        if entry.sectors.get() != protected && entry.sectors.get() != u32::MAX {
            entry.sectors = protected.into();
            let mut first = window.read(0, sector)?;
            first.iter_mut().zip(record.as_bytes()).for_each(|(to, from)| *to = *from);
            writes.push((0, first));
            break;
        }
    }
    Ok(writes)
}
