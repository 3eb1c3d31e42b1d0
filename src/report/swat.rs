//! The report of a secure-tuning run: plain inputs, and what is drawn from them.
//!
//! The inputs are plain numbers and names, so that this room needs nothing of those that measured them.

mod maps;
mod runs;

use super::html::{Figure, Footer, Report, Section};
use super::palette::Tone;
use crate::modules::{Cell, ModuleSet};
use std::collections::BTreeSet;

pub use maps::{layers_table, mods_map, robustness_map, robustness_table};
pub(super) use runs::entry;
pub use runs::{
    drift_probe_chart, drift_refusal_chart, loss_chart, results_chart, results_table, sets_chart, updates_chart,
    updates_table,
};

/// What a run is, which decides its colour everywhere in the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SettingKind {
    /// The model before any tuning.
    AsGiven,
    /// Plain tuning for E epochs.
    Plain,
    /// Plain tuning for as many steps as both phases together.
    PlainEqualSteps,
    /// Warm-up on Mods_Rob, then all.
    Swat,
    /// Warm-up on a random set of the same size.
    Random,
    /// Warm-up on all modules that are not in Mods_Rob.
    Complement,
    /// Plain tuning with refusals mixed in.
    Refusals,
    /// Anything else.
    #[default]
    Other,
}

impl SettingKind {
    /// Its colour.
    pub fn tone(self) -> Tone {
        match self {
            Self::AsGiven => Tone::Grey,
            Self::Plain => Tone::Vermilion,
            Self::PlainEqualSteps => Tone::Amber,
            Self::Swat => Tone::Blue,
            Self::Random => Tone::Green,
            Self::Complement => Tone::Pink,
            Self::Refusals => Tone::Sky,
            Self::Other => Tone::Muted,
        }
    }
}

/// A run by kind and name, for example `Random` and `random set`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// What it is.
    pub kind: SettingKind,
    /// What it is called in tables and legends; the same name means the same run.
    pub name: String,
}

/// A measured value and the interval around it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measure {
    /// The value; shares are from 0 to 1.
    pub value: f64,
    /// Lower and upper end; `None` where one value is all there is.
    pub interval: Option<(f64, f64)>,
}

/// One row of the table of results.
#[derive(Clone, Debug, Default)]
pub struct SettingResult {
    /// The run.
    pub setting: Setting,
    /// Attack success rate: share of answers without a refusal expression.
    pub asr: Option<Measure>,
    /// Share of answers that do what was forbidden.
    pub strict_asr: Option<Measure>,
    /// Share of harmless prompts that are refused.
    pub over_refusal: Option<Measure>,
    /// Task score, a share.
    pub task: Option<Measure>,
    /// Perplexity on held-out answers.
    pub perplexity: Option<Measure>,
    /// Optimiser steps of all phases.
    pub steps: u64,
    /// Share of the projections' parameters in the set that is trained apart; `None` where there is none.
    pub trainable_share: Option<f64>,
    /// Training seeds over which the values are means.
    pub seeds: Vec<u64>,
}

/// The table of results.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// One a setting.
    pub rows: Vec<SettingResult>,
    /// What the intervals are and how many prompts stand behind a value, one sentence.
    pub intervals: String,
}

/// Robustness of one cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CellScore {
    /// The cell.
    pub cell: Cell,
    /// Relative drop of the score when the cell is perturbed; smaller = more robust.
    pub mean: f64,
    /// Standard error over the draws, NaN if there was one draw.
    pub std_error: f64,
}

/// The layer × module map (figure 3).
#[derive(Clone, Debug, Default)]
pub struct Robustness {
    /// Which score dropped: `gap`.
    pub score: String,
    /// What was done to the weights: `gaussian, ε = 1.2`.
    pub perturbation: String,
    /// One a cell.
    pub cells: Vec<CellScore>,
    /// The set to outline; may be empty.
    pub mods: ModuleSet,
    /// Seeds of the draws.
    pub seeds: Vec<u64>,
}

/// Mods_Rob (figure 4).
#[derive(Clone, Debug, Default)]
pub struct Mods {
    /// All cells that could have been chosen.
    pub all: ModuleSet,
    /// Those that were.
    pub chosen: ModuleSet,
    /// Share of the searches that chose a cell; empty after a single search.
    pub agreement: Vec<(Cell, f64)>,
    /// Share of the projections' parameters in the set.
    pub trainable_share: f64,
    /// Joint score of the whole set, and its limit τ.
    pub joint_score: Option<(f64, f64)>,
    /// Seeds of the searches.
    pub seeds: Vec<u64>,
}

/// How far the cells moved in one run (figure 5).
#[derive(Clone, Debug, Default)]
pub struct SettingUpdates {
    /// The run.
    pub setting: Setting,
    /// ‖ΔW‖_F / ‖W‖_F of cells, phases as a root of summed squares.
    pub relative: Vec<(Cell, f64)>,
    /// Training seeds over which the values are means.
    pub seeds: Vec<u64>,
}

/// Updates of several runs, told apart by one set.
#[derive(Clone, Debug, Default)]
pub struct Updates {
    /// Runs.
    pub settings: Vec<SettingUpdates>,
    /// Mods_Rob.
    pub mods: ModuleSet,
}

/// Drift of one run at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EpochDrift {
    /// Epochs since the start of the first phase; 0 = the model as given.
    pub epoch: f64,
    /// Score of the frozen probe.
    pub probe: Option<Measure>,
    /// Refusal log-odds: harmful minus benign prompts.
    pub refusal: Option<Measure>,
}

/// Drift of one run.
#[derive(Clone, Debug, Default)]
pub struct SettingDrift {
    /// The run.
    pub setting: Setting,
    /// By ascending epoch.
    pub epochs: Vec<EpochDrift>,
}

/// Drift of several runs.
#[derive(Clone, Debug, Default)]
pub struct Drift {
    /// Runs.
    pub settings: Vec<SettingDrift>,
    /// Which score of the probe is shown: `gap of the last layer's probe`.
    pub probe_score: String,
    /// What the intervals are, and the seeds.
    pub note: String,
}

/// The loss of one run.
#[derive(Clone, Debug, Default)]
pub struct SettingLoss {
    /// The run.
    pub setting: Setting,
    /// Step and loss.
    pub points: Vec<(u64, f64)>,
    /// Training seeds over which the values are means.
    pub seeds: Vec<u64>,
}

/// A warm-up set and what came of it.
#[derive(Clone, Debug, Default)]
pub struct SetOutcome {
    /// The set, by the run that used it.
    pub setting: Setting,
    /// Joint drop of the score when the whole set is perturbed.
    pub joint_score: f64,
    /// Attack success rate after the run.
    pub asr: Measure,
    /// Training seeds over which it is a mean.
    pub seeds: Vec<u64>,
}

/// Everything that a report can show; what is empty or `None` is left out.
#[derive(Clone, Debug, Default)]
pub struct SwatReport {
    /// Title: the model's name.
    pub title: String,
    /// What was run, in one or two sentences.
    pub subtitle: String,
    /// What was found, in paragraphs.
    pub findings: String,
    /// Table and chart of results.
    pub results: Option<Results>,
    /// Joint noise score of warm-up sets against what came of them.
    pub sets: Vec<SetOutcome>,
    /// Figure 3.
    pub robustness: Option<Robustness>,
    /// Figure 4.
    pub mods: Option<Mods>,
    /// Figure 5.
    pub updates: Option<Updates>,
    /// Probe and behaviour by epoch.
    pub drift: Option<Drift>,
    /// Loss curves.
    pub losses: Vec<SettingLoss>,
    /// Where the numbers come from.
    pub footer: Footer,
}

impl SwatReport {
    /// The page.
    pub fn page(&self) -> Report {
        let sections = [
            self.results_section(),
            self.modules_section(),
            self.updates_section(),
            self.drift_section(),
            self.training_section(),
        ];
        Report {
            title: self.title.clone(),
            subtitle: self.subtitle.clone(),
            highlights: self.results.as_ref().map(runs::highlights).unwrap_or_default(),
            sections: sections.into_iter().flatten().collect(),
            footer: self.footer.clone(),
        }
    }

    fn results_section(&self) -> Option<Section> {
        if self.results.is_none() && self.sets.is_empty() && self.findings.is_empty() {
            return None;
        }
        let mut section = Section { heading: "Results".into(), text: self.findings.clone(), ..Section::default() };
        if let Some(results) = &self.results {
            section.figures.push(Figure {
                name: "results".into(),
                svg: results_chart(results).svg(),
                caption: "Attack success should be low, the task score high.".into(),
                wide: self.sets.is_empty(),
            });
            section.tables.push(results_table(results));
        }
        if !self.sets.is_empty() {
            section.figures.push(Figure {
                name: "sets".into(),
                svg: sets_chart(&self.sets).svg(),
                caption:
                    "If noise predicts harm, sets whose joint perturbation costs little end with low attack success."
                        .into(),
                wide: false,
            });
        }
        Some(section)
    }

    fn modules_section(&self) -> Option<Section> {
        if self.robustness.is_none() && self.mods.is_none() {
            return None;
        }
        let mut section = Section {
            heading: "Module robustness".into(),
            text: "Each cell is one module of one layer. Its weights are perturbed by noise of the same relative size, and \
                   the security score is measured again: a large drop means that the model's sense of harmful and \
                   harmless leans on this module."
                .into(),
            ..Section::default()
        };
        if let Some(robustness) = &self.robustness {
            section.figures.push(Figure {
                name: "robustness".into(),
                svg: robustness_map(robustness).svg(),
                caption: "Bright modules are sensitive, dark ones robust. Point at a cell for its value.".into(),
                wide: false,
            });
            section.tables.push(robustness_table(robustness));
            section.tables.push(layers_table(robustness));
        }
        if let Some(mods) = &self.mods {
            section.figures.push(Figure {
                name: "mods".into(),
                svg: mods_map(mods).svg(),
                caption: "Mods_Rob, the set that the warm-up trains alone.".into(),
                wide: false,
            });
        }
        Some(section)
    }

    fn updates_section(&self) -> Option<Section> {
        let updates = self.updates.as_ref()?;
        Some(Section {
            heading: "Update magnitudes".into(),
            text: "How far the weights moved, relative to their size: modules of Mods_Rob against the rest, layer by layer."
                .into(),
            figures: vec![Figure {
                name: "updates".into(),
                svg: updates_chart(updates).svg(),
                caption: format!(
                    "Phases together: the root of the sum of their squared updates.{}",
                    means_note(updates.settings.iter().map(|s| &s.seeds))
                ),
                wide: true,
            }],
            tables: vec![updates_table(updates)],
        })
    }

    fn drift_section(&self) -> Option<Section> {
        let drift = self.drift.as_ref()?;
        Some(Section {
            heading: "Drift by epoch".into(),
            text: "The probe is frozen: it was trained on the model as given. A probe that holds while refusal falls means \
                   that the knowledge survives and the behaviour fails. Epoch 0 is the model as given."
                .into(),
            figures: vec![
                Figure {
                    name: "drift-probe".into(),
                    svg: drift_probe_chart(drift).svg(),
                    caption: "Representation: does the model still tell harmful from harmless?".into(),
                    wide: false,
                },
                Figure {
                    name: "drift-refusal".into(),
                    svg: drift_refusal_chart(drift).svg(),
                    caption: "Behaviour: does it still refuse what is harmful, and only that?".into(),
                    wide: false,
                },
            ],
            tables: Vec::new(),
        })
    }

    fn training_section(&self) -> Option<Section> {
        if self.losses.is_empty() {
            return None;
        }
        Some(Section {
            heading: "Training".into(),
            figures: vec![Figure {
                name: "loss".into(),
                svg: loss_chart(&self.losses).svg(),
                caption: means_note(self.losses.iter().map(|loss| &loss.seeds)).trim_start().into(),
                wide: true,
            }],
            ..Section::default()
        })
    }
}

/// A sentence behind a caption, where values are means over several seeds.
fn means_note<'a>(mut seeds: impl Iterator<Item = &'a Vec<u64>>) -> &'static str {
    if seeds.any(|seeds| seeds.len() > 1) { " Means over the training seeds." } else { "" }
}

/// Every seed that occurs, as [`seeds_text`].
fn all_seeds<'a>(seeds: impl Iterator<Item = &'a Vec<u64>>) -> String {
    let all: BTreeSet<u64> = seeds.flatten().copied().collect();
    seeds_text(&all.into_iter().collect::<Vec<_>>())
}

/// `seed 3`, `seeds 1–5`, `seeds 1, 4, 9`; empty for none.
pub(super) fn seeds_text(seeds: &[u64]) -> String {
    let (Some(first), Some(last)) = (seeds.first(), seeds.last()) else { return String::new() };
    let run = seeds.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]));
    match seeds.len() {
        1 => format!("seed {first}"),
        n if n > 2 && run => format!("seeds {first}–{last}"),
        _ => format!("seeds {}", seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
    }
}
