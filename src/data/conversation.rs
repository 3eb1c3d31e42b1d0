//! Training conversations in the four layouts in use.

use super::jsonl::{JsonLines, Line, kind, short};
use crate::error::Result;
use crate::model::Message;
use serde_json::{Map, Value};
use std::path::Path;

const LAYOUTS: &str = "alpaca (`instruction`, `output` and perhaps `input`), sharegpt (`conversations`), messages \
                       (`messages`) or prompt-completion (`prompt`, `completion`)";

/// A conversation to learn from: perhaps a system message, then user and assistant in turn, the assistant last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// Roles are `system`, `user`, `assistant`.
    pub messages: Vec<Message>,
}

impl Conversation {
    /// All conversations of a JSONL file, whose lines may be of different layouts.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names the first line that is no conversation; [`crate::error::Error::Io`].
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        JsonLines::open(path)?.parse_all(Self::from_line)
    }

    /// One line in any of the layouts, told apart by its keys:
    ///
    /// - alpaca: `instruction`, `output`, and perhaps `input`, which goes below the instruction after a blank line;
    /// - sharegpt: `conversations: [{"from": "human", "value": …}, {"from": "gpt", "value": …}]`;
    /// - messages: `messages: [{"role": "user", "content": …}, …]`, the content a string or a list of text parts;
    /// - prompt-completion: `prompt`, `completion`, each a string or a list of messages.
    ///
    /// Other keys are ignored; keys of two layouts, or of none, are an error. So is an empty user or assistant turn;
    /// an empty system message is left out.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names line and key.
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
                return Err(line.error(found, format!("the keys of just one of {LAYOUTS}")));
            }
        };
        Ok(Self { messages: checked(line, turns)? })
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

/// One side of a prompt-completion line: text, or messages.
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

/// A string, or the text parts of a list joined as they are.
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
    let order = "perhaps a system message, then user and assistant in turn, the assistant last";
    for (i, turn) in turns.iter().enumerate() {
        let due = if i % 2 == 0 { "user" } else { "assistant" };
        if turn.role != due {
            return Err(line.error(format!("turn {} is of the {}, not of the {due}", i + 1, turn.role), order));
        }
        if turn.content.trim().is_empty() {
            return Err(line.error(format!("turn {} ({due}) is empty", i + 1), "text in every turn"));
        }
    }
    match turns.last() {
        None => Err(line.error("no turns", order)),
        Some(last) if last.role != "assistant" => Err(line.error("the last turn is of the user", order)),
        Some(_) => Ok(messages),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Vec<(String, String)>> {
        let all = JsonLines::new(line.as_bytes(), "t.jsonl").parse_all(Conversation::from_line)?;
        Ok(all.into_iter().flat_map(|c| c.messages).map(|m| (m.role, m.content)).collect())
    }

    fn turns(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(r, c)| (r.to_string(), c.to_string())).collect()
    }

    fn error(line: &str) -> String {
        read(line).unwrap_err().to_string()
    }

    #[test]
    fn all_layouts_give_the_same_conversation() {
        let expected = turns(&[("user", "Q"), ("assistant", "A")]);
        for line in [
            r#"{"instruction":"Q","input":"","output":"A","text":"unused"}"#,
            r#"{"instruction":"Q","input":null,"output":"A"}"#,
            r#"{"conversations":[{"from":"system","value":""},{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]}"#,
            r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"prompt":"Q"}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"Q"}]},{"role":"assistant","content":"A"}]}"#,
            r#"{"prompt":"Q","completion":"A"}"#,
            r#"{"prompt":[{"role":"user","content":"Q"}],"completion":[{"role":"assistant","content":"A"}]}"#,
        ] {
            assert_eq!(read(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn an_alpaca_input_goes_below_the_instruction() {
        let read = read(r#"{"instruction":"Translate.","input":"chat","output":"cat"}"#).unwrap();
        assert_eq!(read, turns(&[("user", "Translate.\n\nchat"), ("assistant", "cat")]));
    }

    #[test]
    fn a_file_may_mix_layouts() {
        let read = read("{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"instruction\":\"c\",\"output\":\"d\"}").unwrap();
        assert_eq!(read.len(), 4);
    }

    #[test]
    fn text_parts_are_joined() {
        let line = r#"{"messages":[{"role":"user","content":[{"text":"a"},{"type":"text","text":"b"}]},
            {"role":"assistant","content":"c"}]}"#
            .replace('\n', " ");
        assert_eq!(read(&line).unwrap()[0].1, "ab");
    }

    #[test]
    fn wrong_lines_say_what_is_wrong() {
        let cases = [
            (r#"{"question":"Q","answer":"A"}"#, "[`question`, `answer`]; expected the keys of alpaca"),
            (r#"{"prompt":"Q"}"#, "prompt-completion (`prompt`, `completion`)"),
            (r#"{"prompt":"Q","completion":"A","messages":[]}"#, "keys of more than one layout"),
            (r#"{"messages":"hello"}"#, "`messages` is a string"),
            (r#"{"messages":[]}"#, "no turns"),
            (r#"{"messages":[3]}"#, "`messages[0]` is a number"),
            (r#"{"messages":[{"role":"tool","content":"x"}]}"#, "`messages[0].role` is \"tool\""),
            (r#"{"messages":[{"content":"x"}]}"#, "`messages[0].role` is missing"),
            (r#"{"messages":[{"role":"user","content":null}]}"#, "`messages[0].content` is null"),
            (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, "of type \"image_url\""),
            (r#"{"messages":[{"role":"user","content":"x"}]}"#, "the last turn is of the user"),
            (r#"{"messages":[{"role":"assistant","content":"x"}]}"#, "turn 1 is of the assistant, not of the user"),
            (r#"{"instruction":"Q","output":" "}"#, "an empty `output`"),
            (r#"{"instruction":"Q","output":7}"#, "`output` is a number"),
        ];
        for (line, expected) in cases {
            let message = error(line);
            assert!(message.starts_with("t.jsonl:1: found") && message.contains(expected), "{message}");
        }
        let late = r#"{"messages":[{"role":"user","content":"x"},{"role":"system","content":"y"}]}"#;
        assert!(error(late).contains("turn 2 is of the system"));
    }
}
