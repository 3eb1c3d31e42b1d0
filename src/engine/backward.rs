//! The backward pass, by hand: gradients of the tensors that train, down to the lowest of them.

mod attention;
mod inputs;
mod projections;

use super::decoder::Overlay;
use super::forward::{LayerActivations, Packed};
use super::losses::Losses;
use super::pool::{Floats, Scratch};
use super::prefix::DistinctRows;
use super::{Batch, Decoder, FinalGradients, GradientOptions, Gradients};
use crate::backend::{
    Backend, CrossEntropy, EmbeddingBackward, In, LinearBackwardInput, LinearBackwardWeight, LinearShape, MoveAlong,
    Operator, Out, RmsNormBackward, ScatterRows, SumSquares, SwiGlu, SwiGluBackward, View, ViewMut, trace,
};
use crate::error::Result;
use crate::modules::{ModuleId, ModuleKind, ParamId};
use inputs::{Inputs, Terms};

/// Activations kept of a layer until its backward pass.
enum Saved<'p, B: Backend> {
    /// Below the lowest trained tensor.
    Nothing,
    /// The input: the layer's forward pass runs again.
    Input(Floats<'p, B>),
    /// Everything that backward needs.
    Activations(Box<LayerActivations<'p, B>>),
}

/// What happens to the outputs of layers in a pass; gradients of them are [layers, tokens, hidden].
enum Outputs<'a, 'p, B: Backend> {
    AsTheyAre,
    /// Their gradients are written here.
    Differentiated(&'a mut Floats<'p, B>),
    /// They are moved by rho along gradients whose squares have this sum.
    Moved {
        along: &'a Floats<'p, B>,
        squares: View<'a, B, f32>,
        rho: f32,
    },
}

/// A pass over a micro-batch: how its gradients are computed, and where its results go.
struct Pass<'a, 'p, 'd, 'f, B: Backend> {
    options: GradientOptions,
    losses: &'a mut Losses<'d, B>,
    outputs: Outputs<'a, 'p, B>,
    /// Gets the gradients that are final, while others are computed.
    finished: Option<Finished<'f, B>>,
}

/// See [`Decoder::queue_last_gradients`].
type Finished<'f, B> = &'f mut dyn FnMut(FinalGradients<B>) -> Result<()>;

/// Hands over the gradients that are final.
fn finish<B: Backend>(
    gradients: &mut Gradients<B>,
    finished: &mut Option<Finished<'_, B>>,
    final_now: impl Fn(ParamId) -> bool,
) -> Result<()> {
    match finished {
        Some(finished) => finished(gradients.take(final_now)),
        None => Ok(()),
    }
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
    /// Forward and backward: the gradients of scale · Σ loss with respect to the tensors of `gradients`, which are
    /// those that train. Returns Σ loss over the batch's targets.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the batch does not fit the model; [`crate::error::Error::Device`] or
    /// [`crate::error::Error::Memory`] where the device fails.
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        gradients: &mut Gradients<B>,
        options: GradientOptions,
    ) -> Result<f64> {
        let mut losses = self.losses_of(batch.trained_tokens())?;
        self.queue_gradients(batch, gradients, options, &mut losses)?;
        losses.sum()
    }

    /// Room for the losses of a step of so many trained tokens.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    pub fn losses_of(&self, trained_tokens: usize) -> Result<Losses<'_, B>> {
        Ok(Losses::new(&self.backend, self.stats(trained_tokens)?))
    }

    /// [`Decoder::loss_and_gradients`] of one of a step's micro-batches, without waiting for the device: the losses are
    /// added to `losses`, and read when the whole step is queued.
    ///
    /// With [`GradientOptions::vaccine`] = rho there are two passes (Vaccine, arXiv 2402.01109): the first to g, the
    /// gradient of the micro-batch's loss with respect to the outputs of all layers; losses and gradients are those of
    /// the second, in which each output is moved by rho·g/‖g‖, a constant, with the norm over all layers and tokens.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the batch does not fit the model; [`crate::error::Error::Device`] or
    /// [`crate::error::Error::Memory`] where the device fails.
    pub fn queue_gradients(
        &self,
        batch: &Batch,
        gradients: &mut Gradients<B>,
        options: GradientOptions,
        losses: &mut Losses<'_, B>,
    ) -> Result<()> {
        self.queue_pass(batch, gradients, options, losses, None)
    }

    /// [`Decoder::queue_gradients`] of the last of a step's micro-batches: `finished` is given the gradients of a part of the
    /// model as soon as nothing will be added to them, while those of the parts before it are computed. It comes behind the
    /// work that makes them final, in the order of the backward pass: the head and the norm before it, the layers from the
    /// last to the first, the embedding, which is last also where it is the head. A call may bring none. The buffers are
    /// missing in `gradients` until [`Gradients::put_back`].
    ///
    /// # Errors
    /// As [`Decoder::queue_gradients`]; what `finished` returns.
    pub fn queue_last_gradients(
        &self,
        batch: &Batch,
        gradients: &mut Gradients<B>,
        options: GradientOptions,
        losses: &mut Losses<'_, B>,
        finished: &mut dyn FnMut(FinalGradients<B>) -> Result<()>,
    ) -> Result<()> {
        self.queue_pass(batch, gradients, options, losses, Some(finished))
    }

    fn queue_pass(
        &self,
        batch: &Batch,
        gradients: &mut Gradients<B>,
        options: GradientOptions,
        losses: &mut Losses<'_, B>,
        finished: Option<Finished<'_, B>>,
    ) -> Result<()> {
        let span = trace::phase("forward");
        let _pass = self.pool.pass(batch.tokens.len());
        // Vaccine's norm is over the outputs of all tokens: none is shared.
        let distinct = if options.vaccine.is_none() { DistinctRows::of(batch) } else { None };
        let packed = self.pack_distinct(batch, distinct)?;
        let inputs = self.inputs(batch, &packed)?;
        drop(span);
        gradients.accumulate = options.accumulate;
        let rows = inputs.rows.view().len();
        let Some(rho) = options.vaccine.filter(|_| rows > 0) else {
            let pass = Pass { options, losses, outputs: Outputs::AsTheyAre, finished };
            return self.backend.replay(|| self.forward_and_backward(&packed, &inputs, gradients, pass));
        };
        // The losses of the first pass are those without the move: nobody's.
        let mut unmoved = self.losses_of(rows)?;
        let len = packed.tokens * self.config.hidden;
        let (mut moves, mut squares) = (self.floats(self.config.layers * len)?, self.stats(1)?);
        self.backend.replay(|| {
            let first = Pass {
                options: GradientOptions { accumulate: false, ..options },
                losses: &mut unmoved,
                outputs: Outputs::Differentiated(&mut moves),
                finished: None,
            };
            self.forward_and_backward(&packed, &inputs, &mut Gradients::of_outputs(), first)?;
            SumSquares { parts: &[moves.view()], squares: squares.view_mut() }.run(&self.backend)?;
            let outputs = Outputs::Moved { along: &moves, squares: squares.view(), rho };
            self.forward_and_backward(&packed, &inputs, gradients, Pass { options, losses, outputs, finished })
        })
    }

    /// The device's work for a micro-batch, without copies from the host.
    fn forward_and_backward(
        &self,
        packed: &Packed<'_, B>,
        inputs: &Inputs<'_, B>,
        gradients: &mut Gradients<B>,
        Pass { options, losses, mut outputs, mut finished }: Pass<'_, '_, '_, '_, B>,
    ) -> Result<()> {
        let span = trace::phase("forward");
        let none = Overlay::new();
        let hidden = self.config.hidden;
        let (tokens, chosen, targets) = (inputs.tokens.view(), inputs.rows.view(), inputs.targets.view());
        let rows = chosen.len();
        if !options.accumulate {
            // The embedding's rows are added one by one; without targets nothing else would be written.
            let ids: Vec<ParamId> = gradients.iter().map(|(id, _)| id).collect();
            for id in ids.into_iter().filter(|id| rows == 0 || *id == ParamId::Embedding) {
                if let Some(gradient) = gradients.get_mut(id) {
                    self.backend.clear(gradient.view_mut())?;
                }
            }
        }
        if rows == 0 {
            return finish(gradients, &mut finished, |_| true);
        }
        let lowest = gradients.lowest(self.config.layers);
        let mut saved = Vec::with_capacity(self.config.layers);
        let mut x = self.embed_rows(&none, tokens.clone())?;
        for layer in 0..self.config.layers {
            let (activations, mut out) = self.layer_forward(&none, layer, x, packed)?;
            if let Outputs::Moved { along, squares, rho } = &outputs {
                let (len, squares) = (packed.tokens * hidden, squares.clone());
                let direction = along.range(layer * len..(layer + 1) * len);
                MoveAlong { x: out.view_mut(), direction, squares, rho: *rho }.run(&self.backend)?;
            }
            saved.push(match (layer >= lowest, options.recompute) {
                (false, _) => Saved::Nothing,
                (true, true) => Saved::Input(activations.x),
                (true, false) => Saved::Activations(Box::new(activations)),
            });
            x = out;
        }

        drop(span);
        let span = trace::phase("head");
        let mut x_rows = self.floats(rows * hidden)?;
        self.gather(x.view(), chosen.clone(), x_rows.view_mut())?;
        drop(x);
        let losses = losses.next(rows);
        let dx_rows = self.head_backward(x_rows, targets, inputs.terms.as_ref(), losses, gradients, options.scale)?;

        drop(span);
        let _span = trace::phase("backward");
        finish(gradients, &mut finished, |id| matches!(id, ParamId::Head | ParamId::FinalNorm))?;
        if let Some(dx_rows) = dx_rows {
            let mut dx = self.floats(packed.tokens * hidden)?;
            self.backend.clear(dx.view_mut())?;
            ScatterRows { from: dx_rows.view(), rows: chosen, to: dx.view_mut(), width: hidden }.run(&self.backend)?;
            drop(dx_rows);
            for layer in (lowest..self.config.layers).rev() {
                if let Outputs::Differentiated(to) = &mut outputs {
                    let len = packed.tokens * hidden;
                    self.backend.copy(dx.view(), to.range_mut(layer * len..(layer + 1) * len))?;
                }
                let activations = match saved.pop() {
                    Some(Saved::Activations(activations)) => *activations,
                    Some(Saved::Input(x)) => {
                        let _span = trace::phase("recompute");
                        self.layer_forward(&none, layer, x, packed)?.0
                    }
                    Some(Saved::Nothing) | None => break,
                };
                self.layer_backward(layer, activations, &mut dx, packed, gradients)?;
                finish(gradients, &mut finished, |id| id.layer() == Some(layer))?;
            }
            if let Some(gradient) = gradients.get_mut(ParamId::Embedding) {
                let (dy, dtable) = (dx.view(), gradient.view_mut());
                EmbeddingBackward { dy, rows: tokens, dtable, width: hidden }.run(&self.backend)?;
            }
        }
        finish(gradients, &mut finished, |id| id == ParamId::Embedding)
    }

    /// Final norm, head and loss over the rows that have a target. Fills their losses, and returns the gradient of `x`
    /// where something below trains.
    fn head_backward<'a>(
        &'a self,
        x: Floats<'a, B>,
        targets: View<'_, B, u32>,
        terms: Option<&Terms<'_, B>>,
        mut losses: ViewMut<'_, B, f32>,
        gradients: &mut Gradients<B>,
        scale: f32,
    ) -> Result<Option<Floats<'a, B>>> {
        let below = gradients.lowest(self.config.layers) < self.config.layers;
        let accumulate = gradients.accumulate;
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
            CrossEntropy {
                logits: logits.view_mut(),
                targets: targets.part(chunk.clone()),
                losses: losses.part(chunk.clone()),
                vocab,
                scale: Some(scale),
                terms: terms.map(|terms| terms.part(chunk)),
            }
            .run(&self.backend)?;
            if let Some(gradient) = gradients.get_mut(self.head()) {
                // A tied embedding's gradient was cleared above, and gets its own rows later.
                let accumulate = accumulate || first > 0 || self.config.tied;
                let (x, dw) = (normed.range(wide.clone()), gradient.view_mut());
                let product = LinearBackwardWeight::new(logits.view(), x, dw, shape);
                LinearBackwardWeight { accumulate, ..product }.run(&self.backend)?;
            }
            if let Some(dnormed) = &mut dnormed {
                let head = self.values(&none, self.head());
                LinearBackwardInput::new(logits.view(), head, dnormed.range_mut(wide), shape).run(&self.backend)?;
            }
        }
        let Some(dnormed) = dnormed else { return Ok(None) };
        let mut dx = if below { Some(self.floats(rows * hidden)?) } else { None };
        let dx_view = dx.as_mut().map(Scratch::view_mut);
        let op = self.norm_backward(ParamId::FinalNorm, dnormed.view(), x.view(), rstd.view(), dx_view, gradients);
        op.run(&self.backend)?;
        Ok(dx)
    }

    /// The backward pass of an RMSNorm, which overwrites `dx`.
    fn norm_backward<'a>(
        &'a self,
        norm: ParamId,
        dy: In<'a, B>,
        x: In<'a, B>,
        rstd: View<'a, B, f32>,
        dx: Option<Out<'a, B>>,
        gradients: &'a mut Gradients<B>,
    ) -> RmsNormBackward<'a, B> {
        let (weight, accumulate_dweight) = (self.values(&Overlay::new(), norm), gradients.accumulate);
        let dweight = gradients.get_mut(norm).map(|gradient| gradient.view_mut());
        RmsNormBackward { dy, x, weight, rstd, dx, dweight, accumulate_dx: false, accumulate_dweight }
    }

    fn needs(&self, layer: usize, gradients: &Gradients<B>) -> Needs {
        let module = |kind| {
            let id = ModuleId { layer, kind };
            [ParamId::Weight(id), ParamId::Bias(id), ParamId::LoraA(id), ParamId::LoraB(id)]
                .into_iter()
                .any(|id| gradients.trains(id))
        };
        let trains = |id| gradients.trains(id);
        let input = gradients.below(layer);
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

    /// `dx` holds the gradient of the layer's output, and becomes the gradient of its input.
    fn layer_backward(
        &self,
        layer: usize,
        saved: LayerActivations<'_, B>,
        dx: &mut Floats<'_, B>,
        packed: &Packed<'_, B>,
        gradients: &mut Gradients<B>,
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
            SwiGlu { gate: mlp.gate.view(), up: mlp.up.view(), y: product.view_mut() }.run(&self.backend)?;
            self.module_gradients(down, dx.view(), product.view(), tokens, gradients)?;
        }
        if !needs.product {
            return Ok(());
        }
        let mut dproduct = self.floats(tokens * self.config.ffn)?;
        self.module_input_gradient(down, dx.view(), dproduct.view_mut(), 0)?;
        let (gate, up) = (mlp.gate.view_mut(), mlp.up.view_mut());
        SwiGluBackward { gate, up, dy: dproduct.view() }.run(&self.backend)?;
        drop(dproduct);
        let (dgate, dup) = (mlp.gate, mlp.up);
        let outputs = [(module(ModuleKind::Gate), dgate.view()), (module(ModuleKind::Up), dup.view())];
        if outputs.iter().any(|(id, _)| self.module_trains(*id, gradients)) {
            let (normed, _) = self.norm(&none, ParamId::PostAttentionNorm(layer), mid.view())?;
            self.gradients_each(&outputs, normed.view(), tokens, gradients)?;
        }
        if !needs.mlp_normed {
            return Ok(());
        }
        let mut dnormed = self.floats(tokens * hidden)?;
        self.input_gradient_each(&outputs, dnormed.view_mut(), tokens)?;
        drop((dgate, dup));
        let (norm, dx_view) = (ParamId::PostAttentionNorm(layer), needs.mid.then(|| dx.view_mut()));
        let op = self.norm_backward(norm, dnormed.view(), mid.view(), mlp.rstd.view(), dx_view, gradients);
        RmsNormBackward { accumulate_dx: true, ..op }.run(&self.backend)?;
        drop(mid);
        if !needs.mid {
            return Ok(());
        }
        let o = module(ModuleKind::O);
        if self.module_trains(o, gradients) {
            self.module_gradients(o, dx.view(), attention.mixed.view(), tokens, gradients)?;
        }
        if !needs.qkv {
            return Ok(());
        }
        let ([dq, dk, dv], rstd) = self.attention_half_backward(layer, attention, dx, packed, gradients)?;
        let outputs = [(ModuleKind::Q, &dq), (ModuleKind::K, &dk), (ModuleKind::V, &dv)];
        let outputs = outputs.map(|(kind, dy)| (module(kind), dy.view()));
        if outputs.iter().any(|(id, _)| self.module_trains(*id, gradients)) {
            let (normed, _) = self.norm(&none, ParamId::InputNorm(layer), x.view())?;
            self.gradients_each(&outputs, normed.view(), tokens, gradients)?;
        }
        if !needs.attention_normed {
            return Ok(());
        }
        self.input_gradient_each(&outputs, dnormed.view_mut(), tokens)?;
        let (norm, dx_view) = (ParamId::InputNorm(layer), needs.input.then(|| dx.view_mut()));
        let op = self.norm_backward(norm, dnormed.view(), x.view(), rstd.view(), dx_view, gradients);
        RmsNormBackward { accumulate_dx: true, ..op }.run(&self.backend)
    }
}
