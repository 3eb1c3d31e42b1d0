//! Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in `transformers`.

use super::Operator;
use crate::backend::{Backend, Cost, Out, View, cost};
use crate::error::Result;

/// Rotates every head in place: (a, b) becomes (a·cos − b·sin, b·cos + a·sin), a and b its halves.
pub struct Rope<'a, B: Backend> {
    /// [tokens, heads·head_dim]
    pub x: Out<'a, B>,
    /// [longest document, head_dim]: cosines of the head_dim/2 frequencies, then sines, attention factor included.
    pub table: View<'a, B, f32>,
    /// \[tokens\]: rows of `table`.
    pub positions: View<'a, B, u32>,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Rotates back: the gradient.
    pub inverse: bool,
}

impl<B: Backend> Rope<'_, B> {
    /// Heads of a token.
    pub fn heads(&self) -> usize {
        self.x.len() / (self.positions.len() * self.head_dim).max(1)
    }
}

impl<B: Backend> Operator<B> for Rope<'_, B> {
    const NAME: &'static str = "rope";

    fn check(&self) {
        let head_dim = self.head_dim;
        assert!(head_dim > 0 && head_dim.is_multiple_of(2) && self.table.len().is_multiple_of(head_dim));
        assert_eq!(self.x.len(), self.positions.len() * self.heads() * head_dim, "heads of {head_dim}");
    }

    fn cost(&self) -> Cost {
        cost::rope(self.x.len(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.rope(self)
    }
}
