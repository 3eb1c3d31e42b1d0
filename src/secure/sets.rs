//! Module sets by name: a file, an expression, or one of the controls; and their size in parameters.

use super::mods::ModsRob;
use crate::backend::philox::Philox;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleSet};
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

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

/// A set of modules as users write it. `random:SEED` and `random-without-layer0:SEED` are random projections of the
/// same trainable size as a reference set, else of half of all; `complement` are the projections that the reference
/// leaves out; `layer0` are those of layer 0. Anything else is the path of a Mods_Rob file or an expression of
/// [`ModuleSet::parse`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetSpec {
    /// Random projections.
    Random {
        /// Seed of the order in which projections are drawn.
        seed: u64,
        /// Whether those of layer 0 are among them.
        layer0: bool,
    },
    /// The projections outside the reference.
    Complement,
    /// The projections of layer 0.
    Layer0,
    /// A path or an expression.
    Named(String),
}

impl FromStr for SetSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let seed = |seed: &str| {
            let found = || format!("seed `{seed}`");
            seed.parse().map_err(|_| Error::input(place(text), found(), "a whole number from 0, as in random:1"))
        };
        Ok(match text.split_once(':') {
            Some(("random", digits)) => Self::Random { seed: seed(digits)?, layer0: true },
            Some(("random-without-layer0", digits)) => Self::Random { seed: seed(digits)?, layer0: false },
            _ if text == "complement" => Self::Complement,
            _ if text == "layer0" => Self::Layer0,
            _ => Self::Named(text.to_owned()),
        })
    }
}

fn place(text: &str) -> String {
    format!("module set `{}`", text.chars().take(80).collect::<String>())
}

impl SetSpec {
    /// The set in a model of this shape, beside `reference`.
    ///
    /// # Errors
    /// [`Error::Input`] for a complement without reference, for an expression that fits no module of the model, and for
    /// a Mods_Rob file that cannot be read or is of another model than `model_hash`.
    pub fn resolve(
        &self,
        config: &ModelConfig,
        reference: Option<&ModuleSet>,
        model_hash: Option<&str>,
    ) -> Result<ModuleSet> {
        let parameters = cell_parameters(config);
        let all = config.cells();
        match self {
            Self::Random { seed, layer0 } => {
                let target = reference.map_or(RANDOM_SHARE, |set| share(set, &parameters));
                Ok(random_set(&parameters, target, *seed, *layer0))
            }
            Self::Complement => {
                let expected = "a Mods_Rob file or set beside it";
                let reference =
                    reference.ok_or_else(|| Error::input(place("complement"), "no set to complement", expected))?;
                Ok(modules(&parameters).map(|(c, _)| c).filter(|c| !reference.contains(*c)).collect())
            }
            Self::Layer0 => ModuleSet::parse("layers.0.modules", &all),
            Self::Named(text) => {
                let path = Path::new(text);
                if !text.ends_with(".json") && !path.is_file() {
                    return ModuleSet::parse(text, &all);
                }
                let mods = ModsRob::load(path)?;
                if let Some(hash) = model_hash {
                    mods.check_model(hash)?;
                }
                mods.modules(&all)
            }
        }
    }
}

/// Parses and resolves a [`SetSpec`].
///
/// # Errors
/// [`Error::Input`] as in [`SetSpec::resolve`], and for a seed that is not a whole number.
pub fn resolve_mods(
    text: &str,
    config: &ModelConfig,
    reference: Option<&ModuleSet>,
    model_hash: Option<&str>,
) -> Result<ModuleSet> {
    text.parse::<SetSpec>()?.resolve(config, reference, model_hash)
}
