//! Comparison of a checkpoint's run with the run that resumes it.

use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Most differences that an error names.
const NAMED: usize = 5;

/// Checks that a checkpoint is of the same run; the error lists the differences.
pub(super) fn check(there: &Value, here: &Value, checkpoint: &Path) -> Result<()> {
    let mut found = Vec::new();
    differences(there, &round_trip(here), "", &mut found);
    if found.is_empty() {
        return Ok(());
    }
    let more = found.len().saturating_sub(NAMED);
    found.truncate(NAMED);
    let mut text = found.join("; ");
    if more > 0 {
        text += &format!("; and {more} more");
    }
    Err(Error::input(
        checkpoint.display().to_string(),
        format!("a run that differs from this one: {text}"),
        "the same model, data and options; or start again without --resume",
    ))
}

/// The value after a round trip through text, so that numbers that a parser rounds do not differ.
fn round_trip(value: &Value) -> Value {
    serde_json::from_str(&value.to_string()).unwrap_or(Value::Null)
}

fn differences(there: &Value, here: &Value, path: &str, found: &mut Vec<String>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (there, here) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                let side = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
                differences(&side(a), &side(b), &below(key), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differences(a, b, &below(&i.to_string()), found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            found.push(format!("{path} has {} entries in the checkpoint and {} in this run", a.len(), b.len()));
        }
        _ if there == here => {}
        _ => found.push(format!("{path} is {there} in the checkpoint and {here} in this run")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_are_named_by_field() {
        let there = json!({"model": "a", "phases": [{"lr": 2e-5, "name": "all"}], "old": 1});
        let here = json!({"model": "b", "phases": [{"lr": 3e-5, "name": "all"}]});
        let text = check(&there, &here, Path::new("x")).unwrap_err().to_string();
        for part in [
            "model is \"a\" in the checkpoint and \"b\" in this run",
            "phases.0.lr is",
            "old is 1 in the checkpoint and null in this run",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("name"), "{text}");
        let fewer = json!({"model": "a", "phases": [], "old": 1});
        assert!(
            check(&there, &fewer, Path::new("x"))
                .unwrap_err()
                .to_string()
                .contains("1 entries in the checkpoint and 0")
        );
    }

    #[test]
    fn what_comes_back_from_a_file_is_the_same() {
        for i in 1..2000u64 {
            let here = json!({"lr": (i as f64).sqrt() * 1e-7, "eps": 1e-8f32});
            let there: Value = serde_json::from_str(&here.to_string()).unwrap();
            check(&there, &here, Path::new("x")).unwrap();
        }
    }
}
