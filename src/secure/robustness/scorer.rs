//! The scorer that robustness and the search ask: a model, its frozen probe and labelled prompts; perturb some modules,
//! and see what the probe still reads.

use super::map::MadeFrom;
use super::noise::Noise;
use crate::backend::Backend;
use crate::data::{SecurityPrompt, Split};
use crate::engine::{Batch, Decoder, Member, NoiseKind, SweepOptions};
use crate::error::{Error, Result};
use crate::modules::ModuleSet;
use crate::secure::eval::metrics::{ScoreKind, Scores, relative_drop};
use crate::secure::probe::features::output_shift;
use crate::secure::probe::features::{batches, packed};
use crate::secure::probe::labels::harmful;
use crate::secure::probe::train::retrained_auroc;
use crate::secure::probe::{Head, Probe};
use rayon::prelude::*;

/// How copies are perturbed and read.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScorerOptions {
    /// Kind of perturbation.
    pub kind: Noise,
    /// Draws a cell; each costs two copies (±δ). The standard error falls with its root.
    pub members: usize,
    /// Seed of the first draw; the others follow it.
    pub seed: u64,
    /// Prompts that are scored.
    pub split: Split,
    /// Control (a): train a probe anew on every copy. Runs the training prompts too, which may double the time.
    pub retrain: bool,
    /// Tokens of prompts that are swept at once; decides memory, not results.
    pub batch_tokens: usize,
    /// Working memory of the engine for copies that run side by side.
    pub budget_bytes: u64,
    /// Host memory for what is read of the copies that run between two saves.
    pub group_bytes: u64,
}

impl Default for ScorerOptions {
    fn default() -> Self {
        Self {
            kind: Noise::Gaussian,
            members: 4,
            seed: 0,
            split: Split::Test,
            retrain: true,
            batch_tokens: 16_384,
            budget_bytes: 1 << 30,
            group_bytes: 1 << 29,
        }
    }
}

/// What a scorer is made of.
pub struct ScorerInput<'a, 'p, B: Backend> {
    /// The model that the probe was trained on.
    pub decoder: &'a Decoder<B>,
    /// Its hash.
    pub model_hash: &'p str,
    /// The frozen probe.
    pub probe: &'a Probe,
    /// All security prompts as token ids, as the probe's features were read.
    pub prompts: &'p [Vec<u32>],
    /// Their labels.
    pub labels: &'p [SecurityPrompt],
    /// Their control labels, by the probe's rule; none = no control (c).
    pub control: Option<&'p [bool]>,
    /// [`Noise::engine_kind`] of the options' kind.
    pub kind: NoiseKind,
}

/// What one perturbed copy showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation {
    /// The frozen probe, and the refusal log-odds.
    pub scores: Scores,
    /// Gap of the control head on the control label: control (c).
    pub control_gap: Option<f64>,
    /// AUROC of a probe trained anew: control (a).
    pub retrained: Option<f64>,
    /// Mean of ‖h′ − h‖ / ‖h‖ at the metric layer: for control (b).
    pub shift: f64,
}

/// Scores perturbed copies of a model by its probe and by its refusal log-odds: what map and search ask.
pub struct PerturbationScorer<'a, B: Backend> {
    pub(crate) decoder: &'a Decoder<B>,
    pub(crate) model_hash: String,
    pub(crate) probe: &'a Probe,
    pub(crate) options: ScorerOptions,
    kind: NoiseKind,
    batches: Vec<Batch>,
    /// The scored prompts come first.
    scored: usize,
    harmful: Vec<bool>,
    control: Option<Vec<bool>>,
    /// Of the unperturbed model at the metric layer, [prompts, hidden].
    clean_hidden: Vec<f32>,
    /// Of the unperturbed model.
    pub(crate) clean: Observation,
    pub(crate) prompts_hash: String,
    /// The files behind it, saved with a map: a search needs them again.
    pub made_from: Option<MadeFrom>,
}

/// What is read of a copy before it is scored.
#[derive(Clone, Default)]
struct Raw {
    hidden: Vec<f32>,
    log_odds: Vec<f64>,
}

impl<'a, B: Backend> PerturbationScorer<'a, B> {
    /// Checks everything against everything and reads the unperturbed model.
    ///
    /// # Errors
    /// [`Error::Input`] where probe, model, prompts and options do not go together; a failing device.
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
        let harmful: Vec<bool> = labels.iter().map(harmful).collect();
        if !harmful[..scored].contains(&true) || !harmful[..scored].contains(&false) {
            let found = format!("split `{}` without both classes", options.split.name());
            return Err(Error::input("security prompts", found, "harmful and benign prompts in the scored split"));
        }
        let metric_layer = input.probe.about.metric_layer;
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
            options,
        };
        let member = Member { cells: ModuleSet::default(), seed: 0, negative: false };
        for raw in scorer.sweep(&[member], 0.0)? {
            scorer.clean_hidden.clone_from(&raw.hidden);
            scorer.clean = scorer.observation(&raw)?;
        }
        Ok(scorer)
    }

    /// A hash of the given directions, where the kind of perturbation has some.
    pub(crate) fn directions_hash(&self) -> Option<String> {
        let NoiseKind::Update(directions) = &self.kind else { return None };
        let mut hasher = blake3::Hasher::new();
        for (id, update) in directions {
            hasher.update(id.to_string().as_bytes());
            hasher.update(bytemuck::cast_slice(update));
        }
        Some(hasher.finalize().to_hex().to_string())
    }

    /// Of the unperturbed model.
    pub fn clean(&self) -> Observation {
        self.clean
    }

    /// Scored harmful and benign prompts.
    pub fn prompts(&self) -> (usize, usize) {
        let harmful = self.harmful[..self.scored].iter().filter(|h| **h).count();
        (harmful, self.scored - harmful)
    }

    /// The seeds of the draws: one where the kind of perturbation has no randomness.
    pub fn seeds(&self) -> Vec<u64> {
        let count = if self.options.kind.draws().0 { self.options.members } else { 1 };
        (0..count as u64).map(|i| self.options.seed.wrapping_add(i)).collect()
    }

    /// Copies that one draw of a set makes: w + δ, and w − δ where that is another thing.
    pub(crate) fn members(&self, cells: &ModuleSet, seed: u64) -> Vec<Member> {
        let signs: &[bool] = if self.options.kind.draws().1 { &[false, true] } else { &[false] };
        signs.iter().map(|negative| Member { cells: cells.clone(), seed, negative: *negative }).collect()
    }

    /// Copies that may be read before they are scored, within `group_bytes`.
    pub(crate) fn members_a_group(&self) -> usize {
        let bytes = self.harmful.len() * self.decoder.config.hidden * size_of::<f32>();
        (self.options.group_bytes / bytes.max(1) as u64).max(1) as usize
    }

    /// Perturbs, runs and scores; one observation a member, in their order.
    ///
    /// # Errors
    /// [`Error::Failed`] where a perturbed copy has hidden states that are not finite; a failing device.
    pub fn observe(&self, members: &[Member], epsilon: f32) -> Result<Vec<Observation>> {
        self.sweep(members, epsilon)?.par_iter().map(|raw| self.observation(raw)).collect()
    }

    /// R of a score for a whole set, perturbed jointly: mean over the given draws and both signs.
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

    /// The unperturbed model's score; an error where it has nothing to lose.
    pub(crate) fn clean_score(&self, score: ScoreKind) -> Result<f64> {
        let value = self.clean.scores.get(score).ok_or_else(|| {
            let help = "the model's own answers must hold both refusals and compliances; choose the score `gap`";
            Error::failed(format!("the probe knows no first tokens for the score `{score}`"), help)
        })?;
        if value > 1e-9 {
            return Ok(value);
        }
        let what = format!("the score `{score}` of the unperturbed model is {value:.3}, so it has nothing to lose");
        Err(Error::failed(what, "check that the model is aligned, or choose another score or split"))
    }

    fn sweep(&self, members: &[Member], epsilon: f32) -> Result<Vec<Raw>> {
        let first = self.probe.about.first_tokens.as_ref();
        let options = SweepOptions {
            kind: self.kind.clone(),
            epsilon,
            layers: vec![self.probe.about.metric_layer],
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
        let (layer, hidden) = (self.probe.about.metric_layer, self.decoder.config.hidden);
        let own = &raw.hidden[..self.scored * hidden];
        let harmful = &self.harmful[..self.scored];
        let logits = self.probe.logits(layer, &Head::Harmful, own)?;
        let log_odds = self.probe.about.first_tokens.as_ref().map(|_| &raw.log_odds[..self.scored]);
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
