//! The Mods_Rob file: the set that the search found, with its record; and module sets as users name them.

use super::By;
use super::noise::Noise;
use super::sets::{cell_parameters, projections, random_set, share};
use crate::error::{Error, Result};
use crate::io::file::has_format;
use crate::io::json::{self, check_format};
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleSet};
use crate::options::serde_as_text;
use crate::secure::eval::metrics::ScoreKind;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

pub(crate) const FORMAT: &str = "swat.mods_rob/1";
const MAX_BYTES: u64 = 1 << 26;
/// Size of a random set that has no reference: the search's default cap.
const RANDOM_SHARE: f64 = 0.5;

/// One joint run of the search.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchStep {
    /// Seed of the search; none = the final check of the majority over all seeds.
    pub seed: Option<u64>,
    /// The window that was added, `layers.4-5.v_proj`; `none` where one was only removed, to measure its cost.
    pub window: String,
    /// The window that was removed.
    pub without: Option<String>,
    /// Joint R of the changed set.
    pub joint: f64,
    /// Whether the change was kept.
    pub accepted: bool,
}

impl SearchStep {
    /// A joint run of one seed's search that was not kept.
    pub(super) fn of(seed: u64, window: &ModuleSet, without: Option<&ModuleSet>, joint: f64) -> Self {
        let (window, without) = (window.to_string(), without.map(ToString::to_string));
        Self { seed: Some(seed), window, without, joint, accepted: false }
    }
}

/// A set of robust modules. `set` alone determines what is trained and may be edited; the rest is its record.
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
    /// Joint R of the set over all seeds.
    pub joint: f64,
    /// Largest joint R.
    pub tau: f64,
    /// Largest share of parameters.
    pub cap: f64,
    /// Smallest share of parameters.
    pub floor: f64,
    /// Layers per window.
    pub window: usize,
    /// The score whose drop is R: `refusal` on a conflict map.
    pub score: ScoreKind,
    /// Perturbation.
    pub kind: Noise,
    /// Its relative norm.
    pub epsilon: f32,
    /// Seeds, one search each; the set is their majority.
    pub seeds: Vec<u64>,
    /// Number of searches that chose each cell.
    pub votes: BTreeMap<Cell, usize>,
    /// R of each projection perturbed alone.
    pub single: BTreeMap<Cell, f64>,
    /// Joint runs, in order.
    pub steps: Vec<SearchStep>,
    /// Hash of the model.
    pub model_hash: String,
    /// Hash of the robustness map.
    pub map_hash: String,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// How the map was made.
    #[serde(default, skip_serializing_if = "By::is_noise")]
    pub by: By,
}

impl ModsRob {
    /// Writes it as JSON, atomically.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        json::write(path, self)
    }

    /// Whether a file is one that [`ModsRob::save`] wrote, of any version.
    pub fn is_file(path: &Path) -> bool {
        has_format(path, "swat.mods_rob/", MAX_BYTES)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Input`] for a malformed file; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        let mods: Self = json::read(path, MAX_BYTES, "a Mods_Rob file that `swat search` wrote")?;
        check_format(&path.display().to_string(), &mods.format, FORMAT)?;
        Ok(mods)
    }

    /// Parses `set` for a model with these cells.
    ///
    /// # Errors
    /// [`Error::Input`] where `set` is not an expression of these cells.
    pub fn modules(&self, all: &ModuleSet) -> Result<ModuleSet> {
        ModuleSet::parse(&self.set, all)
    }

    /// Checks that the file belongs to the model.
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

/// A named set of modules: `random:SEED` and `random-without-layer0:SEED` are random projections of the same share of
/// parameters as a reference set (of half of all without one), `complement` are the projections outside the reference,
/// `layer0` those of layer 0. Anything else is the path of a Mods_Rob file, or an expression of [`ModuleSet::parse`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetSpec {
    /// Random projections, by seed.
    Random(u64),
    /// Random projections outside of layer 0, by seed.
    RandomWithoutLayer0(u64),
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
            seed.parse().map_err(|_| Error::input(place(text), found(), "an integer from 0, as in random:1"))
        };
        Ok(match text.split_once(':') {
            Some(("random", digits)) => Self::Random(seed(digits)?),
            Some(("random-without-layer0", digits)) => Self::RandomWithoutLayer0(seed(digits)?),
            _ if text == "complement" => Self::Complement,
            _ if text == "layer0" => Self::Layer0,
            _ => Self::Named(text.to_owned()),
        })
    }
}

impl fmt::Display for SetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random(seed) => write!(f, "random:{seed}"),
            Self::RandomWithoutLayer0(seed) => write!(f, "random-without-layer0:{seed}"),
            Self::Complement => f.write_str("complement"),
            Self::Layer0 => f.write_str("layer0"),
            Self::Named(text) => f.write_str(text),
        }
    }
}

serde_as_text!(SetSpec);

fn place(text: &str) -> String {
    format!("module set `{}`", text.chars().take(80).collect::<String>())
}

impl SetSpec {
    /// The path of a Mods_Rob file, if that is what it names.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Named(text) if text.ends_with(".json") || Path::new(text).is_file() => Some(Path::new(text)),
            _ => None,
        }
    }

    /// The cells of the set in a model, given a `reference` set. A Mods_Rob file must be of the model with
    /// `model_hash`.
    ///
    /// # Errors
    /// [`Error::Input`] for a complement without reference, an expression that matches no cell of the model, or a
    /// Mods_Rob file that is damaged or of another model; [`Error::Io`].
    pub fn resolve(
        &self,
        config: &ModelConfig,
        reference: Option<&ModuleSet>,
        model_hash: Option<&str>,
    ) -> Result<ModuleSet> {
        let parameters = cell_parameters(config);
        let all = config.cells();
        let target = reference.map_or(RANDOM_SHARE, |set| share(set, &parameters));
        match self {
            Self::Random(seed) => Ok(random_set(&parameters, target, *seed, |_| true)),
            Self::RandomWithoutLayer0(seed) => {
                Ok(random_set(&parameters, target, *seed, |cell| cell.layer() != Some(0)))
            }
            Self::Complement => {
                let missing =
                    || Error::input(place("complement"), "no reference set", "a Mods_Rob file or set beside it");
                let reference = reference.ok_or_else(missing)?;
                Ok(projections(&parameters).map(|(c, _)| c).filter(|c| !reference.contains(*c)).collect())
            }
            Self::Layer0 => ModuleSet::parse("layers.0.modules", &all),
            Self::Named(text) => {
                let Some(path) = self.file() else { return ModuleSet::parse(text, &all) };
                let mods = ModsRob::load(path)?;
                if let Some(hash) = model_hash {
                    mods.check_model(hash)?;
                }
                mods.modules(&all)
            }
        }
    }
}
