//! The table of learning rates: which cells train, how fast, with how much decay.

use super::{Cell, ModuleSet};
use std::collections::BTreeMap;

/// Rate and decay of one cell; both are factors on the run's base values.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rate {
    /// Factor on the scheduled learning rate; 0 = frozen.
    pub lr: f32,
    /// Factor on the decoupled weight decay.
    pub weight_decay: f32,
}

/// Per-cell factors. A cell that is not listed is frozen: it gets no gradient, no moments, no decay.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LearningRates {
    cells: BTreeMap<Cell, Rate>,
}

impl LearningRates {
    /// Factor 1 for `set`; factor `rest` (0 = frozen) for the other cells of `all`.
    pub fn masked(set: &ModuleSet, all: &ModuleSet, rest: f32) -> Self {
        let mut rates = Self::default();
        for cell in all.iter() {
            rates.set(cell, Rate { lr: if set.contains(cell) { 1.0 } else { rest }, weight_decay: 1.0 });
        }
        rates
    }

    /// Sets one cell; a zero learning rate removes it from what trains.
    pub fn set(&mut self, cell: Cell, rate: Rate) {
        if rate.lr == 0.0 {
            self.cells.remove(&cell);
        } else {
            self.cells.insert(cell, rate);
        }
    }

    /// The cell's factors; `None` = frozen.
    pub fn get(&self, cell: Cell) -> Option<Rate> {
        self.cells.get(&cell).copied()
    }

    /// Whether the cell trains.
    pub fn trains(&self, cell: Cell) -> bool {
        self.cells.contains_key(&cell)
    }

    /// What trains, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Cell, Rate)> + '_ {
        self.cells.iter().map(|(c, r)| (*c, *r))
    }
}
