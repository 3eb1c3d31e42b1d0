//! Backward through projections: gradients of their own tensors, and of their inputs.

use crate::backend::{Backend, Epilogue, In, InputGradient, LinearShape, Out, ViewMut, WeightGradient};
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

    /// Gradients of a projection's own tensors from those of its output.
    pub(super) fn module_gradients(
        &self,
        id: ModuleId,
        dy: In<'_, B>,
        x: In<'_, B>,
        tokens: usize,
        gradients: &mut Gradients<B>,
        accumulate: bool,
    ) -> Result<()> {
        if let Some(dw) = gradients.get_mut(ParamId::Weight(id)) {
            let shape = self.shape_of(id.kind, tokens);
            self.backend.linear_backward_weight(dy.clone(), x.clone(), dw.view_mut(), shape, 1.0, accumulate)?;
        }
        self.bias_and_adapter_gradients(id, dy, x, tokens, gradients, accumulate)
    }

    /// The same for several projections of one x, each with the gradient of its output.
    pub(super) fn gradients_each<const N: usize>(
        &self,
        outputs: &[(ModuleId, In<'_, B>); N],
        x: In<'_, B>,
        tokens: usize,
        gradients: &mut Gradients<B>,
        accumulate: bool,
    ) -> Result<()> {
        let weights = outputs.each_ref().map(|(id, _)| ParamId::Weight(*id));
        let mut trained: Vec<WeightGradient<'_, B>> = gradients
            .each_mut(weights)
            .flat_map(|(weight, dw)| {
                let (_, dy) = outputs.iter().find(|(id, _)| ParamId::Weight(*id) == weight)?;
                Some(WeightGradient { dy: dy.clone(), dw: dw.view_mut() })
            })
            .collect();
        if !trained.is_empty() {
            self.backend.linear_backward_weight_each(x.clone(), &mut trained, tokens, accumulate)?;
        }
        for (id, dy) in outputs {
            self.bias_and_adapter_gradients(*id, dy.clone(), x.clone(), tokens, gradients, accumulate)?;
        }
        Ok(())
    }

    /// Gradients of what a projection has beside its weight.
    fn bias_and_adapter_gradients(
        &self,
        id: ModuleId,
        dy: In<'_, B>,
        x: In<'_, B>,
        tokens: usize,
        gradients: &mut Gradients<B>,
        accumulate: bool,
    ) -> Result<()> {
        let shape = self.shape_of(id.kind, tokens);
        let backend = &self.backend;
        if let Some(dbias) = gradients.get_mut(ParamId::Bias(id)) {
            backend.linear_backward_bias(dy.clone(), dbias.view_mut(), tokens, shape.outputs, accumulate)?;
        }
        let adapter = (self.lora(), self.param(ParamId::LoraA(id)), self.param(ParamId::LoraB(id)));
        let (Some(lora), Some(a), Some(b)) = adapter else { return Ok(()) };
        let down = LinearShape { outputs: lora.rank, ..shape };
        let up = LinearShape { inputs: lora.rank, ..shape };
        let mut u = self.floats(tokens * lora.rank)?;
        if let Some(db) = gradients.get_mut(ParamId::LoraB(id)) {
            backend.linear(x.clone(), a.values.view(), u.view_mut(), down, Epilogue::default())?;
            backend.linear_backward_weight(dy.clone(), u.view(), db.view_mut(), up, lora.scale(), accumulate)?;
        }
        if let Some(da) = gradients.get_mut(ParamId::LoraA(id)) {
            backend.linear_backward_input(dy, b.values.view(), u.view_mut(), up, lora.scale(), false)?;
            let da: ViewMut<'_, B, B::Grad> = da.view_mut();
            backend.linear_backward_weight(u.view(), x, da, down, 1.0, accumulate)?;
        }
        Ok(())
    }

    /// Gradient of the input of several projections from those of their outputs.
    pub(super) fn input_gradient_each<const N: usize>(
        &self,
        outputs: &[(ModuleId, In<'_, B>); N],
        mut dx: Out<'_, B>,
        tokens: usize,
    ) -> Result<()> {
        if outputs.iter().any(|(id, _)| self.index.contains_key(&ParamId::LoraA(*id))) {
            for (i, (id, dy)) in outputs.iter().enumerate() {
                self.module_input_gradient(*id, dy.clone(), dx.reborrow(), tokens, i > 0)?;
            }
            return Ok(());
        }
        let none = Overlay::new();
        let layers = outputs
            .each_ref()
            .map(|(id, dy)| InputGradient { dy: dy.clone(), w: self.values(&none, ParamId::Weight(*id)) });
        self.backend.linear_backward_input_each(&layers, dx, tokens, false)
    }

    /// Gradient of a projection's input from that of its output.
    pub(super) fn module_input_gradient(
        &self,
        id: ModuleId,
        dy: In<'_, B>,
        mut dx: Out<'_, B>,
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        let shape = self.shape_of(id.kind, tokens);
        let weight = self.values(&Overlay::new(), ParamId::Weight(id));
        self.backend.linear_backward_input(dy.clone(), weight, dx.reborrow(), shape, 1.0, accumulate)?;
        let adapter = (self.lora(), self.param(ParamId::LoraA(id)), self.param(ParamId::LoraB(id)));
        let (Some(lora), Some(a), Some(b)) = adapter else { return Ok(()) };
        let down = LinearShape { outputs: lora.rank, ..shape };
        let up = LinearShape { inputs: lora.rank, ..shape };
        let mut du = self.floats(tokens * lora.rank)?;
        self.backend.linear_backward_input(dy, b.values.view(), du.view_mut(), up, lora.scale(), false)?;
        self.backend.linear_backward_input(du.view(), a.values.view(), dx, down, 1.0, true)
    }
}
