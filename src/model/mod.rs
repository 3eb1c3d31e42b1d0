//! Files of a model: `config.json`, safetensors, tokenizer, chat template.

pub mod config;

pub use config::{ModelConfig, Rope, RopeScaling};
