//! The method.
mod tuning;
pub use tuning::*;
