//! Cross-entropy of next tokens.

use super::Operator;
use crate::backend::{Backend, Cost, Out, View, ViewMut, cost};
use crate::error::Result;

/// The target of a row without a loss.
pub const IGNORE: u32 = u32::MAX;

/// Most entries of a row of [`LossTerms::ids`].
pub const TEACHER_TOKENS: usize = 256;

/// Terms of the loss beside the cross-entropy, row by row. They change no value of `losses`, and a row's gradient to
/// scale · (w·(softmax − onehot(target)) + distil·(Σ probs·softmax − probs)):
///
/// - w = 2(1 − σ(beta·(reference − loss))) makes it the gradient of −2/beta · log σ(beta·(reference − loss)), the
///   token-wise constrained loss of Qi et al. (arXiv 2406.05946); 1 where beta is 0;
/// - the second part is the gradient of distil · KL(probs ‖ softmax).
pub struct LossTerms<'a, B: Backend> {
    /// \[rows\]: −log π₀(target) of the reference model, in nats.
    pub reference: View<'a, B, f32>,
    /// \[rows\]: from 0.
    pub beta: View<'a, B, f32>,
    /// [rows, k], k from 0 to [`TEACHER_TOKENS`]: token ids, each once in a row.
    pub ids: View<'a, B, u32>,
    /// [rows, k]: their probabilities; an entry of 0 is left out. The gradient is linear in them, whatever their sum and
    /// signs.
    pub probs: View<'a, B, f32>,
    /// Weight of the divergence.
    pub distil: f32,
}

impl<B: Backend> LossTerms<'_, B> {
    /// Entries of a row of `ids`.
    pub fn width(&self) -> usize {
        self.ids.len() / self.beta.len().max(1)
    }
}

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
    /// Further terms of the loss, which need a `scale`; `None`: the cross-entropy alone.
    pub terms: Option<LossTerms<'a, B>>,
}

impl<B: Backend> Operator<B> for CrossEntropy<'_, B> {
    const NAME: &'static str = "cross_entropy";

    fn check(&self) {
        let (rows, vocab) = (self.targets.len(), self.vocab);
        assert!(vocab > 0 && self.logits.len() == rows * vocab && self.losses.len() == rows, "{rows} × {vocab}");
        if let Some(terms) = &self.terms {
            let (width, entries) = (terms.width(), terms.ids.len());
            assert!(self.scale.is_some() && [terms.reference.len(), terms.beta.len()] == [rows; 2]);
            assert!(width <= TEACHER_TOKENS.min(vocab) && entries == rows * width && terms.probs.len() == entries);
        }
    }

    fn cost(&self) -> Cost {
        let float = size_of::<B::Float>();
        let terms = self.terms.as_ref().map_or(0, |terms| 8 * (terms.beta.len() + terms.ids.len()));
        let logits = match self.scale {
            Some(_) => cost::cross_entropy_gradient(self.logits.len(), float),
            None => cost::cross_entropy(self.logits.len(), float),
        };
        logits + Cost::moved(terms)
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.cross_entropy(self)
    }
}
