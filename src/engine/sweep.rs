//! The perturbed sweep: many copies of the model, each with some tensors perturbed, read at the last token of every
//! prompt.
//!
//! Savings over perturbing, running and restoring one copy after another:
//! - shared prefixes of prompts are computed once ([`DistinctRows`]);
//! - everything below the lowest perturbed layer is the clean model's, computed once for all;
//! - inside that layer, everything before the perturbed projection is shared as well;
//! - above it, copies are concatenated along the tokens until products are large enough for the backend;
//! - an antithetic pair shares its draw, and weights are perturbed out of place;
//! - of the last layer only the last tokens are computed, beyond keys and values.

mod draws;

use super::decoder::{Overlay, read_floats};
use super::forward::Packed;
use super::pool::Floats;
use super::prefix::DistinctRows;
use super::{Batch, Decoder};
use crate::backend::{Backend, In, Linear, LinearShape, Operator, Out, trace};
use crate::error::Result;
use crate::modules::{ModuleId, ModuleKind, ModuleSet, ParamId};
use draws::{NoiseDraw, Squares, draws, grouped, overlay, repeated, stage};
use std::collections::BTreeMap;
use std::ops::Range;

/// One perturbed copy of the model: a set of cells, all drawn from one seed, with a sign. No cells = the clean model.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// The perturbed cells.
    pub cells: ModuleSet,
    /// Seed of the draw.
    pub seed: u64,
    /// The antithetic twin: w − δ instead of w + δ.
    pub negative: bool,
}

/// The kind of perturbation, all at equal relative norm ‖δ‖ = epsilon·‖W‖ of each tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum NoiseKind {
    /// Independent normals.
    Gaussian,
    /// Independent signs.
    Rademacher,
    /// A product of normals of this rank.
    LowRank(usize),
    /// W·(1 ± epsilon).
    Scale,
    /// W = 0; epsilon and sign do not matter.
    Zero,
    /// Given directions; tensors without one stay as they are.
    Update(BTreeMap<ParamId, Vec<f32>>),
    /// The same with a norm of its own for each tensor: ‖δ‖ = factor·epsilon·‖W‖.
    Step(BTreeMap<ParamId, (f32, Vec<f32>)>),
}

/// Options of a sweep: the noise, and the outputs to read.
#[derive(Clone, Debug, PartialEq)]
pub struct SweepOptions {
    /// Kind of noise.
    pub kind: NoiseKind,
    /// Relative norm of the perturbation.
    pub epsilon: f32,
    /// Indices of the hidden states to read, from 0 (the embedding's output) to layers (after the final norm).
    pub layers: Vec<usize>,
    /// Token ids whose logits are read.
    pub head_rows: Vec<u32>,
    /// Bytes of working memory for the concatenated copies.
    pub budget_bytes: u64,
}

/// Outputs of one member at the last token of every prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Readout {
    /// For each of [`SweepOptions::layers`], in ascending order, [prompts, hidden].
    pub hidden: Vec<Vec<f32>>,
    /// [prompts, head_rows].
    pub logits: Vec<f32>,
}

/// The clean model's values inside one layer.
struct CleanLayer<'p, B: Backend> {
    normed: Floats<'p, B>,
    q: Floats<'p, B>,
    k: Floats<'p, B>,
    v: Floats<'p, B>,
    mixed: Floats<'p, B>,
    mid: Floats<'p, B>,
    mlp_normed: Floats<'p, B>,
    gate: Floats<'p, B>,
    up: Floats<'p, B>,
}

/// Inputs of a sweep: the prompts, on host and backend, and the options.
struct SweepInputs<'p, B: Backend> {
    options: &'p SweepOptions,
    prompts: &'p Batch,
    distinct: Option<DistinctRows>,
    /// The tokens that are computed.
    tokens: Vec<u32>,
    /// The last row of each prompt.
    rows: Vec<u32>,
    packed: Packed<'p, B>,
    squares: Squares<B>,
}

/// Members that run concatenated.
struct Piece<'p, B: Backend> {
    members: Range<usize>,
    prompts: Batch,
    /// For several members; a single one uses the prompts' own.
    packed: Option<Packed<'p, B>>,
}

impl<B: Backend> Decoder<B> {
    /// Runs every member over the prompts, and calls `sink(index, readout)` for each, in the order of the lowest layer
    /// that members perturb.
    ///
    /// # Errors
    /// Those of `sink`; [`crate::error::Error::Input`] where the prompts do not fit the model;
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    pub fn sweep(
        &self,
        prompts: &Batch,
        members: &[Member],
        options: &SweepOptions,
        sink: &mut dyn FnMut(usize, Readout) -> Result<()>,
    ) -> Result<()> {
        let _span = trace::phase("sweep");
        let none = Overlay::new();
        let layers = self.config.layers;
        let distinct = DistinctRows::of(prompts);
        let packed = self.pack_distinct(prompts, distinct.clone())?;
        let tokens = packed.select(&prompts.tokens).into_owned();
        let inputs = SweepInputs {
            options,
            prompts,
            distinct,
            tokens,
            rows: prompts.last_rows(),
            packed,
            squares: Squares::new(self),
        };
        let mut stages: BTreeMap<usize, Vec<NoiseDraw<'_>>> = BTreeMap::new();
        for draw in draws(members) {
            stages
                .entry(draw.cells.iter().map(|c| stage(c, layers)).min().unwrap_or(layers + 1))
                .or_default()
                .push(draw);
        }
        // Stage 0 is the embedding, stage l + 1 is layer l, stage layers + 1 what comes after the last layer.
        let mut clean = Readout::default();
        let mut x = self.embed(&none, &inputs.tokens)?;
        if let Some(draws) = stages.remove(&0) {
            for draw in &draws {
                let perturbed = self.perturbed(draw, |id| id == ParamId::Embedding, &inputs)?;
                let mut members = self.floats(draw.members.len() * x.view().len())?;
                for (i, p) in perturbed.iter().enumerate() {
                    let own = self.embed(&overlay(p), &inputs.tokens)?;
                    let n = x.view().len();
                    self.backend.copy(own.view(), members.range_mut(i * n..(i + 1) * n))?;
                }
                let readouts = vec![Readout::default(); draw.members.len()];
                self.finish_members(std::slice::from_ref(draw), members, 0, readouts, &inputs, sink)?;
            }
        }
        for layer in 0..layers {
            self.tap(&x, 1, layer, &inputs, std::slice::from_mut(&mut clean))?;
            let draws = stages.remove(&(layer + 1)).unwrap_or_default();
            if layer + 1 == layers {
                for draw in draws {
                    self.last_layer_members(&draw, &x, &clean, &inputs, sink)?;
                }
                let rows = &inputs.rows;
                x = self.layer_forward_rows(&none, layer, x.view(), &inputs.packed, prompts, rows)?.0;
                break;
            }
            if draws.is_empty() {
                let mut out = self.floats(x.view().len())?;
                self.layer_output(&none, layer, x.view(), &inputs.packed, out.view_mut())?;
                x = out;
                continue;
            }
            let (shared, out) = self.clean_layer(layer, &x, &inputs.packed)?;
            for group in grouped(draws, self.members_at_once(&inputs)) {
                let count: usize = group.iter().map(|d| d.members.len()).sum();
                let n = x.view().len();
                let mut members = self.floats(count * n)?;
                let mut at = 0;
                for draw in &group {
                    for perturbed in self.perturbed(draw, |id| id.layer() == Some(layer), &inputs)? {
                        let into = members.range_mut(at * n..(at + 1) * n);
                        self.perturbed_layer(layer, x.view(), &shared, &overlay(&perturbed), &inputs.packed, into)?;
                        at += 1;
                    }
                }
                let readouts = vec![clean.clone(); count];
                self.finish_members(&group, members, layer + 1, readouts, &inputs, sink)?;
            }
            x = out;
        }
        for draw in stages.remove(&(layers + 1)).unwrap_or_default() {
            for (perturbed, (member, _)) in self.perturbed(&draw, |_| true, &inputs)?.iter().zip(&draw.members) {
                let mut readout = clean.clone();
                self.read_head(&overlay(perturbed), x.view(), &inputs, &mut readout)?;
                sink(*member, readout)?;
            }
        }
        Ok(())
    }

    /// Members of a draw whose lowest perturbed layer is the last: only keys and values are computed for all tokens.
    fn last_layer_members(
        &self,
        draw: &NoiseDraw<'_>,
        x: &Floats<'_, B>,
        clean: &Readout,
        inputs: &SweepInputs<'_, B>,
        sink: &mut dyn FnMut(usize, Readout) -> Result<()>,
    ) -> Result<()> {
        let layer = self.config.layers - 1;
        for (perturbed, (member, _)) in self.perturbed(draw, |_| true, inputs)?.iter().zip(&draw.members) {
            let overlay = overlay(perturbed);
            let (packed, rows) = (&inputs.packed, &inputs.rows);
            let out = self.layer_forward_rows(&overlay, layer, x.view(), packed, inputs.prompts, rows)?.0;
            let mut readout = clean.clone();
            self.read_head(&overlay, out.view(), inputs, &mut readout)?;
            sink(*member, readout)?;
        }
        Ok(())
    }

    /// Runs concatenated members from layer `from` to the end. `x` holds the inputs of that layer, [members·tokens,
    /// hidden].
    fn finish_members<'a>(
        &'a self,
        group: &[NoiseDraw<'_>],
        mut x: Floats<'a, B>,
        from: usize,
        mut readouts: Vec<Readout>,
        inputs: &SweepInputs<'_, B>,
        sink: &mut dyn FnMut(usize, Readout) -> Result<()>,
    ) -> Result<()> {
        let none = Overlay::new();
        let (layers, hidden, count) = (self.config.layers, self.config.hidden, readouts.len());
        let tokens = inputs.packed.tokens;
        let own = |members: &Range<usize>, width: usize| members.start * width..members.end * width;
        let pieces = self.member_pieces(count, inputs)?;
        let mut last = None;
        for layer in from..layers {
            self.tap(&x, count, layer, inputs, &mut readouts)?;
            let touched = group.iter().any(|d| d.cells.iter().any(|c| c.layer() == Some(layer)));
            let is_last = layer + 1 == layers;
            let width = if is_last { inputs.rows.len() * hidden } else { tokens * hidden };
            let mut out = self.floats(count * width)?;
            if touched {
                let mut at = 0;
                for draw in group {
                    for perturbed in self.perturbed(draw, |id| id.layer() == Some(layer), inputs)? {
                        let member = at..at + 1;
                        let (x, out) = (x.range(own(&member, tokens * hidden)), out.range_mut(own(&member, width)));
                        self.member_layer(&overlay(&perturbed), layer, x, &inputs.packed, inputs.prompts, out)?;
                        at += 1;
                    }
                }
            } else {
                for piece in &pieces {
                    let (x, out) =
                        (x.range(own(&piece.members, tokens * hidden)), out.range_mut(own(&piece.members, width)));
                    let packed = piece.packed.as_ref().unwrap_or(&inputs.packed);
                    self.member_layer(&none, layer, x, packed, &piece.prompts, out)?;
                }
            }
            if is_last {
                last = Some(out);
            } else {
                x = out;
            }
        }
        let Some(last) = last else { return Ok(()) };
        let width = inputs.rows.len() * hidden;
        let mut at = 0;
        for draw in group {
            let after = |id: ParamId| matches!(id, ParamId::FinalNorm | ParamId::Head | ParamId::Embedding);
            for (perturbed, (member, _)) in self.perturbed(draw, after, inputs)?.iter().zip(&draw.members) {
                let mut readout = std::mem::take(&mut readouts[at]);
                let rows = last.range(at * width..(at + 1) * width);
                self.read_head(&overlay(perturbed), rows, inputs, &mut readout)?;
                sink(*member, readout)?;
                at += 1;
            }
        }
        Ok(())
    }

    /// Members through one layer with the same weights; of the last layer only the last tokens.
    fn member_layer<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
        packed: &Packed<'_, B>,
        prompts: &Batch,
        out: Out<'_, B>,
    ) -> Result<()> {
        if layer + 1 == self.config.layers {
            let rows = self.layer_forward_rows(overlay, layer, x, packed, prompts, &prompts.last_rows())?.0;
            return self.backend.copy(rows.view(), out);
        }
        self.layer_output(overlay, layer, x, packed, out)
    }

    /// Members cut into pieces that are large enough for the backend.
    fn member_pieces<'a>(&'a self, count: usize, inputs: &SweepInputs<'_, B>) -> Result<Vec<Piece<'a, B>>> {
        let most = self.backend.saturating_rows().div_ceil(inputs.packed.tokens).min(count);
        (0..count)
            .step_by(most)
            .map(|first| {
                let members = first..(first + most).min(count);
                let prompts = repeated(inputs.prompts, members.len());
                let packed = match members.len() {
                    1 => None,
                    n => Some(
                        self.pack_distinct(&prompts, inputs.distinct.as_ref().map(|distinct| distinct.repeated(n)))?,
                    ),
                };
                Ok(Piece { members, prompts, packed })
            })
            .collect()
    }

    fn clean_layer<'a>(
        &'a self,
        layer: usize,
        x: &Floats<'a, B>,
        packed: &Packed<'_, B>,
    ) -> Result<(CleanLayer<'a, B>, Floats<'a, B>)> {
        let _span = trace::layer(layer);
        let none = Overlay::new();
        let (normed, _) = self.norm(&none, ParamId::InputNorm(layer), x.view())?;
        let attention = self.attention_half(&none, layer, x.view(), packed)?;
        let mid = self.output_projection(&none, layer, attention.mixed.view(), x.view())?;
        let (mlp_normed, _) = self.norm(&none, ParamId::PostAttentionNorm(layer), mid.view())?;
        let mut out = self.floats(x.view().len())?;
        let mlp = self.mlp_half(&none, layer, mid.view(), out.view_mut())?;
        let (q, k, v, mixed) = (attention.q, attention.k, attention.v, attention.mixed);
        Ok((CleanLayer { normed, q, k, v, mixed, mid, mlp_normed, gate: mlp.gate, up: mlp.up }, out))
    }

    /// The layer's output with some of its tensors perturbed; what they do not reach is taken from the clean run.
    fn perturbed_layer<'a>(
        &'a self,
        layer: usize,
        x: In<'_, B>,
        clean: &CleanLayer<'_, B>,
        overlay: &Overlay<'a, B>,
        packed: &Packed<'_, B>,
        out: Out<'_, B>,
    ) -> Result<()> {
        let _span = trace::layer(layer);
        let (tokens, c) = (packed.tokens, &self.config);
        let module = |kind| ModuleId { layer, kind };
        let touched = |id: ParamId| overlay.contains_key(&id);
        let any = |kind: ModuleKind| touched(ParamId::Weight(module(kind))) || touched(ParamId::Bias(module(kind)));

        let normed = match touched(ParamId::InputNorm(layer)) {
            true => Some(self.norm(overlay, ParamId::InputNorm(layer), x.clone())?.0),
            false => None,
        };
        let attention_in = || normed.as_ref().unwrap_or(&clean.normed).view();
        let rotated = |kind, norm: ParamId| -> Result<Option<Floats<'a, B>>> {
            if normed.is_none() && !any(kind) && !touched(norm) {
                return Ok(None);
            }
            let mut y = self.floats(tokens * c.module_shape(kind).0)?;
            let (at, rope) = (packed.positions.view(), packed.rope.view());
            self.project_rotated(overlay, module(kind), attention_in(), y.view_mut(), at, rope)?;
            Ok(Some(y))
        };
        let projected = |kind, x: In<'_, B>, changed: bool| -> Result<Option<Floats<'a, B>>> {
            if !changed && !any(kind) {
                return Ok(None);
            }
            let mut y = self.floats(tokens * c.module_shape(kind).0)?;
            self.project(overlay, module(kind), x, y.view_mut(), tokens, None)?;
            Ok(Some(y))
        };
        let q = rotated(ModuleKind::Q, ParamId::QNorm(layer))?;
        let k = rotated(ModuleKind::K, ParamId::KNorm(layer))?;
        let v = projected(ModuleKind::V, attention_in(), normed.is_some())?;
        let mixed = if q.is_some() || k.is_some() || v.is_some() {
            let (q, k, v) =
                (q.as_ref().unwrap_or(&clean.q), k.as_ref().unwrap_or(&clean.k), v.as_ref().unwrap_or(&clean.v));
            Some(self.mix(layer, [q.view(), k.view(), v.view()], packed, None)?)
        } else {
            None
        };
        let mid = if mixed.is_some() || any(ModuleKind::O) {
            let mixed = mixed.as_ref().unwrap_or(&clean.mixed).view();
            Some(self.output_projection(overlay, layer, mixed, x)?)
        } else {
            None
        };
        let mlp_normed = if mid.is_some() || touched(ParamId::PostAttentionNorm(layer)) {
            let mid = mid.as_ref().unwrap_or(&clean.mid).view();
            Some(self.norm(overlay, ParamId::PostAttentionNorm(layer), mid)?.0)
        } else {
            None
        };
        let gated = match &mlp_normed {
            Some(normed) => self.gated(overlay, layer, normed.view())?,
            None => None,
        };
        let product = if let Some(product) = gated {
            product
        } else if let Some(normed) = &mlp_normed {
            let [gate, up] = self.gate_and_up(overlay, layer, normed.view())?;
            self.swiglu(&gate, &up)?
        } else {
            let changed = |kind| projected(kind, clean.mlp_normed.view(), false);
            let (gate, up) = (changed(ModuleKind::Gate)?, changed(ModuleKind::Up)?);
            self.swiglu(gate.as_ref().unwrap_or(&clean.gate), up.as_ref().unwrap_or(&clean.up))?
        };
        let mid = mid.as_ref().unwrap_or(&clean.mid).view();
        self.project(overlay, module(ModuleKind::Down), product.view(), out, tokens, Some(mid))
    }

    /// Reads the last tokens' hidden states at index `layer`, if selected.
    fn tap(
        &self,
        x: &Floats<'_, B>,
        count: usize,
        layer: usize,
        inputs: &SweepInputs<'_, B>,
        readouts: &mut [Readout],
    ) -> Result<()> {
        if !inputs.options.layers.contains(&layer) {
            return Ok(());
        }
        let (hidden, tokens) = (self.config.hidden, inputs.packed.tokens as u32);
        let computed = inputs.packed.computed(&inputs.rows);
        let rows: Vec<u32> = (0..count as u32).flat_map(|m| computed.iter().map(move |r| m * tokens + r)).collect();
        let rows = self.indices(&rows)?;
        let width = inputs.rows.len() * hidden;
        let mut tapped = self.floats(count * width)?;
        self.gather(x.view(), rows.view(), tapped.view_mut())?;
        let host = read_floats(&self.backend, tapped.view())?;
        for (readout, own) in readouts.iter_mut().zip(host.chunks_exact(width)) {
            readout.hidden.push(own.to_vec());
        }
        Ok(())
    }

    /// Final norm and the selected rows of the head. `rows`: the last tokens after the last layer, [prompts, hidden].
    fn read_head<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        rows: In<'_, B>,
        inputs: &SweepInputs<'_, B>,
        readout: &mut Readout,
    ) -> Result<()> {
        let (hidden, options) = (self.config.hidden, inputs.options);
        let prompts = rows.len() / hidden;
        let (normed, _) = self.norm(overlay, ParamId::FinalNorm, rows)?;
        if options.layers.contains(&self.config.layers) {
            readout.hidden.push(read_floats(&self.backend, normed.view())?);
        }
        if !options.head_rows.is_empty() {
            let outputs = options.head_rows.len();
            let chosen = self.indices(&options.head_rows)?;
            let mut head = self.floats(outputs * hidden)?;
            let all = self.values(overlay, self.head());
            self.gather(all, chosen.view(), head.view_mut())?;
            let mut logits = self.floats(prompts * outputs)?;
            let shape = LinearShape { tokens: prompts, inputs: hidden, outputs };
            Linear::new(normed.view(), head.view(), logits.view_mut(), shape).run(&self.backend)?;
            readout.logits = read_floats(&self.backend, logits.view())?;
        }
        Ok(())
    }

    /// Members that run concatenated within the budget.
    fn members_at_once(&self, inputs: &SweepInputs<'_, B>) -> usize {
        let c = &self.config;
        let heads = 2 * c.q_width() + 2 * c.kv_width();
        let expanded = if inputs.distinct.is_some() { inputs.packed.rows() * heads } else { 0 };
        let elements = inputs.packed.tokens * (5 * c.hidden + heads + 3 * c.ffn) + expanded;
        let bytes = elements * size_of::<B::Float>();
        (inputs.options.budget_bytes as usize / bytes.max(1)).max(2)
    }
}
