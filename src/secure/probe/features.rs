//! Features: hidden states at the last token of the rendered prompt.

use crate::backend::Backend;
use crate::data::SecurityPrompt;
use crate::engine::{Batch, Decoder, Member, NoiseKind, SweepOptions};
use crate::error::{Error, Result};
use crate::modules::ModuleSet;
use crate::progress::{Observer, Progress};
use crate::secure::eval::refusal::FirstTokens;
use crate::secure::eval::token_batches;
use std::ops::Range;

/// Hidden states at the last token of each prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// Number of prompts.
    pub prompts: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// layers + 1 of [prompts, hidden]: the embedding's output first, the last after the final norm.
    pub layers: Vec<Vec<f32>>,
}

/// Features and refusal log-odds of a model on a set of prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Hidden states.
    pub features: Features,
    /// Log-odds at the first answer position, \[prompts\]; none without [`FirstTokens`].
    pub refusal: Option<Vec<f64>>,
}

/// Hash of rendered prompts and their labels, which ties probes and maps to them.
pub fn prompts_hash(tokens: &[Vec<u32>], prompts: &[SecurityPrompt]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (prompt, label) in tokens.iter().zip(prompts) {
        hasher.update(&(prompt.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(prompt));
        let text = format!("{:?}\0", (label.label, label.split, &label.pair, &label.category));
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// [`token_batches`] of the prompts; an error for an empty prompt or none.
pub(crate) fn batches(prompts: &[Vec<u32>], batch_tokens: usize) -> Result<Vec<Range<usize>>> {
    if let Some(i) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::input(format!("prompt {}", i + 1), "no tokens", "a prompt of at least one token"));
    }
    if prompts.is_empty() {
        return Err(Error::input("prompts", "none", "at least one prompt"));
    }
    Ok(token_batches(prompts.iter().map(Vec::len), batch_tokens))
}

pub(crate) fn packed(prompts: &[Vec<u32>]) -> Batch {
    Batch::from_prompts(prompts.iter().map(Vec::as_slice))
}

/// Features of `prompts` (token ids), with at most `batch_tokens` tokens per forward pass.
///
/// # Errors
/// [`Error::Input`] without prompts, or for an empty one; a failing device.
pub fn features<B: Backend>(
    decoder: &Decoder<B>,
    prompts: &[Vec<u32>],
    batch_tokens: usize,
    observer: Observer<'_>,
) -> Result<Features> {
    let mut layers = vec![Vec::new(); decoder.config.layers + 1];
    for range in batches(prompts, batch_tokens)? {
        let batch = packed(&prompts[range.clone()]);
        let states = decoder.hidden_states(&batch, &batch.last_rows())?;
        layers.iter_mut().zip(states).for_each(|(all, own)| all.extend(own));
        observer(Progress::new("hidden states", range.end, prompts.len()));
    }
    Ok(Features { prompts: prompts.len(), hidden: decoder.config.hidden, layers })
}

/// Features and refusal log-odds from one forward pass.
///
/// # Errors
/// As [`features`].
pub fn snapshot<B: Backend>(
    decoder: &Decoder<B>,
    prompts: &[Vec<u32>],
    first: Option<&FirstTokens>,
    batch_tokens: usize,
    observer: Observer<'_>,
) -> Result<Snapshot> {
    let count = decoder.config.layers + 1;
    let clean = [Member { cells: ModuleSet::default(), seed: 0, negative: false }];
    let options = SweepOptions {
        kind: NoiseKind::Gaussian,
        epsilon: 0.0,
        layers: (0..count).collect(),
        head_rows: first.map(|f| f.tokens().to_vec()).unwrap_or_default(),
        budget_bytes: 0,
    };
    let mut layers = vec![Vec::new(); count];
    let mut logits = Vec::new();
    for range in batches(prompts, batch_tokens)? {
        decoder.sweep(&packed(&prompts[range.clone()]), &clean, &options, &mut |_, readout| {
            layers.iter_mut().zip(readout.hidden).for_each(|(all, own)| all.extend(own));
            logits.extend(readout.logits);
            Ok(())
        })?;
        observer(Progress::new("hidden states", range.end, prompts.len()));
    }
    let features = Features { prompts: prompts.len(), hidden: decoder.config.hidden, layers };
    Ok(Snapshot { features, refusal: first.map(|f| f.log_odds(&logits)) })
}

/// Mean ‖h′ − h‖ / ‖h‖ over the rows with h ≠ 0.
pub(crate) fn output_shift(base: &[f32], changed: &[f32], hidden: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for (h, c) in base.chunks_exact(hidden).zip(changed.chunks_exact(hidden)) {
        let norm: f64 = h.iter().map(|x| f64::from(*x).powi(2)).sum();
        let moved: f64 = h.iter().zip(c).map(|(x, y)| (f64::from(*y) - f64::from(*x)).powi(2)).sum();
        if norm > 0.0 {
            sum += (moved / norm).sqrt();
            count += 1;
        }
    }
    sum / f64::from(count.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_order_and_bounds() {
        let prompts: Vec<Vec<u32>> = [3, 4, 9, 1, 1, 1].iter().map(|n| vec![0; *n]).collect();
        assert_eq!(batches(&prompts, 7).unwrap(), [0..2, 2..3, 3..6]);
        assert_eq!(batches(&prompts, 1).unwrap().len(), 6);
        assert!(batches(&[vec![1], vec![]], 9).unwrap_err().to_string().contains("prompt 2"));
        assert!(batches(&[], 9).is_err());
    }
}
