//! Files: bounded reading of untrusted inputs, safetensors, JSON, and outputs that appear whole or not at all.

pub(crate) mod input;
pub(crate) mod json;
mod output;
pub mod safetensors;

pub use output::{OutputDir, write_atomic};
pub(crate) use output::{remove, sync_dir};
