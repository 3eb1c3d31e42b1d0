//! A decoder: forward with taps, backward by hand, key-value cache and generation, the perturbed sweep.
//! Written once, over [`crate::backend::Backend`].

mod batch;
mod decoder;
mod gradients;

pub use batch::Batch;
pub use decoder::{Decoder, Parameter};
pub use gradients::Gradients;
