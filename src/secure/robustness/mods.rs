//! The Mods_Rob file: what the search found, how, and a line to edit by hand.

use super::noise::Noise;
use super::sets::{cell_parameters, modules, random_set, share};
use crate::error::{Error, Result};
use crate::io::json;
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleSet};
use crate::secure::check_format;
use crate::secure::eval::metrics::ScoreKind;
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

pub(crate) const FORMAT: &str = "swat.mods_rob/1";
const MAX_BYTES: u64 = 1 << 26;
/// Size of a random set that has no reference: the search's default cap.
const RANDOM_SHARE: f64 = 0.5;

/// One window that the search looked at.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchStep {
    /// Seed of the search that took the step; none = the last check of the majority over all seeds.
    pub seed: Option<u64>,
    /// The window, `layers.4-5.v_proj`; `none` where a window was only taken out, to see what it costs.
    pub window: String,
    /// The window that left.
    pub without: Option<String>,
    /// R of the set with the change, perturbed jointly.
    pub joint: f64,
    /// Whether the change was kept.
    pub accepted: bool,
}

/// A set of robust modules, as saved. `set` alone decides what is trained and may be edited; the rest is its record.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModsRob {
    /// `swat.mods_rob/1`.
    pub format: String,
    /// The modules, as an expression: `layers.8-15.{q_proj,v_proj}`. Edit this line.
    pub set: String,
    /// The set as it was found; differs from `set` after an edit.
    pub found: String,
    /// Parameters of the set over those of all projections, see [`crate::secure::share`].
    pub share: f64,
    /// R of the set, perturbed jointly, over all seeds.
    pub joint: f64,
    /// R that a set may reach.
    pub tau: f64,
    /// Largest share.
    pub cap: f64,
    /// Smallest share.
    pub floor: f64,
    /// Layers a window.
    pub window: usize,
    /// The score behind R.
    pub score: ScoreKind,
    /// Kind of perturbation.
    pub kind: Noise,
    /// Its relative norm.
    pub epsilon: f32,
    /// One search a seed; the set is their majority.
    pub seeds: Vec<u64>,
    /// How many of them chose each cell.
    pub votes: BTreeMap<Cell, usize>,
    /// R of each eligible cell by itself.
    pub single: BTreeMap<Cell, f64>,
    /// Every window that was looked at, in order.
    pub steps: Vec<SearchStep>,
    /// Hash of the model.
    pub model_hash: String,
    /// Hash of the robustness map.
    pub map_hash: String,
    /// Wall time.
    pub seconds: f64,
}

impl ModsRob {
    /// Writes it as JSON, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        json::write(path, self)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Input`] says what is wrong with the file; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        let mods: Self = json::read(path, MAX_BYTES, "a Mods_Rob file that `swat search` wrote")?;
        check_format(&path.display().to_string(), &mods.format, FORMAT)?;
        Ok(mods)
    }

    /// The modules of `set`, of a model with these cells.
    ///
    /// # Errors
    /// [`Error::Input`] where `set` is no expression of these cells.
    pub fn modules(&self, all: &ModuleSet) -> Result<ModuleSet> {
        ModuleSet::parse(&self.set, all)
    }

    /// Whether `set` was changed after the search.
    pub fn edited(&self) -> bool {
        self.set != self.found
    }

    /// Refuses another model.
    ///
    /// # Errors
    /// [`Error::Input`] where the hash differs.
    pub fn check_model(&self, model_hash: &str) -> Result<()> {
        if self.model_hash == model_hash {
            return Ok(());
        }
        let found = format!("a Mods_Rob file of the model {}", self.model_hash);
        Err(Error::input("module set", found, format!("one of this model, {model_hash}, or an expression")))
    }
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
