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

/// Reads a set of modules for a model of this shape:
///
/// - the path of a Mods_Rob file (its `set` line counts; a file of another model is refused if `model_hash` is given);
/// - `random:SEED`, `random-without-layer0:SEED`: random projections of the same trainable size as `reference`, else half;
/// - `complement`: the projections that `reference` leaves out;
/// - `layer0`: the projections of layer 0;
/// - anything else is an expression of [`ModuleSet::parse`]: `all`, `layers.16-31.{o_proj,v_proj}`, …
///
/// # Errors
/// [`Error::Input`] names what is wrong with the text or the file.
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
