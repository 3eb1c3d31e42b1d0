//! The backward pass, by hand. It computes the gradients of what trains and stops below the lowest of it.

mod projections;

use super::decoder::Overlay;
use super::forward::{AttentionActivations, LayerActivations, Packed, Unnormed};
use super::losses::Losses;
use super::pool::{Floats, Scratch};
use super::readout::trained_rows;
use super::{Batch, Decoder, Gradients};
use crate::backend::{Backend, LinearShape, View, ViewMut, trace};
use crate::error::Result;
use crate::modules::{ModuleId, ModuleKind, ParamId};

/// What a micro-batch brings beside its [`Packed`] form.
struct Inputs<'p, B: Backend> {
    tokens: Scratch<'p, B, u32>,
    /// Rows that have a target, and their targets.
    rows: Scratch<'p, B, u32>,
    targets: Scratch<'p, B, u32>,
}

/// What is kept of a layer until its backward pass.
enum Saved<'p, B: Backend> {
    /// Below everything that trains.
    Nothing,
    /// The input alone: the layer runs again.
    Input(Floats<'p, B>),
    /// All that backward needs.
    Activations(Box<LayerActivations<'p, B>>),
}

/// Which gradients a layer has to produce; each flag includes the need of the flags before it.
struct Needs {
    /// The gradient of the layer's input.
    input: bool,
    /// The gradient of the first norm's output.
    attention_normed: bool,
    /// The gradients of q, k, v.
    qkv: bool,
    /// The gradient of the residual stream between the halves.
    mid: bool,
    /// The gradient of the second norm's output.
    mlp_normed: bool,
    /// The gradients of gate and up.
    product: bool,
}

impl<B: Backend> Decoder<B> {
    /// Forward and backward: gradients of `scale · Σ loss` are put into `gradients`, or added to them (`accumulate`);
    /// `gradients` names the tensors that train. Returns Σ loss over the batch's targets.
    ///
    /// `recompute` keeps one activation a layer instead of about ten and runs each layer's forward pass again: about a
    /// third more time.
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        gradients: &mut Gradients<B>,
        scale: f32,
        accumulate: bool,
        recompute: bool,
    ) -> Result<f64> {
        let mut losses = self.losses_of(batch.trained_tokens())?;
        self.queue_gradients(batch, gradients, scale, accumulate, recompute, &mut losses)?;
        losses.sum()
    }

    /// Room for the losses of a step of so many trained tokens.
    pub fn losses_of(&self, trained_tokens: usize) -> Result<Losses<'_, B>> {
        Ok(Losses::new(&self.backend, self.stats(trained_tokens)?))
    }

    /// [`Decoder::loss_and_gradients`] of one of a step's micro-batches, without waiting for the device: the losses are added
    /// to `losses`, and read when the whole step is queued.
    pub fn queue_gradients(
        &self,
        batch: &Batch,
        gradients: &mut Gradients<B>,
        scale: f32,
        accumulate: bool,
        recompute: bool,
        losses: &mut Losses<'_, B>,
    ) -> Result<()> {
        let span = trace::phase("forward");
        let _pass = self.pool.pass(batch.tokens.len());
        let packed = self.pack(batch)?;
        let (rows, targets) = trained_rows(batch);
        let inputs = Inputs {
            tokens: self.indices(&batch.tokens)?,
            rows: self.indices(&rows)?,
            targets: self.indices(&targets)?,
        };
        drop(span);
        self.backend
            .replay(|| self.forward_and_backward(&packed, &inputs, gradients, scale, accumulate, recompute, losses))
    }

    /// All that the device does for a micro-batch; nothing comes from the host any more.
    #[allow(clippy::too_many_arguments)]
    fn forward_and_backward(
        &self,
        packed: &Packed<'_, B>,
        inputs: &Inputs<'_, B>,
        gradients: &mut Gradients<B>,
        scale: f32,
        accumulate: bool,
        recompute: bool,
        losses: &mut Losses<'_, B>,
    ) -> Result<()> {
        let span = trace::phase("forward");
        let none = Overlay::new();
        let hidden = self.config.hidden;
        let (tokens, chosen, targets) = (inputs.tokens.view(), inputs.rows.view(), inputs.targets.view());
        let rows = chosen.len();
        if !accumulate {
            // The embedding's rows are added one by one; without targets nothing else would be written.
            let ids: Vec<ParamId> = gradients.iter().map(|(id, _)| id).collect();
            for id in ids.into_iter().filter(|id| rows == 0 || *id == ParamId::Embedding) {
                if let Some(gradient) = gradients.get_mut(id) {
                    self.backend.clear(gradient.view_mut())?;
                }
            }
        }
        if rows == 0 {
            return Ok(());
        }
        let lowest = self.lowest_trained_layer(gradients);
        let mut saved = Vec::with_capacity(self.config.layers);
        let mut x = self.embed_rows(&none, tokens.clone())?;
        for layer in 0..self.config.layers {
            let (activations, out) = self.layer_forward(&none, layer, x, packed)?;
            saved.push(match (layer >= lowest, recompute) {
                (false, _) => Saved::Nothing,
                (true, true) => Saved::Input(activations.x),
                (true, false) => Saved::Activations(Box::new(activations)),
            });
            x = out;
        }

        drop(span);
        let span = trace::phase("head");
        let mut x_rows = self.floats(rows * hidden)?;
        self.backend.gather_rows(x.view(), chosen.clone(), x_rows.view_mut(), hidden)?;
        drop(x);
        let below = lowest < self.config.layers || gradients.trains(ParamId::Embedding);
        let losses = losses.next(rows);
        let dx_rows = self.head_backward(x_rows, targets, losses, gradients, scale, accumulate, below)?;

        drop(span);
        let _span = trace::phase("backward");
        if let Some(dx_rows) = dx_rows {
            let mut dx = self.floats(packed.tokens * hidden)?;
            self.backend.clear(dx.view_mut())?;
            self.backend.scatter_rows(dx_rows.view(), chosen, dx.view_mut(), hidden)?;
            drop(dx_rows);
            for layer in (lowest..self.config.layers).rev() {
                let activations = match saved.pop() {
                    Some(Saved::Activations(activations)) => *activations,
                    Some(Saved::Input(x)) => {
                        let _span = trace::phase("recompute");
                        self.layer_forward(&none, layer, x, packed)?.0
                    }
                    Some(Saved::Nothing) | None => break,
                };
                self.layer_backward(layer, activations, &mut dx, packed, gradients, accumulate)?;
            }
            if let Some(gradient) = gradients.get_mut(ParamId::Embedding) {
                self.backend.embedding_backward(dx.view(), tokens, gradient.view_mut(), hidden)?;
            }
        }
        Ok(())
    }

    /// The lowest layer in which, or below which, something trains.
    fn lowest_trained_layer(&self, gradients: &Gradients<B>) -> usize {
        if gradients.trains(ParamId::Embedding) {
            return 0;
        }
        gradients.iter().filter_map(|(id, _)| id.layer()).min().unwrap_or(self.config.layers)
    }

    /// Final norm, head and loss over the rows that have a target. Fills their losses, and returns the gradient of `x` where
    /// something `below` trains.
    #[allow(clippy::too_many_arguments)]
    fn head_backward<'a>(
        &'a self,
        x: Floats<'a, B>,
        targets: View<'_, B, u32>,
        mut losses: ViewMut<'_, B, f32>,
        gradients: &mut Gradients<B>,
        scale: f32,
        accumulate: bool,
        below: bool,
    ) -> Result<Option<Floats<'a, B>>> {
        let (hidden, vocab, rows) = (self.config.hidden, self.config.vocab, targets.len());
        let none = Overlay::new();
        let (normed, rstd) = self.norm(&none, ParamId::FinalNorm, x.view())?;
        let norm_trains = gradients.trains(ParamId::FinalNorm);
        let mut dnormed = if below || norm_trains { Some(self.floats(rows * hidden)?) } else { None };
        let most = B::logit_rows(vocab);
        for first in (0..rows).step_by(most) {
            let chunk = first..(first + most).min(rows);
            let shape = LinearShape { tokens: chunk.len(), inputs: hidden, outputs: vocab };
            let wide = chunk.start * hidden..chunk.end * hidden;
            let mut logits = self.head_logits(&none, normed.range(wide.clone()))?;
            let at = losses.part(chunk.clone());
            self.backend.cross_entropy(logits.view_mut(), targets.part(chunk), at, vocab, Some(scale))?;
            if let Some(gradient) = gradients.get_mut(self.head()) {
                // A tied embedding's gradient was cleared above, and gets its own rows later.
                let add = accumulate || first > 0 || self.config.tied;
                let x = normed.range(wide.clone());
                self.backend.linear_backward_weight(logits.view(), x, gradient.view_mut(), shape, 1.0, add)?;
            }
            if let Some(dnormed) = &mut dnormed {
                let head = self.values(&none, self.head());
                let into = dnormed.range_mut(wide);
                self.backend.linear_backward_input(logits.view(), head, into, shape, 1.0, false)?;
            }
        }
        let Some(dnormed) = dnormed else { return Ok(None) };
        let mut dx = if below { Some(self.floats(rows * hidden)?) } else { None };
        self.backend.rmsnorm_backward(
            dnormed.view(),
            x.view(),
            self.values(&none, ParamId::FinalNorm),
            rstd.view(),
            dx.as_mut().map(Scratch::view_mut),
            gradients.get_mut(ParamId::FinalNorm).map(|g| g.view_mut()),
            hidden,
            false,
            accumulate,
        )?;
        Ok(dx)
    }

    fn needs(&self, layer: usize, gradients: &Gradients<B>) -> Needs {
        let module = |kind| {
            let id = ModuleId { layer, kind };
            [ParamId::Weight(id), ParamId::Bias(id), ParamId::LoraA(id), ParamId::LoraB(id)]
                .into_iter()
                .any(|id| gradients.trains(id))
        };
        let trains = |id| gradients.trains(id);
        let below =
            trains(ParamId::Embedding) || gradients.iter().any(|(id, _)| id.layer().is_some_and(|other| other < layer));
        let input = below;
        let attention_normed = input || trains(ParamId::InputNorm(layer));
        let qkv = attention_normed
            || [ModuleKind::Q, ModuleKind::K, ModuleKind::V].into_iter().any(module)
            || trains(ParamId::QNorm(layer))
            || trains(ParamId::KNorm(layer));
        let mid = qkv || module(ModuleKind::O);
        let mlp_normed = mid || trains(ParamId::PostAttentionNorm(layer));
        let product = mlp_normed || module(ModuleKind::Gate) || module(ModuleKind::Up);
        Needs { input, attention_normed, qkv, mid, mlp_normed, product }
    }

    /// `dx` holds the gradient of the layer's output and receives that of its input.
    fn layer_backward(
        &self,
        layer: usize,
        saved: LayerActivations<'_, B>,
        dx: &mut Floats<'_, B>,
        packed: &Packed<'_, B>,
        gradients: &mut Gradients<B>,
        accumulate: bool,
    ) -> Result<()> {
        let _span = trace::layer(layer);
        let none = Overlay::new();
        let needs = self.needs(layer, gradients);
        let (tokens, hidden) = (packed.tokens, self.config.hidden);
        let module = |kind| ModuleId { layer, kind };
        let LayerActivations { x, attention, mid, mut mlp } = saved;

        let down = module(ModuleKind::Down);
        if self.module_trains(down, gradients) {
            let mut product = self.floats(tokens * self.config.ffn)?;
            self.backend.swiglu(mlp.gate.view(), mlp.up.view(), product.view_mut())?;
            self.module_gradients(down, dx.view(), product.view(), tokens, gradients, accumulate)?;
        }
        if !needs.product {
            return Ok(());
        }
        let mut dproduct = self.floats(tokens * self.config.ffn)?;
        self.module_input_gradient(down, dx.view(), dproduct.view_mut(), tokens, false)?;
        self.backend.swiglu_backward(mlp.gate.view_mut(), mlp.up.view_mut(), dproduct.view())?;
        drop(dproduct);
        let (dgate, dup) = (mlp.gate, mlp.up);
        let outputs = [(module(ModuleKind::Gate), dgate.view()), (module(ModuleKind::Up), dup.view())];
        if outputs.iter().any(|(id, _)| self.module_trains(*id, gradients)) {
            let (normed, _) = self.norm(&none, ParamId::PostAttentionNorm(layer), mid.view())?;
            self.gradients_each(&outputs, normed.view(), tokens, gradients, accumulate)?;
        }
        if !needs.mlp_normed {
            return Ok(());
        }
        let mut dnormed = self.floats(tokens * hidden)?;
        self.input_gradient_each(&outputs, dnormed.view_mut(), tokens)?;
        drop((dgate, dup));
        self.backend.rmsnorm_backward(
            dnormed.view(),
            mid.view(),
            self.values(&none, ParamId::PostAttentionNorm(layer)),
            mlp.rstd.view(),
            needs.mid.then(|| dx.view_mut()),
            gradients.get_mut(ParamId::PostAttentionNorm(layer)).map(|g| g.view_mut()),
            hidden,
            true,
            accumulate,
        )?;
        drop(mid);
        if !needs.mid {
            return Ok(());
        }
        let o = module(ModuleKind::O);
        if self.module_trains(o, gradients) {
            self.module_gradients(o, dx.view(), attention.mixed.view(), tokens, gradients, accumulate)?;
        }
        if !needs.qkv {
            return Ok(());
        }
        let rstd = self.qkv_backward(layer, attention, &x, dx, &mut dnormed, packed, gradients, accumulate, &needs)?;
        if !needs.attention_normed {
            return Ok(());
        }
        self.backend.rmsnorm_backward(
            dnormed.view(),
            x.view(),
            self.values(&none, ParamId::InputNorm(layer)),
            rstd.view(),
            needs.input.then(|| dx.view_mut()),
            gradients.get_mut(ParamId::InputNorm(layer)).map(|g| g.view_mut()),
            hidden,
            true,
            accumulate,
        )
    }

    /// From the gradient of the attention block's output to that of its normed input (`dnormed`).
    #[allow(clippy::too_many_arguments)]
    fn qkv_backward<'a>(
        &'a self,
        layer: usize,
        saved: AttentionActivations<'a, B>,
        x: &Floats<'_, B>,
        dx: &Floats<'_, B>,
        dnormed: &mut Floats<'_, B>,
        packed: &Packed<'_, B>,
        gradients: &mut Gradients<B>,
        accumulate: bool,
        needs: &Needs,
    ) -> Result<Scratch<'a, B, f32>> {
        let none = Overlay::new();
        let (tokens, c) = (packed.tokens, &self.config);
        let module = |kind| ModuleId { layer, kind };
        let mut dmixed = self.floats(tokens * c.q_width())?;
        self.module_input_gradient(module(ModuleKind::O), dx.view(), dmixed.view_mut(), tokens, false)?;
        let mut dq = self.floats(tokens * c.q_width())?;
        let mut dk = self.floats(tokens * c.kv_width())?;
        let mut dv = self.floats(tokens * c.kv_width())?;
        self.backend.attention_backward(
            saved.q.view(),
            saved.k.view(),
            saved.v.view(),
            saved.mixed.view(),
            saved.lse.view(),
            dmixed.view(),
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            &self.attention_shape(layer, &packed.documents),
        )?;
        drop(dmixed);
        let (at, rope) = (|| packed.positions.view(), || packed.rope.view());
        self.backend.rope(dq.view_mut(), rope(), at(), c.heads, c.head_dim, true)?;
        self.backend.rope(dk.view_mut(), rope(), at(), c.kv_heads, c.head_dim, true)?;
        self.head_norm_backward(ParamId::QNorm(layer), saved.q_unnormed, &mut dq, gradients, accumulate)?;
        self.head_norm_backward(ParamId::KNorm(layer), saved.k_unnormed, &mut dk, gradients, accumulate)?;

        let outputs = [(ModuleKind::Q, &dq), (ModuleKind::K, &dk), (ModuleKind::V, &dv)];
        let outputs = outputs.map(|(kind, dy)| (module(kind), dy.view()));
        if outputs.iter().any(|(id, _)| self.module_trains(*id, gradients)) {
            let (normed, _) = self.norm(&none, ParamId::InputNorm(layer), x.view())?;
            self.gradients_each(&outputs, normed.view(), tokens, gradients, accumulate)?;
        }
        if needs.attention_normed {
            self.input_gradient_each(&outputs, dnormed.view_mut(), tokens)?;
        }
        Ok(saved.rstd)
    }

    /// Through the per-head norm of q or k, where the model has one: `dy` becomes the gradient before it.
    fn head_norm_backward<'a>(
        &'a self,
        norm: ParamId,
        unnormed: Option<Unnormed<'_, B>>,
        dy: &mut Floats<'a, B>,
        gradients: &mut Gradients<B>,
        accumulate: bool,
    ) -> Result<()> {
        let Some(unnormed) = unnormed else { return Ok(()) };
        let mut before = self.floats(dy.view().len())?;
        self.backend.rmsnorm_backward(
            dy.view(),
            unnormed.values.view(),
            self.values(&Overlay::new(), norm),
            unnormed.rstd.view(),
            Some(before.view_mut()),
            gradients.get_mut(norm).map(|g| g.view_mut()),
            self.config.head_dim,
            false,
            accumulate,
        )?;
        *dy = before;
        Ok(())
    }
}
