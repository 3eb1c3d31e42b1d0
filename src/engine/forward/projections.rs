//! Projections: a linear layer with its bias and adapter; q and k with their norms and rotation.

use crate::backend::{
    Backend, Epilogue, In, Linear, LinearEach, LinearShape, Operator, Out, Projection, RmsNorm, Rope, View,
};
use crate::engine::Decoder;
use crate::engine::decoder::Overlay;
use crate::engine::pool::{Floats, Stats};
use crate::error::Result;
use crate::modules::{ModuleId, ModuleKind, ParamId};

/// q or k before its per-head norm.
pub(in crate::engine) struct Unnormed<'p, B: Backend> {
    pub(in crate::engine) values: Floats<'p, B>,
    pub(in crate::engine) rstd: Stats<'p, B>,
}

impl<B: Backend> Decoder<B> {
    pub(in crate::engine) fn shape_of(&self, kind: ModuleKind, tokens: usize) -> LinearShape {
        let (outputs, inputs) = self.config.module_shape(kind);
        LinearShape { tokens, inputs, outputs }
    }

    /// One projection, with its bias, its adapter and an addend.
    pub(in crate::engine) fn project<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        id: ModuleId,
        x: In<'_, B>,
        mut y: Out<'_, B>,
        tokens: usize,
        residual: Option<In<'_, B>>,
    ) -> Result<()> {
        let shape = self.shape_of(id.kind, tokens);
        let bias = self.values_if_any(overlay, ParamId::Bias(id));
        let epilogue = Epilogue { bias, residual, ..Epilogue::default() };
        let w = self.values(overlay, ParamId::Weight(id));
        Linear { epilogue, ..Linear::new(x.clone(), w, y.reborrow(), shape) }.run(&self.backend)?;
        self.lora_forward(id, x, y, shape)
    }

    /// Projections of one x: [tokens, hidden] into several modules of a layer.
    pub(in crate::engine) fn project_each<'a, const N: usize>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
        mut outs: [(ModuleKind, Out<'_, B>); N],
    ) -> Result<()> {
        let tokens = x.len() / self.config.hidden;
        let mut layers = outs.each_mut().map(|(kind, y)| {
            let id = ModuleId { layer, kind: *kind };
            let bias = self.values_if_any(overlay, ParamId::Bias(id));
            Projection { w: self.values(overlay, ParamId::Weight(id)), bias, y: y.reborrow() }
        });
        LinearEach { x: x.clone(), layers: &mut layers, tokens }.run(&self.backend)?;
        for (kind, y) in outs {
            self.lora_forward(ModuleId { layer, kind }, x.clone(), y, self.shape_of(kind, tokens))?;
        }
        Ok(())
    }

    /// q, k and v of a layer from its normed input: q and k normed per head where the model does, and rotated.
    /// Returns q and k as they were before their norms.
    pub(in crate::engine) fn project_qkv<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        layer: usize,
        x: In<'_, B>,
        [mut q, mut k, v]: [Out<'_, B>; 3],
        positions: View<'_, B, u32>,
        rope: View<'_, B, f32>,
    ) -> Result<[Option<Unnormed<'a, B>>; 2]> {
        let [q_id, k_id] = [ModuleKind::Q, ModuleKind::K].map(|kind| ModuleId { layer, kind });
        let mut unnormed = [self.unnormed(q_id, q.len())?, self.unnormed(k_id, k.len())?];
        let [q_to, k_to] = &mut unnormed;
        let outs = [
            (ModuleKind::Q, q_to.as_mut().map_or_else(|| q.reborrow(), |to| to.values.view_mut())),
            (ModuleKind::K, k_to.as_mut().map_or_else(|| k.reborrow(), |to| to.values.view_mut())),
            (ModuleKind::V, v),
        ];
        self.project_each(overlay, layer, x, outs)?;
        self.norm_and_rotate(overlay, q_id, q_to.as_mut(), q, positions.clone(), rope.clone())?;
        self.norm_and_rotate(overlay, k_id, k_to.as_mut(), k, positions, rope)?;
        Ok(unnormed)
    }

    /// q or k by itself, as in [`Decoder::project_qkv`].
    pub(in crate::engine) fn project_rotated<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        id: ModuleId,
        x: In<'_, B>,
        mut y: Out<'_, B>,
        positions: View<'_, B, u32>,
        rope: View<'_, B, f32>,
    ) -> Result<()> {
        let mut unnormed = self.unnormed(id, y.len())?;
        let to = unnormed.as_mut().map_or_else(|| y.reborrow(), |to| to.values.view_mut());
        self.project(overlay, id, x, to, positions.len(), None)?;
        self.norm_and_rotate(overlay, id, unnormed.as_mut(), y, positions, rope)
    }

    fn head_norm(id: ModuleId) -> ParamId {
        if id.kind == ModuleKind::Q { ParamId::QNorm(id.layer) } else { ParamId::KNorm(id.layer) }
    }

    /// Room for q or k before its norm, where the model has one.
    fn unnormed(&self, id: ModuleId, len: usize) -> Result<Option<Unnormed<'_, B>>> {
        if !self.index.contains_key(&Self::head_norm(id)) {
            return Ok(None);
        }
        Ok(Some(Unnormed { values: self.floats(len)?, rstd: self.stats(len / self.config.head_dim)? }))
    }

    fn norm_and_rotate<'a>(
        &'a self,
        overlay: &Overlay<'a, B>,
        id: ModuleId,
        unnormed: Option<&mut Unnormed<'_, B>>,
        mut y: Out<'_, B>,
        positions: View<'_, B, u32>,
        rope: View<'_, B, f32>,
    ) -> Result<()> {
        if let Some(Unnormed { values, rstd }) = unnormed {
            let weight = self.values(overlay, Self::head_norm(id));
            let (x, rstd, eps) = (values.view(), Some(rstd.view_mut()), self.config.rms_norm_eps);
            RmsNorm { x, weight, y: y.reborrow(), rstd, eps }.run(&self.backend)?;
        }
        let head_dim = self.config.head_dim;
        Rope { x: y, table: rope, positions, head_dim, inverse: false }.run(&self.backend)
    }
}
