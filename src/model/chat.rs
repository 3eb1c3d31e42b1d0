//! Chat templates.

use crate::error::Result;

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
}

/// A model's chat template.
pub struct ChatTemplate {}

impl ChatTemplate {
    /// The text that the model sees. `generation_prompt` ends it with the assistant's header.
    pub fn render(&self, _messages: &[Message], _generation_prompt: bool) -> Result<String> {
        todo!()
    }
}
