//! Exponential moving average of the weights (arXiv 2508.12531), on the device.

use crate::backend::{Backend, Buffer, FloatElement, MeanRow, Operator, UpdateMeans};
use crate::engine::Decoder;
use crate::error::Result;
use crate::modules::ParamId;
use std::collections::{BTreeMap, btree_map::Entry};

/// w̄ ← decay·w̄ + (1 − decay)·w of each trained tensor, f32.
pub(super) struct Ema<B: Backend> {
    pub(super) means: BTreeMap<ParamId, Buffer<B, f32>>,
}

impl<B: Backend> Default for Ema<B> {
    fn default() -> Self {
        Self { means: BTreeMap::new() }
    }
}

impl<B: Backend> Ema<B> {
    /// Starts the averages of tensors without one at their current values.
    pub(super) fn begin(&mut self, decoder: &Decoder<B>, ids: impl Iterator<Item = ParamId>) -> Result<()> {
        for id in ids {
            if let Entry::Vacant(mean) = self.means.entry(id) {
                let values = decoder.read(id)?;
                let mean = mean.insert(decoder.backend.zeros(values.len())?);
                decoder.backend.write(&values, mean.view_mut())?;
            }
        }
        Ok(())
    }

    /// Updates the averages after a step.
    pub(super) fn update(&mut self, decoder: &Decoder<B>, decay: f32) -> Result<()> {
        let mut table = Vec::new();
        for (id, mean) in &mut self.means {
            if let Some(param) = decoder.param(*id) {
                table.push(MeanRow { mean: mean.view_mut(), weight: param.values.view() });
            }
        }
        UpdateMeans { table: &mut table, decay }.run(&decoder.backend)
    }

    /// Replaces the weights by the averages, rounded to the backend's dtype.
    pub(super) fn apply(&self, decoder: &mut Decoder<B>) -> Result<()> {
        let (backend, params) = decoder.split_mut();
        for param in params {
            if let Some(mean) = self.means.get(&param.id) {
                let mut values = vec![0f32; mean.len()];
                backend.read(mean.view(), &mut values)?;
                let narrowed: Vec<B::Float> = values.iter().map(|x| B::Float::from_f32(*x)).collect();
                backend.write(&narrowed, param.values.view_mut())?;
            }
        }
        Ok(())
    }
}
