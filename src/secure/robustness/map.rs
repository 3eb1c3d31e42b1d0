//! Results of the robustness map, saved as JSON for the search and the heat map.

use super::By;
use super::noise::Noise;
use super::step::{PlannedStep, StepRecord};
use crate::data::{RowOptions, Split};
use crate::error::{Error, Result};
use crate::io::file::has_format;
use crate::io::json::{self, check_format};
use crate::modules::{Cell, ModuleSet, RateTable};
use crate::secure::eval::metrics::{ScoreKind, Scores};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) const FORMAT: &str = "swat.robustness/1";
/// Far above the map of any model.
const MAX_BYTES: u64 = 1 << 28;

/// Mean and standard error over independent draws.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stat {
    /// Mean over draws; an antithetic pair counts as one draw.
    pub mean: f64,
    /// Standard error of the mean; none for a single draw.
    pub error: Option<f64>,
}

impl Stat {
    /// From values of independent draws; `None` for no values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (!values.is_empty()).then_some(Self { mean, error: (values.len() > 1).then(|| (variance / n).sqrt()) })
    }
}

/// One step of the ε sweep over the reference sets.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpsilonPoint {
    /// Relative norm of the perturbation.
    pub epsilon: f32,
    /// Mean R of the reference sets.
    pub drop: f64,
}

/// Robustness of one cell.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellRobustness {
    /// The cell.
    pub cell: Cell,
    /// Number of its parameters.
    pub parameters: u64,
    /// Scores of the perturbed copies.
    pub scores: BTreeMap<ScoreKind, Stat>,
    /// R of each score: 0 = robust, 1 = the score is lost. Absent where the clean score is not above 0.
    pub drop: BTreeMap<ScoreKind, Stat>,
    /// R of each score by seed, in the order of the map's seeds.
    pub drop_by_seed: BTreeMap<ScoreKind, Vec<f64>>,
    /// Mean ‖h′ − h‖ / ‖h‖ at the metric layer.
    pub shift: Stat,
    /// Control (b): R of the gap per unit of `shift`.
    pub drop_per_shift: Option<Stat>,
    /// Control (c): R of the gap of the `control` head.
    pub control_drop: Option<Stat>,
    /// R of the gap minus `control_drop`, per draw.
    pub beyond_control: Option<Stat>,
    /// Control (a): AUROC of a probe retrained on the perturbed copy.
    pub retrained_auroc: Option<Stat>,
    /// First-order fall of the task's loss by the cell's part of the planned step, in nats a token; none in a noise map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_gain: Option<f64>,
}

/// The robustness map of a model.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RobustnessMap {
    /// `swat.robustness/1`.
    pub format: String,
    /// Hash of the model.
    pub model_hash: String,
    /// Hash of the probe.
    pub probe_hash: String,
    /// Hash of the prompts that were run.
    pub prompts_hash: String,
    /// Decoder layers.
    pub layers: usize,
    /// Index of the hidden state that the probe reads.
    pub metric_layer: usize,
    /// Split that was scored.
    pub split: Split,
    /// Numbers of scored harmful and benign prompts.
    pub prompts: (usize, usize),
    /// Perturbation.
    pub kind: Noise,
    /// Its relative norm.
    pub epsilon: f32,
    /// The ε sweep; empty where ε was given.
    pub epsilon_sweep: Vec<EpsilonPoint>,
    /// Seeds of the draws.
    pub seeds: Vec<u64>,
    /// Whether each draw was applied with both signs.
    pub antithetic: bool,
    /// Scores of the unperturbed model.
    pub clean: Scores,
    /// Gap of the `control` head on the unperturbed model.
    pub clean_control_gap: Option<f64>,
    /// AUROC of a probe retrained on the unperturbed model.
    pub clean_retrained_auroc: Option<f64>,
    /// Embedding first, then layer by layer.
    pub cells: Vec<CellRobustness>,
    /// Wall time of the cells in seconds, summed over interrupted runs.
    pub seconds: f64,
    /// Paths of its inputs, which the search needs again.
    #[serde(default)]
    pub made_from: Option<MapInputs>,
    /// How it was made.
    #[serde(default, skip_serializing_if = "By::is_noise")]
    pub by: By,
    /// The planned step; none in a noise map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<StepRecord>,
}

/// Paths of the inputs of a map.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapInputs {
    /// Model directory.
    pub model: PathBuf,
    /// Directory of the adapter that was merged into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Probe file.
    pub probe: PathBuf,
    /// Labelled prompts.
    pub security: PathBuf,
    /// How they were read.
    #[serde(default, skip_serializing_if = "RowOptions::is_default")]
    pub rows: RowOptions,
    /// Training conversations of the planned step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<PathBuf>,
}

impl RobustnessMap {
    /// Writes the map as JSON, atomically.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        json::write(path, self)
    }

    /// Whether a file is one that [`RobustnessMap::save`] wrote, of any version.
    pub fn is_file(path: &Path) -> bool {
        has_format(path, "swat.robustness/", MAX_BYTES)
    }

    /// Reads and checks a map file.
    ///
    /// # Errors
    /// [`Error::Input`] names the malformed field; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        let map: Self = json::read(path, MAX_BYTES, "a map that `swat robustness` wrote")?;
        let place = path.display().to_string();
        map.check(&place)?;
        Ok(map)
    }

    /// Checks format, layers and numbers of values.
    pub(super) fn check(&self, place: &str) -> Result<()> {
        check_format(place, &self.format, FORMAT)?;
        for cell in &self.cells {
            let place = || format!("{place}: cells: {}", cell.cell);
            if cell.cell.layer().is_some_and(|l| l >= self.layers) {
                return Err(Error::input(place(), "a layer outside the model", format!("0 to {}", self.layers)));
            }
            if let Some((kind, values)) = cell.drop_by_seed.iter().find(|(_, v)| v.len() != self.seeds.len()) {
                let found = format!("{} values of `{kind}`", values.len());
                return Err(Error::input(place(), found, format!("one for each of {} seeds", self.seeds.len())));
            }
        }
        Ok(())
    }

    /// blake3 of the map's JSON with `seconds` set to 0.
    ///
    /// # Errors
    /// [`Error::Failed`] where the map cannot be serialized, which would be a bug.
    pub fn hash(&self) -> Result<String> {
        let text = json::to_string(&Self { seconds: 0.0, ..self.clone() })?;
        Ok(blake3::hash(text.as_bytes()).to_hex().to_string())
    }

    /// Checks that a planned step is that of the map.
    ///
    /// # Errors
    /// [`Error::Input`] where its data are others.
    pub fn check_step(&self, step: &PlannedStep) -> Result<()> {
        let record = &step.scale.record;
        if self.step.as_ref().is_some_and(|own| own.data_hash == record.data_hash) {
            return Ok(());
        }
        let found = format!("training data with hash {}", record.data_hash);
        Err(Error::input("--data", found, "the data of the map, which were others when it was made; make it again"))
    }

    /// The score by which the map is read: the one asked for, or that of a conflict map, which has no other.
    pub fn score(&self, asked: ScoreKind) -> ScoreKind {
        if self.by == By::Conflict { ScoreKind::Refusal } else { asked }
    }

    /// R of a set to first order, the sum over its cells: the joint score of a conflict map.
    ///
    /// # Errors
    /// [`Error::Input`] names a cell that the map lacks.
    pub fn first_order(&self, set: &ModuleSet) -> Result<f64> {
        let drop = |cell: Cell| {
            let missing =
                || Error::input("robustness map", format!("no drop of {cell}"), "a conflict map of all projections");
            self.cell(cell).and_then(|c| c.drop.get(&ScoreKind::Refusal)).map(|drop| drop.mean).ok_or_else(missing)
        };
        set.iter().map(drop).sum()
    }

    /// Factors on the learning rates of the cells by their rank in R, in even steps: 0 for the cell with the largest, 2 for
    /// that with the smallest, so that their mean is 1.
    ///
    /// # Errors
    /// [`Error::Input`] where fewer than two cells have the score.
    pub fn rates(&self, asked: ScoreKind) -> Result<RateTable> {
        let score = self.score(asked);
        let ranked = self.cells.iter().filter_map(|cell| Some((cell.cell, cell.drop.get(&score)?.mean)));
        let mut ranked: Vec<(Cell, f64)> = ranked.collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        if ranked.len() < 2 {
            let found = format!("{} cells with the score {score}", ranked.len());
            return Err(Error::input("robustness map", found, "a map of at least two cells"));
        }
        let step = 2.0 / (ranked.len() - 1) as f32;
        Ok(ranked.into_iter().enumerate().map(|(rank, (cell, _))| (cell, rank as f32 * step)).collect())
    }

    /// The entry of a cell.
    pub fn cell(&self, cell: Cell) -> Option<&CellRobustness> {
        self.cells.iter().find(|c| c.cell == cell)
    }

    /// Checks that the map belongs to the model.
    ///
    /// # Errors
    /// [`Error::Input`] where the hash differs.
    pub fn check_model(&self, model_hash: &str) -> Result<()> {
        if self.model_hash == model_hash {
            return Ok(());
        }
        let expected = format!("the model that it was made of, {}; make a map of this model", self.model_hash);
        Err(Error::input("robustness map", format!("a model with hash {model_hash}"), expected))
    }
}
