//! A decoder: forward pass with hidden states, backward pass by hand, key-value cache and generation, the perturbed
//! sweep. Written once, over [`crate::backend::Backend`].

mod backward;
mod batch;
mod buckets;
mod cost;
mod decoder;
mod forward;
mod generate;
mod gradients;
mod lora;
mod losses;
mod pool;
mod prefix;
mod readout;
mod sweep;

pub use batch::{Batch, TokenTerms};
pub use buckets::{BUCKET_BYTES, buckets};
pub use cost::{Beside, MinimumCost, Plan, RankStep, Speeds, Workload, roofline_seconds};
pub use decoder::{Decoder, Parameter};
pub use generate::{Finish, GenerateOptions, Generation};
pub use gradients::{FinalGradients, GradientOptions, Gradients};
pub use lora::{Lora, lora_rank};
pub use losses::Losses;
pub use sweep::{Member, NoiseKind, Readout, SweepOptions};
