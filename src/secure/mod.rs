//! The method.
mod demo_model;
mod tuning;
pub use demo_model::{DEMO_MAX_LENGTH, DEMO_SEED, Stage, make_tiny_model};
pub use tuning::*;
