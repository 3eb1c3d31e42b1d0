//! Module sets by name: a file, an expression, or one of the controls; and their size in parameters.

use super::mods::ModsRob;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleSet};
use crate::rng::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// Stream of the draws of random sets.
const STREAM: u64 = 0x5e75;
/// Size of a random set that has no reference: the search's default cap.
const RANDOM_SHARE: f64 = 0.5;

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

fn modules(parameters: &BTreeMap<Cell, u64>) -> impl Iterator<Item = (Cell, u64)> + '_ {
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

/// Reads a set of modules for a model of this shape:
///
/// - the path of a Mods_Rob file (its `set` line counts; a file of another model is refused if `model_hash` is given);
/// - `random:SEED`, `random-without-layer0:SEED`: random projections of the same trainable size as `reference`, else half;
/// - `complement`: the projections that `reference` leaves out;
/// - `layer0`: the projections of layer 0;
/// - anything else is an expression of [`ModuleSet::parse`]: `all`, `layers.16-31.{o_proj,v_proj}`, …
pub fn resolve_mods(
    text: &str,
    config: &ModelConfig,
    reference: Option<&ModuleSet>,
    model_hash: Option<&str>,
) -> Result<ModuleSet> {
    let parameters = cell_parameters(config);
    let text = text.trim();
    let place = || format!("module set `{}`", text.chars().take(80).collect::<String>());
    let random = |seed: &str, layer0: bool| {
        let seed = seed
            .parse()
            .map_err(|_| Error::input(place(), format!("seed `{seed}`"), "a whole number from 0, as in random:1"))?;
        let target = reference.map_or(RANDOM_SHARE, |set| share(set, &parameters));
        Ok(random_set(&parameters, target, seed, layer0))
    };
    if let Some(seed) = text.strip_prefix("random:") {
        return random(seed, true);
    }
    if let Some(seed) = text.strip_prefix("random-without-layer0:") {
        return random(seed, false);
    }
    if text == "complement" {
        let reference = reference
            .ok_or_else(|| Error::input(place(), "no set to complement", "a Mods_Rob file or set beside it"))?;
        return Ok(modules(&parameters).map(|(c, _)| c).filter(|c| !reference.contains(*c)).collect());
    }
    let all = config.cells();
    if text == "layer0" {
        return ModuleSet::parse("layers.0.modules", &all);
    }
    let path = Path::new(text);
    if text.ends_with(".json") || path.is_file() {
        let mods = ModsRob::load(path)?;
        if let Some(hash) = model_hash {
            mods.check_model(hash)?;
        }
        return mods.modules(&all);
    }
    ModuleSet::parse(text, &all)
}
