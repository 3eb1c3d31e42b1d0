//! What a run will take, before anything is allocated: bytes by category, FLOPs a token, trainable share.

use super::Lora;
use crate::backend::Backend;
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleId, ModuleKind, ParamId};

/// A training step's shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Tokens of one document; attention's FLOPs grow with it.
    pub document_tokens: usize,
    /// Share of the tokens that have a loss; the head works on those alone.
    pub trained_share: f64,
    /// One activation a layer is kept instead of about ten.
    pub recompute: bool,
    /// Adapters, if that is what trains.
    pub lora: Option<Lora>,
}

/// Bytes by category, at the highest point of a step.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Plan {
    /// All weights (and adapters).
    pub weights_bytes: u64,
    /// Gradients of what trains.
    pub gradients_bytes: u64,
    /// Both moments of what trains.
    pub moments_bytes: u64,
    /// Activations kept for the backward pass.
    pub activations_bytes: u64,
    /// Buffers of the layer at work and of the head.
    pub workspace_bytes: u64,
    /// Parameters, and those that train.
    pub parameters: u64,
    /// Parameters that train.
    pub trainable: u64,
    /// FLOPs of the forward pass, a token (a multiplication and an addition count as two).
    pub forward_flops: f64,
    /// FLOPs of the backward pass, a token; a second forward pass included where activations are recomputed.
    pub backward_flops: f64,
}

impl Plan {
    /// Plans a step of `config` on backend `B` in which the tensors that `trains` says are trained.
    pub fn new<B: Backend>(config: &ModelConfig, work: &Workload, trains: impl Fn(ParamId) -> bool) -> Self {
        let params = tensors(config, work.lora);
        let float = size_of::<B::Float>() as u64;
        let count = |wanted: &dyn Fn(ParamId) -> bool| -> u64 {
            params.iter().filter(|(id, _)| wanted(*id)).map(|(_, n)| *n as u64).sum()
        };
        let parameters = count(&|_| true);
        let trainable = count(&|id| trains(id));
        let lowest = lowest_trained_layer(config, &params, &trains);
        let kept_layers = (config.layers - lowest) as u64;

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
        let rows = (work.trained_share * tokens as f64).ceil() as u64;
        let logit_rows = ((64 << 20) / (c.vocab as u64 * float)).clamp(1, rows.max(1));
        let head = 4 * rows * hidden + logit_rows * c.vocab as u64;
        // Beside what is kept: the residual stream or its gradient, the MLP's product or its gradient, and the gradients of
        // k and v, which are too small to take the place of what is freed by then. A frozen layer below works in the
        // memory in which the layers above are kept later.
        let layer = tokens * (hidden + ffn + 2 * kv) + if kept_layers == 0 { layer_floats } else { 0 };
        Self {
            weights_bytes: parameters * float,
            gradients_bytes: trainable * size_of::<B::Grad>() as u64,
            moments_bytes: 2 * trainable * size_of::<B::Moment>() as u64,
            activations_bytes: activations,
            workspace_bytes: (head + layer) * float,
            parameters,
            trainable,
            forward_flops: forward_flops(config, work),
            backward_flops: backward_flops(config, work, &params, &trains, lowest),
        }
    }

    /// Everything together.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.gradients_bytes + self.moments_bytes + self.activations_bytes + self.workspace_bytes
    }

    /// Share of the parameters that trains.
    pub fn trainable_share(&self) -> f64 {
        self.trainable as f64 / self.parameters.max(1) as f64
    }
}

/// Every tensor with its number of elements; adapters on all projections if there are any.
fn tensors(config: &ModelConfig, lora: Option<Lora>) -> Vec<(ParamId, usize)> {
    let mut params: Vec<(ParamId, usize)> =
        config.params().into_iter().map(|(id, shape)| (id, shape.iter().product())).collect();
    if let Some(lora) = lora {
        for cell in config.cells().iter() {
            if let Cell::Module(id) = cell {
                let (outputs, inputs) = config.module_shape(id.kind);
                params.push((ParamId::LoraA(id), lora.rank * inputs));
                params.push((ParamId::LoraB(id), lora.rank * outputs));
            }
        }
    }
    params
}

fn lowest_trained_layer(config: &ModelConfig, params: &[(ParamId, usize)], trains: &impl Fn(ParamId) -> bool) -> usize {
    if trains(ParamId::Embedding) {
        return 0;
    }
    params.iter().filter(|(id, _)| trains(*id)).filter_map(|(id, _)| id.layer()).min().unwrap_or(config.layers)
}

/// Products of one layer's projections, and of its causal attention, a token.
fn layer_flops(config: &ModelConfig, document_tokens: usize) -> (f64, f64) {
    let linear: usize = ModuleKind::ALL.iter().map(|k| config.module_shape(*k)).map(|(o, i)| 2 * o * i).sum();
    // Q·Kᵀ and P·V over half of the document on average.
    let attention = 2.0 * config.q_width() as f64 * (document_tokens as f64 + 1.0);
    (linear as f64, attention)
}

fn forward_flops(config: &ModelConfig, work: &Workload) -> f64 {
    let (linear, attention) = layer_flops(config, work.document_tokens);
    config.layers as f64 * (linear + attention) + work.trained_share * 2.0 * (config.vocab * config.hidden) as f64
}

fn backward_flops(
    config: &ModelConfig,
    work: &Workload,
    params: &[(ParamId, usize)],
    trains: &impl Fn(ParamId) -> bool,
    lowest: usize,
) -> f64 {
    let (linear, attention) = layer_flops(config, work.document_tokens);
    let above = config.layers.saturating_sub(lowest) as f64;
    let head = 2.0 * (config.vocab * config.hidden) as f64 * work.trained_share;
    let head_id = if config.tied { ParamId::Embedding } else { ParamId::Head };
    // Input gradients stop inside the lowest layer at its highest frozen half.
    let half = |kinds: &[ModuleKind]| {
        kinds.iter().any(|kind| {
            let id = ModuleId { layer: lowest, kind: *kind };
            trains(ParamId::Weight(id)) || trains(ParamId::LoraA(id))
        })
    };
    let attention_half = half(&[ModuleKind::Q, ModuleKind::K, ModuleKind::V, ModuleKind::O]);
    let skipped = if lowest == 0 && trains(ParamId::Embedding) || above == 0.0 {
        0.0
    } else {
        let flops = |kinds: &[ModuleKind]| -> f64 {
            kinds.iter().map(|k| config.module_shape(*k)).map(|(o, i)| 2.0 * (o * i) as f64).sum()
        };
        let qkv = flops(&[ModuleKind::Q, ModuleKind::K, ModuleKind::V]);
        if attention_half { qkv } else { linear - flops(&[ModuleKind::Down]) + 2.0 * attention }
    };
    let weights: f64 = params
        .iter()
        .filter(|(id, n)| trains(*id) && *n > config.hidden && !matches!(id, ParamId::Embedding | ParamId::Head))
        .map(|(_, n)| 2.0 * *n as f64)
        .sum();
    let recomputed = if work.recompute { above * (linear + attention) } else { 0.0 };
    let inputs = if above > 0.0 || trains(ParamId::FinalNorm) { head } else { 0.0 };
    inputs + above * (linear + 2.0 * attention) - skipped
        + weights
        + if trains(head_id) { head } else { 0.0 }
        + recomputed
}
