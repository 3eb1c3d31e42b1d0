//! SwiGLU (Shazeer, arXiv 2002.05202).

use super::Operator;
use crate::backend::{Backend, Cost, In, Out, cost};
use crate::error::Result;

/// y = silu(gate) · up, silu(g) = g·σ(g); all of one length.
pub struct SwiGlu<'a, B: Backend> {
    /// [tokens, ffn]
    pub gate: In<'a, B>,
    /// [tokens, ffn]
    pub up: In<'a, B>,
    /// [tokens, ffn]
    pub y: Out<'a, B>,
}

impl<B: Backend> Operator<B> for SwiGlu<'_, B> {
    const NAME: &'static str = "swiglu";

    fn check(&self) {
        assert_eq!([self.gate.len(), self.up.len()], [self.y.len(); 2]);
    }

    fn cost(&self) -> Cost {
        cost::swiglu(self.y.len(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.swiglu(self)
    }
}

/// Gradients of [`SwiGlu`] in place: `gate` becomes dy·up·σ·(1 + gate·(1 − σ)), `up` becomes dy·silu(gate).
pub struct SwiGluBackward<'a, B: Backend> {
    /// [tokens, ffn]
    pub gate: Out<'a, B>,
    /// [tokens, ffn]
    pub up: Out<'a, B>,
    /// [tokens, ffn]
    pub dy: In<'a, B>,
}

impl<B: Backend> Operator<B> for SwiGluBackward<'_, B> {
    const NAME: &'static str = "swiglu_backward";

    fn check(&self) {
        assert_eq!([self.gate.len(), self.up.len()], [self.dy.len(); 2]);
    }

    fn cost(&self) -> Cost {
        cost::swiglu_backward(self.dy.len(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.swiglu_backward(self)
    }
}
