//! Comparison of a checkpoint's run with the run that resumes it.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::group::{Group, from_each};
use crate::io::json::differences;
use serde_json::Value;
use std::path::Path;

/// Most differences that an error names.
const NAMED: usize = 5;

/// Checks that a checkpoint is of the same run; the error lists the differences.
pub(super) fn check(there: &Value, here: &Value, checkpoint: &Path) -> Result<()> {
    let Some(text) = named(differences(there, &round_trip(here), ["the checkpoint", "this run"])) else {
        return Ok(());
    };
    Err(Error::input(
        checkpoint.display().to_string(),
        format!("a run that differs from this one: {text}"),
        "the same model, data and options; or start again without --resume",
    ))
}

/// Checks that all ranks have the same run; each names the first rank that differs from rank 0.
pub(super) fn agree<B: Backend>(own: &Value, group: &dyn Group<B>) -> Result<()> {
    let size = group.share().size;
    if size == 1 {
        return Ok(());
    }
    let runs = from_each(group, own)?;
    for (rank, run) in runs.iter().enumerate() {
        if let Some(text) = named(differences(&runs[0], run, ["rank 0", &format!("rank {rank}")])) {
            // So that none of the others, which find the same, sees this one end before.
            let _ = group.exchange(vec![Vec::new(); size]);
            let expected = "the same model, data and options on all ranks";
            return Err(Error::input(
                format!("rank {rank}"),
                format!("another run than that of rank 0: {text}"),
                expected,
            ));
        }
    }
    Ok(())
}

/// The first differences; none where there are none.
fn named(mut found: Vec<String>) -> Option<String> {
    let more = found.len().saturating_sub(NAMED);
    found.truncate(NAMED);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    (!found.is_empty()).then(|| found.join("; ") + &more)
}

/// The value after a round trip through text, so that numbers that a parser rounds do not differ.
fn round_trip(value: &Value) -> Value {
    serde_json::from_str(&value.to_string()).unwrap_or(Value::Null)
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
