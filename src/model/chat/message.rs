//! Messages of a conversation, as data files hold them and as templates see them.

use minijinja::value::{Serde, Value};
use serde_json::Map;

/// Names under which data sets hold the thinking of an answer; templates read the first.
const THINKING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "Stored")]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text of the message; empty where it has none.
    pub content: String,
    /// What else templates read: `reasoning_content`, `tool_calls`, `tool_call_id`, `name`. A `content` here replaces
    /// the text for the template: null beside tool calls, or a list of parts.
    pub fields: Map<String, serde_json::Value>,
    /// Whether training learns it; of no effect unless the role is `assistant`.
    pub training: Training,
}

/// Whether training learns an assistant's message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Training {
    /// Its tokens count in the loss.
    #[default]
    Trained,
    /// It is context for later turns.
    Context,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into(), fields: Map::new(), training: Training::Trained }
    }

    /// The message as transformers gives it to a template: thinking is under `reasoning_content` whatever its name, and
    /// also under `thinking`.
    pub(super) fn to_template(&self) -> Value {
        let mut fields = Map::new();
        let thinking = THINKING.iter().find_map(|name| self.fields.get(*name).filter(|value| !value.is_null()));
        fields.insert("role".into(), self.role.as_str().into());
        fields.insert("content".into(), self.content.as_str().into());
        if let Some(thinking) = thinking {
            fields.insert("thinking".into(), thinking.clone());
        }
        fields.extend(self.fields.clone());
        if let Some(thinking) = thinking {
            fields.insert(THINKING[0].into(), thinking.clone());
        }
        Value::from(Serde(fields))
    }
}

/// A message as JSON.
#[derive(serde::Deserialize)]
struct Stored {
    role: String,
    #[serde(flatten)]
    fields: Map<String, serde_json::Value>,
}

impl TryFrom<Stored> for Message {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        let mut fields = stored.fields;
        let content = match fields.get("content") {
            Some(serde_json::Value::String(text)) => {
                let text = text.clone();
                fields.remove("content");
                text
            }
            Some(serde_json::Value::Array(parts)) => {
                let text = |part: &serde_json::Value| part.get("text").and_then(|t| t.as_str()).map(str::to_owned);
                parts.iter().map(text).collect::<Option<String>>().ok_or("a content part without text")?
            }
            None | Some(serde_json::Value::Null) if fields.contains_key("tool_calls") => String::new(),
            _ => return Err("`content` is no text".into()),
        };
        Ok(Self { content, fields, ..Self::new(&stored.role, "") })
    }
}
