//! Model directories: `config.json`, weights, tokenizer, chat template.

pub mod adapter;
pub mod chat;
pub mod config;
pub mod files;
pub mod rope;
pub mod tokenizer;

pub use adapter::{Adapter, AdapterShape};
pub use chat::{ChatTemplate, Message, Training};
pub use config::{ModelConfig, Rope, RopeScaling};
pub use files::ModelDir;
pub use rope::rope_table;
pub use tokenizer::{DecodeStream, Tokenizer};
