//! One optimizer step over the micro-batches of a group.

use super::optimizer::{Optimizer, StepOutcome, StepSettings};
use super::options::TuneOptions;
use super::reference::Reference;
use crate::backend::Backend;
use crate::data::Loader;
use crate::engine::{Batch, Decoder, GradientOptions, Gradients};
use crate::error::Result;
use crate::modules::Cell;

/// The micro-batches of one step.
pub(super) struct StepBatches {
    pub(super) batches: Vec<Batch>,
    /// Tokens with a loss, over all micro-batches.
    pub(super) trained_tokens: u64,
    /// All tokens.
    pub(super) tokens: u64,
}

impl StepBatches {
    /// Takes up to `grad_accum` micro-batches, not beyond the end of the epoch.
    pub(super) fn next(loader: &mut Loader, grad_accum: usize, reference: Option<&Reference>) -> Self {
        let left = loader.batches_per_epoch() - loader.position().batch;
        let count = (grad_accum as u64).min(left);
        let batch = |_| {
            let (documents, examples) = (loader.next_indices(), loader.examples());
            let mut batch = Batch::from_examples(documents.iter().map(|i| &examples[*i]));
            batch.terms = reference.and_then(|reference| reference.terms(examples, &documents));
            batch
        };
        Self::new((0..count).map(batch).collect())
    }

    pub(super) fn new(batches: Vec<Batch>) -> Self {
        let trained_tokens = batches.iter().map(|b| b.trained_tokens() as u64).sum();
        let tokens = batches.iter().map(|b| b.tokens.len() as u64).sum();
        Self { batches, trained_tokens, tokens }
    }
}

/// StepResult of a step.
pub(super) enum StepResult {
    /// The weights were updated.
    Trained { loss: f64, grad_norm: f64 },
    /// Skipped: the loss or a gradient is not finite.
    NonFinite { loss: f64, cells: Vec<Cell> },
    /// Skipped: no token has a loss.
    Empty,
}

/// Gradients of the mean loss over the group's trained tokens, and one optimizer step.
pub(super) fn take_step<B: Backend>(
    decoder: &mut Decoder<B>,
    optimizer: &mut Optimizer<B>,
    gradients: &mut Gradients<B>,
    group: &StepBatches,
    settings: &StepSettings,
    options: &TuneOptions,
) -> Result<StepResult> {
    if group.trained_tokens == 0 {
        return Ok(StepResult::Empty);
    }
    let TuneOptions { recompute, prox, vaccine, .. } = *options;
    let scale = (1.0 / group.trained_tokens as f64) as f32;
    let mut losses = decoder.losses_of(group.trained_tokens as usize)?;
    let mut options = GradientOptions { scale, accumulate: false, recompute, vaccine };
    for batch in group.batches.iter().filter(|b| b.trained_tokens() > 0) {
        decoder.queue_gradients(batch, gradients, options, &mut losses)?;
        options.accumulate = true;
    }
    let loss = losses.sum()? / group.trained_tokens as f64;
    // With a non-finite loss even finite gradients are invalid.
    if !loss.is_finite() {
        return Ok(StepResult::NonFinite { loss, cells: optimizer.non_finite_cells(&decoder.backend, gradients)? });
    }
    if let Some(rho) = prox {
        optimizer.add_proximal(decoder, gradients, rho)?;
    }
    Ok(match optimizer.step(decoder, gradients, settings)? {
        StepOutcome::Done { grad_norm } => StepResult::Trained { loss, grad_norm },
        StepOutcome::NonFinite { cells } => StepResult::NonFinite { loss, cells },
    })
}
