//! The forward pass: one layer at a time over a packed batch.

mod projections;

use super::decoder::Overlay;
use super::pool::{Floats, Scratch};
use super::prefix::{Deduplicated, DistinctRows};
use super::{Batch, Decoder};
use crate::backend::{
    Attention, AttentionDecode, AttentionShape, Backend, Buffer, DecodeSpans, Documents, GatedLinear, GatherRows, In,
    Linear, LinearShape, Operator, Out, RmsNorm, SwiGlu, View, ViewMut, trace,
};
use crate::error::Result;
use crate::modules::{ModuleId, ModuleKind, ParamId};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

pub(super) use projections::Unnormed;

/// A batch on the backend.
pub(super) struct Packed<'p, B: Backend> {
    /// Rows that are computed: all, or where prefixes are shared the distinct ones.
    pub(super) tokens: usize,
    pub(super) dedup: Option<Deduplicated<'p, B>>,
    pub(super) documents: Documents<B>,
    pub(super) positions: Scratch<'p, B, u32>,
    pub(super) rope: Arc<Buffer<B, f32>>,
}

/// Activations of a layer's attention half.
pub(super) struct AttentionActivations<'p, B: Backend> {
    pub(super) rstd: Scratch<'p, B, f32>,
    pub(super) q_unnormed: Option<Unnormed<'p, B>>,
    pub(super) k_unnormed: Option<Unnormed<'p, B>>,
    pub(super) q: Floats<'p, B>,
    pub(super) k: Floats<'p, B>,
    pub(super) v: Floats<'p, B>,
    pub(super) mixed: Floats<'p, B>,
    pub(super) lse: Scratch<'p, B, f32>,
}

/// Activations of a layer's MLP half.
pub(super) struct MlpActivations<'p, B: Backend> {
    pub(super) rstd: Scratch<'p, B, f32>,
    pub(super) gate: Floats<'p, B>,
    pub(super) up: Floats<'p, B>,
}

/// Everything that the backward pass of a layer needs; normed inputs and the MLP's product are computed again.
pub(super) struct LayerActivations<'p, B: Backend> {
    pub(super) x: Floats<'p, B>,
    pub(super) attention: AttentionActivations<'p, B>,
    pub(super) mid: Floats<'p, B>,
    pub(super) mlp: MlpActivations<'p, B>,
}

impl<B: Backend> Packed<'_, B> {
    /// Rows of the batch.
    pub(super) fn rows(&self) -> usize {
        self.dedup.as_ref().map_or(self.tokens, |dedup| dedup.distinct.index.len())
    }

    /// The values of the computed rows, from one per row of the batch.
    pub(super) fn select<'v>(&self, values: &'v [u32]) -> Cow<'v, [u32]> {
        match &self.dedup {
            Some(dedup) => dedup.distinct.select(values).into(),
            None => values.into(),
        }
    }

    /// Which computed rows are those rows of the batch.
    pub(super) fn computed(&self, rows: &[u32]) -> Vec<u32> {
        match &self.dedup {
            Some(dedup) => rows.iter().map(|r| dedup.distinct.index[*r as usize]).collect(),
            None => rows.to_vec(),
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// With `distinct`, activations hold the distinct rows.
    pub(super) fn pack_distinct(&self, batch: &Batch, distinct: Option<DistinctRows>) -> Result<Packed<'_, B>> {
        self.check(batch)?;
        let longest = batch.positions.iter().max().map_or(1, |p| *p as usize + 1);
        let positions = match &distinct {
            Some(distinct) => self.indices(&distinct.select(&batch.positions))?,
            None => self.indices(&batch.positions)?,
        };
        Ok(Packed {
            tokens: positions.view().len(),
            documents: self.documents(&batch.starts)?,
            positions,
            rope: self.rope(longest)?,
            dedup: distinct.map(|distinct| self.deduplicated(distinct)).transpose()?,
        })
    }

    pub(super) fn embed<'a>(&'a self, overlay: &Overlay<'a, B>, tokens: &[u32]) -> Result<Floats<'a, B>> {
        let rows = self.indices(tokens)?;
        self.embed_rows(overlay, rows.view())
    }

    /// [`Decoder::embed`] of tokens that are on the backend.
    pub(super) fn embed_rows<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        tokens: View<'_, B, u32>,
    ) -> Result<Floats<'a, B>> {
        let mut x = self.floats(tokens.len() * self.config.hidden)?;
        self.gather(self.values(overlay, ParamId::Embedding), tokens, x.view_mut())?;
        Ok(x)
    }

    /// to\[i\] = from[rows\[i\]], rows of the hidden size.
    pub(super) fn gather(&self, from: In<'_, B>, rows: View<'_, B, u32>, to: Out<'_, B>) -> Result<()> {
        GatherRows { from, rows, to, width: self.config.hidden }.run(&self.backend)
    }

    pub(super) fn attention_shape(&self, layer: usize) -> AttentionShape {
        AttentionShape {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            window: self.config.windows.get(layer).copied().flatten(),
        }
    }

    pub(super) fn norm<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        id: ParamId,
        x: In<'_, B>,
    ) -> Result<(Floats<'a, B>, Scratch<'a, B, f32>)> {
        let mut rstd = self.stats(x.len() / self.config.hidden)?;
        let mut y = self.floats(x.len())?;
        let (weight, eps) = (self.values(overlay, id), self.config.rms_norm_eps);
        RmsNorm { x, weight, y: y.view_mut(), rstd: Some(rstd.view_mut()), eps }.run(&self.backend)?;
        Ok((y, rstd))
    }

    pub(super) fn attention_half<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
        packed: &Packed<'_, B>,
    ) -> Result<AttentionActivations<'a, B>> {
        let (tokens, c) = (packed.tokens, &self.config);
        let (normed, rstd) = self.norm(overlay, ParamId::InputNorm(layer), x)?;
        let mut q = self.floats(tokens * c.q_width())?;
        let mut k = self.floats(tokens * c.kv_width())?;
        let mut v = self.floats(tokens * c.kv_width())?;
        let outs = [q.view_mut(), k.view_mut(), v.view_mut()];
        let (at, rope) = (packed.positions.view(), packed.rope.view());
        let [q_unnormed, k_unnormed] = self.project_qkv(overlay, layer, normed.view(), outs, at, rope)?;
        drop(normed);
        let mut lse = self.stats(packed.rows() * c.heads)?;
        let mixed = self.mix(layer, [q.view(), k.view(), v.view()], packed, Some(lse.view_mut()))?;
        Ok(AttentionActivations { rstd, q_unnormed, k_unnormed, q, k, v, mixed, lse })
    }

    /// Attention of q, k and v; `lse` is over all rows.
    pub(super) fn mix<'a>(
        &'a self,
        layer: usize,
        [q, k, v]: [In<'_, B>; 3],
        packed: &Packed<'_, B>,
        lse: Option<ViewMut<'_, B, f32>>,
    ) -> Result<Floats<'a, B>> {
        let (shape, documents) = (self.attention_shape(layer), &packed.documents);
        let mut mixed = self.floats(packed.rows() * self.config.q_width())?;
        let Some(dedup) = &packed.dedup else {
            Attention { q, k, v, o: mixed.view_mut(), lse, shape, documents }.run(&self.backend)?;
            return Ok(mixed);
        };
        let (q, k, v) = (dedup.expand(self, q)?, dedup.expand(self, k)?, dedup.expand(self, v)?);
        let (q, k, v, o) = (q.view(), k.view(), v.view(), mixed.view_mut());
        Attention { q, k, v, o, lse, shape, documents }.run(&self.backend)?;
        dedup.compact(self, mixed.view())
    }

    /// `mid` = `x` + o_proj(`mixed`).
    pub(super) fn output_projection<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        mixed: In<'_, B>,
        x: In<'_, B>,
    ) -> Result<Floats<'a, B>> {
        let tokens = x.len() / self.config.hidden;
        let mut mid = self.floats(x.len())?;
        let id = ModuleId { layer, kind: ModuleKind::O };
        self.project(overlay, id, mixed, mid.view_mut(), tokens, Some(x))?;
        Ok(mid)
    }

    /// `out` = `mid` + down_proj(silu(gate_proj(norm(mid))) · up_proj(norm(mid))).
    pub(super) fn mlp_half<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        mid: In<'_, B>,
        out: Out<'_, B>,
    ) -> Result<MlpActivations<'a, B>> {
        let tokens = mid.len() / self.config.hidden;
        let (normed, rstd) = self.norm(overlay, ParamId::PostAttentionNorm(layer), mid.clone())?;
        let [gate, up] = self.gate_and_up(overlay, layer, normed.view())?;
        drop(normed);
        let product = self.swiglu(&gate, &up)?;
        let down = ModuleId { layer, kind: ModuleKind::Down };
        self.project(overlay, down, product.view(), out, tokens, Some(mid))?;
        Ok(MlpActivations { rstd, gate, up })
    }

    /// [`Decoder::mlp_half`] that keeps nothing.
    pub(super) fn mlp_output<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        mid: In<'_, B>,
        out: Out<'_, B>,
    ) -> Result<()> {
        let tokens = mid.len() / self.config.hidden;
        let (normed, _) = self.norm(overlay, ParamId::PostAttentionNorm(layer), mid.clone())?;
        let product = match self.gated(overlay, layer, normed.view())? {
            Some(product) => product,
            None => {
                let [gate, up] = self.gate_and_up(overlay, layer, normed.view())?;
                drop(normed);
                self.swiglu(&gate, &up)?
            }
        };
        let down = ModuleId { layer, kind: ModuleKind::Down };
        self.project(overlay, down, product.view(), out, tokens, Some(mid))
    }

    /// gate_proj(x) and up_proj(x).
    pub(super) fn gate_and_up<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
    ) -> Result<[Floats<'a, B>; 2]> {
        let len = x.len() / self.config.hidden * self.config.ffn;
        let [mut gate, mut up] = [self.floats(len)?, self.floats(len)?];
        let outs = [(ModuleKind::Gate, gate.view_mut()), (ModuleKind::Up, up.view_mut())];
        self.project_each(overlay, layer, x, outs)?;
        Ok([gate, up])
    }

    /// silu(gate) · up.
    pub(super) fn swiglu(&self, gate: &Floats<'_, B>, up: &Floats<'_, B>) -> Result<Floats<'_, B>> {
        let mut product = self.floats(gate.view().len())?;
        SwiGlu { gate: gate.view(), up: up.view(), y: product.view_mut() }.run(&self.backend)?;
        Ok(product)
    }

    /// silu(gate_proj(x)) · up_proj(x) where the backend needs no gate and up in memory for it: bare weights.
    pub(super) fn gated<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
    ) -> Result<Option<Floats<'a, B>>> {
        let modules = [ModuleKind::Gate, ModuleKind::Up].map(|kind| ModuleId { layer, kind });
        let mut more = modules.iter().flat_map(|id| [ParamId::Bias(*id), ParamId::LoraA(*id)]);
        if more.any(|id| self.index.contains_key(&id)) {
            return Ok(None);
        }
        let tokens = x.len() / self.config.hidden;
        let mut product = self.floats(tokens * self.config.ffn)?;
        let [gate, up] = modules.map(|id| self.values(overlay, ParamId::Weight(id)));
        let done = GatedLinear { x, gate, up, y: product.view_mut(), tokens }.run(&self.backend)?;
        Ok(done.then_some(product))
    }

    /// A whole layer and its activations; dropping them frees their memory for the next layer.
    pub(super) fn layer_forward<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: Floats<'a, B>,
        packed: &Packed<'_, B>,
    ) -> Result<(LayerActivations<'a, B>, Floats<'a, B>)> {
        let _span = trace::layer(layer);
        let attention = self.attention_half(overlay, layer, x.view(), packed)?;
        let mid = self.output_projection(overlay, layer, attention.mixed.view(), x.view())?;
        let mut out = self.floats(packed.tokens * self.config.hidden)?;
        let mlp = self.mlp_half(overlay, layer, mid.view(), out.view_mut())?;
        Ok((LayerActivations { x, attention, mid, mlp }, out))
    }

    /// [`Decoder::layer_forward`] that keeps only the attention half.
    pub(super) fn layer_attention<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: Floats<'a, B>,
        packed: &Packed<'_, B>,
    ) -> Result<(AttentionActivations<'a, B>, Floats<'a, B>)> {
        let _span = trace::layer(layer);
        let attention = self.attention_half(overlay, layer, x.view(), packed)?;
        let mid = self.output_projection(overlay, layer, attention.mixed.view(), x.view())?;
        drop(x);
        let mut out = self.floats(packed.tokens * self.config.hidden)?;
        self.mlp_output(overlay, layer, mid.view(), out.view_mut())?;
        Ok((attention, out))
    }

    /// The output of a layer with nothing kept; the MLP runs in pieces.
    pub(super) fn layer_output<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
        packed: &Packed<'_, B>,
        mut out: Out<'_, B>,
    ) -> Result<()> {
        let _span = trace::layer(layer);
        let mixed = self.attention_half(overlay, layer, x.clone(), packed)?.mixed;
        let (hidden, q_width) = (self.config.hidden, self.config.q_width());
        for piece in self.pieces(packed.tokens) {
            let [own, mixed_own] = [hidden, q_width].map(|width| piece.start * width..piece.end * width);
            let mid = self.output_projection(overlay, layer, mixed.range(mixed_own), x.part(own.clone()))?;
            self.mlp_output(overlay, layer, mid.view(), out.part(own))?;
        }
        Ok(())
    }

    /// Rows in pieces as equal as may be, none longer than [`Backend::saturating_rows`].
    pub(super) fn pieces(&self, tokens: usize) -> impl Iterator<Item = Range<usize>> + use<B> {
        let count = tokens.div_ceil(self.backend.saturating_rows()).max(1);
        (0..count).map(move |i| i * tokens / count..(i + 1) * tokens / count)
    }

    /// A layer whose output is needed only at `rows` of the batch: keys and values are computed for all tokens,
    /// everything else for `rows`. Returns the output [rows, hidden], keys and values.
    pub(super) fn layer_forward_rows<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
        packed: &Packed<'_, B>,
        batch: &Batch,
        rows: &[u32],
    ) -> Result<(Floats<'a, B>, Floats<'a, B>, Floats<'a, B>)> {
        let _span = trace::layer(layer);
        let c = &self.config;
        let module = |kind| ModuleId { layer, kind };
        let (normed, _) = self.norm(overlay, ParamId::InputNorm(layer), x.clone())?;
        let mut k = self.floats(packed.tokens * c.kv_width())?;
        let mut v = self.floats(packed.tokens * c.kv_width())?;
        let rope = || packed.rope.view();
        let all = packed.positions.view();
        self.project_rotated(overlay, module(ModuleKind::K), normed.view(), k.view_mut(), all, rope())?;
        self.project(overlay, module(ModuleKind::V), normed.view(), v.view_mut(), packed.tokens, None)?;

        let (k, v) = match &packed.dedup {
            Some(dedup) => (dedup.expand(self, k.view())?, dedup.expand(self, v.view())?),
            None => (k, v),
        };
        let chosen = self.indices(&packed.computed(rows))?;
        let mut x_rows = self.floats(rows.len() * c.hidden)?;
        let mut normed_rows = self.floats(rows.len() * c.hidden)?;
        self.gather(x, chosen.view(), x_rows.view_mut())?;
        self.gather(normed.view(), chosen.view(), normed_rows.view_mut())?;
        let positions: Vec<u32> = rows.iter().map(|r| batch.positions[*r as usize]).collect();
        let at = self.indices(&positions)?;
        let mut q = self.floats(rows.len() * c.q_width())?;
        self.project_rotated(overlay, module(ModuleKind::Q), normed_rows.view(), q.view_mut(), at.view(), rope())?;
        let spans: Vec<u32> = rows
            .iter()
            .flat_map(|r| {
                let start = batch.starts[batch.starts.partition_point(|s| s <= r) - 1];
                [start, r + 1 - start]
            })
            .collect();
        let on_device = self.indices(&spans)?;
        let spans = DecodeSpans { host: &spans, device: on_device.view() };
        let mut mixed = self.floats(rows.len() * c.q_width())?;
        let (q, o, shape) = (q.view(), mixed.view_mut(), self.attention_shape(layer));
        AttentionDecode { q, k: k.view(), v: v.view(), o, spans, shape }.run(&self.backend)?;
        let mid = self.output_projection(overlay, layer, mixed.view(), x_rows.view())?;
        let mut out = self.floats(rows.len() * c.hidden)?;
        self.mlp_output(overlay, layer, mid.view(), out.view_mut())?;
        Ok((out, k, v))
    }

    /// Logits [rows, vocab] of normed rows, into scratch.
    pub(super) fn head_logits<'a>(&'a self, overlay: &Overlay<'a, B>, normed: In<'_, B>) -> Result<Floats<'a, B>> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab);
        let tokens = normed.len() / hidden;
        let mut logits = self.floats(tokens * vocab)?;
        let shape = LinearShape { tokens, inputs: hidden, outputs: vocab };
        let head = self.values(overlay, self.head());
        Linear::new(normed, head, logits.view_mut(), shape).run(&self.backend)?;
        Ok(logits)
    }
}
