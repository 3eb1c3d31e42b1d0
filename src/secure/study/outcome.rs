//! Results of a study, without any prompt or answer.

use super::claims::Claim;
use crate::data::SkippedRows;
use crate::modules::ModuleSet;
use crate::secure::{
    Drift, Evaluation, Measures, ModsRob, ProbeMetadata, Recipe, RobustnessMap, Scores, ScreenCounts, Verdict,
};
use crate::train::{PhaseSummary, Updates};
use std::path::PathBuf;

/// Results of a study, the input of its report.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Outcome {
    /// Title of the report.
    pub title: String,
    /// Hash of the original model.
    pub model_hash: String,
    /// Metadata of the probes.
    pub probe: ProbeMetadata,
    /// Robustness map; none if no setting needs it.
    pub map: Option<RobustnessMap>,
    /// Search; none if Mods_Rob is configured or not needed.
    pub search: Option<ModsRob>,
    /// Mods_Rob.
    pub mods: Option<ModuleSet>,
    /// Maps that are made in other ways, for settings with `by=`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_maps: Vec<MapOutcome>,
    /// Name of the setting that [`super::Conclusion`] recommends.
    #[serde(default)]
    pub recommended: Option<String>,
    /// Why it is recommended, or why none is.
    #[serde(default)]
    pub reason: String,
    /// The recommended setting against the original model; without gates where none is recommended.
    #[serde(default)]
    pub verdict: Verdict,
    /// What the study shows of each recipe that is not plain tuning.
    #[serde(default)]
    pub claims: Vec<Claim>,
    /// One per setting, in the order of the configuration.
    pub settings: Vec<SettingOutcome>,
    /// Rows of the data files that were left out as bad.
    #[serde(default, skip_deserializing)]
    pub skipped_rows: Vec<SkippedRows>,
    /// Rows of the tuning data with prompts of the evaluation, near-duplicates included.
    #[serde(default)]
    pub overlapping_rows: usize,
    /// What settings with `screen` leave out of each file of their data; empty without such a setting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub screened: Vec<ScreenedFile>,
    /// Wall time of the last invocation in seconds, without cached stages.
    pub seconds: f64,
}

/// What screening leaves out of a file, before attack examples are drawn from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ScreenedFile {
    /// The file.
    pub file: String,
    /// Its examples.
    #[serde(flatten)]
    pub counts: ScreenCounts,
}

/// A map, and the set that was found on it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct MapOutcome {
    /// The map, which says how it was made.
    pub map: RobustnessMap,
    /// Search; none if Mods_Rob is configured.
    pub search: Option<ModsRob>,
    /// Mods_Rob.
    pub mods: ModuleSet,
}

/// A setting's measures in brief, the form that scripts read: `swat check` writes the same.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SettingSummary {
    /// Name within the outcome: the recipe's text.
    pub name: String,
    /// The recipe.
    pub recipe: String,
    /// Training seeds; none for the original model.
    pub seeds: Vec<u64>,
    /// Measures.
    #[serde(flatten)]
    pub measures: Measures,
}

impl SettingSummary {
    /// Of a recipe's runs.
    pub fn new<'r>(recipe: &Recipe, runs: impl Iterator<Item = &'r RunOutcome>) -> Self {
        let runs: Vec<&RunOutcome> = runs.collect();
        let evaluations: Vec<&Evaluation> = runs.iter().map(|run| &run.evaluation).collect();
        Self {
            name: recipe.to_string(),
            recipe: recipe.to_string(),
            seeds: runs.iter().filter_map(|run| Some(run.tuned.as_ref()?.seed)).collect(),
            measures: Measures::over_seeds(&evaluations),
        }
    }
}

/// Results of a setting.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SettingOutcome {
    /// In brief.
    #[serde(flatten)]
    pub summary: SettingSummary,
    /// The setting.
    pub setting: Recipe,
    /// Modules that are trained alone.
    pub mods: Option<ModuleSet>,
    /// Their share of the projections' parameters.
    pub share: Option<f64>,
    /// Joint R of that set.
    pub joint: Option<f64>,
    /// The run with the first training seed, or the original model.
    #[serde(flatten)]
    pub first: RunOutcome,
    /// Runs with the other training seeds, in the order of the configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_seeds: Vec<RunOutcome>,
}

impl SettingOutcome {
    /// Runs of all training seeds.
    pub fn runs(&self) -> impl Iterator<Item = &RunOutcome> {
        std::iter::once(&self.first).chain(&self.more_seeds)
    }
}

/// Results of a run with one training seed, or of the original model.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RunOutcome {
    /// Tuning; none for the original model.
    pub tuned: Option<TunedOutcome>,
    /// Evaluation.
    pub evaluation: Evaluation,
    /// Drift of the frozen probe; none for the original model.
    pub drift: Option<Drift>,
}

/// Results of a tuning run.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct TunedOutcome {
    /// Tuned model directory.
    pub dir: PathBuf,
    /// Training seed.
    pub seed: u64,
    /// Steps per epoch.
    pub steps_per_epoch: u64,
    /// Statistics by phase.
    pub phases: Vec<PhaseSummary>,
    /// Update magnitudes.
    pub updates: Updates,
    /// Drift after each epoch and phase.
    pub points: Vec<DriftPoint>,
    /// (step, loss), subsampled.
    pub losses: Vec<(u64, f64)>,
    /// Peak memory of the GPU, else of the process, in bytes.
    pub peak_bytes: u64,
    /// Share of the task's own data among the tokens with a loss of an epoch; none in outcomes of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_share: Option<f64>,
    /// Examples of the task's data and the attack that screening left out; none without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screened: Option<ScreenCounts>,
}

impl TunedOutcome {
    /// Tokens of the task's own data that were trained: their share of all tokens with a loss.
    pub fn task_tokens(&self) -> Option<f64> {
        let trained: u64 = self.phases.iter().map(|phase| phase.trained_tokens).sum();
        Some(self.task_share? * trained as f64)
    }
}

/// Frozen probe and refusal log-odds at one step, on the security file's test split.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DriftPoint {
    /// Steps taken; 0 = the original model.
    pub step: u64,
    /// Scores at the metric layer.
    pub scores: Scores,
}
