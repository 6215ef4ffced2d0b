//! A disk in a grid of cells, each a range of the disk, and the sums for the legend.

use vhdkit::image::{Extent, ExtentKind};

/// Cells at most, whatever the size of the disk.
pub(crate) const CELLS_MAX: u64 = 4096;
/// A cell stands for at least this many bytes: one sector.
const CELL_BYTES_MIN: u64 = 512;

/// What an extent is, without the place of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Zero,
    Hole,
}

impl Kind {
    /// All kinds, in the order of the legend.
    pub(crate) const ALL: [Self; 3] = [Self::Data, Self::Zero, Self::Hole];

    pub(crate) const fn of(extent: &Extent) -> Self {
        match extent.kind {
            ExtentKind::Data { .. } => Self::Data,
            ExtentKind::Zero => Self::Zero,
            ExtentKind::Hole => Self::Hole,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Hole => "nothing",
        }
    }
}

/// One cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// Bytes of data.
    pub(crate) data: u64,
    /// Bytes that a layer says are zero.
    pub(crate) zero: u64,
    /// Bytes that nobody says anything about.
    pub(crate) hole: u64,
    /// The nearest layer that has data here: what was changed last is what people look for.
    pub(crate) layer: usize,
}

/// How a cell is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) kind: Kind,
    /// For data: the layer.
    pub(crate) layer: usize,
    /// For data: how full the cell is, 1 to 4.
    pub(crate) quarter: u8,
}

impl Cell {
    /// Data is never hidden by what surrounds it; then what is more.
    pub(crate) fn look(&self) -> Look {
        let total = (self.data + self.zero + self.hole).max(1);
        let kind = match (self.data, self.zero, self.hole) {
            (1.., _, _) => Kind::Data,
            (0, zero, hole) if zero > 0 && zero >= hole => Kind::Zero,
            _ => Kind::Hole,
        };
        let quarter = match (u128::from(self.data) * 4).div_ceil(u128::from(total)) {
            0 | 1 => 1,
            2 => 2,
            3 => 3,
            _ => 4,
        };
        let layer = if kind == Kind::Data { self.layer } else { 0 };
        Look { kind, layer, quarter: if kind == Kind::Data { quarter } else { 4 } }
    }
}

/// Bytes and extents of one layer, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LayerSum {
    pub(crate) bytes: [u64; 3],
    pub(crate) extents: [u64; 3],
}

/// The grid of a disk.
#[derive(Debug)]
pub(crate) struct Grid {
    pub(crate) size: u64,
    pub(crate) cell_bytes: u64,
    pub(crate) cells: Vec<Cell>,
    pub(crate) layers: Vec<LayerSum>,
}

impl Grid {
    /// A grid of at most `cells_max` cells for a disk.
    pub(crate) fn new(size: u64, cells_max: u64) -> Self {
        let cells_max = cells_max.clamp(1, CELLS_MAX);
        let wanted = size.div_ceil(cells_max).max(CELL_BYTES_MIN);
        let cell_bytes = wanted.checked_next_power_of_two().unwrap_or(wanted);
        let count = usize::try_from(size.div_ceil(cell_bytes)).unwrap_or_default(); // at most CELLS_MAX
        Self { size, cell_bytes, cells: vec![Cell::default(); count], layers: Vec::new() }
    }

    /// Adds an extent.
    pub(crate) fn add(&mut self, extent: &Extent) {
        let kind = Kind::of(extent);
        self.count(extent, kind);
        let mut position = extent.start;
        while position < extent.end() {
            let number = position / self.cell_bytes;
            let end = extent.end().min((number + 1) * self.cell_bytes);
            let length = end - position;
            let Some(cell) = usize::try_from(number).ok().and_then(|number| self.cells.get_mut(number)) else { break };
            match kind {
                Kind::Data => {
                    cell.layer = if cell.data == 0 { extent.layer } else { cell.layer.min(extent.layer) };
                    cell.data += length;
                }
                Kind::Zero => cell.zero += length,
                Kind::Hole => cell.hole += length,
            }
            position = end;
        }
    }

    fn count(&mut self, extent: &Extent, kind: Kind) {
        if self.layers.len() <= extent.layer {
            self.layers.resize(extent.layer + 1, LayerSum::default()); // a chain has at most 256 layers
        }
        let index = match kind {
            Kind::Data => 0,
            Kind::Zero => 1,
            Kind::Hole => 2,
        };
        if let Some(sum) = self.layers.get_mut(extent.layer) {
            if let Some(bytes) = sum.bytes.get_mut(index) {
                *bytes += extent.length;
            }
            if let Some(extents) = sum.extents.get_mut(index) {
                *extents += 1;
            }
        }
    }

    /// Kind, layer, bytes and extents of everything that occurs.
    pub(crate) fn summary(&self) -> Vec<(Kind, usize, u64, u64)> {
        let mut rows = Vec::new();
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            for (layer, sum) in self.layers.iter().enumerate() {
                let bytes = sum.bytes.get(index).copied().unwrap_or_default();
                let extents = sum.extents.get(index).copied().unwrap_or_default();
                if bytes > 0 {
                    rows.push((kind, layer, bytes, extents));
                }
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: u64 = 1 << 40;

    #[test]
    fn a_grid_never_has_more_cells_than_asked_for() {
        for size in [0, 512, 4 << 20, 10 << 30, 64 * TIB, (1 << 30) + 512] {
            for cells_max in [0, 1, 7, 1920, 4096, 1 << 20] {
                let grid = Grid::new(size, cells_max);
                assert!(grid.cells.len() as u64 <= cells_max.clamp(1, CELLS_MAX));
                assert!(grid.cells.len() as u64 * grid.cell_bytes >= size);
            }
        }
    }

    #[test]
    fn every_byte_lands_in_one_cell() {
        let mut grid = Grid::new(10 << 20, 16);
        let mut add = |start, length, kind, layer| grid.add(&Extent { start, length, kind, layer });
        add(0, 3 << 20, ExtentKind::Hole, 1);
        add(3 << 20, 512, ExtentKind::Data { file_offset: Some(1 << 20) }, 1);
        add((3 << 20) + 512, (7 << 20) - 512, ExtentKind::Zero, 0);
        let sum = |part: fn(&Cell) -> u64| grid.cells.iter().map(part).sum::<u64>();
        assert_eq!((sum(|cell| cell.hole), sum(|cell| cell.data)), (3 << 20, 512));
        assert_eq!(sum(|cell| cell.zero), (7 << 20) - 512);
        let looks: Vec<Kind> = grid.cells.iter().map(|cell| cell.look().kind).collect();
        assert_eq!(looks, [[Kind::Hole; 3].as_slice(), &[Kind::Data], &[Kind::Zero; 6]].concat());
        assert_eq!(grid.cells[3].look(), Look { kind: Kind::Data, layer: 1, quarter: 1 });
        assert_eq!(
            grid.summary(),
            [(Kind::Data, 1, 512, 1), (Kind::Zero, 0, (7 << 20) - 512, 1), (Kind::Hole, 1, 3 << 20, 1)]
        );
    }
}
