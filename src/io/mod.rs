//! Files: bounded reads of untrusted inputs, JSON, safetensors, atomic outputs.

pub(crate) mod input;
pub(crate) mod json;
mod output;
pub mod safetensors;

pub use output::{IfExists, OutputDir, write_atomic};
pub(crate) use output::{remove, sync_dir};
