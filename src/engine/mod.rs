//! A decoder: forward with taps, backward by hand, key-value cache and generation, the perturbed sweep.
//! Written once, over [`crate::backend::Backend`].

mod backward;
mod batch;
mod decoder;
mod floor;
mod fold;
mod forward;
mod generate;
mod gradients;
mod lora;
mod losses;
mod plan;
mod pool;
mod readout;
mod sweep;

pub use batch::Batch;
pub use decoder::{Decoder, Parameter};
pub use floor::{Floor, light_seconds};
pub use generate::{Finish, GenerateOptions, Generation};
pub use gradients::{GradientOptions, Gradients};
pub use lora::Lora;
pub use losses::Losses;
pub use plan::{Plan, Workload};
pub use sweep::{Member, NoiseKind, Readout, SweepOptions};
