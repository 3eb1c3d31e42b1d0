//! Training conversations in the layouts alpaca, sharegpt, messages and prompt-completion.

use super::jsonl::{JsonLines, Line, kind, short};
use crate::error::Result;
use crate::model::Message;
use serde_json::{Map, Value};
use std::path::Path;

const LAYOUTS: &str = "alpaca (`instruction`, `output`, optionally `input`), sharegpt (`conversations`), messages \
                       (`messages`) or prompt-completion (`prompt`, `completion`)";

/// A training conversation: an optional system message, then user and assistant in turn, ending with the assistant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// Roles are `system`, `user`, `assistant`, `tool`; each says by [`Message::training`] whether it is learnt.
    pub messages: Vec<Message>,
    /// Declarations of tools, as JSON schemas, for the template; none if empty.
    pub tools: Vec<Value>,
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, tools: Vec::new() }
    }
}

impl Conversation {
    /// Reads a JSONL file of conversations; its lines may be of different layouts.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] for the first malformed line; [`crate::error::Error::Io`].
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        JsonLines::open(path)?.parse_all(Self::from_line)
    }

    /// Parses one line; its keys tell the layout:
    ///
    /// - alpaca: `instruction`, `output`, and optionally `input`, which is appended to the instruction after a blank
    ///   line;
    /// - sharegpt: `conversations: [{"from": "human", "value": …}, {"from": "gpt", "value": …}]`;
    /// - messages: `messages: [{"role": "user", "content": …}, …]`, the content a string or a list of text parts;
    /// - prompt-completion: `prompt`, `completion`, each a string or a list of messages.
    ///
    /// Other keys are ignored, and an empty system message is dropped.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the keys match no layout or several, or a user or assistant turn is empty
    /// or out of turn.
    pub fn from_line(line: &Line) -> Result<Self> {
        let has = |key| line.get(key).is_some();
        let alpaca = has("instruction") && has("output");
        let sharegpt = has("conversations");
        let messages = has("messages");
        let completion = has("prompt") && has("completion");
        let turns = match (alpaca, sharegpt, messages, completion) {
            (true, false, false, false) => alpaca_turns(line)?,
            (false, true, false, false) => turns(line, "conversations", "from", "value")?,
            (false, false, true, false) => turns(line, "messages", "role", "content")?,
            (false, false, false, true) => {
                let mut all = side(line, "prompt", "user")?;
                all.extend(side(line, "completion", "assistant")?);
                all
            }
            (false, false, false, false) => {
                return Err(line.error(format!("the keys {}", line.keys()), format!("the keys of {LAYOUTS}")));
            }
            _ => {
                let found = format!("keys of more than one layout: {}", line.keys());
                return Err(line.error(found, format!("the keys of only one of {LAYOUTS}")));
            }
        };
        Ok(checked(line, turns)?.into())
    }
}

fn alpaca_turns(line: &Line) -> Result<Vec<Message>> {
    let instruction = line.text("instruction")?;
    let question = match line.get("input") {
        None => instruction.to_string(),
        Some(Value::String(input)) if input.trim().is_empty() => instruction.to_string(),
        Some(_) => format!("{instruction}\n\n{}", line.text("input")?),
    };
    Ok(vec![Message::new("user", question), Message::new("assistant", line.text("output")?)])
}

/// `prompt` or `completion` of a line: a string, or a list of messages.
fn side(line: &Line, key: &str, role: &str) -> Result<Vec<Message>> {
    match line.get(key) {
        Some(Value::Array(_)) => turns(line, key, "role", "content"),
        _ => Ok(vec![Message::new(role, line.text(key)?)]),
    }
}

fn turns(line: &Line, key: &str, role_key: &str, content_key: &str) -> Result<Vec<Message>> {
    let expected = || format!("a list of {{\"{role_key}\": …, \"{content_key}\": …}}");
    let Some(Value::Array(list)) = line.get(key) else {
        let found = line.get(key).map_or("null", kind);
        return Err(line.error(format!("`{key}` is {found}"), expected()));
    };
    let turn = |(i, value): (usize, &Value)| {
        let place = format!("{key}[{i}]");
        let Value::Object(fields) = value else {
            return Err(line.error(format!("`{place}` is {}", kind(value)), expected()));
        };
        let role = match fields.get(role_key) {
            Some(Value::String(role)) => known_role(role).ok_or_else(|| {
                let found = format!("`{place}.{role_key}` is \"{}\"", short(role));
                line.error(found, "system, user (human) or assistant (gpt)")
            })?,
            other => {
                let found = format!("`{place}.{role_key}` is {}", other.map_or("missing", kind));
                return Err(line.error(found, expected()));
            }
        };
        Ok(Message::new(role, content(line, &place, fields, content_key)?))
    };
    list.iter().enumerate().map(turn).collect()
}

fn known_role(role: &str) -> Option<&'static str> {
    match role {
        "system" => Some("system"),
        "user" | "human" => Some("user"),
        "assistant" | "gpt" | "model" | "chatgpt" => Some("assistant"),
        _ => None,
    }
}

/// A string, or the concatenated text parts of a list.
fn content(line: &Line, place: &str, fields: &Map<String, Value>, key: &str) -> Result<String> {
    let expected = "a string, or a list of {\"type\": \"text\", \"text\": …}";
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts
            .iter()
            .enumerate()
            .map(|(i, part)| match (part.get("type").and_then(Value::as_str), part.get("text")) {
                (None | Some("text"), Some(Value::String(text))) => Ok(text.as_str()),
                (other, _) => {
                    let what = other.map_or_else(|| kind(part).to_string(), |t| format!("of type \"{}\"", short(t)));
                    Err(line.error(format!("`{place}.{key}[{i}]` is {what}"), expected))
                }
            })
            .collect(),
        other => Err(line.error(format!("`{place}.{key}` is {}", other.map_or("missing", kind)), expected)),
    }
}

fn checked(line: &Line, mut messages: Vec<Message>) -> Result<Vec<Message>> {
    messages.retain(|m| m.role != "system" || !m.content.trim().is_empty());
    let system = messages.first().is_some_and(|m| m.role == "system");
    let turns = messages.get(usize::from(system)..).unwrap_or_default();
    let order = "an optional system message, then user and assistant in turn, ending with the assistant";
    for (i, turn) in turns.iter().enumerate() {
        let due = if i % 2 == 0 { "user" } else { "assistant" };
        if turn.role != due {
            return Err(line.error(format!("turn {} has the role {}, not {due}", i + 1, turn.role), order));
        }
        if turn.content.trim().is_empty() {
            return Err(line.error(format!("turn {} ({due}) is empty", i + 1), "text in every turn"));
        }
    }
    match turns.last() {
        None => Err(line.error("no turns", order)),
        Some(last) if last.role != "assistant" => Err(line.error("the last turn is the user's", order)),
        Some(_) => Ok(messages),
    }
}
