//! Sets of cells, as text and back.

use super::Cell;
use std::collections::BTreeSet;

/// A set of cells, printed as `layers.8-15.{q_proj,v_proj}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ModuleSet {
    cells: BTreeSet<Cell>,
}

impl ModuleSet {
    /// Whether the cell is in it.
    pub fn contains(&self, cell: Cell) -> bool {
        self.cells.contains(&cell)
    }

    /// Adds a cell; false if it was there.
    pub fn insert(&mut self, cell: Cell) -> bool {
        self.cells.insert(cell)
    }

    /// Removes a cell; false if it was not there.
    pub fn remove(&mut self, cell: Cell) -> bool {
        self.cells.remove(&cell)
    }

    /// How many cells.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The cells in order.
    pub fn iter(&self) -> impl Iterator<Item = Cell> + '_ {
        self.cells.iter().copied()
    }
}

impl FromIterator<Cell> for ModuleSet {
    fn from_iter<I: IntoIterator<Item = Cell>>(cells: I) -> Self {
        Self { cells: cells.into_iter().collect() }
    }
}
