//! Per-cell learning rates and weight decay.

use super::set::split_patterns;
use super::{Cell, ModuleSet};
use crate::error::{Error, Result};
use crate::options::serde_as_text;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

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

    /// Multiplies the learning rates of the cells that train by the factors of a table; a factor of 0 freezes.
    ///
    /// # Errors
    /// As [`RateTable::factors`].
    pub fn scale(&mut self, table: &RateTable, all: &ModuleSet) -> Result<()> {
        for (cell, factor) in table.factors(all)? {
            if let Some(rate) = self.get(cell) {
                self.set(cell, Rate { lr: rate.lr * factor, ..rate });
            }
        }
        Ok(())
    }

    /// The cells that train, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Cell, Rate)> + '_ {
        self.cells.iter().map(|(c, r)| (*c, *r))
    }
}

/// Factors on the learning rate by module set, written `layers.*.q_proj=0.1,layers.8-23.{o,v}=0`; 0 = frozen. Where sets
/// overlap, the last one counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RateTable {
    /// Pattern of [`ModuleSet::parse`], and factor.
    entries: Vec<(String, f32)>,
}

impl RateTable {
    /// The factor of each cell that the table names, of a model with the cells `all`.
    ///
    /// # Errors
    /// As [`ModuleSet::parse`].
    pub fn factors(&self, all: &ModuleSet) -> Result<BTreeMap<Cell, f32>> {
        let mut factors = BTreeMap::new();
        for (pattern, factor) in &self.entries {
            factors.extend(ModuleSet::parse(pattern, all)?.iter().map(|cell| (cell, *factor)));
        }
        Ok(factors)
    }
}

impl FromIterator<(Cell, f32)> for RateTable {
    fn from_iter<I: IntoIterator<Item = (Cell, f32)>>(factors: I) -> Self {
        Self { entries: factors.into_iter().map(|(cell, factor)| (cell.to_string(), factor)).collect() }
    }
}

impl FromStr for RateTable {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let entry = |text: &str| {
            let parsed = text.rsplit_once('=').and_then(|(pattern, factor)| {
                let factor = factor.parse::<f32>().ok().filter(|factor| factor.is_finite() && *factor >= 0.0)?;
                Some((pattern.to_owned(), factor)).filter(|(pattern, _)| !pattern.is_empty())
            });
            parsed.ok_or_else(|| {
                let place = format!("rate `{text}`");
                Error::input(place, "no module set with a factor from 0", "SET=FACTOR, such as layers.*.q_proj=0.1")
            })
        };
        Ok(Self { entries: split_patterns(text)?.into_iter().map(entry).collect::<Result<_>>()? })
    }
}

impl fmt::Display for RateTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<String> = self.entries.iter().map(|(pattern, factor)| format!("{pattern}={factor}")).collect();
        f.write_str(&entries.join(","))
    }
}

serde_as_text!(RateTable);
