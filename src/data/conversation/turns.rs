//! Turns of a conversation as lists of objects.

use crate::data::rows::{Row, is_blank, kind, short};
use crate::error::Result;
use crate::model::{Message, Training};
use serde_json::{Map, Value, json};

/// Keys that say whether a turn is trained: OpenAI and Mistral have `weight`, axolotl `train` or `training`, ms-swift
/// and XTuner `loss`, LLaMA-Factory `loss_weight`.
const TRAINED: [&str; 6] = ["weight", "train", "training", "loss", "loss_weight", "trainable"];
/// Roles of an assistant's turn that is the JSON text of tool calls: of LLaMA-Factory and ms-swift.
const CALLS: [&str; 2] = ["function_call", "tool_call"];
/// Keys of a question and its answer that stand in one object of a list of turns: of XTuner and Capybara, of BELLE and MOSS.
const PAIRS: [(&str, &str); 2] = [("input", "output"), ("human", "assistant")];
/// Keys of a turn that change what it means, and what to write in their place.
const UNSUPPORTED: [(&str, &str); 9] = [
    ("train_detail", "`train` for the whole turn"),
    ("mask", "`weight` 0 or 1, or `train` false or true"),
    ("masked", "`weight` 0 or 1, or `train` false or true"),
    ("loss_mask", "`weight` 0 or 1, or `train` false or true"),
    ("prefix", "whole answers, without the beginning of one"),
    ("function_call", "`tool_calls`"),
    ("refusal", "the refusal's text as `content`"),
    ("images", "text alone: swat tunes language models"),
    ("audio", "text alone: swat tunes language models"),
];

/// The turns under `key`. Each has `role` and `content`, or `from` and `value`; `role_key` is the one that errors name.
pub(super) fn turns(row: &Row, key: &str, role_key: &str) -> Result<Vec<Message>> {
    let content_key = if role_key == "from" { "value" } else { "content" };
    let expected = || format!("a list of {{\"{role_key}\": …, \"{content_key}\": …}}");
    let value = row.get(key).map(parsed).unwrap_or_default();
    let Value::Array(list) = value else {
        return Err(row.error(format!("{} is {}", row.name(key), kind(&value)), expected()));
    };
    let turn = |(i, value): (usize, &Value)| {
        let place = format!("{key}[{i}]");
        let Value::Object(fields) = value else {
            return Err(row.error(format!("`{place}` is {}", kind(value)), expected()));
        };
        let other = if role_key == "from" { "role" } else { "from" };
        let has = |key: &str| fields.contains_key(key);
        match PAIRS.iter().find(|(question, answer)| has(question) && has(answer)) {
            Some(keys) if !has(role_key) && !has(other) => pair(row, &place, fields, *keys),
            _ => {
                let own = has(role_key) || !has(other);
                Ok(vec![turn(row, &place, fields, if own { role_key } else { other })?])
            }
        }
    };
    let turns: Vec<Vec<Message>> = list.iter().enumerate().map(turn).collect::<Result<_>>()?;
    Ok(turns.concat())
}

/// A question and its answer in one object, after a system message if there is one.
fn pair(row: &Row, place: &str, fields: &Map<String, Value>, (question, answer): (&str, &str)) -> Result<Vec<Message>> {
    let system = fields.get("system").filter(|value| !is_blank(value)).map(|_| ("system", "system"));
    let all = system.into_iter().chain([("user", question), ("assistant", answer)]);
    all.map(|(role, key)| Ok(Message::new(role, content(row, place, fields, key)?))).collect()
}

/// JSON text, such as a table's cell, as the list or object that it holds; other values as they are.
pub(super) fn parsed(value: &Value) -> Value {
    let text = value.as_str().map(str::trim).filter(|text| text.starts_with(['[', '{']));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_else(|| value.clone())
}

fn turn(row: &Row, place: &str, fields: &Map<String, Value>, role_key: &str) -> Result<Message> {
    let content_key = if role_key == "from" { "value" } else { "content" };
    let (name, role) = match fields.get(role_key) {
        Some(Value::String(role)) => (role.as_str(), known_role(role)),
        other => {
            let found = format!("`{place}.{role_key}` is {}", other.map_or("missing", kind));
            return Err(row.error(found, format!("a list of {{\"{role_key}\": …, \"{content_key}\": …}}")));
        }
    };
    let role = role.ok_or_else(|| {
        let found = format!("`{place}.{role_key}` is \"{}\"", short(name));
        row.error(found, "system, user (human), assistant (gpt) or tool (observation)")
    })?;
    // Of `masked` and `prefix`, false says what holds without them.
    let absent = |key: &str, value: &Value| {
        is_blank(value) || *value == Value::Bool(false) && ["masked", "prefix"].contains(&key)
    };
    if let Some((key, remedy)) = UNSUPPORTED.iter().find(|(key, _)| fields.get(*key).is_some_and(|v| !absent(key, v))) {
        return Err(row.error(format!("`{place}.{key}`, which swat cannot honour"), *remedy));
    }
    let mut message = Message::new(role, "");
    for (key, value) in fields {
        let known = key == role_key || key == content_key || TRAINED.contains(&key.as_str());
        if !known && !value.is_null() && !matches!(value, Value::Array(list) if list.is_empty()) {
            message.fields.insert(key.clone(), value.clone());
        }
    }
    if let Some(calls) = message.fields.get_mut("tool_calls") {
        *calls = parsed(calls);
        if !calls.as_array().is_some_and(|list| list.iter().all(Value::is_object)) {
            return Err(row.error(format!("`{place}.tool_calls` is {}", kind(calls)), "a list of objects"));
        }
    }
    if CALLS.contains(&name) {
        let calls = tool_calls(row, (place, name), fields.get(content_key))?;
        message.fields.insert("tool_calls".into(), calls);
    } else {
        let silent = fields.get(content_key).is_none_or(Value::is_null) && message.fields.contains_key("tool_calls");
        if !silent {
            message.content = content(row, place, fields, content_key)?;
        }
    }
    match (trained(row, &TRAINED, fields, &format!("{place}."))?, role) {
        (Some(false), _) => message.training = Training::Context,
        (Some(true), "assistant") | (None, _) => {}
        (Some(true), _) => {
            let found = format!("`{place}`, a turn of the {role}, marked as trained");
            return Err(
                row.error(found, "weights of 0 (or none) but in the assistant's turns, which alone are trained")
            );
        }
    }
    Ok(message)
}

fn known_role(role: &str) -> Option<&'static str> {
    match role.to_ascii_lowercase().as_str() {
        "system" | "developer" => Some("system"),
        "user" | "human" => Some("user"),
        "assistant" | "gpt" | "model" | "chatgpt" | "bot" | "ai" => Some("assistant"),
        name if CALLS.contains(&name) => Some("assistant"),
        "tool" | "observation" | "tool_response" | "function_response" | "function" | "ipython" => Some("tool"),
        _ => None,
    }
}

/// Calls of a turn of the role `name`, one of [`CALLS`]: the JSON text of one `{"name", "arguments"}`, or of a list of them.
fn tool_calls(row: &Row, (place, name): (&str, &str), value: Option<&Value>) -> Result<Value> {
    let calls = match value.map(parsed) {
        Some(Value::Array(list)) => list,
        Some(call) => vec![call],
        None => Vec::new(),
    };
    let named = |call: &Value| call.get("name").is_some_and(Value::is_string) && call.get("arguments").is_some();
    if calls.is_empty() || !calls.iter().all(named) {
        let expected = "JSON text of {\"name\": …, \"arguments\": …}, or of a list of them";
        return Err(row.error(format!("`{place}`, a {} without a call", short(name)), expected));
    }
    Ok(calls.into_iter().map(|call| json!({ "type": "function", "function": call })).collect())
}

/// What the first of `keys` that has a value says of whether the turn, or the row, is trained; `place` is put before the
/// key in errors.
pub(super) fn trained(row: &Row, keys: &[&str], fields: &Map<String, Value>, place: &str) -> Result<Option<bool>> {
    let mut all = None;
    for key in keys {
        let one = match fields.get(*key) {
            None | Some(Value::Null) => continue,
            Some(Value::Bool(trained)) => Some(*trained),
            Some(Value::Number(number)) => number.as_f64().and_then(zero_or_one),
            Some(Value::String(text)) => match text.trim().to_lowercase().as_str() {
                "true" => Some(true),
                "false" => Some(false),
                number => number.parse().ok().and_then(zero_or_one),
            },
            Some(_) => None,
        };
        let expected = "0 or 1 (false or true): an answer counts in the loss or it does not";
        let one = one.ok_or_else(|| row.error(format!("`{place}{key}` with another value"), expected))?;
        if all.is_some_and(|earlier| earlier != one) {
            return Err(row.error(format!("`{place}{key}` against another key of its turn"), "one of them"));
        }
        all = Some(one);
    }
    Ok(all)
}

fn zero_or_one(number: f64) -> Option<bool> {
    [(0.0, false), (1.0, true)].into_iter().find(|(value, _)| *value == number).map(|(_, trained)| trained)
}

/// A string, or the concatenated text parts of a list.
fn content(row: &Row, place: &str, fields: &Map<String, Value>, key: &str) -> Result<String> {
    let expected = "a string, or a list of {\"type\": \"text\", \"text\": …}";
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts
            .iter()
            .enumerate()
            .map(|(i, part)| match (part.get("type").and_then(Value::as_str), part.get("text")) {
                (None | Some("text" | "input_text" | "output_text"), Some(Value::String(text))) => Ok(text.as_str()),
                (other, _) => {
                    let what = other.map_or_else(|| kind(part).to_string(), |t| format!("of type \"{}\"", short(t)));
                    Err(row.error(format!("`{place}.{key}[{i}]` is {what}"), expected))
                }
            })
            .collect(),
        other => Err(row.error(format!("`{place}.{key}` is {}", other.map_or("missing", kind)), expected)),
    }
}
