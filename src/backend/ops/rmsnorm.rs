//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over rows as wide as the weight: the hidden size, or a head's width
//! for the q and k norms.

use super::Operator;
use crate::backend::{Backend, Cost, In, Out, View, ViewMut, cost};
use crate::error::Result;

/// y = x · rstd · weight, rstd = 1 / √(mean(x²) + eps).
pub struct RmsNorm<'a, B: Backend> {
    /// [rows, width]
    pub x: In<'a, B>,
    /// \[width\]
    pub weight: In<'a, B>,
    /// [rows, width]
    pub y: Out<'a, B>,
    /// \[rows\], kept for backward.
    pub rstd: Option<ViewMut<'a, B, f32>>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<B: Backend> Operator<B> for RmsNorm<'_, B> {
    const NAME: &'static str = "rmsnorm";

    fn check(&self) {
        let (len, width) = (self.x.len(), self.weight.len());
        assert!(width > 0 && len.is_multiple_of(width) && self.y.len() == len, "{len} elements in rows of {width}");
        assert!(self.rstd.as_ref().is_none_or(|rstd| rstd.len() == len / width));
    }

    fn cost(&self) -> Cost {
        let kept = self.rstd.as_ref().map_or(0, ViewMut::len);
        cost::rmsnorm(self.x.len(), self.weight.len(), size_of::<B::Float>()) + Cost::moved(kept * size_of::<f32>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.rmsnorm(self)
    }
}

/// Gradients of [`RmsNorm`]: dx = rstd·(dy∘weight − x·rstd²·mean(dy∘weight∘x)) (+ dx), dweight = Σ_rows dy∘x·rstd
/// (+ dweight).
pub struct RmsNormBackward<'a, B: Backend> {
    /// [rows, width]
    pub dy: In<'a, B>,
    /// [rows, width]
    pub x: In<'a, B>,
    /// \[width\]
    pub weight: In<'a, B>,
    /// \[rows\], of the forward pass.
    pub rstd: View<'a, B, f32>,
    /// [rows, width]
    pub dx: Option<Out<'a, B>>,
    /// \[width\]
    pub dweight: Option<ViewMut<'a, B, B::Grad>>,
    /// Adds to what `dx` holds: the gradient of the residual path.
    pub accumulate_dx: bool,
    /// Adds to what `dweight` holds.
    pub accumulate_dweight: bool,
}

impl<B: Backend> Operator<B> for RmsNormBackward<'_, B> {
    const NAME: &'static str = "rmsnorm_backward";

    fn check(&self) {
        let (len, width) = (self.x.len(), self.weight.len());
        assert!(width > 0, "rows of nothing");
        assert_eq!([self.dy.len(), self.rstd.len() * width], [len; 2], "rows of {width}");
        assert!(self.dx.as_ref().is_none_or(|dx| dx.len() == len));
        assert!(self.dweight.as_ref().is_none_or(|dweight| dweight.len() == width));
    }

    fn cost(&self) -> Cost {
        let wanted =
            cost::NormGradients { dx: self.dx.as_ref().map(|_| self.accumulate_dx), dweight: self.dweight.is_some() };
        cost::rmsnorm_backward(self.x.len(), self.weight.len(), wanted, size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.rmsnorm_backward(self)
    }
}
