//! The map as an SVG picture.

use std::fmt::Write as _;

use super::grid::{Cell, Grid, Kind, Look};
use super::picture::percent;
use crate::sizes;

/// Side of a cell, in pixels.
const CELL: usize = 12;
/// Cells in a line.
const COLUMNS: usize = 64;
/// Cells of a picture: [`COLUMNS`] times 64 lines.
pub(crate) const CELLS_MAX: u64 = 4096;
/// Room left of, right of and above the picture.
const MARGIN: usize = 16;
/// Room for the title, and for each line of the legend.
const LINE: usize = 20;
/// Colours of the data of each layer; deeper layers begin again.
const LAYER_COLORS: [&str; 6] = ["#2e8b57", "#4169e1", "#b04fc4", "#1e9aa8", "#d2601a", "#7a6ad8"];

/// Text that is safe inside an element or an attribute.
fn xml(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in vhdkit::text::escape(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            // XML 1.0 has no way to write these two.
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Fill and opacity of a cell.
fn fill(look: Look) -> (&'static str, &'static str) {
    let opacity = match look.quarter {
        1 => "0.4",
        2 => "0.6",
        3 => "0.8",
        _ => "1",
    };
    match look.kind {
        Kind::Data => (LAYER_COLORS.get(look.layer % LAYER_COLORS.len()).copied().unwrap_or("#000000"), opacity),
        Kind::Zero => ("#e8c547", "1"),
        Kind::Hole => ("#e6e8eb", "1"),
    }
}

/// Draws the picture.
pub(crate) fn draw(title: &str, grid: &Grid, layer_name: &dyn Fn(usize) -> String) -> String {
    let summary = grid.summary();
    let lines = grid.cells.len().div_ceil(COLUMNS);
    let top = MARGIN + 2 * LINE;
    let legend = top + lines * CELL + LINE;
    let width = 2 * MARGIN + COLUMNS * CELL;
    let height = legend + (summary.len() + 1) * LINE;
    let mut svg = String::new();
    let title = xml(title);
    // Writing to a String cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<title>{title}</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
    );
    let _ = writeln!(
        svg,
        "<text x=\"{MARGIN}\" y=\"{}\" font-size=\"16\" font-weight=\"bold\">{title}</text>\n\
         <text x=\"{MARGIN}\" y=\"{}\" fill=\"#555555\">{}, one cell is {}</text>",
        MARGIN + LINE / 2,
        MARGIN + LINE + LINE / 2,
        xml(&sizes::long(grid.size)),
        xml(&sizes::short(grid.cell_bytes)),
    );
    draw_cells(&mut svg, grid, top, layer_name);
    for (number, (kind, layer, bytes, extents)) in summary.into_iter().enumerate() {
        let y = legend + number * LINE;
        let (color, _) = fill(Look { kind, layer, quarter: 4 });
        let place = if kind == Kind::Hole { String::new() } else { format!(" in {}", layer_name(layer)) };
        let share = percent(bytes, grid.size);
        let plural = if extents == 1 { "extent" } else { "extents" };
        let text = format!("{}: {}, {share}, {extents} {plural}{place}", kind.name(), sizes::short(bytes));
        let _ = writeln!(
            svg,
            "<rect x=\"{MARGIN}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{color}\"/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            MARGIN + LINE,
            y + 11,
            xml(&text),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// One rectangle for each run of cells that look the same, with its range on the disk as a tooltip.
fn draw_cells(svg: &mut String, grid: &Grid, top: usize, layer_name: &dyn Fn(usize) -> String) {
    for (line, cells) in grid.cells.chunks(COLUMNS).enumerate() {
        let mut column = 0;
        for run in cells.chunk_by(|a, b| a.look() == b.look()) {
            let look = run.first().map_or(Cell::default().look(), Cell::look);
            let (color, opacity) = fill(look);
            let start = (line * COLUMNS + column) as u64 * grid.cell_bytes; // inside the disk
            let end = grid.size.min(start + run.len() as u64 * grid.cell_bytes);
            let place = if look.kind == Kind::Data { format!(" in {}", layer_name(look.layer)) } else { String::new() };
            let (x, y, width) = (MARGIN + column * CELL, top + line * CELL, run.len() * CELL - 1);
            let tooltip = xml(&format!("{start:#x} to {end:#x}: {}{place}", look.kind.name()));
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{}\" fill=\"{color}\" fill-opacity=\"{opacity}\">\
                 <title>{tooltip}</title></rect>",
                CELL - 1,
            );
            column += run.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhdkit::image::{Extent, ExtentKind};

    #[test]
    fn hostile_names_stay_text() {
        let mut grid = Grid::new(1 << 20, CELLS_MAX);
        grid.add(&Extent { start: 0, length: 1 << 20, kind: ExtentKind::Data { file_offset: None }, layer: 0 });
        let svg = draw("</title><script>\u{1b}\u{0}&\"'\u{ffff}", &grid, &|_| "<b>".to_owned());
        assert!(!svg.contains("<script>") && !svg.contains("<b>"), "{svg}");
        assert!(svg.contains("&lt;/title&gt;&lt;script&gt;\\u{1b}\\u{0}&amp;&quot;&apos;\\u{ffff}"), "{svg}");
        assert!(svg.chars().all(|c| c == '\n' || !c.is_control()));
    }

    #[test]
    fn the_picture_of_the_largest_disk_is_small() {
        let mut grid = Grid::new(64 << 40, CELLS_MAX);
        for number in 0..8192_u64 {
            let kind = if number % 2 == 0 { ExtentKind::Zero } else { ExtentKind::Hole };
            grid.add(&Extent { start: number << 33, length: 1 << 33, kind, layer: 0 });
        }
        let svg = draw("disk", &grid, &|_| "disk".to_owned());
        assert!(svg.len() < 1 << 20, "{}", svg.len());
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
    }
}
