//! The conflict map: what the planned step costs the refusal log-odds, module by module, from gradients in place
//! of a sweep.
//!
//! S is the mean refusal log-odds of harmful prompts less that of benign ones (the score `refusal`), Δ = −η P g the planned
//! step ([`super::step`]). To first order module m lowers S by −⟨∇S, Δ⟩ₘ = η ⟨P g, ∇S⟩ₘ; R is that over S, and the sum over
//! a set is the set's R. Beside it stands the gain η ⟨P g, g⟩ₘ of the task: cost per gain tells which modules to train first.
//! Relatives: SafeGrad, and SPF (arXiv 2601.10141), which take the conflict out of each step's gradient instead.

use super::map::{CellRobustness, RobustnessMap, Stat};
use super::noise::Noise;
use super::scorer::PerturbationScorer;
use super::sets::cell_parameters;
use super::step::PlannedStep;
use super::{By, RobustnessOptions, empty_map, in_order};
use crate::backend::{Backend, FloatElement, IGNORE, TEACHER_TOKENS};
use crate::engine::{Batch, GradientOptions, Gradients, TokenTerms};
use crate::error::{Error, Result};
use crate::modules::{Cell, ParamId};
use crate::progress::{Observer, Progress};
use crate::secure::eval::metrics::ScoreKind;
use crate::secure::eval::refusal::FirstTokens;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// Reference loss beside which any other is small: it takes the cross-entropy out of the gradient.
const NO_CROSS_ENTROPY: f32 = 1e30;

/// Computes the map; with `out` it is saved there. The scorer's perturbation is not used.
///
/// # Errors
/// [`Error::Input`] names the option that is wrong, or what the probe lacks; [`Error::Io`]; a failing device.
pub fn conflict_map<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    step: &PlannedStep,
    options: &RobustnessOptions,
    out: Option<&Path>,
    observer: Observer<'_>,
) -> Result<RobustnessMap> {
    let start = Instant::now();
    let wanted = in_order(&options.check(&scorer.decoder.config.cells())?);
    let Some(first) = &scorer.probe.metadata.first_tokens else {
        let expected = "a probe of a model that refuses some prompts and answers others, or --by noise or update";
        return Err(Error::input("--probe", "no first tokens of refusals", expected));
    };
    let clean = scorer.clean_score(ScoreKind::Refusal)?;
    let epsilon = options.epsilon.unwrap_or_else(|| step.scale.epsilon());
    let rate = step.scale.rate(epsilon);
    let falls = falls(scorer, step, first, observer)?;
    let parameters = cell_parameters(&scorer.decoder.config);
    let cell = |cell: Cell| {
        let drop = rate * falls.get(&cell).copied().unwrap_or(0.0) / clean;
        CellRobustness {
            cell,
            parameters: parameters.get(&cell).copied().unwrap_or(0),
            scores: BTreeMap::new(),
            drop: [(ScoreKind::Refusal, Stat { mean: drop, error: None })].into(),
            drop_by_seed: [(ScoreKind::Refusal, vec![drop])].into(),
            shift: Stat { mean: 0.0, error: None },
            drop_per_shift: None,
            control_drop: None,
            beyond_control: None,
            retrained_auroc: None,
            task_gain: step.scale.gain(cell, epsilon),
        }
    };
    let map = RobustnessMap {
        kind: Noise::Step,
        epsilon,
        seeds: vec![scorer.options.seed],
        antithetic: false,
        by: By::Conflict,
        step: Some(step.scale.record.clone()),
        cells: wanted.into_iter().map(cell).collect(),
        seconds: start.elapsed().as_secs_f64(),
        ..empty_map(scorer)?
    };
    if let Some(out) = out {
        map.save(out)?;
    }
    Ok(map)
}

/// ⟨P g, ∇S⟩ of each cell: how much the score falls for each unit of η.
fn falls<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    step: &PlannedStep,
    first: &FirstTokens,
    observer: Observer<'_>,
) -> Result<BTreeMap<Cell, f64>> {
    let decoder = scorer.decoder;
    let (harmful, benign) = scorer.prompts();
    let weight = |harmful_prompt: bool| if harmful_prompt { 1.0 / harmful as f64 } else { -1.0 / benign as f64 };
    let mut gradients = Gradients::new(decoder, |id| !matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_)))?;
    let (mut done, total) = (0, harmful + benign);
    for prompts in scorer.scored_batches() {
        let weights: Vec<f64> = prompts.harmful.iter().map(|harmful| weight(*harmful)).collect();
        let logits = decoder.logits(&prompts.batch, &prompts.batch.last_rows())?;
        let batch = score_batch(prompts.batch, first, &weights, (&logits, decoder.config.vocab));
        let options = GradientOptions { accumulate: done > 0, ..GradientOptions::scaled(1.0) };
        decoder.loss_and_gradients(&batch, &mut gradients, options)?;
        done += weights.len();
        observer(Progress::new("gradient of the refusal log-odds", done, total));
    }
    let mut falls = BTreeMap::new();
    for (id, gradient) in gradients.iter() {
        let Some((_, direction)) = step.directions.get(&id) else { continue };
        let mut values = vec![B::Grad::from_f32(0.0); gradient.len()];
        decoder.backend.read(gradient.view(), &mut values)?;
        let product = |(g, d): (B::Grad, &f32)| f64::from(g.to_f32()) * f64::from(*d);
        // The direction is −P g.
        *falls.entry(id.cell()).or_insert(0.0) -= values.into_iter().zip(direction).map(product).sum::<f64>();
    }
    drop(gradients);
    decoder.release_pool();
    match falls.values().all(|fall| fall.is_finite()) {
        true => Ok(falls),
        false => Err(Error::failed("the gradient of the refusal log-odds is not finite", "check the model's weights")),
    }
}

/// The batch whose loss has the gradient Σ weight · ∂(log-odds)/∂logits at the last token of each prompt; `logits` are
/// [prompts, vocab]. That gradient takes the place of a teacher's probabilities ([`crate::backend::LossTerms`]), of at most
/// as many tokens as a teacher has: those that matter most.
fn score_batch(mut batch: Batch, first: &FirstTokens, weights: &[f64], (logits, vocab): (&[f32], usize)) -> Batch {
    let width = first.tokens().len().min(TEACHER_TOKENS).min(vocab);
    batch.targets = vec![IGNORE; batch.tokens.len()];
    let mut terms = TokenTerms { distil: 1.0, ..TokenTerms::default() };
    for ((row, logits), weight) in batch.last_rows().into_iter().zip(logits.chunks_exact(vocab)).zip(weights) {
        batch.targets[row as usize] = first.tokens()[0];
        terms.reference.push(NO_CROSS_ENTROPY);
        terms.beta.push(1.0);
        let own: Vec<f32> = first.tokens().iter().map(|id| logits[*id as usize]).collect();
        let mut entries: Vec<(u32, f64)> = first.tokens().iter().copied().zip(first.gradient(&own)).collect();
        entries.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
        for (id, gradient) in &entries[..width] {
            terms.ids.push(*id);
            terms.probs.push((-weight * gradient) as f32);
        }
    }
    batch.terms = Some(terms);
    batch
}
