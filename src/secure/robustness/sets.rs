//! Sizes of module sets in parameters, and random sets of a given size.

use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleSet};
use crate::rng::Philox;
use std::collections::BTreeMap;

/// Stream of the draws of random sets.
const STREAM: u64 = 0x5e75;

/// Parameters of every cell, biases with their projection.
pub fn cell_parameters(config: &ModelConfig) -> BTreeMap<Cell, u64> {
    let mut cells = BTreeMap::new();
    for (id, shape) in config.params() {
        *cells.entry(id.cell()).or_default() += shape.iter().product::<usize>() as u64;
    }
    cells
}

/// The part of the parameters of all projections (q, k, v, o, gate, up, down of every layer) that a set's projections
/// hold: 0 to 1. Embedding, norms and head are on neither side, so that the share means the same for tied and untied
/// models of any vocabulary.
pub fn share(set: &ModuleSet, parameters: &BTreeMap<Cell, u64>) -> f64 {
    let all: u64 = modules(parameters).map(|(_, n)| n).sum();
    let own: u64 = modules(parameters).filter(|(c, _)| set.contains(*c)).map(|(_, n)| n).sum();
    own as f64 / all.max(1) as f64
}

/// The projections, with their parameters.
pub(super) fn modules(parameters: &BTreeMap<Cell, u64>) -> impl Iterator<Item = (Cell, u64)> + '_ {
    parameters.iter().filter(|(c, _)| matches!(c, Cell::Module(_))).map(|(c, n)| (*c, *n))
}

/// A random set of projections of about `target` share: in a random order every cell that still fits is taken. Without
/// `layer0`, nothing of layer 0 is.
pub fn random_set(parameters: &BTreeMap<Cell, u64>, target: f64, seed: u64, layer0: bool) -> ModuleSet {
    let all: u64 = modules(parameters).map(|(_, n)| n).sum();
    let mut cells: Vec<(Cell, u64)> = modules(parameters).filter(|(c, _)| layer0 || c.layer() != Some(0)).collect();
    Philox::new(seed, STREAM).shuffle(&mut cells);
    // Half of the smallest cell is the best that rounding to whole cells can do.
    let slack = cells.iter().map(|(_, n)| *n).min().unwrap_or(0) / 2;
    let most = (target.clamp(0.0, 1.0) * all as f64).round() as u64 + slack;
    let mut set = ModuleSet::default();
    let mut used = 0;
    for (cell, n) in cells {
        if used + n <= most {
            used += n;
            set.insert(cell);
        }
    }
    set
}
