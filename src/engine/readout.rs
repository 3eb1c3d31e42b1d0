//! Outputs of forward passes: hidden states, logits, losses.

use super::decoder::{Overlay, read_floats};
use super::pool::Floats;
use super::{Batch, Decoder};
use crate::backend::{Backend, CrossEntropy, IGNORE, Operator, trace};
use crate::error::Result;
use crate::modules::ParamId;

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
        let (normed, _) = self.norm(&Overlay::new(), ParamId::FinalNorm, last.view())?;
        let (hidden, most) = (self.config.hidden, B::logit_rows(self.config.vocab));
        let mut host = Vec::with_capacity(rows.len() * self.config.vocab);
        for first in (0..rows.len()).step_by(most) {
            let chunk = first..(first + most).min(rows.len());
            let logits = self.head_logits(&Overlay::new(), normed.range(chunk.start * hidden..chunk.end * hidden))?;
            host.extend(read_floats(&self.backend, logits.view())?);
        }
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
        let (normed, _) = self.norm(&Overlay::new(), ParamId::FinalNorm, last.view())?;
        let (hidden, most) = (self.config.hidden, B::logit_rows(self.config.vocab));
        for first in (0..rows.len()).step_by(most) {
            let chunk = first..(first + most).min(rows.len());
            let mut logits =
                self.head_logits(&Overlay::new(), normed.range(chunk.start * hidden..chunk.end * hidden))?;
            let targets = self.indices(&targets[chunk.clone()])?;
            let mut nll = self.stats(chunk.len())?;
            CrossEntropy {
                logits: logits.view_mut(),
                targets: targets.view(),
                losses: nll.view_mut(),
                vocab: self.config.vocab,
                scale: None,
            }
            .run(&self.backend)?;
            let nll = read_floats(&self.backend, nll.view())?;
            for (row, loss) in rows[chunk].iter().zip(nll) {
                losses[*row as usize] = loss;
            }
        }
        Ok(losses)
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
        let packed = self.pack(batch)?;
        let chosen = self.indices(rows)?;
        let mut x = self.embed(&none, &batch.tokens)?;
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
