//! Memory plan of a run, before anything is allocated: bytes by category, FLOPs a token, trainable share.

use super::minimum::{MinimumCost, lowest_layer, tensors};
use crate::backend::Backend;
use crate::engine::Lora;
use crate::model::ModelConfig;
use crate::modules::ParamId;

/// A training step's shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Tokens of one document; attention's FLOPs grow with it.
    pub document_tokens: usize,
    /// Share of the tokens that have a loss, 0 to 1; the head runs on those alone.
    pub trained_share: f64,
    /// Keeps one activation a layer instead of about ten.
    pub recompute: bool,
    /// Adapters of a LoRA run.
    pub lora: Option<Lora>,
    /// What a recipe keeps beside weights, gradients and moments.
    pub beside: Beside,
}

/// Bytes on the device of what a training recipe adds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// For each trained parameter: its moving average, what it is held near.
    pub parameter_bytes: usize,
    /// For each token of a micro-batch with a loss: the terms of its loss.
    pub token_bytes: usize,
    /// Whether the outputs of all layers are moved along their gradients.
    pub outputs: bool,
}

/// Bytes by category at the peak of a step, and FLOPs.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Plan {
    /// All weights and adapters.
    pub weights_bytes: u64,
    /// Gradients of the trained tensors.
    pub gradients_bytes: u64,
    /// Both AdamW moments of the trained tensors.
    pub moments_bytes: u64,
    /// Copies of the trained tensors: moving averages, and what the proximal term holds them near.
    pub copies_bytes: u64,
    /// Activations kept for the backward pass.
    pub activations_bytes: u64,
    /// Buffers of the layer that runs, of the head, and scratch of products.
    pub workspace_bytes: u64,
    /// Number of parameters.
    pub parameters: u64,
    /// Number of trained parameters.
    pub trainable: u64,
    /// FLOPs of the forward pass, a token (a multiplication and an addition count as two).
    pub forward_flops: f64,
    /// FLOPs of the backward pass, a token; a second forward pass included where activations are recomputed.
    pub backward_flops: f64,
}

impl Plan {
    /// Plans a step of `config` on backend `B`; `trains` selects the tensors that train.
    pub fn new<B: Backend>(config: &ModelConfig, work: &Workload, trains: impl Fn(ParamId) -> bool) -> Self {
        let params = tensors(config, work.lora);
        let float = size_of::<B::Float>() as u64;
        let count = |wanted: &dyn Fn(ParamId) -> bool| -> u64 {
            params.iter().filter(|(id, _)| wanted(*id)).map(|(_, n)| *n as u64).sum()
        };
        let parameters = count(&|_| true);
        let trainable = count(&|id| trains(id));
        let lowest = lowest_layer(params.iter().map(|(id, _)| *id).filter(|id| trains(*id)), config.layers);
        let kept_layers = (config.layers - if work.beside.outputs { 0 } else { lowest }) as u64;

        let minimum = MinimumCost::new::<B>(config, work.lora, &trains);
        let document = &[0, work.document_tokens as u32];
        let document_rows = (work.trained_share * work.document_tokens as f64).ceil() as usize;
        let recomputed = if work.recompute { minimum.recomputed_flops(document, lowest) } else { 0 };
        let a_token = |flops: u64| flops as f64 / work.document_tokens.max(1) as f64;

        let (tokens, c) = (work.tokens as u64, config);
        let (hidden, ffn, q, kv) = (c.hidden as u64, c.ffn as u64, c.q_width() as u64, c.kv_width() as u64);
        let unnormed = if c.qk_norm { q + kv } else { 0 };
        let layer_floats = tokens * (2 * hidden + 2 * q + 2 * kv + 2 * ffn + unnormed);
        let stats = 2 + c.heads as u64 + if c.qk_norm { (c.heads + c.kv_heads) as u64 } else { 0 };
        let layer_bytes = layer_floats * float + tokens * stats * 4;
        let activations = match (work.recompute, kept_layers) {
            (_, 0) => 0,
            (false, n) => n * layer_bytes,
            (true, n) => n * tokens * hidden * float + layer_bytes,
        };
        let moves = if work.beside.outputs { config.layers as u64 * tokens * hidden * float } else { 0 };
        let rows = (work.trained_share * tokens as f64).ceil() as u64;
        let logit_rows = (B::logit_rows(c.vocab) as u64).clamp(1, rows.max(1));
        let head = 4 * rows * hidden + logit_rows * c.vocab as u64;
        // Beside what is kept: the residual stream or its gradient, the MLP's product or its gradient, and the
        // gradients of k and v, which are too small to take the place of what is freed by then. A frozen layer below
        // works in the memory in which the layers above are kept later.
        let layer = tokens * (hidden + ffn + 2 * kv) + if kept_layers == 0 { layer_floats } else { 0 };
        // The products of the backward pass: the gradients of q, k and v are one product where they can be, those of
        // gate and up as well.
        let products = [(c.hidden, c.q_width() + 2 * c.kv_width()), (c.hidden, 2 * c.ffn), (c.ffn, c.hidden)];
        let scratch = products.map(|(n, k)| B::product_scratch_bytes(work.tokens, n, k));
        let scratch = if kept_layers == 0 { 0 } else { scratch.into_iter().max().unwrap_or(0) };
        Self {
            weights_bytes: parameters * float,
            gradients_bytes: trainable * size_of::<B::Grad>() as u64,
            moments_bytes: 2 * trainable * size_of::<B::Moment>() as u64,
            copies_bytes: trainable * work.beside.parameter_bytes as u64,
            activations_bytes: activations + moves,
            workspace_bytes: (head + layer) * float + scratch + rows * work.beside.token_bytes as u64,
            parameters,
            trainable,
            forward_flops: a_token(minimum.forward(document, document_rows).flops),
            backward_flops: a_token(minimum.backward(document, document_rows).flops + recomputed),
        }
    }

    /// The plan of one of `ranks` that train together: each has the moments of its part of every tensor (ZeRO-1). Its
    /// tokens are those of the plan.
    pub fn sharded(self, ranks: usize) -> Self {
        Self { moments_bytes: self.moments_bytes.div_ceil(ranks.max(1) as u64), ..self }
    }

    /// Bytes by category, with its name.
    pub fn categories(&self) -> [(&'static str, u64); 6] {
        [
            ("weights", self.weights_bytes),
            ("gradients", self.gradients_bytes),
            ("moments", self.moments_bytes),
            ("copies", self.copies_bytes),
            ("activations", self.activations_bytes),
            ("workspace", self.workspace_bytes),
        ]
    }

    /// Sum of all categories.
    pub fn total_bytes(&self) -> u64 {
        self.categories().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Share of the parameters that train, 0 to 1.
    pub fn trainable_share(&self) -> f64 {
        self.trainable as f64 / self.parameters.max(1) as f64
    }
}
