//! Per-cell learning rates and weight decay.

use super::{Cell, ModuleSet};
use std::collections::BTreeMap;

/// Factors of one cell on the run's learning rate and weight decay.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rate {
    /// Factor on the scheduled learning rate; 0 = frozen.
    pub lr: f32,
    /// Factor on the decoupled weight decay.
    pub weight_decay: f32,
}

/// Factors per cell. Cells without an entry are frozen: no gradient, no optimizer state, no decay.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LearningRates {
    cells: BTreeMap<Cell, Rate>,
}

impl LearningRates {
    /// Factor 1 for the cells of `set`, `rest` (0 = frozen) for the other cells of `all`; weight decay 1.
    pub fn masked(set: &ModuleSet, all: &ModuleSet, rest: f32) -> Self {
        let mut rates = Self::default();
        for cell in all.iter() {
            rates.set(cell, Rate { lr: if set.contains(cell) { 1.0 } else { rest }, weight_decay: 1.0 });
        }
        rates
    }

    /// Sets the factors of a cell; a learning rate of 0 freezes it.
    pub fn set(&mut self, cell: Cell, rate: Rate) {
        if rate.lr == 0.0 {
            self.cells.remove(&cell);
        } else {
            self.cells.insert(cell, rate);
        }
    }

    /// Factors of a cell; `None` if it is frozen.
    pub fn get(&self, cell: Cell) -> Option<Rate> {
        self.cells.get(&cell).copied()
    }

    /// Whether the cell trains.
    pub fn trains(&self, cell: Cell) -> bool {
        self.cells.contains_key(&cell)
    }

    /// The cells that train, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Cell, Rate)> + '_ {
        self.cells.iter().map(|(c, r)| (*c, *r))
    }
}
