//! Files of a model: `config.json`, safetensors, tokenizer, chat template.

pub mod chat;
pub mod config;
pub mod files;
pub mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use config::{ModelConfig, Rope, RopeScaling};
pub use files::ModelDir;
pub use tokenizer::Tokenizer;
/// stub
pub fn rope_table(_c: &ModelConfig, _p: usize) -> Vec<f32> {
    todo!()
}
