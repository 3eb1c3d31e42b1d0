//! Model directories: `config.json`, weights, tokenizer, chat template.

pub mod adapter;
pub mod chat;
pub mod chat_files;
mod clock;
pub mod config;
pub mod files;
pub mod rope;
mod stored;
pub mod tokenizer;

pub use adapter::{Adapter, AdapterShape};
pub use chat::{ChatTemplate, Ending, Message, Rendered, Training};
pub use chat_files::ChatFiles;
pub use clock::Clock;
pub use config::{ModelConfig, Rope, RopeScaling};
pub use files::ModelDir;
pub use rope::rope_table;
pub use stored::StoredAs;
pub use tokenizer::{Added, DecodeStream, Tokenizer, TokenizerConfig};
