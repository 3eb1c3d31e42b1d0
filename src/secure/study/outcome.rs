//! What a study found: serde types without any prompt or answer.

use super::SettingSpec;
use crate::modules::ModuleSet;
use crate::secure::{Drift, Evaluation, ModsRob, ProbeAbout, RobustnessMap, Scores};
use crate::train::{PhaseSummary, Updates};
use std::path::PathBuf;

/// Everything that a report shows.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Outcome {
    /// Title of the report.
    pub title: String,
    /// Hash of the model as given.
    pub model_hash: String,
    /// The classifiers.
    pub probe: ProbeAbout,
    /// The robustness map; none where no setting needs one.
    pub map: Option<RobustnessMap>,
    /// The search; none where Mods_Rob was given by hand or not needed.
    pub search: Option<ModsRob>,
    /// Mods_Rob.
    pub mods: Option<ModuleSet>,
    /// One a setting, in the order of the configuration.
    pub settings: Vec<SettingOutcome>,
    /// Wall time of this invocation; stages that were kept cost nothing.
    pub seconds: f64,
}

/// One setting.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SettingOutcome {
    /// As in the configuration.
    pub setting: SettingSpec,
    /// What the first phase trains.
    pub mods: Option<ModuleSet>,
    /// Its share of the projections' parameters.
    pub share: Option<f64>,
    /// R of that set, perturbed jointly.
    pub joint: Option<f64>,
    /// The run with the first training seed, or the model as given.
    #[serde(flatten)]
    pub first: RunOutcome,
    /// The runs with the other training seeds, in the order of the configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_seeds: Vec<RunOutcome>,
}

impl SettingOutcome {
    /// The runs of all training seeds.
    pub fn runs(&self) -> impl Iterator<Item = &RunOutcome> {
        std::iter::once(&self.first).chain(&self.more_seeds)
    }
}

/// A model: tuned with one training seed, or as given.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RunOutcome {
    /// How it was tuned; none for the model as given.
    pub tuned: Option<TunedOutcome>,
    /// What the model does.
    pub evaluation: Evaluation,
    /// The frozen probe on it; none for the model as given.
    pub drift: Option<Drift>,
}

/// A tuning run.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct TunedOutcome {
    /// Its model directory.
    pub dir: PathBuf,
    /// Training seed.
    pub seed: u64,
    /// Steps an epoch.
    pub steps_per_epoch: u64,
    /// Phases.
    pub phases: Vec<PhaseSummary>,
    /// How far each cell moved.
    pub updates: Updates,
    /// Drift while it ran.
    pub points: Vec<DriftPoint>,
    /// (step, loss), thinned.
    pub losses: Vec<(u64, f64)>,
    /// Most memory in use, in bytes: the GPU's, else that of the process.
    pub peak_bytes: u64,
}

/// Frozen probe and refusal log-odds at one step, on the security file's test split.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DriftPoint {
    /// Steps taken; 0 = the model as given.
    pub step: u64,
    /// Scores at the metric layer.
    pub scores: Scores,
}
