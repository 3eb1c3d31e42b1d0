//! Files: bounded reads of untrusted inputs, JSON, safetensors, atomic outputs.

mod apart;
pub(crate) mod file;
pub(crate) mod input;
pub(crate) mod json;
pub(crate) mod names;
mod output;
mod owned;
pub mod safetensors;
pub(crate) mod unfinished;

pub use apart::{check_apart, check_not_in, lies_in};
pub use file::check_file;
pub use output::{IfExists, OutputDir, is_in_place, write_atomic};
pub(crate) use output::{remove, sync_dir, write_first};
