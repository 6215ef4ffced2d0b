//! `measure`: the space that a conversion needs.

use std::io::Write as _;
use std::sync::Arc;

use serde_json::json;
use vhdkit::image::{BlockDevice, RawDisk};
use vhdkit::ops::measure::measure;
use vhdkit::storage::{MemoryStorage, Storage as _};
use vhdkit::{Error, ErrorKind};

use super::layout;
use crate::args::MeasureArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::{Wanted, is_standard_stream};
use crate::opening::{DiskRequest, open_disk};
use crate::progress::Bar;
use crate::sizes;
use crate::ui::Ui;

/// Measures.
pub(crate) fn run(context: &Context, args: &MeasureArgs) -> Result<Answer, Failure> {
    let source = source(context, args)?;
    let options = layout::options(&args.layout, None)?;
    let bar = Bar::new("measuring", &context.ui, &context.interrupt);
    let report = measure(source.as_ref(), &options, &bar);
    let report = report.map_err(|error| match &args.source {
        Some(path) => error.with_path(path),
        None => error,
    })?;
    drop(bar);
    if context.ui.json {
        Ui::print_json(&json!({ "required": report.required, "fully-allocated": report.fully_allocated }))?;
        return Ok(Answer::Yes);
    }
    let mut out = context.ui.out();
    writeln!(out, "required size:        {}", sizes::long(report.required))?;
    writeln!(out, "fully allocated size: {}", sizes::long(report.fully_allocated))?;
    out.flush()?;
    Ok(Answer::Yes)
}

/// The disk to measure: a source, or an empty one.
fn source(context: &Context, args: &MeasureArgs) -> Result<Arc<dyn BlockDevice>, Failure> {
    let sector = layout::raw_sector(&args.layout);
    if let Some(path) = &args.source {
        if is_standard_stream(path) {
            return Err(Failure::usage(
                "standard input cannot be measured without reading it all",
                "name a file, or say --size for an empty disk",
            ));
        }
        let format = args.from.from;
        let request = DiskRequest { path, format, wanted: Wanted::Source, option: "--from", raw_sector: sector };
        return Ok(open_disk(context, request)?.device);
    }
    let size = args.size.unwrap_or_default(); // clap wants one of the two
    if !size.is_multiple_of(u64::from(sector)) {
        let what = format!("the size {size} is not a multiple of the sector of {sector} bytes");
        let next = size.checked_next_multiple_of(u64::from(sector)).unwrap_or(size);
        return Err(Error::new(ErrorKind::InvalidArgument, what)
            .with_hint(format!("the next possible size is {next}"))
            .into());
    }
    let empty = MemoryStorage::new();
    empty.set_len(size).map_err(|error| Error::io("cannot think of a disk that large", error))?;
    Ok(Arc::new(RawDisk::new(Arc::new(empty), sector)?))
}
