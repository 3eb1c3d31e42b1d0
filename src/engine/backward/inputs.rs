//! What a micro-batch brings to the device.

use crate::backend::{Backend, LossTerms};
use crate::engine::forward::Packed;
use crate::engine::pool::{Scratch, Stats};
use crate::engine::readout::trained_rows;
use crate::engine::{Batch, Decoder, TokenTerms};
use crate::error::Result;
use std::ops::Range;

/// Inputs of a micro-batch beside its [`crate::engine::forward::Packed`] form.
pub(super) struct Inputs<'p, B: Backend> {
    /// Of the computed rows.
    pub(super) tokens: Scratch<'p, B, u32>,
    /// Computed rows that have a target, and their targets.
    pub(super) rows: Scratch<'p, B, u32>,
    pub(super) targets: Scratch<'p, B, u32>,
    pub(super) terms: Option<Terms<'p, B>>,
}

/// [`TokenTerms`] on the backend.
pub(super) struct Terms<'p, B: Backend> {
    reference: Stats<'p, B>,
    beta: Stats<'p, B>,
    ids: Scratch<'p, B, u32>,
    probs: Stats<'p, B>,
    /// Entries of a row of `ids`.
    width: usize,
    distil: f32,
}

impl<B: Backend> Terms<'_, B> {
    /// Those of some rows.
    pub(super) fn part(&self, rows: Range<usize>) -> LossTerms<'_, B> {
        let entries = rows.start * self.width..rows.end * self.width;
        LossTerms {
            reference: self.reference.range(rows.clone()),
            beta: self.beta.range(rows),
            ids: self.ids.range(entries.clone()),
            probs: self.probs.range(entries),
            distil: self.distil,
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// Those of a batch.
    pub(super) fn inputs(&self, batch: &Batch, packed: &Packed<'_, B>) -> Result<Inputs<'_, B>> {
        let (rows, targets) = trained_rows(batch);
        Ok(Inputs {
            tokens: self.indices(&packed.select(&batch.tokens))?,
            rows: self.indices(&packed.computed(&rows))?,
            targets: self.indices(&targets)?,
            terms: batch.terms.as_ref().map(|terms| self.terms(terms)).transpose()?,
        })
    }

    fn terms(&self, terms: &TokenTerms) -> Result<Terms<'_, B>> {
        let TokenTerms { reference, beta, ids, probs, distil } = terms;
        let put = |values: &[f32]| {
            let mut stats = self.stats(values.len())?;
            self.backend.write(values, stats.view_mut())?;
            Ok(stats)
        };
        let width = ids.len() / beta.len().max(1);
        let (reference, beta, probs) = (put(reference)?, put(beta)?, put(probs)?);
        Ok(Terms { reference, beta, ids: self.indices(ids)?, probs, width, distil: *distil })
    }
}
