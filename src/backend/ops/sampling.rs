//! The next token from a row of logits.

use super::Operator;
use crate::backend::{Backend, Cost, In, View, ViewMut, cost};
use crate::error::Result;
use crate::options::{from_zero, positive_share};

/// How a token is sampled from a row of logits; nucleus sampling as in Holtzman et al., arXiv 1904.09751.
#[derive(Clone, Copy, Debug, PartialEq, clap::Args)]
pub struct Sampling {
    /// Sampling temperature; 0 = greedy (the first of equals)
    #[arg(long, value_parser = from_zero::<f32>, default_value_t = 0.0)]
    pub temperature: f32,
    /// Nucleus sampling: draw from the smallest set of tokens whose probability reaches this; 1 = all
    #[arg(long, value_parser = positive_share::<f32>, default_value_t = 1.0)]
    pub top_p: f32,
}

impl Sampling {
    /// log₂e / temperature, the factor on logits that makes powers of 2 of exponentials. Finite.
    pub(in crate::backend) fn exponent_scale(self) -> f32 {
        ((std::f64::consts::LOG2_E / self.temperature as f64) as f32).min(f32::MAX)
    }
}

/// Draws a token for each row. Every backend draws the same token from the same logits.
pub struct Sample<'a, B: Backend> {
    /// [rows, vocab]
    pub logits: In<'a, B>,
    /// \[rows\] in [0, 1): the draws; unused where greedy.
    pub uniforms: View<'a, B, f32>,
    /// \[rows\]
    pub tokens: ViewMut<'a, B, u32>,
    /// Columns of the logits.
    pub vocab: usize,
    /// Temperature and nucleus.
    pub sampling: Sampling,
}

impl<B: Backend> Operator<B> for Sample<'_, B> {
    const NAME: &'static str = "sample";

    fn check(&self) {
        let (rows, vocab) = (self.tokens.len(), self.vocab);
        assert!(vocab > 0 && self.logits.len() == rows * vocab && self.uniforms.len() == rows, "{rows} × {vocab}");
    }

    fn cost(&self) -> Cost {
        let (logits, float) = (self.logits.len(), size_of::<B::Float>());
        if self.sampling.temperature > 0.0 {
            cost::sample_nucleus(logits, float)
        } else {
            cost::sample_greedy(logits, float)
        }
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.sample(self)
    }
}
