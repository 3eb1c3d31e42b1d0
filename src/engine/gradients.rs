//! Gradient buffers of the tensors that train.

use super::cost::lowest_layer;
use crate::backend::{Backend, Buffer};
use crate::engine::Decoder;
use crate::error::Result;
use crate::modules::ParamId;
use std::collections::BTreeMap;

/// Gradients that were taken out of a [`Gradients`], with their tensors.
pub type FinalGradients<B> = Vec<(ParamId, Buffer<B, <B as Backend>::Grad>)>;

/// One buffer for each tensor that trains.
pub struct Gradients<B: Backend> {
    /// `None` while a buffer is taken out.
    buffers: BTreeMap<ParamId, Option<Buffer<B, B::Grad>>>,
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
                buffers.insert(p.id, Some(decoder.backend.zeros(p.values.len())?));
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

    /// The buffer of a tensor; `None` = frozen, or taken out.
    pub fn get(&self, id: ParamId) -> Option<&Buffer<B, B::Grad>> {
        self.buffers.get(&id)?.as_ref()
    }

    /// The buffer of a tensor, to write; `None` = frozen, or taken out.
    pub fn get_mut(&mut self, id: ParamId) -> Option<&mut Buffer<B, B::Grad>> {
        self.buffers.get_mut(&id)?.as_mut()
    }

    /// Takes out the buffers of some tensors, which still count as trained, in the order of tensors.
    pub fn take(&mut self, which: impl Fn(ParamId) -> bool) -> FinalGradients<B> {
        let wanted = self.buffers.iter_mut().filter(|(id, _)| which(**id));
        wanted.filter_map(|(id, buffer)| Some((*id, buffer.take()?))).collect()
    }

    /// Puts the buffer of a tensor back, which [`Gradients::take`] has taken out.
    pub fn put_back(&mut self, id: ParamId, buffer: Buffer<B, B::Grad>) {
        self.buffers.insert(id, Some(buffer));
    }

    /// The buffers of the tensors among `ids` that train, to write, in the order of tensors.
    pub(super) fn each_mut<const N: usize>(
        &mut self,
        ids: [ParamId; N],
    ) -> impl Iterator<Item = (ParamId, &mut Buffer<B, B::Grad>)> {
        self.iter_mut().filter(move |(id, _)| ids.contains(id))
    }

    /// All buffers in the order of tensors, but for those that are taken out.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Buffer<B, B::Grad>)> {
        self.buffers.iter().filter_map(|(id, b)| Some((*id, b.as_ref()?)))
    }

    /// All buffers in the order of tensors, to write, but for those that are taken out.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (ParamId, &mut Buffer<B, B::Grad>)> {
        self.buffers.iter_mut().filter_map(|(id, b)| Some((*id, b.as_mut()?)))
    }

    /// Whether a tensor trains.
    pub fn trains(&self, id: ParamId) -> bool {
        self.buffers.contains_key(&id)
    }
}
