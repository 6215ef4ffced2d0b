//! The map as a coloured picture in a terminal.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::grid::{Grid, Kind, Look};
use crate::sizes;
use crate::ui::{FAINT, HEADING};

/// Colours of the data of each layer; deeper layers begin again.
const LAYER_COLORS: [AnsiColor; 6] = [
    AnsiColor::Green,
    AnsiColor::Blue,
    AnsiColor::Magenta,
    AnsiColor::Cyan,
    AnsiColor::BrightRed,
    AnsiColor::BrightBlue,
];
/// A quarter full to full; then zero; then nothing.
const SHADES: [char; 6] = ['\u{2591}', '\u{2592}', '\u{2593}', '\u{2588}', '0', '\u{b7}'];
/// The same where the terminal has ASCII only.
const SHADES_ASCII: [char; 6] = ['-', '=', '+', '#', '0', '.'];
/// Columns that the offset at the beginning of a line takes.
const MARGIN: usize = 11;
/// Lines of the picture at most.
const ROWS_MAX: usize = 32;

/// How the terminal is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Canvas {
    pub(crate) columns: usize,
    pub(crate) unicode: bool,
}

impl Canvas {
    /// Cells in a line: a power of two, so that lines begin at round offsets.
    fn cells_per_line(&self) -> usize {
        let room = self.columns.saturating_sub(MARGIN).clamp(16, 128);
        1 << room.ilog2()
    }

    /// Cells of the whole picture at most.
    pub(crate) fn cells_max(&self) -> u64 {
        (self.cells_per_line() * ROWS_MAX) as u64
    }

    fn shade(&self, look: Look) -> char {
        let shades = if self.unicode { &SHADES } else { &SHADES_ASCII };
        let index = match look.kind {
            Kind::Data => usize::from(look.quarter.saturating_sub(1)),
            Kind::Zero => 4,
            Kind::Hole => 5,
        };
        shades.get(index).copied().unwrap_or('?')
    }
}

fn style(look: Look) -> Style {
    match look.kind {
        Kind::Data => {
            LAYER_COLORS.get(look.layer % LAYER_COLORS.len()).map_or(Style::new(), |color| color.on_default())
        }
        Kind::Zero => AnsiColor::Yellow.on_default(),
        Kind::Hole => FAINT,
    }
}

/// Draws the picture, its legend and the sums.
pub(crate) fn draw(
    out: &mut dyn Write,
    canvas: Canvas,
    title: &str,
    grid: &Grid,
    layer_name: &dyn Fn(usize) -> String,
) -> io::Result<()> {
    writeln!(out, "{HEADING}{title}{HEADING:#}  {}", sizes::long(grid.size))?;
    let per_line = canvas.cells_per_line();
    for (line, cells) in grid.cells.chunks(per_line).enumerate() {
        let offset = (line * per_line) as u64 * grid.cell_bytes; // inside the disk
        write!(out, "{FAINT}{:>9}{FAINT:#}  ", short_offset(offset))?;
        let looks: Vec<Look> = cells.iter().map(super::grid::Cell::look).collect();
        for run in looks.chunk_by(|a, b| style(*a) == style(*b)) {
            let Some(first) = run.first() else { continue };
            let style = style(*first);
            let text: String = run.iter().map(|look| canvas.shade(*look)).collect();
            write!(out, "{style}{text}{style:#}")?;
        }
        writeln!(out)?;
    }
    writeln!(out, "one cell is {}", sizes::short(grid.cell_bytes))?;
    for (kind, layer, bytes, extents) in grid.summary() {
        let look = Look { kind, layer, quarter: 4 };
        let style = style(look);
        let percent = percent(bytes, grid.size);
        let place = if kind == Kind::Hole { String::new() } else { format!("  in {}", layer_name(layer)) };
        let plural = if extents == 1 { "extent" } else { "extents" };
        let (mark, name, size) = (canvas.shade(look), kind.name(), sizes::short(bytes));
        writeln!(out, "{style}{mark}{style:#} {name:<8} {size:>12} {percent:>7}  {extents} {plural}{place}")?;
    }
    Ok(())
}

/// An offset that fits the margin.
fn short_offset(offset: u64) -> String {
    if offset == 0 { "0".to_owned() } else { sizes::short(offset) }
}

/// A share with one digit behind the point; never 0 for something, never 100 for less than all.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    let tenths = u128::from(part) * 1000 / u128::from(whole);
    match (tenths, part) {
        (0, 1..) => "<0.1%".to_owned(),
        _ => format!("{}.{}%", tenths / 10, tenths % 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhdkit::image::{Extent, ExtentKind};

    #[test]
    fn the_picture_fits_the_terminal() {
        for columns in [0, 40, 80, 200, 10_000] {
            let canvas = Canvas { columns, unicode: true };
            let mut grid = Grid::new(64 << 40, canvas.cells_max());
            grid.add(&Extent { start: 0, length: 64 << 40, kind: ExtentKind::Hole, layer: 0 });
            let mut bytes = Vec::new();
            draw(&mut bytes, canvas, "disk", &grid, &|_| "disk".to_owned()).unwrap();
            let text = anstream::adapter::strip_bytes(&bytes).into_vec();
            let text = String::from_utf8(text).unwrap();
            let longest = text.lines().filter(|line| line.contains('\u{b7}')).map(|line| line.chars().count()).max();
            assert!(longest.unwrap() <= columns.clamp(16 + MARGIN, 128 + MARGIN).max(60), "{columns}: {text}");
            assert!(text.lines().count() <= ROWS_MAX + 4);
        }
    }

    #[test]
    fn shares() {
        assert_eq!(percent(0, 100), "0.0%");
        assert_eq!(percent(1, 100_000), "<0.1%");
        assert_eq!(percent(999_999, 1_000_000), "99.9%");
        assert_eq!(percent(5, 5), "100.0%");
        assert_eq!(percent(0, 0), "-");
    }
}
