//! Files of a model: `config.json`, safetensors, tokenizer, chat template; and outputs that appear whole.

pub mod chat;
pub mod config;
pub mod files;
mod input;
pub mod output;
pub mod rope;
pub mod safetensors;
pub mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use config::{ModelConfig, Rope, RopeScaling};
pub use files::ModelDir;
pub use output::{OutputDir, write_atomic};
pub use rope::rope_table;
pub use tokenizer::{DecodeStream, Tokenizer};
