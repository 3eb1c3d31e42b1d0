//! Cross-entropy of next tokens.

use super::Operator;
use crate::backend::{Backend, Cost, Out, View, ViewMut, cost};
use crate::error::Result;

/// The target of a row without a loss.
pub const IGNORE: u32 = u32::MAX;

/// losses\[row\] = −log softmax(logits\[row\])[targets\[row\]], 0 where the target is [`IGNORE`].
pub struct CrossEntropy<'a, B: Backend> {
    /// [rows, vocab]; with `scale` they become scale · dloss/dlogits, 0 in ignored rows.
    pub logits: Out<'a, B>,
    /// \[rows\]: token ids, or [`IGNORE`].
    pub targets: View<'a, B, u32>,
    /// \[rows\]
    pub losses: ViewMut<'a, B, f32>,
    /// Columns of the logits.
    pub vocab: usize,
    /// Factor on the gradients; `None`: losses alone.
    pub scale: Option<f32>,
}

impl<B: Backend> Operator<B> for CrossEntropy<'_, B> {
    const NAME: &'static str = "cross_entropy";

    fn check(&self) {
        let (rows, vocab) = (self.targets.len(), self.vocab);
        assert!(vocab > 0 && self.logits.len() == rows * vocab && self.losses.len() == rows, "{rows} × {vocab}");
    }

    fn cost(&self) -> Cost {
        let float = size_of::<B::Float>();
        match self.scale {
            Some(_) => cost::cross_entropy_gradient(self.logits.len(), float),
            None => cost::cross_entropy(self.logits.len(), float),
        }
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.cross_entropy(self)
    }
}
