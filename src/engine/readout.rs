//! Outputs of forward passes: hidden states, logits, losses.

use super::decoder::{Overlay, read_floats};
use super::pool::Floats;
use super::prefix::DistinctRows;
use super::{Batch, Decoder};
use crate::backend::{Backend, CrossEntropy, IGNORE, Operator, trace};
use crate::error::Result;
use crate::modules::ParamId;
use rayon::prelude::*;
use std::ops::Range;

impl<B: Backend> Decoder<B> {
    /// Hidden states at `rows` of the packed batch, each [rows, hidden], layers + 1 of them: the embedding's output
    /// first, the last after the final norm (as `output_hidden_states` of transformers).
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the batch does not fit the model; [`crate::error::Error::Device`] or
    /// [`crate::error::Error::Memory`] where the device fails.
    pub fn hidden_states(&self, batch: &Batch, rows: &[u32]) -> Result<Vec<Vec<f32>>> {
        let _span = trace::phase("forward");
        let mut states = Vec::with_capacity(self.config.layers + 1);
        let last = self.run_layers(batch, rows, |state| {
            states.push(read_floats(&self.backend, state.view())?);
            Ok(())
        })?;
        let (normed, _) = self.norm(&Overlay::new(), ParamId::FinalNorm, last.view())?;
        states.push(read_floats(&self.backend, normed.view())?);
        Ok(states)
    }

    /// Logits [rows, vocab] at `rows` of the packed batch.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the batch does not fit the model; [`crate::error::Error::Device`] or
    /// [`crate::error::Error::Memory`] where the device fails.
    pub fn logits(&self, batch: &Batch, rows: &[u32]) -> Result<Vec<f32>> {
        let _span = trace::phase("forward");
        let last = self.run_layers(batch, rows, |_| Ok(()))?;
        let mut host = Vec::with_capacity(rows.len() * self.config.vocab);
        self.logits_of(&last, rows.len(), |_, logits| {
            host.extend(read_floats(&self.backend, logits.view())?);
            Ok(())
        })?;
        Ok(host)
    }

    /// −log p of each row's target (0 where ignored), \[tokens\].
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the batch does not fit the model; [`crate::error::Error::Device`] or
    /// [`crate::error::Error::Memory`] where the device fails.
    pub fn losses(&self, batch: &Batch) -> Result<Vec<f32>> {
        let _span = trace::phase("forward");
        self.check(batch)?;
        let (rows, targets) = trained_rows(batch);
        let mut losses = vec![0.0; batch.tokens.len()];
        if rows.is_empty() {
            return Ok(losses);
        }
        let last = self.run_layers(batch, &rows, |_| Ok(()))?;
        self.logits_of(&last, rows.len(), |chunk, logits| {
            let targets = self.indices(&targets[chunk.clone()])?;
            let mut nll = self.stats(chunk.len())?;
            CrossEntropy {
                logits: logits.view_mut(),
                targets: targets.view(),
                losses: nll.view_mut(),
                vocab: self.config.vocab,
                scale: None,
                terms: None,
            }
            .run(&self.backend)?;
            let nll = read_floats(&self.backend, nll.view())?;
            for (row, loss) in rows[chunk].iter().zip(nll) {
                losses[*row as usize] = loss;
            }
            Ok(())
        })?;
        Ok(losses)
    }

    /// The `count` likeliest tokens at each row with a target, and their probabilities among one another (softmax of
    /// their logits alone), each \[rows, count\] in the order of token ids; all tokens where the vocabulary has no more.
    ///
    /// # Errors
    /// As [`Decoder::losses`].
    pub fn likeliest_tokens(&self, batch: &Batch, count: usize) -> Result<(Vec<u32>, Vec<f32>)> {
        let _span = trace::phase("forward");
        let (rows, _) = trained_rows(batch);
        let (mut ids, mut probs) = (Vec::new(), Vec::new());
        if rows.is_empty() {
            return Ok((ids, probs));
        }
        let last = self.run_layers(batch, &rows, |_| Ok(()))?;
        self.logits_of(&last, rows.len(), |_, logits| {
            let logits = read_floats(&self.backend, logits.view())?;
            let found: Vec<_> = logits.par_chunks(self.config.vocab).map(|row| likeliest(row, count)).collect();
            for (row_ids, row_probs) in found {
                ids.extend(row_ids);
                probs.extend(row_probs);
            }
            Ok(())
        })?;
        Ok((ids, probs))
    }

    /// Shows `take` the logits of the rows of `last`, the last layer's output, in chunks.
    fn logits_of<'a>(
        &'a self,
        last: &Floats<'_, B>,
        rows: usize,
        mut take: impl FnMut(Range<usize>, &mut Floats<'a, B>) -> Result<()>,
    ) -> Result<()> {
        let (normed, _) = self.norm(&Overlay::new(), ParamId::FinalNorm, last.view())?;
        let (hidden, most) = (self.config.hidden, B::logit_rows(self.config.vocab));
        for first in (0..rows).step_by(most) {
            let chunk = first..(first + most).min(rows);
            let wide = chunk.start * hidden..chunk.end * hidden;
            take(chunk, &mut self.head_logits(&Overlay::new(), normed.range(wide))?)?;
        }
        Ok(())
    }

    /// Runs all layers, shows `tap` the rows of the embedding's output and of every layer's but the last, and returns
    /// the rows of the last layer's output before the final norm.
    fn run_layers(
        &self,
        batch: &Batch,
        rows: &[u32],
        mut tap: impl FnMut(&Floats<'_, B>) -> Result<()>,
    ) -> Result<Floats<'_, B>> {
        let none = Overlay::new();
        let packed = self.pack_distinct(batch, DistinctRows::of(batch))?;
        let chosen = self.indices(&packed.computed(rows))?;
        let mut x = self.embed(&none, &packed.select(&batch.tokens))?;
        let mut tapped = self.floats(rows.len() * self.config.hidden)?;
        for layer in 0..self.config.layers {
            self.gather(x.view(), chosen.view(), tapped.view_mut())?;
            tap(&tapped)?;
            if layer + 1 == self.config.layers && 2 * rows.len() <= packed.tokens {
                return Ok(self.layer_forward_rows(&none, layer, x.view(), &packed, batch, rows)?.0);
            }
            x = self.layer_attention(&none, layer, x, &packed)?.1;
        }
        self.gather(x.view(), chosen.view(), tapped.view_mut())?;
        Ok(tapped)
    }
}

/// Rows with a target, and their targets.
pub(super) fn trained_rows(batch: &Batch) -> (Vec<u32>, Vec<u32>) {
    batch.targets.iter().enumerate().filter(|(_, t)| **t != IGNORE).map(|(i, t)| (i as u32, *t)).unzip()
}

/// The `count` largest logits of a row: token ids, ascending, and the softmax over them. Of equal ones the first.
fn likeliest(logits: &[f32], count: usize) -> (Vec<u32>, Vec<f32>) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let descending = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, descending);
        order.truncate(count);
    }
    order.sort_unstable();
    let logit = |id: &u32| f64::from(logits[*id as usize]);
    let top = order.iter().map(logit).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = order.iter().map(|id| (logit(id) - top).exp()).sum();
    let probs = order.iter().map(|id| ((logit(id) - top).exp() / total) as f32).collect();
    (order, probs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_tokens_share_all_probability() {
        let logits = [0.0, 2f32.ln(), -5.0, 2f32.ln(), 3f32.ln()];
        assert_eq!(likeliest(&logits, 2).0, [1, 4]);
        assert_eq!(likeliest(&logits, 9).0, [0, 1, 2, 3, 4]);
        let (ids, probs) = likeliest(&logits, 3);
        assert_eq!(ids, [1, 3, 4]);
        for (p, expected) in probs.iter().zip([2.0 / 7.0, 2.0 / 7.0, 3.0 / 7.0]) {
            assert!((p - expected).abs() < 1e-6, "{probs:?}");
        }
    }
}
