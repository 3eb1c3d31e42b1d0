//! Training conversations, security prompts and tasks; loss masks, packing, and a loader with an exact position.

mod answer;
mod chat;
mod conversation;
mod example;
mod loader;
mod mixture;
mod packing;
mod rows;
mod security;
mod task;
pub mod tiny;

pub use chat::Chat;
pub use conversation::{Conversation, chat_prompt};
pub use example::{DataSize, Example, Examples, Part};
pub use loader::{Alternation, BatchSize, Loader, LoaderOptions, LoaderPosition};
pub use mixture::{Mixture, Pool, Redraw};
pub use rows::{Column, MAX_ROW_BYTES, Row, RowOptions, RowReader, SkippedRows};
pub(crate) use rows::{read_columns, write_columns};
pub use security::{Label, SecurityPrompt, Split};
pub use task::{Match, Task};
