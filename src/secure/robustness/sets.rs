//! Parameter counts of module sets, and random sets of a given share.

use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleSet};
use crate::rng::Philox;
use std::collections::BTreeMap;

/// Stream of the draws of random sets.
const STREAM: u64 = 0x5e75;

/// Number of parameters of every cell; biases count with their projection.
pub fn cell_parameters(config: &ModelConfig) -> BTreeMap<Cell, u64> {
    let mut cells = BTreeMap::new();
    for (id, shape) in config.params() {
        *cells.entry(id.cell()).or_default() += shape.iter().product::<usize>() as u64;
    }
    cells
}

/// Share of a set's projections in the parameters of all projections (q, k, v, o, gate, up, down), 0 to 1. Embedding,
/// norms and head are not counted, so that the share is comparable across vocabularies and tied or untied heads.
pub fn share(set: &ModuleSet, parameters: &BTreeMap<Cell, u64>) -> f64 {
    let all: u64 = projections(parameters).map(|(_, n)| n).sum();
    let own: u64 = projections(parameters).filter(|(c, _)| set.contains(*c)).map(|(_, n)| n).sum();
    own as f64 / all.max(1) as f64
}

/// The projections and their numbers of parameters.
pub(super) fn projections(parameters: &BTreeMap<Cell, u64>) -> impl Iterator<Item = (Cell, u64)> + '_ {
    parameters.iter().filter(|(c, _)| matches!(c, Cell::Module(_))).map(|(c, n)| (*c, *n))
}

/// A random set of the projections that `eligible` admits, of about `target` share: cells are visited in random order,
/// and each that still fits is taken.
pub fn random_set(
    parameters: &BTreeMap<Cell, u64>,
    target: f64,
    seed: u64,
    eligible: impl Fn(Cell) -> bool,
) -> ModuleSet {
    let all: u64 = projections(parameters).map(|(_, n)| n).sum();
    let mut cells: Vec<(Cell, u64)> = projections(parameters).filter(|(c, _)| eligible(*c)).collect();
    Philox::new(seed, STREAM).shuffle(&mut cells);
    // Half of the smallest cell: rounding to whole cells cannot do better.
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
