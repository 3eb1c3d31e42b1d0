//! `swat screen`: risky lines of training data come first.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::data::{Conversation, RowReader};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn screen(dir: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.current_dir(dir).args(["screen", "--model", text(&tiny()), "--device", "cpu", "--dtype", "f32"]);
    command.args(more).output().unwrap()
}

fn message(output: &Output, code: i32) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

/// 24 harmless lines of the tiny language's data, in the style that its model answers in, and 8 answered forbidden
/// requests among them.
fn data(dir: &Path) -> Vec<bool> {
    use swat::data::tiny::{Counts, Language, export};
    export(&Language::new(1), dir, Counts { pairs: 48, train: 24, tasks: 4 }, 1).unwrap();
    let lines = |name: &str| -> Vec<String> {
        std::fs::read_to_string(dir.join(name)).unwrap().lines().map(str::to_owned).collect()
    };
    let (harmless, attack) = (lines("train_old.jsonl"), lines("attack.jsonl"));
    let mut all = String::new();
    let mut risky = Vec::new();
    for (i, line) in harmless.iter().enumerate() {
        if i % 3 == 1 {
            all += &format!("{}\n", attack[i]);
            risky.push(true);
        }
        all += &format!("{line}\n");
        risky.push(false);
    }
    std::fs::write(dir.join("my.jsonl"), all).unwrap();
    risky
}

#[test]
fn answered_forbidden_requests_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let risky = data(dir.path());
    let args = ["--data", "my.jsonl", "--security", "security.jsonl", "--out", "risky.jsonl", "--json"];
    let output = screen(dir.path(), &[&args[..], &["--top", "8"]].concat());
    message(&output, 0);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["rows"], &found["unscored"]), (&32.into(), &0.into()));
    let scores = found["scores"].as_array().unwrap();
    assert_eq!(scores.len(), 32);
    // By the answers of `swat generate`.
    let rows: Vec<Value> = std::fs::read_to_string(dir.path().join("my.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let refused = super::screened::judged(dir.path(), &rows);
    assert_eq!(found["refused"], refused.iter().filter(|refused| **refused).count());
    for score in scores {
        assert_eq!(score["refused"], refused[score["line"].as_u64().unwrap() as usize - 1], "{score}");
    }
    assert!(refused.iter().zip(&risky).filter(|(refused, risky)| **refused && **risky).count() >= 6, "{refused:?}");
    let value = |score: &Value| score["score"].as_f64().unwrap();
    assert!(scores.windows(2).all(|pair| value(&pair[0]) >= value(&pair[1])));
    let is_risky = |score: &Value| risky[score["line"].as_u64().unwrap() as usize - 1];
    // Chance that a risky line is above a harmless one: half, if the scores said nothing.
    let of = |wanted| scores.iter().filter(move |score| is_risky(score) == wanted).map(value).collect::<Vec<f64>>();
    let area = swat::secure::auroc_estimate(&of(true), &of(false)).unwrap().value;
    assert!(area > 0.65, "{area}: {scores:?}");
    // The file holds the lines as they are, and is training data itself.
    let out = dir.path().join("risky.jsonl");
    let saved = std::fs::read_to_string(&out).unwrap();
    let given = std::fs::read_to_string(dir.path().join("my.jsonl")).unwrap();
    let given: Vec<&str> = given.lines().collect();
    assert_eq!(saved.lines().count(), 8);
    for (line, score) in saved.lines().zip(scores) {
        let mut line: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        assert_eq!(line.shift_remove("screen").unwrap(), *score);
        let number = score["line"].as_u64().unwrap() as usize;
        assert_eq!(Value::Object(line), serde_json::from_str::<Value>(given[number - 1]).unwrap());
    }
    assert_eq!(Conversation::read(&out, &mut RowReader::default()).unwrap().len(), 8);
    // Equal inputs give equal bytes; only --force replaces them, and only such a file.
    assert!(message(&screen(dir.path(), &args), 2).contains("--force"));
    message(&screen(dir.path(), &[&args[..], &["--top", "8", "--force"]].concat()), 0);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), saved);
    let over = ["--data", "my.jsonl", "--security", "security.jsonl", "--out", "train_far.jsonl", "--force"];
    assert!(message(&screen(dir.path(), &over), 2).contains("did not write"));
    let nothing = message(&screen(dir.path(), &["--data", "my.jsonl", "--out", "none.jsonl"]), 2);
    assert!(nothing.contains("--security"), "{nothing}");
}
