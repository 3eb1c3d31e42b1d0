//! The least FLOPs and bytes of a pass over a model, whatever the engine does: 100 % of the speed of light.
//!
//! | counted | not counted |
//! |---|---|
//! | products of linear layers, of the head's rows that are needed, and of attention over the pairs that a mask lets through | norms, rotations, activations, losses, noise |
//! | backward: input gradients down to the lowest tensor that trains, weight gradients of what trains | what is computed again to save memory, and the scores that attention computes again |
//! | weights once a pass, gradients and moments once a step, keys and values of a cache once a token | activations, which a large enough chip would not let out |

use crate::backend::{Backend, Cost, Roofline, cost};
use crate::engine::prefix::DistinctRows;
use crate::engine::{Batch, Lora};
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleId, ModuleKind, ModuleSet, ParamId};
use std::ops::Range;

/// The least FLOPs and bytes of the passes over a model, given which of its tensors train.
#[derive(Clone, Debug, PartialEq)]
pub struct MinimumCost {
    config: ModelConfig,
    forward: Pass,
    backward: Pass,
    optimizer: Cost,
    /// Bytes of a weight.
    float: usize,
}

/// Coefficients of a pass's cost.
#[derive(Clone, Debug, PartialEq)]
struct Pass {
    /// FLOPs a token, attention aside.
    token: u64,
    /// FLOPs a pair of a query and a key, of all heads of a layer.
    pair: u64,
    /// Layers with attention.
    layers: Range<usize>,
    /// FLOPs a row of the head.
    row: u64,
    /// Weights read and gradients written.
    bytes: u64,
}

/// Projections of a layer behind its attention, in their order; gate and up have one input.
const BEHIND_ATTENTION: [ModuleKind; 4] = [ModuleKind::O, ModuleKind::Gate, ModuleKind::Up, ModuleKind::Down];

impl MinimumCost {
    /// Of `config` on backend `B`; `trains` selects the tensors that train.
    pub fn new<B: Backend>(config: &ModelConfig, lora: Option<Lora>, trains: impl Fn(ParamId) -> bool) -> Self {
        let params = tensors(config, lora);
        let float = size_of::<B::Float>();
        let elements = |wanted: &dyn Fn(ParamId) -> bool| -> usize {
            params.iter().filter(|(id, _)| wanted(*id)).map(|(_, n)| *n).sum()
        };
        let (head, projections) = (head(config), projections(config, &ModuleKind::ALL));
        let pair = 4 * config.q_width() as u64;
        let trained = elements(&|id| trains(id));
        let lowest = lowest_layer(params.iter().map(|(id, _)| *id).filter(|id| trains(*id)), config.layers);
        let above = config.layers.saturating_sub(lowest) as u64;
        let row = 2 * (config.vocab * config.hidden) as u64;

        // Input gradients stop inside the lowest layer at its highest frozen half.
        let half = |kinds: &[ModuleKind]| {
            kinds.iter().any(|kind| {
                let id = ModuleId { layer: lowest, kind: *kind };
                trains(ParamId::Weight(id)) || trains(ParamId::LoraA(id))
            })
        };
        let qkv = [ModuleKind::Q, ModuleKind::K, ModuleKind::V];
        let all = above == 0 || lowest == 0 && trains(ParamId::Embedding);
        let (skipped, attended) = if all {
            (0, lowest)
        } else if half(&qkv) || half(&[ModuleKind::O]) {
            (self::projections(config, &qkv), lowest)
        } else {
            (projections - self::projections(config, &[ModuleKind::Down]), lowest + 1)
        };
        let weights: u64 = params
            .iter()
            .filter(|(id, n)| trains(*id) && *n > config.hidden && !matches!(id, ParamId::Embedding | ParamId::Head))
            .map(|(_, n)| 2 * *n as u64)
            .sum();
        let inputs = if above > 0 || trains(ParamId::FinalNorm) { row } else { 0 };
        let read = |id: ParamId| config.tied || id != ParamId::Embedding;
        let read_again = |id: ParamId| id == head || id.layer().is_some_and(|layer| layer >= lowest);
        Self {
            forward: Pass {
                token: config.layers as u64 * projections,
                pair,
                layers: 0..config.layers,
                row,
                bytes: (elements(&read) * float) as u64,
            },
            backward: Pass {
                token: above * projections - skipped + weights,
                pair: 2 * pair,
                layers: attended..config.layers,
                row: inputs + if trains(head) { row } else { 0 },
                bytes: (elements(&read_again) * float + trained * size_of::<B::Grad>()) as u64,
            },
            optimizer: cost::adamw(trained, float, size_of::<B::Grad>(), size_of::<B::Moment>()),
            config: config.clone(),
            float,
        }
    }

    /// A forward pass over documents that begin at `starts`, with logits of `rows` rows.
    pub fn forward(&self, starts: &[u32], rows: usize) -> Cost {
        self.forward.cost(&self.config, starts, rows)
    }

    /// A backward pass over the same.
    pub fn backward(&self, starts: &[u32], rows: usize) -> Cost {
        self.backward.cost(&self.config, starts, rows)
    }

    /// A training step over micro-batches: passes that follow one another. A prefix that documents share
    /// counts once, except in attention.
    pub fn step(&self, batches: &[Batch]) -> Vec<Cost> {
        let passes = batches.iter().filter(|batch| batch.trained_tokens() > 0).flat_map(|batch| {
            let rows = batch.trained_tokens();
            let shared = DistinctRows::of(batch).map_or(0, |distinct| distinct.saved()) as u64;
            [&self.forward, &self.backward].map(|pass| {
                let all = pass.cost(&self.config, &batch.starts, rows);
                Cost { flops: all.flops - shared * pass.token, ..all }
            })
        });
        passes.chain([self.optimizer]).collect()
    }

    /// Answers of `new_tokens` tokens each to prompts that begin at `starts`: a pass over the prompts, then one a
    /// token.
    pub fn generation(&self, starts: &[u32], new_tokens: usize) -> Vec<Cost> {
        let (c, prompts) = (&self.config, documents(starts));
        let prefill = self.last_rows(starts) + Cost { bytes: self.forward.bytes, flops: prompts * self.forward.row };
        let token = |made: usize| {
            let length = |w: &[u32]| (w[1] - w[0]) as usize + made;
            let seen =
                |layer: usize| -> u64 { starts.windows(2).map(|w| length(w).min(self.window(layer)) as u64).sum() };
            let seen: u64 = (0..c.layers).map(seen).sum();
            Cost {
                bytes: self.forward.bytes + seen * (2 * c.kv_width() * self.float) as u64,
                flops: prompts * (self.forward.token + self.forward.row) + seen * self.forward.pair,
            }
        };
        [prefill].into_iter().chain((1..new_tokens).map(token)).collect()
    }

    /// The last token of every prompt through all layers, once for the model as it is and twice for each projection of
    /// `cells`, perturbed one at a time with both signs: computation below the projection is shared, computation behind
    /// it is not.
    pub fn sweep(&self, starts: &[u32], cells: &ModuleSet) -> Cost {
        let c = &self.config;
        let (prompts, tokens) = (documents(starts), tokens(starts));
        let last = c.layers - 1;
        let member = |id: ModuleId| {
            let attends = matches!(id.kind, ModuleKind::Q | ModuleKind::K | ModuleKind::V);
            let behind = match id.kind {
                ModuleKind::Q | ModuleKind::K | ModuleKind::V => &BEHIND_ATTENTION[..],
                ModuleKind::O => &BEHIND_ATTENTION[1..],
                ModuleKind::Gate | ModuleKind::Up => &BEHIND_ATTENTION[3..],
                ModuleKind::Down => &[],
            };
            let (own, behind) = (projections(c, &[id.kind]), projections(c, behind));
            if id.layer == last {
                let own_rows = if matches!(id.kind, ModuleKind::K | ModuleKind::V) { tokens } else { prompts };
                let seen = if attends { self.seen_by_last(starts) } else { 0 };
                return own_rows * own + prompts * behind + seen * self.forward.pair;
            }
            let attention = if attends { self.pairs(starts, id.layer..id.layer + 1) } else { 0 };
            let above = self.layers(starts, id.layer + 1..last) + self.last_layer(starts);
            tokens * (own + behind) + attention * self.forward.pair + above
        };
        let members = cells.iter().filter_map(|cell| if let Cell::Module(id) = cell { Some(member(id)) } else { None });
        self.last_rows(starts) + Cost { bytes: self.forward.bytes, flops: 2 * members.sum::<u64>() }
    }

    /// FLOPs of the forward pass of the layers that train, or are above what trains.
    pub(super) fn recomputed_flops(&self, starts: &[u32], lowest: usize) -> u64 {
        self.layers(starts, lowest..self.config.layers)
    }

    /// The last token of every document through all layers, and no head.
    fn last_rows(&self, starts: &[u32]) -> Cost {
        let flops = self.layers(starts, 0..self.config.layers - 1) + self.last_layer(starts);
        Cost { bytes: 0, flops }
    }

    /// FLOPs of whole layers.
    fn layers(&self, starts: &[u32], layers: Range<usize>) -> u64 {
        let linear = projections(&self.config, &ModuleKind::ALL);
        layers.len() as u64 * tokens(starts) * linear + self.pairs(starts, layers) * self.forward.pair
    }

    /// FLOPs of the last layer: keys and values of all tokens, the rest for the last tokens.
    fn last_layer(&self, starts: &[u32]) -> u64 {
        let (c, prompts) = (&self.config, documents(starts));
        let (all, kv) = (projections(c, &ModuleKind::ALL), projections(c, &[ModuleKind::K, ModuleKind::V]));
        tokens(starts) * kv + prompts * (all - kv) + self.seen_by_last(starts) * self.forward.pair
    }

    /// Keys that the last tokens of all documents see in the last layer.
    fn seen_by_last(&self, starts: &[u32]) -> u64 {
        let window = self.window(self.config.layers - 1);
        starts.windows(2).map(|w| ((w[1] - w[0]) as usize).min(window) as u64).sum()
    }

    fn window(&self, layer: usize) -> usize {
        window(&self.config, layer).unwrap_or(usize::MAX)
    }

    fn pairs(&self, starts: &[u32], layers: Range<usize>) -> u64 {
        pairs(&self.config, starts, layers)
    }
}

impl Pass {
    fn cost(&self, config: &ModelConfig, starts: &[u32], rows: usize) -> Cost {
        let attention = pairs(config, starts, self.layers.clone()) * self.pair;
        Cost { bytes: self.bytes, flops: tokens(starts) * self.token + attention + rows as u64 * self.row }
    }
}

/// Seconds that passes take one after another at the measured roofline.
pub fn roofline_seconds(passes: &[Cost], roofline: &Roofline) -> f64 {
    passes.iter().map(|pass| roofline.seconds(*pass)).sum()
}

/// Every tensor with its number of elements; adapters on all projections if there are any.
pub(super) fn tensors(config: &ModelConfig, lora: Option<Lora>) -> Vec<(ParamId, usize)> {
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

/// The lowest layer in which, or below which, one of these tensors is; `layers` where none is in a layer.
pub(in crate::engine) fn lowest_layer(ids: impl Iterator<Item = ParamId>, layers: usize) -> usize {
    let layer = |id: ParamId| if id == ParamId::Embedding { Some(0) } else { id.layer() };
    ids.filter_map(layer).min().unwrap_or(layers)
}

fn head(config: &ModelConfig) -> ParamId {
    if config.tied { ParamId::Embedding } else { ParamId::Head }
}

/// FLOPs of projections, a token.
fn projections(config: &ModelConfig, kinds: &[ModuleKind]) -> u64 {
    kinds.iter().map(|kind| config.module_shape(*kind)).map(|(outputs, inputs)| 2 * (outputs * inputs) as u64).sum()
}

fn documents(starts: &[u32]) -> u64 {
    starts.len().saturating_sub(1) as u64
}

fn tokens(starts: &[u32]) -> u64 {
    starts.last().map_or(0, |end| u64::from(*end))
}

fn window(config: &ModelConfig, layer: usize) -> Option<usize> {
    config.windows.get(layer).copied().flatten()
}

/// Pairs of a query and a key that it sees, over layers.
fn pairs(config: &ModelConfig, starts: &[u32], layers: Range<usize>) -> u64 {
    layers.map(|layer| cost::attention_pairs(starts, window(config, layer))).sum()
}
