//! Backward through projections: gradients of their own tensors, and of their inputs.

use crate::backend::{
    Backend, In, InputGradient, Linear, LinearBackwardBias, LinearBackwardInput, LinearBackwardInputEach,
    LinearBackwardWeight, LinearBackwardWeightEach, LinearShape, Operator, Out, WeightGradient,
};
use crate::engine::decoder::Overlay;
use crate::engine::{Decoder, Gradients};
use crate::error::Result;
use crate::modules::{ModuleId, ParamId};

impl<B: Backend> Decoder<B> {
    pub(super) fn module_trains(&self, id: ModuleId, gradients: &Gradients<B>) -> bool {
        [ParamId::Weight(id), ParamId::Bias(id), ParamId::LoraA(id), ParamId::LoraB(id)]
            .into_iter()
            .any(|id| gradients.trains(id))
    }

    /// Gradients of a projection's tensors from dY.
    pub(super) fn module_gradients(
        &self,
        id: ModuleId,
        dy: In<'_, B>,
        x: In<'_, B>,
        tokens: usize,
        gradients: &mut Gradients<B>,
    ) -> Result<()> {
        let accumulate = gradients.accumulate;
        if let Some(dw) = gradients.get_mut(ParamId::Weight(id)) {
            let shape = self.shape_of(id.kind, tokens);
            let product = LinearBackwardWeight::new(dy.clone(), x.clone(), dw.view_mut(), shape);
            LinearBackwardWeight { accumulate, ..product }.run(&self.backend)?;
        }
        self.bias_and_adapter_gradients(id, dy, x, tokens, gradients)
    }

    /// [`Decoder::module_gradients`] of several projections of one x.
    pub(super) fn gradients_each<const N: usize>(
        &self,
        outputs: &[(ModuleId, In<'_, B>); N],
        x: In<'_, B>,
        tokens: usize,
        gradients: &mut Gradients<B>,
    ) -> Result<()> {
        let accumulate = gradients.accumulate;
        let weights = outputs.each_ref().map(|(id, _)| ParamId::Weight(*id));
        let mut trained: Vec<WeightGradient<'_, B>> = gradients
            .each_mut(weights)
            .flat_map(|(weight, dw)| {
                let (_, dy) = outputs.iter().find(|(id, _)| ParamId::Weight(*id) == weight)?;
                Some(WeightGradient { dy: dy.clone(), dw: dw.view_mut() })
            })
            .collect();
        if !trained.is_empty() {
            let layers = trained.as_mut_slice();
            LinearBackwardWeightEach { x: x.clone(), layers, tokens, accumulate }.run(&self.backend)?;
        }
        for (id, dy) in outputs {
            self.bias_and_adapter_gradients(*id, dy.clone(), x.clone(), tokens, gradients)?;
        }
        Ok(())
    }

    /// Gradients of a projection's bias and adapter.
    fn bias_and_adapter_gradients(
        &self,
        id: ModuleId,
        dy: In<'_, B>,
        x: In<'_, B>,
        tokens: usize,
        gradients: &mut Gradients<B>,
    ) -> Result<()> {
        let shape = self.shape_of(id.kind, tokens);
        let (backend, accumulate) = (&self.backend, gradients.accumulate);
        if let Some(dbias) = gradients.get_mut(ParamId::Bias(id)) {
            LinearBackwardBias { dy: dy.clone(), dbias: dbias.view_mut(), accumulate }.run(backend)?;
        }
        let adapter = (self.lora_of(id), self.param(ParamId::LoraA(id)), self.param(ParamId::LoraB(id)));
        let (Some(lora), Some(a), Some(b)) = adapter else { return Ok(()) };
        let down = LinearShape { outputs: lora.rank, ..shape };
        let up = LinearShape { inputs: lora.rank, ..shape };
        let (alpha, mut u) = (lora.scale(), self.floats(tokens * lora.rank)?);
        if let Some(db) = gradients.get_mut(ParamId::LoraB(id)) {
            Linear::new(x.clone(), a.values.view(), u.view_mut(), down).run(backend)?;
            let product = LinearBackwardWeight::new(dy.clone(), u.view(), db.view_mut(), up);
            LinearBackwardWeight { alpha, accumulate, ..product }.run(backend)?;
        }
        if let Some(da) = gradients.get_mut(ParamId::LoraA(id)) {
            let product = LinearBackwardInput::new(dy, b.values.view(), u.view_mut(), up);
            LinearBackwardInput { alpha, ..product }.run(backend)?;
            let product = LinearBackwardWeight::new(u.view(), x, da.view_mut(), down);
            LinearBackwardWeight { accumulate, ..product }.run(backend)?;
        }
        Ok(())
    }

    /// Gradient of the common input of several projections from their dY.
    pub(super) fn input_gradient_each<const N: usize>(
        &self,
        outputs: &[(ModuleId, In<'_, B>); N],
        mut dx: Out<'_, B>,
        tokens: usize,
    ) -> Result<()> {
        if outputs.iter().any(|(id, _)| self.index.contains_key(&ParamId::LoraA(*id))) {
            for (i, (id, dy)) in outputs.iter().enumerate() {
                self.module_input_gradient(*id, dy.clone(), dx.reborrow(), i)?;
            }
            return Ok(());
        }
        let none = Overlay::new();
        let layers = outputs
            .each_ref()
            .map(|(id, dy)| InputGradient { dy: dy.clone(), w: self.values(&none, ParamId::Weight(*id)) });
        LinearBackwardInputEach { layers: &layers, dx, tokens, accumulate: false }.run(&self.backend)
    }

    /// Gradient of a projection's input from dY. Overwrites `dx` as term 0 of a sum over projections, else adds to it.
    pub(super) fn module_input_gradient(
        &self,
        id: ModuleId,
        dy: In<'_, B>,
        mut dx: Out<'_, B>,
        term: usize,
    ) -> Result<()> {
        let (outputs, inputs) = self.config.module_shape(id.kind);
        let shape = LinearShape { tokens: dx.len() / inputs, inputs, outputs };
        let weight = self.values(&Overlay::new(), ParamId::Weight(id));
        let product = LinearBackwardInput::new(dy.clone(), weight, dx.reborrow(), shape);
        LinearBackwardInput { accumulate: term > 0, ..product }.run(&self.backend)?;
        let adapter = (self.lora_of(id), self.param(ParamId::LoraA(id)), self.param(ParamId::LoraB(id)));
        let (Some(lora), Some(a), Some(b)) = adapter else { return Ok(()) };
        let down = LinearShape { outputs: lora.rank, ..shape };
        let up = LinearShape { inputs: lora.rank, ..shape };
        let mut du = self.floats(shape.tokens * lora.rank)?;
        let product = LinearBackwardInput::new(dy, b.values.view(), du.view_mut(), up);
        LinearBackwardInput { alpha: lora.scale(), ..product }.run(&self.backend)?;
        let product = LinearBackwardInput::new(du.view(), a.values.view(), dx, down);
        LinearBackwardInput { accumulate: true, ..product }.run(&self.backend)
    }
}
