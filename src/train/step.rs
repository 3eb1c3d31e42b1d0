//! One optimizer step over the micro-batches of a group.

use super::buckets::Buckets;
use super::optimizer::{Optimizer, StepOutcome, StepSettings};
use super::options::TuneOptions;
use super::reference::Reference;
use crate::backend::Backend;
use crate::data::{Example, Loader};
use crate::engine::{Batch, Decoder, GradientOptions, Gradients};
use crate::error::Result;
use crate::group::{Group, Share};
use crate::modules::Cell;

/// The micro-batches of one step: a rank's part of each.
pub(super) struct StepBatches {
    pub(super) batches: Vec<Batch>,
    /// Tokens with a loss, over all micro-batches and ranks.
    pub(super) trained_tokens: u64,
    /// All tokens, over all ranks.
    pub(super) tokens: u64,
}

impl StepBatches {
    /// Takes up to `grad_accum` micro-batches, not beyond the end of the epoch. Of their rows, a rank has every one whose
    /// number is its own modulo the number of ranks.
    pub(super) fn next(loader: &mut Loader, grad_accum: usize, reference: Option<&Reference>, share: Share) -> Self {
        let left = loader.batches_per_epoch() - loader.position().batch;
        let count = (grad_accum as u64).min(left);
        let mut step = Self { batches: Vec::new(), trained_tokens: 0, tokens: 0 };
        for _ in 0..count {
            let (rows, examples) = (loader.next_rows(), loader.examples());
            let losses = |example: &Example| example.trained.iter().skip(1).filter(|trained| **trained).count() as u64;
            step.tokens += rows.iter().flatten().map(|i| examples[*i].tokens.len() as u64).sum::<u64>();
            step.trained_tokens += rows.iter().flatten().map(|i| losses(&examples[*i])).sum::<u64>();
            let own: Vec<usize> = rows.into_iter().skip(share.rank).step_by(share.size).flatten().collect();
            let mut batch = Batch::from_examples(own.iter().map(|i| &examples[*i]));
            batch.terms = reference.and_then(|reference| reference.terms(examples, &own));
            step.batches.push(batch);
        }
        step
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

/// Gradients of the mean loss over the trained tokens of all ranks, and one optimizer step. They are added up over the
/// ranks of a group in buckets of so many bytes, while the backward pass of the last micro-batch goes on.
pub(super) fn take_step<B: Backend>(
    decoder: &mut Decoder<B>,
    optimizer: &mut Optimizer<B>,
    gradients: &mut Gradients<B>,
    step: &StepBatches,
    settings: &StepSettings,
    options: &TuneOptions,
    (group, bucket_bytes): (&dyn Group<B>, usize),
) -> Result<StepResult> {
    if step.trained_tokens == 0 {
        return Ok(StepResult::Empty);
    }
    let TuneOptions { recompute, prox, vaccine, .. } = *options;
    let scale = (1.0 / step.trained_tokens as f64) as f32;
    let mut losses = decoder.losses_of(step.batches.iter().map(Batch::trained_tokens).sum())?;
    let mut options = GradientOptions { scale, accumulate: false, recompute, vaccine };
    let mut buckets = Buckets::new((group, bucket_bytes), &decoder.backend, gradients)?;
    let own: Vec<&Batch> = step.batches.iter().filter(|batch| batch.trained_tokens() > 0).collect();
    if let Some((last, before)) = own.split_last() {
        for batch in before {
            decoder.queue_gradients(batch, gradients, options, &mut losses)?;
            options.accumulate = true;
        }
        let mut finished = |gradients| buckets.add(gradients);
        decoder.queue_last_gradients(last, gradients, options, &mut losses, &mut finished)?;
    } else {
        // No document of this rank has a loss.
        gradients.iter_mut().try_for_each(|(_, gradient)| decoder.backend.clear(gradient.view_mut()))?;
        buckets.add(gradients.take(|_| true))?;
    }
    let mut sum = [losses.sum()?];
    buckets.finish(gradients)?;
    group.all_reduce(&mut sum)?;
    let loss = sum[0] / step.trained_tokens as f64;
    // With a non-finite loss even finite gradients are invalid.
    if !loss.is_finite() {
        let cells = optimizer.non_finite_cells(&decoder.backend, gradients, group)?;
        return Ok(StepResult::NonFinite { loss, cells });
    }
    // Once, and not by each rank.
    if let Some(rho) = prox {
        optimizer.add_proximal(decoder, gradients, rho)?;
    }
    Ok(match optimizer.step_in(decoder, gradients, settings, group)? {
        StepOutcome::Done { grad_norm } => StepResult::Trained { loss, grad_norm },
        StepOutcome::NonFinite { cells } => StepResult::NonFinite { loss, cells },
    })
}
