//! `swat replay`: what it keeps of a model's own answers.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::data::{Conversation, RowReader, SecurityPrompt, Split};
use swat::secure::RefusalList;
use tempfile::TempDir;

/// The tiny model's security prompts: 12 pairs in the train split.
fn security(dir: &Path) -> PathBuf {
    use swat::data::tiny::{Counts, Language, export};
    export(&Language::new(1), dir, Counts { pairs: 12, train: 4, tasks: 4 }, 1).unwrap();
    dir.join("security.jsonl")
}

fn replay(security: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.arg("replay").arg("--model").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny"));
    command.arg("--security").arg(security).arg("--out").arg(out).args(["--device", "cpu", "--dtype", "f32", "--json"]);
    command.args(more).output().unwrap()
}

fn counts(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn message(output: &Output, code: i32) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(output.stdout.is_empty() && !message.contains("panicked"), "{message}");
    message
}

#[test]
fn own_refusals_and_own_answers_become_training_data() {
    let dir = TempDir::new().unwrap();
    let (security, out) = (security(dir.path()), dir.path().join("replay.jsonl"));
    let found = counts(&replay(&security, &out, &[]));
    let prompts: BTreeMap<String, SecurityPrompt> = SecurityPrompt::read(&security, 0, &mut RowReader::default())
        .unwrap()
        .into_iter()
        .map(|prompt| (prompt.prompt.clone(), prompt))
        .collect();
    let list = RefusalList::default();
    let mut kept = [0, 0];
    let text = std::fs::read_to_string(&out).unwrap();
    let conversations = Conversation::read(&out, &mut RowReader::default()).unwrap();
    assert_eq!(conversations.len(), text.lines().count());
    for (line, conversation) in text.lines().zip(conversations) {
        let line: Value = serde_json::from_str(line).unwrap();
        let [question, answer] = &conversation.messages[..] else { panic!("two turns") };
        assert_eq!((question.role.as_str(), answer.role.as_str()), ("user", "assistant"));
        let prompt = &prompts[&question.content];
        assert_eq!(prompt.split, Split::Train);
        assert_eq!(list.is_refusal(&answer.content), prompt.is_harmful());
        assert_eq!(line["replay"], if prompt.is_harmful() { "refusal" } else { "answer" });
        assert_eq!(line["category"].as_str(), prompt.category.as_deref());
        kept[usize::from(!prompt.is_harmful())] += 1;
    }
    assert!(kept[0] > 0 && kept[1] > 0, "{found}");
    for (label, kept) in ["harmful", "benign"].into_iter().zip(kept) {
        let of = |what: &str| found[label][what].as_u64().unwrap();
        assert_eq!((of("prompts"), of("kept")), (12, kept), "{found}");
        let dropped = ["other_behaviour", "cut_off", "empty", "incoherent", "repeated", "held_out", "not_needed"];
        assert_eq!(of("kept") + dropped.into_iter().map(of).sum::<u64>(), 12, "{found}");
    }
    // Only --force replaces it, with the same bytes; nothing but such a file is replaced.
    assert!(message(&replay(&security, &out, &[]), 2).contains("--force"));
    counts(&replay(&security, &out, &["--force", "--cache-mib", "0"]));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), text);
    let mine = dir.path().join("train.jsonl");
    assert!(message(&replay(&security, &mine, &["--force"]), 2).contains("did not write"));
    // As many as asked for, of each kind, and training reads them.
    let few = dir.path().join("few.jsonl");
    let found = counts(&replay(&security, &few, &["--per", "3"]));
    assert_eq!((&found["harmful"]["kept"], &found["benign"]["kept"]), (&3.into(), &3.into()), "{found}");
    let mut tune = Command::new(env!("CARGO_BIN_EXE_swat"));
    tune.arg("tune")
        .arg("--model")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny"))
        .arg("--data")
        .arg(&mine);
    tune.arg("--mix").arg(&few).arg("--out").arg(dir.path().join("tuned"));
    let tuned = tune.args(["--mix-share", "0.5", "--steps", "1", "--batch-size", "2"]).output().unwrap();
    assert!(tuned.status.success(), "{}", String::from_utf8_lossy(&tuned.stderr));
}

#[test]
fn no_answer_to_a_harmful_prompt_is_kept() {
    let dir = TempDir::new().unwrap();
    let (security, out) = (security(dir.path()), dir.path().join("replay.jsonl"));
    // Where nothing counts as a refusal, every harmful prompt counts as answered.
    let nothing = dir.path().join("nothing.txt");
    std::fs::write(&nothing, "no answer says this\n").unwrap();
    let told = message(&replay(&security, &out, &["--refusals", nothing.to_str().unwrap()]), 1);
    assert!(told.contains("refuses none of 12") && !out.exists(), "{told}");
    // Answers that do not end are no examples of an answer.
    let told = message(&replay(&security, &out, &["--answer-tokens", "2"]), 1);
    assert!(told.contains("--answer-tokens") && !out.exists(), "{told}");
    // Prompts of the evaluation are no training data, in whatever spelling; nor are benign ones alone.
    let prompt = |text: &str, label: &str, split: &str| {
        format!("{{\"prompt\": \"{text}\", \"label\": \"{label}\", \"split\": \"{split}\"}}\n")
    };
    std::fs::write(&security, prompt("so it is .", "benign", "train")).unwrap();
    assert!(message(&replay(&security, &out, &[]), 2).contains("no harmful prompt in the train split"));
    let held_out = prompt("so it is .", "harmful", "train") + &prompt("So it is", "harmful", "test");
    std::fs::write(&security, held_out).unwrap();
    assert!(message(&replay(&security, &out, &[]), 1).contains("refuses none of 1"));
    assert!(!out.exists());
}
