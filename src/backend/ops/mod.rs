//! The operators: each a struct of named arguments, with their shapes, the formula, the checks and the cost.
//!
//! [`Operator::run`] calls an operator on any backend; the methods of [`Backend`] hold the arithmetic and nothing more.
//! Every tensor is dense and row-major; `tokens` counts the rows of a packed batch, in which documents follow one
//! another without padding. An argument of the wrong shape is a bug of the caller, and panics.

mod adamw;
mod attention;
mod cross_entropy;
mod embedding;
mod linear;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod swiglu;

pub use adamw::{
    AdamW, AdamWMasked, AdamWModule, MeanRow, ProximalGradients, ProximalRow, Rounding, SumSquares, UpdateMeans,
};
pub use attention::{Attention, AttentionBackward, AttentionDecode, AttentionShape, DecodeSpans, Documents};
pub use cross_entropy::{CrossEntropy, IGNORE, LossTerms, TEACHER_TOKENS};
pub use embedding::{AddRows, EmbeddingBackward, GatherRows, ScatterRows};
pub use linear::{
    Epilogue, GatedLinear, InputGradient, Linear, LinearBackwardBias, LinearBackwardInput, LinearBackwardInputEach,
    LinearBackwardWeight, LinearBackwardWeightEach, LinearEach, Projection, WeightGradient,
};
pub use perturb::{Direction, MoveAlong, NoiseKey, Perturb, SquaredNorm};
pub use rmsnorm::{RmsNorm, RmsNormBackward};
pub use rope::Rope;
pub use sampling::{Sample, Sampling};
pub use swiglu::{SwiGlu, SwiGluBackward};

pub use super::cost::LinearShape;
use super::{Backend, Cost, trace};
use crate::error::Result;

/// A call of an operator on backend `B`.
pub trait Operator<B: Backend>: Sized {
    /// The operator's name in traces and profiles.
    const NAME: &'static str;

    /// Checks the shapes.
    ///
    /// # Panics
    /// Where they do not fit one another.
    fn check(&self);

    /// Least bytes and FLOPs of the call.
    fn cost(&self) -> Cost;

    /// The backend's arithmetic, neither checked nor traced.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    fn launch(self, backend: &B) -> Result<()>;

    /// Checks the shapes and calls the backend, in a span of [`trace`] with the cost.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    ///
    /// # Panics
    /// Where shapes do not fit.
    fn run(self, backend: &B) -> Result<()> {
        self.check();
        let _span = trace::op(Self::NAME, || self.cost());
        self.launch(backend)
    }
}
