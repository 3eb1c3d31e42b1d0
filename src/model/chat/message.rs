//! Messages of a conversation, as data files hold them and as templates see them.

use minijinja::value::{Serde, Value};
use serde_json::{Map, Value as Json};

/// Names under which data sets hold the thinking of an answer; templates read the first.
const THINKING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// How a template gets the arguments of tool calls that data hold as JSON text, as in OpenAI's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallArguments {
    /// As text.
    AsGiven,
    /// As the object that the text holds.
    AsObjects,
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "Stored")]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text of the message; empty where it has none.
    pub content: String,
    /// What else templates read: `reasoning_content`, `tool_calls`, `tool_call_id`, `name`. A `content` here is what the
    /// template sees in place of the text: a list of parts, or nothing at all for null.
    pub fields: Map<String, Json>,
    /// Whether it is trained on; of no effect unless the role is `assistant`.
    pub training: Training,
}

/// Whether an assistant's message is trained on.
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

    /// The message as transformers gives it to a template: without keys that are null, and with thinking under
    /// `reasoning_content` and `thinking`, whatever its name.
    pub(super) fn to_template(&self, arguments: CallArguments) -> Value {
        let mut fields = Map::new();
        fields.insert("role".into(), self.role.as_str().into());
        fields.insert("content".into(), self.content.as_str().into());
        let thinking = THINKING.iter().find_map(|name| self.fields.get(*name).filter(|value| !value.is_null()));
        if let Some(thinking) = thinking {
            fields.insert("thinking".into(), thinking.clone());
        }
        fields.extend(self.fields.clone());
        if let Some(thinking) = thinking {
            fields.insert(THINKING[0].into(), thinking.clone());
        }
        fields.retain(|_, value| !value.is_null());
        if arguments == CallArguments::AsObjects {
            text_arguments(&mut fields).for_each(|(arguments, object)| *arguments = object);
        }
        Value::from(Serde(fields))
    }

    /// What an answer says: its thinking, and its text.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let thinking = THINKING.iter().find_map(|name| self.fields.get(*name)?.as_str());
        thinking.into_iter().chain([self.content.as_str()])
    }

    /// The message with `blank` in place of its text, its thinking, and the names, texts and numbers of its tool calls.
    pub fn blanked(&self, blank: &str) -> Self {
        let mut message = self.clone();
        // Beside other fields, such as tool calls, an empty text makes templates go another way than any other.
        if !message.content.is_empty() || message.fields.is_empty() {
            message.content = blank.to_owned();
        }
        for name in THINKING.into_iter().chain(["content"]) {
            if let Some(value) = message.fields.get_mut(name) {
                blank_texts(value, blank);
            }
        }
        for call in calls(&mut message.fields) {
            for name in ["name", "arguments"] {
                if let Some(value) = call.get_mut(name) {
                    blank_texts(value, blank);
                }
            }
        }
        message
    }

    /// Whether the arguments of a tool call are JSON text.
    pub(super) fn has_text_arguments(&self) -> bool {
        self.fields.contains_key("tool_calls") && text_arguments(&mut self.fields.clone()).next().is_some()
    }

    /// Whether any text of the message holds `c`.
    pub fn holds(&self, c: char) -> bool {
        self.content.contains(c) || self.fields.values().any(|value| text_holds(value, c))
    }
}

/// The calls of tools among the fields of a message: their `function`, where they have one.
fn calls(fields: &mut Map<String, Json>) -> impl Iterator<Item = &mut Json> {
    let calls = fields.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten();
    calls.map(|call| match call.get("function") {
        Some(_) => &mut call["function"],
        None => call,
    })
}

/// Arguments of calls that are the JSON text of an object, each with that object.
fn text_arguments(fields: &mut Map<String, Json>) -> impl Iterator<Item = (&mut Json, Json)> {
    calls(fields).filter_map(|call| {
        let arguments = call.get_mut("arguments")?;
        let object = serde_json::from_str::<Map<String, Json>>(arguments.as_str()?).ok()?;
        Some((arguments, Json::Object(object)))
    })
}

/// Replaces every number, and every string that is not empty and not the `type` of a part.
fn blank_texts(value: &mut Json, blank: &str) {
    match value {
        Json::String(text) if text.is_empty() => {}
        Json::String(_) | Json::Number(_) => *value = Json::String(blank.to_owned()),
        Json::Array(items) => items.iter_mut().for_each(|item| blank_texts(item, blank)),
        Json::Object(map) => {
            map.iter_mut().filter(|(name, _)| *name != "type").for_each(|(_, v)| blank_texts(v, blank))
        }
        _ => {}
    }
}

fn text_holds(value: &Json, c: char) -> bool {
    match value {
        Json::String(text) => text.contains(c),
        Json::Array(items) => items.iter().any(|item| text_holds(item, c)),
        Json::Object(map) => map.iter().any(|(name, value)| name.contains(c) || text_holds(value, c)),
        _ => false,
    }
}

/// A message as JSON.
#[derive(serde::Deserialize)]
struct Stored {
    role: String,
    #[serde(flatten)]
    fields: Map<String, Json>,
}

impl TryFrom<Stored> for Message {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        let mut fields = stored.fields;
        let content = match fields.get("content") {
            Some(Json::String(text)) => {
                let text = text.clone();
                fields.remove("content");
                text
            }
            Some(Json::Array(parts)) => {
                let text = |part: &Json| part.get("text").and_then(|t| t.as_str()).map(str::to_owned);
                parts.iter().map(text).collect::<Option<String>>().ok_or("a content part without text")?
            }
            None | Some(Json::Null) if fields.contains_key("tool_calls") => {
                fields.insert("content".into(), Json::Null);
                String::new()
            }
            _ => return Err("`content` is no text".into()),
        };
        Ok(Self { content, fields, ..Self::new(&stored.role, "") })
    }
}
