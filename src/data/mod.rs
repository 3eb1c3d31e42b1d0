//! Training conversations, security prompts and tasks; loss masks, packing, and a loader with an exact position.

mod answer;
mod chat;
mod conversation;
mod example;
mod jsonl;
mod loader;
mod packing;
mod security;
mod task;
pub mod tiny;

pub use chat::Chat;
pub use conversation::Conversation;
pub use example::{DataSize, Example, Examples, Part};
pub use jsonl::{JsonLines, Line, MAX_LINE_BYTES};
pub use loader::{BatchSize, Loader, LoaderOptions, LoaderPosition, mix};
pub use security::{Label, SecurityPrompt, Split};
pub use task::{Match, Task};
