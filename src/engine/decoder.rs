//! Weights on a backend, and what can be asked of them.

use crate::backend::{Backend, Buffer};
use crate::engine::{Batch, Gradients};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::modules::ParamId;

/// One tensor on the backend.
pub struct Parameter<B: Backend> {
    /// Which one.
    pub id: ParamId,
    /// Shape as in the checkpoint.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Buffer<B, B::Float>,
}

/// A decoder on a backend.
pub struct Decoder<B: Backend> {
    /// Arithmetic.
    pub backend: B,
    /// Shape.
    pub config: ModelConfig,
    params: Vec<Parameter<B>>,
}

impl<B: Backend> Decoder<B> {
    /// Builds it; `tensor(id, shape)` gives the values of each tensor of [`ModelConfig::params`].
    pub fn new(
        _backend: B,
        _config: ModelConfig,
        _tensor: impl FnMut(ParamId, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        todo!()
    }

    /// All tensors, in the order of [`ModelConfig::params`] (then LoRA's).
    pub fn params(&self) -> &[Parameter<B>] {
        &self.params
    }

    /// All tensors, to change.
    pub fn params_mut(&mut self) -> &mut [Parameter<B>] {
        &mut self.params
    }

    /// A tensor's values on the host.
    pub fn read(&self, _id: ParamId) -> Result<Vec<f32>> {
        todo!()
    }

    /// Hidden states at `rows` of the packed batch, each [rows, hidden], layers + 1 of them: the embedding's output
    /// first, the last after the final norm (as `output_hidden_states` of transformers).
    pub fn hidden_states(&self, _batch: &Batch, _rows: &[u32]) -> Result<Vec<Vec<f32>>> {
        todo!()
    }

    /// Logits [rows, vocab] at `rows` of the packed batch.
    pub fn logits(&self, _batch: &Batch, _rows: &[u32]) -> Result<Vec<f32>> {
        todo!()
    }

    /// −log p of each row's target (0 where ignored), [tokens].
    pub fn losses(&self, _batch: &Batch) -> Result<Vec<f32>> {
        todo!()
    }

    /// Forward and backward: gradients of `scale · Σ loss` are added to (`accumulate`) or put into `gradients`, which
    /// names the tensors that train. Returns Σ loss over the batch's targets. `recompute` keeps one activation a layer
    /// instead of ten and runs each layer's forward again (about a third more time).
    pub fn loss_and_gradients(
        &mut self,
        _batch: &Batch,
        _gradients: &mut Gradients<B>,
        _scale: f32,
        _accumulate: bool,
        _recompute: bool,
    ) -> Result<f64> {
        todo!()
    }
}
