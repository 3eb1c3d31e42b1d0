//! A running mean of the weights, the cheap baseline of arXiv 2508.12531.

use crate::backend::{Backend, FloatElement};
use crate::engine::Decoder;
use crate::error::Result;
use crate::modules::ParamId;
use std::collections::{BTreeMap, btree_map::Entry};

/// w̄ ← decay·w̄ + (1 − decay)·w of each tensor that has trained, on the host, in f32.
#[derive(Default)]
pub(super) struct Ema {
    pub(super) means: BTreeMap<ParamId, Vec<f32>>,
}

impl Ema {
    /// Begins the mean of tensors that have none, at their present values.
    pub(super) fn begin<B: Backend>(&mut self, decoder: &Decoder<B>, ids: impl Iterator<Item = ParamId>) -> Result<()> {
        for id in ids {
            if let Entry::Vacant(mean) = self.means.entry(id) {
                mean.insert(decoder.read(id)?);
            }
        }
        Ok(())
    }

    /// After a step.
    pub(super) fn update<B: Backend>(&mut self, decoder: &Decoder<B>, decay: f32) -> Result<()> {
        for (id, mean) in &mut self.means {
            for (mean, weight) in mean.iter_mut().zip(decoder.read(*id)?) {
                *mean = decay * *mean + (1.0 - decay) * weight;
            }
        }
        Ok(())
    }

    /// Puts the means in place of the weights, rounded to the backend's type.
    pub(super) fn apply<B: Backend>(&self, decoder: &mut Decoder<B>) -> Result<()> {
        let (backend, params) = decoder.split_mut();
        for param in params {
            if let Some(mean) = self.means.get(&param.id) {
                let narrowed: Vec<B::Float> = mean.iter().map(|x| B::Float::from_f32(*x)).collect();
                backend.write(&narrowed, param.values.view_mut())?;
            }
        }
        Ok(())
    }
}
