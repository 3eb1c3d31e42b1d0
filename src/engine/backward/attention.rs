//! Backward through the attention half of a layer.

use crate::backend::{AttentionBackward, Backend, Operator, Rope};
use crate::engine::forward::{AttentionActivations, Packed, Unnormed};
use crate::engine::pool::{Floats, Stats};
use crate::engine::{Decoder, Gradients};
use crate::error::Result;
use crate::modules::{ModuleId, ModuleKind, ParamId};

impl<B: Backend> Decoder<B> {
    /// Backward from the attention half's output to the outputs of q_proj, k_proj and v_proj. Returns their gradients,
    /// and rstd of the half's norm.
    pub(super) fn attention_half_backward<'a>(
        &'a self,
        layer: usize,
        saved: AttentionActivations<'a, B>,
        dx: &Floats<'_, B>,
        packed: &Packed<'_, B>,
        gradients: &mut Gradients<B>,
    ) -> Result<([Floats<'a, B>; 3], Stats<'a, B>)> {
        let (tokens, c) = (packed.tokens, &self.config);
        let o_proj = ModuleId { layer, kind: ModuleKind::O };
        let mut dmixed = self.floats(tokens * c.q_width())?;
        self.module_input_gradient(o_proj, dx.view(), dmixed.view_mut(), 0)?;
        let [mut dq, mut dk, dv] = self.mix_backward(layer, &saved, dmixed, packed)?;
        for x in [dq.view_mut(), dk.view_mut()] {
            let (table, positions) = (packed.rope.view(), packed.positions.view());
            Rope { x, table, positions, head_dim: c.head_dim, inverse: true }.run(&self.backend)?;
        }
        self.head_norm_backward(ParamId::QNorm(layer), saved.q_unnormed, &mut dq, gradients)?;
        self.head_norm_backward(ParamId::KNorm(layer), saved.k_unnormed, &mut dk, gradients)?;
        Ok(([dq, dk, dv], saved.rstd))
    }

    /// Gradients of q, k and v from that of [`Decoder::mix`]'s output.
    fn mix_backward<'a>(
        &'a self,
        layer: usize,
        AttentionActivations { q, k, v, mixed, lse, .. }: &AttentionActivations<'_, B>,
        dmixed: Floats<'a, B>,
        packed: &Packed<'_, B>,
    ) -> Result<[Floats<'a, B>; 3]> {
        let (rows, c) = (packed.rows(), &self.config);
        let mut dq = self.floats(rows * c.q_width())?;
        let mut dk = self.floats(rows * c.kv_width())?;
        let mut dv = self.floats(rows * c.kv_width())?;
        let mut run = |[q, k, v, o, d_o]: [&Floats<'_, B>; 5]| {
            AttentionBackward {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                o: o.view(),
                lse: lse.view(),
                d_o: d_o.view(),
                dq: dq.view_mut(),
                dk: dk.view_mut(),
                dv: dv.view_mut(),
                shape: self.attention_shape(layer),
                documents: &packed.documents,
            }
            .run(&self.backend)
        };
        let Some(dedup) = &packed.dedup else {
            run([q, k, v, mixed, &dmixed])?;
            return Ok([dq, dk, dv]);
        };
        // What is above has read the first of equal rows of the output; keys and values were read in every document.
        let d_o = dedup.spread(self, dmixed.view())?;
        drop(dmixed);
        let [q, k, v, mixed] = [q, k, v, mixed].map(|x| dedup.expand(self, x.view()));
        run([&q?, &k?, &v?, &mixed?, &d_o])?;
        drop(d_o);
        Ok([dedup.compact(self, dq.view())?, dedup.sum(self, dk.view())?, dedup.sum(self, dv.view())?])
    }

    /// Through the per-head norm of q or k, where the model has one: `dy` becomes the gradient before it.
    fn head_norm_backward<'a>(
        &'a self,
        norm: ParamId,
        unnormed: Option<Unnormed<'_, B>>,
        dy: &mut Floats<'a, B>,
        gradients: &mut Gradients<B>,
    ) -> Result<()> {
        let Some(Unnormed { values, rstd }) = unnormed else { return Ok(()) };
        let mut before = self.floats(dy.view().len())?;
        let dx = Some(before.view_mut());
        self.norm_backward(norm, dy.view(), values.view(), rstd.view(), dx, gradients).run(&self.backend)?;
        *dy = before;
        Ok(())
    }
}
