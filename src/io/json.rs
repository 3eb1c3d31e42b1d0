//! JSON files: bounded reads and atomic writes.

use super::input::{printable, read_text};
use super::write_atomic;
use crate::error::{Error, Result};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::path::Path;

/// Reads a JSON file of at most `max_bytes`; `expected` describes it in errors.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, max_bytes: u64, expected: &str) -> Result<T> {
    let text = read_text(path, max_bytes)?;
    // Editors on Windows write a byte-order mark.
    serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text)).map_err(|e| {
        let what = printable(&e);
        let found = if e.is_data() { what } else { format!("malformed JSON ({what})") };
        Error::input(path.display().to_string(), found, expected)
    })
}

/// Checks the format name that a file states.
///
/// # Errors
/// [`Error::Input`] for another format.
pub(crate) fn check_format(place: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let found: String = found.chars().take(60).collect();
    Err(Error::input(format!("{place}: format"), format!("`{found}`"), format!("`{expected}`")))
}

/// Writes a value as indented JSON with [`write_atomic`].
pub(crate) fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(unserializable)?;
    write_atomic(path, (text + "\n").as_bytes())
}

/// A value as a line of JSON Lines, with its line feed.
pub(crate) fn line(value: &impl Serialize) -> Result<String> {
    Ok(to_string(value)? + "\n")
}

/// What differs between two values, by the path of each difference; `names` say which value is which.
pub(crate) fn differences(one: &Value, other: &Value, names: [&str; 2]) -> Vec<String> {
    let mut found = Vec::new();
    differences_below("", one, other, names, &mut found);
    found
}

fn differences_below(path: &str, one: &Value, other: &Value, names: [&str; 2], found: &mut Vec<String>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                let side = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                differences_below(&below(key), &side(a), &side(b), names, found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differences_below(&below(&i.to_string()), a, b, names, found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            found.push(format!("{path} has {} entries in {} and {} in {}", a.len(), names[0], b.len(), names[1]));
        }
        _ if one == other => {}
        _ => found.push(format!("{path} is {one} in {} and {other} in {}", names[0], names[1])),
    }
}

/// A value as compact JSON.
pub(crate) fn to_string(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(unserializable)
}

pub(crate) fn unserializable(e: serde_json::Error) -> Error {
    Error::failed(format!("cannot serialize JSON: {e}"), "this is a bug; please report it")
}
