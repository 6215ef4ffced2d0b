//! `map`: where the data of a disk is.

use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use vhdkit::{Error, ErrorKind};

use crate::args::MapArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};
use crate::formats::{Wanted, is_block_device, is_standard_stream};
use crate::map::grid::Grid;
use crate::map::picture::Canvas;
use crate::map::{json, picture, svg, visit_joined};
use crate::opening::{Disk, DiskRequest, open_disk};
use crate::show;
use crate::target::Target;
use crate::ui::Ui;

/// Columns of a terminal that does not tell.
const COLUMNS_DEFAULT: usize = 80;

/// Shows or draws the map.
pub(crate) fn run(context: &Context, args: &MapArgs) -> Result<Answer, Failure> {
    let format = args.from.from;
    let request = DiskRequest { path: &args.image, format, wanted: Wanted::Image, option: "--from", raw_sector: 512 };
    let svg_to_stdout = args.svg.as_deref().is_some_and(is_standard_stream);
    if svg_to_stdout && context.ui.json {
        return Err(Failure::usage(
            "--json and --svg - both want standard output",
            "leave one of them out, or name a file for the picture",
        ));
    }
    let disk = open_disk(context, request)?;
    let title = show::file_name(&args.image);
    if let Some(target) = &args.svg {
        write_svg(context, &disk, &title, target)?;
        if !context.global.json {
            return Ok(Answer::Yes);
        }
    }
    if context.ui.json || !Ui::out_is_terminal() {
        print_json(&disk)?;
    } else {
        let canvas = canvas();
        let grid = fill_grid(context, &disk, canvas.cells_max())?;
        let mut out = context.ui.out();
        picture::draw(&mut out, canvas, &title, &grid, &|layer| disk.layer_name(layer).to_owned())?;
        out.flush()?;
    }
    Ok(Answer::Yes)
}

fn print_json(disk: &Disk) -> Result<(), Failure> {
    let out = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    let mut writer = json::Writer::new(out);
    visit_joined(disk, &mut |extent| Ok(writer.extent(extent, disk.layer_name(extent.layer))?))?;
    Ok(writer.end()?)
}

fn fill_grid(context: &Context, disk: &Disk, cells_max: u64) -> Result<Grid, Failure> {
    let mut grid = Grid::new(disk.device.size(), cells_max);
    visit_joined(disk, &mut |extent| {
        grid.add(extent);
        if context.interrupt.is_set() {
            return Err(Error::new(ErrorKind::Cancelled, "stopped by a signal").into());
        }
        Ok(())
    })?;
    Ok(grid)
}

fn write_svg(context: &Context, disk: &Disk, title: &str, target: &Path) -> Result<(), Failure> {
    if is_standard_stream(target) {
        let mut out = io::stdout().lock();
        out.write_all(draw_svg(context, disk, title)?.as_bytes())?;
        return Ok(out.flush()?);
    }
    if is_block_device(target) {
        return Err(Failure::usage("the picture is not for a block device", "name a file for the picture"));
    }
    let file = Target::open(context, target, disk.identities())?;
    let picture = draw_svg(context, disk, title)?;
    let written = file.storage().write_at(picture.as_bytes(), 0);
    written.map_err(|error| Error::io("cannot write the picture", error).with_path(target))?;
    file.commit(false)
}

fn draw_svg(context: &Context, disk: &Disk, title: &str) -> Result<String, Failure> {
    let grid = fill_grid(context, disk, svg::CELLS_MAX)?;
    Ok(svg::draw(title, &grid, &|layer| disk.layer_name(layer).to_owned()))
}

/// How the terminal is.
fn canvas() -> Canvas {
    let columns = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).map_or(0, |size| usize::from(size.ws_col));
    let columns = if columns == 0 { COLUMNS_DEFAULT } else { columns };
    Canvas { columns, unicode: Ui::is_unicode() }
}
