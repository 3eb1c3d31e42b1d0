//! The Mods_Rob file: what the search found, how, and a line to edit by hand.

use super::check_format;
use super::noise::Noise;
use super::scores::ScoreKind;
use crate::error::{Error, Result};
use crate::io::json;
use crate::modules::{Cell, ModuleSet};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) const FORMAT: &str = "swat.mods_rob/1";
const MAX_BYTES: u64 = 1 << 26;

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
    /// Parameters of the set over those of all projections, see [`super::share`].
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
    pub fn save(&self, path: &Path) -> Result<()> {
        json::write(path, self)
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let mods: Self = json::read(path, MAX_BYTES, "a Mods_Rob file that `swat search` wrote")?;
        check_format(&path.display().to_string(), &mods.format, FORMAT)?;
        Ok(mods)
    }

    /// The modules of `set`, of a model with these cells.
    pub fn modules(&self, all: &ModuleSet) -> Result<ModuleSet> {
        ModuleSet::parse(&self.set, all)
    }

    /// Whether `set` was changed after the search.
    pub fn edited(&self) -> bool {
        self.set != self.found
    }

    /// Refuses another model.
    pub fn check_model(&self, model_hash: &str) -> Result<()> {
        if self.model_hash == model_hash {
            return Ok(());
        }
        let found = format!("a Mods_Rob file of the model {}", self.model_hash);
        Err(Error::input("module set", found, format!("one of this model, {model_hash}, or an expression")))
    }
}
