//! Masked AdamW (Loshchilov and Hutter, arXiv 1711.05101) over a table of modules, and the sums of squares that clip
//! it.

use super::Operator;
use crate::backend::{Backend, Cost, FloatElement, In, Out, View, ViewMut, cost};
use crate::error::Result;

/// How a step stores bf16 weights and moments. Backends that keep them in f32 ignore it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// Up or down with probabilities that keep the expectation, by [`AdamW::seed`]: updates smaller than half a unit in
    /// the last place (2⁻⁹ to 2⁻⁸ of a bf16 weight) still count on average.
    #[default]
    Stochastic,
    /// To nearest even: smaller updates are lost, and a second moment in bf16 cannot decay at beta2 = 0.999.
    Nearest,
}

/// Hyper-parameters of one step, as in `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to √v̂.
    pub eps: f32,
    /// Counts from 1; bias correction uses it.
    pub step: u32,
    /// Clip the global norm of all gradients of the table to this; `None` = no clipping.
    pub max_grad_norm: Option<f32>,
    /// Seeds stochastic rounding, together with `step`, a module's row in the table and an element's index in the
    /// module.
    pub seed: u64,
    /// How bf16 weights and moments are rounded.
    pub rounding: Rounding,
}

/// A row of the table: tensors of one length, and the module's rates.
pub struct AdamWModule<'a, B: Backend> {
    /// The tensor.
    pub weight: Out<'a, B>,
    /// Its gradient.
    pub grad: View<'a, B, B::Grad>,
    /// First moment.
    pub m: ViewMut<'a, B, B::Moment>,
    /// Second moment.
    pub v: ViewMut<'a, B, B::Moment>,
    /// Learning rate of this step.
    pub lr: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// One step over a table: g = clip·grad, clip = min(1, max_grad_norm / (√Σ squares + 1e-6)); w ·= 1 − lr·decay;
/// m += (1−β₁)·(g − m); v = β₂·v + (1−β₂)·g²; w −= lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε).
pub struct AdamWMasked<'t, 'a, B: Backend> {
    /// The tensors that train.
    pub table: &'t mut [AdamWModule<'a, B>],
    /// \[table\], by [`SumSquares`] of the gradients. A sum that is not finite leaves everything unchanged.
    pub squares: View<'t, B, f32>,
    /// Hyper-parameters.
    pub hyper: AdamW,
}

impl<B: Backend> Operator<B> for AdamWMasked<'_, '_, B> {
    const NAME: &'static str = "adamw_masked";

    fn check(&self) {
        assert_eq!(self.table.len(), self.squares.len());
        for AdamWModule { weight, grad, m, v, .. } in &*self.table {
            assert_eq!([grad.len(), m.len(), v.len()], [weight.len(); 3]);
        }
    }

    fn cost(&self) -> Cost {
        let elements = self.table.iter().map(|module| module.grad.len()).sum();
        cost::adamw(elements, size_of::<B::Float>(), size_of::<B::Grad>(), size_of::<B::Moment>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.adamw_masked(self)
    }
}

/// A row of [`UpdateMeans`].
pub struct MeanRow<'a, B: Backend> {
    /// The average, f32.
    pub mean: ViewMut<'a, B, f32>,
    /// The weight that it follows.
    pub weight: In<'a, B>,
}

/// mean ← decay·mean + (1 − decay)·weight over a table, in f32: both products and the sum are rounded, so that every
/// backend writes the same bits.
pub struct UpdateMeans<'t, 'a, B: Backend> {
    /// The averages of a run.
    pub table: &'t mut [MeanRow<'a, B>],
    /// From 0 to 1.
    pub decay: f32,
}

impl<B: Backend> Operator<B> for UpdateMeans<'_, '_, B> {
    const NAME: &'static str = "update_means";

    fn check(&self) {
        assert!(self.table.iter().all(|row| row.mean.len() == row.weight.len()));
    }

    fn cost(&self) -> Cost {
        cost::update_means(self.table.iter().map(|row| row.mean.len()).sum(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.update_means(self)
    }
}

/// A row of [`ProximalGradients`].
pub struct ProximalRow<'a, B: Backend> {
    /// Gradient of the loss.
    pub grad: ViewMut<'a, B, B::Grad>,
    /// The weight.
    pub weight: In<'a, B>,
    /// Weights that the proximal term pulls towards.
    pub anchor: In<'a, B>,
}

/// grad ← grad + rho·(weight − anchor) over a table: the gradient of rho/2 · ‖weight − anchor‖² (Lisa, arXiv
/// 2405.18641).
pub struct ProximalGradients<'t, 'a, B: Backend> {
    /// The tensors that train.
    pub table: &'t mut [ProximalRow<'a, B>],
    /// Strength of the pull.
    pub rho: f32,
}

impl<B: Backend> Operator<B> for ProximalGradients<'_, '_, B> {
    const NAME: &'static str = "proximal_gradients";

    fn check(&self) {
        for ProximalRow { grad, weight, anchor } in &*self.table {
            assert_eq!([weight.len(), anchor.len()], [grad.len(); 2]);
        }
    }

    fn cost(&self) -> Cost {
        let elements = self.table.iter().map(|row| row.grad.len()).sum();
        cost::proximal_gradients(elements, size_of::<B::Float>(), size_of::<B::Grad>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.proximal_gradients(self)
    }
}

/// squares\[i\] = Σ parts\[i\]², in f64 or in a fixed pairwise order.
pub struct SumSquares<'a, B: Backend, T: FloatElement> {
    /// Tensors of any length.
    pub parts: &'a [View<'a, B, T>],
    /// \[parts\]
    pub squares: ViewMut<'a, B, f32>,
}

impl<B: Backend, T: FloatElement> Operator<B> for SumSquares<'_, B, T> {
    const NAME: &'static str = "sum_squares";

    fn check(&self) {
        assert_eq!(self.parts.len(), self.squares.len());
    }

    fn cost(&self) -> Cost {
        cost::sum_squares(self.parts.iter().map(View::len).sum(), size_of::<T>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.sum_squares(self)
    }
}
