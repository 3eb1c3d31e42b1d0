//! Scores perturbed copies of a model by its frozen probe: the measurement behind the robustness map and the search.

use super::map::MapInputs;
use super::noise::Noise;
use super::step::{PlannedStep, StepScale};
use crate::backend::Backend;
use crate::data::{SecurityPrompt, Split};
use crate::engine::{Batch, Decoder, Member, NoiseKind, SweepOptions};
use crate::error::{Error, Result};
use crate::modules::{ModuleSet, ParamId};
use crate::options::{count, default_from_args, mib};
use crate::secure::eval::metrics::{ScoreKind, Scores, relative_drop};
use crate::secure::probe::features::{batches, output_shift, packed};
use crate::secure::probe::train::retrained_auroc;
use crate::secure::probe::{Head, Probe};
use clap::{ArgAction, Args};
use rayon::prelude::*;

/// Default memory of the sweep, in MiB.
pub const SWEEP_MIB: &str = "1024";

/// Options of perturbing a model and scoring the copies.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct ScorerOptions {
    /// Perturbation of --by noise: gaussian, rademacher, lowrank:R, scale, zero, or update:DIR (towards a tuned model)
    #[arg(long, default_value_t)]
    pub kind: Noise,
    /// Draws per cell, each with both signs; the standard error falls with the square root
    #[arg(long, value_parser = count, default_value_t = 4)]
    pub members: usize,
    /// Seed of the first draw; each further draw has the next seed.
    #[arg(skip)]
    pub seed: u64,
    /// Split of the prompts that are scored
    #[arg(long, value_enum, default_value_t = Split::Test)]
    pub split: Split,
    /// Leave out control (a), a probe retrained on every copy: about half of the time
    #[arg(long = "no-retrain", action = ArgAction::SetFalse)]
    pub retrain: bool,
    /// Prompt tokens per sweep; affects memory, not results.
    #[arg(skip = 16_384usize)]
    pub batch_tokens: usize,
    /// Memory of the sweep, in MiB
    #[arg(long = "memory-mib", value_name = "MEMORY_MIB", value_parser = mib, default_value = SWEEP_MIB)]
    pub budget_bytes: u64,
    /// Host memory for the hidden states of copies between two saves, in bytes.
    #[arg(skip = 1u64 << 29)]
    pub group_bytes: u64,
}

default_from_args!(ScorerOptions);

/// Inputs of a [`PerturbationScorer`].
pub struct ScorerInput<'a, 'p, B: Backend> {
    /// The model that the probe was trained on.
    pub decoder: &'a Decoder<B>,
    /// Its hash.
    pub model_hash: &'p str,
    /// The frozen probe.
    pub probe: &'a Probe,
    /// All security prompts as token ids, rendered as for the probe.
    pub prompts: &'p [Vec<u32>],
    /// Their labels.
    pub labels: &'p [SecurityPrompt],
    /// Their control labels by the probe's rule; none = without control (c).
    pub control: Option<&'p [bool]>,
    /// [`Noise::engine_kind`] of the options' kind.
    pub kind: NoiseKind,
}

/// Measurements of one perturbed copy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation {
    /// Scores of the frozen probe and of the refusal log-odds.
    pub scores: Scores,
    /// Gap of the `control` head on the control label: control (c).
    pub control_gap: Option<f64>,
    /// AUROC of a retrained probe: control (a).
    pub retrained: Option<f64>,
    /// Mean ‖h′ − h‖ / ‖h‖ at the metric layer: control (b).
    pub shift: f64,
}

/// Scores perturbed copies of a model by its frozen probe and its refusal log-odds.
pub struct PerturbationScorer<'a, B: Backend> {
    pub(crate) decoder: &'a Decoder<B>,
    pub(crate) model_hash: String,
    pub(crate) probe: &'a Probe,
    pub(crate) options: ScorerOptions,
    kind: NoiseKind,
    batches: Vec<Batch>,
    /// Number of scored prompts; they precede those that retrain the probe.
    scored: usize,
    harmful: Vec<bool>,
    control: Option<Vec<bool>>,
    /// Hidden states of the unperturbed model at the metric layer, [prompts, hidden].
    clean_hidden: Vec<f32>,
    /// Measurements of the unperturbed model.
    pub(crate) clean: Observation,
    pub(crate) prompts_hash: String,
    /// Paths of the inputs, saved with the map for the search.
    pub made_from: Option<MapInputs>,
    /// Of a perturbation by the planned step.
    pub(crate) step: Option<StepScale>,
}

/// Prompts that are scored, packed.
pub(super) struct ScoredBatch<'a> {
    pub(super) batch: Batch,
    /// Whether each is harmful.
    pub(super) harmful: &'a [bool],
}

/// Raw readout of a copy.
#[derive(Clone, Default)]
struct Raw {
    hidden: Vec<f32>,
    log_odds: Vec<f64>,
}

impl<'a, B: Backend> PerturbationScorer<'a, B> {
    /// Checks that probe, model and prompts belong together and scores the unperturbed model.
    ///
    /// # Errors
    /// [`Error::Input`] where they do not, or an option is out of range; a failing device.
    pub fn new(input: ScorerInput<'a, '_, B>, options: ScorerOptions) -> Result<Self> {
        input.probe.check_model(&input.decoder.config, input.model_hash)?;
        let n = input.labels.len();
        if input.prompts.len() != n || input.control.is_some_and(|c| c.len() != n) {
            return Err(Error::input("security prompts", format!("{} prompts", input.prompts.len()), format!("{n}")));
        }
        if options.members == 0 || options.members > 1024 {
            return Err(Error::input("robustness.members", options.members.to_string(), "1 to 1024"));
        }
        let of = |split: Split| (0..n).filter(move |i| input.labels[*i].split == split);
        let mut rows: Vec<usize> = of(options.split).collect();
        let scored = rows.len();
        if options.retrain && options.split != Split::Train {
            rows.extend(of(Split::Train));
        }
        let prompts: Vec<Vec<u32>> = rows.iter().map(|i| input.prompts[*i].clone()).collect();
        let labels: Vec<SecurityPrompt> = rows.iter().map(|i| input.labels[*i].clone()).collect();
        let harmful: Vec<bool> = labels.iter().map(SecurityPrompt::is_harmful).collect();
        if !harmful[..scored].contains(&true) || !harmful[..scored].contains(&false) {
            let found = format!("split `{}` without both classes", options.split.name());
            return Err(Error::input("security prompts", found, "harmful and benign prompts in the scored split"));
        }
        let metric_layer = input.probe.metadata.metric_layer;
        let has_control = input.probe.head(metric_layer, &Head::Control).is_some();
        let control = input.control.filter(|_| has_control).map(|c| rows.iter().map(|i| c[*i]).collect());
        let batches = batches(&prompts, options.batch_tokens)?.into_iter().map(|r| packed(&prompts[r])).collect();
        let mut scorer = Self {
            decoder: input.decoder,
            model_hash: input.model_hash.to_owned(),
            probe: input.probe,
            kind: input.kind,
            batches,
            scored,
            harmful,
            control,
            clean_hidden: Vec::new(),
            clean: Observation {
                scores: Scores { gap: 0.0, refusal: None, margin: 0.0, auroc: 0.5, accuracy: 0.0 },
                control_gap: None,
                retrained: None,
                shift: 0.0,
            },
            prompts_hash: crate::secure::prompts_hash(&prompts, &labels),
            made_from: None,
            step: None,
            options,
        };
        let member = Member { cells: ModuleSet::default(), seed: 0, negative: false };
        for raw in scorer.sweep(&[member], 0.0)? {
            scorer.clean_hidden.clone_from(&raw.hidden);
            scorer.clean = scorer.observation(&raw)?;
        }
        Ok(scorer)
    }

    /// As [`PerturbationScorer::new`], of copies that are moved by the planned step, in the place of the options' and the input's
    /// perturbation.
    ///
    /// # Errors
    /// As [`PerturbationScorer::new`].
    pub fn of_step(input: ScorerInput<'a, '_, B>, options: ScorerOptions, step: PlannedStep) -> Result<Self> {
        let (kind, scale) = step.into_noise();
        let mut scorer = Self::new(ScorerInput { kind, ..input }, ScorerOptions { kind: Noise::Step, ..options })?;
        scorer.step = Some(scale);
        Ok(scorer)
    }

    /// Hash of the directions of an `update` perturbation, or of a planned step.
    pub(crate) fn directions_hash(&self) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |id: &ParamId, values: &[f32]| {
            hasher.update(id.to_string().as_bytes());
            hasher.update(bytemuck::cast_slice(values));
        };
        match &self.kind {
            NoiseKind::Update(directions) => directions.iter().for_each(|(id, update)| add(id, update)),
            NoiseKind::Step(directions) => directions.iter().for_each(|(id, (factor, step))| {
                add(id, &[*factor]);
                add(id, step);
            }),
            _ => return None,
        }
        Some(hasher.finalize().to_hex().to_string())
    }

    /// The scored prompts, without those that retrain the probe.
    pub(super) fn scored_batches(&self) -> impl Iterator<Item = ScoredBatch<'_>> {
        let mut first = 0;
        self.batches.iter().filter_map(move |batch| {
            let own = first..(first + batch.documents()).min(self.scored);
            first += batch.documents();
            let documents = own.len();
            let tokens = *batch.starts.get(documents)? as usize;
            let batch = Batch {
                tokens: batch.tokens[..tokens].to_vec(),
                positions: batch.positions[..tokens].to_vec(),
                starts: batch.starts[..=documents].to_vec(),
                ..Batch::default()
            };
            (documents > 0).then(|| ScoredBatch { batch, harmful: &self.harmful[own] })
        })
    }

    /// Measurements of the unperturbed model.
    pub fn clean(&self) -> Observation {
        self.clean
    }

    /// Numbers of scored harmful and benign prompts.
    pub fn prompts(&self) -> (usize, usize) {
        let harmful = self.harmful[..self.scored].iter().filter(|h| **h).count();
        (harmful, self.scored - harmful)
    }

    /// Seeds of the draws; a single one for a deterministic perturbation.
    pub fn seeds(&self) -> Vec<u64> {
        let count = if self.options.kind.is_random() { self.options.members } else { 1 };
        (0..count as u64).map(|i| self.options.seed.wrapping_add(i)).collect()
    }

    /// Copies of one draw of a set: +δ, and −δ for an antithetic kind.
    pub(crate) fn members(&self, cells: &ModuleSet, seed: u64) -> Vec<Member> {
        let signs: &[bool] = if self.options.kind.is_antithetic() { &[false, true] } else { &[false] };
        signs.iter().map(|negative| Member { cells: cells.clone(), seed, negative: *negative }).collect()
    }

    /// Copies whose hidden states fit `group_bytes`.
    pub(crate) fn members_per_group(&self) -> usize {
        let bytes = self.harmful.len() * self.decoder.config.hidden * size_of::<f32>();
        (self.options.group_bytes / bytes.max(1) as u64).max(1) as usize
    }

    /// Perturbs, runs and scores the copies; one observation per member, in order.
    ///
    /// # Errors
    /// [`Error::Failed`] where a copy's hidden states are not finite; a failing device.
    pub fn observe(&self, members: &[Member], epsilon: f32) -> Result<Vec<Observation>> {
        self.sweep(members, epsilon)?.par_iter().map(|raw| self.observation(raw)).collect()
    }

    /// R of a score for a set that is perturbed jointly: mean over the draws of `seeds` and both signs.
    ///
    /// # Errors
    /// [`Error::Failed`] where the score is not finite; a failing device.
    pub fn joint(&self, set: &ModuleSet, score: ScoreKind, epsilon: f32, seeds: &[u64]) -> Result<f64> {
        let clean = self.clean_score(score)?;
        let members: Vec<Member> = seeds.iter().flat_map(|seed| self.members(set, *seed)).collect();
        let values: Vec<f64> = self.observe(&members, epsilon)?.iter().filter_map(|o| o.scores.get(score)).collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        relative_drop(clean, mean)
            .ok_or_else(|| Error::failed(format!("the score `{score}` is not finite"), "lower --epsilon"))
    }

    /// Score of the unperturbed model; an error where it is missing or not above 0, so that R is undefined.
    pub(crate) fn clean_score(&self, score: ScoreKind) -> Result<f64> {
        let value = self.clean.scores.get(score).ok_or_else(|| {
            let help = "the model's own answers must hold both refusals and compliances; choose the score `gap`";
            Error::failed(format!("the probe has no first tokens for the score `{score}`"), help)
        })?;
        if value > 1e-9 {
            return Ok(value);
        }
        let what = format!("the score `{score}` of the unperturbed model is {value:.3}, so its drop is undefined");
        Err(Error::failed(what, "check that the model is aligned, or choose another score or split"))
    }

    fn sweep(&self, members: &[Member], epsilon: f32) -> Result<Vec<Raw>> {
        let first = self.probe.metadata.first_tokens.as_ref();
        let options = SweepOptions {
            kind: self.kind.clone(),
            epsilon,
            layers: vec![self.probe.metadata.metric_layer],
            head_rows: first.map(|f| f.tokens().to_vec()).unwrap_or_default(),
            budget_bytes: self.options.budget_bytes,
        };
        let mut raws = vec![Raw::default(); members.len()];
        for batch in &self.batches {
            self.decoder.sweep(batch, members, &options, &mut |i, readout| {
                let raw = &mut raws[i];
                readout.hidden.iter().for_each(|h| raw.hidden.extend_from_slice(h));
                if let Some(first) = first {
                    raw.log_odds.extend(first.log_odds(&readout.logits));
                }
                Ok(())
            })?;
        }
        Ok(raws)
    }

    fn observation(&self, raw: &Raw) -> Result<Observation> {
        if !raw.hidden.iter().all(|h| h.is_finite()) {
            return Err(Error::failed("a perturbed copy has hidden states that are not finite", "lower --epsilon"));
        }
        let (layer, hidden) = (self.probe.metadata.metric_layer, self.decoder.config.hidden);
        let own = &raw.hidden[..self.scored * hidden];
        let harmful = &self.harmful[..self.scored];
        let logits = self.probe.logits(layer, &Head::Harmful, own)?;
        let log_odds = self.probe.metadata.first_tokens.as_ref().map(|_| &raw.log_odds[..self.scored]);
        let control_gap = match &self.control {
            Some(labels) => {
                let logits = self.probe.logits(layer, &Head::Control, own)?;
                Some(Scores::new(&logits, None, &labels[..self.scored]).gap)
            }
            None => None,
        };
        let rest = &raw.hidden[self.scored * hidden..];
        let lambda = self.probe.head(layer, &Head::Harmful).map_or(1e-2, |h| h.lambda);
        let retrained = match rest.is_empty() {
            true => None,
            false => retrained_auroc(hidden, (rest, &self.harmful[self.scored..]), (own, harmful), lambda),
        };
        let clean = if self.clean_hidden.is_empty() { own } else { &self.clean_hidden[..own.len()] };
        Ok(Observation {
            scores: Scores::new(&logits, log_odds, harmful),
            control_gap,
            retrained,
            shift: output_shift(clean, own, hidden),
        })
    }
}
