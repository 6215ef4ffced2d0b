//! `read`: the bytes of a disk to standard output.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::ops::{ControlFlow, Range};

use vhdkit::image::{BlockDevice, Extent, ExtentKind};
use vhdkit::ops::Progress as _;
use vhdkit::{Error, ErrorKind};

use crate::args::ReadArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::Wanted;
use crate::opening::{DiskRequest, open_disk};
use crate::progress::Bar;
use crate::ui::{self, Ui};

/// Bytes that are read and written at once: large enough that system calls do not matter, small enough for the cache.
const PIECE_BYTES: usize = 1 << 20;
/// Zeros to write from.
static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

/// Writes the range to standard output.
pub(crate) fn run(context: &Context, args: &ReadArgs) -> Result<Answer, Failure> {
    let format = args.from.from;
    let request = DiskRequest { path: &args.image, format, wanted: Wanted::Image, option: "--from", raw_sector: 512 };
    let disk = open_disk(context, request)?;
    let range = resolve_range(args, disk.device.size())?;
    if Ui::out_is_terminal() && !context.global.force {
        return Err(Failure::usage(
            "the bytes of a disk are not for a terminal",
            "send them to a file or a pipe, or say --force",
        ));
    }
    let bar = Bar::new("reading", &context.ui, &context.interrupt);
    write_range(disk.device.as_ref(), range, &mut Sink::stdout()?, &bar)?;
    Ok(Answer::Yes)
}

/// The range that is asked for, which must lie on the disk.
fn resolve_range(args: &ReadArgs, size: u64) -> Result<Range<u64>, Failure> {
    let end = args.length.map_or(Some(size), |length| args.offset.checked_add(length));
    match end {
        Some(end) if args.offset <= end && end <= size => Ok(args.offset..end),
        _ => {
            let what = format!("the range reaches past the end of the disk, which has {size} bytes");
            let error = Error::new(ErrorKind::OutOfRange, what).with_path(&args.image);
            Err(error.with_hint("choose --offset and --length inside the disk").into())
        }
    }
}

/// Standard output without a buffer. Zeros become a hole where that is the same: in a file that ends where we write.
#[derive(Debug)]
struct Sink {
    file: File,
    sparse: bool,
}

impl Sink {
    fn stdout() -> io::Result<Self> {
        let mut file = ui::raw_stdout()?;
        let metadata = file.metadata()?;
        let appends = rustix::fs::fcntl_getfl(&file)?.contains(rustix::fs::OFlags::APPEND);
        let sparse = metadata.is_file() && !appends && file.stream_position()? == metadata.len();
        Ok(Self { file, sparse })
    }

    fn write_zeros(&mut self, length: u64) -> io::Result<()> {
        if self.sparse {
            let forward = i64::try_from(length).map_err(|_| io::ErrorKind::FileTooLarge)?;
            self.file.seek(SeekFrom::Current(forward))?;
            return Ok(());
        }
        let mut left = length;
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all(ZEROS.get(..count).unwrap_or_default())?;
            left -= count as u64; // at most what is left
        }
        Ok(())
    }

    /// Makes a hole at the end count.
    fn finish(&mut self) -> io::Result<()> {
        if self.sparse {
            let end = self.file.stream_position()?;
            self.file.set_len(end)?;
        }
        Ok(())
    }
}

/// Writes a range of a disk. What reads as zero is not read.
fn write_range(disk: &dyn BlockDevice, range: Range<u64>, out: &mut Sink, bar: &Bar) -> Result<(), Failure> {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut failed = None;
    let (start, total) = (range.start, range.end - range.start);
    let mut advance = |position: u64| bar.advance(position - start, Some(total));
    disk.visit_extents(range, &mut |extent| match write_extent(disk, extent, &mut buffer, out, &mut advance) {
        Ok(flow) => flow,
        Err(failure) => {
            failed = Some(failure);
            ControlFlow::Break(())
        }
    })?;
    match failed {
        Some(failure) => Err(failure),
        None => Ok(out.finish()?),
    }
}

fn write_extent(
    disk: &dyn BlockDevice,
    extent: &Extent,
    buffer: &mut [u8],
    out: &mut Sink,
    advance: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, Failure> {
    if !matches!(extent.kind, ExtentKind::Data { .. }) {
        out.write_zeros(extent.length)?;
        return Ok(advance(extent.end()));
    }
    let mut offset = extent.start;
    while offset < extent.end() {
        let left = usize::try_from(extent.end() - offset).unwrap_or(usize::MAX);
        let (piece, _) = buffer.split_at_mut(left.min(buffer.len()));
        disk.read_at(piece, offset)?;
        out.file.write_all(piece)?;
        offset += piece.len() as u64; // stays inside the extent
        if advance(offset).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
