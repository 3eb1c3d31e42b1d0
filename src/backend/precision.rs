//! What weights, gradients and moments are kept in.

use super::FloatElement;
use half::bf16;

/// Precision of weights and activations, as it is asked for.
#[derive(
    schemars::JsonSchema,
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// bf16 on a GPU; on a CPU, where the model is stored in bf16 and there are instructions for it, else f32
    #[default]
    Auto,
    /// f32, on a CPU
    F32,
    /// bf16 with f32 sums
    Bf16,
}

/// What gradients and moments of bf16 weights are kept in.
pub trait Precision: Send + Sync + 'static {
    /// Weight gradients.
    type Grad: FloatElement;
    /// AdamW's moments.
    type Moment: FloatElement;
}

/// f32 gradients and moments: 12 bytes a trained parameter beside its weight.
pub struct F32State;

impl Precision for F32State {
    type Grad = f32;
    type Moment = f32;
}

/// bf16 gradients and moments, rounded stochastically: 6 bytes a trained parameter beside its weight.
pub struct Bf16State;

impl Precision for Bf16State {
    type Grad = bf16;
    type Moment = bf16;
}
