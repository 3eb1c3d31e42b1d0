//! Gradient buffers of the tensors that train.

use super::cost::lowest_layer;
use crate::backend::{Backend, Buffer};
use crate::engine::Decoder;
use crate::error::Result;
use crate::modules::ParamId;
use std::collections::BTreeMap;

/// One buffer for each tensor that trains.
pub struct Gradients<B: Backend> {
    buffers: BTreeMap<ParamId, Buffer<B, B::Grad>>,
    /// Whether the running backward pass adds to what the buffers hold.
    pub(super) accumulate: bool,
    /// Whether the gradients of all layers' outputs are needed, whatever trains.
    outputs: bool,
}

/// How the gradients of a micro-batch are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradientOptions {
    /// Factor on the loss.
    pub scale: f32,
    /// Adds to the gradients of earlier micro-batches instead of replacing them.
    pub accumulate: bool,
    /// Keeps one activation a layer instead of about ten and runs each layer's forward pass again: about a third more
    /// time.
    pub recompute: bool,
    /// Moves the outputs of all layers by this much along the gradient of the loss with respect to them, before the pass
    /// whose gradients count ([`crate::engine::Decoder::queue_gradients`]); `None`: one pass.
    pub vaccine: Option<f32>,
}

impl GradientOptions {
    /// Gradients of scale · Σ loss that replace earlier ones, with all activations kept.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, accumulate: false, recompute: false, vaccine: None }
    }
}

impl<B: Backend> Gradients<B> {
    /// Zeroed buffers; `trains` selects the tensors that train.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    pub fn new(decoder: &Decoder<B>, trains: impl Fn(ParamId) -> bool) -> Result<Self> {
        let mut buffers = BTreeMap::new();
        for p in decoder.params() {
            if trains(p.id) {
                buffers.insert(p.id, decoder.backend.zeros(p.values.len())?);
            }
        }
        Ok(Self { buffers, accumulate: false, outputs: false })
    }

    /// For a pass to the gradients of all layers' outputs, without any of a tensor.
    pub(super) fn of_outputs() -> Self {
        Self { buffers: BTreeMap::new(), accumulate: false, outputs: true }
    }

    /// The lowest layer that the backward pass reaches; `layers` where it reaches none.
    pub(super) fn lowest(&self, layers: usize) -> usize {
        if self.outputs { 0 } else { lowest_layer(self.buffers.keys().copied(), layers) }
    }

    /// Whether the gradient of a layer's input is needed.
    pub(super) fn below(&self, layer: usize) -> bool {
        let lower = |id: &ParamId| *id == ParamId::Embedding || id.layer().is_some_and(|other| other < layer);
        self.outputs && layer > 0 || self.buffers.keys().any(lower)
    }

    /// The buffer of a tensor; `None` = frozen.
    pub fn get(&self, id: ParamId) -> Option<&Buffer<B, B::Grad>> {
        self.buffers.get(&id)
    }

    /// The buffer of a tensor, to write; `None` = frozen.
    pub fn get_mut(&mut self, id: ParamId) -> Option<&mut Buffer<B, B::Grad>> {
        self.buffers.get_mut(&id)
    }

    /// The buffers of the tensors among `ids` that train, to write, in the order of tensors.
    pub(super) fn each_mut<const N: usize>(
        &mut self,
        ids: [ParamId; N],
    ) -> impl Iterator<Item = (ParamId, &mut Buffer<B, B::Grad>)> {
        self.buffers.iter_mut().filter(move |(id, _)| ids.contains(id)).map(|(id, buffer)| (*id, buffer))
    }

    /// All buffers in the order of tensors.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Buffer<B, B::Grad>)> {
        self.buffers.iter().map(|(id, b)| (*id, b))
    }

    /// All buffers in the order of tensors, to write.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (ParamId, &mut Buffer<B, B::Grad>)> {
        self.buffers.iter_mut().map(|(id, b)| (*id, b))
    }

    /// Whether a tensor trains.
    pub fn trains(&self, id: ParamId) -> bool {
        self.buffers.contains_key(&id)
    }
}
